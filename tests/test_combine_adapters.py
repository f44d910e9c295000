"""``ckpt merge BASE A B --method lora`` adds several adapters to one base, and rounds each sum once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptkit import merge_lora, plan_lora
from ckptkit.errors import CkptkitError, PlanError
from tests.helpers_cli import run_ckpt

State = dict[str, torch.Tensor]
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"], "modules_to_save": ["head"]}


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base_state(dtype: torch.dtype) -> State:
    state = {
        "l.q.weight": randn(64, 48, seed=0),
        "l.k.weight": randn(64, 48, seed=1),
        "head.weight": randn(3, 64, seed=2),
    }
    return {key: value.to(dtype) for key, value in state.items()}


def peft_state(seed: int, *modules: str) -> State:
    factors = {f"base_model.model.{name}.lora_A.weight": randn(2, 48, seed=seed) for name in modules}
    return factors | {f"base_model.model.{name}.lora_B.weight": randn(64, 2, seed=seed + 1) for name in modules}


def kohya_state() -> State:
    return {
        "lora_unet_l_q.lora_down.weight": randn(4, 48, seed=20),
        "lora_unet_l_q.lora_up.weight": randn(64, 4, seed=21),
        "lora_unet_l_q.alpha": torch.tensor(2.0),
    }


def files(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
    """Write a base, an adapter of PEFT in the directory ``style``, and one of kohya; return the paths."""
    base, style, hero = tmp_path / "base.safetensors", tmp_path / "style", tmp_path / "hero.safetensors"
    save_file(base_state(dtype), base)
    style.mkdir()
    save_file(peft_state(10, "l.q", "l.k"), style / "adapter_model.safetensors")
    (style / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(kohya_state(), hero)
    return base, style, hero


def summed(weights: tuple[float, float], dtype: torch.dtype) -> State:
    """Return the base with both adapters, by torch in F64 and rounded once."""
    base, style, hero = base_state(dtype), peft_state(10, "l.q", "l.k"), kohya_state()
    for name in ("l.q", "l.k"):
        down, up = (style[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        total = base[f"{name}.weight"].double() + weights[0] * 1.5 * up @ down
        if name == "l.q":
            down, up = (hero[f"lora_unet_l_q.lora_{side}.weight"].double() for side in ("down", "up"))
            total += weights[1] * 0.5 * up @ down
        base[f"{name}.weight"] = total.to(dtype)
    return base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype) -> None:
    """Weights are by the name of a directory or a file; the sum in F64 is the oracle, and no half-ulp is lost."""
    base, style, hero = files(tmp_path, dtype)
    ran = run_ckpt(
        capsys, "merge", base, style, hero, "-o", tmp_path / "out.safetensors", "--method", "lora", "--verify",
        "--weight", "style=0.7", "--weight", "hero=-0.3", "--scale", "2",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found, wanted = load_file(tmp_path / "out.safetensors"), summed((1.4, -0.6), dtype)
    for key, tensor in wanted.items():
        if dtype == torch.float32:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=3e-6)
        else:  # a sum in F32 can fall on the other side of a tie, which is rare; two roundings differ far more often
            assert (found[key] != tensor).float().mean() < 0.002
            torch.testing.assert_close(found[key], tensor)


def test_in_python_the_adapters_are_a_list(tmp_path: Path) -> None:
    """``weights`` and ``lora_config`` have one item for each adapter."""
    base = base_state(torch.float32)
    adapters = [peft_state(10, "l.q", "l.k"), kohya_state()]
    written = merge_lora(base, adapters, tmp_path / "o.safetensors", [CONFIG, None], weights=[0.5, 2])
    for key, tensor in summed((0.5, 2.0), torch.float32).items():
        torch.testing.assert_close(load_file(written.path)[key], tensor, rtol=0, atol=3e-6)
    with pytest.raises(PlanError, match="weights has 1 value for 2 adapters"):
        plan_lora(base, adapters, [CONFIG, None], weights=[1.0])
    with pytest.raises(PlanError, match="lora_config has 1 value for 2 adapters"):
        plan_lora(base, adapters, CONFIG)
    with pytest.raises(PlanError, match="no adapter to fold"):
        plan_lora(base, [])
    with pytest.raises(PlanError, match="nan is not a valid scale"):
        plan_lora(base, adapters, [CONFIG, None], weights=[1.0, float("nan")])


def test_replacements_of_one_tensor_are_said() -> None:
    """The last replacement counts and a note names the other; a replacement never removes an update in silence."""
    base = base_state(torch.float32)
    one = peft_state(10, "l.q") | {"base_model.model.head.weight": randn(3, 64, seed=30)}
    two = peft_state(12, "l.k") | {"base_model.model.head.weight": randn(3, 64, seed=31)}
    plan = plan_lora(base, [one, two], [CONFIG, CONFIG])
    assert torch.equal(
        plan.materialize({"base": base, "donor1": one, "donor2": two})["head.weight"],
        two["base_model.model.head.weight"],
    )
    assert plan.notes == ("donor1 and donor2 both replace 'head.weight': the last one counts",)
    assert [(drop.role, drop.key) for drop in plan.dropped] == [("donor1", "base_model.model.head.weight")]
    whole = peft_state(14, "l.k") | {"base_model.model.l.q.weight": randn(64, 48, seed=32)}
    with pytest.raises(PlanError, match=r"'l.q.weight' is changed by donor1, and donor2 replaces it"):
        plan_lora(base, [one, whole], [CONFIG, CONFIG])
    plan_lora(base, [whole, one], [CONFIG, CONFIG])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weight", "nobody=1"], "no donor has the name 'nobody'; known: style, hero"),
        (["--weight", "heroo=1"], "did you mean hero?"),
        (["--weight", "hero"], "give NAME=X"),
        (["--weight", "=1"], "give NAME=X"),
        (["--weight", "hero=x"], "'x' is not a finite number"),
        (["--weight", "hero=inf"], "'inf' is not a finite number"),
        (["--weight", "hero=1", "--weight", "hero=2"], "is given twice"),
    ],
)
def test_a_weight_without_its_donor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    base, style, hero = files(tmp_path)
    ran = run_ckpt(capsys, "merge", base, style, hero, "-o", tmp_path / "out.safetensors", "--method", "lora", *options)
    assert ran.code == 2
    assert message in ran.err


def test_equal_names_need_the_folder_or_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files with one name are told apart by their folders, as other inputs of a merge, or by their paths."""
    base, _, hero = files(tmp_path)
    other = tmp_path / "b" / "hero.safetensors"
    other.parent.mkdir()
    save_file(kohya_state(), other)
    command: list[str | Path] = ["merge", base, hero, other, "-o", tmp_path / "out.safetensors", "--method", "lora"]
    assert (
        f"no donor has the name 'hero'; known: {tmp_path.name}, b"
        in run_ckpt(capsys, *command, "--weight", "hero=1").err
    )
    runs = [run_ckpt(capsys, *command, "--weight", f"{name}=0", "--dry-run", "--json") for name in (other, "b")]
    assert [(ran.code, ran.out) for ran in runs] == [(0, runs[0].out)] * 2
    command[3] = hero
    assert f"{hero} is given 2 times: give it once" in run_ckpt(capsys, *command, "--weight", f"{hero}=1").err


def test_a_tensor_that_is_saved_whole_has_no_scale() -> None:
    """A note says so where a weight is given; a module without factors keeps its new values."""
    whole = {
        "x.lora_A.weight": randn(2, 48, seed=1),
        "x.lora_B.weight": randn(48, 2, seed=2),
        "n.weight": randn(3, seed=3),
    }
    base = {"x.weight": randn(48, 48, seed=4), "n.weight": randn(3, seed=3)}
    notes = plan_lora(base, [whole], [CONFIG], weights=[0.5]).notes
    assert notes == ("'n.weight' replaces values of the base as a whole, which no scale and no weight changes",)
    assert not plan_lora(base, [whole], [CONFIG], weights=[1]).notes


def test_an_error_names_the_adapter(tmp_path: Path) -> None:
    """With several adapters, an error is about the file that has the tensor."""
    base, style, hero = files(tmp_path)
    save_file({"lora_unet_x.lora_down.weight": randn(2, 48, seed=1)}, hero)
    with pytest.raises(CkptkitError) as caught:
        plan_lora(base, [style, hero])
    assert caught.value.path == str(hero)
