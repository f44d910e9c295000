"""Weights in a directory that are not read are named, and each part of a directory can be opened by its name."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import load_into, preflight
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint, open_checkpoint_or_parts
from tests.helpers_cli import run_ckpt
from tests.helpers_dcp import save as save_distributed
from tests.helpers_formats import refusal
from tests.helpers_gguf import gguf_file, info

HDF5 = bytes.fromhex("894844460d0a1a0a00000000000808000400100000000000") + bytes(200)
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "bias": "none"}


def key_of(name: str) -> str:
    """Return the key of the only tensor in the file ``name``."""
    return name.replace("/", "|")


def make(directory: Path, names: Sequence[str]) -> Path:
    """Write files of these names, each with one tensor if the suffix is of a readable format."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {key_of(name): torch.full((2, 2), float(len(name)))}
        if name.endswith(".safetensors"):
            save_file(state, path, {"format": "pt"})
        elif name.endswith(".gguf"):
            path.write_bytes(gguf_file([info(key_of(name), (2,), 0)], data=bytes(8)))
        elif name.endswith("adapter_config.json"):
            path.write_text(json.dumps(ADAPTER_CONFIG))
        elif name.endswith("modules.json"):
            path.write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]))
        elif name.endswith(".json") and ".index" in name:
            write_index(path)
        elif name.endswith((".json", ".md", ".txt", ".xml")):
            path.write_text("{}")
        elif name.endswith((".h5", ".onnx", ".msgpack", ".tflite")) or name == "openvino_model.bin":
            path.write_bytes(HDF5)
        elif name.endswith("vocab.bin"):
            path.write_bytes(b"no tensors here, only words")
        else:
            torch.save(state, path)
    return directory


def write_index(path: Path) -> None:
    """Write the index of the shards of the same stem, which are in the directory already."""
    stem, suffix = path.name.split(".index", maxsplit=1)[0].rsplit(".", 1)
    variant = path.name.split(".index")[1].removesuffix(".json")
    shards = [
        *path.parent.glob(f"{stem}{variant}-*-of-*.{suffix}"),
        *path.parent.glob(f"{stem}-*-of-*{variant}.{suffix}"),
    ]
    path.write_text(json.dumps({"weight_map": {key_of(shard.name): shard.name for shard in set(shards)}}))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
HALF = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
OLD = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
INDEX, HALF_INDEX, OLD_INDEX = (
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin.index.json",
)

