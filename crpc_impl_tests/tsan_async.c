/* Asynchronous calls: callbacks, ids that are polled, waited for, fetched and cancelled, one-way
 * calls, all ending exactly once; and a server with I/O threads, workers and deferred replies.
 */
/* crpc-test-flags: -DCRPC_ENABLE_ZOOKEEPER=0 -Wl,--wrap=send,--wrap=sendmsg,--wrap=recv */
/* crpc-test-flags: -Wl,--wrap=pthread_mutex_unlock */
/* crpc-test-timeout: 600 */
#include "tsan.h"

#define ASYNC_THREADS 8
#define ASYNC_SLOTS   32

/* One call under way. */
typedef struct async_slot {
    enum { ASYNC_FREE, ASYNC_CALLBACK, ASYNC_ID } kind;
    uint64_t seq;
    uint32_t fired; /* callbacks that ran */
    uint32_t done;
    int status;
    crpc_id id;
} async_slot;

typedef struct async_post {
    uint64_t id; /* for the neighbour to cancel; 0: none */
} async_post;

typedef struct async {
    crpc_loop *loop;
    crpc_channel *ch;
    const char *url;
    async_post post[ASYNC_THREADS];
    uint64_t own_cancels, other_cancels, one_way, closed, callbacks;
} async;

static void async_done(const crpc_done *d)
{
    async_slot *s = (async_slot *)d->user;
    if (TS_ADD(&s->fired, 1) != 0)
        ts_bad("a callback ran twice, seq %llx", (unsigned long long)s->seq);
    TS_CHECK(d->call != NULL && d->call->error.code == d->status);
    TS_CHECK(!d->response == (d->status != CRPC_OK));
    if (d->response && ((const ts_number *)d->response)->seq != s->seq)
        ts_bad("reply %llx to request %llx",
               (unsigned long long)((const ts_number *)d->response)->seq,
               (unsigned long long)s->seq);
    s->status = d->status;
    TS_GIVE(&s->done, 1);
}

static void async_begin(ts_thread *t, crpc_channel *ch, async_slot *s, bool by_id, uint32_t how,
                        int timeout_ms)
{
    crpc_call call = CRPC_INIT;
    ts_number in;
    call.policy.timeout_ms = timeout_ms;
    in.seq = s->seq = ts_seq(t);
    in.how = how;
    s->fired = s->done = 0;
    TS_SET(&t->doing, by_id ? "crpc_channel_begin" : "crpc_channel_call_async");
    if (by_id)
        TS_CHECK(crpc_channel_begin(ch, ts_methods, &in, &s->id, &call) == CRPC_OK);
    else
        TS_CHECK(crpc_channel_call_async(ch, ts_methods, &in, async_done, NULL, s, &call) ==
                 CRPC_OK);
    s->kind = by_id ? ASYNC_ID : ASYNC_CALLBACK;
}

/* True if the call has ended. */
static bool async_look(ts_thread *t, async *a, async_slot *s, unsigned may)
{
    ts_number out;
    int err;
    if (s->kind == ASYNC_CALLBACK) {
        if (!TS_TAKE(&s->done))
            return false;
        TS_CHECK(TS_GET(&s->fired) == 1);
        ts_account(t, s->status, NULL, may);
        TS_ADD(&a->callbacks, 1);
        s->kind = ASYNC_FREE;
        return true;
    }
    switch (ts_below(t, 8)) {
    case 0:
        TS_SET(&t->doing, "crpc_channel_cancel");
        err = crpc_channel_cancel(a->ch, s->id);
        TS_CHECK(err == CRPC_OK || err == CRPC_ENOTFOUND); /* the neighbour was quicker */
        if (err == CRPC_OK)
            TS_ADD(&a->own_cancels, 1);
        ts_account(t, CRPC_ECANCELED, NULL, may);
        s->kind = ASYNC_FREE;
        return true;
    case 1:
    case 2:
        err = crpc_channel_poll(a->ch, s->id);
        TS_CHECK(err == CRPC_OK || err == CRPC_EPENDING || err == CRPC_ENOTFOUND);
        return false;
    case 3:
        TS_SET(&t->doing, "crpc_channel_wait");
        err = crpc_channel_wait(a->ch, s->id, (int)ts_below(t, 2));
        TS_CHECK(err == CRPC_OK || err == CRPC_EPENDING || err == CRPC_ENOTFOUND);
        return false;
    case 4: /* for the neighbour to cancel, if it comes to it */
        TS_GIVE(&a->post[t->index % ASYNC_THREADS].id, s->id.value);
        return false;
    default:
        memset(&out, 0, sizeof out);
        TS_SET(&t->doing, "crpc_channel_fetch");
        err = crpc_channel_fetch(a->ch, ts_methods, s->id, &out, NULL);
        if (err == CRPC_EPENDING)
            return false;
        TS_CHECK(err != CRPC_OK || out.seq == s->seq);
        ts_account(t, err == CRPC_ENOTFOUND ? CRPC_ECANCELED : err, NULL, may);
        s->kind = ASYNC_FREE;
        return true;
    }
}

