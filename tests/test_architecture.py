"""The arrows of docs/architecture.md, held over every import statement of the house, lazy ones too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("fedgan", "client", "server", "simulations")
GROUND = {
    "apportion",
    "comparison_folder",
    "config",
    "errors",
    "events",
    "files",
    "machine",
    "redact",
    "run_folder",
}
FOREIGN = {"flwr", "ray", "opacus", "typer", "rich", "click"}

# room → rooms that it may import (beside itself)
OUTSIDE = {
    "fedgan": set(),
    "client": {"fedgan"},
    "server": {"fedgan"},
    "simulations": {"fedgan", "server", "client"},
}
INSIDE = {
    "ground": set(),
    "models": {"ground"},
    "data": {"ground"},
    "deployment": {"ground"},
    "exchange": {"ground", "models", "data"},
    "privacy": {"ground", "models", "data"},
    "training": {"ground", "models", "data", "exchange", "privacy"},
    "evaluation": {"ground", "models", "data", "exchange", "privacy", "training"},
    "audit": {"ground", "models", "data", "exchange", "privacy", "training", "evaluation"},
    "runs": {
        "ground",
        "models",
        "data",
        "deployment",
        "exchange",
        "privacy",
        "training",
        "evaluation",
    },
    "report": {
        "ground",
        "models",
        "data",
        "exchange",
        "privacy",
        "training",
        "evaluation",
        "audit",
    },
}


def imports_of(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports: statements anywhere, and `import_module` of a literal."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (
                str(argument.value)
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant)
            )


def room_of(name: str) -> tuple[str, str]:
    """Top-level room and room inside fedgan: `fedgan.data.shard` → fedgan, data; `fedgan.files` → fedgan, ground."""
    top, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    return top, ("ground" if inner in GROUND or not inner else inner) if top == "fedgan" else ""


def offence(module: str, imported: str) -> str:
    """What is wrong with `module` importing `imported`; '' when nothing is."""
    (here, inside), (there, target) = room_of(module), room_of(imported)
    if (here, inside) == ("fedgan", "cli"):
        return ""
    if (inside, there) == ("privacy", "opacus"):
        return ""  # the accountant's, imported where it is used
    if here == "fedgan" and there in FOREIGN:
        return f"{module} imports {imported}: only fedgan/cli may"
    if there not in HOUSE:
        return ""
    if (there, target) == ("fedgan", "cli"):
        return f"{module} imports {imported}: nothing may import the command line"
    if here != there:
        return (
            ""
            if there in OUTSIDE[here] and (here, target) != ("client", "runs")
            else f"{module} imports {imported}: no arrow leads from {here} to {there}"
        )
    if here == "fedgan" and target not in INSIDE[inside] | {inside}:
        # `from fedgan import __version__` names no room
        return (
            f"{module} imports {imported}: no arrow leads from {inside} to {target}"
            if target in INSIDE
            else ""
        )
    return ""


def modules() -> list[tuple[str, Path]]:
    """Every module of the house as (dotted name, file)."""
    found = []
    for room in HOUSE:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_all_imports_follow_the_arrows() -> None:
    offences = [
        problem
        for module, path in modules()
        for imported in imports_of(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py"
        )
        if (problem := offence(module, imported))
    ]
    assert not offences, "\n".join(offences)


def test_every_room_inside_the_library_is_in_the_table() -> None:
    rooms = {
        path.name
        for path in (ROOT / "fedgan").iterdir()
        if path.is_dir() and (path / "__init__.py").is_file()
    }
    files = {path.stem for path in (ROOT / "fedgan").glob("*.py")} - {"__init__"}
    assert rooms - {"cli"} <= set(INSIDE)
    assert files <= GROUND


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedgan.training.trainer", "import flwr"),
        ("fedgan.training.trainer", "def f():\n    from flwr.app import Message"),
        ("fedgan.evaluation.metrics.utility", "import importlib\nimportlib.import_module('ray')"),
        ("fedgan.data.shard", "from fedgan.training import trainer"),
        ("fedgan.data.shard", "from ..models import generator"),
        ("fedgan.training.trainer", "from fedgan.cli import console"),
        ("fedgan.files", "from fedgan.data import shard"),
        ("fedgan.report.run.report", "from server import app"),
        ("fedgan.runs.round_state", "from server.roster import Roster"),
        ("fedgan.audit.audit", "from fedgan.runs import evaluator"),
        ("server.federation", "from simulations import runner"),
        ("server.federation", "from client import app"),
        ("client.app", "import fedgan.runs.budget"),
    ],
)
def test_the_check_finds_a_wrong_arrow(module: str, source: str) -> None:
    assert any(
        offence(module, imported) for imported in imports_of(source, module, is_package=False)
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fedgan.training.trainer",
            "from fedgan.models.stylegan2.generator import Generator\nfrom fedgan import files",
        ),
        ("fedgan.report.run.report", "from fedgan.evaluation import grids"),
        ("fedgan.data.shard", "from . import splits\nfrom fedgan import __version__"),
        ("server.federation", "import flwr\nfrom fedgan.runs.budget import make_budget"),
        ("simulations.runner", "from server import app\nfrom client import app"),
        ("fedgan.cli.runs", "import simulations.runner, rich, typer"),
    ],
)
def test_the_check_lets_a_right_arrow_pass(module: str, source: str) -> None:
    assert not [
        problem
        for imported in imports_of(source, module, is_package=False)
        if (problem := offence(module, imported))
    ]


BLOCK = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flwr", "ray", "typer", "rich", "click", "opacus"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import fedgan
for module in pkgutil.walk_packages(fedgan.__path__, "fedgan."):
    if not module.name.startswith("fedgan.cli"):
        importlib.import_module(module.name)
print("fedgan.training.trainer" in sys.modules, "fedgan.report.run.report" in sys.modules)
"""


def test_the_library_works_where_flower_and_ray_are_absent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    heavy = "torch numpy flwr ray scipy sklearn PIL rich"
    code = f"import sys, fedgan.cli; print([name for name in {heavy.split()!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
