"""Wrapped, converted and parametrized models have no findings if the groups still train them, else the cause."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrizations, prune

from ckptkit.core.findings import Finding
from ckptkit.param_groups.build import build_param_groups
from ckptkit.param_groups.validate import validate_param_groups
from tests.features import DTensor, fully_shard, require

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),  # torch's
]


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group with one process, through a file: it needs no port."""
    path: Path = tmp_path_factory.mktemp("gloo") / "store"
    before = dict(os.environ)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class Encoder(nn.Module):
    """A small transformer with tied weights: embedding, block, norm and head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 8, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.norm(self.block(self.wte(x))))
        return out


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(self.rnn(self.bn(self.conv(x)).flatten(2).transpose(1, 2))[0])
        return out


class LowRank(nn.Module):
    """A frozen layer with a low-rank update, written by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T
        return out


def adapt(model: Any) -> Any:
    model.requires_grad_(False)
    model.bn.eval()  # a frozen norm in train mode has a finding
    model.fc = LowRank(model.fc)
    return model


def on(part: str, change: Callable[..., Any], *given: Any) -> Callable[[nn.Module], nn.Module]:
    """Return a function that changes one module of a model and returns the model."""

    def do(model: nn.Module) -> nn.Module:
        change(model.get_submodule(part), *given)
        return model

    return do


def checkpointed(model: Any) -> nn.Module:
    model.block = checkpoint_wrapper(model.block)
    return checkpoint_wrapper(model)


def sharded(model: nn.Module) -> nn.Module:
    require(fsdp, "fully_shard")
    for module in (model.get_submodule("norm"), model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return model


def flattened(model: nn.Module, *, orig: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=orig, device_id=torch.device("cpu"))


def twice(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


KEEPS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "nothing": (Encoder, lambda model: model),
    "ddp": (Encoder, nn.parallel.DistributedDataParallel),
    "data-parallel": (Encoder, nn.DataParallel),
    "ddp-in-ddp": (Convolution, lambda model: nn.DataParallel(nn.parallel.DistributedDataParallel(model))),
    "sync-batch-norm": (Convolution, nn.SyncBatchNorm.convert_sync_batchnorm),
    "fsdp1-orig": (Encoder, lambda model: flattened(model, orig=True)),
    "checkpoint": (Encoder, checkpointed),
    "half": (Encoder, lambda model: model.half()),
    "double": (Convolution, lambda model: model.double()),
    "bfloat16": (Encoder, lambda model: model.to(torch.bfloat16)),
    "channels-last": (Convolution, lambda model: model.to(memory_format=torch.channels_last)),
    "to-empty": (Encoder, lambda model: model.to_empty(device="cpu")),
    "shared-memory": (Encoder, lambda model: model.share_memory()),
    "hooks": (Convolution, on("fc", lambda module: module.register_forward_hook(lambda *_: None))),
    "fx": (Convolution, torch.fx.symbolic_trace),
}
RENAMES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "prune": (Convolution, on("fc", prune.l1_unstructured, "weight", 0.5)),
    "spectral-norm": (Convolution, on("fc", parametrizations.spectral_norm)),
    "orthogonal": (Convolution, on("fc", parametrizations.orthogonal)),
}
REPLACES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "weight-norm": (Convolution, on("conv", parametrizations.weight_norm)),
    "weight-norm-of-lstm": (Convolution, on("rnn", parametrizations.weight_norm, "weight_hh_l0")),
    "old-weight-norm": (Convolution, on("fc", nn.utils.weight_norm)),
    "lora": (Convolution, adapt),
    "fsdp2": (Encoder, sharded),
    "fsdp1-flat": (Encoder, lambda model: flattened(model, orig=False)),
    "deepcopy": (Encoder, copy.deepcopy),
    "average": (Encoder, twice),
    "assign": (Convolution, on("", lambda model: model.load_state_dict(Convolution().state_dict(), assign=True))),
}


def sgd(groups: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=0.1)


