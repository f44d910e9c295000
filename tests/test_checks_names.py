"""``ckpt check`` finds lost tensors by names and shapes, and reports nothing about networks as they are built."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptkit import Finding, Report, open_checkpoint, run_checks
from ckptkit.core.checkpoint import TensorInfo
from tests.helpers_cli import run_ckpt
from tests.helpers_shards import NAMES, edit, save, shard

Shapes = Mapping[str, tuple[int, ...]]
BLOCK = ("attn.q.weight", "attn.q.bias", "attn.k.weight", "attn.v.weight", "mlp.up.weight", "norm.weight")


def infos(shapes: Shapes | Iterable[str], dtype: str = "F32") -> dict[str, TensorInfo]:
    named = shapes if isinstance(shapes, Mapping) else dict.fromkeys(shapes, (2, 2))
    return {key: TensorInfo(key, dtype, shape) for key, shape in named.items()}


def findings(named: Mapping[str, TensorInfo]) -> list[Finding]:
    """Return the findings about headers, without the ``not-scanned`` note."""
    *found, last = run_checks(named, fast=True).findings
    assert last.code == "not-scanned"
    return found


def layers(
    numbers: Iterable[int], names: Sequence[str] = BLOCK, prefix: str = "layers", lost: Iterable[str] = ()
) -> list[str]:
    keys = [f"{prefix}.{number}.{name}" for number in numbers for name in names]
    return [key for key in keys if key not in set(lost)]


def with_names(prefix: str, *of_each: Iterable[str]) -> list[str]:
    return [f"{prefix}.{number}.{name}" for number, names in enumerate(of_each) for name in names]


LOST_TENSORS: dict[str, tuple[list[str], str, str, str]] = {
    # id: (keys, code, key of the finding, a piece of the message)
    "one layer": (layers(set(range(12)) - {7}), "index-hole", "layers.7", "'layers' has modules 0-11, but not 7"),
    "two layers": (layers(set(range(12)) - {7, 8}), "index-hole", "layers.7", "but not 7-8"),
    "one of five": (layers({0, 1, 3, 4}), "index-hole", "layers.2", "has modules 0-4, but not 2"),
    "one of four in a stack": (layers({0, 1, 3}), "index-hole", "layers.2", "has modules 0-3, but not 2"),
    "an expert": (layers({0, 1, 2, 4, 5}, prefix="layers.3.experts"), "index-hole", "layers.3.experts.3", "but not 3"),
    "a layer behind unlike ones": (
        layers({0}, ("mlp.up.weight",)) + layers({1, 2, 3, 5, 6, 7}), "index-hole", "layers.4",
        "modules 0-7, but not 4",
    ),
    "a weight": (
        layers(range(6), lost=["layers.4.attn.k.weight"]), "sibling-lacks", "layers.4.attn.k.weight",
        "'layers.4' lacks 'attn.k.weight', which all its 5 siblings have",
    ),
    "a bias of the last": (
        layers(range(6), lost=["layers.5.attn.q.bias"]), "sibling-lacks", "layers.5.attn.q.bias", "'attn.q.bias'",
    ),
    "two of one": (
        layers(range(6), lost=["layers.1.norm.weight", "layers.1.mlp.up.weight"]), "sibling-lacks",
        "layers.1.norm.weight", "lacks 'norm.weight'",
    ),
}  # fmt: skip


def test_findings_of_several_modules_are_in_the_order_of_the_modules() -> None:
    """Not in the order of a set, which is another in every process."""
    lost = ["layers.4.attn.k.weight", "layers.1.attn.v.weight", "layers.3.norm.weight", "layers.2.attn.q.weight"]
    found = findings(infos(layers(range(8), lost=lost)))
    assert [finding.key.split(".")[1] for finding in found] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("keys", "code", "key", "text"), LOST_TENSORS.values(), ids=LOST_TENSORS.keys())
def test_lost_tensors_are_found(keys: list[str], code: str, key: str, text: str) -> None:
    """A lost tensor or layer is one warning with its key, wherever the list of layers is."""
    (finding,) = findings(infos(keys))
    assert (finding.code, finding.severity, finding.key) == (code, "warning", key)
    assert text in finding.message


CONV, NORM = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
C2F = [f"{name}.{leaf}" for name in ("cv1.conv", "cv2.conv", "m.0.cv1.conv") for leaf in ("weight", "bias")]
DOWN = ["down.reduction.weight", "down.norm.weight"]
REAL_NETWORKS: dict[str, list[str]] = {
    "VGG, activations between": [f"features.{n}.{leaf}" for n in (0, 2, 5, 7, 10, 12, 14, 17) for leaf in CONV],
    "VGG with norms": [f"features.{n}.{leaf}" for n in (0, 3, 7, 10, 14) for leaf in CONV]
    + [f"features.{n}.{leaf}" for n in (1, 4, 8, 11, 15) for leaf in NORM],
    "blocks and activations in turn": layers({0, 2, 4, 6, 8, 10}),
    "YOLO, with modules that only join": with_names(
        "model", ["conv.weight"], ["conv.weight"], C2F, ["conv.weight"], C2F, ["conv.weight"], C2F, ["conv.weight"], C2F
    ) + layers({12, 15, 18, 21}, C2F, "model") + layers({16, 19}, ["conv.weight"], "model"),
    "Swin, the last without downsampling": layers({0, 1, 2}, [*BLOCK, *DOWN]) + layers({3}),
    "ConvNeXt, the first without": layers({1, 2, 3}, [*BLOCK, *DOWN]) + layers({0}),
    "EfficientNet, the first without expansion": layers({0}, ["0.pw.weight", "0.dw.weight"])
    + layers(range(1, 7), ["0.pw.weight", "0.dw.weight", "0.pwl.weight"]),
    "MobileNet, a gate among convolutions": layers({0, 1, 3}, ["0.weight", "1.weight", "1.bias"], "features.4.block")
    + layers({2}, ["fc1.weight", "fc2.weight"], "features.4.block"),
    "ResNet, projections in the first": layers(range(6), ["conv1.weight", "bn1.weight"], "layer3")
    + layers({0}, ["downsample.0.weight", "downsample.1.weight"], "layer3"),
    "T5, positions in the first": [*layers(range(6)), "layers.0.attn.relative_attention_bias.weight"],
    "experts but for the first": layers({0}, [*BLOCK, "mlp.gate.weight"])
    + layers(range(1, 5), [*BLOCK[:4], "norm.weight", "mlp.router.weight", "mlp.experts.0.w.weight"]),
    "one attention among state spaces": layers({0, 1, 2, 4, 5, 6, 7}, ["mamba.a.weight", "mamba.b.weight", "n.weight"])
    + layers({3}, ["attn.q.weight", "n.weight"]),
    "a part of a pipeline": layers(range(8, 16)),
    "three, in a list that is not named like a stack": layers({0, 1, 3}, BLOCK, "features"),
    "numbers that are not positions": [f"stage{n}.x" for n in (1, 2, 9)] + ["0", "1.2", "v.99999999999.w.b", "a.٣.b.c"],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("keys", REAL_NETWORKS.values(), ids=REAL_NETWORKS.keys())
def test_real_networks_have_no_findings(keys: list[str]) -> None:
    """Numbers of modules without parameters, and different blocks at an end, are not findings."""
    assert findings(infos(keys)) == []


def test_hostile_names_take_little_time() -> None:
    """Huge numbers and deeply nested lists take little time, because only a part of each name is parsed."""
    keys = [f"a.{10**5 * number}.b.c" for number in range(9)] + [".".join(["0"] * 3000) + f".{n}" for n in range(300)]
    assert findings(infos(keys)) == []


def test_odd_dtypes_are_named() -> None:
    """One note names the usual dtype and the tensors with another floating-point dtype; integers do not count."""
    named = {**infos(layers(range(12)), "BF16"), **infos(["norm.weight"]), **infos(["ids"], "I64")}
    (finding,) = findings(named)
    assert (finding.code, finding.severity, finding.key) == ("dtype-mix", "note", "norm.weight")
    assert finding.message == "BF16 in 72 tensors, F32 in 1: 'norm.weight'"


def test_very_many_findings_of_a_code_are_counted() -> None:
    """The first 32 findings of a code are listed and the others counted, so that the report stays short."""
    lost = [f"layers.{n}.experts.2.w.weight" for n in range(100)]
    keys = [f"layers.{n}.experts.{e}.w.weight" for n in range(100) for e in range(6)]
    found = findings(infos(set(keys) - set(lost)))
    assert (len(found), {finding.code for finding in found}) == (33, {"index-hole"})
    assert found[-1].message == "68 more findings of this kind"


PEFT: Shapes = {"m.q.lora_A.weight": (8, 64), "m.q.lora_B.weight": (32, 8)}
KOHYA: Shapes = {"lora_unet_q.lora_down.weight": (8, 64, 3, 3), "lora_unet_q.lora_up.weight": (32, 8, 1, 1)}
OTHER: Shapes = {"k.lora_A.weight": (8, 64), "k.lora_B.weight": (32, 8)}
ADAPTERS: dict[str, tuple[Shapes, list[tuple[str, str]], str]] = {
    # id: (shapes, codes with their severities, a piece of the first message)
    "peft": (PEFT, [("lora-alpha", "note")], "the scale of 1 LoRA pair (alpha / rank)"),
    "peft, named": (
        {"m.q.lora_A.default.weight": (8, 64), "m.q.lora_B.default.weight": (32, 8)}, [("lora-alpha", "note")], "",
    ),
    "peft, embeddings": (
        {"e.lora_embedding_A": (8, 99), "e.lora_embedding_B": (32, 8)}, [("lora-alpha", "note")], "",
    ),
    "peft, bias of B": ({**PEFT, "m.q.lora_B.bias": (32,)}, [("lora-alpha", "note")], ""),
    "kohya": ({**KOHYA, "lora_unet_q.alpha": ()}, [], ""),
    "kohya without alpha": (KOHYA, [("lora-alpha", "note")], "is not in the file"),
    "alpha of one alone": (
        {**KOHYA, "lora_unet_q.alpha": (), **OTHER}, [("lora-alpha", "warning")],
        "1 LoRA pair without alpha, but 1 with alpha",
    ),
    "diffusers": ({"q.lora.down.weight": (4, 8), "q.lora.up.weight": (8, 4), "q.alpha": ()}, [], ""),
    "stacked experts": ({"w.lora_A.weight": (6, 8, 64), "w.lora_B.weight": (6, 32, 8), "w.alpha": ()}, [], ""),
    "several B": (
        {"q.lora_A.weight": (8, 64), "q.lora_B0.weight": (9, 8), "q.lora_B1.weight": (9, 8), "q.alpha": ()}, [], "",
    ),
    "half": (
        {"m.q.lora_A.weight": (8, 64)}, [("lora-half", "error"), ("lora-alpha", "note")],
        "'m.q.lora_A.weight' is half of a LoRA pair: its lora_B is not in the file",
    ),
    "the other half": ({"q.lora_up.weight": (8, 64)}, [("lora-half", "error")], "its lora_A is not in the file"),
    "ranks": (
        {**PEFT, "m.q.lora_B.weight": (32, 4)}, [("lora-rank", "error"), ("lora-alpha", "note")],
        "'m.q.lora_A.weight' is F32 [8, 64] and 'm.q.lora_B.weight' is F32 [32, 4]: their ranks differ",
    ),
    "no adapter": ({"explorable.A.weight": (2, 3), "lora.weight": (2,), "lora_Attention.weight": (2, 3)}, [], ""),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "codes", "text"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_pairs_of_an_adapter(shapes: Shapes, codes: list[tuple[str, str]], text: str) -> None:
    """Half a pair and different ranks are errors in every spelling; a missing scale is reported."""
    found = findings(infos(shapes))
    assert [(finding.code, finding.severity) for finding in found] == codes
    assert text in "".join(finding.message for finding in found[:1])


def checked(path: Path) -> Report:
    with open_checkpoint(path) as checkpoint:
        return run_checks(checkpoint, fast=True)


def warnings_of(report: Report) -> Sequence[tuple[str, str, str]]:
    findings = [finding for finding in report.findings[:-1] if finding.code != "dtype-mix"]
    return [(finding.code, finding.severity, finding.message) for finding in findings]


def test_a_stale_shard_is_found_by_the_index(tmp_path: Path) -> None:
    """The directory is refused; by the path of its index it is read, and the stale shard is a warning."""
    index = shard(tmp_path)
    save({"z": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    message = "the index does not name shard 'model-00003-of-00003.safetensors' in its directory"
    assert warnings_of(checked(index)) == [("stale-shard", "warning", message)]


def test_a_shard_that_the_index_forgot_is_found(tmp_path: Path) -> None:
    """The names of the other shards tell how many there should be."""
    index = shard(tmp_path)
    first, second, _ = NAMES["safetensors"]
    edit(index, **{"c.w": ""})
    (tmp_path / second).unlink()
    assert ("shard-count", "warning", f"the index names 1 of 2 shards, but not '{second}'") in warnings_of(
        checked(tmp_path)
    )
    message = f"'{first}' is one of 2 shards, by its name: no other shard is read"
    assert warnings_of(checked(tmp_path / first)) == [("one-shard", "note", message)]


def test_a_total_size_counts_ties_once_or_as_often_as_they_are_named(tmp_path: Path) -> None:
    """Both ways of counting tied tensors are accepted; any other total size is a warning."""
    names = {"a": "pytorch_model-00001-of-00001.bin", "b": "pytorch_model-00001-of-00001.bin"}
    tensor = torch.ones(3)
    save({"a": tensor, "b": tensor}, tmp_path / names["a"])
    for total, codes in ((12, []), (24, []), (36, ["total-size"])):
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert [code for code, _, _ in warnings_of(checked(tmp_path))] == codes


def net() -> nn.Module:
    """Return a model with a tied head, a batch norm and a plain layer."""
    embed, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({"embed": embed, "bn": nn.BatchNorm1d(4), "fc": nn.Linear(4, 4), "head": head})


def state_of_net(**changes: object) -> dict[str, object]:
    state = {**net().state_dict(), **changes}
    return {key: value for key, value in state.items() if value is not None}


LIKE: dict[str, tuple[dict[str, object], list[tuple[str, str, str]]]] = {
    # id: (the state of the checkpoint, findings as code, severity and key)
    "equal": (state_of_net(), []),
    "missing": (state_of_net(**{"fc.bias": None}), [("missing", "error", "fc.bias")]),
    "unexpected": (state_of_net(more=torch.ones(1)), [("unexpected", "warning", "more")]),
    "another shape": (state_of_net(**{"fc.bias": torch.ones(5)}), [("shape-mismatched", "error", "fc.bias")]),
    "another dtype": (state_of_net(**{"fc.bias": torch.ones(4).half()}), [("dtype-mismatched", "warning", "fc.bias")]),
    "sparse": (state_of_net(**{"fc.bias": torch.ones(4).to_sparse()}), [("uncopyable", "error", "fc.bias")]),
    "tied, once": (state_of_net(**{"head.weight": None}), [("missing-tied", "note", "head.weight")]),
    "neither of the tied": (
        state_of_net(**{"head.weight": None, "embed.weight": None}), [("missing", "error", "embed.weight")],
    ),
    "a number": (state_of_net(**{"fc.bias": 3}), [("no-tensor", "error", "fc.bias")]),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), LIKE.values(), ids=LIKE.keys())
def test_differences_are_findings(
    state: dict[str, object], expected: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    """Each kind of difference is one finding, an error if ``load_state_dict`` raises; ties of the model count."""
    torch.save(state, tmp_path / "f.pt")
    model = net()
    with open_checkpoint(tmp_path / "f.pt") as checkpoint:
        found = run_checks(checkpoint, like=model, fast=True).findings
    kinds = {"dtype-mix", "not-dense", "not-scanned"}
    assert [(f.code, f.severity, f.key) for f in found if f.code not in kinds] == expected
    try:
        model.load_state_dict(state, strict=False)
        model.load_state_dict(state, strict=any(code == "missing" for code, _, _ in expected))
        raised = False
    except (RuntimeError, NotImplementedError, TypeError):
        raised = True
    assert raised == any(severity == "error" for _, severity, _ in expected)


def test_filled_counters_are_a_note(tmp_path: Path) -> None:
    """Files from before torch 0.4.1 have no batch norm counters, and load."""
    torch.save(state_of_net(**{"bn.num_batches_tracked": None}), tmp_path / "f.pt")
    with open_checkpoint(tmp_path / "f.pt") as checkpoint:
        found = run_checks(checkpoint, like=net(), fast=True).findings
    assert [(f.code, f.severity) for f in found][:-1] == [("filled", "note")]


def test_rules_rename_for_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--strip`` renames the keys for the comparison with EXPECTED, as in ``ckpt diff``."""
    os.symlink(Path("fixtures/lenet_ddp.pt").resolve(), tmp_path / "ddp.pt")
    model = "py:fixtures.lenet:build"
    ran = run_ckpt(capsys, "check", "--fast", "--like", model, tmp_path / "ddp.pt", "--json")
    assert (ran.code, {f["code"] for f in json.loads(ran.out)["findings"]} >= {"missing", "unexpected"}) == (1, True)
    ran = run_ckpt(capsys, "check", "--fast", "--like", model, "--strip", "auto", tmp_path / "ddp.pt", "--json")
    codes = [f["code"] for f in json.loads(ran.out)["findings"]]
    assert not {"missing", "unexpected"} & set(codes), codes


def test_expected_must_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """An error about EXPECTED names its path, and stdout stays empty."""
    ran = run_ckpt(capsys, "check", "--like", "none.pt", "fixtures/lenet_10class.pth")
    assert (ran.code, ran.out, ran.err.splitlines()[0]) == (2, "", "ckpt: none.pt: no such file or directory")
