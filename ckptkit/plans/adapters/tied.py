"""Changes of tied tensors: an adapter holds both halves of a tie, or factors of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.patterns import literal
from ckptkit.core.text import listed, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import ModelError, PlanError
from ckptkit.formats.directories.tied_head import TiedHead, tied_head
from ckptkit.plans.adapters.inputs import DONOR
from ckptkit.plans.adapters.layers import LayerJudge
from ckptkit.plans.plan import Dropped

__all__ = ["TiedChanges"]


class TiedChanges:
    """Decides what an adapter holds of the changed tensors that are tied in the base.

    PEFT merges factors into both halves of a tie, and applies them to one half before. So both halves are saved whole,
    unless the user asks for factors. ``same_as`` maps each further half to the key whose values it gets.
    """

    def __init__(
        self,
        base: Checkpoint,
        donor: Checkpoint,
        names: Mapping[str, str],
        judge: LayerJudge,
        config: Mapping[str, object],
    ) -> None:
        self._base, self._donor, self._names, self._judge, self._config = base, donor, names, judge, config
        self._donor_ties = [frozenset(group) for group in tied_keys(donor.values())]
        self.same_as: dict[str, str] = {}
        self.dropped: list[Dropped] = []
        self.notes: list[str] = []

    def resolve(self, changed: Sequence[str]) -> list[str]:
        """Return the changed keys, without those that are one tensor with a key that gets factors.

        Raises ``PlanError`` where tensors that are one in the base differ in the tuned model.
        """
        left_out: set[str] = set()
        among = set(changed)
        head = tied_head({key: info.shape for key, info in self._base.items()}, self._config or None)
        for group in (*tied_keys(self._base.values()), *self._equal_tensors(changed), *self._absent_head(head)):
            members = [key for key in group if key in among and len(self._base[key].shape) > 1]
            if not members:
                continue
            kept = next(filter(self._judge.is_like_embedding, members), members[0])
            others = [key for key in group if key != kept]
            self._refuse_difference(kept, members)
            if self._judge.policy.action(kept) in ("auto", "whole"):
                self._judge.tied |= set(group)
                self.same_as.update(dict.fromkeys(others, kept))
                if head is not None and head.bias and head.head in others:
                    self.same_as.setdefault(head.head_bias, head.bias)
                option = f"--as-layer {shell_word(f'{literal(kept)}=embedding')}"
                self.notes.append(
                    f"{quoted(kept)} is one tensor with {listed(others, 2)}: all are saved whole, because PEFT applies "
                    f"factors to one of them until they are merged; {option} extracts factors anyway"
                )
            else:
                left_out.update(others)
                reason = f"one tensor with {quoted(kept)}"
                self.dropped += [Dropped(DONOR, self._names[key], reason) for key in members if key != kept]
                self._note_merge_only(kept, listed(others, 2))
        is_alone = head is not None and head.head not in self._base and head.embedding in among - self._judge.tied
        # Without a config.json, only the name that most language models use is evidence enough.
        if head is not None and is_alone and (head.is_sure or head.embedding == "model.embed_tokens.weight"):
            self._note_merge_only(head.embedding, "the head, which has no tensor of its own")
        return [key for key in changed if key not in left_out]

    def _refuse_difference(self, kept: str, members: Sequence[str]) -> None:
        for key in members:
            if not self._are_equal(self._donor, self._names[kept], self._names[key]):
                pattern = literal(self._names[key])
                raise PlanError(
                    f"{quoted(kept)} and {quoted(key)} are one tensor in the base, and differ in the tuned model",
                    hint=f"an adapter of this base holds only one: --drop {shell_word(pattern)}",
                    call=f"an adapter of this base holds only one: parse_rules(drop=[{pattern!r}])",
                )

    def _note_merge_only(self, kept: str, others: str) -> None:
        self.notes.append(
            f"{quoted(kept)} is one tensor with {others}: PEFT applies its factors there only after merge_and_unload"
        )

    def _absent_head(self, head: TiedHead | None) -> Iterator[list[str]]:
        """Yield an embedding and the head that a file of the base leaves to their tie, if its name is known."""
        is_known = head is not None and head.is_sure and not head.is_shared_further
        if head is not None and is_known and head.head not in {**self._base, **self._names}:
            yield [head.embedding, head.head]

    def _equal_tensors(self, changed: Sequence[str]) -> Iterator[list[str]]:
        """Yield pairs of an embedding and a head of equal bytes, which a file of a tied model can hold twice."""
        if self._base.layers or self._config.get("tie_word_embeddings") is False:
            return
        known = [key for key in changed if key in self._base]
        for key in filter(self._judge.is_like_embedding, known):
            for head in filter(self._judge.is_like_head, known):
                first, second = self._base[key], self._base[head]
                is_alike = key != head and (first.shape, first.dtype) == (second.shape, second.dtype)
                if is_alike and self._are_equal(self._base, key, head):
                    yield [key, head]

    def _are_equal(self, side: Checkpoint, first: str, second: str) -> bool:
        if first == second or any({first, second} <= group for group in self._donor_ties if side is self._donor):
            return True
        try:
            return same_bytes(side.payload(first), side.payload(second))
        except (PlanError, ModelError):  # a description, or a tensor on the meta device
            return False
