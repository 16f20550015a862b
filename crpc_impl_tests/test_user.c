/* impl-user: the program's posts, timers and watched descriptors. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"
#include "crpc_loop.h"

/* --- posts ------------------------------------------------------------------------------------ */

static char post_order[64];

static void post_a(void *user)
{
    (void)user;
    strcat(post_order, "a");
}

static void post_again(void *user)
{
    strcat(post_order, "b");
    assert_int_equal(crpc_loop_post((crpc_loop *)user, post_a, NULL), CRPC_OK);
    strcat(post_order, "c");
}

static void posts_run_in_order_and_never_nested(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        post_order[0] = '\0';
        assert_int_equal(crpc_loop_post(l, post_a, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_post(l, post_again, l), CRPC_OK);
        assert_int_equal(crpc_loop_post(l, post_a, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_string_equal(post_order, "abcaa");
        crpc_loop_close(l);
    }
}

static void *post_many(void *arg)
{
    poster *q = (poster *)arg;
    int i;
    for (i = 0; i < 2000; i++) {
        if (crpc_loop_post(q->loop, tick, q->count))
            return NULL;
    }
    return arg;
}

static void other_threads_wake_it(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 2; how++)
    {
        crpc_loop *l = net_loop(p);
        pthread_t threads[3];
        poster q;
        int i, count = 0;
        q.loop = l;
        q.count = &count;
        if (how)
            assert_int_equal(crpc_loop_start(l), CRPC_OK);
        else
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        for (i = 0; i < 3; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, post_many, &q), 0);
        if (!how) {
            while (count < 6000)
                assert_int_equal(crpc_loop_step(l, 100000), CRPC_OK);
        }
        for (i = 0; i < 3; i++) {
            void *result;
            pthread_join(threads[i], &result);
            assert_non_null(result);
        }
        assert_true(CT_WAIT(__atomic_load_n(&count, __ATOMIC_SEQ_CST) == 6000, NET_PATIENCE));
        crpc_loop_close(l);
        assert_int_equal(count, 6000);
    }
}

/* --- timers ----------------------------------------------------------------------------------- */

static void timers_are_never_early(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        timing t[200];
        crpc_id ids[200];
        int i, done = 0;
        int64_t until = ct_now_ms() + NET_PATIENCE;
        memset(t, 0, sizeof t);
        for (i = 0; i < 200; i++) {
            int64_t delay = (int64_t)(ct_random() % 150);
            t[i].due_us = ct_now_us() + delay * 1000;
            assert_int_equal(crpc_timer_start(l, delay, 0, on_timing, &t[i], &ids[i]), CRPC_OK);
            assert_true(ids[i].value != 0);
        }
        while (done < 200 && ct_now_ms() < until) {
            assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
            for (i = done = 0; i < 200; i++)
                done += t[i].count;
        }
        assert_int_equal(done, 200);
        for (i = 0; i < 200; i++) {
            assert_int_equal(t[i].count, 1);
            assert_int_equal(t[i].early, 0);
            crpc_timer_stop(l, ids[i]); /* a stale id is ignored */
        }
        crpc_loop_close(l);
    }
}

typedef struct periodic {
    crpc_loop *loop;
    crpc_id id;
    int count, stop_at;
    int64_t last_us, shortest_us;
} periodic;

static void on_period(void *user)
{
    periodic *q = (periodic *)user;
    if (++q->count == q->stop_at) {
        crpc_timer_stop(q->loop, q->id);
        crpc_timer_stop(q->loop, q->id);
    }
}

