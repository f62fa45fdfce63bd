/* Pieces of a text and their merges, as pieces.py and merging.py define them. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OTHER, LETTER, NUMBER, SPACE }; /* of kind_of */

/* -- pieces -------------------------------------------------------------------------------------------------------- */

static int64_t run(const uint32_t *text, int64_t at, int64_t end, const uint8_t *kind_of, int kind)
{
    while (at < end && kind_of[text[at]] == kind) at++;
    return at;
}

static int line_end(uint32_t c) { return c == '\r' || c == '\n'; }

/* Where the piece that begins at `at` ends: the first of the pattern's alternatives that matches. */
static int64_t piece_end(const uint32_t *text, int64_t at, int64_t end, const uint8_t *kind_of, int phrases)
{
    const int kind = kind_of[text[at]];
    const int64_t next = at + 1;
    int64_t word = at;
    if (kind != LETTER && kind != NUMBER && !line_end(text[at]) && next < end && kind_of[text[next]] == LETTER)
        word = next;
    if (kind_of[text[word]] == LETTER) {
        word = run(text, word, end, kind_of, LETTER);
        while (phrases && word + 1 < end && text[word] == ' ' && kind_of[text[word + 1]] == LETTER)
            word = run(text, word + 1, end, kind_of, LETTER);
        return word;
    }
    if (kind == NUMBER) {
        const int64_t stop = run(text, at, end, kind_of, NUMBER);
        return stop < at + 3 ? stop : at + 3;
    }
    if (kind == OTHER || (text[at] == ' ' && next < end && kind_of[text[next]] == OTHER)) {
        int64_t stop = run(text, kind == OTHER ? at : next, end, kind_of, OTHER);
        while (stop < end && line_end(text[stop])) stop++;
        return stop;
    }
    const int64_t stop = run(text, at, end, kind_of, SPACE);
    for (int64_t last = stop; last > at; last--)
        if (line_end(text[last - 1])) return last;
    return stop < end && stop > at + 1 ? stop - 1 : stop; /* the last one goes to what follows */
}

struct pieces {
    int64_t count, room, letters, letter_room, groups;
    int64_t *start, *seen; /* of a piece in text, (room + 1,); of a piece in each group, (room, groups) */
    uint32_t *text;
    int64_t *slot, slots; /* open addressing: number of a piece + 1 */
};

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t hash_of(const uint32_t *text, int64_t length)
{
    uint64_t h = 0x9E3779B97F4A7C15u;
    for (int64_t i = 0; i < length; i++) h = (h ^ text[i]) * 0x100000001B3u, h ^= h >> 29;
    return mix(h);
}

struct pieces *pieces_new(int64_t groups)
{
    struct pieces *p = calloc(1, sizeof *p);
    p->groups = groups, p->room = 1 << 12, p->letter_room = 1 << 16, p->slots = 1 << 14;
    p->start = malloc((p->room + 1) * sizeof *p->start), p->start[0] = 0;
    p->seen = malloc(p->room * groups * sizeof *p->seen);
    p->text = malloc(p->letter_room * sizeof *p->text);
    p->slot = calloc(p->slots, sizeof *p->slot);
    return p;
}

void pieces_free(struct pieces *p)
{
    free(p->start), free(p->seen), free(p->text), free(p->slot), free(p);
}

static int64_t *slot_of(struct pieces *p, const uint32_t *text, int64_t length)
{
    for (uint64_t h = hash_of(text, length);; h++) {
        int64_t *slot = p->slot + (h & (p->slots - 1));
        if (!*slot) return slot;
        const int64_t *start = p->start + *slot - 1;
        if (start[1] - start[0] == length && !memcmp(p->text + start[0], text, length * sizeof *text)) return slot;
    }
}

