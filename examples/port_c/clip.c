/* CLIP with a Vision Transformer, written from tests/conformance/README.md: every stage of both towers, in plain C.

       make && ./clip WEIGHTS.safetensors GOLDEN.safetensors OUTPUT.safetensors

   From the golden file it takes image.decoded (or image.pixels) and text.ids; it writes all stages that follow. float32,
   QuickGELU, heads 64 wide. Memory is not freed: the program ends when it has written. */

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "picture.h"
#include "safetensors.h"

enum { HEAD_WIDTH = 64 };

static TensorList weights, inputs, stages, unrecorded;

/* The two names as one. */
static const char *at(const char *prefix, const char *suffix) {
    char *name = allocate(strlen(prefix) + strlen(suffix) + 1);
    return strcat(strcpy(name, prefix), suffix);
}

static const Tensor *weight_tensor(const char *name) {
    const Tensor *tensor = find(&weights, name);
    if (!tensor) fail("the weights have no tensor %s", name);
    return tensor;
}

/* The numbers of a weight, which must have this many. */
static float *weight(const char *name, size_t count) {
    const Tensor *tensor = weight_tensor(name);
    if (elements(tensor) != count) fail("%s has %zu numbers; expected %zu", name, elements(tensor), count);
    return to_floats(tensor);
}

/* Side i of a tensor that must have this many dimensions. */
static int side(const Tensor *tensor, int dimensions, int i) {
    if (tensor->dimensions != dimensions) fail("%s does not have %d dimensions", tensor->name, dimensions);
    return (int)tensor->shape[i];
}

/* A new stage of this shape, to be filled. */
static float *stage(const char *name, int dimensions, ...) {
    size_t shape[MAX_DIMENSIONS];
    va_list sizes;
    va_start(sizes, dimensions);
    for (int i = 0; i < dimensions; i++) shape[i] = va_arg(sizes, int);
    va_end(sizes);
    return append(&stages, name, "F32", dimensions, shape)->data;
}

/* y [rows, out] = x [rows, in] @ w [out, in]^T + b [out] */
static void linear(float *y, const float *x, int rows, int in, const float *w, const float *b, int out) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            float sum = 0;
            for (int i = 0; i < in; i++) sum += x[r * in + i] * w[(size_t)o * in + i];
            y[r * out + o] = sum + b[o];
        }
}

/* y [rows, out] = x [rows, in] @ p [in, out] */
static void project(float *y, const float *x, int rows, int in, const float *p, int out) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < out; o++) {
            float sum = 0;
            for (int i = 0; i < in; i++) sum += x[r * in + i] * p[(size_t)i * out + o];
            y[r * out + o] = sum;
        }
}

static void layer_norm(float *y, const float *x, int rows, int width, const char *name) {
    const float *w = weight(at(name, ".weight"), width), *b = weight(at(name, ".bias"), width);
    for (int r = 0; r < rows; r++, x += width, y += width) {
        float mean = 0, variance = 0;
        for (int i = 0; i < width; i++) mean += x[i] / width;
        for (int i = 0; i < width; i++) variance += (x[i] - mean) * (x[i] - mean) / width;
        for (int i = 0; i < width; i++) y[i] = (x[i] - mean) / sqrtf(variance + 1e-5f) * w[i] + b[i];
    }
}

static void softmax(float *x, int count) {
    float largest = x[0], sum = 0;
    for (int i = 1; i < count; i++) largest = fmaxf(largest, x[i]);
    for (int i = 0; i < count; i++) sum += x[i] = expf(x[i] - largest);
    for (int i = 0; i < count; i++) x[i] /= sum;
}

static void unit(float *y, const float *x, int rows, int width) {
    for (int r = 0; r < rows; r++, x += width, y += width) {
        float sum = 0;
        for (int i = 0; i < width; i++) sum += x[i] * x[i];
        for (int i = 0; i < width; i++) y[i] = x[i] / sqrtf(sum);
    }
}

