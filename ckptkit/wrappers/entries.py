"""Tell which values of a checkpoint are known not to be weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeGuard

from ckptkit.core.text import listed, quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.wrappers.table import WRAPPERS

__all__ = [
    "FLAT_GROUPS",
    "FLAT_STATE",
    "GENERIC_SLOTS",
    "SLOTS",
    "KnownEntry",
    "TensorLike",
    "describe_entries",
    "is_optimizer_state",
    "known_entries",
    "optimizer_keys",
    "unknown_tensors",
]


class TensorLike(Protocol):
    """The dtype and the shape of a tensor, which are all that is looked at."""

    @property
    def dtype(self) -> str:
        """Return the safetensors code of the dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape."""
        ...


IsTensor = Callable[[object], TypeGuard[TensorLike]]


class KnownEntry(NamedTuple):
    """The name of a value that is known not to be weights, for messages, and what the value is."""

    name: str
    content: str


FLAT_STATE: Final = "state."
FLAT_GROUPS: Final = "param_groups."

_OPTIMIZER: Final = "the state of an optimizer"
_SCHEDULER: Final = "the state of a scheduler"
_RANDOM: Final = "the state of random number generators"
_SCALER: Final = "the state of a gradient scaler"
_AVERAGE: Final = "a second copy of the weights"
_SAME_NAMES: Final = "other tensors with the names and shapes of the weights"
_PROGRESS: Final = "the progress of the training"
_TRAINER: Final = "the state of a trainer"

_OPTIMIZER_NAME: Final = lazy_pattern(
    r"(.+_)?(optim|optims|optimizer|optimizers|opt)(_(state|states|state_dict|\w|\d+))?"
)
_RANDOM_NAME: Final = lazy_pattern(r"(.+_)?(rng|rngs|random)(_(state|states|state_dict|cpu|cuda|numpy|torch|python))*")
_NAMES: Final = (
    (_OPTIMIZER_NAME, _OPTIMIZER),
    (
        lazy_pattern(
            r"train_state|training_state|trainer_state|trainer|(train_|val_)?(dataloader|dataloaders|data_loader)(_state)?"
            r"|dataset_state|sampler_state|loops|callbacks|message_hub"
        ),
        _TRAINER,
    ),
)
# Modules have these names too, so a name counts only if each tensor is a single number, or a series of numbers.
_NAMES_OF_NUMBERS: Final = (
    (lazy_pattern(r"(.+_)?(scheduler|schedulers|sched)(_(state|states|state_dict))?"), _SCHEDULER),
    (lazy_pattern(r"(.+_)?(scaler|scalers|amp)(_(state|states|state_dict))?"), _SCALER),
)
_NAMES_OF_SERIES: Final = ((lazy_pattern(r"sampler|metrics|history|logs|progress|early_stopping"), _TRAINER),)
# A name alone never makes a mapping a copy: it must have the shapes of the weights too.
_AVERAGE_NAME: Final = lazy_pattern(
    r"(.*_)?(ema|swa|avg|average|averaged|shadow|polyak|slow|teacher|target|momentum|best|copy|backup|old|prev|previous"
    r"|initial|frozen|reference|ref|master|fp32)(_.*)?|\w*(ema|Ema|EMA)|(ema|EMA)\w*"
)
# A single number of such a name counts something. A scale or a temperature of a model has another name.
_COUNTER_NAME: Final = lazy_pattern(
    r"((global|train|training|total|current|cur|num|last|n|optimizer|opt)_)?(step|steps|epoch|epochs|iter|iters|iteration"
    r"|iterations|iter_num|updates|batches|samples|tokens)(_(seen|run|num|done))?|ntokens_seen"
    r"|(best|min|max)_((val|valid|eval|test|train)_)?(loss|acc|accuracy|acc1|top1|metric|score|fitness|epoch|step|iter"
    r"|reward|perplexity|ppl|iou|miou|map|f1|auc)|((val|valid|train|eval|test)_)?(loss|acc|accuracy)"
)
# Names of slots that no module gives to a parameter: those of core.torch_optim, which reaches torch, and of libraries.
SLOTS: Final = frozenset({
    "acc_delta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer", "mu_product",
    "square_avg", "row_var", "col_var", "func_evals", "n_iter", "old_dirs", "old_stps", "H_diag", "prev_flat_grad",
    "prev_loss", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_diff", "exp_avg_slow", "exp_avg_fast", "exp_avg_res_row",
    "exp_avg_res_col", "exp_hessian_diag", "slow_buffer", "slow_param", "fp32_param", "master_param", "exp_avgs",
    "exp_avg_sqs",
})  # fmt: skip
# Generic names of slots, which count only next to one of the names above.
GENERIC_SLOTS: Final = frozenset(
    {"step", "eta", "mu", "ax", "variance", "sum", "d", "t", "ro", "al", "prev", "step_size"}
)
_PARAMETER_NAMES: Final = frozenset({
    "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta", "weight_g", "weight_v",
    "in_proj_weight", "in_proj_bias",
})  # fmt: skip
_BUFFER_NAMES: Final = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_FEWEST_COPIED = 2
_SCHEDULER_KEYS: Final = frozenset({"last_epoch", "_step_count", "base_lrs", "_last_lr"})
_SCALER_KEYS: Final = ({"scale", "growth_factor"}, {"_scale", "_growth_factor"}, {"loss_scale", "unskipped"})
_MOST_NAMED = 8
_DEEPEST = 12
_LARGEST = 2**63  # integer keys beyond can be too long to print
_LONGEST_KEY = 500
_CHARACTERS = 50  # of a key, which count as one more visited value
_LONGEST_LIST = 1000  # a longer list of numbers holds no weights
_MOST_VISITED, _MOST_IN_ALL = 100_000, 1_000_000  # values below one root key, and below all


def is_optimizer_state(value: object) -> bool:
    """Return whether ``value`` has the form of an optimizer's ``state_dict()``, nested or with flattened keys."""
    if not isinstance(value, Mapping) or not value:
        return False
    if "state" in value and "param_groups" in value:
        return isinstance(value["state"], Mapping) and isinstance(value["param_groups"], list | tuple)
    flat = all(isinstance(key, str) and key.startswith((FLAT_STATE, FLAT_GROUPS)) for key in value)
    return flat and any(key.startswith(FLAT_GROUPS) for key in value)


