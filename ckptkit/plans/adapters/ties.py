"""What an adapter of one of several tied tensors does to the others: follow it, or keep values of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import read_settings
from ckptkit.core.text import listed, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import PlanError
from ckptkit.formats.directories.model_files import MODEL_CONFIG
from ckptkit.formats.directories.side_files import file_beside
from ckptkit.formats.directories.tied_head import TiedHead, embeddings_of, is_head_group, tied_head
from ckptkit.plans.adapters.inputs import BASE
from ckptkit.plans.plan import Dropped, Source, Step
from ckptkit.plans.steps import complete_step

__all__ = ["ResolvedTies", "head_of", "resolve_ties"]


@dataclass(frozen=True, slots=True)
class ResolvedTies:
    """The steps of the changed keys and of what is tied to them, by key, what is left out for that, and notes."""

    steps: Mapping[str, Step]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]


def head_of(base: Checkpoint) -> TiedHead | None:
    """Return the output weights that a model ties to its embedding, by the ``config.json`` beside its weights."""
    found = file_beside(base.path, MODEL_CONFIG) if base.files else None
    config = read_settings(found, MODEL_CONFIG) if found is not None else None
    return tied_head({key: info.shape for key, info in base.items()}, config)


def resolve_ties(
    roles: Mapping[str, Checkpoint], changed: Mapping[str, Step], follows: Collection[str], head: TiedHead | None
) -> ResolvedTies:
    """Return the steps that give every tied tensor the values that it has in the model with the adapters.

    A change of a key in ``follows`` holds for all that is tied to it. The change of another key is that of one module.
    Where an embedding and output weights are tied, or a tensor is replaced, the others keep the values of the base, and
    the output has both. A fold into one of other tied tensors changes all, as PEFT merges it. Notes say so.

    Raises ``PlanError`` where the output cannot say this: where the embeddings of an encoder and a decoder are tied,
    where no ``config.json`` says whether output weights are tied, and where the halves have different vocabularies.
    """
    base = roles[BASE]
    steps, notes, dropped = dict(changed), [], []
    is_untied = False
    for keys, reason in _groups(base, head):
        adapted = [key for key in keys if key in changed]
        if not adapted:
            continue
        if head is not None and head.bias in keys:
            dropped += _follow(keys, head.head_bias if head.head_bias in changed else adapted[0], steps, base)
            continue
        is_head = is_head_group(keys)
        is_led = not is_head or bool(embeddings_of(adapted))  # PEFT ties nothing to output weights
        own = [key for key in adapted if not (is_led and key in follows) and (is_head or changed[key].recipe is None)]
        if not own:
            leader = next((key for key in adapted if key in base), adapted[0])
            if not is_head and leader not in follows:
                _refuse_two_folds(adapted)
                notes.append(f"{listed(keys, 4)} are {reason}: all change with {quoted(leader)}, as in a merge by PEFT")
            dropped += _follow(keys, leader, steps, base)
            continue
        if is_head:
            is_untied = is_untied or (head is not None and head.head in keys)
            _refuse_unknown(keys, head if head is not None and head.head in keys else None, own)
        for key in keys:
            if key not in steps:
                steps[key] = _kept(key, keys, steps, roles)
        _refuse_sizes(keys, steps)
        notes.append(_untied_note(keys, own, reason, is_head=is_head))
    if head is not None and is_untied and head.bias and head.head_bias not in {**base, **steps}:
        step = steps.get(head.bias) or _kept(head.bias, [head.bias], steps, roles)
        steps[head.head_bias] = replace(step, out=replace(step.out, key=head.head_bias))
    return ResolvedTies(steps, tuple(dropped), tuple(notes))


def _untied_note(keys: Sequence[str], own: Sequence[str], reason: str, *, is_head: bool) -> str:
    ending = "load the output into a model that does not tie them"
    if is_head:
        ending = f"its {MODEL_CONFIG} must say tie_word_embeddings: false, which --carry writes"
    others = [key for key in keys if key not in own]
    what = (
        f"{listed(own, 2)} is adapted without {listed(others, 2)}" if others else f"{listed(own, 2)} are adapted apart"
    )
    return f"{what}, and the base ties them ({reason}): the output has each with its own values; {ending}"


def _groups(base: Checkpoint, head: TiedHead | None) -> list[tuple[list[str], str]]:
    """Return the keys that are one tensor in the model, and how that is known."""
    groups = [(keys, "one tensor in the base") for keys in tied_keys(base.values())]
    if head is None:
        return groups
    groups = _joined(groups, [head.embedding, *head.shared, head.head], head.reason)
    return _joined(groups, [head.bias, head.head_bias], head.reason) if head.bias else groups


def _joined(groups: Sequence[tuple[list[str], str]], tied: Sequence[str], reason: str) -> list[tuple[list[str], str]]:
    """Return the groups with one more of ``tied``, which takes in every group that has one of these keys."""
    others = [(keys, why) for keys, why in groups if not set(keys) & set(tied)]
    joined = dict.fromkeys([*tied, *(key for keys, _ in groups if set(keys) & set(tied) for key in keys)])
    return [*others, (list(joined), reason)]


def _follow(keys: Sequence[str], leader: str, steps: dict[str, Step], base: Checkpoint) -> list[Dropped]:
    """Give every key of a group the step of ``leader``; return the tensors that are left out for that."""
    dropped = []
    first = steps[leader]
    for key in keys:
        if key != leader and key in steps:
            used = set(first.sources)
            other = [source for source in steps.pop(key).sources if source.role != BASE and source not in used]
            dropped += [Dropped(role.role, role.key, f"tied to {quoted(leader)}", key) for role in other]
        if key != leader and key in base:
            steps[key] = replace(
                first, out=replace(first.out, key=key), rule=f"tied to {quoted(leader)}", tied_to=leader
            )
    return dropped


def _kept(key: str, keys: Sequence[str], steps: Mapping[str, Step], roles: Mapping[str, Checkpoint]) -> Step:
    """Return the step of a tied key that no adapter changes: the values of the base, or of the base that it saves."""
    base = roles[BASE]
    present = key if key in base else next(other for other in keys if other in base)
    source, info = Source(BASE, present), base[present]
    for other in keys:
        step = steps.get(other)
        if step is not None and step.recipe is not None and step.sources[0].role != BASE:
            source = step.sources[0]  # the base of a fold, in the size of the model that was adapted
            info = replace(info, shape=roles[source.role][source.key].shape)
    return complete_step(Step(replace(info, key=key, view=None), (source,), "", "tied in the base"), roles)


def _refuse_two_folds(adapted: Sequence[str]) -> None:
    if len(adapted) > 1:
        raise PlanError(
            f"{quoted(adapted[0])} and {quoted(adapted[1])} are one tensor in the base, and both are adapted",
            hint="merge with peft",
        )


def _refuse_unknown(keys: Sequence[str], head: TiedHead | None, own: Sequence[str]) -> None:
    """Raise ``PlanError`` where no file can untie the keys, and where nothing says whether they are tied."""
    if len(embeddings_of(keys)) > 1 or (head is not None and head.is_shared_further):
        raise PlanError(
            f"the base ties the embeddings of its encoder, its decoder and its output, and {quoted(own[0])} is adapted "
            "by itself: no file of the model can say that",
            hint=f"leave it out: --drop {shell_word('*' + own[0].removesuffix('.weight') + '*')}",
        )
    if head is not None and not head.is_sure and head.head not in own:
        raise PlanError(
            f"{quoted(own[0])} is adapted, and the base has no output weights: without a {MODEL_CONFIG}, nothing says "
            "whether they are tied to it",
            hint=f"put the {MODEL_CONFIG} of the base beside it, and give the path of its file or directory",
        )


def _refuse_sizes(keys: Sequence[str], steps: Mapping[str, Step]) -> None:
    sizes = {steps[key].out.shape: key for key in keys if key in steps}
    if len(sizes) > 1:
        (first, key), (second, other), *_ = sizes.items()
        raise PlanError(
            f"{quoted(key)} would be {list(first)} and {quoted(other)} {list(second)}, and the base ties both",
            hint="the adapter was trained after the vocabulary was resized, and saves only one of both",
        )
