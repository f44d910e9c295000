"""The rules of the house: imports point down, rooms are small, heavy guests wait outside."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ckptkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckptkit"

# From the floor to the roof: a package imports only from packages below its own floor.
FLOORS = (
    {"errors"},
    {"core"},
    {"tensor_ops", "wrappers"},
    {"rules", "formats", "param_groups"},
    {"statistics", "integrations"},
    {"comparison"},
    {"align", "checks", "plans"},
    {"loading", "optimizer_state"},
    {"readiness"},
    {"render"},
    {"cli"},
    {"", "__main__"},
)
LEVEL = {package: level for level, packages in enumerate(FLOORS) for package in packages}

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


def package_of(module: str) -> str:
    """Return the top package of a module: the part of its name that has a floor."""
    return module.partition(".")[0]


def test_every_package_has_a_floor() -> None:
    """A new package is given its place."""
    assert {package_of(module) for module in FILES} == set(LEVEL)


@pytest.mark.parametrize("package", sorted(LEVEL))
def test_imports_point_down(package: str) -> None:
    """No package imports from its own floor or one above."""
    wrong = {
        (module, other)
        for module, path in FILES.items()
        if package_of(module) == package
        for other in rooms_of(imports_of(path))
        if package_of(other) != package and LEVEL[package_of(other)] >= LEVEL[package]
    }
    assert wrong == set()


def test_no_two_files_import_each_other() -> None:
    """No import, not even one inside a function, closes a circle of files."""
    graph = {module: set(rooms_of(imports_of(path))) - {module} for module, path in FILES.items()}
    # "from ckptkit.render import page" names the package too; importing a file of it is not using its door.
    below = {
        module: {other for other in others if not module.startswith(f"{other}.")} for module, others in graph.items()
    }
    graphlib.TopologicalSorter(below).prepare()


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    """A folder that holds more files than this is split by what they are for."""
    folders = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in FILES.values())
    assert {folder: number for folder, number in folders.items() if number > 16} == {}


@pytest.mark.parametrize(
    ("guest", "homes"),
    [("click", ("cli",)), ("tabulate", ("render",)), ("pickle", ()), ("mmap", ())],
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
    assert {other for other, heavy in guests.items() if heavy} <= {"core.checkpoint", "core.torch_types"}


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
