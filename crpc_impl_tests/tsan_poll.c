/* What a loop waits for changes while it waits: interest in descriptors, timers, posts, and sends
 * that block on one thread while another sleeps in the poller. With poll a change needs a kick,
 * because poll works on a copy; with epoll it takes effect by itself.
 */
/* crpc-test-flags: -DCRPC_ENABLE_ZOOKEEPER=0 -Wl,--wrap=send,--wrap=sendmsg,--wrap=recv */
/* crpc-test-flags: -Wl,--wrap=pthread_mutex_unlock */
/* crpc-test-mutants: P6_KICK */
/* crpc-test-timeout: 600 */
#include "tsan.h"

#define POLL_BIG (96 << 10)

typedef struct polling {
    crpc_loop *loop;
    crpc_channel *ch;
    uint32_t rest; /* 1 << POLL_X: those pause, so that they do not keep the loop awake */
    uint64_t changes, timers, posts, big;
} polling;

enum { POLL_CHANGES, POLL_TIMERS, POLL_POSTS };

/* Pauses if this kind shall. False at the end. */
static bool poll_go_on(polling *s, int kind)
{
    while (TS_GET(&s->rest) & 1u << kind && !TS_GET(&ts_over))
        usleep(1000);
    return !TS_GET(&ts_over);
}

/* Lets only one kind go on, and waits until it has, `n` times. */
static void poll_only(polling *s, int kind, const uint64_t *count, uint64_t n)
{
    uint64_t from;
    TS_SET(&s->rest, ~(1u << kind));
    usleep(20000);
    for (from = TS_GET(count); TS_GET(count) < from + n;)
        usleep(1000);
}

/* Spins, then sleeps, until *flag is set: by a callback that nothing else would bring about. */
static void poll_await(ts_thread *t, uint32_t *flag, const char *what)
{
    int64_t until = ct_now_ms() + (getenv("CRPC_TEST_MUTANT") ? 3000 : 20000);
    int spins = 0;
    TS_SET(&t->doing, what);
    while (!TS_TAKE(flag)) {
        if (++spins < 100)
            sched_yield();
        else
            usleep(20);
        if (ct_now_ms() > until)
            ts_bad("thread %d: nothing came of it: %s", t->index, what);
    }
    *flag = 0;
    TS_ADD(&ts_steps, 1);
}

/* A large attachment now and then: it fills the socket, so that OUT is armed and disarmed. */
static void poll_caller(ts_thread *t)
{
    static uint8_t bytes[POLL_BIG];
    polling *s = (polling *)t->scenario;
    crpc_call call = CRPC_INIT;
    while (ts_take()) {
        bool big = ts_below(t, 64) == 0;
        call.attachment = crpc_view_of(big ? bytes : NULL, sizeof bytes);
        if (big)
            TS_ADD(&s->big, 1);
        ts_call(t, s->ch, TS_ECHO, &call, 0);
    }
    crpc_call_reset(&call);
}

typedef struct poll_watch {
    crpc_loop *loop;
    crpc_id id;
    unsigned wanted;
    uint32_t fired;
} poll_watch;

static void poll_on_event(void *user, int fd, unsigned events)
{
    poll_watch *w = (poll_watch *)user;
    (void)fd;
    if (!(events & TS_GET(&w->wanted)))
        ts_bad("events %u, wanted %u", events, w->wanted);
    TS_CHECK(crpc_loop_rewatch(w->loop, w->id, 0) == CRPC_OK);
    TS_GIVE(&w->fired, 1);
}

/* The descriptor is always ready: as soon as it is asked for, the callback must come. */
static void poll_watcher(ts_thread *t)
{
    polling *s = (polling *)t->scenario;
    poll_watch w;
    int fds[2];
    TS_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    TS_CHECK(write(fds[1], "x", 1) == 1);
    memset(&w, 0, sizeof w);
    w.loop = s->loop;
    while (poll_go_on(s, POLL_CHANGES)) {
        int rounds = 32;
        TS_CHECK(crpc_loop_watch(s->loop, fds[0], 0, poll_on_event, &w, &w.id) == CRPC_OK);
        while (rounds--) {
            unsigned wanted = 1 + ts_below(t, 3);
            TS_SET(&w.wanted, wanted);
            TS_CHECK(crpc_loop_rewatch(s->loop, w.id, wanted) == CRPC_OK);
            poll_await(t, &w.fired, "interest changed");
            TS_ADD(&s->changes, 1);
            if (ts_below(t, 4) == 0)
                usleep(ts_below(t, 200)); /* the loop falls asleep */
        }
        crpc_loop_unwatch(s->loop, w.id);
        TS_CHECK(crpc_loop_rewatch(s->loop, w.id, 1) == CRPC_ENOTFOUND);
    }
    close(fds[0]);
    close(fds[1]);
}

