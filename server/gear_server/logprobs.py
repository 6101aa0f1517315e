"""Log-probabilities in the shapes that OpenAI and vLLM give them: for completions, for chats and for prompts.

Knows tokens as text; what was asked for is known to whoever asked the engine.
"""

from collections.abc import Sequence
from typing import Any

from gear_engine.protocol import TokenLogprobs
from gear_server.tokenizer import TextTokenizer

LOWEST = -9999.0  # JSON has no infinity; OpenAI and vLLM write this for a token that cannot be


class TokenNames:
    """What a token is called in a response: its text, or its id if the request wants ids."""

    def __init__(self, tokenizer: TextTokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self.text(token_id)

    def text(self, token_id: int) -> str:
        return self.bytes(token_id).decode("utf-8", "replace")

    def bytes(self, token_id: int) -> bytes:
        return self._tokenizer.bytes_of(token_id)


class CompletionLogprobs:
    """OpenAI's four parallel lists of one choice; offsets go on from one piece to the next."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], told: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        """Of an echoed prompt, whose first token follows nothing: null."""
        return self._lists(token_ids, [None, *told])

    def piece(self, token_ids: Sequence[int], told: Sequence[TokenLogprobs]) -> dict[str, list[Any]]:
        return self._lists(token_ids, told)

    def _lists(self, token_ids: Sequence[int], told: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        tokens = [self._names.name(token_id) for token_id in token_ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if one is None else finite(one.logprob) for one in told],
            "top_logprobs": [
                None if one is None else self._top(token_id, one) for token_id, one in zip(token_ids, told, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest and the token itself. Of several tokens with one text the likeliest is told."""
        top: dict[str, float] = {}
        for other, logprob in [*one.top, (token_id, one.logprob)]:
            top.setdefault(self._names.name(other), finite(logprob))
        return top


def joined(pieces: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for piece in pieces for value in piece[name]] for name in pieces[0]}


def chat_logprobs(names: TokenNames, token_ids: Sequence[int], told: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": finite(logprob),
            "bytes": list(names.bytes(token_id)),
        }

    content = [
        entry(token_id, one.logprob) | {"top_logprobs": [entry(other, logprob) for other, logprob in one.top]}
        for token_id, one in zip(token_ids, told, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    names: TokenNames, token_ids: Sequence[int], told: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """vLLM's: for each token of the prompt an object from token ids to what is known of them; null for the first."""
    entries: list[dict[str, Any] | None] = [None]
    for token_id, one in zip(token_ids[1:], told, strict=True):
        ranked = [(token_id, one.logprob, one.rank), *((other, lp, i) for i, (other, lp) in enumerate(one.top, 1))]
        entry: dict[str, Any] = {}
        for other, logprob, rank in ranked:
            text = names.text(other)
            entry.setdefault(str(other), {"logprob": finite(logprob), "rank": rank, "decoded_token": text})
        entries.append(entry)
    return entries


def cut(told: Sequence[TokenLogprobs], num_top: int) -> list[TokenLogprobs]:
    """With as many of the likeliest as one of two askers wants."""
    return [TokenLogprobs(one.logprob, one.rank, one.top[:num_top]) for one in told]


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)
