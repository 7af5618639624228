"""Training heads: stacked gradient descent, closed forms, processes side by side."""
