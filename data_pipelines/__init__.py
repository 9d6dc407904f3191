"""From clips on disk to what the models read, and back."""
