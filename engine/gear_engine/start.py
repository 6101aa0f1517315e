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
from gear_engine.model_files import Dtype, model_folder
from gear_engine.model_loader import LoadedModel, load_model, weights_bytes
from gear_engine.packed import Products, can_pack, fastest_products, pack_linears
from gear_engine.plan import MemoryPlan, plan_memory
from gear_engine.protocol import AddRequest, EngineInfo, EngineStartError, SamplingParams
from gear_engine.runner import BACKENDS, ModelRunner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator

logger = logging.getLogger(__name__)

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
    folder, loaded, layout, plan, products = _planned(config, backend)
    try:
        runner = ModelRunner(loaded, layout, plan.num_pages, backend, plan.num_host_pages)
    except RuntimeError as error:  # torch cannot get the slab from the system
        raise EngineStartError(
            f"cannot allocate {plan.pages_bytes:,} bytes of pages and {plan.swap_bytes:,} to swap them out to: "
            "lower --memory or --swap-space"
        ) from error
    _warm_up(_engine(config, loaded, layout, plan, runner))
    engine = _engine(config, loaded, layout, plan, runner)
    return StartedEngine(engine, _info(config, folder, loaded, layout, plan, backend, products))


def planned_memory(config: EngineConfig) -> MemoryPlan:
    """What `start_engine` would take, without taking the pages."""
    return _planned(config, _checked(config))[3]


def _planned(config: EngineConfig, backend: str) -> tuple[Path, LoadedModel, Layout, MemoryPlan, Products | None]:
    dtype_name, dtype = _DTYPES[config.dtype]
    folder = model_folder(config.model, dtype_name)
    runtime_bytes = psutil.Process().memory_info().rss
    loaded = load_model(folder, "cpu", dtype)
    products = _pack(config, loaded, backend)
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
    return folder, loaded, layout, plan, products


def _pack(config: EngineConfig, loaded: LoadedModel, backend: str) -> Products | None:
    """Bring the weights into the form that this processor multiplies fastest; None where they stay as they are."""
    if backend != "cpu" or not can_pack():
        return None
    dtype = loaded.model.dtype
    products = fastest_products() if config.dtype == "auto" else Products(dtype, dtype)
    packed_bytes = pack_linears(loaded.model, products)
    loaded.weights_bytes = weights_bytes(loaded.model) + packed_bytes
    return products


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
    return backend


def model_layout(preset_name: str, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Layout:
    """The page layout of a preset for a model's shape."""
    try:
        return layout_for(preset(preset_name), num_layers, num_kv_heads, head_dim, dtype.itemsize)
    except ConfigError as error:
        raise EngineStartError(f"--preset {preset_name}: {error}") from error


def _engine(config: EngineConfig, loaded: LoadedModel, layout: Layout, plan: MemoryPlan, runner: ModelRunner) -> Engine:
    scheduler = Scheduler(
        SlotAllocator(plan.num_pages),
        layout,
        max_running=config.max_running,
        max_batch_tokens=config.max_batch_tokens,
        eos_token_ids=loaded.eos_token_ids,
        prefix_cache=config.prefix_cache,
        num_host_slots=plan.num_host_pages,
    )
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids)
    return Engine(scheduler, runner, sampler, Limits(plan.max_model_len, loaded.vocab_size))


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
    config: EngineConfig,
    folder: Path,
    loaded: LoadedModel,
    layout: Layout,
    plan: MemoryPlan,
    backend: str,
    products: Products | None,
) -> EngineInfo:
    return EngineInfo(
        model_path=str(folder),
        max_model_len=plan.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=list(loaded.eos_token_ids),
        preset=config.preset,
        backend=backend,
        device="cpu",
        dtype=_DTYPES[config.dtype][0],
        num_layers=loaded.num_layers,
        num_pages=plan.num_pages,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        bf16_token_bytes=layout.token_bytes,
        kv_compression_ratio=layout.compression_ratio,
        memory=plan.rows(),
        memory_table=f"{plan.table(config.preset)}\nproducts  {products or 'of weights as PyTorch keeps them'}",
    )
