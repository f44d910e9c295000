"""A small model, real training steps, and the comparison of two optimizer states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["OPTIMIZERS", "Net", "same_state", "trained"]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if hasattr(torch.optim, name)}


class Net(nn.Module):
    """A network with a fused matrix, a norm with buffers, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 5)
        self.head = nn.Linear(5, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        mixed: torch.Tensor = self.head(self.fc(self.norm(query * key.sigmoid() + value)))
        return mixed


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, *, seed: int = 0
) -> torch.optim.Optimizer:
    """Make real steps on data that depends only on the seed, and return the optimizer."""
    for step in range(steps):
        data = torch.randn(6, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return optimizer


def same_state(one: Any, other: Any) -> bool:
    """Return whether two nested values are equal to the last bit, including the types of containers and numbers."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and torch.equal(one, other)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_state, one, other))
    return type(one) is type(other) and bool(one == other)
