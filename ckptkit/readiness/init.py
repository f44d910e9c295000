"""Compare the model with its initial checkpoint, and check the values of the other tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from ckptkit.checks.at_init import module_of
from ckptkit.checks.fresh import Judgement, judge_values
from ckptkit.comparison import StateDictDiff, find_unmet_in, loaded_keys
from ckptkit.comparison.hints import joined_hint
from ckptkit.core.arguments import require_strings
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage import coverage_by_module, group_by_module, measure_coverage
from ckptkit.core.coverage.requirements import Requirements
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.findings import Code, Finding
from ckptkit.core.patterns import Pattern, drop_options, matches_any, parse_pattern
from ckptkit.core.text import listed, plural, printable, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.core.torch_bridge import named_of, same_values
from ckptkit.core.torch_types import Module
from ckptkit.errors import RuleError
from ckptkit.plans.quantized import QuantizedInputs, QuantizedProblem
from ckptkit.readiness import codes
from ckptkit.readiness.model import Init, InModel, Kept
from ckptkit.rules.model import KeyMap
from ckptkit.statistics.state_dict_stats import StateDictStats, stats

__all__ = [
    "UNLOADED",
    "InspectedModel",
    "check_init",
    "check_own_code",
    "check_quantized",
    "check_requirements",
    "check_values",
    "compare_init",
    "find_quantized_problems",
    "fresh_patterns",
    "tensors_of",
    "undecided_finding",
]

_SHOWN = 4
_CODES = {"zero": codes.ZERO, "constant": codes.CONSTANT, "garbage": codes.GARBAGE}
# The codes about tensors that a later load fills, so that the finding no longer applies.
UNLOADED = frozenset(code.name for code in _CODES.values())


@dataclass(frozen=True)
class InspectedModel:
    """The model that will train: its state as a Checkpoint, and the names that will not train."""

    model: Module
    state: Checkpoint
    frozen: frozenset[str]

    @cached_property
    def on_meta(self) -> tuple[str, ...]:
        """The keys of tensors without values."""
        values = self.model.state_dict(keep_vars=True)  # quantised layers of torch have tuples of tensors too
        return tuple(key for key, value in values.items() if key in self.state and value.is_meta)

    @cached_property
    def stats(self) -> StateDictStats | None:
        """The statistics of each tensor, read once; None where any tensor has no values."""
        return None if self.on_meta else stats(self.state)

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Every name of every parameter."""
        return frozenset(name for name, _ in named_of(self.model, "parameters"))

    def judgement(self, key: str) -> Judgement | None:
        """Return where the values of ``key`` probably come from, or None where the tensor has no values."""
        found = None if self.stats is None else self.stats.tensors[key].numbers
        return judge_values(self.state[key], found, module_of(self.model, key)) if found and found.count else None


def compare_init(
    inspected: InspectedModel, result: StateDictDiff, init: Checkpoint, problems: Sequence[QuantizedProblem] = ()
) -> Init:
    """Return which tensors the initial checkpoint fills; ``result`` compares the model with it.

    ``problems`` are the quantised weights that do not fit the model.
    """
    quantized = {key for problem in problems for key in problem.outs}
    refused = quantized.union(pair.key for pair in result.uncopyable)
    loaded = loaded_keys(result, quantized)
    shapes = {pair.key: list(pair.found.shape) for pair in result.shape_mismatched}
    kept = []
    for key, info in inspected.state.items():
        if key not in loaded and key not in result.filled:
            why = f"it has shape {shapes[key]} in init" if key in shapes else "init does not have it"
            why = "only one of the model and init has it quantised" if key in quantized else why
            judgement = inspected.judgement(key)
            kept.append(Kept(key, why, info.elements, "" if judgement is None else judgement.text))
    covered = measure_coverage(inspected.state, loaded)
    return Init(
        len(covered.filled),
        len(inspected.state),
        covered.filled_elements,
        covered.elements,
        coverage_by_module(inspected.state.values(), loaded),
        tuple(kept),
        _in_model(inspected, result, init, refused),
    )


