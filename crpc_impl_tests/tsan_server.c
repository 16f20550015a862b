/* Requests that are limited, wait for their turn, or have come before, from several connections on
 * several I/O threads, with and without workers, finished by handlers and by a thread of the
 * program's. Their peers are judged by a function that calls crpc. At the end the server stops and
 * closes with some of them in service.
 */
/* crpc-test-flags: -DCRPC_ENABLE_ZOOKEEPER=0 */
/* crpc-test-timeout: 600 */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 280
#include "crpc_test.h"
#include "crpc_net.h"

#define CALLERS 4
#define CALLS 400
#define KEYS 3

typedef struct scenario {
    net n;
    uint32_t over, closed, asked;
    int inside[KEYS]; /* not guarded by a lock: their key's order does that */
    uint64_t seed;
} scenario;

static scenario *now;

static int keyed_add(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_begin(x, in->n);
    if (in->ms > 0)
        now->inside[in->ms - 1]++;
    out->n = in->n + 1;
    return CRPC_OK;
}

/* The connection closes while the program's thread may be finishing the request. */
static void on_cancel(crpc_context *x, void *user)
{
    assert_ptr_equal(user, now);
    assert_true(crpc_context_cancelled(x));
}

static int cancelled_defer(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    assert_int_equal(crpc_context_on_cancel(x, on_cancel, now), CRPC_OK);
    return net_defer(x, in, out);
}

/* Accepts all under the name that they give, and takes its time now and then. */
static int judge(void *user, const char *from, crpc_view credential, crpc_identity *identity)
{
    scenario *s = (scenario *)user;
    uint32_t n = __atomic_fetch_add(&s->asked, 1, __ATOMIC_RELAXED);
    crpc_loop_stats stats;
    (void)from;
    if (n % 4 == 0 && !crpci_thread_load(&s->over))
        crpc_server_stats_get(s->n.server, &stats);
    if (n % 16 == 0)
        ct_sleep_ms(1);
    crpc_view_copy(credential, identity->name, sizeof identity->name);
    return CRPC_OK;
}

typedef struct caller {
    scenario *s;
    int index, good;
    pthread_t thread;
} caller;

/* Each call is sent twice with the same id: both end alike. */
static void *call_much(void *arg)
{
    caller *c = (caller *)arg;
    crpc_channel *ch = net_channel(c->s->n.url, "?timeout_ms=20000&retries=-1",
                                   CRPC_POLLER_DEFAULT, NULL, NULL);
    uint64_t seed = c->s->seed * 977 + (uint64_t)c->index;
    int i;
    for (i = 0; i < CALLS; i++) {
        dyn_Num in = net_num(i), out[2] = {dyn_Num_init_zero, dyn_Num_init_zero};
        crpc_field fields[2] = {{"crpc-rid", NULL}, {"crpc-key", NULL}};
        char rid[32], key[8];
        crpc_call call = CRPC_INIT;
        int k = i / 4 % (KEYS + 1), round, status[2]; /* callers that share an id send the same */
        snprintf(rid, sizeof rid, "%d", (int)(ct_random_from(&seed) % 3 ? i : c->index * CALLS + i));
        snprintf(key, sizeof key, "%d", k);
        fields[0].value = rid;
        fields[1].value = key;
        call.fields = fields;
        call.field_count = k < KEYS ? 2 : 1;
        call.credential = crpc_view_str(key); /* a key keeps an order for one identity only */
        in.ms = k < KEYS ? k + 1 : 0;
        for (round = 0; round < 2; round++)
            status[round] = i % 4 ? dyn_Echo_Add(ch, &in, &out[round], &call)
                                  : dyn_Echo_Defer(ch, &in, &out[round], &call);
        crpc_call_reset(&call);
        if (!status[0] && !status[1]) {
            assert_int_equal(out[0].n, i + 1);
            assert_int_equal(out[1].n, i + 1);
            c->good++;
        } else if (crpci_thread_load(&c->s->over)) {
            break;
        } else {
            assert_true(status[0] == CRPC_ELIMIT || status[1] == CRPC_ELIMIT);
        }
    }
    crpc_channel_close(ch);
    return NULL;
}

