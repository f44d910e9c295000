"""From one tensor of an input to one step of a plan: copied, cast, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckptkit.core.checkpoint import DTYPES, Checkpoint, Entry, TensorInfo
from ckptkit.core.patterns import literal
from ckptkit.core.text import printable, quoted, shell_word
from ckptkit.core.torch_bridge import ABSENT, CASTABLE, dtype_code
from ckptkit.errors import PlanError
from ckptkit.plans.plan import Dropped, Source, Step
from ckptkit.rules.model import Derivation, describe_output

__all__ = [
    "complete_step",
    "dropped_entries",
    "dropped_sources",
    "float_dtype",
    "is_float",
    "make_step",
    "moved_modules",
    "refuse_ambiguous",
    "refuse_suspicious",
    "role_to_edit",
]

_WHY_NOT = {
    "meta": "it has no values: it was saved from the meta device",
    "unknown": "nothing is known here of its dtype",
    "subclass": "it is a tensor subclass, whose parts only its own code can put together",
}


def make_step(out: TensorInfo, how: Derivation, role: str, checkpoint: Checkpoint) -> Step:
    """Return the step that makes ``out`` of the tensors of an input, as rules say: copied, operated on, or cast.

    Raises ``PlanError`` where a tensor cannot be copied or cast, ``RuleError`` where an operation does not fit.
    """
    sources, equals = (tuple(Source(role, key) for key in keys) for keys in (how.sources, how.equals))
    return complete_step(Step(out, sources, "", how.rule, how.recipe, equals), {role: checkpoint})


def complete_step(step: Step, roles: Mapping[str, Checkpoint]) -> Step:
    """Return the step, checked against the inputs that it reads, by role, and with its operation told.

    Raises ``PlanError`` where a tensor cannot be copied or cast, ``RuleError`` where the recipe does not fit.
    """
    out, sources = step.out, step.sources
    for source in sources:
        if source.key == out.key:
            refuse_ambiguous(roles[source.role], [source.key])
    infos = [roles[source.role][source.key] for source in sources]
    found = describe_output(out.key, infos, step.recipe, step.rule)
    leave_out = f"leave it out: ckpt remap --drop {shell_word(literal(sources[0].key))}"
    if found.kind != "dense":
        why = _WHY_NOT.get(found.kind, f"it is a {found.kind} tensor")
        raise PlanError(f"{quoted(found.key)} cannot be copied: {why}", hint=leave_out)
    if out.dtype != found.dtype:
        _refuse_cast(found, out.dtype, leave_out)
    first = step.sources[0]
    was = roles[first.role][first.key]
    for source in step.equals:
        other = roles[source.role][source.key]
        if (other.dtype, other.shape) != (was.dtype, was.shape):
            raise PlanError(f"{quoted(source.key)} is {other} and cannot equal {quoted(was.key)}")
    names = [] if step.recipe is None else [step.recipe.outline()]
    names += ["cast"] if out.dtype != found.dtype else []
    return replace(step, out=replace(out, view=found.view, kind="dense"), operation=", ".join(names) or "copy")


def _refuse_cast(found: TensorInfo, dtype: str, hint: str) -> None:
    if not {dtype, found.dtype} <= CASTABLE:
        raise PlanError(f"{quoted(found.key)} is {found.dtype}, which cannot be cast to {dtype}", hint=hint)
    if DTYPES[found.dtype].parts > DTYPES[dtype].parts:
        raise PlanError(
            f"{quoted(found.key)} is {found.dtype}, and a cast to {dtype} would lose its imaginary part", hint=hint
        )


def is_float(code: str) -> bool:
    """Return whether a dtype is of floating point."""
    return code.startswith(("F", "BF"))


def float_dtype(name: str) -> str:
    """Return the code of a floating-point dtype by its code or torch's name; raises ``PlanError`` for any other."""
    code = dtype_code(name)
    if code is None:
        raise PlanError(f"unknown dtype {quoted(name)}", hint="for example F32, F16, BF16, or torch's names of them")
    if not is_float(code) or code not in CASTABLE:
        raise PlanError(f"{code} is not a dtype that floating-point tensors can be cast to")
    return code


def refuse_suspicious(checkpoint: Checkpoint, role: str) -> None:
    """Raise ``PlanError`` where an input refers to code that no checkpoint needs."""
    if checkpoint.suspicious:
        raise PlanError(
            f"the {role} asks for code that no checkpoint needs ({printable(checkpoint.references[0])}); "
            "not run, and nothing is made from it",
            hint="get the weights from a source that you trust",
            path=checkpoint.path,
        )


def refuse_ambiguous(checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Raise ``PlanError`` where one of the keys, which shall name a tensor of an output, is a name of ours."""
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
        else f"{quoted(key)} is no name: the file has another thing than a string for a key",
        hint=f"leave it out: --drop {shell_word(literal(key))}, or give it a name with --rename",
        path=checkpoint.path,
    )


def dropped_sources(role: str, name: str, how: Derivation, reason: str, wanted: str = "") -> list[Dropped]:
    """Return for each tensor of an input that ``name`` stands for that it is left out by that name."""
    if how.recipe is not None:
        reason = f"made into {quoted(name)}: {reason}"
    return [Dropped(role, key, reason, wanted) for key in dict.fromkeys(how.sources)]


def dropped_entries(checkpoint: Checkpoint, role: str) -> list[Dropped]:
    """Return what an input holds besides tensors, as left out."""
    return [
        Dropped(role, entry.path, _entry_reason(entry), is_entry=True)
        for entry in checkpoint.entries
        if entry.type != ABSENT and not (entry.path == "_metadata" and checkpoint.versions)
    ]


def role_to_edit(checkpoint: Checkpoint, role: str) -> str:
    """Return the role of an input whose file holds more than the tensors taken, and can be written again; else none."""
    return role if checkpoint.container is not None else ""


def moved_modules(modules: Iterable[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the new prefix of each module, of the old and new names of tensors; one whose tensors part ways has none.

    A module without tensors of its own goes where everything below it goes.
    """
    if all(old == new for old, new in renamed.items()):
        return {module: module for module in modules}
    homes: dict[str, set[str]] = {}
    for old, new in renamed.items():
        home, _, leaf = old.rpartition(".")
        homes.setdefault(home, set()).add(_above(new, leaf))
    containers = {module for module in modules if module not in homes}
    for old, new in renamed.items():
        above, _, _ = old.rpartition(".")
        while above:
            above, _, _ = above.rpartition(".")
            if above in containers:
                homes.setdefault(above, set()).add(_above(new, old[len(above) + 1 :] if above else old))
    moved = {home: new for home, (new, *others) in homes.items() if not others and new != _NOWHERE}
    return {module: moved[module] for module in modules if module in moved}


_NOWHERE = "*"  # no module is called so


def _above(key: str, below: str) -> str:
    """Return the module in which a key has the name ``below``."""
    if key == below:
        return ""
    return key[: -len(below) - 1] if key.endswith(f".{below}") else _NOWHERE


def _entry_reason(entry: Entry) -> str:
    where = "beside the state_dict" if entry.is_outside else "in the state_dict, and no tensor"
    return f"{where} ({printable(entry.type)})"
