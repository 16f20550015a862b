/* impl-limiter: exact counts for the token bucket and the retry budget, and a simulated server for
 * the automatic limit. All clocks are the tests' own. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* --- token bucket -------------------------------------------------------------------------- */

static const int64_t starts_us[] = {0, 1, 999999, (INT64_C(1) << 32) - 7, (INT64_C(1) << 52) + 3};
#define STARTS (sizeof starts_us / sizeof starts_us[0])

typedef struct rate {
    int64_t per_second;
    int64_t burst;
} rate;
static const rate rates[] = {{1, 1}, {1, 5}, {3, 1}, {7, 2}, {1000, 1}, {999983, 10}, {3000000, 7}};
#define RATES (sizeof rates / sizeof rates[0])

/* Tokens are asked for at random times: from any token taken to any later one, both included, at
 * most burst + rate x time were taken, rounded down. */
static void no_interval_gets_more_than_burst_and_rate(void **state)
{
    enum { MOST = 600 };
    static int64_t taken[MOST];
    size_t r, s;
    int i, j;
    (void)state;
    for (r = 0; r < RATES; r++) {
        for (s = 0; s < STARTS; s++) {
            crpci_limiter_bucket b;
            int64_t now = starts_us[s];
            uint64_t step = (uint64_t)(2000000 / rates[r].per_second) + 2;
            int count = 0;
            crpci_limiter_bucket_init(&b, rates[r].per_second, rates[r].burst);
            while (count < MOST) {
                uint64_t draw = ct_random();
                now += draw & 64 ? 0 : (int64_t)((draw >> 8) % step);
                if ((draw & 63) == 1) /* a pause in which the bucket fills */
                    now += 1000000 * rates[r].burst / rates[r].per_second;
                if (crpci_limiter_bucket_take(&b, now))
                    taken[count++] = now;
            }
            for (i = 0; i < MOST; i++) {
                for (j = i; j < MOST; j++) {
                    int64_t passed = taken[j] - taken[i];
                    assert_true(j - i + 1 <=
                                rates[r].burst + passed * rates[r].per_second / 1000000);
                }
            }
        }
    }
}

/* A caller that tries every microsecond gets burst + rate x time tokens, exactly. */
static void nothing_is_lost_to_rounding(void **state)
{
    size_t r, s;
    (void)state;
    for (r = 0; r < RATES; r++) {
        for (s = 0; s < STARTS; s++) {
            crpci_limiter_bucket b;
            int64_t passed, count = 0, expected;
            crpci_limiter_bucket_init(&b, rates[r].per_second, rates[r].burst);
            for (passed = 0; passed <= 70000; passed++) {
                while (crpci_limiter_bucket_take(&b, starts_us[s] + passed))
                    count++;
                expected = rates[r].burst + passed * rates[r].per_second / 1000000;
                assert_int_equal(count, expected);
            }
        }
    }
}

static void bucket_defaults_and_extremes(void **state)
{
    static const int64_t huge[] = {INT64_MAX, INT64_MAX / 2, INT64_C(1) << 40,
                                   (INT64_C(1) << 40) + 1};
    crpci_limiter_bucket b;
    size_t i, j;
    int n;
    (void)state;
    memset(&b, 0, sizeof b); /* zeroed: no limit */
    for (n = 0; n < 1000; n++)
        assert_true(crpci_limiter_bucket_take(&b, 5));
    for (n = 0; n > -3; n--) { /* no rate: no limit */
        int k;
        crpci_limiter_bucket_init(&b, n, 1);
        for (k = 0; k < 100; k++)
            assert_true(crpci_limiter_bucket_take(&b, 5));
    }
    crpci_limiter_bucket_init(&b, 50, 0); /* one second's worth */
    for (n = 0; n < 50; n++)
        assert_true(crpci_limiter_bucket_take(&b, 77));
    assert_false(crpci_limiter_bucket_take(&b, 77));
    assert_false(crpci_limiter_bucket_take(&b, 77 + 19999));
    assert_true(crpci_limiter_bucket_take(&b, 77 + 20000));
    assert_false(crpci_limiter_bucket_take(&b, 77 + 20000));
    crpci_limiter_bucket_init(&b, 1, -1);
    assert_true(crpci_limiter_bucket_take(&b, 0));
    assert_false(crpci_limiter_bucket_take(&b, 999999));
    assert_true(crpci_limiter_bucket_take(&b, 1000000));
    for (i = 0; i < 4; i++) { /* nothing overflows: UBSan would abort */
        for (j = 0; j < 4; j++) {
            int64_t now;
            crpci_limiter_bucket_init(&b, huge[i], huge[j]);
            for (now = 0; now < INT64_MAX / 4; now = now * 3 + 1)
                assert_true(crpci_limiter_bucket_take(&b, now));
            crpci_limiter_bucket_init(&b, 1, huge[j]);
            for (now = 0; now < INT64_MAX / 4; now = now * 3 + 1)
                assert_true(crpci_limiter_bucket_take(&b, now));
        }
    }
}

