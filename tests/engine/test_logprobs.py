"""Log-probabilities are those of the model, whoever shares the batch, however a prompt is cut, preempted or cached."""

from pathlib import Path

import pytest
import torch
from test_same_answers import ARCHITECTURES, PROMPTS, tiny_model
from transformers import AutoModelForCausalLM

from gear_compression import PRESETS, layout_for
from gear_engine.engine import Engine, Limits
from gear_engine.logprobs import prompt_logprobs
from gear_engine.model_loader import LoadedModel
from gear_engine.protocol import AddRequest, RequestError, RequestOutput, SamplingParams, TokenLogprobs
from gear_engine.runner import ModelRunner
from gear_engine.sampler import Sampler, SamplingRow
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator

TOLERANCE = 1e-3  # float32, raw pages: GEMMs of other shapes round differently


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, torch.nn.Module]:
    """As the engine runs it, and as transformers does."""
    folder: Path = tmp_path_factory.mktemp("llama")
    return tiny_model(folder, ARCHITECTURES["llama"]), AutoModelForCausalLM.from_pretrained(folder).eval()


def engine(loaded: LoadedModel, *, chunk: int = 512, num_slots: int = 200, num_host_slots: int = 0) -> Engine:
    layout = layout_for(PRESETS["none"], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 4)
    runner = ModelRunner(loaded, layout, num_slots, "cpu", num_host_slots)
    scheduler = Scheduler(
        SlotAllocator(num_slots),
        layout,
        max_running=min(8, chunk),
        max_batch_tokens=chunk,
        eos_token_ids=[],
        num_host_slots=num_host_slots,
    )
    return Engine(scheduler, runner, Sampler(loaded.vocab_size, []), Limits(512, loaded.vocab_size))


def run(target: Engine) -> dict[str, RequestOutput]:
    """Everything that each request was told, in one output."""
    told: dict[str, RequestOutput] = {}
    while target.has_work:
        for new in target.step().outputs:
            assert new.error is None
            old = told.get(new.request_id)
            assert new.prompt_logprobs is None or old is None, "once, with the first token"
            told[new.request_id] = RequestOutput(
                new.request_id,
                (old.token_ids if old else []) + new.token_ids,
                logprobs=(old.logprobs or [] if old else []) + (new.logprobs or []),
                prompt_logprobs=old.prompt_logprobs if old else new.prompt_logprobs,
                num_cached_tokens=new.num_cached_tokens,
            )
        target.scheduler.check_integrity()
    return told


def twin(model: torch.nn.Module, token_ids: list[int], num_top: int) -> list[TokenLogprobs]:
    """Of every token but the first, from one plain forward pass."""
    with torch.inference_mode():
        rows = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    told = []
    for row, token in zip(rows[:-1], token_ids[1:], strict=True):
        top = [(i, float(row[i])) for i in row.argsort(descending=True)[:num_top].tolist()]
        told.append(TokenLogprobs(float(row[token]), int((row > row[token]).sum()) + 1, top))
    return told


def assert_close(told: list[TokenLogprobs] | None, expected: list[TokenLogprobs]) -> None:
    assert told is not None
    assert len(told) == len(expected)
    for one, other in zip(told, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=TOLERANCE)
        assert dict(one.top).keys() == dict(other.top).keys() or near_tie(other)
        assert one.rank == other.rank or near_tie(other)


def near_tie(one: TokenLogprobs) -> bool:
    return any(abs(a - b) < 2 * TOLERANCE for (_, a), (_, b) in zip(one.top, one.top[1:], strict=False))


