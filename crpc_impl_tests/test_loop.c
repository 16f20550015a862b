#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"

static crpc_loop_stats stats_of(crpc_loop *l)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(l, &stats);
    return stats;
}

static int threads_of_process(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

static int ticks;

static void tick(void *user)
{
    ++*(int *)user;
}

static void stop_loop(void *user)
{
    crpc_loop_stop((crpc_loop *)user);
}

/* --- who drives --------------------------------------------------------------------------------
 */

static void it_says_what_runs(void **state)
{
    crpc_loop *l;
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    (void)state;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    assert_string_equal(stats_of(l).poller, "epoll");
    assert_true(crpc_loop_fd(l) >= 0);
    crpc_loop_close(l);
    l = net_loop(CRPC_POLLER_POLL);
    assert_string_equal(stats_of(l).poller, "poll");
    assert_int_equal(crpc_loop_fd(l), -1);
    assert_int_equal(stats_of(l).watches, 1);
    assert_int_equal(stats_of(l).connections, 0);
    assert_true(stats_of(l).memory > 0);
    crpc_loop_close(l);
    assert_int_equal(crpc_loop_open(&l, NULL), CRPC_OK);
    crpc_loop_close(l);
    crpc_loop_close(NULL);
}

static void steps_wait_as_long_as_they_are_told(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        int64_t start = ct_now_us();
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_true(ct_now_us() - start < 5000000);
        start = ct_now_us();
        assert_int_equal(crpc_loop_step(l, 30), CRPC_OK);
        assert_true(ct_now_us() - start >= 30000);
        ticks = 0;
        assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
        assert_int_equal(ticks, 0); /* never before it has returned */
        start = ct_now_us();
        assert_int_equal(crpc_loop_step(l, 100000), CRPC_OK);
        assert_int_equal(ticks, 1);
        assert_true(ct_now_us() - start < 50000000);
        crpc_loop_close(l);
    }
}

static int nested[6];

static void use_from_inside(void *user)
{
    crpc_loop *l = (crpc_loop *)user;
    nested[0] = crpc_loop_step(l, 0);
    nested[1] = crpc_loop_run(l);
    nested[2] = crpc_loop_start(l);
    crpc_loop_stop(l);
}

static void *run_loop(void *arg)
{
    crpc_loop *l = (crpc_loop *)arg;
    return crpc_loop_run(l) == CRPC_OK ? arg : NULL;
}

static void one_thread_drives_at_a_time(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        pthread_t thread;
        void *result;
        ticks = 0;
        assert_int_equal(crpc_loop_post(l, use_from_inside, l), CRPC_OK);
        assert_int_equal(crpc_loop_run(l), CRPC_OK);
        assert_int_equal(nested[0], CRPC_EDEADLK);
        assert_int_equal(nested[1], CRPC_EDEADLK);
        assert_int_equal(nested[2], CRPC_EBUSY);

        assert_int_equal(pthread_create(&thread, NULL, run_loop, l), 0);
        assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&ticks, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
        assert_int_equal(crpc_loop_step(l, 0), CRPC_EBUSY);
        assert_int_equal(crpc_loop_run(l), CRPC_EBUSY);
        assert_int_equal(crpc_loop_start(l), CRPC_EBUSY);
        crpc_loop_stop(l);
        pthread_join(thread, &result);
        assert_ptr_equal(result, l);

        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        assert_int_equal(crpc_loop_start(l), CRPC_EBUSY);
        assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&ticks, __ATOMIC_SEQ_CST) == 2, NET_PATIENCE));
        assert_int_equal(crpc_loop_step(l, 0), CRPC_EBUSY);
        crpc_loop_close(l);
        assert_int_equal(threads_of_process(), 1);
    }
}

static void stopping_is_remembered_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        crpc_id timer;
        crpc_loop_stop(l);
        crpc_loop_stop(l);
        assert_int_equal(crpc_loop_run(l), CRPC_OK); /* at once */
        assert_int_equal(crpc_timer_start(l, 20, 0, stop_loop, l, &timer), CRPC_OK);
        assert_int_equal(crpc_loop_run(l), CRPC_OK); /* by the timer, not by the second stop */
        crpc_timer_stop(l, timer);
        ticks = 0;
        assert_int_equal(crpc_timer_start(l, 0, 0, tick, &ticks, &timer), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
        assert_int_equal(ticks, 1);
        crpc_loop_close(l);
    }
}

