"""The reference studies' published tables, and our figures beside them."""
