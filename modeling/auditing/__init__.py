"""Which labels of a data set are suspect."""
