"""``ckpt stats`` and ``stats`` agree with torch's own arithmetic over the loaded tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import open_checkpoint, stats
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.errors import FormatError, ModelError, PlanError, RuleError
from ckptkit.statistics.value_stats import ValueStats
from tests.formats.test_big_endian import big
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_formats import saved, write
from tests.helpers_gguf import gguf_file
from tests.helpers_gguf import info as gguf_info

DDP, TEN, TIED = "fixtures/lenet_ddp.pt", "fixtures/lenet_10class.pth", "fixtures/encoder_tied.pt"
NAN, INF = math.nan, math.inf


def assert_agrees(found: ValueStats | None, tensor: torch.Tensor) -> None:
    """Assert that statistics equal those that torch computes for the finite elements in float64."""
    assert found is not None
    wide = tensor.to(torch.float64).reshape(-1)
    wide = wide[wide.isfinite()]
    assert found.count == tensor.numel()
    assert (found.min, found.max) == (wide.min().item(), wide.max().item())
    assert found.mean == pytest.approx(wide.mean().item(), rel=1e-11, abs=1e-13)
    assert found.std == pytest.approx(wide.std(correction=0).item(), rel=1e-11)
    assert found.l1 == pytest.approx(torch.linalg.vector_norm(wide, 1).item(), rel=1e-12)
    assert found.l2 == pytest.approx(torch.linalg.vector_norm(wide).item(), rel=1e-12)
    assert found.abs_max == wide.abs().max().item()
    assert found.zeros == int((wide == 0).sum())


@pytest.mark.parametrize("path", [DDP, TEN, TIED, "fixtures/encoder_sharded"])
def test_every_tensor_of_a_file(path: str) -> None:
    """Keys are in the order of the file, and the statistics of each agree with torch."""
    with open_checkpoint(ROOT / path) as checkpoint:
        found = stats(checkpoint)
        assert list(found.tensors) == list(checkpoint)
        for key, tensor in found.tensors.items():
            assert_agrees(tensor.numbers, checkpoint.read(key))


def test_views_of_one_storage_and_conjugates(tmp_path: Path) -> None:
    """Transposed, strided, expanded and overlapping views have the statistics of their elements, not of the storage."""
    base = torch.randn(60, 50)
    tensors = {"t": base.T, "s": base[::3, 1::2], "e": base[:1].expand(9, 50), "o": base[1:], "one": base[3, 4]}
    z = torch.randn(7, dtype=torch.complex64)
    with open_checkpoint(write(tmp_path, saved({**tensors, "c": z.conj()}))) as checkpoint:
        found = stats(checkpoint)
    for key, tensor in tensors.items():
        assert_agrees(found.tensors[key].numbers, tensor)
    assert_agrees(found.tensors["c"].numbers, torch.view_as_real(z.conj().resolve_conj()))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_big_endian_numbers(tmp_path: Path, kind: torch.dtype) -> None:
    tensor = (torch.randn(1000) * 100).to(kind)
    with open_checkpoint(write(tmp_path, big(saved({"w": tensor}), kind.itemsize))) as checkpoint:
        assert_agrees(stats(checkpoint).tensors["w"].numbers, tensor)


def test_ties_are_read_once_and_counted_once() -> None:
    """A tied tensor names the first key of the tie; the total, and a module with both keys, count it once."""
    seen: list[int] = []
    shared = torch.randn(40)
    model = {"a.x": shared, "a.y": shared, "b.x": shared, "b.z": torch.randn(8)}
    found = stats(model, progress=seen.append)
    assert sum(seen) == 4 * 48
    assert [tensor.same_as for tensor in found.tensors.values()] == ["", "a.x", "a.x", ""]
    assert found.total.count == 48
    assert {name: numbers.count for name, numbers in found.modules(1).items()} == {"a": 40, "b": 48}
    assert_agrees(found.modules(1)["b"], torch.cat([shared, model["b.z"]]))


def test_stats_of_modules() -> None:
    """At each depth a module has the moments of all elements below it, however different its tensors are."""
    parts = {
        "encoder.0.weight": torch.randn(300) + 1e4,
        "encoder.0.bias": torch.randn(7).bfloat16(),
        "encoder.1.weight": torch.full((50,), 3.0),
        "head.weight": torch.arange(9),
        "scale": torch.tensor(2.5),
    }
    found = stats(parts)
    for depth, expected in (
        (0, {"": list(parts)}),
        (1, {"encoder": list(parts)[:3], "head": ["head.weight"], "": ["scale"]}),
        (9, {"encoder.0": list(parts)[:2], "encoder.1": list(parts)[2:3], "head": ["head.weight"], "": ["scale"]}),
    ):
        modules = found.modules(depth)
        assert list(modules) == list(expected)
        for module, keys in expected.items():
            assert_agrees(modules[module], torch.cat([parts[key].double().reshape(-1) for key in keys]))


def test_tensors_without_stats_are_listed_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantized tensors, sparse tensors and dtypes without arithmetic are listed with a reason; the exit code is 0."""
    data = gguf_file([gguf_info("q", (256,), 12), gguf_info("w", (4,), 0, 160)], data=bytes(160) + bytes(16))
    path = write(tmp_path, data, "m.gguf")
    with open_checkpoint(path) as checkpoint:
        found = stats(checkpoint)
    assert (found.tensors["q"].numbers, found.tensors["q"].why) == (None, "quantized tensor")
    assert found.total.zeros == found.total.count == 4
    ran = run_ckpt(capsys, "stats", path)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split() for line in ran.out.splitlines()[6:8]] == [
        ["not", "measured", "dtype", "shape", "because"], ["q", "Q4_K", "[256]", "quantized", "tensor"],
    ]  # fmt: skip
    assert repr(found) == "<StateDictStats: 1 of 2 tensors measured>"
    document = json.loads(run_ckpt(capsys, "stats", path, "--json").out)
    assert document["not_judged"] == [{"key": "q", "dtype": "Q4_K", "shape": [256], "reason": "quantized tensor"}]
    sparse = stats({"s": torch.eye(3).to_sparse(), "b": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)})
    reasons = [tensor.why for tensor in sparse.tensors.values()]
    assert reasons == ["sparse tensor", "ckptkit has no arithmetic for BITS8"]
    assert sparse.total == ValueStats()


