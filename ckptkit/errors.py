"""The errors that ckptkit raises.

Each error has a reason in one sentence, and usually a hint that says what to do instead::

    CkptkitError
    ├── ArgumentError      an argument of a Python call has a wrong type or value; also a TypeError
    ├── PathError          the path cannot be read
    ├── FormatError        the bytes are not a complete and consistent checkpoint
    │   └── ChangedError   the file changed while it was read
    ├── ModelError         a live model cannot be built, described or loaded
    │   └── LoadError      loading stopped half way, and the model is changed in part
    ├── RuleError          a pattern or a rule is wrong
    ├── PlanError          the request would lose or mix up tensors
    ├── RecipeError        a recipe of a merge, or a parameter of its method, is wrong
    ├── OutputError        the output cannot be written
    ├── GroupsError        param groups do not fit the model
    └── WorkerError        a process or machine that did a part of the work ended, or cannot be reached

Each class is a public name: ``ckptkit.PathError`` and so on. ``except ckptkit.CkptkitError`` catches all of them.
Every other exception that leaves ckptkit is a bug.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from ckptkit.lazy_patterns import lazy_pattern

__all__ = [
    "COMMAND",
    "OPTION",
    "PLAIN_WORD",
    "RULE_OPTIONS",
    "ArgumentError",
    "ChangedError",
    "CkptkitError",
    "FormatError",
    "GroupsError",
    "LoadError",
    "ModelError",
    "OutputError",
    "PathError",
    "PlanError",
    "RecipeError",
    "RuleError",
    "WorkerError",
    "hint_for_python",
    "message_for_python",
    "one_line",
]


def one_line(sentence: str) -> str:
    """Return ``sentence`` without line breaks and control characters; backslashes in it are unchanged."""
    joined = sentence.replace("\n", " ")
    # Names in the sentence are escaped already, with doubled backslashes, so backslashes are not escaped again.
    return joined if joined.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)


# What a Python call has in place of each command that hints name.
_FUNCTIONS: Final[Mapping[str, str]] = {
    "show": "open_checkpoint", "check": "run_checks", "diff": "diff", "align": "suggest_rules", "remap": "plan_remap",
    "merge": "merge", "convert": "convert", "stats": "stats", "digest": "digest",
    "delta": "make_delta", "apply": "apply_delta", "preflight": "preflight",
    "groups table": "plan_param_groups", "groups validate": "validate_param_groups",
    "groups explain": "explain_param_group", "groups lock": "lock_param_groups", "groups diff": "diff_locks",
    "optim show": "open_optimizer", "optim remap": "optimizer_state.remap",
    "optim resplit": "optimizer_state.resplit", "optim prune": "optimizer_state.prune",
    "optim diff": "optimizer_state_diff",
}  # fmt: skip
_FLAGS: Final = frozenset(
    (
        "allow-overflow",
        "allow-unused",
        "carry",
        "dequantize",
        "digests",
        "force",
        "keep-unknown",
        "only-tensors",
        "skip-unread",
        "values",
        "verify",
    )
)
_OTHER_FLAGS: Final = {"continue": "resume"}  # by their names on the command line, which Python has as statements
RULE_OPTIONS: Final = ("rename", "keep", "drop", "strip")  # what parse_rules takes
_REPEATED: Final = (*RULE_OPTIONS, "drop-metadata", "elementwise", "ignore", "reset")
_NUMBER: Final = lazy_pattern(r"\d+(?:\.\d+)?(?:e-?\d+)?|inf")
_BY_PATTERN: Final = (
    "as-layer",
    "metadata",
    "on-mismatch",
    "on-missing",
    "on-unexpected",
)  # a mapping of patterns in Python
_OF_OTHER_PROGRAMS: Final = frozenset(("dist-ckpt-format", "repo-type", "revision"))
_METHODS: Final = {"method='lora'": "merge_lora", "method='extract-lora'": "extract_lora"}
_PLANS: Final = {  # what a dry run makes
    "merge": "plan_merge", "merge_lora": "plan_lora", "extract_lora": "plan_extract_lora"
}  # fmt: skip
_OPTIMIZER: Final = "optimizer_state."
_NEW_GROUPS: Final = {"as": "groups={}", "groups": "groups=plan_param_groups(model, {})"}
_QUOTED: Final = r"""\$?'(?:[^'\\]|\\.)*'|"[^"]*\""""
_WORDED: Final = (  # their values are plain words
    "adapter", "elementwise", "format", "hyper", "method", "on-mismatch", "on-missing", "on-unexpected",
    "reflink", "rules",
)  # fmt: skip
_AFTER: Final = "|".join(f"(?<=--{name} )" for name in _WORDED)
_VALUE: Final = (
    rf"{_QUOTED}|[A-Z][\w=]*|(?:{_AFTER})\w+(?:[:-]\w+)*|(?<=--strip )auto\b|(?<=--set )\w+=\w+"
    r"|(?<=--min-coverage )[\d.]*\d|(?:(?<=--max-rel-l2 )|(?<=--[ar]tol ))(?:inf|[\d.e+-]*\d)|(?<=--max-shard-size )\w+"
)
_OPTION: Final = rf"(?<![\w-])--(?P<name>[a-z][a-z0-9-]+)(?:[ =](?P<value>{_VALUE}))?"
OPTION: Final = lazy_pattern(_OPTION)
# A word that no sentence has, such as a path or py:mynet:build, without the punctuation of the sentence after it.
PLAIN_WORD: Final = r"(?=[\w@%+=:.-]*(?:/|[:@%+=.]\w))[\w@%+=:./-]*[\w/@%+=-](?![\w@%+=/-])"
COMMAND: Final = lazy_pattern(
    rf"\bckpt (?P<name>{'|'.join(sorted(_FUNCTIONS, key=len, reverse=True))})\b"
    rf"(?P<words>(?: (?:(?:-o )?(?:{_QUOTED}|{PLAIN_WORD}|[A-Z][A-Z0-9]*\b)|--[a-z0-9-]+(?: (?:{_VALUE}))?))*)",
    re.ASCII,
)
_QUOTED_OR_OPTION: Final = lazy_pattern(rf"(?<!\w)(?:{_QUOTED})|{_OPTION}")
_RULE_OPTION: Final = rf"--(?:{'|'.join(RULE_OPTIONS)}) (?:{_QUOTED})"
_RULE_OPTIONS_IN_ROW: Final = lazy_pattern(rf"{_RULE_OPTION}(?: (?:{_RULE_OPTION}|--allow-unused\b))+")
_IGNORES_IN_ROW: Final = lazy_pattern(rf"--ignore (?:{_QUOTED})(?: --ignore (?:{_QUOTED}))+")
_WORD: Final = lazy_pattern(rf"-o (?P<out>\S+)|{_OPTION}|(?P<word>{_QUOTED}|\S+)")


