"""What the server's processes tell of themselves: logs and traces."""
