"""An adapter of one half of a tie: the output has the values of the model with the adapter, and says what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import execute, merge_lora, plan_lora
from ckptkit.errors import CkptkitError, PlanError
from tests.helpers_cli import run_ckpt

P = "base_model.model."
EMB, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "vocab_size": 9,
}  # fmt: skip
State = dict[str, torch.Tensor]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


Q = {f"{P}model.q.lora_A.weight": randn(2, 4, seed=1), f"{P}model.q.lora_B.weight": randn(4, 2, seed=2)}
BASE = {EMB: randn(9, 4, seed=3), "model.q.weight": randn(4, 4, seed=4)}
NEW, OTHER, ROWS = randn(9, 4, seed=5), randn(9, 4, seed=6), randn(2, 4, seed=7)
LOW = {f"{P}model.embed_tokens.lora_embedding_A": randn(2, 9, seed=8),
       f"{P}model.embed_tokens.lora_embedding_B": randn(4, 2, seed=9)}  # fmt: skip
LOW_HEAD = {f"{P}lm_head.lora_A.weight": LOW[f"{P}model.embed_tokens.lora_embedding_B"].T.contiguous(),
            f"{P}lm_head.lora_B.weight": LOW[f"{P}model.embed_tokens.lora_embedding_A"].T.contiguous()}  # fmt: skip
LIFTED = BASE[EMB] + 2 * (LOW_HEAD[f"{P}lm_head.lora_B.weight"] @ LOW_HEAD[f"{P}lm_head.lora_A.weight"])
REPLACED = BASE[EMB].index_copy(0, torch.tensor([5, 0]), ROWS)
DELTA = "token_adapter.trainable_tokens_delta"
TIED = {"ensure_weight_tying": True}

# case: (the adapter beside q, its configuration, the embedding of the output, its output weights or None)
CASES: dict[str, tuple[State, dict[str, Any], torch.Tensor, torch.Tensor | None]] = {
    "the embedding is saved": ({P + EMB: NEW}, {}, NEW, BASE[EMB]),
    "the head is saved": ({P + HEAD: NEW}, {}, BASE[EMB], NEW),
    "both are saved": ({P + EMB: NEW, P + HEAD: OTHER}, {}, NEW, OTHER),
    "both are saved and tied": ({P + EMB: NEW, P + HEAD: NEW}, TIED, NEW, None),
    "both are copies of a resized model": (
        {P + EMB: randn(11, 4, seed=5), P + HEAD: randn(11, 4, seed=5)}, {"modules_to_save": None},
        randn(11, 4, seed=5), None,
    ),
    "the embedding is saved twice": (
        {P + EMB: NEW, f"{P}model.embed_tokens.modules_to_save.weight": NEW,
         f"{P}model.embed_tokens.original_module.weight": OTHER}, {}, NEW, BASE[EMB],
    ),
    "the embedding has factors": (LOW, {}, LIFTED, BASE[EMB]),
    "the embedding has factors and a base": (
        LOW | {f"{P}model.embed_tokens.base_layer.weight": BASE[EMB]}, {}, LIFTED, BASE[EMB],
    ),
    "the head has factors": (LOW_HEAD, {}, BASE[EMB], LIFTED),
    "both have factors and are tied": (LOW | LOW_HEAD, TIED, LIFTED, None),
    "rows": ({f"{P}model.embed_tokens.{DELTA}": ROWS}, {"trainable_token_indices": [5, 0]}, REPLACED, None),
    "rows of both": (
        {f"{P}model.embed_tokens.{DELTA}": ROWS, f"{P}lm_head.{DELTA}": ROWS},
        {"trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [5, 0]}}, REPLACED, None,
    ),
    "other rows of both": (
        {f"{P}model.embed_tokens.{DELTA}": ROWS, f"{P}lm_head.{DELTA}": ROWS[:1]},
        {"trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [3]}},
        REPLACED, BASE[EMB].index_copy(0, torch.tensor([3]), ROWS[:1]),
    ),
    "rows of the head": ({f"{P}lm_head.{DELTA}": ROWS}, {"trainable_token_indices": {"lm_head": [5, 0]}},
                         BASE[EMB], REPLACED),
    "rows of both, named once": (
        {f"{P}model.embed_tokens.{DELTA}": ROWS, f"{P}lm_head.{DELTA}": ROWS},
        {"trainable_token_indices": {"embed_tokens": [5, 0]}}, REPLACED, None,
    ),
}  # fmt: skip


def written(tmp_path: Path, adapter: State, config: dict[str, Any], model: dict[str, Any] | None) -> None:
    for name in ("base", "adapter", "out"):
        (tmp_path / name).mkdir()
    save_file(BASE, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    if model is not None:
        (tmp_path / "base" / "config.json").write_text(json.dumps(model), encoding="utf-8")
    save_file(
        {key: value.contiguous().clone() for key, value in (Q | adapter).items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")


@pytest.mark.parametrize(("adapter", "config", "embedding", "head"), CASES.values(), ids=CASES.keys())
def test_both_halves_have_the_values_of_the_adapted_model(
    adapter: State, config: dict[str, Any], embedding: torch.Tensor, head: torch.Tensor | None, tmp_path: Path
) -> None:
    """Halves that differ are both in the output, and then its config.json does not tie them."""
    written(tmp_path, adapter, config, MODEL)
    out = tmp_path / "out" / "model.safetensors"
    plan = plan_lora(tmp_path / "base", tmp_path / "adapter")
    merge_lora(tmp_path / "base", tmp_path / "adapter", out, carry=True)
    made = load_file(out)
    torch.testing.assert_close(made[EMB], embedding)
    assert (HEAD in made) == (head is not None)
    if head is not None:
        torch.testing.assert_close(made[HEAD], head)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] == (head is None)
    assert any("the output has each with its own values" in note for note in plan.notes) == (head is not None)


@pytest.mark.parametrize("case", list(CASES))
def test_a_base_with_both_keys_in_one_storage_gives_the_same_values(case: str, tmp_path: Path) -> None:
    """A torch file tells the tie by its storages, without a config.json."""
    adapter, config, embedding, head = CASES[case]
    base = {**BASE, HEAD: BASE[EMB]}
    execute(plan_lora(base, Q | adapter, CONFIG | config), {"base": base, "donor": Q | adapter}, tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(made[EMB], embedding)
    torch.testing.assert_close(made[HEAD], embedding if head is None else head)
    assert (made[HEAD].data_ptr() == made[EMB].data_ptr()) == (head is None)


def test_the_note_names_both_and_the_statement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {P + EMB: NEW}, {}, MODEL)
    ran = run_ckpt(capsys, "merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out" / "o.safetensors",
                   "--method", "lora")  # fmt: skip
    assert ran.code == 0
    assert (
        "'model.embed_tokens.weight' is adapted without 'lm_head.weight', and the base ties them (config.json says "
        "tie_word_embeddings: true): the output has each with its own values; its config.json must say "
        "tie_word_embeddings: false, which --carry writes"
    ) in ran.err


@pytest.mark.parametrize(
    ("model", "has_head"),
    [
        pytest.param({**MODEL, "tie_word_embeddings": None}, True, id="the class has output weights"),
        pytest.param({"tie_word_embeddings": True}, True, id="no class"),
        pytest.param({"text_config": {"tie_word_embeddings": True}}, True, id="in a section"),
        pytest.param({**MODEL, "architectures": ["LlamaForSequenceClassification"]}, False, id="no language model"),
        pytest.param({**MODEL, "tie_word_embeddings": False}, False, id="not tied"),
    ],
)
def test_the_configuration_of_the_base_tells_the_tie(model: dict[str, Any], has_head: bool, tmp_path: Path) -> None:
    written(tmp_path, {P + EMB: NEW}, {}, {key: value for key, value in model.items() if value is not None})
    plan = plan_lora(tmp_path / "base", tmp_path / "adapter")
    assert (HEAD in {step.out.key for step in plan.steps}) == has_head


BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": 9, "tie_word_embeddings": True,
}  # fmt: skip
WORDS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
BERT_BASE = {WORDS: BASE[EMB], "bert.q.weight": BASE["model.q.weight"], "cls.predictions.bias": randn(9, seed=11)}


@pytest.mark.parametrize(
    ("adapter", "config", "sizes"),
    [
        ({P + WORDS: NEW}, {"modules_to_save": ["word_embeddings"]}, (9, 9)),
        ({f"{P}{DECODER}.weight": NEW, f"{P}{DECODER}.bias": randn(9, seed=12)}, {"modules_to_save": ["decoder"]},
         (9, 9)),
        ({P + WORDS: randn(11, 4, seed=5), f"{P}{DECODER}.weight": randn(11, 4, seed=5),
          f"{P}{DECODER}.bias": randn(11, seed=6)}, {"modules_to_save": None}, (11, 11)),
    ],
    ids=["the embedding", "the decoder", "a resized vocabulary"],
)  # fmt: skip
def test_output_weights_that_are_not_tied_any_more_have_their_bias(
    adapter: State, config: dict[str, Any], sizes: tuple[int, int], tmp_path: Path
) -> None:
    """BERT ties the bias with the weights: where config.json ends one tie, it ends the other too."""
    written(tmp_path, adapter, config, BERT)
    save_file(BERT_BASE, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    q = {key.replace("model.q", "bert.q"): value for key, value in Q.items()}
    save_file(q | adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    out = tmp_path / "out" / "model.safetensors"
    merge_lora(tmp_path / "base", tmp_path / "adapter", out, carry=True)
    made = load_file(out)
    bias = adapter.get(f"{P}{DECODER}.bias", BERT_BASE["cls.predictions.bias"])
    assert torch.equal(made[f"{DECODER}.bias"], bias)
    assert made[WORDS].shape[0] == sizes[0]
    stated = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert stated["vocab_size"] == sizes[1]
    if stated["tie_word_embeddings"]:
        assert torch.equal(made["cls.predictions.bias"], bias)


def test_ensured_ties_are_those_that_peft_knows(tmp_path: Path) -> None:
    """PEFT ties with ensure_weight_tying only what it finds as embed_tokens or lm_head."""
    gpt2 = {**MODEL, "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    written(tmp_path, {f"{P}transformer.wte.weight": NEW}, {**TIED, "modules_to_save": ["wte"]}, gpt2)
    base = {"transformer.wte.weight": BASE[EMB], "model.q.weight": BASE["model.q.weight"]}
    save_file(base, tmp_path / "base" / "model.safetensors")
    steps = {step.out.key: step for step in plan_lora(tmp_path / "base", tmp_path / "adapter").steps}
    assert (steps["transformer.wte.weight"].sources[0].role, steps[HEAD].sources[0].role) == ("donor", "base")


def test_every_embedding_of_an_encoder_and_a_decoder_follows(tmp_path: Path) -> None:
    """A file may hold each of the tied embeddings for itself."""
    written(tmp_path, {f"{P}shared.{DELTA}": ROWS}, {"trainable_token_indices": [5, 0]},
            {**MODEL, "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True})  # fmt: skip
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
    base = {name: BASE[EMB].clone() for name in names} | {"model.q.weight": BASE["model.q.weight"]}
    save_file(base, tmp_path / "base" / "model.safetensors")
    out = tmp_path / "out.safetensors"
    merge_lora(tmp_path / "base", tmp_path / "adapter", out)
    assert all(torch.equal(load_file(out)[name], REPLACED) for name in names)


def test_a_shared_embedding_is_refused_without_a_configuration_too() -> None:
    """The name alone tells an encoder and a decoder."""
    base = {"shared.weight": BASE[EMB], "model.q.weight": BASE["model.q.weight"]}
    with pytest.raises(PlanError, match="the base ties the embeddings of its encoder, its decoder and its output"):
        plan_lora(base, Q | {f"{P}shared.weight": NEW}, CONFIG | {"modules_to_save": ["shared"]})


REFUSED: dict[str, tuple[State, dict[str, Any] | None, str]] = {
    "no config.json": ({P + EMB: NEW}, None, "without a config.json, nothing says whether they are tied to it"),
    "an encoder and a decoder": (
        {P + EMB: NEW}, {**MODEL, "is_encoder_decoder": True},
        "the base ties the embeddings of its encoder, its decoder",
    ),
    "another vocabulary": (
        {P + EMB: randn(11, 4, seed=1)}, MODEL,
        "'model.embed_tokens.weight' would be [11, 4] and 'lm_head.weight' [9, 4]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("adapter", "model", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_output_can_say_is_refused(
    adapter: State, model: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    written(tmp_path, adapter, {}, model)
    with pytest.raises(PlanError) as caught:
        plan_lora(tmp_path / "base", tmp_path / "adapter")
    assert reason in caught.value.reason
    assert caught.value.hint


def test_other_ties_follow_a_fold_and_not_a_replacement() -> None:
    """Two modules that share a weight both change with a fold, as peft merges it; a replaced one stands alone."""
    shared = randn(4, 4, seed=1)
    base = {"model.q.weight": shared, "model.k.weight": shared}
    plan = plan_lora(base, Q, CONFIG)
    assert [step.tied_to for step in plan.steps] == [None, "model.q.weight"]
    assert "are one tensor in the base: all change with 'model.q.weight', as in a merge by PEFT" in plan.notes[0]
    base |= {"model.a.weight": (other := randn(4, 4, seed=2)), "model.b.weight": other}
    plan = plan_lora(base, Q | {f"{P}model.a.weight": randn(4, 4, seed=3)}, CONFIG | {"modules_to_save": ["a"]})
    steps = {step.out.key: step for step in plan.steps}
    assert (steps["model.a.weight"].sources[0].role, steps["model.b.weight"].sources[0].role) == ("donor", "base")
    assert any("load the output into a model that does not tie them" in note for note in plan.notes)


HEADS = {f"{P}score.weight": randn(3, 4, seed=1), f"{P}v_head.summary.weight": randn(1, 4, seed=2)}


def test_a_task_head_is_added_under_its_name_in_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an action it is an error with a hint that works; by pattern, one is added and the other left out."""
    written(tmp_path, HEADS, {}, MODEL)
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out" / "o.safetensors"
    ran = run_ckpt(capsys, "merge", base, adapter, "-o", out, "--method", "lora")
    assert ran.code == 2
    assert (
        "hint: they are saved whole with the adapter: --on-unexpected add writes them as 'score.weight', "
        "'v_head.summary.weight', and skip leaves them out\n"
    ) in ran.err
    ran = run_ckpt(capsys, "merge", base, adapter, "-o", out, "--method", "lora", "--on-unexpected", "add")
    assert ran.code == 0, ran.err
    made = load_file(out)
    assert torch.equal(made["score.weight"], HEADS[f"{P}score.weight"])
    assert torch.equal(made["v_head.summary.weight"], HEADS[f"{P}v_head.summary.weight"])
    assert "config.json must describe the model with it" in ran.err
    plan = plan_lora(base, adapter, on_unexpected={"*.score.*": "add", "*v_head*": "skip"})
    assert plan.steps[-1].out.key == "score.weight"
    assert plan.steps[-1].rule == "--on-unexpected '*.score.*=add'"
    assert {(drop.key, drop.reason) for drop in plan.dropped} >= {
        (f"{P}v_head.summary.weight", "the base does not have it")
    }


