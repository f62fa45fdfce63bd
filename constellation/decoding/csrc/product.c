/* y = x W^T + b, row by row the same whatever rows are computed together.

   Weights lie in panels of 16 outputs, within a panel input by input, so that an accumulator is a vector of outputs, no
   sum crosses its lanes and inputs are added one after another. A tile is as many rows and panels as sums fit the
   registers of the processor: 6 x 1 with AVX2, 6 x 4 with AVX-512, 6 x 1 with NEON, and 1 x 4, 1 x 8, 1 x 4 for a row
   alone. With fused multiply-adds all processors give the same bits.

   float    y = b + sum_i x_i w_oi
   int8     y = b + t_o s sum_i round(x_i / s) q_oi,     w_oi = t_o q_oi,   s = max_i |x_i| / levels
            q has 127 levels to each side and x as many as leave the sum of products room in 32 bits, at most 32767:
            the sum is exact, and pairs of 16-bit products are added in one instruction, which saturates nowhere. */

#include "vector.h"

#define BLOCK 96 /* rows whose inputs stay in the cache while all panels pass by */
#define MOST_ROWS 6
#define MOST_PANELS 8
#define EVEN(inputs) (((inputs) + 1) / 2 * 2)

typedef int16_t pairs __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

INLINE int fitting(int rows)
{
    const int most = SUMS / (rows * VECTORS);
    return most >= 8 ? 8 : most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

INLINE void tile_float(const int rows, const int panels, const float *x, int64_t x_stride, const struct panels *w,
                       int64_t o, float *y, int64_t y_stride, int onto)
{
    const int64_t inputs = w->inputs;
    const float *weights = (const float *)w->weights + o * inputs;
    vec sum[MOST_ROWS][MOST_PANELS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) {
                const int64_t at = p * WIDE + v * LANES;
                sum[r][p][v] = onto ? load(y + r * y_stride + at) : w->bias ? load(w->bias + o + at) : same(0);
            }
    for (int64_t i = 0; i < inputs; i++, weights += WIDE) {
        if (panels == 1) {
            vec weight[VECTORS];
            for (int v = 0; v < VECTORS; v++) weight[v] = load(weights + v * LANES);
            for (int r = 0; r < rows; r++) {
                const vec factor = same(x[r * x_stride + i]);
                for (int v = 0; v < VECTORS; v++) sum[r][0][v] = fused(weight[v], factor, sum[r][0][v]);
            }
        } else {
            vec factor[MOST_ROWS];
            for (int r = 0; r < rows; r++) factor[r] = same(x[r * x_stride + i]);
            for (int p = 0; p < panels; p++)
                for (int v = 0; v < VECTORS; v++) {
                    const vec weight = load(weights + p * inputs * WIDE + v * LANES);
                    for (int r = 0; r < rows; r++) sum[r][p][v] = fused(weight, factor[r], sum[r][p][v]);
                }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) store(y + r * y_stride + p * WIDE + v * LANES, sum[r][p][v]);
}

/* Two weights for each lane. */
INLINE pairs widened(const int8_t *at)
{
#if LANES == 16
    return (pairs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)at));
#elif LANES == 8
    return (pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at));
#elif defined(__aarch64__)
    return (pairs)vmovl_s8(vld1_s8(at));
#else
    pairs wide;
    for (int j = 0; j < 2 * LANES; j++) wide[j] = at[j];
    return wide;
#endif
}

/* sum + x_0 w_0 + x_1 w_1 in each lane: `x` two 16-bit numbers, `w` two for each lane. */
INLINE ivec add_pairs(ivec sum, int32_t x, pairs w)
{
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ivec)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(x), (__m512i)w);
#elif LANES == 16
    return sum + (ivec)_mm512_madd_epi16(_mm512_set1_epi32(x), (__m512i)w);
#elif LANES == 8 && defined(__AVXVNNI__)
    return (ivec)_mm256_dpwssd_avx_epi32((__m256i)sum, _mm256_set1_epi32(x), (__m256i)w);
#elif LANES == 8
    return sum + (ivec)_mm256_madd_epi16(_mm256_set1_epi32(x), (__m256i)w);
#elif defined(__SSE2__)
    return sum + (ivec)_mm_madd_epi16(_mm_set1_epi32(x), (__m128i)w);
#elif defined(__aarch64__)
    const int16x8_t both = vreinterpretq_s16_s32(vdupq_n_s32(x));
    const int32x4_t low = vmull_s16(vget_low_s16(both), vget_low_s16((int16x8_t)w));
    return sum + (ivec)vpaddq_s32(low, vmull_high_s16(both, (int16x8_t)w));
#else
    int16_t both[2];
    memcpy(both, &x, sizeof x);
    for (int j = 0; j < LANES; j++) sum[j] += both[0] * w[2 * j] + both[1] * w[2 * j + 1];
    return sum;
#endif
}

