"""Part `modern`: the mixers of today's families on the GPU against plain torch in float64, on new random weights and inputs.

In bf16 gated_deltanet and mamba2 run the Triton kernels of fla-core if it is installed, which tune themselves for each shape:
the seconds of the first call are in the table. Cases run in processes of their own, side by side, since compiling takes most of
the time. Called by part.py.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from measure import DTYPES, seconds
from torch import Tensor, nn

from gpu.recorder import Recorder
from lmu_dist.models.modern_family import ModernFamily
from lmu_dist.models.registry import find
from lmu_dist.models.sizing import shape_for

FAMILIES = ("gated_deltanet", "mamba2", "llama", "lmu_modern")
# A ladder's smallest model, and two whose heads are narrower and as wide as in the papers. No multiple of a chunk's length.
SIZES, TOY_SIZES, LENGTH, TOY_LENGTH, N_ROWS = (10_000, 1_000_000, 10_000_000), (10_000,), 700, 67, 2
# Relative errors in the 2-norm, of the output and of the worst gradient. Weights and inputs are rounded first. Gradients of a
# head's scalars are sums over all tokens that cancel: they may have twice the error of plain torch on the CPU.
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}
PROCESSES = 8


def run(recorder: Recorder) -> None:
    """Compares all families, sizes and precisions."""
    sizes, length = (TOY_SIZES, TOY_LENGTH) if recorder.toy else (SIZES, LENGTH)
    families = FAMILIES[:1] if recorder.fast else FAMILIES
    cases = [(family, n_params, name) for n_params in reversed(sizes) for name in reversed(DTYPES) for family in families]
    n_processes = min(PROCESSES, len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compare, *case, length, recorder.seed, recorder.device_name): case for case in cases}
        for done in as_completed(running):
            family, n_params, name = case = running[done]
            with recorder.attempt(" ".join(map(str, case))):
                row = done.result()
                recorder.row("modern mixers", family=family, n_params=n_params, dtype=name, **row)
                bounds = BOUNDS[name], max(BOUNDS[name], 2 * row["gradient_error_of_plain_torch"])
                for found, bound, what in zip(
                    (row["out_error"], row["gradient_error"]), bounds, ("output", "gradient"), strict=True
                ):
                    recorder.expect(
                        found < bound, f"{family} N={n_params:,} {name}: {what} error {found:.1e}, bound {bound:.1e}"
                    )


def compare(family: str, n_params: int, dtype_name: str, length: int, seed: int, device_name: str) -> dict[str, Any]:
    """Operator, relative errors of output and gradients, and seconds of the first and of a later call."""
    torch.set_num_threads(2)
    device, dtype = torch.device(device_name), DTYPES[dtype_name]
    shape = shape_for(family, n_params, vocab_tokens=50_257, sequence_tokens=length)
    found = find(family)
    assert isinstance(found, ModernFamily)
    torch.manual_seed(seed)
    mixer = found.mixer(shape, found.Options()).to(dtype)
    x, dout = (torch.randn(N_ROWS, length, shape.d_model).to(dtype) for _ in range(2))
    plain = _outputs(mixer, x, dout)
    expected = _outputs(mixer.double(), x.double(), dout.double())
    mixer, x, dout = mixer.to(device, dtype), x.to(device), dout.to(device)
    began = time.monotonic()
    got = [value.cpu() for value in _outputs(mixer, x, dout)]
    first_seconds = time.monotonic() - began
    return {
        "operator": found.operator(shape, found.Options(), dtype, device),
        "out_error": _relative_error(got[:1], expected[:1]),
        "gradient_error": _relative_error(got[1:], expected[1:]),
        "gradient_error_of_plain_torch": _relative_error(plain[1:], expected[1:]),
        "first_seconds": first_seconds,
        "seconds": min(seconds(lambda: _outputs(mixer, x, dout), device) for _ in range(3)),
    }


def _outputs(mixer: nn.Module, x: Tensor, dout: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of all parameters."""
    x = x.detach().clone().requires_grad_()
    out = mixer(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *mixer.parameters()], dout)]


def _relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the relative errors of the tensors."""
    return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True))
