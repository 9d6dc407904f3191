"""OmniTransfer (arXiv 2601.14250) in JAX."""
