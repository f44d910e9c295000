"""``ckpt digest``: hashes of tensors that no format, name or order changes; and checks against recorded hashes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

import ckptkit
import ckptkit.testing
from ckptkit.core.checkpoint import Payload, TensorInfo
from ckptkit.digests.hashing import hash_tensors
from ckptkit.errors import ArgumentError, ChangedError, CkptkitError, FormatError, ModelError, PlanError
from ckptkit.values.workers import Workers
from tests.helpers_cli import ROOT, Ran, run_ckpt

TEN, DDP = (str(ROOT / "fixtures" / name) for name in ("lenet_10class.pth", "lenet_ddp.pt"))


def text_of(key: str) -> str:
    return json.dumps(key).replace("\x7f", "\\u007f")


def by_hand(path: Path, hash_of: Callable[[bytes], Any] = hashlib.sha256) -> dict[str, str]:
    """The hash of each tensor of a safetensors file, by hashlib and the bytes of the file alone."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    hashes = {}
    for key, tensor in header.items():
        if key != "__metadata__":
            start, stop = tensor["data_offsets"]
            look = json.dumps([tensor["dtype"], tensor["shape"]], separators=(",", ":"))
            hashes[key] = hash_of(f"{look}\n".encode() + data[start:stop]).hexdigest()
    return hashes


