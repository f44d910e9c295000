"""The command line: arguments, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file

from ckptkit.cli import ckpt
from ckptkit.cli.common.commands import MOST_OPTIONS, Command
from ckptkit.cli.common.program import FILES
from ckptkit.cli.groups import groups
from ckptkit.errors import CkptkitError
from tests.helpers_cli import ROOT, run_ckpt

TEN, DDP, MODEL = "fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", "py:fixtures.lenet:build"
TUNED = "fixtures/lenet_tuned.safetensors"


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(ROOT)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


CASES: dict[str, tuple[list[str], int, str, str]] = {
    # id: (arguments, exit code, a piece of stdout, a piece of stderr)
    "help": (["--help"], 0, "show        List the tensors, other entries", ""),
    "short help": (["-h"], 0, "Exit codes: 0", ""),
    "version": (["-V"], 0, "ckpt 0.", ""),
    "option before the command": (
        ["--json", "show", TEN],
        2,
        "",
        "hint: options stand after the command: ckpt COMMAND PA",
    ),
    "three to compare": (["diff", TEN, TEN, TEN], 2, "", "hint: ckpt diff compares two: compare each pair with a comm"),
    "arrow in a rename": (["remap", TEN, "-o", "x.pt", "--rename", "a.* => b.*"], 2, "", "hint: write 'a.*=b.*'"),
    "command of another name": (["slerp"], 2, "", "hint: ckpt merge A B -o OUT --method slerp --param t=0.5"),
    "unknown command": (["inspect"], 2, "", "ckpt: No such command 'inspect'."),
    "unknown option": (["show", "--colour", TEN], 2, "", "ckpt: No such option"),
    "two paths for one": (["digest", TEN, TEN], 2, "", "takes one PATH: run it for each; ckpt diff compares two"),
    "no report": (["show", TEN, "--html", "x"], 2, "", "hint: ckpt check, ckpt stats, ckpt diff and 2 more"),
    "patches in a row": (
        ["apply", TEN, "1.patch", "2.patch", "-o", "x"],
        2,
        "",
        "takes one PATCH: apply the next patch",
    ),
    "missing argument": (
        ["diff", TEN],
        2,
        "",
        "hint: for example ckpt diff py:mynet:build pretrained.pth; see ckpt diff",
    ),
    "method in capitals": (["merge", TEN, TEN, "-o", "o.pt", "--method", "TIES"], 2, "", "did you mean ties? see"),
    "weight without name": (
        ["merge", TEN, TUNED, "-o", "o.pt", "--method", "linear", "--weight", "0.5"],
        2,
        "",
        "hint: --weight 'lenet_tuned=0.5'",
    ),
    "weights in a row": (
        ["merge", TEN, TUNED, "-o", "o.pt", "--method", "linear", "--weight", "0.3", "0.7"],
        2,
        "",
        "hint: --weight 'lenet_10class=0.3' --weight 'lenet_tuned=0.7'",
    ),
    "missing option": (["convert", TEN, "x.pt"], 2, "", "hint: for example ckpt convert pytorch_model.bin -o model.s"),
    "missing model": (["groups", "table", MODEL], 2, "", "hint: for example ckpt groups table --model py:mynet:build"),
    "command of weights": (["optim", "convert", TEN], 2, "", "hint: ckpt optim remap PATH -o OUT --form FORM writes"),
    "a part of several": (["show", "fixtures/lenet_ddp*.pt::model"], 0, f"{DDP} at ::model", ""),
    "no rules": (
        ["remap", DDP, "-o", "x.pt", "--rules", DDP],
        2,
        "",
        "hint: a TOML file is read here, and this may be",
    ),
    "nothing to prune": (
        ["optim", "prune", DDP, "-o", "x.pt", "-n"],
        0,
        "",
        "nothing was pruned: --like MODEL leaves out what",
    ),
    "rename of two words": (
        ["remap", TEN, "-o", "x.pt", "--rename", "a.*", "b.*"],
        2,
        "",
        "hint: a rename is one word: --rename 'OLD=N",
    ),
    "rename with an arrow": (
        ["remap", TEN, "-o", "x.pt", "--rename", "fc3.*=>head.*"],
        2,
        "",
        "hint: write 'fc3.*=head.*'",
    ),
    "rules of a patch": (["delta", TEN, DDP, "--strip", "auto"], 2, "", "hint: ckpt remap PATH -o OUT first, with"),
    "drop of what is not kept": (
        ["remap", TEN, "-o", "x.pt", "--keep", "fc1.*", "--drop", "fc2.*"],
        2,
        "",
        "hint: leave it out, because the pat",
    ),
    "patterns of one option": (
        ["remap", TEN, "-o", "x.pt", "--keep", "fc1.*", "fc2.*"],
        2,
        "",
        "hint: --keep takes one value: repeat it, as in --keep 'fc1.*' --keep 'fc2.*'; see ckpt remap --help",
    ),
    "argument as an option": (["delta", TEN, "--base", DDP], 2, "", "BASE is given without an option: ckpt delta BASE"),
    "argument nearly": (["show", "--path", TEN], 2, "", "PATH is given without an option: ckpt show PATH...; see ckpt"),
    "workers": (["merge", TEN, TUNED, "-o", "x.pt", "--workers", "2"], 2, "", "hint: did you mean --jobs? see"),
    "no command": ([TEN], 2, "", f"hint: ckpt show '{TEN}' shows what is in it; see ckpt show --help"),
    "no command of optim": (["optim", f"{TEN}::a"], 2, "", f"hint: ckpt optim show '{TEN}::a' shows what is in it"),
    "no command, a model": ([MODEL], 2, "", f"hint: ckpt show '{MODEL}' shows what is in it; see ckpt show --help"),
    "other name of an option": (["stats", TEN, "--grep", "fc*"], 2, "", "hint: did you mean --keep? see ckpt stats"),
    "option of other commands": (["optim", "show", TEN, "--like", MODEL], 2, "", "hint: did you mean --model? see"),
    "rules of remap": (["convert", TEN, "-o", "x.pt", "--rules", "r.toml"], 2, "", "hint: ckpt remap, ckpt check"),
    "values of diff": (["stats", TEN, "--values"], 2, "", "hint: ckpt diff and ckpt optim diff have it; see"),
    "option of no command": (["diff", TEN, TEN, "--exit-zero"], 2, "", "hint: see ckpt diff --help"),
    "mean as a command": (["soup"], 2, "", "hint: ckpt merge A B -o OUT --method average"),
    "method as an option": (["merge", TEN, TEN, "-o", "x.pt", "--ema", "0.9"], 2, "", "hint: --method ema; see ckpt"),
    "parameter as an option": (["merge", TEN, TEN, "-o", "x", "--alpha", "1"], 2, "", "hint: --param alpha=VALUE; see"),
    "command of another group": (["optim", "merge", TEN], 2, "", "hint: ckpt optim has diff, prune, remap, resplit"),
    "model of diff": (
        ["diff", "--model", MODEL, TEN],
        2,
        "",
        "hint: the model comes first, without an option: ckpt diff",
    ),
    "prefix to add": (["remap", TEN, "-o", "x.pt", "--add-prefix", "a"], 2, "", "hint: --rename '*=PREFIX.*' adds"),
    "merge of snapshots": (["merge", TEN, TEN, "-o", "x.pt", "--avg"], 2, "", "hint: --method average; see ckpt merge"),
    "merge without a method": (
        ["merge", TEN, TUNED, "-o", "x.pt", "-n"],
        0,
        "",
        "none of another input; --method aver",
    ),
    "rule of new names": (
        ["remap", TEN, "-o", "x.pt", "--rename", "fc3.*=head.*", "--rename", "head.*=top.*"],
        2,
        "",
        "hint: all rules see the old names, so match 'fc3.weight', in a rule before",
    ),
    "rule too late": (
        ["remap", TEN, "-o", "x.pt", "--rename", "fc*=f*", "--rename", "fc3.*=top.*"],
        2,
        "",
        "hint: put it before that",
    ),
    "method of other names": (
        ["merge", TEN, TEN, "-o", "o.pt", "--method", "mean"],
        2,
        "",
        "did you mean average? see",
    ),
    "fold without an adapter": (
        ["merge", TEN, TUNED, "-o", "x.pt", "--method", "lora"],
        2,
        "",
        "hint: the base comes first, and then the adapter: ckpt merge BASE ADAPTER",
    ),
    "straight line": (["merge", TEN, TEN, "-o", "o.pt", "--method", "lerp"], 2, "", "did you mean linear? see"),
    "few of many": (
        ["remap", TEN, "-o", "x.pt", "-n", "--keep", "fc3.bias"],
        0,
        "9 tensors   source  matches no --keep",
        "",
    ),
    "near rules": (
        ["remap", TEN, "-o", "o.pt", "--rules", "fixtures/groups.tml"],
        2,
        "",
        "did you mean 'fixtures/groups.to",
    ),
    "near spec": (
        ["groups", "validate", "--model", MODEL, "fixtures/groups.tml"],
        2,
        "",
        "hint: did you mean 'fixtures/groups.toml'?",
    ),
    "prefix that none has": (["remap", TEN, "-o", "x.pt", "--strip", "net"], 2, "", "hint: the checkpoint has 'conv1."),
    "preflight with live optimizer": (
        ["preflight", "--model", MODEL, "--optimizer", "py:train:optimizer"],
        2,
        "",
        "hint: give the name of a class, such as AdamW",
    ),
    "delta": (["delta", TEN, TUNED, "-n"], 0, "4 equal, 6 changed, 0 dropped\n", ""),
    "delta without output": (["delta", TEN, TUNED], 2, "", "name the patch, or give --dry-run"),
    "delta of a training checkpoint": (
        ["delta", TEN, DDP, "-n"],
        2,
        "",
        "cannot hold 'epoch', 'optimizer', 'best_acc'",
    ),
    "apply without patch": (["apply", TEN, TUNED, "-o", "o.pt"], 2, "", "not a patch"),
    "show": (["show", TEN], 0, "fc3.weight    F32      [10, 84]", ""),
    "show not scanned": (["show", TEN], 0, "\nheaders only: no tensor value was read\n", ""),
    "show tree not scanned": (["show", "--tree", TEN], 0, "\nheaders only: no tensor value was read\n", ""),
    "show tree": (["show", "--tree", TEN], 0, "fc3  (2 tensors, 850 elements, 3.4 kB)\n  weight  F32 [10, 84]", ""),
    "show keep": (["show", TEN, "--keep", "fc3.*"], 0, "2 tensors, 850 elements", ""),
    "show keep nothing": (["show", TEN, "--keep", "fc4.*"], 2, "", "--keep 'fc4.*' matches none of 10 keys"),
    "show collapsed": (["show", "fixtures/encoder_tied.pt"], 0, "layers.{0..11}.attn.q.weight ×12  F32", ""),
    "show expanded": (["show", "fixtures/encoder_tied.pt", "--expand"], 0, "layers.11.attn.q.weight", ""),
    "show ties": (["show", "fixtures/encoder_tied.pt"], 0, "2.0 kB  head.weight", ""),
    "show entries": (["show", DDP], 0, "best_acc        float   0.653", ""),
    "show inside": (["show", f"{DDP}::optimizer"], 0, "no tensors", ""),
    "show nothing inside": (["show", f"{DDP}::ema"], 2, "", "holds nothing at 'ema'"),
    "show shards": (["show", "fixtures/encoder_sharded"], 0, "2 shards", ""),
    "show model": (["show", MODEL], 0, "live model, 10 tensors", ""),
    "show a possible model": (
        ["show", "mynet:build"],
        2,
        "",
        "hint: for a live model write py:mynet:build\n",
    ),
    "show an impossible model": (["show", "a-b:c"], 2, "", "ckpt: a-b:c: no such file or directory\n"),
    "show control characters": (["show", "\x1b[2J\\a"], 2, "", "ckpt: \\x1b[2J\\\\a: no such file or directory\n"),
    "shard size of 400 digits": (["convert", TEN, "-o", "o", "--max-shard-size", "9" * 400], 2, "", "larger than any"),
    "show missing": (["show", "nowhere.pt"], 2, "", "ckpt: nowhere.pt: no such file or directory\n"),
    "check": (["check", DDP], 0, "16 of 16 checksums compared, values of 10 tensors checked (F32)\n", ""),
    "check unchecked": (["check", TEN, "-q"], 0, ": no findings; 248.0 kB read, no checksum recorded", ""),
    "check fast": (["check", "--fast", DDP], 0, ": no findings; headers only, no tensor was read\n", ""),
    "check keep": (["check", DDP, "--keep", "*.fc3.*"], 0, "3.4 kB read, 2 of 2 checksums compared", ""),
    "check keep nothing": (["check", DDP, TEN, "--keep", "fc4.*"], 2, "", f"ckpt: {DDP}: --keep 'fc4.*' matches"),
    "check missing": (["check", "nowhere.pt"], 2, "", "ckpt: nowhere.pt: no such file or directory\n"),
    "check model": (["check", MODEL], 0, "no findings; held in memory, values of", ""),
    "check no path": (["check"], 2, "", "hint: for example ckpt check run.ckpt; see ckpt check --help"),
    "stats": (["stats", DDP], 0, "module.fc1.weight    F32         48,000", ""),
    "stats depth": (["stats", TEN, "--depth", "1"], 0, "module      tensors    numbers", ""),
    "stats keep": (["stats", DDP, "--keep", "*.fc3.*"], 0, "\n850 numbers, mean 0.001285, std 0.0637", ""),
    "stats keep nothing": (["stats", DDP, "--keep", "fc4.*"], 2, "", f"ckpt: {DDP}: --keep 'fc4.*' matches"),
    "stats ties": (["stats", "fixtures/encoder_tied.pt"], 0, "1 key of tied tensors, counted once in the total", ""),
    "stats model": (["stats", MODEL, "--sort", "l2", "--top", "1"], 0, "fc1.weight", ""),
    "stats no numbers": (["stats", f"{DDP}::optimizer"], 0, "\nno numbers\n", ""),
    "stats missing": (["stats", "nowhere.pt"], 2, "", "ckpt: nowhere.pt: no such file or directory\n"),
    "stats bad sort": (["stats", TEN, "--sort", "size"], 2, "", "hint: see ckpt stats --help"),
    "diff same": (["diff", TEN, "fixtures/lenet_10class.safetensors"], 0, "load_state_dict accepts the checkpoint", ""),
    "diff shapes": (["diff", MODEL, TEN], 1, "8 matched, 0 missing, 0 unexpected, 2 shape-mismatched", ""),
    "diff prefix": (
        ["diff", TEN, DDP],
        1,
        "hint: all 10 keys match after --rename 'module.*=*'\nhint: ckpt diff ",
        "--expand",
    ),
    "diff stripped": (["diff", TEN, DDP, "--strip", "auto"], 0, "10 matched", "--strip auto: 'module.' (DataParallel"),
    "diff strip not there": (["diff", TEN, TEN, "--strip", "net."], 2, "", "'net.' begins none of 10 keys"),
    "merge scale alone": (["merge", TEN, TEN, "-o", "o.pt", "--scale", "2"], 2, "", "no meaning with --method overlay"),
    "merge lora alone": (
        ["merge", TEN, TEN, "-o", "o.pt", "--method", "lora"],
        2,
        "",
        "has no tensors of an adapter",
    ),
    "remap strip": (["remap", DDP, "-o", "o.pt", "-n", "--strip", "auto"], 0, "fc1.weight", "from 10 keys\n"),
    "diff renamed": (["diff", TEN, DDP, "--rename", "module.*=*"], 0, "10 matched", ""),
    "diff all": (["diff", "-a", TEN, DDP, "--rename", "module.*=*"], 0, "as module.fc3.bias", ""),
    "diff quiet": (["diff", "-q", TEN, DDP], 1, "10 missing", ""),
    "diff bad rule": (["diff", TEN, DDP, "--rename", "module"], 2, "", "not of the form OLD=NEW"),
    "diff unused rule": (["diff", TEN, TEN, "--drop", "x"], 2, "", f"ckpt: {TEN}: --drop 'x' matches none"),
    "diff unused allowed": (["diff", TEN, TEN, "--drop", "x", "--allow-unused"], 0, "10 matched", ""),
    "align prefix": (["align", TEN, DDP], 0, "module.* = *", ""),
    "align same": (["align", TEN, TEN], 0, "of 10 tensors: 10 with the same name, 0 by 0 rules", ""),
    "align shapes": (["align", MODEL, TEN], 1, "~   fc3.weight       F32 [4, 84]  F32 [10, 84]", ""),
    "align digests": (["align", TEN, DDP, "--digests"], 0, "equal bytes", ""),
    "align no bytes": (["align", "nowhere.pt", TEN], 2, "", "ckpt: nowhere.pt: no such file or directory\n"),
    "align over a file": (["align", TEN, DDP, "-o", "README.md"], 2, "", "ckpt: README.md: already exists"),
    "long hint": (
        ["merge", MODEL, TEN, "-o", "o.pt", "-n"],
        2,
        "",
        "\n      without a pattern, the action is for all other keys\n",
    ),
    "bytes of each": (["show", "fixtures/encoder_sharded"], 0, "bytes each\n", ""),
    "ignore": (["check", TEN, "--ignore", "nann"], 2, "", "ckpt: --ignore: no finding has the code 'nann'\n"),
    "other name": (["compare", TEN, TEN], 2, "", "hint: did you mean diff? see ckpt --help"),
    "help of a command": (["help", "diff"], 2, "", "hint: see ckpt --help, or ckpt COMMAND --help"),
    "part of an option": (["diff", TEN, TEN, "--frozen", "x"], 2, "", "did you mean --expect-frozen? see ckpt diff"),
    "option without value": (["diff", TEN, TEN, "--rtol"], 2, "", "hint: see ckpt diff --help"),
    "missing choice": (["completion"], 2, "", "Choose from: bash, zsh, fish"),
    "near path": (["show", "fixtures/lenet_10clas.pth"], 2, "", "hint: did you mean 'fixtures/lenet_10class.pth'?"),
    "no suffix": (["show", "fixtures/encoder_tied"], 2, "", "hint: did you mean 'fixtures/encoder_tied.pt'?"),
    "near folder": (["show", "Fixtures/lenet_ddp.pt"], 2, "", "hint: did you mean 'fixtures/lenet_ddp.pt'?"),
    "a source and a colon": (["show", "fixtures/lenet.py:build"], 2, "", "did you mean 'py:fixtures.lenet:build'?"),
    "one colon": (["show", "fixtures/lenet_ddp.pt:model"], 2, "", "did you mean 'fixtures/lenet_ddp.pt::model'?"),
    "one slash": (["show", "s3:/bucket/x"], 2, "", "hint: for a URL write two slashes: 's3://bucket/x'"),
    "hub": (
        ["show", "bert-base-uncased"],
        2,
        "",
        "hint: for a model of the Hugging Face Hub write hf:ORG/bert-base-uncased",
    ),
    "folder": (["show", "fixtures/bert-base"], 2, "", "ckpt: fixtures/bert-base: no such file or directory\n"),
    "python source": (["show", "fixtures/lenet.py"], 2, "", "hint: for a live model write py:lenet:callable"),
    "near callable": (["show", "py:fixtures.lenet:biuld"], 2, "", "hint: did you mean 'build'?"),
    "path of module": (["show", "py:fixtures/lenet.py:build"], 2, "", "did you mean 'py:fixtures.lenet:build'?"),
    "model without callable": (["show", "py:fixtures.lenet"], 2, "", "does not name a callable"),
    "model not there": (["show", "py:fixtures.nowhere:build"], 2, "", "importing 'fixtures.nowhere' failed"),
    "optim show": (["optim", "show", DDP], 0, "names: by the order of the model's checkpoint: all its", ""),
    "optim diff": (["optim", "diff", DDP, DDP], 0, "shapes agree; values were not compared", ""),
    "optim diff values": (
        ["optim", "diff", DDP, DDP, "--values"],
        0,
        "shapes agree; no tensor has values on both sides",
        "",
    ),
    "optim no state": (["optim", "show", TEN], 2, "", f"ckpt: {TEN}: holds no optimizer state"),
    "optim live": (["optim", "show", MODEL], 2, "", "is a live model, which has no optimizer"),
    "optim no groups": (["optim", "resplit", DDP, "-o", "o.pt"], 2, "", "give either --groups or --as"),
    "optim bad rule": (["optim", "remap", DDP, "-o", "o.pt", "--rename", "x.*=y.*"], 2, "", "matches none of 10 keys"),
    "groups table": (["groups", "table", "--model", MODEL, "fixtures/groups.toml"], 0, "head", ""),
    "groups valid": (
        ["groups", "validate", "--model", MODEL, "fixtures/groups.toml"],
        0,
        "10 trainable parameters, each in exactly one of 2 groups",
        "",
    ),
    "groups not a model": (["groups", "validate", "--model", TEN, "fixtures/groups.toml"], 2, "", "not a live model"),
    "preflight": (["preflight", "--model", MODEL], 0, "\nready\n", ""),
    "preflight warning": (["preflight", "--model", MODEL, "--init", TEN], 1, "\nready, with 1 warning\n", ""),
    "preflight fresh": (["preflight", "--model", MODEL, "--init", TEN, "--fresh", "fc3.*"], 0, "\nready\n", ""),
    "preflight strip": (["preflight", "--model", MODEL, "--init", DDP, "--strip", "auto"], 1, "8 of 10 tensors", ""),
    "preflight groups": (
        ["preflight", "--model", MODEL, "--groups", "fixtures/groups.toml", "--optimizer", "SGD"],
        0,
        "SGD state (momentum_buffer)  246.0 kB",
        "",
    ),
    "preflight step": (
        ["preflight", "--model", MODEL, "--optimizer", "SGD", "--dry-step", "py:fixtures.lenet:loss"],
        0,
        "10 of 10 trainable parameters got a gradient, 10 moved by SGD",
        "",
    ),
    "preflight shapes": (
        ["preflight", "--model", MODEL, "--init", TEN, "--shapes-only"],
        1,
        "not measured: values: the model is on the meta device",
        "",
    ),
    "preflight shapes and step": (
        ["preflight", "--model", MODEL, "--shapes-only", "--dry-step", "py:fixtures.lenet:loss"],
        2,
        "",
        "--dry-step needs values",
    ),
    "preflight rules of nothing": (["preflight", "--model", MODEL, "--strip", "auto"], 2, "", "neither is given"),
    "preflight no such class": (["preflight", "--model", MODEL, "--optimizer", "Adm"], 2, "", "did you mean Adam"),
    "preflight no callable": (
        ["preflight", "--model", MODEL, "--dry-step", "py:fixtures.lenet:__doc__"],
        2,
        "",
        "is the string 'The network",
    ),
    "preflight no file": (["preflight", "--model", MODEL, "--init", "none.pt"], 2, "", "none.pt: no such file"),
    "groups no file": (["groups", "validate", "--model", MODEL, "none.toml"], 2, "", "none.toml: no such file"),
}


@pytest.mark.parametrize(("arguments", "code", "out", "err"), CASES.values(), ids=CASES.keys())
def test_commands(arguments: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command returns its exit code; trouble leaves stdout empty and prints one line and a hint on stderr."""
    ran = run_ckpt(capsys, *arguments)
    assert ran.code == code, ran.err
    assert out in ran.out
    assert err in ran.err
    if code == 2:
        assert ran.out == ""
        lines = [line for line in ran.err.splitlines() if not line.startswith("      ")]  # more ways out
        assert [line.partition(":")[0] for line in lines] in (["ckpt"], ["ckpt", "hint"])


