"""Hybrids: which block has which mixer, counts of every combination, versions, and errors that say what to do."""

from dataclasses import replace

import pytest
import torch

from lmu_dist.config import ConfigError
from lmu_dist.models import accounting, registry
from lmu_dist.models.family import Family
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.rotary_attention import RotaryAttention
from lmu_dist.models.registry import find, options_of
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for

MIXERS = ("gated_deltanet", "mamba2", "lmu_modern")
HYBRID = find("hybrid")


def shape_of(n_blocks: int, n_params: int = 40_000, **keys: object) -> Shape:
    options = options_of(HYBRID, keys)
    return shape_for(HYBRID, n_params, vocab_tokens=97, sequence_tokens=40, n_blocks=n_blocks, options=options)


@pytest.mark.parametrize(("n_blocks", "every", "expected"), [(2, 2, [2]), (5, 2, [2, 4]), (6, 3, [3, 6]), (7, 4, [4])])
def test_every_kth_block_has_attention(n_blocks: int, every: int, expected: list[int]):
    shape = shape_of(n_blocks, attention_every=every)
    mixers = list(LanguageModel(shape).sublayers)[::2]
    assert [i for i, mixer in enumerate(mixers, 1) if isinstance(mixer, RotaryAttention)] == expected
    alone = shape_for("gated_deltanet", 40_000, vocab_tokens=97, sequence_tokens=40, n_blocks=n_blocks)
    other = next(LanguageModel(replace(alone, n_blocks=1)).sublayers.children())
    assert {type(mixer) for mixer in mixers} == {RotaryAttention, type(other)}


@pytest.mark.parametrize("mixer", MIXERS)
def test_counts_are_those_of_the_model(mixer: str):
    shape = shape_of(3, mixer=mixer)
    model = LanguageModel(shape, options=options_of(HYBRID, {"mixer": mixer}))
    assert accounting.parameters(shape).total == sum(weight.numel() for weight in model.parameters())
    assert HYBRID.largest_tensor(shape) == Family.largest_tensor(HYBRID, shape)
    assert HYBRID.matmul_flops(shape) == pytest.approx(Family.matmul_flops(HYBRID, shape), rel=1e-12)
    assert Shape.from_dict(shape.to_dict()) == shape
    assert LanguageModel(shape).state_dict().keys() == model.state_dict().keys()  # the shape alone names the mixer


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_text_continues(mixer: str):
    shape = shape_of(3, mixer=mixer)
    model, tokens = LanguageModel(shape).double(), torch.randint(97, (2, 50), generator=torch.Generator().manual_seed(0))
    state, parts = None, []
    for chunk in tokens.split([1, 30, 19], 1):
        logits, state = model.advance(chunk, state)
        parts.append(logits)
    assert (torch.cat(parts, 1) - model.logits(tokens)).abs().max() < 1e-10


def test_keys_of_the_mixers_family():
    shape = shape_of(2, mixer="lmu_modern", mixer_options={"order": 7, "reduced_order": 2})
    assert (shape.widths["lmu_modern.order"], shape.widths["lmu_modern.reduced_order"]) == (7, 2)
    for options, message in (
        ({"oder": 7}, r"oder: unknown key of family lmu_modern; did you mean model\.mixer_options\.order\?"),
        ({"n_block": 7}, r"n_block: unknown key of family lmu_modern; did you mean model\.n_blocks\?"),
        ({"order": 0}, r"order: must be more than 0, not 0"),
        ({"qk_norm": True, "form": "fused"}, r"qk_norm: form=fused has no QK-norm; set qk_norm to false, or form to chunked"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.mixer_options\.{message}"):
            shape_of(2, mixer="lmu_modern", mixer_options=options)


def test_the_version_has_those_of_the_parts(monkeypatch: pytest.MonkeyPatch):
    version, mamba = registry.version_of(HYBRID, {}), registry.version_of(HYBRID, {"mixer": "mamba2"})
    assert version.endswith(f"+gated_deltanet:{find('gated_deltanet').version}+llama:{find('llama').version}")
    monkeypatch.setattr(type(find("mamba2")), "version", 9)
    assert registry.version_of(HYBRID, {}) == version
    assert registry.version_of(HYBRID, {"mixer": "mamba2"}) != mamba


@pytest.mark.parametrize("mixer", ["llama", "transformer", "hybrid", "nothing", "own.py:Own"])
def test_other_families_are_refused(mixer: str):
    message = rf"model.mixer='{mixer}': .* take one of gated_deltanet, mamba2, lmu_modern; .* add it to mixer_families"
    with pytest.raises(ConfigError, match=message):
        shape_of(2, mixer=mixer)


def test_a_hybrid_without_attention_is_refused():
    with pytest.raises(ConfigError, match=r"model.attention_every=3: no block of model.n_blocks=2 would have attention"):
        shape_of(2, attention_every=3)
    with pytest.raises(ConfigError, match=r"model.attention_every"):
        shape_of(2, attention_every=1)
