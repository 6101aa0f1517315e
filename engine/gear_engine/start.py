"""From a configuration to an engine that is ready: every "auto" is resolved here, and every refusal to start is here.

Warm-up runs one request through the whole path, so that kernels are compiled before the first user waits for them.
"""

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import torch
from torch._dynamo.exc import TorchDynamoException

from gear_compression.config import ConfigError, preset
from gear_compression.layout import CodeOrder, Layout, layout_for
from gear_engine.config import EngineConfig
from gear_engine.engine import Engine, Limits
from gear_engine.grammar import Grammars
from gear_engine.model_files import Dtype, first_line, model_folder
from gear_engine.model_loader import LoadedModel, load_model, weights_bytes
from gear_engine.packed import Products, can_pack, fastest_products, pack_linears
from gear_engine.page_store import CacheDirError, PageStore, weights_identity
from gear_engine.plan import MemoryPlan, cuda_device, host_device, parse_swap_space, plan_memory
from gear_engine.protocol import AddRequest, EngineInfo, EngineStartError, SamplingParams
from gear_engine.quantized import QUANTIZATIONS, check_device
from gear_engine.runner import BACKENDS, ModelRunner, Runner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator

logger = logging.getLogger(__name__)

# Prompt tokens that a step takes beside decoding sequences on a CPU, where every further one lengthens the step, twice
# as much with CPU_FAR_TOKENS before it (bench/pressure.py); a GPU takes what `max_batch_tokens` allows, because a step
# of fewer is hardly shorter there.
CPU_CHUNK_TOKENS, CPU_FAR_TOKENS = 96, 512
CPU_BATCH, CUDA_BATCH = (64, 512), (256, 2048)  # sequences and tokens in a step, where the user does not say

_DTYPES: dict[str, tuple[Dtype, torch.dtype]] = {
    "float32": ("float32", torch.float32),
    "bfloat16": ("bfloat16", torch.bfloat16),
}


