"""Text -> token ids: the byte-level BPE of OpenAI's CLIP, with the ids that openai/CLIP gives, for every string.

The one exception are HTML entities nested more than `MAX_NESTED` deep, which are refused. The time is proportional to
the length of the text (times its logarithm for a single long word): about 6 microseconds a letter.

Each step is a function, in the order in which a port would write them. A worked example:

    clean         " It&#39;s 10 CAFÃ‰S!"  ->  "it's 10 cafés!"       repaired, unescaped, lower case
    split_words   ->  "it" "'s" "1" "0" "cafés" "!"                   each is then encoded by itself
    word_symbols  "cafés" is the bytes c a f C3 A9 s  ->  66 64 69 127 102 338   the last one marked as the word's end
    merge_pairs   66 64 69 127 102 338  ->  66 702 127 102 338          a f   = 702, the lowest id of any pair's merge
                                        ->  66 702 3459 338             C3 A9 = 3459, "é"
                                        ->  3471 3459 338               c af  = 3471
                                        ->  3471 20507                  é s   = 20507, and these two do not merge
    encode        ->  585 568 272 271 3471 20507 256
    tokenize      ->  49406 585 568 272 271 3471 20507 256 49407 0 0 ... 0

Ids 0-255 are the single bytes and 256-511 the same bytes at the end of a word; then come the merges in the order of
OpenAI's table (`bpe_simple_vocab_16e6.txt.gz`, MIT licence), then the special tokens START and END.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from functools import cache, lru_cache
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

VOCAB_SIZE = 49408
START = 49406
END = 49407
SPECIAL_TOKENS = {"<|startoftext|>": START, "<|endoftext|>": END}

MERGE_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGES = 48894  # lines of the file that are used, after its heading; it holds five times as many
END_OF_WORD = 256  # added to the id of a word's last byte; spelled "</w>" in the merge file

# The order of the bytes in the vocabulary: first those that print in Latin-1, then the other 68 (controls, spaces, the
# soft hyphen). In the merge file the former stand for themselves and the latter are written as U+0100, U+0101, ...
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = _PRINTED + [byte for byte in range(256) if byte not in _PRINTED]
_BYTE_LETTERS = [chr(byte) for byte in _PRINTED] + [chr(0x100 + n) for n in range(256 - len(_PRINTED))]
_BYTE_IDS = {byte: i for i, byte in enumerate(_BYTES)}

_CACHED_PIECES = 1 << 15
_CACHED_LENGTH = 32  # characters; longer pieces are not cached, so that hostile texts can't fill the memory
MAX_NESTED = 16  # levels of HTML entities, as in "&amp;amp;lt;", which has three


def clean(text: str) -> str:
    """Repair broken text (see `_repair`), replace each run of white space by a space, strip it, and lower the case."""
    if not isinstance(text, str):
        error = UnicodeError if isinstance(text, bytes) else TypeError  # openai/CLIP's types
        raise error(f"a text must be a str, got {type(text).__name__}: {text!r:.80}")
    # Printable ASCII without "&" needs no repair, and ftfy is slow. In ASCII, ftfy and html.unescape change only
    # entities, which start with "&", and control characters and escape sequences, which are not printable. Mojibake,
    # curly quotes, ligatures, widths and NFC concern other characters.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = _repair(text)
    return " ".join(text.split()).lower()


def _repair(text: str) -> str:
    """Undo mojibake, odd quotes and widths, control characters, lone surrogates (ftfy); then HTML entities, twice."""
    import html

    import ftfy

    _check_nesting(text)
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _check_nesting(text: str) -> None:
    """Raise ValueError for HTML entities nested more than `MAX_NESTED` deep: ftfy reads the text once for each level.

    A level is undone by decoding an entity. That uses up a "&" and a ";" of the same run without white space and gives
    back at most one of the two. So a run with few of them, or of the characters that ftfy turns into them, is harmless.
    """
    if all(sum(map(run.count, "&;＆；\u037e")) <= MAX_NESTED for run in text.split()):
        return
    import ftfy

    for _ in range(MAX_NESTED):
        before, text = text, ftfy.fix_text(ftfy.fixes.unescape_html(text), unescape_html=False)
        if text == before or "<" in text:
            return
    raise ValueError(f"HTML entities are nested more than {MAX_NESTED} deep in a text of {len(text)} characters")


@cache
def _word_pattern():
    import regex  # the standard library's `re` has no \p{L}

    # IGNORECASE is needed although the text is lower case: "ſ" (U+017F) is lower case too, and has to match "s".
    return regex.compile(
        r"""<\|startoftext\|> | <\|endoftext\|>
          | 's | 't | 're | 've | 'm | 'll | 'd
          | \p{L}+                 # letters
          | \p{N}                  # digits, one by one
          | [^\s\p{L}\p{N}]+       # anything else that is not white space: punctuation, symbols, combining marks""",
        regex.IGNORECASE | regex.VERBOSE,
    )


def split_words(text: str) -> list[str]:
    """Cut cleaned text into the words that BPE works on; only white space is dropped."""
    return _word_pattern().findall(text)


