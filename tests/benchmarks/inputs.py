"""The files that are read: described here, and written when a row needs them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = [
    "FILES",
    "Blocks",
    "Folder",
    "Linears",
    "Made",
    "Matrices",
    "Text",
    "Weights",
    "Within",
    "grown",
    "linear_shapes",
    "scaled",
    "size_of",
    "text_of",
    "write",
]

GB = 1_000_000_000
BIG = 1 << 22  # elements of a tensor of 16.8 MB
BLOCK = tuple(f"block.{number}" for number in range(100))
META = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
        "feed_forward.w3", "attention_norm", "ffn_norm")  # fmt: skip
HF = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
      "mlp.up_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Tensors of float32 with normal values; ``scale`` makes them fewer, never smaller."""

    count: int
    elements: int
    layer: str = "layers"
    block: tuple[str, ...] = BLOCK
    change: Literal["none", "all"] = "none"  # whether the values are other ones than without a change
    fixed: bool = False  # the scale does not change it
    width: int = 0  # of a row of a matrix; without it, tensors have one dimension
    tuned: int = 0  # the number of a model that was tuned from the one of number 0: small random changes

    @property
    def size(self) -> float:
        """Bytes of the file, about."""
        return self.count * (self.elements * 4 + 100)

    def __str__(self) -> str:
        return f"{self.count:,} tensors, {_bytes(self.count * self.elements * 4)}"


@dataclass(frozen=True)
class Within:
    """A torch file: the tensors, and what a training run saves beside them."""

    weights: Weights
    beside: Literal["nothing", "optimizer", "million"] = "nothing"
    entries: int = 0  # of the container that is called million

    @property
    def size(self) -> float:
        """Bytes of the file, about."""
        return self.weights.size * (2 if self.beside == "optimizer" else 1) + self.entries * 9

    def __str__(self) -> str:
        more = {"nothing": "", "optimizer": ", as much optimizer state", "million": f", a list of {self.entries:,}"}
        return f"{self.weights}{more[self.beside]}"


