"""Files that trainers write next to the weights are listed and can be opened by name; no code in them is run."""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import Output, execute, plan_remap
from ckptkit.core.checkpoint import Entry
from ckptkit.errors import FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import assert_same, mapping, refusal, text, torch_zip, with_weights
from tests.hostile.contract import run_limited

STATE = {"net.weight": torch.arange(6.0).reshape(2, 3), "net.bias": torch.ones(2)}
TRAINER_STATE: dict[str, object] = {
    "best_global_step": None, "best_metric": float("nan"), "best_model_checkpoint": None, "epoch": 0.5,
    "eval_steps": 500, "global_step": 2, "is_hyper_param_search": False,
    "log_history": [{"epoch": 0.5, "grad_norm": float("inf"), "loss": float("nan"), "step": 2}],
    "max_steps": 4, "stateful_callbacks": {"TrainerControl": {"args": {}}}, "total_flos": 864000.0, "trial_name": None,
}  # fmt: skip
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "model_type": "llama", "rope_parameters": {"a": 1}}


class TrainingArguments(Namespace):
    """A stand-in for the class of transformers, which has hundreds of fields."""


def trained() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def trainer_directory(directory: Path) -> Path:
    """Write the files that the Trainer of transformers writes at a checkpoint."""
    directory.mkdir(exist_ok=True)
    save_file(STATE, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "trainer_state.json").write_text(json.dumps(TRAINER_STATE))
    (directory / "README.md").write_text("a model")
    torch.save(trained(), directory / "optimizer.pt")
    torch.save({"last_epoch": 2, "_last_lr": [0.5], "lr_lambdas": [{}]}, directory / "scheduler.pt")
    torch.save({"python": (3, tuple(range(625)), None), "cpu": torch.get_rng_state()}, directory / "rng_state.pth")
    torch.save(TrainingArguments(**{f"field_{n}": n for n in range(100)}), directory / "training_args.bin")
    return directory


def entries_of(directory: Path) -> dict[str, Entry]:
    with open_checkpoint(directory) as checkpoint:
        assert all(entry.is_outside and entry.is_file for entry in checkpoint.entries)
        return {entry.path: entry for entry in checkpoint.entries}


def test_a_checkpoint_of_the_trainer_lists_the_other_files(tmp_path: Path) -> None:
    with open_checkpoint(trainer_directory(tmp_path)) as checkpoint:
        assert {key: info.shape for key, info in checkpoint.items()} == {"net.bias": (2,), "net.weight": (2, 3)}
        assert checkpoint.warnings == ()
        assert checkpoint.references == ()
    entries = entries_of(tmp_path)
    assert {path: (entry.type, entry.value) for path, entry in entries.items()} == {
        "config.json": ("json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}),
        "generation_config.json": ("json", {"eos_token_id": 2}),
        "optimizer.pt": ("dict", "2 items, 6 tensors"),
        "rng_state.pth": ("dict", "2 items, 1 tensor"),
        "scheduler.pt": ("dict", {"last_epoch": 2, "_last_lr": [0.5], "lr_lambdas": [{}]}),
        "trainer_state.json": (
            "json",
            {"global_step": 2, "epoch": 0.5, "best_metric": "nan", "max_steps": 4, "eval_steps": 500,
             "is_hyper_param_search": False, "total_flos": 864000.0},
        ),
        "training_args.bin": (f"{__name__}.TrainingArguments", "code reference, not run"),
    }  # fmt: skip


def test_a_conversion_names_the_files_that_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = trainer_directory(tmp_path / "checkpoint-2")
    ran = run_ckpt(capsys, "convert", directory, "-o", tmp_path / "out.pt")
    assert ran.code == 0
    assert "left out, stored outside of the weights: config.json, generation_config.json, optimizer.pt" in ran.err


def test_replacing_the_weights_keeps_the_other_files(tmp_path: Path) -> None:
    """Writing the file of weights in place changes no file beside it."""
    directory = trainer_directory(tmp_path)
    before = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "model.safetensors"}
    with open_checkpoint(directory) as checkpoint:
        plan = plan_remap(checkpoint, ["net.*=*"])
        execute(plan, {"source": checkpoint}, Output(str(directory / "model.safetensors"), "safetensors", force=True))
    with open_checkpoint(directory) as checkpoint:
        assert set(checkpoint) == {"weight", "bias"}
    assert {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "model.safetensors"} == before


