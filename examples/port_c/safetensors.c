#include "safetensors.h"

#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Noreturn void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory) fail("out of memory");
    return memory;
}

size_t elements(const Tensor *tensor) {
    size_t count = 1;
    for (int i = 0; i < tensor->dimensions; i++) {
        if (tensor->shape[i] < 1 || tensor->shape[i] > INT_MAX / count)
            fail("%s is empty, or has more than %d numbers", tensor->name, INT_MAX);
        count *= tensor->shape[i];
    }
    return count;
}

static size_t item_size(const char *dtype) {
    static const struct { const char *name; size_t size; } sizes[] = {
        {"U8", 1}, {"F16", 2}, {"BF16", 2}, {"F32", 4}, {"I32", 4}, {"F64", 8}, {"I64", 8},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(dtype, sizes[i].name)) return sizes[i].size;
    fail("a tensor has the dtype %s; expected F32, F16, BF16, F64, I64, I32 or U8", dtype);
}

const Tensor *find(const TensorList *list, const char *name) {
    for (size_t i = 0; i < list->count; i++)
        if (!strcmp(list->tensors[i].name, name)) return &list->tensors[i];
    return NULL;
}

static Tensor *append_blank(TensorList *list, const char *name) {
    if (list->count == list->capacity) {
        list->capacity = 2 * list->capacity + 64;
        list->tensors = realloc(list->tensors, list->capacity * sizeof(Tensor));
        if (!list->tensors) fail("out of memory");
    }
    Tensor *tensor = &list->tensors[list->count++];
    memset(tensor, 0, sizeof *tensor);
    if (snprintf(tensor->name, MAX_NAME, "%s", name) >= MAX_NAME) fail("the name %s is too long", name);
    return tensor;
}

Tensor *append(TensorList *list, const char *name, const char *dtype, int dimensions, const size_t *shape) {
    Tensor *tensor = append_blank(list, name);
    snprintf(tensor->dtype, sizeof tensor->dtype, "%s", dtype);
    tensor->dimensions = dimensions;
    if (dimensions) memcpy(tensor->shape, shape, dimensions * sizeof *shape);
    tensor->data = allocate(elements(tensor) * item_size(dtype));
    return tensor;
}

/* The header is JSON. What follows reads as much of it as safetensors allows there. */

typedef struct { const char *at, *end; } Text;

static char peek(Text *text) { /* the next character that is not white space */
    while (text->at < text->end && strchr(" \t\r\n", *text->at)) text->at++;
    if (text->at == text->end) fail("the header ends early");
    return *text->at;
}

static void expect(Text *text, char character) {
    if (peek(text) != character) fail("the header has '%c' where '%c' is expected", *text->at, character);
    text->at++;
}

static int more(Text *text, char close) { /* another item, or the end of the list or object? */
    if (peek(text) == ',') text->at++;
    else if (*text->at == close) return text->at++, 0;
    return 1;
}

static void read_string(Text *text, char *result, size_t size) {
    size_t length = 0;
    expect(text, '"');
    while (text->at < text->end && *text->at != '"') {
        if (*text->at == '\\') text->at++; /* names and dtypes have no escapes; the metadata is skipped */
        if (length + 1 < size) result[length++] = *text->at;
        text->at++;
    }
    result[length] = 0;
    if (text->at >= text->end) fail("the header ends within a string");
    text->at++;
}

static size_t read_size(Text *text) {
    size_t value = 0;
    if (peek(text) < '0' || *text->at > '9') fail("the header has '%c' where a number is expected", *text->at);
    while (text->at < text->end && *text->at >= '0' && *text->at <= '9') {
        if (value > (SIZE_MAX - 9) / 10) fail("the header has a number that is too large");
        value = 10 * value + (*text->at++ - '0');
    }
    return value;
}

static void skip_strings(Text *text) { /* an object of strings, which __metadata__ is */
    char ignored[2];
    expect(text, '{');
    while (more(text, '}')) {
        read_string(text, ignored, sizeof ignored);
        expect(text, ':');
        read_string(text, ignored, sizeof ignored);
    }
}

