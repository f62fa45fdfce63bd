/* From logits to tokens as sample.py defines it, row by row, after penalties and biases.

   e_i = exp((x_i - max x) / T) stands for the probability of a token; a token below e^-87 of the likeliest never comes.
   Without a filter the draw inverts the sums of e in the order of ids. With one it walks the tokens from the likeliest
   down, equals by id, without sorting them: the leading bits of how far a logit is from the largest are its bucket, so
   the sums of the buckets tell in which one the walk ends, the next bits of its tokens in which part of it, and so on. */

#include <float.h>

#include "vector.h"

#define BITS 11 /* that buckets are made of, three times */
#define BUCKETS (1 << BITS)
#define FEW 48   /* tokens that are sorted */
#define SPAN 256 /* tokens whose sum is kept */

struct sampling {
    uint64_t seed, index;
    int64_t top_k; /* 0: all */
    double top_p, min_p, temperature; /* temperature 0: the likeliest */
};

struct bucket {
    int64_t count;
    double mass;
};

/* Down the tokens from the likeliest. It ends before the token that begins at `mass`, or with the one that reaches
   beyond it when it draws, and at the latest with `most` tokens. */
struct walk {
    const float *x, *e;
    int32_t top;
    int drawing;
    int64_t most, count; /* tokens: at most, and so far */
    double mass, taken;
    int64_t token; /* with which it ended, -1: nowhere yet */
};

/* The largest number and, in `at`, the first place where it stands; nan with a number that is none. */
static float likeliest(const float *x, int64_t count, int64_t *at)
{
    vec most[VECTORS], odd[VECTORS];
    for (int v = 0; v < VECTORS; v++) most[v] = same(-INFINITY), odd[v] = same(0);
    int64_t i = 0;
    for (; i + WIDE <= count; i += WIDE)
        for (int v = 0; v < VECTORS; v++) {
            const vec now = load(x + i + v * LANES);
            most[v] = larger(now, most[v]);
            odd[v] = where(now == now, odd[v], now);
        }
    float top = largest(most);
    int number = 1;
    for (int v = 0; v < VECTORS; v++)
        for (int j = 0; j < LANES; j++) number &= odd[v][j] == odd[v][j];
    for (; i < count; i++) top = x[i] > top ? x[i] : top, number &= x[i] == x[i];
    *at = 0;
    while (number && x[*at] != top) ++*at;
    return number ? top : NAN;
}

