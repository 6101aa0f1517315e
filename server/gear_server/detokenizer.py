"""Token ids to text, one token at a time: never half a character, and the pieces join to the whole text.

Knows decoders, not requests. Special tokens and ids outside the vocabulary have no text.
"""

import codecs
from collections.abc import Callable, Set
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    def feed(self, token_id: int) -> str:
        """The text that is certain now."""
        ...

    def flush(self) -> str:
        """What was held back, when no token will follow."""
        ...


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: every byte as one printable character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, worked out when first asked for."""

    def __init__(self, tokenizer: Tokenizer, special_ids: Set[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special_ids = special_ids

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._special_ids else self._tokenizer.id_to_token(token_id)
        if token is None:
            piece = b""
        elif all(char in _BYTE_OF_CHAR for char in token):
            piece = bytes(_BYTE_OF_CHAR[char] for char in token)
        else:
            piece = token.encode()  # an added token, written as it is
        self[token_id] = piece
        return piece


class ByteLevelDetokenizer:
    """For byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM): join bytes, decode UTF-8 as they come."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


MAX_HELD = 8  # tokens; a character has at most 4 bytes, so a longer wait is for garbage
MAX_WINDOW = 32  # tokens decoded again for each new one


class WindowDetokenizer:
    """For every other decoder: decode the last few tokens with and without the new one; the difference is its text.

    The window keeps decoders honest that treat a first token differently (Metaspace strips its space). It is
        ids = [context, whose text was given | held, whose text is not certain yet]
    """

    def __init__(self, decode: Callable[[list[int]], str], has_text: Callable[[int], bool]) -> None:
        self._decode = decode
        self._has_text = has_text
        self._ids: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def feed(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._num_context < MAX_HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        return self._give(self._decode(self._ids)) if self._ids else ""

    def _give(self, text: str) -> str:
        """Return what is new in `text` and let the tokens behind it be the next context."""
        new = text[len(self._context_text) :]
        given = self._ids[self._num_context :] if len(self._ids) < MAX_WINDOW else self._ids[-MAX_HELD:]
        given_text = self._decode(given)
        if given_text:
            self._ids, self._context_text = given, given_text
        else:  # a context without text would make the next token look like the first
            self._context_text = text
        self._num_context = len(self._ids)
        return new
