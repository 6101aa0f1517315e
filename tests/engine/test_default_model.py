"""The default model, real weights: the same answers however prompts are cut and batched, and the right capital."""

import pytest
import torch
from greedy import generate, parts_only_at_near_ties
from transformers import AutoTokenizer

from gear_engine.model_files import model_folder
from gear_engine.model_loader import LoadedModel, load_model

LONG = (
    "Paged attention keeps the keys and values of a sequence in fixed-size pages, so that memory is never wasted on "
    "lengths that were not reached. A page that is full can be compressed: quantised codes hold most of it, a low-rank "
    "correction what neighbouring channels share, and a sparse part the few entries that would stretch every scale. "
    "Attention then reads the codes as they are. The page being written stays exact, so a token always sees its own "
    "page as it was computed and all earlier pages as they were sealed, whether its prompt came in one piece or many. "
    "That is what makes a cached answer and a fresh one the same, and a preempted request go on where it was. "
    "In other words"
)
TEXTS = [LONG, "The quick brown fox", "Once upon a time", "Water boils at", "The first president of the United States",
         "def add(a, b):", "Roses are red,", "The opposite of hot is"]  # fmt: skip


@pytest.fixture(scope="module")
def smollm() -> tuple[LoadedModel, list[list[int]]]:
    folder = model_folder(None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return load_model(folder, "cpu", torch.float32), [tokenizer(text)["input_ids"] for text in TEXTS]


def test_greedy_answers_do_not_depend_on_chunks_or_neighbours(smollm: tuple[LoadedModel, list[list[int]]]) -> None:
    loaded, prompts = smollm
    assert len(prompts[0]) > 128  # more than a page
    alone = [generate(loaded, [prompt], max_tokens=12) for prompt in prompts]
    identical = 0
    for chunk in (1, 7, 64, 512):
        together, _, _ = generate(loaded, prompts, chunk=chunk, max_tokens=12)
        for (texts, runner, _), other in zip(alone, together, strict=True):
            assert parts_only_at_near_ties(texts[0], other, runner, "0")
            identical += texts[0] == other
    print(f"{identical} of {4 * len(prompts)} texts identical")
    assert identical >= 3 * len(prompts)
