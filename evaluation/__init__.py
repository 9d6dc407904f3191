"""Scores of what was generated, and the page that shows them."""
