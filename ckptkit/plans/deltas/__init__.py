"""Deltas: how a patch is made of two checkpoints, and the plan that makes one of them of the other and the patch."""
