"""The parts of a pickle that an edit takes apart and puts together: mappings, calls, storages, all as opcodes."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.formats.pickle.nodes import Change, Node, Part, iterate_nodes, plain_value
from ckptkit.formats.pickle.values import CodeName

__all__ = [
    "WAY_OUT",
    "Pairs",
    "arguments_of",
    "called",
    "items_of",
    "name_of",
    "number_storages",
    "part_at",
    "parts_in",
    "refusal",
    "set_items",
    "storage_name",
    "take_part",
    "text_part",
]

WAY_OUT = "--only-tensors writes the tensors alone"
Pairs = list[tuple[Part, Part]]


def refusal(why: str) -> PlanError:
    """Return the error of a file that cannot be edited."""
    return PlanError(f"what the file holds beside the tensors cannot be kept: {why}", hint=WAY_OUT)


def name_of(key: Part) -> object:
    """Return what a key is; a node, where it is no plain value."""
    return plain_value(key)


def text_part(text: str) -> bytes:
    """Return the opcode of a text."""
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def items_of(part: Part) -> Pairs:
    """Return the keys and values that are set in a mapping, in order; raises ``PlanError`` where it is none."""
    if not isinstance(part, Node):
        raise refusal("a mapping in it is written in a way that is not known")
    flat: list[Part] = []
    if part.op == b"d":
        flat += part.args
    elif part.op in (b"R", b"\x81"):
        known = {"collections.OrderedDict": 0, "collections.defaultdict": 1, "builtins.dict": 0, "__builtin__.dict": 0}
        if len(arguments_of(part)) != known.get(called(part)):
            raise refusal(f"a mapping in it is made by {quoted(called(part))} in a way that is not known")
    elif part.op != b"}":
        raise refusal("a mapping in it is written in a way that is not known")
    for event in part.events:
        if event.op in (b"s", b"u"):
            flat += event.args
    return list(zip(flat[::2], flat[1::2], strict=True))


def part_at(part: Part, key: object) -> Part:
    """Return what a mapping, list or tuple has at a key or a position; raises ``PlanError`` where that is nothing."""
    return take_part(parts_in(part), key)


def take_part(inside: Mapping[object, Part], key: object) -> Part:
    """Return one of the parts inside another; raises ``PlanError`` where it is not there."""
    if key not in inside:
        raise refusal(f"nothing is at {quoted(str(key))} in it any more")
    return inside[key]


def parts_in(part: Part) -> dict[object, Part]:
    """Return what a mapping, list or tuple has, by key or position; raises ``PlanError`` where it is none."""
    if isinstance(part, Node) and part.op in (b"]", b"l", b"t", b"\x85", b"\x86", b"\x87"):
        added = [item for event in part.events if event.op in (b"a", b"e") for item in event.args]
        return dict(enumerate((*part.args, *added)))
    return {name_of(name): value for name, value in items_of(part)}


def set_items(mapping: Node, pairs: Pairs) -> None:
    """Replace what is set in a mapping, where it was set; whatever else happens to it, still happens."""
    whole = mapping.seen == len(mapping.events)
    first = next((number for number, event in enumerate(mapping.events) if event.op in (b"s", b"u")), 0)
    before, behind = mapping.events[:first], mapping.events[first:]
    items = Change(b"u", tuple(part for pair in pairs for part in pair))
    mapping.events = [*before, items, *(event for event in behind if event.op not in (b"s", b"u"))]
    if mapping.op == b"d":
        mapping.args = ()
    mapping.seen = len(mapping.events) if whole else -1


def called(node: Node) -> str:
    """Return the dotted name of the code that a node calls; empty where it is not named outright."""
    function = node.args[0]
    if isinstance(function, Node):
        parts = [plain_value(part) for part in function.args] if function.op == b"\x93" else []
        return ".".join(map(str, parts))
    named = plain_value(function)
    return str(named) if isinstance(named, CodeName) else ""


def arguments_of(node: Node) -> tuple[Part, ...]:
    """Return the arguments of a call, or the parts of a persistent id."""
    given = node.args[-1]
    if given == b")":
        return ()
    if isinstance(given, Node) and given.op in (b"t", b"\x85", b"\x86", b"\x87"):
        return given.args
    raise refusal("something in it is called in a way that is not known")


def storage_name(node: Node) -> str:
    """Return the name of the storage in a persistent id; raises ``PlanError`` where it names a part of one, or none."""
    parts = arguments_of(node)
    kind, name, view = plain_value(parts[0]), plain_value(parts[2]), b"N" if len(parts) == 5 else parts[-1]
    if kind != "storage" or len(parts) not in (5, 6) or not isinstance(name, str | int):
        raise refusal("it holds the source code of classes" if kind == "module" else "it names no storage")
    if view != b"N":
        raise refusal(f"storage {quoted(str(name))} is taken in parts, as torch did before 0.4")
    return str(name)


def number_storages(root: Part, fresh: set[int]) -> tuple[str | int, ...]:
    """Name the storages below a node by numbers, in the order of the pickle, and return which is which.

    ``fresh`` has the ``id`` of each node whose storage is a new record, named by its number; the others are of a file.
    """
    numbers: dict[str | int, int] = {}
    for node in list(iterate_nodes(root)):
        if node.op == b"Q":
            name: str | int = storage_name(node)
            number = numbers.setdefault(int(name) if id(node) in fresh else name, len(numbers))
            kind, storage, _, location, count, *_ = arguments_of(node)
            node.args = (Node(b"t", (kind, storage, text_part(str(number)), location, count)),)
    return tuple(numbers)
