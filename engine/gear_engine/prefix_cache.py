"""Sealed pages by what they hold: those of running sequences and, until their slots are needed, those of past ones.

A page is known by the chain (page before it, cache salt, its tokens), compared token by token and not by a digest, so
that no text is ever taken for another. Its position follows from the chain; its model and format are the pool's.
A page whose slot is needed goes to host memory while there is room, from there to a directory if there is one, and
comes back when it is found. Integers only: what is to be copied is noted in `moves`.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gear_engine.page_store import PageStore, StoredPage
from gear_engine.slots import SlotAllocator


@dataclass(frozen=True, slots=True)
class Move:
    """The bytes of a slot are to be copied to a slot of host memory, or back."""

    slot: int
    host_slot: int
    out: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Moves in one direction. They may be made while those in the other are, once `after` runs of these are over."""

    out: bool
    moves: list[Move]
    after: int


def runs(moves: list[Move], size: int) -> Iterator[Run]:
    """The same moves, up to `size` at a time, for a bus that carries both directions at once."""
    counts = {True: 0, False: 0}
    touched: dict[tuple[bool, str, int], int] = {}  # by which run of a direction, counted from 1
    for out, group in itertools.groupby(moves, key=lambda move: move.out):
        rest = list(group)
        for batch in (rest[start : start + size] for start in range(0, len(rest), size)):
            places = [place for move in batch for place in (("pool", move.slot), ("host", move.host_slot))]
            yield Run(out, batch, after=max(touched.get((not out, *place), 0) for place in places))
            counts[out] += 1
            touched |= {(out, *place): counts[out] for place in places}


@dataclass(frozen=True, slots=True)
class Save:
    """The bytes of a slot, of the pool or of host memory, are to go to the page store."""

    slot: int
    in_host: bool
    page: StoredPage


@dataclass(frozen=True, slots=True)
class Load:
    """These bytes, from the page store, are to be copied to a slot."""

    slot: int
    data: bytes


@dataclass(slots=True, eq=False)
class Page:
    """A sealed page. Whoever holds it holds all pages before it, so a page without holders has none after it either."""

    slot: int  # of the pool, or of host memory
    parent: "Page | None"  # the page before it
    salt: str
    tokens: bytes  # as `Sequence.page_tokens` gives them
    num_holders: int = 0  # sequences that attend to it
    num_children: int = 0  # indexed pages that go on from it
    in_host: bool = False  # and if so nobody holds it
    key: bytes = b""  # in the page store, if there is one


PageKey = tuple[Page | None, str, bytes]  # the page before it, salt, tokens