def hint_for_python(hint: str) -> str:
    """Return a hint that names commands and options of ``ckpt`` with the functions and arguments of Python.

    Example:
        >>> from ckptkit.errors import hint_for_python
        >>> hint_for_python("--force replaces it; ckpt remap FILE -o OUT --drop 'fc.*' leaves it out")
        "force=True replaces it; plan_remap(file, parse_rules(drop=['fc.*'])) leaves it out"
    """
    joined = _RULE_OPTIONS_IN_ROW.sub(_one_call, COMMAND.sub(_call, hint))
    joined = _IGNORES_IN_ROW.sub(lambda row: ", ".join(_rule_lists(OPTION.finditer(row[0]))), joined)
    return _QUOTED_OR_OPTION.sub(_argument_outside_quotes, joined)


def message_for_python(message: str) -> str:
    """Return a message that names options of ``ckpt`` with the arguments of Python; text in quotes stays as it is.

    Example:
        >>> from ckptkit.errors import message_for_python
        >>> message_for_python("--fresh 'fc.*' matches none of 3 keys of 'a --force b'")
        "fresh='fc.*' matches none of 3 keys of 'a --force b'"
    """
    return _QUOTED_OR_OPTION.sub(_named_argument, message) if "--" in message else message


def _one_call(match: re.Match[str]) -> str:
    """Return one call for several options of rules in a row."""
    return f"rules={_parse_rules(_rule_lists(OPTION.finditer(match[0])))}"


