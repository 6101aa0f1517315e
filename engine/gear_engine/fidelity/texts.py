"""The text that is compared on: the user's files, or English prose that every Python installation carries."""

from collections.abc import Callable
from pathlib import Path

MIN_PAGES = 2


class TextError(ValueError):
    """A text that cannot be used; the message names the remedy."""


def default_text() -> str:
    """The language reference as `help()` shows it: prose, tables and code, 700 kB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut(
    files: list[Path], tokenize: Callable[[str], list[int]], context: int, num_texts: int, page_size: int
) -> list[list[int]]:
    """Up to `num_texts` runs of `context` tokens, spread evenly over all there is."""
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files) if files else default_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read the text: {error}; pass UTF-8 files with --text") from error
    tokens = tokenize(text)
    if len(tokens) < MIN_PAGES * page_size:
        raise TextError(
            f"the text has {len(tokens)} tokens, and at least {MIN_PAGES * page_size} (two pages) are needed: "
            "add more with --text"
        )
    context = min(context, len(tokens))
    count = min(num_texts, len(tokens) // context)
    stride = (len(tokens) - context) // max(count - 1, 1)
    return [tokens[i * stride : i * stride + context] for i in range(count)]
