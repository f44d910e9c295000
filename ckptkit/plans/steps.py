"""Make the steps of plans, and refuse tensors that cannot be copied, cast or computed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import UNINITIALISED, Checkpoint, Entry, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.core.patterns import drop_options, literal
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import printable, quoted, shell_word
from ckptkit.core.torch_bridge import ABSENT, CASTABLE
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.plan.step import Dropped, Source, Step
from ckptkit.quantized import quantized_weights
from ckptkit.rules.model import Derivation, describe_output

if TYPE_CHECKING:  # a plan without operations does not import them
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = [
    "check_steps",
    "complete_step",
    "describe_step",
    "dropped_entries",
    "dropped_sources",
    "entries_to_drop",
    "equal_of",
    "make_step",
    "make_steps",
    "moved_modules",
    "refuse_ambiguous",
    "refuse_suspicious",
    "refuse_unread",
    "role_to_edit",
    "without_unread",
]

_MOST_UNREAD = 8
_WHY_NOT = {
    "meta": "it was saved from the meta device and has no values",
    UNINITIALISED: "it is uninitialised, and one forward pass makes it",
    "unknown": "its dtype is not known",
    "unread": "only the code of its class can rebuild it",
    "converted": "it is stored with another dtype than it has, and torch would cast it",
    "two-type": "its storage is named with two types, and torch loads one of them for all its tensors",
    "subclass": "it is a tensor subclass, and only the code of its class can rebuild it",
    "dtensor": "it is a DTensor, and the file holds only the piece of one rank",
    "sharded": "it is a ShardedTensor, and the file holds only the shards of one rank",
}
_CLASS_ENDINGS = ("Tensor", "Parameter")  # of a name that stands for the unknown dtype
_WAYS_OUT = dict.fromkeys(
    ("dtensor", "sharded"), "give the path of the directory with the files of all ranks, which are joined"
)


def make_step(out: TensorInfo, derivation: Derivation, role: str, checkpoint: Checkpoint) -> Step:
    """Return the step that makes ``out`` from tensors of one input: copied, computed or cast.

    Raises ``PlanError`` where a tensor cannot be copied or cast, and ``RuleError`` where an operation does not accept
    the tensors.
    """
    sources, equals = (tuple([Source(role, key) for key in keys]) for keys in (derivation.sources, derivation.equals))
    step = Step(out, sources, rule=derivation.rule, recipe=derivation.recipe, equals=equals)
    return complete_step(step, {role: checkpoint})


def make_steps(
    outs: Mapping[str, TensorInfo], outputs: Mapping[str, Derivation], role: str, checkpoint: Checkpoint
) -> list[Step]:
    """Return the step of each tensor in ``outs``, as ``make_step`` does; ``outputs`` has the derivations."""
    infos = _infos_of_copies(checkpoint)
    steps: list[Step] = []
    for key, out in outs.items():
        derivation = outputs[key]
        found = infos.get(derivation.sources[0])
        if derivation.recipe is None and not derivation.equals and _is_unchanged(found, out):
            steps.append(Step(out, (Source(role, derivation.sources[0]),), rule=derivation.rule))
        else:
            steps.append(make_step(out, derivation, role, checkpoint))
    return steps


def _infos_of_copies(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Return the tensors that can be copied under their keys without a further check; no tensors in case of doubt."""
    return {} if checkpoint.ambiguous else dict(checkpoint.items())


def _is_unchanged(found: TensorInfo | None, out: TensorInfo) -> bool:
    """Return whether a plain copy of ``found`` is ``out``, as for nearly every step of a large plan."""
    return (
        found is not None
        and found.kind == out.kind == "dense"
        and found.dtype == out.dtype
        and found.shape == out.shape
        and found.view == out.view
    )


