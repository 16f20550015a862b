/* fleet_count.h: a histogram of latencies, and counts by name, for fleet_consumer. Neither grows,
 * however long the program runs.
 */
#ifndef FLEET_COUNT_H_INCLUDED
#define FLEET_COUNT_H_INCLUDED

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define HIST_SLOTS (16 * 40)

/* A histogram of microseconds: every power of two is cut into 16 slots. */
typedef struct hist {
    uint64_t count;
    uint64_t slots[HIST_SLOTS];
} hist;

static void hist_add(hist *h, int64_t us)
{
    uint64_t v = us > 0 ? (uint64_t)us : 0;
    unsigned shift = 0;

    while (v >> shift >= 32) {
        shift++;
    }
    if (16 * shift + (v >> shift) < HIST_SLOTS) {
        h->slots[16 * shift + (v >> shift)]++;
        h->count++;
    }
}

/* The time that `percent` of all values do not exceed. */
static uint64_t hist_percentile(const hist *h, unsigned percent)
{
    uint64_t seen = 0;
    unsigned i, shift;

    for (i = 0; i < HIST_SLOTS && h->count > 0; i++) {
        seen += h->slots[i];
        if (seen * 100 >= h->count * percent) {
            shift = i < 32 ? 0 : i / 16 - 1;
            return ((uint64_t)(i - 16 * shift + 1) << shift) - 1;
        }
    }
    return 0;
}

#define ROWS 32 /* names that are counted separately; further names are left out */

typedef struct row {
    char key[32];
    uint64_t count, before; /* before: when the last line was printed */
} row;

static void count_row(row *rows, const char *key, size_t size)
{
    int i = 0;

    while (i < ROWS && rows[i].count > 0 &&
           (strlen(rows[i].key) != size || memcmp(rows[i].key, key, size) != 0)) {
        i++;
    }
    if (i < ROWS && size < sizeof rows[i].key) {
        memcpy(rows[i].key, key, size);
        rows[i].count++;
    }
}

static void print_rows(const char *name, const row *rows)
{
    int i;

    printf(",\"%s\":{", name);
    for (i = 0; i < ROWS && rows[i].count > 0; i++) { /* no key needs escapes */
        printf("%s\"%s\":%llu", i > 0 ? "," : "", rows[i].key, (unsigned long long)rows[i].count);
    }
    printf("}");
}

#endif /* FLEET_COUNT_H_INCLUDED */
