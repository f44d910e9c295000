"""Plans: every decision about an output, made from headers alone; carrying one out decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptkit.compare import StateDictDiff, compare
from ckptkit.errors import PlanError
from ckptkit.rules import KeyMap, Rules, apply_rules, as_rules
from ckptkit.tensors import DTYPES, Checkpoint, Entry, TensorInfo, overlapping, tied
from ckptkit.text import plural, printable, quoted
from ckptkit.torch_bridge import ABSENT, CASTABLE, StateDictLike, as_checkpoint

__all__ = [
    "ON_MISMATCH",
    "ON_MISSING",
    "ON_UNEXPECTED",
    "TIED",
    "Dropped",
    "Plan",
    "Source",
    "Step",
    "plan_merge",
    "plan_remap",
]

TIED = "tied to "  # begins the rule of a step that follows a tie of the base
ON_MISSING = ("keep", "error")
ON_UNEXPECTED = ("skip", "add", "error")
ON_MISMATCH = ("error", "skip")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a step takes its tensor: which input, by role, and the key it has there."""

    role: str
    key: str


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor of the output: what it will be, from what, by which operation and rule.

    Further sources are tensors that a rule says have the same bytes as the first; ``execute`` proves it.
    """

    out: TensorInfo
    sources: tuple[Source, ...]
    operation: str = "copy"
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Something of an input that the output will not have, and why.

    ``wanted`` is the key of the base that it would have filled, where its shape is the reason. ``entry`` says
    that it is no tensor of the mapping taken, but something else that the input holds.
    """

    role: str
    key: str
    reason: str
    wanted: str = ""
    entry: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of an output in order, what is left out, and the metadata it will carry."""

    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)  # of modules, by prefix; torch files carry them

    @property
    def elements(self) -> int:
        """Number of elements in the output."""
        return sum(step.out.elements for step in self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the output."""
        return sum(step.out.nbytes for step in self.steps)


def plan_remap(source: StateDictLike, rules: Rules | list[str] | None = None, *, dtype: str | None = None) -> Plan:
    """Return the plan that renames and filters the tensors of ``source``, and casts floats to ``dtype`` if given.

    ``dtype`` is a safetensors code or torch's name (``BF16``, ``bfloat16``); integers and booleans keep
    theirs. Raises ``RuleError`` where rules collide or match nothing, ``PlanError`` where nothing would be
    left, a tensor cannot be copied, or the file refers to code that looks malicious.
    """
    checkpoint = as_checkpoint(source, "source")
    _refuse_suspicious(checkpoint, "source")
    key_map = apply_rules(as_rules(rules), checkpoint)
    wanted = None if dtype is None else _float_dtype(dtype)
    steps = []
    for old, new in key_map.renamed.items():
        info = checkpoint[old]
        out = replace(info, key=new, dtype=wanted if wanted and _is_float(info.dtype) else info.dtype)
        step = _step(out, info, Source("source", old), key_map.rule_of.get(old, ""))
        steps.append(_with_equals(step, checkpoint, key_map))
    if not steps:
        raise PlanError(f"nothing would be left of {plural(len(checkpoint), 'tensor')}")
    dropped = [Dropped("source", key, reason) for key, reason in key_map.dropped.items()]
    dropped += _dropped_entries(checkpoint, "source")
    versions = _carried(checkpoint.versions, key_map.renamed)
    return Plan(tuple(steps), tuple(dropped), checkpoint.metadata, key_map.notes, versions)


def _carried(versions: Mapping[str, int], renamed: Mapping[str, str]) -> dict[str, int]:
    """Return module versions under the modules' new names; a module whose tensors part ways has none."""
    if all(old == new for old, new in renamed.items()):
        return dict(versions)
    homes: dict[str, set[str]] = {}
    for old, new in renamed.items():
        (home, _, leaf), (new_home, _, new_leaf) = old.rpartition("."), new.rpartition(".")
        homes.setdefault(home, set()).add(new_home if leaf == new_leaf else "*")
    moved = {home: new for home, (new, *others) in homes.items() if not others and new != "*"}
    return {moved[home]: version for home, version in versions.items() if home in moved}


