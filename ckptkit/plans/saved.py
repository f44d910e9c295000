"""Plan files: a plan as a JSON document, to be read, applied again or inverted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ckptkit.core.arguments import require_flags, require_path, require_type
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.config_files import default_error_path, json_bytes, read_table_file
from ckptkit.core.files.places import clean_path
from ckptkit.core.text import listed, plural, quoted
from ckptkit.errors import PlanError, RuleError
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.targets import prepare_side_file
from ckptkit.plans.deltas.base import BaseOfPatch
from ckptkit.plans.inputs import Sources, opened_roles
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.plan.step import PATCH_OPERATION
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.steps import (
    check_steps,
    dropped_entries,
    moved_modules,
    refuse_suspicious,
    role_to_edit,
)
from ckptkit.tensor_ops.operation import Operation
from ckptkit.tensor_ops.recipes import Recipe
from ckptkit.tensor_ops.registry import invert_chain, parse_operation

__all__ = [
    "SavedPlan",
    "apply_plan",
    "header_digest",
    "invert_plan",
    "load_plan",
    "plan_from_json",
    "plan_to_json",
    "save_plan",
    "step_to_json",
]


_SCHEMA = "ckptkit.plan/1"
_MAX_DEPTH = 60  # of the recipes in a recipe, which are read recursively


@dataclass(frozen=True, slots=True)
class SavedPlan:
    """A plan, the header digest of each input by role, and the description of each tensor that the plan reads."""

    plan: Plan
    headers: Mapping[str, str]
    inputs: Mapping[Source, TensorInfo]


def header_digest(infos: Iterable[TensorInfo]) -> str:
    """Return a SHA-256 of the names, dtypes and shapes, which does not depend on their order."""
    lines = sorted(json.dumps([info.key, info.dtype, list(info.shape), info.kind]) for info in infos)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def plan_to_json(plan: Plan, sources: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the document of ``--plan FILE``; ``sources`` maps the roles of the plan to its inputs."""
    return {
        "schema": _SCHEMA,
        "sources": {
            role: {
                "path": checkpoint.path,
                "format": checkpoint.format,
                "tensors": len(checkpoint),
                "header": header_digest(checkpoint.values()),
            }
            for role, checkpoint in sources.items()
        },
        "plan": [step_to_json(step, sources) for step in plan.steps],
        "dropped": [
            {"role": drop.role, "key": drop.key, "reason": drop.reason, "wanted": drop.wanted, "entry": drop.is_entry}
            for drop in plan.dropped
        ],
        "metadata": dict(plan.metadata),
        "versions": dict(plan.versions),
        "notes": list(plan.notes),
        "keeps": plan.edited_role,
        "kept": list(plan.kept),
        "patched_base": None if plan.patched_base is None else _base_to_json(plan.patched_base),
    }


def _base_to_json(base: BaseOfPatch) -> dict[str, object]:
    return {"name": base.name, "digests": dict(base.digests)}


