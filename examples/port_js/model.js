// What does not depend on how the towers are computed: the picture, the score, and the stages of a forward pass.

import { count } from "./safetensors.js";
import { OPENAI, crop, normalize, resize } from "./picture.js";

/** A subclass has encodeImage(pixels, n) and encodeText(ids, n), which return embeddings of length 1 or promise them. */
export class Model {
  /** preprocess: settings that differ from OPENAI. A subclass sets also size, scale and contextLength. */
  constructor(preprocess) {
    this.preprocessing = { ...OPENAI, ...preprocess };
    this.stages = new Map();
  }

  /** Record a stage and return its numbers. */
  stage(name, shape, data, dtype = "F32") {
    if (data.length !== count(shape)) throw new Error(`${name} has ${data.length} numbers, not ${shape}`);
    this.stages.set(name, { dtype, shape, data });
    return data;
  }

  /** {width, height, bands, data} -> pixels [1, 3, size, size] */
  preprocess(picture) {
    const { size } = this;
    const resized = resize(picture, size, this.preprocessing);
    this.stage("image.resized", [resized.height, resized.width, resized.bands], resized.data, "U8");
    const cropped = this.stage("image.cropped", [size, size, 3], crop(resized, size), "U8");
    return this.stage("image.pixels", [1, 3, size, size], normalize(cropped, this.preprocessing));
  }

  /** Embeddings [n, E] of images and [m, E] of texts -> logits [n, m] */
  score(images, texts, n, m) {
    const width = images.length / n;
    const logit = (_, i) => this.scale * dot(images, Math.floor(i / m) * width, texts, (i % m) * width, width);
    return this.stage("logits_per_image", [n, m], Float32Array.from({ length: n * m }, logit));
  }

  /** All stages of a forward pass of a golden's inputs: image.decoded or image.pixels, text.utf8 or text.ids. */
  async forward(inputs, tokenize) {
    this.stages = new Map();
    const { shape: [height, width, bands] = [], data } = inputs.get("image.decoded") ?? {};
    const pixels = data ? this.preprocess({ width, height, bands, data }) : inputs.get("image.pixels")?.data;
    const images = pixels && pixels.length / (3 * this.size ** 2);
    const image = pixels && (await this.encodeImage(pixels, images));
    let { shape: [texts] = [], data: ids } = inputs.get("text.ids") ?? { shape: [] };
    if (inputs.has("text.utf8")) {
      const strings = splitTexts(inputs.get("text.utf8").data);
      texts = strings.length;
      ids = this.stage("text.ids", [texts, this.contextLength], tokenize(strings, this.contextLength, true), "I32");
    }
    const text = ids && (await this.encodeText(ids, texts));
    if (image && text) this.score(image, text, images, texts);
    return this.stages;
  }
}

/** Strings in UTF-8, each followed by the byte 255. */
function splitTexts(bytes) {
  const texts = [];
  for (let start = 0, end; start < bytes.length; start = end + 1) {
    end = bytes.indexOf(255, start);
    texts.push(new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(start, end)));
  }
  return texts;
}

/** The place of each row's end-of-text token, which has the largest id. */
export function endsOfText(ids, n) {
  const length = ids.length / n;
  return Array.from({ length: n }, (_, row) => {
    const own = ids.subarray(row * length, (row + 1) * length);
    return own.indexOf(own.reduce((a, b) => Math.max(a, b)));
  });
}

/** ids [n, length] without the columns after the last end of a text: attention is causal, so they have no influence. */
export function withoutPadding(ids, n) {
  const length = ids.length / n;
  const kept = Math.max(...endsOfText(ids, n)) + 1;
  return ids.filter((_, i) => i % length < kept);
}

/** The sum of a[i + d] * b[j + d]. Processors add several sums at a time faster than one. */
export function dot(a, i, b, j, length) {
  let even = 0;
  let odd = 0;
  for (let d = 0; d < length - 1; d += 2) {
    even += a[i + d] * b[j + d];
    odd += a[i + d + 1] * b[j + d + 1];
  }
  return length % 2 ? even + odd + a[i + length - 1] * b[j + length - 1] : even + odd;
}
