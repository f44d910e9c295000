"""Statistics of the values of tensors: ``ckptkit.stats`` and ``ckpt stats``."""