# layout -> (files in the directory, files that are read, names in the warnings)
LAYOUTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "a model alone": (["model.safetensors", "config.json", "vocab.bin", "README.md"], ["model.safetensors"], []),
    "files of a trainer": (
        ["model.safetensors", "optimizer.pt", "rng_state.pth", "random_states_0.pkl"], ["model.safetensors"], [],
    ),
    "LLaVA": ([ADAPTER, "adapter_config.json", "non_lora_trainables.bin"], [ADAPTER], ["non_lora_trainables.bin"]),
    "LongLoRA": ([ADAPTER, "adapter_config.json", "trainable_params.bin"], [ADAPTER], ["trainable_params.bin"]),
    "TRL": ([ADAPTER, "adapter_config.json", "value_head.safetensors"], [ADAPTER], ["value_head.safetensors"]),
    "TRL before": (["adapter_model.bin", "adapter_config.json", "v_head.pt"], ["adapter_model.bin"], ["v_head.pt"]),
    "Unsloth": ([ADAPTER, "adapter_config.json", "new_embeddings.safetensors"], [ADAPTER], ["new_embeddings.safetens"]),
    "several adapters": (
        [ADAPTER, "adapter_config.json", f"style/{ADAPTER}", "style/adapter_config.json"], [ADAPTER], ["::style"],
    ),
    "a projector": (["model.safetensors", "mm_projector.bin"], ["model.safetensors"], ["mm_projector.bin"]),
    "an unknown name": (["model.safetensors", "extra"], ["model.safetensors"], ["'extra'"]),
    "GGUF": (["model.safetensors", "model-Q4_K.gguf"], ["model.safetensors"], ["model-Q4_K.gguf"]),
    "GGUF alone": (["model-Q4_K.gguf", "README.md"], ["model-Q4_K.gguf"], []),
    "single files of two variants": (
        ["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"], ["model.fp16.safetensors"],
    ),
    "a variant alone": (["model.fp16.safetensors", "pytorch_model.fp16.bin"], ["model.fp16.safetensors"],
                        ["pytorch_model.fp16.bin"]),
    "an index": ([*SHARDS, INDEX], SHARDS, []),
    "an index and a head": ([*SHARDS, INDEX, "score.pt"], SHARDS, ["score.pt"]),
    "two indexes": ([*SHARDS, *OLD, INDEX, OLD_INDEX], SHARDS, [OLD_INDEX]),
    "an index and its variant": ([*SHARDS, *HALF, INDEX, HALF_INDEX], SHARDS, [HALF_INDEX]),
    "an index and its variant, named otherwise": (
        [*SHARDS, *HALF, INDEX, "model.fp16.safetensors.index.json"], SHARDS, ["model.fp16.safetensors.index.json"],
    ),
    "the index of a variant alone": ([*HALF, HALF_INDEX], HALF, []),
    "a file and the index of a variant": (
        ["model.safetensors", *HALF, HALF_INDEX], ["model.safetensors"], [HALF_INDEX],
    ),
    "shards without an index": (SHARDS, SHARDS, ["there is no index"]),
    "shards of GGUF": (
        ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ["there is no index"],
    ),
    "the only shard": (["model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"], []),
    "shards without an index beside a model": (["model.safetensors", *SHARDS], ["model.safetensors"], SHARDS),
    "sentence-transformers": (
        ["model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"],
        ["model.safetensors"], ["modules.json makes '2_Dense' a part of the model", "::2_Dense"],
    ),
    "checkpoints of a trainer": (
        ["model.safetensors", "checkpoint-5/model.safetensors", "checkpoint-10/model.safetensors", "runs/events.txt"],
        ["model.safetensors"], ["'checkpoint-10', 'checkpoint-5'"],
    ),
    "averages": (["diffusion_pytorch_model.bin", "unet_ema/diffusion_pytorch_model.bin"],
                 ["diffusion_pytorch_model.bin"], ["::unet_ema"]),
    "Llama's own form, two levels down": (
        ["model.safetensors", "original/7B/consolidated.00.pth"], ["model.safetensors"], ["::original"],
    ),
    "hidden folders": (["model.safetensors", ".cache/model.safetensors"], ["model.safetensors"], []),
    "other frameworks": (
        ["model.safetensors", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "onnx/model.onnx",
         "openvino_model.bin", "openvino_model.xml", "x.tflite"], ["model.safetensors"],
        ["'flax_model.msgpack', 'openvino_model.bin', 'rust_model.ot', 'tf_model.h5', 'x.tflite', 'onnx' are of other"],
    ),
    "a directory that only ends like a mapping": (["model.pth", "unet/config.json"], ["model.pth"], []),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_read_are_named(tmp_path: Path, layout: str) -> None:
    """A directory without such weights gives no warning, and each kind of rest is one warning."""
    names, read, named = LAYOUTS[layout]
    make(tmp_path, names)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(map(key_of, read))
        texts = [text for text in checkpoint.warnings if not text.startswith("this is an adapter")]
        assert len(texts) == bool(named)
        assert [name for name in named if name not in texts[0]] == []


COMMANDS = {
    "show": (),
    "stats": (),
    "check": (),
    "diff": ("{base}",),
    "align": ("{base}",),
    "convert": ("-o", "{out}"),
    "remap": ("-o", "{out}", "--rename", "w=v"),
    "merge": ("{base}", "-o", "{out}"),
}


