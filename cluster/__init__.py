"""What concerns more than one node. Deployment files, and a simulator of fleets."""
