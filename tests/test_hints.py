"""Hints name commands and options that exist and work; in Python they name functions and arguments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.helpers_hint_optim  # noqa: F401 - it adds its situations
from ckptkit import preflight, run_checks
from ckptkit.cli.common.hints import hint_for_command
from ckptkit.core.result.summary import CheckpointSummary
from ckptkit.errors import CkptkitError, hint_for_python, message_for_python
from fixtures.lenet import build
from tests.helpers_cli import run_ckpt
from tests.helpers_hint_following import Follower
from tests.helpers_hint_situations import SITUATIONS, TEN, Situation, save
from tests.helpers_hint_sources import PLACES, SOURCES, covers, read_source
from tests.helpers_hints import FOREIGN, OF_GIT, all_options, commands_in, problems_of_hint

_LONG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


@pytest.mark.parametrize("situation", SITUATIONS, ids=[situation.id for situation in SITUATIONS])
def test_each_way_out_works(situation: Situation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command in a hint runs, and each option ends the trouble of the command, as the hint promises."""
    Follower(situation, tmp_path, capsys).run()


def test_every_option_and_command_in_the_sources_exists() -> None:
    """No text names an option that no command has, or a command with options that it does not have."""
    everywhere = all_options() | FOREIGN
    for path in SOURCES:
        known = everywhere | OF_GIT if path.parent.name == "git" else everywhere
        for text in read_source(path).texts:
            unknown = [name for name in _LONG.findall(text) if name not in known] if "--" in text else []
            assert unknown == [], (path, text)
            if " ckpt " in f" {text}" and "cli" not in path.parts:
                problems = [problem for problem in problems_of_hint([], text) if "lacks" not in problem]
                assert problems == [], (path, text)


def test_errors_speak_python() -> None:
    """The text of every error names no option and no command: what hints name has a spelling in Python."""
    for path in SOURCES:
        for hint in () if "cli" in path.parts else read_source(path).hints_without_call:
            text = str(CkptkitError("refused", hint=hint))
            left = [name for name in _LONG.findall(text) if name not in FOREIGN]
            assert (left, commands_in(text), " -o " in text) == ([], [], False), (path, text)


