"""The files that describe a model go along into the directory of the output, and say what the output holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import choose_output, execute, merge_lora, open_checkpoint, parse_rules, plan_remap
from ckptkit.errors import CkptkitError, OutputError, PlanError
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import names_in

CONFIG = {
    "model_type": "llama", "dtype": "float32", "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
    "text_config": {"torch_dtype": "float32", "é": [1, None]},
}  # fmt: skip
STATE = {"embed.weight": torch.arange(12.0).reshape(4, 3), "lm_head.weight": torch.ones(4, 3)}
TEXTS = {
    "generation_config.json": "{}", "tokenizer.json": "{ }\n", "tokenizer_config.json": "{}", "merges.txt": "a b\r\n",
    "chat_template.jinja": "{{ x }}",
}  # fmt: skip
OTHERS = {"trainer_state.json": "{}", "README.md": "", "pytorch_model.bin.index.txt": "", "notes.json": "{}"}


def model_directory(
    path: Path, state: Mapping[str, torch.Tensor] = STATE, config: Mapping[str, Any] | None = CONFIG
) -> Path:
    path.mkdir()
    save_file(dict(state), path / "model.safetensors")
    for name, text in (TEXTS | OTHERS).items():
        (path / name).write_bytes(text.encode())
    if config is not None:
        (path / "config.json").write_text(json.dumps(config, sort_keys=True), encoding="utf-8")
    return path


def convert(source: Path, out: Path, *, dtype: str | None = None, drop: Sequence[str] = (), **options: Any) -> Any:
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, parse_rules(drop=drop), dtype=dtype)
        return execute(plan, checkpoint, choose_output(out, **options), carry=True)


def config_in(directory: Path) -> Any:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("shards", [None, 30], ids=["a file", "shards"])
def test_the_files_of_the_model_go_along(tmp_path: Path, shards: int | None) -> None:
    """Every file that describes the model is copied byte for byte, and no other file is."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    if shards is None:
        out.mkdir()
    written = convert(source, out if shards else out / "model.safetensors", max_shard_size=shards)
    assert written.carried == ("chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
                               "tokenizer.json", "tokenizer_config.json")  # fmt: skip
    assert written.adapted == ()
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in written.carried)
    weights = {name for name in names_in(out) if name.startswith("model")}
    assert set(names_in(out)) == weights | set(written.carried)
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint) == set(STATE)


