"""Sweeps over grids, their comparison, and the automatic search."""
