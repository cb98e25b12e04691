"""C++ kernels for CPUs, built at first use and called through ctypes.

Called by implicit_attention, gated_delta_rule, ssd, mixers/lmu/fourier, mixers/short_convolution and mixers/gated_norm.
"""

import ctypes
import logging
import platform
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from lmu_dist.models.kernels import build

HERE = Path(__file__).parent
LINE = 16  # channels of a cache line, to which rows are padded; the same number as in lanes.h
SOURCES = tuple(
    HERE / name
    for name in (
        "lanes.h",
        "transform.h",
        "implicit_attention.cpp",
        "convolve.cpp",
        "short_convolution.cpp",
        "gated_delta_rule.cpp",
        "ssd.cpp",
        "gated_norm.cpp",
    )
)
FLAGS = (
    "-O3",
    "-fopenmp",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
# A build for each instruction set, chosen as torch chooses its own kernels: by the processor, or by ATEN_CPU_CAPABILITY (avx2;
# default: none but SSE2). Not -march=native: nodes with different processors may share the build cache. Any other processor
# (aarch64: NEON) gets the compiler's default.
ARCHITECTURE_FLAGS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
DTYPES = (torch.float32, torch.bfloat16)
# The tensors that each function takes, in order, as in the C++ sources: T of the precision of the activations, F float32,
# C complex64.
TENSORS = {
    "lmu_attention_forward": "TFT",
    "lmu_attention_backward": "TFTF",
    "lmu_convolve_forward": "FCFT",
    "lmu_convolve_backward": "FCTFCF",
    "lmu_short_convolution_forward": "TFT",
    "lmu_short_convolution_backward": "TFTTF",
    "lmu_gated_delta_rule_forward": "FFFFF",
    "lmu_gated_delta_rule_backward": "FFFFFFFFFF",
    "lmu_ssd_forward": "FFFFFF",
    "lmu_ssd_backward": "FFFFFFFFFFFF",
    "lmu_gated_norm_forward": "TFFTF",
    "lmu_gated_norm_backward": "TFFFTTFF",
}


@cache
def library() -> ctypes.CDLL | None:
    """The library of all C++ kernels, built at first use (about ten seconds); None if the build fails, which is logged once."""
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError) as e:
        lines = str(e).splitlines() or [type(e).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        logging.getLogger(__name__).warning("cannot build the C++ kernels, using plain torch instead: %s", reason)
        return None
    assert loaded.lmu_line() == LINE, "LINE differs between lanes.h and compiled.py"
    return loaded


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels take tensors of this precision on this device."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def _build() -> Path:
    """Builds the library, unless it was built before, and returns its path. Raises OSError or RuntimeError."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = [*FLAGS, *ARCHITECTURE_FLAGS.get(capability, ())]
    # The name says all that the library depends on, so that copies of the package share it.
    contents = [path.read_bytes() for path in SOURCES]
    settings = [torch.__version__, torch.__file__, platform.machine(), build.compiler(), *flags]
    digest = sha256(b"".join([*map(str.encode, settings), *contents])).hexdigest()[:12]
    library_path = build.default_folder() / f"lmu_{capability.lower()}_{digest}.so"
    build.shared_library(library_path, [path for path in SOURCES if path.suffix == ".cpp"], flags)
    return library_path


def forward(pre: Tensor, p: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.forward."""
    n, chunk, width = out.shape
    call("lmu_attention_forward", pre.dtype, (n, chunk, len(p), width), (pre, p, out), scale)


def backward(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.backward."""
    n, chunk, width = dout.shape
    call("lmu_attention_backward", pre.dtype, (n, chunk, len(p), width), (pre, p, dout, dp), scale)


def call(name: str, dtype: torch.dtype, sizes: Sequence[int], tensors: Sequence[Tensor], *factors: float) -> None:
    """Calls the C++ function `name` for activations of `dtype`: all sizes, then the addresses, then float32 factors.

    C++ gets addresses only, so all it relies on is checked here. Raises ValueError if a tensor is on another device, as that of
    an input is where a module was not moved, and MemoryError.
    """
    loaded = library()
    assert loaded is not None
    dtypes = {"T": dtype, "F": torch.float32, "C": torch.complex64}
    for tensor, kind in zip(tensors, TENSORS[name], strict=True):
        if tensor.device.type != "cpu":
            raise ValueError(f"a tensor is on {tensor.device} and another on the CPU; move the module with .to(x.device)")
        assert tensor.is_contiguous(), f"{name} takes contiguous tensors"
        assert tensor.dtype == dtypes[kind], f"{name} takes {dtypes[kind]}, not {tensor.dtype}"
    function = getattr(loaded, f"{name}_{str(dtype).removeprefix('torch.')}")
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    if function(*map(ctypes.c_int64, sizes), *addresses, *map(ctypes.c_float, factors)):
        raise MemoryError(f"out of memory: {name} cannot allocate its workspace")
