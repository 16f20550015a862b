/* impl-drive: who drives a loop, who waits, owners, foreign loops, closing. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"
#include "crpc_loop.h"

static void stop_loop(void *user)
{
    crpc_loop_stop((crpc_loop *)user);
}

/* --- who drives ------------------------------------------------------------------------------- */

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

static void use_chunks(crpc_loop *l, int count)
{
    crpci_chunk *c[40];
    int i;
    for (i = 0; i < count; i++) {
        c[i] = crpci_heap_chunk(l->heap, 60000);
        assert_non_null(c[i]);
    }
    while (i--)
        crpci_heap_chunk_unref(c[i]);
}

static void an_idle_loop_gives_memory_back_and_sleeps(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop_options o = net_loop_options(p);
        crpc_loop *l;
        int i;
        net_time_begin(NET_TIME_STANDS);
        o.hooks.clock_us = net_clock_us;
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        use_chunks(l, 2);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(crpc_loop_timeout(l), -1); /* what little is kept does not wake it */
        use_chunks(l, 40);
        for (i = 0; i < 5; i++) { /* while it works the memory stays */
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            net_time_add(CRPCI_DRIVE_AGE / 1000 + 1);
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            use_chunks(l, 40);
            assert_int_equal(l->heap->kept_bytes, 40 * 65536);
        }
        for (i = 0; i < 2; i++) {
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            assert_in_range(crpc_loop_timeout(l), 0, CRPCI_DRIVE_AGE / 1000 + 1);
            net_time_add(CRPCI_DRIVE_AGE / 1000 + 1);
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        }
        assert_int_equal(l->heap->kept_bytes, CRPCI_HEAP_KEEP);
        assert_int_equal(crpc_loop_timeout(l), -1);
        crpc_loop_close(l);
    }
}

/* A channel, and what a callback of its loop does with it. */
typedef struct late_call {
    crpc_channel *channel;
    done_log done;
    int timeout_ms, go;
    int64_t before_us, deadline_us;
} late_call;

/* A script: answers one request when *user is set. */
static bool peer_waits(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)number;
    if (peer_receive(p, fd, &m) != 1 ||
        !CT_WAIT(__atomic_load_n((int *)p->user, __ATOMIC_SEQ_CST), NET_PATIENCE))
        return true;
    wire_reply(&w, m.id, m.n + 1);
    wire_done(&m);
    wire_flush(fd, &w);
    return peer_silent(p, fd, number);
}

/* The program computes until the reply has long come and the deadline of its call has passed. */
static void compute_past_the_deadline(void *user)
{
    crpc_channel *ch = ((late_call *)user)->channel;
    struct pollfd wait = {0, POLLIN, 0};
    __atomic_store_n(&((late_call *)user)->go, 1, __ATOMIC_SEQ_CST);
    crpci_loop_lock(ch->loop);
    wait.fd = CRPCI_CONTAINER(ch->loop->conns.next, crpci_conn, link)->fd;
    crpci_loop_unlock(ch->loop);
    assert_int_equal(poll(&wait, 1, NET_PATIENCE), 1);
    net_time_add(500);
}

/* What a callback posts runs at the end of the step, behind the events. */
static void compute_after_the_events(void *user)
{
    assert_int_equal(
        crpc_loop_post(((late_call *)user)->channel->loop, compute_past_the_deadline, user),
        CRPC_OK);
}

static void a_reply_that_came_in_time_is_in_time(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop_options o = net_loop_options(p);
        late_call late;
        crpc_loop *l;
        peer waits;
        crpc_call call = CRPC_INIT;
        dyn_Num in = net_num(1);
        int i;
        net_time_begin(NET_TIME_STANDS);
        o.hooks.clock_us = net_clock_us;
        memset(&late, 0, sizeof late);
        peer_open(&waits, peer_waits, &late.go);
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        late.channel = net_channel(waits.url, NULL, p, l, NULL);
        done_init(&late.done);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        call.policy.timeout_ms = 300;
        assert_int_equal(dyn_Echo_Add_async(late.channel, &in, done_num, &late.done, &call),
                         CRPC_OK);
        while (crpc_loop_step(l, 1) == CRPC_OK && !peer_requests(&waits)) {
        }
        assert_int_equal(crpc_loop_post(l, compute_after_the_events, &late), CRPC_OK);
        for (i = 0; i < 5; i++)
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(done_count(&late.done), 1);
        assert_int_equal(late.done.status, CRPC_OK);
        crpc_channel_close(late.channel);
        crpc_loop_close(l);
        peer_close(&waits);
    }
}