def test_show_lists_several_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each path has one row with its totals; one that cannot be read has a row too, and the exit code is 2."""
    broken = tmp_path / "broken.pt"
    broken.write_bytes(Path(DDP).read_bytes()[:400])
    paths = [TEN, DDP, "fixtures/encoder_sharded"]
    ran = run_ckpt(capsys, "show", *paths)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split()[0] for line in ran.out.splitlines()[1:4]] == [TEN, f"{DDP}::model", "fixtures/encoder_sharded"]
    assert ran.out.endswith("\n\n3 checkpoints, 82 tensors, 137,516 elements, 550.1 kB\n")
    alone = [json.loads(run_ckpt(capsys, "show", path, "--json").out) for path in paths]
    ran = run_ckpt(capsys, "show", broken, *paths, "--json")
    first, *others = json.loads(ran.out)["checkpoints"]
    for found, one in zip(others, alone, strict=True):
        assert {name: found[name] for name in one["summary"]} == one["summary"]
        assert (found["path"], found["format"], found["error"]) == (one["path"], one["format"], None)
        assert sum(found["dtypes"].values()) == len(one["tensors"])
    assert (ran.code, first["path"], first["format"]) == (2, str(broken), None)
    assert ran.err.splitlines() == [f"ckpt: {broken}: {first['error']}", "hint: download or copy it again"]
    assert "cannot be read" in run_ckpt(capsys, "show", broken, TEN).out
    kept = run_ckpt(capsys, "show", TEN, DDP, "--keep", "fc3.*").out
    assert kept.endswith("2 checkpoints, 2 tensors, 850 elements, 3.4 kB\n")
    some = run_ckpt(capsys, "show", TEN, DDP, "--keep", "*fc3.*", "--drop", "module.*.bias")
    assert (some.code, some.out.splitlines()[-1]) == (0, "2 checkpoints, 3 tensors, 1,690 elements, 6.8 kB")
    none = run_ckpt(capsys, "show", TEN, DDP, "--keep", "fc9.*")
    assert (none.code, none.out, "--keep 'fc9.*' matches none of 20 keys" in none.err) == (2, "", True)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["shwo"], "show? see ckpt --help"),
        (["groups", "tabel"], "table? see ckpt groups --help"),
        (["--verison"], "--version? see ckpt --help"),
        (["remap", DDP, "-o", "o.pt", "--rneame", "a=b"], "--rename? see ckpt remap --help"),
        (["convert", DDP, "-o", "o", "--format", "safetensor"], "safetensors? see ckpt convert --help"),
        (["merge", TEN, TEN, "-o", "o.pt", "--on-mismatch", "fc.*=skp"], "skip? see ckpt merge --help"),
        (["merge", TEN, TEN, "-o", "o.pt", "--on-mismatch", "ignore"], "skip? see ckpt merge --help"),
        (["show", f"{DDP}::optimizer.stat"], "'::optimizer.state'? the keys at that level: state, param_groups"),
        (["show", TEN, "--keep", "fc1.wieght"], "'fc1.weight'?"),
        (["remap", TEN, "-o", "o.pt", "--rename", "fcc3.*=x.*"], "'fc3.*=x.*'? or pass --allow-unused"),
    ],
)
def test_the_nearest_right_word_is_named(arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command, option, value, path in a file, or pattern is answered with the one that was meant."""
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, ran.out, ran.err.splitlines()[1]) == (2, "", f"hint: did you mean {meant}")


