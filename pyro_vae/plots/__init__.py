"""Plots: numbers to matplotlib figures.

`run`, `tiles`, `posterior` and `calibration` draw arrays and know no model. `codes` and
`from_model` compute the arrays for the figures of a run.
"""
