"""Methods that average tensors, or add differences of tensors."""
