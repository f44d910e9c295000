"""Codes of the warnings that readers give: ``ckpt show`` prints the warnings, ``ckpt check`` reports findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptkit.core.findings import Code, Finding, ReaderWarning, codes_in

__all__ = ["CODES", "is_more_than_a_note", "unread_findings"]

CODE_SUSPICIOUS = Code(
    "code-suspicious",
    ("error",),
    "The file asks for code that is typical of an attack.",
    "do not load the file with pickle or with torch.load(weights_only=False)",
)
CODE_REFERENCE = Code(
    "code-reference",
    ("warning",),
    "The file names code that torch.load could run.",
    "ckpt show lists all of them; a loader that unpickles the file may run them",
)
SKIPPED_DATA = Code(
    "skipped-data",
    ("warning",),
    "The bytes of storages were not written when the file was saved.",
    "the tensors read as zeros: save the file again without skip_data",
)
UNUSED_RECORD = Code("unused-record", ("warning",), "The file stores bytes that no tensor uses.")
SAME_NAME = Code("same-name", ("warning",), "Several entries would have the same dotted name.")
REPEATED_KEY = Code("repeated-key", ("warning",), "A mapping sets the same key more than once.")
BESIDE_UNREAD = Code("beside-unread", ("warning",), "A file that a trainer wrote next to the weights cannot be read.")
ADAPTER_CONFIG = Code("adapter-config", ("warning",), "An adapter has no configuration file, so its scale is unknown.")
ADAPTER_RANK = Code("adapter-rank", ("warning",), "A LoRA tensor has another rank than the configuration gives.")
ADAPTER_BASE = Code("adapter-base", ("note",), "The file is an adapter, without the weights of its base model.")
PATCH = Code(
    "patch",
    ("warning",),
    "The file is a patch that ckpt delta wrote, and its tensors are not weights.",
    "ckpt apply BASE PATCH -o OUT makes the checkpoint",
)
EMPTY_WEIGHTS = Code("empty-weights", ("warning",), "ZeRO-3 left weights of this file empty.")
MASTER_WEIGHTS = Code("master-weights", ("note",), "The tensors are the fp32 weights of the optimizer.")
NOT_IN_PARTS = Code(
    "not-in-parts", ("warning", "note"), "The optimizer states of a ZeRO checkpoint lack a key of the state_dict."
)
STALE_SHARD = Code(
    "stale-shard",
    ("warning",),
    "The directory has a shard that the index does not name.",
    "find out whether the index or the shard is from another save: programs that ignore the index read the shard",
)
SHARD_COUNT = Code(
    "shard-count",
    ("warning",),
    "Fewer shards are read than the file names count.",
    "copy the whole directory again",
)
NO_INDEX = Code("no-index", ("note",), "Shards without an index are joined, because their names count them.")
ONE_SHARD = Code(
    "one-shard",
    ("note",),
    "The file is one of several shards, and no other shard is read.",
    "give the path of the index or of the directory",
)
UNREAD_WEIGHTS = Code(
    "unread-weights",
    ("warning", "note"),
    "The directory holds further files of weights, which are not read.",
    "each file can be opened by its own path",
)
TOTAL_SIZE = Code("total-size", ("warning",), "The total size in the index differs from the size of the tensors.")
LINK_OUTSIDE = Code("link-outside", ("note",), "A file of the directory is a link to a file outside the directory.")
UNCOUNTED = Code("uncounted", ("note",), "A missing last shard of this format is not detected.")
COMPRESSED = Code("compressed", ("note",), "The archive is compressed, so reading tensors is slower.")
NO_CHECKSUM = Code("no-checksum", ("note",), "Stored bytes have no checksum, so damage cannot be detected.")
NOT_IN_STATE_DICT = Code(
    "not-in-state-dict", ("note",), "A module in the file has tensors that its state_dict does not have."
)
SCRIPT_CODE = Code(
    "script-code", ("note",), "The code of a TorchScript archive, which is never read, says more about its tensors."
)
NOT_LISTED = Code(
    "not-listed", ("note",), "Entries of the file are never loaded, such as compiled code, or are too many."
)
CONSTANTS = Code("constants", ("note",), "An exported program holds constants that are not in its state_dict.")
AVERAGE_BESIDE = Code(
    "average-beside",
    ("note",),
    "The file holds trained weights and their average, and its keys do not say which is which.",
)
PART_OF_SEVERAL = Code(
    "part-of-several",
    ("warning",),
    "The file holds a part of the model, and other files hold the rest.",
    "give the path of the directory, which joins the files or says why it cannot",
)
RANKS_DIFFER = Code("ranks-differ", ("warning",), "A tensor that is not split differs between the files of the ranks.")
NUMPY_ARRAYS = Code(
    "numpy-arrays", ("note",), "Tensors of the file are numpy arrays, which load_state_dict does not take."
)
NOT_WEIGHTS = Code("not-weights", ("note",), "The file holds values beside the weights, such as an optimizer state.")
POSITIONS = Code("positions", ("note",), "The tensors are numbered in the order of the parameters, and have no names.")
HUB = Code(
    "hub", ("note",), "Says whether a repository of the Hugging Face Hub was read in the local cache, or at the hub."
)
READER_WARNING = Code("reader-warning", ("warning",), "Any other warning of a reader.")

CODES = codes_in(globals())

_UNREAD = (UNREAD_WEIGHTS, PART_OF_SEVERAL, ONE_SHARD, SHARD_COUNT, STALE_SHARD)


def unread_findings(warnings: Iterable[str]) -> Iterator[Finding]:
    """Yield a finding for each of a reader's warnings which says that other files hold more weights."""
    for warning in warnings:
        if isinstance(warning, ReaderWarning) and warning.code in _UNREAD:
            yield warning.finding()


def is_more_than_a_note(warning: str) -> bool:
    """Return whether a reader's warning is about damage, about code, or about weights that were not read."""
    return not isinstance(warning, ReaderWarning) or warning.severity != "note" or warning.code in _UNREAD