def _rule_lists(options: Iterable[re.Match[str]]) -> list[str]:
    """Return the arguments of the options of rules, such as ``drop=['a', 'b']``."""
    rules: dict[str, list[str]] = {}
    for option in options:
        values = rules.setdefault(option["name"].replace("-", "_"), [])
        values += [_python_word(option["value"])] if option["value"] else []
    return [f"{name}=[{', '.join(values)}]" if values else f"{name}=True" for name, values in rules.items()]


def _parse_rules(lists: Iterable[str]) -> str:
    return f"parse_rules({', '.join(lists)})"


def _argument_outside_quotes(match: re.Match[str]) -> str:
    return match[0] if match["name"] is None else _argument(match)


def _named_argument(match: re.Match[str]) -> str:
    """Return the name of the argument that does what an option does, with its value; quoted text as it is."""
    name, value = match["name"], match["value"]
    if name is None or name in _OF_OTHER_PROGRAMS:
        return match[0]
    if value is None or name not in RULE_OPTIONS:
        return name if name in RULE_OPTIONS else _argument(match)
    return f"{name}={_python_word(value)}"


def _call(match: re.Match[str]) -> str:
    """Return the call of the function that does what a command does, or its name if no argument follows."""
    name = _FUNCTIONS[match["name"]]
    if not match["words"]:
        return name
    inputs: list[str] = []
    rules: list[re.Match[str]] = []
    others, out, is_plan = [], "", False
    for word in _WORD.finditer(match["words"]):
        if word["out"]:
            out = _python_word(word["out"])
        elif word["word"]:
            inputs.append(_python_word(word["word"]))
        elif word["name"] == "model" and word["value"]:
            inputs.insert(0, _python_word(word["value"]))
        elif word["name"] in RULE_OPTIONS and word["value"]:
            rules.append(word)
        elif word["name"] == "dry-run" or (word["name"] == "carry" and name == "plan_remap"):
            is_plan = True
        elif name.startswith(_OPTIMIZER) and word["name"] in _NEW_GROUPS and word["value"]:
            others.append(_NEW_GROUPS[word["name"]].format(_python_word(word["value"])))
        else:
            others.append(_argument(word))
    for argument in [argument for argument in others if argument in _METHODS]:
        name = _METHODS[argument]
        others.remove(argument)
    if is_plan:
        name, out = _PLANS.get(name, name), ""
        others += ["rank=8"] if name == "plan_extract_lora" else []
    if name == "merge":
        inputs = [inputs[0], f"[{', '.join(inputs[1:])}]"] if len(inputs) > 2 else inputs
    if name in ("merge", "convert", "make_delta", "apply_delta", *_METHODS.values()) and out:
        inputs.append(out)
    lists = _rule_lists(rules)
    is_state = name.startswith(_OPTIMIZER)
    if lists:
        others = [*lists, *others] if name == f"{_OPTIMIZER}prune" else [_parse_rules(lists), *others]
    if is_state or not inputs:
        inputs = ["state" if is_state else "..."]
    return f"{name}({', '.join((*inputs, *others))})"


