/* CPU kernels of the engine. Maps are channels last: [frames][height][width][channels], one frame an image at a step.

   Spikes are mostly zero: a convolution of spikes, and the gradient of its weights, visit active inputs only. The
   gradient with respect to the input is dense; its taps outside the map are not computed. Every sum runs in a fixed
   order (taps row by row, then channels), whatever the batch and the number of threads.

   Compiled at first use with -DREAL=float or double; channel counts are multiples of VL where a kernel says so. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef REAL real;
typedef real vec __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
#define VL ((int)(64 / sizeof(real)))
#define NARROW static inline __attribute__((always_inline))
#define SAY(text) _Pragma(#text)
#define PARALLEL(n) SAY(omp parallel for num_threads(n) schedule(static))

static inline vec load(const real *p) { return *(const vec *)p; }
static inline void store(real *p, vec v) { *(vec *)p = v; }

typedef struct {
    int frames, height, width, in, kernel, stride, padding, out_height, out_width, out, threads;
    int some, all; /* a pool: its frames are `some` images a step, written among `all` images a step */
} shape;

int lanes(void) { return VL; }

/* Channels of x [n] that are not zero; idx has room for n + 16. *ones stays set if all of them are 1. */
static int active(const real *x, int n, uint16_t *idx, int *ones) {
    int k = 0, c = 0, odd = 0;
#ifdef __AVX512F__
    if (sizeof(real) == 4) {
        const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; c + 16 <= n; c += 16) {
            const __m512 here = _mm512_loadu_ps((const float *)x + c);
            const __mmask16 m = _mm512_cmp_ps_mask(here, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            odd |= m & _mm512_cmp_ps_mask(here, _mm512_set1_ps(1), _CMP_NEQ_UQ);
            const __m512i v = _mm512_maskz_compress_epi32(m, _mm512_add_epi32(ramp, _mm512_set1_epi32(c)));
            _mm256_storeu_si256((__m256i *)(idx + k), _mm512_cvtepi32_epi16(v));
            k += __builtin_popcount(m);
        }
    }
#endif
    for (; c < n; c++) {
        idx[k] = (uint16_t)c;
        k += x[c] != 0;
        odd |= x[c] != 0 && x[c] != 1;
    }
    if (odd) *ones = 0;
    return k;
}

/* Output cell that input cell i meets through tap p along one side, or -1. */
static inline int meets(int i, int p, int stride, int padding, int out) {
    int a = i + padding - p;
    return a < 0 || a % stride || a / stride >= out ? -1 : a / stride;
}

/* Does a tap meet the map at all? On a 1x1 map one of nine does. */
static int tap_used(const shape *z, int tap) {
    int row = 0, col = 0;
    for (int h = 0; h < z->height; h++) row |= meets(h, tap / z->kernel, z->stride, z->padding, z->out_height) >= 0;
    for (int v = 0; v < z->width; v++) col |= meets(v, tap % z->kernel, z->stride, z->padding, z->out_width) >= 0;
    return row && col;
}

/* ---- gradient of the weights: x, dy -> dw [taps in out] (overwritten; taps outside every map are zero) ---- */

/* Cells are taken 64 at a time, one bit each: one image of 8x8, four of 4x4, a part of a larger one. */

NARROW void outer(const real *x, uint64_t bits, const int *to, long in, const real *dy, long out, real *dw,
                  const int nb, const int ones) {
    vec acc[8];
    for (int i = 0; i < nb; i++) acc[i] = load(dw + i * VL);
    while (bits) {
        const int c = __builtin_ctzll(bits);
        bits &= bits - 1;
        const real *g = dy + to[c] * out;
        if (ones)
            for (int i = 0; i < nb; i++) acc[i] += load(g + i * VL);
        else {
            const real s = x[c * in];
            for (int i = 0; i < nb; i++) acc[i] += s * load(g + i * VL);
        }
    }
    for (int i = 0; i < nb; i++) store(dw + i * VL, acc[i]);
}

