"""Compare param groups with each other, with a lock, and with a spec."""
