"""Hints name commands and options that exist and work; in Python they name functions and arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptkit import run_checks
from ckptkit.cli.common.hints import hint_for_command
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.errors import CkptkitError, hint_for_python, message_for_python
from tests.helpers_cli import ROOT, Ran, run_ckpt
from tests.helpers_hints import FOREIGN, all_options, commands_in, options_in, problems_of_hint

TEN, DDP = ROOT / "fixtures" / "lenet_10class.pth", ROOT / "fixtures" / "lenet_ddp.pt"
MODEL = "py:fixtures.lenet:build"
_LONG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_WAYS = re.compile(r"; or |, or |; ")


def _save(folder: Path, **states: dict[str, torch.Tensor]) -> None:
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")


def _prefixed(_folder: Path) -> list[str]:
    return ["diff", str(TEN), str(DDP)]


def _other_head(folder: Path) -> list[str]:
    return ["merge", MODEL, str(TEN), "-o", str(folder / "out.safetensors")]


def _missing_keys(folder: Path) -> list[str]:
    _save(folder, base={"a": torch.zeros(2), "b": torch.zeros(2)}, donor={"a": torch.ones(2)})
    base, donor = folder / "base.pt", folder / "donor.pt"
    return ["merge", str(base), str(donor), "-o", str(folder / "out.pt"), "--on-missing", "error"]


def _unexpected_keys(folder: Path) -> list[str]:
    _save(folder, base={"a": torch.zeros(2)}, donor={"a": torch.ones(2), "b": torch.zeros(2)})
    base, donor = folder / "base.pt", folder / "donor.pt"
    return ["merge", str(base), str(donor), "-o", str(folder / "out.pt"), "--on-unexpected", "error"]


def _unused_policy(folder: Path) -> list[str]:
    return ["merge", str(TEN), str(TEN), "-o", str(folder / "out.pt"), "--on-mismatch", "zz.*=skip"]


def _unused_rule(folder: Path) -> list[str]:
    return ["remap", str(TEN), "-o", str(folder / "out.pt"), "--rename", "zz.*=*"]


def _unused_filter(_folder: Path) -> list[str]:
    return ["show", str(TEN), "--keep", "zz.*"]


def _unused_filter_of_statistics(_folder: Path) -> list[str]:
    return ["stats", str(TEN), "--keep", "zz.*"]


def _existing_output(folder: Path) -> list[str]:
    (folder / "out.pt").write_bytes(TEN.read_bytes())
    return ["remap", str(TEN), "-o", str(folder / "out.pt"), "--drop", "fc3.*"]


def _sparse(folder: Path) -> list[str]:
    _save(folder, sparse={"a": torch.ones(2), "odd": torch.eye(3).to_sparse()})
    return ["convert", str(folder / "sparse.pt"), "-o", str(folder / "out.pt")]


def _no_code(folder: Path) -> list[str]:
    _save(folder, odd={"a": torch.ones(2), "odd": torch.ones(2, dtype=torch.complex128)})
    return ["convert", str(folder / "odd.pt"), "-o", str(folder / "out.safetensors")]


def _overflow(folder: Path) -> list[str]:
    _save(folder, base={"a": torch.zeros(2, dtype=torch.float16)}, donor={"a": torch.tensor([1e6, 1.0])})
    return ["merge", str(folder / "base.pt"), str(folder / "donor.pt"), "-o", str(folder / "out.pt")]


def _strip_without_dot(folder: Path) -> list[str]:
    return ["remap", str(DDP), "-o", str(folder / "out.pt"), "--strip", "module"]


def _unset_variable(folder: Path) -> list[str]:
    (folder / "rules.toml").write_text(
        '[vars]\nheads = "required"\n[[rule]]\nfrom = "fc1.weight"\nto = "fc1.weight"\n'
        'op = { chunk = { dim = 0, parts = "heads" } }\n',
        encoding="utf-8",
    )
    return ["remap", str(TEN), "-o", str(folder / "out.pt"), "--rules", str(folder / "rules.toml")]


def _parts_of_layers(folder: Path) -> list[str]:
    (folder / "parts").mkdir()
    for number in range(2):
        torch.save({f"layer{number}.weight": torch.ones(2)}, folder / "parts" / f"consolidated.0{number}.pth")
    return ["show", str(folder / "parts")]


def _too_little(folder: Path) -> list[str]:
    return [*_other_head(folder), "--on-mismatch", "skip", "--require", "fc3.*"]


def _adapter(folder: Path, method: str) -> list[str]:
    """Return the command for an adapter of one of two weights, without what it must change."""
    states = {
        "base": {"a.weight": torch.zeros(4, 6), "b.weight": torch.zeros(4, 6)},
        "tuned": {"a.weight": torch.ones(4, 6), "b.weight": torch.zeros(4, 6)},
        "adapter": {"a.lora_A.weight": torch.ones(1, 6), "a.lora_B.weight": torch.ones(4, 1)},
    }
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}', encoding="utf-8")
    donor = folder / ("adapter.safetensors" if method == "lora" else "tuned.safetensors")
    return ["merge", str(folder / "base.safetensors"), "--require", "b.*", "--method", method,
            "-o", str(folder / "out.safetensors"), str(donor)]  # fmt: skip


def _too_small_an_adapter(folder: Path) -> list[str]:
    return _adapter(folder, "lora")


def _too_small_a_change(folder: Path) -> list[str]:
    return _adapter(folder, "extract-lora")


def _prefixed_run(_folder: Path) -> list[str]:
    return ["preflight", "--model", "py:fixtures.lenet:build(num_classes=10)", "--resume", str(DDP)]


def _carry_of_nothing(folder: Path) -> list[str]:
    return ["convert", str(TEN), "-o", str(folder / "out.pt"), "--carry"]


SITUATIONS: list[Callable[[Path], list[str]]] = [
    _prefixed, _other_head, _missing_keys, _unexpected_keys, _unused_policy, _unused_rule, _unused_filter,
    _unused_filter_of_statistics, _existing_output, _sparse, _no_code, _overflow, _strip_without_dot, _unset_variable,
    _parts_of_layers, _too_little, _too_small_an_adapter,
    _too_small_a_change, _prefixed_run, _carry_of_nothing,
]  # fmt: skip


def _ways(ran: Ran) -> Iterator[str]:
    """Yield each way out in the hints of a command; those of findings stand below them."""
    lines = [line.removeprefix("hint: ") for line in ran.err.splitlines() if line.startswith("hint: ")]
    lines += [line.strip() for line in ran.out.splitlines() if line.startswith("  ") and "match after" in line]
    for line in lines:
        yield from _WAYS.split(line)


@pytest.mark.parametrize("situation", SITUATIONS, ids=[situation.__name__[1:] for situation in SITUATIONS])
def test_each_way_out_works(
    situation: Callable[[Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command in a hint runs, and each option ends the trouble of the command, as the hint promises."""
    arguments = situation(tmp_path)
    ran = run_ckpt(capsys, *arguments)
    assert ran.code in {1, 2}
    for number, way in enumerate(_ways(ran)):
        assert problems_of_hint(arguments, way) == []
        out = str(tmp_path / f"followed{number}{Path(arguments[-1]).suffix or '.pt'}")
        names = {"OUT": out, "PATH": arguments[1], "BASE": arguments[1], "DONOR": arguments[-1], "VALUE": "3"}
        for words in commands_in(way):
            followed = run_ckpt(capsys, *(names.get(word, word) for word in words))
            assert followed.code in {0, 1}, (way, followed)
        for named in options_in(way):
            option = [word.replace("VALUE", "4") for word in named]
            if option == ["--on-mismatch"]:
                continue
            if way.startswith("leave out"):
                again = [word for word in arguments if word not in option]
            elif option[0] in arguments and option[0] != "--on-mismatch":  # in place of what the command was given
                at = arguments.index(option[0])
                again = [*arguments[:at], *option, *arguments[at + 2 :]]
            else:
                again = [*arguments, *option]
            if option != ["--force"]:
                for written in tmp_path.glob("out.*"):
                    written.unlink()
            followed = run_ckpt(capsys, *again)
            assert followed.code in ({0, 1} if arguments[0] in {"diff", "preflight"} else {0}), (way, followed)