void spike_weight_grad(const shape *z, const real *x, const real *dy, real *dw) {
    const int taps = z->kernel * z->kernel, cells = z->height * z->width, outs = z->out_height * z->out_width;
    const int images = cells < 64 ? 64 / cells : 1, size = cells < 64 ? images * cells : 64;
    const int parts = (images * cells + 63) / 64; /* groups of 64 cells a frame, where it has more */
    int *to = malloc(sizeof(int) * (size_t)taps * parts * 64); /* per tap: the output cell an input cell meets */
    uint64_t *valid = calloc((size_t)taps * parts, sizeof(uint64_t));
    for (int tap = 0; tap < taps; tap++)
        for (int i = 0; i < images * cells; i++) {
            const int c = i % cells, at = (tap * parts + i / 64) * 64 + i % 64;
            const int a = meets(c / z->width, tap / z->kernel, z->stride, z->padding, z->out_height);
            const int b = meets(c % z->width, tap % z->kernel, z->stride, z->padding, z->out_width);
            if (a < 0 || b < 0) continue;
            to[at] = i / cells * outs + a * z->out_width + b;
            valid[at / 64] |= (uint64_t)1 << i % 64;
        }
    memset(dw, 0, sizeof(real) * (size_t)taps * z->in * z->out);
    PARALLEL(z->threads)
    for (int part = 0; part < z->threads; part++) { /* each thread owns some input channels */
        const int first = (int)((long)z->in * part / z->threads), last = (int)((long)z->in * (part + 1) / z->threads);
        uint64_t *on = malloc(sizeof(uint64_t) * (size_t)(last - first + 1));
        for (int m = 0; m < z->frames; m += images)
            for (int k = 0; k < parts; k++) {
                const long left = (long)(z->frames - m) * cells - (long)k * 64;
                const int here = (int)(left < size ? left : size) < cells * images - k * 64 ? (int)(left < size ? left : size)
                                                                                          : cells * images - k * 64;
                const real *xm = x + ((long)m * cells + (long)k * 64) * z->in, *gm = dy + (long)m * outs * z->out;
                for (int c = first; c < last; c++) on[c - first] = 0;
                int odd = 0;
                for (int i = 0; i < here; i++)
                    for (int c = first; c < last; c++) {
                        const real s = xm[(long)i * z->in + c];
                        on[c - first] |= (uint64_t)(s != 0) << i;
                        odd |= (s != 0) & (s != 1);
                    }
                for (int c = first; c < last; c++)
                    for (int tap = 0; tap < taps; tap++) {
                        const uint64_t bits = on[c - first] & valid[tap * parts + k];
                        if (!bits) continue;
                        real *row = dw + ((long)tap * z->in + c) * z->out;
                        const int *t = to + (tap * parts + k) * 64;
#define OUTER(NB, ONES) outer(xm + c, bits, t, z->in, gm + block, z->out, row + block, NB, ONES)
                        int block = 0;
                        for (; block + 8 * VL <= z->out; block += 8 * VL) {
                            if (odd) OUTER(8, 0);
                            else OUTER(8, 1);
                        }
                        for (; block + 4 * VL <= z->out; block += 4 * VL) {
                            if (odd) OUTER(4, 0);
                            else OUTER(4, 1);
                        }
                        for (; block < z->out; block += VL) OUTER(1, 0);
#undef OUTER
                    }
            }
        free(on);
    }
    free(to);
    free(valid);
}

/* ---- convolution, forward and back ----
   forward: x [m h w in], w [taps in out] -> y [m p q out]; back: dy, w [out taps in] (as PyTorch keeps a channels-last
   weight) -> dx. Channels of the result are a multiple of VL. Six frames of which most entries are active go through the
   dense tile, others through the sparse sum: the same products in the same order, since a zero changes no sum.
   Forward most spikes are zero; back most gradients are where the surrogate has a bounded support. */

#define FRAMES 6 /* frames a tile shares its weights over: 6 x 4 sums, 4 weights and a broadcast fill 32 registers */

typedef struct {
    int rows, cols, deep, to_rows, to_cols, wide; /* maps read and written, their channels */
    long frame, image, row, tap;                  /* steps in memory: read, written, between rows and taps of w */
} way;

static way way_of(const shape *z, int forward) {
    const long taps = (long)z->kernel * z->kernel;
    way r = {z->height, z->width, z->in, z->out_height, z->out_width, z->out, 0, 0, z->out, (long)z->in * z->out};
    if (!forward) r = (way){z->out_height, z->out_width, z->out, z->height, z->width, z->in, 0, 0, taps * z->in, z->in};
    r.frame = (long)r.rows * r.cols * r.deep;
    r.image = (long)r.to_rows * r.to_cols * r.wide;
    return r;
}

