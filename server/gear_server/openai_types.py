"""The bodies of requests: names, types, bounds and defaults, as OpenAI and vLLM have them.

null means the default. Fields that are unknown are kept aside (`model_extra`), fields that are known and not
supported are refused (`unsupported.py`).
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from gear_engine.protocol import MAX_LOGPROBS, RequestError
from gear_server import unsupported
from gear_server.body import Body, Flag, Int, Int32, Int64, Number, TokenIds
from gear_server.message_types import Messages, NamedTool, Tool, ToolChoice
from gear_server.structured_types import Choices, ResponseFormat, Schema, StructuredOutputs

MAX_CHOICES = 128
MAX_TOKENS = 2**31 - 1
MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_STOP_CHARS = 1024

PromptInput = str | list[str] | list[int] | list[list[int]]
Prompts = list[str] | list[list[int]]


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _to_prompts(value: Any) -> Prompts:
    """A string or a list of token ids is one prompt, a list of either is several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise RequestError(f"prompt holds {len(value)} prompts, at most {MAX_PROMPTS} fit a request", "prompt")
        if all(isinstance(prompt, str) for prompt in value) or all(map(_is_token_ids, value)):
            return value
    raise RequestError("prompt must be a string, a list of strings, token ids, or a list of lists of ids", "prompt")


def _to_stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop must be a string or a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", "stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise RequestError(f"each string in stop must have 1 to {MAX_STOP_CHARS} characters", "stop")
    return stops


