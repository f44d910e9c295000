"""Situations in which a command prints a hint: one for each hint of the package, which the tests then follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file

from ckptkit import make_delta
from tests.helpers_cli import ROOT
from tests.helpers_gguf import STRING, gguf_file, info, pair, string

__all__ = ["DDP", "MODEL", "SITUATIONS", "TEN", "Situation", "save", "situation"]

TEN, DDP = str(ROOT / "fixtures" / "lenet_10class.pth"), str(ROOT / "fixtures" / "lenet_ddp.pt")
MODEL, MODEL_10 = "py:fixtures.lenet:build", "py:fixtures.lenet:build(num_classes=10)"
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Situation:
    """What makes the arguments of a command, and the hints that it prints.

    ``hints`` are parts of texts of the package, each after its file. ``names`` says what a word such as ``MODEL``, or a
    pattern to fill in, stands for; DROP is the value of ``--drop``. Where the hint ``ends`` the matter, the command
    does not run again. Where Python has another hint, ``is_called`` is False.
    """

    make: Callable[[Path], list[str]]
    hints: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    ends: bool = False
    is_called: bool = True

    @property
    def id(self) -> str:
        """The name of the situation."""
        return self.make.__name__.strip("_")


SITUATIONS: list[Situation] = []
_Make = Callable[[Path], list[str]]


def situation(
    *hints: str,
    ends: bool = False,
    is_called: bool = True,
    filled: Mapping[str, str] = MappingProxyType({}),
    **names: str,
) -> Callable[[_Make], _Make]:
    """Add the function as a situation, which prints these hints; ``filled`` has words that Python cannot name."""

    def add(make: _Make) -> _Make:
        SITUATIONS.append(Situation(make, hints, {**filled, **names}, ends, is_called))
        return make

    return add


def save(folder: Path, **states: State) -> list[str]:
    """Write each state to a torch file of its name, and return the paths."""
    paths = [folder / f"{name}.pt" for name in states]
    for path, state in zip(paths, states.values(), strict=True):
        torch.save(state, path)
    return list(map(str, paths))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Keys, shapes and dtypes that do not agree.


@situation("comparison/hints.py: keys match after --rename")
def _prefixed(_folder: Path) -> list[str]:
    return ["diff", TEN, DDP]


@situation("comparison/hints.py: keys match after --rename", "comparison/hints.py: --rename")
def _twins(folder: Path) -> list[str]:
    part = {"a.w": randn(2), "b.w": randn(3)}
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in part.items()}
    return ["merge", *save(folder, part=part, both=both), "-o", str(folder / "out.pt")]


@situation()
def _other_head(folder: Path) -> list[str]:
    return ["merge", MODEL, TEN, "-o", str(folder / "out.safetensors")]


@situation()
def _missing_keys(folder: Path) -> list[str]:
    base, donor = save(folder, base={"a": torch.zeros(2), "b": torch.zeros(2)}, donor={"a": torch.ones(2)})
    return ["merge", base, donor, "-o", str(folder / "out.pt"), "--on-missing", "error"]


@situation()
def _unexpected_keys(folder: Path) -> list[str]:
    base, donor = save(folder, base={"a": torch.zeros(2)}, donor={"a": torch.ones(2), "b": torch.zeros(2)})
    return ["merge", base, donor, "-o", str(folder / "out.pt"), "--on-unexpected", "error"]


@situation("plans/policies.py: or allow unused rules with --allow-unused")
def _unused_policy(folder: Path) -> list[str]:
    return ["merge", TEN, TEN, "-o", str(folder / "out.pt"), "--on-mismatch", "zz.*=skip"]


@situation("plans/overlays/refusals.py: compare the shapes: ckpt diff")
def _other_shapes(folder: Path) -> list[str]:
    base, donor = save(folder, base={"a": torch.zeros(2)}, donor={"a": torch.ones(3)})
    return ["merge", base, donor, "-o", str(folder / "out.pt"), "--on-mismatch", "skip"]


@situation("plans/overlays/requirements.py: ckpt align BASE DONOR -o rules.toml")
def _required_names(folder: Path) -> list[str]:
    base = {"enc.w": randn(4, 4), "enc.b": randn(4, seed=1), "head.w": randn(4, 2, seed=2)}
    donor = {"body.w.y": randn(4, 4), "body.b.y": randn(4, seed=1), "head.w": randn(4, 2, seed=2)}
    return ["merge", *save(folder, base=base, donor=donor), "-o", str(folder / "out.pt"), "--require", "enc.*"]


@situation("rules/apply.py: or pass --allow-unused")
def _unused_rule(folder: Path) -> list[str]:
    return ["remap", TEN, "-o", str(folder / "out.pt"), "--rename", "zz.*=*"]


@situation()
def _unused_filter(_folder: Path) -> list[str]:
    return ["show", TEN, "--keep", "zz.*"]


@situation()
def _unused_filter_of_statistics(_folder: Path) -> list[str]:
    return ["stats", TEN, "--keep", "zz.*"]


@situation("digests/__init__.py: --skip-unread leaves out all such tensors")
def _tensor_without_digest(folder: Path) -> list[str]:
    return ["digest", *save(folder, sparse={"a": torch.zeros(2), "s": torch.eye(2).to_sparse()})]


@situation("deltas/making.py: --only-tensors leaves out what is not a tensor")
def _entries_beside_tensors(folder: Path) -> list[str]:
    return ["delta", TEN, DDP, "-o", str(folder / "patch.safetensors")]


@situation("digests/check.py: a digest file has all lines that ckpt digest PATH prints", ends=True)
def _lines_lost(folder: Path) -> list[str]:
    (folder / "a.digest").write_text(f'sha256:{"0" * 64}  "a"', encoding="ascii")
    return ["digest", TEN, "--check", str(folder / "a.digest")]


@situation("digests/check.py: ckpt digest PATH -o OUT writes the digests of a checkpoint", ends=True)
def _checkpoint_as_digest_file(_folder: Path) -> list[str]:
    return ["digest", TEN, "--check", TEN]


@situation()
def _too_little(folder: Path) -> list[str]:
    return [*_other_head(folder), "--on-mismatch", "skip", "--require", "fc3.*"]


@situation("comparison/parts.py: ckpt align")
def _other_names(folder: Path) -> list[str]:
    base = {"enc.w": randn(4, 4), "enc.b": randn(4, seed=1)}
    return ["diff", *save(folder, base=base, found={f"x.{key[4:]}.y": value for key, value in base.items()})]


def _layers(name: str) -> State:
    return {f"{name.format(at)}.{leaf}": randn(4, at + 1, seed=at) for at in range(3) for leaf in "wb"}


@situation("comparison/hints.py: keys match after --rename")
def _other_prefix(folder: Path) -> list[str]:
    base, found = ({**_layers(name), "norm": randn(4)} for name in ("blocks.{}", "layers.{}"))
    return ["diff", *save(folder, base=base, found=found)]


@situation("comparison/hints.py: keys match after --rename")
def _other_prefix_in_merge(folder: Path) -> list[str]:
    return ["merge", *_other_prefix(folder)[1:], "-o", str(folder / "out.pt")]


@situation("comparison/parts.py: ckpt align")
def _other_names_for_most(folder: Path) -> list[str]:
    base, found = ({**_layers(name), "norm": randn(4)} for name in ("enc{}.x", "l{}.y"))
    return ["diff", *save(folder, base=base, found=found)]


@situation("comparison/parts.py: --method lora")
def _adapter_as_weights(folder: Path) -> list[str]:
    return ["diff", *_base_and_kohya(folder)]


@situation("core/checkpoint/provenance.py: ckpt apply BASE XX -o OUT", ends=True)
def _a_patch(folder: Path) -> list[str]:
    make_delta(TEN, ROOT / "fixtures" / "lenet_tuned.safetensors", folder / "patch.safetensors")
    return ["diff", TEN, str(folder / "patch.safetensors")]


@situation("checks/expected.py: ckpt diff XX XX lists all keys")
def _check_like(folder: Path) -> list[str]:
    (path,) = save(folder, part={key: value for key, value in torch.load(TEN).items() if key != "fc1.bias"})
    return ["check", path, "--like", TEN]


@situation("checks/structure.py: ckpt diff MODEL XX lists all keys", MODEL=TEN)
def _lost_layer(folder: Path) -> list[str]:
    (path,) = save(
        folder,
        part={f"layers.{n}.{leaf}": randn(4, 4) for n in range(12) if n != 7 for leaf in ("q.weight", "k.weight")},
    )
    return ["check", path]


@situation("plans/remap.py: ckpt merge MODEL PATH -o OUT", MODEL=MODEL_10)
def _remap_like(folder: Path) -> list[str]:
    (path,) = save(folder, part={key: value for key, value in torch.load(TEN).items() if key != "fc1.bias"})
    return ["remap", path, "-o", str(folder / "out.pt"), "--like", MODEL_10]


# Rules.


@situation("wrappers/explain.py: write --strip")
def _strip_without_dot(folder: Path) -> list[str]:
    return ["remap", DDP, "-o", str(folder / "out.pt"), "--strip", "module"]


@situation("wrappers/explain.py: in place of --strip renames these keys")
def _strip_of_some(folder: Path) -> list[str]:
    (path,) = save(folder, some={"module.a": randn(2), "module.b": randn(2), "c": randn(2)})
    return ["remap", path, "-o", str(folder / "out.pt"), "--strip", "auto"]


@situation("wrappers/explain.py: give --rename")
def _compiled_in_part(folder: Path) -> list[str]:
    (path,) = save(folder, some={"a._orig_mod.w": randn(2), "a.v": randn(2)})
    return ["remap", path, "-o", str(folder / "out.pt"), "--strip", "auto"]


@situation("wrappers/explain.py: --strip XX removes it")
def _one_prefix(folder: Path) -> list[str]:
    (path,) = save(folder, one={"net.a": randn(2), "net.b": randn(2)})
    return ["remap", path, "-o", str(folder / "out.pt"), "--strip", "auto"]


@situation("rules/variables.py: set it: --set")
def _unset_variable(folder: Path) -> list[str]:
    (folder / "rules.toml").write_text(
        '[vars]\nheads = "config:heads"\n[[rule]]\nfrom = "fc1.weight"\nto = ["a", "b", "c", "d"]\n'
        'op = { split = { dim = 0, parts = "heads" } }\n',
        encoding="utf-8",
    )
    return ["remap", TEN, "-o", str(folder / "out.pt"), "--rules", str(folder / "rules.toml")]


@situation("rules/positions.py: or write rules for the numbers: --rules FILE", FILE="{folder}/rules.toml")
def _a_part_by_position(folder: Path) -> list[str]:
    average = {"shadow_params": [randn(3, 4), randn(3)], "decay": 0.9, "num_updates": 3, "collected_params": None}
    torch.save(average, folder / "ema.pt")
    torch.save({f"{n}.{leaf}": randn(*shape) for n in range(3) for leaf, shape in (("weight", (3, 4)), ("bias", (3,)))},
               folder / "like.pt")  # fmt: skip
    rules = '[[rule]]\nfrom = "shadow_params.0"\nto = "1.weight"\n[[rule]]\nfrom = "shadow_params.1"\nto = "1.bias"\n'
    (folder / "rules.toml").write_text(rules, encoding="utf-8")
    return ["diff", str(folder / "like.pt"), str(folder / "ema.pt")]


# Outputs.


@situation("formats/writing/state.py: --force replaces it")
def _existing_output(folder: Path) -> list[str]:
    (folder / "out.pt").write_bytes(Path(TEN).read_bytes())
    return ["remap", TEN, "-o", str(folder / "out.pt"), "--drop", "fc3.*"]


@situation("formats/writing/state.py: --force replaces its weights of this format and keeps its other files")
def _existing_directory(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    save_file({"a": randn(2)}, folder / "out" / "model.safetensors")
    return ["convert", TEN, "-o", str(folder / "out"), "--max-shard-size", "1MB"]


@situation("plans/steps.py: --skip-unread leaves out all such tensors", "plans/steps.py: ckpt remap XX -o OUT")
def _sparse(folder: Path) -> list[str]:
    (path,) = save(folder, sparse={"a": torch.ones(2), "odd": torch.eye(3).to_sparse()})
    return ["convert", path, "-o", str(folder / "out.pt")]


@situation("formats/safetensors.py: write a .pt file, or drop the tensor")
def _no_code(folder: Path) -> list[str]:
    (path,) = save(folder, odd={"a": torch.ones(2), "odd": torch.ones(2, dtype=torch.complex128)})
    return ["convert", path, "-o", str(folder / "out.safetensors")]


@situation("formats/safetensors.py: --rename 'OLD=NEW' gives it a name", filled={"OLD=NEW": "re:.+=b"})
def _no_text(folder: Path) -> list[str]:
    (path,) = save(folder, odd={"\ud800": torch.ones(2)})
    return ["convert", path, "-o", str(folder / "out.safetensors")]


@situation("plans/inputs.py: cast the base first: ckpt convert")
def _overflow(folder: Path) -> list[str]:
    base, donor = save(folder, base={"a": torch.zeros(2).half()}, donor={"a": torch.tensor([1e6, 1.0])})
    return ["merge", base, donor, "-o", str(folder / "out.pt")]


@situation(
    "formats/pickle/nodes.py: --only-tensors leaves the rest out", "formats/torch/edit.py: --keep-unknown keeps it"
)
def _unknown_code(folder: Path) -> list[str]:
    torch.save({"state_dict": {"a": randn(2)}, "act": torch.nn.ReLU()}, folder / "odd.pt")
    return ["remap", str(folder / "odd.pt"), "-o", str(folder / "out.pt")]


@situation("formats/distributed/dcp_write.py: rename it, for example")
def _a_counter_as_weight(folder: Path) -> list[str]:
    save_file({"w": randn(2), "step": torch.tensor(3)}, folder / "odd.safetensors")
    return ["convert", str(folder / "odd.safetensors"), "-o", str(folder / "out"), "--format", "dcp"]


@situation("plans/carry.py: leave out --carry")
def _carry_of_nothing(folder: Path) -> list[str]:
    return ["convert", TEN, "-o", str(folder / "out.pt"), "--carry"]


@situation("plans/output.py: use --format")
def _no_suffix(folder: Path) -> list[str]:
    return ["convert", TEN, "-o", str(folder / "out.xyz")]


@situation("plans/output.py: leave out --format")
def _format_and_suffix(folder: Path) -> list[str]:
    return ["convert", TEN, "-o", str(folder / "out"), "--format", "torch", "--max-shard-size", "1MB"]


# Inputs.


@situation("formats/distributed/parts.py: join them: ckpt merge")
def _parts_of_layers(folder: Path) -> list[str]:
    (folder / "parts").mkdir()
    for number in range(2):
        torch.save({f"layer{number}.weight": torch.ones(2)}, folder / "parts" / f"consolidated.0{number}.pth")
    return ["show", str(folder / "parts")]


@situation("formats/directories/opening.py: lists the values of the file")
def _json_inside(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    save_file({"a": randn(2)}, folder / "run" / "model.safetensors")
    (folder / "run" / "trainer_state.json").write_text('{"epoch": 1, "global_step": 2}', encoding="utf-8")
    return ["show", f"{folder / 'run'}::trainer_state.json"]


@situation("formats/foreign.py: selects keys by their names")
def _no_mapping_inside(folder: Path) -> list[str]:
    save_file({"net.a": randn(2), "b": randn(2)}, folder / "w.safetensors")
    return ["show", f"{folder / 'w.safetensors'}::net"]


@situation("formats/torch/tree.py: selects keys by their names")
def _no_mapping_in_weights(folder: Path) -> list[str]:
    torch.save({"net.a": randn(2), "b": randn(2)}, folder / "w.pt")
    return ["show", f"{folder / 'w.pt'}::net"]


@situation("formats/torch/checkpoint.py: shows the value")
def _a_number_inside(folder: Path) -> list[str]:
    torch.save({"model": {"a": randn(2)}, "epoch": 3}, folder / "run.pt")
    return ["show", f"{folder / 'run.pt'}::epoch"]


@situation(
    "checks/reading/__init__.py: ckpt convert XX -o OUT --format safetensors",
    "formats/codes.py: ckpt show lists all of them",
)
def _code_in_a_file(folder: Path) -> list[str]:
    torch.save({"state_dict": {"a": randn(2, 2)}, "act": torch.nn.ReLU()}, folder / "odd.pt")
    return ["check", str(folder / "odd.pt")]


@situation("checks/__init__.py: --keep 'PATTERN' checks only some keys", PATTERN="k0*")
def _many_findings(folder: Path) -> list[str]:
    (path,) = save(folder, bad={f"k{n:02}.weight": torch.full((4, 4), float("nan")) for n in range(40)})
    return ["check", path]


# Adapters.


def _base_and_kohya(folder: Path) -> list[str]:
    save_file({"a.b.weight": randn(6, 4), "other.weight": randn(6, 4, seed=1)}, folder / "base.safetensors")
    save_file(_kohya("lora_unet_a_b"), folder / "adapter.safetensors", {"ss_network_dim": "2"})
    return [str(folder / "base.safetensors"), str(folder / "adapter.safetensors")]


def _kohya(stem: str) -> State:
    return {
        f"{stem}.lora_down.weight": randn(2, 4, seed=3),
        f"{stem}.lora_up.weight": randn(6, 2, seed=4),
        f"{stem}.alpha": torch.tensor(2.0),
    }


def _fold(folder: Path, base: State, adapter: State) -> list[str]:
    save_file(base, folder / "base.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    paths = [str(folder / f"{name}.safetensors") for name in ("base", "adapter")]
    return ["merge", *paths, "-o", str(folder / "out.safetensors"), "--method", "lora"]


@situation("adapters/base_modules.py: rename its keys to one of them, or leave it out: --drop")
def _a_flat_name_of_two(folder: Path) -> list[str]:
    base = {"a.b_c.weight": randn(6, 4), "a_b.c.weight": randn(6, 4, seed=1), "d.weight": randn(6, 4)}
    return _fold(folder, base, _kohya("lora_unet_a_b_c") | _kohya("lora_unet_d"))


@situation("adapters/base_modules.py: leave out what the base does not have: --drop")
def _a_module_without_a_place(folder: Path) -> list[str]:
    return _fold(folder, {"a.weight": randn(6, 4)}, _kohya("lora_unet_a") | _kohya("lora_unet_zz"))


@situation("adapters/base_modules.py: keep one of them: --drop")
def _two_for_one_module(folder: Path) -> list[str]:
    names = {"unet.a.lora_A.weight": randn(2, 4), "unet.a.lora_B.weight": randn(6, 2)}
    return _fold(folder, {"a.weight": randn(6, 4)}, _kohya("lora_unet_a") | names)


@situation("adapters/named.py: leave it out: --drop")
def _a_difference_in_a_file(folder: Path) -> list[str]:
    return _fold(folder, {"a.weight": randn(6, 4)}, _kohya("lora_unet_a") | {"lora_unet_x.diff": randn(6, 4)})


@situation("plans/adapters/reading.py: leave the module out with --drop", DROP="lora_unet_b*")
def _alpha_of_zero(folder: Path) -> list[str]:
    adapter = _kohya("lora_unet_a") | _kohya("lora_unet_b") | {"lora_unet_b.alpha": torch.tensor(0.0)}
    return _fold(folder, {"a.weight": randn(6, 4), "b.weight": randn(6, 4)}, adapter)


def _convert(folder: Path, adapter: State, to: str) -> list[str]:
    save_file({"a.weight": randn(6, 4)}, folder / "base.safetensors")
    save_file(adapter, folder / "adapter.safetensors")
    return ["convert", str(folder / "adapter.safetensors"), "-o", str(folder / "out.safetensors"), "--adapter", to]


@situation(
    "adapters/outputs.py: fold it: ckpt merge BASE ADAPTER -o OUT --method lora", BASE="{folder}/base.safetensors"
)
def _loha_to_peft(folder: Path) -> list[str]:
    parts = {"w1_a": (6, 2), "w1_b": (2, 4), "w2_a": (6, 2), "w2_b": (2, 4)}
    return _convert(folder, {f"lora_unet_a.hada_{name}": randn(*shape) for name, shape in parts.items()}, "kohya")


@situation("adapters/outputs.py: give --base BASE", BASE="{folder}/base.safetensors")
def _kohya_without_a_base(folder: Path) -> list[str]:
    arguments = _convert(folder, _kohya("lora_unet_a_b"), "diffusers")
    save_file({"a.b.weight": randn(6, 4)}, folder / "base.safetensors")
    return arguments


@situation("adapters/outputs.py: write the part of one model first: ckpt remap")
def _two_models_to_peft(folder: Path) -> list[str]:
    adapter = {f"{model}.a.lora_{side}.weight": randn(*shape) for model in ("unet", "text_encoder")
               for side, shape in (("A", (2, 4)), ("B", (6, 2)))}  # fmt: skip
    arguments = _convert(folder, adapter, "peft")
    return [word.replace("out.safetensors", "out/adapter_model.safetensors") for word in arguments]


def peft(folder: Path, adapter: State, **config: object) -> str:
    """Write an adapter of PEFT to a directory, and return its path."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": value for key, value in adapter.items()}, folder / "adapter_model.safetensors"
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(folder)