def split(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with names and two groups of one lr, as most recipes make them."""
    pairs = [pair for pair in model.named_parameters() if pair[1].requires_grad]
    decay, plain = ([pair for pair in pairs if (pair[1].ndim > 1) is more] for more in (True, False))
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01)


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "names": split,
    "no-names": lambda model: sgd([parameter for parameter in model.parameters() if parameter.requires_grad]),
    "spec": lambda model: sgd(build_param_groups(model, [{"params": "*.bias", "optional": True}, {"rest": True}])),
}


DO_NOT_RUN = {"to-empty", "half", "sync-batch-norm", "fsdp1-flat"}  # without values, or not on a CPU


def findings(model: nn.Module, groups: Any) -> tuple[Finding, ...]:
    return validate_param_groups(model, groups).findings


def a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one real training step."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        require(torch.cpu.Stream, "record_event")  # without it, a module of fully_shard does not run on a CPU
    kind = next(parameter.dtype for parameter in model.parameters())
    inside = next((module for module in model.modules() if isinstance(module, Encoder | Convolution)), None)
    x = torch.tensor([[1, 2]]) if isinstance(inside, Encoder) else torch.randn(2, 3, 4, 4, dtype=kind)
    model(x).float().square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [*KEEPS, *RENAMES, *REPLACES])
def test_an_optimizer_built_after_the_change_has_no_findings(change: str, form: str) -> None:
    """An optimizer that was built after any change has no findings, before and after a step."""
    make, apply = {**KEEPS, **RENAMES, **REPLACES}[change]
    model = apply(make())
    optimizer = FORMS[form](model)
    assert findings(model, optimizer) == ()
    if form == "names" and change not in DO_NOT_RUN:
        a_step(model, optimizer)
        assert findings(model, optimizer) == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", KEEPS)
def test_an_optimizer_built_before_has_no_findings_if_objects_are_kept(change: str, form: str) -> None:
    """An optimizer that was built before a wrapper has no findings if the objects are kept."""
    make, apply = KEEPS[change]
    model = make()
    optimizer = FORMS[form](model)
    assert findings(apply(model), optimizer) == ()


@pytest.mark.parametrize("change", RENAMES)
def test_an_optimizer_built_before_a_rename_is_a_warning(change: str) -> None:
    make, apply = RENAMES[change]
    model = make()
    optimizer = split(model)
    (finding,) = findings(apply(model), optimizer)
    assert (finding.code, finding.severity) == ("groups.names", "warning")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", REPLACES)
def test_an_optimizer_built_before_a_replacement_is_an_error(change: str, form: str) -> None:
    """Every trainable parameter that is in no group after the change is named."""
    make, apply = REPLACES[change]
    model = make()
    optimizer = FORMS[form](model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    model = apply(model)
    lost = [name for name, live in model.named_parameters() if live.requires_grad and id(live) not in held]
    found = findings(model, optimizer)
    assert lost
    assert [finding.key for finding in found if finding.code == "groups.missing"] == lost
    assert not any(finding.code == "groups.foreign" for finding in found)


def test_a_tie_does_not_survive_load_state_dict_with_assign() -> None:
    """load_state_dict(assign=True) unties weights: two parameters share one memory, which is a warning."""
    model = Encoder()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert model.wte.weight is not model.lm_head.weight
    (finding,) = findings(model, split(model))
    assert (finding.code, finding.key) == ("groups.shared-memory", "lm_head.weight")
    model.lm_head.weight = model.wte.weight  # the way out of the hint
    assert findings(model, split(model)) == ()


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_an_optimizer_built_before_fully_shard(named: bool) -> None:
    """Every parameter is stale after fully_shard(), and no step moves the model."""
    model = Encoder()
    optimizer = sgd(model.named_parameters() if named else model.parameters())
    sharded(model)
    stale = [finding for finding in findings(model, optimizer) if finding.code == "groups.stale"]
    assert len(stale) == len(list(model.parameters()))
    assert all(
        "fully_shard() replaced it by a DTensor after the groups were built" in finding.message for finding in stale
    )
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]  # type: ignore[attr-defined]
    a_step(model, optimizer)
    after = [parameter.full_tensor() for parameter in model.parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("named", [True, False], ids=["names-recorded", "no-names"])
def test_an_optimizer_built_before_flattening(named: bool) -> None:
    """Each old parameter names the flat parameter of FullyShardedDataParallel that it is part of now."""
    model = Convolution()
    count = len(list(model.parameters()))
    optimizer = sgd(model.named_parameters() if named else model.parameters())
    flat = flattened(model, orig=False)
    stale = [finding for finding in findings(flat, optimizer) if finding.code == "groups.stale"]
    assert len(stale) == count
    assert stale[0].key == "_fsdp_wrapped_module._flat_param"
    assert (
        "is now part of '_fsdp_wrapped_module._flat_param': FullyShardedDataParallel flattened it" in stale[0].message
    )
    assert "use_orig_params=True" in stale[0].hint


def test_groups_that_were_split_after_the_parameters_were_flattened() -> None:
    """The group of a head that is part of a flat parameter is empty, which is a note."""
    flat = flattened(Convolution(), orig=False)
    head = list(flat.get_submodule("_fsdp_wrapped_module.fc").parameters())
    base = [parameter for parameter in flat.parameters() if not any(parameter is one for one in head)]
    found = findings(flat, sgd([{"params": head, "lr": 1.0, "name": "head"}, {"params": base}]))
    assert [(finding.code, finding.severity) for finding in found] == [("groups.empty", "note")]
    assert "group 0 ('head') is empty" in found[0].message


def test_placeholders_of_zero_3_are_one_finding() -> None:
    """Flat shards of ZeRO-3 in the groups give one finding; the test makes them as DeepSpeed does."""
    model = nn.Linear(4, 3)
    optimizer = sgd(model.named_parameters())
    shards = [parameter.detach().clone().flatten().requires_grad_() for parameter in model.parameters()]
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert findings(model, optimizer) == ()
    optimizer.param_groups[0]["params"] = shards
    (finding,) = findings(model, optimizer)
    assert (finding.code, finding.key) == ("groups.sharded", "weight")
    assert "such as 'weight' (3, 4), are placeholders of ZeRO-3 (ds_id)" in finding.message
    assert "before deepspeed.initialize()" in finding.hint


def test_a_lazy_model_has_no_findings_after_its_first_forward_pass() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    before = sgd(model.parameters())
    assert {finding.code for finding in findings(model, before)} == {"groups.lazy"}
    model(torch.randn(2, 3, 4, 4))
    assert findings(model, before) == ()
    assert findings(model, split(model)) == ()