/* Cell read for cell i written through tap p along one side, or -1. */
static inline int source(const shape *z, int i, int p, int limit, int forward) {
    if (!forward) return meets(i, p, z->stride, z->padding, limit);
    const int h = i * z->stride + p - z->padding;
    return h >= limit ? -1 : h;
}

NARROW void dense_tile(const shape *z, const way *r, const real *from, const real *w, real *to, int i, int j,
                       const int forward, const int nf, const int nb) {
    const int K = z->kernel;
    vec acc[FRAMES][4];
    for (int f = 0; f < nf; f++)
        for (int k = 0; k < nb; k++) acc[f][k] = (vec){0};
    for (int p = 0; p < K; p++) {
        const int a = source(z, i, p, r->rows, forward);
        if (a < 0) continue;
        for (int q = 0; q < K; q++) {
            const int b = source(z, j, q, r->cols, forward);
            if (b < 0) continue;
            const real *g = from + ((long)a * r->cols + b) * r->deep;
            const real *u = w + (long)(p * K + q) * r->tap;
            const long row = r->row, frame = r->frame;
            for (int c = 0; c < r->deep; c++) {
                vec v[4];
                for (int k = 0; k < nb; k++) v[k] = load(u + c * row + k * VL);
                for (int f = 0; f < nf; f++) {
                    const real s = g[f * frame + c];
                    for (int k = 0; k < nb; k++) acc[f][k] += s * v[k];
                }
            }
        }
    }
    for (int f = 0; f < nf; f++)
        for (int k = 0; k < nb; k++) store(to + f * r->image + k * VL, acc[f][k]);
}

NARROW void dense(const shape *z, const way *r, const real *from, const real *w, real *to, const int forward) {
    for (int block = 0; block < r->wide;) {
        const int nb = r->wide - block >= 4 * VL ? 4 : r->wide - block >= 2 * VL ? 2 : 1;
        for (int i = 0; i < r->to_rows; i++)
            for (int j = 0; j < r->to_cols; j++) {
                real *d = to + ((long)i * r->to_cols + j) * r->wide + block;
                if (nb == 4) dense_tile(z, r, from, w + block, d, i, j, forward, FRAMES, 4);
                else if (nb == 2) dense_tile(z, r, from, w + block, d, i, j, forward, FRAMES, 2);
                else dense_tile(z, r, from, w + block, d, i, j, forward, FRAMES, 1);
            }
        block += nb * VL;
    }
}

NARROW void gather(const real *x, const uint16_t *idx, int n, const real *w, long row, real *y, const int nb,
                   const int ones) {
    vec acc[4];
    for (int i = 0; i < nb; i++) acc[i] = load(y + i * VL);
    for (int j = 0; j < n; j++) {
        const real *r = w + idx[j] * row;
        if (ones)
            for (int i = 0; i < nb; i++) acc[i] += load(r + i * VL);
        else {
            const real s = x[idx[j]];
            for (int i = 0; i < nb; i++) acc[i] += s * load(r + i * VL);
        }
    }
    for (int i = 0; i < nb; i++) store(y + i * VL, acc[i]);
}

NARROW void sparse(const shape *z, const way *r, const real *x, const uint16_t *idx, const int *count, int ones,
                   const real *w, real *y, int nf, const int forward) {
    const int K = z->kernel, room = r->deep + 16;
    memset(y, 0, sizeof(real) * (size_t)(nf * r->image));
    for (int block = 0; block < r->wide;) {
        const int nb = r->wide - block >= 4 * VL ? 4 : r->wide - block >= 2 * VL ? 2 : 1;
        for (int tap = 0; tap < K * K; tap++) { /* one tap's weights stay in the first cache for all these frames */
            const real *u = w + tap * r->tap + block;
            for (int k = 0; k < nf * r->to_rows; k++) {
                const int f = k / r->to_rows, i = k % r->to_rows, a = source(z, i, tap / K, r->rows, forward);
                if (a < 0) continue;
                for (int j = 0; j < r->to_cols; j++) {
                    const int b = source(z, j, tap % K, r->cols, forward);
                    if (b < 0) continue;
                    const long c = ((long)f * r->rows + a) * r->cols + b, d = ((long)k * r->to_cols + j) * r->wide;
#define GATHER(NB, ONES) gather(x + c * r->deep, idx + c * room, count[c], u, r->row, y + d + block, NB, ONES)
                    if (nb == 4 && ones) GATHER(4, 1);
                    else if (nb == 4) GATHER(4, 0);
                    else if (nb == 2) GATHER(2, 0);
                    else GATHER(1, 0);
#undef GATHER
                }
            }
        }
        block += nb * VL;
    }
}

