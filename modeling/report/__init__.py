"""The report page of a run: data of its figures, the figures, and the page that shows them."""
