"""The encoders: what one is, the registry, one file a backend, and where weights come from."""
