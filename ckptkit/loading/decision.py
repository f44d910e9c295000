"""Phase 1 of ``load_into``: which tensors ckptkit copies and which the model's own code loads. Nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property

from ckptkit.comparison.own_code import is_below, modules_with_own_code
from ckptkit.core.cast_losses import describe_overflow, wider_dtype
from ckptkit.core.checkpoint import Checkpoint, Payload, memory_order
from ckptkit.core.files.payloads import announce, same_bytes
from ckptkit.core.text import quoted
from ckptkit.core.ties import shared_keys, tied_keys
from ckptkit.core.torch_bridge import TensorPayload, is_dtensor, is_extra_state
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import ModelError, PlanError
from ckptkit.loading.regions import held_memory, local_part, region_of
from ckptkit.loading.watch import Watch
from ckptkit.plans.overlays.overlay import OwnLoading
from ckptkit.plans.plan import Step
from ckptkit.plans.produce import ComputedPayload, Producer

__all__ = [
    "Copy",
    "Decision",
    "Handing",
    "decide",
    "followers",
    "local_payload",
    "refuse_meta",
    "refuse_overflow",
    "uncast",
]


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor that ckptkit copies itself: from ``payload`` into the memory of ``target``."""

    key: str
    target: Tensor
    payload: Payload


@dataclass(frozen=True, slots=True)
class Decision:
    """The tensors that ckptkit copies, and those that ``load_state_dict`` gets for the model's own code.

    ``own_code`` has the paths of the modules with such code. The keys ``overlapping`` share memory in part, so their
    values can only be compared after all copies.
    """

    copies: tuple[Copy, ...]
    handed: tuple[Step, ...]
    own_code: tuple[str, ...]
    overlapping: frozenset[str]

    @property
    def runs_code(self) -> bool:
        """Whether ``load_state_dict`` of the model runs."""
        return bool(self.handed or self.own_code)


@dataclass(frozen=True)
class Handing:
    """What is loaded, and under which names ``load_state_dict`` gets it.

    Attributes:
        steps: The steps of the plan that take a value from the checkpoint.
        own: What the model's own code does with the checkpoint.
    """

    steps: tuple[Step, ...]
    own: OwnLoading

    def name(self, key: str) -> str:
        """Return the name under which the model's own code wants the value of a key."""
        return self.own.moved.get(key, key)

    @cached_property
    def versions_hold(self) -> bool:
        """Whether the names are those of the file, so that its module versions belong to them."""
        plain = (step for step in self.steps if step.tied_to is None)
        return all(self.name(step.out.key) == step.sources[0].key for step in plain)

    def loaded(self) -> dict[str, None]:
        """Return every key of the model that gets a value."""
        return dict.fromkeys((*(step.out.key for step in self.steps), *self.own.computed))


def decide(model: Module, base: Checkpoint, watch: Watch, producer: Producer, handing: Handing) -> Decision:
    """Return how each tensor is loaded in place. Raises ``ModelError`` where one cannot be."""
    own_code = modules_with_own_code(model)
    steps = handing.steps
    tied = followers(base, producer, steps)
    moved = _moved_within(base, producer, steps)
    copies: list[Copy] = []
    handed: list[Step] = []
    for step in steps:
        key = step.out.key
        tensor = watch.tensors.get(key)
        if tensor is None or is_extra_state(key) or is_below(key, own_code) or not _is_copied(watch, base, key):
            if tensor is None:
                _refuse_unloadable(base, producer, step, own_code)
            handed.append(step)
        elif key not in tied:
            target = held_memory(tensor)
            assert target is not None  # noqa: S101 - _is_copied has asked for it
            _refuse_unwritable(key, target)
            copies.append(Copy(key, target, moved.get(key) or local_payload(producer, step, tensor)))
    announce(copy.payload for copy in copies)
    overlapping = set(shared_keys({copy.key: base[copy.key] for copy in copies}))
    overlapping.update(copy.key for copy in copies if _may_overlap_itself(copy.target))
    return Decision(tuple(copies), tuple(handed), own_code, frozenset(overlapping))


def refuse_meta(base: Checkpoint, watch: Watch) -> None:
    """Raise ``ModelError`` where a tensor of the model is on the meta device, and could not hold a value."""
    for name, tensor in watch.tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"{quoted(name)} is on the meta device and cannot hold a value"
                if name in base
                else f"{quoted(name)} is on the meta device, and no checkpoint has a buffer that is not persistent",
                hint="pass assign=True, which gives the model new tensors, or call model.to_empty(device=...) first"
                if name in base
                else "build the model on a real device",
            )


def refuse_overflow(producer: Producer, steps: Sequence[Step], path: str) -> None:
    """Raise ``PlanError`` where a cast to the dtype of the model would make inf of finite values."""
    losses = [producer.loss(step) for step in steps if not step.is_copy]
    overflowed = [loss for loss in losses if loss is not None and loss.overflowed]
    if overflowed:
        wider = wider_dtype(overflowed)
        way = f"a model of {wider} holds them; " if wider else ""
        raise PlanError(describe_overflow(overflowed), hint=f"{way}allow_overflow=True loads them anyway", path=path)


