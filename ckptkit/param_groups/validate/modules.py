"""Check the modules of the model: frozen norms in train mode, lost ties, assignments over methods, odd dtypes."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ckptkit.core.findings import Finding
from ckptkit.core.text import listed, quoted
from ckptkit.core.torch_types import Module, Tensor
from ckptkit.param_groups import codes
from ckptkit.param_groups.parameters import LiveModel, LiveParameter, address, flat_names
from ckptkit.param_groups.validate.stale import find_rename

__all__ = ["check_modules", "is_running_statistic", "owner_of_buffer"]

_SHOWN = 3


def check_modules(live_model: LiveModel) -> Iterator[Finding]:
    """Yield findings about the modules of the model, whatever the groups hold."""
    yield from _check_assignments(live_model)
    yield from _check_frozen_norms(live_model)
    yield from _check_ties(live_model)
    yield from _check_siblings(live_model)


def owner_of_buffer(model: Module, name: str, frozen: Collection[str]) -> str | None:
    """Return the path of the frozen module that a buffer belongs to, or None if a parameter of that module trains.

    The module is the nearest one around the buffer that has parameters; the model itself does not count.
    """
    modules = dict(model.named_modules())  # a ScriptModule has no get_submodule()
    path = name.rpartition(".")[0]
    while path:
        names = [f"{path}.{inner}" for inner, _ in modules[path].named_parameters()]
        if names:
            return path if all(inner in frozen for inner in names) else None
        path = path.rpartition(".")[0]
    return None


def is_running_statistic(model: Module, name: str) -> bool:
    """Return whether a buffer is a statistic that a norm updates in each forward pass in train mode."""
    from torch.nn.modules.batchnorm import _NormBase

    path, _, leaf = name.rpartition(".")
    return isinstance(dict(model.named_modules())[path], _NormBase) or leaf.startswith(("running_", "moving_"))


def _check_frozen_norms(live_model: LiveModel) -> Iterator[Finding]:
    """Yield a note if a norm of a frozen module is in train mode, where each forward pass moves its statistics."""
    from torch.nn.modules.batchnorm import _NormBase

    norms = {
        name: module
        for name, module in live_model.model.named_modules()
        if isinstance(module, _NormBase)
        and module.training
        and module.running_mean is not None
        and module.momentum != 0
    }
    if not norms:
        return
    frozen = {name for name, live in live_model.by_name.items() if not live.trainable}
    found = [name for name in norms if owner_of_buffer(live_model.model, f"{name}.running_mean", frozen) is not None]
    if found:
        verb, own = ("is", "its") if len(found) == 1 else ("are", "their")
        yield codes.FROZEN_STATISTICS.finding(
            found[0],
            f"{listed(found, _SHOWN)} {verb} frozen but in train mode: each forward pass changes {own} running "
            "statistics",
            "call .eval() on the frozen modules after each model.train()",
            keys=found,
        )


# Names of methods of Module and Tensor that users also give to data of their own.
_OWN_NAMES = re.compile(r"type|float|double|half|bfloat16|cuda|cpu|xpu|ipu|mtia|compile|share_memory|extra_repr")
_ALIKE = 0.86  # as require_grad, requires_gradient


def _check_assignments(live_model: LiveModel) -> Iterator[Finding]:
    """Yield a finding for each value that was assigned over a method, or to a name close to ``requires_grad``."""
    import torch

    found: dict[_Assignment, list[str]] = {}
    for name, module in live_model.model.named_modules():
        for key, value in _assigned(module, torch.nn.Module):
            flags = {tensor.requires_grad for tensor in module.parameters()}
            assignment = _Assignment("module", key, _shown(value), any(flags) if flags else None)
            found.setdefault(assignment, []).append(name)
    for live in live_model.parameters.values():
        for key, value in _assigned(live.tensor, torch.Tensor):
            found.setdefault(_Assignment("parameter", key, _shown(value), live.trainable), []).append(live.name)
    yield from (assignment.finding(names) for assignment, names in found.items() if not assignment.is_ignored)


def _label(name: str) -> str:
    return quoted(name) if name else "the model"


def _shown(value: object) -> object:
    return value if isinstance(value, bool | int | float | str) or value is None else f"a {type(value).__name__}"


def _assigned(item: object, base: type[object]) -> Iterator[tuple[str, object]]:
    """Yield the attributes of ``item`` that hide a method of its class, or nearly have the name ``requires_grad``."""
    for key, value in getattr(item, "__dict__", {}).items():
        if callable(value) or key.startswith("__"):
            continue
        hides_method = callable(getattr(base, key, None)) and not _OWN_NAMES.fullmatch(key)
        if hides_method or (isinstance(value, bool) and not hasattr(base, key) and _is_like_requires_grad(key)):
            yield key, value


@lru_cache(maxsize=1024)  # the modules of a model have the same few attributes
def _is_like_requires_grad(key: str) -> bool:
    plain = key.strip("_").lower()
    return plain == "trainable" or difflib.SequenceMatcher(None, plain, "requires_grad").ratio() >= _ALIKE


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A value that an attribute of a module or a parameter has; ``trains`` is None for a module without parameters."""

    kind: Literal["module", "parameter"]
    key: str
    value: object
    trains: bool | None

    @property
    def is_ignored(self) -> bool:
        """Whether the value only repeats what is true: modules keep options of their own under such names."""
        is_option = self.key != "requires_grad_" and _is_like_requires_grad(self.key)
        return is_option and self.trains in {None, self.value}

    def finding(self, names: Sequence[str]) -> Finding:
        """Return the finding about the modules or parameters ``names``, which all have this value."""
        where, has = listed(names, _SHOWN, show=_label), "has" if len(names) == 1 else "have"
        key, kind, value = self.key, self.kind, self.value
        is_contradicted = isinstance(value, bool) and self.trains is not None and value != self.trains
        effect = ""
        if _is_like_requires_grad(key) and is_contradicted:
            effect = " and freezes nothing" if value is False else " and unfreezes nothing"
        if key != "requires_grad_" and _is_like_requires_grad(key):
            return codes.ASSIGNMENT.finding(
                names[0],
                f"{where} {has} the attribute {key} = {value}, which torch does not read for a {kind}{effect}",
                f"call {kind}.requires_grad_({value})",
                severity="warning" if key.strip("_") == "trainable" else "error",
                keys=names,
            )
        call = f"{key}({value})" if key in {"requires_grad_", "train"} else f"{key}()"
        if key == "eval" and value is False:
            call = "train()"
        return codes.ASSIGNMENT.finding(
            names[0],
            f"{where} {has} the value {value} in place of the method {key}(): the assignment hides the method"
            f"{effect}, and the next call of {key}() fails",
            f"delete the attribute, del {kind}.{key}, and call the method: {kind}.{call}",
            keys=names,
        )