_WIDTHS = {"float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


@dataclass(frozen=True)
class Linears:
    """Blocks of six square linear layers: the weights of the model that ``timed.py`` builds."""

    width: int
    blocks: int
    dtype: str = "float32"
    legacy: bool = False
    seed: int = 0
    change: Literal["", "adapter", "training"] = ""  # how the values were changed: see ``_changed``

    @property
    def size(self) -> float:
        """Bytes of the file, about."""
        return self.blocks * 6 * self.width * (self.width + 1) * _WIDTHS[self.dtype]

    def __str__(self) -> str:
        return f"{self.blocks * 12} tensors, {_bytes(self.size)} of {self.dtype}"


@dataclass(frozen=True)
class Delta:
    """A patch of ckptkit between two files."""

    base: str
    new: str
    size: float = 0

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Blocks:
    """A GGUF file of square matrices in blocks of a type of GGUF, with random codes and finite scales."""

    count: int
    width: int = 4096
    kind: str = "Q4_K"

    @property
    def size(self) -> float:
        """Bytes of the file, about."""
        return self.count * self.width * self.width * 144 / 256

    def __str__(self) -> str:
        return f"{self.count} matrices of {self.kind}, {_bytes(self.count * self.width * self.width * 4)} as F32"


_NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
        0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip
_CODE_BYTES = {"fp8": 1.0, "nf4": 0.57, "GPTQ": 0.52}
_GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq"}


@dataclass(frozen=True)
class Matrices:
    """Square matrices of random codes: fp8 with scales of blocks of 128 by 128, nf4 of blocks of 64, GPTQ of groups.

    Those of GPTQ are in a folder, whose configuration says what the zero points mean.
    """

    count: int
    kind: Literal["fp8", "nf4", "GPTQ"]
    width: int = 4096

    @property
    def size(self) -> float:
        """Bytes of the file, about."""
        return self.count * self.width * self.width * _CODE_BYTES[self.kind]

    def __str__(self) -> str:
        return f"{self.count} matrices of {self.kind}, {_bytes(self.count * self.width * self.width * 4)} as F32"


@dataclass(frozen=True)
class Text:
    """A configuration of a peer."""

    text: str
    size: float = 1000

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class Folder:
    """A model folder that holds a link to a file, for peers that take no file."""

    of: str
    size: float = 0

    def __str__(self) -> str:
        return ""


Made = Weights | Within | Linears | Delta | Blocks | Matrices | Text | Folder

_CHANGES: dict[str, Literal["", "adapter", "training"]] = {"plain": "", "adapted": "adapter", "trained": "training"}
_LARGE = Weights(60, BIG, layer="module.layers")
_MATRICES = Weights(60, BIG, layer="model.layers", width=4096)
_BASE = "base_model: base.safetensors\n"
_TUNED = "".join(f"  - model: {name}.safetensors\n    parameters: {{weight: {weight}, density: 0.5}}\n"
                 for name, weight in (("math", 0.6), ("code", 0.4)))  # fmt: skip
FILES: dict[str, Made] = {
    "small.safetensors": Weights(10, 128, fixed=True),
    "small-tuned.safetensors": Weights(10, 128, change="all", fixed=True),
    "a.safetensors": Weights(100_000, 4),
    "renamed.safetensors": Weights(100_000, 4, layer="blocks"),
    "again.safetensors": Weights(100_000, 4, change="all"),
    "rows.safetensors": Weights(200_000, 4),
    "many.pt": Within(Weights(2_000, 4096)),
    "theirs.safetensors": Weights(10_000, 4, layer="model.layers", block=HF),
    "mine.safetensors": Weights(10_000, 4, block=META),
    "large.safetensors": _LARGE,
    "large.pt": Within(_LARGE),
    "run.pt": Within(replace(_LARGE, count=30), "optimizer"),
    "million.pt": Within(Weights(10, 128, fixed=True), "million", 1_000_000),
    "copy.safetensors": _LARGE,
    "tuned.safetensors": replace(_LARGE, change="all"),
    "base.safetensors": _MATRICES,
    "math.safetensors": replace(_MATRICES, tuned=1),
    "code.safetensors": replace(_MATRICES, tuned=2),
    "load126.safetensors": Linears(512, 20),
    "load420.safetensors": Linears(1024, 33, "bfloat16"),
    "other420.safetensors": Linears(1024, 33, "bfloat16", seed=1),
    **{f"{dtype}.safetensors": Linears(1024, 16 // width, dtype) for dtype, width in _WIDTHS.items()},
    "load420.pt": Linears(1024, 17),
    "load420.pth": Linears(1024, 17, legacy=True),
    **{
        f"{name}{bits}.safetensors": Linears(1024, blocks, dtype, change=change)
        for bits, dtype, blocks in ((32, "float32", 8), (16, "bfloat16", 16))
        for name, change in _CHANGES.items()
    },
    **{
        f"{name}{bits}-patch.safetensors": Delta(f"plain{bits}.safetensors", f"{name}{bits}.safetensors")
        for bits in (32, 16)
        for name in ("adapted", "trained")
    },
    "blocks.gguf": Blocks(8),
    "fp8.safetensors": Matrices(12, "fp8"),
    "nf4.safetensors": Matrices(12, "nf4"),
    "gptq-model": Matrices(12, "GPTQ"),
    "large-model": Folder("large.safetensors"),
    "tuned-model": Folder("tuned.safetensors"),
    "passthrough.yml": Text("merge_method: passthrough\nmodels:\n  - model: tuned.safetensors\ndtype: float32\n"),
    "linear.yml": Text(
        "merge_method: linear\ndtype: float32\nmodels:\n  - model: base.safetensors\n    parameters: {weight: 0.2}\n"
        f"{_TUNED}"
    ),
    "slerp.yml": Text(
        f"merge_method: slerp\ndtype: float32\n{_BASE}parameters: {{t: 0.3}}\n"
        "models:\n  - model: base.safetensors\n  - model: math.safetensors\n"
    ),
    **{
        f"{method}.yml": Text(f"merge_method: {method}\ndtype: float32\n{_BASE}models:\n{_TUNED}")
        for method in ("ties", "dare_ties", "della")
    },
}


def grown(unit: str, size: float) -> dict[str, Made]:
    """Return the files of a growing size: gigabytes of large tensors, or a number of small ones."""
    if unit == "GB":
        return {"large.safetensors": replace(_LARGE, count=max(round(size * GB / BIG / 4), 1))}
    weights = Weights(int(size), 4)
    return {"a.safetensors": weights, "again.safetensors": replace(weights, change="all"),
            "renamed.safetensors": replace(weights, layer="blocks")}  # fmt: skip


def scaled(made: Made, scale: float) -> Made:
    """Return the description with fewer or more tensors, entries and blocks."""
    if isinstance(made, Weights):
        return made if made.fixed else replace(made, count=max(round(made.count * scale), 1))
    if isinstance(made, Within):
        weights = scaled(made.weights, scale)
        assert isinstance(weights, Weights)
        return replace(made, weights=weights, entries=round(made.entries * scale))
    if isinstance(made, Linears):
        return replace(made, blocks=max(round(made.blocks * scale), 1))
    if isinstance(made, Blocks | Matrices):
        return replace(made, count=max(round(made.count * scale), 1))
    return made


def size_of(names: tuple[str, ...], scale: float) -> float:
    """Return the bytes of the files with these names, about."""
    return sum(scaled(FILES[name], scale).size for name in names)


def text_of(names: tuple[str, ...], scale: float) -> str:
    """Return what the files hold, in words; equal files are joined."""
    texts = [text for name in names if (text := str(scaled(FILES[name], scale)))]
    first = dict.fromkeys(texts)
    return "; ".join(f"{texts.count(text)} × {text}" if texts.count(text) > 1 else text for text in first)


def write(path: Path, made: Made) -> None:
    """Write the file that is described."""
    if isinstance(made, Text):
        path.write_text(made.text, encoding="utf-8")
    elif isinstance(made, Folder):
        path.mkdir()
        (path / "model.safetensors").symlink_to(f"../{made.of}")
    elif isinstance(made, Weights):
        _write_weights(path, made)
    elif isinstance(made, Linears):
        _write_linears(path, made)
    elif isinstance(made, Delta):
        from ckptkit import make_delta

        make_delta(str(path.parent / made.base), str(path.parent / made.new), str(path))
    elif isinstance(made, Matrices):
        _write_matrices(path, made)
    elif isinstance(made, Blocks):
        _write_blocks(path, made)
    else:
        _write_torch(path, made)


def linear_shapes(width: int, blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the model for loading."""
    for block in range(blocks):
        for name in ("q", "k", "v", "o", "up", "down"):
            yield f"{block}.{name}.weight", (width, width)
            yield f"{block}.{name}.bias", (width,)


def _names(made: Weights) -> list[str]:
    width = len(made.block)
    return [f"{made.layer}.{number // width}.{made.block[number % width]}.weight" for number in range(made.count)]


def _values(made: Weights) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the values of each tensor: no two are equal, and a change moves every number a little."""
    import numpy as np

    pool = np.random.default_rng(0).standard_normal(max(made.elements, 1 << 16), dtype=np.float32) * np.float32(0.02)
    if made.tuned:
        pool += np.random.default_rng(made.tuned).standard_normal(len(pool), dtype=np.float32) * np.float32(2e-4)
    for number in range(made.count):
        begin = number * made.elements % (len(pool) - made.elements + 1)
        factor = 1 + number / (1 << 17) + (1e-3 if made.change == "all" else 0)
        yield pool[begin : begin + made.elements] * np.float32(factor)


def _write_weights(path: Path, made: Weights) -> None:
    width = made.elements * 4
    shape = [made.elements // made.width, made.width] if made.width else [made.elements]
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [number * width, number * width + width]}
        for number, name in enumerate(_names(made))
    }
    text = json.dumps(header, separators=(",", ":")).encode()  # as the safetensors library writes it
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in _values(made):
            values.tofile(file)


def _write_matrices(path: Path, made: Matrices) -> None:
    """Write the parts of each matrix."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    parts = {"fp8": _fp8_parts, "nf4": _nf4_parts, "GPTQ": _gptq_parts}[made.kind]
    tensors = {
        f"layers.{number}.{name}": part for number in range(made.count) for name, part in parts(made.width).items()
    }
    if path.suffix:
        save_file(tensors, path)
        return
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": _GPTQ_CONFIG}), encoding="utf-8")


def _fp8_parts(width: int) -> dict[str, torch.Tensor]:
    import torch

    codes = torch.randn(width, width).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": torch.rand(-(-width // 128), -(-width // 128))}


def _nf4_parts(width: int) -> dict[str, torch.Tensor]:
    import torch

    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [width, width]})
    return {
        "weight": torch.randint(256, (width * width // 2, 1), dtype=torch.uint8),
        "weight.absmax": torch.rand(width * width // 64),
        "weight.quant_map": torch.tensor(_NF4),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def _gptq_parts(width: int) -> dict[str, torch.Tensor]:
    import torch

    return {
        "qweight": torch.randint(-(1 << 31), 1 << 31, (width // 8, width), dtype=torch.int32),
        "qzeros": torch.full((width // 128, width // 8), 0x77777777, dtype=torch.int32),
        "scales": torch.rand(width // 128, width).half(),
        "g_idx": torch.arange(width, dtype=torch.int32) // 128,
    }


def _write_blocks(path: Path, made: Blocks) -> None:
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[made.kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for number in range(made.count):
        shape = made.width, made.width // elements * nbytes
        codes = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        codes.reshape(-1, nbytes)[:, 1:4:2] &= 0x3B  # the high bytes of the two F16 scales
        writer.add_tensor(f"blk.{number}.ffn_up.weight", codes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_torch(path: Path, made: Within) -> None:
    import torch

    weights = {
        name: torch.from_numpy(value) for name, value in zip(_names(made.weights), _values(made.weights), strict=True)
    }
    content: Any = weights
    if made.beside == "optimizer":
        content = {"model": weights, "optimizer": {"state": [value + 1 for value in weights.values()]}, "epoch": 3}
    elif made.beside == "million":
        content = {"model": weights, "seen": [number / 7 for number in range(made.entries)], "epoch": 3}
    torch.save(content, path)


def _write_linears(path: Path, made: Linears) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(made.seed)
    dtype = getattr(torch, made.dtype)
    scale = 0.02 if dtype.is_floating_point else 25
    weights = {name: torch.randn(shape).mul_(scale).to(dtype) for name, shape in linear_shapes(made.width, made.blocks)}
    if made.change:
        weights = _changed(weights, made.change)
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=not made.legacy)


def _changed(weights: dict[str, torch.Tensor], change: str) -> dict[str, torch.Tensor]:
    """Return the weights after a merge of an adapter of rank 16 into q, k, v and o, or after a training of all.

    200 steps of AdamW with a learning rate of 2e-5 move a number by 2e-5 times a sum of signs: some numbers go one way
    in many steps, and all have noise. The weights decay a little.
    """
    import torch

    generator = torch.Generator().manual_seed(9)
    changed = {}
    for name, value in weights.items():
        plain = value.float()
        if change == "training":
            drift, noise = (torch.randn(value.shape, generator=generator) for _ in range(2))
            plain = plain - 2e-5 * (12 * torch.tanh(drift) + 6 * noise) - 2e-5 * 0.01 * 200 * plain
        elif value.ndim == 2 and name.split(".")[1] in "qkvo":
            rows, columns = value.shape
            up = torch.randn(rows, 16, generator=generator) * 0.002
            plain = plain + 2 * up @ (torch.randn(16, columns, generator=generator) / columns**0.5)
        changed[name] = plain.to(value.dtype)
    return changed


def _bytes(size: float) -> str:
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit * 0.95:
            return f"{size / unit:.3g} {word}"
    return f"{size:.0f} B"
