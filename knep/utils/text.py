"""Names and text from strangers, made fit for where they are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def shown(name: str | Path) -> str:
    """A name fit to print: line ends, terminal codes and bytes that are no text appear as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def shown_lines(text: str) -> str:
    """`shown`, where the text's own line ends stay."""
    return "\n".join(map(shown, text.split("\n")))


def console(**options: Any) -> Console:
    """A rich console that takes brackets and colons in names for what they are; options: of `rich.console.Console`."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


def shortened(name: str, most: int = 40) -> str:
    """`shown`, with the middle left out of what is longer than `most` characters."""
    text = shown(name)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2 - 3) :]}"
