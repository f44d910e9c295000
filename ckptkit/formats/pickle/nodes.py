"""A pickle as what it does: for each object the opcode that makes it, and those that change it afterwards.

Nothing is known here of any class, and nothing is interpreted: what is read can be written again, with parts
renamed, dropped or put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from ckptkit.errors import FormatError
from ckptkit.formats.pickle.machine import Operation, PickleMachine
from ckptkit.formats.pickle.unpickle import OPCODES, unpickle
from ckptkit.formats.pickle.values import Interpreter

__all__ = ["MARKED", "Event", "Node", "Part", "read_nodes", "value_of", "walk"]

MARKED: Final = frozenset(b"tldioue\x90\x91")  # opcodes that take everything above a mark


class Event(NamedTuple):
    """A change to an object that is there: items set, values appended, a state given."""

    op: bytes
    args: tuple[Part, ...]


_NO_EVENTS: Final[list[Event]] = []  # one for all: most objects are never changed


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

    def happen(self, event: Event) -> None:
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
    """Return the object that a pickle makes, and the pickle's protocol; raises ``FormatError`` as ``unpickle`` does."""
    machine = PickleMachine(data, Interpreter({}, {}), 0)
    root: Any = machine.run(_NODE_OPCODES)[0]
    _take((root,))
    return root, data[1] if data[:1] == b"\x80" else 0


def value_of(part: Part) -> object:
    """Return the value of a number, a text or a name of code; of any other object the node itself."""
    if isinstance(part, Node):
        return part
    if part[0] == 0x58:  # most names are such texts, and a machine for each would take its time
        return part[5:].decode("utf-8", "surrogatepass")
    return unpickle(part + b".", Interpreter({}, {}))[0]


def walk(root: Part) -> Iterator[Node]:
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
    target.happen(Event(op, args))


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
