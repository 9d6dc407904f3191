"""The models: one file, one whole model."""