def plan_merge(
    base: StateDictLike,
    donors: StateDictLike | Sequence[StateDictLike],
    rules: Rules | list[str] | None = None,
    *,
    on_missing: str = "keep",
    on_unexpected: str = "skip",
    on_mismatch: str = "error",
) -> Plan:
    """Return the plan of an overlay: the keys of ``base``, with the donors' values where key and shape agree.

    ``rules`` rename and filter the donors' keys first; of several donors the last that has a key wins.
    Values of another dtype are cast to the base's. ``on_missing`` (``keep``, ``error``): a base key that no
    donor has. ``on_unexpected`` (``skip``, ``add``, ``error``): a donor key that the base does not have.
    ``on_mismatch`` (``error``, ``skip``): another shape. Raises ``PlanError`` where a policy says so, or
    nothing matches at all.
    """
    policy = _Policy(on_unexpected, on_mismatch)
    _check_choice("on_missing", on_missing, ON_MISSING)
    _check_choice("on_unexpected", on_unexpected, ON_UNEXPECTED)
    _check_choice("on_mismatch", on_mismatch, ON_MISMATCH)
    base = as_checkpoint(base, "base")
    _refuse_suspicious(base, "base")
    given = list(donors) if isinstance(donors, Sequence) else [donors]
    if not given:
        raise PlanError("there is no donor to take values from")
    overlays = []
    for number, thing in enumerate(given, start=1):
        role = "donor" if len(given) == 1 else f"donor{number}"
        overlays.append(_overlay(base, as_checkpoint(thing, role), role, as_rules(rules), policy))
    taken = {key: step for overlay in overlays for key, step in overlay.taken.items()}
    added = {key: step for overlay in overlays for key, step in overlay.added.items()}
    taken, notes = _follow_ties(base, taken)
    present = taken.keys() | {key for overlay in overlays for key in overlay.mismatched}
    missing = [key for key in base if key not in present]
    if missing and on_missing == "error":
        raise PlanError(
            f"no donor has {quoted(missing[0])}{_and_more(len(missing) - 1)}",
            hint="--on-missing keep keeps the base's own values",
        )
    steps = [taken.get(key) or _kept(info) for key, info in base.items()]
    dropped = [*_dropped_entries(base, "base"), *(drop for overlay in overlays for drop in overlay.dropped)]
    dropped += _replaced(overlays, taken | added)
    notes += [note for overlay in overlays for note in overlay.notes]
    return Plan((*steps, *added.values()), tuple(dropped), base.metadata, tuple(notes), base.versions)


def _follow_ties(base: Checkpoint, taken: Mapping[str, Step]) -> tuple[dict[str, Step], list[str]]:
    """Return the steps with every key that the base ties to a taken one taken with it, and what remains in doubt.

    A model that loads the output writes both names into one memory, the last one over the others.
    """
    made, notes = dict(taken), []
    for keys in tied(base.values()):
        leader = next((key for key in keys if key in taken), None)
        if leader is None:
            continue
        for key in keys:
            if key not in taken:
                out = replace(taken[leader].out, key=key)
                made[key] = replace(taken[leader], out=out, rule=f"{TIED}{quoted(leader)}")
            elif key != leader and (made[key].out.view is None or made[key].out.view != made[leader].out.view):
                notes.append(
                    f"{quoted(leader)} and {quoted(key)} are one tensor in the base, and two where they come from"
                )
    return made, notes


@dataclass(frozen=True, slots=True)
class _Policy:
    on_unexpected: str
    on_mismatch: str


@dataclass(frozen=True, slots=True)
class _Overlay:
    """What one donor brings."""

    taken: Mapping[str, Step]
    added: Mapping[str, Step]
    mismatched: Sequence[str]
    dropped: Sequence[Dropped]
    notes: Sequence[str]


def _overlay(base: Checkpoint, donor: Checkpoint, role: str, rules: Rules, policy: _Policy) -> _Overlay:
    _refuse_suspicious(donor, role)
    key_map = apply_rules(rules, donor)
    result = compare(base, donor, key_map)
    if result.shape_mismatched and policy.on_mismatch == "error":
        raise _mismatch_error(result, role)
    if not result.matched and base and not (result.unexpected and policy.on_unexpected == "add"):
        raise _no_match_error(result, role)
    if result.unexpected and policy.on_unexpected == "error":
        raise PlanError(
            f"the base has no {quoted(result.unexpected[0].key)}{_and_more(len(result.unexpected) - 1)}",
            hint="--on-unexpected skip leaves them out, add takes them over",
        )
    taken, added = {}, {}
    for pair in result.matched:
        source = Source(role, pair.found.key)
        step = _step(pair.expected, pair.found, source, key_map.rule_of.get(pair.found.key, ""))
        taken[pair.key] = _with_equals(step, donor, key_map)
    dropped = [Dropped(role, key, reason) for key, reason in key_map.dropped.items()]
    dropped += [
        Dropped(
            role, pair.found.key, f"shape {list(pair.found.shape)} does not fit {list(pair.expected.shape)}", pair.key
        )
        for pair in result.shape_mismatched
    ]
    if policy.on_unexpected == "skip":
        dropped += [Dropped(role, info.key, "the base does not have it") for info in result.unexpected]
    else:
        for info in result.unexpected:
            out = replace(info, key=key_map.renamed[info.key])
            step = _step(out, info, Source(role, info.key), key_map.rule_of.get(info.key, ""))
            added[out.key] = _with_equals(step, donor, key_map)
    dropped += _dropped_entries(donor, role)
    return _Overlay(taken, added, [pair.key for pair in result.shape_mismatched], dropped, key_map.notes)


def _replaced(overlays: Sequence[_Overlay], final: Mapping[str, Step]) -> list[Dropped]:
    """Return what an earlier donor has and a later one has too."""
    steps = [step for overlay in overlays for step in (*overlay.taken.values(), *overlay.added.values())]
    return [
        Dropped(step.sources[0].role, step.sources[0].key, f"{last} has it too, and comes later")
        for step in steps
        if (last := final[step.out.key].sources[0].role) != step.sources[0].role
    ]


