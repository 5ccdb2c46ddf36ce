// Every stage of a forward pass of the inputs in a golden file:
//
//     node run.mjs WEIGHTS.safetensors GOLDEN.safetensors OUTPUT.safetensors [--weights]
//     node run.mjs WEIGHTS.safetensors GOLDENS OUTPUTS [--weights]          all golden files of a folder
//
// From a golden it takes image.decoded (or image.pixels) and text.utf8 (or text.ids). With --weights the outputs also
// have each weight as w.NAME.

import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CLIP } from "./clip.js";
import { gunzip, readTensors, writeTensors } from "./safetensors.js";
import { makeTokenizer } from "./tokenizer.js";

const file = (path) => readFileSync(new URL(path, import.meta.url));
const json = (name) => JSON.parse(file(`../../tests/conformance/${name}`).toString());

const [weightFile, golden, output] = process.argv.slice(2);
if (!output) throw new Error("usage: node run.mjs WEIGHTS GOLDEN OUTPUT [--weights]");
const weights = readTensors(await gunzip(readFileSync(weightFile)));
const model = new CLIP(weights);
const merges = new TextDecoder().decode(await gunzip(file("../../miniclip/bpe_simple_vocab_16e6.txt.gz")));
const { tokenize } = makeTokenizer(merges, json("html_entities.json"), json("windows_1252.json"));
const isFolder = statSync(golden).isDirectory();
const names = isFolder ? readdirSync(golden).filter((name) => name.endsWith(".safetensors")) : [""];
for (const name of names) {
  const stages = await model.forward(readTensors(readFileSync(join(golden, name))), tokenize);
  if (process.argv.includes("--weights")) for (const [key, tensor] of weights) stages.set(`w.${key}`, tensor);
  writeFileSync(join(output, name), writeTensors(stages));
}
