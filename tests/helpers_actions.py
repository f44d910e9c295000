"""What a runner of GitHub Actions does with the output of a step."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Runner"]

_ESCAPES = {"%25": "%", "%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ","}


@dataclass
class Runner:
    """What the runner does with the lines of a step, after its sources: ActionCommandManager and ActionCommand."""

    commands: list[tuple[str, dict[str, str], str]] = field(default_factory=list)
    stopped: str = ""

    def read(self, output: str) -> list[tuple[str, dict[str, str], str]]:
        for line in output.split("\n"):
            self._line(line)
        assert not self.stopped
        return self.commands

    def _line(self, line: str) -> None:
        new = re.match(r"\s*::(?P<name>[^ :]+)(?: (?P<properties>.*?))?::(?P<data>.*)$", line)
        old = re.search(r"##\[(?P<name>[a-z-]+)(?: (?P<properties>[^\]]*))?\](?P<data>.*)$", line)
        match = new or old
        if match is None:
            return
        if self.stopped:
            self.stopped = "" if new and new["name"] == self.stopped else self.stopped
        elif match["name"] == "stop-commands":
            self.stopped = match["data"]
        else:
            pairs = [pair.partition("=") for pair in (match["properties"] or "").split(",") if pair]
            self.commands.append((match["name"], {name: plain(text) for name, _, text in pairs}, plain(match["data"])))


def plain(text: str) -> str:
    return re.sub("|".join(_ESCAPES), lambda match: _ESCAPES[match[0]], text)