static void a_loop_can_be_started_again(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        int i;
        ticks = 0;
        for (i = 1; i <= 20; i++) {
            int64_t until = ct_now_ms() + NET_PATIENCE;
            int status;
            do { /* the thread that was told to stop may still be there */
                status = crpc_loop_start(l);
            } while (status == CRPC_EBUSY && ct_now_ms() < until);
            assert_int_equal(status, CRPC_OK);
            assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
            assert_true(CT_WAIT(__atomic_load_n(&ticks, __ATOMIC_SEQ_CST) == i, NET_PATIENCE));
            crpc_loop_stop(l);
        }
        crpc_loop_close(l);
        assert_int_equal(threads_of_process(), 1);
    }
}

static crpc_loop *loop_of_signal;

static void on_signal(int number)
{
    (void)number;
    errno = 77;
    crpc_loop_stop(loop_of_signal);
    if (errno != 77)
        abort();
}

static void a_signal_handler_may_stop_it(void **state)
{
    crpc_poller p;
    int i;
    (void)state;
    signal(SIGALRM, on_signal);
    NET_EACH_POLLER(p) for (i = 0; i < 20; i++)
    {
        struct itimerval soon;
        loop_of_signal = net_loop(p);
        memset(&soon, 0, sizeof soon);
        soon.it_value.tv_usec = 1 + i * 500;
        setitimer(ITIMER_REAL, &soon, NULL);
        assert_int_equal(crpc_loop_run(loop_of_signal), CRPC_OK);
        crpc_loop_close(loop_of_signal);
    }
    signal(SIGALRM, SIG_DFL);
    alarm(CT_TEST_SECONDS);
}

static pthread_t callback_thread;
static char callback_name[32];
static int callback_blocks;

static void look_at_thread(void *user)
{
    sigset_t blocked;
    callback_thread = pthread_self();
    pthread_getname_np(pthread_self(), callback_name, sizeof callback_name);
    pthread_sigmask(SIG_BLOCK, NULL, &blocked);
    callback_blocks = sigismember(&blocked, SIGTERM) && sigismember(&blocked, SIGUSR1);
    __atomic_add_fetch((int *)user, 1, __ATOMIC_SEQ_CST);
}

static void its_own_thread(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_loop *l;
    (void)state;
    o.thread_name = "a-name-that-is-too-long";
    o.stack_size = 128 << 10;
    ticks = 0;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    assert_int_equal(threads_of_process(), 1); /* none before it is asked for */
    assert_int_equal(crpc_loop_start(l), CRPC_OK);
    assert_int_equal(crpc_loop_post(l, look_at_thread, &ticks), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&ticks, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
    assert_string_equal(callback_name, "a-name-that-is-");
    assert_true(callback_blocks);
    crpc_loop_close(l);
}

/* --- posts -------------------------------------------------------------------------------------
 */

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

typedef struct poster {
    crpc_loop *loop;
    int *count;
} poster;

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

/* --- timers ------------------------------------------------------------------------------------
 */

typedef struct timing {
    int64_t due_us;
    int early, count;
} timing;

static void on_timing(void *user)
{
    timing *t = (timing *)user;
    t->early += ct_now_us() < t->due_us;
    t->count++;
}

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
            crpc_timer_stop(l, ids[i]); /* stale: ignored */
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

/* A timer's id is no watch's, and a watch's no timer's. */
static void on_any(void *user, int fd, unsigned events)
{
    (void)fd, (void)events;
    ++*(int *)user;
}

static void ids_keep_their_kind(void **state)
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

/* --- a clock of one's own ----------------------------------------------------------------------
 */

static int64_t fake_now; /* of loops that only this thread steps */

static int64_t fake_clock(void *user)
{
    (void)user;
    return fake_now;
}

static void step_fake(crpc_loop *l, int64_t us)
{
    fake_now = us;
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
}

/* Every delay fires at its millisecond and none before; also where a 32-bit count of milliseconds
 * would wrap. */
static void timers_follow_the_given_clock(void **state)
{
    static const int64_t starts[] = {0, 123, INT64_C(2147483000) * 1000 + 999,
                                     INT64_C(4294967000) * 1000 + 1, INT64_C(281474976000000)};
    static const int64_t delays[] = {0,
                                     1,
                                     63,
                                     64,
                                     65,
                                     4095,
                                     4096,
                                     5000,
                                     9999,
                                     262143,
                                     262144,
                                     1000000,
                                     16777216,
                                     86400000,
                                     INT64_C(1073741823),
                                     INT64_C(1073741825),
                                     INT64_C(40000000000)};
    crpc_poller p;
    size_t i, k;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < sizeof starts / sizeof *starts; i++)
    {
        crpc_loop_options o = net_loop_options(p);
        crpc_loop *l;
        int counts[sizeof delays / sizeof *delays];
        crpc_id ids[sizeof delays / sizeof *delays], cancelled;
        int never = 0;
        o.hooks.clock_us = fake_clock;
        fake_now = starts[i];
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        assert_int_equal(crpc_loop_now_us(l), starts[i]);
        memset(counts, 0, sizeof counts);
        for (k = 0; k < sizeof delays / sizeof *delays; k++) {
            assert_int_equal(crpc_timer_start(l, delays[k], 0, tick, &counts[k], &ids[k]), CRPC_OK);
            assert_int_equal(crpc_timer_start(l, delays[k], 0, tick, &never, &cancelled), CRPC_OK);
            crpc_timer_stop(l, cancelled);
        }
        for (k = 0; k < sizeof delays / sizeof *delays; k++) {
            int64_t due = starts[i] + delays[k] * 1000;
            if (delays[k]) {
                step_fake(l, due - 1);
                assert_int_equal(counts[k], 0);
                /* the program may not sleep past it */
                assert_in_range(crpc_loop_timeout(l), 0, 1);
            }
            step_fake(l, (due + 999) / 1000 * 1000);
            assert_int_equal(counts[k], 1);
        }
        assert_int_equal(never, 0);
        crpc_loop_close(l);
    }
}

