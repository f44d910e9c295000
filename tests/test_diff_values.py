"""``ckpt diff --values``: exit codes, gates, the page and the document; the numbers are those of torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ckptkit
from ckptkit.errors import ArgumentError, ModelError, RuleError
from ckptkit.render.page import as_text
from ckptkit.render.page.width import fitted
from ckptkit.render.values import values_page
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_own_loading import rename_old, with_hook

State = dict[str, Tensor]


def base() -> State:
    """Return a backbone of four layers and a head."""
    torch.manual_seed(0)
    state = {f"backbone.{i}.{name}": torch.randn(4, 3) for i in range(4) for name in ("weight", "scale")}
    return {**state, "head.weight": torch.randn(2, 3), "head.bias": torch.randn(2)}


def tuned() -> State:
    """Return the state after a training that froze the backbone."""
    state = base()
    return {**state, "head.weight": state["head.weight"] * 1.5, "head.bias": state["head.bias"] + 0.25}


def changed(**tensors: Tensor) -> State:
    """Return the trained state with other tensors; ``__`` is a dot."""
    return {**tuned(), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}


Saved = Callable[[str, Mapping[str, Tensor]], Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Return a function that saves a state, in the format that the suffix names."""

    def save(name: str, state: Mapping[str, Tensor]) -> Path:
        path = tmp_path / name
        if path.suffix == ".pt":
            torch.save(dict(state), path)
        else:
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
        return path

    return save


FROZEN = ("--expect-frozen", "backbone.*")
HEAD = ("--expect-changed", "head.*")
NAN = torch.tensor([math.nan, 1.0])
CASES: dict[str, tuple[State, tuple[str, ...], int]] = {
    "no values asked": (tuned(), (), 0),
    "equal": (base(), ("--values",), 0),
    "different": (tuned(), ("--values",), 1),
    "within a tolerance": (tuned(), ("--rtol", "0.6", "--atol", "0.25"), 0),
    "beyond a tolerance": (tuned(), ("--atol", "0.1"), 1),
    "zero of the other sign": (
        changed(head__bias=torch.tensor([-0.0, 1.0])) | {"head.weight": base()["head.weight"]}, ("--values",), 1
    ),
    "another dtype of equal values": ({**base(), "head.bias": base()["head.bias"].double()}, ("--values",), 1),
    "both gates hold": (tuned(), (*FROZEN, *HEAD), 0),
    "a frozen tensor changed": (changed(backbone__2__scale=torch.zeros(4, 3)), (*FROZEN, *HEAD), 1),
    "a frozen tensor changed in one bit of another dtype": (
        changed(backbone__2__scale=base()["backbone.2.scale"].bfloat16()), FROZEN, 1
    ),
    "a frozen tensor in another dtype": (
        changed(backbone__2__scale=base()["backbone.2.scale"].double()), (*FROZEN, *HEAD), 0
    ),
    "a head that did not train": (changed(head__bias=base()["head.bias"]), HEAD, 1),
    "a frozen tensor is missing": ({k: v for k, v in tuned().items() if k != "backbone.1.scale"}, FROZEN, 1),
    "a frozen tensor is new": ({**tuned(), "backbone.9.scale": torch.ones(1)}, FROZEN, 1),
    "a changed tensor has another shape": (changed(head__bias=torch.ones(3)), HEAD, 1),
    "other keys do not count beside a gate": ({**tuned(), "extra": torch.ones(1)}, FROZEN, 0),
    "all changes are small": (tuned(), ("--max-rel-l2", "0.6"), 0),
    "a change is large": (tuned(), ("--max-rel-l2", "0.4"), 1),
    "a large change is within a tolerance": (tuned(), ("--max-rel-l2", "0.4", "--atol", "9"), 1),
    "a new NaN has no size": (changed(head__bias=NAN), ("--max-rel-l2", "1e9"), 1),
    "no tensor to measure": ({"other": torch.ones(1)}, ("--max-rel-l2", "1"), 1),
    "a gate and a requirement that is not met": (
        {**tuned(), "head.bias": torch.ones(3)}, (*FROZEN, "--require", "head.*"), 1
    ),
    "a gate and a requirement that is met": ({**tuned(), "extra": torch.ones(3)}, (*FROZEN, "--require", "head.*"), 0),
    "within the tolerance is frozen": (
        changed(backbone__2__scale=base()["backbone.2.scale"] + 1e-6), (*FROZEN, "--atol", "1e-5"), 0
    ),
    "within the tolerance is not changed": (
        changed(head__bias=base()["head.bias"] + 1e-6), (*HEAD, "--atol", "1e-5"), 1
    ),
}  # fmt: skip


