"""From a configuration to an engine that is ready: every "auto" is resolved here, and every refusal to start is here.

Warm-up runs one request through the whole path, so that kernels are compiled before the first user waits for them.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gear_compression.config import ConfigError, preset
from gear_compression.layout import Layout, layout_for
from gear_engine.config import EngineConfig
from gear_engine.engine import Engine, Limits
from gear_engine.grammar import Grammars
from gear_engine.model_files import Dtype, model_folder
from gear_engine.model_loader import LoadedModel, load_model
from gear_engine.page_store import CacheDirError, PageStore, weights_identity
from gear_engine.plan import MemoryPlan, parse_swap_space, plan_memory
from gear_engine.protocol import AddRequest, EngineInfo, EngineStartError, SamplingParams
from gear_engine.runner import BACKENDS, ModelRunner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator

logger = logging.getLogger(__name__)

# Beside 16 decoding sequences a CPU then computes 32 prompt tokens a step. At the beginning of a prompt that doubles
# the step; after 4000 tokens, whose pages every chunk dequantises again, it takes four times as long
# (bench/pressure.py).
CHUNK_TOKENS = 16

_DTYPES: dict[str, tuple[Dtype, torch.dtype]] = {
    "auto": ("float32", torch.float32),
    "float32": ("float32", torch.float32),
    "bfloat16": ("bfloat16", torch.bfloat16),
}


@dataclass(slots=True)
class StartedEngine:
    """A warm engine and what it says of itself."""

    engine: Engine
    info: EngineInfo


def start_engine(config: EngineConfig) -> StartedEngine:
    """Raises `EngineStartError`, one sentence that names the remedy, for whatever cannot be served."""
    backend = _checked(config)
    folder, loaded, layout, plan, grammars = _planned(config)
    try:
        runner = ModelRunner(loaded, layout, plan.num_pages, backend, plan.num_host_pages)
    except RuntimeError as error:  # torch cannot get the slab from the system
        raise EngineStartError(
            f"cannot allocate {plan.pages_bytes:,} bytes of pages and {plan.swap_bytes:,} to swap them out to: "
            "lower --memory or --swap-space"
        ) from error
    _warm_up(_engine(config, loaded, layout, plan, runner, grammars))
    store = _page_store(config, folder, layout)
    engine = _engine(config, loaded, layout, plan, runner, grammars, store)
    return StartedEngine(engine, _info(config, folder, loaded, layout, plan, backend, _DTYPES[config.dtype][0]))


def planned_memory(config: EngineConfig) -> MemoryPlan:
    """What `start_engine` would take, without taking the pages."""
    _checked(config)
    return _planned(config)[3]


def _planned(config: EngineConfig) -> tuple[Path, LoadedModel, Layout, MemoryPlan, Grammars]:
    dtype_name, dtype = _DTYPES[config.dtype]
    folder = model_folder(config.model, dtype_name)
    runtime_bytes = psutil.Process().memory_info().rss
    loaded = load_model(folder, "cpu", dtype)
    before_bytes = psutil.Process().memory_info().rss
    grammars = Grammars(folder, loaded.eos_token_ids)  # now: it takes a second or more, and stops every other thread
    runtime_bytes += max(0, psutil.Process().memory_info().rss - before_bytes)
    layout = model_layout(config.preset, loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, dtype)
    plan = plan_memory(
        loaded.config,
        layout,
        runtime_bytes=runtime_bytes,
        weights_bytes=loaded.weights_bytes,
        max_position=loaded.max_position,
        memory=config.memory,
        num_pages=config.num_pages,
        max_model_len=config.max_model_len,
        max_running=config.max_running,
        max_batch_tokens=config.max_batch_tokens,
        swap_space=config.swap_space,
    )
    return folder, loaded, layout, plan, grammars


def _checked(config: EngineConfig) -> str:
    """The backend to use, if the settings make sense together."""
    if config.device not in ("auto", "cpu"):
        raise EngineStartError(
            f"--device {config.device} is not served by this version, which runs on the CPU: use --device cpu"
        )
    if config.dtype not in _DTYPES:
        raise EngineStartError(f"--dtype {config.dtype!r} is unknown: choose one of {', '.join(_DTYPES)}")
    backend = "cpu" if config.backend == "auto" else config.backend
    if backend not in BACKENDS:
        raise EngineStartError(f"--backend {config.backend!r} is unknown: choose one of auto, {', '.join(BACKENDS)}")
    for name in ("max_running", "max_batch_tokens", "max_waiting", "num_pages", "max_model_len"):
        value = getattr(config, name)
        if value is not None and value < (0 if name == "max_waiting" else 1):
            raise EngineStartError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if config.max_batch_tokens < config.max_running:
        raise EngineStartError(
            f"--max-batch-tokens {config.max_batch_tokens} must be at least --max-running {config.max_running}: "
            "a step computes one token of every running sequence"
        )
    if config.cache_dir is not None:
        _cache_dir_bytes(config)
        if not config.prefix_cache:
            raise EngineStartError("--cache-dir keeps cached prefixes: leave out --no-prefix-cache")
    return backend


def model_layout(preset_name: str, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Layout:
    """The page layout of a preset for a model's shape."""
    try:
        return layout_for(preset(preset_name), num_layers, num_kv_heads, head_dim, dtype.itemsize)
    except ConfigError as error:
        raise EngineStartError(f"--preset {preset_name}: {error}") from error


