"""``ckpt align`` writes only correct rules, and no rule for tensors that names and shapes cannot decide."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptkit import Alignment, execute, load_into, plan_remap, preset_rules, suggest_rules
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.errors import PlanError
from ckptkit.render.page import Hint, Line, as_text
from ckptkit.render.page.width import fitted
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import Derivation, Rules
from ckptkit.rules.parse import parse_rules
from tests.helpers_cli import run_ckpt
from tests.helpers_outputs import same_state, tensor_of
from tests.naming import bert, gpt2, llama, resnet, vit, whisper
from tests.naming.resnet import Shapes

State = dict[str, torch.Tensor]


def infos(shapes: Shapes) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, "F32", shape) for key, shape in shapes.items()}


def aligned(expected: Shapes, found: Shapes) -> Alignment:
    return suggest_rules(infos(expected), infos(found))


def renames(result: Alignment) -> dict[str, str]:
    """Return the found keys that are renamed one by one, with their new names."""
    return {taken[0]: key for one in result.suggestions for key, taken in one.keys.items() if len(taken) == 1}


PUBLISHED: dict[str, tuple[str, str, Shapes, Shapes, float]] = {
    # id: (preset, its opposite, old names, new names, the least share of the elements to be explained)
    "resnet50": (
        "resnet-torchvision-to-detectron2", "resnet-detectron2-to-torchvision",
        resnet.torchvision(), resnet.detectron2(), 1,
    ),
    "resnet18": (
        "resnet-torchvision-to-detectron2", "resnet-detectron2-to-torchvision",
        resnet.torchvision((2, 2, 2, 2), bottleneck=False), resnet.detectron2((2, 2, 2, 2), bottleneck=False), 1,
    ),
    "bert": ("bert-hf-to-original", "bert-original-to-hf", bert.hf(), bert.original(), 1),
    "gpt2": ("gpt2-hf-to-nanogpt", "gpt2-nanogpt-to-hf", gpt2.hf(tied=True), gpt2.nanogpt(), 1),
    # Query and key are left open: 1/12 of Llama 3's elements, 1/6 where keys have as many heads as queries.
    "llama 3 8B": ("llama-meta-to-hf", "llama-hf-to-meta", llama.meta(), llama.hf(), 0.91),
    "llama 2 7B": (
        "llama-meta-to-hf", "llama-hf-to-meta",
        llama.meta(32, 4096, 11008, 32000, 4096, freqs=64), llama.hf(32, 4096, 11008, 32000, 4096), 0.84,
    ),
    "vit": ("vit-timm-to-hf", "vit-hf-to-timm", vit.timm(), vit.hf(), 1),
}  # fmt: skip
SMALL: dict[str, tuple[Shapes, Shapes]] = {
    "resnet50": (resnet.torchvision((2, 1, 1, 1), 4, 5), resnet.detectron2((2, 1, 1, 1), 4, 5)),
    "resnet18": (
        resnet.torchvision((2, 2, 1, 1), 4, 5, bottleneck=False),
        resnet.detectron2((2, 2, 1, 1), 4, 5, bottleneck=False),
    ),
    "bert": (bert.hf(3, 16, 24, 30, 10), bert.original(3, 16, 24, 30, 10)),
    "gpt2": (gpt2.hf(3, 16, 30, 10, tied=True), gpt2.nanogpt(3, 16, 30, 10)),
    "llama 3 8B": (llama.meta(3, 16, 24, 30, 8), llama.hf(3, 16, 24, 30, 8)),
    "llama 2 7B": (llama.meta(3, 16, 24, 30, 16), llama.hf(3, 16, 24, 30, 16)),
    "vit": (
        vit.timm(3, 16, 24, patch=2, patches=9, classes=5),
        vit.hf(3, 16, 24, patch=2, patches=9, classes=5),
    ),
}
ORDERS: dict[str, Callable[[Shapes], Shapes]] = {
    "as built": lambda shapes: shapes,
    "by name": lambda shapes: dict(sorted(shapes.items())),
    "backwards": lambda shapes: dict(reversed(shapes.items())),
}


def the_rules(preset: str) -> Rules:
    variables = {"heads": 4, "kv_heads": 2} if preset.startswith("llama") else {}
    return preset_rules(preset, variables)


def _true_sources(how: Derivation | None, key: str) -> set[tuple[str, ...]]:
    """Return the correct sources of a key: those of the preset, a tensor equal to them, or the same name."""
    return {(key,)} if how is None else {how.sources, *((other,) for other in how.equals)}


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("order", ["as built", "by name"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_rule_agrees_with_the_preset(name: str, order: str, back: bool) -> None:
    """At published sizes, no key is filled from a wrong source, and at least the given share is filled."""
    preset, opposite, old, new, share = PUBLISHED[name]
    found, expected = (new, old) if back else (old, new)
    result = aligned(ORDERS[order](expected), ORDERS[order](found))
    truth = apply_rules(the_rules(opposite if back else preset), found).outputs()
    filled = {key: (key,) for key in result.same} | {
        key: taken for one in result.suggestions for key, taken in one.keys.items()
    }
    wrong = [key for key, taken in filled.items() if taken not in _true_sources(truth.get(key), key)]
    assert wrong == []
    assert result.share >= share
    assert result.complete == (not name.startswith("llama"))


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("name", SMALL)
def test_rules_compute_the_same_bits_as_the_preset(name: str, back: bool, tmp_path: Path) -> None:
    """Transposed square matrices and the order of fused projections are correct too, which no shape shows."""
    (old, new), (preset, opposite, *_) = SMALL[name], PUBLISHED[name]
    found, expected = (new, old) if back else (old, new)
    state = {key: tensor_of("F32", shape, seed) for seed, (key, shape) in enumerate(found.items())}
    if "lm_head.weight" in state and "transformer.wte.weight" in state:
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    result = aligned(expected, found)
    execute(plan_remap(state, result.rules), state, tmp_path / "a.safetensors")
    execute(plan_remap(state, the_rules(opposite if back else preset)), state, tmp_path / "b.safetensors")
    made, truth = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    filled = {*result.same, *(key for one in result.suggestions for key in one.keys)} & truth.keys()
    assert same_state({key: made[key] for key in filled}, {key: truth[key] for key in filled})
    assert len(filled) >= 0.75 * len(truth)


@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("order", ["as built", "by name"])
def test_a_model_without_a_preset(order: str, back: bool) -> None:
    """Whisper has two stacks of layers, two attentions in a layer, and numbered modules that have names elsewhere."""
    named = [(new, old, shape) if back else (old, new, shape) for old, new, shape in whisper.openai_and_hf()]
    found = {old: shape for old, _, shape in named}
    expected = {new: shape for _, new, shape in named}
    result = aligned(ORDERS[order](expected), ORDERS[order](found))
    truth = {old: new for old, new, _ in named}
    assert [old for old, new in renames(result).items() if truth[old] != new] == []
    assert all(truth[key] == key for key in result.same)
    assert result.share == 1


def test_numbered_modules_that_have_names_elsewhere() -> None:
    """Matrices with unique shapes are paired; their order is evidence too, unless the keys are sorted by name."""
    widths = (3, 64, 64, 128, 128, 256, 256)
    shapes = [(outs, ins, 3, 3) for ins, outs in pairwise(widths)]
    found, expected = (
        {
            f"{name}.{leaf}": shape[: 4 if leaf == "weight" else 1]
            for name, shape in zip(names, shapes, strict=True)
            for leaf in ("weight", "bias")
        }
        for names in ([f"features.{at}" for at in (0, 2, 5, 7, 10, 12)], [f"conv{at}" for at in range(1, 7)])
    )
    result = aligned(expected, found)
    assert renames(result) == dict(zip(found, expected, strict=True))
    assert {one.confidence for one in result.suggestions} == {0.6}
    weights = {key: shape for key, shape in found.items() if key.endswith("weight")}
    turned = dict(zip(weights, reversed(weights.values()), strict=True))
    for other in (turned, dict(sorted(found.items()))):
        result = aligned(expected, other)
        assert {key: expected[key] for key in renames(result).values()} == {
            key: shape for key, shape in expected.items() if key.endswith("weight")
        }
        assert all(other[old] == expected[new] for old, new in renames(result).items())
        assert {one.why for one in result.suggestions} == {"the only tensors of this shape"}


def test_torchvision_and_timm_agree() -> None:
    """Plain ResNets have the same names in both libraries, and need no rule."""
    result = aligned(resnet.torchvision(), resnet.torchvision())
    assert (result.complete, result.suggestions, len(result.same)) == (True, (), 320)
    assert result.toml().count("[[rule]]") == 0


def test_a_frozen_backbone_is_filled_without_counters_and_head() -> None:
    """Counters and the head, which a detector does not have, are unexpected and get no rule."""
    result = aligned(resnet.detectron2(classes=None, frozen=True), resnet.torchvision())
    assert result.complete
    assert {info.key.rpartition(".")[2] for info in result.unexpected if "fc" not in info.key} == {
        "num_batches_tracked"
    }


@pytest.mark.parametrize("back", [False, True], ids=["meta to hf", "hf to meta"])
def test_rotary_rows_are_ambiguous_and_the_preset_is_named(back: bool) -> None:
    """No shape shows the row order of query and key, so that a plain rename could ruin the model silently."""
    old, new = llama.meta(2), llama.hf(2)
    result = aligned(old, new) if back else aligned(new, old)
    open_keys = {info.key for one in result.ambiguous for info in one.expected}
    assert open_keys == {
        key for key in (old if back else new) if any(part in key for part in (".wq", ".wk", "q_proj", "k_proj"))
    }
    assert all("rope_permute" in one.why for one in result.ambiguous)
    assert result.presets == (("llama-hf-to-meta",) if back else ("llama-meta-to-hf",))
    text = result.toml()
    assert len(tomllib.loads(text)["rule"]) == len(result.suggestions)
    assert "# from = " in text


def _block(shapes: Shapes, count: int = 2, first: int = 0, at: str = "layers") -> Shapes:
    return {f"{at}.{layer}.{key}": shape for layer in range(first, first + count) for key, shape in shapes.items()}


def _layers(count: int, at: str = "layers", **shapes: tuple[int, ...]) -> Shapes:
    return _block({name.replace("__", "."): shape for name, shape in shapes.items()}, count, at=at)


BLOCK: Shapes = {"attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "mlp.fc1.weight": (32, 8), "norm.bias": (8,)}
TRUNK = _block(BLOCK, 3) | {"head.weight": (5, 8)}


def _moved(shapes: Shapes, old: str, new: str) -> Shapes:
    return {key.replace(old, new, 1): shape for key, shape in shapes.items()}


PLANTED: dict[str, tuple[Shapes, Shapes, list[tuple[str, str]]]] = {
    # id: (expected, found, the rules that say it)
    "a prefix to strip": (TRUNK, _moved(TRUNK, "", "module."), [("module.*", "*")]),
    "a prefix to add": (_moved(TRUNK, "", "model.net."), TRUNK, [("*", "model.net.*")]),
    "a prefix on most": (
        TRUNK, {key if "head" in key else f"backbone.{key}": shape for key, shape in TRUNK.items()},
        [("backbone.*", "*")],
    ),
    "a segment": (TRUNK, _moved(TRUNK, "layers", "blocks"), [("blocks.{i:int}.*", "layers.{i}.*")]),
    "an index counted from one": (
        TRUNK, _block(BLOCK, 3, 1) | {"head.weight": (5, 8)}, [("layers.{i:int}.*", "layers.{i-1}.*")],
    ),
    "a module inside": (
        TRUNK, _moved(TRUNK, ".mlp.fc1", ".feed_forward.linear1"),
        [("layers.{i:int}.feed_forward.linear1.weight", "layers.{i}.mlp.fc1.weight")],
    ),
    "deeper than is wanted": (
        _block(BLOCK, 2, at="h"), _block(BLOCK, 4, at="layers"), [("layers.{i:int}.*", "h.{i}.*")],
    ),
    "experts of layers": (
        _block({f"moe.experts.{expert}.up_proj.weight": (9, 8) for expert in range(3)}),
        _block({f"mlp.experts.{expert}.w3.weight": (9, 8) for expert in range(3)}, at="h"),
        [("h.{i:int}.mlp.experts.{j:int}.w3.weight", "layers.{i}.moe.experts.{j}.up_proj.weight")],
    ),
    "a table that is not in a module": (
        {"wte.weight": (30, 8), **TRUNK}, {"word_embeddings": (30, 8), **TRUNK}, [("word_embeddings", "wte.weight")],
    ),
    "kernels with their channels last": (
        {f"conv{i}.weight": (8 * i, 4, 3, 5) for i in range(1, 4)},
        {f"conv{i}.kernel": (3, 5, 4, 8 * i) for i in range(1, 4)},
        [(f"conv{i}.kernel", f"conv{i}.weight") for i in range(1, 4)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "found", "rules"), PLANTED.values(), ids=PLANTED.keys())
def test_changes_are_found(expected: Shapes, found: Shapes, rules: list[tuple[str, str]]) -> None:
    """Each change is found as the rule that a person would write."""
    result = aligned(expected, found)
    assert [(one.sources[0], one.targets[0]) for one in result.suggestions] == rules
    assert result.share == 1
    assert result.complete


LAYER: Shapes = {"a.weight": (8, 8), "b.weight": (8, 8)}
UNDECIDED: dict[str, tuple[Shapes, Shapes, set[str]]] = {
    # id: (expected, found, expected keys that no rule may fill)
    "two of one shape, named otherwise": (
        _block(LAYER), _layers(2, at="h", one__weight=(8, 8), two__weight=(8, 8)), set(_block(LAYER)),
    ),
    "a head of two classes and another": (
        {"bert.pooler.weight": (8, 8), "classifier.weight": (2, 8)},
        {"bert.pooler.weight": (8, 8), "cls.seq_relationship.weight": (2, 8)}, {"classifier.weight"},
    ),
    "a head of two classes and two token types": (
        {"embeddings.word.weight": (30, 8), "classifier.weight": (2, 8)},
        {"embeddings.word.weight": (30, 8), "embeddings.token_type_embeddings.weight": (2, 8)}, {"classifier.weight"},
    ),
    "two towers": (
        _block(BLOCK, 2, at="student.blocks") | _block(BLOCK, 2, at="teacher.blocks"),
        _block(BLOCK, 2, at="first.layers") | _block(BLOCK, 2, at="second.layers"),
        set(_block(BLOCK, 2, at="student.blocks") | _block(BLOCK, 2, at="teacher.blocks")),
    ),
    "w2 is up in one library and down in another": (
        _layers(2, mlp__gate_proj__weight=(24, 8), mlp__up_proj__weight=(24, 8), mlp__down_proj__weight=(8, 24)),
        _layers(2, at="h", mlp__w1__weight=(24, 8), mlp__w2__weight=(24, 8), mlp__w3__weight=(8, 24)),
        set(_layers(2, mlp__up_proj__weight=(), mlp__down_proj__weight=())),
    ),
    "a norm before the attention and one behind it": (
        _layers(2, attention_norm__weight=(8,)), _layers(2, at="h", post_attention_layernorm__weight=(8,)),
        set(_layers(2, attention_norm__weight=(8,))),
    ),
    "heads side by side or one after the other": (
        _layers(2, q__weight=(8, 8), k__weight=(8, 8), v__weight=(8, 8)) | {"wpe.weight": (9, 8)},
        _layers(2, at="h", query_key_value__weight=(24, 8)) | {"wpe.weight": (9, 8)},
        set(_layers(2, q__weight=(), k__weight=(), v__weight=())),
    ),
    "fused, and rotated": (
        _layers(2, q_proj__weight=(8, 8), k_proj__weight=(8, 8), v_proj__weight=(8, 8)),
        _layers(2, at="h", qkv__weight=(24, 8)),
        set(_layers(2, q_proj__weight=(), k_proj__weight=(), v_proj__weight=())),
    ),
    "square, and its kind transposed here and not there": (
        {"mlp.in.weight": (8, 4), "mlp.out.weight": (6, 9), "mlp.mid.weight": (5, 5)},
        {"mlp.in.weight": (4, 8), "mlp.out.weight": (6, 9), "mlp.mid.weight": (5, 5)},
        {"mlp.mid.weight", "mlp.in.weight"},
    ),
    "a scale of a layer and a norm": (
        _layers(2, attn__proj__weight=(8, 8), ls1__gamma=(8,), mlp__fc1__weight=(9, 8)),
        _layers(2, at="h", attn__proj__weight=(8, 8), post__weight=(8,), mlp__fc1__weight=(9, 8)),
        set(_layers(2, ls1__gamma=())),
    ),
    "numbers that count otherwise": (
        {f"conv{at}.weight": (8, 8, 3, 3) for at in range(1, 9)},
        {f"features.{at}.weight": (8, 8, 3, 3) for at in (0, 2, 5, 7, 10, 12, 14, 17)},
        {f"conv{at}.weight" for at in range(1, 9)},
    ),
    "another shape under the same name": (TRUNK, TRUNK | {"head.weight": (9, 8)}, {"head.weight"}),
    "rotary queries of another library, spelled the same": (
        _layers(2, attn__q_proj__weight=(8, 8)), _layers(2, self_attn__q_proj__weight=(8, 8)),
        set(_layers(2, attn__q_proj__weight=())),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "found", "left_open"), UNDECIDED.values(), ids=UNDECIDED.keys())
@pytest.mark.parametrize("order", ORDERS)
def test_undecided_tensors_get_no_rule(expected: Shapes, found: Shapes, left_open: set[str], order: str) -> None:
    """A guess is never written as a rule, however likely it looks."""
    result = aligned(ORDERS[order](expected), ORDERS[order](found))
    filled = {*result.same, *(key for one in result.suggestions for key in one.keys)}
    assert filled & left_open == set()
    assert not result.complete


def test_order_decides_between_neighbours_that_are_known() -> None:
    """A module alone between the same two modules is paired, unless the keys are sorted by name."""
    sizes: list[tuple[int, ...]] = [(8, 8), (8,), (32, 8), (8,), (8, 32)]
    expected = _block(
        {f"{name}.weight": size for name, size in zip(("attn.proj", "x", "fc1", "y", "fc2"), sizes, strict=True)}
    )
    found = _block(
        {f"{name}.weight": size for name, size in zip(("attn.proj", "b", "fc1", "a", "fc2"), sizes, strict=True)},
        at="h",
    )
    result = aligned(expected, found)
    assert {old[4:]: new[9:] for old, new in renames(result).items()} == {
        "attn.proj.weight": "attn.proj.weight", "b.weight": "x.weight", "fc1.weight": "fc1.weight",
        "a.weight": "y.weight", "fc2.weight": "fc2.weight",
    }  # fmt: skip
    assert {one.why for one in result.suggestions if one.confidence < 0.7} == {"between the same neighbours"}
    by_name = aligned(expected, dict(sorted(found.items())))
    assert {info.key[9:] for one in by_name.ambiguous for info in one.expected} == {"x.weight", "y.weight"}


def test_one_implementation_keeps_its_rotary_queries() -> None:
    """Equal names in a layer mean the same code, below any prefix and in any stack of layers."""
    found = _layers(2, at="model.layers", self_attn__q_proj__weight=(8, 8), self_attn__k_proj__weight=(8, 8))
    assert aligned(_moved(found, "model.", ""), found).complete
    assert aligned(_moved(found, "model.layers", "decoder.blocks"), found).complete


def test_other_tensors_of_a_module_are_filled() -> None:
    """A tensor with another shape does not prevent its neighbours and other layers from being filled."""
    expected = {"fc.weight": (4, 8), "fc.bias": (3,), **_layers(3, w__weight=(8, 8))}
    found = expected | {"fc.weight": (4, 9), "layers.1.w.weight": (8, 7)}
    result = aligned(expected, found)
    assert set(result.same) == {"fc.bias", "layers.0.w.weight", "layers.2.w.weight"}
    assert {info.key for info, _ in result.unequal} == {"fc.weight", "layers.1.w.weight"}
    others = result.toml().partition("# other shapes in found:\n")[2].splitlines()
    assert others == ["#   fc.weight  F32 [4, 9]", "#   layers.1.w.weight  F32 [8, 7]"]
    assert (result.missing, result.unexpected) == ((), ())


def _random(shapes: Shapes) -> State:
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def test_equal_bytes_decide_what_names_cannot() -> None:
    """Digests pair tensors of equal shapes whatever their names; equal tensors of zeros do not mislead."""
    found = _random(_layers(3, at="h", one__weight=(8, 8), two__weight=(8, 8), one__bias=(8,), two__bias=(8,)))
    found |= {key: torch.zeros(8) for key in found if key.endswith("bias")}
    expected = {
        key.replace("h.", "layers.").replace("one", "b").replace("two", "a"): value for key, value in found.items()
    }
    assert suggest_rules(expected, found).share == 0
    result = suggest_rules(expected, found, digests=True)
    assert renames(result) == dict(zip(found, expected, strict=True))
    assert {(one.confidence, one.why) for one in result.suggestions} == {(1.0, "equal bytes")}


def test_different_bytes_make_a_pair_ambiguous() -> None:
    """If the bytes of most tensors are equal, a pair with different bytes becomes ambiguous."""
    found = _random(_layers(2, at="h", attn__q__weight=(8, 8), attn__k__weight=(8, 8), mlp__fc1__weight=(9, 8)))
    found |= _random({"wpe.weight": (5, 8), "head.weight": (3, 8), "norm.weight": (8,)})
    expected = {key.replace("h.", "layers."): value for key, value in found.items()}
    expected |= {f"layers.{i}.mlp.fc1.weight": torch.randn(9, 8) for i in range(2)}
    assert suggest_rules(expected, found).complete
    result = suggest_rules(expected, found, digests=True)
    assert [one.why for one in result.ambiguous] == [
        "the bytes of the tensor differ, but the bytes of most tensors are equal"
    ]
    assert {info.key for one in result.ambiguous for info in one.expected} == {
        f"layers.{i}.mlp.fc1.weight" for i in range(2)
    }


def test_a_model_is_loaded_with_the_rules() -> None:
    """The rules can be passed to ``load_into``."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, size) for size, name in ((3, "fc1"), (2, "fc2"))})
    found = {f"net.{key}": torch.randn_like(value) for key, value in model.state_dict().items()}
    result = suggest_rules(model, found)
    assert load_into(model, found, result.rules).coverage == 1
    assert same_state(dict(model.state_dict()), {key.removeprefix("net."): value for key, value in found.items()})


