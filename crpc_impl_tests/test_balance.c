/* impl-balance: how often each provider is picked, compared with the expected share; lists that
 * change; picks when few providers can be used. Seeds are fixed: a test that passes once always
 * does. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define MOST 2000
#define KINDS 7
#define MS INT64_C(1000)

static const crpc_balancer kinds[KINDS] = {
    CRPC_BALANCER_RANDOM,       CRPC_BALANCER_WEIGHTED_RANDOM,
    CRPC_BALANCER_ROUND_ROBIN,  CRPC_BALANCER_WEIGHTED_ROUND_ROBIN,
    CRPC_BALANCER_LEAST_ACTIVE, CRPC_BALANCER_CONSISTENT_HASH,
    CRPC_BALANCER_P2C,
};

/* A balancer and its providers; the list holds the first n of them unless a test changes it. */
/* Begins and ends a call to the item at an index; without memory for the list no item is known. */
static void balance_begin(crpci_balance *b, size_t i)
{
    if (b->items && i < b->count)
        crpci_balance_item_begin(b, b->items[i]);
}

static void balance_end(crpci_balance *b, size_t i, bool ok, int64_t latency_us, int64_t now_us)
{
    if (b->items && i < b->count)
        crpci_balance_item_end(b, b->items[i], ok, latency_us, now_us);
}

typedef struct fleet {
    crpci_heap *heap;
    crpci_balance b;
    crpci_balance_item items[MOST];
    crpci_balance_item *list[MOST];
    char addresses[MOST][24];
    bool down[MOST]; /* by index in the list */
    long asked;      /* calls of usable() */
    size_t n;
    uint64_t seed;
    int64_t now_us;
} fleet;

static fleet f; /* 200 KB: too large for the stack */

static void fleet_open(crpc_balancer kind, size_t n, const uint32_t *weights)
{
    crpc_hooks hooks = ct_hooks();
    size_t i;
    memset(&f, 0, sizeof f);
    f.seed = 424242;
    f.now_us = 1000000000;
    f.n = n;
    assert_int_equal(crpci_heap_open(&f.heap, &hooks, 0), CRPC_OK);
    assert_int_equal(crpci_balance_open(&f.b, kind, 424242), CRPC_OK);
    for (i = 0; i < MOST; i++) {
        snprintf(f.addresses[i], sizeof f.addresses[i], "10.0.%u.%u:8000", (unsigned)i / 250,
                 (unsigned)i % 250);
        f.items[i].address = f.addresses[i];
        f.items[i].weight = weights && i < n ? weights[i] : 100;
        f.list[i] = &f.items[i];
    }
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, n), CRPC_OK);
}

static void fleet_close(void)
{
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, NULL, 0), CRPC_OK);
    crpci_heap_unref(f.heap);
}

static uint32_t draw(void)
{
    return (uint32_t)(ct_random_from(&f.seed) >> 32);
}

static bool usable(void *user, size_t i)
{
    fleet *fl = (fleet *)user;
    assert_true(i < fl->n);
    fl->asked++;
    return !fl->down[i];
}

static bool always(void *user, size_t i)
{
    (void)user, (void)i;
    return true;
}

static int pick_key(uint64_t key)
{
    int i = crpci_balance_pick(&f.b, key, draw(), f.now_us, usable, &f);
    assert_true(i >= -1 && i < (int)f.n);
    assert_true(i < 0 || !f.down[i]);
    return i;
}

static int pick(void)
{
    return pick_key(ct_random_from(&f.seed));
}

/* Checks the heap and the sums; called after each change. */
static void check(void)
{
    uint64_t total = 0;
    uint32_t at, weighty = 0;
    size_t i;
    for (i = 0; i < f.n; i++) {
        assert_ptr_equal(f.b.items[i], f.list[i]);
        assert_int_equal(f.list[i]->index, i);
        total += f.list[i]->weight;
        weighty += f.list[i]->weight != 0;
        if (crpci_balance_need(&f.b, CRPCI_BALANCE_SUMS) && total)
            assert_int_equal(crpci_balance_sums_find(&f.b, total - 1) <= i, true);
        if (crpci_balance_need(&f.b, CRPCI_BALANCE_SUMS) && f.list[i]->weight)
            assert_int_equal(crpci_balance_sums_find(&f.b, total - 1), i);
    }
    assert_true(f.b.total == total);
    if (!crpci_balance_need(&f.b, CRPCI_BALANCE_TURNS))
        return;
    assert_int_equal(f.b.heaped, weighty);
    for (at = 0; at < f.b.heaped; at++) {
        const crpci_balance_item *n = f.b.heap[at];
        assert_ptr_equal(n, f.list[n->index]);
        assert_int_equal(n->at, at + 1);
        assert_true(n->weight != 0);
        assert_true((int64_t)(n->turn - f.b.now) <= CRPCI_BALANCE_TURN);
        if (at)
            assert_false(crpci_balance_before(crpci_balance_need(&f.b, CRPCI_BALANCE_ACTIVE), n,
                                              f.b.heap[(at - 1) / 2]));
    }
}

/* Chi-square of counts against expected shares (in any unit), as a test at four standard
 * deviations: (x2 - df)^2 <= 16 x 2 df. */
static void assert_shares(const long *counts, const uint64_t *shares, size_t n)
{
    double x2 = 0, total = 0, all = 0;
    size_t i, df = 0;
    for (i = 0; i < n; i++) {
        total += (double)shares[i];
        all += (double)counts[i];
    }
    for (i = 0; i < n; i++) {
        double expected = all * (double)shares[i] / total, d = (double)counts[i] - expected;
        if (!shares[i]) {
            assert_int_equal(counts[i], 0);
            continue;
        }
        assert_true(expected >= 5); /* otherwise chi-square does not apply */
        x2 += d * d / expected;
        df++;
    }
    df -= 1;
    if (x2 > (double)df && (x2 - (double)df) * (x2 - (double)df) > 32.0 * (double)df)
        fail_msg("chi-square %.1f with %d degrees of freedom", x2, (int)df);
}

/* --- warm-up ------------------------------------------------------------------------------- */

