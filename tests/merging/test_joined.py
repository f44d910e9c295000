"""Small tensors that are merged as neighbours: each by one thread, with the same results as alone."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit.core.cast_losses import CastLoss
from ckptkit.core.checkpoint.payload import Payload
from ckptkit.errors import PlanError
from ckptkit.formats.writing.copying import merge_extents
from ckptkit.values.computed import JoinedPayload
from ckptkit.values.merging.payload import MergedPayload
from ckptkit.values.sinks import MemorySink
from ckptkit.values.workers import PIECE, Workers
from tests.helpers_merging import merge_payload

SIZES = (0, 1, 100_000, 70_000, 3, 2_000)


def payloads(losses: dict[str, CastLoss], workers: Workers, extra: float = 0.0) -> list[MergedPayload]:
    """Return merges of tensors of several sizes; each loses its first element to the output dtype."""
    made = []
    for number, size in enumerate(SIZES):
        rng = np.random.default_rng(number)
        base, *others = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
        others[0][:1] = 1e6
        others[1][1:2] += extra
        given = {"weight": 1.0, "density": 0.5}
        tensors = [base, *others]
        one = merge_payload(
            "ties", tensors, given, base=True, out="F16", key=f"w{number}", losses=losses, workers=workers
        )
        made.append(one)
    return made


def written(payload: Payload) -> tuple[bytes, int]:
    """Return the bytes that a payload writes, and their checksum as it says."""
    assert isinstance(payload, MergedPayload | JoinedPayload)
    data = bytearray(payload.nbytes)
    steps = payload.write_to(MemorySink(memoryview(data)), 0, checksum=True)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bytes(data), end.value


def test_neighbours_have_the_bytes_the_losses_and_the_checksum_that_they_have_alone() -> None:
    alone: dict[str, CastLoss] = {}
    together: dict[str, CastLoss] = {}
    with Workers(3) as workers:
        want = b"".join(written(one)[0] for one in payloads(alone, workers))
        joined = list(merge_extents(payloads(together, workers)))
        assert len(joined) == 1
        found, checksum = written(joined[0])
        assert found == want == b"".join(joined[0].chunks())
    assert checksum == zlib.crc32(want)
    assert together == alone
    assert [loss.overflowed for loss in alone.values()] == [min(size, 1) for size in SIZES]


def test_a_tensor_of_several_pieces_stays_alone() -> None:
    large = merge_payload("linear", [np.zeros(PIECE + 1), np.ones(PIECE + 1)], {})
    small = merge_payload("linear", [np.zeros(5), np.ones(5)], {})
    assert [type(one) for one in merge_extents([small, large, small, small])] == [
        MergedPayload,
        MergedPayload,
        JoinedPayload,
    ]


def test_the_error_of_a_neighbour_names_its_key() -> None:
    with Workers(2) as workers:
        (joined,) = merge_extents(payloads({}, workers, extra=np.inf)[2:])
        with pytest.raises(PlanError, match="'w2' cannot be merged"):
            written(joined)


def test_a_model_of_small_tensors_is_written_with_each_tensor_in_its_place(tmp_path: Path) -> None:
    states = {
        name: {f"l.{number}": torch.randn(number % 7, 5) for number in range(60)} | {"norm": torch.ones(3)}
        for name in ("a", "b")
    }
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    inputs = {name: tmp_path / f"{name}.safetensors" for name in states}
    plan = ckptkit.plan_recipe({"method": "average", "input": [{"name": name} for name in states]}, inputs=inputs)
    ckptkit.execute(plan, inputs, tmp_path / "out.safetensors")
    for key, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, (states["a"][key] + states["b"][key]) / 2)