def test_rules_filter_and_rename() -> None:
    """Keys are those after the rules; a rule that computes a tensor is refused, because no file has the tensor."""
    model = {"module.a": torch.ones(2), "module.b": torch.zeros(3)}
    assert list(stats(model, ["module.*=*"]).tensors) == ["a", "b"]
    assert list(stats(model, {"keep": ["*.b"]}).tensors) == ["module.b"]
    joined = {"rule": [{"from": ["module.a", "module.b"], "to": "c", "op": {"concat": {"dim": 0}}}]}
    with pytest.raises(RuleError, match="an operation would compute 'c'"):
        stats(model, joined)


@pytest.mark.parametrize(
    ("thing", "error"),
    [({"w": TensorInfo("w", "F32", (2,))}, PlanError), ({"w": torch.ones(2, device="meta")}, ModelError)],
    ids=["description", "meta"],
)
def test_tensors_without_bytes_are_refused(thing: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="'w'"):
        stats(thing)


def test_a_damaged_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that became shorter after its header was read gives an error with its path, never statistics."""
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(FormatError, match="became shorter"):
            stats(checkpoint)
    ran = run_ckpt(capsys, "stats", path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"ckpt: {path}: ")


ODD = torch.tensor([NAN, NAN, INF, -INF, 1e-40, 0.0, 2.0, -6.0])


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each tensor, columns for odd values only if there are some, bars on one scale, and a total line."""
    monkeypatch.chdir(tmp_path)
    save_file({"b\n": ODD, "a": torch.ones(3), "n": torch.zeros(0)}, "w.safetensors")
    ran = run_ckpt(capsys, "stats", "w.safetensors", "--sort", "nan", "--top", "2")
    assert (ran.code, ran.err) == (0, "")
    title, _, head, odd, ones, _, axis, listed, total = ran.out.splitlines()
    assert title == "w.safetensors: safetensors, 3 tensors, 11 elements, 44 B"
    assert head.split() == [
        "key", "dtype", "numbers", "mean", "std", "min", "max", "l1", "l2", "zeros", "subnormal", "NaN", "Inf", "-Inf",
        "magnitudes",
    ]  # fmt: skip
    assert odd.split() == [
        "b\\x0a", "F32", "8", "-1", "3", "-6", "2", "8", "6.325", "12.5", "%", "12.5", "%", "2", "1", "1",
        "·······▄·······█",
    ]  # fmt: skip
    assert ones.split() == ["a", "F32", "3", "1", "0", "1", "1", "3", "1.732", "···············█"]
    assert axis == "magnitudes: 16 bars; the first has all below 2^-237, the others 16 powers of two each, up to 2^3"
    assert listed == "2 of 3 tensors listed"
    assert total == "11 numbers, mean -0.1429, std 2.474, from -6 to 2, 9.1 % zeros, 2 NaN, 1 Inf, 1 -Inf"