/* Columns `first` ... of packed [n, length, 3 * width] to [n, heads, length, HEAD_WIDTH]. */
static void split_heads(float *y, const float *packed, int n, int length, int width, int first) {
    for (int i = 0; i < n; i++)
        for (int h = 0; h < width / HEAD_WIDTH; h++)
            for (int t = 0; t < length; t++, y += HEAD_WIDTH)
                memcpy(y, packed + ((size_t)i * length + t) * 3 * width + first + h * HEAD_WIDTH, HEAD_WIDTH * sizeof *y);
}

/* x [n, length, width] -> attention before the output projection, [n, length, width] */
static float *attention(const float *x, int n, int length, int width, const char *name, int causal) {
    int heads = width / HEAD_WIDTH;
    if (width % HEAD_WIDTH) fail("%s is %d wide; expected a multiple of %d", name, width, HEAD_WIDTH);
    const float *w = weight(at(name, ".in_proj_weight"), 3 * (size_t)width * width);
    const float *b = weight(at(name, ".in_proj_bias"), 3 * (size_t)width);
    float *packed = append(&unrecorded, name, "F32", 3, (size_t[]){n, length, 3 * (size_t)width})->data;
    linear(packed, x, n * length, width, w, b, 3 * width);
    float *qkv[3];
    for (int i = 0; i < 3; i++) {
        static const char *suffix[3] = {".q", ".k", ".v"};
        qkv[i] = stage(at(name, suffix[i]), 4, n, heads, length, HEAD_WIDTH);
        split_heads(qkv[i], packed, n, length, width, i * width);
    }
    float *probabilities = stage(at(name, ".probabilities"), 4, n, heads, length, length);
    float *context = stage(at(name, ".context"), 3, n, length, width);
    for (int i = 0; i < n * heads; i++) {
        const float *q = qkv[0] + i * length * HEAD_WIDTH, *k = qkv[1] + i * length * HEAD_WIDTH;
        const float *v = qkv[2] + i * length * HEAD_WIDTH;
        for (int t = 0; t < length; t++) {
            float *p = probabilities + ((size_t)i * length + t) * length;
            float *out = context + ((size_t)(i / heads) * length + t) * width + i % heads * HEAD_WIDTH;
            int seen = causal ? t + 1 : length; /* the probabilities beyond stay 0 */
            for (int s = 0; s < seen; s++) {
                for (int d = 0; d < HEAD_WIDTH; d++) p[s] += q[t * HEAD_WIDTH + d] * k[s * HEAD_WIDTH + d];
                p[s] /= sqrtf(HEAD_WIDTH);
            }
            softmax(p, seen);
            for (int s = 0; s < seen; s++)
                for (int d = 0; d < HEAD_WIDTH; d++) out[d] += p[s] * v[s * HEAD_WIDTH + d];
        }
    }
    return context;
}

static float *linear_stage(const float *x, int n, int length, int in, const char *name, int out) {
    float *y = stage(name, 3, n, length, out);
    linear(y, x, n * length, in, weight(at(name, ".weight"), (size_t)out * in), weight(at(name, ".bias"), out), out);
    return y;
}

static float *layer_norm_stage(const float *x, int n, int length, int width, const char *name) {
    float *y = stage(name, 3, n, length, width);
    layer_norm(y, x, n * length, width, name);
    return y;
}

static float *sum_stage(const float *a, const float *b, int n, int length, int width, const char *name) {
    float *y = stage(name, 3, n, length, width);
    for (int i = 0; i < n * length * width; i++) y[i] = a[i] + b[i];
    return y;
}

/* All blocks under `prefix`, as "transformer.resblocks."; x [n, length, width] -> the last one's output */
static const float *transformer(const float *x, int n, int length, int width, const char *prefix, int causal) {
    for (int layer = 0;; layer++) {
        char number[16];
        snprintf(number, sizeof number, "%d", layer);
        const char *block = at(prefix, number);
        if (!find(&weights, at(block, ".ln_1.weight"))) return x;
        int hidden_width = side(weight_tensor(at(block, ".mlp.c_fc.weight")), 2, 0);
        const float *norm = layer_norm_stage(x, n, length, width, at(block, ".ln_1"));
        const float *context = attention(norm, n, length, width, at(block, ".attn"), causal);
        const float *attended = linear_stage(context, n, length, width, at(block, ".attn.out_proj"), width);
        const float *residual = sum_stage(x, attended, n, length, width, at(block, ".residual"));
        norm = layer_norm_stage(residual, n, length, width, at(block, ".ln_2"));
        const float *hidden = linear_stage(norm, n, length, width, at(block, ".mlp.c_fc"), hidden_width);
        float *active = stage(at(block, ".mlp.activation"), 3, n, length, hidden_width);
        for (int i = 0; i < n * length * hidden_width; i++) active[i] = hidden[i] / (1 + expf(-1.702f * hidden[i]));
        const float *out = linear_stage(active, n, length, hidden_width, at(block, ".mlp.c_proj"), width);
        x = sum_stage(residual, out, n, length, width, block);
    }
}

