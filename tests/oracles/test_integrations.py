"""The callbacks in real training loops: one or two steps of a tiny model in transformers and in Lightning."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptkit import assert_param_groups, rebind, validate_param_groups
from ckptkit.errors import ArgumentError, GroupsError

# Warnings of Lightning: about a class of torch that it uses, and about data loaders with few workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '[a-z_]*dataloader' does not have many workers"),
]
TWICE = "optimizer contains a parameter group with duplicate parameters"  # a warning of torch, which continues

Step = dict[str, torch.Tensor]


class Rows(Dataset[Step]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Step:
        return {"x": torch.tensor([1.0, -2.0, float(index)]), "labels": torch.tensor([1.0, 0.0])}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Step:
        return {"loss": ((self.head(self.norm(self.body(x))) - labels) ** 2).sum()}


class Bare(nn.Module):
    """A model without biases and norms: the group without weight decay that the Trainer makes stays empty."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Step:
        return {"loss": ((self.head(x) - labels) ** 2).sum()}


def values(model: nn.Module) -> Step:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: nn.Module, before: Step) -> set[str]:
    """Return which parameters the training changed."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


FAULTS: dict[str, tuple[Callable[[Net], torch.optim.Optimizer], str]] = {
    "the head replaced after the optimizer was built": (lambda net: replace_head(net, sgd(net)), "'head.weight'"),
    "a parameter left out": (
        lambda net: torch.optim.AdamW([*net.body.parameters(), *net.head.parameters()]),
        "'norm.weight'",
    ),
    "a parameter twice in a group": (lambda net: sgd(net, net.head.bias), "'head.bias' .* is in the groups 2 times"),
}


def sgd(net: nn.Module, *more: nn.Parameter) -> torch.optim.SGD:
    return torch.optim.SGD([*net.parameters(), *more], lr=0.1)


def replace_head(net: Net, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    net.head = nn.Linear(4, 2)
    return optimizer


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs the real ``Trainer.train()`` with the callback, on the CPU and offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import Trainer, TrainingArguments

    from ckptkit.integrations.transformers import ParamGroupsCallback

    def run(model: nn.Module, optimizer: Any = None, callbacks: Any = (), epochs: int = 1, **choices: Any) -> Any:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=epochs,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Rows(),
            optimizers=(optimizer, None),
            callbacks=[*callbacks, ParamGroupsCallback(**choices)],
        )
        return trainer.train()

    return run


@pytest.mark.parametrize("make", [Net, Bare])
def test_the_trainers_own_optimizer_passes_and_trains(train: Callable[..., Any], make: Callable[[], nn.Module]) -> None:
    """The optimizer is wrapped by accelerate and one of its two groups may be empty. Every parameter is updated."""
    model = make()
    before = values(model)
    assert train(model, strict=True).global_step == 2
    assert moved(model, before) == names(model)


@pytest.mark.filterwarnings(f"ignore:{TWICE}")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_trainer_stops_before_its_first_step(train: Callable[..., Any], fault: str) -> None:
    """The error names the parameter, and no parameter was updated."""
    build, name = FAULTS[fault]
    net = Net()
    optimizer = build(net)
    before = values(net)
    with pytest.raises(GroupsError, match=name):
        train(net, optimizer)
    assert moved(net, before) == set()


def test_on_fault_warn_lets_the_trainer_continue(train: Callable[..., Any]) -> None:
    """The fault is real: the new head is not trained."""
    net = Net()
    optimizer = replace_head(net, sgd(net))
    before = values(net)
    with pytest.warns(UserWarning, match="'head.weight'"):
        train(net, optimizer, on_fault="warn")
    assert moved(net, before) == {name for name in before if not name.startswith("head")}


def test_strict_stops_the_trainer_at_a_warning(train: Callable[..., Any]) -> None:
    net = Net()
    optimizer = sgd(net)
    net.body.requires_grad_(requires_grad=False)
    with pytest.raises(GroupsError, match=r"'body\.weight' \(4, 3\) in group 0\[0\] is frozen"):
        train(net, optimizer, strict=True)
    with pytest.warns(UserWarning, match="'body.weight' .* in group 0"):
        assert train(net, optimizer).global_step == 2


def test_a_parameter_that_is_unfrozen_during_training_needs_a_group(train: Callable[..., Any]) -> None:
    """The first epoch trains the head. At the start of the second epoch, the body is in no group."""
    from transformers import TrainerCallback

    class Unfreeze(TrainerCallback):
        def on_epoch_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            model.requires_grad_()

    net = Net()
    net.body.requires_grad_(requires_grad=False)
    before = values(net)
    with pytest.raises(GroupsError, match=r"'body\.weight' .* is trainable but in no group"):
        train(net, callbacks=[Unfreeze()], epochs=2)
    assert moved(net, before) == {name for name in before if not name.startswith("body")}


def test_different_step_counts_do_not_stop_a_running_training(train: Callable[..., Any]) -> None:
    """A module that gets a gradient in some steps only has a lower step count, which ``strict`` accepts too."""

    class Sometimes(Net):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Step:
            self.seen = getattr(self, "seen", 0) + 1
            body = self.body(x) if self.seen % 2 else self.body(x).detach()
            return {"loss": ((self.head(self.norm(body)) - labels) ** 2).sum()}

    net = Sometimes()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    assert train(net, optimizer, epochs=2, strict=True).global_step == 4
    report = validate_param_groups(net, optimizer)
    assert "groups.state-steps" in {finding.code for finding in report.findings}


def test_accelerate_wraps_model_optimizer_and_scheduler() -> None:
    """Validation and rebind work on the wrapped model, optimizer and scheduler."""
    from accelerate import Accelerator

    net = Net()
    inner = torch.optim.SGD([{"params": net.named_parameters(), "leaning_rate": 0.1}], lr=0.1)
    prepared = Accelerator(cpu=True).prepare(net, inner, torch.optim.lr_scheduler.StepLR(inner, 2))
    model, optimizer, scheduler = prepared
    assert optimizer is not inner
    (finding,) = validate_param_groups(model, optimizer, schedulers=scheduler).findings
    assert (finding.code, finding.message) == ("groups.option-unread", "group 0: 'leaning_rate' is not read by SGD")
    replace_head(net, inner)
    with pytest.raises(GroupsError, match=r"'head\.weight'"):
        assert_param_groups(model, [optimizer], schedulers=[scheduler])
    rebind(optimizer, model)
    net.more = nn.Linear(1, 1)
    rebind(optimizer, model, schedulers=scheduler, add_missing={"lr": 0.2})
    assert_param_groups(model, optimizer, schedulers=scheduler)
    assert len(inner.param_groups) == len(scheduler.scheduler.base_lrs) == 2


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_embeddings_of_transformers(*, tied: bool) -> None:
    """The embedding keeps its object with a new shape, an untied head is replaced: a step fails before ``rebind``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, **sizes))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]))["loss"].backward()
        optimizer.step()

    step(model, optimizer)
    model.resize_token_embeddings(11, mean_resizing=False)
    with pytest.raises(RuntimeError, match="size of tensor"):
        step(*copy.deepcopy((model, optimizer)))  # on a copy, because the failed step is half done
    rows = optimizer.state[model.transformer.wte.weight]["exp_avg"].clone()
    report = rebind(optimizer, model, on_shape="pad")
    grown = ["transformer.wte.weight"] if tied else ["transformer.wte.weight", "lm_head.weight"]
    converted = {finding.key for finding in report.findings if finding.code == "rebind.state-converted"}
    assert converted == set(grown)
    assert torch.equal(optimizer.state[model.transformer.wte.weight]["exp_avg"][:8], rows)
    assert validate_param_groups(model, optimizer).findings == ()
    before = values(model)
    step(model, optimizer)
    assert moved(model, before) == names(model)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs the real ``Trainer.fit()`` with the callback."""
    import lightning.pytorch as pl

    from ckptkit.integrations.lightning import ParamGroupsCallback

    class Task(pl.LightningModule):
        def __init__(self, net: nn.Module, configure: Callable[[Any], Any]) -> None:
            super().__init__()
            self.net = net
            self.configure = configure
            self.automatic_optimization = not isinstance(configure(net), tuple)

        def training_step(self, batch: Step) -> torch.Tensor:
            loss: torch.Tensor = self.net(**batch)["loss"]
            if not self.automatic_optimization:
                assert assert_param_groups(self, self.optimizers()).findings == ()  # Lightning's wrappers
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
            return loss

        def configure_optimizers(self) -> Any:
            return self.configure(self.net)

    def run(
        net: nn.Module, configure: Callable[[Any], Any], callbacks: Any = (), epochs: int = 0, **choices: Any
    ) -> None:
        trainer = pl.Trainer(
            fast_dev_run=not epochs,
            max_epochs=epochs or None,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, ParamGroupsCallback(**choices)],
        )
        trainer.fit(Task(net, configure), DataLoader(Rows(), batch_size=2))

    return run


def scheduled(net: Net) -> Any:
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.1)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)}


def halves(net: Net) -> tuple[torch.optim.Optimizer, ...]:
    return sgd(net.body), torch.optim.AdamW([*net.norm.parameters(), *net.head.parameters()])


@pytest.mark.parametrize("configure", [sgd, scheduled, halves])
def test_correct_groups_are_trained_in_lightning(fit: Callable[..., Any], configure: Callable[[Net], Any]) -> None:
    """One optimizer, one with a scheduler and names without ``net.``, and two stepped by hand."""
    net = Net()
    before = values(net)
    fit(net, configure, strict=True)
    assert moved(net, before) == names(net)


@pytest.mark.filterwarnings(f"ignore:{TWICE}")
@pytest.mark.parametrize("fault", FAULTS)
def test_lightning_stops_before_its_first_step(fit: Callable[..., Any], fault: str) -> None:
    """The error has the FQN in the LightningModule, and no parameter was updated."""
    configure, name = FAULTS[fault]
    net = Net()
    before: Step = {}

    def configure_and_look(net: Net) -> torch.optim.Optimizer:
        optimizer = configure(net)
        before.update(values(net))
        return optimizer

    with pytest.raises(GroupsError, match=name.replace("'", "'net.", 1)):
        fit(net, configure_and_look)
    assert moved(net, before) == set()


def test_a_scheduler_built_for_fewer_groups_stops_lightning(fit: Callable[..., Any]) -> None:
    def configure(net: Net) -> Any:
        optimizer = sgd(net.body)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
        optimizer.add_param_group({"params": [*net.norm.parameters(), *net.head.parameters()]})
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    with pytest.raises(GroupsError, match=r"LambdaLR was built for 1 group \(base_lrs\), but SGD has 2"):
        fit(Net(), configure)


def test_one_parameter_in_two_optimizers_stops_lightning(fit: Callable[..., Any]) -> None:
    with pytest.raises(GroupsError, match=r"'net.head.bias' .* 2 times \(optimizer 0, group 0\[5\] and optimizer 1"):
        fit(Net(), lambda net: (sgd(net), torch.optim.AdamW([net.head.bias])))


def test_on_fault_warn_lets_lightning_continue(fit: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="'net.norm.weight' .* is trainable but in no group"):
        fit(Net(), FAULTS["a parameter left out"][0], on_fault="warn")


def test_a_parameter_that_base_finetuning_drops_is_found(fit: Callable[..., Any]) -> None:
    """``BaseFinetuning`` compares by value: it leaves out a new norm, because another norm has equal values."""
    from lightning.pytorch.callbacks import BaseFinetuning

    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Step:
            return {"loss": ((self.head(self.more(self.norm(self.body(x)))) - labels) ** 2).sum()}

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net.more, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 0:
                self.unfreeze_and_add_param_group(pl_module.net.more, optimizer)

    with (
        pytest.warns(UserWarning, match="Those parameters will be skipped"),
        pytest.raises(GroupsError, match=r"'net\.more\.0\.weight' .* is trainable but in no group"),
    ):
        fit(Two(), lambda net: torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1), [Unfreeze()])


def test_the_older_package_of_lightning_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ckptkit.integrations.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    module = importlib.import_module("ckptkit.integrations.lightning")
    assert issubclass(module.ParamGroupsCallback, importlib.import_module("pytorch_lightning").Callback)


def test_an_unknown_on_fault_is_refused() -> None:
    from ckptkit.integrations.transformers import ParamGroupsCallback

    with pytest.raises(ArgumentError, match="on_fault is the string 'ignore'"):
        ParamGroupsCallback(on_fault="ignore")  # type: ignore[arg-type]
