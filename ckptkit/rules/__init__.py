"""Rules: rename, filter and combine the keys of a checkpoint."""
