/* Reading and writing safetensors files: section 3.1 of tests/conformance/README.md. */

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stddef.h>

enum { MAX_NAME = 128, MAX_DIMENSIONS = 4 };

typedef struct {
    char name[MAX_NAME];
    char dtype[8]; /* "F32", "F16", "BF16", "U8", "I32" */
    int dimensions;
    size_t shape[MAX_DIMENSIONS];
    void *data;
} Tensor;

typedef struct {
    size_t count, capacity;
    Tensor *tensors;
} TensorList;

/* Print a message to stderr and exit with status 1. */
_Noreturn void fail(const char *format, ...);

void *allocate(size_t bytes);

/* From 1 to INT_MAX: other tensors end the program, so that a size never wraps around. */
size_t elements(const Tensor *tensor);

/* All tensors of a file. What is malformed ends the program with a message. */
TensorList read_tensors(const char *path);

/* The tensor of that name, or NULL. */
const Tensor *find(const TensorList *list, const char *name);

/* Append a tensor whose data is allocated, all zeros, and returned. The address of earlier Tensors may change. */
Tensor *append(TensorList *list, const char *name, const char *dtype, int dimensions, const size_t *shape);

void write_tensors(const TensorList *list, const char *path);

/* The values as float32; F16 and BF16 are widened. The result is a copy. */
float *to_floats(const Tensor *tensor);

#endif
