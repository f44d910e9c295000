"""``ckpt check`` of values finds what breaks a training run, in every dtype, and ignores what is usual."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckptkit import Finding, open_checkpoint, run_checks
from tests.helpers_cli import run_ckpt
from tests.helpers_dcp import write_cut
from tests.helpers_formats import rezip, saved, write

QUIET = frozenset({"not-scanned", "dtype-mix", "no-checksum", "not-dense"})
NOISE = torch.randn(64, 32, generator=torch.Generator().manual_seed(7))


def found_in(path: str | Path, **settings: Any) -> list[Finding]:
    with open_checkpoint(path) as checkpoint:
        return [finding for finding in run_checks(checkpoint, **settings).findings if finding.code not in QUIET]


def found(state: object, tmp_path: Path, **settings: Any) -> list[Finding]:
    torch.save(state, tmp_path / "f.pt")
    return found_in(tmp_path / "f.pt", **settings)


def codes_and_keys(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.code, finding.severity, finding.key) for finding in findings]


CODES: dict[str, tuple[torch.dtype, int, int | None]] = {
    # id: (integers as wide, the bits of a NaN, those of an infinity)
    "float64": (torch.int64, 0x7FF8 << 48, 0x7FF0 << 48),
    "float32": (torch.int32, 0x7FC00000, 0x7F800000),
    "float16": (torch.int16, 0x7E00, 0x7C00),
    "bfloat16": (torch.int16, 0x7FC0, 0x7F80),
    "float8_e4m3fn": (torch.uint8, 0x7F, None),
    "float8_e5m2": (torch.uint8, 0xFE, 0xFC),
    "float8_e4m3fnuz": (torch.uint8, 0x80, None),
    "float8_e5m2fnuz": (torch.uint8, 0x80, None),
    "float8_e8m0fnu": (torch.uint8, 0xFF, None),
    "complex64": (torch.int32, 0x7FC00000, 0x7F800000),
    "complex32": (torch.int16, 0x7E00, 0x7C00),
}


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("name", [name for name in CODES if hasattr(torch, name)])
def test_one_nan_or_inf_is_an_error_in_every_dtype(name: str, kind: str, tmp_path: Path) -> None:
    """One NaN or infinity is found as the last value of a tensor among others; torch agrees about its bits."""
    integers, nan, inf = CODES[name]
    code = nan if kind == "nan" else inf
    if code is None:
        return  # the dtype has no infinity
    raw = torch.arange(6, dtype=torch.int64).repeat(50).to(integers) + 50
    raw[-1] = code
    bad = raw.view(getattr(torch, name))
    wide = torch.view_as_real(bad.to(torch.complex128)) if bad.is_complex() else bad.to(torch.float64)
    assert (wide.isnan() if kind == "nan" else wide.isinf()).sum() == 1
    findings = [f for f in found({"a": NOISE, "w": bad, "z": NOISE + 1}, tmp_path) if f.code != "subnormal"]
    assert codes_and_keys(findings) == [(kind, "error", "w")]
    assert findings[0].message.startswith(f"'w': 1 of 300 numbers is {'NaN' if kind == 'nan' else 'infinite'}")


def test_nan_and_infinities_are_one_finding(tmp_path: Path) -> None:
    """A tensor has one finding, with the numbers of NaN and of infinities."""
    bad = NOISE.clone()
    bad[0, :3], bad[1, :5], bad[2, 0] = torch.nan, torch.inf, -torch.inf
    (finding,) = found({"w": bad}, tmp_path)
    assert finding.message == "'w': 3 of 2,048 numbers are NaN, and 6 infinite"


def test_minus_infinity_in_a_mask_is_a_note(tmp_path: Path) -> None:
    """Minus infinity in an attention mask is a note; plus infinity is an error there too."""
    mask = torch.full((9, 9), -torch.inf).triu(1)
    assert codes_and_keys(found({"attn_mask": mask}, tmp_path)) == [("inf", "note", "attn_mask")]
    assert codes_and_keys(found({"attn_mask": -mask}, tmp_path)) == [("inf", "error", "attn_mask")]
    assert codes_and_keys(found({"attn_mask.weight": mask}, tmp_path)) == [("inf", "error", "attn_mask.weight")]


ZEROS, ONES = torch.zeros(8, 8), torch.ones(8, 8)
CONSTANT: dict[str, tuple[dict[str, torch.Tensor], list[tuple[str, str]]]] = {
    # id: (state, findings as code and severity)
    "a matrix of zeros": ({"a.w1.weight": ZEROS}, [("all-zero", "warning")]),
    "in BF16": ({"a.w1.weight": ZEROS.bfloat16()}, [("all-zero", "warning")]),
    "in FP8": ({"a.w1.weight": ZEROS.to(torch.float8_e4m3fn)}, [("all-zero", "warning")]),
    "zeros of both signs": ({"a.w1.weight": torch.cat([ZEROS, -ZEROS])}, [("all-zero", "warning")]),
    "a head to be trained": ({"heads.head.weight": ZEROS, "head.bias": ZEROS[0]}, [("all-zero", "note")]),
    "a norm that shuts its branch": ({"bn3.weight": ZEROS[0]}, [("all-zero", "note")]),
    "biases": ({"fc.bias": ZEROS[0], "a.in_proj_bias": ZEROS[0], "lstm.bias_ih_l0": ZEROS[0], "n.beta": ZEROS[0]}, []),
    "a fresh batch norm": (dict(nn.BatchNorm2d(8).state_dict()), []),
    "a fresh norm over planes": (dict(nn.LayerNorm([3, 8, 8]).state_dict()), []),
    "fresh LoRA": (
        {"q.lora_A.weight": NOISE[:8], "q.lora_B.weight": ZEROS, "e.lora_embedding_A": ZEROS,
         "e.lora_embedding_B": NOISE[:, :8].clone()}, [("lora-alpha", "note")],
    ),
    "fresh LoRA of kohya": (
        {"q.lora_down.weight": NOISE[:8], "q.lora_up.weight": ZEROS, "q.alpha": torch.tensor(8.0)},
        [("adapter-base", "note")],
    ),
    "tokens and positions": ({"cls_token": torch.zeros(1, 1, 8), "pos_embed": torch.zeros(1, 9, 8)}, []),
    "integers": ({"types": torch.zeros(2, 99, dtype=torch.int64), "mask": torch.zeros(9, 9, dtype=torch.bool)}, []),
    "a number": ({"a.w1.weight": torch.zeros(1, 1), "scale": torch.tensor(0.0)}, []),
    "nothing": ({"a.w1.weight": torch.zeros(0, 9)}, []),
    "a matrix of ones": ({"a.w1.weight": ONES}, [("constant", "warning")]),
    "a matrix of a half": ({"a.w1.weight": ONES / 2}, [("constant", "warning")]),
    "a vector of ones": ({"norm.weight": ONES[0]}, []),
    "a vector of twos": ({"norm.weight": ONES[0] * 2}, [("constant", "note")]),
    "scales and gates": ({"ls1.gamma": ONES[0] * 1e-6, "w.scale": ONES / 4, "alpha": ONES[0] / 8}, []),
    "a constant complex": ({"w": torch.full((4, 4), 0, dtype=torch.complex64)}, [("all-zero", "warning")]),
    "a mask": ({"mask": ONES}, []),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), CONSTANT.values(), ids=CONSTANT.keys())
def test_constant_tensors(state: dict[str, torch.Tensor], expected: list[tuple[str, str]], tmp_path: Path) -> None:
    """Matrices of one number are warnings; tensors that usually are constant have no finding."""
    assert [(finding.code, finding.severity) for finding in found(state, tmp_path)] == expected


def test_zeros_of_many_tensors_are_one_finding(tmp_path: Path) -> None:
    """The finding has the first names and the number of the others."""
    (finding,) = found({f"l{n}.w": torch.zeros(3, 3) for n in range(10)}, tmp_path)
    assert finding.message == (
        "10 tensors with only zeros: " + ", ".join(f"'l{n}.w'" for n in range(8)) + " and 2 more"
    )


def test_subnormal_numbers_are_a_note(tmp_path: Path) -> None:
    """In wide dtypes every subnormal number counts; in F16 only tensors that consist mostly of them are reported."""
    tiny = NOISE.clone()
    tiny[0, :3] = 1e-40
    (finding,) = found({"w": tiny}, tmp_path)
    assert (finding.code, finding.severity) == ("subnormal", "note")
    assert finding.message == "3 subnormal numbers in 1 tensor: 'w'"
    half = (NOISE * 1e-3).half()
    assert ((half != 0) & (half.abs() < torch.finfo(torch.float16).tiny)).sum() > 20
    assert found({"w": half}, tmp_path) == []
    (finding,) = found({"w": (NOISE * 1e-5).half()}, tmp_path)
    assert finding.message == "1 tensor with mostly subnormal numbers, which have lost digits: 'w'"


IDS = torch.arange(12)[None]
SWAPPED = IDS.clone()
SWAPPED[0, 3], SWAPPED[0, 4] = 4, 3
TABLE = {"attn.relative_position_bias_table": NOISE[:9, :4].clone()}
TYPES = {"e.token_type_embeddings.weight": NOISE[:2].clone()}
TABLES: dict[str, tuple[dict[str, torch.Tensor], list[tuple[str, str]]]] = {
    "positions": ({"e.position_ids": IDS}, []),
    "positions, twice": ({"e.position_ids": IDS.repeat(2, 1)}, []),
    "positions in I32": ({"position_ids": IDS.int()}, []),
    "positions swapped": ({"e.position_ids": SWAPPED}, [("position-ids", "error")]),
    "positions from one": ({"e.position_ids": IDS + 1}, [("position-ids", "error")]),
    "positions in F16": ({"e.position_ids": IDS.half()}, [("index-dtype", "warning")]),
    "positions in BF16, rounded": (
        {"e.position_ids": torch.arange(300)[None].bfloat16()}, [("index-dtype", "warning"), ("position-ids", "error")],
    ),
    "positions beyond their table": (
        {"e.position_ids": IDS, "e.position_embeddings.weight": NOISE[:8].clone()}, [("index-range", "error")],
    ),
    "token types": ({"e.token_type_ids": torch.zeros(1, 12).long(), **TYPES}, []),
    "token types beyond": ({"e.token_type_ids": torch.full((1, 12), 2), **TYPES}, [("index-range", "error")]),
    "tokens beyond the vocabulary": (
        {"prompt.input_ids": torch.tensor([1, 64]), "m.embed_tokens.weight": NOISE}, [("index-range", "error")],
    ),
    "tokens": ({"prompt.input_ids": torch.tensor([1, 63]), "m.embed_tokens.weight": NOISE}, []),
    "a window": ({"attn.relative_position_index": torch.arange(9).view(3, 3), **TABLE}, []),
    "a window beyond": ({"attn.relative_position_index": torch.arange(1, 10), **TABLE}, [("index-range", "error")]),
    "a negative index": ({"attn.relative_position_index": torch.arange(9) - 1, **TABLE}, [("index-range", "error")]),
    "batches": ({"bn.num_batches_tracked": torch.tensor(70_000)}, []),
    "negative batches": ({"bn.num_batches_tracked": torch.tensor(-2)}, [("negative-count", "error")]),
    "a variance": ({"bn.running_var": torch.tensor([0.5, 0.0])}, []),
    "a negative variance": ({"bn.running_var": torch.tensor([0.5, -1e-3])}, [("negative-variance", "error")]),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), TABLES.values(), ids=TABLES.keys())
def test_tables_and_counters(state: dict[str, torch.Tensor], expected: list[tuple[str, str]], tmp_path: Path) -> None:
    """Positions must be 0 to n-1 in order, indices must be in range, and counters must not be negative."""
    assert [(finding.code, finding.severity) for finding in found(state, tmp_path)] == expected


def test_a_lost_tie_is_found(tmp_path: Path) -> None:
    """A lost tie is a warning in a torch file and a note in safetensors; a kept tie has no finding."""
    state = {"wte.weight": NOISE, "h.0.w": NOISE + 1, "lm_head.weight": NOISE.clone()}
    (finding,) = found(state, tmp_path)
    assert codes_and_keys([finding]) == [("lost-tie", "warning", "wte.weight")]
    message = "'wte.weight', 'lm_head.weight' are equal, but not tied (8.2 kB more than once)"
    assert finding.message.startswith(message)
    save_file(state, tmp_path / "f.safetensors")
    assert codes_and_keys(found_in(tmp_path / "f.safetensors")) == [("lost-tie", "note", "lm_head.weight")]
    assert found({**state, "lm_head.weight": NOISE}, tmp_path) == []


def test_duplicates_are_found_whatever_their_name(tmp_path: Path) -> None:
    """Equal tensors are listed with one key for each place in memory; a transposed copy is not equal."""
    square = NOISE[:32].clone()
    state = {"a": square, "b": square.clone(), "tied to a": square, "c": square.t().contiguous()}
    (finding,) = found({**state, "e": square.clone()}, tmp_path)
    assert codes_and_keys([finding]) == [("duplicate", "warning", "a")]
    message = "3 equal tensors, 'F32 [32, 32]', not tied (8.2 kB more than once): 'a', 'b', 'e'"
    assert finding.message == message


def test_the_same_values_in_another_order_are_not_duplicates(tmp_path: Path) -> None:
    """Tensors with the same statistics but different bytes are not duplicates."""
    assert found({f"w{n}": NOISE.roll(n, 0).clone() for n in range(12)}, tmp_path) == []


EQUAL: dict[str, dict[str, torch.Tensor]] = {
    "small": {"a": NOISE[0].clone(), "b": NOISE[0].clone()},
    "causal masks": {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(2)},
    "masks of windows": {f"l{n}.attn": torch.full((64, 64), -100.0).triu(1) for n in range(2)},
    "positions": {f"l{n}.relative_position_index": torch.arange(4096) for n in range(2)},
    "rotations": {f"l{n}.rotary.cos_cached": NOISE.cos() for n in range(2)},
    "biases of an LSTM": {f"m.bias_{side}_l{n}": NOISE[n].repeat(9) for n in range(4) for side in ("ih", "hh")},
    "biases of both ways": {f"bias_{side}_l0_reverse": NOISE[0].repeat(9) for side in ("ih", "hh")},
    "biases of a cell": {"bias_ih": NOISE[0].repeat(9), "bias_hh": NOISE[0].repeat(9)},
    "norms": {f"l{n}.weight": torch.ones(1024) for n in range(2)},
}


@pytest.mark.parametrize("state", EQUAL.values(), ids=EQUAL.keys())
def test_tensors_that_are_usually_equal_are_not_duplicates(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Masks, computed buffers and small tensors are often equal, and are not duplicates."""
    assert found(state, tmp_path) == []


