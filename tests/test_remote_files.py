"""Files and folders of stores: the bytes are those of the object, by few requests, and what goes wrong is one line."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file

from ckptkit import ChangedError, PathError, open_checkpoint, run_checks
from ckptkit.core.files import places
from ckptkit.core.files.pool import FilePool
from ckptkit.core.files.remote import retries, stop_waiting
from ckptkit.core.files.remote.blocks import MOST_HELD, held
from ckptkit.core.files.remote.failures import explain
from ckptkit.core.files.remote.traffic import forget_traffic, meter_of, traffic
from ckptkit.core.files.remote.urls import clean_url, request_url, without_secrets
from ckptkit.core.files.source import ByteSource
from ckptkit.quantized import quantized_weights
from tests.helpers_cli import run_ckpt
from tests.helpers_ranges import RangeServer, range_server

HEAD = 64 << 10
DATA = random.Random(0).randbytes(3_000_000)  # noqa: S311 - any bytes


@pytest.fixture(scope="module")
def running() -> Iterator[RangeServer]:
    with range_server() as server:
        yield server


@pytest.fixture
def server(running: RangeServer, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    """Forget what other tests did to the server; no test waits between two tries."""
    monkeypatch.setattr(retries, "_FIRST_DELAY", 0.0)
    running.__init__(running.address, {"data.bin": DATA})  # type: ignore[misc]
    return running


def opened(url: str) -> ByteSource:
    return places.open_source(places.clean_path(url))


@pytest.mark.parametrize("store", ["memory", "web"])
def test_threads_read_the_bytes_of_the_object(store: str, request: pytest.FixtureRequest) -> None:
    """In any order, with hints and without, small and large, and up to the last byte."""
    if store == "memory":
        fsspec.filesystem("memory").pipe("/remote/data.bin", DATA)
        file = opened("memory://remote/data.bin")
    else:
        file = opened(request.getfixturevalue("server").url("data.bin"))
    wrong: list[tuple[int, int]] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - of a test
        for turn in range(20):
            start = chance.randrange(len(DATA))
            count = min(int(10 ** chance.uniform(0, 6)), len(DATA) - start)
            if turn % 10 == 0:
                file.will_read([(start, count), (start + count, 100_000), (0, 0)])
            if file.read(start, count) != DATA[start : start + count]:
                wrong.append((start, count))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (file.size, wrong) == (len(DATA), [])
    with pytest.raises(ChangedError):
        file.read(len(DATA) - 1, 2)
    file.close()
    with pytest.raises(PathError, match="closed"):
        file.read(0, 1)


def test_size_version_and_first_bytes_are_one_request(server: RangeServer) -> None:
    """The kind, opening, and reading the first bytes ask once; so does a folder that is told first."""
    url = server.url("data.bin")
    assert places.kind_at(url) == "file"
    file = places.open_source(url)
    assert file.read(0, 8) + file.read(8, HEAD - 8) == DATA[:HEAD]
    assert server.asked == [("data.bin", f"bytes=0-{HEAD - 1}")]
    assert places.kind_at(server.url("missing.bin")) == ""
    server.files |= {"many/a": b"a" * 10, "many/b": b"b" * 10}
    server.asked.clear()
    folder = places.folder_at(server.url("many"))
    folder.will_open(["a", "b", "none"])
    assert [folder.open(name).read(0, 10) for name in "ab"] == [b"a" * 10, b"b" * 10]
    assert not folder.has_file("none")
    assert sorted(name for name, _ in server.asked if name != "many/") == ["many/a", "many/b", "many/none"]


def test_what_follows_the_first_bytes_of_a_header_comes_with_them(server: RangeServer) -> None:
    """The rest of a long safetensors header is one more request, and so is the end of a zip archive."""
    header = b'{"__metadata__":{"a":"' + b"x" * 200_000 + b'"}}'
    server.files |= {"long.safetensors": len(header).to_bytes(8, "little") + header, "archive.zip": b"PK\3\4" + DATA}
    assert opened(server.url("long.safetensors")).read(8, len(header)) == header
    zip_ = opened(server.url("archive.zip"))
    assert zip_.read(zip_.size - 65_557, 65_557) == DATA[-65_557:]
    assert [name for name, _ in server.asked] == ["long.safetensors"] * 2 + ["archive.zip"] * 2


def test_one_range_fetches_little_more(server: RangeServer) -> None:
    """Reading at random is not followed by read-ahead; a range of some bytes is at most 64 KiB."""
    file = opened(server.url("data.bin"))
    for start, count in ((2_000_000, 500_000), (1_000_000, 10)):
        server.sent = 0
        assert file.read(start, count) == DATA[start : start + count]
        assert server.sent <= max(count, HEAD)


def test_reading_in_order_is_read_ahead_in_large_requests(server: RangeServer) -> None:
    """A thousand reads of 3 kB become few requests, and no byte is fetched twice."""
    file = opened(server.url("data.bin"))
    for start in range(0, len(DATA), 3000):
        assert file.read(start, 3000) == DATA[start : start + 3000]
    assert len(server.asked) < 12
    assert server.sent == len(DATA)


def test_announced_ranges_are_joined_if_they_are_near(server: RangeServer) -> None:
    """Forty ranges in two groups are two requests; reading them asks nothing more."""
    file = opened(server.url("data.bin"))
    ranges = [(base + 5000 * number, 100) for base in (500_000, 2_000_000) for number in range(20)]
    server.asked.clear()
    file.will_read(ranges)
    assert all(file.read(start, count) == DATA[start : start + count] for start, count in ranges)
    assert len(server.asked) == 2


def test_memory_is_bounded() -> None:
    """Whatever is read and announced, blocks of at most 64 MB are held, and none after the files are closed."""
    store = fsspec.filesystem("memory")
    block = bytes(25 << 20)
    for name in "abc":
        store.pipe(f"/bounded/{name}", block)
    before = held.nbytes
    files = [opened(f"memory://bounded/{name}") for name in "abc"]
    for file in files:
        file.will_read([(0, len(block))])
    buffer = memoryview(bytearray(5 << 20))
    for file in files:
        for start in range(0, len(block), len(buffer)):
            file.read_into(buffer, start)
            assert held.nbytes <= MOST_HELD + (8 << 20)
    for file in files:
        file.close()
    store.rm("/bounded", recursive=True)
    assert held.nbytes <= before


def test_no_byte_is_fetched_twice_where_many_files_are_announced() -> None:
    """What is fetched ahead of a reader of many files is not dropped for what is fetched ahead of another one."""
    store, names = fsspec.filesystem("memory"), [f"{number:02}" for number in range(18)]
    for name in names:
        store.pipe(f"/many/{name}", bytes(4 << 20))
    files = [opened(f"memory://many/{name}") for name in names]
    meter = meter_of("memory://many")
    before = meter.traffic().received
    for file in files:
        file.will_read([(0, file.size)])
    buffer = memoryview(bytearray(4 << 20))
    for file in files:
        file.read_into(buffer, 0)
        file.close()
    store.rm("/many", recursive=True)
    assert meter.traffic().received - before <= len(names) * (4 << 20)  # the first bytes may have been dropped


def test_small_blocks_do_not_divide_a_request(server: RangeServer) -> None:
    """After a few bytes here and there were read, the whole file is read by no more requests than before."""
    file = opened(server.url("data.bin"))
    file.will_read([(start, 100) for start in range(100_000, len(DATA), 200_000)])
    for start in range(100_000, len(DATA), 200_000):
        assert file.read(start, 100) == DATA[start : start + 100]
    server.asked.clear()
    file.will_read([(0, len(DATA))])
    assert file.read(0, len(DATA)) == DATA
    assert len(server.asked) == 1


def test_the_text_of_a_refused_range_is_never_values(server: RangeServer) -> None:
    """A server that refuses a range inside the file, with a text as long as the range, is an error."""
    file = opened(server.url("data.bin"))
    server.failures = [416]
    with pytest.raises(PathError, match="416"):
        file.read(2_000_000, 500)


@pytest.mark.parametrize("opened_first", ["a", "index.json"])
def test_a_file_beside_the_one_that_is_opened_is_asked_again(opened_first: str) -> None:
    """Small files are kept for a minute, but not where the file or the index beside them is opened anew."""
    store = fsspec.filesystem("memory")
    for content in (b"first", b"second"):
        store.pipe({f"/beside/{name}": content for name in ("a", "index.json", "config.json")})
        opened(f"memory://beside/{opened_first}")
        assert places.open_source("memory://beside/config.json").read(0, 4) == content[:4]
    store.rm("/beside", recursive=True)


def test_a_fault_that_passes_is_repeated(server: RangeServer) -> None:
    """A status that may pass, a short body and a cut connection; the bytes that had come are not asked again."""
    server.failures = [503, 429]
    server.cut_after = [1000]
    forget_traffic()
    file = opened(server.url("data.bin"))
    assert file.read(0, HEAD) == DATA[:HEAD]
    server.cut_after = [0, 300_000]
    assert file.read(1_000_000, 1_000_000) == DATA[1_000_000:2_000_000]
    assert server.asked[-1] == ("data.bin", "bytes=1300000-1999999")
    (counts,) = [counts for counts in traffic() if counts.store == server.address]
    assert (counts.retries, counts.requests) == (5, len(server.asked))


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (500, "the server answers 500"),
        (403, "permission denied"),
        (404, "no such file"),
        (418, "the server answers 418"),
    ],
)
def test_a_fault_that_stays_is_one_line(status: int, reason: str, server: RangeServer) -> None:
    """What may pass is tried five times, the rest once."""
    server.failures = [status] * 9
    with pytest.raises(PathError, match=reason) as caught:
        opened(server.url("data.bin"))
    assert len(server.asked) == (5 if status == 500 else 1)
    assert caught.value.path == server.url("data.bin")
    assert "netrc" in (caught.value.hint or "") or status != 403


@pytest.mark.parametrize("etags", [True, False])
def test_two_versions_are_never_mixed(etags: bool, server: RangeServer) -> None:
    """Another object under the same name is an error at the next request, by its ETag or its date."""
    server.etags = etags
    file = opened(server.url("data.bin"))
    file.check_unchanged(by_path=True)
    server.files["data.bin"] = bytes([DATA[0] + 1]) + DATA[1:]
    with pytest.raises(ChangedError, match="replaced"):
        file.read(1_000_000, 10)
    with pytest.raises(ChangedError, match="replaced"):
        file.check_unchanged(by_path=True)
    del server.files["data.bin"]
    file.check_unchanged(by_path=True)


def test_a_changed_object_is_seen_where_reads_do_not_compare() -> None:
    """fsspec's memory has no ETag in its answers, so the check asks."""
    store = fsspec.filesystem("memory")
    store.pipe("/changing", DATA[:100])
    file = opened("memory://changing")
    file.check_unchanged()
    store.pipe("/changing", DATA[:101])
    with pytest.raises(ChangedError):
        file.check_unchanged()


