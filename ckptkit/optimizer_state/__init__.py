"""Optimizer state by parameter names: read any form of torch, edit it like the weights, load it, write it."""
