"""Metadata of safetensors outputs: kept, added and left out as the user says, read back by the safetensors library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckptkit.formats.safetensors as safetensors_format
from ckptkit import (
    convert,
    convert_adapter,
    execute,
    extract_lora,
    merge,
    merge_lora,
    open_checkpoint,
    plan_merge,
    plan_remap,
)
from ckptkit.errors import ArgumentError, OutputError, PlanError, RuleError, hint_for_python
from tests.helpers_cli import run_ckpt

GIVEN = {"format": "pt", "author": "me", "step": "7"}


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "pt") as file:
        found: dict[str, str] | None = file.metadata()
        return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, path, metadata=GIVEN)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], GIVEN),
        (["--metadata", "note=a=b ü\n"], {**GIVEN, "note": "a=b ü\n"}),
        (["--metadata", "author=you"], {**GIVEN, "author": "you"}),
        (["--drop-metadata", "author", "--drop-metadata", "s*"], {"format": "pt"}),
        (
            ["--drop-metadata", "*", "--metadata", "author=you", "--metadata", "format=pt"],
            {"author": "you", "format": "pt"},
        ),
        (["--drop-metadata", "*"], None),
    ],
    ids=["kept", "added", "replaced", "dropped", "new", "none"],
)
@pytest.mark.parametrize("command", ["convert", "remap", "merge", "shards"])
def test_metadata_is_what_was_asked_for(
    command: str, options: list[str], expected: dict[str, str] | None, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command writes exactly these items, into each shard too; the plan and its document name them before."""
    out = source.parent / ("out" if command == "shards" else "out.safetensors")
    inputs = [source, source] if command == "merge" else [source]
    more = ["--max-shard-size", "12"] if command == "shards" else []
    arguments: list[str | Path] = ["convert" if command == "shards" else command, *inputs, "-o", out, *more, *options]
    document = run_ckpt(capsys, *arguments, "-n", "--json").out
    assert not out.exists()
    ran = run_ckpt(capsys, *arguments, "--verify")
    assert ran.code == 0, ran.err
    written = sorted(out.glob("*.safetensors")) if command == "shards" else [out]
    assert len(written) == (2 if command == "shards" else 1)
    assert [metadata_of(path) for path in written] == [expected] * len(written)
    with open_checkpoint(out) as checkpoint:
        assert dict(checkpoint.metadata) == (expected or {})
        assert checkpoint.read("a").tolist() == [1.0, 1.0, 1.0]
    assert f'"metadata": {"{}" if expected is None else "{"}' in document


def test_python_takes_the_same(source: Path) -> None:
    """``convert``, ``merge`` and both plans have the arguments, and a plan carries the result."""
    wanted = {"format": "pt", "step": "7", "run": "x"}
    edits: dict[str, object] = {"metadata": {"run": "x"}, "drop_metadata": "author"}
    out = source.parent / "out.safetensors"
    convert(source, out, **edits)  # type: ignore[arg-type]
    assert metadata_of(out) == wanted
    merge(source, source, out, force=True, **edits)  # type: ignore[arg-type]
    assert metadata_of(out) == wanted
    for plan in (plan_remap(source, **edits), plan_merge(source, source, **edits)):  # type: ignore[arg-type]
        assert plan.metadata == wanted
    out.unlink()
    execute(plan_remap(source, drop_metadata=["author", "step"]), source, out)
    assert metadata_of(out) == {"format": "pt"}


