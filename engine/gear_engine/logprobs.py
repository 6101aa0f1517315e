"""Log-probabilities of tokens that were drawn or given, each with its rank and the likeliest others.

They are the model's own, before bias, penalties, temperature and grammar, as vLLM gives them. It knows logits and
tokens; it refuses to know requests.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gear_engine.protocol import TokenLogprobs

ROWS_AT_ONCE = 64  # of a prompt: bounds the float32 copies of logits


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """logits [N, V], tokens [N] -> [N, 2 + 2 * num_top] float64: log-probability, rank, then ids and values of the top.

    One tensor, so that whoever needs it on the host copies once; float64 holds every token id exactly. A row's value
    may differ in the last bit with the number of rows: it is told to the user and decides nothing.
    """
    logits = logits.float()
    norm = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(-1, tokens[:, None].clamp(min=0))  # -1: a row without a token, of which nobody reads this
    rank = (logits > own).sum(dim=-1, keepdim=True) + 1
    best = logits.topk(num_top, dim=-1)
    return torch.cat([own - norm, rank, best.indices, best.values - norm], dim=-1).double()


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Of the tokens that follow each row; logits: [N, V]."""
    told: list[TokenLogprobs] = []
    ids = torch.tensor(tokens, device=logits.device)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        told += unpack(token_logprobs(logits[part], ids[part], max(num_top[part])).tolist(), num_top[part])
    return told


def unpack(rows: Sequence[Sequence[float]], num_top: Sequence[int]) -> list[TokenLogprobs]:
    """What `token_logprobs` packed, each row with as many of the top as it asked for."""
    told = []
    for (logprob, rank, *top), num in zip(rows, num_top, strict=True):
        width = len(top) // 2
        told.append(TokenLogprobs(logprob, int(rank), [(int(top[i]), top[width + i]) for i in range(num)]))
    return told
