"""What concerns more than one node. Empty so far: autoscaling and deployment files come here."""
