"""What the user decides about the engine. Frozen; what is measured (the number of pages) belongs to the engine."""

import msgspec

from gear_engine.log_format import LogFormat

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`None` and "auto" are resolved when the engine starts, from the model and the machine."""

    model: str | None = None  # a folder, a .gguf file, a hub name; None: the embedded default model
    device: str = "auto"  # "cpu" | "cuda" | "auto"
    dtype: str = "auto"  # "float32" | "bfloat16" | "auto": bfloat16 on a GPU; on a CPU see packed.py
    quantization: str = "none"  # "none" | "fp8": 8-bit weights made at load, on a GPU; see quantized.py
    backend: str = "auto"  # "reference" | "cpu" | "cuda" | "auto": how pages are written and read
    preset: str = "near-lossless"
    memory: str = "auto"  # a fraction of the device memory or a size such as "8GiB"; auto: 0.9 of a GPU, 0.5 of a host
    num_pages: int | None = None  # overrides what `memory` allows
    max_model_len: int | None = None  # tokens of prompt and answer; None: what the model was trained for
    max_running: int | None = None  # sequences in a batch; None: 64 on a CPU, 256 on a GPU
    max_batch_tokens: int | None = None  # tokens in a step; None: 512 on a CPU, 2048 on a GPU
    eager: bool = False  # on a GPU: nothing compiled, no CUDA graphs
    max_waiting: int = 1024  # requests in the queue; one more is refused
    swap_space: str = "auto"  # of host memory, a size or 0; auto: at most 4GiB and an eighth of what pages could have
    cache_dir: str | None = None  # where pages go that memory has no room for; None: nowhere
    cache_dir_space: str = "8GiB"  # a size
    prefix_cache: bool = True  # sealed pages stay until their space is needed, for prompts that begin alike
    log_format: LogFormat = "text"  # of the engine process
