"""What people see of a run: while it goes on, and afterwards.

`history` is the data, the other modules show it; none of them knows how a
network is trained.
"""