/* Computes for a part of the coarse clock's step, then calls. */
static void compute_and_call(void *user)
{
    late_call *c = (late_call *)user;
    crpc_loop *l = c->channel->loop;
    crpc_call call = CRPC_INIT;
    dyn_Num in = net_num(1);
    int64_t until = crpc_loop_now_us(l) + 1500;
    while (crpc_loop_now_us(l) < until) {
    }
    call.policy.timeout_ms = c->timeout_ms;
    c->before_us = crpc_loop_now_us(l);
    assert_int_equal(dyn_Echo_Add_async(c->channel, &in, done_num, &c->done, &call), CRPC_OK);
    crpci_loop_lock(l);
    c->deadline_us = CRPCI_CONTAINER(c->channel->calls.next, crpci_pending_call, of_channel)
                         ->attempt.deadline_us;
    crpci_loop_unlock(l);
}

static void a_short_deadline_counts_from_the_call(void **state)
{
    late_call c;
    peer silent;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    memset(&c, 0, sizeof c);
    c.channel = net_channel(silent.url, NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 20; i++) { /* the coarse clock must not step in all of them */
        c.timeout_ms = i & 1 ? 2 : 50;
        done_init(&c.done);
        assert_int_equal(crpc_loop_post(c.channel->loop, compute_and_call, &c), CRPC_OK);
        while (!done_count(&c.done))
            assert_int_equal(crpc_loop_step(c.channel->loop, 10), CRPC_OK);
        assert_true(c.deadline_us >= c.before_us + c.timeout_ms * 1000);
    }
    crpc_channel_close(c.channel);
    peer_close(&silent);
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
        /* ended by the timer, not by the second stop */
        assert_int_equal(crpc_loop_run(l), CRPC_OK);
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
            do { /* the stopped thread may not have ended yet */
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
    alarm(ct_test_seconds());
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

/* --- inside another loop ---------------------------------------------------------------------- */

static int foreign_done;

static void on_foreign(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    (void)user, (void)call;
    assert_int_equal(status, CRPC_OK);
    assert_true(response->n > 0);
    foreign_done++;
}

/* One turn of a program's own loop: asks, polls, steps. */
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
        foreign_turn(l, 0); /* from now on the loop counts as driven: calls start no thread */
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

        /* idle: when the calls' timers are gone, the loop gives no timeout */
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
        /* a post makes a descriptor readable */
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

/* By how much the loop's time may lag behind: it reads the coarse clock where some milliseconds do
 * not matter, and a busy machine may delay that clock's tick. */
static int coarse_ms(void)
{
    struct timespec ts;
    assert_int_equal(clock_getres(CLOCK_MONOTONIC_COARSE, &ts), 0);
    return 3 * (int)(ts.tv_nsec / 1000000 + 1);
}

/* crpc_loop_timeout gives the time until the next timer. */
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
        assert_in_range(crpc_loop_timeout(l), 0, 81 + coarse_ms());
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
    ct_sleep_ms(100); /* by now the program is in poll() */
    assert_int_equal(crpc_timer_start(l, 50, 0, on_late, NULL, NULL), CRPC_OK);
    return NULL;
}

/* A synchronous caller has driven the loop and left. Then another thread sets a timer that is due
 * before the program's poll would end: the program must be woken. */
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
            foreign_turn(l, NET_PATIENCE); /* without a wake-up one turn lasts this long */
        pthread_join(t, NULL);
        assert_int_equal(late_fired, 1);
        assert_true(turns < 20);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&silent);
    }
}

/* The program asked for the timeout long ago and then waits for a call by id: the wait reads the
 * clock again. */
static void a_wait_reads_the_clock_again(void **state)
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

/* --- closing ---------------------------------------------------------------------------------- */

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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(steps_wait_as_long_as_they_are_told),
        CT_TEST(an_idle_loop_gives_memory_back_and_sleeps),
        CT_TEST(a_reply_that_came_in_time_is_in_time),
        CT_TEST(a_short_deadline_counts_from_the_call),
        CT_TEST(one_thread_drives_at_a_time),
        CT_TEST(stopping_is_remembered_once),
        CT_TEST(a_loop_can_be_started_again),
        CT_TEST(a_signal_handler_may_stop_it),
        CT_TEST(its_own_thread),
        CT_TEST(a_foreign_loop_drives_it_in_one_thread),
        CT_TEST(the_timeout_is_that_of_the_next_timer),
        CT_TEST(another_threads_timer_wakes_a_foreign_loop),
        CT_TEST(a_wait_reads_the_clock_again),
        CT_TEST(another_thread_wakes_a_foreign_loop),
        CT_TEST(closing_runs_what_is_due_once),
    };
    return CT_RUN(tests);
}