def uncast(step: Step, donor: Checkpoint) -> Step:
    """Return the step without the cast to the dtype of the model; a cast that a rule asked for stays."""
    from ckptkit.tensor_ops.recipes import recipe_dtype

    dtypes = [donor[source.key].dtype for source in step.sources]
    dtype = dtypes[0] if step.recipe is None else recipe_dtype(step.recipe, dtypes)
    by_rule = step.recipe is not None and step.recipe.operations[-1].name == "cast"
    return replace(step, out=replace(step.out, dtype=dtype), is_cast=by_rule)


def _is_copied(watch: Watch, base: Checkpoint, key: str) -> bool:
    """Return whether a tensor is memory that ckptkit can write, and is what ``state_dict()`` shows at the key."""
    tensor, info = watch.tensors[key], watch.infos[key]
    return held_memory(tensor) is not None and (is_dtensor(tensor) or info == base[key])


def _may_overlap_itself(tensor: Tensor) -> bool:
    return memory_order(tuple(tensor.shape), tuple(tensor.stride())) is None


def _refuse_unwritable(key: str, tensor: Tensor) -> None:
    import torch

    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ModelError(
            f"{quoted(key)} was made in inference mode, and cannot be changed outside it",
            hint="call load_into in torch.inference_mode()",
        )
    if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ModelError(
            f"{quoted(key)} is an expanded tensor: several of its elements are one place in memory",
            hint="give the model a tensor with memory for each element: tensor.clone()",
        )
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        raise ModelError(f"{quoted(key)} cannot hold a value: its memory was freed")


def _refuse_unloadable(base: Checkpoint, producer: Producer, step: Step, own_code: Sequence[str]) -> None:
    """Raise ``ModelError`` for a new value of a tensor that ``state_dict()`` makes and ``load_state_dict`` cannot set.

    The modules of bitsandbytes in four bits have such tensors: their codes would be loaded without their scales.
    """
    key = step.out.key
    if is_extra_state(key) or is_below(key, own_code):
        return
    if base[key].kind != "dense" or not same_bytes(base.payload(key), producer.payload(step)):
        raise ModelError(
            f"{quoted(key)} is neither a parameter nor a buffer of the model, and load_state_dict does not set it",
            hint="load it with the library of the module, such as from_pretrained of transformers",
        )


def followers(base: Checkpoint, producer: Producer, steps: Sequence[Step]) -> AbstractSet[str]:
    """Return the keys that get their value through another key, because the model ties both.

    Raises ``ModelError`` where the checkpoint has two values for one tensor of the model.
    """
    by_key = {step.out.key: step for step in steps}
    found: set[str] = set()
    for first, *others in tied_keys(base[key] for key in by_key):
        for other in others:
            if not _is_same_value(producer, by_key[first], by_key[other]):
                raise ModelError(
                    f"{quoted(first)} and {quoted(other)} are one tensor of the model, "
                    "and the checkpoint has two values for it",
                    hint="leave one of both out with a rule, or untie them in the model",
                )
        found.update(others)
    return found


def _is_same_value(producer: Producer, first: Step, second: Step) -> bool:
    if (first.sources, first.recipe) == (second.sources, second.recipe):
        return True
    donor = producer.roles[first.sources[0].role]
    if first.recipe is None and second.recipe is None:
        one, other = (donor[step.sources[0].key] for step in (first, second))
        if one.view is not None and (one.view, one.shape, one.dtype) == (other.view, other.shape, other.dtype):
            return True
    return same_bytes(producer.payload(first), producer.payload(second))


def _moved_within(base: Checkpoint, producer: Producer, steps: Sequence[Step]) -> dict[str, Payload]:
    """Return copies of the values that come from memory of the model which another value overwrites."""
    written = {view.storage for step in steps if (view := base[step.out.key].view) is not None}
    moved: dict[str, Payload] = {}
    for step in steps:
        donor = producer.roles[step.sources[0].role]
        if donor.files:  # storages of files are numbered, those of tensors have an address
            continue
        places = [donor[source.key].view for source in step.sources]
        if step.recipe is None and places[0] == base[step.out.key].view:
            continue
        if any(place is not None and place.storage in written for place in places):
            tensor = producer.tensor(step)
            moved[step.out.key] = TensorPayload(tensor.clone(), step.out.nbytes)
    return moved


def local_payload(producer: Producer, step: Step, tensor: Tensor) -> Payload:
    """Return the bytes for a tensor of the model; for a DTensor, those of the part that this process holds."""
    payload = producer.payload(step)
    part = local_part(tensor) if is_dtensor(tensor) else None
    held = held_memory(tensor)
    if part is not None and held is not None and math.prod(part.sizes) != held.numel():
        raise ModelError(
            f"the shard of {quoted(step.out.key)} has the shape {list(held.shape)}, not {list(part.sizes)}",
            hint="load_into can load a DTensor whose placements say what each shard holds",
        )
    if part is None or part.sizes == step.out.shape:
        return payload
    from ckptkit.values.cast_payload import CastPayload

    found = producer.roles[step.sources[0].role][step.sources[0].key]
    stored = payload.source if isinstance(payload, CastPayload) else payload
    region = region_of(stored, found, part) if step.recipe is None else None
    if region is not None and isinstance(payload, CastPayload):
        return CastPayload(region, replace(found, shape=part.sizes), replace(step.out, shape=part.sizes))
    if region is not None:
        return region
    box = tuple(slice(at, at + size) for at, size in zip(part.offsets, part.sizes, strict=True))
    nbytes = replace(step.out, shape=part.sizes).nbytes
    return ComputedPayload(nbytes, lambda: producer.tensor(step)[box])
