"""What the user decides about the engine. Frozen; what is measured (the number of pages) belongs to the engine."""

import msgspec

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`None` and "auto" are resolved when the engine starts, from the model and the machine."""

    model: str | None = None  # a folder, a .gguf file, a hub name; None: the embedded default model
    device: str = "auto"  # "cpu" | "cuda" | "auto"
    dtype: str = "auto"  # "float32" | "bfloat16" | "auto": bfloat16 on a GPU; on a CPU see packed.py
    backend: str = "auto"  # "reference" | "cpu" | "auto": how pages are written and read
    preset: str = "near-lossless"
    memory: str = "auto"  # a fraction of the device memory or a size such as "8GiB"; auto: 0.9 of a GPU, 0.5 of a host
    num_pages: int | None = None  # overrides what `memory` allows
    max_model_len: int | None = None  # tokens of prompt and answer; None: what the model was trained for
    max_running: int = 64  # sequences in a batch
    max_batch_tokens: int = 512  # tokens in a step
    max_waiting: int = 1024  # requests in the queue; one more is refused
    swap_space: str = "auto"  # of host memory, a size or 0; auto: at most 4GiB and an eighth of what pages could have
    prefix_cache: bool = True  # sealed pages stay until their space is needed, for prompts that begin alike