void pieces_add(struct pieces *p, const uint32_t *text, int64_t end, int64_t group, const uint8_t *kind_of, int phrases)
{
    for (int64_t at = 0, stop; at < end; at = stop) {
        stop = piece_end(text, at, end, kind_of, phrases);
        const int64_t length = stop - at;
        int64_t *slot = slot_of(p, text + at, length);
        if (!*slot) {
            if (p->count == p->room) {
                p->room *= 2;
                p->start = realloc(p->start, (p->room + 1) * sizeof *p->start);
                p->seen = realloc(p->seen, p->room * p->groups * sizeof *p->seen);
            }
            if (p->letters + length > p->letter_room) {
                p->letter_room = 2 * (p->letters + length);
                p->text = realloc(p->text, p->letter_room * sizeof *p->text);
            }
            memcpy(p->text + p->letters, text + at, length * sizeof *text);
            memset(p->seen + p->count * p->groups, 0, p->groups * sizeof *p->seen);
            p->letters += length, *slot = ++p->count, p->start[p->count] = p->letters;
            if (2 * p->count > p->slots) {
                free(p->slot);
                p->slots *= 4, p->slot = calloc(p->slots, sizeof *p->slot);
                for (int64_t i = 0; i < p->count; i++)
                    *slot_of(p, p->text + p->start[i], p->start[i + 1] - p->start[i]) = i + 1;
                slot = slot_of(p, text + at, length);
            }
        }
        p->seen[(*slot - 1) * p->groups + group]++;
    }
}

int64_t pieces_count(const struct pieces *p) { return p->count; }
int64_t pieces_letters(const struct pieces *p) { return p->letters; }

void pieces_get(const struct pieces *p, int64_t *start, uint32_t *text, int64_t *seen)
{
    memcpy(start, p->start, (p->count + 1) * sizeof *start);
    memcpy(text, p->text, p->letters * sizeof *text);
    memcpy(seen, p->seen, p->count * p->groups * sizeof *seen);
}

/* -- merges -------------------------------------------------------------------------------------------------------- */

struct pair {
    uint64_t key; /* left << 32 | right */
    int64_t count, queued; /* queued: the count of its last entry in the heap, -1: none */
    double weight;
    int32_t *at, used, room; /* pieces that may hold it */
};

struct entry {
    double score;
    uint64_t key;
    int64_t pair;
};

struct table {
    struct pair *pair;
    int64_t count, room, slots, *slot;
    struct entry *heap;
    int64_t waiting, heap_room;
};

static int64_t *pair_slot(struct table *t, uint64_t key)
{
    for (uint64_t h = mix(key);; h++) {
        int64_t *slot = t->slot + (h & (t->slots - 1));
        if (!*slot || t->pair[*slot - 1].key == key) return slot;
    }
}

static struct pair *pair_of(struct table *t, uint64_t key, double weight)
{
    int64_t *slot = pair_slot(t, key);
    if (!*slot) {
        if (t->count == t->room) t->room *= 2, t->pair = realloc(t->pair, t->room * sizeof *t->pair);
        t->pair[t->count] = (struct pair){.key = key, .queued = -1, .weight = weight};
        *slot = ++t->count;
        if (2 * t->count > t->slots) {
            free(t->slot);
            t->slots *= 4, t->slot = calloc(t->slots, sizeof *t->slot);
            for (int64_t i = 0; i < t->count; i++) *pair_slot(t, t->pair[i].key) = i + 1;
            slot = pair_slot(t, key);
        }
    }
    return t->pair + *slot - 1;
}

static void table_new(struct table *t)
{
    memset(t, 0, sizeof *t);
    t->room = 1 << 12, t->slots = 1 << 14;
    t->pair = malloc(t->room * sizeof *t->pair), t->slot = calloc(t->slots, sizeof *t->slot);
}

static void table_free(struct table *t)
{
    for (int64_t i = 0; i < t->count; i++) free(t->pair[i].at);
    free(t->pair), free(t->slot), free(t->heap);
}

static int before(const struct entry *a, const struct entry *b)
{
    return a->score != b->score ? a->score > b->score : a->key < b->key;
}

/* A pair in the heap always has an entry with at least its score. */
static void push(struct table *t, struct pair *p)
{
    const struct entry new = {p->count * p->weight, p->key, p - t->pair};
    if (new.score <= 0 || p->queued == p->count) return;
    p->queued = p->count;
    if (t->waiting == t->heap_room) {
        t->heap_room = t->heap_room ? 2 * t->heap_room : 1 << 12;
        t->heap = realloc(t->heap, t->heap_room * sizeof *t->heap);
    }
    int64_t i = t->waiting++;
    for (; i && before(&new, t->heap + (i - 1) / 2); i = (i - 1) / 2) t->heap[i] = t->heap[(i - 1) / 2];
    t->heap[i] = new;
}

