"""A plan as a page and as a JSON document, before and after it is executed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptkit.core.cast_losses import CastLoss, describe_infinite_codes, describe_overflow, describe_small_losses
from ckptkit.core.checkpoint.provenance import PROVENANCE, provenance_name
from ckptkit.core.files.places import name_of
from ckptkit.core.text import human_bytes, percent, plural, printable, short_number
from ckptkit.errors import COMMAND
from ckptkit.formats.safetensors_header import METADATA
from ckptkit.plans.plan import Dropped, Plan, Step
from ckptkit.render.merging.steps import merged_step, origins
from ckptkit.render.page import Block, Code, Hint, Line, Message, Page, Table, as_code, name_beside, table_rows
from ckptkit.render.summary import MOST_NAMES, names_in_short, value_cell
from ckptkit.rules.apply import MOST_NOT_KEPT, NOT_KEPT

if TYPE_CHECKING:
    from ckptkit.plans.writing.written import Written

__all__ = ["plan_document", "plan_page", "written_document", "written_page"]

_NO_PLAN = Plan(())  # of an output that was described by hand
_MOST_OF_A_FOLD = 4  # tensors that an adapter does not change, which are most of a model
_ABOUT_MERGE = "the recipe and the inputs"


def plan_document(plan: Plan) -> dict[str, object]:
    """Return the document of a dry run of ``ckpt merge``, ``remap`` or ``convert`` with ``--json``."""
    merges = list(map(merged_step, plan.steps))
    return {
        "schema": f"ckptkit.{plan.command}/1",
        "plan": [
            {
                "key": step.out.key,
                "dtype": step.out.dtype,
                "shape": list(step.out.shape),
                "sources": [{"role": source.role, "key": source.key} for source in (*step.sources, *step.equals)],
                "operation": step.operation,
                "rule": step.rule or None,
                "merge": None if merge is None else merge.document(),
            }
            for step, merge in zip(plan.steps, merges, strict=True)
        ],
        "dropped": [{"role": drop.role, "key": drop.key, "reason": drop.reason} for drop in plan.dropped],
        "kept": list(plan.kept),
        "metadata": dict(_metadata(plan)),
        "summary": {
            "tensors": len(plan.steps),
            "elements": plan.elements,
            "bytes": plan.nbytes,
            "dropped": len(plan.dropped),
            "coverage": plan.coverage,
            "from_base": list(plan.from_base),
            "by_source": dict(Counter(map(_roles, plan.steps))),
            "by_operation": dict(Counter(step.operation for step in plan.steps)),
            "by_method": dict(Counter(merge.method for merge in merges if merge is not None)),
        },
        "output": None,
    }


def written_document(written: Written) -> dict[str, object]:
    """Return the document of ``ckpt merge``, ``remap`` or ``convert`` with ``--json``: the plan, and the output."""
    output = {
        "path": written.path,
        "format": written.format,
        "tensors": written.tensors,
        "bytes": written.nbytes,
        "shared_bytes": written.shared,
        "kept_shards": written.kept_shards,
        "verified": written.verified,
        "read_back": written.read_back,
        "cast_losses": [_cast_document(loss) for loss in written.losses],
        "extracted": [
            {"key": change.key, "change": change.change, "left_out": change.left_out} for change in written.extracted
        ],
        "merged": [
            {"key": facts.key, "warning": facts.warning or None, "numbers": dict(facts.numbers)}
            for facts in written.merged
        ],
        "carried": list(written.carried),
        "adapted": [
            {"file": change.file, "statement": change.statement, "found": change.found, "written": change.written}
            for change in written.adapted
        ],
    }
    return {**plan_document(_NO_PLAN if written.plan is None else written.plan), "output": output}


def _cast_document(loss: CastLoss) -> dict[str, object]:
    return {
        "key": loss.key,
        "found": loss.found,
        "dtype": loss.dtype,
        "values": loss.values,
        "overflowed": loss.overflowed,
        "underflowed": loss.underflowed,
        "truncated": loss.truncated,
        "infinite_codes": loss.infinite_codes,
    }


def plan_page(plan: Plan, *, expand: bool = False, with_notes: bool = True) -> Page:
    """Return the page of a dry run: every tensor of the output with its source, then what is left out.

    The notes are last; the command prints them on stderr instead.
    """
    texts = {name: _ABOUT_MERGE if name == PROVENANCE else text for name, text in _metadata(plan).items()}
    metadata = [(printable(name), value_cell(text)) for name, text in texts.items() if name != "format"]
    about = [*_kept(plan), *_unread(plan), f"{_summary(plan)}; nothing was written", *_coverage(plan, expand=expand)]
    table = [Table(("metadata", "value"), tuple(metadata))] if metadata else []
    lines = [*(Line((sentence,)) for sentence in about), *(map(_note, plan.notes) if with_notes else ())]
    return [*_tables(plan, expand=expand), *table, *lines]


def _metadata(plan: Plan) -> Mapping[str, str]:
    """Return the metadata that the output will have: a format that cannot hold it is known by what is left out."""
    is_lost = any(drop.is_entry and drop.key == METADATA and drop.role == "output" for drop in plan.dropped)
    return {} if is_lost else plan.metadata


def _tables(plan: Plan, *, expand: bool) -> list[Block]:
    rows = [(step.out.key, (str(step.out), _origin(step), step.operation, step.rule)) for step in plan.steps]
    headers = ("key", "tensor", "from", "operation", "rule")
    last = "from" if len({origin for _, (_, origin, *_) in rows}) <= 1 else "tensor"
    tensors = Table(headers, tuple(table_rows(rows, expand=expand)), gives_way=("rule", "operation", last))
    return [tensors, *([_left_out(plan, plan.dropped, expand=expand)] if plan.dropped else [])]


def written_page(written: Written, *, tensors: bool = False, expand: bool = False) -> Page:
    """Return what was written, from which sources, and what was left out.

    With ``tensors``, every tensor has a row, as on the page of the plan.
    """
    plan = _NO_PLAN if written.plan is None else written.plan
    if tensors:
        about = [*_kept(plan), *_extracted(written), *_merged(written), *_losses(written), *_verified(written)]
        lines = [*(Line((sentence,)) for sentence in about), Line(_written(plan, written))]
        lines += [Line((sentence,)) for sentence in _coverage(plan, expand=expand)]
        return [*_tables(plan, expand=expand), *lines]
    before = [*_kept(plan), *_extracted(written), *_merged(written), *_losses(written)]
    page: list[Block] = [*map(_note, plan.notes), Line(_written(plan, written))]
    page += [Line((sentence,)) for sentence in before]
    dropped = [drop for drop in plan.dropped if not drop.is_entry]
    if dropped:
        page.append(_left_out(plan, dropped, expand=expand))
    sentences = [*_remarks(plan, written), *_coverage(plan, expand=expand)]
    return [*page, *(Line((sentence,)) for sentence in sentences)]


def _coverage(plan: Plan, *, expand: bool) -> Iterator[str]:
    """Yield how much of the base got values from a donor, and the names of what did not."""
    covered = plan.covered
    if covered is None:
        return
    tensors = len(covered.filled) + len(covered.kept)
    yield (
        f"coverage {percent(covered.share)} of {plural(covered.elements, 'element')}: "
        f"{len(covered.filled):,} of {plural(tensors, 'tensor')} of the base have values of a donor"
    )
    if covered.kept:
        most = _MOST_OF_A_FOLD if any(len(step.sources) > 1 for step in plan.steps) else MOST_NAMES
        yield f"stays as in the base: {names_in_short(covered.kept, expand=expand, most=most)}"


def _remarks(plan: Plan, written: Written) -> Iterator[str]:
    entries = list(dict.fromkeys(drop.key for drop in plan.dropped if drop.is_entry))
    if entries:  # those of another input may have the same names, and are kept
        roles = dict.fromkeys(printable(drop.role) for drop in plan.dropped if drop.is_entry) if plan.kept else ()
        of = f" of {' and '.join(roles)}" if roles else ""
        yield f"left out{of}, stored outside of the weights: {_first_names(entries, 8)}"
    if written.kept_shards:
        yield f"kept {plural(written.kept_shards, 'shard')} that an earlier run had finished"
    if written.shared:
        yield f"shares {human_bytes(written.shared)} on the disk with the input (reflink)"
    made = provenance_name(name_of(written.path)), provenance_name("")  # beside a file, and in a directory
    carried = [name for name in written.carried if name not in made]
    if carried:
        yield f"carried along: {_first_names(carried, 16)}"
    for name in written.carried:
        if name in made:
            yield f"written beside the weights: {printable(name)}"
    if written.beside:
        yield f"the directory also holds other weights: {_first_names(written.beside, 4)}"
    for path in written.left:
        yield f"{printable(path)} could not be removed: remove it by hand"
    for group in written.untied:
        yield f"written separately, but shared memory before: {', '.join(map(printable, group[:8]))}"
    yield from _verified(written)


def _note(note: str) -> Line:
    """Return the line of a note; its last part names options and commands, which Python spells otherwise."""
    before, mark, way_out = note.rpartition("; ")
    if mark and ("--" in way_out or COMMAND.search(way_out)):
        return Line((Message(f"{before}{mark}"), Hint(way_out)))
    return Line((Message(note),))


def _extracted(written: Written) -> list[str]:
    """Return the sentence about how much of the changes the factors of an extracted adapter leave out."""
    shares = {change.key: change.left_out / change.change for change in written.extracted if change.change}
    if not shares:
        return []
    most = max(shares, key=shares.__getitem__)
    whole = math.hypot(*(change.change for change in written.extracted))
    left_out = math.hypot(*(change.left_out for change in written.extracted))
    count = plural(len(shares), "weight")
    total, largest = (percent(min(share, 1.0)) for share in (left_out / whole, shares[most]))
    return [f"the factors of {count} leave out {total} of the change (norm), at most {largest}, in {printable(most)}"]


def _merged(written: Written) -> Iterator[str]:
    """Yield a sentence for each warning of merged tensors, and for each number that a method found."""
    warned: dict[str, list[str]] = {}
    found: dict[str, list[float]] = {}
    for facts in written.merged:
        if facts.warning:
            warned.setdefault(facts.warning, []).append(facts.key)
        for name, value in facts.numbers.items():
            found.setdefault(name, []).append(value)
    for warning, keys in warned.items():
        yield f"{warning} in {plural(len(keys), 'tensor')}: {_first_names(keys, 8)}"
    for name, values in found.items():
        low, high = short_number(min(values)), short_number(max(values))
        yield f"{name} of {plural(len(values), 'tensor')}: {low if low == high else f'from {low} to {high}'}"


def _verified(written: Written) -> list[str]:
    """Return the sentence about the reader that compared the output with the plan, if one was asked to."""
    same = f"each of {plural(written.tensors, 'tensor')} has the planned bytes"
    if written.read_back is not None:
        return [f"read back by ckptkit alone, because other readers cannot read it ({written.read_back}): {same}"]
    return [] if written.verified is None else [f"verified by {written.verified}: {same}"]


def _kept(plan: Plan) -> list[str]:
    return [f"copied unchanged: {_first_names(plan.kept, 8)}"] if plan.kept else []


def _unread(plan: Plan) -> list[str]:
    """Return the sentence that a plan with casts was made without reading values, so that no overflow was seen."""
    if not any(step.is_cast for step in plan.steps):
        return []
    return ["no value was read, so values that are too large for their new dtype were not looked for"]


def _losses(written: Written) -> list[str]:
    """Return sentences about the values that casts changed to inf, to 0 or to an integer, and about infinite codes."""
    overflow = [describe_overflow(written.losses)] if any(loss.overflowed for loss in written.losses) else []
    return [*overflow, *describe_small_losses(written.losses), *describe_infinite_codes(written.losses)]


def _first_names(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(map(printable, names[:most]))}{more}"


def _origin(step: Step) -> str:
    source, others = step.sources[0], len(step.sources) - 1
    if source.key == step.out.key and (not others or _roles(step) != source.role):
        return _roles(step)
    return f"{_roles(step)}: {name_beside(step.out.key, source.key)}" + (f" and {others} more" if others else "")


def _roles(step: Step) -> str:
    return " and ".join(dict.fromkeys(source.role for source in step.sources))


def _left_out(plan: Plan, dropped: Iterable[Dropped], *, expand: bool) -> Table:
    """Return the table of what is left out.

    Tensors that a method's output has without this input are counted, and so are those that many keys leave out
    because the user asked for others with ``--keep``.
    """
    dropped = list(dropped)
    is_counted = not expand and bool(origins(plan.steps))
    not_kept = [drop.key for drop in dropped if drop.reason == NOT_KEPT]
    has_many = not expand and len(not_kept) > MOST_NOT_KEPT
    listed: list[tuple[str, tuple[str, ...]]] = []
    counted: dict[tuple[str, str], list[str]] = {}
    for drop in dropped:
        if (is_counted and drop.wanted) or (has_many and drop.reason == NOT_KEPT):
            counted.setdefault((drop.role, drop.reason), []).append(drop.key)
        else:
            listed.append((drop.key, (drop.role, drop.reason)))
    rows = [
        (printable(keys[0]) if len(keys) == 1 else plural(len(keys), "tensor"), role, reason)
        for (role, reason), keys in counted.items()
    ]
    return Table(("left out", "of", "because"), (*table_rows(listed, expand=expand), *rows))


def _summary(plan: Plan) -> str:
    if made := origins(plan.steps):
        return f"{plural(len(plan.steps), 'tensor')}, {human_bytes(plan.nbytes)}: {', '.join(made)}{plan.left_out}"
    by_source = Counter(step.sources[0].role if len(step.sources) == 1 else _roles(step) for step in plan.steps)
    parts = ", ".join(f"{count:,} from {role}" for role, count in by_source.items())
    return f"{plural(len(plan.steps), 'tensor')}, {human_bytes(plan.nbytes)}: {parts}{plan.left_out}"


def _written(plan: Plan, written: Written) -> tuple[str | Code, ...]:
    size = _summary(plan) if plan.steps else f"{plural(written.tensors, 'tensor')}, {human_bytes(written.nbytes)}"
    return "wrote ", as_code(written.path), f": {written.format}, {size}"
