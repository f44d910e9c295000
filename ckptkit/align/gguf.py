"""Rules for a GGUF file, by what its architecture says about the names in files of transformers."""

from __future__ import annotations

from ckptkit.align.model import Alignment
from ckptkit.align.writing.to_rules import Suggestion
from ckptkit.core.checkpoint import Checkpoint, TensorInfo
from ckptkit.core.text import plural
from ckptkit.errors import RuleError
from ckptkit.rules.apply import apply_rules
from ckptkit.rules.gguf import GgufStages
from ckptkit.rules.model import Rules

__all__ = ["align_gguf"]

_CONFIDENCE = 0.95


def align_gguf(expected: Checkpoint, found: Checkpoint) -> Alignment | None:
    """Return the rules of ``gguf:auto`` if they give exactly the expected keys and shapes; else None."""
    if "gguf" not in found.format or "gguf" in expected.format:
        return None
    plain = {key: info if info.kind == "dense" else TensorInfo(key, "F32", info.shape) for key, info in found.items()}
    try:
        stages, _ = GgufStages().stages(plain, None, found)
        key_map = apply_rules(Rules(tuple(stages)), plain)
        shapes = {key: info.shape for key, info in key_map.describe(plain).items()}
    except RuleError:
        return None
    if shapes != {key: info.shape for key, info in expected.items()}:
        return None
    architecture = next(entry.value for entry in found.entries if entry.path == "general.architecture")
    outputs = key_map.outputs()
    suggestions = []
    for rule in (rule for stage in stages for rule in stage.rules):
        keys = {key: made.sources for key, made in outputs.items() if made.rule == str(rule)}
        suggestions.append(
            Suggestion(
                tuple(pattern.text for pattern in rule.sources),
                tuple(template.text for template in rule.templates[0]) if rule.templates else (),
                rule.operations,
                f"{architecture} in GGUF",
                _CONFIDENCE,
                keys,
                sum(expected[key].elements for key in keys),
            )
        )
    quantized = sum(info.kind != "dense" for info in found.values())
    note = f"{plural(quantized, 'weight')} of found are stored in blocks: --dequantize makes numbers of them"
    return Alignment(expected, found, (), tuple(suggestions), (), (), (), (), note=note if quantized else "")
