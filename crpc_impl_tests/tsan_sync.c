/* Threads that call over one loop and drive it in turns: replies that overtake their requests,
 * deadlines that pass while a thread is asked to drive, callers that leave, are cancelled, or lose
 * their channel.
 */
/* crpc-test-flags: -DCRPC_ENABLE_ZOOKEEPER=0 -Wl,--wrap=send,--wrap=sendmsg,--wrap=recv */
/* crpc-test-flags: -Wl,--wrap=pthread_mutex_unlock */
/* crpc-test-mutants: P4_HANDOVER */
/* crpc-test-timeout: 600 */
#include "tsan.h"

/* --- a reply that is there before send returns ----------------------------------------------- */

static ts_peer *early_peer;
static uint64_t early_taken; /* replies that somebody else had read when send returned */

TS_UNSEEN void early_after_send(int fd)
{
    int unread = 1, patience = 20;
    ts_peer_serve(early_peer);
    if (ts_dice(8))
        return;
    while (patience-- && ioctl(fd, FIONREAD, &unread) == 0 && unread)
        syscall(SYS_sched_yield);
    if (!unread)
        TS_ADD(&early_taken, 1);
}

static void early_caller(ts_thread *t)
{
    crpc_call call = CRPC_INIT;
    crpc_channel *ch = (crpc_channel *)t->scenario;
    while (ts_take())
        ts_call(t, ch, t->seq % 64 ? TS_ECHO : TS_TWICE, &call, 0);
    crpc_call_reset(&call);
}

static void early_reply(crpc_poller poller)
{
    int64_t calls = ts_calls() / 2;
    crpc_channel *ch[2];
    int i;
    ts_begin("a reply before send returns", calls);
    early_peer = ts_peer_open(false);
    early_taken = 0;
    ts_after_send = early_after_send;
    for (i = 0; i < 2; i++)
        ch[i] = ts_channel(ts_loop(i, poller), early_peer->url, 0);
    for (i = 0; i < 2; i++)
        ts_start(4, early_caller, ch[i]);
    ts_join(0, 8);
    for (i = 0; i < 2; i++) {
        crpc_channel_close(ch[i]);
        ts_loop_close(i);
    }
    ts_after_send = NULL;
    ts_peer_close(early_peer);
    ts_end(calls);
    printf("%llu replies were read before their send returned\n", (unsigned long long)early_taken);
    TS_CHECK(early_taken > (uint64_t)calls / 2000);
}

static void a_reply_before_send_returns_epoll(void **state)
{
    (void)state;
    early_reply(CRPC_POLLER_EPOLL);
}

static void a_reply_before_send_returns_poll(void **state)
{
    (void)state;
    early_reply(CRPC_POLLER_POLL);
}

/* --- promotion and expiry at the same moment -------------------------------------------------- */

/* Deadlines lie on a grid of half a millisecond that all threads share, so that drivers leave, and
 * followers give up, together. */
static void promotion_caller(ts_thread *t)
{
    crpc_call call = CRPC_INIT;
    crpc_channel *ch = (crpc_channel *)t->scenario;
    crpc_loop *l = crpc_channel_loop(ch);
    while (ts_take()) {
        call.deadline_us = (crpc_loop_now_us(l) / 500 + 1 + ts_below(t, 2)) * 500;
        ts_call(t, ch, ts_below(t, 3) ? TS_ECHO : TS_SILENT, &call, TS_MAY_TIME_OUT);
    }
    crpc_call_reset(&call);
}

static void promotion(crpc_poller poller)
{
    int64_t calls = ts_calls() / 2;
    ts_peer *p = ts_peer_open(true);
    crpc_loop_stats stats[4];
    crpc_channel *ch[4];
    uint64_t promotions = 0;
    ts_thread sum;
    int i;
    ts_begin("promotion and expiry", calls);
    p->delay_us = 300;
    ts_peer_start(p);
    for (i = 0; i < 4; i++)
        ch[i] = ts_channel(ts_loop(i, poller), p->url, 0);
    for (i = 0; i < 4; i++)
        ts_start(6, promotion_caller, ch[i]);
    ts_join(0, 24);
    for (i = 0; i < 4; i++) {
        crpc_loop_stats_get(ts_loops[i], &stats[i]);
        promotions += stats[i].promotions;
        crpc_channel_close(ch[i]);
        ts_loop_close(i);
    }
    ts_peer_close(p);
    sum = ts_end(calls);
    printf("%llu promotions\n", (unsigned long long)promotions);
    TS_CHECK(promotions > sum.calls / 50);
    TS_CHECK(sum.timeouts > sum.calls / 10);
    TS_CHECK(sum.ok > sum.calls / 50);
}

