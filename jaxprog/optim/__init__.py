"""Factories that return optax objects."""