@pytest.mark.parametrize("role", ["the first input", "another input"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_weights_that_it_does_not_read(
    tmp_path: Path, command: str, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The findings of ``check`` name the file, and every other command prints a warning."""
    (tmp_path / "run").mkdir()
    base = tmp_path / "base.safetensors"
    for path in (base, tmp_path / "run" / "model.safetensors", tmp_path / "run" / "mm_projector.safetensors"):
        save_file({"w": torch.rand(2, 2)}, path)
    inputs = [str(tmp_path / "run"), *(str(base) for word in COMMANDS[command] if word == "{base}")]
    options = [word.format(out=tmp_path / "out.safetensors") for word in COMMANDS[command] if word != "{base}"]
    if role == "another input":
        inputs.reverse()
        if len(inputs) == 1 and command in ("check", "remap"):
            inputs, options = [str(base), "--like", str(tmp_path / "run")], [*options[:2]]
    ran = run_ckpt(capsys, command, *inputs, *options)
    assert "'mm_projector.safetensors' is not read; only 'model.safetensors' is read" in " ".join(
        (ran.out + ran.err).split()
    )
    assert ran.code == (1 if command == "check" and "--like" not in inputs else 0)


def test_loading_and_the_preflight_report_the_weights_that_are_not_read(tmp_path: Path) -> None:
    """The report of ``load_into`` has the finding too; weights of other frameworks are only a note."""
    model = torch.nn.Linear(2, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    make(tmp_path, ["tf_model.h5", "head.pt"])
    with open_checkpoint(tmp_path) as checkpoint:
        for report in (load_into(model, checkpoint), preflight(model, init=checkpoint)):
            found = [(finding.severity, finding.message[:9]) for finding in report.findings if "unread" in finding.code]
            assert found == [("warning", "'head.pt'"), ("note", "'tf_model")]


def test_a_check_reports_weights_of_other_frameworks_as_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model whose weights are there again for TensorFlow is in order; a head that is not read is a warning."""
    save_file({"w": torch.rand(2, 2)}, tmp_path / "model.safetensors")
    make(tmp_path, ["tf_model.h5", "onnx/model.onnx"])
    ran = run_ckpt(capsys, "check", tmp_path, "--json")
    findings = {row["code"]: row["severity"] for row in json.loads(ran.out)["findings"]}
    assert (ran.code, findings["unread-weights"]) == (0, "note")
    make(tmp_path, ["head.pt"])
    assert run_ckpt(capsys, "check", tmp_path).code == 1


def test_a_file_that_is_given_by_its_path_is_all_that_was_asked_for(tmp_path: Path) -> None:
    """The siblings of the file are not named, except where the name says that the file is one of several shards."""
    make(tmp_path, ["model.safetensors", "head.pt", *SHARDS])
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.warnings == ()
    with open_checkpoint(tmp_path / SHARDS[0]) as checkpoint:
        assert checkpoint.warnings == (f"'{SHARDS[0]}' is one of 2 shards, by its name: no other shard is read",)


@pytest.mark.parametrize("name", [
    HALF_INDEX, "model.fp16.safetensors.index.json", "pytorch_model.bin.index.fp32.json",
    "diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json",
    "pytorch_model.fp16.bin.index.json",
])  # fmt: skip
@pytest.mark.parametrize("form", ["before the number", "after the number"])
def test_an_index_of_a_variant_is_opened_by_its_path(tmp_path: Path, name: str, form: str) -> None:
    stem, suffix = name.split(".index", maxsplit=1)[0].rsplit(".", 1)
    plain, _, infix = stem.partition(".")
    variant = infix or name.split(".index")[1].removesuffix(".json").removeprefix(".")
    before, after = (f".{variant}", "") if form == "before the number" else ("", f".{variant}")
    shards = [f"{plain}{before}-0000{number}-of-00002{after}.{suffix}" for number in (1, 2)]
    make(tmp_path, [*shards, f"{plain}.{suffix}"])
    (tmp_path / name).write_text(json.dumps({"weight_map": {key_of(shard): shard for shard in shards}}))
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint) == set(shards)
        assert checkpoint.warnings == ()
    (tmp_path / f"{plain}.{suffix}").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(shards)


@pytest.mark.parametrize("name", ["Model.Pt", "WEIGHTS.PTH"])
def test_a_suffix_in_upper_case_is_a_suffix(tmp_path: Path, name: str) -> None:
    make(tmp_path, [name])
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {key_of(name)}
        assert checkpoint.warnings == ()


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, ["weights.pth", "model.safetensors/model.safetensors"])
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == {key_of("weights.pth")}
        assert "the folder 'model.safetensors' holds a further checkpoint" in checkpoint.warnings[0]


def test_shards_can_count_from_zero(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in range(3)]
    make(tmp_path, names)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(map(key_of, names))
    (tmp_path / names[2]).unlink()
    assert refusal(str(tmp_path)).reason == f"2 of 3 shards and no index: '{names[2]}' is missing"


def test_one_of_several_variants_must_be_chosen(tmp_path: Path) -> None:
    make(tmp_path, [*HALF, HALF_INDEX])
    (tmp_path / "model.safetensors.index.bf16.json").write_text((tmp_path / HALF_INDEX).read_text())
    error = refusal(str(tmp_path))
    assert error.reason == f"holds 2 indexes: model.safetensors.index.bf16.json, {HALF_INDEX}"
    make(tmp_path / "single", ["model.fp16.safetensors", "model.bf16.safetensors"])
    assert "2 files of weights" in refusal(str(tmp_path / "single")).reason


OTHER = ["model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"]
NEW = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]


