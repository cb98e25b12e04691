"""Tokenizers: a TokenizerConfig (and, for training, texts) in; a tokenizer that gives text back, and its digest, out.

Made by data/prepare, which stores it with the tokens. Loaded by data/encoder, data/merge, data/corpus, train/export, planning.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lmu_dist.config import ConfigError, Folder, TokenizerConfig

END_OF_TEXT = "<|endoftext|>"  # the end-of-text token, unless data.tokenizer.end_of_text names another
GPT2_TOKENS = 50257  # END_OF_TEXT included
EXAMPLE_CHARACTERS = 24  # of a document that a tokenizer changes, shown before and after the first difference


def make(config: TokenizerConfig, texts: Callable[[], Iterator[str]]) -> tuple[Tokenizer, tuple[str, ...]]:
    """Trains or loads the tokenizer of a config. Returns it with notes for the user. Raises ConfigError.

    `texts` is called only for training (kind bpe). `encode_special_tokens` is set, so "<|endoftext|>" inside a document is
    encoded as ordinary text. For that an end-of-text token that is not special is made special. Dropout, which would make
    another corpus each time, is switched off.
    """
    end_of_text, notes = config.end_of_text or END_OF_TEXT, []
    if config.kind == "bpe":
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_tokens,
            special_tokens=[end_of_text],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts(), trainer)
    elif config.kind == "gpt2":
        tokenizer = _byte_level(_gpt2_model(str(config.vocab_path), str(config.merges_path)))
        tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
    else:
        tokenizer = load(Path(str(config.path)), config.end_of_text)
        added = tokenizer.get_added_tokens_decoder().get(end_of_text_id(tokenizer, end_of_text))
        if added is None or not added.special:
            tokenizer.add_special_tokens([AddedToken(end_of_text, special=True, normalized=False)])
            notes.append(
                f"{end_of_text} is not a special token in {config.path}; it was made one, so that only ends of documents get it"
            )
        if dropout := getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
            notes.append(f"the dropout of {config.path}, {dropout:g}, was switched off: it would make another corpus each time")
    return _for_corpus(tokenizer), tuple(notes)


def load(path: Folder, end_of_text: str | None = None) -> Tokenizer:
    """Loads a tokenizer.json. Raises ConfigError if it is missing, damaged or has no end-of-text token."""
    if not path.is_file():
        raise ConfigError(f"no tokenizer at {path}; give data.tokenizer.path the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"{path} is not a tokenizer.json: {e}") from e
    end_of_text_id(tokenizer, end_of_text)
    return _for_corpus(tokenizer)


def end_of_text_id(tokenizer: Tokenizer, end_of_text: str | None = None) -> int:
    """Id of the end-of-text token, which separates documents. Raises ConfigError if the vocabulary has none."""
    number = tokenizer.token_to_id(end_of_text or END_OF_TEXT)
    if number is None:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        raise ConfigError(
            f"the tokenizer has no {end_of_text or END_OF_TEXT} token, which separates documents; set "
            f"data.tokenizer.end_of_text to one of its special tokens: {' '.join(special) or '(it has none; add one)'}"
        )
    return number


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Id of the token that stands for text outside the vocabulary; None if there is no such token."""
    model: Any = tokenizer.model
    if isinstance(model, models.Unigram):  # the library does not expose it
        return json.loads(tokenizer.to_str())["model"].get("unk_id")
    return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)


def is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether decoding gives every text back, as the parts of the tokenizer prove: byte-level BPE with all 256 bytes.

    That is the kind of GPT-2, Llama 3, and of those that `make` trains. False means unknown, not that text is lost.
    """
    parts = json.loads(tokenizer.to_str())
    decoder, normalizer = parts["decoder"] or {}, parts["normalizer"]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    matched = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    model: Any = tokenizer.model
    return (
        isinstance(model, models.BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and normalizer is None
        and decoder.get("type") == "ByteLevel"
        and _ends_in_bytes(parts["pre_tokenizer"] or {})
        and all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
        # Tokens that are found in the text before it is split into bytes.
        and all(token.content.isascii() and not (token.lstrip or token.rstrip or token.normalized) for token in matched)
    )


def same_text(text: str, decoded: str) -> bool:
    """Whether a tokenizer has given a text back.

    Accepted are one space at the start of the text, added or dropped (tokenizers of the kind of SentencePiece mark the start of
    a word by it), and other code points for the same characters (Unicode's canonical equivalence; some tokenizers apply NFC).
    """
    if text == decoded:
        return True
    text, decoded = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", decoded)
    return text == decoded or f" {text}" == decoded or text == f" {decoded}"


def describe_loss(tokenizer: Tokenizer, text: str, decoded: str) -> str:
    """One line that says how a tokenizer changed a text, with an example around the first difference."""
    at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    begin = max(0, at - EXAMPLE_CHARACTERS // 2)
    before, after = (repr(t[begin : begin + EXAMPLE_CHARACTERS]) for t in (text, decoded))
    words, words_after = "".join(text.split()), "".join(decoded.split())
    reasons = []
    if unknown_id(tokenizer) in tokenizer.encode(text, add_special_tokens=False).ids:
        reasons.append("some of it becomes unknown tokens")
    elif words.casefold() != words_after.casefold():
        reasons.append("characters change")
    elif words != words_after:
        reasons.append("letter case changes")
    if words.casefold() == words_after.casefold() and text.casefold() != decoded.casefold():
        reasons.append("white space changes")
    if tokenizer.decoder is None:
        reasons.append("its file has no decoder")
    return f"{before} becomes {after}: {' and '.join(reasons)}"


def size(tokenizer: Tokenizer) -> int:
    """Vocabulary size for an embedding: the largest id plus one, which also covers vocabularies with unused ids."""
    return max(tokenizer.get_vocab().values()) + 1


def configured_vocab_size(config: TokenizerConfig) -> int:
    """Vocabulary size according to the configuration, before a corpus is prepared. Raises ConfigError if a file is missing."""
    if config.kind == "file":
        return size(load(Path(str(config.path)), config.end_of_text))
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


def _ends_in_bytes(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only splits the text, without dropping any of it, and then maps it to bytes."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    *splits, last = steps or [{}]
    keeps = all(step["type"] == "Digits" or (step["type"] == "Split" and step["behavior"] != "Removed") for step in splits)
    return keeps and last.get("type") == "ByteLevel"


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
