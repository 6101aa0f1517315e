"""How prefill attention is cut into programs: integers only, without Triton."""

BLOCK_M = 128  # queries of a program: tokens × heads


def tokens_of_a_tile(page_size: int) -> int:
    """Query tokens that one program takes, all of one page: the largest power of two in page_size up to BLOCK_M."""
    return min(page_size & -page_size, BLOCK_M)


def heads_of_a_tile(page_size: int, group: int) -> int:
    """Query heads that share a program's keys, where a page alone would not fill it."""
    heads = 1
    while heads * 2 * tokens_of_a_tile(page_size) <= BLOCK_M and group % (heads * 2) == 0:
        heads *= 2
    return heads