static void periodic_timers_repeat_until_stopped(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        periodic q;
        int64_t start = ct_now_us(), until = ct_now_ms() + NET_PATIENCE;
        memset(&q, 0, sizeof q);
        q.loop = l;
        q.stop_at = 6; /* in its own callback */
        assert_int_equal(crpc_timer_start(l, 5, 10, on_period, &q, &q.id), CRPC_OK);
        while (q.count < 6 && ct_now_ms() < until)
            assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(q.count, 6);
        assert_true(ct_now_us() - start >= 55000);
        assert_int_equal(crpc_loop_step(l, 40), CRPC_OK);
        assert_int_equal(q.count, 6);
        assert_int_equal(crpc_loop_timeout(l), -1);
        crpc_loop_close(l);
    }
}

static crpc_id victim;

static void stop_victim(void *user)
{
    crpc_timer_stop((crpc_loop *)user, victim);
}

/* Two timers are due at once; the first stops the second. */
static void a_timer_stopped_by_another_does_not_run(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        crpc_id a, b, c;
        int first = 0, second = 0;
        ticks = 0;
        assert_int_equal(crpc_timer_start(l, 1, 0, tick, &first, &a), CRPC_OK);
        assert_int_equal(crpc_timer_start(l, 1, 0, tick, &second, &c), CRPC_OK);
        victim = a;
        assert_int_equal(crpc_loop_post(l, stop_victim, l), CRPC_OK);
        assert_int_equal(crpc_timer_start(l, 0, 0, tick, &ticks, &b), CRPC_OK);
        ct_sleep_ms(5); /* all of them are due; the post runs first */
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(first, 0);
        assert_int_equal(second, 1);
        assert_int_equal(ticks, 1);
        crpc_loop_close(l);
    }
}

static void bad_timers_and_watches_are_refused(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_id id, none = {0};
    (void)state;
    id.value = 7;
    assert_int_equal(crpc_timer_start(l, -1, 0, tick, NULL, &id), CRPC_EINVAL);
    assert_true(id.value == 0);
    assert_int_equal(crpc_timer_start(l, 0, -1, tick, NULL, &id), CRPC_EINVAL);
    assert_int_equal(crpc_timer_start(l, 0, 0, NULL, NULL, &id), CRPC_EINVAL);
    assert_int_equal(crpc_timer_start(l, INT64_MAX, 0, tick, NULL, &id), CRPC_EINVAL);
    assert_int_equal(crpc_timer_start(l, INT64_C(3153600000000), 0, tick, NULL, &id), CRPC_OK);
    assert_int_equal(crpc_loop_watch(l, -1, CRPC_READABLE, NULL, NULL, &id), CRPC_EINVAL);
    assert_int_equal(crpc_loop_rewatch(l, none, CRPC_READABLE), CRPC_ENOTFOUND);
    crpc_loop_unwatch(l, none);
    crpc_timer_stop(l, none);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    crpc_loop_close(l);
}

/* A timer's id cannot end a watch, nor a watch's id a timer. */
static void on_any(void *user, int fd, unsigned events)
{
    (void)fd, (void)events;
    ++*(int *)user;
}

static void an_id_of_one_kind_does_not_end_the_other(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_id timer, watch;
    int fds[2], count = 0;
    (void)state;
    assert_int_equal(pipe(fds), 0);
    ticks = 0;
    assert_int_equal(crpc_timer_start(l, 1, 0, tick, &ticks, &timer), CRPC_OK);
    assert_int_equal(crpc_loop_watch(l, fds[0], CRPC_READABLE, on_any, &count, &watch), CRPC_OK);
    crpc_loop_unwatch(l, timer);
    crpc_timer_stop(l, watch);
    assert_int_equal(crpc_loop_rewatch(l, timer, CRPC_READABLE), CRPC_ENOTFOUND);
    assert_int_equal(write(fds[1], "x", 1), 1);
    ct_sleep_ms(5);
    assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
    assert_int_equal(ticks, 1);
    assert_int_equal(count, 1);
    crpc_loop_close(l); /* with the watch still there */
    close(fds[0]);
    close(fds[1]);
}

/* --- watches ---------------------------------------------------------------------------------- */

