"""All four families as one LanguageModel: causality, chunked state, seeds, errors."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from lmu_dist.models.generate import Sampling, generate, sample_tokens
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.registry import built_in
from lmu_dist.models.sizing import shape_for

VOCAB, LENGTH = 50, 24


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguageModel:
    shape = shape_for(family, 5000, vocab_tokens=VOCAB, sequence_tokens=LENGTH)
    return LanguageModel(shape, seed).to(dtype)


@pytest.fixture(params=built_in())
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def test_initial_loss_is_near_that_of_uniform_guessing(model, tokens):
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.shape == (2, LENGTH - 1)
    # logits of variance 1 add half a nat
    assert loss.mean().item() == pytest.approx(math.log(VOCAB) + 0.5, abs=0.5)


@torch.no_grad()
def test_no_token_depends_on_a_later_one(model, tokens):
    before = model.logits(tokens)
    for t in (1, LENGTH // 2, LENGTH - 1):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = model.logits(changed)
        assert (after[:, :t] - before[:, :t]).abs().max() < 1e-12
        assert (after[:, t] - before[:, t]).abs().max() > 1e-9


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [LENGTH], [5, 1, 7, 11]])
def test_chunks_with_state_equal_the_whole_sequence(model, tokens, chunks):
    state, parts = None, []
    for part in tokens.split(chunks, dim=1):
        logits, state = model.advance(part, state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - model.logits(tokens)).abs().max() < 1e-11


def test_same_seed_same_weights(model):
    same, other = build(model.shape.family), build(model.shape.family, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_building_a_model_does_not_change_the_global_rng_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build("lmu")
    assert torch.equal(torch.rand(3), expected)


def test_generation_is_seeded_and_greedy_at_zero(model):
    def take(n, **settings):
        stream = generate(model, [[1, 2, 3]], Sampling(**settings))
        return [int(next(stream)) for _ in range(n)]

    sampled = {"temperature": 1.0, "top_k": 10, "seed": 3}
    assert take(10, **sampled) == take(10, **sampled)
    with torch.no_grad():
        best = int(model.logits(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    assert take(1, temperature=0.0, top_k=0, seed=0) == [best]
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, [[]], Sampling()))


def test_a_text_does_not_depend_on_the_others_in_the_batch(model):
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.9, seed=5)
    batch = generate(model, [[1, 2, 3]] * 3, sampling)
    single = generate(model, [[1, 2, 3]], replace(sampling, seed=7))
    for _ in range(8):
        assert next(batch)[2] == next(single)[0]


def test_nucleus_is_the_smallest_set_with_probability_top_p():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()

    def sampled(**settings):
        rngs = [torch.Generator().manual_seed(0)]
        return Counter(int(sample_tokens(logits, Sampling(**settings), rngs)) for _ in range(4000))

    assert set(sampled(top_p=0.5)) == {0}
    assert set(sampled(top_p=0.51)) == {0, 1}
    assert set(sampled(top_p=1e-9)) == {0}
    assert set(sampled(top_k=3, top_p=0.99)) == {0, 1, 2}
    assert sampled()[0] / 4000 == pytest.approx(0.5, abs=0.03)
    assert sampled(temperature=0.5)[0] / 4000 == pytest.approx(0.25 / (0.25 + 0.04 + 0.0225 + 0.01 + 0.0025), abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
    ],
)
def test_invalid_sampling(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_extreme_logits():
    rngs = [torch.Generator().manual_seed(i) for i in range(2)]
    logits = torch.tensor([[0.0, 1e30, -1e30], [2.0, 1.0, 3.0]])
    assert sample_tokens(logits, Sampling(temperature=1e-40), rngs).tolist() == [1, 2]
    assert sample_tokens(logits, Sampling(top_p=1e-9), rngs).tolist() == [1, 2]
    assert set(sample_tokens(logits, Sampling(top_k=1000), rngs).tolist()) <= {0, 1, 2}
    with pytest.raises(ValueError, match="not finite"):
        sample_tokens(torch.tensor([[0.0, math.nan]]), Sampling(), rngs[:1])


def test_transformer_refuses_texts_longer_than_its_positions():
    model = build("transformer")
    with pytest.raises(ValueError, match="sequence_tokens"):
        model.logits(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_lmu_accepts_texts_longer_than_its_training_sequences():
    model = build("lmu")
    assert model.logits(torch.zeros(1, 3 * LENGTH + 1, dtype=torch.long)).shape == (1, 3 * LENGTH + 1, VOCAB)