def of_tensors(found: ckptkit.Digests) -> dict[str, str]:
    return {key: tensor.digest.partition(":")[2] for key, tensor in found.tensors.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Tensors of every kind of dtype and shape; one is long, so that several tasks hash it."""
    torch.manual_seed(0)
    floats = {name: torch.randn(3, 5).to(getattr(torch, name)) for name in ("float64", "float16", "bfloat16")}
    return {
        **floats,
        "long": torch.randn(1500, 1000),
        "float8": torch.randn(7).to(torch.float8_e4m3fn),
        "bool": torch.tensor([[True, False]]),
        "int": torch.arange(-3, 3),
        "complex": torch.randn(4, dtype=torch.complex64),
        "scalar": torch.tensor(-0.0),
        "none": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "schlüssel \x1b[2J\x7f\n": torch.ones(2),
    }


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3"])
def test_digests_are_what_hashlib_makes_of_the_bytes_of_safetensors(
    algorithm: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The layout that docs/howto/digests.md defines: dtype and shape as JSON, then the bytes, without the key."""
    path = tmp_path / "a.safetensors"
    hash_of: Callable[[bytes], Any] = hashlib.sha256 if algorithm == "sha256" else xxhash.xxh3_128
    state = dict(state)
    number = state.pop("complex")  # which older versions of safetensors do not take
    of_complex = ckptkit.digest({"a": number}, algorithm=algorithm).tensors["a"].digest
    look = b'["C64",[4]]\n'
    assert of_complex == f"{algorithm}:{hash_of(look + number.numpy().tobytes()).hexdigest()}"
    save_file(state, path)
    found = ckptkit.digest(path, algorithm=algorithm)
    expected = by_hand(path, hash_of)
    assert of_tensors(found) == expected
    assert list(found.tensors) == sorted(expected)
    lines = [f"{algorithm}:{expected[key]}  {text_of(key)}\n" for key in sorted(expected)]
    assert found.contents == f"{algorithm}:{hash_of(''.join(lines).encode()).hexdigest()}"
    shapes = [
        f"[{text_of(key)},{json.dumps(list(state[key].shape), separators=(',', ':'))}]\n" for key in sorted(state)
    ]
    assert found.names_and_shapes == f"{algorithm}:{hash_of(''.join(shapes).encode()).hexdigest()}"
    last = [f"{found.contents}  contents\n", f"{found.names_and_shapes}  names and shapes\n"]
    assert f"{found}\n" == "".join([*lines, *last])
    assert all(line.isascii() and line.isprintable() for line in str(found).splitlines())


def _torch_zip(state: dict[str, torch.Tensor], path: Path) -> object:
    torch.save({key: state[key] for key in reversed(state)}, path / "a.pt")
    return path / "a.pt"


def _torch_legacy(state: dict[str, torch.Tensor], path: Path) -> object:
    torch.save(state, path / "b.pt", _use_new_zipfile_serialization=False)
    return path / "b.pt"


def _views(state: dict[str, torch.Tensor], path: Path) -> object:
    """Tensors that are stored column by column, and one that is conjugate."""
    views = {key: value.T.contiguous().T if value.dim() == 2 else value for key, value in state.items()}
    views["complex"] = state["complex"].conj().resolve_conj().conj()
    torch.save(views, path / "c.pt")
    return path / "c.pt"


def _shards(state: dict[str, torch.Tensor], path: Path) -> object:
    ckptkit.convert(state, path / "d", max_shard_size=100)
    return path / "d"


def _module(state: dict[str, torch.Tensor], _: Path) -> object:
    module = torch.nn.Module()
    object.__setattr__(module, "state_dict", lambda *_, **__: state)
    return module


@pytest.mark.parametrize("make", [_torch_zip, _torch_legacy, _views, _shards, _module])
def test_no_format_changes_a_digest(
    make: Callable[[dict[str, torch.Tensor], Path], Any], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The same tensors in torch's formats, as views, in shards and in memory: every line is equal."""
    made = make(state, tmp_path)
    if made == tmp_path / "d":
        assert len(list((tmp_path / "d").glob("*.safetensors"))) > 3
    assert str(ckptkit.digest(made)) == str(ckptkit.digest(state))


def test_the_byte_order_of_numpy_does_not_change_a_digest(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "a": (np.arange(530_000) % 97).astype(">f4"),
        "b": np.arange(6, dtype="<i2").reshape(2, 3).T,
    }
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
        for key, value in arrays.items()
    }
    for name in ("a.npz", "b.npz"):
        assert str(ckptkit.digest(tmp_path / name)) == str(ckptkit.digest(tensors))


def test_blocks_of_gguf_are_hashed_as_they_are_stored(tmp_path: Path) -> None:
    """The library of GGUF writes and reads the blocks; the dtype is the name that it gives to them."""
    blocks = np.arange(32 * 68, dtype=np.uint8).reshape(32, 68)
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("plain", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    digests = of_tensors(ckptkit.digest(tmp_path / "a.gguf"))
    stored = next(tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors if tensor.name == "blocks")
    assert digests["blocks"] == hashlib.sha256(b'["Q8_0",[32,64]]\n' + stored.data.tobytes()).hexdigest()
    assert digests["plain"] == of_tensors(ckptkit.digest({"a": torch.ones(2, 3)}))["a"]


def test_names_are_no_part_of_a_digest_and_values_dtypes_and_shapes_are() -> None:
    """Tied and equal tensors have equal digests. Names and shapes have one digest whatever the values are."""
    one = torch.ones(2, 3)
    found = ckptkit.digest({
        "a": one, "tied": one, "equal": one.clone(), "shape": one.T.contiguous(), "dtype": one.double(),
        "value": one.clone().fill_(1.5), "zero": torch.zeros(1), "minus zero": -torch.zeros(1),
    })  # fmt: skip
    digests = of_tensors(found)
    assert digests["a"] == digests["tied"] == digests["equal"]
    assert len(set(digests.values())) == 6
    other = ckptkit.digest({key: torch.zeros(tensor.info.shape) for key, tensor in found.tensors.items()})
    assert other.names_and_shapes == found.names_and_shapes
    assert other.contents != found.contents
    renamed = ckptkit.digest({"a": one}, ["a=b"])
    assert (list(renamed.tensors), renamed.tensors["b"].digest) == (["b"], found.tensors["a"].digest)


def test_a_conjugate_or_negative_view_is_not_a_tie(tmp_path: Path) -> None:
    """It has the memory of another tensor, and other values."""
    number = torch.randn(4, dtype=torch.complex64)
    negative = number.conj().imag
    assert negative.is_neg()
    state = {"a": number, "tied": number, "conj": number.conj(), "part": number.imag, "negative": negative}
    plain = {key: tensor.resolve_conj().resolve_neg().clone() for key, tensor in state.items()}
    expected = of_tensors(ckptkit.digest(plain))
    assert of_tensors(ckptkit.digest(state)) == expected
    assert len(set(expected.values())) == 4
    complex_ones = {key: tensor for key, tensor in state.items() if tensor.is_complex()}
    torch.save(complex_ones, tmp_path / "a.pt")
    assert of_tensors(ckptkit.digest(tmp_path / "a.pt")) == {key: expected[key] for key in complex_ones}


class InMemory:
    """Bytes that can be read only in order, in chunks of an odd length."""

    def __init__(self, data: bytes, stated: int | None = None) -> None:
        self.data = data
        self.nbytes = len(data) if stated is None else stated

    def chunks(self) -> Iterator[bytes]:
        yield from (self.data[at : at + 1_000_003] for at in range(0, len(self.data), 1_000_003))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_threads_nor_chunks_change_a_digest(threads: int) -> None:
    """Long and short tensors, more of each than there are threads."""
    rng = np.random.default_rng(0)
    sizes = [5_000_000, 4_194_304, 2_097_153, 2_097_152, *range(30), 9_000_000]
    tensors: list[tuple[TensorInfo, Payload]] = []
    expected = {}
    for size in sizes:
        data = rng.bytes(size)
        tensors.append((TensorInfo(str(size), "U8", (size,)), InMemory(data)))
        expected[str(size)] = hashlib.sha256(f'["U8",[{size}]]\n'.encode() + data).hexdigest()
    with Workers(threads) as workers:
        steps = list(hash_tensors(tensors, "sha256", workers))
    assert {one.key: one.hex for hashed, _ in steps for one in hashed} == expected
    assert sum(nbytes for _, nbytes in steps) == sum(sizes)


@pytest.mark.parametrize("size", [9, 9_000_000])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_another_number_of_bytes_is_an_error(size: int, wrong: int) -> None:
    """No thread waits for ever, and the error is raised."""
    tensors: list[tuple[TensorInfo, Payload]] = [
        (TensorInfo(str(at), "U8", (size,)), InMemory(bytes(size), size + wrong * (at == 1))) for at in range(3)
    ]
    with Workers(3) as workers, pytest.raises(FormatError, match="bytes are stored of a tensor"):
        list(hash_tensors(tensors, "sha256", workers))


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    """Also in the middle of a long tensor that several tasks read."""
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3_000_000), "b": torch.ones(2_000_000)}, path)
    with ckptkit.open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(9_000_000)
        with pytest.raises(ChangedError):
            ckptkit.digest(checkpoint)