static void watches_are_level_triggered_and_change(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        watcher w;
        int fds[2], i;
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
        memset(&w, 0, sizeof w);
        w.loop = l;
        w.fd = fds[0];
        assert_int_equal(crpc_loop_watch(l, fds[0], 4, on_watch, &w, &w.id), CRPC_EINVAL);
        assert_int_equal(crpc_loop_watch(l, fds[0], CRPC_READABLE, on_watch, &w, &w.id), CRPC_OK);
        assert_int_equal(stats_of(l).watches, 2);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(w.count, 0);
        assert_int_equal(write(fds[1], "x", 1), 1);
        for (i = 1; i <= 3; i++) { /* reported until the bytes are read */
            assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
            assert_int_equal(w.count, i);
            assert_int_equal(w.events, CRPC_READABLE);
        }
        w.how = 2;
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(w.count, 4);
        w.how = 0;
        assert_int_equal(crpc_loop_rewatch(l, w.id, CRPC_READABLE | CRPC_WRITABLE), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(w.events, CRPC_WRITABLE);
        assert_int_equal(write(fds[1], "x", 1), 1);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(w.events, CRPC_READABLE | CRPC_WRITABLE);
        w.count = 0;
        assert_int_equal(crpc_loop_rewatch(l, w.id, 0), CRPC_OK); /* pauses */
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
        assert_int_equal(w.count, 0);
        assert_int_equal(crpc_loop_rewatch(l, w.id, CRPC_READABLE), CRPC_OK);
        w.how = 3; /* and in its own callback */
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
        assert_int_equal(w.count, 1);
        assert_int_equal(crpc_loop_rewatch(l, w.id, CRPC_READABLE), CRPC_OK);
        w.how = 1;
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(w.count, 2);
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
        assert_int_equal(w.count, 2);
        assert_int_equal(crpc_loop_rewatch(l, w.id, CRPC_READABLE), CRPC_ENOTFOUND);
        assert_int_equal(stats_of(l).watches, 1);
        close(fds[1]);
        crpc_loop_close(l);
    }
}

static void the_end_of_a_peer_is_readable_and_writable(void **state)
{
    static const unsigned wanted[] = {CRPC_READABLE, CRPC_WRITABLE, CRPC_READABLE | CRPC_WRITABLE};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 3; i++)
    {
        crpc_loop *l = net_loop(p);
        watcher w;
        int fds[2];
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
        close(fds[1]);
        memset(&w, 0, sizeof w);
        w.loop = l;
        w.fd = fds[0];
        assert_int_equal(crpc_loop_watch(l, fds[0], wanted[i], on_watch, &w, &w.id), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(w.count, 1);
        assert_int_equal(w.events, wanted[i]);
        crpc_loop_unwatch(l, w.id);
        close(fds[0]);
        crpc_loop_close(l);
    }
}

/* Both descriptors are ready; the callback that runs first ends the other watch. */
static void a_watch_ended_by_another_does_not_run(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        watcher w[2];
        int fds[2][2], i;
        memset(w, 0, sizeof w);
        for (i = 0; i < 2; i++) {
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds[i]), 0);
            assert_int_equal(write(fds[i][1], "x", 1), 1);
            w[i].loop = l;
            w[i].fd = fds[i][0];
            w[i].how = 4;
            assert_int_equal(
                crpc_loop_watch(l, fds[i][0], CRPC_READABLE, on_watch, &w[i], &w[i].id), CRPC_OK);
        }
        w[0].other = w[1].id;
        w[1].other = w[0].id;
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(w[0].count + w[1].count, 1);
        crpc_loop_close(l);
        for (i = 0; i < 2; i++) {
            close(fds[i][0]);
            close(fds[i][1]);
        }
    }
}

/* The number of a closed descriptor is that of the next one opened: no event of the old watch may
 * reach the new one. */
