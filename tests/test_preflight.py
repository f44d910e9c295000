"""A preflight reports which tensors load, which stay at init, what their values look like, and one verdict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import parse_rules, preflight
from ckptkit.core.checkpoint import Access, Checkpoint, Description
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import GroupsError, RuleError
from ckptkit.readiness import Preflight
from tests.helpers_outputs import same_state

SPEC: dict[str, Any] = {
    "defaults": {"lr": 1e-3},
    "group": [{"name": "head", "params": "head.*", "lr": 1e-2}, {"name": "base", "rest": True}],
}


class Net(nn.Module):
    """A body with batch norm and an embedding, and a head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16))
        self.head = nn.Linear(16, classes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.body(self.tokens(ids))))


def seeded(classes: int = 10, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


def codes(report: Preflight) -> list[tuple[str, str, str]]:
    return [(one.severity, one.code, one.key) for one in report.findings]


def test_a_model_without_faults_is_ready() -> None:
    """Init is loaded, the groups fit, and the optimizer class is known: there is no finding."""
    model, donor = seeded(), seeded(seed=1)
    model.load_state_dict(donor.state_dict())
    report = preflight(model, init=donor, groups=SPEC, optimizer="AdamW")
    assert (report.verdict, report.ok, report.findings) == ("ready", True, ())
    assert report.init is not None
    assert (report.init.in_model, report.init.coverage, report.init.kept) == ("all", 1.0, ())
    assert [(group.name, group.optimizer, group.options["lr"]) for group in report.groups] == [
        ("head", "AdamW", 1e-2),
        ("base", "AdamW", 1e-3),
    ]
    report.raise_for_errors()


def test_questions_without_arguments_are_listed_as_not_judged() -> None:
    """A page that says ready also says what it did not judge."""
    report = preflight(seeded())
    assert report.verdict == "ready"
    assert [text.partition(":")[0] for text in report.not_judged] == [
        "loading",
        "param groups and their options",
        "schedulers and optimizer state",
        "resuming",
        "gradients",
        "memory of activations, and temporary memory of a step",
    ]


def test_the_verdict_has_the_first_error_and_the_number_of_others() -> None:
    """People read one line, and scripts get an exception."""
    model = seeded()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
        model.head.bias[0] = float("inf")
    report = preflight(model)
    assert report.verdict == ("not ready: 'head.weight' has 160 NaN and 0 infinite of 160 numbers (and 1 more error)")
    with pytest.raises(GroupsError, match=r"head\.weight"):
        report.raise_for_errors()
    assert str(report).endswith(report.verdict)


def test_a_preflight_changes_no_argument() -> None:
    """Weights, flags, gradients, random numbers and the spec stay, even where the spec freezes parameters."""
    model, spec = seeded(), {**copy.deepcopy(SPEC), "unmatched": "freeze"}
    spec["group"] = [{"name": "head", "params": "head.*", "lr": 1e-2}]
    model.head.bias.grad = torch.ones(10)
    before, given, donor = copy.deepcopy(model.state_dict()), copy.deepcopy(spec), seeded()
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    report = preflight(model, init=donor, groups=spec, optimizer="SGD", dry_step=lambda m: m(torch.arange(4)).sum())
    assert torch.equal(torch.rand(1), wanted)
    assert same_state(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.head.bias.grad, torch.ones(10))
    assert spec == given
    assert [(row.module, row.trainable) for row in report.training] == [("tokens", 0), ("body", 0), ("head", 2)]


def test_another_head_stays_at_init() -> None:
    """A warning names the module, unless ``fresh`` says that this is intended."""
    model, donor = seeded(classes=3), seeded()
    report = preflight(model, init=donor)
    assert codes(report)[0] == ("warning", "preflight.kept", "head.weight")
    assert report.findings[0].message == "all of 'head' stay at init: it has shape [10, 16] in init"
    assert report.findings[0].hint == "if this is intended, give --fresh 'head.*'"
    assert "  if this is intended, give fresh='head.*'" in str(report).splitlines()
    assert codes(preflight(model, init=donor, fresh="head.*"))[0] == ("note", "preflight.kept", "head.weight")


def test_a_fresh_pattern_must_match_tensors_that_init_does_not_fill() -> None:
    """It is an error where init fills such a tensor, and where the pattern matches nothing."""
    report = preflight(seeded(), init=seeded(), fresh=["head.*"])
    assert ("error", "preflight.not-fresh", "head.weight") in codes(report)
    message = "'head.weight', 'head.bias' must stay at init by fresh='head.*', but init has values for them"
    assert message in str(report)
    dropped = preflight(seeded(), init=seeded(), rules=parse_rules(drop=["head.*"]), fresh=["head.*"])
    assert [code for code in codes(dropped) if code[0] == "error"] == []  # the way out that the hint names
    with pytest.raises(RuleError, match="matches none of"):
        preflight(seeded(), init=seeded(), fresh="heads.*")


def test_a_frozen_tensor_at_init_is_a_warning() -> None:
    """Nothing will ever change the random values of such a layer."""
    model = seeded(classes=3)
    model.head.requires_grad_(False)
    report = preflight(model, init=seeded())
    assert ("warning", "preflight.frozen-at-init", "head.weight") in codes(report)


def test_a_prefix_in_all_names_is_reported_with_the_rule_that_helps() -> None:
    """With the rule of the hint, init loads."""
    donor = {f"module.{key}": value for key, value in seeded().state_dict().items()}
    report = preflight(seeded(), init=donor)
    assert codes(report) == [("error", "preflight.init-nothing", "")]
    assert "'module.*=*'" in report.findings[0].hint
    assert preflight(seeded(), init=donor, rules=["module.*=*"]).ok


@pytest.mark.parametrize(
    ("seeds", "in_model", "found"),
    [((1, 1), "all", []), ((1, 2), "none", [("note", "preflight.not-loaded", "")])],
    ids=["loaded", "not yet"],
)
def test_the_page_says_whether_the_model_has_the_values_of_init(
    seeds: tuple[int, int], in_model: str, found: list[Any]
) -> None:
    """Batch norm is equal in two new models, so it proves nothing."""
    report = preflight(seeded(seed=seeds[0]), init=seeded(seed=seeds[1]))
    assert report.init is not None
    assert report.init.in_model == in_model
    assert codes(report) == found


def test_a_model_that_is_loaded_in_part_is_a_warning() -> None:
    """One tensor was changed after the load."""
    model, donor = seeded(seed=1), seeded(seed=1)
    nn.init.normal_(model.head.weight)
    assert codes(preflight(model, init=donor)) == [("warning", "preflight.partly-loaded", "")]


def test_a_cast_that_loses_bits_is_a_warning() -> None:
    """bfloat16 keeps 8 bits of precision and float32 keeps 24; the opposite cast loses nothing."""
    low, high = seeded().to(torch.bfloat16), seeded()
    assert ("warning", "preflight.init-cast", "tokens.weight") in codes(preflight(low, init=high))
    assert not [code for _, code, _ in codes(preflight(high, init=low)) if code == "preflight.init-cast"]


def test_a_tied_tensor_is_filled_by_its_other_name() -> None:
    """A safetensors file has only one of the names."""
    model = nn.ModuleDict({"wte": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["wte"].weight
    report = preflight(model, init={"wte.weight": torch.ones(6, 4)})
    assert report.init is not None
    assert (report.init.coverage, report.init.kept) == (1.0, ())


def looks(make: Callable[[], nn.Module], change: Callable[[Any], Any] = lambda _: None) -> dict[str, str]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"m": make(), "other": nn.Linear(2, 2)})
    with torch.no_grad():
        change(model["m"])
    report = preflight(model, init={"other.weight": torch.ones(2, 2), "other.bias": torch.ones(2)})
    assert report.init is not None
    return {kept.key.removeprefix("m."): kept.looks for kept in report.init.kept}


DEFAULTS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "linear": (lambda: nn.Linear(64, 32), {"weight": "uniform within ±0.125", "bias": "uniform within ±0.125"}),
    "convolution": (lambda: nn.Conv2d(16, 32, 2), {"weight": "uniform within ±0.125"}),
    "transposed convolution": (lambda: nn.ConvTranspose1d(64, 16, 4), {"weight": "uniform within ±0.125"}),
    "embedding": (lambda: nn.Embedding(100, 8), {"weight": "normal, std 1"}),
    "lstm": (lambda: nn.LSTM(8, 64), {"weight_ih_l0": "uniform within ±0.125"}),
    "batch norm": (lambda: nn.BatchNorm2d(8), {"weight": "all 1", "running_mean": "all 0", "running_var": "all 1"}),
    "layer norm": (lambda: nn.LayerNorm(8), {"weight": "all 1", "bias": "all 0"}),
}