_FACTORS = {"q.lora_A.weight": randn(2, 4), "q.lora_B.weight": randn(6, 2)}


@situation(
    "adapters/outputs.py: name the model first: ckpt remap ADAPTER -o NEW/adapter_model.safetensors", NEW="{folder}/new"
)
def _peft_to_diffusers(folder: Path) -> list[str]:
    path = peft(folder / "peft", _FACTORS)
    (folder / "new").mkdir()
    return ["convert", path, "-o", str(folder / "out.safetensors"), "--adapter", "diffusers"]


@situation("plans/adapters/convert.py: copy it: ckpt convert ADAPTER -o OUT --carry", ends=True)
def _peft_to_peft(folder: Path) -> list[str]:
    path = peft(folder / "peft", _FACTORS)
    return ["convert", path, "-o", str(folder / "out" / "adapter_model.safetensors"), "--adapter", "peft"]


@situation("adapters/placing.py: a matching key after --rename")
def _adapter_of_a_wrapped_base(folder: Path) -> list[str]:
    save_file({"net.q.weight": randn(6, 4)}, folder / "base.safetensors")
    adapter = peft(folder / "peft", _FACTORS)
    return [
        "merge",
        str(folder / "base.safetensors"),
        adapter,
        "-o",
        str(folder / "out.safetensors"),
        "--method",
        "lora",
    ]


