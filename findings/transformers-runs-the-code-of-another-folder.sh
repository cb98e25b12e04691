#!/usr/bin/env bash
# Two local folders with the same last name, such as run-1/model and run-2/model, each with a model of its own whose code it
# brings (`trust_remote_code=True`), loaded in one process. The configuration files are equal, the modeling files differ.
#
# Guess, before it was run: each folder's own class is used, since transformers copies the code of a folder into a cache that is
# named by a digest of the sources.
# Found with transformers 5.24.0 and torch 2.13.0: both models are of the class of the folder that was loaded first, without a
# message. AutoModelForCausalLM registers the first folder's class for its configuration class. The configuration class of the
# second folder is the same object, since its cache folder depends on the folder's last name and on the configuration file only, so
# the second folder's code counts as known and is not read. In a process of its own each folder has its own class.
# Why it matters here: `lmu-dist export --format transformers` of two runs into A/model and B/model computed the second with the
# code of the first. Exported configuration files have a digest of all code since.
#
# Run by hand, not in CI: bash findings/transformers-runs-the-code-of-another-folder.sh    Exit 0: as found; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
export HF_HOME=$folder/cache HF_HUB_OFFLINE=1
for number in 1 2; do
  mkdir -p "run-$number/model"
  cat > "run-$number/model/configuration_tiny.py" <<'PY'
from transformers import PretrainedConfig


class TinyConfig(PretrainedConfig):
    model_type = "tiny"
PY
  cat > "run-$number/model/modeling_tiny.py" <<PY
import torch
from transformers import PreTrainedModel

from .configuration_tiny import TinyConfig


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    NUMBER = $number

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()
PY
  cat > "run-$number/model/config.json" <<'JSON'
{"model_type": "tiny", "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}}
JSON
  env/bin/python - "run-$number/model" <<'PY'
import sys

import torch
from safetensors.torch import save_file

save_file({"weight": torch.zeros(1)}, f"{sys.argv[1]}/model.safetensors", metadata={"format": "pt"})
PY
done
cat > load.py <<'PY'
import sys

from transformers import AutoModelForCausalLM

print(*(type(AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)).NUMBER for path in sys.argv[1:]))
PY
together=$(env/bin/python load.py run-1/model run-2/model 2> errors)
alone=$(env/bin/python load.py run-2/model 2>> errors)
echo "one process, run-1 then run-2: code of $together; run-2 alone: code of $alone"
[ "$together" = "1 1" ] && [ "$alone" = 2 ]
echo "as found"
