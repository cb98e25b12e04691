"""C++ kernels for CPUs, built at first use and called through ctypes.

Those of implicit_attention.cpp, convolve.cpp and short_convolution.cpp. Called by implicit_attention, mixers/lmu/fourier and
mixers/short_convolution.
"""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from lmu_dist.toolchain import configure_extension_builds

HERE = Path(__file__).parent
LINE = 16  # channels of a cache line, to which rows are padded; the same number as in lanes.h
SOURCES = tuple(
    HERE / name for name in ("lanes.h", "transform.h", "implicit_attention.cpp", "convolve.cpp", "short_convolution.cpp")
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


@cache
def library() -> ctypes.CDLL | None:
    """The library of all C++ kernels, built at first use (about ten seconds); None if the build fails, which is logged once."""
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as e:
        lines = str(e).splitlines() or [type(e).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])
        logging.getLogger(__name__).warning("cannot build the LMU's C++ kernels, using plain torch instead: %s", reason)
        return None
    assert loaded.lmu_line() == LINE, "LINE differs between lanes.h and compiled.py"
    return loaded


def _build() -> str:
    """Builds the library and returns its path. Raises OSError or RuntimeError."""
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        raise OSError(f"there is no C++ compiler {compiler}; install g++, or name another in CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    configure_extension_builds()
    capability = torch.backends.cpu.get_cpu_capability()
    # The name says all that the library depends on, so that no build waits for another, or is repeated by it: ninja also
    # compares the paths of torch.
    contents = {path.name: path.read_bytes() for path in SOURCES}
    flags = [*FLAGS, *ARCHITECTURE_FLAGS.get(capability, ())]
    # g++'s code finds the OpenMP of torch; clang's needs one of its own, which its package libomp-dev holds.
    link_flags = ["-fopenmp"] if "clang" in version else []
    dependencies = (torch.__version__, torch.__file__, platform.machine(), version, *flags)
    digest = sha256(b"".join([" ".join(dependencies).encode(), *contents.values()])).hexdigest()[:12]
    name = f"lmu_{capability.lower()}_{digest}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        _copy(content, folder / file)
    sources = [str(folder / file) for file in contents if file.endswith(".cpp")]
    options = {"extra_cflags": flags, "extra_ldflags": link_flags, "is_python_module": False, "build_directory": str(folder)}
    return str(cpp_extension.load(name, sources, **options))


def _copy(content: bytes, to: Path) -> None:
    """Writes a source to the build folder, where it is the same file for all checkouts and all jobs sent to a cluster.

    Its time never changes: ninja compiles what is newer than the library.
    """
    if to.exists() and to.read_bytes() == content:
        return
    part = to.with_name(f"{to.name}.{os.getpid()}")
    part.write_bytes(content)
    os.utime(part, (0, 0))
    part.replace(to)


def forward(pre: Tensor, p: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.forward."""
    n, chunk, width = out.shape
    call("lmu_attention_forward", pre.dtype, (n, chunk, len(p), width), (pre, p, out), scale)


def backward(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor, scale: float = 1.0) -> None:
    """See implicit_attention.backward."""
    n, chunk, width = dout.shape
    call("lmu_attention_backward", pre.dtype, (n, chunk, len(p), width), (pre, p, dout, dp), scale)


def call(name: str, dtype: torch.dtype, sizes: Sequence[int], tensors: Sequence[Tensor], *factors: float) -> None:
    """Calls the C++ function `name` for tensors of `dtype`: all sizes, then the addresses, then float32 factors.

    Raises MemoryError.
    """
    loaded = library()
    assert loaded is not None
    assert all(tensor.is_contiguous() for tensor in tensors), "C++ gets addresses without strides: tensors must be contiguous"
    function = getattr(loaded, f"{name}_{str(dtype).removeprefix('torch.')}")
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
    if function(*map(ctypes.c_int64, sizes), *addresses, *map(ctypes.c_float, factors)):
        raise MemoryError(f"out of memory: {name} cannot allocate its workspace")
