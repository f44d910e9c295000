"""Ordered rules: from the keys that are there to the keys that shall be."""