ODD_NAMES = [
    "a*b",
    "{i}",
    "re:x",
    'quo"te',
    "back\\slash",
    "new\nline",
    "a=b",
    "\x7f",
    "ü.é",
    "😀",
    " ",
    "a..b",
    "/",
    ".",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive_the_rule_file(name: str) -> None:
    """The rule file expresses the rules exactly, whatever characters the names have."""
    expected = {f"new.part.{name}.weight": (3, 4), "new.fc.weight": (4, 5), "new.fc.bias": (4,)}
    found = {key.replace("new", "old"): shape for key, shape in expected.items()}
    result = aligned(expected, found)
    assert result.complete
    table = tomllib.loads(result.toml())
    assert set(apply_rules(parse_rules(file=table), found).renamed.values()) == set(expected)


PIECES = st.sampled_from(
    ["a", "b", "fc", "conv1", "q", "k", "0", "1", "12", "norm", "w_1", "layer_0", "weight", "bias", "*", "{"]
)
KEYS = st.lists(PIECES, min_size=1, max_size=4).map(".".join)
SHAPES = st.dictionaries(KEYS, st.sampled_from([(4, 4), (4, 6), (6, 4), (4,), (12, 4)]), max_size=24)


@settings(deadline=None)
@given(SHAPES, SHAPES)
def test_rules_fill_the_keys_that_they_claim(expected: Shapes, found: Shapes) -> None:
    """For any two lists of keys, the rule file reads back, and its rules fill exactly the keys that they claim."""
    result = aligned(expected, found)
    table = tomllib.loads(result.toml())
    assert [str(rule.operations) for stage in parse_rules(file=table).stages for rule in stage.rules] == [
        str(one.operations) for one in result.suggestions
    ]
    made = apply_rules(parse_rules(file=table), found)
    described = made.describe(infos(found))
    claims = [key for one in result.suggestions for key in one.keys] + list(result.same)
    assert len(claims) == len(set(claims))
    assert all(described[key].shape == expected[key] for key in claims)
    left_over = [info.key for info, _ in result.unequal] + [info.key for info in result.missing]
    left_over += [info.key for one in result.ambiguous for info in one.expected]
    assert {*claims, *left_over} == set(expected)
    assert all(0 <= one.confidence <= 1 for one in result.suggestions)


@settings(deadline=None)
@given(SHAPES, st.sampled_from(["module.", "model.encoder.", "net."]))
def test_a_prefix_is_always_found(shapes: Shapes, prefix: str) -> None:
    """A prefix of all keys is found in both directions, whatever the names."""
    longer = {f"{prefix}{key}": shape for key, shape in shapes.items()}
    for expected, found in ((shapes, longer), (longer, shapes)):
        result = aligned(expected, found)
        truth = dict(zip(found, expected, strict=True))
        assert all(truth[old] == new for old, new in renames(result).items())


def test_keys_of_more_segments_than_are_split() -> None:
    """Keys of many separators are all listed, and found under the same names."""
    keys = [f"{'a.' * count}{end}" for count in (30, 31, 32, 33, 5000) for end in ("", "./", "weight", "0.b")]
    assert set(aligned(dict.fromkeys(keys, (3,)), dict.fromkeys(keys, (3,))).same) == set(keys)


def test_no_bytes_to_compare() -> None:
    """Digests need bytes, and descriptions have none."""
    with pytest.raises(PlanError):
        suggest_rules(infos(TRUNK), infos(TRUNK), digests=True)


def test_the_command_writes_a_file_that_remap_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``remap --rules --like`` accepts the file that ``align -o`` writes."""
    shapes = vit.timm(2, 8, 12, patch=2, patches=4, classes=3), vit.hf(2, 8, 12, patch=2, patches=4, classes=3)
    paths = [tmp_path / f"{name}.safetensors" for name in ("timm", "hf", "out")]
    for path, one in zip(paths, shapes, strict=False):
        save_file(_random(one), path)
    rules = tmp_path / "rules.toml"
    ran = run_ckpt(capsys, "align", paths[1], paths[0], "-o", rules)
    assert (ran.code, ran.err) == (0, f"wrote {rules}: 11 rules\n")
    assert run_ckpt(capsys, "remap", paths[0], "-o", paths[2], "--rules", rules, "--like", paths[1]).code == 0
    assert run_ckpt(capsys, "diff", paths[1], paths[2]).code == 0
    again = run_ckpt(capsys, "align", paths[1], paths[0], "-o", rules)
    assert (again.code, again.out) == (2, "")
    assert run_ckpt(capsys, "align", paths[1], paths[0], "-o", rules, "--force", "-q").err == ""


@pytest.mark.parametrize(
    "names", [["attn.q", "attn.k", "attn.v"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]
)
def test_a_fused_layer_with_the_name_of_its_module(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Query, key and value of a layer called ``attn`` are found; digests decide, and hints say both ways out."""
    parts = {f"blocks.{at}.{name}.weight": torch.rand(2, 4) for at in range(2) for name in names}
    whole = {
        f"blocks.{at}.attn.weight": torch.cat([parts[f"blocks.{at}.{name}.weight"] for name in names])
        for at in range(2)
    }
    files = [str(tmp_path / name) for name in ("whole.pt", "parts.pt", "rules.toml")]
    for file, state in zip(files, (whole, parts), strict=False):
        torch.save(state, file)
    assert suggest_rules(*files[:2], digests=True).complete
    assert suggest_rules(files[1], files[0], digests=True).complete
    ran = run_ckpt(capsys, "align", *files[:2], "-o", files[2])
    assert ran.out.endswith("--digests decides where both have tensors of the same values\n")
    assert ran.err.endswith("has the possible rules as comments; uncomment those that are right\n")


def test_commands_of_hints_are_not_wrapped() -> None:
    """A narrow terminal gets each command on one line, which can be copied."""
    command = "ckpt align long/path/to/base.safetensors long/path/to/donor.safetensors -o rules.toml"
    options = "--drop 'a.long.name.of.a.branch.*' --drop 'another.*'"
    hint = f"some words before it: {command} looks for rules, or {options}, or none of these"
    lines = list(as_text(fitted([Line((Hint(hint),))], 30)))
    assert [line.strip(" ,") for line in lines if len(line) > 30] == [command, options]
    assert " ".join(map(str.strip, lines)) == hint


def test_align_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``align --json`` has exactly the fields of its schema, and exits with 1 if tensors are ambiguous."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("meta", "hf")]
    for path, one in zip(paths, (llama.meta(2, 16, 24, 30, 8), llama.hf(2, 16, 24, 30, 8)), strict=True):
        save_file(_random(one), path)
    ran = run_ckpt(capsys, "align", paths[1], paths[0], "--json")
    document = json.loads(ran.out)
    assert ran.code == 1
    assert list(document) == [
        "schema", "expected", "found", "rules", "ambiguous", "shape_mismatched", "missing", "unexpected", "presets",
        "different", "hints", "summary",
    ]  # fmt: skip
    assert document["schema"] == "ckptkit.align/1"
    assert next(one for one in document["rules"] if one["from"] == ["tok_embeddings.weight"]) == {
        "from": ["tok_embeddings.weight"], "to": ["model.embed_tokens.weight"], "op": [], "tensors": 1, "elements": 480,
        "confidence": 0.9, "why": "known spellings: word embedding",
    }  # fmt: skip
    assert [len(one["candidates"]) for one in document["ambiguous"]] == [1, 1]
    assert document["summary"]["complete"] is False
    text = run_ckpt(capsys, "align", paths[1], paths[0])
    assert re.search(r"wq.weight = model.layers.\{i\}.self_attn.q_proj.weight +2  with rotary", text.out)
    assert "this preset fills all of them: --rules preset:llama-meta-to-hf" in text.out
    assert "`preset:llama-meta-to-hf`" in run_ckpt(capsys, "align", paths[1], paths[0], "--markdown").out


def quantised(shapes: Shapes) -> dict[str, TensorInfo]:
    """Return the descriptions with each matrix in F8, and scales for its rows."""
    made = infos(shapes)
    for key, shape in shapes.items():
        if len(shape) == 2:
            made[key] = TensorInfo(key, "F8_E4M3", shape)
            made[f"{key}_scale"] = TensorInfo(f"{key}_scale", "F32", (shape[0], 1))
    return made


LAYERS: Shapes = {f"l.{i}.{name}": shape for i in range(3) for name, shape in (("q.weight", (8, 8)), ("q.bias", (8,)))}


@pytest.mark.parametrize("prefix", ["", "model.", "x.y."])
@pytest.mark.parametrize("swapped", [False, True], ids=["quantised is found", "quantised is expected"])
def test_no_rule_makes_numbers_of_codes(prefix: str, swapped: bool) -> None:
    """A matrix in F8 with scales fits no plain matrix and the reverse, and vectors are still matched."""
    sides = [quantised({prefix + key: shape for key, shape in LAYERS.items()}), infos(LAYERS)]
    found, expected = reversed(sides) if swapped else sides
    result = suggest_rules(expected, found)
    filled = {*result.same, *(key for one in result.suggestions for key in one.keys)}
    assert filled == {key for key in expected if key.endswith("bias")}
    assert {info.key for info in result.missing} == {key for key in expected if not key.endswith("bias")}
    assert result.ambiguous == ()
    assert result.note.startswith("3 weights are quantised only in " + ("expected" if swapped else "found"))


def test_quantised_weights_of_one_form_are_matched() -> None:
    """All parts are renamed to the same parts, and only layers that are quantised on both sides are matched."""
    found = quantised({f"model.{key}": shape for key, shape in LAYERS.items()})
    result = suggest_rules(quantised(LAYERS), found)
    assert (result.complete, [one.names for one in result.suggestions]) == (True, ["model.* = *"])
    mixed = quantised(LAYERS) | {"l.0.q.weight": TensorInfo("l.0.q.weight", "F32", (8, 8))}
    del mixed["l.0.q.weight_scale"]
    assert [info.key for info in suggest_rules(quantised(LAYERS), mixed).missing] == [
        "l.0.q.weight", "l.0.q.weight_scale",
    ]  # fmt: skip
    ordinary = {key: info for key, info in quantised(LAYERS).items() if not key.endswith("_scale")}
    assert suggest_rules(infos(LAYERS), ordinary).complete
