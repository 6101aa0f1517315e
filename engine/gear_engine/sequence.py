"""The engine's life of one request: its tokens, and which slots of the pool hold their keys and values.

All mutable state of a request lives here, and only the scheduler changes it.
"""

from dataclasses import dataclass, field

from gear_engine.protocol import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """[0 .. num_computed) is in the pool: whole pages in `pages`, the rest in the runs `open_slots`."""

    request_id: str
    token_ids: list[int]  # prompt, then what was sampled
    num_prompt: int
    params: SamplingParams
    seed: int
    order: tuple[int, int]  # (priority, arrival): the smaller runs first and is preempted last
    arrival_s: float  # time.monotonic() when the request came in
    pages: list[int] = field(default_factory=list)
    open_slots: list[int] = field(default_factory=list)
    num_computed: int = 0
    was_scheduled: bool = False

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are not in the pool: 1 while decoding."""
        return len(self.token_ids) - self.num_computed


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's share of a step: it computes [start .. start + num_new) into slots that are taken already."""

    sequence: Sequence
    start: int
    num_new: int
    samples: bool  # it computes the last known token, so that the next one can be drawn
    pages: list[int]  # of the sequence after the step: those that it fills are in here
    next_open_slots: list[int]
    spent_slots: list[int]  # runs of a page that the step seals: free once it is done
    taken_slots: list[int]  # what the step took for itself: given back if it is not to run after all


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs: decodes first, then prompt chunks."""

    scheduled: list[Scheduled]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new for item in self.scheduled)
