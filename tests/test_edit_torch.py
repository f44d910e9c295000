"""Editing a training checkpoint keeps the rest: torch loads the same values, except for the requested change."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime as dt
import pathlib
import random
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptkit import choose_output, execute, open_checkpoint, parse_rules, plan_merge, plan_remap
from ckptkit.core.dtypes import DTYPES
from ckptkit.errors import OutputError, PlanError
from ckptkit.formats.pickle.values import is_weights_only
from ckptkit.formats.torch.objects import TorchObjects
from ckptkit.plans.adapters.fold import plan_lora
from ckptkit.plans.execute import check_output
from tests.features import only_known, saves
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import call, get, mapping, put, tensor, torch_zip
from tests.helpers_outputs import CODES, names_in, scratch, sha256, tensor_of
from tests.helpers_same import assert_same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(ComplexHalf|[Ss]parse|quantiz|TypedStorage|lr_scheduler|Detected call).*"
)


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def edited(source: Path, out: Path, rules: list[str] | None = None, *, dtype: str | None = None) -> Any:
    """Return what torch loads from an edited copy; the copy must load weights-only if the source does."""
    with open_checkpoint(source) as checkpoint:
        execute(
            plan_remap(checkpoint, rules, dtype=dtype), checkpoint, choose_output(out, force=True, keep_unknown=True)
        )
    assert zipfile.ZipFile(out).testzip() is None
    try:
        torch.load(source, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it refuses, it may refuse again
        return loaded(out)
    assert_same(torch.load(out, weights_only=True), loaded(out))
    return loaded(out)


def renamed(state: Any, names: Callable[[str], str]) -> Any:
    """Return a copy of the mapping, with the same class and attributes, and with other names."""
    made = copy.copy(state)
    made.clear()
    made.update({names(key): value for key, value in state.items()})
    return made


def saved(path: Path, content: Any, *, legacy: bool = False, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return path


def tied_model(*, sparse: bool) -> nn.ModuleDict:
    """Return a model with a prefix, a tied embedding and head, and buffers."""
    torch.manual_seed(0)
    embed, head = nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 6, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({"net": nn.ModuleDict({"embed": embed, "norm": nn.BatchNorm1d(4), "head": head})})


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam capturable": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "LBFGS": torch.optim.LBFGS,
    "SparseAdam": torch.optim.SparseAdam,
    **{kind.__name__: kind for kind in only_known(torch.optim, "Adafactor", "Muon")},
}


def trained(name: str) -> dict[str, Any]:
    """Return a training checkpoint after two steps, as a script would save it."""
    model = tied_model(sparse=name == "SparseAdam")
    layers: Any = model["net"]
    weight = layers["embed"].weight
    parameters = [weight] if name in ("SparseAdam", "Muon") else list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ]
    if name == "SGD":
        schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20))

    def closure() -> float:
        optimizer.zero_grad()
        loss = layers["norm"](layers["embed"](torch.tensor([0, 1, 1, 5]))).square().sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(2):
        optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step()
    ema = {key: value.clone() for key, value in model.state_dict().items()}
    return {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "shadow": [*ema.values(), weight.detach()[1:3].T],
        "best": {"loss": float("inf"), "at": None, "history": list(range(1500))},
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_is_kept(name: str, tmp_path: Path, *, legacy: bool) -> None:
    """After a rename, a drop and a cast, the optimizer, schedulers, scaler, other tensors and ties are unchanged."""
    source = saved(tmp_path / "run.ckpt", trained(name), legacy=legacy)
    before = sha256(source)

    wanted = loaded(source)
    assert_same(edited(source, tmp_path / "same.ckpt"), wanted)

    wanted["model"] = renamed(wanted["model"], lambda key: key.removeprefix("net."))
    table = wanted["model"]._metadata
    wanted["model"]._metadata = renamed(
        collections.OrderedDict((key, value) for key, value in table.items() if key), lambda key: key[4:]
    )
    assert_same(edited(source, tmp_path / "renamed.ckpt", ["net.*=*"]), wanted)

    wanted = loaded(source)
    for key in [key for key in wanted["model"] if ".norm." in key]:
        del wanted["model"][key]
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, parse_rules(drop=["net.norm.*"]))
        execute(plan, checkpoint, tmp_path / "dropped.ckpt")
    assert_same(loaded(tmp_path / "dropped.ckpt"), wanted)

    wanted = loaded(source)
    cast = {id(value): value.to(torch.bfloat16) for value in wanted["model"].values() if value.is_floating_point()}
    for key, value in wanted["model"].items():
        wanted["model"][key] = cast.get(id(value), value)
    found = edited(source, tmp_path / "cast.ckpt", dtype="BF16")
    tied = found["model"]["net.embed.weight"], found["model"]["net.head.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    found["model"]["net.head.weight"], wanted["model"]["net.head.weight"] = None, None
    assert_same(found, wanted)
    assert sha256(source) == before


class Unknown:
    """A class of the user that is not importable while the file is edited."""


ODDITIES = (
    "namespace", "numpy", "random", "generator", "when", "containers", "values", "keys", "shared", "recursive", "knot",
    "graph", "module", "unknown", "class", "tensors",
)  # fmt: skip


def oddities() -> dict[str, Any]:
    """Return values that training scripts save, common ones and rare ones."""
    shared = ["a list that is there three times"]
    recursive: list[Any] = [1]
    recursive.append(recursive)
    knot: list[Any] = []
    knot_tuple = (knot, "t")
    knot.append(knot_tuple)
    node = argparse.Namespace(name="self", child=None)
    node.child = argparse.Namespace(parent=node)
    whole = torch.arange(12.0)
    parameter = nn.Parameter(torch.ones(3))
    parameter.tag = "kept"  # type: ignore[attr-defined]
    tensor = torch.zeros(2)
    tensor.note = {"who": tensor}  # type: ignore[attr-defined]
    ordered = collections.OrderedDict(a=1)
    ordered.extra = shared  # type: ignore[attr-defined]
    return {
        "namespace": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/a/b"), nested=argparse.Namespace(x=(1,))),
        "numpy": [np.float64(0.1), np.int32(-3), np.arange(6).reshape(2, 3), np.array("text"), np.float32("nan")],
        "random": [random.getstate(), np.random.RandomState(3).get_state(), torch.get_rng_state()],
        "generator": np.random.default_rng(5),
        "when": [dt.datetime(2024, 5, 6, tzinfo=dt.UTC), dt.timedelta(seconds=3)],
        "containers": [
            {1, 2}, frozenset("ab"), collections.deque([1, 2], maxlen=5), collections.Counter("aab"),
            collections.defaultdict(list, {"k": [1]}), ordered, (), ((),), [], {}, bytearray(b"xyz"),
            range(3), slice(1, 2),
        ],
        "values": [
            True, None, 2**200, -(2**70), 1.5, float("nan"), -0.0, 1j, b"\xff\0", "\ud800", "ü\n", "", Ellipsis,
            torch.float8_e4m3fn, torch.device("cuda:1"), torch.Size([2, 3]), torch.strided, torch.per_tensor_affine,
        ],
        "keys": {1: "int", (2, "t"): "tuple", None: 0, 2.5: 1, b"b": 2, "1": "text"},
        "shared": [shared, shared, {"again": shared}],
        "recursive": recursive,
        "knot": knot_tuple,
        "graph": node,
        "module": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        "unknown": Unknown(),
        "class": Unknown,
        "tensors": [
            *(tensor_of(code, (3,)) for code in CODES),
            torch.quantize_per_tensor(torch.arange(4.0), 0.5, 2, torch.qint8),
            torch.quantize_per_channel(torch.ones(2, 2), torch.tensor([0.5, 1]), torch.tensor([0, 1]), 0, torch.quint8),
            torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.empty(2, 3, device="meta"),
            whole[2:5], whole.view(3, 4).T, whole[::2], whole.expand(2, 12), torch.empty(0, 3), torch.tensor(7),
            torch.ones(2, dtype=torch.complex64).conj(), torch.ones(2, dtype=torch.complex64).conj().imag,
            torch.ones(2, requires_grad=True), parameter, tensor, torch.ones(3).untyped_storage(),
        ],
    }  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", ODDITIES)
def test_every_value_beside_the_weights_is_kept(name: str, place: str, protocol: int, tmp_path: Path) -> None:
    """Types, values, order and identity remain, in every protocol, with the weights first or last in the pickle."""
    rest = oddities()[name]
    weights = collections.OrderedDict(module_a=torch.arange(6.0).view(2, 3), module_b=nn.Parameter(torch.ones(2)))
    content = {"rest": rest, "state_dict": weights} if place == "first" else {"state_dict": weights, "rest": rest}
    source = saved(tmp_path / "in.pt", content, protocol=protocol)
    wanted = loaded(source)
    wanted["state_dict"] = renamed(wanted["state_dict"], lambda key: key.removeprefix("module_"))
    assert_same(edited(source, tmp_path / "out.pt", ["re:module_(.*)=\\1"]), wanted)


def test_everything_together_is_kept(tmp_path: Path) -> None:
    """One file holds all oddities and uses the mapping twice, in the zip format and in the legacy format."""
    parts = oddities()
    weights = {"w": torch.arange(6.0), "b": parts["tensors"][0]}
    for legacy in (False, True):
        if legacy:  # torch writes such tensors and cannot read them; for modules it writes the source code too
            del parts["module"]
            parts["tensors"] = [one for one in parts["tensors"] if isinstance(one, torch.Tensor) and one.numel() and
                                one.dtype in (torch.float32, torch.bfloat16, torch.int64)]  # fmt: skip
            weights = {"w": torch.arange(6.0), "b": parts["tensors"][0]}
        source = saved(tmp_path / "in.pt", {"state_dict": weights, "again": weights, "rest": parts}, legacy=legacy)
        wanted = loaded(source)
        moved = {("x.w" if key == "w" else key): value for key, value in wanted["state_dict"].items()}
        wanted["state_dict"].clear()
        wanted["state_dict"].update(moved)
        assert_same(edited(source, tmp_path / "out.pt", ["w=x.w"]), wanted)


def test_no_class_is_needed_to_keep_its_objects(tmp_path: Path) -> None:
    """A file that needs a missing module can be edited, and loads again as soon as the module is back."""
    module = types.ModuleType("lost_module")
    lost = type("Lost", (), {"__module__": "lost_module"})
    module.Lost = lost  # type: ignore[attr-defined]
    sys.modules["lost_module"] = module
    thing = lost()
    thing.values = [thing, {"lr": 0.1}]
    try:
        source = saved(tmp_path / "in.pt", {"model": {"w": torch.ones(2)}, "hparams": thing, "kind": lost})
        wanted = loaded(source)
        del sys.modules["lost_module"]
        with open_checkpoint(source) as checkpoint:
            execute(plan_remap(checkpoint, ["w=v"]), checkpoint, choose_output(tmp_path / "out.pt", keep_unknown=True))
        assert "lost_module" not in sys.modules
        sys.modules["lost_module"] = module
        wanted["model"] = {"v": wanted["model"]["w"]}
        assert_same(loaded(tmp_path / "out.pt"), wanted)
    finally:
        sys.modules.pop("lost_module", None)


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    """An object that writes a file when it is loaded is kept; only torch.load runs its code."""
    mark = tmp_path / "ran"
    source = saved(tmp_path / "in.pt", {"model": {"w": torch.ones(2)}, "trap": Trap(mark)})
    with open_checkpoint(source) as checkpoint:
        execute(plan_remap(checkpoint, ["w=v"]), checkpoint, choose_output(tmp_path / "out.pt", keep_unknown=True))
    assert not mark.exists()
    loaded(tmp_path / "out.pt")
    assert mark.exists()


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        """Take the path of the file to create."""
        self.path = path

    def __reduce__(self) -> Any:
        """Return the call that the pickle asks for."""
        return spring, (str(self.path),)


def spring(path: str) -> None:
    Path(path).touch()


def test_a_merge_keeps_the_rest_of_its_base(tmp_path: Path) -> None:
    """The base gets the donor's values: parameters remain parameters, the order is the same, and new keys follow."""
    base = {
        "state_dict": {"a": nn.Parameter(torch.zeros(2)), "n": torch.tensor(1), "note": "in the middle",
                       "b": torch.zeros(3, dtype=torch.bfloat16)},
        "epoch": 3, "args": argparse.Namespace(lr=1),
    }  # fmt: skip
    donor = {"b": torch.ones(3), "a": torch.ones(2), "c": torch.ones(1)}
    source = saved(tmp_path / "base.ckpt", base)
    with open_checkpoint(source) as first:
        plan = plan_merge(first, donor, on_unexpected="add")
        output = choose_output(tmp_path / "out.ckpt", keep_unknown=True)
        assert check_output(plan, output, {"base": first}).kept == ("epoch", "args", "note")
        execute(plan, {"base": first, "donor": donor}, output)
    wanted = loaded(source)
    wanted["state_dict"] |= {"a": nn.Parameter(torch.ones(2)), "b": torch.ones(3, dtype=torch.bfloat16)}
    wanted["state_dict"]["c"] = torch.ones(1)
    assert_same(loaded(tmp_path / "out.ckpt"), wanted)


