"""Plans of recipes: every key of the inputs is merged, taken from one of them, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.arguments import refuse, require_flags
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES, is_float
from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.patterns import parse_pattern
from ckptkit.core.text import listed, option_text, plural, quoted
from ckptkit.errors import RecipeError, RuleError
from ckptkit.inputs import CheckpointLike
from ckptkit.plans.metadata import follow_metadata
from ckptkit.plans.methods.model import Method
from ckptkit.plans.methods.operation import Merge
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.quantized import QuantizedInputs, check_quantized
from ckptkit.plans.quantized.as_numbers import DequantizedInputs
from ckptkit.plans.recipes.alignment import Decision, Decisions, decide, is_one
from ckptkit.plans.recipes.counts import with_counts
from ckptkit.plans.recipes.inputs import (
    AlignedInput,
    Ingredient,
    align_input,
    input_path,
    joined,
    opened_recipe,
    reference_of,
)
from ckptkit.plans.recipes.model import NOT_PARAMETERS, MergeRecipe
from ckptkit.plans.recipes.parse import RecipeLike, parse_recipe
from ckptkit.plans.recipes.provenance import with_provenance
from ckptkit.plans.recipes.slices import decide_slices, layer_count
from ckptkit.plans.steps import complete_step, moved_modules
from ckptkit.tensor_ops.arithmetic import Maximum
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["plan_opened", "plan_recipe"]

_STATISTICS = ("running_mean", "running_var")
_NO_REASON = "no key of the output is made of it"


def plan_recipe(
    recipe: RecipeLike, *, inputs: Mapping[str, CheckpointLike] | None = None, record_recipe: bool = True
) -> Plan:
    """Return the plan of a merge that a recipe describes: each tensor of the output, and what it is merged of.

    ``recipe`` is the path of a TOML, JSON or YAML file, or its parsed content. Paths in it are relative to the current
    directory. ``inputs`` has inputs by name, in place of the paths of the recipe: each is a path, a Checkpoint, a
    Module, or a mapping of tensors or of ``TensorInfo``. What is opened here is closed at the end.

    The roles of the plan are the names of the inputs. ``paths`` of the plan has the path of each, for ``execute``:
    ``execute(plan, plan.paths, out)``. The role of an adapter that is folded into an input has ``.lora`` at its end.

    The inputs must have the same keys and shapes, after the names that the recipe gives them. ``Step.rule`` names the
    method of each tensor with the values that are not defaults, or says why it is taken from one input. Only headers
    are read.

    The metadata of the output has an item ``ckptkit.merge``, a JSON text. It has the recipe, with only the last names
    of paths. Of each input it has the size, the digest of the header, and what its own metadata says about a merge.
    Beside a torch file, this is a file. Without ``record_recipe``, it has only the sizes and the digests.

    Raises:
        RecipeError: The recipe is not valid, does not fit its inputs, or has a path that cannot be read; the reason
            begins with its line.
        PathError: The file of the recipe, or a path in ``inputs``, cannot be read.
        FormatError: An input is not a valid checkpoint.
        RuleError: The recipe is not a valid table.
        PlanError: A tensor cannot be copied or cast, or an adapter cannot be folded.

    Example:
        >>> import torch
        >>> from ckptkit import plan_recipe
        >>> a, b = ({"fc.weight": torch.full((2, 2), value)} for value in (1.0, 3.0))
        >>> recipe = {"method": "linear", "input": [{"name": "a", "weight": 0.25}, {"name": "b", "weight": 0.75}]}
        >>> plan = plan_recipe(recipe, inputs={"a": a, "b": b})
        >>> plan.steps[0].rule, plan.materialize({"a": a, "b": b})["fc.weight"].tolist()
        ('linear: weight a=0.25 b=0.75', [[2.5, 2.5], [2.5, 2.5]])
    """
    named: object = inputs  # the caller may have passed anything
    if named is not None and (not isinstance(named, Mapping) or not all(isinstance(name, str) for name in named)):
        refuse(named, "inputs", "a mapping of the names of inputs to checkpoints")
    require_flags(record_recipe=record_recipe)
    parsed = parse_recipe(recipe)
    with opened_recipe(parsed, inputs or {}) as (roles, paths):
        return plan_opened(parsed, roles, paths, record_recipe=record_recipe)


def plan_opened(
    recipe: MergeRecipe, roles: Mapping[str, Checkpoint], paths: Mapping[str, str], *, record_recipe: bool
) -> Plan:
    """Return the plan of a recipe for the inputs that ``opened_recipe`` gives. Raises as ``plan_recipe``."""
    with pause_gc():
        return with_provenance(_plan(recipe, roles, paths), recipe, roles, paths, has_recipe=record_recipe)


def _plan(recipe: MergeRecipe, roles: Mapping[str, Checkpoint], paths: Mapping[str, str]) -> Plan:
    answers = {each.name: each.dequantize or recipe.dequantize for each in recipe.inputs}
    decoded = DequantizedInputs(roles, answers)
    views = decoded.checkpoints
    order = [name for name in roles if name in answers]
    aligned = {name: align_input(recipe, recipe.input(name), roles, views) for name in order}
    reference = reference_of(recipe)
    decisions = decide_slices(recipe, aligned) if recipe.slices else decide(recipe, aligned, reference)
    maker = _Maker(recipe, aligned, reference, views)
    steps = with_counts(recipe, maker.steps(decisions))
    if not steps:
        raise RecipeError("the output would have no tensor", path=recipe.places.path)
    decisions.settings.refuse_hidden()
    owner = roles[reference]
    moved = moved_modules(owner.versions, aligned[reference].renamed)
    plan = Plan(
        tuple(steps),
        tuple(_dropped(aligned, decisions, steps)),
        {},
        (*_input_notes(aligned), *decisions.notes, *_method_notes(steps), *_statistics_note(steps)),
        {new: owner.versions[old] for old, new in moved.items()},
        command="merge",
        paths=paths,
        layers=layer_count(recipe, aligned) if recipe.slices else None,
    )
    plan = decoded.finish(follow_metadata(plan, views))
    return check_quantized(plan, QuantizedInputs(roles))


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes the steps of a recipe."""

    recipe: MergeRecipe
    inputs: Mapping[str, AlignedInput]
    reference: str
    views: Mapping[str, Checkpoint]

    def steps(self, decisions: Decisions) -> Iterator[Step]:
        """Yield the step of each key of the output in order."""
        made: dict[str, Step] = {}
        for key, decision in decisions.by_key.items():
            leader = decisions.tied_to.get(key)
            if leader is not None:
                rule = f"tied to {quoted(leader)}"
                step = replace(made[leader], out=replace(made[leader].out, key=key), rule=rule, tied_to=leader)
            elif decision.kind == "left out":
                continue
            elif decision.kind == "taken":
                one = decisions.moved.get(key) or self.inputs[decision.inputs[0]].tensors[key]
                step = self._taken(key, decision, one)
            else:
                step = self._merged(key, decision, decisions)
            made[key] = step
            yield step

    def _taken(self, key: str, decision: Decision, one: Ingredient) -> Step:
        """Return the step of a tensor that is taken from one input, in the dtype of the output."""
        dtype = one.own_dtype
        wanted = self.inputs[self.reference].tensors.get(key)
        if is_float(dtype) and wanted is not None and is_float(wanted.own_dtype):
            dtype = wanted.own_dtype
        out = TensorInfo(key, self._out_dtype(dtype), one.info.shape, one.info.view)
        equals = (*one.equals, *decision.equals)
        return self._complete(Step(out, one.sources, "", decision.why, one.recipe, equals))

    def _merged(self, key: str, decision: Decision, decisions: Decisions) -> Step:
        if decision.chosen is None:
            return self._largest(key, decision)
        method = decisions.settings.method(
            key, decision.chosen, decision.inputs, has_base=decision.has_base, own=decision.own
        )
        names = [*([self.recipe.base] if decision.has_base else []), *decision.inputs]
        moved = decisions.moved.get(key)
        if method.name == "passthrough":
            one = moved or self.inputs[names[0]].tensors[key]
            if method.given() == {"scale": [1.0]} or not is_float(one.info.dtype):
                return self._taken(key, decision, one)
        owner = self.reference if key in self.inputs[self.reference].tensors else names[0]
        wanted = moved or self.inputs[owner].tensors[key]
        parts = [moved] if moved else [self._fitted(key, name, wanted.info.shape, owner) for name in names]
        sources, inner = joined(parts)
        equals = (*(source for part in parts for source in part.equals), *decision.equals)
        out = TensorInfo(key, self._out_dtype(wanted.own_dtype), wanted.info.shape)
        numbers = self._numbers(decision)
        merge = Merge(
            method,
            key,
            numbers,
            has_base=decision.has_base,
            is_wide=self.recipe.compute == "float64",
            on_nonfinite=self.recipe.on_nonfinite,
        )
        rule = decision.why + _values(method, decision.inputs)
        return self._complete(Step(out, sources, "", rule, Recipe(tuple(inner), (merge,)), equals))

    def _largest(self, key: str, decision: Decision) -> Step:
        """Return the step that takes the largest of the values that no method computes with."""
        parts = [self.inputs[name].tensors[key] for name in decision.inputs]
        sources, inner = joined(parts)
        out = TensorInfo(key, parts[0].info.dtype, parts[0].info.shape)
        return self._complete(Step(out, sources, "", decision.why, Recipe(tuple(inner), (Maximum(),))))

    def _numbers(self, decision: Decision) -> tuple[int, ...]:
        """Return the numbers of the inputs of a merge in the recipe, from 1 and without its base."""
        base = self.recipe.base if decision.has_base else ""
        order = [each.name for each in self.recipe.inputs if each.name != base]
        return tuple(order.index(name) + 1 for name in decision.inputs)

    def _out_dtype(self, dtype: str) -> str:
        """Return the dtype of a tensor of the output that has this dtype in its input."""
        is_real = is_float(dtype) and DTYPES[dtype].parts == 1 if dtype in DTYPES else False
        return self.recipe.out_dtype if self.recipe.out_dtype and is_real else dtype

    def _complete(self, step: Step) -> Step:
        try:
            return complete_step(step, self.views)
        except RuleError as error:
            reason = error.reason.removeprefix(f"{step.rule}: ")
            raise self.recipe.places.error(reason, "method", hint=error.hint) from None

    def _fitted(self, key: str, name: str, wanted: tuple[int, ...], owner: str) -> Ingredient:
        """Return the tensor of an input in the shape that the others have.

        Raises ``RecipeError`` where its recipe names no operation for that, or one that does not fit.
        """
        one = self.inputs[name].tensors[key]
        given = one.info.shape
        if given == wanted:
            return one
        from ckptkit.tensor_ops.suggestions import suggest, suggestions

        actions = self.recipe.input(name).on_mismatch
        table = actions if isinstance(actions, Mapping) else {"*": actions} if actions else {}
        action = next((action for text, action in table.items() if parse_pattern(text).match(key)), "")
        operation = suggest(action, given, wanted, key) if action else None
        if operation is None:
            ways = [
                f"{self.recipe.places.setting('on_mismatch', way, name)}: {effect}"
                for way, effect in suggestions(given, wanted, key)[:3]
            ]
            does_not = f", and {action} does not change one into the other" if action else ""
            raise self.recipe.places.error(
                f"{quoted(key)} is {list(wanted)} in {quoted(owner)} and {list(given)} in {quoted(name)}{does_not}",
                *input_path(self.recipe, name),
                hint="; ".join(ways) or f'a [[set]] of a recipe with keys = "{key}" and take = "NAME" chooses one',
            )
        recipe = Recipe((0 if one.recipe is None else one.recipe,), (operation,))
        return replace(one, info=TensorInfo(key, one.info.dtype, wanted), recipe=recipe)


