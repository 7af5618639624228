"""A warm predictor for others: by lines of JSON, and over HTTP on this machine."""
