"""A fine-tuning script, as a user would write it; ``tests/oracles/test_typing.py`` type-checks it, and typos of it."""

# ruff: noqa: T201

from __future__ import annotations

from pathlib import Path

import torch

import ckptkit
from ckptkit.testing import assert_loads, assert_param_groups, assert_same_weights
from fixtures.lenet import build


def load(model: torch.nn.Module, path: Path) -> float:
    """Load what fits, and say what does not."""
    found = ckptkit.diff(model, path)
    for info in found.missing:
        print(info.key, info.dtype, info.shape)
    names: list[str] = [pair.key for pair in found.matched]
    policy: ckptkit.OnMismatch = {"fc3.*": "skip"}
    report = ckptkit.load_into(model, path, on_mismatch=policy, require="conv*", min_coverage=0.9)
    report.raise_for_errors()
    findings: tuple[ckptkit.Finding, ...] = report.findings
    print(len(names), [finding.message for finding in findings if finding.severity == "warning"])
    return report.coverage


def optimize(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Give the head ten times the rate, and prove that every parameter trains."""
    spec = {
        "defaults": {"lr": 1e-3, "momentum": 0.9},
        "group": [{"name": "head", "params": "fc3.*", "lr": 1e-2}, {"name": "base", "rest": True}],
    }
    optimizer = torch.optim.SGD(ckptkit.build_param_groups(model, spec), lr=1e-3)
    checked: ckptkit.Report = ckptkit.validate_param_groups(model, optimizer, ignore=["groups.decay"])
    assert checked.ok
    assert_param_groups(model, optimizer)
    return optimizer


def publish(model: torch.nn.Module, folder: Path) -> ckptkit.Written:
    """Write the weights under other names."""
    plan = ckptkit.plan_remap(model, ["fc3.*=head.*"])
    output = ckptkit.choose_output(folder / "model.safetensors", force=True)
    written = ckptkit.execute(plan, model, output, verify=True)
    with ckptkit.open_checkpoint(written.path) as checkpoint:
        shapes: dict[str, tuple[int, ...]] = {key: info.shape for key, info in checkpoint.items()}
        bias: torch.Tensor = checkpoint.read("head.bias")
    print(len(shapes), float(bias.abs().max()), written.nbytes)
    return written


def main(folder: Path = Path()) -> None:
    """Run all of it."""
    model, path = build(), Path("fixtures/lenet_10class.pth")
    assert_loads(model, path, fresh="fc3.*")
    print(load(model, path), optimize(model))
    try:
        assert_same_weights(model, publish(model, folder).path, rtol=1e-6)
    except AssertionError as error:
        print(error)
    except ckptkit.CkptkitError as error:
        print(error.reason, error.hint)


if __name__ == "__main__":
    main()
