"""What front and core say to each other."""