class PrefixCache:
    """The pool's sealed pages. Those that nobody holds are cached, and evicted when slots run out: the longest unused
    first, and of a chain the last page first. From host memory they are dropped in the same order."""

    def __init__(self, allocator: SlotAllocator, host: SlotAllocator, store: PageStore | None = None) -> None:
        """`host`: slots of host memory, shared with the open pages of sequences that were swapped out."""
        self.allocator = allocator
        self.host = host
        self.store = store
        # To be made in this order, before the slots are written; whoever does empties it.
        self.moves: list[Move | Save | Load] = []
        self._index: dict[PageKey, Page] = {}
        # In the order in which their last holders left. A sequence lets go of its last page first, and holds no page
        # without those before it: so children stand before their parents, and the first is always a leaf.
        self._unheld: dict[Page, None] = {}
        self._in_host: dict[Page, None] = {}  # in the order in which they left the pool: children first here too

    def find(self, salt: str, page_tokens: Iterable[bytes]) -> list[Page]:
        """The longest chain from the first page on."""
        found: list[Page] = []
        for tokens in page_tokens:
            page = self._index.get((found[-1] if found else None, salt, tokens))
            if page is None:
                break
            found.append(page)
        return found

    def stored(self, found: list[Page], salt: str, page_tokens: Iterable[bytes]) -> list[StoredPage]:
        """The longest chain that goes on from `found` in the page store."""
        stored: list[StoredPage] = []
        if self.store is None:
            return stored
        key = found[-1].key if found else self.store.identity
        for tokens in page_tokens:
            key = self.store.key(key, salt, tokens)
            if not self.store.has(key):
                break
            stored.append(StoredPage(key, tokens))
        return stored

    def load(self, found: list[Page], salt: str, page_tokens: Iterable[bytes], data: list[bytes]) -> list[Page] | None:
        """Put what the page store gave into the pool, after the held chain `found`: held as well; None: no slots."""
        slots = self.take(len(data))
        if slots is None:
            return None
        pages = list(found)
        for tokens, slot, content in zip(page_tokens, slots, data, strict=False):
            self.moves.append(Load(slot, content))
            pages.append(self.add(pages[-1] if pages else None, salt, tokens, slot))
        return pages

    def hold(self, pages: list[Page]) -> bool:
        """Hold a chain, bringing back what is in host memory; False if that finds no slots: then nothing is held."""
        swapped = [page for page in pages if page.in_host]
        resident = pages[: len(pages) - len(swapped)]  # what follows a page in host memory is there too
        for page in resident:
            if not page.num_holders:
                del self._unheld[page]
                self.allocator.reuse(page.slot)
            page.num_holders += 1
        for page in swapped:
            del self._in_host[page]  # lest it makes room there for what makes room for it
        slots = self.take(len(swapped))
        if slots is None:
            self._in_host.update(dict.fromkeys(reversed(swapped)))
            self.release(resident)
            return False
        for page, slot in zip(swapped, slots, strict=True):
            self.moves.append(Move(slot, page.slot, out=False))
            self.host.give_back([page.slot])
            page.slot, page.in_host, page.num_holders = slot, False, 1
        return True

    def release(self, pages: list[Page], *, keep: bool = True) -> None:
        """The opposite of `hold`, for all pages of a sequence, in their order; `keep` them, or free them at once."""
        for page in reversed(pages):
            page.num_holders -= 1
            assert page.num_holders >= 0
            if page.num_holders:
                continue
            if keep:
                self.allocator.keep(page.slot)
                self._unheld[page] = None
            else:
                self.allocator.give_back([page.slot])
                self._forget(page)

    def add(self, parent: Page | None, salt: str, tokens: bytes, slot: int) -> Page:
        """The page of these tokens, held: a new one in `slot`, or the one there is already, and then `slot` is free."""
        key = (parent, salt, tokens)
        page = self._index.get(key)
        if page is not None and page.in_host:  # these are its bytes as well, and no copy is needed
            del self._in_host[page]
            self.host.give_back([page.slot])
            page.slot, page.in_host, page.num_holders = slot, False, 1
        elif page is not None:
            self.allocator.give_back([slot])
            self.hold([page])
        else:
            page = self._index[key] = Page(slot, parent, salt, tokens, num_holders=1)
            if self.store is not None:
                page.key = self.store.key(parent.key if parent else self.store.identity, salt, tokens)
            if parent is not None:
                parent.num_children += 1
        return page

    def take(self, count: int) -> list[int] | None:
        """`count` slots, evicting as few pages as need be; None if there are not so many: then nothing is evicted."""
        missing = count - self.allocator.num_free
        if missing <= 0:
            return self.allocator.take(count)
        if missing > len(self._unheld):
            return None
        # Taken in the order in which they are left, so that what comes in need not wait for all that goes out.
        self.allocator.give_back([self._evict(next(iter(self._unheld))) for _ in range(missing)])
        return self.allocator.take(count)

    def _evict(self, page: Page) -> int:
        """From the pool to host memory, or for good if there is no room; returns the slot, which is not free yet."""
        slot = page.slot
        del self._unheld[page]
        host_slots = self.take_host(1)
        if host_slots is None:
            self._save(page)
            self._forget(page)
            return slot
        self.moves.append(Move(slot, host_slots[0], out=True))
        page.slot, page.in_host = host_slots[0], True
        self._in_host[page] = None
        return slot

    def take_host(self, count: int) -> list[int] | None:
        """Slots of host memory, dropping pages that are there if need be; None if open pages have taken the rest."""
        missing = count - self.host.num_free
        if missing > len(self._in_host):
            return None
        for _ in range(missing):
            page = next(iter(self._in_host))
            del self._in_host[page]
            self.host.give_back([page.slot])
            self._save(page)
            self._forget(page)
        return self.host.take(count)

    def host_slots(self) -> list[int]:
        """Of the pages in host memory."""
        return [page.slot for page in self._in_host]

    def _save(self, page: Page) -> None:
        """Its slot is about to be free, and holds it until the move is made."""
        if self.store is not None and self.store.wants(page.key):
            self.moves.append(Save(page.slot, page.in_host, StoredPage(page.key, page.tokens)))

    def to_save(self) -> list[Save]:
        """All pages that are not in the page store, the last used first and each after the one before it."""
        assert self.store is not None
        held = [page for page in self._index.values() if page.num_holders]
        pages = [*held, *reversed(self._unheld), *reversed(self._in_host)]
        return [Save(p.slot, p.in_host, StoredPage(p.key, p.tokens)) for p in pages if not self.store.has(p.key)]

    def _forget(self, page: Page) -> None:
        assert not page.num_children, "a page is forgotten after those that follow it"
        del self._index[page.parent, page.salt, page.tokens]
        if page.parent is not None:
            page.parent.num_children -= 1

    def check_integrity(self, held: Iterable[Page]) -> None:
        """`held`: the pages of all sequences, once for each that holds them. For tests."""
        holders: dict[Page, int] = dict.fromkeys(self._index.values(), 0)
        for page in held:
            holders[page] = holders.get(page, 0) + 1
        assert all(page.num_holders == count for page, count in holders.items())
        assert self._index.keys() == {(page.parent, page.salt, page.tokens) for page in holders}
        unheld = {page for page, count in holders.items() if not count}
        assert self._unheld.keys() == {page for page in unheld if not page.in_host}
        assert self._in_host.keys() == {page for page in holders if page.in_host} <= unheld
        assert len(self._unheld) == self.allocator.num_cached
        assert len({page.slot for page in self._in_host}) == len(self._in_host)
        children = dict.fromkeys(self._index.values(), 0)
        for key, page in self._index.items():
            assert key == (page.parent, page.salt, page.tokens)
            if page.parent is not None:
                children[page.parent] += 1  # a KeyError: it outlived the page before it
                assert page.parent.num_holders >= page.num_holders
                assert page.in_host or not page.parent.in_host
        assert all(page.num_children == count for page, count in children.items())
