"""The differences between two state dicts as a page and as a JSON document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ckptkit.comparison import KeyPair, StateDictDiff
from ckptkit.comparison.hints import Hint as DiffHint
from ckptkit.comparison.state_dict_diff import missing_ties
from ckptkit.core.coverage import measure_coverage
from ckptkit.core.text import listed, percent, plural, printable, shell_word
from ckptkit.render.page import Hint, Line, Message, Page, Row, Table, Tone, name_beside, table_rows
from ckptkit.render.page.head import Fact, Head, Subject
from ckptkit.render.summary import (
    checkpoint_document,
    dequantized_document,
    dequantized_lines,
    describe,
    tensor_document,
)
from ckptkit.render.values import values_answer, values_facts, values_in_diff, values_page

__all__ = ["answers_first", "diff_document", "diff_head", "diff_page", "hints_below"]

# The mark at the start of each row of the page, and what it says of the key.
_MARKS = (
    ("-", "missing"), ("+", "unexpected"), ("~", "another shape"), ("≈", "another dtype"), ("=", "matched"),
)  # fmt: skip
_BY_OWN_CODE = ", by the model's own code"
_AS = "  as "
_FEW_ROWS = 10  # below an answer that explains all of them
_NEARLY_ALL = 0.9


def diff_document(result: StateDictDiff) -> dict[str, object]:
    """Return the document of ``ckpt diff --json``."""
    return {
        "schema": "ckptkit.diff/1",
        "expected": checkpoint_document(result.expected_checkpoint),
        "found": checkpoint_document(result.found_checkpoint),
        "matched": [
            {
                "key": pair.key,
                "found_key": pair.found.key,
                "dtype": pair.expected.dtype,
                "shape": list(pair.found.shape),
                "by_own_code": pair.key in result.moved,
            }
            for pair in result.matched
        ],
        "missing": [tensor_document(info) for info in result.missing],
        "unexpected": [tensor_document(info) for info in result.unexpected],
        "shape_mismatched": [_pair_document(pair) for pair in result.shape_mismatched],
        "dtype_mismatched": [_pair_document(pair) for pair in result.dtype_mismatched],
        "computed": [{"key": key, "found_keys": list(names)} for key, names in result.computed.items()],
        "reported": list(result.reported),
        "own_code": _own_code_document(result),
        "quantized": [
            {"key": key.key, "scheme": key.weight.scheme, "side": key.side, "parts": list(key.weight.parts)}
            for key in result.quantized
        ],
        "dequantized": [
            {"side": side, **dequantized_document(weight)}
            for side, weights in (("expected", result.expected_numbers), ("found", result.found_numbers))
            for weight in weights
        ],
        "values": None if result.values is None else values_in_diff(result.values, result.gates),
        "unmet": [
            {"requirement": unmet.requirement, "message": unmet.message, "keys": list(unmet.keys)}
            for unmet in result.unmet
        ],
        "hints": [{"message": hint.message, "rename": hint.rename or None} for hint in result.hints],
        "summary": {
            "matched": len(result.matched),
            "missing": len(result.missing),
            "unexpected": len(result.unexpected),
            "shape_mismatched": len(result.shape_mismatched),
            "dtype_mismatched": len(result.dtype_mismatched),
            "quantized": len(result.quantized),
            "computed": len(result.computed),
            "same_ranges": len(result.same_ranges),
            "coverage": result.coverage,
            "loads_strict": result.loads_strict,
            "loads": result.loads,
            "different": result.different,
        },
    }


def _own_code_document(result: StateDictDiff) -> dict[str, object] | None:
    """Return whether the model's own code for loading was tried; None where it has none, or is not a live model."""
    if not result.has_own_code:
        return None
    return {
        "tried": not result.undecided,
        "reason": result.undecided or None,
        "refusals": list(result.refusals),
        "not_reported": [
            *sorted(result.excused),
            *(info.key for info in result.unexpected if info.key in result.unseen),
        ],
    }


def _pair_document(pair: KeyPair) -> dict[str, object]:
    sides = {"expected": pair.expected, "found": pair.found}
    tensors = {name: {"dtype": info.dtype, "shape": list(info.shape)} for name, info in sides.items()}
    return {"key": pair.key, "found_key": pair.found.key, **tensors}


