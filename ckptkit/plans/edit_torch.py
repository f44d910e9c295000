"""Apply a plan to a torch file: replace the tensors of one mapping, and keep everything else in the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ckptkit.core.checkpoint import Checkpoint, Container, Payload
from ckptkit.core.text import listed, printable, quoted
from ckptkit.errors import PlanError
from ckptkit.formats import errors_about
from ckptkit.formats.pickle.edit import (
    Items,
    call_arguments,
    called_name,
    dict_items,
    set_dict_items,
    storage_name,
    text_part,
    tuple_part,
)
from ckptkit.formats.pickle.nodes import Node, Part, edit_error, iterate_nodes, plain_value
from ckptkit.formats.torch.edit import TorchFileEditor, refuse_unknown_code
from ckptkit.formats.torch.write import BlockOf, StoredTensor, TorchZipLayout
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan, Step
from ckptkit.plans.steps import moved_modules

__all__ = ["PlanEditor", "editor_for"]

_MOST_NAMES = 4
_TENSOR_FUNCTIONS = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_PARAMETER_FUNCTIONS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS_FUNCTIONS = ("torch._tensor._rebuild_from_type_v2", "torch.tensor._rebuild_from_type_v2")


def editor_for(plan: Plan, output: Output, roles: Mapping[str, Checkpoint]) -> PlanEditor | None:
    """Return the editor of the file that the output copies, or None for an output that holds only tensors.

    Raises ``PlanError`` for a file that cannot be edited, or that names unknown code without ``keep_unknown``.
    """
    if not plan.edited_role or output.format != "torch" or output.only_tensors:
        return None
    checkpoint = roles[plan.edited_role]
    if checkpoint.container is None:
        raise PlanError(f"the {plan.edited_role} is not the file that the plan was made from", path=checkpoint.path)
    refuse_unknown_code(checkpoint.container, checkpoint.path, keep_unknown=output.keep_unknown)
    with errors_about(checkpoint.path):
        return PlanEditor(checkpoint.container, plan, plan.edited_role)


class PlanEditor:
    """A torch file that is ready to get the tensors of a plan.

    ``notes`` name side effects on the rest of the file. ``changed`` has the steps that write a new tensor.
    """

    def __init__(self, container: Container, plan: Plan, role: str) -> None:
        """Read the pickle of the file; raises ``PlanError`` with the reason if the plan cannot be applied."""
        self._file = TorchFileEditor(container)
        self._plan, self._role = plan, role
        if self._file.mapping.updates_at_use != len(self._file.mapping.updates):
            raise edit_error("the mapping of its tensors holds itself")
        key_of = {path[0]: key for key, path in container.paths.items() if len(path) == 1}
        self._items = {plain_value(key): (key, value) for key, value in self._file.items()}
        self._tensor_names = {name: key_of[name] for name in self._items if name in key_of}
        self._tensors = {key: self._items[name] for name, key in self._tensor_names.items()}
        self._nested_keys = {key for key in container.paths if key not in self._tensors}
        self._refuse_nested_changes()
        self.changed = [step for step in plan.steps if not self._is_unchanged(step)]
        self._set_tensors({step.out.key: b"N" for step in self.changed})
        self._rename_modules()
        self.notes = tuple(self._notes())

    def layout(
        self,
        tensors: Sequence[StoredTensor],
        records: Sequence[Payload],
        block: BlockOf = lambda _: 0,
        *,
        in_order: bool = False,
    ) -> TorchZipLayout:
        """Return the layout of the edited file, with these tensors for the steps in ``changed``.

        ``block`` and ``in_order`` are as in ``layout_torch_archive``.

        Raises ``PlanError`` if the pickle cannot be written again as it was.
        """
        parts = self._file.add_tensors(tensors)
        views = {
            tensor.info.key: (tensor.record, tensor.offset, tensor.stride, tensor.info.shape) for tensor in tensors
        }
        wrapped: dict[object, Part] = {}  # two keys of one object remain two keys of one object
        for step in self.changed:
            key, old = step.out.key, self._replaced_part(step)
            if old is None:
                continue
            identity = (id(old), views[key], step.out.dtype)
            if identity not in wrapped:
                wrapped[identity] = _wrap_like(parts[key], old, floating=step.out.dtype.startswith(("F", "BF", "C")))
            parts[key] = wrapped[identity]
        self._set_tensors(parts)
        return self._file.layout(records, block, in_order=in_order)

    def _is_unchanged(self, step: Step) -> bool:
        return step.is_copy and step.sources[0].role == self._role

    def _replaced_key(self, step: Step) -> str:
        """Return the key of the tensor in the file that a step replaces."""
        return step.sources[0].key if step.sources[0].role == self._role else step.out.key

    def _replaced_part(self, step: Step) -> Part | None:
        item = self._tensors.get(self._replaced_key(step))
        return None if item is None else item[1]

    def _refuse_nested_changes(self) -> None:
        kept = {
            step.out.key
            for step in self._plan.steps
            if self._is_unchanged(step) and step.sources[0].key == step.out.key
        }
        if changed := self._nested_keys - kept:
            raise edit_error(f"{quoted(min(changed))} is nested deeper than the other tensors, and would be changed")

    def _set_tensors(self, parts: Mapping[str, Part]) -> None:
        """Put the tensors of the plan into the mapping, in the order of the plan.

        An item that is not a tensor still follows the same tensor as in the file.
        """
        steps = [step for step in self._plan.steps if self._replaced_key(step) not in self._nested_keys]
        last_step = {self._replaced_key(step): number for number, step in enumerate(steps)}
        others: dict[int, Items] = {}  # by the number of the step before
        previous = -1
        for name, item in self._items.items():
            if name in self._tensor_names:
                previous = last_step.get(self._tensor_names[name], previous)
            else:
                others.setdefault(previous, []).append(item)
        items = others.get(-1, [])
        for number, step in enumerate(steps):
            key, (old_key, value) = step.out.key, self._tensors.get(self._replaced_key(step), (b"", b""))
            keeps_key = old_key and self._replaced_key(step) == key
            items.append((old_key if keeps_key else text_part(key), value if self._is_unchanged(step) else parts[key]))
            items += others.get(number, [])
        repeated = [name for name, count in Counter(plain_value(key) for key, _ in items).items() if count > 1]
        if repeated:
            raise edit_error(f"{quoted(str(repeated[0]))} is already the key of a value that is not a tensor")
        self._file.set_items(items)

    def _rename_modules(self) -> None:
        """Rename the modules in ``_metadata`` as the plan renames their tensors."""
        renamed = {
            step.sources[0].key: step.out.key
            for step in reversed(self._plan.steps)
            if step.recipe is None and step.sources[0].role == self._role
        }
        if all(old == new for old, new in renamed.items()):
            return
        for update in self._file.mapping.updates:
            if update.op != b"b":
                continue
            table = {plain_value(key): value for key, value in dict_items(update.args[0])}.get("_metadata")
            if not isinstance(table, Node):
                continue
            entries = {plain_value(key): value for key, value in dict_items(table)}
            moved = moved_modules([name for name in entries if isinstance(name, str)], renamed)
            set_dict_items(table, [(text_part(new), entries[old]) for old, new in moved.items()])

    def _notes(self) -> Iterator[str]:
        mapping = self._file.mapping
        uses, kept = 0, set()
        for node in iterate_nodes(self._file.root):
            uses += sum(part is mapping for part in node.parts())
            if node.op == b"Q":
                kept.add(storage_name(node))
        if uses > 1:
            yield "several places of the file share the mapping as one object: all these places change"
        separated = []
        for step in self.changed:
            old = self._replaced_part(step)
            if old is not None and any(node.op == b"Q" and storage_name(node) in kept for node in iterate_nodes(old)):
                separated.append(step.out.key)
        if separated:
            names = listed(separated, _MOST_NAMES, show=printable)
            yield f"no longer share a storage with tensors that the file keeps: {names}"


def _wrap_like(new: Part, old: Part, *, floating: bool) -> Part:
    """Return a new tensor as the same kind of object as the old one.

    A parameter stays a parameter, and device, ``requires_grad`` and attributes stay the same. ``floating`` says
    whether the new dtype can have gradients.
    """
    if not isinstance(old, Node) or not isinstance(new, Node) or old.op != b"R":
        return new
    name, old_args = called_name(old), call_arguments(old)
    if name in _PARAMETER_FUNCTIONS:
        requires_grad = old_args[1] if floating else b"\x89"
        data = _wrap_like(new, old_args[0], floating=floating)
        return Node(b"R", (old.args[0], tuple_part((data, requires_grad, *old_args[2:]))))
    function, new_args = new.args[0], call_arguments(new)
    if name in _SUBCLASS_FUNCTIONS and called_name(Node(b"R", (old_args[0],))) in _TENSOR_FUNCTIONS:
        inner = _wrap_like(new, Node(b"R", (old_args[0], old_args[2])), floating=floating)
        assert isinstance(inner, Node)  # noqa: S101 - the new tensor is a call
        return Node(b"R", (old.args[0], tuple_part((*inner.args[:1], old_args[1], *inner.args[1:], *old_args[3:]))))
    if name not in _TENSOR_FUNCTIONS:
        return new
    storage_id, others = new_args[0], list(new_args[1:])
    assert isinstance(storage_id, Node) and isinstance(old_args[0], Node)  # noqa: S101, PT018 - both are tensors
    kind, storage, number, _, count = call_arguments(storage_id)
    storage_id.args = (tuple_part((kind, storage, number, call_arguments(old_args[0])[3], count)),)
    if len(old_args) > 5:
        others[3:5] = old_args[4] if floating else b"\x89", old_args[5]
    return Node(b"R", (function, tuple_part((storage_id, *others))))
