"""Nested values get unique dotted names, and the name after ``::`` selects exactly one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ckptkit.comparison import diff
from ckptkit.errors import CkptkitError, FormatError, PlanError
from ckptkit.formats import open_checkpoint
from ckptkit.formats.torch.tree import dotted_key, unique_names
from ckptkit.plans.merge import plan_merge
from ckptkit.plans.remap import plan_remap
from tests.helpers_cli import run_ckpt
from tests.helpers_formats import bits, number, opened, saved, tensor, text, torch_zip, write

ONE, TWO, THREE = torch.zeros(1), torch.ones(1), torch.full((1,), 3.0)
NAN = float("nan")

COLLISIONS: dict[str, tuple[dict[Any, Any], list[str]]] = {
    # id: (tree, the key of each tensor in the tree)
    "E1 a dot and a level": ({"a.b": ONE, "a": {"b": TWO}}, ["a.b", "['a']['b']"]),
    "E1 the level first": ({"a": {"b": TWO}, "a.b": ONE}, ["['a']['b']", "a.b"]),
    "E1 both below": ({"x": {"a.b": ONE, "a": {"b": TWO}}, "n": 1, "m": 2}, ["['x']['a.b']", "['x']['a']['b']"]),
    "E2 int and str": ({0: ONE, "0": TWO}, ["[0]", "0"]),
    "E2 bool and str": ({True: ONE, "True": TWO}, ["[True]", "True"]),
    "E4 nan and nan": ({NAN: ONE, float("nan"): TWO}, ["[nan]", "[nan]#1"]),
    "E4 nan and str": ({NAN: ONE, "nan": TWO}, ["[nan]", "nan"]),
    "E4 None and str": ({None: ONE, "None": TWO}, ["[None]", "None"]),
    "E4 bytes and str": ({b"k": ONE, "b'k'": TWO}, ["[b'k']", "b'k'"]),
    "a name that looks exact": ({"[0]": ONE, 0: TWO, "0": THREE}, ["[0]", "[0]#1", "0"]),
    "a list and a dict": ({"a": [ONE], "a.0": TWO}, ["['a'][0]", "a.0"]),
    "a tensor and a number": ({"w": ONE, "a.b": 5, "a": {"b": TWO}}, ["w", "['a']['b']"]),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("tree", "keys"), COLLISIONS.values(), ids=COLLISIONS.keys())
def test_places_of_one_dotted_name_are_listed_by_path(
    tree: dict[Any, Any], keys: list[str], legacy: bool, tmp_path: Path
) -> None:
    """Each tensor is listed with its bytes and named in a warning; an output needs other names first."""
    path = write(tmp_path, saved(tree, legacy=legacy))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == keys
        values = [leaf for leaf in _leaves(tree) if isinstance(leaf, torch.Tensor)]
        assert [checkpoint.read_bytes(key) for key in keys] == [bits(value) for value in values]
        assert sum("would both be called" in warning for warning in checkpoint.warnings) == 1
        with pytest.raises(PlanError, match=r"would both be called|has no unambiguous name") as caught:
            plan_remap(checkpoint)
        assert "--drop" in str(caught.value.hint)
        with pytest.raises(PlanError, match=r"would both be called|has no unambiguous name"):
            plan_merge(checkpoint, {keys[0]: torch.ones(1)})
        renames = [f"re:{_escaped(key)}=t{number}" for number, key in enumerate(keys)]
        assert [step.out.key for step in plan_remap(checkpoint, renames).steps] == [f"t{n}" for n in range(len(keys))]


def _escaped(key: str) -> str:
    return "".join(f"\\{char}" if char in "[]().'" else char for char in key)


def _leaves(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for item in inner for leaf in _leaves(item)]


def test_the_name_that_torch_would_see_stays(tmp_path: Path) -> None:
    """``load_state_dict`` and ``diff`` find the key at the top, even if a nested one comes first."""
    with opened(tmp_path, saved({"a": {"b": torch.ones(7)}, "a.b": torch.ones(2)})) as checkpoint:
        result = diff({"a.b": torch.zeros(2)}, checkpoint)
        assert [pair.key for pair in result.matched] == ["a.b"]
        assert [info.key for info in result.unexpected] == ["['a']['b']"]


def test_the_way_out_of_a_collision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names both places, and the command in its hint works in a shell."""
    path = write(tmp_path, saved({"a.b": ONE, "a": {"b": TWO}, "c": THREE}))
    out = tmp_path / "o.safetensors"
    refused = run_ckpt(capsys, "convert", path, "-o", out)
    assert refused.code == 2
    assert f"""ckpt: {path}: 'a.b' and "['a']['b']" would both be called 'a.b'\n""" in refused.err
    remap = "ckpt remap PATH -o OUT"
    drops, renames = (
        f"""{remap} --drop "['a']['b']" leaves it out""",
        f"""{remap} --rename "['a']['b']=NEW" gives it a name""",
    )
    assert f"hint: {drops}, or {renames}\n" in refused.err
    assert run_ckpt(capsys, "remap", path, "-o", out, "--drop", "['a']['b']", "-q").code == 0
    assert {key: value.tolist() for key, value in load_file(out).items()} == {"a.b": [0.0], "c": [3.0]}
    assert run_ckpt(capsys, "remap", path, "-o", out, "--force", "-q", "--rename", "['a']['b']=d").code == 0
    assert set(load_file(out)) == {"a.b", "c", "d"}