static void warm_up(void **state)
{
    uint32_t was = 0;
    int64_t t;
    (void)state;
    /* Dubbo's own examples: 10 minutes, weight 100 */
    assert_int_equal(crpci_balance_warm_weight(100, -1, 600000), 1);
    assert_int_equal(crpci_balance_warm_weight(100, 0, 600000), 1);
    assert_int_equal(crpci_balance_warm_weight(100, 1, 600000), 1);
    assert_int_equal(crpci_balance_warm_weight(100, 60000, 600000), 10);
    assert_int_equal(crpci_balance_warm_weight(100, 300000, 600000), 50);
    assert_int_equal(crpci_balance_warm_weight(100, 599999, 600000), 99);
    assert_int_equal(crpci_balance_warm_weight(100, 600000, 600000), 100);
    assert_int_equal(crpci_balance_warm_weight(100, INT64_MAX, 600000), 100);
    assert_int_equal(crpci_balance_warm_weight(100, 5, 0), 100);
    assert_int_equal(crpci_balance_warm_weight(100, -5, -1), 100);
    assert_int_equal(crpci_balance_warm_weight(0, 5, 10), 0);
    assert_int_equal(crpci_balance_warm_weight(1, 5, 10), 1);
    assert_in_range(crpci_balance_warm_weight(UINT32_MAX, INT32_MAX / 2, INT32_MAX),
                    UINT32_MAX / 2 - 2, UINT32_MAX / 2 + 2);
    assert_int_equal(crpci_balance_warm_weight(UINT32_MAX, 1, 2), UINT32_MAX / 2);
    for (t = -10; t < 700; t++) {
        uint32_t w = crpci_balance_warm_weight(37, t, 600);
        assert_true(w >= was && w >= 1 && w <= 37);
        was = w;
    }
}

/* --- shares -------------------------------------------------------------------------------- */

static const uint32_t weights[] = {1, 2, 3, 50, 100, 100, 7, 400, 33, 1000};
#define WEIGHTS (sizeof weights / sizeof weights[0])
#define WEIGHTS_SUM 1696

static void random_is_uniform(void **state)
{
    static const size_t sizes[] = {2, 3, 10, 64, 1000};
    static long counts[MOST];
    static uint64_t shares[MOST];
    size_t s, i;
    long k;
    (void)state;
    for (s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        fleet_open(CRPC_BALANCER_RANDOM, sizes[s], NULL);
        memset(counts, 0, sizeof counts);
        for (i = 0; i < sizes[s]; i++)
            shares[i] = 1;
        for (k = 0; k < 100000; k++)
            counts[pick()]++;
        assert_int_equal(f.asked, 100000);
        assert_shares(counts, shares, sizes[s]);
        fleet_close();
    }
}

static void weighted_random_is_by_weight(void **state)
{
    long counts[WEIGHTS] = {0};
    uint64_t shares[WEIGHTS];
    size_t i;
    long k;
    (void)state;
    fleet_open(CRPC_BALANCER_WEIGHTED_RANDOM, WEIGHTS, weights);
    for (i = 0; i < WEIGHTS; i++)
        shares[i] = weights[i];
    for (k = 0; k < 200000; k++)
        counts[pick()]++;
    assert_int_equal(f.asked, 200000);
    assert_shares(counts, shares, WEIGHTS);
    /* and by changed weights, among them one that fills 32 bits and one that is drained */
    crpci_balance_reweigh(&f.b, 0, UINT32_MAX);
    crpci_balance_reweigh(&f.b, 1, UINT32_MAX / 2);
    crpci_balance_reweigh(&f.b, 2, 0);
    for (i = 3; i < WEIGHTS; i++)
        crpci_balance_reweigh(&f.b, i, UINT32_MAX / 16 * (uint32_t)i);
    check();
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 200000; k++)
        counts[pick()]++;
    for (i = 0; i < WEIGHTS; i++)
        shares[i] = f.items[i].weight;
    assert_shares(counts, shares, WEIGHTS);
    fleet_close();
}

static void round_robin_takes_turns(void **state)
{
    int first, k;
    (void)state;
    fleet_open(CRPC_BALANCER_ROUND_ROBIN, 7, NULL);
    first = pick();
    for (k = 1; k < 1000; k++)
        assert_int_equal(pick(), (first + k) % 7);
    /* a provider that is down is left out; the others keep their turns, each equally often */
    f.down[3] = f.down[4] = true;
    {
        static const int rest[] = {0, 1, 2, 5, 6};
        long counts[7] = {0};
        for (k = 0; k < 1000; k++)
            counts[pick()]++;
        for (k = 0; k < 5; k++)
            assert_int_equal(counts[rest[k]], 200);
    }
    fleet_close();
}

/* After each round of as many calls as the weights sum up to, each provider has had its share to
 * within one call; and two turns of a provider are no farther apart than its weight demands. */
static void weighted_round_robin_is_exact_and_smooth(void **state)
{
    static const crpc_balancer both[] = {CRPC_BALANCER_WEIGHTED_ROUND_ROBIN,
                                              CRPC_BALANCER_LEAST_ACTIVE};
    size_t kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) { /* one call at a time, least active is the same */
        long counts[WEIGHTS] = {0}, last[WEIGHTS] = {0}, k;
        size_t i;
        int round;
        fleet_open(both[kind], WEIGHTS, weights);
        for (k = 1; k <= 20L * WEIGHTS_SUM; k++) {
            int at = pick();
            assert_true(!counts[at] ||
                        k - last[at] <= WEIGHTS_SUM / (long)weights[at] + (long)WEIGHTS);
            counts[at]++;
            last[at] = k;
            balance_begin(&f.b, (size_t)at);
            balance_end(&f.b, (size_t)at, true, MS, f.now_us);
            if (k % WEIGHTS_SUM)
                continue;
            round = (int)(k / WEIGHTS_SUM);
            for (i = 0; i < WEIGHTS; i++)
                assert_in_range(counts[i], (long)weights[i] * round - 1,
                                (long)weights[i] * round + 1);
        }
        assert_int_equal(f.asked, 20L * WEIGHTS_SUM);
        check();
        fleet_close();
    }
}

/* With equal weights each provider has one turn before any has a second one. */
static void equal_turns(void **state)
{
    static int order[MOST];
    static long last[MOST];
    int kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        int i, k;
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 500,
                   NULL);
        memset(last, 0, sizeof last);
        for (i = 0; i < 500; i++) {
            order[i] = pick();
            assert_int_equal(last[order[i]]++, 0);
        }
        for (k = 0; k < 5000; k++)
            assert_int_equal(pick(), order[k % 500]);
        fleet_close();
    }
}

/* With many calls in flight that end at random, each pick takes a provider with the fewest per
 * weight. */
static void least_active_has_the_fewest(void **state)
{
    static int under_way[500];
    size_t equal;
    (void)state;
    for (equal = 0; equal < 2; equal++) {
        int count = 0, k;
        fleet_open(CRPC_BALANCER_LEAST_ACTIVE, WEIGHTS, equal ? NULL : weights);
        for (k = 0; k < 50000; k++) {
            if (count < 400 && (count < 300 || (ct_random_from(&f.seed) >> 40 & 1))) {
                int at = pick();
                size_t i;
                for (i = 0; i < f.n; i++)
                    assert_true((uint64_t)f.items[at].active * f.items[i].weight <=
                                (uint64_t)f.items[i].active * f.items[at].weight);
                balance_begin(&f.b, (size_t)at);
                under_way[count++] = at;
            } else {
                size_t which = crpci_balance_below(&f.seed, (size_t)count);
                balance_end(&f.b, (size_t)under_way[which], true, MS, f.now_us);
                under_way[which] = under_way[--count];
            }
            if (k % 1000 == 0)
                check();
        }
        fleet_close();
    }
}