@pytest.mark.parametrize(("found", "options", "code"), CASES.values(), ids=CASES.keys())
def test_exit_codes(
    found: State, options: tuple[str, ...], code: int, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 where bits or, with tolerances, values differ; with a gate it is 1 only where something required is not so."""
    paths = saved("a.safetensors", base()), saved("b.safetensors", found)
    ran = run_ckpt(capsys, "diff", *paths, *options)
    assert ran.code == code, ran


def test_broken_gates_name_the_tensors(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """The page begins with the gates, the document has all of them, and ``unmet`` has the broken ones."""
    found = changed(backbone__2__scale=torch.zeros(4, 3), head__bias=base()["head.bias"])
    found["backbone.1.weight"] = torch.ones(3, 4)
    del found["backbone.0.weight"]
    paths = saved("a.safetensors", base()), saved("b.pt", found)
    gates = ("--expect-frozen", "backbone.*", "--expect-changed", "head.*", "--expect-changed", "*.2.scale")
    lines = run_ckpt(capsys, "diff", *paths, *gates).out.splitlines()
    broken = (
        "1 of 8 tensors is not frozen, 'backbone.2.scale' (relative L2 1); 2 cannot be compared, "
        "'backbone.0.weight' (missing in FOUND), 'backbone.1.weight' (its shape is [3, 4], not [4, 3])"
    )
    assert lines[2:5] == [
        f"gate broken: --expect-frozen 'backbone.*': {broken}",
        "gate broken: --expect-changed 'head.*': 1 of 2 tensors is not changed, 'head.bias' (its values are equal)",
        "gate holds: --expect-changed '*.2.scale', 1 tensor",
    ]
    document = json.loads(run_ckpt(capsys, "diff", *paths, *gates, "--json").out)
    assert [(gate["gate"], gate["value"], gate["tensors"], gate["holds"]) for gate in document["values"]["gates"]] == [
        ("expect_frozen", "backbone.*", 8, False),
        ("expect_changed", "head.*", 2, False),
        ("expect_changed", "*.2.scale", 1, True),
    ]
    result = ckptkit.diff(*paths, expect_frozen="backbone.*", expect_changed=["head.*", "*.2.scale"])
    assert [(one.requirement, one.keys) for one in result.unmet] == [
        ("expect_frozen", ("backbone.0.weight", "backbone.1.weight", "backbone.2.scale")),
        ("expect_changed", ("head.bias",)),
    ]
    assert [one["keys"] for one in document["unmet"]] == [list(one.keys) for one in result.unmet]
    for text in (str(result), f"gate broken: {result.unmet[0]}"):
        assert "gate broken: expect_frozen='backbone.*': 1 of 8 tensors is not frozen" in text
    assert not result.ok
    assert ckptkit.diff(*paths, expect_changed="*.2.scale").ok
    assert not ckptkit.diff(*paths).ok


def test_what_cannot_be_compared_breaks_a_gate_and_is_not_called_equal() -> None:
    """A sparse tensor may differ: this is said, it is a difference, and it breaks the gates that are about it."""
    state = {"sparse": torch.eye(3).to_sparse(), "w": torch.ones(2)}
    result = ckptkit.diff(state, state, expect_frozen=["sparse", "w"], max_rel_l2=1)
    assert [(one.requirement, one.keys) for one in result.unmet] == [
        ("expect_frozen", ("sparse",)),
        ("max_rel_l2", ("sparse",)),
    ]
    assert result.different
    assert "1 tensor was not compared: 'sparse' (a sparse tensor)" in str(result)
    assert "max_rel_l2=1: 1 tensor is not within it, 'sparse' (not compared: a sparse tensor)" in str(result)
    for limit, text in ((math.inf, "inf"), (1e-5, "1e-5")):
        assert f"max_rel_l2={text}: 1 tensor" in str(ckptkit.diff(state, state, max_rel_l2=limit))


@pytest.mark.parametrize("option", ["--expect-frozen", "--expect-changed"])
def test_a_gate_that_matches_nothing_is_refused(option: str, saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """A typo must not look like a gate that holds; the nearest name is said."""
    paths = saved("a.safetensors", base()), saved("b.safetensors", tuned())
    ran = run_ckpt(capsys, "diff", *paths, option, "bakcbone.*")
    assert (ran.code, ran.out) == (2, "")
    assert f"{option} 'bakcbone.*' matches none of 10 keys" in ran.err
    assert "hint: did you mean 'backbone.*'?" in ran.err
    ran = run_ckpt(capsys, "diff", *paths, option, "head.*", "--keep", "backbone.*")
    assert (ran.code, ran.out) == (2, "")
    assert (
        f"{option} 'head.*' matches only keys that --keep or --drop leaves out, 'head.bias', 'head.weight'" in ran.err
    )


def test_a_gate_that_matches_nothing_is_refused_before_a_value_is_read(saved: Saved) -> None:
    """A typo costs the time to read headers."""
    read: list[int] = []
    with pytest.raises(RuleError, match="matches none"):
        ckptkit.diff(base(), saved("b.safetensors", tuned()), expect_frozen="bakcbone.*", progress=read.append)
    assert read == []


def _normalised(*, training: bool) -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if training:
        model(torch.randn(2, 3, 8, 8))
    return {f"backbone.{key}": tensor.clone() for key, tensor in model.state_dict().items()}


RENAMED_HEAD = {key.replace("head", "classifier"): tensor for key, tensor in tuned().items()}
HINTS: dict[str, tuple[State, State, dict[str, Any], str]] = {
    "buffers of BatchNorm": (
        _normalised(training=False),
        _normalised(training=True),
        {"expect_frozen": "backbone.*"},
        "3 of 3 changed tensors can be buffers of BatchNorm",
    ),
    "rounding": (
        base(),
        {key: tensor.bfloat16() for key, tensor in tuned().items()},
        {"expect_frozen": "backbone.*"},
        "rounding to BF16 can explain 8 of 8 changed tensors: compare with rtol=0.004, or give the side in BF16 first",
    ),
    "another prefix": (
        base(),
        {f"student.net.{key}": tensor for key, tensor in tuned().items()},
        {"expect_frozen": "backbone.*"},
        "all 10 keys match after rules=['student.net.*=*']",
    ),
    "a renamed head": (base(), RENAMED_HEAD, {"expect_changed": "head.*"}, "looks for rules that rename them"),
    "a real change": (base(), changed(backbone__2__scale=torch.zeros(4, 3)), {"expect_frozen": "backbone.*"}, ""),
}


@pytest.mark.parametrize(("expected", "found", "gate", "hint"), HINTS.values(), ids=HINTS.keys())
def test_a_broken_gate_says_what_may_explain_it(expected: State, found: State, gate: dict[str, Any], hint: str) -> None:
    """The hint stands below the gate, once; following it makes the gate hold."""
    result = ckptkit.diff(expected, found, **gate)
    assert not result.ok
    assert str(result).count(hint) == 1 if hint else "hint" not in str(result)


def test_the_hints_about_a_broken_gate_can_be_followed() -> None:
    """Without the buffers, with the tolerance, and with the sides swapped, the gate holds."""
    before, after = _normalised(training=False), _normalised(training=True)
    rules = ckptkit.parse_rules(drop=["*.running_*", "*.num_batches_tracked"])
    result = ckptkit.diff(before, after, rules, expect_frozen="backbone.*")
    assert (result.ok, result.gates[0].tensors, result.gates[0].left_out) == (True, 4, 3)
    assert "4 tensors, 3 left out by the rules" in str(result)
    half = {key: tensor.bfloat16() for key, tensor in tuned().items()}
    assert ckptkit.diff(base(), half, expect_frozen="backbone.*", rtol=0.004).ok
    assert ckptkit.diff(half, base(), expect_frozen="backbone.*").ok


def test_what_keep_leaves_out_is_said_and_does_not_count_for_gates() -> None:
    """Also where the other names of the file have a prefix, which the rules strip."""
    found = {f"module.{key}": tensor for key, tensor in tuned().items()}
    rules = ckptkit.parse_rules(keep=["module.backbone.*"], strip=["module."])
    result = ckptkit.diff(base(), found, rules, expect_frozen="*")
    assert (result.ok, result.gates[0].tensors, set(result.left_out)) == (True, 8, {"head.weight", "head.bias"})
    assert str(result).count("left out by the rules") == 3
    assert ckptkit.diff(base(), found, ckptkit.parse_rules(strip=["module."])).left_out == frozenset()


def test_the_worst_tensors_are_first_and_ten(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """The document has all tensors that differ, the page ten, and with ``--expand`` or ``-a`` all."""
    torch.manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(8) for i in range(14)}
    found = {key: tensor * (1 + 0.001 * (i + 1)) for i, (key, tensor) in enumerate(state.items())}
    found["layer.5.weight"] = state["layer.5.weight"]
    found["layer.3.weight"] = state["layer.3.weight"].clone().index_fill_(0, torch.tensor(1), math.inf)
    paths = saved("a.safetensors", state), saved("b.safetensors", found)
    out = run_ckpt(capsys, "diff", *paths, "--values").out
    lines = out.splitlines()
    rows = [line.split()[0] for line in lines if line.startswith("layer.")]
    assert rows == ["layer.3.weight", *(f"layer.{i}.weight" for i in range(13, 4, -1) if i != 5), "layer.4.weight"]
    assert lines[2:5] == [
        "values: 13 of 14 tensors differ",
        "  1 tensor differs in NaN or Inf",
        "  the largest relative change is 0.014, in 'layer.13.weight'",
    ]
    assert "and 3 more tensors" in lines
    for option in ("--expand", "-a"):
        everything = run_ckpt(capsys, "diff", *paths, "--values", option).out
        assert sum(line.startswith("layer.") for line in everything.splitlines()) == 13
    document = json.loads(run_ckpt(capsys, "diff", *paths, "--values", "--json").out)["values"]
    assert (document["compared"], document["equal"], len(document["different"])) == (14, 1, 13)
    assert document["different"][0]["inf"] == {"expected": 0, "found": 1}
    assert document["different"][0]["max_abs"] == "inf"
    worst = document["different"][1]
    delta = (found["layer.13.weight"] - state["layer.13.weight"]).double()
    assert worst["rel_l2"] == pytest.approx(float(delta.norm() / state["layer.13.weight"].double().norm()))


def test_change_by_layer_has_a_bar_for_each_layer(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """Each bar is the largest relative change in a layer; a layer without any change is a dot."""
    found = {**base(), "backbone.1.scale": base()["backbone.1.scale"] * 1.009}
    found["backbone.3.weight"] = base()["backbone.3.weight"] * 1.04
    paths = saved("a.safetensors", base()), saved("b.safetensors", found)
    out = run_ckpt(capsys, "diff", *paths, "--values").out
    assert "\n  backbone.{0..3}  ·▂·█  up to 0.04 in layer 3\n" in out


def test_depth_lists_modules_in_the_order_of_the_model(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """The head is there too; a module without a change has no numbers, and NaN has no size."""
    found = changed(
        backbone__1__scale=base()["backbone.1.scale"] * 1.25, backbone__2__scale=torch.full((4, 3), math.nan)
    )
    paths = saved("a.safetensors", base()), saved("b.safetensors", found)
    out = run_ckpt(capsys, "diff", *paths, "--depth", "2", "--format", "tsv").out
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows[0] == ["module", "tensors", "differ", "largest rel L2", "largest abs"]
    assert [row[:4] for row in rows[1:]] == [
        ["backbone.0", "2", "0", ""],
        ["backbone.1", "2", "1", "0.25"],
        ["backbone.2", "2", "1", "NaN or Inf"],
        ["backbone.3", "2", "0", ""],
        ["head", "2", "2", "0.5"],
    ]


def test_beside_values_other_dtypes_are_a_line(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is about values; ``--expand`` lists the keys."""
    paths = saved("a.safetensors", base()), saved("b.pt", {key: tensor.half() for key, tensor in tuned().items()})
    ran = run_ckpt(capsys, "diff", *paths, *FROZEN)
    assert "another dtype: 10 tensors F32 -> F16" in ran.out.splitlines()
    assert "≈" not in ran.out
    assert "≈" in run_ckpt(capsys, "diff", *paths, *FROZEN, "--expand").out


def test_a_model_that_is_built_for_the_comparison_may_be_random(capsys: pytest.CaptureFixture[str]) -> None:
    """Else the numbers of a new model look like those of a checkpoint."""
    ran = run_ckpt(capsys, "diff", "py:fixtures.lenet:build(num_classes=10)", "fixtures/lenet_10class.pth", "--values")
    assert "expected is built for this comparison: values that its code does not load are random" in ran.out


def test_columns_give_way_before_the_name_of_a_tensor() -> None:
    """In 80 columns, a name of usual length is whole; the units in the last place are left out first."""
    key = "model.layers.23.self_attn.q_proj.weight"
    result = ckptkit.compare_values({key: torch.ones(9)}, {key: torch.arange(9.0)})
    lines = [*as_text(fitted(values_page(result), 80))]
    assert any(line.startswith(f"{key} ") for line in lines)
    assert "rel L2    max abs    changed" in "\n".join(lines)
    assert "max ulp" not in "\n".join(lines)


def test_same_file_ranges_are_counted_without_reading(
    tmp_path: Path, saved: Saved, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link to a file, and a directory that shares a shard, have the same bytes; of a copy nothing is known."""
    one = saved("a.safetensors", base())
    os.link(one, tmp_path / "link.safetensors")
    copy = saved("copy.safetensors", base())
    line = "values were not compared; the bytes of 10 tensors are the same file range"
    assert line in run_ckpt(capsys, "diff", one, one).out.splitlines()
    assert line in run_ckpt(capsys, "diff", one, tmp_path / "link.safetensors").out.splitlines()
    assert ckptkit.diff(one, one).same_ranges == base().keys()
    assert "values were not compared: --values compares them" in run_ckpt(capsys, "diff", one, copy).out.splitlines()
    folder = tmp_path / "linked"
    folder.mkdir()
    for file in (ROOT / "fixtures" / "encoder_sharded").iterdir():
        (folder / file.name).symlink_to(file)
    shards = ckptkit.diff(ROOT / "fixtures" / "encoder_sharded", folder)
    assert shards.same_ranges == {pair.key for pair in shards.matched}
    renamed = ckptkit.diff(one, one, ["head.weight=head.weight"])
    assert renamed.to_dict()["summary"]["same_ranges"] == 10


def test_nothing_in_common_is_not_called_equal() -> None:
    """``all_equal`` needs one tensor that was compared; a diff of two empty states has no difference all the same."""
    assert not ckptkit.compare_values({"a": torch.ones(1)}, {"b": torch.ones(1)}).all_equal
    assert not ckptkit.compare_values({}, {}).all_equal
    assert not ckptkit.diff({}, {}, values=True).different


def test_without_values_no_value_is_claimed(saved: Saved) -> None:
    """Files with other values are not said to be equal; a live model is compared only on request too."""
    paths = saved("a.safetensors", base()), saved("b.safetensors", tuned())
    result = ckptkit.diff(*paths)
    assert (result.values, result.different, result.to_dict()["values"]) == (None, False, None)
    assert str(result).count("values were not compared: values=True compares them") == 1
    assert "equal" not in str(result)


def test_values_in_python(saved: Saved) -> None:
    """Page, one line, HTML and document agree; a live model and a dict are compared as files are."""
    model = nn.Linear(3, 2)
    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    assert ckptkit.diff(model, state, values=True).different is False
    state["bias"] += 1
    result = ckptkit.diff(model, saved("c.pt", state), values=True)
    assert result.values is not None
    assert (result.values.compared, result.values.equal, result.values.different[0].key) == (2, 1, "bias")
    assert result.different
    assert repr(result).endswith("0 dtype-mismatched, 1 of 2 tensors differs in values>")
    assert "values: 1 of 2 tensors differs" in str(result)
    assert "values: 1 of 2 tensors differs" in result._repr_html_()
    assert [one["key"] for one in result.to_dict()["values"]["different"]] == ["bias"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"values": "yes"}, ArgumentError),
        ({"rtol": -1}, ArgumentError),
        ({"atol": "0.1"}, ArgumentError),
        ({"expect_frozen": 3}, ArgumentError),
        ({"max_rel_l2": -0.5}, ArgumentError),
        ({"max_rel_l2": math.nan}, ArgumentError),
        ({"expect_changed": "absent.*"}, RuleError),
        ({"expect_frozen": "re:("}, RuleError),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A wrong tolerance, limit or pattern is an error, not a gate that holds."""
    model = nn.Linear(3, 2)
    with pytest.raises(error):
        ckptkit.diff(model, model, **arguments)


@pytest.mark.parametrize("option", ["--rtol", "--atol", "--max-rel-l2"])
@pytest.mark.parametrize("text", ["-1", "nan", "much"])
def test_a_size_is_a_number_of_at_least_zero(option: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is below and above nothing, so a gate of NaN would always hold; infinity allows all that has a size."""
    path = "fixtures/lenet_10class.pth"
    ran = run_ckpt(capsys, "diff", path, path, option, text)
    assert (ran.code, f"Invalid value for '{option}': '{text}' is not a number of at least 0" in ran.err) == (2, True)
    assert run_ckpt(capsys, "diff", path, path, option, "inf", "--json").code == 0


def test_a_model_without_values_is_refused() -> None:
    """Nothing is said of values that do not exist."""
    with pytest.raises(ModelError, match="has no values"):
        ckptkit.diff(nn.Linear(3, 2, device="meta"), nn.Linear(3, 2), values=True)


def test_values_through_rules_and_of_a_live_model(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """The names are those of the model, and ``found_key`` that of the file."""
    found = {f"module.{key}": tensor for key, tensor in tuned().items()}
    paths = saved("a.safetensors", base()), saved("b.pt", found)
    ran = run_ckpt(capsys, "diff", *paths, "--strip", "auto", "--values", "--json")
    different = json.loads(ran.out)["values"]["different"]
    assert {(one["key"], one["found_key"]) for one in different} == {
        ("head.weight", "module.head.weight"),
        ("head.bias", "module.head.bias"),
    }
    live = run_ckpt(capsys, "diff", "py:fixtures.lenet:build(num_classes=10)", "fixtures/lenet_10class.pth", "--values")
    assert (live.code, "values: 10 of 10 tensors differ" in live.out) == (1, True)


def test_values_that_the_own_code_of_a_model_renames() -> None:
    """Where the model loads a tensor of another name, this tensor is compared."""
    model = with_hook(rename_old)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    old = {("1.old_weight" if key == "1.weight" else key): tensor for key, tensor in state.items()}
    assert ckptkit.diff(model, old, expect_frozen="*").unmet == ()
    old["1.old_weight"] += 1
    result = ckptkit.diff(model, old, expect_frozen="*")
    assert [one.keys for one in result.unmet] == [("1.weight",)]


def test_a_tie_of_one_side_is_judged_as_its_tensor() -> None:
    """A file of a tied model has the tensor once: the gate is about the tensor, not about the second name."""
    weight = nn.Parameter(torch.randn(4, 3))
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    for layer in model.values():
        layer.weight = weight
    state = {"embedding.weight": weight.detach().clone()}
    assert ckptkit.diff(model, state, expect_frozen="*").unmet == ()
    assert "tied to embedding.weight" in str(ckptkit.diff(model, state))
    state["embedding.weight"] += 1
    result = ckptkit.diff(model, state, expect_frozen="head.*", expect_changed="*")
    assert [(one.requirement, one.keys) for one in result.unmet] == [("expect_frozen", ("head.weight",))]
    result = ckptkit.diff(state, model, expect_frozen="head.*", expect_changed="*")
    assert [(one.requirement, one.keys) for one in result.unmet] == [("expect_frozen", ("head.weight",))]
    renamed = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    state = {"embedding.weight": weight.detach().clone()}
    assert ckptkit.diff(state, renamed, ["module.*=*"], expect_frozen="*").unmet == ()
    dropped = ckptkit.diff(model, model, ckptkit.parse_rules(drop=["head.*"]), expect_frozen="head.*")
    assert (dropped.ok, dropped.gates[0].tensors, dropped.gates[0].left_out) == (True, 1, 0)
