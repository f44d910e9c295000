"""Find the mapping of weights, and the states of optimizers, inside a training checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ckptkit.core.text import printable, quoted, shell_word
from ckptkit.errors import FormatError
from ckptkit.wrappers.entries import IsTensor, KnownEntry, is_optimizer_state, known_entries, unknown_tensors

__all__ = [
    "ENVELOPES",
    "EVERYTHING",
    "OPTIMIZER",
    "WEIGHTS",
    "Envelope",
    "Selection",
    "SeveralWeightsError",
    "Weights",
    "describe_averages",
    "find_optimizers",
    "find_weights",
    "is_state_dict",
]


@dataclass(frozen=True, slots=True)
class Selection:
    """The mapping of a file to open: the mapping at the dotted ``key``, the only optimizer state, or the weights.

    An empty ``key`` without ``optimizer`` selects the weights, which are found by their content. With ``everything``,
    the whole file is one mapping, and every tensor in it has the name that leads to it.
    """

    key: str = ""
    optimizer: bool = False
    everything: bool = False


EVERYTHING: Final = Selection(everything=True)
WEIGHTS: Final = Selection()
OPTIMIZER: Final = Selection(optimizer=True)


class Envelope(NamedTuple):
    """A key under which trainers store weights, the content under that key, and the library that writes the key.

    The row applies only if all keys of ``siblings`` are in the same mapping.
    """

    key: str
    content: str
    origin: str = ""
    siblings: frozenset[str] = frozenset()


_AVERAGE: Final = "the average of the weights"
_TRAINED: Final = "the trained weights"


def _pair(origin: str, average: str, trained: str, *others: str) -> tuple[Envelope, Envelope]:
    """Return the rows of an average and of the trained weights, which apply only if both keys are present."""
    keys = frozenset({average, trained, *others})
    return (
        Envelope(average, _AVERAGE, origin, keys - {average}),
        Envelope(trained, _TRAINED, origin, keys - {trained}),
    )


_PART: Final = "a part of the model"
# Any other key is considered only if none of these keys is present. The first row that applies wins. "ema" in a key
# does not prove an average: mmengine saves the average as state_dict and the trained weights as ema_state_dict.
ENVELOPES = (
    *_pair("WeightAveraging of Lightning", "state_dict", "current_model_state"),
    *_pair("EMAHook of mmengine", "state_dict", "ema_state_dict", "message_hub"),
    *_pair("timm", "state_dict_ema", "state_dict"),
    *_pair("ultralytics", "ema", "model", "best_fitness"),
    *_pair("judging by the keys", "ema", "model"),
    *_pair("timm, detectron2 and others", "model_ema", "model"),
    *_pair("BasicSR", "params_ema", "params"),
    *_pair("StyleGAN", "G_ema", "G"),
    Envelope("state_dict", "the weights", "Lightning, mmengine, timm, latent diffusion"),
    Envelope("model", "the weights", "detectron2, fairseq, ultralytics"),
    Envelope("model_state_dict", "the weights", "the recipes of torch"),
    Envelope("model_state", "the weights", "pycls"),
    Envelope("current_model_state", _TRAINED, "WeightAveraging of Lightning"),
    Envelope("module", "the weights", "DeepSpeed"),
    Envelope("classy_state_dict", "the weights", "ClassyVision, VISSL"),
    Envelope("base_model", "the weights", "ClassyVision, VISSL"),
    Envelope("trunk", "the weights", "ClassyVision, VISSL"),
    Envelope("ema", "an average of weights"),
    Envelope("ema_state_dict", "an average of weights, judging by the key"),
    Envelope("model_ema", "an average of weights"),
    Envelope("params_ema", "an average of weights", "BasicSR"),
    Envelope("state_dict_ema", "an average of weights", "timm"),
    Envelope("G_ema", "an average of the generator", "StyleGAN"),
    Envelope("teacher", "the teacher network", "DINO and other distillations"),
    Envelope("student", "the student network", "DINO and other distillations"),
    Envelope("encoder", _PART, "I-JEPA"),
    *(Envelope(name, _PART) for name in ("decoder", "backbone", "generator", "discriminator", "policy",
                                                         "actor", "critic", "G", "D")),
    *(Envelope(name, "the weights") for name in ("net", "network", "params", "weights")),
)  # fmt: skip
_KEYS = frozenset(row.key for row in ENVELOPES)
_OPTIMIZER_KEYS = {"state", "param_groups"}
_SCALARS = frozenset({int, float, bool, str, bytes, type(None)})


def is_state_dict(value: object, is_tensor: Callable[[object], bool]) -> bool:
    """Return whether ``value`` is a flat mapping with string keys, and most values are tensors."""
    if not isinstance(value, Mapping) or not value or value.keys() >= _OPTIMIZER_KEYS:
        return False
    if _SCALARS.issuperset(map(type, value.values())):  # as in a vocabulary of a million words
        return False
    tensors = sum(is_tensor(item) for item in value.values())
    return tensors > 0 and 2 * tensors > len(value) and all(isinstance(key, str) for key in value)


class Weights(NamedTuple):
    """The keys that lead to the mapping of weights, and the keys in it that hold no weights.

    ``beside`` names the keys next to the first of these keys with tensors that can be weights too.
    """

    path: tuple[str, ...]
    left_out: Mapping[object, KnownEntry]
    beside: tuple[str, ...] = ()


def find_weights(tree: Mapping[object, object], is_tensor: IsTensor, *, keep_tensors: bool = False) -> Weights:
    """Return where the weights in ``tree`` are. The path is empty if ``tree`` itself holds the weights.

    With ``keep_tensors``, no tensor directly in ``tree`` is taken for a counter. Raises ``FormatError`` with all
    candidates if there are several mappings of weights.
    """
    has_tensors = any(map(is_tensor, tree.values()))
    if not has_tensors and (path := _choose_envelope(tree, is_tensor)):
        return Weights(path, {}, _beside(tree, path, is_tensor))
    left_out = known_entries(tree, is_tensor, keep_tensors=keep_tensors)
    rest = {key: value for key, value in tree.items() if key not in left_out} if left_out else tree
    path = _choose_envelope(rest, is_tensor)
    return Weights(path, {}, _beside(rest, path, is_tensor)) if path else Weights((), left_out)


def _beside(tree: Mapping[object, object], path: tuple[str, ...], is_tensor: IsTensor) -> tuple[str, ...]:
    """Return the keys next to the mapping of weights with tensors that can be weights too.

    Raises ``FormatError`` if the mapping is only a part of the model, and there is another mapping of weights.
    """
    chosen = tree[path[0]]
    beside = unknown_tensors({key: value for key, value in tree.items() if value is not chosen}, is_tensor)
    row = _row(path[0], tree)
    others = [key for key in beside if isinstance(value := tree.get(key), Mapping) and is_state_dict(value, is_tensor)]
    if row is not None and row.content == _PART and others:
        raise _several_error([path[0], *others], tree)
    return tuple(beside)


def _choose_envelope(
    tree: Mapping[object, object], is_tensor: Callable[[object], bool], at: str = ""
) -> tuple[str, ...]:
    """Return the keys that lead to the mapping of weights in ``tree``, or no keys if ``tree`` itself holds the weights.

    ``at`` is the dotted path of ``tree``, for the error. Raises ``FormatError`` with all candidates if there are
    several.
    """
    seen: dict[tuple[int, int], bool] = {}
    children = {
        key: value
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, Mapping) and _holds_weights(value, is_tensor, seen)
    }
    if is_state_dict(tree, is_tensor):
        return ()
    named = {key: value for key, value in children.items() if key in _KEYS}
    # Choosing a child leaves out the tensors of this level, so only a well-known key is reason enough.
    candidates = named or ({} if any(map(is_tensor, tree.values())) else children)
    if not candidates:
        return ()
    if len(candidates) > 1:
        raise _several_error(list(candidates), tree, at)
    ((key, value),) = candidates.items()
    if is_state_dict(value, is_tensor):
        return (key,)
    return (key, *_choose_envelope(value, is_tensor, f"{at}{key}."))


class SeveralWeightsError(FormatError):
    """A file holds several mappings of weights. ``trained`` leads to the one of which all others are averages."""

    trained: str | None = None


def _several_error(candidates: Sequence[str], tree: Mapping[object, object], at: str = "") -> SeveralWeightsError:
    listed = ", ".join(shell_word(f"::{at}{key}") for key in candidates)
    described = ", ".join(_describe_key(key, tree) for key in candidates)
    error = SeveralWeightsError(
        f"holds {len(candidates)} mappings of weights: {described}", hint=f"select one by adding {listed} to the path"
    )
    for row in filter(None, (_row(key, tree) for key in candidates)):
        if row.content == _TRAINED and {*candidates} - {row.key} <= row.siblings:
            error.trained = f"{at}{row.key}"
    return error


def describe_averages(tree: object, chosen: Sequence[object], is_tensor: Callable[[object], bool]) -> Iterator[str]:
    """Yield a sentence for each key of the path ``chosen`` whose name does not tell an average from trained weights.

    One of the two is under the chosen key, and the other beside it. The keys ``model`` and ``ema`` tell it themselves.
    """
    level = tree
    for key in chosen:
        if not isinstance(level, Mapping):
            return
        row = _row(key, level)
        if row is not None and row.siblings:
            other = next(name for name in row.siblings if name in _KEYS)
            sibling = _row(other, level)
            if (
                sibling is not None
                and sibling.siblings
                and not _is_said(row if row.content == _AVERAGE else sibling)
                and isinstance(level[other], Mapping)
                and _holds_weights(level[other], is_tensor, {})
            ):
                yield (
                    f"{quoted(row.key)} holds {row.content}, and {quoted(other)} holds {sibling.content} ({row.origin})"
                )
        level = level.get(key)


def _is_said(average: Envelope) -> bool:
    """Return whether the key of an average has the word for it, as ``state_dict_ema`` has."""
    return "ema" in average.key.split("_")


def _row(key: object, siblings: Mapping[object, object]) -> Envelope | None:
    return next((row for row in ENVELOPES if row.key == key and row.siblings <= siblings.keys()), None)


def _describe_key(key: str, siblings: Mapping[object, object]) -> str:
    row = _row(key, siblings)
    if row is None:
        return printable(key)
    return f"{printable(key)} ({row.content}{f': {row.origin}' if row.origin else ''})"


def _holds_weights(
    value: Mapping[object, object],
    is_tensor: Callable[[object], bool],
    seen: dict[tuple[int, int], bool],
    depth: int = 3,
) -> bool:
    # Cached by identity: a small file can refer to one mapping from a million places.
    visit = (id(value), depth)
    if visit not in seen:
        seen[visit] = is_state_dict(value, is_tensor) or (
            depth > 0
            and not value.keys() >= _OPTIMIZER_KEYS
            and any(
                isinstance(inner := value[key], Mapping) and _holds_weights(inner, is_tensor, seen, depth - 1)
                for key in _KEYS
                if key in value
            )
        )
    return seen[visit]


_DEEPEST = 4
_MOST_VISITED = 100_000


def find_optimizers(tree: object) -> list[tuple[object, ...]]:
    """Return the path of each optimizer state in a nested value, in order. The path of the value itself is empty."""
    found: list[tuple[object, ...]] = []
    seen: set[int] = set()
    waiting: list[tuple[tuple[object, ...], object]] = [((), tree)]
    left = _MOST_VISITED
    while waiting and left > 0:
        path, value = waiting.pop()
        left -= 1
        if is_optimizer_state(value):
            found.append(path)
        elif isinstance(value, Mapping | list | tuple) and len(path) < _DEEPEST and id(value) not in seen:
            seen.add(id(value))
            pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))[:left]
            waiting += [
                ((*path, key), inner) for key, inner in reversed(pairs) if isinstance(inner, Mapping | list | tuple)
            ]
    return found
