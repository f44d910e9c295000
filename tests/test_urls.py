"""A URL is a path: every command reads every format from a store as it does from a disk, and says the same.

The store is fsspec's ``memory://``. ``tests/oracles`` does the same with servers for S3 and HTTP.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from ckptkit import digest, plan_remap, save_plan
from ckptkit.cli.common.traffic import traffic_line
from ckptkit.core.files.remote.traffic import Traffic
from tests.formats.corpora import PARTS, corpus, items, write_parts
from tests.formats.mutate import FILES
from tests.formats.test_trainer_files import trainer_directory
from tests.formats.test_zero import save_stage2
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_formats import f32, safetensors_file
from tests.test_paths import TAKES_CHECKPOINT, TEN


@dataclass(frozen=True)
class Twin:
    """The same files in a local folder and in a store; both paths have the same length, so all columns do too."""

    local: Path
    url: str

    def upload(self) -> None:
        """Put all files into the store."""
        store = fsspec.filesystem("memory")
        for path in sorted(self.local.rglob("*")):
            if path.is_file():
                store.pipe(f"{self.url}/{path.relative_to(self.local)}", path.read_bytes())


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    local = tmp_path_factory.mktemp("twin")
    shutil.copytree(ROOT / "fixtures", local / "fixtures", ignore=shutil.ignore_patterns("old_torch", "__pycache__"))
    (local / "rules.toml").write_text('[[rule]]\nfrom = "module.*"\nto = "*"\n', encoding="utf-8")
    save_file({"a.weight": torch.arange(12.0).reshape(3, 4)}, local / "base.safetensors")
    (local / "old.digest").write_text(str(digest(TEN)), encoding="utf-8")
    save_plan(plan_remap(TEN, ["fc3.*=head.*"]), local / "plan.json", TEN)
    for name, (write, _) in CHECKPOINTS.items():
        (local / name).mkdir()
        write(local / name)
    scheme = "memory://"
    twin = Twin(local, scheme + "urls".ljust(len(str(local)) - len(scheme), "-"))
    twin.upload()
    yield twin
    fsspec.filesystem("memory").rm(twin.url, recursive=True)


def _corpus(kind: str, number: int = 0) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / FILES.get(kind, "x.pt")
        if kind == "dcp":
            items(path.parent)
        elif kind in PARTS:
            write_parts(kind, folder / "run")
        else:
            path.write_bytes(corpus(kind)[number])

    return write


def _index(folder: Path) -> None:
    for name, key in (("one", "w"), ("two", "v")):
        (folder / f"{name}.safetensors").write_bytes(safetensors_file({key: f32()}, b"1234"))
    (folder / "x.safetensors.index.json").write_bytes(corpus("index")[0])


def _adapter(folder: Path) -> None:
    factors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(3, 2)}
    save_file(
        {f"base_model.model.a.{name}": value for name, value in factors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}), encoding="utf-8"
    )


# One checkpoint of each format: what writes it into a folder, and which path in the folder opens it.
CHECKPOINTS: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "safetensors": (_corpus("safetensors"), "/x.safetensors"),
    "zip": (_corpus("zip", 1), "/x.pt"),
    "legacy": (_corpus("legacy", 1), "/x.pt"),
    "tar": (_corpus("tar"), "/x.pt"),
    "gguf": (_corpus("gguf"), "/x.gguf"),
    "pt2": (_corpus("pt2"), "/x.pt2"),
    "npy": (_corpus("npy"), "/x.npy"),
    "npz": (_corpus("npz"), "/x.npz"),
    "torchscript": (_corpus("torchscript"), "/x.pt"),
    "dcp": (_corpus("dcp"), "/saved"),
    "index": (_index, "/x.safetensors.index.json"),
    "sharded": (lambda folder: shutil.copytree(ROOT / "fixtures/encoder_sharded", folder / "x"), "/x"),
    "adapter": (_adapter, ""),
    "trainer": (trainer_directory, ""),
    "zero": (save_stage2, ""),
    **{kind: (_corpus(kind), "/run") for kind in PARTS},
}
# @ is the folder of the checkpoint, OUT a folder of the test. The first three commands open a format, cut its values
# into pieces, and copy them. The others read what these give them, so that some formats are enough.
COMMANDS = (
    "show PATH --json",
    "digest PATH",
    "convert PATH -o OUT/out.pt --skip-unread",
    "check PATH",
    "stats PATH",
    "diff PATH PATH",
    "align PATH PATH",
    "remap PATH -o OUT/out.safetensors --rename *=a.* --skip-unread --verify",
)
EVERY_COMMAND = ("safetensors", "zip", "dcp", "zero")


# Where else a URL may stand, after the exit code; @ is the folder of all checkpoints, OUT a folder of the test.
LINES = """
2 show @/fixtures/lenet_ddp.pt @/fixtures/encoder_tied.pt @/fixtures/missing.pt
0 show @/fixtures/lenet_ddp.pt::model --tree
0 show @/fixtures/lenet_ddp.pt::optimizer
2 show @/missing/model.safetensors
2 show @/fixtures/lenet.py
0 check @/fixtures/lenet_tuned.safetensors --like @/fixtures/lenet_10class.pth
0 diff @/fixtures/lenet_10class.pth @/fixtures/lenet_ddp.pt --strip auto
0 diff py:fixtures.lenet:build(num_classes=10) @/fixtures/lenet_ddp.pt --rules @/rules.toml
1 diff @/fixtures/lenet_10class.pth @/fixtures/lenet_tuned.safetensors --values
0 diff @/sharded/x @/fixtures/encoder_tied.pt --values
0 align @/fixtures/lenet_10class.pth @/fixtures/lenet_ddp.pt -o OUT/rules.toml
0 remap @/fixtures/lenet_ddp.pt --like @/fixtures/lenet_10class.pth --rules @/rules.toml -o OUT/o.pt --plan OUT/p.json
0 remap @/fixtures/lenet_10class.pth --apply @/plan.json -o OUT/out.safetensors
0 merge @/fixtures/lenet_10class.pth @/fixtures/lenet_ddp.pt --rename module.*=* -o OUT/out.safetensors --verify
0 merge @/base.safetensors @/adapter --method lora -o OUT/out.safetensors
0 convert @/fixtures/encoder_tied.pt -o OUT/shards --max-shard-size 20kB
0 digest @/fixtures/lenet_10class.pth --check @/old.digest
0 optim show @/fixtures/lenet_ddp.pt
0 optim diff @/fixtures/lenet_ddp.pt @/fixtures/lenet_ddp.pt
0 optim remap @/fixtures/lenet_ddp.pt --rename module.*=* -o OUT/out.pt
0 optim prune @/fixtures/lenet_ddp.pt --drop *.fc3.* -o OUT/out.pt
0 groups table --model @/fixtures/lenet_10class.pth @/fixtures/groups.toml
0 groups emit @/fixtures/groups.toml
1 preflight --model py:fixtures.lenet:build --init @/fixtures/lenet_10class.pth --groups @/fixtures/groups.toml
"""


@dataclass(frozen=True)
class End:
    """What a command said, and the files that it wrote, with every URL as the local path."""

    code: int
    out: str
    err: str
    written: Mapping[str, bytes]


def _both(twin: Twin, line: str, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[End, End]:
    """Run a command on the disk and on the store."""
    ends = []
    for remote in (False, True):
        out.mkdir()
        ran = run_ckpt(
            capsys, *line.replace("@", twin.url if remote else str(twin.local)).replace("OUT", str(out)).split()
        )
        written = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        shutil.rmtree(out)
        told, warned = (text.replace(twin.url, str(twin.local)) for text in (ran.out, ran.err))
        shown = {name: data.replace(twin.url.encode(), str(twin.local).encode()) for name, data in written.items()}
        ends.append(End(ran.code, told, warned, shown))
    return ends[0], ends[1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_commands_read_every_format(name: str, twin: Twin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code, both outputs and the written bytes are those of the same files on a disk."""
    _, inside = CHECKPOINTS[name]
    for command in COMMANDS if name in EVERY_COMMAND else COMMANDS[:3]:
        here, there = _both(twin, command.replace("PATH", f"@/{name}{inside}"), tmp_path / "out", capsys)
        assert there == here, command