def _argument(match: re.Match[str]) -> str:
    """Return the argument that does what an option does."""
    name, value = match["name"], match["value"]
    if name in _OF_OTHER_PROGRAMS:
        return match[0]
    if name in RULE_OPTIONS:
        if value is None:
            return "rules" if name == "rename" else f"parse_rules({name}=...)"
        is_list = name == "rename"
        return f"rules=[{_python_word(value)}]" if is_list else f"rules=parse_rules({name}=[{_python_word(value)}])"
    argument = name.replace("-", "_")
    if name == "set" and value is not None:
        variable, _, text = value.partition("=")
        return f"settings={{{variable!r}: {text.lower()}}}"
    if name in _BY_PATTERN and value is not None and "=" in value:
        pattern, _, action = value.strip("'").rpartition("=")
        return f"{argument}={{{pattern!r}: {action!r}}}"
    if name == "allow-unused":
        return "parse_rules(..., allow_unused=True)"
    if value is not None:
        word = _python_word(value)
        return f"{argument}=[{word}]" if name in _REPEATED else f"{argument}={word}"
    if name in _OTHER_FLAGS:
        return f"{_OTHER_FLAGS[name]}=True"
    return f"{argument}=True" if name in _FLAGS else argument


def _python_word(word: str) -> str:
    """Return a word of a command as Python writes it: a placeholder is a variable, everything else a string."""
    if word[:1] == "'" and "\\" in word:
        return f"r{word}"  # a shell takes a backslash in single quotes as it is
    if word[:1] in "'\"" or word.startswith("$'"):
        return word.removeprefix("$")
    return word.lower() if re.fullmatch(r"[A-Z][A-Z_]+", word) else word if _NUMBER.fullmatch(word) else repr(word)


class CkptkitError(Exception):
    """Raised, as one of its subclasses, whenever ckptkit refuses a request.

    ``reason`` is one sentence that says why ckptkit refused, ``hint`` says what to do instead, and ``path`` is the
    file, or None. The text of the error is all three on one line. ``reason`` and ``hint`` name the options of the
    command line, and the text of the error the arguments and functions of Python. ``call`` is the hint for Python
    where it needs other words. ``--rename``, ``--keep``, ``--drop`` and ``--strip`` are arguments of ``parse_rules``.

    Example:
        >>> try:
        ...     ckptkit.open_checkpoint("missing.pth")
        ... except ckptkit.CkptkitError as error:
        ...     print(type(error).__name__, "-", error.path, "-", error.reason)
        PathError - missing.pth - no such file or directory
    """

    def __init__(
        self, reason: str, *, hint: str | None = None, path: str | None = None, call: str | None = None
    ) -> None:
        """Set the attributes ``reason``, ``hint``, ``path`` and ``call``."""
        super().__init__(reason)
        self.reason = reason
        self.hint = hint
        self.call = call
        self.path = path

    def __str__(self) -> str:
        """Return path, reason and hint on one line."""
        where = f"{self.path}: " if self.path else ""
        call = self.call or hint_for_python(self.hint or "")
        hint = f" ({call})" if call else ""
        return one_line(f"{where}{message_for_python(self.reason)}{hint}")


class ArgumentError(CkptkitError, TypeError):
    """Raised where an argument of a Python call has a wrong type, or a value that it cannot take.

    The reason names the argument and what it got, the hint what it takes. What a checkpoint, a rule or a spec holds is
    judged by ``ModelError``, ``RuleError`` and ``GroupsError``.

    Example:
        >>> ckptkit.preset_rules(7)
        Traceback (most recent call last):
        ckptkit.errors.ArgumentError: name is 7 (name must be a str)
    """


class PathError(CkptkitError):
    """Raised where a path does not exist, cannot be read, or is not a file or directory of the expected kind.

    Example:
        >>> ckptkit.open_checkpoint("missing.pth")
        Traceback (most recent call last):
        ckptkit.errors.PathError: missing.pth: no such file or directory...
    """


