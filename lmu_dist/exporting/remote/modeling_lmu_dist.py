"""A model trained by lmu-dist, for transformers: token ids in; logits, a loss, or the state after the text out.

Loaded by AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True). Legend: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel  # pyright: ignore[reportMissingImports]
from transformers.utils.generic import ModelOutput  # pyright: ignore[reportMissingImports]

from lmu_dist.exporting.remote.configuration_lmu_dist import LMUDistConfig
from lmu_dist.exporting.remote.stored_network import build

IGNORED = -100  # a label that is no target


@dataclass
class LMUDistOutput(ModelOutput):
    """loss: mean of the targets in nats. logits (B, T, V). text_state: after the text; give it with the next tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_state: Any = None


class LMUDistForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model with a tied head. Memory and work of a generated token do not grow with the text where no sublayer is
    attention.

    Texts of a batch are padded on the right, if at all: a state cannot leave out tokens before a text.
    """

    config_class = LMUDistConfig
    base_model_prefix = "network"
    _is_stateful = True  # transformers: a state cannot be taken back, as assisted generation would
    _supports_sdpa = _supports_flash_attn = True  # attention is torch's, whichever kernel that takes

    def __init__(self, config: LMUDistConfig) -> None:
        super().__init__(config)
        self.network = build(config.network, config.vocab_size, config.hidden_size)
        self.network.initialise()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `network.initialise` has done it, and weights in files take their place."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which is the head too."""
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Another embedding and head."""
        assert isinstance(value, nn.Embedding)
        self.network.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        text_state: Any = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> LMUDistOutput | tuple[Any, ...]:
        """Logits of the next token at every position of (B, T) ids.

        attention_mask  (B, T), 0 at padding, which may only follow a text: it is no target. Raises ValueError for others
        labels          (B, T), the ids themselves; they are shifted here. -100 is no target. While the model is trained, the
                        loss comes without logits: blocks of them exist, one at a time
        text_state      of the text before these ids, from an earlier call with `use_cache`; it stays as it is
        use_cache       whether to return the state
        num_items_in_batch  the loss is divided by it, in place of the number of targets

        Raises ValueError for other shapes too.
        """
        check_shapes(input_ids, labels)
        if attention_mask is not None:
            check_padding(attention_mask)
        if labels is not None and (text_state is not None or use_cache):
            raise ValueError("labels need whole texts: call the model without text_state and use_cache")
        loss = logits = None
        if labels is not None and self.training:
            loss = self._loss(input_ids, labels, attention_mask, None, num_items_in_batch)
        elif use_cache or text_state is not None:
            logits, text_state = self.network.advance(input_ids, text_state)
        else:
            logits = self.network.logits(input_ids)
            if labels is not None:
                loss = self._loss(input_ids, labels, attention_mask, logits, num_items_in_batch)
        output = LMUDistOutput(loss=loss, logits=logits, text_state=text_state if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _loss(
        self, input_ids: Tensor, labels: Tensor, mask: Tensor | None, logits: Tensor | None, n_items: int | Tensor | None
    ) -> Tensor:
        targets = labels[:, 1:]
        is_target = targets != IGNORED if mask is None else (targets != IGNORED) & mask[:, 1:].bool()
        targets = targets.masked_fill(~is_target, 0)
        if logits is None:
            losses = self.network(input_ids[:, :-1], targets)
        else:
            losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
        if not is_target.all():
            losses = losses.masked_fill(~is_target, 0.0)
        return losses.sum() / (is_target.sum() if n_items is None else n_items)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        text_state: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The tokens that follow the state. Raises ValueError if prompts of a batch differ in length."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "this model generates from prompts of one length only: a state cannot leave padding out; generate text by "
                "text, or group prompts by their number of tokens"
            )
        n_tokens = text_state[0] if text_state is not None else 0
        return {"input_ids": input_ids[:, n_tokens:], "text_state": text_state, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs) | {
            "text_state": outputs.text_state
        }

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """There is a state in place of a cache. Beams change places, which states cannot: their texts are computed again."""
        if generation_config.num_beams > 1:
            model_kwargs["use_cache"] = False

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def check_shapes(input_ids: Tensor, labels: Tensor | None) -> None:
    """Raises ValueError unless ids are (B, T) with at least one token, and labels as many."""
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids must be (batch, tokens) with at least one token, not {tuple(input_ids.shape)}; one text is ids[None]"
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels must have the shape of input_ids, {tuple(input_ids.shape)}, not {tuple(labels.shape)}; give the same ids"
        )


def check_padding(mask: Tensor) -> None:
    """Raises ValueError if a token follows padding in a mask (B, T): the model would read the padding."""
    if bool((mask[:, 1:].bool() & ~mask[:, :-1].bool()).any()):
        raise ValueError("padding comes before a text; this model reads every token: set tokenizer.padding_side to 'right'")
