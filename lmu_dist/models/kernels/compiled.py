"""What is written in C++ for the processor, built at first use and called by address: reader.cpp, convolve.cpp."""

import ctypes
import logging
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from lmu_dist.models.accounting import LANES
from lmu_dist.toolchain import prepare_builds

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("lanes.h", "transform.h", "reader.cpp", "convolve.cpp"))
FLAGS = (
    "-O3",
    "-fopenmp",
    "-std=c++20",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
# By what torch has found the processor to be capable of, not by the processor itself: nodes may share a cache of builds.
LEVELS = {"AVX512": ("-march=x86-64-v4", "-mprefer-vector-width=512"), "AVX2": ("-march=x86-64-v3",)}
DTYPES = (torch.float32, torch.bfloat16)


@cache
def library() -> ctypes.CDLL | None:
    """All of it, built at first use (some ten seconds); None where it cannot be, which is logged once."""
    try:
        made = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as e:
        said = str(e).splitlines() or [type(e).__name__]
        why = next((line for line in said if "error:" in line), said[0])
        logging.getLogger(__name__).warning("no compiled LMU, plain torch in its place: %s", why)
        return None
    assert made.lmu_lanes() == LANES, "kernels/lanes.h and models/accounting disagree"
    return made


def _build() -> str:
    """The library's path. Raises OSError or RuntimeError."""
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        raise OSError(f"there is no C++ compiler {compiler}; install g++, or name another in CXX")
    prepare_builds()
    capability = torch.backends.cpu.get_cpu_capability()
    # The cache of builds goes by name, and keeps paths: versions and checkouts that share it must not rebuild each other's.
    known = [torch.__version__, str(HERE), *(path.read_text() for path in SOURCES)]
    name = f"lmu_{capability.lower()}_{sha256(''.join(known).encode()).hexdigest()[:12]}"
    sources = [str(path) for path in SOURCES if path.suffix == ".cpp"]
    flags = [*FLAGS, *LEVELS.get(capability, ())]
    return str(cpp_extension.load(name, sources, extra_cflags=flags, is_python_module=False))


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """See reader.read."""
    n, chunk, width = out.shape
    call("lmu_read", pre.dtype, (n, chunk, len(p), width), (pre, p, out))


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """See reader.read_back."""
    n, chunk, width = dout.shape
    call("lmu_read_back", pre.dtype, (n, chunk, len(p), width), (pre, p, dout, dp))


def call(name: str, dtype: torch.dtype, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Calls the function of that name for numbers of that precision. Raises MemoryError."""
    made = library()
    assert made is not None
    assert all(tensor.is_contiguous() for tensor in tensors), "addresses alone are passed on, so tensors must have no gaps"
    function = getattr(made, f"{name}_{str(dtype).removeprefix('torch.')}")
    if function(*map(ctypes.c_int64, numbers), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)):
        raise MemoryError(f"no memory for the working space of {name}")
