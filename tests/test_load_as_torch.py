"""``load_into`` does to a model what torch's own ``load_state_dict`` does, in place and with ``assign=True``."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations

from ckptkit import LoadError, load_into, open_checkpoint, plan_remap
from ckptkit.comparison.own_code import modules_with_own_code
from ckptkit.errors import ModelError, PlanError
from tests.helpers_outputs import raw, same_state


def add_hook(module: Any, hook: Callable[..., object]) -> None:
    """Call ``hook(module, state, prefix, ...)`` before a module is loaded."""
    module._register_load_state_dict_pre_hook(hook, with_module=True)


class Counted(nn.Linear):
    """A module whose loader counts its calls in a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("loads", torch.zeros(()), persistent=False)
        self.loads: torch.Tensor

    def _load_from_state_dict(self, *given: Any) -> None:
        super()._load_from_state_dict(*given)
        self.loads.add_(1)


class Merging(nn.Module):
    """A module whose hook makes one tensor of two, so it must see both at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(600, 600)), nn.Parameter(torch.zeros(600, 600))
        self.register_buffer("total", torch.zeros(600, 600), persistent=False)
        add_hook(self, self.add)

    def add(self, module: Any, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        module.total.copy_(state[f"{prefix}a"] + state[f"{prefix}b"])


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def channels_last() -> nn.Module:
    model = nn.Conv2d(3, 4, 3)
    model.weight.data = model.weight.data.contiguous(memory_format=torch.channels_last)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "instance norm": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 2)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(3, 2)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(3, 2)),
    "channels last": channels_last,
    "double": lambda: nn.Linear(3, 2).double(),
    "scripted": scripted,
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)),
    "a loader": lambda: nn.Sequential(Counted(), nn.Linear(2, 2)),
    "a hook on two keys": lambda: nn.ModuleDict({"m": Merging(), "n": nn.Linear(2, 2)}),
}  # fmt: skip


class Pair(nn.Module):
    """Two layers without bias, each called by a letter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all tensors of a model, also the buffers that are not persistent."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {key: torch.rand_like(value) if value.is_floating_point() else value + 3
            for key, value in model.state_dict().items()}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(weight_norm|torch.jit).*")
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_model_is_as_after_load_state_dict(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Parameters, buffers and what the modules compute while loading are the same."""
    model, theirs = seeded(build), seeded(build)
    versioned = model.state_dict()
    versioned.update(filled(model))
    torch.save(versioned, tmp_path / "model.pt")
    before = everything(model)
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    report = load_into(model, tmp_path / "model.pt")
    assert report.coverage == 1.0
    assert not [finding for finding in report.findings if finding.severity != "note"]
    assert same_state(everything(model), everything(theirs))
    assert all(tensor is before[name] for name, tensor in everything(model).items() if "parametr" not in name)


@pytest.mark.parametrize(
    "build", [MODELS["batch norm"], MODELS["lstm"], MODELS["a loader"]], ids=["norm", "lstm", "code"]
)
def test_assign_gives_the_tensors_that_torch_gives(build: Callable[[], nn.Module]) -> None:
    """The dtypes are those of the checkpoint, and requires_grad is that of the model."""
    model, theirs = build(), build()
    for one in (model, theirs):
        next(one.parameters()).requires_grad_(False)
    state = {key: value.double() if value.is_floating_point() else value for key, value in filled(model).items()}
    theirs.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    old = everything(model)
    assert load_into(model, state, assign=True).coverage == 1.0
    assert same_state(everything(model), everything(theirs))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert all(tensor is not old[name] for name, tensor in model.named_parameters())
    assert next(iter(state.values())).data_ptr() != next(iter(model.state_dict().values())).data_ptr()


def test_assign_fills_a_model_on_the_meta_device_and_says_what_is_left() -> None:
    """A tensor that no checkpoint has stays on the meta device, and a warning names it."""
    with torch.device("meta"):
        model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
        model["body"].register_buffer("rope", torch.ones(2), persistent=False)
    state = {"body.weight": torch.rand(3, 3), "body.bias": torch.rand(3), "head.weight": torch.rand(2, 3)}
    with pytest.raises(ModelError, match="pass assign=True"):
        load_into(model, state)
    report = load_into(model, state, assign=True)
    assert same_state({key: dict(model.named_parameters())[key] for key in state}, state)
    found = [(one.severity, one.code, one.key) for one in report.findings]
    assert found == [("warning", "load.meta", "head.bias"), ("warning", "load.meta", "body.rope")]


def test_assign_keeps_ties() -> None:
    """Both names have one new parameter, also where the checkpoint has one of the keys only."""
    for keys in (["a.weight"], ["a.weight", "b.weight"]):
        model = Pair()
        model.b.weight = model.a.weight
        load_into(model, dict.fromkeys(keys, torch.ones(2, 2)), assign=True)
        assert model.a.weight is model.b.weight
        assert torch.equal(model.a.weight, torch.ones(2, 2))


def test_assign_warns_about_an_optimizer_that_holds_the_old_parameters() -> None:
    """The optimizer would train parameters that the model no longer has."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    report = load_into(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True)
    (found,) = report.findings
    assert (found.severity, found.code) == ("warning", "load.replaced")
    assert "(AdamW) holds 2 parameters" in found.message
    del optimizer, other


def test_assign_refuses_integers_for_a_parameter_that_is_trained() -> None:
    """torch cannot give them a gradient."""
    model = nn.Linear(2, 2)
    weight = model.weight
    with pytest.raises(ModelError, match="requires a gradient"):
        load_into(model, {"weight": torch.ones(2, 2, dtype=torch.int32)}, assign=True)
    assert model.weight is weight


def test_autograd_sees_that_the_parameters_changed() -> None:
    """A backward pass through values of before the load raises, as after load_state_dict."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    loss = model(torch.ones(1, 2)).sum()
    load_into(model, filled(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_values_that_are_moved_within_the_model_arrive() -> None:
    """Two parameters can be exchanged, although each is overwritten while it is loaded."""
    model = Pair()
    a, b = (layer.weight.detach().clone() for layer in (model.a, model.b))
    load_into(model, {"a.weight": model.b.weight, "b.weight": model.a.weight})
    assert (raw(model.a.weight), raw(model.b.weight)) == (raw(b), raw(a))
    load_into(model, model.state_dict())
    assert (raw(model.a.weight), raw(model.b.weight)) == (raw(b), raw(a))


def test_views_that_overlap_must_agree() -> None:
    """Where one value overwrites a part of another, the comparison after the last copy finds it."""
    memory = torch.zeros(6)
    model = nn.Module()
    model.register_buffer("a", memory[:4])
    model.register_buffer("b", memory[2:])
    whole = torch.arange(6.0)
    load_into(model, {"a": whole[:4].clone(), "b": whole[2:].clone()})
    assert raw(memory) == raw(whole)
    with pytest.raises(LoadError, match="'a' does not have the checkpoint's value"):
        load_into(model, {"a": torch.ones(4), "b": torch.zeros(4)})


def test_a_buffer_whose_elements_overlap_is_compared_at_the_end() -> None:
    """Its first rows are written again with the later ones."""
    model = nn.Module()
    model.register_buffer("w", torch.zeros(5).as_strided((4, 2), (1, 1)))
    windows = torch.arange(5.0).unfold(0, 2, 1)
    load_into(model, {"w": windows.contiguous()})
    assert torch.equal(dict(model.named_buffers())["w"], windows)
    with pytest.raises(LoadError, match="does not have the checkpoint's value"):
        load_into(model, {"w": torch.arange(8.0).view(4, 2)})


def test_memory_that_was_freed_is_refused() -> None:
    """Writing there would end the process."""
    model = nn.Linear(2, 2)
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(ModelError, match=r"'weight' (cannot hold a value|has no values): its memory was freed"):
        load_into(model, {"weight": torch.ones(2, 2)})


def test_a_counter_of_old_torch_is_a_scalar() -> None:
    """Versions before 0.4 saved scalars with the shape (1,)."""
    model = nn.BatchNorm1d(2)
    load_into(model, {"num_batches_tracked": torch.tensor([7])})
    assert model.num_batches_tracked is not None
    assert model.num_batches_tracked.item() == 7


REFUSED_BY_CODE: dict[str, tuple[Callable[[Any], object], str]] = {
    "raises": (lambda *_: (_ for _ in ()).throw(ValueError("not this one")), "load_state_dict failed: not this one"),
    "changes a shape": (lambda _, state, *__: state.update(weight=state["weight"][:1]), "size mismatch for weight"),
}


@pytest.mark.parametrize(("hook", "reason"), REFUSED_BY_CODE.values(), ids=REFUSED_BY_CODE)
def test_a_hook_that_fails_is_found_before_anything_changes(hook: Callable[..., object], reason: str) -> None:
    """The hook runs on a copy on the meta device first."""
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    add_hook(model, lambda *given: hook(*given) and None)
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        load_into(model, {"weight": torch.ones(2, 2)})
    assert not isinstance(caught.value, LoadError)
    assert same_state(model.state_dict(), before)


def test_a_hook_that_needs_values_runs_on_the_model() -> None:
    """It cannot run on the meta device, which is not a reason to refuse the load."""
    model, seen = nn.Linear(2, 2), list[float]()
    add_hook(model, lambda *given: seen.append(given[1]["weight"].sum().item()))
    load_into(model, {"weight": torch.ones(2, 2)})
    assert seen == [4.0]


def test_a_hook_that_holds_the_model_runs_once() -> None:
    """On a copy it would change the model itself."""
    model, calls = nn.Linear(2, 2), list[bool]()
    model.register_load_state_dict_post_hook(lambda *_: calls.append(model.weight.is_meta))  # type: ignore[no-untyped-call]
    load_into(model, {"weight": torch.ones(2, 2)})
    assert calls == [False]


IN_NOTEBOOK, CALLS = nn.Linear(2, 2), list[bool]()


def note_device(*_: object) -> None:
    CALLS.append(IN_NOTEBOOK.weight.is_meta)


def test_a_hook_that_uses_a_model_of_its_file_runs_once() -> None:
    """As a function in a notebook does, which finds the model among the global names."""
    CALLS.clear()
    IN_NOTEBOOK.register_load_state_dict_post_hook(note_device)  # type: ignore[no-untyped-call]
    load_into(IN_NOTEBOOK, {"weight": torch.ones(2, 2)})
    assert CALLS == [False]


def test_the_modules_with_own_code_are_the_topmost() -> None:
    """BatchNorm's method is not one, since it only adds a counter that files of old torch lack."""
    model = nn.ModuleDict(
        {"a": nn.Sequential(Counted(), nn.BatchNorm1d(2)), "b": nn.Sequential(nn.Sequential(Merging()))}
    )
    assert modules_with_own_code(model) == ("a.0", "b.0.0")
    model["b"].register_load_state_dict_post_hook(lambda *_: None)  # type: ignore[no-untyped-call]
    assert modules_with_own_code(model) == ("a.0", "b")


def test_a_kept_tensor_that_changes_by_a_hook_is_found_without_a_copy() -> None:
    """Its digest differs; the error names what was loaded."""
    model = Pair()

    def double(module: Any, _: object) -> None:
        module.b.weight.data.mul_(2)

    model.register_load_state_dict_post_hook(double)  # type: ignore[no-untyped-call]
    with pytest.raises(
        LoadError, match=r"'b.weight' was not loaded, but it changed; 1 of 1 tensor replaced \('a.weight'\)"
    ):
        load_into(model, {"a.weight": torch.ones(2, 2)})


@contextmanager
def peak_of_process() -> Iterator[list[int]]:
    """Give a list that has the largest growth of the process's memory in the block afterwards, in bytes."""

    def status(name: str) -> int:
        return 1024 * int(re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[0])

    peak: list[int] = []
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = status("VmRSS")
    yield peak
    peak.append(status("VmHWM") - before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_no_copy_of_the_model_is_made(name: str, tmp_path: Path) -> None:
    """Loading takes less than 64 MB above the model."""
    model = nn.ModuleList(nn.Linear(4096, 1024) for _ in range(6))
    save = save_file if name.endswith("safetensors") else torch.save
    save(model.state_dict(), tmp_path / name)
    with open_checkpoint(tmp_path / name) as checkpoint, peak_of_process() as peak:
        assert load_into(model, checkpoint).coverage == 1.0
    assert peak[0] < 64 << 20
    del checkpoint


def test_a_cast_that_overflows_is_refused_for_assign_only_where_a_rule_casts() -> None:
    """Without a cast there is nothing that can overflow."""
    model, large = nn.Linear(2, 2).half(), {"weight": torch.full((2, 2), 1e6)}
    with pytest.raises(PlanError, match="4 values do not fit"):
        load_into(model, large)
    load_into(model, large, assign=True)
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("where", ["a", "b"])
def test_hooks_see_all_keys_that_are_loaded(where: str) -> None:
    """A hook of one module gets the keys and values of the others too, and none of them counts as missing."""
    theirs, ours, seen = Pair(), Pair(), list[object]()
    state = {key: torch.rand_like(value) for key, value in theirs.state_dict().items()}
    for model in (theirs, ours):
        module = getattr(model, where)
        add_hook(module, lambda *given: seen.append({key: raw(value) for key, value in given[-7].items()}))
        module.register_load_state_dict_post_hook(lambda _, keys: seen.append(list(keys.missing_keys)))
    theirs.load_state_dict(state)
    expected, seen[:] = list(seen), []
    load_into(ours, state)
    assert seen[-2:] == expected
    assert same_state(ours.state_dict(), theirs.state_dict())


def test_tensors_of_one_numpy_array_are_one_tensor() -> None:
    """torch has two storages for them, and one memory: two values are refused, and one changes both."""
    array = torch.zeros(4).numpy()
    model = nn.Module()
    for name in "ab":
        model.register_buffer(name, torch.from_numpy(array))
    with pytest.raises(ModelError, match="'a' and 'b' are one tensor of the model"):
        load_into(model, {"a": torch.ones(4), "b": torch.zeros(4)})
    report = load_into(model, {"a": torch.ones(4)})
    assert [(one.code, one.key) for one in report.findings] == [("load.tied", "b")]


def test_two_values_for_tied_parameters_are_refused_before_they_are_assigned() -> None:
    model = Pair()
    model.b.weight = model.a.weight
    before = model.a.weight
    with pytest.raises(ModelError, match="the checkpoint has two values for it") as caught:
        load_into(model, {"a.weight": torch.ones(2, 2), "b.weight": torch.zeros(2, 2)}, assign=True)
    assert not isinstance(caught.value, LoadError)
    assert model.a.weight is before


def test_a_hook_that_casts_what_is_saved_does_not_cast_what_is_loaded() -> None:
    """The values get the precision of the parameters, as in torch."""

    def halve(_: object, state: dict[str, torch.Tensor], *__: object) -> None:
        state.update({key: value.half() for key, value in state.items()})

    theirs, ours = nn.Linear(2, 2), nn.Linear(2, 2)
    state = {"weight": torch.rand(2, 2), "bias": torch.rand(2)}
    for model in (theirs, ours):
        model._register_state_dict_hook(halve)  # type: ignore[no-untyped-call]
    theirs.load_state_dict(state)
    assert load_into(ours, state).coverage == 1.0
    assert same_state(everything(ours), everything(theirs))


@pytest.mark.parametrize("options", [{}, {"rollback": True}, {"assign": True}, {"allow_overflow": True}], ids=str)
def test_the_default_device_does_not_matter(options: dict[str, Any], tmp_path: Path) -> None:
    """Notebooks often make another device the default; the meta device stands for one here."""
    torch.save(nn.BatchNorm1d(3).state_dict(), tmp_path / "norm.pt")
    model = nn.BatchNorm1d(3).half()
    model.weight.data.zero_()
    add_hook(model, lambda *_: None)
    with torch.device("meta"):
        load_into(model, tmp_path / "norm.pt", **options)
        plan = plan_remap(tmp_path / "norm.pt", dtype="F16")
        written = plan.materialize(tmp_path / "norm.pt")
    assert raw(model.weight) == raw(torch.ones(3, dtype=model.weight.dtype))
    assert raw(written["weight"]) == raw(torch.ones(3).half())
