"""Time ckptkit against another program, in pairs, and print ratios: ``python tests/benchmarks/run.py``.

Each pair runs both commands in turn, each as a process, so that a change of the machine's speed affects both. The
result is the median of the ratios; memory is the peak of the process. Seconds differ between machines and are printed
for orientation only. The exit code is 1 if a ratio or a peak is above its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

MB = 1_000_000
PYTHON = sys.executable
CKPT = [PYTHON, "-m", "ckptkit"]


@dataclass(frozen=True)
class Race:
    """A command of ckptkit, the command to compare it with, and the limits of time ratio and memory."""

    name: str
    ours: list[str]
    rival: list[str]
    limit: float
    memory_limit: int | None = None  # bytes
    inside: bool = False  # both commands print their own seconds, without those for preparations, and perhaps a peak


@dataclass(frozen=True)
class Run:
    """One run of a process."""

    seconds: float
    peak: int


def _run(command: list[str], directory: Path, *, inside: bool = False) -> Run:
    begin = time.perf_counter()
    output = subprocess.PIPE if inside else subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=directory, stdout=output, stderr=subprocess.DEVNULL)
    try:
        text = process.stdout.read() if process.stdout is not None else b""
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # an interrupt: the process must not write on while its directory is removed
        process.kill()
        process.wait()
        raise
    printed = text.split() if inside else []
    seconds = float(printed[0] if printed else "nan") if inside else time.perf_counter() - begin
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"failed: {shlex.join(command)}")
    return Run(seconds, int(printed[1]) if len(printed) > 1 else usage.ru_maxrss * 1024)


BLOCK = tuple(f"block.{number}" for number in range(100))
META = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3", "attention_norm", "ffn_norm")  # fmt: skip
HF = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
      "mlp.up_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip


def _write_safetensors(
    path: Path,
    count: int,
    elements: int,
    prefix: str = "",
    block: Sequence[str] = BLOCK,
) -> None:
    # The peak of a child begins at the memory of its parent, so this process must stay small: a fork writes the file.
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"could not write {path}")
        return
    failed = 1
    try:
        _fill(path, count, elements, prefix, block)
        failed = 0
    finally:
        os._exit(failed)  # an interrupt ends the child here: only the parent removes the directory


def _fill(path: Path, count: int, elements: int, prefix: str, block: Sequence[str]) -> None:
    header = {}
    for index in range(count):
        begin = index * elements * 4
        header[f"{prefix}layers.{index // len(block)}.{block[index % len(block)]}.weight"] = {
            "dtype": "F32",
            "shape": [elements],
            "data_offsets": [begin, begin + elements * 4],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count):
            file.write(os.urandom(elements * 4) if elements < 1000 else os.urandom(1 << 20) * (elements * 4 >> 20))


def _write_torch(path: Path, count: int, elements: int, content: str = "weights") -> None:
    tensors = f"{{f'layers.{{i}}.weight': torch.randn({elements}) for i in range({count})}}"
    program = f"import torch; weights = {tensors}; torch.save({content}, {str(path)!r})"
    subprocess.run([PYTHON, "-c", program], check=True)


# The least work of any comparison by identity: one pass over the names that collects the ids.
GROUPS = """
import statistics, time, torch
from torch import nn
from ckptkit import build_param_groups, validate_param_groups
linear = lambda: nn.Linear(4, 4)
block = lambda: nn.ModuleDict({"q": linear(), "k": linear(), "norm": nn.LayerNorm(4), "o": linear()})
model = nn.Sequential(*(block() for _ in range(2000)))
spec = [{"name": "plain", "params": ["*.bias", "*.norm.*"], "weight_decay": 0.0}, {"rest": True, "lr": 0.1}]
optimizer = torch.optim.AdamW(build_param_groups(model, spec))
ids = lambda: {id(parameter) for _, parameter in model.named_parameters()}
times = []
for _ in range(9):
    begin = time.process_time()
    WORK
    times.append(time.process_time() - begin)
print(statistics.median(times))
"""
GROUPS_WORK = {"validate": "validate_param_groups(model, optimizer)", "build": "build_param_groups(model, spec)"}


# Both load the same file into the same model in memory of its own; the peak is that above the model, before the load.
LOAD = """
import re, statistics, time, torch
from pathlib import Path
from torch import nn
torch.set_num_threads(1)
with torch.device("meta"):
    block = lambda: nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "o", "up", "down")})
    model = nn.Sequential(*(block().to(torch.DTYPE) for _ in range(BLOCKS)))
model = model.to_empty(device="cpu").requires_grad_(False)
for parameter in model.parameters():
    parameter.fill_(0.5)
status = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def load():
    WORK