static void descriptor_numbers_are_reused(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        int round;
        for (round = 0; round < 100; round++) {
            watcher a, b;
            int fds[2], again[2];
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
            memset(&a, 0, sizeof a);
            a.loop = l;
            a.fd = fds[0];
            assert_int_equal(crpc_loop_watch(l, fds[0], CRPC_READABLE, on_watch, &a, &a.id),
                             CRPC_OK);
            assert_int_equal(write(fds[1], "x", 1), 1);
            crpc_loop_unwatch(l, a.id);
            close(fds[0]);
            close(fds[1]);
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, again), 0);
            assert_int_equal(again[0], fds[0]);
            memset(&b, 0, sizeof b);
            b.loop = l;
            b.fd = again[0];
            assert_int_equal(crpc_loop_watch(l, again[0], CRPC_READABLE, on_watch, &b, &b.id),
                             CRPC_OK);
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            assert_int_equal(a.count + b.count, 0);
            assert_int_equal(write(again[1], "x", 1), 1);
            assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
            assert_int_equal(b.count, 1);
            assert_int_equal(a.count, 0);
            crpc_loop_unwatch(l, b.id);
            close(again[0]);
            close(again[1]);
        }
        crpc_loop_close(l);
    }
}

/* More descriptors than one wait reports: each gets its turn. */
static void many_descriptors_all_get_their_turn(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        static watcher w[200];
        static int fds[200][2];
        int i, step;
        memset(w, 0, sizeof w);
        for (i = 0; i < 200; i++) {
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds[i]), 0);
            assert_int_equal(write(fds[i][1], "x", 1), 1);
            w[i].loop = l;
            w[i].fd = fds[i][0];
            assert_int_equal(
                crpc_loop_watch(l, fds[i][0], CRPC_READABLE, on_watch, &w[i], &w[i].id), CRPC_OK);
        }
        for (step = 0; step < 10; step++)
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        for (i = 0; i < 200; i++) {
            assert_true(w[i].count >= 1); /* nobody reads: all stay ready all the time */
            crpc_loop_unwatch(l, w[i].id);
            close(fds[i][0]);
            close(fds[i][1]);
        }
        assert_int_equal(stats_of(l).watches, 1);
        crpc_loop_close(l);
    }
}

/* A change of what is watched takes effect while another thread sleeps in the poller. */
static void changes_reach_a_sleeping_loop(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        int i;
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        for (i = 0; i < 50; i++) {
            watcher w;
            int fds[2];
            assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fds), 0);
            memset(&w, 0, sizeof w);
            w.loop = l;
            w.fd = fds[0];
            w.how = 2;
            assert_int_equal(crpc_loop_watch(l, fds[0], 0, on_watch, &w, &w.id), CRPC_OK);
            assert_int_equal(write(fds[1], "x", 1), 1);
            assert_int_equal(crpc_loop_rewatch(l, w.id, CRPC_READABLE), CRPC_OK);
            assert_true(CT_WAIT(__atomic_load_n(&w.count, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
            crpc_loop_unwatch(l, w.id);
            ct_sleep_ms(1);
            close(fds[0]);
            close(fds[1]);
        }
        crpc_loop_close(l);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(posts_run_in_order_and_never_nested),
        CT_TEST(other_threads_wake_it),
        CT_TEST(timers_are_never_early),
        CT_TEST(periodic_timers_repeat_until_stopped),
        CT_TEST(a_timer_stopped_by_another_does_not_run),
        CT_TEST(bad_timers_and_watches_are_refused),
        CT_TEST(an_id_of_one_kind_does_not_end_the_other),
        CT_TEST(watches_are_level_triggered_and_change),
        CT_TEST(the_end_of_a_peer_is_readable_and_writable),
        CT_TEST(a_watch_ended_by_another_does_not_run),
        CT_TEST(descriptor_numbers_are_reused),
        CT_TEST(many_descriptors_all_get_their_turn),
        CT_TEST(changes_reach_a_sleeping_loop),
    };
    return CT_RUN(tests);
}
