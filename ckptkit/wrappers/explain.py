"""From a set of keys to the wrappers that explain them, in the order in which they are undone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from ckptkit.core.patterns import Template, literal, parse_pattern, parse_template
from ckptkit.core.text import plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.wrappers.table import ATTRIBUTE, PARAMETRIZATIONS, WRAPPERS, Parametrization, Wrapper

__all__ = ["AUTO", "WrapperExplanation", "Wrapping", "explain_wrappers", "strip_prefix"]

AUTO = "auto"
_LIGHTNING = "pytorch-lightning_version"
_MOST_WRAPPINGS = 32  # each costs a pass over all names, and a hostile one can nest for ever
_MOST_SEGMENTS = 64
_STEM = re.compile(r"(?:weight|bias)\w*")


@dataclass(frozen=True, slots=True)
class Wrapping:
    """One wrapper as it is found: on how many keys, the renames that undo it, and what keys of its own go with it."""

    mark: str
    origin: str
    keys: int
    renames: tuple[Template, ...]
    drops: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say what is undone: ``'module.' (DataParallel, DistributedDataParallel) from 148 keys``."""
        without = f", without {', '.join(map(quoted, self.drops))}" if self.drops else ""
        origin = f" ({self.origin})" if self.origin else ""
        return f"{quoted(self.mark)}{origin} from {plural(self.keys, 'key')}{without}"

    def undo(self, name: str) -> str:
        """Return the name without this wrapper."""
        return next((made for template in self.renames if (made := template.apply(name)) is not None), name)


@dataclass(frozen=True, slots=True)
class WrapperExplanation:
    """Which wrappers explain a set of keys, the outermost first, and what is recognised and no renaming undoes."""

    wrappings: tuple[Wrapping, ...]
    remarks: tuple[str, ...]


def explain_wrappers(keys: Collection[str], beside: Collection[str] = ()) -> WrapperExplanation:
    """Return the wrappers that the table knows in these keys; ``beside`` names what else their file holds.

    Raises ``RuleError`` where a wrapper is in some of the keys and not in others where it should be, and where
    they hold what cannot be undone by new names; it names one of each, and the way out.
    """
    names = list(keys)
    found: list[Wrapping] = []
    attribute = _LIGHTNING in beside
    while True:
        wrapping = _outermost(names, {one.mark.strip(".") for one in found})
        if wrapping is None and attribute:
            attribute, wrapping = False, _attribute(names)
        if wrapping is None:
            break
        if len(found) == _MOST_WRAPPINGS:
            raise RuleError(f"{quoted(names[0])} is wrapped more than {_MOST_WRAPPINGS} times")
        found.append(wrapping)
        names = [wrapping.undo(name) for name in names if name not in wrapping.drops]
    return WrapperExplanation(tuple(found), (*_parametrized(names), *_flattened(names), *_maybe(names, found)))


def strip_prefix(prefix: str, keys: Collection[str]) -> Wrapping:
    """Return how ``prefix`` is taken off every key; keys of its wrapper's own go with it.

    Raises ``RuleError`` naming a key that does not begin with it.
    """
    if not any(key.startswith(prefix) for key in keys):
        raise RuleError(f"--strip {shell_word(prefix)} is in front of none of {plural(len(keys), 'key')}")
    dotted = next((key for key in keys if key.startswith(f"{prefix}.")), None)
    if dotted is not None:
        raise RuleError(
            f"--strip {shell_word(prefix)} leaves {quoted(dotted)} a name that begins with a dot",
            hint=f"write --strip {shell_word(f'{prefix}.')}",
        )
    rows = (row for row in WRAPPERS if not row.anywhere and f"{row.mark}." == prefix and _speaks(row, keys))
    return _prefixed(next(rows, Wrapper(prefix, "")), list(keys), prefix)


def _outermost(names: Sequence[str], undone: Collection[str]) -> Wrapping | None:
    for row in WRAPPERS:
        if row.after and row.after not in undone:
            continue
        if row.anywhere:
            having = [name for name in names if _places(name, row.mark)]
        else:
            having = [name for name in names if name.startswith(f"{row.mark}.")] if _speaks(row, names) else []
        if having:
            _refuse(row, names)
            return _infixed(row, names, having) if row.anywhere else _prefixed(row, names, f"{row.mark}.")
    return None


def _speaks(row: Wrapper, names: Collection[str]) -> bool:
    return not row.own or not set(row.own).isdisjoint(names)


def _prefixed(row: Wrapper, names: Sequence[str], prefix: str) -> Wrapping:
    having = [name for name in names if name.startswith(prefix)]
    strangers = [name for name in names if not name.startswith(prefix) and name not in row.own]
    if strangers:
        keep, rename = shell_word(f"{prefix}*"), shell_word(f"{prefix}*=*")
        raise _mixed(
            row,
            prefix,
            (having[0], strangers[0]),
            f"{len(having):,} of {plural(len(names), 'key')}",
            f"say what is meant: --keep {keep} takes only those that have it; --rename {rename} in place of --strip "
            "renames those and leaves the others",
        )
    drops = tuple(name for name in names if not name.startswith(prefix))
    return Wrapping(prefix, row.origin, len(having), (_rename(f"{prefix}*", "*", prefix),), drops)


