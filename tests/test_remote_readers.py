"""Readers on files of a store: what a URL names, and what is checked only when a tensor is read."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from ckptkit import FormatError, PathError, open_checkpoint
from ckptkit.core.files import places
from ckptkit.core.files.remote import forget
from ckptkit.formats import split_path

STATE = {f"layer.{number}.weight": torch.full((300, 100), float(number)) for number in range(9)}


@pytest.fixture
def store() -> Iterator[str]:
    """An empty folder of a store in memory."""
    url = "memory://readers"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)
    forget(url)


def _put(url: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe(url, data)
    forget(url)
    return url


def _saved(*, legacy: bool = False) -> bytearray:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, _use_new_zipfile_serialization=not legacy)
    return bytearray(buffer.getvalue())


SPLIT = {
    "s3://bucket/model/x.pt": ("s3://bucket/model", "x.pt"),
    "s3://bucket/model/": ("s3://bucket", "model"),
    "s3://bucket": ("s3://bucket", ""),
    "https://host/a/x.pt?download=true": ("https://host/a?download=true", "x.pt"),
    "simplecache::s3://bucket/a/x.pt": ("simplecache::s3://bucket/a", "x.pt"),
    "a/x.pt": ("a", "x.pt"),
}


@pytest.mark.parametrize("path", SPLIT)
def test_a_url_has_a_folder_and_a_name(path: str) -> None:
    """The folder and the name are those of the first part with a scheme, and join gives the path again."""
    folder, name = places.split(path)
    assert name == SPLIT[path][1]
    assert places.parent_of(path).split("?")[0] == SPLIT[path][0].split("?")[0]
    if name:
        assert places.join(folder, name).split("?")[0] == path.rstrip("/").split("?")[0]


KEYS = {
    "s3://bucket/x.pt": ("s3://bucket/x.pt", ""),
    "s3://bucket/x.pt::model": ("s3://bucket/x.pt", "model"),
    "s3://bucket/x.pt::['a::b'].m": ("s3://bucket/x.pt", "['a::b'].m"),
    "zip://x.pt::s3://bucket/a.zip": ("zip://x.pt::s3://bucket/a.zip", ""),
    "zip://x.pt::s3://bucket/a.zip::model": ("zip://x.pt::s3://bucket/a.zip", "model"),
    "file:///no/such%20file.pt": ("/no/such file.pt", ""),
    "no/such.pt::model": ("no/such.pt", "model"),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_key_of_a_url_begins_after_its_last_part_with_a_scheme(name: str) -> None:
    """A store is not asked for this, so a URL that does not exist is split too."""
    assert split_path(name) == KEYS[name]


def test_a_url_that_pathlib_changed_is_refused() -> None:
    """pathlib joins the two slashes of a URL, so the path would be one of this machine."""
    with pytest.raises(PathError, match="pathlib has removed a slash"):
        open_checkpoint(Path("s3://bucket/x.pt"))


def test_a_zip_whose_local_header_contradicts_its_directory_is_refused_when_it_is_read(store: str) -> None:
    """No tensor gets the bytes of another one, though the headers are not read when the file is opened."""
    data = _saved()
    at = data.index(b"archive/data/7", data.index(b"PK\3\4")) + len("archive/data/")
    data[at : at + 1] = b"8"
    with open_checkpoint(_put(f"{store}/x.pt", bytes(data))) as checkpoint:
        for key in checkpoint:
            if key != "layer.7.weight":
                assert bytes(checkpoint.read_bytes(key)) == STATE[key].numpy().tobytes()
        with pytest.raises(FormatError, match="disagree on its name"):
            checkpoint.read_bytes("layer.7.weight")


def test_an_old_file_whose_storage_has_another_length_is_refused_when_it_is_read(store: str) -> None:
    """The number of elements before a storage is compared with the pickle when the storage is read."""
    data = _saved(legacy=True)
    length = struct.pack("<q", 300 * 100)
    at = data.rindex(length)
    data[at : at + 8] = struct.pack("<q", 300 * 100 - 1)
    with open_checkpoint(_put(f"{store}/x.pt", bytes(data))) as checkpoint:
        refused = []
        for key in checkpoint:
            try:
                assert bytes(checkpoint.read_bytes(key)) == STATE[key].numpy().tobytes()
            except FormatError as error:
                refused.append(error.reason)
    assert [reason.partition(": ")[2] for reason in refused] == [
        "the pickle says 120000 bytes, the file has 29999 elements of 4 bytes"
    ]
