"""Parts of the site that are generated from the code when it is built."""

from __future__ import annotations

from typing import Any

from client.allow_list import reference_markdown as outbound_markdown
from client.policy import reference_markdown as policy_markdown
from fedgan.cli.settings import reference_markdown as settings_markdown

GENERATED = {
    "<!-- settings -->": settings_markdown,
    "<!-- outbound -->": outbound_markdown,
    "<!-- policy -->": policy_markdown,
}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Replace the mark of each generated part by its Markdown."""
    for mark, render in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, render())
    return markdown
