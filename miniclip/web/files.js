// Files of this folder, and pictures of the user.

/** The bytes of a file beside the page; `tell` gets the count of each part that arrives. */
export async function fetched(path, tell = () => {}) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server answers ${response.status}; is the folder complete?`);
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    tell(value.length);
  }
}

/** A picture as it is stored: not turned, colours neither converted nor multiplied by alpha. */
export async function decode(blob) {
  const options = { premultiplyAlpha: "none", colorSpaceConversion: "none", imageOrientation: "none" };
  const bitmap = await createImageBitmap(blob, options);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const bands = data.every((byte, i) => i % 4 !== 3 || byte === 255) ? 3 : 4;
  const own = new Uint8Array(width * height * bands);
  for (let i = 0; i < own.length; i++) own[i] = data[Math.floor(i / bands) * 4 + (i % bands)];
  return { width, height, bands, data: own };
}
