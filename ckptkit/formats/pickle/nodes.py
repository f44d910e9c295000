"""A pickle as what it does: for each object the opcode that makes it, and those that change it afterwards.

Nothing is known here of any class, and nothing is interpreted: what is read can be written again, with parts
renamed, dropped or put in.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ckptkit.errors import FormatError, PlanError
from ckptkit.formats.pickle.machine import OPCODES, Operation, PickleMachine, parse_pickle
from ckptkit.formats.pickle.values import Interpreter

__all__ = ["MARKED", "Change", "Node", "Part", "iterate_nodes", "plain_value", "read_nodes", "write_nodes"]


MARKED: Final = frozenset(b"tldioue\x90\x91")  # opcodes that take everything above a mark


class Change(NamedTuple):
    """A change to an object that is there: items set, values appended, a state given."""

    op: bytes
    args: tuple[Part, ...]


_NO_EVENTS: Final[list[Change]] = []  # one for all: most objects are never changed


class Node:
    """An object of a pickle that others may share: the opcode that makes it, what that takes, what happens to it then.

    ``seen`` is how much had happened when something first took it: all, unless the object holds itself; -1 where
    nothing did.
    """

    __slots__ = ("args", "events", "op", "seen")

    def __init__(self, op: bytes, args: tuple[Part, ...] = ()) -> None:
        """Describe an object to which nothing has happened."""
        self.op = op
        self.args = args
        self.events = _NO_EVENTS
        self.seen = -1

    def add_change(self, event: Change) -> None:
        """Add a change behind all others."""
        if self.events is _NO_EVENTS:
            self.events = []
        self.events.append(event)

    def parts(self) -> Iterator[Part]:
        """Yield what it is made of, in the order of the pickle."""
        yield from self.args
        for event in self.events:
            yield from event.args


Part = Node | bytes  # of what cannot change (numbers, texts, names of code) the opcode itself is kept


def read_nodes(data: bytes) -> tuple[Part, int]:
    """Return the root object and the protocol of a pickle; raises ``FormatError`` as ``parse_pickle`` does."""
    machine = PickleMachine(data, Interpreter({}, {}), 0)
    root: Any = machine.run(_NODE_OPCODES)[0]
    _take((root,))
    return root, data[1] if data[:1] == b"\x80" else 0


def plain_value(part: Part) -> object:
    """Return the value of a number, a text or a name of code; of any other object the node itself."""
    if isinstance(part, Node):
        return part
    if part[0] == 0x58:  # most names are such texts, and a machine for each would take its time
        return part[5:].decode("utf-8", "surrogatepass")
    return parse_pickle(part + b".", Interpreter({}, {}))[0]


def iterate_nodes(root: Part) -> Iterator[Node]:
    """Yield each node below ``root`` once, itself first, in the order in which it is written."""
    known: set[int] = set()
    stack: list[Iterator[Part]] = [iter((root,))]
    while stack:
        part = next(stack[-1], None)
        if part is None:
            stack.pop()
        elif isinstance(part, Node) and id(part) not in known:
            known.add(id(part))
            yield part
            stack.append(part.parts())


def _take(parts: Sequence[Part]) -> None:
    for part in parts:
        if isinstance(part, Node) and part.seen < 0:
            part.seen = len(part.events)


def _make(machine: PickleMachine, op: bytes, args: tuple[Part, ...]) -> None:
    _take(args)
    machine.stack.append(Node(op, args))


def _happen(machine: PickleMachine, op: bytes, args: tuple[Part, ...]) -> None:
    target = machine.stack[-1]
    _take(args)
    if not isinstance(target, Node):
        raise FormatError(f"corrupt pickle: something that cannot change is changed at byte {machine.pos - 1}")
    target.add_change(Change(op, args))


def _fixed(opcode: int, count: int, obey: Callable[[PickleMachine, bytes, tuple[Part, ...]], None]) -> Operation:
    op = bytes([opcode])

    def run(machine: PickleMachine) -> None:
        args = [machine.pop() for _ in range(count)]
        obey(machine, op, tuple(reversed(args)))

    return run


def _marked(opcode: int, obey: Callable[[PickleMachine, bytes, tuple[Part, ...]], None]) -> Operation:
    op = bytes([opcode])
    return lambda machine: obey(machine, op, tuple(machine.pop_mark()))


def _atom(read: Operation, kind: Callable[[bytes], Part]) -> Operation:
    """Return the operation that keeps the bytes of an opcode, where ``read`` would push what they mean."""

    def run(machine: PickleMachine) -> None:
        start = machine.pos - 1
        read(machine)
        machine.stack[-1] = kind(machine.data[start : machine.pos])

    return run


def _instance(machine: PickleMachine) -> None:
    start = machine.pos - 1
    machine.line(), machine.line()
    _make(machine, machine.data[start : machine.pos], tuple(machine.pop_mark()))


_ATOMS = b"FGIJKLMNPSTUVXcBC\x88\x89\x8a\x8b\x8c\x8d\x8e)"
_NODE_OPCODES: Final[dict[int, Operation]] = {
    **OPCODES,
    **{opcode: _atom(OPCODES[opcode], bytes) for opcode in _ATOMS},
    **{opcode: _atom(OPCODES[opcode], Node) for opcode in b"]}\x8f\x96"},
    **{opcode: _fixed(opcode, 1, _make) for opcode in b"\x85Q"},
    **{opcode: _fixed(opcode, 2, _make) for opcode in b"\x86R\x81\x93"},
    **{opcode: _fixed(opcode, 3, _make) for opcode in b"\x87\x92"},
    **{opcode: _marked(opcode, _make) for opcode in b"tldo\x91"},
    0x69: _instance,
    **{opcode: _fixed(opcode, 1, _happen) for opcode in b"ab"},
    0x73: _fixed(0x73, 2, _happen),
    **{opcode: _marked(opcode, _happen) for opcode in b"eu\x90"},
}

_SHORT = 2  # bytes of an opcode that are no more than those which would recall it


def write_nodes(root: Part, protocol: int, most: int) -> bytes:
    """Return the pickle that makes ``root`` again: every opcode as it was read, shared objects shared.

    It is read back, and compared object by object: raises ``PlanError`` where it would not make the same, as for a
    pickle that changes an object after a call has already seen it, or would take more than ``most`` parts.
    """
    data = _Writer(root, protocol, most).data()
    if not _same(root, read_nodes(data)[0]):
        raise _refusal("it changes objects after it has used them")
    return data


def _refusal(why: str) -> PlanError:
    return PlanError(
        f"its pickle cannot be written again as it is: {why}", hint="--only-tensors writes the tensors alone"
    )


class _Writer:
    """Opcodes in the order in which Python's own pickler writes them, objects that hold themselves included."""

    def __init__(self, root: Part, protocol: int, most: int) -> None:
        self.root = root
        self.left = most
        self.out = bytearray(bytes([0x80, protocol]) if protocol >= 2 else b"")
        self.memo: dict[int, int] = {}
        self.uses = Counter(id(part) for node in iterate_nodes(root) for part in node.parts())

    def data(self) -> bytes:
        # Not by recursion: objects may be nested deeper than the interpreter's own stack.
        stack: list[Iterator[Part]] = [iter((self.root,))]
        while stack:
            part = next(stack[-1], None)
            self.left -= 1
            if self.left < 0:  # a thousand lists in a tuple that each of them holds would be written a million times
                raise _refusal("its objects hold each other too often")
            if part is None:
                stack.pop()
            elif id(part) in self.memo:
                self._recall(part)
            elif isinstance(part, Node):
                stack.append(self._node(part))
            else:
                self.out += part
                if len(part) > _SHORT and self.uses[id(part)] > 1:
                    self._remember(part)
        return bytes(self.out + b".")

    def _node(self, node: Node) -> Iterator[Part]:
        """Write a node, asking for its parts where they belong."""
        marked = node.op[0] in MARKED
        self.out += b"(" if marked else b""
        yield from node.args
        if id(node) in self.memo:  # one of its parts holds it, and has written it meanwhile
            self.out += b"1" if marked else b"0" * len(node.args)
            self._recall(node)
            return
        self.out += node.op
        if node.args or node.events or self.uses[id(node)] > 1:
            self._remember(node)
        for event in node.events:
            self.out += b"(" if event.op[0] in MARKED else b""
            yield from event.args
            self.out += event.op

    def _remember(self, part: Part) -> None:
        index = self.memo[id(part)] = len(self.memo)
        self.out += struct.pack("<cB", b"q", index) if index < 256 else struct.pack("<cI", b"r", index)

    def _recall(self, part: Part) -> None:
        index = self.memo[id(part)]
        self.out += struct.pack("<cB", b"h", index) if index < 256 else struct.pack("<cI", b"j", index)


def _same(one: Part, other: Part) -> bool:
    """Return whether two graphs are one and the same: made, changed and shared alike, and seen at the same time."""
    twins: dict[int, int] = {}
    taken: set[int] = set()
    stack = [(one, other)]
    while stack:
        left, right = stack.pop()
        if not isinstance(left, Node) or not isinstance(right, Node):
            if left != right:
                return False
            continue
        if id(left) in twins:
            if twins[id(left)] != id(right):
                return False
            continue
        if id(right) in taken:
            return False
        twins[id(left)] = id(right)
        taken.add(id(right))
        alike = (left.op, len(left.args), [(event.op, len(event.args)) for event in left.events])
        if alike != (right.op, len(right.args), [(event.op, len(event.args)) for event in right.events]):
            return False
        if left.seen not in (-1, right.seen):
            return False
        stack.extend(zip(left.parts(), right.parts(), strict=True))
    return True
