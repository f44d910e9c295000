"""What happens to each key of the inputs: merged, taken from one of them, or left out; and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Literal, TypeAlias

from ckptkit.comparison.hints import count_prefixes
from ckptkit.core.dtypes import DTYPES, is_float
from ckptkit.core.patterns import matches_any, parse_pattern, suggest_pattern
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.core.toml_lines import TomlPath
from ckptkit.core.torch_bridge import CASTABLE
from ckptkit.errors import RecipeError
from ckptkit.plans.plan import Source
from ckptkit.plans.recipes.inputs import AlignedInput, Ingredient, input_path
from ckptkit.plans.recipes.model import MergeRecipe, Parameters
from ckptkit.plans.recipes.parameters import Chosen, KeySettings

__all__ = ["Decision", "Decisions", "decide", "is_one"]

Kind: TypeAlias = Literal["merged", "taken", "left out"]
_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one key.

    Attributes:
        kind: Whether it is merged, taken from one input, or left out.
        inputs: The inputs that count, in the order of the recipe: of a merge all, else one or none.
        why: The reason, for the plan.
        chosen: What the settings say about a key that is merged.
        has_base: Whether the merge has a base, which is not one of ``inputs``.
        equals: Tensors that must have the same bytes as one of the sources.
        own: Parameters that hold for the key where no ``[[set]]`` has them.
    """

    kind: Kind
    inputs: tuple[str, ...] = ()
    why: str = ""
    chosen: Chosen | None = None
    has_base: bool = False
    equals: tuple[Source, ...] = ()
    own: Parameters = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decision about each key, in the order of the output, the keys tied to another, and notes.

    ``moved`` has what a key is made of where its input has it under another key.
    """

    by_key: dict[str, Decision]
    settings: KeySettings
    tied_to: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    moved: Mapping[str, Ingredient] = field(default_factory=dict)


def decide(recipe: MergeRecipe, inputs: Mapping[str, AlignedInput], reference: str) -> Decisions:
    """Return what happens to each key of the inputs; ``reference`` has the order of the keys and the ties.

    Tied output weights that an input leaves to its ``config.json`` are added to its tensors. Raises ``RecipeError``
    where keys, shapes or dtypes do not agree, and nothing in the recipe says what to do.
    """
    tied_away = _with_tied_heads(inputs, reference)
    owner = inputs[reference]
    keys = list(dict.fromkeys(key for each in (owner, *inputs.values()) for key in each.tensors))
    by_key: dict[str, Decision] = dict.fromkeys(keys, Decision("left out"))
    open_keys: list[str] = []
    for key in keys:
        if key in tied_away:
            by_key[key] = Decision("left out", why=f"{quoted(reference)} ties it to {quoted(tied_away[key])}")
        else:
            given = _given(recipe, key, inputs, reference)
            if given is None:
                open_keys.append(key)
            else:
                by_key[key] = given
    _refuse_unused_patterns(recipe, keys, inputs)
    settings = KeySettings(recipe, open_keys)
    missing: dict[str, list[str]] = {}
    for key in open_keys:
        chosen = settings.chosen(key)
        if chosen.take:
            by_key[key] = _taken(recipe, key, chosen.take, inputs, chosen.rule)
            continue
        by_key[key], lacking = _merged(recipe, key, chosen, inputs, reference)
        if lacking:
            missing[key] = lacking
    if missing:
        raise _missing_error(recipe, missing, inputs, reference)
    tied_to, notes = _tie(by_key, inputs, reference, tied_away)
    return Decisions(by_key, settings, tied_to, tuple(notes))


def _with_tied_heads(inputs: Mapping[str, AlignedInput], reference: str) -> dict[str, str]:
    """Add output weights that an input leaves to its tie; return those that the reference leaves to its own.

    They are merged with the embedding, which they must equal in each input that has both.
    """
    head = inputs[reference].head
    tied_away = {}
    if head is not None and head.head not in inputs[reference].tensors:
        tied_away[head.head] = head.embedding
    for each in inputs.values():
        own = each.head
        if own is None or own.head in each.tensors or own.head in tied_away:
            continue
        if any(own.head in other.tensors for other in inputs.values()):
            each.tensors[own.head] = each.tensors[own.embedding]
    return tied_away


def _given(recipe: MergeRecipe, key: str, inputs: Mapping[str, AlignedInput], reference: str) -> Decision | None:
    """Return the decision about a key that is not merged by ``copy`` or ``only``, or None for any other."""
    for number, item in enumerate(recipe.copy):
        if matches_any(map(parse_pattern, item.keys), key):
            if key not in inputs[item.source].tensors:
                raise recipe.places.error(
                    f"{quoted(key)} is not in {quoted(item.source)}, which it is copied from", "copy", number
                )
            return Decision("taken", (item.source,), f"copy from {quoted(item.source)}")
    if recipe.only and not matches_any(map(parse_pattern, recipe.only), key):
        why = f"not in {'only' if recipe.places.is_named else '--only'}"
        if key in inputs[reference].tensors:
            return Decision("taken", (reference,), why)
        return Decision("left out", why=f"{why}, and {quoted(reference)} does not have it")
    return None


def _refuse_unused_patterns(recipe: MergeRecipe, keys: Sequence[str], inputs: Mapping[str, AlignedInput]) -> None:
    """Raise ``RecipeError`` for a pattern of ``only``, of ``copy``, or of an ``on_mismatch``, that fits no key."""
    rows: list[tuple[str, str, TomlPath, Sequence[str]]] = [(text, "only", ("only",), keys) for text in recipe.only]
    for number, item in enumerate(recipe.copy):
        rows += [(text, "copy", ("copy", number), keys) for text in item.keys]
    for each in recipe.inputs:
        if isinstance(each.on_mismatch, Mapping):
            own = list(inputs[each.name].tensors)
            path = (*input_path(recipe, each.name), "on_mismatch")
            rows += [(text, "on_mismatch", path, own) for text in each.on_mismatch]
    for text, name, path, among in rows:
        pattern = parse_pattern(text)
        if not any(pattern.match(key) for key in among):
            reason = f"{name}: {quoted(text)} fits none of {plural(len(among), 'key')}"
            raise recipe.places.error(reason, *path, hint=suggest_pattern(pattern, among, "the inputs"))


def _taken(recipe: MergeRecipe, key: str, source: str, inputs: Mapping[str, AlignedInput], why: str) -> Decision:
    if key in inputs[source].tensors:
        return Decision("taken", (source,), why)
    number = next(at for at, each in enumerate(recipe.settings) if each.take == source)
    raise recipe.places.error(f"{quoted(key)} is not in {quoted(source)}, which it is taken from", "set", number)


def _merged(
    recipe: MergeRecipe, key: str, chosen: Chosen, inputs: Mapping[str, AlignedInput], reference: str
) -> tuple[Decision, list[str]]:
    """Return the decision about a key that no rule takes from one input, and the inputs that wrongly lack it."""
    uses_base = chosen.method.uses_base != "never" and bool(recipe.base)
    is_apart = recipe.is_base_apart or uses_base
    names = [each.name for each in recipe.inputs if not (is_apart and each.name == recipe.base)]
    having = [name for name in names if key in inputs[name].tensors]
    in_reference = key in inputs[reference].tensors
    lacking = [name for name in inputs if key not in inputs[name].tensors]
    if chosen.method.name == "passthrough":  # which joins inputs of different keys
        lacking = [] if having else lacking
    decision = Decision("merged", tuple(having), chosen.rule, chosen, has_base=uses_base)
    if not lacking:
        return _by_dtype(recipe, key, decision, inputs, reference), []
    only = f"only in {listed([name for name in inputs if name not in lacking])}"
    if recipe.on_missing == "error":
        return decision, lacking
    if recipe.on_missing == "drop" or (recipe.on_missing == "base" and not in_reference):
        return Decision("left out", why=f'{only}, on_missing = "{recipe.on_missing}"'), []
    if recipe.on_missing == "base":
        return Decision("taken", (reference,), f'{only}, on_missing = "base"'), []
    if uses_base and recipe.base in lacking and chosen.method.uses_base == "always":
        raise recipe.places.error(
            f"{quoted(key)} is not in the base, and {chosen.method.name} needs a base",
            "on_missing",
            hint=f"{recipe.places.setting('on_missing', 'base')} leaves it out, or a [[set]] of a recipe takes it: "
            'take = "NAME"',
        )
    present = replace(decision, has_base=uses_base and recipe.base not in lacking, why=f"{chosen.rule}, {only}")
    if not having:
        return Decision("taken", (reference,), only), []
    return _by_dtype(recipe, key, present, inputs, reference), []


def _by_dtype(
    recipe: MergeRecipe, key: str, decision: Decision, inputs: Mapping[str, AlignedInput], reference: str
) -> Decision:
    """Return the decision, or for a tensor without floating-point numbers what ``non_float`` says."""
    names = [*([recipe.base] if decision.has_base else []), *decision.inputs]
    found = {name: inputs[name].tensors[key] for name in names}
    kinds = {name: _kind(one) for name, one in found.items()}
    if len(set(kinds.values())) > 1:
        first, other = names[0], next(name for name in names if kinds[name] != kinds[names[0]])
        raise recipe.places.error(
            f"{quoted(key)} is {found[first].info} in {quoted(first)} and {found[other].info} in {quoted(other)}",
            *input_path(recipe, other),
            hint=f'one of them is damaged: a [[set]] of a recipe with keys = "{key}" and take = "NAME" chooses one',
        )
    kind = kinds[names[0]]
    if kind == "float":
        return decision
    if kind == "complex":
        if decision.chosen is not None and not decision.chosen.method.takes_complex:
            raise recipe.places.error(
                f"{quoted(key)} is {found[names[0]].info}, and {decision.chosen.method.name} takes no complex numbers",
                "method",
                hint='a [[set]] of a recipe with method = "linear" for it, or take = "NAME"',
            )
        return decision
    return _not_merged(recipe, key, decision, found, reference if key in inputs[reference].tensors else names[0])


def _not_merged(
    recipe: MergeRecipe, key: str, decision: Decision, found: Mapping[str, Ingredient], reference: str
) -> Decision:
    """Return the decision about integers, booleans and other values that no method computes with."""
    names = list(found)
    if recipe.non_float == "max" and len(names) > 1:
        return replace(decision, inputs=tuple(names), why='the largest, non_float = "max"', chosen=None, has_base=False)
    if recipe.non_float != "error" or len(names) == 1:
        first_input = next(each.name for each in recipe.inputs if each.name in names)
        taken = first_input if recipe.non_float == "first" else reference
        return Decision("taken", (taken,), f'no float, non_float = "{recipe.non_float}"')
    first = found[names[0]]
    for name in names[1:]:
        other = found[name]
        if (other.info.dtype, other.info.shape) != (first.info.dtype, first.info.shape):
            raise recipe.places.error(
                f"{quoted(key)} is {first.info} in {quoted(names[0])} and {other.info} in {quoted(name)}, and is not "
                "merged, because it has no floating-point numbers",
                "non_float",
                hint='non_float = "base", "first" or "max" chooses one'
                if recipe.places.is_named
                else "--param non_float=base, first or max chooses one",
            )
    if any(one.recipe is not None for one in found.values()):
        return Decision("taken", (names[0],), "no float, made by rules")
    equals = tuple(source for name in names[1:] for source in found[name].sources)
    return Decision("taken", (names[0],), "no float, equal in all", equals=equals)


def _kind(one: Ingredient) -> str:
    code = one.info.dtype
    if code not in CASTABLE:
        return "other"
    return "complex" if DTYPES[code].parts > 1 else "float" if is_float(code) else "integer"


def _missing_error(
    recipe: MergeRecipe, missing: Mapping[str, Sequence[str]], inputs: Mapping[str, AlignedInput], reference: str
) -> RecipeError:
    """Return the error about keys that only some inputs have, with the prefix that explains them if there is one."""
    named = [f"{quoted(key)} (not in {listed(lacking)})" for key, lacking in list(missing.items())[:_MOST_NAMED]]
    more = f" and {len(missing) - _MOST_NAMED:,} more" if len(missing) > _MOST_NAMED else ""
    verb = "is" if len(missing) == 1 else "are"
    hint = (
        'on_missing = "base", "present" or "drop"; or only = [...], or other names by strip and rename of an input'
        if recipe.places.is_named
        else "--param on_missing=base, present or drop; or --only PATTERN, or other names by --param NAME.strip=PREFIX"
    )
    path: TomlPath = ("on_missing",)
    ways = _other_names(recipe, inputs, reference)
    if ways:
        names = list(ways)
        path = input_path(recipe, names[0])
        written = list(dict.fromkeys(ways.values()))
        if recipe.places.is_named:
            written = [f"{way} for {listed([name for name in names if ways[name] == way])}" for way in written]
        separator = ", " if recipe.places.is_named else " "
        hint = f"most names are those of {quoted(reference)} with {separator.join(written)}"
    counted = f"{plural(len(missing), 'key')} {verb} only in some inputs"
    return recipe.places.error(f"{counted}: {', '.join(named)}{more}", *path, hint=hint)


def _other_names(recipe: MergeRecipe, inputs: Mapping[str, AlignedInput], reference: str) -> dict[str, str]:
    """Return what removes or adds a prefix, for each input that then has mostly keys of the reference.

    An input with rules of its own is left out: its keys have other names when another rule looks at them.
    """
    ways: dict[str, str] = {}
    wanted = {key: one.info.shape for key, one in inputs[reference].tensors.items()}
    for name, each in inputs.items():
        own = recipe.input(name)
        if own.strip or own.rename or own.rules:
            continue
        found = {key: one.info.shape for key, one in each.tensors.items()}
        removed, added = count_prefixes(wanted, found)
        (less, losing), (more, gaining) = (
            max(one.items(), key=itemgetter(1), default=("", 0)) for one in (removed, added)
        )
        if 2 * max(losing, gaining) <= len(found) or max(losing, gaining) <= len(wanted.keys() & found):
            continue
        if gaining > losing:
            ways[name] = recipe.places.renaming(f"*={more}*", name)
        elif all(key.startswith(less) for key in found):
            ways[name] = recipe.places.setting("strip", less, name)
        else:
            ways[name] = recipe.places.renaming(f"{less}*=*", name)
    return ways


def _tie(
    by_key: dict[str, Decision], inputs: Mapping[str, AlignedInput], reference: str, tied_away: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Let tied keys of the reference be merged once; return the key that each of the others is tied to, and notes.

    Tensors of an input that are not tied there must be equal.
    """
    tied_to: dict[str, str] = {}
    notes = []
    infos = [replace(one.info, key=key) for key, one in inputs[reference].tensors.items() if one.recipe is None]
    groups = tied_keys(infos)
    head = inputs[reference].head
    if head is not None and head.head in inputs[reference].tensors and not any(head.head in keys for keys in groups):
        groups.append([key for key in by_key if key in (head.embedding, head.head)])
    for keys in groups:
        merged = [key for key in keys if by_key[key].kind == "merged"]
        for key in merged[1:]:
            tied_to[key] = merged[0]
        if merged and len(merged) < len(keys):
            others = [key for key in keys if key not in merged]
            notes.append(
                f"{listed(keys)} are tied in {quoted(reference)}, and {listed(others)} is not merged with them"
            )
    for key, leader in (*tied_to.items(), *tied_away.items()):
        if leader not in by_key or by_key[leader].kind != "merged":
            continue
        pairs = [(each.tensors.get(key), each.tensors.get(leader)) for each in inputs.values()]
        equals = tuple(other.sources[0] for other, own in pairs if other and own and not is_one(other, own))
        by_key[leader] = replace(by_key[leader], equals=(*by_key[leader].equals, *equals))
    return tied_to, notes


def is_one(first: Ingredient, second: Ingredient) -> bool:
    """Return whether two tensors of an input have the same memory; those that are made of others are not compared."""
    if first.recipe is not None or second.recipe is not None or first.sources == second.sources:
        return True
    return first.info.view is not None and first.info.view == second.info.view
