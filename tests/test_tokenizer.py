"""The tokenizer: openai/CLIP's ids for texts in many scripts, short cuts against their plain forms, and the errors."""

import html
import json
import random
import subprocess
import sys
import time
import unicodedata
from itertools import pairwise, product
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniclip import tokenizer
from miniclip.tokenizer import clean, decode, encode, merge_pairs, split_words, tokenize, word_symbols

START, END, VOCAB_SIZE = 49406, 49407, 49408
GOLDEN = json.loads((Path(__file__).parent / "conformance" / "tokenizer.json").read_text(encoding="ascii"))
EVERY_CHARACTER = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]

FRAGMENTS = ["'", "'s", "'RE", "<|startoftext|>", "<|ENDofTEXT|>", "<", "&", "&amp;", "&amp;lt;", "&#39", "&#x1F600;"]
FRAGMENTS += ["Ã©", "â€™", "é", "e\u0301", "İ", "Σ", "ſ", "42", "日本", "\x1b[0m", "\r\n", "\x1c", "\ud83d", "\ude00"]
tricky_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(st.characters(), max_size=3), max_size=8).map("".join)


def first_wrong() -> str | None:
    """The first text of the golden corpus that gets other ids than openai/CLIP gives it."""
    return next((text for text, ids in GOLDEN["encode"] if encode(text) != ids), None)


