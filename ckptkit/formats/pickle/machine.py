"""The state of the inert pickle machine: a stack, a memo, and what may be done to them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from ckptkit.core.text import printable
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.values import Interpreter, MappingValue, Placeholder, check_key

__all__ = ["MARK", "Operation", "PickleMachine", "TruncatedPickleError"]


class TruncatedPickleError(FormatError):
    """The bytes end inside the pickle."""


MARK: Final = object()
_MOST_TUPLE_KEYS = 4096  # tuples of integers can be made to collide
_LONGEST_TUPLE_KEY = 64
_BUDGET_PER_BYTE = 4


class PickleMachine:
    """One run over one pickle: a stack, a memo, and a table of opcodes."""

    def __init__(self, data: bytes, interpreter: Interpreter, start: int) -> None:
        """Stand at ``start`` with an empty stack."""
        self.data = data
        self.end = len(data)
        self.pos = start
        self.interpreter = interpreter
        interpreter.budget += _BUDGET_PER_BYTE * len(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.tuple_keys = 0

    def run(self, operations: Mapping[int, Operation]) -> tuple[object, int]:
        """Obey opcodes until STOP; return the value and the offset behind it."""
        start = self.pos
        try:
            while True:
                opcode = self.data[self.pos]
                self.pos += 1
                if opcode == 0x2E:  # STOP
                    if not self.stack:
                        raise FormatError(f"corrupt pickle: nothing on the stack at byte {self.pos - 1}")
                    return self.pop(), self.pos
                operation = operations.get(opcode)
                if operation is None:
                    raise FormatError(f"corrupt pickle: unknown opcode 0x{opcode:02x} at byte {self.pos - 1}")
                operation(self)
        except IndexError:
            if self.pos >= self.end:
                raise TruncatedPickleError(f"the pickle that starts at byte {start} has no end: truncated?") from None
            raise FormatError(f"corrupt pickle: nothing on the stack at byte {self.pos - 1}") from None
        except (ValueError, OverflowError, struct.error) as error:
            raise FormatError(f"corrupt pickle: {printable(str(error))} at byte {self.pos}") from None

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise FormatError(f"corrupt pickle: stray MARK at byte {self.pos - 1}")
        return value

    def pop_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise FormatError(f"corrupt pickle: no MARK at byte {self.pos - 1}")

    def take(self, count: int) -> bytes:
        if count < 0:
            raise FormatError(f"corrupt pickle: negative length at byte {self.pos}")
        if count > self.end - self.pos:
            raise TruncatedPickleError(
                f"corrupt pickle: a length of {count} bytes at byte {self.pos} points past the end"
            )
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack(self.take(layout.size))
        return int(value)

    def line(self) -> str:
        stop = self.data.find(b"\n", self.pos)
        if stop < 0:
            raise TruncatedPickleError(f"the line at byte {self.pos} has no end: truncated?")
        text = self.data[self.pos : stop]
        self.pos = stop + 1
        return text.decode("utf-8")

    def key(self, key: object) -> object:
        """Return ``key`` where hashing it is cheap and collides with nothing; refuse everything else."""
        if isinstance(key, str):
            return key
        if isinstance(key, tuple):
            self.tuple_keys += 1
            if self.tuple_keys > _MOST_TUPLE_KEYS:
                raise FormatError(f"more than {_MOST_TUPLE_KEYS} dict keys are tuples")
            if len(key) > _LONGEST_TUPLE_KEY or any(isinstance(item, tuple) for item in key):
                raise FormatError("a dict key is a long tuple or a tuple of tuples, too deep to be a name")
            for item in key:
                check_key(item)
            return key
        check_key(key)
        return key

    def put_items(self, target: object, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise FormatError(f"corrupt pickle: a key without a value at byte {self.pos - 1}")
        if isinstance(target, dict):
            into = target
        elif isinstance(target, Placeholder):
            into = target.pairs
        else:
            raise FormatError(f"corrupt pickle: items set on a {type(target).__name__} at byte {self.pos - 1}")
        for index in range(0, len(pairs), 2):
            self.interpreter.set_item(into, self.key(pairs[index]), pairs[index + 1])

    def put_values(self, target: object, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(self.key(value) for value in values)
        elif isinstance(target, Placeholder):
            target.items.extend(values)
        else:
            raise FormatError(f"corrupt pickle: values appended to a {type(target).__name__} at byte {self.pos - 1}")

    def build(self, target: object, state: object) -> None:
        if isinstance(target, MappingValue):
            # Kept aside as data: torch sets these on the object itself, where they can shadow its methods.
            target.attributes = state if isinstance(state, dict) else {"state": state}
        elif isinstance(target, Placeholder):
            target.state = state

    def persistent(self, pid: object) -> object:
        if self.interpreter.persistent is None:
            raise FormatError(f"corrupt pickle: a persistent id at byte {self.pos - 1} where none belongs")
        return self.interpreter.persistent(pid)


Operation = Callable[[PickleMachine], None]
