"""What one parameter trains with: the options of its owner, then every modifier that fits, in order, each step told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.spec import GroupRule, Modifier, ParamGroupSpec, number_fault

__all__ = ["Applied", "Said", "resolve"]


@dataclass(frozen=True, slots=True)
class Applied:
    """A modifier that applies; with layers, in which layer the parameter lies and what its lr is multiplied by."""

    modifier: Modifier
    layer: int | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Said:
    """One step: ``who`` made option ``key`` into ``value``, multiplying it by ``factor`` where that is not None."""

    who: str
    key: str
    value: Any
    factor: float | None = None


def resolve(spec: ParamGroupSpec, rule: GroupRule, applied: Sequence[Applied]) -> tuple[dict[str, Any], list[Said]]:
    """Return the options that the optimizer gets, and how they came about.

    Each speaker sets options and then multiplies what stands; the learning rate comes out as a number, and beside it,
    where the spec asks for ``lr_scale``, as the number before all multiples with their product. Raises ``GroupsError``
    where multiples make of a number what is none to train with.
    """
    said = [Said("defaults", key, value) for key, value in spec.given(rule).items()]
    options = spec.given(rule)
    scale = 1.0

    def speak(who: str, values: Mapping[str, Any], multiples: Mapping[str, float]) -> None:
        nonlocal scale
        for key, value in values.items():
            options[key] = value
            scale = 1.0 if key == "lr" else scale
            said.append(Said(who, key, value))
        for key, factor in multiples.items():
            if key == "lr" and spec.lr_scale:
                scale *= factor
                said.append(Said(who, "lr_scale", scale, factor))
            else:
                options[key] = options[key] * factor
                said.append(Said(who, key, options[key], factor))

    speak(rule.name, rule.options, rule.multiples)
    for one in applied:
        speak(one.modifier.name, one.modifier.options, one.modifier.multiples)
        if one.layer is not None:
            speak(f"{one.modifier.name}, layer {one.layer}", {}, {"lr": one.scale})
    if spec.lr_scale:
        options["lr_scale"] = scale
    for one_said in said:
        fault = None if one_said.factor is None else number_fault(options[one_said.key])
        if fault is not None:
            raise GroupsError(
                f"{quoted(one_said.key)} of group {quoted(rule.name)}, multiplied by all that fit, {fault}",
                hint=f"ckpt groups explain tells each step; {quoted(one_said.who)} is one of them",
            )
    return options, said