def test_the_dtype_becomes_that_of_the_output(tmp_path: Path) -> None:
    """A cast changes every dtype that config.json states, also of a section, and nothing else."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    written = convert(source, out / "model.safetensors", dtype="bf16")
    assert [(change.statement, change.found, change.written) for change in written.adapted] == [
        ("dtype", "float32", "bfloat16"),
        ("text_config.torch_dtype", "float32", "bfloat16"),
    ]
    assert "config.json: dtype was 'float32' and is now 'bfloat16'" in str(written)
    text = {**CONFIG["text_config"], "torch_dtype": "bfloat16"}  # type: ignore[dict-item]
    assert config_in(out) == {**CONFIG, "dtype": "bfloat16", "text_config": text}


def test_a_dtype_that_is_not_the_outputs_alone_is_kept_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tensors of two dtypes in the output, the dtype is kept; nothing is guessed."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    save_file({**STATE, "lm_head.weight": STATE["lm_head.weight"].bfloat16()}, tmp_path / "like.safetensors")
    arguments = ("remap", source, "-o", out / "model.safetensors", "--like", tmp_path / "like.safetensors", "--carry")
    ran = run_ckpt(capsys, *arguments, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["output"]["adapted"] == []
    assert "config.json: dtype was kept: the output has tensors of BF16, F32" in ran.err
    assert config_in(out) == CONFIG


FP8 = {
    "a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1),
    "b.weight": torch.ones(2, 2),
}  # fmt: skip
QUANTISED = {**CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}


@pytest.mark.parametrize(
    ("drop", "stays"), [((), True), (("b.*",), True), (("a.*",), False)], ids=["all", "codes", "plain"]
)
def test_the_quantisation_is_removed_only_with_the_codes(tmp_path: Path, drop: Sequence[str], stays: bool) -> None:
    """As long as one quantised weight is in the output, its configuration stays; without any, it goes."""
    source, out = model_directory(tmp_path / "in", FP8, QUANTISED), tmp_path / "out"
    (source / "hf_quant_config.json").write_text("{}")
    out.mkdir()
    written = convert(source, out / "model.safetensors", drop=drop)
    assert ("quantization_config" in config_in(out)) is stays
    assert ("hf_quant_config.json" in written.carried) is stays
    assert [(change.statement, change.written) for change in written.adapted] == (
        [] if stays else [("quantization_config", None)]
    )


def test_the_quantisation_is_removed_from_every_section(tmp_path: Path) -> None:
    """A model of several parts can state the quantisation of one part in the section of that part."""
    nested = {"dtype": "float32", "quantization_config": {"quant_method": "fp8"}}
    source, out = model_directory(tmp_path / "in", FP8, {**QUANTISED, "text_config": nested}), tmp_path / "out"
    out.mkdir()
    written = convert(source, out / "model.safetensors", drop=["a.*"])
    assert config_in(out) == {**CONFIG, "text_config": {"dtype": "float32"}}
    assert [change.statement for change in written.adapted] == [
        "quantization_config", "text_config.quantization_config",
    ]  # fmt: skip


def test_a_quantisation_without_quantised_weights_is_not_touched(tmp_path: Path) -> None:
    """Plain weights can be quantised when they are loaded; what the input says of that stays."""
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    source, out = model_directory(tmp_path / "in", config=config), tmp_path / "out"
    out.mkdir()
    assert convert(source, out / "model.safetensors").adapted == ()
    assert config_in(out) == config


def test_the_files_of_the_base_come_before_those_of_a_donor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merge takes the files of the base; those of a donor only where the base has none, and says so."""
    base, donor = model_directory(tmp_path / "base"), model_directory(tmp_path / "donor", config={"of": "donor"})
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "model.safetensors"
    ran = run_ckpt(capsys, "merge", base, donor, "-o", out, "--carry")
    assert (ran.code, config_in(tmp_path / "out")) == (0, CONFIG)
    assert "carried from" not in ran.err
    assert "carried along: chat_template.jinja, config.json" in ran.err
    (tmp_path / "bare").mkdir()
    save_file(dict(STATE), tmp_path / "bare" / "w.safetensors")
    ran = run_ckpt(capsys, "merge", tmp_path / "bare" / "w.safetensors", donor, "-o", out, "--carry", "--force")
    assert (ran.code, config_in(tmp_path / "out")) == (0, {"of": "donor"})
    assert "carried from the directory of the donor: that of the base has no such files" in ran.err


def test_no_input_has_files_to_carry(tmp_path: Path) -> None:
    """A file alone, and a state_dict in memory, have nothing to carry: this is an error, and nothing is written."""
    for source in (STATE, _alone(tmp_path)):
        with pytest.raises(PlanError, match="no input has a configuration or a tokenizer"):
            execute(plan_remap(source), source, tmp_path / "out.safetensors", carry=True)
    assert names_in(tmp_path) == ["alone"]


def _alone(path: Path) -> Any:
    (path / "alone").mkdir()
    save_file(dict(STATE), path / "alone" / "w.safetensors")
    return open_checkpoint(path / "alone" / "w.safetensors")


def test_an_existing_file_needs_force_and_nothing_is_written_without(tmp_path: Path) -> None:
    """A file that is there is replaced only with force; without, the check of the output already refuses."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(OutputError, match="already exists") as caught:
        convert(source, out / "model.safetensors")
    assert caught.value.path == str(out / "tokenizer.json")
    assert names_in(out) == ["tokenizer.json"]
    convert(source, out / "model.safetensors", force=True)
    assert (out / "tokenizer.json").read_text() == TEXTS["tokenizer.json"]


def test_a_failed_run_carries_nothing(tmp_path: Path) -> None:
    """Where the weights are refused while they are written, no carried file is left either."""
    source, out = model_directory(tmp_path / "in", {"a": torch.tensor([1e9])}), tmp_path / "out"
    out.mkdir()
    for target, size in ((out / "model.safetensors", None), (out / "shards", 8)):
        with pytest.raises(PlanError, match="inf"):
            convert(source, target, dtype="f16", max_shard_size=size)
    assert names_in(out) == []


def test_the_output_can_be_beside_the_input(tmp_path: Path) -> None:
    """In the directory of the input, the files are there already; one changes only together with the weights."""
    source = model_directory(tmp_path / "in")
    assert "tokenizer.json" in convert(source, source / "copy.safetensors").carried
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "config.json").symlink_to(source / "config.json")
    for out in (source / "half.safetensors", tmp_path / "linked" / "model.safetensors"):
        with pytest.raises(OutputError, match="belongs to an input, whose weights it would no longer describe"):
            convert(source / "model.safetensors", out, dtype="bf16", force=True)
        assert not out.exists()
        assert config_in(source) == CONFIG
    convert(source / "model.safetensors", source / "model.safetensors", dtype="bf16", force=True)
    assert config_in(source)["dtype"] == "bfloat16"


def test_a_dtype_that_a_configuration_cannot_state_is_said(tmp_path: Path) -> None:
    """A model cannot be made with float8 as its default dtype, so the configuration keeps its own."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    plan = convert(source, out / "model.safetensors", dtype="f8_e4m3").plan
    assert plan is not None
    assert "config.json: dtype was kept: the output has tensors of F8_E4M3" in plan.notes
    assert config_in(out) == CONFIG