# Texts with a command or an option that no situation follows, each with the reason.
_MESSAGE = "a message, which names what the user gave"
_BUILDER = "a function that makes hints, whose uses are followed"
_ORACLES = "needs transformers: tests/oracles/test_hints.py follows it"
NOT_FOLLOWED: dict[str, str] = {
    "adapters/base_modules.py: --drop XX": _BUILDER,
    "core/patterns/__init__.py: --drop XX": _BUILDER,
    "errors.py: ": "patterns that read hints",
    "rules/model.py: --": _BUILDER,
    "core/coverage/requirements.py: ": _MESSAGE,
    "optimizer_state/pruning.py: requested with": _MESSAGE,
    "readiness/init.py: --fresh XX matches none of": _MESSAGE,
    "readiness/init.py: must stay at init by --fresh": _MESSAGE,
    "rules/apply.py: --strip": _MESSAGE,
    "rules/apply.py: --keep XX matches none of": _MESSAGE,
    "rules/apply.py: matches no --keep": _MESSAGE,
    "plans/quantized/as_numbers.py: --keep XX": _MESSAGE,
    "rules/gguf/__init__.py: --rules XX": _MESSAGE,
    "rules/transformers/__init__.py: --rules XX: ": _MESSAGE,
    "testing.py: --keep XX matches none of": _MESSAGE,
    "rules/transformers/skeleton.py: --rules transformers: needs": _MESSAGE,
    "wrappers/explain.py: --strip XX begins none of": _MESSAGE,
    "wrappers/explain.py: --strip XX would leave a dot": _MESSAGE,
    "formats/directories/opening.py: ckpt searched for an index": "names the program, not a command",
    "plans/recipes/parse.py: --from-mergekit FILE reads": "followed by tests/recipes/test_recipe_mergekit.py",
    "formats/directories/opening.py: ckpt show XX lists all of them": "followed by tests/test_urls.py",
    "deltas/making.py: no tensor has the same name on both sides": "followed by tests/test_deltas.py",
    "deltas/patch_file.py: ckpt delta writes patches": "says what a patch is",
    "deltas/patch_file.py: rename it in both: ckpt remap": "only the user knows the new name",
    "deltas/planning.py: its base comes first": "followed by tests/test_deltas.py",
    "formats/codes.py: The file is a patch that ckpt delta wrote": _MESSAGE,
    "formats/codes.py: ckpt apply BASE PATCH -o OUT": "followed by tests/test_deltas.py",
    "plans/deltas/base.py: ckpt show PATCH prints the digests": "followed by tests/test_deltas.py",
    "plans/output.py: leave out --reflink": "followed by tests/test_uploads.py",
    "plans/quantized/as_numbers.py: dequantise it to F16": "followed by tests/test_dequantize.py",
    "plans/quantized/configured.py: or leave out --carry": "followed by tests/test_quantize_outputs.py",
    "formats/__init__.py: diff, align, merge and --like": "a note about commands, without one to run",
    "plans/adapters/fold.py: with a second ckpt merge": "a note: which weights they are, only the user knows",
    "plans/adapters/ties.py: which --carry writes": "a note; tests/test_plan_lora_ties.py runs it with --carry",
    "plans/adapters/ties.py: leave it out: --drop": "followed by tests/test_plan_lora_ties.py",
    "render/page/width.py: XX; --wide shows all": "followed by tests/test_terminal.py",
    "comparison/matching.py: were not compared: ckpt optim diff compares the options": _MESSAGE,
    "render/diff.py: ckpt diff XX --rename XX": "followed by tests/test_cli.py",
    "render/digests.py: --rename XX compares XX": "followed by tests/test_digests.py",
    "render/digests.py: with the recorded checkpoint, ckpt diff": "only the user knows where that checkpoint is",
    "render/diff.py: --values compares them": "followed by tests/test_diff_values.py",
    "comparison/gates.py: or leave them out with --drop": "followed by tests/test_diff_values.py",
    "comparison/gates.py: rounding to XX can explain": "followed by tests/test_diff_values.py",
    "comparison/gates.py: XX matches only keys that": _MESSAGE,
    "align/ways_out.py: --digests decides": "followed by tests/test_align_claims.py",
    "formats/writing/reflink.py: --reflink auto": "needs a file system without reflinks: tests/test_reflink.py",
    "plans/metadata/edits.py: --metadata and --drop-metadata are for": _MESSAGE,
    "plans/metadata/edits.py: --drop-metadata XX matches none of": _MESSAGE,
    "plans/metadata/edits.py: --metadata 'format=pt' adds it": "followed by tests/test_metadata_edits.py",
    "render/align.py: this preset fills all of them: --rules": "followed by tests/test_align.py",
    "plans/writing/damage.py: without --verify, the bytes are copied": "followed by tests/test_verify.py",
    "plans/remap.py: takes them from the trained weights": "followed by tests/test_positions.py",
    "formats/writing/state.py: run the command again with --force": "needs a second program: tests/test_faults.py",
    "formats/writing/stores/remains.py: run it again with --force": "followed by tests/oracles/test_uploads.py",
    "formats/writing/atomic.py: --continue goes on from there": "followed by tests/test_resume.py",
    "plans/writing/finished_shards.py: leave out --continue": "followed by tests/test_resume.py",
    "plans/writing/shard_tasks.py: leave out --jobs": "followed by tests/oracles/test_executors.py",
    "plans/writing/shard_tasks.py: XX, or write shards": "followed by tests/oracles/test_executors.py",
    "tasks/inputs.py: leave out --jobs": "followed by tests/oracles/test_executors.py",
    "tasks/running.py: give each worker more memory": "only the user knows how much there is",
    "__init__.py: XX does what ckpt XX does": _MESSAGE,
    "tasks/ray.py: give each worker more memory": "only the user knows how much there is",
    "plans/recipes/parse.py: only the command ckpt merge reads": _MESSAGE,
    "render/show/__init__.py: ckpt show": "the name of a command in the head of a report",
    "plans/writing/finished_shards.py: which --continue compares and keeps": "followed by tests/test_resume.py",
    "plans/writing/finished_shards.py: --continue keeps those of the same": "followed by tests/test_resume.py",
    "formats/safetensors.py: drop the tensor: --drop": "only some versions of safetensors refuse these dtypes",
    "param_groups/spec_findings.py: give the live model: --model": "only Python prints the hint of this finding",
    "rules/apply.py: ckpt remap PATH -o OUT --rules FILE": "only stats() and digest() take rules with operations",
    "optimizer_state/loading/refusals.py: drop its state first: ckpt optim prune": "only load_optimizer_state says it",
    "plans/overlays/refusals.py: if these tensors are not needed, leave them out": "only load_into says it",
    "comparison/hints.py: --rules transformers:auto": _ORACLES,
    "plans/overlays/requirements.py: --rules transformers:auto": _ORACLES,
    "rules/transformers/__init__.py: name the model type, such as": _ORACLES,
    "rules/transformers/skeleton.py: --rules transformers:auto takes": _ORACLES,
    "plans/recipes/mergekit.py: is read; --carry copies that of the base": "says what has no equal in mergekit",
    "plans/recipes/model.py: --param": "followed by tests/test_merge_recipes_cli.py",
    "plans/recipes/inputs.py: --keep": "leaves a hint of ckpt remap out",
    "plans/recipes/inputs.py: or pass --allow-unused": "leaves a hint of ckpt remap out",
    "plans/recipes/alignment.py: --param on_missing=base": "followed by tests/test_merge_recipes_cli.py",
    "plans/adapters/reading.py: the base comes first, and then": "followed by tests/test_cli.py",
    "plans/recipes/options.py:  --weight": "followed by tests/test_merge_recipes_cli.py",
    "values/merging/payload.py: --param on_nonfinite=allow": "followed by tests/test_merge_recipes_cli.py",
    "plans/inputs.py: --param non_float=max": "followed by tests/test_merge_recipes_cli.py",
    "plans/recipes/alignment.py: --param non_float=base": "followed by tests/test_merge_recipes_cli.py",
    "plans/recipes/provenance.py: it was written with --no-recipe": "says why there is no recipe",
    "plans/recipes/parse.py: give all inputs as many rows first": "says what to do before the merge",
}  # fmt: skip


