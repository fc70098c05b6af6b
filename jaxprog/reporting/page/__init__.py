"""report.html: one file that needs no network, made of sections and charts.

`sections` lists them, each in a module of its name; `html` is the page around
them, `side_by_side` the one of several runs; `markup`, `charts` and `style` are
what both are made of.
"""