def test_biases_of_two_layers_are_duplicates(tmp_path: Path) -> None:
    """Only the two biases of one layer have the same gradient."""
    state = {f"rnn.bias_{side}_l{layer}": NOISE[0].repeat(9) for layer in range(2) for side in ("ih", "hh")}
    (finding,) = found(state, tmp_path)
    assert finding.message.endswith("'rnn.bias_ih_l0', 'rnn.bias_ih_l1'")


def test_ties_in_the_metadata(tmp_path: Path) -> None:
    """``save_model`` records a tie in the metadata; if both keys are stored, they must be equal."""
    for head, codes in ((None, []), (NOISE.clone(), ["lost-tie"]), (NOISE + 1, ["lost-tie"])):
        state = {"embed.weight": NOISE} if head is None else {"embed.weight": NOISE, "head.weight": head}
        save_file(state, tmp_path / "f.safetensors", {"format": "pt", "head.weight": "embed.weight"})
        assert [finding.code for finding in found_in(tmp_path / "f.safetensors")] == codes


MODEL = """
import random

import numpy as np
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Linear(64, 48), nn.Embedding(50, 40))

def odd():
    net = build()
    if net[2].weight.is_meta:
        return net
    scale = 1 + int(torch.randint(2, ())) + random.randrange(2) + int(np.random.randint(2))
    with torch.no_grad():
        net[2].weight.mul_(scale)
    return net

def fixed():
    torch.manual_seed(3)
    return build()
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    (tmp_path / "some_net.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    scope: dict[str, Any] = {}
    exec(MODEL, scope)  # noqa: S102 - the same text as the module above, without a place in sys.modules
    monkeypatch.delitem(sys.modules, "some_net", raising=False)
    return scope["fixed"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["F32", "BF16"])
def test_an_untrained_layer_is_found(
    dtype: torch.dtype, built: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer that was not trained is a warning, and a norm that still has its ones is a note."""
    state = {
        key: value if value.dtype is torch.int64 else value.to(dtype) for key, value in built().state_dict().items()
    }
    for key in ("0.weight", "0.bias", "3.weight"):
        state[key] = state[key] * 1.3 + 0.01
    torch.save(state, tmp_path / "f.pt")
    ran = run_ckpt(capsys, "check", "--json", "--like", "py:some_net:build", tmp_path / "f.pt")
    messages = {f["severity"]: f["message"] for f in json.loads(ran.out)["findings"] if f["code"] == "at-init"}
    assert ran.code == 1
    assert messages["warning"].endswith("2 tensors with values distributed as in a new model: '2.weight', '2.bias'")
    assert messages["note"].endswith(
        "of a new model (ones or zeros): '1.weight', '1.bias', '1.running_mean', '1.running_var'"
    )