@situation("adapters/placing.py: --on-unexpected add writes")
def _adapter_with_a_head(folder: Path) -> list[str]:
    save_file({"q.weight": randn(6, 4)}, folder / "base.safetensors")
    adapter = peft(folder / "peft", _FACTORS | {"score.weight": randn(2, 6)}, modules_to_save=["score"])
    return [
        "merge",
        str(folder / "base.safetensors"),
        adapter,
        "-o",
        str(folder / "out.safetensors"),
        "--method",
        "lora",
    ]


@situation("plans/adapters/combine.py: or leave its tensor out: ")
def _a_factor_and_a_whole_tensor(folder: Path) -> list[str]:
    save_file({"q.weight": randn(6, 4), "r.weight": randn(6, 4)}, folder / "base.safetensors")
    factors = {"r.lora_A.weight": randn(2, 4), "r.lora_B.weight": randn(6, 2)}
    paths = [peft(folder / "one", _FACTORS), peft(folder / "two", factors | {"q.weight": randn(6, 4)},
             target_modules=["r"], modules_to_save=["q"])]  # fmt: skip
    return [
        "merge",
        str(folder / "base.safetensors"),
        *paths,
        "-o",
        str(folder / "out.safetensors"),
        "--method",
        "lora",
    ]


def _extract(folder: Path, base: State, tuned: State) -> list[str]:
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    paths = [str(folder / f"{name}.safetensors") for name in ("base", "tuned")]
    out = str(folder / "out" / "adapter_model.safetensors")
    return ["merge", *paths, "-o", out, "--method", "extract-lora", "--rank", "2"]