static void a_clock_that_steps_back_gives_nothing(void **state)
{
    crpci_limiter_bucket b;
    (void)state;
    crpci_limiter_bucket_init(&b, 1, 1);
    assert_true(crpci_limiter_bucket_take(&b, 10000000));
    assert_false(crpci_limiter_bucket_take(&b, 5000000));
    assert_false(crpci_limiter_bucket_take(&b, 10999999));
    assert_true(crpci_limiter_bucket_take(&b, 11000000));
}

/* --- retry budget -------------------------------------------------------------------------- */

static void failing_calls_spend_the_budget_and_no_more(void **state)
{
    crpci_limiter_budget b;
    int call, retries = 0;
    (void)state;
    crpci_limiter_budget_init(&b, 10, 1);
    for (call = 0; call < 1000; call++)
        retries += crpci_limiter_budget_spend(&b);
    assert_int_equal(retries, 10);
    for (call = 0; call < 9; call++)
        crpci_limiter_budget_earn(&b);
    assert_false(crpci_limiter_budget_spend(&b)); /* nine tenths of a token are too few */
    crpci_limiter_budget_earn(&b);
    assert_true(crpci_limiter_budget_spend(&b));
    assert_false(crpci_limiter_budget_spend(&b));
    for (call = 0; call < 1000; call++) /* never more than at the start */
        crpci_limiter_budget_earn(&b);
    for (retries = 0; crpci_limiter_budget_spend(&b);)
        retries++;
    assert_int_equal(retries, 10);
}

/* In the long run there are retries for a tenth of the successes, and for the initial budget
 * once. */
static void retries_stay_a_share_of_the_successes(void **state)
{
    crpci_limiter_budget b;
    int call, retries = 0;
    (void)state;
    crpci_limiter_budget_init(&b, 10, 1);
    for (call = 0; call < 10000; call++) {
        if (call % 2)
            crpci_limiter_budget_earn(&b);
        else
            retries += crpci_limiter_budget_spend(&b);
    }
    assert_int_equal(retries, 10 + 4999 / 10); /* what the last success earned is not yet spent */
}

static void budget_extremes(void **state)
{
    crpci_limiter_budget b;
    int i;
    (void)state;
    crpci_limiter_budget_init(&b, 0, 10);
    crpci_limiter_budget_earn(&b);
    assert_false(crpci_limiter_budget_spend(&b));
    crpci_limiter_budget_init(&b, UINT32_MAX, UINT32_MAX);
    for (i = 0; i < 1000; i++) {
        crpci_limiter_budget_earn(&b);
        assert_true(crpci_limiter_budget_spend(&b));
    }
    assert_true(b.tenths <= b.most);
    crpci_limiter_budget_init(&b, 2, 0);
    assert_true(crpci_limiter_budget_spend(&b));
    crpci_limiter_budget_earn(&b);
    assert_true(crpci_limiter_budget_spend(&b));
    assert_false(crpci_limiter_budget_spend(&b));
}

/* --- automatic limit: a simulated server --------------------------------------------------- */

/* A limit, behind it a queue, behind that `capacity` workers, each of which takes about service_us
 * for a call. Calls arrive at random, one in arrival_us on average. */
typedef struct sim {
    crpci_limiter_auto limit;
    uint64_t seed;
    int64_t now_us, next_us;
    int64_t arrival_us, service_us;
    int spread_percent; /* of the service time, either way */
    int capacity;
    int64_t free_us[256]; /* when each worker is free again */
    struct {
        int64_t begin, end;
    } calls[4096];
    int under_way;
    /* counted since sim_count */
    long offered, accepted, done;
    long slow; /* of those done: took longer than slow_us */
    int64_t slow_us;
    bool failing; /* all calls fail */
} sim;

static int64_t sim_draw(sim *s, int64_t mean, int percent)
{
    int64_t range = mean * percent / 50 + 1;
    return mean - mean * percent / 100 +
           (int64_t)((ct_random_from(&s->seed) >> 16) % (uint64_t)range);
}