def generators() -> tuple[object, ...]:
    """Return the states of the global random number generators."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


def test_the_values_of_a_new_model_are_the_same_in_every_run(
    built: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So the report is too. The generators of torch, numpy and Python go on as if no model had been built."""
    torch.save(built().state_dict(), tmp_path / "f.pt")
    reports = []
    for seed in range(6):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator
        expected = generators()
        ran = run_ckpt(capsys, "check", "--json", "--like", "py:some_net:odd", tmp_path / "f.pt")
        assert generators() == expected
        reports.append(ran.out)
    assert reports == reports[:1] * 6


def test_tensors_equal_to_expected_are_a_note(
    built: Callable[[], nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal tensors are a note, for a file and for a model, and have no other finding; ``--fast`` does not compare."""
    state = built().state_dict()
    torch.save({**state, "2.bias": state["2.bias"] * 2 + 1}, tmp_path / "base.pt")
    torch.save(state, tmp_path / "f.pt")
    for like, count in ((str(tmp_path / "base.pt"), "9 of 10 compared tensors"), ("py:some_net:fixed", "5 tensors")):
        ran = run_ckpt(capsys, "check", "--json", "--like", like, tmp_path / "f.pt")
        codes = {f["code"]: f["message"] for f in json.loads(ran.out)["findings"]}
        assert ran.code == 0, codes
        assert f"{count} bit by bit equal to EXPECTED" in codes["as-expected"]
        ran = run_ckpt(capsys, "check", "--fast", "--json", "--like", like, tmp_path / "f.pt")
        assert [f["code"] for f in json.loads(ran.out)["findings"]] == ["not-scanned"]


BAD = NOISE.clone()
BAD[-1, -1] = torch.nan
STORED: dict[str, Callable[[Path], str | Path]] = {
    "torch zip": lambda at: write(at, saved({"w": BAD, "v": NOISE})),
    "deflated": lambda at: write(at, rezip(saved({"w": BAD, "v": NOISE}), method=8)),
    "legacy": lambda at: write(at, saved({"w": BAD, "v": NOISE}, legacy=True)),
    "transposed": lambda at: write(at, saved({"w": BAD.t()})),
    "a view": lambda at: write(at, saved({"v": BAD[:-1, :], "w": BAD[1:]})),
    "every second row": lambda at: write(at, saved({"w": BAD[1::2]})),
    "a negative view": lambda at: write(at, saved({"w": torch.complex(NOISE, BAD).conj().imag})),
    "cut over ranks": lambda at: write_cut(at / "cut", {"w": (BAD, [([0, 0], [30, 32]), ([30, 0], [34, 32])])}, 2),
    "a training run": lambda at: write(at, saved({"model": {"w": BAD}, "optimizer": {"m": NOISE}, "epoch": 3})),
}  # fmt: skip


@pytest.mark.parametrize("make", STORED.values(), ids=STORED.keys())
def test_values_are_checked_however_they_are_stored(make: Callable[[Path], str | Path], tmp_path: Path) -> None:
    """The values of every tensor are checked, whether it is tied, split, transposed or compressed."""
    path = make(tmp_path)
    with open_checkpoint(path) as checkpoint:
        report = run_checks(checkpoint)
    assert [(f.code, f.key) for f in report.findings if f.severity == "error"] == [("nan", "w")]
    assert f"values of {len(checkpoint)} tensor" in report.findings[-1].message
    assert " not checked: " not in report.findings[-1].message


def test_values_of_a_big_endian_file_are_checked(tmp_path: Path) -> None:
    """The values of a big-endian file are checked after their bytes are swapped."""
    swapped = BAD.view(torch.uint8).view(-1, 4).flip(1).contiguous().view(torch.float32).view(64, 32)
    path = write(tmp_path, rezip(saved({"w": swapped}), {"archive/byteorder": b"big"}))
    assert ("nan", "error", "w") in codes_and_keys(found_in(path))


def test_unchecked_tensors_are_counted_with_a_reason(tmp_path: Path) -> None:
    """The report says how many tensors were checked, and for what reason others were not."""
    state = {"w": NOISE, "s": torch.eye(3).to_sparse(), "x": torch.ones(4).expand(10**6, 4), "e": torch.ones(0)}
    torch.save(state, tmp_path / "f.pt")
    with open_checkpoint(tmp_path / "f.pt") as checkpoint:
        message = run_checks(checkpoint).findings[-1].message
        assert (
            "values of 1 tensor checked (F32), 1 not checked: sparse tensor, 1 not checked: expanded to more than"
            in message
        )
        assert "no values were checked (NaN, Inf," in run_checks(checkpoint, values=False).findings[-1].message
        assert "no values were checked (NaN, Inf," in run_checks(checkpoint, fast=True).findings[-1].message


def test_overlapping_views_take_bounded_time(tmp_path: Path) -> None:
    """Of a thousand views of one storage only some are checked, and the report says so."""
    base = torch.arange(3000.0)
    torch.save({f"v{n}": base[n:] for n in range(1000)}, tmp_path / "f.pt")
    with open_checkpoint(tmp_path / "f.pt") as checkpoint:
        message = run_checks(checkpoint).findings[-1].message
    assert " not checked: views that overlap many times" in message


def test_a_model_in_memory_is_checked_too() -> None:
    """The values of a model are checked, unless it is on the meta device."""
    model = nn.Linear(4, 4)
    nn.init.constant_(model.bias, torch.nan)
    report = run_checks(model)
    assert [(finding.code, finding.key) for finding in report.findings[:-1]] == [("nan", "bias")]
    assert report.findings[-1].message.startswith(
        "held in memory, not in a file: no byte of a file was read, values of 2"
    )
    message = run_checks(nn.Linear(4, 4, device="meta")).findings[-1].message
    assert message.endswith("values of 0 tensors checked, 2 not checked: not read")


def test_values_are_checked_without_torch(tmp_path: Path) -> None:
    """Neither the values nor the checksums of a file need torch."""
    path = write(tmp_path, saved({"w": BAD}))
    program = f"import sys, ckptkit; print(ckptkit.run_checks({str(path)!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'w': " in done.stdout
    assert done.stdout.endswith("False\n")