def test_a_caller_may_stop_between_steps(tmp_path: Path) -> None:
    """Tasks that wait for the tasks before them end too."""
    save_file({str(at): torch.ones(3_000_000) for at in range(2)}, tmp_path / "a.safetensors")
    with ckptkit.open_checkpoint(tmp_path / "a.safetensors") as checkpoint, Workers(4) as workers:
        steps = hash_tensors([(info, checkpoint.payload(key)) for key, info in checkpoint.items()], "sha256", workers)
        next(steps)
        next(steps)
        steps.close()  # type: ignore[attr-defined]
        assert workers.stopped


def test_a_tensor_without_bytes_is_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.pt"
    torch.save({"s": torch.eye(2).to_sparse(), "a": torch.ones(2)}, path)
    with pytest.raises(PlanError, match="'s' has no digest: it is a sparse tensor") as caught:
        ckptkit.digest(path)
    assert "skip_unread=True" in str(ckptkit.errors.hint_for_python(caught.value.hint or ""))
    found = ckptkit.digest(path, skip_unread=True)
    assert (list(found.tensors), dict(found.skipped)) == (["a"], {"s": "it is a sparse tensor"})
    assert str(found) == str(ckptkit.digest({"a": torch.ones(2)}))
    ran = run_ckpt(capsys, "digest", path, "--skip-unread")
    assert (ran.code, ran.err) == (0, "1 tensor left out: 's': it is a sparse tensor\n")


@pytest.mark.parametrize("value", [np.ones(2), {"a": torch.ones(2)}])
def test_weights_in_another_form_are_not_nothing(value: object) -> None:
    """Arrays of numpy, and the weights of a training checkpoint one key deeper: no result about no tensor."""
    given: Any = {"w": value, "epoch": 3}
    for read in (ckptkit.digest, ckptkit.stats, lambda one: ckptkit.testing.assert_same_weights(one, one)):
        with pytest.raises(ModelError, match="has no tensor: its 'w' is a"):
            read(given)
    given["_extra_state"] = given.pop("w")  # what a module without parameters may have
    assert not ckptkit.digest(given).tensors