def _values(method: Method, inputs: Sequence[str]) -> str:
    """Return the values of the parameters that differ from their defaults, for the rule of a step."""
    shown = []
    given = method.given()
    for name, parameter in method.parameters().items():
        value = given[name]
        several = value if isinstance(value, list) else [value]
        if name in NOT_PARAMETERS or all(one == parameter.default for one in several):
            continue
        texts = [str(one).lower() if isinstance(one, bool) else option_text(one) for one in several]
        same = len(set(texts)) == 1
        by_input = " ".join(f"{each}={text}" for each, text in zip(inputs, texts, strict=False))
        shown.append(f"{name} {texts[0] if same else by_input}")
    return f": {', '.join(shown)}" if shown else ""


def _dropped(aligned: Mapping[str, AlignedInput], decisions: Decisions, steps: Sequence[Step]) -> Iterator[Dropped]:
    """Yield what the output leaves out of each input: tensors that no step reads, and entries that are not tensors."""
    read = {source for step in steps for source in (*step.sources, *step.equals)}
    for each in aligned.values():
        yield from each.dropped
        known = {Source(drop.role, drop.key) for drop in each.dropped}
        for key, one in each.tensors.items():
            leader = each.tensors.get(decisions.tied_to.get(key, ""))
            if leader and not one.recipe and is_one(one, leader) and read.issuperset(leader.sources):
                continue  # it was merged under the key that it is tied to
            decision = None if decisions.moved else decisions.by_key.get(key)
            reason = "" if decision is None else decision.why
            wanted = "" if decision is None or decision.kind == "left out" else key
            if decision is not None and decision.kind == "merged":
                reason = f"not an input of {reason}"
            for source in one.sources:
                if source not in read and source not in known:
                    known.add(source)
                    yield Dropped(source.role, source.key, reason or _NO_REASON, wanted)


def _input_notes(aligned: Mapping[str, AlignedInput]) -> Iterator[str]:
    for each in aligned.values():
        yield from (f"{each.name}: {note}" for note in each.notes)


def _method_notes(steps: Sequence[Step]) -> Iterable[str]:
    """Return what the methods say of their numbers, each sentence once."""
    merges = (step.recipe.operations[-1] for step in steps if step.recipe is not None)
    return dict.fromkeys(note for merge in merges if isinstance(merge, Merge) for note in merge.method.notes())


def _statistics_note(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a note where running statistics of a batch norm are merged."""
    keys = [
        step.out.key for step in steps if step.recipe is not None and step.out.key.rpartition(".")[2] in _STATISTICS
    ]
    if keys:
        count = plural(len(keys), "running statistic")
        yield (
            f"{count} of batch norms {'was' if len(keys) == 1 else 'were'} merged, such as {listed(keys, 1)}: they "
            "are right only for the data that they were computed on; compute them anew with the merged model"
        )
