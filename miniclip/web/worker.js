// The model, in a thread of its own. A message {id, call, input} is answered by {id, result} or {id, error}, one after
// the other; while the files arrive, {progress} is the part of their bytes that is here.

import { decode, fetched } from "./files.js";
import { gunzip, readTensors } from "./safetensors.js";
import { runSelfTest } from "./self_test.js";
import { makeTokenizer } from "./tokenizer.js";

const BATCH = 16; // texts

const runtimes = {
  plain: async (config, files) => {
    const { CLIP } = await import("./clip.js");
    return new CLIP(readTensors(files["model/weights.safetensors.gz"]), config.preprocess);
  },
  onnx: async (config, files) => (await import("./onnx.js")).openModel(config, files),
};

const known = new Map(); // text -> embedding

const calls = {
  load: ({ config }) => ({ name: config.model, scale: config.logit_scale, examples: config.examples }),

  async picture({ model }, file) {
    return (await model.encodeImage(model.preprocess(await decode(file)), 1)).slice();
  },

  async texts({ model, tokenize }, texts) {
    const fresh = [...new Set(texts)].filter((text) => !known.has(text));
    for (let start = 0; start < fresh.length; start += BATCH) {
      const batch = fresh.slice(start, start + BATCH);
      const ids = tokenize(batch, model.contextLength, true);
      const embeddings = await model.encodeText(ids, batch.length);
      const width = embeddings.length / batch.length;
      batch.forEach((text, i) => known.set(text, embeddings.slice(i * width, (i + 1) * width)));
    }
    return texts.map((text) => known.get(text));
  },

  test: ({ config, model, tokenize }) => runSelfTest(config.self_test, model, tokenize),
};

async function load() {
  const config = JSON.parse(new TextDecoder().decode(await fetched("model.json")));
  const total = Object.values(config.files).reduce((sum, size) => sum + size, 0);
  let loaded = 0;
  const tell = (bytes) => postMessage({ progress: Math.min((loaded += bytes) / total, 1) });
  const paths = Object.keys(config.files);
  const contents = await Promise.all(paths.map(async (path) => gunzip(await fetched(path, tell))));
  const files = Object.fromEntries(paths.map((path, i) => [path, contents[i]]));
  const text = (path) => new TextDecoder().decode(files[path]);
  const [entities, windows1252] = ["html_entities", "windows_1252"].map((name) => text(`vocabulary/${name}.json`));
  const merges = text("vocabulary/bpe_simple_vocab_16e6.txt.gz");
  const { tokenize } = makeTokenizer(merges, JSON.parse(entities), JSON.parse(windows1252));
  return { config, tokenize, model: await runtimes[config.runtime](config, files) };
}

const loading = load();
let last = Promise.resolve();

onmessage = ({ data: { id, call, input } }) => {
  last = last.then(async () => {
    try {
      postMessage({ id, result: await calls[call](await loading, input) });
    } catch (error) {
      postMessage({ id, error: error.message });
    }
  });
};
