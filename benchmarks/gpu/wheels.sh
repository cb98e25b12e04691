#!/usr/bin/env bash
# Makes the wheels that a machine without network needs to run lmu-dist, in benchmarks/gpu/wheels/part1, part2, ..
#   benchmarks/gpu/wheels.sh [--python 3.12] [--have FILE] [--also NAME==VERSION ..] [--to FOLDER] [--part-bytes N]
# Needs the project's environment (make setup) and a package registry. README.md in this folder explains the options.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec "${PYTHON:-$here/../../.venv/bin/python}" "$here/wheels.py" "$@"
