"""Stage 1: image-text pairs -> encoders -> HDF5 feature caches."""
