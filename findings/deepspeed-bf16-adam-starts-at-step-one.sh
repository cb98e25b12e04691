#!/usr/bin/env bash
# The first Adam step of a bf16 model under DeepSpeed, at ZeRO stage 0 and at stage 1, on a CPU, beside torch's own Adam.
#
# Guess, before it was run: DeepSpeed calls the optimizer that it was given once for each step. Adam's first step is then the
# learning rate times the sign of the gradient, since its two bias corrections cancel, at every stage.
# Found with deepspeed 0.19.8 and torch 2.13.0: at stage 0 Adam has already taken a step when initialize returns, with gradients of
# zero, to create its state: its counter is 1. So the corrections are those of the second step, and the first step of training
# is 0.744 times as long as it should be (sqrt(1 - 0.999^2) / (1 - 0.9^2) times 0.1 / sqrt(0.001)). At stage 1 it has its length.
# Why it matters here: losses of a run would depend on the ZeRO stage; lmu_dist/train/engine.py sets the counter to zero.
#
# Run by hand, not in CI: bash findings/deepspeed-bf16-adam-starts-at-step-one.sh    Exit 0: as found; 1: it has changed.
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

stage = int(sys.argv[1])
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", f"file://{os.getcwd()}/store-{stage}", rank=0, world_size=1)
import deepspeed

deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
adam = torch.optim.Adam(model.parameters(), lr=2.0**-10)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=adam,
    config={
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    },
)
before = [int(state["step"]) for state in adam.state.values() if "step" in state]
engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())  # d loss / d weight = 1
engine.step()
print(f"result: stage {stage}: counter {before[0] if before else 0}, first step {-float(engine.module.weight) * 2**10:.3f} rates")
sys.stdout.flush()
os._exit(0)
PY
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions"
for stage in 0 1; do
  env/bin/python step.py $stage 2> err | grep result: | tee -a out || { cat err; exit 1; }
done
grep -q "result: stage 0: counter 1, first step 0.74" out
grep -q "result: stage 1: counter 0, first step 1.00" out
echo "as found"