def test_an_adapter_is_folded_into_a_training_checkpoint(tmp_path: Path) -> None:
    """The weight is new, and everything else in the file is unchanged."""
    source = saved(tmp_path / "base.ckpt", {"model": {"q.weight": torch.zeros(3, 2), "n": torch.ones(1)}, "epoch": 3})
    name = "base_model.model.q.lora_{}.weight"
    adapter = {name.format("A"): torch.ones(1, 2), name.format("B"): torch.ones(3, 1)}
    with open_checkpoint(source) as base:
        plan = plan_lora(base, adapter, {"r": 1, "lora_alpha": 2, "peft_type": "LORA"})
        execute(plan, {"base": base, "donor": adapter}, tmp_path / "out.ckpt")
    assert_same(
        loaded(tmp_path / "out.ckpt"),
        {"model": {"q.weight": torch.full((3, 2), 2.0), "n": torch.ones(1)}, "epoch": 3},
    )


def test_new_tensors_are_what_the_old_ones_were(tmp_path: Path) -> None:
    """A cast parameter is still a parameter, with its attributes and requires_grad; shared objects remain shared."""
    tagged = torch.ones(2)
    tagged.tag = ["kept"]  # type: ignore[attr-defined]
    parameter = nn.Parameter(torch.ones(2, 3))
    state = {"p": parameter, "q": parameter, "f": nn.Parameter(torch.ones(1), requires_grad=False), "t": tagged,
             "g": torch.ones(2, requires_grad=True), "i": torch.arange(3)}  # fmt: skip
    source = saved(tmp_path / "in.pt", {"model": state, "epoch": 1})
    found = edited(source, tmp_path / "out.pt", dtype="F16")["model"]
    assert found["p"] is found["q"]
    for key, old in state.items():
        new = found[key]
        assert (type(new), new.requires_grad) == (type(old), old.requires_grad)
        assert torch.equal(new, old.half() if old.is_floating_point() else old)
    assert found["t"].tag == ["kept"]