/* What the wall clock says is nobody's business: a run under a clock that jumps changes nothing,
 * because nothing but the given one, or CLOCK_MONOTONIC, is ever asked. */
static void only_the_given_clock_counts(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_channel_options co;
    crpc_channel *ch;
    crpc_loop *l;
    peer silent;
    dyn_Num in = net_num(1);
    crpc_id id;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    o.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    o.forbid_threads = 1; /* this thread steps it */
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    memset(&co, 0, sizeof co);
    co.loop = l;
    co.policy.timeout_ms = 3600000;
    assert_int_equal(crpc_channel_open(&ch, silent.url, &co, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
    for (i = 0; i < 10000 && peer_requests(&silent) == 0; i++)
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    step_fake(l, fake_now + INT64_C(3599000000));
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
    step_fake(l, fake_now + 999000);
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
    step_fake(l, fake_now + 2000);
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(ch, id), CRPC_OK);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&silent);
}

/* --- watches -----------------------------------------------------------------------------------
 */

typedef struct watcher {
    crpc_loop *loop;
    crpc_id id, other;
    int fd, count;
    unsigned events;
    int how; /* 1: unwatches and closes, 2: reads all, 3: rewatches for nothing, 4: unwatches other
              */
} watcher;

static void on_watch(void *user, int fd, unsigned events)
{
    watcher *w = (watcher *)user;
    char buffer[100];
    assert_int_equal(fd, w->fd);
    w->count++;
    w->events = events;
    if (w->how == 1) {
        crpc_loop_unwatch(w->loop, w->id);
        close(fd);
    } else if (w->how == 2) {
        assert_true(read(fd, buffer, sizeof buffer) >= 0);
    } else if (w->how == 3) {
        assert_int_equal(crpc_loop_rewatch(w->loop, w->id, 0), CRPC_OK);
    } else if (w->how == 4) {
        crpc_loop_unwatch(w->loop, w->other);
    }
}

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
        for (i = 1; i <= 3; i++) { /* again and again, until it is read */
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

/* Both are ready; whichever comes first ends the other one's watch. */
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

/* A closed descriptor's number comes back at once for another one: no event of the old watch may
 * reach the new. */
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

/* While another thread sleeps in the loop, what is watched changes at once. */
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

/* --- inside another loop -----------------------------------------------------------------------
 */

static int foreign_done;

static void on_foreign(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    (void)user, (void)call;
    assert_int_equal(status, CRPC_OK);
    assert_true(response->n > 0);
    foreign_done++;
}

/* One turn of a program's own loop; how often it woke up. */
static void foreign_turn(crpc_loop *l, int at_most_ms)
{
    struct pollfd fds[32];
    size_t n = crpc_loop_pollfds(l, fds, 32);
    int ms = crpc_loop_timeout(l);
    assert_true(n <= 32);
    if (ms < 0 || ms > at_most_ms)
        ms = at_most_ms;
    poll(fds, (nfds_t)n, ms);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
}

static void a_foreign_loop_drives_it_in_one_thread(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pid_t child;
        peer adds;
        crpc_loop *l;
        crpc_channel *ch;
        int begun = 0, turns, i;
        int64_t until;
        child = peer_fork(&adds, peer_adds);
        l = net_loop(p);
        assert_true(p == CRPC_POLLER_POLL || crpc_loop_fd(l) >= 0);
        ch = net_channel(adds.url, "?timeout_ms=3000", p, l, NULL);
        foreign_turn(l, 0); /* from now on it is known to be driven: calls start no thread */
        foreign_done = 0;
        until = ct_now_ms() + 60000;
        while (foreign_done < 10000 && ct_now_ms() < until) {
            while (begun < 10000 && begun - foreign_done < 100) {
                dyn_Num in = net_num(++begun);
                assert_int_equal(dyn_Echo_Add_async(ch, &in, on_foreign, NULL, NULL), CRPC_OK);
            }
            foreign_turn(l, 1000);
        }
        assert_int_equal(foreign_done, 10000);
        assert_int_equal(threads_of_process(), 1);

        /* idle: when what deadlines left behind is gone, it never wants to be woken again */
        for (i = 0; i < 100 && crpc_loop_timeout(l) >= 0; i++)
            foreign_turn(l, 30000);
        assert_int_equal(crpc_loop_timeout(l), -1);
        turns = (int)stats_of(l).waits;
        {
            struct pollfd fds[32];
            size_t n = crpc_loop_pollfds(l, fds, 32);
            assert_int_equal(poll(fds, (nfds_t)n, 1000), 0);
        }
        assert_int_equal(stats_of(l).waits, turns);
        /* a reply would have woken it, and so does a post */
        ticks = 0;
        assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
        {
            struct pollfd fds[32];
            size_t n = crpc_loop_pollfds(l, fds, 32);
            assert_true(poll(fds, (nfds_t)n, NET_PATIENCE) > 0);
        }
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(ticks, 1);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_kill(child);
    }
}

