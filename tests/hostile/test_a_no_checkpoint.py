"""Table A: the error for a file that is not a checkpoint says what the file is."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.helpers_formats import saved
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, written

STATE = {"w": torch.arange(4.0)}
SAFETENSORS, ZIP = save(STATE), saved(STATE)


def unreadable(directory: Path) -> Path:
    path = written(SAFETENSORS)(directory)
    path.chmod(0)
    return path


def linked(name: str, target: str, directory: Path) -> Path:
    (directory / name).symlink_to(target)
    return directory / name


def fifo(directory: Path) -> Path:
    os.mkfifo(directory / "fifo")
    return directory / "fifo"


def listening(directory: Path) -> Path:
    here = os.getcwd()
    os.chdir(directory)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.chdir(here)
    return directory / "socket"


def readme(directory: Path) -> Path:
    written(b"# A model", "README.md")(directory)
    return directory


REFUSED: dict[str, Refused] = {
    "A1 empty": Refused(written(b""), "the file is empty"),
    "A2 one byte": Refused(written(b"P"), "too short to be a checkpoint: 1 bytes"),
    "A2 the first bytes of a zip": Refused(written(b"PK\3\4"), "no directory at its end, so it is probably truncated"),
    "A3 pointer": Refused(written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "a git-lfs pointer"),
    "A4 HTML": Refused(written(b"<!DOCTYPE html><title>404</title>"), "an HTML page, not a checkpoint"),
    "A5 zeros": Refused(written(bytes(4096)), "only zero bytes (an interrupted write?)"),
    "A6 gzip": Refused(written(gzip.compress(ZIP)), "a gzip-compressed file"),
    "A7 text": Refused(written(b"epoch 1, loss 0.3\n"), "a text file, which holds no tensors"),
    "A7 PNG": Refused(written(b"\x89PNG\r\n\x1a\n" + bytes(20)), "a PNG picture"),
    "A7 7z": Refused(written(b"7z\xbc\xaf\x27\x1c" + bytes(20)), "a 7-zip archive"),
    "A8 an empty directory": Refused(lambda directory: directory, "a directory without a checkpoint"),
    "A8 a directory of other files": Refused(readme, "a directory without a checkpoint"),
    "A9 missing": Refused(lambda directory: directory / "none.pt", "no such file or directory"),
    "A10 FIFO": Refused(fifo, "not a regular file"),
    "A10 device": Refused(lambda _: Path("/dev/zero"), "not a regular file"),
    "A10 socket": Refused(listening, "not a regular file"),
    "A11 dangling": Refused(
        lambda directory: linked("x.pt", "gone.pt", directory), "a symbolic link to 'gone.pt', which"
    ),
    "A11 loop": Refused(lambda directory: linked("x.pt", "x.pt", directory), "too many levels of symbolic links"),
    "A13 unfinished zip": Refused(
        written(ZIP[:-100], "x.pt.incomplete"), "no directory at its end, so it is probably truncated"
    ),
    "A13 unfinished safetensors": Refused(written(SAFETENSORS[:-8], "x.crdownload"), "8 of 16 bytes are missing"),
    "A14 HDF5": Refused(written(b"\x89HDF\r\n\x1a\n" + bytes(20), "x.h5"), "an HDF5 file"),
    "A14 ONNX": Refused(written(b"\x08\x07\x12\x07pytorch\x1a\x031.8", "x.onnx"), "an ONNX model"),
}
ACCEPTED: dict[str, Accepted] = {
    "A12 safetensors as .pt": Accepted(
        written(SAFETENSORS), "the file name says torch, but the content is safetensors", "F32"
    ),
    "A12 zip as .safetensors": Accepted(
        written(ZIP, "x.safetensors"), "the file name says safetensors, but the content is torch-zip", "F32"
    ),
}
OTHER = ("A9 unreadable",)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read_by_its_content(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a9_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, Refused(unreadable, "permission denied"))