/* Among equals the one that was picked longest ago is next, however long it was busy meanwhile. */
static void least_active_ties(void **state)
{
    static uint64_t taken[32];
    uint64_t clock = 0;
    int busy[16], count = 0, k;
    (void)state;
    fleet_open(CRPC_BALANCER_LEAST_ACTIVE, 32, NULL);
    for (k = 0; k < 32; k++)
        taken[pick()] = ++clock;
    for (k = 0; k < 100000; k++) {
        if (count < 16 && (ct_random_from(&f.seed) >> 40 & 3)) {
            int at = pick();
            size_t i;
            for (i = 0; i < 32; i++)
                assert_true(f.items[i].active || taken[at] <= taken[i]);
            taken[at] = ++clock;
            balance_begin(&f.b, (size_t)at);
            busy[count++] = at;
        } else if (count) {
            size_t which = crpci_balance_below(&f.seed, (size_t)count);
            balance_end(&f.b, (size_t)busy[which], true, MS, f.now_us);
            busy[which] = busy[--count];
        }
    }
    fleet_close();
}

/* Two different of n, each pair as likely, the better of them: the best but r of n is picked in
 * 2 (n - 1 - r) of n (n - 1) cases. */
static void p2c_takes_the_better_of_two(void **state)
{
    enum { N = 20 };
    long counts[N] = {0};
    uint64_t shares[N];
    size_t i;
    long k;
    (void)state;
    fleet_open(CRPC_BALANCER_P2C, N, NULL);
    for (k = 0; k < 100000; k++) /* nothing measured: uniform */
        counts[pick()]++;
    for (i = 0; i < N; i++)
        shares[i] = 1;
    assert_shares(counts, shares, N);
    for (i = 0; i < N; i++) {
        balance_begin(&f.b, i);
        balance_end(&f.b, i, true, (int64_t)(1000 + 10 * i), f.now_us);
        shares[i] = N - 1 - i;
    }
    memset(counts, 0, sizeof counts);
    f.asked = 0;
    for (k = 0; k < 100000; k++)
        counts[pick()]++;
    assert_int_equal(f.asked, 200000);
    assert_shares(counts, shares, N);
    for (i = 0; i < N; i++) { /* by weight: now the last is the best */
        crpci_balance_reweigh(&f.b, i, (uint32_t)(100 + 10 * i));
        shares[i] = i;
    }
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 100000; k++)
        counts[pick()]++;
    assert_shares(counts, shares, N);
    for (i = 0; i < N; i++) { /* by calls under way: again the first */
        for (k = 0; k < (long)i; k++)
            balance_begin(&f.b, i);
        shares[i] = N - 1 - i;
    }
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 100000; k++)
        counts[pick()]++;
    assert_shares(counts, shares, N);
    fleet_close();
}

/* --- p2c: latencies ------------------------------------------------------------------------ */

static void fading(void **state)
{
    /* 2^20 x 2^-k/8 */
    static const int64_t eighths[] = {1048576, 961548, 881744, 808563, 741455,
                                      679918,  623487, 571740, 524288};
    int64_t t, was = 1 << 20;
    int k;
    (void)state;
    assert_int_equal(crpci_balance_fade(1 << 20, 0), 1 << 20);
    assert_int_equal(crpci_balance_fade(1 << 20, -5), 1 << 20);
    for (k = 0; k <= 8; k++)
        assert_in_range(crpci_balance_fade(1 << 20, (int64_t)k << 20), eighths[k] * 995 / 1000,
                        eighths[k] * 1005 / 1000);
    for (k = 0; k <= 20; k++)
        assert_int_equal(crpci_balance_fade(1 << 20, (int64_t)k << 23), 1 << (20 - k));
    assert_int_equal(crpci_balance_fade(CRPCI_BALANCE_LATENCY_MOST, INT64_MAX), 0);
    for (t = 0; t < 300000000; t += 9973) {
        int64_t v = crpci_balance_fade(1 << 20, t);
        assert_true(v <= was && was - v < (1 << 20) / 900);
        was = v;
    }
}

static int64_t latency_of(size_t i)
{
    return f.items[i].latency >> CRPCI_BALANCE_LATENCY_BITS;
}

static void one_call(size_t i, bool ok, int64_t latency)
{
    balance_begin(&f.b, i);
    f.now_us += latency;
    balance_end(&f.b, i, ok, latency, f.now_us);
}

static void latencies_peak_and_fade(void **state)
{
    int k;
    (void)state;
    fleet_open(CRPC_BALANCER_P2C, 3, NULL);
    one_call(0, true, 1000);
    assert_int_equal(latency_of(0), 1000);
    one_call(0, true, 90000); /* at once */
    assert_int_equal(latency_of(0), 90000);
    one_call(0, true, 1000); /* a quick reply lowers it slowly */
    assert_in_range(latency_of(0), 89900, 90000);
    for (k = 0; k < 8389; k++)
        one_call(0, true, 1000);
    assert_in_range(latency_of(0), 45000, 46500); /* half of the difference is left */
    /* the same in steps that are rounded to nothing one by one */
    for (k = 0; k < 8389; k++) {
        int j;
        for (j = 0; j < 20; j++) {
            f.now_us -= 950;
            one_call(0, true, 1000);
        }
    }
    assert_in_range(latency_of(0), 22500, 25000);
    for (k = 0; k < 100000; k++)
        one_call(0, true, 1000);
    assert_in_range(latency_of(0), 1000, 1050);
    one_call(0, true, 2000);
    for (k = 0; k < 838861; k++) { /* each a fifth of the smallest step */
        f.now_us -= 990;
        one_call(0, true, 1000);
    }
    assert_in_range(latency_of(0), 1480, 1600);
    one_call(1, false, 10); /* a fast failure is no low latency */
    assert_true(latency_of(1) > latency_of(0) / 2);
    for (k = 0; k < 100; k++)
        one_call(1, false, 10);
    assert_int_equal(f.items[1].latency, CRPCI_BALANCE_LATENCY_MOST);
    one_call(2, true, INT64_MAX / 4);
    assert_int_equal(f.items[2].latency, CRPCI_BALANCE_LATENCY_MOST);
    one_call(2, false, -7); /* says nothing */
    assert_int_equal(f.items[2].latency, CRPCI_BALANCE_LATENCY_MOST);
    assert_int_equal(f.items[2].active, 0);
    fleet_close();
}

static int64_t about_1_ms(void)
{
    return 800 + (int64_t)crpci_balance_below(&f.seed, 401);
}

/* A provider that becomes ten times slower gets few calls, and its share back when it has
 * recovered; a new provider gets one call, and its share when that call has ended. */
