"""Write the groups of a plan as Python source that needs no ckptkit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

from ckptkit.core.text import plural
from ckptkit.errors import GroupsError
from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedGroup

__all__ = ["write_python"]


def write_python(plan: ParamGroupsPlan, title: str) -> str:
    """Return Python source that builds the groups of a plan: one function of the model for each optimizer class.

    The source lists every FQN and needs no ckptkit. It raises ``ValueError`` for a model without one of the names, and
    for a trainable parameter in no group. ``title`` goes into a comment.
    """
    parts = []
    for optimizer in plan.optimizers:
        groups = [group for group in plan.groups if group.optimizer == optimizer]
        several = len(plan.optimizers) > 1
        name = "param_groups" + (f"_{re.sub(r'[^0-9a-z]+', '_', str(optimizer).lower())}" if several else "")
        parts.append("\n".join(_function(name, optimizer, groups, plan, title=title, alone=not several)))
    return "\n\n\n".join(parts)


def _function(
    name: str, optimizer: str | None, groups: list[PlannedGroup], plan: ParamGroupsPlan, *, title: str, alone: bool
) -> Iterator[str]:
    """Yield the lines of one function; ``alone`` says that its groups must hold every trainable parameter."""
    count = sum(len(group.parameters) for group in groups)
    size = f"{plural(count, 'parameter')} in {plural(len(groups), 'group')}"
    yield f"def {name}(model):"
    yield f"    # {' '.join(title.split())}: {size}{f', for {optimizer}' if optimizer else ''}"
    yield "    groups = ["
    for group in groups:
        options = {"name": group.name, **group.options}
        items = ", ".join(f"{_literal(key)}: {_literal(value)}" for key, value in options.items())
        yield f'        {{{items}, "params": ['
        yield from (f"            {_literal(parameter.name)}," for parameter in group.parameters)
        yield "        ]},"
    yield "    ]"
    yield "    named = dict(model.named_parameters())"
    if plan.freeze:
        yield f"    for name in {_literal([parameter.name for parameter in plan.freeze])}:"
        yield "        named[name].requires_grad_(False)"
    yield '    listed = {name for group in groups for name in group["params"]}'
    yield "    unknown = sorted(listed - named.keys())"
    if alone:
        yield "    unknown += [name for name, tensor in named.items() if tensor.requires_grad and name not in listed]"
    yield "    if unknown:"
    yield '        raise ValueError(f"these groups were written for another model: {unknown}")'
    yield "    for group in groups:"
    yield '        group["param_names"] = group["params"]'
    yield '        group["params"] = [named[name] for name in group["params"]]'
    yield "    return groups"


def _literal(value: object) -> str:
    """Return ``value`` as a Python literal."""
    if isinstance(value, str):
        return json.dumps(value) if value.isascii() else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(inner)}' for key, inner in value.items())}}}"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise GroupsError(
        f"an option is a {type(value).__name__}, which has no Python literal", hint="use plain numbers and strings"
    )
