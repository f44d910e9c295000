"""Know by their names the tensors that are zero or constant in a healthy model; checks and preflight use one list."""

from __future__ import annotations

import re

__all__ = ["adapter_of", "is_mask", "is_meant"]

# Before and behind a whole word: the end of the name, anything but a letter, or a change of case as in ``zeroConv``.
_START, _END = r"(?-i:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))", r"(?-i:(?![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
_MASK = re.compile(r"mask|(?:^|[._])alibi")
# Names of tensors that often are zero in a healthy model: biases and means, the second matrix of an adapter, gates,
# residual branches that are initialised to zero, learned positions.
_OFTEN_ZERO = re.compile(
    r"bias|beta(?:$|\.)|running_mean|lora_B|lora[._]up|lora_embedding_A|adaln|rel_pos|pos_emb|sampling_offsets|attention_weights"
    rf"|{_START}zero(?:s|convs?)?{_END}|{_START}position"
    r"|(?:^|[._])(?:gate|gates|alpha|offset|shift|token|gamma|scale|logvar|temperature)(?:$|[._])",
    re.IGNORECASE,
)
_OFTEN_CONSTANT = re.compile(
    r"bias|scale|gamma|running_var|lambda|(?:^|[._])(?:ls\d*|alpha|beta|gate|temperature|freqs)(?:$|[._])",
    re.IGNORECASE,
)
# Adapters start with a zero or constant factor, so that they change nothing before training: LoRA, LoHa, OFT, MiSS.
_ADAPTER = re.compile(
    r"(^|[._])((rand|vb|gra|de)?lora|hada|lokr|vera|ia3|oft|boft|hra|shira|road|c3a|fourierft|waveft|miss_block|bone"
    r"|adapter|adapters)(?=[._]|$)",
    re.IGNORECASE,
)
# The factors of LoRA that are random at the start; all others of an adapter may begin with zeros or with one number.
_RANDOM_FACTOR = re.compile(r"lora_A|lora[._]down|lora_embedding_B")


def is_mask(key: str) -> bool:
    """Return whether the name says that a tensor is a mask, where infinities and zeros are ordinary values."""
    return _MASK.search(key.rpartition(".")[2]) is not None


def is_meant(key: str, value: complex) -> bool:
    """Return whether the name says that a tensor may have this one value throughout in a healthy model."""
    if is_mask(key) or (adapter_of(key) and not _RANDOM_FACTOR.search(key)):
        return True
    return (_OFTEN_CONSTANT if value else _OFTEN_ZERO).search(key) is not None


def adapter_of(key: str) -> str:
    """Return the beginning of ``key`` that the tensors of one adapter share, or an empty string for other tensors."""
    found = _ADAPTER.search(key)
    return key[: found.end()] if found else ""
