"""From one tensor of an input to one step of a plan: copied, cast, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace

from ckptkit.errors import PlanError
from ckptkit.keys import literal
from ckptkit.plan import Dropped, Source, Step
from ckptkit.rules import KeyMap
from ckptkit.tensors import DTYPES, Checkpoint, Entry, TensorInfo
from ckptkit.text import printable, quoted, shell_word
from ckptkit.torch_bridge import ABSENT, CASTABLE

__all__ = ["dropped_entries", "float_dtype", "is_float", "make_step", "refuse_suspicious", "with_equals"]

_WHY_NOT = {
    "ambiguous": "two tensors would have this name when written flat",
    "meta": "it has no values: it was saved from the meta device",
    "subclass": "it is a tensor subclass, whose parts only its own code can put together",
}


def make_step(out: TensorInfo, found: TensorInfo, source: Source, rule: str) -> Step:
    """Return the step that makes ``out`` of ``found``: its bytes as they are, or cast to another dtype."""
    leave_out = f"leave it out: --drop {shell_word(literal(found.key))}"
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


def with_equals(step: Step, checkpoint: Checkpoint, key_map: KeyMap) -> Step:
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


def is_float(code: str) -> bool:
    return code.startswith(("F", "BF"))


def float_dtype(name: str) -> str:
    for dtype in DTYPES.values():
        if name.upper() == dtype.code or name.removeprefix("torch.") == dtype.torch_name:
            if is_float(dtype.code) and dtype.code in CASTABLE:
                return dtype.code
            raise PlanError(f"{dtype.code} is not a dtype that floating-point tensors can be cast to")
    raise PlanError(f"unknown dtype {quoted(name)}", hint="for example F32, F16, BF16, or torch's names of them")


def refuse_suspicious(checkpoint: Checkpoint, role: str) -> None:
    if checkpoint.suspicious:
        raise PlanError(
            f"the {role} asks for code that no checkpoint needs ({printable(checkpoint.references[0])}); "
            "not run, and nothing is made from it",
            hint="get the weights from a source that you trust",
            path=checkpoint.path,
        )


def dropped_entries(checkpoint: Checkpoint, role: str) -> list[Dropped]:
    return [
        Dropped(role, entry.path, _entry_reason(entry), entry=True)
        for entry in checkpoint.entries
        if entry.type != ABSENT and not (entry.path == "_metadata" and checkpoint.versions)
    ]


def _entry_reason(entry: Entry) -> str:
    where = "beside the state_dict" if entry.outside else "in the state_dict, and no tensor"
    return f"{where} ({printable(entry.type)})"
