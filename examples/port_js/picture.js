// From a decoded picture to pixels, section 5 of the specification, equal in every bit.

const WEIGHT_BITS = 22; // of the filter's fixed-point weights
const KERNELS = { bicubic: [bicubic, 2], bilinear: [bilinear, 1] }; // and how far each reaches

/** How OpenAI's models take pictures; the names are those of models.json. */
export const OPENAI = {
  mean: [0.48145466, 0.4578275, 0.40821073],
  std: [0.26862954, 0.26130258, 0.27577711],
  interpolation: "bicubic",
  resize_mode: "shortest",
};

/** {width, height, bands, data}, uint8 with 1 to 4 bands -> the same with the shorter side, or both, of this size. */
export function resize(picture, size, { interpolation, resize_mode } = OPENAI) {
  const { width, height, bands } = picture;
  const shorter = Math.min(width, height);
  const sizeOf = (side) => (resize_mode === "squash" ? size : Math.floor((size * side) / shorter));
  const [newWidth, newHeight] = [sizeOf(width), sizeOf(height)];
  if (newWidth === width && newHeight === height) return picture;
  const hasAlpha = bands === 2 || bands === 4;
  let x = hasAlpha ? mapColours(picture, multiply) : picture;
  const passes = [
    (x) => ({ ...x, width: newWidth, data: filter(x.data, x.height, x.width, bands, newWidth, interpolation) }),
    (x) => ({ ...x, height: newHeight, data: filter(x.data, 1, x.height, x.width * bands, newHeight, interpolation) }),
  ];
  if (height - newHeight > Math.max(2 * (width - newWidth), 0)) passes.reverse(); // Pillow 13 and later
  for (const pass of passes) x = pass(x);
  return hasAlpha ? mapColours(x, divide) : x;
}

function multiply(colour, alpha) {
  const t = colour * alpha + 128;
  return (t + (t >> 8)) >> 8;
}

const divide = (colour, alpha) => (alpha ? Math.min(255, Math.floor((255 * colour) / alpha)) : colour);

function mapColours(picture, change) {
  const { bands } = picture;
  const data = picture.data.map((byte, i, all) => {
    const band = i % bands;
    return band === bands - 1 ? byte : change(byte, all[i - band + bands - 1]);
  });
  return { ...picture, data };
}

/** One pass: bytes [outer, n, inner] -> [outer, newN, inner]. */
function filter(data, outer, n, inner, newN, kind) {
  if (n === newN) return data;
  const out = new Uint8Array(outer * newN * inner);
  for (let i = 0; i < newN; i++) {
    const { first, weights } = filterWeights(i, n, newN, kind);
    for (let o = 0; o < outer; o++)
      for (let b = 0; b < inner; b++) {
        let sum = 2 ** (WEIGHT_BITS - 1);
        for (let j = 0; j < weights.length; j++) sum += weights[j] * data[(o * n + first + j) * inner + b];
        out[(o * newN + i) * inner + b] = Math.min(Math.max(sum >> WEIGHT_BITS, 0), 255);
      }
  }
  return out;
}

/** The samples that output i is a weighted sum of, from `first` on, and their integer weights. */
function filterWeights(i, n, newN, kind) {
  const [kernel, reach] = KERNELS[kind];
  const scale = n / newN;
  const stretch = Math.max(scale, 1);
  const center = (i + 0.5) * scale;
  const first = Math.max(Math.trunc(center - reach * stretch + 0.5), 0);
  const last = Math.min(Math.trunc(center + reach * stretch + 0.5), n);
  const f = [];
  for (let j = first; j < last; j++) f.push(kernel((j - center + 0.5) * (1 / stretch)));
  const sum = f.reduce((total, x) => total + x, 0);
  const weights = f.map((x) => {
    const weight = (x / sum) * 2 ** WEIGHT_BITS;
    return Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5);
  });
  return { first, weights };
}

function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

function bilinear(x) {
  return Math.max(1 - Math.abs(x), 0);
}

/** The middle of a picture as RGB, uint8 [size, size, 3]. */
export function crop({ width, height, bands, data }, size) {
  const left = halfToEven(width - size);
  const top = halfToEven(height - size);
  const rgb = new Uint8Array(size * size * 3);
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++)
      for (let c = 0; c < 3; c++)
        rgb[(y * size + x) * 3 + c] = data[((top + y) * width + left + x) * bands + (bands > 2 ? c : 0)];
  return rgb;
}

const halfToEven = (excess) => (excess + (excess % 4 === 3 ? 1 : 0)) >> 1;

/** uint8 [size, size, 3] -> float32 [3, size, size], rounded to float32 after each operation. */
export function normalize(rgb, { mean, std } = OPENAI) {
  const places = rgb.length / 3;
  const pixels = new Float32Array(rgb.length);
  const [means, stds] = [mean, std].map((values) => Float32Array.from(values));
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < places; i++)
      pixels[c * places + i] = Math.fround(Math.fround(rgb[3 * i + c] / 255) - means[c]) / stds[c];
  return pixels;
}
