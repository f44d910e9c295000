"""Methods that move along the arcs between the directions of tensors."""
