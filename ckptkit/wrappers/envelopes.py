"""Which mapping inside a training checkpoint holds the weights: decided by what is in it, and always said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ckptkit.core.text import printable, quoted, shell_word
from ckptkit.errors import FormatError

__all__ = [
    "ENVELOPES",
    "FLAT_GROUPS",
    "FLAT_STATE",
    "OPTIMIZER",
    "WEIGHTS",
    "Envelope",
    "Selection",
    "averages_beside",
    "choose_envelope",
    "find_optimizers",
    "is_optimizer_state",
    "is_state_dict",
]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which mapping of a file to open: the one at the dotted ``key``, the state of the only optimizer, or the weights.

    An empty ``key`` without ``optimizer`` selects the weights, which a reader finds by their content.
    """

    key: str = ""
    optimizer: bool = False


WEIGHTS: Final = Selection()
OPTIMIZER: Final = Selection(optimizer=True)


class Envelope(NamedTuple):
    """A name under which trainers keep weights: what lies there, and whose habit it is.

    It speaks where all of ``beside`` lie next to it.
    """

    name: str
    what: str
    origin: str = ""
    beside: frozenset[str] = frozenset()


def _pair(origin: str, average: str, trained: str, *others: str) -> tuple[Envelope, Envelope]:
    """Return the rows of an average and of what it is the average of, which are told apart only by each other."""
    marks = frozenset({average, trained, *others})
    return (
        Envelope(average, "the average of the weights", origin, marks - {average}),
        Envelope(trained, "the weights as trained", origin, marks - {trained}),
    )


# Names under which trainers keep weights; anything else inside a checkpoint is taken only where nothing here fits.
# The first row that fits is the one that speaks. A name with "ema" in it is no proof: mmengine and Lightning save the
# average as the state_dict, and the weights as trained under the other name.
ENVELOPES = (
    *_pair("WeightAveraging of Lightning", "state_dict", "current_model_state"),
    *_pair("EMAHook of mmengine", "state_dict", "ema_state_dict", "message_hub"),
    *_pair("timm", "state_dict_ema", "state_dict"),
    *_pair("ultralytics", "ema", "model"),
    *_pair("timm, detectron2 and others", "model_ema", "model"),
    *_pair("BasicSR", "params_ema", "params"),
    *_pair("StyleGAN", "G_ema", "G"),
    Envelope("state_dict", "the weights", "Lightning, mmengine, timm, latent diffusion"),
    Envelope("model", "the weights", "detectron2, fairseq, ultralytics"),
    Envelope("model_state_dict", "the weights", "the recipes of torch"),
    Envelope("model_state", "the weights", "pycls"),
    Envelope("current_model_state", "the weights as trained", "WeightAveraging of Lightning"),
    Envelope("module", "the weights", "DeepSpeed"),
    Envelope("classy_state_dict", "the weights", "ClassyVision, VISSL"),
    Envelope("base_model", "the weights", "ClassyVision, VISSL"),
    Envelope("trunk", "the weights", "ClassyVision, VISSL"),
    Envelope("ema", "an average of weights"),
    Envelope("ema_state_dict", "an average of weights, by its name"),
    Envelope("model_ema", "an average of weights"),
    Envelope("params_ema", "an average of weights", "BasicSR"),
    Envelope("state_dict_ema", "an average of weights", "timm"),
    Envelope("G_ema", "an average of the generator", "StyleGAN"),
    Envelope("teacher", "the network that teaches", "DINO and other distillations"),
    Envelope("student", "the network that trains", "DINO and other distillations"),
    Envelope("encoder", "a part of the model", "I-JEPA"),
    *(Envelope(name, "a part of the model") for name in ("decoder", "backbone", "generator", "discriminator", "policy",
                                                         "actor", "critic", "G", "D")),
    *(Envelope(name, "the weights") for name in ("net", "network", "params", "weights")),
)  # fmt: skip
_NAMES = frozenset(row.name for row in ENVELOPES)
_OPTIMIZER_KEYS = {"state", "param_groups"}


def is_state_dict(value: object, is_tensor: Callable[[object], bool]) -> bool:
    """Return whether ``value`` is a flat mapping from names to tensors; a few entries of other kinds are allowed."""
    if not isinstance(value, Mapping) or not value or value.keys() >= _OPTIMIZER_KEYS:
        return False
    tensors = sum(is_tensor(item) for item in value.values())
    return tensors > 0 and 2 * tensors > len(value) and all(isinstance(key, str) for key in value)


