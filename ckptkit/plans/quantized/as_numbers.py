"""Plans that read quantised weights as numbers: made as if the inputs had plain weights, then of their parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.patterns import Pattern, matches_any
from ckptkit.core.text import quoted, shell_word
from ckptkit.errors import PlanError, RuleError
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.steps import complete_step
from ckptkit.quantized import QuantizedWeight
from ckptkit.quantized.view import DequantizedView, DequantizeLike, dequantized, parse_dequantize
from ckptkit.rules.model import Rule, Rules

if TYPE_CHECKING:
    from ckptkit.quantized.decoding import Decoded
    from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["DequantizedInputs"]

_NOTHING = "no weight is quantised, so none is dequantised"
_NARROW = frozenset({"F16", "BF16"})
_PART = "a part of {}, which is dequantised"


class DequantizedInputs:
    """The inputs of a plan by role, with quantised weights as plain tensors where the caller or the rules say so.

    A plan of ``checkpoints`` becomes one of the inputs as they are stored by ``finish``.
    """

    def __init__(
        self,
        roles: Mapping[str, Checkpoint],
        dequantize: DequantizeLike | Mapping[str, DequantizeLike],
        *,
        rules: Rules | None = None,
        by_rules: Sequence[str] = (),
        dtype: str | None = None,
    ) -> None:
        """Find the weights: all with ``dequantize``, else those that rules dequantise in the inputs ``by_rules``.

        ``dequantize`` may have an answer for each role. ``dtype`` is that of the output, if the caller gives one.
        """
        answers = dequantize if isinstance(dequantize, Mapping) else dict.fromkeys(roles, dequantize)
        parsed = {role: parse_dequantize(answers.get(role, False)) for role in roles}
        self._is_wanted = any(is_wanted for is_wanted, _ in parsed.values())
        rows = [rule for stage in rules.stages for rule in stage.rules if _dtypes_of(rule)] if rules else []

        def wanted(role: str, weight: QuantizedWeight) -> str | bool:
            is_wanted, given = parsed[role]
            for rule in rows if role in by_rules else ():
                if any(pattern.match(weight.key) for pattern in rule.sources):
                    return dtype or next(filter(None, _dtypes_of(rule)), None) or given or True
            return is_wanted and (dtype or given or True)

        self.stored = dict(roles)
        self.views: dict[str, DequantizedView] = {}
        for role, checkpoint in roles.items():
            if parsed[role][0] or (rows and role in by_rules):
                self.views[role] = dequantized(checkpoint, wanted=partial(wanted, role))
        self.checkpoints = {role: self._view(role) for role in roles}
        for view in self.views.values():
            _refuse_codes(view)
        for role in by_rules if rules and not rules.allow_unused else ():
            self._refuse_names_of_parts(role, rules)
        self.rules = _without_dequantize(rules) if rows and rules else rules

    def _view(self, role: str) -> Checkpoint:
        return self.views[role].checkpoint if role in self.views else self.stored[role]

    def _refuse_names_of_parts(self, role: str, rules: Rules | None) -> None:
        """Raise ``RuleError`` for a pattern that matches only tensors that are parts of dequantised weights."""
        view = self.views.get(role)
        if view is None or rules is None or not rules.stages:
            return
        stage = rules.stages[0]
        wanted: list[tuple[str, tuple[Pattern, ...]]] = [
            (f"--keep {shell_word(pattern.text)}", (pattern,)) for pattern in stage.keep
        ]
        wanted += [(str(rule), rule.sources) for rule in stage.rules if not rule.optional]
        for name, patterns in wanted if view.weights else ():
            if any(matches_any(patterns, key) for key in view.checkpoint):
                continue
            for key, decoded in view.weights.items():
                part = next((part for part in decoded.weight.parts if matches_any(patterns, part)), None)
                if part is not None:
                    raise RuleError(
                        f"{name} matches only parts of weights that are dequantised, such as {quoted(part)} of "
                        f"{quoted(key)}",
                        hint="leave it out: of such a weight, the output has one tensor, and no parts",
                    )

    def finish(self, plan: Plan) -> Plan:
        """Return the plan with the parts of dequantised weights as sources, and a note about these weights."""
        weights = {role: view.weights for role, view in self.views.items() if view.weights}
        if not weights:
            return replace(plan, notes=(*plan.notes, _NOTHING)) if self._is_wanted else plan
        steps = tuple(self._step(step, weights) for step in plan.steps)
        dropped: list[Dropped] = []
        for drop in plan.dropped:
            decoded = weights.get(drop.role, {}).get(drop.key)
            parts = (drop.key,) if decoded is None or drop.is_entry else decoded.weight.parts
            dropped += [replace(drop, key=key) for key in parts]
        read = {(source.role, source.key) for step in steps for source in step.sources}
        known = {(drop.role, drop.key) for drop in dropped}
        dropped += [
            Dropped(role, part, _PART.format(quoted(key)))
            for role, several in weights.items()
            for key, decoded in several.items()
            for part in decoded.weight.parts
            if (role, part) not in read | known and not read.isdisjoint((role, key) for key in decoded.weight.parts)
        ]
        notes = []
        for role, view in self.views.items():
            made = [(step, key) for step in plan.steps for key in self._decoded(step, role)]
            dtypes = {key: step.out.dtype if step.recipe is None else view.checkpoint[key].dtype for step, key in made}
            notes += [f"{role}: {note}" if len(self.stored) > 1 else note for note in view.notes(dtypes)]
        return replace(plan, steps=steps, dropped=tuple(dropped), notes=(*plan.notes, *notes))

    def _decoded(self, step: Step, role: str) -> list[str]:
        """Return the keys of the dequantised weights of an input that a step reads."""
        weights = self.views[role].weights
        return [source.key for source in step.sources if source.role == role and source.key in weights]

    def _step(self, step: Step, weights: Mapping[str, Mapping[str, Decoded]]) -> Step:
        found = [weights.get(source.role, {}).get(source.key) for source in step.sources]
        for source in step.equals:
            if source.key in weights.get(source.role, {}):
                raise PlanError(f"{quoted(source.key)} is dequantised, and cannot be compared with another tensor")
        if not any(found):
            return step
        from ckptkit.tensor_ops.dequantize import Dequantize
        from ckptkit.tensor_ops.recipes import Recipe

        sources: list[Source] = []
        inner: list[int | Recipe] = []
        for source, decoded in zip(step.sources, found, strict=True):
            first = len(sources)
            if decoded is None:
                sources.append(source)
                inner.append(first)
                continue
            sources += [Source(source.role, key) for _, key in decoded.sources]
            # A weight that is only copied or cast is rounded once, to the dtype of the output.
            dtype = step.out.dtype if step.recipe is None else self._view(source.role)[source.key].dtype
            parts = tuple(role for role, _ in decoded.sources)
            shape, settings = decoded.decoder.shape, decoded.settings
            operation = Dequantize(dtype, decoded.family, parts, shape, settings)
            inner.append(Recipe(tuple(range(first, len(sources))), (operation,)))
        if step.recipe is None:
            recipe = inner[0]
            assert isinstance(recipe, Recipe)  # noqa: S101 - the only source is a quantised weight
        else:
            recipe = self._with_one_rounding(step, tuple(sources), step.recipe, inner)
        return complete_step(replace(step, sources=tuple(sources), recipe=recipe), self.stored)

    def _with_one_rounding(
        self, step: Step, sources: Sequence[Source], recipe: Recipe, inner: Sequence[int | Recipe]
    ) -> Recipe:
        """Return a recipe of numbers in float32 where operations compute with them, so that only the result is rounded.

        The numbers have their own dtype where it is wide already or elements are only moved, and where they are joined
        with tensors of that dtype.
        """
        from ckptkit.tensor_ops.recipes import recipe_dtype, substituted

        own = substituted(recipe, inner)
        wide = substituted(recipe, [one if isinstance(one, int) else _in_float32(one) for one in inner])
        if recipe.operations[0].name == "merge":  # which computes in float32 whatever the dtypes
            return wide
        if not recipe.is_lossy or step.out.dtype not in _NARROW:
            return own
        try:
            found = recipe_dtype(wide, [self.stored[source.role][source.key].dtype for source in sources])
        except RuleError:
            return own
        return wide if found in {"F32", step.out.dtype} else own


def _refuse_codes(view: DequantizedView) -> None:
    """Raise ``PlanError`` where numbers of 8 bits would have the key of codes: they would be read as codes again."""
    for key, decoded in view.weights.items():
        dtype = view.checkpoint[key].dtype
        if key == decoded.weight.coded and dtype.startswith("F8"):
            raise PlanError(
                f"{quoted(key)} is quantised ({decoded.weight.scheme}): its numbers in {dtype} would be codes without "
                "scales",
                hint="dequantise it to F16, BF16, F32 or F64; --quantize writes other codes, with their scales",
            )


def _in_float32(recipe: Recipe) -> Recipe:
    from ckptkit.tensor_ops.dequantize import Dequantize

    made = (replace(one, dtype="F32") if isinstance(one, Dequantize) else one for one in recipe.operations)
    return replace(recipe, operations=tuple(made))


def _dtypes_of(rule: Rule) -> list[str]:
    """Return the dtype of each operation of a rule that dequantises what matches; a dtype can be empty."""
    if not rule.operations:
        return []
    from ckptkit.tensor_ops.dequantize import Dequantize

    return [one.dtype for one in rule.operations if isinstance(one, Dequantize) and not one.scheme]


def _without_dequantize(rules: Rules) -> Rules:
    """Return the rules for inputs that have plain tensors in place of quantised weights already."""
    from ckptkit.tensor_ops.dequantize import Dequantize

    def plain(rule: Rule) -> Rule:
        left = tuple(one for one in rule.operations if not isinstance(one, Dequantize) or one.scheme)
        return replace(rule, operations=left)

    return replace(rules, stages=tuple(replace(stage, rules=tuple(map(plain, stage.rules))) for stage in rules.stages))
