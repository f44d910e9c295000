"""Deltas: what changed from one checkpoint to another, in a patch file that makes the second of the first."""
