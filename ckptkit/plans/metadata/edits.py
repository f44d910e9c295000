"""Items that the user writes into the metadata of an output, or leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.core.arguments import refuse, require_strings, require_type
from ckptkit.core.patterns import matches_any, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import OutputError, RuleError
from ckptkit.plans.metadata import loss_of_metadata
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan

__all__ = ["edit_metadata", "refuse_without_metadata"]

_FORMAT = "format"
_AS_TORCH = "pt"  # what torch's writers say, and what readers of models ask for
_TAKES = "a mapping of str to str"
_WAY_OUT = "give the output the suffix .safetensors"


def edit_metadata(plan: Plan, metadata: Mapping[str, str] | None = None, drop: str | Sequence[str] = ()) -> Plan:
    """Return the plan without the items whose names match a pattern of ``drop``, then with the items of ``metadata``.

    Where only the given items would be metadata, ``format`` becomes ``pt``: older transformers refuse metadata without
    it. A note says so, and another one names what is lost with an item that describes tensors.

    Raises ``ArgumentError`` where names or values are not str. Raises ``RuleError`` where they are not Unicode text,
    and where a pattern is not valid or matches no item.
    """
    given, texts = _checked(metadata, drop)
    for name, text in given.items():
        if not (_is_unicode(name) and _is_unicode(text)):
            raise RuleError(f"the metadata {quoted(name)} is not Unicode text", hint="safetensors stores UTF-8")
    patterns = list(map(parse_pattern, texts))
    for pattern in patterns:
        if not any(map(pattern.match, plan.metadata)):
            count = plural(len(plan.metadata), "item")
            raise RuleError(
                f"--drop-metadata {shell_word(pattern.text)} matches none of {count} of metadata",
                hint=suggest_pattern(pattern, plan.metadata, "the metadata") if plan.metadata else "leave it out",
            )
    if not given and not patterns:
        return plan
    dropped = {name: text for name, text in plan.metadata.items() if matches_any(patterns, name)}
    result = {name: text for name, text in plan.metadata.items() if name not in dropped} | given
    lost = [name for name in dropped if name not in result]
    notes = []
    if loss := loss_of_metadata({name: dropped[name] for name in lost}, [step.out.key for step in plan.steps]):
        notes.append(f"the metadata {listed(lost)} is left out{loss}")
    if result and _FORMAT not in result:
        if _FORMAT in dropped:
            notes.append("the metadata has no format, which older transformers refuse; --metadata 'format=pt' adds it")
        elif not plan.metadata:
            result = {_FORMAT: _AS_TORCH, **result}
            notes.append("the metadata also says format=pt, since older transformers refuse metadata without a format")
    return replace(plan, metadata=result, notes=(*plan.notes, *notes))


def refuse_without_metadata(
    output: Output, metadata: Mapping[str, str] | None = None, drop: str | Sequence[str] = ()
) -> None:
    """Raise ``OutputError`` where an output has no place for the metadata that the user gives or leaves out."""
    if any(_checked(metadata, drop)) and output.format != "safetensors":
        raise OutputError(
            "--metadata and --drop-metadata are for safetensors: this output has no such metadata",
            hint=f"leave the options out, or {_WAY_OUT}",
            call=f"leave the arguments out, or {_WAY_OUT}",
            path=output.path,
        )


def _checked(metadata: object, drop: object) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the items and the patterns; raise ``ArgumentError`` where they are of a wrong type."""
    require_type(metadata, Mapping | None, "metadata", _TAKES)
    given = dict(metadata) if isinstance(metadata, Mapping) else {}
    if not all(isinstance(text, str) for item in given.items() for text in item):
        refuse(metadata, "metadata", _TAKES)
    return given, require_strings(drop, "drop_metadata", "a pattern or several")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
