/* The forward pass of decoding (slots.py) for small kernels on a CPU, in one call: no dispatch between operations.

   product   y = x W^T in panels of 64 outputs: a panel's weights lie input by input, so that an accumulator is a vector
             of outputs and no sum crosses its lanes. Inputs are added one after another, whatever rows are computed
             together: a row's result does not depend on its neighbours. (What is added to comes first: a product
             behind the loop that an addition follows is contracted in some loops and not in others.) Weights are float, or int8 with a scale for
             each output: reading them is what a single row waits for.
   attend    a row's query against the columns 0..position of its slot, head by head

   Vectors are GCC's and Clang's, of 16 floats; the compiler makes of them what the machine has. */

#include <math.h>
#include <string.h>

#define LANES 16
#define PANEL 64
#define VECTORS (PANEL / LANES)
#ifdef __AVX512F__
#define ROWS 6
#else
#define ROWS 2
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ivec __attribute__((vector_size(4 * LANES)));
typedef int packed __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float half8 __attribute__((vector_size(32)));
typedef float half4 __attribute__((vector_size(16)));

struct panels {
    const void *weights; /* (panels, inputs, 64); of int8 byte 4 j + v belongs to output 16 v + j of the panel */
    const float *scale;  /* of each output, and the weights are int8; or 0, and they are float */
};

struct layer {
    struct panels qkv, out, gate_up, down;
    const float *norm; /* (2, 2, heads): eps / c^2, then 1 / c^2, of q and of k; or 0 */
};

struct kernel {
    long width, heads, size, hidden, layers, columns;
    float eps2; /* D eps */
    const float *embedding, *look_back; /* (V + 1, D), (D) or 0 */
    const float *rotary;                /* (context, 2, size): real and imaginary part in turn, for q and for k */
    const struct layer *layer;
};

static inline long padded(long outputs) { return (outputs + PANEL - 1) / PANEL * PANEL; }

static inline __attribute__((always_inline)) void tile(
    const int rows, const int bytes, const float *x, long x_stride, const char *w, const float *scale, long inputs,
    float *y, long y_stride, int onto)
{
    vec sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            sum[r][v] = (vec){0};
            if (onto) sum[r][v] = *(const vec *)(y + r * y_stride + v * LANES);
            if (onto && bytes == 1) sum[r][v] /= *(const vec *)(scale + v * LANES);
        }
    for (long i = 0; i < inputs; i++, w += bytes * PANEL) {
        vec weights[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            if (bytes == 1)
                weights[v] = __builtin_convertvector((ivec)*(const packed *)w << (24 - 8 * v) >> 24, vec);
            else
                weights[v] = *(const vec *)(w + bytes * v * LANES);
        }
        for (int r = 0; r < rows; r++) {
            const float value = x[r * x_stride + i];
            for (int v = 0; v < VECTORS; v++) sum[r][v] += weights[v] * value;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            if (bytes == 1) sum[r][v] *= *(const vec *)(scale + v * LANES);
            *(vec *)(y + r * y_stride + v * LANES) = sum[r][v];
        }
}

static inline __attribute__((always_inline)) void panel(
    const int bytes, const float *x, long x_stride, long rows, const char *w, const float *scale, long inputs, float *y,
    long y_stride, int onto)
{
    long r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        tile(ROWS, bytes, x + r * x_stride, x_stride, w, scale, inputs, y + r * y_stride, y_stride, onto);
    for (; r + 2 <= rows; r += 2)
        tile(2, bytes, x + r * x_stride, x_stride, w, scale, inputs, y + r * y_stride, y_stride, onto);
    for (; r < rows; r++) tile(1, bytes, x + r * x_stride, x_stride, w, scale, inputs, y + r * y_stride, y_stride, onto);
}

/* y (rows, outputs padded to whole panels) = x W^T, or += it. */
void product(const float *x, long x_stride, long rows, const struct panels *w, long inputs, long outputs, float *y,
             long y_stride, int onto)
{
    const long step = inputs * PANEL;
    const char *weights = w->weights;
    for (long o = 0; o < outputs; o += PANEL, y += PANEL)
        if (w->scale)
            panel(1, x, x_stride, rows, weights + o / PANEL * step, w->scale + o, inputs, y, y_stride, onto);
        else
            panel(4, x, x_stride, rows, weights + o / PANEL * step * 4, 0, inputs, y, y_stride, onto);
}

