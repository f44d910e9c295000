"""Convert and merge checkpoints with one call each: open the inputs, plan, write the output, and close the inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptkit.core.arguments import has_no_argument, require_choice, require_path, takes_rules
from ckptkit.core.checkpoint import Checkpoint
from ckptkit.core.config_files import default_error_path, json_bytes
from ckptkit.core.progress import Progress
from ckptkit.core.torch_types import DType
from ckptkit.formats.writing.outputs import write_small_file
from ckptkit.formats.writing.reflink import Reflink
from ckptkit.inputs import CheckpointLike, opened
from ckptkit.plans.adapters.adapter_formats import ADAPTER_FORMATS, AdapterFormat, adapter_path
from ckptkit.plans.adapters.layers import AsLayer
from ckptkit.plans.adapters.reading import LoraConfigLike
from ckptkit.plans.execute import Prepared, execute, execute_prepared, workers_of
from ckptkit.plans.inputs import roles_of
from ckptkit.plans.metadata.edits import edit_metadata, refuse_without_metadata
from ckptkit.plans.output import choose_output
from ckptkit.plans.policies import OnMismatch, OnMissing, OnUnexpected
from ckptkit.plans.quantized.as_codes import QuantizeLike
from ckptkit.plans.writing.written import Written
from ckptkit.quantized.view import DequantizeLike
from ckptkit.rules.model import RulesLike
from ckptkit.tasks.executor_type import Executor

__all__ = ["convert", "convert_adapter", "extract_lora", "merge", "merge_lora"]


def convert(
    source: CheckpointLike,
    out: str | os.PathLike[str],
    *,
    dtype: str | DType | None = None,
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str | None = None,
    force: bool = False,
    only_tensors: bool = False,
    keep_unknown: bool = False,
    reflink: Reflink = "auto",
    skip_unread: bool = False,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
    carry: bool = False,
    resume: bool = False,
    verify: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write a checkpoint in another format, in shards or with another dtype, as ``ckpt convert`` does.

    ``source`` is a path, a Checkpoint, a Module or a mapping of tensors. ``dtype``, ``dequantize``, ``quantize``,
    ``skip_unread``, ``metadata`` and ``drop_metadata`` are as in ``plan_remap``. ``out``, ``format``,
    ``max_shard_size``, ``force``, ``only_tensors``, ``keep_unknown`` and ``reflink`` are as in ``choose_output``;
    ``carry``, ``resume``, ``verify``, ``allow_overflow``, ``progress`` and ``executor`` as in ``execute``.

    Raises:
        ArgumentError: An argument has a wrong type, or an input is not a path and there is an ``executor``.
        PathError: The source cannot be read.
        FormatError: The source is not a valid checkpoint.
        PlanError: A tensor cannot be copied or cast, or the format cannot hold it.
        OutputError: The output exists (without ``force``), cannot be written, or has no place for ``metadata``.

    Example:
        >>> import ckptkit, os, tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     out = os.path.join(directory, "half.safetensors")
        ...     written = ckptkit.convert("fixtures/lenet_10class.pth", out, dtype="float16", verify=True)
        >>> written.format, written.tensors
        ('safetensors', 10)
    """
    require_path(out, "out")
    from ckptkit.plans.remap import plan_remap

    output = choose_output(
        out, format=format, max_shard_size=max_shard_size, force=force, only_tensors=only_tensors,
        keep_unknown=keep_unknown, reflink=reflink,
    )  # fmt: skip
    refuse_without_metadata(output, metadata, drop_metadata)
    elsewhere = workers_of(executor, {"source": source})
    with _opened({"source": source}) as sources, default_error_path(_path(source)):
        plan = plan_remap(
            sources["source"],
            dtype=dtype,
            dequantize=dequantize,
            quantize=quantize,
            skip_unread=skip_unread,
            metadata=metadata,
            drop_metadata=drop_metadata,
        )
        plan = replace(plan, command="convert")
        return execute_prepared(
            Prepared(plan), sources, output, verify=verify, allow_overflow=allow_overflow, carry=carry, resume=resume,
            progress=progress, elsewhere=elsewhere,
        )  # fmt: skip