@situation("plans/adapters/extract.py: leave it out: --drop", "plans/adapters/extract.py: --as-layer XX")
def _a_new_module(folder: Path) -> list[str]:
    base = {"q.weight": randn(6, 4), "r.weight": randn(6, 4)}
    return _extract(folder, base, {"q.weight": randn(6, 4, seed=1), "r.weight": randn(7, 4)})


@situation("plans/adapters/extract.py: write the changed model itself: ckpt merge BASE TUNED -o OUT")
def _only_a_norm_changed(folder: Path) -> list[str]:
    base = {"q.weight": randn(6, 4), "norm.weight": randn(6)}
    return _extract(folder, base, base | {"norm.weight": randn(6, seed=1)})


@situation(
    "plans/adapters/layers.py: --as-layer 'PATTERN=KIND' decides otherwise",
    filled={"PATTERN=KIND": "wte.weight=linear"},
)
def _taken_for_an_embedding(folder: Path) -> list[str]:
    base = {"wte.weight": randn(12, 4), "q.weight": randn(6, 4)}
    return _extract(folder, base, {"wte.weight": randn(12, 4, seed=1), "q.weight": randn(6, 4, seed=2)})


@situation("checks/adapters.py: or leave this tensor out with --drop", DROP="*.r.lora_B.*")
def _half_a_pair(folder: Path) -> list[str]:
    return ["check", peft(folder / "peft", _FACTORS | {"r.lora_B.weight": randn(6, 2)})]


