"""Make tokenizer.json: texts in many scripts with the token ids that openai/CLIP gives them, and ids with their text.

    python make_tokenizer.py        where `import clip` finds openai/CLIP (PyPI: clip-anytorch), with the ftfy and regex
                                    of constraints.txt

The file is ASCII, one case a line. Only characters that Unicode has had since 3.2 are drawn at random, so that the ids
do not depend on how recent the Unicode tables of Python and of regex are.
"""

import html.entities
import json
import platform
import random
import unicodedata
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from unittest import mock

import clip.simple_tokenizer
import ftfy

SENTENCES = """\
A photo of a small dog, sleeping in the sun.
Une photo d’un petit chien qui dort au soleil, près du château français.
Ein Foto von einem kleinen Hund, der süß in der Sonne schläft; Straße, GROẞ.
Una foto de un niño pequeño: ¿dónde está?
Uma foto de um cão pequeno à beira do coração.
O fotografie cu un câine mic și o pisică în grădină.
Zdjęcie małego psa śpiącego w słońcu, żółć, jaźń.
Fotka malého psa, který spí na slunci; příliš žluťoučký kůň.
Egy kis kutya fényképe, árvíztűrő tükörfúrógép.
Güneşte uyuyan küçük bir köpeğin fotoğrafı, İstanbul, ILIK ışık.
Bức ảnh một con chó nhỏ đang ngủ dưới nắng.
Ljósmynd af litlum hundi, það er þægilegt.
Mazā suņa fotogrāfija saulē, ļoti jauki.
Et bilde av en liten hund på blå øy.
En bild på en liten hund, räksmörgås.
Kuva pienestä koirasta, hääyöaie.
Фотография маленькой собаки, спящей на солнце.
Світлина маленького собаки, їжак і ґанок.
Снимка на малко куче на слънце.
Фотографија малог пса, љубав и џем.
Μια φωτογραφία ενός μικρού σκύλου, ΟΔΥΣΣΕΥΣ, ᾳ ᾠδή.
Փոքրիկ շան լուսանկար արևի տակ։
პატარა ძაღლის ფოტო მზეზე.
صورة لكلب صغير نائم في الشمس، لا إله ٣٤٥.
عکس یک سگ کوچک که می‌خوابد ۱۲۳.
ایک چھوٹے کتے کی تصویر۔
תמונה של כלב קטן ישן בשמש, שָׁלוֹם.
धूप में सोते हुए छोटे कुत्ते की तस्वीर, क्षत्रिय १२३।
একটি ছোট কুকুরের ছবি, বাংলা ৪৫৬।
ஒரு சிறிய நாயின் புகைப்படம்.
ఒక చిన్న కుక్క ఫోటో.
ಒಂದು ಸಣ್ಣ ನಾಯಿಯ ಫೋಟೋ.
ഒരു ചെറിയ നായയുടെ ചിത്രം.
નાના કૂતરાનો ફોટો.
ਇੱਕ ਛੋਟੇ ਕੁੱਤੇ ਦੀ ਫੋਟੋ।
කුඩා බල්ලෙකුගේ ඡායාරූපයක්.
ภาพถ่ายของสุนัขตัวเล็กนอนหลับกลางแดด ๑๒๓
ຮູບຖ່າຍຂອງໝານ້ອຍ
ခွေးလေးတစ်ကောင်၏ ဓာတ်ပုံ။
រូបថតឆ្កែតូចមួយ។
ཁྱི་ཆུང་གི་པར།
የትንሽ ውሻ ፎቶ፣ ፩፪፫።
Нарны дор унтаж буй жижиг нохойн зураг.
一张小狗在阳光下睡觉的照片，２０２４年。
一張小狗在陽光下睡覺的照片。
日なたで眠る小さな犬の写真、ｶﾞｷﾞｸﾞ ＡＢＣ①②③。
햇볕에 자는 작은 개의 사진, 각각 값.
Picha ya mbwa mdogo akilala juani.
Aworan aja kekere kan, ẹ̀kọ́ ọ̀rọ̀.
ᎩᏟ ᎤᏍᏗ
ᠮᠣᠩᠭᠣᠯ ᠨᠣᠬᠠᠢ
ߊ߲ߞߏ
𐌰𐌱𐌲 𐍈
𝒜 𝔭𝔥𝔬𝔱𝔬 𝟘𝟙𝟚
Ⅳ ⅷ ½ ²³ ㊗ ㎏ ﬁ ﬃ ﬆ ǆ Ǆ
""".splitlines()

EMOJI = """\
😀
😃👍🏽
👩‍👩‍👧‍👦 family
🏳️‍🌈🏴󠁧󠁢󠁷󠁬󠁳󠁿
🇫🇷🇯🇵
1️⃣2️⃣#️⃣
❤️‍🔥 love ❤
☃︎☃️
👨🏿‍🚀a🐈‍⬛b
♂♀⚧
🫠🪿
¯\\_(ツ)_/¯
( ͡° ͜ʖ ͡°)
""".splitlines()

