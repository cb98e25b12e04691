"""The compiled attention kernels against plain torch: C++ on the CPU, Triton on a GPU or, without one, in its interpreter."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmu_dist.models.kernels import compiled, implicit_attention
from lmu_dist.models.mixers.lmu import chunked, fourier
from lmu_dist.models.mixers.lmu.mixer import LMU
from lmu_dist.models.mixers.lmu.scan import parallel_scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
GPU = CPU if INTERPRETED else torch.device("cuda")
NO_GPU = not (INTERPRETED or torch.cuda.is_available())
# (R, D): one row or column, incomplete vectors, several blocks of columns
SHAPES = [(r, d) for r in (1, 2, 3, 5, 25) for d in (1, 3, 16, 17, 204)]
# For the interpreter, which takes a second for a hundred tokens. Includes more rows than in one tile
FEW_SHAPES = [(1, 1), (3, 17), (5, 33), (25, 204), (40, 16), (70, 5)]
# bfloat16's rounding error is at most 0.4 %; Triton's interpreter does not always round to nearest
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)]


def problem(rows, width, dtype, device=CPU, n=3, chunk=2):
    torch.manual_seed(rows * 1000 + width)
    pre = torch.randn(chunk * 3 * rows, n * width).to(device, dtype)
    return pre, torch.randn(rows).to(device), torch.randn(n, chunk, width).to(device, dtype)


def expected_results(pre, p, dout, scale=1.0):
    """out, d pre and d p in plain torch and float64."""
    n, chunk, width = dout.shape
    pre, p = (tensor.double().clone().requires_grad_() for tensor in (pre, p))
    out = implicit_attention.attend(pre.view(chunk, -1, n, width).permute(2, 0, 1, 3), p, scale)
    return out.detach(), *torch.autograd.grad(out, (pre, p), dout.double())


def compare(got, expected, bound):
    # The bound has a minimum, since some expected gradients are 0 with one row, whose softmax is 1
    assert float((got.double() - expected).norm()) <= bound * max(1e-6, float(expected.norm()))


def check(kernels, pre, p, dout, bound, scale=1.0):
    expected = expected_results(pre, p, dout, scale)
    out, dp = torch.empty_like(dout), torch.ones_like(p)
    kernels.forward(pre, p, out, scale)
    kernels.backward(pre, p, dout, dp, scale)  # overwrites pre
    for got, exact, tolerance in zip((out, pre, dp - 1), expected, (bound, bound, max(bound, 1e-5)), strict=True):
        compare(got, exact, tolerance)


def check_nan(kernels, pre, p, dout):
    """A NaN in one pre-activation reaches the same results as in plain torch, and no others."""
    width = dout.shape[2]
    pre[0, width] = torch.nan  # Q of the first token of the second chunk
    expected = expected_results(pre, p, dout)
    out, dp = torch.empty_like(dout), torch.zeros_like(p)
    kernels.forward(pre, p, out)
    kernels.backward(pre, p, dout, dp)
    for got, exact in zip((out, pre, dp), expected, strict=True):
        assert exact.isnan().any()
        assert torch.equal(got.isnan(), exact.isnan())


@pytest.fixture
def cpp():
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler on this machine")
    assert compiled.library() is not None


needs_gpu = pytest.mark.skipif(NO_GPU, reason="no GPU on this machine; test_triton_in_the_interpreter runs it")


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_cpp_equals_plain_torch(rows, width, dtype, bound):
    assert implicit_attention.implementation(dtype, CPU, rows) == "c++"
    check(implicit_attention, *problem(rows, width, dtype), bound)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_cpp_scales_the_scores(dtype, bound):
    check(implicit_attention, *problem(5, 33, dtype), bound, scale=0.125)


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_propagates_nan(dtype):
    check_nan(implicit_attention, *problem(3, 17, dtype))


@pytest.mark.usefixtures("cpp")
@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_cpp_dead_units_have_no_gradient(scale):
    """GELU and its slope are 0 far below 0: an error of 1e-8 there would be multiplied by keys, and again by values."""
    pre, p, dout = problem(5, 17, torch.float32)
    check(implicit_attention, pre * scale, p, dout, 1e-5)


@pytest.mark.usefixtures("cpp")
def test_cpp_restores_denormals_afterwards():
    check(implicit_attention, *problem(3, 17, torch.float32), 2e-6)
    assert (torch.tensor([1e-30]) * torch.tensor([1e-10])).item() > 0


# Capability as torch reports it -> float32 numbers of a vector
LANES = {"AVX512": 16, "AVX2": 8, "DEFAULT": 4}


@pytest.mark.usefixtures("cpp")
def test_cpp_vectors_are_as_wide_as_registers():
    library = compiled.library()
    assert library is not None
    capability = torch.backends.cpu.get_cpu_capability()
    assert library.lmu_lanes() == LANES.get(capability, 4)
    assert f"lmu_{capability.lower()}_" in library._name  # builds for several instruction sets lie side by side


@pytest.mark.usefixtures("cpp")
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="the instruction set is chosen already")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_cpp_for_other_instruction_sets(capability):
    """The tests of the C++ kernels with the builds for older processors, which this one runs too."""
    if LANES[capability.upper()] >= LANES.get(torch.backends.cpu.get_cpu_capability(), 4):
        pytest.skip("this processor has no more than that")
    modules = ("test_kernels", "test_lmu", "test_gated_deltanet", "test_mamba2", "test_gated_norm", "test_short_convolution")
    tests = [os.path.join(os.path.dirname(__file__), f"{module}.py") for module in modules]
    chosen = "cpp or on_a_cpu or fused or (torchs_convolution and f32)"
    options = ["-q", "-x", "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-m", "pytest", *tests, *options], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


CROSS_COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.fixture(scope="module")
def on_aarch64(tmp_path_factory):
    """Calls a C++ kernel on an emulated processor: (function, sizes, tensors) -> the tensors after the call."""
    program = tmp_path_factory.mktemp("aarch64") / "main"
    here = Path(__file__).parent / "emulated"
    sources = [here / "main.cpp", *(compiled.HERE / name for name in ("implicit_attention.cpp", "convolve.cpp"))]
    flags = [flag for flag in compiled.FLAGS if flag != "-fopenmp"]
    subprocess.run([CROSS_COMPILER, *flags, "-static", f"-I{here}", *sources, "-o", program], check=True)

    def call(function, sizes, tensors):
        arrays = [tensor.resolve_conj().contiguous().numpy() for tensor in tensors]
        given = b"".join(struct.pack("<q", array.nbytes) + array.tobytes() for array in arrays)
        command = [EMULATOR, program, function, *map(str, sizes)]
        output = memoryview(subprocess.run(command, input=given, capture_output=True, check=True).stdout)
        results = []
        for array, tensor in zip(arrays, tensors, strict=True):
            results.append(torch.frombuffer(bytearray(output[: array.nbytes]), dtype=tensor.dtype).view(tensor.shape))
            output = output[array.nbytes :]
        return results

    return call


@pytest.mark.skipif(not (CROSS_COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
def test_attention_on_aarch64(on_aarch64):
    pre, p, dout = problem(5, 17, torch.float32)
    (n, chunk, width), rows = dout.shape, len(p)
    sizes = (n, chunk, rows, width)
    out, dpre, dp = expected_results(pre, p, dout)
    compare(on_aarch64("lmu_attention_forward", sizes, (pre, p, torch.empty_like(dout)))[2], out, 2e-6)
    found = on_aarch64("lmu_attention_backward", sizes, (pre, p, dout, torch.zeros_like(p)))
    compare(found[0], dpre, 2e-6)
    compare(found[3], dp, 1e-5)


@pytest.mark.usefixtures("cpp")
@pytest.mark.skipif(not (CROSS_COMPILER and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
@pytest.mark.parametrize("points", [64, 128])
def test_convolution_on_aarch64(on_aarch64, points):
    """Equals that of this processor, which test_lmu compares with the oracle."""
    torch.manual_seed(0)
    b, t, d, k = sizes = (2, points // 2 + 5, 17, 5)
    x, bias, dy = torch.randn(b, t, 32), torch.randn(k), torch.randn(k, b * t * 32)
    x[..., d:] = 0
    spectra = torch.randn((k + 1) // 2, points, dtype=torch.complex64)
    forward = (x, spectra, bias, torch.zeros(k, b * t * 32))
    backward = (x, spectra, dy, torch.zeros_like(x), torch.zeros_like(spectra), torch.zeros(k))
    for function, tensors in (("lmu_convolve_forward", forward), ("lmu_convolve_backward", backward)):
        found = on_aarch64(function, (*sizes, points), tensors)
        compiled.call(function, torch.float32, (*sizes, points), tensors)
        for got, expected in zip(found, tensors, strict=True):
            assert float((got - expected).norm()) <= 2e-6 * float(expected.norm())


def test_precisions_of_tensors_are_those_of_the_sources():
    """C++ gets addresses: `compiled.call` checks what the declarations say."""
    found = {}
    for path in compiled.SOURCES:
        for name, arguments in re.findall(r"int (lmu_\w+_(?:forward|backward))_\w*#*\w*\(([^)]*)\)", path.read_text()):
            types = re.findall(r"(\w+)\* *(\w+)", arguments)
            kinds = {"float": "F", "Scalar": "C", "T": "T"}
            found[name] = "".join("C" if "spectra" in argument else kinds[kind] for kind, argument in types)
    assert found == compiled.TENSORS


@pytest.mark.usefixtures("cpp")
def test_cpp_refuses_tensors_that_are_elsewhere_or_of_another_kind():
    pre, p, dout = problem(3, 17, torch.float32)
    with pytest.raises(ValueError, match=r"a tensor is on meta and another on the CPU; move the module with \.to\(x\.device\)"):
        implicit_attention.forward(pre, p.to("meta"), torch.empty_like(dout))
    with pytest.raises(ValueError, match="is on meta"):
        LMU(8, 2, 16.0).to("meta")(torch.randn(1, 4, 2))
    for wrong in (p.double(), p.bfloat16()):
        with pytest.raises(AssertionError, match=r"takes torch\.float32, not"):
            compiled.forward(pre, wrong, torch.empty_like(dout))


def test_missing_compiler_logs_one_line(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert compiled.library.__wrapped__() is None
    [record] = caplog.records
    assert record.getMessage() == (
        "cannot build the C++ kernels, using plain torch instead: "
        "there is no C++ compiler no-such-compiler; install g++, or name another in CXX"
    )


def test_plain_torch_overwrites_pre_too():
    assert implicit_attention.implementation(torch.float64, CPU) == "torch"
    check(implicit_attention, *problem(3, 17, torch.float64), 1e-12, scale=0.125)


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("rows", "width"), FEW_SHAPES if INTERPRETED else [*SHAPES, *FEW_SHAPES, (128, 40)])
def test_triton_equals_plain_torch(rows, width, dtype, bound):
    from lmu_dist.models.kernels import triton_kernels

    assert INTERPRETED or implicit_attention.implementation(dtype, GPU, rows) == "triton"
    check(triton_kernels if INTERPRETED else implicit_attention, *problem(rows, width, dtype, GPU), bound)


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_triton_scales_the_scores(dtype, bound):
    from lmu_dist.models.kernels import triton_kernels

    check(triton_kernels if INTERPRETED else implicit_attention, *problem(5, 33, dtype, GPU), bound, scale=0.125)


@needs_gpu
@pytest.mark.filterwarnings("ignore:invalid value")  # from numpy, which the interpreter uses
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_propagates_nan(dtype):
    from lmu_dist.models.kernels import triton_kernels

    check_nan(triton_kernels, *problem(3, 17, dtype, GPU))


def output_and_gradients(lmu, x):
    """Output of the fused form, and gradients of a loss."""
    lmu.form = "fused"
    out = lmu(x)
    leaves = (x, *lmu.parameters())
    return out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)


def check_lmu(got, lmu, x, bound):
    """Compares with the chunked form in float64 with the same weights."""
    exact, x = LMU(12, 3, 50.0, "chunked").double(), x.detach().cpu().double().requires_grad_()
    exact.load_state_dict(lmu.state_dict())
    out = exact(x)
    expected = (out.detach(), *torch.autograd.grad(out.square().mean(), (x, *exact.parameters())))
    for actual, exact_value in zip(got, expected, strict=True):
        compare(actual.cpu(), exact_value, bound)


LMU_PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def lmu_and_input(dtype, device):
    torch.manual_seed(0)
    return LMU(12, 3, 50.0).to(device, dtype), torch.randn(1, 70, 5).to(device, dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "bound"), LMU_PRECISIONS)
def test_lmu_on_a_cpu(dtype, bound):
    lmu, x = lmu_and_input(dtype, CPU)
    check_lmu(output_and_gradients(lmu, x), lmu, x, bound)


@needs_gpu
@pytest.mark.parametrize(("dtype", "bound"), LMU_PRECISIONS)
def test_triton_inside_the_lmu(dtype, bound, monkeypatch):
    from lmu_dist.models.kernels import triton_kernels

    if INTERPRETED:
        monkeypatch.setattr(fourier, "is_supported", lambda *_: False)
        monkeypatch.setattr(implicit_attention, "_kernels", lambda *_: triton_kernels)
        monkeypatch.setattr(chunked, "use_sequential_scan", lambda _: False)
    lmu, x = lmu_and_input(dtype, GPU)
    check_lmu(output_and_gradients(lmu, x), lmu, x, bound)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize(("dtype", "bound"), LMU_PRECISIONS)
def test_lmu_in_a_cuda_graph(dtype, bound):
    lmu, x = lmu_and_input(dtype, GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        output_and_gradients(lmu, x)
        torch.cuda.set_sync_debug_mode("error")  # after the first call no operation may synchronize
        try:
            output_and_gradients(lmu, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = output_and_gradients(lmu, x)
    with torch.no_grad():
        x.normal_()  # the graph's input at replay
    graph.replay()
    torch.cuda.synchronize()
    check_lmu(got, lmu, x, bound)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs the Triton tests on machines without a GPU")
def test_triton_in_the_interpreter():
    """In a process of its own, since Triton reads TRITON_INTERPRET at import."""
    pytest.importorskip("triton", reason="Triton is not installed: it is in the dev extra, on Linux")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "test_triton", "-p", "no:cacheprovider"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{2 * len(FEW_SHAPES) + 6} passed" in result.stdout


COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lmu_dist.models.kernels import triton_kernels

triton_kernels.is_hopper = lambda _: True
for name, dtype, rows, width in json.loads(sys.argv[1]):
    config = triton_kernels.launch_config(rows, width, getattr(torch, dtype), torch.device("cuda"))
    kernel = getattr(triton_kernels, name)
    warps = config.pop("num_warps")
    element = {"float32": "*fp32", "bfloat16": "*bf16"}[dtype]
    types = {"p": "*fp32", "dp": "*fp32", "scale": "fp32", "n_chunks": "i32", "n_tokens": "i32"}
    types |= dict.fromkeys(config, "constexpr")
    signature = {n: types.get(n, element) for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in config.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    print(name, dtype, rows, "mma.sync" in ptx, "wgmma" in ptx, compiled.metadata.shared)
"""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_triton_compiles_without_a_gpu(tmp_path):
    """For Hopper. bfloat16 uses tensor cores up to 32 rows, float32 does not; shared memory suffices. No instruction of warp
    groups, of which Triton compiles some wrongly.
    """
    pytest.importorskip("triton", reason="Triton is not installed: it is in the dev extra, on Linux")
    cases = [(name, dtype, 25, 204) for name in ("_forward", "_backward") for dtype in ("float32", "bfloat16")]
    cases.append(("_backward", "bfloat16", 40, 64))
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    compiled_kernels = [line.split() for line in result.stdout.splitlines()]
    found = [(name, dtype, int(rows), mma, wgmma) for name, dtype, rows, mma, wgmma, _ in compiled_kernels]
    assert found == [(*case[:3], str(case[1] == "bfloat16" and case[2] <= 32), "False") for case in cases]
    assert all(int(shared) < 48 * 1024 for *_, shared in compiled_kernels)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("transpose", [False, True])
