"""Paired tensors as rules, and as the text of a rule file."""
