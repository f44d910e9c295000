"""``--strip`` removes the marks of the wrappers in the table, reports each, and never guesses."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from ckptkit import diff, execute, load_into, open_checkpoint, plan_remap
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.parse import parse_rules
from ckptkit.wrappers.explain import explain_wrappers
from ckptkit.wrappers.table import PREFIXES, SEGMENTS, WRAPPERS
from tests.features import fully_shard, require
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2), nn.ReLU()))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class StandIn(nn.Module):
    """A stand-in for a wrapper that cannot run here: it holds its module under the name that the real one uses."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def compiled(module: nn.Module) -> nn.Module:
    made = torch.compile(module, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def inside(wrap: Callable[[nn.Module], nn.Module], at: str) -> nn.Module:
    net = plain()
    parent, _, name = at.rpartition(".")
    setattr(net.get_submodule(parent), name, wrap(net.get_submodule(at)))
    return net


def parameters(net: nn.Module) -> State:
    return {**dict(net.named_buffers()), **{name: value.detach() for name, value in net.named_parameters()}}


def full(state: dict[str, Any]) -> State:
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def sharded(module: nn.Module) -> nn.Module:
    require(fsdp, "fully_shard")
    fully_shard(module)
    return module


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


DDP, AVERAGED = "'module.' (DataParallel, DistributedDataParallel)", "'module.' (AveragedModel of torch (SWA, EMA))"
WRAPPED: dict[str, tuple[Callable[[], State], list[str]]] = {
    # id: (the state_dict of a wrapped model, pieces of the notes on what is removed)
    "DataParallel": (lambda: nn.DataParallel(plain()).state_dict(), [f"{DDP} from 9 keys"]),
    "DDP": (lambda: ddp(plain()).state_dict(), [f"{DDP} from 9 keys"]),
    "DataParallel twice": (lambda: nn.DataParallel(nn.DataParallel(plain())).state_dict(), [DDP, DDP]),
    "compile": (lambda: compiled(plain()).state_dict(), ["'._orig_mod.' (torch.compile) from 9 keys"]),
    "compile of DDP": (lambda: compiled(ddp(plain())).state_dict(), ["'._orig_mod.' (torch.compile)", DDP]),
    "DDP of compile": (lambda: ddp(compiled(plain())).state_dict(), [DDP, "'._orig_mod.'"]),
    "compile of a part": (lambda: inside(compiled, "2").state_dict(), ["'._orig_mod.' (torch.compile) from 2 keys"]),
    "compile of a part of a part": (
        lambda: compiled(inside(compiled, "2.0")).state_dict(), ["'._orig_mod.' (torch.compile) from 9", "from 2 keys"],
    ),
    "checkpoint_wrapper": (lambda: checkpoint_wrapper(plain()).state_dict(), []),
    "checkpoint_wrapper by parameters": (
        lambda: parameters(inside(checkpoint_wrapper, "2")), ["'._checkpoint_wrapped_module.' (checkpoint_wrapper"],
    ),
    "fully_shard": (lambda: full(sharded(plain()).state_dict()), []),
    "FSDP1": (
        lambda: StandIn("_fsdp_wrapped_module", inside(lambda m: StandIn("_fsdp_wrapped_module", m), "2")).state_dict(),
        ["'._fsdp_wrapped_module.' (FullyShardedDataParallel) from 9 keys", "from 2 keys"],
    ),
    "fairscale": (
        lambda: StandIn("_fsdp_wrapped_module", StandIn("_fpw_module", plain())).state_dict(), ["d", "'._fpw"],
    ),
    "AveragedModel": (
        lambda: AveragedModel(plain()).state_dict(), [f"{AVERAGED} from 9 keys, without 'n_averaged'"],
    ),
    "AveragedModel of DDP": (lambda: AveragedModel(nn.DataParallel(plain())).state_dict(), [AVERAGED, DDP]),
    "Lightning before 2.1": (lambda: StandIn("_forward_module", plain()).state_dict(), ["'_forward_module.' (strat"]),
    "Opacus": (lambda: StandIn("_module", plain()).state_dict(), ["'_module.' (GradSampleModule of Opacus)"]),
    "ema-pytorch": (
        lambda: {**StandIn("ema_model", plain()).state_dict(), "initted": torch.ones(1), "step": torch.ones(1)},
        ["'ema_model.' (EMA of ema-pytorch, the average) from 9 keys, without 'initted', 'step'"],
    ),
    "mmengine": (
        lambda: {"steps": torch.tensor(3), **StandIn("module", plain()).state_dict()},
        ["'module.' (averaged model of mmengine) from 9 keys, without 'steps'"],
    ),
    "PEFT without its factors": (
        lambda: StandIn("base_model", StandIn("model", inside(lambda m: StandIn("base_layer", m), "2.0"))).state_dict(),
        ["'base_model.model.' (PeftModel) from 9 keys", "'.base_layer.' (an adapted layer of a PeftModel) from 2"],
    ),
    "PEFT with a fully trained module": (
        lambda: StandIn(
            "base_model", StandIn("model", inside(lambda m: StandIn("modules_to_save", StandIn("default", m)), "0"))
        ).state_dict(),
        ["'base_model.model.' (PeftModel)", "'.modules_to_save.default.'"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("make", "notes"), WRAPPED.values(), ids=WRAPPED.keys())
def test_strip_auto_gives_the_keys_of_the_plain_model(
    make: Callable[[], State], notes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output loads strictly with equal values, stderr names what was removed, and the plan can be inverted."""
    state = make()
    torch.save(state, tmp_path / "wrapped.pt")
    command = ("remap", tmp_path / "wrapped.pt", "--strip", "auto", "--plan", tmp_path / "plan.json")
    ran = run_ckpt(capsys, *command, "-o", tmp_path / "o.safetensors")
    assert (ran.code, ran.out) == (0, ""), ran.err
    lines = [line for line in ran.err.splitlines() if line.startswith("--strip auto: ")]
    assert len(lines) == max(len(notes), 1), lines
    for line, piece in zip(lines, notes or ["none of 9 keys has the mark of a known wrapper"], strict=True):
        assert piece in line
    model = plain()
    for value in (*model.parameters(), *model.buffers()):
        value.data.fill_(7)
    model.load_state_dict(load_file(tmp_path / "o.safetensors"))
    original = plain().state_dict()
    assert all(torch.equal(value, original[key]) for key, value in model.state_dict().items())
    back = run_ckpt(
        capsys,
        "remap",
        tmp_path / "o.safetensors",
        "--invert",
        tmp_path / "plan.json",
        "-o",
        tmp_path / "b.safetensors",
    )
    if "without" in ran.err:  # a dropped counter cannot come back
        assert back.code == 2
        assert "was dropped (drop " in back.err
        return
    assert back.code == 0, back.err
    again = load_file(tmp_path / "b.safetensors")
    assert {key: value.tolist() for key, value in again.items()} == {key: v.tolist() for key, v in state.items()}


def test_every_wrapper_of_the_table_is_tested() -> None:
    """Each row of the table has a model above that it applies to."""
    origins = {row.origin for row in WRAPPERS}
    seen = " ".join(piece for _, notes in WRAPPED.values() for piece in notes)
    unseen = {origin for origin in origins if origin not in seen}
    assert unseen == {
        "FullyShardedDataParallel of fairscale", "strategies of Lightning before 2.1",  # cut short above
        "checkpoint_wrapper, by named_parameters()", "EMA of ema-pytorch, the trained model",
        "the original of a module of a PeftModel", "a fully trained module of a PeftModel",
    }  # fmt: skip
    assert len(set(PREFIXES)) == len(PREFIXES)
    assert set(SEGMENTS) < {row.mark for row in WRAPPERS}


def stripped(keys: list[str], *strip: str, **options: Any) -> dict[str, str]:
    return dict(apply_rules(parse_rules(strip=strip, **options), keys).renamed)


MIXED: dict[str, tuple[list[str], str, str]] = {
    # id: (keys, a piece of the reason, a piece of the hint)
    "DDP and plain": (
        ["module.a.w", "b.w", "module.c"],
        "'module.' (DataParallel, DistributedDataParallel) is on 2 of 3 keys: on 'module.a.w', but not on 'b.w'",
        "--keep 'module.*' keeps only the keys with the prefix; --rename 'module.*=*' in place of --strip renames ",
    ),
    "a counter that is not alone": (["module.a", "n_averaged", "b"], "is on 1 of 3 keys: on 'module.a'", "--keep"),
    "a compiled part and another": (
        ["a._orig_mod.w", "a.b", "c.w"],
        "'a._orig_mod.' (torch.compile) is on only some keys: on 'a._orig_mod.w', but not on 'a.b'",
        "--rename 'a._orig_mod.*=a.*' in place of --strip",
    ),
    "compiled at the top and not": (["_orig_mod.a", "b"], "'_orig_mod.' (torch.compile) is on only some keys", "--ren"),
    "two models of ema-pytorch": (
        ["ema_model.w", "online_model.w", "initted", "step"],
        "ema-pytorch, the average) is on 1 of 4 keys: on 'ema_model.w', but not on 'online_model.w'",
        "--keep 'ema_model.*'",
    ),
    "FSDP1 flat": (
        ["_fsdp_wrapped_module._flat_param", "_fsdp_wrapped_module.0._fsdp_wrapped_module._flat_param"],
        "is on 2 keys that renaming cannot undo, such as '_fsdp_wrapped_module._flat_param'",
        "FULL_STATE_DICT",
    ),
    "PEFT": (
        ["base_model.model.a.base_layer.weight", "base_model.model.a.lora_A.default.weight"],
        "'base_model.model.' (PeftModel) is on 1 key that renaming cannot undo",
        "folds a saved adapter; or drop the keys with --drop '*.lora_*'",
    ),
    "endless": (["_orig_mod." * 40 + "w"], "is wrapped more than 32 times", ""),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "reason", "hint"), MIXED.values(), ids=MIXED.keys())
def test_mixed_keys_and_keys_that_renaming_cannot_undo_are_refused(keys: list[str], reason: str, hint: str) -> None:
    """The error counts the keys, names one of each kind and says what to do."""
    with pytest.raises(RuleError) as caught:
        stripped(keys, "auto")
    assert reason in caught.value.reason
    assert hint in (caught.value.hint or "")


HINTS: dict[str, tuple[list[str], dict[str, Any], dict[str, str]]] = {
    "keep": (["module.a", "b"], {"keep": ["module.*"]}, {"module.a": "a"}),
    "drop": (["module.a", "b"], {"drop": ["b"]}, {"module.a": "a"}),
    "the average": (
        ["ema_model.w", "online_model.w", "initted"], {"keep": ["ema_model.*"]}, {"ema_model.w": "w"},
    ),
    "the trained model": (
        ["ema_model.w", "online_model.w", "initted"], {"keep": ["online_model.*"]}, {"online_model.w": "w"},
    ),
    "PEFT without factors": (
        ["base_model.model.a.base_layer.w", "base_model.model.a.lora_A.x.weight"], {"drop": ["*.lora_*"]},
        {"base_model.model.a.base_layer.w": "a.w"},
    ),
    "PEFT, the original module": (
        ["base_model.model.a.original_module.w", "base_model.model.a.modules_to_save.default.w"],
        {"drop": ["*.modules_to_save.*"]}, {"base_model.model.a.original_module.w": "a.w"},
    ),
    "renaming comes after": (["module.h.0", "module.h.1"], {"rename": ["h.{i:int}=l.{i+1}"]},
                             {"module.h.0": "l.1", "module.h.1": "l.2"}),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "options", "renamed"), HINTS.values(), ids=HINTS.keys())
def test_the_hints_work(keys: list[str], options: dict[str, Any], renamed: dict[str, str]) -> None:
    """Filters run before --strip and see the keys of the file; renames run after it."""
    assert stripped(keys, "auto", **options) == renamed


UNCHANGED = {
    "a part called base_layer, as in DLA": ["base_layer.0.weight", "level0.0.weight"],
    "a leaf": ["a._orig_mod", "b.module"],
    "model in front of all": ["model.embed", "model.layers.0.w"],
    "module further inside": ["a.module.w", "a.x"],
    "no key": [],
}


@pytest.mark.parametrize("keys", UNCHANGED.values(), ids=UNCHANGED.keys())
def test_keys_that_may_be_the_models_own_are_not_changed(keys: list[str]) -> None:
    assert stripped(keys, "auto") == {key: key for key in keys}


def test_a_shared_prefix_gets_a_note_with_the_option_that_removes_it() -> None:
    notes = apply_rules(parse_rules(strip=["auto"]), ["model.a", "model.b"]).notes
    assert "every key begins with 'model.'" in notes[1]
    assert "--strip 'model.' removes it" in notes[1]


def test_the_attribute_of_a_lightning_module_is_removed_once(tmp_path: Path) -> None:
    """The attribute can have any name, where Lightning wrote the file and all keys begin with it."""
    state = StandIn("net", StandIn("encoder", plain())).state_dict()
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5.0", "epoch": 1}, tmp_path / "l.ckpt")
    with open_checkpoint(tmp_path / "l.ckpt") as checkpoint:
        made = apply_rules(parse_rules(strip=["auto"]), checkpoint)
    assert dict(made.renamed) == {key: key.removeprefix("net.") for key in state}
    assert made.notes == ("--strip auto: 'net.' (the attribute of a LightningModule) from 9 keys",)


GIVEN: dict[str, tuple[list[str], list[str], dict[str, str] | str]] = {
    # id: (keys, prefixes, the new keys or a piece of the reason)
    "any prefix": (["net.a", "net.b.c"], ["net."], {"net.a": "a", "net.b.c": "b.c"}),
    "two": (["x.net.a"], ["x.", "net."], {"x.net.a": "a"}),
    "auto and one": (["module.net.a"], ["auto", "net."], {"module.net.a": "a"}),
    "a counter is dropped": (["module.a", "n_averaged"], ["module."], {"module.a": "a"}),
    "no dot at its end": (["lora_unet_a", "lora_unet_b"], ["lora_unet_"], {"lora_unet_a": "a", "lora_unet_b": "b"}),
    "special characters": (["a{*}=.w"], ["a{*}=."], {"a{*}=.w": "w"}),
    "not on all": (["net.a", "b"], ["net."], "'net.' is on 1 of 2 keys: on 'net.a', but not on 'b'"),
    "on none": (["a", "b"], ["net."], "--strip 'net.' begins none of 2 keys"),
    "a dot is left": (["net.a"], ["net"], "--strip 'net' would leave a dot at the start of 'net.a'"),
    "a name is left empty": (["net."], ["net."], "leaves 'net.' without a name"),
    "empty": (["a"], [""], 'strip must be "auto", a prefix, or a list of prefixes'),
}


@pytest.mark.parametrize(("keys", "strip", "result"), GIVEN.values(), ids=GIVEN.keys())
def test_a_given_prefix_must_be_on_every_key(keys: list[str], strip: list[str], result: dict[str, str] | str) -> None:
    if isinstance(result, dict):
        assert stripped(keys, *strip) == result
        return
    with pytest.raises(RuleError) as caught:
        stripped(keys, *strip)
    assert result in caught.value.reason


def test_two_keys_with_one_new_name_are_an_error() -> None:
    """A rule of the user renames a stripped key to the name of another key."""
    with pytest.raises(RuleError, match=r"'module\.a' and 'module\.b' would both be called 'b'"):
        stripped(["module.a", "module.b"], "auto", rename=["a=b"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "operation", "origin"),
    [
        pytest.param(parametrizations.weight_norm, "fold_weight_norm", "utils.parametrizations", id="weight norm"),
        pytest.param(nn.utils.weight_norm, "fold_weight_norm", "torch.nn.utils.weight_norm", id="old weight norm"),
        pytest.param(parametrizations.spectral_norm, "fold_spectral_norm", "utils.parametrizations", id="spectral"),
        pytest.param(nn.utils.spectral_norm, "fold_spectral_norm", "torch.nn.utils.spectral_norm", id="old spectral"),
        pytest.param(
            lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),  # type: ignore[no-untyped-call]
            "fold_mask",
            "prune",
            id="pruning",
        ),
        pytest.param(parametrizations.orthogonal, "", "code outside the file computes the values", id="orthogonal"),
    ],
)
def test_a_parametrization_gets_a_note_with_the_rule_that_folds_it(
    wrap: Callable[[nn.Module], Any], operation: str, origin: str, tmp_path: Path
) -> None:
    """The printed rule gives the weight that the module computes in evaluation mode."""
    layers = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.DataParallel(nn.Sequential(*layers))
    for layer in layers:
        wrap(layer)
    with torch.no_grad():
        model(torch.ones(1, 4))
        model.eval()(torch.ones(1, 4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    notes = apply_rules(parse_rules(strip=["auto"]), state).notes
    assert origin in notes[1]
    if not operation:
        return
    assert "and 1 more come from" in notes[1]
    rule = notes[1].partition("this rule can: ")[2].replace(", to =", "\nto =").replace(", op =", "\nop =")
    plan = plan_remap(state, parse_rules(file=tomllib.loads(f'strip = "auto"\n[[rule]]\n{rule}')))
    assert {step.operation for step in plan.steps if step.out.key.endswith("weight")} == {operation}
    execute(plan, state, tmp_path / "o.safetensors")
    made = load_file(tmp_path / "o.safetensors")
    assert set(made) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for number, layer in enumerate(layers):
        assert torch.equal(made[f"{number}.weight"], layer.weight.detach())


def test_the_average_of_latent_diffusion_is_recognised() -> None:
    keys = ["model.diffusion_model.input_blocks.0.0.weight", "model_ema.diffusion_modelinput_blocks00weight"]
    made = apply_rules(parse_rules(strip=["auto"]), [*keys, "model_ema.decay", "first_stage_model.w"])
    assert dict(made.renamed)[keys[1]] == keys[1]
    assert "averages of 'model.*', with names without dots" in made.notes[1]


def test_diff_merge_and_load_into_strip_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each donor of a merge is stripped of its own wrapper."""
    state = plain().state_dict()
    save_file(state, tmp_path / "base.safetensors")
    save_file(nn.DataParallel(plain()).state_dict(), tmp_path / "ddp.safetensors")
    save_file({f"_orig_mod.{key}": value + 1 for key, value in state.items()}, tmp_path / "c.safetensors")
    ran = run_ckpt(capsys, "diff", tmp_path / "base.safetensors", tmp_path / "ddp.safetensors", "--strip", "auto")
    assert ran.code == 0
    assert ran.err == f"--strip auto: {DDP} from 9 keys\n"
    quiet = run_ckpt(
        capsys,
        "diff",
        tmp_path / "base.safetensors",
        tmp_path / "ddp.safetensors",
        "--strip",
        "module.",
        "-q",
        "--json",
    )
    assert (quiet.code, quiet.err, json.loads(quiet.out)["summary"]["matched"]) == (0, "", 9)
    ran = run_ckpt(
        capsys, "merge", *(tmp_path / f"{name}.safetensors" for name in ("base", "ddp", "c")), "--strip", "auto",
        "-o", tmp_path / "o.safetensors", "--dry-run",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.err.splitlines()[1:] == [
        f"donor1: --strip auto: {DDP} from 9 keys", "donor2: --strip auto: '._orig_mod.' (torch.compile) from 9 keys",
    ]  # fmt: skip
    assert "rule '_orig_mod.*=*' (--strip auto)" in ran.out
    model = plain()
    load_into(model, {f"module.{key}": value + 2 for key, value in state.items()}, parse_rules(strip=["auto"]))
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"] + 2)


@pytest.mark.parametrize(
    ("found", "rename"),
    [
        (lambda key: f"module.{key}", "module.*=*"),
        (lambda key: f"online_model.{key}", "online_model.*=*"),
        (lambda key: key.replace("2.", "2._orig_mod."), "*._orig_mod.*=*.*"),
    ],
    ids=["prefix", "another prefix of the table", "segment"],
)
def test_hints_of_diff_use_the_table(found: Callable[[str], str], rename: str) -> None:
    state = plain().state_dict()
    result = diff(state, {found(key): value for key, value in state.items()})
    assert [hint.rename for hint in result.hints] == [rename]


def test_a_key_of_many_segments_is_handled() -> None:
    """Searching a key of 500,000 segments for marks ends quickly."""
    assert explain_wrappers(["a." * 500_000 + "w", "b"]).wrappings == ()
    assert explain_wrappers(["x._orig_mod." + "a." * 500_000 + "w"]).wrappings[0].keys == 1
