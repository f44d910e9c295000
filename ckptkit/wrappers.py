"""Which mapping inside a training checkpoint holds the weights: decided by what is in it, and always said."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckptkit.errors import FormatError
from ckptkit.text import printable, shell_word

__all__ = ["ENVELOPES", "WRAPPER_PREFIXES", "choose_envelope", "is_state_dict"]

# Names under which trainers keep weights; anything else inside a checkpoint is taken only where nothing here fits.
ENVELOPES = frozenset(
    {
        "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
        "ema", "ema_state_dict", "model_ema", "params_ema", "state_dict_ema", "teacher", "student", "generator",
        "discriminator", "encoder", "decoder", "backbone", "policy", "actor", "critic", "G", "D", "G_ema",
    }
)  # fmt: skip

# Prefixes that wrappers put in front of every key: DataParallel and DDP, torch.compile, FSDP, Lightning and others.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "_forward_module.", "base_model.model.")

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
    named = {key: value for key, value in children.items() if key in ENVELOPES}
    # Tensors at this level would be left out: then only a name that says "weights" is reason enough to go below.
    candidates = named or ({} if any(map(is_tensor, tree.values())) else children)
    if not candidates:
        return ()
    if len(candidates) > 1:
        listed = ", ".join(shell_word(f"::{at}{key}") for key in candidates)
        raise FormatError(
            f"holds {len(candidates)} mappings of weights: {', '.join(printable(key) for key in candidates)}",
            hint=f"say which one is meant by adding {listed} to the path",
        )
    ((key, value),) = candidates.items()
    if is_state_dict(value, is_tensor):
        return (key,)
    return (key, *choose_envelope(value, is_tensor, f"{at}{key}."))


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
                key in ENVELOPES and isinstance(inner, Mapping) and _holds_weights(inner, is_tensor, seen, depth - 1)
                for key, inner in value.items()
            )
        )
    return seen[place]