static void a_slow_provider_is_left_alone_and_comes_back(void **state)
{
    long counts[10];
    int k, phase;
    (void)state;
    fleet_open(CRPC_BALANCER_P2C, 10, NULL);
    for (phase = 0; phase < 3; phase++) {
        memset(counts, 0, sizeof counts);
        if (phase == 2) { /* recovered: after a minute the shares are as before */
            for (k = 0; k < 60000; k++)
                one_call((size_t)pick(), true, about_1_ms());
        }
        for (k = 0; k < 20000; k++) {
            int i = pick();
            counts[i]++;
            one_call((size_t)i, true, about_1_ms() * (phase == 1 && i == 4 ? 10 : 1));
        }
        if (phase == 1)
            assert_true(counts[4] < 200);
        else
            assert_in_range(counts[4], 1000, 3000);
    }
    f.n = 11;
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 11), CRPC_OK);
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 1000; k++) {
        int i = pick();
        balance_begin(&f.b, (size_t)i);
        if (i != 10)
            balance_end(&f.b, (size_t)i, true, 1000, f.now_us);
    }
    assert_int_equal(f.items[10].active, 1);
    fleet_close();
}

/* --- consistent hash ----------------------------------------------------------------------- */

/* 10 providers, 100,000 keys: the most loaded has less than 1.25 of the mean. */
static void keys_are_spread_evenly(void **state)
{
    long counts[10] = {0};
    int k;
    size_t i;
    (void)state;
    fleet_open(CRPC_BALANCER_CONSISTENT_HASH, 10, NULL);
    for (k = 0; k < 100000; k++) /* consecutive numbers, the least random keys */
        counts[pick_key((uint64_t)k)]++;
    assert_int_equal(f.asked, 100000);
    for (i = 0; i < 10; i++)
        assert_in_range(counts[i], 7500, 12500);
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 100000; k++) {
        char key[24];
        int n = snprintf(key, sizeof key, "user-%d", k);
        counts[pick_key(crpci_base_hash(key, (size_t)n))]++;
    }
    for (i = 0; i < 10; i++)
        assert_in_range(counts[i], 7500, 12500);
    fleet_close();
}

/* Another program computed these: clients of any byte order, version and order of the list
 * agree. */
static void golden_keys(void **state)
{
    static const uint64_t keys[] = {0, 1, 2, 3, 42, 1000, 0xdeadbeef, UINT64_MAX};
    static const int expected[] = {9, 9, 3, 1, 7, 8, 2, 9};
    static const int users[] = {7, 7, 2, 1, 3, 7, 8, 8};
    int i, round;
    (void)state;
    fleet_open(CRPC_BALANCER_CONSISTENT_HASH, 10, NULL);
    for (round = 0; round < 2; round++) {
        for (i = 0; i < 8; i++) {
            char key[24];
            int n = snprintf(key, sizeof key, "user-%d", i);
            assert_ptr_equal(f.list[pick_key(keys[i])], &f.items[expected[i]]);
            assert_ptr_equal(f.list[pick_key(crpci_base_hash(key, (size_t)n))],
                             &f.items[users[i]]);
        }
        for (i = 0; i < 10; i++) /* the list in another order */
            f.list[i] = &f.items[(i * 7 + 3) % 10];
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 10), CRPC_OK);
    }
    fleet_close();
}

/* If a provider leaves the list, or only cannot be used, its keys move and no others. */
static void only_its_keys_move(void **state)
{
    static crpci_balance_item *before[100000];
    long moved[2] = {0, 0};
    int k, gone;
    size_t i;
    (void)state;
    fleet_open(CRPC_BALANCER_CONSISTENT_HASH, 10, NULL);
    for (k = 0; k < 100000; k++)
        before[k] = f.list[pick_key((uint64_t)k)];
    for (gone = 0; gone < 2; gone++) {
        if (gone) {
            f.down[3] = false;
            f.n = 9;
            for (i = 3; i < 9; i++)
                f.list[i] = &f.items[i + 1];
            assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 9), CRPC_OK);
        } else {
            f.down[3] = true;
        }
        for (k = 0; k < 100000; k++) {
            crpci_balance_item *n = f.list[pick_key((uint64_t)k)];
            if (before[k] == &f.items[3])
                moved[gone]++;
            else
                assert_ptr_equal(n, before[k]);
        }
    }
    assert_in_range(moved[0], 7500, 12500);
    assert_int_equal(moved[0], moved[1]);
    fleet_close();
}

/* With one usable provider in a hundred a key still always goes to the same one, and shares are
 * even. */
static void keys_when_few_are_usable(void **state)
{
    static long counts[1000];
    int k;
    size_t i;
    (void)state;
    fleet_open(CRPC_BALANCER_CONSISTENT_HASH, 1000, NULL);
    for (i = 0; i < 1000; i++)
        f.down[i] = i % 100 != 7;
    memset(counts, 0, sizeof counts);
    for (k = 0; k < 5000; k++) {
        int at = pick_key((uint64_t)k);
        assert_int_equal(pick_key((uint64_t)k), at);
        counts[at]++;
    }
    for (i = 0; i < 10; i++)
        assert_in_range(counts[i * 100 + 7], 200, 800);
    fleet_close();
}

/* The ring is sorted, and ring_find agrees with a linear search. */
static void the_ring(void **state)
{
    static const size_t sizes[] = {1, 2, 3, 7, 50, 2000};
    size_t s, i, k;
    (void)state;
    for (s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        size_t points = sizes[s] * CRPCI_BALANCE_POINTS;
        static long has[MOST];
        memset(has, 0, sizeof has);
        fleet_open(CRPC_BALANCER_CONSISTENT_HASH, sizes[s], NULL);
        for (i = 0; i < points; i++) {
            assert_true(!i || f.b.ring[i - 1] < f.b.ring[i]);
            has[f.b.ring[i] & (CRPCI_BALANCE_MOST - 1)]++;
        }
        for (i = 0; i < sizes[s]; i++)
            assert_int_equal(has[i], CRPCI_BALANCE_POINTS);
        for (k = 0; k < 20000; k++) {
            uint64_t hash = k == 0 ? 0 : k == 1 ? UINT64_MAX : ct_random_from(&f.seed);
            size_t at;
            if (k > 1 && k % 3)
                hash = f.b.ring[k % points] + k % 3 - 1;
            at = crpci_balance_ring_find(&f.b, hash);
            assert_true(at < points);
            if (hash > f.b.ring[points - 1])
                assert_int_equal(at, 0);
            else
                assert_true(f.b.ring[at] >= hash && (!at || f.b.ring[at - 1] < hash));
        }
        fleet_close();
    }
}

/* --- when some cannot be used -------------------------------------------------------------- */

