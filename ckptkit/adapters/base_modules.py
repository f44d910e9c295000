"""Find the modules of a base that an adapter of kohya or diffusers names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptkit.adapters.fused import Place, fused_places
from ckptkit.adapters.model import AdaptedModule, Adapter
from ckptkit.adapters.module_names import COMPONENTS, layers_per_block, other_names, split_component
from ckptkit.adapters.named import NamedAdapter, NamedModule
from ckptkit.core.patterns import literal
from ckptkit.core.text import listed, plural, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.operation import Shape

__all__ = ["BaseModules", "find_modules", "on_base"]

_WEIGHT = ".weight"


class BaseModules:
    """The modules of a base by each name that an adapter may give to them."""

    def __init__(self, base: Mapping[str, Shape]) -> None:
        """Collect the names of the modules with a weight of two dims or more."""
        modules = [key.removesuffix(_WEIGHT) for key, shape in base.items() if key.endswith(_WEIGHT) and len(shape) > 1]
        split = {module: split_component(module) for module in modules}
        layers = layers_per_block([name for _, name in split.values()])
        self._by_flat: dict[str, dict[Place, None]] = {}
        for module, (prefix, name) in split.items():
            self._add(Place("", module, module))
            for alias in (name, *other_names(name, layers)):
                self._add(Place(COMPONENTS.get(prefix, ""), alias, module))
        for place in fused_places(base):
            self._add(place)

    def _add(self, place: Place) -> None:
        self._by_flat.setdefault(_flat(place.name), {})[place] = None

    def find(self, module: NamedModule) -> list[AdaptedModule]:
        """Return what a module of an adapter changes in the base, which is nothing if the base does not have it.

        Raises ``RuleError`` where several modules of the base can be meant.
        """
        places = list(self._by_flat.get(_flat(module.name), {}))
        if not module.is_flat:
            places = [place for place in places if place.name == module.name]
        if module.component:
            places = [place for place in places if place.component in ("", module.component)]
        places = list(dict.fromkeys(replace(place, component="", name="") for place in places))
        is_joined = all(place.up_rows is not None for place in places)
        if len(places) > 1 and not is_joined:
            first, second, *_ = sorted({place.module for place in places})
            key = next(iter(module.adapted.factors.values()))
            raise RuleError(
                f"{quoted(key)} can mean {quoted(first)} and {quoted(second)} of the base",
                hint=f"rename its keys to one of them, or leave it out: --drop {_pattern(module)}",
            )
        return [_placed(module.adapted, place) for place in places]


def _placed(adapted: AdaptedModule, place: Place) -> AdaptedModule:
    """Return the description of a module at its place in the base."""
    if place.up_rows is not None and (adapted.kind != "lora" or adapted.bias or "mid" in adapted.factors):
        raise RuleError(
            f"{quoted(next(iter(adapted.factors.values())))} is a factor of several modules of the base, where only "
            "LoRA without a bias can be folded",
            hint="use a base with the original names",
        )
    orientation = adapted.orientation if place.rows is place.up_rows is None else "plain"
    return replace(
        adapted, module=place.module, parameter=place.parameter, rows=place.rows, up_rows=place.up_rows,
        orientation=orientation,
    )  # fmt: skip


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _pattern(module: NamedModule) -> str:
    """Return a pattern, as a word of a shell, for the keys of a module; of an unusual one, for its first key."""
    key, stem = next(iter(module.adapted.factors.values())), f"{module.prefix}{module.name}."
    return shell_word(f"{literal(stem)}*" if key.startswith(stem) else literal(key))


def on_base(adapter: NamedAdapter, base: Mapping[str, Shape]) -> Adapter:
    """Return the adapter with the modules of ``base`` that its names mean. Raises as ``find_modules`` does."""
    modules = tuple(each for each, _ in find_modules(adapter, base))
    return Adapter(modules, fan_in_fan_out=adapter.fan_in_fan_out)


def find_modules(adapter: NamedAdapter, base: Mapping[str, Shape]) -> list[tuple[AdaptedModule, NamedModule]]:
    """Return what the adapter changes in ``base``, each with the module of the adapter.

    Raises ``RuleError`` with every tensor that has no place in the base. It is also raised where a name can mean two
    modules, and where two modules of the adapter mean one module of the base.
    """
    modules = BaseModules(base)
    placed: dict[tuple[str, tuple[int, int] | None], tuple[AdaptedModule, NamedModule]] = {}
    unplaced: list[NamedModule] = []
    for module in adapter.modules:
        found = modules.find(module)
        if not found:
            unplaced.append(module)
        for each in found:
            if (each.key, each.rows) in placed:
                first = placed[each.key, each.rows][1].adapted
                names = [quoted(next(iter(one.factors.values()))) for one in (first, module.adapted)]
                drop = shell_word(f"{module.prefix}*") if module.prefix else _pattern(module)
                raise RuleError(
                    f"{names[0]} and {names[1]} both change {quoted(each.key)}", hint=f"keep one of them: --drop {drop}"
                )
            placed[each.key, each.rows] = each, module
    if unplaced:
        _refuse_unplaced(unplaced, adapter)
    return list(placed.values())


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
