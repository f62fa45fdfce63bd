/* What the library computes, as one number: for comparing processors (test_native.py). */

#include "vector.h"

#include <stdio.h>
#include <stdlib.h>

int64_t draw_scratch(int64_t vocabulary);
void draw(const float *x, int64_t stride, int64_t rows, int64_t vocabulary, const void *s, const int64_t *taken,
          int64_t *tokens, void *scratch);

static uint64_t state = 1, hash = 14695981039346656037u;

static float number(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) / 1e9f;
}

static void add(const void *data, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}

/* forward.c's structures: see there. */
struct layer {
    struct panels qkv, out, gate_up, down;
    const float *norm, *concentration;
};
struct kernel {
    int64_t width, heads, groups, size, hidden, layers, columns;
    float eps2;
    const float *embedding, *look_back, *rotary, *coupling;
    const struct layer *layer;
    struct panels head;
};
int64_t forward_scratch(const struct kernel *k, int64_t rows);
void forward(const struct kernel *k, const int64_t *rows_4N, int64_t rows, float *const *held, float *x, float *scratch);
void logits(const struct kernel *k, const float *x, int64_t rows, float *y, float *scratch);

static const float *numbers(int64_t count)
{
    float *made = malloc(count * 4);
    for (int64_t i = 0; i < count; i++) made[i] = number();
    return made;
}

static struct panels weights(int64_t outputs, int64_t inputs)
{
    return (struct panels){numbers((outputs + 15) / 16 * 16 * inputs), 0, 0, inputs, outputs};
}

enum { HEADS = 2 };

/* A window of 100 tokens read in pieces, heads of 48: every branch of the attention, with `groups` keys for two heads. */
static void add_kernel(int64_t groups, int geodesic)
{
    enum { WIDTH = 96, SIZE = 48, HIDDEN = 100, COLUMNS = 112, VOCABULARY = 70, TOKENS = 100 };
    const struct layer layer = {weights(WIDTH + 2 * groups * SIZE, WIDTH), weights(WIDTH, WIDTH),
                                weights(2 * HIDDEN, WIDTH), weights(WIDTH, HIDDEN), numbers(4 * HEADS),
                                geodesic ? numbers(HEADS) : 0};
    struct kernel k = {WIDTH, HEADS, groups, SIZE, HIDDEN, 1, COLUMNS, 1e-3f, numbers((VOCABULARY + 1) * WIDTH),
                       numbers(WIDTH), numbers(COLUMNS * 2 * SIZE), geodesic ? numbers(COLUMNS) : 0, &layer,
                       weights(VOCABULARY, WIDTH)};
    for (int i = 0; i < 4 * HEADS; i++) ((float *)layer.norm)[i] = 0.5f + fabsf(layer.norm[i]);
    float *held[1] = {calloc(2 * COLUMNS * 2 * WIDTH, 4)}, *scratch = malloc(4 * forward_scratch(&k, 33)), x[33 * WIDTH];
    float y[33 * 80];
    for (int first = 0; first < TOKENS; first += 33) {
        int64_t rows[4][33], count = TOKENS - first < 33 ? TOKENS - first : 33;
        int64_t *at = &rows[0][0];
        for (int64_t r = 0; r < count; r++) {
            const int64_t position = first + r;
            at[r] = position * 7 % VOCABULARY, at[count + r] = position ? (position - 1) * 7 % VOCABULARY : VOCABULARY;
            at[2 * count + r] = position, at[3 * count + r] = 1;
        }
        forward(&k, at, count, held, x, scratch);
        logits(&k, x, count, y, scratch);
        add(x, count * WIDTH * 4);
        add(y, count * 80 * 4);
    }
}

int main(void)
{
    for (int64_t rows = 1; rows < 110; rows += rows < 16 ? 1 : 31)
        for (int64_t inputs = 1; inputs < 130; inputs += 21) {
            const int64_t outputs = 150, padded = 160;
            float *x = malloc(rows * inputs * 4), *w = malloc(padded * inputs * 4), *y = malloc(rows * padded * 4);
            float bias[160], scale[160];
            int8_t *q = malloc(padded * (inputs + 1));
            void *scratch = malloc(product_scratch(inputs));
            for (int64_t i = 0; i < rows * inputs; i++) x[i] = number();
            for (int64_t i = 0; i < padded * inputs; i++) w[i] = number();
            for (int64_t i = 0; i < padded * (inputs + 1); i++) q[i] = (int8_t)(number() * 60);
            for (int64_t i = 0; i < padded; i++) bias[i] = number(), scale[i] = 0.01f + number() / 1000;
            const struct panels kinds[] = {{w, 0, 0, inputs, outputs}, {w, 0, bias, inputs, outputs},
                                           {q, scale, 0, inputs, outputs}, {q, scale, bias, inputs, outputs}};
            for (int k = 0; k < 4; k++)
                for (int onto = 0; onto < 2; onto++) {
                    product(x, inputs, rows, kinds + k, y, padded, onto, scratch);
                    add(y, rows * padded * 4);
                }
        }
    float x[4 * 500], y[4 * 160];
    for (int i = 0; i < 2000; i++) x[i] = 5 * number();
    normal(x, 500, 4, 160, 0.1f, y);
    add(y, sizeof y);
    struct { uint64_t seed, index; int64_t top_k; double top_p, min_p, temperature; } s[4] = {
        {1, 0, 0, 1, 0, 0.7}, {2, 1, 0, 0.9, 0, 1}, {3, 0, 20, 0.5, 0, 1}, {4, 0, 0, 1, 0.01, 1.5}};
    void *scratch = malloc(draw_scratch(500));
    for (int64_t t = 0; t < 200; t++) {
        int64_t taken[4] = {t, t, t, t}, tokens[4];
        draw(x, 500, 4, 500, s, taken, tokens, scratch);
        add(tokens, sizeof tokens);
    }
    add_kernel(HEADS, 0);
    add_kernel(1, 0);
    add_kernel(HEADS, 1);
    printf("%llx\n", (unsigned long long)hash);
    return 0;
}
