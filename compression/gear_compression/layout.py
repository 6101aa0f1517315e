"""Where each byte of a page lies: one description that every backend reads and none repeats.

A slot of the pool holds a sealed page of all layers, as L·H records of one (layer, KV head) each (layers may differ),

    record = keys (codes | scale | zero | unit | factors | outliers | sinks), then values likewise, padded to 16 bytes

or a run of an open page's tokens in bf16: [L, H, 2, run_tokens, D], keys at 0 and values at 1.
Raw pages are such runs too, in the model's dtype.

The codes of a record lie in planes (for vector units) or in tiles (for tensor cores, `reference/tiles.py`). The order
changes no value and no size.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from gear_compression.config import ConfigError, GearConfig, PartConfig, RawConfig

CodeOrder = Literal["planes", "tiles"]
RECORD_ALIGN = 16  # bytes: what a GPU's bulk copy and widest loads ask for
OPEN_RUN_ALIGN = 8  # tokens


class PartLayout(NamedTuple):
    """Byte offsets within a record, and the numbers a kernel needs to read them. Integers only, for compiled code.

    A part is a matrix of `num_vectors` vectors of `vector_len` codes, row after row. m codes lie in planes 1, 2, 4 or
    8 bits wide (3 = 2 + 1, 5 = 4 + 1), each plane w·m/8 bytes, where byte j holds the digits of codes j, j + w·m/8,
    j + 2·w·m/8 …: one unpacking instruction serves neighbouring codes, whatever the width. Shapes below are those of
    order "planes".
    """

    is_keys: int
    tiled: int
    num_vectors: int
    vector_len: int
    bits: int
    rotate: int
    group_size: int
    num_groups: int  # per vector
    symmetric: int
    scale_bits: int
    rank: int
    factor_bits: int
    low_rank_first: int
    outliers: int
    codes: int  # [num_vectors · vector_len] packed
    scale: int  # [num_groups, num_vectors] bf16 or uint8
    zero: int  # the same, bf16 or int8; absent when symmetric
    tokens_factor: int  # [rank · S] packed codes or bf16
    channels_factor: int  # [rank · D]
    outlier_value: int  # [num_vectors, outliers] bf16
    outlier_index: int  # [num_vectors, outliers] uint8, position in the vector
    sinks: int  # [sink_tokens, D] bf16
    unit: int  # [2] bf16: what one count of an 8-bit scale and of an 8-bit zero is worth
    factor_scale: int  # [rank] bf16, for coded factors
    end: int


class RecordLayout(NamedTuple):
    """The records of one layer, and where the first of its H lies in a page."""

    keys: PartLayout
    values: PartLayout
    start: int
    record_bytes: int


def _part_layout(
    part: PartConfig, start: int, page_size: int, head_dim: int, sinks: int, is_keys: bool, order: CodeOrder
) -> PartLayout:
    num_vectors, vector_len = (head_dim, page_size) if is_keys else (page_size, head_dim)
    group_size = part.group_size or vector_len
    name = "keys" if is_keys else "values"
    if vector_len % group_size:
        raise ConfigError(
            f"{name}: group_size {group_size} does not divide the vector of {vector_len} entries: choose a divisor"
        )
    if part.outliers > vector_len // 2:
        raise ConfigError(f"{name}: {part.outliers} outliers are more than half of a vector of {vector_len} entries")
    num_groups = vector_len // group_size
    scale_bytes = num_vectors * num_groups * part.scale_bits // 8
    offset = start

    def take(num_bytes: int, align: int = RECORD_ALIGN) -> int:
        nonlocal offset
        at = offset
        offset += -(-num_bytes // align) * align
        return at

    return PartLayout(
        is_keys=int(is_keys),
        tiled=int(order == "tiles"),
        num_vectors=num_vectors,
        vector_len=vector_len,
        bits=part.bits,
        rotate=int(part.rotate),
        group_size=group_size,
        num_groups=num_groups,
        symmetric=int(part.symmetric),
        scale_bits=part.scale_bits,
        rank=part.rank,
        factor_bits=part.factor_bits,
        low_rank_first=int(part.low_rank_first),
        outliers=part.outliers,
        codes=take(num_vectors * vector_len * part.bits // 8),
        scale=take(scale_bytes),
        zero=take(0 if part.symmetric else scale_bytes),
        tokens_factor=take(part.rank * page_size * part.factor_bits // 8),
        channels_factor=take(part.rank * head_dim * part.factor_bits // 8),
        outlier_value=take(2 * num_vectors * part.outliers),
        outlier_index=take(num_vectors * part.outliers),
        sinks=take(2 * sinks * head_dim),
        unit=take(4 if part.scale_bits == 8 else 0, 4),
        factor_scale=take(2 * part.rank if part.factor_bits < 16 else 0, 4),
        end=-(-offset // RECORD_ALIGN) * RECORD_ALIGN,
    )


def _check_head_dim(head_dim: int) -> None:
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ConfigError(f"head_dim must be a multiple of 16 from 16 to 256, got {head_dim}")


def _check_tiles(config: GearConfig, num_layers: int, head_dim: int) -> None:
    """What tensor-core tiles can hold. Raises `ConfigError` naming what to change."""
    if config.page_size % 64:
        raise ConfigError(f"page_size {config.page_size} is no multiple of 64, which this device's tiles need")
    if head_dim % 32:
        raise ConfigError(f"head_dim {head_dim} is no multiple of 32, which this device's tiles need")
    for layer in range(num_layers):
        for name, part in zip(("keys", "values"), config.parts(layer), strict=True):
            if name == "values" and head_dim % 64 and part.bits in (3, 5):
                raise ConfigError(f"values: {part.bits} bits need a head_dim that is a multiple of 64: try 2, 4 or 8")
            if part.rank and part.factor_bits == 16 and (part.rank > 8 or part.rank % 2):
                raise ConfigError(f"{name}: 16-bit factors of rank {part.rank}: choose an even rank of at most 8")
            if part.rank and part.factor_bits == 4 and (name == "values" or part.rank % 4):
                raise ConfigError(
                    f"{name}: 4-bit factors of rank {part.rank}: only keys have tiles of them, of rank 4 to 16 by 4"
                )
            if part.rank and part.factor_bits == 8:
                raise ConfigError(f"{name}: 8-bit factors have no tiles: choose 4 or 16 bits")


@dataclass(frozen=True)
class PageLayout:
    """The bytes of a GEAR page for one model."""

    config: GearConfig
    num_layers: int
    num_kv_heads: int
    head_dim: int
    order: CodeOrder = "planes"

    is_raw = False

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        for own in self.config.layers:
            if own.layer >= self.num_layers:
                raise ConfigError(
                    f"the preset has a format for layer {own.layer}, and this model's layers end at "
                    f"{self.num_layers - 1}: tune one for this model (gear-fidelity --tune)"
                )
        _ = self.layers  # raises ConfigError for what does not fit this head_dim
        if self.order == "tiles":
            _check_tiles(self.config, self.num_layers, self.head_dim)

    @property
    def page_size(self) -> int:
        return self.config.page_size

    @cached_property
    def layers(self) -> tuple[RecordLayout, ...]:
        """Each layer's records."""
        config, records, start = self.config, [], 0
        sizes = (config.page_size, self.head_dim, config.sink_tokens)
        for layer in range(self.num_layers):
            key_config, value_config = config.parts(layer)
            keys = _part_layout(key_config, 0, *sizes, is_keys=True, order=self.order)
            values = _part_layout(value_config, keys.end, *sizes, is_keys=False, order=self.order)
            records.append(RecordLayout(keys, values, start, values.end))
            start += self.num_kv_heads * values.end
        return tuple(records)

    def rotates(self, layer: int) -> tuple[bool, bool]:
        """Whether keys and values are stored rotated."""
        return bool(self.layers[layer].keys.rotate), bool(self.layers[layer].values.rotate)

    @cached_property
    def page_bytes(self) -> int:
        """One slot: a sealed page of all layers, but at least 8 open tokens."""
        last = self.layers[-1]
        return max(last.start + self.num_kv_heads * last.record_bytes, OPEN_RUN_ALIGN * self.token_bytes)

    @property
    def token_bytes(self) -> int:
        """K and V of one token in bf16, all layers: an open token, and the yardstick of every ratio."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * 2

    @cached_property
    def run_tokens(self) -> int:
        """Open tokens that one slot holds: as many as fit, rounded down to a multiple of 8."""
        return min(self.page_bytes // self.token_bytes // OPEN_RUN_ALIGN * OPEN_RUN_ALIGN, self.page_size)

    @property
    def max_runs(self) -> int:
        """Slots of an open page that is nearly full."""
        return -(-self.page_size // self.run_tokens)

    @property
    def bits_per_element(self) -> float:
        """Of a sealed page, metadata and padding included."""
        elements = self.num_layers * self.num_kv_heads * 2 * self.head_dim * self.page_size
        return 8 * self.page_bytes / elements

    @property
    def compression_ratio(self) -> float:
        """bf16 bytes of a token ÷ its bytes in a sealed page."""
        return self.token_bytes * self.page_size / self.page_bytes


@dataclass(frozen=True)
class RawLayout:
    """The bytes of an uncompressed page: one run of `page_size` tokens in the model's dtype."""

    config: RawConfig
    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int  # 4 for float32, 2 for bfloat16

    is_raw = True
    max_runs = 1

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)

    @property
    def page_size(self) -> int:
        return self.config.page_size

    @property
    def run_tokens(self) -> int:
        return self.config.page_size

    def rotates(self, layer: int) -> tuple[bool, bool]:
        return False, False

    @property
    def token_bytes(self) -> int:
        """K and V of one token in bf16, all layers: the yardstick of every ratio, whatever the model's dtype."""
        return self.num_layers * self.num_kv_heads * 2 * self.head_dim * 2

    @property
    def page_bytes(self) -> int:
        return self.token_bytes // 2 * self.element_bytes * self.page_size

    @property
    def bits_per_element(self) -> float:
        return 8.0 * self.element_bytes

    @property
    def compression_ratio(self) -> float:
        return self.token_bytes * self.page_size / self.page_bytes


Layout = PageLayout | RawLayout


def layout_for(
    config: GearConfig | RawConfig,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: int,
    order: CodeOrder = "planes",
) -> Layout:
    """The layout of `config` for a model. Raises `ConfigError` where the format does not fit its head_dim."""
    if isinstance(config, RawConfig):
        return RawLayout(config, num_layers, num_kv_heads, head_dim, element_bytes)
    return PageLayout(config, num_layers, num_kv_heads, head_dim, order)
