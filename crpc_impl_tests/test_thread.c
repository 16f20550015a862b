/* impl-thread. Wrappers around libc's functions record which clock and stack size crpc asks for. */
#include <pthread.h>
#include <time.h>

static int asked_clock = -1; /* the clock that crpc read last */
static int cond_clock = -1;  /* the clock of the last condition variable */
static int watch_clock_gettime(clockid_t id, struct timespec *ts)
{
    asked_clock = (int)id;
    return clock_gettime(id, ts);
}
static int watch_setclock(pthread_condattr_t *attr, clockid_t id)
{
    cond_clock = (int)id;
    return pthread_condattr_setclock(attr, id);
}

#define CRPC_IMPLEMENTATION
#define clock_gettime             watch_clock_gettime
#define pthread_condattr_setclock watch_setclock
#include "../crpc.h"
#undef clock_gettime
#undef pthread_condattr_setclock
#include "crpc_test.h"

#include <signal.h>

static crpci_mutex lock;
static crpci_cond cond;
static int stage;

/* Deadlines go by CLOCK_MONOTONIC: if the wall clock is set (GPS, NTP, an empty battery), no
 * timeout fires early or late. */
static void waits_on_the_monotonic_clock(void **state)
{
    int64_t start;
    (void)state;
    cond_clock = asked_clock = -1;
    assert_int_equal(crpci_thread_mutex_init(&lock), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    assert_int_equal(cond_clock, CLOCK_MONOTONIC);
    crpci_thread_lock(&lock);
    start = ct_now_us();
    crpci_thread_wait(&cond, &lock, 60000);
    /* with two different clocks it would return at once */
    assert_true(ct_now_us() - start >= 60000);
    assert_int_equal(asked_clock, CLOCK_MONOTONIC);
    crpci_thread_unlock(&lock);
    crpci_thread_cond_free(&cond);
    crpci_thread_mutex_free(&lock);
}

/* Waits that cross the end of a second, at any time of day: nanoseconds carry into seconds. */
static void waits_are_never_short(void **state)
{
    int i;
    (void)state;
    assert_int_equal(crpci_thread_mutex_init(&lock), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    crpci_thread_lock(&lock);
    for (i = 0; i < 30; i++) {
        int64_t start = ct_now_us();
        int64_t us = i == 0 ? 1000100 : 37000 + i;
        crpci_thread_wait(&cond, &lock, us);
        assert_true(ct_now_us() - start >= us);
    }
    {
        int64_t start = ct_now_us();
        crpci_thread_wait(&cond, &lock, 0);
        assert_true(ct_now_us() - start < 5000000);
    }
    crpci_thread_unlock(&lock);
    crpci_thread_cond_free(&cond);
    crpci_thread_mutex_free(&lock);
}

static void *waiter(void *arg)
{
    int64_t us = *(const int64_t *)arg;
    crpci_thread_lock(&lock);
    stage++;
    crpci_thread_signal(&cond);
    while (stage < 100)
        crpci_thread_wait(&cond, &lock, us);
    stage++;
    crpci_thread_unlock(&lock);
    return NULL;
}

/* A wait without a limit and one of centuries both start, and end only by the signal. */
static void long_waits_are_ended_by_a_signal(void **state)
{
    static const int64_t limits[] = {-1, INT64_MAX, INT64_MAX / 2, 60000000};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        crpci_thread t[2];
        int64_t limit = limits[i];
        stage = 0;
        assert_int_equal(crpci_thread_mutex_init(&lock), CRPC_OK);
        assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
        assert_int_equal(crpci_thread_start(&t[0], 0, waiter, &limit), CRPC_OK);
        assert_int_equal(crpci_thread_start(&t[1], 0, waiter, &limit), CRPC_OK);
        crpci_thread_lock(&lock);
        while (stage < 2)
            crpci_thread_wait(&cond, &lock, 20000);
        crpci_thread_unlock(&lock);
        ct_sleep_ms(10); /* by now both threads most probably wait */
        crpci_thread_lock(&lock);
        assert_int_equal(stage, 2);
        stage = 100;
        crpci_thread_broadcast(&cond);
        crpci_thread_unlock(&lock);
        crpci_thread_join(t[0]);
        crpci_thread_join(t[1]);
        assert_int_equal(stage, 102);
        crpci_thread_cond_free(&cond);
        crpci_thread_mutex_free(&lock);
    }
}

static struct {
    sigset_t blocked;
    size_t stack;
    bool is_self;
    char name[32];
} seen;

static void *look(void *arg)
{
    pthread_attr_t attr;
    crpci_thread starter = *(crpci_thread *)arg;
    pthread_sigmask(SIG_SETMASK, NULL, &seen.blocked);
    seen.is_self = crpci_thread_is_self(starter) || !crpci_thread_is_self(crpci_thread_self());
    if (pthread_getattr_np(pthread_self(), &attr) == 0) {
        pthread_attr_getstacksize(&attr, &seen.stack);
        pthread_attr_destroy(&attr);
    }
    crpci_thread_name("a name of more than 15 characters");
    pthread_getname_np(pthread_self(), seen.name, sizeof seen.name);
    return NULL;
}

/* The program's signal handlers run on the program's threads. */
static void a_new_thread_blocks_all_signals(void **state)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGUSR1, SIGPIPE, SIGCHLD, SIGALRM, SIGHUP};
    crpci_thread me = crpci_thread_self(), t;
    sigset_t mine;
    size_t i;
    (void)state;
    assert_int_equal(crpci_thread_start(&t, 512 * 1024, look, &me), CRPC_OK);
    crpci_thread_join(t);
    for (i = 0; i < sizeof signals / sizeof signals[0]; i++)
        assert_int_equal(sigismember(&seen.blocked, signals[i]), 1);
    pthread_sigmask(SIG_SETMASK, NULL, &mine);
    for (i = 0; i < sizeof signals / sizeof signals[0]; i++)
        assert_int_equal(sigismember(&mine, signals[i]), 0); /* ours are as they were */
    /* musl adds what it keeps on the stack for itself */
    assert_in_range(seen.stack, 512 * 1024, 576 * 1024);
    assert_false(seen.is_self);
    assert_string_equal(seen.name, "a name of more ");
}

