"""Free-running comparison: greedy texts of fixed prompts, and how long a cache writes what the exact model writes.

A single near-tie turns a text into another one, just as good: read these figures beside those of the bf16 model.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator

from gear_engine.fidelity.prompts import PROMPTS
from gear_engine.fidelity.subjects import Subject
from gear_engine.fidelity.texts import TextError

SHARES_AT = (64, 256, 1024)  # new tokens
MAX_PERIOD = 128  # tokens of a loop
MIN_REPEATS = 3
MIN_LOOP_TOKENS = 32  # a short phrase said three times is no collapse yet


def prompt_tokens(tokenize: Callable[[str], list[int]], num_new: int, max_position: int) -> list[list[int]]:
    """The fixed prompts; none if no new tokens are asked for. Raises TextError where they do not fit the model."""
    prompts = [tokenize(prompt) for prompt in PROMPTS] if num_new else []
    longest = max(map(len, prompts), default=0)
    if longest + num_new > max_position:
        raise TextError(
            f"a prompt of {longest} tokens and --new-tokens {num_new} are more than the {max_position} tokens of this "
            f"model: lower --new-tokens to {max(0, max_position - longest)}"
        )
    return prompts


def free_run(
    exact: Subject, others: Iterable[Subject], prompts: list[list[int]], num_new: int, on_step: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, object]]]:
    """Summaries by name, the exact model's own first, each as soon as it is known."""
    on_step(exact.name)
    expected = exact.generate(prompts, num_new)
    yield exact.name, summary(expected, expected, num_new)
    for subject in others:
        on_step(subject.name)
        yield subject.name, summary(expected, subject.generate(prompts, num_new), num_new)


def summary(expected: list[list[int]], texts: list[list[int]], num_new: int) -> dict[str, object]:
    """`texts` beside the exact model's, text by text.

    A text that never parts counts as parting where it ends. `identical_share` at n: of the exact model's first n
    tokens, position by position; a token that a text no longer has is another one.
    """
    parts_at = [first_divergence(a, b) for a, b in zip(expected, texts, strict=True)]
    lengths = [len(a) if at is None else at for a, at in zip(expected, parts_at, strict=True)]
    loops, exact_loops = (sum(loop_period(text) is not None for text in some) for some in (texts, expected))
    return {
        "num_prompts": len(texts),
        "new_tokens": num_new,
        "num_never_diverged": parts_at.count(None),
        "first_divergence": parts_at,
        "first_divergence_median": statistics.median(lengths),
        "first_divergence_mean": statistics.mean(lengths),
        "identical_share": [
            {"tokens": n, "share": identical_share(expected, texts, n)}
            for n in [*(n for n in SHARES_AT if n < num_new), num_new]
        ],
        "num_loops": loops,
        "excess_loops": loops - exact_loops,
    }


def first_divergence(expected: list[int], text: list[int]) -> int | None:
    """Tokens that both begin with; None if they are the same to the end."""
    if expected == text:
        return None
    same = (a == b for a, b in zip(expected, text, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(expected), len(text)))


def identical_share(expected: list[list[int]], texts: list[list[int]], num_tokens: int) -> float:
    """Of the first tokens of all texts together, those that are the same at the same position."""
    pairs = [(a[:num_tokens], b[:num_tokens]) for a, b in zip(expected, texts, strict=True)]
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return same / sum(len(a) for a, _ in pairs)


def loop_period(text: list[int]) -> int | None:
    """The shortest period in which a text repeats itself to its end, or None: at least 3 times and for 32 tokens."""
    for period in range(1, MAX_PERIOD + 1):
        num_tokens = max(MIN_REPEATS * period, MIN_LOOP_TOKENS)
        if num_tokens > len(text):
            return None
        tail = text[-num_tokens:]
        if tail[period:] == tail[:-period]:
            return period
    return None
