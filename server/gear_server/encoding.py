"""Prompts as token ids, and what can be refused about them before the engine is asked.

Called in threads: tokenising and templating never run on the event loop.
"""

from gear_engine.protocol import PromptTooLong, RequestError
from gear_server.chat_template import ChatTemplate
from gear_server.context import Context
from gear_server.conversation import template_messages, template_tools
from gear_server.message_types import Message
from gear_server.openai_types import ChatRequest, SamplingBody, TokenizeRequest


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
    return encode_rendered(context, body, render_chat(context, body, messages))


def render_chat(context: Context, body: ChatRequest | TokenizeRequest, messages: list[Message]) -> str:
    """The text of the prompt. Raises `RequestError`."""
    template, tools = _template(context), body.offered_tools
    text = template.render(
        template_messages(messages, tools, template),
        tools=template_tools(tools),
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
    )
    return _cut_after_final_message(text, messages[-1]) if body.continue_final_message else text


def _cut_after_final_message(text: str, message: Message) -> str:
    """Without what the template writes after the last message, so that the answer goes on with it."""
    content = message.content or ""
    for final in (content, content.strip()):  # templates may trim it
        if final.strip() and (start := text.rfind(final)) >= 0:
            return text[: start + len(final)]
    raise RequestError(
        "continue_final_message needs a last message with content that the chat template writes as it is",
        "continue_final_message",
    )


def encode_rendered(context: Context, body: ChatRequest | TokenizeRequest, text: str) -> list[int]:
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
    max_running = config.max_running or context.engine.info.max_running
    capacity = max_running + config.max_waiting
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
