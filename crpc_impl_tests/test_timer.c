/* impl-timer: the test sets the time. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

typedef struct mine {
    crpci_timer timer;
    int number;
    bool armed; /* in the model of the test */
    int64_t due_us;
    uint64_t order; /* of arming */
} mine;

static crpci_timer_wheel wheel;
static int fired[64];
static int fired_count;

static void on_fire(crpc_loop *loop, crpci_timer *t)
{
    (void)loop;
    assert_true(fired_count < 64);
    fired[fired_count++] = CRPCI_CONTAINER(t, mine, timer)->number;
}

static void start_at(int64_t now_us)
{
    memset(&wheel, 0, sizeof wheel);
    crpci_timer_open(&wheel, now_us);
    fired_count = 0;
}

static void make(mine *m, int number)
{
    memset(m, 0, sizeof *m);
    m->number = number;
    crpci_timer_init(&m->timer, on_fire);
}

/* As the loop does: takes the timers that are due, then runs them. */
static void run_until(int64_t now_us)
{
    crpci_timer *due, *t;
    crpci_timer_advance(&wheel, now_us);
    due = wheel.fired;
    if (!due)
        return;
    wheel.fired = NULL;
    due->prev = &due;
    while ((t = due) != NULL) {
        crpci_timer_cancel(t);
        t->fn(NULL, t);
    }
}

static const char *order(void)
{
    static char text[256];
    int i, n = 0;
    text[0] = '\0';
    for (i = 0; i < fired_count; i++)
        n += snprintf(text + n, sizeof text - (size_t)n, "%d ", fired[i]);
    fired_count = 0;
    return text;
}

static const int64_t starts_us[] = {
    0,
    999,
    1000,
    63999,
    64 * 1000,
    INT64_C(4095999),
    INT64_C(262143999),
    ((INT64_C(1) << 24) - 1) * 1000,
    ((INT64_C(1) << 30) - 2) * 1000,
    (INT64_C(1) << 30) * 1000,
    ((INT64_C(1) << 31) - 3) * 1000 + 1, /* where signed 32-bit milliseconds overflow */
    (INT64_C(1) << 31) * 1000,
    ((INT64_C(1) << 32) - 3) * 1000 + 999, /* where unsigned ones do, after 49.7 days */
    (INT64_C(1) << 32) * 1000,
    INT64_C(46) * 365 * 86400 * 1000000, /* since 1970 */
    (INT64_C(1) << 52) + 12345,
};
#define STARTS (sizeof starts_us / sizeof starts_us[0])

/* For delays around each border between levels, from each start of the clock: a timer fires not a
 * microsecond early and not a millisecond late. */
static void never_early_and_hardly_late(void **state)
{
    static const int64_t delays_us[] = {1,
                                        999,
                                        1000,
                                        1001,
                                        62999,
                                        63000,
                                        64000,
                                        65000,
                                        66500,
                                        127000,
                                        4095000,
                                        4096000,
                                        4097500,
                                        262143000,
                                        INT64_C(262145001),
                                        INT64_C(16777216000),
                                        INT64_C(1073741823000),
                                        INT64_C(1073741824001),
                                        INT64_C(3) * 86400 * 1000000,
                                        INT64_C(400) * 86400 * 1000000};
    size_t s, d;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        for (d = 0; d < sizeof delays_us / sizeof delays_us[0]; d++) {
            int64_t now = starts_us[s], due = now + delays_us[d], at;
            int wakes = 0;
            mine m;
            start_at(now);
            make(&m, 1);
            crpci_timer_set(&wheel, &m.timer, due);
            /* as a loop sleeps: from each time that the wheel gives to the next */
            while ((at = crpci_timer_next_us(&wheel)) != INT64_MAX && fired_count == 0) {
                assert_true(at > now); /* otherwise the loop would spin */
                assert_true(at < due + 1000);
                now = at;
                run_until(now);
                if (fired_count)
                    assert_true(now >= due);
                assert_true(++wakes <= 45); /* 12 days at a time, then level by level */
            }
            assert_int_equal(fired_count, 1);
            assert_true(now - due < 1000);
            assert_true(crpci_timer_next_us(&wheel) == INT64_MAX);
            /* the same with one step just before it is due and one in that millisecond */
            start_at(starts_us[s]);
            crpci_timer_set(&wheel, &m.timer, due);
            run_until(due - 1);
            assert_int_equal(fired_count, 0);
            run_until(due + 999);
            assert_int_equal(fired_count, 1);
        }
    }
}

