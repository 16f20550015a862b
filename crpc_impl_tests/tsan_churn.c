/* Everything comes and goes while 16 threads use it: connections, channels, loops and their
 * threads.
 */
/* crpc-test-flags: -DCRPC_ENABLE_ZOOKEEPER=0 -Wl,--wrap=send,--wrap=sendmsg,--wrap=recv */
/* crpc-test-flags: -Wl,--wrap=pthread_mutex_unlock */
/* crpc-test-mutants: P7_CLOSE */
/* crpc-test-timeout: 600 */
#include "tsan.h"

typedef struct churn {
    crpc_poller poller;
    crpc_loop *loop;
    ts_peer *peer;
    uint64_t channels, loops, starts, runs, stops, posts;
} churn;

/* The descriptor is in use, without the lock, for longer than usual. */
TS_UNSEEN void churn_dawdle(int fd)
{
    uint32_t d = ts_dice(512);
    (void)fd;
    if (d == 0)
        usleep(ts_dice(200));
    else if (d < 8)
        syscall(SYS_sched_yield);
}

/* Opens a channel on the common loop, calls, closes it. The peer drops connections all the time. */
static void churn_caller(ts_thread *t)
{
    churn *s = (churn *)t->scenario;
    crpc_call call = CRPC_INIT;
    bool more = true;
    while (more) {
        crpc_channel *ch = ts_channel(s->loop, s->peer->url, (int)ts_below(t, 3));
        uint32_t n = 1 + ts_below(t, 128);
        while (n-- && (more = ts_take()))
            ts_call(t, ch, TS_ECHO, &call, TS_MAY_LOSE);
        TS_SET(&t->doing, "crpc_channel_close");
        crpc_channel_close(ch);
        TS_ADD(&s->channels, 1);
    }
    crpc_call_reset(&call);
}

/* A loop of its own, with or without a thread, stopped or not before it is closed. */
static void churn_loops(ts_thread *t)
{
    churn *s = (churn *)t->scenario;
    crpc_call call = CRPC_INIT;
    bool more = true;
    while (more) {
        ct_alloc alloc = {0, 0, 0, 0, 0, 0, 0};
        crpc_loop *l = ts_loop_of(1 + t->index % 2, s->poller, &alloc);
        crpc_channel *ch = ts_channel(l, s->peer->url, 0);
        uint32_t n = ts_below(t, 64);
        bool started = ts_below(t, 3) > 0;
        if (started)
            TS_CHECK(crpc_loop_start(l) == CRPC_OK);
        while (n-- && (more = ts_take()))
            ts_call(t, ch, TS_ECHO, &call, TS_MAY_LOSE);
        if (started && ts_below(t, 2)) {
            crpc_loop_stop(l);
            if (ts_below(t, 2))
                usleep(ts_below(t, 200));
        }
        TS_SET(&t->doing, "closing a loop");
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        ts_loop_close(1 + t->index % 2);
        TS_CHECK(TS_GET(&alloc.live_blocks) == 0); /* its hooks are not used any more */
        TS_ADD(&s->loops, 1);
        more = more && TS_GET(&ts_budget) > 0;
    }
}

static void churn_starter(ts_thread *t)
{
    churn *s = (churn *)t->scenario;
    while (!TS_GET(&ts_over)) {
        int err;
        TS_SET(&t->doing, "crpc_loop_start");
        err = crpc_loop_start(s->loop);
        TS_CHECK(err == CRPC_OK || err == CRPC_EBUSY);
        if (!err)
            TS_ADD(&s->starts, 1);
        usleep(ts_below(t, 1500));
        if (ts_below(t, 2))
            continue;
        crpc_loop_stop(s->loop);
        TS_ADD(&s->stops, 1);
        usleep(ts_below(t, 1500));
    }
}

static void churn_runner(ts_thread *t)
{
    churn *s = (churn *)t->scenario;
    while (!TS_GET(&ts_over)) {
        int err;
        TS_SET(&t->doing, "crpc_loop_run");
        err = crpc_loop_run(s->loop);
        TS_CHECK(err == CRPC_OK || err == CRPC_EBUSY);
        if (!err)
            TS_ADD(&s->runs, 1);
        usleep(ts_below(t, 2000));
    }
}

static void churn_posted(void *user)
{
    TS_ADD((uint64_t *)user, 1);
}