def _to_logit_bias(value: Any) -> dict[int, float]:
    """JSON has only string keys: {"50256": -100}."""
    if not isinstance(value, dict):
        raise RequestError("logit_bias must be an object from token ids to numbers", "logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise RequestError(f"the keys of logit_bias must be token ids, got {key[:40]!r}", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise RequestError(f"logit_bias of token {key} must be a number", "logit_bias")
        biases[int(key)] = float(bias)
    return biases


def _false_is_none(value: Any) -> Any:
    """logprobs: false is the chat's way to ask for none."""
    return None if value is False else value


class StreamOptions(Body):
    include_usage: Flag = Field(False, description="Send one more chunk at the end, with the usage of the request.")


class SamplingBody(Body):
    """What both routes share."""

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    stream: Flag = Field(False, description="Answer with server-sent events, ended by data: [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Int = Field(1, ge=1, le=MAX_CHOICES, description="Answers for each prompt, drawn independently.")
    max_tokens: Int | None = Field(None, ge=1, le=MAX_TOKENS, description="The longest answer, in tokens.")
    temperature: Number = Field(1.0, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: Number = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens that make up this share.")
    top_k: Int = Field(0, ge=-1, le=2**31 - 1, description="Draw from that many likeliest tokens; 0 or -1: all.")
    min_p: Number = Field(0.0, ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest.")
    seed: Int64 | None = Field(None, description="The same seed draws the same answer; choice i adds i.")
    presence_penalty: Number = Field(0.0, ge=-2, le=2, description="Lowers tokens that the answer has already.")
    frequency_penalty: Number = Field(0.0, ge=-2, le=2, description="Lowers tokens each time the answer has them.")
    repetition_penalty: Number = Field(1.0, gt=0, le=100, description="Divides tokens of prompt and answer; 1 is off.")
    logit_bias: Annotated[dict[int, float], PlainValidator(_to_logit_bias, json_schema_input_type=dict[str, float])] = (
        Field({}, description="Added to the scores of tokens: token id to -100…100.")
    )
    stop: Annotated[list[str], PlainValidator(_to_stops, json_schema_input_type=str | list[str])] = Field(
        [], description=f"Up to {MAX_STOPS} texts that end the answer; it is cut before them."
    )
    stop_token_ids: TokenIds = Field([], max_length=1024, description="Tokens that end the answer.")
    include_stop_str_in_output: Flag = Field(False, description="Leave the text or token that ended it in the answer.")
    min_tokens: Int = Field(0, ge=0, le=MAX_TOKENS, description="Nothing ends the answer before that many tokens.")
    ignore_eos: Flag = Field(False, description="Go on after the model's end-of-sequence token.")
    priority: Int32 = Field(
        0, description="Lower runs first; one less is worth having arrived 1000 requests earlier, so that none starves."
    )
    cache_salt: str = Field("", max_length=1024, description="Share cached prompts only with requests of this salt.")
    skip_special_tokens: Flag = Field(True, description="Leave special tokens out of the text.")
    return_token_ids: Flag = Field(False, description="Send token ids along, of the prompt too.")
    return_tokens_as_token_ids: Flag = Field(False, description="Call tokens token_id:… in log-probabilities.")
    prompt_logprobs: Int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the prompt's tokens, with that many of the likeliest. Computes the prompt "
        "anew, without the prefix cache; not for streams.",
    )
    truncate_prompt_tokens: Int | None = Field(
        None, ge=-1, le=2**31 - 1, description="Keep that many tokens from the prompt's end; -1: as many as fit."
    )
    response_format: ResponseFormat | None = Field(None, description="JSON, or JSON of a schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="What the answer looks like, as in vLLM.")
    guided_json: Schema | None = Field(None, description="Older name of structured_outputs.json.")
    guided_regex: str | None = Field(
        None, min_length=1, max_length=65536, description="Older name of structured_outputs.regex."
    )
    guided_choice: Choices | None = Field(None, description="Older name of structured_outputs.choice.")
    guided_grammar: str | None = Field(
        None, min_length=1, max_length=262144, description="Older name of structured_outputs.grammar."
    )
    timeout: Number | None = Field(
        None, gt=0, le=86400, description='Seconds after which the answer ends as it is, with finish_reason "abort".'
    )
    user: Any = Field(None, description="Accepted and not used.")

    @model_validator(mode="after")
    def _check_together(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only for requests with stream set to true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs is not for streams: set stream to false", "prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1, got 0", "truncate_prompt_tokens")
        return self


class CompletionRequest(SamplingBody):
    UNSUPPORTED = unsupported.COMPLETIONS

    prompt: Annotated[Prompts, PlainValidator(_to_prompts, json_schema_input_type=PromptInput)] = Field(
        description="Text or token ids; several prompts are answered as several choices."
    )
    max_tokens: Int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="The longest answer, in tokens; 0 only with echo."
    )
    echo: Flag = Field(False, description="Begin each answer with its prompt.")
    logprobs: Annotated[int | None, BeforeValidator(_false_is_none)] = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        strict=True,
        description="Log-probabilities of the answer's tokens, with that many of the likeliest; with echo, of the "
        "prompt's too.",
    )
    best_of: Int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Draw that many answers and send the n likeliest, by mean token."
    )
    add_special_tokens: Flag = Field(True, description="Let the tokenizer begin the prompt as the model expects.")

    @property
    def num_drawn(self) -> int:
        """Answers that are drawn for each prompt."""
        return self.n if self.best_of is None else self.best_of

    @model_validator(mode="after")
    def _check_answers(self) -> "CompletionRequest":
        if self.num_drawn < self.n:
            raise RequestError(f"best_of must be at least n ({self.n}), got {self.best_of}", "best_of")
        if self.num_drawn > self.n and self.stream:
            raise RequestError("best_of above n is not for streams: the best is known at the end", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1 without echo, got 0", "max_tokens")
        return self


class ChatRequest(SamplingBody):
    UNSUPPORTED = unsupported.CHAT

    messages: Messages = Field(description="The conversation so far.")
    logprobs: Flag = Field(False, description="Send the log-probability of each token.")
    top_logprobs: Int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="With logprobs: also those of that many likeliest tokens."
    )
    max_completion_tokens: Int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="The newer name of max_tokens; wins over it."
    )
    tools: list[Tool] = Field([], max_length=256, description="Functions that the model may ask to call.")
    tool_choice: ToolChoice | None = Field(
        None, description="Whether it calls: as it likes (auto, the default with tools), not, or certainly."
    )
    parallel_tool_calls: Flag = Field(True, description="Whether one answer may call several times.")
    add_generation_prompt: Flag = Field(True, description="Let the template open the assistant's turn.")
    continue_final_message: Flag = Field(False, description="Go on with the last message instead of a new one.")
    add_special_tokens: Flag = Field(False, description="Templates write their special tokens themselves.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the model's chat template.")

    @property
    def forced_tools(self) -> list[Tool]:
        """Of which the answer must call one."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def offered_tools(self) -> list[Tool]:
        """That the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @model_validator(mode="after")
    def _check_tools(self) -> "ChatRequest":
        if self.tool_choice in (None, "none", "auto"):
            return self
        if not self.tools:
            raise RequestError("tool_choice is only for requests with tools", "tool_choice")
        if not self.forced_tools:
            raise RequestError("tool_choice names a function that is not among the tools", "tool_choice")
        return self

    @model_validator(mode="after")
    def _check_final_message(self) -> "ChatRequest":
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and self.model_fields_set >= {"add_generation_prompt"}
        ):
            message = "continue_final_message goes on with the last message: leave add_generation_prompt out"
            raise RequestError(message, "continue_final_message")
        return self

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is only for requests with logprobs set to true", "top_logprobs")
        return self


class TokenizeRequest(Body):
    """With `prompt` or with `messages`."""

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    prompt: str | None = Field(None, description="Text to encode.")
    messages: Messages | None = Field(None, description="A conversation to encode through the chat template.")
    add_special_tokens: Flag | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: Flag = Field(True, description="Let the template open the assistant's turn.")
    continue_final_message: Flag = Field(False, description="Leave the last message open, to be gone on with.")
    tools: list[Tool] = Field([], max_length=256, description="Functions that the model is told of.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the model's chat template.")
    return_token_strs: Flag = Field(False, description="Say each token as the vocabulary has it, too.")

    @property
    def offered_tools(self) -> list[Tool]:
        return self.tools

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", "prompt")
        return self


class DetokenizeRequest(Body):
    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    tokens: TokenIds = Field(description="Token ids to turn into text.")
