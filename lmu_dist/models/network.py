"""Network: what a language model of any family computes. Token ids in; losses in nats per token, logits, or a state out.

It is put together from its parts: models/lm builds them for a Shape, and an exported model from what its config.json says
(exporting/remote/stored_network). Legend: B batch, T time, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmu_dist.array_types import Float, Int
from lmu_dist.models.head import linear_cross_entropy
from lmu_dist.models.products import linear


class Network(nn.Module):
    """Embedding -> sublayers -> norm -> tied head. A sublayer is x <- x + sublayer(norm(x)); LSTM: x <- sublayer(x).

    embedding     token embedding; its weight is also that of the head
    position      learned positions, as many as the model was trained on; None: there are none
    norms         the norm before each sublayer; not used if `residual` is False
    sublayers     causal modules from (B, T, D) to (B, T, D); with a method `advance` they pass on a state
    norm          the norm before the head
    residual      whether sublayers are added to the residual stream
    logit_factor  factor of the logits (models/width_transfer), else 1
    n_blocks      number of parts in which activation checkpointing computes the sublayers again

    With `activation_checkpointing`, a pass with gradients keeps the input of each block only. The backward pass computes the
    block again.
    """

    activation_checkpointing = False
    # Whether a block that is computed again has a graph of its own (`use_reentrant` of torch.utils.checkpoint). ZeRO 3 needs
    # it: it frees the weights of a module after its forward pass, and gathers them before the backward pass of the same graph.
    reentrant_checkpoints = False

    def __init__(
        self,
        embedding: nn.Embedding,
        position: nn.Embedding | None,
        norms: nn.ModuleList,
        sublayers: nn.ModuleList,
        norm: nn.Module,
        residual: bool,
        logit_factor: float,
        n_blocks: int,
    ) -> None:
        super().__init__()
        self.residual, self.logit_factor, self.n_blocks = residual, logit_factor, n_blocks
        self.embedding, self.position = embedding, position
        self.norms, self.sublayers, self.norm = norms, sublayers, norm

    @torch.no_grad()
    def initialise(self, in_default_dtype: bool = False) -> None:
        """Initialises the weights: normal, matrices scaled by fan-in, outputs of sublayers also by depth (as in GPT-2).

        Embeddings have variance 1/d_model: logits start with variance 1, and embeddings have the scale of sublayers. If the
        shape has a base, it is the base's d_model. Numbers are drawn in the weights' precision, or in torch's default one.
        """
        n_sublayers = len(self.sublayers)

        def draw(weight: Tensor, std: float) -> None:
            drawn = torch.empty(weight.shape, dtype=None if in_default_dtype else weight.dtype)
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
        if end > self.position.num_embeddings:
            raise ValueError(
                f"{end} tokens exceed the {self.position.num_embeddings} positions that this model was trained on; "
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
        step = -(-n_sublayers // n_checkpoints(n_sublayers, self.n_blocks))
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
