"""Sealed pages by what they hold: those of running sequences and, until their slots are needed, those of past ones.

A page is known by the chain (page before it, cache salt, its tokens), compared token by token and not by a digest, so
that no text is ever taken for another. Its position follows from the chain; its model and format are the pool's.
Integers only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gear_engine.slots import SlotAllocator


@dataclass(slots=True, eq=False)
class Page:
    """A sealed page. Whoever holds it holds all pages before it, so a page without holders has none after it either."""

    slot: int
    parent: "Page | None"  # the page before it
    salt: str
    tokens: bytes  # as `Sequence.page_tokens` gives them
    num_holders: int = 0  # sequences that attend to it
    num_children: int = 0  # indexed pages that go on from it


class PrefixCache:
    """The pool's sealed pages. Those that nobody holds are cached, and evicted when slots run out: the longest unused
    first, and of a chain the last page first."""

    def __init__(self, allocator: SlotAllocator, *, enabled: bool = True) -> None:
        """Not `enabled`: nothing is found, and a page is free as soon as its sequence ends."""
        self.allocator = allocator
        self.enabled = enabled
        self._index: dict[tuple[Page | None, str, bytes], Page] = {}
        # In the order in which their last holders left. A sequence lets go of its last page first, and holds no page
        # without those before it: so children stand before their parents, and the first is always a leaf.
        self._unheld: dict[Page, None] = {}

    def find(self, salt: str, page_tokens: Iterable[bytes]) -> list[Page]:
        """The longest chain from the first page on."""
        found: list[Page] = []
        for tokens in page_tokens:
            page = self._index.get((found[-1] if found else None, salt, tokens))
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Iterable[Page]) -> None:
        for page in pages:
            if not page.num_holders:
                del self._unheld[page]
                self.allocator.reuse(page.slot)
            page.num_holders += 1

    def release(self, pages: list[Page]) -> None:
        """The opposite of `hold`, for all pages of a sequence, in their order."""
        for page in reversed(pages):
            page.num_holders -= 1
            assert page.num_holders >= 0
            if page.num_holders:
                continue
            if self.enabled:
                self.allocator.keep(page.slot)
                self._unheld[page] = None
            else:
                self.allocator.give_back([page.slot])

    def add(self, parent: Page | None, salt: str, tokens: bytes, slot: int) -> Page:
        """The page of these tokens, held: a new one in `slot`, or the one there is already, and then `slot` is free."""
        key = (parent, salt, tokens)
        page = self._index.get(key)
        if page is not None:
            self.allocator.give_back([slot])
            self.hold([page])
            return page
        page = Page(slot, parent, salt, tokens, num_holders=1)
        if self.enabled:
            self._index[key] = page
            if parent is not None:
                parent.num_children += 1
        return page

    def take(self, count: int) -> list[int] | None:
        """`count` slots, evicting as few pages as need be; None if there are not so many: then nothing is evicted."""
        missing = count - self.allocator.num_free
        if missing > len(self._unheld):
            return None
        for _ in range(missing):
            self._evict(next(iter(self._unheld)))
        return self.allocator.take(count)

    def _evict(self, page: Page) -> None:
        assert not page.num_children, "a page is evicted after those that follow it"
        del self._unheld[page]
        del self._index[page.parent, page.salt, page.tokens]
        if page.parent is not None:
            page.parent.num_children -= 1
        self.allocator.give_back([page.slot])

    def check_integrity(self, held: Iterable[Page]) -> None:
        """`held`: the pages of all sequences, once for each that holds them. For tests."""
        holders: dict[Page, int] = dict.fromkeys(self._index.values(), 0)
        for page in held:
            holders[page] = holders.get(page, 0) + 1
        assert all(page.num_holders == count for page, count in holders.items())
        assert self._unheld.keys() == {page for page, count in holders.items() if not count}
        assert len(self._unheld) == self.allocator.num_cached
        children = dict.fromkeys(self._index.values(), 0)
        for key, page in self._index.items():
            assert key == (page.parent, page.salt, page.tokens)
            if page.parent is not None:
                children[page.parent] += 1  # a KeyError: it outlived the page before it
                assert page.parent.num_holders >= page.num_holders
        assert all(page.num_children == count for page, count in children.items())
