"""Part `operators`: every form of the LMU and the attention kernel, forward and backward, against the float64 oracle.

Inputs are random and new in each run; the seed is in the record. At the end a CUDA graph of the fused form is captured,
replayed on new inputs and compared. Called by part.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from measure import DTYPES
from oracle import lmu_block
from torch import Tensor

from gpu.recorder import Recorder
from lmu_dist.models.kernels import implicit_attention
from lmu_dist.models.mixers.lmu.legendre import row_scale
from lmu_dist.models.mixers.lmu.mixer import FORMS, Form, lmu_mixer, operator

# (order q, theta, length n, width d, reduced order q'): q > n, n far longer than the window, several chunks, the paper's ratios
SHAPES = [(12, 6.0, 131, 17, 6), (60, 24.0, 50, 6, 6), (100, 256.0, 700, 33, 10), (250, 1024.0, 600, 24, 25)]
TOY_SHAPES = SHAPES[:2]
KERNEL_SHAPES = [(1, 1), (3, 17), (25, 204), (40, 16), (102, 64)]  # (R, D) of the attention kernel
# Relative errors of outputs and gradients in the 2-norm. Inputs are rounded first, so this is the error of the operator alone.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}
NAMES = ("x", "projection", "bias", "p")
Tensors = dict[str, Tensor]


def run(recorder: Recorder) -> None:
    """Checks all forms, the kernel, and the graph."""
    print(f"seed {recorder.seed}", flush=True)
    rng = np.random.default_rng(recorder.seed)
    for shape in TOY_SHAPES[:1] if recorder.fast else TOY_SHAPES if recorder.toy else SHAPES:
        for name in DTYPES:
            with recorder.attempt(f"{name} {shape}"):
                _check_forms(recorder, rng, shape, name)
    for rows, width in KERNEL_SHAPES[:3] if recorder.toy else KERNEL_SHAPES:
        with recorder.attempt(f"attention kernel R={rows} D={width}"):
            _check_kernel(recorder, rows, width)
    if recorder.device.type == "cuda":
        for name in DTYPES:
            with recorder.attempt(f"CUDA graph {name}"):
                _check_graph(recorder, rng, name)
    else:
        recorder.note("no CUDA graph: there is no GPU")


def _problem(rng: np.random.Generator, shape: Sequence[Any], dtype: torch.dtype, n_rows: int = 2) -> tuple[Tensors, Tensor]:
    """Inputs of `lmu_mixer` and a gradient of its output, on the CPU."""
    order, theta, length, width, rows = shape
    arrays = {
        "x": rng.standard_normal((n_rows, length, width)),
        "projection": rng.standard_normal((3 * rows, order)) / np.sqrt(order) * row_scale(order, theta),
        "bias": rng.standard_normal(3 * rows) * 0.1,
        "p": rng.standard_normal(rows),
    }
    dout = torch.from_numpy(rng.standard_normal((n_rows, length, width))).to(dtype)
    return {name: torch.from_numpy(value).to(dtype) for name, value in arrays.items()}, dout


def oracle(given: Tensors, theta: float) -> np.ndarray:
    """Output of the oracle in float64."""
    x, projection, bias, p = (given[name].double().numpy() for name in NAMES)
    return lmu_block(x, theta, projection / row_scale(projection.shape[1], theta), bias, p)["out"]


def _with_gradients(given: Tensors, dout: Tensor, theta: float, form: Form | None) -> list[Tensor]:
    """Output and gradients of x, projection, bias and p."""
    leaves = [given[name].detach().clone().requires_grad_() for name in NAMES]
    x, projection, bias, p = leaves
    out = lmu_mixer(x, projection, bias, p, theta, form)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _reference(given: Tensors, dout: Tensor, theta: float) -> tuple[list[Tensor], float]:
    """Output and gradients in float64 by the recurrent form, and its largest relative error against the oracle.

    The oracle has no backward pass. The gradients are compared with the difference of its outputs in a random direction.
    """
    exact = {name: value.double() for name, value in given.items()}
    out, *gradients = _with_gradients(exact, dout.double(), theta, "recurrent")
    error = relative_error(out, torch.from_numpy(oracle(given, theta)))
    generator = torch.Generator().manual_seed(0)
    steps = {name: 1e-5 * torch.randn(value.shape, generator=generator).double() for name, value in exact.items()}
    # Steps of the projection are in units of the row scale, as its values are.
    steps["projection"] *= torch.from_numpy(row_scale(given["projection"].shape[1], theta))
    sides = [oracle({name: exact[name] + sign * steps[name] for name in NAMES}, theta) for sign in (1, -1)]
    difference = float((torch.from_numpy(sides[0] - sides[1]) / 2 * dout.double()).sum())
    products = [float((gradient * steps[name]).sum()) for gradient, name in zip(gradients, NAMES, strict=True)]
    return [out, *gradients], max(error, abs(sum(products) - difference) / sum(map(abs, products)))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((got.double().cpu() - expected).norm() / expected.norm())


def _check_forms(recorder: Recorder, rng: np.random.Generator, shape: Sequence[Any], name: str) -> None:
    (order, theta, length, width, rows), dtype, device = shape, DTYPES[name], recorder.device
    given, dout = _problem(rng, shape, dtype)
    expected, reference_error = _reference(given, dout, theta)
    recorder.expect(reference_error < 1e-6, f"reference of shape {shape}: error {reference_error:.1e} against the oracle")
    on_device = {key: value.to(device) for key, value in given.items()}
    for form in FORMS:
        with recorder.attempt(f"{form} {name} {shape}"):
            out, *gradients = _with_gradients(on_device, dout.to(device), theta, form)
            out_error = relative_error(out, expected[0])
            gradient_error = max(relative_error(g, e) for g, e in zip(gradients, expected[1:], strict=True))
            conditions = {"dtype": name, "order": order, "n": length, "width": width}
            ran = operator(form, dtype, device, rows)
            recorder.row("forms", form=ran, **conditions, out_error=out_error, gradient_error=gradient_error)
            worst = max(out_error, gradient_error)
            recorder.expect(worst < BOUNDS[name], f"{form} {name} {shape}: error {worst:.1e}, bound {BOUNDS[name]:.0e}")


def _check_kernel(recorder: Recorder, rows: int, width: int) -> None:
    """The attention kernel against plain torch in float64."""
    device, n, chunk = recorder.device, 3, 2
    generator = torch.Generator().manual_seed(recorder.seed)
    for name, dtype in DTYPES.items():
        pre = torch.randn(chunk * 3 * rows, n * width, generator=generator).to(dtype)
        p, dout = torch.randn(rows, generator=generator), torch.randn(n, chunk, width, generator=generator).to(dtype)
        exact, exact_p = (t.double().clone().requires_grad_() for t in (pre, p))
        expected = implicit_attention.attend(exact.view(chunk, -1, n, width).permute(2, 0, 1, 3), exact_p)
        expected = [expected.detach(), *torch.autograd.grad(expected, (exact, exact_p), dout.double())]
        got, out, dp = pre.to(device), torch.empty_like(dout, device=device), torch.zeros_like(p, device=device)
        implicit_attention.forward(got, p.to(device), out)
        implicit_attention.backward(got, p.to(device), dout.to(device), dp)  # overwrites its first argument with the gradient
        # With one row some gradients are 0, so the error is relative to the largest norm.
        scale = max(float(value.norm()) for value in expected)
        pairs = zip((out, got, dp), expected, strict=True)
        error = max(float((value.double().cpu() - exact_value).norm()) for value, exact_value in pairs) / scale
        implementation = implicit_attention.implementation(dtype, device, rows)
        recorder.row("attention kernel", kernel=implementation, dtype=name, rows=rows, width=width, error=error)
        recorder.expect(error < BOUNDS[name], f"attention kernel {name} R={rows} D={width}: error {error:.1e}")
        compiled = implementation == ("triton" if device.type == "cuda" else "c++")
        recorder.expect(compiled or (device.type == "cpu" and implementation == "torch"), f"attention: ran {implementation}")


def _check_graph(recorder: Recorder, rng: np.random.Generator, name: str) -> None:
    """Captures forward and backward of the fused form in a CUDA graph, and replays it on inputs it has not seen."""
    shape, device = (60, 128.0, 500, 33, 6), recorder.device
    theta, dtype = shape[1], DTYPES[name]
    given, dout = _problem(rng, shape, dtype)
    leaves = {key: value.to(device).requires_grad_() for key, value in given.items()}
    static_dout = dout.to(device)

    def step() -> list[Tensor]:
        x, projection, bias, p = (leaves[key] for key in NAMES)
        out = lmu_mixer(x, projection, bias, p, theta, "fused")
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), static_dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    given, dout = _problem(rng, shape, dtype)
    with torch.no_grad():
        for key, value in given.items():
            leaves[key].copy_(value)
        static_dout.copy_(dout)
    graph.replay()
    torch.cuda.synchronize()
    expected, _ = _reference(given, dout, theta)
    error = max(relative_error(g, e) for g, e in zip(captured, expected, strict=True))
    recorder.row("CUDA graph", form=operator("fused", dtype, device, shape[4]), dtype=name, error=error)
    recorder.expect(error < BOUNDS[name], f"CUDA graph {name}: error {error:.1e} on new inputs")
