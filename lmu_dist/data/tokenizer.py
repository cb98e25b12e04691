"""Tokenizers: a TokenizerConfig (and, for training, texts) in, a byte-level BPE tokenizer and its digest out.

Called by data/prepare, which stores the tokenizer with the tokens, and by the commands export and generate, which load it.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lmu_dist.config import ConfigError, Folder, TokenizerConfig

END_OF_TEXT = "<|endoftext|>"
GPT2_TOKENS = 50257  # END_OF_TEXT included


def make(config: TokenizerConfig, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """Trains or loads the tokenizer of a config. `texts` is called only for training (kind bpe). Raises ConfigError.

    `encode_special_tokens` is set, so "<|endoftext|>" inside a document is encoded as ordinary text.
    """
    if config.kind == "bpe":
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_tokens,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts(), trainer)
    elif config.kind == "gpt2":
        tokenizer = _byte_level(_gpt2_model(str(config.vocab_path), str(config.merges_path)))
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    else:
        tokenizer = load(Path(str(config.path)))
    return _for_corpus(tokenizer)


def load(path: Folder) -> Tokenizer:
    """Loads a tokenizer.json. Raises ConfigError if it is missing, damaged or has no end-of-text token."""
    if not path.is_file():
        raise ConfigError(f"no tokenizer at {path}; give data.tokenizer.path the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"{path} is not a tokenizer.json: {e}") from e
    end_of_text_id(tokenizer)
    return _for_corpus(tokenizer)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Id of the end-of-text token, which separates documents. Raises ConfigError if the vocabulary has none."""
    number = tokenizer.token_to_id(END_OF_TEXT)
    if number is None:
        raise ConfigError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents; add it to the tokenizer")
    return number


def size(tokenizer: Tokenizer) -> int:
    """Vocabulary size for an embedding: the largest id plus one, which also covers vocabularies with unused ids."""
    return max(tokenizer.get_vocab().values()) + 1


def configured_vocab_size(config: TokenizerConfig) -> int:
    """Vocabulary size according to the configuration, before a corpus is prepared. Raises ConfigError if a file is missing."""
    if config.kind == "file":
        return size(load(Path(str(config.path))))
    return config.vocab_tokens if config.kind == "bpe" else GPT2_TOKENS


def digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON, as hex. Tokenizers with equal digests give equal ids."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _for_corpus(tokenizer: Tokenizer) -> Tokenizer:
    """Turns truncation and padding off, which would drop or add tokens. Downloaded tokenizer files often have them set."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _gpt2_model(vocab: str, merges: str) -> models.BPE:
    for key, path in (("vocab_path", vocab), ("merges_path", merges)):
        if not Path(path).is_file():
            raise ConfigError(f"data.tokenizer.{key}: no file {path}; give the path of GPT-2's file")
    try:
        return models.BPE.from_file(vocab, merges)
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"data.tokenizer: {vocab} and {merges} are not GPT-2's encoder.json and vocab.bpe: {e}") from e
