"""Prefixes, segments and envelopes that wrappers and trainers add around weights."""
