"""Compare the keys, shapes and dtypes of two checkpoints; a copy of a live model decides about its own code."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckptkit.comparison.own_code import modules_with_own_code
from ckptkit.comparison.own_code.by_model import Answer, Place, ask_model, is_inside
from ckptkit.comparison.quantized import find_quantized_keys
from ckptkit.comparison.state_dict_diff import KeyPair, StateDictDiff, extra_state_key
from ckptkit.core.checkpoint import UNINITIALISED, Checkpoint, TensorInfo
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import ABSENT, CASTABLE, copies_dtype
from ckptkit.rules.model import KeyMap
from ckptkit.wrappers.entries import FLAT_GROUPS

__all__ = ["diff_checkpoints"]

_EXTRA_STATE = "_extra_state"
_BATCH_COUNTER = "num_batches_tracked"


def diff_checkpoints(expected: Checkpoint, found: Checkpoint, key_map: KeyMap) -> StateDictDiff:
    """Return the differences, with the keys of ``found`` renamed and filtered by ``key_map``.

    Where the expected side is a live model with own code for loading, a copy of its modules decides.
    """
    expected_infos, found_infos = dict(expected.items()), dict(found.items())
    by_new_name = key_map.describe(found_infos)
    not_tensors = _keys_without_tensor(found, by_new_name)
    expected_states = _extra_state_keys(expected, expected)
    found_states = _extra_state_keys(found, by_new_name)
    quantized = find_quantized_keys(expected, found, by_new_name, key_map.renamed)
    codes = {part for weight in quantized for part in weight.parts}
    absent_modules = tuple(f"{entry.path}." for entry in expected.entries if entry.type == ABSENT)
    answer = _ask(expected, found, key_map, by_new_name, absent_modules)
    matched: list[KeyPair] = []
    missing: list[TensorInfo] = []
    shape_mismatched: list[KeyPair] = []
    dtype_mismatched: list[KeyPair] = []
    uncopyable: list[KeyPair] = []
    blocked: list[str] = []
    moved: dict[str, str] = {}
    computed: dict[str, tuple[str, ...]] = {}
    without: dict[str, str] = {}  # the keys that no tensor is loaded for, and why
    names_decide = answer.rehearsal is None
    undecided = expected_infos
    if names_decide and not expected_states and not_tensors.keys().isdisjoint(expected_infos):
        # Where all names differ, the steps below would take most of the time.
        missing = [info for key, info in expected_infos.items() if key not in by_new_name]
        without = dict.fromkeys((info.key for info in missing), "missing")
        undecided = {key: info for key, info in expected_infos.items() if key in by_new_name} if missing else undecided
    for key, info in undecided.items():
        given_info = by_new_name.get(key)
        is_direct = given_info is not None and key in answer.direct and given_info.shape == info.shape
        if given_info is None or (not is_direct and answer.decides(key)):
            place = _place(info, answer, by_new_name, not_tensors)
            if place.kind == "computed":
                computed[key] = place.sources
                continue
            if place.kind != "loaded":
                if extra_state_key(key, expected) not in found_states:
                    missing.append(info)
                    without[key] = place.kind
                    if place.kind == "blocked":
                        blocked.append(key)
                continue
            pair = _pair(info, by_new_name[place.sources[0]], answer)
            expected_infos[key] = pair.expected
            if place.sources != (key,):
                moved[key] = place.sources[0]
        else:
            pair = KeyPair(info, given_info)
        there, given = pair.expected, pair.found
        if there.shape != given.shape:
            shape_mismatched.append(pair)
            continue
        if key in codes and given.kind == "dense":
            continue
        matched.append(pair)
        if there.dtype != given.dtype:
            dtype_mismatched.append(pair)
        same = (there.dtype, there.kind) == (given.dtype, given.kind) and there.dtype != "F4"
        if (not same and not _is_copyable(pair)) or answer.refuses_shape(key):  # code of the model made another shape
            uncopyable.append(pair)
    if names_decide:
        unexpected = {new: info for new, info in by_new_name.items() if new not in expected_infos}
    else:
        unexpected = {new: by_new_name[new] for new in by_new_name if _is_unexpected(new, answer, expected_infos)}
    if expected_states:
        unexpected = {
            new: info
            for new, info in unexpected.items()
            if _EXTRA_STATE not in new or extra_state_key(new, found) not in expected_states
        }
    own_values = _values_of_own_code(expected, answer)
    options = _options_of_optimizers(expected, not_tensors)
    foreign = [
        key
        for key in not_tensors
        if _is_unexpected(key, answer, expected_infos)
        and not answer.ignores(key)
        and extra_state_key(key, found) is None
        and key not in own_values
        and key not in options
    ]
    one_sided = expected_states ^ found_states
    listed = {info.key for info in missing} | unexpected.keys() if one_sided else set()
    one_sided_states = [
        key
        for key in sorted(one_sided - listed)
        if not answer.decides(key) or key in answer.missing or key in answer.unexpected
    ]
    by_name = missing if names_decide else [info for info in missing if not answer.decides(info.key)]
    filled = _filled_counters(by_name, expected, _versions_for(found, key_map))
    reported = {*(answer.missing - without.keys() - expected_states), *(answer.unexpected - unexpected.keys())}
    reported |= own_values - by_new_name.keys()
    return StateDictDiff(
        expected_infos,
        found_infos,
        key_map.renamed,
        tuple(matched),
        tuple(missing),
        tuple(unexpected.values()),
        tuple(shape_mismatched),
        tuple(dtype_mismatched),
        blocked=tuple(blocked),
        uncopyable=tuple(uncopyable),
        foreign=tuple(key for key in foreign if not key.startswith(absent_modules)),
        extra_state=tuple(key for key in one_sided_states if not key.startswith(absent_modules)),
        filled=filled.union(key for key, kind in without.items() if kind == "filled"),
        notes=key_map.notes if not options else (*key_map.notes, _options_note(options)),
        unseen=frozenset(
            info.key
            for new, info in (unexpected.items() if absent_modules or not names_decide else ())
            if new.startswith(absent_modules) or (not names_decide and answer.ignores(new))
        ),
        quantized=quantized,
        moved=moved,
        computed=computed,
        excused=frozenset(key for key, kind in without.items() if kind == "excused" and key not in filled),
        reported=tuple(sorted(reported - not_tensors.keys() - found_states)),
        refusals=answer.refusals,
        has_own_code=bool(answer.paths),
        undecided=answer.reason,
        expected_checkpoint=CheckpointSummary.of(expected),
        found_checkpoint=CheckpointSummary.of(found),
    )


def _ask(
    expected: Checkpoint,
    found: Checkpoint,
    key_map: KeyMap,
    tensors: Mapping[str, TensorInfo],
    absent_modules: tuple[str, ...],
) -> Answer:
    """Ask the model about its modules with own code; the names tell what torch reports about its other modules."""
    paths = () if expected.model is None else modules_with_own_code(expected.model, saving=True)
    if expected.model is None or not paths:
        return Answer()
    from ckptkit.comparison.own_code.rehearsal import Given, Outside

    states = _extra_state_keys(found, tensors)
    # A file lists the parts of a nested extra state, and torch gets the whole state at one key.
    whole = {key: info for key, info in tensors.items() if extra_state_key(key, found) in (None, key)}
    others = {key for key in _keys_without_tensor(found, tensors) if extra_state_key(key, found) is None}
    given = whole.keys() | others | states
    lost = [info for key, info in expected.items() if key not in given]
    versions = _versions_for(found, key_map)
    filled = _filled_counters(lost, expected, versions)
    missing = [info.key for info in lost if info.key not in filled]
    wanted = expected.keys() | _extra_state_keys(expected, expected)
    unexpected = [key for key in given if key not in wanted and not key.startswith(absent_modules)]
    outside = Outside(missing, unexpected)
    return ask_model(expected.model, paths, Given(whole, sorted(others | states), versions), outside, expected.keys())


def _place(
    info: TensorInfo, answer: Answer, tensors: Mapping[str, TensorInfo], not_tensors: Mapping[str, None]
) -> Place:
    """Return what happens to an expected key, as the model says, or to one that was not found."""
    key = info.key
    if not answer.decides(key):
        if key in not_tensors:
            return Place("blocked")
        return Place("missing" if answer.rehearsal is None or key in answer.missing else "excused")
    place = answer.place(key)
    known = tuple(source for source in place.sources if source in tensors)
    is_scalar = known == (key,) and KeyPair(info, tensors[key]).is_old_scalar
    if place.kind == "computed":
        return Place("loaded" if is_scalar else "computed", known)
    if place.kind == "loaded" and not known:  # the value of an extra state
        return Place("computed")
    if place.kind == "loaded" and not answer.refuses_shape(key):
        pair = KeyPair(info, tensors[known[0]])
        shape = pair.found.shape
        # A rehearsal without values accepts each dtype, and sees F4 with half as many columns.
        if shape != info.shape and not answer.makes_shape(key, shape) and _has_castable_dtypes(pair):
            return Place("computed", known)  # torch repeats the values along some dims
    return place


def _values_of_own_code(expected: Checkpoint, answer: Answer) -> set[str]:
    """Return the keys of values without tensors, such as packed weights, that code which was not tried saves."""
    if not answer.reason:
        return set()
    keys = (entry.path for entry in expected.entries if entry.type != ABSENT and not entry.is_outside)
    return {key for key in keys if is_inside(key, answer.paths) and extra_state_key(key, expected) is None}


def _pair(info: TensorInfo, found: TensorInfo, answer: Answer) -> KeyPair:
    """Return the pair, with the shape that the model's own code gives the tensor while it is loaded."""
    if info.shape != found.shape and answer.makes_shape(info.key, found.shape):
        kind = "dense" if info.kind == UNINITIALISED else info.kind
        info = replace(info, shape=found.shape, view=None, kind=kind)  # the view was that of another shape
    return KeyPair(info, found)


