#!/usr/bin/env bash
# Making an optimizer, torch.optim.AdamW, in a program that compiles nothing.
#
# Guess, before it was run: torch has been imported, AdamW is a class of it, and an object of it has a few dictionaries. So no
# module is imported, and memory does not change.
# Found with torch 2.13.0: the constructor imports torch._dynamo, the front end of torch.compile: 823 modules, 1.3 s of a core, 74 MB.
# It does so through the guard around add_param_group; zero_grad, state_dict, load_state_dict and step have guards that import it
# too. The methods below the guards, which inspect.unwrap finds, take the same steps, and give and take the same state, to the last bit.
# Why it matters here: a worker of a small cell imports longer than it trains, and a machine has many; lmu_dist/train/optimizer.py
# has an AdamW without the guards.
#
# Run by hand, not in CI: bash findings/torch-adam-imports-the-compiler.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy psutil
cat > adam.py <<'PY'
import inspect, sys, time
import psutil
import torch

A = torch.optim.AdamW


class Unguarded(A):
    add_param_group = inspect.unwrap(A.add_param_group)
    zero_grad = inspect.unwrap(A.zero_grad)
    state_dict = inspect.unwrap(A.state_dict)
    load_state_dict = inspect.unwrap(A.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(A.step))


def weights(optimizer_class):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    adam = optimizer_class([weight], lr=0.1)
    for i in range(5):
        if i == 3:
            state, adam = adam.state_dict(), optimizer_class([weight], lr=1.0)
            adam.load_state_dict(state)
        adam.zero_grad()
        (weight**3).sum().backward()
        adam.step()
    return weight.detach()


unguarded, before = weights(Unguarded), set(sys.modules)
print("result: unguarded:", "torch._dynamo" in before)
bytes_before, began = psutil.Process().memory_full_info().uss, time.process_time()
A([torch.nn.Parameter(torch.zeros(1))])
spent, grown = time.process_time() - began, psutil.Process().memory_full_info().uss - bytes_before
print("result: constructor:", "torch._dynamo" in sys.modules, "more than 300 modules:", len(set(sys.modules) - before) > 300)
print(f"{len(set(sys.modules) - before)} modules, {spent:.2f} s of a core, {grown / 1e6:.0f} MB")
print("result: same weights:", torch.equal(weights(A), unguarded))
PY
env/bin/python adam.py | tee out
grep -q "result: unguarded: False" out
grep -q "result: constructor: True more than 300 modules: True" out
grep -q "result: same weights: True" out
echo "as found"
