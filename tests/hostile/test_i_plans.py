"""Table I, plans: a plan that would lose or mix up tensors is refused by name before a byte is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.features import needs_safetensors
from tests.helpers_outputs import names_in, same_state, scratch
from tests.helpers_shards import STATE, save
from tests.hostile.contract import Accepted, Command, Refused, assert_refused, run_limited

WITH_TORCH = 8 << 30  # address space: importing torch alone takes gigabytes of it
FIVE = torch.arange(5.0)
COMPLEX = torch.complex(torch.arange(3.0), torch.ones(3))


def renaming(*rules: str) -> Command:
    def make(directory: Path) -> list[str | Path]:
        save(STATE, directory / "in.safetensors")
        return ["remap", directory / "in.safetensors", "-o", directory / "o.safetensors", *rules]

    return make


def merging(*donors: dict[str, torch.Tensor]) -> Command:
    def make(directory: Path) -> list[str | Path]:
        save(STATE, directory / "base.safetensors")
        paths = [directory / f"donor{number}.safetensors" for number in range(len(donors))]
        for path, donor in zip(paths, donors, strict=True):
            save(donor, path)
        return ["merge", directory / "base.safetensors", *paths, "-o", directory / "o.safetensors"]

    return make


def storing(tensor: Any) -> Command:
    def make(directory: Path) -> list[str | Path]:
        torch.save({"w": tensor, "v": torch.ones(1)}, directory / "in.pt")
        return ["convert", directory / "in.pt", "-o", directory / "o.safetensors"]

    return make


def quantized(directory: Path) -> list[str | Path]:
    with warnings.catch_warnings(action="ignore"):  # torch says once in a process that these are on their way out
        return storing(torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8))(directory)


REFUSED: dict[str, Refused] = {
    "I17 two names become one": Refused(renaming("--rename", "re:a\\..*=x"), "would both be called 'x'"),
    "I17 no name": Refused(renaming("--rename", "c.w="), "leaves 'c.w' without a name"),
    "I17 the name of the metadata": Refused(
        renaming("--rename", "c.w=__metadata__"), "a tensor is called '__metadata__'"
    ),
    "I17 a rule that matches nothing": Refused(renaming("--rename", "zz=y"), "--rename 'zz=y' matches none of 3 keys"),
    "I17 a bad regular expression": Refused(renaming("--rename", "re:(=y"), "'re:(' is not a valid regular expression"),
    "I17 a group that is not there": Refused(
        renaming("--rename", "re:c.w=\\9"), "not a valid template for 're:c.w': invalid"
    ),
    "I17 a star too few": Refused(renaming("--rename", "a.*=x"), "has 1 '*' on the left and 0 on the right"),
    "I17 nothing is left": Refused(renaming("--drop", "*"), "the output would have none of 3 tensors"),
    "I18 another shape": Refused(
        merging({**STATE, "a.w": torch.ones(2, 2)}), "'a.w' is [2, 3] in the base and [2, 2] in"
    ),
    "I18 no key in common": Refused(
        merging({"z": torch.ones(1)}), "the donor has no tensor with a key and shape of the base"
    ),
    "I18 no donor": Refused(merging(), "Missing argument 'DONORS...'"),
    "I19 complex128": Refused(storing(torch.ones(2, dtype=torch.complex128)), "'w' would be C128, which safetensors"),
    "I19 sparse": Refused(storing(torch.eye(3).to_sparse()), "'w' cannot be copied: it is a sparse tensor"),
    "I19 meta": Refused(
        storing(torch.ones(2, device="meta")), "'w' cannot be copied: it was saved from the meta device"
    ),
    "I19 quantized": Refused(quantized, "'w' cannot be copied: it is quantised (torch QU8)"),
    "I19 a giant expanded": Refused(storing(torch.ones(1).expand(2**40)), "not enough disk space: 4.4 TB needed"),
}
ACCEPTED: dict[str, Accepted] = {}
OTHER = ("I18 odd donors", "I19 views are written as their values")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch() as name:
        yield Path(name)


DONORS = {
    "NaN": {"a.w": torch.full((2, 3), torch.nan)},
    "integers": {"c.w": torch.tensor([4, 3, 2, 1])},
    "the base itself": STATE,
}


@pytest.mark.parametrize("case", DONORS)
def test_i18_values_of_a_donor_are_copied(case: str, place: Path) -> None:
    """An overlay computes nothing, so NaN and integers are copied byte by byte."""
    arguments = merging(DONORS[case])(place)
    ran = run_limited(*arguments)
    assert ran.code == 0, ran.err
    assert same_state(load_file(place / "o.safetensors"), {**STATE, **DONORS[case]})


VIEWS: dict[str, dict[str, torch.Tensor]] = {
    "conj": {"w": COMPLEX.conj()},
    "neg": {"w": COMPLEX.conj().imag},
    "expanded": {"w": torch.tensor([1.0, 2.0]).expand(3, 2)},
    "overlapping": {"x": FIVE[:3], "y": FIVE[1:4]},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=needs_safetensors("C64") if case == "conj" else ()) for case in VIEWS]
)
def test_i19_views_are_written_as_their_values(case: str, place: Path) -> None:
    torch.save(VIEWS[case], place / "in.pt")
    ran = run_limited("convert", place / "in.pt", "-o", place / "o.safetensors", memory=WITH_TORCH)
    assert ran.code == 0, ran.err
    assert same_state(load_file(place / "o.safetensors"), VIEWS[case])
    assert names_in(place) == ["in.pt", "o.safetensors"]
