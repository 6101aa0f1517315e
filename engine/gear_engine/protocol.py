"""The messages that cross between the engine and whoever asks it for tokens: integers and short texts only.

This file knows no torch and no sockets, so that the HTTP server can import it at no cost.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20  # the likeliest tokens that may be asked for, as with OpenAI


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen and when a request ends. Values are checked by `validate`."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    min_p: float = 0.0
    seed: int | None = None  # None: the engine draws one
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # no end-of-sequence or stop token before that many
    ignore_eos: bool = False
    logprobs: int | None = None  # tell each token's log-probability, and that many of the likeliest; None: nothing
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, the first excepted; finds no cached pages
    grammar: str = ""  # of the answer, as llguidance writes it; "": anything


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs first, as in vLLM; each is worth 1000 arrivals, so that none starves
    cache_salt: str = ""  # cached pages are found only by requests of the same salt
    timeout_s: float | None = None  # after that it ends as it is, with finish_reason "abort"; counted by the engine


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    pass


ToEngine = AddRequest | AbortRequest | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token's log-probability and rank (1 is the likeliest), and the likeliest tokens with theirs, best first."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """What one step added to one request. `finish_reason` is set in its last output and only there."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the end-of-sequence or stop token that ended it; also last in token_ids
    error: str | None = None  # with finish_reason "error": one sentence
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when the request began
    logprobs: list[TokenLogprobs] | None = None  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt from its second token on; with the first token


class MemoryRow(msgspec.Struct, frozen=True):
    """One line of the memory table: what it is, and how many bytes."""

    kind: str
    num_bytes: int


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """Sent once, when the engine is ready."""

    model_path: str  # the folder that holds tokenizer.json and the chat template
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    preset: str
    backend: str
    device: str
    dtype: str
    num_layers: int
    num_pages: int
    page_size: int  # tokens
    page_bytes: int
    bf16_token_bytes: int  # K and V of one token in bf16, all layers
    kv_compression_ratio: float  # bf16 bytes of a token ÷ its bytes in a sealed page, metadata included
    memory: list[MemoryRow]
    memory_table: str  # the same as text, with the tokens that fit, ready to print
    max_running: int = 64  # sequences in a batch


class StartFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start: one sentence that names the remedy."""

    message: str


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State after a step (gauges) and totals since start (counters, `num_*_total`)."""

    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    pages_free: int = 0
    pages_active: int = 0
    pages_cached: int = 0
    kv_tokens: int = 0  # tokens that running sequences have in the pool; those that they share count once
    kv_sealed_bytes: int = 0
    kv_open_bytes: int = 0
    kv_swapped_bytes: int = 0
    kv_peak_bytes: int = 0  # high-water mark of sealed + open
    peak_memory_bytes: int = 0  # allocator's peak on a GPU, peak RSS of the engine process on a CPU
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0  # of the prompt tokens, found in the prefix cache
    generation_tokens_total: int = 0
    prefix_hits_total: int = 0  # requests that began with cached pages
    swaps_out_total: int = 0
    swaps_in_total: int = 0
    preemptions_total: int = 0
    cache_dir_bytes: int = 0
    cache_dir_saved_total: int = 0  # pages
    cache_dir_read_total: int = 0


class PageError(msgspec.Struct, frozen=True):
    """Relative error of a sampled sealed page: ‖X − X̂‖ / ‖X‖ of one layer's keys or values."""

    layer: int
    part: Literal["keys", "values"]
    ratio: float


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """Everything one engine step has to say, in one message."""

    outputs: list[RequestOutput]
    stats: EngineStats
    step_s: float | None  # None: nothing was computed, only requests ended
    batch_tokens: int
    queue_times_s: dict[str, float]  # of the requests that were scheduled for the first time in this step, by id
    page_errors: list[PageError] = []


FromEngine = EngineInfo | StartFailed | StepReport


class RequestError(ValueError):
    """The caller's fault: the message names the parameter and the remedy. `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """Prompt plus answer exceed what one sequence may hold."""


class EngineStartError(RuntimeError):
    """The engine could not start; the message names the remedy."""


class EngineDead(RuntimeError):
    """The engine process ended; requests in flight are lost."""


class QueueFull(RuntimeError):
    """Expected contention: too many requests wait already; try again after `retry_after_s`."""

    def __init__(self, num_waiting: int, retry_after_s: int = 1) -> None:
        super().__init__(f"{num_waiting} requests are waiting already (--max-waiting); try again later")
        self.retry_after_s = retry_after_s


_BOUNDS: list[tuple[str, float, float]] = [
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
]


def validate(
    token_ids: list[int], params: SamplingParams, timeout_s: float | None, *, max_model_len: int, vocab_size: int
) -> None:
    """Raise `RequestError` for anything the engine could not run as asked."""
    if timeout_s is not None and not timeout_s > 0:  # also refuses NaN
        raise RequestError(f"timeout must be above 0 seconds, got {timeout_s:g}: leave it out for none", "timeout")
    if not token_ids:
        raise RequestError("the prompt is empty: send at least one token", "prompt")
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"token id {token} is outside the vocabulary (0 to {vocab_size - 1})", "prompt")
    if params.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, got {params.max_tokens}", "max_tokens")
    if len(token_ids) + params.max_tokens > max_model_len:
        raise PromptTooLong(
            f"the prompt has {len(token_ids)} tokens and max_tokens is {params.max_tokens}, together "
            f"{len(token_ids) + params.max_tokens}, but this model serves {max_model_len} (--max-model-len): "
            "shorten the prompt or lower max_tokens",
            "max_tokens" if len(token_ids) < max_model_len else "prompt",
        )
    for name, low, high in _BOUNDS:
        value = getattr(params, name)
        if not low <= value <= high:  # also refuses NaN
            raise RequestError(f"{name} must be between {low:g} and {high:g}, got {value}", name)
    if params.top_p == 0.0:
        raise RequestError("top_p must be above 0, got 0.0", "top_p")
    if params.repetition_penalty == 0.0:
        raise RequestError("repetition_penalty must be above 0, got 0.0", "repetition_penalty")
    if not 0 <= params.top_k < 1 << 31:
        raise RequestError(f"top_k must be 0 (off) or positive and below 2**31, got {params.top_k}", "top_k")
    if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
        raise RequestError(f"seed must fit into 64 bits, got {params.seed}", "seed")
    if not 0 <= params.min_tokens <= params.max_tokens:
        raise RequestError(
            f"min_tokens must be between 0 and max_tokens ({params.max_tokens}), got {params.min_tokens}", "min_tokens"
        )
    if params.grammar:
        for name in ("min_tokens", "ignore_eos"):
            if getattr(params, name):
                raise RequestError(f"{name} contradicts structured output, whose end the grammar decides", name)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise RequestError(f"{name} must be between 0 and {MAX_LOGPROBS}, got {count}", name)
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"logit_bias names token {token}, outside the vocabulary (0 to {vocab_size - 1})", "logit_bias"
            )
        if not -100.0 <= bias <= 100.0:
            raise RequestError(f"logit_bias of token {token} must be between -100 and 100, got {bias}", "logit_bias")
    for token in params.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"stop token id {token} is outside the vocabulary (0 to {vocab_size - 1})", "stop_token_ids"
            )