static void promotion_and_expiry_epoll(void **state)
{
    (void)state;
    promotion(CRPC_POLLER_EPOLL);
}

static void promotion_and_expiry_poll(void **state)
{
    (void)state;
    promotion(CRPC_POLLER_POLL);
}

/* --- random deadlines ------------------------------------------------------------------------ */

static void deadline_caller(ts_thread *t)
{
    crpc_call call = CRPC_INIT;
    crpc_channel *ch = (crpc_channel *)t->scenario;
    crpc_loop *l = crpc_channel_loop(ch);
    while (ts_take()) {
        int64_t before = crpc_loop_now_us(l);
        /* one in eight has time enough for a reply, also on a machine that is busy */
        call.deadline_us = before + ts_below(t, 201) * (ts_below(t, 8) ? 1 : 50);
        if (ts_call(t, ch, TS_ECHO, &call, TS_MAY_TIME_OUT) == CRPC_ETIMEDOUT)
            TS_CHECK(crpc_loop_now_us(l) >= call.deadline_us); /* never early */
    }
    crpc_call_reset(&call);
}

static void deadlines(crpc_poller poller)
{
    int64_t calls = ts_calls() / 2;
    ts_peer *p = ts_peer_open(true);
    crpc_channel *ch[2];
    crpc_loop_stats stats;
    ts_thread sum;
    int i;
    ts_begin("deadlines of 0 to 200 us", calls);
    ts_peer_start(p);
    for (i = 0; i < 2; i++)
        ch[i] = ts_channel(ts_loop(i, poller), p->url, 0);
    for (i = 0; i < 2; i++)
        ts_start(8, deadline_caller, ch[i]);
    ts_join(0, 16);
    for (i = 0; i < 2; i++) {
        crpc_loop_stats_get(ts_loops[i], &stats);
        TS_CHECK(stats.pending == 0);
        crpc_channel_close(ch[i]);
        ts_loop_close(i);
    }
    ts_peer_close(p);
    sum = ts_end(calls);
    TS_CHECK(sum.timeouts > sum.calls / 50);
    TS_CHECK(sum.ok > sum.calls / 200);
}

static void random_deadlines_epoll(void **state)
{
    (void)state;
    deadlines(CRPC_POLLER_EPOLL);
}

static void random_deadlines_poll(void **state)
{
    (void)state;
    deadlines(CRPC_POLLER_POLL);
}

/* --- one leaves, is cancelled, closes the channel ----------------------------------------------
 */

typedef struct leaving {
    crpc_loop *loop;
    ts_peer *peer;
    crpc_channel *shared;
    /* from the one who waits to the one who cancels */
    uint64_t id;        /* 0: none */
    uint32_t cancelled; /* 1: it was */
    /* from the two who call to the one who closes */
    crpc_channel *victim;
    uint32_t round;         /* how many channels were opened */
    uint32_t closed;        /* how many were closed */
    uint64_t victim_seq[2]; /* of the calls; 0: ended */
    int victim_index[2];
    uint32_t victims_over;
    uint64_t cancels, closes, leaves;
} leaving;

static void leaving_caller(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    crpc_call call = CRPC_INIT;
    while (ts_take())
        ts_call(t, s->shared, TS_ECHO, &call, 0);
    crpc_call_reset(&call);
}

/* Calls and gives up soon: as the driver it hands over, as a follower it leaves the queue. */
static void leaving_leaver(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    crpc_call call = CRPC_INIT;
    while (ts_take()) {
        call.deadline_us = crpc_loop_now_us(s->loop) + ts_below(t, 300);
        ts_call(t, s->shared, TS_SILENT, &call, TS_MAY_TIME_OUT);
        s->leaves++;
    }
    crpc_call_reset(&call);
}

/* Waits for a call by id that somebody else cancels. */
static void leaving_waiter(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    while (ts_take()) {
        ts_number in = {0, TS_SILENT}, out;
        crpc_id id;
        int err;
        in.seq = ts_seq(t);
        TS_CHECK(crpc_channel_begin(s->shared, ts_methods, &in, &id, NULL) == CRPC_OK);
        TS_SET(&t->doing, "crpc_channel_wait");
        TS_GIVE(&s->id, id.value);
        err = crpc_channel_wait(s->shared, id, -1);
        TS_CHECK(err == CRPC_ENOTFOUND);
        TS_CHECK(crpc_channel_fetch(s->shared, ts_methods, id, &out, NULL) == CRPC_ENOTFOUND);
        TS_SET(&t->doing, "handing over");
        while (!TS_TAKE(&s->cancelled))
            sched_yield();
        TS_GIVE(&s->cancelled, 0);
        ts_account(t, CRPC_ECANCELED, NULL, TS_MAY_CANCEL);
    }
}