static struct entry pop(struct table *t)
{
    const struct entry top = t->heap[0], last = t->heap[--t->waiting];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < t->waiting; i = child) {
        if (child + 1 < t->waiting && before(t->heap + child + 1, t->heap + child)) child++;
        if (!before(t->heap + child, &last)) break;
        t->heap[i] = t->heap[child];
    }
    if (t->waiting) t->heap[i] = last;
    return top;
}

static void found_in(struct pair *p, int32_t piece)
{
    if (p->used && p->at[p->used - 1] == piece) return;
    if (p->used == p->room) p->room = p->room ? 2 * p->room : 4, p->at = realloc(p->at, p->room * sizeof *p->at);
    p->at[p->used++] = piece;
}

static uint64_t key_of(int64_t left, int64_t right) { return (uint64_t)left << 32 | (uint64_t)right; }

/* Pairs of neighbours and how often they stand there, unsorted; how many. `keys`, `counts`: room for all of them. */
int64_t count_pairs(const int32_t *symbols, const int64_t *start, const int64_t *length, const int64_t *seen,
                    int64_t pieces, uint64_t *keys, int64_t *counts)
{
    struct table t;
    table_new(&t);
    for (int64_t w = 0; w < pieces; w++)
        for (int64_t i = start[w]; i + 1 < start[w] + length[w]; i++)
            pair_of(&t, key_of(symbols[i], symbols[i + 1]), 1)->count += seen[w];
    for (int64_t i = 0; i < t.count; i++) keys[i] = t.pair[i].key, counts[i] = t.pair[i].count;
    const int64_t found = t.count;
    table_free(&t);
    return found;
}

/* Replace (left, right) by `new` from left to right; the new length. */
static int64_t replace(int32_t *symbols, int64_t length, int32_t left, int32_t right, int32_t new)
{
    int64_t to = 0;
    for (int64_t i = 0; i < length; i++)
        if (symbols[i] == left && i + 1 < length && symbols[i + 1] == right) symbols[to++] = new, i++;
        else symbols[to++] = symbols[i];
    return to;
}

struct change {
    uint64_t key;
    int64_t count;
    int32_t piece;
};

struct changes {
    struct change *of;
    int64_t used, room;
};

static void note(struct changes *c, uint64_t key, int64_t count, int32_t piece)
{
    if (c->used == c->room) c->room = c->room ? 2 * c->room : 1 << 10, c->of = realloc(c->of, c->room * sizeof *c->of);
    c->of[c->used++] = (struct change){key, count, piece};
}

static int64_t replace_noting(int32_t *s, int64_t length, int32_t left, int32_t right, int32_t new, int64_t seen,
                              int32_t piece, struct changes *c)
{
    int64_t to = 0;
    for (int64_t i = 0; i < length; i++) {
        if (s[i] != left || i + 1 == length || s[i + 1] != right) {
            s[to++] = s[i];
            continue;
        }
        if (to) note(c, key_of(s[to - 1], left), -seen, piece), note(c, key_of(s[to - 1], new), seen, piece);
        if (i + 2 < length) note(c, key_of(right, s[i + 2]), -seen, piece), note(c, key_of(new, s[i + 2]), seen, piece);
        s[to++] = new, i++;
    }
    return to;
}

struct name { /* of a token: two polynomials of its bytes modulo 2^64 and the bases' powers of its length */
    uint64_t first, first_power, second, second_power;
};

static struct name spelt(struct name a, struct name b)
{
    return (struct name){a.first * b.first_power + b.first, a.first_power * b.first_power,
                         a.second * b.second_power + b.second, a.second_power * b.second_power};
}

static int64_t token_slot(const int32_t *slot, int64_t slots, const struct name *name, struct name wanted)
{
    for (uint64_t h = mix(wanted.first ^ mix(wanted.second));; h++) {
        const int64_t at = h & (slots - 1);
        if (slot[at] < 0 || (name[slot[at]].first == wanted.first && name[slot[at]].second == wanted.second)) return at;
    }
}

/* The merges of a round, at most `most` new tokens; how many merges. `tokens` is how many there are, before and after.

   A pair's score is its count x weight. With `keys` (sorted) those pairs alone have one, else all have weight 1. Of
   equal scores the smaller pair comes first. Two
   merges that spell the same bytes make one token, whose `name` tells; one without bytes has first_power 0. A pair that was merged before keeps its count when it comes
   again, as in the library `tokenizers`. */
