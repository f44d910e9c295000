"""The files consolidated.NN.pth of Meta's Llama give the model that was cut into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptkit.errors import ChangedError, FormatError
from ckptkit.formats import open_checkpoint
from tests.helpers_cli import run_ckpt

DIM, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 16, 4, 2, 24, 32
PARAMS = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": VOCABULARY, "norm_eps": 1e-5}
State = dict[str, torch.Tensor]


def hf_model() -> State:
    """Return the weights of a small LlamaForCausalLM of transformers."""
    generator = torch.Generator().manual_seed(0)
    kv = DIM // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, DIM)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (DIM, DIM), f"{at}.self_attn.k_proj.weight": (kv, DIM),
            f"{at}.self_attn.v_proj.weight": (kv, DIM), f"{at}.self_attn.o_proj.weight": (DIM, DIM),
            f"{at}.mlp.gate_proj.weight": (HIDDEN, DIM), f"{at}.mlp.up_proj.weight": (HIDDEN, DIM),
            f"{at}.mlp.down_proj.weight": (DIM, HIDDEN), f"{at}.input_layernorm.weight": (DIM,),
            f"{at}.post_attention_layernorm.weight": (DIM,),
        }  # fmt: skip
    shapes |= {"model.norm.weight": (DIM,), "lm_head.weight": (VOCABULARY, DIM)}
    return {key: torch.randn(shape, generator=generator).to(torch.bfloat16) for key, shape in shapes.items()}


NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}  # fmt: skip


def meta_model() -> State:
    """Return the same weights with Meta's names, and rotary pairs next to each other as in Meta's code."""
    state: State = {}
    for key, tensor in hf_model().items():
        new = key
        for old, name in NAMES.items():
            new = new.replace(old, name)
        if "wq" in new or "wk" in new:
            heads = HEADS if "wq" in new else KV_HEADS
            tensor = tensor.view(heads, 2, -1, DIM).transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        state[new] = tensor
    return state | {"rope.freqs": torch.ones(2, dtype=torch.bfloat16)}


def cut(key: str, tensor: torch.Tensor, count: int, embedding: int) -> list[torch.Tensor]:
    """Return the slices of a tensor as ColumnParallelLinear and RowParallelLinear of fairscale cut it."""
    if tensor.ndim == 1:
        return [tensor] * count
    dim = embedding if "tok_embeddings" in key else int(key.endswith(("wo.weight", "w2.weight")))
    return [piece.clone() for piece in tensor.chunk(count, dim)]


def save(directory: Path, count: int = 2, embedding: int = 1, params: object = PARAMS) -> Path:
    """Write ``count`` files; ``embedding`` is the cut dimension of the embedding: 1 in Llama 2, 0 in Llama 3."""
    directory.mkdir(exist_ok=True)
    slices = {key: cut(key, tensor, count, embedding) for key, tensor in meta_model().items()}
    for rank in range(count):
        torch.save({key: pieces[rank] for key, pieces in slices.items()}, directory / f"consolidated.{rank:02}.pth")
    if params is not None:
        (directory / "params.json").write_text(json.dumps(params))
    return directory


@pytest.mark.parametrize("params", [PARAMS, PARAMS | {"vocab_size": -1}, None], ids=["params", "no vocabulary", "none"])
@pytest.mark.parametrize("embedding", [0, 1], ids=["Llama 3", "Llama 2"])
@pytest.mark.parametrize("count", [1, 2])
def test_slices_are_joined(tmp_path: Path, count: int, embedding: int, params: object) -> None:
    """Each tensor equals the tensor before the cut, also without params.json."""
    directory = save(tmp_path / "llama", count, embedding, params)
    with open_checkpoint(directory) as checkpoint:
        expected = meta_model()
        assert list(checkpoint) == list(expected)
        assert not checkpoint.warnings
        assert len(checkpoint.files) == count
        assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in expected.items())


def test_the_preset_gives_the_model_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The joined model, renamed and with its heads reordered, equals the model from which the slices were cut."""
    directory, out = save(tmp_path / "llama"), tmp_path / "hf.safetensors"
    heads = ["--set", f"heads={HEADS}", "--set", f"kv_heads={KV_HEADS}"]
    assert run_ckpt(capsys, "remap", directory, "-o", out, "--rules", "preset:llama-meta-to-hf", *heads).code == 0
    expected, found = hf_model(), load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert run_ckpt(capsys, "check", directory).code == 0
    whole = tmp_path / "whole.safetensors"
    assert run_ckpt(capsys, "convert", directory, "-o", whole).code == 0
    assert run_ckpt(capsys, "diff", directory, whole).code == 0