def test_memory_that_is_no_longer_shared_is_named(tmp_path: Path) -> None:
    """A note of the plan names a cast tensor that shared its storage with another tensor, and no other tensor."""
    weight = torch.ones(4)
    source = saved(tmp_path / "in.pt", {"model": {"w": weight, "v": torch.ones(2)}, "ema": [weight[1:]]})
    output = choose_output(tmp_path / "out.pt")
    with open_checkpoint(source) as checkpoint:
        notes = check_output(plan_remap(checkpoint, dtype="F16"), output, {"source": checkpoint}).notes
        assert notes == ("no longer share a storage with tensors that the file keeps: w",)
        assert check_output(plan_remap(checkpoint, ["w=x"]), output, {"source": checkpoint}).notes == ()


def test_storages_that_nobody_refers_to_are_dropped(tmp_path: Path) -> None:
    """The storage of a dropped tensor is not written, unless another tensor uses it."""
    large = torch.ones(100_000)
    source = saved(tmp_path / "in.pt", {"model": {"large": large, "w": torch.ones(2)}, "epoch": 3})
    shared = saved(tmp_path / "shared.pt", {"model": {"large": large, "w": torch.ones(2)}, "ema": large})
    for path, size in ((source, 3000), (shared, 403_000)):
        with open_checkpoint(path) as checkpoint:
            plan = plan_remap(checkpoint, parse_rules(drop=["large"]))
            execute(plan, checkpoint, choose_output(tmp_path / "out.pt", force=True))
        assert abs((tmp_path / "out.pt").stat().st_size - size) < 3000
        assert list(loaded(tmp_path / "out.pt")["model"]) == ["w"]


