"""What the shell completes: keys of the checkpoint on the line, presets, optimizers and operations.

Each function has the signature of click's ``shell_complete``. Files are opened for their headers alone, a live model is
never built, and an error completes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from typing import ClassVar

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

from ckptkit.core.files.live_prefix import is_live_path

__all__ = [
    "complete_expected_keys",
    "complete_keys",
    "complete_optimizers",
    "complete_param_group_presets",
    "complete_policies",
    "complete_renames",
    "complete_rules",
    "given_words",
    "use_whole_words_in_bash",
]

_MOST = 500  # of the completions that a shell could still show
# The parameters that name a checkpoint: those whose keys a pattern fits come first.
_FOUND = ("found", "donors", "source", "init", "paths", "path", "base", "expected", "model")
_EXPECTED = ("expected", "base", "like", "model")


def complete_keys(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return keys, and patterns of modules, of the checkpoint whose path is on the line already."""
    return _next_patterns(_keys_of(context, _FOUND), incomplete)


def complete_expected_keys(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return keys, and patterns of modules, of the expected side; those that were found where it is a live model."""
    return _next_patterns(_keys_of(context, _EXPECTED) or _keys_of(context, _FOUND), incomplete)


def complete_renames(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return completions of ``OLD=NEW``: keys that were found before the ``=``, expected keys after it."""
    old, equals, new = incomplete.partition("=")
    if not equals:
        return [f"{pattern}=" for pattern in _next_patterns(_keys_of(context, _FOUND), old)]
    return [f"{old}={pattern}" for pattern in _next_patterns(_keys_of(context, _EXPECTED), new)]


def complete_policies(context: click.Context, actions: Iterable[str], incomplete: str) -> list[str]:
    """Return completions of ``ACTION`` or ``PATTERN=ACTION``, where the pattern fits an expected key."""
    pattern, equals, begun = incomplete.rpartition("=")
    completed = [f"{pattern}{equals}{action}" for action in actions if action.startswith(begun)]
    patterns = [] if equals else _next_patterns(_keys_of(context, _EXPECTED), incomplete)
    return [*completed, *(f"{known}=" for known in patterns)]


def complete_rules(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the presets of rules, those of a library, and files."""
    from ckptkit.rules.load import PRESET_PREFIX
    from ckptkit.rules.presets import preset_names

    presets = [f"{PRESET_PREFIX}{name}" for name in preset_names()]
    presets += ["transformers:auto", "transformers:auto:reverse", "gguf:auto"]
    found = [CompletionItem(preset) for preset in presets if preset.startswith(incomplete)] if incomplete else []
    return found or [CompletionItem(incomplete, type="file")]


def complete_param_group_presets(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the presets of param groups, each with the first sentence of its description."""
    from ckptkit.param_groups.presets import param_group_preset_names, preset_summary

    return [
        CompletionItem(name, help=preset_summary(name).partition(". ")[0])
        for name in param_group_preset_names()
        if name.startswith(incomplete)
    ]


def complete_optimizers(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the classes of torch.optim, without importing torch."""
    from ckptkit.core.torch_optim import SCHEMAS

    return [name for name in SCHEMAS if name.lower().startswith(incomplete.lower())]


def _keys_of(context: click.Context, names: Iterable[str]) -> Collection[str]:
    """Return the keys of the first checkpoint that one of the parameters ``names`` names and that can be opened."""
    from ckptkit.errors import CkptkitError
    from ckptkit.formats import open_checkpoint

    given = given_words(context)
    for path in (path for name in names for path in given.get(name, ())):
        if is_live_path(path):
            continue  # a live model runs the code of the user, which no key press must do
        with contextlib.suppress(CkptkitError, OSError), open_checkpoint(path) as checkpoint:
            return tuple(checkpoint)
    return ()


def given_words(context: click.Context) -> dict[str, list[str]]:
    """Return the words on the line by the name of their parameter."""
    given: dict[str, list[str]] = {}
    for name, value in context.params.items():
        words = [value] if isinstance(value, str) else value if isinstance(value, tuple) else ()
        given[name] = [word for word in words if isinstance(word, str)]
    # click leaves the arguments in a list where the option at the end of the line has no value yet.
    left = list(context.args)
    for parameter in context.command.params:
        if isinstance(parameter, click.Argument) and parameter.name and left:
            count = len(left) if parameter.nargs < 0 else parameter.nargs
            given[parameter.name], left = left[:count], left[count:]
    return given


def _next_patterns(keys: Collection[str], incomplete: str) -> list[str]:
    """Return the keys one level below ``incomplete``, and ``MODULE.*`` for every module there.

    Where only one module is left, its own modules and keys follow, so that a further key press always leads on.
    """
    found: dict[str, None] = {}
    level = incomplete.rpartition(".")[0] + "." if "." in incomplete else ""
    below = [key for key in keys if key.startswith(incomplete)]
    while below:
        modules: dict[str, None] = {}
        for key in below:
            segment, dot, _ = key[len(level) :].partition(".")
            modules[level + segment + dot] = None
        found.update((f"{module}*" if module.endswith(".") else module, None) for module in modules)
        only = next(iter(modules))
        if len(modules) > 1 or not only.endswith("."):
            break
        level = only
    return list(found)[:_MOST]


class _BashComplete(BashComplete):
    """Completion for bash that reads the line itself.

    bash splits words at ``:`` and ``=``, which paths, renames and presets have. It replaces only the part of the word
    behind the last of them.
    """

    name: ClassVar[str] = "bash"
    source_template: ClassVar[str] = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value
    response=$(env COMP_WORDS="${COMP_LINE:0:$COMP_POINT}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            [[ $value == *= ]] && compopt -o nospace
            COMPREPLY+=("$value")
        fi
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the complete words of the line, and the word at the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = "" if not line or line[-1].isspace() else words.pop()
        return words[1:], incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """Return the completions without the part of the word that bash keeps."""
        kept = re.match(r".*[:=]", incomplete, re.DOTALL)
        start = kept.end() if kept else 0
        items: list[CompletionItem] = super().get_completions(args, incomplete)
        return [CompletionItem(item.value[start:], type=item.type) for item in items]


def use_whole_words_in_bash() -> None:
    """Let click complete bash with the words as the user typed them."""
    add_completion_class(_BashComplete)
