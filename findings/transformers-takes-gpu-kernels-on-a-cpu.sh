#!/usr/bin/env bash
# A layer of Qwen3-Next of transformers on a CPU, before and after fla-core is installed, which has kernels for GPUs.
#
# Guess, before it was run: tensors on a CPU take the path of plain torch, whether the package for GPUs is installed or not.
# Found with transformers 5.24.0, fla-core 0.6.0, triton 3.7.1 and torch 2.13.0: before, the layer runs, and a line on stderr says
# that the plain path is taken because flash-linear-attention is not installed. After, the same call raises RuntimeError ("0
# active drivers ([]). There should only be one."): the kernel is chosen by what is installed, not by where the tensors are.
# Why it matters here: the extra `gpu` has fla-core, and an environment is often the same on machines with and without a GPU.
# lmu_dist asks for the device (models/mixers/gpu_kernels.py); benchmarks and tests, which compare with transformers' plain path,
# unwrap its functions.
#
# Run by hand, not in CI: bash findings/transformers-takes-gpu-kernels-on-a-cpu.sh    Exit 0: as found; 1: it has changed. Without a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.24.0 triton==3.7.1 einops==0.8.2
cat > layer.py <<'PY'
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

torch.manual_seed(0)
config = Qwen3NextConfig(
    hidden_size=32,
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    num_hidden_layers=4,
)
try:
    y = Qwen3NextGatedDeltaNet(config, 0)(torch.randn(1, 64, 32))
    print("runs:", tuple(y.shape), y.device)
except RuntimeError as e:
    print("RuntimeError:", e)
PY
echo "without fla-core"
env/bin/python layer.py 2>/dev/null | tee without
env/bin/pip install --quiet --disable-pip-version-check fla-core==0.6.0
echo "with fla-core, on the same machine"
env/bin/python layer.py 2>/dev/null | tee with
grep -q "^runs: (1, 64, 32) cpu" without
grep -q "^RuntimeError: 0 active drivers" with
echo "as found"
