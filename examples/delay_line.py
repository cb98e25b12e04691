"""A delay line: the Legendre memory gives back a signal from any time within its window. Nothing is trained.

    python examples/delay_line.py

The signal is noise without frequencies above 2 cycles per window. Its value d tokens ago is a sum of Legendre polynomials at
r = (d + 1/2) / theta, weighted with the q coefficients of the memory. The table gives the error for several q and d. The last
line comes from feeding the signal token by token, as in a live system. docs/library.md explains the program.
"""

import numpy as np
import torch

from lmu_dist.nn import LegendreMemory

THETA = 64  # tokens of the window
CYCLES = 2  # highest frequency, per window
DELAYS = (0, 16, 32, 63)
ORDERS = (4, 8, 16, 24)


def band_limited_noise(n_tokens: int, seed: int) -> torch.Tensor:
    """Noise of unit variance (1, n_tokens, 1) in float64, without frequencies above CYCLES per window."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n_tokens))
    spectrum[CYCLES * n_tokens // THETA :] = 0
    signal = np.fft.irfft(spectrum, n_tokens)
    return torch.from_numpy(signal / signal.std())[None, :, None]


def read(coefficients: torch.Tensor, delay: float) -> torch.Tensor:
    """The signal `delay` tokens ago (..) from coefficients (.., q)."""
    polynomials = np.polynomial.legendre.legvander([2 * (delay + 0.5) / THETA - 1], coefficients.shape[-1] - 1)
    return coefficients @ torch.from_numpy(polynomials[0])


def main(n_tokens: int = 4096, seed: int = 0) -> dict[tuple[int, int], float]:
    """Prints the table and returns the error by (q, d): norm of the difference / norm of the signal."""
    x = band_limited_noise(n_tokens, seed)
    errors = dict[tuple[int, int], float]()
    print("  q |" + "".join(f"  d = {d:2}" for d in DELAYS))
    for order in ORDERS:
        coefficients = LegendreMemory(order, THETA)(x)
        for d in DELAYS:
            start = 4 * THETA  # until then the memory still holds the silence before the signal
            expected = x[0, start - d : n_tokens - d, 0]
            errors[order, d] = float((read(coefficients, d)[0, start:, 0] - expected).norm() / expected.norm())
        print(f" {order:2} |" + "".join(f"{errors[order, d]:8.4f}" for d in DELAYS))
    memory, state = LegendreMemory(ORDERS[-1], THETA), None
    delayed = list[float]()
    for t in range(5 * THETA):
        coefficients, state = memory.advance(x[:, t : t + 1], state)
        delayed.append(float(read(coefficients, 32)))
    print(f"token by token, 32 tokens ago: {delayed[-1]:.3f}; the signal was {float(x[0, len(delayed) - 33]):.3f}")
    return errors


if __name__ == "__main__":
    main()
