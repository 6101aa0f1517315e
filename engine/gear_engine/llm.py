"""The engine for programs: `LLM(model).generate(prompts, params)`, in process, no server."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from transformers import AutoTokenizer

from gear_engine.config import EngineConfig
from gear_engine.protocol import AddRequest, EngineInfo, EngineStats, FinishReason, SamplingParams
from gear_engine.start import start_engine


@dataclass(slots=True)
class Completion:
    """What the model made of one prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str  # without special tokens
    finish_reason: FinishReason
    error: str | None = None


class LLM:
    """A model with a GEAR-compressed KV cache. Raises `EngineStartError` if it cannot be served."""

    def __init__(self, model: str | None = None, **settings: object) -> None:
        """`settings`: fields of `EngineConfig`, such as preset="balanced"; an unknown one raises."""
        config = msgspec.convert({"model": model, **settings}, EngineConfig)
        unknown = settings.keys() - set(EngineConfig.__struct_fields__)
        if unknown:
            raise TypeError(f"unknown settings {sorted(unknown)}: choose among {EngineConfig.__struct_fields__}")
        started = start_engine(config)
        self.engine = started.engine
        self.info: EngineInfo = started.info
        self.tokenizer = AutoTokenizer.from_pretrained(started.info.model_path, local_files_only=True)
        self._num_requests = 0

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Save cached pages to `cache_dir`, if there is one; nothing can be generated afterwards."""
        self.engine.close()

    def generate(
        self, prompts: Sequence[str | list[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Complete all prompts together, texts or token ids. Raises `RequestError` before anything runs."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        token_ids = [p if isinstance(p, list) else self.tokenizer(p)["input_ids"] for p in prompts]
        completions: dict[str, Completion] = {}
        try:
            for tokens, one in zip(token_ids, each, strict=True):
                self._num_requests += 1
                request_id = str(self._num_requests)
                self.engine.add(AddRequest(request_id, tokens, one))
                completions[request_id] = Completion(tokens, [], "", "abort")
            while self.engine.has_work:
                for output in self.engine.step().outputs:
                    completion = completions[output.request_id]
                    completion.token_ids += output.token_ids
                    if output.finish_reason is not None:
                        completion.finish_reason, completion.error = output.finish_reason, output.error
        except BaseException:
            for request_id in completions:
                self.engine.abort(request_id)
            raise
        for completion in completions.values():
            completion.text = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return list(completions.values())
