"""Figures with intervals, and predictions of saved runs."""
