#ifndef PICTURE_H
#define PICTURE_H

/* uint8 [h, w, bands], the shorter side becomes `size`. The result is allocated. Bands: grey, grey and alpha, RGB, RGBA. */
unsigned char *resize(const unsigned char *picture, int h, int w, int bands, int size, int *h_new, int *w_new);

/* The middle, as RGB: uint8 [size, size, 3]. */
void crop(const unsigned char *picture, int h, int w, int bands, int size, unsigned char *rgb);

/* uint8 [size, size, 3] -> [3, size, size] */
void normalize(const unsigned char *rgb, int size, float *pixels);

#endif
