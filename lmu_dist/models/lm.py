"""LanguageModel: the network of all families. Maps token ids to losses in nats per token, or to logits.

The families differ only in their sublayers. Legend: B batch, T time, D width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmu_dist.models import norms
from lmu_dist.models.head import linear_cross_entropy
from lmu_dist.models.products import linear
from lmu_dist.models.registry import family_of
from lmu_dist.models.shape import Shape
from lmu_dist.models.width_transfer import width_ratio


class LanguageModel(nn.Module):
    """Embedding -> sublayers -> norm -> tied head. A sublayer is x <- x + sublayer(norm(x)); LSTM: x <- sublayer(x).

    The same seed gives the same weights on every rank and every device: all random numbers are drawn on the CPU, in float32.
    The weights are on `device` in `dtype`; None keeps the dtype in which modules are built. While the model is built, the CPU
    holds one sublayer or matrix at a time, if the weights are elsewhere. `options` are the options of the family; None stands
    for the defaults.

    With `activation_checkpointing`, a pass with gradients keeps the input of each block only. The backward pass computes the
    block again.
    """

    activation_checkpointing = False
    # Whether a block that is computed again has a graph of its own (`use_reentrant` of torch.utils.checkpoint). ZeRO 3 needs
    # it: it frees the weights of a module after its forward pass, and gathers them before the backward pass of the same graph.
    reentrant_checkpoints = False

    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
        options: Any = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, family = shape, family_of(shape)
        options = family.Options() if options is None else options
        self.residual, self.logit_factor = family.residual, width_ratio(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            n_sublayers = family.n_sublayers(shape)
            # Order and dtype of all random numbers are part of a seed's weights, and so are those that `_initialise` replaces.
            self.embedding = nn.Embedding(shape.vocab_tokens, shape.d_model).to(device, dtype)
            self.position = (
                nn.Embedding(shape.sequence_tokens, shape.d_model).to(device, dtype) if family.learned_positions else None
            )
            self.norms = nn.ModuleList(
                norms.build(family.norm, shape.d_model) if self.residual else nn.Identity() for _ in range(n_sublayers)
            )
            self.sublayers = nn.ModuleList(sublayer.to(device, dtype) for sublayer in family.sublayers(shape, options))
            self.norm = norms.build(family.norm, shape.d_model)
            self.norms.to(device, dtype)
            self.norm.to(device, dtype)
            self._initialise(n_sublayers, dtype)

    @torch.no_grad()
    def _initialise(self, n_sublayers: int, dtype: torch.dtype | None) -> None:
        """Initialises the weights: normal, matrices scaled by fan-in, outputs of sublayers also by depth (as in GPT-2).

        Embeddings have variance 1/d_model: logits start with variance 1, and embeddings have the scale of sublayers. If the
        shape has a base, it is the base's d_model.
        """

        def draw(weight: Tensor, std: float) -> None:
            drawn = torch.empty(weight.shape, dtype=weight.dtype if dtype is None else None)
            weight.copy_(nn.init.normal_(drawn, std=std))

        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                draw(module.weight, (module.embedding_dim * self.logit_factor) ** -0.5)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                draw(module.weight, std * (n_sublayers**-0.5 if name.endswith(".out") else 1.0))
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

    def _features(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The inputs of the head. The factor of the logits is theirs: that costs less, and is the same."""
        features = self.norm(x)
        return features if self.logit_factor == 1 else features * self.logit_factor

    def _logits(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return linear(self._features(x), self.embedding.weight)

    def _hidden(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = self._embed(tokens, 0)
        n_sublayers = len(self.sublayers)
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return self._through(x, 0, n_sublayers)
        step = -(-n_sublayers // n_checkpoints(n_sublayers, self.shape.n_blocks))
        for first in range(0, n_sublayers, step):
            last = min(first + step, n_sublayers)
            x = checkpoint(self._through, x, first, last, use_reentrant=self.reentrant_checkpoints)
        return x

    def _through(self, x: Float[Tensor, "B T D"], first: int, last: int) -> Float[Tensor, "B T D"]:
        """Applies the sublayers first .. last - 1."""
        for i in range(first, last):
            x = (x if self.residual else 0.0) + self.sublayers[i](self.norms[i](x))
        return x

    def logits(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position of complete sequences."""
        return self._logits(self._hidden(tokens))

    def forward(self, inputs: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Cross-entropy of every target in nats, float32 in every precision."""
        x = self._features(self._hidden(inputs)).flatten(0, 1)
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


def n_checkpoints(n_sublayers: int, n_blocks: int) -> int:
    """Number of parts that activation checkpointing computes again, one after the other: the blocks.

    A family with fewer sublayers than blocks, such as the LSTM, has one part per sublayer.
    """
    return min(n_sublayers, n_blocks)


State = tuple[int, list[Any]]  # number of tokens so far, state of each sublayer
