"""Take the files that describe a model along: its configuration and its tokenizer, from an input to an output.

What is taken, and how it changes, is decided before anything is written. ``adapter_config.json`` follows the names of
the modules. Only five statements of ``config.json`` ever change: the dtype and the size of the vocabulary, where those
of the output differ; the quantisation, where it is gone, or gone for some weights; the tie of an embedding, where the
output ends it; and the number of layers, where the output has other layers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from ckptkit.adapters.renamed_config import moved_modules_of, rename_in_config
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import json_value, read_json
from ckptkit.core.dtypes import DTYPES, PLAIN_FLOATS, is_float
from ckptkit.core.files.places import folder_at, is_same_file, join, kind_at, name_of, parent_of
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.ties import tied_keys
from ckptkit.errors import OutputError, PlanError
from ckptkit.formats import errors_about
from ckptkit.formats.directories.adapters import CONFIG as ADAPTER_CONFIG
from ckptkit.formats.directories.listing import ADAPTER_NAMES, list_directory
from ckptkit.formats.directories.model_files import CHAT_TEMPLATES, CODE_SUFFIX, MODEL_CONFIG, find_model_files
from ckptkit.formats.directories.tied_head import TIE_FLAG, embeddings_of, is_head_group, tied_head
from ckptkit.formats.writing.targets import real_path
from ckptkit.plans.carried import Adapted, Carried, target_of
from ckptkit.plans.metadata import StaleNames
from ckptkit.plans.metadata.layouts import pattern_fields
from ckptkit.plans.metadata.moves import moves_of
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan, Source
from ckptkit.plans.quantized.configured import add_quantization, is_quantised, leave_plain
from ckptkit.plans.writing.config_layers import QUANTIZATION, adapt_layers, sections_of
from ckptkit.quantized import quantized_weights
from ckptkit.quantized.configuration import CONFIGURATION_FILES, read_configuration
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["plan_carried"]

_DTYPE_FIELDS = ("dtype", "torch_dtype")  # the name since transformers 4.56, and before
_VOCABULARY = "vocab_size"
_FOUND_BY = {
    "transformers": ("model.safetensors", "pytorch_model.bin"),
    "PEFT": ADAPTER_NAMES,
    "diffusers": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}
_MOST_NAMED = 4


def plan_carried(plan: Plan, output: Output, sources: Mapping[str, Checkpoint]) -> Carried:
    """Return the files that go along from the directory of an input: of the base first, then of the donors.

    Raises ``PlanError`` where no input has such files, and ``FormatError`` where ``config.json`` cannot be read. Raises
    ``OutputError`` where a file of the output directory would be replaced without ``force``.
    """
    first = sources[_base_first(sources)[0]]  # the output is an adapter if this is one
    is_adapter = any(name_of(file) in ADAPTER_NAMES for file in first.files)
    role, directory, found = _find_owner(sources, is_adapter=is_adapter)
    coded = _coded(plan, sources)
    is_plain = not coded and bool(quantized_weights(sources[role]))
    numbers = _plain_weights(plan, sources[role], role)
    names = [name for name in found if not is_plain or name == MODEL_CONFIG or name not in CONFIGURATION_FILES]
    notes = []
    if "base" in sources and role != "base":
        notes.append(f"carried from the directory of the {role}: that of the base has no such files")
    contents: dict[str, bytes] = {}
    adapted: list[Adapted] = []
    config: Mapping[str, object] = {}
    if MODEL_CONFIG in names:
        with errors_about(join(directory, MODEL_CONFIG)):
            config = read_json(folder_at(directory), MODEL_CONFIG)
        new = dict(config)
        adapted, about_dtype = _adapt_dtype(new, plan, sources[role], () if coded else numbers)
        notes += about_dtype
        adapted += _adapt_vocabulary(new, plan, sources[role])
        if plan.layers is not None:
            adapted_layers, about_layers = adapt_layers(new, plan.layers)
            adapted += adapted_layers
            notes += about_layers
        if role in ("base", next(iter(plan.paths), "")) and _unties(plan, sources[role], config, role):
            adapted += _untie(new)
        removed: dict[str, object] = {}
        for path, section in list(sections_of(new)) if is_plain else ():
            if QUANTIZATION in section:
                removed[path + QUANTIZATION] = section.pop(QUANTIZATION)
        changes = list(add_quantization(new, plan))
        changes += leave_plain(new, plan, numbers, coded) if numbers and coded else ()
        for change in changes:
            if isinstance(change, Adapted):
                adapted.append(replace(change, found=removed.pop(change.statement, change.found)))
        adapted += [Adapted(MODEL_CONFIG, statement, section, None) for statement, section in removed.items()]
        notes += [f"{MODEL_CONFIG}: {change}" for change in changes if isinstance(change, str)]
        if adapted:
            contents[MODEL_CONFIG] = (json.dumps(new, indent=2) + "\n").encode()
    if ADAPTER_CONFIG in names:
        adapted += _follow_modules(plan, role, directory, contents)
    carried = Carried(role, directory, tuple(names), contents, tuple(adapted))
    if not output.is_directory:
        for name in names:
            _refuse_false_statement(carried, name, output, sources[role])
            target_of(carried, name, parent_of(output.path), force=output.force)
    notes += map(str, adapted)
    notes += _notes_about_code(directory, config)
    notes += _notes_about_name(output, config, is_adapter=is_adapter)
    if not is_adapter:  # its configuration follows the names, and PEFT asks for no other key
        weights = quantized_weights(sources[role]).weights
        parts = {key for w in weights if is_plain or w.key in numbers.values() for key in w.parts}
        notes += _notes_about_keys(plan, role, sources[role].without(parts) if parts else sources[role])
    notes += _notes_about_names(carried, plan, sources[role])
    return replace(carried, notes=tuple(notes))


def _follow_modules(plan: Plan, role: str, directory: str, contents: dict[str, bytes]) -> list[Adapted]:
    """Let the configuration of an adapter name the modules as the output does."""
    pairs = [(step.sources[0].key, step.out.key) for step in plan.steps if step.sources[0].role == role]
    moved = moved_modules_of(pairs)
    with errors_about(join(directory, ADAPTER_CONFIG)):
        config = read_json(folder_at(directory), ADAPTER_CONFIG)
    changes = dict(rename_in_config(config, moved))
    if changes:
        contents[ADAPTER_CONFIG] = (json.dumps({**config, **changes}, indent=2) + "\n").encode()
    return [Adapted(ADAPTER_CONFIG, name, config[name], value) for name, value in changes.items()]


def _base_first(sources: Collection[str]) -> list[str]:
    return sorted(sources, key=lambda role: role != "base")


def _find_owner(sources: Mapping[str, Checkpoint], *, is_adapter: bool) -> tuple[str, str, list[str]]:
    """Return the role and the directory of the first input with files to carry, and the names of the files."""
    for role in _base_first(sources):
        checkpoint = sources[role]
        parents = [parent_of(file) or "." for file in checkpoint.files[:1]]
        if parents and kind_at(checkpoint.path) == "folder":
            parents.append(checkpoint.path)
        for directory in parents:
            names = find_model_files(list_directory(folder_at(directory)).files)
            if not is_adapter:  # beside whole weights, this file would make transformers look for an adapter
                names = [name for name in names if name != ADAPTER_CONFIG]
            if names:
                return role, directory, names
    raise PlanError("no input has a configuration or a tokenizer beside its weights", hint="leave out --carry")


def _coded(plan: Plan, sources: Mapping[str, Checkpoint]) -> set[str]:
    """Return the keys of the output that hold the codes of a quantised weight."""
    codes = {
        (role, weight.coded): checkpoint[weight.coded].dtype
        for role, checkpoint in sources.items()
        for weight in quantized_weights(checkpoint).weights
        if weight.coded in checkpoint
    }
    # Codes can be stored in the dtype that the numbers get, as bitsandbytes does with bnb_4bit_quant_storage.
    kept = [step for step in plan.steps if step.recipe is None or not _decodes(step.recipe)]
    return {
        step.out.key
        for step in kept
        if any(codes.get((source.role, source.key)) == step.out.dtype for source in step.sources)
    }


def _plain_weights(plan: Plan, owner: Checkpoint, role: str) -> dict[str, str]:
    """Return the weights that are quantised in an input and numbers in the output: new keys to old ones."""
    weights = quantized_weights(owner)
    by_key = {weight.key: weight for weight in weights.weights}
    found: dict[str, str] = {}
    for step in plan.steps if weights else ():
        of_owner = [weights.by_key[s.key] for s in step.sources if s.role == role and s.key in weights.by_key]
        if step.out.dtype not in PLAIN_FLOATS or is_quantised(step):
            continue
        if of_owner and step.recipe is not None and _decodes(step.recipe):
            found[step.out.key] = of_owner[0].key
        elif step.out.key in by_key and not of_owner:  # plain numbers of another input
            found[step.out.key] = step.out.key
    return found


def _decodes(recipe: Recipe) -> bool:
    """Return whether a recipe makes numbers of codes."""
    inner = (item for item in recipe.inputs if isinstance(item, Recipe))
    return any(one.name == "dequantize" for one in recipe.operations) or any(map(_decodes, inner))


def _adapt_dtype(
    config: dict[str, object], plan: Plan, owner: Checkpoint, numbers: Collection[str]
) -> tuple[list[Adapted], list[str]]:
    """Change the dtype in ``config`` where the tensors of the output have another one than those of the input.

    ``numbers`` are the keys of dequantised weights.
    """
    parts = quantized_weights(owner).by_key
    before = {info.dtype for info in owner.values() if info.key not in parts} & PLAIN_FLOATS
    after = {step.out.dtype for step in plan.steps if not is_quantised(step)} & PLAIN_FLOATS
    if {step.out.dtype for step in plan.steps if step.out.key in numbers} == {"F32"} and "F64" not in after:
        after = {"F32"}  # which all other tensors can be loaded as, while another dtype would round these
    if before == after:
        return [], []
    if len(after) != 1:
        stated = [path for path, _, _ in _dtype_fields(config)]
        if not stated:
            return [], []
        floats = sorted({step.out.dtype for step in plan.steps if is_float(step.out.dtype)})
        return [], [
            f"{MODEL_CONFIG}: {stated[0]} was kept: the output has tensors of {', '.join(floats) or 'no float'}"
        ]
    name = DTYPES[after.pop()].torch_name
    adapted = []
    for path, section, key in list(_dtype_fields(config)):
        found = section[key]
        if str(found).removeprefix("torch.") != name:
            section[key] = name
            adapted.append(Adapted(MODEL_CONFIG, path, found, name))
    return adapted, []


def _dtype_fields(config: dict[str, object]) -> Iterator[tuple[str, dict[str, object], str]]:
    """Yield the path of each dtype that a configuration states, the section that holds it, and its key there."""
    for path, section in sections_of(config):
        for key in _DTYPE_FIELDS:
            if isinstance(section.get(key), str):
                yield path + key, section, key


def _adapt_vocabulary(config: dict[str, object], plan: Plan, owner: Checkpoint) -> Iterator[Adapted]:
    """Change the size of the vocabulary in ``config`` where every embedding of that size has another one."""
    sizes: dict[int, set[int]] = {}
    for step in plan.steps:
        if embeddings_of([step.out.key]) and step.out.key in owner:
            sizes.setdefault(owner[step.out.key].shape[0], set()).add(step.out.shape[0])
    for path, section in sections_of(config):
        found = section.get(_VOCABULARY)
        new = sizes.get(found, set()) if isinstance(found, int) else set()
        if len(new) == 1 and found not in new:
            (section[_VOCABULARY],) = new
            yield Adapted(MODEL_CONFIG, path + _VOCABULARY, found, section[_VOCABULARY])


def _unties(plan: Plan, base: Checkpoint, config: Mapping[str, object], role: str) -> bool:
    """Return whether output weights that the base ties to its embedding get other values than the embedding."""
    steps = {step.out.key: step for step in plan.steps}
    head = tied_head({key: info.shape for key, info in base.items()}, config)
    groups = [keys for keys in tied_keys(base.values()) if is_head_group(keys)]
    groups += [[head.embedding, head.head]] if head is not None else []
    for keys in groups:
        made = [steps[key] for key in keys if key in steps]
        if all(step.is_copy and step.sources[0] == Source(role, step.out.key) for step in made):
            continue  # as it was
        if len({(step.sources, step.recipe) for step in made}) > 1:
            return True
    return False


def _untie(config: dict[str, object]) -> Iterator[Adapted]:
    """Change every statement of a tie in ``config``; add one where there is none, because the default can be a tie."""
    stated = [(path, section) for path, section in sections_of(config) if section.get(TIE_FLAG) is True]
    for path, section in stated or [("", config)]:
        yield Adapted(MODEL_CONFIG, path + TIE_FLAG, section.get(TIE_FLAG), False)
        section[TIE_FLAG] = False


def _notes_about_code(directory: str, config: Mapping[str, object]) -> Iterator[str]:
    listing = list_directory(folder_at(directory))
    code = [name for name in listing.files if name.endswith(CODE_SUFFIX)]
    if code:
        yield f"not carried, because {'they are' if code[1:] else 'it is'} code: {listed(code, _MOST_NAMED)}"
    if "auto_map" in config:
        yield f"{MODEL_CONFIG} names code of its own (auto_map), which is not carried: read it before you copy it"
    if CHAT_TEMPLATES in listing.folders:
        yield f"not carried, because it is a folder: {quoted(CHAT_TEMPLATES)}"


def _notes_about_name(output: Output, config: Mapping[str, object], *, is_adapter: bool) -> Iterator[str]:
    library = "PEFT" if is_adapter else "diffusers" if "_diffusers_version" in config else "transformers"
    expected = _FOUND_BY[library]
    name = "model.safetensors" if output.is_directory else name_of(output.path)
    if output.format == "dcp":
        yield f"from_pretrained does not read a distributed checkpoint: convert it to {expected[0]} for that"
    elif name not in expected:
        yield f"from_pretrained of {library} does not find {quoted(name)}: it looks for {' and '.join(expected)}"


def _notes_about_keys(plan: Plan, role: str, owner: Checkpoint) -> Iterator[str]:
    """Yield what the configuration cannot know: tensors that have other names or shapes than in its own weights."""
    written = {step.out.key: step.out for step in plan.steps}
    absent = [key for key in owner if key not in written]
    if absent:
        yield (
            f"{plural(len(absent), 'key')} of the {role} {'is' if len(absent) == 1 else 'are'} not in the output "
            f"({listed(absent, _MOST_NAMED)}): if the model has them and does not tie them, from_pretrained draws new "
            f"values"
        )
    other = [key for key, info in owner.items() if key in written and written[key].shape != info.shape]
    if other:
        yield (
            f"{plural(len(other), 'tensor')} of another shape than in the {role}: compare {MODEL_CONFIG} with "
            f"{listed(other, _MOST_NAMED)}"
        )


def _notes_about_names(carried: Carried, plan: Plan, owner: Checkpoint) -> Iterator[str]:
    """Yield where a carried configuration names modules that have another name in the output."""
    moves = moves_of(carried.role, {}, owner.keys(), plan.steps)
    stale = StaleNames.of(moves)
    if not stale:
        return
    for name in carried.names:
        if name in CONFIGURATION_FILES or name == ADAPTER_CONFIG:
            has_list = any(isinstance(change.written, list) for change in carried.adapted if change.file == name)
            changed = None if has_list else carried.contents.get(name)  # a list of the new names is not stale
            content = read_json(folder_at(carried.directory), name) if changed is None else json_value(changed.decode())
            found = stale.found_in(content)
            if found:
                yield f"{name} {found}"
            if name == ADAPTER_CONFIG and (fields := pattern_fields(content)):
                yield f"{name} has patterns of names, which do not follow the tensors: {listed(fields, _MOST_NAMED)}"
    configuration = read_configuration(owner)
    for old, new in ((old, new) for old, all_new in moves.copies.items() for new in all_new if old != new):
        if configuration.leaves_plain(old) != configuration.leaves_plain(new):
            yield (
                f"the list of modules that are not quantised does not follow the new names: it has {quoted(old)}, and "
                f"not {quoted(new)}"
                if configuration.leaves_plain(old)
                else f"the list of modules that are not quantised also has {quoted(new)}, which was {quoted(old)}"
            )
            return


def _refuse_false_statement(carried: Carried, name: str, output: Output, owner: Checkpoint) -> None:
    """Raise ``OutputError`` where a file of the input would change, and the weights that it describes would not."""
    path = join(parent_of(output.path), name)
    is_of_input = real_path(path) == real_path(join(carried.directory, name))
    if name in carried.contents and is_of_input and not any(is_same_file(file, output.path) for file in owner.files):
        raise OutputError(
            "belongs to an input, whose weights it would no longer describe",
            hint="write the output into another directory",
            path=path,
        )
