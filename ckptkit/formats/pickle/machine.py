"""Parse a pickle without running code: a stack machine for the opcodes of protocols 0 to 5."""

from __future__ import annotations

import codecs
import itertools
import re
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Final, Protocol, overload

from ckptkit.core.gc_pause import pause_gc
from ckptkit.core.text import printable
from ckptkit.errors import FormatError
from ckptkit.formats.pickle.batches import APPENDS, are_new_numbers, find_batch
from ckptkit.formats.pickle.values import Interpreter, PickledMapping, Placeholder, are_good_keys, check_key

__all__ = [
    "MARK",
    "OPCODES",
    "Memo",
    "Operation",
    "PickleBytes",
    "PickleMachine",
    "TruncatedPickleError",
    "parse_pickle",
]


class TruncatedPickleError(FormatError):
    """Raised when the bytes end inside the pickle."""


MARK: Final = object()
_MOST_TUPLE_KEYS = 4096  # tuples of integers can be made to collide
_LONGEST_TUPLE_KEY = 64
_BUDGET_PER_BYTE = 4
_FEWEST_KEPT = 1 << 16  # shorter byte strings are read
# What one pickle may build; a mapping of a million numbers by number or by name needs less. A tensor takes up to 42
# opcodes and 13 objects, so a pickle may build more where it names storages: 140,000 tensors need up to two thirds of
# what is then allowed.
_MOST_OPCODES, _OPCODES_PER_STORAGE = 8_000_000, 14
_MOST_OBJECTS, _OBJECTS_PER_STORAGE = 1_600_000, 7
# Numbers and short strings of batches that count as half an object, since they take less memory than others. More can
# count so while the machine holds their list: numbers that are gone leave their memory to larger objects.
_MOST_HALVES = 1_000_000
_MOST_STORAGES = 130_000  # that are counted for it
# The bytes of a long pickle are in memory too, and leave room for fewer objects.
_LONG_PICKLE, _BYTES_PER_OBJECT = 64 << 20, 100
_MOST_REFERENCES = 2_500_000  # on the stack and in the memo
_MOST_ITEMS = 10_000_000  # of all lists, sets and mappings, where a mapping counts for more than its items
_UPDATE_COST, _PAIR_COST, _SET_COST = 16, 3, 32
_MOST_UNCOUNTED = 500_000
_CHUNK = 1 << 16  # opcodes between two counts
_STRAY_MARK = "corrupt pickle: stray MARK at byte {}"
_TOO_MUCH = "the pickle builds more than {:,} {}, which no checkpoint needs"
_WAY_OUT = "torch.load(..., weights_only=True) may read it: make tensors of long lists, and save it again"


class PickleBytes(Protocol):
    """The bytes of a pickle: ``bytes``, or an object that reads them from a file on demand."""

    def __len__(self) -> int: ...

    @overload
    def __getitem__(self, index: int, /) -> int: ...

    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...

    def find(self, part: bytes, start: int, /) -> int: ...


class Memo:
    """The objects that a pickle can refer to by a number; nearly all pickles count these numbers from 0."""

    __slots__ = ("counted", "others", "unset")

    def __init__(self) -> None:
        """Begin without objects."""
        self.counted: list[object] = []
        self.others: dict[int, object] = {}
        self.unset = 0

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.counted) + len(self.others) - self.unset

    def read(self, index: int, pos: int) -> object:
        """Return the object of this number; raises ``FormatError`` for an unknown number."""
        if self.unset <= index < len(self.counted):
            return self.counted[index]
        if index in self.others:
            return self.others[index]
        raise FormatError(f"corrupt pickle: memo {index} is read before it is written, at byte {pos - 1}")

    def write(self, index: int, value: object) -> None:
        """Set the object of a number; raises ``FormatError`` for too many numbers that are not counted."""
        if index == len(self.counted) and not self.others:
            self.counted.append(value)
        elif self.unset <= index < len(self.counted):
            self.counted[index] = value
        elif index == 1 and not self.counted and not self.others:
            self.counted, self.unset = [None, value], 1  # Python 2 counts from 1
        else:
            self.others[index] = value
            if len(self.others) > _MOST_UNCOUNTED:
                raise FormatError(_TOO_MUCH.format(_MOST_UNCOUNTED, "references with numbers out of order"))


