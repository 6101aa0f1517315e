"""Stop strings are found however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gear_server.stop_strings import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    strings = StopStrings(stops, include)
    text = "".join(map(strings.feed, pieces))
    return text + strings.flush(), strings.matched


def first_match(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the stop string that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_the_first_stop_string_to_be_completed_cuts_the_text(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == first_match("".join(pieces), stops)


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_what_has_been_given_never_has_to_be_taken_back(pieces: list[str], stops: list[str]) -> None:
    strings = StopStrings(stops)
    final, _ = first_match("".join(pieces), stops)
    given_so_far = ""
    for piece in pieces:
        given_so_far += strings.feed(piece)
        assert final.startswith(given_so_far)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    strings = StopStrings(["###"])
    assert strings.feed("one #") == "one "
    assert strings.feed("#two") == "##two"
    assert strings.feed("##") == ""
    assert strings.flush() == "##"


def test_the_stop_string_can_stay_in_the_output() -> None:
    assert run(["a", "EN", "D", "more"], ["END"], include=True) == ("aEND", "END")


@pytest.mark.parametrize("pieces", [["text"], ["t", "e", "x", "t"], []])
def test_without_stop_strings_text_passes_untouched(pieces: list[str]) -> None:
    assert run(pieces, []) == ("".join(pieces), None)
