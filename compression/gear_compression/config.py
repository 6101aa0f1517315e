"""What a page format may choose, and the presets that people choose by name or read from a file.

Knows the knobs and their limits; knows nothing of bytes (`layout.py`) or of tensors.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

CODE_BITS = (2, 3, 4, 5, 8)
_NOTHING_ELSE = ConfigDict(extra="forbid")  # a misspelt knob in a preset file is refused, not ignored


class ConfigError(ValueError):
    """A format that cannot exist; the message names the knob and its limits."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True)
class PartConfig:
    """How one part of a page, its keys or its values, is stored: codes + low rank + outliers (GEAR, section 3).

    Keys are quantised in vectors along the tokens of a page (per channel), values along the channels of a token.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _NOTHING_ELSE
    bits: int = 4  # of a code
    group_size: int | None = None  # entries of a vector that share a scale and a zero; None: the whole vector
    symmetric: bool = False  # codes centred on 0, no zero stored
    scale_bits: int = 16  # of a scale and of a zero: 16 is bf16, 8 counts in a bf16 unit that each page and head has
    rank: int = 0  # columns of the low-rank factors; 0: none
    factor_bits: int = 16  # of a factor's entry: 16 is bf16; 4 and 8 are signed codes, one bf16 scale a column
    low_rank_first: bool = False  # fit the factors to X before coding what is left; else to the codes' residual
    outliers: int = 0  # per vector: half of them its largest entries, half its smallest
    rotate: bool = False  # stored times an orthonormal Hadamard matrix over the channels

    def __post_init__(self) -> None:
        _require(self.bits in CODE_BITS, f"bits must be one of {CODE_BITS}, got {self.bits}")
        _require(self.scale_bits in (8, 16), f"scale_bits must be 8 or 16, got {self.scale_bits}")
        _require(self.factor_bits in (4, 8, 16), f"factor_bits must be 4, 8 or 16, got {self.factor_bits}")
        _require(0 <= self.rank <= 16, f"rank must be between 0 and 16, got {self.rank}")
        _require(
            0 <= self.outliers <= 16 and self.outliers % 2 == 0,
            f"outliers must be even and between 0 and 16, got {self.outliers}",
        )
        if self.group_size is not None:
            _require(
                self.group_size >= 16 and self.group_size % 16 == 0,
                f"group_size must be a multiple of 16, got {self.group_size}",
            )

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """How one layer is stored that differs from the rest."""

    __pydantic_config__: ClassVar[ConfigDict] = _NOTHING_ELSE
    layer: int
    keys: PartConfig
    values: PartConfig


@dataclass(frozen=True, slots=True)
class GearConfig:
    """A compressed page: `page_size` tokens, keys and values each stored in their own way."""

    __pydantic_config__: ClassVar[ConfigDict] = _NOTHING_ELSE

    keys: PartConfig = field(default_factory=PartConfig)
    values: PartConfig = field(default_factory=PartConfig)
    page_size: int = 128  # tokens
    sink_tokens: int = 0  # first tokens of a sequence that stay exact; every page reserves their room
    layers: tuple[LayerConfig, ...] = ()  # those that `gear-fidelity --tune` gave a format of their own

    def __post_init__(self) -> None:
        _require(
            16 <= self.page_size <= 256 and self.page_size % 16 == 0,
            f"page_size must be a multiple of 16 from 16 to 256, got {self.page_size}",
        )
        _require(0 <= self.sink_tokens <= 8, f"sink_tokens must be between 0 and 8, got {self.sink_tokens}")
        numbers = [own.layer for own in self.layers]
        _require(
            len(set(numbers)) == len(numbers) and min(numbers, default=0) >= 0,
            f"layers must name each layer once, counted from 0, got {numbers}",
        )

    def parts(self, layer: int) -> tuple[PartConfig, PartConfig]:
        """Keys and values of one layer."""
        for own in self.layers:
            if own.layer == layer:
                return own.keys, own.values
        return self.keys, self.values


@dataclass(frozen=True, slots=True)
class RawConfig:
    """Uncompressed pages in the model's dtype, through the same engine: the baseline of every comparison."""

    page_size: int = 64

    def __post_init__(self) -> None:
        _require(
            16 <= self.page_size <= 256 and self.page_size % 16 == 0,
            f"page_size must be a multiple of 16 from 16 to 256, got {self.page_size}",
        )


# Values are stored rotated and symmetric, which spreads their spikes over all channels; low rank does not pay there.
PRESETS: dict[str, GearConfig | RawConfig] = {
    # Keys lean on the low-rank part, fitted first and kept in 4-bit factors (docs/fidelity.md says why these).
    "near-lossless": GearConfig(
        keys=PartConfig(bits=4, scale_bits=8, rank=12, factor_bits=4, low_rank_first=True),
        values=PartConfig(bits=4, scale_bits=8, symmetric=True, rotate=True),
        sink_tokens=1,
    ),
    "balanced": GearConfig(
        keys=PartConfig(bits=4, group_size=32, scale_bits=8),
        values=PartConfig(bits=3, scale_bits=8, symmetric=True, rotate=True),
        sink_tokens=1,
    ),
    "max-compression": GearConfig(
        keys=PartConfig(bits=3, group_size=32, scale_bits=8),
        values=PartConfig(bits=2, scale_bits=8, symmetric=True, rotate=True),
        sink_tokens=1,
    ),
    # The paper's recipe: all three parts on keys and values, low rank of the residual, bf16 scales and factors.
    "gear-4bit": GearConfig(
        keys=PartConfig(bits=4, rank=2, outliers=2), values=PartConfig(bits=4, rank=2, outliers=2), page_size=64
    ),
    "gear-2bit": GearConfig(
        keys=PartConfig(bits=2, rank=2, outliers=2), values=PartConfig(bits=2, rank=2, outliers=2), page_size=64
    ),
    "none": RawConfig(),
}


def preset(name: str) -> GearConfig | RawConfig:
    """The format called `name`, or the one in the preset file `name`. Raises `ConfigError` naming the remedy."""
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(".json") or Path(name).is_file():
        return read_preset(Path(name))
    raise ConfigError(
        f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}, or a .json file that gear-fidelity --tune wrote"
    )


def read_preset(file: Path) -> GearConfig:
    """A format as `write_preset` wrote it. Raises `ConfigError` naming the file and the entry that is wrong."""
    try:
        return _PRESET_FILE.validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read the preset file {file}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        raise ConfigError(
            f"preset file {file}: {where + ': ' if where else ''}{first['msg']}; fix that entry"
        ) from error


def write_preset(config: GearConfig, file: Path) -> None:
    """As JSON. Raises OSError."""
    file.write_bytes(_PRESET_FILE.dump_json(config, indent=1) + b"\n")


_PRESET_FILE = TypeAdapter(GearConfig)
