"""Place an adapter on a base: which weight each of its tensors changes, and by which operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptkit.adapters.model import AdaptedModule, Adapter, AdapterPlan, Fold
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.lora import FoldLora
from ckptkit.tensor_ops.operation import Operation, Shape

__all__ = ["place_adapter"]

_PREFIX = "base_model.model."  # of peft


def place_adapter(adapter: Adapter, shapes: Mapping[str, Shape], base: Mapping[str, Shape]) -> AdapterPlan:
    """Return the changes of ``adapter`` to ``base``, from keys and shapes alone.

    ``shapes`` has the shape of each tensor of the adapter, by its key there, and ``base`` those of the base. A
    replacement may have another shape than the tensor that it replaces, such as a larger vocabulary.

    Raises ``RuleError`` where a tensor of the adapter has no matching key in the base, and where the factors do not
    fit the weight. It is also raised where a square weight could be stored either way, and another weight contradicts
    ``fan_in_fan_out`` of the adapter.
    """
    _refuse_unplaced(adapter, base)
    replacements = dict(adapter.replacements)
    all_shapes = {**base, **{key: shapes[name] for key, name in replacements.items()}}
    orientation = _Orientations(adapter, all_shapes, shapes)
    folds = []
    for module in adapter.modules:
        names = tuple(module.factors[role] for role in _ROLES[module.kind])
        operation = FoldLora(module.scale, fan_in_fan_out=orientation.is_transposed(module))
        label = f"{module.kind}, scale {module.scale:g}"
        folds.append(Fold(module.key, names, operation, replacements.pop(module.key, ""), label))
        if module.bias:
            key = f"{module.module}.bias"
            folds.append(Fold(key, (module.bias,), FoldLora(module.scale), replacements.pop(key, ""), label))
    orientation.refuse_contradiction()
    for fold in folds:
        _check(fold.key, fold.operation, [all_shapes[fold.key], *(shapes[name] for name in fold.factors)])
    return AdapterPlan(tuple(folds), replacements)


_ROLES: Mapping[str, tuple[str, ...]] = {"lora": ("A", "B"), "dora": ("A", "B", "magnitude")}


def _refuse_unplaced(adapter: Adapter, base: Mapping[str, Shape]) -> None:
    for module in adapter.modules:
        if f"{module.module}.in_proj_weight" in base and module.key not in base:
            raise RuleError(
                f"{quoted(next(iter(module.factors.values())))} adapts an attention block, where peft adds the update "
                "of out_proj twice",
                hint="merge with peft",
            )
    places = list(adapter.places())
    unplaced = [name for key, name in places if key not in base]
    if unplaced:
        has = "have" if len(unplaced) > 1 else "has"
        raise RuleError(
            f"of {plural(len(places), 'tensor')}, {listed(unplaced, 1)} {has} no matching key in the base",
            hint=_renaming([key for key, _ in places], unplaced[0], base)
            or "check that the adapter belongs to this base, or rename its keys to the keys of the base",
        )


def _renaming(places: Sequence[str], name: str, base: Mapping[str, Shape]) -> str | None:
    """Return a hint with a rename if adding or removing one prefix turns every place into a key of the base."""
    first = next(key for key in places if key not in base)
    head = _PREFIX if name.startswith(_PREFIX) else ""
    longer = (key[: -len(first)] for key in base if key.endswith(f".{first}"))
    shorter = (first[: at + 1] for at, char in enumerate(first) if char == "." and first[at + 1 :] in base)
    for prefix in longer:
        if all(f"{prefix}{key}" in base for key in places):
            return f"every tensor has a matching key after --rename {shell_word(f'{head}*={head}{prefix}*')}"
    for prefix in shorter:
        if all(key.startswith(prefix) and key.removeprefix(prefix) in base for key in places):
            return f"every tensor has a matching key after --rename {shell_word(f'{head}{prefix}*={head}*')}"
    return None


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
        down, up = (self.factors[module.factors[role]] for role in ("A", "B"))
        if len(weight) != 2 or len(down) != 2 or len(up) != 2:
            return False
        plain, transposed = weight == (up[0], down[1]), weight == (down[1], up[0])
        configured = self.adapter.fan_in_fan_out
        if plain and transposed:
            self.square = self.square or key
        elif plain or transposed:
            self.contradicting = self.contradicting or (key if transposed != configured else "")
        return configured if plain == transposed else transposed

    def refuse_contradiction(self) -> None:
        """Raise ``RuleError`` where a weight is square, and the shape of another weight contradicts the adapter."""
        if self.square and self.contradicting:
            raise RuleError(
                f"fan_in_fan_out is {str(self.adapter.fan_in_fan_out).lower()}, which the shape of "
                f"{quoted(self.contradicting)} contradicts; {quoted(self.square)} is square and cannot tell",
                hint="merge with peft",
            )
