"""A classifier of permuted sequences: made images, pixel by pixel in one random order (as in psMNIST), to ten classes.

    python examples/permuted_sequences.py --seed 0

Each class is a smooth random picture of 16 x 16 pixels; a sample is that picture, shifted by up to one pixel each way, with
noise. The permutation takes away all locality: after the last token the class must be told from the whole sequence.
docs/library.md explains the program.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.nn import LMU

SIDE, N_CLASSES, NOISE = 16, 10, 0.5
BATCH, RATE = 64, 1e-2


def make_pictures(rng: np.random.Generator) -> np.ndarray:
    """One smooth picture of unit variance for each class, (N_CLASSES, SIDE, SIDE): noise without high frequencies."""
    spectra = np.fft.fft2(rng.standard_normal((N_CLASSES, SIDE, SIDE)))
    frequency = np.abs(np.fft.fftfreq(SIDE, 1 / SIDE))
    spectra[:, (frequency[:, None] > 3) | (frequency > 3)] = 0
    pictures = np.fft.ifft2(spectra).real
    return pictures / pictures.std((1, 2), keepdims=True)


def make_samples(pictures: np.ndarray, permutation: np.ndarray, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Sequences (n, SIDE * SIDE, 1) and their classes (n,)."""
    labels = rng.integers(N_CLASSES, size=n)
    shifts = rng.integers(-1, 2, size=(n, 2))
    images = np.stack([np.roll(pictures[label], shift, (0, 1)) for label, shift in zip(labels, shifts, strict=True)])
    sequences = (images + NOISE * rng.standard_normal(images.shape)).reshape(n, -1)[:, permutation]
    return torch.from_numpy(sequences).float()[..., None], torch.from_numpy(labels)


class Classifier(nn.Module):
    """(B, T, 1) to the logits of the classes (B, 10): channels, the LMU over all tokens, a layer on the last token's output."""

    def __init__(self, width: int = 32, order: int = 64, reduced_order: int = 8) -> None:
        super().__init__()
        self.channels = nn.Linear(1, width)
        self.lmu = LMU(order, reduced_order, theta_tokens=SIDE * SIDE)
        self.logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.GELU(), nn.Linear(64, N_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Logits from whole sequences."""
        return self.logits(self.lmu(self.channels(x))[:, -1])


def main(steps: int = 200, seed: int = 0, n_test: int = 1000) -> tuple[float, float]:
    """Trains and prints. Returns the share of new samples that is classified correctly, before and after training."""
    torch.manual_seed(seed)
    rng, began = np.random.default_rng(seed), time.perf_counter()
    pictures, permutation = make_pictures(rng), rng.permutation(SIDE * SIDE)
    model = Classifier()
    test_x, test_labels = make_samples(pictures, permutation, n_test, rng)

    @torch.no_grad()
    def accuracy() -> float:
        return float((model(test_x).argmax(-1) == test_labels).float().mean())

    before = accuracy()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        x, labels = make_samples(pictures, permutation, BATCH, rng)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    after = accuracy()
    n_params = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_params} parameters, seed {seed}: accuracy {before:.3f} -> {after:.3f} in {time.perf_counter() - began:.0f} s")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