def _page_store(config: EngineConfig, folder: Path, layout: Layout) -> PageStore | None:
    if config.cache_dir is None:
        return None
    identity = weights_identity(folder, layout, config.dtype)
    try:
        return PageStore(Path(config.cache_dir), _cache_dir_bytes(config), identity, layout.page_bytes)
    except CacheDirError as error:
        raise EngineStartError(str(error)) from error


def _cache_dir_bytes(config: EngineConfig) -> int:
    try:
        num_bytes = parse_swap_space(config.cache_dir_space, 0)
    except EngineStartError:
        num_bytes = 0
    if num_bytes <= 0:
        raise EngineStartError(f"--cache-dir-space {config.cache_dir_space!r} is not a size such as 8GiB")
    return num_bytes


def _engine(
    config: EngineConfig,
    loaded: LoadedModel,
    layout: Layout,
    plan: MemoryPlan,
    runner: ModelRunner,
    grammars: Grammars,
    store: PageStore | None = None,
) -> Engine:
    scheduler = Scheduler(
        SlotAllocator(plan.num_pages),
        layout,
        max_running=config.max_running,
        max_batch_tokens=config.max_batch_tokens,
        eos_token_ids=loaded.eos_token_ids,
        prefix_cache=config.prefix_cache,
        num_host_slots=plan.num_host_pages,
        store=store,
        chunk_tokens=CHUNK_TOKENS,
    )
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids)
    return Engine(scheduler, runner, sampler, Limits(plan.max_model_len, loaded.vocab_size), grammars)


def _warm_up(engine: Engine) -> None:
    """Fill a page, attend past it, and decode: every kernel runs once."""
    max_len = engine.limits.max_model_len
    max_tokens = min(3, max_len - 1)
    if max_tokens < 1:
        return  # a sequence of one token can only be refused
    num_prompt = min(engine.scheduler.layout.page_size + 2, max_len - max_tokens)
    tokens = [token % engine.limits.vocab_size for token in range(1, num_prompt + 1)]
    engine.add(AddRequest("warm-up", tokens, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)))
    while engine.has_work:
        engine.step()


def _info(
    config: EngineConfig, folder: Path, loaded: LoadedModel, layout: Layout, plan: MemoryPlan, backend: str, dtype: str
) -> EngineInfo:
    return EngineInfo(
        model_path=str(folder),
        max_model_len=plan.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=list(loaded.eos_token_ids),
        preset=config.preset,
        backend=backend,
        device="cpu",
        dtype=dtype,
        num_layers=loaded.num_layers,
        num_pages=plan.num_pages,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        bf16_token_bytes=layout.token_bytes,
        kv_compression_ratio=layout.compression_ratio,
        memory=plan.rows(),
        memory_table=plan.table(config.preset),
    )