/* The timeout that it gives is that of the next timer, and it never lets one be missed. */
static void the_timeout_is_that_of_the_next_timer(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        timing t;
        crpc_id id;
        int turns = 0;
        assert_int_equal(crpc_loop_timeout(l), -1);
        memset(&t, 0, sizeof t);
        t.due_us = ct_now_us() + 80000;
        assert_int_equal(crpc_timer_start(l, 80, 0, on_timing, &t, &id), CRPC_OK);
        assert_in_range(crpc_loop_timeout(l), 0, 81);
        while (!t.count && turns < 1000) {
            foreign_turn(l, 100000);
            turns++;
        }
        assert_int_equal(t.count, 1);
        assert_int_equal(t.early, 0);
        assert_true(turns < 20); /* not by spinning */
        assert_int_equal(crpc_loop_post(l, tick, &ticks), CRPC_OK);
        assert_int_equal(crpc_loop_timeout(l), 0);
        crpc_loop_close(l);
    }
}

static void *post_one(void *arg)
{
    poster *q = (poster *)arg;
    ct_sleep_ms(50);
    return crpc_loop_post(q->loop, tick, q->count) ? NULL : arg;
}

static int late_fired;

static void on_late(void *user)
{
    (void)user;
    late_fired++;
}

static void *set_a_timer(void *arg)
{
    crpc_loop *l = (crpc_loop *)arg;
    ct_sleep_ms(100); /* the program is in its poll */
    assert_int_equal(crpc_timer_start(l, 50, 0, on_late, NULL, NULL), CRPC_OK);
    return NULL;
}

/* A caller has driven the loop and gone; then another thread's timer is due before the program, which
 * waits for nothing in particular, would look. */
