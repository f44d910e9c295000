"""Read the JSON of checkpoints strictly; parse the TOML, JSON or YAML that users write; write values as TOML."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any, NoReturn

from ckptkit.core.files.places import clean_path, join, kind_at, near_path, open_source
from ckptkit.core.files.source import Folder
from ckptkit.core.text import human_bytes, kind_of, quoted, shell_word
from ckptkit.errors import CkptkitError, FormatError, PathError, RuleError
from ckptkit.lazy_patterns import lazy_pattern

__all__ = [
    "MOST_NAMES",
    "TEXT_FORMATS",
    "check_size",
    "default_error_path",
    "format_of",
    "json_bytes",
    "json_value",
    "parse_json",
    "parse_table",
    "read_json",
    "read_settings",
    "read_table_file",
    "read_text_file",
    "toml_key",
    "toml_value",
]

TEXT_FORMATS = ("toml", "json", "yaml")
_KINDS = {list: "array", str: "string", bool: "boolean", type(None): "null"}
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LARGEST_JSON = 6 << 20
MOST_NAMES = 4_000_000  # of a text file of names
# The limits are what a few hundred megabytes and two seconds can hold: a plan of 140,000 tensors has 90 MB of JSON.
_MOST_BYTES = {"toml": 1_000_000, "yaml": 250_000, "json": 100_000_000, "text": 16_000_000, "digests": 64_000_000}
_MOST_WRITTEN_VALUES = 300_000  # of TOML and YAML
_MAX_DEPTH = 100
_MOST_BITS = 1023  # of an integer that a float can hold
_TOML_TOKEN = lazy_pattern(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+"{3,5}|\'\'\'(?:[^\']|\'(?!\'\'))*+\'{3,5}|#[^\n]*+|(?P<space>[ \t]++)|(?P<dot>\.)'''
    r"""|(?P<part>[A-Za-z0-9_-]++|"(?:[^"\\\n]|\\.)*+"|\'[^\'\n]*+\')|.""",
    re.DOTALL,
)
_BRACKETS = lazy_pattern(r"[][{}]")
_DECLARED_TWICE = lazy_pattern(r"Cannot declare \('([\w-]+)',\) twice")  # as tomllib says it
_ALWAYS_PARSED = 1 << 20
_MEMORY = {b"[": 72, b"{": 64, b":": 60, b",": 16, b'"': 20}  # bytes in Python, for each such sign
_MOST_MEMORY = 200_000_000
_MOST_WRITTEN_MEMORY = 300_000_000  # a plan of 140,000 tensors takes 174 MB: Python keeps repeated names once
_BARE_KEY = lazy_pattern(r"[A-Za-z0-9_-]+")


@contextlib.contextmanager
def default_error_path(path: str | None) -> Iterator[None]:
    """Set the path of every error that names no file to ``path``."""
    try:
        yield
    except CkptkitError as error:
        if error.path is None:
            error.path = path
        raise


def read_table_file(path: str, text: str | None = None, *, as_json: bool = False) -> dict[str, Any]:
    """Return the table in a TOML, JSON or YAML file; the suffix chooses the format, unless ``as_json``.

    ``text`` is the content of the file if the caller has read it. Raises ``PathError`` if the file cannot be read, and
    ``RuleError`` if the content is not valid.
    """
    path = clean_path(path)
    text_format = "json" if as_json else format_of(path)
    text = read_text_file(path, text_format) if text is None else text
    with default_error_path(path):
        return parse_table(text, text_format)


def read_settings(given: object, name: str) -> Mapping[str, object]:
    """Return the settings of a model or an adapter, which a library writes into the JSON file ``name``.

    ``given`` is the path of the file or of its directory, its content, or an object with ``to_dict()``, such as the
    configurations of transformers and peft. Raises ``PathError`` if the file cannot be read. Raises ``RuleError`` if it
    is not valid, and if ``given`` is anything else.
    """
    if isinstance(given, str | os.PathLike):
        path = clean_path(os.fsdecode(given))
        return read_table_file(join(path, name) if kind_at(path) == "folder" else path, as_json=True)
    table = given.to_dict() if hasattr(given, "to_dict") and not isinstance(given, type) else given
    if not isinstance(table, Mapping):
        raise RuleError(
            f"the configuration is {kind_of(given)}",
            hint=f"give {name}, its directory, its content, or an object with to_dict()",
        )
    return table


