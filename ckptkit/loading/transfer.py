"""Phase 2 of ``load_into``: read, copy and compare, as phase 1 decided."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from ckptkit.core.checkpoint import read_into
from ckptkit.core.checkpoint.reading import torch_bytes
from ckptkit.core.text import listed, plural, quoted
from ckptkit.core.torch_bridge import is_dtensor, is_extra_state, same_values, torch_dtype
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.errors import CkptkitError, LoadError, ModelError
from ckptkit.loading.copying import Copier
from ckptkit.loading.decision import Copy, Decision, Handing, local_payload
from ckptkit.loading.regions import held_memory, like_dtensor, local_part
from ckptkit.loading.watch import Watch
from ckptkit.plans.plan import Step
from ckptkit.plans.produce import Producer

if TYPE_CHECKING:
    import torch

__all__ = ["Transfer", "module_versions_for", "optimizers_that_hold", "refuse_gradients"]

_SHOWN = 4


class Transfer:
    """The loading of some steps into a model; it knows at any time which tensors of the model have new values."""

    def __init__(self, model: Module, watch: Watch, producer: Producer, handing: Handing) -> None:
        """Take what phase 1 found; nothing is read yet."""
        self._model = model
        self._watch = watch
        self._producer = producer
        self._handing = handing
        self._steps = handing.steps
        self._replaced: dict[str, None] = {}
        self._partly: tuple[str, ...] = ()

    @property
    def has_begun(self) -> bool:
        """Whether a tensor of the model can have a new value."""
        return bool(self._replaced or self._partly)

    def copy(self, decision: Decision) -> None:
        """Copy the tensors into the memory of the model, and run the model's own code for the others.

        Raises ``ModelError`` where a tensor does not have the value of the checkpoint afterwards, and the errors of a
        failed read.
        """
        with Copier() as copier:
            try:
                for key in copier.copy(decision.copies, decision.overlapping):
                    raise self._other_value(key)
            finally:
                copier.close()  # no thread writes any more
                self._replaced |= copier.finished
                self._partly = tuple(key for key in copier.begun if key not in copier.finished)
            self._partly = (*(step.out.key for step in decision.handed), *self._handing.own.computed)
            if decision.runs_code:
                self._hand_over({step.out.key for step in decision.handed})
            self._replaced |= dict.fromkeys(self._partly)
            self._partly = ()
            again = [copy for copy in decision.copies if decision.runs_code or copy.key in decision.overlapping]
            for key in copier.different(again):
                raise self._other_value(key)
        self._check_files()

    def assign(self) -> None:
        """Give the model new tensors, after all were read. Raises the same errors as ``copy``."""
        import torch

        values: OrderedDict[str, Tensor] = OrderedDict()
        assigned: dict[int, Tensor] = {}  # by the tensor that it replaces, so that names of one tensor stay tied
        for step in self._steps:
            old = self._watch.tensors.get(step.out.key)
            new = None if old is None else assigned.get(id(old))
            if new is None:
                new = self._producer.tensor(step)
                if isinstance(old, torch.nn.Parameter):
                    new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                if old is not None:
                    assigned[id(old)] = new
            values[self._handing.name(step.out.key)] = new
        values.update(self._others())
        self._check_files()
        self._partly = tuple(self._handing.loaded())
        self._load_state_dict(values, assign=True)
        self._replaced, self._partly = dict.fromkeys(self._partly), ()
        after = self._model.state_dict(keep_vars=True)
        assigned_steps = [step for step in self._steps if not is_extra_state(step.out.key)]
        with Copier() as copier:
            copies = (Copy(step.out.key, after[step.out.key], self._producer.payload(step)) for step in assigned_steps)
            for key in copier.different(copies):
                raise self._other_value(key)

    def half_loaded(self, error: Exception) -> LoadError:
        """Return the error for a failure after the first change: what was replaced, and what was not."""
        keys = [step.out.key for step in self._steps]
        replaced = tuple(self._replaced)
        rest = tuple(key for key in keys if key not in self._replaced and key not in self._partly)
        reason = error.reason if isinstance(error, CkptkitError) else " ".join(str(error).split())
        parts = [f"{len(replaced):,} of {plural(len(keys), 'tensor')} replaced"]
        parts[0] += f" ({listed(replaced, _SHOWN)})" if replaced else ""
        if self._partly:
            parts.append(f"perhaps a part of {listed(self._partly, _SHOWN)}")
        parts.append(f"not replaced: {listed(rest, _SHOWN)}" if rest else "none left")
        hints = [error.hint] if isinstance(error, CkptkitError) and error.hint else []
        hints.append("load again, or pass rollback=True, which restores the model after a failure")
        return LoadError(
            f"loading stopped half way: {reason}; {', '.join(parts)}",
            hint="; ".join(hints),
            path=error.path if isinstance(error, CkptkitError) else None,
            replaced=replaced,
            partly=self._partly,
        )

    def _hand_over(self, handed: AbstractSet[str]) -> None:
        """Load tensors by ``load_state_dict``, all at once, so that hooks see them together.

        Every other loaded tensor is given as it is in the model by now, or hooks would see its key as missing.
        """
        by_key = {
            step.out.key: self._value(step) if step.out.key in handed else self._watch.tensors[step.out.key].detach()
            for step in self._steps
        }
        values = OrderedDict((self._handing.name(key), value) for key, value in by_key.items())
        values.update(self._others())
        self._load_state_dict(values)
        after = self._model.state_dict(keep_vars=True)
        for key, value in by_key.items():
            if key not in handed or is_extra_state(key):
                continue
            found, expected = (held_memory(one.detach()) for one in (after[key], value))
            if found is None or expected is None:
                found, expected = after[key].detach(), value
            if not same_values(found.to("cpu").resolve_conj().resolve_neg(), expected.to("cpu")):
                raise self._other_value(key)

    def _others(self) -> dict[str, Tensor]:
        """Return the tensors that the model does not have, and that its own code sees."""
        return {step.out.key: self._producer.tensor(step) for step in self._handing.own.others}

    def _value(self, step: Step) -> Tensor:
        old = self._watch.tensors.get(step.out.key)
        if not is_dtensor(old):
            return self._producer.tensor(step)
        dtype = torch_dtype(step.out.dtype)
        payload = local_payload(self._producer, step, old)
        local = torch_bytes(payload.nbytes, lambda buffer: read_into(payload, buffer)).view(dtype)
        return like_dtensor(local.view(local_part(old).sizes).to(old.device), old)

    def _load_state_dict(self, values: OrderedDict[str, Tensor], *, assign: bool = False) -> None:
        versions = module_versions_for(self._producer, self._handing)
        if versions:
            # A module converts values that have no version as if its oldest version had saved them.
            values._metadata = {prefix: {"version": version} for prefix, version in versions.items()}  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            self._model.load_state_dict(values, strict=False, assign=assign)
        except Exception as error:  # hooks of the model can raise anything
            raise load_state_dict_error(error) from error

    def _check_files(self) -> None:
        for checkpoint in self._producer.roles.values():
            checkpoint.check_unchanged()

    def _other_value(self, key: str) -> ModelError:
        return ModelError(
            f"{quoted(key)} does not have the checkpoint's value after loading",
            hint="a key that shares its memory was loaded after it, or a hook of the model changed it"
            if key in self._watch.tensors
            else "only state_dict() of its module makes this tensor: load it with the library of the module",
        )


def load_state_dict_error(error: Exception) -> ModelError:
    """Return the error for an exception of ``load_state_dict`` or of a hook in it."""
    message = " ".join(str(error).split())
    if isinstance(error, KeyError):  # its text is the key alone
        message = f"there is no key {message}"
    return ModelError(f"load_state_dict failed: {message}")


def module_versions_for(producer: Producer, handing: Handing) -> Mapping[str, int]:
    """Return the versions of the modules that saved the values; none where keys were renamed."""
    return producer.roles["donor"].versions if handing.versions_hold else {}


def refuse_gradients(watch: Watch, steps: Sequence[Step]) -> None:
    """Raise ``ModelError`` where a parameter that is trained would be assigned integers."""
    for step in steps:
        old = watch.tensors.get(step.out.key)
        dtype = torch_dtype(step.out.dtype)
        if old is not None and old.requires_grad and not (dtype.is_floating_point or dtype.is_complex):
            raise ModelError(
                f"{quoted(step.out.key)} requires a gradient, and {step.out.dtype} values cannot have one",
                hint="without assign=True the values are cast to the dtype of the model",
            )


def optimizers_that_hold(tensors: Sequence[Tensor]) -> Iterator[tuple[torch.optim.Optimizer, int]]:
    """Yield each optimizer of the process that holds some of the tensors, and how many."""
    import torch

    wanted = {id(tensor) for tensor in tensors}
    # Only the type is asked: other attributes of foreign objects can run code.
    for found in [one for one in gc.get_objects() if issubclass(type(one), torch.optim.Optimizer)]:
        groups: Any = getattr(found, "param_groups", ())
        held = {id(parameter) for group in groups for parameter in group["params"]} & wanted
        if held:
            yield found, len(held)
