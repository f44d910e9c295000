"""Outputs in S3, on moto's server: torch and safetensors read what s3fs downloads, or nothing is there at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptkit
from ckptkit import convert
from ckptkit.core.files.places import folder_at, kind_at
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_outputs import same_state, tensor_of
from tests.helpers_stores import is_as_told
from tests.oracles.servers.processes import free_port, run_command, server
from tests.oracles.servers.proxy import Proxy
from tests.oracles.servers.s3 import S3Server, variables_of

s3fs = pytest.importorskip("s3fs")
STATE = {
    "a.weight": tensor_of("F32", (300, 400)),
    "a.bias": tensor_of("F32", (40,), 1),
    "b": tensor_of("BF16", (50,), 2),
}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server of moto: uploads to rclone's can take minutes here, for a reason that was not found."""
    root, port = tmp_path_factory.mktemp("moto"), free_port()
    with server([sys.executable, "-m", "moto.server", "-p", str(port)], port, root / "moto.log"):
        yield S3Server(root, f"http://127.0.0.1:{port}")


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The filesystem of the bucket, in which nothing is left when the test ends: no unfinished upload either."""
    for name, value in {**s3.variables, "AWS_ENDPOINT_URL": s3.address}.items():  # fsspec has read its own before
        monkeypatch.setenv(name, value)
    filesystem = s3fs.S3FileSystem(endpoint_url=s3.address, skip_instance_cache=True, use_listings_cache=False)
    if not filesystem.exists("tests"):
        filesystem.mkdir("tests")
    yield filesystem
    assert unfinished(filesystem) == []
    filesystem.rm("tests/up", recursive=True) if filesystem.exists("tests/up") else None


def unfinished(filesystem: Any) -> list[str]:
    uploads: list[dict[str, str]] = filesystem.call_s3("list_multipart_uploads", Bucket="tests").get("Uploads") or []
    return [upload["Key"] for upload in uploads]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "in.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"], "torch_dtype": "float32"}))
    return tmp_path / "in.safetensors"


@pytest.fixture
def ckpt(bucket: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:  # noqa: ARG001 - the bucket is used
    """Run a command in this process, and return its messages."""

    def run(*words: str | Path, code: int = 0) -> str:
        ran = run_ckpt(capsys, *words)
        assert ran.code == code, ran.err
        return ran.err

    return run


def running(proxy: Proxy, *words: str | Path) -> subprocess.Popen[str]:
    """Start ``ckpt`` with the variables of a user whose S3 server is the proxy."""
    environment = {**os.environ, **variables_of(proxy.url), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "ckptkit", *words], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_other_libraries_read_what_was_written(
    s3: S3Server, bucket: Any, ckpt: Callable[..., str], source: Path, tmp_path: Path
) -> None:
    """A file, shards with config.json, a torch file and a distributed checkpoint; also from store to store."""

    def downloaded() -> Path:
        shutil.rmtree(tmp_path / "got", ignore_errors=True)
        bucket.get("tests/up", str(tmp_path / "got"), recursive=True)
        return tmp_path / "got"

    base = f"{s3.url}/up"
    ckpt("convert", source, "-o", f"{base}/a.safetensors", "--verify")
    same_state(load_file(downloaded() / "a.safetensors"), STATE)
    err = ckpt("convert", f"{base}/a.safetensors", "-o", f"{base}/a.pt", "--dtype", "F64", "--verify")
    assert "read back by ckptkit alone" in err
    here = downloaded()
    for mmap in (False, True):
        doubled = torch.load(here / "a.pt", weights_only=True, mmap=mmap)
        same_state(doubled, {key: value.double() for key, value in STATE.items()})
    ckpt("convert", source, "-o", f"{base}/shards", "--max-shard-size", "400kB", "--carry")
    here = downloaded()
    index = json.loads((here / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    same_state({key: load_file(here / "shards" / name)[key] for key, name in index.items()}, STATE)
    assert (here / "shards" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    ckpt("convert", f"{base}/shards", "-o", f"{base}/dcp", "--format", "dcp", "--verify")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    here = downloaded()
    dcp_to_torch_save(here / "dcp", tmp_path / "dcp.pt")
    same_state(torch.load(tmp_path / "dcp.pt", weights_only=True), STATE)
    ckpt("convert", f"{base}/shards", "-o", tmp_path / "back.safetensors", "--carry", "--force")
    same_state(load_file(tmp_path / "back.safetensors"), STATE)
    assert "already exists" in ckpt("convert", source, "-o", f"{base}/shards", "--max-shard-size", "1MB", code=2)
    ckpt("convert", source, "-o", f"{base}/shards", "--max-shard-size", "1GB", "--force")
    here = downloaded()
    assert sorted(os.listdir(here / "shards")) == ["config.json", "model.safetensors"]
    same_state(load_file(here / "shards" / "model.safetensors"), STATE)


def test_a_patch_and_what_it_makes_may_be_in_a_bucket(
    s3: S3Server, bucket: Any, ckpt: Callable[..., str], source: Path, tmp_path: Path
) -> None:
    """The output of a refused base is not there, although the store would have named it at the end."""
    tuned = {**STATE, "a.bias": STATE["a.bias"] * 2}
    save_file(tuned, tmp_path / "tuned.safetensors")
    save_file({**STATE, "a.weight": STATE["a.weight"] + 1}, tmp_path / "other.safetensors")
    base = f"{s3.url}/up"
    ckpt("delta", source, tmp_path / "tuned.safetensors", "-o", f"{base}/patch")
    ckpt("apply", source, f"{base}/patch", "-o", f"{base}/out.safetensors", "--verify")
    ckpt("apply", source, f"{base}/patch", "-o", f"{base}/shards", "--max-shard-size", "400kB")
    wrong = ckpt("apply", tmp_path / "other.safetensors", f"{base}/patch", "-o", f"{base}/wrong.safetensors", code=2)
    assert "not the base of this patch" in wrong
    bucket.get("tests/up", str(tmp_path / "got"), recursive=True)
    assert sorted(os.listdir(tmp_path / "got")) == ["out.safetensors", "patch", "shards"]
    same_state(load_file(tmp_path / "got" / "out.safetensors"), tuned)
    with ckptkit.open_checkpoint(tmp_path / "got" / "shards") as found:
        same_state(found.state_dict(), tuned)


def test_an_empty_object_can_mark_a_folder(s3: S3Server, bucket: Any) -> None:
    """The files below it are what a user means. An empty object alone is a file, and so is any other object."""
    bucket.pipe({f"tests/up/{name}": b"" for name in ("full", "bare", "slash/")})
    bucket.pipe({f"tests/up/{name}": b"1" for name in ("full/x.bin", "both", "both/x.bin", "slash/x.bin")})
    kinds = {name: kind_at(f"{s3.url}/up/{name}") for name in ("full", "bare", "both", "both/", "slash")}
    assert kinds == {"full": "folder", "bare": "file", "both": "file", "both/": "folder", "slash": "folder"}
    assert folder_at(f"{s3.url}/up/slash").names(9) == (("x.bin",), (), True)


def test_files_beside_the_result(s3: S3Server, bucket: Any, ckpt: Callable[..., str], source: Path) -> None:
    """Plans, rules and digests are written to the bucket and read from there."""
    base = f"{s3.url}/up"
    ckpt("remap", source, "--rename", "a.*=c.*", "-o", f"{base}/c.safetensors", "--plan", f"{base}/plan.json")
    ckpt("remap", source, "--apply", f"{base}/plan.json", "-o", f"{base}/d.safetensors")
    assert bucket.cat("tests/up/c.safetensors") == bucket.cat("tests/up/d.safetensors")
    ckpt("align", source, f"{base}/c.safetensors", "-o", f"{base}/rules.toml")
    ckpt("remap", f"{base}/c.safetensors", "--rules", f"{base}/rules.toml", "-o", f"{base}/e.safetensors")
    bucket.get("tests/up/e.safetensors", str(source.with_name("e.safetensors")))
    same_state(load_file(source.with_name("e.safetensors")), STATE)
    ckpt("digest", f"{base}/c.safetensors", "-o", f"{base}/digests.txt")
    ckpt("digest", f"{base}/c.safetensors", "--check", f"{base}/digests.txt")


FAULTS = {
    "the answer to every part": {"method": "PUT", "loses_answer": True, "times": -1},
    "the last request": {"method": "POST", "status": 500, "times": -1, "skip": 1},
    "every part": {"method": "PUT", "status": 500, "times": -1},
}


NAMING = {"method": "POST", "path": "uploadId="}  # the request that gives a file its name
LOST = {**NAMING, "loses_answer": True}
LOSSES = {  # the fault, whether it happens to every try, and what was there
    "new": (NAMING, 1, b""),
    "replaced": (NAMING, -1, b"old"),
    "new and small": ({"method": "PUT", "path": "/up/l."}, -1, b""),
}


@pytest.mark.parametrize(("request_", "times", "old"), LOSSES.values(), ids=LOSSES)
def test_a_lost_answer_to_the_last_request_is_not_an_error(  # noqa: PLR0917
    s3: S3Server, bucket: Any, tmp_path: Path, proxied: Callable[..., Proxy],
    request_: dict[str, str], times: int, old: bytes,
) -> None:  # fmt: skip
    """The store has done what was asked, so the file is there, and is the right one."""
    if old:
        bucket.pipe("tests/up/l.safetensors", old)
    source = tmp_path / "in.safetensors"
    save_file({"a": torch.rand(99_999 if request_ is NAMING else 99)}, source)
    proxy = proxied(s3.address)
    happening = proxy.fail(**request_, loses_answer=True, times=times)
    environment = variables_of(proxy.url)
    ran = run_command("convert", source, "-o", f"{s3.url}/up/l.safetensors", "--force", environment=environment)
    assert (ran.code, happening.happened > 0) == (0, True), ran.err
    bucket.get("tests/up/l.safetensors", str(tmp_path / "got.safetensors"))
    same_state(load_file(tmp_path / "got.safetensors"), load_file(source))


def test_a_lost_answer_of_a_server_with_other_etags(
    s3_without_etags: S3Server, tmp_path: Path, proxied: Callable[..., Proxy]
) -> None:
    """The server of rclone does not name objects by the sums of their parts: a new state of the right size counts."""
    place = s3_without_etags.folder / "lost.safetensors"
    place.write_bytes(b"old")
    save_file({"a": torch.rand(99_999)}, tmp_path / "in.safetensors")
    proxy = proxied(s3_without_etags.address)
    happening = proxy.fail(**NAMING, loses_answer=True)
    words = ("convert", tmp_path / "in.safetensors", "-o", f"{s3_without_etags.url}/{place.name}", "--force")
    ran = run_command(*words, environment=variables_of(proxy.url))
    assert (ran.code, happening.happened) == (0, 1), ran.err
    assert place.read_bytes() == (tmp_path / "in.safetensors").read_bytes()


@pytest.mark.parametrize(("size", "old"), [(99, b""), (99, b"old"), (99_999, b"")])
def test_a_writer_who_comes_at_the_last_moment_is_not_overwritten(  # noqa: PLR0917
    s3: S3Server, bucket: Any, tmp_path: Path, proxied: Callable[..., Proxy], size: int, old: bytes
) -> None:
    """The request that names the file says what it replaces, and the store refuses it.

    The server of moto does not compare when an upload of parts replaces an object; S3 does.
    """
    if old:
        bucket.pipe("tests/up/w.safetensors", old)
    save_file({"a": torch.rand(size)}, tmp_path / "in.safetensors")
    proxy = proxied(s3.address)
    words = {"method": "PUT", "path": "/up/w."} if size < 100 else NAMING
    held = proxy.fail(**words, waits=True)
    with running(proxy, "convert", tmp_path / "in.safetensors", "-o", f"{s3.url}/up/w.safetensors", "--force") as run:
        assert held.arrived.wait(30)
        bucket.pipe("tests/up/w.safetensors", b"of another program")
        held.go_on.set()
        _, err = run.communicate(timeout=30)
    assert run.returncode == 2
    assert "another program" in err
    assert bucket.cat("tests/up/w.safetensors") == b"of another program"


def test_a_store_without_conditions_is_written_to(
    s3: S3Server, bucket: Any, source: Path, proxied: Callable[..., Proxy]
) -> None:
    """A store may refuse the condition as something that it does not know; then there is none."""
    proxy = proxied(s3.address)
    refusal = proxy.fail(**NAMING, status=501)
    ran = run_command("convert", source, "-o", f"{s3.url}/up/n.safetensors", environment=variables_of(proxy.url))
    assert (ran.code, refusal.happened) == (0, 1), ran.err
    assert bucket.exists("tests/up/n.safetensors")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("size", [99, 99_999])
def test_requests_are_counted_as_they_are_sent(
    s3: S3Server, tmp_path: Path, proxied: Callable[..., Proxy], size: int
) -> None:
    """``-v`` says how many there were; s3fs asks twice where nothing is, which counts as one."""
    save_file({"a": torch.rand(size)}, tmp_path / "in.safetensors")
    proxy = proxied(s3.address)
    words = ("convert", tmp_path / "in.safetensors", "-o", f"{s3.url}/up/v.safetensors", "-v", "--verify")
    ran = run_command(*words, environment=variables_of(proxy.url))
    seen = [request for request in proxy.requests() if "list-type" not in request.path]
    assert f"{s3.url}: {len(seen)} requests in " in ran.err, (seen, ran.err)


def test_a_missing_bucket_is_refused_before_values_are_read(
    s3: S3Server, bucket: Any, source: Path, proxied: Callable[..., Proxy]
) -> None:
    """The header of the input is read, and nothing more."""
    bucket.put(str(source), "tests/up/in.safetensors")
    proxy = proxied(s3.address)
    for output in ("a.safetensors", "a.pt"):
        words = ("convert", f"{s3.url}/up/in.safetensors", "--verify", "-o", f"s3://missing/{output}")
        ran = run_command(*words, environment=variables_of(proxy.url))
        assert (ran.code, "there is no bucket s3://missing" in ran.err) == (2, True), ran.err
    assert proxy.bytes_sent < 2 * (80 << 10)
    assert proxy.requests("missing", "PUT") == proxy.requests("missing", "POST") == []


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_nothing_is_left_after_a_fault(
    s3: S3Server, bucket: Any, source: Path, proxied: Callable[..., Proxy], fault: dict[str, Any]
) -> None:
    """The error is one line and a hint; nothing is visible, and no upload is unfinished."""
    proxy = proxied(s3.address)
    proxy.fail(**fault)
    few = {"FSSPEC_S3": json.dumps({"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 3}}})}
    ran = run_command("convert", source, "-o", f"{s3.url}/up/f.safetensors", environment=variables_of(proxy.url) | few)
    reason = "the server answers 500" if "status" in fault else ""
    line = ran.err.splitlines()[0]
    assert (ran.code, line.startswith(f"ckpt: {s3.url}/up/f.safetensors: {reason}")) == (2, True), ran.err
    assert not bucket.exists("tests/up/f.safetensors")


@pytest.mark.parametrize(
    ("number", "shards"), [(signal.SIGTERM, ()), (signal.SIGINT, ("--max-shard-size", "16MB"))], ids=["file", "shards"]
)
def test_a_signal_leaves_nothing(
    s3: S3Server,
    bucket: Any,
    source: Path,
    proxied: Callable[..., Proxy],
    *,
    number: int,
    shards: tuple[str, ...],
) -> None:
    """Whenever the signal comes, the bucket is empty when the process has ended, and no upload is unfinished."""
    save_file({str(key): torch.ones(4 << 20) for key in range(4)}, source)
    proxy = proxied(s3.address, latency=0.05)
    words = ["convert", str(source), "-o", f"{s3.url}/up/k{'' if shards else '.safetensors'}"]
    for parts in (1, 4, 7):
        proxy.reset()
        run = running(proxy, *words, *shards)
        until = time.monotonic() + 30
        while len(proxy.requests("up/k", "PUT")) < parts and run.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        run.send_signal(number)
        _, err = run.communicate(timeout=30)
        assert run.returncode == 128 + number, err
        assert not bucket.exists("tests/up") or bucket.find("tests/up") == []
        assert unfinished(bucket) == []


SIZE = "400kB"  # of a shard: there are four, each sent in parts


def shards_of(number: int, path: Path) -> Path:
    save_file({f"{key}.weight": torch.full((300, 300), float(number + key)) for key in range(4)}, path)
    return path


class Replaced(NamedTuple):
    """A folder of shards in the bucket, and the files before and after ``command``, which replaces them."""

    command: list[str]
    old: dict[str, bytes]
    new: dict[str, bytes]
    now: Callable[[], dict[str, bytes]]
    url: str


@pytest.fixture
def replaced(request: pytest.FixtureRequest, s3: S3Server, bucket: Any, tmp_path: Path) -> Replaced:
    """A folder whose files all have the same names, have other names, or do not exist yet."""
    source, url = shards_of(10, tmp_path / "new.safetensors"), f"{s3.url}/up/r"

    def now() -> dict[str, bytes]:
        found = bucket.find("tests/up/r") if bucket.exists("tests/up/r") else []
        return {path.rpartition("/")[2]: bucket.cat(path) for path in found}

    command = ["convert", str(source), "-o", url, "--max-shard-size", SIZE, "--force"]
    convert(source, tmp_path / "new", max_shard_size=SIZE)
    new = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    if request.param != "nothing":
        size = SIZE if request.param == "same names" else "800kB"
        convert(shards_of(0, tmp_path / "old.safetensors"), tmp_path / "old", max_shard_size=size)
        bucket.put(str(tmp_path / "old"), "tests/up/r", recursive=True)
    return Replaced(command, now(), new, now, url)


@pytest.mark.parametrize(
    ("replaced", "number", "times"),
    [
        ("same names", signal.SIGINT, 1),
        ("other names", signal.SIGTERM, 1),
        ("nothing", signal.SIGINT, 1),
        ("same names", signal.SIGTERM, 2),
    ],
    indirect=["replaced"],
)
def test_a_signal_while_files_get_their_names(
    s3: S3Server, proxied: Callable[..., Proxy], replaced: Replaced, number: int, times: int
) -> None:
    """The signal waits, and all is new; or it comes twice, and the message says where each file is from."""
    proxy = proxied(s3.address)
    held = proxy.fail(**NAMING, skip=1, waits=True)
    with running(proxy, *replaced.command) as run:
        assert held.arrived.wait(30)
        for _ in range(times):
            run.send_signal(number)
            wait_for_signals(run.pid)
        held.go_on.set()
        _, err = run.communicate(timeout=30)
    assert run.returncode == 128 + number, err
    now = replaced.now()
    assert is_as_told(told_in(err), replaced.url, now, replaced.old, replaced.new), (sorted(now), err)
    if times == 1:
        assert now == (replaced.new if replaced.old else {}), err
    else:
        assert now not in (replaced.new, replaced.old), err


def wait_for_signals(process: int) -> None:
    """Return when the process has no signal that it has not taken yet."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        if all(int(line.split()[1], 16) == 0 for line in lines if line.startswith(("SigPnd", "ShdPnd"))):
            break
        time.sleep(0.01)
    time.sleep(0.1)  # Python runs the handler after the system has handed the signal over