@pytest.mark.parametrize("chunk", [25, 512])
def test_they_are_the_models_own_in_any_chunks_and_any_company(
    models: tuple[LoadedModel, torch.nn.Module], chunk: int
) -> None:
    loaded, plain = models
    target = engine(loaded, chunk=chunk)
    prompts = [PROMPTS[i] for i in (5, 6, 2, 3, 2)]
    asks = [(0, 5), (None, 3), (3, None), (5, 0), (None, None)]  # (logprobs, prompt_logprobs)
    for i, (logprobs, of_prompt) in enumerate(asks):
        params = SamplingParams(
            max_tokens=4, seed=i, temperature=1.5, logit_bias={9: 3.0}, logprobs=logprobs, prompt_logprobs=of_prompt
        )
        target.add(AddRequest(str(i), prompts[i], params))
    for name, output in run(target).items():
        (logprobs, of_prompt), prompt = asks[int(name)], prompts[int(name)]
        expected = twin(plain, prompt + output.token_ids, max(logprobs or 0, of_prompt or 0))
        if logprobs is None:
            assert output.logprobs == []
        else:
            assert_close(output.logprobs, [cut(one, logprobs) for one in expected[len(prompt) - 1 :]])
        if of_prompt is None:
            assert output.prompt_logprobs is None
        else:
            assert_close(output.prompt_logprobs, [cut(one, of_prompt) for one in expected[: len(prompt) - 1]])


def cut(one: TokenLogprobs, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(one.logprob, one.rank, one.top[:num_top])


@pytest.mark.parametrize("num_host_slots", [0, 20])
def test_a_prompt_that_was_preempted_is_told_whole(
    models: tuple[LoadedModel, torch.nn.Module], num_host_slots: int
) -> None:
    loaded, plain = models
    target = engine(loaded, chunk=50, num_host_slots=num_host_slots)
    target.add(AddRequest("asks", PROMPTS[0], SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=1)))
    for _ in range(2):
        target.step()
    target.scheduler._preempt(target.scheduler.running[0])  # as if another sequence needed its slots
    told = run(target)
    assert (target.scheduler.num_swaps_in, target.scheduler.num_preemptions) == ((1, 0) if num_host_slots else (0, 1))
    assert_close(told["asks"].prompt_logprobs, twin(plain, PROMPTS[0], 1))


def test_a_prompt_that_is_cached_is_computed_again_for_whoever_asks(
    models: tuple[LoadedModel, torch.nn.Module],
) -> None:
    loaded, plain = models
    target = engine(loaded)
    prompt, cached = PROMPTS[0], []
    for i, of_prompt in enumerate((None, None, 2)):
        target.add(AddRequest(str(i), prompt, SamplingParams(max_tokens=1, prompt_logprobs=of_prompt)))
        told = run(target)[str(i)]
        cached.append(told.num_cached_tokens)
    assert cached == [0, 192, 0]
    assert_close(told.prompt_logprobs, twin(plain, prompt, 2))


def test_a_prompt_of_one_token_has_none(models: tuple[LoadedModel, torch.nn.Module]) -> None:
    target = engine(models[0])
    target.add(AddRequest("a", [5], SamplingParams(max_tokens=2, prompt_logprobs=3)))
    assert run(target)["a"].prompt_logprobs == []


def test_a_row_without_a_token_leaves_its_neighbours_theirs() -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [2.0, 0.0, 1.0]])
    rows = [SamplingRow(SamplingParams(max_tokens=1, temperature=0.0, logprobs=2), 0, 0) for _ in range(2)]
    sampled = Sampler(3, []).sample(logits, rows)
    assert sampled.tokens == [None, 0]
    told = sampled.logprobs[1]
    assert told is not None
    assert (told.rank, [token for token, _ in told.top]) == (1, [0, 2])
    assert told.logprob == pytest.approx(float(logits[1].log_softmax(-1)[0]))


def test_a_long_prompt_is_looked_at_in_slices() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(150, 20), [i % 20 for i in range(150)]
    told = prompt_logprobs(logits, tokens, [1 + i % 3 for i in range(150)])
    assert [len(one.top) for one in told] == [1 + i % 3 for i in range(150)]
    expected = logits.log_softmax(-1)[range(150), tokens].tolist()
    assert [one.logprob for one in told] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("count", [-1, 21])
def test_more_than_twenty_are_refused(models: tuple[LoadedModel, torch.nn.Module], name: str, count: int) -> None:
    with pytest.raises(RequestError, match=f"{name} must be between 0 and 20") as refused:
        engine(models[0]).add(AddRequest("a", [5], SamplingParams(max_tokens=1, **{name: count})))  # type: ignore[arg-type]
    assert refused.value.param == name
