"""Search the tensors of a checkpoint for the schemes of the table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.dtypes import DTYPES
from ckptkit.quantized.configuration import Configuration, read_configuration
from ckptkit.quantized.found import Found, with_expected_parts
from ckptkit.quantized.scheme_names import scheme_name
from ckptkit.quantized.table import SCHEMES, Coding, Part, Scheme

__all__ = ["find_weights"]

_MOST_INCOMPLETE, _MOST_KEPT = 1000, 10_000
_GGUF = "convert it with gguf.quants.dequantize, or load it with from_pretrained(..., gguf_file=...) of transformers"
_TORCH = "call dequantize() on the tensor, and save the state_dict"
_TORCHAO = "load it with torchao, call dequantize() on each tensor, and save the state_dict"
_ROWS: Mapping[str, Sequence[tuple[Scheme, str]]] = {
    dtype: [(scheme, ending) for scheme in SCHEMES if dtype in scheme.anchor.dtypes for ending in scheme.anchor.endings]
    for dtype in {dtype for scheme in SCHEMES for dtype in scheme.anchor.dtypes}
}
_TELLING = [
    (scheme, part, ending) for scheme in SCHEMES for part in scheme.needed if part.is_telling for ending in part.endings
]
_TELLING_ENDINGS = tuple({ending for _, _, ending in _TELLING})


def _is_telling(key: str) -> bool:
    return key.endswith(_TELLING_ENDINGS)


def _stem(key: str, ending: str) -> str | None:
    """Return the key without the ending, or None if the key does not end with whole segments of the ending."""
    if not key.endswith(ending):
        return None
    stem = key[: len(key) - len(ending)]
    return stem if not ending[:1].isalpha() or not stem or stem[-1] == "." else None


def find_weights(checkpoint: Checkpoint) -> list[Found]:
    """Return the quantised weights of a checkpoint: first all complete weights, then those that lack parts."""
    search = _Search(checkpoint)
    for info in search.infos.values():
        if info.dtype in _ROWS or info.kind != "dense":
            search.add(info)
    search.add_incomplete()
    if not search.found:
        return []
    found = with_expected_parts(search.found, search.infos, checkpoint.metadata, search.configuration)
    return [one._replace(name=_name(one, search, checkpoint.metadata.get(one.key))) for one in found]


def _name(found: Found, search: _Search, described: str | None) -> str:
    roles = {role: search.infos[key] for role, key in found.roles}
    return scheme_name(found.scheme.name, roles, described, search.configuration)


class _Search:
    """The search for quantised weights in one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.infos = dict(checkpoint.items())
        self.found: list[Found] = []
        self._names = {key.rpartition(".")[2] for key in self.infos}
        self._parts: dict[int, list[tuple[Part, tuple[str, ...], bool]]] = {}  # by row of the table
        self._rows: dict[str, list[tuple[Scheme, str]]] = {}  # by dtype
        self._first: dict[int, Found] = {}  # the first weight of each row of the table
        self._used: set[str] = set()
        self._incomplete: list[Found] = []
        self._configuration: Configuration | None = None
        self._is_torchao = any(name.startswith("torchao.") for name in checkpoint.references)

    @property
    def configuration(self) -> Configuration:
        if self._configuration is None:
            self._configuration = read_configuration(self.checkpoint)
        return self._configuration

    def add(self, anchor: TensorInfo) -> None:
        """Add the weight of this anchor, if its parts are there; keep it for later if some are missing."""
        is_subclass = anchor.kind == "subclass" and anchor.dtype in _ROWS  # the weight of a live bitsandbytes module
        if anchor.kind != "dense" and not is_subclass:
            self._add_single(anchor)
            return
        best: Found | None = None
        for scheme, ending in self._rows_of(anchor.dtype):
            stem = _stem(anchor.key, ending)
            found = None if stem is None else self._match(scheme, stem)
            if found is None:
                continue
            if found.missing:
                self._incomplete += [] if is_subclass or len(self._incomplete) > _MOST_KEPT else [found]
            elif scheme.methods & self.configuration.methods:
                best = found
                break
            else:
                best = best or found
                if not self.configuration.methods:
                    break
        if best is not None and self._used.isdisjoint(best.parts):
            self._add(best)
        elif is_subclass:
            self._add_single(anchor)

    def _rows_of(self, dtype: str) -> list[tuple[Scheme, str]]:
        """Return the rows that can fit an anchor of this dtype, because some keys have the names of all parts."""
        rows = self._rows.get(dtype)
        if rows is None:
            rows = self._rows[dtype] = [
                (scheme, ending)
                for scheme, ending in _ROWS[dtype]
                if self._names.isdisjoint(scheme.absent)
                if scheme.is_certain
                or scheme.methods & self.configuration.methods
                or all(endings for _, endings, is_needed in self._present_parts(scheme) if is_needed)
            ]
        return rows

    def _add(self, found: Found) -> None:
        self._used.update(found.parts)
        self._first.setdefault(id(found.scheme), found)
        self.found.append(found)

    def _add_single(self, info: TensorInfo) -> None:
        """Add a tensor that holds codes and scales together."""
        coding: Coding | None = None
        if info.kind == "quantized" and info.dtype in DTYPES:
            name, way_out, coding = f"torch {info.dtype}", _TORCH, _OF_TORCH if info.dtype in _AFFINE else None
        elif info.kind == "quantized":
            name, way_out, coding = f"GGUF {info.dtype}", _GGUF, _OF_GGUF
        elif info.kind == "subclass" and self._is_torchao:
            name, way_out = "torchao", _TORCHAO
        else:
            return
        scheme = Scheme(name, _WHOLE, (), way_out, coded="", weight="", coding=coding)
        self.found.append(Found(scheme, info.key, (info.key,)))

    def _match(self, scheme: Scheme, stem: str) -> Found | None:
        """Return the parts and missing parts of a stem, or None if a tensor has the name of a part and does not fit."""
        infos, coded = self.infos, self.infos.get(stem + scheme.coded)
        if scheme.is_private and not stem.rpartition(".")[2].startswith("_"):
            return None
        parts: list[str] = []
        missing: list[str] = []
        for part, endings, is_needed in self._present_parts(scheme):
            named = [infos[stem + ending] for ending in endings if stem + ending in infos]
            fitting = [info.key for info in named if _fits(part, coded, info)]
            parts += fitting
            if is_needed and not fitting:
                if named or (scheme.is_ordinary and not self.configuration.methods):
                    return None
                missing.append(stem + self._usual_ending(scheme, part))
        return Found(scheme, stem, tuple(dict.fromkeys(parts)), tuple(dict.fromkeys(missing)))

    def _present_parts(self, scheme: Scheme) -> list[tuple[Part, tuple[str, ...], bool]]:
        """Return each part of a scheme with its endings that keys of the checkpoint have, and whether it is needed."""
        known = self._parts.get(id(scheme))
        if known is None:
            needed = (scheme.anchor, *scheme.needed)
            known = [
                (part, tuple(filter(self._is_present, part.endings)), number < len(needed))
                for number, part in enumerate((*needed, *scheme.optional))
            ]
            self._parts[id(scheme)] = known
        return known

    def _is_present(self, ending: str) -> bool:
        last = ending.rpartition(".")[2]
        return last in self._names if last != ending or last[:1].isalpha() else any(map(_ends_with(last), self._names))

    def _usual_ending(self, scheme: Scheme, part: Part) -> str:
        """Return the ending that another weight of the scheme has for this part, else the first ending."""
        other = self._first.get(id(scheme))
        usual = (ending for ending in part.endings if other is not None and other.stem + ending in other.parts)
        return next(usual, part.endings[0])

    def add_incomplete(self) -> None:
        """Add the weights that lack a part, if more than the names shows that they are quantised."""
        schemes = {found.scheme.name for found in self.found}
        orphans = filter(_is_telling, self.infos)
        for number, found in enumerate((*self._incomplete, *self._of_orphans(orphans, schemes))):
            if number == _MOST_INCOMPLETE:
                break
            scheme = found.scheme
            is_seen = scheme.name in schemes and not scheme.is_ordinary
            if not (scheme.is_certain or is_seen or self._is_configured(found)) or set(found.parts) & self._used:
                continue
            again = self._match(scheme, found.stem)  # with the endings that are usual now that all weights are known
            if again is not None:
                self._add(again)

    def _is_configured(self, found: Found) -> bool:
        configuration = self.configuration
        return bool(found.scheme.methods & configuration.methods) and not configuration.leaves_plain(found.key)

    def _of_orphans(self, keys: Iterable[str], schemes: Collection[str]) -> Iterator[Found]:
        """Yield the weights of companions that have no codes."""
        rows = sorted(_TELLING, key=lambda row: row[0].name not in schemes)
        for key in keys:
            info = self.infos[key]
            for scheme, part, ending in rows if key not in self._used else ():
                stem = _stem(key, ending)
                if stem is None or info.dtype not in part.dtypes:
                    continue
                if scheme.name not in schemes and not scheme.methods & self.configuration.methods:
                    continue
                found = self._match(scheme, stem)
                if found is not None and found.missing:
                    yield found
                    break


_WHOLE = Part(("",), frozenset())
_OF_GGUF = Coding("gguf", (("codes", ("",)),))
_OF_TORCH, _AFFINE = Coding("affine", (("codes", ("",)),)), frozenset({"QI8", "QU8", "QI32"})


def _ends_with(ending: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(ending)


def _fits(part: Part, coded: TensorInfo | None, info: TensorInfo) -> bool:
    return info.dtype in part.dtypes and (coded is None or part.fits is None or part.fits(coded.shape, info.shape))
