"""``load_into`` puts the values into the model, and its report is true."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import ckptkit.loading.copying
from ckptkit import LoadReport, load_into, open_checkpoint, parse_rules
from ckptkit.errors import CkptkitError, LoadError, ModelError, PlanError
from tests.helpers_outputs import raw, same_state, tensor_of


class Net(nn.Module):
    """A model with batch norm in its body, and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        self.head = nn.Linear(8, classes)


class Tied(nn.Module):
    """A model with an embedding and an output layer that share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.wte.weight


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.copy_(torch.randint(-9, 9, tensor.shape))
    return model


def codes(report: LoadReport) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.code, finding.key) for finding in report.findings]


def refusal(act: Callable[[], object], error: type[CkptkitError]) -> CkptkitError:
    with pytest.raises(error) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_values_are_loaded_into_the_same_parameters() -> None:
    """Parameters and buffers get the values and are the same objects as before, as optimizers need."""
    model, donor = Net(), randomised(Net())
    before = model.state_dict(keep_vars=True)
    report = load_into(model, donor)
    assert same_state(model.state_dict(), donor.state_dict())
    assert all(tensor is before[key] for key, tensor in model.state_dict(keep_vars=True).items())
    assert (report.ok, report.findings, report.kept, report.coverage) == (True, (), (), 1.0)
    assert report.loaded == tuple(model.state_dict())
    assert str(report).splitlines()[0] == "loaded 9 of 9 tensors, 100 % of the elements; kept 0 as they were"


def test_a_load_that_lacks_a_little_does_not_say_all() -> None:
    """Rounding never makes 100 % of a load that leaves elements as they were."""
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Linear(1, 1))
    report = load_into(model, {key: value for key, value in model.state_dict().items() if key.startswith("0.")})
    assert str(report).splitlines()[0] == "loaded 2 of 4 tensors, 99.9 % of the elements; kept 2 as they were"


def test_a_new_head_keeps_its_values(tmp_path: Path) -> None:
    """A file with the prefix of DDP is loaded into a model with a new head, and the report names both parts."""
    donor = randomised(Net(classes=10))
    save_file({f"module.{key}": value for key, value in donor.state_dict().items()}, tmp_path / "pre.safetensors")
    model = Net(classes=3)
    head = copy.deepcopy(model.head.state_dict())
    with open_checkpoint(tmp_path / "pre.safetensors") as pretrained:
        report = load_into(model, pretrained, ["module.*=*"], on_mismatch="skip")
    assert same_state(model.body.state_dict(), donor.body.state_dict())  # type: ignore[union-attr]
    assert same_state(model.head.state_dict(), head)
    assert report.kept == ("head.weight", "head.bias")
    assert codes(report) == [
        ("warning", "load.shape", "module.head.weight"),
        ("warning", "load.shape", "module.head.bias"),
    ]
    body = sum(tensor.numel() for tensor in donor.body.state_dict().values())  # type: ignore[union-attr]
    assert report.coverage == body / (body + 27)


def test_missing_and_unexpected_keys_have_their_own_findings() -> None:
    """A kept key is a warning and an additional key of the donor a note; neither is an error."""
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    checkpoint: dict[str, Any] = {"weight": torch.ones(2, 2), "extra": torch.ones(1), "epoch": 3}
    report = load_into(model, checkpoint)
    assert codes(report) == [
        ("warning", "load.missing", "bias"),
        ("note", "load.skipped", "extra"),
        ("note", "load.skipped", "epoch"),
    ]
    assert (report.ok, report.summary) == (True, {"errors": 0, "warnings": 1, "notes": 2})
    assert (report.loaded, report.kept, report.coverage) == (("weight",), ("bias",), 4 / 6)
    assert torch.equal(model.bias, bias)


def test_the_entries_of_a_training_checkpoint_have_one_finding() -> None:
    """What a trainer stores beside the weights is named on one line, with all keys in the finding."""
    checkpoint: dict[str, Any] = {"weight": torch.ones(1, 1), "bias": torch.ones(1), "epoch": 3, "lr": 0.1}
    report = load_into(nn.Linear(1, 1), checkpoint)
    (finding,) = report.findings
    assert (finding.code, finding.keys) == ("load.skipped", ("epoch", "lr"))
    assert finding.message == "2 entries that are not tensors were not loaded: 'epoch', 'lr'"


def test_the_many_tensors_that_were_not_kept_have_one_finding() -> None:
    """The user asked for others, so these are counted, with all keys in the finding; a few are named one by one."""
    body = {f"body.{name}": torch.ones(1, 1) for name in "abcdefghi"}
    weight = {"head.weight": torch.ones(1, 1)}
    rules = parse_rules(keep=["head.*"], rename=["head.*=*"])
    (finding,) = load_into(nn.Linear(1, 1, bias=False), weight | body, rules).findings
    assert (finding.code, finding.keys) == ("load.skipped", tuple(body))
    assert (
        finding.message
        == "9 tensors were not loaded: 'body.a', 'body.b', 'body.c', 'body.d' and 5 more (matches no --keep)"
    )
    few = load_into(nn.Linear(1, 1, bias=False), weight | dict(list(body.items())[1:]), rules)
    assert len(few.findings) == 8


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(("F32", "F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64")), st.integers(0, 9), st.booleans())
def test_every_bit_pattern_is_loaded(code: str, seed: int, strided: bool) -> None:
    """Values are compared as bytes: a NaN equals itself, and -0.0 differs from 0.0."""
    value = tensor_of(code, (3, 5), seed)
    target = torch.zeros(5, 3, dtype=value.dtype).t() if strided else torch.zeros(3, 5, dtype=value.dtype)
    model = nn.Module()
    model.register_buffer("w", target)
    load_into(model, {"w": value})
    assert raw(target) == raw(value)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from((torch.bfloat16, torch.float16, torch.float8_e4m3fn)), st.integers(0, 9), st.booleans())
def test_a_low_precision_model_takes_float32_with_nan(dtype: torch.dtype, seed: int, strided: bool) -> None:
    """Values are cast as torch casts them, for any memory layout, though the bits of a NaN can differ."""
    value = tensor_of("F32", (4, 3, 5, 5), seed)
    value[0] = float("nan")
    layout = torch.channels_last if strided else torch.contiguous_format
    target = torch.zeros(4, 3, 5, 5, dtype=dtype).contiguous(memory_format=layout)
    model = nn.Module()
    model.register_buffer("w", target)
    assert load_into(model, {"w": value}, allow_overflow=True).coverage == 1.0
    if dtype == torch.float8_e4m3fn:  # older versions of torch make NaN of numbers that are too large
        value = value.clamp(-448, 448)
    assert torch.equal(target.float().isnan(), value.to(dtype).float().isnan())
    assert torch.equal(target.float().nan_to_num(), value.to(dtype).float().nan_to_num())


def test_integers_and_booleans_are_cast_as_torch_casts_them() -> None:
    """For example, a counter of another integer dtype is cast."""
    model = nn.BatchNorm1d(2)
    load_into(model, {"num_batches_tracked": torch.tensor(7, dtype=torch.int32)})
    assert model.num_batches_tracked is not None
    assert (model.num_batches_tracked.item(), model.num_batches_tracked.dtype) == (7, torch.int64)


class Versioned(nn.Linear):
    """A module that converts state without a version, as torch's own modules do."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2 and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_module_versions_are_loaded(tmp_path: Path) -> None:
    """Versions of a model and of a file of torch.save reach the module, so it does not convert."""
    donor = nn.Sequential(Versioned(2, 2))
    torch.save(donor.state_dict(), tmp_path / "a.pt")
    model = nn.Sequential(Versioned(2, 2))
    with open_checkpoint(tmp_path / "a.pt") as saved:
        for source in (donor, saved):
            randomised(model, 5)
            load_into(model, source)
            assert same_state(model.state_dict(), donor.state_dict())
    report = load_into(model, dict(donor.state_dict()))
    assert torch.equal(model.state_dict()["0.weight"], donor.state_dict()["0.weight"] * 2)
    assert [(finding.code, finding.key) for finding in report.findings] == [("load.unproved", "0.weight")]


