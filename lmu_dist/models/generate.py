"""Text from a model, token by token: prompts in, an endless stream of token ids out. Called by the command line.

For the LMU and the LSTM memory and work per token do not grow with the text; attention keeps the keys and values of all of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmu_dist.models.lm import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature). Raises ValueError.

    temperature  0 takes the best
    top_k        of the k most likely only (0: of all)
    top_p        of the fewest that together have this probability (1: of all), after top_k (Holtzman et al. 2020)
    seed         of the first text; the one after it has seed + 1, and so on, alone or beside others
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
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}; temperature 0 takes the best token")


@torch.no_grad()
def generate(model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Int[Tensor, "B"]]:
    """The next token of every text, again and again. Prompts must be of one length, and not empty."""
    if len({len(prompt) for prompt in prompts}) != 1 or not prompts[0]:
        raise ValueError("prompts must be of one length, and hold at least one token")
    dice = [torch.Generator().manual_seed(sampling.seed + i) for i in range(len(prompts))]
    model.eval()
    logits, state = model.advance(torch.tensor([list(prompt) for prompt in prompts]))
    while True:
        tokens = draw(logits[:, -1].float(), sampling, dice)
        yield tokens
        logits, state = model.advance(tokens[:, None], state)


def draw(scores: Float[Tensor, "B V"], sampling: Sampling, dice: Sequence[torch.Generator]) -> Int[Tensor, "B"]:
    """A token for every row, each by its own dice. Raises ValueError where the model has no finite answer."""
    if not bool(scores.isfinite().all()):
        raise ValueError("the model's scores are not finite: it diverged in training, or its weights are damaged")
    if sampling.temperature == 0:
        return scores.argmax(1)
    # The largest is 0, so that no temperature, however low, makes infinities of two scores at once.
    scores = (scores - scores.amax(1, keepdim=True)).double() / sampling.temperature
    kept = sampling.top_k if 0 < sampling.top_k < scores.shape[1] else scores.shape[1]
    scores, tokens = scores.topk(kept) if kept < scores.shape[1] else scores.sort(descending=True)
    likely = torch.softmax(scores, 1).cumsum(1)
    # The first token is always in: what stands before it has probability 0.
    allowed = (likely.roll(1, 1).index_fill(1, torch.tensor([0]), 0.0) < sampling.top_p).sum(1)
    ceiling = likely.gather(1, allowed[:, None] - 1)
    thrown = torch.stack([torch.rand(1, generator=die) for die in dice]) * ceiling
    place = torch.searchsorted(likely, thrown, right=True).clamp(max=allowed[:, None] - 1)
    return tokens.gather(1, place)[:, 0]
