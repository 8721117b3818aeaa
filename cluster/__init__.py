"""More than one node: deployment files, the autoscaling policy, and a simulator of fleets."""
