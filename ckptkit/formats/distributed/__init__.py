"""Checkpoints of many ranks: torch.distributed.checkpoint and ZeRO."""