def _in_model(inspected: InspectedModel, result: StateDictDiff, init: Checkpoint, refused: AbstractSet[str]) -> InModel:
    """Return whether the model has the values of init; a tensor with one value everywhere proves nothing."""
    if inspected.stats is None:
        return "unknown"
    counts = {True: 0, False: 0}
    for pair in result.matched:
        found = inspected.stats.tensors[pair.key].numbers
        is_direct = pair.found.key in init and init[pair.found.key].shape == pair.found.shape
        if pair.key in refused or found is None or not is_direct or found.min == found.max:
            continue
        try:
            counts[same_values(inspected.state.read(pair.key), init.read(pair.found.key))] += 1
        except TypeError:  # a dtype that this torch does not have
            return "unknown"
    if not any(counts.values()):
        return "unknown"
    return "part" if all(counts.values()) else "all" if counts[True] else "none"


def find_quantized_problems(
    state: Checkpoint, found: Checkpoint, key_map: KeyMap, role: str
) -> tuple[QuantizedProblem, ...]:
    """Return a problem for each weight that is quantised in only one of the model and ``found``, or differently.

    Messages call ``found`` by its ``role``.
    """
    inputs = QuantizedInputs({role: found}, state, where="the model")
    return tuple(inputs.overlay_problems(role, key_map.outputs()))


def check_quantized(problems: Sequence[QuantizedProblem], code: Code) -> Iterator[Finding]:
    """Yield one finding of this code about all the weights that are quantised on one side only, or differently."""
    if problems:
        first, others = problems[0], len(problems) - 1
        more = f" (and {plural(others, 'more weight')})" if others else ""
        keys = (problem.key for problem in problems)
        yield code.finding(first.key, f"{first.message}{more}", first.hint, keys=keys)


def check_requirements(
    result: StateDictDiff, requirements: Requirements, problems: Sequence[QuantizedProblem]
) -> Iterator[Finding]:
    """Yield a finding for each requirement that init does not meet.

    Raises ``RuleError`` for a pattern that matches no key of the model.
    """
    refused = frozenset(key for problem in problems for key in problem.outs)
    for unmet in find_unmet_in(result, requirements, refused, of="the model", source="init"):
        hint = joined_hint(result.hints) or "require less, or rename the keys of init with --rename"
        yield codes.REQUIRED.finding(unmet.keys[0], unmet.message, hint, keys=unmet.keys)


def check_init(
    inspected: InspectedModel,
    init: Init,
    result: StateDictDiff,
    opened: Checkpoint,
    patterns: Sequence[Pattern],
    *,
    untrained: AbstractSet[str],
) -> Iterator[Finding]:
    """Yield findings about the initial checkpoint ``opened``; ``patterns`` match the keys that must stay at init.

    ``untrained`` are keys for which init has values as those of a new model.
    """
    if not init.loaded:
        path = result.found_checkpoint.argument or "INIT"
        hint = joined_hint(result.hints) or f"compare the names: ckpt diff MODEL {path}"
        yield codes.INIT_NOTHING.finding("", "init fills no tensor of the model", hint)
        return
    by_key = {kept.key: kept for kept in init.kept}
    for pattern in patterns:
        filled = [key for key in inspected.state if pattern.match(key) and key not in by_key and key not in untrained]
        if filled:
            yield codes.NOT_FRESH.finding(
                filled[0],
                f"{listed(filled, _SHOWN)} must stay at init by --fresh {shell_word(pattern.text)}, but init has "
                f"values for {'it' if len(filled) == 1 else 'them'}",
                "if init has their new values, as after ckpt merge with a new head, leave the pattern out; else drop "
                "these keys of init with a rule (--drop)",
                keys=filled,
            )
    yield from _kept_findings(inspected, by_key, patterns)
    yield from _tie_findings(inspected, result, opened)
    for pair in result.uncopyable:
        message = f"{quoted(pair.key)} is {pair.expected}, and {pair.found} in init, which torch does not copy"
        path = result.found_checkpoint.argument or "INIT"
        hint = f"save it as a plain tensor, or leave it out: ckpt remap {path} -o OUT {drop_options([pair.key])}"
        yield codes.INIT_REFUSED.finding(pair.key, message, hint)
    yield from _cast_findings(result)
    if init.in_model == "none":
        message = "the model does not have the values of init yet"
        yield codes.NOT_LOADED.finding("", message, "load_into(model, init) loads the values and compares them")
    elif init.in_model == "part":
        yield codes.PARTLY_LOADED.finding(
            "",
            "the model has the values of init in some tensors only: other code loaded it, or its values changed after "
            "the load",
            "load_into(model, init) loads all tensors and compares them",
        )


