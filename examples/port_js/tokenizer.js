// From strings to ids, section 4 of the specification. Only the guess at mojibake is left out.

const START = 49406;
const END = 49407;
const END_OF_WORD = 256;
const MERGES = 48894;
const SPECIAL = { "<|startoftext|>": START, "<|endoftext|>": END };

const SPACE = /[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;
const WORD = /<\|[sſ]tartoftext\|>|<\|endoftext\|>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^ \p{L}\p{N}\u0345]+/gu;
const REFERENCE = /&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/gu;
const LIGATURES = {
  Ĳ: "IJ", ĳ: "ij", ŉ: "ʼn", Ǳ: "DZ", ǲ: "Dz", ǳ: "dz", Ǆ: "DŽ", ǅ: "Dž", ǆ: "dž", Ǉ: "LJ", ǈ: "Lj",
  ǉ: "lj", Ǌ: "NJ", ǋ: "Nj", ǌ: "nj", ﬀ: "ff", ﬁ: "fi", ﬂ: "fl", ﬃ: "ffi", ﬄ: "ffl", ﬅ: "ſt", ﬆ: "st",
};

/** merges: the text of bpe_simple_vocab_16e6.txt; entities, windows1252: the JSON tables of those names. */
export function makeTokenizer(merges, entities, windows1252) {
  const { html5, capitals } = entities;
  const character = (code) => windows1252.windows_1252[code] ?? String.fromCodePoint(code);
  const { byteIds, pairs } = readMerges(merges);

  function unescape(text) {
    return text.replace(REFERENCE, (whole, reference) => {
      if (reference[0] === "#") return number(reference.slice(1).replace(";", ""));
      if (Object.hasOwn(html5, reference)) return html5[reference];
      const letters = Array.from(reference);
      for (let length = letters.length - 1; length > 1; length--) {
        const name = letters.slice(0, length).join("");
        if (Object.hasOwn(html5, name)) return html5[name] + letters.slice(length).join("");
      }
      return whole;
    });
  }

  function number(digits) {
    const code = /^[xX]/.test(digits) ? parseInt(digits.slice(1), 16) : parseInt(digits, 10);
    if (code === 0 || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return "\ufffd";
    const noncharacter = (code >= 0xfdd0 && code < 0xfdf0) || (code & 0xfffe) === 0xfffe;
    const control = code < 9 || code === 0xb || (code > 0xd && code < 0x20) || code === 0x7f;
    return noncharacter || control ? "" : character(code);
  }

  function unescapeStrictly(line) {
    return line.replace(/&#?[0-9A-Za-z]{1,24};/g, (whole) => {
      const name = whole.slice(1);
      if (name[0] !== "#") return Object.hasOwn(html5, name) ? html5[name] : (capitals[name] ?? whole);
      const found = unescape(whole);
      return found.includes(";") ? whole : found;
    });
  }

  function repairLine(line, escaped) {
    for (let before; before !== line; ) {
      before = line;
      if (escaped) line = unescapeStrictly(line);
      line = line
        .replace(/[\x80-\x9f]/g, (c) => character(c.charCodeAt(0)))
        .replace(/[Ĳĳŉ\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06]/g, (c) => LIGATURES[c])
        .replace(/[\u3000\uff01-\uffef]/g, (c) => c.normalize("NFKC"))
        .replace(/[\u02bc\u2018-\u201b]/g, "'")
        .replace(/[\u201c-\u201f]/g, '"')
        .replace(/\r\n|[\r\u2028\u2029\x85]/g, "\n")
        .replace(/[\ud800-\udfff]/gu, "\ufffd")
        .replace(/\x1b\[[\p{Nd};]*[a-zA-Z]/gu, "")
        .replace(/[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, "")
        .normalize("NFC");
    }
    return line;
  }

  function clean(text) {
    let escaped = true;
    const lines = text.match(/[^\n]*\n|[^\n]+$/g) ?? [];
    const repaired = lines.map((line) => repairLine(line, (escaped &&= !line.includes("<"))));
    const unescaped = unescape(unescape(repaired.join("")));
    return unescaped.replace(SPACE, " ").replace(/^ | $/g, "").toLowerCase();
  }

  function merge(word) {
    const symbols = Array.from(new TextEncoder().encode(word), (byte) => byteIds[byte]);
    symbols[symbols.length - 1] += END_OF_WORD;
    for (;;) {
      let best = Infinity;
      let place = -1;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const merged = pairs.get(symbols[i] * 65536 + symbols[i + 1]) ?? Infinity;
        if (merged < best) [best, place] = [merged, i];
      }
      if (place < 0) return symbols;
      symbols.splice(place, 2, best);
    }
  }

  /** Ids without start and end. */
  const encode = (text) => (clean(text).match(WORD) ?? []).flatMap((word) => SPECIAL[word] ?? merge(word));

  /** Ids of each text in a row of this length. */
  function tokenize(texts, length = 77, truncate = false) {
    const ids = new Int32Array(texts.length * length);
    texts.forEach((text, row) => {
      const found = [START, ...encode(text), END];
      if (found.length > length && !truncate) throw new Error(`${found.length} ids do not fit into ${length}: ${text}`);
      ids.set(found.slice(0, length), row * length);
      if (found.length > length) ids[(row + 1) * length - 1] = END;
    });
    return ids;
  }

  return { encode, tokenize };
}

function readMerges(text) {
  const isPrinted = (byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  const bytes = [...Array(256).keys()];
  const ordered = [...bytes.filter(isPrinted), ...bytes.filter((byte) => !isPrinted(byte))];
  const byteIds = [];
  const ids = new Map(); // of each symbol by its spelling
  let others = 0x100;
  ordered.forEach((byte, id) => {
    const letter = String.fromCharCode(isPrinted(byte) ? byte : others++);
    byteIds[byte] = id;
    ids.set(letter, id).set(letter + "</w>", id + END_OF_WORD);
  });
  const pairs = new Map(); // left * 65536 + right -> what they merge into
  text.split("\n").slice(1, 1 + MERGES).forEach((line, rank) => {
    const [left, right] = line.split(" ");
    const id = 2 * END_OF_WORD + rank;
    pairs.set(ids.get(left) * 65536 + ids.get(right), id);
    ids.set(left + right, id);
  });
  return { byteIds, pairs };
}
