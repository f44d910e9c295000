"""Merges of task vectors: what models changed of their base."""
