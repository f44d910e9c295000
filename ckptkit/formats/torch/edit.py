"""Edit the pickle of a torch file: replace values of one mapping in the file, and keep everything else."""

from __future__ import annotations

from collections.abc import Sequence

from ckptkit.core.checkpoint import Container, KeyPath, Payload
from ckptkit.core.text import listed, printable, quoted
from ckptkit.errors import FormatError, PlanError
from ckptkit.formats.pickle.edit import Items, child_parts, dict_items, dict_part, renumber_storages, set_dict_items
from ckptkit.formats.pickle.nodes import LEAVE_OUT, Node, Part, edit_error, iterate_nodes, read_nodes, write_nodes
from ckptkit.formats.torch.write import BlockOf, StoredTensor, TorchZipLayout, layout_torch_archive, pickle_state_dict

__all__ = ["TorchFileEditor", "refuse_unknown_code"]

_MOST_NAMES = 4
_PROTOCOL = 2  # of a new file, as torch.save writes it
_FEWEST_PARTS = 1000  # a pickle may always have so many parts,
_PARTS_PER_BYTE = 4  # and so many more for each byte of the pickles that it is made from


def refuse_unknown_code(container: Container, path: str, *, keep_unknown: bool) -> None:
    """Raise ``PlanError`` for a file that names code which torch refuses, unless the user asked to keep the code."""
    if container.references and not keep_unknown:
        names = listed(container.references, _MOST_NAMES, show=printable)
        raise PlanError(
            f"names code that torch.load(weights_only=True) refuses: {names}",
            hint=f"--keep-unknown keeps it, not run; {LEAVE_OUT}",
            path=path,
        )


class TorchFileEditor:
    """The pickle of a torch file with one mapping to edit, or a new file with an empty mapping.

    A user of the editor changes ``root`` and ``mapping``, and then asks for the ``layout`` of the new file. ``limit``
    is the number of parts that the new pickle may have: a small pickle with much sharing can expand without end.
    """

    def __init__(self, container: Container | None = None) -> None:
        """Read the pickle of the file; raises ``PlanError`` for a file that cannot be edited."""
        self._container = container
        self._new_storages: dict[int, Node] = {}  # by id; the nodes are kept so that no other object gets the id
        self._children: dict[KeyPath, dict[object, Part]] = {}
        self.limit = _FEWEST_PARTS
        if container is None:
            self.root, self._protocol = dict_part([]), _PROTOCOL
            self.mapping = self.root
            return
        if container.unwritable:
            raise edit_error(container.unwritable)
        data = container.pickle()
        self.limit += _PARTS_PER_BYTE * len(data)
        try:
            root, self._protocol = read_nodes(data)
        except FormatError as error:
            raise edit_error(error.reason) from None
        part = root
        for key in container.path:
            part = _child(child_parts(part), key)
        dict_items(part)  # raises for anything but a mapping
        assert isinstance(root, Node) and isinstance(part, Node)  # noqa: S101, PT018 - dict_items raised otherwise
        self.root, self.mapping = root, part

    def items(self) -> Items:
        """Return the keys and values of the mapping."""
        return dict_items(self.mapping)

    def set_items(self, items: Items) -> None:
        """Replace the keys and values of the mapping."""
        set_dict_items(self.mapping, items)

    def part_at(self, path: KeyPath) -> Part:
        """Return the part at a key path below the mapping; raises ``PlanError`` if nothing is there."""
        if not path:
            return self.mapping
        parent = path[:-1]
        if parent not in self._children:
            self._children[parent] = child_parts(self.part_at(parent))
        return _child(self._children[parent], path[-1])

    def add_tensors(self, tensors: Sequence[StoredTensor]) -> dict[str, Part]:
        """Return a new part for each tensor, by key; the tensor's ``record`` is an index of ``layout``'s records."""
        pickle = pickle_state_dict(tensors, {})
        self.limit += _PARTS_PER_BYTE * len(pickle)
        root, _ = read_nodes(pickle)
        self._new_storages |= {id(node): node for node in iterate_nodes(root) if node.op == b"Q"}
        values = (value for _, value in dict_items(root))
        return dict(zip((tensor.info.key for tensor in tensors), values, strict=True))

    def layout(
        self, records: Sequence[Payload], block: BlockOf = lambda _: 0, *, in_order: bool = False
    ) -> TorchZipLayout:
        """Return the layout of the edited file, with ``records`` for new storages; call this once, after all edits.

        ``block`` and ``in_order`` are as in ``layout_torch_archive``.

        Raises ``PlanError`` if the pickle cannot be written again as it was.
        """
        names = renumber_storages(self.root, self._new_storages)
        storages = [records[name] if isinstance(name, int) else self._old_storage(name) for name in names]
        pickle = write_nodes(self.root, self._protocol, self.limit)
        others = self._container.other_records() if self._container else ()
        return layout_torch_archive(pickle, storages, others, block=block, in_order=in_order)

    def _old_storage(self, name: str) -> Payload:
        if self._container is None:
            raise edit_error(f"no file has the storage {quoted(name)}")
        return self._container.storage(name)


def _child(children: dict[object, Part], key: object) -> Part:
    if key not in children:
        raise edit_error(f"it has nothing at {quoted(str(key))}")
    return children[key]
