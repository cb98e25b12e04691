"""All built-in families as one LanguageModel: causality, chunked state, seeds, errors."""

import math
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmu_dist.models import registry
from lmu_dist.models.generate import Sampling, generate, sample_tokens
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.attention import Attention, KVBuffer, KVCache
from lmu_dist.models.mixers.rotary_attention import RotaryAttention
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


def test_a_batch_is_learned_and_every_weight_takes_part(model, tokens):
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    losses = list[float]()
    for _ in range(20):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    unused = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not unused


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


@torch.no_grad()
def test_several_texts_go_on_from_one_state(model, tokens):
    """Whatever was computed from a state before, a later call finds it as it was."""
    exact, other_tokens = model.logits(tokens), (tokens + 1) % VOCAB
    _, prompt = model.advance(tokens[:, :8])
    _, kept = model.advance(tokens[:, 8:9], prompt)  # attention has room for more tokens now, which its caches may share
    first, branch = model.advance(tokens[:, 9:12], kept)
    other, other_branch = model.advance(other_tokens[:, 9:12], kept)
    for state in (other_branch, branch, branch, kept, kept):  # branches are continued, and some twice
        start = state[0]
        text = other_tokens if state is other_branch else tokens
        logits, after = model.advance(text[:, start : start + 4], state)
        later, _ = model.advance(text[:, start + 4 : start + 6], after)
        if state is not other_branch:
            assert (torch.cat([logits, later], 1) - exact[:, start : start + 6]).abs().max() < 1e-11
    for text, expected in ((tokens, first), (other_tokens, other)):
        assert torch.equal(model.advance(text[:, 9:12], kept)[0], expected)
    assert (model.advance(tokens[:, 8:20], prompt)[0] - exact[:, 8:20]).abs().max() < 1e-11


def test_appending_token_by_token_copies_each_about_once():
    key = torch.zeros(1, 1, 1, 1)
    start, _, _ = KVCache(KVBuffer(key[:, :, :0], key[:, :, :0])).extend(key, key)
    for _ in range(2):  # the second text goes on from the same cache
        cache, n_copied = start, 0
        for _ in range(1000):
            before = cache.buffer
            cache, keys, _ = cache.extend(key, key)
            n_copied += 0 if cache.buffer is before else keys.shape[2] - 1
        assert n_copied < 1024


@torch.no_grad()
def test_the_state_does_not_grow_with_the_text_but_for_keys_and_values(model):
    """Its bytes after 9 tokens are those after 200 and after single ones, except for the caches of attention."""
    has_attention = any(isinstance(module, Attention | RotaryAttention) for module in model.modules())
    text = torch.zeros(1, LENGTH if has_attention else 200, dtype=torch.long)  # learned positions end at LENGTH
    state, n_bytes = None, []
    for part in text.split([9, 1, text.shape[1] - 11, 1], 1):
        _, state = model.advance(part, state)
        leaves = tree_leaves(state[1])
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        assert has_attention == any(isinstance(leaf, KVCache) for leaf in leaves)
        assert {type(leaf) for leaf in leaves} <= {torch.Tensor, KVCache, type(None)}
        n_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert len(set(n_bytes)) == 1
    assert has_attention or n_bytes[0] > 0


def test_same_seed_same_weights(model):
    same, other = build(model.shape.family), build(model.shape.family, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'gated_linear_attention.py'}:GatedLinearAttention"


@pytest.mark.parametrize("family", [*built_in(), EXAMPLE])
def test_weights_are_those_of_a_model_that_is_built_as_a_whole(family):
    """The order of random numbers is part of a seed's weights. bf16 weights are rounded from float32 ones."""
    found = registry.find(family)
    shape = shape_for(found, 5000, vocab_tokens=VOCAB, sequence_tokens=LENGTH)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        parts = [nn.Embedding(VOCAB, shape.d_model)]
        if found.learned_positions:
            parts.append(nn.Embedding(LENGTH, shape.d_model))
        sublayers = nn.ModuleList(found.sublayers(shape, found.Options()))
        for module in (*parts, *sublayers.modules()):
            if isinstance(module, nn.Embedding | nn.Linear):
                is_out = any(module is m for name, m in sublayers.named_modules() if name.endswith(".out"))
                std = module.weight.shape[1] ** -0.5 * (len(sublayers) ** -0.5 if is_out else 1.0)
                nn.init.normal_(module.weight, std=std)
    expected = [weight for module in (*parts, *sublayers) for weight in module.state_dict().values() if weight.ndim > 1]
    for dtype in (torch.float32, torch.bfloat16):
        model = LanguageModel(shape, 3, device=torch.device("cpu"), dtype=dtype)
        found_weights = [weight for name, weight in model.state_dict().items() if weight.ndim > 1]
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found_weights, expected, strict=True))


def test_the_cpu_holds_one_sublayer_and_one_tensor_while_a_model_is_built():
    class LiveBytes(TorchDispatchMode):
        live = peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, torch.Tensor) and t.device.type == "cpu" and t.untyped_storage()._cdata not in known:
                    storage = t.untyped_storage()
                    known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
            return result

        def remove(self, storage, n_bytes):
            known.discard(storage)
            self.live -= n_bytes

    known = set[int]()
    shape = shape_for("transformer", 400_000, vocab_tokens=VOCAB, sequence_tokens=LENGTH, n_blocks=8)
    with LiveBytes() as cpu:
        model = LanguageModel(shape, device=torch.device("meta"), dtype=torch.bfloat16)  # stands for a GPU
    largest = max(sum(4 * p.numel() for p in sublayer.parameters()) for sublayer in model.sublayers)
    assert 0 < cpu.peak < 2 * largest < sum(4 * p.numel() for p in model.parameters()) / 5


@pytest.mark.parametrize("family", ["lmu", "transformer"])
def test_activation_checkpointing_keeps_a_third_of_the_bytes_and_every_bit(family, tokens):
    shape = shape_for(family, 20_000, vocab_tokens=VOCAB, sequence_tokens=LENGTH, n_blocks=8)
    found = {}
    for checkpointing in (False, True):
        model, saved = LanguageModel(shape), dict[int, torch.Tensor]()
        model.activation_checkpointing = checkpointing
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def save(t: torch.Tensor, weights=weights, saved=saved) -> torch.Tensor:
            if t.untyped_storage()._cdata not in weights:
                saved[t.untyped_storage()._cdata] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            hidden = model._hidden(tokens)
        hidden.square().sum().backward()
        n_bytes = sum(t.untyped_storage().nbytes() for t in saved.values())
        found[checkpointing] = n_bytes, hidden.detach(), [p.grad for p in model.parameters()]
    assert found[True][0] < 0.35 * found[False][0]
    assert torch.equal(found[True][1], found[False][1])
    for a, b in zip(found[True][2], found[False][2], strict=True):
        assert (a is b is None) or (a is not None and b is not None and torch.equal(a, b))


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
        return Counter(int(sample_tokens(logits, Sampling(**settings), rngs)) for _ in range(1000))

    assert set(sampled(top_p=0.5)) == {0}
    assert set(sampled(top_p=0.51)) == {0, 1}
    assert set(sampled(top_p=1e-9)) == {0}
    assert set(sampled(top_k=3, top_p=0.99)) == {0, 1, 2}
    assert sampled()[0] / 1000 == pytest.approx(0.5, abs=0.05)
    assert sampled(temperature=0.5)[0] / 1000 == pytest.approx(0.25 / (0.25 + 0.04 + 0.0225 + 0.01 + 0.0025), abs=0.05)


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