def refuse_unread(keys: Iterable[str], checkpoint: Checkpoint) -> None:
    """Raise ``PlanError`` with every tensor that is listed without its values, and therefore cannot be copied."""
    if all(info.kind == "dense" for info in checkpoint.values()):
        return
    unread = [info for key in keys if (info := checkpoint[key]).kind != "dense"]
    if not unread:
        return
    first = unread[0]
    weights = quantized_weights(checkpoint).by_key
    reasons = []
    for info in unread[: _MOST_UNREAD + 1]:
        weight = weights.get(info.key)
        reasons.append(_why_not(info) if weight is None else f"it is quantised ({weight.scheme})")
    message = f"{quoted(first.key)} cannot be copied: {reasons[0]}"
    if len(unread) > 1:
        named = [f"{quoted(info.key)} ({reason})" for info, reason in zip(unread, reasons, strict=False)]
        others = f" and {len(unread) - _MOST_UNREAD:,} more" if len(unread) > _MOST_UNREAD else ""
        message = f"{len(unread):,} tensors cannot be copied: {', '.join(named[:_MOST_UNREAD])}{others}"
    hint = f"--skip-unread leaves out all such tensors; or leave out this one: {_drop_command(first.key, checkpoint)}"
    if (weight := weights.get(first.key)) is not None:
        hint = f"{weight.ways_out}; or {hint}"
    raise PlanError(message, hint=_WAYS_OUT.get(first.kind, hint))


def _drop_command(key: str, checkpoint: Checkpoint) -> str:
    """Return the command that leaves a tensor out of a copy of the checkpoint."""
    path = CheckpointSummary.of(checkpoint, ()).argument or "PATH"
    return f"ckpt remap {path} -o OUT {drop_options([key])}"


def _why_not(info: TensorInfo) -> str:
    if info.kind == "unknown" and info.dtype.endswith(_CLASS_ENDINGS):
        return f"a call of {printable(info.dtype)} makes it, and the file has no storage with its bytes"
    return _WHY_NOT.get(info.kind, f"it is a {info.kind} tensor")


def without_unread(checkpoint: Checkpoint, role: str, filled: Collection[str] = ()) -> tuple[Checkpoint, list[Dropped]]:
    """Return a checkpoint without the tensors that cannot be copied, and a ``Dropped`` for each of these.

    A tensor at a key in ``filled`` gets its values from elsewhere, and stays.
    """
    unread = [info for info in checkpoint.values() if info.kind != "dense" and info.key not in filled]
    dropped = [Dropped(role, info.key, _why_not(info)) for info in unread]
    return checkpoint.without({info.key for info in unread}) if unread else checkpoint, dropped


def complete_step(step: Step, roles: Mapping[str, Checkpoint]) -> Step:
    """Return the step with its operation named, after a check against the inputs, which ``roles`` maps by role.

    Raises ``PlanError`` where a tensor cannot be copied or cast, and ``RuleError`` where the recipe does not accept
    the tensors.
    """
    found = describe_step(step, roles)
    casts = step.out.dtype != found.dtype
    if step.recipe is None and not casts and step.is_copy and step.operation == "copy":
        return _in_place(step, found)
    operation, is_cast = _operation(step.recipe, casts=casts), _ends_with_cast(step.recipe, casts=casts)
    placed = _in_place(step, found)
    if (operation, is_cast) == (placed.operation, placed.is_cast):
        return placed
    return replace(placed, operation=operation, is_cast=is_cast)


def describe_step(step: Step, roles: Mapping[str, Checkpoint]) -> TensorInfo:
    """Return the description of the step's tensor before its last cast, under the keys of its sources.

    Raises ``PlanError`` where an input lacks a source, and where a tensor cannot be copied or cast. It is also raised
    where the tensor would have another shape than the step says. Raises ``RuleError`` where the recipe does not accept
    the tensors.
    """
    out, sources = step.out, step.sources
    first = _find(sources[0], roles)
    is_plain = step.recipe is None and not step.equals and first.kind == "dense"
    is_plain = is_plain and first.dtype == out.dtype and first.shape == out.shape
    if is_plain and not roles[sources[0].role].ambiguous:
        return first  # most steps are such copies, and are described before and while the output is written
    infos = [_find(source, roles) for source in sources]
    for source in sources:
        if source.key == out.key and roles[source.role].ambiguous:
            refuse_ambiguous(roles[source.role], [source.key])
    found = describe_output(out.key, infos, step.recipe, step.rule)
    if found.kind != "dense":
        refuse_unread([sources[0].key], roles[sources[0].role])
    if out.dtype != found.dtype:
        _refuse_cast(found, out.dtype, f"leave it out: {_drop_command(sources[0].key, roles[sources[0].role])}")
    for source in step.equals:
        other, wanted = _find(source, roles), _find(equal_of(step, source), roles)
        if (other.dtype, other.shape) != (wanted.dtype, wanted.shape):
            raise PlanError(f"{quoted(source.key)} is {other} and cannot equal {quoted(wanted.key)}")
    if found.shape != out.shape:
        raise PlanError(f"{quoted(out.key)} would be {list(found.shape)}, and is {list(out.shape)} in the plan")
    return found


