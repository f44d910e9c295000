"""How time and memory grow: works on files of 1 to 8 GB, and of 1,000 to 1,000,000 tensors."""

from __future__ import annotations

from tests.benchmarks.descriptions import Growth, ckpt
from tests.benchmarks.rows import AGAIN, LARGE, RENAMED, A, flushed_copy, moved, parsed, sft

__all__ = ["GROWTH", "SIZES"]

SIZES: dict[str, tuple[float, ...]] = {"GB": (1, 2, 4, 8), "tensors": (1000, 10_000, 100_000, 1_000_000)}
GROWTH = (
    Growth("rename", "GB", ckpt(f"remap {LARGE} -o out.safetensors --rename 'module.*=*'"), flushed_copy(LARGE)),
    Growth(
        "cast F32 to BF16",
        "GB",
        ckpt(f"convert {LARGE} -o out.safetensors --dtype BF16"),
        moved(0.5, LARGE, limit=1.2),
    ),
    Growth("check", "GB", ckpt(f"check {LARGE}", None), sft(f"check {LARGE}", 0.8)),
    Growth("stats", "GB", ckpt(f"stats {LARGE}"), sft(f"stat {LARGE}", 0.25)),
    Growth("show", "tensors", ckpt(f"show {A}"), parsed(3.0, A)),
    Growth("diff, same keys", "tensors", ckpt(f"diff {A} {AGAIN}"), parsed(2.5, A, AGAIN)),
    Growth("diff, all keys renamed", "tensors", ckpt(f"diff {A} {RENAMED}", 1), parsed(2.5, A, RENAMED)),
    Growth(
        "remap, every key renamed",
        "tensors",
        ckpt(f"remap {A} -o out.safetensors --rename 'layers.*=blocks.*'"),
        parsed(4.0, A, RENAMED),
    ),
)
