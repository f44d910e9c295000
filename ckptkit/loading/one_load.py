"""One load, from the decision of what is written to the check of the result."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from ckptkit.comparison.own_code import is_below, modules_with_own_code
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.findings import Finding
from ckptkit.core.text import plural, quoted
from ckptkit.core.torch_bridge import ABSENT, is_dtensor, is_extra_state
from ckptkit.core.torch_types import Module
from ckptkit.errors import ModelError
from ckptkit.loading import codes
from ckptkit.loading.decision import (
    Decision,
    Handing,
    decide,
    followers,
    refuse_meta,
)
from ckptkit.loading.report import Found
from ckptkit.loading.snapshot import Snapshot
from ckptkit.loading.transfer import Transfer, module_versions_for, optimizers_that_hold, refuse_gradients
from ckptkit.loading.watch import Digests, Watch, named_tensors
from ckptkit.plans.produce import Producer

__all__ = ["Loading"]


class Loading:
    """One call of ``load_into``, from the decision of what is written to the check of the result."""

    def __init__(self, model: Module, base: Checkpoint, producer: Producer, handing: Handing, *, assign: bool) -> None:
        """Decide how each tensor is loaded. Raises ``ModelError`` where one cannot be; nothing is changed."""
        self._model = model
        self._base = base
        self.producer = producer
        self._handing = handing
        self._loaded = set(handing.loaded())
        before = Watch(model)
        self._before = before
        self._decision: Decision | None = None
        if handing.own.undecided:
            _refuse_values_without_tensor(model, base, handing.own.undecided)
        if assign:
            _refuse_assigned_shards(before, self._loaded)
            refuse_gradients(before, handing.steps)
            followers(base, producer, handing.steps)  # only to refuse two values for one tensor
            self._runs_code = bool(modules_with_own_code(model))
        else:
            refuse_meta(base, before)
            self._decision = decide(model, base, before, producer, handing)
            self._runs_code = self._decision.runs_code

    def rehearse(self) -> None:
        """Try the model's own code on a copy of the model. Raises ``ModelError`` where it fails."""
        if self._decision is not None and self._runs_code:
            from ckptkit.comparison.own_code.rehearsal import Given, Untried, rehearse

            infos = {self._handing.name(step.out.key): step.out for step in self._handing.steps}
            infos |= {step.out.key: step.out for step in self._handing.own.others}
            given = Given(infos, (), module_versions_for(self.producer, self._handing))
            tried = rehearse(self._model, [""], given)
            if isinstance(tried, Untried):
                return
            for refusal in (*tried.refusals, *(f"size mismatch for {key}" for key in tried.mismatched)):
                raise ModelError(f"load_state_dict failed: {refusal}")
            for name in tried.replaced:
                self._refuse_replaced(name)

    def _refuse_replaced(self, name: str) -> None:
        """Raise ``ModelError`` where something else would change if a tensor were replaced while loading."""
        would = f"{quoted(name)} would be replaced while loading"
        if name in self._before.parameters:
            raise ModelError(
                f"{would}, and optimizers would hold the old tensor",
                hint="pass assign=True, which names the optimizers that hold it",
            )
        others = sorted(set().union(*(tie for tie in self._before.ties if name in tie)) - {name})
        if others:
            raise ModelError(f"{would}, and would not share memory with {quoted(others[0])} any more")
        if name in self._base and name not in self._loaded and name not in self._handing.own.filled:
            raise ModelError(f"{would}, and the checkpoint does not have it")

    def watch(self) -> Watch:
        """Return the watch that can tell afterwards what changed, without a copy of the model."""
        if not self._runs_code:
            return self._before
        return Digests(self._model, self._before.tensors.keys() - _sharing_memory(self._before, self._loaded))

    def run(self, before: Watch) -> Found:
        """Load and check. A failure restores the model from ``before`` if that is a snapshot."""
        transfer = Transfer(self._model, before, self.producer, self._handing)
        try:
            if self._decision is None:
                transfer.assign()
            else:
                transfer.copy(self._decision)
            rewritten = self._check_not_loaded(before)
        except BaseException as error:
            if isinstance(before, Snapshot):
                failed = before.restore()
                if failed:
                    raise ModelError(f"{quoted(failed[0])} could not be restored after the error: {error}") from error
                raise
            if isinstance(error, Exception) and transfer.has_begun:
                raise transfer.half_loaded(error) from error
            raise
        return Found(
            frozenset(_sharing_memory(before, self._loaded) - self._loaded) if self._decision else frozenset(),
            tuple(rewritten),
            tuple(before.infos[name] for name in before.not_compared),
            tuple(self._assigned_findings(before)),
            tuple(self.producer.losses[key] for key in self._base if key in self.producer.losses),
        )

    def _check_not_loaded(self, before: Watch) -> list[str]:
        """Raise ``ModelError`` where anything but the loaded tensors changed; return the buffers that hooks rewrote.

        Only buffers that are not persistent may be rewritten.
        """
        assigned = frozenset[str]() if self._decision else _same_tensors(before, self._loaded)
        for name in before.replaced():
            if name not in assigned and name in before.parameters:
                raise ModelError(f"{quoted(name)} was replaced while loading, and optimizers still hold the old tensor")
        written = _sharing_memory(before, self._loaded)
        replaced = set(before.replaced())
        changed = [
            name
            for name in before.tensors
            if name not in written and (name in replaced or not before.is_unchanged(name))
        ]
        for name in changed:
            if name in self._base and name not in self._handing.own.filled:
                raise ModelError(
                    f"{quoted(name)} was not loaded, but it changed",
                    hint="a hook of the model wrote to it while loading",
                )
        for tie in before.ties ^ before.ties_now() if self._runs_code and not assigned else ():
            first, second, *_ = sorted(tie)
            raise ModelError(f"loading changed whether {quoted(first)} and {quoted(second)} share memory")
        return changed

    def _assigned_findings(self, before: Watch) -> Iterator[Finding]:
        if self._decision is not None:
            return
        old = [tensor for name, tensor in before.tensors.items() if name in self._loaded and not tensor.is_meta]
        for optimizer, count in optimizers_that_hold(old) if old else ():
            name = type(optimizer).__name__
            yield codes.REPLACED.finding(
                "",
                f"an optimizer ({name}) holds {plural(count, 'parameter')} that the model no longer has, "
                "and would not train the new ones",
                "build the optimizer after load_into(..., assign=True)",
            )
        for name, tensor in named_tensors(self._model).items():
            if tensor.is_meta:
                why = "is not in the checkpoint" if name in self._base else "is a buffer that no checkpoint has"
                yield codes.META.finding(name, f"{quoted(name)} {why}, and is still on the meta device without a value")


