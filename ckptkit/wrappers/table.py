"""The marks that wrappers leave in the names of tensors: where each comes from, and what stands in its way."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTRIBUTE", "PARAMETRIZATIONS", "PREFIXES", "SEGMENTS", "WRAPPERS", "Parametrization", "Wrapper"]


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One wrapper: it puts ``mark``, one or more whole segments, in front of every key, or ``anywhere`` in one.

    ``own`` are keys of its own beside the tensors that it wraps: one of them has to be there, and they go with it.
    ``after`` is the wrapper that has to have been undone before, where the mark alone says too little. Where a key
    has a segment of ``refuses``, nothing is undone, and ``hint`` says what to do instead.
    """

    mark: str
    origin: str
    anywhere: bool = False
    own: tuple[str, ...] = ()
    after: str = ""
    refuses: frozenset[str] = frozenset()
    hint: str = ""


_FACTORS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
_PEFT = "base_model.model"

# The first row that fits is the one that speaks: what asks for more comes first.
WRAPPERS = (
    Wrapper("module", "AveragedModel of torch (SWA, EMA)", own=("n_averaged",)),
    Wrapper("module", "averaged model of mmengine", own=("steps",)),
    Wrapper("module", "DataParallel, DistributedDataParallel"),
    Wrapper("_orig_mod", "torch.compile", anywhere=True),
    Wrapper(
        "_fsdp_wrapped_module", "FullyShardedDataParallel", anywhere=True, refuses=frozenset({"_flat_param"}),
        hint="a _flat_param is many parameters in one: save with StateDictType.FULL_STATE_DICT",
    ),
    Wrapper("_fpw_module", "FullyShardedDataParallel of fairscale", anywhere=True),
    Wrapper("_checkpoint_wrapped_module", "checkpoint_wrapper, by named_parameters()", anywhere=True),
    Wrapper("_forward_module", "strategies of Lightning before 2.1"),
    Wrapper("_module", "GradSampleModule of Opacus"),
    Wrapper("ema_model", "EMA of ema-pytorch, the average", own=("initted", "step")),
    Wrapper("ema_model", "EMA of ema-pytorch, the average"),
    Wrapper("online_model", "EMA of ema-pytorch, the model that trains"),
    Wrapper(
        _PEFT, "PeftModel", refuses=_FACTORS,
        hint="they are of an adapter: ckpt merge --method lora folds one that was saved; or leave them out: "
        "--drop '*.lora_*'",
    ),
    Wrapper("base_layer", "an adapted layer of a PeftModel", anywhere=True, after=_PEFT),
    Wrapper("original_module", "a module of a PeftModel as it was", anywhere=True, after=_PEFT),
    Wrapper("modules_to_save.default", "a module of a PeftModel that was trained whole", anywhere=True, after=_PEFT),
)  # fmt: skip
PREFIXES = (*dict.fromkeys(f"{row.mark}." for row in WRAPPERS if not row.anywhere), "model.")
SEGMENTS = tuple(row.mark for row in WRAPPERS if row.anywhere and not row.after)
# Its mark is the name that the user gave it: taken off where the file says that it is Lightning's, and once.
ATTRIBUTE = Wrapper("*", "the attribute of a LightningModule")


@dataclass(frozen=True, slots=True)
class Parametrization:
    """Several tensors that stand for one: what follows on its name, and the operation that folds them into it."""

    endings: tuple[str, ...]
    origin: str
    operation: str
    home: str = ""  # what stands before the name


_NEW = "parametrizations."
PARAMETRIZATIONS = (
    Parametrization((".original0", ".original1"), "weight_norm of torch.nn.utils.parametrizations",
                    "fold_weight_norm", _NEW),
    Parametrization((".original", ".0._u", ".0._v"), "spectral_norm of torch.nn.utils.parametrizations",
                    "fold_spectral_norm", _NEW),
    Parametrization((".original",), "torch.nn.utils.parametrize", "", _NEW),
    Parametrization(("_g", "_v"), "torch.nn.utils.weight_norm", "fold_weight_norm"),
    Parametrization(("_orig", "_u", "_v"), "torch.nn.utils.spectral_norm", "fold_spectral_norm"),
    Parametrization(("_orig", "_mask"), "torch.nn.utils.prune", "fold_mask"),
)  # fmt: skip
