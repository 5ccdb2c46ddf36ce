// CLIP's towers and score, sections 6 to 10 of the specification: both kinds of image tower, float32, heads 64 wide.

import { Model, dot, endsOfText, withoutPadding } from "./model.js";

const HEAD_WIDTH = 64;
const EPS = 1e-5;

/** A model from its weights, a Map as readTensors returns it. Every stage that it computes goes to `stages`, a Map. */
export class CLIP extends Model {
  constructor(weights, preprocess = {}) {
    super(preprocess);
    this.weights = weights;
    const isViT = weights.has("visual.proj");
    const [positions] = this.shape(isViT ? "visual.positional_embedding" : "visual.attnpool.positional_embedding");
    this.size = (isViT ? this.shape("visual.conv1.weight")[3] : 32) * Math.round(Math.sqrt(positions - 1));
    this.tower = isViT ? this.vit : this.resnet;
    this.scale = Math.exp(this.weight("logit_scale")[0]);
    this.contextLength = this.shape("positional_embedding")[0];
  }

  tensor(name) {
    const tensor = this.weights.get(name);
    if (!tensor) throw new Error(`the weights have no tensor ${name}`);
    return tensor;
  }

  weight = (name) => this.tensor(name).data;
  shape = (name) => this.tensor(name).shape;

  /** pixels [n, 3, size, size] -> embeddings [n, E] of length 1 */
  encodeImage(pixels, n) {
    const embedding = this.tower(pixels, n);
    return this.stage("image_embedding", [n, embedding.length / n], unit(embedding, n));
  }

  /** ids, an Int32Array [n, length] -> embeddings [n, E] of length 1 */
  encodeText(ids, n) {
    ids = withoutPadding(ids, n);
    const length = ids.length / n;
    const [, width] = this.shape("token_embedding.weight");
    const table = this.weight("token_embedding.weight");
    const embedded = takeRows(table, width, ids);
    this.stage("token_embedding", [n, length, width], embedded);
    const positions = this.weight("positional_embedding");
    let x = fill(embedded.length, (i) => embedded[i] + positions[i % (length * width)]);
    x = this.transformer(this.stage("text.embedded", [n, length, width], x), n, length, width, "transformer", true);
    x = this.layerNorm(x, [n, length, width], "ln_final");
    const ends = endsOfText(ids, n).map((end, row) => row * length + end);
    const pooled = this.stage("text.pooled", [n, width], takeRows(x, width, ends));
    const projected = this.project(pooled, n, "text_projection");
    return this.stage("text_embedding", [n, projected.length / n], unit(projected, n));
  }

  // The Vision Transformer

  vit(pixels, n) {
    const [width, , , patch] = this.shape("visual.conv1.weight");
    const patches = this.conv({ n, channels: 3, side: this.size, data: pixels }, "visual.conv1", patch, 0);
    const token = this.weight("visual.class_embedding");
    let x = this.embedded(patches, (_, channel) => token[channel], "visual");
    const length = x.length / (n * width);
    x = this.layerNorm(x, [n, length, width], "visual.ln_pre");
    x = this.transformer(x, n, length, width, "visual.transformer", false);
    const pooled = takeRows(x, width, range(n).map((image) => image * length));
    x = this.layerNorm(this.stage("visual.pooled", [n, width], pooled), [n, width], "visual.ln_post");
    return this.project(x, n, "visual.proj");
  }

  /** A map as tokens plus positions, [n, 1 + places, channels]; first(image, channel) is that of token 0. */
  embedded({ n, channels, side, data }, first, scope) {
    const [places, length] = [side * side, 1 + side * side];
    const positions = this.weight(`${scope}.positional_embedding`);
    const x = fill(n * length * channels, (i) => {
      const [row, channel] = [Math.floor(i / channels), i % channels];
      const [image, token] = [Math.floor(row / length), row % length];
      const value = token ? data[(image * channels + channel) * places + token - 1] : first(image, channel);
      return value + positions[token * channels + channel];
    });
    return this.stage(`${scope}.embedded`, [n, length, channels], x);
  }

  /** The blocks of either tower: x [n, length, width] -> the same. */
  transformer(x, n, length, width, name, causal) {
    const sides = [n, length, width];
    for (let layer = 0; this.weights.has(`${name}.resblocks.${layer}.ln_1.weight`); layer++) {
      const block = `${name}.resblocks.${layer}`;
      let norm = this.layerNorm(x, sides, `${block}.ln_1`);
      const [weight, bias] = ["weight", "bias"].map((kind) => this.weight(`${block}.attn.in_proj_${kind}`));
      const packed = linear(norm, width, weight, bias);
      const part = (i) => takeRows(packed, width, range(n * length).map((row) => 3 * row + i));
      const context = this.attention([0, 1, 2].map(part), n, width, `${block}.attn`, causal);
      this.stage(`${block}.attn.context`, sides, context);
      const attended = this.linear(context, sides, `${block}.attn.out_proj`);
      const residual = this.stage(`${block}.residual`, sides, fill(x.length, (i) => x[i] + attended[i]));
      norm = this.layerNorm(residual, sides, `${block}.ln_2`);
      const hidden = this.linear(norm, sides, `${block}.mlp.c_fc`);
      const wide = [n, length, hidden.length / (n * length)];
      const active = this.stage(`${block}.mlp.activation`, wide, hidden.map((h) => h / (1 + Math.exp(-1.702 * h))));
      const out = this.linear(active, wide, `${block}.mlp.c_proj`);
      x = this.stage(block, sides, fill(x.length, (i) => residual[i] + out[i]));
    }
    return x;
  }

