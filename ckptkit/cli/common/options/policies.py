"""The options of policies: an action for every key, or an action for the keys that match a pattern."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click

from ckptkit.cli.common.completing import complete_policies
from ckptkit.cli.common.options import CommandFunction
from ckptkit.core.text import shell_word
from ckptkit.plans.policies import ALL_OTHERS

__all__ = ["policy_option"]


def policy_option(
    name: str, actions: Sequence[str], default: str, summary: str
) -> Callable[[CommandFunction], CommandFunction]:
    """Return the repeatable option ``name``, which the command gets as a mapping of patterns to actions."""

    def parse(context: click.Context, option: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
        mapping: dict[str, str] = {}
        for text in texts:
            before, equals, action = text.rpartition("=")  # an action has no "=", and a pattern can have some
            pattern = before if equals else ALL_OTHERS
            if action not in actions:
                raise click.BadParameter(f"{action!r} is not one of {', '.join(map(repr, actions))}.", context, option)
            if pattern in mapping:
                given = "an action for all other keys" if pattern == ALL_OTHERS else shell_word(pattern)
                raise click.BadParameter(f"{given} is given twice.", context, option)
            mapping[pattern] = action
        return mapping

    return click.option(
        name,
        metavar="[PATTERN=]ACTION",
        multiple=True,
        default=(default,),
        show_default=True,
        callback=parse,
        shell_complete=lambda context, _option, incomplete: complete_policies(context, actions, incomplete),
        help=f"{summary} ACTION is {', '.join(actions[:-1])} or {actions[-1]}. Repeatable.",
    )
