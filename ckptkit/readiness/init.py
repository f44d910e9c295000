"""What the initial checkpoint fills, what stays as it was made, and whether that looks like a beginning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptkit.comparison import StateDictDiff
from ckptkit.core.checkpoint import DTYPES, Checkpoint
from ckptkit.core.coverage import coverage_by_module, group_by_module
from ckptkit.core.findings import Finding, Severity
from ckptkit.core.patterns import Pattern, matches_any, parse_pattern
from ckptkit.core.text import plural, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import same_values
from ckptkit.core.torch_types import Module
from ckptkit.errors import RuleError
from ckptkit.readiness.fresh import Look, looks_of
from ckptkit.readiness.model import Init, Kept
from ckptkit.statistics.state_dict_stats import StateDictStats, stats

__all__ = ["UNLOADED", "InspectedModel", "check_init", "check_values", "compare_init"]

_SHOWN = 4
# What is only wrong with values that nothing will be loaded over.
UNLOADED = frozenset({"preflight.zero", "preflight.constant", "preflight.garbage"})


@dataclass(frozen=True)
class InspectedModel:
    """The model that shall train: its state as a Checkpoint, and which names will not train."""

    model: Module
    state: Checkpoint
    frozen: frozenset[str]

    @cached_property
    def on_meta(self) -> tuple[str, ...]:
        """The keys without values."""
        tensors = self.model.state_dict(keep_vars=True)
        return tuple(key for key in self.state if tensors[key].is_meta)

    @cached_property
    def numbers(self) -> StateDictStats | None:
        """What the numbers of each tensor are, read once; None where any has no values."""
        return None if self.on_meta else stats(self.state)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Every name of every parameter."""
        return frozenset(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    def look(self, key: str) -> Look | None:
        """Return what the values under ``key`` look like, or None where they cannot be judged."""
        found = None if self.numbers is None else self.numbers.tensors[key].numbers
        if found is None or not found.count:
            return None
        home, _, _ = key.rpartition(".")
        try:
            module: Module | None = self.model.get_submodule(home)
        except AttributeError:
            module = None
        return looks_of(self.state[key], found, module)


def compare_init(subject: InspectedModel, result: StateDictDiff, init: Checkpoint) -> Init:
    """Return what a comparison with the initial checkpoint means for the model."""
    refused = {pair.key for pair in result.uncopyable}
    loaded = {pair.key for pair in result.matched} - refused
    for keys in tied_keys(subject.state.values()):
        if loaded.intersection(keys):
            loaded |= set(keys)
    shapes = {pair.key: list(pair.found.shape) for pair in result.shape_mismatched}
    kept = []
    for key, info in subject.state.items():
        if key not in loaded and key not in result.filled:
            why = f"it is {shapes[key]} in init" if key in shapes else "init does not have it"
            look = subject.look(key)
            kept.append(Kept(key, why, info.elements, "" if look is None else look.said))
    filled = [info for key, info in subject.state.items() if key in loaded]
    return Init(
        len(filled),
        len(subject.state),
        sum(info.elements for info in filled),
        sum(info.elements for info in subject.state.values()),
        coverage_by_module(subject.state.values(), loaded),
        tuple(kept),
        _in_model(subject, result, init),
    )


def _in_model(subject: InspectedModel, result: StateDictDiff, init: Checkpoint) -> str:
    """Tell whether the model has the values of init; those that are one number many times prove nothing."""
    if subject.numbers is None:
        return "unknown"
    live = subject.model.state_dict()
    refused = {pair.key for pair in result.uncopyable}
    same = {True: 0, False: 0}
    for pair in result.matched:
        found = subject.numbers.tensors[pair.key].numbers
        direct = pair.found.key in init and init[pair.found.key].shape == pair.found.shape
        if pair.key in refused or found is None or not direct or found.min == found.max:
            continue
        there = live[pair.key].detach().to("cpu").resolve_conj().resolve_neg()
        try:
            same[same_values(there, init.read(pair.found.key))] += 1
        except TypeError:  # a dtype that this torch does not have
            return "unknown"
    if not any(same.values()):
        return "unknown"
    return "part" if all(same.values()) else "all" if same[True] else "none"


def check_init(
    subject: InspectedModel, init: Init, result: StateDictDiff, fresh: str | Sequence[str]
) -> Iterator[Finding]:
    """Yield what is to be said of the initial checkpoint; ``fresh`` are patterns of keys that shall stay at init.

    Raises ``RuleError`` for a pattern that fits no key of the model.
    """
    patterns = _patterns(fresh, subject.state)
    if not init.loaded:
        hint = result.hints[0].message if result.hints else "compare the names: ckpt diff MODEL INIT"
        yield Finding("preflight.init-nothing", "error", "", "init fills no tensor of the model", hint)
        return
    by_key = {kept.key: kept for kept in init.kept}
    for pattern in patterns:
        filled = [key for key in subject.state if pattern.match(key) and key not in by_key]
        if filled:
            yield Finding(
                "preflight.not-fresh",
                "error",
                filled[0],
                f"{quoted(filled[0])} shall stay at init by fresh = {quoted(pattern.text)}, and init fills it",
                "drop it from init, or correct the pattern",
            )
    yield from _kept(subject, by_key, patterns)
    for pair in result.uncopyable:
        message = f"{quoted(pair.key)} is {pair.expected}, and {pair.found} in init, which torch does not copy"
        yield Finding("preflight.init-refused", "error", pair.key, message, "convert it first: ckpt convert")
    yield from _narrowed(result)
    if init.in_model == "none":
        yield Finding(
            "preflight.not-loaded",
            "note",
            "",
            "the model does not have the values of init yet",
            "load_into(model, init) loads them, and proves it",
        )
    elif init.in_model == "part":
        yield Finding(
            "preflight.partly-loaded",
            "warning",
            "",
            "the model has the values of init in some tensors and other ones elsewhere: it was loaded otherwise, or "
            "changed since",
            "load_into(model, init) loads all, and proves it",
        )


def _patterns(given: str | Sequence[str], state: Mapping[str, object]) -> list[Pattern]:
    patterns = [parse_pattern(text) for text in ([given] if isinstance(given, str) else given)]
    for pattern in patterns:
        if not any(map(pattern.match, state)):
            raise RuleError(
                f"fresh = {quoted(pattern.text)} fits none of {plural(len(state), 'key')} of the model",
                hint="a pattern fits whole keys: 'head.*'",
            )
    return patterns


def _kept(subject: InspectedModel, kept: Mapping[str, Kept], patterns: Sequence[Pattern]) -> Iterator[Finding]:
    def label(key: str) -> tuple[bool, bool, bool]:
        return key in kept, matches_any(patterns, key), key in subject.frozen

    for module, keys in group_by_module({key: label(key) for key in subject.state}):
        staying = [key for key in keys if key in kept]
        frozen = [key for key in staying if key in subject.frozen]
        if frozen:
            yield Finding(
                "preflight.frozen-at-init",
                "warning",
                frozen[0],
                f"{_counted(module, frozen, keys)} {'is' if len(frozen) == 1 else 'are'} not in init and frozen: "
                "what it was initialised with stays to the end",
                "unfreeze it, or rename the keys of init so that they fill it",
            )
        trains = [key for key in staying if key not in subject.frozen]
        wanted = [key for key in trains if matches_any(patterns, key)]
        severity: Severity = "note" if len(wanted) == len(trains) else "warning"
        if trains:
            why = f"{kept[trains[0]].why}"
            yield Finding(
                "preflight.kept",
                severity,
                trains[0],
                f"{_counted(module, trains, keys)} {'stays' if len(trains) == 1 else 'stay'} at init: {why}",
                "" if severity == "note" else f"where that is meant, say so: fresh = {_meant(module, trains)}",
            )


def _counted(module: str, some: Sequence[str], keys: Sequence[str]) -> str:
    if len(some) == 1:
        return quoted(some[0])
    return f"{plural(len(some), 'tensor')} of {quoted(module)}" if len(some) < len(keys) else f"all of {quoted(module)}"


def _meant(module: str, keys: Sequence[str]) -> str:
    return quoted(keys[0] if len(keys) == 1 else f"{module}.*")


def _narrowed(result: StateDictDiff) -> Iterator[Finding]:
    narrowed: dict[tuple[str, str], list[str]] = {}
    for pair in result.dtype_mismatched:
        if _loses(pair.found.dtype, pair.expected.dtype):
            narrowed.setdefault((pair.found.dtype, pair.expected.dtype), []).append(pair.key)
    for (found, expected), keys in narrowed.items():
        yield Finding(
            "preflight.init-cast",
            "warning",
            keys[0],
            f"{plural(len(keys), 'tensor')} of init {'is' if len(keys) == 1 else 'are'} {found} and become {expected} "
            f"in the model, which keeps fewer bits ({', '.join(map(quoted, keys[:_SHOWN]))})",
            "build the model in the dtype of init, and let autocast choose the one of the arithmetic",
        )


def _loses(found: str, expected: str) -> bool:
    wide, narrow = DTYPES.get(found), DTYPES.get(expected)
    if wide is None or narrow is None or {found, expected} == {"F16", "BF16"}:
        return wide is not None and narrow is not None
    return narrow.bits < wide.bits


def check_values(subject: InspectedModel, init: Init | None) -> Iterator[Finding]:
    """Yield tensors with NaN or infinity in them, and those that nothing was loaded into and that look like no init."""
    if subject.numbers is None:
        return
    kept = subject.state.keys() if init is None else {one.key for one in init.kept}
    for key, tensor in subject.numbers.tensors.items():
        numbers = tensor.numbers
        if numbers is None or tensor.same_as:
            continue
        bad = numbers.count - numbers.finite
        if bad:
            is_parameter = key in subject.parameters
            yield Finding(
                "preflight.not-finite",
                "error" if is_parameter else "warning" if numbers.nan else "note",
                key,
                f"{quoted(key)} has {numbers.nan:,} NaN and {bad - numbers.nan:,} infinite of "
                f"{plural(numbers.count, 'number')}",
                "initialise it again, or load what has its values" if is_parameter else "",
            )
        elif key in kept:
            look = subject.look(key)
            if look is not None and look.faulty and key in subject.parameters:
                yield _faulty(key, look)


def _faulty(key: str, look: Look) -> Finding:
    said = {
        "zero": "where that is no residual branch or adapter that shall begin as nothing, it was never initialised",
        "constant": "all its outputs are equal, and so are their gradients: they stay so",
        "garbage": "torch.empty and to_empty give memory as it lies there",
    }
    hint = "call the module's reset_parameters(), or load a checkpoint that has it"
    return Finding(f"preflight.{look.kind}", "warning", key, f"{quoted(key)} is {look.said}; {said[look.kind]}", hint)
