"""The codes of the findings of ``run_checks``.

A reader's warnings have their own codes, in ``ckptkit.formats.codes``.
"""

from __future__ import annotations

from ckptkit.core.findings import Code, codes_in

# Files and records
UNREADABLE = Code("unreadable", ("error",), "The file, or a record of it, cannot be read.")
CHANGED = Code("changed", ("error",), "The file changed while it was read.")
CHECKSUM = Code("checksum", ("error",), "The bytes of a record do not match the recorded checksum.")
NOT_SCANNED = Code(
    "not-scanned", ("note",), "Lists everything that was checked or not checked; always the last finding."
)
TORCH_LOAD = Code("torch-load", ("warning",), "torch.load(weights_only=True), its default, refuses the file.")
MAP_LOCATION = Code("map-location", ("note",), "Storages name devices, so torch.load needs map_location without these.")

# Names, shapes and dtypes
NOT_DENSE = Code("not-dense", ("note",), "A sparse or quantized tensor is listed, but its values are not read.")
DTYPE_MIX = Code("dtype-mix", ("note",), "The floating-point tensors have more than one dtype.")
INDEX_HOLE = Code("index-hole", ("warning",), "A list of similar layers skips a number.")
SIBLING_LACKS = Code("sibling-lacks", ("warning",), "A layer lacks a tensor that all its siblings have.")
QUANTIZED = Code("quantized", ("note",), "Some tensors are the parts of quantised weights: codes, scales and others.")
MISSING_PART = Code(
    "missing-part",
    ("error", "note"),
    "A quantised weight lacks a part, such as its codes or scales; a note if other shards are not read.",
)
BROKEN_PART = Code(
    "broken-part",
    ("error",),
    "A part of a quantised weight does not fit: another shape, scales that are NaN, or zero points out of range.",
)

# Adapters
LORA_HALF = Code("lora-half", ("error",), "Only one of the two matrices of a LoRA pair is in the file.")
LORA_RANK = Code("lora-rank", ("error",), "The two matrices of a LoRA pair have different ranks.")
LORA_ALPHA = Code("lora-alpha", ("warning", "note"), "Some LoRA pairs have no alpha; a note if all lack it.")

# Values of single tensors
NAN = Code("nan", ("error",), "A tensor has NaN values.")
INF = Code("inf", ("error", "note"), "A tensor has infinite values; -inf in a mask is a note.")
ALL_ZERO = Code(
    "all-zero",
    ("warning", "note"),
    "All values of a tensor are zero; a note for vectors and heads. Names of biases, gates and masks are left out.",
)
CONSTANT = Code("constant", ("warning", "note"), "All values of a tensor are the same number; a note for vectors.")
SUBNORMAL = Code("subnormal", ("note",), "A tensor has subnormal values, or consists mostly of them in a narrow dtype.")

# Buffers
POSITION_IDS = Code("position-ids", ("error",), "A position_ids buffer is not 0 to n-1 in order.")
INDEX_RANGE = Code("index-range", ("error",), "A buffer of indices has an index that its table does not have.")
INDEX_DTYPE = Code("index-dtype", ("warning",), "A position_ids buffer has a floating-point dtype.")
NEGATIVE_COUNT = Code("negative-count", ("error",), "A num_batches_tracked counter is negative.")
NEGATIVE_VARIANCE = Code("negative-variance", ("error",), "A running_var buffer has negative values.")

# Equal tensors
LOST_TIE = Code(
    "lost-tie",
    ("warning", "note"),
    "An embedding and a head are equal but not tied.",
)
DUPLICATE = Code("duplicate", ("warning", "note"), "Tensors of equal values are stored several times.")

# Comparisons with a model
MISSING = Code("missing", ("error",), "EXPECTED has a key that the checkpoint does not have.")
MISSING_TIED = Code("missing-tied", ("note",), "A missing key is tied in EXPECTED to a key that the checkpoint has.")
FILLED = Code("filled", ("note",), "torch fills in a missing batch norm counter of an old checkpoint.")
UNEXPECTED = Code("unexpected", ("warning",), "The checkpoint has a key that EXPECTED does not have.")
SHAPE_MISMATCHED = Code("shape-mismatched", ("error",), "A tensor has another shape in EXPECTED.")
UNCOPYABLE = Code("uncopyable", ("error",), "torch cannot copy a tensor of this kind or dtype.")
DTYPE_MISMATCHED = Code("dtype-mismatched", ("warning",), "A tensor has another dtype in EXPECTED; torch casts it.")
QUANTIZED_MISMATCHED = Code(
    "quantized-mismatched",
    ("error",),
    "Only one of the checkpoint and EXPECTED has a weight quantised.",
)
NO_TENSOR = Code("no-tensor", ("error",), "A key that load_state_dict reads holds no tensor.")
OWN_CODE = Code(
    "own-code",
    ("error", "warning", "note"),
    "The model's own code for loading refuses the checkpoint, or reports further keys; a note if it was not tried.",
)
EXTRA_STATE = Code("extra-state", ("warning",), "Only one side has this extra state.")
AS_EXPECTED = Code("as-expected", ("note",), "A tensor equals the tensor of EXPECTED bit by bit.")
AT_INIT = Code("at-init", ("warning", "note"), "A tensor looks as if it was never trained.")

CODES = codes_in(globals())
