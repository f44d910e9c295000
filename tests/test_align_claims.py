"""``align`` claims what it knows: equal bytes are proved, equal places are ambiguous, and the file does as said."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ckptkit import Alignment, execute, open_checkpoint, plan_remap, suggest_rules
from ckptkit.align.layouts import gguf_arrangement
from ckptkit.core.checkpoint import TensorInfo
from ckptkit.render.align import align_page
from ckptkit.render.page import as_text
from ckptkit.render.page.width import fitted
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.parse import parse_rules
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]


def filled(result: Alignment) -> dict[str, tuple[str, ...]]:
    """Return what each expected key is made from, by the rule file."""
    made = apply_rules(parse_rules(file=tomllib.loads(result.toml())), result.found).outputs()
    claimed = {key: (key,) for key in result.same} | {
        key: sources for rule in result.suggestions for key, sources in rule.keys.items()
    }
    assert {key: made[key].sources for key in claimed} == claimed
    return claimed


def check_values(result: Alignment, expected: State, found: State) -> None:
    """Check that what is said about the bytes is true of each tensor that the rule file gives."""
    claimed = filled(result)
    equal = {key for key, sources in claimed.items() if torch.equal(expected[key], found[sources[0]])}
    assert set(result.equal or ()) == equal
    assert set(result.different) == claimed.keys() - equal
    for rule in result.suggestions:
        if rule.why == "equal bytes":
            assert rule.keys.keys() <= equal


NAMES = st.lists(st.sampled_from(["a", "b", "fc", "q", "0", "1", "2", "layers", "norm", "weight", "bias"]), min_size=1)
KEYS = st.lists(NAMES.map(".".join), min_size=1, max_size=12, unique=True)


@settings(deadline=None, max_examples=60)
@given(KEYS, KEYS, st.randoms(use_true_random=False), st.integers(0, 4))
def test_equal_bytes_decide_whatever_the_names(
    expected_keys: list[str], found_keys: list[str], random: object, zeros: int
) -> None:
    """A tensor with the bytes of exactly one other is paired with it, in any order and under any names."""
    count = min(len(expected_keys), len(found_keys))
    values = [torch.full((3,), float(number)) for number in range(count)]
    numbers = [number if number >= zeros else 0 for number in range(count)]
    expected = {key: values[number] for key, number in zip(expected_keys, numbers, strict=False)}
    random.shuffle(numbers)  # type: ignore[attr-defined]
    found = {key: values[number] for key, number in zip(found_keys, numbers, strict=False)}
    result = suggest_rules(expected, found, digests=True)
    check_values(result, expected, found)
    claimed = filled(result)
    for key, value in expected.items():
        if sum(torch.equal(value, other) for other in expected.values()) == 1:
            (source,) = claimed[key]
            assert torch.equal(found[source], value)


def test_a_student_of_every_second_layer_gets_the_right_layers() -> None:
    """Layers 0, 2, 4 of a teacher become 0, 1, 2, under other names and under the same names, with equal norms too."""
    teacher = {
        f"layers.{i}.{name}.weight": torch.ones(8) if name == "norm" else torch.randn(8, 8)
        for i in range(6)
        for name in ("q", "fc", "norm")
    }
    for at in ("layers", "h"):
        student = {
            f"{at}.{i // 2}.{name}.weight": teacher[f"layers.{i}.{name}.weight"].clone()
            for i in (0, 2, 4)
            for name in ("q", "fc", "norm")
        }
        result = suggest_rules(student, teacher, digests=True)
        check_values(result, student, teacher)
        assert (result.complete, result.share) == (True, 1)
        sources = {key: source for key, (source,) in filled(result).items()}
        assert sources[f"{at}.1.norm.weight"] == "layers.2.norm.weight"


def test_other_values_are_not_explained() -> None:
    """A model that was trained further fits by names, and the report says that its values differ."""
    before = {f"l.{i}.weight": torch.randn(4, 4 + i) for i in range(4)}
    after = {f"m.{key}": value + 1 for key, value in before.items()}
    result = suggest_rules(before, after, digests=True)
    check_values(result, before, after)
    assert (result.complete, result.share, len(result.different)) == (False, 0, 4)
    assert "4 with other values" in str(result)
    assert suggest_rules(before, after).complete


def tower(*prefixes: str) -> State:
    return {
        f"{prefix}.{key}": value
        for prefix in prefixes
        for key, value in torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).state_dict().items()
    }


TWINS = {
    "student and teacher": (tower("student.backbone", "teacher.backbone"), tower("backbone")),
    "and a head of the student": (
        tower("student.backbone", "teacher.backbone") | {"student.head.weight": torch.zeros(5, 6)},
        tower("backbone") | {"head.weight": torch.zeros(5, 6)},
    ),
    "encoders of query and key": (tower("encoder_q", "encoder_k"), tower("encoder")),
    "one encoder of two": (tower("encoder"), tower("module.encoder_q", "module.encoder_k")),
    "nets and targets": (tower("online", "target"), tower("q_network", "target_network")),
    "generator": (tower("G", "D"), tower("generator", "discriminator")),
    "averages": (tower("net"), tower("model.net", "ema.net")),
    "original and trained": (tower("head.original_module", "head.modules_to_save.default"), tower("head")),
    "towers": (tower("text", "vision"), tower("first", "second")),
}


@pytest.mark.parametrize(("expected", "found"), TWINS.values(), ids=TWINS)
def test_twins_are_ambiguous(expected: State, found: State) -> None:
    """Where two places fit equally, no rule is written, and both places are named."""
    result = suggest_rules(expected, found)
    assert not result.complete
    assert all("head.weight" in key for key in filled(result))
    assert {info.key for one in result.ambiguous for info in one.expected} >= {
        key for key in expected if "head.weight" not in key
    }
    assert {info.key for one in result.ambiguous for info in one.found} >= {
        key for key in found if "head.weight" not in key
    }


def ambiguous_keys(document: dict[str, Any]) -> set[str]:
    return {info["key"] for one in document["ambiguous"] for info in one["expected"]}


FORKS: dict[str, tuple[State, State]] = TWINS | {
    "twins in found, and a head": (
        tower("net") | {"head.w": torch.zeros(5, 6)}, tower("a.net", "b.net") | {"head.w": torch.zeros(5, 6)},
    ),
    "stacks of layers": (
        tower("student.blocks.0.mlp", "student.blocks.1.mlp", "teacher.blocks.0.mlp", "teacher.blocks.1.mlp"),
        tower("layers.0.ff", "layers.1.ff"),
    ),
    "an ensemble": (tower("net"), tower("nets.0", "nets.1", "nets.2")),
    "names of no help": (tower("left", "right"), tower("x", "y")),
    "without a prefix": (tower("a", "b") | {"c.weight": torch.zeros(6)}, {
        **{key.removeprefix("a."): value for key, value in tower("a").items()}, "c.weight": torch.zeros(6),
    }),
    "a name for the shell": (tower("it's", "$(b)"), tower("net")),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "found"), FORKS.values(), ids=FORKS)
def test_each_hint_decides(expected: State, found: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each way out, added to the command, fills more tensors, leaves fewer ambiguous, and loses none."""
    paths = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
    save_file(expected, paths[0])
    save_file(found, paths[1])
    before = json.loads(run_ckpt(capsys, "align", *paths, "--json").out)
    ways = [way for hint in before["hints"] for way in hint.partition(" fit equally: ")[2].split(", or ") if way]
    assert len(ways) > 1
    assert before["hints"][-1] == "--digests decides where both have tensors of the same values"
    for way in ways:
        after = json.loads(run_ckpt(capsys, "align", *paths, *shlex.split(way), "--json").out)
        assert ambiguous_keys(after) < ambiguous_keys(before)
        assert after["summary"]["share"] > before["summary"]["share"]
    page = run_ckpt(capsys, "align", *paths).out
    assert all(hint in page for hint in before["hints"])
    assert re.search(r" fit equally: (parse_rules\(|rules=)", str(suggest_rules(expected, found)))


