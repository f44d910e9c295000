"""Plans of a LoRA adapter that is extracted from the change of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ckptkit.adapters.keys import PEFT_PREFIX
from ckptkit.core.arguments import require_number
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.config_files import read_settings
from ckptkit.core.coverage.requirements import Requirements, parse_requirements
from ckptkit.core.files.payloads import same_bytes
from ckptkit.core.patterns import literal, pattern_for
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.core.text import human_bytes, listed, quoted, shell_word
from ckptkit.core.ties import tied_keys
from ckptkit.errors import CkptkitError, ModelError, PlanError
from ckptkit.formats.directories.side_files import file_beside
from ckptkit.inputs import CheckpointLike, rules_for
from ckptkit.plans.adapters.inputs import BASE, DONOR, opened_roles
from ckptkit.plans.adapters.layers import AsLayer, AsLayerAction, LayerJudge, as_layer_policy
from ckptkit.plans.adapters.requirements import refuse_unmet
from ckptkit.plans.adapters.tied import TiedChanges
from ckptkit.plans.plan import Dropped, Plan, Source, Step
from ckptkit.plans.policies import Policy
from ckptkit.plans.quantized import QuantizedInputs, change_reason, check_quantized, refuse_part
from ckptkit.plans.quantized.as_numbers import DequantizedInputs
from ckptkit.plans.steps import complete_step, dropped_entries
from ckptkit.quantized.view import DequantizeLike
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.model import RulesLike
from ckptkit.tensor_ops.lora import ExtractLora, largest_rank
from ckptkit.tensor_ops.operation import ARITHMETIC
from ckptkit.tensor_ops.recipes import Recipe

__all__ = ["plan_extract_lora"]

_EXTRACT = "extract-lora"
_FACTORS = ("lora_A.weight", "lora_B.weight")
_ATTENTION = ("in_proj_weight", "q_proj_weight")  # of nn.MultiheadAttention
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
_SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size", "n_positions")
_WHOLE = "saved whole"
_UNCHANGED = "it did not change"


def plan_extract_lora(
    base: CheckpointLike,
    tuned: CheckpointLike,
    rank: int,
    rules: RulesLike | None = None,
    *,
    as_layer: AsLayer = "auto",
    dequantize: DequantizeLike = False,
    require: str | Sequence[str] = (),
    min_coverage: float = 0.0,
) -> Plan:
    """Return the plan of the LoRA adapter of rank ``rank`` that is nearest to the change from ``base`` to ``tuned``.

    Each weight of a linear layer, an embedding or a convolution that changed gives two factors of its change, by
    singular value decomposition. A weight that cannot have this rank gets the largest rank that it can have. The other
    layers that changed, such as norms, are saved whole. The names and shapes are those that PEFT loads. A tensor that
    did not change is listed as dropped, and so is one that changed and has no place in an adapter of PEFT.

    Whether a tensor changed is a fact about values, so both inputs are read once, in chunks and without torch. That
    takes the time of a copy of the model: about a second for each 2 GB that the disk gives in a second. Without values,
    as for a mapping of ``TensorInfo``, every tensor counts as changed.

    A file does not say which weights are embeddings, or are stored as ``[in, out]``, as in Conv1D of GPT-2. The classes
    of a live model tell; for a file, names, biases and ``config.json`` do. The notes of the plan say what was decided.
    ``as_layer`` decides instead: ``linear``, ``embedding``, ``transposed`` (``[in, out]``) or ``whole``, or a mapping
    of patterns of keys to these. ``whole`` saves the layer without a decomposition.

    ``base`` and ``tuned`` are a path, a Checkpoint, a Module, or a mapping of tensors or of ``TensorInfo``. What is
    opened here is closed at the end; give the same paths to ``execute``. ``rules`` are a list of renames, the path of a
    rule file, its parsed content, or ``Rules``; they rename and filter the keys of ``tuned`` first.

    With ``dequantize``, quantised weights of both inputs are numbers, as in ``plan_remap``.

    ``require`` is a pattern or a list of patterns: the adapter must hold the change of every matching key of the base.
    ``min_coverage`` is the least share of the base's elements whose change it must hold, between 0 and 1.

    Raises ``PlanError`` where the base does not have a key or has it in another shape, where a weight is quantised,
    and where no weight changed. It is also raised where tensors that are one in the base differ in ``tuned``, and where
    ``require`` or ``min_coverage`` is not met.

    Example:
        >>> base, tuned = {"fc.weight": torch.zeros(2, 2)}, {"fc.weight": torch.ones(2, 2)}
        >>> [step.out.key for step in plan_extract_lora(base, tuned, rank=1).steps]
        ['base_model.model.fc.lora_A.weight', 'base_model.model.fc.lora_B.weight']
    """
    require_number(rank, "rank", "an int of at least 1", at_least=1, whole=True)
    policy = as_layer_policy(as_layer)
    requirements = parse_requirements(require, min_coverage)
    with opened_roles(base, tuned) as stored:
        inputs = DequantizedInputs(stored, dequantize)
        roles = inputs.checkpoints
        base_side, donor = roles.values()
        parsed = rules_for(rules, donor)
        key_map = apply_rules(parsed, donor)
        if key_map.copied_or_computed:
            raise PlanError("rules may rename and drop the tensors of the tuned model, not copy or compute them")
        quantized = QuantizedInputs(roles, base_side, BASE)
        for old, key in key_map.renamed.items():
            refuse_part(quantized.weights[DONOR], old, change_reason(_EXTRACT))
            quantized.refuse_change(key, _EXTRACT)
        extraction = _Extraction(roles, {new: old for old, new in key_map.renamed.items()}, rank, policy)
        steps = tuple(extraction.steps())
        if requirements:
            _refuse_unmet(requirements, roles, extraction, key_map.dropped)
        unused = policy.unused(extraction.keys, "the model", allow_unused=parsed.allow_unused)
        left_out = [Dropped(DONOR, key, reason) for key, reason in key_map.dropped.items()]
        plan = Plan(
            steps,
            (*left_out, *extraction.dropped, *dropped_entries(donor, DONOR)),
            {"format": "pt"},
            (*key_map.notes, *extraction.notes, *unused),
            command="merge",
        )
        return inputs.finish(check_quantized(plan, quantized))


def _refuse_unmet(
    requirements: Requirements, roles: Mapping[str, Checkpoint], extraction: _Extraction, left_out: Mapping[str, str]
) -> None:
    base, donor = roles.values()
    keys = {old: key for key, old in extraction.names.items()}
    reasons = {
        key: left_out.get(key, "not in the tuned model under this name") for key in base if key not in extraction.names
    }
    reasons |= {keys[drop.key]: drop.reason for drop in extraction.dropped if drop.key in keys}
    paths = [CheckpointSummary.of(each, ()).argument or role.upper() for role, each in ((BASE, base), (DONOR, donor))]
    refuse_unmet(
        requirements,
        base,
        extraction.held,
        reasons,
        hint=f"see what changed: ckpt merge {' '.join(paths)} -o OUT --method extract-lora --dry-run",
        call="see what changed in the plan without requirements: plan_extract_lora(base, tuned, rank)",
    )


class _Extraction:
    """The plan of an extraction while it is made; ``names`` has the key of the tuned model for each key of the base."""

    def __init__(
        self, roles: Mapping[str, Checkpoint], names: Mapping[str, str], rank: int, policy: Policy[AsLayerAction]
    ) -> None:
        self._roles, self.names, self._rank = roles, names, rank
        self._base, self._donor = roles[BASE], roles[DONOR]
        self._config = {**_config(self._donor), **_config(self._base)}
        sizes = {name: size for name in _SIZES if type(size := self._config.get(name)) is int and size > 1}
        live = self._base.layers or _renamed_layers(self._donor.layers, names)
        self._judge = LayerJudge(self._base, policy, live, sizes)
        self._modules: dict[str, list[str]] = {}  # module -> the keys below it
        self.keys = list(dict.fromkeys((*self._base, *names)))
        self._add_to_modules(self.keys)
        self._same_as: Mapping[str, str] = {}  # of tied keys that are saved whole: the key whose values they have
        self.dropped: list[Dropped] = []
        self.notes: list[str] = []
        self.held: set[str] = set()  # keys of the base whose change the adapter holds

    def steps(self) -> list[Step]:
        """Return the steps of the adapter, and record what is left out and what was decided."""
        ties = TiedChanges(self._base, self._donor, self.names, self._judge, self._config)
        changed = ties.resolve(list(self._changed_keys()))
        self.dropped += ties.dropped
        self._same_as = ties.same_as
        self._add_to_modules(key for key in self._same_as if key not in self.keys)
        adapted = {key for key in changed if self._is_adapted(key)}
        whole = self._saved_modules(changed, adapted)
        steps: list[Step] = []
        for key in changed:
            module, _, leaf = key.rpartition(".")
            block = _block_of(module, whole)
            if block is not None:
                steps += self._steps_of_module(block) if whole[block] else ()
                whole[block] = False
            elif key in adapted:
                steps += self._factors(key)
            elif leaf == "bias":
                name = f"{module}.base_layer.bias" if f"{module}.weight" in adapted else key
                steps.append(self._copy(key, name, "the bias"))
            else:
                self.dropped.append(Dropped(DONOR, self.names[key], self._no_place(key, module)))
        for block, is_left in whole.items():  # modules that PEFT saves too, because their names end alike
            steps += self._steps_of_module(block) if is_left else ()
        if not any(step.recipe is not None for step in steps):
            if not changed:
                raise PlanError(
                    "no tensor of the tuned model differs from the base",
                    hint="the first input is the model before the training, and the second is the model after it",
                )
            raise PlanError(
                f"{listed(changed, 2)} changed, and LoRA can hold no factors of that",
                hint="write the changed model itself: ckpt merge BASE TUNED -o OUT",
                call="write the changed model itself: merge(base, tuned, out)",
            )
        kept = {source.key for step in steps for source in step.sources if source.role == DONOR}
        self.dropped = [drop for drop in self.dropped if drop.key not in kept]
        self.notes += [*self._judge.notes(), *ties.notes, *self._note_about_missing()]
        if whole:
            size = sum(step.out.nbytes for step in steps if step.rule.endswith(_WHOLE))
            self.notes.append(f"saved whole, as modules_to_save: {listed(whole, 4)} ({human_bytes(size)})")
        return steps

    def _note_about_missing(self) -> Iterator[str]:
        """Yield a note about tensors of the base that the tuned model does not have, even under a tied key."""
        tied = {key for group in tied_keys(self._base.values()) if self.names.keys() & set(group) for key in group}
        missing = [key for key in self._base if key not in {*self.names, *tied}]
        if missing:
            stays = "stays" if len(missing) == 1 else "stay"
            yield f"the tuned model does not have {listed(missing, 4)}, which {stays} as in the base"

    def _changed_keys(self) -> Iterator[str]:
        unknown = False
        for key, old in self.names.items():
            if key not in self._base or self._base[key].shape != self._donor[old].shape:
                if self._is_named_whole(key, old):
                    yield key
                continue
            try:
                differs = self._differs(key, old)
            except (PlanError, ModelError):  # a description, or a tensor on the meta device
                differs = unknown = True
            if differs:
                yield key
            else:
                self.dropped.append(Dropped(DONOR, old, _UNCHANGED))
        if unknown:
            self.notes.append("some values could not be read, so these tensors count as changed")

    def _is_named_whole(self, key: str, old: str) -> bool:
        """Return whether a tensor that the base does not have in this shape is saved whole; refuse any other."""
        info, base = self._donor[old], self._base
        if self._judge.policy.action(key) == "whole":
            return True
        group = next((group for group in tied_keys(self._donor.values()) if old in group), [])
        others = [new for new, name in self.names.items() if name in group and new in base]
        if key not in base and others:
            self.dropped.append(Dropped(DONOR, old, f"one tensor with {quoted(others[0])}"))
            return False
        has = f"has it as {list(base[key].shape)}" if key in base else "does not have it"
        pattern = pattern_for(key, self.names)
        raise PlanError(
            f"{quoted(key)} is {list(info.shape)} in the tuned model, and the base {has}",
            hint=f"leave it out: --drop {shell_word(literal(old))}; or save its module whole: "
            f"--as-layer {shell_word(f'{pattern}=whole')}",
            call=f"leave it out: parse_rules(drop=[{literal(old)!r}]); or save its module whole: "
            f'as_layer={{{pattern!r}: "whole"}}',
        )

    def _differs(self, key: str, old: str) -> bool:
        first, second = self._base[key], self._donor[old]
        if first.dtype == second.dtype:
            return not same_bytes(self._base.payload(key), self._donor.payload(old))
        import torch

        left, right = self._base.read(key), self._donor.read(old)
        wide = torch.promote_types(left.dtype, right.dtype)
        return not torch.equal(left.to(wide), right.to(wide))

    def _is_adapted(self, key: str) -> bool:
        """Return whether a changed tensor gets factors."""
        info, base = self._donor[self.names[key]], self._base.get(key)
        if base is None or base.shape != info.shape or self._attention_block(key.rpartition(".")[0]) is not None:
            return False
        can_compute = {info.dtype, base.dtype} <= ARITHMETIC or info.kind != "dense"  # complete_step says why not
        return can_compute and self._judge.layer(key, info.shape) != "whole"

    def _attention_block(self, module: str) -> str | None:
        """Return the attention block of torch that owns a module; its out_proj is called without its adapter."""
        parent = module.rpartition(".")[0] if module.rpartition(".")[2] == "out_proj" else module
        return parent if any(f"{parent}.{name}" in self._base for name in _ATTENTION) else None

    def _add_to_modules(self, keys: Iterable[str]) -> None:
        for key in keys:
            for module in _modules_above(key):
                self._modules.setdefault(module, []).append(key)

    def _saved_modules(self, changed: Sequence[str], adapted: Collection[str]) -> dict[str, bool]:
        """Return the modules that the adapter holds whole, each with True."""
        known = self._modules.keys() | self._base.layers.keys()
        inner = {above for module in known for above in _modules_above(module)}
        whole: set[str] = set()
        for key in (*changed, *self._same_as):
            module, _, leaf = key.rpartition(".")
            is_asked = self._judge.policy.action(key) == "whole"
            if key in adapted or (leaf == "bias" and not is_asked):
                continue
            block = self._attention_block(module) or module
            if block and (is_asked or module not in inner or self._attention_block(module)):
                whole.add(block)
        # PEFT saves every module whose name ends with the name of a saved one.
        ends = tuple(whole)
        whole.update(name for name in self._modules if name.endswith(ends))
        return {name: True for name in sorted(whole) if not whole.intersection(_modules_above(name))}

    def _no_place(self, key: str, module: str) -> str:
        if not module:
            return "it changed, and PEFT has no place for a parameter of the model itself"
        option = f"--as-layer {shell_word(literal(key) + '=whole')}"
        return f"it changed, and PEFT can only save all of {quoted(module)} with it: {option}"

    def _steps_of_module(self, module: str) -> Iterator[Step]:
        return (self._copy(key, key, _WHOLE) for key in self._modules[module])

    def _copy(self, key: str, name: str, what: str) -> Step:
        self.held.add(key)
        origin = key if key in self.names else self._same_as.get(key, key)
        source = Source(DONOR, self.names[origin]) if origin in self.names else Source(BASE, origin)
        out = replace(self._roles[source.role][source.key], key=f"{PEFT_PREFIX}{name}")
        return complete_step(Step(out, (source,), "", f"{_EXTRACT}, {what}"), self._roles)

    def _factors(self, key: str) -> Iterator[Step]:
        self.held.add(key)
        old = self.names[key]
        info = self._donor[old]
        layer = self._judge.layer(key, info.shape)
        rank = min(self._rank, largest_rank(info.shape))
        operation = ExtractLora(rank, fan_in_fan_out=layer in ("embedding", "transposed"))
        sources = Source(BASE, key), Source(DONOR, old)
        names = _EMBEDDING_FACTORS if layer == "embedding" else _FACTORS
        for part, (factor, shape) in enumerate(zip(names, operation.shapes([info.shape] * 2), strict=True)):
            out = TensorInfo(f"{PEFT_PREFIX}{key.removesuffix('weight')}{factor}", info.dtype, shape)
            step = Step(out, sources, "", f"{_EXTRACT}, rank {rank}", Recipe((0, 1), (operation,), part))
            yield complete_step(step, self._roles)


def _modules_above(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _block_of(module: str, whole: Mapping[str, bool]) -> str | None:
    return next((name for name in (module, *_modules_above(module)) if name in whole), None)


def _config(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the settings of the ``config.json`` beside a checkpoint, and those of the text model in it."""
    path = file_beside(checkpoint.path, "config.json") if checkpoint.files else None
    if path is None:
        return {}
    with contextlib.suppress(CkptkitError):  # evidence only: a broken config.json does not stop the extraction
        config = read_settings(path, "config.json")
        text = config.get("text_config")
        return {**(text if isinstance(text, Mapping) else {}), **config}
    return {}


def _renamed_layers(layers: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Return the layers of the tuned model by the modules that their tensors have in the base."""
    modules = {new.rpartition(".")[0]: old.rpartition(".")[0] for new, old in names.items()}
    return {new: layers[old] for new, old in modules.items() if old in layers}
