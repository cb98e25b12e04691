#!/usr/bin/env bash
# A float64 model under DeepSpeed at ZeRO stage 0 on a CPU.
#
# Guess, before it was run: it trains. Stage 0 leaves the model and torch's optimizer as they are, gloo reduces float64, plain DDP
# trains such a model, and the function that sorts gradients for the reduction is called split_half_float_double_sparse.
# Found with deepspeed 0.19.8 and torch 2.13.0: forward and backward run, then the reduction refuses the gradients:
#   AssertionError: attempting to reduce an unsupported grad type: torch.float64
# since the list of types that the CPU accelerator supports (bfloat16 and float32 on this processor) has no float64. With it added
# to that list the same step runs.
# Why it matters here: golden losses are taken in float64, where processors agree (tests/train/golden_task.py adds the type).
#
# Run by hand, not in CI: bash findings/deepspeed-refuses-float64-gradients.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 ninja setuptools numpy
cat > step.py <<'PY'
import os, sys
import torch
import torch.distributed as dist

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", f"file://{os.getcwd()}/store-{sys.argv[1]}", rank=0, world_size=1)
import deepspeed
from deepspeed.accelerator import get_accelerator

if sys.argv[1] == "patched":
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(3, 1).double()
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.Adam(model.parameters()),
    config={"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": True},
)
loss = engine(torch.ones(2, 3, dtype=torch.float64)).square().mean()
print("types:", sorted(str(t) for t in get_accelerator().supported_dtypes()))
try:
    engine.backward(loss)
    engine.step()
    print("result: the step ran")
except AssertionError as e:
    print("result: AssertionError:", e)
sys.stdout.flush()
os._exit(0)
PY
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions"
env/bin/python step.py plain 2> plain.err | tee plain.out
env/bin/python step.py patched 2> patched.err | tee patched.out
grep -q "result: AssertionError: attempting to reduce an unsupported grad type: torch.float64" plain.out
grep -q "result: the step ran" patched.out
echo "as found"
