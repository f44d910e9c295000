"""See what a checkpoint holds, see what will load, make it fit, and prove what the optimizer trains."""
