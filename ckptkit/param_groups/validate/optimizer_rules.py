"""Check live groups against the rules of their optimizer class, which torch checks late or never."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted, short_number
from ckptkit.core.torch_optim import OPTIONS, initial_lr, is_set
from ckptkit.param_groups import codes
from ckptkit.param_groups.live import (
    LiveGroup,
    LiveOptimizer,
    Member,
    member_keys,
    member_name,
    member_names,
    unwrap_optimizer,
)
from ckptkit.param_groups.parameters import LiveModel, bare_name
from ckptkit.param_groups.spec.fields import is_tensor
from ckptkit.param_groups.validate.options import BOOKKEEPING, read_number

__all__ = ["check_across_groups", "check_optimizer_rules", "trained_options"]


# torch has no capturable step for these devices.
_NOT_CAPTURABLE = frozenset({"cpu", "mps"})
# MuonWithAuxAdam, the reference implementation of Muon, asserts that a group has exactly these keys.
_MUON_KEYS = {
    True: frozenset({"params", "lr", "momentum", "weight_decay", "use_muon"}),
    False: frozenset({"params", "lr", "betas", "eps", "weight_decay", "use_muon"}),
}


def check_optimizer_rules(live_model: LiveModel, optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    """Yield a finding for each group for which a step fails, or is not the step of the optimizer class."""
    for optimizer in optimizers:
        yield from _check_hidden(live_model, optimizer)
        if optimizer.instance is None:
            yield from _check_muon_groups(live_model, optimizer)
            continue
        yield from _check_mode(live_model, optimizer)
        if optimizer.schema is None:
            continue
        if optimizer.schema.name == "Muon":
            yield from _check_matrices(live_model, optimizer.label, optimizer.members)
        if optimizer.schema.has_shared_state and len(optimizer.groups) > 1:
            yield codes.ONE_GROUP.finding(
                "",
                f"{optimizer.label} has {len(optimizer.groups)} groups but accepts only one, so its next step fails",
                "build the optimizer with all parameters in one group",
            )
        yield from _check_decoupled(optimizer)
        for group in optimizer.groups:
            yield from _check_kernels(live_model, optimizer, group, optimizer.members_of(group))


def _check_matrices(live_model: LiveModel, label: str, members: Sequence[Member]) -> Iterator[Finding]:
    for member in members:
        if member.shape is not None and len(member.shape) != 2:
            yield codes.MATRICES_ONLY.finding(
                member_name(live_model, member),
                f"{member_names(live_model, [member])} {member.shape} in {member.where} is not a matrix, and {label} "
                "steps only matrices: add_param_group() accepts it, but the first step fails",
                "give vectors, embeddings and convolutions to a second optimizer, such as AdamW",
            )


def _is_stepped_by_muon(optimizer: LiveOptimizer, group: LiveGroup) -> bool:
    """Return whether Muon steps a group: the classes of Muon mark the groups that they step in another way."""
    options = group.options
    if "use_muon" in options:
        return bool(options["use_muon"])
    if "algorithm" in options:
        return str(options["algorithm"]).lower() == "muon"
    return optimizer.instance is not None and "muon" in optimizer.class_name.lower() and not options.get("use_fallback")


# What libraries call the layer that makes the logits. The second set has names that small models use for any layer.
_LOGITS = frozenset({"embed_out", "lm_head", "unembed"})
_HEADS = frozenset({"classifier", "fc", "head", "logits", "output", "output_layer", "score"})


def _check_hidden(live_model: LiveModel, optimizer: LiveOptimizer) -> Iterator[Finding]:
    """Yield a finding for each group of Muon that holds embeddings or the output layer."""
    for group in optimizer.groups:
        if not _is_stepped_by_muon(optimizer, group):
            continue
        found = [
            member
            for member in optimizer.members_of(group)
            if len(member.shape or ()) == 2 and _is_outer_weight(live_model, member)
        ]
        if found:
            weights = (
                "the weight of an embedding or output layer"
                if len(found) == 1
                else (f"{len(found):,} weights of embeddings or output layers")
            )
            yield codes.HIDDEN_ONLY.finding(
                member_name(live_model, found[0]),
                f"{group.where} gives Muon {weights}: {member_names(live_model, found)}; Muon is for the matrices of "
                "hidden layers",
                "give embeddings, heads and vectors to a second optimizer, such as AdamW",
            )


def _is_outer_weight(live_model: LiveModel, member: Member) -> bool:
    """Return whether a member is the weight of an embedding, or of the layer that makes the output of a deep model."""
    live = live_model.parameters.get(id(member.tensor))
    for name in () if live is None else (live.name, *live.aliases):
        *path, leaf = bare_name(name).split(".")
        module = live_model.modules.get(".".join(path))
        if module is not None and "Embedding" in type(module).__name__ and leaf == "weight":
            return True
        if path and not any(part.isdigit() for part in path):
            is_deep = any(part.isdigit() for other in live_model.by_name for part in other.split("."))
            if path[-1] in _LOGITS or (path[-1] in _HEADS and is_deep):
                return True
    return False


def _check_mode(live_model: LiveModel, optimizer: LiveOptimizer) -> Iterator[Finding]:
    """Yield a finding if a schedule-free optimizer holds the weights of training, but the model is evaluated."""
    waiting = [group for group in optimizer.groups if group.options.get("train_mode") is True]
    if waiting and not live_model.model.training and getattr(optimizer.instance, "state", None):
        yield codes.TRAIN_MODE.finding(
            "",
            f"{optimizer.label} is in train mode, but the model is in eval mode: the parameters are the points where "
            "gradients are taken, not the averaged weights",
            "call optimizer.eval() before you evaluate or save the model, and optimizer.train() before you train",
        )


def _check_muon_groups(live_model: LiveModel, optimizer: LiveOptimizer) -> Iterator[Finding]:
    """Yield findings about groups with ``use_muon`` that ``MuonWithAuxAdam`` refuses with a bare AssertionError."""
    if not all("use_muon" in group.options for group in optimizer.groups):
        return
    for group in optimizer.groups:
        use_muon = is_set(group.options, "use_muon")
        extra = sorted(str(key) for key in group.options if key not in _MUON_KEYS[use_muon])
        if extra:
            yield codes.OPTION_SET.finding(
                "",
                f"{group.where} has {', '.join(map(quoted, extra))} besides use_muon, but MuonWithAuxAdam accepts "
                f"only the keys {', '.join(sorted(_MUON_KEYS[use_muon]))}",
                "remove the other keys before you build the optimizer",
            )
        for member in optimizer.members_of(group) if use_muon else ():
            if member.shape is not None and len(member.shape) < 2:
                yield codes.MATRICES_ONLY.finding(
                    member_name(live_model, member),
                    f"{member_names(live_model, [member])} {member.shape} in {member.where} is a vector, but its group "
                    "has use_muon = True, which is for matrices",
                    "move the vector to a group with use_muon = False",
                )


def _check_decoupled(optimizer: LiveOptimizer) -> Iterator[Finding]:
    expected = optimizer.defaults.get("decoupled_weight_decay")
    if expected is None:
        return
    key = "decoupled_weight_decay"
    wrong = [group for group in optimizer.groups if is_set({key: expected, **group.options}, key) != expected]
    if not wrong:
        return
    # The user can have set this in some of the groups. A file of the other class sets it in all of them.
    is_adamw = optimizer.schema is None or optimizer.schema.name == "AdamW"
    is_deliberate = len(wrong) < len(optimizer.groups) and not is_adamw
    effect = "adds weight decay to the gradient" if expected else "subtracts weight decay from the weights"
    saved_class = "Adam" if expected else "AdamW"
    yield codes.DECOUPLED.finding(
        "",
        f"{wrong[0].where} has decoupled_weight_decay={not expected}, but {optimizer.label} was built with {expected}: "
        f"the step now {effect}, as after loading a state_dict of {saved_class}",
        f'set group["decoupled_weight_decay"] = {expected}, or use the class that the state was saved from',
        severity="warning" if is_deliberate else "error",
    )


def _check_kernels(
    live_model: LiveModel, optimizer: LiveOptimizer, group: LiveGroup, members: Sequence[Member]
) -> Iterator[Finding]:
    options, defaults = group.options, optimizer.defaults
    kernel = next((key for key in ("fused", "foreach") if key in defaults and is_set(options, key)), None)
    if "capturable" in defaults and is_set(options, "capturable") and kernel != "fused":
        refused = [member for member in members if member.tensor.device.type in _NOT_CAPTURABLE]
        if refused:
            yield codes.CAPTURABLE.finding(
                member_name(live_model, refused[0]),
                f"{group.where} has capturable=True, which {refused[0].tensor.device} does not support, for "
                f"{plural(len(refused), 'parameter')}: {member_names(live_model, refused)}",
                'set group["capturable"] = False; a state_dict that was saved on a GPU sets it to True',
                keys=member_keys(live_model, refused),
            )
    if kernel is None:
        return
    meshes = {id(getattr(member.tensor, "device_mesh", None)) for member in members}
    plain = [member for member in members if not hasattr(member.tensor, "device_mesh")]
    if plain and len(meshes) > 1:
        yield codes.MIXED.finding(
            member_name(live_model, plain[0]),
            f"{group.where} has {kernel}=True and mixes {plural(len(plain), 'plain tensor')} with DTensors, which one "
            f"kernel cannot update together: {member_names(live_model, plain)}",
            f"put the plain tensors into a group of their own, or set {kernel}=False",
            keys=member_keys(live_model, plain),
        )
    is_adam = optimizer.schema is not None and optimizer.schema.name in {"Adam", "AdamW"}
    if is_adam and kernel == "foreach" and is_tensor(options.get("lr")) and not is_set(options, "capturable"):
        yield codes.OPTION_VALUE.finding(
            "",
            f"{group.where}: lr is a tensor, which foreach=True accepts only with capturable=True",
            "make lr a number, float(lr), or set foreach=False",
        )


_MULTIPLIERS = {option.name: option.multiplies for option in OPTIONS.values() if option.multiplies}
# Kernels run over one group at a time: with this many groups, a step takes several times longer.
_MANY_GROUPS = 64
# torch's defaults are 0 and 0.01, and recipes for language models use 0.1. No common recipe uses more for vectors.
_STRONG_DECAY = 0.2


def trained_options(group: LiveGroup, *without: str) -> tuple[tuple[str, str], ...]:
    """Return the options that change how a group trains, as comparable text, without those called ``without``."""
    ignored = BOOKKEEPING | {*without}
    return tuple(sorted((str(key), repr(value)) for key, value in group.options.items() if key not in ignored))


def check_across_groups(
    live_model: LiveModel, optimizers: Sequence[LiveOptimizer], schedulers: Iterable[Any]
) -> Iterator[Finding]:
    """Yield the findings that compare several groups; ``schedulers`` can apply the multipliers in the groups."""
    scaled = {id(unwrap_optimizer(scheduler.optimizer)) for scheduler in schedulers if _applies_lr_scale(scheduler)}
    for optimizer in optimizers:
        if optimizer.instance is None:
            continue
        if optimizer.schema is not None:
            for key, option in _MULTIPLIERS.items():
                if option != "lr" or id(optimizer.instance) not in scaled:
                    yield from _check_multiplier(optimizer, key, option)
        if optimizer.schema is None or optimizer.schema.name != "Muon":  # Muon steps no vectors
            yield from _check_decay(live_model, optimizer)
        different = len({trained_options(group) for group in optimizer.groups})
        if len(optimizer.groups) >= _MANY_GROUPS and different * 4 <= len(optimizer.groups):
            yield codes.MANY.finding(
                "",
                f"{optimizer.label} has {len(optimizer.groups):,} groups but only {plural(different, 'set')} of "
                "options, and fused and foreach kernels run over one group at a time",
                "put parameters with the same options into one group",
            )
    yield from _check_shared_lr(optimizers)


def _applies_lr_scale(scheduler: Any) -> bool:
    """Return whether ``scheduler`` multiplies lr by ``lr_scale``, as schedulers of timm do in ``update_groups``."""
    return hasattr(scheduler, "update_groups") and hasattr(scheduler, "optimizer")


def _check_multiplier(optimizer: LiveOptimizer, key: str, option: str) -> Iterator[Finding]:
    default = read_number(optimizer.defaults.get(option))
    unapplied: list[LiveGroup] = []
    for group in optimizer.groups:
        factor = read_number(group.options.get(key))
        value = read_number(initial_lr(group.options) if option == "lr" else group.options.get(option))
        # Recipes that apply the multiplier keep it in the group too, but then the option differs from the default.
        if factor is not None and factor != 1 and value is not None and value == default != 0:
            unapplied.append(group)
    if unapplied:
        yield codes.MULTIPLIER.finding(
            "",
            f"{key} is in {plural(len(unapplied), 'group')} of {optimizer.label} (the first is {unapplied[0].where}), "
            f"where {option} is still the default {short_number(default)}: nothing in torch applies {key}",
            f'pass the scheduler that reads {key}, or apply it: group["{option}"] *= group["{key}"]',
        )


def _check_decay(live_model: LiveModel, optimizer: LiveOptimizer) -> Iterator[Finding]:
    """Yield a note on vectors with weight decay, if other vectors have none or if the decay is strong.

    Weight decay on everything is the default of every optimizer, and is not reported.
    """
    by_group: dict[int, list[Member]] = defaultdict(list)
    for member in optimizer.members:
        if member.shape is not None:
            by_group[id(member.group)].append(member)
    decay = {id(group): read_number(group.options.get("weight_decay")) or 0.0 for group in optimizer.groups}
    without_decay = [members for key, members in by_group.items() if not decay[key] and _holds_mainly_vectors(members)]
    for group in optimizer.groups:
        vectors = [member for member in by_group[id(group)] if _is_vector(member)]
        is_strong = decay[id(group)] >= _STRONG_DECAY
        if vectors and (is_strong or (without_decay and decay[id(group)])):
            reason = (
                f"while most of the {plural(sum(map(len, without_decay)), 'parameter')} without decay are vectors"
                if without_decay
                else "which pulls norms and biases to zero"
            )
            yield codes.DECAY.finding(
                member_name(live_model, vectors[0]),
                f"{group.where} applies weight decay {short_number(decay[id(group)])} to "
                f"{plural(len(vectors), 'vector')} (norms, "
                f"biases, scales), {reason}: {member_names(live_model, vectors)}",
                "if this is not intended, put the vectors into a group with weight_decay = 0",
                keys=member_keys(live_model, vectors),
            )


def _is_vector(member: Member) -> bool:
    return member.shape is not None and len(member.shape) < 2


def _holds_mainly_vectors(members: Sequence[Member]) -> bool:
    vectors = sum(map(_is_vector, members))
    return vectors >= 2 and vectors >= 0.75 * len(members)


def _check_shared_lr(optimizers: Sequence[LiveOptimizer]) -> Iterator[Finding]:
    by_tensor: dict[int, list[LiveGroup]] = defaultdict(list)
    for group in chain.from_iterable(optimizer.groups for optimizer in optimizers if optimizer.instance is not None):
        if is_tensor(group.options.get("lr")):
            by_tensor[id(group.options["lr"])].append(group)
    for groups in by_tensor.values():
        if len(groups) > 1:
            more = f" and {plural(len(groups) - 2, 'more group')}" if groups[2:] else ""
            yield codes.SHARED_LR.finding(
                "",
                f"{groups[0].where}, {groups[1].where}{more} share one tensor as lr: a scheduler that writes the lr of "
                "one group writes the lr of all",
                "give each group a tensor of its own: lr.clone()",
            )
