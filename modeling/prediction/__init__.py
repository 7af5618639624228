"""What runs say: of cached rows, of raw pairs, and of training rows they have not seen."""
