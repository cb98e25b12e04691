"""The family llama against Qwen3 of transformers, with the same weights in float64."""

from types import ModuleType

import pytest
import torch
from float64 import in_float64

from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.rotary_attention import RotaryAttention
from lmu_dist.models.registry import find, options_of
from lmu_dist.models.sizing import shape_for

VOCAB, LENGTH = 61, 24


@pytest.fixture
def qwen3(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of Qwen3 in transformers, made to compute in float64."""
    return in_float64("transformers.models.qwen3.modeling_qwen3", "dev", monkeypatch)


def build(n_params: int, **options: int) -> LanguageModel:
    family = find("llama")
    chosen = options_of(family, options)
    shape = shape_for(family, n_params, vocab_tokens=VOCAB, sequence_tokens=LENGTH, n_blocks=3, options=chosen)
    model = LanguageModel(shape, options=chosen).double()
    with torch.no_grad():  # gains other than 1, which all norms start with
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]:
            norm.weight += 0.3 * torch.randn_like(norm.weight)
    return model


def as_qwen3(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The weights under the names of transformers."""
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for i in range(model.shape.n_blocks):
        attention, feed_forward = model.sublayers[2 * i : 2 * i + 2]
        q, k, v = attention.qkv.weight.chunk(3)
        gate, up = feed_forward.gate_up.weight.chunk(2)
        found = {
            "input_layernorm": model.norms[2 * i].weight,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.q_norm": attention.q_norm.weight,
            "self_attn.k_norm": attention.k_norm.weight,
            "self_attn.o_proj": attention.out.weight,
            "post_attention_layernorm": model.norms[2 * i + 1].weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": feed_forward.out.weight,
        }
        weights |= {f"model.layers.{i}.{name}.weight": weight for name, weight in found.items()}
    return {name: weight.detach() for name, weight in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize(("n_params", "options"), [(4_000, {}), (90_000, {"rotary_base": 500})])
def test_logits_are_those_of_qwen3(qwen3: ModuleType, n_params: int, options: dict[str, int]):
    model = build(n_params, **options)
    shape = model.shape
    config = qwen3.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_blocks,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        head_dim=shape.d_model // shape.n_heads,
        rope_parameters={"rope_type": "default", "rope_theta": float(shape.rotary_base)},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    other = qwen3.Qwen3ForCausalLM(config).double().eval()
    weights = as_qwen3(model)
    other.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    tokens = torch.randint(VOCAB, (2, LENGTH + 9), generator=torch.Generator().manual_seed(0))
    found = model.logits(tokens)
    assert found.std() > 0.3
    assert (found - other(tokens).logits).abs().max() < 1e-10 * found.abs().max()


@torch.no_grad()
def test_scores_depend_on_distances_only():
    """A text that starts later gives the same outputs: rotary positions are relative."""
    torch.manual_seed(0)
    attention = RotaryAttention(24, 2, 10_000).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    q, k, v = attention._heads(x, 0)
    later = attention._heads(x, 1000)
    assert (q @ k.mT - later[0] @ later[1].mT).abs().max() < 1e-11
    assert (q - later[0]).abs().max() > 0.1
    assert torch.equal(v, later[2])
