/* block.c: the operators of precision.py for a CPU, each in one pass over memory, and model.Block in one call.

Written once for every vector width with the vector types of GCC and Clang. A number is rounded by `rounded`, on its way
to memory, and nowhere else. Sums run in an order that depends on the row alone, never on how many rows share the call.
operators/compiled.py compiles this file (some seconds), loads it, and says what takes the place of what.

Names as in precision.py: B rows, T tokens, H heads, KV key/value heads, D head width. Matrices are FP32 and row-major. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16                                  /* floats in a vector */
#define MR 12                                  /* rows of the product's register tile: MR x 2 vectors of sums */
#elif defined(__AVX__)
#define VL 8
#define MR 6
#else
#define VL 4
#define MR 8
#endif
#define NR (2 * VL)
#define QUERIES 60                             /* query rows whose probabilities exist at a time */
#define INLINE static inline __attribute__((always_inline))
#define PARALLEL(work) _Pragma(STRING(omp parallel for schedule(static) if ((work) > 20000)))
#define STRING(...) #__VA_ARGS__

typedef int64_t i64;                           /* Windows' long has 32 bits */
_Static_assert(sizeof(void *) == 8, "compiled.py passes addresses of 64 bits");

typedef float vf __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * VL), aligned(4), may_alias));

INLINE i64 up(i64 n, i64 unit) { return (n + unit - 1) / unit * unit; }
INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE vf all(float s) { return s - (vf){}; }
INLINE vi alli(int32_t s) { return s - (vi){}; }
INLINE vf pick(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }
INLINE vf larger(vf a, vf b) { return pick((a > b) | (a != a), a, b); }                 /* a nan in a stays */

/* m floats at p, the rest of the vector filled up; m is VL but at the end of a row */
INLINE vf load(const float *p, int m, float fill) {
    if (m == VL) return *(const vf *)p;
    vf v = all(fill);
    memcpy(&v, p, 4 * m);
    return v;
}
INLINE void store(float *p, vf v, int m) {
    if (m == VL) *(vf *)p = v;
    else memcpy(p, &v, 4 * m);
}
/* EACH(n, body): body for i = 0, VL, 2 VL ... below n, with m floats at i */
#define EACH(n, ...) { i64 i = 0; for (; i + VL <= (n); i += VL) { const int m = VL; __VA_ARGS__; } \
                       if (i < (n)) { const int m = (n) - i; __VA_ARGS__; } }

INLINE float sum(vf v) {
    for (int h = VL / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}

INLINE float greatest(vf v) {                       /* nan if there is one */
    float g = v[0];
    for (int i = 1; i < VL; i++) g = v[i] > g || v[i] != v[i] ? v[i] : g;
    return g;
}

/* e^x for x <= 88, 2 units in the last place; 0 below -87.3, nan for nan */
INLINE vf vexp(vf x) {
    vf t = x * 1.44269504f + 12582912.f, n = t - 12582912.f;                            /* n: nearest whole number */
    vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    vf y = (vf)((vi)p + ((vi)t << 23));                                                 /* times 2^n: n is in t's last bits */
    return pick(x < -87.3f, all(0.f), y);
}
INLINE vf sigmoid(vf x) {                           /* the smaller of e^x and e^-x, so that nothing overflows */
    vf e = vexp(-(vf)((vi)x & 0x7fffffff)), s = 1.f / (1.f + e);
    return pick(x < 0.f, e * s, s);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Rounding to nearest even, as precision.emulate does it. `kind` does not change in a loop: the compiler asks for it once */

typedef struct { int32_t kind, cut; float tiny, big, max; } format;
_Static_assert(sizeof(format) == 20, "as compiled.py has it");
enum { FP32, FP16, WIDE, ANY };           /* WIDE: FP32's exponent bits, fewer mantissa bits */

INLINE vf cut_bits(vf x, int cut) {
    vi b = (vi)x;
    vi r = (b + (((b >> cut) & 1) + ((1 << (cut - 1)) - 1))) & -(1 << cut);
    return pick((b & 0x7fffffff) > 0x7f800000, x, (vf)r);                              /* nan stays nan */
}

INLINE vf any_format(vf x, format f) {
    vf y = f.cut ? cut_bits(x, f.cut) : x;
    vf a = (vf)((vi)x & 0x7fffffff), sign = (vf)((vi)x & alli(INT32_MIN));
    vf sub = (vf)((vi)((a + f.big) - f.big) | (vi)sign);
    vf inf = (vf)((vi)all(INFINITY) | (vi)sign);
    y = pick((vi)((vf)((vi)y & 0x7fffffff) > f.max), inf, y);
    return pick(a < f.tiny, sub, y);
}

INLINE vf rounded(vf x, format f) {
    if (f.kind == FP32) return x;
    if (f.kind == WIDE) return cut_bits(x, f.cut);
#if defined(__AVX512F__)
    if (f.kind == FP16) return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 0));
#elif defined(__F16C__)
    if (f.kind == FP16) return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, 0));
#endif
    return any_format(x, f);
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* One vector at a time */

