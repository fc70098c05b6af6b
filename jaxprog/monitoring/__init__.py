"""Instruments of a running stage: what they note, others read and show.

history, incidents, outcomes, diagnostics, environment, step_times, memory and
profile note; progress, notebook, activity and pictures show; loggers hand
figures to tensorboard, events and services.
"""