NARROW void convolve(const shape *z, const real *from, const real *w, real *to, const int forward) {
    const way r = way_of(z, forward);
    const int cells = r.rows * r.cols, room = r.deep + 16;
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m += FRAMES) {
        const int nf = z->frames - m < FRAMES ? z->frames - m : FRAMES;
        const real *x = from + m * r.frame;
        uint16_t *idx = malloc(sizeof(uint16_t) * (size_t)nf * cells * room);
        int *count = malloc(sizeof(int) * (size_t)nf * cells), ones = 1;
        long busy = 0;
        for (int c = 0; c < nf * cells; c++) {
            count[c] = active(x + (long)c * r.deep, r.deep, idx + (long)c * room, &ones);
            busy += count[c];
        }
        if (nf == FRAMES && busy * 10 > nf * r.frame * 7) dense(z, &r, x, w, to + m * r.image, forward);
        else sparse(z, &r, x, idx, count, ones, w, to + m * r.image, nf, forward);
        free(idx);
        free(count);
    }
}

void spike_conv(const shape *z, const real *x, const real *w, real *y) { convolve(z, x, w, y, 1); }
void input_grad(const shape *z, const real *dy, const real *w, real *dx) { convolve(z, dy, w, dx, 0); }

/* ---- the first layer: few input channels, planes as images come [m in h w] ---- */

/* x [m in h w], w [kernel kernel in out] -> y [m p q out]; out a multiple of VL. */
NARROW void stem_tile(const real *x, long step, int rows, int span, long line, const real *w, int out, real *y,
                      const int np, const int nb) {
    vec acc[FRAMES][4];
    for (int f = 0; f < np; f++)
        for (int i = 0; i < nb; i++) acc[f][i] = (vec){0};
    for (int p = 0; p < rows; p++)
        for (int c = 0; c < span; c++) {
            vec u[4];
            for (int i = 0; i < nb; i++) u[i] = load(w + ((long)p * span + c) * out + i * VL);
            for (int f = 0; f < np; f++) {
                const real s = x[p * line + f * step + c];
                for (int i = 0; i < nb; i++) acc[f][i] += s * u[i];
            }
        }
    for (int f = 0; f < np; f++)
        for (int i = 0; i < nb; i++) store(y + (long)f * out + i * VL, acc[f][i]);
}

/* The same for a row of cells. */
static void stem_row(const real *x, long step, int rows, int span, long line, const real *w, int out, real *y,
                     int cells) {
    for (int block = 0; block < out;) {
        const int nb = out - block >= 4 * VL ? 4 : out - block >= 2 * VL ? 2 : 1;
        for (int b = 0; b < cells;) {
            const int np = cells - b >= FRAMES ? FRAMES : cells - b >= 4 ? 4 : 1;
#define STEM(P, B) stem_tile(x + b * step, step, rows, span, line, w + block, out, y + (long)b * out + block, P, B)
            if (np == FRAMES && nb == 4) STEM(FRAMES, 4);
            else if (np == 4 && nb == 4) STEM(4, 4);
            else if (nb == 4) STEM(1, 4);
            else if (np == FRAMES && nb == 2) STEM(FRAMES, 2);
            else if (np == 4 && nb == 2) STEM(4, 2);
            else if (nb == 2) STEM(1, 2);
            else if (np == FRAMES) STEM(FRAMES, 1);
            else if (np == 4) STEM(4, 1);
            else STEM(1, 1);
#undef STEM
            b += np;
        }
        block += nb * VL;
    }
}

void stem_conv(const shape *z, const real *x, const real *w, real *y) {
    const int K = z->kernel, C = z->in, S = z->stride;
    const long line = (long)((z->out_width - 1) * S + K) * C, lines = (long)(z->out_height - 1) * S + K;
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m++) {
        real *pad = calloc((size_t)(line * lines), sizeof(real)); /* the frame, channels last, zeros around it */
        for (int c = 0; c < C; c++)
            for (int h = 0; h < z->height && h + z->padding < lines; h++)
                for (int v = 0; v < z->width && (long)(v + z->padding) * C < line; v++)
                    pad[(h + z->padding) * line + (long)(v + z->padding) * C + c] =
                        x[(((long)m * C + c) * z->height + h) * z->width + v];
        for (int a = 0; a < z->out_height; a++)
            stem_row(pad + (long)a * S * line, (long)S * C, K, K * C, line, w, z->out,
                     y + ((long)m * z->out_height + a) * z->out_width * z->out, z->out_width);
        free(pad);
    }
}