def fresh_patterns(given: str | Sequence[str], state: Mapping[str, object]) -> list[Pattern]:
    """Return the patterns of the keys that must stay at init.

    Raises ``RuleError`` for a pattern that matches no key of the model.
    """
    texts = require_strings(given, "fresh", "a pattern or a list of patterns")
    patterns = list(map(parse_pattern, texts))
    for pattern in patterns:
        if not any(map(pattern.match, state)):
            raise RuleError(
                f"--fresh {shell_word(pattern.text)} matches none of {plural(len(state), 'key')} of the model",
                hint="a pattern must match the whole key: 'head.*'",
            )
    return patterns


def _kept_findings(
    inspected: InspectedModel, kept: Mapping[str, Kept], patterns: Sequence[Pattern]
) -> Iterator[Finding]:
    def label(key: str) -> tuple[bool, bool, bool]:
        return key in kept, matches_any(patterns, key), key in inspected.frozen

    for module, keys in group_by_module({key: label(key) for key in inspected.state}):
        staying = [key for key in keys if key in kept]
        frozen = [key for key in staying if key in inspected.frozen]
        if frozen:
            verb, pronoun = ("is", "it keeps its") if len(frozen) == 1 else ("are", "they keep their")
            yield codes.FROZEN_AT_INIT.finding(
                frozen[0],
                f"{tensors_of(module, frozen, keys)} {verb} frozen and not in init, so {pronoun} initial values",
                "unfreeze the tensors, or rename the keys of init so that they fill them",
                keys=frozen,
            )
        trains = [key for key in staying if key not in inspected.frozen]
        intended = [key for key in trains if matches_any(patterns, key)]
        if trains:
            is_note = len(intended) == len(trains)
            verb = "stays" if len(trains) == 1 else "stay"
            pattern = shell_word(trains[0] if len(trains) == 1 else f"{module}.*")
            embedding = next((found for key in trains if (found := _embedding_like(inspected, key)) not in kept), None)
            tie = f"if init ties it to {quoted(embedding)}, tie it in the model too; " if embedding else ""
            yield codes.KEPT.finding(
                trains[0],
                f"{tensors_of(module, trains, keys)} {verb} at init: {kept[trains[0]].why}",
                "" if is_note else f"{tie}if this is intended, give --fresh {pattern}",
                severity="note" if is_note else "warning",
                keys=trains,
            )


def _embedding_like(inspected: InspectedModel, key: str) -> str | None:
    """Return the weight of an embedding that has the shape of the linear weight ``key``, or None."""
    from torch.nn import Embedding, Linear

    path, _, leaf = key.rpartition(".")
    modules = dict(inspected.model.named_modules())
    if leaf != "weight" or not isinstance(modules.get(path), Linear):
        return None
    shape = inspected.state[key].shape
    names = (f"{name}.weight" for name, module in modules.items() if isinstance(module, Embedding))
    return next((name for name in names if name in inspected.state and inspected.state[name].shape == shape), None)


def _tie_findings(inspected: InspectedModel, result: StateDictDiff, opened: Checkpoint) -> Iterator[Finding]:
    """Yield a finding for tensors that train apart in the model, and are one tensor or equal in init."""
    found = {pair.key: pair.found for pair in result.matched if pair.key in inspected.parameters}
    first_of = {key: keys[0] for keys in tied_keys(inspected.state.values()) for key in keys}
    saved: dict[str, list[str]] = {}
    for key, info in found.items():
        saved.setdefault(info.key, []).append(key)
    groups = [[key for name in names for key in saved.get(name, ())] for names in tied_keys(found.values())]
    tied = {key for keys in groups for key in keys}
    pairs = [(key, embedding) for key in found if (embedding := _embedding_like(inspected, key)) is not None]
    equal = [
        [embedding, key]
        for key, embedding in pairs
        if embedding in found
        and not {key, embedding} <= tied
        and _are_equal(opened, found[key].key, found[embedding].key)
    ]
    for keys, how in [*((keys, "one tensor") for keys in groups), *((keys, "equal") for keys in equal)]:
        apart = list(dict.fromkeys(first_of.get(key, key) for key in keys))
        if len(apart) > 1 and not inspected.frozen.issuperset(apart):
            yield codes.TIE_LOST.finding(
                apart[-1],
                f"{listed(apart, _SHOWN)} are {how} in init, but separate parameters of the model, which train apart",
                "tie them after the load and before the optimizer is built, as by model.tie_weights()",
            )


