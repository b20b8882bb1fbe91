"""Names and text from strangers, made fit for where they are shown."""

from __future__ import annotations

from pathlib import Path


def shown(name: str | Path) -> str:
    """A name fit to print: line ends, terminal codes and bytes that are no text appear as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def shortened(name: str, most: int = 40) -> str:
    """`shown`, with the middle left out of what is longer than `most` characters."""
    text = shown(name)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2 - 3) :]}"
