"""Editing a file of torch: one mapping of tensors in it made anew, and everything else as it was.

The file's pickle is taken apart into opcodes and put together again; no class in it is known, imported or called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.core.checkpoint import Checkpoint, Container
from ckptkit.core.text import printable, quoted
from ckptkit.errors import PlanError
from ckptkit.formats import errors_about
from ckptkit.formats.pickle.edit import (
    WAY_OUT,
    Pairs,
    arguments_of,
    called,
    items_of,
    name_of,
    number_storages,
    part_at,
    refusal,
    set_items,
    storage_name,
    text_part,
)
from ckptkit.formats.pickle.nodes import Node, Part, iterate_nodes, read_nodes, write_nodes
from ckptkit.formats.torch.write import StoredTensor, pickle_state_dict
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.steps import moved_modules

__all__ = ["Edited", "Editor", "editor_for", "refuse_unknown"]

_MOST_NAMED = 4
_PARTS_PER_BYTE = 4
_REBUILT = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_WRAPPED = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = ("torch._tensor._rebuild_from_type_v2", "torch.tensor._rebuild_from_type_v2")


@dataclass(frozen=True, slots=True)
class Edited:
    """A pickle, and the storages that it asks for, numbered from 0: one of the file by name, or a new record."""

    pickle: bytes
    storages: tuple[str | int, ...]


def editor_for(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> Editor | None:
    """Return the editor of the file that the output is to be a copy of; None where it holds tensors alone.

    Raises ``PlanError`` where the file names code that is not to be kept without being asked for, or cannot be edited.
    """
    if not plan.edited_role or output.format != "torch" or output.only_tensors:
        return None
    checkpoint = roles[plan.edited_role]
    if checkpoint.container is None:
        raise PlanError(f"the {plan.edited_role} is not what the plan was made from", path=checkpoint.path)
    refuse_unknown(checkpoint.container, checkpoint.path, keep_unknown=output.keep_unknown)
    with errors_about(checkpoint.path):
        return Editor(checkpoint.container, plan, plan.edited_role)


def refuse_unknown(container: Container, path: str, *, keep_unknown: bool) -> None:
    """Raise ``PlanError`` where a file names code that is not to be kept without being asked for."""
    unknown = container.references
    if unknown and not keep_unknown:
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        named = ", ".join(map(printable, unknown[:_MOST_NAMED]))
        raise PlanError(
            f"names code that torch.load(weights_only=True) refuses: {named}{more}",
            hint=f"--keep-unknown keeps it, not run; {WAY_OUT}",
            path=path,
        )


class Editor:
    """The pickle of a file, ready to have the tensors of a plan put into the mapping that they were taken from.

    ``notes`` say what else changes by that.
    """

    def __init__(self, container: Container, plan: Plan, role: str) -> None:
        """Take the pickle apart; raises ``PlanError`` where the plan cannot be carried out in the file, naming why."""
        if container.unwritable:
            raise refusal(container.unwritable)
        self.container, self._plan, self._role = container, plan, role
        data = container.pickle()
        self._most = _PARTS_PER_BYTE * len(data)
        self._root, self._protocol = read_nodes(data)
        self._mapping = self._find(container.path)
        if self._mapping.seen != len(self._mapping.events):
            raise refusal("the mapping of its tensors holds itself")
        self._flat = {place[0]: key for key, place in container.paths.items() if len(place) == 1}
        self._pairs = {name_of(key): (key, value) for key, value in items_of(self._mapping)}
        self._old = {self._flat[name]: pair for name, pair in self._pairs.items() if name in self._flat}
        self._deep = {key for key, place in container.paths.items() if key not in self._old}
        self._refuse_deep()
        self._edit({step.out.key: b"N" for step in plan.steps if not self._stays(step)})
        self._rename_modules()
        self.notes = tuple(self._notes())

    def edited(self, stored: Sequence[StoredTensor]) -> Edited:
        """Return the pickle with these tensors for the steps that change one; raises ``PlanError`` where it fails."""
        pickle = pickle_state_dict(stored, {})
        root, _ = read_nodes(pickle)
        made = dict(zip((tensor.info.key for tensor in stored), (value for _, value in items_of(root)), strict=True))
        fresh = {id(node) for node in iterate_nodes(root) if node.op == b"Q"}
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
        storages = number_storages(self._root, fresh)
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
            part = part_at(part, name)
        if not isinstance(part, Node):
            raise refusal("the mapping of its tensors is written in a way that is not known")
        return part

    def _refuse_deep(self) -> None:
        kept = {step.out.key for step in self._plan.steps if self._stays(step) and step.sources[0].key == step.out.key}
        if changed := self._deep - kept:
            raise refusal(f"{quoted(min(changed))} lies deeper in the mapping than under a name, and would be changed")

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
            pairs.append((written if same else text_part(key), value if self._stays(step) else made[key]))
            pairs += others.get(number, [])
        twice = [name for name, count in Counter(name_of(key) for key, _ in pairs).items() if count > 1]
        if twice:
            raise refusal(f"{quoted(str(twice[0]))} is the name of something in the mapping that is no tensor")
        set_items(self._mapping, pairs)

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
            table = {name_of(key): value for key, value in items_of(event.args[0])}.get("_metadata")
            if not isinstance(table, Node):
                continue
            entries = {name_of(key): value for key, value in items_of(table)}
            moved = moved_modules([name for name in entries if isinstance(name, str)], renamed)
            set_items(table, [(text_part(new), entries[old]) for old, new in moved.items()])

    def _notes(self) -> Iterator[str]:
        uses, kept = 0, set()
        for node in iterate_nodes(self._root):
            uses += sum(part is self._mapping for part in node.parts())
            if node.op == b"Q":
                kept.add(storage_name(node))
        if uses > 1:
            yield "the mapping is in the file more than once, as one object: it changes wherever it is"
        apart = []
        for step in self.changed:
            old = self._predecessor(step)
            if old is not None and any(node.op == b"Q" and storage_name(node) in kept for node in iterate_nodes(old)):
                apart.append(step.out.key)
        if apart:
            more = f" and {len(apart) - _MOST_NAMED} more" if len(apart) > _MOST_NAMED else ""
            named = ", ".join(map(printable, apart[:_MOST_NAMED]))
            yield f"written apart, in one storage before with tensors that are kept as they are: {named}{more}"


def _dress(new: Part, old: Part, *, floating: bool) -> Part:
    """Return a new tensor as what the old one was: a parameter, on its device, requiring gradients, with attributes."""
    if not isinstance(old, Node) or not isinstance(new, Node) or old.op != b"R":
        return new
    name, given = called(old), arguments_of(old)
    if name in _WRAPPED:
        wants = given[1] if floating else b"\x89"
        return Node(b"R", (old.args[0], Node(b"t", (_dress(new, given[0], floating=floating), wants, *given[2:]))))
    function, parts = new.args[0], arguments_of(new)
    if name in _TYPED and _called_by(given[0]) in _REBUILT:
        inner = _dress(new, Node(b"R", (given[0], given[2])), floating=floating)
        assert isinstance(inner, Node)  # noqa: S101 - it is a call, as the new tensor is
        return Node(b"R", (old.args[0], Node(b"t", (*inner.args[:1], given[1], *inner.args[1:], *given[3:]))))
    if name not in _REBUILT:
        return new
    pid, others = parts[0], list(parts[1:])
    assert isinstance(pid, Node) and isinstance(given[0], Node)  # noqa: S101, PT018 - both were read as tensors
    kind, storage, number, _, count = arguments_of(pid)
    pid.args = (Node(b"t", (kind, storage, number, arguments_of(given[0])[3], count)),)
    if len(given) > 5:
        others[3:5] = given[4] if floating else b"\x89", given[5]
    return Node(b"R", (function, Node(b"t", (pid, *others))))


def _called_by(function: Part) -> str:
    return called(Node(b"R", (function,)))
