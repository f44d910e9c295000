"""Every optimizer of other packages that trains a small model is loaded as torch loads it, to the last bit.

The oracles are the uninterrupted run and the optimizer's own ``load_state_dict()``. A class is tried if its package is
installed, if it takes plain parameters, and if its own load continues as the uninterrupted run does. docs/optimizers.md
has the results and the versions.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptkit import load_optimizer_state, open_optimizer, validate_param_groups
from ckptkit.errors import CkptkitError

# The modules that have the classes of each package.
MODULES = (
    "adabelief_pytorch", "adam_mini", "adan_pytorch", "adopt", "apollo_torch", "bitsandbytes.optim", "came_pytorch",
    "dadaptation", "galore_torch", "grokadamw", "heavyball", "lion_pytorch", "lomo_optim", "madgrad", "muon", "optimi",
    "prodigyopt", "prodigyplus", "pytorch_optimizer", "ranger21", "schedulefree", "sophia_opt", "timm.optim",
    "torch_optimizer", "torchao.optim", "transformers.optimization",
)  # fmt: skip
STEPS = 3
REFUSALS = (
    "but the parameter has shape",
    "subclass tensor",
    "which only running code can rebuild",
    "keeps state of its own around",
    "tensors as the keys of",
)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


class Net(nn.Module):
    """A model with a convolution, matrices of several sizes, vectors and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.wide = nn.Linear(8, 64)
        self.square = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        out: torch.Tensor = self.head(self.square(self.wide(hidden).relu()).relu())
        return out


