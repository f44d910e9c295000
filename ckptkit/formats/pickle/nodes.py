"""Read a pickle as a graph of opcodes, and write such a graph as a pickle again.

No class of the pickle is known or called. An edit renames, drops or inserts parts of the graph.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, cast, overload

from ckptkit.errors import FormatError, PlanError
from ckptkit.formats.pickle.batches import find_batch, is_text, items_in
from ckptkit.formats.pickle.machine import MARK, OPCODES, Operation, PickleMachine, parse_pickle
from ckptkit.formats.pickle.values import Interpreter

__all__ = [
    "LEAVE_OUT",
    "MARKED",
    "Node",
    "Part",
    "Update",
    "edit_error",
    "iterate_nodes",
    "plain_value",
    "read_nodes",
    "write_nodes",
]


MARKED: Final = frozenset(b"tldioue\x90\x91")  # opcodes that take everything above a MARK


class Update(NamedTuple):
    """A change to an existing object: items set, values appended, or a state given."""

    op: bytes
    args: Sequence[Part]


class Run(Sequence["Part"]):
    """The items of a batch of numbers and short strings, as their opcodes one behind the other.

    A million parts of their own would take a hundred times the memory of their bytes. ``first`` is the number in the
    memo of the first string; the strings are counted from there.
    """

    __slots__ = ("_strings", "first", "opcodes", "size")

    def __init__(self, opcodes: bytes, size: int, first: int = 0) -> None:
        """Take the opcodes, without a PUT, and the number of items."""
        self.opcodes = opcodes
        self.size = size
        self.first = first
        self._strings: list[bytes] = []

    def __len__(self) -> int:
        """Return the number of items."""
        return self.size

    def __iter__(self) -> Iterator[Part]:
        """Yield a part for each item."""
        return iter(items_in(self.opcodes))

    @overload
    def __getitem__(self, index: int) -> Part: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Part]: ...

    def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
        """Return the part of one item, or of several."""
        return items_in(self.opcodes)[index]

    def string(self, index: int) -> bytes:
        """Return the string with this number in the memo; the same object each time."""
        if not self._strings:
            self._strings = [item for item in items_in(self.opcodes) if is_text(item)]
        return self._strings[index - self.first]


_NO_UPDATES: Final[list[Update]] = []  # one list for all nodes, because most objects are never changed


class Node:
    """An object of a pickle: the opcode that makes the object, the arguments, and the later updates.

    Several other nodes can refer to one node. ``updates_at_use`` is the number of updates before the first use as an
    argument. All updates come before, unless the object holds itself. It is -1 for an object that is never an argument.
    """

    __slots__ = ("args", "op", "updates", "updates_at_use")

    def __init__(self, op: bytes, args: tuple[Part, ...] = ()) -> None:
        """Describe an object without updates."""
        self.op = op
        self.args = args
        self.updates = _NO_UPDATES
        self.updates_at_use = -1

    def add_update(self, update: Update) -> None:
        """Append an update."""
        if self.updates is _NO_UPDATES:
            self.updates = []
        self.updates.append(update)

    def parts(self) -> Iterator[Part]:
        """Yield the arguments of the object and of the updates, in the order of the pickle, but nothing of a run."""
        yield from self.args
        for update in self.updates:
            if not isinstance(update.args, Run):
                yield from update.args


LEAVE_OUT: Final = "--only-tensors leaves the rest out"
Part = Node | bytes  # the bytes are the whole opcode of an immutable value: a number, a string, a code name


def edit_error(reason: str) -> PlanError:
    """Return the error for a file that cannot be edited."""
    return PlanError(f"cannot keep the rest of the file: {reason}", hint=LEAVE_OUT)


def read_nodes(data: bytes) -> tuple[Part, int]:
    """Return the root object and the protocol of a pickle; raises ``FormatError`` as ``parse_pickle`` does."""
    machine = PickleMachine(data, Interpreter({}, {}), 0)
    root = cast("Part", machine.run(_NODE_OPCODES)[0])
    _mark_used((root,))
    return root, data[1] if data[:1] == b"\x80" else 0


def plain_value(part: Part) -> object:
    """Return the value of a number, a string or a code name; return any other part itself."""
    if isinstance(part, Node):
        return part
    if part[0] == 0x58:  # nearly all names are such strings; starting a machine for each would be slow
        return part[5:].decode("utf-8", "surrogatepass")
    return parse_pickle(part + b".", Interpreter({}, {}))[0]


def iterate_nodes(root: Part) -> Iterator[Node]:
    """Yield ``root`` and each node below once, in the order in which a pickle writes them."""
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


_Action = Callable[[PickleMachine, bytes, tuple[Part, ...]], None]


def _mark_used(parts: Iterable[Part]) -> None:
    for part in parts:
        if isinstance(part, Node) and part.updates_at_use < 0:
            part.updates_at_use = len(part.updates)


def _above_mark(machine: PickleMachine) -> tuple[Part, ...]:
    return cast("tuple[Part, ...]", tuple(machine.pop_mark()))


def _push_node(machine: PickleMachine, op: bytes, args: tuple[Part, ...]) -> None:
    _mark_used(args)
    machine.stack.append(Node(op, args))


def _update_top(machine: PickleMachine, op: bytes, args: tuple[Part, ...]) -> None:
    target = machine.stack[-1]
    _mark_used(args)
    if not isinstance(target, Node):
        raise FormatError(f"corrupt pickle: byte {machine.pos - 1} changes a value that cannot change")
    target.add_update(Update(op, args))


def _counted(opcode: int, count: int, action: _Action) -> Operation:
    """Return the operation of an opcode that takes ``count`` arguments from the stack."""
    op = bytes([opcode])

    def run(machine: PickleMachine) -> None:
        args = [cast("Part", machine.pop()) for _ in range(count)]
        action(machine, op, tuple(reversed(args)))

    return run


def _marked(opcode: int, action: _Action) -> Operation:
    """Return the operation of an opcode that takes everything above a MARK."""
    op = bytes([opcode])
    return lambda machine: action(machine, op, _above_mark(machine))


def _verbatim(read: Operation, kind: Callable[[bytes], Part]) -> Operation:
    """Return an operation that pushes the bytes of an opcode where ``read`` would push the value."""

    def run(machine: PickleMachine) -> None:
        start = machine.pos - 1
        read(machine)
        machine.stack[-1] = kind(machine.data[start : machine.pos])

    return run


def _instance(machine: PickleMachine) -> None:
    start = machine.pos - 1
    machine.read_line(), machine.read_line()
    _push_node(machine, machine.data[start : machine.pos], _above_mark(machine))


def _mark(machine: PickleMachine) -> None:
    """Push a MARK, or do at once what a batch of plain items does to the object on the stack."""
    target, memo = machine.stack[-1] if machine.stack else None, machine.memo
    batch = None
    if isinstance(target, Node) and isinstance(machine.data, bytes):
        batch = find_batch(machine.data, machine.pos)
    if batch is None or not isinstance(target, Node):
        machine.stack.append(MARK)
        return
    first = len(memo.counted)
    if batch.puts and (memo.others or not batch.has_counted_puts(first)):
        machine.stack.append(MARK)
        return
    run = Run(b"".join(batch.items), len(batch.items), first)
    if batch.puts:
        memo.counted += [run] * (len(batch.puts) - batch.puts.count(b""))
    machine.pos = batch.end
    machine.count_steps(batch.opcodes)
    target.add_update(Update(bytes([batch.opcode]), run))


def _recalled(read: Operation, index_of: Callable[[PickleMachine], int]) -> Operation:
    """Return the operation of an opcode that recalls an object; a string of a run becomes a part."""

    def run(machine: PickleMachine) -> None:
        start = machine.pos
        read(machine)
        value = machine.stack[-1]
        if isinstance(value, Run):
            after, machine.pos = machine.pos, start
            machine.stack[-1] = value.string(index_of(machine))
            machine.pos = after

    return run


_IMMUTABLE = b"FGIJKLMNPSTUVXcBC\x88\x89\x8a\x8b\x8c\x8d\x8e)"
_NODE_OPCODES: Final[dict[int, Operation]] = {
    **OPCODES,
    0x28: _mark,
    0x67: _recalled(OPCODES[0x67], lambda machine: int(machine.read_line())),
    0x68: _recalled(OPCODES[0x68], lambda machine: machine.data[machine.pos]),
    0x6A: _recalled(OPCODES[0x6A], lambda machine: int.from_bytes(machine.read_bytes(4), "little")),
    **{opcode: _verbatim(OPCODES[opcode], bytes) for opcode in _IMMUTABLE},
    **{opcode: _verbatim(OPCODES[opcode], Node) for opcode in b"]}\x8f\x96"},
    **{opcode: _counted(opcode, 1, _push_node) for opcode in b"\x85Q"},
    **{opcode: _counted(opcode, 2, _push_node) for opcode in b"\x86R\x81\x93"},
    **{opcode: _counted(opcode, 3, _push_node) for opcode in b"\x87\x92"},
    **{opcode: _marked(opcode, _push_node) for opcode in b"tldo\x91"},
    0x69: _instance,
    **{opcode: _counted(opcode, 1, _update_top) for opcode in b"ab"},
    0x73: _counted(0x73, 2, _update_top),
    **{opcode: _marked(opcode, _update_top) for opcode in b"eu\x90"},
}

_SHORT = 2  # writing an opcode of so few bytes again costs no more than recalling it from the memo


def write_nodes(root: Part, protocol: int, most: int) -> bytes:
    """Return the pickle of ``root``: the opcodes as they were read, with shared objects shared.

    The result is read back and compared with the graph. Raises ``PlanError`` if they differ, which happens if a pickle
    changes an object after a call has used the object. Also raises ``PlanError`` for more than ``most`` parts.
    """
    data = _Writer(root, protocol, most).pickle()
    if not _is_same_graph(root, read_nodes(data)[0]):
        raise edit_error("its pickle changes objects after it has used them")
    return data


class _Writer:
    """Write opcodes in the order of Python's own pickler; an object may hold itself."""

    def __init__(self, root: Part, protocol: int, most: int) -> None:
        self.root = root
        self.left = most
        self.out = bytearray(bytes([0x80, protocol]) if protocol >= 2 else b"")
        self.memo: dict[int, int] = {}
        self.uses = Counter(id(part) for node in iterate_nodes(root) for part in node.parts())

    def pickle(self) -> bytes:
        # Not by recursion: objects can be nested deeper than the stack of the interpreter allows.
        stack: list[Iterator[Part]] = [iter((self.root,))]
        while stack:
            part = next(stack[-1], None)
            self.left -= 1
            if self.left < 0:  # a tuple of 1,000 lists that each hold the tuple would be written a million times
                raise edit_error("its objects hold each other too often")
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
        self.out += b"."
        return bytes(self.out)

    def _run(self, run: Run) -> None:
        self.left -= run.size
        self.out += run.opcodes

    def _node(self, node: Node) -> Iterator[Part]:
        """Write a node, and yield each part at the position where the caller must write the part."""
        marked = node.op[0] in MARKED
        self.out += b"(" if marked else b""
        yield from node.args
        if id(node) in self.memo:  # an argument holds this node and has written it already
            self.out += b"1" if marked else b"0" * len(node.args)
            self._recall(node)
            return
        self.out += node.op
        if node.args or node.updates or self.uses[id(node)] > 1:
            self._remember(node)
        for update in node.updates:
            self.out += b"(" if update.op[0] in MARKED else b""
            if isinstance(update.args, Run):
                self._run(update.args)
            else:
                yield from update.args
            self.out += update.op

    def _remember(self, part: Part) -> None:
        index = self.memo[id(part)] = len(self.memo)
        self.out += struct.pack("<cB", b"q", index) if index < 256 else struct.pack("<cI", b"r", index)

    def _recall(self, part: Part) -> None:
        index = self.memo[id(part)]
        self.out += struct.pack("<cB", b"h", index) if index < 256 else struct.pack("<cI", b"j", index)


def _is_same_graph(first: Part, second: Part) -> bool:
    """Return whether two graphs have the same opcodes, sharing and updates, and the same updates before each use."""
    partner: dict[int, int] = {}
    matched: set[int] = set()
    stack = [(first, second)]
    while stack:
        left, right = stack.pop()
        if not isinstance(left, Node) or not isinstance(right, Node):
            if left != right:
                return False
            continue
        if id(left) in partner:
            if partner[id(left)] != id(right):
                return False
            continue
        if id(right) in matched:
            return False
        partner[id(left)] = id(right)
        matched.add(id(right))
        if _outline(left) != _outline(right) or left.updates_at_use not in (-1, right.updates_at_use):
            return False
        stack.extend(zip(left.args, right.args, strict=True))
        for old, new in zip(left.updates, right.updates, strict=True):
            if isinstance(old.args, Run) and isinstance(new.args, Run):
                if old.args.opcodes != new.args.opcodes:
                    return False
            else:
                stack.extend(zip(old.args, new.args, strict=True))
    return True


def _outline(node: Node) -> tuple[bytes, int, list[tuple[bytes, int]]]:
    return node.op, len(node.args), [(update.op, len(update.args)) for update in node.updates]
