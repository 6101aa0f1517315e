"""Prompts as token ids, and what can be refused about them before the engine is asked.

Called in threads: tokenising and templating never run on the event loop.
"""

from gear_engine.protocol import PromptTooLong, RequestError
from gear_server.chat_template import ChatTemplate
from gear_server.context import Context
from gear_server.openai_types import ChatRequest, Message, SamplingBody, TokenizeRequest


def encode_text(
    context: Context, text: str, param: str, *, add_special_tokens: bool, may_be_cut: bool = False
) -> list[int]:
    """Raises `PromptTooLong` at once for a text that cannot fit, however it is encoded, unless it is to be cut."""
    max_len, at_least = context.engine.info.max_model_len, context.tokenizer.min_tokens_of(text)
    if at_least > max_len and not may_be_cut:
        raise PromptTooLong(
            f"the prompt has {len(text)} characters, at least {at_least} tokens, but this model serves {max_len} "
            "(--max-model-len): shorten the prompt",
            param,
        )
    return context.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def truncated(context: Context, token_ids: list[int], body: SamplingBody, max_tokens: int | None) -> list[int]:
    """The prompt's last tokens, as many as the request wants to keep; all of them if it says nothing."""
    if body.truncate_prompt_tokens is None:
        return token_ids
    num_kept = body.truncate_prompt_tokens
    if num_kept < 0:
        num_kept = max(1, context.engine.info.max_model_len - (max_tokens or 1))
    return token_ids[-num_kept:]


def encode_chat(context: Context, body: ChatRequest | TokenizeRequest, messages: list[Message]) -> list[int]:
    text = _template(context).render(
        [message.model_dump() for message in messages],
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    return encode_text(
        context,
        text,
        "messages",
        add_special_tokens=bool(body.add_special_tokens),
        may_be_cut=isinstance(body, ChatRequest) and body.truncate_prompt_tokens is not None,
    )


def check_capacity(context: Context, num_choices: int) -> None:
    """A request that the queue could never take is the caller's mistake, not an overload that passes."""
    config = context.settings.engine_config
    capacity = config.max_running + config.max_waiting
    if num_choices > capacity:
        raise RequestError(
            f"prompts × n make {num_choices} answers, but this server holds at most {capacity} requests "
            "(--max-running, --max-waiting): split the request",
            "n",
        )


def _template(context: Context) -> ChatTemplate:
    if context.template is None:
        raise RequestError("this model has no chat template: use /v1/completions", "messages")
    return context.template
