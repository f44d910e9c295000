"""Work inside a process that is prepared first: each function prints its own seconds and peak of memory in bytes.

``python timed.py FUNCTION ARGUMENTS...``. The peak is that above the memory before the work.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def load(who: str, path: str, width: str, dtype: str) -> None:
    """Load a file into a model that is in memory already."""
    model = _model(path, int(width), dtype)
    loaders: dict[str, Callable[[nn.Module, str], object]] = {"ckptkit": _ckptkit, "torch": _torch}
    _report(lambda: loaders[who](model, path))


def load_once(who: str, path: str, width: str, dtype: str) -> None:
    """Load a file for the first time in a process: with the imports of the loader, but for torch."""
    model = _model(path, int(width), dtype)
    loaders: dict[str, Callable[[nn.Module, str], object]] = {"ckptkit": _ckptkit, "torch": _torch}
    _report(lambda: loaders[who](model, path), first=True)


def groups(who: str) -> None:
    """Validate or build groups of 16,000 parameters; the least work is one pass over them that collects the ids."""
    import torch
    from torch import nn

    from ckptkit import build_param_groups, validate_param_groups

    def block() -> nn.Module:
        inner = {name: nn.Linear(4, 4) for name in ("q", "k", "o")}
        return nn.ModuleDict({**inner, "norm": nn.LayerNorm(4)})

    model = nn.Sequential(*(block() for _ in range(2000)))
    spec = [
        {"name": "plain", "params": ["*.bias", "*.norm.*"], "weight_decay": 0.0},
        {"name": "others", "rest": True, "lr": 0.1},
    ]
    optimizer = torch.optim.AdamW(build_param_groups(model, spec))
    works: dict[str, Callable[[], object]] = {
        "validate": lambda: validate_param_groups(model, optimizer),
        "build": lambda: build_param_groups(model, spec),
        "ids": lambda: {id(parameter) for _, parameter in model.named_parameters()},
    }
    _report(works[who])


def _ckptkit(model: nn.Module, path: str) -> object:
    from ckptkit import load_into

    return load_into(model, path)


def _torch(model: nn.Module, path: str) -> object:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return model.load_state_dict(load_file(path))
    import torch

    return model.load_state_dict(torch.load(path, weights_only=True, mmap=path.endswith(".pt")))


def _model(path: str, width: int, dtype: str) -> nn.Module:
    """Return a model as large as the file."""
    import torch
    from torch import nn

    def block() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(width, width) for name in ("q", "k", "v", "o", "up", "down")})

    number: torch.dtype = getattr(torch, dtype)
    blocks = round(Path(path).stat().st_size / (6 * width * (width + 1) * number.itemsize))
    with torch.device("meta"):
        model = nn.Sequential(*(block().to(number) for _ in range(blocks)))
    model = model.to_empty(device="cpu").requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.fill_(0.5)
    return model


def _report(work: Callable[[], object], *, first: bool = False) -> None:
    if not first:
        work()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, times = _status("VmRSS"), []
    for _ in range(1 if first else 5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    print(statistics.median(times), max(_status("VmHWM") - before, 0))


def _status(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