  /** q [n, Lq, width], k and v [n, L, width] -> [n, Lq, width] */
  attention([q, k, v], n, width, name, causal) {
    const heads = width / HEAD_WIDTH;
    const [queries, keys] = [q, k].map((x) => x.length / (n * width));
    for (const [letter, x, length] of [["q", q, queries], ["k", k, keys], ["v", v, keys]])
      this.stage(`${name}.${letter}`, [n, heads, length, HEAD_WIDTH], splitHeads(x, n, length, heads));
    const probabilities = new Float32Array(n * heads * queries * keys);
    const context = new Float32Array(n * queries * width);
    for (let i = 0; i < n; i++)
      for (let h = 0; h < heads; h++)
        for (let t = 0; t < queries; t++) {
          const to = ((i * queries + t) * heads + h) * HEAD_WIDTH;
          const from = (s) => ((i * keys + s) * heads + h) * HEAD_WIDTH;
          const seen = causal ? t + 1 : keys;
          const scores = fill(seen, (s) => dot(q, to, k, from(s), HEAD_WIDTH) / Math.sqrt(HEAD_WIDTH));
          softmax(scores).forEach((p, s) => {
            probabilities[((i * heads + h) * queries + t) * keys + s] = p;
            for (let d = 0; d < HEAD_WIDTH; d++) context[to + d] += p * v[from(s) + d];
          });
        }
    this.stage(`${name}.probabilities`, [n, heads, queries, keys], probabilities);
    return context;
  }

  // The ModifiedResNet. A map is {n, channels, side, data}.

  resnet(pixels, n) {
    let x = { n, channels: 3, side: this.size, data: pixels };
    for (const number of [1, 2, 3]) x = this.convolved(x, "visual", number, number === 1 ? 2 : 1, 1);
    x = this.averaged(x, 2, "visual.avgpool");
    for (const layer of [1, 2, 3, 4])
      for (let i = 0; this.weights.has(`visual.layer${layer}.${i}.conv1.weight`); i++)
        x = this.bottleneck(x, `visual.layer${layer}.${i}`, layer > 1 && i === 0 ? 2 : 1);
    return this.attentionPool(x);
  }

  bottleneck(input, block, stride) {
    let shortcut = input;
    if (this.weights.has(`${block}.downsample.0.weight`)) {
      if (stride > 1) shortcut = this.averaged(shortcut, stride, `${block}.downsample.-1`);
      shortcut = this.batchNorm(this.conv(shortcut, `${block}.downsample.0`, 1, 0), `${block}.downsample.1`);
    }
    let x = this.convolved(this.convolved(input, block, 1, 1, 0), block, 2, 1, 1);
    if (stride > 1) x = this.averaged(x, stride, `${block}.avgpool`);
    x = this.batchNorm(this.conv(x, `${block}.conv3`, 1, 0), `${block}.bn3`);
    return this.map(block, x, fill(x.data.length, (i) => Math.max(x.data[i] + shortcut.data[i], 0)));
  }

  /** Convolution, norm and ReLU. */
  convolved(x, scope, number, stride, padding) {
    x = this.batchNorm(this.conv(x, `${scope}.conv${number}`, stride, padding), `${scope}.bn${number}`);
    return this.map(`${scope}.relu${number}`, x, x.data.map((value) => Math.max(value, 0)));
  }

  attentionPool(map) {
    const { n, channels, side } = map;
    const name = "visual.attnpool";
    const places = side * side;
    const mean = (image, channel) => {
      const start = (image * channels + channel) * places;
      return sum(map.data.subarray(start, start + places)) / places;
    };
    const embedded = this.embedded(map, mean, name);
    const first = takeRows(embedded, channels, range(n).map((image) => image * (1 + places)));
    const project = (x, letter) => linear(x, channels, ...this.weightAndBias(`${name}.${letter}_proj`));
    const qkv = [project(first, "q"), project(embedded, "k"), project(embedded, "v")];
    const context = this.stage(`${name}.context`, [n, channels], this.attention(qkv, n, channels, name, false));
    return this.linear(context, [n, channels], `${name}.c_proj`);
  }

  map(name, { n, channels, side }, data) {
    return { n, channels, side, data: this.stage(name, [n, channels, side, side], data) };
  }

