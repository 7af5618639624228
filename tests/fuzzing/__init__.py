"""Hostile input, one function for each kind: it builds the input of a seed, runs it through a public door, and judges."""