class FormatError(CkptkitError):
    """Raised where the bytes are not a checkpoint, or the checkpoint is incomplete or contradicts itself.

    Example:
        >>> ckptkit.open_checkpoint("fixtures/groups.toml")
        Traceback (most recent call last):
        ckptkit.errors.FormatError: fixtures/groups.toml: ...
    """


class ChangedError(FormatError):
    """Raised where a file changed between opening it and reading a tensor of it.

    Example:
        >>> import pathlib
        >>> file = pathlib.Path("changing.pth")
        >>> _ = file.write_bytes(pathlib.Path("fixtures/lenet_10class.pth").read_bytes())
        >>> with ckptkit.open_checkpoint(file) as checkpoint:
        ...     _ = file.write_bytes(b"another file")
        ...     checkpoint.read("conv1.weight")
        Traceback (most recent call last):
        ckptkit.errors.ChangedError: changing.pth: ...
    """


class ModelError(CkptkitError):
    """Raised where a live model, or a mapping of tensors, cannot be built, described, loaded or read.

    Example:
        >>> ckptkit.stats(torch.nn.Linear(2, 2, device="meta"))
        Traceback (most recent call last):
        ckptkit.errors.ModelError: 'weight' has no values: it is a meta tensor
    """


class LoadError(ModelError):
    """Raised where loading a model failed half way, so that a part of the model has new values.

    The reason names the tensors that were replaced before the failure.

    Example:
        >>> issubclass(ckptkit.LoadError, ckptkit.ModelError)
        True
    """

    def __init__(
        self,
        reason: str,
        *,
        hint: str | None = None,
        path: str | None = None,
        replaced: tuple[str, ...] = (),
        partly: tuple[str, ...] = (),
    ) -> None:
        """Set the attributes; ``replaced`` and ``partly`` are keys of the model's state_dict."""
        super().__init__(reason, hint=hint, path=path)
        self.replaced = replaced
        self.partly = partly


class RuleError(CkptkitError):
    """Raised where a pattern or a rule is not valid, matches nothing, or gives two keys the same name.

    Example:
        >>> ckptkit.parse_rules(rename=["conv1.*"])
        Traceback (most recent call last):
        ckptkit.errors.RuleError: ...
    """


class PlanError(CkptkitError):
    """Raised where a request would lose or mix up tensors or state; nothing was changed or written.

    Example:
        >>> ckptkit.load_into(torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2)})
        Traceback (most recent call last):
        ckptkit.errors.PlanError: 'weight' is [2, 2] in the model and [3, 2] in the checkpoint ...
    """


class RecipeError(CkptkitError):
    """Raised where a recipe of a merge is not valid, or does not fit its inputs; the reason begins with its line.

    Example:
        >>> ckptkit.plan_recipe({"method": "liner", "input": [{"path": "a.pt"}, {"path": "b.pt"}]})
        Traceback (most recent call last):
        ckptkit.errors.RecipeError: there is no method 'liner' (did you mean 'linear'?)
    """


class OutputError(CkptkitError):
    """Raised where the output cannot be written to its path, or only by overwriting something.

    Example:
        >>> ckptkit.choose_output("weights.gguf")
        Traceback (most recent call last):
        ckptkit.errors.OutputError: weights.gguf: the suffix does not name a format to write ...
    """


class GroupsError(CkptkitError):
    """Raised where a spec of param groups does not fit the model, or the groups of an optimizer have faults.

    Example:
        >>> ckptkit.build_param_groups(torch.nn.Linear(2, 2), {"group": [{"name": "head", "match": "fc.*"}]})
        Traceback (most recent call last):
        ckptkit.errors.GroupsError: ...
    """


class WorkerError(CkptkitError):
    """Raised where a worker of an executor ended before its task was done, as the system does when memory is short.

    Also raised where no Ray cluster answers at an address, and where a node has another version of ckptkit.

    Example:
        >>> issubclass(ckptkit.WorkerError, ckptkit.CkptkitError)
        True
    """
