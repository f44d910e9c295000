"""Whole commands of merges that compute with all inputs, on small files; torch and numpy compute the same anew."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers_cli import run_ckpt

SHAPES = {"layers.0.w": (4, 6), "layers.1.w": (4, 6), "head.weight": (3, 6), "norm": (6,)}


def model(seed: int, *, near: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Random tensors, or random changes of those of another model, and a counter that is the same in all."""
    noise = torch.Generator().manual_seed(seed)
    made = {key: torch.randn(shape, generator=noise) for key, shape in SHAPES.items()}
    if near is not None:
        made = {key: near[key] + 0.1 * value for key, value in made.items()}
    return {**made, "steps": torch.tensor([7])}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """A base A and two models B and C that are near it, as files of the current directory."""
    monkeypatch.chdir(tmp_path)
    base = model(0)
    made = {"A": base, "B": model(1, near=base), "C": model(2, near=base)}
    for name, tensors in made.items():
        save_file(tensors, f"{name}.safetensors")
    return made


def merged(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, torch.Tensor]:
    """Run a merge of the current directory, and return its output as safetensors reads it."""
    ran = run_ckpt(capsys, "merge", *words, "-o", "out.safetensors", "--force")
    assert (ran.code, ran.out) == (0, ""), ran.err
    return load_file("out.safetensors")


def mean_of(models: dict[str, dict[str, torch.Tensor]], **weights: float) -> dict[str, torch.Tensor]:
    """The weighted mean in float64, rounded once."""
    found = {}
    for key in SHAPES:
        total = sum(weight * models[name][key].double() for name, weight in weights.items())
        found[key] = (total / sum(weights.values())).float()  # type: ignore[union-attr]
    return found


