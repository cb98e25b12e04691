#!/usr/bin/env bash
# Each family's own keys for the study of English text (docs/study/PROTOCOL.md): eight trials for every family, at N = 30,000 and
# 500,000 tokens, with the learning rate that tune.yaml found there. A family with fewer than two keys of its own also tries
# numbers of blocks and rates. `model.order` is q, `model.reduced_order` is q'.
#   jobs/english/own_keys.sh        # from the folder of the corpus
set -euo pipefail
job="$(dirname "$0")/tune.yaml"
search() { # family, learning rate, space
  echo "== $1"
  lmu-dist tune "$job" experiment=english-own-keys "tune.families=[$1]" "tune.n_params=[30000]" "train.learning_rate=$2" "tune.space=$3" -o "own-keys-$1.yaml"
}
lmu='{"model.theta_tokens": {choice: [64, 256]}, "model.order": {choice: [20, 40]}, "model.reduced_order": {choice: [2, 4]}}'
search lmu 0.04 "$lmu"
search lmu_attention 0.02 "$lmu"
search lmu_modern 0.04 "$lmu"
search llama 0.02 '{"model.rotary_base": {choice: [100, 1000, 10000, 100000]}, "model.n_blocks": {choice: [2, 3]}}'
search gated_deltanet 0.02 '{"model.key_width": {choice: [8, 16]}, "model.value_expansion": {choice: [1, 2]}, "model.n_blocks": {choice: [2, 3]}}'
search mamba2 0.02 '{"model.d_state": {choice: [16, 32]}, "model.head_width": {choice: [8, 16]}, "model.n_blocks": {choice: [2, 3]}}'
search transformer 0.02 '{"model.n_blocks": {choice: [1, 2, 3, 4]}, "train.learning_rate": {choice: [0.014, 0.028]}}'
search lstm 0.02 '{"model.n_blocks": {choice: [1, 2, 3, 4]}, "train.learning_rate": {choice: [0.014, 0.028]}}'
