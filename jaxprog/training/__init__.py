"""One run: its setup and state, the steps, the loop, the ladder of stages."""