static void another_threads_timer_wakes_a_foreign_loop(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        crpc_loop *l = net_loop(p);
        crpc_channel *ch;
        crpc_call call = CRPC_INIT;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        pthread_t t;
        int turns = 0;
        peer_open(&silent, peer_silent, NULL);
        ch = net_channel(silent.url, "", p, l, NULL);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        call.policy.timeout_ms = 20;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        late_fired = 0;
        assert_int_equal(pthread_create(&t, NULL, set_a_timer, l), 0);
        while (!late_fired && turns++ < 20)
            foreign_turn(l, NET_PATIENCE); /* one that is not woken lasts so long */
        pthread_join(t, NULL);
        assert_int_equal(late_fired, 1);
        assert_true(turns < 20);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&silent);
    }
}

/* The program was told long ago how long to wait, and waits for a call by id instead. */
static void a_wait_looks_at_the_clock(void **state)
{
    peer silent;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *ch;
    dyn_Num in = net_num(1);
    crpc_id id;
    int64_t begin;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    ch = net_channel(silent.url, "?timeout_ms=600000", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
    for (i = 0; i < 20; i++)
        assert_int_equal(crpc_loop_step(l, 5), CRPC_OK);
    crpc_loop_timeout(l);
    ct_sleep_ms(2500);
    begin = ct_now_ms();
    assert_int_equal(crpc_channel_wait(ch, id, 50), CRPC_EPENDING);
    assert_true(ct_now_ms() - begin < 2000);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&silent);
}

static void another_thread_wakes_a_foreign_loop(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        poster q;
        pthread_t thread;
        int count = 0, rounds = 0;
        q.loop = l;
        q.count = &count;
        assert_int_equal(crpc_loop_timeout(l), -1);
        assert_int_equal(pthread_create(&thread, NULL, post_one, &q), 0);
        while (!count && rounds < 10) {
            foreign_turn(l, NET_PATIENCE);
            rounds++;
        }
        assert_int_equal(count, 1);
        pthread_join(thread, NULL);
        crpc_loop_close(l);
    }
}

/* --- closing -----------------------------------------------------------------------------------
 */

static void post_more(void *user)
{
    poster *q = (poster *)user;
    if (++*q->count < 5)
        assert_int_equal(crpc_loop_post(q->loop, post_more, q), CRPC_OK);
}

static void closing_runs_what_is_due_once(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 3; how++)
    {
        crpc_loop *l = net_loop(p);
        poster q;
        watcher w;
        crpc_id far, period;
        int count = 0, chain = 0, fds[2], later = 0;
        memset(&w, 0, sizeof w);
        assert_int_equal(pipe(fds), 0);
        w.fd = fds[0];
        q.loop = l;
        q.count = &chain;
        if (how == 1)
            assert_int_equal(crpc_loop_start(l), CRPC_OK);
        if (how == 2)
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(crpc_loop_post(l, tick, &count), CRPC_OK);
        assert_int_equal(crpc_loop_post(l, post_more, &q), CRPC_OK);
        assert_int_equal(crpc_timer_start(l, 100000, 0, tick, &later, &far), CRPC_OK);
        assert_int_equal(crpc_timer_start(l, 100000, 5, tick, &later, &period), CRPC_OK);
        assert_int_equal(crpc_loop_watch(l, fds[0], CRPC_READABLE, on_watch, &w, &w.id), CRPC_OK);
        crpc_loop_close(l);
        assert_int_equal(count, 1);
        assert_int_equal(chain, 5);
        assert_int_equal(later, 0);
        assert_int_equal(w.count, 0);
        close(fds[0]);
        close(fds[1]);
    }
}

/* --- hooks -------------------------------------------------------------------------------------
 */

typedef struct hooked {
    int lines, level, allocations;
    char line[600];
    void *user;
} hooked;

static void *hooked_resize(void *user, void *ptr, size_t old_size, size_t new_size)
{
    hooked *h = (hooked *)user;
    (void)old_size;
    __atomic_add_fetch(&h->allocations, 1, __ATOMIC_SEQ_CST);
    if (new_size)
        return realloc(ptr, new_size);
    free(ptr);
    return NULL;
}

static void hooked_log(void *user, int level, const char *line)
{
    hooked *h = (hooked *)user;
    h->lines++;
    h->level = level;
    snprintf(h->line, sizeof h->line, "%s", line);
}

