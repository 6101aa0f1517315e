"""Sealed pages in a directory: prefixes that memory has no room for go there, and are there after a restart.

It knows files, checksums and a budget of bytes. It refuses to know slots, sequences, and when a page is needed.
"""

import fcntl
import hashlib
import logging
import os
import re
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from gear_compression.layout import Layout, PageLayout

logger = logging.getLogger(__name__)

MAGIC = b"GEARPAGE"
FORMAT = 1  # raise it when the bytes of a page come to mean something else
SUFFIX = ".gearpage"
MAX_PENDING_BYTES = 256 * 2**20  # copied and not written yet; what comes beyond that is not kept
_HEAD = struct.Struct("<8s32s32sI")  # magic, model and format, key, bytes of tokens
_CHECKSUM_BYTES = 32
_NAME = re.compile(rf"[0-9a-f]{{16}}-[0-9a-f]{{64}}{re.escape(SUFFIX)}")


class StoredPage(NamedTuple):
    """A page by what it holds: `key` is a digest of all before it, its salt and its tokens."""

    key: bytes
    tokens: bytes


class CacheDirError(RuntimeError):
    """The directory cannot be used; one sentence that names the remedy."""


def weights_identity(folder: Path, layout: Layout, dtype: str) -> bytes:
    """What a page's bytes mean: every byte of the weights, their configuration, the type they compute in, and the
    format."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_file_digest, files))
    records = layout.layers if isinstance(layout, PageLayout) else ()  # where each part lies, which no setting says
    names = [path.name for path in files]
    return hashlib.sha256(repr((FORMAT, dtype, layout, records, names, digests)).encode()).digest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PageStore:
    """One file a page. Written and read by threads of its own, so that no step waits for a disk.

    A file is written beside its place and moved there whole. What is not whole all the same (a torn write, a foreign
    file under one of our names) fails its checksum when it is read, and is removed. Pages of another model or format
    stay as long as there is room, and go first.
    """

    def __init__(self, directory: Path, max_bytes: int, identity: bytes, page_bytes: int) -> None:
        """Raises `CacheDirError`. `identity`: of the model and the format, 32 bytes; all keys begin with it."""
        self.directory = directory
        self.max_bytes = max_bytes
        self.identity = identity
        self.page_bytes = page_bytes
        self.num_bytes = 0
        self.num_saved = 0
        self.num_read = 0
        self._files: OrderedDict[str, int] = OrderedDict()  # sizes, the longest unused first
        self._pending: dict[bytes, bytes] = {}  # copied and not written yet
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # pages tell what their tokens were
            self._locked = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            self._scan()
        except OSError as error:
            raise CacheDirError(
                f"--cache-dir {directory} cannot be used ({error.strerror}): choose another one"
            ) from error
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._locked)
            raise CacheDirError(f"--cache-dir {directory} is in use by another server: give each its own") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="page writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="page reader")

    def key(self, parent: bytes, salt: str, tokens: bytes) -> bytes:
        """`parent`: the key of the page before it; of the first, `identity`."""
        return hashlib.sha256(parent + hashlib.sha256(salt.encode()).digest() + tokens).digest()

    def has(self, key: bytes) -> bool:
        return key in self._pending or self._name(key) in self._files

    def wants(self, key: bytes) -> bool:
        """Whether to save it: it is not there, and the disk keeps up."""
        return not self.has(key) and len(self._pending) * self.page_bytes < MAX_PENDING_BYTES

    def save(self, page: StoredPage, data: bytes) -> None:
        """Write it soon; until then it is read from memory."""
        self._pending[page.key] = data
        self._writer.submit(self._write_pending, page)

    def save_now(self, page: StoredPage, data: bytes) -> None:
        self._write(page, data)

    def read(self, pages: list[StoredPage]) -> "Future[list[bytes]]":
        """The bytes of these pages, in order, up to the first that is not there or not whole."""
        return self._reader.submit(self._read_all, pages)

    def touch(self, keys: Iterable[bytes]) -> None:
        """They are used: the last named is the last to go."""
        now_ns = time.time_ns()
        for i, key in enumerate(keys):
            name = self._name(key)
            with self._lock:
                if name not in self._files:
                    continue
                self._files.move_to_end(name)
            try:
                os.utime(self.directory / name, ns=(now_ns + i, now_ns + i))
            except OSError:  # gone meanwhile: reading it says so
                continue

    def close(self) -> None:
        """Finish what is to be written."""
        self._reader.shutdown()
        self._writer.shutdown()
        os.close(self._locked)

    def _name(self, key: bytes) -> str:
        return f"{self.identity[:8].hex()}-{key.hex()}{SUFFIX}"

    def _scan(self) -> None:
        own: list[tuple[int, str, int]] = []
        others: list[tuple[int, str, int]] = []
        num_unknown = 0
        for entry in os.scandir(self.directory):
            if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                stat = entry.stat(follow_symlinks=False)
                is_own = entry.name.startswith(self.identity[:8].hex())
                (own if is_own else others).append((stat.st_mtime_ns, entry.name, stat.st_size))
            elif entry.name.endswith(f"{SUFFIX}.new"):
                logger.warning("--cache-dir: %s was not written to its end: removed", entry.name)
                os.unlink(entry.path)
            elif entry.name != "lock":
                num_unknown += 1
        self._files.update((name, size) for _, name, size in [*sorted(others), *sorted(own)])
        self.num_bytes = sum(self._files.values())
        logger.info("--cache-dir %s: %d pages, %.2f GiB", self.directory, len(own), self.num_bytes / 2**30)
        if others:
            logger.info("--cache-dir: %d pages of another model or format are not used and go first", len(others))
        if num_unknown:
            logger.warning("--cache-dir: %d files in it are not pages: left alone", num_unknown)
        self._make_room(0)

    def _write_pending(self, page: StoredPage) -> None:
        try:
            self._write(page, self._pending[page.key])
        finally:
            del self._pending[page.key]

    def _write(self, page: StoredPage, data: bytes) -> None:
        content = _HEAD.pack(MAGIC, self.identity, page.key, len(page.tokens)) + page.tokens + data
        size = len(content) + _CHECKSUM_BYTES
        name = self._name(page.key)
        path, new = self.directory / name, self.directory / f"{name}.new"
        self._make_room(size)
        if size > self.max_bytes:
            return
        try:
            with open(os.open(new, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
                file.write(hashlib.sha256(content).digest())
            os.replace(new, path)
        except OSError as error:  # a full or broken disk costs the cache, not the answers
            logger.warning("--cache-dir: cannot write %s: %s", path, error.strerror)
            new.unlink(missing_ok=True)
            return
        with self._lock:
            self.num_bytes += size - self._files.pop(name, 0)
            self._files[name] = size
            self.num_saved += 1

    def _make_room(self, size: int) -> None:
        while self._files and self.num_bytes + size > self.max_bytes:
            with self._lock:
                oldest = next(iter(self._files))
            self._remove(oldest)

    def _remove(self, name: str) -> None:
        with self._lock:
            self.num_bytes -= self._files.pop(name, 0)
        (self.directory / name).unlink(missing_ok=True)

    def _read_all(self, pages: list[StoredPage]) -> list[bytes]:
        contents: list[bytes] = []
        for page in pages:
            data = self._pending.get(page.key) or self._read(page)
            if data is None:
                break
            contents.append(data)
        self.num_read += len(contents)
        self.touch(page.key for page in reversed(pages[: len(contents)]))  # of a chain the end goes first
        return contents

    def _read(self, page: StoredPage) -> bytes | None:
        name = self._name(page.key)
        try:
            content = (self.directory / name).read_bytes()
        except OSError as error:
            logger.warning("--cache-dir: cannot read %s: %s", name, error.strerror)
            self._remove(name)
            return None
        start = _HEAD.size + len(page.tokens)
        head = _HEAD.pack(MAGIC, self.identity, page.key, len(page.tokens)) + page.tokens
        is_whole = len(content) == start + self.page_bytes + _CHECKSUM_BYTES
        checksum = hashlib.sha256(memoryview(content)[:-_CHECKSUM_BYTES]).digest()
        if not is_whole or content[:start] != head or content[-_CHECKSUM_BYTES:] != checksum:
            logger.warning("--cache-dir: %s is not the page that its name says: removed", name)
            self._remove(name)
            return None
        return content[start:-_CHECKSUM_BYTES]
