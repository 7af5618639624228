"""How pairs lie on disk: one module for each kind of layout, and what they share."""
