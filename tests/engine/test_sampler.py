"""Tokens are drawn as the parameters say, and nobody else in the batch has a say in it."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_waiting import no_waiting

from gear_engine import sampler
from gear_engine.protocol import SamplingParams
from gear_engine.sampler import NUM_CANDIDATES, Sampler, SamplingRow, uniform

V = 12
EOS = 3


def row(seed: int = 0, position: int = 0, prompt: list[int] = [], output: list[int] = [], **params) -> SamplingRow:  # noqa: B006
    return SamplingRow(SamplingParams(max_tokens=100, **params), seed, position, prompt, output)


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int | None]:
    return Sampler(logits.shape[-1], [EOS]).sample(logits, rows)


def draws(logits: list[float], num_draws: int = 4000, **params) -> Counter[int | None]:
    """How often each token comes in so many draws from one row's logits, each with its own seed."""
    rows = [row(seed, **params) for seed in range(num_draws)]
    return Counter(sample(torch.tensor(logits).expand(num_draws, -1), rows))


def probabilities(logits: list[float], temperature=1.0, min_p=0.0, top_k=0, top_p=1.0) -> dict[int, float]:
    """The plain twin: what is left of one row after every cut, renormalised. Equal logits at an edge stay together."""
    scaled = {token: logit / temperature for token, logit in enumerate(logits)}
    top = max(scaled.values())
    left = {t: math.exp(x - top) for t, x in scaled.items() if math.exp(x - top) >= min_p}
    if top_k:
        kth = sorted(left.values(), reverse=True)[:top_k][-1]
        left = {t: w for t, w in left.items() if w >= kth}
    kept: dict[int, float] = {}
    mass, edge = 0.0, math.inf
    for t, w in sorted(left.items(), key=lambda item: -item[1]):
        if mass < top_p * sum(left.values()) or w == edge:
            kept[t] = edge = w
        mass += w
    return {t: w / sum(kept.values()) for t, w in kept.items()}


def assert_drawn_from(counts: Counter[int | None], expected: dict[int, float]) -> None:
    """Pearson's statistic below its mean by six standard deviations: a right sampler fails once in 10^5 fixed seeds."""
    num_draws = counts.total()
    assert set(counts) <= set(expected)
    statistic = sum((counts[t] - num_draws * p) ** 2 / (num_draws * p) for t, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 1e-9


LOGITS = [0.3, -0.4, 1.1, 0.0, 0.7, -1.0, 0.9, -0.2, 0.5, -0.7, 1.4, 0.1]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"top_p": 0.99},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 0.7, "min_p": 0.2, "top_k": 4, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.5},
    ],
    ids=str,
)
def test_draws_follow_the_probabilities_that_the_cuts_leave(params):
    expected = probabilities(LOGITS, **params)
    counts = draws(LOGITS, **params)
    assert set(counts) == set(expected)
    assert_drawn_from(counts, expected)


def test_one_stream_draws_from_the_distribution_over_its_positions():
    rows = [row(seed=7, position=i) for i in range(4000)]
    counts = Counter(sample(torch.tensor(LOGITS).expand(4000, -1), rows))
    assert_drawn_from(counts, probabilities(LOGITS))


def test_equal_logits_at_the_edge_of_a_cut_stay_in_together():
    assert set(draws([2.0, 1.0, 1.0, 1.0, 0.0], top_k=2)) == {0, 1, 2, 3}
    assert set(draws([2.0, 1.0, 1.0, 1.0, 0.0], top_p=0.6)) == {0, 1, 2, 3}


def test_a_nucleus_wider_than_the_candidates_is_still_exact():
    vocab_size = 4 * NUM_CANDIDATES
    logits = torch.linspace(0.0, 0.5, vocab_size).tolist()
    expected = probabilities(logits, top_p=0.5)
    assert NUM_CANDIDATES < len(expected) < vocab_size
    counts = draws(logits, num_draws=20_000, top_p=0.5)
    assert set(counts) <= set(expected)
    assert len(counts) > 0.99 * len(expected)