def _told() -> Iterator[str]:
    """Yield every text of the package that names a command or an option, after its file."""
    for path in SOURCES:
        place = PLACES[path]
        if place.parts[0] != "cli":
            for text in read_source(path).texts:
                if " " in text and ("--" in text or "ckpt " in text) and (_options(text) or " ckpt " in f" {text}"):
                    yield f"{place}: {text}"


def test_every_hint_is_followed() -> None:
    """Each text that names a command or an option is in a situation, or in the list of those that are not hints."""
    told = list(_told())
    parts = [*(part for situation in SITUATIONS for part in situation.hints), *NOT_FOLLOWED]
    assert [part for part in parts if not any(covers(part, text) for text in told)] == []
    assert [text for text in told if not any(covers(part, text) for part in parts)] == []


def _options(text: str) -> list[str]:
    return [name for name in _LONG.findall(text) if name not in FOREIGN]


SPELLINGS = {
    "--force replaces it": "force=True replaces it",
    "--drop 'a.*' leaves it out, or --rename 'a.*=NEW.*' gives it a name": (
        "rules=parse_rules(drop=['a.*']) leaves it out, or rules=['a.*=NEW.*'] gives it a name"
    ),
    "ckpt merge a.pt 'b c.pt' d.pt --on-unexpected add -o OUT": (
        "merge('a.pt', ['b c.pt', 'd.pt'], out, on_unexpected='add')"
    ),
    "cast it: ckpt convert BASE -o OUT --dtype F32": "cast it: convert(base, out, dtype='F32')",
    "ckpt optim prune PATH -o OUT --drop 'a' --drop 'b'": "optimizer_state.prune(state, drop=['a', 'b'])",
    "all 3 keys match after --rename 'module.*=*'": "all 3 keys match after rules=['module.*=*']",
    "--as-layer 'PATTERN=KIND' decides otherwise": "as_layer={'PATTERN': 'KIND'} decides otherwise",
    "save it with --dist-ckpt-format torch_dist": "save it with --dist-ckpt-format torch_dist",
    "if not needed: --drop 'a' --drop 'b'; or not": "if not needed: rules=parse_rules(drop=['a', 'b']); or not",
    "ckpt merge a.pt b.pt -o OUT --method extract-lora shows": "extract_lora('a.pt', 'b.pt', out) shows",
    "--ignore 'at-init:a.*' --ignore 'at-init:b' leaves": "ignore=['at-init:a.*', 'at-init:b'] leaves",
    "no option": "no option",
}


@pytest.mark.parametrize(("hint", "spelling"), SPELLINGS.items())
def test_the_spelling_of_python(hint: str, spelling: str) -> None:
    """Flags, values, rules and whole commands become arguments and calls; options of other programs stay."""
    assert hint_for_python(hint) == spelling