/* While any provider can be used one is picked, and a drained one only if no other can be used. */
static void a_pick_never_fails_while_one_is_usable(void **state)
{
    static const size_t sizes[] = {1, 2, 3, 5, 17, 64, 200};
    size_t kind, s;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        for (s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
            int round;
            fleet_open(kinds[kind], sizes[s], NULL);
            for (round = 0; round < 400; round++) {
                size_t i, up = 0, weighty = 0;
                unsigned share = (unsigned)(ct_random_from(&f.seed) >> 40) % 101;
                unsigned drained = (unsigned)(ct_random_from(&f.seed) >> 40) % 101;
                int k;
                for (i = 0; i < sizes[s]; i++) {
                    f.down[i] = (unsigned)(ct_random_from(&f.seed) >> 40) % 100 >= share;
                    crpci_balance_reweigh(
                        &f.b, i,
                        (unsigned)(ct_random_from(&f.seed) >> 40) % 100 >= drained ? 100 : 0);
                    up += !f.down[i];
                    weighty += !f.down[i] && f.items[i].weight;
                }
                if (round % 4 == 0) { /* just one */
                    size_t one = crpci_balance_below(&f.seed, sizes[s]);
                    for (i = 0; i < sizes[s]; i++)
                        f.down[i] = i != one;
                    up = 1;
                    weighty = f.items[one].weight != 0;
                }
                check();
                for (k = 0; k < 5; k++) {
                    int at = pick();
                    assert_int_equal(at >= 0, up > 0);
                    assert_true(at < 0 || !weighty || f.items[at].weight);
                    if (at >= 0 && k % 2) {
                        balance_begin(&f.b, (size_t)at);
                        f.now_us += 777;
                        if (k == 3)
                            balance_end(&f.b, (size_t)at, true, 777, f.now_us);
                    }
                }
                check();
            }
            fleet_close();
        }
    }
}

/* If only drained providers are left, each of ten gets a tenth of the calls, with every kind. */
static void only_drained_ones_are_left(void **state)
{
    size_t kind, i;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        long counts[10] = {0};
        uint64_t shares[10];
        int k;
        fleet_open(kinds[kind], 10, NULL);
        for (i = 0; i < 10; i++) {
            crpci_balance_reweigh(&f.b, i, 0);
            shares[i] = 1;
        }
        for (k = 0; k < 20000; k++)
            counts[pick()]++;
        assert_shares(counts, shares, 10);
        crpci_balance_reweigh(&f.b, 6, 1);
        for (k = 0; k < 100; k++)
            assert_int_equal(pick(), 6);
        fleet_close();
    }
}

/* The usable providers share the calls as if the others were not in the list, also when they are so
 * few that the whole list is searched. */
static void the_usable_share_as_if_alone(void **state)
{
    static const int keep[] = {1, 2, 50}; /* one in so many is usable */
    static long counts[MOST];
    size_t kind, s, i;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        if (kinds[kind] == CRPC_BALANCER_CONSISTENT_HASH)
            continue;
        for (s = 0; s < 3; s++) {
            long few[500], k;
            uint64_t shares[500];
            size_t n = 0;
            bool exact = kinds[kind] == CRPC_BALANCER_ROUND_ROBIN ||
                         kinds[kind] == CRPC_BALANCER_WEIGHTED_ROUND_ROBIN ||
                         kinds[kind] == CRPC_BALANCER_LEAST_ACTIVE;
            bool weighted = kinds[kind] == CRPC_BALANCER_WEIGHTED_RANDOM;
            fleet_open(kinds[kind], 500, NULL);
            for (i = 0; i < 500; i++) {
                f.down[i] = i % (size_t)keep[s] != 0;
                crpci_balance_reweigh(&f.b, i, weighted ? 100 + (uint32_t)i : 100);
            }
            memset(counts, 0, sizeof counts);
            for (k = 0; k < 50000; k++)
                counts[pick()]++;
            for (i = 0; i < 500; i++) {
                if (f.down[i])
                    continue;
                few[n] = counts[i];
                shares[n++] = f.items[i].weight;
            }
            if (!exact)
                assert_shares(few, shares, n);
            for (i = 0; i < n && exact; i++)
                assert_in_range(few[i], 50000 / (long)n - 1, 50000 / (long)n + 1);
            fleet_close();
        }
    }
}

/* A provider that could not be used for long does not get the turns that it missed. */
static void no_burst_after_an_absence(void **state)
{
    int kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        int k, count = 0;
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 10,
                   NULL);
        f.down[5] = true;
        for (k = 0; k < 100000; k++)
            assert_int_not_equal(pick(), 5);
        f.down[5] = false;
        for (k = 0; k < 1000; k++)
            count += pick() == 5;
        assert_in_range(count, 99, 101);
        for (k = 0; k < 10; k++) /* likewise for the others */
            f.down[k] = k != 5;
        for (k = 0; k < 100000; k++)
            assert_int_equal(pick(), 5);
        memset(f.down, 0, sizeof f.down);
        for (k = 0, count = 0; k < 1000; k++)
            count += pick() == 5;
        assert_in_range(count, 98, 102);
        fleet_close();
    }
}

/* --- cost ---------------------------------------------------------------------------------- */

/* With all of 2,000 usable one provider is looked at, or two; and the heap's comparisons are those
 * of its height. Counted, not timed. */
static void a_pick_examines_few_providers(void **state)
{
    size_t kind;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        int k;
        fleet_open(kinds[kind], 2000, NULL);
        for (k = 0; k < 10000; k++) {
            int at = pick();
            balance_begin(&f.b, (size_t)at);
            if (k % 3)
                balance_end(&f.b, (size_t)at, true, MS, f.now_us);
        }
        assert_int_equal(f.asked, kinds[kind] == CRPC_BALANCER_P2C ? 20000 : 10000);
        check();
        fleet_close();
    }
}

/* A provider that is idle because it is down is the least active one at each pick: usable() is not
 * called for it again and again. */
static void a_provider_that_is_down_is_not_asked_again_and_again(void **state)
{
    size_t i;
    int k;
    (void)state;
    fleet_open(CRPC_BALANCER_LEAST_ACTIVE, 10, NULL);
    for (i = 0; i < 10; i++) {
        if (i != 3)
            balance_begin(&f.b, i);
    }
    f.down[3] = true;
    for (k = 0; k < 1000; k++)
        assert_true(pick() >= 0);
    assert_true(f.asked < 6000); /* twice for it, and for each that is better than those before */
    fleet_close();
}

/* --- lists that change --------------------------------------------------------------------- */

/* Providers join, leave, change weight and state in any order; calls begin and end, also on
 * providers that have left. Each pick is in the list, the counts of calls are right, and so are the
 * heap and the sums. */