def _is_unexpected(key: str, answer: Answer, expected: Mapping[str, TensorInfo]) -> bool:
    """Return whether a found key has no place in the model."""
    if not answer.decides(key):
        return key not in expected
    if key in expected and answer.place(key) == Place("loaded", (key,)):
        return False
    return key in answer.unexpected or key not in answer.used


def _keys_without_tensor(found: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, None]:
    """Return the keys of the found state_dict that hold no tensor, in order."""
    paths = [entry.path for entry in found.entries if not entry.is_outside]
    return dict.fromkeys(path for path in paths if path not in tensors and path != "_metadata")


def _options_of_optimizers(expected: Checkpoint, not_tensors: Mapping[str, None]) -> list[str]:
    """Return the values without tensor that both sides have, such as options, where both are optimizer states."""
    if expected.model is not None or not any(key.startswith(FLAT_GROUPS) for key in not_tensors):
        return []
    paths = {entry.path for entry in expected.entries if not entry.is_outside}
    both = [key for key in not_tensors if key in paths]
    return both if any(key.startswith(FLAT_GROUPS) for key in both) else []


def _options_note(options: Sequence[str]) -> str:
    count = plural(len(options), "value")
    return (
        f"{count} without tensor, such as {quoted(options[0])}, were not compared: ckpt optim diff compares the "
        "options of an optimizer, and its state by parameter name"
    )