def _check_ties(live_model: LiveModel) -> Iterator[Finding]:
    """Yield a finding for each tie that the configuration of the model has and its parameters do not have."""
    done: list[str] = []
    for prefix, module in live_model.model.named_modules():
        if any(not outer or prefix == outer or prefix.startswith(f"{outer}.") for outer in done):
            continue
        config = getattr(module, "config", None)
        if config is None:
            continue
        is_declared = hasattr(type(module), "_tied_weights_keys")
        pairs = _declared_ties(module) if is_declared else _embedding_ties(module, config)
        if is_declared:
            done.append(prefix)
        for target, source in pairs:
            start = f"{prefix}." if prefix else ""
            yield from _check_tie(live_model, f"{start}{target}", f"{start}{source}", is_declared)


def _declared_ties(module: Any) -> list[tuple[str, str]]:
    """Return the ties that a model of transformers declares, as pairs of names."""
    expand: Callable[..., Any] | None = getattr(module, "get_expanded_tied_weights_keys", None)
    with contextlib.suppress(Exception):  # the method of a user's model may raise anything
        if expand is not None:
            return [(str(target), str(source)) for target, source in expand(all_submodels=True).items()]
        if module._tied_weights_keys and getattr(module.config, "tie_word_embeddings", False):  # noqa: SLF001
            names = {id(tensor): name for name, tensor in module.named_parameters(remove_duplicate=False)}
            target = names[id(module.get_output_embeddings().weight)]
            return [(target, names[id(module.get_input_embeddings().weight)])]
    return []


