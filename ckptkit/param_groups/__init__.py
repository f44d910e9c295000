"""Which parameter trains with which options: specs, groups for torch optimizers, and proof that they fit the model."""
