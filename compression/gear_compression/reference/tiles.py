"""The order "tiles": where codes lie so that a tensor core's fragments are single aligned loads.

A matrix of rows × columns is cut into blocks of 64 rows × 64 columns (of 32 where a side is no multiple of 64). Within
a block, lane g (of 8) has the rows 16 i + 2 g + l; its u-th row, u = 2 i + l, is digit u mod d of the byte row u div d,
where a byte of a plane w bits wide has d = 8 / w digits. Byte rows lie [u div d][g][column].

Keys have tokens as rows and channels as columns. Values have channels as rows and tokens as columns, and each 64 of
their columns are turned from 16 i + 4 j + b to 16 j + 4 i + b, so that a lane finds its four steps side by side.
"""

import torch
from torch import Tensor

from gear_compression.layout import PartLayout
from gear_compression.reference.planes import PLANES


def pack_tiles(codes: Tensor, part: PartLayout) -> Tensor:
    """codes [num_vectors, vector_len] integers → [num_vectors · vector_len · bits / 8] uint8."""
    rows = codes.T.int()  # keys [S, D]; values [D, S]
    order = _columns(rows.shape[1], part.is_keys)
    blocks = _blocks(rows[:, order], part.is_keys)
    planes, shift = [], 0
    for width in PLANES[part.bits]:
        digits = (blocks >> shift) & ((1 << width) - 1)  # [..., u, g, columns]
        per_byte = 8 // width
        digits = digits.unflatten(2, (-1, per_byte))
        weights = torch.tensor([1 << (width * n) for n in range(per_byte)], dtype=torch.int32)
        planes.append((digits * weights[:, None, None]).sum(3).to(torch.uint8).flatten())
        shift += width
    return torch.cat(planes)


def unpack_tiles(packed: Tensor, part: PartLayout) -> Tensor:
    """What `pack_tiles` took, uint8."""
    num_rows, num_columns = part.vector_len, part.num_vectors
    shape = _blocks(torch.empty(num_rows, num_columns, dtype=torch.bool), part.is_keys).shape
    codes, at, shift = torch.zeros(shape, dtype=torch.int32), 0, 0
    for width in PLANES[part.bits]:
        num_bytes, per_byte = num_rows * num_columns * width // 8, 8 // width
        plane = packed[at : at + num_bytes].int().view(*shape[:2], -1, *shape[3:])
        digits = [(plane >> (width * n)) & ((1 << width) - 1) for n in range(per_byte)]
        codes += torch.stack(digits, 3).flatten(2, 3) << shift
        at, shift = at + num_bytes, shift + width
    rows = torch.empty(num_rows, num_columns, dtype=torch.int32)
    rows[:, _columns(num_columns, part.is_keys)] = _whole(codes, num_rows, num_columns, part.is_keys)
    return rows.T.contiguous().to(torch.uint8)


def pack_factors(tokens: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit factors of keys, codes [R, S] and [R, D], to bytes: two tokens by rank [S/2, R], two ranks by channel.

    The latter [D/c, R/2, c] in blocks of c channels, 64 or 32.
    """
    R, D = channels.shape
    pairs = tokens.T.int().view(-1, 2, R)
    ranks = channels.int().view(R // 2, 2, D // _side(D), -1)
    return (
        (pairs[:, 0] | pairs[:, 1] << 4).to(torch.uint8).flatten(),
        (ranks[:, 0] | ranks[:, 1] << 4).transpose(0, 1).to(torch.uint8).flatten(),
    )


def unpack_factors(tokens: Tensor, channels: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Codes [R, S] and [R, D]."""
    pairs = tokens.view(-1, rank)
    ranks = channels.view(-1, rank // 2, _side(channels.shape[0] * 2 // rank)).transpose(0, 1).flatten(1)
    return (
        torch.stack([pairs & 15, pairs >> 4], 1).flatten(0, 1).T,
        torch.stack([ranks & 15, ranks >> 4], 1).flatten(0, 1),
    )


def _side(n: int) -> int:
    return 64 if n % 64 == 0 else 32


def _columns(num_columns: int, is_keys: int) -> Tensor:
    """Which column of the matrix lies at each place."""
    columns = torch.arange(num_columns)
    return columns if is_keys else columns.view(-1, 4, 4, 4).transpose(1, 2).flatten()  # (i, j, b) → (j, i, b)


def _blocks(rows: Tensor, is_keys: int) -> Tensor:
    """[rows, columns] → [token blocks, channel blocks, u, g, columns of a block]."""
    height, width = _side(rows.shape[0]), _side(rows.shape[1])
    cut = rows.view(rows.shape[0] // height, height // 16, 8, 2, rows.shape[1] // width, width)  # block, i, g, l, block
    ordered = cut.permute(0, 4, 1, 3, 2, 5) if is_keys else cut.permute(4, 0, 1, 3, 2, 5)
    return ordered.flatten(2, 3)


def _whole(blocks: Tensor, num_rows: int, num_columns: int, is_keys: int) -> Tensor:
    """The inverse of `_blocks`."""
    cut = blocks.unflatten(2, (-1, 2))  # token block, channel block, i, l, g, column
    if not is_keys:
        cut = cut.transpose(0, 1)
    return cut.permute(0, 2, 4, 3, 1, 5).reshape(num_rows, num_columns)
