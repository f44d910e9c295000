"""Place an adapter on a base: which weight each of its tensors changes, and by which operation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.adapters.model import AdaptedModule, Adapter, AdapterPlan, Fold
from ckptkit.core.text import listed, plural, quoted, shell_word, short_number
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.adapters import (
    FoldAdalora,
    FoldDora,
    FoldIa3,
    FoldLocon,
    FoldLoha,
    FoldLokr,
    FoldLoraExperts,
    ReplaceRows,
)
from ckptkit.tensor_ops.lora import FoldLora
from ckptkit.tensor_ops.operation import Operation, Shape

__all__ = ["place_adapter"]


def place_adapter(
    adapter: Adapter, shapes: Mapping[str, Shape], base: Mapping[str, Shape], optional: Collection[str] = ()
) -> AdapterPlan:
    """Return the changes of ``adapter`` to ``base``, from keys and shapes alone.

    ``shapes`` has the shape of each tensor of the adapter, by its key there, and ``base`` those of the base. A
    replacement may have another shape than the tensor that it replaces, such as a larger vocabulary. ``optional`` are
    the keys of the adapter that may have no place in the base.

    Raises ``RuleError`` where a tensor of the adapter has no matching key in the base, and where the factors do not
    fit the weight. It is also raised where a square weight could be stored either way, and another weight contradicts
    ``fan_in_fan_out`` of the adapter.
    """
    left_out = _unplaced(adapter, base, optional)
    replacements = {key: name for key, name in adapter.replacements.items() if key in base}
    unplaced = {key: name for key, name in adapter.replacements.items() if key not in base}
    all_shapes = {**base, **{key: shapes[name] for key, name in replacements.items()}}
    orientation = _Orientations(adapter, all_shapes, shapes)
    folds: list[Fold] = []
    for module in adapter.modules:
        if module.key not in base:
            continue
        weight = _with_rows(all_shapes[module.key], module.rows)
        names, operation = _operation(module, weight, orientation)
        label = module.kind if module.kind == "ia3" else f"{module.kind}, scale {short_number(module.scale)}"
        replaced_by = replacements.pop(module.key, "")
        folds.append(Fold(module.key, names, operation, replaced_by, label, module.rows, module.up_rows))
        key = f"{module.module}.bias"
        if module.bias:
            folds.append(Fold(key, (module.bias,), FoldLora(module.scale), replacements.pop(key, ""), label))
        elif module.kind == "ia3" and not module.per_input and key in base:
            folds.append(Fold(key, names, FoldIa3(), replacements.pop(key, ""), label))
    for rows in adapter.rows:
        if rows.key in base:
            label = f"{plural(len(rows.indices), 'row')} replaced"
            operation = ReplaceRows(rows.indices)
            folds.append(Fold(rows.key, (rows.name,), operation, replacements.pop(rows.key, ""), label))
    orientation.refuse_contradiction()
    seen: set[tuple[str, tuple[int, int] | None]] = set()
    for fold in folds:
        if (fold.key, fold.rows) in seen:
            raise RuleError(f"{quoted(fold.key)} is adapted twice", hint="merge with peft")
        seen.add((fold.key, fold.rows))
        factors = [shapes[name] for name in fold.factors]
        if fold.up_rows is not None:
            factors[1] = _with_rows(factors[1], fold.up_rows)
        _check(fold.key, fold.operation, [_with_rows(all_shapes[fold.key], fold.rows), *factors])
    return AdapterPlan(
        tuple(folds), replacements, unplaced, {name: key for key, name in left_out if key not in unplaced}
    )


def _with_rows(shape: Shape, rows: tuple[int, int] | None) -> Shape:
    """Return the shape of these rows, or of the whole tensor."""
    return shape if rows is None else (rows[1] - rows[0], *shape[1:])


def _operation(module: AdaptedModule, weight: Shape, orientation: _Orientations) -> tuple[tuple[str, ...], Operation]:
    """Return the keys of the factors of a module in the order of its operation, and the operation."""
    factors, scale = module.factors, module.scale
    roles: Sequence[str]
    operation: Operation
    if module.kind == "loha":
        roles, operation = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), FoldLoha(scale)
    elif module.kind == "lokr":
        roles = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        count = sum(role in factors for role in roles[:3])
        operation = FoldLokr(scale, count, len(factors) - count)
    elif "mid" in factors:
        roles, operation = ("A", "B", "mid"), FoldLocon(scale)
    elif module.kind == "ia3":
        roles, turned = ("l",), orientation.is_transposed(module)
        operation = FoldIa3(module.per_input, turned)
    else:
        turned = orientation.is_transposed(module)
        roles = ("A", "B", "E", "magnitude")
        if module.kind == "dora":
            operation = FoldDora(scale, turned, module.per_input)
        elif module.kind == "adalora":
            operation = FoldAdalora(scale, turned)
        elif len(weight) == 3 and module.parameter != "weight":
            operation = FoldLoraExperts(scale, turned)
        else:
            operation = FoldLora(scale, fan_in_fan_out=turned)
    return tuple(factors[role] for role in roles if role in factors), operation


def _unplaced(adapter: Adapter, base: Mapping[str, Shape], optional: Collection[str]) -> list[tuple[str, str]]:
    """Return the places that the base does not have; raise ``RuleError`` where one of them is not optional."""
    for module in adapter.modules:
        if f"{module.module}.in_proj_weight" in base and module.key not in base:
            raise RuleError(
                f"{quoted(next(iter(module.factors.values())))} adapts an attention block, where peft adds the update "
                "of out_proj twice",
                hint="merge with peft",
            )
    places = list(adapter.places())
    unplaced = [(key, name) for key, name in places if key not in base]
    names = [name for _, name in unplaced if name not in optional]
    if len(unplaced) == len(places):
        names = [name for _, name in unplaced]  # the output is never the unchanged base
    if names:
        has = "have" if len(names) > 1 else "has"
        raise RuleError(
            f"of {plural(len(places), 'tensor')}, {listed(names, 1)} {has} no matching key in the base",
            hint=_renaming(adapter, unplaced, base)
            or _adding(adapter, names)
            or "check that the adapter belongs to this base, or rename its keys to the keys of the base",
        )
    return unplaced


def _adding(adapter: Adapter, names: Sequence[str]) -> str | None:
    """Return a hint about tensors that are saved whole if these are all that the base does not have."""
    keys = {name: key for key, name in adapter.replacements.items()}
    if not all(name in keys for name in names) or len(names) == sum(1 for _ in adapter.places()):
        return None
    added = listed([keys[name] for name in names], 2)
    it, them = ("it is", "it") if len(names) == 1 else ("they are", "them")
    return (
        f"{it} saved whole with the adapter: --on-unexpected add writes {them} as {added}, and skip leaves {them} out"
    )


def _renaming(adapter: Adapter, unplaced: Sequence[tuple[str, str]], base: Mapping[str, Shape]) -> str | None:
    """Return a hint with a rename if adding or removing one prefix turns every place into a key of the base.

    Tensors that are saved whole may stay without a place if all others have one then.
    """
    places = [key for key, _ in adapter.places()]
    needed = [key for key in places if key not in adapter.replacements] or places
    first, name = next(((key, name) for key, name in unplaced if key in needed), ("", ""))
    if not first:
        return None
    head = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    longer = (key[: -len(first)] for key in base if key.endswith(f".{first}"))
    shorter = (first[: at + 1] for at, char in enumerate(first) if char == "." and first[at + 1 :] in base)
    for prefix in longer:
        if all(f"{prefix}{key}" in base for key in needed):
            whole = all(f"{prefix}{key}" in base for key in places)
            return _after(f"{head}*={head}{prefix}*", whole=whole)
    for prefix in shorter:
        if all(key.startswith(prefix) and key.removeprefix(prefix) in base for key in needed):
            whole = all(key.removeprefix(prefix) in base for key in places)
            return _after(f"{head}{prefix}*={head}*", whole=whole)
    return None


def _after(rename: str, *, whole: bool) -> str:
    every = "every tensor has" if whole else "all but the tensors saved whole have"
    return f"{every} a matching key after --rename {shell_word(rename)}"


def _check(key: str, operation: Operation, inputs: Sequence[Shape]) -> None:
    try:
        operation.shapes(inputs)
    except RuleError as error:
        raise RuleError(f"{quoted(key)}: {error.reason}", hint=error.hint) from None


@dataclass(slots=True)
class _Orientations:
    """Decide whether weights are stored as ``[in, out]``, by their shapes, or by the adapter for square weights."""

    adapter: Adapter
    weights: Mapping[str, Shape]
    factors: Mapping[str, Shape]
    square: str = ""
    contradicting: str = ""

    def is_transposed(self, module: AdaptedModule) -> bool:
        """Return whether the weight of a module is stored as ``[in, out]``."""
        if module.orientation != "by shape":
            return module.orientation == "transposed"
        weight, key = self.weights[module.key], module.key
        plain, transposed = self._fits(module, weight)
        configured = self.adapter.fan_in_fan_out
        if plain and transposed:
            if len(weight) == 3:
                raise RuleError(f"{quoted(key)} is {list(weight)}, which fits both ways round", hint="merge with peft")
            self.square = self.square or key
        elif plain or transposed:
            # Only Linear and Conv1D obey the config.
            differs = transposed != configured and len(weight) == 2
            self.contradicting = self.contradicting or (key if differs else "")
        return configured if plain == transposed and len(weight) == 2 else transposed

    def _fits(self, module: AdaptedModule, weight: Shape) -> tuple[bool, bool]:
        """Return whether the factors fit the weight as it is, and whether they fit its transpose."""
        if module.kind == "ia3":
            size = math.prod(self.factors[module.factors["l"]])
            outs = weight[::-1] if module.per_input else weight
            return (outs[0] == size, outs[1] == size) if len(weight) == 2 else (True, False)
        down, up = (self.factors[module.factors[role]] for role in ("A", "B"))
        if len(weight) not in (2, 3) or len(down) != 2 or len(up) != 2:
            return True, False
        sizes = weight[-2:]
        return sizes == (up[0], down[1]), sizes == (down[1], up[0])

    def refuse_contradiction(self) -> None:
        """Raise ``RuleError`` where a weight is square, and the shape of another weight contradicts the adapter."""
        if self.square and self.contradicting:
            raise RuleError(
                f"fan_in_fan_out is {str(self.adapter.fan_in_fan_out).lower()}, which the shape of "
                f"{quoted(self.contradicting)} contradicts; {quoted(self.square)} is square and cannot tell",
                hint="merge with peft",
            )
