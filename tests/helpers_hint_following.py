"""Follow the hints of a command: run each command and each option that they name, and the call in Python."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import warnings
from pathlib import Path

import pytest

import ckptkit
from ckptkit import open_checkpoint
from ckptkit.errors import COMMAND, hint_for_python
from ckptkit.formats.live import build_model
from ckptkit.optimizer_state.model import OptimizerState
from ckptkit.optimizer_state.naming import to_named
from tests.helpers_cli import run_ckpt
from tests.helpers_hint_situations import Situation
from tests.helpers_hints import FOREIGN, options_in, problems_of_hint

__all__ = ["Follower"]

_WAYS = re.compile(r"; or |, or |; ")
_LEFT_OUT = frozenset(("--on-mismatch",))  # without a value: the sentence before it names the actions


def _text_of(part: str) -> str:
    """Return the text in a part, without the file before it."""
    return part.partition(": ")[2]


def _is_in(part: str, line: str) -> bool:
    return re.search(".*".join(map(re.escape, _text_of(part).split("XX"))), line) is not None


class Follower:
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
        for match in COMMAND.finditer(way):
            if match["words"]:
                self.run_command(shlex.split(match[0])[1:], way)
                if self.situation.is_called:
                    self.call(match[0])
        for named in options_in(way):
            if named[0] not in _LEFT_OUT and named[0] not in FOREIGN:
                self.run_with(named, way)

    def run_command(self, words: list[str], way: str) -> None:
        self.number += 1
        like = self.arguments[self.arguments.index("-o") + 1] if "-o" in self.arguments else "out.pt"
        out = self.folder / f"followed{self.number}{Path(like).suffix or '.safetensors'}"
        if "extract-lora" in words:
            out = out.with_suffix("") / "adapter_model.safetensors"
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

    def call(self, command: str) -> None:
        """Run the call of Python that a command of a hint becomes, with the values of its placeholders."""
        self.number += 1
        values: dict[str, object] = {name.lower(): text for name, text in self.names.items() if name.isalpha()}
        folder = self.folder / f"called{self.number}"
        folder.mkdir()
        out = folder / f"out{Path(self.names['OUT']).suffix}"
        values["out"] = folder / "adapter_model.safetensors" if "extract-lora" in command else out
        call = hint_for_python(command)
        for name, text in self.names.items():
            call = call if name.isalpha() else call.replace(f"'{name}'", repr(text))
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            if "ckpt optim" in command:
                values["state"] = self.state(stack, self.names["PATH"])
            if "LIVE" in command:
                values["live"] = self.state(stack, self.names["LIVE"])
            model = str(values.get("model", ""))
            values["model"] = build_model(model.removeprefix("py:")) if model.startswith("py:") else model
            names = {**vars(ckptkit), **{name: getattr(ckptkit, name) for name in ckptkit.__all__}}
            eval(call, names, values)  # noqa: S307 - the text of a hint

    def state(self, stack: contextlib.ExitStack, path: str) -> OptimizerState:
        """Return the state of an optimizer in a file, with the names that the command was given."""
        return to_named(stack.enter_context(ckptkit.open_optimizer(path)), drop_strays=True)

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
