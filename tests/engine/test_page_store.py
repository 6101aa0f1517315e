"""Prefixes on disk: found after a restart, bit for bit; anything else in the directory does no harm."""

import hashlib
import logging
import os
from pathlib import Path

import pytest
from greedy import generate, parts_only_at_near_ties
from test_engine_steps import ScriptedRunner, engine, run
from test_prefix_cache import SYSTEM, ask, cached_tokens, computed
from test_same_answers import ARCHITECTURES, tiny_model

from gear_compression import PRESETS, layout_for
from gear_engine.page_store import CacheDirError, PageStore, StoredPage, weights_identity
from gear_engine.protocol import EngineStartError

PAGE = 1000  # bytes
FILE = PAGE + 76 + 4 + 32


def store_in(folder: Path, *, identity: bytes = bytes(32), max_bytes: int = 10**6, page_bytes: int = PAGE) -> PageStore:
    return PageStore(folder, max_bytes, identity, page_bytes)


def page(store: PageStore, number: int, salt: str = "") -> StoredPage:
    tokens = number.to_bytes(4, "little")
    return StoredPage(store.key(store.identity, salt, tokens), tokens)


def data(number: int) -> bytes:
    return bytes([number]) * PAGE


def saved(folder: Path, *numbers: int) -> list[Path]:
    store = store_in(folder)
    for number in numbers:
        store.save(page(store, number), data(number))
    store.close()
    return [folder / store._name(page(store, number).key) for number in numbers]