static void leaving_canceller(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    TS_SET(&t->doing, "cancelling");
    while (!TS_GET(&ts_over)) {
        crpc_id id;
        id.value = TS_TAKE(&s->id);
        if (!id.value) {
            sched_yield();
            continue;
        }
        TS_SET(&s->id, 0);
        if (ts_below(t, 4))
            usleep(ts_below(t, 100));
        TS_CHECK(crpc_channel_cancel(s->shared, id) == CRPC_OK);
        TS_CHECK(crpc_channel_cancel(s->shared, id) == CRPC_ENOTFOUND);
        s->cancels++;
        TS_GIVE(&s->cancelled, 1);
    }
}

/* One of two that call on a channel which somebody else closes meanwhile. */
static void leaving_victim_call(ts_thread *t, leaving *s, int which, crpc_channel *ch)
{
    crpc_call call = CRPC_INIT;
    TS_SET(&s->victim_seq[which], (uint64_t)(t->index + 1) << 40 | (t->seq + 1));
    TS_CHECK(ts_call(t, ch, TS_SILENT, &call, TS_MAY_CANCEL) == CRPC_ECANCELED);
    crpc_call_reset(&call);
    TS_GIVE(&s->victim_seq[which], 0);
    TS_SET(&t->doing, "handing over");
}

static void leaving_victim(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    uint32_t round = 0;
    TS_SET(&s->victim_index[0], t->index);
    while (ts_take()) {
        bool private_loop = ts_below(t, 3) == 0;
        crpc_channel *ch =
            ts_channel(private_loop ? NULL : s->loop, s->peer->url, (int)ts_below(t, 2));
        s->victim = ch;
        TS_GIVE(&s->round, ++round);
        leaving_victim_call(t, s, 0, ch);
        while (TS_TAKE(&s->closed) != round)
            sched_yield();
    }
    TS_GIVE(&s->victims_over, 1);
}

static void leaving_second_victim(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    uint32_t round = 0;
    TS_SET(&s->victim_index[1], t->index);
    while (!TS_TAKE(&s->victims_over)) {
        if (TS_TAKE(&s->round) != round) {
            round++;
            leaving_victim_call(t, s, 1, s->victim);
            while (TS_TAKE(&s->closed) != round)
                sched_yield();
        }
        sched_yield();
    }
}

static void leaving_closer(ts_thread *t)
{
    leaving *s = (leaving *)t->scenario;
    uint32_t round = 0;
    TS_SET(&t->doing, "closing");
    while (!TS_GET(&ts_over)) {
        int i;
        if (TS_TAKE(&s->round) == round) {
            sched_yield();
            continue;
        }
        round++;
        for (i = 0; i < 2; i++) {
            uint64_t seq;
            while (!(seq = TS_TAKE(&s->victim_seq[i])) ||
                   TS_TAKE(&s->peer->silent[TS_GET(&s->victim_index[i])]) != seq)
                sched_yield();
        }
        if (ts_below(t, 4) == 0)
            usleep(ts_below(t, 100));
        crpc_channel_close(s->victim);
        for (i = 0; i < 2; i++) {
            while (TS_TAKE(&s->victim_seq[i]))
                sched_yield();
        }
        s->closes++;
        TS_GIVE(&s->closed, round);
    }
}

static void leaving_run(crpc_poller poller, bool owned)
{
    int64_t calls = ts_calls() / 4;
    leaving s;
    ts_thread sum;
    memset(&s, 0, sizeof s);
    ts_begin(owned ? "leave, cancel, close beside a loop's thread" : "leave, cancel, close", calls);
    s.peer = ts_peer_open(true);
    ts_peer_start(s.peer);
    s.loop = ts_loop(0, poller);
    s.shared = ts_channel(s.loop, s.peer->url, 0);
    if (owned)
        TS_CHECK(crpc_loop_start(s.loop) == CRPC_OK);
    ts_start(12, leaving_caller, &s);
    ts_start(1, leaving_leaver, &s);
    ts_start(1, leaving_waiter, &s);
    ts_start(1, leaving_victim, &s);
    ts_start(1, leaving_second_victim, &s);
    ts_start(1, leaving_canceller, &s);
    ts_start(1, leaving_closer, &s);
    ts_join(0, 16);
    TS_SET(&ts_over, 1);
    ts_join(16, 2);
    crpc_channel_close(s.shared);
    ts_loop_close(0);
    ts_peer_close(s.peer);
    sum = ts_end(calls);
    printf("%llu left, %llu cancelled, %llu closed\n", (unsigned long long)s.leaves,
           (unsigned long long)s.cancels, (unsigned long long)s.closes);
    TS_CHECK(sum.canceled == s.cancels + 2 * s.closes);
    TS_CHECK(s.leaves > 10 && s.cancels > 10 && s.closes > 10);
}

