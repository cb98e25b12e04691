"""Section `families` of speed.py: a training step of every family, and the mixers that transformers has too.

Tables: `family_step`, tokens/s of forward, backward and Adam against llama at V = 4,096; `mixer_against_transformers`, forward
and backward of the whole mixer of gated_deltanet and mamba2 against the torch paths of Qwen3-Next and Mamba-2 in transformers
with the same widths. Those work in chunks of 64 tokens; Mamba-2's default of 256 is measured too. All in float32 on 2 x 1,024
tokens. Called by section.py.
"""

import importlib
import inspect
import math
import statistics
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from measure import Row, Run, Section, interleaved, ratio
from steps import LENGTH, N_ROWS, Training
from torch import nn

from lmu_dist.models.registry import built_in, find
from lmu_dist.models.shape import Shape
from lmu_dist.models.sizing import shape_for

SIZES, VOCABULARY, BASE = (100_000, 1_000_000), 4_096, "llama"


def step(device: torch.device, quick: bool) -> list[Row]:
    """A training step of every family."""
    sizes, vocabulary, length = ((10_000,), 512, 128) if quick else (SIZES, VOCABULARY, LENGTH)
    rows = list[Row]()
    for n_params in sizes:
        shapes = [shape_for(name, n_params, vocab_tokens=vocabulary, sequence_tokens=length) for name in built_in()]
        trainings = {shape.family: Training(shape, torch.float32, N_ROWS, device) for shape in shapes}
        for training in trainings.values():
            training()
            training()
        times = interleaved(trainings, device, 2 if quick else 7)
        for family, spent in times.items():
            row: Row = {"family": family, "n_params": n_params, "vocab_tokens": vocabulary}
            row["tokens_per_second"] = N_ROWS * length / statistics.median(spent)
            rows.append(row | {"speed_against_llama": ratio(times[BASE], spent)})
    return rows


def torch_path(model: str) -> ModuleType:
    """The module of a model in transformers, with its functions of plain torch.

    They are wrapped by kernels of packages that are installed, on any device: those of fla-core fail without a GPU
    (findings/transformers-takes-gpu-kernels-on-a-cpu.sh).
    """
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    for name, function in inspect.getmembers(module, inspect.isfunction):
        setattr(module, name, inspect.unwrap(function))
    return module


def qwen3_next(shape: Shape) -> nn.Module:
    """The mixer of Qwen3-Next in transformers with the widths of a gated_deltanet."""
    config = SimpleNamespace(
        hidden_size=shape.d_model,
        linear_num_value_heads=shape.n_heads,
        linear_num_key_heads=shape.n_heads,
        linear_key_head_dim=shape.key_width,
        linear_value_head_dim=shape.value_width,
        linear_conv_kernel_dim=4,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        layer_types=["linear_attention"],
    )
    return torch_path("qwen3_next").Qwen3NextGatedDeltaNet(config, 0)


def mamba2(shape: Shape, chunk_tokens: int) -> nn.Module:
    """The mixer of Mamba-2 in transformers with the widths of a mamba2."""
    config = SimpleNamespace(
        hidden_size=shape.d_model,
        num_heads=shape.n_heads,
        head_dim=shape.head_width,
        expand=shape.n_heads * shape.head_width / shape.d_model + 1e-9,  # it takes the integer part of their product
        state_size=shape.d_state,
        n_groups=shape.n_groups,
        conv_kernel=4,
        chunk_size=chunk_tokens,
        time_step_rank=1,
        time_step_limit=(0.0, math.inf),
        time_step_min=0.001,
        time_step_max=0.1,
        time_step_floor=1e-4,
        use_conv_bias=False,
        use_bias=False,
        hidden_act="silu",
        layer_norm_epsilon=1e-6,
        layer_types=["linear_attention"],
    )
    return torch_path("mamba2").Mamba2Mixer(config, 0)


def mixers(device: torch.device, quick: bool) -> list[Row]:
    """Mixers of two families against those of transformers."""
    sizes, length = ((10_000,), 128) if quick else (SIZES, LENGTH)
    rows = list[Row]()
    for n_params in sizes:
        shapes = {
            name: shape_for(name, n_params, vocab_tokens=VOCABULARY, sequence_tokens=length)
            for name in ("gated_deltanet", "mamba2")
        }
        modules = {(name, "here"): find(name).mixer(shape, find(name).Options()) for name, shape in shapes.items()}
        modules[("gated_deltanet", "transformers, 64")] = qwen3_next(shapes["gated_deltanet"])
        for chunk in (64, 256):
            modules[("mamba2", f"transformers, {chunk}")] = mamba2(shapes["mamba2"], chunk)
        runs = {key: _pass(module.to(device), shapes[key[0]].d_model, length, device) for key, module in modules.items()}
        for run in runs.values():
            run()
            run()
        times = interleaved(runs, device, 2 if quick else 9)
        for (name, where), spent in times.items():
            row: Row = {"family": name, "n_params": n_params, "mixer": where}
            row["tokens_per_second"] = N_ROWS * length / statistics.median(spent)
            rows.append(row | {"speed_here_against_it": ratio(spent, times[name, "here"])})
    return rows


def _pass(module: nn.Module, d_model: int, length: int, device: torch.device) -> Run:
    x = torch.randn(N_ROWS, length, d_model, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()

    def run() -> Any:
        module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).sum().backward()

    return run


def measure(device: torch.device, quick: bool) -> Section:
    """Runs the section."""
    found, notes = {"family_step": step(device, quick)}, list[str]()
    try:
        found["mixer_against_transformers"] = mixers(device, quick)
    except ModuleNotFoundError as e:
        notes.append(f"mixers of transformers: left out, {e}")
    return Section(found, notes)