@situation(
    "wrappers/table.py: ckpt merge BASE PATH -o OUT --method lora",
    "wrappers/table.py: --drop '*.lora_*'",
    BASE="{folder}/base.pt",
)
def _strip_of_an_adapter(folder: Path) -> list[str]:
    save(folder, base={"q.weight": randn(6, 4)})
    path = peft(folder / "peft", _FACTORS | {"q.base_layer.weight": randn(6, 4)})
    return ["remap", path, "-o", str(folder / "out.pt"), "--strip", "auto"]


# Readiness.


@situation("readiness/resume.py: ckpt remap XX -o OUT --rename")
def _prefixed_run(_folder: Path) -> list[str]:
    return ["preflight", "--model", MODEL_10, "--resume", DDP]


@situation("readiness/resume.py: ckpt diff MODEL XX shows all of them", MODEL=MODEL)
def _another_run(_folder: Path) -> list[str]:
    return ["preflight", "--model", MODEL, "--resume", TEN]


@situation("readiness/init.py: ckpt diff MODEL", MODEL=MODEL)
def _nothing_fits(folder: Path) -> list[str]:
    (path,) = save(folder, init={"conv1.weight": randn(9, 9), "fc1.weight": randn(9)})
    return ["preflight", "--model", MODEL, "--init", path]