def diff_page(
    result: StateDictDiff,
    *,
    expand: bool = False,
    everything: bool = False,
    with_hints: bool = True,
    depth: int | None = None,
) -> Page:
    """Return the page of ``ckpt diff``: one row per difference, then the counts, the verdict and the hints.

    A mark begins each row: ``-`` missing, ``+`` unexpected, ``~`` another shape, ``≈`` another dtype, ``=`` matched.
    Where ``answers_first``, the rows are last, and only a few of them. Beside values, the keys that only have another
    dtype are counted; ``depth`` is that of ``values_page``.
    """
    rows = _rows(result, expand=expand, everything=everything)
    is_short = answers_first(result, expand=expand, everything=everything)
    counts = [
        f"{len(result.matched):,} matched",
        f"{len(result.missing):,} missing",
        f"{len(result.unexpected):,} unexpected",
        f"{len(result.shape_mismatched):,} shape-mismatched",
        f"{len(result.dtype_mismatched):,} dtype-mismatched",
        *([f"{len(result.computed):,} computed by the model's own code"] if result.computed else []),
        *([f"{len(result.quantized):,} quantised differently"] if result.quantized else []),
    ]
    elements = plural(measure_coverage(result.expected, frozenset()).elements, "element")
    unmet = [unmet for unmet in result.unmet if all(unmet is not gate.broken for gate in result.gates)]
    shown = _few_of(rows) if is_short else rows
    table = Table(("", "key", "expected", "found"), tuple(shown), title="Keys, dtypes and shapes", marks=_MARKS)
    more = [Line((f"and {plural(len(rows) - len(shown), 'more row')}",))] if len(shown) < len(rows) else []
    return [
        *(subject.line for subject in _sides(result)),
        *dequantized_lines(result.expected_numbers, "expected"),
        *dequantized_lines(result.found_numbers, "found"),
        *_gate_lines(result),
        *_random_lines(result),
        *(
            []
            if result.values is None
            else values_page(result.values, expand=expand or everything, depth=depth, quantized=len(result.quantized))
        ),
        *(() if is_short else [table]),
        Line((", ".join(counts),)),
        *([] if _lists_dtypes(result, is_all=expand or everything) else _dtype_lines(result)),
        Line((f"coverage {percent(result.coverage)} of {elements}",)),
        *([_unread_line(result)] if result.values is None and result.matched else []),
        *(Line(("not met: ", Message(one.message)), tone="error") for one in unmet),
        Line((_verdict(result),)),
        *(
            [Line((f"names decided: the model's own code for loading was not tried, because {result.undecided}",))]
            if result.undecided
            else []
        ),
        *(Line(("hint: ", Hint(message))) for message in (_hints(result, is_first=is_short) if with_hints else ())),
        *([table, *more] if is_short else ()),
    ]


def diff_head(result: StateDictDiff) -> Head:
    """Return the head of a report: both sides, whether values differ or else whether it loads, and the counts."""
    verdict = Line((_verdict(result),))
    answer = None if result.values is None else values_answer(result.values, len(result.quantized))
    counts: tuple[tuple[int, str, Tone], ...] = (
        (len(result.missing), "missing", "error"),
        (len(result.unexpected), "unexpected", "warning"),
        (len(result.shape_mismatched), "with another shape", "error"),
        (len(result.dtype_mismatched), "with another dtype", "warning"),
    )
    facts = [
        *([] if result.values is None else values_facts(result.values)),
        Fact(f"{len(result.matched):,}", "matched"),
        *(Fact(f"{count:,}", name, tone if count else "") for count, name, tone in counts),
        Fact(percent(result.coverage), "of the elements covered"),
    ]
    tone: Tone = "good" if result.ok else "error" if result.unmet or not result.loads else "warning"
    if answer is None:
        return Head("diff", verdict, _sides(result), tuple(facts), tone)
    text = "".join(answer.parts).removeprefix("values: ")
    return Head("diff", Line((text,)), _sides(result), tuple(facts), tone, same_as=answer)


def _sides(result: StateDictDiff) -> tuple[Subject, Subject]:
    expected, found = describe(result.expected_checkpoint, "expected"), describe(result.found_checkpoint, "found")
    return Subject("expected", Line(("expected  ", *expected))), Subject("found", Line(("found     ", *found)))


