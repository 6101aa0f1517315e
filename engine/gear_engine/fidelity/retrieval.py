"""Retrieval: facts hidden in real text at several depths, asked for at its end, and how likely the answers still are.

All facts and all questions stand in one text, so that one prefill scores every depth, by teacher forcing.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from gear_engine.fidelity.subjects import Subject

DEPTHS = (10, 30, 50, 70, 90)  # % of the haystack before the needle
SHORTEST = 512  # tokens; then 1024, 2048, … up to the context
NUM_TEXTS = 2  # that serve as haystacks: each costs a prefill of every length for every cache
_ADJECTIVES = ("amber", "quiet", "northern", "broken", "silver", "hollow", "early", "crooked", "distant", "velvet")
_NOUNS = ("falcon", "harbor", "lantern", "orchard", "piano", "glacier", "market", "compass", "violin", "meadow")


@dataclass(frozen=True, slots=True)
class Needle:
    """A fact, and the question for it, which ends in its answer."""

    depth: int
    fact: list[int]
    question: list[int]
    answer_len: int

    @property
    def num_tokens(self) -> int:
        return len(self.fact) + len(self.question)


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens [start, end) of a haystack that answer for the needle at `depth`."""

    depth: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Haystack:
    """Text with needles, then the questions and their answers."""

    token_ids: list[int]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Score:
    """Of one answer: the mean log-probability of its tokens, and whether each was the likeliest."""

    num_tokens: int  # of the haystack
    depth: int
    logprob: float  # nats a token
    is_found: bool


@dataclass(slots=True)
class Scores:
    """What a cache scored, each answer beside the exact model's score of the same."""

    pairs: list[tuple[Score, Score]] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Over all answers, by the haystack's tokens and by depth."""
        lengths = sorted({own.num_tokens for own, _ in self.pairs})
        return {
            **_means(self.pairs),
            "by_length": [
                {"tokens": n, **_means([pair for pair in self.pairs if pair[0].num_tokens == n])} for n in lengths
            ],
            "by_depth": [
                {"depth": depth, **_means([pair for pair in self.pairs if pair[0].depth == depth])} for depth in DEPTHS
            ],
        }


def _means(pairs: list[tuple[Score, Score]]) -> dict[str, float]:
    count = len(pairs)
    return {
        "num_answers": count,
        "logprob_mean": sum(own.logprob for own, _ in pairs) / count,
        "logprob_difference": sum(own.logprob - exact.logprob for own, exact in pairs) / count,
        "found_share": sum(own.is_found for own, _ in pairs) / count,
    }


def haystacks(texts: list[list[int]], tokenize: Callable[[str], list[int]]) -> list[Haystack]:
    """The first texts as haystacks of 512, 1024 … tokens, each with needles of its own; none if they are shorter.

    tokenize: adds no token at the beginning or the end.
    """
    lengths = [SHORTEST << i for i in range(20) if SHORTEST << i <= len(texts[0])]
    found = []
    for i, text in enumerate(texts[:NUM_TEXTS]):
        for num_tokens in lengths:
            needles = _needles(tokenize, random.Random(1000 * i + num_tokens))
            if 2 * sum(needle.num_tokens for needle in needles) <= num_tokens:  # else there is no haystack to speak of
                found.append(_haystack(text, num_tokens, needles))
    return found


def _needles(tokenize: Callable[[str], list[int]], draw: random.Random) -> list[Needle]:
    """One for each depth, in an order that is not theirs."""
    count = len(DEPTHS)
    adjectives, nouns = draw.sample(_ADJECTIVES, count), draw.sample(_NOUNS, count)
    codes = draw.sample(range(10_000, 100_000), count)
    needles = []
    for depth, adjective, noun, code in zip(DEPTHS, adjectives, nouns, codes, strict=True):
        asked = f"\n\nQuestion: What is the pass code of the {adjective} {noun}?\nAnswer:"
        question, answered = tokenize(asked), tokenize(f"{asked} {code}")
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(question, answered, strict=False)))
        fact = tokenize(f"\n\nThe pass code of the {adjective} {noun} is {code}.\n\n")
        needles.append(Needle(depth, fact, answered, len(answered) - same))
    return draw.sample(needles, count)


def _haystack(text: list[int], num_tokens: int, needles: list[Needle]) -> Haystack:
    straw = text[: num_tokens - sum(needle.num_tokens for needle in needles)]
    token_ids: list[int] = []
    at = 0
    for needle in sorted(needles, key=lambda needle: needle.depth):
        until = len(straw) * needle.depth // 100
        token_ids += straw[at:until] + needle.fact
        at = until
    token_ids += straw[at:]
    answers = []
    for needle in needles:
        token_ids += needle.question
        answers.append(Answer(needle.depth, len(token_ids) - needle.answer_len, len(token_ids)))
    return Haystack(token_ids, answers)


def retrieve(
    exact: Subject, others: Iterable[Subject], stacks: list[Haystack], on_step: Callable[[str], None]
) -> Iterator[tuple[str, list[tuple[Score, Score]]]]:
    """(name, each answer's score beside the exact model's) of every haystack, the exact model's own first."""
    others = list(others)
    for stack in stacks:
        on_step(exact.name)
        expected = score(exact, stack)
        yield exact.name, list(zip(expected, expected, strict=True))
        for subject in others:
            on_step(subject.name)
            yield subject.name, list(zip(score(subject, stack), expected, strict=True))


def score(subject: Subject, stack: Haystack) -> list[Score]:
    """One for each answer, in order."""
    logprobs: list[list[float]] = [[] for _ in stack.answers]
    likeliest: list[list[bool]] = [[] for _ in stack.answers]
    first = 0
    for logits in subject.chunks(stack.token_ids):
        for i, answer in enumerate(stack.answers):
            for token in range(max(answer.start - 1, first), min(answer.end - 1, first + logits.shape[0])):
                row, true = logits[token - first], stack.token_ids[token + 1]
                logprobs[i].append(float(row.log_softmax(-1)[true]))
                likeliest[i].append(int(row.argmax()) == true)
        first += logits.shape[0]
    return [
        Score(len(stack.token_ids), answer.depth, sum(own) / len(own), all(top))
        for answer, own, top in zip(stack.answers, logprobs, likeliest, strict=True)
    ]
