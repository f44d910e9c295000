"""Names of one module in the files of diffusion models: the original names, and those of diffusers and transformers.

The rules say what ``diffusers.loaders.lora_conversion_utils`` and ``diffusers.loaders.single_file_utils`` do with the
names of Stable Diffusion (1, 2 and XL) and of Flux, and with their CLIP text encoders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

__all__ = ["COMPONENTS", "DENOISER", "diffusers_name", "layers_per_block", "other_names", "split_component"]

DENOISER = "denoiser"
# What the names of one component begin with, in adapters and in files of a whole pipeline. A U-Net and a transformer
# have the same role: kohya calls both lora_unet, and the original files call both diffusion_model.
COMPONENTS: Mapping[str, str] = {
    "unet": DENOISER, "transformer": DENOISER, "diffusion_model": DENOISER, "model.diffusion_model": DENOISER,
    "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2", "text_encoder_3": "text_encoder_3",
    "cond_stage_model.transformer": "text_encoder", "cond_stage_model.model": "text_encoder",
    "conditioner.embedders.0.transformer": "text_encoder", "conditioner.embedders.0.model": "text_encoder_2",
    "conditioner.embedders.1.model": "text_encoder_2",
    "text_encoders.clip_l.transformer": "text_encoder", "text_encoders.clip_g.transformer": "text_encoder_2",
}  # fmt: skip
_LONGEST_FIRST = sorted(COMPONENTS, key=len, reverse=True)

_INPUT = re.compile(r"input_blocks\.(\d{1,4})\.([01])\.(.+)")
_OUTPUT = re.compile(r"output_blocks\.(\d{1,4})\.([012])\.(.+)")
_MIDDLE = re.compile(r"middle_block\.([012])\.(.+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,4})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,4})\.(.+)")
_MID_BLOCK = re.compile(r"mid_block\.(resnets|attentions)\.([01])\.(.+)")
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTSIDE = {  # modules of a U-Net outside of its blocks
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_FLUX_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip
_FLUX_DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear", "txt_attn.proj": "attn.to_add_out", "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2", "txt_mod.lin": "norm1_context.linear",
}  # fmt: skip
_FLUX_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
_OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
# (names before the number of a block, names inside of the block) of the first and the second naming
_STACKS = (
    ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
    ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
    ("transformer.resblocks", "text_model.encoder.layers", _OPEN_CLIP),
    ("transformer.resblocks", "encoder.layers", _OPEN_CLIP),
)


def split_component(name: str) -> tuple[str, str]:
    """Return the prefix in ``COMPONENTS`` that a dotted name begins with, or the empty string, and the rest."""
    for prefix in _LONGEST_FIRST:
        if name.startswith(prefix) and name[len(prefix) : len(prefix) + 1] == ".":
            return prefix, name[len(prefix) + 1 :]
    return "", name


def layers_per_block(modules: Collection[str]) -> int:
    """Return the number of residual layers in a block of a U-Net with these modules, under either naming; else 2."""
    downsamplers = [int(found[1]) for name in modules if (found := _INPUT.fullmatch(name)) and found[3] == "op"]
    if downsamplers:
        return max(min(downsamplers) - 1, 1)
    layers = {found[4] for name in modules if (found := _BLOCK.fullmatch(name)) and found.group(1, 2, 3) == _FIRST}
    if layers:
        return len(layers)
    return max((int(found[1]) for name in modules if (found := _INPUT.fullmatch(name))), default=2)


_FIRST = ("down", "0", "resnets")


def other_names(module: str, layers: int) -> Iterator[str]:
    """Yield the other names of a module, with ``layers`` residual layers in a block of a U-Net."""
    if module.startswith("text_model."):
        yield module.removeprefix("text_model.")
    elif module.startswith(("encoder.layers.", "embeddings.")):
        yield f"text_model.{module}"
    for old, new in (*_OUTSIDE.items(), *_FLUX_OUTSIDE.items()):
        if module in (old, new):
            yield new if module == old else old
    for first, second, inside in _STACKS:
        yield from _in_stack(module, first, second, inside)
        yield from _in_stack(module, second, first, {new: old for old, new in inside.items()})
    yield from _original_to_diffusers(module, layers)
    yield from _diffusers_to_original(module, layers)


def _in_stack(module: str, old: str, new: str, inside: Mapping[str, str]) -> Iterator[str]:
    if module.startswith(f"{old}."):
        number, _, rest = module[len(old) + 1 :].partition(".")
        if number.isdecimal() and rest in inside:
            yield f"{new}.{number}.{inside[rest]}"


def _original_to_diffusers(module: str, layers: int) -> Iterator[str]:
    if found := _INPUT.fullmatch(module):
        block, layer = divmod(int(found[1]) - 1, layers + 1)
        if int(found[1]) == 0:
            return
        if found[3] == "op":
            yield f"down_blocks.{block}.downsamplers.0.conv"
        elif found[2] == "0":
            yield f"down_blocks.{block}.resnets.{layer}.{_RESNET.get(found[3], found[3])}"
        else:
            yield f"down_blocks.{block}.attentions.{layer}.{found[3]}"
    elif found := _OUTPUT.fullmatch(module):
        block, layer = divmod(int(found[1]), layers + 1)
        if found[2] != "0" and found[3] == "conv":
            yield f"up_blocks.{block}.upsamplers.0.conv"
        elif found[2] == "0":
            yield f"up_blocks.{block}.resnets.{layer}.{_RESNET.get(found[3], found[3])}"
        elif found[2] == "1":
            yield f"up_blocks.{block}.attentions.{layer}.{found[3]}"
    elif found := _MIDDLE.fullmatch(module):
        if found[1] == "1":
            yield f"mid_block.attentions.0.{found[2]}"
        else:
            yield f"mid_block.resnets.{int(found[1]) // 2}.{_RESNET.get(found[2], found[2])}"


_ORIGINAL_RESNET = {new: old for old, new in _RESNET.items()}


def _diffusers_to_original(module: str, layers: int) -> Iterator[str]:
    if found := _BLOCK.fullmatch(module):
        side, kind, rest = found[1], found[3], found[5]
        block, layer = int(found[2]), int(found[4])
        position = block * (layers + 1) + layer
        if kind == "downsamplers":
            yield f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        elif kind == "upsamplers":
            # The number depends on whether the block has attention; both are names of this module alone.
            yield from (f"output_blocks.{block * (layers + 1) + layers}.{number}.conv" for number in (1, 2))
        else:
            blocks = f"input_blocks.{position + 1}" if side == "down" else f"output_blocks.{position}"
            yield f"{blocks}.0.{_ORIGINAL_RESNET.get(rest, rest)}" if kind == "resnets" else f"{blocks}.1.{rest}"
    elif found := _MID_BLOCK.fullmatch(module):
        if found[1] == "attentions":
            yield f"middle_block.1.{found[3]}"
        else:
            yield f"middle_block.{2 * int(found[2])}.{_ORIGINAL_RESNET.get(found[3], found[3])}"


def diffusers_name(module: str, layers: int) -> str:
    """Return the name of a module in diffusers or transformers; a name that is not an original one is unchanged."""
    original = (_INPUT, _OUTPUT, _MIDDLE)
    stacks = {old for old, _, _ in _STACKS}
    is_original = (
        any(pattern.fullmatch(module) for pattern in original)
        or module in _OUTSIDE
        or module in _FLUX_OUTSIDE
        or any(module.startswith(f"{old}.") for old in stacks)
    )
    return next(other_names(module, layers), module) if is_original else module
