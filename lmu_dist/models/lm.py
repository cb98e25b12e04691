"""LanguageModel: the network of all families. Maps token ids to losses in nats per token, or to logits.

The families differ only in their sublayers. Legend: B batch, T time, D width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lmu_dist.models.head import linear_cross_entropy
from lmu_dist.models.registry import family_of
from lmu_dist.models.shape import Shape


class LanguageModel(nn.Module):
    """Embedding -> sublayers -> LayerNorm -> tied head. A sublayer is x <- x + sublayer(LayerNorm(x)); LSTM: x <- sublayer(x).

    The same seed gives the same weights on every rank. `options` are the options of the family; None stands for the defaults.
    """

    def __init__(self, shape: Shape, seed: int = 0, options: Any = None) -> None:
        super().__init__()
        self.shape, family = shape, family_of(shape)
        options = family.Options() if options is None else options
        self.residual = family.residual
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            n_sublayers = family.n_sublayers(shape)
            self.embedding = nn.Embedding(shape.vocab_tokens, shape.d_model)
            self.position = nn.Embedding(shape.sequence_tokens, shape.d_model) if family.learned_positions else None
            self.norms = nn.ModuleList(
                nn.LayerNorm(shape.d_model) if self.residual else nn.Identity() for _ in range(n_sublayers)
            )
            self.sublayers = nn.ModuleList(family.sublayers(shape, options))
            self.norm = nn.LayerNorm(shape.d_model)
            self._initialise(n_sublayers)

    def _initialise(self, n_sublayers: int) -> None:
        """Initialises the weights: normal, matrices scaled by fan-in, outputs of sublayers also by depth (as in GPT-2).

        Embeddings have variance 1/d_model: logits start with variance 1, and embeddings have the scale of sublayers.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.normal_(module.weight, std=std * (n_sublayers**-0.5 if name.endswith(".out") else 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _embed(self, tokens: Int[Tensor, "B T"], start: int) -> Float[Tensor, "B T D"]:
        x = self.embedding(tokens)
        if self.position is None:
            return x
        end = start + tokens.shape[1]
        if end > self.shape.sequence_tokens:
            raise ValueError(
                f"{end} tokens exceed the {self.shape.sequence_tokens} positions that this model was trained on; "
                "generate a shorter text, or train with a larger train.sequence_tokens"
            )
        return x + self.position.weight[start:end]

    def _logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return F.linear(self.norm(x), self.embedding.weight)

    def _hidden(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = self._embed(tokens, 0)
        for norm, sublayer in zip(self.norms, self.sublayers, strict=True):
            x = (x if self.residual else 0.0) + sublayer(norm(x))
        return x

    def logits(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position of complete sequences."""
        return self._logits(self._hidden(tokens))

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Cross-entropy of every target in nats, float32 in every precision."""
        x = self.norm(self._hidden(inputs)).flatten(0, 1)
        return linear_cross_entropy(x, self.embedding.weight, targets.flatten()).view_as(targets)

    def advance(self, tokens: Int[Tensor, "B T"], state: "State | None" = None) -> tuple[Float[Tensor, "B T V"], "State"]:
        """Logits of the next chunk of a text, and the state after it. The first chunk has state None."""
        start, layers = state or (0, [None] * len(self.sublayers))
        x, new_states = self._embed(tokens, start), list[Any]()
        for norm, sublayer, layer_state in zip(self.norms, self.sublayers, layers, strict=True):
            y, new_state = _advance(sublayer, norm(x), layer_state)
            x = (x if self.residual else 0.0) + y
            new_states.append(new_state)
        return self._logits(x), (start + tokens.shape[1], new_states)


def _advance(sublayer: nn.Module, x: Float[Tensor, "B T D"], state: Any) -> tuple[Float[Tensor, "B T D"], Any]:
    """Next chunk of a sublayer, by its method `advance`. Without one, it is computed again from the start of the text."""
    if hasattr(sublayer, "advance"):
        return sublayer.advance(x, state)  # pyright: ignore[reportCallIssue]
    inputs = x if state is None else torch.cat([state, x], 1)
    return sublayer(inputs)[:, -x.shape[1] :], inputs


State = tuple[int, list[Any]]  # number of tokens so far, state of each sublayer
