"""Text generation: prompts in, an endless stream of token ids out, one per text and step. Called by the command line.

For recurrent mixers (LMU, LSTM, Gated DeltaNet, Mamba-2), memory and work per token do not grow with the text. Attention keeps
the keys and values of all tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmu_dist.array_types import Float, Int
from lmu_dist.models.lm import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled from softmax(logits / temperature). Raises ValueError.

    temperature  0 takes the most likely token
    top_k        samples from the k most likely tokens only (0: from all)
    top_p        samples from the fewest tokens with this probability together (1: from all), after top_k (Holtzman et al. 2020)
    seed         of the first text; text i has seed + i, so that a text does not depend on the others in the batch
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1, not {self.top_p}; for the most likely token only, set temperature to 0"
            )


@torch.no_grad()
def generate(model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Int[Tensor, "B"]]:
    """Yields the next token of every text, without end. Raises ValueError if prompts are empty or differ in length."""
    if len({len(prompt) for prompt in prompts}) != 1 or not prompts[0]:
        raise ValueError("prompts must be of one length, and hold at least one token")
    rngs = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    model.eval()
    logits, state = model.advance(torch.tensor([list(prompt) for prompt in prompts]))
    while True:
        tokens = sample_tokens(logits[:, -1].float(), sampling, rngs)
        yield tokens
        logits, state = model.advance(tokens[:, None], state)


def sample_tokens(logits: Float[Tensor, "B V"], sampling: Sampling, rngs: Sequence[torch.Generator]) -> Int[Tensor, "B"]:
    """Samples a token for every row, each with its own generator. Raises ValueError if logits are not finite."""
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite: it diverged in training, or its weights are damaged")
    if sampling.temperature == 0:
        return logits.argmax(1)
    # With a maximum of 0, no division by a low temperature makes two logits infinite.
    logits = (logits - logits.amax(1, keepdim=True)).double() / sampling.temperature
    top_k = sampling.top_k if 0 < sampling.top_k < logits.shape[1] else logits.shape[1]
    logits, tokens = logits.topk(top_k) if top_k < logits.shape[1] else logits.sort(descending=True)
    cumulative = torch.softmax(logits, 1).cumsum(1)
    # A token is in the nucleus if the more likely ones have less than top_p together; for the first one that is 0.
    n_nucleus = (cumulative.roll(1, 1).index_fill(1, torch.tensor([0]), 0.0) < sampling.top_p).sum(1)
    nucleus_probability = cumulative.gather(1, n_nucleus[:, None] - 1)
    thresholds = torch.stack([torch.rand(1, generator=rng) for rng in rngs]) * nucleus_probability
    index = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=n_nucleus[:, None] - 1)
    return tokens.gather(1, index)[:, 0]
