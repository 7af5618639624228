"""Features in the files of other tools: caches written as those, and made of them."""
