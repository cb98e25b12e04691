#!/usr/bin/env bash
# Installs the wheels of wheels.sh, without network and into a folder of their own; prints what to export.
#   benchmarks/gpu/install.sh [FOLDER]        FOLDER: default benchmarks/gpu/site
# The Python that has torch is $PYTHON (default python3); none of its own packages is changed. If the parts arrive one after the
# other, call it after each.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
site=${1:-$here/site}
wheels=("$here"/wheels/part*/*.whl)
# Not --target: it would delete the folders that packages of several parts share, such as google/.
"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --ignore-installed --no-compile \
  --no-warn-script-location --prefix "$site" "${wheels[@]}"
libraries=("$site"/lib/python3*/site-packages "$site"/local/lib/python3*/dist-packages) # the second on Debian
for folder in "${libraries[@]}"; do
  if [ -d "$folder" ]; then
    # shellcheck disable=SC2016 # the variables of the shell that evaluates this
    printf 'export PYTHONPATH=%q${PYTHONPATH:+:$PYTHONPATH} PATH=%q:$PATH\n' "$folder" "$site/bin"
  fi
done
