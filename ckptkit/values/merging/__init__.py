"""Merges of several tensors into one: pieces of the inputs in, a piece of the output out."""
