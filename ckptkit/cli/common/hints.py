"""Hints of errors for the command that ran: they name only options that the command has."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Container, Iterator, Sequence

import click

from ckptkit.core.text import listed, nearest, quoted, shell_word
from ckptkit.errors import COMMAND, OPTION, RULE_OPTIONS
from ckptkit.lazy_patterns import lazy_pattern

__all__ = ["OTHER_METHODS", "NoSuchCommandError", "hint_for_command", "usage_trouble"]

_BETWEEN = lazy_pattern(r"(; or |, or |; |(?<=\?) (?=or ))")
_NOT_ONE_OF = lazy_pattern(r"(['\"])(?P<value>[^'\"]*)\1 is not one of (?P<choices>.*)")
_EXTRA = lazy_pattern(r"Got unexpected extra arguments? \((?P<words>.*)\)")
_QUOTED = lazy_pattern(r"'([^']*)'")
_ALIKE = 0.74  # the least likeness of a word to a right one: --strict is not --strip
_ALIKE_AT_START = 0.6  # where one of both words begins with all of the other
_CHOICE_INDENT = lazy_pattern(r"\s*\n\t")
_REMAP = "ckpt remap PATH -o OUT"
_OTHER_NAMES = {
    "compare": "diff", "info": "show", "inspect": "show", "ls": "show", "list": "show", "summary": "show",
    "hash": "digest", "checksum": "digest", "sha256": "digest", "verify": "check", "validate": "check",
    "rename": "remap",
    "ignore": "skip",  # of --on-mismatch
}  # fmt: skip
OTHER_METHODS = {  # of ckpt merge
    **dict.fromkeys(("mean", "avg", "soup", "model_soup", "uniform"), "average"), "lerp": "linear",
}  # fmt: skip
_OTHER_COMMANDS = {  # by the group and what the user wrote
    ("ckpt optim", "convert"): "ckpt optim remap PATH -o OUT --form FORM writes another form",
    ("ckpt optim", "check"): "ckpt check PATH::optimizer",
    ("ckpt optim", "stats"): "ckpt stats PATH::optimizer",
    **{("ckpt groups", name): "ckpt groups table --model py:mynet:build SPEC" for name in ("show", "list", "ls")},
    **{
        ("ckpt", name): f"ckpt merge A B -o OUT --method {OTHER_METHODS.get(name, name)}"
        for name in ("average", "ema", "linear", *OTHER_METHODS)
    },
    ("ckpt", "slerp"): "ckpt merge A B -o OUT --method slerp --param t=0.5",
    ("ckpt", "ties"): "ckpt merge A B -o OUT --method ties --base BASE",
    **{("ckpt", name): "ckpt merge BASE TUNED -o OUT --method extract-lora" for name in ("extract", "extract-lora")},
    **{("ckpt", name): "ckpt merge BASE ADAPTER -o OUT --method lora" for name in ("lora", "fold", "merge-lora")},
    **{("ckpt", name): "ckpt convert PATH -o OUT --dtype DTYPE" for name in ("cast", "half", "dtype", "to")},
    **{("ckpt", name): "ckpt convert PATH -o OUT --max-shard-size 5GB" for name in ("shard", "split")},
    **{("ckpt", name): "ckpt remap PATH -o OUT --drop PATTERN" for name in ("drop", "delete", "remove", "rm")},
    **{("ckpt", name): "ckpt remap PATH -o OUT --keep PATTERN" for name in ("keep", "filter", "select")},
    **{("ckpt git", name): f"git {name} shows tensors after ckpt git install" for name in ("diff", "log", "show")},
    ("ckpt", "strip"): "ckpt remap PATH -o OUT --strip auto",
}  # fmt: skip
_OTHER_OPTIONS = {
    "like": "model", "model": "like", "to": "format", "out": "output", "dest": "output", "overwrite": "force",
    **dict.fromkeys(("key", "keys", "include", "only", "select", "filter", "grep", "pattern", "tensor"), "keep"),
    **dict.fromkeys(("exclude", "skip", "remove", "delete"), "drop"),
    **dict.fromkeys(("prefix", "strip-prefix", "remove-prefix"), "strip"),
    **dict.fromkeys(("fp16", "bf16", "half", "bfloat16", "float16", "precision"), "dtype"),
    **dict.fromkeys(("workers", "num-workers", "num-proc", "processes", "threads"), "jobs"),
    **dict.fromkeys(("tolerance", "tol"), "rtol"),
    **dict.fromkeys(("limit", "head"), "top"), **dict.fromkeys(("full", "long", "all-keys"), "expand"),
}  # fmt: skip
_IN_PYTHON = {"--html": ", and in Python every result has to_html()"}
_MODEL_FIRST = "the model comes first, without an option: ckpt diff py:mynet:build PATH"
_OTHER_WAYS = {  # for an option of a command that has none like it
    **{(name, "add-prefix"): "--rename '*=PREFIX.*' adds a prefix" for name in ("remap", "merge", "diff")},
    **{("diff", name): _MODEL_FIRST for name in ("model", "like")},
    **{("delta", name): "ckpt remap PATH -o OUT first, with this option" for name in RULE_OPTIONS},
    **{("merge", name): "the inputs need no option: ckpt merge A B -o OUT" for name in ("input", "inputs", "models")},
    ("check", "values"): "all values are read, unless --no-values or --fast is given",
    ("groups explain", "key"): "the parameter needs no option: ckpt groups explain SPEC NAME --model MODEL",
    ("preflight", "on-mismatch"): "tensors of another shape stay at init; --fresh PATTERN says that they are meant to",
    ("groups validate", "optimizer"): "validate_param_groups(model, optimizer, spec=SPEC) checks a live optimizer",
    **{(f"groups {name}", "lr"): "--set lr=X sets it for a --preset" for name in ("table", "validate", "emit")},
}  # fmt: skip


def hint_for_command(hint: str, options: Container[str], known: Collection[str]) -> str:
    """Return the ways out in ``hint`` that a command with these ``options`` has; ``known`` are those of all commands.

    Where the command does not take the options of rules, they are shown with ``ckpt remap``. A hint may also name
    options of other programs, which stay.
    """
    kept: list[str] = []
    pieces = ["", *_BETWEEN.split(hint)]
    for between, way in zip(pieces[::2], pieces[1::2], strict=True):
        named = [match["name"] for match in OPTION.finditer(COMMAND.sub("", way))]
        absent = [name for name in named if f"--{name}" in known and f"--{name}" not in options]
        if all(name in RULE_OPTIONS for name in absent):
            kept += [between if kept else "", _with_remap(way) if absent else way]
    return "".join(kept)


def _with_remap(way: str) -> str:
    """Return a way out with each option, which stands outside of a command, as one of ``ckpt remap``."""
    commands = [match.span() for match in COMMAND.finditer(way)]

    def replaced(match: re.Match[str]) -> str:
        is_inside = any(start <= match.start() < end for start, end in commands)
        return match[0] if is_inside else f"{_REMAP} {match[0]}"

    return OPTION.sub(replaced, way)


class NoSuchCommandError(click.UsageError):
    """The command that was named does not exist."""

    def __init__(self, name: str, names: Sequence[str], ctx: click.Context) -> None:
        """Set the message; ``name`` is what the user wrote, and ``names`` are the commands."""
        super().__init__(f"No such command {quoted(name)}.", ctx)
        self.name = name
        self.names = names


def usage_trouble(error: click.UsageError) -> tuple[str, str]:
    """Return what is wrong with the words of a command line, and the hint: the nearest right word, or the help page."""
    reason, wrong = _CHOICE_INDENT.sub(" ", error.format_message()), ""
    right: Sequence[str] = ()
    context = error.ctx
    if isinstance(error, NoSuchCommandError):
        if error.name == "help":
            return reason, "see ckpt --help, or ckpt COMMAND --help"
        command = f"{context.command_path if context else 'ckpt'} show"
        if "show" in error.names and _is_path(error.name):
            return reason, f"{command} {shell_word(error.name)} shows what is in it; see {command} --help"
        if other_way := _OTHER_COMMANDS.get((context.command_path if context else "ckpt", error.name)):
            return reason, other_way
        wrong, right = error.name, error.names
        if context and context.parent and not _nearest(wrong, right):
            return reason, f"{context.command_path} has {', '.join(right)}; see {context.command_path} --help"
    elif isinstance(error, click.NoSuchOption):
        command = context.command_path if context else "ckpt"
        return (
            f"No such option {quoted(error.option_name)}.",
            f"{_for_option(error.option_name, context)}see {command} --help",
        )
    elif isinstance(error, click.MissingParameter) and context and (example := _example(context, error.param)):
        return reason, f"for example {example}; see {context.command_path} --help"
    elif context and (extra := _EXTRA.match(reason)) and (way := _for_extra(extra["words"].split(), context)):
        return reason, f"{way}; see {context.command_path} --help"
    elif found := _NOT_ONE_OF.search(reason):
        wrong, right = found["value"], _QUOTED.findall(found["choices"])
    near = _nearest(wrong, right)
    start = f"did you mean {near}? " if near else ""
    return reason, f"{start}see {context.command_path if context else 'ckpt'} --help"


def _for_option(option: str, context: click.Context | None) -> str:
    """Return what to write for an option that the command does not have, with what follows it, or an empty string."""
    if context is None:
        return ""
    wrong = option.lstrip("-")
    elsewhere = list(_commands_with(option, context.find_root()))
    if isinstance(context.command, click.Group) and elsewhere:
        return f"options stand after the command: {context.command_path} COMMAND PATH {option}; "
    name = context.command_path.partition(" ")[2]
    if way := _OTHER_WAYS.get((name, wrong)) or (_of_methods(wrong) if name == "merge" else ""):
        return f"{way}; "
    arguments = {name: param for param in context.command.params for name in param.opts if name[:1] != "-"}
    if wrong in arguments:
        return _without_option(arguments[wrong], context)
    right = [name.removeprefix("--") for param in context.command.params for name in param.opts]
    other = _OTHER_OPTIONS.get(wrong)
    if elsewhere and other not in right:
        names = " and ".join(elsewhere) if len(elsewhere) < 3 else listed(elsewhere, 3, show=str)
        return f"{names} {'has' if len(elsewhere) == 1 else 'have'} it{_IN_PYTHON.get(option, '')}; "
    near = other if other in right else _nearest(wrong, right)
    if near in arguments:
        return _without_option(arguments[near], context)
    return f"did you mean --{near}? " if near else ""


def _without_option(argument: click.Parameter, context: click.Context) -> str:
    """Return that an argument needs no option, and the words of the command among which it stands."""
    words = [context.command_path]
    for param in context.command.params:
        if isinstance(param, click.Argument):
            words += param.get_usage_pieces(context)
        elif "-o" in param.opts or param.required:
            option = f"{param.opts[0]} {param.metavar or 'OUT'}"
            words.append(option if param.required else f"[{option}]")
    return f"{argument.human_readable_name.strip('[].')} is given without an option: {' '.join(words)}; "


def _for_extra(words: Sequence[str], context: click.Context) -> str:
    """Return where the words that a command line has too many belong, or an empty string."""
    command, path = context.command, context.command_path
    given = [param for param in command.params if context.params.get(param.name or "") and _repeats(param)]
    values = [context.params[param.name or ""][-1] for param in given]
    if len(given) == 1 and isinstance(values[0], str) and not any(map(_is_path, words)):
        option = given[0].opts[0]
        if option != "--rename" or all("=" in word for word in (values[0], *words)):
            repeated = " ".join(f"{option} {shell_word(word)}" for word in (values[0], *words))
            return f"{option} takes one value: repeat it, as in {repeated}"
    options = [param.opts[0] for param in given or command.params]
    if "*" in " ".join(words) and "--rename" in options:
        return "a rename is one word: --rename 'OLD=NEW'"
    if "*" in " ".join(words) and given:
        return f"{' and '.join(options)} take one value: repeat the option for each"
    if _takes_one_path(command):
        return f"{path} takes one PATH: run it for each; ckpt diff compares two checkpoints"
    if command.name == "diff":
        return f"{path} compares two: compare each pair with a command of its own"
    if command.name == "apply":
        return f"{path} takes one PATCH: apply the next patch to the output of the first"
    return ""


def _repeats(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and param.multiple


def _commands_with(option: str, context: click.Context) -> Iterator[str]:
    """Yield each command with this option, first ``ckpt remap``, whose rules are those of most other commands."""
    group = context.command
    names = group.list_commands(context) if isinstance(group, click.Group) else []
    for name in sorted(names, key=lambda name: name != "remap"):
        command = group.get_command(context, name) if isinstance(group, click.Group) else None
        inner = click.Context(command, context, name) if command is not None else None
        if isinstance(command, click.Group) and inner is not None:
            yield from _commands_with(option, inner)
        elif command is not None and inner is not None and any(option in one.opts for one in command.params):
            yield inner.command_path


def _of_methods(wrong: str) -> str:
    """Return how ``ckpt merge`` takes the name of a method or of its parameter, or an empty string."""
    from ckptkit.plans.methods.table import METHODS

    method = OTHER_METHODS.get(wrong, wrong)
    if method in METHODS:
        return f"--method {method}"
    return f"--param {wrong}=VALUE" if any(wrong in method.parameters() for method in METHODS.values()) else ""


def _is_path(word: str) -> bool:
    """Return whether a word where a command is expected is the path of a checkpoint."""
    from ckptkit.core.files.live_prefix import LIVE_PREFIX
    from ckptkit.core.files.places import is_url

    return word.startswith(LIVE_PREFIX) or is_url(word) or os.path.exists(word.partition("::")[0])


def _example(context: click.Context, param: click.Parameter | None) -> str | None:
    """Return the first example of the help page, or the first that has the missing option."""
    lines = [line.strip() for line in (context.command.help or "").splitlines()]
    examples = [line for line in lines if line.startswith(f"{context.command_path} ") and not line.endswith("\\")]
    words = param.opts if isinstance(param, click.Option) else []
    return next((line for line in examples if not words or set(words) & set(line.split())), None)


def _takes_one_path(command: click.Command) -> bool:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    return len(arguments) == 1 and arguments[0].nargs == 1


def _nearest(wrong: str, right: Sequence[str]) -> str | None:
    """Return the right word that a wrong one stands for, or None: a wrong suggestion is worse than none."""
    if _OTHER_NAMES.get(wrong) in right:
        return _OTHER_NAMES[wrong]
    whole = [one for one in right if wrong and wrong in one.split("-")]
    near = whole[0] if len(whole) == 1 else nearest(wrong, right, _ALIKE)
    close = near or nearest(wrong, right, _ALIKE_AT_START)
    return close if close and (wrong.startswith(close) or close.startswith(wrong)) else near
