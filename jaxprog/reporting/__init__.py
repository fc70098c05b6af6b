"""What people read of a run once it is written down.

`rundir` reads a run's files; `facts`, `baselines` and `timeline` say what is in
them; `page/` has the sections, made of `parts`, for `report` in words and for
the page; `plots`, `scores` and `contact_sheet` are pictures and tables of their
own; `outputs` writes all of a run.
"""