int64_t merge_round(int32_t *symbols, const int64_t *start, int64_t *length, const int64_t *seen, int64_t pieces,
                    const uint64_t *keys, const double *weights, int64_t weighed, int64_t fewest, int64_t most,
                    int64_t *tokens, struct name *name, int32_t *merges, int64_t merge_room)
{
    struct table t;
    struct changes c = {0};
    int64_t made = 0, done = 0, slots = 1 << 10;
    table_new(&t);
    for (int64_t i = 0; i < weighed; i++) pair_of(&t, keys[i], weights[i]);
    for (int64_t w = 0; w < pieces; w++)
        for (int64_t i = start[w]; i + 1 < start[w] + length[w]; i++) {
            struct pair *p = pair_of(&t, key_of(symbols[i], symbols[i + 1]), keys ? 0 : 1);
            p->count += seen[w];
            if (p->weight > 0) found_in(p, (int32_t)w);
        }
    for (int64_t i = 0; i < t.count; i++) push(&t, t.pair + i);
    while (slots < 4 * (*tokens + most)) slots *= 2;
    int32_t *slot = malloc(slots * sizeof *slot);
    memset(slot, -1, slots * sizeof *slot);
    for (int64_t i = 0; i < *tokens; i++)
        if (name[i].first_power) slot[token_slot(slot, slots, name, name[i])] = (int32_t)i;
    while (made < most && done < merge_room && t.waiting) {
        const struct entry top = pop(&t);
        struct pair *p = t.pair + top.pair;
        if (top.score != p->count * p->weight) {
            push(&t, p);
            continue;
        }
        if (p->count < fewest) {
            p->queued = -1;
            continue;
        }
        const int32_t left = (int32_t)(p->key >> 32), right = (int32_t)(p->key & 0xFFFFFFFFu);
        const struct name both = spelt(name[left], name[right]);
        const int64_t place = token_slot(slot, slots, name, both);
        int32_t new = slot[place];
        if (new < 0) {
            new = slot[place] = (int32_t)(*tokens)++, made++;
            name[new] = both;
        }
        merges[3 * done] = left, merges[3 * done + 1] = right, merges[3 * done + 2] = new, done++;
        int32_t *at = p->at;
        const int32_t used = p->used;
        p->at = NULL, p->used = p->room = 0, p->queued = -1, c.used = 0;
        for (int32_t i = 0; i < used; i++)
            length[at[i]] = replace_noting(symbols + start[at[i]], length[at[i]], left, right, new, seen[at[i]], at[i], &c);
        free(at);
        for (int64_t i = 0; i < c.used; i++) {
            struct pair *changed = pair_of(&t, c.of[i].key, keys ? 0 : 1);
            changed->count += c.of[i].count;
            if (c.of[i].count > 0 && changed->weight > 0) found_in(changed, c.of[i].piece);
        }
        for (int64_t i = 0; i < c.used; i++)
            if (c.of[i].count > 0) push(&t, t.pair + *pair_slot(&t, c.of[i].key) - 1);
    }
    free(slot), free(c.of), table_free(&t);
    return done;
}

/* Apply merges (count, 3) in their order to every piece. A piece looks at those of its own pairs alone. */
void merge_again(int32_t *symbols, const int64_t *start, int64_t *length, int64_t pieces, const int32_t *merges,
                 int64_t count)
{
    struct table rank;
    table_new(&rank);
    for (int64_t i = 0; i < count; i++) pair_of(&rank, key_of(merges[3 * i], merges[3 * i + 1]), 1)->count = i;
    for (int64_t w = 0; w < pieces; w++)
        for (;;) {
            int32_t *s = symbols + start[w];
            int64_t best = count;
            for (int64_t i = 0; i + 1 < length[w]; i++) {
                const int64_t found = *pair_slot(&rank, key_of(s[i], s[i + 1]));
                if (found && rank.pair[found - 1].count < best) best = rank.pair[found - 1].count;
            }
            if (best == count) break;
            length[w] = replace(s, length[w], merges[3 * best], merges[3 * best + 1], merges[3 * best + 2]);
        }
    table_free(&rank);
}
