"""Instruments of a running stage: what they note, others read and show.

history, incidents, outcomes, diagnostics, environment, step_times, memory and
profile note; progress, bars, tensorboard and pictures show.
"""
