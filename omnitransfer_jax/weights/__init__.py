"""Weights between this code, diffusers / transformers and the original repositories."""