static void sim_init(sim *s, int capacity, int64_t service_us)
{
    memset(s, 0, sizeof *s);
    s->seed = 20240229;
    s->now_us = s->next_us = 1000000000;
    s->capacity = capacity;
    s->service_us = service_us;
    s->slow_us = 2 * service_us;
    s->spread_percent = 20;
    crpci_limiter_auto_init(&s->limit, 1, 40);
}

/* Sets the load, in per cent of what the server can do. */
static void sim_load(sim *s, int percent)
{
    s->arrival_us = s->service_us * 100 / s->capacity / percent;
}

static void sim_count(sim *s)
{
    s->offered = s->accepted = s->done = s->slow = 0;
}

static void sim_arrive(sim *s)
{
    int i, first = 0;
    int64_t begin;
    s->offered++;
    s->next_us = s->now_us + sim_draw(s, s->arrival_us, 100);
    if (!crpci_limiter_auto_enter(&s->limit))
        return;
    s->accepted++;
    for (i = 1; i < s->capacity; i++)
        first = s->free_us[i] < s->free_us[first] ? i : first;
    begin = s->free_us[first] > s->now_us ? s->free_us[first] : s->now_us;
    s->free_us[first] = begin + sim_draw(s, s->service_us, s->spread_percent);
    assert_true(s->under_way < 4096);
    s->calls[s->under_way].begin = s->now_us;
    s->calls[s->under_way].end = s->free_us[first];
    s->under_way++;
}

static void sim_run(sim *s, int64_t for_us)
{
    int64_t until = s->now_us + for_us;
    for (;;) {
        int i, soonest = 0;
        for (i = 1; i < s->under_way; i++)
            soonest = s->calls[i].end < s->calls[soonest].end ? i : soonest;
        if (s->under_way && s->calls[soonest].end <= s->next_us) {
            int64_t latency;
            if (s->calls[soonest].end > until)
                break;
            s->now_us = s->calls[soonest].end;
            latency = s->now_us - s->calls[soonest].begin;
            crpci_limiter_auto_leave(&s->limit, !s->failing, latency, s->now_us);
            s->done++;
            s->slow += latency > s->slow_us;
            s->calls[soonest] = s->calls[--s->under_way];
        } else {
            if (s->next_us > until)
                break;
            s->now_us = s->next_us;
            sim_arrive(s);
        }
    }
    s->now_us = until;
}

/* The calls that were served, in per cent of those that the server could have served. */
static long sim_goodput(const sim *s, int64_t for_us)
{
    return (long)(s->done * s->service_us * 100 / (s->capacity * for_us));
}

/* Runs the simulation and prints its result. */
static void sim_measure(sim *s, int64_t for_us)
{
    sim_count(s);
    sim_run(s, for_us);
    if (getenv("CRPC_TEST_VERBOSE"))
        print_message("capacity %d: limit %u, goodput %ld%%, %ld of %ld accepted, %ld slow\n",
                      s->capacity, s->limit.limit, sim_goodput(s, for_us),
                      s->accepted, s->offered, s->slow);
}

/* Three times as many calls as the server can serve: the limit lets in as many as keep the workers
 * busy and a few more, so no capacity is lost and no call waits long. */
static void the_limit_finds_the_capacity(void **state)
{
    static const struct {
        int capacity, service_us, spread;
    } servers[] = {{1, 1000, 20},   {4, 1000, 20},   {8, 2000, 20},    {8, 10000, 20},
                   {8, 10000, 100}, {32, 10000, 20}, {128, 100000, 50}};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof servers / sizeof servers[0]; i++) {
        int capacity = servers[i].capacity;
        uint32_t limit;
        sim s;
        sim_init(&s, capacity, servers[i].service_us);
        s.spread_percent = servers[i].spread;
        s.slow_us = 2 * servers[i].service_us * (100 + servers[i].spread) / 100;
        sim_load(&s, 50);
        sim_run(&s, 3000000);
        sim_load(&s, 300);
        sim_run(&s, 3000000);
        sim_measure(&s, 4000000);
        limit = s.limit.limit;
        assert_in_range(limit, capacity, capacity * 135 / 100 + 2);
        assert_true(sim_goodput(&s, 4000000) >= 80);
        if (capacity > 1) /* with one worker, a queue of one call doubles the latency */
            assert_true(s.slow * 100 <= s.done);
    }
}

/* If the server starts in an overload, its first latencies contain the queue. */
static void an_overload_from_the_start_is_seen_through(void **state)
{
    sim s;
    (void)state;
    sim_init(&s, 8, 10000);
    sim_load(&s, 300);
    sim_run(&s, 20000000);
    sim_measure(&s, 10000000);
    assert_in_range(s.limit.limit, 8, 12);
    assert_true(sim_goodput(&s, 10000000) >= 80);
    assert_true(s.slow * 100 <= s.done);
}

