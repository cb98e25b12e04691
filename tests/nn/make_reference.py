"""Writes reference.npz: matrices and outputs of keras-lmu 0.9.0, and LegT matrices of the field's `hippo` code. Run by hand.

In an environment of its own, since keras-lmu needs TensorFlow. `pip download --no-deps espnet==202511` gives a wheel. Its file
espnet2/asr/state_spaces/s4.py has the function `transition` of github.com/HazyResearch/state-spaces (Gu et al. 2020,
arXiv 2008.07669), which alone is executed here.

    python -m venv keras && keras/bin/pip install keras-lmu==0.9.0 tensorflow-cpu==2.21.0 keras==3.15.1
    keras/bin/python tests/nn/make_reference.py espnet-202511-py3-none-any.whl
"""

import ast
import sys
import zipfile
from pathlib import Path

import keras
import keras_lmu
import numpy as np

CASES = [(6, 10.0), (24, 20.5)]  # order and theta


def hippo_transition(wheel: str):
    """The function `transition(measure, N)` of the wheel."""
    tree = ast.parse(zipfile.ZipFile(wheel).read("espnet2/asr/state_spaces/s4.py"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "transition"]
    names = {"np": np}
    exec(compile(tree, wheel, "exec"), names)
    return names["transition"]


def main(wheel: str) -> None:
    """Writes the file next to this one."""
    keras.config.set_floatx("float64")
    x = np.random.default_rng(0).standard_normal((2, 30, 2))
    arrays = {"versions": np.array(f"keras-lmu {keras_lmu.__version__}, {Path(wheel).name}"), "x": x, "cases": np.array(CASES)}
    transition = hippo_transition(wheel)
    for i, (order, theta) in enumerate(CASES):
        settings = {"order": order, "theta": theta, "hidden_cell": None, "kernel_initializer": None, "dtype": "float64"}
        cell = keras_lmu.LMUCell(memory_d=2, **settings)
        layer = keras.layers.RNN(cell, return_sequences=True)
        feedforward = keras_lmu.LMUFeedforward(memory_d=2, return_sequences=True, **settings)
        arrays[f"keras_recurrent_{i}"] = np.array(layer(x))  # (B, T, D q)
        arrays[f"keras_feedforward_{i}"] = np.array(feedforward(x))
        arrays[f"keras_a_{i}"], arrays[f"keras_b_{i}"] = np.array(cell.A), np.array(cell.B)
        arrays[f"hippo_a_{i}"], arrays[f"hippo_b_{i}"] = transition("legt", order)
    assert all(a.dtype == np.float64 for name, a in arrays.items() if name != "versions")
    np.savez_compressed(Path(__file__).with_name("reference.npz"), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
