"""Read which quantisation the configuration files of a model name, and which modules it leaves plain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_json
from ckptkit.core.dtypes import dtype_code
from ckptkit.core.files.places import folder_at, parent_of
from ckptkit.errors import CkptkitError
from ckptkit.lazy_patterns import lazy_pattern

if TYPE_CHECKING:
    from ckptkit.core.patterns import Pattern

__all__ = ["CONFIGURATION_FILES", "Configuration", "configuration_of", "configured_dtype", "read_configuration"]

CONFIGURATION_FILES = ("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
_SECTIONS = ("quantization_config", "compression_config", "quantization")
_NESTED = ("text_config", "llm_config", "language_config", "vision_config")
_IGNORE_LISTS = ("ignore", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules", "exclude")
# The method of a section that does not name its method, by a key that only this method has.
_METHOD_BY_KEY = {
    "config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes",
    "quant_algo": "modelopt", "w_bit": "awq", "damp_percent": "gptq", "desc_act": "gptq",
}  # fmt: skip
_DEFAULT_METHODS = {"quantization": "mlx", "compression_config": "compressed-tensors"}
_PLAIN_REGEX = lazy_pattern(r"re:(?:[\w^$-]|\.\*|\\\.)*")  # a regular expression that stars can replace
_MOST_IGNORED, _MOST_PATTERNS = 10_000, 64
_DEEPEST = 16  # no model nests deeper


@dataclass(frozen=True, slots=True)
class Configuration:
    """The quantisation methods that configuration files name, and the modules that stay plain.

    ``is_unclear`` is true if some modules are excluded by a regular expression, which is never evaluated. ``sections``
    are the sections of the files themselves.
    """

    methods: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    patterns: tuple[Pattern, ...] = ()
    is_unclear: bool = False
    sections: tuple[Mapping[str, object], ...] = field(default=(), compare=False)

    def leaves_plain(self, key: str) -> bool:
        """Return whether the weight may be in a module that is not quantised."""
        if self.is_unclear:
            return True
        segments = key.split(".", _DEEPEST)
        outer = [".".join(segments[:stop]) for stop in range(1, len(segments) + 1)]
        if any(pattern.match(module) for pattern in self.patterns for module in outer):
            return True
        # A configuration can name a module without the modules around it.
        count = len(segments) if self.modules else 0
        runs = (segments[start:stop] for start in range(count) for stop in range(start + 1, count + 1))
        return any(".".join(run) in self.modules for run in runs)


def read_configuration(checkpoint: Checkpoint, *, has_codes: bool = True) -> Configuration:
    """Return what the configuration files in the directory say; a file that cannot be read is left out.

    A server that does not list its files gets a request for each. Without codes it is only asked for ``config.json``.
    """
    methods: set[str] = set()
    ignored: list[str] = []
    sections: list[Mapping[str, object]] = []
    folder = folder_at(parent_of(checkpoint.files[0])) if checkpoint.files else None
    names = []
    if folder is not None:
        names = [name for name in CONFIGURATION_FILES if has_codes or name == "config.json" or folder.knows(name)]
        folder.will_open(names)
    for name in names:
        if folder is not None and folder.has_file(name):
            try:
                content = read_json(folder, name)
            except CkptkitError:
                continue
            for title, section in _sections(name, content):
                methods.add(_method(title, section))
                sections.append(section)
                ignored += _ignored(section)
    return replace(_configuration(frozenset(methods) - {""}, ignored[:_MOST_IGNORED]), sections=tuple(sections))


def configuration_of(section: Mapping[str, object]) -> Configuration:
    """Return what one section about quantisation says."""
    return _configuration(frozenset({_method("", section)}), _ignored(section)[:_MOST_IGNORED])


def _ignored(section: Mapping[str, object]) -> list[str]:
    """Return the modules that a section leaves plain."""
    lists = [listed for key in _IGNORE_LISTS if isinstance(listed := section.get(key), list)]
    return [text for listed in lists for text in listed if isinstance(text, str)]


def configured_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the code of the dtype that ``config.json`` beside a checkpoint names for its weights, or None."""
    folder = folder_at(parent_of(checkpoint.files[0])) if checkpoint.files else None
    if folder is None or not folder.has_file("config.json"):
        return None
    try:
        content = read_json(folder, "config.json")
    except CkptkitError:
        return None
    for outer in (content, *(content.get(key) for key in _NESTED)):
        names = [outer.get("dtype"), outer.get("torch_dtype")] if isinstance(outer, Mapping) else []
        for name in names:
            code = dtype_code(name) if isinstance(name, str) else None
            if code in {"F16", "BF16", "F32", "F64"}:
                return code
    return None


def _sections(name: str, content: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield each section about quantisation with its title."""
    if name != "config.json":
        yield name, content
    for outer in (content, *(content.get(key) for key in _NESTED)):
        for title in _SECTIONS:
            section = outer.get(title) if isinstance(outer, Mapping) else None
            if isinstance(section, Mapping):
                yield title, section


def _method(title: str, section: Mapping[str, object]) -> str:
    method = section.get("quant_method")
    if isinstance(method, str):
        return method.lower()
    known = next((name for key, name in _METHOD_BY_KEY.items() if section.get(key) is not None), "")
    return known or _DEFAULT_METHODS.get(title, "")


def _configuration(methods: frozenset[str], ignored: list[str]) -> Configuration:
    if not ignored:  # as for most models, which then need no patterns
        return Configuration(methods)
    from ckptkit.core.patterns import parse_pattern

    modules: set[str] = set()
    patterns: list[Pattern] = []
    is_unclear = False
    for text in ignored:
        if text.startswith("re:"):
            if _PLAIN_REGEX.fullmatch(text):
                stars = text.removeprefix("re:").removeprefix("^").removesuffix("$").replace(".*", "*")
                patterns.append(parse_pattern(stars.replace(r"\.", ".") or "*"))
            else:
                is_unclear = True
        elif "*" in text and not re.search(r"[{}]", text):
            patterns.append(parse_pattern(text))
        else:
            modules.add(text.strip("."))
    is_unclear = is_unclear or len(patterns) > _MOST_PATTERNS
    return Configuration(methods, frozenset(modules), tuple(patterns), is_unclear)
