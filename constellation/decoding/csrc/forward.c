/* The forward pass of decoding (slots.py) on a CPU in one call: no dispatch between operations. Rows do not depend on
   each other.

   held      of a slot and layer: keys (groups, columns / 16, size, 16), so that 16 columns are scored at once, then
             values (groups, columns, size); heads / groups queries share a group
   attend    a row's query against the columns 0..position of its slot, head by head */

#include "vector.h"

struct layer {
    struct panels qkv, out, gate_up, down;
    const float *norm;          /* (2, heads + groups): eps / c^2, then 1 / c^2, of q and of k; or 0 */
    const float *concentration; /* (heads): c where logits are -c coupling theta^2 / 2; or 0, and they are q.k */
};

struct kernel {
    int64_t width, heads, groups, size, hidden, layers, columns;
    float eps2; /* D eps */
    const float *embedding, *look_back; /* (V + 1, D), (D) or 0 */
    const float *rotary;                /* (context, 2, 2, size / 2): cos and sin, times the row's factor for q */
    const float *coupling;              /* (context), of a row; or 0 */
    const struct layer *layer;
    struct panels head;
};

static inline int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

static inline float square(const float *x, int64_t n)
{
    vec sum[VECTORS] = {{0}};
    for (int64_t i = 0; i < n; i += WIDE)
        for (int v = 0; v < VECTORS; v++) sum[v] = fused(load(x + i + v * LANES), load(x + i + v * LANES), sum[v]);
    return total(sum);
}

/* x / hypot(|x|, sqrt(D eps)); D a multiple of 16. */
void normal(const float *x, int64_t stride, int64_t rows, int64_t width, float eps2, float *y)
{
    for (int64_t r = 0; r < rows; r++, x += stride, y += width) {
        const float scale = 1.0f / sqrtf(square(x, width) + eps2);
        for (int64_t i = 0; i < width; i += LANES) store(y + i, load(x + i) * scale);
    }
}

/* q or k of `heads` heads, in place: divided by their lengths unless the metric is dot, then turned; halves make
   pairs. */
static void turn(float *q, int64_t heads, const struct kernel *k, const float *norm, const float *rotary)
{
    const int64_t half = k->size / 2;
    for (int64_t h = 0; h < heads; h++, q += k->size) {
        float scale = 1.0f;
        if (norm) scale = 1.0f / sqrtf(norm[h] + square(q, k->size) * norm[k->heads + k->groups + h]);
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const vec a = load(q + i) * scale, b = load(q + half + i) * scale;
            const vec cosine = load(rotary + i), sine = load(rotary + half + i);
            store(q + i, a * cosine - b * sine);
            store(q + half + i, a * sine + b * cosine);
        }
        for (; i < half; i++) {
            const float a = q[i] * scale, b = q[half + i] * scale;
            q[i] = a * rotary[i] - b * rotary[half + i];
            q[half + i] = a * rotary[half + i] + b * rotary[i];
        }
    }
}

static void hold(const float *key, const float *value, const struct kernel *k, int64_t position, float *slot)
{
    float *keys = slot + position / WIDE * k->size * WIDE + position % WIDE;
    float *values = slot + k->groups * k->size * k->columns + position * k->size;
    for (int64_t h = 0; h < k->groups; h++, keys += k->columns * k->size, values += k->columns * k->size) {
        for (int64_t i = 0; i < k->size; i++) keys[i * WIDE] = *key++;
        memcpy(values, value + h * k->size, k->size * sizeof(float));
    }
}

/* Scores of `blocks` times 16 columns. */
INLINE void scores(const int blocks, const float *q, const float *key, int64_t size, float *score)
{
    vec sum[4][VECTORS];
    for (int b = 0; b < blocks; b++)
        for (int v = 0; v < VECTORS; v++) sum[b][v] = same(0);
    for (int64_t i = 0; i < size; i++) {
        const vec factor = same(q[i]);
        for (int b = 0; b < blocks; b++)
            for (int v = 0; v < VECTORS; v++)
                sum[b][v] = fused(load(key + (b * size + i) * WIDE + v * LANES), factor, sum[b][v]);
    }
    for (int b = 0; b < blocks; b++)
        for (int v = 0; v < VECTORS; v++) store(score + b * WIDE + v * LANES, sum[b][v]);
}

/* The sum of `count` rows of `wide` times 16 floats, each times its score; every `ways`-th column has sums of its own,
   so that one addition need not wait for the other. */
INLINE void weigh(const int wide, const int ways, const float *value, int64_t step, const float *score, int64_t count,
                  float factor, float *y)
{
    vec sum[4][4][VECTORS];
    for (int w = 0; w < ways; w++)
        for (int p = 0; p < wide; p++)
            for (int v = 0; v < VECTORS; v++) sum[w][p][v] = same(0);
    int64_t c = 0;
    for (; c + ways <= count; c += ways)
        for (int w = 0; w < ways; w++) {
            const vec weight = same(score[c + w]);
            for (int p = 0; p < wide; p++)
                for (int v = 0; v < VECTORS; v++)
                    sum[w][p][v] = fused(load(value + (c + w) * step + p * WIDE + v * LANES), weight, sum[w][p][v]);
        }
    for (; c < count; c++)
        for (int p = 0; p < wide; p++)
            for (int v = 0; v < VECTORS; v++)
                sum[0][p][v] = fused(load(value + c * step + p * WIDE + v * LANES), same(score[c]), sum[0][p][v]);
    for (int p = 0; p < wide; p++)
        for (int v = 0; v < VECTORS; v++) {
            vec all = sum[0][p][v];
            for (int w = 1; w < ways; w++) all += sum[w][p][v];
            store(y + p * WIDE + v * LANES, all * factor);
        }
}