def equal_of(step: Step, source: Source) -> Source:
    """Return the source of a step that one of ``equals`` must equal: of the same input, else the first."""
    return next((one for one in step.sources if one.role == source.role), step.sources[0])


def _find(source: Source, roles: Mapping[str, Checkpoint]) -> TensorInfo:
    try:
        return roles[source.role][source.key]
    except KeyError:
        if source.role in roles:
            message = f"{quoted(source.key)} is not in the {source.role}"
            raise PlanError(message, path=roles[source.role].path) from None
    raise PlanError(f"the plan reads {quoted(source.key)} of {quoted(source.role)}, which was not given")


def check_steps(steps: Iterable[Step], roles: Mapping[str, Checkpoint]) -> list[Step]:
    """Return the steps with the views that their tensors have in these inputs, which ``roles`` maps by role.

    The steps may come from a file, from another input of the same tensors, or may have been edited. Raises
    ``PlanError`` unless the steps fit the inputs and agree with themselves. Two steps must not make one key, and a step
    must name what it does: its operations, and a cast where its dtype differs.
    """
    keys: set[str] = set()
    checked: list[Step] = []
    infos = {role: _infos_of_copies(checkpoint) for role, checkpoint in roles.items()}
    for step in steps:
        key = step.out.key
        if key in keys:
            raise PlanError(f"the plan writes two tensors with the same key, {quoted(key)}")
        keys.add(key)
        source = step.sources[0]
        is_copy = step.is_copy and step.operation == "copy" and not step.equals and source.role in infos
        if is_copy and _is_unchanged(infos[source.role].get(source.key), step.out):
            checked.append(step)
            continue
        try:
            found = describe_step(step, roles)
        except RuleError as error:
            raise PlanError(f"the plan cannot make {quoted(key)}: {error.reason}", hint=error.hint) from None
        casts = found.dtype != step.out.dtype
        if casts and not step.is_cast:
            hint = 'for a cast, set operation="cast" and is_cast=True' if step.recipe is None else None
            raise PlanError(f"{quoted(key)} would be {found.dtype}, and is {step.out.dtype} in the plan", hint=hint)
        operation = _operation(step.recipe, casts=casts)
        if operation != step.operation or step.is_cast != _ends_with_cast(step.recipe, casts=casts):
            named = f"{quoted(step.operation)} with is_cast={step.is_cast}"
            raise PlanError(f"the operation of {quoted(key)} is {quoted(operation)}, and the plan has {named}")
        checked.append(_in_place(step, found))
    return checked


def _in_place(step: Step, found: TensorInfo) -> Step:
    """Return the step with the view of its tensor in the input, which no plan can know of another input."""
    is_same = step.out.view == found.view and step.out.kind == "dense"
    return step if is_same else replace(step, out=replace(step.out, view=found.view, kind="dense"))


def _ends_with_cast(recipe: Recipe | None, *, casts: bool) -> bool:
    return casts or (recipe is not None and recipe.operations[-1].name == "cast")


def _operation(recipe: Recipe | None, *, casts: bool) -> str:
    if recipe is None:
        return "cast" if casts else "copy"
    return ", ".join([recipe.outline(), *(["cast"] if casts else [])])


def _refuse_cast(found: TensorInfo, dtype: str, hint: str) -> None:
    if not {dtype, found.dtype} <= CASTABLE:
        raise PlanError(f"{quoted(found.key)} is {found.dtype}, which cannot be cast to {dtype}", hint=hint)
    if DTYPES[found.dtype].parts > DTYPES[dtype].parts:
        raise PlanError(
            f"{quoted(found.key)} is {found.dtype}, and a cast to {dtype} would lose its imaginary part", hint=hint
        )