def _are_equal(opened: Checkpoint, first: str, second: str) -> bool:
    if first not in opened or second not in opened or opened[first].shape != opened[second].shape:
        return False
    try:
        return same_values(opened.read(first), opened.read(second))
    except TypeError:  # a dtype that this torch does not have
        return False


def tensors_of(module: str, some: Sequence[str], keys: Sequence[str]) -> str:
    """Return words for ``some`` of the ``keys`` of a module."""
    if len(some) == 1:
        return quoted(some[0])
    return f"{plural(len(some), 'tensor')} of {quoted(module)}" if len(some) < len(keys) else f"all of {quoted(module)}"


def _cast_findings(result: StateDictDiff) -> Iterator[Finding]:
    narrowed: dict[tuple[str, str], list[str]] = {}
    for pair in result.dtype_mismatched:
        if _loses_bits(pair.found.dtype, pair.expected.dtype):
            narrowed.setdefault((pair.found.dtype, pair.expected.dtype), []).append(pair.key)
    for (found, expected), keys in narrowed.items():
        verbs = ("is", "becomes") if len(keys) == 1 else ("are", "become")
        yield codes.INIT_CAST.finding(
            keys[0],
            f"{plural(len(keys), 'tensor')} of init {verbs[0]} {found} and {verbs[1]} {expected} in the model, which "
            f"keeps fewer bits ({listed(keys, _SHOWN)})",
            "build the model in the dtype of init, and let autocast choose the dtype of the arithmetic",
            keys=keys,
        )


def _loses_bits(found: str, expected: str) -> bool:
    wide, narrow = DTYPES.get(found), DTYPES.get(expected)
    if wide is None or narrow is None:
        return False
    return {found, expected} == {"F16", "BF16"} or narrow.bits < wide.bits


def check_values(inspected: InspectedModel, init: Init | None) -> Iterator[Finding]:
    """Yield findings about NaN and Inf, and about unloaded tensors that do not have the values of an initialisation."""
    if inspected.stats is None:
        return
    kept = inspected.state.keys() if init is None else {entry.key for entry in init.kept}
    for key, tensor in inspected.stats.tensors.items():
        numbers = tensor.numbers
        if numbers is None or tensor.same_as:
            continue
        not_finite = numbers.count - numbers.finite
        if not_finite:
            is_parameter = key in inspected.parameters
            yield codes.NOT_FINITE.finding(
                key,
                f"{quoted(key)} has {numbers.nan:,} NaN and {not_finite - numbers.nan:,} infinite of "
                f"{plural(numbers.count, 'number')}",
                "initialise it again, or load its values" if is_parameter else "",
                severity="error" if is_parameter else "warning" if numbers.nan else "note",
            )
        elif key in kept:
            judgement = inspected.judgement(key)
            if judgement is not None and judgement.kind in _CODES and key in inspected.parameters:
                yield _value_finding(key, judgement)


def _value_finding(key: str, judgement: Judgement) -> Finding:
    reasons = {
        "zero": "it was never initialised, unless it is a residual branch or an adapter that must start at zero",
        "constant": "all its outputs and gradients are equal, so training keeps the values equal",
        "garbage": "torch.empty() and to_empty() do not initialise memory",
    }
    hint = "call reset_parameters() of the module, or load a checkpoint that has the tensor"
    return _CODES[judgement.kind].finding(key, f"{quoted(key)} is {judgement.text}; {reasons[judgement.kind]}", hint)


def check_own_code(result: StateDictDiff) -> Iterator[Finding]:
    """Yield what the model's own code for loading says about init: why it refuses init, or why it was not tried."""
    for refusal in result.refusals:
        yield codes.REFUSED.finding("", f"load_state_dict refuses init: {printable(refusal)}")
    if result.undecided:
        yield undecided_finding(result)


def undecided_finding(result: StateDictDiff) -> Finding:
    """Return the note that names decided, and why."""
    reason = f"names decided: the model's own code for loading was not tried, because {result.undecided}"
    return codes.UNDECIDED.finding("", reason)
