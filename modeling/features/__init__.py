"""Cached features joined into tensors, their splits, and what heads read of them."""
