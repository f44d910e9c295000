"""Find the modules of a base that an adapter of kohya or diffusers names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.adapters.model import Adapter
from ckptkit.adapters.module_names import COMPONENTS, layers_per_block, other_names, split_component
from ckptkit.adapters.named import NamedAdapter, NamedModule
from ckptkit.core.patterns import literal
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["BaseModules", "find_modules", "on_base"]

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Place:
    component: str  # empty if the name is that of the whole key
    name: str
    module: str


class BaseModules:
    """The modules of a base by each name that an adapter may give to them."""

    def __init__(self, base: Mapping[str, Shape]) -> None:
        """Collect the names of the modules with a weight of two dims or more."""
        modules = [key.removesuffix(_WEIGHT) for key, shape in base.items() if key.endswith(_WEIGHT) and len(shape) > 1]
        split = {module: split_component(module) for module in modules}
        layers = layers_per_block([name for _, name in split.values()])
        self._by_flat: dict[str, dict[tuple[str, str, str], _Place]] = {}
        for module, (prefix, name) in split.items():
            self._add(_Place("", module, module))
            for alias in (name, *other_names(name, layers)):
                self._add(_Place(COMPONENTS.get(prefix, ""), alias, module))

    def _add(self, place: _Place) -> None:
        places = self._by_flat.setdefault(_flat(place.name), {})
        places[place.component, place.name, place.module] = place

    def find(self, module: NamedModule) -> str | None:
        """Return the module of the base that a module of an adapter means, or None.

        Raises ``RuleError`` where several modules of the base can be meant.
        """
        places = list(self._by_flat.get(_flat(module.name), {}).values())
        if not module.is_flat:
            places = [place for place in places if place.name == module.name]
        wanted = {place.module for place in places if place.component in ("", module.component) or not module.component}
        if len(wanted) > 1:
            first, second, *_ = sorted(wanted)
            key = next(iter(module.adapted.factors.values()))
            raise RuleError(
                f"{quoted(key)} can mean {quoted(first)} and {quoted(second)} of the base",
                hint=f"rename its keys to one of them, or leave it out: --drop {_pattern(module)}",
            )
        return next(iter(wanted), None)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _pattern(module: NamedModule) -> str:
    """Return a pattern, as a word of a shell, for the keys of a module; of an unusual one, for its first key."""
    key, stem = next(iter(module.adapted.factors.values())), f"{module.prefix}{module.name}."
    return shell_word(f"{literal(stem)}*" if key.startswith(stem) else literal(key))


def on_base(adapter: NamedAdapter, base: Mapping[str, Shape]) -> Adapter:
    """Return the adapter with the modules of ``base`` that its names mean. Raises as ``find_modules`` does."""
    placed = find_modules(adapter, base)
    modules = tuple(replace(each.adapted, module=found) for found, each in placed.items())
    return Adapter(adapter.format, modules, fan_in_fan_out=adapter.fan_in_fan_out)


def find_modules(adapter: NamedAdapter, base: Mapping[str, Shape]) -> dict[str, NamedModule]:
    """Return the modules of the adapter by the modules of ``base`` that their names mean.

    Raises ``RuleError`` with every tensor that has no place in the base, where a name can mean two modules, and where
    two modules of the adapter mean one module of the base.
    """
    modules = BaseModules(base)
    placed: dict[str, NamedModule] = {}
    unplaced: list[NamedModule] = []
    for module in adapter.modules:
        found = modules.find(module)
        if found is None:
            unplaced.append(module)
            continue
        if found in placed:
            first, second = (next(iter(each.adapted.factors.values())) for each in (placed[found], module))
            drop = shell_word(f"{module.prefix}*") if module.prefix else _pattern(module)
            raise RuleError(
                f"{quoted(first)} and {quoted(second)} both change {quoted(found + _WEIGHT)}",
                hint=f"keep one of them: --drop {drop}",
            )
        placed[found] = module
    if unplaced:
        _refuse_unplaced(unplaced, adapter)
    return placed


def _refuse_unplaced(unplaced: Sequence[NamedModule], adapter: NamedAdapter) -> None:
    keys = [key for module in unplaced for key in module.adapted.factors.values()]
    count = sum(len(module.adapted.factors) for module in adapter.modules)
    has = "have" if len(keys) > 1 else "has"
    prefixes = sorted({module.prefix for module in unplaced})
    is_whole = len(unplaced) == sum(module.prefix in prefixes for module in adapter.modules)
    hint = "check that the adapter belongs to this base, or rename its keys to the keys of the base"
    if is_whole and all(prefixes) and len(unplaced) < len(adapter.modules):
        drops = " ".join(f"--drop {shell_word(prefix + '*')}" for prefix in prefixes)
        hint = f"the base has no module of this model: leave them out with {drops}"
    elif len(unplaced) < len(adapter.modules):
        hint = f"leave out what the base does not have: --drop {_pattern(unplaced[0])}"
    raise RuleError(f"of {plural(count, 'tensor')}, {listed(keys, 1)} {has} no matching key in the base", hint=hint)