_TIE_OPTIONS = ("tie_word_embeddings", "tie_weights", "tie_embeddings", "weight_tying", "share_embeddings")


def _embedding_ties(module: Module, config: object) -> list[tuple[str, str]]:
    """Return the only linear layer and the only embedding with one shape, if the configuration says they are tied."""
    from torch.nn import Embedding, Linear

    options = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    if not any(options.get(option) is True for option in _TIE_OPTIONS):
        return []
    embeddings = {name: part for name, part in module.named_modules() if isinstance(part, Embedding)}
    pairs = [
        (f"{name}.weight", f"{source}.weight")
        for name, part in module.named_modules()
        if isinstance(part, Linear)
        for source, embedding in embeddings.items()
        if part.weight.shape == embedding.weight.shape
    ]
    return pairs if len(pairs) == 1 else []


def _check_tie(live_model: LiveModel, target: str, source: str, is_declared: bool) -> Iterator[Finding]:
    import torch

    first, second = _find(live_model, target), _find(live_model, source)
    if first is None or second is None or first is second or first.lazy or second.lazy:
        return
    left, right = first.tensor, second.tensor
    if address(left) == address(right) != 0 or _is_sharded(left) or _is_sharded(right):
        return
    trains = first.trainable or second.trainable
    if not trains:
        is_known = not (left.is_meta or right.is_meta) and left.device == right.device and left.shape == right.shape
        if not is_known or torch.equal(left, right):
            return
    verb = "train apart" if trains else "have different values"
    yield codes.TIE_LOST.finding(
        first.name,
        f"the configuration of the model ties {quoted(first.name)} to {quoted(second.name)}, but they are two "
        f"parameters that {verb}; the next load keeps only one of them",
        "call model.tie_weights() after to_empty(), load_state_dict(assign=True) or a replaced parameter, and before "
        "the optimizer is built; or set tie_word_embeddings = False in the configuration",
        severity="error" if is_declared and trains else "warning",
    )


def _find(live_model: LiveModel, name: str) -> LiveParameter | None:
    found = live_model.named(name)
    if found is None:
        rename = find_rename(live_model, name)
        found = rename.live if rename is not None else None
    return found


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id") or bool(flat_names(tensor))


def _check_siblings(live_model: LiveModel) -> Iterator[Finding]:
    """Yield a finding for each module with own parameters that differ in dtype or device, so that it may fail."""
    import torch

    floats = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    for path, siblings in live_model.by_module.items():
        if len(siblings) < 2 or any(live.lazy or _is_sharded(live.tensor) for live in siblings):
            continue
        module = live_model.modules.get(path)
        is_torch = type(module).__module__.startswith("torch.nn.")
        dtypes = {live.tensor.dtype: live for live in siblings if live.tensor.dtype in floats}
        devices = {str(live.tensor.device): live for live in siblings}
        for what, found in (("dtype", dtypes), ("device", devices)):
            if len(found) > 1:
                parts = [f"{quoted(live.name)} is {str(value).removeprefix('torch.')}" for value, live in found.items()]
                yield codes.SIBLINGS.finding(
                    next(reversed(found.values())).name,
                    f"the parameters of {_label(path)} have several {what}s: {' and '.join(parts[:3])}",
                    f"convert the whole module: .to(), and load or replace parameters in its {what}",
                    severity="warning" if is_torch else "note",
                )