@dataclass(slots=True)
class StartedEngine:
    """A warm engine and what it says of itself."""

    engine: Engine
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that is known before the pages are taken; no "auto" is left in the config but that of memory and dtype."""

    config: EngineConfig
    folder: Path
    loaded: LoadedModel
    layout: Layout
    plan: MemoryPlan
    grammars: Grammars
    dtype: str
    products: Products | None


def start_engine(config: EngineConfig) -> StartedEngine:
    """Raises `EngineStartError`, one sentence that names the remedy, for whatever cannot be served."""
    prepared = _prepare(config)
    plan = prepared.plan
    try:
        runner = _runner(prepared)
    except EngineStartError:
        raise  # is a RuntimeError too, and says more
    except RuntimeError as error:  # torch cannot get the slab from the system
        raise EngineStartError(
            f"cannot allocate {plan.pages_bytes:,} bytes of pages and {plan.swap_bytes:,} to swap them out to: "
            "lower --memory or --swap-space"
        ) from error
    _warm_up(_engine(prepared, runner))
    engine = _engine(prepared, runner, _page_store(prepared.config, prepared.folder, prepared.layout))
    return StartedEngine(engine, _info(prepared))


def planned_memory(config: EngineConfig) -> MemoryPlan:
    """What `start_engine` would take, without taking the pages."""
    return _prepare(config).plan


def _prepare(config: EngineConfig) -> _Prepared:
    config = _resolved(config)
    on_gpu = config.device == "cuda"
    dtype_name = ("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype
    name, dtype = _DTYPES[dtype_name]
    if on_gpu:
        device = cuda_device()  # makes the CUDA context, whose memory belongs to the runtime
        runtime_bytes = device.taken_bytes
    else:
        device = host_device()
        runtime_bytes = psutil.Process().memory_info().rss
    folder = model_folder(config.model, name)
    loaded = load_model(folder, config.device, dtype, quantization=config.quantization)
    before_bytes = psutil.Process().memory_info().rss
    grammars = Grammars(folder, loaded.eos_token_ids)  # now: it takes a second or more, and stops every other thread
    if not on_gpu:
        runtime_bytes += max(0, psutil.Process().memory_info().rss - before_bytes)
    products = _pack(config, loaded)
    layout = model_layout(config.preset, loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, dtype, config.device)
    plan = plan_memory(
        loaded.config,
        layout,
        runtime_bytes=runtime_bytes,
        weights_bytes=loaded.weights_bytes,
        max_position=loaded.max_position,
        memory=config.memory,
        num_pages=config.num_pages,
        max_model_len=config.max_model_len,
        max_running=config.max_running or 1,
        max_batch_tokens=config.max_batch_tokens or 1,
        swap_space=config.swap_space,
        device=device,
    )
    return _Prepared(config, folder, loaded, layout, plan, grammars, dtype_name, products)


def _pack(config: EngineConfig, loaded: LoadedModel) -> Products | None:
    """Bring the weights into the form that this processor multiplies fastest; None where they stay as they are."""
    if config.backend != "cpu" or not can_pack():
        return None
    dtype = loaded.model.dtype
    products = fastest_products() if config.dtype == "auto" else Products(dtype, dtype)
    packed_bytes = pack_linears(loaded.model, products)
    loaded.weights_bytes = weights_bytes(loaded.model) + packed_bytes
    return products


def _runner(prepared: _Prepared) -> Runner:
    config, plan = prepared.config, prepared.plan
    if config.device == "cpu":
        return ModelRunner(prepared.loaded, prepared.layout, plan.num_pages, config.backend, plan.num_host_pages)
    from gear_engine.cuda_runner import CudaRunner

    runner = CudaRunner(
        prepared.loaded,
        prepared.layout,
        plan.num_pages,
        max_running=plan.max_running,
        max_batch_tokens=config.max_batch_tokens or 1,
        max_model_len=plan.max_model_len,
        num_host_slots=plan.num_host_pages,
        eager=config.eager,
    )
    try:
        logger.info("compiled and captured graphs in %.0f s", runner.warm_up())
    except TorchDynamoException as error:  # of quantised checkpoints, whose layers run code of other packages
        raise EngineStartError(f"a layer of the model cannot be compiled ({first_line(error)}): use --eager") from error
    return runner


def _resolved(config: EngineConfig) -> EngineConfig:
    """With a device, a backend and the size of a step, if the settings make sense together."""
    if config.dtype not in ("auto", *_DTYPES):
        raise EngineStartError(f"--dtype {config.dtype!r} is unknown: choose one of auto, {', '.join(_DTYPES)}")
    if config.quantization not in QUANTIZATIONS:
        raise EngineStartError(
            f"--quantization {config.quantization!r} is unknown: choose one of {', '.join(QUANTIZATIONS)}"
        )
    device = _device(config.device)
    if config.quantization != "none":
        check_device(device)
    backend = config.backend
    if backend == "auto":
        backend = device
    backends = BACKENDS if device == "cpu" else ("cuda",)
    if backend not in backends:
        raise EngineStartError(
            f"--backend {config.backend!r} does not exist on --device {device}: choose one of auto, "
            f"{', '.join(backends)}"
        )
    if device == "cuda" and config.dtype == "float32":
        raise EngineStartError("--dtype float32 is not served on a GPU, whose kernels take bfloat16: leave it out")
    num_running, num_tokens = CPU_BATCH if device == "cpu" else CUDA_BATCH
    max_running = num_running if config.max_running is None else config.max_running
    config = msgspec.structs.replace(
        config,
        device=device,
        backend=backend,
        max_running=max_running,
        max_batch_tokens=max(num_tokens, max_running) if config.max_batch_tokens is None else config.max_batch_tokens,
    )
    _check_numbers(config)
    if config.cache_dir is not None:
        _cache_dir_bytes(config)
        if not config.prefix_cache:
            raise EngineStartError("--cache-dir keeps cached prefixes: leave out --no-prefix-cache")
    return config


def _check_numbers(config: EngineConfig) -> None:
    for name in ("max_running", "max_batch_tokens", "max_waiting", "num_pages", "max_model_len"):
        value = getattr(config, name)
        if value is not None and value < (0 if name == "max_waiting" else 1):
            raise EngineStartError(f"--{name.replace('_', '-')} must be positive, got {value}")
    assert config.max_running is not None
    assert config.max_batch_tokens is not None
    if config.max_batch_tokens < config.max_running:
        raise EngineStartError(
            f"--max-batch-tokens {config.max_batch_tokens} must be at least --max-running {config.max_running}: "
            "a step computes one token of every running sequence"
        )


def _device(name: str) -> str:
    """ "auto" is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise EngineStartError(f"--device {name!r} is unknown: choose one of auto, cpu, cuda")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise EngineStartError("--device cuda: PyTorch sees no GPU here; use --device cpu, or install its CUDA build")
    if name == "cpu" or not has_gpu:
        return "cpu"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("triton") is None:
        raise EngineStartError(
            "the GPU's kernels are compiled by NVIDIA's cuda-core and by triton, which are not installed: "
            "pip install 'gearserve[cuda]', or use --device cpu"
        )
    return "cuda"


