#!/usr/bin/env bash
# `import deepspeed` on a machine where MLflow is installed, in a program that uses neither its autotuner nor a monitor.
#
# Guess, before it was run: DeepSpeed imports MLflow when a configuration asks for it, so the import takes as long as without.
# Found with deepspeed 0.19.8 and mlflow 3.17.2: it imports MLflow, and with it FastAPI. The chain is deepspeed.module_inject, pipe,
# runtime.config, autotuning.autotuner, which tries `import mlflow` and sets has_mlflow. After torch the import took 1.55 s of a core
# and 144 MB, and 0.33 s and 23 MB with MLflow hidden.
# Why it matters here: lmu_dist depends on MLflow, so it is installed for every worker; lmu_dist/launch/engine_import.py hides it.
#
# Run by hand, not in CI: bash findings/deepspeed-imports-mlflow.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 mlflow==3.17.2 ninja setuptools numpy psutil
cat > load.py <<'PY'
import os, sys, time
import psutil, torch

os.environ["DS_ACCELERATOR"] = "cpu"
if sys.argv[1] == "hidden":
    sys.modules["mlflow"] = None
bytes_before, began = psutil.Process().memory_full_info().uss, time.process_time()
import deepspeed

spent, grown = time.process_time() - began, psutil.Process().memory_full_info().uss - bytes_before
print(f"result: {sys.argv[1]}: fastapi {'fastapi' in sys.modules}, mlflow {sys.modules.get('mlflow') is not None}")
print(f"{spent:.2f} s of a core, {grown / 1e6:.0f} MB")
PY
for mlflow in seen hidden; do
  env/bin/python load.py $mlflow > warm 2>&1 || { cat warm; exit 1; }
  env/bin/python load.py $mlflow 2> err | tee -a out || { cat err; exit 1; }
done
grep -q "result: seen: fastapi True, mlflow True" out
grep -q "result: hidden: fastapi False, mlflow False" out
echo "as found"
