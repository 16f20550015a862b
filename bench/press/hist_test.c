/* The histogram against sorted numbers. Prints nothing and exits with 0 if it keeps its promise. */
#include "hist.h"

#include <stdio.h>
#include <stdlib.h>

#define N 20000

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

int main(void)
{
    static const double percents[] = {0, 0.01, 1, 25, 50, 90, 99, 99.9, 99.99, 100};
    static uint64_t values[N];
    static hist h;
    uint64_t seed = 1;
    unsigned i, wrong = 0;

    for (i = 0; i < HIST_SLOTS; i++) { /* the slots follow one another without a gap */
        uint64_t end = hist_slot_end(i);
        wrong += hist_slot(end) != i || (i + 1 < HIST_SLOTS && hist_slot(end + 1) != i + 1);
    }
    for (i = 0; i < N; i++) { /* of all magnitudes: 1 ns to 2^39 ns */
        seed = seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        values[i] = (seed >> 24) >> (seed >> 18) % 39;
        hist_add(&h, (int64_t)values[i], 1);
    }
    qsort(values, N, sizeof values[0], compare);
    for (i = 0; i < sizeof percents / sizeof percents[0]; i++) {
        double rank = percents[i] / 100 * N;
        unsigned at = (unsigned)rank + (rank > (unsigned)rank);
        uint64_t exact = values[at ? at - 1 : 0], got = hist_percentile(&h, percents[i]);
        if (got < exact || (double)got > (double)exact * 1.01) {
            printf("p%g: %llu, should be %llu\n", percents[i], (unsigned long long)got,
                   (unsigned long long)exact);
            wrong++;
        }
    }
    wrong += h.max != values[N - 1] || h.count != N;
    hist_clear(&h);
    hist_add(&h, -5, 1);
    hist_add(&h, INT64_MAX, 2); /* out of range: counted, and the maximum is right */
    wrong += hist_percentile(&h, 1) != 0 || h.max != INT64_MAX || h.count != 3;
    if (wrong) {
        printf("%u wrong\n", wrong);
    }
    return wrong != 0;
}