/* A channel of its own, closed while its calls are under way: each callback tells so, once. */
static void async_close(ts_thread *t, async *a)
{
    bool private_loop = ts_below(t, 4) == 0;
    crpc_channel *ch = ts_channel(private_loop ? NULL : a->loop, a->url, 0);
    async_slot slots[4];
    int i;
    memset(slots, 0, sizeof slots);
    for (i = 0; i < 4; i++)
        async_begin(t, ch, &slots[i], i == 3, TS_SILENT, TS_LONG_MS);
    if (ts_below(t, 2))
        usleep(ts_below(t, 100));
    TS_SET(&t->doing, "crpc_channel_close");
    crpc_channel_close(ch);
    TS_SET(&t->doing, "callbacks after a close");
    for (i = 0; i < 3; i++) {
        if (private_loop)
            TS_CHECK(TS_TAKE(&slots[i].done));
        while (!TS_TAKE(&slots[i].done))
            sched_yield();
        TS_CHECK(slots[i].status == CRPC_ECANCELED && TS_GET(&slots[i].fired) == 1);
    }
    TS_ADD(&a->closed, 1);
    TS_ADD(&ts_steps, 1);
}

static void async_caller(ts_thread *t)
{
    async *a = (async *)t->scenario;
    async_slot slots[ASYNC_SLOTS];
    crpc_call call = CRPC_INIT;
    bool more = true;
    int busy = 0, idle = 0;
    memset(slots, 0, sizeof slots);
    while (more || busy) {
        async_slot *s = &slots[ts_below(t, ASYNC_SLOTS)];
        crpc_id other;
        if (s->kind != ASYNC_FREE) {
            if (async_look(t, a, s, TS_MAY_TIME_OUT | TS_MAY_CANCEL)) {
                busy--;
                idle = 0;
            } else if (++idle % 64 == 0) {
                TS_SET(&t->doing, "waiting");
                usleep(50);
            }
            continue;
        }
        if (!more || !(more = ts_take()))
            continue;
        other.value =
            __atomic_exchange_n(&a->post[(t->index + 1) % ASYNC_THREADS].id, 0, __ATOMIC_ACQUIRE);
        if (other.value && crpc_channel_cancel(a->ch, other) == CRPC_OK)
            TS_ADD(&a->other_cancels, 1);
        switch (ts_below(t, 512)) {
        case 0:
            async_close(t, a);
            /* fall through */
        case 1:
        case 2:
        case 3:
        case 4:
        case 5:
            ts_call(t, a->ch, TS_ECHO, &call, 0);
            break;
        default: {
            bool silent = ts_below(t, 16) == 0;
            async_begin(t, a->ch, s, ts_below(t, 2), silent ? TS_SILENT : TS_ECHO,
                        silent ? 1 + (int)ts_below(t, 3) : TS_LONG_MS);
            busy++;
            break;
        }
        }
        if (ts_below(t, 16) == 0) {
            ts_number in;
            in.seq = ts_seq(t);
            in.how = TS_ECHO;
            TS_CHECK(crpc_channel_notify(a->ch, ts_methods, &in, NULL) == CRPC_OK);
            TS_ADD(&a->one_way, 1);
        }
    }
    crpc_call_reset(&call);
}

static void async_runner(ts_thread *t)
{
    async *a = (async *)t->scenario;
    TS_SET(&t->doing, "crpc_loop_run");
    TS_CHECK(crpc_loop_run(a->loop) == CRPC_OK);
}

