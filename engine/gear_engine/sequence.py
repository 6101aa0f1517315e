"""The engine's life of one request: its tokens, and which slots of the pool hold their keys and values.

All mutable state of a request lives here, and only the scheduler changes it.
"""

from array import array
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from gear_engine.prefix_cache import Load, Move, Page, Save
from gear_engine.protocol import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True, eq=False)
class Sequence:
    """[0 .. num_computed) is in the pool: pages in `page_slots`, the rest in the runs `open_slots`."""

    request_id: str
    token_ids: list[int]  # prompt, then what was sampled
    num_prompt: int
    params: SamplingParams
    seed: int
    order: tuple[int, int]  # the scheduler's `service_order`
    arrival_s: float  # time.monotonic() when the request came in
    deadline_s: float | None = None  # time.monotonic() at which it ends as it is
    cache_salt: str = ""  # sequences share pages only with those of the same salt
    is_running: bool = False  # or else it waits
    pages: list[Page] = field(default_factory=list)  # may be shared with other sequences
    page_slots: list[int] = field(default_factory=list)  # their slots, then those of a step that is not committed yet
    open_slots: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0  # 1 while its last token is being drawn: computed with already, but not known yet
    num_swapped: int = 0  # [0 .. num_swapped) had been computed when it was swapped out; 0: it was not
    host_slots: list[int] = field(default_factory=list)  # the runs of its open page then, in host memory
    num_cached: int = 0  # prompt tokens that were in the pool when it was first scheduled
    was_scheduled: bool = False
    matcher: "LLMatcher | None" = None  # of its grammar, after the tokens that were sampled
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the tokens from the second on, if asked for
    has_ended: bool = False
    _page_tokens: list[bytes] = field(default_factory=list)

    @property
    def fresh_slots(self) -> list[int]:
        """Of pages that a step has sealed which is not committed yet. `page_slots` is replaced, never changed."""
        return self.page_slots[len(self.pages) :]

    @property
    def num_tokens(self) -> int:
        """With the one that is being drawn."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are not in the pool: 1 while decoding."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probability was asked for and is not known."""
        return 0 if self.params.prompt_logprobs is None else self.num_prompt - 1 - len(self.prompt_logprobs)

    def page_tokens(self, page_size: int) -> list[bytes]:
        """The known tokens of each full page, computed or not, as they name it in the prefix cache."""
        for start in range(len(self._page_tokens) * page_size, len(self.token_ids) - page_size + 1, page_size):
            self._page_tokens.append(array("i", self.token_ids[start : start + page_size]).tobytes())
        return self._page_tokens


class Scheduled(msgspec.Struct, eq=False, gc=False):  # 512 of them a step: a dataclass takes three times as long
    """One sequence's share of a step: it computes [start .. start + num_new) into slots that are taken already.

    Not to be changed: its lists may be the sequence's own.
    """

    sequence: Sequence
    start: int
    num_new: int
    samples: bool  # it computes the last known token, so that the next one can be drawn
    pages: list[int]  # slots of its pages after the step: those that it fills are in here
    open_slots: list[int]  # runs of its open page before the step
    next_open_slots: list[int]
    spent_slots: Many[int] = ()  # runs of a page that the step seals: free once it is done
    taken_slots: Many[int] = ()  # what the step took for itself: given back if it is not to run after all

    @property
    def scored(self) -> range:
        """Positions of the step whose logits give log-probabilities of prompt tokens that were asked for."""
        sequence = self.sequence
        if not sequence.num_unscored:
            return range(0)
        first = max(self.start, len(sequence.prompt_logprobs))
        return range(first, min(self.start + self.num_new, sequence.num_prompt - 1))


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs: decodes first, then prompt chunks; and before that, what is copied to and from the host."""

    scheduled: list[Scheduled]
    moves: list[Move | Save | Load]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new for item in self.scheduled)
