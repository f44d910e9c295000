"""Tensor operations: convert tensors between layouts; the outputs are described before any tensor is read."""
