"""Ray Serve deployments: ingress, engine replica, trunk and routing."""
