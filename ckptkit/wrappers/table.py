"""List the prefixes and segments that wrappers add to the keys of a state_dict."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTRIBUTE", "PARAMETRIZATIONS", "PREFIXES", "SEGMENTS", "WRAPPERS", "Parametrization", "Wrapper"]


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One wrapper and the ``mark`` that it adds: whole segments at the start of every key, or ``anywhere`` in a key.

    ``own_keys`` are keys for values of the wrapper itself. At least one of these keys must be present, and all are
    dropped with the mark. If ``mark`` alone is ambiguous, ``after`` is the mark that must be removed first. A key with
    a segment in ``unsupported`` raises an error with ``hint``, since renaming cannot undo the wrapper.
    """

    mark: str
    origin: str
    anywhere: bool = False
    own_keys: tuple[str, ...] = ()
    after: str = ""
    unsupported: frozenset[str] = frozenset()
    hint: str = ""


_FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_PEFT = "base_model.model"

# The first row that matches wins, so rows with more conditions come first.
WRAPPERS = (
    Wrapper("module", "AveragedModel of torch (SWA, EMA)", own_keys=("n_averaged",)),
    Wrapper("module", "averaged model of mmengine", own_keys=("steps",)),
    Wrapper("module", "DataParallel, DistributedDataParallel"),
    Wrapper("_orig_mod", "torch.compile", anywhere=True),
    Wrapper(
        "_fsdp_wrapped_module", "FullyShardedDataParallel", anywhere=True, unsupported=frozenset({"_flat_param"}),
        hint="a _flat_param holds many parameters: save with StateDictType.FULL_STATE_DICT",
    ),
    Wrapper("_fpw_module", "FullyShardedDataParallel of fairscale", anywhere=True),
    Wrapper("_checkpoint_wrapped_module", "checkpoint_wrapper, by named_parameters()", anywhere=True),
    Wrapper("_forward_module", "strategies of Lightning before 2.1"),
    Wrapper("_module", "GradSampleModule of Opacus"),
    Wrapper("ema_model", "EMA of ema-pytorch, the average", own_keys=("initted", "step")),
    Wrapper("ema_model", "EMA of ema-pytorch, the average"),
    Wrapper("online_model", "EMA of ema-pytorch, the trained model"),
    Wrapper(
        _PEFT, "PeftModel", unsupported=_FACTORS,
        hint="these keys belong to an adapter: ckpt merge BASE PATH -o OUT --method lora folds a saved adapter; or "
        "drop the keys with --drop '*.lora_*'",
    ),
    Wrapper("base_layer", "an adapted layer of a PeftModel", anywhere=True, after=_PEFT),
    Wrapper("original_module", "the original of a module of a PeftModel", anywhere=True, after=_PEFT),
    Wrapper("modules_to_save.default", "a fully trained module of a PeftModel", anywhere=True, after=_PEFT),
)  # fmt: skip
PREFIXES = (*dict.fromkeys(f"{row.mark}." for row in WRAPPERS if not row.anywhere), "model.")
SEGMENTS = tuple(row.mark for row in WRAPPERS if row.anywhere and not row.after)
# The user chose the attribute name, so it is removed only once, and only from a file that Lightning wrote.
ATTRIBUTE = Wrapper("*", "the attribute of a LightningModule")


@dataclass(frozen=True, slots=True)
class Parametrization:
    """Several tensors that a parametrization stores in place of one, and the operation that folds them into one.

    The keys are ``parent``, the name of the parameter and one of ``endings``.
    """

    endings: tuple[str, ...]
    origin: str
    operation: str
    parent: str = ""


_PARENT = "parametrizations."
PARAMETRIZATIONS = (
    Parametrization((".original0", ".original1"), "weight_norm of torch.nn.utils.parametrizations",
                    "fold_weight_norm", _PARENT),
    Parametrization((".original", ".0._u", ".0._v"), "spectral_norm of torch.nn.utils.parametrizations",
                    "fold_spectral_norm", _PARENT),
    Parametrization((".original",), "torch.nn.utils.parametrize", "", _PARENT),
    Parametrization(("_g", "_v"), "torch.nn.utils.weight_norm", "fold_weight_norm"),
    Parametrization(("_orig", "_u", "_v"), "torch.nn.utils.spectral_norm", "fold_spectral_norm"),
    Parametrization(("_orig", "_mask"), "torch.nn.utils.prune", "fold_mask"),
)  # fmt: skip