@pytest.mark.parametrize(("make", "expected"), DEFAULTS.values(), ids=DEFAULTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_the_init_of_torch_is_recognised(
    make: Callable[[], nn.Module], expected: dict[str, str], dtype: torch.dtype
) -> None:
    """The expected values are those of new modules of torch, in either precision."""
    found = looks(lambda: make().to(dtype))
    for key, text in expected.items():
        assert found[key] == f"as torch initialises {type(make()).__name__}: {text}"


@pytest.mark.parametrize("seed", range(20))
def test_the_init_of_torch_is_recognised_with_any_seed(seed: int) -> None:
    """The limits are wide enough for random variation."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Embedding(9, 9), "c": nn.Linear(1, 1)})
    report = preflight(model, init={"c.weight": torch.ones(1, 1)})
    assert report.init is not None
    looks_by_key = {kept.key: kept.looks for kept in report.init.kept}
    assert looks_by_key["a.weight"].startswith("as torch initialises Linear")
    assert looks_by_key["b.weight"].startswith("as torch initialises Embedding")


UNLIKE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another init": (lambda m: nn.init.normal_(m.weight, std=0.02), "std 0.019"),
    "scaled": (lambda m: m.weight.mul_(1.2), "unlike torch's own init"),
    "shifted": (lambda m: m.weight.add_(0.02), "unlike torch's own init"),
    "zero": (lambda m: m.weight.zero_(), "all 0"),
    "one number": (lambda m: m.weight.fill_(0.5), "all 0.5"),
}


@pytest.mark.parametrize(("change", "text"), UNLIKE.values(), ids=UNLIKE.keys())
def test_other_values_are_not_called_an_init_of_torch(change: Callable[[Any], Any], text: str) -> None:
    """The page then shows only the numbers."""
    assert text in looks(lambda: nn.Linear(64, 32), change)["weight"]
    assert "as torch" not in looks(lambda: nn.Linear(64, 32), change)["weight"]


def garbage(weight: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F000000, weight.shape, dtype=torch.int32, generator=generator)
    weight.copy_(bits.view(torch.float32))


FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "never written": (garbage, "preflight.garbage"),
    "all zero": (lambda weight: weight.zero_(), "preflight.zero"),
    "all one": (lambda weight: weight.fill_(1), "preflight.constant"),
}


@pytest.mark.parametrize(("change", "code"), FAULTS.values(), ids=FAULTS.keys())
def test_an_improbable_initial_value_is_a_warning(change: Callable[[torch.Tensor], Any], code: str) -> None:
    """This is judged only for tensors that were not loaded, since init may hold zeros on purpose."""
    model = seeded(classes=3)
    with torch.no_grad():
        change(model.head.weight)
    assert ("warning", code, "head.weight") in codes(preflight(model, init=seeded(), fresh="head.*"))
    for report in (preflight(model, init=copy.deepcopy(model)), preflight(model, resume=seeded(classes=3))):
        assert not [found for _, found, _ in codes(report) if found == code]


def test_a_mask_of_minus_infinity_is_a_note() -> None:
    """Attention masks hold minus infinity; a NaN in a buffer is a warning."""
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    assert codes(preflight(model)) == [("note", "preflight.not-finite", "mask")]
    assert isinstance(model.mask, torch.Tensor)
    model.mask[0, 0] = float("nan")
    assert codes(preflight(model)) == [("warning", "preflight.not-finite", "mask")]


def test_a_model_on_the_meta_device_is_judged_by_shapes() -> None:
    """The page says that values were not judged."""
    with torch.device("meta"):
        model = Net(classes=3)
    report = preflight(model, init=seeded(), groups=SPEC, optimizer="AdamW")
    assert "values: the model is on the meta device" in report.not_judged
    assert report.init is not None
    assert report.init.in_model == "unknown"
    assert report.memory is not None
    assert report.memory.parameters == sum(parameter.nbytes for parameter in model.parameters())


def test_init_is_not_read_for_a_model_on_the_meta_device() -> None:
    donor = as_checkpoint(seeded(), "init")

    def payload(info: object) -> Any:
        raise AssertionError(info)

    with torch.device("meta"):
        model = Net()
    unread = Checkpoint(dict(donor), Access(payload), Description("init", "test"))
    assert preflight(model, init=unread).ok


def test_names_are_escaped_in_a_notebook() -> None:
    """The name of a module may hold HTML."""
    model = nn.Module()
    model.register_module("<script>", nn.Linear(2, 2))
    html = preflight(model, groups={"group": [{"name": "<b>", "rest": True, "lr": 1}]})._repr_html_()
    assert html.endswith("<p>ready</p></div>")
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_quantised_init_is_not_ready() -> None:
    """Codes with scales are no values for a plain model: an error names the scheme, and other tensors still count."""
    model = seeded()
    init = seeded(seed=1).state_dict()
    init["head.weight"] = init["head.weight"].to(torch.float8_e4m3fn)
    report = preflight(model, init=init)
    assert report.init is not None
    assert (report.init.loaded, "preflight.init-quantized" in str(report)) == (report.init.tensors, False)
    init["head.weight_scale"] = torch.ones(10, 1)
    report = preflight(model, init=init)
    assert ("error", "preflight.init-quantized", "head.weight") in codes(report)
    assert report.verdict.startswith("not ready: 'head.weight' is quantised (fp8), and the model has it as plain F32")
    assert report.init is not None
    assert report.init.loaded == report.init.tensors - 1
    assert [kept.key for kept in report.init.kept] == ["head.weight"]
    gptq = {key: value for key, value in init.items() if not key.startswith("head.weight")}
    gptq |= {"head.qweight": torch.zeros(2, 10, dtype=torch.int32), "head.scales": torch.ones(1, 10)}
    gptq["head.qzeros"] = torch.zeros(1, 2, dtype=torch.int32)
    assert "'head.qweight' is quantised (GPTQ), and the model has 'head.weight'" in preflight(model, init=gptq).verdict
    assert ("error", "preflight.resume-quantized", "head.weight") in codes(preflight(model, resume=init))


def test_a_quantised_model_takes_its_own_parts() -> None:
    """A model with the same parts is ready, and plain values for it are an error."""
    init = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale": torch.ones(4, 1)}
    model = nn.Module()
    for key, value in init.items():
        model.register_buffer(key, value.clone())
    assert not [finding for finding in preflight(model, init=init).findings if finding.severity == "error"]
    plain = preflight(model, init={"weight": torch.ones(4, 4)})
    assert (
        "'weight' is quantised (fp8) in the model, and 'weight' of the initial checkpoint is plain F32" in plain.verdict
    )