def test_links_are_followed_to_regular_files(tmp_path: Path) -> None:
    """In a hub's cache every file is a link into another directory; the output gets files, not links."""
    blobs = model_directory(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in names_in(blobs):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    (tmp_path / "out").mkdir()
    convert(snapshot, tmp_path / "out" / "model.safetensors")
    assert config_in(tmp_path / "out") == CONFIG
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("shards", [None, 30], ids=["a file", "shards"])
def test_a_file_that_cannot_be_read_stops_everything(tmp_path: Path, shards: int | None) -> None:
    """A link to nothing, or a config.json that is not JSON, is refused by name, and nothing is left behind."""
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    target = out / "shards" if shards else out / "model.safetensors"
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("nowhere")
    for name, text in (("tokenizer.json", None), ("config.json", "{")):
        if text is not None:
            (source / name).write_text(text)
        with pytest.raises(CkptkitError) as caught:
            convert(source, target, max_shard_size=shards)
        assert caught.value.path == str(source / name)
        assert names_in(out) == []


def test_code_is_named_and_never_carried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of code stay behind, and a configuration that refers to code says so. Folders stay behind too."""
    source, out = (
        model_directory(tmp_path / "in", config={**CONFIG, "auto_map": {"AutoModel": "mine.Model"}}),
        tmp_path / "out",
    )
    (source / "mine.py").write_text("print()")
    (source / "additional_chat_templates").mkdir()
    out.mkdir()
    ran = run_ckpt(capsys, "convert", source, "-o", out / "model.safetensors", "--carry", "-n")
    for sentence in ("not carried, because it is code: 'mine.py'", "names code of its own (auto_map)",
                     "not carried, because it is a folder: 'additional_chat_templates'"):  # fmt: skip
        assert sentence in ran.err
    assert names_in(out) == []
    assert run_ckpt(capsys, "convert", source, "-o", out / "model.safetensors", "--carry").code == 0
    assert "mine.py" not in names_in(out)


def test_a_file_that_goes_along_is_not_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is neither listed nor counted as left out: not on the page, nor in a dry run, nor in the documents.

    A tensor and an entry are counted apart. Without --carry, the same file is left out.
    """
    source, out = model_directory(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    arguments = ("remap", source, "-o", out / "model.safetensors", "--drop", "lm_head.*")
    assert "1 tensor and 3 entries left out; nothing" in run_ckpt(capsys, *arguments, "--dry-run").out
    plan = run_ckpt(capsys, *arguments, "--carry", "--dry-run", "--json")
    assert [drop["key"] for drop in json.loads(plan.out)["dropped"]] == ["lm_head.weight", "trainer_state.json"]
    ran = run_ckpt(capsys, *arguments, "--carry", "--json")
    assert ", 1 tensor and 1 entry left out\n" in ran.err
    assert "left out, stored outside of the weights: trainer_state.json\n" in ran.err
    document = json.loads(ran.out)
    assert (document["dropped"], document["summary"]["dropped"]) == (json.loads(plan.out)["dropped"], 2)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("model.safetensors", (), True),
        ("pytorch_model.bin", (), True),
        ("half.safetensors", (), False),
        ("shards", ("--max-shard-size", "30"), True),
    ],
)  # fmt: skip
def test_a_name_that_from_pretrained_does_not_find_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, options: tuple[str, ...], found: bool
) -> None:
    """Only some names of files of weights are found by from_pretrained; another name is allowed, with a note."""
    source = model_directory(tmp_path / "in")
    ran = run_ckpt(capsys, "convert", source, "-o", tmp_path / name, "--carry", *options)
    assert ran.code == 0
    assert ("of transformers does not find" in ran.err) is not found


