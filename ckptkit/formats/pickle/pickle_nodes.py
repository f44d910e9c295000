"""Nodes of a pickle, written as a pickle again, and proved to be what they were."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

from ckptkit.errors import PlanError
from ckptkit.formats.pickle.nodes import MARKED, Node, Part, read_nodes, walk

__all__ = ["write_nodes"]

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
        self.uses = Counter(id(part) for node in walk(root) for part in node.parts())

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