@pytest.mark.parametrize("options", [[], ["--tree"]])
def test_show_has_the_same_digests(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page has the first digits, and does not say that only headers were read; a tensor without bytes has none."""
    path = tmp_path / "a.pt"
    torch.save({"s": torch.eye(2).to_sparse(), "a": torch.ones(2), "b": torch.ones(2)}, path)
    digest = ckptkit.digest({"a": torch.ones(2)}).tensors["a"].digest
    out = run_ckpt(capsys, "show", path, "--digests", *options).out
    assert out.count(digest[7:23]) == 2
    assert digest[7:24] not in out
    assert "headers only" not in out
    document = json.loads(run_ckpt(capsys, "show", path, "--digests", "--json").out)
    assert {one["key"]: one["digest"] for one in document["tensors"]} == {"a": digest, "b": digest, "s": None}
    chosen = json.loads(run_ckpt(capsys, "show", path, "--digests", "--json", "--keep", "b").out)
    assert [one["digest"] for one in chosen["tensors"]] == [digest]


def test_views_that_repeat_a_file_without_end_are_refused(tmp_path: Path) -> None:
    """A view of a terabyte is not read by anything that reads values; one that repeats a little is."""
    one = torch.ones(1)
    paths = []
    for value in (1, 2):
        paths.append(tmp_path / f"{value}.pt")
        torch.save({"a": torch.tensor([value]).expand(10**6, 10**6)}, paths[-1])
    sources: list[Any] = [paths[0], {"a": one.expand(10**6, 10**6)}]
    for source in sources:
        for read in (ckptkit.digest, ckptkit.stats, lambda found: ckptkit.compare_values(found, paths[1])):
            with pytest.raises(
                PlanError, match=r"[48]\.0 TB would be read: views such as 'a' repeat the .* are stored"
            ):
                read(source)
    torch.save({"a": one.expand(1000, 1000)}, tmp_path / "b.pt")
    assert of_tensors(ckptkit.digest(tmp_path / "b.pt")) == of_tensors(ckptkit.digest({"a": torch.ones(1000, 1000)}))


def test_progress_has_every_byte_once() -> None:
    counts: list[int] = []
    ckptkit.digest({"a": torch.ones(3_000_000), "b": torch.ones(2)}, progress=counts.append)
    assert sum(counts) == 12_000_008


def test_the_missing_package_of_xxh3_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xxhash", None)
    with pytest.raises(ArgumentError, match="xxh3 needs xxhash") as caught:
        ckptkit.digest(TEN, algorithm="xxh3")
    assert "[fast]" in (caught.value.hint or "")


CHECK = """"a": FAILED
"b": OK
"c": MISSING, and "moved" has its contents
"gone": MISSING
"moved": NEW
"new": NEW
contents: FAILED
names and shapes: FAILED

1 OK, 1 FAILED, 2 missing, 2 new of 4 recorded
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_checkpoint_is_checked_against_recorded_digests(
    ends: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As sha256sum -c: a line for each key, and with -q only those that are not OK. The first checkpoint is gone."""
    before = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(3), "gone": torch.ones(4)}
    after = {"a": torch.ones(2), "b": torch.ones(2), "moved": torch.ones(3), "new": torch.ones(5)}
    torch.save(before, tmp_path / "a.pt")
    assert run_ckpt(capsys, "digest", tmp_path / "a.pt", "-o", tmp_path / "a.pt.digest").code == 0
    recorded = (tmp_path / "a.pt.digest").read_bytes()
    assert recorded.decode() == f"{ckptkit.digest(before)}\n"
    mark = b"\xef\xbb\xbf" if "\r" in ends else b""  # as some editors of Windows write it
    (tmp_path / "a.pt.digest").write_bytes(
        mark + recorded.rstrip().replace(b"\n", ends.encode())
    )  # nor a newline at the end
    whole = run_ckpt(capsys, "digest", "--check", tmp_path / "a.pt.digest")
    assert (whole.code, whole.out.splitlines()[0], whole.err) == (0, '"a": OK', "")
    quiet = run_ckpt(capsys, "digest", "--check", tmp_path / "a.pt.digest", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    save_file(after, tmp_path / "b.safetensors")
    ran = run_ckpt(capsys, "digest", tmp_path / "b.safetensors", "--check", tmp_path / "a.pt.digest")
    hint = f"hint: with the recorded checkpoint, ckpt diff EXPECTED {tmp_path}/b.safetensors --values says how much"
    assert (ran.code, ran.out, ran.err) == (1, f"{CHECK}{hint} changed\n", "")
    ran = run_ckpt(capsys, "digest", tmp_path / "b.safetensors", "--check", tmp_path / "a.pt.digest", "-q")
    assert (ran.code, ran.out, ran.err) == (1, CHECK.replace('"b": OK\n', ""), "")
    ran = run_ckpt(capsys, "digest", tmp_path / "b.safetensors", "--check", tmp_path / "a.pt.digest", "--format", "tsv")
    assert (ran.code, ran.out.splitlines()[:4]) == (
        1,
        ["key\tstate\tmoved to", "a\tFAILED\t", "b\tOK\t", "c\tMISSING\tmoved"],
    )
    found = ckptkit.check_digests(tmp_path / "a.pt.digest", after)
    assert found.to_dict() | {"checkpoint": 0} == ckptkit.check_digests(ckptkit.digest(before), after).to_dict() | {
        "checkpoint": 0
    }
    assert (found.ok, found.different, dict(found.moved)) == (False, ("a",), {"c": "moved"})


def test_another_digest_of_names_and_shapes_alone_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other lines agree, so the record is damaged: what is printed as FAILED has the exit code of a failure."""
    first, _, last = str(ckptkit.digest(TEN)).rpartition("\n")
    (tmp_path / "d").write_text(f"{first}\nsha256:{'0' * 64}{last[71:]}\n", encoding="ascii")
    ran = run_ckpt(capsys, "digest", "--check", tmp_path / "d", TEN, "-q")
    assert (ran.code, ran.out.splitlines()[0]) == (1, "names and shapes: FAILED")
    assert ckptkit.check_digests(tmp_path / "d", TEN).same_contents


def test_a_file_of_xxh3_digests_is_checked_with_xxh3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").write_text(run_ckpt(capsys, "digest", TEN, "--algorithm", "xxh3").out, encoding="ascii")
    assert (tmp_path / "d").read_text(encoding="ascii").startswith("xxh3:")
    assert run_ckpt(capsys, "digest", "--check", tmp_path / "d", TEN).code == 0


def test_check_without_a_path_needs_a_file_that_is_named_after_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.digest").write_text(f"{ckptkit.digest(TEN)}\n", encoding="ascii")
    for given, said in (
        ("d.digest", f"give the checkpoint: ckpt digest --check '{tmp_path / 'd.digest'}' PATH\n"),
        ("gone.digest", f"'{tmp_path / 'gone.digest'}' does not exist either."),
    ):
        ran = run_ckpt(capsys, "digest", "--check", tmp_path / given)
        assert (ran.code, ran.out, said in ran.err) == (2, "", True)
    assert run_ckpt(capsys, "digest").code == 2


def test_a_checkpoint_and_a_digest_file_in_the_place_of_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forgotten --check, swapped arguments, and a checkpoint as FILE: the error says what each is."""
    recorded = tmp_path / "d"
    recorded.write_text(f"{ckptkit.digest(TEN)}\n", encoding="ascii")
    not_checkpoint = f"ckpt: {recorded}: is a digest file, not a checkpoint\nhint: ckpt digest --check '{recorded}' "
    assert run_ckpt(capsys, "digest", recorded).err.startswith(f"{not_checkpoint}PATH ")
    assert run_ckpt(capsys, "digest", recorded, "--check", TEN).err.startswith(f"{not_checkpoint}'{TEN}' ")
    for arguments in (["--check", TEN], ["--check", TEN, TEN]):
        ran = run_ckpt(capsys, "digest", *arguments)
        assert (ran.code, ran.err.splitlines()[0]) == (2, f"ckpt: {TEN}: is a checkpoint, not a digest file")
    with pytest.raises(FormatError, match="is a checkpoint, not a digest file"):
        ckptkit.check_digests(TEN, TEN)


def test_what_is_beside_the_weights_of_a_training_checkpoint_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.pt"
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {"state": {}}, "epoch": 3}, path)
    note = f"ckpt: {path}: note: only ::model is hashed, not what is beside it: 'optimizer', 'epoch'\n"
    assert run_ckpt(capsys, "digest", path).err == note
    assert run_ckpt(capsys, "digest", f"{path}::model").err == ""
    compared = run_ckpt(capsys, "diff", path, path, "--values").err
    assert compared == note.replace("hashed", "compared") * 2
    assert run_ckpt(capsys, "diff", path, path).err == ""


def test_another_prefix_of_all_tensors_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of equal tensors the one that ends alike is named; the option that the line names makes the check pass."""
    state = {f"layers.{at}.bias": torch.zeros(2) for at in range(12)} | {"head": torch.ones(2)}
    recorded = tmp_path / "d"
    for old, new, where in (
        ("", "module.", "under 'module.'"), ("module.", "", "without 'module.'"), ("a.b.", "c.", "under 'c.'"),
    ):  # fmt: skip
        recorded.write_text(f"{ckptkit.digest({f'{old}{key}': one for key, one in state.items()})}\n", encoding="ascii")
        torch.save({f"{new}{key}": one for key, one in state.items()}, tmp_path / "a.pt")
        found = ckptkit.check_digests(recorded, tmp_path / "a.pt")
        assert dict(found.moved) == {f"{old}{key}": f"{new}{key}" for key in state}
        ran = run_ckpt(capsys, "digest", "--check", recorded, tmp_path / "a.pt", "-q")
        assert ran.out.splitlines() == [
            "contents: FAILED", "names and shapes: FAILED", "",
            "0 OK, 0 FAILED, 13 missing, 13 new of 13 recorded",
            f"all 13 missing tensors have the recorded contents {where}: --rename '{new}*={old}*' compares them",
        ]  # fmt: skip
        rename = ["--rename", f"{new}*={old}*"]
        assert run_ckpt(capsys, "digest", "--check", recorded, tmp_path / "a.pt", "-q", *rename) == Ran(0, "", "")
    ran = run_ckpt(capsys, "digest", "--check", recorded, DDP, "--strip", "auto")
    assert ran.err.splitlines()[1:] == ["--strip auto: 'module.' (DataParallel, DistributedDataParallel) from 10 keys"]
    assert run_ckpt(capsys, "digest", tmp_path / "a.pt", *rename).out == recorded.read_text(encoding="ascii")


def test_filters_restrict_what_was_recorded_too() -> None:
    """A full record checks a part. A recorded tensor that the filters keep is missing where the checkpoint lacks it."""
    before = {"body.a": torch.zeros(2), "body.b": torch.ones(2), "head.w": torch.ones(3)}
    after = {"body.a": torch.zeros(2), "body.b": torch.ones(2), "other.w": torch.ones(4)}
    recorded = ckptkit.digest(before)
    found = ckptkit.check_digests(recorded, after, ckptkit.parse_rules(keep=["body.*"]))
    assert (found.ok, found.equal, found.left_out) == (True, ("body.a", "body.b"), ("head.w",))
    assert found.in_short == "2 OK, 0 FAILED, 0 missing, 0 new"
    assert ckptkit.check_digests(recorded, after, ckptkit.parse_rules(drop=["other.*"])).missing == ("head.w",)
    lost = ckptkit.check_digests(recorded, {"body.a": after["body.a"]}, ckptkit.parse_rules(keep=["body.*"]))
    assert (lost.ok, lost.missing, lost.same_names_and_shapes) == (False, ("body.b",), False)
    changed = after | {"body.b": torch.zeros(2)}
    other = ckptkit.check_digests(recorded, changed, ckptkit.parse_rules(keep=["body.*"]))
    assert (other.ok, other.different, other.same_names_and_shapes) == (False, ("body.b",), None)
    wrapped = {f"module.{key}": one for key, one in (before | {"head.w": torch.zeros(3)}).items()}
    rules = ckptkit.parse_rules(strip=["auto"], keep=["module.body.*"])
    assert ckptkit.check_digests(recorded, wrapped, rules).ok
    del wrapped["module.body.b"]
    assert ckptkit.check_digests(recorded, wrapped, rules).missing == ("body.b",)


def test_a_file_is_written_whole_and_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "a.digest"
    assert run_ckpt(capsys, "digest", TEN, "-o", place, "-q") == Ran(0, "", "")
    ran = run_ckpt(capsys, "digest", TEN, "-o", place, "--algorithm", "xxh3")
    assert (ran.code, "--force" in ran.err, place.read_text(encoding="ascii")[:7]) == (2, True, "sha256:")
    assert run_ckpt(capsys, "digest", TEN, "-o", place, "--algorithm", "xxh3", "--force").code == 0
    assert place.read_text(encoding="ascii")[:5] == "xxh3:"
    for report in ("tsv", "json"):
        ran = run_ckpt(capsys, "digest", TEN, "-o", place, "--force", "--format", report)
        assert ran.out == run_ckpt(capsys, "digest", TEN, "--format", report).out


HEX = "0" * 64
GOOD = f'sha256:{HEX}  "a"\n'
ENDING = f"sha256:{HEX}  contents\nsha256:{HEX}  names and shapes\n"
MALFORMED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "has no line for 'contents' and 'names and shapes'"),
    "no fingerprints": (GOOD, "has no line for 'contents' and 'names and shapes', so lines may be lost"),
    "cut in a line": (GOOD[:-3], "has a key that is not a valid JSON string"),
    "bad hex": (f'sha256:{"g" * 64}  "a"\n', "line 1 does not have 64 hexadecimal digits"),
    "short hex": ('sha256:00  "a"\n', "line 1 does not have 64 hexadecimal digits"),
    "hex of another length": (f'xxh3:{HEX}  "a"\n', "line 1 does not have 32 hexadecimal digits"),
    "other digits": (f'sha256:{"٣" * 64}  "a"\n', "line 1 does not have the form"),
    "unknown algorithm": (f'md5:{HEX}  "a"\n', "line 1 has the algorithm 'md5'"),
    "two algorithms": (f'{GOOD}xxh3:{HEX[:32]}  "b"\n', "line 2 is xxh3, and the lines before it are sha256"),
    "a key twice": (GOOD * 2, "line 2 has 'a' a second time"),
    "a key twice in other letters": (f'{GOOD}sha256:{HEX}  "\\u0061"\n', "line 2 has 'a' a second time"),
    "contents twice": (GOOD + ENDING + ENDING, "line 4 has 'contents' a second time"),
    "not a string": (f"sha256:{HEX}  3\n", "line 1 has '3' where a key in double quotes must be"),
    "not JSON": (f'sha256:{HEX}  "\\q"\n', "not a valid JSON string"),
    "two values": (f'sha256:{HEX}  "a" "b"\n', "not a valid JSON string"),
    "escapes of a terminal": (f'sha256:{HEX}  "\x1b[2J"\n', "\\x1b[2J"),
    "one space": (f'sha256:{HEX} "a"\n', "line 1 does not have the form ALGORITHM:HEX  KEY"),
    "an empty line": (f"{GOOD}\n{ENDING}", "line 2 does not have the form"),
    "a file of sha256sum": (f"{HEX}  a.pt\n", "line 1 does not have the form"),
    "a huge line": ("x" * 9_000_000, "more characters>..."),
    "nested deeply": (f"sha256:{HEX}  {'[' * 100_000}\n", "where a key in double quotes must be"),
    "not the contents": (GOOD + ENDING, "'contents' does not agree with the lines of the tensors"),
    "not UTF-8": (b"\xff\xfe", "not UTF-8 text"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_digest_file_that_is_not_valid_is_one_error_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = MALFORMED[name]
    path = tmp_path / "d"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = run_ckpt(capsys, "digest", "--check", path, TEN)
    first, *hints = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert first.startswith(f"ckpt: {path}: ")
    assert message in first
    assert first.isprintable()
    assert len(first) < 1500
    assert len(hints) <= 1
    assert all(hint.startswith("hint: ") for hint in hints)
    with pytest.raises(CkptkitError) as caught:
        ckptkit.check_digests(path, TEN)
    assert isinstance(caught.value, FormatError)
