"""The tokenizer's files decide, and nothing is cut in silence."""

import asyncio
from pathlib import Path

import pytest
from small_tokenizers import BOS, byte_level, write_model

from gear_server.tokenizer import TextTokenizer, TokenizerError


def test_a_truncation_setting_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=50)
    loaded = TextTokenizer(write_model(tmp_path / "model", tokenizer))
    text = "a long text of many tokens"
    token_ids = loaded.encode(text, add_special_tokens=True)
    assert loaded.decode(token_ids, skip_special_tokens=False) == text


def test_special_tokens_may_be_strings_or_objects_in_the_config(tmp_path: Path) -> None:
    loaded = TextTokenizer(write_model(tmp_path / "model", byte_level(), config={"pad_token": None}))
    assert loaded.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def test_add_bos_token_is_honoured_where_the_file_does_not_add_one(tmp_path: Path) -> None:
    tokenizer = byte_level()
    bos_id = tokenizer.token_to_id(BOS)
    loaded = TextTokenizer(write_model(tmp_path / "model", tokenizer, config={"add_bos_token": True}))
    assert loaded.encode("a", add_special_tokens=True)[0] == bos_id
    assert loaded.encode(BOS + "a", add_special_tokens=True).count(bos_id) == 1
    assert bos_id not in loaded.encode("a", add_special_tokens=False)


def test_a_text_never_has_fewer_tokens_than_the_quick_estimate(tmp_path: Path) -> None:
    loaded = TextTokenizer(write_model(tmp_path / "model", byte_level()))
    for text in ["", "a", "Hello world " * 50, "12345" * 40, "<tool><tool><tool>"]:
        assert loaded.min_tokens_of(text) <= len(loaded.encode(text, add_special_tokens=False))
    assert loaded.min_tokens_of("x" * 10_000) > 100


def test_a_folder_without_tokenizer_json_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_a_broken_tokenizer_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        TextTokenizer(tmp_path)


async def test_encoding_in_a_thread_lets_the_event_loop_go_on(tmp_path: Path) -> None:
    loaded = TextTokenizer(write_model(tmp_path / "model", byte_level()))
    encoding = asyncio.create_task(asyncio.to_thread(loaded.encode, "some words " * 50_000, add_special_tokens=True))
    num_turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        num_turns += 1
    assert num_turns > 20, "while the library holds the interpreter, there are two or three"
