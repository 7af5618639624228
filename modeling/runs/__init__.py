"""The run folder: everything a result consists of."""
