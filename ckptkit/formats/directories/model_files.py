"""Name the files that describe a model and its tokenizer, which ``save_pretrained`` writes beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptkit.formats.directories.adapters import CONFIG as ADAPTER_CONFIG
from ckptkit.quantized.configuration import CONFIGURATION_FILES

__all__ = ["CHAT_TEMPLATES", "CODE_SUFFIX", "GENERATION_CONFIG", "MODEL_CONFIG", "find_model_files"]

MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of them
CODE_SUFFIX = ".py"
_NAMES = frozenset(
    {
        MODEL_CONFIG, GENERATION_CONFIG, ADAPTER_CONFIG, *CONFIGURATION_FILES,
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        # the vocabularies of tokenizers, under the names that their classes give them
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
        "sentencepiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "bpe.codes", "dict.txt",
        "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "normalizer.json", "emoji.json",
        "byte_maps.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer",
    }
)  # fmt: skip
_TIKTOKEN = re.compile(r"[\w.-]+\.tiktoken")


def find_model_files(names: Iterable[str]) -> list[str]:
    """Return those of the file names that describe a model or its tokenizer, in alphabetical order."""
    return sorted(name for name in names if name in _NAMES or _TIKTOKEN.fullmatch(name))
