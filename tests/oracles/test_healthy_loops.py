"""Training loops of accelerate, transformers and Lightning, first and resumed, pass the callbacks in strict mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptkit import assert_param_groups, preflight
from tests.helpers_healthy import Setup, loud_findings, split_by_decay

pytestmark = pytest.mark.filterwarnings("ignore")
Batch = dict[str, torch.Tensor]


class Rows(Dataset[Batch]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Batch:
        return {"x": torch.tensor([1.0, -2.0, float(index), 0.5]), "labels": torch.tensor([1.0, 0.0])}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Batch:
        return {"loss": ((self.head(self.norm(self.body(x))) - labels) ** 2).mean()}


def loss_of(model: Any) -> torch.Tensor:
    x, labels = torch.randn(4, 4), torch.randn(4, 2)
    loss: torch.Tensor = model(x=x, labels=labels)["loss"]
    return loss


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(tmp_path: Path, precision: str) -> None:
    """The wrapped model, optimizer and scheduler, and the same after ``load_state()``."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # so that each precision is taken
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=1)

    def prepared() -> tuple[Any, ...]:
        net = Net()
        optimizer = torch.optim.AdamW(split_by_decay(net), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        parts: tuple[Any, ...] = accelerator.prepare(net, optimizer, scheduler)
        return parts

    model, optimizer, scheduler = prepared()
    setup = Setup(model, optimizer, loss_of, scheduler)
    assert loud_findings(setup) == []
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    assert loud_findings(setup) == []


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_the_trainer_resumed(tmp_path: Path, optimizer: str, schedule: str) -> None:
    """A run that stops after its first epoch, and the run that continues from its checkpoint."""
    transformers = pytest.importorskip("transformers")
    from ckptkit.integrations.transformers import ParamGroupsCallback

    class Stop(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    def trainer(net: nn.Module, *callbacks: Any) -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            warmup_steps=2,
            weight_decay=0.01,
            optim=optimizer,
            lr_scheduler_type=schedule,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="epoch",
        )
        return transformers.Trainer(
            net, arguments, train_dataset=Rows(), callbacks=[*callbacks, ParamGroupsCallback(strict=True)]
        )

    assert trainer(Net(), Stop()).train().global_step == 4
    second = trainer(Net())
    assert second.train(resume_from_checkpoint=True).global_step == 12
    assert_param_groups(second.model, second.optimizer, schedulers=second.lr_scheduler, strict=True)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs ``Trainer.fit()`` of Lightning with the callback in strict mode."""
    pl = pytest.importorskip("lightning.pytorch")
    from ckptkit.integrations.lightning import ParamGroupsCallback

    class Task(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, *, scheduled: bool) -> None:
            super().__init__()
            self.scheduled = scheduled
            self.net = Net()
            self.backbone = self.net.body

        def training_step(self, batch: Batch) -> Any:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
            if not self.scheduled:
                return optimizer
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.9)
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    def run(
        epochs: int, *callbacks: Any, checkpoint: Path | None = None, scheduled: bool = True, **options: Any
    ) -> Any:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, ParamGroupsCallback(strict=True)],
            **options,
        )
        task = Task(scheduled=scheduled)
        trainer.fit(task, DataLoader(Rows(), batch_size=4), ckpt_path=checkpoint)
        return trainer

    return run


def test_lightning_resumed(fit: Callable[..., Any], tmp_path: Path) -> None:
    """A run of one epoch, and the run that continues from its checkpoint."""
    fit(1).save_checkpoint(tmp_path / "last.ckpt")
    assert fit(3, checkpoint=tmp_path / "last.ckpt").global_step == 6


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}]
)
def test_lightning_with_an_option(fit: Callable[..., Any], options: dict[str, Any]) -> None:
    fit(2, **options)


def test_backbone_finetuning(fit: Callable[..., Any]) -> None:
    """The backbone is frozen at first and joins the optimizer at the second epoch."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    unfreeze = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.001, verbose=False)
    fit(4, unfreeze, scheduled=False)  # most schedulers of torch fail where a group is added


def test_stochastic_weight_averaging(fit: Callable[..., Any]) -> None:
    """Lightning replaces the scheduler with SWALR during the run."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    fit(4, callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2))


def test_preflight_of_a_resumed_run() -> None:
    """The saved run is compared with a new model and optimizer, as before a resume."""
    net = Net()
    optimizer = torch.optim.AdamW(split_by_decay(net), lr=0.01)
    Setup(net, optimizer, loss_of).train()
    new = Net()
    report = preflight(
        new,
        optimizer=torch.optim.AdamW(split_by_decay(new), lr=0.01),
        resume=net.state_dict(),
        resume_optimizer=optimizer.state_dict(),
        dry_step=loss_of,
    )
    assert [finding for finding in report.findings if finding.severity != "note"] == []
    assert report.verdict == "ready"