def test_a_factor_is_skipped_and_never_added() -> None:
    """Without its weight a factor has no meaning, and an adapter of which nothing fits is refused all the same."""
    factors = {f"{P}model.z.lora_A.weight": randn(2, 4, seed=1), f"{P}model.z.lora_B.weight": randn(4, 2, seed=2)}
    plan = plan_lora(BASE, Q | factors, CONFIG, on_unexpected="skip")
    assert [drop.key for drop in plan.dropped] == list(factors)
    with pytest.raises(CkptkitError, match=r"ha(s|ve) no matching key"):
        plan_lora(BASE, Q | factors, CONFIG, on_unexpected="add")
    with pytest.raises(CkptkitError, match="have no matching key in the base"):
        plan_lora(BASE, factors, CONFIG, on_unexpected="skip")
    with pytest.raises(CkptkitError, match="matches none of"):
        plan_lora(BASE, Q, CONFIG, on_unexpected={"score.*": "add"})


def test_weights_beside_the_adapter_are_named(tmp_path: Path) -> None:
    """A training script can save more weights in a file of its own; the file of the adapter is enough to find them."""
    written(tmp_path, {}, {}, MODEL)
    adapter = tmp_path / "adapter"
    torch.save({"model.projector.weight": torch.ones(2)}, adapter / "non_lora_trainables.bin")
    plan = plan_lora(tmp_path / "base", adapter / "adapter_model.safetensors")
    assert "'non_lora_trainables.bin' beside the adapter has weights too, which are not folded" in plan.notes[0]
    with pytest.warns(UserWarning, match=r"'non_lora_trainables\.bin' is not read"):
        plan_lora(tmp_path / "base", adapter)


def test_a_dora_is_not_folded_with_another_adapter() -> None:
    """The norm of a DoRA is that of the weight without the other one."""
    dora = Q | {f"{P}model.q.lora_magnitude_vector": torch.ones(4)}
    configs = [CONFIG | {"use_dora": True}, CONFIG]
    assert plan_lora(BASE, dora, configs[0]).steps[1].rule == "dora, scale 2"
    with pytest.raises(PlanError, match=r"'model.q.weight' has the DoRA of donor1 and another adapter"):
        plan_lora(BASE, [dora, Q], configs)
