"""The documents of ``--json`` follow the schemas in ``docs/schemas``, and no schema has a field that none has."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import save_file

import ckptkit
from ckptkit.cli import main
from fixtures.lenet import build
from tests.helpers_cli import ROOT
from tests.helpers_schemas import SCHEMA_FILES, problems_of, read_schema
from tests.naming import llama, vit

MODEL, LOSS = "py:fixtures.lenet:build", "py:fixtures.lenet:loss"
TEN, DDP, TIED = "fixtures/lenet_10class.pth", "fixtures/lenet_ddp.pt", "fixtures/encoder_tied.pt"
TUNED, SPEC = "fixtures/lenet_tuned.safetensors", "fixtures/groups.toml"
INF, NAN = float("inf"), float("nan")

# For each line, the exit code and the arguments; OUT is the folder of ``out``.
COMMANDS = f"""
0 show {TIED}
0 show {DDP} --digests
2 show {DDP} {TIED} OUT/missing.pt
0 show OUT/sparse.pt --digests
0 show OUT/odd.safetensors
0 show OUT/quantised.safetensors
0 show OUT/alike.pt
1 diff {MODEL} {DDP} --strip auto
1 diff {TEN} {DDP} --require fc3.* --min-coverage 95%
1 diff OUT/plain.safetensors OUT/quantised.safetensors
1 diff OUT/plain.safetensors OUT/odd.safetensors
1 diff OUT/plain.safetensors OUT/odd.safetensors --atol 1e-3 --expect-changed * --expect-frozen * --max-rel-l2 1
1 diff OUT/plain.safetensors OUT/quantised.safetensors --values
1 diff OUT/odd.safetensors OUT/plain.safetensors --values
1 diff py:tests.helpers_own_loading:joining_and_refusing OUT/parts.safetensors
0 merge {MODEL} {DDP} --rename module.*=* --on-mismatch skip -o OUT/merged.safetensors --plan OUT/merge.json
0 merge {TEN} {DDP} --rename module.*=* -o OUT/none.pt --dry-run
0 merge {TUNED} x={TUNED} --method model_stock --base {TEN} -o OUT/stock.safetensors
0 show OUT/stock.safetensors
0 merge {MODEL}(num_classes=10) {TEN} --method extract-lora --rank 1 -o OUT/extracted/adapter_model.safetensors
0 remap {DDP} --rename module.*=* -o OUT/remapped.pt
0 remap {TEN} --rules OUT/rules.toml -o OUT/split.safetensors --plan OUT/plan.json
0 remap OUT/plain.safetensors --rules OUT/equal.toml -o OUT/equal.safetensors --plan OUT/equal.json
0 convert OUT/hub -o OUT/half/model.safetensors --dtype float16 --carry --verify --allow-overflow
0 convert {TIED} -o OUT/none.pt --dry-run
0 delta OUT/plain.safetensors OUT/odd.safetensors -o OUT/patch.safetensors
0 show OUT/patch.safetensors
0 apply OUT/plain.safetensors OUT/patch.safetensors -o OUT/applied.safetensors
0 stats OUT/odd.safetensors --depth 1
0 stats {TIED} --top 2
0 stats OUT/quantised.safetensors
0 digest {TEN}
1 digest --check OUT/old.digest OUT/sparse.pt --skip-unread
0 digest OUT/sparse.pt --skip-unread
0 check {DDP}
1 check OUT/odd.safetensors --like OUT/plain.safetensors
1 align OUT/llama_hf.safetensors OUT/llama_meta.safetensors
0 align {TEN} {DDP}
1 align {MODEL} {TEN}
1 align {TEN} OUT/odd.safetensors
0 align OUT/vit_hf.safetensors OUT/vit_timm.safetensors
0 preflight --model {MODEL}
1 preflight --model {MODEL} --init {TEN} --groups {SPEC} --optimizer SGD --dry-step {LOSS} --resume {DDP}
0 doctor
0 git uninstall --global --dry-run
0 groups table --model {MODEL} {SPEC}
0 groups table --model py:schemas_net:build OUT/frozen.toml
1 groups validate --model {MODEL} OUT/part.toml
0 groups explain --model py:schemas_net:build OUT/frozen.toml blocks.1.weight
0 groups explain --model py:schemas_net:build OUT/frozen.toml frozen.weight
0 groups emit {SPEC}
0 groups lock --model {MODEL} {SPEC} -o OUT/one.lock.json
0 groups lock --model py:schemas_net:build OUT/frozen.toml -o OUT/two.lock.json
1 groups diff OUT/one.lock.json OUT/two.lock.json
0 optim show {DDP}
0 optim show OUT/odd.pt
0 optim remap {DDP} --rename module.*=* -o OUT/optim.pt
0 optim prune {DDP} --drop *.fc3.* -o OUT/none.pt --dry-run
0 optim resplit OUT/optim.pt --groups {SPEC} --model {MODEL} -o OUT/resplit.pt
0 optim diff {DDP} {DDP}
"""
EDITS = ("merge", "remap", "convert", "apply")
FILES = ("plan.json", "merge.json", "equal.json", "one.lock.json", "two.lock.json")  # that the commands write

NET = """
from torch import nn

