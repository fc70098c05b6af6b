"""What a run will need, on this hardware or on some that is not here.

`inspection` finds what stands in its way. An `outlook` says what each stage
needs and takes: `timing` measures it here, `elsewhere` compiles for `chips` and
asks what their makers say; what a step is made of is counted in `costs`.
"""