@situation("readiness/init.py: if this is intended, give --fresh")
def _a_new_head(_folder: Path) -> list[str]:
    return ["preflight", "--model", MODEL, "--init", TEN]


@situation("readiness/init.py: leave the pattern out; else drop these keys of init with a rule (--drop)", DROP="fc3.*")
def _a_head_that_init_fills(_folder: Path) -> list[str]:
    return ["preflight", "--model", MODEL_10, "--init", TEN, "--fresh", "fc3.*"]


@situation("readiness/init.py: require less, or rename the keys of init with --rename", RENAME="last.*=fc3.*")
def _a_head_that_is_required(folder: Path) -> list[str]:
    state = {key.replace("fc3", "last"): value for key, value in torch.load(TEN).items()}
    return ["preflight", "--model", MODEL_10, "--init", *save(folder, init=state), "--require", "fc3.*"]


@situation("readiness/at_init.py: if this is intended, give --fresh")
def _an_untrained_head(folder: Path) -> list[str]:
    from fixtures.lenet import build

    torch.manual_seed(0)
    new = build(num_classes=10).state_dict()
    state = {key: value if "fc1" in key else 1.7 * value + 0.1 * randn(*value.shape) for key, value in new.items()}
    return ["preflight", "--model", MODEL_10, "--init", *save(folder, init=state)]


