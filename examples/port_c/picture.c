/* From a decoded picture to pixels: section 5 of tests/conformance/README.md, equal in every bit. */

#include "picture.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "safetensors.h"

enum { WEIGHT_BITS = 22 };

static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/* Filter along one axis: `outer` runs of n samples become n_new, each sample of `inner` bytes side by side. */
static unsigned char *resize_axis(const unsigned char *in, size_t outer, int n, size_t inner, int n_new) {
    unsigned char *out = allocate(outer * n_new * inner);
    double scale = (double)n / n_new, stretch = fmax(scale, 1);
    double *f = allocate((4 * (size_t)ceil(stretch) + 4) * sizeof *f);
    int32_t *k = allocate((4 * (size_t)ceil(stretch) + 4) * sizeof *k);
    for (int i = 0; i < n_new; i++) {
        double center = (i + 0.5) * scale, sum = 0;
        int first = (int)fmax(trunc(center - 2 * stretch + 0.5), 0);
        int last = (int)fmin(trunc(center + 2 * stretch + 0.5), n);
        for (int j = first; j < last; j++) sum += f[j - first] = bicubic((j - center + 0.5) * (1 / stretch));
        for (int j = first; j < last; j++) {
            double weight = f[j - first] / sum * (1 << WEIGHT_BITS);
            k[j - first] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        for (size_t o = 0; o < outer; o++)
            for (size_t b = 0; b < inner; b++) {
                int32_t total = 1 << (WEIGHT_BITS - 1);
                for (int j = first; j < last; j++) total += k[j - first] * in[(o * n + j) * inner + b];
                total >>= WEIGHT_BITS;
                out[(o * n_new + i) * inner + b] = total < 0 ? 0 : total > 255 ? 255 : total;
            }
    }
    return out;
}

static void multiply_by_alpha(unsigned char *picture, size_t pixels, int bands) {
    for (size_t i = 0; i < pixels; i++, picture += bands)
        for (int b = 0; b < bands - 1; b++) {
            int product = picture[b] * picture[bands - 1] + 128;
            picture[b] = (product + (product >> 8)) >> 8;
        }
}

static void divide_by_alpha(unsigned char *picture, size_t pixels, int bands) {
    for (size_t i = 0; i < pixels; i++, picture += bands)
        for (int b = 0, alpha = picture[bands - 1]; b < bands - 1 && alpha > 0; b++) {
            int quotient = 255 * picture[b] / alpha;
            picture[b] = quotient > 255 ? 255 : quotient;
        }
}

unsigned char *resize(const unsigned char *picture, int h, int w, int bands, int size, int *h_new, int *w_new) {
    int shorter = h < w ? h : w, longer = h < w ? w : h;
    if ((int64_t)size * longer / shorter > 1 << 24) fail("a picture of %d x %d is too thin", w, h);
    *h_new = (int)((int64_t)size * h / shorter);
    *w_new = (int)((int64_t)size * w / shorter);
    unsigned char *x = allocate((size_t)h * w * bands);
    memcpy(x, picture, (size_t)h * w * bands);
    if (*h_new == h && *w_new == w) return x;
    int has_alpha = bands % 2 == 0, gain = w - *w_new > 0 ? 2 * (w - *w_new) : 0;
    if (has_alpha) multiply_by_alpha(x, (size_t)h * w, bands);
    if (h - *h_new > gain) { /* the order of Pillow 13 */
        x = resize_axis(x, 1, h, (size_t)w * bands, *h_new);
        if (*w_new != w) x = resize_axis(x, *h_new, w, bands, *w_new);
    } else {
        if (*w_new != w) x = resize_axis(x, h, w, bands, *w_new);
        if (*h_new != h) x = resize_axis(x, 1, h, (size_t)*w_new * bands, *h_new);
    }
    if (has_alpha) divide_by_alpha(x, (size_t)*h_new * *w_new, bands);
    return x;
}

static int half_to_even(int excess) { return (excess + (excess % 4 == 3)) / 2; }

void crop(const unsigned char *picture, int h, int w, int bands, int size, unsigned char *rgb) {
    int top = half_to_even(h - size), left = half_to_even(w - size);
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++)
            for (int c = 0; c < 3; c++)
                *rgb++ = picture[((size_t)(top + y) * w + left + x) * bands + (bands > 2 ? c : 0)];
}

void normalize(const unsigned char *rgb, int size, float *pixels) {
    static const float mean[3] = {0.48145466f, 0.4578275f, 0.40821073f};
    static const float std[3] = {0.26862954f, 0.26130258f, 0.27577711f};
    for (int c = 0; c < 3; c++)
        for (int i = 0; i < size * size; i++) *pixels++ = ((float)rgb[3 * i + c] / 255.0f - mean[c]) / std[c];
}