@pytest.mark.parametrize("key", [None, 1.5, NAN, b"k", (0, 1), True], ids=repr)
def test_keys_that_are_not_strings_are_shown_and_not_written(key: object, tmp_path: Path) -> None:
    """A key that is not a string is listed as Python writes it; an output needs strings."""
    with opened(tmp_path, saved({key: ONE, "w": TWO})) as checkpoint:
        assert list(checkpoint) == [repr(key), "w"]
        with pytest.raises(PlanError, match="has no unambiguous name"):
            plan_remap(checkpoint)


def test_integers_are_names(tmp_path: Path) -> None:
    """Integer keys of optimizer state and positions in lists are parts of names."""
    with opened(tmp_path, saved({0: ONE, 1: [TWO, THREE]})) as checkpoint:
        assert [step.out.key for step in plan_remap(checkpoint).steps] == ["0", "1.0", "1.1"]


def test_entries_have_names_of_their_own(tmp_path: Path) -> None:
    """Entries with equal dotted names are listed by path too, inside and outside the weights."""
    tree = {"u": ONE, "v": TWO, "w": THREE, "a": {"b": 7}, "a.b": 8}
    with opened(tmp_path, saved({"model": tree, "e.f": 1, "e": {"f": 2}, 1: 3, "1": 4})) as checkpoint:
        assert [(entry.path, entry.value) for entry in checkpoint.entries] == [
            ("e.f", 1), ("e", {"f": 2}), ("[1]", 3), ("1", 4), ("['a']['b']", 7), ("a.b", 8),
        ]  # fmt: skip


PAIR = {"True and 1": (b"\x88", number(1), "1"), "a string twice": (text("w"), text("w"), "w"),
        "1 and 1.0": (number(1), b"G\x3f\xf0\0\0\0\0\0\0", "1.0")}  # fmt: skip


@pytest.mark.parametrize(("first", "second", "name"), PAIR.values(), ids=PAIR.keys())
def test_a_key_that_is_set_twice_is_named(first: bytes, second: bytes, name: str, tmp_path: Path) -> None:
    """A warning names a key that a pickle sets twice; as in torch, the last value counts."""
    body = b"}(" + first + tensor(size=(1,), stride=(1,)) + second + tensor(offset=3, size=(1,), stride=(1,)) + b"u"
    path = write(tmp_path, torch_zip(body))
    (expected,) = torch.load(path, weights_only=False).values()
    with open_checkpoint(path) as checkpoint:
        (key,) = checkpoint
        assert checkpoint.read_bytes(key) == bits(expected)
        assert checkpoint.warnings == (f"a mapping sets '{name}' more than once: the last value counts, as in torch",)


