"""The heads: from a pair's features to class logits."""
