"""What keeps a run from losing its work; it knows no data and no config."""
