"""Plans: descriptions of outputs, made before any tensor is read, and their execution."""