def word_symbols(word: str) -> list[int]:
    """The ids of a word's UTF-8 bytes, the last one marked as the end of the word."""
    symbols = [_BYTE_IDS[byte] for byte in word.encode()]
    symbols[-1] += END_OF_WORD
    return symbols


@cache
def _read_merge_file() -> tuple[dict[tuple[int, int], int], dict[str, int]]:
    """The id that each pair of ids merges into, and the id of each symbol by its spelling in the file."""
    ids = {letter: i for i, letter in enumerate(_BYTE_LETTERS)}
    ids |= {f"{letter}</w>": i + END_OF_WORD for letter, i in ids.items()}
    merges = {}
    with gzip.open(MERGE_FILE, "rt", encoding="utf-8") as lines:
        for line in islice(lines, 1, 1 + MERGES):
            left, right = line.split()
            merges[ids[left], ids[right]] = ids[left + right] = len(ids)
    return merges, ids


def merge_pairs(symbols: list[int]) -> list[int]:
    """Byte-pair encoding: merge the adjacent pair that gives the lowest id, leftmost first, until no pair merges.

    openai/CLIP merges a pair throughout the word at once and then searches the whole word again. The result is the
    same: an id is higher than the two ids that it is merged from, so no new pair comes before the pair being merged.
    The time is not: O(n^2), half a minute for 30,000 random letters, while a heap of candidates takes O(n log n).
    """
    merges, _ = _read_merge_file()
    symbols = list(symbols)
    end, deleted = len(symbols), -1
    after = list(range(1, end + 1))  # a linked list: index of the next symbol that is not deleted
    before = list(range(-1, end))
    candidates: list[tuple[int, int]] = []  # merged id, index of the left symbol; outdated ones are skipped

    def propose(left: int) -> None:
        if left >= 0 and after[left] < end:
            merged = merges.get((symbols[left], symbols[after[left]]))
            if merged is not None:
                heappush(candidates, (merged, left))

    for left in range(end):
        propose(left)
    while candidates:
        merged, left = heappop(candidates)
        right = after[left]
        if right == end or merges.get((symbols[left], symbols[right])) != merged:
            continue
        symbols[left], symbols[right] = merged, deleted
        after[left] = after[right]
        before[after[left]] = left
        propose(before[left])
        propose(left)
    return [symbol for symbol in symbols if symbol != deleted]


def _encode_piece(piece: str) -> tuple[int, ...]:
    """Token ids of cleaned text."""
    ids: list[int] = []
    for word in split_words(piece):
        ids += [SPECIAL_TOKENS[word]] if word in SPECIAL_TOKENS else merge_pairs(word_symbols(word))
    return tuple(ids)


_encode_piece_cached = lru_cache(_CACHED_PIECES)(_encode_piece)


def encode(text: str) -> list[int]:
    """Token ids of a text of any length, without START and END.

    TypeError (UnicodeError for bytes) if `text` is not a str; ValueError for entities nested too deep.
    """
    ids: list[int] = []
    for piece in clean(text).split(" "):  # no word contains white space, so the pieces are independent
        ids += _encode_piece_cached(piece) if len(piece) <= _CACHED_LENGTH else _encode_piece(piece)
    return ids


@cache
def _spellings() -> dict[int, bytes]:
    """The UTF-8 bytes of every id, with "</w>" after those that end a word."""
    _, ids = _read_merge_file()
    byte_of = dict(zip(_BYTE_LETTERS, _BYTES, strict=True))
    return {i: bytes(byte_of[letter] for letter in spelling) for spelling, i in (ids | SPECIAL_TOKENS).items()}


def decode(ids: Iterable[int]) -> str:
    """The text that ids spell, with a space after every word; bytes that are not UTF-8 become U+FFFD. No id is skipped.

    KeyError for anything that is not an id, such as an element of a tensor: pass `.tolist()`.
    """
    spellings = _spellings()
    try:
        spelled = b"".join([spellings[i] for i in ids])
    except KeyError as error:
        raise KeyError(f"token ids are ints from 0 to {VOCAB_SIZE - 1}, got {error.args[0]!r}") from None
    return spelled.decode("utf-8", errors="replace").replace("</w>", " ")


def tokenize(texts: str | Iterable[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """Ids of one or several texts, ready for `encode_text`: START, the text's ids, END, then zeros.

    Returns int32 [N, context_length]. RuntimeError if a text does not fit; with `truncate` it is cut instead, and its
    last id is END. See `encode` for the other errors.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [[START, *encode(text), END] for text in texts]
    tokens = torch.zeros(len(rows), context_length, dtype=torch.int32)
    for i, row in enumerate(rows):
        if len(row) > context_length:
            if not truncate:
                which = f"text {i} of {len(rows)}" if len(rows) > 1 else "the text"
                raise RuntimeError(
                    f"{which} needs {len(row)} tokens, start and end included, but {context_length} fit: "
                    f"{texts[i]!r:.80}; shorten it, or cut it with truncate=True, which keeps the end token"
                )
            del row[context_length:]
            row[-1] = END
    lengths = np.array([len(row) for row in rows])
    tokens.numpy()[np.arange(context_length) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), np.int32)
    return tokens