static void references_count_to_zero_once(void **state)
{
    uint32_t n = 1;
    (void)state;
    crpci_thread_ref(&n);
    crpci_thread_ref(&n);
    assert_int_equal(crpci_thread_load(&n), 3);
    assert_false(crpci_thread_unref(&n));
    assert_false(crpci_thread_unref(&n));
    assert_true(crpci_thread_unref(&n));
    crpci_thread_store(&n, UINT32_MAX);
    assert_true(crpci_thread_load(&n) == UINT32_MAX);
}

static uint32_t counter;
static int last_ones;

static void *count_down(void *arg)
{
    int i;
    (void)arg;
    for (i = 0; i < 20000; i++) {
        if (crpci_thread_unref(&counter))
            __atomic_add_fetch(&last_ones, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void references_of_several_threads(void **state)
{
    crpci_thread t[4];
    int i;
    (void)state;
    last_ones = 0;
    crpci_thread_store(&counter, 4 * 20000);
    for (i = 0; i < 4; i++)
        assert_int_equal(crpci_thread_start(&t[i], 0, count_down, NULL), CRPC_OK);
    for (i = 0; i < 4; i++)
        crpci_thread_join(t[i]);
    assert_true(crpci_thread_load(&counter) <= 1); /* the last unref may leave the count at 1 */
    assert_int_equal(last_ones, 1);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(waits_on_the_monotonic_clock),     CT_TEST(waits_are_never_short),
        CT_TEST(long_waits_are_ended_by_a_signal), CT_TEST(a_new_thread_blocks_all_signals),
        CT_TEST(references_count_to_zero_once),    CT_TEST(references_of_several_threads),
    };
    return CT_RUN(tests);
}
