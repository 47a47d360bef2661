"""The page's templates. Every value is escaped: names come from users."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedgan.report.html import format as text


def render(template: str, **context: Any) -> Markup:
    """Fill `templates/<template>`; an unknown name in a template is an error, not an empty place."""
    return Markup(_environment().get_template(template).render(**context))


def read_template(template: str) -> str:
    """Read a file of `templates/` without rendering it."""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), template)[0]


def absent(sentence: str) -> Markup:
    """A paragraph that says what is not there yet."""
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
