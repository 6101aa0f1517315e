"""Where the error is: the exact model's own keys and values, stored in a format, layer by layer.

Uses the PyTorch definition of the format on a few pages; knows nothing of bytes or of logits.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from gear_compression.config import GearConfig, PartConfig
from gear_compression.reference.pages import compress_part, decompress_part
from gear_compression.reference.rotation import hadamard
from gear_engine.fidelity.subjects import Subject

MAX_TOKENS = 2048  # the exact model's keys and values of a long text would fill the memory


@dataclass(frozen=True, slots=True)
class PartErrors:
    """Of the keys or the values of one layer: X as the exact model has it, X̂ as it reads back, E = X − X̂.

    Every ‖·‖² is a sum over all sampled pages and heads. What a part removes is a share of the error's energy,
    1 − ‖E‖² ÷ ‖E₀‖², where E₀ is the error of the same format without that part. So it means the same whether low
    rank is fitted to X or to what the codes leave; negative would say that the part does harm.
    """

    error: float  # ‖E‖ ÷ ‖X‖
    low_rank_removes: float | None  # E₀: rank 0; None: the format has none
    outliers_remove: float | None  # E₀: no outliers


@dataclass(frozen=True, slots=True)
class LayerErrors:
    layer: int
    keys: PartErrors
    values: PartErrors


def exact_pages(exact: Subject, text: list[int]) -> Tensor:
    """[L, H, 2, T, D] float32: keys (after RoPE) and values of the text's beginning, as far as it fills raw pages."""
    pages = exact.raw_pages(text[:MAX_TOKENS]).float()  # [P, L, H, 2, S, D]
    return pages.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def errors_by_layer(
    subjects: Iterable[Subject], kv: Tensor, on_step: Callable[[str], None]
) -> Iterator[tuple[str, list[LayerErrors]]]:
    """Errors of all layers by name, for the formats of ours; kv as `exact_pages` gives it. None if no page is full."""
    for subject in subjects:
        config = subject.layout.config
        if isinstance(config, GearConfig) and kv.shape[3] >= config.page_size:
            on_step(subject.name)
            yield subject.name, [layer_errors(kv[layer], config, layer) for layer in range(kv.shape[0])]


def layer_errors(kv: Tensor, config: GearConfig, layer: int) -> LayerErrors:
    """kv [H, 2, T, D] of one layer; samples its last full page and the one half-way."""
    size = config.page_size
    num_pages = kv.shape[2] // size
    sampled = sorted({(num_pages - 1) // 2, num_pages - 1})
    both = [
        part_errors(
            [(head[page * size : (page + 1) * size], page == 0) for page in sampled for head in kv[:, which]],
            part,
            which == 0,
            config.sink_tokens,
        )
        for which, part in enumerate(config.parts(layer))
    ]
    return LayerErrors(layer, *both)


def part_errors(pages: list[tuple[Tensor, bool]], part: PartConfig, is_keys: bool, sink_tokens: int) -> PartErrors:
    """pages: X [S, D] of one head each, and whether it begins a sequence."""

    def energy(one: PartConfig) -> float:
        return sum(_squared_error(x, one, is_keys, sink_tokens, is_first) for x, is_first in pages)

    def removed(without: PartConfig) -> float | None:
        return None if without == part else 1 - left / max(energy(without), 1e-30)

    left = energy(part)
    total = sum(float(x.square().sum()) for x, _ in pages)
    return PartErrors(
        (left / max(total, 1e-30)) ** 0.5, removed(replace(part, rank=0)), removed(replace(part, outliers=0))
    )


def _squared_error(x: Tensor, part: PartConfig, is_keys: bool, sink_tokens: int, is_first: bool) -> float:
    if part.rotate:
        x = x @ hadamard(x.shape[-1])
    open_page = x.bfloat16().float()  # what is sealed has lain in an open page
    stored = compress_part(open_page, part, is_keys, sink_tokens, is_first)
    back = decompress_part(stored, is_keys, sink_tokens if is_first else 0)
    return float((back - x).square().sum())
