/* A histogram of durations in nanoseconds, up to 18 minutes, with an error of less than 1 %.
 *
 * Every power of two is cut into 128 equal buckets; what is asked of a bucket is answered with its
 * upper end, so a percentile is never below the true one and at most 1/128 above it. Recording is
 * a few instructions and never allocates. */
#ifndef PRESS_HIST_H
#define PRESS_HIST_H

#include <stdint.h>
#include <string.h>

#define HIST_BITS  7
#define HIST_TOP   40 /* durations from 2^40 ns on are counted as just below it; max is exact */
#define HIST_SLOTS (((HIST_TOP - HIST_BITS - 1) << HIST_BITS) + (2 << HIST_BITS))

typedef struct hist {
    uint64_t count;
    uint64_t max;
    double sum;
    uint64_t slots[HIST_SLOTS];
} hist;

static inline void hist_clear(hist *h)
{
    memset(h, 0, sizeof *h);
}

static inline unsigned hist_slot(uint64_t ns)
{
    unsigned shift = 0;

    if (ns >> HIST_TOP) {
        ns = (UINT64_C(1) << HIST_TOP) - 1;
    }
    if (ns >> (HIST_BITS + 1)) {
        shift = 63u - HIST_BITS - (unsigned)__builtin_clzll(ns);
    }
    return (shift << HIST_BITS) + (unsigned)(ns >> shift);
}

/* The longest duration that falls into a slot. */
static inline uint64_t hist_slot_end(unsigned slot)
{
    unsigned shift = slot >> HIST_BITS ? (slot >> HIST_BITS) - 1 : 0;
    uint64_t low = slot - (shift << HIST_BITS);

    return ((low + 1) << shift) - 1;
}

/* `times` durations of the same length. A negative one counts as 0. */
static inline void hist_add(hist *h, int64_t ns, uint64_t times)
{
    uint64_t v = ns > 0 ? (uint64_t)ns : 0;

    h->count += times;
    h->sum += (double)v * (double)times;
    h->slots[hist_slot(v)] += times;
    if (v > h->max && times) {
        h->max = v;
    }
}

/* The duration that `percent` of all do not exceed; 0 if there are none. */
static inline uint64_t hist_percentile(const hist *h, double percent)
{
    double rank = percent / 100 * (double)h->count;
    uint64_t seen = 0;
    unsigned i;

    for (i = 0; i < HIST_SLOTS && h->count; i++) {
        seen += h->slots[i];
        if (seen && (double)seen >= rank) {
            return hist_slot_end(i) < h->max ? hist_slot_end(i) : h->max;
        }
    }
    return h->max;
}

static inline double hist_mean(const hist *h)
{
    return h->count ? h->sum / (double)h->count : 0;
}

#endif
