"""Tensors of a checkpoint that share memory: tied tensors, and views that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ckptkit.core.checkpoint.info import TensorInfo, View, storage_range

__all__ = ["first_of_ties", "overlapping_tensors", "shared_keys", "tied_keys"]


def tied_keys(infos: Iterable[TensorInfo]) -> list[list[str]]:
    """Return groups of two or more keys that are one tensor: the same memory, shape and dtype."""
    places: dict[tuple[View, tuple[int, ...], str], list[str]] = {}
    for info in infos:
        if info.view is not None and info.elements:
            places.setdefault((info.view, info.shape, info.dtype), []).append(info.key)
    return [keys for keys in places.values() if len(keys) > 1]


def first_of_ties(infos: Iterable[TensorInfo], span: Callable[[str], object]) -> dict[str, str]:
    """Return, for each key but the first of a tied tensor, the first key; the values of both are equal.

    ``span`` is the method of the checkpoint. It returns None for a conjugate or negative view, which has the memory of
    another tensor and other values.
    """
    first_of: dict[str, str] = {}
    for group in tied_keys(infos):
        equal = [key for key in group if span(key) is not None]
        first_of |= dict.fromkeys(equal[1:], equal[0])
    return first_of


def overlapping_tensors(infos: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """Return groups of two or more views that overlap in memory, directly or through other views of the group.

    Two views of one storage that do not overlap are in no group, as in safetensors.
    """
    storages: dict[int, list[TensorInfo]] = {}
    for info in infos:
        if info.view is not None and info.elements:
            storages.setdefault(info.view.storage, []).append(info)
    groups: list[list[TensorInfo]] = []
    for views in storages.values():
        if len(views) > 1:
            end = -1
            for info in sorted(views, key=storage_range):
                first, last = storage_range(info)
                if first >= end:
                    groups.append([])
                    end = last
                groups[-1].append(info)
                end = max(end, last)
    return [group for group in groups if len(group) > 1]


# In a hostile file all tensors may share one storage, and listing all pairs would take quadratic time.
_MAX_SHARED = 64


def shared_keys(infos: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """Return the tensors that share memory: each key with the first 64 keys that share its memory."""
    shared: dict[str, tuple[str, ...]] = {}
    for group in overlapping_tensors(infos.values()):
        keys = tuple(info.key for info in group)
        first = keys[:_MAX_SHARED]
        shared |= dict.fromkeys(keys[_MAX_SHARED:], first)
        shared |= {key: tuple(other for other in first if other != key) for key in first}
    return shared
