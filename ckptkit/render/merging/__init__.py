"""Pages about merges: the methods, what a plan merges, and the recipe of an output."""
