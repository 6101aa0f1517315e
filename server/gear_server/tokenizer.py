"""Text to token ids and back, from the tokenizer.json of the served model.

Knows the files beside the weights; whether a token may be generated is the engine's business.
"""

import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from gear_server.detokenizer import ByteLevelDetokenizer, Detokenizer, TokenBytes, WindowDetokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(RuntimeError):
    """The model's tokenizer cannot be used; the message names the remedy."""


class TextTokenizer:
    """Safe to use from several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder)
        self._tokenizer = _load(folder)
        self._tokenizer.no_truncation()  # a prompt is refused, never cut in silence
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._vocab_ids = frozenset(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._max_token_len = max((len(token) for token in self._tokenizer.get_vocab()), default=1)
        self._byte_level = self._is_byte_level()
        self._token_bytes: dict[Set[int], TokenBytes] = {}  # by the ids that have no text
        self.special_tokens = self._read_special_tokens()
        self._missing_bos_id = self._find_missing_bos()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # In a batch of one, because that lets go of the interpreter: `encode` would stop every stream until it is done.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._missing_bos_id is not None and ids[:1] != [self._missing_bos_id]:
            return [self._missing_bos_id, *ids]
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def detokenizer(self, *, skip_special_tokens: bool = True, keep: Set[int] = frozenset()) -> Detokenizer:
        """A fresh one for one answer; special tokens in `keep` have their text in any case."""
        hidden = self._special_ids - keep if skip_special_tokens else frozenset()
        if self._byte_level:
            return ByteLevelDetokenizer(self._bytes_without(hidden))
        return WindowDetokenizer(
            lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False),
            lambda token_id: token_id in self._vocab_ids and token_id not in hidden,
        )

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for by itself, special ones included; nothing for an id that no token has."""
        if self._byte_level:
            return self._bytes_without(frozenset())[token_id]
        piece = self._tokenizer.id_to_token(token_id) or ""
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written exactly so; None if there is none."""
        token_id: int | None = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def _bytes_without(self, hidden: Set[int]) -> TokenBytes:
        found = self._token_bytes.get(hidden)
        if found is None:
            found = self._token_bytes[hidden] = TokenBytes(self._tokenizer, hidden)
        return found

    def text_of(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of an answer, the same as if it had been streamed."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

    def token_text(self, token_id: int) -> str | None:
        """As the vocabulary has it: for people, not to be joined."""
        return self._tokenizer.id_to_token(token_id)

    def has_token(self, token_id: int) -> bool:
        return token_id in self._vocab_ids

    def min_tokens_of(self, text: str) -> int:
        """At least that many tokens are in `text`: known without encoding it, so a huge prompt costs nothing."""
        return len(text) // self._max_token_len

    def _is_byte_level(self) -> bool:
        decoder = self._tokenizer.decoder
        if decoder is None:
            return False
        state = orjson.loads(decoder.__getstate__())
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        return [step["type"] for step in steps] == ["ByteLevel"]

    def _read_special_tokens(self) -> dict[str, str]:
        """bos_token and its like for the chat template; in the file they are strings or objects with `content`."""
        found: dict[str, str] = {}
        for name in _SPECIAL_NAMES:
            value = self.config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
        return found

    def _find_missing_bos(self) -> int | None:
        """Some models ask for a first token (`add_bos_token`) that their tokenizer.json does not add."""
        bos = self.special_tokens.get("bos_token")
        if not self.config.get("add_bos_token") or bos is None:
            return None
        return self._tokenizer.token_to_id(bos)


def _load(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(f"{folder} has no tokenizer.json: serve a model that comes with a fast tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}
