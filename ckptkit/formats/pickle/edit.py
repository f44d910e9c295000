"""Take apart and build the parts of a pickle that an edit needs: mappings, sequences, calls and storages."""

from __future__ import annotations

import struct
from collections.abc import Container, Sequence

from ckptkit.core.text import quoted
from ckptkit.errors import PlanError
from ckptkit.formats.pickle.nodes import Node, Part, Update, edit_error, iterate_nodes, plain_value
from ckptkit.formats.pickle.values import CodeName

__all__ = [
    "Items",
    "call_arguments",
    "called_name",
    "child_parts",
    "dict_items",
    "dict_part",
    "list_part",
    "renumber_storages",
    "scalar_part",
    "set_dict_items",
    "storage_name",
    "text_part",
    "tuple_part",
]

Items = list[tuple[Part, Part]]  # the keys and values of a mapping
_UNKNOWN_MAPPING = "it writes a mapping in an unknown way"


def dict_items(part: Part) -> Items:
    """Return the keys and values that are set in a mapping, in order; raises ``PlanError`` for anything else."""
    if not isinstance(part, Node):
        raise edit_error(_UNKNOWN_MAPPING)
    flat: list[Part] = []
    if part.op == b"d":
        flat += part.args
    elif part.op in (b"R", b"\x81"):
        known = {"collections.OrderedDict": 0, "collections.defaultdict": 1, "builtins.dict": 0, "__builtin__.dict": 0}
        if len(call_arguments(part)) != known.get(called_name(part)):
            raise edit_error(f"it makes a mapping with {quoted(called_name(part))} in an unknown way")
    elif part.op != b"}":
        raise edit_error(_UNKNOWN_MAPPING)
    for update in part.updates:
        if update.op in (b"s", b"u"):
            flat += update.args
    return list(zip(flat[::2], flat[1::2], strict=True))


def set_dict_items(mapping: Node, items: Items) -> None:
    """Replace the items of a mapping at the position of the first one; all other updates remain."""
    is_finished = mapping.updates_at_use == len(mapping.updates)
    first = next((number for number, update in enumerate(mapping.updates) if update.op in (b"s", b"u")), 0)
    before, after = mapping.updates[:first], mapping.updates[first:]
    new = Update(b"u", tuple(part for item in items for part in item))
    mapping.updates = [*before, new, *(update for update in after if update.op not in (b"s", b"u"))]
    if mapping.op == b"d":
        mapping.args = ()
    mapping.updates_at_use = len(mapping.updates) if is_finished else -1


def child_parts(part: Part) -> dict[object, Part]:
    """Return the parts in a mapping, list or tuple by key or position; raises ``PlanError`` for anything else."""
    if isinstance(part, Node) and part.op in (b"]", b"l", b"t", b"\x85", b"\x86", b"\x87"):
        added = [item for update in part.updates if update.op in (b"a", b"e") for item in update.args]
        return dict(enumerate((*part.args, *added)))
    return {plain_value(key): value for key, value in dict_items(part)}


def called_name(call: Node) -> str:
    """Return the dotted name of the code that a node calls; empty for a function that is computed."""
    function = call.args[0]
    if isinstance(function, Node):
        parts = [plain_value(part) for part in function.args] if function.op == b"\x93" else []
        return ".".join(map(str, parts))
    name = plain_value(function)
    return str(name) if isinstance(name, CodeName) else ""


def call_arguments(call: Node) -> tuple[Part, ...]:
    """Return the arguments of a call, or the parts of a persistent id."""
    arguments = call.args[-1]
    if arguments == b")":
        return ()
    if isinstance(arguments, Node) and arguments.op in (b"t", b"\x85", b"\x86", b"\x87"):
        return arguments.args
    raise edit_error("it calls a function in an unknown way")


def storage_name(persistent_id: Node) -> str:
    """Return the name of a storage; raises ``PlanError`` for a persistent id of anything but one whole storage."""
    parts = call_arguments(persistent_id)
    kind, name = plain_value(parts[0]), plain_value(parts[2])
    view = b"N" if len(parts) == 5 else parts[-1]
    if kind != "storage" or len(parts) not in (5, 6) or not isinstance(name, str | int):
        raise edit_error("it holds the source code of classes" if kind == "module" else "it names no storage")
    if view != b"N":
        raise edit_error(f"a tensor uses a part of storage {quoted(str(name))}, as in files of torch before 0.4")
    return str(name)


def renumber_storages(root: Part, new: Container[int]) -> tuple[str | int, ...]:
    """Give the storages below ``root`` the names 0, 1, ... in the order of the pickle; return their old names.

    ``new`` has the ``id`` of each node that names a new storage. The old name of a new storage is an integer, and the
    old name of a storage of the edited file is a string.
    """
    numbers: dict[str | int, int] = {}
    for node in list(iterate_nodes(root)):
        if node.op == b"Q":
            name: str | int = storage_name(node)
            number = numbers.setdefault(int(name) if id(node) in new else name, len(numbers))
            kind, storage, _, location, count, *_ = call_arguments(node)
            node.args = (Node(b"t", (kind, storage, text_part(str(number)), location, count)),)
    return tuple(numbers)


def dict_part(items: Items) -> Node:
    """Return the part of a dict."""
    part = Node(b"}")
    if items:
        part.add_update(Update(b"u", tuple(inner for item in items for inner in item)))
    return part


def list_part(values: Sequence[Part]) -> Node:
    """Return the part of a list."""
    part = Node(b"]")
    if values:
        part.add_update(Update(b"e", tuple(values)))
    return part


def tuple_part(values: Sequence[Part]) -> Part:
    """Return the part of a tuple."""
    return Node(b"t", tuple(values)) if values else b")"


def text_part(text: str) -> bytes:
    """Return the part of a string."""
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def scalar_part(value: object) -> bytes:
    """Return the part of None, a bool, a number or a string; raises ``PlanError`` for anything else."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(raw) < 256:
            return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text_part(value)
    raise PlanError(f"a value of {quoted(type(value).__name__)} cannot be written: {quoted(str(value)[:80])}")
