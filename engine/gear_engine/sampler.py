"""Chooses the next token of every row of a batch, on the device, from a random stream that belongs to the row alone.
It knows logits and sampling parameters; it refuses to know requests, pages, and what ends a sequence.

A row's draw depends on its own logits, its seed and its position, bit for bit: nothing here adds floating-point numbers
up, because the order of such a sum changes with the shape of the batch. Probabilities become integers first.
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gear_engine.grammar import stacked, unpacked
from gear_engine.protocol import SamplingParams

GREEDY_BELOW = 1e-5  # a smaller temperature is greedy, as in vLLM: dividing by it would overflow
WEIGHT_ONE = 2.0**40  # the weight of the best token; a sum over 4 million tokens still fits into an int64
MAX_DRAWN = 1 << 23  # logits that are worked on at once, in integers and copies that take 48 bytes each
NUM_CANDIDATES = 256  # top_p looks at so many of the best tokens before it sorts the whole vocabulary


@dataclass(slots=True)
class SamplingRow:
    """What row i of the logits needs to be sampled. The token ids are read only when a penalty asks for them."""

    params: SamplingParams
    seed: int  # already drawn when the request names none
    position: int  # index of the output token: 0 for the first
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    is_behind: bool = False  # a further output token has been drawn, which only the device knows yet
    allowed: Tensor | None = None  # [W] int32 on the host: a bit for each token that a grammar allows next


class Sampler:
    """Parameters mean and follow what they do in vLLM: grammar, bias, penalties, temperature, min_p, top_k, top_p."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
        """As `draw`, on the host; None where no token can be chosen."""
        return [None if token < 0 else token for token in self.draw(logits, rows).tolist()]

    def draw(self, logits: Tensor, rows: Sequence[SamplingRow], pending: Tensor | None = None) -> Tensor:
        """logits: [N, V] of any float type -> [N] int64 tokens on the same device, not waited for.

        -1 where no token can be chosen (NaN, +inf, or all -inf). pending: [number of rows that are `is_behind`] int64,
        the token that each of them lacks.
        """
        assert len(rows) == logits.shape[0]
        logits = logits[:, : self.vocab_size]  # an output layer padded to a round size has columns that are no tokens
        raw, logits = logits, _adjusted(logits, rows, self.eos_token_ids, pending)
        best, tokens = logits.max(dim=-1)  # a tie goes to the lowest index
        healthy = best.isfinite()  # the maximum is NaN if any logit is, and infinite if +inf occurs or all are -inf
        if any(row.allowed is not None for row in rows):
            healthy &= raw.amax(dim=-1).isfinite()  # what a grammar forbids must not hide what is wrong
        drawn = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
        if drawn and logits.is_cuda:
            from gear_engine.gpu_draw import draw_rows  # Triton is for GPUs

            draw_rows(logits, best, tokens, on_device(_columns(drawn, rows, logits.shape[1]), logits, torch.float64))
        elif drawn:
            at_once = max(1, MAX_DRAWN // logits.shape[1])
            for part in (drawn[i : i + at_once] for i in range(0, len(drawn), at_once)):
                index = on_device(part, logits)
                tokens[index] = _draw(logits[index].float(), best[index].float(), [rows[i] for i in part])
        return tokens.where(healthy, -1)


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


@dataclass(slots=True)
class _Entries:
    """Some logits, each named by row and token, and a value for each."""

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, row: int, tokens: Collection[int], values: Collection[float]) -> None:
        self.rows += [row] * len(tokens)
        self.tokens += tokens
        self.values += values

    def where(self, like: Tensor) -> tuple[Tensor, Tensor]:
        where = on_device([self.rows, self.tokens], like)
        return where[0], where[1]

    def added_to(self, logits: Tensor) -> None:
        values = on_device(self.values, logits, logits.dtype)
        logits.index_put_(self.where(logits), values, accumulate=True)