def test_a_file_beside_the_weights_is_opened_by_its_name(tmp_path: Path) -> None:
    """``DIR::optimizer.pt`` opens the file, and a key after it opens a mapping inside the file."""
    directory = trainer_directory(tmp_path)
    expected = torch.load(directory / "optimizer.pt", weights_only=True)["state"]
    flat = {f"{index}.{name}": value for index, state in expected.items() for name, value in state.items()}
    with open_checkpoint(f"{directory}::optimizer.pt.state") as checkpoint:
        assert_same(checkpoint, flat)
        assert checkpoint.path == str(directory / "optimizer.pt")
    with open_checkpoint(f"{directory}::optimizer.pt") as checkpoint:
        assert list(checkpoint) == [f"state.{key}" for key in flat]
    error = refusal(f"{directory}::trainer_state.json")
    assert "a JSON file, which holds no tensors" in error.reason
    error = refusal(f"{directory}::optimizer.pt.steak")
    assert "holds nothing at 'steak'" in error.reason
    error = refusal(f"{directory}::optimizer")
    assert "holds only tensors, and not a mapping 'optimizer'" in error.reason


def test_states_of_many_ranks_are_one_entry(tmp_path: Path) -> None:
    directory = trainer_directory(tmp_path)
    os.rename(directory / "rng_state.pth", directory / "rng_state_0.pth")
    for rank in range(1, 300):
        (directory / f"rng_state_{rank}.pth").write_bytes(b"not looked at: it is like the first")
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.warnings == ()
    assert entries_of(directory)["rng_state_*.pth"][1:3] == ("300 files", "2 items, 1 tensor")
    with open_checkpoint(f"{directory}::rng_state_0.pth") as checkpoint:
        assert list(checkpoint) == ["cpu"]


def test_the_states_of_accelerate_are_listed(tmp_path: Path) -> None:
    """The files of accelerate have other names; a warning names a second model, which is not read."""
    save_file(STATE, tmp_path / "model.safetensors")
    save_file(STATE, tmp_path / "model_1.safetensors")
    names = ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "sampler.bin", "scheduler.bin")
    for name in names:
        torch.save({"a": 1}, tmp_path / name)
    assert {path: entry.value for path, entry in entries_of(tmp_path).items()} == {name: {"a": 1} for name in names}
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.warnings == ("'model_1.safetensors' is not read; only 'model.safetensors' is read",)


def test_a_single_file_of_any_name_may_have_files_beside_it(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "my_run.pth")
    torch.save(trained(), tmp_path / "optimizer.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert [entry.path for entry in checkpoint.entries] == ["optimizer.pt"]


def _huge_json(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(17 << 20)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty": ("optimizer.pt", lambda path: path.write_bytes(b""), "optimizer.pt cannot be read: the file is empty"),
    "truncated": (
        "optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:-50]), "optimizer.pt cannot be read: "),
    "no torch file": (
        "scheduler.pt", lambda path: path.write_bytes(b"\x80\x04}."), "scheduler.pt cannot be read: a bare pickle"),
    "a directory": ("scaler.pt", Path.mkdir, "scaler.pt cannot be read: not a regular file"),
    "a dangling link": ("scaler.pt", lambda path: path.symlink_to("gone"), "scaler.pt cannot be read: a symbolic li"),
    "a pipe": ("scaler.pt", os.mkfifo, "scaler.pt cannot be read: not a regular file"),
    "not JSON": (
        "trainer_state.json", lambda path: path.write_text("{"),
        "trainer_state.json cannot be read: the file is not JSON"),
    "a list": (
        "config.json", lambda path: path.write_text("[]"), "config.json cannot be read: the file is a JSON list"),
    "deep": (
        "config.json", lambda path: path.write_text("[" * 10**5), "config.json cannot be read: the file is nested too"),
    "17 MB": ("config.json", _huge_json, "config.json cannot be read: 17.8 MB, more than the limit of 6.3 MB"),
    "a pickle of 9 MB": (
        "optimizer.pt",
        lambda path: path.write_bytes(torch_zip(mapping({"w": text("x" * (9 << 20))}))),
        "optimizer.pt cannot be read: data.pkl has 9437201 bytes, more than the limit of 3145728",
    ),
    "malicious": (
        "training_args.bin",
        lambda path: path.write_bytes(with_weights(x=b"cposix\nsystem\n" + b"X\4\0\0\0true\x85R")),
        "training_args.bin looks malicious: it asks to call posix.system; not run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_beside_the_weights_is_a_warning(tmp_path: Path, case: str) -> None:
    """The weights are read, and the warning names the broken file."""
    name, damage, message = BROKEN[case]
    damage(trainer_directory(tmp_path) / name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read_bytes("net.bias") == b"\0\0\x80\x3f" * 2
        assert [text.startswith(message) for text in checkpoint.warnings] == [True], checkpoint.warnings
        assert [entry.path for entry in checkpoint.entries].count(name) == 1


def test_the_values_of_a_large_configuration_are_bounded(tmp_path: Path) -> None:
    """A configuration with very many or very long values is cut to a line."""
    directory = trainer_directory(tmp_path)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "x" * 5000, "big": 2**70} | {f"k{n}": n for n in range(100_000)})
    )
    value = entries_of(directory)["config.json"].value
    assert isinstance(value, dict)
    assert len(value) == 64
    assert value["model_type"] == "5,000 characters"
    assert value["big"] == "an integer of 71 bits"


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors, adapter_model.safetensors"),
        (["pytorch_model.bin", "adapter_model.bin"], "pytorch_model.bin, adapter_model.bin"),
    ],
)
def test_a_model_and_an_adapter_are_two_candidates(tmp_path: Path, names: list[str], listed: str) -> None:
    for name in names:
        torch.save(STATE, tmp_path / name)
    error = refusal(str(tmp_path))
    assert isinstance(error, FormatError)
    assert error.reason == f"holds a whole model and an adapter: {listed}"
    assert error.hint == "give the path of one of them"


