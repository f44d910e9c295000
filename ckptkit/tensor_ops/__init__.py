"""Tensor operations: how the tensors of one layout become those of another, described before a byte is read."""
