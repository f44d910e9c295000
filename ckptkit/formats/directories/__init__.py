"""Directories that hold a checkpoint: which files are read, and what is beside them."""
