"""The thresholds of the garbage collector are back after a load, also where it failed or where threads overlap."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest
import torch

import ckptkit
from ckptkit.core.gc_pause import rare_gc


def test_the_thresholds_are_restored_after_a_load_and_after_a_failed_one() -> None:
    before = gc.get_threshold()
    model = torch.nn.Linear(2, 2)
    ckptkit.load_into(model, {"weight": torch.ones(2, 2)})
    with pytest.raises(ckptkit.PlanError):
        ckptkit.load_into(model, {"weight": torch.ones(3, 2)}, on_mismatch="error")
    assert gc.get_threshold() == before


def test_blocks_that_overlap_restore_the_thresholds_at_the_end_of_the_last() -> None:
    """As two threads enter and leave them, the first to begin may be the first to end."""
    before = gc.get_threshold()
    first, second = ExitStack(), ExitStack()
    first.enter_context(rare_gc())
    second.enter_context(rare_gc())
    first.close()
    assert gc.get_threshold() != before
    second.close()
    assert gc.get_threshold() == before
