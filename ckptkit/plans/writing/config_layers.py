"""The layers that a configuration states: their number, and lists with one item for each of them."""

from __future__ import annotations

from collections.abc import Iterator

from ckptkit.core.text import listed, quoted
from ckptkit.formats.directories.model_files import MODEL_CONFIG
from ckptkit.plans.carried import Adapted
from ckptkit.plans.plan import LayerCount

__all__ = ["QUANTIZATION", "adapt_layers", "sections_of"]

QUANTIZATION = "quantization_config"
_SECTION = "_config"  # ends the names of the sections of a model of several parts, such as text_config
_LAYER = "layer"


def sections_of(config: dict[str, object], path: str = "") -> Iterator[tuple[str, dict[str, object]]]:
    """Yield a configuration and its sections, such as ``text_config``, each with its path and a dot behind it."""
    yield path, config
    for key, value in config.items():
        if key.endswith(_SECTION) and key != QUANTIZATION and isinstance(value, dict):
            yield from sections_of(value, f"{path}{key}.")


def adapt_layers(config: dict[str, object], layers: LayerCount) -> tuple[list[Adapted], list[str]]:
    """Change the number of layers in ``config``, and each list that has one item a layer; return this, and notes.

    The field is the one that ``layers`` names. Else it is the only one with the old number, or the only one of these
    with ``layer`` in its name.
    """
    found = [
        (f"{path}{key}", section, key)
        for path, section in sections_of(config)
        for key, value in section.items()
        if type(value) is int and (value == layers.before or f"{path}{key}" == layers.field)
    ]
    if layers.field:
        chosen = [row for row in found if row[0] == layers.field]
    else:
        chosen = found if len(found) == 1 else [row for row in found if _LAYER in row[2]]
    if len(chosen) != 1:
        names = [name for name, _, _ in chosen or found]
        if layers.field:
            why = f"it has no number {quoted(layers.field)}"
        elif names:
            why = f"{listed(names)} are all {layers.before}"
        else:
            why = f"no number in it is {layers.before}"
        return [], [f"{MODEL_CONFIG}: the number of layers is now {len(layers.order)}, and was not changed: {why}"]
    (path, section, key) = chosen[0]
    adapted = [Adapted(MODEL_CONFIG, path, section[key], len(layers.order))]
    section[key] = len(layers.order)
    prefix = path.removesuffix(key)
    for name, value in section.items():
        if not isinstance(value, list) or len(value) != layers.before or _LAYER not in name:
            continue
        if max(layers.order) < layers.before:
            section[name] = [value[layer] for layer in layers.order]
            adapted.append(Adapted(MODEL_CONFIG, f"{prefix}{name}", layers.before, len(layers.order)))
    return adapted, []
