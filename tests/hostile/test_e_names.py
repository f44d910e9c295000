"""Table E: similar names and structures are kept apart; names are exact in JSON and harmless in text."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.helpers_formats import f32, mapping, number, safetensors_file, several, tensor, text, torch_zip
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, run_limited, written

ONE = tensor()
OTHER_ONE = tensor(size=(1,), stride=(1,))


def keyed(*pairs: tuple[bytes, bytes]) -> bytes:
    """Return the pickle of a mapping whose keys can have any type."""
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def named(names: Sequence[str]) -> bytes:
    return torch_zip(mapping(dict.fromkeys(names, ONE)))


def crowd(count: int) -> bytes:
    """Return a small file with very many tensors, all of which are the same tensor."""
    again = b"h\0"
    return torch_zip(keyed((text("w"), ONE + b"q\0"), *((text(str(index)), again) for index in range(count - 1))))


def reserved(directory: Path) -> list[str | Path]:
    return ["convert", written(named(["__metadata__"]))(directory), "-o", "o.safetensors"]


PATHS = keyed((text("a.b"), ONE), (text("a"), mapping({"b": OTHER_ONE})))
KEYS = {"None": b"N", "b'a'": b"C\1a", "(1, 2)": several(b"K\1", b"K\2"), "nan": b"G" + struct.pack(">d", math.nan)}
LONG = "x" * 1_000_000

ESCAPING = {
    "ESC": "a\x1b[2J",
    "OSC": "a\x1b]0;title\x07",
    "C1": "a\x9b2J",
    "CR": "a\rb",
    "newline": "a\nckpt: b",
    "BEL": "a\x07",
}
UNSEEN = {"bidi": "a\u202eb", "zero-width": "a\u200bb", "line separator": "a\u2028b", "filler": "a\u3164"}
ALIKE = {
    "NFC and NFD": ("é", "e\u0301"),
    "homoglyph": ("weight", "w\u0435ight"),
    "nothing between": ("ab", "a\u200bb"),
}
IN_REPORTS = ("=cmd|'/c calc'!A0", "+1", "@x", "<img src=x onerror=alert(1)>", "a|b", "`a`", "$(touch canary)")
NUMERIC = ("0012", "1e5", "nan", "1_000", "-0", "0x10", "True")
AWKWARD = (
    *ESCAPING.values(),
    *UNSEEN.values(),
    *IN_REPORTS,
    *NUMERIC,
    "",
    " ",
    "__metadata__",
    "a\\nb",
    "é",
    "\U0001f600",
)

REFUSED: dict[str, Refused] = {
    "E5 ESC in an error": Refused(
        written(safetensors_file({"\x1b[2J\r": f32(0, 16, [3])}, bytes(16)), "x.safetensors"),
        r"'\x1b[2J\x0d': F32 [3] needs 12 bytes",
    ),
    "E6 bidi in an error": Refused(
        written(torch_zip(mapping({"\u202e\u200b": tensor(offset=100)}))), r"'\u202e\u200b': the view ends"
    ),
    "E8 a name of 1 MB in an error": Refused(
        written(lambda: torch_zip(mapping({LONG: tensor(offset=100)}))), "<999600 more characters>"
    ),
}
ACCEPTED: dict[str, Accepted] = {
    "E1 dots": Accepted(written(torch_zip(PATHS)), "would both be called 'a.b'", "['a']['b']"),
    "E2 int and str": Accepted(
        written(torch_zip(keyed((number(0), ONE), (text("0"), OTHER_ONE)))),
        "would both be called '0'",
        "[0]",
    ),
    "E2 bool and int": Accepted(
        written(torch_zip(keyed((b"\x88", ONE), (number(1), OTHER_ONE)))), "a mapping sets '1' more than once", "True"
    ),
    "E3 twice": Accepted(
        written(torch_zip(keyed((text("w"), ONE), (text("w"), OTHER_ONE)))), "a mapping sets 'w' more than once", "[1]"
    ),
    **{f"E4 {name}": Accepted(written(torch_zip(keyed((key, ONE)))), "", f"{name}  ") for name, key in KEYS.items()},
    **{
        f"E6 {name}": Accepted(written(named(pair)), f"two names look alike: {pair[0]!a} and {pair[1]!a}", "F32")
        for name, pair in ALIKE.items()
    },
    "E8 a name of 1 MB": Accepted(written(lambda: named([LONG])), "", "<999600 more characters>"),
    "E10 bare tensor": Accepted(written(torch_zip(ONE)), "", "F32"),
    "E10 list of tensors": Accepted(written(torch_zip(b"](" + ONE + OTHER_ONE + b"e")), "", "2 tensors"),
    "E10 no tensors": Accepted(written(torch_zip(mapping({"epoch": b"K\3"}), {})), "", "no tensors"),
    "E10 empty": Accepted(written(torch_zip(b"}", {})), "", "no tensors"),
    "E11 tied": Accepted(written(torch_zip(mapping({"a": ONE, "b": ONE}))), "", "shares memory with"),
    "E11 overlapping": Accepted(written(torch_zip(mapping({"a": ONE, "b": OTHER_ONE}))), "", "shares memory with"),
    "E12 30,000": Accepted(written(lambda: crowd(30_000)), "", "30,000 tensors"),
}
UNWRITABLE: dict[str, Refused] = {
    "E1 dots": Refused(written(torch_zip(PATHS)), "would both be called 'a.b'"),
    "E4 None": Refused(written(torch_zip(keyed((b"N", ONE)))), "the file has no unambiguous name for 'None'"),
    "E8 __metadata__": Refused(reserved, "a tensor is called '__metadata__', which safetensors reserves"),
}
OTHER = (
    "E5 all in JSON",
    "E5 all in text",
    "E7 all in JSON and in text",
    "E9 all in JSON and in text",
    "E11 a warning when written",
    "E12 2,000,000",
    *(f"{name} written" for name in UNWRITABLE),
)


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_cannot_forge_an_error(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_odd_structure_is_listed(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_name_that_the_output_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, UNWRITABLE[name], command="convert")


def test_e5_to_e9_every_name_is_exact_in_json(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(named([*AWKWARD, LONG]))
    ran = run_limited("show", tmp_path / "x.pt", "--json")
    assert (ran.code, ran.out.isascii()) == (0, True)
    assert [info["key"] for info in json.loads(ran.out)["tensors"]] == [*AWKWARD, LONG]


def test_e5_to_e9_every_name_takes_one_harmless_line_of_text(tmp_path: Path) -> None:
    """A harmless name is printed as it is; characters that move the cursor or break a line are escaped."""
    (tmp_path / "x.pt").write_bytes(named(AWKWARD))
    ran = run_limited("show", tmp_path / "x.pt", "--expand")
    assert ran.code == 0
    assert all(char.isprintable() or char == "\n" for char in ran.out + ran.err)
    shown = [line for line in ran.out.splitlines() if "  F32  " in line]
    assert len(shown) == len(AWKWARD)
    for name in (*IN_REPORTS, *NUMERIC, "__metadata__"):
        assert any(line.startswith(f"{name}  ") for line in shown), name
    for escaped in (r"a\x1b[2J", r"a\x9b2J", r"a\x0db", r"a\x0ackpt: b", r"a\u202eb", r"a\u3164", r"a\\nb", r"\x20"):
        assert any(line.startswith(f"{escaped}  ") for line in shown), escaped


def test_e11_a_warning_names_ties_that_the_format_cannot_keep(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(torch_zip(mapping({"a": ONE, "b": ONE})))
    ran = run_limited("convert", tmp_path / "x.pt", "-o", tmp_path / "o.safetensors")
    assert ran.code == 0
    assert "written separately, but shared memory before: a, b" in ran.err
