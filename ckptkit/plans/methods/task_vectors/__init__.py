"""Methods that add to a base what models changed of it."""
