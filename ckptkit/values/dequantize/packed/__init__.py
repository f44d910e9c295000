"""Schemes that pack several codes into each byte or word: bitsandbytes, GPTQ, AWQ, compressed-tensors and MLX."""
