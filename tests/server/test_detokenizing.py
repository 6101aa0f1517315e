"""Detokenising token by token gives the text that decoding all of them gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_fallback, byte_level, metaspace, write_model
from tokenizers import Tokenizer, decoders

from gear_server.detokenizer import REPLACEMENT, ByteLevelDetokenizer, WindowDetokenizer
from gear_server.tokenizer import TextTokenizer

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("models") / request.param
    return TextTokenizer(write_model(folder, TOKENIZERS[request.param]()))


def pieces_of(tokenizer: TextTokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


def vocabulary(tokenizer: TextTokenizer) -> st.SearchStrategy[int]:
    """Every token, special ones too, and some ids that no token has."""
    return st.integers(0, len(tokenizer._vocab_ids) + 2)


@given(data=st.data())
def test_streamed_text_is_the_whole_text(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(st.lists(vocabulary(tokenizer), max_size=40))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    streamed = "".join(pieces_of(tokenizer, token_ids))
    # A byte-fallback decoder takes back characters of a run of bytes that later turns invalid; a stream cannot.
    if REPLACEMENT not in whole or isinstance(tokenizer.detokenizer(), ByteLevelDetokenizer):
        assert streamed == whole


@given(text=st.text(max_size=60))
def test_no_piece_of_a_text_has_half_a_character(tokenizer: TextTokenizer, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert not any(REPLACEMENT in piece for piece in pieces_of(tokenizer, token_ids))


def test_an_emoji_of_several_tokens_arrives_in_one_piece(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path / "model", byte_level()))
    token_ids = tokenizer.encode("🦜", add_special_tokens=False)
    assert len(token_ids) > 1
    assert [piece for piece in pieces_of(tokenizer, token_ids) if piece] == ["🦜"]


def test_half_a_character_at_the_end_is_given_when_no_token_follows(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path / "model", byte_level()))
    token_ids = tokenizer.encode("🦜", add_special_tokens=False)[:-1]
    *pieces, last = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == ""
    assert last == REPLACEMENT


def test_a_space_inside_the_text_survives_where_decoders_strip_the_first_one(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path / "model", byte_fallback()))
    assert isinstance(tokenizer.detokenizer(), WindowDetokenizer)
    ids = [tokenizer._tokenizer.token_to_id(piece) for piece in ("▁hello", "▁", "▁world", "▁", "▁", "▁hello")]
    assert "".join(pieces_of(tokenizer, ids)) == "hello  world   hello"


def test_a_token_without_text_does_not_make_the_next_one_look_like_the_first(tmp_path: Path) -> None:
    library = byte_fallback()
    library.decoder = decoders.Sequence(
        [decoders.Replace("c", ""), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = TextTokenizer(write_model(tmp_path / "model", library))
    ids = [library.token_to_id(piece) for piece in ("▁hello", "c", "▁world", "c", "c", "▁hello")]
    assert "".join(pieces_of(tokenizer, ids)) == "hello world hello"


def test_endless_invalid_bytes_are_not_held_for_ever(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path / "model", byte_fallback()))
    continuation_byte = tokenizer._tokenizer.token_to_id("<0x82>")
    pieces = pieces_of(tokenizer, [continuation_byte] * 100)
    assert any(pieces[:20])
    assert "".join(pieces) == REPLACEMENT * 100


def test_spaces_without_end_do_not_grow_the_window(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(write_model(tmp_path / "model", byte_fallback()))
    space = tokenizer._tokenizer.token_to_id("▁")
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, WindowDetokenizer)
    text = "".join(detokenizer.feed(space) for _ in range(200)) + detokenizer.flush()
    assert text == " " * 199  # the first one is stripped
    assert len(detokenizer._ids) <= 40