def _adjusted(
    logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int], pending: Tensor | None
) -> Tensor:
    """A float32 copy with grammars, biases, min_tokens and penalties worked in; the logits themselves if nobody asks.

    A poisoned logit stays one, unless a grammar forbids it: NaN and +inf come out of the other lines as NaN or +inf.
    """
    allowed = stacked([row.allowed for row in rows], logits.shape[1])
    biases, seen, penalties = _Entries(), _Entries(), _Entries()
    for i, row in enumerate(rows):
        p = row.params
        biases.add(i, p.logit_bias.keys(), p.logit_bias.values())
        if row.position < p.min_tokens:
            ends = {*eos_token_ids, *p.stop_token_ids}
            biases.add(i, ends, [-math.inf] * len(ends))
        if p.repetition_penalty != 1.0:
            tokens = {*row.prompt_token_ids, *row.output_token_ids}
            seen.add(i, tokens, [p.repetition_penalty] * len(tokens))
        if p.presence_penalty != 0.0 or p.frequency_penalty != 0.0:
            counts = Counter(row.output_token_ids)
            penalties.add(i, counts.keys(), [-p.presence_penalty - p.frequency_penalty * n for n in counts.values()])
    if allowed is None and pending is None and not (biases.rows or seen.rows or penalties.rows):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if allowed is not None:
        logits.masked_fill_(~unpacked(allowed.to(logits.device), logits.shape[1]), -math.inf)
    biases.added_to(logits)
    where = seen.where(logits)
    factor = on_device(seen.values, logits, logits.dtype)
    logits[where] = torch.where(logits[where] > 0, logits[where] / factor, logits[where] * factor)
    if pending is None:
        penalties.added_to(logits)
    else:
        where, value = _penalised_pending(logits, rows, pending)
        penalties.added_to(logits)
        logits[where] = value
    return logits