/* pixels [n, 3, size, size] -> image_embedding [n, embed] */
static const float *encode_image(const float *pixels, int n, int size) {
    const Tensor *kernel = weight_tensor("visual.conv1.weight");
    int width = side(kernel, 4, 0), patch = side(kernel, 4, 3), grid = size / patch, length = grid * grid + 1;
    const float *w = weight("visual.conv1.weight", (size_t)width * 3 * patch * patch);
    float *patches = stage("visual.conv1", 4, n, width, grid, grid);
    float *x = stage("visual.embedded", 3, n, length, width);
    const float *class_token = weight("visual.class_embedding", width);
    const float *positions = weight("visual.positional_embedding", (size_t)length * width);
    for (int image = 0; image < n; image++)
        for (int o = 0; o < width; o++) {
            x[(size_t)image * length * width + o] = class_token[o] + positions[o];
            for (int cell = 0; cell < grid * grid; cell++) {
                float sum = 0;
                for (int c = 0; c < 3; c++)
                    for (int i = 0; i < patch; i++)
                        for (int j = 0; j < patch; j++)
                            sum += w[((o * 3 + c) * patch + i) * patch + j] *
                                   pixels[(((size_t)image * 3 + c) * size + cell / grid * patch + i) * size +
                                          cell % grid * patch + j];
                patches[((size_t)image * width + o) * grid * grid + cell] = sum;
                x[((size_t)image * length + 1 + cell) * width + o] = sum + positions[(1 + cell) * width + o];
            }
        }
    const float *y = layer_norm_stage(x, n, length, width, "visual.ln_pre");
    y = transformer(y, n, length, width, "visual.transformer.resblocks.", 0);
    float *pooled = stage("visual.pooled", 2, n, width), *norm = stage("visual.ln_post", 2, n, width);
    for (int i = 0; i < n; i++) memcpy(pooled + i * width, y + (size_t)i * length * width, width * sizeof *y);
    layer_norm(norm, pooled, n, width, "visual.ln_post");
    int embed = side(weight_tensor("visual.proj"), 2, 1);
    float *projected = stage("visual.proj", 2, n, embed), *embedding = stage("image_embedding", 2, n, embed);
    project(projected, norm, n, width, weight("visual.proj", (size_t)width * embed), embed);
    unit(embedding, projected, n, embed);
    return embedding;
}

/* ids [n, length] -> text_embedding [n, embed] */
static const float *encode_text(const int32_t *ids, int n, int length) {
    const Tensor *table = weight_tensor("token_embedding.weight");
    int width = side(table, 2, 1), embed = side(weight_tensor("text_projection"), 2, 1);
    int context = side(weight_tensor("positional_embedding"), 2, 0);
    if (length > context) fail("text.ids has %d columns; expected at most %d", length, context);
    const float *tokens = to_floats(table), *positions = weight("positional_embedding", (size_t)context * width);
    float *embedded = stage("token_embedding", 3, n, length, width), *x = stage("text.embedded", 3, n, length, width);
    for (int i = 0; i < n * length; i++) {
        if (ids[i] < 0 || (size_t)ids[i] >= table->shape[0]) fail("%d is not a token id", (int)ids[i]);
        for (int d = 0; d < width; d++) {
            embedded[i * width + d] = tokens[(size_t)ids[i] * width + d];
            x[i * width + d] = embedded[i * width + d] + positions[i % length * width + d];
        }
    }
    const float *y = transformer(x, n, length, width, "transformer.resblocks.", 1);
    y = layer_norm_stage(y, n, length, width, "ln_final");
    float *pooled = stage("text.pooled", 2, n, width);
    for (int i = 0; i < n; i++) {
        int end = 0;
        for (int t = 1; t < length; t++)
            if (ids[i * length + t] > ids[i * length + end]) end = t;
        memcpy(pooled + i * width, y + ((size_t)i * length + end) * width, width * sizeof *y);
    }
    float *projected = stage("text_projection", 2, n, embed), *embedding = stage("text_embedding", 2, n, embed);
    project(projected, pooled, n, width, weight("text_projection", (size_t)width * embed), embed);
    unit(embedding, projected, n, embed);
    return embedding;
}