def format_of(path: str) -> str:
    """Return ``"json"``, ``"yaml"`` or ``"toml"`` by the suffix of a path; any other suffix means TOML."""
    return "json" if path.endswith(".json") else "yaml" if path.endswith((".yaml", ".yml", ".bsh")) else "toml"


def parse_table(text: str, text_format: str) -> dict[str, Any]:
    """Return the table in ``text``, which has one of ``TEXT_FORMATS``.

    YAML is read as version 1.2: ``1e-5`` is a number, ``no`` is a word, and tags create no objects. A duplicate key is
    refused in YAML and in TOML. Raises ``RuleError`` if the text is not valid, too large or nested too deeply, or does
    not hold a table.
    """
    import tomllib

    check_size(len(text), text_format)
    readers: dict[str, Callable[[str], object]] = {"toml": tomllib.loads, "json": json_value, "yaml": _parse_yaml}
    name = text_format.upper()
    if text_format == "toml" and _toml_key_depth(text) > _MAX_DEPTH:
        raise RuleError(f"not valid {name}: a key has more than {_MAX_DEPTH} parts")
    try:
        content = readers[text_format](text)
    except RecursionError:
        raise RuleError(f"not valid {name}: nested too deeply") from None
    except ValueError as error:
        again = _DECLARED_TWICE.search(str(error)) if text_format == "toml" else None
        hint = f"write [[{again[1]}]], in double brackets, for each of several tables" if again else None
        raise RuleError(f"not valid {name}: {error}", hint=hint) from None
    if text_format != "json":
        _refuse_unusual(content, name)
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content), "number")
        raise RuleError(
            f"holds a {text_format.upper()} {kind}, not an object", hint="write the same keys as in the TOML form"
        )
    return content


def check_size(size: int, text_format: str) -> None:
    """Raise ``RuleError`` for a file that is too large for its format, which may also be ``text`` or ``digests``."""
    most = _MOST_BYTES[text_format]
    if size > most:
        kind = {"text": "text", "digests": "digest"}.get(text_format, text_format.upper())
        raise RuleError(f"has {human_bytes(size)}, more than the limit of {human_bytes(most)} for a {kind} file")


def read_text_file(path: str, text_format: str = "text") -> str:
    """Return the text of a small file; its format limits its size.

    Raises ``PathError`` if the file cannot be read, ``RuleError`` if it is too large or its bytes are not UTF-8.
    """
    path = clean_path(path)
    with default_error_path(path):
        try:
            file = open_source(path)  # refuses a FIFO, which could block forever
        except PathError as error:
            if error.hint is None and not kind_at(path) and (near := near_path(path)):
                error.hint = f"did you mean {shell_word(near)}?"
            raise
        try:
            check_size(file.size, text_format)
            content = file.read(0, file.size)
            return content.decode()
        except UnicodeDecodeError as error:
            kind = "text" if text_format in ("text", "digests") else text_format.upper()
            hint = f"a {kind} file is read here, and this may be a checkpoint" if b"\0" in content else None
            raise RuleError(f"not UTF-8 text: {error}", hint=hint) from None
        finally:
            file.close()


def json_value(text: str) -> object:
    """Return the value of a JSON text. Raises ``ValueError`` if it is not valid, too large or nested too deeply."""
    if _memory_of_values(text.encode("utf-8", "surrogatepass")) > _MOST_WRITTEN_MEMORY:
        raise ValueError("its values would not fit into 300 MB")
    try:
        value: object = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _toml_key_depth(text: str) -> int:
    """Return the most parts of a dotted key in a TOML text, or more where it counts a value as a key."""
    deepest = depth = 0
    is_after_dot = False
    for token in _TOML_TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "part":
            depth = depth + 1 if is_after_dot else 1
            deepest = max(deepest, depth)
        if kind != "space":
            is_after_dot = kind == "dot"
    return deepest