static void async_runs(void *user)
{
    TS_GIVE((uint32_t *)user, 1);
}

static void async_run(crpc_poller poller, bool own_thread)
{
    int64_t calls = ts_calls() / 4;
    crpc_loop_stats stats;
    ts_thread sum;
    ts_peer *p;
    async a;
    memset(&a, 0, sizeof a);
    ts_begin(own_thread ? "callbacks and ids, the loop's own thread" : "callbacks and ids", calls);
    p = ts_peer_open(true);
    ts_peer_start(p);
    a.loop = ts_loop(0, poller);
    a.ch = ts_channel(a.loop, p->url, 0);
    a.url = p->url;
    if (!own_thread) { /* else the first asynchronous call starts one */
        uint32_t runs = 0;
        ts_start(1, async_runner, &a);
        TS_CHECK(crpc_loop_post(a.loop, async_runs, &runs) == CRPC_OK);
        while (!TS_TAKE(&runs))
            usleep(100);
    }
    ts_start(ASYNC_THREADS, async_caller, &a);
    ts_join(!own_thread, ASYNC_THREADS);
    if (!own_thread) {
        crpc_loop_stop(a.loop);
        ts_join(0, 1);
    }
    crpc_loop_stats_get(a.loop, &stats);
    TS_CHECK(stats.pending == 0);
    crpc_channel_close(a.ch);
    ts_loop_close(0);
    ts_peer_close(p);
    sum = ts_end(calls);
    printf("%llu callbacks, %llu + %llu cancelled, %llu one-way, %llu channels closed\n",
           (unsigned long long)a.callbacks, (unsigned long long)a.own_cancels,
           (unsigned long long)a.other_cancels, (unsigned long long)a.one_way,
           (unsigned long long)a.closed);
    TS_CHECK(a.own_cancels > 10 && a.other_cancels > 10 && a.closed > 2);
    TS_CHECK(sum.canceled == a.own_cancels + a.other_cancels);
    TS_CHECK(sum.timeouts > sum.calls / 100);
}

static void exactly_once_epoll(void **state)
{
    (void)state;
    async_run(CRPC_POLLER_EPOLL, true);
    async_run(CRPC_POLLER_EPOLL, false);
}

static void exactly_once_poll(void **state)
{
    (void)state;
    async_run(CRPC_POLLER_POLL, true);
    async_run(CRPC_POLLER_POLL, false);
}

/* --- the server's threads -----------------------------------------------------------------------
 */

#define SERVE_FINISHERS 2
#define SERVE_QUEUE     65536
#define SERVE_FULL      CRPCI_FAIRNESS_CONN_MAX /* requests of a connection; then it is not read */
#define SERVE_FLOOD     (SERVE_FULL + 10)

typedef struct serving {
    char url[128];
    crpc_loop *loops[4];
    crpc_channel *ch[4];
    /* requests whose handlers have returned CRPC_EPENDING */
    pthread_mutex_t lock;
    pthread_cond_t more;
    crpc_context *queue[SERVE_QUEUE];
    uint64_t seqs[SERVE_QUEUE];
    uint32_t head, tail;
    bool over, hold;
    int flooder;
    uint64_t flooded; /* the flooder's requests that have come to a handler */
    uint64_t served, deferred, floods, refused;
} serving;

static serving *serve_present;

static int serve_handler(crpc_context *x, const ts_number *in, ts_number *out)
{
    serving *s = serve_present;
    TS_ADD(&s->served, 1);
    if ((int)(in->seq >> 40) == TS_GET(&s->flooder))
        TS_ADD(&s->flooded, 1);
    out->seq = in->seq;
    if (in->how == TS_FAIL)
        return crpc_context_fail(x, 20001, "asked to fail");
    if (in->how != TS_DEFER)
        return CRPC_OK;
    pthread_mutex_lock(&s->lock);
    TS_CHECK(s->tail - s->head < SERVE_QUEUE);
    s->seqs[s->tail % SERVE_QUEUE] = in->seq;
    s->queue[s->tail++ % SERVE_QUEUE] = x;
    pthread_cond_signal(&s->more);
    pthread_mutex_unlock(&s->lock);
    return CRPC_EPENDING; /* it may be finished, and gone, by now */
}

