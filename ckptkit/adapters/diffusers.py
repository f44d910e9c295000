"""Adapters of diffusers: the scale is in the metadata of the file, which has the configuration of each model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ckptkit.adapters.kohya import read_kohya
from ckptkit.adapters.model import AdaptedModule
from ckptkit.adapters.named import NamedAdapter, NamedModule, peft_key, split_name
from ckptkit.adapters.peft import read_peft
from ckptkit.core.config_files import parse_json
from ckptkit.core.text import listed, printable, quoted
from ckptkit.errors import FormatError, RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["METADATA", "adapter_metadata", "read_diffusers"]

METADATA = "lora_adapter_metadata"
_FIELD = re.compile(r"(?:(?P<model>unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior)\.)?(?P<field>[^.]+)")


def read_diffusers(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], alphas: Mapping[str, float]
) -> NamedAdapter:
    """Return what the tensors of a file of diffusers mean, from keys, shapes, the metadata, and each alpha.

    The metadata has the configuration of PEFT for each model of the pipeline, with the name of the model before each
    field: ``unet.r``. Files of older versions have none: an alpha beside the factors gives the scale, else it is 1.

    Raises ``RuleError`` for metadata that is not valid or contradicts a shape, for an adapter that cannot be folded,
    and for a module without all its factors.
    """
    configs = adapter_metadata(metadata)
    by_prefix: dict[str, dict[str, str]] = {}  # prefix of a model -> key of peft -> key of the file
    rest: dict[str, Shape] = {}
    for key, shape in shapes.items():
        prefix, _, name, _ = split_name(key)
        if _model_of(prefix, configs) is None:
            rest[key] = shape
            continue
        if key.endswith(".alpha"):
            raise RuleError(f"{quoted(key)} and the metadata ({METADATA}) both give a scale", hint="leave one out")
        table = by_prefix.setdefault(prefix, {})
        place = peft_key(name)
        if place in table:
            raise RuleError(f"{quoted(table[place])} and {quoted(key)} have the same place in the base")
        table[place] = key
    modules: list[NamedModule] = []
    for prefix, names in by_prefix.items():
        modules += _modules(prefix, names, shapes, configs[_model_of(prefix, configs) or ""])
    old = read_kohya(rest, alphas) if rest else NamedAdapter(())
    transposed = any(bool(config.get("fan_in_fan_out")) for config in configs.values())
    return NamedAdapter((*modules, *old.modules), old.notes, transposed)


def _modules(
    prefix: str, names: Mapping[str, str], shapes: Mapping[str, Shape], config: Mapping[str, object]
) -> list[NamedModule]:
    adapter = read_peft({name: shapes[key] for name, key in names.items()}, config)
    if adapter.replacements or adapter.rows:
        whole = [*adapter.replacements.values(), *(rows.name for rows in adapter.rows)]
        keys = [names[name] for name in whole]
        raise RuleError(f"{listed(keys, 1)} replaces values of the base, which a file of diffusers cannot say")
    _, component, _, _ = split_name(f"{prefix}x")
    return [NamedModule(prefix, component, each.module, False, _renamed(each, names)) for each in adapter.modules]


def _renamed(module: AdaptedModule, names: Mapping[str, str]) -> AdaptedModule:
    factors = {role: names[key] for role, key in module.factors.items()}
    bias = names[module.bias] if module.bias else ""
    return replace(module, factors=factors, bias=bias)


def adapter_metadata(metadata: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """Return the configuration of each model by the name of the model, which is empty where the fields have none.

    Raises ``RuleError`` for metadata that is not a JSON object of such fields.
    """
    if METADATA not in metadata:
        return {}
    try:
        table = parse_json(metadata[METADATA].encode("utf-8", "surrogatepass"), METADATA)
    except FormatError as error:
        raise RuleError(f"{METADATA} of the file is not valid: {error.reason}") from None
    configs: dict[str, dict[str, object]] = {}
    for name, value in table.items():
        found = _FIELD.fullmatch(name)
        if found is None:
            raise RuleError(f"{METADATA} of the file has the field {quoted(printable(name))}, which names no model")
        configs.setdefault(found["model"] or "", {})[found["field"]] = value
    return configs


def _model_of(prefix: str, configs: Mapping[str, object]) -> str | None:
    """Return the name of the configuration for keys with this prefix, or None; without a prefix there is one model."""
    name = prefix.removesuffix(".")
    if name in configs:
        return name
    return next(iter(configs)) if not prefix and len(configs) == 1 else None