def describe_entries(found: Mapping[object, KnownEntry]) -> str:
    """Return a sentence that names values which are not read as weights."""
    contents = dict.fromkeys(f"{quoted(entry.name)} ({entry.content})" for entry in found.values())
    return f"not read as weights: {listed(list(contents), _MOST_NAMED, show=str)}"


def known_entries(
    tree: Mapping[object, object], is_tensor: IsTensor, *, keep_tensors: bool = False
) -> dict[object, KnownEntry]:
    """Return each key of ``tree`` with a value that is known not to be weights, and what the value is.

    A mapping counts if its content or its name says what it is, and a tensor if its name does: ``step`` with a single
    number. With ``keep_tensors``, each tensor directly in ``tree`` is a weight, unless it is a slot of an optimizer.
    Nothing is returned if no other tensor would remain. Raises ``FormatError`` for a mapping with the state of an
    optimizer and with tensors that can be weights.
    """
    found: dict[object, KnownEntry] = optimizer_keys(tree)
    nested = [key for key, value in tree.items() if not is_tensor(value) and isinstance(value, Mapping | list | tuple)]
    counters: dict[object, KnownEntry] = {}
    for key, value in () if keep_tensors else tree.items():
        if isinstance(key, str) and "." not in key and is_tensor(value) and (what := _tensor_content(key, value)):
            counters[key] = KnownEntry(key, what)
    if not (found or nested or counters):
        return {}
    shapes = {key: value.shape for key, value in tree.items() if isinstance(key, str) and is_tensor(value)}
    owned = _keys_of_wrappers(shapes)
    found |= {key: entry for key, entry in counters.items() if key not in owned}
    own = {key: shape for key, shape in shapes.items() if key not in found}
    for key, content, _ in _described({key: tree[key] for key in nested}, is_tensor, own):
        if content:
            found[key] = KnownEntry(str(key), content)
    budget = [_MOST_IN_ALL]
    others = (value for key, value in tree.items() if key not in found)
    has_weights = bool(found) and any(
        is_tensor(leaf) for value in others for _, leaf in _leaves(value, is_tensor, budget)
    )
    return found if has_weights else {}


def unknown_tensors(tree: Mapping[object, object], is_tensor: IsTensor) -> list[str]:
    """Return the keys of ``tree`` with tensors that can be weights, which single numbers and empty tensors are not."""
    nested = {
        key: value for key, value in tree.items() if not is_tensor(value) and isinstance(value, Mapping | list | tuple)
    }
    unknown = {
        key
        for key, content, tensors in _described(nested, is_tensor, {})
        if not content and not all(_is_single(tensor) or 0 in tensor.shape for tensor in tensors)
    }
    for key, value in tree.items():
        if is_tensor(value) and not (isinstance(key, str) and _tensor_content(key, value)):
            unknown.add(key)
    return [str(key) for key in tree if key in unknown]


