"""The compiled readers against plain torch: C++ on the processor, Triton on a GPU or in its interpreter where there is none."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import cpp_extension

from lmu_dist.models.kernels import compiled, reader
from lmu_dist.models.mixers.lmu import chunked, fourier
from lmu_dist.models.mixers.lmu.mixer import LMU

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
GPU = CPU if INTERPRETED else torch.device("cuda")
NO_GPU = not (INTERPRETED or torch.cuda.is_available())
# R, D: of one, of no whole vectors, of several blocks of columns
SHAPES = [(r, d) for r in (1, 2, 3, 5, 25) for d in (1, 3, 16, 17, 204)]
# The interpreter takes a second for a hundred tokens. Besides: rows for more than one tile, and the most there can be
FEW_SHAPES = [(1, 1), (3, 17), (5, 33), (25, 204), (40, 16), (70, 5)]
# bfloat16 rounds by 0.4 % at most, Triton's interpreter to nearest or not
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)]


def problem(rows, width, dtype, device=CPU, n=3, chunk=2):
    torch.manual_seed(rows * 1000 + width)
    pre = torch.randn(chunk * 3 * rows, n * width).to(device, dtype)
    return pre, torch.randn(rows).to(device), torch.randn(n, chunk, width).to(device, dtype)


def plainly(pre, p, dout):
    """out, d pre and d p by plain torch in float64."""
    n, chunk, width = dout.shape
    pre, p = (tensor.double().clone().requires_grad_() for tensor in (pre, p))
    out = reader.attend(pre.view(chunk, -1, n, width).permute(2, 0, 1, 3), p)
    return out.detach(), *torch.autograd.grad(out, (pre, p), dout.double())


def compare(got, expected, bound):
    # d p is 0 with one row, its softmax being 1: the least that counts
    assert float((got.double() - expected).norm()) <= bound * max(1e-6, float(expected.norm()))


def check(made, pre, p, dout, bound):
    expected = plainly(pre, p, dout)
    out, dp = torch.empty_like(dout), torch.ones_like(p)
    made.read(pre, p, out)
    made.read_back(pre, p, dout, dp)  # over pre
    for got, exact, within in zip((out, pre, dp - 1), expected, (bound, bound, max(bound, 1e-5)), strict=True):
        compare(got, exact, within)


def check_nan(made, pre, p, dout):
    """NaN in one reading of a token: in whatever comes of it, as in plain torch, and nowhere else."""
    width = dout.shape[2]
    pre[0, width] = torch.nan  # Q of the first token of the second chunk
    expected = plainly(pre, p, dout)
    out, dp = torch.empty_like(dout), torch.zeros_like(p)
    made.read(pre, p, out)
    made.read_back(pre, p, dout, dp)
    for got, exact in zip((out, pre, dp), expected, strict=True):
        assert exact.isnan().any()
        assert torch.equal(got.isnan(), exact.isnan())


@pytest.fixture
def cpp():
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        pytest.skip("no C++ compiler here")
    assert compiled.library() is not None


needs_gpu = pytest.mark.skipif(NO_GPU, reason="no GPU here: see test_triton_in_its_interpreter")


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_cpp(rows, width, dtype, bound):
    assert reader.implementation(dtype, CPU, rows) == "c++"
    check(reader, *problem(rows, width, dtype), bound)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_cpp(dtype):
    check_nan(reader, *problem(3, 17, dtype))


@pytest.mark.usefixtures("cpp")
def test_cpp_leaves_denormal_numbers_to_others():
    check(reader, *problem(3, 17, torch.float32), 2e-6)
    assert (torch.tensor([1e-30]) * torch.tensor([1e-10])).item() > 0


def test_no_compiler_is_one_line(monkeypatch, caplog):
    monkeypatch.setattr(compiled.cpp_extension, "get_cxx_compiler", lambda: "no-such-compiler")
    assert compiled.library.__wrapped__() is None
    [record] = caplog.records
    assert record.getMessage() == (
        "no compiled LMU, plain torch in its place: "
        "there is no C++ compiler no-such-compiler; install g++, or name another in CXX"
    )


def test_plain_torch_writes_over_pre_as_the_others_do():
    assert reader.implementation(torch.float64, CPU) == "torch"
    check(reader, *problem(3, 17, torch.float64), 1e-12)


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), FEW_SHAPES if INTERPRETED else [*SHAPES, *FEW_SHAPES, (128, 40)])
def test_triton(rows, width, dtype, bound):
    from lmu_dist.models.kernels import device

    assert INTERPRETED or reader.implementation(dtype, GPU, rows) == "triton"
    check(device if INTERPRETED else reader, *problem(rows, width, dtype, GPU), bound)


@needs_gpu
@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in which the interpreter works
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_triton(dtype):
    from lmu_dist.models.kernels import device

    check_nan(device, *problem(3, 17, dtype, GPU))


def stepped(lmu, x):
    """Output of the fused form, and gradients of a loss of it."""
    lmu.form = "fused"
    out = lmu(x)
    leaves = (x, *lmu.parameters())
    return out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)


def check_operator(got, lmu, x, bound):
    """Against the chunked form in float64, from the same weights."""
    exact, x = LMU(12, 3, 50.0, "chunked").double(), x.detach().cpu().double().requires_grad_()
    exact.load_state_dict(lmu.state_dict())
    out = exact(x)
    expected = (out.detach(), *torch.autograd.grad(out.square().mean(), (x, *exact.parameters())))
    for some, other in zip(got, expected, strict=True):
        compare(some.cpu(), other, bound)


OPERATOR = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def operator(dtype, device):
    torch.manual_seed(0)
    return LMU(12, 3, 50.0).to(device, dtype), torch.randn(1, 70, 5).to(device, dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "bound"), OPERATOR)
def test_operator_on_a_cpu(dtype, bound):
    lmu, x = operator(dtype, CPU)
    check_operator(stepped(lmu, x), lmu, x, bound)


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), OPERATOR)
def test_triton_in_the_operator(dtype, bound, monkeypatch):
    from lmu_dist.models.kernels import device

    if INTERPRETED:
        monkeypatch.setattr(fourier, "serves", lambda *_: False)
        monkeypatch.setattr(reader, "_made", lambda *_: device)
        monkeypatch.setattr(chunked, "one_by_one", lambda _: False)
    lmu, x = operator(dtype, GPU)
    check_operator(stepped(lmu, x), lmu, x, bound)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(("dtype", "bound"), OPERATOR)
def test_operator_in_a_cuda_graph(dtype, bound):
    lmu, x = operator(dtype, GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stepped(lmu, x)
        torch.cuda.set_sync_debug_mode("error")  # a second time, nothing waits
        try:
            stepped(lmu, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = stepped(lmu, x)
    with torch.no_grad():
        x.normal_()  # what the graph reads when it is replayed
    graph.replay()
    torch.cuda.synchronize()
    check_operator(got, lmu, x, bound)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs the tests of Triton where there is no GPU")
def test_triton_in_its_interpreter():
    """In a process of its own, since Triton decides at import."""
    pytest.importorskip("triton", reason="Triton is not installed: it is in the dev extra, on Linux")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "test_triton or nan_in_triton", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(FEW_SHAPES) + 4} passed" in done.stdout


COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lmu_dist.models.kernels import device

for name, dtype, rows, width in json.loads(sys.argv[1]):
    kernel, knobs = getattr(device, name), device.knobs(rows, width, getattr(torch, dtype))
    warps = knobs.pop("num_warps")
    element = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    types = {"p": "*fp32", "dp": "*fp32", "n_chunks": "i32", "n_tokens": "i32", **dict.fromkeys(knobs, "constexpr")}
    signature = {n: types.get(n, element) for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in knobs.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(name, dtype, "mma" in made.asm["ptx"], made.metadata.shared)
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_triton_compiles_without_a_gpu(tmp_path):
    """What the interpreter takes and the compiler does not; bfloat16 has tensor cores, float32 none; shared memory will do."""
    pytest.importorskip("triton", reason="Triton is not installed: it is in the dev extra, on Linux")
    cases = [(name, dtype, 25, 204) for name in ("_read", "_read_back") for dtype in ("float32", "bfloat16")]
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    assert [(name, dtype) for name, dtype, *_ in made] == [(name, dtype) for name, dtype, *_ in cases]
    assert all((tensor_cores == "True") == (dtype == "bfloat16") for _, dtype, tensor_cores, _ in made)
    assert all(int(shared) < 48 * 1024 for *_, shared in made)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("back", [False, True])
def test_memory_carried_by_pairs_is_carried_one_by_one(n, back):
    torch.manual_seed(n)
    hop, added = torch.randn(6, 6, dtype=torch.float64) / 3, torch.randn(6, n, 4, dtype=torch.float64)
    m, expected = torch.zeros(6, 4, dtype=torch.float64), []
    for i in range(n):
        m = (hop.T if back else hop) @ m + added[:, i]
        expected.append(m)
    assert torch.allclose(chunked.carried(added, hop, back), torch.stack(expected, 1), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda given: chunked.carried(given, hop, back), added.requires_grad_())


@pytest.mark.parametrize("length", [20, 64, 65, 200])  # one chunk; two; a third begun; many
def test_operator_of_a_gpu_equals_that_of_a_cpu(length, monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(2, length, 5), torch.randn(9, 12) / 3, torch.randn(9), torch.randn(3)]
    plan = chunked.Plan(chunked.steps(12, 50.0, 32, torch.float64, CPU), False, torch.float64, 2, False)
    results = []
    for one_by_one in (True, False):
        monkeypatch.setattr(chunked, "one_by_one", lambda _, taken=one_by_one: taken)
        leaves = [tensor.double().requires_grad_() for tensor in given]
        x, reading, bias, p = leaves
        out = chunked.attended(x, reading, bias, p, plan)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for cpu, gpu in zip(*results, strict=True):
        assert torch.allclose(cpu, gpu, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_never_asks_for_a_value(dtype):
    """Tensors of the meta device have none: what waits for the device on a GPU, and breaks a CUDA graph, raises here."""
    lmu = LMU(30, 3, 100.0).to("meta", dtype)
    x = torch.empty(2, 500, 8, device="meta", dtype=dtype, requires_grad=True)
    lmu.form = "fused"
    lmu(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
