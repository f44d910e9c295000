"""The properties of parameters that a rule can test: name, shape, dtype, module class and roles."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import named_of
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.inputs import CheckpointLike, opened_model
from ckptkit.param_groups.parameters import LiveModel, bare_name, read_live_model, true_shape

__all__ = [
    "HEADS",
    "ROLES",
    "ParameterInfo",
    "ParameterTable",
    "class_names",
    "is_buffer_name",
    "live_parameter_table",
    "model_heads",
    "parameter_table",
    "roles_by_class",
    "roles_by_name",
]


ROLES = frozenset({"bias", "norm", "embedding", "head", "depthwise", "lora_a", "lora_b"})

HEADS = frozenset(
    [
        "head",
        "heads",
        "lm_head",
        "classifier",
        "fc",
        "score",
        "cls",
        "output",
        "output_projection",
        "embed_out",
        "qa_outputs",
        "fc_out",
        "linear_head",
        "cls_head",
        "prediction_head",
        "logits",
    ]
)
_NORM_CLASS = re.compile(r"norm(alization)?(\d+d|nd|2dact)?$", re.IGNORECASE)
_NORM_BASES = frozenset({"_NormBase", "_BatchNorm", "_InstanceNorm"})
_NOT_NORMS = frozenset({"_SpectralNorm", "_WeightNorm", "SpectralNorm", "WeightNorm"})
_NORM_NAME = re.compile(
    r"(^|_)(layer_?|rms_?|batch_?|group_?|instance_?)?(norm|ln|bn|gn)(_?\d+|_?[a-z])?(_|$)", re.IGNORECASE
)
_EMBEDDING_CLASSES = frozenset({"Embedding", "EmbeddingBag"})
_EMBEDDING_NAME = re.compile(r"(^|_)(embed(ding)?s?|wte|wpe|tok_embeddings)(_tokens|_positions)?$")
# Embedding tables and tokens that models register as parameters of their own, without an Embedding module.
_TABLE_LEAF = re.compile(
    r"(^|_)(pos|position|positional|rel_pos|abs_pos|patch|class|token_type|query)_?embed(ding)?s?$"
    r"|(^|_)(cls|dist|reg|mask|class|register)_tokens?$"
)
_LORA = re.compile(r"(^|\.)lora_(embedding_)?([ABab])(\.|$)")
_BUFFER_LEAVES = frozenset(
    [
        "running_mean",
        "running_var",
        "num_batches_tracked",
        "inv_freq",
        "position_ids",
        "token_type_ids",
        "relative_position_index",
        "relative_coords_table",
        "attn_mask",
        "causal_mask",
        "masked_bias",
        "rotary_emb",
        "freqs_cis",
        "cos_cached",
        "sin_cached",
    ]
)
_MATRIX = 2  # dimensions of a matrix
_DTYPE_CODES = {dtype.torch_name: dtype.code for dtype in DTYPES.values()}
_FLOATING = frozenset({"F16", "BF16", "F32", "F64", "C32", "C64", "C128"})
_PARAMETRIZED = ".parametrizations."


def class_names(kind: type) -> frozenset[str]:
    """Return the names of a module class and of every base class, each plain and with its module path."""
    classes = [base for base in kind.__mro__ if base is not object]
    return frozenset(name for base in classes for name in (base.__name__, f"{base.__module__}.{base.__qualname__}"))


def roles_by_class(kind: type) -> frozenset[str]:
    """Return the roles of every parameter in a module of this class."""
    names = {base.__name__ for base in kind.__mro__}
    roles = set()
    if names & _NORM_BASES or (any(map(_NORM_CLASS.search, names)) and not names & _NOT_NORMS):
        roles.add("norm")
    if names & _EMBEDDING_CLASSES:
        roles.add("embedding")
    return frozenset(roles)


def roles_by_name(
    name: str, shape: tuple[int, ...] | None, *, module: Module | None = None, guess: bool = False, head: bool = False
) -> frozenset[str]:
    """Return the roles that follow from a name and a shape.

    With ``guess``, the roles that need the module class are guessed from the name too. ``head`` says that the module
    is an output layer.
    """
    path, _, leaf = name.rpartition(".")
    roles = set(_leaf_roles(leaf))
    if head:
        roles.add("head")
    if "lora_" in name and (lora := _LORA.search(name)):
        roles.add(f"lora_{lora[3].lower()}")
    if module is not None:
        own = vars(module)  # not getattr: for a missing attribute, Module.__getattr__ searches three dicts
        groups, channels = own.get("groups", 1), own.get("in_channels")
        if isinstance(groups, int) and groups > 1 and groups == channels and leaf.startswith("weight"):
            roles.add("depthwise")
    if guess and shape is not None:
        owner = path.rpartition(".")[2]
        if len(shape) < _MATRIX and _NORM_NAME.search(owner):
            roles.add("norm")
        if len(shape) == _MATRIX and _EMBEDDING_NAME.search(owner):
            roles.add("embedding")
        if len(shape) > _MATRIX and shape[1] == 1 and shape[0] > 1 and set(shape[2:]) != {1}:
            roles.add("depthwise")
    return frozenset(roles)


@functools.lru_cache(maxsize=1024)
def _leaf_roles(leaf: str) -> frozenset[str]:
    roles = set()
    if leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_"):
        roles.add("bias")
    if _TABLE_LEAF.search(leaf):
        roles.add("embedding")
    return frozenset(roles)


def model_heads(model: Module, modules: Mapping[str, Module]) -> frozenset[str]:
    """Return the paths of the output layers of a model, and of the modules inside them.

    ``get_output_embeddings()`` of transformers or ``get_classifier()`` of timm gives the layer, if the model has one.
    Otherwise it is every module of the root with a name in ``HEADS``, or else the last module that has a matrix.
    """
    for method in ("get_output_embeddings", "get_classifier"):
        layer = _call(model, method)
        found = {path for path, module in modules.items() if path and module is layer}
        if found:
            return _with_inner(found, modules)
    named = {path for path in modules if bare_name(path) in HEADS}
    if named:
        return _with_inner(named, modules)
    last = None
    for path, module in modules.items():
        own = getattr(module, "_parameters", {}).values()
        if any(parameter is not None and getattr(parameter, "ndim", 0) >= _MATRIX for parameter in own):
            last = path
    return frozenset() if not last else frozenset({last})


def _call(model: object, method: str) -> object:
    """Return what a method of the model returns, or None where it has no such method or raises."""
    function = getattr(model, method, None)
    if not callable(function):
        return None
    try:
        return function()
    except Exception:  # noqa: BLE001 - code of the user's model, called only for a better guess
        return None


def _with_inner(paths: set[str], modules: Mapping[str, Module]) -> frozenset[str]:
    return frozenset(path for path in modules if any(path == head or path.startswith(f"{head}.") for head in paths))


def is_buffer_name(name: str) -> bool:
    """Return whether ``name`` is one that models register as a buffer, such as ``running_mean``."""
    return name.rpartition(".")[2] in _BUFFER_LEAVES


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """The properties of one parameter that a rule can test.

    ``shape`` is None while the parameter is uninitialised. ``classes`` has the names of the module class and of every
    base class. For a checkpoint, ``classes`` is None and ``roles`` are guessed from names. ``aliases`` are the same
    parameter under its other names, where it is tied.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str = ""
    trainable: bool = True
    classes: frozenset[str] | None = None
    roles: frozenset[str] = frozenset()
    aliases: tuple[ParameterInfo, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements, or 0 while the parameter has no shape."""
        return 0 if self.shape is None else math.prod(self.shape)

    def named(self) -> Iterator[ParameterInfo]:
        """Yield the parameter under each of its names, the first registered name first."""
        yield self
        yield from self.aliases


@dataclass(frozen=True)
class ParameterTable:
    """The parameters of one model in the order of registration, each tied parameter once.

    ``buffers`` has names. ``assumed`` has a sentence for each assumption, where the model is a checkpoint.
    """

    parameters: tuple[ParameterInfo, ...]
    buffers: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> Mapping[str, ParameterInfo]:
        """Every parameter under each of its names."""
        return {info.name: info for parameter in self.parameters for info in parameter.named()}

    def parameter(self, name: str) -> ParameterInfo | None:
        """Return the parameter that has ``name`` or one of its aliases, under its first name, or None."""
        return next((info for info in self.parameters if any(alias.name == name for alias in info.named())), None)

    def trainable(self) -> Iterator[ParameterInfo]:
        """Yield the parameters with ``requires_grad=True``."""
        return (info for info in self.parameters if info.trainable)


def parameter_table(model: CheckpointLike) -> ParameterTable:
    """Return the parameters of a live ``torch.nn.Module``, or of a checkpoint by names and shapes only.

    A path is opened here, and closed at the end; ``py:package.module:callable`` builds a live module.

    Raises ``ModelError`` where ``model`` is neither.
    """
    with opened_model(model) as found:
        if isinstance(found, Checkpoint):
            return _table_of(found)
        return live_parameter_table(read_live_model(found))


def _table_of(infos: Checkpoint) -> ParameterTable:
    kept = {key: info for key, info in infos.items() if not _is_buffer(info)}
    ties = {keys[0]: keys[1:] for keys in tied_keys(kept.values())}
    later = {alias for aliases in ties.values() for alias in aliases}
    known = {key: _from_tensor_info(info) for key, info in kept.items()}
    parameters = tuple(
        _with_aliases(known[key], [known[alias] for alias in ties.get(key, ())]) for key in kept if key not in later
    )
    return ParameterTable(
        parameters,
        tuple(key for key in infos if key not in kept),
        (
            "every parameter counts as trainable: only the live model has requires_grad",
            "roles (bias, norm, embedding, head) and buffers are guessed from names and dtypes, not from modules",
        ),
    )


def live_parameter_table(live_model: LiveModel) -> ParameterTable:
    """Return the parameters of a live model, with roles from the classes of its modules."""
    modules = dict(named_of(live_model.model, "modules"))
    heads = model_heads(live_model.model, modules)
    by_class: dict[type, tuple[frozenset[str], frozenset[str]]] = {}

    def known(name: str, tensor: Tensor, *, trainable: bool, lazy: bool) -> ParameterInfo:
        path = name[: name.index(_PARAMETRIZED)] if _PARAMETRIZED in name else name.rpartition(".")[0]
        module = modules.get(path)
        kind = type(module)
        if kind not in by_class:
            by_class[kind] = (class_names(kind), roles_by_class(kind))
        classes, roles = by_class[kind]
        shape = None if lazy else true_shape(tensor)
        extra = roles_by_name(name, shape, module=module, head=path in heads)
        dtype = _DTYPE_CODES.get(str(tensor.dtype).removeprefix("torch."), "")
        return ParameterInfo(name, shape, dtype, trainable, classes, roles | extra)

    return ParameterTable(
        tuple(
            _with_aliases(
                known(live.name, live.tensor, trainable=live.trainable, lazy=live.lazy),
                [known(alias, live.tensor, trainable=live.trainable, lazy=live.lazy) for alias in live.aliases],
            )
            for live in live_model.parameters.values()
        ),
        tuple(name for name, _ in live_model.buffers.values()),
    )


def _from_tensor_info(info: TensorInfo) -> ParameterInfo:
    head = any(segment in HEADS for segment in info.key.split(".")[:2])
    return ParameterInfo(
        info.key, info.shape, info.dtype, roles=roles_by_name(info.key, info.shape, guess=True, head=head)
    )


def _with_aliases(info: ParameterInfo, aliases: list[ParameterInfo]) -> ParameterInfo:
    if not aliases:
        return info
    return ParameterInfo(info.name, info.shape, info.dtype, info.trainable, info.classes, info.roles, tuple(aliases))


def _is_buffer(info: TensorInfo) -> bool:
    return is_buffer_name(info.key) or (info.dtype not in _FLOATING and not info.dtype.startswith("F8"))
