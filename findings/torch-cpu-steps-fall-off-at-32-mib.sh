#!/usr/bin/env bash
# The loss of a batch and its gradient on a CPU, with one token more.
#
# Guess, before it was run: time is in proportion to the tokens, so 2,048 of them take as long as 2,047, to a thousandth; and
# what ran before in the process does not matter.
# Found with torch 2.13.0 and glibc 2.36: 2,047 tokens take 40 to 44 ms, 2,048 take 101. With a vocabulary of 4,096 these are 32
# MiB of logits, and all four buffers of that size are made of new memory in every step: 32,777 page faults, where 2,047 tokens
# have 2,000 to 3,300. glibc's malloc learns from what is freed which sizes to keep, but only below 32 MiB (mallopt(3),
# M_MMAP_THRESHOLD). And what ran before does matter: after a few steps of 2,047 tokens, those of 2,048 take 45 ms, since they
# fit into memory that is kept. MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_ in the environment keep it at any size: 43 ms.
# Why it matters here: a power of two is the usual batch, and most of the step of a small model is its logits. Workers have these
# settings (lmu_dist/launch/workers.py); a loop of one's own around lmu_dist.nn has not (docs/library.md).
#
# Run by hand, not in CI: bash findings/torch-cpu-steps-fall-off-at-32-mib.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > step.py <<'PY'
import resource
import sys
import time

import torch
from torch.nn import functional as F

torch.set_num_threads(1)
VOCABULARY = 4096


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


for n_tokens in map(int, sys.argv[1:]):
    torch.manual_seed(0)
    x = torch.randn(n_tokens, 24, requires_grad=True)
    weight = torch.randn(VOCABULARY, 24, requires_grad=True)
    targets = torch.randint(VOCABULARY, (n_tokens,))
    times = []
    for i in range(25):
        if i == 5:
            before = faults()
        began = time.perf_counter()
        x.grad = weight.grad = None
        F.cross_entropy(x @ weight.T, targets).backward()
        times.append(time.perf_counter() - began)
    per_step = (faults() - before) / 20
    print(f"{n_tokens} tokens: {1e3 * min(times):.0f} ms, {per_step:.0f} page faults a step; more than 20,000: {per_step > 20_000}")
PY
echo "each in a process of its own"
env/bin/python step.py 2047 | tee one-less
env/bin/python step.py 2048 | tee alone
echo "in one process"
env/bin/python step.py 2047 2048 | tee after-one-less
echo "with settings of malloc"
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 env/bin/python step.py 2048 | tee with-settings
grep -q "more than 20,000: False" one-less
grep -q "more than 20,000: True" alone
grep -q "2048 .*more than 20,000: False" after-one-less
grep -q "more than 20,000: False" with-settings
echo "as found"
