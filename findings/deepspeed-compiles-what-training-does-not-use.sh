#!/usr/bin/env bash
# What DeepSpeed needs to start a training process on a CPU. With an optimizer of torch it uses none of its own operators.
#
# Guess, before it was run: `deepspeed.init_distributed` wraps a process group of torch. Where there is neither ninja nor a compiler
# it works, as Python packages with optional operators do, perhaps with a warning; a training step works too.
# Found with deepspeed 0.19.8 and torch 2.13.0 (CPU): it compiles the operator deepspeed_shm_comm with ninja and g++, and raises
# RuntimeError where ninja is missing. Only `inference_all_reduce` calls the operator; a step, forward, backward and Adam under
# ZeRO 1, makes no use of it. When DeepSpeed is told that it can compile nothing (an empty deepspeed.ops.__compatible_ops__, the
# table that it fills by probing), the same step works with neither ninja nor a compiler.
# Why it matters here: the build took every new machine half a minute of two cores, and g++, ninja and Python's headers; processes
# that were killed in it left a lock behind (LOG.md). Since then train/engine empties the table.
#
# Run by hand, not in CI: bash findings/deepspeed-compiles-what-training-does-not-use.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" "deepspeed==0.19.8" "setuptools<81"
cat > step.py <<'PYTHON'
import sys

import deepspeed
import torch

if sys.argv[1] == "told":
    deepspeed.ops.__compatible_ops__ = {}
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
try:
    deepspeed.init_distributed(dist_backend="gloo")
except RuntimeError as error:
    sys.exit(f"RuntimeError: {str(error)[:150]}")
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters()),
    config={
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
)
before = model.weight.detach().clone()
engine.backward(engine(torch.ones(2, 4)).sum())
engine.step()
print("a step was taken:", bool((model.weight != before).any()))
PYTHON
mkdir bin # no compiler, no ninja
for program in ldconfig uname; do ln -s "$(PATH=$PATH:/sbin command -v $program)" bin/; done
run() {
  env -i HOME="$folder" PATH="$folder/bin" TORCH_EXTENSIONS_DIR="$folder/built-$1" DS_ACCELERATOR=cpu LOCAL_RANK=0 \
    "$folder/env/bin/python" step.py "$1" 2>&1 | grep -E "RuntimeError|a step was taken" || true
}
default=$(run default)
told=$(run told)
echo "default: $default"
echo "told that it can compile nothing: $told"
[[ $default == *"Unable to JIT load the deepspeed_shm_comm op"* && $told == "a step was taken: True" ]]
