/* impl-breaker: scripted outcomes at documented counts; all clocks are the tests' own. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define SECOND INT64_C(1000000)
#define MS INT64_C(1000)

/* 10 calls at least, half of them errors, in 8 s; open for 1 s, then 2, to 10; restored in 5 s. */
static crpci_breaker_options options(void)
{
    crpci_breaker_options o;
    memset(&o, 0, sizeof o);
    o.error_percent = 50;
    o.min_requests = 10;
    o.window_us = 8 * SECOND;
    o.open_us = SECOND;
    o.open_max_us = 10 * SECOND;
    o.ramp_us = 5 * SECOND;
    return o;
}

static const int64_t starts_us[] = {0, 12345, (INT64_C(1) << 32) - 17, (INT64_C(1) << 52) + 1};
#define STARTS (sizeof starts_us / sizeof starts_us[0])

/* Makes a call of 1 ms that ends at *now; returns what crpci_breaker_end does. The random number
 * gives the longest time open. */
static bool call(crpci_breaker *b, const crpci_breaker_options *o, crpci_outcome outcome,
                 int64_t *now)
{
    crpci_breaker_begin(b, o, *now);
    *now += MS;
    return crpci_breaker_end(b, o, outcome, MS, *now, 0);
}

static void fail_until_open(crpci_breaker *b, const crpci_breaker_options *o, int64_t *now)
{
    int n = 0;
    while (!call(b, o, CRPCI_OUTCOME_ERROR, now))
        assert_true(++n < 1000);
    assert_true(crpci_breaker_open(b, o, *now));
}

/* With at least 10 calls and half of them errors it is the tenth call that trips, whatever the
 * order, and with one error less it is none. */
static void it_trips_at_the_documented_count(void **state)
{
    crpci_breaker_options o = options();
    size_t s;
    int bits, i;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        for (bits = 0; bits < 1024; bits++) {
            crpci_breaker b;
            int64_t now = starts_us[s];
            memset(&b, 0, sizeof b);
            for (i = 0; i < 10; i++) {
                bool error = (bits >> i & 1) != 0;
                bool tripped = call(&b, &o, error ? CRPCI_OUTCOME_ERROR : CRPCI_OUTCOME_OK, &now);
                bool expected = i == 9 && __builtin_popcount((unsigned)bits) >= 5;
                assert_int_equal(tripped, expected);
                assert_int_equal(crpci_breaker_open(&b, &o, now), expected);
                assert_int_equal(crpci_breaker_ejected(&b), expected);
                assert_true(
                    crpci_breaker_ramped(&b, &o, now, UINT32_MAX)); /* no ramp without a trip */
            }
        }
    }
}

/* After the tenth the share decides at each call: 100 good ones, then the 100th error trips. */
static void a_share_of_many_calls(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    int i;
    (void)state;
    memset(&b, 0, sizeof b);
    for (i = 0; i < 100; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_OK, &now));
    for (i = 0; i < 99; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
}

static void ignored_outcomes_do_not_count(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    int i;
    (void)state;
    memset(&b, 0, sizeof b);
    for (i = 0; i < 9; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    for (i = 0; i < 1000; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_IGNORE, &now));
    assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
}

/* Outcomes leave the window slice by slice, when they are older than the window and not before. */
static void the_window_rolls(void **state)
{
    crpci_breaker_options o = options();
    size_t s;
    int64_t gap;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        for (gap = 0; gap < 20 * SECOND; gap += 100 * MS) {
            crpci_breaker b;
            int64_t now = starts_us[s] / SECOND * SECOND; /* where a slice begins */
            int i;
            bool tripped;
            memset(&b, 0, sizeof b);
            for (i = 0; i < 9; i++)
                assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
            now += gap;
            tripped = call(&b, &o, CRPCI_OUTCOME_ERROR, &now);
            assert_int_equal(tripped, gap < 8 * SECOND - 10 * MS);
        }
    }
    { /* one error a second: never ten in the window of eight slices */
        crpci_breaker b;
        int64_t now = 0;
        int i;
        memset(&b, 0, sizeof b);
        for (i = 0; i < 1000; i++) {
            assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
            now += SECOND;
        }
    }
}

