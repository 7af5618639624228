"""Figures with intervals, and paired tests."""
