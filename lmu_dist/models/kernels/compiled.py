"""The reader on the processor: reader.cpp, built at first use. Shapes and legend as in reader, its caller."""

import ctypes
import logging
import os
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("reader.cpp")
FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-mprefer-vector-width=512")
# By what torch has found the processor to be capable of, not by the processor itself: nodes may share a cache of builds.
LEVELS = {"AVX512": "-march=x86-64-v4", "AVX2": "-march=x86-64-v3"}
DTYPES = (torch.float32, torch.bfloat16)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled reader, built at first use (some five seconds); None where it cannot be, which is logged once."""
    capability = torch.backends.cpu.get_cpu_capability()
    path = os.environ.get("PATH", "")
    # ninja stands beside the interpreter, and need not be on PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    flags = [*FLAGS, *([LEVELS[capability]] if capability in LEVELS else [])]
    # The cache of builds goes by name: versions of this package that share it must not rebuild each other's.
    name = f"lmu_reader_{capability.lower()}_{sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    try:
        built = cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError) as e:
        logging.getLogger(__name__).warning("no compiled LMU reader, plain torch in its place: %s", str(e).splitlines()[0])
        return None
    finally:
        os.environ["PATH"] = path


def read(pre: Tensor, p: Tensor, out: Tensor) -> None:
    """See reader.read."""
    _call("lmu_read", pre, p, out)


def read_back(pre: Tensor, p: Tensor, dout: Tensor, dp: Tensor) -> None:
    """See reader.read_back."""
    _call("lmu_read_back", pre, p, dout, dp)


def _call(name: str, pre: Tensor, p: Tensor, token: Tensor, *more: Tensor) -> None:
    (n, chunk, width), made = token.shape, library()
    assert made is not None
    function = getattr(made, f"{name}_{str(pre.dtype).removeprefix('torch.')}")
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (pre, p, token, *more)]
    function(*map(ctypes.c_int64, (n, chunk, len(p), width)), *pointers)