class PickleMachine:
    """The stack and the memo of one run over one pickle."""

    def __init__(self, data: PickleBytes, interpreter: Interpreter, start: int) -> None:
        """Prepare a run that begins at byte ``start``."""
        self.data = data
        self.end = len(data)
        self.pos = start
        self.interpreter = interpreter
        interpreter.budget += _BUDGET_PER_BYTE * len(data)
        self.stack: list[object] = []
        self.memo = Memo()
        self.items_left = _MOST_ITEMS
        self.storages = 0
        self.batched_items = 0
        self._held: list[list[object]] = []
        self._held_numbers = 0
        self.tuple_keys = 0
        self.steps = 0
        self._unchecked = 0  # steps since the last count of what the pickle built
        self._blocks_before = 0

    def run(self, operations: Mapping[int, Operation]) -> tuple[object, int]:
        """Execute opcodes until STOP; return the value and the offset of the next byte."""
        start = self.pos
        self._blocks_before = sys.getallocatedblocks()
        try:
            with pause_gc():
                return self._run_all(operations.get)
        except IndexError:
            if self.pos >= self.end:
                raise TruncatedPickleError(f"the pickle that starts at byte {start} has no end: truncated?") from None
            raise FormatError(f"corrupt pickle: nothing on the stack at byte {self.pos - 1}") from None
        except (ValueError, OverflowError, struct.error) as error:
            raise FormatError(f"corrupt pickle: {printable(str(error))} at byte {self.pos}") from None

    def _run_all(self, find_operation: Callable[[int], Operation | None]) -> tuple[object, int]:
        data = self.data
        while True:
            for _ in range(_CHUNK):
                opcode = data[self.pos]
                self.pos += 1
                if opcode == 0x2E:  # STOP
                    if not self.stack:
                        raise FormatError(f"corrupt pickle: nothing on the stack at byte {self.pos - 1}")
                    return self.pop(), self.pos
                operation = find_operation(opcode)
                if operation is None:
                    raise FormatError(f"corrupt pickle: unknown opcode 0x{opcode:02x} at byte {self.pos - 1}")
                operation(self)
            self.count_steps(_CHUNK)

    def count_steps(self, count: int) -> None:
        """Count opcodes; raises ``FormatError`` for a pickle that has too many, or that built too much."""
        self.steps += count
        self.interpreter.steps += count
        self._unchecked += count
        if self._unchecked < _CHUNK:
            return
        self._unchecked = 0
        steps, objects = self.steps, sys.getallocatedblocks() - self._blocks_before
        storages = min(self.storages, _MOST_STORAGES)
        halves = min(self.batched_items, _MOST_HALVES) + self._held_numbers
        most = _MOST_OBJECTS - max(self.end - _LONG_PICKLE, 0) // _BYTES_PER_OBJECT
        if objects - halves // 2 > most + _OBJECTS_PER_STORAGE * storages:
            raise FormatError(_TOO_MUCH.format(max(most, 0), "objects"), hint=_WAY_OUT)
        if len(self.stack) + len(self.memo) > _MOST_REFERENCES:
            raise FormatError(_TOO_MUCH.format(_MOST_REFERENCES, "references to objects"))
        if steps > _MOST_OPCODES + _OPCODES_PER_STORAGE * storages:
            raise FormatError(f"the pickle has more than {_MOST_OPCODES:,} steps, which no checkpoint needs")

    def hold(self, numbers: list[object], count: int) -> None:
        """Keep a list to which ``count`` numbers are added that each take memory of their own."""
        if not self._held or self._held[-1] is not numbers:
            self._held.append(numbers)
        self._held_numbers += count

    def pop(self) -> object:
        """Return the top of the stack and remove it; raises ``FormatError`` for a MARK."""
        value = self.stack.pop()
        if value is MARK:
            raise FormatError(_STRAY_MARK.format(self.pos - 1))
        return value

    def pop_mark(self) -> list[object]:
        """Return everything above the last MARK, and remove it together with the MARK."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise FormatError(f"corrupt pickle: no MARK at byte {self.pos - 1}")

    def read_bytes(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        if count < 0:
            raise FormatError(f"corrupt pickle: negative length at byte {self.pos}")
        if count > self.end - self.pos:
            raise TruncatedPickleError(
                f"corrupt pickle: a length of {count} bytes at byte {self.pos} points past the end"
            )
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def read_number(self, layout: struct.Struct) -> int:
        """Return the next integer, which has this layout."""
        (value,) = layout.unpack(self.read_bytes(layout.size))
        return int(value)

    def read_line(self) -> str:
        """Return the text up to the next line break."""
        stop = self.data.find(b"\n", self.pos)
        if stop < 0:
            raise TruncatedPickleError(f"the line at byte {self.pos} has no end: truncated?")
        text = self.data[self.pos : stop]
        self.pos = stop + 1
        return text.decode("utf-8")

    def checked_key(self, key: object) -> object:
        """Return ``key``; raises ``FormatError`` for a key that is slow to hash or can be made to collide."""
        if isinstance(key, str):
            return key
        if isinstance(key, tuple):
            self.tuple_keys += 1
            if self.tuple_keys > _MOST_TUPLE_KEYS:
                raise FormatError(f"more than {_MOST_TUPLE_KEYS} dict keys are tuples")
            if len(key) > _LONGEST_TUPLE_KEY or any(isinstance(item, tuple) for item in key):
                raise FormatError("a dict key is a long tuple or a tuple of tuples, which no checkpoint needs")
            for item in key:
                check_key(item)
            return key
        check_key(key)
        return key

    def count_items(self, count: int) -> None:
        """Count what is added to lists, sets and mappings; raises ``FormatError`` for too much of all together."""
        self.items_left -= count
        if self.items_left < 0:
            raise FormatError(_TOO_MUCH.format(_MOST_ITEMS, "items"))

    def put_items(self, target: object, pairs: list[object]) -> None:
        """Set keys and values, which alternate in ``pairs``, in a dict or a placeholder."""
        self.count_items(_UPDATE_COST + _PAIR_COST * len(pairs))
        if len(pairs) % 2:
            raise FormatError(f"corrupt pickle: a key without a value at byte {self.pos - 1}")
        if isinstance(target, dict):
            into = target
        elif isinstance(target, Placeholder):
            into = target.pairs
        else:
            raise FormatError(f"corrupt pickle: items set on a {type(target).__name__} at byte {self.pos - 1}")
        keys = pairs[::2]
        if are_good_keys(keys):
            new = dict(zip(keys, pairs[1::2], strict=True))
            if len(new) == len(keys):
                self.interpreter.set_items(into, new)
                return
        for index in range(0, len(pairs), 2):
            self.interpreter.set_item(into, self.checked_key(pairs[index]), pairs[index + 1])

    def put_values(self, target: object, values: list[object]) -> None:
        """Append values to a list, a set or a placeholder."""
        self.count_items(len(values))
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(self.checked_key(value) for value in values)
        elif isinstance(target, Placeholder):
            target.items.extend(values)
        else:
            raise FormatError(f"corrupt pickle: values appended to a {type(target).__name__} at byte {self.pos - 1}")

    def build(self, target: object, state: object) -> None:
        """Set the state of a mapping or a placeholder; the interpreter decides about any other value."""
        if isinstance(target, PickledMapping):
            # Kept as separate data: torch sets these attributes on the object, where they can hide its methods.
            target.attributes = self._merged(target.attributes, state if isinstance(state, dict) else {"state": state})
        elif isinstance(target, Placeholder):
            target.state = self._merged(target.state, state) if isinstance(state, dict) else state
        else:
            self.interpreter.set_state(target, state)

    def _merged(self, known: object, state: dict[object, object]) -> dict[object, object]:
        if not isinstance(known, dict) or not known:
            return state
        self.interpreter.count_copy(known)
        self.interpreter.count_copy(state)
        return {**known, **state}

    def persistent(self, pid: object) -> object:
        """Return the value of a persistent id, such as a storage."""
        if self.interpreter.persistent is None:
            raise FormatError(f"corrupt pickle: an unexpected persistent id at byte {self.pos - 1}")
        self.storages += 1
        return self.interpreter.persistent(pid)


Operation = Callable[[PickleMachine], None]


def _mark(machine: PickleMachine) -> None:
    """Push a MARK, or do at once all that a batch of plain items does to the list or mapping on the stack."""
    stack, data = machine.stack, machine.data
    batch = None
    if stack and isinstance(stack[-1], list | dict) and isinstance(data, bytes):
        batch = find_batch(data, machine.pos)
    if batch is None:
        stack.append(MARK)
        return
    machine.pos = batch.end
    machine.count_steps(batch.opcodes)
    values, memo = batch.values(), machine.memo
    if isinstance(stack[-1], list) and are_new_numbers(values):
        machine.hold(stack[-1], len(values))
    else:
        machine.batched_items += batch.small
    if batch.puts and not memo.others and batch.has_counted_puts(len(memo.counted)):
        memo.counted += itertools.compress(values, batch.puts)
    elif batch.puts:
        for put, value in zip(batch.puts, values, strict=True):
            if put:
                memo.write(int.from_bytes(put[1:], "little"), value)
    if batch.opcode == APPENDS:
        machine.put_values(stack[-1], values)
    else:
        machine.put_items(stack[-1], values)


_EMPTY_SET_COST = range(12)  # one byte of a pickle makes an empty set, which takes the memory of four lists
_MOST_MEMO = 2**32  # the limit of LONG_BINPUT; larger decimal indexes could be made to collide in the memo


def parse_pickle(data: PickleBytes, interpreter: Interpreter, start: int = 0) -> tuple[object, int]:
    """Return the value of the pickle at ``start`` and the offset of the next byte; no code is run.

    Objects that need code become placeholders. Raises ``FormatError`` for anything but one whole pickle of protocol
    0 to 5, and its subclass ``TruncatedPickleError`` for bytes that end inside the pickle.
    """
    return PickleMachine(data, interpreter, start).run(OPCODES)


_U1, _U2, _I4, _U4, _U8 = (struct.Struct(f"<{code}") for code in "BHiIQ")
_F8 = struct.Struct(">d")


def _constant(value: object) -> Operation:
    return lambda machine: machine.stack.append(value)


def _empty(kind: Callable[[], object]) -> Operation:
    return lambda machine: machine.stack.append(kind())


def _integer(layout: struct.Struct) -> Operation:
    return lambda machine: machine.stack.append(machine.read_number(layout))


def _small_integer(machine: PickleMachine) -> None:
    machine.stack.append(machine.data[machine.pos])
    machine.pos += 1


def _common_text(machine: PickleMachine) -> None:
    data, start = machine.data, machine.pos + _U4.size
    stop = start + int.from_bytes(data[machine.pos : start], "little")
    if stop > machine.end:
        machine.read_bytes(machine.read_number(_U4))  # raises the error
    machine.pos = stop
    machine.stack.append(data[start:stop].decode("utf-8", "surrogatepass"))


def _text(layout: struct.Struct) -> Operation:
    def run(machine: PickleMachine) -> None:
        raw = machine.read_bytes(machine.read_number(layout))
        machine.stack.append(raw.decode("utf-8", "surrogatepass"))

    return run


def _raw(layout: struct.Struct, kind: Callable[[bytes], object]) -> Operation:
    def run(machine: PickleMachine) -> None:
        count, keep = machine.read_number(layout), machine.interpreter.keep_bytes
        if keep is None or not _FEWEST_KEPT <= count <= machine.end - machine.pos:
            machine.stack.append(kind(machine.read_bytes(count)))
            return
        machine.stack.append(keep(machine.pos, count))
        machine.pos += count

    return run


def _old_string(data: bytes) -> object:
    # A str of Python 2 is nearly always text, but arrays store their bytes in one too.
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


_ESCAPED = re.compile(r"""(?:[^\\]|\\(?:[\\'"abfnrtv]|x[0-9a-fA-F]{2}|[0-3]?[0-7]{1,2}))*""")


def _quoted_string(machine: PickleMachine) -> None:
    text = machine.read_line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
        raise FormatError(f"corrupt pickle: a string without quotes before byte {machine.pos}")
    if not _ESCAPED.fullmatch(text[1:-1]):
        raise FormatError(f"corrupt pickle: a string with an unknown escape before byte {machine.pos}")
    machine.stack.append(_old_string(codecs.escape_decode(text[1:-1].encode())[0]))


def _decimal(machine: PickleMachine) -> None:
    text = machine.read_line()
    machine.stack.append({"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L")))


def _long(layout: struct.Struct) -> Operation:
    return lambda machine: machine.stack.append(
        int.from_bytes(machine.read_bytes(machine.read_number(layout)), "little", signed=True)
    )


def _tuple(count: int) -> Operation:
    def run(machine: PickleMachine) -> None:
        stack = machine.stack
        items = tuple(stack[-count:])
        if len(items) < count:
            raise IndexError
        if MARK in items:
            raise FormatError(_STRAY_MARK.format(machine.pos - 1))
        stack[-count:] = (items,)

    return run


def _dict_from_mark(machine: PickleMachine) -> None:
    made: dict[object, object] = {}
    machine.put_items(made, machine.pop_mark())
    machine.stack.append(made)


def _set(machine: PickleMachine) -> None:
    machine.count_items(_SET_COST)
    machine.interpreter.count_copy(_EMPTY_SET_COST)
    machine.stack.append(set())


def _frozenset_from_mark(machine: PickleMachine) -> None:
    machine.count_items(_SET_COST)
    machine.interpreter.count_copy(_EMPTY_SET_COST)
    machine.stack.append(frozenset(machine.checked_key(item) for item in machine.pop_mark()))


def _set_item(machine: PickleMachine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.put_items(machine.stack[-1], [key, value])


def _set_items(machine: PickleMachine) -> None:
    pairs = machine.pop_mark()
    machine.put_items(machine.stack[-1], pairs)


def _append(machine: PickleMachine) -> None:
    value = machine.pop()
    machine.put_values(machine.stack[-1], [value])


def _append_all(machine: PickleMachine) -> None:
    values = machine.pop_mark()
    machine.put_values(machine.stack[-1], values)


def _global(machine: PickleMachine) -> None:
    module, name = machine.read_line(), machine.read_line()
    machine.stack.append(machine.interpreter.lookup(module, name))


def _stack_global(machine: PickleMachine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise FormatError(f"corrupt pickle: a global that is not named by strings at byte {machine.pos - 1}")
    machine.stack.append(machine.interpreter.lookup(module, name))


def _reduce(machine: PickleMachine) -> None:
    stack = machine.stack
    args, function = stack.pop(), stack.pop()
    if args is MARK or function is MARK:
        raise FormatError(_STRAY_MARK.format(machine.pos - 1))
    stack.append(machine.interpreter.call(function, args))


def _new(machine: PickleMachine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.stack.append(machine.interpreter.create(function, args))


def _new_with_keywords(machine: PickleMachine) -> None:
    keywords, args, function = machine.pop(), machine.pop(), machine.pop()
    machine.stack.append(machine.interpreter.create(function, args, keywords))


def _instance(machine: PickleMachine) -> None:
    module, name = machine.read_line(), machine.read_line()
    args = tuple(machine.pop_mark())
    machine.stack.append(machine.interpreter.call(machine.interpreter.lookup(module, name), args))


def _object(machine: PickleMachine) -> None:
    function, *args = machine.pop_mark() or [None]
    machine.stack.append(machine.interpreter.call(function, tuple(args)))


def _build(machine: PickleMachine) -> None:
    state = machine.pop()
    machine.build(machine.stack[-1], state)


def _get(read: Callable[[PickleMachine], int]) -> Operation:
    def run(machine: PickleMachine) -> None:
        index = read(machine)
        machine.stack.append(machine.memo.read(index, machine.pos))

    return run


def _put(read: Callable[[PickleMachine], int]) -> Operation:
    def run(machine: PickleMachine) -> None:
        index = read(machine)
        if not 0 <= index < _MOST_MEMO:
            raise FormatError(f"corrupt pickle: a memo index below 0 or beyond 2^32 before byte {machine.pos}")
        machine.memo.write(index, machine.stack[-1])

    return run


def _binput(machine: PickleMachine) -> None:
    index, memo = machine.data[machine.pos], machine.memo
    machine.pos += 1
    if index == len(memo.counted) and not memo.others:  # a method call would be a tenth of the time of a whole file
        memo.counted.append(machine.stack[-1])
    else:
        memo.write(index, machine.stack[-1])


def _long_binput(machine: PickleMachine) -> None:
    data, start, memo = machine.data, machine.pos, machine.memo
    if start + _U4.size > machine.end:
        machine.read_number(_U4)  # raises the error
    index = int.from_bytes(data[start : start + _U4.size], "little")
    machine.pos = start + _U4.size
    if index == len(memo.counted) and not memo.others:  # as nearly always in a large pickle
        memo.counted.append(machine.stack[-1])
    else:
        memo.write(index, machine.stack[-1])


def _binget(machine: PickleMachine) -> None:
    index, memo = machine.data[machine.pos], machine.memo
    machine.pos += 1
    known = memo.unset <= index < len(memo.counted)
    machine.stack.append(memo.counted[index] if known else memo.read(index, machine.pos))


def _memoize(machine: PickleMachine) -> None:
    machine.memo.write(len(machine.memo), machine.stack[-1])


def _protocol(machine: PickleMachine) -> None:
    version = machine.read_number(_U1)
    if version > 5:
        raise FormatError(f"pickle protocol {version} is not known")


def _frame(machine: PickleMachine) -> None:
    if machine.read_number(_U8) > machine.end - machine.pos:
        raise TruncatedPickleError(f"corrupt pickle: the frame at byte {machine.pos} is longer than the file")


def _refuse(what: str) -> Operation:
    def run(machine: PickleMachine) -> None:
        raise FormatError(f"the pickle uses {what} at byte {machine.pos - 1}, which no checkpoint needs")

    return run


def _recorded(opcode: int, operation: Operation) -> Operation:
    """Return an operation that also records its opcode; in nearly all pickles no such opcode runs."""

    def run(machine: PickleMachine) -> None:
        machine.interpreter.opcodes_refused_by_torch.add(opcode)
        operation(machine)

    return run


# The opcodes of ``torch._weights_only_unpickler``: those that pickles of protocol 2 have.
_WEIGHTS_ONLY = frozenset(b"(GJKMNQRUXabcehjqrstu})]\x80\x81\x85\x86\x87\x88\x89\x8a\x8f.")
_ALL_OPCODES: Final[Mapping[int, Operation]] = {
    0x28: _mark,
    0x30: lambda machine: machine.stack.__delitem__(-1),  # POP takes a MARK too
    0x31: lambda machine: machine.pop_mark().clear(),
    0x32: lambda machine: machine.stack.append(machine.stack[-1]),
    0x46: lambda machine: machine.stack.append(float(machine.read_line())),
    0x47: lambda machine: machine.stack.append(_F8.unpack(machine.read_bytes(8))[0]),
    0x49: _decimal,
    0x4A: _integer(_I4),
    0x4B: _small_integer,
    0x4C: _decimal,
    0x4D: _integer(_U2),
    0x4E: _constant(None),
    0x50: lambda machine: machine.stack.append(machine.persistent(machine.read_line())),
    0x51: lambda machine: machine.stack.append(machine.persistent(machine.pop())),
    0x52: _reduce,
    0x53: _quoted_string,
    0x54: _raw(_I4, _old_string),
    0x55: _raw(_U1, _old_string),
    0x56: lambda machine: machine.stack.append(machine.read_line().encode().decode("raw-unicode-escape")),
    0x58: _common_text,
    0x61: _append,
    0x62: _build,
    0x63: _global,
    0x64: _dict_from_mark,
    0x65: _append_all,
    0x67: _get(lambda machine: int(machine.read_line())),
    0x68: _binget,
    0x69: _instance,
    0x6A: _get(lambda machine: machine.read_number(_U4)),
    0x6C: lambda machine: machine.stack.append(machine.pop_mark()),
    0x6F: _object,
    0x70: _put(lambda machine: int(machine.read_line())),
    0x71: _binput,
    0x72: _long_binput,
    0x73: _set_item,
    0x74: lambda machine: machine.stack.append(tuple(machine.pop_mark())),
    0x75: _set_items,
    0x7D: _empty(dict),
    0x5D: _empty(list),
    0x29: _constant(()),
    0x80: _protocol,
    0x81: _new,
    0x82: _refuse("an extension registry"),
    0x83: _refuse("an extension registry"),
    0x84: _refuse("an extension registry"),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    0x88: _constant(True),
    0x89: _constant(False),
    0x8A: _long(_U1),
    0x8B: _long(_I4),
    0x42: _raw(_U4, bytes),
    0x43: _raw(_U1, bytes),
    0x8C: _text(_U1),
    0x8D: _text(_U8),
    0x8E: _raw(_U8, bytes),
    0x8F: _set,
    0x90: _append_all,
    0x91: _frozenset_from_mark,
    0x92: _new_with_keywords,
    0x93: _stack_global,
    0x94: _memoize,
    0x95: _frame,
    0x96: _raw(_U8, bytearray),
    0x97: _refuse("out-of-band buffers"),
    0x98: _refuse("out-of-band buffers"),
}

OPCODES: Final[Mapping[int, Operation]] = {
    opcode: operation if opcode in _WEIGHTS_ONLY else _recorded(opcode, operation)
    for opcode, operation in _ALL_OPCODES.items()
}