static inline float total(vec v)
{
    union { vec v; half8 h[2]; } a = {v};
    union { half8 v; half4 h[2]; } b = {a.h[0] + a.h[1]};
    half4 c = b.h[0] + b.h[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline float dot(const float *a, const float *b, long n)
{
    vec sum = {0};
    for (long i = 0; i < n; i += LANES) sum += *(const vec *)(a + i) * *(const vec *)(b + i);
    return total(sum);
}

static inline vec where(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* e^x within 2 ulp for x in [-87, 88], clamped outside; Cody and Waite's reduction. */
static inline vec exponential(vec x)
{
    const vec low = (vec){0} - 87.0f, high = (vec){0} + 88.0f;
    x = where(x < low, low, x);
    x = where(x > high, high, x);
    vec n = x * 1.44269504f + 12582912.0f; /* to the nearest integer: 1.5 * 2^23 leaves no bits behind the point */
    n -= 12582912.0f;
    vec f = x - n * 0.693359375f;
    f -= n * -2.12194440e-4f;
    vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + f + 1.0f;
    ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
    return p * (vec)bits;
}

/* x / hypot(|x|, sqrt(D eps)); D a multiple of 16. */
void normal(const float *x, long stride, long rows, long width, float eps2, float *y)
{
    for (long r = 0; r < rows; r++, x += stride, y += width) {
        const float scale = 1.0f / sqrtf(dot(x, x, width) + eps2);
        for (long i = 0; i < width; i += LANES) *(vec *)(y + i) = *(const vec *)(x + i) * scale;
    }
}

static void turn(float *q, const struct kernel *k, const float *norm, const float *rotary)
{
    for (long h = 0; h < k->heads; h++, q += k->size) {
        float scale = 1.0f;
        if (norm) scale = 1.0f / sqrtf(norm[h] + dot(q, q, k->size) * norm[2 * k->heads + h]);
        for (long i = 0; i < k->size; i += 2) {
            const float a = q[i] * scale, b = q[i + 1] * scale;
            q[i] = a * rotary[i] - b * rotary[i + 1];
            q[i + 1] = a * rotary[i + 1] + b * rotary[i];
        }
    }
}

static void attend(const float *q, const float *kv, long position, const struct kernel *k, float *score, float *y)
{
    const long step = 2 * k->width, count = position + 1;
    for (long h = 0; h < k->heads; h++, q += k->size, kv += k->size, y += k->size) {
        float most = -INFINITY, sum = 0;
        for (long c = 0; c < count; c++) {
            score[c] = dot(q, kv + c * step, k->size);
            most = score[c] > most ? score[c] : most;
        }
        for (long c = count; c % LANES; c++) score[c] = -INFINITY;
        for (long c = 0; c < count; c += LANES) *(vec *)(score + c) = exponential(*(vec *)(score + c) - most);
        for (long c = 0; c < count; c++) sum += score[c];
        const float *value = kv + k->width;
        for (long i = 0; i < k->size; i += LANES) {
            vec out = {0};
            for (long c = 0; c < count; c++) out += *(const vec *)(value + c * step + i) * score[c];
            *(vec *)(y + i) = out / sum;
        }
    }
}

/* The last layer's output x (rows, x_stride >= D padded to panels). `rows_4N`: token, token before, position, slot.
   `held`: (layers, slots, columns, 2, heads, size). `scratch`: rows * (D + panels of 3 D and of 2 hidden + hidden + 16)
   + columns + 16 floats. */
void forward(const struct kernel *k, const long *rows_4N, long rows, float *const *held, float *x, long x_stride,
             float *scratch)
{
    const long width = k->width, wide = padded(3 * width), gates = padded(2 * k->hidden);
    const long hidden = (k->hidden + LANES - 1) / LANES * LANES;
    const long *token = rows_4N, *before = token + rows, *position = before + rows, *slot = position + rows;
    float *mean = scratch, *qkv = mean + rows * width, *gate = qkv + rows * wide, *act = gate + rows * gates;
    float *score = act + rows * hidden;
    for (long r = 0; r < rows; r++) {
        float *to = x + r * x_stride;
        memcpy(to, k->embedding + token[r] * width, width * sizeof(float));
        memset(to + width, 0, (x_stride - width) * sizeof(float));
        if (k->look_back)
            for (long i = 0; i < width; i++) to[i] += k->look_back[i] * k->embedding[before[r] * width + i];
    }
    for (long l = 0; l < k->layers; l++) {
        const struct layer *layer = k->layer + l;
        normal(x, x_stride, rows, width, k->eps2, mean);
        product(mean, width, rows, &layer->qkv, width, 3 * width, qkv, wide, 0);
        for (long r = 0; r < rows; r++) {
            float *mine = qkv + r * wide;
            const float *rotary = k->rotary + position[r] * 2 * k->size;
            turn(mine, k, layer->norm, rotary);
            turn(mine + width, k, layer->norm ? layer->norm + k->heads : 0, rotary + k->size);
            memcpy(held[l] + (slot[r] * k->columns + position[r]) * 2 * width, mine + width, 2 * width * sizeof(float));
        }
        for (long r = 0; r < rows; r++)
            attend(qkv + r * wide, held[l] + slot[r] * k->columns * 2 * width, position[r], k, score, mean + r * width);
        product(mean, width, rows, &layer->out, width, width, x, x_stride, 1);
        normal(x, x_stride, rows, width, k->eps2, mean);
        product(mean, width, rows, &layer->gate_up, width, 2 * k->hidden, gate, gates, 0);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < k->hidden; i += LANES) {
                const vec g = *(const vec *)(gate + r * gates + i), u = *(const vec *)(gate + r * gates + k->hidden + i);
                *(vec *)(act + r * hidden + i) = g / (exponential(-g) + 1.0f) * u;
            }
        product(act, hidden, rows, &layer->down, k->hidden, width, x, x_stride, 1);
    }
}