static void churn(void **state)
{
    static struct {
        crpci_balance_item *item;
        int64_t begin;
    } calls[300];
    static uint32_t active[MOST];
    size_t kind;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        int step, under_way = 0;
        size_t i;
        fleet_open(kinds[kind], 20, NULL);
        memset(active, 0, sizeof active);
        for (step = 0; step < 20000; step++) {
            uint64_t r = ct_random_from(&f.seed) >> 16;
            f.now_us += (int64_t)(r % 5000);
            if (r % 97 == 0) { /* another list, from the first 60 of them */
                f.n = 0;
                for (i = 0; i < 60; i++) {
                    if (!f.items[i].address || (ct_random_from(&f.seed) >> 40) % 3)
                        continue;
                    f.list[f.n++] = &f.items[i];
                }
                memset(f.down, 0, sizeof f.down);
                assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, f.n), CRPC_OK);
                check();
            } else if (r % 11 == 0 && f.n) {
                static const uint32_t some[] = {0, 1, 7, 100, 100, 5000, UINT32_MAX};
                crpci_balance_reweigh(&f.b, (r >> 20) % f.n, some[(r >> 10) % 7]);
            } else if (r % 13 == 0 && f.n) {
                f.down[(r >> 20) % f.n] ^= true;
            } else if (r % 2 && under_way < 300) {
                int at = pick();
                for (i = 0; i < f.n && at < 0; i++)
                    assert_true(f.down[i]);
                if (at < 0)
                    continue;
                calls[under_way].item = f.list[at];
                calls[under_way++].begin = f.now_us;
                balance_begin(&f.b, (size_t)at);
                active[f.list[at] - f.items]++;
            } else if (under_way) {
                size_t which = (r >> 20) % (size_t)under_way;
                crpci_balance_item *n = calls[which].item;
                crpci_balance_item_end(&f.b, n, (r >> 19 & 7) != 0, f.now_us - calls[which].begin,
                                       f.now_us);
                active[n - f.items]--;
                calls[which] = calls[--under_way];
            }
            if (step % 50 == 0)
                check();
        }
        for (i = 0; i < 60; i++)
            assert_int_equal(f.items[i].active, active[i]);
        fleet_close();
    }
}

/* A provider's statistics survive when it is in the next list, or in a later one. */
static void statistics_survive(void **state)
{
    crpci_balance_item *n = &f.items[1];
    long counts[4] = {0};
    uint64_t turn;
    int k;
    (void)state;
    fleet_open(CRPC_BALANCER_P2C, 3, NULL);
    balance_begin(&f.b, 1);
    one_call(1, true, 5000);
    f.list[1] = &f.items[3];
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 3), CRPC_OK);
    f.list[0] = n;
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 3), CRPC_OK);
    assert_int_equal(n->active, 1);
    assert_int_equal(n->latency, 5000 << CRPCI_BALANCE_LATENCY_BITS);
    fleet_close();
    /* a list that is read again and again disturbs no turns */
    fleet_open(CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 4, NULL);
    for (k = 0; k < 4000; k++) {
        turn = n->turn;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 4), CRPC_OK);
        if (k)
            assert_true(n->turn == turn);
        counts[pick()]++;
    }
    for (k = 0; k < 4; k++)
        assert_int_equal(counts[k], 1000);
    fleet_close();
}

/* A weight that changes a little each second, as in a warm-up, disturbs no turns either. */
static void reweighing_in_a_warm_up(void **state)
{
    int kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        long counts[4] = {0};
        int second, k, expected = 0;
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 4, NULL);
        for (second = 0; second < 600; second++) {
            uint32_t w = crpci_balance_warm_weight(100, second * 1000, 600000);
            crpci_balance_reweigh(&f.b, 0, w);
            for (k = 0; k < 1000; k++) {
                int at = pick();
                counts[at]++;
                balance_begin(&f.b, (size_t)at);
                balance_end(&f.b, (size_t)at, true, MS, f.now_us);
            }
            expected += 1000 * (int)w / (300 + (int)w);
        }
        assert_in_range(counts[0], expected * 99 / 100, expected * 101 / 100);
        for (k = 1; k < 4; k++)
            assert_in_range(counts[k], (600000 - expected) / 3 * 99 / 100,
                            (600000 - expected) / 3 * 101 / 100);
        fleet_close();
    }
}

/* A higher weight counts at once, not only after the turn that the old weight gave. */
static void a_greater_weight_comes_soon(void **state)
{
    int kind, k;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        uint32_t w[10] = {1, 100, 100, 100, 100, 100, 100, 100, 100, 100};
        int until = 0;
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 10, w);
        for (k = 0; k < 5000; k++)
            until += pick() == 0;
        assert_in_range(until, 5, 6);
        while (pick() != 0) /* its next turn is 900 calls away */
            continue;
        crpci_balance_reweigh(&f.b, 0, 100);
        for (until = 1; pick() != 0; until++)
            assert_true(until <= 20);
        fleet_close();
    }
}

/* Many new providers are not all picked before the old ones. */
static void new_ones_come_one_by_one(void **state)
{
    int kind, k;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        int fresh = 0;
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 50,
                   NULL);
        for (k = 0; k < 1234; k++)
            pick();
        f.n = 100;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 100), CRPC_OK);
        check();
        for (k = 0; k < 50; k++)
            fresh += pick() >= 50;
        assert_in_range(fresh, 12, 38);
        for (; k < 100; k++)
            fresh += pick() >= 50;
        assert_in_range(fresh, 45, 55);
        fleet_close();
    }
}

/* The position in an old heap, which a provider keeps, does not disturb the next list. */
static void one_comes_back_drained(void **state)
{
    int kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN, 8, NULL);
        f.n = 4;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 4), CRPC_OK);
        f.items[6].weight = 0;
        f.n = 8;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 8), CRPC_OK);
        check();
        balance_begin(&f.b, 6);
        check();
        crpci_balance_reweigh(&f.b, 6, 100);
        check();
        balance_end(&f.b, 6, true, MS, f.now_us);
        check();
        fleet_close();
    }
}

/* --- borders of numbers -------------------------------------------------------------------- */

/* Picks stay the same when virtual time wraps at 64 bits, and when crpci_balance_catch_up runs. */
static void virtual_time_wraps(void **state)
{
    static const uint64_t from[] = {UINT64_MAX - (UINT64_C(1) << 53), (UINT64_C(1) << 63) - 99,
                                    (UINT64_C(1) << 60) - (UINT64_C(1) << 50), 0};
    size_t s, i;
    (void)state;
    for (s = 0; s < 4; s++) {
        int kind;
        for (kind = 0; kind < 2; kind++) {
            long counts[WEIGHTS] = {0}, k;
            fleet_open(kind ? CRPC_BALANCER_LEAST_ACTIVE : CRPC_BALANCER_WEIGHTED_ROUND_ROBIN,
                       WEIGHTS, weights);
            f.b.now = from[s];
            for (i = 0; i < WEIGHTS; i++)
                f.items[i].length = 0; /* as if it joined now */
            assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, WEIGHTS), CRPC_OK);
            for (k = 0; k < 10L * WEIGHTS_SUM; k++)
                counts[pick()]++;
            for (i = 0; i < WEIGHTS; i++)
                assert_in_range(counts[i], 10L * weights[i] - 1, 10L * weights[i] + 1);
            check();
            fleet_close();
        }
    }
    { /* busy while the time goes round several times, then taken as any other */
        int k, count = 0;
        uint32_t ones[3] = {1, 1, 1};
        uint64_t rounds = 0, was;
        fleet_open(CRPC_BALANCER_LEAST_ACTIVE, 3, ones);
        balance_begin(&f.b, 2);
        for (k = 0; k < 40000; k++) {
            was = f.b.now;
            assert_int_not_equal(pick(), 2);
            rounds += f.b.now < was;
        }
        assert_true(rounds >= 2);
        check();
        balance_end(&f.b, 2, true, MS, f.now_us);
        for (k = 0; k < 300; k++)
            count += pick() == 2;
        assert_in_range(count, 99, 101);
        fleet_close();
    }
}