def step_to_json(step: Step, sources: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Return the document of one step, which has all that decides the bytes of its tensor, but for the inputs."""
    return {
        "key": step.out.key,
        "dtype": step.out.dtype,
        "shape": list(step.out.shape),
        "sources": [_source_to_json(source, sources) for source in step.sources],
        "operation": step.operation,
        "rule": step.rule,
        "recipe": None if step.recipe is None else _recipe_to_json(step.recipe),
        "equals": [_source_to_json(source, sources) for source in step.equals],
    }


def _source_to_json(source: Source, sources: Mapping[str, Checkpoint]) -> dict[str, object]:
    info = sources[source.role][source.key]
    return {"role": source.role, "key": source.key, "dtype": info.dtype, "shape": list(info.shape)}


def _recipe_to_json(recipe: Recipe) -> dict[str, object]:
    return {
        "inputs": [item if isinstance(item, int) else _recipe_to_json(item) for item in recipe.inputs],
        "operations": [{operation.name: operation.params()} for operation in recipe.operations],
        "part": recipe.part,
    }


def plan_from_json(document: Mapping[str, Any]) -> SavedPlan:
    """Return the plan in the document of a plan file; raise ``PlanError`` where the document is not a valid plan."""
    if document.get("schema") != _SCHEMA:
        raise PlanError(f"not a plan file: its schema is {quoted(str(document.get('schema'))[:40])}, not {_SCHEMA}")
    try:
        headers = {_text(role): _text(source["header"]) for role, source in document["sources"].items()}
        inputs: dict[Source, TensorInfo] = {}
        steps = tuple(_step(item, inputs) for item in document["plan"])
        dropped = tuple(map(_dropped, document["dropped"]))
        metadata = {_text(key): _text(value) for key, value in document["metadata"].items()}
        versions = {_text(key): _size(value) for key, value in document["versions"].items()}
        notes = tuple(map(_text, document["notes"]))
        edited_role, kept = _text(document["keeps"]), tuple(map(_text, document["kept"]))
        patched_base = _base(document.get("patched_base"))  # older plan files are without it
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise PlanError(f"not a valid plan: {type(error).__name__} {quoted(str(error)[:80])}") from None
    except RuleError as error:
        raise PlanError(f"not a plan that can be executed: {error.reason}", hint=error.hint) from None
    if not steps:
        raise PlanError("the plan writes no tensor", hint="make a new plan")
    plan = Plan(steps, dropped, metadata, notes, versions, edited_role, kept, patched_base=patched_base)
    return SavedPlan(plan, headers, inputs)


def _base(item: Mapping[str, Any] | None) -> BaseOfPatch | None:
    if item is None:
        return None
    return BaseOfPatch(_text(item["name"]), {_text(key): _text(digits) for key, digits in item["digests"].items()})


def _dropped(item: Mapping[str, Any]) -> Dropped:
    role, key, reason, wanted = (_text(item[name]) for name in ("role", "key", "reason", "wanted"))
    return Dropped(role, key, reason, wanted, item["entry"] is True)


def _step(item: Mapping[str, Any], inputs: dict[Source, TensorInfo]) -> Step:
    out = TensorInfo(_text(item["key"]), _text(item["dtype"]), tuple(map(_size, item["shape"])))
    sources, equals = (tuple(_source(source, inputs) for source in item[name]) for name in ("sources", "equals"))
    recipe = None if item["recipe"] is None else _recipe(item["recipe"])
    operation = _text(item["operation"])
    is_cast = operation.split(", ")[-1] == "cast"  # the document names the operations in their order
    return Step(out, sources, operation, _text(item["rule"]), recipe, equals, is_cast)


def _source(item: Mapping[str, Any], inputs: dict[Source, TensorInfo]) -> Source:
    source = Source(_text(item["role"]), _text(item["key"]))
    inputs[source] = TensorInfo(source.key, _text(item["dtype"]), tuple(map(_size, item["shape"])))
    return source


def _recipe(item: Mapping[str, Any], depth: int = 1) -> Recipe:
    if depth > _MAX_DEPTH:
        raise ValueError(f"recipes are nested more than {_MAX_DEPTH} deep")
    inputs = tuple(part if isinstance(part, int) else _recipe(part, depth + 1) for part in item["inputs"])
    return Recipe(inputs, tuple(map(_operation, item["operations"])), _size(item["part"]))


def _operation(item: Mapping[str, Any]) -> Operation:
    """Return an operation of a recipe: of the registry, or a merge or a patch, which rule files do not know."""
    if list(item) == ["merge"]:
        from ckptkit.plans.methods.operation import Merge

        return Merge.parse(item["merge"])
    if list(item) == [PATCH_OPERATION]:
        from ckptkit.plans.deltas.operation import Patched

        return Patched.parse(item[PATCH_OPERATION])
    return parse_operation(item)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError("a size or a count is not an integer from 0 to 2**63 - 1")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def save_plan(plan: Plan, path: str | os.PathLike[str], sources: Sources, *, force: bool = False) -> None:
    """Write a plan to a JSON file, as ``--plan FILE`` of the command line does; ``load_plan`` and ``--apply`` read it.

    ``sources`` is what ``execute`` takes; what is opened here is closed at the end. The file has the names, dtypes and
    shapes of the inputs, and none of their values. ``force`` replaces an existing file.

    Raises:
        PlanError: The plan does not fit the inputs, or a role is missing.
        OutputError: The file exists and ``force`` is not given, it is a file of an input, or it cannot be written.

    Example:
        >>> import json, os, tempfile
        >>> plan = ckptkit.plan_remap("fixtures/lenet_10class.pth", ["fc3.*=head.*"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = os.path.join(directory, "plan.json")
        ...     ckptkit.save_plan(plan, path, "fixtures/lenet_10class.pth")
        ...     with open(path) as file:
        ...         json.load(file)["plan"][-1]["key"]
        'head.bias'
    """
    require_type(plan, Plan, "plan", "a Plan")
    require_path(path, "path")
    require_flags(force=force)
    roles = [source.role for step in plan.steps for source in (*step.sources, *step.equals)]
    edited = [plan.edited_role] if plan.edited_role else []
    with opened_roles([*roles, *edited], sources) as inputs:
        check_steps(plan.steps, inputs)
        files = [file for checkpoint in inputs.values() for file in checkpoint.files]
        target = prepare_side_file(os.fsdecode(path), files, force=force)
        write_small_file(target, json_bytes(plan_to_json(plan, inputs)))


def load_plan(path: str | os.PathLike[str], sources: Sources, *, invert: bool = False) -> Plan:
    """Return the plan in a file that ``save_plan`` or ``--plan`` wrote, or its inverse, for ``execute``.

    ``sources`` is what ``execute`` takes; what is opened here is closed at the end. The input of an inverse is the
    output of the plan, with the role ``source``. Raises ``PathError`` and ``RuleError`` where the file cannot be read.
    Raises ``PlanError`` where it is not a valid plan, and where an input has other names, dtypes or shapes than before.

    Example:
        >>> import os, tempfile
        >>> plan = ckptkit.plan_remap("fixtures/lenet_ddp.pt", ["module.*=*"])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = os.path.join(directory, "plan.json")
        ...     ckptkit.save_plan(plan, path, "fixtures/lenet_ddp.pt")
        ...     ckptkit.load_plan(path, "fixtures/lenet_ddp.pt") == plan
        True
    """
    require_path(path, "path")
    require_flags(invert=invert)
    name = clean_path(os.fsdecode(path))
    with default_error_path(name):
        saved = plan_from_json(read_table_file(name, as_json=True))
        saved = invert_plan(saved) if invert else saved
    with opened_roles(saved.headers, sources) as roles, default_error_path(name):
        return apply_plan(saved, roles)


def apply_plan(saved: SavedPlan, sources: Mapping[str, Checkpoint]) -> Plan:
    """Return the plan, ready to be executed on ``sources``, which maps its roles to the inputs.

    Raises ``PlanError`` where an input has other names, dtypes or shapes than the input that the plan was made from,
    and where the plan would take a part of a quantised weight for numbers.
    """
    if set(saved.headers) != set(sources):
        raise PlanError(f"the plan reads {', '.join(saved.headers)}, and is applied to {', '.join(sources)}")
    for role, checkpoint in sources.items():
        refuse_suspicious(checkpoint, role)
        if header_digest(checkpoint.values()) != saved.headers[role]:
            raise PlanError(
                f"the {role} is not the input that the plan was made from{_difference(saved, role, checkpoint)}",
                hint="make a new plan",
                path=checkpoint.path,
            )
    steps = check_steps(saved.plan.steps, sources)
    # Entries that are not tensors are read from the present inputs, because the digest does not cover such entries.
    dropped = [drop for drop in saved.plan.dropped if not drop.is_entry]
    dropped += [drop for role, checkpoint in sources.items() for drop in dropped_entries(checkpoint, role)]
    edited = saved.plan.edited_role
    edited_role = role_to_edit(sources[edited], edited) if edited in sources else ""
    plan = replace(saved.plan, steps=tuple(steps), dropped=tuple(dropped), edited_role=edited_role, kept=())
    return check_quantized(plan, QuantizedInputs(sources, sources.get("base"), "base"))


def _difference(saved: SavedPlan, role: str, checkpoint: Checkpoint) -> str:
    wanted = {source.key: info for source, info in saved.inputs.items() if source.role == role}
    for key, info in wanted.items():
        if key not in checkpoint:
            return f": {quoted(key)} is missing"
        if (checkpoint[key].dtype, checkpoint[key].shape) != (info.dtype, info.shape):
            return f": {quoted(key)} is {checkpoint[key]}, and was {info}"
    now, then = (plural(len(tensors), "tensor") for tensors in (checkpoint, wanted))
    return f": a set of {now}, and the plan reads another set of {then}"


_ROLE = "source"
_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class _Output:
    """The names in the output of a plan, from which its inverse begins."""

    metadata: Mapping[str, str]
    names: tuple[str, ...]

    def keys(self) -> tuple[str, ...]:
        return self.names


def invert_plan(saved: SavedPlan) -> SavedPlan:
    """Return the plan that makes the source of ``saved`` from its output, with every bit of every tensor.

    The inverse uses the recorded names and operations, never the text of rules. Entries of the source that are not
    tensors cannot be restored, and a note names them. Raises ``PlanError`` for a tensor that was dropped or cast. It
    is also raised for an operation that has no inverse, or that has outputs which the plan does not use.
    """
    roles = {source.role for step in saved.plan.steps for source in step.sources}
    if roles != {_ROLE}:
        raise PlanError(
            "cannot be inverted: the plan merges checkpoints, and the output lacks the values that were replaced"
        )
    lost: list[str] = []
    steps: dict[str, Step] = {}
    for group in _steps_by_recipe(saved.plan):
        inverse = _invert(group, saved)
        if isinstance(inverse, str):
            lost.append(inverse)
        else:
            steps.update({step.out.key: step for step in inverse if step.out.key not in steps})
    lost[:0] = [
        f"{quoted(drop.key)} was dropped ({drop.reason})"
        for drop in saved.plan.dropped
        if not drop.is_entry and drop.key not in steps
    ]
    if not lost and header_digest(step.out for step in steps.values()) != saved.headers.get(_ROLE):
        lost.append("the plan does not name every tensor of its source")
    if lost:
        raise PlanError(f"cannot be inverted: {listed(lost, _MOST_NAMED, show=str, separator='; ')}")
    outs = [step.out for step in saved.plan.steps]
    inputs = {Source(_ROLE, info.key): TensorInfo(info.key, info.dtype, info.shape) for info in outs}
    entries = [drop.key for drop in saved.plan.dropped if drop.is_entry]
    notes = (f"these entries are not restored: {', '.join(map(quoted, entries))}",) if entries else ()
    names = {step.sources[0].key: key for key, step in steps.items() if step.recipe is None}
    moved = moved_modules(saved.plan.versions, names)
    versions = {old: saved.plan.versions[new] for new, old in moved.items()}
    edited_role = _ROLE if saved.plan.edited_role else ""
    plan = Plan(tuple(steps.values()), (), {}, notes, versions, edited_role)
    plan = follow_metadata(plan, {_ROLE: _Output(saved.plan.metadata, tuple(info.key for info in outs))})
    return SavedPlan(plan, {_ROLE: header_digest(inputs.values())}, inputs)


def _steps_by_recipe(plan: Plan) -> Iterator[list[Step]]:
    """Yield the steps of each recipe together: they are the outputs of one evaluation."""
    groups: dict[object, list[Step]] = {}
    for step in plan.steps:
        chain = step.out.key if step.recipe is None else (step.sources, step.recipe.inputs, step.recipe.operations)
        groups.setdefault(chain, []).append(step)
    yield from groups.values()


def _invert(group: list[Step], saved: SavedPlan) -> list[Step] | str:
    """Return the steps that restore the sources of a group, or the reason why the sources cannot be restored."""
    first = group[0]
    cast = next((step for step in group if step.is_cast), None)
    if cast is not None:
        return f"{quoted(cast.out.key)} was cast from {saved.inputs[cast.sources[0]].dtype} to {cast.out.dtype}"
    name = quoted(first.out.key)
    if first.recipe is None:
        return [_restore(source, (first,), None, saved) for source in (*first.sources, *first.equals)]
    if any(isinstance(item, Recipe) for item in first.recipe.inputs):
        return f"{name} was made by nested recipes ({first.recipe.outline()})"
    sources = [first.sources[number] for number in first.recipe.inputs if isinstance(number, int)]
    chain = invert_chain(first.recipe.operations, [saved.inputs[source].shape for source in sources])
    if chain is None:
        return f"{name} was made by {first.recipe.outline()}, which has no inverse"
    parts = {step.recipe.part: step for step in group if step.recipe is not None}
    missing = first.recipe.operations[-1].outputs - len(parts)
    if missing:
        return (
            f"{name} is one of {missing + len(parts)} tensors that {first.recipe.outline()} makes, "
            "and the output lacks some of them"
        )
    outputs = tuple(parts[part] for part in sorted(parts))
    inputs = tuple(range(len(outputs)))
    return [_restore(source, outputs, Recipe(inputs, chain, part), saved) for part, source in enumerate(sources)]


def _restore(source: Source, outputs: tuple[Step, ...], recipe: Recipe | None, saved: SavedPlan) -> Step:
    info = saved.inputs[source]
    out = TensorInfo(source.key, info.dtype, info.shape)
    rule = f"undoes {quoted(outputs[0].rule)}" if outputs[0].rule else ""
    operation = "copy" if recipe is None else recipe.outline()
    return Step(out, tuple(Source(_ROLE, step.out.key) for step in outputs), operation, rule, recipe)
