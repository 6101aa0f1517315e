"""From the fields of a body to the engine's `SamplingParams`, one for each choice.

Defaults that depend on the prompt's length are resolved here; the engine checks the rest.
"""

import msgspec

from gear_engine.protocol import SamplingParams
from gear_server.openai_types import SamplingBody


def sampling_params(
    body: SamplingBody,
    max_tokens: int,
    *,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: str = "",
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),  # -1 is off, as in vLLM
        min_p=body.min_p,
        seed=body.seed,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        stop_token_ids=tuple(body.stop_token_ids),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def for_choice(params: SamplingParams, i: int) -> SamplingParams:
    """The i-th of n choices draws with the i-th seed from the first, within 64 bits."""
    if params.seed is None or i == 0:
        return params
    return msgspec.structs.replace(params, seed=(params.seed + i + 2**63) % 2**64 - 2**63)