# Each is one fact of the pipeline that a port can miss.
ODDITIES = [
    "", " ", "\n", "Hello World!", "hello!!!", "café", "cafe\u0301", "日本", "A", "É", "'", "''s", "it's", "IT'S",
    "don't we'll I'd they've I'm you're",
    "'sun 'tis 're've'll", "it\u2019s", "it\u02bcs", "'\u017f", "it'\u017fa", "\u017fun \u212a \u212b",
    "x'ſ'S'T'RE'Ve", "rock'n'roll o'clock d'être l'm 'llama",
    "2024", "3.14159", "1,000,000", "10x", "x10y", "a1b2c3", "½¾", "٠١٢", "mp3 h264 4k", "--- ... ___ ###", "!?!?!?",
    "a-b_c/d\\e", "$5.00 €7 £9 ¥1", "(a) [b] {c} <d>",
    "a.b.c.", "@user #tag", "http://example.com/a?b=c&d=e", "user@example.com", "C++ C# F#", "\"quoted\"",
    "“curly” ‘single’ „low‚ «angle»", "a…b", "a–b—c", "a\u00adb", "a\u200bb\u200cc\u200dd",
    "<|startoftext|>", "<|endoftext|>", "a<|endoftext|>b", "<|STARTOFTEXT|>", "<|EndOfText|><|endoftext|>",
    "<|startoftext|>'s1", "< |endoftext| >", "<|endoftext|", "!<|endoftext|>", "|endoftext|>",
    "<|\u017ftartoftext|>", "&lt;|endoftext|&gt;", "<|end\u00adoftext|>", "<|endo\uff46text|>", "<|endoftext|>\u0301",
    "<end_of_text> </s> [CLS]", "</w>", "a</w>b", "w</w", "Ġhello Ċ",
    "&", "&&", "a&b", "AT&T", "&amp;", "&amp;amp;", "&amp;amp;amp;", "&lt;b&gt;", "&amp;lt;b&amp;gt;", "<b>&amp;</b>",
    "<b>&amp;lt;</b>", "<i>\n&eacute;", "&eacute\n&lt", "&copy2024", "&notit;", "&notin;", "&NotAnEntity;",
    "&EACUTE; P&EACUTE;REZ", "&lt;&amp;EACUTE;",
    "&#39;", "&#x27;", "&#X27", "&#39", "&#0;", "&#13;", "&#128;", "&#150;", "&#xD800;", "&#x110000;",
    "&#99999999999;", "&#x1F600;", "&#;", "&#x;", "&#xZ;", "a&#12;b", "a&#x1c;b", "a&#160;b", "&#38;#39;",
    "&nbsp;a&nbsp;", "&ThickSpace;", "&bne;",
    "a\tb", "a\r\nb", "a\rb", "a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\xa0b", "a\u1680b", "a\u180eb", "a\u2003b",
    "a\u2028b\u2029c", "a\u202fb", "a\u205fb", "a\u3000b", "a\ufeffb", "  a   b  ", "\xa0\u3000 a \u2003",
    "\x1b[31mred\x1b[0m", "\x1b[", "a\x00b", "a\x7fb", "\x80\x9f", "a\u206ab", "\ufff9a\ufffc", "\U0001d173",
    "\U000e0041", "\ufdd0\uffff\U0010ffff", "\ue000\U000f0000", "\ud800", "a\udfffb", "\ud800\ud800", "\udc00\ud800",
    "ΑΣ", "ΑΣ Σ.", "Σ", "ΣΑΣ'Σ", "ὈΔΥΣΣΕΎΣ", "İ", "İstanbul", "I\u0307", "DŽ Dž", "ẞ ß SS", "ŉ ǰ ΐ",
    "ﬀ ﬁ ﬂ ﬃ ﬄ ﬅ ﬆ Ĳ ĳ", "ＦＵＬＬ　ｗｉｄｔｈ！", "ﾊﾝｶｸ ｶﾞ", "각 \u1100\u1161\u11a8", "\u0301", "a\u0301\u0302\u0303",
    "क्‍ष",    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!͖̬̰̙̗̿̋ͥͥ̂ͣ̐́́͜͞",
    "a" * 100, "ab" * 100, "!" * 200, "1" * 50, "é" * 70, "漢" * 60, "😀" * 40,
    "pneumonoultramicroscopicsilicovolcanoconiosis", "Donaudampfschifffahrtsgesellschaftskapitän", "x" * 33 + "'s",
    "-" * 65 + "a", "word " * 90,
]  # fmt: skip

THINGS = [
    "tabby cat", "Golden Retriever", "T-shirt", "great white shark", "Cardigan Welsh corgi", "jack-o'-lantern",
    "St. Bernard", "4x4", "CD player", "crème brûlée",
]  # fmt: skip
TEMPLATES = [
    "{}", "a photo of a {}.", "a bad photo of the {}", "itap of my {}!", "a {} in a video game, 8-bit", '"{}"', "{}s",
    "THE {}?", "1990s {} & co", "{} (isolated)",
]  # fmt: skip
ENCODINGS = ["latin-1", *(f"windows-{page}" for page in (1250, 1251, 1252, 1253, 1254, 1257)), "macroman", "cp437"]
SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2004\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