def _refuse_values_without_tensor(model: Module, base: Checkpoint, reason: str) -> None:
    """Raise ``ModelError`` where code that was not tried saves values that no plan has, such as packed weights."""
    paths = modules_with_own_code(model)
    for entry in base.entries:
        key = entry.path
        if entry.type != ABSENT and not is_extra_state(key) and is_below(key, paths):
            raise ModelError(
                f"{quoted(key)} is not a tensor, and only the model's own code can load it",
                hint=f"call model.load_state_dict: ckptkit could not try the code, because {reason}",
            )


def _refuse_assigned_shards(before: Watch, loaded: AbstractSet[str]) -> None:
    for name, tensor in before.tensors.items():
        if name in loaded and is_dtensor(tensor):
            raise ModelError(
                f"{quoted(name)} is a DTensor, and assign=True would replace it by the whole tensor",
                hint="call model.to_empty(device=...), and load without assign",
            )


def _same_tensors(before: Watch, loaded: AbstractSet[str]) -> set[str]:
    """Return every name of the loaded tensors."""
    written = {id(before.tensors[name]) for name in loaded if name in before.tensors}
    return {name for name, tensor in before.tensors.items() if id(tensor) in written}


def _sharing_memory(before: Watch, loaded: AbstractSet[str]) -> set[str]:
    """Return the names of the loaded tensors and of all tensors that share memory with one of them."""
    names = _same_tensors(before, loaded)
    return names.union(*(tie for tie in before.ties if tie & names))
