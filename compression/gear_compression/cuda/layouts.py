"""Page layouts by number: PyTorch operators take integers, not objects."""

from gear_compression.config import ConfigError
from gear_compression.layout import Layout

_LAYOUTS: list[Layout] = []


def register_layout(layout: Layout) -> int:
    """The number of a layout, the same for equal ones. Raises `ConfigError` for what the kernels cannot read."""
    if not layout.is_raw and layout.order != "tiles":  # type: ignore[union-attr]
        raise ConfigError('the CUDA kernels read codes in order "tiles": make the layout with order="tiles"')
    if layout.head_dim not in (64, 96, 128, 256):
        raise ConfigError(f"the CUDA kernels take a head_dim of 64, 96, 128 or 256, got {layout.head_dim}")
    if layout not in _LAYOUTS:
        _LAYOUTS.append(layout)
    return _LAYOUTS.index(layout)


def layout_of(number: int) -> Layout:
    return _LAYOUTS[number]
