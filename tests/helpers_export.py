"""Archives of torch.export for the tests: a real one, and changed copies."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from tests.features import only_known
from tests.helpers_formats import random_tensor, rezip

__all__ = ["CONSTANTS", "WEIGHTS", "changed", "config", "exported", "exported_as", "small"]

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.bfloat16, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    *only_known(torch, "float8_e8m0fnu"),
]  # fmt: skip


class Net(nn.Module):
    """A module with tied, sliced and transposed weights, a non-persistent buffer, a constant, and every dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(3, 4, bias=False)
        self.b.weight = self.a.weight
        base = torch.arange(20.0)
        self.slice = nn.Parameter(base[4:8])
        self.register_buffer("whole", base)
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).T)
        self.register_buffer("wide", torch.ones(1, 1).expand(2, 3))
        self.register_buffer("none", torch.ones(0, 3))
        self.register_buffer("scalar", torch.tensor(5))
        self.register_buffer("passing", torch.full((4,), 3.0), persistent=False)
        self.fixed = torch.full((4,), 2.0)
        for dtype in DTYPES:
            self.register_buffer(f"all_{str(dtype).removeprefix('torch.')}", random_tensor(dtype, (3,)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.a(x) + self.b(x) + self.passing + self.fixed + self.slice + torch.tensor([1.0] * 4)
        return made


def exported_as(save: Callable[[io.BytesIO, torch.export.ExportedProgram], None], net: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        save(buffer, torch.export.export(net, (torch.ones(2, 3),)))
    return buffer.getvalue()


@cache
def exported() -> bytes:
    return exported_as(lambda buffer, program: torch.export.save(program, buffer), Net())


@cache
def small() -> bytes:
    """Return the archive of a program with one linear layer, the smallest that torch writes."""
    return exported_as(lambda buffer, program: torch.export.save(program, buffer), nn.Linear(3, 2))


def root_of(data: bytes) -> str:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.namelist()[0].partition("/")[0] + "/"


def config(data: bytes, place: str = WEIGHTS) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        made: dict[str, Any] = json.loads(archive.read(root_of(data) + place))["config"]
        return made


def changed(data: bytes, /, **entries: bytes | None) -> bytes:
    """Return the archive with other contents of these entries; None removes an entry."""
    return rezip(data, {root_of(data) + place: content for place, content in entries.items()})
