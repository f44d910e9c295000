"""``diff`` and ``load_into`` do what ``load_state_dict`` does, also where a model loads with code of its own."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptkit
import ckptkit.testing
from ckptkit import diff, load_into
from ckptkit.core.torch_bridge import as_checkpoint
from ckptkit.errors import ModelError, PlanError
from tests.helpers_own_loading import (
    MODULES,
    clear_missing,
    new_weight_norm,
    old_weight_norm,
    rename_old,
    states,
    with_post_hook,
)


def outcome(model: nn.Module, state: Any, *, strict: bool) -> str:
    """Return what torch does with the state_dict: "loads", or the text of its exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.load_state_dict(state, strict=strict)
        except Exception as error:  # noqa: BLE001 - hooks raise anything
            return f"raises {error}"
    return "loads"


@pytest.mark.parametrize("name", MODULES)
def test_diff_says_that_torch_raises_where_it_raises(name: str) -> None:
    """The verdict is that of a load into the model itself, with ``strict=True`` and ``strict=False``."""
    wrong = []
    for variant, state in states(name):
        result = diff(MODULES[name](), state)
        for strict, said in ((True, result.loads_strict), (False, result.loads)):
            torch_says = outcome(MODULES[name](), copy.copy(state), strict=strict)
            if said != (torch_says == "loads"):
                wrong.append((variant, strict, said, torch_says, result.undecided))
    assert wrong == []