def test_repeated_key_heads_are_refused(tmp_path: Path) -> None:
    """Two key heads repeated in four files give four heads, which is another model than params.json says."""
    directory = save(tmp_path / "llama", 4)
    for rank in range(4):
        edit(directory, rank, lambda state: state.update({K: torch.ones(4, DIM, dtype=torch.bfloat16)}))
    with pytest.raises(FormatError, match=r"wk.weight' is BF16 \[4, 16\] in each of 4 files, which does not fit"):
        open_checkpoint(directory)


K, NORM, OUTPUT, EMBEDDING = "layers.0.attention.wk.weight", "norm.weight", "output.weight", "tok_embeddings.weight"


def edit(directory: Path, rank: int, change: Callable[[State], object]) -> None:
    path = directory / f"consolidated.{rank:02}.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def both(change: Callable[[State], object]) -> Callable[[Path], object]:
    def damage(directory: Path) -> None:
        for rank in range(2):
            edit(directory, rank, change)

    return damage


def second(change: Callable[[State], object]) -> Callable[[Path], object]:
    return lambda directory: edit(directory, 1, change)


def params(**changes: object) -> Callable[[Path], object]:
    return lambda directory: (directory / "params.json").write_text(json.dumps(PARAMS | changes))


def untied(state: State) -> None:
    """Make an embedding that can be a copy in each file, or cut by rows."""
    del state[OUTPUT]
    state[EMBEDDING] = torch.ones(VOCABULARY, DIM, dtype=torch.bfloat16)


def ambiguous(directory: Path) -> None:
    both(untied)(directory)
    params(vocab_size=-1)(directory)


def layers_apart(directory: Path) -> None:
    edit(directory, 0, lambda state: [state.pop(key) for key in list(state) if "layers.1" in key])
    edit(directory, 1, lambda state: [state.pop(key) for key in list(state) if "layers.1" not in key])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no first file": (lambda d: (d / "consolidated.00.pth").unlink(), r"consolidated.00.pth is missing, but there is"),
    "no last file": (lambda d: (d / "consolidated.01.pth").unlink(), "consolidated.01.pth is missing: .*wo.weight' is"),
    "a gap": (
        lambda d: (d / "consolidated.01.pth").rename(d / "consolidated.02.pth"), "consolidated.01.pth is missing, but"
    ),
    "a file too many": (
        lambda d: shutil.copy(d / "consolidated.01.pth", d / "consolidated.02.pth"), "but 'output.weight' has 48"
    ),
    "a key missing": (second(lambda s: s.pop(K)), "wk.weight' is in consolidated.00.pth, but not in"),
    "a key added": (second(lambda s: s.update(x=s[NORM])), "'x' is in consolidated.01.pth, but not"),
    "another dtype": (second(lambda s: s.update({K: s[K].float()})), "is BF16 in consolidated.00.pth, but F32"),
    "another shape": (second(lambda s: s.update({K: s[K][1:]})), r"is BF16 \[4, 16\] in consolidated.00.pth, but BF16"),
    "another norm": (second(lambda s: s[NORM].add_(1)), "'norm.weight' must be equal in all parts"),
    "an unknown name": (both(lambda s: s.update({"gate.weight": s[K]})), "'gate.weight' is not the name of a Llama"),
    "no norm": (both(lambda s: s.pop(NORM)), "without 'norm.weight'"),
    "another dim": (params(dim=32), "params.json says dim = 32, but 'norm.weight' is"),
    "another vocabulary": (params(vocab_size=31), "params.json says vocab_size = 31, but 'output.weight' has 32 rows"),
    "other key heads": (params(n_kv_heads=4), r"wk.weight' is BF16 \[4, 16\] in each of 2 files, which does not fit"),
    "two readings": (ambiguous, "which has 2 readings: cut by rows or a copy in each file"),
    "layers apart": (layers_apart, "have no key in common, so each holds a part of the layers"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_files_that_do_not_fit_are_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    """A reading that shapes and params.json do not prove is an error that names the file or the key."""
    directory = save(tmp_path / "llama")
    damage(directory)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(directory)


def test_copies_are_compared_when_they_are_read(tmp_path: Path) -> None:
    """Files without checksums are compared by their bytes, so a difference is an error of reading."""
    directory = save(tmp_path / "llama")
    for rank in range(2):
        path = directory / f"consolidated.{rank:02}.pth"
        state = torch.load(path)
        state[NORM][0] += rank
        torch.save(state, path, _use_new_zipfile_serialization=False)
    with open_checkpoint(directory) as checkpoint, pytest.raises(FormatError, match="must be equal in all parts"):
        checkpoint.read(NORM)


def test_a_change_on_disk_is_found(tmp_path: Path) -> None:
    """A part that changes after it was opened is an error."""
    directory = save(tmp_path / "llama")
    with open_checkpoint(directory) as checkpoint:
        path = directory / "consolidated.01.pth"
        path.write_bytes(path.read_bytes() + b"\0")
        with pytest.raises(ChangedError):
            checkpoint.check_unchanged()
