"""Configs of jaxprog: default.py has every field, the others override."""