def test_a_wide_nucleus_beside_it_does_not_change_a_narrow_one():
    vocab_size = 4 * NUM_CANDIDATES
    flat, peaked = torch.zeros(vocab_size), torch.linspace(0.0, 100.0, vocab_size)
    narrow = [row(seed, top_p=0.9) for seed in range(50)]
    alone = sample(peaked.expand(50, -1), narrow)
    both = sample(torch.cat([peaked.expand(50, -1), flat[None]]), [*narrow, row(0, top_p=0.9)])
    assert both[:50] == alone


def test_temperature_zero_is_argmax_and_a_tie_goes_to_the_lowest_index():
    torch.manual_seed(0)
    logits = torch.randn(20, V)
    logits[0] = 1.0
    logits[1, [4, 9]] = 50.0
    tokens = sample(logits, [row(i, temperature=0.0) for i in range(20)])
    assert tokens == logits.argmax(-1).tolist()
    assert tokens[:2] == [0, 4]


def test_a_greedy_row_beside_a_sampled_one_is_still_argmax():
    torch.manual_seed(0)
    logits = torch.randn(20, V)
    tokens = sample(logits, [row(i, temperature=0.0 if i % 2 else 1.0) for i in range(20)])
    assert tokens[1::2] == logits.argmax(-1).tolist()[1::2]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 1e-5, 1e-3])
def test_a_temperature_next_to_zero_overflows_nothing(temperature):
    assert set(draws([100.0, 101.0, -3e38], num_draws=50, temperature=temperature)) == {1}


def twin_logits(logits: list[float], r: SamplingRow) -> list[float]:
    """vLLM's order: bias and mask, then repetition, then frequency and presence."""
    p = r.params
    result = []
    for token, logit in enumerate(logits):
        logit += p.logit_bias.get(token, 0.0)
        if r.position < p.min_tokens and token in (EOS, *p.stop_token_ids):
            logit = -math.inf
        if token in r.prompt_token_ids or token in r.output_token_ids:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        count = r.output_token_ids.count(token)
        result.append(logit - p.frequency_penalty * count - p.presence_penalty * (count > 0))
    return result


def test_a_repetition_penalty_lowers_small_logits_of_either_sign():
    greedy = row(temperature=0.0, repetition_penalty=2.0, prompt=[0])
    assert sample(torch.tensor([[0.5, 0.3]]), [greedy]) == [1]
    assert sample(torch.tensor([[-0.3, -0.5]]), [greedy]) == [1]


tokens = st.lists(st.integers(0, V - 1), max_size=6)
penalised = st.builds(
    row,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 4),
    prompt=tokens,
    output=tokens,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, -1.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.25, 1.0]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -1.0, 2.0, 100.0]), max_size=3),
    stop_token_ids=st.lists(st.integers(0, V - 1), max_size=2).map(tuple),
    min_tokens=st.integers(0, 3),
    top_k=st.sampled_from([0, 1, 3, V]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
)
# Sixteenths: exact in float32 and float64 alike, under every value above, so twins agree to the bit.
some_logits = st.lists(st.integers(-64, 64).map(lambda n: n / 16), min_size=V, max_size=V)


@given(st.lists(st.tuples(some_logits, penalised), min_size=1, max_size=5))
def test_bias_and_penalties_are_those_of_the_plain_twin(batch):
    rows = [replace(r, params=SamplingParams(**{**as_dict(r.params), "temperature": 0.0})) for _, r in batch]
    expected = []
    for (logits, _), r in zip(batch, rows, strict=True):
        twin = twin_logits(logits, r)
        expected.append(twin.index(max(twin)))
    assert sample(torch.tensor([logits for logits, _ in batch]), rows) == expected


def as_dict(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in params.__struct_fields__}