def ties(base: torch.Tensor, others: list[torch.Tensor], weights: list[float], density: float) -> Any:
    """TIES as its paper defines it, with the elected sign of the weighted task vectors."""
    vectors = [(other - base).double().numpy() for other in others]
    kept = []
    for vector in vectors:
        count = max(1, int(density * vector.size))
        order = np.argsort(-np.abs(vector).ravel(), kind="stable")[:count]
        kept.append(np.where(np.isin(np.arange(vector.size), order).reshape(vector.shape), vector, 0))
    weighted = [weight * vector for weight, vector in zip(weights, kept, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(vector) == sign for vector in weighted]
    size = sum(weight * each for weight, each in zip(weights, agree, strict=True))
    total = sum(np.where(each, vector, 0) for each, vector in zip(agree, weighted, strict=True))
    return base.double().numpy() + np.divide(total, size, out=np.zeros_like(total), where=size != 0)


def test_ties_with_options_is_ties(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The form with options computes what the paper defines, and copies what has no floating-point numbers."""
    inputs = ["A.safetensors", "B.safetensors", "C.safetensors", "--base", "A"]
    weights = ["--weight", "B=0.6", "--weight", "C=0.4"]
    found = merged(capsys, *inputs, "--method", "ties", *weights, "--density", "0.5")
    for key in SHAPES:
        wanted = ties(models["A"][key], [models["B"][key], models["C"][key]], [0.6, 0.4], 0.5)
        np.testing.assert_allclose(found[key].numpy(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(found["steps"], models["A"]["steps"])


FORMS = {
    "weights": ["B.safetensors", "C.safetensors", "--weight", "B=3", "--weight", "C=1"],
    "path of a weight": ["B.safetensors", "C.safetensors", "--weight", "B.safetensors=3"],
    "names of inputs": ["x=B.safetensors", "y=C.safetensors", "--weight", "x=1.5", "--param", "y.weight=0.5"],
}


@pytest.mark.parametrize("words", FORMS.values(), ids=FORMS.keys())
def test_inputs_have_names(words: list[str], models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A weight belongs to the input of its name: the stem of the file, the path, or a name that is given."""
    found = merged(capsys, *words, "--method", "linear")
    wanted = mean_of(models, B=0.75, C=0.25)
    for key in SHAPES:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=1e-6)


def test_a_base_that_is_no_input_and_keys_that_are_not_merged(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """--base takes a further path, --only leaves all other keys to the base, and --dtype rounds the result once."""
    words = "B.safetensors --method task_arithmetic --base A.safetensors --weight B=1 --only layers.* --dtype BF16"
    found = merged(capsys, *words.split())
    for key in SHAPES:
        name = "B" if key.startswith("layers") else "A"
        torch.testing.assert_close(found[key], models[name][key].bfloat16(), rtol=0, atol=2e-2)
    assert torch.equal(found["norm"], models["A"]["norm"].bfloat16())


def test_an_option_of_one_input_is_named_where_it_helps(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint of an error about keys or shapes is an option that can be pasted, and with it the merge is done."""
    save_file({f"module.{key}": value for key, value in models["B"].items()}, "P.safetensors")
    save_file({**models["B"], "head.weight": torch.ones(4, 6)}, "S.safetensors")
    for name, option in (("P", "P.strip=module."), ("S", "S.on_mismatch=slice")):
        words = ["A.safetensors", f"{name}.safetensors", "--method", "average"]
        ran = run_ckpt(capsys, "merge", *words, "-o", f"{name}.pt")
        assert (ran.code, f"--param '{option}'" in ran.err) == (2, True), ran.err
        found = merged(capsys, *words, "--param", option)
        torch.testing.assert_close(found["norm"], mean_of(models, A=1, B=1)["norm"], rtol=0, atol=1e-6)
    more = {f"module.{key}": value for key, value in models["B"].items()} | {"cls.weight": torch.ones(2)}
    for name in ("Q", "R"):
        save_file(more, f"{name}.safetensors")
    words = ["A.safetensors", "Q.safetensors", "R.safetensors", "--method", "average"]
    options = ["--param", "Q.rename=module.*=*", "--param", "R.rename=module.*=*"]
    ran = run_ckpt(capsys, "merge", *words, "-o", "Q.pt")
    assert f"those of 'A' with {shlex.join(options)}" in ran.err
    ran = run_ckpt(capsys, "merge", *words, "-o", "Q.pt", "--param", "Q.strip=module.")
    assert f"hint: {shlex.join(options[:2])} in place of strip" in ran.err
    ran = run_ckpt(capsys, "merge", *words, "-o", "Q.pt", "--param", "Q.rename=modul.*=*")
    assert ran.err.endswith("hint: did you mean 'module.*=*'?\n")
    ran = run_ckpt(capsys, "merge", *words, "-o", "Q.pt", "--param", "Q.rename=module.*=x.*")
    assert ("Q.strip" not in ran.err, "Q.rename" not in ran.err, options[3] in ran.err) == (True, True, True)
    found = merged(capsys, *words, *options, "--param", "on_missing=drop")
    torch.testing.assert_close(found["norm"], mean_of(models, A=1, B=2)["norm"], rtol=0, atol=1e-6)


RECIPE = """\
version = 1
method = "linear"

[[input]]
path = "B.safetensors"

[[input]]
path = "C.safetensors"

[[set]]
keys = "layers.{i:int}.*"
inputs.B.weight = { over = "i", values = [1, 0] }
inputs.C.weight = { over = "i", values = [0, 1] }
"""


def test_a_recipe_is_written_back(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe merges as it says, the output has it, and what --again writes merges to the same bytes."""
    Path("merge.toml").write_text(RECIPE, encoding="utf-8")
    found = merged(capsys, "--recipe", "merge.toml")
    assert torch.equal(found["layers.0.w"], models["B"]["layers.0.w"])
    assert torch.equal(found["layers.1.w"], models["C"]["layers.1.w"])
    torch.testing.assert_close(found["norm"], mean_of(models, B=1, C=1)["norm"], rtol=0, atol=1e-6)
    first = Path("out.safetensors").read_bytes()
    printed = run_ckpt(capsys, "merge", "--again", "out.safetensors")
    ran = run_ckpt(capsys, "merge", "--again", "out.safetensors", "-o", "again.toml")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert Path("again.toml").read_text(encoding="utf-8") == printed.out
    assert tomllib.loads(printed.out)["set"] == tomllib.loads(RECIPE)["set"]
    merged(capsys, "--recipe", "again.toml")
    assert Path("out.safetensors").read_bytes() == first


def test_without_a_recipe_in_the_output(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """--no-recipe writes neither names nor parameters, and --again then says that there is no recipe."""
    del models
    merged(capsys, "A.safetensors", "B.safetensors", "--method", "average", "--no-recipe")
    with safe_open("out.safetensors", "pt") as file:
        text = file.metadata()["ckptkit.merge"]
    assert "safetensors" not in text
    assert "average" not in text
    ran = run_ckpt(capsys, "merge", "--again", "out.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert "written with --no-recipe" in ran.err


WRONG = {
    "no method": (["--method", "tis"], "hint: did you mean ties?"),
    "no parameter": (["--method", "slerp", "--param", "tt=1"], "slerp has no parameter 'tt'"),
    "no weight": (["--method", "sce", "--base", "A", "--weight", "B=1"], "sce has no parameter 'weight'"),
    "its parameters": (["--method", "sce", "--base", "A", "--weight", "B=1"], "hint: it has select_topk"),
    "none of one input": (["--method", "linear", "--param", "B.density=1"], "linear has no parameter 'density'"),
    "wide epsilon": (
        ["--method", "della", "--base", "A", "--weight", "B=1", "--density", "0.9"],
        "hint: with this density, epsilon must be below 0.1",
    ),
    "no input": (["--method", "linear", "--weight", "D=1"], "--weight: there is no input 'D'"),
    "no base": (["--method", "ties", "--weight", "A=1"], "ties needs a base"),
    "weight without a default": (["--method", "ties", "--base", "A"], "such as --param 'B.weight=0.5'"),
    "not a base": (["--method", "ties", "--base", "AA"], "'AA', which is neither the name of an input nor a path"),
    "out of range": (["--method", "ema", "--param", "decay=1"], "decay is 1, and must be"),
    "wrong count": (["--method", "add_difference"], "add_difference merges 3 inputs, and there are 2"),
    "given twice": (["--method", "slerp", "--param", "t=0", "--param", "t=1"], "t is given already, as 0"),
    "no recipe": (["--method", "slerp", "--again", "A.safetensors"], "no meaning with --again"),
    "other method": (["--method", "slerp", "--scale", "2"], "--scale has no meaning with --method slerp"),
    "overlay": (["--density", "0.5"], "--density has no meaning with --method overlay"),
    "other rules": (["--method", "linear", "--strip", "auto"], "linear: --param NAME.strip=PREFIX is for one"),
    "other shapes": (["--method", "linear", "--on-mismatch", "slice"], "linear: --param NAME.on_mismatch=ACTION is"),
    "a key of one input": (["--method", "linear", "--param", "A.keep=x"], "hint: --only chooses keys of all inputs"),
    "own option": (["--method", "linear", "--param", "out_dtype=BF16"], "hint: --dtype sets it"),
    "recipe and method": (["--recipe", "merge.toml", "--method", "ties"], "--method has no meaning with --recipe"),
    "recipe and paths": (["--recipe", "merge.toml"], "the file names all inputs: leave 'A.safetensors' out"),
    "print alone": (["--print"], "--print writes the recipe of a file, so it needs --from-mergekit"),
    "again and method": (["--again", "A.safetensors", "--method", "ties"], "no meaning with --again"),
    "cancelling": (
        ["--method", "linear", "--weight", "A=1", "--weight", "B=-1"],
        "the weights (1, -1) cancel: their sum is 0",
    ),
}


@pytest.mark.parametrize(("words", "told"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(
    words: list[str], told: str, models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Words that do not go together are an error with exit code 2 before anything is written."""
    del models
    Path("merge.toml").write_text(RECIPE, encoding="utf-8")
    before = sorted(Path().iterdir())
    ran = run_ckpt(capsys, "merge", "A.safetensors", "B.safetensors", "-o", "out.safetensors", *words)
    assert (ran.code, ran.out, sorted(Path().iterdir())) == (2, "", before)
    assert told in ran.err


def test_an_error_of_a_recipe_names_its_line(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The one line on stderr has the file and the line of the recipe, and nothing is written."""
    del models
    Path("merge.toml").write_text(RECIPE.replace("layers.{i:int}", "layer.{i:int}"), encoding="utf-8")
    ran = run_ckpt(capsys, "merge", "--recipe", "merge.toml", "-o", "out.safetensors")
    assert (ran.code, ran.out, Path("out.safetensors").exists()) == (2, "", False)
    assert ran.err.startswith("ckpt: merge.toml: line 10: 'layer.{i:int}.*' fits none of")


def test_a_configuration_of_mergekit(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """--print writes the recipe that means the same; without it the merge is done, to the same bytes."""
    del models
    pytest.importorskip("ruamel.yaml")
    text = "merge_method: slerp\nbase_model: A.safetensors\nmodels: [{model: B.safetensors}]\n"
    Path("merge.yml").write_text(f"{text}parameters: {{t: 0.25}}\ntokenizer_source: base\n", encoding="utf-8")
    printed = run_ckpt(capsys, "merge", "--from-mergekit", "merge.yml", "--print")
    assert printed.code == 0
    assert tomllib.loads(printed.out)["method"] == "slerp"
    assert "line 5: tokenizer_source has no equal" in printed.err
    Path("merge.toml").write_text(printed.out, encoding="utf-8")
    merged(capsys, "--recipe", "merge.toml")
    first = Path("out.safetensors").read_bytes()
    merged(capsys, "--from-mergekit", "merge.yml")
    assert Path("out.safetensors").read_bytes() == first


def test_a_dry_run_is_the_plan(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """--json of a dry run has every key of the output with its inputs, and nothing is written."""
    words = ["merge", "A.safetensors", "B.safetensors", "--method", "average", "-o", "out.safetensors", "-n"]
    document = json.loads(run_ckpt(capsys, *words, "--json").out)
    assert {row["key"] for row in document["plan"]} == set(models["A"])
    assert not Path("out.safetensors").exists()


def test_the_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """--help-methods needs no other argument, and says of each method its paper, inputs and parameters."""
    ran = run_ckpt(capsys, "merge", "--help-methods")
    assert ran.code == 0
    start = ran.out.index("\nties\n")
    block = ran.out[start : ran.out.index("\ndare_linear\n")]
    assert "1 input or more and a base; TIES-Merging, arXiv 2306.01708" in block
    assert "density    a number from 0 to 1              required          share of the elements" in block
    assert run_ckpt(capsys, "merge", "--help-methods", "ties").out == block.removeprefix("\n")
    wrong = run_ckpt(capsys, "merge", "--help-methods", "tie")
    assert (wrong.code, "did you mean ties?" in wrong.err) == (2, True)


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "folder"])
def test_show_prints_the_recipe(name: str, models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The page has the method and each input in short; the JSON document has all of it."""
    del models
    words = ["A.safetensors", "B.safetensors", "--method", "linear", "--weight", "B=0.25", "--only", "layers.*"]
    more = ["--max-shard-size", "1MB"] if name == "folder" else []
    assert run_ckpt(capsys, "merge", *words, *more, "-o", name).code == 0
    page = run_ckpt(capsys, "show", name).out
    assert "\nmerged by linear, only layers.*\n" in page
    assert re.search(r"\nB +B\.safetensors +[0-9. kB]+  weight 0\.25\n", page)
    assert "ckptkit.merge" not in page
    document = json.loads(run_ckpt(capsys, "show", name, "--json").out)["merge"]
    assert document["recipe"]["input"][1] == {"name": "B", "path": "B.safetensors", "weight": 0.25}
    assert document["inputs"]["A"]["tensors"] == len(SHAPES) + 1


def test_show_names_the_base_that_is_no_input(models: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """A base that is given by its path comes first."""
    del models
    words = ["B.safetensors", "C.safetensors", "--method", "ties", "--base", "A.safetensors", "--param", "weight=0.5"]
    assert run_ckpt(capsys, "merge", *words, "--density", "1", "-o", "ties.safetensors").code == 0
    page = run_ckpt(capsys, "show", "ties.safetensors").out
    assert re.search(r"\nA \(base\) +A\.safetensors .*\nB +B\.safetensors ", page)


ODD = [
    "", "[]", "{}", "NaN", '{"recipe": NaN}', '{"recipe": {"input": [1, {"name": [], "weight": {"a": "\\u001b"}}]}}',
    '{"recipe": {"method": "\\u202e", "set": 3}, "inputs": [1]}', '{"inputs": {"a": {"size": -1}}, "recipe": {"a": 1}}',
    '{"recipe": {"input": [{"name": "a"}]}, "inputs": {"a": {"size": true, "file": {}}}}', "1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_show_trusts_nothing_that_a_file_says_of_its_merge(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever stands where a recipe is expected, the page and the document are printed, without control characters."""
    path = tmp_path / "odd.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"ckptkit.merge": text})
    page = run_ckpt(capsys, "show", path)
    assert (page.code, page.err, page.out.replace("\n", "").isprintable()) == (0, "", True)
    assert run_ckpt(capsys, "show", path, "--json").code == 0


def test_a_dry_run_has_the_parameters_of_each_tensor(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a gradient gives layers other weights, each has its own row; equal ones are joined; all are counted."""
    del models
    recipe = RECIPE.replace("[0, 1]", "[1, 0.5]") + '[[set]]\nkeys = "norm"\ntake = "C"\n'
    Path("merge.toml").write_text(recipe, encoding="utf-8")
    ran = run_ckpt(capsys, "merge", "--recipe", "merge.toml", "-o", "out.safetensors", "-n")
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in ran.out.splitlines()}
    assert rows["layers.0.w"] == "linear"
    assert rows["layers.1.w"] == "linear: weight B=0 C=0.5"
    last = ran.out.splitlines()[-1]
    assert last.startswith("5 tensors, 296 B: ")
    for part in ("3 merged by linear", "1 taken from C", "1 equal in all inputs", "1 tensor left out"):
        assert part in last
    document = json.loads(run_ckpt(capsys, "merge", "--recipe", "merge.toml", "-o", "o.pt", "-n", "--json").out)
    found = {row["key"]: row["merge"] for row in document["plan"]}
    assert found["norm"] is None
    assert found["layers.1.w"] == {
        "method": "linear", "base": None, "inputs": ["B", "C"], "parameters": {"weight": [0.0, 0.5], "normalize": True}
    }  # fmt: skip
    assert document["summary"]["by_method"] == {"linear": 3}


def test_a_file_that_is_carried_is_not_left_out_of_another_input(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each input has a configuration: the output has that of the first one, and the report names it once.

    The recipe beside a torch file is made, and not carried.
    """
    for name in "AB":
        Path(name).mkdir()
        save_file(models[name], f"{name}/model.safetensors")
        Path(name, "config.json").write_text(f'{{"of": "{name}"}}', encoding="utf-8")
    Path("B", "trainer_state.json").write_text("{}", encoding="utf-8")
    Path("out").mkdir()
    ran = run_ckpt(capsys, "merge", "A", "B", "--method", "average", "-o", "out/pytorch_model.bin", "--carry")
    assert (ran.code, json.loads(Path("out/config.json").read_text())) == (0, {"of": "A"}), ran.err
    assert ", 1 entry left out\n" in ran.err
    assert "left out, stored outside of the weights: trainer_state.json\n" in ran.err
    assert "carried along: config.json\n" in ran.err
    assert "written beside the weights: pytorch_model.bin.merge.json\n" in ran.err


def test_what_is_not_merged_has_one_line_for_each_input(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys that --only leaves to the first input are counted; those that no tensor of the output replaces are named.

    The document, and the page with --expand, have every key.
    """
    save_file({**models["B"], "extra": torch.ones(1)}, "B.safetensors")
    words = ["A.safetensors", "B.safetensors", "--base", "C.safetensors", "--method", "linear", "--only", "layers.*"]
    ran = run_ckpt(capsys, "merge", *words, "-o", "out.safetensors")
    assert (ran.code, ran.out) == (0, "")
    lines = [re.split("  +", line) for line in ran.err.splitlines()]
    assert ["extra", "B", "not in --only, and 'C' does not have it"] in lines
    for row in (["3 tensors", "A", "not in --only"], ["3 tensors", "B", "not in --only"],
                ["2 tensors", "C", "not an input of linear"]):  # fmt: skip
        assert row in lines
    assert "head.weight" not in ran.err
    document = json.loads(run_ckpt(capsys, "merge", *words, "-o", "o.pt", "-n", "--json").out)
    assert {"role": "B", "key": "head.weight", "reason": "not in --only"} in document["dropped"]
    assert len(document["dropped"]) == 9
    assert "head.weight" in run_ckpt(capsys, "merge", *words, "-o", "o.safetensors", "-n", "--expand").out


def test_weights_in_a_row_are_named_after_the_inputs(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The options in the hint give each input the weight at its place."""
    words = ["A.safetensors", "B.safetensors", "--method", "linear"]
    ran = run_ckpt(capsys, "merge", *words, "-o", "out.safetensors", "--weight", "0.25", "0.75")
    options = shlex.split(ran.err.partition("hint: ")[2])
    assert options == ["--weight", "A=0.25", "--weight", "B=0.75"]
    expected = mean_of(models, A=0.25, B=0.75)
    torch.testing.assert_close(merged(capsys, *words, *options)["norm"], expected["norm"])


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ({"extra": torch.ones(1)}, "--param on_missing=base, present or drop; or --only PATTERN"),
        ({"steps": torch.tensor([7, 8])}, "--param non_float=base, first or max chooses one"),
        ({"steps": torch.tensor([8])}, "--param non_float=max, base or first"),
        ({"head.weight": torch.full((3, 6), torch.nan)}, "--param on_nonfinite=allow, or in a recipe"),
    ],
    ids=["missing", "no float", "no float, other values", "not finite"],
)
def test_hints_name_options_where_there_is_no_recipe(
    more: dict[str, torch.Tensor], hint: str, models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a recipe would have in a line is given by --param on the command line."""
    save_file({**models["B"], **more}, "B.safetensors")
    ran = run_ckpt(capsys, "merge", "A.safetensors", "B.safetensors", "--method", "average", "-o", "out.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert f"hint: {hint}" in ran.err
    if "on_nonfinite" in hint:
        words = ("A.safetensors", "B.safetensors", "--method", "average")
        assert merged(capsys, *words, "--param", "on_nonfinite=allow")["head.weight"].isnan().all()
        made = merged(capsys, *words, "--param", "on_nonfinite=base")["head.weight"]
        assert torch.equal(made, models["A"]["head.weight"])
