"""The command line `trunkline`."""
