"""The allocator of the pool's slots: integers only, so that every decision can be tested without a tensor."""

from gear_compression.layout import Layout


class SlotAllocator:
    """Slots 0 … num_slots − 1, all alike. Invariant: free + active == num_slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest on top: a small load touches little memory
        self._taken = [False] * num_slots
        self.peak_active = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_active(self) -> int:
        return self.num_slots - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` slots, or None if there are not so many: then none is taken."""
        if count > len(self._free):
            return None
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self._taken[slot] = True
        self.peak_active = max(self.peak_active, self.num_active)
        return slots

    def give_back(self, slots: list[int]) -> None:
        for slot in slots:
            assert self._taken[slot], f"slot {slot} was free already"
            self._taken[slot] = False
        self._free += reversed(slots)


def num_runs(layout: Layout, num_tokens: int) -> int:
    """Slots of the open page of a sequence of `num_tokens` tokens."""
    return -(-(num_tokens % layout.page_size) // layout.run_tokens)


def num_slots_held(layout: Layout, num_tokens: int) -> int:
    """Slots of a sequence at rest."""
    return num_tokens // layout.page_size + num_runs(layout, num_tokens)


def num_slots_for_one(layout: Layout, max_model_len: int) -> int:
    """Slots that let one sequence of any length up to `max_model_len` always advance.

    While a step seals a page, the page's runs, its sealed form and the next page's runs are held together.
    """
    return max_model_len // layout.page_size + 1 + (0 if layout.is_raw else 2 * layout.max_runs)
