"""The allocator of the pool's slots: integers only, so that every decision can be tested without a tensor."""

from collections.abc import Sequence as Many
from typing import Literal

from gear_compression.layout import Layout

SlotState = Literal["free", "active", "cached"]


class SlotAllocator:
    """Slots 0 … num_slots − 1, all alike: free, active (some sequence needs it) or cached (a page that none needs now).

    Invariant: free + active + cached == num_slots.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest on top: a small load touches little memory
        self._states: list[SlotState] = ["free"] * num_slots
        self.num_active = 0
        self.num_cached = 0
        self.peak_active = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` slots, or None if there are not so many: then none is taken."""
        if count > len(self._free):
            return None
        slots = [self._free.pop() for _ in range(count)]
        for slot in slots:
            self._states[slot] = "active"
        self._count_active(count)
        return slots

    def give_back(self, slots: Many[int]) -> None:
        """Active or cached ones are free again."""
        for slot in slots:
            assert self._states[slot] != "free", f"slot {slot} was free already"
            if self._states[slot] == "active":
                self.num_active -= 1
            else:
                self.num_cached -= 1
            self._states[slot] = "free"
        self._free += reversed(slots)

    def keep(self, slot: int) -> None:
        """An active one is only cached now."""
        assert self._states[slot] == "active"
        self._states[slot] = "cached"
        self.num_active -= 1
        self.num_cached += 1

    def reuse(self, slot: int) -> None:
        """A cached one is active again."""
        assert self._states[slot] == "cached"
        self._states[slot] = "active"
        self.num_cached -= 1
        self._count_active(1)

    def _count_active(self, more: int) -> None:
        self.num_active += more
        self.peak_active = max(self.peak_active, self.num_active)

    def check_integrity(self) -> None:
        """For tests."""
        counts = [self._states.count(state) for state in ("free", "active", "cached")]
        assert counts == [self.num_free, self.num_active, self.num_cached]
        assert sum(counts) == self.num_slots


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