static void one_leaves_is_cancelled_closes_epoll(void **state)
{
    (void)state;
    leaving_run(CRPC_POLLER_EPOLL, false);
    leaving_run(CRPC_POLLER_EPOLL, true);
}

static void one_leaves_is_cancelled_closes_poll(void **state)
{
    (void)state;
    leaving_run(CRPC_POLLER_POLL, false);
    leaving_run(CRPC_POLLER_POLL, true);
}

/* --- what is begun gets sent, though nobody drives ----------------------------------------------
 */

typedef struct beginning {
    ts_peer *peer;
    crpc_loop *loop;
} beginning;

/* Calls and rests, so that most of the time nobody drives. */
static void beginning_caller(ts_thread *t)
{
    beginning *s = (beginning *)t->scenario;
    crpc_channel *ch = ts_channel(s->loop, s->peer->url, t->index);
    crpc_call call = CRPC_INIT;
    while (!TS_GET(&ts_over)) {
        ts_call(t, ch, TS_ECHO, &call, 0);
        if (ts_below(t, 4) == 0)
            usleep(ts_below(t, 300));
    }
    crpc_call_reset(&call);
    crpc_channel_close(ch);
}

static void beginning_one(ts_thread *t)
{
    beginning *s = (beginning *)t->scenario;
    crpc_channel *ch = ts_channel(s->loop, s->peer->url, t->index);
    crpc_call call = CRPC_INIT;
    ts_call(t, ch, TS_ECHO, &call, 0); /* connects */
    while (ts_take()) {
        ts_number in = {0, TS_SILENT};
        int64_t until = ct_now_ms() + (getenv("CRPC_TEST_MUTANT") ? 3000 : 20000);
        crpc_id id;
        in.seq = ts_seq(t);
        TS_CHECK(crpc_channel_begin(ch, ts_methods, &in, &id, NULL) == CRPC_OK);
        TS_SET(&t->doing, "begun");
        while (TS_TAKE(&s->peer->silent[t->index]) != in.seq) {
            if (ct_now_ms() > until)
                ts_bad("thread %d: a request was begun, but not sent", t->index);
            sched_yield();
        }
        TS_CHECK(crpc_channel_cancel(ch, id) == CRPC_OK);
        ts_account(t, CRPC_ECANCELED, NULL, TS_MAY_CANCEL);
    }
    crpc_call_reset(&call);
    crpc_channel_close(ch);
}

static void beginning_run(crpc_poller poller)
{
    int64_t calls = ts_calls() / 20;
    beginning s;
    ts_begin("begun requests are sent", calls);
    s.peer = ts_peer_open(true);
    ts_peer_start(s.peer);
    s.loop = ts_loop(0, poller);
    ts_start(3, beginning_one, &s);
    ts_start(3, beginning_caller, &s);
    ts_join(0, 3);
    TS_SET(&ts_over, 1);
    ts_join(3, 3);
    ts_loop_close(0);
    ts_peer_close(s.peer);
    ts_end(calls);
}

static void begun_requests_are_sent_epoll(void **state)
{
    (void)state;
    beginning_run(CRPC_POLLER_EPOLL);
}

static void begun_requests_are_sent_poll(void **state)
{
    (void)state;
    beginning_run(CRPC_POLLER_POLL);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_reply_before_send_returns_epoll),
        CT_TEST(a_reply_before_send_returns_poll),
        CT_TEST(promotion_and_expiry_epoll),
        CT_TEST(promotion_and_expiry_poll),
        CT_TEST(random_deadlines_epoll),
        CT_TEST(random_deadlines_poll),
        CT_TEST(one_leaves_is_cancelled_closes_epoll),
        CT_TEST(one_leaves_is_cancelled_closes_poll),
        CT_TEST(begun_requests_are_sent_epoll),
        CT_TEST(begun_requests_are_sent_poll),
    };
    return CT_RUN(tests);
}