def variants(sentence: str):
    """The sentence in other cases, normal forms, escapes, and as mojibake."""
    yield from (sentence, sentence.upper(), sentence.title(), sentence.replace(" ", ""))
    yield from (unicodedata.normalize(form, sentence) for form in ("NFD", "NFKC"))
    yield html.escape(sentence).encode("ascii", "xmlcharrefreplace").decode()
    for encoding in ENCODINGS:
        garbled = sentence.encode().decode(encoding, errors="ignore")
        if not garbled.isascii() and len(garbled) < 150:
            yield garbled


def word(rng: random.Random, letters: str, longest: int) -> str:
    return "".join(rng.choices(letters, k=rng.randint(1, longest)))


def corpus(rng: random.Random) -> list[str]:
    """All texts, without repeats, in order."""
    since_3_2 = [chr(c) for c in range(0x20000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs", "Co")]
    in_blocks = ["".join(c for c in since_3_2 if ord(c) >> 7 == block) for block in range(0x20000 >> 7)]
    ascii_only = "".join(map(chr, range(128)))
    entities = sorted(html.entities.html5)
    texts = [*ODDITIES, *EMOJI, *(template.format(thing) for template, thing in product(TEMPLATES, THINGS))]
    for sentence in SENTENCES:
        texts += variants(sentence)
    texts += [form.format(chr(c)) for c in range(0x20, 0x180) for form in ("{}", "a{0}b 1{0}")]
    texts += [f"x{chr(c)}y {chr(c)}" for c in (*range(0x20), *range(0x7F, 0xA1))]
    texts += [f"a{space}{rng.choice(SPACES)}b {space}" for space in SPACES]
    for name in rng.sample(entities, 150):
        texts += [f"&{name}", f"a &amp;{name} b", f"{rng.choice(['', '<'])}x&{name.rstrip(';').upper()};y"]
    for _ in range(60):
        texts += [f"&#{rng.choice(['', 'x', 'X'])}{rng.randrange(10 ** rng.randint(1, 6))}{rng.choice(['', ';', 'a'])}"]
    for block in filter(None, in_blocks):
        if "\u3400" < block[0] < "\ud7a4" and rng.random() < 0.9:
            continue  # the big Chinese and Korean blocks: one in ten is plenty
        texts += [" ".join(word(rng, block, 7) for _ in range(3))]
    for longest, letters, count in (
        (12, ascii_only, 250),
        (12, ascii_only[0x20:0x7F], 250),
        (6, "'&<|>;#x1a sStTdDmM\u017f", 150),
        (15, "aeioutnrs", 100),
        (9, "".join(since_3_2[:0x500]), 150),
        (6, "".join(since_3_2), 200),
        (6, "Ã©â€™œÂ ±°¼½ïî¿ðŸ˜ÐÑ", 120),
        (4, "ab\u0301\u0323\u200d\ufe0f\U0001f3fd👩\ud83d\udc00 e", 60),
    ):
        texts += [" ".join(word(rng, letters, longest) for _ in range(rng.randint(1, 3))) for _ in range(count)]
    # Two surrogates that make a pair would come back from JSON as one character.
    return [text for text in dict.fromkeys(texts) if json.loads(json.dumps(text)) == text]


def lists_of_ids(rng: random.Random) -> list[list[int]]:
    """Few of these spell valid UTF-8."""
    cases = [[49406, 320, 49407], [27, 14, 86, 29]]
    for length in range(200):
        cases += [[rng.randrange(rng.choice((512, 49408))) for _ in range(length % 9)]]
    return cases


def needing_the_guess(tokenizer, encoded: list[tuple[str, list[int]]]) -> list[int]:
    """The numbers of the texts, from 0, that get other ids without ftfy's guess at mojibake."""
    with mock.patch("ftfy.fix_text", partial(ftfy.fix_text, fix_encoding=False)):
        return [i for i, (text, ids) in enumerate(encoded) if tokenizer.encode(text) != ids]


def main() -> None:
    tokenizer = clip.simple_tokenizer.SimpleTokenizer()
    rng = random.Random(0)
    packages = {name: version(name) for name in ("clip-anytorch", "ftfy", "regex")}
    encoded = [(text, tokenizer.encode(text)) for text in corpus(rng)]
    golden = {
        "made_with": list({"script": Path(__file__).name, "python": platform.python_version(), **packages}.items()),
        "encode": encoded,
        "guess": needing_the_guess(tokenizer, encoded),
        "decode": [(ids, tokenizer.decode(ids)) for ids in lists_of_ids(rng)],
    }
    blocks = [
        f'"{name}": [\n' + ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in pairs) + "\n]"
        for name, pairs in golden.items()
    ]
    Path(__file__).with_name("tokenizer.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="ascii")


if __name__ == "__main__":
    main()
