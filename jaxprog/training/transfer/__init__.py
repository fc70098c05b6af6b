"""What a stage takes over from those before it, or from a file."""