/* A changed window_us begins a new window. */
static void a_window_of_another_length(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 1000 * SECOND;
    int i;
    (void)state;
    memset(&b, 0, sizeof b);
    for (i = 0; i < 9; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    o.window_us *= 10;
    for (i = 0; i < 9; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    now += 81 * SECOND;
    for (i = 0; i < 9; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    o.window_us = 0; /* no window: the shortest one is used */
    for (i = 0; i < 100; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
}

static void slow_calls_trip_too(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    int i;
    (void)state;
    o.slow_us = 100 * MS;
    o.slow_percent = 80;
    memset(&b, 0, sizeof b);
    for (i = 0; i < 10; i++) {
        bool slow = i >= 2, tripped;
        crpci_breaker_begin(&b, &o, now);
        now += slow ? 100 * MS : 100 * MS - 1;
        tripped =
            crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, slow ? 100 * MS : 100 * MS - 1, now, 0);
        assert_int_equal(tripped, i == 9); /* 8 of 10 */
    }
    now += SECOND;
    crpci_breaker_begin(&b, &o, now); /* a slow probe has failed */
    now += SECOND;
    assert_true(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, SECOND, now, 0));
    assert_true(crpci_breaker_open(&b, &o, now));
    /* switched off by either number, latency does not count */
    for (i = 0; i < 2; i++) {
        int n;
        o.slow_us = i ? 100 * MS : 0;
        o.slow_percent = i ? 0 : 80;
        memset(&b, 0, sizeof b);
        for (n = 0; n < 100; n++) {
            crpci_breaker_begin(&b, &o, now);
            now += SECOND;
            assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, SECOND, now, 0));
        }
    }
}

static void switched_off_it_never_opens(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    int i;
    (void)state;
    o.error_percent = 0;
    memset(&b, 0, sizeof b); /* zeroed is as good as initialised */
    for (i = 0; i < 1000; i++) {
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
        assert_false(crpci_breaker_open(&b, &o, now));
    }
    o.error_percent = 101; /* only latency counts */
    for (i = 0; i < 1000; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    o.error_percent = 50;
    o.min_requests = 0;
    memset(&b, 0, sizeof b);
    assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now)); /* the first */
    assert_true(crpci_breaker_open(&b, &o, now));
    o.error_percent = 0; /* switched off while open */
    assert_false(crpci_breaker_open(&b, &o, now));
    assert_true(crpci_breaker_ramped(&b, &o, now, UINT32_MAX));
    assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
}

/* Open to the microsecond; then one probe and no second; its success closes. */
static void closed_open_probe_closed(void **state)
{
    crpci_breaker_options o = options();
    size_t s;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        crpci_breaker b;
        int64_t now = starts_us[s];
        memset(&b, 0, sizeof b);
        fail_until_open(&b, &o, &now);
        assert_true(crpci_breaker_open(&b, &o, now + SECOND - 1));
        assert_false(crpci_breaker_open(&b, &o, now + SECOND));
        /* it still counts as taken out while the probe is in flight */
        assert_true(crpci_breaker_ejected(&b));
        now += SECOND;
        crpci_breaker_begin(&b, &o, now);
        assert_true(crpci_breaker_open(&b, &o, now));
        assert_true(crpci_breaker_open(&b, &o, now + 5 * SECOND));
        now += 300 * MS;
        assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, 300 * MS, now, 0));
        assert_false(crpci_breaker_open(&b, &o, now));
        assert_false(crpci_breaker_ejected(&b));
        {
            int i; /* the window begins anew: the tenth call trips, not the first */
            for (i = 0; i < 9; i++)
                assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
            assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
        }
    }
}

