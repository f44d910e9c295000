"""Refuse plans that would take the codes or the companions of a quantised weight for numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from ckptkit.core.checkpoint import Checkpoint, TensorInfo, under_key
from ckptkit.core.patterns import matches_any
from ckptkit.core.text import listed, quoted, shell_word
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import PlanError
from ckptkit.plans.plan.step import Source, Step
from ckptkit.quantized import Quantized, QuantizedWeight, quantized_weights
from ckptkit.quantized.configuration import read_configuration
from ckptkit.rules.model import Derivation, Rules, Stage

__all__ = [
    "QuantizedInputs",
    "QuantizedProblem",
    "already_quantised",
    "change_reason",
    "check_quantized",
    "refuse_part",
]


@dataclass(frozen=True, slots=True)
class QuantizedProblem:
    """The reason why one quantised weight cannot go where a plan puts it.

    ``outs`` are the keys of the output that would be made from its parts.
    """

    key: str
    outs: tuple[str, ...]
    message: str
    hint: str

    def error(self) -> PlanError:
        """Return the problem as an error."""
        return PlanError(self.message, hint=self.hint)


_Uses = Sequence[tuple[str, Step]]  # the parts of one weight, and the steps that read them
_Used = dict[tuple[str, QuantizedWeight], list[tuple[str, Step]]]  # by the role of the input and the weight


@dataclass(frozen=True)
class QuantizedInputs:
    """The inputs of a plan by role, with the quantised weights in each.

    ``target`` is the checkpoint that the output has the keys of, and ``target_role`` its role, or empty if no step
    reads it. ``where`` names the target in messages.
    """

    sources: Mapping[str, Checkpoint]
    target: Checkpoint | None = None
    target_role: str = ""
    where: str = "the base"
    weights: Mapping[str, Quantized] = field(init=False)
    in_target: Quantized = field(init=False)
    target_infos: Mapping[str, TensorInfo] = field(init=False)
    by_name: Mapping[str, QuantizedWeight] = field(init=False)  # the weights of the target by the key of each weight

    def __post_init__(self) -> None:
        """Find the quantised weights, from headers only."""
        weights = {role: quantized_weights(checkpoint) for role, checkpoint in self.sources.items()}
        own = weights.get(self.target_role)
        in_target = own or (Quantized() if self.target is None else quantized_weights(self.target))
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "in_target", in_target)
        object.__setattr__(self, "target_infos", {} if self.target is None else self.target)
        object.__setattr__(self, "by_name", {weight.key: weight for weight in in_target.weights})

    def __bool__(self) -> bool:
        """Return whether any input has a quantised weight."""
        return bool(self.in_target) or any(self.weights.values())

    def refuse_quantizing(self, role: str, rules: Rules) -> None:
        """Raise ``PlanError`` where a rule would quantise a weight of this input that is quantised already."""
        weights = self.weights[role].weights
        stage = rules.stages[0] if weights and rules.stages else Stage()
        for rule in stage.rules:
            if any(operation.name == "quantize" for operation in rule.operations):
                for weight in weights:
                    if any(matches_any(rule.sources, key) for key in (weight.coded, weight.key)):
                        raise already_quantised(weight)

    def refuse_operations(self, role: str, outputs: Mapping[str, Derivation]) -> None:
        """Raise ``PlanError`` where rules compute a tensor from a part of a quantised weight of this input."""
        by_key = self.weights[role].by_key
        for derivation in outputs.values() if by_key else ():
            if derivation.recipe is not None:
                for key in derivation.sources:
                    refuse_part(self.weights[role], key, change_reason(derivation.recipe.outline()))

    def refuse_cast(self, role: str, keys: Mapping[str, Derivation], dtype: str) -> None:
        """Raise ``PlanError`` where the output would have a quantised weight of an input that is to be cast."""
        by_key = self.weights[role].by_key
        for derivation in keys.values() if by_key else ():
            weight = by_key.get(derivation.sources[0])
            if weight is not None:
                rule = f"to cast only other tensors, give --rules FILE in place of --dtype, with {_cast_rule(dtype)}"
                hint = f"{weight.ways_out}; {rule}"
                raise _problem(weight, weight.coded, (), _cast_reason(dtype), hint).error()

    def refuse_change(self, key: str, doing: str, way: str = "") -> None:
        """Raise ``PlanError`` if ``key`` is a quantised weight of the target, which ``doing`` would change.

        ``way`` comes before the way out of the scheme in the hint.
        """
        weight = self.in_target.by_key.get(key) or self.by_name.get(key)
        if weight is not None:
            error = _problem(weight, key, (), change_reason(doing), f"{way}{weight.ways_out}").error()
            error.path = None if self.target is None else self.target.path
            raise error

    def refuse_overlay(self, role: str, outputs: Mapping[str, Derivation]) -> None:
        """Raise ``PlanError`` for the first problem that ``overlay_problems`` finds."""
        for problem in self.overlay_problems(role, outputs):
            raise problem.error()

    def overlay_problems(self, role: str, outputs: Mapping[str, Derivation]) -> Iterator[QuantizedProblem]:
        """Yield a problem for each weight that is quantised in one of this input and the target, or differently.

        All parts of a quantised weight may replace the same parts of the same scheme, with the same dtypes and shapes.
        ``outputs`` are the new keys of the input.
        """
        if self.target is None or not self:
            return
        infos = self.sources[role]
        steps = [
            Step(under_key(infos[derivation.sources[0]], new), tuple(Source(role, key) for key in derivation.sources))
            for new, derivation in outputs.items()
        ]
        for (_, weight), uses in self._uses(steps).items():
            problem = self._overlay_problem(role, weight, uses)
            if problem is not None:
                yield problem
        yield from self._plain_problems(steps)

    def problems(self, steps: Iterable[Step]) -> Iterator[QuantizedProblem]:
        """Yield a problem for each quantised weight that the steps cast, compute with, take apart, or overlay.

        Plain numbers may replace a weight of the target if the output has none of its parts. A patch makes whole
        weights of other bytes, which its digests prove.
        """
        steps = [step for step in steps if not step.is_patched] if self else []
        if not steps:
            return
        used = self._uses(steps)
        names = self._find_new_names(used)
        for (role, weight), uses in used.items():
            problem = (
                _changed_problem(weight, uses)
                or self._overlay_problem(role, weight, uses)
                or _cast_problem(self.sources[role], weight, uses)
                or _parted_problem(weight, uses, names)
            )
            if problem is not None:
                yield problem
        yield from self._plain_problems(steps, self._gone(steps))

    def _gone(self, steps: Sequence[Step]) -> Iterator[str]:
        """Yield the quantised weights of the target of which the output has no part."""
        copied: set[str] = set()
        for step in steps if self.in_target else ():
            decoded = _dequantized(step)
            copied |= {s.key for at, s in enumerate(step.sources) if s.role == self.target_role and at not in decoded}
        dtypes = {step.out.key: step.out.dtype for step in steps} if self.in_target else {}
        for weight in self.in_target.weights:
            coded = self.target_infos.get(weight.coded)
            if copied.isdisjoint(weight.parts) and coded is not None and dtypes.get(weight.coded) != coded.dtype:
                yield weight.key

    def _uses(self, steps: Iterable[Step]) -> _Used:
        uses: _Used = {}
        for step in steps:
            decoded = _dequantized(step)
            for number, source in enumerate((*step.sources, *step.equals)):
                if number in decoded:
                    continue
                weight = self.weights[source.role].by_key.get(source.key)
                if weight is not None:
                    uses.setdefault((source.role, weight), []).append((source.key, step))
        return uses

    def _find_new_names(self, used: _Used) -> Quantized:
        """Return the quantised weights of the output, found by the names, dtypes and shapes of the copied parts.

        Configuration files are not read: the output may have none. Without renames the result is empty.
        """
        if all(step.out.key == part for uses in used.values() for part, step in uses):
            return Quantized()
        outs = {
            step.out.key: under_key(self.sources[role][part], step.out.key)
            for (role, _), uses in used.items()
            for part, step in uses
        }
        return quantized_weights(as_checkpoint(outs, "output"))

    def _overlay_problem(self, role: str, weight: QuantizedWeight, uses: _Uses) -> QuantizedProblem | None:
        if self.target is None or role == self.target_role:
            return None
        outs = {step.out.key: part for part, step in uses}
        for out, part in outs.items():
            if part == weight.coded:
                problem = self._other_form_problem(weight, out, uses)
                if problem is not None:
                    return problem
        for out, part in outs.items():
            other = self.in_target.by_key.get(out)
            if other is None:
                if out in self.target_infos:
                    return _problem(weight, part, uses, self._has(part, out, "plain "))
                continue
            reason = self._difference(role, part, out) or self._other_parts(other, outs)
            if other.scheme != weight.scheme and (reason or self._are_both_configured(role)):
                reason = f"and in {self.where} as {other.scheme}"
            if reason:
                return _problem(weight, part, uses, reason)
        return None

    def _difference(self, role: str, part: str, out: str) -> str:
        info, wanted = self.sources[role][part], self.target_infos[out]
        is_same = (info.dtype, info.shape) == (wanted.dtype, wanted.shape)
        return "" if is_same else f"with {quoted(part)} as {info}, {self._has(part, out)}"

    def _other_parts(self, other: QuantizedWeight, outs: Mapping[str, str]) -> str:
        lacking = [key for key in other.parts if key not in outs]
        if lacking:
            return f"and {self.where} also has its part {quoted(lacking[0])}"
        extra = [part for out, part in outs.items() if out not in self.target_infos]
        return f"and {self.where} does not have its part {quoted(extra[0])}" if extra else ""

    def _are_both_configured(self, role: str) -> bool:
        """Return whether configuration files name the scheme on both sides; else only the parts can be compared."""
        sides = (self.sources[role], self.target)
        return all(side is not None and read_configuration(side).methods for side in sides)

    def _other_form_problem(self, weight: QuantizedWeight, coded: str, uses: _Uses) -> QuantizedProblem | None:
        """Return the problem that the target has this weight under the name that it has without quantisation."""
        name = weight.renamed_key(coded)
        if name is None or name in self.in_target.by_key:
            return None
        other = self.by_name.get(name)
        if other is not None and other.scheme != weight.scheme:
            return _problem(weight, weight.coded, uses, f"and in {self.where} as {other.scheme}")
        if other is None and name in self.target_infos:
            problem = _problem(weight, weight.coded, uses, self._has(weight.coded, name, "plain "))
            return replace(problem, outs=(*problem.outs, name))
        return None

    def _has(self, key: str, out: str, plain: str = "") -> str:
        """Return a clause about the tensor ``out`` of the target, where an input has ``key``."""
        name = "it" if out == key else quoted(out)
        return f"and {self.where} has {name} as {plain}{self.target_infos[out]}"

    def _plain_problems(self, steps: Iterable[Step], gone: Iterable[str] = ()) -> Iterator[QuantizedProblem]:
        """Yield a problem for each quantised weight of the target that plain tensors would replace, but not if gone."""
        found = set(gone)
        for step in steps if self.in_target else ():
            weight = self.in_target.by_key.get(step.out.key) or self.by_name.get(step.out.key)
            source = step.sources[0]
            if weight is None or weight.key in found or source.role == self.target_role:
                continue
            if source.key not in self.weights[source.role].by_key:
                found.add(weight.key)
                info = self.sources[source.role][source.key]
                message = (
                    f"{quoted(weight.key)} is quantised ({weight.scheme}) in {self.where}, "
                    f"and {quoted(source.key)} of the {source.role} is plain {info}"
                )
                hint = f"to make {self.where} plain: {weight.ways_out}"
                if self.target is not None and self.target.model is not None:
                    hint = (
                        "build the model without quantisation; or load weights that are quantised as its own are, "
                        "without --dequantize"
                    )
                yield QuantizedProblem(weight.key, (step.out.key,), message, hint)


class _HasSteps(Protocol):
    """A plan, without an import of its class: a plan calls this module to check itself."""

    @property
    def steps(self) -> Sequence[Step]: ...


_PlanT = TypeVar("_PlanT", bound=_HasSteps)


def check_quantized(plan: _PlanT, inputs: QuantizedInputs) -> _PlanT:
    """Return ``plan``; raise ``PlanError`` where it would take a part of a quantised weight for numbers.

    Every function that makes a plan of inputs returns it through this check.
    """
    for problem in inputs.problems(plan.steps):
        raise problem.error()
    return plan


def _dequantized(step: Step) -> frozenset[int]:
    """Return the numbers of the sources that a step dequantises."""
    if step.recipe is None:
        return frozenset()
    from ckptkit.tensor_ops.recipes import dequantized_sources

    return dequantized_sources(step.recipe)


def already_quantised(weight: QuantizedWeight) -> PlanError:
    """Return the error for a weight that is to be quantised, and is."""
    return PlanError(f"{quoted(weight.key)} is already quantised ({weight.scheme})", hint=weight.ways_out)


def refuse_part(quantized: Quantized, key: str, reason: str) -> None:
    """Raise ``PlanError`` with this reason if ``key`` is a part of a quantised weight."""
    weight = quantized.by_key.get(key)
    if weight is not None:
        raise _problem(weight, key, (), reason).error()


def _problem(weight: QuantizedWeight, part: str, uses: _Uses, reason: str, hint: str = "") -> QuantizedProblem:
    if part in (weight.key, weight.coded):
        subject = f"{quoted(part)} is quantised ({weight.scheme})"
    else:
        subject = f"{quoted(part)} belongs to {quoted(weight.key)}, which is quantised ({weight.scheme})"
    outs = tuple(dict.fromkeys(step.out.key for _, step in uses))
    return QuantizedProblem(weight.key, outs, f"{subject}, {reason}", hint or weight.ways_out)


def _changed_problem(weight: QuantizedWeight, uses: _Uses) -> QuantizedProblem | None:
    for part, step in uses:
        if step.recipe is not None:
            return _problem(weight, part, uses, change_reason(step.recipe.outline()))
    return None


def _cast_problem(infos: Mapping[str, TensorInfo], weight: QuantizedWeight, uses: _Uses) -> QuantizedProblem | None:
    for part, step in uses:
        if step.out.dtype != infos[part].dtype:
            return _problem(weight, part, uses, _cast_reason(step.out.dtype))
    return None


def change_reason(doing: str) -> str:
    """Return the reason to refuse an operation on a part of a quantised weight."""
    return f"so {doing} would take its codes for numbers"


def _cast_reason(dtype: str) -> str:
    return f"so a cast to {dtype} would not dequantise it"


def _cast_rule(dtype: str) -> str:
    return f'from = "*norm.*", to = "*norm.*", op = {{ cast = {{ dtype = "{dtype}" }} }}'


def _parted_problem(weight: QuantizedWeight, uses: _Uses, names: Quantized) -> QuantizedProblem | None:
    """Return the problem that the output lacks some parts of a weight, or has them under names that do not fit.

    ``names`` has the quantised weights of the output.
    """
    outs = {step.out.key: part for part, step in uses}
    left_out = [part for part in weight.parts if part not in set(outs.values())]
    if left_out:
        reason = f"and the output would have {quoted(uses[0][0])} without {quoted(left_out[0])}"
        return _problem(weight, weight.coded, uses, reason, "keep, rename or drop all its parts together")
    if weight.missing or _have_new_module(weight, outs):
        return None
    for out in outs:
        found = names.by_key.get(out)
        if found is None or {outs.get(key) for key in found.parts} != set(weight.parts):
            reason = f"and its parts would be called {listed(outs, 4)}, which are not the parts of one weight"
            hint = f"rename all its parts alike: --rename {shell_word(f'{_module(weight)}*=NEW.*')}"
            return _problem(weight, weight.coded, uses, reason, hint)
    return None


def _have_new_module(weight: QuantizedWeight, outs: Mapping[str, str]) -> bool:
    """Return whether all parts are in each new module, under the names that they have in their module now."""
    module = _module(weight)
    modules: dict[str, set[str]] = {}
    for out, part in outs.items():
        name = part.removeprefix(module)
        new = out.removesuffix(name)
        if not out.endswith(name) or (new and not new.endswith(".")):
            return False
        modules.setdefault(new, set()).add(part)
    return all(parts == set(weight.parts) for parts in modules.values())


def _module(weight: QuantizedWeight) -> str:
    module, dot, _ = weight.key.rpartition(".")
    return module + dot
