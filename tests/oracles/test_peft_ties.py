"""A merged directory computes what the model of peft with the adapter computes, whatever the adapter does to a tie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckptkit

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(10)[None]
ROWS, TIED = "trainable_token_indices", {"ensure_weight_tying": True}
# case: (the configuration of the adapter, the vocabulary that it was trained with, whether the tie is kept)
CASES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "saves the embedding": ({"modules_to_save": ["embed_tokens"]}, 64, False),
    "saves the head": ({"modules_to_save": ["lm_head"]}, 64, False),
    "saves both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, 64, False),
    "saves the embedding, tied": ({"modules_to_save": ["embed_tokens"], **TIED}, 64, True),
    "saves the head, tied": ({"modules_to_save": ["lm_head"], **TIED}, 64, True),
    "rows": ({ROWS: [1, 2]}, 64, True),
    "rows of the embedding": ({ROWS: {"embed_tokens": [1, 2]}}, 64, True),
    "rows of both": ({ROWS: {"embed_tokens": [1, 2], "lm_head": [1, 2]}}, 64, True),
    "other rows of both": ({ROWS: {"embed_tokens": [1, 2], "lm_head": [3]}}, 64, False),
    "adapts the embedding": ({"target_modules": ["embed_tokens"]}, 64, False),
    "adapts the head": ({"target_modules": ["lm_head"]}, 64, False),
    "adapts both": ({"target_modules": ["embed_tokens", "lm_head"]}, 64, False),
    "adapts the embedding, tied": ({"target_modules": ["embed_tokens"], **TIED}, 64, True),
    "adapts the head, tied": ({"target_modules": ["lm_head"], **TIED}, 64, True),
    "resized": ({}, 70, True),
    "resized rows": ({ROWS: [65, 66]}, 70, True),
    "resized, saves the embedding": ({"modules_to_save": ["embed_tokens"]}, 70, False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a tied base as transformers writes it, and one with both keys in one storage."""
    path = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path / "one key")
    (path / "one storage").mkdir()
    torch.save(model.state_dict(), path / "one storage" / "pytorch_model.bin")
    config_file = (path / "one key" / "config.json").read_bytes()
    (path / "one storage" / "config.json").write_bytes(config_file)
    return {each.name: each for each in path.iterdir()}


