"""Prompts of random English words, each about one token in any common vocabulary, no two alike.

Knows no tokenizer: how many words make the tokens asked for is the preflight's to find out.
"""

import random
from dataclasses import dataclass

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
class PromptMaker:
    """The prompt of a request depends on `seed` and its index alone, and differs from its first word on."""

    num_words: int
    seed: int

    def make(self, index: int) -> str:
        return random_words(self.num_words, f"{self.seed}/{index}")


def random_words(num_words: int, seed: str) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=num_words))