@pytest.mark.parametrize(
    ("named", "present", "opens"),
    [
        pytest.param(OTHER, SHARDS, ("model-*-of-00002.safetensors", SHARDS), id="all missing"),
        pytest.param(SHARDS, [SHARDS[0], *NEW], ("model-*-of-00004.safetensors", NEW), id="one missing, a newer save"),
        pytest.param(SHARDS, ["model.safetensors"], ("model.safetensors", ["model.safetensors"]), id="a single file"),
        pytest.param(SHARDS, OLD, ("pytorch_model-*-of-00002.bin", OLD), id="another format"),
        pytest.param(SHARDS, HALF, ("model.fp16-*-of-00002.safetensors", HALF), id="a variant"),
        pytest.param(SHARDS, NEW[:3], ("model-*-of-00004.safetensors", NEW[:3]), id="an interrupted save"),
    ],
)
@pytest.mark.parametrize("by", ["directory", "index"])
def test_a_stale_index_is_blamed_and_not_the_shards(
    tmp_path: Path, named: list[str], present: list[str], opens: tuple[str, list[str]], by: str
) -> None:
    """The hint opens the files that are there without the index. It never advises to remove a file."""
    make(tmp_path, present)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in named}}))
    missing = next(name for name in named if name not in present)
    way, read = opens
    error = refusal(str(tmp_path if by == "directory" else tmp_path / INDEX))
    assert error.path == str(tmp_path / INDEX)
    assert error.reason.startswith(f"the index names '{missing}'")
    assert "missing; the directory has '" in error.reason
    assert error.hint is not None
    assert f"'{tmp_path}::{way}'" in error.hint
    assert "remove" not in error.hint
    with open_checkpoint(f"{tmp_path}::{way}") as checkpoint:
        assert set(checkpoint) == set(read)
        assert any("is missing" in text for text in checkpoint.warnings) == (read == NEW[:3])


def test_an_index_that_places_keys_elsewhere_may_be_stale(tmp_path: Path) -> None:
    make(tmp_path, SHARDS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip(SHARDS, reversed(SHARDS), strict=True))}))
    error = refusal(str(tmp_path))
    assert "but the shard has no such tensor" in error.reason
    assert f"'{tmp_path}::model-*-of-00002.safetensors' opens" in str(error.hint)
    with open_checkpoint(f"{tmp_path}::model-*-of-00002.safetensors") as checkpoint:
        assert set(checkpoint) == set(SHARDS)


def test_a_shard_that_is_still_to_be_copied_is_not_blamed_on_the_index(tmp_path: Path) -> None:
    make(tmp_path, [*SHARDS, INDEX, "head.safetensors"])
    (tmp_path / SHARDS[1]).unlink()
    error = refusal(str(tmp_path))
    assert error.reason.startswith("no such file or directory (a shard that should hold")
    assert error.hint == "download or copy it again"