/* z = round(x + y), or round(x) without y; z may be x */
void add(const float *x, const float *y, float *z, i64 n, format f) {
    PARALLEL(n) for (i64 b = 0; b < n; b += 4096) {
        i64 e = n - b < 4096 ? n - b : 4096;
        const float *xb = x + b, *yb = y ? y + b : 0;
        float *zb = z + b;
        if (yb) EACH(e, store(zb + i, rounded(load(xb + i, m, 0) + load(yb + i, m, 0), f), m))
        else EACH(e, store(zb + i, rounded(load(xb + i, m, 0), f), m))
    }
}

/* x (rows, 2F) -> silu(first half) * second half */
static void swiglu(const float *x, float *y, i64 rows, i64 F, format f) {
    PARALLEL(rows * F) for (i64 r = 0; r < rows; r++) {
        const float *g = x + r * 2 * F, *v = g + F;
        float *o = y + r * F;
        EACH(F, {
            vf a = load(g + i, m, 0);
            store(o + i, rounded(a * sigmoid(a) * load(v + i, m, 0), f), m);
        })
    }
}

/* ... and back: dy (rows, F) -> dx (rows, 2F); if y is given, the output once more */
static void swiglu_back(const float *x, const float *dy, float *dx, float *y, i64 rows, i64 F, format f) {
    PARALLEL(rows * F) for (i64 r = 0; r < rows; r++) {
        const float *g = x + r * 2 * F, *v = g + F, *d = dy + r * F;
        float *dg = dx + r * 2 * F, *dv = dg + F;
        EACH(F, {
            vf a = load(g + i, m, 0), b = load(v + i, m, 0), c = load(d + i, m, 0);
            vf s = sigmoid(a);
            if (y) store(y + r * F + i, rounded(a * s * b, f), m);
            store(dv + i, rounded(c * (a * s), f), m);
            store(dg + i, rounded(c * b * (s * (1.f + a * (1.f - s))), f), m);
        })
    }
}

/* x (B, T, H + 2 KV, D) <-> q, k rotated by the tables cos, sin (T, D/2), a table a row if `table` is not 0, and v as it is;
   strides: row, head and token of q, of k and of v; slots: where each row's k and v begin, if that is not the same for all */