static void attend(const float *q, const float *slot, int64_t position, const struct kernel *k, const float *concentration,
                   float *score, float *y)
{
    const int64_t size = k->size, count = position + 1, whole = padded(count), shared = k->heads / k->groups;
    for (int64_t h = 0; h < k->heads; h++, q += size, y += size) {
        const float *key = slot + h / shared * k->columns * size, *value = key + k->groups * k->columns * size;
        int64_t c = 0;
        for (; c + 4 * WIDE <= whole; c += 4 * WIDE) scores(4, q, key + c * size, size, score + c);
        for (; c < whole; c += WIDE) scores(1, q, key + c * size, size, score + c);
        if (concentration) {
            const float factor = -concentration[h] * k->coupling[position];
            for (c = 0; c < whole; c += LANES) store(score + c, half_square_angle(load(score + c)) * factor);
        }
        for (c = count; c < whole; c++) score[c] = -INFINITY;
        vec most[VECTORS], sum[VECTORS];
        for (int v = 0; v < VECTORS; v++) most[v] = same(-INFINITY), sum[v] = same(0);
        for (c = 0; c < whole; c += WIDE)
            for (int v = 0; v < VECTORS; v++) most[v] = larger(load(score + c + v * LANES), most[v]);
        const float top = largest(most);
        for (c = 0; c < whole; c += WIDE) {
            for (int v = 0; v < VECTORS; v++)
                store(score + c + v * LANES, exponential(load(score + c + v * LANES) - top));
            for (int64_t unseen = count > c ? count : c; unseen < c + WIDE; unseen++) score[unseen] = 0;
            for (int v = 0; v < VECTORS; v++) sum[v] += load(score + c + v * LANES);
        }
        const float factor = 1.0f / total(sum);
        int64_t i = 0;
        for (; i + 4 * WIDE <= size; i += 4 * WIDE) weigh(4, 1, value + i, size, score, count, factor, y + i);
        for (; i + 2 * WIDE <= size; i += 2 * WIDE) weigh(2, 2, value + i, size, score, count, factor, y + i);
        for (; i < size; i += WIDE) weigh(1, 4, value + i, size, score, count, factor, y + i);
    }
}

static int64_t most_inputs(const struct kernel *k) { return k->width > k->hidden ? k->width : k->hidden; }

/* q, k and v of a row. */
static int64_t projected(const struct kernel *k) { return k->width + 2 * k->groups * k->size; }

/* Floats of `scratch` for `rows` rows. */
int64_t forward_scratch(const struct kernel *k, int64_t rows)
{
    const int64_t each = k->width + padded(projected(k)) + padded(2 * k->hidden) + padded(k->hidden);
    return rows * each + padded(k->columns) + product_scratch(most_inputs(k)) / sizeof(float);
}

/* The last layer's output x (rows, D). `rows_4N`: token, token before, position, slot. `held[l]`: slots, each as above. */
void forward(const struct kernel *k, const int64_t *rows_4N, int64_t rows, float *const *held, float *x, float *scratch)
{
    const int64_t width = k->width, shared = k->groups * k->size, wide = padded(projected(k));
    const int64_t gates = padded(2 * k->hidden), hidden = padded(k->hidden);
    const int64_t *token = rows_4N, *before = token + rows, *position = before + rows, *slot = position + rows;
    const int64_t step = 2 * shared * k->columns;
    float *mean = scratch, *qkv = mean + rows * width, *gate = qkv + rows * wide, *act = gate + rows * gates;
    float *score = act + rows * hidden, *levels = score + padded(k->columns);
    for (int64_t r = 0; r < rows; r++) {
        const float *here = k->embedding + token[r] * width, *there = k->embedding + before[r] * width;
        for (int64_t i = 0; i < width; i += LANES) {
            vec sum = load(here + i);
            if (k->look_back) sum = fused(load(k->look_back + i), load(there + i), sum);
            store(x + r * width + i, sum);
        }
    }
    for (int64_t l = 0; l < k->layers; l++) {
        const struct layer *layer = k->layer + l;
        normal(x, width, rows, width, k->eps2, mean);
        product(mean, width, rows, &layer->qkv, qkv, wide, 0, levels);
        for (int64_t r = 0; r < rows; r++) {
            float *mine = qkv + r * wide;
            const float *rotary = k->rotary + position[r] * 2 * k->size;
            turn(mine, k->heads, k, layer->norm, rotary);
            turn(mine + width, k->groups, k, layer->norm ? layer->norm + k->heads : 0, rotary + k->size);
            hold(mine + width, mine + width + shared, k, position[r], held[l] + slot[r] * step);
        }
        for (int64_t r = 0; r < rows; r++)
            attend(qkv + r * wide, held[l] + slot[r] * step, position[r], k, layer->concentration, score,
                   mean + r * width);
        product(mean, width, rows, &layer->out, x, width, 1, levels);
        normal(x, width, rows, width, k->eps2, mean);
        product(mean, width, rows, &layer->gate_up, gate, gates, 0, levels);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < k->hidden; i += LANES) { /* of a last vector what is behind `hidden` is not read */
                const vec g = load(gate + r * gates + i), u = load(gate + r * gates + k->hidden + i);
                store(act + r * hidden + i, g / (exponential(-g) + 1.0f) * u);
            }
        product(act, hidden, rows, &layer->down, x, width, 1, levels);
    }
}

/* Logits (rows, vocabulary padded to panels) of the last layer's output. */
void logits(const struct kernel *k, const float *x, int64_t rows, float *y, float *scratch)
{
    float *mean = scratch, *levels = mean + rows * k->width;
    normal(x, k->width, rows, k->width, k->eps2, mean);
    product(mean, k->width, rows, &k->head, y, padded(k->head.outputs), 0, levels);
}