/* What the cells of a row send back to the pixels that they see, n values side by side for each row of the kernel. */
NARROW void send_back(const real *sums, int width, int cells, int kernel, int step, real *to, long line, const int n) {
    for (int b = 0; b < cells; b++)
        for (int p = 0; p < kernel; p++) {
            const real *s = sums + (long)b * width + p * n;
            real *d = to + p * line + b * step;
            for (int i = 0; i < n; i++) d[i] += s[i];
        }
}

void pair_weights(const shape *z, const float *w, uint16_t *t);
void input_grad_bf16(const shape *z, const float *dy, const uint16_t *w, float *dx);

/* dy [m p q out], w [out in kernel kernel] -> dx [m in h w]: a product for every cell, in bf16 if `half`, whose results
   are added up. */
void stem_input_grad(const shape *z, const real *dy, const real *w, real *dx, int half) {
    const int K = z->kernel, C = z->in, S = z->stride, P = z->padding, span = K * C;
    const int width = (K * span + VL - 1) / VL * VL; /* of the product: kernel x kernel x in, and zeros */
    const int across = (z->out_width - 1) * S + K, down = (z->out_height - 1) * S + K;
    const long line = (long)(across > z->width + P ? across : z->width + P) * C;
    const long lines = down > z->height + P ? down : z->height + P;
    real *table = calloc((size_t)z->out * width, sizeof(real));
    for (int o = 0; o < z->out; o++)
        for (int k = 0; k < C; k++)
            for (int tap = 0; tap < K * K; tap++)
                table[(long)o * width + tap * C + k] = w[((long)o * C + k) * K * K + tap];
    const int cells = z->out_height * z->out_width, some = half ? cells : z->out_width; /* bf16: a map, else a row */
    const shape one = {cells, 1, 1, width, 1, 1, 0, 1, 1, z->out, 1}; /* a cell as a frame of its own */
    uint16_t *pairs = half ? malloc(sizeof(uint16_t) * (size_t)z->out * width) : NULL;
    if (half) pair_weights(&one, (const float *)table, pairs);
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m++) {
        real *pad = calloc((size_t)(line * lines), sizeof(real)); /* the gradient, channels last, with its margin */
        real *room = malloc(sizeof(real) * (size_t)some * width);
        const real *map = dy + (long)m * cells * z->out;
        if (half) input_grad_bf16(&one, (const float *)map, pairs, (float *)room);
        for (int a = 0; a < z->out_height; a++) {
            const real *sums = half ? room + (long)a * z->out_width * width : room;
            if (!half) stem_row(map + (long)a * z->out_width * z->out, z->out, 1, z->out, 0, table, width, room, some);
#define SEND(N) send_back(sums, width, z->out_width, K, S * C, pad + (long)a * S * line, line, N)
            if (span == 21) SEND(21); /* 7 x 7 and 3 x 3 windows of colours and greys, unrolled */
            else if (span == 9) SEND(9);
            else if (span == 7) SEND(7);
            else if (span == 3) SEND(3);
            else SEND(span);
#undef SEND
        }
        for (int k = 0; k < C; k++)
            for (int h = 0; h < z->height; h++)
                for (int v = 0; v < z->width; v++)
                    dx[(((long)m * C + k) * z->height + h) * z->width + v] = pad[(h + P) * line + (long)(v + P) * C + k];
        free(room);
        free(pad);
    }
    free(pairs);
    free(table);
}

/* ---- weights in the two orders: [out taps in] <-> [taps in out], only taps that meet a map ---- */

#ifdef __AVX512F__
/* 16 x 16 floats, rows `from` apart, to columns, rows `to` apart. */
static inline void turn_tile(const float *x, long from, float *y, long to) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(x + i * from);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#define AS_PD(v) _mm512_castps_pd(v)
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(AS_PD(b[i]), AS_PD(b[i + 2])));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(AS_PD(b[i]), AS_PD(b[i + 2])));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(AS_PD(b[i + 1]), AS_PD(b[i + 3])));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(AS_PD(b[i + 1]), AS_PD(b[i + 3])));
    }
