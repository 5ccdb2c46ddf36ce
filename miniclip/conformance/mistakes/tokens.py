"""From strings to token ids."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from miniclip import tokenizer
from miniclip.conformance.forward import Scope
from miniclip.conformance.mistakes.mistake import Mistake
from miniclip.conformance.rules import strings
from miniclip.tokenizer import END, END_OF_WORD, START, merge_pairs, split_words, word_symbols


def ids_of(
    text: str,
    length: int,
    clean: Callable[[str], str] = tokenizer.clean,
    split: Callable[[str], list[str]] = split_words,
    word: Callable[[str], list[int]] = lambda word: merge_pairs(word_symbols(word)),
    special: Mapping[str, int] = tokenizer.SPECIAL_TOKENS,
    start: tuple[int, ...] = (START,),
    end: tuple[int, ...] = (END,),
    padding: int = 0,
    ends_if_cut: bool = True,
) -> list[int]:
    """As tokenize(text, length, truncate=True), with some steps replaced."""
    words = [[special[x]] if x in special else word(x) for x in split(clean(text))]
    ids = [*start, *(i for word in words for i in word)]
    ids = [*ids[: length - len(end) * ends_if_cut], *end][:length]
    return ids + [padding] * (length - len(ids))


def explain(text: str, ids: list[int]) -> list[str]:
    """The mistakes under which a text gets these ids, which may lack padding."""
    length = len(ids)
    return [name for name, steps in STEPS.items() if ids_of(text, length, **steps) == ids]


def _repaired(text: str, unescape: Callable[[str], str] = html.unescape, **options) -> str:
    """options: those of ftfy.fix_text."""
    import ftfy

    return unescape(unescape(ftfy.fix_text(text, **options)))


def _names_only(text: str) -> str:
    """HTML's names unescaped, its number references left as they are."""
    return re.sub(r"&[^#&][^&]*", lambda match: html.unescape(match[0]), text)


def _by_code_point(text: str) -> str:
    """Number references taken as code points, also 128 to 159, which HTML reads as Windows-1252."""
    references = re.compile(r"&#(?:1[2-4]\d|15\d|[xX][89][0-9a-fA-F]);?")
    return html.unescape(references.sub(lambda match: _character(match[0].strip("&#;")), text))


def _character(number: str) -> str:
    return chr(int(number[1:], 16) if number[0] in "xX" else int(number))


def _tidy(text: str) -> str:
    return " ".join(text.split()).lower()


def _cut_by(pattern: str, ignore_case: bool = True) -> Callable[[str], list[str]]:
    import regex

    return regex.compile(pattern, regex.IGNORECASE * ignore_case).findall


def _tidy_ascii(text: str) -> str:
    return re.sub(r"[\t-\r ]+", " ", text).strip("\t\n\v\f\r ").lower()


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


@cache
def _vocabulary() -> dict[bytes, int]:
    """Ids by what they spell."""
    return {spelling: i for i, spelling in tokenizer._spellings().items()}


def _longest_match(word: str) -> list[int]:
    """Repeatedly the longest entry of the vocabulary that fits, as a port does that has a vocabulary but no merges."""
    rest, ids = word.encode() + b"</w>", []
    while rest:
        length = next(n for n in range(len(rest), 0, -1) if rest[:n] in _vocabulary())
        ids.append(_vocabulary()[rest[:length]])
        rest = rest[length:]
    return ids


def _leftmost_merge(word: str) -> list[int]:
    """The leftmost pair that can be merged is merged first, not the one with the lowest id."""
    merges, _ = tokenizer._read_merge_file()
    symbols, i = word_symbols(word), 0
    while i + 1 < len(symbols):
        merged = merges.get((symbols[i], symbols[i + 1]))
        if merged is None:
            i += 1
        else:
            symbols[i : i + 2], i = [merged], 0
    return symbols


def _rightmost_merge(word: str) -> list[int]:
    """Of equal pairs the last one is merged first."""
    merges, _ = tokenizer._read_merge_file()
    symbols = word_symbols(word)
    while pairs := [(merges[pair], -i) for i, pair in enumerate(pairwise(symbols)) if pair in merges]:
        merged, i = min(pairs)
        symbols[-i : 2 - i] = [merged]
    return symbols


def _unmarked(word: str) -> list[int]:
    symbols = word_symbols(word)
    return merge_pairs([*symbols[:-1], symbols[-1] - END_OF_WORD])


_NO_DIGITS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+"
_NO_PUNCTUATION = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}"
_NO_CONTRACTIONS = r"<\|startoftext\|>|<\|endoftext\|>|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_ASCII_SPACE = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\t-\r \p{L}\p{N}]+"
_EXACT_CASE = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u0345]+"
_CLEAN = (tokenizer.clean, ".lower()")
_REPAIR = (tokenizer._repair, "html.unescape")
_WORDS = (tokenizer._word_pattern, r"\p{L}+")
_MERGES = (tokenizer.merge_pairs, "heappop(")
_FRAME = (tokenizer.tokenize, "[START, ")


STEPS: dict[str, dict] = {}  # the steps that each mistake replaces, by its name


def _mistake(name: str, place: tuple, **steps) -> Mistake:
    STEPS[name] = steps
    return Mistake(name, {"text.ids": lambda s: _rows(s, steps)}, *place)