def _infixed(row: Wrapper, names: Sequence[str], having: Sequence[str]) -> Wrapping:
    """Return the wrapping by a segment that is anywhere; below one module either every name has it, or none."""
    homes = {name[:at] for name in having for at in _places(name, row.mark)}
    inner = homes != {""}
    for name in names:
        for at in (0, *(_dots(name) if inner else ())):
            if name[:at] in homes and not name.startswith(f"{row.mark}.", at):
                home = f"{name[:at]}{row.mark}."
                mate = next(one for one in having if one.startswith(home))
                rename = shell_word(f"{home}*={name[:at]}*")
                raise _mixed(
                    row,
                    home,
                    (mate, name),
                    "some keys only",
                    f"say what is meant: --rename {rename} in place of --strip",
                )
    renames = [_rename(f"{row.mark}.*", "*"), _rename(f"*.{row.mark}.*", "*.*")]
    first = [name.startswith(f"{row.mark}.") for name in having]
    needed = [rename for rename, used in zip(renames, (any(first), not all(first)), strict=True) if used]
    return Wrapping(f".{row.mark}.", row.origin, len(having), tuple(needed))


def _places(name: str, mark: str) -> list[int]:
    """Return where in the name the mark stands as whole segments, with others behind it."""
    if f"{mark}." not in name:
        return []
    places = [0] if name.startswith(f"{mark}.") else []
    at = name.find(f".{mark}.")
    while at >= 0 and len(places) < _MOST_SEGMENTS:
        places.append(at + 1)
        at = name.find(f".{mark}.", at + 1)
    return places


def _dots(name: str) -> Iterator[int]:
    """Yield where each segment but the first begins, as far as names go that are no attack."""
    at = name.find(".") + 1
    for _ in range(_MOST_SEGMENTS):
        if not at:
            return
        yield at
        at = name.find(".", at) + 1


def _rename(old: str, new: str, prefix: str = "") -> Template:
    if prefix and literal(prefix) != prefix:  # a prefix may have characters that mean something in a pattern
        return parse_template(r"\1", parse_pattern(f"re:{re.escape(prefix)}(.*)"))
    return parse_template(new, parse_pattern(old))


def _mixed(row: Wrapper, mark: str, examples: tuple[str, str], where: str, hint: str) -> RuleError:
    origin = f" ({row.origin})" if row.origin else ""
    having, stranger = map(quoted, examples)
    return RuleError(f"{quoted(mark)}{origin} is on {where}: on {having}, and not on {stranger}", hint=hint)


def _refuse(row: Wrapper, names: Sequence[str]) -> None:
    found = [name for name in names if not row.refuses.isdisjoint(name.split("."))] if row.refuses else []
    if found:
        raise RuleError(
            f"{quoted(f'{row.mark}.')} ({row.origin}) is on {plural(len(found), 'key')} that no new name undoes, "
            f"such as {quoted(found[0])}",
            hint=row.hint,
        )


def _attribute(names: Sequence[str]) -> Wrapping | None:
    """Return the wrapping by the one attribute under which a LightningModule has its whole model."""
    shared = _shared_segment(names)
    return None if shared is None else _prefixed(ATTRIBUTE, names, f"{shared}.")


def _shared_segment(names: Sequence[str]) -> str | None:
    heads = {name.partition(".")[0] if "." in name else "" for name in names}
    return next(iter(heads)) or None if len(heads) == 1 else None


def _maybe(names: Sequence[str], found: Sequence[Wrapping]) -> Iterator[str]:
    shared = None if found else _shared_segment(names)
    if shared is not None:
        yield (
            f"every key begins with {quoted(f'{shared}.')}, which may be a part of the model: "
            f"--strip {shell_word(f'{shared}.')} takes it off"
        )


def _parametrized(names: Sequence[str]) -> Iterator[str]:
    """Yield what is said of tensors that stand for another one, each with the rule that folds them."""
    there, told = set(names), set[str]()
    for row in PARAMETRIZATIONS:
        first, *others = row.endings
        stems = [name.removesuffix(first) for name in names if name.endswith(first)]
        stems = [
            stem
            for stem in stems
            if stem not in told and _is_stem(stem, row) and all(f"{stem}{other}" in there for other in others)
        ]
        told.update(stems)
        if stems:
            yield _told(row, stems)


def _is_stem(stem: str, row: Parametrization) -> bool:
    home, _, name = stem.rpartition(".")
    if row.home:
        return bool(name) and f".{home}.".endswith(f".{row.home}")
    return _STEM.fullmatch(name) is not None


def _told(row: Parametrization, stems: Sequence[str]) -> str:
    said = f"{quoted(f'{stems[0]}{row.endings[0]}')} and {len(stems) - 1:,} more come of {row.origin}"
    if not stems[1:]:
        said = f"{quoted(f'{stems[0]}{row.endings[0]}')} comes of {row.origin}"
    if not row.operation:
        return f"{said}: the values are computed by code that is not in the file, and the keys stay as they are"
    name = stems[0].rpartition(".")[2]
    old = ", ".join(f'"*{row.home}{name}{ending}"' for ending in row.endings)
    return f'{said}; not undone by names, a rule folds them: from = [{old}], to = "*{name}", op = "{row.operation}"'


def _flattened(names: Sequence[str]) -> Iterator[str]:
    """Yield what is said of an average whose names lost their dots, beside the model that it is of."""
    bare = {name.removeprefix("model.").replace(".", "") for name in names if name.startswith("model.")}
    found = [name for name in names if name.startswith("model_ema.") and name.removeprefix("model_ema.") in bare]
    if found:
        yield (
            f"{quoted(found[0])} and the other {len(found) - 1:,} are the average of 'model.*' with the dots of their "
            "names left out (LitEma of latent diffusion), and the keys stay as they are"
        )