@settings(max_examples=200)
@given(st.lists(st.tuples(some_logits, penalised), min_size=1, max_size=9), st.randoms())
def test_no_row_depends_on_its_neighbours(batch, random):
    alone = [sample(torch.tensor([logits]), [r])[0] for logits, r in batch]
    order = list(range(len(batch)))
    random.shuffle(order)
    together = sample(torch.tensor([batch[i][0] for i in order]), [batch[i][1] for i in order])
    assert together == [alone[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_row_of_a_real_vocabulary_depends_on_its_neighbours(dtype):
    torch.manual_seed(0)
    vocab_size = 49_157  # odd: rows begin at every alignment
    logits = (torch.randn(9, vocab_size) * 4).to(dtype)
    choices = [
        {"temperature": 2.0},
        {"top_p": 0.9},
        {"top_k": 40},
        {"temperature": 3.0, "top_p": 0.99},
        {"min_p": 0.01},
    ]
    rows = [row(seed, position=seed, **choices[seed % 5]) for seed in range(9)]
    together = sample(logits, rows)
    for i in range(9):
        assert sample(logits[i : i + 1].clone(), rows[i : i + 1]) == together[i : i + 1]
    assert sample(logits[2:7], rows[2:7]) == together[2:7]


def test_a_rerun_draws_the_same_and_another_seed_or_position_does_not():
    logits = torch.zeros(50, 1000)
    first = sample(logits, [row(1, i) for i in range(50)])
    assert sample(logits, [row(1, i) for i in range(50)]) == first
    assert sum(a == b for a, b in zip(first, sample(logits, [row(2, i) for i in range(50)]), strict=True)) < 5
    assert sum(a == b for a, b in zip(first, sample(logits, [row(1, i + 50) for i in range(50)]), strict=True)) < 5


def test_neighbouring_seeds_and_positions_are_uncorrelated():
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert 0.0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.01  # 40,000 numbers: σ of the mean is 0.0014
    for table in (numbers, numbers.T):
        assert abs(torch.corrcoef(torch.stack([table[:-1].flatten(), table[1:].flatten()]))[0, 1]) < 0.03  # σ is 0.005


@pytest.mark.parametrize(("number", "token"), [(0.0, 2), (1 - 2**-53, 4)])
def test_the_smallest_and_largest_numbers_draw_the_first_and_last_token_that_can_be_drawn(number, token, monkeypatch):
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: number)
    assert sample(torch.tensor([[-math.inf, -9.0, 0.0, 0.0, 0.0, -9.0, -math.inf]]), [row(min_p=0.5)]) == [token]


def test_a_seed_may_be_any_integer():
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert uniform(2**70 + 5, 3) == uniform(5, 3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, EOS, V - 1])
def test_a_poisoned_row_is_reported_and_its_neighbours_go_on(poison, where):
    logits = torch.tensor([LOGITS] * 6)
    rows = [
        row(1),
        row(2, top_p=0.9),
        row(3, temperature=0.0),
        row(4, logit_bias={EOS: -100.0}, min_tokens=1),  # the mask must not hide the poison
        row(5, top_k=3),
        row(6, min_p=0.2),
    ]
    clean = sample(logits, rows)
    for bad in range(6):
        poisoned = logits.clone()
        poisoned[bad, where] = poison
        assert sample(poisoned, rows) == [None if i == bad else token for i, token in enumerate(clean)]


def test_a_row_with_nothing_to_choose_from_is_reported():
    nothing = torch.full((2, V), -math.inf)
    assert sample(nothing, [row(), row(temperature=0.0)]) == [None, None]
    only_eos = nothing[:1].clone()
    only_eos[0, EOS] = 1.0
    assert sample(only_eos, [row()]) == [EOS]
    assert sample(only_eos, [row(min_tokens=1)]) == [None]


def test_masked_tokens_are_never_drawn():
    logits = torch.tensor(LOGITS)
    logits[::2] = -math.inf
    assert set(draws(logits.tolist(), num_draws=500, temperature=50.0, top_p=0.999)) <= set(range(1, V, 2))


def test_no_end_is_drawn_before_min_tokens_and_one_may_be_drawn_after():
    eager = [0.0] * V
    eager[EOS], eager[5] = 30.0, 30.0
    early = [row(seed, position=2, min_tokens=3, stop_token_ids=(5,), ignore_eos=seed % 2 == 0) for seed in range(200)]
    assert not {EOS, 5} & set(sample(torch.tensor(eager).expand(200, -1), early))
    due = [row(seed, position=3, min_tokens=3, stop_token_ids=(5,)) for seed in range(200)]
    assert set(sample(torch.tensor(eager).expand(200, -1), due)) == {EOS, 5}


def test_columns_beyond_the_vocabulary_are_no_tokens():
    padded = torch.zeros(100, V + 4)
    padded[:, V:] = 50.0
    tokens = Sampler(V, [EOS]).sample(padded, [row(seed) for seed in range(99)] + [row(temperature=0.0)])
    assert all(token is not None and token < V for token in tokens)