def choose_envelope(
    tree: Mapping[object, object], is_tensor: Callable[[object], bool], at: str = ""
) -> tuple[str, ...]:
    """Return the path to the mapping of weights inside ``tree``; empty where ``tree`` is that mapping itself.

    Raises ``FormatError`` listing the candidates where there are several.
    """
    seen: dict[tuple[int, int], bool] = {}
    children = {
        key: value
        for key, value in tree.items()
        if isinstance(key, str) and isinstance(value, Mapping) and _holds_weights(value, is_tensor, seen)
    }
    if is_state_dict(tree, is_tensor):
        return ()
    named = {key: value for key, value in children.items() if key in _NAMES}
    # Tensors at this level would be left out: then only a name that says "weights" is reason enough to go below.
    candidates = named or ({} if any(map(is_tensor, tree.values())) else children)
    if not candidates:
        return ()
    if len(candidates) > 1:
        listed = ", ".join(shell_word(f"::{at}{key}") for key in candidates)
        told = ", ".join(_told(key, tree) for key in candidates)
        raise FormatError(
            f"holds {len(candidates)} mappings of weights: {told}",
            hint=f"say which one is meant by adding {listed} to the path",
        )
    ((key, value),) = candidates.items()
    if is_state_dict(value, is_tensor):
        return (key,)
    return (key, *choose_envelope(value, is_tensor, f"{at}{key}."))


def averages_beside(tree: object, chosen: Sequence[object], is_tensor: Callable[[object], bool]) -> Iterator[str]:
    """Yield, for each name on the way to the mapping that was chosen, what it is where an average lies beside it."""
    level = tree
    for key in chosen:
        if not isinstance(level, Mapping):
            return
        row = _row(key, level)
        if row is not None and row.beside:
            other = next(name for name in row.beside if name in _NAMES)
            mate = _row(other, level)
            if (
                mate is not None
                and mate.beside
                and isinstance(level[other], Mapping)
                and _holds_weights(level[other], is_tensor, {})
            ):
                yield f"{quoted(row.name)} holds {row.what}, and {quoted(other)} beside it {mate.what} ({row.origin})"
        level = level.get(key)


def _row(key: object, siblings: Mapping[object, object]) -> Envelope | None:
    return next((row for row in ENVELOPES if row.name == key and row.beside <= siblings.keys()), None)


def _told(key: str, siblings: Mapping[object, object]) -> str:
    row = _row(key, siblings)
    if row is None:
        return printable(key)
    return f"{printable(key)} ({row.what}{f': {row.origin}' if row.origin else ''})"


def _holds_weights(
    value: Mapping[object, object],
    is_tensor: Callable[[object], bool],
    seen: dict[tuple[int, int], bool],
    depth: int = 3,
) -> bool:
    # Remembered by identity: a small file can refer to one mapping from a million places.
    place = (id(value), depth)
    if place not in seen:
        seen[place] = is_state_dict(value, is_tensor) or (
            depth > 0
            and not value.keys() >= _OPTIMIZER_KEYS
            and any(
                key in _NAMES and isinstance(inner, Mapping) and _holds_weights(inner, is_tensor, seen, depth - 1)
                for key, inner in value.items()
            )
        )
    return seen[place]


FLAT_STATE: Final = "state."
FLAT_GROUPS: Final = "param_groups."
_DEEPEST = 4
_MOST_LOOKED_AT = 100_000


def is_optimizer_state(value: object) -> bool:
    """Return whether ``value`` has the form of an optimizer's ``state_dict()``, nested or flattened to names."""
    if not isinstance(value, Mapping) or not value:
        return False
    if "state" in value and "param_groups" in value:
        return isinstance(value["state"], Mapping) and isinstance(value["param_groups"], list | tuple)
    flat = all(isinstance(key, str) and key.startswith((FLAT_STATE, FLAT_GROUPS)) for key in value)
    return flat and any(key.startswith(FLAT_GROUPS) for key in value)


def find_optimizers(tree: object) -> list[tuple[object, ...]]:
    """Return the keys that lead to each optimizer's state in a nested value, in order; the value itself has none."""
    found: list[tuple[object, ...]] = []
    seen: set[int] = set()
    waiting: list[tuple[tuple[object, ...], object]] = [((), tree)]
    left = _MOST_LOOKED_AT
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