/* No call is refused a second after the overload has ended. */
static void it_recovers_after_an_overload(void **state)
{
    sim s;
    int i;
    (void)state;
    sim_init(&s, 8, 10000);
    sim_load(&s, 50);
    sim_run(&s, 5000000);
    for (i = 0; i < 5; i++) {
        sim_load(&s, 1000);
        sim_run(&s, 10000000);
        sim_load(&s, 50);
        sim_run(&s, 1000000);
        sim_measure(&s, 1000000);
        assert_true(s.accepted * 100 >= s.offered * 99);
        assert_int_equal(s.slow, 0);
    }
}

static void it_follows_a_capacity_that_changes(void **state)
{
    sim s;
    (void)state;
    sim_init(&s, 16, 10000);
    sim_load(&s, 50);
    sim_run(&s, 5000000);
    sim_load(&s, 300);
    sim_run(&s, 10000000);
    assert_in_range(s.limit.limit, 16, 22);
    s.capacity = 4; /* three quarters of its workers hang */
    sim_run(&s, 120000000);
    sim_measure(&s, 10000000);
    assert_in_range(s.limit.limit, 4, 8);
    assert_true(sim_goodput(&s, 10000000) >= 80);
    memset(s.free_us, 0, sizeof s.free_us);
    s.capacity = 16; /* and work again */
    sim_run(&s, 20000000);
    sim_measure(&s, 10000000);
    assert_in_range(s.limit.limit, 14, 22);
    assert_true(sim_goodput(&s, 10000000) >= 80);
}

/* After a quiet time a normal load is not refused. */
static void a_quiet_time_does_not_lower_the_limit(void **state)
{
    sim s;
    int i;
    (void)state;
    sim_init(&s, 32, 10000);
    sim_load(&s, 5); /* 160 calls a second, one or two at a time */
    sim_run(&s, 120000000);
    assert_true(s.limit.limit >= 40);
    for (i = s.under_way; i < 40; i++)
        assert_true(crpci_limiter_auto_enter(&s.limit));
}

/* All calls fail, or one in 39. */
static void failures(void **state)
{
    crpci_limiter_auto a;
    int64_t now = 5000000;
    int i;
    (void)state;
    crpci_limiter_auto_init(&a, 3, 100);
    for (i = 0; i < 200; i++) {
        assert_int_equal(a.limit, 100);
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, false, 1000, now += 1000);
    }
    assert_int_equal(a.limit, 50); /* a window in which nothing succeeded */
    for (i = 0; i < 2000; i++) {
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, false, 1000, now += 1000);
    }
    assert_int_equal(a.limit, 3); /* never below */
    for (i = 0; i < 2000; i++) { /* what comes in threes, and is served: 3000 a second, 1 ms each */
        assert_true(crpci_limiter_auto_enter(&a));
        assert_true(crpci_limiter_auto_enter(&a));
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, true, 1000, now += 333);
        crpci_limiter_auto_leave(&a, true, 1000, now += 333);
        crpci_limiter_auto_leave(&a, i % 13 != 0, 1000, now += 334);
    }
    assert_int_equal(a.limit,
                     4); /* 3 x 1.3, and a bit less for the failures */
}

static void entering_and_leaving(void **state)
{
    crpci_limiter_auto a;
    int i;
    (void)state;
    crpci_limiter_auto_init(&a, 0, 0);
    assert_int_equal(a.limit, 1);
    crpci_limiter_auto_init(&a, 5, 2);
    assert_int_equal(a.limit, 5);
    for (i = 0; i < 5; i++)
        assert_true(crpci_limiter_auto_enter(&a));
    assert_false(crpci_limiter_auto_enter(&a));
    crpci_limiter_auto_leave(&a, false, -1, 1); /* no sample, but it makes room */
    assert_true(crpci_limiter_auto_enter(&a));
    assert_false(crpci_limiter_auto_enter(&a));
    for (i = 0; i < 100000; i++) { /* calls that are no samples never change the limit */
        crpci_limiter_auto_leave(&a, i % 2 != 0, -1, 1000 * i);
        assert_true(crpci_limiter_auto_enter(&a));
    }
    assert_int_equal(a.limit, 5);
    for (i = 0; i < 10; i++) /* one leave too many is ignored */
        crpci_limiter_auto_leave(&a, true, -1, 1);
    assert_int_equal(a.active, 0);
}