def test_functions_of_adapters_take_the_same(tmp_path: Path) -> None:
    """``merge_lora``, ``extract_lora`` and ``convert_adapter`` have the arguments of ``convert``."""
    base, tuned = {"fc.weight": torch.zeros(4, 4)}, {"fc.weight": torch.ones(4, 4)}
    out, adapter = tmp_path / "out.safetensors", tmp_path / "adapter_model.safetensors"
    edits: dict[str, Any] = {"metadata": {"run": "x"}, "drop_metadata": "format"}
    extract_lora(base, tuned, adapter, 1, metadata={"run": "x"})
    assert metadata_of(adapter) == {"format": "pt", "run": "x"}
    merge_lora(base, adapter, out, metadata={"run": "y"})
    assert metadata_of(out) == {"format": "pt", "run": "y"}
    convert_adapter(adapter, out, "kohya", force=True, **edits)
    assert metadata_of(out) == {"run": "x"}
    calls: tuple[Callable[[], object], ...] = (
        lambda: extract_lora("no such file", tuned, tmp_path / "a.pt", 1, **edits),
        lambda: merge_lora("no such file", adapter, tmp_path / "a.pt", **edits),
        lambda: convert_adapter("no such file", tmp_path / "a.pt", "kohya", **edits),
    )
    for call in calls:
        with pytest.raises(OutputError, match="metadata and drop_metadata are for safetensors"):
            call()


def test_metadata_without_a_format_is_never_an_accident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Older transformers refuse a file whose metadata has no format: it is added to the first item, or a note warns."""
    torch.save({"a": torch.ones(2)}, tmp_path / "in.pt")
    out = tmp_path / "out.safetensors"
    ran = run_ckpt(capsys, "convert", tmp_path / "in.pt", "-o", out, "--metadata", "author=me")
    assert (metadata_of(out), "also says format=pt" in ran.err) == ({"format": "pt", "author": "me"}, True)
    ran = run_ckpt(capsys, "convert", out, "-o", tmp_path / "b.safetensors", "--drop-metadata", "format")
    assert metadata_of(tmp_path / "b.safetensors") == {"author": "me"}
    assert "; --metadata 'format=pt' adds it" in ran.err
    (note,) = plan_remap(out, drop_metadata="format").notes
    assert hint_for_python(note.partition("; ")[2]) == "metadata={'format': 'pt'} adds it"


def test_a_note_says_what_is_lost_with_an_item(tmp_path: Path) -> None:
    """An item that describes tensors, such as the scale of an adapter, is left out with a warning."""
    path = tmp_path / "lora.safetensors"
    tensors = {f"unet.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": '{"unet.r": 2}'})
    (note,) = plan_remap(path, drop_metadata="lora_adapter_metadata").notes
    assert note.startswith("the metadata 'lora_adapter_metadata' is left out, ")


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ({"metadata": {"a": 1}}, ArgumentError, "metadata is a dict"),
        ({"metadata": "a=b"}, ArgumentError, "metadata is the string"),
        ({"drop_metadata": 3}, ArgumentError, "drop_metadata is 3"),
        ({"metadata": {"a": "\udc80"}}, RuleError, "'a' is not Unicode text"),
        ({"drop_metadata": "auhtor"}, RuleError, "matches none of 3 items of metadata .did you mean 'author'"),
    ],
)
def test_what_cannot_be_written_is_refused(
    edits: dict[str, object], error: type[Exception], message: str, source: Path
) -> None:
    """Only text can be metadata, and a pattern that matches no item is an error."""
    with pytest.raises(error, match=message):
        plan_remap(source, **edits)  # type: ignore[arg-type]


def test_metadata_that_no_header_can_hold_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards would each have the same metadata, so the way out is not to write shards."""
    monkeypatch.setattr(safetensors_format, "LARGEST_HEADER", 10_000)
    with pytest.raises(PlanError, match=r"more than safetensors allows \(shorten the metadata"):
        convert(source, source.parent / "out.safetensors", metadata={"a": "x" * 10_000})


@pytest.mark.parametrize("name", ["out.pt", "dcp"])
def test_other_formats_have_no_place_for_it(name: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that cannot hold metadata is refused before an input is opened."""
    out = source.parent / name
    options = [] if name == "out.pt" else ["--format", "dcp"]
    ran = run_ckpt(capsys, "convert", "no such file", "-o", out, "--metadata", "a=b", *options)
    assert (ran.code, out.exists()) == (2, False)
    assert "--metadata and --drop-metadata are for safetensors" in ran.err
    with pytest.raises(OutputError, match="metadata and drop_metadata are for safetensors"):
        convert("no such file", out, metadata={"a": "b"}, format="dcp" if name == "dcp" else None)
