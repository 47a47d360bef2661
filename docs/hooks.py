"""Parts of the site that are generated from the code when it is built."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **context: Any) -> str:
    return markdown
