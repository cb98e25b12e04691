"""Section `tokenizing` of speed.py: the comparison of prepare.py, on the sources of Python's standard library. A quick run uses
a megabyte of torch's sources. Called by section.py.
"""

import inspect
import tempfile
from pathlib import Path

import prepare
import torch
from measure import Section

from lmu_dist.config import DataConfig, TokenizerConfig

QUICK_BYTES = 10**6


def measure(device: torch.device, quick: bool) -> Section:
    """Runs the section. The device makes no difference."""
    if not quick:
        return Section({"tokenizing": [_row(prepare.measure(DataConfig()))]})
    with tempfile.TemporaryDirectory() as folder:
        texts, n_bytes = sorted(Path(inspect.getfile(torch)).parent.glob("*.py")), 0
        for path in texts:
            text = path.read_bytes()
            (Path(folder) / f"{path.stem}.txt").write_bytes(text)
            if (n_bytes := n_bytes + len(text)) > QUICK_BYTES:
                break
        data = DataConfig(source="files", files=(f"{folder}/*.txt",), tokenizer=TokenizerConfig(vocab_tokens=512))
        return Section({"tokenizing": [_row(prepare.measure(data, repeats=1))]})


def _row(found: dict[str, int | float]) -> dict[str, int | float]:
    """Measured values as floats. Size of the corpus and number of CPUs stay integers: they identify the row."""
    return {key: value if key in ("text_bytes", "cpus") else float(value) for key, value in found.items()}