def recurrent(*names: str) -> State:
    """Return an LSTM cell, a layer behind it and a matrix, below these names."""
    parts = torch.nn.LSTMCell(4, 6).state_dict(), torch.nn.Linear(6, 1).state_dict(), {"weight": torch.zeros(3, 5)}
    return {f"{name}.{key}": one for name, part in zip(names, parts, strict=True) for key, one in part.items()}


def test_one_of_two_recurrent_models() -> None:
    """The tensors of an LSTM are one module, the hint keeps one model, and rows have the width of the terminal."""
    expected, found = (
        recurrent("lstm_cell", "out", "first"),
        recurrent("model.decoder.rnn", "model.decoder.2", "model.x"),
    )
    twice = found | {key.replace("model", "model_8k"): value for key, value in found.items() if "decoder" in key}
    result = suggest_rules(expected, twice)
    assert result.hints[0].startswith("'model.*', 'model_8k.*' fit equally: --keep 'model.*'")
    assert "model.decoder.rnn.* = lstm_cell.*" in [rule.names for one in result.ambiguous for rule in one.candidates]
    lines = list(as_text(fitted(align_page(result), 60)))
    assert sum(" = lstm_cell.*" in line for line in lines) == 2
    assert max(map(len, lines)) <= 60
    assert suggest_rules(expected, twice, parse_rules(keep="model.*")).complete
    layer = {f"rnn.{key}": value for key, value in torch.nn.LSTM(4, 6).state_dict().items()}
    assert suggest_rules({key: expected[key] for key in expected if "lstm" in key}, layer).complete