def test_a_shard_that_the_index_does_not_name_may_be_the_good_shard(tmp_path: Path) -> None:
    make(tmp_path, [*SHARDS, INDEX, *NEW])
    error = refusal(str(tmp_path))
    assert error.hint is not None
    assert "remove" not in error.hint
    for way, read in ((f"{tmp_path / INDEX}", SHARDS), (f"{tmp_path}::model-*-of-00004.safetensors", NEW)):
        assert f"'{way}'" in error.hint
        with open_checkpoint(way) as checkpoint:
            assert set(checkpoint) == set(read)


def test_shards_of_two_saves_without_an_index_are_not_mixed(tmp_path: Path) -> None:
    make(tmp_path, [*SHARDS, *OTHER])
    error = refusal(str(tmp_path))
    assert error.reason == (
        "shards of 2 checkpoints and no index: "
        "model-*-of-00002.safetensors (2 of 2), model-*-of-00004.safetensors (2 of 4)"
    )
    assert f"'{tmp_path}::model-*-of-00002.safetensors'" in str(error.hint)


def test_files_that_are_numbered_and_overlap_are_not_joined(tmp_path: Path) -> None:
    """Two shards with the same key are not shards of one checkpoint: perhaps they are halves of each tensor."""
    for name in SHARDS:
        save_file({"w": torch.ones(2)}, tmp_path / name)
    assert refusal(str(tmp_path)).reason == f"'w' is in this shard and in '{SHARDS[0]}'"


PIPELINE = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None]}  # fmt: skip
PARTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors",
]
REST = ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"]