def test_pages_come_back_after_a_restart_as_they_were(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    store = store_in(tmp_path)
    pages = [page(store, number) for number in (1, 2, 3, 4)]
    assert [store.has(one.key) for one in pages] == [True, True, True, False]
    assert store.read(pages[:3]).result() == [data(1), data(2), data(3)]
    assert (store.num_read, store.num_bytes) == (3, 3 * FILE)
    store.close()


def test_a_key_binds_parent_tokens_salt_and_model(tmp_path: Path) -> None:
    store, other = store_in(tmp_path / "a"), store_in(tmp_path / "b", identity=b"x" * 32)
    keys = [
        store.key(store.identity, "", b"1234"),
        store.key(store.key(store.identity, "", b"1234"), "", b"1234"),
        store.key(store.identity, "1234", b""),
        store.key(store.identity, "", b"1235"),
        other.key(other.identity, "", b"1234"),
    ]
    assert len(set(keys)) == len(keys)
    store.close()
    other.close()


@pytest.mark.parametrize(
    "harm",
    [
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"",
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: os.urandom(len(content)),
        lambda content: content[:8] + b"y" * 32 + content[40:-32] + hashlib.sha256(b"y").digest(),
    ],
    ids=["torn", "longer", "empty", "a bit of the page", "a bit of the checksum", "garbage", "another model"],
)
def test_a_file_that_is_not_whole_is_removed_and_what_is_before_it_is_read(
    tmp_path: Path, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    _, path, _ = saved(tmp_path, 1, 2, 3)
    path.write_bytes(harm(path.read_bytes()))  # type: ignore[operator]
    store = store_in(tmp_path)
    assert store.read([page(store, number) for number in (1, 2, 3)]).result() == [data(1)]
    assert not path.exists()
    assert not store.has(page(store, 2).key)
    assert "removed" in caplog.text
    store.close()


def test_a_whole_page_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    second.write_bytes(first.read_bytes())
    store = store_in(tmp_path)
    assert store.read([page(store, 2)]).result() == []
    store.close()


def test_files_that_are_not_ours_are_left_alone_and_half_written_ones_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (path,) = saved(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.gearpage").mkdir()
    half = path.with_name(path.name + ".new")
    half.write_bytes(b"half")
    other = store_in(tmp_path, identity=b"x" * 32, max_bytes=3 * FILE)
    assert (tmp_path / "notes.txt").exists()
    assert not half.exists()
    assert "1 pages of another model or format" in caplog.text
    assert "2 files in it are not pages" in caplog.text
    for number in (2, 3, 4):
        other.save(page(other, number), data(number))
    other.close()
    assert not path.exists()  # another model's page went first
    assert all(other.has(page(other, number).key) for number in (2, 3, 4))


def test_the_directory_stays_within_its_space_and_the_longest_unused_goes_first(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    store = store_in(tmp_path, max_bytes=3 * FILE)
    store.read([page(store, 1)]).result()
    store.save(page(store, 4), data(4))
    store.close()
    assert [store.has(page(store, number).key) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.gearpage")) == store.num_bytes == 3 * FILE
    smaller = store_in(tmp_path, max_bytes=FILE)
    assert [smaller.has(page(smaller, number).key) for number in (1, 3, 4)] == [False, False, True]
    smaller.close()


def test_a_page_is_there_while_it_is_being_written_and_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    store = store_in(tmp_path, page_bytes=200 * 2**20)
    store._writer.submit(lambda: store.read([page(store, 1)]).result())  # the writer is busy until this has been read
    large = bytes(200 * 2**20)
    store._pending[page(store, 1).key] = large
    assert store.has(page(store, 1).key)
    assert store.wants(page(store, 2).key)
    store._pending[page(store, 2).key] = large
    assert not store.wants(page(store, 3).key)
    assert store.read([page(store, 1)]).result()[0] is large
    store.close()


def test_a_directory_serves_one_server_at_a_time(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    with pytest.raises(CacheDirError, match="in use by another server"):
        store_in(tmp_path)
    store.close()
    store_in(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheDirError, match="choose another one"):
        store_in(tmp_path / "file")


def test_a_second_engine_computes_only_what_the_first_did_not_save(tmp_path: Path) -> None:
    for round_, expected in enumerate((300, 300 - 256)):
        runner = ScriptedRunner()
        target = engine(runner, store=store_in(tmp_path, page_bytes=4))
        ask(target, "a", SYSTEM, salt="s", max_tokens=1)
        outputs = run(target)
        assert computed(runner, "a") == expected
        assert cached_tokens(outputs["a"]) == round_ * 256
        assert len(runner.loaded) == round_ * 2
        ask(target, "b", SYSTEM, salt="another", max_tokens=1)
        assert cached_tokens(run(target)["b"]) == round_ * 256  # its own pages
        target.close()
    assert target.stats().cache_dir_read_total == 4
    assert target.stats().cache_dir_saved_total == 0


def test_evicted_pages_go_to_the_directory_and_are_read_while_others_decode(tmp_path: Path) -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=16, store=store_in(tmp_path, page_bytes=4))
    ask(target, "first", SYSTEM)
    run(target)
    for number in range(3, 9):  # each takes the slots of those before it
        ask(target, str(number), [number] * 390)
        run(target)
    target.scheduler.cache.store._writer.submit(int).result()
    assert target.stats().cache_dir_saved_total >= 2
    ask(target, "decodes", [1] * 10, max_tokens=60)
    target.step()
    ask(target, "second", SYSTEM)
    assert cached_tokens(run(target)["second"]) == 256
    assert runner.loaded
    target.close()


@pytest.mark.parametrize("preset", ["near-lossless", "none"])
def test_restored_pages_have_the_same_bits_and_answers_do_not_depend_on_them(tmp_path: Path, preset: str) -> None:
    loaded = tiny_model(tmp_path / "model", ARCHITECTURES["llama"])
    layout = layout_for(PRESETS[preset], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 4)
    prompts = [SYSTEM, SYSTEM[:200] + [5] * 150]
    checksums, texts = [], []
    for _ in range(2):
        store = PageStore(tmp_path / "pages", 10**9, bytes(32), layout.page_bytes)
        answer, runner, scheduler = generate(loaded, prompts, preset, store=store)
        pages = scheduler.cache._index.values()
        assert len(pages) >= 3
        bits = {p.key: hashlib.sha256(runner.read_page(p.slot, in_host=False)).hexdigest() for p in pages}
        checksums.append(bits)
        texts.append(answer)
    assert store.num_read >= 3
    assert all(checksums[0][key] == value for key, value in checksums[1].items() if key in checksums[0])
    assert all(parts_only_at_near_ties(a, b, runner, str(i)) for i, (a, b) in enumerate(zip(*texts, strict=True)))


def test_the_identity_is_of_weights_type_and_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 1000)
    layouts = [layout_for(PRESETS[name], 2, 2, 64, 4) for name in ("near-lossless", "balanced", "none")]
    layouts.append(layout_for(PRESETS["near-lossless"], 2, 2, 64, 4, "tiles"))
    seen = [weights_identity(tmp_path, layout, "float32") for layout in layouts]
    seen.append(weights_identity(tmp_path, layouts[0], "bfloat16"))
    os.utime(weights, (1, 1))
    assert weights_identity(tmp_path, layouts[0], "float32") == seen[0]
    weights.write_bytes(b"a" * 999 + b"b")
    seen.append(weights_identity(tmp_path, layouts[0], "float32"))
    assert len(set(seen)) == len(seen)


def test_a_wrong_space_is_refused() -> None:
    from gear_engine.config import EngineConfig
    from gear_engine.start import planned_memory

    for space in ("auto", "much", "0", "5"):
        with pytest.raises(EngineStartError, match="--cache-dir-space"):
            planned_memory(EngineConfig(cache_dir="x", cache_dir_space=space))
    with pytest.raises(EngineStartError, match="--no-prefix-cache"):
        planned_memory(EngineConfig(cache_dir="x", prefix_cache=False))