def test_a_directory_has_not_the_name_that_diffusers_looks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory of safetensors has the name that transformers finds, and the note names both names."""
    source = model_directory(tmp_path / "in", config={"_diffusers_version": "0.42.1"})
    ran = run_ckpt(capsys, "convert", source, "-o", tmp_path / "out", "--carry", "--max-shard-size", "5GB")
    assert "of diffusers does not find 'model.safetensors': it looks for diffusion_pytorch_model.safetensors" in ran.err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_keys_and_shapes_that_the_configuration_does_not_know_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tensor that was dropped or renamed, or has another shape, is named: config.json still speaks of the input."""
    state = {**STATE, "small": torch.ones(2, 3)}
    source, out = model_directory(tmp_path / "in", state), tmp_path / "out"
    out.mkdir()
    arguments = ("remap", source, "-o", out / "model.safetensors", "--carry", "--drop", "embed.weight")
    ran = run_ckpt(capsys, *arguments, "--rename", "small=embed.weight")
    assert ran.code == 0
    assert "1 key of the source is not in the output ('small')" in ran.err
    assert "1 tensor of another shape than in the source: compare config.json with 'embed.weight'" in ran.err
    ran = run_ckpt(
        capsys, "remap", source, "-o", out / "model.safetensors", "--drop", "lm_head.*", "--carry", "--force"
    )
    assert ran.code == 0
    assert "1 key of the source is not in the output ('lm_head.weight')" in ran.err


def test_the_adapter_that_is_written_is_not_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An extracted adapter gets the configuration of an adapter; that of the base would contradict it."""
    base = model_directory(tmp_path / "base")
    ran = run_ckpt(capsys, "merge", base, base, "-o", tmp_path / "adapter_model.safetensors",
                   "--method", "extract-lora", "--carry")  # fmt: skip
    assert ran.code == 2
    assert "--carry has no meaning with --method extract-lora" in ran.err


def test_the_configuration_of_an_adapter_goes_with_the_adapter_alone(tmp_path: Path) -> None:
    """Beside whole weights, adapter_config.json would make transformers look for an adapter."""
    source = model_directory(tmp_path / "in")
    (source / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, source / "adapter_model.safetensors")
    for number, name in enumerate(("model.safetensors", "adapter_model.safetensors")):
        out = tmp_path / str(number)
        out.mkdir()
        assert ("adapter_config.json" in convert(source / name, out / name).carried) is bool(number)


def test_the_configuration_of_an_adapter_follows_the_names(tmp_path: Path) -> None:
    """Names that no longer find their modules become whole names, and names that still do stay."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "model.layers.0.k"]}
    config |= {"rank_pattern": {"model.layers.0.k": 2, "^model.layers.0.q": 2}, "alpha_pattern": {"q": 8}}
    (source / "adapter_config.json").write_text(json.dumps(config))
    names = [f"base_model.model.model.layers.0.{name}.lora_{side}.weight" for name in "qk" for side in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, source / "adapter_model.safetensors")
    rules = ["base_model.model.model.*=base_model.model.model.language_model.*"]
    plan = plan_remap(source, rules)
    written = execute(plan, source, out / "adapter_model.safetensors", carry=True)
    found = json.loads((out / "adapter_config.json").read_text())
    assert found["target_modules"] == ["q", "model.language_model.layers.0.k"]
    assert found["rank_pattern"] == {"^model.language_model.layers.0.k": 2, "^model.language_model.layers.0.q": 2}
    assert found["alpha_pattern"] == {"q": 8}
    assert [change.statement for change in written.adapted] == ["target_modules", "rank_pattern"]
    (source / "adapter_config.json").write_text(json.dumps(config | {"target_modules": r".*\.(q|k)"}))
    execute(plan_remap(source, rules), source, choose_output(out / "adapter_model.safetensors", force=True), carry=True)
    found = json.loads((out / "adapter_config.json").read_text())
    assert sorted(found["target_modules"]) == [f"model.language_model.layers.0.{name}" for name in "kq"]


def test_the_configuration_of_an_adapter_does_not_go_with_a_live_base(tmp_path: Path) -> None:
    """transformers would look for the weights of an adapter beside the merged ones."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', encoding="utf-8")
    base = {"fc.weight": torch.zeros(2, 2)}
    with pytest.raises(PlanError, match="no input has a configuration or a tokenizer"):
        merge_lora(base, adapter, tmp_path / "none.safetensors", carry=True)
    (adapter / "tokenizer.json").write_text("{}", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    merge_lora(base, adapter, out / "model.safetensors", carry=True)
    assert names_in(out) == ["model.safetensors", "tokenizer.json"]
