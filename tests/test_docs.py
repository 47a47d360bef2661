"""README and docs: links resolve, and the commands that they show would start."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

from fedgan.config import load_scenario
from fedgan.runs.compatibility import check_compatibility

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\bfedgan (?:simulate|compare|doctor) [^`#\n]*")
SHIPPED = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "simulations").glob("*.toml")
}


def commands() -> list[str]:
    """`fedgan simulate`, `compare` and `doctor` lines that name a shipped scenario."""
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in PAGES)
    found = dict.fromkeys(match.strip() for match in COMMAND.findall(text))
    return [command for command in found if any(word in SHIPPED for word in command.split())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    links = [
        link.partition("#")[0]
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in link
    ]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("command", commands())
def test_shown_command_has_valid_settings(command: str) -> None:
    words = shlex.split(command)
    overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
    for scenario in SHIPPED.keys() & set(words):
        check_compatibility(load_scenario(SHIPPED[scenario], overrides))


def test_pages_show_each_kind_of_command() -> None:
    assert {command.split()[1] for command in commands()} == {"simulate", "compare", "doctor"}


def test_lines_have_at_most_100_characters() -> None:
    files = [
        *PAGES,
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
        *(ROOT / "simulations").glob("*.toml"),
    ]
    files += [*ROOT.glob("*.yml"), *(ROOT / "client").glob("*.yml")]
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100 and "](" not in line
    ]
    assert long == []


def test_every_test_named_by_a_claim_exists() -> None:
    pages = [ROOT / "docs/explanation" / name for name in ("security.md", "privacy.md")]
    named = {name for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text())}
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 30
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