@pytest.mark.parametrize("form", ["diffusers", "folders only"])
def test_a_pipeline_lists_its_parts_and_each_is_opened_by_name(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only ``show`` accepts the whole directory. Every other command refuses it, and its hint names the parts."""
    make(tmp_path, [*PARTS, *REST])
    if form == "diffusers":
        (tmp_path / "model_index.json").write_text(json.dumps(PIPELINE))
    with open_checkpoint_or_parts(tmp_path) as checkpoint:
        assert len(checkpoint) == 0
        entries = {entry.path: (entry.type, entry.value) for entry in checkpoint.entries}
    named = "UNet2DConditionModel: " if form == "diffusers" else ""
    assert entries["text_encoder"] == ("safetensors", "1 tensor, 16 B")
    assert entries["unet"] == ("torch-zip", f"{named}1 tensor, 16 B")
    assert set(entries) == {"text_encoder", "unet", "vae"}
    document = json.loads(run_ckpt(capsys, "show", tmp_path, "--json").out)
    assert [entry["path"] for entry in document["entries"]] == ["text_encoder", "unet", "vae"]
    shown = run_ckpt(capsys, "show", tmp_path)
    assert (shown.code, f"'{tmp_path}::unet'" in shown.err) == (0, True)
    mistyped = run_ckpt(capsys, "show", f"{tmp_path}::une")
    assert (mistyped.code, "has nothing called 'une': it is a " in mistyped.err) == (2, True)
    for command in (["check"], ["stats"], ["convert", "-o", tmp_path / "out.safetensors"], ["diff", tmp_path]):
        ran = run_ckpt(capsys, *command[:1], tmp_path, *command[1:])
        assert (ran.code, ran.out) == (2, "")
        assert f"'{tmp_path}::unet'" in ran.err
    for part in PARTS:
        with open_checkpoint(f"{tmp_path}::{part.split('/')[0]}") as checkpoint:
            assert list(checkpoint) == [key_of(part)]
            assert checkpoint.path == str(tmp_path / part)
    out = tmp_path / "unet.safetensors"
    assert run_ckpt(capsys, "convert", f"{tmp_path}::unet", "-o", out).code == 0
    assert list(load_file(out)) == [key_of(PARTS[1])]


def test_single_files_beside_a_pipeline_are_parts(tmp_path: Path) -> None:
    make(tmp_path, [*PARTS, "sd_xl_base_1.0.safetensors"])
    (tmp_path / "model_index.json").write_text(json.dumps(PIPELINE))
    with open_checkpoint_or_parts(tmp_path) as checkpoint:
        assert "sd_xl_base_1.0.safetensors" in {entry.path for entry in checkpoint.entries}
    with open_checkpoint(f"{tmp_path}::sd_xl_base_1.0.safetensors") as checkpoint:
        assert list(checkpoint) == ["sd_xl_base_1.0.safetensors"]


def test_a_part_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    make(tmp_path, [*PARTS, "onnx/model.onnx"])
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with open_checkpoint_or_parts(tmp_path) as checkpoint:
        entries = {entry.path: entry for entry in checkpoint.entries}
    assert (entries["vae"].type, entries["onnx"].type) == ("not read", "not read")
    assert "other frameworks" in str(entries["onnx"].value)


def test_a_directory_of_other_frameworks_only_is_refused_by_name(tmp_path: Path) -> None:
    """The ONNX export of a pipeline has the same folders, and none of them can be read."""
    make(tmp_path, ["unet/model.onnx", "vae/model.onnx"])
    (tmp_path / "model_index.json").write_text(json.dumps(PIPELINE))
    assert refusal(str(tmp_path)).reason == (
        "holds weights of other frameworks only, which are not read: 'unet', 'vae'"
    )
    assert "'model.onnx'" in refusal(str(tmp_path / "unet")).reason


def test_a_key_inside_a_part_is_opened(tmp_path: Path) -> None:
    """``DIR::part.key`` and ``DIR::part::key`` are the mapping ``key`` in the part; the name of a part wins."""
    (tmp_path / "model").mkdir()
    torch.save({"model": {"ema": {"a": torch.ones(1)}}, "epoch": 3}, tmp_path / "run.pth")
    torch.save({"ema": {"b": torch.ones(1)}, "net": {"c": torch.ones(1)}}, tmp_path / "model" / "run.pth")
    for path in (f"{tmp_path}::model.ema", f"{tmp_path}::model::ema", f"{tmp_path}::model::run.pth::ema"):
        with open_checkpoint(path) as checkpoint:
            assert list(checkpoint) == ["b"]
    with open_checkpoint(f"{tmp_path}::run.pth.model.ema") as checkpoint:
        assert list(checkpoint) == ["a"]
    (tmp_path / "model" / "run.pth").unlink()
    with open_checkpoint(f"{tmp_path}::model.ema") as checkpoint:
        assert list(checkpoint) == ["a"]


def test_parts_of_parts_are_opened(tmp_path: Path) -> None:
    make(tmp_path, [f"runs/step-{step}/{part}" for step in (1, 2) for part in PARTS])
    error = refusal(str(tmp_path))
    assert error.hint == f"give '{tmp_path}::runs'"
    assert f"'{tmp_path}/runs::step-1' or '{tmp_path}/runs::step-2'" in str(refusal(f"{tmp_path}::runs").hint)
    with open_checkpoint(f"{tmp_path}::runs.step-2::vae") as checkpoint:
        assert list(checkpoint) == [key_of(f"runs/step-2/{PARTS[2]}")]


def test_the_only_folder_of_a_folder_is_skipped_by_the_hint(tmp_path: Path) -> None:
    """A log directory of Lightning, or an unpacked wheel, needs one further command and not one for each level."""
    make(
        tmp_path,
        ["version_0/checkpoints/a.safetensors", "version_0/checkpoints/b.safetensors", "version_0/hparams.yaml"],
    )
    assert refusal(str(tmp_path)).hint == f"give '{tmp_path}::version_0::checkpoints'"
    assert "2 files of weights and no index" in refusal(f"{tmp_path}::version_0::checkpoints").reason


def test_a_link_that_leads_back_is_followed_a_few_times(tmp_path: Path) -> None:
    make(tmp_path, ["a/b/x.safetensors", "a/b/y.safetensors"])
    (tmp_path / "a" / "b" / "x.safetensors").unlink()
    (tmp_path / "a" / "b" / "c").symlink_to(tmp_path)
    assert str(refusal(str(tmp_path)).hint).startswith(f"give '{tmp_path}::a")


def test_an_adapter_in_a_folder_is_folded_with_its_own_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT saves further adapters in folders; the scale of such an adapter is in its own folder."""
    base = tmp_path / "base.safetensors"
    save_file({"q.weight": torch.zeros(4, 4)}, base)
    for folder, alpha in (("run", 2), ("run/style", 8)):
        (tmp_path / folder).mkdir()
        pair = {
            "base_model.model.q.lora_A.weight": torch.ones(2, 4),
            "base_model.model.q.lora_B.weight": torch.ones(4, 2),
        }
        save_file(pair, tmp_path / folder / ADAPTER)
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | {"lora_alpha": alpha}))
    for path, expected in ((f"{tmp_path}/run", 2.0), (f"{tmp_path}/run::style", 8.0)):
        ran = run_ckpt(capsys, "merge", base, path, "-o", tmp_path / "out.safetensors", "--method", "lora", "--force")
        assert ran.code == 0
        assert load_file(tmp_path / "out.safetensors")["q.weight"][0, 0] == expected
        assert ("::style' opens it" in ran.err) == (path == f"{tmp_path}/run")


