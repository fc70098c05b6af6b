"""Configs of jaxprog: default.py names every field, the others override."""
