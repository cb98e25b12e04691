"""lmu_dist.nn: its memory against keras-lmu and the matrices of `hippo`, states, gradients, and what importing it needs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lmu_dist.models.mixers.lmu.legendre import continuous_matrices, discrete_matrices
from lmu_dist.models.mixers.lmu.mixer import FORMS, Form
from lmu_dist.nn import LMU, LegendreMemory

REFERENCE = np.load(Path(__file__).with_name("reference.npz"))  # written by make_reference.py, which says how
CASES = [(i, int(order), float(theta)) for i, (order, theta) in enumerate(REFERENCE["cases"])]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative_error(got: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    got, expected = np.asarray(got), np.asarray(expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("i", "order", "theta"), CASES)
def test_matrices_and_states_equal_keras_lmus(i: int, order: int, theta: float):
    a, b = discrete_matrices(order, theta)
    assert relative_error(a, REFERENCE[f"keras_a_{i}"].T) < 1e-13
    assert relative_error(b, REFERENCE[f"keras_b_{i}"][0]) < 1e-13
    states = LegendreMemory(order, theta)(torch.from_numpy(REFERENCE["x"])).flatten(2)
    for layer in ("recurrent", "feedforward"):
        assert relative_error(states, REFERENCE[f"keras_{layer}_{i}"]) < 1e-12


@pytest.mark.parametrize(("i", "order", "theta"), CASES)
def test_matrices_equal_those_of_hippo_legt_in_its_basis(i: int, order: int, theta: float):
    a, b = continuous_matrices(order, theta)
    rows = np.arange(order)
    basis = (-1.0) ** rows * np.sqrt(2 * rows + 1)  # m_i = basis_i times the coefficient i of HiPPO
    step = 2 / theta  # the window of `transition` is 2 units of time long
    assert relative_error(a, basis[:, None] * REFERENCE[f"hippo_a_{i}"] / basis * step) < 1e-14
    assert relative_error(b, basis * REFERENCE[f"hippo_b_{i}"].ravel() * step) < 1e-14


def modules() -> list[LMU | LegendreMemory]:
    return [LMU(12, 3, 20.5), LegendreMemory(6, 10)]


@pytest.mark.parametrize("module", modules())
def test_chunks_and_single_tokens_equal_the_whole(module: LMU | LegendreMemory):
    x = torch.randn(2, 80, 5, dtype=torch.float64)
    module = copy.deepcopy(module).double()
    state, parts = None, []
    for chunk in x.split([1, 40, 3, 1, 35], dim=1):
        y, state = module.advance(chunk, state)
        parts.append(y.detach())
    assert relative_error(torch.cat(parts, 1), module(x).detach()) < 1e-12


@pytest.mark.parametrize("module", modules())
def test_gradients_also_through_states(module: LMU | LegendreMemory):
    module = copy.deepcopy(module).double()
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 12 if isinstance(module, LMU) else 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x), x)
    assert torch.autograd.gradcheck(lambda x, state: module.advance(x, state), (x, state))


@pytest.mark.parametrize("module", modules())
def test_autocast_changes_no_result(module: LMU | LegendreMemory):
    """It would round the constants of the memory to bfloat16."""
    x = torch.randn(2, 40, 5)
    with torch.no_grad():
        expected = module(x), *module.advance(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(x), *module.advance(x)
    for actual, exact in zip(got, expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_outputs_have_the_precision_of_the_input(dtype: torch.dtype, form: Form | None):
    """Under autocast the input is bfloat16, and the weights are float32."""
    lmu = LMU(12, 3, 20.5, form)
    x = torch.randn(2, 40, 5).to(dtype)
    exact = copy.deepcopy(lmu).double()(x.double()).detach()
    for y in (lmu(x), lmu.advance(x)[0], lmu.advance(x[:, :1])[0]):
        assert y.dtype == dtype
        # Roundings of the single token of the last chunk do not average.
        assert relative_error(y.double().detach(), exact[:, : y.shape[1]]) < (3e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(0, 40, 5), (2, 40, 0)])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_nothing_in_is_nothing_out(shape: tuple[int, int, int], form: Form | None):
    lmu, memory = LMU(12, 3, 20.5, form), modules()[1]
    x = torch.zeros(shape, requires_grad=True)
    y = lmu(x)
    assert y.shape == lmu.advance(x)[0].shape == shape
    assert memory(x).shape == (*shape, 6)
    y.sum().backward()
    assert lmu.reading.grad is not None
    assert not lmu.reading.grad.any()


def test_the_chunked_form_is_made_of_torchs_own_operations():
    """So that torch can differentiate its gradients, batch it and export it."""
    torch.manual_seed(0)
    lmu, x = LMU(12, 3, 20.5, "chunked"), torch.randn(2, 40, 5)
    assert torch.autograd.gradgradcheck(lmu.double(), x[:1, :6, :2].double().requires_grad_())
    lmu.float()
    whole, single = torch.func.vmap(lmu)(x[:, None]), torch.stack([lmu(row[None]) for row in x])
    assert torch.allclose(whole, single, atol=1e-6)
    exported = torch.export.export(lmu, (x,), strict=False).module()
    assert torch.equal(exported(x), lmu(x))


def test_modules_are_saved_copied_and_cast_as_others():
    lmu, memory = modules()
    other = LMU(12, 3, 20.5)
    other.load_state_dict(lmu.state_dict())
    x = torch.randn(2, 40, 5)
    assert torch.equal(other(x), lmu(x))
    assert list(memory.state_dict()) == []
    assert repr(lmu) == "LMU(order=12, reduced_order=3, theta_tokens=20.5)"
    assert repr(memory) == "LegendreMemory(order=6, theta_tokens=10)"
    for module, bound in ((copy.deepcopy(lmu), 2e-2), (memory, 1e-2)):
        got = module.to(torch.bfloat16)(x.bfloat16())
        assert got.dtype == torch.bfloat16
        expected = (lmu if isinstance(module, LMU) else memory)(x.bfloat16().float())
        assert relative_error(got.float().detach(), expected.detach()) < bound


ALONE = """
import sys, time
NEEDED = "lmu_dist numpy torch torchgen functorch filelock typing_extensions sympy mpmath networkx jinja2 markupsafe".split()

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in NEEDED and top not in sys.stdlib_module_names and not top.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse())
import numpy, torch
start = time.process_time()
from lmu_dist.nn import LMU, LegendreMemory
print(time.process_time() - start)

