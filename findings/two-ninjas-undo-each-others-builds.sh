#!/usr/bin/env bash
# Two versions of ninja on one build folder, as torch's extensions have it when PATH names the system's ninja in one process and
# that of a virtual environment in another.
#
# Guess, before it was run: ninja 1.13 reads the build log of 1.11, finds every output newer than its inputs and every command
# unchanged, and has nothing to do; and the same the other way round.
# Found with ninja 1.11.1.4 and 1.13.0 of PyPI: each runs every command again after the other. 1.13.0 warns that the build log is too
# old and starts over. 1.11.1.4 reads the newer log without a word, does not find its own hashes of the commands there, and says
# only with `-d explain` that the command line changed, which it did not.
# Why it matters here: torch.utils.cpp_extension runs whichever ninja is first on PATH. Workers and tests that found different ones
# compiled DeepSpeed's CPU collectives anew in turn, 20 to 40 s each time. Since 2026-11-28 nothing here runs ninja.
#
# Run by hand, not in CI: bash findings/two-ninjas-undo-each-others-builds.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 1.11.1.4 1.13.0; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet --disable-pip-version-check "ninja==$version"
done
mkdir build
cd build
echo text > input
cat > build.ninja <<'NINJA'
rule copy
  command = cp $in $out
build output: copy input
NINJA
build() {
  "../env-$1/bin/ninja" -d explain 2>&1 | tr '\n' ' ' | sed "s/^/result: $1: /"
  echo
}
{ build 1.11.1.4; build 1.11.1.4; build 1.13.0; build 1.13.0; build 1.11.1.4; } | tee ../out
[ "$(grep -c 'no work to do' ../out)" = 2 ]
[ "$(grep -c '\[1/1\]' ../out)" = 3 ]
grep -q 'result: 1.13.0: .*build log version is too old; starting over' ../out
grep -q 'result: 1.11.1.4: ninja explain: command line changed for output' ../out
echo "as found"
