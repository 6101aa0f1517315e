"""What each request asks: prompts of random English words or from a file, a shared beginning, turns of a conversation.

A request depends on the seed and its index alone. Knows no tokenizer: `Vocabulary` says how many words make a token.
"""

import random
from dataclasses import dataclass, field

from gear_loadtest.lengths import Lengths
from gear_loadtest.rows import Row

# One token each, with or without a leading space, in a vocabulary as small as SmolLM2's 49k.
_TEXT = (
    "the and of to in is that for it as with on be at by this had not are but from or have an they which one you were "
    "her all she there would their we him been has when who will more no if out so said what up its about into than "
    "them can only other new some could time these two may then do first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get here between both "
    "life being under never day same another know while last might us great old year off come since against go came "
    "right used take three states few house use during without again place around however home small found thought "
    "went say part once general high upon school every water food night light land city river table paper stone "
    "letter story music color green white black sound voice heart hand head face road field horse bird fish summer "
    "winter window door king ship forest"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Measured in the preflight; one word a token where the server cannot say."""

    tokens_per_word: float = 1.0
    num_special_tokens: float = 0.0  # at the start of a prompt

    def num_words(self, num_tokens: int) -> int:
        return max(1, round((num_tokens - self.num_special_tokens) / self.tokens_per_word))


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: str
    output_len: int


@dataclass(frozen=True, slots=True)
class Workload:
    input_len: Lengths
    output_len: Lengths
    vocabulary: Vocabulary
    seed: int
    prefix_len: int = 0  # tokens that every prompt begins with
    rows: list[Row] = field(default_factory=list)  # taken in turn, if any; they go before the lengths

    def ask(self, index: int, history: str = "") -> Ask:
        """`history`: what was said before in this conversation, answers too; a turn adds to it."""
        draws = random.Random(f"{self.seed}/{index}")
        row = self.rows[index % len(self.rows)] if self.rows else _NO_ROW
        input_len = row.input_len or self.input_len.draw(draws)
        output_len = row.output_len or self.output_len.draw(draws)
        if row.prompt is not None:
            return Ask(f"{history}\n{row.prompt}" if history else row.prompt, output_len)
        num_words = self.vocabulary.num_words(input_len)
        if history:
            return Ask(f"{history}\n{_words(num_words, draws)}", output_len)
        num_shared = min(num_words - 1, self.vocabulary.num_words(self.prefix_len)) if self.prefix_len else 0
        shared = _words(num_shared, random.Random(f"{self.seed}/prefix"))
        return Ask(f"{shared} {_words(num_words - num_shared, draws)}".lstrip(), output_len)


_NO_ROW = Row(None, None, None, None)


def _words(num: int, draws: random.Random) -> str:
    return " ".join(draws.choices(_WORDS, k=num))


def sample_words(num_words: int) -> str:
    """The same every time: to count the tokens of."""
    return _words(num_words, random.Random("calibration"))
