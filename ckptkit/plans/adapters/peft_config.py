"""The ``adapter_config.json`` with which PEFT loads an extracted adapter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.adapters.peft_names import TIED_NAMES, exact_pattern, modules_of, target_modules
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.places import is_url, join, split
from ckptkit.core.text import printable
from ckptkit.errors import OutputError
from ckptkit.formats.directories.adapters import CONFIG
from ckptkit.formats.writing.atomic import output_errors
from ckptkit.formats.writing.state import Target
from ckptkit.formats.writing.targets import prepare_target
from ckptkit.plans.adapters.adapter_formats import PEFT_WEIGHTS
from ckptkit.plans.output import Output
from ckptkit.plans.plan import Plan
from ckptkit.tensor_ops.lora import ExtractLora

__all__ = ["adapter_config", "adapter_config_target"]

_BASE_LAYER_BIAS = ".base_layer.bias"


@contextlib.contextmanager
def adapter_config_target(output: Output) -> Iterator[Target]:
    """Give the target of ``adapter_config.json`` beside the output of ``plan_extract_lora``.

    A directory that does not exist is made, and removed at the end of the block if nothing was written into it. Raises
    ``OutputError`` where PEFT would not find the output under its name, and where the configuration exists
    (without ``force``) or cannot be created.
    """
    directory, name = split(output.path)
    if name != PEFT_WEIGHTS:
        folder = output.path if output.is_directory else directory
        raise OutputError(
            f"PEFT looks for {PEFT_WEIGHTS}",
            hint=f"give the output the name {printable(join(folder, PEFT_WEIGHTS) if folder else PEFT_WEIGHTS)}",
            path=output.path,
        )
    if is_url(directory):
        yield prepare_target(join(directory, CONFIG), force=output.force)
        return
    is_new = False
    with output_errors(directory), contextlib.suppress(FileExistsError, FileNotFoundError):  # prepare_target says more
        os.mkdir(directory)
        is_new = True
    try:
        yield prepare_target(os.path.join(directory, CONFIG), force=output.force)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it has the adapter
                os.rmdir(directory)


def adapter_config(plan: Plan, base: Checkpoint) -> dict[str, object]:
    """Return the ``adapter_config.json`` with which PEFT loads the output of ``plan_extract_lora``; its scale is 1."""
    ranks: dict[str, int] = {}
    is_transposed = False
    saved: dict[str, list[str]] = {}  # module -> the names of its tensors in the adapter
    bias = "none"
    for step in plan.steps:
        name = step.out.key.removeprefix(PEFT_PREFIX)
        operation = step.recipe.operations[-1] if step.recipe is not None else None
        if isinstance(operation, ExtractLora):
            ranks[step.sources[0].key.rpartition(".")[0]] = operation.rank
            is_transposed |= operation.fan_in_fan_out and ".lora_embedding_" not in name
        elif name.endswith(_BASE_LAYER_BIAS):
            bias = "lora_only" if bias == "none" else bias
        else:
            module, _, leaf = name.rpartition(".")
            saved.setdefault(module, []).append(leaf)
    whole = [module for module, leaves in saved.items() if leaves != ["bias"]]
    if len(whole) < len(saved):  # PEFT reads the bias of a layer without factors only with "all"
        bias = "all"
    whole = [module for module in whole if not any(module.startswith(f"{other}.") for other in whole)]
    names = [module.rpartition(".")[2] for module in whole]
    rank = max(ranks.values())
    lower = {exact_pattern(module): own for module, own in ranks.items() if own != rank}
    targets = target_modules(list(ranks), {*base.layers, *modules_of(base)})
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": lower, "alpha_pattern": lower,
        "target_modules": targets, "modules_to_save": whole or None, "bias": bias,
        "ensure_weight_tying": sorted(name for name in names if name in TIED_NAMES) == list(TIED_NAMES),
        "fan_in_fan_out": is_transposed, "inference_mode": True, "task_type": None, "base_model_name_or_path": None,
    }  # fmt: skip
