"""Vision Transformer: the names and shapes of timm and of the files of transformers' ViTForImageClassification."""

from __future__ import annotations

from tests.naming.resnet import Shapes

__all__ = ["hf", "timm"]


def _pair(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def timm(
    layers: int = 12, width: int = 768, inner: int = 3072, *, patch: int = 16, patches: int = 196, classes: int = 1000
) -> Shapes:
    """Return ``vit_base_patch16_224`` of timm in the order of its state_dict."""
    shapes: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, patches + 1, width)}
    shapes |= _pair("patch_embed.proj", (width, 3, patch, patch))
    for layer in range(layers):
        at = f"blocks.{layer}"
        shapes |= _pair(f"{at}.norm1", (width,))
        shapes |= _pair(f"{at}.attn.qkv", (3 * width, width))
        shapes |= _pair(f"{at}.attn.proj", (width, width))
        shapes |= _pair(f"{at}.norm2", (width,))
        shapes |= _pair(f"{at}.mlp.fc1", (inner, width))
        shapes |= _pair(f"{at}.mlp.fc2", (width, inner))
    return shapes | _pair("norm", (width,)) | _pair("head", (classes, width))


def hf(
    layers: int = 12, width: int = 768, inner: int = 3072, *, patch: int = 16, patches: int = 196, classes: int = 1000
) -> Shapes:
    """Return ``google/vit-base-patch16-224`` in the order of its modules."""
    at = "vit.embeddings"
    shapes: Shapes = {f"{at}.cls_token": (1, 1, width), f"{at}.position_embeddings": (1, patches + 1, width)}
    shapes |= _pair(f"{at}.patch_embeddings.projection", (width, 3, patch, patch))
    for layer in range(layers):
        at = f"vit.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            shapes |= _pair(f"{at}.attention.attention.{part}", (width, width))
        shapes |= _pair(f"{at}.attention.output.dense", (width, width))
        shapes |= _pair(f"{at}.intermediate.dense", (inner, width))
        shapes |= _pair(f"{at}.output.dense", (width, inner))
        shapes |= _pair(f"{at}.layernorm_before", (width,))
        shapes |= _pair(f"{at}.layernorm_after", (width,))
    return shapes | _pair("vit.layernorm", (width,)) | _pair("classifier", (classes, width))