def _hints(result: StateDictDiff, *, is_first: bool) -> list[str]:
    """Return the hints, and after the first of a page that begins with them the whole command that follows it."""
    messages = [hint.message for hint in hints_below(result)]
    sides = result.expected_checkpoint.argument, result.found_checkpoint.argument
    # The command does not have the rules that the user gave: they dropped nothing, and renames exclude such hints.
    if is_first and messages and result.hints[0].rename and all(sides) and len(result.names) == len(result.found):
        command = f"ckpt diff {' '.join(sides)} --rename {shell_word(result.hints[0].rename)}"
        messages.insert(1, f"{command} compares them with this rename")
    return messages


def answers_first(result: StateDictDiff, *, expand: bool = False, everything: bool = False) -> bool:
    """Return whether the verdict and the hints stand before the first of many rows.

    They do where nothing matches, and where one rename explains nearly all that is missing.
    """
    if expand or everything or not result.missing or len(result.missing) + len(result.unexpected) <= _FEW_ROWS:
        return False
    explained = max((hint.matches for hint in result.hints), default=0) - len(result.matched)
    is_nothing = not (result.matched or result.shape_mismatched or result.computed)
    return is_nothing or explained >= _NEARLY_ALL * len(result.missing)


def hints_below(result: StateDictDiff) -> list[DiffHint]:
    """Return the hints that do not stand below a broken gate."""
    above = {gate.hint for gate in result.gates}
    return [hint for hint in result.hints if hint.message not in above]


