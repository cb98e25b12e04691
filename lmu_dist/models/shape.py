"""What an architecture is: a family and its widths, a handful of whole numbers from which everything follows.

Sizing makes a Shape from a target N, lm builds the network of it, accounting counts it.
"""

from dataclasses import dataclass

# A block is a row of sublayers, each behind its own norm and skip connection: x <- x + sublayer(LayerNorm(x)).
# lmu and lmu_attention are the paper's section 3 (FFN -> LMU -> FFN, global attention in place of the first FFN);
# the transformer is GPT-2's pre-norm block as in Kaplan et al. 2020.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "lmu": ("ffn", "lmu", "ffn"),
    "lmu_attention": ("attention", "lmu", "ffn"),
    "transformer": ("attention", "ffn"),
    "lstm": ("lstm",),
}
FAMILIES = tuple(LAYOUTS)
# Kaplan et al.'s LSTM baseline is the plain stack: its layers are one sublayer, with no norms or skips between them.
PLAIN = ("lstm",)


@dataclass(frozen=True)
class Shape:
    """Widths of one language model. Widths that a family has no use for are 0.

    family          one of FAMILIES
    d_model         width of the embedding and of the residual stream
    n_blocks        number of blocks; of the LSTM, its layers
    d_ff            hidden width of a feed-forward sublayer (the paper's d')
    n_heads         attention heads; divides d_model
    d_hidden        hidden width of the LSTM layers
    order           Legendre order q of the memory
    reduced_order   rows q' that read the memory
    theta_tokens    window of the memory
    sequence_tokens length n of the training sequences; also the number of learned positions of the transformer
    vocab_tokens    size of the vocabulary
    """

    family: str
    d_model: int
    n_blocks: int
    sequence_tokens: int
    vocab_tokens: int
    d_ff: int = 0
    n_heads: int = 0
    d_hidden: int = 0
    order: int = 0
    reduced_order: int = 0
    theta_tokens: int = 0

    @property
    def sublayers(self) -> tuple[str, ...]:
        """All sublayers, in order."""
        return LAYOUTS[self.family] * (1 if self.family in PLAIN else self.n_blocks)

    @property
    def skips(self) -> bool:
        """Whether a sublayer stands behind a norm and a skip connection of its own."""
        return self.family not in PLAIN

    @property
    def learned_positions(self) -> bool:
        """Whether positions are embedded. Only the transformer needs it: a memory knows the order of its input."""
        return self.family == "transformer"