def test_tensors_that_are_missing_under_another_name_are_found_by_their_bytes(tmp_path: Path) -> None:
    """The hint names the digests where both sides have open tensors of one shape, and they decide."""
    sides: list[State] = [{}, {}]
    for at in range(3):
        conv, norm = torch.rand(4 + at, 2, 3), torch.rand(4)
        sides[0] |= {f"conv{at}.weight": conv, f"conv{at}_BN.weight": norm}
        sides[1] |= {f"features.{at}.conv.weight": conv, f"features.{at}.norm.weight": norm}
    paths = [tmp_path / "expected.pt", tmp_path / "found.pt"]
    for path, side in zip(paths, sides, strict=True):
        torch.save(side, path)
    result = suggest_rules(*paths)
    assert (len(result.missing), len(result.unexpected)) == (3, 3)
    assert result.hints == ("--digests decides where both have tensors of the same values",)
    assert suggest_rules(*paths, digests=True).complete


def test_digests_decide_between_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The hint that names ``--digests`` is right where the values are equal, and absent where nothing can be read."""
    found = {key: torch.randn_like(value) for key, value in tower("student.net", "teacher.net").items()}
    expected = {key.removeprefix("teacher."): value for key, value in found.items() if key.startswith("teacher")}
    paths = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
    save_file(expected, paths[0])
    save_file(found, paths[1])
    assert "\n--digests decides" in run_ckpt(capsys, "align", *paths).out
    decided = run_ckpt(capsys, "align", *paths, "--digests")
    assert (decided.code, "--digests" in decided.out) == (0, False)
    assert "digests=True" not in str(suggest_rules(infos(dict.fromkeys("ab", (8, 8))), infos({"c": (8, 8)})))


@pytest.mark.parametrize(
    ("expected", "found", "truth"),
    [
        (("encoder_q", "encoder_k"), ("module.encoder_q", "module.encoder_k"), {"encoder_q": "module.encoder_q"}),
        (("policy.q_net", "policy.q_net_target"), ("q_net", "q_net_target"), {"policy.q_net": "q_net"}),
        (("actor", "critic"), ("critic_net", "actor_net"), {"actor": "actor_net", "critic": "critic_net"}),
        (("text.tower", "vision.tower"), ("vision_model", "text_model"), {"text.tower": "text_model"}),
        (("model",), ("model", "ema_model"), {"model": "model"}),
    ],
    ids=["one prefix", "a prefix to add", "swapped order", "two towers", "the same name"],
)
def test_names_that_tell_twins_apart_decide(
    expected: tuple[str, ...], found: tuple[str, ...], truth: dict[str, str]
) -> None:
    """A shared word or an equal name decides between twins."""
    result = suggest_rules(tower(*expected), tower(*found))
    assert result.complete
    sources = {key: source for key, (source,) in filled(result).items()}
    for wanted, source in truth.items():
        assert sources[f"{wanted}.0.weight"] == f"{source}.0.weight"


def test_a_tensor_alone_of_its_shape_is_not_ambiguous() -> None:
    """Names do not matter where no other tensor has the shape, unless the names or the dtypes contradict."""
    shapes = {"x.one": (7,), "y.two": (5, 9), "z.three": (3, 4, 6), "cls": (1, 1, 8), "scale": (), "pair": (2, 8)}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    result = suggest_rules(state, {f"p{number}": value for number, value in enumerate(state.values())})
    assert result.complete
    assert filled(result) == {key: (f"p{number}",) for number, key in enumerate(state)}
    assert not suggest_rules({"head.bias": torch.zeros(7)}, {"norm.weight": torch.zeros(7)}).suggestions
    assert not suggest_rules({"table": torch.zeros(7)}, {"ids": torch.zeros(7, dtype=torch.int64)}).suggestions
    assert not suggest_rules({"one": torch.zeros(0, 7)}, {"other": torch.zeros(0, 7)}).suggestions


OPPOSITES = {
    "mean": "var", "mlp.gate_proj.weight": "ffn.up_proj.weight", "encoder.proj.weight": "decoder.proj.weight",
    "student.net.weight": "teacher.net.weight", "conv_in.weight": "conv_out.weight", "left.weight": "right.weight",
    "q.lora_A.weight": "q.lora_B.weight", "src_embed.weight": "tgt_embed.weight", "mu.weight": "logvar.weight",
    "actor.weight": "critic.weight", "bn.num_batches_tracked": "step", "text.proj.weight": "vision.proj.weight",
    "net_high.weight": "net_low.weight", "nerf.coarse.w": "nerf.fine.w", "local.weight": "global.weight",
    "conv_real.weight": "conv_imag.weight", "prior.w": "posterior.w", "attn_temporal.weight": "attn_spatial.weight",
    "rnn.fw.weight": "rnn.bw.weight", "rnn.fwd.weight": "rnn.bwd.weight", "cls_head.weight": "bbox_head.weight",
}  # fmt: skip


@pytest.mark.parametrize(("expected", "found"), [("encoder", "m.decoder"), ("text", "vision"), ("student", "teacher")])
def test_layers_of_opposite_names_are_never_paired(expected: str, found: str) -> None:
    """Layers of other names are not those of an encoder, unless their bytes are equal; equal names are found."""
    states = [tower(*(f"{name}.layers.{layer}" for layer in range(2))) for name in (expected, found)]
    assert not suggest_rules(*states).suggestions
    assert suggest_rules(states[0], {f"x.{key}": value for key, value in (states[0] | states[1]).items()}).complete
    moved = {key.replace(expected, found, 1): value for key, value in states[0].items()}
    assert suggest_rules(states[0], moved, digests=True).complete


@pytest.mark.parametrize(("expected", "found"), OPPOSITES.items())
def test_opposite_names_are_never_paired(expected: str, found: str) -> None:
    """Words that exclude each other contradict a pair, also where both tensors are alone of their shape."""
    for first, second in ((expected, found), (found, expected)):
        assert not suggest_rules({first: torch.zeros(5, 8)}, {second: torch.zeros(5, 8)}).suggestions
        renamed = f"x.{first}"
        assert suggest_rules({first: torch.zeros(5, 8)}, {renamed: torch.zeros(5, 8)}).complete


LIVE = {
    "base_model.model.q.base_layer.weight": (8, 8), "base_model.model.q.lora_A.default.weight": (2, 8),
    "base_model.model.q.lora_B.default.weight": (8, 2), "base_model.model.head.original_module.weight": (3, 8),
    "base_model.model.head.modules_to_save.default.weight": (3, 8), "base_model.model.norm.weight": (8,),
}  # fmt: skip


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(key, "F32", shape) for key, shape in shapes.items()}


def test_peft_adapters_and_bases() -> None:
    """A saved adapter goes to what is trained, a base to the base layers, and a base's head is ambiguous."""
    adapter = {
        "base_model.model.q.lora_A.weight": (2, 8), "base_model.model.q.lora_B.weight": (8, 2),
        "base_model.model.head.weight": (3, 8),
    }  # fmt: skip
    there = {
        "base_model.model.q.lora_A.default.weight": ("base_model.model.q.lora_A.weight",),
        "base_model.model.q.lora_B.default.weight": ("base_model.model.q.lora_B.weight",),
        "base_model.model.head.modules_to_save.default.weight": ("base_model.model.head.weight",),
    }
    assert filled(suggest_rules(infos(LIVE), infos(adapter))) == there
    back = filled(suggest_rules(infos(adapter), infos(LIVE)))
    assert back == {source: (key,) for key, (source,) in there.items()}
    base = {"q.weight": (8, 8), "head.weight": (3, 8), "norm.weight": (8,)}
    result = suggest_rules(infos(LIVE), infos(base))
    assert filled(result) == {
        "base_model.model.q.base_layer.weight": ("q.weight",), "base_model.model.norm.weight": ("norm.weight",),
    }  # fmt: skip
    assert [(len(one.expected), len(one.found)) for one in result.ambiguous] == [(2, 1)]
    two = LIVE | {"base_model.model.q.lora_A.other.weight": (2, 8)}
    assert "base_model.model.q.lora_A.default.weight" not in filled(suggest_rules(infos(two), infos(adapter)))


