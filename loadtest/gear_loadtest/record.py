"""What is noted of one request: time stamps (`perf_counter`), token counts, and how it failed; the metrics derive.

Knows nothing of HTTP.
"""

from array import array
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str  # "http_429", "connect", "timeout", "disconnected", "error_event", "bad_event", "truncated", "aborted"
    message: str


@dataclass(slots=True, eq=False)
class RequestRecord:
    """`intended_at` ≤ `sent_at` ≤ chunk times ≤ `finished_at`. Latencies are valid once `failure` is None and it ended.

    Latency counts from `intended_at`: a client that sends late must not flatter the server (coordinated omission).
    The `service_` metrics count from `sent_at`.
    """

    intended_at: float
    sent_at: float = 0.0
    chunk_times: "array[float]" = field(default_factory=lambda: array("d"))  # of the chunks that held text
    finished_at: float = 0.0  # the chunk with the finish reason
    finish_reason: str | None = None
    prompt_tokens: int | None = None  # None: the server sent no usage
    completion_tokens: int | None = None
    failure: Failure | None = None
    text: list[str] | None = None  # of the answer, where it is wanted: a conversation goes on with it

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_times)

    @property
    def output_tokens(self) -> int:
        return self.num_chunks if self.completion_tokens is None else self.completion_tokens

    @property
    def late_s(self) -> float:
        """How much later than intended it was sent: the client's own doing."""
        return self.sent_at - self.intended_at

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_times[0] - self.intended_at if self.chunk_times else None

    @property
    def service_ttft_s(self) -> float | None:
        return self.chunk_times[0] - self.sent_at if self.chunk_times else None

    @property
    def itls_s(self) -> "array[float]":
        """Gaps between chunks; chunks that arrive in one piece are 0 apart."""
        return array("d", (after - before for before, after in pairwise(self.chunk_times)))

    @property
    def tpot_s(self) -> float | None:
        """(E2E − TTFT)/(tokens − 1)."""
        if not self.chunk_times or self.output_tokens < 2:
            return None
        return (self.finished_at - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.finished_at - self.intended_at

    @property
    def service_e2e_s(self) -> float:
        return self.finished_at - self.sent_at
