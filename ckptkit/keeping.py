"""Editing a file of torch: one mapping of tensors in it made anew, and everything else as it was.

The file's pickle is taken apart into opcodes and put together again; no class in it is known, imported or called.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.destination import Output
from ckptkit.errors import PlanError
from ckptkit.formats import refusing
from ckptkit.formats.inert import Global
from ckptkit.formats.pickle_nodes import Event, Node, Part, read_nodes, value_of, walk
from ckptkit.plan import Plan, Step
from ckptkit.steps import moved_modules
from ckptkit.tensors import Checkpoint, Rest
from ckptkit.text import printable, quoted
from ckptkit.writers.pickle_nodes import write_nodes
from ckptkit.writers.torch_pickle import StoredTensor, pickle_state_dict

__all__ = ["Edited", "Editor", "editor_for"]

_WAY_OUT = "--only-tensors writes the tensors alone"
_MOST_NAMED = 4
_PARTS_PER_BYTE = 4
_REBUILT = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_WRAPPED = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = ("torch._tensor._rebuild_from_type_v2", "torch.tensor._rebuild_from_type_v2")
Pairs = list[tuple[Part, Part]]


@dataclass(frozen=True, slots=True)
class Edited:
    """A pickle, and the storages that it asks for, numbered from 0: one of the file by name, or a new record."""

    pickle: bytes
    storages: tuple[str | int, ...]


def editor_for(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> Editor | None:
    """Return the editor of the file that the output is to be a copy of; None where it holds tensors alone.

    Raises ``PlanError`` where the file names code that is not to be kept without being asked for, or cannot be edited.
    """
    if not plan.keeps or output.format != "torch" or output.only_tensors:
        return None
    checkpoint = roles[plan.keeps]
    if checkpoint.rest is None:
        raise PlanError(f"the {plan.keeps} is not what the plan was made from", path=checkpoint.path)
    unknown = checkpoint.rest.references
    if unknown and not output.keep_unknown:
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        named = ", ".join(map(printable, unknown[:_MOST_NAMED]))
        raise PlanError(
            f"names code that torch.load(weights_only=True) refuses: {named}{more}",
            hint=f"--keep-unknown keeps it, not run; {_WAY_OUT}",
            path=checkpoint.path,
        )
    with refusing(checkpoint.path):
        return Editor(checkpoint.rest, plan, plan.keeps)


class Editor:
    """The pickle of a file, ready to have the tensors of a plan put into the mapping that they were taken from.

    ``notes`` say what else changes by that.
    """

    def __init__(self, rest: Rest, plan: Plan, role: str) -> None:
        """Take the pickle apart; raises ``PlanError`` where the plan cannot be carried out in the file, naming why."""
        if rest.doubt:
            raise _refusal(rest.doubt)
        self.rest, self._plan, self._role = rest, plan, role
        data = rest.pickle()
        self._most = _PARTS_PER_BYTE * len(data)
        self._root, self._protocol = read_nodes(data)
        self._mapping = self._find(rest.path)
        if self._mapping.seen != len(self._mapping.events):
            raise _refusal("the mapping of its tensors holds itself")
        self._flat = {place[0]: key for key, place in rest.places.items() if len(place) == 1}
        self._pairs = {_name(key): (key, value) for key, value in _items(self._mapping)}
        self._old = {self._flat[name]: pair for name, pair in self._pairs.items() if name in self._flat}
        self._deep = {key for key, place in rest.places.items() if key not in self._old}
        self._refuse_deep()
        self._edit({step.out.key: b"N" for step in plan.steps if not self._stays(step)})
        self._rename_modules()
        self.notes = tuple(self._notes())

    def edited(self, stored: Sequence[StoredTensor]) -> Edited:
        """Return the pickle with these tensors for the steps that change one; raises ``PlanError`` where it fails."""
        pickle = pickle_state_dict(stored, {})
        root, _ = read_nodes(pickle)
        made = dict(zip((tensor.info.key for tensor in stored), (value for _, value in _items(root)), strict=True))
        fresh = {id(node) for node in walk(root) if node.op == b"Q"}
        places = {
            tensor.info.key: (tensor.record, tensor.offset, tensor.stride, tensor.info.shape) for tensor in stored
        }
        dressed: dict[object, Part] = {}  # two names of one object stay two names of one object
        for step in self.changed:
            key, old = step.out.key, self._predecessor(step)
            if old is None:
                continue
            one = (id(old), places[key], step.out.dtype)
            if one not in dressed:
                dressed[one] = _dress(made[key], old, floating=step.out.dtype.startswith(("F", "BF", "C")))
            made[key] = dressed[one]
        self._edit(made)
        storages = self._number(fresh)
        most = self._most + _PARTS_PER_BYTE * len(pickle)
        return Edited(write_nodes(self._root, self._protocol, most), storages)

    @property
    def changed(self) -> list[Step]:
        """The steps whose tensors are not those of the file as they lie there."""
        return [step for step in self._plan.steps if not self._stays(step)]

    def _stays(self, step: Step) -> bool:
        return step.operation == "copy" and step.recipe is None and step.sources[0].role == self._role

    def _origin(self, step: Step) -> str:
        """Return the name of the tensor in the file whose place a step takes."""
        return step.sources[0].key if step.sources[0].role == self._role else step.out.key

    def _predecessor(self, step: Step) -> Part | None:
        pair = self._old.get(self._origin(step))
        return None if pair is None else pair[1]

    def _find(self, path: tuple[object, ...]) -> Node:
        part = self._root
        for name in path:
            part = {_name(key): value for key, value in _items(part)}.get(name, b"N")
        if not isinstance(part, Node):
            raise _refusal("the mapping of its tensors is written in a way that is not known")
        return part

    def _refuse_deep(self) -> None:
        kept = {step.out.key for step in self._plan.steps if self._stays(step) and step.sources[0].key == step.out.key}
        if changed := self._deep - kept:
            raise _refusal(f"{quoted(min(changed))} lies deeper in the mapping than under a name, and would be changed")

    def _edit(self, made: dict[str, Part]) -> None:
        """Put the tensors of the plan into the mapping, in its order; all else stays behind the tensor before it."""
        steps = [step for step in self._plan.steps if self._origin(step) not in self._deep]
        last = {self._origin(step): number for number, step in enumerate(steps)}
        others: dict[int, Pairs] = {}
        after = -1
        for name, pair in self._pairs.items():
            if self._flat.get(name) in self._old:
                after = last.get(self._flat[name], after)
            else:
                others.setdefault(after, []).append(pair)
        pairs = others.get(-1, [])
        for number, step in enumerate(steps):
            key, (written, value) = step.out.key, self._old.get(self._origin(step), (b"", b""))
            same = written and self._origin(step) == key
            pairs.append((written if same else _text(key), value if self._stays(step) else made[key]))
            pairs += others.get(number, [])
        twice = [name for name, count in Counter(_name(key) for key, _ in pairs).items() if count > 1]
        if twice:
            raise _refusal(f"{quoted(str(twice[0]))} is the name of something in the mapping that is no tensor")
        _set_items(self._mapping, pairs)

    def _rename_modules(self) -> None:
        """Give the entries of ``_metadata`` the names that their modules have now."""
        renamed = {
            step.sources[0].key: step.out.key
            for step in reversed(self._plan.steps)
            if step.recipe is None and step.sources[0].role == self._role
        }
        if all(old == new for old, new in renamed.items()):
            return
        for event in self._mapping.events:
            if event.op != b"b":
                continue
            table = {_name(key): value for key, value in _items(event.args[0])}.get("_metadata")
            if not isinstance(table, Node):
                continue
            entries = {_name(key): value for key, value in _items(table)}
            moved = moved_modules([name for name in entries if isinstance(name, str)], renamed)
            _set_items(table, [(_text(new), entries[old]) for old, new in moved.items()])

    def _notes(self) -> Iterator[str]:
        uses, kept = 0, set()
        for node in walk(self._root):
            uses += sum(part is self._mapping for part in node.parts())
            if node.op == b"Q":
                kept.add(_storage(node))
        if uses > 1:
            yield "the mapping is in the file more than once, as one object: it changes wherever it is"
        apart = []
        for step in self.changed:
            old = self._predecessor(step)
            if old is not None and any(node.op == b"Q" and _storage(node) in kept for node in walk(old)):
                apart.append(step.out.key)
        if apart:
            more = f" and {len(apart) - _MOST_NAMED} more" if len(apart) > _MOST_NAMED else ""
            named = ", ".join(map(printable, apart[:_MOST_NAMED]))
            yield f"written apart, in one storage before with tensors that are kept as they are: {named}{more}"

    def _number(self, fresh: set[int]) -> tuple[str | int, ...]:
        """Name the storages by numbers, in the order of the pickle, and return which is which."""
        numbers: dict[str | int, int] = {}
        for node in list(walk(self._root)):
            if node.op == b"Q":
                name: str | int = _storage(node)
                number = numbers.setdefault(int(name) if id(node) in fresh else name, len(numbers))
                kind, storage, _, location, count, *_ = _arguments(node)
                node.args = (Node(b"t", (kind, storage, _text(str(number)), location, count)),)
        return tuple(numbers)


def _refusal(why: str) -> PlanError:
    return PlanError(f"what the file holds beside the tensors cannot be kept: {why}", hint=_WAY_OUT)


def _name(key: Part) -> object:
    return value_of(key)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _items(part: Part) -> Pairs:
    """Return the keys and values that are set in a mapping, in order; raises ``PlanError`` where it is none."""
    if not isinstance(part, Node):
        raise _refusal("a mapping in it is written in a way that is not known")
    flat: list[Part] = []
    if part.op == b"d":
        flat += part.args
    elif part.op in (b"R", b"\x81"):
        known = {"collections.OrderedDict": 0, "collections.defaultdict": 1, "builtins.dict": 0, "__builtin__.dict": 0}
        if len(_arguments(part)) != known.get(_called(part)):
            raise _refusal(f"a mapping in it is made by {quoted(_called(part))} in a way that is not known")
    elif part.op != b"}":
        raise _refusal("a mapping in it is written in a way that is not known")
    for event in part.events:
        if event.op in (b"s", b"u"):
            flat += event.args
    return list(zip(flat[::2], flat[1::2], strict=True))


def _set_items(mapping: Node, pairs: Pairs) -> None:
    """Replace what is set in a mapping, where it was set; whatever else happens to it, still happens."""
    whole = mapping.seen == len(mapping.events)
    first = next((number for number, event in enumerate(mapping.events) if event.op in (b"s", b"u")), 0)
    before, behind = mapping.events[:first], mapping.events[first:]
    items = Event(b"u", tuple(part for pair in pairs for part in pair))
    mapping.events = [*before, items, *(event for event in behind if event.op not in (b"s", b"u"))]
    if mapping.op == b"d":
        mapping.args = ()
    mapping.seen = len(mapping.events) if whole else -1


def _called(node: Node) -> str:
    """Return the dotted name of the code that a node calls; empty where it is not named outright."""
    function = node.args[0]
    if isinstance(function, Node):
        parts = [value_of(part) for part in function.args] if function.op == b"\x93" else []
        return ".".join(map(str, parts))
    named = value_of(function)
    return str(named) if isinstance(named, Global) else ""


def _arguments(node: Node) -> tuple[Part, ...]:
    """Return the arguments of a call, or the parts of a persistent id."""
    given = node.args[-1]
    if given == b")":
        return ()
    if isinstance(given, Node) and given.op in (b"t", b"\x85", b"\x86", b"\x87"):
        return given.args
    raise _refusal("something in it is called in a way that is not known")


def _storage(node: Node) -> str:
    """Return the name of the storage in a persistent id; raises ``PlanError`` where it names a part of one, or none."""
    parts = _arguments(node)
    kind, name, view = value_of(parts[0]), value_of(parts[2]), b"N" if len(parts) == 5 else parts[-1]
    if kind != "storage" or len(parts) not in (5, 6) or not isinstance(name, str | int):
        raise _refusal("it holds the source code of classes" if kind == "module" else "it names no storage")
    if view != b"N":
        raise _refusal(f"storage {quoted(str(name))} is taken in parts, as torch did before 0.4")
    return str(name)


def _dress(new: Part, old: Part, *, floating: bool) -> Part:
    """Return a new tensor as what the old one was: a parameter, on its device, requiring gradients, with attributes."""
    if not isinstance(old, Node) or not isinstance(new, Node) or old.op != b"R":
        return new
    name, given = _called(old), _arguments(old)
    if name in _WRAPPED:
        wants = given[1] if floating else b"\x89"
        return Node(b"R", (old.args[0], Node(b"t", (_dress(new, given[0], floating=floating), wants, *given[2:]))))
    function, parts = new.args[0], _arguments(new)
    if name in _TYPED and _called_by(given[0]) in _REBUILT:
        inner = _dress(new, Node(b"R", (given[0], given[2])), floating=floating)
        assert isinstance(inner, Node)  # noqa: S101 - it is a call, as the new tensor is
        return Node(b"R", (old.args[0], Node(b"t", (*inner.args[:1], given[1], *inner.args[1:], *given[3:]))))
    if name not in _REBUILT:
        return new
    pid, others = parts[0], list(parts[1:])
    assert isinstance(pid, Node) and isinstance(given[0], Node)  # noqa: S101, PT018 - both were read as tensors
    kind, storage, number, _, count = _arguments(pid)
    pid.args = (Node(b"t", (kind, storage, number, _arguments(given[0])[3], count)),)
    if len(given) > 5:
        others[3:5] = given[4] if floating else b"\x89", given[5]
    return Node(b"R", (function, Node(b"t", (pid, *others))))


def _called_by(function: Part) -> str:
    return _called(Node(b"R", (function,)))