def build():
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    model.head, model.tied, model.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    model.tied.weight = model.head.weight
    model.frozen.requires_grad_(False)
    return model
"""
FROZEN = """
[defaults]
lr = 0.1
momentum = 0.9

[[group]]
params = "decoder.*"
optional = true

[[group]]
params = "head.*"
freeze = true

[[group]]
name = "norms"
match = { role = "norm" }
lr_mult = 2.0

[[group]]
name = "rest"
rest = true
"""
RULES = """
[[rule]]
from = "fc1.weight"
to = ["a.weight", "b.weight"]
op = { split = { dim = 0, sizes = [20, 100] } }

[[stage]]
[[stage.rule]]
from = ["b.weight", "a.weight"]
to = "joined.weight"
op = { concat = { dim = 0 } }
"""
EQUAL = """
[[rule]]
from = "{x}.weight"
to = "weight"
on_collision = "equal"
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of odd content that the commands read."""
    folder = tmp_path_factory.mktemp("documents")
    plain = torch.arange(16.0).reshape(4, 4) / 10
    save_file({"a.weight": plain, "b.weight": plain.clone(), "n": torch.ones(2)}, folder / "plain.safetensors")
    odd = torch.tensor([[INF, NAN, -INF, 1.0, 2.0]])
    save_file(
        {"a.weight": odd, "b.weight": plain.half(), "c": torch.full((3,), -INF), "e": torch.zeros(0)},
        folder / "odd.safetensors",
        metadata={"epoch": "3"},
    )
    codes = {
        "a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4),
        "a.weight_format": torch.zeros((), dtype=torch.uint8), "b.weight": plain,
    }  # fmt: skip
    save_file(codes, folder / "quantised.safetensors")
    torch.save({"w": plain, "w\u200b": plain.clone(), "loss": NAN, "epoch": 3}, folder / "alike.pt")
    parts = {"a.1.part1": (2, 3), "a.1.part2": (1, 3), "a.2.old_weight": (3, 3), "c.1.bias": (3,)}
    for name, shapes in {
        "parts": parts,
        "llama_meta": llama.meta(2, 16, 24, 30, 8),
        "llama_hf": llama.hf(2, 16, 24, 30, 8),
        "vit_timm": vit.timm(2, 8, 12, patch=2, patches=4, classes=3),
        "vit_hf": vit.hf(2, 8, 12, patch=2, patches=4, classes=3),
    }.items():
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors")
    torch.save({"w": plain, "n": torch.ones(3), "s": torch.eye(2).to_sparse()}, folder / "sparse.pt")
    recorded = ckptkit.digest({"w": plain, "gone": torch.ones(1), "old": torch.ones(3)})
    (folder / "old.digest").write_text(f"{recorded}\n", encoding="ascii")
    (folder / "hub").mkdir()
    save_file({"w": torch.tensor([1e9, 1e-9, 1.0])}, folder / "hub" / "model.safetensors")
    (folder / "hub" / "config.json").write_text('{"torch_dtype": "float32"}', encoding="utf-8")
    (folder / "half").mkdir()
    for name, text in (("schemas_net.py", NET), ("frozen.toml", FROZEN), ("rules.toml", RULES), ("equal.toml", EQUAL)):
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "part.toml").write_text('[[group]]\nparams = "fc3.*"\nlr = 0.1\n', encoding="utf-8")
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.5), eps=INF, capturable=False, foreach=False)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = 1  # as older versions of torch have it
    torch.save(state, folder / "odd.pt")
    return folder


@pytest.fixture(scope="module")
def documents(out: Path) -> list[Any]:
    """The documents of all commands, of the files that they write, and of results that no command prints."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(out)
        for line in COMMANDS.strip().splitlines():
            code, *arguments = shlex.split(line.replace("OUT", str(out)))
            printed, messages = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(messages):
                ended = main([*arguments, "--json"])
            assert str(ended) == code, f"{line}: {messages.getvalue()}"
            found.append(json.loads(printed.getvalue()))
        sources = {"base": out / "plain.safetensors", "patch": out / "patch.safetensors"}
        ckptkit.save_plan(ckptkit.plan_apply_delta(**sources), out / "patched.json", sources)
        found += [json.loads((out / name).read_text(encoding="utf-8")) for name in (*FILES, "patched.json")]
        return [*found, *live_documents()]