def refuse_suspicious(checkpoint: Checkpoint, role: str) -> None:
    """Raise ``PlanError`` where an input refers to code that no checkpoint needs."""
    if checkpoint.suspicious:
        raise PlanError(
            f"the {role} refers to code that no checkpoint needs ({printable(checkpoint.references[0])}); "
            "the code was not run, and no output is made from this file",
            hint="get the weights from a source that you trust",
            path=checkpoint.path,
        )


def refuse_ambiguous(checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Raise ``PlanError`` where the file has no unambiguous name for one of the keys."""
    ambiguous = checkpoint.ambiguous
    key = next((key for key in keys if key in ambiguous), None) if ambiguous else None
    if key is None:
        return
    dotted = ambiguous[key]
    others = [dotted] if dotted in checkpoint and dotted not in ambiguous else []
    others += [other for other, name in ambiguous.items() if name == dotted and other != key]
    raise PlanError(
        f"{quoted(others[0])} and {quoted(key)} would both be called {quoted(dotted)}"
        if others
        else f"the file has no unambiguous name for {quoted(key)}",
        hint=f"{drop_options([key])} leaves it out, or --rename {shell_word(f'{literal(key)}=NEW')} gives it a name",
        path=checkpoint.path,
    )


def dropped_sources(role: str, name: str, derivation: Derivation, reason: str, wanted: str = "") -> list[Dropped]:
    """Return a ``Dropped`` for each source of the output tensor ``name``, which the output leaves out."""
    if derivation.recipe is not None:
        reason = f"made into {quoted(name)}: {reason}"
    return [Dropped(role, key, reason, wanted) for key in dict.fromkeys(derivation.sources)]


def dropped_entries(checkpoint: Checkpoint, role: str) -> list[Dropped]:
    """Return a ``Dropped`` for each entry of an input that is not a tensor."""
    return [Dropped(role, entry.path, _entry_reason(entry), is_entry=True) for entry in entries_to_drop(checkpoint)]


def entries_to_drop(checkpoint: Checkpoint) -> list[Entry]:
    """Return the entries that are not tensors, but for those that say nothing more than the rest of the checkpoint."""
    return [
        entry
        for entry in checkpoint.entries
        if entry.type != ABSENT and not (entry.path == "_metadata" and checkpoint.versions)
    ]


def _entry_reason(entry: Entry) -> str:
    inside = "weight" if entry.type == "tensor" else "tensor"
    where = "beside the state_dict" if entry.is_outside else f"in the state_dict, and not a {inside}"
    return f"{where} ({printable(entry.type)})"


def role_to_edit(checkpoint: Checkpoint, role: str) -> str:
    """Return ``role`` where the output can be an edited copy of the input's file, else the empty string."""
    return role if checkpoint.container is not None else ""


def moved_modules(modules: Iterable[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the new prefix of each module, from the old and new keys of the tensors.

    A module is left out where its tensors move to different modules. A module without own tensors moves with the
    tensors below it, if these move to one module.
    """
    modules = list(modules)
    if not modules or all(old == new for old, new in renamed.items()):
        return {module: module for module in modules}
    targets: dict[str, set[str | None]] = {}
    for old, new in renamed.items():
        module, _, leaf = old.rpartition(".")
        targets.setdefault(module, set()).add(_prefix_of(new, leaf))
    containers = {module for module in modules if module not in targets}
    for old, new in renamed.items():
        above, _, _ = old.rpartition(".")
        while above:
            above, _, _ = above.rpartition(".")
            if above in containers:
                targets.setdefault(above, set()).add(_prefix_of(new, old[len(above) + 1 :] if above else old))
    moved = {module: prefix for module, (prefix, *others) in targets.items() if not others and prefix is not None}
    return {module: moved[module] for module in modules if module in moved}


def _prefix_of(key: str, suffix: str) -> str | None:
    """Return ``key`` without ``.suffix`` at its end, which is the prefix of a module, or None without this end."""
    if key == suffix:
        return ""
    return key[: -len(suffix) - 1] if key.endswith(f".{suffix}") else None
