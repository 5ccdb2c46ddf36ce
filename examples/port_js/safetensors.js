// safetensors files, section 3.1 of the specification. A tensor is {dtype, shape, data}, its data a typed array.

const ARRAYS = { F32: Float32Array, F64: Float64Array, I32: Int32Array, U8: Uint8Array };
const SIZES = { F64: 8, I64: 8, F32: 4, I32: 4, F16: 2, BF16: 2, U8: 1 };

export const count = (shape) => shape.reduce((product, side) => product * side, 1);

/** All tensors of a file, as a Map by name. F16 and BF16 are widened to F32, I64 becomes F64. */
export function readTensors(bytes) {
  if (bytes.length < 8) throw new Error("not a safetensors file: it has less than 8 bytes");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const start = 8 + Number(view.getBigUint64(0, true));
  if (start > bytes.length) throw new Error("not a safetensors file: its header is longer than the file");
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  delete header.__metadata__;
  const tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (!(dtype in SIZES)) throw new Error(`${name} is ${dtype}; expected one of ${Object.keys(SIZES)}`);
    if (end - begin !== count(shape) * SIZES[dtype] || begin < 0 || start + end > bytes.length)
      throw new Error(`${name} does not fit its place in the file`);
    const at = bytes.byteOffset + start;
    tensors.set(name, widen(dtype, shape, bytes.buffer.slice(at + begin, at + end)));
  }
  return tensors;
}

function widen(dtype, shape, buffer) {
  if (dtype === "F16") return { dtype: "F32", shape, data: widened(new Uint16Array(buffer)) };
  if (dtype === "I64") return { dtype: "F64", shape, data: Float64Array.from(new BigInt64Array(buffer), Number) };
  if (dtype === "BF16") {
    const bits = Uint32Array.from(new Uint16Array(buffer), (half) => half * 0x10000);
    return { dtype: "F32", shape, data: new Float32Array(bits.buffer) };
  }
  return { dtype, shape, data: new ARRAYS[dtype](buffer) };
}

function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24; // zero and subnormal numbers
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => halfToFloat(bits)); // all that there are
const widened = (halves) => new Float32Array(halves.length).map((_, i) => HALVES[halves[i]]);

/** The bytes of a file with these tensors. */
export function writeTensors(tensors) {
  const header = {};
  let end = 0;
  for (const [name, { dtype, shape, data }] of tensors)
    header[name] = { dtype, shape, data_offsets: [end, (end += data.byteLength)] };
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (new TextEncoder().encode(text).length % 8)) % 8);
  const head = new TextEncoder().encode(text);
  const bytes = new Uint8Array(8 + head.length + end);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(head.length), true);
  bytes.set(head, 8);
  for (const [name, { data }] of tensors) {
    const at = 8 + head.length + header[name].data_offsets[0];
    bytes.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), at);
  }
  return bytes;
}

/** The contents of a gzip file; other bytes are returned as they are. */
export async function gunzip(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