def test_a_file_is_replaced_in_place_where_nothing_is_lost(tmp_path: Path) -> None:
    """With force, an output may replace its source; with only_tensors it may not, because the rest would be lost."""
    source = saved(tmp_path / "run.pt", {"model": {"w": torch.ones(2)}, "epoch": 3})
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, ["w=v"])
        with pytest.raises(OutputError, match="holds more than tensors"):
            execute(plan, checkpoint, choose_output(source, force=True, only_tensors=True))
        execute(plan, checkpoint, choose_output(source, force=True))
    assert_same(loaded(source), {"model": {"v": torch.ones(2)}, "epoch": 3})


def test_a_mapping_deeper_in_the_file_is_edited_where_it_is(tmp_path: Path) -> None:
    """``::`` selects a nested mapping, and everything around it is kept; the root can be the mapping too."""
    source = saved(tmp_path / "in.pt", {"a": {"ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}}, "n": 1})
    with open_checkpoint(f"{source}::a.ema") as checkpoint:
        execute(plan_remap(checkpoint, ["w=v"]), checkpoint, tmp_path / "out.pt")
    wanted = {"a": {"ema": {"v": torch.ones(1)}, "model": {"w": torch.zeros(1)}}, "n": 1}
    assert_same(loaded(tmp_path / "out.pt"), wanted)
    saved(source, {"w": torch.ones(1), "_extra_state": {"n": 1}, "v": torch.zeros(2)})
    assert list(edited(source, tmp_path / "out.pt", ["w=x.w"])) == ["x.w", "_extra_state", "v"]


def test_other_records_of_the_archive_are_kept(tmp_path: Path) -> None:
    """The output also has a record that no tensor uses, with its checksum."""
    source = saved(tmp_path / "in.pt", {"model": {"w": torch.ones(2)}, "epoch": 3})
    with zipfile.ZipFile(source, "a") as archive:
        archive.writestr("in/extra/notes.txt", "hello")
    edited(source, tmp_path / "out.pt", ["w=v"])
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.read("archive/extra/notes.txt") == b"hello"
        assert {name for name in archive.namelist() if "data/" in name} == {"archive/data/0"}


@pytest.mark.parametrize("order", ["big", "little"])
def test_the_numbers_of_a_big_endian_file_are_what_torch_reads(order: str, tmp_path: Path) -> None:
    """Numbers are swapped once; a file that does not say how wide they are is refused."""
    content = {
        "model": {"w": tensor_of("F32", (3,)), "h": tensor_of("BF16", (4,))},
        "rest": {"step": tensor_of("I64", (2,), 2)},
    }
    source = big_endian(saved(tmp_path / "in.pt", content), order)
    found = edited(source, tmp_path / "out.pt", ["w=v"])
    assert_same(found["rest"], loaded(source)["rest"])
    assert_same(found["model"]["v"], loaded(source)["model"]["w"])
    if not saves("U16"):
        return
    source = big_endian(saved(tmp_path / "in.pt", {**content, "wide": [tensor_of("U16", (2,))]}), order)
    if order == "little":
        edited(source, tmp_path / "out.pt", ["w=v"])
        return
    with pytest.raises(PlanError, match="does not say how wide all its numbers are"):
        edited(source, tmp_path / "out.pt", ["w=v"])


def big_endian(path: Path, order: str) -> Path:
    """Return the same file with another byte order in its header."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, order if name.endswith("byteorder") else data)
    return path


@pytest.mark.parametrize(
    ("content", "rules", "reason"),
    [
        ({"model": {"w": torch.ones(1)}, "n": argparse.Namespace()}, [],
         "names code that torch.load(weights_only=True) refuses: argparse.Namespace"),
        ({"model": {"w": torch.ones(1), "v": torch.ones(1), "x": 3}, "n": 1}, ["w=x"],
         "'x' is already the key of a value that is not a tensor"),
        ({"model": {"w": torch.ones(1), "v": torch.ones(1), "d": {"u": torch.ones(1)}}, "n": 1}, ["d.u=u"],
         "'d.u' is nested deeper than the other tensors, and would be changed"),
    ],
    ids=["unknown", "collision", "deep"],
)  # fmt: skip
def test_a_value_that_cannot_be_kept_is_named(content: Any, rules: list[str], reason: str, tmp_path: Path) -> None:
    """A dry run refuses too; the hint names --only-tensors, and that option works."""
    source = saved(tmp_path / "in.pt", content)
    with open_checkpoint(source) as checkpoint:
        plan = plan_remap(checkpoint, rules)
        for act in (
            lambda out: execute(plan, checkpoint, out),
            lambda out: check_output(plan, out, {"source": checkpoint}),
        ):
            with pytest.raises(PlanError) as caught:
                act(choose_output(tmp_path / "out.pt"))
            assert caught.value.reason.endswith(reason)
            assert "--only-tensors" in str(caught.value.hint)
        assert names_in(tmp_path) == ["in.pt"]
        execute(plan, checkpoint, choose_output(tmp_path / "out.pt", only_tensors=True))
    assert all(isinstance(value, torch.Tensor) for value in loaded(tmp_path / "out.pt").values())


def test_the_command_says_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command lists what it keeps; with ``--only-tensors`` and for safetensors it lists what it leaves out."""
    source = saved(tmp_path / "run.pt", {"model": {"w": torch.ones(2)}, "epoch": 3, "args": argparse.Namespace()})
    base = ("remap", source, "--rename", "w=v", "--force", "-o")
    refused = run_ckpt(capsys, *base, tmp_path / "out.pt")
    assert (refused.code, "--keep-unknown" in refused.err, refused.out) == (2, True, "")
    dry = run_ckpt(capsys, *base, tmp_path / "out.pt", "--keep-unknown", "--dry-run")
    assert "copied unchanged: epoch, args" in dry.out
    done = run_ckpt(capsys, *base, tmp_path / "out.pt", "--keep-unknown", "--verify")
    assert "copied unchanged: epoch, args" in done.err
    assert f"cannot read it ({tmp_path / 'out.pt'} holds argparse.Namespace): each of 1 tensor" in done.err
    assert "verified" not in done.err
    assert "left out" not in done.err
    assert list(loaded(tmp_path / "out.pt")) == ["model", "epoch", "args"]
    one, two = (saved(tmp_path / f"{at}.pt", {"model": {"w": torch.ones(2)}, "epoch": at}) for at in (1, 2))
    merged = run_ckpt(capsys, "merge", one, two, "-o", tmp_path / "merged.pt").err
    assert "copied unchanged: epoch\nleft out of donor, stored outside of the weights: epoch\n" in merged
    for name, *more in (("bare.pt", "--only-tensors"), ("bare.safetensors",)):
        bare = run_ckpt(capsys, *base, tmp_path / name, *more)
        assert "left out, stored outside of the weights: epoch, args" in bare.err
        assert "kept" not in bare.err
    assert_same(loaded(tmp_path / "bare.pt"), collections.OrderedDict(v=torch.ones(2)))


def test_a_plan_file_keeps_the_rest_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan file keeps the rest when it is applied, and restores the file when it is inverted."""
    source = saved(tmp_path / "run.pt", {"model": {"w": torch.ones(2)}, "epoch": 3})
    plan = tmp_path / "plan.json"
    run_ckpt(capsys, "remap", source, "-o", tmp_path / "a.pt", "--rename", "w=v", "--plan", plan)
    again = run_ckpt(capsys, "remap", source, "-o", tmp_path / "b.pt", "--apply", plan)
    assert again.code == 0, again.err
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    bare = run_ckpt(capsys, "remap", source, "-o", tmp_path / "c.safetensors", "--apply", plan)
    assert bare.err.count("epoch") == 1
    assert run_ckpt(capsys, "remap", tmp_path / "a.pt", "-o", tmp_path / "d.pt", "--invert", plan).code == 0
    assert_same(loaded(tmp_path / "d.pt"), loaded(source))


HELD = b"(" + b"".join(b"]" + put(900 + n) for n in range(999)) + b"t" + put(899)
HELD += b"".join(get(900 + n) + get(899) + b"a0" for n in range(999))


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (
            b"]" + put(7) + call("a.b", get(7)) + b"\x86" + b"0" + get(7) + b"Na",
            "its pickle changes objects after it has used them",
        ),
        (
            b"(]" + put(7) + call("a.b", get(7)) + get(7) + b"Na" + b"t",
            "its pickle changes objects after it has used them",
        ),
        (HELD, "its objects hold each other too often"),
    ],
    ids=["thrown away", "changed later", "knots"],
)
def test_a_pickle_that_no_pickler_writes_is_refused(rest: bytes, reason: str, tmp_path: Path) -> None:
    """A pickle is refused if the calls in the output would not get the same arguments."""
    source = tmp_path / "in.pt"
    source.write_bytes(torch_zip(mapping({"model": mapping({"w": tensor()}), "rest": rest})))
    with open_checkpoint(source) as checkpoint:
        output = choose_output(tmp_path / "out.pt", keep_unknown=True)
        with pytest.raises(PlanError, match=reason):
            execute(plan_remap(checkpoint, ["w=v"]), checkpoint, output)
    assert names_in(tmp_path) == ["in.pt"]


def test_unknown_code_is_what_torch_refuses() -> None:
    """ckptkit knows every name that torch's weights-only loader accepts, but for newer dtypes; it asks about others."""
    allowed = torch._weights_only_unpickler._get_allowed_globals()
    interpreter = TorchObjects().interpreter
    known = {*interpreter.builders, *interpreter.constants}
    unknown = [name for name in allowed if name not in known and not is_weights_only(name)]
    dtypes = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert set(unknown) <= dtypes - {f"torch.{dtype.torch_name}" for dtype in DTYPES.values()}
    for name in ("argparse.Namespace", "torch.nn.Linear", "torch.optim.SGD", "x.torch.FloatTensor", "torch.Tensor.x"):
        assert not is_weights_only(name)


ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=4),
    st.builds(lambda code, seed: tensor_of(code, (2,), seed), st.sampled_from(("F32", "BF16", "I64", "F8_E4M3")),
              st.integers(0, 9)),
)  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """Draw a nested object whose parts refer to each other and to themselves."""
    made: list[Any] = [draw(ATOMS) for _ in range(draw(st.integers(1, 4)))]
    lists: list[list[Any]] = []
    for _ in range(draw(st.integers(0, 8))):
        parts = draw(st.lists(st.sampled_from(range(len(made))), max_size=4))
        chosen = [made[index] for index in parts]
        kind = draw(st.sampled_from(("list", "tuple", "dict", "ordered", "namespace", "deque")))
        new: Any = {
            "list": chosen,
            "tuple": tuple(chosen),
            "dict": {f"k{number}": value for number, value in enumerate(chosen)},
            "ordered": collections.OrderedDict((number, value) for number, value in enumerate(chosen)),
            "namespace": argparse.Namespace(**{f"n{number}": value for number, value in enumerate(chosen)}),
            "deque": collections.deque(chosen),
        }[kind]
        if kind == "list":
            lists.append(new)
        made.append(new)
    for one in lists:
        if draw(st.booleans()):
            one.append(draw(st.sampled_from(made)))
    return made


@settings(deadline=None, max_examples=75)
@given(trees(), st.booleans(), st.sampled_from(("same", "rename", "drop", "cast")), st.sampled_from((2, 4)))
def test_any_tree_is_kept(tree: Any, front: bool, change: str, protocol: int) -> None:
    """Nested, shared and cyclic values beside the weights are unchanged, and still refer to the weights."""
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2).T, "c": torch.tensor(3)}
    tree.append([weights["a"], weights["b"][:1]])
    content = {"rest": tree, "model": weights} if front else {"model": weights, "rest": tree}
    with scratch() as name:
        source = saved(Path(name, "in.pt"), content, protocol=protocol)
        wanted = loaded(source)
        model = wanted["model"]
        rules: Any = None
        if change == "rename":
            rules = ["a=x.a"]
            wanted["model"] = {"x.a": model["a"], "b": model["b"], "c": model["c"]}
        elif change == "drop":
            rules = parse_rules(drop=["a"])
            del model["a"]
        elif change == "cast":
            model["a"], model["b"] = model["a"].double(), model["b"].double().contiguous()
        found = edited(source, Path(name, "out.pt"), rules, dtype="F64" if change == "cast" else None)
        assert_same(found, wanted)