def _rows(s: Scope, steps: dict) -> Tensor:
    length = s.config.text.context_length
    return torch.tensor([ids_of(text, length, **steps) for text in strings(s["text.utf8"])], dtype=torch.int32)


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode()


def _lower_ascii(text: str) -> str:
    return "".join(c.lower() if c.isascii() else c for c in " ".join(_repaired(text).split()))


def _end_on_every_byte(word: str) -> list[int]:
    """All bytes of the last character marked as the end of the word."""
    symbols, last = word_symbols(word), len(word[-1].encode())
    return merge_pairs([*symbols[:-last], *(i % END_OF_WORD + END_OF_WORD for i in symbols[-last:])])


def _one_higher(word: str, least: int = 0) -> list[int]:
    return [i + (i >= least) for i in merge_pairs(word_symbols(word))]


TOKENS = (
    _mistake("not lower-cased", _CLEAN, clean=lambda text: " ".join(_repaired(text).split())),
    _mistake("ftfy missing", _REPAIR, clean=lambda text: _tidy(html.unescape(html.unescape(text)))),
    _mistake("HTML entities not unescaped", _REPAIR, clean=lambda text: _tidy(_only_fixed(text))),
    _mistake("ftfy and HTML entities missing", _REPAIR, clean=_tidy),
    _mistake("accents stripped", _CLEAN, clean=lambda text: _without_accents(tokenizer.clean(text))),
    _mistake("only ASCII letters lower-cased", _CLEAN, clean=_lower_ascii),
    _mistake("no guess at mojibake", _REPAIR, clean=lambda text: _tidy(_repaired(text, fix_encoding=False))),
    _mistake("HTML entities unescaped by ftfy in spite of a <", _REPAIR,
             clean=lambda text: _tidy(_repaired(text, unescape_html=True))),
    _mistake("HTML entities unescaped once, not twice", _REPAIR,
             clean=lambda text: _tidy(html.unescape(_only_fixed(text)))),
    _mistake("normalised to NFKC, not NFC", _REPAIR, clean=lambda text: _tidy(_repaired(text, normalization="NFKC"))),
    _mistake("not normalised to NFC", _REPAIR, clean=lambda text: _tidy(_repaired(text, normalization=None))),
    _mistake("ligature U+FB05 replaced by s and t, not U+017F and t", _REPAIR,
             clean=lambda text: tokenizer.clean(text.replace("\ufb05", "st"))),
    _mistake("white space beyond ASCII not recognised", _CLEAN,
             clean=lambda text: _tidy_ascii(_repaired(text)), split=lambda text: _cut_by(_ASCII_SPACE)(text)),
    _mistake("U+017F not taken for s in contractions", (tokenizer._word_pattern, "'s | 't"),
             split=lambda text: _cut_by(_EXACT_CASE, ignore_case=False)(text)),
    _mistake("HTML number references not unescaped", _REPAIR,
             clean=lambda text: _tidy(_repaired(text, _names_only, unescape_html=False))),
    _mistake("HTML number references 128 to 159 taken as code points", _REPAIR,
             clean=lambda text: _tidy(_repaired(text, _by_code_point))),
    _mistake("characters beyond ASCII dropped", (tokenizer.word_symbols, "word.encode()"),
             clean=lambda text: _ascii(tokenizer.clean(text))),
    _mistake("digits not split", (tokenizer._word_pattern, r"\p{N}  "), split=lambda text: _cut_by(_NO_DIGITS)(text)),
    _mistake("contractions not split", (tokenizer._word_pattern, "'s | 't"),
             split=lambda text: _cut_by(_NO_CONTRACTIONS)(text)),
    _mistake("split at white space only", _WORDS, split=str.split),
    _mistake("punctuation dropped", (tokenizer._word_pattern, r"[^\s\p{L}\p{N}]+"),
             split=lambda text: _cut_by(_NO_PUNCTUATION)(text)),
    _mistake("ends of words not marked", (tokenizer.word_symbols, "END_OF_WORD"), word=_unmarked),
    _mistake("all bytes of the last character marked as the word's end", (tokenizer.word_symbols, "END_OF_WORD"),
             word=_end_on_every_byte),
    _mistake("longest match in the vocabulary instead of merges", _MERGES, word=_longest_match),
    _mistake("merges from the left instead of by rank", _MERGES, word=_leftmost_merge),
    _mistake("of equal pairs the last merged first", _MERGES, word=_rightmost_merge),
    _mistake("bytes not merged", _MERGES, word=word_symbols),
    _mistake("every id one too high", _FRAME, word=_one_higher, start=(START + 1,), end=(END + 1,),
             special={text: i + 1 for text, i in tokenizer.SPECIAL_TOKENS.items()}),
    _mistake("ids of merges one too high: the table's heading counted", _MERGES,
             word=lambda word: _one_higher(word, 2 * END_OF_WORD)),
    _mistake("start-of-text token missing", _FRAME, start=()),
    _mistake("end-of-text token missing", _FRAME, end=()),
    _mistake("truncated text without the end-of-text token", (tokenizer.tokenize, "row[-1] = END"), ends_if_cut=False),
    _mistake("padded with the end-of-text token", (tokenizer.tokenize, "torch.zeros("), padding=END),
)  # fmt: skip


def _only_fixed(text: str) -> str:
    import ftfy

    return ftfy.fix_text(text)  # which unescapes some entities itself