static void churn_run(crpc_poller poller)
{
    int64_t calls = ts_calls() / 2;
    uint64_t posted = 0;
    ts_thread sum;
    churn s;
    memset(&s, 0, sizeof s);
    ts_begin("close, redial, start, stop", calls);
    s.poller = poller;
    s.peer = ts_peer_open(true);
    s.peer->drop_after = 300;
    ts_peer_start(s.peer);
    s.loop = ts_loop(0, poller);
    ts_before_send = ts_before_recv = churn_dawdle;
    ts_start(11, churn_caller, &s);
    ts_start(2, churn_loops, &s);
    ts_start(2, churn_starter, &s);
    ts_start(1, churn_runner, &s);
    while (TS_GET(&ts_budget) > 0) {
        TS_CHECK(crpc_loop_post(s.loop, churn_posted, &posted) == CRPC_OK);
        s.posts++;
        usleep(5000);
    }
    ts_join(0, 13);
    TS_SET(&ts_over, 1);
    ts_join(13, 2);
    while (strcmp(TS_GET(&ts_threads[15].doing), "done") != 0) {
        crpc_loop_stop(s.loop);
        usleep(1000);
    }
    ts_join(15, 1);
    ts_loop_close(0);
    ts_before_send = ts_before_recv = NULL;
    printf(
        "%llu connections dropped, %llu channels, %llu loops, %llu starts, %llu runs, %llu stops, "
        "%llu posts\n",
        (unsigned long long)s.peer->drops, (unsigned long long)s.channels,
        (unsigned long long)s.loops, (unsigned long long)s.starts, (unsigned long long)s.runs,
        (unsigned long long)s.stops, (unsigned long long)s.posts);
    TS_CHECK(TS_GET(&posted) == s.posts); /* each ran, once */
    TS_CHECK(s.peer->drops > 10 && s.channels > 10 && s.loops > 10);
    TS_CHECK(s.starts > 2 && s.runs > 2 && s.stops > 2);
    ts_peer_close(s.peer);
    sum = ts_end(calls);
    TS_CHECK(sum.ok > sum.calls / 2);
}

static void close_redial_start_stop_epoll(void **state)
{
    (void)state;
    churn_run(CRPC_POLLER_EPOLL);
}

static void close_redial_start_stop_poll(void **state)
{
    (void)state;
    churn_run(CRPC_POLLER_POLL);
}

/* --- an owner wants in while a caller drives
 * ------------------------------------------------------ */

typedef struct owning {
    crpc_loop *loop;
    ts_peer *peer;
    crpc_channel *ch;
    uint32_t round; /* the caller calls once in each */
    uint32_t ended;
} owning;

static void owning_caller(ts_thread *t)
{
    owning *s = (owning *)t->scenario;
    crpc_call call = CRPC_INIT;
    uint32_t round = 0;
    for (;;) {
        while (TS_TAKE(&s->round) == round && !TS_GET(&ts_over))
            sched_yield();
        if (TS_GET(&ts_over))
            break;
        round++;
        TS_CHECK(ts_call(t, s->ch, TS_SILENT, &call, TS_MAY_CANCEL) == CRPC_ECANCELED);
        TS_GIVE(&s->ended, round);
    }
    crpc_call_reset(&call);
}

/* The caller sleeps in the poller, and nothing but a kick can make it leave. */
static void owning_run(crpc_poller poller)
{
    int64_t until;
    uint64_t posted;
    owning s;
    uint32_t round;
    memset(&s, 0, sizeof s);
    ts_begin("an owner wants in", 0);
    s.peer = ts_peer_open(true);
    ts_peer_start(s.peer);
    s.loop = ts_loop(0, poller);
    ts_start(1, owning_caller, &s);
    for (round = 1; round <= 300; round++) {
        TS_SET(&posted, 0); /* atomic: the last round's thread may still be on its way out */
        s.ch = ts_channel(s.loop, s.peer->url, 0);
        TS_GIVE(&s.round, round);
        while (TS_TAKE(&s.peer->silent[0]) != ((uint64_t)1 << 40 | round))
            sched_yield();
        if (round % 2)
            usleep(ts_dice(500)); /* the caller falls asleep */
        if (round > 150) {        /* from here on the loop counts as stepped by the program */
            TS_CHECK(crpc_loop_step(s.loop, 0) == CRPC_OK);
        } else {
            int err;
            until = ct_now_ms() + 3000;
            while ((err = crpc_loop_start(s.loop)) == CRPC_EBUSY && ct_now_ms() < until)
                sched_yield(); /* the last round's thread has been told to stop, no more */
            TS_CHECK(err == CRPC_OK);
            TS_CHECK(crpc_loop_post(s.loop, churn_posted, &posted) == CRPC_OK);
            for (until = ct_now_ms() + 3000; !TS_GET(&posted);) {
                if (ct_now_ms() > until)
                    ts_bad("the owner did not get in");
                usleep(20);
            }
            crpc_loop_stop(s.loop);
        }
        crpc_channel_close(s.ch);
        while (TS_TAKE(&s.ended) != round)
            sched_yield();
    }
    TS_SET(&ts_over, 1);
    ts_join(0, 1);
    ts_loop_close(0);
    ts_peer_close(s.peer);
    ts_end(300);
}

static void an_owner_gets_in_epoll(void **state)
{
    (void)state;
    owning_run(CRPC_POLLER_EPOLL);
}

static void an_owner_gets_in_poll(void **state)
{
    (void)state;
    owning_run(CRPC_POLLER_POLL);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(close_redial_start_stop_epoll),
        CT_TEST(close_redial_start_stop_poll),
        CT_TEST(an_owner_gets_in_epoll),
        CT_TEST(an_owner_gets_in_poll),
    };
    return CT_RUN(tests);
}