static void openings_double_and_start_over(void **state)
{
    static const int64_t expected[] = {1, 2, 4, 8, 10, 10, 10};
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    size_t i;
    (void)state;
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    for (i = 0; i < sizeof expected / sizeof expected[0]; i++) { /* failing probes */
        assert_true(crpci_breaker_open(&b, &o, now + expected[i] * SECOND - 1));
        assert_false(crpci_breaker_open(&b, &o, now + expected[i] * SECOND));
        now += expected[i] * SECOND;
        assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    }
    /* a trip within 30 s of the last closing goes on with the doubling */
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    now += SECOND;
    assert_false(call(&b, &o, CRPCI_OUTCOME_OK, &now));
    now += 29 * SECOND;
    fail_until_open(&b, &o, &now);
    assert_true(crpci_breaker_open(&b, &o, now + 2 * SECOND - 1));
    assert_false(crpci_breaker_open(&b, &o, now + 2 * SECOND));
    now += 2 * SECOND;
    assert_false(call(&b, &o, CRPCI_OUTCOME_OK, &now));
    now += 30 * SECOND; /* and one later starts over */
    fail_until_open(&b, &o, &now);
    assert_true(crpci_breaker_open(&b, &o, now + SECOND - 1));
    assert_false(crpci_breaker_open(&b, &o, now + SECOND));
    /* a longest time below the first is the first */
    o.open_max_us = 0;
    now += SECOND;
    assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    assert_true(crpci_breaker_open(&b, &o, now + SECOND - 1));
    assert_false(crpci_breaker_open(&b, &o, now + SECOND));
}

/* The caller's random number shortens the time open by up to a quarter. */
static void openings_are_jittered(void **state)
{
    static const uint32_t draws[] = {0, 1u << 31, UINT32_MAX};
    static const int64_t expected[] = {1000000, 875000, 750000};
    crpci_breaker_options o = options();
    size_t i;
    (void)state;
    o.min_requests = 1;
    for (i = 0; i < 3; i++) {
        crpci_breaker b;
        int64_t now = 5 * SECOND;
        memset(&b, 0, sizeof b);
        crpci_breaker_begin(&b, &o, now);
        assert_true(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_ERROR, 0, now, draws[i]));
        assert_true(crpci_breaker_open(&b, &o, now + expected[i] - 10));
        assert_false(crpci_breaker_open(&b, &o, now + expected[i] + 10));
    }
}

/* A probe that was cancelled leaves room for the next. */
static void a_probe_without_an_answer(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 5 * SECOND;
    (void)state;
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    now += SECOND;
    assert_false(call(&b, &o, CRPCI_OUTCOME_IGNORE, &now));
    assert_false(crpci_breaker_open(&b, &o, now));
    assert_true(crpci_breaker_ejected(&b));
    assert_false(call(&b, &o, CRPCI_OUTCOME_OK, &now));
    assert_false(crpci_breaker_ejected(&b));
    /* a probe that never ends is given up */
    fail_until_open(&b, &o, &now);
    now += 2 * SECOND;
    crpci_breaker_begin(&b, &o, now);
    assert_true(crpci_breaker_open(&b, &o, now + 39 * SECOND));
    assert_false(crpci_breaker_open(&b, &o, now + 40 * SECOND));
    now += 40 * SECOND;
    crpci_breaker_begin(&b, &o, now);
    assert_true(crpci_breaker_open(&b, &o, now));
    now += MS;
    assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, MS, now, 0));
    assert_false(crpci_breaker_ejected(&b));
}

