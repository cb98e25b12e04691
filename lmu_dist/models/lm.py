"""The one LanguageModel of every family: token ids in, loss in nats per token or logits out.

Legend: B batch, T time, V vocabulary. Built by train/worker from a Shape; the families differ in their sublayers only.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.models.head import linear_cross_entropy
from lmu_dist.models.mixers.attention import Attention
from lmu_dist.models.mixers.lmu.mixer import LMU, Form
from lmu_dist.models.mixers.lstm import LSTM
from lmu_dist.models.shape import Shape


class Sublayer(Protocol):
    """What a block is made of: a causal map of (B, T, D), whole or chunk by chunk."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """A whole sequence from its start."""
        ...

    def advance(self, x: Tensor, state: Any, /) -> tuple[Tensor, Any]:
        """The next chunk, from what the one before left behind (None at the start)."""
        ...


class FeedForward(nn.Module):
    """gelu(x W1 + b1) W2 + b2, token by token (the paper's FFN)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.out = nn.Linear(d_ff, d_model)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The same function at every token."""
        return self.out(F.gelu(self.up(x)))

    def advance(self, x: Float[Tensor, "B T D"], state: None) -> tuple[Float[Tensor, "B T D"], None]:
        """Nothing to carry."""
        return self(x), None


SUBLAYERS: dict[str, Callable[[Shape, Form | None], nn.Module]] = {
    "ffn": lambda s, _: FeedForward(s.d_model, s.d_ff),
    "lmu": lambda s, form: LMU(s.order, s.reduced_order, float(s.theta_tokens), form),
    "attention": lambda s, _: Attention(s.d_model, s.n_heads),
    "lstm": lambda s, _: LSTM(s.d_model, s.d_hidden, s.n_blocks),
}


class LanguageModel(nn.Module):
    """Embedding -> sublayers, each x <- x + sublayer(LayerNorm(x)) (the LSTM: x <- sublayer(x)) -> LayerNorm -> tied head.

    The same seed gives the same weights on every machine and rank. `lmu_form` is how LMUs are computed; None: the best way.
    """

    def __init__(self, shape: Shape, seed: int = 0, lmu_form: Form | None = None) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(shape.vocab_tokens, shape.d_model)
            self.position = nn.Embedding(shape.sequence_tokens, shape.d_model) if shape.learned_positions else None
            self.norms = nn.ModuleList(nn.LayerNorm(shape.d_model) if shape.skips else nn.Identity() for _ in shape.sublayers)
            self.sublayers = nn.ModuleList(SUBLAYERS[name](shape, lmu_form) for name in shape.sublayers)
            self.norm = nn.LayerNorm(shape.d_model)
            self._initialise(len(shape.sublayers))

    def _initialise(self, n_sublayers: int) -> None:
        """Normal, matrices scaled by fan-in, what writes to the residual stream shrunk by its depth (as in GPT-2).

        Embeddings have variance 1/d_model, so that logits start with variance 1 and tokens are heard beside the layers.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.normal_(module.weight, std=std * (n_sublayers**-0.5 if name.endswith(".out") else 1.0))
                nn.init.zeros_(module.bias)

    def _embed(self, tokens: Int[Tensor, "B T"], start: int) -> Float[Tensor, "B T D"]:
        x = self.embedding(tokens)
        if self.position is None:
            return x
        end = start + tokens.shape[1]
        if end > self.shape.sequence_tokens:
            raise ValueError(
                f"{end} tokens are more than the {self.shape.sequence_tokens} positions this transformer was trained on; "
                "ask for a shorter text, or train with a larger train.sequence_tokens"
            )
        return x + self.position.weight[start:end]

    def _logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return F.linear(self.norm(x), self.embedding.weight)

    def _hidden(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = self._embed(tokens, 0)
        for norm, sublayer in zip(self.norms, self.sublayers, strict=True):
            x = (x if self.shape.skips else 0.0) + sublayer(norm(x))
        return x

    def logits(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Scores of the next token at every position of whole sequences."""
        return self._logits(self._hidden(tokens))

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Cross-entropy of every target in nats (float32 whatever the model's precision)."""
        x = self.norm(self._hidden(inputs)).flatten(0, 1)
        return linear_cross_entropy(x, self.embedding.weight, targets.flatten()).view_as(targets)

    def advance(self, tokens: Int[Tensor, "B T"], state: "State | None" = None) -> tuple[Float[Tensor, "B T V"], "State"]:
        """The next chunk of a text of any length: its logits, and the state from which the text goes on."""
        start, layers = state or (0, [None] * len(self.sublayers))
        x, after = self._embed(tokens, start), list[Any]()
        for norm, sublayer, before in zip(self.norms, self.sublayers, layers, strict=True):
            y, carried = cast(Sublayer, sublayer).advance(norm(x), before)
            x = (x if self.shape.skips else 0.0) + y
            after.append(carried)
        return self._logits(x), (start + tokens.shape[1], after)


State = tuple[int, list[Any]]  # tokens seen, what each sublayer carries
