"""The rules of the architecture: imports point down, folders are small, and torch is imported only where needed."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ckptkit

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckptkit"

# From the lowest level to the highest: a package imports only from packages on lower levels.
LEVELS = (
    {"lazy_patterns"},
    {"errors"},
    {"core"},
    {"values"},
    {"quantized", "tensor_ops", "wrappers"},
    {"adapters"},
    {"rules", "formats"},
    {"inputs"},
    {"tasks"},
    {"statistics", "param_groups", "digests"},
    {"comparison", "integrations"},
    {"align", "checks", "plans"},
    {"deltas", "loading", "optimizer_state"},
    {"readiness"},
    {"render"},
    {"cli", "testing"},
    {"", "__main__"},
)
LEVEL_OF = {package: level for level, packages in enumerate(LEVELS) for package in packages}

HEAVY_LIBRARIES = {"torch", "numpy", "ml_dtypes"}


def module_name(path: Path) -> str:
    """Return the dotted name of a module inside the package; the name of the package itself is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    return frozenset(found)


MODULES = {f"ckptkit.{module}" if module else "ckptkit" for module in FILES}


def own_modules(names: Iterable[str]) -> list[str]:
    """Return those of the imported names that are modules of ckptkit, as ``module_name`` gives them."""
    return [name.removeprefix("ckptkit").removeprefix(".") for name in names if name in MODULES]


def package_of(module: str) -> str:
    """Return the top package of a module, which has a level."""
    return module.partition(".")[0]


def test_every_package_has_a_level() -> None:
    """A new package is listed in ``LEVELS``."""
    assert {package_of(module) for module in FILES} == set(LEVEL_OF)


@pytest.mark.parametrize("package", sorted(LEVEL_OF))
def test_imports_point_down(package: str) -> None:
    """No package imports another package on its own level or above."""
    wrong = {
        (module, other)
        for module, path in FILES.items()
        if package_of(module) == package
        for other in own_modules(imports_of(path))
        if package_of(other) != package and LEVEL_OF[package_of(other)] >= LEVEL_OF[package]
    }
    assert wrong == set()


def test_no_two_files_import_each_other() -> None:
    """No import closes a circle of files, not even an import inside a function."""
    graph = {module: set(own_modules(imports_of(path))) - {module} for module, path in FILES.items()}
    # "from ckptkit.render import page" also names the package; a file may import a sibling without its __init__.
    below = {
        module: {other for other in others if not module.startswith(f"{other}.")} for module, others in graph.items()
    }
    graphlib.TopologicalSorter(below).prepare()


def test_folders_are_small() -> None:
    """A folder has at most 16 files; a larger folder is split by purpose."""
    folders = Counter(path.parent.relative_to(PACKAGE).as_posix() for path in FILES.values())
    assert {folder: number for folder, number in folders.items() if number > 16} == {}


@pytest.mark.parametrize(
    ("library", "packages"),
    [
        ("click", ("cli",)),
        ("tabulate", ("render",)),
        ("jinja2", ("render",)),
        ("pickle", ()),
        ("mmap", ()),
        ("fsspec", ("core.files.remote", "formats.writing")),
        ("ray", ("tasks.ray",)),
    ],
    ids=["click", "tabulate", "jinja2", "pickle", "mmap", "fsspec", "ray"],
)
def test_libraries_are_imported_only_in_their_package(library: str, packages: tuple[str, ...]) -> None:
    """Only the command line imports click, only reports import tabulate and jinja2, and nothing imports pickle or mmap.

    fsspec is for URLs only, so that a command on local files does not wait for it, and ray for its executor only.
    """
    users = [name for name, path in FILES.items() if library in {top.partition(".")[0] for top in imports_of(path)}]
    assert [name for name in users if not name.startswith(packages or ("none",))] == []


LIVE = "formats.live"  # and what is in it


