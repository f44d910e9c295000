"""Output files: complete under a temporary name first, with the bytes of inputs copied as the system does it best."""