INLINE void tile_int8(const int rows, const int panels, const int16_t *x, int64_t x_stride, const float *x_scale,
                      const struct panels *w, int64_t o, float *y, int64_t y_stride, int onto)
{
    const int64_t inputs = EVEN(w->inputs);
    const int8_t *weights = (const int8_t *)w->weights + o * inputs;
    ivec sum[MOST_ROWS][MOST_PANELS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) sum[r][p][v] = (ivec){0};
    for (int64_t i = 0; i < inputs; i += 2, weights += 2 * WIDE)
        for (int p = 0; p < panels; p++) {
            pairs weight[VECTORS];
            for (int v = 0; v < VECTORS; v++)
                weight[v] = widened(weights + p * inputs * WIDE + 2 * v * LANES);
            for (int r = 0; r < rows; r++) {
                int32_t both;
                memcpy(&both, x + r * x_stride + i, sizeof both);
                for (int v = 0; v < VECTORS; v++) sum[r][p][v] = add_pairs(sum[r][p][v], both, weight[v]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int v = 0; v < VECTORS; v++) {
                const int64_t at = p * WIDE + v * LANES;
                const vec start = onto ? load(y + r * y_stride + at) : w->bias ? load(w->bias + o + at) : same(0);
                const vec whole = __builtin_convertvector(sum[r][p][v], vec) * load(w->scale + o + at);
                store(y + r * y_stride + at, fused(whole, same(x_scale[r]), start));
            }
}

/* x in whole steps of s; s is not finite where a number of x is not. */
static void quantise(const float *x, int64_t x_stride, int64_t rows, int64_t inputs, int16_t *q, float *scale)
{
    const int64_t room = INT32_MAX / (127 * EVEN(inputs)), whole = inputs / WIDE * WIDE;
    const float levels = room < INT16_MAX ? room : INT16_MAX;
    for (int64_t r = 0; r < rows; r++, x += x_stride, q += EVEN(inputs)) {
        vec size[VECTORS], odd[VECTORS]; /* `odd`: 0, or not a number */
        for (int v = 0; v < VECTORS; v++) size[v] = odd[v] = same(0);
        for (int64_t i = 0; i < whole; i += WIDE)
            for (int v = 0; v < VECTORS; v++) {
                const vec here = load(x + i + v * LANES);
                size[v] = larger(larger(here, -here), size[v]);
                odd[v] += here * 0.0f;
            }
        float most = largest(size), left = total(odd);
        for (int64_t i = whole; i < inputs; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most, left += x[i] * 0.0f;
        const float steps = most > 1e-30f ? levels / most : 0; /* a row of zeros has no scale */
        for (int64_t i = 0; i < inputs; i++) {
            const float shifted = x[i] * steps + 12582912.0f; /* as in nearest(): its last 16 bits are the integer */
            int32_t all;
            memcpy(&all, &shifted, sizeof all);
            q[i] = (int16_t)all;
        }
        if (inputs % 2) q[inputs] = 0;
        scale[r] = most / levels + left;
    }
}

int64_t product_scratch(int64_t inputs) { return BLOCK * (EVEN(inputs) * sizeof(int16_t) + sizeof(float)); }

/* Of rows r.. and panels from output o on; functions of their own, so that each has all registers. */
typedef void tile(const float *x, int64_t x_stride, const int16_t *q, const float *scale, const struct panels *w,
                  int64_t o, float *y, int64_t y_stride, int onto);
#define TILE(R, P)                                                                                                     \
    static __attribute__((noinline)) void tile_##R##_##P(                                                              \
        const float *x, int64_t x_stride, const int16_t *q, const float *scale, const struct panels *w, int64_t o,     \
        float *y, int64_t y_stride, int onto)                                                                          \
    {                                                                                                                  \
        if (P > 1 && R * P * VECTORS > SUMS) return; /* never asked for */                                             \
        if (scale) tile_int8(R, P, q, EVEN(w->inputs), scale, w, o, y, y_stride, onto);                                \
        else tile_float(R, P, x, x_stride, w, o, y, y_stride, onto);                                                   \
    }
#define TILES(P) TILE(1, P) TILE(2, P) TILE(3, P) TILE(4, P) TILE(5, P) TILE(6, P)
#define NAMES(P) {tile_1_##P, tile_2_##P, tile_3_##P, tile_4_##P, tile_5_##P, tile_6_##P}
TILES(1) TILES(2) TILES(4) TILES(8)
static tile *const tiles_of[][MOST_ROWS] = {[1] = NAMES(1), [2] = NAMES(2), [4] = NAMES(4), [8] = NAMES(8)};

/* Rows of the next tile when `left` are left: the largest tile keeps the processor busiest, 5 + 5 busier than 6 + 4. */
INLINE int64_t next(int64_t left) { return left == 10 ? 5 : left < MOST_ROWS ? left : MOST_ROWS; }

/* Panels that all tiles take before the next ones: what a last, small tile takes at once, or one tile's, which stay
   closest, where there are many. */
INLINE int64_t grouped(int64_t rows)
{
    const int64_t last = rows % MOST_ROWS;
    return fitting(rows > 2 * MOST_ROWS || !last || rows == 10 ? MOST_ROWS : last);
}

/* y (rows, outputs padded to whole panels) = x W^T + bias, or += x W^T. `scratch`: product_scratch(inputs) bytes. */
void product(const float *x, int64_t x_stride, int64_t rows, const struct panels *w, float *y, int64_t y_stride,
             int onto, void *scratch)
{
    const int64_t inputs = EVEN(w->inputs), count = (w->outputs + WIDE - 1) / WIDE;
    float *scale = scratch;
    int16_t *q = (int16_t *)(scale + BLOCK);
    for (int64_t first = 0; first < rows; first += BLOCK, x += BLOCK * x_stride, y += BLOCK * y_stride) {
        const int64_t many = rows - first < BLOCK ? rows - first : BLOCK;
        if (w->scale) quantise(x, x_stride, many, w->inputs, q, scale);
        int64_t group = grouped(many);
        for (int64_t at = 0; at < count; at += group) {
            while (group > count - at) group /= 2;
            for (int64_t r = 0, size; r < many; r += size) {
                size = next(many - r);
                const int64_t panels = fitting(size) < group ? fitting(size) : group;
                for (int64_t p = at; p < at + group; p += panels)
                    tiles_of[panels][size - 1](x + r * x_stride, x_stride, q + r * inputs, w->scale ? scale + r : 0, w,
                                               p * WIDE, y + r * y_stride + p * WIDE, y_stride, onto);
            }
        }
    }
}