static void hooks_are_used(void **state)
{
    static const struct {
        int level, lines;
    } levels[] = {{0, 1}, {CRPC_LOG_ERROR, 0}, {CRPC_LOG_DEBUG, 1}, {-1, 0}};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof levels / sizeof *levels; i++) {
        hooked h;
        crpc_loop_options o;
        crpc_server_options so;
        crpc_server *s;
        crpc_loop *l;
        char url[160];
        int fd;
        memset(&h, 0, sizeof h);
        memset(&o, 0, sizeof o);
        memset(&so, 0, sizeof so);
        o.hooks.user = &h;
        o.hooks.resize = hooked_resize;
        o.hooks.log = hooked_log;
        o.hooks.log_level = levels[i].level;
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        assert_true(h.allocations > 0);
        so.loop = l;
        so.listen = "tcp://127.0.0.1:0";
        assert_int_equal(crpc_server_open(&s, &so, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        fd = wire_connect(url);
        assert_true(wire_send(fd, "rubbish", 7));
        while (stats_of(l).bad_frames == 0)
            assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
        close(fd);
        assert_int_equal(h.lines, levels[i].lines);
        if (h.lines) {
            assert_int_equal(h.level, CRPC_LOG_WARN);
            assert_non_null(strstr(h.line, "does not speak a protocol that is served here"));
            assert_null(strchr(h.line, '\n'));
        }
        crpc_server_close(s);
        crpc_loop_close(l);
    }
}

static int loop_scenario(const crpc_hooks *hooks, void *user)
{
    crpc_poller p = *(crpc_poller *)user;
    crpc_loop_options o;
    crpc_loop *l;
    crpc_id id;
    watcher w;
    int fds[40][2], i, count = 0, status;
    memset(&o, 0, sizeof o);
    memset(&w, 0, sizeof w);
    o.hooks = *hooks;
    o.poller = p;
    status = crpc_loop_open(&l, &o);
    if (status)
        return status;
    for (i = 0; i < 40; i++) {
        assert_int_equal(pipe(fds[i]), 0);
        if (!status)
            status = crpc_loop_watch(l, fds[i][0], CRPC_READABLE, on_watch, &w, &id);
    }
    status = status ? status : crpc_timer_start(l, 0, 0, tick, &count, &id);
    status = status ? status : crpc_loop_post(l, tick, &count);
    for (i = 0; i < 3; i++)
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    if (!status)
        assert_int_equal(count, 2);
    crpc_loop_close(l);
    for (i = 0; i < 40; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    return status;
}

static void loops_survive_being_out_of_memory(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p) assert_true(ct_sweep(loop_scenario, &p) > 10);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_says_what_runs),
        CT_TEST(steps_wait_as_long_as_they_are_told),
        CT_TEST(one_thread_drives_at_a_time),
        CT_TEST(stopping_is_remembered_once),
        CT_TEST(a_loop_can_be_started_again),
        CT_TEST(a_signal_handler_may_stop_it),
        CT_TEST(its_own_thread),
        CT_TEST(posts_run_in_order_and_never_nested),
        CT_TEST(other_threads_wake_it),
        CT_TEST(timers_are_never_early),
        CT_TEST(periodic_timers_repeat_until_stopped),
        CT_TEST(a_timer_stopped_by_another_does_not_run),
        CT_TEST(bad_timers_and_watches_are_refused),
        CT_TEST(ids_keep_their_kind),
        CT_TEST(timers_follow_the_given_clock),
        CT_TEST(only_the_given_clock_counts),
        CT_TEST(watches_are_level_triggered_and_change),
        CT_TEST(the_end_of_a_peer_is_readable_and_writable),
        CT_TEST(a_watch_ended_by_another_does_not_run),
        CT_TEST(descriptor_numbers_are_reused),
        CT_TEST(many_descriptors_all_get_their_turn),
        CT_TEST(changes_reach_a_sleeping_loop),
        CT_TEST(a_foreign_loop_drives_it_in_one_thread),
        CT_TEST(another_threads_timer_wakes_a_foreign_loop),
        CT_TEST(a_wait_looks_at_the_clock),
        CT_TEST(the_timeout_is_that_of_the_next_timer),
        CT_TEST(another_thread_wakes_a_foreign_loop),
        CT_TEST(closing_runs_what_is_due_once),
        CT_TEST(hooks_are_used),
        CT_TEST(loops_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