static void timers_fire_in_the_order_of_their_times(void **state)
{
    size_t s;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        int64_t now = starts_us[s] / 1000 * 1000;
        mine m[6];
        int i;
        start_at(now);
        for (i = 0; i < 6; i++)
            make(&m[i], i);
        crpci_timer_set(&wheel, &m[3].timer, now + 5000);
        crpci_timer_set(&wheel, &m[0].timer, now + 1000);
        crpci_timer_set(&wheel, &m[5].timer, now + 300000);
        crpci_timer_set(&wheel, &m[2].timer, now + 3000);
        crpci_timer_set(&wheel, &m[4].timer, now + 70000);
        crpci_timer_set(&wheel, &m[1].timer, now + 2000);
        run_until(now + 1000000); /* as after a callback that took a second: all are late */
        assert_string_equal(order(), "0 1 2 3 4 5 ");
    }
}

/* Also if some came down from a higher level and others were armed directly into the slot. */
static void timers_of_one_tick_fire_as_armed(void **state)
{
    size_t s;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        int64_t now = starts_us[s] / 1000 * 1000, due = now + 5000000;
        mine m[8];
        int i;
        start_at(now);
        for (i = 0; i < 8; i++)
            make(&m[i], i);
        crpci_timer_set(&wheel, &m[0].timer, due);
        crpci_timer_set(&wheel, &m[1].timer, due - 400); /* the same millisecond */
        crpci_timer_set(&wheel, &m[2].timer, due);
        run_until(due - 300000);
        crpci_timer_set(&wheel, &m[3].timer, due);
        crpci_timer_set(&wheel, &m[4].timer, due);
        run_until(due - 3000);
        crpci_timer_set(&wheel, &m[5].timer, due);
        crpci_timer_set(&wheel, &m[6].timer, due);
        crpci_timer_set(&wheel, &m[7].timer, due + 1000);
        crpci_timer_set(&wheel, &m[1].timer, due); /* armed again: now the last */
        run_until(due);
        assert_string_equal(order(), "0 2 3 4 5 6 1 ");
        run_until(due + 1000);
        assert_string_equal(order(), "7 ");
    }
}

static void cancelled_ones_do_not_fire(void **state)
{
    mine m[5];
    int i;
    (void)state;
    start_at(5000);
    for (i = 0; i < 5; i++) {
        make(&m[i], i);
        crpci_timer_cancel(&m[i].timer); /* never armed: no effect */
        crpci_timer_set(&wheel, &m[i].timer, 10000);
    }
    crpci_timer_cancel(&m[0].timer); /* the last, the first and one between */
    crpci_timer_cancel(&m[4].timer);
    crpci_timer_cancel(&m[2].timer);
    crpci_timer_cancel(&m[2].timer);
    run_until(10000);
    assert_string_equal(order(), "1 3 ");
    /* also when it is in the list of due timers already */
    for (i = 0; i < 5; i++)
        crpci_timer_set(&wheel, &m[i].timer, 20000);
    crpci_timer_advance(&wheel, 20000);
    crpci_timer_cancel(&m[0].timer);
    crpci_timer_cancel(&m[3].timer);
    assert_true(crpci_timer_next_us(&wheel) <= 20000); /* at once */
    run_until(20000);
    assert_string_equal(order(), "1 2 4 ");
    assert_true(crpci_timer_next_us(&wheel) == INT64_MAX);
}

/* A slot whose only timer was cancelled must not hide later ones. */
static void an_emptied_slot_hides_no_later_timer(void **state)
{
    int64_t a, b;
    (void)state;
    for (a = 1; a < 140; a++) {
        for (b = a + 1; b < 300; b += 1 + b / 40) {
            mine m[2];
            start_at(50 * 1000);
            make(&m[0], 0);
            make(&m[1], 1);
            crpci_timer_set(&wheel, &m[0].timer, (50 + a) * 1000);
            crpci_timer_set(&wheel, &m[1].timer, (50 + b) * 1000);
            crpci_timer_cancel(&m[0].timer);
            while (fired_count == 0) {
                int64_t at = crpci_timer_next_us(&wheel);
                assert_true(at <= (50 + b) * 1000);
                run_until(at);
            }
            assert_int_equal(wheel.tick, 50 + b);
            assert_string_equal(order(), "1 ");
        }
    }
}

static int rearmed;
static int64_t rearm_at;

static void on_fire_again(crpc_loop *loop, crpci_timer *t)
{
    (void)loop;
    rearmed++;
    assert_true(rearmed < 1000);
    if (rearm_at >= 0)
        crpci_timer_set(&wheel, t, rearm_at);
}

static void armed_again_in_its_own_function(void **state)
{
    crpci_timer t;
    int i;
    (void)state;
    start_at(1000000);
    crpci_timer_init(&t, on_fire_again);
    rearmed = 0;
    rearm_at = 0; /* a time in the past: due at once, but in the next step */
    crpci_timer_set(&wheel, &t, 1001000);
    for (i = 1; i <= 5; i++) {
        run_until(1001000);
        assert_int_equal(rearmed, i);
        assert_true(crpci_timer_next_us(&wheel) <= 1001000);
    }
    rearm_at = 1002000;
    run_until(1001000);
    assert_int_equal(rearmed, 6);
    run_until(1001999);
    assert_int_equal(rearmed, 6);
    rearm_at = -1;
    run_until(1002000);
    assert_int_equal(rearmed, 7);
    assert_true(crpci_timer_next_us(&wheel) == INT64_MAX);
}

