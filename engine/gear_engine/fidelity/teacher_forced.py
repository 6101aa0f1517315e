"""Teacher-forced comparison: the same real text through every cache, and how far each next-token distribution moves.

Caches run in step, a chunk at a time, so that only one chunk of the exact model's logits is held.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gear_engine.fidelity.subjects import Subject

BUCKETS = (0, 512, 1024, 2048, 4096, 8192)  # positions


@dataclass(slots=True)
class Distances:
    """Of every position of every text, in order; one entry a position."""

    position: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)  # KL(exact ‖ compressed), nats
    same_top: list[Tensor] = field(default_factory=list)
    true_logprob: list[Tensor] = field(default_factory=list)
    true_rank: list[Tensor] = field(default_factory=list)  # 0: the true next token is the likeliest

    def add(self, exact: Tensor, logits: Tensor, true_token: Tensor, position: Tensor) -> None:
        """exact, logits [T, V] float32; true_token, position [T]."""
        exact_log, log = exact.log_softmax(-1), logits.log_softmax(-1)
        kl = (exact_log.exp() * (exact_log - log)).sum(-1).clamp(min=0)
        same_top = exact.argmax(-1) == logits.argmax(-1)
        true = log.gather(1, true_token[:, None])
        true_rank = (log > true).sum(-1)
        self.position.append(position)  # all is computed first: an interrupt leaves lists of one length
        self.kl.append(kl)
        self.same_top.append(same_top)
        self.true_logprob.append(true[:, 0])
        self.true_rank.append(true_rank)

    def summary(self) -> dict[str, object]:
        """Over all positions, and by position bucket."""
        position, kl = torch.cat(self.position), torch.cat(self.kl)
        same_top, true_logprob = torch.cat(self.same_top).float(), torch.cat(self.true_logprob)
        buckets = []
        for low, high in zip(BUCKETS, (*BUCKETS[1:], 1 << 40), strict=True):
            inside = (position >= low) & (position < high)
            if bool(inside.any()):
                buckets.append(
                    {
                        "from": low,
                        "to": min(high, int(position.max()) + 1),
                        "kl_mean": float(kl[inside].mean()),
                        "top1_agreement": float(same_top[inside].mean()),
                    }
                )
        return {
            "kl_mean": float(kl.mean()),
            "kl_p99": float(kl.quantile(0.99)),
            "kl_max": float(kl.max()),
            "top1_agreement": float(same_top.mean()),
            "perplexity": math.exp(-float(true_logprob.mean())),
            "true_token_rank_mean": float(torch.cat(self.true_rank).float().mean()),
            "by_position": buckets,
        }


def compare(
    exact: Subject, others: Iterable[Subject], texts: list[list[int]], on_step: Callable[[str], None]
) -> dict[str, Distances]:
    """Distances by name, the exact model's own included. An interrupt keeps what is measured so far."""
    others = list(others)
    measured = {subject.name: Distances() for subject in [exact, *others]}
    try:
        for tokens in texts:
            runs = [subject.chunks(tokens) for subject in others]
            start = 0
            for exact_logits in exact.chunks(tokens):
                end = start + exact_logits.shape[0]
                known = min(end, len(tokens) - 1) - start  # the last token of a text has no true successor
                true_token = torch.tensor(tokens[start + 1 : start + 1 + known])
                position = torch.arange(start, start + known)
                for subject, logits in [(exact, exact_logits), *_each(others, runs, on_step)]:
                    measured[subject.name].add(exact_logits[:known], logits[:known], true_token, position)
                start = end
    except KeyboardInterrupt:
        on_step("interrupted")
    return {name: distances for name, distances in measured.items() if distances.kl}


def _each(
    others: list[Subject], runs: list[Iterator[Tensor]], on_step: Callable[[str], None]
) -> Iterator[tuple[Subject, Tensor]]:
    for subject, run in zip(others, runs, strict=True):
        on_step(subject.name)
        yield subject, next(run)
