"""Tiny models of the architectures of transformers train with AdamW and get no finding above a note."""

from __future__ import annotations

import inspect
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers_healthy import language_model, loud_findings

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")
# Findings that are right for a tiny model and a batch of eight tokens.
EXPECTED = {
    "DeepseekV4ForCausalLM": ("preflight.zero:*.position_bias",),  # the compressor does not work for eight tokens
    "MraForMaskedLM": ("preflight.zero-gradient:*.attention.output.dense.weight",),  # its attention is 0 on a CPU
    "PhimoeForCausalLM": ("preflight.zero-gradient:*.router.weight",),  # the router has no gradient for such scores
}
# Well-known ones, which must be among them.
KNOWN = {
    "GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration",
}  # fmt: skip
LEAST = 33  # architectures that must be tried, so that the test does not become empty with another transformers


def classes() -> list[Any]:
    """Return each class with a language model head, in the order of transformers."""
    transformers = pytest.importorskip("transformers")
    mappings = [getattr(transformers, head) for head in HEADS]
    found = [kind for mapping in mappings for kind in mapping.values()]
    return list(dict.fromkeys(kind for kind in found if inspect.isclass(kind)))


def test_the_architectures_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """A model is tried if it is small and one batch of token ids has a loss with a gradient.

    A model may have a pooler or a cross attention that this loss does not use. The finding about them is right.
    """
    tried: list[str] = []
    skipped: list[str] = []
    loud: dict[str, list[str]] = {}
    begin = time.monotonic()
    for kind in classes():
        torch.manual_seed(0)
        try:
            setup = language_model(kind)
            assert setup.loss is not None
            setup.loss(setup.model).backward()
        except Exception as error:  # noqa: BLE001 - each config refuses in its own way
            skipped.append(f"{kind.__name__}: {str(error).partition(chr(10))[0][:80]}")
            continue
        unused = [name for name, parameter in setup.model.named_parameters() if parameter.grad is None]
        right = tuple(f"preflight.no-gradient:{name}" for name in unused)
        setup = replace(setup, ignore=right + EXPECTED.get(kind.__name__, ()))
        setup.model.zero_grad()
        tried.append(kind.__name__)
        if found := loud_findings(setup):
            loud[kind.__name__] = found
    with capsys.disabled():
        lines = [f"{len(tried)} tried in {time.monotonic() - begin:.0f} s: {', '.join(tried)}"]
        lines += [f"{len(skipped)} not tried:", *skipped]
        print("", *lines, sep="\n  ")  # noqa: T201 - a sweep says what it tried
    assert loud == {}
    assert len(tried) >= LEAST
    assert set(tried) >= KNOWN