def _few_of(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the first rows of both sides: missing keys, and all others."""
    missing = [row for row in rows if row[0] == "-"]
    others = [row for row in rows if row[0] != "-"]
    half = _FEW_ROWS // 2
    return [*missing[: max(half, _FEW_ROWS - len(others))], *others[: max(half, _FEW_ROWS - len(missing))]]


def _unread_line(result: StateDictDiff) -> Line:
    """Return that no value was compared, and what is known of the values without reading them."""
    if not result.same_ranges:
        return Line(("values were not compared: ", Hint("--values compares them")))
    count = plural(len(result.same_ranges), "tensor")
    return Line((f"values were not compared; the bytes of {count} are the same file range",))


def _lists_dtypes(result: StateDictDiff, *, is_all: bool) -> bool:
    """Return whether the page has a row for each key that only has another dtype; beside values it has a line."""
    return result.values is None or is_all


def _dtype_lines(result: StateDictDiff) -> list[Line]:
    pairs = Counter((pair.expected.dtype, pair.found.dtype) for pair in result.dtype_mismatched)
    texts = [f"{plural(count, 'tensor')} {expected} -> {found}" for (expected, found), count in pairs.most_common()]
    return [Line((f"another dtype: {', '.join(texts)}",))] if texts else []


def _random_lines(result: StateDictDiff) -> list[Line]:
    """Return a line for each live model that was built for the comparison and differs: its values may be random."""
    sides = {"expected": result.expected_checkpoint, "found": result.found_checkpoint}
    built = [name for name, side in sides.items() if side.is_built]
    if result.values is None or not result.values.different:
        return []
    return [
        Line((f"{name} is built for this comparison: values that its code does not load are random",)) for name in built
    ]


def _gate_lines(result: StateDictDiff) -> list[Line]:
    """Return a line for each gate, the broken ones first."""
    lines = []
    for gate in sorted(result.gates, key=lambda gate: gate.broken is None):
        if gate.broken is None:
            left_out = f", {gate.left_out:,} left out by the rules" if gate.left_out else ""
            holds = f"{gate.option}, {plural(gate.tensors, 'tensor')}{left_out}"
            lines.append(Line(("gate holds: ", Message(holds)), tone="good"))
            continue
        lines.append(Line(("gate broken: ", Message(gate.broken.message)), tone="error"))
        if gate.hint:
            lines.append(Line(("hint: ", Hint(gate.hint)), indented=True))
    return lines


def _rows(result: StateDictDiff, *, expand: bool, everything: bool) -> list[tuple[str, ...]]:
    rows: list[Row] = []
    if everything:
        other_dtype = {pair.key for pair in (*result.dtype_mismatched, *result.uncopyable)}
        rows += [_row("=", pair) for pair in result.matched if pair.key not in other_dtype | result.moved.keys()]
    rows += [_row("=", pair, _BY_OWN_CODE) for pair in result.matched if pair.key in result.moved]
    rows += [
        (key, ("=", str(result.expected[key]), f"made of {listed(names, 3)}{_BY_OWN_CODE}"))
        for key, names in result.computed.items()
    ]
    remarks = {name: f"  {key.remark}" for key in result.quantized for name in (key.key, *key.parts)}
    rows += [_row("≈", pair, remarks[pair.key]) for pair in _codes_for_numbers(result)]
    remarks_on_missing = {key: remark.strip() for key, remark in remarks.items()}
    remarks_on_missing |= {key: f"tied to {name_beside(key, other)}" for key, other in missing_ties(result).items()}
    remarks_on_missing |= dict.fromkeys(result.left_out, "left out by the rules")
    remarks_on_missing |= dict.fromkeys(result.excused, "load_state_dict does not report it")
    blocked = set(result.blocked)
    rows += [
        (info.key, ("-", str(info), remarks_on_missing.get(info.key, "")))
        for info in result.missing
        if info.key not in blocked
    ]
    rows += [(info.key, ("+", "", str(info))) for info in result.unexpected]
    rows += [_row("~", pair, remarks.get(pair.key, "")) for pair in result.shape_mismatched]
    uncopyable = {pair.key for pair in result.uncopyable}
    if _lists_dtypes(result, is_all=expand or everything):
        rows += [_row("≈", pair) for pair in result.dtype_mismatched if pair.key not in uncopyable]
    rows += [_row("≈", pair, "  torch cannot copy it") for pair in result.uncopyable]
    rows += [(key, ("~", str(result.expected[key]), "no tensor")) for key in result.blocked]
    rows += [(key, ("+", "", "no tensor")) for key in result.foreign]
    rows += [(key, ("~", "extra state", "on one side only")) for key in result.extra_state]
    reported = ("-", "no tensor", "") if result.undecided else ("~", "", "load_state_dict reports it")
    rows += [(key, reported) for key in result.reported]
    named = [(mark, key, *rest) for key, mark, *rest in table_rows(rows, expand=expand)]
    width = max((len(cells[-1].partition(_AS)[0]) for cells in named if _AS in cells[-1]), default=0)
    return [(*cells[:-1], _with_name_at(width, cells[-1])) for cells in named]


def _with_name_at(width: int, cell: str) -> str:
    """Return the cell with its found name behind ``width`` columns, so that such names stand below each other."""
    before, sign, name = cell.partition(_AS)
    return f"{before:<{width}}{sign}{name}" if sign else cell


def _codes_for_numbers(result: StateDictDiff) -> list[KeyPair]:
    """Return the keys where ``load_state_dict`` would copy codes as numbers, or numbers as codes."""
    parts = dict.fromkeys(name for key in result.quantized for name in key.parts)
    if not parts:
        return []
    found = {new: result.found[old] for old, new in result.names.items()}
    others = {pair.key for pair in (*result.matched, *result.shape_mismatched)}
    both = (key for key in parts if key in result.expected and key in found and key not in others)
    return [KeyPair(result.expected[key], found[key]) for key in both]


def _row(mark: str, pair: KeyPair, remark: str = "") -> Row:
    renamed = "" if pair.found.key == pair.key else f"{_AS}{name_beside(pair.key, pair.found.key)}"
    return (pair.key, (mark, str(pair.expected), f"{pair.found}{renamed}{remark}"))


def _verdict(result: StateDictDiff) -> str:
    if result.undecided:
        fits = "fits" if result.loads_strict else "fits in part" if result.loads else "does not fit"
        return f"by its names and shapes, the checkpoint {fits}; load_state_dict can decide otherwise"
    if result.refusals:
        return f"load_state_dict raises, even with strict=False: {printable(result.refusals[0])}"
    if result.loads_strict:
        codes = ", but takes codes for numbers" if _codes_for_numbers(result) else ""
        once = " once it is dequantised" if result.found_numbers else ""
        return f"load_state_dict accepts the checkpoint{once}{codes}"
    if result.loads:
        codes = ", and takes codes for numbers" if _codes_for_numbers(result) else ""
        loaded = "the matched keys" if result.matched or codes else "nothing"
        return f"load_state_dict raises with strict=True; with strict=False it silently loads {loaded}{codes}"
    return "load_state_dict raises, even with strict=False"
