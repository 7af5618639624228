"""Stage 2: cached features -> heads -> runs, predictions, reports."""