def test_a_server_without_ranges_is_refused_before_its_body(server: RangeServer) -> None:
    """A small file is read whole; of a large one, at most 1 MB is taken."""
    server.ranges = False
    server.files |= {"small.bin": DATA[:500_000], "large.bin": DATA * 10}
    assert opened(server.url("small.bin")).read(400_000, 100_000) == DATA[400_000:500_000]
    with pytest.raises(PathError, match=r"cannot send a part of the file, only all 30\.0 MB") as caught:
        opened(server.url("large.bin"))
    assert "download" in (caught.value.hint or "")
    server.ranges, server.shift = True, 1
    with pytest.raises(PathError, match="another part"):
        opened(server.url("data.bin"))


def test_a_child_process_reads(server: RangeServer) -> None:
    """A fork has neither the event loop nor the threads of its parent, and still reads."""
    file = opened(server.url("data.bin"))
    file.will_read([(1_000_000, 500_000)])
    child = os.fork()
    if not child:
        os._exit(0 if file.read(1_200_000, 1000) == DATA[1_200_000:1_201_000] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert file.read(1_200_000, 1000) == DATA[1_200_000:1_201_000]


SIGNED = "X-Amz-Algorithm=AWS4&X-Amz-Credential=AKIA123%2Fus&X-Amz-Signature=0123456789abcdef0123456789abcdef"
CLEANED = {
    "https://host/a.pt": "https://host/a.pt",
    "https://me:pass-word@host/a.pt": "https://host/a.pt",
    "https://token123@host/": "https://host/",
    f"https://host/a.pt?{SIGNED}": "https://host/a.pt",
    f"https://host/a.pt?versionId=12345abcdefghijklmnopqrst&{SIGNED}": (
        "https://host/a.pt?versionId=12345abcdefghijklmnopqrst"
    ),
    "https://acc.host/c/a.pt?sv=2024&se=2026&sp=r&sig=abc%2Bdef%3D": "https://acc.host/c/a.pt",
    "https://host/a.pt?download=true": "https://host/a.pt?download=true",
    "https://host/a.pt?download=true&token=abc::model.x": "https://host/a.pt?download=true::model.x",
    "https://host/a.pt?k=0123456789abcdefghijk": "https://host/a.pt?k=***",
    "sftp://me:pass-word@host/a.pt": "sftp://me@host/a.pt",
    "S3://Bucket/Key@2": "s3://Bucket/Key@2",
    "abfs://container@account/a.pt": "abfs://container@account/a.pt",
    "zip://a.pt::https://me:pass-word@host/a.zip": "zip://a.pt::https://host/a.zip",
}


@pytest.mark.parametrize("url", CLEANED)
def test_credentials_are_taken_out_and_sent(url: str) -> None:
    """What is shown has none of them and is cleaned to itself; the request has all of them."""
    own_host = f"host{list(CLEANED).index(url)}"  # what one URL has is sent with others of its server, too
    shown = clean_url(url.replace("host", own_host))
    assert shown == clean_url(shown) == CLEANED[url].replace("host", own_host)
    assert request_url(shown).replace(own_host, "host") == url.replace("S3://", "s3://")
    if "pass-word" in url:
        assert "pass-word" not in without_secrets(f"GET {url} failed: pass-word")


def test_two_objects_are_shown_as_two() -> None:
    """Where a value is hidden that could name the object, a number tells two of them apart."""
    urls = [f"https://get/?k={number}bcdefghijklmnopqrstu" for number in (1, 2)]
    shown = [clean_url(url) for url in urls]
    assert shown == ["https://get/?k=***", "https://get/?k=***2"]
    assert [request_url(url) for url in shown] == urls


def test_credentials_reach_the_server_and_the_files_beside(server: RangeServer) -> None:
    """A password goes to the whole server, a signed query to the folder of its file; a message has neither."""
    server.files["folder/config.json"] = b"{}"
    host = server.address.removeprefix("http://")
    url = places.clean_path(f"http://me:pass-word@{host}/folder/a.pt?sig=top-secret")
    assert url == server.url("folder/a.pt")
    with pytest.raises(PathError) as caught:
        places.open_source(url)
    places.folder_at(places.parent_of(url)).open("config.json")
    assert [seen["path"] for seen in server.headers] == [
        "/folder/a.pt?sig=top-secret",
        "/folder/config.json?sig=top-secret",
    ]
    assert all(seen["Authorization"].startswith("Basic ") for seen in server.headers)
    assert not {"pass-word", "top-secret"} & set(str(caught.value).replace("/", " ").split())


def test_few_files_beside_one_on_a_web_server_are_asked_for(server: RangeServer) -> None:
    """Only the configuration that can matter, and without the signature of the other file."""
    server.files["signed/a.safetensors"] = save({"weight": torch.zeros(2, 2)})
    with open_checkpoint(f"{server.url('signed/a.safetensors')}?{SIGNED}") as checkpoint:
        run_checks(checkpoint, fast=True)
    assert [seen["path"] for seen in server.headers] == [f"/signed/a.safetensors?{SIGNED}", "/signed/config.json"]


def test_a_file_of_unknown_size_is_refused_with_the_way_out(server: RangeServer) -> None:
    """A range can be right while nobody knows where the file ends; no more is asked for."""
    server.sizes = False
    with pytest.raises(PathError, match="does not say how large the file is") as caught:
        places.open_source(server.url("data.bin"))
    assert caught.value.hint == "download it, and give its path"
    assert len(server.asked) == 1


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_store_that_lists_is_asked_for_every_configuration(name: str) -> None:
    """Plain dtypes alone do not say that codes are missing; the only configuration does."""
    fsspec.filesystem("memory").pipe(f"/{name}/a.safetensors", save({"q.weight_scale": torch.tensor(1.0)}))
    fsspec.filesystem("memory").pipe(f"/{name}/{name}", b'{"quantization": {"quant_algo": "FP8"}}')
    with open_checkpoint(f"memory://{name}/a.safetensors") as checkpoint:
        assert [weight.missing for weight in quantized_weights(checkpoint).weights] == [("q.weight",)]


@pytest.mark.parametrize(
    ("url", "reason", "hint"),
    [
        ("s4x://bucket/a.pt", "no filesystem for 's4x://'", None),
        ("htps://host/a.pt", "no filesystem for 'htps://'", "did you mean https://?"),
        ("memory://nowhere/a.pt", "no such file or directory", None),
        ("s3://", "the URL is not complete", "write s3://BUCKET/NAME"),
    ],
)
def test_a_wrong_url_is_one_line(url: str, reason: str, hint: str | None) -> None:
    """An unknown scheme names the nearest one."""
    with pytest.raises(PathError, match=reason) as caught:
        opened(url)
    assert (caught.value.hint, caught.value.path) == (hint, url)
    assert type(caught.value) is PathError  # a public class


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filesystem of the URL is not installed."""
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(PathError, match="az:// needs adlfs, which is not installed") as caught:
        opened("az://container/a.pt")
    assert caught.value.hint == "install the extra [az]"
    monkeypatch.setitem(sys.modules, "smbclient", None)  # of the package smbprotocol
    with pytest.raises(PathError, match="smb:// needs smbclient, which is not installed") as caught:
        opened("smb://host/a.pt")
    assert "smbprotocol" in str(caught.value.hint)


class NoCredentialsError(Exception):
    """It is called like the one of botocore."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoCredentialsError("x"), "credentials are needed, and none were found"),
        (PermissionError("no"), "permission denied"),
        (ConnectionResetError(104, "reset"), "the connection was cut"),
        (ConnectionRefusedError(111, "refused"), "the server of s3://bucket does not accept connections"),
        (TimeoutError(), "no answer in time"),
        (ValueError("bad https://u:p@host/x?sig=abc"), "cannot be read: ValueError: bad https://host/x"),
    ],
)
def test_errors_of_libraries_become_plain(error: Exception, said: str) -> None:
    """Their words are shown only where nothing better is known, and without credentials."""
    assert explain(error, "s3://bucket/a.pt").reason == said


