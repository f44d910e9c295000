"""What an operation of transformers does, in our operations: it is followed with the names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

from ckptkit.core.text import quoted
from ckptkit.errors import RuleError
from ckptkit.rules.transformers.steps import Trace
from ckptkit.tensor_ops.joining import Concat, Deinterleave, Interleave, Split, Stack, Unstack
from ckptkit.tensor_ops.moving import RopePermute, Transpose
from ckptkit.tensor_ops.operation import Operation, Shape

__all__ = ["KNOWN", "Conversion", "Lookup", "follow"]

State: TypeAlias = dict[str, list[str]]  # the names of tensors, by the pattern that they belong to
_ALL = "*"


@dataclass(frozen=True, slots=True)
class Lookup:
    """What operations ask the model: its configuration, and the shape of a parameter (None if not known)."""

    config: Any
    shape: Callable[[str], Shape | None]


@dataclass(slots=True)
class Conversion:
    """One use of a converter: its patterns, the name of its first target, and the steps so far."""

    sources: Sequence[str]
    targets: Sequence[str]
    name: str
    trace: Trace
    lookup: Lookup

    def only(self, state: State) -> str:
        """Return the name of the only tensor."""
        if len(state) != 1:
            raise self.refusal("takes one tensor")
        return next(iter(state.values()))[0]

    def only_target(self) -> str:
        """Return the only target."""
        if len(self.targets) != 1:
            raise self.refusal("makes one tensor")
        return self.targets[0]

    def one(self, operations: Sequence[Operation], names: Sequence[str]) -> str:
        """Record operations with one output, and return its name."""
        return self.trace.apply(operations, names)[0]

    def shape(self, name: str, why: str) -> Shape:
        """Return the shape of a tensor in the trace; raise ``RuleError`` where only names are known."""
        if name not in self.trace.shapes:
            raise self.refusal(f"needs the shape of {quoted(name)}: {why}")
        return self.trace.shapes[name]

    def model_shape(self, name: str) -> Shape:
        """Return the shape of a parameter of the model; raise ``RuleError`` where it is not known."""
        shape = self.lookup.shape(name)
        if shape is None:
            raise self.refusal(f"needs the shape of {quoted(name)} in the model", "put config.json beside the file")
        return shape

    def setting(self, path: Sequence[str], default: int | None = None) -> int:
        """Return a number of the configuration; raise ``RuleError`` where there is none."""
        if self.lookup.config is None:
            raise self.refusal(f"needs {'.'.join(path)} of config.json", "put config.json beside the file")
        *parents, last = path
        found = self.lookup.config
        for parent in parents:
            found = getattr(found, parent, found)
        value = getattr(found, last, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(f"the configuration has no number {'.'.join(path)}")
        return value

    def refusal(self, reason: str, hint: str | None = None) -> RuleError:
        """Return a ``RuleError`` that names the tensor."""
        return RuleError(f"the conversion that makes {quoted(self.name)} {reason}", hint=hint)


def follow(operation: Any, state: State, conversion: Conversion) -> State:
    """Return the tensors after an operation of transformers, by pattern; the steps are added to the trace.

    Raises ``RuleError`` for an operation that is not known here, naming it, and where a shape or setting is missing.
    """
    name = type(operation).__name__
    if name not in KNOWN:
        raise RuleError(
            f"transformers makes {quoted(conversion.name)} with {name}, an operation that rules do not have",
            hint="load the checkpoint with from_pretrained, and save the state_dict()",
        )
    return KNOWN[name](operation, state, conversion)


def _merge_modulelist(operation: Any, state: State, conversion: Conversion) -> State:
    merged: State = {}
    count = max(map(len, state.values()))
    for pattern, names in state.items():
        missing = _missing_number(names, count)
        if missing is not None:
            raise conversion.refusal(f"lacks {quoted(missing)}")
        target = conversion.only_target() if len(state) == 1 else pattern
        merged[target] = [conversion.one([Stack(operation.dim)], names)]
    return merged


def _missing_number(names: Sequence[str], count: int) -> str | None:
    """Return the name that is missing of ``count`` names that differ in one number from 0, or None."""
    rows = [name.split(".") for name in names]
    differing = [at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1]
    if len({len(row) for row in rows}) != 1 or len(differing) != 1:
        return None
    (at,) = differing
    there = {row[at] for row in rows}
    if not all(text.isdigit() for text in there):
        return None
    missing = next((str(number) for number in range(count) if str(number) not in there), None)
    return None if missing is None else ".".join([*rows[0][:at], missing, *rows[0][at + 1 :]])


def _split_modulelist(operation: Any, state: State, conversion: Conversion) -> State:
    parts: State = {}
    for pattern, names in state.items():
        target = conversion.only_target() if len(state) == 1 else pattern
        shape = conversion.shape(names[0], "it says the number of parts")
        if not -len(shape) <= operation.dim < len(shape):
            raise conversion.refusal(f"needs a tensor with a dim {operation.dim}, not {list(shape)}")
        made = conversion.trace.apply([Unstack(shape[operation.dim], operation.dim)], names[:1])
        parts |= {target.replace(_ALL, str(number)): [name] for number, name in enumerate(made)}
    return parts


def _concatenate(operation: Any, state: State, conversion: Conversion) -> State:
    target = conversion.only_target()
    missing = next((pattern for pattern in conversion.sources if pattern not in state), None)
    if missing is not None:
        raise conversion.refusal(f"lacks a tensor that matches {quoted(missing)}")
    names = [name for pattern in conversion.sources for name in state[pattern]]
    return {target: [conversion.one([Concat(operation.dim)], names) if len(names) > 1 else names[0]]}


def _chunk(operation: Any, state: State, conversion: Conversion) -> State:
    name = conversion.only(state)
    targets = list(conversion.targets)
    attribute = getattr(operation, "num_shards_attribute", None)
    if attribute is not None:
        count = conversion.setting(["text_config", attribute])
        targets = [conversion.only_target().replace(_ALL, str(number)) for number in range(count)]
    if len(targets) == 1:
        return {targets[0]: [name]}
    split = Split(operation.dim, parts=len(targets))
    shape = conversion.trace.shapes.get(name)
    if shape is not None and -len(shape) <= operation.dim < len(shape) and shape[operation.dim] % len(targets):
        # torch.chunk makes the last part smaller.
        size = -(-shape[operation.dim] // len(targets))
        last = shape[operation.dim] - size * (len(targets) - 1)
        split = Split(operation.dim, (*(size,) * (len(targets) - 1), max(last, 0)))
    return dict(zip(targets, ([part] for part in conversion.trace.apply([split], [name])), strict=True))


def _split(operation: Any, state: State, conversion: Conversion) -> State:
    name = conversion.only(state)
    first = conversion.targets[0]
    shapes = [conversion.model_shape(conversion.name.replace(first, target)) for target in conversion.targets]
    split = Split(operation.dim, tuple(shape[operation.dim] for shape in shapes))
    return dict(zip(conversion.targets, ([part] for part in conversion.trace.apply([split], [name])), strict=True))


def _interleave(operation: Any, state: State, conversion: Conversion) -> State:
    name = next(iter(state.values()))[0]
    dim = operation.dim
    operations: tuple[Operation, ...] = (
        (Split(dim, parts=2), Interleave(dim)) if operation.inverse else (Deinterleave(dim), Concat(dim))
    )
    return {conversion.targets[0]: [conversion.one(operations, [name])]}


def _transpose(operation: Any, state: State, conversion: Conversion) -> State:
    name = conversion.only(state)
    target = conversion.targets[0]
    if len(conversion.targets) > 1:
        (target,) = conversion.sources
    if getattr(operation, "check_dims", False) and conversion.model_shape(conversion.name) == conversion.shape(
        name, "a tensor that has the shape of the model already is not transposed"
    ):
        return {target: [name]}
    return {target: [conversion.one([Transpose(operation.dim0, operation.dim1)], [name])]}


def _permute_for_rope(operation: Any, state: State, conversion: Conversion) -> State:
    permuted: State = {}
    layers = operation.permute_layer_names
    for pattern, names in state.items():
        is_inside = len(conversion.targets) > 1 or len(conversion.sources) > 1
        target = pattern if is_inside else conversion.targets[0]
        name = names[0]
        if layers is None or any(layer in pattern for layer in layers):
            path = [*([operation.subconfig_key] if operation.subconfig_key else []), "num_attention_heads"]
            direction = "to_original" if operation.inverse else "to_hf"
            name = conversion.one([RopePermute(conversion.setting(path, 1), direction)], [name])
        permuted[target] = [name]
    return permuted


def _ernie_fuse(operation: Any, state: State, conversion: Conversion) -> State:
    """Stack each half of the experts, one for text and one for images, and join the stacks of each half."""
    halves: list[list[str]] = [[] for _ in conversion.targets]
    for pattern in conversion.sources:
        names = state.get(pattern, [])
        if len(names) < len(halves):
            raise conversion.refusal(f"lacks tensors that match {quoted(pattern)}")
        size = -(-len(names) // len(halves))
        for number, half in enumerate(halves):
            half.append(conversion.one([Stack(operation.stack_dim)], names[number * size : (number + 1) * size]))
    return {
        target: [conversion.one([Concat(operation.concat_dim)], half) if len(half) > 1 else half[0]]
        for target, half in zip(conversion.targets, halves, strict=True)
    }


def _ernie_split(operation: Any, state: State, conversion: Conversion) -> State:
    """Undo ``_ernie_fuse``."""
    parts: list[list[str]] = [[] for _ in conversion.targets]
    for pattern in conversion.sources:
        names = state.get(pattern, [])
        if not names:
            raise conversion.refusal(f"lacks a tensor that matches {quoted(pattern)}")
        split = names[:1]
        if len(parts) > 1:
            split = list(conversion.trace.apply([Split(operation.concat_dim, parts=len(parts))], names[:1]))
        for part, name in zip(parts, split, strict=True):
            count = conversion.shape(name, "it says the number of experts")[operation.stack_dim]
            part.extend(conversion.trace.apply([Unstack(count, operation.stack_dim)], [name]))
    return dict(
        chain.from_iterable(
            ((target.replace(_ALL, str(number)), [name]) for number, name in enumerate(part))
            for target, part in zip(conversion.targets, parts, strict=True)
        )
    )


KNOWN: Mapping[str, Callable[[Any, State, Conversion], State]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "ErnieFuseAndSplitTextVisionExperts": _ernie_fuse,
    "ErnieSplitAndDecoupleTextVisionExperts": _ernie_split,
    "Interleave": _interleave,
    "MergeModulelist": _merge_modulelist,
    "PermuteForRope": _permute_for_rope,
    "Split": _split,
    "SplitModulelist": _split_modulelist,
    "Transpose": _transpose,
}
