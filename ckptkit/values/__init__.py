"""The value engine: numbers computed from the bytes of tensors, with numpy and ml_dtypes, never with torch."""