@pytest.mark.parametrize("swapped", [False, True], ids=["gate first", "up first"])
@pytest.mark.parametrize("divides", [False, True], ids=["join", "divide"])
def test_experts_get_rules_that_digests_prove(swapped: bool, divides: bool, tmp_path: Path) -> None:
    """The rules join and divide experts bit by bit; digests find up before gate, which no shape shows."""
    apart = {
        f"layers.{layer}.moe.experts.{expert}.{name}.weight": torch.randn(*shape)
        for layer in range(2)
        for expert in range(3)
        for name, shape in (("w1", (6, 5)), ("w3", (6, 5)), ("w2", (5, 6)))
    }
    joined = {}
    for layer in range(2):
        one, two, three = (
            torch.stack([apart[f"layers.{layer}.moe.experts.{expert}.{name}.weight"] for expert in range(3)])
            for name in ("w1", "w2", "w3")
        )
        joined[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([three, one] if swapped else [one, three], 1)
        joined[f"layers.{layer}.mlp.experts.down_proj"] = two
    expected, found = (apart, joined) if divides else (joined, apart)
    result = suggest_rules(expected, found, digests=True)
    assert (result.complete, set(result.equal or ())) == (True, set(expected))
    execute(plan_remap(found, result.rules), found, tmp_path / "a.safetensors")
    made = load_file(tmp_path / "a.safetensors")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], value) for key, value in expected.items())
    assert any("which no shape shows" in rule.why for rule in suggest_rules(expected, found).suggestions)