@pytest.mark.parametrize("line", LINES.strip().split("\n"))
def test_a_url_may_stand_wherever_a_path_does(
    line: str, twin: Twin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, line = line.partition(" ")
    here, there = _both(twin, line, tmp_path / "out", capsys)
    assert here.code == int(code), here.err
    assert there == here


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TAKES_CHECKPOINT)
def test_every_function_takes_a_url(name: str, twin: Twin) -> None:
    call = TAKES_CHECKPOINT[name]
    assert call(f"{twin.url}/fixtures/lenet_10class.pth") == call(TEN)


def test_verbose_says_what_was_asked(twin: Twin, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr for each store, also with -q; a command on files of a disk says nothing."""
    url = f"{twin.url}/fixtures/lenet_tuned.safetensors"
    assert run_ckpt(capsys, "diff", url, url, "-q").err == ""
    line = r"memory://\S*: \d requests? in \d rounds?, [\d.]+ k?B read, [\d.]+ s\n"  # the network decides how many
    for words in (("show", "-v", url, "-q"), ("show", "--verbose", url)):
        assert re.fullmatch(line, run_ckpt(capsys, *words).err)
    assert run_ckpt(capsys, "show", "-v", TEN).err == ""


def test_show_and_check_take_a_star_in_a_url(twin: Twin, capsys: pytest.CaptureFixture[str]) -> None:
    """It matches what the shell matches in a local folder, and a URL without a match is an error."""
    for command in ("show", "check --fast"):
        url, local = f"{twin.url}/fixtures/lenet_*.safetensors", sorted(twin.local.glob("fixtures/lenet_*.safetensors"))
        ran, expected = run_ckpt(capsys, *command.split(), url), run_ckpt(capsys, *command.split(), *local)
        assert len(local) > 1
        assert (ran.code, ran.out) == (expected.code, expected.out.replace(str(twin.local), twin.url))
    assert run_ckpt(capsys, "show", f"{twin.url}/*.nothing").err.endswith(": no name matches '*.nothing'\n")
    err = run_ckpt(capsys, "digest", f"{twin.url}/fixtures/lenet_*").err
    assert "take * in the last part of a URL" in err
    err = run_ckpt(capsys, "show", f"{twin.url}/fixtures").err
    assert "one of the directories inside: encoder_sharded" in err
    assert f" '{twin.url}/fixtures/*.pth' '{twin.url}/fixtures/*.safetensors' lists all of them\n" in err


def test_the_line_of_a_store() -> None:
    assert traffic_line(Traffic("s3://bucket", 3, 2, 131_042, 0, 0, 0.21)) == (
        "s3://bucket: 3 requests in 2 rounds, 131.0 kB read, 0.2 s"
    )
    assert traffic_line(Traffic("gs://b", 1, 1, 0, 5_000_000, 1, 12.0)) == (
        "gs://b: 1 request in 1 round, 5.0 MB written, 1 retry, 12.0 s"
    )
