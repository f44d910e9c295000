"""Why a parameter trains with what: its owner, who else would have taken it, and every step to each option."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptkit.core.text import kind_of, quoted
from ckptkit.errors import GroupsError
from ckptkit.param_groups.ownership import Said, Speakers, resolve
from ckptkit.param_groups.parse import SpecLike, parse_spec
from ckptkit.param_groups.properties import ParameterFacts, subject_of

__all__ = ["Explanation", "explain_param_group"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a spec says of one parameter.

    ``rule`` owns it (None: nobody does), ``shadowed`` fit it too but stand below, ``modifiers`` apply in this order,
    ``steps`` lead to ``options``. ``outcome`` is ``trained``, ``frozen`` (in the model), ``freeze`` (by the spec) or
    ``unowned``.
    """

    facts: ParameterFacts
    outcome: str
    rule: str | None
    shadowed: tuple[str, ...] = ()
    modifiers: tuple[str, ...] = ()
    layer: int | None = None
    steps: tuple[Said, ...] = ()
    options: Mapping[str, Any] | None = None


def explain_param_group(model: Any, spec: SpecLike, name: str) -> Explanation:
    """Return which rules of ``spec`` speak for the parameter ``name`` of ``model``, and what comes of it.

    ``model`` is what ``plan_param_groups`` takes; a tied parameter may be asked for by any of its names, and is
    answered for as its first. Raises ``GroupsError`` where the model has no parameter of that name.
    """
    if not isinstance(name, str):
        raise GroupsError(f"the name of a parameter is {kind_of(name)}", hint="ask for one as named_parameters has it")
    subject, spec = subject_of(model), parse_spec(spec)
    facts = next((one for one in subject.parameters if any(name == alias.name for alias in one.named())), None)
    if facts is None:
        near = difflib.get_close_matches(name, subject.by_name, n=1, cutoff=0.5)
        what = "a buffer, which no optimizer trains" if name in subject.buffers else "no parameter of the model"
        raise GroupsError(
            f"{quoted(name)} is {what}",
            hint=f"did you mean {quoted(near[0])}?" if near else "ckpt show lists the names",
        )
    speakers = Speakers(spec, subject)
    owner = speakers.owner(facts)
    rule = None if owner is None else spec.rules[owner]
    named = None if rule is None else rule.name
    others = [other.name for other in speakers.fitting(facts) if other is not rule]
    if spec.rules[-1].rest and spec.rules[-1] is not rule:
        others.append(spec.rules[-1].name)
    if not facts.trainable and spec.frozen != "include":
        return Explanation(facts, "frozen", named, tuple(others))
    if rule is None or rule.freeze:
        outcome = "freeze" if rule is not None or spec.unmatched == "freeze" else "unowned"
        return Explanation(facts, outcome, named, tuple(others))
    applied = speakers.modifiers(facts)
    options, steps = resolve(spec, rule, applied)
    return Explanation(
        facts,
        "trained",
        rule.name,
        tuple(others),
        tuple(one.modifier.name for one in applied),
        next((one.layer for one in applied if one.layer is not None), None),
        tuple(steps),
        options,
    )