def model_layout(
    preset_name: str, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> Layout:
    """The page layout of a preset for a model's shape."""
    order: CodeOrder = "planes" if device == "cpu" else "tiles"
    try:
        return layout_for(preset(preset_name), num_layers, num_kv_heads, head_dim, dtype.itemsize, order)
    except ConfigError as error:
        raise EngineStartError(f"--preset {preset_name}: {error}") from error


def _page_store(config: EngineConfig, folder: Path, layout: Layout) -> PageStore | None:
    if config.cache_dir is None:
        return None
    numbers = config.dtype if config.quantization == "none" else f"{config.dtype} {config.quantization}"
    identity = weights_identity(folder, layout, numbers)
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


def _engine(prepared: _Prepared, runner: Runner, store: PageStore | None = None) -> Engine:
    config, loaded, plan = prepared.config, prepared.loaded, prepared.plan
    scheduler = Scheduler(
        SlotAllocator(plan.num_pages),
        prepared.layout,
        max_running=plan.max_running,
        max_batch_tokens=config.max_batch_tokens or 1,
        eos_token_ids=loaded.eos_token_ids,
        prefix_cache=config.prefix_cache,
        num_host_slots=plan.num_host_pages,
        store=store,
        chunk_tokens=CPU_CHUNK_TOKENS if config.device == "cpu" else None,
        far_tokens=CPU_FAR_TOKENS,
    )
    sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids)
    return Engine(scheduler, runner, sampler, Limits(plan.max_model_len, loaded.vocab_size), prepared.grammars)


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
    for penalty in (1.0, 1.1):  # drawn from logits as the model gives them, and from such as are adjusted in float32
        params = SamplingParams(max_tokens=1, temperature=1.0, repetition_penalty=penalty, seed=0)
        engine.add(AddRequest("warm-up", tokens[:1], params))
        while engine.has_work:
            engine.step()


def _info(prepared: _Prepared) -> EngineInfo:
    config, loaded, layout, plan = prepared.config, prepared.loaded, prepared.layout, prepared.plan
    table = plan.table(config.preset)
    if config.quantization == "fp8":
        table += "\nproducts  in FP8, scaled by row of weights and by token; embeddings and logits in bfloat16"
    if config.device == "cpu":
        table += f"\nproducts  {prepared.products or 'of weights as PyTorch keeps them'}"
    return EngineInfo(
        model_path=str(prepared.folder),
        max_model_len=plan.max_model_len,
        vocab_size=loaded.vocab_size,
        eos_token_ids=list(loaded.eos_token_ids),
        preset=config.preset,
        backend=config.backend,
        device=config.device,
        dtype=prepared.dtype,
        num_layers=loaded.num_layers,
        num_pages=plan.num_pages,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
        bf16_token_bytes=layout.token_bytes,
        kv_compression_ratio=layout.compression_ratio,
        memory=plan.rows(),
        memory_table=table,
        max_running=plan.max_running,
    )
