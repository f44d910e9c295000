"""What stands beside the parameters of a group: the names recorded with them, and the dicts that hold both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.param_groups.live import Group, Member
from ckptkit.param_groups.parameters import Inventory, LiveParameter, bare_name
from ckptkit.param_groups.validate.renames import find_rename

__all__ = ["check_dicts", "check_name", "check_names", "check_wrappers"]


def check_dicts(groups: Sequence[Group]) -> Iterator[Finding]:
    """Yield a finding for each group dict that is in use twice."""
    seen: dict[int, Group] = {}
    twice: set[int] = set()
    for group in groups:
        other = seen.setdefault(id(group.options), group)
        if other is group:
            continue
        if other.optimizer is not None and other.optimizer is group.optimizer:
            if id(group.optimizer) not in twice:
                yield _shared(f"{other.where} and {group.where} are of one optimizer, listed twice", "list it once")
            twice.add(id(group.optimizer))
        else:
            took = f" (lr={group.options['lr']})" if "lr" in group.options and group.optimizer is not None else ""
            yield _shared(
                f"{other.where} and {group.where} are one dict, as where a list of groups is used twice: the second "
                f"took over the options of the first{took}, and what changes in one changes in both",
                "make the list anew for each optimizer, as build_param_groups does",
            )


def _shared(message: str, hint: str) -> Finding:
    return Finding("groups.shared", "error", "", message, hint)


def check_wrappers(given: Any) -> Iterator[Finding]:
    """Yield a finding for each wrapper (Lookahead, SAM, LARC, ...) whose groups are not those of its optimizer."""
    wrappers = given if isinstance(given, list | tuple) else [given]
    for wrapper in wrappers:
        if hasattr(wrapper, "param_groups"):
            yield from _cached(wrapper)


def _cached(wrapper: Any) -> Iterator[Finding]:
    held = {id(group) for group in wrapper.param_groups}
    for name, inner in getattr(wrapper, "__dict__", {}).items():
        if hasattr(inner, "param_groups") and hasattr(inner, "step") and inner is not wrapper:
            stale = [group for group in inner.param_groups if id(group) not in held]
            if stale:
                kind = type(wrapper).__name__
                yield Finding(
                    "groups.cached",
                    "warning",
                    "",
                    f"{kind}.param_groups are not those of {kind}.{name} ({type(inner).__name__}), as after "
                    "load_state_dict(), which replaces them: what is set in one is not what the other steps with",
                    f"let the wrapper pass them on: a property that returns self.{name}.param_groups",
                )


def check_names(inventory: Inventory, groups: Iterable[Group], members: Iterable[Member]) -> Iterator[Finding]:
    """Yield a finding where an optimizer names only some of its parameters, or two of them alike."""
    named = Counter[Group]()
    total = Counter[Group]()
    places: dict[tuple[int, str], Member] = {}
    told: set[tuple[int, str]] = set()
    for member in members:
        total[member.group] += 1
        if member.name is None:
            continue
        named[member.group] += 1
        if id(member.tensor) not in inventory.parameters:
            continue  # an older object of that name, or none of the model: that is another finding
        key = (id(member.group.optimizer), member.name)
        first = places.setdefault(key, member)
        if first.tensor is not member.tensor and key not in told:
            told.add(key)
            # Recorded from two parts of the model, each is true as far as it goes.
            parts = all(_ends(inventory.parameters[id(one.tensor)], bare_name(member.name)) for one in (first, member))
            yield Finding(
                "groups.names",
                "warning" if parts else "error",
                "",
                f"{first.where} and {member.where} are two parameters, both recorded as {quoted(member.name)}",
                "build the optimizer again from model.named_parameters(): names tell whose saved state is whose",
            )
    full: dict[int, Group] = {}
    for group in groups:
        if named[group] and named[group] == total[group]:
            full.setdefault(id(group.optimizer), group)
    for group in groups:
        count = plural(total[group], "parameter")
        other = full.get(id(group.optimizer))
        if 0 < named[group] < total[group]:
            yield _names(f"{group.where} names {named[group]} of its {count}, which torch refuses", _ALL_OR_NONE)
        elif other is not None and total[group] and not named[group] and "param_names" not in group.options:
            yield _names(
                f"{group.where} names none of its {count} while {other.where} names all, which torch refuses",
                _ALL_OR_NONE,
            )


_ALL_OR_NONE = "name all or none: list(model.named_parameters())"


def _names(message: str, hint: str) -> Finding:
    return Finding("groups.names", "error", "", message, hint)


def _ends(live: LiveParameter, ending: str) -> bool:
    """Return whether one of the names of ``live`` ends so, by whole segments."""
    return any(f".{bare_name(name)}".endswith(f".{ending}") for name in (live.name, *live.aliases))


def check_name(inventory: Inventory, live: LiveParameter, member: Member) -> Iterator[Finding]:
    """Yield a finding where the name recorded with a parameter of the model is none of its names."""
    name = member.name or ""
    bare, other = bare_name(name), inventory.named(name)
    # Recorded from a part of the model, as of the network inside a LightningModule, it lacks the beginning.
    if other is live or (other is None and _ends(live, bare)):
        return
    start = f"{member.where} {live.shape} is recorded as {quoted(name)} but is {quoted(live.name)}"
    again = "build the optimizer again from model.named_parameters(), so that its state is saved under true names"
    if other is not None:
        lie = ", while the model has another parameter of that name, as after load_state_dict() of another order"
        yield Finding("groups.names", "error", live.name, start + lie, again)
        return
    # It is the same object and trains on; only what is saved under the old name will not be found.
    rename = find_rename(inventory, name)
    if rename is None or live.name not in rename.names:
        why = ", as the model calls it now"
    else:
        why = f", its name since {rename.event}"
    yield Finding(
        "groups.names",
        "warning",
        live.name,
        start + why,
        f"{again}, or rename {quoted(name)} to {quoted(live.name)} in it",
    )
