"""The mixer of lmu_modern with every choice of its parts: against numpy and the paper's equations, and its counts."""

from itertools import product

import numpy as np
import oracle
import pytest
import torch
from scipy.special import erf, expit

from lmu_dist.config import ConfigError
from lmu_dist.models import accounting
from lmu_dist.models.family import Family
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.lmu_modern import ModernLMU
from lmu_dist.models.registry import find, options_of
from lmu_dist.models.sizing import shape_for

PARTS = ("short_convolution", "output_gate", "qk_norm")
EVERY_CHOICE = [dict(zip(PARTS, chosen, strict=True)) for chosen in product((False, True), repeat=3)]
THETA, D_MODEL, ORDER, ROWS = 12.0, 6, 8, 3


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def outputs(mixer: ModernLMU, x: np.ndarray) -> np.ndarray:
    """What the docstrings say, in numpy and with the literal recurrence of the memory."""
    weights = {name: weight.detach().numpy() for name, weight in mixer.named_parameters()}
    y = x
    if mixer.convolution is not None:
        kernels = weights["convolution.weight"]
        channels = [
            [np.convolve(row[:, d], kernels[d, ::-1])[: len(row)] for d in range(x.shape[2])] for row in x
        ]  # the last entry of a kernel is that of the present token
        y = np.array(channels).transpose(0, 2, 1)
        y = y * expit(y)
    projection, bias, p = mixer.lmu.projection_matrix.detach().numpy(), weights["lmu.bias"], weights["lmu.p"]
    found = oracle.lmu_block(y, THETA, projection, bias, p)
    y = found["out"]
    if "lmu.q_norm.weight" in weights:
        z = projection @ found["M"] + bias[:, None]
        q, k, v = np.split(0.5 * z * (1 + erf(z / np.sqrt(2))), 3, axis=2)
        q, k = rms_norm(q, weights["lmu.q_norm.weight"]), rms_norm(k, weights["lmu.k_norm.weight"])
        scores = np.exp(q @ np.swapaxes(k, -1, -2) / np.sqrt(x.shape[2]))
        y = np.einsum("r,btrs,btsd->btd", p, scores / scores.sum(-1, keepdims=True), v)
    if mixer.output_gate is not None:
        gate = x @ weights["output_gate.gate.weight"].T
        y = rms_norm(y, weights["output_gate.norm.weight"]) * gate * expit(gate) @ weights["output_gate.out.weight"].T
    return y


@torch.no_grad()
@pytest.mark.parametrize("parts", EVERY_CHOICE, ids=str)
def test_outputs_are_those_of_the_formulas(parts: dict[str, bool]):
    torch.manual_seed(0)
    mixer = ModernLMU(D_MODEL, ORDER, ROWS, THETA, **parts).double()
    for weight in mixer.parameters():
        weight += 0.3 * torch.randn_like(weight)
    x = torch.randn(2, 21, D_MODEL, dtype=torch.float64)
    expected = torch.from_numpy(outputs(mixer, x.numpy()))
    assert (mixer(x) - expected).abs().max() < 1e-10 * expected.abs().max()
    state, chunks = None, []
    for chunk in x.split([1, 1, 9, 10], 1):
        y, state = mixer.advance(chunk, state)
        chunks.append(y)
    assert (torch.cat(chunks, 1) - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("parts", EVERY_CHOICE, ids=str)
def test_counts_follow_the_parts(parts: dict[str, bool]):
    family = find("lmu_modern")
    options = options_of(family, parts)
    shape = shape_for(family, 60_000, vocab_tokens=97, sequence_tokens=40, options=options)
    assert family.n_params(shape) == Family.n_params(family, shape)
    assert family.largest_tensor(shape) == Family.largest_tensor(family, shape)
    assert family.matmul_flops(shape) == Family.matmul_flops(family, shape)
    model = LanguageModel(shape, options=options)
    assert accounting.parameters(shape).total == sum(weight.numel() for weight in model.parameters())


def test_qk_norm_runs_in_the_chunked_form_and_refuses_the_fused_one():
    family = find("lmu_modern")
    options = options_of(family, {"qk_norm": True})
    shape = shape_for(family, 5000, vocab_tokens=97, sequence_tokens=40, options=options)
    assert family.operator(shape, options, torch.float32, torch.device("cpu")) == "chunked"
    plain = options_of(family, {"qk_norm": False})
    without = shape_for(family, 5000, vocab_tokens=97, sequence_tokens=40, options=plain)
    assert family.operator(without, plain, torch.float32, torch.device("cpu")).startswith("fused")
    with pytest.raises(ConfigError, match=r"^model\.qk_norm: form=fused has no QK-norm; set qk_norm to false, or form to "):
        options_of(family, {"form": "fused", "qk_norm": True})