/* image.decoded, or image.pixels where there is none -> pixels [n, 3, size, size]; NULL without both */
static const float *prepare(int size, int *n) {
    const Tensor *decoded = find(&inputs, "image.decoded"), *given = find(&inputs, "image.pixels");
    *n = 1;
    if (decoded) {
        int h = side(decoded, 3, 0), w = side(decoded, 3, 1), bands = side(decoded, 3, 2), h_new, w_new;
        if (strcmp(decoded->dtype, "U8") || bands > 4) fail("image.decoded is not U8 with 1 to 4 bands");
        unsigned char *resized = resize(decoded->data, h, w, bands, size, &h_new, &w_new);
        append(&stages, "image.resized", "U8", 3, (size_t[]){h_new, w_new, bands})->data = resized;
        unsigned char *cropped = append(&stages, "image.cropped", "U8", 3, (size_t[]){size, size, 3})->data;
        crop(resized, h_new, w_new, bands, size, cropped);
        float *pixels = stage("image.pixels", 4, 1, 3, size, size);
        normalize(cropped, size, pixels);
        return pixels;
    }
    if (!given) return NULL;
    *n = side(given, 4, 0);
    if (side(given, 4, 1) != 3 || side(given, 4, 2) != size || side(given, 4, 3) != size)
        fail("image.pixels are not of the model's size");
    return to_floats(given);
}

int main(int count, char **arguments) {
    if (count != 4) fail("usage: clip WEIGHTS.safetensors GOLDEN.safetensors OUTPUT.safetensors");
    weights = read_tensors(arguments[1]);
    inputs = read_tensors(arguments[2]);
    if (!find(&weights, "visual.proj")) fail("%s is not a CLIP with a Vision Transformer", arguments[1]);
    int grid = (int)lround(sqrt((double)side(weight_tensor("visual.positional_embedding"), 2, 0) - 1));
    int patch = side(weight_tensor("visual.conv1.weight"), 4, 3), images = 0, texts = 0;
    if (grid < 1 || patch > 4096 / grid) fail("%s has pictures of no size, or of more than 4096", arguments[1]);
    int size = patch * grid;

    const float *pixels = prepare(size, &images), *image_embedding = NULL, *text_embedding = NULL;
    if (pixels) image_embedding = encode_image(pixels, images, size);
    const Tensor *ids = find(&inputs, "text.ids");
    if (ids) {
        if (strcmp(ids->dtype, "I32")) fail("text.ids are %s; expected I32", ids->dtype);
        texts = side(ids, 2, 0);
        int32_t *aligned = allocate(elements(ids) * sizeof *aligned);
        memcpy(aligned, ids->data, elements(ids) * sizeof *aligned);
        text_embedding = encode_text(aligned, texts, side(ids, 2, 1));
    }
    if (image_embedding && text_embedding) {
        float *logits = stage("logits_per_image", 2, images, texts), scale = expf(*weight("logit_scale", 1));
        int embed = side(weight_tensor("visual.proj"), 2, 1);
        if (side(weight_tensor("text_projection"), 2, 1) != embed) fail("the two towers differ in the width of embeddings");
        for (int i = 0; i < images; i++)
            for (int t = 0; t < texts; t++) {
                float cosine = 0;
                for (int d = 0; d < embed; d++) cosine += image_embedding[i * embed + d] * text_embedding[t * embed + d];
                logits[i * texts + t] = scale * cosine;
            }
    }
    write_tensors(&stages, arguments[3]);
    return 0;
}