def opened(path: Path, vocabulary: int = 64) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    if vocabulary != 64:
        torch.manual_seed(3)
        model.resize_token_embeddings(vocabulary)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def train_and_save(model: Any, path: Path, vocabulary: int) -> None:
    """Change every parameter that the adapter trains, and save the adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path, save_embedding_layers=True if vocabulary != 64 else "auto")


@pytest.mark.parametrize("stored", ["one key", "one storage"])
@pytest.mark.parametrize(("settings", "vocabulary", "stays_tied"), CASES.values(), ids=CASES.keys())
def test_a_reload_computes_what_the_adapted_model_computes(
    settings: dict[str, Any],
    vocabulary: int,
    stays_tied: bool,
    stored: str,
    request: pytest.FixtureRequest,
) -> None:
    """The unmerged model is the oracle: merge_and_unload adds an update of one tied module to both."""
    bases, tmp_path = request.getfixturevalue("bases"), request.getfixturevalue("tmp_path")
    settings = {**settings, "target_modules": ["q_proj", *settings.get("target_modules", ())]}
    base = bases["one key"]
    model = peft.get_peft_model(opened(base, vocabulary), peft.LoraConfig(r=4, lora_alpha=8, **settings))
    train_and_save(model, tmp_path / "adapter", vocabulary)
    out = tmp_path / "out"
    out.mkdir()
    ckptkit.merge_lora(bases[stored], tmp_path / "adapter", out / "model.safetensors", carry=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == stays_tied
    (out / "config.json").write_text(json.dumps(config | {"vocab_size": vocabulary}), encoding="utf-8")
    loaded = peft.PeftModel.from_pretrained(opened(base, vocabulary), tmp_path / "adapter").eval()
    expected = logits(loaded)
    torch.testing.assert_close(logits(model.eval()), expected)
    torch.testing.assert_close(logits(opened(out)), expected, rtol=1e-5, atol=1e-5)


OTHERS = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "c_attn", "wte", "lm_head"),
    "bert": ("BertForMaskedLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                 "intermediate_size": 48}, "query", "word_embeddings", "decoder"),
    "roberta": ("RobertaForMaskedLM", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                                       "intermediate_size": 48}, "query", "word_embeddings", "decoder"),
}  # fmt: skip


@pytest.mark.parametrize("stored", ["one key", "both keys"])
@pytest.mark.parametrize("part", ["embedding", "head"])
@pytest.mark.parametrize("field", ["modules_to_save", "target_modules", "resized", "ensure_weight_tying"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_compute_the_same(kind: str, field: str, part: str, stored: str, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]; BERT ties a bias too; PEFT ensures only the ties of names that it knows."""
    name, sizes, target, embedding, head = OTHERS[kind]
    if (field, part) == ("ensure_weight_tying", "head"):
        pytest.skip("PEFT saves the embedding instead, and does not tie it when it loads")
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(vocab_size=64, **sizes)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().bias) if kind != "gpt2" else None
    model.save_pretrained(tmp_path / "base")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    vocabulary = 70 if field == "resized" else 64
    adapted = embedding if part == "embedding" else head
    settings: dict[str, Any] = {"target_modules": [target]}
    if field == "ensure_weight_tying":
        settings |= {"modules_to_save": [adapted], "ensure_weight_tying": True}
    elif field == "target_modules":
        settings[field].append(adapted)
    else:
        settings["modules_to_save"] = [adapted]

    def base_model() -> Any:
        loaded = cls.from_pretrained(tmp_path / "base")
        torch.manual_seed(3)
        loaded.resize_token_embeddings(vocabulary)
        return loaded.eval()

    tuned = peft.get_peft_model(base_model(), peft.LoraConfig(r=4, fan_in_fan_out=kind == "gpt2", **settings))
    train_and_save(tuned, tmp_path / "adapter", vocabulary)
    if stored == "both keys":
        (tmp_path / "base" / "model.safetensors").unlink()
        safetensors.torch.save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    ckptkit.merge_lora(tmp_path / "base", tmp_path / "adapter", tmp_path / "out" / "model.safetensors", carry=True)
    expected = logits(peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval())
    made, report = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(logits(made.eval()), expected, rtol=1e-5, atol=1e-5)


def test_the_names_of_tied_output_weights_are_those_of_transformers() -> None:
    """For every class with output weights that transformers ties to one embedding, the keys are known.

    ESM has the same names as RoBERTa, and adds its bias beside the output weights.
    """
    from ckptkit.formats.directories.tied_head import tied_head

    checked, wrong = 0, []
    for mapping in ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_MASKED_LM_MAPPING"):
        for config_class, model_class in getattr(transformers.models.auto.modeling_auto, mapping).items():
            classes = model_class if isinstance(model_class, tuple) else (model_class,)
            ties: Any = getattr(classes[0], "_tied_weights_keys", None)
            pairs = list(ties.items()) if isinstance(ties, dict) else []
            pairs = [(head, emb) for head, emb in pairs if head.endswith(".weight") and "\\" not in head + emb]
            if len(pairs) != 1 or not classes[0].__name__.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
                continue
            ((head, embedding),) = pairs
            bias = next((value for key, value in dict(ties).items() if key == f"{head.removesuffix('weight')}bias"), "")
            model = {
                "architectures": [classes[0].__name__], "model_type": config_class.model_type,
                "tie_word_embeddings": True, "vocab_size": 9,
            }  # fmt: skip
            base: dict[str, tuple[int, ...]] = {embedding.removesuffix("$"): (9, 4), "other.weight": (4, 4)}
            base |= {"lm_head.bias" if config_class.model_type == "esm" else bias or "other.bias": (9,)}
            found = tied_head(base, model)
            checked += 1
            if found is not None and (found.head, found.bias) != (head, bias):
                wrong.append((config_class.model_type, head, found.head, found.bias))
    assert checked > 100
    assert not wrong