@situation("checks/expected.py: --ignore")
def _an_untrained_head_in_a_check(folder: Path) -> list[str]:
    return ["check", _an_untrained_head(folder)[-1], "--like", MODEL_10]


@situation("readiness/training.py: ckpt groups table --model MODEL SPEC shows the groups", MODEL=MODEL,
           SPEC=str(ROOT / "fixtures" / "groups.toml"))  # fmt: skip
def _an_optimizer_that_refuses(_folder: Path) -> list[str]:
    return ["preflight", "--model", MODEL, "--groups", str(ROOT / "fixtures" / "groups.toml"), "--optimizer", "LBFGS"]


# Rare ones.


@situation("plans/adapters/tied.py: an adapter of this base holds only one: --drop")
def _a_tie_that_came_apart(folder: Path) -> list[str]:
    tied, head = randn(12, 4), randn(12, 4, seed=2)
    base, tuned = save(
        folder,
        base={"embed.weight": tied, "head.weight": tied, "q.weight": randn(6, 4)},
        tuned={"embed.weight": randn(12, 4, seed=3), "head.weight": head, "q.weight": randn(6, 4, seed=1)},
    )
    out = str(folder / "out" / "adapter_model.safetensors")
    return ["merge", base, tuned, "-o", out, "--method", "extract-lora", "--rank", "2"]


@situation("plans/adapters/tied.py: --as-layer XX")
def _a_tie_that_changed(folder: Path) -> list[str]:
    tied, new = randn(12, 4), randn(12, 4, seed=2)
    base, tuned = save(
        folder,
        base={"embed.weight": tied, "head.weight": tied, "q.weight": randn(6, 4)},
        tuned={"embed.weight": new, "head.weight": new, "q.weight": randn(6, 4, seed=1)},
    )
    out = str(folder / "out" / "adapter_model.safetensors")
    return ["merge", base, tuned, "-o", out, "--method", "extract-lora", "--rank", "2"]


def _fp8(name: str) -> State:
    weight = randn(4, 4).to(torch.float8_e4m3fn)
    return {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.ones(1, 1)}


@situation("plans/quantized/__init__.py: rename all its parts alike: --rename", NEW="b")
def _half_a_quantised_weight(folder: Path) -> list[str]:
    (path,) = save(folder, fp8=_fp8("a"))
    return ["remap", path, "-o", str(folder / "out.pt"), "--rename", "a.weight=x.weight"]


@situation("plans/quantized/__init__.py: give --rules FILE in place of --dtype", FILE="{folder}/rules.toml")
def _cast_of_a_quantised_weight(folder: Path) -> list[str]:
    (path,) = save(folder, fp8=_fp8("a") | {"norm.weight": randn(4)})
    rule = '[[rule]]\nfrom = "*norm.*"\nto = "*norm.*"\nop = { cast = { dtype = "BF16" } }\n'
    (folder / "rules.toml").write_text(rule, encoding="utf-8")
    return ["remap", path, "-o", str(folder / "out.pt"), "--dtype", "BF16"]


@situation("checks/expected.py: ckpt convert XX -o OUT --dequantize makes plain weights", ends=True)
def _a_weight_that_only_one_side_has_quantised(folder: Path) -> list[str]:
    found, plain = save(folder, fp8=_fp8("a"), plain={"a.weight": randn(4, 4)})
    return ["check", found, "--like", plain]


@situation("rules/gguf/__init__.py: make it a model first: ckpt remap BASE", ends=True)
def _rules_of_a_base(folder: Path) -> list[str]:
    pairs = [pair("general.architecture", STRING, string("qwen2"))]
    (folder / "m.gguf").write_bytes(gguf_file([info("output_norm.weight")], pairs, bytes(16)))
    (donor,) = save(folder, donor={"model.norm.weight": randn(4)})
    return ["merge", str(folder / "m.gguf"), donor, "-o", str(folder / "out.safetensors"), "--rules", "gguf:auto"]


