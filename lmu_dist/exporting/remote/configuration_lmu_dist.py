"""The configuration of an exported model: its config.json. Read by transformers' AutoConfig."""

from typing import Any

from transformers import PretrainedConfig  # pyright: ignore[reportMissingImports]


class LMUDistConfig(PretrainedConfig):
    """What builds the network, and where the model comes from.

    network    parts of the network (see `build` in stored_network)
    lmu_dist   how it was trained: the run's key, its configuration and shape, and what lmu-dist needs to load this folder
    hidden_size, vocab_size, num_hidden_layers, max_position_embeddings: width, tokens, sublayers, length of the training
    sequences, under the names by which other libraries look for them
    """

    model_type = "lmu_dist"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        lmu_dist: dict[str, Any] | None = None,
        vocab_size: int = 1,
        hidden_size: int = 1,
        num_hidden_layers: int = 0,
        max_position_embeddings: int = 1,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.network, self.lmu_dist = network or {}, lmu_dist or {}
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.max_position_embeddings, self.use_cache = max_position_embeddings, use_cache
        super().__init__(**kwargs)
