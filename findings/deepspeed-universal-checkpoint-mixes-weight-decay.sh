#!/usr/bin/env bash
# A DeepSpeed universal checkpoint of a model with two parameter groups, one without weight decay, at ZeRO stages 1, 2 and 3.
#
# Guess, before it was run: after the load each group has the weight decay that it had when it was saved, as with the plain
# checkpoint of the same stage, and as the groups of the loading engine were created.
# Found with deepspeed 0.19.8 and torch 2.13.0: so it is at stages 1 and 2. At stage 3 the settings of the first group are copied to
# all groups: biases and norms, created and saved with weight decay 0, go on with 0.1. Nothing is said.
# Why it matters here: runs with weight decay that changed their number of workers trained with other settings from then on.
#
# Run by hand, not in CI: bash findings/deepspeed-universal-checkpoint-mixes-weight-decay.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 ninja setuptools numpy
cat > decay.py <<'PY'
import os, sys
import torch
import torch.distributed as dist

stage, kind = int(sys.argv[1]), sys.argv[2]
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_RANK"] = "0"
dist.init_process_group("gloo", f"file://{os.getcwd()}/store-{stage}-{kind}", rank=0, world_size=1)
import deepspeed

deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(8, 8)
groups = [
    {"params": [model.weight], "weight_decay": 0.1},
    {"params": [model.bias], "weight_decay": 0.0},
]
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(groups, lr=1e-3),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": kind == "universal"},
    },
)
if kind == "save":
    engine.backward(engine(torch.ones(2, 8)).square().mean())
    engine.step()
    engine.save_checkpoint(f"plain{stage}", tag="t")
else:
    engine.load_checkpoint(f"{kind}{stage}", tag="t")
decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
print(f"result: stage {stage}, {kind}: weight decay {decays}")
sys.stdout.flush()
os._exit(0)
PY
export PATH="$folder/env/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/extensions" DS_ACCELERATOR=cpu
for stage in 1 2 3; do
  env/bin/python decay.py $stage save 2> err | grep result: | tee -a out || { cat err; exit 1; }
  env/bin/python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --num_extract_workers 1 --num_merge_workers 1 \
    --input_folder "plain$stage/t" --output_folder "universal$stage/t" > convert.out 2>&1 || { cat convert.out; exit 1; }
  for kind in plain universal; do
    env/bin/python decay.py $stage $kind 2> err | grep result: | tee -a out || { cat err; exit 1; }
  done
done
for stage in 1 2 3; do
  grep -qF "result: stage $stage, plain: weight decay [0.1, 0.0]" out
done
grep -qF "result: stage 1, universal: weight decay [0.1, 0.0]" out
grep -qF "result: stage 2, universal: weight decay [0.1, 0.0]" out
grep -qF "result: stage 3, universal: weight decay [0.1, 0.1]" out
echo "as found"
