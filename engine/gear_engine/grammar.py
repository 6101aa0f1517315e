"""Which tokens a grammar allows next, as a bit mask for the sampler: llguidance, with the model's vocabulary.

It knows grammars as llguidance writes them and tokens; it refuses to know JSON schemas, which the server translates.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import llguidance
import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from gear_engine.protocol import RequestError

MAX_COMPILED = 64  # grammars kept for requests to come: clients send the same few again and again


class Grammars:
    """The vocabulary as llguidance wants it, and the grammars compiled for it. Safe to use from several threads."""

    def __init__(self, folder: Path, eos_token_ids: Sequence[int]) -> None:
        """Reads tokenizer.json. A model without a tokenizer that llguidance can use refuses grammars, not service."""
        self._unusable: str | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = llguidance.LLTokenizer(text, eos_token=list(eos_token_ids) or None)
            self.mask_words = -(-self._tokenizer.vocab_size // 32)
        except (OSError, ValueError) as error:
            self._unusable = str(error)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of an answer. Raises `RequestError`; a grammar seen for the first time may take a while."""
        if self._unusable is not None:
            raise RequestError(f"this tokenizer can follow no grammar: {self._unusable}", "structured_outputs")
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
        found = LLMatcher(self._tokenizer, grammar, log_level=0)  # outside the lock, and without the GIL
        if found.is_error():
            raise RequestError(f"the grammar cannot be used: {found.get_error()}", "structured_outputs")
        with self._lock:
            self._compiled[grammar] = found
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return found.deep_copy()

    def allowed(self, matchers: Sequence[LLMatcher]) -> Tensor:
        """[len(matchers), W] int32 on the host: bit i of word w is token 32 w + i."""
        words = np.zeros((len(matchers), self.mask_words), dtype=np.int32)
        for i, matcher in enumerate(matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, words, i)
        return torch.from_numpy(words)


def stacked(rows: Sequence[Tensor | None], vocab_size: int) -> Tensor | None:
    """[N, ceil(vocab_size / 32)] int32: the masks of all rows, where None allows everything; None if all are None.

    A mask says nothing about tokens of a padded output layer: they are not allowed.
    """
    if all(row is None for row in rows):
        return None
    words = torch.full((len(rows), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for i, row in enumerate(rows):
        if row is not None:
            width = min(len(row), words.shape[1])
            words[i, :width] = row[:width]
            words[i, width:] = 0
    return words


def unpacked(words: Tensor, vocab_size: int) -> Tensor:
    """[N, W] int32 -> [N, vocab_size] bool, on the same device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = (words.view(torch.uint8)[:, :, None] >> shifts) & 1  # bytes, lowest first: a quarter of what words take
    return bits.view(torch.bool).flatten(1)[:, :vocab_size]
