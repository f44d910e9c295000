"""Hints name commands and options that exist and work; in Python they name functions and arguments."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

import tests.helpers_hint_optim  # noqa: F401 - it adds its situations
from ckptkit import open_checkpoint, run_checks
from ckptkit.cli.common.hints import hint_for_command
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.errors import CkptkitError, hint_for_python, message_for_python
from tests.helpers_cli import ROOT, run_ckpt
from tests.helpers_hint_situations import SITUATIONS, TEN, Situation, save
from tests.helpers_hints import FOREIGN, all_options, commands_in, options_in, problems_of_hint

_LONG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
_WAYS = re.compile(r"; or |, or |; ")
_LEFT_OUT = frozenset(("--on-mismatch",))  # without a value: the sentence before it names the actions


def _text_of(part: str) -> str:
    """Return the text in a part, without the file before it."""
    return part.partition(": ")[2]


def _is_in(part: str, line: str) -> bool:
    return re.search(".*".join(map(re.escape, _text_of(part).split("XX"))), line) is not None


class _Follower:
    """Follows the hints that a command prints, with the words that the situation has for placeholders."""

    def __init__(self, situation: Situation, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.situation, self.folder, self.capsys = situation, folder, capsys
        self.arguments = situation.make(folder)
        count = 2 if self.arguments[0] in {"optim", "groups"} else 1
        inputs = [word for word in self.arguments[count:] if not word.startswith("-")]
        self.number = 0
        self.names = {
            **dict.fromkeys(("PATH", "BASE", "ADAPTER", "SAVED", "FILE"), inputs[0] if inputs else ""),
            **dict.fromkeys(("DONOR", "TUNED", "LIVE"), inputs[1] if len(inputs) > 1 else ""),
            "VALUE": "4",
            **dict.fromkeys(("rules.toml", "RULES"), str(folder / "found.toml")),
            **{name: text.format(folder=folder) for name, text in situation.names.items()},
        }

    def filled(self, word: str) -> str:
        """Return a word of a hint with its placeholder filled in."""
        if word in self.names:
            return self.names[word]
        name, slash, rest = re.match(r"([A-Z]*)([./=]?)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        if name == "VALUE" or (name and name in self.names and slash):
            return f"{self.names[name]}{slash}{rest}"
        return word.replace("=VALUE", f"={self.names['VALUE']}")

    def run(self) -> None:
        ran = run_ckpt(self.capsys, *self.arguments)
        lines = [line.strip() for line in (*ran.out.splitlines(), *ran.err.splitlines())]
        told = [line for line in lines if any(_is_in(part, line) for part in self.situation.hints)]
        for part in self.situation.hints:
            assert any(_is_in(part, line) for line in told), (part, ran)
        hints = [line for line in lines if line.startswith("hint: ")]
        assert told or hints, ran
        for line in dict.fromkeys((*told, *hints)):
            for way in _WAYS.split(line.removeprefix("hint: ")):
                self.follow(way)

    def follow(self, way: str) -> None:
        """Run each command of a way out, and the command again with each option of it."""
        assert problems_of_hint(self.arguments, way) == []
        for words in commands_in(way):
            if len(words) > 1 and words[:1] != ["doctor"]:
                self.run_command(words, way)
        for named in options_in(way):
            if named[0] not in _LEFT_OUT and named[0] not in FOREIGN:
                self.run_with(named, way)

    def run_command(self, words: list[str], way: str) -> None:
        self.number += 1
        like = self.arguments[self.arguments.index("-o") + 1] if "-o" in self.arguments else "out.pt"
        out = self.folder / f"followed{self.number}{Path(like).suffix or '.safetensors'}"
        self.names["OUT"] = str(out.with_suffix("")) if any("OUT." in word for word in words) else str(out)
        run = [self.filled(word) for word in words]
        followed = run_ckpt(self.capsys, *run)
        if followed.code == 2 and self.name_source(run):  # the file has no names
            run += self.name_source(run)
            followed = run_ckpt(self.capsys, *run)
        if "-o" not in run or "--dry-run" in run:
            assert followed.code in {0, 1}, (way, followed)
            return
        assert followed.code in ({0, 1} if run[0] == "align" else {0}), (way, run, followed)
        written = run[run.index("-o") + 1]
        if written.endswith(".toml"):
            self.again([*self.arguments, "--rules", written], way)
        elif run[0] != "merge" and not {*run} & {"--adapter", "lock"}:
            source = run[2] if run[0] == "optim" else run[1]
            if source in self.arguments:
                self.again([written if word == source else word for word in self.arguments], way)
        elif run[0] == "merge":
            open_checkpoint(written).close()

    def name_source(self, run: list[str]) -> list[str]:
        """Return the option that named the parameters of an optimizer in the command, for another such command."""
        if run[0] != "optim":
            return []
        options = ("--model", "--names")
        return [word for at, one in enumerate(self.arguments) if one in options for word in self.arguments[at : at + 2]]

    def run_with(self, named: list[str], way: str) -> None:
        option = [named[0], *map(self.filled, named[1:])]
        if " ".join(option) in " ".join(self.arguments):
            return
        name = named[0].removeprefix("--").upper()
        if len(option) == 1 and name in self.names:
            option.append(self.names[name])
        if way.startswith("leave out --"):
            at = self.arguments.index(option[0])
            again = [*self.arguments[:at], *self.arguments[at + (1 if option == ["--carry"] else 2) :]]
        elif option[0] == "--names" and "--model" in self.arguments:
            at = self.arguments.index("--model")
            again = [*self.arguments[:at], *option, *self.arguments[at + 2 :]]
        elif replaced := re.search(r"in place of (--[a-z]+)", way):
            if option == [replaced[1]]:
                return
            at = self.arguments.index(replaced[1])
            again = [*self.arguments[:at], *option, *self.arguments[at + 2 :]]
        elif option[0] in self.arguments and option[0] not in {"--on-mismatch", "--drop"}:
            at = self.arguments.index(option[0])
            again = [*self.arguments[:at], *option, *self.arguments[at + 2 :]]
        else:
            again = [*self.arguments, *option]
        self.again(again, way, keeps_output=option == ["--force"])

    def again(self, arguments: list[str], way: str, *, keeps_output: bool = False) -> None:
        """Run the command once more, which must succeed, and must not give the same hint."""
        if self.situation.ends:
            return
        if not keeps_output:
            for out in self.folder.glob("out*"):
                shutil.rmtree(out) if out.is_dir() else out.unlink()
        if "the :: part" in way:
            arguments = [word.partition("::")[0] for word in arguments]
        followed = run_ckpt(self.capsys, *arguments)
        reports = arguments[0] in {"diff", "preflight", "check"} or arguments[:2] in (
            ["optim", "show"],
            ["optim", "diff"],
        )
        assert followed.code in ({0, 1} if reports else {0}), (way, arguments, followed)
        if any(_is_in(part, way) for part in self.situation.hints):
            assert way not in followed.out + followed.err, (way, arguments, followed)


@pytest.mark.parametrize("situation", SITUATIONS, ids=[situation.id for situation in SITUATIONS])
def test_each_way_out_works(situation: Situation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command in a hint runs, and each option ends the trouble of the command, as the hint promises."""
    _Follower(situation, tmp_path, capsys).run()


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
    if isinstance(node, ast.FormattedValue):
        return _text(node.value) if isinstance(node.value, ast.Call) else "XX"
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body)} {_text(node.orelse)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "drop_options":
        return "--drop XX"
    return "XX"


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _texts_of(path: Path) -> tuple[str, ...]:
    return tuple(_texts(_tree(path)))


SOURCES = sorted((ROOT / "ckptkit").rglob("*.py"))


def test_every_option_and_command_in_the_sources_exists() -> None:
    """No text names an option that no command has, or a command with options that it does not have."""
    known = all_options() | FOREIGN
    for path in SOURCES:
        for text in _texts_of(path):
            unknown = [name for name in _LONG.findall(text) if name not in known] if "--" in text else []
            assert unknown == [], (path, text)
            if " ckpt " in f" {text}" and "cli" not in path.parts:
                problems = [problem for problem in problems_of_hint([], text) if "lacks" not in problem]
                assert problems == [], (path, text)


def test_errors_speak_python() -> None:
    """The text of every error names no option and no command: what hints name has a spelling in Python."""
    for path in SOURCES:
        if "cli" in path.parts:
            continue
        for node in ast.walk(_tree(path)):
            words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
            if "hint" in words and "call" not in words:
                text = str(CkptkitError("refused", hint=_text(words["hint"])))
                left = [name for name in _LONG.findall(text) if name not in FOREIGN]
                assert (left, commands_in(text)) == ([], []), (path, text)


# Texts with a command or an option that no situation follows, each with the reason.
_MESSAGE = "a message, which names what the user gave"
_BUILDER = "a function that makes hints, whose uses are followed"
_ORACLES = "needs transformers: tests/oracles/test_hints.py follows it"
NOT_FOLLOWED: dict[str, str] = {
    "adapters/base_modules.py: --drop XX": _BUILDER,
    "core/patterns/__init__.py: --drop XX": _BUILDER,
    "errors.py: ": "patterns that read hints",
    "rules/model.py: --": _BUILDER,
    "core/coverage/requirements.py: ": _MESSAGE,
    "optimizer_state/pruning.py: requested with": _MESSAGE,
    "readiness/init.py: --fresh XX matches none of": _MESSAGE,
    "readiness/init.py: must stay at init by --fresh": _MESSAGE,
    "rules/apply.py: --strip": _MESSAGE,
    "rules/apply.py: --keep XX matches none of": _MESSAGE,
    "rules/apply.py: matches no --keep": _MESSAGE,
    "rules/transformers/__init__.py: --rules XX: ": _MESSAGE,
    "rules/transformers/skeleton.py: --rules transformers: needs": _MESSAGE,
    "wrappers/explain.py: --strip XX begins none of": _MESSAGE,
    "wrappers/explain.py: --strip XX would leave a dot": _MESSAGE,
    "formats/directories/opening.py: ckpt searched for an index": "names the program, not a command",
    "formats/__init__.py: diff, align, merge and --like": "a note about commands, without one to run",
    "plans/adapters/fold.py: with a second ckpt merge": "a note: which weights they are, only the user knows",
    "plans/adapters/ties.py: which --carry writes": "a note; tests/test_plan_lora_ties.py runs it with --carry",
    "plans/adapters/ties.py: leave it out: --drop": "followed by tests/test_plan_lora_ties.py",
    "render/align.py: this preset fills all of them: --rules": "followed by tests/test_align.py",
    "plans/remap.py: takes them from the trained weights": "followed by tests/test_positions.py",
    "formats/writing/atomic.py: run the command again with --force": "needs a second program: tests/test_faults.py",
    "formats/safetensors.py: drop the tensor: --drop": "only some versions of safetensors refuse these dtypes",
    "param_groups/spec_findings.py: give the live model: --model": "only Python prints the hint of this finding",
    "statistics/state_dict_stats.py: ckpt remap PATH -o OUT --rules FILE": "only stats() takes rules with operations",
    "optimizer_state/load.py: drop its state first: ckpt optim prune": "only load_optimizer_state says it",
    "plans/merge.py: if these tensors are not needed, leave them out": "only load_into says it",
    "comparison/__init__.py: --rules transformers:auto": _ORACLES,
    "plans/merge.py: --rules transformers:auto": _ORACLES,
    "rules/transformers/__init__.py: name the model type, such as": _ORACLES,
    "rules/transformers/skeleton.py: --rules transformers:auto takes": _ORACLES,
}  # fmt: skip


def _told() -> Iterator[str]:
    """Yield every text of the package that names a command or an option, after its file."""
    for path in SOURCES:
        place = path.relative_to(ROOT / "ckptkit")
        if place.parts[0] != "cli":
            for text in _texts_of(path):
                if " " in text and ("--" in text or "ckpt " in text) and (_options(text) or " ckpt " in f" {text}"):
                    yield f"{place}: {text}"


def test_every_hint_is_followed() -> None:
    """Each text that names a command or an option is in a situation, or in the list of those that are not hints."""
    told = list(_told())
    parts = [*(part for situation in SITUATIONS for part in situation.hints), *NOT_FOLLOWED]
    assert [part for part in parts if not any(_covers(part, text) for text in told)] == []
    assert [text for text in told if not any(_covers(part, text) for part in parts)] == []


def _options(text: str) -> list[str]:
    return [name for name in _LONG.findall(text) if name not in FOREIGN]


def _covers(part: str, text: str) -> bool:
    file, _, words = part.partition(": ")
    return text.startswith(f"{file}: ") and words in text


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
    "ckpt merge a.pt b.pt -o OUT --method extract-lora shows": "extract_lora('a.pt', 'b.pt', out) shows",
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
        for text in _texts_of(path):
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
    save(tmp_path, a={"head.weight": torch.randn(2, 6)})
    run = run_ckpt(capsys, "check", tmp_path / "a.pt", "--like", TEN)
    report = str(run_checks(tmp_path / "a.pt", like=TEN))
    assert ("no key matches; ckpt align " in run.out, "suggest_rules" in run.out) == (True, False)
    assert ("no key matches; suggest_rules(" in report, "ckpt align" in report) == (True, False)