#undef AS_PD
    for (int i = 0; i < 4; i++) { /* a[4 j + i]: rows 4 j .. 4 j + 3 of columns i, i + 4, i + 8, i + 12 */
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(y + i * to, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_ps(y + (i + 8) * to, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_ps(y + (i + 4) * to, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_ps(y + (i + 12) * to, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#endif

/* A matrix, rows `from` apart, to its transpose, rows `to` apart. */
static void turn(const real *x, long from, real *y, long to, int rows, int cols) {
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < cols; j += 16) {
#ifdef __AVX512F__
            if (sizeof(real) == 4 && i + 16 <= rows && j + 16 <= cols) {
                turn_tile((const float *)x + i * from + j, from, (float *)y + j * to + i, to);
                continue;
            }
#endif
            for (int a = i; a < rows && a < i + 16; a++)
                for (int b = j; b < cols && b < j + 16; b++) y[b * to + a] = x[a * from + b];
        }
}

void turn_weights(const shape *z, real *w, real *t, int back) {
    const int taps = z->kernel * z->kernel;
    const long row = (long)taps * z->in;
    PARALLEL(z->threads)
    for (int block = 0; block < z->out; block += 16)
        for (int tap = 0; tap < taps; tap++) {
            const int rows = z->out - block < 16 ? z->out - block : 16;
            real *in = w + block * row + (long)tap * z->in, *out = t + (long)tap * z->in * z->out + block;
            if (!tap_used(z, tap)) {
                if (back)
                    for (int o = 0; o < rows; o++) memset(in + o * row, 0, sizeof(real) * (size_t)z->in);
            } else if (back) turn(out, z->out, in, row, z->in, rows);
            else turn(in, row, out, z->out, rows, z->in);
        }
}

/* ---- pooling; the first maximum of a window in row-major order gets its gradient, as in PyTorch ---- */

/* Output cell (a, b) of frame m. */
static inline long pooled(const shape *z, int m, int a, int b) {
    const long frame = (long)(m / z->some) * z->all + m % z->some;
    return ((frame * z->out_height + a) * z->out_width + b) * z->in;
}

void max_pool(const shape *z, const real *x, real *y, uint8_t *at) {
    const int C = z->in, K = z->kernel;
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m++)
        for (int a = 0; a < z->out_height; a++)
            for (int b = 0; b < z->out_width; b++) {
                const long o = pooled(z, m, a, b);
                for (int c = 0; c < C; c++) y[o + c] = -INFINITY, at[o + c] = 0;
                for (int tap = 0; tap < K * K; tap++) {
                    const int h = a * z->stride + tap / K - z->padding, v = b * z->stride + tap % K - z->padding;
                    if (h < 0 || h >= z->height || v < 0 || v >= z->width) continue;
                    const real *xs = x + (((long)m * z->height + h) * z->width + v) * C;
                    for (int c = 0; c < C; c++) {
                        const int better = xs[c] > y[o + c] || xs[c] != xs[c];
                        y[o + c] = better ? xs[c] : y[o + c];
                        at[o + c] = better ? (uint8_t)tap : at[o + c];
                    }
                }
            }
}

/* at: the winning taps of a max pool, or NULL for an average over all kernel^2 cells, padding included. */
void pool_grad(const shape *z, const real *dy, const uint8_t *at, real *dx) {
    const int C = z->in, K = z->kernel;
    const real share = (real)1 / (real)(K * K);
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m++)
        for (int h = 0; h < z->height; h++)
            for (int v = 0; v < z->width; v++) {
                real *d = dx + (((long)m * z->height + h) * z->width + v) * C;
                memset(d, 0, sizeof(real) * (size_t)C);
                for (int p = K - 1; p >= 0; p--) /* output cells in ascending order */
                    for (int q = K - 1; q >= 0; q--) {
                        const int a = meets(h, p, z->stride, z->padding, z->out_height);
                        const int b = meets(v, q, z->stride, z->padding, z->out_width);
                        if (a < 0 || b < 0) continue;
                        const long o = (((long)m * z->out_height + a) * z->out_width + b) * C;
                        const uint8_t tap = (uint8_t)(p * K + q);
                        if (at)
                            for (int c = 0; c < C; c++) d[c] += at[o + c] == tap ? dy[o + c] : 0;
                        else
                            for (int c = 0; c < C; c++) d[c] += dy[o + c] * share;
                    }
            }
}

void avg_pool(const shape *z, const real *x, real *y) {
    const int C = z->in, K = z->kernel;
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m++)
        for (int a = 0; a < z->out_height; a++)
            for (int b = 0; b < z->out_width; b++) {
                real *o = y + pooled(z, m, a, b);
                memset(o, 0, sizeof(real) * (size_t)C);
                for (int tap = 0; tap < K * K; tap++) {
                    const int h = a * z->stride + tap / K - z->padding, v = b * z->stride + tap % K - z->padding;
                    if (h < 0 || h >= z->height || v < 0 || v >= z->width) continue;
                    const real *xs = x + (((long)m * z->height + h) * z->width + v) * C;
                    for (int c = 0; c < C; c++) o[c] += xs[c];
                }
                for (int c = 0; c < C; c++) o[c] /= (real)(K * K);
            }
}

/* ---- batch statistics of y [f rows c], frame f counted weight[f] times: mean and biased variance ---- */

void batch_stats(const real *y, const int *weight, int f, long rows, int C, double *mean, double *var, int threads) {
    double *part = malloc(sizeof(double) * (size_t)threads * C);
    double total = 0;
    for (int i = 0; i < f; i++) total += (double)weight[i] * (double)rows;
    for (int pass = 0; pass < 2; pass++) {
        memset(part, 0, sizeof(double) * (size_t)threads * C);
        PARALLEL(threads)
        for (int k = 0; k < threads; k++) {
            double *sum = part + (long)k * C;
            real *near = malloc(sizeof(real) * (size_t)C * 2), *mu = near + C;
            for (int c = 0; c < C; c++) mu[c] = pass ? (real)mean[c] : 0;
            const long first = (long)f * rows * k / threads, last = (long)f * rows * (k + 1) / threads;
            for (long r = first; r < last;) {
                const int w = weight[r / rows];
                long end = r + 64 < last ? r + 64 : last; /* few rows in single precision, then on in double */
                if (end > (r / rows + 1) * rows) end = (r / rows + 1) * rows;
                memset(near, 0, sizeof(real) * (size_t)C);
                for (; r < end; r++) {
                    const real *x = y + r * C;
                    if (pass)
                        for (int c = 0; c < C; c++) near[c] += (x[c] - mu[c]) * (x[c] - mu[c]);
                    else
                        for (int c = 0; c < C; c++) near[c] += x[c];
                }
                for (int c = 0; c < C; c++) sum[c] += (double)w * (double)near[c];
            }
            free(near);
        }
        double *out = pass ? var : mean;
        for (int c = 0; c < C; c++) {
            out[c] = 0;
            for (int k = 0; k < threads; k++) out[c] += part[(long)k * C + c];
            out[c] /= total;
        }
        /* the second pass is taken around the mean as rounded to real: correct for it */
        if (pass)
            for (int c = 0; c < C; c++) {
                const double d = mean[c] - (double)(real)mean[c];
                var[c] -= d * d;
            }
    }
    free(part);
}

/* g becomes the gradient through training BatchNorm: scale (g - count/total (sum g + xhat sum g xhat)), frame by frame. */
void norm_grad(real *g, const real *y, const int *weight, int f, long rows, int C, const real *mean, const real *inv,
               const real *scale, const real *sum_g, const real *sum_gx, double total, int threads) {
    PARALLEL(threads)
    for (long r = 0; r < (long)f * rows; r++) {
        const real share = (real)((double)weight[r / rows] / total);
        const real *x = y + r * C;
        real *d = g + r * C;
        for (int c = 0; c < C; c++)
            d[c] = (d[c] - (sum_g[c] + (x[c] - mean[c]) * inv[c] * sum_gx[c]) * share) * scale[c];
    }
}

/* ---- bf16 products of the input gradient: w [taps out/2 in 2], rounded to nearest even; in a multiple of 16 ---- */

#if defined(__AVX512BF16__) && defined(__AVX512F__)
int has_bf16(void) { return sizeof(real) == 4; }

void pair_weights(const shape *z, const float *w, uint16_t *t) {
    const int taps = z->kernel * z->kernel;
    PARALLEL(z->threads)
    for (int tap = 0; tap < taps; tap++) {
        if (!tap_used(z, tap)) continue;
        for (int o = 0; o < z->out; o += 2) {
            const float *even = w + ((long)o * taps + tap) * z->in, *odd = even + (long)taps * z->in;
            uint32_t *pair = (uint32_t *)t + ((long)tap * (z->out / 2) + o / 2) * z->in;
            for (int c = 0; c < z->in; c += 16) {
                const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + c)));
                const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + c)));
                _mm512_storeu_si512(pair + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

NARROW void half_tile(const shape *z, const uint32_t *dy, const uint32_t *w, float *dx, int h, int v, const int nf,
                      const int nb) {
    const int K = z->kernel, pairs = z->out / 2;
    const long frame = (long)z->out_height * z->out_width * pairs, image = (long)z->height * z->width * z->in;
    __m512 acc[FRAMES][4];
    for (int f = 0; f < nf; f++)
        for (int i = 0; i < nb; i++) acc[f][i] = _mm512_setzero_ps();
    for (int p = 0; p < K; p++) {
        const int a = meets(h, p, z->stride, z->padding, z->out_height);
        if (a < 0) continue;
        for (int q = 0; q < K; q++) {
            const int b = meets(v, q, z->stride, z->padding, z->out_width);
            if (b < 0) continue;
            const uint32_t *g = dy + ((long)a * z->out_width + b) * pairs;
            const uint32_t *r = w + (long)(p * K + q) * pairs * z->in;
            for (int c = 0; c < pairs; c++) {
                __m512bh u[4];
                for (int i = 0; i < nb; i++) u[i] = (__m512bh)_mm512_loadu_si512(r + (long)c * z->in + i * 16);
                for (int f = 0; f < nf; f++) {
                    const __m512bh s = (__m512bh)_mm512_set1_epi32((int)g[f * frame + c]);
                    for (int i = 0; i < nb; i++) acc[f][i] = _mm512_dpbf16_ps(acc[f][i], u[i], s);
                }
            }
        }
    }
    for (int f = 0; f < nf; f++)
        for (int i = 0; i < nb; i++) _mm512_storeu_ps(dx + f * image + i * 16, acc[f][i]);
}

void input_grad_bf16(const shape *z, const float *dy, const uint16_t *w, float *dx) {
    const long cells = (long)z->out_height * z->out_width * z->out, image = (long)z->height * z->width * z->in;
    PARALLEL(z->threads)
    for (int m = 0; m < z->frames; m += FRAMES) {
        const int nf = z->frames - m < FRAMES ? z->frames - m : FRAMES;
        uint16_t *g = malloc(sizeof(uint16_t) * (size_t)(cells * nf + 16));
        for (long i = 0; i < cells * nf; i += 16)
            _mm256_storeu_si256((__m256i *)(g + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(dy + m * cells + i)));
        for (int block = 0; block < z->in;) {
            const int nb = z->in - block >= 64 ? 4 : z->in - block >= 32 ? 2 : 1;
            for (int c = 0; c < z->height * z->width; c++) {
                float *d = dx + m * image + (long)c * z->in + block;
                const uint32_t *u = (const uint32_t *)w + block, *gp = (const uint32_t *)g;
                const int h = c / z->width, v = c % z->width;
                if (nf == FRAMES && nb == 4) half_tile(z, gp, u, d, h, v, FRAMES, 4);
                else if (nf == FRAMES && nb == 2) half_tile(z, gp, u, d, h, v, FRAMES, 2);
                else if (nf == FRAMES) half_tile(z, gp, u, d, h, v, FRAMES, 1);
                else
                    for (int f = 0; f < nf; f++) {
                        const uint32_t *gf = gp + f * cells / 2;
                        if (nb == 4) half_tile(z, gf, u, d + f * image, h, v, 1, 4);
                        else if (nb == 2) half_tile(z, gf, u, d + f * image, h, v, 1, 2);
                        else half_tile(z, gf, u, d + f * image, h, v, 1, 1);
                    }
            }
            block += nb * 16;
        }
        free(g);
    }
}
#else
int has_bf16(void) { return 0; }
void pair_weights(const shape *z, const float *w, uint16_t *t) {}
void input_grad_bf16(const shape *z, const float *dy, const uint16_t *w, float *dx) {}
#endif