def _penalised_pending(
    logits: Tensor, rows: Sequence[SamplingRow], pending: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the pending tokens' logits are, and what they would be if the tokens were known: the same bits.

    logits: with the repetition penalty of known tokens, and without the other two.
    """
    behind = [row for row in rows if row.is_behind]
    where = on_device([i for i, row in enumerate(rows) if row.is_behind], logits), pending.clamp(min=0)
    # Where nothing could be drawn the token is -1, and the request ends anyway.
    num_output = _count(where[1], [row.output_token_ids for row in behind])
    num_prompt = _count(where[1], [row.prompt_token_ids for row in behind])
    value = logits[where]
    factor = on_device([row.params.repetition_penalty for row in behind], logits, logits.dtype)
    factor = factor.masked_fill(num_output + num_prompt > 0, 1.0)
    value = torch.where(value > 0, value / factor, value * factor)
    presence, frequency = on_device(
        [[row.params.presence_penalty for row in behind], [row.params.frequency_penalty for row in behind]],
        logits,
        torch.float64,
    )
    return where, value + (-presence - frequency * (num_output + 1)).to(value.dtype)


def _count(tokens: Tensor, lists: Sequence[Sequence[int]]) -> Tensor:
    """[N] int64: how often tokens[i] is in lists[i]."""
    owner = on_device([i for i, listed in enumerate(lists) for _ in listed], tokens)
    listed = on_device([token for listed in lists for token in listed], tokens)
    return torch.zeros_like(tokens).scatter_add(0, owner, (listed == tokens[owner]).long())


def _columns(drawn: Sequence[int], rows: Sequence[SamplingRow], V: int) -> list[Sequence[float]]:
    """As `draw_rows` takes them."""
    some = [rows[i] for i in drawn]
    params = [row.params for row in some]
    return [
        drawn,
        [p.temperature for p in params],
        [abs(math.log(p.min_p)) if p.min_p > 0 else math.inf for p in params],
        _top_k(params, V),
        [p.top_p for p in params],
        [uniform(row.seed, row.position) for row in some],
    ]


def _top_k(params: Sequence[SamplingParams], V: int) -> list[int]:
    """V where it cuts nothing."""
    return [p.top_k if 0 < p.top_k < V else V for p in params]


def _draw(logits: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Tokens [N] drawn from softmax(logits / temperature), cut by min_p, top_k and top_p; logits: [N, V] float32.

    The uniform number u picks the first token at which the running sum of integer weights exceeds u times their total.
    """
    temperature = _column([row.params.temperature for row in rows], logits)
    scaled = (logits - best[:, None]) / temperature  # the best token is at 0, so nothing overflows
    weights = _weights(scaled)
    keep = scaled >= _threshold(scaled, weights, [row.params for row in rows])
    cumulative = weights.where(keep, 0).cumsum(dim=-1)
    total = cumulative[:, -1:]
    u = _column([uniform(row.seed, row.position) for row in rows], total.double())
    target = torch.minimum((u * total).long(), total - 1)  # the product may round up to the total itself
    token = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)  # a row of NaN finds nothing; `sample` reports it


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that belongs to output token `position` of the stream `seed`: 53 bits of a hash of both."""
    message = struct.pack("<QQ", seed & (2**64 - 1), position)
    return (int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 11) / 2**53


def _weights(scaled: Tensor) -> Tensor:
    """exp(scaled) as int64, 2^40 for the best token: exact for float32, so sums do not depend on their order.

    Tokens less than 2^-40 (1e-12) as likely as the best have weight 0 and are never drawn.
    """
    return (scaled.exp() * WEIGHT_ONE).long()


def _threshold(scaled: Tensor, weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[N, 1]: the smallest scaled logit that min_p, top_k and top_p leave in.

    A set is cut by value, so equal logits at its edge stay in together, as top_k does in vLLM.
    """
    lowest = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], scaled)
    V = scaled.shape[-1]
    top_k = _top_k(params, V)
    top_p = [p.top_p for p in params]
    wants_p = any(p < 1.0 for p in top_p)
    num_sorted = max([k for k in top_k if k < V] + [min(NUM_CANDIDATES, V)] * wants_p, default=0)
    if not num_sorted:
        return lowest
    best = scaled.topk(num_sorted, dim=-1).values  # [N, num_sorted], descending
    lowest = lowest.maximum(_kth(best, top_k))
    if not wants_p:
        return lowest
    total = weights.where(scaled >= lowest, 0).sum(dim=-1, keepdim=True)
    wanted = (_column(top_p, total.double()) * total).ceil().long()
    off = on_device([p >= 1.0 for p in top_p], scaled, torch.bool)
    enough, edge = _nucleus(best, lowest, wanted)
    wide = (~(enough | off)).nonzero().squeeze(-1)
    if len(wide):
        everything = scaled[wide].sort(dim=-1, descending=True).values
        edge[wide] = _nucleus(everything, lowest[wide], wanted[wide])[1]
    return lowest.maximum(edge.masked_fill(off[:, None], -math.inf))


def _kth(best: Tensor, top_k: Sequence[int]) -> Tensor:
    """[N, 1]: each row's k-th best value, and -inf where k reaches beyond what was sorted, which cuts nothing."""
    k = on_device(top_k, best)[:, None]
    value = best.gather(-1, k.clamp(max=best.shape[-1]) - 1)
    return value.masked_fill(k > best.shape[-1], -math.inf)


def _nucleus(best: Tensor, lowest: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """[N]: whether the descending `best` at or above `lowest` reach the weight `wanted`; [N, 1]: the value where.

    So the nucleus is the fewest of the best tokens that reach top_p of the weight which min_p and top_k left.
    """
    cumulative = _weights(best).where(best >= lowest, 0).cumsum(dim=-1)
    first = torch.searchsorted(cumulative, wanted)  # [N, 1]
    edge = best.gather(-1, first.clamp(max=best.shape[-1] - 1))
    return first.squeeze(-1) < best.shape[-1], edge


def on_device(values: Sequence[object], like: Tensor, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers of the host where `like` is, without waiting for the device: an ordinary copy to a GPU would."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[N, 1] of the same type and on the same device."""
    return on_device(values, like, like.dtype)[:, None]
