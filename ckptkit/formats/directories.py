"""Which of the files in a directory are the checkpoint: told by their names, each then read by its content."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files import LocalFile
from ckptkit.core.text import plural, printable, quoted
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.formats.adapter import CONFIG, adapter_remarks
from ckptkit.formats.beside import is_beside, named_beside, read_beside, read_json
from ckptkit.formats.detect import TORCH_SUFFIXES, open_file
from ckptkit.formats.distributed.dcp import is_dcp, open_dcp
from ckptkit.formats.distributed.zero import is_zero, named_states, open_zero
from ckptkit.formats.foreign import foreign_directory
from ckptkit.formats.recognise import refuse_inner
from ckptkit.formats.sharded import INDEX_SUFFIXES, find_index, is_plain_name, links_outside, open_sharded

__all__ = ["open_directory", "open_index"]

_WHOLE = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
    "consolidated.safetensors", "consolidated.00.pth",
)  # fmt: skip
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# accelerate numbers all models after the first; of a step of DeepSpeed the fp32 weights are put together
_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
_ANOTHER = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)|global_step\d+")
_MOST_NAMES, _MOST_LOOKED_AT = 1_000_000, 1000
_METADATA = "metadata.json"  # of Megatron
_LATEST, _LONGEST_TAG = "latest", 1000


def open_index(directory: str, index: str, inner: str, *, whole: bool = False) -> Checkpoint:
    """Return the checkpoint whose shards the file ``index`` names; ``whole`` refuses others beside them."""
    refuse_inner(inner)
    return open_sharded(directory or ".", index, lambda path: open_file(path, ""), whole=whole)


def open_directory(directory: str, inner: str) -> Checkpoint:
    """Return the checkpoint in ``directory``, or the mapping ``inner`` inside it.

    What trainers write beside weights is among its entries; ``inner`` can also begin with the name of such a file,
    which then is what is opened: ``optimizer.pt`` or ``optimizer.pt.state``. Raises ``FormatError`` where there is no
    checkpoint, where there are several, and where a part of it is missing.
    """
    names = _names(directory)
    beside = named_beside(names, inner) or named_states(names, inner)
    if beside is not None:
        return _open_beside(directory, *beside)
    checkpoint = _open_weights(directory, names, inner)
    try:
        entries, warnings = read_beside(directory, names)
    except BaseException:
        checkpoint.close()
        raise
    checkpoint.entries += entries
    checkpoint.warnings += warnings
    return checkpoint


def _names(directory: str) -> list[str]:
    with os.scandir(directory) as listing:
        names = [entry.name for entry in islice(listing, _MOST_NAMES + 1)]
    if len(names) > _MOST_NAMES:
        raise FormatError(f"a directory of more than {_MOST_NAMES:,} files", hint="give the path of the one meant")
    return names


def _open_beside(directory: str, name: str, inner: str) -> Checkpoint:
    if name.endswith(".json"):
        raise FormatError(
            "a JSON file, which holds no tensors",
            hint="ckpt show of the directory lists its values",
            path=os.path.join(directory, name),
        )
    return open_file(os.path.join(directory, name), inner)


def _open_weights(directory: str, names: Sequence[str], inner: str) -> Checkpoint:
    index = find_index(names)
    known = [name for name in (*_WHOLE, *_ADAPTER) if name in names]
    if index is None and is_dcp(names):
        return _with_others(open_dcp(directory, inner), "the distributed checkpoint", known)
    if index is None and not known:
        if is_zero(names):
            if inner:
                raise FormatError(f"holds nothing at {quoted(inner)}", hint="a *_states.pt file can follow the ::")
            return open_zero(directory, names)
        if _LATEST in names and os.path.isfile(os.path.join(directory, _LATEST)):
            return open_directory(_tagged(directory), inner)
    adapter = [name for name in known if name in _ADAPTER]
    chosen = index or next(iter(known), None) or _only(directory, names)
    if adapter and chosen not in adapter:
        raise FormatError(
            f"holds a whole model and an adapter: {printable(chosen)}, {adapter[0]}",
            hint="give the path of the one meant",
        )
    numbered = sorted(filter(_ANOTHER.fullmatch, names))
    indexes = sorted(name for name in names if name.endswith(INDEX_SUFFIXES))
    checkpoint = (
        open_index(directory, index, inner, whole=True) if index else open_file(os.path.join(directory, chosen), inner)
    )
    if not index:
        checkpoint.warnings += tuple(links_outside(directory, [chosen]))
    if chosen.startswith("adapter_model"):
        checkpoint.warnings += _adapter_warnings(checkpoint, directory, names)
    what = f"the index {quoted(chosen)}" if index else quoted(chosen)
    return _with_others(checkpoint, what, [name for name in (*known, *numbered, *indexes) if name != chosen])


def _with_others(checkpoint: Checkpoint, chosen: str, others: Sequence[str]) -> Checkpoint:
    warnings = (f"{quoted(name)} lies beside {chosen}, which is the one read" for name in others[:4])
    checkpoint.warnings += tuple(warnings)
    return checkpoint


def _adapter_warnings(checkpoint: Checkpoint, directory: str, names: Sequence[str]) -> tuple[str, ...]:
    try:
        config = read_json(directory, CONFIG) if CONFIG in names else None
    except CkptkitError:
        return ()  # said of the file, as of every one beside the weights
    return tuple(adapter_remarks(checkpoint, config))


def _tagged(directory: str) -> str:
    """Return the directory that the file ``latest`` names, as DeepSpeed has it: the last one saved."""
    path = os.path.join(directory, _LATEST)
    file = LocalFile(path)
    try:
        tag = file.read(0, min(file.size, _LONGEST_TAG)).decode("utf-8", "replace").strip()
    finally:
        file.close()
    if not is_plain_name(tag):
        raise FormatError(f"names the unsafe directory {quoted(tag)}", path=path)
    inside = os.path.join(directory, tag)
    if not os.path.isdir(inside) or os.path.exists(os.path.join(inside, _LATEST)):
        raise FormatError(f"names {quoted(tag)}, which is no directory of a save here", path=path)
    return inside


def _megatron(directory: str, names: Sequence[str]) -> FormatError | None:
    if _METADATA not in names:
        return None
    try:
        backend = read_json(directory, _METADATA).get("sharded_backend")
    except CkptkitError:
        return None
    if not isinstance(backend, str):
        return None
    return FormatError(
        f"a checkpoint of Megatron in {quoted(backend)}, which is not read",
        hint="save it with --dist-ckpt-format torch_dist",
    )


def _only(directory: str, names: Sequence[str]) -> str:
    """Return the only file that by its name holds weights; raises ``FormatError`` where there are none or several."""
    weights = sorted(name for name in names if name.endswith((".safetensors", *TORCH_SUFFIXES)) and not is_beside(name))
    if not weights and CONFIG in names:
        raise FormatError(
            f"holds {CONFIG} and no weights of the adapter", hint=f"they are called {_ADAPTER[0]} or {_ADAPTER[1]}"
        )
    if not weights:
        if (foreign := foreign_directory(names) or _megatron(directory, names)) is not None:
            raise foreign
        inside = [name for name in sorted(names)[:_MOST_LOOKED_AT] if os.path.isdir(os.path.join(directory, name))]
        if inside:
            listed = ", ".join(map(printable, inside[:4])) + (", …" if len(inside) > 4 else "")
            raise FormatError("a directory without a checkpoint in it", hint=f"look into those inside it: {listed}")
        looked = f"looked for an index (*{INDEX_SUFFIXES[0]}, *{INDEX_SUFFIXES[1]}) and for {', '.join(_WHOLE[:2])}"
        raise FormatError("a directory without a checkpoint in it", hint=looked)
    if len(weights) > 1:
        listed = ", ".join(map(printable, weights[:4]))
        shards = all(map(_SHARD.fullmatch, weights))
        raise FormatError(
            f"a directory with {plural(len(weights), 'file')} of weights and no index, such as {listed}",
            hint="copy the index too, whose name ends in .index.json" if shards else "give the path of the one meant",
        )
    return weights[0]