@situation("plans/steps.py: --drop XX leaves it out, or --rename XX gives it a name", NEW="b")
def _two_places_of_one_name(folder: Path) -> list[str]:
    torch.save({"a.b": randn(2), "a": {"b": randn(2)}, "c": randn(2)}, folder / "two.pt")
    return ["remap", str(folder / "two.pt"), "-o", str(folder / "out.pt"), "--drop", "c"]


@situation("plans/overlays/requirements.py: --on-missing keep")
def _parts_of_a_fused_weight(folder: Path) -> list[str]:
    gate, up = randn(8, 4), randn(8, 4, seed=1)
    base = {"layers.0.mlp.gate_up_proj.weight": torch.cat((gate, up)), "norm.weight": randn(4)}
    donor = {"layers.0.mlp.gate_proj.weight": gate, "layers.0.mlp.up_proj.weight": up, "norm.weight": randn(4)}
    return ["merge", *save(folder, base=base, donor=donor), "-o", str(folder / "out.pt")]


@situation("readiness/init.py: or leave it out: ckpt remap")
def _an_init_that_torch_does_not_copy(folder: Path) -> list[str]:
    state = torch.load(TEN)
    state["fc1.weight"] = state["fc1.weight"].to_sparse()
    return ["preflight", "--model", MODEL_10, "--init", *save(folder, init=state)]


@situation("formats/directories/numbered.py: join them: ckpt merge")
def _parts_of_a_pipeline(folder: Path) -> list[str]:
    (folder / "parts").mkdir()
    for number in range(2):
        torch.save({f"layer{number}.weight": torch.ones(2)}, folder / "parts" / f"pp{number}.pt")
    return ["show", str(folder / "parts")]


def _too_little_of_an_adapter(folder: Path, method: str) -> list[str]:
    """Return the command for an adapter of one of two weights, without what it must change."""
    save_file({"a.weight": torch.zeros(4, 6), "b.weight": torch.zeros(4, 6)}, folder / "base.safetensors")
    save_file({"a.weight": torch.ones(4, 6), "b.weight": torch.zeros(4, 6)}, folder / "tuned.safetensors")
    factors = {"a.lora_A.weight": torch.ones(1, 6), "a.lora_B.weight": torch.ones(4, 1)}
    donor = peft(folder / "peft", factors, r=1) if method == "lora" else str(folder / "tuned.safetensors")
    paths = [str(folder / "base.safetensors"), donor]
    out = str(folder / "out" / "adapter_model.safetensors")
    return ["merge", *paths, "--require", "b.*", "--method", method, "-o", out]


@situation("plans/adapters/fold.py: see which layers it has: ckpt show")
def _too_small_an_adapter(folder: Path) -> list[str]:
    return _too_little_of_an_adapter(folder, "lora")


@situation("plans/adapters/extract.py: see what changed: ckpt merge")
def _too_small_a_change(folder: Path) -> list[str]:
    return _too_little_of_an_adapter(folder, "extract-lora")


def _gguf(folder: Path, architecture: str) -> str:
    path = folder / "m.gguf"
    infos = [info("output_norm.weight"), info("odd.weight", offset=32)]
    pairs = [pair("general.architecture", STRING, string(architecture))]
    path.write_bytes(gguf_file(infos, pairs, bytes(48)))
    return str(path)


@situation("rules/gguf/__init__.py: leave out what the model does not need: --drop XX")
def _unknown_tensor_of_gguf(folder: Path) -> list[str]:
    return ["remap", _gguf(folder, "qwen2"), "-o", str(folder / "out.safetensors"), "--rules", "gguf:auto"]


@situation("rules/gguf/__init__.py: find rules with ckpt align", EXPECTED=TEN, ends=True)
def _unknown_architecture_of_gguf(folder: Path) -> list[str]:
    return ["remap", _gguf(folder, "mamba"), "-o", str(folder / "out.safetensors"), "--rules", "gguf:auto"]


@situation("comparison/hints.py: ckpt diff XX XX --rules gguf:auto")
def _gguf_beside_other_names(folder: Path) -> list[str]:
    path = folder / "m.gguf"
    pairs = [pair("general.architecture", STRING, string("qwen2"))]
    path.write_bytes(gguf_file([info("output_norm.weight")], pairs, bytes(16)))
    return ["diff", *save(folder, base={"model.norm.weight": randn(4)}), str(path)]