static void extremes(void **state)
{
    size_t kind;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        uint32_t odd[4] = {UINT32_MAX, 1, UINT32_MAX, 0};
        int k;
        fleet_open(kinds[kind], 4, odd);
        for (k = 0; k < 10000; k++) {
            int at = pick();
            assert_true(at >= 0 && at < 3);
            balance_begin(&f.b, (size_t)at);
            if (k % 3 == 0)
                balance_end(&f.b, (size_t)at, k % 2 != 0, INT64_MAX / 2, INT64_MAX / 2);
        }
        f.items[0].active = f.items[1].active = UINT32_MAX - 1;
        for (k = 0; k < 100; k++)
            assert_true(pick() >= 0);
        crpci_balance_reweigh(&f.b, 4, 1); /* not in the list: nothing happens */
        balance_begin(&f.b, 4);
        balance_end(&f.b, 4, true, 1, f.now_us);
        f.n = 0;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, NULL, 0), CRPC_OK);
        assert_int_equal(pick(), -1);
        balance_begin(&f.b, 0);
        f.n = 1;
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 1), CRPC_OK);
        assert_int_equal(crpci_balance_pick(&f.b, 1, 1, 1, always, NULL), 0); /* all are usable */
        f.n = 0;
        fleet_close();
        assert_int_equal(f.b.size, 0);
    }
}

/* Clients that start together do not all begin with the same provider. */
static void clients_begin_elsewhere(void **state)
{
    size_t kind;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        long counts[20] = {0};
        uint64_t shares[20], seed = 77;
        int client;
        size_t i;
        for (i = 0; i < 20; i++)
            shares[i] = 1;
        fleet_open(kinds[kind], 20, NULL);
        for (client = 0; client < 4000; client++) {
            assert_int_equal(crpci_balance_reset(&f.b, f.heap, NULL, 0), CRPC_OK);
            f.seed = ct_random_from(&seed);
            assert_int_equal(crpci_balance_open(&f.b, kinds[kind], draw()), CRPC_OK);
            for (i = 0; i < 20; i++)
                f.items[i].length = 0; /* as new as the client */
            assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 20), CRPC_OK);
            counts[pick()]++;
        }
        fleet_close();
        if (kinds[kind] != CRPC_BALANCER_CONSISTENT_HASH)
            assert_shares(counts, shares, 20);
    }
}

/* --- memory -------------------------------------------------------------------------------- */

/* Whether a balancer keeps more than the caller's list. */
static bool uses_memory(crpc_balancer kind)
{
    return kind != CRPC_BALANCER_RANDOM && kind != CRPC_BALANCER_ROUND_ROBIN &&
           kind != CRPC_BALANCER_P2C;
}

/* Out of memory, picks are uniform over the new list; the next list may get memory again. */
static int out_of_memory_scenario(const crpc_hooks *hooks, void *user)
{
    crpc_balancer kind = *(crpc_balancer *)user;
    static crpci_balance_item items[40];
    crpci_balance_item *list[40];
    char addresses[40][16];
    crpci_heap *h;
    crpci_balance b;
    int status, worst = CRPC_OK;
    size_t n, i;
    if (crpci_heap_open(&h, hooks, 0))
        return CRPC_ENOMEM;
    assert_int_equal(crpci_balance_open(&b, kind, 7), CRPC_OK);
    memset(items, 0, sizeof items);
    for (i = 0; i < 40; i++) {
        snprintf(addresses[i], sizeof addresses[i], "h%d:1", (int)i);
        items[i].address = addresses[i];
        items[i].weight = 100;
        list[i] = &items[i];
    }
    for (n = 2; n <= 40; n += 19) {
        long counts[40] = {0};
        uint64_t shares[40], seed = 3;
        int k;
        status = crpci_balance_reset(&b, h, list, n);
        assert_true(status == CRPC_OK || status == CRPC_ENOMEM);
        worst = status ? status : worst;
        for (k = 0; k < 4000; k++) {
            int at = crpci_balance_pick(&b, ct_random_from(&seed),
                                        (uint32_t)(ct_random_from(&seed) >> 32), k, always, NULL);
            assert_true(at >= 0 && at < (int)n);
            counts[at]++;
            balance_begin(&b, (size_t)at);
            balance_end(&b, (size_t)at, true, 1000, k);
            crpci_balance_item_begin(&b, &items[at]); /* these know their item */
            crpci_balance_item_end(&b, &items[at], true, 1000, k);
            assert_int_equal(items[at].active, 0);
        }
        crpci_balance_reweigh(&b, 0, 50);
        crpci_balance_reweigh(&b, 0, 100);
        for (i = 0; i < n; i++)
            shares[i] = 1;
        if (status)
            assert_shares(counts, shares, n);
    }
    assert_int_equal(crpci_balance_reset(&b, h, NULL, 0), CRPC_OK);
    crpci_heap_unref(h);
    return worst;
}

static void out_of_memory(void **state)
{
    size_t kind;
    (void)state;
    for (kind = 0; kind < KINDS; kind++)
        assert_true(ct_sweep(out_of_memory_scenario, (void *)&kinds[kind]) >=
                    (uses_memory(kinds[kind]) ? 3 : 1));
}

/* A list as long as the last one needs no new memory and cannot fail; a much shorter one frees
 * some. */