def _extra_state_keys(side: Checkpoint, tensors: Iterable[str]) -> set[str]:
    """Return the keys of extra state on one side."""
    names = [*(entry.path for entry in side.entries), *tensors]
    # Most state_dicts have no extra state, and one search tells so.
    candidates = [key for key in names if _EXTRA_STATE in key] if _EXTRA_STATE in "\n".join(names) else []
    keys = (extra_state_key(key, side) for key in candidates)
    return {key for key in keys if key is not None}


def _is_copyable(pair: KeyPair) -> bool:
    """Return whether the kinds and dtypes let torch copy the found values into the expected tensor."""
    kinds = {pair.expected.kind, pair.found.kind}
    is_kind_copyable = len(kinds) == 1 or not kinds & {"sparse", "quantized", "meta", "nested"}
    return extra_state_key(pair.key) is not None or (is_kind_copyable and _has_castable_dtypes(pair))


def _has_castable_dtypes(pair: KeyPair) -> bool:
    dtypes = {pair.expected.dtype, pair.found.dtype}
    return dtypes <= CASTABLE or (len(dtypes) == 1 and copies_dtype(pair.found.dtype))


def _filled_counters(
    missing: Iterable[TensorInfo], expected: Checkpoint, versions: Mapping[str, int]
) -> frozenset[str]:
    """Return the missing counters that torch fills in, because the state_dict has batch norm in a version below 2."""
    filled = set()
    for key in (info.key for info in missing if info.key.endswith(_BATCH_COUNTER)):
        prefix, _, name = key.rpartition(".")
        if name != _BATCH_COUNTER:
            continue
        mean = f"{prefix}.running_mean" if prefix else "running_mean"
        # Batch norm has version 2; a user's module with the same buffers has version 1.
        is_norm = mean in expected and expected.versions.get(prefix, 2) >= 2
        if is_norm and versions.get(prefix, 0) < 2:
            filled.add(key)
    return frozenset(filled)


def _versions_for(found: Checkpoint, key_map: KeyMap) -> Mapping[str, int]:
    """Return the versions of modules that torch would see: none where keys were renamed."""
    is_renamed = bool(key_map.copied_or_computed) or any(map(operator.ne, key_map.renamed, key_map.renamed.values()))
    return {} if is_renamed else found.versions