/* Ends of calls that began before the trip: they neither decide the probe nor count afterwards. */
static void late_ends_do_not_count(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 100 * SECOND, tripped;
    int i;
    (void)state;
    for (i = 0; i < 2; i++) {
        crpci_outcome late = i ? CRPCI_OUTCOME_OK : CRPCI_OUTCOME_ERROR;
        int n;
        memset(&b, 0, sizeof b);
        for (n = 0; n < 40; n++)
            crpci_breaker_begin(&b, &o, now);
        fail_until_open(&b, &o, &now);
        tripped = now;
        now += 500 * MS;
        assert_false(crpci_breaker_end(&b, &o, late, now - tripped + SECOND, now, 0));
        assert_true(crpci_breaker_open(&b, &o, now));
        now = tripped + SECOND;
        crpci_breaker_begin(&b, &o, now); /* the probe */
        now += 10 * MS;
        assert_false(crpci_breaker_end(&b, &o, late, now - tripped + SECOND, now, 0));
        assert_true(crpci_breaker_open(&b, &o, now));
        now += 10 * MS;
        assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, 20 * MS, now, 0));
        assert_false(crpci_breaker_ejected(&b));
        for (n = 0; n < 38; n++) {
            now += MS;
            assert_false(
                crpci_breaker_end(&b, &o, CRPCI_OUTCOME_ERROR, now - tripped + SECOND, now, 0));
        }
        assert_int_equal(b.active, 0);
    }
    /* if the probe's latency was measured from too early, it is known by being the only call */
    fail_until_open(&b, &o, &now);
    now += 2 * SECOND;
    crpci_breaker_begin(&b, &o, now);
    now += MS;
    assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, 50 * SECOND, now, 0));
    assert_false(crpci_breaker_ejected(&b));
}

/* While all providers are open, calls go to open ones: they change nothing before the time. */
static void forced_calls(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 100 * SECOND, until;
    (void)state;
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    until = now + SECOND;
    while (now + MS < until) {
        assert_false(call(&b, &o, now / MS % 2 ? CRPCI_OUTCOME_OK : CRPCI_OUTCOME_ERROR, &now));
        assert_int_equal(crpci_breaker_open(&b, &o, now), now < until);
    }
    now = until;
    /* the probe, and another that is forced: whichever ends first decides */
    crpci_breaker_begin(&b, &o, now);
    crpci_breaker_begin(&b, &o, now + MS);
    now += 2 * MS;
    assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, MS, now, 0));
    assert_false(crpci_breaker_ejected(&b));
    assert_false(crpci_breaker_end(&b, &o, CRPCI_OUTCOME_ERROR, 2 * MS, now, 0));
    assert_false(crpci_breaker_ejected(&b));
}

/* From a tenth to all in a straight line. */
static void traffic_is_restored_gradually(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 100 * SECOND, passed;
    (void)state;
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    /* open: crpci_breaker_open refuses it, not the ramp */
    assert_true(crpci_breaker_ramped(&b, &o, now, UINT32_MAX));
    now += SECOND;
    assert_false(call(&b, &o, CRPCI_OUTCOME_OK, &now));
    for (passed = 0; passed <= 5 * SECOND; passed += 10 * MS) {
        int64_t in = 0, expected = 1000 * 10 / 100 + 1000 * 90 * passed / (5 * SECOND) / 100;
        uint32_t i;
        for (i = 0; i < 1000; i++)
            in += crpci_breaker_ramped(&b, &o, now + passed, UINT32_MAX / 1000 * i);
        assert_true(in >= expected - 1 && in <= expected + 1);
    }
    assert_true(crpci_breaker_ramped(&b, &o, now + 5 * SECOND, UINT32_MAX));
    assert_true(crpci_breaker_ramped(&b, &o, now + 500000 * SECOND, UINT32_MAX));
    o.ramp_us = 0;
    assert_true(crpci_breaker_ramped(&b, &o, now, UINT32_MAX));
    o.ramp_us = INT64_MAX; /* nothing overflows */
    assert_false(crpci_breaker_ramped(&b, &o, now + 365 * 86400 * SECOND, UINT32_MAX));
}

