#!/usr/bin/env bash
# Checks lmu-dist on one GPU: results, speed and memory, in at most 9 minutes. README.md in this folder explains it.
#   benchmarks/gpu/check.sh [PART ..] [--out FOLDER] [--seed N]
#   DEVICE=cpu benchmarks/gpu/check.sh     the same parts on toy sizes, without a GPU
# $PYTHON: the Python to use; default: the project's environment, else python3. $OUT_DIR: the folder for results.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
fi
export PYTHONPATH="$root:$root/benchmarks:$root/tests:$root/tests/models${PYTHONPATH:+:$PYTHONPATH}"
if ! missing=$("$PYTHON" -c '
import importlib.util
needed = "torch numpy scipy psutil pydantic rich ruamel.yaml deepspeed mlflow ray datasets optuna"
print(*(name for name in needed.split() if importlib.util.find_spec(name.partition(".")[0]) is None))'); then exit 1; fi
if [ -n "$missing" ]; then
  echo "check.sh: $PYTHON lacks $missing; parts that need them fail. README.md says how to carry wheels." >&2
fi
exec "$PYTHON" -m gpu.check "$@"
