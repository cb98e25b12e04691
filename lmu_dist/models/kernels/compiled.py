"""What is written in C++ for the processor, built at first use and called by address: reader.cpp, convolve.cpp."""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from lmu_dist.toolchain import prepare_builds

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("lanes.h", "reader.cpp", "convolve.cpp"))
FLAGS = (
    "-O3",
    "-fopenmp",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-mprefer-vector-width=512",
)
# By what torch has found the processor to be capable of, not by the processor itself: nodes may share a cache of builds.
LEVELS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
DTYPES = (torch.float32, torch.bfloat16)


@cache
def library() -> ctypes.CDLL | None:
    """All of it, built at first use (some ten seconds); None where it cannot be, which is logged once."""
    capability = torch.backends.cpu.get_cpu_capability()
    prepare_builds()
    flags = [*FLAGS, *([LEVELS[capability]] if capability in LEVELS else [])]
    # The cache of builds goes by name: versions of this package that share it must not rebuild each other's.
    digest = sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]
    name = f"lmu_{capability.lower()}_{digest}"
    sources = [str(path) for path in SOURCES if path.suffix == ".cpp"]
    try:
        built = cpp_extension.load(name, sources, extra_cflags=flags, is_python_module=False)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as e:
        said = str(e).splitlines()
        why = next((line for line in said if "error:" in line), said[0])
        logging.getLogger(__name__).warning("no compiled LMU, plain torch in its place: %s", why)
        return None


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """See reader.read."""
    n, chunk, width = out.shape
    call("lmu_read", pre.dtype, (n, chunk, len(p), width), (pre, p, out))


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """See reader.read_back."""
    n, chunk, width = dout.shape
    call("lmu_read_back", pre.dtype, (n, chunk, len(p), width), (pre, p, dout, dp))


def call(name: str, dtype: torch.dtype, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Calls the function of that name for numbers of that precision; tensors must have no gaps."""
    made = library()
    assert made is not None
    function = getattr(made, f"{name}_{str(dtype).removeprefix('torch.')}")
    function(*map(ctypes.c_int64, numbers), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))