def import_or_skip(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - packages fail in their own ways without a GPU or with a new torch
        pytest.skip(f"{name}: {type(error).__name__}: {error}")


def wrapped(kind: Any, model: nn.Module) -> Any:
    """Return an optimizer that wraps AdamW."""
    return kind(torch.optim.AdamW(model.named_parameters(), lr=1e-3))


def muon(kind: Any, model: nn.Module) -> Any:
    """Return an optimizer with one group for Muon and one for its auxiliary Adam."""
    split: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        split[parameter.ndim == 2 and not name.startswith("head")].append(parameter)
    return kind([{"params": params, "use_muon": is_muon} for is_muon, params in split.items()])


def matrices(kind: Any, model: nn.Module) -> Any:
    """Return an optimizer of the matrices, the only parameters that train."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


def with_rate(kind: Any, model: nn.Module) -> Any:
    return kind(model.named_parameters(), lr=1e-3, momentum=0.9)


# How classes are built that need more than parameters.
BUILDERS: dict[str, Any] = {
    **dict.fromkeys(("Lookahead", "OrthoGrad", "TRAC", "ScheduleFreeWrapper", "Magma"), wrapped),
    **dict.fromkeys(
        ("Muon", "AdaMuon", "AdaGO", "NorMuon", "DistributedMuon", "SingleDeviceMuonWithAuxAdam", "MuonWithAuxAdam"),
        muon,
    ),
    **dict.fromkeys(("LARS", "LARS32bit", "LARS8bit", "SGD", "SGD32bit", "SGD8bit"), with_rate),
    **dict.fromkeys(("SingleDeviceMuon", "SpectralSphere"), matrices),
    "Ranger21": lambda kind, model: kind(model.parameters(), num_iterations=10, lr=1e-3),
    "BSAM": lambda kind, model: kind(model.named_parameters(), num_data=4, lr=1e-3),
    **dict.fromkeys(
        ("SAM", "LookSAM", "FriendlySAM"),
        lambda kind, model: kind(model.named_parameters(), base_optimizer=torch.optim.AdamW, lr=1e-3),
    ),
}


def classes_of(module: Any) -> Iterator[type]:
    for name, kind in sorted(vars(module).items()):
        is_public = inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and not name.startswith("_")
        if is_public and kind.__module__.partition(".")[0] == module.__name__.partition(".")[0]:
            yield kind


def build(kind: type, model: nn.Module) -> Any:
    """Return an optimizer with its default options; a class that refuses plain parameters raises."""
    builders = [BUILDERS[kind.__name__]] if kind.__name__ in BUILDERS else []
    for options in ({"lr": 1e-3}, {}):
        builders += [
            lambda kind, model, options=options: kind(model.named_parameters(), **options),
            lambda kind, model, options=options: kind(model.parameters(), **options),
            lambda kind, model, options=options: kind([{"params": list(model.parameters())}], **options),
        ]
    reason = Exception()
    for builder in builders:
        try:
            optimizer = builder(kind, model)
        except Exception as error:  # noqa: BLE001 - as above
            reason = error
        else:
            if callable(getattr(optimizer, "train", None)):  # schedule-free
                optimizer.train()
            return optimizer
    raise reason


def train(model: nn.Module, optimizer: Any, first: int) -> None:
    torch.manual_seed(first)
    for number in range(first, first + STEPS):
        data = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number))

        def closure(data: torch.Tensor = data) -> torch.Tensor:
            with torch.enable_grad():
                model.zero_grad()
                loss: torch.Tensor = model(data).square().mean()
                torch.autograd.backward(loss)
            return loss

        closure()
        try:
            optimizer.step()
        except Exception:  # noqa: BLE001 - some need a closure, each with an error of its own
            optimizer.step(closure)


def is_same(one: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return all(torch.equal(left, right) for left, right in pairs) and all(left.isfinite().all() for left, _ in pairs)


def outcome(kind: type, tmp_path: Path) -> str:
    """Return what became of a class: ``same``, ``skipped`` with a reason, or a fault."""
    try:
        model = Net()
        optimizer = build(kind, model)
        train(model, optimizer, 0)
        if is_same(model, Net()):
            return "skipped: it does not train the model"
        saved = optimizer.state_dict()
        pickled = io.BytesIO()
        torch.save({"optimizer": saved}, pickled)
        (tmp_path / "run.pt").write_bytes(pickled.getvalue())

        def read() -> Any:
            return torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)["optimizer"]

        by_torch = copy.deepcopy(model)
        fresh = build(kind, by_torch)
        fresh.load_state_dict(read())
    except Exception as error:  # noqa: BLE001 - the package itself fails
        return f"skipped: {type(error).__name__}: {error}"
    faults = [str(found) for found in findings_above_notes(model, optimizer)]
    loaded, refused = [], []
    for how in ("live", "file"):
        other = copy.deepcopy(model)
        again = build(kind, other)
        try:
            if how == "live":
                load_optimizer_state(again, other, read())
            else:
                with open_optimizer(tmp_path / "run.pt") as source:
                    load_optimizer_state(again, other, source)
        except CkptkitError as error:
            text = f"{how}: {error}"
            refused += [text] if any(words in text for words in REFUSALS) else []
            faults += [] if refused and refused[-1] == text else [text]
        except Exception as error:  # noqa: BLE001 - a fault too
            faults.append(f"{how}: {type(error).__name__}: {error}")
        else:
            faults += [str(found) for found in findings_above_notes(other, again)]
            loaded.append((how, other, again))
    try:
        train(model, optimizer, STEPS)
        train(by_torch, fresh, STEPS)
    except Exception as error:  # noqa: BLE001 - as above
        return f"skipped: {type(error).__name__}: {error}"
    own = is_same(model, by_torch)
    for how, other, again in loaded:
        try:
            train(other, again, STEPS)
        except Exception as error:  # noqa: BLE001 - its own load did not fail
            faults.append(f"{how}: {type(error).__name__}: {error}")
        if not is_same(by_torch, other):
            faults.append(f"{how}: other weights than after its own load")
    if faults:
        return f"{'fault' if own else 'own load differs, and'}: {'; '.join(faults)}"
    if refused:
        return f"refused: {'; '.join(refused)}"
    return "same" if own else "skipped: its own load does not continue as the uninterrupted run"


def findings_above_notes(model: nn.Module, optimizer: Any) -> list[Any]:
    if hasattr(optimizer, "optimizer"):  # a wrapper adds options to the groups of AdamW, which does not read them
        return []
    return [found for found in validate_param_groups(model, optimizer).findings if found.severity != "note"]


@pytest.mark.parametrize("name", MODULES)
def test_optimizers_are_loaded_as_torch_loads_them(name: str, tmp_path: Path) -> None:
    module = import_or_skip(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = {kind.__name__: outcome(kind, tmp_path) for kind in classes_of(module)}
    print(*(f"{kind}: {result}" for kind, result in results.items()), sep="\n")  # noqa: T201 - pytest -rP shows it
    assert {
        kind: result for kind, result in results.items() if not result.startswith(("same", "skipped", "refused"))
    } == {}


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "rmsprop_bnb_8bit"])
def test_the_trainer_runs_and_resumes_under_the_callback(optim: str, tmp_path: Path) -> None:
    """A strict check before training, at each epoch and after a resume reports nothing."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    from ckptkit.integrations.transformers import ParamGroupsCallback

    data = [{"input_ids": torch.arange(8) + number, "labels": torch.arange(8) + number} for number in range(8)]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    for epochs, checkpoint in ((2, None), (3, True)):
        options = transformers.TrainingArguments(
            str(tmp_path), optim=optim, num_train_epochs=epochs, save_strategy="epoch", report_to=[], use_cpu=True
        )
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
        callback = ParamGroupsCallback(strict=True)
        trainer = transformers.Trainer(model, options, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.epoch == epochs