@pytest.mark.parametrize(
    ("replaced", "skip"), [("same names", 0), ("same names", 2), ("same names", 4), ("other names", 2)],
    indirect=["replaced"],
)  # fmt: skip
def test_a_store_that_fails_while_files_get_their_names(
    s3: S3Server, proxied: Callable[..., Proxy], replaced: Replaced, skip: int
) -> None:
    """The error says which files are new, old and gone; the same command repairs it."""
    proxy = proxied(s3.address)
    if skip < 4:
        proxy.fail(**NAMING, skip=skip, status=403)
    else:
        proxy.fail(method="PUT", path="index.json", status=403)
    ran = run_command(*replaced.command, environment=variables_of(proxy.url))
    assert ran.code == 2, ran.err
    now = replaced.now()
    assert is_as_told(told_in(ran.err), replaced.url, now, replaced.old, replaced.new), (sorted(now), ran.err)
    if skip == 0:
        assert now == replaced.old
    if skip == 2:
        assert run_command(*replaced.command, environment=s3.variables).code == 0
        assert replaced.now() == replaced.new


def told_in(err: str) -> str:
    """Return what was printed as it was said: a long hint has lines."""
    return err.replace("\n      ", "; ")


@pytest.mark.usefixtures("bucket")
def test_memory_is_bounded(s3: S3Server, tmp_path: Path) -> None:
    """An upload of 400 MB takes less than 200 MB more than that of a small file."""
    took = []
    for name, size in (("small", 1 << 20), ("large", 400 << 20)):
        # The file is sparse: memory that this process has used counts for a process that it starts.
        header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
        ran = run_command("convert", path, "-o", f"{s3.url}/up/{name}.safetensors", environment=s3.variables)
        assert ran.code == 0, ran.err
        took.append(ran.memory)
    assert took[1] - took[0] < 200 << 20
