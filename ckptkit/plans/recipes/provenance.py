"""What an output says about its merge: the recipe, and what each input was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.checkpoint.provenance import PROVENANCE, own_version, provenance_beside
from ckptkit.core.config_files import json_value, read_table_file
from ckptkit.core.files.places import name_of, size_at
from ckptkit.errors import CkptkitError, RecipeError
from ckptkit.formats.writing.targets import real_path
from ckptkit.lazy_patterns import lazy_pattern
from ckptkit.plans.methods.table import method_named
from ckptkit.plans.plan import Plan
from ckptkit.plans.recipes.model import NOT_PARAMETERS, MergeRecipe, Places
from ckptkit.plans.recipes.parse import recipe_from_table
from ckptkit.plans.recipes.writing import recipe_table

__all__ = ["read_provenance", "recorded_recipe", "with_provenance"]

_OTHERS: Final = ("mecha_recipe", "sd_merge_recipe", "sd_merge_models")  # of sd-mecha and of the web UI
_LONGEST = 1_000_000  # characters of what an input says about its own merge
_SHA256 = lazy_pattern(r"[0-9a-f]{64}")  # the name of a large file in the cache of the Hugging Face hub


def with_provenance(
    plan: Plan, recipe: MergeRecipe, roles: Mapping[str, Checkpoint], paths: Mapping[str, str], *, has_recipe: bool
) -> Plan:
    """Return the plan with metadata that says how the output was made.

    Without ``has_recipe``, it has only the sizes and digests of the inputs. Paths are only their last names.
    """
    document: dict[str, Any] = {"ckptkit": own_version()}
    if has_recipe:
        document["recipe"] = recipe_table(_with_names_only(recipe))
        document["defaults"] = {
            name: parameter.default
            for name, parameter in method_named(recipe.method).parameters().items()
            if parameter.default is not None and name not in NOT_PARAMETERS
        }
        document |= {"seed": recipe.seed, "device": recipe.device}
    described = {role: _described(checkpoint, paths.get(role, "")) for role, checkpoint in roles.items()}
    if has_recipe:
        document["inputs"] = {role: {**one, **_nested(roles[role])} for role, one in described.items()}
    else:
        document["inputs"] = [{name: one[name] for name in one if name != "file"} for one in described.values()]
    kept = {name: text for name, text in plan.metadata.items() if name != PROVENANCE and name not in _OTHERS}
    form = {"format": "pt"} if "format" not in kept else {}  # without which older transformers refuse metadata
    return replace(plan, metadata={**form, **kept, PROVENANCE: json.dumps(document)})


def read_provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return what a checkpoint says about the merge that made it, or None.

    A safetensors file says it in its metadata; beside any other file there can be one that says it. Raises
    ``RecipeError`` where the text is not a JSON object.
    """
    text = checkpoint.metadata.get(PROVENANCE)
    if text is not None:
        try:
            document = json_value(text)
        except ValueError as error:
            raise RecipeError(f"the metadata {PROVENANCE} is not JSON: {error}", path=checkpoint.path) from None
        if not isinstance(document, dict):
            raise RecipeError(f"the metadata {PROVENANCE} is not a JSON object", path=checkpoint.path)
        return document
    beside = provenance_beside(checkpoint)
    return None if beside is None else read_table_file(beside, as_json=True)


def recorded_recipe(checkpoint: Checkpoint) -> MergeRecipe:
    """Return the recipe of the merge that made a checkpoint; its paths are only names of files.

    Raises ``RecipeError`` where the checkpoint does not have one, or where it is not valid.
    """
    document = read_provenance(checkpoint)
    if document is None:
        raise RecipeError("it does not say how it was merged", path=checkpoint.path)
    table = document.get("recipe")
    if not isinstance(table, dict):
        hint = "it was written with --no-recipe"
        raise RecipeError("it has the digests of its inputs, and no recipe", hint=hint, path=checkpoint.path)
    try:
        return recipe_from_table(table, Places())
    except CkptkitError as error:
        raise RecipeError(f"its recipe is not valid: {error.reason}", hint=error.hint, path=checkpoint.path) from None


def _with_names_only(recipe: MergeRecipe) -> MergeRecipe:
    """Return the recipe with the last name of each path.

    A base that is not an input begins with ``./``: it must still be a path, and not that of an input of the same name.
    """
    base = recipe.base if recipe.is_base_apart else None
    inputs = tuple(
        replace(
            each,
            path=f"./{_last(each.path)}" if each.name == base else _last(each.path),
            lora=_last(each.lora),
            rules=_last(each.rules),
        )
        for each in recipe.inputs
    )
    return replace(recipe, inputs=inputs)


def _last(path: str) -> str:
    return name_of(path.rstrip("/")) or path


def _described(checkpoint: Checkpoint, path: str) -> dict[str, Any]:
    """Return the file, the size and the digests of an input that are known without reading its tensors.

    ``header`` is the digest of the names, dtypes and shapes. ``sha256`` has the digest of each file by its name, where
    the cache of the hub names its files by them.
    """
    from ckptkit.plans.saved import header_digest

    size = sum(map(size_at, checkpoint.files)) if checkpoint.files else sum(info.nbytes for info in checkpoint.values())
    found: dict[str, Any] = {"size": size, "tensors": len(checkpoint), "header": header_digest(checkpoint.values())}
    known = {name_of(file): name_of(real_path(file)) for file in checkpoint.files}
    digests = {name: digest for name, digest in known.items() if _SHA256.fullmatch(digest)}
    file = {"file": _last(path)} if path else {}
    return {**file, **found, **({"sha256": digests} if digests and len(digests) == len(known) else {})}


def _nested(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the metadata of an input says about its own merge."""
    found = {
        name: text
        for name, text in checkpoint.metadata.items()
        if name in (PROVENANCE, *_OTHERS) and len(text) <= _LONGEST
    }
    return {"metadata": {name: _value(text) for name, text in found.items()}} if found else {}


def _value(text: str) -> object:
    try:
        return json_value(text)
    except ValueError:
        return text
