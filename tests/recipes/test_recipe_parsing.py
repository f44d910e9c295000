"""A recipe is read as a value; every fault that needs no input is one sentence with the line of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptkit.core.toml_lines import toml_lines
from ckptkit.errors import RecipeError, RuleError
from ckptkit.plans.recipes.model import CopiedKeys, Gradient, MergeRecipe, RecipeInput, Setting, Slice
from ckptkit.plans.recipes.options import recipe_from_options
from ckptkit.plans.recipes.parse import parse_recipe, recipe_from_text
from ckptkit.plans.recipes.writing import dump_recipe, recipe_table

TWO = """
[[input]]
name = "A"
path = "a.safetensors"
[[input]]
name = "B"
path = "b.safetensors"
"""
LINEAR = f'version = 1\nmethod = "linear"{TWO}'  # 8 lines; [[input]] B is line 6

BLOCKS = """version = 1
method = "linear"
only = ["model.diffusion_model.*"]
copy = [{ keys = "*.bias", from = "B" }]
normalize = false
out_dtype = "bfloat16"
[[input]]
name = "A"
path = "a.safetensors"
strip = "module."
rename = ["x.*=y.*"]
on_mismatch = "pad"
[[input]]
name = "B"
path = "b.safetensors"
weight = 0.25
dequantize = true
lora = "adapter/"
lora_scale = 0.5
[[set]]
keys = "model.diffusion_model.input_blocks.{i:int}.*"
inputs.A.weight = { over = "i", values = [1, 0.5, 0] }
[[set]]
keys = ["*.norm", "*.head"]
take = "B"
[[set]]
keys = "*"
method = "average"
"""


def test_a_recipe_is_the_value_that_its_text_describes() -> None:
    assert recipe_from_text(BLOCKS) == MergeRecipe(
        "linear",
        (
            RecipeInput("A", "a.safetensors", strip=("module.",), rename=("x.*=y.*",), on_mismatch="pad"),
            RecipeInput(
                "B", "b.safetensors", {"weight": 0.25}, dequantize=True, lora="adapter/", lora_scale=0.5, number=1
            ),
        ),
        parameters={"normalize": False},
        settings=(
            Setting(
                ("model.diffusion_model.input_blocks.{i:int}.*",),
                inputs={"A": {"weight": Gradient("i", (1, 0.5, 0))}},
            ),
            Setting(("*.norm", "*.head"), take="B"),
            Setting(("*",), method="average"),
        ),
        only=("model.diffusion_model.*",),
        copy=(CopiedKeys(("*.bias",), "B"),),
        out_dtype="BF16",
    )


SLICES = """method = "passthrough"
base = "m"
layer_keys = "model.layers.{i:int}.*"
[[input]]
name = "m"
path = "mistral/"
[[slice]]
input = "m"
layers = [0, 24]
[[slice]]
input = "m"
layers = [8, 32]
scale = 0.5
"""
BASE_BY_PATH = f'method = "linear"\nbase = "models/base/"{TWO}'


@pytest.mark.parametrize("text", [BLOCKS, SLICES, BASE_BY_PATH, LINEAR], ids=["blocks", "slices", "base path", "plain"])
def test_a_recipe_that_is_written_is_read_back_as_the_same(text: str, tmp_path: Path) -> None:
    recipe = recipe_from_text(text)
    written = tmp_path / "recipe.toml"
    written.write_text(dump_recipe(recipe), encoding="utf-8")
    assert parse_recipe(written) == parse_recipe(recipe_table(recipe)) == parse_recipe(recipe) == recipe


def test_a_base_that_is_a_path_is_a_further_input_with_its_name() -> None:
    recipe = recipe_from_text(BASE_BY_PATH)
    assert ([each.name for each in recipe.inputs], recipe.base) == (["base", "A", "B"], "base")


def test_slices_have_their_layers() -> None:
    assert recipe_from_text(SLICES).slices == (Slice("m", (0, 24)), Slice("m", (8, 32), {"scale": 0.5}))


def test_the_files_of_a_path_with_wildcards_are_inputs_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (1, 2, 5, 10, 20, 100):
        (tmp_path / f"step_{number}.safetensors").touch()
    content = {"method": "average", "input": [{"path": f"{tmp_path}/step_*.safetensors", "every": 2, "last": 2}]}
    assert [each.name for each in parse_recipe(content).inputs] == ["step_10", "step_100"]
    content = {"method": "average", "input": [{"path": f"{tmp_path}/step_*.safetensors"}]}
    names = [each.name for each in parse_recipe(content).inputs]
    assert names == ["step_1", "step_2", "step_5", "step_10", "step_20", "step_100"]
    content = {"method": "average", "input": [{"path": f"{tmp_path}/step_*.safetensors::ema", "last": 2}]}
    assert [(each.name, each.path) for each in parse_recipe(content).inputs] == [
        (name, f"{tmp_path}/{name}.safetensors::ema") for name in ("step_20", "step_100")
    ]


def with_input(line: str) -> str:
    return LINEAR + line  # line 9


def with_set(lines: str) -> str:
    return f"{LINEAR}[[set]]\n{lines}"  # [[set]] is line 9


def test_single_brackets_are_answered_with_double_ones() -> None:
    with pytest.raises(RuleError, match=r"Cannot declare \('input',\) twice") as refused:
        recipe_from_text("method = 'linear'" + TWO.replace("[[input]]", "[input]"))
    assert refused.value.hint == "write [[input]], in double brackets, for each of several tables"


WRONG = {
    "unknown key": ("normalise = true\n" + LINEAR, 1, "unknown key 'normalise'", "did you mean 'normalize'?"),
    "unknown key of an input": (with_input("wieght = 1"), 9, "unknown key 'wieght'", "did you mean 'weight'?"),
    "unknown key of a set": (with_set('keys = "*"\nweigth = 1'), 11, "unknown key 'weigth'", "mean 'weight'?"),
    "a key in the wrong table": (with_input("normalize = true"), 9, "unknown key 'normalize'", "write it at the top"),
    "a field of the top in a set": (with_set('keys = "*"\nseed = 1'), 11, "unknown key 'seed'", "at the top"),
    "unknown tables": (LINEAR + "[[sets]]\nkeys = '*'", 9, "unknown key 'sets'", "did you mean 'set'?"),
    "unknown table in a table": (LINEAR + "[sets.all]\nkeys = '*'", 9, "unknown key 'sets'", "did you mean 'set'?"),
    "version": ("version = 2\nmethod = 'linear'" + TWO, 1, "version is 2, and recipes have version 1", None),
    "no method": (TWO, None, "the recipe names no method", "linear"),
    "of mergekit": (f"merge_method = 'linear'\n{TWO}", None, "the recipe names no method", "--from-mergekit FILE"),
    "unknown method": ("method = 'lineer'" + TWO, 1, "there is no method 'lineer'", "did you mean 'linear'?"),
    "too few inputs": ("\nmethod = 'linear'", 2, "linear merges at least 1 input, and there are 0", None),
    "too many inputs": (
        "method = 'slerp'\nt = 0.5" + TWO + "[[input]]\nname = 'C'", 1, "slerp merges 2 inputs, and there are 3",
        "multislerp and karcher merge more",
    ),
    "one input beside the base": (
        "method = 'nearswap'\nt = 1\nbase = 'A'" + TWO + "[[input]]\nname = 'C'", 1,
        "nearswap merges 1 input beside the base, and there are 2", None,
    ),
    "no base": ("method = 'nearswap'\nt = 1" + TWO, 1, "nearswap needs a base", 'base = "NAME"'),
    "a parameter of the base": (
        "method = 'nuslerp'\nbase = 'A'" + TWO + "weight = 2\n[[input]]\nname = 'C'\n[[set]]\nkeys = '*'\n"
        "inputs.A.weight = 2", 14, "weight of 'A' has no effect, because it is the base of nuslerp", None,
    ),
    "a parameter that must be given": ("method = 'slerp'" + TWO, 1, "slerp needs t", "such as t = 0.5"),
    "out of range": (
        "method = 'ema'\ndecay = 1" + TWO, 2, "decay is 1, and must be a number of at least 0 and below 1", None,
    ),
    "out of range in a gradient": (
        "method = 'ema'" + TWO + "[[set]]\nkeys = 'l.{i:int}'\ndecay = { over = 'i', values = [0, 2] }", 10,
        "decay is 2, and must be a number of at least 0 and below 1", None,
    ),
    "two of one name": (LINEAR + "[[input]]\nname = 'A'\npath = 'c'", 9, "two inputs have the name 'A'", "name = "),
    "two of one stem": (LINEAR + "[[input]]\npath = 'x/A.pt'", 9, "two inputs have the name 'A'", "name = "),
    "no name and no path": (LINEAR + "[[input]]", 9, "an [[input]] has neither a name nor a path", None),
    "base that is nothing": ("base = 'AA'\n" + LINEAR, 1, "base is 'AA', which is neither the name of", "mean 'A'?"),
    "not a number": (with_input("weight = 'much'"), 9, "weight is 'much', and must be a number", None),
    "not a value": (with_input("weight = [1, 2]"), 9, "weight is a list, and must be one value", "a gradient is"),
    "not finite": (with_input("weight = inf"), 9, "weight is inf, and must be a number", None),
    "not a flag": ("normalize = 1\n" + LINEAR, 1, "normalize is 1, and must be true or false", None),
    "a choice": ("compute = 'float16'\n" + LINEAR, 1, "compute is the string 'float16', and must be", "float"),
    "dtype": ("out_dtype = 'half'\n" + LINEAR, 1, "out_dtype: unknown dtype 'half'", "F16"),
    "seed": ("seed = -1\n" + LINEAR, 1, "seed is -1, and must be an integer from 0", None),
    "device": ("device = 'cuda'\n" + LINEAR, 1, "device is 'cuda', and merges are computed on the CPU", None),
    "pattern": ("only = 'a.{'\n" + LINEAR, 1, "only: 'a.{' has a brace that is not part of a capture", "re:"),
    "gradient without a capture's name": (with_input("weight = { values = [1] }"), 9, "does not say over what", "over"),
    "gradient without values": (with_input("weight = { over = 'i' }"), 9, "has no list of values", "values ="),
    "gradient of text": (with_input("weight = { over = 'i', values = ['a'] }"), 9, "which is not a number", None),
    "gradient with another key": (with_input("weight = { over = 'i', value = 1 }"), 9, "unknown key", "'values'?"),
    "gradient of a flag": ("normalize = { over = 'i', values = [1] }\n" + LINEAR, 1, "cannot be a gradient", None),
    "gradient of an input": (
        with_input("weight = { over = 'i', values = [0, 1] }"), 9, "weight is a gradient, which needs", "[[set]]",
    ),
    "gradient over another capture": (
        with_set("keys = 'l.{n:int}.*'\nweight = { over = 'i', values = [0, 1] }"), 11, "goes over 'i'", "{i:int}",
    ),
    "gradient over a capture of text": (
        with_set("keys = ['l.{i}.*']\nweight = { over = 'i', values = [0, 1] }"), 11, "has no {i:int}", "{i:int}",
    ),
    "set without keys": (with_set("weight = 1"), 9, "a [[set]] has no keys", 'keys = "'),
    "set of nothing": (with_set("keys = '*'"), 9, "a [[set]] sets nothing", "take"),
    "take and a value": (with_set("keys = '*'\ntake = 'A'\nweight = 1"), 11, "take excludes a method", "leave out"),
    "take from nobody": (with_set("keys = '*'\ntake = 'C'"), 11, "there is no input 'C'", "'A', 'B'"),
    "set of an unknown input": (
        with_set("keys = '*'\ninputs.b.weight = 1"), 11, "there is no input 'b'", "did you mean 'B'?",
    ),
    "set of an unknown method": (with_set("keys = '*'\nmethod = 'avrage'"), 11, "no method 'avrage'", "'average'?"),
    "parameter of another method": (
        with_set("keys = '*'\nmethod = 'average'\nweight = 1"), 12, "unknown key 'weight'", None,
    ),
    "copy from nobody": ("copy = [{ keys = '*', from = 'C' }]\n" + LINEAR, 1, "there is no input 'C'", "'A', 'B'"),
    "copy without keys": ("copy = [{ from = 'A' }]\n" + LINEAR, 1, "an item of copy needs keys and from", "copy ="),
    "slice of another method": (LINEAR + "[[slice]]\ninput = 'A'\nlayers = [0, 1]", 9, "needs passthrough", None),
    "layer_keys without a slice": ("layer_keys = 'x'\n" + LINEAR, 1, "layer_keys without a [[slice]]", None),
    "slice without layer_keys": (SLICES.replace("layer_keys", "#"), 6 + 1, "slices need layer_keys", "layer_keys ="),
    "layers that are none": (SLICES.replace("[8, 32]", "[8, 8]"), 12, "layers [8, 8) are none", "layers ="),
    "layers that are no pair": (SLICES.replace("[8, 32]", "8"), 12, "layers must be two integers", "layers ="),
    "on_mismatch": (with_input("on_mismatch = 'padd'"), 9, "on_mismatch is 'padd'", "did you mean 'pad'?"),
    "lora_scale alone": (with_input("lora_scale = 2"), 9, "lora_scale without lora has no effect", None),
    "last without wildcards": (with_input("last = 2"), 9, "last chooses among the files", None),
    "no file for wildcards": (LINEAR + "[[input]]\npath = 'no/such/*.pt'", 10, "no file fits 'no/such/*.pt'", None),
    "a recipe as an input": (with_input("recipe = 'first.toml'"), 9, "recipe is not supported in a recipe yet", "path"),
    "vocab": ("vocab = { 'x' = 'base' }\n" + LINEAR, 1, "vocab is not supported in a recipe yet", "pad or slice"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused_with_its_line(name: str) -> None:
    text, line, reason, hint = WRONG[name]
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(text, path="recipe.toml")
    error = caught.value
    assert error.path == "recipe.toml"
    assert reason in error.reason
    assert error.reason.startswith(f"line {line}: ") if line else not error.reason.startswith("line")
    assert hint is None or hint in (error.hint or "")
    assert "\n" not in str(error)


def test_a_recipe_without_lines_names_the_number_of_the_table() -> None:
    content = {"method": "linear", "input": [{"path": "a.pt"}, {"path": "b.pt", "weight": "x"}]}
    with pytest.raises(RecipeError, match=r"^\[\[input\]\] 2: weight is 'x'"):
        parse_recipe(content)


def test_options_make_a_recipe() -> None:
    recipe = recipe_from_options(
        "linear", ["x/a.safetensors", "B=b.pt"], weights=["a=0.5"], parameters=["normalize=false", "B.weight=-1"]
    )
    assert recipe == parse_recipe(
        {
            "method": "linear",
            "normalize": False,
            "input": [{"path": "x/a.safetensors", "weight": 0.5}, {"name": "B", "path": "b.pt", "weight": -1}],
        }
    )


@pytest.mark.parametrize(
    ("inputs", "base", "names"),
    [
        (["run 1.ckpt::model", "run 2.ckpt::model"], "", ["run 1", "run 2"]),
        (["1.pth.tar", "2.pth.tar"], "", ["1", "2"]),
        (["r/1/x.ckpt::model", "r/2/x.ckpt::model", "c.pt::ema"], "", ["1", "2", "ema"]),
        (["a/model.safetensors", "b/model.safetensors"], "base/model.safetensors", ["model", "a", "b"]),
        (["a/x/m.pt", "b/x/m.pt", "s3://m/m.pt"], "", ["a", "b", "m"]),
        (["x.pt", "d/x.pt", "d=y.pt"], "", None),
        (["x.pt", "./x.pt"], "", None),
        (["hf:org/name", "hf:team/name"], "", ["org", "team"]),
    ],
)
def test_inputs_of_one_name_have_the_names_of_their_files_or_folders(
    inputs: list[str], base: str, names: list[str] | None
) -> None:
    """Each name sets a weight. Where no part of the paths tells them apart, the error asks for names."""
    if names is None:
        with pytest.raises(RecipeError, match="two inputs have the name") as caught:
            recipe_from_options("linear", inputs)
        assert "NAME=PATH gives another name" in str(caught.value.hint)
        return
    recipe = recipe_from_options("linear", inputs, base=base, weights=[f"{name}=2" for name in names[bool(base) :]])
    assert [each.name for each in recipe.inputs] == names
    assert [dict(each.parameters) for each in recipe.inputs[bool(base) :]] == [{"weight": 2}] * len(inputs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": ["C=1"]}, "--weight: there is no input 'C'"),
        ({"weights": ["0.5"]}, "--weight '0.5' is not of the form NAME=VALUE"),
        ({"parameters": ["densiti=1"]}, "linear has no parameter 'densiti'"),
        ({"parameters": ["a.weight=x"]}, "weight is 'x', and must be a number"),
        ({"base": "nobody"}, "base is 'nobody', which is neither the name of an input nor a path"),
    ],
)
def test_wrong_options_are_refused_in_their_own_words(options: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_options("linear", ["a.pt", "b.pt"], **options)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_lines_are_those_of_keys_and_tables_and_not_of_text_that_looks_alike() -> None:
    text = 'a = """\n[[set]]\n"""\n\n[[set]] # one\nkeys = [\n "[x]",\n]\nb.c = 1\n[[set]]\n[set."x y"]\nz = 1\n'
    assert toml_lines(text) == {
        ("a",): 1,
        ("set", 0): 5,
        ("set", 0, "keys"): 6,
        ("set", 0, "b"): 9,
        ("set", 0, "b", "c"): 9,
        ("set", 1): 10,
        ("set", 1, "x y"): 11,
        ("set", 1, "x y", "z"): 12,
    }