static void a_time_that_has_passed_is_due_at_once(void **state)
{
    mine m[3];
    (void)state;
    start_at(INT64_C(5000000));
    make(&m[0], 0);
    make(&m[1], 1);
    make(&m[2], 2);
    crpci_timer_set(&wheel, &m[0].timer, 5000000);
    crpci_timer_set(&wheel, &m[1].timer, 5001000);
    assert_true(crpci_timer_next_us(&wheel) == 5000000);
    run_until(5000000);
    assert_string_equal(order(), "0 ");
    crpci_timer_set(&wheel, &m[0].timer, 0);
    crpci_timer_set(&wheel, &m[2].timer, INT64_MIN / 2);
    run_until(5001000);
    assert_int_equal(fired_count, 3);
    assert_int_equal(fired[2], 1); /* timers that were due longer fired first */
}

static void a_clock_that_stands_still_or_goes_back(void **state)
{
    mine m;
    (void)state;
    start_at(9000000);
    make(&m, 1);
    crpci_timer_set(&wheel, &m.timer, 9003000);
    run_until(9001000);
    run_until(8000000);
    run_until(9001000);
    assert_int_equal(fired_count, 0);
    assert_true(crpci_timer_next_us(&wheel) == 9003000);
    run_until(9003000);
    assert_int_equal(fired_count, 1);
}

/* --- against a model ---------------------------------------------------------------------------
 */

#define CROWD 60
static mine crowd[CROWD];
static int64_t model_now;
static int64_t last_tick;
static uint64_t last_order, armings;

static int64_t tick_of(int64_t due_us)
{
    return (due_us + 999) / 1000;
}

static void on_model(crpc_loop *loop, crpci_timer *t)
{
    mine *m = CRPCI_CONTAINER(t, mine, timer);
    (void)loop;
    assert_true(m->armed);
    assert_true(model_now >= m->due_us);
    assert_true(tick_of(m->due_us) > last_tick ||
                (tick_of(m->due_us) == last_tick && m->order > last_order));
    last_tick = tick_of(m->due_us);
    last_order = m->order;
    m->armed = false;
}

static void random_against_a_model(void **state)
{
    size_t s;
    int i;
    (void)state;
    for (s = 0; s < STARTS; s++) {
        int step;
        model_now = starts_us[s];
        start_at(model_now);
        for (i = 0; i < CROWD; i++) {
            make(&crowd[i], i);
            crowd[i].timer.fn = on_model;
        }
        for (step = 0; step < 3000; step++) {
            mine *m = &crowd[ct_random() % CROWD];
            int64_t reach = INT64_C(1) << ct_random() % 41;
            switch (ct_random() % 5) {
            case 0:
            case 1: /* arm, a microsecond to 12 days ahead */
                m->due_us = model_now + 1000 + (int64_t)(ct_random() % (uint64_t)reach);
                m->order = ++armings;
                m->armed = true;
                crpci_timer_set(&wheel, &m->timer, m->due_us);
                break;
            case 2:
                m->armed = false;
                crpci_timer_cancel(&m->timer);
                break;
            default: /* time goes on: to the next event, a bit, or far */
                if (ct_random() % 2) {
                    int64_t at = crpci_timer_next_us(&wheel);
                    model_now = at == INT64_MAX || at < model_now ? model_now : at;
                } else {
                    reach = INT64_C(1) << ct_random() % (step % 100 ? 22 : 42);
                    model_now += (int64_t)(ct_random() % (uint64_t)reach);
                }
                last_tick = INT64_MIN;
                last_order = 0;
                run_until(model_now);
                for (i = 0; i < CROWD; i++) {
                    if (crowd[i].armed)
                        assert_true(tick_of(crowd[i].due_us) > model_now / 1000);
                    assert_int_equal(crowd[i].armed, crowd[i].timer.prev != NULL);
                }
            }
        }
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(never_early_and_hardly_late),
        CT_TEST(timers_fire_in_the_order_of_their_times),
        CT_TEST(timers_of_one_tick_fire_as_armed),
        CT_TEST(cancelled_ones_do_not_fire),
        CT_TEST(an_emptied_slot_hides_no_later_timer),
        CT_TEST(armed_again_in_its_own_function),
        CT_TEST(a_time_that_has_passed_is_due_at_once),
        CT_TEST(a_clock_that_stands_still_or_goes_back),
        CT_TEST(random_against_a_model),
    };
    return CT_RUN(tests);
}
