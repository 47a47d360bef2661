"""Every import, also a lazy one, follows the layers of docs/explanation/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedgan", "client", "server", "simulations")
BASE_MODULES = {
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
CLI_ONLY = {"flwr", "ray", "opacus", "typer", "rich", "click"}

# layer → layers that it may import, besides itself
PACKAGE_IMPORTS = {
    "fedgan": set(),
    "client": {"fedgan"},
    "server": {"fedgan"},
    "simulations": {"fedgan", "server", "client"},
}
LAYER_IMPORTS = {
    "base": set(),
    "models": {"base"},
    "data": {"base"},
    "deployment": {"base"},
    "exchange": {"base", "models", "data"},
    "privacy": {"base", "models", "data"},
    "training": {"base", "models", "data", "exchange", "privacy"},
    "evaluation": {"base", "models", "data", "exchange", "privacy", "training"},
    "audit": {"base", "models", "data", "exchange", "privacy", "training", "evaluation"},
    "runs": {
        "base",
        "models",
        "data",
        "deployment",
        "exchange",
        "privacy",
        "training",
        "evaluation",
    },
    "report": {
        "base",
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


def layer_of(name: str) -> tuple[str, str]:
    """Package, and layer in fedgan: `fedgan.data.shard` → fedgan, data; `fedgan.files` → base."""
    top, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    return top, ("base" if inner in BASE_MODULES or not inner else inner) if top == "fedgan" else ""


def violation(module: str, imported: str) -> str:
    """Why `module` must not import `imported`; '' if it may."""
    (here, inside), (there, target) = layer_of(module), layer_of(imported)
    if (here, inside) == ("fedgan", "cli"):
        return ""
    if (inside, there) == ("privacy", "opacus"):
        return ""  # the accountant, imported where it is used
    if here == "fedgan" and there in CLI_ONLY:
        return f"{module} imports {imported}: only fedgan/cli may"
    if there not in PACKAGES:
        return ""
    if (there, target) == ("fedgan", "cli"):
        return f"{module} imports {imported}: nothing may import the command line"
    if here != there:
        return (
            ""
            if there in PACKAGE_IMPORTS[here] and (here, target) != ("client", "runs")
            else f"{module} imports {imported}: {here} must not import {there}"
        )
    if here == "fedgan" and target not in LAYER_IMPORTS[inside] | {inside}:
        # `from fedgan import __version__` names no layer
        return (
            f"{module} imports {imported}: {inside} must not import {target}"
            if target in LAYER_IMPORTS
            else ""
        )
    return ""


def modules() -> list[tuple[str, Path]]:
    """Every module as (dotted name, file)."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_all_imports_follow_the_layers() -> None:
    violations = [
        problem
        for module, path in modules()
        for imported in imports_of(
            path.read_text(encoding="utf-8"), module, path.name == "__init__.py"
        )
        if (problem := violation(module, imported))
    ]
    assert not violations, "\n".join(violations)


def test_every_layer_of_the_library_is_in_the_table() -> None:
    layers = {
        path.name
        for path in (ROOT / "fedgan").iterdir()
        if path.is_dir() and (path / "__init__.py").is_file()
    }
    files = {path.stem for path in (ROOT / "fedgan").glob("*.py")} - {"__init__"}
    assert layers - {"cli"} <= set(LAYER_IMPORTS)
    assert files <= BASE_MODULES


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
def test_import_check_finds_a_wrong_import(module: str, source: str) -> None:
    assert any(
        violation(module, imported) for imported in imports_of(source, module, is_package=False)
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
def test_import_check_accepts_an_allowed_import(module: str, source: str) -> None:
    assert not [
        problem
        for imported in imports_of(source, module, is_package=False)
        if (problem := violation(module, imported))
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


def test_library_imports_without_flower_and_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]


def test_cli_starts_without_heavy_packages() -> None:
    heavy = "torch numpy flwr ray scipy sklearn PIL rich"
    code = (
        "import sys, fedgan.cli; "
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
