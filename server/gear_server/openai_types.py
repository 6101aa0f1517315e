"""The bodies of requests: names, types, bounds and defaults, as OpenAI and vLLM have them.

null means the default. Fields that are unknown are kept aside (`model_extra`), fields that are known and not
supported are refused (`unsupported.py`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from gear_engine.protocol import RequestError
from gear_server import unsupported

Int = Annotated[int, Field(strict=True)]  # no "5", no true, no 5.0
Int32 = Annotated[Int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[Int, Field(ge=-(2**63), le=2**63 - 1)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
TokenIds = Annotated[list[Int], Field(fail_fast=True)]

MAX_CHOICES = 128
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


def _to_text(value: Any) -> str:
    """Message content: text, or parts of type text, which are joined by line breaks as in vLLM."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"parts of type {kind[:40]!r} are not supported yet, only text")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError('each part must look like {"type": "text", "text": "…"}')
        texts.append(part["text"])
    return "\n".join(texts)


class _Body(BaseModel):
    """Drops nulls, refuses what is not supported, keeps what is unknown."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    UNSUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unsupported.refuse_unsupported(value, cls.UNSUPPORTED)
        return {name: field for name, field in value.items() if field is not None}


class StreamOptions(_Body):
    include_usage: Flag = Field(False, description="Send one more chunk at the end, with the usage of the request.")


class SamplingBody(_Body):
    """What both routes share."""

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    stream: Flag = Field(False, description="Answer with server-sent events, ended by data: [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    n: Int = Field(1, ge=1, le=MAX_CHOICES, description="Answers for each prompt, drawn independently.")
    max_tokens: Int | None = Field(None, ge=1, description="The longest answer, in tokens.")
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
    min_tokens: Int = Field(0, ge=0, description="Nothing ends the answer before that many tokens.")
    ignore_eos: Flag = Field(False, description="Go on after the model's end-of-sequence token.")
    priority: Int32 = Field(
        0, description="Lower runs first; one less is worth having arrived 1000 requests earlier, so that none starves."
    )
    cache_salt: str = Field("", max_length=1024, description="Share cached prompts only with requests of this salt.")
    timeout: Number | None = Field(
        None, gt=0, description='Seconds after which the answer ends as it is, with finish_reason "abort".'
    )
    user: Any = Field(None, description="Accepted and not used.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> "SamplingBody":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only for requests with stream set to true", "stream_options")
        return self


class CompletionRequest(SamplingBody):
    UNSUPPORTED = unsupported.COMPLETIONS

    prompt: Annotated[Prompts, PlainValidator(_to_prompts, json_schema_input_type=PromptInput)] = Field(
        description="Text or token ids; several prompts are answered as several choices."
    )
    echo: Flag = Field(False, description="Begin each answer with its prompt.")
    best_of: Int | None = Field(None, ge=1, le=MAX_CHOICES, description="Only the value of n is supported yet.")
    add_special_tokens: Flag = Field(True, description="Let the tokenizer begin the prompt as the model expects.")

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of other than n is not supported yet: leave it out", "best_of")
        return self


class Message(_Body):
    UNSUPPORTED = unsupported.MESSAGE

    role: str = Field(min_length=1, max_length=64, description="system, user, assistant, or what the template knows.")
    content: Annotated[str, BeforeValidator(_to_text, json_schema_input_type=str | list[dict[str, str]])] = Field(
        description="Text, or a list of parts of type text."
    )


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class ChatRequest(SamplingBody):
    UNSUPPORTED = unsupported.CHAT

    messages: Messages = Field(description="The conversation so far.")
    max_completion_tokens: Int | None = Field(None, ge=1, description="The newer name of max_tokens; wins over it.")
    add_generation_prompt: Flag = Field(True, description="Let the template open the assistant's turn.")
    add_special_tokens: Flag = Field(False, description="Templates write their special tokens themselves.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the model's chat template.")


class TokenizeRequest(_Body):
    """With `prompt` or with `messages`."""

    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    prompt: str | None = Field(None, description="Text to encode.")
    messages: Messages | None = Field(None, description="A conversation to encode through the chat template.")
    add_special_tokens: Flag | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: Flag = Field(True, description="Let the template open the assistant's turn.")
    chat_template_kwargs: dict[str, Any] = Field({}, description="More variables for the model's chat template.")

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either prompt or messages", "prompt")
        return self


class DetokenizeRequest(_Body):
    model: str | None = Field(None, description="A served model; left out, it is the only one.")
    tokens: TokenIds = Field(description="Token ids to turn into text.")
