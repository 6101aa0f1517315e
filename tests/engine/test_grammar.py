"""A grammar decides which tokens may come: with a small byte vocabulary, and with no model at all."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
from llguidance import LLMatcher
from test_engine_steps import tiny_layout

from gear_engine.engine import Engine, Limits
from gear_engine.grammar import Grammars, stacked, unpacked
from gear_engine.prefix_cache import Move
from gear_engine.protocol import AddRequest, RequestError, SamplingParams
from gear_engine.runner import RunResult
from gear_engine.sampler import Sampler, SamplingRow
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Scheduled, Sequence
from gear_engine.slots import SlotAllocator

EOS, PADDED = 256, 300  # a vocabulary of all bytes and an end; the output layer is wider


class RandomRunner:
    """Logits without a pattern: what comes out well formed is so because of the grammar."""

    def __init__(self, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self.random = torch.Generator().manual_seed(0)

    def move(self, moves: list[Move]) -> None:
        pass

    def keep_drawn(self, sequences: list[Sequence], tokens: list[torch.Tensor]) -> None:
        pass

    def peak_memory_bytes(self) -> int:
        return 0

    def run(self, scheduled: list[Scheduled]) -> RunResult:
        logits = torch.randn(sum(item.samples for item in scheduled), PADDED, generator=self.random) * 3
        return RunResult(logits, [], torch.zeros(len(scheduled), dtype=torch.bool))


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Grammars(folder, [EOS])


def engine(grammars: Grammars | None, overlaps: bool = False) -> Engine:
    scheduler = Scheduler(
        SlotAllocator(200), tiny_layout("near-lossless"), max_running=4, max_batch_tokens=64, eos_token_ids=[EOS]
    )
    return Engine(scheduler, RandomRunner(overlaps), Sampler(PADDED, [EOS]), Limits(400, PADDED), grammars)


def text_of(grammars: Grammars, token_ids: list[int]) -> str:
    text: str = grammars._tokenizer.decode_str([token for token in token_ids if token != EOS])
    return text


def run(target: Engine) -> dict[str, tuple[list[int], str | None]]:
    """Tokens and finish reason of every request."""
    ended: dict[str, tuple[list[int], str | None]] = {}
    while target.has_work:
        for output in target.step().outputs:
            assert output.error is None
            before = ended.get(output.request_id, ([], None))[0]
            ended[output.request_id] = (before + output.token_ids, output.finish_reason)
    return ended


@pytest.mark.parametrize("overlaps", [False, True])
def test_random_logits_follow_their_grammars_side_by_side(grammars: Grammars, overlaps: bool) -> None:
    target = engine(grammars, overlaps)
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    wanted = {
        "regex": LLMatcher.grammar_from_regex("[a-f]{3}-[0-9]{2}"),
        "json": LLMatcher.grammar_from_json_schema(schema | {"additionalProperties": False}),
        "choice": LLMatcher.grammar_from_lark('start: "yes" | "no"'),
        "free": "",
    }
    for name, grammar in wanted.items():
        target.add(AddRequest(name, [1, 2], SamplingParams(max_tokens=200, grammar=grammar, temperature=0.7, seed=1)))
    ended = run(target)
    texts = {name: text_of(grammars, tokens) for name, (tokens, _) in ended.items() if name != "free"}
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", texts["regex"])
    assert set(json.loads(texts["json"])) == {"on"}
    assert texts["choice"] in ("yes", "no")
    assert all(ended[name][1] == "stop" for name in texts)
    assert all(ended[name][0][-1] == EOS for name in texts)


def test_an_answer_that_is_cut_says_length(grammars: Grammars) -> None:
    target = engine(grammars)
    target.add(
        AddRequest("a", [1], SamplingParams(max_tokens=5, grammar=LLMatcher.grammar_from_regex("[a-z]{20}"), seed=1))
    )
    tokens, reason = run(target)["a"]
    assert (len(tokens), reason) == (5, "length")


def test_a_grammar_goes_on_where_a_preempted_sequence_was(grammars: Grammars) -> None:
    target = engine(grammars)
    grammar = LLMatcher.grammar_from_regex("[a-f]{30}!")
    target.add(AddRequest("a", [1], SamplingParams(max_tokens=100, grammar=grammar, seed=1)))
    tokens: list[int] = []
    while target.has_work:
        if len(tokens) == 10:
            target.scheduler._preempt(target.scheduler.running[0])
        tokens += target.step().outputs[0].token_ids
    assert re.fullmatch("[a-f]{30}!", text_of(grammars, tokens))


def test_one_that_cannot_be_compiled_is_refused(grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="unclosed group"):
        grammars.matcher(LLMatcher.grammar_from_regex("(a"))
    with pytest.raises(RequestError, match="follows no grammars"):
        engine(None).add(AddRequest("a", [1], SamplingParams(max_tokens=1, grammar='start: "a"')))


def test_a_model_without_a_usable_tokenizer_refuses_grammars_only(tmp_path: Path) -> None:
    target = engine(Grammars(tmp_path, [EOS]))
    with pytest.raises(RequestError, match="can follow no grammar"):
        target.add(AddRequest("a", [1], SamplingParams(max_tokens=1, grammar='start: "a"')))
    target.add(AddRequest("b", [1], SamplingParams(max_tokens=1)))
    assert run(target)["b"][1] is not None


@pytest.mark.parametrize("more", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_what_contradicts_a_grammar_is_refused_by_name(grammars: Grammars, more: dict[str, int]) -> None:
    with pytest.raises(RequestError) as refused:
        engine(grammars).add(AddRequest("a", [1], SamplingParams(max_tokens=5, grammar='start: "a"', **more)))  # type: ignore[arg-type]
    assert refused.value.param == next(iter(more))


def test_a_compiled_grammar_is_kept_and_not_shared(grammars: Grammars) -> None:
    first, second = (grammars.matcher('start: "abc"') for _ in range(2))
    assert first.consume_token(grammars._tokenizer.tokenize_str("a")[0])
    fresh = grammars.allowed([grammars.matcher('start: "abc"')])
    assert torch.equal(grammars.allowed([second]), fresh)
    assert not torch.equal(grammars.allowed([first]), fresh)


def test_bits_become_tokens_and_those_beyond_them_are_not_allowed() -> None:
    words = stacked([torch.tensor([1 - 2**31, 2], dtype=torch.int32), None], 70)
    assert words is not None
    allowed = unpacked(words, 70)
    assert allowed[0].nonzero().flatten().tolist() == [0, 31, 33]
    assert allowed[1].all()
    assert allowed.shape == (2, 70)
    assert stacked([None, None], 70) is None


def test_a_mask_hides_no_poison_and_leaves_neighbours_alone() -> None:
    logits = torch.zeros(4, 40)
    logits[0, 5], logits[1, 5], logits[3, 9] = float("nan"), float("inf"), 1.0
    only_two = torch.tensor([4, 0], dtype=torch.int32)  # token 2
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    rows = [SamplingRow(greedy, 0, 0, allowed=only_two) for _ in range(3)] + [SamplingRow(greedy, 0, 0)]
    assert Sampler(40, []).sample(logits, rows) == [None, None, 2, 9]


def test_log_probabilities_travel_with_their_tokens_where_steps_overlap(grammars: Grammars) -> None:
    for overlaps in (False, True):
        target = engine(grammars, overlaps)
        target.add(AddRequest("a", [1, 2, 3], SamplingParams(max_tokens=5, temperature=0.0, logprobs=1)))
        outputs = []
        while target.has_work:
            outputs += target.step().outputs
        assert len(outputs) == 5
        for output in outputs:
            assert output.logprobs is not None
            assert [one.rank for one in output.logprobs] == [1]
            assert output.logprobs[0].top[0][0] == output.token_ids[0]