static void read_entry(Text *text, Tensor *tensor, char *data, size_t data_size) {
    char key[16];
    size_t offsets[2] = {0, 0};
    expect(text, '{');
    while (more(text, '}')) {
        read_string(text, key, sizeof key);
        expect(text, ':');
        if (!strcmp(key, "dtype")) {
            read_string(text, tensor->dtype, sizeof tensor->dtype);
            continue;
        }
        int is_shape = !strcmp(key, "shape"), count = 0;
        if (!is_shape && strcmp(key, "data_offsets")) fail("%s has the unknown field %s", tensor->name, key);
        expect(text, '[');
        while (more(text, ']')) {
            if (count == (is_shape ? MAX_DIMENSIONS : 2)) fail("%s has too many numbers in %s", tensor->name, key);
            (is_shape ? tensor->shape : offsets)[count++] = read_size(text);
        }
        if (is_shape) tensor->dimensions = count;
    }
    if (offsets[1] > data_size || offsets[0] > offsets[1] ||
        offsets[1] - offsets[0] != elements(tensor) * item_size(tensor->dtype))
        fail("%s does not fit its place in the file", tensor->name);
    tensor->data = data + offsets[0];
}

TensorList read_tensors(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("can't open %s", path);
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    rewind(file);
    unsigned char *bytes = allocate(size);
    if (fread(bytes, 1, size, file) != size) fail("can't read %s", path);
    fclose(file);

    uint64_t header = 0;
    for (int i = 0; i < 8 && size >= 8; i++) header |= (uint64_t)bytes[i] << (8 * i);
    if (size < 8 || header > size - 8) fail("%s is not a safetensors file", path);
    Text text = {(char *)bytes + 8, (char *)bytes + 8 + header};
    TensorList list = {0};
    char name[MAX_NAME];
    expect(&text, '{');
    while (more(&text, '}')) {
        read_string(&text, name, sizeof name);
        expect(&text, ':');
        if (!strcmp(name, "__metadata__")) skip_strings(&text);
        else read_entry(&text, append_blank(&list, name), (char *)bytes + 8 + header, size - 8 - header);
    }
    return list;
}

void write_tensors(const TensorList *list, const char *path) {
    FILE *file = fopen(path, "wb");
    if (!file) fail("can't write %s", path);
    for (int i = 0; i < 8; i++) fputc(0, file); /* the length of the header, known below */
    size_t position = 0;
    for (size_t i = 0; i < list->count; i++) {
        const Tensor *tensor = &list->tensors[i];
        size_t end = position + elements(tensor) * item_size(tensor->dtype);
        fprintf(file, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "{", tensor->name, tensor->dtype);
        for (int j = 0; j < tensor->dimensions; j++) fprintf(file, "%s%zu", j ? "," : "", tensor->shape[j]);
        fprintf(file, "],\"data_offsets\":[%zu,%zu]}", position, end);
        position = end;
    }
    fputc('}', file);
    while (ftell(file) % 8) fputc(' ', file);
    uint64_t header = ftell(file) - 8;
    for (size_t i = 0; i < list->count; i++) {
        const Tensor *tensor = &list->tensors[i];
        fwrite(tensor->data, item_size(tensor->dtype), elements(tensor), file);
    }
    rewind(file);
    for (int i = 0; i < 8; i++) fputc(header >> (8 * i) & 255, file);
    if (ferror(file) || fclose(file)) fail("can't write %s", path);
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 0) return from_bits(sign | 0x3f800000) * (float)fraction * 0x1p-24f; /* zero and subnormal */
    if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

float *to_floats(const Tensor *tensor) {
    size_t count = elements(tensor);
    float *values = allocate(count * sizeof *values);
    if (!strcmp(tensor->dtype, "F32")) {
        memcpy(values, tensor->data, count * sizeof *values);
        return values;
    }
    int is_half = !strcmp(tensor->dtype, "F16");
    if (!is_half && strcmp(tensor->dtype, "BF16")) fail("%s is %s; expected floats", tensor->name, tensor->dtype);
    for (size_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, (char *)tensor->data + 2 * i, sizeof bits);
        values[i] = is_half ? from_half(bits) : from_bits((uint32_t)bits << 16);
    }
    return values;
}
