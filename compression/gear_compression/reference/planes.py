"""The order "planes": codes of any width as planes of 1, 2, 4 or 8 bits, as `PartLayout` says."""

import torch
from torch import Tensor

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}  # bit widths, least significant first


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes [m] integers → [m · bits / 8] uint8, plane after plane."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        digits = ((codes.int() >> shift) & ((1 << width) - 1)).view(per_byte, -1)
        weights = torch.tensor([1 << (width * i) for i in range(per_byte)], dtype=torch.int32)[:, None]
        planes.append((digits * weights).sum(0).to(torch.uint8))
        shift += width
    return torch.cat(planes)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """[m · bits / 8] uint8 → codes [m] uint8."""
    m = packed.shape[0] * 8 // bits
    codes = torch.zeros(m, dtype=torch.int32)
    at, shift = 0, 0
    for width in PLANES[bits]:
        plane = packed[at : at + m * width // 8].int()
        digits = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
        codes += torch.cat(digits) << shift
        at, shift = at + len(plane), shift + width
    return codes.to(torch.uint8)
