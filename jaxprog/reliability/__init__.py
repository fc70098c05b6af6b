"""What keeps a run from losing its work; it knows no data and no config.

checkpoints and integrity save and verify; lock keeps a workdir for one run;
signals and watchdog end it as planned; peers and cluster are for many hosts.
"""
