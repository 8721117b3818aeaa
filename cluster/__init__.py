"""More than one node: launching, autoscaling, placement, deployment files."""
