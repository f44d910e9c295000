"""Metadata that names tensors follows them into the output, or a note says that it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import nn

import ckptkit
from ckptkit import convert, execute, merge, open_checkpoint, parse_rules, plan_remap
from ckptkit.plans.metadata.moves import rename_like
from tests.helpers_cli import run_ckpt


class Tied(nn.Module):
    """An embedding and a head that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight


def metadata_of(path: Path | str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def remapped(source: Path, rules: Any, name: str = "out.safetensors") -> tuple[Any, dict[str, str]]:
    plan = plan_remap(source, rules)
    execute(plan, source, source.parent / name, verify=True)
    return plan, metadata_of(source.parent / name)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    path = tmp_path / "tied.safetensors"
    save_model(Tied(), str(path))
    assert metadata_of(path) == {"head.weight": "emb.weight"}
    return path


TIES: Mapping[str, tuple[Any, Mapping[str, str]]] = {
    "one prefix": (["*=model.*"], {"model.head.weight": "model.emb.weight"}),
    "the kept one": (["emb.*=wte.*"], {"head.weight": "wte.weight"}),
    "another body": (["body.*=layer.*"], {"head.weight": "emb.weight"}),
    "both by a pattern": (["{m}.weight=net.{m}.w"], {"net.head.w": "net.emb.w"}),
    "the removed one is dropped": (parse_rules(drop=["head.*"], allow_unused=True), {}),
    "the name is taken": (["emb.weight=head.weight"], {}),
    "two copies": ({"rule": [{"from": "emb.weight", "to": ["a.w", "b.w"]}]}, {"head.weight": "a.w"}),
}


@pytest.mark.parametrize(("rules", "ties"), TIES.values(), ids=TIES.keys())
def test_the_ties_of_save_model_follow_both_names(rules: Any, ties: Mapping[str, str], tied: Path) -> None:
    """The removed name gets the name that the rules would give it, the kept one that of its tensor."""
    assert remapped(tied, rules)[1] == ties


def test_load_model_reads_the_renamed_file(tied: Path) -> None:
    """safetensors' own loader fills the model again, strictly, from a file that was renamed twice."""
    out, back = tied.with_name("out.safetensors"), tied.with_name("back.safetensors")
    execute(plan_remap(tied, ["*=model.*"]), tied, out)
    execute(plan_remap(out, ["model.*=*"]), out, back)
    assert metadata_of(back) == metadata_of(tied)
    model = Tied()
    assert [len(keys) for keys in load_model(model, str(back))] == [0, 0]  # missing, unexpected


def test_a_note_names_a_tie_that_is_lost(tied: Path) -> None:
    """Without the tensor, neither of both names has a value."""
    plan, metadata = remapped(tied, parse_rules(drop=["emb.*"]))
    assert metadata == {}
    assert "'head.weight' is stored as 'emb.weight', so the output has neither of them" in plan.notes


def test_an_inverted_plan_restores_the_metadata(tied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan file and its inverse give the names back that the metadata had."""
    here = tied.parent
    out, back, plan = (str(here / name) for name in ("out.safetensors", "back.safetensors", "plan.json"))
    assert run_ckpt(capsys, "remap", tied, "-o", out, "--rename", "*=model.*", "--plan", plan).code == 0
    assert run_ckpt(capsys, "remap", out, "-o", back, "--invert", plan).code == 0
    assert metadata_of(here / "back.safetensors") == metadata_of(tied)


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("head.w", "emb.w", "model.emb.w", "model.head.w"),
        ("module.head.w", "module.emb.w", "emb.w", "head.w"),
        ("a.b.c", "a.x.c", "z.x.c", "z.b.c"),
        ("other.c", "a.x.c", "z.x.c", "other.c"),
        ("head.w", "emb.w", "wte.w", "head.w"),
        ("w", "w", "w", "w"),
    ],
)
def test_a_name_without_a_tensor_changes_its_beginning_alike(name: str, old: str, new: str, expected: str) -> None:
    """Where no rule is known, the change of a neighbour's beginning is the change of a name."""
    assert rename_like(name, old, new) == expected


def ao_file(path: Path, *, joint: str = "._{}_", module: str = "net.l") -> Path:
    """Write the layout of torchao: two tensors of a subclass with their parts, and a plain one."""
    tensors, metadata = {}, {}
    for layer in (0, 1):
        stem = f"{module}{layer}{joint.format('weight')}"
        tensors[f"{stem}qdata"] = torch.randn(4, 4).to(torch.float8_e4m3fn)
        tensors[f"{stem}scale"] = torch.ones(4, 1)
        entry = {"_type": "Float8Tensor", "_data": {"block_size": [1, 4 + layer]}}
        metadata[f"{module}{layer}.weight"] = entry | {"_tensor_data_names": ["qdata", "scale"]}
    tensors[f"{module}0.bias"] = torch.zeros(4)
    metadata[f"{module}0.bias"] = {"_type": "Tensor"}
    texts = {name: json.dumps(entry) for name, entry in metadata.items()}
    save_file(tensors, path, texts | {"tensor_names": json.dumps(list(texts)), "format": "pt"})
    return path


LAYOUTS = {"underscores": "._{}_", "colon": ".{}:"}


@pytest.mark.parametrize("joint", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_entries_of_torchao_follow_their_parts(joint: str, tmp_path: Path) -> None:
    """Names, entries and the list agree with the tensors after a rename; dropped tensors have no entry."""
    source = ao_file(tmp_path / "ao.safetensors", joint=joint)
    old = metadata_of(source)
    plan, new = remapped(source, ["net.*=model.layers.*"])
    assert json.loads(new.pop("tensor_names")) == [
        "model.layers.l0.weight",
        "model.layers.l1.weight",
        "model.layers.l0.bias",
    ]
    assert new == {key.replace("net.", "model.layers."): text for key, text in old.items() if key != "tensor_names"}
    assert plan.notes == ()
    _, kept = remapped(source, parse_rules(keep=["net.l1*"]), "kept.safetensors")
    assert kept == {"net.l1.weight": old["net.l1.weight"], "tensor_names": '["net.l1.weight"]', "format": "pt"}
    _, plain = remapped(source, parse_rules(keep=["*.bias"]), "plain.safetensors")
    assert json.loads(plain["tensor_names"]) == ["net.l0.bias"]


def test_shards_have_the_joined_list(tmp_path: Path) -> None:
    """Each shard of torchao's may list its own tensors; what is read from all of them lists all of them."""
    directory = tmp_path / "model"
    directory.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, module in zip(names, ("a.l", "b.l"), strict=True):
        ao_file(directory / name, module=module)
    weight_map: dict[str, str] = {}
    for name in names:
        with safe_open(directory / name, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(directory, tmp_path / "one.safetensors")
    listed = json.loads(metadata_of(tmp_path / "one.safetensors")["tensor_names"])
    assert sorted(listed) == sorted(f"{m}.l{n}" for m in "ab" for n in ("0.weight", "1.weight", "0.bias"))
    convert(tmp_path / "one.safetensors", tmp_path / "again", max_shard_size=64, format="safetensors")
    with open_checkpoint(tmp_path / "again") as again:
        assert json.loads(again.metadata["tensor_names"]) == listed


def test_a_merge_takes_the_entry_of_the_donor(tmp_path: Path) -> None:
    """A tensor of a donor brings its entry along, and plain tensors of the donor get one."""
    base, donor = (ao_file(tmp_path / f"{name}.safetensors") for name in ("base", "donor"))
    texts = metadata_of(donor)
    entry = json.loads(texts["net.l0.weight"])
    with safe_open(donor, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    texts["net.l0.weight"] = json.dumps(entry | {"_data": {"block_size": [4, 4]}})
    save_file(tensors, donor, texts)
    extra = {"net.extra": torch.ones(1)}
    merge(base, [donor, extra], tmp_path / "out.safetensors", on_unexpected="add")
    merged = metadata_of(tmp_path / "out.safetensors")
    assert json.loads(merged["net.l0.weight"])["_data"] == {"block_size": [4, 4]}
    assert "net.extra" in json.loads(merged["tensor_names"])


@pytest.mark.parametrize("out", ["out.pt", "dcp"])
def test_a_format_without_metadata_says_what_is_lost(out: str, tmp_path: Path) -> None:
    """torchao cannot load the tensors without its entries, and the entry that is left out says so."""
    source = ao_file(tmp_path / "ao.safetensors")
    written = convert(source, tmp_path / out, format=None if out.endswith(".pt") else "dcp")
    assert written.plan is not None
    (drop,) = [drop for drop in written.plan.dropped if drop.key == "__metadata__"]
    assert "torchao cannot load the tensors" in drop.reason


NOTED: Mapping[str, tuple[Mapping[str, str], str]] = {
    "a key": ({"a.b.weight": "best"}, "'a.b.weight' still names 'a.b.weight'"),
    "a value": ({"best": "a.b.weight, no", "frozen": "a.b.weight"}, "'frozen' still names 'a.b.weight'"),
    "a list": ({"frozen": json.dumps(["x", ["a.b.weight"]])}, "'frozen' still names 'a.b.weight'"),
    "a module in an object": ({"bits": json.dumps({"a.b": {"bits": 4}})}, "'bits' still names 'a.b'"),
    "patterns": (
        {"lora_adapter_metadata": json.dumps({"transformer.target_modules": ["b"], "transformer.r": 4})},
        "has patterns of names, which do not follow the tensors: 'transformer.target_modules'",
    ),
}


@pytest.mark.parametrize("rules", [["a.b.*=x.*"], parse_rules(drop=["a.b.*"])], ids=["renamed", "dropped"])
@pytest.mark.parametrize(("metadata", "note"), NOTED.values(), ids=NOTED.keys())
def test_other_metadata_is_copied_with_a_note(metadata: dict[str, str], note: str, rules: Any, tmp_path: Path) -> None:
    """What is not known is not changed, and is not passed over in silence; without a change there is no note."""
    path = tmp_path / "in.safetensors"
    save_file({"a.b.weight": torch.ones(2), "a.c.weight": torch.ones(2)}, path, metadata)
    plan, kept = remapped(path, rules)
    assert kept == metadata
    assert [text for text in plan.notes if note in text], plan.notes
    assert plan_remap(path).notes == ()
    assert plan_remap(path, ["a.c.*=z.*"]).notes == () or "patterns" in note


MOVED: Mapping[str, tuple[list[str], str]] = {
    "swapped": (["h.0.w=h.1.w", "h.1.w=h.0.w"], "'h.0.w', which is another tensor in the output"),
    "moved by one": (["h.{i:int}.*=h.{i+1}.*"], "'h.0.w', which the output does not have"),
    "not this one": (["h.2.w=h.3.w"], ""),
}


@pytest.mark.parametrize(("rules", "note"), MOVED.values(), ids=MOVED.keys())
def test_a_name_that_another_tensor_has_now_is_noted(rules: list[str], note: str, tmp_path: Path) -> None:
    """Metadata and entries that name a layer are stale too where another layer has taken its name."""
    tensors = {f"h.{i}.w": torch.full((2,), i) for i in range(3)}
    save_file(tensors, tmp_path / "in.safetensors", {"frozen": json.dumps(["h.0.w", "h.1.w"]), "bits": '{"h.0": 4}'})
    plan, _ = remapped(tmp_path / "in.safetensors", rules)
    assert sorted(text.partition(" still")[0] for text in plan.notes) == (
        ["the metadata 'bits'", "the metadata 'frozen'"] if note else []
    )
    assert not note or any(note in text for text in plan.notes)
    torch.save({"model": tensors, "hyper": ["h.0.w"]}, tmp_path / "run.pt")
    written = execute(plan_remap(tmp_path / "run.pt", rules), tmp_path / "run.pt", tmp_path / "out.pt")
    assert written.plan is not None
    assert written.plan.notes == ((f"'hyper' still names {note}",) if note else ())


def test_kept_entries_of_a_torch_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of names beside the weights stays as it is in the edited file, and a note says so."""
    run = {
        "model": {"fc.weight": torch.ones(2), "out.weight": torch.ones(2)},
        "hyper": {"frozen": ["fc.weight"]},
        "e": 1,
    }
    torch.save(run, tmp_path / "run.pt")
    ran = run_ckpt(capsys, "remap", tmp_path / "run.pt", "-o", tmp_path / "new.pt", "--rename", "fc.*=head.*")
    assert ran.code == 0
    assert "still names 'fc.weight', which the output does not have" in ran.err
    assert torch.load(tmp_path / "new.pt", weights_only=True)["hyper"] == {"frozen": ["fc.weight"]}
    ran = run_ckpt(capsys, "remap", tmp_path / "run.pt", "-o", tmp_path / "other.pt", "--rename", "out.*=head.*")
    assert "still names" not in ran.err


def quantised_directory(path: Path, **quantization: Any) -> Path:
    path.mkdir()
    tensors: dict[str, torch.Tensor] = {"lm_head.weight": torch.ones(4, 4)}
    for name in ("model.layers.0.q", "model.layers.0.k"):
        tensors |= {
            f"{name}.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            f"{name}.weight_scale_inv": torch.ones(1, 1),
        }
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "dtype": "float32", "quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignore"])
def test_a_carried_list_of_plain_modules_does_not_follow_silently(field: str, tmp_path: Path) -> None:
    """A renamed head would be quantised by the loader: the note names the old and the new name."""
    method = "fp8" if field != "ignore" else "compressed-tensors"
    source = quantised_directory(tmp_path / "in", quant_method=method, **{field: ["lm_head"]})
    (tmp_path / "out").mkdir()
    written = ckptkit.execute(
        plan_remap(source, ["lm_head.*=score.*"]), source, tmp_path / "out" / "model.safetensors", carry=True
    )
    assert written.plan is not None
    assert any("it has 'lm_head.weight', and not 'score.weight'" in note for note in written.plan.notes)
    (tmp_path / "two").mkdir()
    written = ckptkit.execute(
        plan_remap(source, ["*=language.*"]), source, tmp_path / "two" / "model.safetensors", carry=True
    )
    assert written.plan is not None
    assert not any("not quantised" in note for note in written.plan.notes)  # the name fits inside any module


def test_a_carried_configuration_that_names_modules_is_named(tmp_path: Path) -> None:
    """Options of single modules, as MLX and AutoRound write them, have the names of the modules as keys."""
    source = quantised_directory(tmp_path / "in", quant_method="fp8", extra_config={"model.layers.0.q": {"bits": 8}})
    (tmp_path / "out").mkdir()
    plan = plan_remap(source, ["model.*=net.*"])
    written = ckptkit.execute(plan, source, tmp_path / "out" / "model.safetensors", carry=True)
    assert written.plan is not None
    assert "config.json still names 'model.layers.0.q', which the output does not have" in written.plan.notes


def test_a_copy_has_the_metadata_as_it_was(tmp_path: Path) -> None:
    """Where no name changes, no text of the metadata does, also not of an entry that is not complete."""
    source = ao_file(tmp_path / "ao.safetensors")
    with safe_open(source, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open has no items()
        texts = dict(file.metadata()) | {"tensor_names": '["net.l0.weight" , "absent.weight"]', "note": "[1,  2]"}
    save_file(tensors, source, texts)
    convert(source, tmp_path / "copy.safetensors")
    assert metadata_of(tmp_path / "copy.safetensors") == texts


def test_a_carried_adapter_configuration_has_patterns(tmp_path: Path) -> None:
    """PEFT finds the modules of an adapter by patterns, which a rename of the tensors does not change."""
    source = tmp_path / "adapter"
    source.mkdir()
    factors = {f"base_model.model.q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(factors, source / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], "rank_pattern": {}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "adapter_model.safetensors"
    written = execute(plan_remap(source, ["*.q.*=*.query.*"]), source, out, carry=True)
    assert written.plan is not None
    note = "adapter_config.json has patterns of names, which do not follow the tensors: 'target_modules'"
    assert note in written.plan.notes