def _refuse_unusual(content: object, name: str) -> None:
    """Raise ``RuleError`` for a value that is nested too deeply, repeated too often, or a number that is too large."""
    waiting = [(content, 0)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _MAX_DEPTH:
            raise RuleError(f"not valid {name}: nested more than {_MAX_DEPTH} levels deep")
        if count > _MOST_WRITTEN_VALUES:  # references of YAML can repeat a value without end
            raise RuleError(f"not valid {name}: more than {_MOST_WRITTEN_VALUES:,} values")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise RuleError(f"not valid {name}: an integer of {value.bit_length():,} bits")
        if isinstance(value, Mapping):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]


def _parse_yaml(text: str) -> object:
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.constructor import SafeConstructor
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise RuleError(
            "a YAML file needs ruamel.yaml, which is not installed", hint="install the extra [yaml], or write TOML"
        ) from None
    # The reader of YAML takes quadratic time for nested brackets.
    steps = (1 if bracket in "[{" else -1 for bracket in _BRACKETS.findall(text))
    if max(accumulate(steps), default=0) > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    reader = YAML(pure=True)
    reader.Constructor = SafeConstructor
    try:
        content: object = reader.load(text)
    except YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return content


def toml_key(key: str) -> str:
    """Return a key as TOML writes it."""
    return key if _BARE_KEY.fullmatch(key) else toml_value(key)


def toml_value(value: object) -> str:
    """Return a value as TOML writes it on one line; raises ``RuleError`` for a value that TOML cannot express."""
    if isinstance(value, str):
        return "".join(
            char if char.isprintable() else f"\\U{ord(char):08x}" for char in json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    kind = "null" if value is None else quoted(type(value).__name__)
    raise RuleError(f"TOML has no {kind}", hint="leave the key out, or write JSON")


def read_json(folder: Folder, name: str) -> Mapping[str, object]:
    """Return the JSON object in a file of the folder. Raises ``CkptkitError`` if the file holds no JSON object."""
    file = folder.open(name)
    try:
        if file.size > _LARGEST_JSON:
            raise FormatError(f"{human_bytes(file.size)}, more than the limit of {human_bytes(_LARGEST_JSON)}")
        return parse_json(file.read(0, file.size), "the file", finite=False)
    finally:
        file.close()


def parse_json(data: bytes, what: str, *, finite: bool = True) -> dict[str, object]:
    """Return the JSON object in ``data``; ``what`` names it in errors.

    Without ``finite``, NaN and Infinity are allowed, as Python writes them. Raises ``FormatError`` for any other text,
    for a key that is given twice, and for text whose values would take more than 200 MB.
    """
    if _memory_of_values(data) > _MOST_MEMORY:
        raise FormatError(f"{what} holds more values than any checkpoint needs: they would not fit into 200 MB")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant if finite else None,
            parse_float=_finite if finite else None,
            parse_int=_integer if b"-0" in data else None,
        )
        if _LONE_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise FormatError(f"{what} holds half of a surrogate pair, which is not text") from None
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except _JsonError as error:
        raise FormatError(f"{what} {error}") from None
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def _memory_of_values(data: bytes) -> int:
    """Return the most bytes that the values of a JSON text take in Python, or 0 for a short text."""
    return sum(cost * data.count(sign) for sign, cost in _MEMORY.items()) if len(data) > _ALWAYS_PARSED else 0


class _JsonError(Exception):
    """Python reads this JSON, but the standard does not allow it."""


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _JsonError(f"names {quoted(name)} twice")
    return table


def _no_constant(name: str) -> NoReturn:
    raise _JsonError(f"holds {name}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _JsonError(f"holds {text[:40]}, which is not a finite number")
    return value


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # the safetensors library does not read -0 as an integer


def json_bytes(document: Mapping[str, object]) -> bytes:
    """Return a document as the content of a JSON file."""
    return json.dumps(document, indent=1).encode() + b"\n"
