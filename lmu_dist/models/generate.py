"""Text from a model, token by token: a prompt in, an endless stream of token ids out. Called by the command line.

The recurrent form: for the LMU and the LSTM memory and work per token do not grow with the text.
"""

from collections.abc import Iterator, Sequence

import torch

from lmu_dist.models.lm import LanguageModel


@torch.no_grad()
def generate(model: LanguageModel, prompt: Sequence[int], temperature: float, top_k: int, seed: int) -> Iterator[int]:
    """Samples from softmax(logits / temperature) over the `top_k` most likely tokens (0: all); temperature 0 takes the best.

    `prompt` must not be empty. The same seed gives the same text.
    """
    if not prompt:
        raise ValueError("the prompt must hold at least one token")
    dice = torch.Generator().manual_seed(seed)
    model.eval()
    logits, state = model.advance(torch.tensor([list(prompt)]))
    while True:
        scores = logits[0, -1].float()
        if temperature <= 0:
            token = int(scores.argmax())
        else:
            if 0 < top_k < len(scores):
                scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
            token = int(torch.multinomial(torch.softmax(scores / temperature, dim=0), 1, generator=dice))
        yield token
        logits, state = model.advance(torch.tensor([[token]]), state)