static void serve_finisher(ts_thread *t)
{
    serving *s = (serving *)t->scenario;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        crpc_context *x;
        uint64_t seq;
        int err;
        while ((s->head == s->tail || s->hold) && !s->over)
            pthread_cond_wait(&s->more, &s->lock);
        if (s->head == s->tail)
            break;
        seq = s->seqs[s->head % SERVE_QUEUE];
        x = s->queue[s->head++ % SERVE_QUEUE];
        pthread_mutex_unlock(&s->lock);
        TS_CHECK(((ts_number *)crpc_context_response(x))->seq == seq);
        err = crpc_context_finish(x, CRPC_OK);
        TS_CHECK(err == CRPC_OK || err == CRPC_EGONE);
        TS_ADD(&s->deferred, 1);
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
}

static void serve_caller(ts_thread *t)
{
    serving *s = (serving *)t->scenario;
    crpc_call call = CRPC_INIT;
    while (ts_take()) {
        uint32_t d = ts_below(t, 16);
        uint32_t how = d < 6 ? TS_DEFER : d == 6 ? TS_FAIL : TS_ECHO;
        int err = ts_call(t, s->ch[t->index % 4], how, &call, TS_MAY_FAIL);
        TS_CHECK((err == CRPC_EAPP) == (how == TS_FAIL));
        TS_CHECK(err == CRPC_OK || (call.error.app_code == 20001 && call.error.remote));
    }
    crpc_call_reset(&call);
}

typedef struct serve_flood {
    ts_thread *thread;
    crpc_channel *ch;
    async_slot *slots;
} serve_flood;

static void serve_last_of_flood(void *user)
{
    serve_flood *f = (serve_flood *)user;
    int i;
    for (i = SERVE_FULL - 6; i < SERVE_FLOOD; i++)
        async_begin(f->thread, f->ch, &f->slots[i], false, TS_DEFER, TS_LONG_MS);
}

static void serve_hold(serving *s, bool hold)
{
    pthread_mutex_lock(&s->lock);
    s->hold = hold;
    pthread_cond_broadcast(&s->more);
    pthread_mutex_unlock(&s->lock);
}

/* Fills a connection until the server stops reading it, with further requests already read; the
 * first replies, which other threads make, must set it going again. */
static void serve_flooder(ts_thread *t)
{
    serving *s = (serving *)t->scenario;
    serve_flood f;
    crpc_loop *l = ts_loop(4, CRPC_POLLER_DEFAULT);
    int i;
    f.thread = t;
    f.ch = ts_channel(l, s->url, 0);
    f.slots = (async_slot *)calloc(SERVE_FLOOD, sizeof *f.slots);
    TS_SET(&s->flooder, t->index + 1);
    do {
        uint64_t before = TS_GET(&s->flooded);
        memset(f.slots, 0, SERVE_FLOOD * sizeof *f.slots);
        serve_hold(s, true);
        for (i = 0; i < SERVE_FULL - 6; i++)
            async_begin(t, f.ch, &f.slots[i], false, TS_DEFER, TS_LONG_MS);
        TS_SET(&t->doing, "flooding");
        while (TS_GET(&s->flooded) < before + SERVE_FULL - 6)
            usleep(100);
        TS_CHECK(crpc_loop_post(l, serve_last_of_flood, &f) == CRPC_OK); /* in one send */
        while (TS_GET(&s->flooded) < before + SERVE_FULL)
            usleep(100);
        usleep(2000);
        serve_hold(s, false);
        TS_SET(&t->doing, "replies to a flood");
        for (i = 0; i < SERVE_FLOOD; i++) {
            while (!TS_TAKE(&f.slots[i].done))
                usleep(100);
            TS_CHECK(TS_GET(&f.slots[i].fired) == 1);
            ts_account(t, f.slots[i].status, NULL, 0);
        }
        TS_ADD(&s->floods, 1);
        usleep(200000);
    } while (TS_ADD(&ts_budget, -SERVE_FLOOD) > SERVE_FLOOD);
    crpc_channel_close(f.ch);
    ts_loop_close(4);
    free(f.slots);
}

