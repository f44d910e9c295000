"""The files that go along with an output, and the writing of them beside the weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ckptkit.core.checkpoint import Payload
from ckptkit.core.files.payloads import Extent
from ckptkit.core.files.places import is_same_file, join, open_source
from ckptkit.core.text import listed, quoted
from ckptkit.formats.writing.output_file import OutputFile
from ckptkit.formats.writing.state import Target
from ckptkit.formats.writing.targets import prepare_target
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Dropped

__all__ = ["Adapted", "Carried", "target_of", "write_carried"]


_MOST_LISTED = 4


@dataclass(frozen=True, slots=True)
class Adapted:
    """A statement of a carried file that was changed to what the output holds; ``written`` is None if it is removed.

    ``statement`` is a path such as ``text_config.dtype``.
    """

    file: str
    statement: str
    found: object
    written: object

    def __str__(self) -> str:
        """Return the change as a sentence."""
        if self.written is None:
            return f"{self.file}: {self.statement} was removed, because no weight of the output is quantised"
        if isinstance(self.written, dict) and "quant_method" in self.written:
            method = quoted(str(self.written["quant_method"]))
            verb = "added" if self.found is None else "replaced"
            return f"{self.file}: {self.statement} was {verb}, with the method {method}"
        if isinstance(self.written, list):
            before = self.found if isinstance(self.found, list) else []
            added = [str(one) for one in self.written if one not in before]
            return f"{self.file}: {self.statement} also lists {listed(added, _MOST_LISTED)}"
        if self.found is None:
            return f"{self.file}: {self.statement} was not there and is now {_as_json(self.written)}"
        return f"{self.file}: {self.statement} was {_as_json(self.found)} and is now {_as_json(self.written)}"


def _as_json(value: object) -> str:
    """Return a value as the file spells it, as ``true`` for True; text has the quotes of other sentences."""
    return json.dumps(value) if isinstance(value, bool | int | float) else quoted(str(value))


@dataclass(frozen=True, slots=True)
class Carried:
    """The files to carry from one directory, the new content of those that change, and sentences about the rest.

    ``role`` is the role of the input in that directory.
    """

    role: str = ""
    directory: str = ""
    names: tuple[str, ...] = ()
    contents: Mapping[str, bytes] = field(default_factory=dict)
    adapted: tuple[Adapted, ...] = ()
    notes: tuple[str, ...] = ()

    def takes(self, drop: Dropped) -> bool:
        """Return whether an entry that the tensors leave out is a file that the output gets, of this input or another.

        Files of several inputs can have one name, and the output has room for one of them.
        """
        return drop.is_entry and drop.key in self.names


def target_of(carried: Carried, name: str, directory: str, *, force: bool) -> Target | None:
    """Return where a file goes, or None if it is there: the directory of the output can be that of the input."""
    path = join(directory, name)
    if name not in carried.contents and is_same_file(join(carried.directory, name), path):
        return None
    return prepare_target(path, force=force)


class CreateBeside(Protocol):
    """A function that returns a new file beside the weights, or None for one that is there already."""

    def __call__(self, name: str, size: int, *, by_kernel: bool) -> OutputFile | None:
        """Return the file, which is not open yet."""
        ...


def write_carried(carried: Carried, create: CreateBeside, output: Output) -> None:
    """Write the files that go along into the files that ``create`` returns, as ``reflink`` of the output says.

    All are complete before the first gets its name.
    """
    with contextlib.ExitStack() as stack:
        for name in carried.names:
            _write(carried, name, create, stack, by_kernel=output.reflink != "never")


def _write(carried: Carried, name: str, create: CreateBeside, stack: contextlib.ExitStack, *, by_kernel: bool) -> None:
    content = carried.contents.get(name)
    if content is not None:
        file = create(name, len(content), by_kernel=by_kernel)
        if file is not None:
            stack.enter_context(file).write(content, 0)
        return
    source = open_source(join(carried.directory, name))
    try:
        file = create(name, source.size, by_kernel=by_kernel)
        if file is None:
            return
        stack.enter_context(file)
        payload: Payload = Extent(source, 0, source.size)
        for _ in file.copy(payload, 0):
            pass
        source.check_unchanged(by_path=True)
    finally:
        source.close()
