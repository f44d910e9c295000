"""Follow the conversions of transformers with names: which keys become which, and what is done to the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.rules.transformers.operations import Conversion, Lookup, follow
from ckptkit.rules.transformers.skeleton import Skeleton
from ckptkit.rules.transformers.steps import Step, Trace
from ckptkit.tensor_ops.operation import Shape

__all__ = ["copies_of_tied", "steps_from_disk", "steps_to_disk"]


@dataclass(slots=True)
class _Group:
    """The keys that one converter takes together: ``collected`` has them by source pattern."""

    converter: Any
    collected: dict[str, list[str]] = field(default_factory=dict)


def steps_from_disk(infos: Mapping[str, TensorInfo | None], skeleton: Skeleton) -> list[Step]:
    """Return what ``from_pretrained`` does to the keys of a file: the steps of renames and conversions.

    A key that the model does not have, before or after, keeps its name. Raises ``RuleError`` for an operation of
    transformers that rules do not have.
    """
    from transformers import core_model_loading as library

    transforms = skeleton.transforms(is_load=True)
    renamings = [item for item in transforms if isinstance(item, library.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, library.WeightConverter)]
    names = skeleton if skeleton.is_named else None
    prefix = skeleton.base_prefix
    groups: dict[str, _Group] = {}
    renamed: dict[str, str] = {}
    for key in sorted(infos, key=library.dot_natural_key):
        new, pattern = library.rename_source_key(key, renamings, converters, prefix, names)
        if names is not None and new not in names:
            if key in names:
                new, pattern = library.rename_source_key(key, [], [], prefix, names)
            if new not in names:
                continue
        if pattern is None:
            renamed[key] = new
        else:
            _collect(groups, converters, new, pattern, key)
    steps = [Step((old,), (new,)) for old, new in renamed.items() if old != new]
    for name, group in groups.items():
        steps += _converted(name, group, infos, skeleton, str)
    return steps


def steps_to_disk(infos: Mapping[str, TensorInfo | None], skeleton: Skeleton) -> list[Step]:
    """Return what ``save_pretrained`` does to the names of a model that was not loaded from a file.

    Of tied tensors, one is kept, and the others must equal it. Raises ``RuleError`` as ``steps_from_disk`` does.
    """
    from transformers import core_model_loading as library

    transforms = [item.reverse_transform() for item in reversed(skeleton.transforms(is_load=False))]
    renamings = [item for item in transforms if isinstance(item, library.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, library.WeightConverter)]

    def rename(name: str) -> str:
        renamed: str = library.apply_renamings(name, renamings)
        return renamed

    groups: dict[str, _Group] = {}
    plain: dict[str, str] = {}
    for key in sorted(infos, key=library.dot_natural_key):
        new, pattern = library.apply_converters(key, converters)
        if pattern is None:
            plain[key] = rename(key)
        else:
            _collect(groups, converters, new, pattern, key)
    ignored = [key for key in plain if key in skeleton.unsaved]
    ties = {key: plain[kept] for key, kept in skeleton.ties.items() if key in plain and kept in plain}
    steps = [Step((key,), ()) for key in ignored]
    steps += [Step((key,), (new,), must_equal=True) for key, new in ties.items() if key not in ignored]
    steps += [Step((old,), (new,)) for old, new in plain.items() if old != new and old not in {*ignored, *ties}]
    for name, group in groups.items():
        steps += _converted(name, group, infos, skeleton, rename)
    return steps


def copies_of_tied(names: Iterable[str], skeleton: Skeleton) -> list[Step]:
    """Return the copies that the model's tied tensors need: a file has one of them, and the model has all."""
    names = set(names)
    copies: dict[str, list[str]] = {}
    for tied, kept in skeleton.ties.items() if skeleton.is_named else ():
        there, absent = (kept, tied) if kept in names else (tied, kept)
        if there in names and absent not in names:
            copies.setdefault(there, []).append(absent)
            names.add(absent)
    return [Step((name,), (name, *absent)) for name, absent in copies.items()]


def _collect(groups: dict[str, _Group], converters: Iterable[Any], name: str, pattern: str, key: str) -> None:
    if name not in groups:
        # As in the library: of several converters with one pattern, the last one counts.
        owners = {source: item for item in converters for source in item.source_patterns}
        groups[name] = _Group(owners[pattern])
    groups[name].collected.setdefault(pattern, []).append(key)


def _converted(
    name: str,
    group: _Group,
    infos: Mapping[str, TensorInfo | None],
    skeleton: Skeleton,
    rename: Callable[[str], str],
) -> list[Step]:
    """Return the steps of one use of a converter, whose first new name is ``name``."""
    keys = [key for keys in group.collected.values() for key in keys]
    shapes: dict[str, Shape] = {key: info.shape for key in keys if (info := infos[key]) is not None}
    trace = Trace(name.replace("*", "all"), shapes)
    converter = group.converter
    conversion = Conversion(
        converter.source_patterns, converter.target_patterns, name, trace, Lookup(skeleton.config, skeleton.shape)
    )
    state = {pattern: list(members) for pattern, members in group.collected.items()}
    for operation in converter.operations:
        state = follow(operation, state, conversion)
    # The library names the outputs by their patterns; the rest of the name is the same for all.
    full = name.replace("*.", "0.")
    before, after = next(((start, end) for start, found, end in map(full.partition, state) if found), (None, ""))
    final = {
        names[0]: rename(pattern if before is None else f"{before}{pattern}{after}") for pattern, names in state.items()
    }
    return trace.finish(final)
