"""State, steps, loop and ladder."""