def live_documents() -> Iterator[Any]:
    """Yield the documents of the results that no command prints."""
    model = build()
    left = {"a": torch.ones(2), "b": torch.ones(2), "sparse": torch.ones(2).to_sparse()}
    right = {**left, "a": torch.ones(2) + 1e-6, "b": torch.zeros(2)}
    yield ckptkit.compare_values(left, right, atol=1e-5).to_dict()
    yield ckptkit.diff(left, right, atol=1e-5, max_rel_l2=1).to_dict()
    codes = {"q.weight": torch.ones(2, 2, dtype=torch.int8), "q.weight_scale": torch.ones(2, 1)}
    yield ckptkit.diff(codes, codes, dequantize=True).to_dict()
    yield ckptkit.stats(codes, dequantize=True).to_dict()
    yield ckptkit.load_into(model, DDP, ["module.*=*"], on_mismatch="skip").to_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    next(model.parameters()).grad = torch.zeros_like(next(model.parameters()))
    optimizer.step()
    yield ckptkit.load_optimizer_state(optimizer, model, optimizer.state_dict(), on_missing="keep").to_dict()


def fields_in(schema: Any, whole: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """Yield the path of each field that a schema names; ``[]`` stands for the items of a list."""
    if "$ref" in schema and depth < 12:
        yield from fields_in(whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole, path, depth + 1)
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from fields_in(choice, whole, path, depth + 1)
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from fields_in(inner, whole, f"{path}.{name}", depth + 1)
    if isinstance(schema.get("items"), dict):
        yield from fields_in(schema["items"], whole, f"{path}[]", depth + 1)


def fields_of(document: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each field of a document, as ``fields_in`` does."""
    if isinstance(document, dict):
        for name, inner in document.items():
            yield f"{path}.{name}"
            yield from fields_of(inner, f"{path}.{name}")
    elif isinstance(document, list):
        for inner in document:
            yield from fields_of(inner, f"{path}[]")


def test_documents_follow_their_schemas_and_fill_them(documents: list[Any]) -> None:
    """Each document follows its schema, and some document has each field that a schema names."""
    found: dict[str, set[str]] = {name: set() for name in SCHEMA_FILES}
    for document in documents:
        assert problems_of(document) == [], document["schema"]
        found[document["schema"].removeprefix("ckptkit.").removesuffix("/1")].update(fields_of(document))
    edited = set().union(*(found[name] for name in EDITS))
    for name in SCHEMA_FILES:
        schema = read_schema(name)
        assert set(fields_in(schema, schema)) <= (edited if name in EDITS else found[name]), name


def test_the_commands_that_write_print_one_form() -> None:
    """The schemas of merge, remap, convert and apply differ in nothing but their names."""
    schemas = [read_schema(name) for name in EDITS]
    for schema in schemas:
        del schema["title"], schema["description"], schema["properties"]["schema"]
    assert all(schema == schemas[0] for schema in schemas)


def test_another_field_and_a_missing_field_are_found(documents: list[Any]) -> None:
    """A document with a field more or less, or with a negative number in a field, does not follow its schema."""
    for document in {document["schema"]: document for document in documents}.values():
        assert problems_of({**document, "more": 1}) != []
        for name in set(document) - {"schema"}:
            assert problems_of({key: value for key, value in document.items() if key != name}) != []
            assert problems_of({**document, name: -0.5}) != []


@pytest.mark.parametrize("name", SCHEMA_FILES)
def test_schemas_are_valid_and_say_what_each_field_is(name: str) -> None:
    """A schema is valid in JSON Schema 2020-12, and each object and field of it has a description and an exact form."""
    schema = read_schema(name)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == f"ckptkit.{name}/1"
    for part in parts_of(schema):
        assert all("description" in field for field in part.get("properties", {}).values())
        if "properties" in part:
            assert part["additionalProperties"] is False


def parts_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and every schema in it."""
    if isinstance(schema, dict):
        yield schema
        for inner in schema.values():
            yield from parts_of(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from parts_of(inner)


def test_the_page_lists_every_schema() -> None:
    """The page about schemas links to each file."""
    page = (ROOT / "docs/schemas.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(schemas/([\w-]+)\.schema\.json\)", page)) == set(SCHEMA_FILES)
