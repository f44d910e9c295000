"""Names and scales of an adapter in the file of another format: those of PEFT, kohya and diffusers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.adapters.model import AdaptedModule
from ckptkit.adapters.module_names import COMPONENTS, DENOISER, diffusers_name, split_component
from ckptkit.adapters.named import NamedModule
from ckptkit.adapters.peft_names import exact_pattern, target_modules
from ckptkit.core.text import listed, printable, quoted, shell_word
from ckptkit.errors import RuleError
from ckptkit.tensor_ops.lora import as_f32
from ckptkit.tensor_ops.operation import Shape

__all__ = ["FOLD_CALL", "FOLD_IT", "OutputModule", "alpha_of", "lora_fields", "output_modules", "refuse_replacements"]

FOLD_IT = "fold it: ckpt merge BASE ADAPTER -o OUT --method lora"
FOLD_CALL = "fold it: merge_lora(base, adapter, out)"
_UNET = re.compile(
    r"(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|time_embedding|add_embedding"
    r"|time_embed|label_emb|conv_in|conv_out|out)(?:\.|$)"
)
_TRANSFORMER = re.compile(
    r"(?:transformer_blocks|single_transformer_blocks|double_blocks|single_blocks|joint_blocks|context_embedder"
    r"|x_embedder|time_text_embed|img_in|txt_in|time_in|vector_in|guidance_in|final_layer|norm_out|proj_out)(?:\.|$)"
)
_TEXT = re.compile(r"(?:text_model\.)?(?:encoder\.layers|embeddings|final_layer_norm)\.|text_projection$")
_FLAT_HEADS = {DENOISER: "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_",
               "text_encoder_3": "lora_te3_", "": "lycoris_"}  # fmt: skip
_KOHYA_ROLES = {
    "A": ".lora_down.weight", "B": ".lora_up.weight", "mid": ".lora_mid.weight", "magnitude": ".dora_scale",
}  # fmt: skip
_PEFT_ROLES = {
    "A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector",
    "embedding A": ".lora_embedding_A", "embedding B": ".lora_embedding_B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputModule:
    """One module in the output: its keys by role, its name there, and the model of a pipeline that it belongs to.

    ``model`` is the word before the names of diffusers, such as ``unet``, or empty. ``alpha`` is the key of its alpha
    in a file of kohya, or empty.
    """

    adapted: AdaptedModule
    name: str
    model: str
    keys: Mapping[str, str]
    alpha: str = ""


def output_modules(modules: Mapping[str, NamedModule], to: str, layers: int, *, is_placed: bool) -> list[OutputModule]:
    """Return the modules as a file of the format ``to`` names them.

    ``modules`` are the modules of an adapter by their path: in the base if ``is_placed``, else as the file names them.
    ``layers`` is the number of residual layers in a block of the U-Net. Raises ``RuleError`` for a kind of adapter or
    a name that the format cannot hold, and for a name with ``_`` for ``.``, which only the base can resolve.
    """
    _refuse_kinds(modules.values(), to)
    flat = [each for each in modules.values() if each.is_flat]
    if flat and not is_placed and to != "kohya":
        raise RuleError(
            f"{quoted(_key(flat[0]))} has '_' for '.', and only the base tells which is which",
            hint="give --base BASE",
            call="give base, the model that the adapter belongs to",
        )
    named = [(module, *_model_and_name(path, module, layers, to)) for path, module in modules.items()]
    if to == "peft":
        models = sorted({module.prefix for module, _, _ in named})
        if len(models) > 1:
            keep = shell_word(f"{models[0]}*")
            raise RuleError(
                f"the adapter changes {len(models)} models ({', '.join(models)}), and one of PEFT has one",
                hint=f"write the part of one model first: ckpt remap ADAPTER -o OUT --keep {keep}",
            )
    is_two = any(model == "text_encoder_2" for _, model, _ in named)
    outputs = [_output(module, model, name, to, is_two=is_two) for module, model, name in named]
    seen: dict[str, NamedModule] = {}
    for output, (module, _, _) in zip(outputs, named, strict=True):
        key = next(iter(output.keys.values()))
        if key in seen:
            raise RuleError(f"{quoted(_key(seen[key]))} and {quoted(_key(module))} would both be called {quoted(key)}")
        seen[key] = module
    return outputs


def _key(module: NamedModule) -> str:
    return next(iter(module.adapted.factors.values()))


def _refuse_kinds(modules: Collection[NamedModule], to: str) -> None:
    for module in modules:
        adapted, key = module.adapted, _key(module)
        if adapted.kind not in ("lora", "dora") or adapted.parameter != "weight":
            raise RuleError(
                f"{quoted(key)} belongs to an adapter of the kind {adapted.kind}, which can be folded, not converted",
                hint=FOLD_IT,
                call=FOLD_CALL,
            )
        why = ""
        if to == "kohya" and adapted.bias:
            key, why = adapted.bias, "is an update of a bias"
        elif to == "kohya" and adapted.orientation == "transposed":
            why = "is a factor of an embedding"
        elif to != "kohya" and "mid" in adapted.factors:
            key, why = adapted.factors["mid"], "is a third factor"
        elif to != "kohya" and adapted.per_input:
            key, why = adapted.factors["magnitude"], "has one value for each input"
        if why:
            raise RuleError(
                f"{quoted(key)} {why}, which a file of {to} cannot hold",
                hint=FOLD_IT,
                call=FOLD_CALL,
            )


def _model_and_name(path: str, module: NamedModule, layers: int, to: str) -> tuple[str, str]:
    """Return the model of a pipeline, as diffusers names it, and the name of the module in that model."""
    prefix, rest = split_component(path)
    component = module.component
    name = rest if prefix and COMPONENTS[prefix] == component else path
    if to == "peft":
        return "", name
    own = module.prefix.removesuffix(".")
    name = diffusers_name(name, layers) if to == "diffusers" else name
    guessed = "unet" if _UNET.match(name) else "transformer" if _TRANSFORMER.match(name) else ""
    if not component and not guessed and _TEXT.match(name):
        component = "text_encoder"
    if component.startswith("text_encoder"):
        is_clip = _TEXT.match(name) and not name.startswith(("text_model.", "text_projection"))
        return component, f"text_model.{name}" if is_clip else name
    return (own if own in ("unet", "transformer") else guessed or (component and "unet")), name


def _output(module: NamedModule, model: str, name: str, to: str, *, is_two: bool) -> OutputModule:
    adapted = module.adapted
    if to == "kohya":
        component = {"unet": DENOISER, "transformer": DENOISER}.get(model, model)
        head = "lora_te1_" if component == "text_encoder" and is_two else _FLAT_HEADS[component]
        stem = f"{module.prefix if module.is_flat else head}{name.replace('.', '_')}"
        keys = {role: f"{stem}{_KOHYA_ROLES[role]}" for role in adapted.factors}
        return OutputModule(adapted, name, model, keys, f"{stem}.alpha")
    if to == "diffusers" and not model:
        raise RuleError(
            f"the names of the adapter do not tell a model of diffusers: {quoted(printable(name))}",
            hint="name the model first: ckpt remap ADAPTER -o NEW/adapter_model.safetensors --carry --rename "
            "'base_model.model.*=unet.*'",
        )
    stem = f"{PEFT_PREFIX}{name}" if to == "peft" else f"{model}.{name}"
    kind = "embedding " if adapted.orientation == "transposed" else ""
    keys = {role: f"{stem}{_PEFT_ROLES[kind + role if role in 'AB' else role]}" for role in adapted.factors}
    if adapted.bias:
        keys["bias"] = f"{stem}.lora_B.bias"
    return OutputModule(adapted, name, model, keys)


def alpha_of(scale: float, rank: int) -> float:
    """Return the alpha that gives ``scale`` with ``rank``: an integer, or a number that F32 holds, if one does."""
    exact = scale * rank
    for candidate in (float(round(exact)), as_f32(exact), exact, *_beside(exact)):
        if candidate / rank == scale:
            return candidate
    return exact


def _beside(number: float) -> Sequence[float]:
    return math.nextafter(number, math.inf), math.nextafter(number, -math.inf)


def lora_fields(
    modules: Sequence[OutputModule], shapes: Mapping[str, Shape], others: Collection[str], *, fan_in_fan_out: bool
) -> dict[str, object]:
    """Return the fields of ``LoraConfig`` about ranks, scales and modules, for the names of ``modules``.

    ``r`` and ``lora_alpha`` are the most frequent values, and the patterns name the modules with others. ``others`` are
    the modules of the model, as far as they are known.
    """
    ranks = {module.name: shapes[module.adapted.factors["A"]][0] for module in modules}
    alphas = {module.name: alpha_of(module.adapted.scale, ranks[module.name]) for module in modules}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": _plain(alpha), "bias": "none",
        "target_modules": target_modules(list(ranks), others),
        "rank_pattern": {exact_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {exact_pattern(name): _plain(value) for name, value in alphas.items() if value != alpha},
        "use_dora": any(module.adapted.kind == "dora" for module in modules),
        "lora_bias": any(module.adapted.bias for module in modules),
        "use_rslora": False, "fan_in_fan_out": fan_in_fan_out,
    }  # fmt: skip


def _plain(number: float) -> float | int:
    return int(number) if number.is_integer() else number


def refuse_replacements(keys: Sequence[str], to: str) -> None:
    """Raise ``RuleError`` where an adapter saves tensors whole, and the output is not an adapter of PEFT."""
    if keys and to != "peft":
        raise RuleError(
            f"{listed(keys, 1)} {'replaces' if len(keys) == 1 else 'replace'} values of the base, which a file of {to} "
            "cannot say",
            hint=FOLD_IT,
            call=FOLD_CALL,
        )
