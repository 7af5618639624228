"""From records to a cache: preparation of rows, encoding by blocks, writing."""