def test_given_rules_come_first_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--drop`` and ``--rename`` change the found keys, and ``remap`` with the written file does the same."""
    found = tower("net") | {"ema.0.weight": torch.zeros(8, 8)}
    expected = {key.replace("net", "model.body"): value for key, value in tower("net").items()}
    paths = [tmp_path / f"{name}.safetensors" for name in ("expected", "found", "out")]
    save_file(expected, paths[0])
    save_file(found, paths[1])
    rules = tmp_path / "rules.toml"
    ran = run_ckpt(capsys, "align", *paths[:2], "--drop", "ema*", "--rename", "net.*=body.*", "-o", rules)
    assert ran.code == 0
    assert run_ckpt(capsys, "remap", paths[1], "-o", paths[2], "--rules", rules).code == 0
    assert load_file(paths[2]).keys() == expected.keys()


def test_the_file_names_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of rules names keys without a rule, up to a limit."""
    expected = {f"a.very.long.name.of.a.module.number.{i}.weight.{i * 7}": torch.zeros(i + 3, 4) for i in range(60)}
    paths = [tmp_path / f"{name}.safetensors" for name in ("expected", "found")]
    save_file(expected | tower("left.long.name", "right.long.name"), paths[0])
    save_file({"other.thing": torch.zeros(9, 9, 9)} | tower("x"), paths[1])
    run_ckpt(capsys, "align", *paths, "-o", tmp_path / "rules.toml")
    text = (tmp_path / "rules.toml").read_text()
    assert "# not filled:" in text
    assert "#   and 20 more" in text
    assert "#   other.thing  F32 [9, 9, 9]" in text


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("back", [False, True], ids=["from gguf", "to gguf"])
def test_gguf_by_its_architecture(architecture: str, back: bool, tmp_path: Path) -> None:
    """Rows of a llama's query and key are put in order, and norms of gemma lose the 1 that was added."""
    gguf = pytest.importorskip("gguf")
    names = {
        "model.layers.0.self_attn.q_proj": ("blk.0.attn_q", 4, 8),
        "model.layers.0.self_attn.k_proj": ("blk.0.attn_k", 2, 4),
        "model.layers.0.input_layernorm": ("blk.0.attn_norm", 0, 8), "model.norm": ("output_norm", 0, 8),
    }  # fmt: skip
    plain = {f"{name}.weight": torch.randn((rows, 8) if heads else (rows,)) for name, (_, heads, rows) in names.items()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, (stored, heads, rows) in names.items():
        value = plain[f"{name}.weight"]
        if heads and architecture == "llama":  # as convert_hf_to_gguf.py
            value = value.reshape(heads, 2, rows // heads // 2, 8).swapaxes(1, 2).reshape(rows, 8)
        writer.add_tensor(f"{stored}.weight", (value + (not heads and architecture == "gemma")).numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, tmp_path / "plain.safetensors")
    sides = [tmp_path / "plain.safetensors", tmp_path / "m.gguf"]
    expected, found = sides[::-1] if back else sides
    result = suggest_rules(expected, found)
    claimed = filled(result)
    assert len(claimed) == 4
    with open_checkpoint(found) as source, open_checkpoint(expected) as truth:
        execute(plan_remap(source, result.rules), source, tmp_path / "out.safetensors")
        made = load_file(tmp_path / "out.safetensors")
        for key in claimed:
            wanted = truth.read(key)
            assert torch.equal(made[key], wanted) or torch.allclose(made[key], wanted, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "unheard-of"])
@pytest.mark.parametrize("name", ["attention.wq", "self_attn.q_proj", "attn.to_q"])
def test_gguf_rows_by_the_names_of_the_other_side(architecture: str, name: str, tmp_path: Path) -> None:
    """GGUF of a llama has the rows of Meta's files, that of Qwen those of transformers; of others nothing is known."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    writer.add_head_count(4)
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", torch.randn(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = suggest_rules(
        {f"layers.{layer}.{name}.weight": torch.zeros(8, 8) for layer in range(2)}, tmp_path / "m.gguf"
    )
    made = [[operation.name for operation in rule.operations] for rule in result.suggestions]
    known = {("llama", "attention.wq"): [[]], ("llama", "self_attn.q_proj"): [["rope_permute"]]}
    known[("qwen3", "self_attn.q_proj")] = [[]]
    assert made == known.get((architecture, name), [])


def test_gguf_of_linear_attention(tmp_path: Path) -> None:
    """Norms of Qwen3-Next have 1 added, except the gated norm; no rule makes ``A_log`` of ``-exp(A_log)``."""
    gguf = pytest.importorskip("gguf")
    names = {
        "input_layernorm.weight": ("attn_norm.weight", (8,)), "linear_attn.norm.weight": ("ssm_norm.weight", (6,)),
        "linear_attn.A_log": ("ssm_a", (5,)), "linear_attn.dt_bias": ("ssm_dt.bias", (4,)),
    }  # fmt: skip
    plain = {
        f"model.layers.{layer}.{name}": torch.randn(shape) for layer in range(2) for name, (_, shape) in names.items()
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3next")
    for key, value in plain.items():
        _, _, layer, name = key.split(".", 3)
        is_offset = name == "input_layernorm.weight"
        stored = -value.exp() if name.endswith("A_log") else value + is_offset
        writer.add_tensor(f"blk.{layer}.{names[name][0]}", stored.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, tmp_path / "plain.safetensors")
    result = suggest_rules(tmp_path / "plain.safetensors", tmp_path / "m.gguf")
    claimed = filled(result)
    assert [key for key in claimed if key.endswith("A_log")] == []
    assert any("-exp(A_log)" in ambiguity.why for ambiguity in result.ambiguous)
    with open_checkpoint(tmp_path / "m.gguf") as source:
        execute(plan_remap(source, result.rules), source, tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert {"model.layers.0.input_layernorm.weight", "model.layers.0.linear_attn.norm.weight"} <= claimed.keys()
    assert all(torch.allclose(made[key], plain[key], atol=1e-6) for key in claimed)


def test_no_arrangement_without_gguf() -> None:
    """Only a GGUF file has an arrangement."""
    from ckptkit.inputs import opened

    with opened(tower("a"), "a") as first, opened(tower("b"), "b") as second:
        assert gguf_arrangement(first, second) is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a", "b"), "0 of 2 tensors with equal bytes, 2 not compared, since their dtypes differ"),
        (("a", "b", "same"), "1 of 3 tensors with equal bytes, 2 not compared, since their dtypes differ"),
        (("a", "b", "none"), "0 of 3 tensors with equal bytes, 3 not compared, 2 of them since their dtypes differ"),
    ],
)
def test_the_report_says_why_bytes_were_not_compared(names: tuple[str, ...], said: str) -> None:
    """Nothing is known of the values of another dtype: it is said, and the tensors are not counted as equal."""
    left = {"a": torch.ones(2), "b": torch.ones(3), "same": torch.ones(4), "none": torch.ones(0)}
    right = left | {"a": torch.zeros(2).half(), "b": torch.zeros(3).half()}
    result = suggest_rules(*({key: state[key] for key in names} for state in (left, right)), digests=True)
    assert str(result).splitlines()[-1] == f"explained 100 % of the expected elements: {said}"
