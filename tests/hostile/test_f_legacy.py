"""Table F: a file of torch before 1.6 is refused where its parts contradict each other."""

from __future__ import annotations

import bz2
import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_formats import legacy_file, mapping, number, refusal, several, storage, tensor, text
from tests.hostile.contract import Accepted, Refused, assert_accepted, assert_refused, one_of_each_row, written


def part(*numbers: int) -> bytes:
    """Return a file with a storage of four floats and a view of a part: key of the view, offset, size in elements."""
    return storage("0", 4, "torch.FloatStorage", "cpu", several(text("v"), *map(number, numbers)))


TAR = ("sys_info", "pickle", "tensors", "storages")


def tar(*names: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar archive with members of these names, the first of which has the type ``kind``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (kind, "/etc/passwd") if name == names[0] else (tarfile.REGTYPE, "")
            archive.addfile(info)
    return buffer.getvalue()


def too_large() -> bytes:
    """Return an archive whose first member has a size larger than the file."""
    info = tarfile.TarInfo(TAR[0])
    info.size = 1 << 30
    return info.tobuf(tarfile.USTAR_FORMAT) + tar(*TAR[1:])


ONE = mapping({"w": tensor()})
TWO = mapping({"w": tensor(), "v": tensor(storage("1"))})
GOOD = legacy_file(ONE)
FLOATS = struct.pack("<q", 4) + bytes(16)
LARGE = struct.pack("<q", 2**50) + bytes(16)
LAUGHS: Any = [1]
for _ in range(60):
    LAUGHS = [LAUGHS, LAUGHS]
MODULE = several(text("module"), text("Net"), text("net.py"), text("class Net: ...")) + b"Q"

REFUSED: dict[str, Refused] = {
    "F1 magic": Refused(written(legacy_file(ONE, magic=0x1950)), "a bare pickle"),
    "F1 protocol": Refused(written(legacy_file(ONE, protocol=1002)), "a legacy torch file whose protocol is not 1001"),
    "F1 protocol of 5,000 digits": Refused(
        written(legacy_file(b"}", protocol=10**5000)), "a legacy torch file whose protocol is not 1001"
    ),
    "F1 protocol of laughs": Refused(
        written(lambda: GOOD.replace(pickle.dumps(1001, 2), pickle.dumps(LAUGHS, 2))),
        "a legacy torch file whose protocol is not 1001",
    ),
    "F2 empty list": Refused(written(legacy_file(ONE, (), b"")), "storage '0' is not in the file"),
    "F2 one is missing": Refused(written(legacy_file(TWO, ("0",), FLOATS)), "storage '1' is not in the file"),
    "F2 unknown": Refused(written(legacy_file(ONE, ("9",))), "no tensor uses storage '9', which is in the file"),
    "F2 twice": Refused(written(legacy_file(TWO, ("0", "0"), FLOATS + FLOATS)), "storage '0' is listed twice"),
    "F2 no list": Refused(written(legacy_file(b"}", {"0": 1})), "without a list of storages"),
    "F2 no names": Refused(written(legacy_file(b"}", (1.5,))), "without a list of storages"),
    "F2 a name of 5,000 digits": Refused(written(legacy_file(b"}", (10**5000,))), "without a list of storages"),
    "F3 more than named": Refused(
        written(legacy_file(ONE, stored=struct.pack("<q", 5) + bytes(20))),
        "storage '0': the pickle says 16 bytes, the file has 5 elements of 4 bytes",
    ),
    "F3 negative": Refused(written(legacy_file(ONE, stored=struct.pack("<q", -4) + bytes(16))), "-4 elements"),
    "F3 2^50 stored": Refused(
        written(legacy_file(ONE, stored=LARGE)), "the file has 1125899906842624 elements of 4 bytes"
    ),
    "F3 2^50 named and stored": Refused(
        written(legacy_file(mapping({"w": tensor(storage("0", 2**50))}), stored=LARGE)),
        "ends 4,503,599,627,370,480 bytes before the end of storage '0'",
    ),
    "F4 truncated": Refused(written(GOOD[:-1]), "ends 1 byte before the end of storage '0'"),
    "F4 no length": Refused(written(GOOD[:-20]), "ends before storage '0': truncated?"),
    "F4 junk behind": Refused(written(GOOD + b"junk"), "4 bytes follow the last storage"),
    "F5 view past the end": Refused(written(legacy_file(mapping({"w": tensor(part(2, 3))}))), "ends at byte 20 of 16"),
    "F5 past its part": Refused(
        written(legacy_file(mapping({"w": tensor(part(2, 2))}))), "'w': the view ends at byte 16"
    ),
    "F5 negative": Refused(
        written(legacy_file(mapping({"w": tensor(part(-1, 2))}))), "a view of storage '0' is not valid"
    ),
    "F5 one number short": Refused(
        written(legacy_file(mapping({"w": tensor(part(1))}))), "a view of storage '0' is not valid"
    ),
    "F5 beyond 64 bits": Refused(
        written(legacy_file(mapping({"w": tensor(part(2**70, 1))}))), "a view of storage '0' is not valid"
    ),
    "F7 a symbolic link": Refused(
        written(tar(*TAR, kind=tarfile.SYMTYPE)), "member 'sys_info' of the tar archive is not a plain file"
    ),
    "F7 a hard link": Refused(
        written(tar(*TAR, kind=tarfile.LNKTYPE)), "member 'sys_info' of the tar archive is not a plain file"
    ),
    "F7 a member is missing": Refused(written(tar(*TAR[:3])), "without its member 'storages'"),
    "F7 a member that climbs out": Refused(written(tar(*TAR, "../x")), "with an unexpected member '../x'"),
    "F7 a member twice": Refused(
        written(tar(*TAR, "storages")), "two members of the tar archive are called 'storages'"
    ),
    "F7 a size beyond the file": Refused(written(too_large()), "member 'sys_info' of the tar archive ends"),
    "F8 gzip": Refused(written(gzip.compress(tar(*TAR)), "x.tar.gz"), "a gzip-compressed file"),
    "F8 bzip2": Refused(written(bz2.compress(tar(*TAR)), "x.tar.bz2"), "a bzip2-compressed file"),
}
ACCEPTED: dict[str, Accepted] = {
    "F6 embedded source": Accepted(
        written(legacy_file(mapping({"w": tensor(), "m": MODULE}))), "embeds source code of net.py", "F32"
    ),
}
OTHER = ()


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_given(name: str, tmp_path: Path) -> None:
    assert REFUSED[name].reason in refusal(str(REFUSED[name].make(tmp_path))).reason


@pytest.mark.parametrize("name", one_of_each_row(REFUSED))
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, REFUSED[name])


@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read_with_a_warning(name: str, tmp_path: Path) -> None:
    assert_accepted(tmp_path, ACCEPTED[name])
