"""What `make` calls for a reader."""
