"""A Checkpoint is a value: nothing outside can change one, and a derived one shares the open files."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from ckptkit import open_checkpoint
from ckptkit.core.checkpoint import Access, Checkpoint, Description, Entry, TensorInfo
from ckptkit.core.dtypes import torch_shape, torch_view, unpack_float4
from ckptkit.errors import CkptkitError

ATTRIBUTES = sorted(name for name, value in vars(Checkpoint).items() if isinstance(value, property))


def _unread(info: TensorInfo) -> None:
    raise AssertionError(info)


def _checkpoint(**fields: object) -> Checkpoint:
    description = Description("a.pt", "test", **fields)  # type: ignore[arg-type]
    return Checkpoint({"w": TensorInfo("w", "F32", (2,))}, Access(_unread), description)  # type: ignore[arg-type]


def test_every_documented_attribute_is_read_only() -> None:
    """README and DESIGN name these; whoever assigns to one gets an error, and the old value remains."""
    assert {"path", "format", "entries", "metadata", "warnings", "references", "files"} <= set(ATTRIBUTES)
    checkpoint = _checkpoint(warnings=["odd"])
    for name in ATTRIBUTES:
        before = getattr(checkpoint, name)
        with pytest.raises(AttributeError):
            setattr(checkpoint, name, "changed")
        assert getattr(checkpoint, name) == before
    with pytest.raises(AttributeError):
        checkpoint.remark = "new"  # type: ignore[attr-defined]


def test_values_of_the_caller_are_copied() -> None:
    """Changing a list or dict after the call changes no Checkpoint, and the mappings reject assignments."""
    warnings, metadata = ["odd"], {"a": "1"}
    checkpoint = _checkpoint(warnings=warnings, metadata=metadata)
    warnings.append("more")
    metadata["b"] = "2"
    assert (checkpoint.warnings, dict(checkpoint.metadata)) == (("odd",), {"a": "1"})
    with pytest.raises(TypeError):
        checkpoint.metadata["b"] = "2"  # type: ignore[index]


def test_a_constructor_of_few_arguments() -> None:
    """Fewer than ten: what a reader states is one value, the functions that reach the bytes another."""
    assert len(inspect.signature(Checkpoint).parameters) < 10


def test_a_derived_checkpoint_has_more_and_leaves_the_first_alone() -> None:
    """Warnings and entries are added behind the old ones."""
    first = _checkpoint(warnings=["odd"])
    entry = Entry("epoch", "int", 3)
    second = first.with_warnings("odder").with_entries(entry)
    assert (second.warnings, second.entries) == (("odd", "odder"), (entry,))
    assert (first.warnings, first.entries) == (("odd",), ())
    assert dict(second) == dict(first)


@pytest.mark.parametrize("closes_first", [True, False])
def test_a_derived_checkpoint_shares_the_open_files(tmp_path: Path, *, closes_first: bool) -> None:
    """Closing either closes the files of both, once."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path)
    first = open_checkpoint(path)
    second = first.with_warnings("odd")
    assert torch.equal(second.read("w"), torch.ones(2))
    (first if closes_first else second).close()
    for checkpoint in (first, second):
        with pytest.raises((CkptkitError, OSError, ValueError)):
            checkpoint.read("w")
        checkpoint.close()


def test_closing_twice_calls_the_reader_once() -> None:
    """The function of the reader runs at the first close alone."""
    closed: list[str] = []
    access = Access(_unread, close=lambda: closed.append("now"))  # type: ignore[arg-type]
    checkpoint = Checkpoint({}, access, Description("a.pt", "test"))
    with checkpoint.with_warnings("odd"):
        pass
    checkpoint.close()
    assert closed == ["now"]


def test_float4_geometry_counts_two_elements_a_byte() -> None:
    """torch counts bytes, the safetensors code counts elements; bytes with a gap have no strides in elements."""
    assert unpack_float4((3, 4), (4, 1), 8) == ((3, 8), (8, 1), 16)
    assert torch_shape("F4", (3, 8)) == (3, 4)
    assert torch_view("F4", (3, 8), (8, 1), 16) == ((3, 4), (4, 1), 8)
    assert torch_view("F32", (3, 8), (8, 1), 16) == ((3, 8), (8, 1), 16)
    assert unpack_float4((3, 4), (1, 3), 0) is None
    assert unpack_float4((), (), 0) is None
