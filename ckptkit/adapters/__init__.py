"""Adapters: what the tensors of an adapter file mean, and which weights of a base they change."""
