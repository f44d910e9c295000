"""``--strip``: what wrappers put around keys, undone by ordinary renames and drops, and said."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ckptkit.core.patterns import literal, parse_pattern
from ckptkit.core.text import plural, shell_word
from ckptkit.rules.model import Rule, Stage
from ckptkit.wrappers import AUTO, Wrapping, explain, take_off

__all__ = ["strip_stages"]


def strip_stages(how: str, keys: Collection[str], beside: Collection[str]) -> tuple[list[Stage], list[str]]:
    """Return the passes that undo ``how``: ``auto`` for what the table explains, else one prefix; and what to say.

    ``beside`` names what the keys' file holds besides. Raises ``RuleError`` where a prefix is not on every key.
    """
    if how != AUTO:
        wrapping = take_off(how, keys)
        return [_stage(wrapping, f"--strip {shell_word(how)}")], [f"--strip: {wrapping}"]
    explanation = explain(keys, beside)
    notes = [f"--strip auto: {wrapping}" for wrapping in explanation.wrappings]
    notes = notes or [f"--strip auto: no wrapper that is known here is on {plural(len(keys), 'key')}"]
    notes += [f"--strip auto: {remark}" for remark in explanation.remarks]
    return [_stage(wrapping, "--strip auto") for wrapping in explanation.wrappings], notes


def _stage(wrapping: Wrapping, where: str) -> Stage:
    return Stage(rules=tuple(_rules(wrapping, where)))


def _rules(wrapping: Wrapping, where: str) -> Iterator[Rule]:
    for key in wrapping.drops:
        yield Rule((parse_pattern(literal(key)),), where=where)
    for template in wrapping.renames:
        yield Rule((template.pattern,), ((template,),), where=where)