def randomised(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in dict.fromkeys((*model.parameters(), *model.buffers())):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return model


def with_values(state: Any) -> Any:
    """Return the state_dict with other values than a new model has, and with its versions."""
    generator = torch.Generator().manual_seed(3)
    new, made = copy.copy(state), dict[int, torch.Tensor]()
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            place = value.data_ptr()  # tied tensors get one value
            made[place] = made.get(place, torch.rand(value.shape, generator=generator).to(value.dtype))
            new[key] = made[place]
    return new


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


REPLACING = {"resizing", "hook above of an absent bias"}  # the other tests have what load_into does with them


@pytest.mark.parametrize("name", [name for name in MODULES if name not in REPLACING])
def test_load_into_loads_what_torch_loads(name: str) -> None:
    """Where torch loads the whole state_dict, the model has the same values afterwards, and the report has all keys."""
    for variant, state in states(name):
        given = with_values(state)
        torchs, ours = (randomised(MODULES[name](), 1) for _ in range(2))
        if outcome(torchs, copy.copy(given), strict=True) != "loads" or not diff(ours, given).matched:
            continue
        before = tensors_of(ours)
        report = load_into(ours, given)
        after, wanted = tensors_of(ours), tensors_of(torchs)
        assert all(after[key] is tensor for key, tensor in before.items()), variant
        assert [key for key in wanted if not torch.equal(after[key], wanted[key])] == [], (variant, report)
        keys = {key for key, value in MODULES[name]().state_dict().items() if isinstance(value, torch.Tensor)}
        assert {*report.loaded, *report.kept} == keys, variant


def test_the_model_does_not_change_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """No tensor, no count of changes, no random number, no attribute, closure or container of the file is touched."""
    seen: list[str] = []
    numbers = {"calls": 0}

    def note(_state: Any, prefix: str, *_: Any) -> None:
        seen.append(prefix)
        numbers["calls"] += 1
        CALLS.append(prefix)
        torch.rand(2)
        print("loading")  # noqa: T201 - hooks print
        warnings.warn("loading", stacklevel=1)

    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.calls = [0]

        def _load_from_state_dict(self, *args: Any) -> None:
            self.calls[0] += 1
            super()._load_from_state_dict(*args)

    model = nn.Sequential(Counting(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    register: Any = model[1]._register_load_state_dict_pre_hook
    register(note)
    before = {name: (id(tensor), tensor._version, tensor.clone()) for name, tensor in tensors_of(model).items()}
    random, attributes = torch.random.get_rng_state(), [dict(module.__dict__) for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = diff(model, {key: torch.ones_like(value) for key, value in model.state_dict().items()})
    assert result.loads_strict
    assert result.has_own_code
    assert (seen, numbers, CALLS) == ([], {"calls": 0}, [])
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, tensor in tensors_of(model).items():
        assert (id(tensor), tensor._version) == before[name][:2]
        assert torch.equal(tensor, before[name][2])
    assert [list(module.__dict__) for module in model.modules()] == [list(names) for names in attributes]
    assert model[0].calls == [0]
    assert capfd.readouterr() == ("", "")


CALLS: list[str] = []  # a hook of the test above adds to it


def test_no_value_is_copied() -> None:
    """A model that is larger than the memory of the machine is tried, because only its structure is copied."""
    model: Any = nn.Sequential(MODULES["renames"](), nn.Linear(8, 8))
    with torch.device("meta"):
        model[0][1] = nn.Linear(1 << 22, 1 << 22)
    register: Any = model[0][1]._register_load_state_dict_pre_hook
    register(rename_old)
    infos = dict(as_checkpoint(model, "model").items())
    infos["0.1.old_weight"] = infos.pop("0.1.weight")
    assert diff(model, infos).moved == {"0.1.weight": "0.1.old_weight"}


class Locked(nn.Module):
    """Cannot be copied: it has a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.lock = threading.Lock()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def reads_a_value(state: Any, prefix: str, *_: Any) -> None:
    if f"{prefix}weight" in state and bool(state[f"{prefix}weight"].sum() > 0):
        state[f"{prefix}weight"] = -state[f"{prefix}weight"]


def with_reading_hook() -> nn.Module:
    model = nn.Linear(2, 2)
    register: Any = model._register_load_state_dict_pre_hook
    register(reads_a_value)
    return model


@pytest.mark.parametrize(("build", "reason"), [(Locked, "a copy on the meta device failed with TypeError"),
                                               (with_reading_hook, "it fails on tensors without values")])  # fmt: skip
def test_where_the_code_cannot_be_tried_names_decide_and_the_report_says_so(build: Any, reason: str) -> None:
    """The verdict is that of the names, and a line has the reason."""
    model = build()
    result = diff(model, {**model.state_dict(), "more": torch.ones(1)})
    assert result.undecided.startswith(reason)
    assert not result.loads_strict
    assert result.loads
    assert "by its names and shapes, the checkpoint fits in part; load_state_dict can decide otherwise" in str(result)
    assert f"names decided: the model's own code for loading was not tried, because {reason}" in str(result)
    assert result.to_dict()["own_code"]["tried"] is False


def stops(*_: Any) -> None:
    raise SystemExit(3)


def test_what_ends_the_program_is_a_refusal() -> None:
    """A hook that calls ``sys.exit`` does not end ``ckpt diff``."""
    model = nn.Linear(2, 2)
    register: Any = model._register_load_state_dict_pre_hook
    register(stops)
    assert diff(model, model.state_dict()).refusals == ("3",)


def test_references_to_the_model_lead_to_the_copy() -> None:
    """A closure, a default, a weak reference and a bound method reach the copy, and not the model."""
    model: Any = nn.Sequential(nn.Linear(2, 2))
    model.seen, weak = [], weakref.ref(model)
    for hook in (
        lambda _state, prefix, *_: model.seen.append(prefix),
        lambda _state, prefix, *_, of=weak: of().seen.append(prefix),
        functools.partial(lambda of, _state, prefix, *_: of.seen.append(prefix), model),
    ):
        model[0]._register_load_state_dict_pre_hook(hook)
    result = diff(model, model.state_dict())
    assert result.loads_strict
    assert not result.undecided
    assert model.seen == []


def test_tensors_may_be_swapped() -> None:
    """The answer does not depend on ``torch.__future__.set_swap_module_params_on_conversion``."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert diff(new_weight_norm(), old_weight_norm().state_dict()).loads_strict
        assert torch.__future__.get_swap_module_params_on_conversion()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_versions_reach_the_code_as_torch_load_gives_them(tmp_path: Path) -> None:
    """A file of ``torch.save`` has the versions of its modules; one of safetensors, or with other names, has none."""
    state = MODULES["upgrading"]().state_dict()
    old = OrderedDict((key.replace(".0.0.", "."), value) for key, value in state.items())
    old._metadata = state._metadata  # type: ignore[attr-defined, unused-ignore]
    torch.save(old, tmp_path / "versions.pt")
    torch.save(dict(old), tmp_path / "plain.pt")
    save_file(dict(old), tmp_path / "plain.safetensors")
    for name, loads in (("versions.pt", False), ("plain.pt", True), ("plain.safetensors", True)):
        given = torch.load(tmp_path / name) if name.endswith(".pt") else dict(old)
        assert (outcome(MODULES["upgrading"](), given, strict=True) == "loads") is loads
        assert diff(MODULES["upgrading"](), tmp_path / name).loads_strict is loads
    torch.save({f"module.{key}": value for key, value in old.items()}, tmp_path / "ddp.pt")
    assert diff(MODULES["upgrading"](), tmp_path / "ddp.pt", ["module.*=*"]).loads_strict


def test_merge_takes_what_the_code_renames_and_names_what_it_computes(tmp_path: Path) -> None:
    """The output has the new names. A tensor that only the code makes stays as the base has it."""
    torch.save(old_weight_norm().state_dict(), tmp_path / "old.pt")
    plan = ckptkit.plan_merge(new_weight_norm(), tmp_path / "old.pt")
    steps = {step.out.key: (step.sources[0].role, step.sources[0].key, step.rule) for step in plan.steps}
    assert steps["0.parametrizations.weight.original0"] == ("donor", "0.weight_g", "the model's own code")
    parts = {"0.weight": torch.ones(3, 3), "1.part1": torch.ones(2, 3), "1.part2": torch.ones(1, 3)}
    plan = ckptkit.plan_merge(MODULES["joins"](), parts)
    reasons = {drop.key: drop.reason for drop in plan.dropped}
    assert reasons["1.part1"].startswith("the model's own code makes '1.weight' of it while it loads")
    assert next(step for step in plan.steps if step.out.key == "1.weight").sources[0].role == "base"


def test_preflight_and_assert_loads_ask_the_model_too() -> None:
    """All readers of the comparison have one answer."""
    state, model = old_weight_norm().state_dict(), new_weight_norm()
    ckptkit.testing.assert_loads(model, state)
    ckptkit.testing.assert_loads(MODULES["joins"](), joined())
    section = ckptkit.preflight(model, init=state).init
    assert section is not None
    assert section.loaded == section.tensors
    section = ckptkit.preflight(MODULES["joins"](), init=joined()).init
    assert section is not None
    assert section.loaded == section.tensors


def joined() -> dict[str, torch.Tensor]:
    state = MODULES["joins"]().state_dict()
    weight = state.pop("1.weight")
    return {**state, "1.part1": weight[:2], "1.part2": weight[2:]}


def test_assign_gives_what_the_code_renames() -> None:
    """``load_into(..., assign=True)`` loads renamed tensors, as torch does."""
    state, model = with_values(old_weight_norm().state_dict()), new_weight_norm()
    report = load_into(model, state, assign=True)
    assert report.coverage == 1
    assert torch.equal(model.state_dict()["0.parametrizations.weight.original0"], state["0.weight_g"])


def test_the_page_says_what_the_code_did() -> None:
    """Renamed and computed tensors have a row each, and a refusal is quoted."""
    page = str(diff(new_weight_norm(), old_weight_norm().state_dict()))
    assert "F32 [8, 1, 1]  as 0.weight_g, by the model's own code" in page
    assert page.endswith("load_state_dict accepts the checkpoint")
    assert "made of '1.part1', '1.part2', by the model's own code" in str(diff(MODULES["joins"](), joined()))
    layers = nn.Sequential(*(new_weight_norm() for _ in range(3)))
    old = nn.Sequential(*(old_weight_norm() for _ in range(3))).state_dict()
    assert "  as {0..2}.0.weight_g, by the model's own code" in str(diff(layers, old))
    refused = diff(MODULES["refuses"](), {"1.old_weight": torch.ones(3, 3)})
    assert "\nload_state_dict raises, even with strict=False: this checkpoint is too old\n" in str(refused)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))


def test_lazy_modules_get_the_shapes_of_the_checkpoint() -> None:
    """As ``load_state_dict`` makes them: ``diff`` takes any shape, and ``load_into`` keeps the same objects."""
    state = with_values(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).state_dict())
    for given in (state, {**state, "0.weight": torch.ones(4, 7)}):
        torchs, ours = lazy(), lazy()
        torchs.load_state_dict(given)
        assert diff(ours, given).loads_strict
        assert diff(ours, given).coverage == 1
        before = tensors_of(ours)
        assert load_into(ours, given).kept == ()
        assert all(tensors_of(ours)[key] is tensor for key, tensor in before.items())
        assert all(torch.equal(value, torchs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert load_into(lazy(), state, assign=True).coverage == 1
    del state["0.bias"]
    assert not diff(lazy(), state).loads_strict
    report = load_into(lazy(), state)
    assert [finding.message for finding in report.findings] == [
        "'0.bias' is not in the checkpoint and stays uninitialised"
    ]


def test_a_buffer_may_be_replaced_by_the_code_and_a_parameter_may_not() -> None:
    """An optimizer holds parameters. A buffer has what torch makes it, also in another shape."""
    for table in (torch.ones(2, 3), torch.ones(5, 3)):
        torchs, ours = MODULES["resizing"](), MODULES["resizing"]()
        given = {**with_values(ours.state_dict()), "1.table": table}
        torchs.load_state_dict(given)
        assert diff(ours, given).loads_strict
        assert load_into(ours, given).coverage == 1
        assert all(torch.equal(value, torchs.state_dict()[key]) for key, value in ours.state_dict().items())

    class New(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            self.weight = nn.Parameter(torch.zeros(2, 2))
            super()._load_from_state_dict(*args)

    with pytest.raises(ModelError, match="'weight' would be replaced while loading"):
        load_into(New(2, 2), New(2, 2).state_dict())

    class Table(nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("table", table)

        def _load_from_state_dict(self, *args: Any) -> None:
            self.table = torch.zeros(2)
            super()._load_from_state_dict(*args)

    first = Table(torch.ones(2))
    tables = nn.ModuleList([first, Table(first.table), nn.Linear(2, 2)])
    for model, given, reason in (
        (
            tables,
            {"0.table": torch.ones(2), "1.table": torch.ones(2)},
            "would not share memory with '1.table' any more",
        ),
        (
            nn.Sequential(Table(torch.ones(2)), nn.Linear(2, 2)),
            {"1.bias": torch.ones(2)},
            "the checkpoint does not have it",
        ),
    ):
        before = {name: (id(tensor), tensor._version) for name, tensor in tensors_of(model).items()}
        with pytest.raises(ModelError, match=f"'0.table' would be replaced while loading, and {reason}"):
            load_into(model, given)
        assert {name: (id(tensor), tensor._version) for name, tensor in tensors_of(model).items()} == before


class Slots(nn.Module):
    """Has an attribute that is not in its ``__dict__``."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.seen = [0]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.seen.append(1)
        super()._load_from_state_dict(*args)


def test_attributes_in_slots_are_copied() -> None:
    """``copy.deepcopy`` of torch's modules loses them."""
    model = Slots()
    assert diff(model, model.state_dict()).loads_strict
    assert model.seen == [0]


def test_a_tensor_that_state_dict_leaves_out_is_not_dropped_in_silence() -> None:
    """torch loads it, and load_into, which goes by the keys of the state_dict, says that it does not."""
    model = MODULES["saves less"]()
    given = {key: torch.ones_like(value) for key, value in tensors_of(model).items()}
    assert outcome(MODULES["saves less"](), dict(given), strict=True) == "loads"
    assert diff(model, given).loads_strict
    assert [info.key for info in diff(model, given).unexpected] == ["frozen.weight", "frozen.bias"]
    messages = [finding.message for finding in load_into(model, given).findings]
    assert (
        "'frozen.weight' was not loaded: state_dict() of the model leaves it out, or the model's own code removes it"
        in messages
    )


def test_a_value_that_is_repeated_along_a_dim_is_computed() -> None:
    """torch copies one number into a whole tensor, and ``diff`` has no error of the shape."""

    def fill(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        with torch.no_grad():
            module.bias.copy_(state[f"{prefix}bias"])  # type: ignore[operator]
            state[f"{prefix}bias"] = module.bias.detach()  # type: ignore[operator]

    def build() -> nn.Module:
        model = nn.Linear(2, 3)
        register: Any = model._register_load_state_dict_pre_hook
        register(fill, with_module=True)
        return model

    given = {"weight": torch.ones(3, 2), "bias": torch.ones(1)}
    result = diff(build(), given)
    assert (result.computed, result.loads) == (
        {"bias": ("bias",)},
        outcome(build(), dict(given), strict=False) == "loads",
    )


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_claimed_where_names_decided(tmp_path: Path) -> None:
    """A module of packed weights cannot be tried: no output says that torch raises, and nothing is loaded in part."""
    model, lost = quantized(), "0._packed_params._packed_params"
    state = model.state_dict()
    assert diff(model, state).loads_strict
    assert not diff(model, {key: value for key, value in state.items() if key != lost}).loads_strict
    torch.save({"model": {"0.scale": state["0.scale"]}}, tmp_path / "run.pt")
    result = diff(model, tmp_path / "run.pt")
    assert f"{lost}.0" in {info.key for info in result.missing}
    assert "load_state_dict raises" not in str(result)
    report = ckptkit.preflight(model, resume=tmp_path / "run.pt", init=dict(state))
    assert "refuses" not in str(report)
    assert {"preflight.undecided", "preflight.resume-weights"} <= {finding.code for finding in report.findings}
    assert all(finding.severity != "error" for finding in report.findings if finding.code == "preflight.resume-weights")
    found = ckptkit.run_checks(tmp_path / "run.pt", like=model).findings
    assert [finding.severity for finding in found if finding.code == "own-code"] == ["warning", "note"]
    for assign in (False, True):
        with pytest.raises(PlanError, match="cannot be copied: it is quantised"):
            load_into(quantized(), state, assign=assign)


def test_load_into_refuses_what_the_code_refuses() -> None:
    """Also where the refused tensors have no place in the model; the hint leaves them out."""
    model = nn.Sequential(nn.InstanceNorm1d(2, affine=True))
    state = {**model.state_dict(), "0.running_mean": torch.zeros(2), "0.running_var": torch.ones(2)}
    assert outcome(model, dict(state), strict=False).startswith("raises")
    with pytest.raises(ModelError, match="load_state_dict failed: Unexpected running stats") as caught:
        load_into(model, state)
    rules = ckptkit.parse_rules(drop=["0.running_mean", "0.running_var"])
    assert "parse_rules(drop=['0.running_mean', '0.running_var'])" in str(caught.value)
    assert load_into(model, state, rules).coverage == 1
    section = ckptkit.preflight(model, init=state)
    assert "preflight.refused" in {finding.code for finding in section.findings}


def test_check_follows_the_code(tmp_path: Path) -> None:
    """A missing key that torch does not report is no finding, and a refusal is an error."""
    model = with_post_hook(clear_missing)
    torch.save({"0.weight": torch.ones(3, 3)}, tmp_path / "part.pt")
    assert "missing" not in {finding.code for finding in ckptkit.run_checks(tmp_path / "part.pt", like=model).findings}
    torch.save({"1.old_weight": torch.ones(3, 3)}, tmp_path / "old.pt")
    found = ckptkit.run_checks(tmp_path / "old.pt", like=MODULES["refuses"]()).findings
    assert ("own-code", "error") in {(finding.code, finding.severity) for finding in found}
