// The self-test: each stage of a forward pass in this browser, compared with the Python library's.

import { decode, fetched } from "./files.js";
import { gunzip, readTensors } from "./safetensors.js";

/** goldens: [{golden, picture, stages: [[name, largest, relative], ...]}, ...] -> a result for each stage, in order */
export async function runSelfTest(goldens, model, tokenize) {
  const results = [];
  for (const { golden, picture, stages } of goldens) {
    const expected = readTensors(await gunzip(await fetched(golden)));
    const inputs = new Map(expected);
    if (picture) {
      const { width, height, bands, data } = await decode(new Blob([await fetched(picture)]));
      inputs.set("image.decoded", { shape: [height, width, bands], data });
    }
    const mine = await model.forward(inputs, tokenize);
    if (picture) mine.set("image.decoded", inputs.get("image.decoded"));
    for (const [name, ...limits] of stages) results.push(compare(name, expected.get(name), mine.get(name), ...limits));
  }
  return results;
}

/**
 * As `miniclip compare`: the largest difference is divided by the golden's largest element, the difference's Euclidean
 * norm by the golden's. NaN is never within a limit.
 */
function compare(name, golden, mine, largestLimit, relativeLimit) {
  const result = { name, shape: golden.shape, relative: Infinity, relativeLimit, passed: false };
  if (!mine || String(mine.shape) !== String(golden.shape)) return result;
  let [largest, size, difference, norm] = [0, 0, 0, 0];
  golden.data.forEach((value, i) => {
    const error = Math.abs(mine.data[i] - value);
    largest = Math.max(largest, error);
    size = Math.max(size, Math.abs(value));
    difference += error * error;
    norm += value * value;
  });
  result.relative = difference === 0 ? 0 : Math.sqrt(difference / norm);
  result.passed = largest <= largestLimit * size && result.relative <= relativeLimit;
  return result;
}
