"""SigLIP's tokenizers: SentencePiece models, with the ids that transformers and OpenCLIP give.

    clean      "A photo, of_a Dog!"  ->  "a photo ofa dog"           which of CLEANINGS is taken, the config says
    encode     ->  ids of the pieces                                 by the model's tokenizer file
    tokenize   ->  the ids, the end token, then padding              [N, L]

The file is a spiece.model or tokenizer.model, read by sentencepiece, or a tokenizer.json, read by tokenizers.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from miniclip import tokenizer
from miniclip.errors import MiniclipError, require

FILES = ("spiece.model", "tokenizer.model", "tokenizer.json")  # of several, the first is taken
MAX_BYTES = 1 << 26  # of a tokenizer file; that of SigLIP 2 has 34 million as JSON
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenizerError(MiniclipError, LookupError):
    """A model without a tokenizer, or a file that is none."""


def lower(text: str) -> str:
    """transformers' cleaning for SigLIP 2."""
    return text.lower()


def remove_punctuation(text: str) -> str:
    """transformers' cleaning for SigLIP: lower case, no ASCII punctuation, single spaces."""
    return " ".join(text.lower().translate(NO_PUNCTUATION).split())


def canonicalize(text: str) -> str:
    """OpenCLIP's cleaning for both: broken text is repaired as for CLIP, "_" is a space, then as above."""
    return remove_punctuation(tokenizer.clean(text).replace("_", " "))


CLEANINGS = {"lower": lower, "remove punctuation": remove_punctuation, "canonicalize": canonicalize}


class Vocabulary(NamedTuple):
    """What a tokenizer file does."""

    encode: Callable[[str], list[int]]  # a cleaned text -> its ids, without special tokens
    id_of: Callable[[str], int | None]  # the id of a piece, None if there is no such piece


def pack(path: Path) -> bytes:
    """The content of a tokenizer file, compressed. TokenizerError if it is too large."""
    if path.stat().st_size > MAX_BYTES:
        raise TokenizerError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
    return zlib.compress(path.read_bytes())


def decompress(packed: bytes) -> bytes:
    """The inverse of `pack`. TokenizerError for what is damaged."""
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(packed, MAX_BYTES)
    except zlib.error as error:
        raise TokenizerError(f"the model's tokenizer file is damaged: {error}") from error
    if not content or not unpacker.eof:
        raise TokenizerError(f"the model's tokenizer file is damaged: empty, cut, or over {MAX_BYTES:,} bytes")
    return content


def unpack(packed: bytes) -> Vocabulary:
    """The vocabulary in a packed tokenizer file. TokenizerError for a damaged one, MissingExtraError for a package."""
    content = decompress(packed)
    try:
        return (_read_json if content[:1] == b"{" else _read_sentencepiece)(content)
    except MiniclipError:
        raise
    except Exception as error:  # both libraries raise errors of many types
        raise TokenizerError(f"the model's tokenizer file is damaged, or none: {error!s:.300}") from error


def _read_sentencepiece(content: bytes) -> Vocabulary:
    library = require("sentencepiece", "siglip", "the tokenizer of a SigLIP")
    processor = library.SentencePieceProcessor(model_proto=content)

    def id_of(piece: str) -> int | None:
        found = processor.piece_to_id(piece)
        return found if processor.id_to_piece(found) == piece else None

    return Vocabulary(processor.encode, id_of)


def _read_json(content: bytes) -> Vocabulary:
    library = require("tokenizers", "siglip", "the tokenizer of a SigLIP, a tokenizer.json")
    model = library.Tokenizer.from_buffer(content)
    model.no_truncation()
    model.no_padding()
    return Vocabulary(lambda text: model.encode(text, add_special_tokens=False).ids, model.token_to_id)


class Tokenizer:
    """Texts -> token ids int32 [N, context_length]: the ids of each text, the end token, then padding."""

    def __init__(self, vocabulary: Vocabulary, cleaning: str, end_token: str, pad_token: str, context_length: int):
        self.vocabulary, self.clean, self.context_length = vocabulary, CLEANINGS[cleaning], context_length
        self.end, self.padding = map(self._special, (end_token, pad_token))

    def _special(self, token: str) -> int:
        found = self.vocabulary.id_of(token)
        if found is None:
            raise TokenizerError(f"the model's tokenizer file has no {token!r:.100}, which its config names")
        return found

    def __call__(self, texts: str | Iterable[str], truncate: bool = False) -> torch.Tensor:
        """RuntimeError if a text does not fit; with `truncate` it is cut instead, and its last id is the end token."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.full((len(texts), self.context_length), self.padding, dtype=torch.int32)
        for row, text in zip(tokens, texts, strict=True):
            if not isinstance(text, str):
                raise TypeError(f"a text must be a str, got {type(text).__name__}: {text!r:.80}")
            ids = self.vocabulary.encode(self.clean(text))
            if len(ids) >= self.context_length and not truncate:
                raise RuntimeError(
                    f"the text needs {len(ids) + 1} tokens, the end token included, but {self.context_length} fit: "
                    f"{text!r:.80}; shorten it, or cut it with truncate=True, which keeps the end token"
                )
            ids = [*ids[: self.context_length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return tokens


@lru_cache(4)
def make_tokenizer(packed: bytes, cleaning: str, end_token: str, pad_token: str, context_length: int) -> Tokenizer:
    """The tokenizer of a packed file. It is made once: that takes up to seconds."""
    return Tokenizer(unpack(packed), cleaning, end_token, pad_token, context_length)