/* The caller closes a breaker again where too many providers are taken out. */
static void reset_closes_at_once(void **state)
{
    crpci_breaker_options o = options();
    crpci_breaker b;
    int64_t now = 100 * SECOND;
    int i;
    (void)state;
    memset(&b, 0, sizeof b);
    fail_until_open(&b, &o, &now);
    crpci_breaker_reset(&b);
    assert_false(crpci_breaker_ejected(&b));
    assert_false(crpci_breaker_open(&b, &o, now));
    assert_true(crpci_breaker_ramped(&b, &o, now, UINT32_MAX));
    for (i = 0; i < 9; i++)
        assert_false(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    assert_true(call(&b, &o, CRPCI_OUTCOME_ERROR, &now));
    assert_true(crpci_breaker_open(&b, &o, now + SECOND - 1)); /* nor does the time double */
    assert_false(crpci_breaker_open(&b, &o, now + SECOND));
}

/* Any sequence: at most one probe at a time where nobody forces calls, the opening never longer
 * than the longest, and a provider that is healthy again is closed soon. */
static void any_sequence(void **state)
{
    crpci_breaker_options o = options();
    uint64_t seed = 99;
    int round;
    (void)state;
    for (round = 0; round < 300; round++) {
        crpci_breaker b;
        struct {
            int64_t begin;
            bool probe;
        } calls[64];
        int under_way = 0, probes = 0, step, i;
        int64_t now = (int64_t)(ct_random_from(&seed) >> 20);
        memset(&b, 0, sizeof b);
        for (step = 0; step < 2000; step++) {
            uint64_t draw = ct_random_from(&seed) >> 8;
            bool healthy = step >= 1500;
            now += (int64_t)(draw % (200 * MS));
            if ((draw >> 32 & 1) && under_way < 64 && !crpci_breaker_open(&b, &o, now)) {
                bool probe = crpci_breaker_ejected(&b);
                assert_true(!probe || !probes);
                crpci_breaker_begin(&b, &o, now);
                calls[under_way].begin = now;
                calls[under_way++].probe = probe;
                probes += probe;
            } else if (under_way) {
                int which = (int)((draw >> 33) % (uint64_t)under_way);
                crpci_outcome outcome =
                    healthy ? CRPCI_OUTCOME_OK : (crpci_outcome)((draw >> 40) % 3);
                crpci_breaker_end(&b, &o, outcome, now - calls[which].begin, now, (uint32_t)draw);
                probes -= calls[which].probe;
                calls[which] = calls[--under_way];
            }
            assert_int_equal(b.active, under_way);
            assert_true(b.open_us <= o.open_max_us);
            assert_true(b.state != CRPCI_BREAKER_OPEN || b.until_us <= now + o.open_max_us);
        }
        assert_false(crpci_breaker_ejected(&b)); /* 500 steps of 100 ms after it was healed */
        for (i = 0; i < under_way; i++)
            crpci_breaker_end(&b, &o, CRPCI_OUTCOME_OK, now - calls[i].begin, now, 0);
        assert_int_equal(b.active, 0);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_trips_at_the_documented_count),
        CT_TEST(a_share_of_many_calls),
        CT_TEST(ignored_outcomes_do_not_count),
        CT_TEST(the_window_rolls),
        CT_TEST(a_window_of_another_length),
        CT_TEST(slow_calls_trip_too),
        CT_TEST(switched_off_it_never_opens),
        CT_TEST(closed_open_probe_closed),
        CT_TEST(openings_double_and_start_over),
        CT_TEST(openings_are_jittered),
        CT_TEST(a_probe_without_an_answer),
        CT_TEST(late_ends_do_not_count),
        CT_TEST(forced_calls),
        CT_TEST(traffic_is_restored_gradually),
        CT_TEST(reset_closes_at_once),
        CT_TEST(any_sequence),
    };
    return CT_RUN(tests);
}