  conv({ n, channels, side, data }, name, stride, padding) {
    const kernel = this.weight(`${name}.weight`);
    const [outputs, , k] = this.shape(`${name}.weight`);
    const newSide = Math.floor((side + 2 * padding - k) / stride) + 1;
    const [area, places] = [channels * k * k, newSide * newSide];
    const out = new Float32Array(n * outputs * places);
    const patch = new Float32Array(area);
    const inside = (at) => at >= 0 && at < side;
    for (let at = 0; at < n * places; at++) {
      const [i, place] = [Math.floor(at / places), at % places];
      const [top, left] = [Math.floor(place / newSide), place % newSide].map((p) => p * stride - padding);
      for (let j = 0; j < area; j++) {
        const [c, y, x] = [Math.floor(j / (k * k)), top + (Math.floor(j / k) % k), left + (j % k)];
        patch[j] = inside(y) && inside(x) ? data[((i * channels + c) * side + y) * side + x] : 0;
      }
      for (let o = 0; o < outputs; o++) out[(i * outputs + o) * places + place] = dot(kernel, o * area, patch, 0, area);
    }
    return this.map(name, { n, channels: outputs, side: newSide }, out);
  }

  batchNorm(x, name) {
    const kinds = ["weight", "bias", "running_mean", "running_var"];
    const [weight, bias, mean, variance] = kinds.map((kind) => this.weight(`${name}.${kind}`));
    const places = x.side * x.side;
    const normed = x.data.map((value, i) => {
      const c = Math.floor(i / places) % x.channels;
      return ((value - mean[c]) / Math.sqrt(variance[c] + EPS)) * weight[c] + bias[c];
    });
    return this.map(name, x, normed);
  }

  averaged({ n, channels, side, data }, s, name) {
    const half = side / s;
    const mean = fill(n * channels * half * half, (i) => {
      const row = Math.floor(i / half); // of all maps, one below the other
      const corner = row * s * side + (i % half) * s;
      let total = 0;
      for (let y = 0; y < s; y++) for (let x = 0; x < s; x++) total += data[corner + y * side + x];
      return total / (s * s);
    });
    return this.map(name, { n, channels, side: half }, mean);
  }

  weightAndBias = (name) => [this.weight(`${name}.weight`), this.weight(`${name}.bias`)];

  /** x of this shape through the linear layer of this name, recorded under it */
  linear(x, shape, name) {
    const [weight, bias] = this.weightAndBias(name);
    return this.stage(name, [...shape.slice(0, -1), bias.length], linear(x, shape.at(-1), weight, bias));
  }

  /** x [n, D] @ the weight [D, E], recorded under the weight's name */
  project(x, n, name) {
    const [inputs, outputs] = this.shape(name);
    const w = this.weight(name);
    const transposed = fill(inputs * outputs, (i) => w[(i % inputs) * outputs + Math.floor(i / inputs)]);
    return this.stage(name, [n, outputs], linear(x, inputs, transposed, new Float32Array(outputs)));
  }

  layerNorm(x, shape, name) {
    const [weight, bias] = this.weightAndBias(name);
    const width = shape.at(-1);
    const out = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += width) {
      const row = x.subarray(start, start + width);
      const mean = sum(row) / width;
      const variance = row.reduce((total, value) => total + (value - mean) ** 2, 0) / width;
      row.forEach((value, d) => (out[start + d] = ((value - mean) / Math.sqrt(variance + EPS)) * weight[d] + bias[d]));
    }
    return this.stage(name, shape, out);
  }
}

function fill(length, value) {
  const out = new Float32Array(length);
  for (let i = 0; i < length; i++) out[i] = value(i);
  return out;
}

const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);
const range = (length) => [...Array(length).keys()];

/** Row rows[0] of x, which has this width, then row rows[1], ... */
function takeRows(x, width, rows) {
  const out = new Float32Array(rows.length * width);
  rows.forEach((row, i) => out.set(x.subarray(row * width, (row + 1) * width), i * width));
  return out;
}

/** x [rows, inputs] @ weight [outputs, inputs]^T + bias [outputs] */
function linear(x, inputs, weight, bias) {
  const outputs = bias.length;
  const out = new Float32Array((x.length / inputs) * outputs);
  for (let i = 0; i < out.length; i++) {
    const o = i % outputs;
    out[i] = dot(x, ((i - o) / outputs) * inputs, weight, o * inputs, inputs) + bias[o];
  }
  return out;
}

function softmax(scores) {
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const total = sum(powers);
  return powers.map((power) => power / total);
}

/** Each of n rows divided by its Euclidean length. */
function unit(x, n) {
  const width = x.length / n;
  const lengths = range(n).map((row) => Math.sqrt(dot(x, row * width, x, row * width, width)));
  return x.map((value, i) => value / lengths[Math.floor(i / width)]);
}

/** [n, length, heads * HEAD_WIDTH] -> [n, heads, length, HEAD_WIDTH] */
function splitHeads(x, n, length, heads) {
  const rows = range(n * heads * length).map((i) => {
    const image = Math.floor(i / (length * heads));
    return (image * length + (i % length)) * heads + (Math.floor(i / length) % heads);
  });
  return takeRows(x, HEAD_WIDTH, rows);
}
