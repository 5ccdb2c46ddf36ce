// Every stage of a forward pass of the inputs in a golden file:
//
//     node run.mjs WEIGHTS.safetensors GOLDEN.safetensors OUTPUT.safetensors [--weights]
//     node run.mjs WEIGHTS.safetensors GOLDENS OUTPUTS [--weights]          all golden files of a folder
//
// From a golden it takes image.decoded (or image.pixels) and text.utf8 (or text.ids). With --weights the outputs also
// have each weight as w.NAME.

import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CLIP } from "./clip.mjs";
import { gunzip, readTensors, writeTensors } from "./safetensors.mjs";
import { makeTokenizer } from "./tokenizer.mjs";

const file = (path) => readFileSync(new URL(path, import.meta.url));
const json = (name) => JSON.parse(file(`../../tests/conformance/${name}`).toString());

function forward(model, tokenize, inputs) {
  model.stages = new Map();
  const decoded = inputs.get("image.decoded");
  let pixels = inputs.get("image.pixels");
  if (decoded) {
    const [height, width, bands] = decoded.shape;
    pixels = { shape: [1], data: model.preprocess({ width, height, bands, data: decoded.data }) };
  }
  const image = pixels && model.encodeImage(pixels.data, pixels.shape[0]);
  let ids = inputs.get("text.ids");
  if (inputs.has("text.utf8")) {
    const texts = splitTexts(inputs.get("text.utf8").data);
    ids = { shape: [texts.length, 77], data: tokenize(texts, 77, true) };
    model.stage("text.ids", ids.shape, ids.data, "I32");
  }
  const text = ids && model.encodeText(ids.data, ids.shape[0]);
  if (image && text) model.score(image, text, pixels.shape[0], ids.shape[0]);
  return model.stages;
}

/** Strings in UTF-8, each followed by the byte 255. */
function splitTexts(bytes) {
  const texts = [];
  for (let start = 0; start < bytes.length; ) {
    const end = bytes.indexOf(255, start);
    texts.push(new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(start, end)));
    start = end + 1;
  }
  return texts;
}

const [weightFile, golden, output] = process.argv.slice(2);
if (!output) throw new Error("usage: node run.mjs WEIGHTS GOLDEN OUTPUT [--weights]");
const weights = readTensors(await gunzip(readFileSync(weightFile)));
const model = new CLIP(weights);
const merges = new TextDecoder().decode(await gunzip(file("../../miniclip/bpe_simple_vocab_16e6.txt.gz")));
const { tokenize } = makeTokenizer(merges, json("html_entities.json"), json("windows_1252.json"));
const isFolder = statSync(golden).isDirectory();
const names = isFolder ? readdirSync(golden).filter((name) => name.endsWith(".safetensors")) : [""];
for (const name of names) {
  const stages = forward(model, tokenize, readTensors(readFileSync(join(golden, name))));
  if (process.argv.includes("--weights")) for (const [key, tensor] of weights) stages.set(`w.${key}`, tensor);
  writeFileSync(join(output, name), writeTensors(stages));
}