MESSAGES = {
    "--fresh 'fc.*' matches none of 3 keys": "fresh='fc.*' matches none of 3 keys",
    "5 of 9, below --min-coverage 0.75; the rest": "5 of 9, below min_coverage=0.75; the rest",
    "--on-mismatch 'zz.*=skip' and --rename 'a=b'": "on_mismatch={'zz.*': 'skip'} and rename='a=b'",
    "--strip auto: 'module.' from 3 keys": "strip='auto': 'module.' from 3 keys",
    "the model's key 'a --force' is \"it's --drop\"": "the model's key 'a --force' is \"it's --drop\"",
    "save it with --dist-ckpt-format torch_dist": "save it with --dist-ckpt-format torch_dist",
}


@pytest.mark.parametrize(("message", "spelling"), MESSAGES.items())
def test_messages_name_arguments_in_python(message: str, spelling: str) -> None:
    """The reason of an error, a finding and a note name arguments in Python; quoted names stay as they are."""
    assert str(CkptkitError(message)) == message_for_python(message) == spelling


NAMES = (
    "py:fixtures.lenet:build",
    "py:a.b:c(n=4)",
    "run",
    "run/",
    ".",
    "a b.pt",
    "a=b.pt",
    "w.pt::model",
    "it's.pt",
    "ü.pt",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_a_hint_is_read_to_its_end(name: str) -> None:
    """Whatever the name of the checkpoint, its command stays one command, and becomes one call in Python."""
    word = CheckpointSummary(name, "safetensors").argument
    hint = f"leave it out: ckpt remap {word} -o OUT --drop 'a', or see ckpt show {word} in full"
    assert commands_in(hint) == [["remap", name, "-o", "OUT", "--drop", "a"], ["show", name]]
    assert hint_for_command(hint, {"--keep"}, all_options()) == hint
    call = hint_for_python(hint).removeprefix("leave it out: ").partition(", or see")[0]
    parsed = ast.parse(call, mode="eval").body
    assert isinstance(parsed, ast.Call)
    assert ast.literal_eval(parsed.args[0]) == name


# Lines of files and of Python code, which ckptkit writes or asks for: the fields have the names of options.
_FIELDS = frozenset(("keep", "strip", "drop", "dtype", "groups", "optimizer"))
_FIELD_FILES = frozenset(
    ("emit.py", "rule_files.py", "parse.py", "build.py", "checks.py", "tables.py", "spec_findings.py")
)


def test_messages_name_options_on_the_command_line() -> None:
    """No message that a command prints names an argument of Python in place of the option of the same name."""
    names = "|".join(sorted(name.removeprefix("--").replace("-", "_") for name in all_options()))
    spelled = re.compile(rf"(?<![\w.\"'{{-])({names}) = ")
    for path in SOURCES:
        for text in read_source(path).texts:
            if path.parent.name == "recipes":
                continue  # a recipe has fields of these names
            found = set(spelled.findall(text)) - (
                _FIELDS if path.name in _FIELD_FILES or path.parent.name == "quantized" else set()
            )
            assert found == set(), (path, text)


def test_a_command_names_only_its_own_options() -> None:
    """A way out that the command does not have is left out; rules are shown with ckpt remap."""
    known = all_options()
    assert hint_for_command("correct it, or pass --allow-unused", {"--keep"}, known) == "correct it"
    assert hint_for_command("correct it, or pass --allow-unused", {"--allow-unused"}, known).endswith("--allow-unused")
    assert hint_for_command("write a .pt file, or drop it: --drop 'a'", set(), known) == (
        "write a .pt file, or drop it: ckpt remap PATH -o OUT --drop 'a'"
    )
    assert hint_for_command("--skip-unread leaves it out; ckpt remap A -o OUT --drop 'a'", set(), known) == (
        "ckpt remap A -o OUT --drop 'a'"
    )


def test_findings_speak_to_their_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hint of a finding has the option in the command line, and the argument where Python prints the report."""
    save(tmp_path, a={"head.weight": torch.randn(2, 6)})
    run = run_ckpt(capsys, "check", tmp_path / "a.pt", "--like", TEN)
    report = str(run_checks(tmp_path / "a.pt", like=TEN))
    assert ("no key matches; ckpt align " in run.out, "suggest_rules" in run.out) == (True, False)
    assert ("no key matches; suggest_rules(" in report, "ckpt align" in report) == (True, False)
    printed = [str(finding) for finding in run_checks(tmp_path / "a.pt", like=TEN).findings]
    assert [line for line in printed if "no key matches; suggest_rules(" in line]
    finding = preflight(build(num_classes=10), init=TEN, fresh="fc3.*").findings[0]
    assert "must stay at init by --fresh 'fc3.*'" in finding.message
    assert str(finding).startswith("error: 'fc3.weight', 'fc3.bias' must stay at init by fresh='fc3.*', but init has ")
