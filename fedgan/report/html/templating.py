"""HTML templates of the reports. Every value is escaped, because names come from users."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedgan.report.html import format as text


def render(template: str, **context: Any) -> Markup:
    """Render `templates/<template>`; an undefined variable is an error."""
    return Markup(_environment().get_template(template).render(**context))


def read_template(template: str) -> str:
    """Read a file of `templates/` without rendering it."""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), template)[0]


def absent(sentence: str) -> Markup:
    """A paragraph that says which figures are missing."""
    return Markup('<p class="absent">{}</p>').format(sentence)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedgan.report.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        whole=text.whole,
        decimal=text.decimal,
        interval=text.interval,
        duration=text.duration,
        bytes=text.size,
        signed=text.signed,
    )
    return environment
