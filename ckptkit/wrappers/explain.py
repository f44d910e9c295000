"""Find the wrappers whose prefixes or segments are in a set of keys, and the renames that remove them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckptkit.core.patterns import Template, literal, parse_pattern, parse_template
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.wrappers.table import ATTRIBUTE, PARAMETRIZATIONS, WRAPPERS, Parametrization, Wrapper

__all__ = ["AUTO", "WrapperExplanation", "Wrapping", "explain_wrappers", "strip_prefix"]

AUTO = "auto"
_LIGHTNING_KEY = "pytorch-lightning_version"
_MOST_WRAPPINGS = 32  # each wrapping costs a pass over all keys, and a hostile file can nest any number
_MOST_SEGMENTS = 64
_STEM = re.compile(r"(?:weight|bias)\w*")


@dataclass(frozen=True, slots=True)
class Wrapping:
    """One wrapper found in the keys: its mark, the renames that remove the mark, and the wrapper's own keys to drop."""

    mark: str
    origin: str
    keys: int
    renames: tuple[Template, ...]
    drops: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return what is removed, such as ``'module.' (DataParallel, DistributedDataParallel) from 148 keys``."""
        without = f", without {', '.join(map(quoted, self.drops))}" if self.drops else ""
        origin = f" ({self.origin})" if self.origin else ""
        return f"{quoted(self.mark)}{origin} from {plural(self.keys, 'key')}{without}"

    def undo(self, name: str) -> str:
        """Return the key without the mark of this wrapper."""
        return next((made for template in self.renames if (made := template.apply(name)) is not None), name)


@dataclass(frozen=True, slots=True)
class WrapperExplanation:
    """The wrappers found in a set of keys, outermost first, and notes on what renaming cannot undo."""

    wrappings: tuple[Wrapping, ...]
    notes: tuple[str, ...]


def explain_wrappers(
    keys: Collection[str], other_entries: Collection[str] = (), expected: Collection[str] | None = None
) -> WrapperExplanation:
    """Return the known wrappers that these keys show; ``other_entries`` names the other entries of the file.

    ``expected`` has the keys of the model, where they are known; a note then names only a prefix that it lacks.
    A mark is the prefix or segment that a wrapper adds to keys. Raises ``RuleError`` if some keys lack a mark, or if
    renaming cannot undo a wrapper. The error names an example with the mark and an example without.
    """
    names = list(keys)
    found: list[Wrapping] = []
    is_lightning = _LIGHTNING_KEY in other_entries
    while True:
        wrapping = _outermost(names, {wrapping.mark.strip(".") for wrapping in found})
        if wrapping is None and is_lightning:
            is_lightning, wrapping = False, _lightning_attribute(names)
        if wrapping is None:
            break
        if len(found) == _MOST_WRAPPINGS:
            raise RuleError(f"{quoted(names[0])} is wrapped more than {_MOST_WRAPPINGS} times")
        found.append(wrapping)
        names = [wrapping.undo(name) for name in names if name not in wrapping.drops]
    return WrapperExplanation(
        tuple(found), (*_parametrization_notes(names), *_average_notes(names), *_prefix_notes(names, found, expected))
    )


def strip_prefix(prefix: str, keys: Collection[str]) -> Wrapping:
    """Return the wrapping that removes ``prefix`` from every key and drops the own keys of its wrapper.

    Raises ``RuleError`` naming a key that does not begin with the prefix.
    """
    if not any(key.startswith(prefix) for key in keys):
        hint = f"the checkpoint has {listed(list(keys), 3)}" if keys else None
        raise RuleError(f"--strip {shell_word(prefix)} begins none of {plural(len(keys), 'key')}", hint=hint)
    dotted = next((key for key in keys if key.startswith(f"{prefix}.")), None)
    if dotted is not None:
        raise RuleError(
            f"--strip {shell_word(prefix)} would leave a dot at the start of {quoted(dotted)}",
            hint=f"write --strip {shell_word(f'{prefix}.')}",
        )
    rows = (row for row in WRAPPERS if not row.anywhere and f"{row.mark}." == prefix and _applies(row, keys))
    return _prefixed(next(rows, Wrapper(prefix, "")), list(keys), prefix)


def _outermost(names: Sequence[str], undone: Collection[str]) -> Wrapping | None:
    for row in WRAPPERS:
        if row.after and row.after not in undone:
            continue
        if row.anywhere:
            having = [name for name in names if _mark_positions(name, row.mark)]
        else:
            having = [name for name in names if name.startswith(f"{row.mark}.")] if _applies(row, names) else []
        if having:
            _check_supported(row, names)
            return _inside_keys(row, names, having) if row.anywhere else _prefixed(row, names, f"{row.mark}.")
    return None


def _applies(row: Wrapper, names: Collection[str]) -> bool:
    return not row.own_keys or not set(row.own_keys).isdisjoint(names)


def _prefixed(row: Wrapper, names: Sequence[str], prefix: str) -> Wrapping:
    having = [name for name in names if name.startswith(prefix)]
    without = [name for name in names if not name.startswith(prefix) and name not in row.own_keys]
    if without:
        keep, rename = shell_word(f"{prefix}*"), shell_word(f"{prefix}*=*")
        raise _mixed_keys(
            row,
            prefix,
            (having[0], without[0]),
            f"{len(having):,} of {plural(len(names), 'key')}",
            f"--keep {keep} keeps only the keys with the prefix; --rename {rename} in place of --strip renames these "
            "keys and keeps all others",
        )
    drops = tuple(name for name in names if not name.startswith(prefix))
    return Wrapping(prefix, row.origin, len(having), (_rename(f"{prefix}*", "*", prefix),), drops)


def _inside_keys(row: Wrapper, names: Sequence[str], having: Sequence[str]) -> Wrapping:
    """Return the wrapping by a mark that can be anywhere in a key.

    Raises ``RuleError`` if only some keys of a module have the mark.
    """
    parents = {name[:at] for name in having for at in _mark_positions(name, row.mark)}
    is_inside = parents != {""}
    for name in names:
        for at in (0, *(_segment_starts(name) if is_inside else ())):
            if name[:at] in parents and not name.startswith(f"{row.mark}.", at):
                marked = f"{name[:at]}{row.mark}."
                example = next(key for key in having if key.startswith(marked))
                rename = shell_word(f"{marked}*={name[:at]}*")
                raise _mixed_keys(
                    row,
                    marked,
                    (example, name),
                    "only some keys",
                    f"give --rename {rename} in place of --strip",
                )
    renames = [_rename(f"{row.mark}.*", "*"), _rename(f"*.{row.mark}.*", "*.*")]
    at_start = [name.startswith(f"{row.mark}.") for name in having]
    needed = [rename for rename, used in zip(renames, (any(at_start), not all(at_start)), strict=True) if used]
    return Wrapping(f".{row.mark}.", row.origin, len(having), tuple(needed))


def _mark_positions(name: str, mark: str) -> list[int]:
    """Return the positions at which the mark is in the key as whole segments, followed by another segment."""
    if f"{mark}." not in name:
        return []
    places = [0] if name.startswith(f"{mark}.") else []
    at = name.find(f".{mark}.")
    while at >= 0 and len(places) < _MOST_SEGMENTS:
        places.append(at + 1)
        at = name.find(f".{mark}.", at + 1)
    return places


def _segment_starts(name: str) -> Iterator[int]:
    """Yield the position of each segment after the first, up to a limit that only hostile keys exceed."""
    at = name.find(".") + 1
    for _ in range(_MOST_SEGMENTS):
        if not at:
            return
        yield at
        at = name.find(".", at) + 1


def _rename(old: str, new: str, prefix: str = "") -> Template:
    if prefix and literal(prefix) != prefix:  # the prefix has characters with a meaning in patterns
        return parse_template(r"\1", parse_pattern(f"re:{re.escape(prefix)}(.*)"))
    return parse_template(new, parse_pattern(old))


def _mixed_keys(row: Wrapper, mark: str, examples: tuple[str, str], where: str, hint: str) -> RuleError:
    origin = f" ({row.origin})" if row.origin else ""
    having, without = map(quoted, examples)
    return RuleError(f"{quoted(mark)}{origin} is on {where}: on {having}, but not on {without}", hint=hint)


def _check_supported(row: Wrapper, names: Sequence[str]) -> None:
    unsupported = row.unsupported
    found = [name for name in names if not unsupported.isdisjoint(name.split("."))] if unsupported else []
    if found:
        raise RuleError(
            f"{quoted(f'{row.mark}.')} ({row.origin}) is on {plural(len(found), 'key')} that renaming cannot undo, "
            f"such as {quoted(found[0])}",
            hint=row.hint,
        )


def _lightning_attribute(names: Sequence[str]) -> Wrapping | None:
    """Return the wrapping by the only attribute of a LightningModule, which holds the whole model."""
    shared = _shared_segment(names)
    return None if shared is None else _prefixed(ATTRIBUTE, names, f"{shared}.")


def _shared_segment(names: Sequence[str]) -> str | None:
    heads = {name.partition(".")[0] if "." in name else "" for name in names}
    return next(iter(heads)) or None if len(heads) == 1 else None


def _prefix_notes(names: Sequence[str], found: Sequence[Wrapping], expected: Collection[str] | None) -> Iterator[str]:
    shared = None if found else _shared_segment(names)
    if shared is None:
        return
    prefix, why = f"{shared}.", "which may be a module of the model"
    if expected is not None:
        prefix, why = _unexpected_prefix(names, expected), "and without it, keys match those of the model"
    if prefix:
        yield f"every key begins with {quoted(prefix)}, {why}: --strip {shell_word(prefix)} removes it"


def _unexpected_prefix(names: Sequence[str], expected: Collection[str]) -> str:
    """Return the shortest prefix of all names without which one is expected; empty if there is none, or none is needed.

    Names that are expected as they are need none.
    """
    first, last = min(names), max(names)  # what these share, all share
    end = 0
    for _ in range(_MOST_SEGMENTS):
        if any(name[end:] in expected for name in names):
            return first[:end]
        end = first.find(".", end) + 1
        if not end or first[:end] != last[:end]:
            break
    return ""


def _parametrization_notes(names: Sequence[str]) -> Iterator[str]:
    """Yield a note for each parametrization found, with the rule that folds its tensors into one."""
    present, explained = set(names), set[str]()
    for row in PARAMETRIZATIONS:
        first, *others = row.endings
        stems = [name.removesuffix(first) for name in names if name.endswith(first)]
        stems = [
            stem
            for stem in stems
            if stem not in explained and _is_stem(stem, row) and all(f"{stem}{other}" in present for other in others)
        ]
        explained.update(stems)
        if stems:
            yield _parametrization_note(row, stems)


def _is_stem(stem: str, row: Parametrization) -> bool:
    parent, _, name = stem.rpartition(".")
    if row.parent:
        return bool(name) and f".{parent}.".endswith(f".{row.parent}")
    return _STEM.fullmatch(name) is not None


def _parametrization_note(row: Parametrization, stems: Sequence[str]) -> str:
    text = f"{quoted(f'{stems[0]}{row.endings[0]}')} and {len(stems) - 1:,} more come from {row.origin}"
    if not stems[1:]:
        text = f"{quoted(f'{stems[0]}{row.endings[0]}')} comes from {row.origin}"
    if not row.operation:
        return f"{text}: code outside the file computes the values, so the keys are not changed"
    name = stems[0].rpartition(".")[2]
    old = ", ".join(f'"*{row.parent}{name}{ending}"' for ending in row.endings)
    return f'{text}; renaming cannot undo it, this rule can: from = [{old}], to = "*{name}", op = "{row.operation}"'


def _average_notes(names: Sequence[str]) -> Iterator[str]:
    """Yield a note if the keys include an average of the model, with names without dots."""
    bare = {name.removeprefix("model.").replace(".", "") for name in names if name.startswith("model.")}
    found = [name for name in names if name.startswith("model_ema.") and name.removeprefix("model_ema.") in bare]
    if found:
        yield (
            f"{listed(found, 1)}: averages of 'model.*', with names without dots (LitEma of latent diffusion); "
            "these keys are not changed"
        )