static void memory_is_used_again(void **state)
{
    static crpci_balance_item *many[CRPCI_BALANCE_MOST + 1];
    size_t kind, i;
    (void)state;
    for (kind = 0; kind < KINDS; kind++) {
        long calls;
        size_t size;
        int k;
        fleet_open(kinds[kind], 100, NULL);
        calls = ct_alloc_of_test()->calls;
        size = f.b.size;
        for (k = 0; k < 10; k++)
            assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, (size_t)(90 + k)), CRPC_OK);
        assert_int_equal(ct_alloc_of_test()->calls, calls);
        assert_int_equal(f.b.size, size);
        assert_int_equal(crpci_balance_reset(&f.b, f.heap, f.list, 3), CRPC_OK);
        if (uses_memory(kinds[kind]))
            assert_true(f.b.size < size / 10);
        fleet_close();
    }
    /* more than there can be */
    fleet_open(CRPC_BALANCER_CONSISTENT_HASH, 2, NULL);
    for (i = 0; i <= CRPCI_BALANCE_MOST; i++)
        many[i] = f.list[i % MOST];
    assert_int_equal(crpci_balance_reset(&f.b, f.heap, many, (size_t)CRPCI_BALANCE_MOST + 1),
                     CRPC_ENOMEM);
    assert_true(crpci_balance_pick(&f.b, 1, 1, 1, always, NULL) >= 0);
    fleet_close();
}

/* --- subsets ------------------------------------------------------------------------------- */

static size_t subset_of(crpci_balance_choice *choices, size_t n, size_t max, uint64_t seed)
{
    size_t i;
    for (i = 0; i < n; i++)
        crpci_balance_choice_init(&choices[i], i, f.addresses[i], seed);
    return crpci_balance_subset(choices, n, max);
}

/* The highest ranks, against a plain search; all if there are no more. */
static void a_subset_is_the_highest_ranks(void **state)
{
    static crpci_balance_choice all[200], chosen[200];
    size_t n, max, i, j;
    (void)state;
    fleet_open(CRPC_BALANCER_RANDOM, 1, NULL);
    for (n = 0; n < 200; n += 7) {
        for (max = 0; max < 60; max += n % 3 + 1) {
            size_t got, above;
            for (i = 0; i < n; i++)
                crpci_balance_choice_init(&all[i], i, f.addresses[i], n * 1000 + max);
            got = subset_of(chosen, n, max, n * 1000 + max);
            assert_int_equal(got, n < max ? n : max);
            for (i = 0; i < got; i++) {
                above = 0;
                for (j = 0; j < n; j++)
                    above += all[j].rank > chosen[i].rank;
                assert_true(above < max);
                assert_true(all[chosen[i].index].rank == chosen[i].rank);
                for (j = 0; j < i; j++)
                    assert_true(chosen[j].index != chosen[i].index);
            }
        }
    }
    fleet_close();
}

/* A provider that goes is replaced by one other; the rest stays, in whatever order the list is. */
static void a_subset_is_stable(void **state)
{
    static crpci_balance_choice choices[1000];
    uint64_t seed;
    (void)state;
    fleet_open(CRPC_BALANCER_RANDOM, 1, NULL);
    for (seed = 0; seed < 100; seed++) {
        bool in[1000] = {false};
        size_t i, gone, kept = 0;
        assert_int_equal(subset_of(choices, 1000, 8, seed), 8);
        for (i = 0; i < 8; i++)
            in[choices[i].index] = true;
        gone = choices[3].index;
        for (i = 0; i < 999; i++) { /* without it, and backwards */
            size_t index = 999 - i - (999 - i <= gone);
            crpci_balance_choice_init(&choices[i], index, f.addresses[index], seed);
        }
        assert_int_equal(crpci_balance_subset(choices, 999, 8), 8);
        for (i = 0; i < 8; i++) {
            assert_true(choices[i].index != gone);
            kept += in[choices[i].index];
        }
        assert_int_equal(kept, 7);
    }
    fleet_close();
}

/* 200 clients choose 8 of 1000 providers each. How many clients a provider has is a binomial number
 * with mean 1.6 if the choices are independent and uniform. Then more than 9 clients occur
 * somewhere among 1000 providers with probability 1000 x P(B(200, 0.008) > 9) = 0.006, and the
 * shares of providers with 0, 1, 2, .. clients are those of that distribution. With 20 times as
 * many clients the mean is 32, its standard deviation 5.6: five of those above it is 1.9 of the
 * mean. */
static void subsets_are_spread_evenly(void **state)
{
    static crpci_balance_choice choices[1000];
    static int users[1000];
    /* 1e6 x C(200, k) x 0.008^k x 0.992^(200 - k), for k = 0 to 5 and the rest */
    static const uint64_t binomial[] = {200602, 323551, 259624, 138187, 54885, 17351, 5802};
    long has[7] = {0};
    uint64_t client;
    size_t i;
    int most = 0;
    (void)state;
    fleet_open(CRPC_BALANCER_RANDOM, 1, NULL);
    memset(users, 0, sizeof users);
    for (client = 0; client < 4000; client++) {
        assert_int_equal(subset_of(choices, 1000, 8, client), 8);
        for (i = 0; i < 8; i++)
            users[choices[i].index]++;
        if (client != 199)
            continue;
        for (i = 0; i < 1000; i++) {
            assert_true(users[i] <= 9);
            has[users[i] < 6 ? users[i] : 6]++;
        }
        assert_shares(has, binomial, 7);
    }
    for (i = 0; i < 1000; i++)
        most = users[i] > most ? users[i] : most;
    assert_true(most <= 32 + 5 * 57 / 10);
    fleet_close();
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(warm_up),
        CT_TEST(random_is_uniform),
        CT_TEST(weighted_random_is_by_weight),
        CT_TEST(round_robin_takes_turns),
        CT_TEST(weighted_round_robin_is_exact_and_smooth),
        CT_TEST(equal_turns),
        CT_TEST(least_active_has_the_fewest),
        CT_TEST(least_active_ties),
        CT_TEST(p2c_takes_the_better_of_two),
        CT_TEST(fading),
        CT_TEST(latencies_peak_and_fade),
        CT_TEST(a_slow_provider_is_left_alone_and_comes_back),
        CT_TEST(keys_are_spread_evenly),
        CT_TEST(golden_keys),
        CT_TEST(only_its_keys_move),
        CT_TEST(keys_when_few_are_usable),
        CT_TEST(the_ring),
        CT_TEST(a_pick_never_fails_while_one_is_usable),
        CT_TEST(only_drained_ones_are_left),
        CT_TEST(the_usable_share_as_if_alone),
        CT_TEST(no_burst_after_an_absence),
        CT_TEST(a_pick_examines_few_providers),
        CT_TEST(a_provider_that_is_down_is_not_asked_again_and_again),
        CT_TEST(churn),
        CT_TEST(statistics_survive),
        CT_TEST(reweighing_in_a_warm_up),
        CT_TEST(a_greater_weight_comes_soon),
        CT_TEST(new_ones_come_one_by_one),
        CT_TEST(one_comes_back_drained),
        CT_TEST(virtual_time_wraps),
        CT_TEST(extremes),
        CT_TEST(clients_begin_elsewhere),
        CT_TEST(out_of_memory),
        CT_TEST(memory_is_used_again),
        CT_TEST(a_subset_is_the_highest_ranks),
        CT_TEST(a_subset_is_stable),
        CT_TEST(subsets_are_spread_evenly),
    };
    return CT_RUN(tests);
}