@pytest.mark.parametrize(
    ("sort", "first"), [("numbers", "b"), ("mean", "c"), ("std", "b"), ("zeros", "a"), ("l1", "b"), ("abs-max", "c")]
)
def test_sorted_by_size(sort: str, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest magnitude comes first, whatever its sign, in text and in JSON."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.tensor([-9.0, 9.0, 1.0]), "c": torch.full((1,), -10.0)}, path)
    document = json.loads(run_ckpt(capsys, "stats", path, "--json", "--sort", sort, "--top", "1").out)
    assert [tensor["key"] for tensor in document["tensors"]] == [first]
    modules = json.loads(run_ckpt(capsys, "stats", path, "--json", "--depth", "1", "--sort", sort).out)
    assert [module["module"] for module in modules["modules"]] == [""]
    assert len(modules["tensors"]) == 3


def test_bars_are_shares_of_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is one bar for each power of two, a dot for an empty bin, and the first bar counts all smaller numbers."""
    path = tmp_path / "w.safetensors"
    values = [4.0] * 800 + [2.0] * 400 + [-1.0] * 100 + [2.0**-13, 1e-30, 0.0]
    save_file({"w": torch.tensor(values)}, path)
    out = run_ckpt(capsys, "stats", path).out
    assert "  ▁············▁▄█\n" in out
    assert "\nmagnitudes: 16 bars; the first has all below 2^-12, the others a power of two each, up to 2^3\n" in out


def test_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON document has exact names and counts, and strings for numbers that JSON cannot express."""
    path = tmp_path / "w.safetensors"
    save_file({"m.b": ODD, "m.h": torch.tensor([1e200, 1e200], dtype=torch.float64)}, path)
    document = json.loads(run_ckpt(capsys, "stats", path, "--json", "--depth", "1").out)
    assert list(document) == [
        "schema", "path", "format", "tensors", "modules", "not_judged", "quantized", "dequantized",
        "total", "summary",
    ]  # fmt: skip
    assert document["schema"] == "ckptkit.stats/1"
    second, first = document["tensors"]
    assert first == {
        "key": "m.b", "dtype": "F32", "shape": [8], "same_as": None, "numbers": 8, "nan": 2, "posinf": 1, "neginf": 1,
        "zeros": 1, "zero_share": 0.125, "subnormal": 1, "min": -6.0, "max": 2.0, "mean": -1.0, "std": pytest.approx(3),
        "l1": 8.0, "l2": pytest.approx(math.sqrt(40)), "abs_max": 6.0, "constant": None,
        "histogram": [[-127, 1], [1, 1], [2, 1]],
    }  # fmt: skip
    assert (second["l2"], second["constant"], second["std"]) == ("inf", 1e200, 0.0)
    assert [module["module"] for module in document["modules"]] == ["m"]
    assert document["modules"][0]["numbers"] == document["total"]["numbers"] == 10
    assert document["summary"] == {"tensors": 2, "elements": 10, "bytes": 48}


def test_notebook_form() -> None:
    """The notebook form is a table with escaped names and the number of measured tensors."""
    html = stats({"<b>": ODD, "s": torch.eye(2).to_sparse()})._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<td>sparse tensor" in html


def test_a_conjugate_view_has_statistics_of_its_own() -> None:
    """It has the memory of another tensor, and other values."""
    number = torch.tensor([1 + 2j, 3 + 4j])
    tensors = stats({"a": number, "tied": number, "conj": number.conj()}).tensors
    assert [(tensor.same_as, tensor.numbers and tensor.numbers.mean) for tensor in tensors.values()] == [
        ("", 2.5), ("a", 2.5), ("", -0.5),
    ]  # fmt: skip
