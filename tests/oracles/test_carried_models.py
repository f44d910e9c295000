"""transformers and PEFT open what ``--carry`` writes, with the dtype that was said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptkit
from ckptkit.formats.directories.model_files import find_model_files
from tests.helpers_cli import run_ckpt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = ("<pad>", "<eos>", "one", "two", "three")
TOKENS = torch.tensor([[2, 3, 4, 1]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that ``save_pretrained`` wrote: a tiny Llama in float32, a generation config and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False, dtype="float32",
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))  # noqa: S106
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")  # noqa: S106


def opened(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


OUTPUTS = {
    "a file": ("model.safetensors", ()),
    "a torch file": ("pytorch_model.bin", ()),
    "shards": ("", ("--max-shard-size", "4kB")),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", list(OUTPUTS))
def test_from_pretrained_opens_the_output(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dtype: str
) -> None:
    """The model has the dtype of the output without being told, and computes what the cast model computes."""
    name, options = OUTPUTS[kind]
    out = tmp_path / "out"
    if name:
        out.mkdir()
    ran = run_ckpt(capsys, "convert", source, "-o", out / name, "--dtype", dtype, "--carry", "--json", *options)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)["output"]
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        report["carried"]
    )
    changes = [(change["statement"], change["found"], change["written"]) for change in report["adapted"]]
    assert changes == ([] if dtype == "float32" else [("dtype", "float32", dtype)])
    model = opened(out, dtype="auto")
    assert model.dtype == model.config.dtype == getattr(torch, dtype)
    expected = opened(source).to(getattr(torch, dtype))
    assert torch.equal(logits(model), logits(expected))
    assert model.generation_config.max_new_tokens == 3
    assert transformers.AutoTokenizer.from_pretrained(out)("two three")["input_ids"] == [3, 4]


def test_the_layout_of_the_hub_cache(source: Path, tmp_path: Path) -> None:
    """A snapshot of the hub's cache is a directory of links into blobs; the output is a directory of files."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abcd"
    for directory in (cache / "blobs", snapshot):
        directory.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        (cache / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    (tmp_path / "out").mkdir()
    with ckptkit.open_checkpoint(snapshot) as checkpoint:
        ckptkit.execute(ckptkit.plan_remap(checkpoint), checkpoint, tmp_path / "out" / "model.safetensors", carry=True)
    assert torch.equal(logits(opened(tmp_path / "out")), logits(opened(source)))


def test_a_merged_adapter(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base and a LoRA adapter give a model that computes what the adapted model of PEFT computes."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(opened(source), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    ran = run_ckpt(capsys, "merge", source, tmp_path / "adapter", "--method", "lora", "--carry",
                   "-o", tmp_path / "out" / "model.safetensors")  # fmt: skip
    assert ran.code == 0, ran.err
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(adapted.eval()))


def test_a_converted_adapter(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration of an adapter goes along with the adapter, and PEFT opens the output on the base."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    adapted = peft.get_peft_model(
        opened(source), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    arguments = ("convert", tmp_path / "adapter", "-o", tmp_path / "out" / "adapter_model.safetensors", "--carry")
    ran = run_ckpt(capsys, *arguments)
    assert ran.code == 0, ran.err
    found = peft.PeftModel.from_pretrained(opened(source), tmp_path / "out").eval()
    assert torch.equal(logits(found), logits(adapted.eval()))


def test_a_dropped_head_is_new_as_the_note_says(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without tied embeddings, from_pretrained draws a new head where the output has none, and the note names it."""
    (tmp_path / "out").mkdir()
    ran = run_ckpt(
        capsys, "remap", source, "--drop", "lm_head.*", "-o", tmp_path / "out" / "model.safetensors", "--carry"
    )
    assert (
        "('lm_head.weight'): if the model has them and does not tie them, from_pretrained draws new values" in ran.err
    )
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(loading["missing_keys"]) == {"lm_head.weight"}


def test_every_name_of_a_vocabulary_is_known() -> None:
    """The table has each name that a tokenizer of transformers gives to the files of its vocabulary."""
    names: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(encoding="utf-8"), re.DOTALL):
            names.update(re.findall(r'"\w+": *"([^"]+)"', table))
    assert len(names) > 10
    assert set(find_model_files(names)) == names