def test_weights_beside_a_distributed_checkpoint_are_named(tmp_path: Path) -> None:
    directory = Path(save_distributed(tmp_path / "run", {"w": torch.ones(2)}))
    make(directory, ["head.pt", "average/model.safetensors"])
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.warnings[0] == "'head.pt' is not read; only the distributed checkpoint is read"
        assert "'average'" in checkpoint.warnings[1]


def test_a_file_without_tensors_is_not_named(tmp_path: Path) -> None:
    """Arguments and texts that torch.save wrote are not weights."""
    make(tmp_path, ["model.safetensors"])
    torch.save({"lr": 0.1, "name": "x"}, tmp_path / "arguments.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.warnings == ()


def test_a_folder_of_many_folders_does_not_hide_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, ["model.safetensors", "z/model.safetensors"])
    for number in range(400):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert [text[:14] for text in checkpoint.warnings] == ["the folder 'z'"]


def test_folders_of_experiments_are_not_parts_of_a_model(tmp_path: Path) -> None:
    """Only a folder that is called like a rank and nothing else says that a model is split."""
    names = {"lora_rank_1": 0, "lora_rank_2": 0, "mp_rank_00": 1, "mp_rank_01": 1}
    make(tmp_path, [f"{folder}/model.safetensors" for folder in names])
    for folder, count in names.items():
        for path in (tmp_path / folder, tmp_path / folder / "model.safetensors"):
            with open_checkpoint(path) as checkpoint:
                assert len(checkpoint.warnings) == count


def test_many_files_are_named_by_their_number(tmp_path: Path) -> None:
    """The message stays short, and the first bytes of only some files are read."""
    make(tmp_path, ["model.safetensors"])
    first = (tmp_path / "model.safetensors").read_bytes()
    for number in range(45):
        (tmp_path / f"part{number:02}.safetensors").write_bytes(first)
    with open_checkpoint(tmp_path) as checkpoint:
        (text,) = checkpoint.warnings
    assert "'part07.safetensors' and 37 more are not read" in text


def test_many_files_and_folders_take_bounded_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bytes of some files are read, and some folders are listed, however many there are."""
    make(tmp_path, ["model.safetensors"])
    os.mkfifo(tmp_path / "0.bin")
    for number in range(1000):
        os.mknod(tmp_path / f"x{number}.bin")
        os.mknod(tmp_path / f"x{number}")
    for number in range(400):
        (tmp_path / f"folder{number}").mkdir()
    counts = Counter[str]()
    for name in ("open", "scandir"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name), counts))
    with open_checkpoint(tmp_path) as checkpoint:
        assert "and 493 more are not read" in checkpoint.warnings[0]
        assert checkpoint.warnings[1] == "100 folders of the directory were not searched"
    assert counts["open"] <= 700
    assert counts["scandir"] <= 310


def counted(name: str, function: Callable[..., Any], counts: Counter[str]) -> Callable[..., Any]:
    """Return a function that counts its calls and does the same."""

    def call(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return function(*args, **options)

    return call


def test_a_trainer_file_is_refused_as_before(tmp_path: Path) -> None:
    make(tmp_path, ["model.safetensors", "trainer_state.json"])
    assert isinstance(refusal(f"{tmp_path}::trainer_state.json"), FormatError)
