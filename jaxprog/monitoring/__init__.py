"""Instruments of a running stage: what they note, others read and show."""