/* Goes on while the server is closed, until it is told that there is none. */
static void serve_last(ts_thread *t)
{
    serving *s = (serving *)t->scenario;
    crpc_call call = CRPC_INIT;
    int err;
    do {
        ts_number in, out;
        in.seq = ts_seq(t);
        in.how = ts_below(t, 2) ? TS_DEFER : TS_ECHO;
        memset(&out, 0, sizeof out);
        call.policy.retries = -1;
        call.policy.timeout_ms = 20000;
        err = crpc_channel_call(s->ch[t->index % 4], &ts_methods[0], &in, &out, &call);
        TS_CHECK(err == CRPC_OK || err == CRPC_ECONN || err == CRPC_ELOGOFF);
        TS_CHECK(err != CRPC_OK || out.seq == in.seq);
        TS_ADD(&ts_steps, 1);
    } while (!err);
    TS_ADD(&s->refused, 1);
    crpc_call_reset(&call);
}

static void serve_run(crpc_poller poller, int workers)
{
    int64_t calls = ts_calls() / 4;
    serving *s = (serving *)calloc(1, sizeof *s);
    crpc_server_options o;
    crpc_server *server;
    crpc_error error;
    ts_thread sum;
    int i;
    ts_begin(workers ? "io_threads=2, workers=2, deferred replies"
                     : "io_threads=2, no workers, deferred replies",
             calls);
    serve_present = s;
    ts_handler = serve_handler;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->more, NULL);
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops.poller = poller;
    o.loops.hooks = ct_hooks();
    o.loops.hooks.log_level = -1;
    o.io_threads = 2;
    o.workers = workers;
    o.worker_queue = -1;
    if (crpc_server_open(&server, &o, &error) != CRPC_OK)
        ts_bad("crpc_server_open: %s", error.text);
    TS_CHECK(crpc_server_add(server, &ts_service, NULL, NULL) == CRPC_OK);
    TS_CHECK(crpc_server_start(server, &error) == CRPC_OK);
    TS_CHECK(crpc_loop_start(crpc_server_loop(server)) == CRPC_OK);
    TS_CHECK(crpc_server_address(server, 0, s->url, sizeof s->url) == CRPC_OK);
    for (i = 0; i < 4; i++) {
        s->loops[i] = ts_loop(i, poller);
        s->ch[i] = ts_channel(s->loops[i], s->url, 0);
    }
    ts_start(SERVE_FINISHERS, serve_finisher, s);
    ts_start(1, serve_flooder, s);
    while (TS_GET(&s->floods) == 0) /* the first one while nothing else keeps the loops awake */
        usleep(1000);
    ts_start(8, serve_caller, s);
    ts_join(SERVE_FINISHERS, 9);
    ts_start(8, serve_last, s);
    usleep(5000);
    crpc_server_close(server);
    ts_join(SERVE_FINISHERS + 9, 8);
    pthread_mutex_lock(&s->lock);
    s->over = true;
    pthread_cond_broadcast(&s->more);
    pthread_mutex_unlock(&s->lock);
    ts_join(0, SERVE_FINISHERS);
    for (i = 0; i < 4; i++) {
        crpc_channel_close(s->ch[i]);
        ts_loop_close(i);
    }
    sum = ts_end(calls);
    printf("%llu requests served, %llu of them later, %llu floods\n", (unsigned long long)s->served,
           (unsigned long long)s->deferred, (unsigned long long)s->floods);
    TS_CHECK(s->served >= sum.calls && s->deferred > sum.calls / 10 && s->refused == 8);
    TS_CHECK(sum.app > sum.calls / 2000);
    pthread_cond_destroy(&s->more);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static void server_threads_epoll(void **state)
{
    (void)state;
    serve_run(CRPC_POLLER_EPOLL, 2);
    serve_run(CRPC_POLLER_EPOLL, 0);
}

static void server_threads_poll(void **state)
{
    (void)state;
    serve_run(CRPC_POLLER_POLL, 2);
    serve_run(CRPC_POLLER_POLL, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(exactly_once_epoll),
        CT_TEST(exactly_once_poll),
        CT_TEST(server_threads_epoll),
        CT_TEST(server_threads_poll),
    };
    return CT_RUN(tests);
}
