// A model as two ONNX files, computed by onnxruntime-web in WebAssembly.

import { InferenceSession, Tensor, env } from "./onnxruntime-web/ort.wasm.bundle.min.js";
import { Model, withoutPadding } from "./model.js";

class OnnxModel extends Model {
  constructor(config, image, text) {
    super(config.preprocess);
    this.size = config.preprocess.image_size;
    this.scale = config.logit_scale;
    this.contextLength = config.context_length;
    this.sessions = { image, text };
  }

  encodeImage(pixels, n) {
    return this.run("image", new Tensor("float32", pixels, [n, 3, this.size, this.size]), n);
  }

  encodeText(ids, n) {
    const takesAnyLength = typeof this.sessions.text.inputMetadata[0].shape[1] === "string";
    if (takesAnyLength) ids = withoutPadding(ids, n);
    return this.run("text", new Tensor("int32", ids, [n, ids.length / n]), n);
  }

  async run(tower, input, n) {
    const session = this.sessions[tower];
    const outputs = await session.run({ [session.inputNames[0]]: input });
    const { data } = outputs[session.outputNames[0]];
    return this.stage(`${tower}_embedding`, [n, data.length / n], data);
  }
}

export async function openModel(config, files) {
  env.wasm.numThreads = 1; // more need headers that a plain file server does not send
  env.wasm.wasmBinary = files["onnxruntime-web/ort-wasm-simd-threaded.wasm"].buffer;
  const [image, text] = [await session(files["model/image.onnx"]), await session(files["model/text.onnx"])];
  return new OnnxModel(config, image, text);
}

const session = (bytes) => InferenceSession.create(bytes, { executionProviders: ["wasm"] });