def reached_from(module: str) -> set[str]:
    """Return every module that a module imports, directly or through others, anywhere in them."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current not in reached and not current.startswith(LIVE):  # a live model needs torch anyway
            reached.add(current)
            waiting += own_modules(imports_of(FILES[current]))
    return reached


@pytest.mark.parametrize(
    "module", sorted(name for name in FILES if name.startswith("formats") and not name.startswith(LIVE))
)
def test_no_reader_reaches_torch(module: str) -> None:
    """All bytes of a file can be read without torch and numpy; only ``Checkpoint`` and ``Workers.buffer`` make them."""
    users = {
        other: HEAVY_LIBRARIES & {name.partition(".")[0] for name in imports_of(FILES[other])}
        for other in reached_from(module)
    }
    makers = {
        "core.checkpoint",
        "core.checkpoint.reading",
        "core.checkpoint.state_dict",
        "core.torch_types",
        "values.workers",
    }
    assert {other for other, heavy in users.items() if heavy} <= makers


# The code of a live model, and the cache of the Hugging Face libraries, are always on this machine.
LOCAL_READERS = {LIVE, "formats.hub"}
SYSTEM = {"path", "stat", "lstat", "scandir", "listdir", "open", "walk", "access"}


def test_readers_never_ask_the_system() -> None:
    """A reader asks a folder and a file through the two protocols of ``core.files.source``, so it reads stores too."""
    readers = (
        "formats",
        "core",
        "quantized",
        "rules",
        "wrappers",
        "values",
        "checks",
        "digests",
        "comparison",
        "inputs",
    )
    wrong = {
        (name, node.attr)
        for name, path in FILES.items()
        if package_of(name) in readers and not name.startswith(("core.files", "formats.writing", *LOCAL_READERS))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "os" and node.attr in SYSTEM
    }
    assert wrong == set()


def test_public_names_are_sorted_and_real() -> None:
    """Every name in ``__all__`` exists, is listed by ``dir``, and the list is in order."""
    assert sorted(ckptkit.__all__) == list(ckptkit.__all__)
    assert [name for name in ckptkit.__all__ if not hasattr(ckptkit, name)] == []
    assert set(ckptkit.__all__) <= set(dir(ckptkit))


# Importing __main__ runs the program, and importing an integration imports its library.
@pytest.mark.parametrize(
    "name", sorted(FILES.keys() - {"__main__", "integrations.transformers", "integrations.lightning"})
)
def test_every_all_is_real(name: str) -> None:
    """Every name in the ``__all__`` of a module exists; the linter keeps each list sorted."""
    module = import_module(f"ckptkit.{name}" if name else "ckptkit")
    assert [public for public in getattr(module, "__all__", []) if not hasattr(module, public)] == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_called_safe(module: str) -> None:
    """No text that the program could print says that a file is harmless, because that cannot be known."""
    nodes = ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if re.search(r"\bsafe\b", text, re.IGNORECASE)] == []


LIGHT_COMMANDS = {
    "import": "import ckptkit",
    "import integrations": "import ckptkit.integrations, ckptkit.testing",
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
    "digest": "main(['digest', 'fixtures/lenet_ddp.pt'])",
    "git textconv": "main(['git', 'textconv', 'fixtures/lenet_ddp.pt'])",
    "show digests": "main(['show', 'fixtures/lenet_ddp.pt', '--digests'])",
    "digest check": "main(['digest', '--check', OUT + '/ten.digest', 'fixtures/lenet_10class.pth'])",
    "remap": "main(['remap', 'fixtures/encoder_sharded', '-o', OUT + '/a.safetensors', '--rename', '*=x.*'])",
    "remap to torch": "main(['remap', 'fixtures/lenet_ddp.pt', '-o', OUT + '/a.pt', '--rename', 'module.*=*'])",
    "convert": "main(['convert', 'fixtures/lenet_10class.pth', '-o', OUT + '/b.safetensors'])",
    "convert views": "main(['convert', OUT + '/views.pt', '-o', OUT + '/d.safetensors'])",
    "optim show": "main(['optim', 'show', 'fixtures/lenet_ddp.pt'])",
    "optim remap": "main(['optim', 'remap', 'fixtures/lenet_ddp.pt', '-o', OUT + '/o.pt', '--rename', 'module.*=*'])",
    "merge methods": "main(['merge', '--help-methods'])",
    "merge dry run": "main(['merge', 'fixtures/lenet_10class.pth', 'fixtures/lenet_tuned.safetensors', '-o',"
    " OUT + '/m.pt', '--method', 'average', '--dry-run'])",
    "merge": "main(['merge', 'fixtures/lenet_10class.pth', 'fixtures/lenet_10class.safetensors', '-o', OUT + '/c.pt'])",
}


def test_light_commands_import_no_heavy_library(tmp_path: Path) -> None:
    """Listing, comparing, renaming and converting bytes import neither torch nor numpy."""
    views = {"w": torch.arange(6.0).view(2, 3).T, "c": torch.ones(2, dtype=torch.complex64).conj()}
    torch.save(views, tmp_path / "views.pt")
    (tmp_path / "ten.digest").write_text(f"{ckptkit.digest('fixtures/lenet_10class.safetensors')}\n", encoding="ascii")
    # What one of them imports is there for all that follow, so one process is enough.
    program = f"OUT = {str(tmp_path)!r}\nimport sys\nfrom ckptkit.cli import main\n"
    for name, code in LIGHT_COMMANDS.items():
        program += (
            f"{code}\nprint('\\nHEAVY', {name!r}, sorted({HEAVY_LIBRARIES!r} & set(sys.modules)), file=sys.stderr)\n"
        )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = [line for line in done.stderr.splitlines() if line.startswith("HEAVY ")]
    assert heavy == [f"HEAVY {name} []" for name in LIGHT_COMMANDS]


NUMPY_COMMANDS = {
    "check": "main(['check', 'fixtures/lenet_10class.safetensors', 'fixtures/lenet_ddp.pt'])",
    "stats": "main(['stats', 'fixtures/lenet_10class.pth'])",
    "diff": "main(['diff', 'fixtures/lenet_10class.pth', 'fixtures/lenet_ddp.pt', '--strip', 'auto', '--values'])",
    "delta": "main(['delta', 'fixtures/lenet_10class.pth', 'fixtures/lenet_tuned.safetensors', '--dry-run'])",
}


@pytest.mark.parametrize("code", NUMPY_COMMANDS.values(), ids=NUMPY_COMMANDS.keys())
def test_values_of_files_need_no_torch(code: str) -> None:
    """Commands that judge the values of files import numpy, but not torch, which takes a second."""
    program = f"import sys\nfrom ckptkit.cli import main\n{code}\nprint('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "False"


# The packages that a command must not load, because it calls nothing in them.
UNUSED_PACKAGES = {
    "help": (
        "main(['--help'])",
        {
            "core.checkpoint",
            "core.files.local",
            "core.findings",
            "core.patterns",
            "formats",
            "render",
            "rules",
            "wrappers",
        },
    ),
    "show": (
        "main(['show', 'fixtures/lenet_10class.safetensors'])",
        {"core.coverage", "core.patterns", "formats.writing", "plans", "render.page.width", "rules", "statistics"},
    ),
    "diff": (
        "main(['diff', 'fixtures/lenet_10class.safetensors', 'fixtures/lenet_ddp.pt', '--rename', 'module.*=*'])",
        {"param_groups", "plans", "statistics", "tensor_ops"},
    ),
    "convert": (
        "main(['convert', 'fixtures/lenet_10class.pth', '-o', OUT + '/shards', '--max-shard-size', '100kB'])",
        {
            "comparison",
            "formats.distributed.dcp",
            "formats.distributed.zero",
            "formats.torch.write",
            "param_groups",
            "tensor_ops",
        },
    ),
    "groups validate": (
        "main(['groups', 'validate', '--model', 'py:fixtures.lenet:build', 'fixtures/groups.toml'])",
        {"comparison", "loading", "optimizer_state", "plans", "rules", "tensor_ops", "wrappers.explain"},
    ),
}


@pytest.mark.parametrize(("code", "unused"), UNUSED_PACKAGES.values(), ids=UNUSED_PACKAGES.keys())
def test_light_commands_load_no_heavy_package(code: str, unused: set[str], tmp_path: Path) -> None:
    """A command loads only the modules that it runs."""
    program = f"OUT = {str(tmp_path)!r}\nimport sys\nfrom ckptkit.cli import main\n{code}\nprint(file=sys.stderr)\n"
    program += "print('LOADED', *sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stderr.splitlines()[-1].split()
    names = tuple(f"ckptkit.{package}" for package in unused)
    assert [name for name in loaded if name in names or name.startswith(tuple(f"{name}." for name in names))] == []