def plain_merge(symbols: list[int], choose=min) -> list[int]:
    """`merge_pairs` as one would explain it; `choose` takes one of the (merged id, position) that are possible."""
    merges, _ = tokenizer._read_merge_file()
    while found := [(merges[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in merges]:
        merged, i = choose(found)
        symbols = [*symbols[:i], merged, *symbols[i + 2 :]]
    return symbols


def test_golden_corpus():
    assert len(GOLDEN["encode"]) > 3000
    assert first_wrong() is None
    assert [ids for ids, text in GOLDEN["decode"] if decode(ids) != text] == []


def _pattern(old: str, new: str, flags: int = regex.IGNORECASE):
    source = tokenizer._word_pattern().pattern
    assert old in source
    pattern = regex.compile(source.replace(old, new), flags | regex.VERBOSE)
    return tokenizer, "_word_pattern", lambda: pattern


def _clean(change):
    return tokenizer, "clean", lambda text, right=clean: change(text, right(text))


MISTAKES = {  # a port's: the module, the name in it, what stands there by mistake
    "no ftfy": (ftfy, "fix_text", str),
    "no unescaping": (html, "unescape", str),
    "unescaped once": (tokenizer, "_repair", lambda text: html.unescape(ftfy.fix_text(text))),
    "NFKC": _clean(lambda text, cleaned: unicodedata.normalize("NFKC", cleaned)),
    "not lower-cased": _clean(lambda text, cleaned: " ".join(tokenizer._repair(text).split())),
    "casefold": _clean(lambda text, cleaned: cleaned.casefold()),
    "digits kept together": _pattern(r"\p{N} ", r"\p{N}+ "),
    "marks among the letters": _pattern(r"\p{L}+", r"[\p{L}\p{M}]+"),
    "punctuation one by one": _pattern(r"\p{N}]+", r"\p{N}]"),
    "no contractions": _pattern("| 's | 't | 're", ""),
    "case-sensitive": _pattern("", "", flags=0),
    "special tokens spelled out": (tokenizer, "SPECIAL_TOKENS", {}),
    "no end of word": (tokenizer, "END_OF_WORD", 0),
    "leftmost pair first": (tokenizer, "merge_pairs", lambda symbols: plain_merge(symbols, lambda found: found[0])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_corpus_finds(mistake, monkeypatch):
    tokenizer._encode_piece_cached.cache_clear()
    monkeypatch.setattr(*MISTAKES[mistake])
    wrong = first_wrong()
    tokenizer._encode_piece_cached.cache_clear()
    assert wrong is not None


def test_example_of_the_docstring():
    assert clean(" It&#39;s 10 CAFÃ‰S!") == "it's 10 cafés!"
    assert split_words("it's 10 cafés!") == ["it", "'s", "1", "0", "cafés", "!"]
    assert word_symbols("cafés") == [66, 64, 69, 127, 102, 338]
    assert merge_pairs([66, 64, 69, 127, 102, 338]) == [3471, 20507]
    assert encode(" It&#39;s 10 CAFÃ‰S!") == [585, 568, 272, 271, 3471, 20507, 256]


def test_published_example():
    tokens = tokenize("Hello World!")
    assert tokens.tolist() == [[49406, 3306, 1002, 256, 49407] + [0] * 72]


def test_vocabulary():
    merges, ids = tokenizer._read_merge_file()
    assert sorted(ids.values()) == list(range(START))  # hence no two symbols are spelled alike
    assert (tokenizer.START, tokenizer.END, tokenizer.VOCAB_SIZE) == (START, END, VOCAB_SIZE)
    assert all(merged > max(pair) for pair, merged in merges.items())  # what merge_pairs' order rests on


# Short cuts against what they stand for


def test_printable_ascii_needs_no_repair():
    allowed = [chr(c) for c in range(0x20, 0x7F) if c != ord("&")]
    every_triple = "".join(map("".join, product(allowed, repeat=3)))
    assert tokenizer._repair(every_triple) == every_triple
    assert all(tokenizer._repair(a + b) == a + b for a, b in product(allowed, repeat=2))


@given(st.text(st.characters(codec="ascii")) | st.text(st.sampled_from("&lt;#9aA\x1b[m \r\n\x1c")))
def test_ascii_equals_the_long_way(text):
    assert clean(text) == regex.sub(r"\s+", " ", tokenizer._repair(text).strip()).strip().lower()


def test_str_split_and_the_regex_agree_on_white_space():
    only_str = {c for c in EVERY_CHARACTER if c.isspace()} ^ set(regex.findall(r"\s", "".join(EVERY_CHARACTER)))
    assert only_str == set("\x1c\x1d\x1e\x1f")
    for c in only_str:  # so the repair must leave none
        assert {tokenizer._repair(text) for text in (f"a{c}b", f"a&#{ord(c)};b", f"a&amp;#{ord(c)};b")} == {"ab"}


@given(st.text("abet'!é日", min_size=1) | st.text(st.characters(codec="utf-8"), min_size=1))
def test_merge_pairs_equals_the_plain_form(word):
    assert merge_pairs(word_symbols(word)) == plain_merge(word_symbols(word))


@given(tricky_text)
def test_pieces_are_independent(text):
    assert encode(text) == list(tokenizer._encode_piece(clean(text)))


def test_long_words_are_quick_and_not_cached():
    word = "".join(random.Random(0).choices("etaoinshrdlu", k=100_000))  # minutes, if searched again for each merge
    cached = tokenizer._encode_piece_cached.cache_info().currsize
    assert decode(encode(word)) == word + " "
    assert tokenizer._encode_piece_cached.cache_info().currsize == cached
    assert tokenizer._encode_piece_cached.cache_info().maxsize is not None


NESTED = {  # each level takes a reading of the text, however it is written
    "amp": "&" + "amp;" * 4000 + "é",
    "capitals": "&" + "AMP;" * 4000 + "é",
    "number": "&" + "#38;" * 4000 + "é",
    "wide": "＆" + "#65286;" * 4000 + "é",
    "wide semicolon": "&" + "amp；" * 4000 + "é",
    "greek question mark": "&" + "amp\u037e" * 4000 + "é",
    "semicolon": "&amp" * 100 + "&#59;" * 4000 + "é",
    "apart": " ".join("&" + "amp;" * n for n in (50, 60)) + "é",
}


@pytest.mark.parametrize("kind", NESTED)
def test_nested_entities_are_refused_quickly(kind, monkeypatch):
    calls, unescape = [], ftfy.fixes.unescape_html
    monkeypatch.setattr(ftfy.fixes, "unescape_html", lambda text: calls.append(1) or unescape(text))
    monkeypatch.setitem(ftfy.FIXERS, "unescape_html", ftfy.fixes.unescape_html)
    if kind == "semicolon":  # much of it, but not deep
        encode(NESTED[kind])
    else:
        with pytest.raises(ValueError, match="nested more than 16 deep"):
            encode(NESTED[kind])
    assert len(calls) <= 3 * tokenizer.MAX_NESTED


@given(st.lists(st.sampled_from(["&amp;", "amp;", "#38;", "&#x26;", "＆", "；", "&lt;", "é", "Ã©", "&#59;", "&"])))
def test_entities_that_are_not_nested_deep_are_as_ever(parts):
    text = "".join(parts * 5)
    try:
        repaired = tokenizer._repair(text)
    except ValueError:
        assert text.count("&") + text.count("＆") + text.count(";") + text.count("；") > tokenizer.MAX_NESTED
    else:
        assert repaired == html.unescape(html.unescape(ftfy.fix_text(text)))


def test_addresses_with_many_parameters_are_not_refused():
    address = "https://example.org/?" + "&".join(f"a{i}=b;{i}é" for i in range(2000))
    assert clean(address) == html.unescape(html.unescape(ftfy.fix_text(address))).lower()


def test_import_loads_nothing_heavy():
    code = """if True:
        import sys, miniclip.tokenizer
        assert not {'ftfy', 'regex'} & set(sys.modules)
        assert miniclip.tokenizer._read_merge_file.cache_info().currsize == 0
        miniclip.tokenizer.tokenize('a cat')
        assert 'regex' in sys.modules and 'ftfy' not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# What comes out


@settings(deadline=None)
@given(tricky_text)
def test_decode_spells_the_words(text):
    words = split_words(clean(text))
    assert decode(encode(text)) == "".join(w if w in tokenizer.SPECIAL_TOKENS else w + " " for w in words)


@given(st.lists(tricky_text, max_size=4), st.integers(1, 90))
def test_tokenize_pads_and_truncates(texts, context_length):
    tokens = tokenize(texts, context_length, truncate=True)
    assert (tokens.shape, tokens.dtype) == ((len(texts), context_length), torch.int32)
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = [START, *encode(text), END]
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], END]
        assert row == ids + [0] * (context_length - len(ids))


@pytest.mark.parametrize(
    ("texts", "context_length", "rows"),
    [("", 2, [[START, END]]), ("a b c", 1, [[END]]), ("a b c", 2, [[START, END]]), ("a b c", 3, [[START, 320, END]]),
     ([], 77, []), (("a", "b"), 3, [[START, 320, END], [START, 321, END]])],
)  # fmt: skip
def test_tokenize_small(texts, context_length, rows):
    assert tokenize(texts, context_length, truncate=True).tolist() == rows


def test_too_long():
    assert tokenize("dog " * 75).shape == (1, 77)
    with pytest.raises(RuntimeError, match=r"text 1 of 2 needs 78 tokens, .* 77 fit: 'dog dog .*truncate=True"):
        tokenize(["a", "dog " * 76])


@pytest.mark.parametrize("text", [None, 3, ["a"], b"a"])
def test_wrong_types(text):
    error = UnicodeError if text == b"a" else TypeError
    with pytest.raises(error, match=f"must be a str, got {type(text).__name__}"):
        encode(text)
    with pytest.raises(error, match="must be a str, got"):
        tokenize([text])


@pytest.mark.parametrize("unknown", [49408, -1, "a", torch.tensor(320)])
def test_decode_refuses_what_is_no_id(unknown):
    with pytest.raises(KeyError, match="from 0 to 49407, got"):
        decode([320, unknown])


# Live, where openai/CLIP is installed


@pytest.fixture(scope="module")
def openai():
    pytest.importorskip("clip", reason="openai/CLIP (PyPI: clip-anytorch) is not installed")
    return pytest.importorskip("clip.clip")


@given(text=tricky_text, data=st.data())
def test_equals_openai(openai, text, data):
    assert encode(text) == openai._tokenizer.encode(text)
    assert torch.equal(tokenize(text, 20, truncate=True), openai.tokenize(text, 20, truncate=True))
    ids = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1) | st.integers(0, 511)))
    assert decode(ids) == openai._tokenizer.decode(ids)


def test_words_equal_openai_for_every_character(openai):
    text = " ".join(f"{c} '{c}x{c}1{c}!{c}" for c in EVERY_CHARACTER[:0x20000])
    assert split_words(text) == openai._tokenizer.pat.findall(text)


WRONG_ARGUMENTS = [(None,), (3,), (b"a",), ([None],), ([b"a"],), ("a", 2), ("a", -1), ("a", -9, True), ("a", 0, True)]


@pytest.mark.parametrize("args", WRONG_ARGUMENTS)
def test_errors_equal_openai(openai, args):
    with pytest.raises(Exception) as expected:
        openai.tokenize(*args)
    with pytest.raises(type(expected.value)):
        tokenize(*args)


@pytest.mark.slow  # a timing, which a busy machine disturbs
def test_five_times_as_fast_as_openai(openai):
    prompts = [text for text, _ in GOLDEN["encode"] if text.startswith("a photo of a ") and text.isascii()] * 30

    def seconds(function) -> float:
        start = time.perf_counter()
        function(prompts)
        return time.perf_counter() - start

    assert min(seconds(openai.tokenize) for _ in range(5)) > 5 * min(seconds(tokenize) for _ in range(5))
