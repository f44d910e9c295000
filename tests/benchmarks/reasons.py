"""Why another program failed, in one line that can be published."""

from __future__ import annotations

import re

__all__ = ["last_error"]


def last_error(text: str) -> str:
    """Return the last line of an error output, without frames, addresses of servers and folders of this machine."""
    lines = [" ".join(line.strip(" │╭╮╰╯─").split()) for line in text.splitlines()]
    errors = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line]
    if not errors:
        return "it printed no error"
    return re.sub(
        r"(?<![\w.])(/[\w.+-]+)+/", "", re.sub(r"\S*://\S*", "(address)", errors[-1].removeprefix("ERROR: "))
    )[:160]