"""
LOAD_SAVE = "torch.save(model.state_dict(), 'PATH'LEGACY)"
LOAD_TIMES = """
load()
Path("/proc/self/clear_refs").write_text("5")
before, times = status("VmRSS"), []
for _ in range(5):
    begin = time.perf_counter()
    load()
    times.append(time.perf_counter() - begin)
print(statistics.median(times), status("VmHWM") - before)
"""
LOAD_OURS = "from ckptkit import load_into; load_into(model, 'PATH')"
LOAD_SAFETENSORS = "from safetensors.torch import load_file; model.load_state_dict(load_file('PATH'))"
LOAD_TORCH = "model.load_state_dict(torch.load('PATH', weights_only=True, mmap=MMAP))"


def _load_races(directory: Path, gigabytes: float) -> Iterable[Race]:
    """Yield the races of load_into; width and blocks give 126 MB, 420 MB and four times the size of the large files."""
    rows = [
        ("126 MB", "load.safetensors", 512, 20, "float32", LOAD_SAFETENSORS),
        ("420 MB of BF16", "load.safetensors", 1024, 33, "bfloat16", LOAD_SAFETENSORS),
        ("420 MB of .pt", "load.pt", 1024, 17, "float32", LOAD_TORCH.replace("MMAP", "True")),
        ("420 MB of .pth", "load.pth", 1024, 17, "float32", LOAD_TORCH.replace("MMAP", "False")),
        (f"{4 * gigabytes:g} GB", "load.safetensors", 4096, max(int(gigabytes * 10), 1), "float32", LOAD_SAFETENSORS),
    ]
    for size, name, width, blocks, dtype, rival in rows:
        sizes = {"PATH": name, "WIDTH": str(width), "BLOCKS": str(blocks), "DTYPE": dtype}
        save = "from safetensors.torch import save_file; save_file(model.state_dict(), 'PATH')"
        if name != "load.safetensors":
            legacy = ", _use_new_zipfile_serialization=False" if name == "load.pth" else ""
            save = LOAD_SAVE.replace("LEGACY", legacy)
        programs = [LOAD.replace("WORK", work) + after
                    for work, after in ((save, "load()"), (LOAD_OURS, LOAD_TIMES), (rival, LOAD_TIMES))]  # fmt: skip
        for old, new in sizes.items():
            programs = [program.replace(old, new) for program in programs]
        write, ours, theirs = ([PYTHON, "-c", program] for program in programs)
        subprocess.run(write, cwd=directory, check=True)
        yield Race(f"load_into of {size} / load_state_dict", ours, theirs, 2.5, 64 << 20, inside=True)
        (directory / name).unlink()


def races(directory: Path, gigabytes: float) -> Iterable[Race]:
    """Yield each race after writing the files that it needs."""
    _write_safetensors(directory / "small.safetensors", 10, 16)
    show = [*CKPT, "show", "small.safetensors"]
    torch_tool = (
        "import torch\nfrom safetensors import safe_open\n"
        "with safe_open('small.safetensors', 'pt') as f:\n for k in f.keys(): print(k, f.get_slice(k).get_shape())"
    )
    yield Race("show a small file / the same with torch", show, [PYTHON, "-c", torch_tool], 0.5)
    yield Race("show a small file / import click", show, [PYTHON, "-c", "import click"], 3.0)

    for name in ("a", "b"):
        _write_safetensors(directory / f"{name}.safetensors", 100_000, 4)
    parse = (
        "import json\nfor n in 'ab':\n with open(n + '.safetensors', 'rb') as f:\n"
        "  json.loads(f.read(int.from_bytes(f.read(8), 'little')))"
    )
    diff = [*CKPT, "diff", "a.safetensors", "b.safetensors"]
    yield Race("diff 2 x 100,000 tensors / json.loads", diff, [PYTHON, "-c", parse], 3.0, 400 * MB)

    _write_safetensors(directory / "c.safetensors", 10_000, 4, "model.", HF)
    _write_safetensors(directory / "d.safetensors", 10_000, 4, "", META)
    align = [*CKPT, "align", "c.safetensors", "d.safetensors"]
    parse_both = parse.replace("'ab'", "'cd'")
    yield Race("align 2 x 10,000 tensors / json.loads", align, [PYTHON, "-c", parse_both], 30.0, 200 * MB)

    _write_torch(directory / "many.pt", 2000, 4096)
    load = "import torch; torch.load('many.pt', mmap=True, weights_only=True)"
    yield Race("list 2,000 tensors of a .pt / torch.load", [*CKPT, "show", "many.pt"], [PYTHON, "-c", load], 0.2)

    for work, code in GROUPS_WORK.items():
        ours, rival = ([PYTHON, "-c", GROUPS.replace("WORK", one)] for one in (code, "ids()"))
        yield Race(f"{work} 16,000 parameters / their ids in a set", ours, rival, 25.0, inside=True)

    yield from _load_races(directory, gigabytes)

    tensors = max(int(gigabytes * 64), 1)
    _write_safetensors(directory / "large.safetensors", tensors, 4 << 20, "module.")
    _write_torch(directory / "large.pt", tensors, 4 << 20)
    rename = [*CKPT, "remap", "large.safetensors", "-o", "out.safetensors", "--force", "--rename", "module.*=*"]
    convert = [*CKPT, "convert", "large.pt", "-o", "out.safetensors", "--force"]
    rename_pt = [*CKPT, "remap", "large.pt", "-o", "out.pt", "--force", "--rename", "layers.*=h.*"]
    crc = "import zlib\nf, c = open('large.pt', 'rb', 0), 0\nwhile d := f.read(4 << 20): c = zlib.crc32(d, c)"
    check = [*CKPT, "check", "large.pt"]
    yield Race(
        f"check --no-values {gigabytes:g} GB of .pt / crc32",
        [*check, "--no-values"],
        [PYTHON, "-c", crc],
        1.3,
        100 * MB,
    )
    finite = (
        "import torch, zlib\nf, c = open('large.pt', 'rb', 0), 0\nwhile d := f.read(4 << 20):\n c = zlib.crc32(d, c)\n"
        " torch.frombuffer(bytearray(d[: len(d) // 4 * 4]), dtype=torch.float32).isfinite().all()"
    )
    yield Race(
        f"check {gigabytes:g} GB of .pt / crc32 and isfinite in torch", check, [PYTHON, "-c", finite], 1.0, 400 * MB
    )
    naive = (
        "import torch\nfor k, t in torch.load('large.pt', mmap=True, weights_only=True).items():\n"
        "  t = t.double(); print(k, t.mean(), t.std(), t.min(), t.max(), t.norm())"
    )
    stats = [*CKPT, "stats", "large.pt"]
    yield Race(f"stats of {gigabytes:g} GB / some in torch", stats, [PYTHON, "-c", naive], 0.7, 350 * MB)
    yield Race(
        f"rename {gigabytes:g} GB of safetensors / cp + fsync", rename, _copy("large.safetensors"), 1.3, 100 * MB
    )
    yield Race(f"convert {gigabytes:g} GB of .pt / cp + fsync", convert, _copy("large.pt"), 1.5, 150 * MB)
    yield Race(f"rename {gigabytes:g} GB of .pt / cp + fsync", rename_pt, _copy("large.pt"), 1.5, 150 * MB)
    run = "{'model': weights, 'optimizer': {'state': [value + 1 for value in weights.values()]}, 'epoch': 3}"
    _write_torch(directory / "run.pt", max(tensors // 2, 1), 4 << 20, run)
    edit = [*CKPT, "remap", "run.pt", "-o", "out.pt", "--force", "--rename", "layers.*=h.*"]
    yield Race(f"edit {gigabytes:g} GB of a training run / cp + fsync", edit, _copy("run.pt"), 1.5, 150 * MB)


def _copy(name: str) -> list[str]:
    # Like ckptkit: write beside the target, flush, then rename over the file of the previous run.
    return ["sh", "-c", f"cp {name} copy.tmp && sync copy.tmp && mv copy.tmp copy && sync ."]


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run every race and print a line for each; return 1 if one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5, help="pairs that count, after a first pair that does not count")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the large files")
    parser.add_argument("--only", default="", help="only races whose name contains this")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does, they remove the directory
        signal.signal(number, _stop)
    above_limit = False
    print(f"{'race':52} {'ratio':>6} {'limit':>6}  {'from - to':13} {'ours':>8} {'rival':>8} {'peak':>8}")
    with tempfile.TemporaryDirectory(prefix="ckptkit-benchmark-") as name:
        directory = Path(name)
        for race in races(directory, options.gigabytes):
            if options.only not in race.name:
                continue
            both = (race.ours, race.rival)
            pairs = [[_run(one, directory, inside=race.inside) for one in both] for _ in range(options.runs + 1)][1:]
            ratios = sorted(ours.seconds / rival.seconds for ours, rival in pairs)
            ratio, peak = statistics.median(ratios), max(ours.peak for ours, _ in pairs)
            above_limit |= ratio > race.limit or (race.memory_limit is not None and peak > race.memory_limit)
            ours, rival = (statistics.median(run.seconds for run in runs) for runs in zip(*pairs, strict=True))
            spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
            print(
                f"{race.name:52} {ratio:6.2f} {race.limit:6.1f}  {spread:13} "
                f"{ours:6.2f} s {rival:6.2f} s {peak / MB:5.0f} MB",
                flush=True,
            )
    return int(above_limit)


if __name__ == "__main__":
    sys.exit(main())
