#!/usr/bin/env bash
# bf16 training with gradient accumulation under DeepSpeed: 600 equal micro-batches, ZeRO stages 0 to 3 on a CPU.
#
# Guess, before it was run: the gradient is the mean of 600 equal gradients of 1, so its norm is 1 within bf16's rounding. DeepSpeed
# keeps float32 master weights for a bf16 model, and so presumably float32 sums of its gradients.
# Found with deepspeed 0.19.8 and torch 2.13.0: no error, no warning, and a norm of about a half. Every micro-batch adds 1/600 to a
# sum in bf16. From 1/2 on, 1/600 is less than half the distance between neighbouring bf16 numbers, and the sum stops growing.
# With data_types.grad_accum_dtype: fp32 the norm is 1 (0.996 to 0.998: 1/600 in bf16 is that much too small) at stages 1 to 3.
# Stage 0 refuses that setting: NotImplementedError: unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
# Why it matters here: a run on fewer workers has more micro-batches, so the number of workers would change the losses.
#
# Run by hand, not in CI: bash findings/deepspeed-loses-half-of-a-bf16-gradient.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 ninja setuptools numpy
cat > accumulate.py <<'PY'
import os, sys
import torch
import torch.distributed as dist

stage, accumulation = int(sys.argv[1]), sys.argv[2]
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", f"file://{os.getcwd()}/store-{stage}-{accumulation}", rank=0, world_size=1)
import deepspeed

deepspeed.init_distributed(dist_backend="gloo")
MICRO_BATCHES = 600
model = torch.nn.Linear(1, 1, bias=False)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
}
if accumulation == "fp32":
    config["data_types"] = {"grad_accum_dtype": "fp32"}
try:
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    for _ in range(MICRO_BATCHES):
        engine.backward(engine(torch.ones(1, 1, dtype=torch.bfloat16)).sum())  # d loss / d weight = 1
        engine.step()
    norm = engine.get_global_grad_norm()
    print(f"result: stage {stage}, {accumulation}: norm {float(norm):.3f}")
except Exception as e:
    print(f"result: stage {stage}, {accumulation}: {type(e).__name__}: {str(e)[:200]}")
sys.stdout.flush()
os._exit(0)
PY
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions"
for stage in 0 1 2 3; do
  for accumulation in default fp32; do
    env/bin/python accumulate.py $stage $accumulation 2> err | grep result: | tee -a out || { cat err; exit 1; }
  done
done
for stage in 0 1 2 3; do
  grep -q "result: stage $stage, default: norm 0.500" out
done
for stage in 1 2 3; do
  grep -q "result: stage $stage, fp32: norm 0.99" out
done
grep -q "result: stage 0, fp32: NotImplementedError: unsupported mix of model_dtype" out
echo "as found"
