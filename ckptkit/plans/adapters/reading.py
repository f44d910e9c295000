"""Read the adapter of a checkpoint: which format it has, and what its tensors mean for a base."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ckptkit.adapters.base_modules import on_base
from ckptkit.adapters.diffusers import METADATA, read_diffusers
from ckptkit.adapters.keys import named_format
from ckptkit.adapters.kohya import read_kohya
from ckptkit.adapters.model import Adapter
from ckptkit.adapters.named import NamedAdapter, split_name
from ckptkit.adapters.peft import read_peft
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_settings
from ckptkit.core.text import printable, quoted
from ckptkit.errors import PlanError, RuleError
from ckptkit.formats.directories.adapters import CONFIG
from ckptkit.formats.directories.side_files import file_beside
from ckptkit.plans.steps import refuse_unread
from ckptkit.tensor_ops.operation import Shape

__all__ = ["LoraConfigLike", "Reading", "read_adapter", "read_config", "read_named"]


class _HasToDict(Protocol):
    """A configuration object of a library, such as ``LoraConfig``."""

    def to_dict(self) -> dict[str, Any]: ...


LoraConfigLike: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | _HasToDict


@dataclass(frozen=True, slots=True)
class Reading:
    """An adapter on a base, with notes about what its file does not say."""

    adapter: Adapter
    notes: tuple[str, ...] = ()


def read_adapter(
    donor: Checkpoint, names: Mapping[str, str], given: LoraConfigLike | None, base: Mapping[str, Shape]
) -> Reading:
    """Return the adapter of ``donor`` with the modules of ``base``, from keys, configuration, metadata and alphas.

    ``names`` maps each key, after the rules, to the key in ``donor``. ``given`` is the configuration of PEFT; without
    it, the file tells the format, and ``adapter_config.json`` beside an adapter of PEFT is read.

    Raises ``RuleError`` for an adapter that cannot be folded or has no place in the base, and ``PlanError`` where its
    scale is unknown.
    """
    named = None if given is not None else read_named(donor, names)
    if named is not None:
        return Reading(on_base(named, base), named.notes)
    shapes = {new: donor[old].shape for new, old in names.items()}
    return Reading(read_peft(shapes, read_config(given, donor), base))


def read_named(donor: Checkpoint, names: Mapping[str, str]) -> NamedAdapter | None:
    """Return the adapter of a file of kohya or diffusers under the names of the file, or None for any other file.

    ``names`` is as in ``read_adapter``. Raises ``RuleError`` for an adapter that cannot be folded.
    """
    kind = named_format(names, donor.metadata)
    if not kind:
        return None
    shapes = {new: donor[old].shape for new, old in names.items()}
    alphas = _alphas(donor, names)
    return read_kohya(shapes, alphas) if kind == "kohya" else read_diffusers(shapes, _metadata(donor, names), alphas)


def _metadata(donor: Checkpoint, names: Iterable[str]) -> Mapping[str, str]:
    """Return the metadata of a file of diffusers; where it has no scale, ``adapter_config.json`` beside it counts.

    It is there if an adapter of PEFT was given the names of diffusers.
    """
    beside = file_beside(donor.path, CONFIG) if donor.files and METADATA not in donor.metadata else None
    if beside is None:
        return donor.metadata
    config = read_settings(beside, CONFIG)
    prefixes = {split_name(key)[0] for key in names}
    fields = {f"{prefix}{field}": value for prefix in prefixes for field, value in config.items()}
    return {**donor.metadata, METADATA: json.dumps(fields)}


def read_config(given: LoraConfigLike | None, adapter: Checkpoint) -> Mapping[str, object]:
    """Return the configuration of an adapter, by default from the file in its directory."""
    if given is None:
        found = file_beside(adapter.path, CONFIG) if adapter.files else None
        if found is None and not any("lora" in key for key in adapter):
            raise PlanError(
                "has no tensors of an adapter",
                hint="the base comes first, and then the adapter: ckpt merge BASE ADAPTER -o OUT --method lora",
                path=adapter.path,
            )
        if found is None:
            raise PlanError(
                f"no {CONFIG} in the directory of the adapter: the scale is unknown",
                hint=f"copy {CONFIG} there, or in Python give it as lora_config"
                if adapter.files
                else "give it as lora_config",
                path=adapter.path,
            )
        return read_settings(found, CONFIG)
    return read_settings(given, CONFIG)


def _alphas(donor: Checkpoint, names: Mapping[str, str]) -> dict[str, float]:
    """Return the value of each alpha; raise ``RuleError`` for one that is not a finite number other than 0."""
    keys = [key for key in names if key.endswith(".alpha")]
    refuse_unread((names[key] for key in keys), donor)
    return {key: _value(donor, names[key]) for key in keys}


def _value(donor: Checkpoint, key: str) -> float:
    shape = donor[key].shape
    if math.prod(shape) != 1:
        raise RuleError(f"{quoted(key)} is {list(shape)}, and an alpha is one number")
    value = donor.read(key).item()
    if isinstance(value, bool | complex) or not math.isfinite(value) or value == 0:
        raise RuleError(
            f"{quoted(key)} is {printable(str(value))}, which is not a valid alpha",
            hint="kohya trains with the rank where alpha is 0, other loaders add nothing: leave the module out with "
            "--drop, or correct the file"
            if value == 0
            else None,
        )
    return float(value)