def test_the_logits_of_the_model_are_left_as_they_were():
    logits = torch.tensor([LOGITS])
    before = logits.clone()
    sample(logits, [row(logit_bias={1: 5.0}, repetition_penalty=2.0, prompt=[2], presence_penalty=1.0, output=[4])])
    assert torch.equal(logits, before)


CUTS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 5.0, "min_p": 0.01, "top_p": 0.8, "top_k": 200},
    {"temperature": 1e-5, "top_p": 0.01},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("num_tokens", [5, 300, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_draws_what_the_definition_draws(num_tokens: int, dtype: torch.dtype) -> None:
    """In Triton's interpreter where there is no GPU. Many logits are equal, some are forbidden, one row is poisoned."""
    from gear_engine.gpu_draw import draw_rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row(seed, position=seed, **CUTS[seed % len(CUTS)]) for seed in range(3 * len(CUTS))]
    logits = torch.randn(len(rows), num_tokens + 3, generator=torch.Generator().manual_seed(num_tokens)) * 3
    logits[::2] = logits[::2].round()
    logits = logits.to(dtype)[:, :num_tokens]
    logits[1::3, 1::2] = -math.inf
    logits[4, 2] = math.nan
    expected = Sampler(num_tokens, []).draw(logits, rows)
    drawn = [i for i, r in enumerate(rows) if r.params.temperature > 0]
    columns = torch.tensor(sampler._columns(drawn, rows, num_tokens), dtype=torch.float64, device=device)
    best, tokens = logits.to(device).max(dim=-1)
    draw_rows(logits.to(device), best, tokens, columns)
    tokens = tokens.cpu()
    healthy = [i for i in range(len(rows)) if i != 4]
    assert tokens[healthy].tolist() == expected[healthy].tolist()
    assert 0 <= tokens[4] < num_tokens  # and `draw` says that it is none


@pytest.mark.gpu
def test_drawing_never_waits_for_the_device() -> None:
    """Whatever the parameters, and whether top_p finds few tokens or many."""
    rows = [
        SamplingRow(SamplingParams(max_tokens=99, temperature=1.0, top_p=0.9, top_k=50), 1, 0),
        SamplingRow(SamplingParams(max_tokens=99, temperature=5.0, top_p=0.99), 2, 5),
        SamplingRow(
            SamplingParams(max_tokens=99, temperature=0.7, min_p=0.1, frequency_penalty=0.5), 3, 2, [1, 2], [3, 4]
        ),
        SamplingRow(
            SamplingParams(max_tokens=99, temperature=0.0, repetition_penalty=1.3, logit_bias={7: 5.0}),
            4,
            2,
            [1, 2],
            [3, 4],
        ),
    ]
    logits = torch.randn(len(rows), 128256, generator=torch.Generator().manual_seed(0)).cuda()
    on_gpu = Sampler(128256, [])
    first = on_gpu.draw(logits, rows)
    with no_waiting():
        again = on_gpu.draw(logits, rows)
    assert torch.equal(first, again)
    assert first.tolist() == Sampler(128256, []).draw(logits.cpu(), rows).tolist()


@given(
    history=st.lists(st.integers(0, V - 1), min_size=1, max_size=12),
    prompt=st.lists(st.integers(0, V - 1), max_size=6),
    repetition=st.sampled_from([1.0, 0.5, 1.7]),
    presence=st.sampled_from([0.0, 0.8]),
    frequency=st.sampled_from([0.0, -0.3, 0.6]),
)
def test_a_token_that_only_the_device_knows_is_penalised_like_any_other(
    history, prompt, repetition, presence, frequency
):
    params = SamplingParams(
        max_tokens=99,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={1: 2.0},
    )
    whole = SamplingRow(params, 0, len(history), prompt, history)
    behind = SamplingRow(params, 0, len(history), prompt, history[:-1], is_behind=True)
    other = SamplingRow(SamplingParams(max_tokens=99), 0, 0)
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(len(history)))
    logits[3] = logits[1]
    expected = sampler._adjusted(logits, [other, whole, other, whole], [], None)
    pending = torch.tensor([history[-1]])
    adjusted = sampler._adjusted(logits, [other, whole, other, behind], [], pending)
    assert torch.equal(adjusted, expected)  # else a draw would depend on whether a neighbour made it wait