static inline uint64_t mixed(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* uniform() of sample.py. */
static double uniform(uint64_t seed, uint64_t index, uint64_t position)
{
    uint64_t stream = mixed(seed + 0x9E3779B97F4A7C15u);
    if (index) stream = mixed(stream + index * 0xD1B54A32D192ED03u);
    return (double)(mixed(stream + (position + 1) * 0x9E3779B97F4A7C15u) >> 12) * 0x1p-52;
}

/* e in place of x, 0 for what never comes; the sums of SPAN tokens each, and all of them. */
static double exponentials(const float *x, int64_t count, float most, float temperature, float *e, float *sums)
{
    double all = 0;
    for (int64_t first = 0; first < count; first += SPAN) {
        const int64_t end = first + SPAN < count ? first + SPAN : count;
        vec sum[VECTORS];
        for (int v = 0; v < VECTORS; v++) sum[v] = same(0);
        for (int64_t i = first; i < end; i += WIDE) {
            float last[WIDE];
            const float *from = x + i;
            if (i + WIDE > end) {
                for (int j = 0; j < WIDE; j++) last[j] = i + j < end ? x[i + j] : -INFINITY;
                from = last;
            }
            for (int v = 0; v < VECTORS; v++) {
                const vec at = (load(from + v * LANES) - most) / temperature;
                const vec now = where(at < -87.0f, same(0), exponential(at));
                store(e + i + v * LANES, now);
                sum[v] += now;
            }
        }
        *sums = total(sum);
        all += *sums++;
    }
    return all;
}

static int64_t invert(const float *e, const float *sums, int64_t count, double target)
{
    int64_t i = 0, last = 0;
    double mass = 0;
    for (; i + SPAN < count && mass + *sums <= target; i += SPAN) mass += *sums++;
    for (; i < count; i++) {
        if (e[i] > 0) last = i;
        mass += e[i];
        if (mass > target) return i;
    }
    return last; /* rounding put the end behind the last token */
}

/* An integer that grows with the number. */
static inline int32_t key(float x)
{
    int32_t bits;
    x += 0.0f; /* -0 equals 0 */
    memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

static inline int bucket_of(const struct walk *w, int32_t id, int shift)
{
    return ((uint32_t)w->top - (uint32_t)key(w->x[id])) >> shift & (BUCKETS - 1);
}

static int ends(const struct walk *w, int64_t count, double mass)
{
    if (w->drawing) return w->taken + mass > w->mass || w->count + count >= w->most;
    return w->taken + mass >= w->mass || w->count + count > w->most;
}

static void step(struct walk *w, int32_t id)
{
    if (w->drawing ? ends(w, 1, w->e[id]) : w->taken >= w->mass || w->count >= w->most) w->token = id;
    else w->count++, w->taken += w->e[id];
}

static void sort(const float *x, int32_t *ids, int64_t count)
{
    for (int64_t i = 1; i < count; i++) {
        const int32_t id = ids[i];
        int64_t j = i;
        for (; j && x[ids[j - 1]] < x[id]; j--) ids[j] = ids[j - 1];
        ids[j] = id;
    }
}

static void fill(struct bucket *found, const struct walk *w, const int32_t *ids, int64_t count, int shift)
{
    memset(found, 0, BUCKETS * sizeof *found);
    for (int64_t i = 0; i < count; i++) {
        struct bucket *b = found + bucket_of(w, ids[i], shift);
        b->count++;
        b->mass += w->e[ids[i]];
    }
}

/* `ids`: tokens in the order of ids, alike in all bits above these buckets', which `found` has filled. `spare`: room
   for as many ids three times. */
static void descend(struct walk *w, const int32_t *ids, int64_t count, int shift, const struct bucket *found,
                    int32_t *spare)
{
    for (int b = 0; b < BUCKETS && w->token < 0; b++) {
        if (!found[b].count) continue;
        if (!ends(w, found[b].count, found[b].mass)) {
            w->count += found[b].count;
            w->taken += found[b].mass;
            continue;
        }
        int64_t many = 0;
        for (int64_t i = 0; i < count; i++)
            if (bucket_of(w, ids[i], shift) == b) spare[many++] = ids[i];
        if (shift && many > FEW) {
            struct bucket finer[BUCKETS];
            fill(finer, w, spare, many, shift - BITS);
            descend(w, spare, many, shift - BITS, finer, spare + many);
            continue;
        }
        if (shift) sort(w->x, spare, many);
        for (int64_t i = 0; i < many && w->token < 0; i++) step(w, spare[i]);
    }
}

static int64_t gather(const float *e, int64_t count, double least, int32_t *ids)
{
    int64_t many = 0;
    for (int64_t i = 0; i < count; i++) {
        ids[many] = (int32_t)i;
        many += e[i] > 0 && e[i] >= least;
    }
    return many;
}

static int64_t filtered(const struct sampling *s, const float *x, const float *e, float top, int64_t count, double all,
                        double u, int32_t *ids)
{
    struct bucket found[BUCKETS];
    int32_t *spare = ids + count;
    struct walk start = {x, e, key(top), 0, s->top_k && s->top_k < count ? s->top_k : count, 0, INFINITY, 0, -1};
    double least = s->min_p;
    if (s->top_p < 1) {
        if (start.most < count) { /* top-p is of what top-k keeps */
            struct walk w = start;
            const int64_t many = gather(e, count, 0, ids);
            fill(found, &w, ids, many, 2 * BITS);
            descend(&w, ids, many, 2 * BITS, found, spare);
            all = w.taken;
        } else { /* all tokens below this hold less than 1 - p together */
            const double rest = 0.999 * (1 - s->top_p) * all / count;
            least = rest > least ? rest : least;
        }
    }
    const int64_t many = gather(e, count, least, ids);
    struct walk kept = start;
    if (s->top_p < 1) kept.mass = s->top_p * all;
    fill(found, &kept, ids, many, 2 * BITS);
    descend(&kept, ids, many, 2 * BITS, found, spare);
    struct walk drawn = start;
    drawn.drawing = 1, drawn.most = kept.count, drawn.mass = u * kept.taken;
    descend(&drawn, ids, many, 2 * BITS, found, spare);
    return drawn.token;
}

/* Bytes of `scratch`. */
int64_t draw_scratch(int64_t vocabulary)
{
    const int64_t whole = (vocabulary + SPAN - 1) / SPAN * SPAN;
    return whole * sizeof(float) + whole / SPAN * sizeof(float) + 4 * vocabulary * sizeof(int32_t);
}

/* The next token of each row, -1 where the largest logit is not finite or one is not a number. `taken`: tokens drawn
   before. */
void draw(const float *x, int64_t stride, int64_t rows, int64_t vocabulary, const struct sampling *s,
          const int64_t *taken, int64_t *tokens, void *scratch)
{
    const int64_t whole = (vocabulary + SPAN - 1) / SPAN * SPAN;
    float *e = scratch, *sums = e + whole;
    int32_t *ids = (int32_t *)(sums + whole / SPAN);
    for (int64_t r = 0; r < rows; r++, x += stride, s++) {
        const float most = likeliest(x, vocabulary, tokens + r);
        if (!isfinite(most)) tokens[r] = -1;
        if (tokens[r] < 0 || s->temperature == 0) continue;
        const float temperature = s->temperature > FLT_MIN ? s->temperature : FLT_MIN;
        const double all = exponentials(x, vocabulary, most, temperature, e, sums);
        const double u = uniform(s->seed, s->index, taken[r]);
        if (s->top_k || s->top_p < 1 || s->min_p > 0) tokens[r] = filtered(s, x, e, most, vocabulary, all, u, ids);
        else tokens[r] = invert(e, sums, vocabulary, u * all);
    }
}
