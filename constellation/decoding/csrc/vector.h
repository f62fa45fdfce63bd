/* Vectors of the width that the processor has, by GCC's and Clang's extension; what they compute does not depend on it.

   Sums over a row are kept in 16 lanes, however many of them a vector holds, and added up in one order. Multiplications
   and additions are fused where fused() says so and nowhere else (-ffp-contract=off): left to itself a compiler fuses
   them in some copies of a loop and not in others, and rows would depend on each other. */

#ifndef VECTOR_H
#define VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define WIDE 16 /* floats that belong together: a panel's outputs, a block's columns */

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LANES 16
#define SUMS 24 /* vectors of sums that fit the registers beside weights and a factor */
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define SUMS 12
#elif defined(__aarch64__)
#define LANES 4
#define SUMS 24
#else
#define LANES 4
#define SUMS 12
#endif
#define VECTORS (WIDE / LANES) /* that hold 16 floats */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *at) { return *(const vec *)at; }
INLINE void store(float *at, vec x) { *(vec *)at = x; }
INLINE vec same(float x) /* not 0 + x, which is no x where x is -0 */
{
#if LANES == 16
    return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif LANES == 8
    return (vec){x, x, x, x, x, x, x, x};
#else
    return (vec){x, x, x, x};
#endif
}
/* a b + c, rounded once where the processor can. */
INLINE vec fused(vec a, vec b, vec c)
{
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vec where(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return where(a > b, a, b); }

/* The sum of 16 lanes, halves first. */
INLINE float total(const vec *sum)
{
    float lane[WIDE];
    for (int v = 0; v < VECTORS; v++) store(lane + v * LANES, sum[v]);
    for (int half = WIDE / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

INLINE float largest(const vec *x)
{
    float lane[LANES], most;
    vec all = x[0];
    for (int v = 1; v < VECTORS; v++) all = larger(all, x[v]);
    store(lane, all);
    most = lane[0];
    for (int j = 1; j < LANES; j++) most = lane[j] > most ? lane[j] : most;
    return most;
}

/* The nearest integer, |x| < 2^22: 1.5 * 2^23 leaves no bits behind the point. */
INLINE vec nearest(vec x) { return x + 12582912.0f - 12582912.0f; }

/* e^x within 2 ulp for x in [-87, 88], clamped outside; Cody and Waite's reduction. */
INLINE vec exponential(vec x)
{
    const vec low = same(-87.0f), high = same(88.0f);
    x = where(x < low, low, x);
    x = where(x > high, high, x);
    const vec n = nearest(x * 1.44269504f);
    const vec f = fused(n, same(2.12194440e-4f), fused(n, same(-0.693359375f), x));
    vec p = fused(f, same(1.9875691500e-4f), same(1.3981999507e-3f));
    p = fused(p, f, same(8.3334519073e-3f));
    p = fused(p, f, same(4.1665795894e-2f));
    p = fused(p, f, same(1.6666665459e-1f));
    p = fused(p, f, same(5.0000001201e-1f));
    p = fused(p, f * f, f) + 1.0f;
    const ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)bits;
}

/* arccos(|x|)^2 / 2 within 2e-7, |x| at most 1 but for rounding: d Q(d), d = 1 - |x|, Q of degree 8 through Chebyshev's
   points. arccos itself has no derivative at d = 0, its square is analytic there. */
INLINE vec half_square_angle(vec x)
{
    const vec left = 1.0f - larger(x, -x), d = larger(left, same(0));
    vec q = same(1.423376263e-03f);
    q = fused(q, d, same(-3.145316616e-03f));
    q = fused(q, d, same(4.917238373e-03f));
    q = fused(q, d, same(-7.905125967e-04f));
    q = fused(q, d, same(6.083056796e-03f));
    q = fused(q, d, same(1.408197358e-02f));
    q = fused(q, d, same(4.446483031e-02f));
    q = fused(q, d, same(1.666658968e-01f));
    q = fused(q, d, same(1.000000000e+00f));
    return q * d;
}

struct panels {
    const void *weights;
    const float *scale; /* of each output, and the weights are int8; or 0, and they are float */
    const float *bias;  /* of each output, or 0 */
    int64_t inputs, outputs;
};

int64_t product_scratch(int64_t inputs);
void product(const float *x, int64_t x_stride, int64_t rows, const struct panels *w, float *y, int64_t y_stride,
             int onto, void *scratch);
void normal(const float *x, int64_t stride, int64_t rows, int64_t width, float eps2, float *y);

#endif
