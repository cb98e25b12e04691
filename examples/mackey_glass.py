"""Prediction of the Mackey-Glass series, 15 steps ahead, by the LMU and by torch's LSTM with as many parameters.

    python examples/mackey_glass.py --seed 0

The series is the solution of x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x (Mackey and Glass 1977), one token per unit of
time, which is chaotic. Both models are trained on the same windows with the same optimizer, schedule and steps. docs/library.md
explains the program.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.nn import LMU

DELAY, AHEAD = 17, 15  # tokens
WINDOW, BATCH, RATE = 128, 32, 1e-2
N_TRAIN, N_TEST = 4000, 2000


def mackey_glass(n_tokens: int, rng: np.random.Generator, substeps: int = 10) -> Tensor:
    """The series (n_tokens,) from a random start, normalised to mean 0 and variance 1. Integrated by Heun's method."""
    lag, h = DELAY * substeps, 1 / substeps
    x = [1.2 + 0.1 * noise for noise in rng.standard_normal(lag + 1)]
    for _ in range((n_tokens + 500) * substeps):
        old, old_next, now = x[-lag - 1], x[-lag], x[-1]
        slope = 0.2 * old / (1 + old**10) - 0.1 * now
        end = now + h * slope
        x.append(now + h / 2 * (slope + 0.2 * old_next / (1 + old_next**10) - 0.1 * end))
    series = np.array(x)[-n_tokens * substeps :: substeps]
    return torch.from_numpy((series - series.mean()) / series.std()).float()


class LMUModel(nn.Module):
    """(B, T, 1) to (B, T, 1): the signal on several channels, the LMU, and a feed-forward layer on both."""

    def __init__(self, width: int = 16, order: int = 24, reduced_order: int = 8, hidden: int = 48) -> None:
        super().__init__()
        self.channels = nn.Linear(1, width)
        self.lmu = LMU(order, reduced_order, theta_tokens=4 * DELAY)
        self.out = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The value AHEAD tokens later, at every token."""
        x = self.channels(x)
        return self.out(torch.cat([x, self.lmu(x)], -1))


class LSTMModel(nn.Module):
    """(B, T, 1) to (B, T, 1) by torch's LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The value AHEAD tokens later, at every token."""
        return self.out(self.lstm(x)[0])


def n_params(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(model: nn.Module, series: Tensor, steps: int, rng: np.random.Generator) -> float:
    """Trains on windows of the first N_TRAIN tokens. Returns the error on the rest: root mean square / standard deviation."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        starts = torch.from_numpy(rng.integers(N_TRAIN - WINDOW - AHEAD, size=BATCH))
        windows = series[starts[:, None] + torch.arange(WINDOW + AHEAD)]
        predicted = model(windows[:, :WINDOW, None])[..., 0]
        loss = F.mse_loss(predicted, windows[:, AHEAD:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        test = series[N_TRAIN:]
        predicted, expected = model(test[None, :-AHEAD, None])[0, :, 0], test[AHEAD:]
        warm = WINDOW  # tokens for both memories to fill
        return float((predicted - expected)[warm:].square().mean().sqrt() / expected[warm:].std())


def main(steps: int = 400, seed: int = 0) -> dict[str, float]:
    """Trains both and prints a table. Returns their errors by name."""
    torch.manual_seed(seed)
    series = mackey_glass(N_TRAIN + N_TEST, np.random.default_rng(seed))
    lmu = LMUModel()
    width = min(range(1, 100), key=lambda width: abs(n_params(LSTMModel(width)) - n_params(lmu)))
    models, errors = {"LMU": lmu, "LSTM": LSTMModel(width)}, dict[str, float]()
    for name, model in models.items():
        began = time.perf_counter()
        errors[name] = train(model, series, steps, np.random.default_rng(seed))
        print(f"{name:4}  {n_params(model)} parameters  error {errors[name]:.4f}  {time.perf_counter() - began:.0f} s")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