def test_a_warning_names_the_older_form_of_the_same_weights(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.warnings == ("'pytorch_model.bin' is not read; only 'model.safetensors' is read",)


def test_a_directory_without_weights_is_not_a_checkpoint(tmp_path: Path) -> None:
    trainer_directory(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "a directory without a checkpoint" in refusal(str(tmp_path)).reason


class HyperParameters(dict[str, Any]):
    """A stand-in for the AttributeDict of Lightning."""


def test_a_checkpoint_of_lightning_is_its_state_dict(tmp_path: Path) -> None:
    """The weights are ``state_dict``; loops, callbacks, optimizers and hyper-parameters are entries."""
    path = tmp_path / "epoch=0-step=4.ckpt"
    content = {
        "epoch": 0, "global_step": 4, "pytorch-lightning_version": "2.6.6", "state_dict": STATE,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.ones(()), "dirpath": "/x"}},
        "optimizer_states": [trained()], "lr_schedulers": [{"step_size": 1, "gamma": 0.1}], "hparams_name": "kwargs",
        "hyper_parameters": HyperParameters(width=4, opts=Namespace(a=1)), "MixedPrecision": {"scale": 65536.0},
    }  # fmt: skip
    torch.save(content, path, pickle_module=pickle)
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, STATE)
        assert checkpoint.envelope == "state_dict"
        entries = {entry.path: entry for entry in checkpoint.entries}
        assert all(entry.is_outside and not entry.is_file for entry in entries.values())
        assert entries.keys() == content.keys() - {"state_dict"}
        assert entries["optimizer_states"].value == "1 item, 6 tensors"
        assert entries["callbacks"].value == "1 item, 1 tensor"
        assert entries["hyper_parameters"].type == f"{__name__}.HyperParameters"
        assert entries["MixedPrecision"].value == {"scale": 65536.0}
        assert checkpoint.references == (f"{__name__}.HyperParameters",)


BOMBS = {
    "a pickle of empty mappings": ("optimizer.pt", torch_zip(b"](" + b"}" * ((3 << 20) - 99) + b"e")),
    "JSON of empty objects": ("config.json", b'{"a":[' + b"{}," * ((2 << 20) - 99) + b"1]}"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_expanding_files_beside_the_weights_are_bounded(tmp_path: Path, case: str) -> None:
    """With files of the largest size that is read, the weights are shown within the memory limit."""
    name, data = BOMBS[case]
    (trainer_directory(tmp_path) / name).write_bytes(data)
    ran = run_limited("show", tmp_path)
    assert ran.code == 0, ran.err
    assert "net.weight" in ran.out
