"""The rules of the house: imports point down, rooms are small, heavy guests wait outside."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ckptkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckptkit"

# From the floor to the roof; a module may import only from a floor below its own.
FLOORS = (
    {"collector", "errors", "text"},
    {"tensors", "findings", "tables"},
    {"keys", "sharing", "storage", "coverage", "optimizer_schemas"},
    {"wrappers.envelopes", "wrappers.optimizers", "wrappers.table"},
    {"wrappers.explain"},
    {"wrappers", "torch_bridge", "shards", "prefixes"},
    {"values.numbers", "values.bench"},
    {"values.accumulator"},
    {"values"},
    {"tensor_ops.expressions", "tensor_ops.operation"},
    {"tensor_ops.parameters"},
    {
        "tensor_ops.moving",
        "tensor_ops.joining",
        "tensor_ops.qkv",
        "tensor_ops.arithmetic",
        "tensor_ops.folding",
        "tensor_ops.low_rank",
    },
    {"tensor_ops.resizing", "tensor_ops.lora"},
    {"tensor_ops.chains", "tensor_ops.fits"},
    {"tensor_ops"},
    {"recipes"},
    {"rules.model", "rules.variables"},
    {"rules.strip", "rules.parse"},
    {"rules.apply"},
    {"rules", "formats.foreign"},
    {"presets"},
    {"align.spellings", "align.contents", "align.presets"},
    {"align.modules"},
    {"align.fits"},
    {"align.pairing"},
    {"align.matching", "align.writing"},
    {"align.rule_file"},
    {"align"},
    {
        "formats.inert",
        "formats.code_names",
        "formats.safetensors",
        "formats.zip_directory",
        "formats.strided",
        "formats.file_pool",
        "formats.recognise",
        "formats.gguf_header",
        "formats.torch_export_meta",
        "formats.npy_header",
    },
    {
        "formats.pickle_machine",
        "formats.torch_objects",
        "formats.blocks",
        "formats.gguf",
        "formats.torch_export",
        "formats.numpy_arrays",
    },
    {"formats.unpickle", "formats.naming"},
    {"formats.tree"},
    {"formats.modules", "formats.pickle_nodes"},
    {
        "formats.torch_checkpoint",
        "formats.dcp_metadata",
        "formats.dcp_safetensors",
        "formats.zero_states",
        "formats.zero_vectors",
    },
    {"formats.torch_zip", "formats.torch_legacy", "formats.sharded", "formats.live"},
    {"formats.torchscript", "formats.torch_tar"},
    {"formats.dcp", "formats.zip_files"},
    {"formats.files"},
    {"formats.adapter", "formats.beside", "formats.zero"},
    {"formats.directories"},
    {"formats", "compare", "measuring", "plan", "writers", "checks.structure", "checks.adapters", "checks.judging"},
    {"checks.reading", "checks.expected", "checks.numbers", "checks.buffers", "checks.fresh"},
    {"checks.copies"},
    {"checks.told"},
    {"checks"},
    {"optimizer_state.model"},
    {"optimizer_state.reading", "optimizer_state.slots"},
    {"optimizer_state.forms", "optimizer_state.health"},
    {"pickle_edits"},
    {"steps", "making", "snapshot", "destination", "writers.atomic", "writers.torch_pickle", "writers.pickle_nodes"},
    {"remapping", "merging", "plan_files", "keeping"},
    {"inversion", "adapters"},
    {"writers.safetensors", "writers.torch_zip"},
    {
        "param_groups.suggest",
        "param_groups.inventory",
        "param_groups.layers",
        "param_groups.plain",
        "param_groups.naming",
    },
    {"param_groups.roles"},
    {"param_groups.facts"},
    {"param_groups.conditions"},
    {"param_groups.spec"},
    {"param_groups.reading", "param_groups.resolve"},
    {"param_groups.owners", "param_groups.presets.layering", "param_groups.presets.widths"},
    {"param_groups.presets.from_model"},
    {"param_groups.presets"},
    {"param_groups.diagnosis"},
    {
        "param_groups.members",
        "param_groups.plan",
        "param_groups.ranges",
        "param_groups.renames",
        "param_groups.hidden",
    },
    {
        "param_groups.options",
        "param_groups.build",
        "param_groups.writing",
        "param_groups.holders",
        "param_groups.reasons",
        "param_groups.records",
        "param_groups.structure",
    },
    {"param_groups.strangers"},
    {"param_groups.membership"},
    {
        "param_groups.demands",
        "param_groups.spread",
        "param_groups.state",
        "param_groups.state_values",
        "param_groups.lock",
    },
    {"param_groups.schedulers", "param_groups.drift", "param_groups.explain"},
    {"param_groups.agreement"},
    {"param_groups.validate"},
    {"param_groups.refit", "param_groups.rebind_schedulers", "param_groups.succession"},
    {"param_groups.gate", "param_groups.rebind"},
    {"param_groups"},
    {"bars"},
    {"integrations.gate"},
    {"integrations.transformers", "integrations.lightning"},
    {"integrations"},
    {"optimizer_state.shapes"},
    {"optimizer_state.inference", "optimizer_state.grouping", "optimizer_state.fitting"},
    {"optimizer_state.naming", "optimizer_state.remap", "optimizer_state.prune", "optimizer_state.comparing"},
    {"optimizer_state.loading"},
    {"execution", "verification", "load", "report", "report.page", "report.table"},
    {"optimizer_state.nodes"},
    {"optimizer_state.writing"},
    {"optimizer_state"},
    {"readiness.facts", "readiness.fresh"},
    {"readiness.init", "readiness.memory", "readiness.dtypes", "readiness.training", "readiness.dry_step"},
    {"readiness.resume"},
    {"readiness"},
    {"report.rates"},
    {"report.findings", "report.groups", "report.explain", "report.lock"},
    {"report.show", "report.plan", "report.preflight"},
    {"report.diff", "report.align", "report.stats", "report.optim"},
    {"cli.streams"},
    {"cli.options"},
    {"cli.outputs", "cli.rules", "cli.groups.model"},
    {"cli.groups.source"},
    {
        "cli.groups.emit",
        "cli.groups.table",
        "cli.groups.validate",
        "cli.groups.explain",
        "cli.groups.lock",
        "cli.groups.diff",
    },
    {
        "cli.show",
        "cli.diff",
        "cli.merge",
        "cli.remap",
        "cli.convert",
        "cli.groups",
        "cli.check",
        "cli.align",
        "cli.preflight",
        "cli.stats",
        "cli.optim",
    },
    {"cli"},
    {""},
    {"__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# The command line finds its commands by name, so that each is imported only when it is used.
HEAVY = {"torch", "numpy"}


def room_of(path: Path) -> str:
    """Return the dotted name of a module below the package; the package itself is the empty name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {room_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return found


MODULES = {f"ckptkit.{room}" if room else "ckptkit" for room in FILES}


def rooms_of(names: set[str]) -> list[str]:
    """Return the rooms among the names of modules."""
    return [name.removeprefix("ckptkit").removeprefix(".") for name in names if name in MODULES]


def test_every_room_has_a_floor() -> None:
    """A new module is given its place in the house."""
    assert set(FILES) == set(LEVEL)


@pytest.mark.parametrize("room", sorted(FILES))
def test_imports_point_down(room: str) -> None:
    """No module imports from its own floor or one above."""
    rooms = rooms_of(imports_of(FILES[room]))
    # "from ckptkit.report import table" names the package too; a package door imports nothing upward.
    wrong = [
        other for other in rooms if other != room and LEVEL[other] >= LEVEL[room] and other != room.rpartition(".")[0]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(FILES))
def test_no_file_is_over_400_lines(room: str) -> None:
    """A room that outgrows this wants a wall."""
    assert len(FILES[room].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    ("guest", "homes"),
    [("click", ("cli",)), ("tabulate", ("report",)), ("pickle", ()), ("mmap", ())],
    ids=["click", "tabulate", "pickle", "mmap"],
)
def test_guests_stay_in_their_rooms(guest: str, homes: tuple[str, ...]) -> None:
    """click is for the command line, tabulate for reports; pickle and mmap are for nobody."""
    users = [room for room, path in FILES.items() if guest in {name.partition(".")[0] for name in imports_of(path)}]
    assert [room for room in users if not room.startswith(homes or ("none",))] == []


def reached_from(room: str) -> set[str]:
    """Return every room that a room imports, at once or later, itself or through others."""
    reached: set[str] = set()
    waiting = [room]
    while waiting:
        current = waiting.pop()
        if current not in reached and current != "formats.live":  # a live model is torch's own
            reached.add(current)
            waiting += rooms_of(imports_of(FILES[current]))
    return reached


@pytest.mark.parametrize(
    "room", sorted(room for room in FILES if room.startswith("formats") and room != "formats.live")
)
def test_no_reader_reaches_torch(room: str) -> None:
    """A file is read without torch and numpy, to its last byte; only ``Checkpoint.read`` makes a tensor of it."""
    guests = {
        other: HEAVY & {name.partition(".")[0] for name in imports_of(FILES[other])} for other in reached_from(room)
    }
    assert {other for other, heavy in guests.items() if heavy} <= {"tensors"}


def test_public_names_are_sorted_and_real() -> None:
    """Every name in ``__all__`` exists, is listed by ``dir``, and the list is in order."""
    assert sorted(ckptkit.__all__) == list(ckptkit.__all__)
    assert [name for name in ckptkit.__all__ if not hasattr(ckptkit, name)] == []
    assert set(ckptkit.__all__) <= set(dir(ckptkit))


# Importing the first runs the program, and importing the others imports the libraries that they are for.
@pytest.mark.parametrize(
    "room", sorted(FILES.keys() - {"__main__", "integrations.transformers", "integrations.lightning"})
)
def test_every_all_is_real(room: str) -> None:
    """What a module says it offers is there; the linter keeps each list in order."""
    module = import_module(f"ckptkit.{room}" if room else "ckptkit")
    assert [name for name in getattr(module, "__all__", []) if not hasattr(module, name)] == []


@pytest.mark.parametrize("room", sorted(FILES))
def test_nothing_is_called_safe(room: str) -> None:
    """No text that the program could print promises that a file is harmless: nobody can know that."""
    nodes = ast.walk(ast.parse(FILES[room].read_text(encoding="utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if re.search(r"\bsafe\b", text, re.IGNORECASE)] == []


LIGHT_COMMANDS = {
    "import": "import ckptkit",
    "import integrations": "import ckptkit.integrations",
    "every public name": "import ckptkit; [getattr(ckptkit, name) for name in ckptkit.__all__]",
    "help": "main(['--help'])",
    "show safetensors": "main(['show', 'fixtures/lenet_10class.safetensors'])",
    "show torch zip": "main(['show', 'fixtures/lenet_ddp.pt'])",
    "show torch legacy": "main(['show', 'fixtures/lenet_10class.pth'])",
    "show shards": "main(['show', 'fixtures/encoder_sharded'])",
    "check torch zip": "[main(['check', option, 'fixtures/lenet_ddp.pt']) for option in ('--no-values', '--fast')]",
    "check others": "main(['check', '--no-values', 'fixtures/lenet_10class.pth', 'fixtures/encoder_sharded'])",
    "diff": "main(['diff', 'fixtures/lenet_10class.safetensors', 'fixtures/lenet_ddp.pt'])",
    "align": "main(['align', 'fixtures/lenet_10class.safetensors', 'fixtures/lenet_ddp.pt', '--digests'])",
    "remap": "main(['remap', 'fixtures/encoder_sharded', '-o', OUT + '/a.safetensors', '--rename', '*=x.*'])",
    "remap to torch": "main(['remap', 'fixtures/lenet_ddp.pt', '-o', OUT + '/a.pt', '--rename', 'module.*=*'])",
    "convert": "main(['convert', 'fixtures/lenet_10class.pth', '-o', OUT + '/b.safetensors'])",
    "convert views": "main(['convert', OUT + '/views.pt', '-o', OUT + '/d.safetensors'])",
    "optim show": "main(['optim', 'show', 'fixtures/lenet_ddp.pt'])",
    "optim remap": "main(['optim', 'remap', 'fixtures/lenet_ddp.pt', '-o', OUT + '/o.pt', '--rename', 'module.*=*'])",
    "merge": "main(['merge', 'fixtures/lenet_10class.pth', 'fixtures/lenet_10class.safetensors', '-o', OUT + '/c.pt'])",
}


@pytest.mark.parametrize("code", LIGHT_COMMANDS.values(), ids=LIGHT_COMMANDS.keys())
def test_heavy_guests_wait_outside(code: str, tmp_path: Path) -> None:
    """Neither torch nor numpy is imported to list, compare, rename or convert bytes."""
    views = {"w": torch.arange(6.0).view(2, 3).T, "c": torch.ones(2, dtype=torch.complex64).conj()}
    torch.save(views, tmp_path / "views.pt")
    program = f"OUT = {str(tmp_path)!r}\nimport sys\nfrom ckptkit.cli import main\n{code}\nprint(file=sys.stderr)\n"
    program += f"print('HEAVY', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "HEAVY []"