def test_a_folder_says_its_names_once(tmp_path: Path) -> None:
    """The listing also answers has_file, has_folder and the sizes; it is asked again after the URL entered again."""
    store = fsspec.filesystem("memory")
    names = ["a.bin", "b.bin", "sub/c.bin", "sub/deeper/d.bin"]
    for name in names:
        store.pipe(f"/listed/{name}", b"1234")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1234")
    folder, local = places.folder_at(places.clean_path("memory://listed/")), places.folder_at(str(tmp_path))
    before = meter_of("memory://listed").traffic().requests
    for most in (100, 1):
        assert folder.names(most) == local.names(most)
    for name in ("a.bin", "sub", "none", "sub/c.bin"):
        assert (folder.has_file(name), folder.has_folder(name)) == (local.has_file(name), local.has_folder(name))
    assert folder.folder("sub").names(9) == local.folder("sub").names(9)
    assert meter_of("memory://listed").traffic().requests - before == 2
    store.rm("/listed/b.bin")
    assert folder.has_file("b.bin")
    assert not places.folder_at(places.clean_path("memory://listed")).has_file("b.bin")
    with pytest.raises(PathError, match="no such"):
        places.folder_at("memory://not-there").names(9)


def test_threads_stop_waiting_after_an_interrupt(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for an answer that does not come ends at once; a new request is answered."""
    file = opened(server.url("data.bin"))
    monkeypatch.setattr(retries, "_FIRST_DELAY", 60.0)
    server.failures = [503]
    raised: list[BaseException] = []

    def read() -> None:
        try:
            file.read(1_000_000, 10)
        except BaseException as error:  # noqa: BLE001 - compared below
            raised.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while thread.is_alive():
        stop_waiting()
        thread.join(0.01)
    assert [type(error) for error in raised] == [KeyboardInterrupt]
    server.failures = []
    assert file.read(1_000_000, 10) == DATA[1_000_000:1_000_010]


def test_a_decoded_password_is_left_out_too() -> None:
    """A library may show a password as it is, and not as the URL encodes it."""
    clean_url("https://me:pa%2Fss%40word1@decoded.test/x.pt?sig=ab%2Bcd%3D")
    assert without_secrets("no pa/ss@word1 and no ab+cd=") == "no *** and no ***"


OUTSIDE = (
    "../other/x.bin",
    "/x.bin",
    "a/../../x.bin",
    "memory://other/x.bin",
    "x.bin::memory://other",
    "a::b",
    "..\\x",
    "",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_request_leaves_the_folder(name: str, server: RangeServer) -> None:
    """A name out of an index cannot lead to another folder, server or filesystem."""
    folder = places.folder_at(places.clean_path(server.url("folder")))
    folder.will_open([name])
    folder.will_list([name] if name else [])  # the empty name is the folder itself
    assert not folder.has_file(name)
    assert not folder.has_folder(name)
    for use in (folder.open, folder.folder):
        with pytest.raises(PathError, match="not a valid name in a folder"):
            use(name)
    assert not server.asked


def test_an_encoded_name_is_the_name_of_a_file(server: RangeServer) -> None:
    """The server gets the percent sign encoded, so that it does not decode two dots."""
    with pytest.raises(PathError, match="no such"):
        places.folder_at(server.url("folder")).open("%2e%2e")
    assert [name for name, _ in server.asked] == ["folder/%252e%252e"]


def test_letters_of_other_alphabets_are_encoded(server: RangeServer) -> None:
    """Some servers and proxies refuse a request that has them as they are."""
    server.files["folder/%C3%BC%E6%97%A5.bin"] = b"1234"
    with closing(places.folder_at(server.url("folder")).open("ü日.bin")) as file:
        assert file.read(0, 4) == b"1234"


@pytest.mark.parametrize(("title", "is_listed"), [("Index of /folder/", True), ("Our models", False)])
def test_a_page_of_links_does_not_prove_that_a_file_is_missing(
    title: str, is_listed: bool, server: RangeServer
) -> None:
    """Only a page that a server makes of a folder has all its names; else the file is asked for."""
    name = f"folder-{is_listed}"
    page = f'<title>{title}</title><a href="x.bin">x</a><a href="sub/">sub</a>'
    server.files |= {f"{name}/": page.encode(), f"{name}/x.bin": b"1", f"{name}/config.json": b"{}"}
    folder = places.folder_at(places.clean_path(server.url(name)))
    assert folder.names(9) == (("x.bin",), ("sub",), is_listed)
    assert folder.has_file("config.json") is not is_listed
    assert folder.has_file("x.bin")
    assert places.kind_at(folder.path) == "folder"


def test_a_hostile_page_of_links_takes_the_time_of_its_length(server: RangeServer) -> None:
    """Links and titles that never end would each be looked for up to the end of the page."""
    page = b"<title" * 50_000 + b"<a " * 150_000 + b'<title>Index of /</title><a href="x.bin">x</a>'
    server.files |= {"hostile/": page, "hostile/x.bin": b"1"}
    folder = places.folder_at(places.clean_path(server.url("hostile")))
    assert folder.names(9) == (("x.bin",), (), True)


def test_all_files_are_checked_at_once(server: RangeServer) -> None:
    """The request of each file is under way before an answer is waited for; a change is seen."""
    names = [f"{number}.bin" for number in range(5)]
    server.files |= dict.fromkeys(names, b"1234")
    pool = FilePool(places.folder_at(places.clean_path(server.address)))
    for name in names:
        pool.get(name)
    server.together = threading.Barrier(len(names))
    pool.check_unchanged(by_path=True)
    server.together = None
    server.files[names[-1]] = b"5678"
    with pytest.raises(ChangedError):
        pool.check_unchanged(by_path=True)
    pool.close()


def test_an_output_is_verified_in_few_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors that follow each other are read back together, and once."""
    save_file({f"{number:02}": torch.ones(200, 200) for number in range(26)}, tmp_path / "a.safetensors")
    forget_traffic()
    out = "memory://verified/a.safetensors"
    assert run_ckpt(capsys, "convert", tmp_path / "a.safetensors", "-o", out, "--verify").code == 0
    (counts,) = (counts for counts in traffic() if counts.store == "memory://verified")
    assert counts.received < 1.1 * 26 * 160_000
    assert counts.requests < 20, counts


def test_what_is_left_out_is_not_read_ahead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An optimizer behind the weights stays where it is."""
    state = {"model": {"w": torch.ones(9, 50_000)}, "optimizer": {"exp_avg": torch.ones(9, 50_000)}}
    torch.save(state, tmp_path / "run.pt")
    fsspec.filesystem("memory").pipe("/ahead/run.pt", (tmp_path / "run.pt").read_bytes())
    forget_traffic()
    assert run_ckpt(capsys, "convert", "memory://ahead/run.pt", "-o", tmp_path / "out", "--format", "dcp").code == 0
    (counts,) = traffic()
    assert counts.received < 9 * 50_000 * 4 + 400_000, counts  # the end of the archive holds its directory