def _and_more(count: int) -> str:
    return f" and {count} more" if count else ""


def _mismatch_error(result: StateDictDiff, role: str) -> PlanError:
    first, others = result.shape_mismatched[0], len(result.shape_mismatched) - 1
    wanted, given = list(first.expected.shape), list(first.found.shape)
    more = f", and {others} more differ in shape" if others else ""
    return PlanError(
        f"{quoted(first.key)} is {wanted} in the base and {given} in the {role}{more}",
        hint="--on-mismatch skip keeps the base's values there",
    )


def _kept(info: TensorInfo) -> Step:
    return _step(info, info, Source("base", info.key), "")


def _step(out: TensorInfo, found: TensorInfo, source: Source, rule: str) -> Step:
    """Return the step that makes ``out`` of ``found``: its bytes as they are, or cast to another dtype."""
    leave_out = f"leave it out: --drop {quoted(found.key)}"
    if found.kind != "dense":
        why = _WHY_NOT.get(found.kind, f"it is a {found.kind} tensor")
        raise PlanError(f"{quoted(found.key)} cannot be copied: {why}", hint=leave_out)
    if out.dtype == found.dtype:
        return Step(replace(out, view=found.view), (source,), "copy", rule)
    if not {out.dtype, found.dtype} <= CASTABLE:
        raise PlanError(f"{quoted(found.key)} is {found.dtype}, which cannot be cast to {out.dtype}", hint=leave_out)
    if DTYPES[found.dtype].parts > DTYPES[out.dtype].parts:
        raise PlanError(
            f"{quoted(found.key)} is {found.dtype}, and a cast to {out.dtype} would lose its imaginary part",
            hint=leave_out,
        )
    return Step(replace(out, view=found.view), (source,), "cast", rule)


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"{name} is {value!r}", hint=f"it is one of {', '.join(known)}")


def _with_equals(step: Step, checkpoint: Checkpoint, key_map: KeyMap) -> Step:
    """Return the step with the tensors that have to equal its own, as a rule promised, among its sources."""
    source = step.sources[0]
    others = key_map.equals.get(source.key, ())
    for key in others:
        if (checkpoint[key].dtype, checkpoint[key].shape) != (
            checkpoint[source.key].dtype,
            checkpoint[source.key].shape,
        ):
            raise PlanError(f"{quoted(key)} is {checkpoint[key]} and cannot equal {quoted(source.key)}")
    return replace(step, sources=(source, *(Source(source.role, key) for key in others))) if others else step


def _is_float(code: str) -> bool:
    return code.startswith(("F", "BF"))


def _float_dtype(name: str) -> str:
    for dtype in DTYPES.values():
        if name.upper() == dtype.code or name.removeprefix("torch.") == dtype.torch_name:
            if _is_float(dtype.code) and dtype.code in CASTABLE:
                return dtype.code
            raise PlanError(f"{dtype.code} is not a dtype that floating-point tensors can be cast to")
    raise PlanError(f"unknown dtype {quoted(name)}", hint="for example F32, F16, BF16, or torch's names of them")


def _refuse_suspicious(checkpoint: Checkpoint, role: str) -> None:
    if checkpoint.suspicious:
        raise PlanError(
            f"the {role} asks for code that no checkpoint needs ({printable(checkpoint.references[0])}); "
            "not run, and nothing is made from it",
            hint="get the weights from a source that you trust",
            path=checkpoint.path,
        )


_WHY_NOT = {
    "ambiguous": "two tensors would have this name when written flat",
    "meta": "it has no values: it was saved from the meta device",
    "subclass": "it is a tensor subclass, whose parts only its own code can put together",
}


def _dropped_entries(checkpoint: Checkpoint, role: str) -> list[Dropped]:
    return [
        Dropped(role, entry.path, _entry_reason(entry), entry=True)
        for entry in checkpoint.entries
        if entry.type != ABSENT and not (entry.path == "_metadata" and checkpoint.versions)
    ]


def _entry_reason(entry: Entry) -> str:
    where = "beside the state_dict" if entry.outside else "in the state_dict, and no tensor"
    return f"{where} ({printable(entry.type)})"


def _no_match_error(result: StateDictDiff, role: str) -> PlanError:
    hint = result.hints[0].message if result.hints else f"compare the names: ckpt diff BASE {role.upper()}"
    return PlanError(f"no key and shape of the base is in the {role}, so there is nothing to merge", hint=hint)


def ties_broken(plan: Plan) -> list[tuple[str, ...]]:
    """Return the keys of each group of outputs that share memory in their source, and would not in a flat file."""
    by_role: dict[str, list[TensorInfo]] = {}
    by_source: dict[Source, list[str]] = {}
    for step in plan.steps:
        by_role.setdefault(step.sources[0].role, []).append(step.out)
        by_source.setdefault(step.sources[0], []).append(step.out.key)
    groups = [tuple(info.key for info in group) for infos in by_role.values() for group in overlapping(infos)]
    known = {key for group in groups for key in group}
    return groups + [tuple(keys) for keys in by_source.values() if len(keys) > 1 and keys[0] not in known]
