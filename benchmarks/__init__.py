"""Load generators and suites for this project and its peers."""