def _texts(tree: ast.AST) -> Iterator[str]:
    """Yield every text in a source, with ``XX`` for what is filled in, but no docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield _text(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inside:
            yield node.value


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} {_text(node.orelse)}"
    return "XX"


SOURCES = sorted((ROOT / "ckptkit").rglob("*.py"))


def test_every_option_and_command_in_the_sources_exists() -> None:
    """No text names an option that no command has, or a command with options that it does not have."""
    known = all_options() | FOREIGN
    for path in SOURCES:
        for text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            unknown = [name for name in _LONG.findall(text) if name not in known]
            assert unknown == [], (path, text)
            if " ckpt " in f" {text}" and "cli" not in path.parts:
                problems = [problem for problem in problems_of_hint([], text) if "lacks" not in problem]
                assert problems == [], (path, text)


def test_errors_speak_python() -> None:
    """The text of every error names no option and no command: what hints name has a spelling in Python."""
    for path in SOURCES:
        if "cli" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
            if "hint" in words and "call" not in words:
                text = str(CkptkitError("refused", hint=_text(words["hint"])))
                left = [name for name in _LONG.findall(text) if name not in FOREIGN]
                assert (left, commands_in(text)) == ([], []), (path, text)


SPELLINGS = {
    "--force replaces it": "force=True replaces it",
    "--drop 'a.*' leaves it out, or --rename 'a.*=NEW.*' gives it a name": (
        "parse_rules(drop=['a.*']) leaves it out, or rules=['a.*=NEW.*'] gives it a name"
    ),
    "ckpt merge a.pt 'b c.pt' d.pt --on-unexpected add -o OUT": (
        "merge('a.pt', ['b c.pt', 'd.pt'], out, on_unexpected='add')"
    ),
    "cast it: ckpt convert BASE -o OUT --dtype F32": "cast it: convert(base, out, dtype='F32')",
    "ckpt optim prune PATH -o OUT --drop 'a' --drop 'b'": "optimizer_state.prune(path, drop=['a', 'b'])",
    "all 3 keys match after --rename 'module.*=*'": "all 3 keys match after rules=['module.*=*']",
    "--as-layer 'PATTERN=KIND' decides otherwise": "as_layer={'PATTERN': 'KIND'} decides otherwise",
    "save it with --dist-ckpt-format torch_dist": "save it with --dist-ckpt-format torch_dist",
    "if not needed: --drop 'a' --drop 'b'; or not": "if not needed: parse_rules(drop=['a', 'b']); or not",
    "no option": "no option",
}


@pytest.mark.parametrize(("hint", "spelling"), SPELLINGS.items())
def test_the_spelling_of_python(hint: str, spelling: str) -> None:
    """Flags, values, rules and whole commands become arguments and calls; options of other programs stay."""
    assert hint_for_python(hint) == spelling


MESSAGES = {
    "--fresh 'fc.*' matches none of 3 keys": "fresh='fc.*' matches none of 3 keys",
    "5 of 9, below --min-coverage 0.75; the rest": "5 of 9, below min_coverage=0.75; the rest",
    "--on-mismatch 'zz.*=skip' and --rename 'a=b'": "on_mismatch={'zz.*': 'skip'} and rename='a=b'",
    "--strip auto: 'module.' from 3 keys": "strip='auto': 'module.' from 3 keys",
    "the model's key 'a --force' is \"it's --drop\"": "the model's key 'a --force' is \"it's --drop\"",
    "save it with --dist-ckpt-format torch_dist": "save it with --dist-ckpt-format torch_dist",
}


@pytest.mark.parametrize(("message", "spelling"), MESSAGES.items())
def test_messages_name_arguments_in_python(message: str, spelling: str) -> None:
    """The reason of an error, a finding and a note name arguments in Python; quoted names stay as they are."""
    assert str(CkptkitError(message)) == message_for_python(message) == spelling


NAMES = (
    "py:fixtures.lenet:build",
    "py:a.b:c(n=4)",
    "run",
    "run/",
    ".",
    "a b.pt",
    "a=b.pt",
    "w.pt::model",
    "it's.pt",
    "ü.pt",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_a_hint_is_read_to_its_end(name: str) -> None:
    """Whatever the name of the checkpoint, its command stays one command, and becomes one call in Python."""
    word = CheckpointSummary(name, "safetensors").argument
    hint = f"leave it out: ckpt remap {word} -o OUT --drop 'a', or see ckpt show {word} in full"
    assert commands_in(hint) == [["remap", name, "-o", "OUT", "--drop", "a"], ["show", name]]
    assert hint_for_command(hint, {"--keep"}, all_options()) == hint
    call = hint_for_python(hint).removeprefix("leave it out: ").partition(", or see")[0]
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    assert ast.literal_eval(parsed.args[0]) == name


# Lines of files and of Python code, which ckptkit writes or asks for: the fields have the names of options.
_FIELDS = frozenset(("keep", "strip", "drop", "dtype", "groups", "optimizer"))
_FIELD_FILES = frozenset(
    ("emit.py", "rule_files.py", "parse.py", "build.py", "checks.py", "tables.py", "spec_findings.py", "quantized.py")
)


def test_messages_name_options_on_the_command_line() -> None:
    """No message that a command prints names an argument of Python in place of the option of the same name."""
    names = "|".join(sorted(name.removeprefix("--").replace("-", "_") for name in all_options()))
    spelled = re.compile(rf"(?<![\w.\"'{{-])({names}) = ")
    for path in SOURCES:
        for text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            found = set(spelled.findall(text)) - (_FIELDS if path.name in _FIELD_FILES else set())
            assert found == set(), (path, text)


def test_a_command_names_only_its_own_options() -> None:
    """A way out that the command does not have is left out; rules are shown with ckpt remap."""
    known = all_options()
    assert hint_for_command("correct it, or pass --allow-unused", {"--keep"}, known) == "correct it"
    assert hint_for_command("correct it, or pass --allow-unused", {"--allow-unused"}, known).endswith("--allow-unused")
    assert hint_for_command("write a .pt file, or drop it: --drop 'a'", set(), known) == (
        "write a .pt file, or drop it: ckpt remap PATH -o OUT --drop 'a'"
    )
    assert hint_for_command("--skip-unread leaves it out; ckpt remap A -o OUT --drop 'a'", set(), known) == (
        "ckpt remap A -o OUT --drop 'a'"
    )


def test_findings_speak_to_their_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hint of a finding has the option in the command line, and the argument where Python prints the report."""
    _save(tmp_path, a={"head.weight": torch.randn(2, 6)})
    run = run_ckpt(capsys, "check", tmp_path / "a.pt", "--like", TEN)
    report = str(run_checks(tmp_path / "a.pt", like=TEN))
    assert ("no key matches; ckpt align " in run.out, "suggest_rules" in run.out) == (True, False)
    assert ("no key matches; suggest_rules(" in report, "ckpt align" in report) == (True, False)
