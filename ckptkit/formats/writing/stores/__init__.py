"""Outputs in stores, which are named by URLs and written through fsspec."""