torch.manual_seed(0)
lmu, memory, out = LMU(order=8, reduced_order=2, theta_tokens=10), LegendreMemory(4, 10), torch.nn.Linear(4, 1)
x = torch.randn(2, 30, 4)
parameters = [*lmu.parameters(), *out.parameters()]
for step in range(100):  # by hand: an optimizer of torch imports its compiler, which looks for other packages
    loss = (out(lmu(x))[:, 1:] - x[:, :-1, :1]).square().mean()
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter -= 0.3 * gradient
    if step == 0:
        print(loss.item())
print(loss.item())

def message(call, *arguments):
    try:
        call(*arguments)
    except ValueError as e:
        print(e)

message(LMU, 8, 0, 10)
message(LMU, 8.5, 1, 10)
message(LegendreMemory, 8, -1)
message(LMU, 8, 2, 10, "fourier")
message(lmu, x[0])
message(memory, x.long())
message(lmu.advance, x[:, :0])
message(memory.advance, x, torch.zeros(2, 8, 4))
message(lmu.advance, x, (x, x))
message(lmu, [1.0])
"""


@pytest.mark.parametrize("compiler", ["c++", "no-such-compiler"])
def test_needs_only_torch_and_numpy(compiler: str, tmp_path: Path):
    """In a process that can import no other package: it trains with and without a compiler, and refuses what is wrong."""
    environment = os.environ | {"CXX": compiler}
    if compiler == "no-such-compiler":
        environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, first, last, *messages = done.stdout.splitlines()
    assert float(seconds) < 1  # besides torch's own; all of it must be below 2.5
    assert float(last) < 0.8 * float(first)
    assert ("plain torch" in done.stderr) == (compiler == "no-such-compiler")
    assert messages == [
        "reduced_order must be a whole number above 0, not 0",
        "order must be a whole number above 0, not 8.5",
        "theta_tokens must be a number above 0, not -1",
        "form must be None or one of recurrent, fft, chunked, fused, not 'fourier'",
        *(
            f"x must be a floating-point tensor of (batch, tokens, channels) with at least one token, not torch.{given}"
            for given in ("float32 of (30, 4)", "int64 of (2, 30, 4)", "float32 of (2, 0, 4)")
        ),
        "state must be a float64 tensor of (batch, order, channels) = (2, 4, 4), as the call before returned it, "
        "not torch.float32 of (2, 8, 4)",
        "state must be a float64 tensor of (batch, order, channels) = (2, 8, 4), as the call before returned it, not a tuple",
        "x must be a floating-point tensor of (batch, tokens, channels) with at least one token, not a list",
    ]
