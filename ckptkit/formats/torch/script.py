"""Read TorchScript archives: the state_dict of the module and the constants of its code, but never the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import ReaderWarning
from ckptkit.errors import FormatError
from ckptkit.formats import codes
from ckptkit.formats.pickle.values import CodeName, PickledMapping, Placeholder
from ckptkit.formats.torch.checkpoint import build_file_checkpoint
from ckptkit.formats.torch.modules import ModuleContents, ModuleWalker
from ckptkit.formats.torch.objects import TensorRef
from ckptkit.formats.torch.zip import archive_root, read_pickles
from ckptkit.formats.zip_archive import ZipDirectory
from ckptkit.wrappers.envelopes import WEIGHTS, Selection

__all__ = ["open_torchscript"]

_CONSTANTS = "CONSTANTS"  # the name that the code of an archive uses
_ALL_LISTED = (
    "written before torch 2.1: only the code says which tensors are plain attributes and not in the state_dict; "
    "the code is not read, so all tensors are listed"
)


def open_torchscript(archive: ZipDirectory, selection: Selection = WEIGHTS) -> Checkpoint:
    """Return the Checkpoint of the module in a TorchScript archive; the Checkpoint closes the file.

    Freezing turns weights into constants of the code; they are the mapping ``CONSTANTS`` next to the ``state_dict``.
    Raises ``FormatError`` for an archive that contradicts itself, holds no module, or is from a big-endian machine.
    """
    root = archive_root(archive)
    order = archive.text(f"{root}byteorder")
    if order not in (None, "little"):
        raise FormatError(
            "a TorchScript archive of a big-endian machine", hint="torch.jit.load misreads it on this machine too"
        )
    if f"{root}constants.pkl" not in archive.entries:
        raise FormatError("constants.pkl and data.pkl are in different folders: two checkpoints in one archive")
    (module, constants), file = read_pickles(archive, root, ("constants",))
    if not isinstance(module, Placeholder) or not isinstance(module.state, Mapping) or not isinstance(constants, tuple):
        raise FormatError("a TorchScript archive without a module")
    notes = list(file.warnings)
    walker = ModuleWalker(
        partial(_contents, ordered=order is not None, says_training="training" in module.state), file.pickle_size
    )
    weights = walker.state_dict(module)
    if weights and order is None:
        notes.append(ReaderWarning(_ALL_LISTED, codes.SCRIPT_CODE))
    tree = weights
    if constants:
        named = PickledMapping("constants")
        named.update((f"c{index}", value) for index, value in enumerate(constants))
        tree = PickledMapping("TorchScript")
        tree.update({"state_dict": weights, _CONSTANTS: named} if weights else {_CONSTANTS: named})
        if not weights:
            text = "a frozen module: its weights are constants of its code, and its state_dict is empty"
            notes.append(ReaderWarning(text, codes.SCRIPT_CODE))
    return build_file_checkpoint(
        replace(file, tree=tree, warnings=(*notes, *walker.notes)), archive.file, "torchscript", selection
    )


def _contents(state: Mapping[object, object], *, ordered: bool, says_training: bool) -> ModuleContents:
    own = ModuleContents([], [], [], [])
    # Only the code says which attributes are parameters or buffers. But the order of the attributes is the order of
    # their registration: "training" follows all parameters and buffers, and precedes all other attributes.
    is_past_training = False
    for name, value in state.items():
        if not isinstance(name, str):
            continue
        if name == "training":
            is_past_training = ordered
        elif isinstance(value, TensorRef):
            if is_past_training:
                own.attributes.append(name)
            else:
                own.entries.append((name, value))
        elif _is_module(value, says_training=says_training):
            own.children.append((name, value))
    return own


def _is_module(value: object, *, says_training: bool) -> bool:
    # An object of any TorchScript class has attributes, but only a module has the attribute "training".
    return (
        isinstance(value, Placeholder)
        and isinstance(value.factory, CodeName)
        and str(value.factory).startswith("__torch__.")
        and isinstance(value.state, Mapping)
        and ("training" in value.state or not says_training)
    )