def test_parallel_scan_equals_sequential_scan(n, transpose):
    torch.manual_seed(n)
    a, added = torch.randn(6, 6, dtype=torch.float64) / 3, torch.randn(6, n, 4, dtype=torch.float64)
    m, expected = torch.zeros(6, 4, dtype=torch.float64), []
    for i in range(n):
        m = (a.T if transpose else a) @ m + added[:, i]
        expected.append(m)
    assert torch.allclose(parallel_scan(added, a, transpose), torch.stack(expected, 1), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda given: parallel_scan(given, a, transpose), added.requires_grad_())


@pytest.mark.parametrize("length", [20, 64, 65, 200])  # one chunk; two; two and a partial one; many
def test_chunked_lmu_with_a_gpus_scan_equals_that_of_a_cpu(length, monkeypatch):
    torch.manual_seed(0)
    given = [torch.randn(2, length, 5), torch.randn(9, 12) / 3, torch.randn(9), torch.randn(3)]
    config = chunked.ChunkedConfig(chunked.chunk_transition(12, 50.0, 32, torch.float64, CPU), False, torch.float64, 2, False)
    results = []
    for sequential in (True, False):
        monkeypatch.setattr(chunked, "use_sequential_scan", lambda _, value=sequential: value)
        leaves = [tensor.double().requires_grad_() for tensor in given]
        x, projection, bias, p = leaves
        out = chunked.fused_lmu(x, projection, bias, p, config)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for cpu, gpu in zip(*results, strict=True):
        assert torch.allclose(cpu, gpu, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lmu_never_synchronizes(dtype):
    """Reading a value from a tensor waits for a GPU and breaks a CUDA graph; on the meta device it raises."""
    lmu = LMU(30, 3, 100.0).to("meta", dtype)
    x = torch.empty(2, 500, 8, device="meta", dtype=dtype, requires_grad=True)
    lmu.form = "fused"
    lmu(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
