"""Say what happens to each tensor of a GGUF file on its way to a file of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptkit.core.checkpoint import TensorInfo
from ckptkit.core.text import quoted
from ckptkit.errors import RuleError
from ckptkit.rules.gguf.architectures import ARCHITECTURES, Architecture, Experts
from ckptkit.rules.transformers.steps import Step
from ckptkit.tensor_ops.operation import Operation
from ckptkit.tensor_ops.registry import parse_operation

__all__ = ["steps_of"]

_KEY = re.compile(r"(?:blk\.(?P<layer>[0-9]+)\.)?(?P<module>[a-z_0-9]+)\.(?P<ending>weight|bias)")
_COMPUTED = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short", "attn_rot_embd"})  # from the config
_EXPERT_PARTS = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}
_MATRICES = frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"})
_HEADS = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}


def steps_of(
    architecture: str, metadata: Mapping[str, object], infos: Mapping[str, TensorInfo | None], where: str
) -> list[Step]:
    """Return a step for each key that the architecture has; other keys have none.

    ``where`` begins messages. Raises ``RuleError`` where the metadata lacks a number of heads, and where experts are
    not stacked.
    """
    return list(_File(architecture, ARCHITECTURES[architecture], metadata, infos, where).steps())


@dataclass(frozen=True, slots=True)
class _File:
    """The names, metadata and tensors of a GGUF file."""

    architecture: str
    row: Architecture
    metadata: Mapping[str, object]
    infos: Mapping[str, TensorInfo | None]
    where: str

    def steps(self) -> Iterator[Step]:
        """Yield what happens to each known key."""
        for key, info in self.infos.items():
            match = _KEY.fullmatch(key)
            if match is None:
                continue
            layer, module, ending = match.group("layer", "module", "ending")
            experts = self.row.experts if layer is not None else None
            if module in _COMPUTED:
                yield Step((key,), ())
            elif experts is not None and module == "ffn_gate_inp":
                yield Step((key,), (f"model.layers.{layer}.{experts.router}.{ending}",))
            elif experts is not None and module in _EXPERT_PARTS:
                yield self._unstacked(key, info, f"model.layers.{layer}", experts)
            else:
                pattern = self.row.names.get(module if layer is None else f"blk.{{i}}.{module}")
                if pattern is not None:
                    new = f"{pattern.replace('{i}', layer or '')}.{ending}"
                    yield Step((key,), (new,), tuple(self._operations(module, ending, info)))

    def _operations(self, module: str, ending: str, info: TensorInfo | None) -> Iterator[Operation]:
        if self.row.is_permuted and module in _HEADS:
            yield parse_operation({"rope_permute": {"heads": self._heads(module), "direction": "to_hf"}})
        elif self.row.norm_offset and module.endswith("norm") and ending == "weight":
            yield parse_operation({"add": {"value": -self.row.norm_offset}})
        elif self.row.is_transposed and module in _MATRICES and ending == "weight":
            yield parse_operation("transpose")
        elif module == "ffn_gate_inp_shexp" and info is not None and len(info.shape) == 1:
            yield parse_operation({"reshape": {"shape": [1, -1]}})  # the converter removes dims of size 1

    def _heads(self, module: str) -> int:
        names = [f"{self.architecture}.{_HEADS[module]}", f"{self.architecture}.{_HEADS['attn_q']}"]
        found = next((self.metadata[name] for name in names if name in self.metadata), None)
        if not isinstance(found, int) or found < 1:
            raise RuleError(f"{self.where}: the metadata {quoted(names[0])} is {found}, and must be a number of heads")
        return found

    def _unstacked(self, key: str, info: TensorInfo | None, layer: str, experts: Experts) -> Step:
        if info is None or len(info.shape) != 3:
            shape = "unknown" if info is None else str(list(info.shape))
            raise RuleError(
                f"{self.where}: the shape of {quoted(key)} is {shape}, and must be that of stacked matrices"
            )
        match = _KEY.fullmatch(key)
        part = _EXPERT_PARTS[match["module"]] if match else ""
        count = info.shape[0]
        names = tuple(
            f"{layer}.{experts.projection.replace('{e}', str(number))}.{getattr(experts, part)}.weight"
            for number in range(count)
        )
        return Step((key,), names, (parse_operation({"unstack": {"parts": count}}),))