STATES = {
    "a.b": {"t": ONE},
    "a": {"b": {"u": TWO}, "b.c": {"v": THREE}},
    0: {"i": ONE},
    "0": {"s": TWO},
    "x[0]": {"y": ONE},
}


@pytest.mark.parametrize(
    ("inner", "keys"),
    [("['a.b']", "t"), ("['a']['b']", "u"), ("a['b']", "u"), ("a.b.c", "v"), ("a['b.c']", "v"), ("[0]", "i"),
     ("['0']", "s"), ("x[0]", "y"), ("a", "b.u b.c.v")],
)  # fmt: skip
def test_a_path_means_one_place(inner: str, keys: str, tmp_path: Path) -> None:
    """Keys with dots are found at any depth; brackets select exactly one key."""
    path = write(tmp_path, saved({"n": 1, **STATES}))
    with open_checkpoint(f"{path}::{inner}") as checkpoint:
        assert list(checkpoint) == keys.split()
        assert checkpoint.envelope == inner


@pytest.mark.parametrize(
    ("inner", "hint"),
    [("a.b", """write "::['a.b']" or "::['a']['b']\""""), ("0", """write '::[0]' or "::['0']\"""")],
)  # fmt: skip
def test_a_path_that_means_two_places_is_refused_with_both(inner: str, hint: str, tmp_path: Path) -> None:
    path = write(tmp_path, saved(STATES))
    with pytest.raises(FormatError) as caught:
        open_checkpoint(f"{path}::{inner}")
    assert caught.value.reason == f"'{inner}' fits 2 places in the file"
    assert caught.value.hint == hint


def test_a_path_into_a_web_of_references_takes_no_time(tmp_path: Path) -> None:
    """A mapping in a thousand places, under keys of dots, is searched once for each reading of the name."""
    web: dict[str, Any] = {}
    for _ in range(60):
        web = {"a": web, "a.a": web, "a.a.a": web}
    path = write(tmp_path, saved({"w": ONE, "web": web}))
    with pytest.raises(CkptkitError, match="holds nothing at"):
        open_checkpoint(f"{path}::web.{'a.' * 50}b")


_KEYS = (
    st.text("ab.[]0'", max_size=3) | st.integers(0, 2) | st.booleans() | st.none() | st.floats() | st.binary(max_size=2)
)
_PATHS = st.lists(st.lists(_KEYS, min_size=1, max_size=3).map(tuple), max_size=12)


@given(_PATHS)
def test_names_are_all_different(places: list[tuple[object, ...]]) -> None:
    """No two places share a name for any keys, and an unambiguous name is the dotted one."""
    names = unique_names(places)
    assert len(set(names.names)) == len(places) or len(set(map(repr, places))) < len(places)
    for place, name in zip(places, names.names, strict=True):
        assert name in names.ambiguous or name == dotted_key(place)


def test_a_module_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    """A file can have module names with dots, and then two tensors could get one name."""
    module = torch.nn.Module()
    inner = torch.nn.Module()
    inner._parameters["w"] = torch.nn.Parameter(TWO)
    module._parameters["a.w"] = torch.nn.Parameter(ONE)
    module._modules["a"] = inner
    with pytest.raises(FormatError, match=r"would both be called 'a\.w'"):
        opened(tmp_path, saved(module))


def test_show_lists_both_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, saved({"a.b": ONE, "a": {"b": TWO}}))
    ran = run_ckpt(capsys, "show", path)
    assert {"a.b", "['a']['b']"} <= {line.split("  ")[0] for line in ran.out.splitlines()}
    assert ran.err == f"""ckpt: {path}: warning: 'a.b', "['a']['b']" would both be called 'a.b'\n"""
    document = json.loads(run_ckpt(capsys, "show", path, "--json").out)
    assert [info["key"] for info in document["tensors"]] == ["a.b", "['a']['b']"]
