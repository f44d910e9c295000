"""ResNet: the names and shapes of torchvision, which timm's plain ResNets share, and of detectron2."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

__all__ = ["Shapes", "detectron2", "torchvision"]

_NORM = ("weight", "bias", "running_mean", "running_var")
_RESNET50 = (3, 4, 6, 3)


def _norm(name: str, width: int, *, counters: bool = True) -> Shapes:
    counter: Shapes = {f"{name}.num_batches_tracked": ()} if counters else {}
    return {f"{name}.{leaf}": (width,) for leaf in _NORM} | counter


def _convolutions(planes: int, ins: int, *, bottleneck: bool) -> list[tuple[int, ...]]:
    if bottleneck:
        return [(planes, ins, 1, 1), (planes, planes, 3, 3), (planes * 4, planes, 1, 1)]
    return [(planes, ins, 3, 3), (planes, planes, 3, 3)]


def torchvision(
    blocks: tuple[int, ...] = _RESNET50, width: int = 64, classes: int = 1000, *, bottleneck: bool = True
) -> Shapes:
    """Return ``torchvision.models.resnet50()`` in its order; timm's ``resnet50`` has the same names."""
    shapes: Shapes = {"conv1.weight": (width, 3, 7, 7)} | _norm("bn1", width)
    ins = width
    for stage, count in enumerate(blocks, start=1):
        planes = width * 2 ** (stage - 1)
        for block in range(count):
            at = f"layer{stage}.{block}"
            convolutions = _convolutions(planes, ins, bottleneck=bottleneck)
            for number, shape in enumerate(convolutions, start=1):
                shapes |= {f"{at}.conv{number}.weight": shape} | _norm(f"{at}.bn{number}", shape[0])
            outs = convolutions[-1][0]
            if block == 0 and (stage > 1 or ins != outs):
                shapes |= {f"{at}.downsample.0.weight": (outs, ins, 1, 1)} | _norm(f"{at}.downsample.1", outs)
            ins = outs
    return shapes | {"fc.weight": (classes, ins), "fc.bias": (classes,)}


def detectron2(
    blocks: tuple[int, ...] = _RESNET50,
    width: int = 64,
    classes: int | None = 1000,
    *,
    bottleneck: bool = True,
    frozen: bool = False,
) -> Shapes:
    """Return detectron2's ``ResNet``: a classifier with ``linear`` and BN, or the frozen backbone of a detector."""
    shapes: Shapes = {"stem.conv1.weight": (width, 3, 7, 7)} | _norm("stem.conv1.norm", width, counters=not frozen)
    ins = width
    for stage, count in enumerate(blocks, start=2):
        planes = width * 2 ** (stage - 2)
        for block in range(count):
            at = f"res{stage}.{block}"
            convolutions = _convolutions(planes, ins, bottleneck=bottleneck)
            outs = convolutions[-1][0]
            if ins != outs:
                shapes |= {f"{at}.shortcut.weight": (outs, ins, 1, 1)}
                shapes |= _norm(f"{at}.shortcut.norm", outs, counters=not frozen)
            for number, shape in enumerate(convolutions, start=1):
                shapes |= {f"{at}.conv{number}.weight": shape}
                shapes |= _norm(f"{at}.conv{number}.norm", shape[0], counters=not frozen)
            ins = outs
    return shapes if classes is None else shapes | {"linear.weight": (classes, ins), "linear.bias": (classes,)}
