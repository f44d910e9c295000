"""Pickles, read and written without running any of them."""