static void poll_on_timer(void *user)
{
    TS_GIVE((uint32_t *)user, 1);
}

static void poll_timer(ts_thread *t)
{
    polling *s = (polling *)t->scenario;
    uint32_t fired = 0, never = 0;
    while (poll_go_on(s, POLL_TIMERS)) {
        int64_t ms = ts_below(t, 3), begin = crpc_loop_now_us(s->loop);
        crpc_id id, far;
        TS_CHECK(crpc_timer_start(s->loop, 3600000, 0, poll_on_timer, &never, &far) == CRPC_OK);
        TS_CHECK(crpc_timer_start(s->loop, ms, 0, poll_on_timer, &fired, &id) == CRPC_OK);
        poll_await(t, &fired, "timer started");
        TS_CHECK(crpc_loop_now_us(s->loop) >= begin + ms * 1000);
        crpc_timer_stop(s->loop, far);
        crpc_timer_stop(s->loop, id); /* stale by now */
        TS_ADD(&s->timers, 1);
    }
    TS_CHECK(TS_GET(&never) == 0);
}

static void poll_poster(ts_thread *t)
{
    polling *s = (polling *)t->scenario;
    uint32_t ran = 0;
    while (poll_go_on(s, POLL_POSTS)) {
        TS_CHECK(crpc_loop_post(s->loop, poll_on_timer, &ran) == CRPC_OK);
        poll_await(t, &ran, "posted");
        TS_ADD(&s->posts, 1);
        if (ts_below(t, 4) == 0)
            usleep(ts_below(t, 200));
    }
}

/* With the loop's own thread: callers follow, the others change what it waits for. */
static void poll_owned(crpc_poller poller)
{
    int64_t calls = ts_calls() / 4;
    polling s;
    ts_peer *p;
    memset(&s, 0, sizeof s);
    ts_begin("interest changes beside a loop's thread", calls);
    p = ts_peer_open(true);
    p->slow = 1;
    ts_peer_start(p);
    s.loop = ts_loop(0, poller);
    s.ch = ts_channel(s.loop, p->url, 0);
    TS_CHECK(crpc_loop_start(s.loop) == CRPC_OK);
    ts_start(6, poll_caller, &s);
    ts_start(3, poll_watcher, &s);
    ts_start(1, poll_timer, &s);
    ts_start(1, poll_poster, &s);
    ts_join(0, 6);
    /* and now nothing else keeps the loop awake */
    poll_only(&s, POLL_CHANGES, &s.changes, 2000);
    poll_only(&s, POLL_TIMERS, &s.timers, 100);
    poll_only(&s, POLL_POSTS, &s.posts, 1000);
    TS_SET(&ts_over, 1);
    ts_join(6, 5);
    crpc_channel_close(s.ch);
    ts_loop_close(0);
    ts_peer_close(p);
    ts_end(calls);
    printf("%llu changes of interest, %llu timers, %llu posts, %llu large requests\n",
           (unsigned long long)s.changes, (unsigned long long)s.timers, (unsigned long long)s.posts,
           (unsigned long long)s.big);
}

/* Without: one caller sleeps in the poller when another one's send blocks. */
static void poll_passive(crpc_poller poller)
{
    int64_t calls = ts_calls() / 4;
    polling s[2];
    ts_peer *p;
    int i;
    memset(s, 0, sizeof s);
    ts_begin("interest changes under callers", calls);
    p = ts_peer_open(true);
    p->slow = 1;
    ts_peer_start(p);
    for (i = 0; i < 2; i++) {
        s[i].loop = ts_loop(i, poller);
        s[i].ch = ts_channel(s[i].loop, p->url, 0);
        ts_start(5, poll_caller, &s[i]);
    }
    ts_join(0, 10);
    for (i = 0; i < 2; i++) {
        crpc_channel_close(s[i].ch);
        ts_loop_close(i);
    }
    ts_peer_close(p);
    ts_end(calls);
    printf("%llu large requests\n", (unsigned long long)(s[0].big + s[1].big));
}

static void interest_changes_poll(void **state)
{
    (void)state;
    poll_passive(CRPC_POLLER_POLL);
    poll_owned(CRPC_POLLER_POLL);
}

static void interest_changes_epoll(void **state)
{
    (void)state;
    poll_passive(CRPC_POLLER_EPOLL);
    poll_owned(CRPC_POLLER_EPOLL);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(interest_changes_poll),
        CT_TEST(interest_changes_epoll),
    };
    return CT_RUN(tests);
}