@has_no_argument(
    method="it copies where keys and shapes agree: plan_recipe(recipe) merges by a method, and execute writes that",
)
@takes_rules
def merge(
    base: CheckpointLike,
    donors: CheckpointLike | Sequence[CheckpointLike],
    out: str | os.PathLike[str],
    rules: RulesLike | None = None,
    *,
    on_missing: OnMissing | None = None,
    on_unexpected: OnUnexpected = "skip",
    on_mismatch: OnMismatch = "error",
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str | None = None,
    force: bool = False,
    only_tensors: bool = False,
    keep_unknown: bool = False,
    reflink: Reflink = "auto",
    skip_unread: bool = False,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
    carry: bool = False,
    resume: bool = False,
    verify: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write ``base`` with the values of the donors where key and shape agree, as ``ckpt merge`` does.

    ``base`` and each donor are a path, a Checkpoint, a Module or a mapping of tensors. ``rules``, ``dequantize``,
    ``quantize``, ``skip_unread``, ``require``, ``min_coverage``, ``metadata``, ``drop_metadata`` and the policies are
    as in ``plan_merge``; the other arguments are as in ``convert``. ``coverage`` of the result is the share of the
    base's elements that got values from a donor, and ``from_base`` names the keys that have the values of the base.

    Raises:
        ArgumentError: An argument has a wrong type, or an input is not a path and there is an ``executor``.
        PathError: An input cannot be read.
        FormatError: An input is not a valid checkpoint.
        RuleError: A rule or a pattern is not valid, or matches nothing.
        PlanError: Nothing fits, ``require`` or ``min_coverage`` is not met, a policy says ``error``, or a tensor cannot
            be copied, cast or held by the format.
        OutputError: The output exists (without ``force``), cannot be written, or has no place for ``metadata``.

    Example:
        >>> import ckptkit, os, tempfile
        >>> base, donor = "fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt"
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     out = os.path.join(directory, "merged.safetensors")
        ...     written = ckptkit.merge(base, donor, out, ["module.*=*"])
        >>> written.tensors
        10
    """
    require_path(out, "out")
    from ckptkit.plans.merge import plan_merge

    output = choose_output(
        out, format=format, max_shard_size=max_shard_size, force=force, only_tensors=only_tensors,
        keep_unknown=keep_unknown, reflink=reflink,
    )  # fmt: skip
    refuse_without_metadata(output, metadata, drop_metadata)
    given = [donors] if isinstance(donors, str) or not isinstance(donors, Sequence) else donors
    elsewhere = workers_of(executor, roles_of(base, given))
    with _opened(roles_of(base, given)) as sources:
        opened_base, *opened_donors = sources.values()
        with default_error_path(_path(given[0]) if len(given) == 1 else None):
            plan = plan_merge(
                opened_base, opened_donors, rules,
                on_missing=on_missing, on_unexpected=on_unexpected, on_mismatch=on_mismatch, dequantize=dequantize,
                quantize=quantize, skip_unread=skip_unread,
                require=require, min_coverage=min_coverage, metadata=metadata, drop_metadata=drop_metadata,
            )  # fmt: skip
        return execute_prepared(
            Prepared(plan), sources, output, verify=verify, allow_overflow=allow_overflow, carry=carry, resume=resume,
            progress=progress, elsewhere=elsewhere,
        )  # fmt: skip


def merge_lora(
    base: CheckpointLike,
    adapter: CheckpointLike | Sequence[CheckpointLike],
    out: str | os.PathLike[str],
    lora_config: LoraConfigLike | Sequence[LoraConfigLike | None] | None = None,
    rules: RulesLike | None = None,
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    on_unexpected: OnUnexpected = "error",
    dequantize: DequantizeLike = False,
    quantize: QuantizeLike | None = None,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str | None = None,
    force: bool = False,
    only_tensors: bool = False,
    keep_unknown: bool = False,
    reflink: Reflink = "auto",
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
    carry: bool = False,
    resume: bool = False,
    verify: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Written:
    """Write ``base`` with one or several LoRA adapters folded into its weights, as ``ckpt merge --method lora`` does.

    ``base`` and each adapter are a path, a Checkpoint, a Module or a mapping of tensors. ``lora_config``, ``rules``,
    ``scale``, ``weights``, ``on_unexpected``, ``dequantize``, ``quantize``, ``require`` and ``min_coverage`` are as in
    ``plan_lora``;
    the other arguments are as in ``convert``.

    Raises:
        ArgumentError: An argument has a wrong type, or an input is not a path and there is an ``executor``.
        PathError: An input cannot be read.
        FormatError: An input is not a valid checkpoint.
        RuleError: A tensor of the adapter has no matching key in the base, or a rule is not valid.
        PlanError: There is no configuration of the adapter, a weight cannot be changed, or ``require`` or
            ``min_coverage`` is not met.
        OutputError: The output exists (without ``force``), cannot be written, or has no place for ``metadata``.

    Example:
        >>> import ckptkit, os, tempfile, torch
        >>> base = {"fc.weight": torch.zeros(2, 2)}
        >>> adapter = {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     out = os.path.join(directory, "merged.safetensors")
        ...     written = ckptkit.merge_lora(base, adapter, out, {"r": 1, "lora_alpha": 2})
        ...     with ckptkit.open_checkpoint(out) as merged:
        ...         merged.read("fc.weight").tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    require_path(out, "out")
    from ckptkit.plans.adapters.fold import plan_lora

    output = choose_output(
        out, format=format, max_shard_size=max_shard_size, force=force, only_tensors=only_tensors,
        keep_unknown=keep_unknown, reflink=reflink,
    )  # fmt: skip
    refuse_without_metadata(output, metadata, drop_metadata)
    given = [adapter] if isinstance(adapter, str) or not isinstance(adapter, Sequence) else adapter
    elsewhere = workers_of(executor, roles_of(base, given))
    with _opened(roles_of(base, given)) as sources:
        opened_base, *donors = sources.values()
        with default_error_path(_path(given[0]) if len(given) == 1 else None):
            plan = plan_lora(
                opened_base, donors, lora_config, rules, scale=scale, weights=weights, on_unexpected=on_unexpected,
                dequantize=dequantize, quantize=quantize, require=require, min_coverage=min_coverage,
            )  # fmt: skip
            plan = edit_metadata(plan, metadata, drop_metadata)
        return execute_prepared(
            Prepared(plan), sources, output, verify=verify, allow_overflow=allow_overflow, carry=carry, resume=resume,
            progress=progress, elsewhere=elsewhere,
        )  # fmt: skip


def extract_lora(
    base: CheckpointLike,
    tuned: CheckpointLike,
    out: str | os.PathLike[str],
    rank: int = 8,
    rules: RulesLike | None = None,
    *,
    as_layer: AsLayer = "auto",
    dequantize: DequantizeLike = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
    verify: bool = False,
    allow_overflow: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the LoRA adapter nearest to a change of weights, as ``ckpt merge --method extract-lora`` does.

    ``base`` and ``tuned`` are a path, a Checkpoint, a Module or a mapping of tensors. ``out`` is the path of an
    ``adapter_model.safetensors``. ``adapter_config.json`` is written beside it, so that peft loads the directory. The
    directory is made if it does not exist.
    ``rank``, ``rules``, ``as_layer``, ``dequantize``, ``require`` and ``min_coverage`` are as in ``plan_extract_lora``;
    the other arguments are as in ``convert``.

    Raises:
        PathError: An input cannot be read.
        FormatError: An input is not a valid checkpoint.
        RuleError: A rule or a pattern is not valid.
        PlanError: The tensors of the two inputs cannot be compared, no weight changed, a weight is quantised, or
            ``require`` or ``min_coverage`` is not met.
        OutputError: One of both files exists (without ``force``), cannot be written, or has no place for ``metadata``.

    Example:
        >>> import ckptkit, os, tempfile, torch
        >>> base, tuned = ({"fc.weight": torch.full((4, 4), value)} for value in (0.0, 1.0))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     written = ckptkit.extract_lora(base, tuned, os.path.join(directory, "adapter_model.safetensors"), 2)
        ...     sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    require_path(out, "out")
    from ckptkit.plans.adapters.extract import plan_extract_lora
    from ckptkit.plans.adapters.peft_config import adapter_config, adapter_config_target

    output = choose_output(out, force=force)
    refuse_without_metadata(output, metadata, drop_metadata)
    with adapter_config_target(output) as target, _opened(roles_of(base, [tuned])) as sources:
        with default_error_path(_path(tuned)):
            plan = plan_extract_lora(
                sources["base"], sources["donor"], rank, rules, as_layer=as_layer, dequantize=dequantize,
                require=require, min_coverage=min_coverage,
            )  # fmt: skip
            plan = edit_metadata(plan, metadata, drop_metadata)
        written = execute(plan, sources, output, verify=verify, allow_overflow=allow_overflow, progress=progress)
        write_small_file(target, json_bytes(adapter_config(plan, sources["base"])))
    return written


def convert_adapter(
    source: CheckpointLike,
    out: str | os.PathLike[str],
    adapter: AdapterFormat,
    *,
    base: CheckpointLike | None = None,
    lora_config: LoraConfigLike | None = None,
    force: bool = False,
    metadata: Mapping[str, str] | None = None,
    drop_metadata: str | Sequence[str] = (),
    verify: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write an adapter in the format of PEFT, kohya or diffusers, as ``ckpt convert --adapter`` does.

    The bytes of every factor stay the same. ``source``, ``adapter``, ``base`` and ``lora_config`` are as in
    ``plan_convert_adapter``. For ``peft``, ``out`` is a directory, or an ``adapter_model.safetensors`` in it, and
    ``adapter_config.json`` is written beside that; for the others it is a file. The other arguments are as in
    ``convert``.

    Raises:
        PathError: An input cannot be read.
        FormatError: An input is not a valid checkpoint.
        RuleError: The format cannot hold the adapter, or a tensor has no place in the base.
        PlanError: The scale of the adapter is unknown.
        OutputError: The output exists (without ``force``), cannot be written, or has no place for ``metadata``.

    Example:
        >>> import ckptkit, os, tempfile, torch
        >>> source = {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}
        >>> config = {"r": 1, "lora_alpha": 2}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     out = os.path.join(directory, "kohya.safetensors")
        ...     written = ckptkit.convert_adapter(source, out, "kohya", lora_config=config)
        ...     with ckptkit.open_checkpoint(out) as kohya:
        ...         kohya.read("lycoris_fc.alpha").item()
        2.0
    """
    require_path(out, "out")
    from ckptkit.plans.adapters.convert import plan_conversion
    from ckptkit.plans.adapters.peft_config import adapter_config_target

    require_choice(adapter, ADAPTER_FORMATS, "adapter")
    output = choose_output(adapter_path(out, adapter), force=force)
    refuse_without_metadata(output, metadata, drop_metadata)
    given = {"source": source} if base is None else {"source": source, "base": base}
    with (
        adapter_config_target(output) if adapter == "peft" else contextlib.nullcontext() as target,
        _opened(given) as sources,
    ):
        with default_error_path(_path(source)):
            conversion = plan_conversion(sources["source"], adapter, sources.get("base"), lora_config)
            plan = edit_metadata(conversion.plan, metadata, drop_metadata)
        written = execute(plan, sources["source"], output, verify=verify, progress=progress)
        if target is not None and conversion.config is not None:
            write_small_file(target, json_bytes(conversion.config))
    return written


@contextlib.contextmanager
def _opened(inputs: Mapping[str, CheckpointLike]) -> Iterator[dict[str, Checkpoint]]:
    with contextlib.ExitStack() as stack:
        yield {role: stack.enter_context(opened(value, role)) for role, value in inputs.items()}


def _path(value: CheckpointLike) -> str | None:
    """Return the path that an error without one is about, if an argument is a path."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else None
