"""Products of bfloat16 tensors on a processor that has none: float32 operands, results and gradients rounded to bfloat16."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmu_dist.models import products
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.mixers.lstm import LSTM
from lmu_dist.models.registry import built_in
from lmu_dist.models.sizing import shape_for

ROUNDING = 2.0**-8  # relative error of one rounding to bfloat16, at most
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "lstm", "mkldnn_rnn", "scaled_dot_product", "flash_attention")


@pytest.fixture(autouse=True)
def without_bfloat16_products(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(products, "BLOCK_ROWS", 3)


def relative_error(got, exact):
    got, exact = got.detach().double(), exact.detach()
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_rounds_once(has_bias):
    torch.manual_seed(0)
    layer, x = products.Linear(32, 16, bias=has_bias).bfloat16(), torch.randn(2, 5, 32).bfloat16().requires_grad_()
    exact, exact_x = nn.Linear(32, 16, bias=has_bias).double(), x.detach().double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    dout = torch.randn(2, 5, 16).bfloat16()
    out, expected = layer(x), exact(exact_x)
    gradients = torch.autograd.grad(out, (x, *layer.parameters()), dout)
    expected_gradients = torch.autograd.grad(expected, (exact_x, *exact.parameters()), dout.double())
    assert out.shape == expected.shape
    for got, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, right) < ROUNDING


def test_attention_rounds_once():
    torch.manual_seed(0)
    q, k, v = given = [torch.randn(2, 3, 7, 4).bfloat16().requires_grad_() for _ in range(3)]
    exact_q, exact_k, exact_v = exact = [t.detach().double().requires_grad_() for t in given]
    out = products.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = F.scaled_dot_product_attention(exact_q, exact_k, exact_v, is_causal=True)
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    expected_gradients = torch.autograd.grad(expected.square().sum(), exact)
    for got, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, right) < 3 * ROUNDING  # the gradients of the square round the output


def test_lstm_continues_in_chunks():
    torch.manual_seed(0)
    lstm, x = LSTM(6, 8, 2).bfloat16(), torch.randn(2, 9, 6).bfloat16()
    first, state = lstm.advance(x[:, :4], None)
    second, _ = lstm.advance(x[:, 4:], state)
    assert state[0].dtype == torch.bfloat16
    assert relative_error(torch.cat([first, second], 1), lstm(x).double()) < 4 * ROUNDING


class BFloat16Products(TorchDispatchMode):
    """Lists the matrix products of bfloat16 tensors that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(product in name for product in PRODUCTS) and any(t.dtype == torch.bfloat16 for t in tensors):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def bfloat16_products(model, tokens):
    with BFloat16Products() as products_of_bfloat16:
        model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        with torch.no_grad():
            _, state = model.advance(tokens[:, :3])
            model.advance(tokens[:, 3:4], state)
    return products_of_bfloat16.found


@pytest.mark.parametrize("family", built_in())
def test_no_family_multiplies_bfloat16(family, monkeypatch):
    shape = shape_for(family, 5000, vocab_tokens=50, sequence_tokens=24)
    tokens = torch.randint(50, (2, 25), generator=torch.Generator().manual_seed(1))
    model = LanguageModel(shape).to(torch.bfloat16)
    assert not bfloat16_products(model, tokens)
    assert all(weight.grad is not None and weight.grad.dtype == torch.bfloat16 for weight in model.parameters())
    monkeypatch.setattr(products, "has_bfloat16_products", lambda: True)
    assert bfloat16_products(model, tokens)  # the list can tell
