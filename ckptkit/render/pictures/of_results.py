"""Which pictures each class of results has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.coverage import ModuleCoverage
from ckptkit.render.pictures.coverage import Part, ShareRow, shares_picture
from ckptkit.render.pictures.model import Picture
from ckptkit.render.pictures.sections import sections_of
from ckptkit.render.pictures.sizes import sizes_picture
from ckptkit.render.pictures.svg import HATCHED

if TYPE_CHECKING:
    from ckptkit.comparison.state_dict_diff import StateDictDiff
    from ckptkit.comparison.values import ValueDiff
    from ckptkit.loading.report import LoadReport
    from ckptkit.param_groups.plan import ParamGroupsPlan, PlannedParameter
    from ckptkit.readiness.model import Preflight
    from ckptkit.statistics.state_dict_stats import StateDictStats
    from ckptkit.statistics.value_stats import ValueStats

__all__ = [
    "diff_pictures",
    "groups_pictures",
    "load_pictures",
    "preflight_pictures",
    "show_pictures",
    "stats_pictures",
    "values_pictures",
]

_FILLED: Final = "ck-s0"
_COVERED: Final = "Coverage by elements"


def show_pictures(checkpoint: Checkpoint) -> tuple[Picture, ...]:
    """Return the size of a checkpoint by section and dtype."""
    return _some(sizes_picture([("", checkpoint.values())]))


def stats_pictures(result: StateDictStats) -> tuple[Picture, ...]:
    """Return the magnitudes of all values, and the size of the tensors by section and dtype."""
    from ckptkit.render.pictures.magnitudes import magnitudes_picture

    return _some(magnitudes_picture([("", result.total)]), sizes_picture([("", _renamed(result.tensors.infos))]))


def _renamed(infos: Mapping[str, TensorInfo]) -> list[TensorInfo]:
    return [info if info.key == name else replace(info, key=name) for name, info in infos.items()]


def diff_pictures(result: StateDictDiff, *, totals: Sequence[tuple[str, ValueStats]] = ()) -> tuple[Picture, ...]:
    """Return coverage by elements, how much each tensor changed where values were compared, and the sizes.

    ``totals`` has the statistics of the values that differ, of each side with its name: their magnitudes are drawn too.
    """
    from ckptkit.render.pictures.magnitudes import magnitudes_picture

    found = {result.names.get(key, key): info for key, info in result.found.items()}
    sides = [("expected", result.expected.values()), ("found", _renamed(found))]
    magnitudes = magnitudes_picture(totals, "Magnitudes of the tensors that differ")
    return _some(_coverage(result), _changes(result), magnitudes, sizes_picture(sides))


def values_pictures(result: ValueDiff) -> tuple[Picture, ...]:
    """Return how much each tensor changed."""
    from ckptkit.render.pictures.changes import changes_picture, states_of_values

    return _some(changes_picture(states_of_values(result)))


def _changes(result: StateDictDiff) -> Picture | None:
    if result.values is None:
        return None
    from ckptkit.render.pictures.changes import (
        MISSING,
        OTHER_SHAPE,
        UNEXPECTED,
        cast_state,
        changes_picture,
        states_of_values,
    )

    states = {info.key: MISSING for info in result.missing}
    states |= {pair.key: OTHER_SHAPE for pair in result.shape_mismatched}
    states |= states_of_values(result.values)
    states |= {pair.key: cast_state(states[pair.key]) for pair in result.dtype_mismatched if pair.key in states}
    in_order = {key: states[key] for key in result.expected if key in states}
    return changes_picture(in_order | {result.names.get(info.key, info.key): UNEXPECTED for info in result.unexpected})


def load_pictures(report: LoadReport) -> tuple[Picture, ...]:
    """Return the coverage by elements."""
    parts = (Part("loaded", _FILLED), Part("kept as they were", HATCHED))
    return _some(shares_picture("coverage", _COVERED, parts, _share_rows(report.modules)))


def groups_pictures(plan: ParamGroupsPlan) -> tuple[Picture, ...]:
    """Return the learning rate of each layer."""
    from ckptkit.render.pictures.rates import GroupOfNames, rates_picture

    groups = [GroupOfNames(group.rule.name, _names(group.parameters), group.options) for group in plan.groups]
    layers = {one.name: one.layer for group in plan.groups for one in group.parameters if one.layer is not None}
    frozen = _names((*plan.freeze, *plan.frozen))
    groups += [GroupOfNames("frozen", frozen, None)] if frozen else []
    return _some(rates_picture(groups, sorted(layers, key=layers.__getitem__)))


def _names(parameters: Iterable[PlannedParameter]) -> list[str]:
    return [parameter.name for parameter in parameters]


def preflight_pictures(report: Preflight) -> tuple[Picture, ...]:
    """Return the coverage of ``init`` by elements, learning rates by layer, and what trains where some is frozen."""
    from ckptkit.render.pictures.rates import GroupOfNames, rates_picture

    from_init = (Part("from init", _FILLED), Part("stays at init", HATCHED))
    modules = () if report.init is None else report.init.modules
    named = ([name for name in group.names if name] for group in report.groups)
    groups = [
        GroupOfNames(_without_layer(group.name), names, group.options)
        for group, names in zip(report.groups, named, strict=True)
    ]
    frozen = [one.module for one in report.training if not one.trainable]
    groups += [GroupOfNames("frozen", frozen, None)] if frozen and groups else []
    return _some(
        shares_picture("coverage", _COVERED, from_init, _share_rows(modules)),
        rates_picture(groups, [one.module for one in report.training]) if groups else None,
        _training(report) if any(one.trainable < one.parameters for one in report.training) else None,
    )


def _without_layer(name: str) -> str:
    """Return the name of a group without the number of its layer, which the row of a picture has."""
    first, *others = name.split("/")
    return "/".join([first, *(part for part in others if not part.startswith("layer "))])


def _training(report: Preflight) -> Picture | None:
    rows = [
        ShareRow(one.module, (one.trainable_elements, one.elements - one.trainable_elements)) for one in report.training
    ]
    parts = (Part("trains", "ck-s2"), Part("frozen", "ck-same"))
    return shares_picture("training", "What trains, by elements", parts, rows)


def _coverage(result: StateDictDiff) -> Picture | None:
    from ckptkit.comparison.state_dict_diff import loaded_keys

    loaded = loaded_keys(result)
    refused = {pair.key for pair in (*result.shape_mismatched, *result.uncopyable)}
    more = {result.names.get(info.key, info.key): info.elements for info in result.unexpected}
    expected = {key: info.elements for key, info in result.expected.items()}
    rows = []
    for name, keys in sections_of({**expected, **more}):
        counts = [0, 0, 0]
        for key in keys:
            if key in expected:
                counts[0 if key in loaded else 1 if key in refused else 2] += expected[key]
        rows.append(
            ShareRow(name, tuple(counts), sum(more[key] for key in keys if key in more and key not in expected))
        )
    parts = (Part("matched", _FILLED), Part("shape-mismatched", "ck-s1"), Part("missing", HATCHED))
    return shares_picture("coverage", _COVERED, parts, rows, Part("unexpected", "ck-s4"))


def _share_rows(modules: Iterable[ModuleCoverage]) -> Sequence[ShareRow]:
    return [ShareRow(one.module, (one.loaded_elements, one.elements - one.loaded_elements)) for one in modules]


def _some(*pictures: Picture | None) -> tuple[Picture, ...]:
    return tuple(picture for picture in pictures if picture is not None)
