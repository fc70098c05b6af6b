"""What people read of a run once it is written down."""
