"""The errors for a base that does not get from its donors what it needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ckptkit.comparison.hints import joined_hint
from ckptkit.comparison.library import library_hint
from ckptkit.comparison.parts import align_command, find_parted
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.coverage.requirements import Requirements, find_unmet
from ckptkit.core.patterns import pattern_for
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import listed, plural
from ckptkit.errors import ModelError, PlanError
from ckptkit.plans.overlays.choices import Sides
from ckptkit.plans.overlays.mismatch_hints import Spelling, for_others, in_python, mismatch_hint, on_command_line
from ckptkit.plans.overlays.overlay import Overlay

__all__ = ["refuse_missing", "refuse_parted", "refuse_unmet"]

_OTHER_SHAPES = "take the values from a checkpoint that has these shapes"


def refuse_unmet(
    requirements: Requirements, base: Checkpoint, filled: Collection[str], overlays: Sequence[Overlay], sides: Sides
) -> None:
    """Raise the error of the first requirement that the plan does not meet."""
    reasons = {drop.wanted: drop.reason for overlay in overlays for drop in overlay.dropped if drop.wanted}
    source = f"the {sides.donor}" if sides.donor else "the donor" if len(overlays) == 1 else "the donors"
    unmet = find_unmet(requirements, base, set(filled), reasons, of=f"the {sides.base}", source=source)
    if not unmet:
        return
    rename = next((joined_hint(overlay.hints) for overlay in overlays if overlay.hints), None)
    if all(key in reasons for key in unmet[0].keys):
        pairs = {key: pair for overlay in overlays for key, pair in overlay.mismatched.items()}
        empty = [pairs[key] for key in unmet[0].keys if key in pairs]
        hint, call = (
            f"require less, or {mismatch_hint(empty, spell, sides, skips=False) or _OTHER_SHAPES}"
            for spell in (on_command_line, in_python)
        )
    elif rename is not None:
        hint, call = rename, None
    else:
        hint = "require less, or rename the keys of DONOR: ckpt align BASE DONOR -o rules.toml finds rules for --rules"
        call = "require less, or rename the keys with the rules that suggest_rules finds"
    error = ModelError if sides.is_loading else PlanError
    raise error(unmet[0].message, hint=hint, call=call)


def refuse_missing(keys: Sequence[str], sides: Sides) -> None:
    """Raise ``PlanError`` for keys that no donor has, if there are any."""

    def hint(spell: Spelling) -> str:
        keep = spell("on_missing", pattern_for(keys[0], keys), "keep")
        return f"{keep} keeps the {sides.base}'s own values{for_others(keys, spell)}"

    if keys:
        nothing = f"the {sides.donor} has no" if sides.donor else "no donor has"
        raise PlanError(f"{nothing} {listed(keys, 1)}", hint=hint(on_command_line), call=hint(in_python))


def refuse_parted(base: Checkpoint, missing: Sequence[str], donor: Checkpoint, overlay: Overlay, sides: Sides) -> None:
    """Raise ``PlanError`` where a donor has the values of missing keys in parts, or several of them in one tensor."""
    parted = find_parted({key: base[key] for key in missing}, overlay.unexpected) if overlay.unexpected else ()
    if not parted:
        return
    keys = [key for one in parted for key in one.expected]
    others = len(keys) - len(parted[0].expected)
    more = f"; so it is with {plural(others, 'more key')}" if others else ""
    sentence = parted[0].sentence(f"the {sides.base}", f"the {sides.donor or overlay.role}")
    summary = CheckpointSummary.of(base)
    by_library = library_hint(summary.library_names, "{}").partition("{}")[0]
    command = align_command(summary, CheckpointSummary.of(donor))
    call = f"{{}} looks for the rules; {{}} keeps the {sides.base}'s values"
    if by_library:
        call = f"{by_library}{{}}; {{}} keeps the {sides.base}'s values"
    raise PlanError(
        f"{sentence}{more}",
        hint=call.format("--rules transformers:auto" if by_library else command, "--on-missing keep"),
        call=call.format(
            "rules='transformers:auto'"
            if by_library
            else f"suggest_rules({sides.base}, {sides.donor or overlay.role})",
            "on_missing='keep'",
        ),
    )
