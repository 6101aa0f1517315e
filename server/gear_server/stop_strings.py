"""Stop strings in text that arrives in pieces: what could begin one is held back, what completes one is cut.

The first to be completed wins (the longest, of those completed by the same character), so how the text was cut
into pieces never changes the answer.
"""

from collections.abc import Sequence


class _Match:
    """How much of one stop string the text ends with (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = [0] * len(stop)  # [i]: longest proper border of stop[: i + 1]
        border = 0
        for i in range(1, len(stop)):
            while border and stop[i] != stop[border]:
                border = self._fallback[border - 1]
            border += stop[i] == stop[border]
            self._fallback[i] = border

    def advance(self, char: str) -> bool:
        """True when `char` completes the stop string, which ends the search."""
        matched = self.num_matched
        while matched and char != self.stop[matched]:
            matched = self._fallback[matched - 1]
        self.num_matched = matched + (char == self.stop[matched])
        return self.num_matched == len(self.stop)


class StopStrings:
    """Passes text on until one of `stops` is in it. `matched` then names it, and nothing more comes out."""

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._matches = [_Match(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include = include_in_output
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that no stop string can reach any more."""
        if not self._matches:
            return text
        if self.matched is not None:
            return ""
        for i, char in enumerate(text):
            completed = [match.stop for match in self._matches if match.advance(char)]
            if completed:
                self.matched = completed[0]
                seen = self._held + text[: i + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(self.matched)]
        seen = self._held + text
        num_held = max(match.num_matched for match in self._matches)
        self._held = seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held]

    def flush(self) -> str:
        """What was held back, when no text will follow."""
        held, self._held = self._held, ""
        return held
