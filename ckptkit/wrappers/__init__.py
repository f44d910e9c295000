"""What wrappers and trainers put around weights: prefixes, segments and envelopes, each known by its own mark."""