def test_the_command_below_the_hint_of_a_diff_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command stands there, with paths that a shell takes as one word, and everything matches with it."""
    found = tmp_path / "it's a model.pt"
    found.write_bytes(Path(DDP).read_bytes())
    (line,) = [text for text in run_ckpt(capsys, "diff", TEN, found).out.splitlines() if "hint: ckpt diff " in text]
    command = line.removeprefix("hint: ckpt ").removesuffix(" compares them with this rename")
    ran = run_ckpt(capsys, *shlex.split(command))
    assert (ran.code, "10 matched, 0 missing" in ran.out) == (0, True)
    # Without the --keep that the user gave, the command would compare something else.
    kept = run_ckpt(capsys, "diff", TEN, DDP, "--keep", "module.conv*", "--keep", "module.fc*.weight").out
    assert ("keys match after" in kept, "ckpt diff" in kept) == (True, False)


@pytest.mark.parametrize("arguments", [["average"], ["diff", TEN, TEN, "--strict"], ["remap", TEN, "--remote", "a"]])
def test_a_word_that_only_looks_alike_is_not_suggested(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """``merge`` averages nothing, and ``--strip`` has nothing to do with ``--strict``."""
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, ran.out, "did you mean" in ran.err) == (2, "", False)


@pytest.mark.parametrize(
    ("arguments", "group", "line"),
    [((), ckpt, "groups      Check param groups"), (("groups",), groups, "validate  Check that")],
    ids=["ckpt", "groups"],
)
def test_no_command(
    arguments: tuple[str, ...], group: click.Group, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a command, the help with every command is printed on stderr, and the exit code is 2."""
    ran = run_ckpt(capsys, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: ckpt")
    assert f"\n  {line}" in ran.err
    commands = [text.split()[0] for text in ran.err.partition("\nCommands:\n")[2].splitlines()]
    assert commands == group.list_commands(click.Context(group))


BAD_FILES: dict[str, tuple[str, str, str]] = {
    # id: (name, content, a piece of stderr)
    "array": ("r.json", "[1]", "holds a JSON array, not an object"),
    "empty array": ("r.json", "[]", "holds a JSON array, not an object"),
    "null": ("r.json", "null", "holds a JSON null, not an object"),
    "number": ("r.json", "1", "holds a JSON number, not an object"),
    "string": ("r.json", '"a"', "holds a JSON string, not an object"),
    "invalid JSON": ("r.json", "{", "not valid JSON: "),
    "invalid TOML": ("r.toml", "a", "not valid TOML: "),
    "deep JSON": ("r.json", "[" * 100_000, "not valid JSON: nested too deeply"),
    "many values in JSON": ("r.json", "[" + "[]," * 4_000_001, "not valid JSON: its values would not fit into 300 MB"),
    "deep TOML": ("r.toml", "a=" + "[" * 100_000, "not valid TOML: nested too deeply"),
    "less deep TOML": ("r.toml", f"a={'[' * 101}{']' * 101}", "not valid TOML: nested more than 100 levels deep"),
    "a key of many parts in TOML": ("r.toml", f"a{'.a' * 20_000}=1", "not valid TOML: a key has more than 100 parts"),
    "many parts in an inline table": (
        "r.toml",
        f"a=[{{a{'.a' * 20_000}=1}}]",
        "not valid TOML: a key has more than 100",
    ),
    "a table of many parts": ("r.toml", f"[[ a{' . a' * 20_000} ]]", "not valid TOML: a key has more than 100 parts"),
    "a large integer in TOML": ("r.toml", "a=0x1" + "0" * 9000, "not valid TOML: an integer of 36,001 bits"),
    "large TOML": ("r.toml", "#" * 1_000_001, "has 1.0 MB, more than the limit of 1.0 MB for a TOML file"),
    "large YAML": ("r.yaml", "#" * 300_000, "has 300.0 kB, more than the limit of 250.0 kB for a YAML file"),
    "deep YAML": ("r.yaml", "[" * 100_000, "not valid YAML: nested too deeply"),
    "YAML that repeats": (
        "r.yaml",
        "x0: &x0 [1]\n" + "".join(f"x{n + 1}: &x{n + 1} [{f'*x{n},' * 9}]\n" for n in range(9)),
        "not valid YAML: more than 300,000",
    ),
}


@pytest.mark.parametrize(("name", "content", "err"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_files_of_rules_and_groups(
    name: str, content: str, err: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without a table at the top level, or with too much in it, is refused with the name of the file."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    for arguments in (("diff", TEN, TEN, "--rules", path), ("groups", "validate", "--model", MODEL, path)):
        ran = run_ckpt(capsys, *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(f"ckpt: {path}: {err}")


def test_a_pipe_of_rules_does_not_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A FIFO without a writer is refused at once."""
    os.mkfifo(tmp_path / "r.toml")
    ran = run_ckpt(capsys, "diff", TEN, TEN, "--rules", tmp_path / "r.toml")
    assert (ran.code, ran.err) == (2, f"ckpt: {tmp_path / 'r.toml'}: not a regular file\n")


def test_errors_are_one_printable_line() -> None:
    """Reason, hint and path are printed without control characters; escaped text is not escaped again."""
    error = CkptkitError("no \x1b[2J\nhere '\\\\x1b'", hint="\u202edo", path="a\nb")
    assert str(error) == "a b: no \\x1b[2J here '\\\\x1b' (\\u202edo)"


@pytest.mark.parametrize("donors", [1, 2])
def test_merge_names_the_donor_in_an_error_if_there_is_one(donors: int, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_ckpt(capsys, "merge", TEN, *[DDP] * donors, "-o", "o.pt", "-n", "--drop", "x")
    assert ran.code == 2
    assert ran.err.startswith(f"ckpt: {DDP}: --drop" if donors == 1 else "ckpt: --drop")


WRITES: dict[str, tuple[list[str], str]] = {
    "remap": (["remap", DDP, "--rename", "module.*=*"], "10 from source"),
    "merge": (["merge", MODEL, TEN, "--on-mismatch", "skip"], "8 from donor, 2 from base"),
    "convert": (["convert", TEN], "10 from source"),
    "cast": (["convert", TEN, "--dtype", "bfloat16"], "124.0 kB"),
}


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
@pytest.mark.parametrize(("arguments", "summary"), WRITES.values(), ids=WRITES.keys())
def test_writing(
    arguments: list[str], summary: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dry-run writes nothing; an output is replaced only with --force; --json names the output."""
    out = tmp_path / name
    dry = run_ckpt(capsys, *arguments, "-o", out, "--dry-run")
    assert (dry.code, list(tmp_path.iterdir())) == (0, [])
    assert summary in dry.out
    assert "nothing was written" in dry.out
    first = run_ckpt(capsys, *arguments, "-o", out)
    assert (first.code, first.out) == (0, "")
    assert summary in first.err
    before = out.read_bytes()
    second = run_ckpt(capsys, *arguments, "-o", out)
    assert (second.code, second.out, out.read_bytes()) == (2, "", before)
    assert "already exists" in second.err
    third = run_ckpt(capsys, *arguments, "-o", out, "--force", "--json", "-q")
    document = json.loads(third.out)
    assert (third.code, third.err) == (0, "")
    assert document["output"]["path"] == str(out)
    assert document["output"]["bytes"] == out.stat().st_size
    assert document["output"]["tensors"] == len(document["plan"]) == 10


def _shape(value: Any) -> Any:
    """Return the field names and types of a document, with each list reduced to its first element."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shape(value[0])] if value else []
    return type(value).__name__


def test_show_document(capsys: pytest.CaptureFixture[str]) -> None:
    """``show --json`` has exactly the fields of its schema."""
    document = json.loads(run_ckpt(capsys, "show", "fixtures/encoder_tied.pt", "--json").out)
    assert document["schema"] == "ckptkit.show/1"
    assert list(document) == [
        "schema", "path", "format", "tensors", "quantized", "entries", "metadata", "merge", "delta", "warnings",
        "summary",
    ]  # fmt: skip
    assert document["tensors"][0] == {
        "key": "embed.weight", "dtype": "F32", "shape": [32, 16], "elements": 512, "bytes": 2048,
        "shared_with": ["head.weight"], "digest": None,
    }  # fmt: skip
    assert document["summary"] == {"tensors": 62, "elements": 13504, "bytes": 54016}


def test_diff_document(capsys: pytest.CaptureFixture[str]) -> None:
    """``diff --json`` has exactly the fields of its schema."""
    document = json.loads(run_ckpt(capsys, "diff", MODEL, DDP, "--rename", "module.*=*", "--json").out)
    side = {"path": "str", "format": "str", "tensors": "int", "elements": "int", "bytes": "int"}
    tensor = {"dtype": "str", "shape": ["int"]}
    assert _shape(document) == {
        "schema": "str", "expected": side, "found": side,
        "matched": [{"key": "str", "found_key": "str", **tensor, "by_own_code": "bool"}],
        "missing": [], "unexpected": [], "computed": [], "reported": [], "own_code": "NoneType",
        "shape_mismatched": [{"key": "str", "found_key": "str", "expected": tensor, "found": tensor}],
        "dtype_mismatched": [], "quantized": [], "dequantized": [], "values": "NoneType", "unmet": [], "hints": [],
        "summary": {
            "matched": "int", "missing": "int", "unexpected": "int", "shape_mismatched": "int",
            "dtype_mismatched": "int", "quantized": "int", "computed": "int", "coverage": "float",
            "same_ranges": "int", "loads_strict": "bool", "loads": "bool", "different": "bool",
        },
    }  # fmt: skip
    assert document["summary"]["coverage"] == pytest.approx(61156 / 61496)
    assert document["matched"][0]["found_key"] == "module.conv1.weight"


@pytest.mark.parametrize("command", ["merge", "remap", "convert"])
def test_plan_document(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The writing commands print documents of one form; after a dry run, output is null."""
    sources = [DDP, DDP] if command == "merge" else [DDP]
    asked: tuple[str | Path, ...] = (command, *sources, "-o", tmp_path / "o.pt", "--json", "--dry-run")
    document = json.loads(run_ckpt(capsys, *asked, "--only-tensors").out)
    assert list(document) == ["schema", "plan", "dropped", "kept", "metadata", "summary", "output"]
    assert document["schema"] == f"ckptkit.{command}/1"
    assert list(document["plan"][0]) == ["key", "dtype", "shape", "sources", "operation", "rule", "merge"]
    assert list(document["plan"][0]["sources"][0]) == ["role", "key"]
    assert document["dropped"][0] == {
        "role": "base" if command == "merge" else "source", "key": "epoch", "reason": "beside the state_dict (int)",
    }  # fmt: skip
    assert document["kept"] == []
    assert document["output"] is None
    document = json.loads(run_ckpt(capsys, *asked).out)
    assert document["kept"] == ["epoch", "optimizer", "best_acc"]
    assert [drop["role"] for drop in document["dropped"]] == (["donor"] * 3 if command == "merge" else [])


def test_findings_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``groups validate --json`` lists findings with hints, and exits with 1."""
    spec = tmp_path / "groups.toml"
    spec.write_text('[[group]]\nparams = "fc3.*"\nlr = 0.1\n', encoding="utf-8")
    ran = run_ckpt(capsys, "groups", "validate", "--model", MODEL, spec, "--json")
    document = json.loads(ran.out)
    assert ran.code == 1
    assert document["schema"] == "ckptkit.check/1"
    assert list(document["findings"][0]) == ["code", "severity", "key", "message", "hint"]
    assert document["summary"]["errors"] == len(document["findings"])
    assert "rest = true" in document["findings"][0]["hint"]


def test_a_misspelled_option_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled option is a warning, and the exit code is 1."""
    spec = tmp_path / "groups.toml"
    spec.write_text("[[group]]\nrest = true\nlrr = 0.1\n", encoding="utf-8")
    ran = run_ckpt(capsys, "groups", "validate", "--model", MODEL, spec)
    assert ran.code == 1
    assert "did you mean 'lr'?" in ran.out


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command below a group, with its path."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from _commands(inner, (*path, name))


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """Each help text has examples that the command accepts as they are; each file of ``cli/`` is a command or two."""
    commands = dict(_commands(ckpt))
    files = {path.stem for path in (ROOT / "ckptkit" / "cli").glob("*.py")} - {"__init__"}
    assert {FILES.get(path[0], path[0]) for path in commands} == files | {"git"}  # a folder
    assert [path for path in commands if path[0] == "groups"] == [("groups", name) for name in sorted(groups.commands)]
    for path in commands:
        ran = run_ckpt(capsys, *path, "--help")
        assert ran.code == 0
        text = ran.out.split("Options:")[0]
        examples = re.findall(r"^ +(ckpt (?!completion).*?)(?:  +.*)?$", text, re.MULTILINE)
        assert [example for example in examples if example.startswith(f"ckpt {' '.join(path)} ")] or path in (
            ("completion",),
            ("doctor",),
        )
        for example in examples:
            command: click.Command | None = ckpt
            name, arguments = "ckpt", shlex.split(example)[1:]
            while isinstance(command, click.Group):
                command, (name, *arguments) = command.get_command(click.Context(command), arguments[0]), arguments
            assert command is not None
            command.make_context(name, arguments).close()


def test_help_is_short_and_help_all_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` lists at most a dozen options, first those that matter, also reports; ``--help-all`` lists all."""
    for path, command in _commands(ckpt):
        options = {max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)}
        short = run_ckpt(capsys, *path, "--help").out
        listed = re.findall(
            r"^ +(?:-\w, )?(--[a-z0-9-]+)", short.partition("\nHelp:")[0].partition("\nOptions:")[2], re.MULTILINE
        )
        assert isinstance(command, Command)
        assert len(listed) <= MOST_OPTIONS
        assert ("--html" in listed) == ("--html" in options)
        assert listed[: len(command.first)] == list(command.first)
        whole = run_ckpt(capsys, *path, "--help-all").out
        assert options - {"--help-all"} <= set(re.findall(r"^ +(?:-\w, )?(--[a-z0-9-]+)", whole, re.MULTILINE))


def _ckpt(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "ckptkit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **settings)


def test_ignored_signals_stay_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    """Under nohup, SIGHUP is still ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_ckpt(capsys, "show", TEN).code == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_torch_without_numpy_prints_no_warning() -> None:
    """The warning that torch prints without numpy does not reach stderr."""
    program = "import sys; sys.modules['numpy'] = None; from ckptkit.cli import run; run()"
    command = [sys.executable, "-c", program, "show", MODEL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_rule_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--rules FILE`` reads rules with stages, and its errors name the file."""
    rules, out = tmp_path / "rules.toml", tmp_path / "o.safetensors"
    rules.write_text(
        'keep = ["layers.*"]\n[[rule]]\nfrom = "layers.{i:int}.*"\nto = "h.{i+1}.*"\n'
        '[[stage]]\n[[stage.rule]]\nfrom = "h.12.*"\ndrop = true\n',
        encoding="utf-8",
    )
    assert run_ckpt(capsys, "remap", "fixtures/encoder_tied.pt", "-o", out, "--rules", rules).code == 0
    assert {key.split(".")[1] for key in load_file(out)} == {str(index) for index in range(1, 12)}
    rules.write_text("[[rule]]\nfrom = 3\n", encoding="utf-8")
    ran = run_ckpt(capsys, "remap", "fixtures/encoder_tied.pt", "-o", out, "--force", "--rules", rules)
    assert ran.err.startswith(f"ckpt: {rules}: line 1: from must be a string or a list of strings")


def test_max_shard_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A size may have a unit; the shards read back as one checkpoint."""
    out = tmp_path / "shards"
    arguments = ("convert", "fixtures/encoder_tied.pt", "-o", out, "--max-shard-size")
    assert run_ckpt(capsys, *arguments, "20kB").code == 0
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3
    assert run_ckpt(capsys, "diff", "fixtures/encoder_tied.pt", out).code == 0
    assert run_ckpt(capsys, *arguments, "huge").code == 2


BUILDERS = """
import sys
import torch
class Silent(Exception):
    def __str__(self):
        raise ValueError
class Loud:
    def __getattr__(self, name):
        raise BaseException("lookup")
class Model(torch.nn.Module):
    def state_dict(self, *arguments, **options):
        sys.exit(1)
def silent(): raise Silent
def base(): raise BaseException("x")
def leave(): sys.exit(0)
def generator(): raise GeneratorExit
def takes(this): pass
def takes_two(this, that, other=1): pass
def interrupt(): raise KeyboardInterrupt
model, loud = Model(), Loud()
"""


@pytest.mark.parametrize(
    ("name", "code", "err"),
    [
        ("silent", 2, "calling 'silent' failed: Silent"),
        ("base", 2, "calling 'base' failed: BaseException: x"),
        ("leave", 2, "calling 'leave' failed: SystemExit: 0"),
        ("generator", 2, "calling 'generator' failed: GeneratorExit"),
        ("takes", 2, "hint: write 'py:builders_of_the_test:takes(this=VALUE)', with a Python literal for each VALUE"),
        ("takes_two(this=3)", 2, "hint: write 'py:builders_of_the_test:takes_two(this=3, that=VALUE)', with"),
        ("model", 2, "failed: SystemExit: 1"),
        ("loud.x", 2, "looking up 'loud.x' failed: BaseException: lookup"),
        ("interrupt", 130, "ckpt: interrupted"),
    ],
)
def test_whatever_a_builder_raises_is_one_line(
    *, name: str, code: int, err: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The code of a live model can raise anything, and the exit code is never that of a difference or of a bug."""
    (tmp_path / "builders_of_the_test.py").write_text(BUILDERS)
    monkeypatch.syspath_prepend(tmp_path)
    ran = run_ckpt(capsys, "diff", f"py:builders_of_the_test:{name}", TEN)
    assert (ran.code, ran.out) == (code, "")
    assert err in ran.err


def test_an_interrupt_during_imports_prints_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C before the first command is imported ends the program like Ctrl-C at any later moment."""
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = _ckpt("show", TEN, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"ckpt: interrupted: nothing was written\n")


@pytest.mark.parametrize(
    ("arguments", "code", "err"),
    [
        (["show", "IN"], 0, ""),
        (["convert", "IN", "-o", "o.pt"], 2, "ckpt: o.pt: the current directory: no such file or directory\n"),
        (["convert", "IN", "-o", "o", "--max-shard-size", "1kB"], 2, "ckpt: o: the current directory: no such file"),
        (["convert", "IN", "-o", "OUT", "--max-shard-size", "1kB", "--force", "-q"], 0, ""),
        (["remap", "IN", "-o", "OUT.pt", "--rename", "*=x.*", "--plan", "p.json"], 2, "ckpt: p.json: the current"),
        (["show", "py:no_such_module:build"], 2, "ckpt: py:no_such_module:build: importing 'no_such_module' failed"),
        (["show", "in.safetensors"], 2, "ckpt: in.safetensors: no such file or directory\n"),
    ],
)  # fmt: skip
def test_the_current_directory_may_be_removed(
    *,
    arguments: list[str],
    code: int,
    err: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Absolute paths work, and an error names a relative path."""
    (tmp_path / "out").mkdir()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    paths = {"IN": str(ROOT / TEN), "OUT": str(tmp_path / "out"), "OUT.pt": str(tmp_path / "out.pt")}
    ran = run_ckpt(capsys, *[paths.get(argument, argument) for argument in arguments])
    assert ran.code == code
    assert ran.err.startswith(err)
    assert bool(ran.err) == bool(err)


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000], ids=["large", "negative", "huge"])
@pytest.mark.parametrize("place", ["step", "lr"])
def test_integers_that_no_float_can_hold_are_shown(
    place: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python refuses to turn such an integer into a float, and to print one of more than 4,300 digits."""
    slots = {"step": number if place == "step" else 1, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    group = {"params": [0], "lr": number if place == "lr" else 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    run = {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: slots}, "param_groups": [group]}}
    torch.save(run, tmp_path / "run.pt")
    for options in ((), ("--json",)):
        ran = run_ckpt(capsys, "optim", "show", tmp_path / "run.pt", *options)
        assert ran.code in (0, 1), ran.err
        assert "bits" in ran.out or place == "step"
    ran = run_ckpt(capsys, "optim", "prune", tmp_path / "run.pt", "-o", tmp_path / "out.pt")
    assert (ran.code, ran.err.split(":")[0]) == (0, "nothing was pruned")
    found = torch.load(tmp_path / "out.pt", weights_only=False)["optimizer"]  # LONG4 is for full pickles only
    assert found["state"][0]["step"] == slots["step"]
    assert found["param_groups"][0]["lr"] == group["lr"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_path_without_permission_is_not_called_a_wrong_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the words of the reader, whether the path is a file or a directory."""
    for path in (tmp_path / "a.pt", tmp_path / "directory"):
        path.touch() if path.suffix else path.mkdir()
        path.chmod(0)
        ran = run_ckpt(capsys, "show", path)
        path.chmod(0o700)
        assert (ran.code, ran.err) == (2, f"ckpt: {path}: permission denied\n")


def test_a_diff_without_a_match_says_that_nothing_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``strict=False`` torch raises no error for such a checkpoint, and loads no tensor."""
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(2)}, tmp_path / "b.pt")
    ran = run_ckpt(capsys, "diff", tmp_path / "a.pt", tmp_path / "b.pt")
    assert (ran.code, "with strict=False it silently loads nothing" in ran.out) == (1, True)


def test_show_lists_what_is_inside_a_mapping_apart_from_what_is_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tables have a heading, and JSON says of each entry which it is."""
    content = {"epoch": 3, "model": {"w": torch.ones(1)}, "optimizer": {"state": {}, "lr": 0.5, "inner": {"deep": 1}}}
    torch.save(content, tmp_path / "run.pt")
    ran = run_ckpt(capsys, "show", f"{tmp_path / 'run.pt'}::optimizer")
    inside, _, beside = ran.out.partition("beside optimizer")
    assert ran.code == 0
    assert [line.split()[0] for line in inside.partition("also holds")[2].splitlines()[1:] if line] == [
        "state", "lr", "inner.deep"
    ]  # fmt: skip
    assert [line.split()[0] for line in beside.splitlines()[1:3]] == ["epoch", "model"]
    ran = run_ckpt(capsys, "show", f"{tmp_path / 'run.pt'}::optimizer", "--json")
    assert {entry["path"]: entry["beside"] for entry in json.loads(ran.out)["entries"]} == {
        "epoch": True, "model": True, "state": False, "lr": False, "inner.deep": False
    }  # fmt: skip