static void rope(float *x, float *q, float *k, float *v, const int64_t *slots, const i64 *strides, i64 B, i64 T, i64 H, i64 KV, i64 D,
                  const float *cos, const float *sin, i64 table, i64 back, format f) {
    PARALLEL(B * T * (H + KV) * D) for (i64 bt = 0; bt < B * T; bt++) {
        i64 b = bt / T, t = bt % T;
        const float *c = cos + b * table + t * D / 2, *s = sin + b * table + t * D / 2;
        for (i64 h = 0; h < H + 2 * KV; h++) {
            const int which = (h >= H) + (h >= H + KV);
            const i64 *st = strides + 3 * which;
            float *p = x + (bt * (H + 2 * KV) + h) * D, *o = which == 0 ? q : which == 1 ? k : v;
            o += b * st[0] + (h - (which == 0 ? 0 : which == 1 ? H : H + KV)) * st[1] + (t + (slots && which ? slots[b] : 0)) * st[2];
            if (which == 2 && back) EACH(D, store(p + i, rounded(load(o + i, m, 0), f), m))
            else if (which == 2) memcpy(o, p, 4 * D);
            else if (back) EACH(D / 2, {                                /* the inverse of a rotation by a is one by -a */
                vf ci = load(c + i, m, 0), si = load(s + i, m, 0), y = load(o + i, m, 0), z = load(o + D / 2 + i, m, 0);
                store(p + i, rounded(y * ci + z * si, f), m);
                store(p + D / 2 + i, rounded(z * ci - y * si, f), m);
            })
            else EACH(D / 2, {
                vf ci = load(c + i, m, 0), si = load(s + i, m, 0), y = load(p + i, m, 0), z = load(p + D / 2 + i, m, 0);
                store(o + i, rounded(y * ci - z * si, f), m);
                store(o + D / 2 + i, rounded(z * ci + y * si, f), m);
            })
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* One row at a time */

/* x / sqrt(mean(x^2) + eps) * w; scale (rows) keeps 1 / sqrt(...) for the way back */
static void rms_norm(const float *x, const float *w, float eps, float *y, float *scale, i64 rows, i64 C, format f) {
    PARALLEL(rows * C) for (i64 r = 0; r < rows; r++) {
        const float *p = x + r * C;
        vf q = {};
        EACH(C, { vf a = load(p + i, m, 0); q += a * a; })
        float s = 1.f / sqrtf(sum(q) / C + eps);
        scale[r] = s;
        EACH(C, store(y + r * C + i, rounded(load(p + i, m, 0) * s * load(w + i, m, 0), f), m))
    }
}

static void rms_norm_back(const float *x, const float *w, const float *scale, const float *dy, float *dx, float *dw,
                           i64 rows, i64 C, i64 parts, format f) {
    PARALLEL(rows * C) for (i64 part = 0; part < parts; part++) {       /* dw (parts, C): a row a part, summed by the caller */
        float *dwp = dw + part * C;
        memset(dwp, 0, 4 * C);
        for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
            const float *p = x + r * C, *d = dy + r * C;
            vf q = {};
            EACH(C, {
                vf t = load(d + i, m, 0) * (load(p + i, m, 0) * scale[r]);
                q += t * load(w + i, m, 0);
                store(dwp + i, load(dwp + i, m, 0) + t, m);
            })
            float mean = sum(q) / C;
            EACH(C, store(dx + r * C + i, rounded((load(d + i, m, 0) * load(w + i, m, 0)
                                                   - load(p + i, m, 0) * scale[r] * mean) * scale[r], f), m))
        }
    }
}

typedef struct { float top, total, dot; } softmax_sums;

/* row -> e^x with x = row - its maximum, in place; returns the maximum, the sum of e^x, and if asked for that of x e^x */
INLINE softmax_sums exponentials(float *row, i64 V, const int with_dot) {
    vf g = all(-INFINITY), q = {}, d = {};
    EACH(V, g = larger(load(row + i, m, -INFINITY), g))
    float top = greatest(g);
    EACH(V, {
        vf x = load(row + i, m, -INFINITY) - top, e = vexp(x);
        store(row + i, e, m);
        q += e;
        if (with_dot) d += pick(x < -87.3f, all(0.f), x * e);
    })
    return (softmax_sums){top, sum(q), with_dot ? sum(d) : 0};
}
INLINE void tempered(float *row, i64 V, float temperature) {
    if (temperature != 1.f) EACH(V, store(row + i, load(row + i, m, 0) / temperature, m))
}

/* logits (N, V), overwritten with the probabilities -> log-prob of targets (N), entropy (N) */
void token_logprobs(float *logits, const int64_t *targets, float temperature, float *logp, float *entropy, i64 N, i64 V) {
    PARALLEL(N * V) for (i64 r = 0; r < N; r++) {
        float *row = logits + r * V;
        tempered(row, V, temperature);
        float target = row[targets[r]];
        softmax_sums s = exponentials(row, V, 1);
        float log_total = logf(s.total), inverse = 1.f / s.total;
        EACH(V, store(row + i, load(row + i, m, 0) * inverse, m))
        logp[r] = (target - s.top) - log_total;
        entropy[r] = log_total - s.dot * inverse;
    }
}

/* probabilities (N, V), overwritten with the logits' gradient */
void token_logprobs_back(float *p, const int64_t *targets, float temperature, const float *dlogp, i64 N, i64 V,
                                 format f) {
    PARALLEL(N * V) for (i64 r = 0; r < N; r++) {
        float *row = p + r * V, d = -dlogp[r] / temperature;
        row[targets[r]] -= 1.f;                                         /* d logp / d logits = onehot - softmax */
        EACH(V, store(row + i, rounded(load(row + i, m, 0) * d, f), m))
    }
}

#define STRIDE 64
/* the sum of up to STRIDE numbers, in double */
INLINE double wide_sum(const float *e, i64 n) {
    double part[8] = {0}, s = 0;
    i64 i = 0;
    for (; i + 8 <= n; i += 8) for (int j = 0; j < 8; j++) part[j] += e[i + j];
    for (; i < n; i++) s += e[i];
    for (int j = 0; j < 8; j++) s += part[j];
    return s;
}

/* logits (N, V), overwritten; u (N) in [0, 1) -> a token drawn from softmax(logits / temperature), and its log-prob, computed as
   token_logprobs does. The first token at which the cumulative sum, in double, passes u times the total. */
void draw(float *logits, const double *u, float temperature, int64_t *token, float *logp, i64 N, i64 V) {
    _Pragma("omp parallel if (N * V > 20000)") {
        float *e = malloc(4 * V);                                       /* e^x, while the logits stay */
        _Pragma("omp for schedule(static)") for (i64 r = 0; r < N; r++) {
            float *row = logits + r * V;
            double total = 0, before = 0;
            tempered(row, V, temperature);
            memcpy(e, row, 4 * V);
            softmax_sums s = exponentials(e, V, 0);
            for (i64 i = 0; i < V; i += STRIDE) total += wide_sum(e + i, least(STRIDE, V - i));
            double goal = u[r] * total;
            i64 found = 0, left = 0;
            for (; left < V; left += STRIDE) {                          /* a stride at a time, then within it */
                double next = before + wide_sum(e + left, least(STRIDE, V - left));
                if (next > goal) break;
                before = next;
            }
            for (i64 j = left; j < V && j < left + STRIDE; j++) {
                if (e[j] > 0) found = j;                                /* the last one, should rounding pass over all */
                if ((before += e[j]) > goal) break;
            }
            token[r] = found;
            logp[r] = (row[found] - s.top) - logf(s.total);
        }
        free(e);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Matrix products: each number of the result is a sum from its first term to its last, whatever the number of rows */

/* c (m, w VL) = a b + start, K terms, in registers, w 1 or 2; a[i, k] at a[i * rs + k * ks], b[k] at b + k * bs. `more`: start
   is c, else the bias (which may be missing). `last`: the sum is complete and is rounded. */
INLINE void tile_(const int m, const int w, const float *a, i64 rs, i64 ks, const float *b, i64 bs, i64 K, float *c, i64 cs, int more,
                  const float *bias, int last, format f) {
    vf acc[MR][2];
    for (int i = 0; i < m; i++) for (int j = 0; j < w; j++) acc[i][j] = more ? *(vf *)(c + i * cs + j * VL) : (vf){};
    for (i64 k = 0; k < K; k++) {
        vf b0 = *(const vf *)(b + k * bs), b1 = w == 2 ? *(const vf *)(b + k * bs + VL) : b0;
        for (int i = 0; i < m; i++) {
            vf s = all(a[i * rs + k * ks]);
            acc[i][0] += s * b0;
            if (w == 2) acc[i][1] += s * b1;
        }
    }
    if (last && bias) for (int i = 0; i < m; i++) for (int j = 0; j < w; j++) acc[i][j] += *(const vf *)(bias + j * VL);
    if (last) for (int i = 0; i < m; i++) for (int j = 0; j < w; j++) *(vf *)(c + i * cs + j * VL) = rounded(acc[i][j], f);
    else for (int i = 0; i < m; i++) for (int j = 0; j < w; j++) *(vf *)(c + i * cs + j * VL) = acc[i][j];
}
#define CASES(m, call) switch (m) { \
    CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call) CASE(5, call) CASE(6, call) \
    CASE(7, call) CASE(8, call) CASE(9, call) CASE(10, call) CASE(11, call) CASE(12, call) }
#define CASE(n, call) case n: if (n <= MR) { const int rows = n <= MR ? n : 1; call; } break;

/* the tiles of attention, of a and of a transposed: nothing is rounded. n: columns, one vector or more than one */
static void tile(int m, i64 n, const float *a, i64 rs, const float *b, i64 bs, i64 K, float *c, i64 cs) {
    if (n > VL) CASES(m, tile_(rows, 2, a, rs, 1, b, bs, K, c, cs, 0, 0, 0, (format){0}))
    else CASES(m, tile_(rows, 1, a, rs, 1, b, bs, K, c, cs, 0, 0, 0, (format){0}))
}
static void tile_t(int m, i64 n, const float *a, i64 ks, const float *b, i64 bs, i64 K, float *c, i64 cs) {
    if (n > VL) CASES(m, tile_(rows, 2, a, 1, ks, b, bs, K, c, cs, 1, 0, 0, (format){0}))
    else CASES(m, tile_(rows, 1, a, 1, ks, b, bs, K, c, cs, 1, 0, 0, (format){0}))
}

/* w (N, K) with the given strides -> panels (N / NR, K, NR), zeros after the last row: the order in which products read it */
void pack(const float *w, i64 stride_n, i64 stride_k, float *panels, i64 N, i64 K) {
    PARALLEL(N * K) for (i64 p = 0; p < up(N, NR); p += NR)
        for (i64 k = 0; k < K; k++)
            for (i64 j = 0; j < NR; j++) panels[p * K + k * NR + j] = p + j < N ? w[(p + j) * stride_n + k * stride_k] : 0;
}

i64 panel_width(void) { return NR; }
i64 parallel(void) {                                       /* whether it was compiled with OpenMP */
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

#define ROWS 192                                   /* rows whose sums are in work at a time: they stay in the second cache */
#define TERMS 384                                  /* ... and terms: with 2 VL columns of weights they stay in the first */

static void panel_tile(int m, const float *x, i64 K, const float *w, i64 terms, float *y, i64 N, int more, const float *bias,
                       int last, format f) {
    CASES(m, tile_(rows, 2, x, K, 1, w, NR, terms, y, N, more, bias, last, f))
}

/* y (M, N) = round(x (M, K) w^T + bias), w as pack left it; bias padded with zeros to a multiple of NR, or missing */
void linear(const float *x, const float *w, const float *bias, float *y, i64 M, i64 N, i64 K, i64 threads, format f) {
    i64 parts = up((M + ROWS - 1) / ROWS, threads), rows = up((M + parts - 1) / parts, MR), panels = (N + NR - 1) / NR;
    parts = (M + rows - 1) / rows;
    i64 groups = parts >= threads ? 1 : least(panels, threads);        /* few rows: share out the columns */
    PARALLEL(M * N * K / 64) for (i64 part = 0; part < parts * groups; part++) {
        i64 i0 = part / groups * rows, i1 = least(i0 + rows, M), g = part % groups;
        float edge[MR * NR];
        for (i64 k = 0; k < K; k += TERMS) for (i64 p = panels * g / groups; p < panels * (g + 1) / groups; p++) {
            const float *wp = w + p * NR * K, *bp = bias ? bias + p * NR : 0;
            for (i64 i = i0; i < i1; i += MR) {
                int m = least(MR, i1 - i);
                if (p * NR + NR <= N) {
                    panel_tile(m, x + i * K + k, K, wp + k * NR, least(TERMS, K - k), y + i * N + p * NR, N, k > 0, bp,
                               k + TERMS >= K, f);
                } else if (k == 0) {                                    /* the last columns, where a vector would reach too far */
                    panel_tile(m, x + i * K, K, wp, K, edge, NR, 0, bp, 1, f);
                    for (int r = 0; r < m; r++) memcpy(y + (i + r) * N + p * NR, edge + r * NR, 4 * (N - p * NR));
                }
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* Attention: a (row, key head) pair at a time, the query heads that share it one after another */

typedef struct {                    /* shapes and strides (row, head, token) of one call; features are next to each other */
    int64_t B, H, KV, Tq, Tk, D, causal, q[3], k[3], v[3], o[3], dout[3], dq[3], dk[3], dv[3], mask[2];
} shape;
_Static_assert(sizeof(shape) == 264, "as compiled.py has it");
#define AT(p, s, b, h, t) ((p) + (b) * (s)[0] + (h) * (s)[1] + (t) * (s)[2])

/* (T, D) with rows `stride` apart, times scale -> (T / NR, D, NR), zeros after the end */
static void turn(const float *x, i64 stride, float scale, float *y, i64 T, i64 D) {
    for (i64 p = 0; p < T; p += NR)
        for (i64 d = 0; d < D; d++)
            for (i64 j = 0; j < NR; j++) y[p * D + d * NR + j] = p + j < T ? x[(p + j) * stride + d] * scale : 0;
}

/* scores of one query: -inf where it may not look */
INLINE void hide(float *s, i64 n, i64 seen, const uint8_t *mask) {
    if (mask) for (i64 j = 0; j < seen; j++) if (!mask[j]) s[j] = -INFINITY;
    for (i64 j = seen; j < n; j++) s[j] = -INFINITY;
}
#define MASK(b, t) (mask ? mask + (b) * s->mask[0] + (t) * s->mask[1] : 0)

/* softmax(q k^T / sqrt(D)) v; sums (B, H, Tq, 2): largest score and 1 / sum of exponentials, for the way back */
static void attention(const float *q, const float *k, const float *v, const uint8_t *mask, float *out, float *sums,
                       const shape *s, format f) {
    const i64 D = s->D, Tq = s->Tq, Tk = s->Tk, W = up(Tk, NR), G = s->H / s->KV;
    _Pragma("omp parallel") {
        float *Kt = malloc(4 * W * D), *S = malloc(4 * MR * W), O[MR * NR];
        _Pragma("omp for schedule(static)") for (i64 bk = 0; bk < s->B * s->KV; bk++) {
            i64 b = bk / s->KV, kv = bk % s->KV;
            turn(AT(k, s->k, b, kv, 0), s->k[2], 1.f / sqrtf(D), Kt, Tk, D);
            for (i64 h = kv * G; h < (kv + 1) * G; h++) for (i64 t = 0; t < Tq; t += MR) {
                int m = least(MR, Tq - t);
                i64 n = s->causal ? t + m : Tk, N = up(n, NR);
                float inverse[MR], *keep = sums + ((b * s->H + h) * Tq + t) * 2;
                for (i64 p = 0; p < n; p += NR) tile(m, NR, AT(q, s->q, b, h, t), s->q[2], Kt + p * D, NR, D, S + p, W);
                for (i64 i = 0; i < m; i++) {
                    hide(S + i * W, N, s->causal ? t + i + 1 : Tk, MASK(b, t + i));
                    softmax_sums x = exponentials(S + i * W, N, 0);
                    keep[2 * i] = x.top, keep[2 * i + 1] = inverse[i] = 1.f / x.total;
                }
                for (i64 d = 0; d < D; d += NR) {
                    i64 wide = least(NR, D - d);
                    tile(m, wide, S, W, AT(v, s->v, b, kv, 0) + d, s->v[2], n, O, NR);
                    for (i64 i = 0; i < m; i++) for (i64 j = 0; j < wide; j += VL)
                        *(vf *)(AT(out, s->o, b, h, t + i) + d + j) = rounded(*(vf *)(O + i * NR + j) * inverse[i], f);
                }
            }
        }
        free(Kt), free(S);
    }
}

static void attention_back(const float *q, const float *k, const float *v, const uint8_t *mask, const float *sums,
                            const float *dout, float *dq, float *dk, float *dv, const shape *s, format f) {
    const i64 D = s->D, Tq = s->Tq, Tk = s->Tk, W = up(Tk, NR), G = s->H / s->KV;
    const float scale = 1.f / sqrtf(D);
    _Pragma("omp parallel") {
        float *Kt = malloc(4 * W * D), *Vt = malloc(4 * W * D), *dK = malloc(4 * W * D), *dV = malloc(4 * W * D);
        float *P = malloc(4 * QUERIES * W), *dS = malloc(4 * QUERIES * W), O[MR * NR];
        _Pragma("omp for schedule(static)") for (i64 bk = 0; bk < s->B * s->KV; bk++) {
            i64 b = bk / s->KV, kv = bk % s->KV;
            const float *kb = AT(k, s->k, b, kv, 0);
            turn(kb, s->k[2], scale, Kt, Tk, D), turn(AT(v, s->v, b, kv, 0), s->v[2], 1, Vt, Tk, D);
            memset(dK, 0, 4 * Tk * D), memset(dV, 0, 4 * Tk * D);
            for (i64 h = kv * G; h < (kv + 1) * G; h++) for (i64 t0 = 0; t0 < Tq; t0 += QUERIES) {
                i64 c = least(QUERIES, Tq - t0), seen = s->causal ? t0 + c : Tk;
                for (i64 t = t0; t < t0 + c; t += MR) {
                    int m = least(MR, t0 + c - t);
                    i64 n = s->causal ? t + m : Tk, N = up(n, NR), rest = up(seen, NR) - N;
                    const float *kept = sums + ((b * s->H + h) * Tq + t) * 2;
                    float *Pt = P + (t - t0) * W, *dSt = dS + (t - t0) * W;
                    for (i64 p = 0; p < n; p += NR) {
                        tile(m, NR, AT(q, s->q, b, h, t), s->q[2], Kt + p * D, NR, D, Pt + p, W);
                        tile(m, NR, AT(dout, s->dout, b, h, t), s->dout[2], Vt + p * D, NR, D, dSt + p, W);
                    }
                    for (i64 i = 0; i < m; i++) {
                        float *p = Pt + i * W, *ds = dSt + i * W, top = kept[2 * i], inverse = kept[2 * i + 1];
                        vf both = {};
                        hide(p, N, s->causal ? t + i + 1 : Tk, MASK(b, t + i));
                        for (i64 j = 0; j < N; j += VL) {
                            vf e = *(vf *)(p + j) = vexp(*(vf *)(p + j) - top) * inverse;
                            both += e * *(vf *)(ds + j);
                        }
                        float mean = sum(both);                         /* of dP under P: what softmax takes away */
                        for (i64 j = 0; j < N; j += VL) *(vf *)(ds + j) = *(vf *)(p + j) * (*(vf *)(ds + j) - mean) * scale;
                        memset(p + N, 0, 4 * rest), memset(ds + N, 0, 4 * rest);
                    }
                    for (i64 d = 0; d < D; d += NR) {
                        i64 wide = least(NR, D - d);
                        tile(m, wide, dSt, W, kb + d, s->k[2], n, O, NR);
                        for (i64 i = 0; i < m; i++) for (i64 j = 0; j < wide; j += VL)
                            *(vf *)(AT(dq, s->dq, b, h, t + i) + d + j) = rounded(*(vf *)(O + i * NR + j), f);
                    }
                }
                for (i64 j = 0; j < seen; j += MR) for (i64 d = 0; d < D; d += NR) {
                    int m = least(MR, seen - j);
                    i64 wide = least(NR, D - d);
                    tile_t(m, wide, dS + j, W, AT(q, s->q, b, h, t0) + d, s->q[2], c, dK + j * D + d, D);
                    tile_t(m, wide, P + j, W, AT(dout, s->dout, b, h, t0) + d, s->dout[2], c, dV + j * D + d, D);
                }
            }
            for (i64 t = 0; t < Tk; t++) for (i64 d = 0; d < D; d += VL) {
                *(vf *)(AT(dk, s->dk, b, kv, t) + d) = rounded(*(vf *)(dK + t * D + d), f);
                *(vf *)(AT(dv, s->dv, b, kv, t) + d) = rounded(*(vf *)(dV + t * D + d), f);
            }
        }
        free(Kt), free(Vt), free(dK), free(dV), free(P), free(dS);
    }
}

/* One query: n vectors wide, the keys read where they lie in the cache */
INLINE void decode_head(const int n, const float *q, const float *k, i64 ks, const float *v, i64 vs, i64 next,
                        const uint8_t *mask, float *p, float *out, i64 Tk, float scale, format f) {
    vf w[16], o[16];
    for (int i = 0; i < n; i++) w[i] = *(const vf *)(q + i * VL), o[i] = (vf){};
    for (i64 t = 0; t < Tk; t += 4) {                                  /* four keys at a time; the last ones, if fewer, again */
        vf a[4];
        for (int j = 0; j < 4; j++) {
            const float *key = k + least(t + j, Tk - 1) * ks;
            a[j] = w[0] * *(const vf *)key;
            for (int i = 1; i < n; i++) a[j] += w[i] * *(const vf *)(key + i * VL);
            if (next) for (int i = 0; i < n; i += 64 / (4 * VL)) __builtin_prefetch(key + next + i * VL);
        }
        for (int j = 0; j < 4; j++) p[t + j] = sum(a[j]);
    }
    for (i64 t = 0; t < Tk; t++) p[t] = mask && !mask[t] ? -INFINITY : p[t] * scale;
    float inverse = 1.f / exponentials(p, Tk, 0).total;
    for (i64 t = 0; t < Tk; t++) {
        vf e = all(p[t]);
        for (int i = 0; i < n; i++) o[i] += e * *(const vf *)(v + t * vs + i * VL);
        if (next) for (int i = 0; i < n; i += 64 / (4 * VL)) __builtin_prefetch(v + t * vs + next + i * VL);
    }
    for (int i = 0; i < n; i++) *(vf *)(out + i * VL) = rounded(o[i] * inverse, f);
}
/* attention with Tq = 1; D at most 16 vectors */
static void decode(const float *q, const float *k, const float *v, const uint8_t *mask, float *out, const shape *s, format f) {
    const i64 Tk = s->Tk, G = s->H / s->KV, n = s->D / VL;
    const float scale = 1.f / sqrtf(s->D);
    _Pragma("omp parallel") {
        float *p = malloc(4 * up(Tk, NR));
        _Pragma("omp for schedule(static)") for (i64 b = 0; b < s->B; b++) for (i64 h = 0; h < s->H; h++) {
            const float *qh = AT(q, s->q, b, h, 0), *kh = AT(k, s->k, b, h / G, 0), *vh = AT(v, s->v, b, h / G, 0);
            const uint8_t *mb = MASK(b, 0);
            float *oh = AT(out, s->o, b, h, 0);
#define WIDE(c) case c: decode_head(c, qh, kh, s->k[2], vh, s->v[2], h % G ? 0 : s->k[1], mb, p, oh, Tk, scale, f); break;
            switch (n) { WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(6) WIDE(8) WIDE(10) WIDE(12) WIDE(14) WIDE(16) }
        }
        free(p);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */
/* model.Block in one call: the functions above in the order of Block.forward, some sequences at a time from end to end, so
   that what one leaves the next finds in the cache. operators/compiled.py uses it while the code is what this was
   written after. */

#define TOKENS 128                                 /* ... about so many tokens at a time */

typedef struct {                    /* rounded weights, matrices as pack left them, those of the way back too */
    const float *norm1, *qkv, *qkv_bias, *proj, *norm2, *gate_up, *down, *qkv_back, *proj_back, *gate_up_back, *down_back;
    int64_t C, H, KV, D, F, exact;
    float eps;
} layer;
_Static_assert(sizeof(layer) == 144, "as compiled.py has it");
typedef struct { float *scale1, *q, *sums, *att, *x2, *scale2, *gate_up; } kept;    /* a token a row; q, sums: (B, H, T, .) */
_Static_assert(sizeof(kept) == 56, "as compiled.py has it");

/* each thread takes an equal share of the sequences, and of these some at a time */
#define SEQUENCES(B, T, threads) for (i64 share = 0; share < (threads); share++) \
    for (i64 b = (B) * share / (threads), last = (B) * (share + 1) / (threads), rows; rows = least(some, last - b), b < last; b += rows)

/* x, y (B, T, C). k, v: where the new keys and values go (strides of s, rows from `slots` on); keys, values: where attention
   finds all Tk of them. keep: what the way back needs, or nothing where there is none. */
void block(const layer *w, const float *x, float *y, const kept *keep, float *k, float *v, const int64_t *slots, float *keys,
           float *values, const float *cos, const float *sin, i64 table, const uint8_t *mask, const shape *whole, i64 threads,
           format f) {
    const i64 C = w->C, H = w->H, KV = w->KV, D = w->D, F = w->F, T = whole->Tq, B = whole->B, A = H * D, Q = (H + 2 * KV) * D;
    const i64 some = (TOKENS + T - 1) / T, n = some * T;
    _Pragma("omp parallel") {
        float *scratch = malloc(4 * n * (Q + C + C + F + (keep ? 0 : 1 + A + 2 * H + A + C + 1 + 2 * F)));
        _Pragma("omp for schedule(static)") SEQUENCES(B, T, threads) {
            float *free_at = scratch;
#define TAKE(width) (free_at += n * (width)) - n * (width)
#define PLACE(name, width) (keep ? keep->name + b * T * (width) : TAKE(width))
            float *qkv = TAKE(Q), *out = TAKE(C), *h = TAKE(C), *silu = TAKE(F);
            float *scale1 = PLACE(scale1, 1), *q = PLACE(q, A), *sums = PLACE(sums, 2 * H), *att = PLACE(att, A);
            float *x2 = PLACE(x2, C), *scale2 = PLACE(scale2, 1), *gu = PLACE(gate_up, 2 * F);
            i64 tokens = rows * T;
            shape s = *whole;
            s.B = rows, s.q[0] = H * T * D, s.q[1] = T * D, s.q[2] = D, s.o[0] = T * A, s.o[1] = D, s.o[2] = A;
            i64 strides[9] = {s.q[0], s.q[1], s.q[2], s.k[0], s.k[1], s.k[2], s.v[0], s.v[1], s.v[2]};
            const uint8_t *seen = mask ? mask + b * s.mask[0] : 0;
            float *kb = keys + b * s.k[0], *vb = values + b * s.v[0];

            rms_norm(x + b * T * C, w->norm1, w->eps, h, scale1, tokens, C, f);
            linear(h, w->qkv, w->qkv_bias, qkv, tokens, Q, C, 1, f);
            rope(qkv, q, k + b * s.k[0], v + b * s.v[0], slots ? slots + b : 0, strides, rows, T, H, KV, D, cos + b * table,
                 sin + b * table, table, 0, f);
            if (T == 1 && !keep && !w->exact) decode(q, kb, vb, seen, att, &s, f);
            else attention(q, kb, vb, seen, att, sums, &s, f);
            linear(att, w->proj, 0, out, tokens, C, A, 1, f);
            add(x + b * T * C, out, x2, tokens * C, f);
            rms_norm(x2, w->norm2, w->eps, h, scale2, tokens, C, f);
            linear(h, w->gate_up, 0, gu, tokens, 2 * F, C, 1, f);
            swiglu(gu, silu, tokens, F, f);
            linear(silu, w->down, 0, out, tokens, C, F, 1, f);
            add(x2, out, y + b * T * C, tokens * C, f);
        }
        free(scratch);
    }
}

/* dw (O, I) += dy (n, O)^T x (n, I), the gradient of a weight. `panels` has room for n * (up(I, NR) + MR) floats. Both sides are
   copied into the order in which they are read: x as a whole, dy a few columns at a time. */
static void weight_gradient(const float *dy, const float *x, float *dw, i64 n, i64 O, i64 I, float *panels) {
    float *columns = panels + n * up(I, NR), edge[MR * NR];
    for (i64 i = 0; i < I; i += NR) for (i64 t = 0; t < n; t++) for (i64 j = 0; j < NR; j++)
        panels[i * n + t * NR + j] = i + j < I ? x[t * I + i + j] : 0;
    for (i64 o = 0; o < O; o += MR) {
        i64 m = least(MR, O - o);
        if (m == MR) for (i64 t = 0; t < n; t++) memcpy(columns + t * MR, dy + t * O + o, 4 * MR);
        else for (i64 t = 0; t < n; t++) for (i64 r = 0; r < m; r++) columns[t * MR + r] = dy[t * O + o + r];
        for (i64 i = 0; i < I; i += NR) {
            if (i + NR <= I) { tile_t(m, NR, columns, MR, panels + i * n, NR, n, dw + o * I + i, I); continue; }
            memset(edge, 0, sizeof edge);                               /* the last columns, where a vector would reach too far */
            tile_t(m, NR, columns, MR, panels + i * n, NR, n, edge, NR);
            for (i64 r = 0; r < m; r++) for (i64 j = 0; i + j < I; j++) dw[(o + r) * I + i + j] += edge[r * NR + j];
        }
    }
}

/* dy (B, T, C), the gradient of y -> dx, and in dw (threads, all of a layer's weights) theirs, a thread's share a row, to be
   added up: norm1, qkv, proj, norm2, gate_up, down, bias of qkv. What is cheap to make again was not kept and is made again. */
void block_back(const layer *w, const float *x, const kept *keep, const float *k, const float *v, const float *cos,
                const float *sin, const float *dy, float *dx, float *dw, const shape *whole, i64 threads, format f) {
    const i64 C = w->C, H = w->H, KV = w->KV, D = w->D, F = w->F, T = whole->Tq, B = whole->B, A = H * D, Q = (H + 2 * KV) * D;
    const i64 some = (TOKENS + T - 1) / T, n = some * T, weights = 2 * C + Q * C + C * A + 3 * F * C + (w->qkv_bias ? Q : 0);
    const i64 widest = up(C > A ? C > F ? C : F : A > F ? A : F, NR) + MR;
    format exact = {0};
    _Pragma("omp parallel") {
        float *scratch = malloc(4 * (n * (2 * F + 2 * F + C + C + C + A + Q + Q + 1 + widest) + C));
        _Pragma("omp for schedule(static)") SEQUENCES(B, T, threads) {
            float *free_at = scratch;
            float *dgu = TAKE(2 * F), *silu = TAKE(F), *dsilu = TAKE(F), *dout = TAKE(C), *dx2 = TAKE(C), *h = TAKE(C), *datt = TAKE(A), *dqkv = TAKE(Q);
            float *dq = TAKE(Q), *dk = dq + n * A, *dv = dk + n * KV * D, *scrap = TAKE(1), *panels = TAKE(widest), *dnorm = free_at;
            float *dnorm1 = dw + share * weights, *dWqkv = dnorm1 + C, *dWproj = dWqkv + Q * C, *dnorm2 = dWproj + C * A;
            float *dWgate_up = dnorm2 + C, *dWdown = dWgate_up + 2 * F * C, *dbias = dWdown + C * F;
            i64 tokens = rows * T, at = b * T;
            shape s = *whole;
            s.B = rows, s.q[0] = H * T * D, s.q[1] = T * D, s.q[2] = D, s.dout[0] = T * A, s.dout[1] = D, s.dout[2] = A;
            memcpy(s.dq, s.q, sizeof s.q);
            s.dk[0] = KV * T * D, s.dk[1] = T * D, s.dk[2] = D;
            memcpy(s.dv, s.dk, sizeof s.dk);
            i64 strides[9] = {s.q[0], s.q[1], s.q[2], s.dk[0], s.dk[1], s.dk[2], s.dv[0], s.dv[1], s.dv[2]};

            add(dy + at * C, 0, dout, tokens * C, f);
            linear(dout, w->down_back, 0, dsilu, tokens, F, C, 1, f);
            swiglu_back(keep->gate_up + at * 2 * F, dsilu, dgu, silu, tokens, F, f);
            weight_gradient(dout, silu, dWdown, tokens, C, F, panels);
            rms_norm(keep->x2 + at * C, w->norm2, w->eps, h, scrap, tokens, C, f);
            weight_gradient(dgu, h, dWgate_up, tokens, 2 * F, C, panels);
            linear(dgu, w->gate_up_back, 0, h, tokens, C, 2 * F, 1, f);                    /* from here on the gradient of h */
            rms_norm_back(keep->x2 + at * C, w->norm2, keep->scale2 + at, h, dx2, dnorm, tokens, C, 1, f);
            add(dnorm2, dnorm, dnorm2, C, exact);
            add(dout, dx2, dx2, tokens * C, f);
            weight_gradient(dx2, keep->att + at * A, dWproj, tokens, C, A, panels);
            linear(dx2, w->proj_back, 0, datt, tokens, A, C, 1, f);
            attention_back(keep->q + at * A, k + b * s.k[0], v + b * s.v[0], 0, keep->sums + at * 2 * H, datt, dq, dk, dv, &s, f);
            rope(dqkv, dq, dk, dv, 0, strides, rows, T, H, KV, D, cos, sin, 0, 1, f);
            if (w->qkv_bias) for (i64 t = 0; t < tokens; t++) add(dbias, dqkv + t * Q, dbias, Q, exact);
            rms_norm(x + at * C, w->norm1, w->eps, h, scrap, tokens, C, f);
            weight_gradient(dqkv, h, dWqkv, tokens, Q, C, panels);
            linear(dqkv, w->qkv_back, 0, h, tokens, C, Q, 1, f);
            rms_norm_back(x + at * C, w->norm1, keep->scale1 + at, h, dx + at * C, dnorm, tokens, C, 1, f);
            add(dnorm1, dnorm, dnorm1, C, exact);
            add(dx2, dx + at * C, dx + at * C, tokens * C, exact);
        }
        free(scratch);
    }
}
