"""TorchScript archives: the state_dict of the module in them, and the constants of its code; the code stays closed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.values import CodeName, PickledMapping, Placeholder
from ckptkit.formats.torch.checkpoint import build_file_checkpoint
from ckptkit.formats.torch.modules import ModuleWalker, Parts
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.zip import archive_root, read_pickles
from ckptkit.formats.zip_archive import ZipDirectory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_torchscript"]

_CONSTANTS = "CONSTANTS"  # the name by which the code of an archive refers to them
_UNTOLD = (
    "written before torch 2.1: which tensors are plain attributes, no part of the state_dict, stands only in its code, "
    "which is not read; all are listed"
)


def open_torchscript(archive: ZipDirectory, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of the module in a TorchScript archive; takes over its file.

    Constants of the code, to which freezing turns the weights, are the mapping ``CONSTANTS`` beside the
    ``state_dict``. Raises ``FormatError`` where the archive contradicts itself, holds no module, or was written
    on a big-endian machine.
    """
    root = archive_root(archive)
    order = archive.text(f"{root}byteorder")
    if order not in (None, "little"):
        raise FormatError("a TorchScript archive of a big-endian machine", hint="torch.jit.load misreads it here too")
    if f"{root}constants.pkl" not in archive.entries:
        raise FormatError("constants.pkl lies elsewhere than data.pkl: two checkpoints in one")
    (module, constants), file = read_pickles(archive, root, ("constants",))
    if not isinstance(module, Placeholder) or not isinstance(module.state, Mapping) or not isinstance(constants, tuple):
        raise FormatError("a TorchScript archive without a module")
    notes = list(file.warnings)
    walker = ModuleWalker(
        partial(_parts, ordered=order is not None, says_training="training" in module.state), file.pickle_size
    )
    weights = walker.state_dict(module)
    if weights and order is None:
        notes.append(_UNTOLD)
    tree = weights
    if constants:
        named = PickledMapping("constants")
        named.update((f"c{index}", value) for index, value in enumerate(constants))
        tree = PickledMapping("TorchScript")
        tree.update({"state_dict": weights, _CONSTANTS: named} if weights else {_CONSTANTS: named})
        if not weights:
            notes.append("a frozen module: it has no state_dict, and its weights are constants of its code")
    return build_file_checkpoint(
        replace(file, tree=tree, warnings=(*notes, *walker.notes)), archive.file, "torchscript", selection
    )


def _parts(state: Mapping[object, object], *, ordered: bool, says_training: bool) -> Parts:
    parts = Parts([], [], [], [])
    # Which attributes are parameters or buffers is written in the code alone. Since attributes are kept in the order
    # of their registration, though, "training" comes behind all parameters and buffers, and before all others.
    behind = False
    for name, value in state.items():
        if not isinstance(name, str):
            continue
        if name == "training":
            behind = ordered
        elif isinstance(value, TensorRef):
            if behind:
                parts.loose.append(name)
            else:
                parts.entries.append((name, value))
        elif _is_module(value, says_training=says_training):
            parts.children.append((name, value))
    return parts


def _is_module(value: object, *, says_training: bool) -> bool:
    # An object of a TorchScript class has attributes too; only a module says whether it is training.
    return (
        isinstance(value, Placeholder)
        and isinstance(value.factory, CodeName)
        and str(value.factory).startswith("__torch__.")
        and isinstance(value.state, Mapping)
        and ("training" in value.state or not says_training)
    )