def _described(
    nested: Mapping[object, object], is_tensor: IsTensor, own: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[object, str | None, list[TensorLike]]]:
    """Yield each key, what the value at the key is, and its tensors. A part of the model has None in second place.

    ``own`` has the shapes of the weights.
    """
    left = _MOST_IN_ALL
    for key, value in nested.items():
        if left > 0:
            budget = [min(left, _MOST_VISITED)]
            left -= budget[0]
            leaves = list(_leaves(value, is_tensor, budget))
            left += budget[0]
            tensors = {name: leaf for name, leaf in leaves if is_tensor(leaf)}
            names = [name for name, _ in leaves]
            yield key, _content(key if isinstance(key, str) else "", value, names, tensors, own), list(tensors.values())


def _leaves(value: object, is_tensor: IsTensor, budget: list[int], depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yield the values below ``value`` with their dotted names; ``budget[0]`` values may be visited."""
    budget[0] -= 1
    if is_tensor(value) or not isinstance(value, Mapping | list | tuple):
        yield "", value
        return
    is_long = not isinstance(value, Mapping) and len(value) > _LONGEST_LIST and isinstance(value[0], int | float | str)
    if depth == _DEEPEST or is_long:
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        if budget[0] <= 0:
            return
        is_plain = len(key) <= _LONGEST_KEY if isinstance(key, str) else isinstance(key, int) and abs(key) < _LARGEST
        name = str(key) if is_plain else "?"
        budget[0] -= len(name) // _CHARACTERS
        for rest, leaf in _leaves(inner, is_tensor, budget, depth + 1):
            yield f"{name}.{rest}" if rest else name, leaf


def optimizer_keys(tree: Iterable[object]) -> dict[object, KnownEntry]:
    """Return the flattened keys of optimizer states, such as ``optimizer.state.0.weight.exp_avg``.

    A key under the same prefix that ends like a parameter, such as ``optimizer.weight``, is not one of them.
    """
    prefixes: dict[str, None] = {}
    keys = [key for key in tree if isinstance(key, str) and ("state" in key or "opt" in key)]
    for key in keys:
        segments = key.split(".")
        if "state" in segments:
            at = segments.index("state")
            if not SLOTS.isdisjoint(segments[at + 1 :]):
                prefixes |= dict.fromkeys(".".join((*segments[:at], part, "")) for part in ("state", "param_groups"))
        elif _OPTIMIZER_NAME.fullmatch(segments[0]) and not SLOTS.isdisjoint(segments[1:]):
            prefixes[f"{segments[0]}."] = None
    return {
        key: KnownEntry(f"{prefix}*", _OPTIMIZER)
        for prefix in prefixes
        for key in keys
        if key.startswith(prefix) and _is_slot_or_option(key[len(prefix) :].split("."))
    }


def _is_slot_or_option(segments: Sequence[str]) -> bool:
    return segments[-1] not in _PARAMETER_NAMES or not SLOTS.isdisjoint(segments)


def _keys_of_wrappers(shapes: Mapping[str, object]) -> set[str]:
    """Return the keys that a wrapper adds for values of its own, if other keys have the mark of the wrapper."""
    rows = [row for row in WRAPPERS if any(key in shapes for key in row.own_keys)]
    return {key for row in rows if any(name.startswith(f"{row.mark}.") for name in shapes) for key in row.own_keys}


def _tensor_content(name: str, tensor: TensorLike) -> str | None:
    """Return what a tensor of this name is, or None for a tensor that can be a parameter."""
    if "." in name:
        return None
    if tensor.shape in ((), (1,)) and _COUNTER_NAME.fullmatch(name):
        return _PROGRESS
    return _RANDOM if _is_random_state(tensor) and _RANDOM_NAME.fullmatch(name) else None


def _is_random_state(tensor: TensorLike) -> bool:
    return tensor.dtype in ("U8", "U32", "U64", "I32", "I64") and len(tensor.shape) <= 2


def _content(
    name: str,
    value: object,
    names: Sequence[str],
    tensors: Mapping[str, TensorLike],
    own: Mapping[str, tuple[int, ...]],
) -> str | None:
    """Return what the value at the root key ``name`` is, or None for a value that can be a part of the model.

    ``names`` are the dotted names of everything in the value. ``own`` has the shapes of the weights.
    """
    others = None if is_optimizer_state(value) else _beside_optimizer(names, tensors)
    if is_optimizer_state(value) or (others is not None and not others):
        return _OPTIMIZER
    if others and own:
        rest = {key: tensors[key] for key in others if not _tensor_content(key.rpartition(".")[2], tensors[key])}
        if not rest or _is_copy(rest, own):
            return _TRAINER
        if any("param_groups" in key.split(".") for key in names):
            if named := _named_content(name, _NAMES):
                return named
            raise _two_readings(name)
    keys = value.keys() if isinstance(value, Mapping) else frozenset[object]()
    if not tensors and keys & _SCHEDULER_KEYS:
        return _SCHEDULER
    if any(keys >= known for known in _SCALER_KEYS) and all(map(_is_single, tensors.values())):
        return _SCALER
    if isinstance(value, tuple | list) and value and isinstance(value[0], str) and value[0] == "MT19937":
        return _RANDOM
    if _AVERAGE_NAME.fullmatch(name) and name not in SLOTS and ("shadow_params.0" in tensors or _is_copy(tensors, own)):
        return _AVERAGE
    if _are_whole_copies(name, tensors, own):
        return _OPTIMIZER if name in SLOTS else _SAME_NAMES
    last_names = {key: key.rpartition(".")[2] for key in tensors}
    if not _PARAMETER_NAMES.isdisjoint(last_names.values()):
        is_state = _OPTIMIZER_NAME.fullmatch(name) and all(_has_suffix(key, own) for key in tensors)
        return _OPTIMIZER if is_state else None
    if tensors and all(_tensor_content(last_names[key], tensor) == _PROGRESS for key, tensor in tensors.items()):
        return _PROGRESS
    if _RANDOM_NAME.fullmatch(name) and all(map(_is_random_state, tensors.values())):
        return _RANDOM
    known = list(_NAMES)
    if all(map(_is_single, tensors.values())):
        known += _NAMES_OF_NUMBERS
    if all(len(tensor.shape) < 2 for tensor in tensors.values()):
        known += _NAMES_OF_SERIES
    return _named_content(name, known)


def _named_content(name: str, known: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    return next((content for pattern, content in known if pattern.fullmatch(name)), None)


def _two_readings(name: str) -> FormatError:
    return FormatError(
        f"holds tensors at the root, and in {quoted(name)} the state of an optimizer beside other tensors",
        hint=f"add {shell_word(f'::{name}')} to the path for those tensors, or save the file without {quoted(name)}",
    )


def _is_single(tensor: TensorLike) -> bool:
    return all(size == 1 for size in tensor.shape)


def _has_suffix(name: str, known: Mapping[str, object]) -> bool:
    segments = name.split(".")
    return any(".".join(segments[at:]) in known for at in range(len(segments)))


def _beside_optimizer(names: Sequence[str], tensors: Mapping[str, TensorLike]) -> list[str] | None:
    """Return the names of the tensors that are not slots, or None if there are neither slots nor groups."""
    has_groups = any("param_groups" in name and "param_groups" in name.split(".") for name in names)
    has_slots = False
    others = []
    for name in tensors:
        segments = name.split(".")
        if not SLOTS.isdisjoint(segments):
            has_slots = True
        elif segments[-1] not in GENERIC_SLOTS and not (has_groups and {"state", "param_groups"} & set(segments)):
            others.append(name)
    return others if has_groups or has_slots else None


def _is_copy(tensors: Mapping[str, TensorLike], own: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the tensors have names and shapes of ``own``, below a common prefix, apart from counters."""
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not _tensor_content(name, tensor)}
    first = next(iter(shapes), "").split(".")
    for count in range(len(first)):
        prefix = "".join(f"{segment}." for segment in first[:count])
        if shapes and all(
            name.startswith(prefix) and own.get(name[len(prefix) :]) == shape for name, shape in shapes.items()
        ):
            return True
    return False


def _are_whole_copies(name: str, tensors: Mapping[str, TensorLike], own: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the tensors are one or more copies of all parameters of ``own``, whatever the name is.

    A numbered name, such as ``q2``, is more likely a second network of the model.
    """
    parameters = [key for key in own if key.rpartition(".")[2] not in _BUFFER_NAMES]
    if name[-1:].isdigit() or len(tensors) < len(parameters) or sum("." in key for key in parameters) < _FEWEST_COPIED:
        return False
    groups: dict[str, dict[str, TensorLike]] = {}
    for key, tensor in tensors.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = tensor
    whole = [tensors] if _is_copy(tensors, own) else list(groups.values())
    return all(len(part) >= len(parameters) and _is_copy(part, own) for part in whole)