def test_tied_weights_load_from_equal_values() -> None:
    """Both keys with equal values are loaded, and the tie is kept."""
    model, donor = Tied(), randomised(Tied())
    assert load_into(model, donor).coverage == 1.0
    assert model.lm_head.weight is model.wte.weight
    assert same_state(model.state_dict(), donor.state_dict())


def test_a_key_is_loaded_through_its_tie() -> None:
    """A key that is not in the file is loaded through its tie, and a note says so."""
    model, state = Tied(), randomised(Tied()).state_dict()
    del state["lm_head.weight"]
    report = load_into(model, state)
    assert report.coverage == 1.0
    assert report.kept == ()
    assert set(report.loaded) == set(model.state_dict())
    assert codes(report) == [("note", "load.tied", "lm_head.weight")]
    assert torch.equal(model.lm_head.weight, state["wte.weight"])


def test_tied_weights_with_two_values_are_refused() -> None:
    """Two values for one tensor of the model are refused before it is changed."""
    model, state = Tied(), randomised(Tied()).state_dict()
    before = copy.deepcopy(model.state_dict())
    state["lm_head.weight"] = state["wte.weight"] + 1
    error = refusal(lambda: load_into(model, state), ModelError)
    assert error.reason.startswith("'wte.weight' and 'lm_head.weight' are one tensor of the model")
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("task", [24, 100, 8 << 20])
def test_the_size_of_a_piece_does_not_matter(task: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the pieces that are read, nor on the threads that share them; torch counts it."""
    monkeypatch.setattr(ckptkit.loading.copying, "_PIECE", 24)
    monkeypatch.setattr(ckptkit.loading.copying, "_TASK", task)
    donor = randomised(Net())
    torch.save(donor.state_dict(), tmp_path / "donor.pt")
    for source in (donor, tmp_path / "donor.pt"):
        model = Net()
        before = {name: tensor._version for name, tensor in model.named_parameters()}
        assert load_into(model, source).coverage == 1.0
        assert same_state(model.state_dict(), donor.state_dict())
        assert all(tensor._version > before[name] for name, tensor in model.named_parameters())


@pytest.mark.parametrize(
    ("given", "reason", "hint"),
    [
        ({"epoch": 3, "model": {"weight": torch.zeros(2, 2)}}, "its 'model' is a mapping", "checkpoint['model']"),
        ({"model": {"net": {"weight": torch.zeros(2, 2)}}}, "its 'model' is a mapping", "checkpoint['model']"),
        ({"weight": [[1.0]]}, "its 'weight' has the type list", "tensors of torch"),
        ({}, "the checkpoint has no tensor", "tensors of torch"),
    ],
)
def test_a_mapping_without_tensors_says_where_they_may_be(given: Any, reason: str, hint: str) -> None:
    """What ``torch.load`` returns often has the state_dict one level deeper."""
    with pytest.raises((ModelError, PlanError)) as caught:
        load_into(nn.Linear(2, 2), given)
    assert caught.value.reason.endswith(reason)
    assert str(caught.value.hint).endswith(hint)


def test_a_model_on_the_meta_device_is_refused() -> None:
    """torch would warn and load nothing; after to_empty() loading works."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    error = refusal(lambda: load_into(model, nn.Linear(2, 2)), ModelError)
    assert error.reason == "'weight' is on the meta device and cannot hold a value"
    assert error.hint is not None
    assert "to_empty" in error.hint
    assert load_into(model.to_empty(device="cpu"), nn.Linear(2, 2)).coverage == 1.0


def test_a_hook_that_changes_values_is_caught() -> None:
    """The values in the model are compared after load_state_dict returns."""
    model = nn.Linear(2, 2)

    def spoil(module: nn.Module, _: object) -> None:
        assert isinstance(module, nn.Linear)
        module.weight.data[0, 0] += 1

    model.register_load_state_dict_post_hook(spoil)  # type: ignore[no-untyped-call]
    error = refusal(lambda: load_into(model, {"weight": torch.zeros(2, 2)}), LoadError)
    assert "'weight' does not have the checkpoint's value after loading" in error.reason


def test_a_hook_that_replaces_a_parameter_is_caught() -> None:
    """An optimizer would train the old tensor."""
    model = nn.Linear(2, 2)

    def swap(module: nn.Module, _: object) -> None:
        assert isinstance(module, nn.Linear)
        module.weight = nn.Parameter(module.weight.detach().clone())

    model.register_load_state_dict_post_hook(swap)  # type: ignore[no-untyped-call]
    error = refusal(lambda: load_into(model, {"weight": torch.zeros(2, 2)}), ModelError)
    assert "would be replaced while loading" in error.reason


def test_an_expanded_buffer_is_refused() -> None:
    """torch raises too; the values cannot all be at one place."""
    model = nn.Module()
    model.register_buffer("w", torch.zeros(1).expand(3))
    error = refusal(lambda: load_into(model, {"w": torch.arange(3.0)}), ModelError)
    assert error.reason.startswith("'w' is an expanded tensor")


@pytest.mark.parametrize(
    ("state", "policies", "error", "reason"),
    [
        ({"weight": torch.ones(3, 2)}, {}, PlanError, "'weight' is [2, 2] in the model and [3, 2] in the checkpoint"),
        ({"weight": torch.ones(2, 2)}, {"on_missing": "error"}, PlanError, "the checkpoint has no 'bias'"),
        (
            {"weight": torch.ones(2, 2), "x": torch.ones(1)},
            {"on_unexpected": "error"},
            PlanError,
            "the model has no 'x'",
        ),
        ({"weight": torch.ones(2, 2)}, {"on_unexpected": "add"}, ModelError, "a model cannot get keys"),
        (
            {"module.weight": torch.ones(2, 2)},
            {},
            PlanError,
            "the checkpoint has no tensor with a key and shape of the model",
        ),
        ({"weight": torch.ones(2, 2).to_sparse()}, {}, PlanError, "'weight' cannot be copied: it is a sparse tensor"),
        ({"weight": torch.ones(2, 2) * 1j}, {}, PlanError, "'weight' is C64, and a cast to F32 would lose"),
    ],
    ids=["mismatch", "missing", "unexpected", "add", "no match", "sparse", "complex"],
)
def test_a_refused_plan_does_not_change_the_model(
    state: dict[str, torch.Tensor], policies: dict[str, Any], error: type[CkptkitError], reason: str
) -> None:
    """The policies are checked before the first value is copied."""
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    assert refusal(lambda: load_into(model, state, **policies), error).reason.startswith(reason)
    assert same_state(model.state_dict(), before)


def test_a_report_in_a_notebook_is_escaped() -> None:
    """Keys of a file are escaped in HTML."""
    hostile = "<script>alert(1)</script>\x1b[31m"
    html = load_into(nn.Linear(2, 2), {"weight": torch.ones(2, 2), hostile: torch.ones(1)})._repr_html_()
    assert "<p>loaded 1 of 2 tensors, 66.7 % of the elements; kept 1 as they were</p>" in html
    assert '<td>bias</td><td class="right">0 of 1</td><td class="right">2</td><td class="right">0.0 %</td>' in html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html


class Packed(nn.Module):
    """A module in four bits as bitsandbytes makes it: its scales are an attribute, which ``state_dict()`` adds."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8, 1), int(scale), dtype=torch.uint8), requires_grad=False)
        self.absmax = torch.full((4,), scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.absmax"] = self.absmax.clone()
        destination[f"{prefix}weight.quant_map"] = torch.arange(16.0)
        destination[f"{prefix}weight.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)


class PackedWithLoader(Packed):
    """The same module with a method that loads the scales, as bitsandbytes has it for eight bits."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.absmax.copy_(state_dict[f"{prefix}weight.absmax"])


def test_scales_that_no_code_loads_are_refused_before_their_codes_are_loaded() -> None:
    """A tensor that only ``state_dict()`` makes is loaded by a method of its module, or the model stays as it was."""
    model, donor = nn.Sequential(Packed(1)), nn.Sequential(Packed(2)).state_dict()
    error = refusal(lambda: load_into(model, donor), ModelError)
    assert error.reason.startswith("'0.weight.absmax' is neither a parameter nor a buffer of the model")
    assert torch.equal(model.state_dict()["0.weight"], torch.ones(8, 1, dtype=torch.uint8))
    assert load_into(model, nn.Sequential(Packed(1)).state_dict()).coverage == 1
    able = nn.Sequential(PackedWithLoader(1))
    assert load_into(able, donor).coverage == 1
    assert same_state(able.state_dict(), donor)