/* A window with too few replies is dropped; 100 in a second, or 200 sooner, are enough. */
static void windows(void **state)
{
    crpci_limiter_auto a;
    int64_t now = 1;
    int i;
    (void)state;
    crpci_limiter_auto_init(&a, 1, 40);
    for (i = 0; i < 960; i++) { /* 96 a second for ten seconds */
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, true, 10000, now += 10400);
    }
    assert_int_equal(a.free_us, 0);
    crpci_limiter_auto_init(&a, 1, 40);
    for (i = 0; i < 102; i++) {
        assert_int_equal(a.free_us, 0);
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, true, 7000, now += 9901);
    }
    assert_int_equal(a.free_us, 7000);
    crpci_limiter_auto_init(&a, 1, 40);
    for (i = 0; i < 200 * 10; i++) { /* every tenth reply is a sample */
        assert_int_equal(a.free_us, 0);
        assert_true(crpci_limiter_auto_enter(&a));
        crpci_limiter_auto_leave(&a, true, 500, now += 10);
        if (a.samples == 0 && i > 10)
            break;
    }
    assert_in_range(i, 1980, 1999);
    assert_int_equal(a.free_us, 500);
    assert_in_range(a.qps, 99000000, 101000000); /* all replies count, samples or not */
}

/* To measure the latency without a queue anew, the limiter lets fewer calls in, waits until the
 * queue has emptied, and only then takes samples. */
static void measuring_anew(void **state)
{
    crpci_limiter_auto a;
    int64_t now = 1, drained;
    int i;
    (void)state;
    crpci_limiter_auto_init(&a, 1, 40);
    for (i = 0; !a.drained_us; i++) { /* always 40 and one refused, 10 ms each: 4000 a second */
        assert_true(i < 20000);
        while (crpci_limiter_auto_enter(&a))
            continue;
        crpci_limiter_auto_leave(&a, true, 10000, now += 250);
    }
    assert_in_range(now, 2000000, 4100000);
    assert_int_equal(a.limit, 20); /* half of the product */
    drained = a.drained_us;
    assert_int_equal(drained, now + 20000);
    while (now + 250 < drained) {
        crpci_limiter_auto_leave(&a, true, 10000, now += 250);
        assert_int_equal(a.ok, 0);
    }
    assert_int_equal(a.free_us, 10000);
    for (i = 0; i < 205; i++)
        crpci_limiter_auto_leave(&a, true, 4000, now += 250);
    assert_int_equal(a.free_us, 4000);
    /* it came out much lower: measured again soon */
    assert_true(a.anew_us <= now + 2 * CRPCI_LIMITER_ANEW_SOON_US);
}

/* With any arguments nothing overflows and the limit stays within its bounds. */
static void limit_extremes(void **state)
{
    static const int64_t odd[] = {0, 1, 99, 1000, 60000000, INT64_C(1) << 32, INT64_MAX};
    crpci_limiter_auto a;
    uint64_t seed = 7;
    int64_t now = 0;
    int i;
    (void)state;
    crpci_limiter_auto_init(&a, 1, UINT32_MAX);
    for (i = 0; i < 2000000; i++) {
        uint64_t draw = ct_random_from(&seed) >> 8;
        bool mood = i / 20000 % 3 != 0;
        if (draw & 3)
            crpci_limiter_auto_enter(&a);
        else
            crpci_limiter_auto_leave(&a, (draw & 4) || mood, odd[(draw >> 8) % 7], now);
        now += (int64_t)(draw >> 16) % (i & (1 << 16) ? 40 : 400000);
        assert_true(a.limit >= 1);
        assert_true(a.explore >= 6 && a.explore <= 30);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(no_interval_gets_more_than_burst_and_rate),
        CT_TEST(nothing_is_lost_to_rounding),
        CT_TEST(bucket_defaults_and_extremes),
        CT_TEST(a_clock_that_steps_back_gives_nothing),
        CT_TEST(failing_calls_spend_the_budget_and_no_more),
        CT_TEST(retries_stay_a_share_of_the_successes),
        CT_TEST(budget_extremes),
        CT_TEST(the_limit_finds_the_capacity),
        CT_TEST(an_overload_from_the_start_is_seen_through),
        CT_TEST(it_recovers_after_an_overload),
        CT_TEST(it_follows_a_capacity_that_changes),
        CT_TEST(a_quiet_time_does_not_lower_the_limit),
        CT_TEST(failures),
        CT_TEST(entering_and_leaving),
        CT_TEST(windows),
        CT_TEST(measuring_anew),
        CT_TEST(limit_extremes),
    };
    return CT_RUN(tests);
}