/* Finishes, when the server closes, the requests that it held when it stopped; others may wait. */
static void *finish_all(void *arg)
{
    scenario *s = (scenario *)arg;
    while (!crpci_thread_load(&s->closed) || net_held(&s->n.service)) {
        bool pause = crpci_thread_load(&s->over) && !crpci_thread_load(&s->closed);
        crpc_context *x = pause ? NULL : net_take(&s->n.service);
        if (x)
            (void)crpc_context_finish(x, CRPC_OK);
        else
            ct_sleep_ms(1);
    }
    return NULL;
}

static void run(int io_threads, int workers, bool early)
{
    static const crpc_method_limit limits[] = {{NULL, dyn_Echo_Defer_method, 3, 1, 0, 0},
                                               {NULL, NULL, 0, 1, 1000000, 0}};
    static dyn_Echo_handlers handlers;
    static scenario s;
    crpc_server_options *o = &s.n.server_options;
    crpc_loop_stats stats;
    caller callers[CALLERS];
    pthread_t finisher;
    int i, good = 0;
    memset(&s, 0, sizeof s);
    handlers = net_handlers;
    handlers.Add = keyed_add;
    handlers.Defer = cancelled_defer;
    now = &s;
    s.seed = ct_seed();
    net_service_init(&s.n.service);
    s.n.loop = net_loop(CRPC_POLLER_DEFAULT);
    o->loop = s.n.loop;
    o->loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o->listen = "tcp://127.0.0.1:0";
    o->io_threads = io_threads;
    o->workers = workers;
    o->method_limits = limits;
    o->method_limit_count = 2;
    o->rate_per_client = 1000000;
    o->replay_entries = 5000;
    o->access.authenticate = judge;
    o->access.authenticate_user = &s;
    o->ordered = 1;
    o->lame_ms = 20;
    o->drain_ms = early ? 20 : 2000;
    assert_int_equal(crpc_server_open(&s.n.server, o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s.n.server, &dyn_Echo, &handlers, &s.n.service), CRPC_OK);
    assert_int_equal(crpc_server_start(s.n.server, NULL), CRPC_OK);
    assert_int_equal(crpc_server_address(s.n.server, 0, s.n.url, sizeof s.n.url), CRPC_OK);
    assert_int_equal(crpc_loop_start(s.n.loop), CRPC_OK);
    assert_int_equal(pthread_create(&finisher, NULL, finish_all, &s), 0);
    for (i = 0; i < CALLERS; i++) {
        callers[i].s = &s;
        callers[i].index = i;
        callers[i].good = 0;
        assert_int_equal(pthread_create(&callers[i].thread, NULL, call_much, &callers[i]), 0);
    }
    for (i = 0; i < CALLERS && !early; i++)
        pthread_join(callers[i].thread, NULL);
    if (early)
        assert_true(CT_WAIT(net_calls(&s.n.service) > 100, NET_PATIENCE));
    crpc_server_stats_get(s.n.server, &stats);
    assert_true(stats.replayed > 0);
    assert_true(crpci_thread_load(&s.asked) > 0);
    crpci_thread_store(&s.over, 1);
    crpc_server_close(s.n.server);
    crpci_thread_store(&s.closed, 1);
    for (i = 0; i < CALLERS && early; i++)
        pthread_join(callers[i].thread, NULL);
    pthread_join(finisher, NULL);
    for (i = 0; i < CALLERS; i++)
        good += callers[i].good;
    assert_true(good > 20);
    crpc_loop_close(s.n.loop);
    pthread_mutex_destroy(&s.n.service.lock);
}

static void io_threads_share_the_guard(void **state)
{
    (void)state;
    run(2, 0, false);
    run(2, 0, true);
}

static void workers_share_the_guard(void **state)
{
    (void)state;
    run(0, 3, false);
    run(0, 3, true);
}

static void both_share_the_guard(void **state)
{
    (void)state;
    run(2, 3, false);
    run(2, 3, true);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(io_threads_share_the_guard),
        CT_TEST(workers_share_the_guard),
        CT_TEST(both_share_the_guard),
    };
    return CT_RUN(tests);
}
