#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static crpci_endpoint *first_endpoint(crpc_loop *l)
{
    assert_false(crpci_list_empty(&l->endpoints));
    return CRPCI_CONTAINER(l->endpoints.next, crpci_endpoint, link);
}

static size_t count(const crpci_list *list)
{
    const crpci_list *i;
    size_t n = 0;
    for (i = list->next; i != list; i = i->next)
        n++;
    return n;
}

static void it_is_shared_by_channels_that_ask_for_the_same(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *a, *b, *c;
    crpc_loop *l;
    (void)state;
    lo.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&a, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_open(&b, "list://127.0.0.1:9,127.0.0.1:10", &o, NULL), CRPC_OK);
    assert_int_equal(count(&l->endpoints), 2);
    assert_int_equal(first_endpoint(l)->users, 2);
    assert_int_equal(crpc_channel_open(&c, "tcp://127.0.0.1:9?inflight=1", &o, NULL), CRPC_OK);
    assert_int_equal(count(&l->endpoints), 3);
    crpc_channel_close(a);
    assert_int_equal(count(&l->endpoints), 3);
    crpc_channel_close(b);
    assert_int_equal(count(&l->endpoints), 1);
    crpc_channel_close(c);
    assert_int_equal(count(&l->endpoints), 0);
    crpc_loop_close(l);
}

static int64_t fake_now;

static int64_t fake_clock(void *user)
{
    (void)user;
    return fake_now;
}

/* The window of the backoff doubles up to its limit, and the wait is anywhere in it. */
static void it_backs_off_with_full_jitter(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_endpoint *e;
    int64_t window = CRPCI_CHANNEL_BACKOFF_MIN;
    int failures, i;
    (void)state;
    lo.hooks = ct_hooks();
    lo.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    e = first_endpoint(l);
    for (failures = 0; failures < 12; failures++) {
        int64_t longest = 0, shortest = INT64_MAX;
        for (i = 0; i < 1000; i++) {
            int64_t wait;
            e->failures = failures;
            crpci_endpoint_back_off(e);
            assert_int_equal(e->failures, failures + 1);
            wait = e->usable_at - fake_now;
            assert_in_range(wait, 0, window - 1);
            longest = wait > longest ? wait : longest;
            shortest = wait < shortest ? wait : shortest;
        }
        assert_true(longest > window * 9 / 10);
        assert_true(shortest < window / 10);
        window = crpci_base_min64(window * 2, CRPCI_CHANNEL_BACKOFF_MAX);
    }
    crpc_channel_close(ch);
    crpc_loop_close(l);
}

static crpci_endpoint *pick(crpc_channel *ch, const crpci_call *c)
{
    crpci_node *n = crpci_channel_pick(ch, c);
    assert_non_null(n);
    return n->endpoint;
}

/* Round robin, each in turn; one that backs off is passed over while another is usable, and all
 * backing off, the one that is soonest usable is taken. */
static void it_is_picked_in_turn(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_call c;
    crpci_endpoint *e[3];
    size_t i;
    (void)state;
    memset(&c, 0, sizeof c);
    lo.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&ch, "list://127.0.0.1:9,127.0.0.1:10,127.0.0.1:11?lb=rr", &o,
                                       NULL),
                     CRPC_OK);
    for (i = 0; i < 3; i++)
        e[i] = pick(ch, &c);
    assert_ptr_not_equal(e[0], e[1]);
    assert_ptr_not_equal(e[1], e[2]);
    assert_ptr_not_equal(e[0], e[2]);
    for (i = 0; i < 30; i++)
        assert_ptr_equal(pick(ch, &c), e[i % 3]);
    e[1]->usable_at = INT64_MAX;
    for (i = 0; i < 30; i++)
        assert_ptr_not_equal(pick(ch, &c), e[1]);
    e[0]->usable_at = INT64_MAX - 1;
    e[2]->usable_at = INT64_MAX - 2;
    assert_ptr_equal(pick(ch, &c), e[2]);
    c.tried[0] = e[2];
    c.attempts = 1;
    assert_ptr_equal(pick(ch, &c), e[0]);
    c.tried[1] = e[0];
    c.tried[2] = e[1];
    c.attempts = 3;
    assert_null(crpci_channel_pick(ch, &c));
    crpc_channel_close(ch);
    crpc_loop_close(l);
}

/* --- several providers ------------------------------------------------------------------------ */

#define FLEET_MAX 6

typedef enum fleet_mood {
    FLEET_WELL,
    FLEET_SILENT, /* keeps the request */
    FLEET_BROKEN, /* CRPC_EINTERNAL */
    FLEET_REFUSES /* an application's error */
} fleet_mood;

typedef struct fleet_peer {
    net_service service; /* first: net_begin takes the user pointer for one */
    int mood;            /* atomic fleet_mood */
    int index;
    crpc_loop *loop;
    crpc_server *server;
    char address[CRPC_ADDRESS_MAX]; /* host:port */
} fleet_peer;

typedef struct fleet {
    int count;
    fleet_peer peers[FLEET_MAX];
    crpc_channel *channel;
} fleet;

static void fleet_mood_set(fleet_peer *p, fleet_mood mood)
{
    __atomic_store_n(&p->mood, mood, __ATOMIC_SEQ_CST);
}

/* Answers with its own index in ms. */
static int fleet_answer(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    fleet_peer *p = (fleet_peer *)crpc_context_user(x);
    switch (__atomic_load_n(&p->mood, __ATOMIC_SEQ_CST)) {
    case FLEET_SILENT:
        out->ms = p->index;
        return net_defer(x, in, out);
    case FLEET_BROKEN:
        net_begin(x, in->n);
        return CRPC_EINTERNAL;
    case FLEET_REFUSES:
        net_begin(x, in->n);
        return crpc_context_fail(x, 5007, "not today");
    default:
        net_begin(x, in->n);
        out->n = in->n + 1;
        out->ms = p->index;
        return CRPC_OK;
    }
}

static const dyn_Echo_handlers fleet_handlers = {fleet_answer, fleet_answer, net_pass,
                                                 fleet_answer, net_fail,     net_status,
                                                 net_meta,     net_add};

static void fleet_peer_open(fleet_peer *p, int index, const char *listen)
{
    crpc_server_options o = CRPC_INIT;
    char url[160];
    net_service_init(&p->service);
    p->index = index;
    p->loop = net_loop(CRPC_POLLER_DEFAULT);
    o.loop = p->loop;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = listen;
    assert_int_equal(crpc_server_open(&p->server, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(p->server, &dyn_Echo, &fleet_handlers, p), CRPC_OK);
    assert_int_equal(crpc_server_start(p->server, NULL), CRPC_OK);
    assert_int_equal(crpc_server_address(p->server, 0, url, sizeof url), CRPC_OK);
    assert_true(strlen(url) < sizeof p->address);
    memcpy(p->address, url + 6, strlen(url + 6) + 1);
    assert_int_equal(crpc_loop_start(p->loop), CRPC_OK);
}

static void fleet_release(fleet *f)
{
    crpc_context *x;
    int i;
    for (i = 0; i < f->count; i++) {
        while (f->peers[i].server && (x = net_take(&f->peers[i].service)) != NULL)
            crpc_context_finish(x, CRPC_OK);
    }
}

static void fleet_peer_close(fleet_peer *p)
{
    if (!p->server)
        return;
    crpc_server_close(p->server);
    crpc_loop_close(p->loop);
    pthread_mutex_destroy(&p->service.lock);
    p->server = NULL;
}

static void fleet_open(fleet *f, int count, const char *query, const crpc_channel_options *options)
{
    char url[512] = "list://";
    int i;
    memset(f, 0, sizeof *f);
    f->count = count;
    for (i = 0; i < count; i++) {
        fleet_peer_open(&f->peers[i], i, "tcp://127.0.0.1:0");
        strcat(url, i ? "," : "");
        strcat(url, f->peers[i].address);
    }
    f->channel = net_channel(url, query, CRPC_POLLER_DEFAULT, NULL, options);
}

/* Whether everything that was sent has been read, served and, where it was kept, let go. */
static bool fleet_is_quiet(fleet *f)
{
    crpc_loop_stats s;
    int i;
    fleet_release(f);
    for (i = 0; i < f->count; i++) {
        if (!f->peers[i].server)
            continue;
        crpc_server_stats_get(f->peers[i].server, &s);
        if (s.connections)
            return false;
    }
    return true;
}

static void fleet_close(fleet *f)
{
    int i;
    for (i = 0; i < f->count; i++)
        fleet_mood_set(&f->peers[i], FLEET_WELL);
    crpc_channel_close(f->channel);
    assert_true(CT_WAIT(fleet_is_quiet(f), NET_PATIENCE));
    for (i = 0; i < f->count; i++)
        fleet_peer_close(&f->peers[i]);
}

static int fleet_calls(fleet *f)
{
    int i, n = 0;
    for (i = 0; i < f->count; i++)
        n += net_calls(&f->peers[i].service);
    return n;
}

/* --- a call in each of its forms -------------------------------------------------------------- */

typedef enum fleet_form { FORM_SYNC, FORM_ASYNC, FORM_ID, FORMS } fleet_form;

typedef struct fleet_result {
    int status;
    dyn_Num out;
    crpc_error error;
    int done; /* atomic */
} fleet_result;

static void fleet_done(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    fleet_result *r = (fleet_result *)user;
    r->status = status;
    if (response)
        r->out = *response;
    r->error = call->error;
    __atomic_store_n(&r->done, 1, __ATOMIC_SEQ_CST);
}

/* Get is idempotent, Add is not. */
static fleet_result fleet_call(fleet *f, fleet_form form, bool idempotent, int64_t n,
                               const crpc_call *in)
{
    dyn_Num request = net_num(n);
    crpc_call call = CRPC_INIT;
    fleet_result r;
    crpc_id id;
    memset(&r, 0, sizeof r);
    if (in)
        call = *in;
    if (form == FORM_SYNC) {
        r.status = (idempotent ? dyn_Echo_Get : dyn_Echo_Add)(f->channel, &request, &r.out, &call);
        r.error = call.error;
    } else if (form == FORM_ASYNC) {
        assert_int_equal((idempotent ? dyn_Echo_Get_async
                                     : dyn_Echo_Add_async)(f->channel, &request, fleet_done, &r, in),
                         CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    } else {
        assert_int_equal((idempotent ? dyn_Echo_Get_begin : dyn_Echo_Add_begin)(f->channel, &request,
                                                                               &id, in),
                         CRPC_OK);
        assert_int_equal(crpc_channel_wait(f->channel, id, -1), CRPC_OK);
        r.status = (idempotent ? dyn_Echo_Get_fetch : dyn_Echo_Add_fetch)(f->channel, id, &r.out,
                                                                         &call);
        r.error = call.error;
    }
    assert_int_equal(r.error.code, r.status);
    crpc_call_reset(&call);
    return r;
}

static uint32_t fleet_pending(fleet *f)
{
    crpc_loop_stats s;
    crpc_loop_stats_get(crpc_channel_loop(f->channel), &s);
    return s.pending;
}

/* --- cluster policies ------------------------------------------------------------------------- */

static void forking_takes_the_first_success(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        int i;
        fleet_open(&f, 4, "?cluster=forking&forks=-1&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_BROKEN);
        fleet_mood_set(&f.peers[2], FLEET_REFUSES);
        for (i = 0; i < 4; i++) {
            r = fleet_call(&f, form, false, i, NULL);
            assert_int_equal(r.status, CRPC_OK);
            assert_int_equal(r.out.n, i + 1);
            assert_int_equal(r.out.ms, 3);
            assert_string_equal(r.error.endpoint, f.peers[3].address);
            assert_int_equal(fleet_pending(&f), 0);
        }
        assert_int_equal(net_calls(&f.peers[3].service), 4);
        fleet_close(&f);
        fleet_open(&f, 4, "?cluster=forking&timeout_ms=20000", NULL);
        for (i = 0; i < 10; i++)
            assert_int_equal(fleet_call(&f, form, false, i, NULL).status, CRPC_OK);
        assert_true(fleet_calls(&f) > 10); /* one that was not sent yet is withdrawn */
        assert_true(fleet_calls(&f) <= 20);
        fleet_close(&f);
    }
}

static void forking_fails_when_all_have_failed(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 3, "?cluster=forking&forks=-1&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        fleet_mood_set(&f.peers[1], FLEET_BROKEN);
        fleet_peer_close(&f.peers[2]);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_true(r.status == CRPC_EINTERNAL || r.status == CRPC_ECONN);
        assert_non_null(strstr(r.error.text, "dyn.Echo.Add"));
        assert_int_equal(net_calls(&f.peers[0].service), 1);
        assert_int_equal(net_calls(&f.peers[1].service), 1);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

static void forks_are_cancelled_with_their_call(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 3, "?cluster=forking&forks=2&timeout_ms=50", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        fleet_mood_set(&f.peers[2], FLEET_SILENT);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

/* Closed while forks are under way: the callback says so, and nothing is left. */
static void forks_end_with_their_channel(void **state)
{
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(1);
    crpc_id id;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?cluster=forking&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(f.channel, &request, &id, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 2 && net_held(&f.peers[1].service) == 2,
                        NET_PATIENCE));
    assert_int_equal(crpc_channel_cancel(f.channel, id), CRPC_OK);
    crpc_channel_close(f.channel);
    f.channel = NULL;
    assert_int_equal(r.done, 1);
    assert_int_equal(r.status, CRPC_ECANCELED);
    fleet_close(&f);
}

static void broadcast_reaches_everyone(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        crpc_call call = CRPC_INIT;
        crpc_policy policy = CRPC_INIT;
        int i;
        fleet_open(&f, 5, "?cluster=broadcast&timeout_ms=20000", NULL);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 2);
        fleet_mood_set(&f.peers[2], FLEET_REFUSES);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_EAPP); /* no failure is too many, unless that was said */
        assert_int_equal(r.error.app_code, 5007);
        policy.fail_percent = 20;
        call.policy = &policy;
        r = fleet_call(&f, form, false, 1, &call);
        assert_int_equal(r.status, CRPC_OK); /* one in five may fail */
        assert_int_equal(r.out.n, 2);
        fleet_mood_set(&f.peers[4], FLEET_BROKEN);
        r = fleet_call(&f, form, false, 1, &call);
        assert_int_not_equal(r.status, CRPC_OK);
        for (i = 0; i < 5; i++)
            assert_int_equal(net_calls(&f.peers[i].service), 4);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

static void failfast_tries_once_and_failover_goes_on(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        crpc_policy policy = CRPC_INIT;
        crpc_call call = CRPC_INIT;
        int i, failed = 0;
        fleet_open(&f, 2, "?lb=rr&timeout_ms=20000", NULL);
        fleet_peer_close(&f.peers[0]);
        policy.cluster = CRPC_CLUSTER_FAILFAST;
        call.policy = &policy;
        for (i = 0; i < 2; i++) {
            r = fleet_call(&f, form, false, i, &call);
            assert_int_equal(r.error.attempts, 1);
            failed += r.status == CRPC_ECONN;
        }
        assert_int_equal(failed, 1);
        for (i = 0; i < 8; i++)
            assert_int_equal(fleet_call(&f, form, false, i, NULL).status, CRPC_OK);
        fleet_close(&f);
    }
}

static void failsafe_swallows_failures(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 1, "?cluster=failsafe&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        r = fleet_call(&f, form, false, 5, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 0);
        assert_non_null(strstr(r.error.text, "EINTERNAL"));
        fleet_mood_set(&f.peers[0], FLEET_REFUSES); /* that is an answer */
        assert_int_equal(fleet_call(&f, form, false, 5, NULL).status, CRPC_EAPP);
        fleet_mood_set(&f.peers[0], FLEET_WELL);
        assert_int_equal(fleet_call(&f, form, false, 5, NULL).out.n, 6);
        fleet_close(&f);
    }
}

typedef struct given_up {
    int count;
    int code;
} given_up;

static void on_given_up(void *user, const crpc_method *method, const crpc_error *error)
{
    given_up *g = (given_up *)user;
    assert_string_equal(method->name, "Add");
    g->code = error->code;
    __atomic_add_fetch(&g->count, 1, __ATOMIC_SEQ_CST);
}

/* The request is sent again in the background until it gets through, or is given up. */
static void failback_goes_on_in_the_background(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    given_up dropped = {0, 0};
    fleet f;
    int i;
    (void)state;
    o.failback_dropped = on_given_up;
    o.failback_user = &dropped;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=20&retries=3&failback_max=4&timeout_ms=20000",
               &o);
    assert_int_equal(crpc_loop_start(crpc_channel_loop(f.channel)), CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 40, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(net_calls(&f.peers[0].service) >= 2, NET_PATIENCE)); /* and again */
    fleet_mood_set(&f.peers[0], FLEET_WELL);
    assert_true(CT_WAIT(fleet_pending(&f) == 0, NET_PATIENCE));
    assert_int_equal(dropped.count, 0);
    assert_int_equal(f.peers[0].service.order[net_calls(&f.peers[0].service) - 1], 40);
    i = net_calls(&f.peers[0].service);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_ASYNC, false, 41, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&dropped.count, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
    assert_int_equal(net_calls(&f.peers[0].service), i + 4); /* the call, and three retries */
    assert_int_equal(dropped.code, CRPC_EINTERNAL);
    fleet_close(&f);
}

/* No more wait than may, and those that wait when the channel closes are given up. */
static void failback_is_bounded(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    given_up dropped = {0, 0};
    fleet f;
    int i;
    (void)state;
    o.failback_dropped = on_given_up;
    o.failback_user = &dropped;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=600000&failback_max=3&timeout_ms=20000", &o);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    for (i = 0; i < 5; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_int_equal(fleet_pending(&f), 3);
    crpc_channel_close(f.channel);
    f.channel = NULL;
    assert_int_equal(dropped.count, 3);
    assert_int_equal(dropped.code, CRPC_ECANCELED);
    assert_int_equal(net_calls(&f.peers[0].service), 5);
    fleet_close(&f);
}

/* A silent provider costs backup_ms; the other's reply counts. Never for what may not run twice. */
static void a_backup_request_is_sent_for_idempotent_calls(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        int i, silent = 0;
        fleet_open(&f, 2, "?backup_ms=30&lb=rr&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        for (i = 0; i < 4; i++) {
            r = fleet_call(&f, form, true, i, NULL);
            assert_int_equal(r.status, CRPC_OK);
            assert_int_equal(r.out.n, i + 1);
            assert_int_equal(r.out.ms, 1);
            assert_string_equal(r.error.endpoint, f.peers[1].address);
        }
        assert_true(CT_WAIT((silent = net_calls(&f.peers[0].service)) > 0, NET_PATIENCE));
        assert_int_equal(net_calls(&f.peers[1].service), 4);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);

        fleet_open(&f, 2, "?backup_ms=10&timeout_ms=100", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        assert_int_equal(fleet_call(&f, form, false, 1, NULL).status, CRPC_ETIMEDOUT);
        assert_true(CT_WAIT(fleet_calls(&f) == 1, NET_PATIENCE));
        fleet_close(&f);
    }
}

/* A first attempt that fails while the backup request is under way: that one's reply is waited
 * for. */
static void a_backup_request_outlives_the_first_attempt(void **state)
{
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(6);
    crpc_context *x;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?backup_ms=20&retries=-1&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1 && net_held(&f.peers[1].service) == 1,
                        NET_PATIENCE));
    x = net_take(&f.peers[0].service);
    crpc_context_finish(x, CRPC_EINTERNAL);
    ct_sleep_ms(30);
    if (!__atomic_load_n(&r.done, __ATOMIC_SEQ_CST)) { /* it was the backup request's, or lost */
        x = net_take(&f.peers[1].service);
        crpc_context_finish(x, CRPC_OK);
    }
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    fleet_close(&f);
}

/* A one-way request that was sent has not failed: nothing is put aside. */
static void a_one_way_call_is_not_sent_again(void **state)
{
    dyn_Num request = net_num(3);
    fleet f;
    (void)state;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=1&retries=1&timeout_ms=20000", NULL);
    assert_int_equal(dyn_Echo_Add_notify(f.channel, &request, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_calls(&f.peers[0].service) >= 1 && fleet_pending(&f) == 0,
                        NET_PATIENCE));
    assert_int_equal(net_calls(&f.peers[0].service), 1);
    fleet_close(&f);
}

/* What a method's options forbid is not sent in the background either. */
static void a_degraded_method_is_never_called(void **state)
{
    crpc_method_options method = CRPC_INIT;
    crpc_channel_options o = CRPC_INIT;
    fleet_form form;
    (void)state;
    method.method = "Add";
    method.degraded = 1;
    o.methods = &method;
    o.method_count = 1;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_open(&f, 1, "?cluster=failback&failback_ms=1&timeout_ms=20000", &o);
        assert_int_equal(fleet_call(&f, form, false, 1, NULL).status, CRPC_OK);
        assert_int_equal(f.channel->failbacks, 0);
        fleet_close(&f);
    }
}

/* The service's own word ends the tries: it was executed. */
static void failback_ends_with_an_applications_error(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    given_up dropped = {0, 0};
    fleet f;
    (void)state;
    o.failback_dropped = on_given_up;
    o.failback_user = &dropped;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=50&retries=5&timeout_ms=20000", &o);
    assert_int_equal(crpc_loop_start(crpc_channel_loop(f.channel)), CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_REFUSES);
    assert_true(CT_WAIT(fleet_pending(&f) == 0, NET_PATIENCE));
    assert_int_equal(dropped.count, 1);
    assert_int_equal(dropped.code, CRPC_EAPP);
    assert_true(net_calls(&f.peers[0].service) < 6);
    fleet_close(&f);
}

/* Also where the program only ever makes synchronous calls. */
static void failback_needs_nobody_to_drive(void **state)
{
    fleet f;
    (void)state;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=1&retries=1&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(net_calls(&f.peers[0].service) == 2, 2000));
    fleet_close(&f);
}

/* A script: takes one request, and nobody answers there any more. */
static bool peer_dies(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    if (peer_receive(p, fd, &m) == 1)
        wire_done(&m);
    shutdown(p->listen_fd, SHUT_RDWR);
    return true;
}

/* Who may have executed a request with an id is gone: nobody else executes it too. */
static void a_named_request_goes_nowhere_else(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        char url[160];
        fleet_result r;
        peer first, other;
        fleet f;
        int i;
        memset(&f, 0, sizeof f);
        peer_open(&first, peer_dies, NULL);
        peer_open(&other, peer_adds, NULL);
        snprintf(url, sizeof url, "list://127.0.0.1:%d,127.0.0.1:%d", first.port, other.port);
        f.channel = net_channel(url, "?request_ids=1&lb=rr&timeout_ms=20000", CRPC_POLLER_DEFAULT,
                                NULL, NULL);
        for (i = 0; i < 2; i++) {
            int before = peer_requests(&other);
            r = fleet_call(&f, form, false, 1, NULL);
            if (peer_requests(&first))
                break;
            assert_int_equal(r.status, CRPC_OK);
            assert_int_equal(peer_requests(&other), before + 1);
        }
        assert_int_equal(peer_requests(&first), 1);
        assert_int_equal(peer_requests(&other), i);
        assert_int_equal(r.status, CRPC_ECONN);
        assert_int_not_equal(r.error.sent, CRPC_SENT_NO); /* the first attempt's */
        crpc_channel_close(f.channel);
        peer_close(&first);
        peer_close(&other);
    }
}

/* What is said of forks that failed: how many there were, and whether they can have been
 * executed. */
static void failed_forks_are_explained(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 2, "?cluster=forking&timeout_ms=300", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(r.error.attempts, 2);
        if (fleet_calls(&f))
            assert_int_equal(r.error.sent, CRPC_SENT_YES);
        fleet_close(&f);
        fleet_open(&f, 2, "?cluster=forking&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        fleet_peer_close(&f.peers[1]);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_true(r.status == CRPC_EINTERNAL || r.status == CRPC_ECONN);
        assert_int_equal(r.error.attempts, 2);
        assert_int_equal(r.error.sent, CRPC_SENT_YES);
        assert_string_not_equal(r.error.endpoint, "");
        fleet_close(&f);
    }
}

/* Calls of others end where a call's forks are cancelled, and end one of these forks. */
static void forks_can_fail_while_they_are_cancelled(void **state)
{
    crpc_policy forking = CRPC_INIT;
    crpc_call in = CRPC_INIT;
    dyn_Num request = net_num(1);
    fleet_result mine, other;
    crpci_endpoint *e[3];
    fleet f;
    crpc_loop *l;
    int i;
    (void)state;
    memset(&mine, 0, sizeof mine);
    memset(&other, 0, sizeof other);
    fleet_open(&f, 3, "?lb=rr&inflight=2&timeout_ms=20000", NULL);
    l = crpc_channel_loop(f.channel);
    for (i = 0; i < 3; i++) {
        fleet_mood_set(&f.peers[i], FLEET_SILENT);
        e[i] = crpci_channel_node(f.channel, (size_t)i)->endpoint;
    }
    crpci_loop_lock(l);
    f.channel->balance.started = true; /* the first is next */
    assert_true(crpci_sock_parse(&e[1]->addr, "unix:/nonexistent/socket")); /* fails at once */
    e[1]->usable_at = crpci_loop_now(l) + INT64_C(10000000);
    crpci_loop_unlock(l);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &other, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1, NET_PATIENCE));
    forking.cluster = CRPC_CLUSTER_FORKING;
    forking.forks = -1;
    in.policy = &forking;
    crpci_loop_lock(l);
    f.channel->balance.next = 0;
    crpci_loop_unlock(l);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &mine, &in), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 2 && net_held(&f.peers[2].service) == 1,
                        NET_PATIENCE));
    crpci_loop_lock(l);
    e[1]->usable_at = 0; /* and its timer has not run yet */
    e[2]->usable_at = INT64_MAX;
    crpci_loop_unlock(l);
    crpc_context_finish(net_take(&f.peers[2].service), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&mine.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(mine.status, CRPC_OK);
    assert_string_equal(mine.error.text, "");
    assert_int_equal(mine.error.attempts, 3);
    fleet_close(&f);
}

/* A script: reads a little, answers what its user says at the time it says, and reads no more. */
static bool peer_answers_early(peer *p, int fd, int number)
{
    crpc_id *id = (crpc_id *)p->user;
    wire w = {NULL, 0, 0};
    char some[100];
    (void)number;
    if (recv(fd, some, sizeof some, 0) <= 0)
        return true;
    pthread_mutex_lock(&p->lock);
    p->requests++;
    pthread_mutex_unlock(&p->lock);
    while (!__atomic_load_n(&id->value, __ATOMIC_SEQ_CST))
        ct_sleep_ms(1);
    wire_reply(&w, (int64_t)id->value, 7);
    wire_flush(fd, &w);
    return peer_deaf(p, fd, number);
}

/* The last reply of a provider that is not listed any more comes while its request is still being
 * sent. */
static void a_removed_provider_answers_early(void **state)
{
    crpc_id id, told = {0};
    crpc_call call = CRPC_INIT;
    dyn_Num request = net_num(1), out = net_num(0);
    crpci_snapshot *list;
    crpc_channel *ch;
    char *bulk = (char *)calloc(1, 8 << 20);
    peer p;
    (void)state;
    assert_non_null(bulk);
    peer_open(&p, peer_answers_early, &told);
    ch = net_channel(p.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    call.attachment = crpc_view_of(bulk, 8 << 20);
    assert_int_equal(dyn_Echo_Add_begin(ch, &request, &id, &call), CRPC_OK);
    free(bulk);
    assert_true(CT_WAIT(peer_requests(&p) == 1, NET_PATIENCE));
    list = crpci_directory_snapshot(ch->loop->heap, 1);
    assert_non_null(list);
    strcpy(list->providers[0].address, "127.0.0.1:9");
    assert_int_equal(crpci_channel_on_list(ch, list), CRPC_OK);
    crpci_directory_snapshot_unref(list);
    __atomic_store_n(&told.value, id.value, __ATOMIC_SEQ_CST);
    assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), CRPC_OK);
    assert_int_equal(out.n, 7);
    crpc_call_reset(&call);
    crpc_channel_close(ch); /* nothing is left: CT_TEST */
    peer_close(&p);
}

/* A call that was cancelled says of its provider that it takes at least so long, no more. */
static void a_cancelled_call_is_not_a_slow_one(void **state)
{
    dyn_Num request = net_num(1);
    crpc_id id;
    fleet f;
    int i, k;
    (void)state;
    fleet_open(&f, 2, "?lb=p2c&timeout_ms=20000", NULL);
    for (i = 0; i < 50; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, true, i, NULL).status, CRPC_OK);
    for (i = 0; i < 2; i++)
        fleet_mood_set(&f.peers[i], FLEET_SILENT);
    for (k = 0; k < 5; k++) {
        int64_t before[2], start = crpc_loop_now_us(crpc_channel_loop(f.channel)), most, now;
        for (i = 0; i < 2; i++)
            before[i] = crpci_channel_node(f.channel, (size_t)i)->balance.latency / 256;
        assert_int_equal(dyn_Echo_Get_begin(f.channel, &request, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(f.channel, id), CRPC_OK);
        most = crpc_loop_now_us(crpc_channel_loop(f.channel)) - start;
        for (i = 0; i < 2; i++) {
            now = crpci_channel_node(f.channel, (size_t)i)->balance.latency / 256;
            assert_true(now <= (before[i] > most ? before[i] : most));
        }
    }
    fleet_close(&f);
}

/* The time of a backup request is its own: the first attempt's silence is not its provider's. */
static void a_backup_request_has_its_own_time(void **state)
{
    dyn_Num request = net_num(6);
    const crpci_call *c, *part;
    fleet_result r;
    fleet f;
    crpc_loop *l;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?backup_ms=20&timeout_ms=20000", NULL);
    l = crpc_channel_loop(f.channel);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1 && net_held(&f.peers[1].service) == 1,
                        NET_PATIENCE));
    crpci_loop_lock(l);
    c = CRPCI_CONTAINER(f.channel->calls.next, const crpci_call, of_channel);
    part = CRPCI_CONTAINER(c->group->parts.next, const crpci_call, of_channel);
    assert_true(part->attempt_us >= c->start_us + 20000);
    crpci_loop_unlock(l);
    fleet_close(&f);
}

/* Some of a broadcast's requests cannot be made: then not everybody was reached. */
static void broadcast_without_memory_is_no_success(void **state)
{
    crpci_heap *h;
    int k, failed = 0;
    fleet f;
    (void)state;
    fleet_open(&f, 5, "?cluster=broadcast&timeout_ms=20000", NULL);
    h = f.channel->loop->heap;
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    for (k = 1; k <= 30; k++) {
        int before = fleet_calls(&f);
        fleet_result r;
        h->limit = h->chunk_bytes + k * 512;
        r = fleet_call(&f, FORM_SYNC, false, 1, NULL);
        h->limit = 0;
        failed += r.status != CRPC_OK;
        if (r.status == CRPC_OK)
            assert_int_equal(fleet_calls(&f), before + 5);
        else
            assert_string_not_equal(r.error.text, "");
    }
    assert_in_range(failed, 2, 29);
    fleet_close(&f);
}

/* --- budget, breaker, degrading --------------------------------------------------------------- */

/* Where everything fails, retries end with the budget. */
static void a_dead_fleet_is_not_stormed(void **state)
{
    fleet f;
    int i, attempts = 0;
    (void)state;
    fleet_open(&f, 3, "?retries=2&timeout_ms=20000&connect_timeout_ms=1000", NULL);
    for (i = 0; i < 3; i++)
        fleet_peer_close(&f.peers[i]);
    for (i = 0; i < 200; i++) {
        crpc_call call = CRPC_INIT;
        fleet_result r;
        call.timeout_ms = 5000;
        r = fleet_call(&f, FORM_SYNC, true, i, &call);
        assert_int_equal(r.status, CRPC_ECONN);
        attempts += r.error.attempts;
        if (i > 20 && i % 20)
            crpci_channel_node(f.channel, 0)->endpoint->usable_at = 0; /* do not wait for backoffs */
        if (attempts > 60 && i > 30)
            break;
    }
    assert_true(attempts <= i + 1 + 10);
    fleet_close(&f);
}

/* Taken out after the documented number of failures; one call tries it; it comes back. */
static void the_breaker_takes_a_provider_out_and_lets_it_back(void **state)
{
    fleet f;
    int i, before;
    (void)state;
    fleet_open(&f, 2, "?lb=rr&breaker=1&breaker_requests=10&breaker_open_ms=200&breaker_ramp_ms=-1"
                      "&retries=-1&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    for (i = 0; i < 20; i++)
        fleet_call(&f, FORM_SYNC, false, i, NULL);
    before = net_calls(&f.peers[0].service);
    assert_int_equal(before, 10);
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_WELL);
    for (i = 0; i < NET_PATIENCE && net_calls(&f.peers[0].service) < before + 5; i++) {
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
        ct_sleep_ms(1);
    }
    assert_true(net_calls(&f.peers[0].service) >= before + 5);
    fleet_close(&f);
}

/* All of them out is none of them out, and the last half never goes. */
static void the_breaker_does_not_eject_everyone(void **state)
{
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 4, "?lb=rr&breaker=1&breaker_requests=5&breaker_open_ms=60000&retries=-1"
                      "&timeout_ms=20000", NULL);
    for (i = 0; i < 4; i++)
        fleet_mood_set(&f.peers[i], FLEET_BROKEN);
    for (i = 0; i < 100; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_EINTERNAL);
    assert_int_equal(fleet_calls(&f), 100); /* each was tried on the wire */
    for (i = 0; i < 4; i++)
        fleet_mood_set(&f.peers[i], FLEET_WELL);
    for (i = 0; i < 20; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    fleet_close(&f);
}

static int stand_in(void *user, const crpc_method *method, const crpc_error *error, void *response)
{
    dyn_Num *out = (dyn_Num *)response;
    assert_string_equal(method->name, "Add");
    assert_int_equal(out->n, 0);
    out->n = error->code;
    ++*(int *)user;
    return CRPC_OK;
}

static void a_failed_call_can_be_degraded(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_method_options methods[2];
        crpc_channel_options o = CRPC_INIT;
        fleet_result r;
        int used = 0;
        fleet f;
        memset(methods, 0, sizeof methods);
        methods[0].method = "Add";
        methods[0].fallback = stand_in;
        methods[0].user = &used;
        methods[1].method = "Get";
        methods[1].canned = crpc_view_of("\x08\x2a", 2); /* n = 42 */
        o.methods = methods;
        o.method_count = 2;
        fleet_open(&f, 1, "?timeout_ms=20000", &o);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, CRPC_EINTERNAL);
        assert_int_equal(used, 1);
        r = fleet_call(&f, form, true, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 42);
        fleet_mood_set(&f.peers[0], FLEET_REFUSES); /* the service's own word stands */
        assert_int_equal(fleet_call(&f, form, false, 1, NULL).status, CRPC_EAPP);
        fleet_mood_set(&f.peers[0], FLEET_WELL);
        assert_int_equal(fleet_call(&f, form, false, 1, NULL).out.n, 2);
        assert_int_equal(used, 1);
        fleet_close(&f);
        methods[1].degraded = 1;
        fleet_open(&f, 1, "?timeout_ms=20000", &o);
        assert_int_equal(fleet_call(&f, form, true, 1, NULL).out.n, 42);
        assert_int_equal(fleet_calls(&f), 0);
        fleet_close(&f);
    }
}

/* What a request of the script below was named, each time it came. */
typedef struct named {
    char id[4][80], key[80];
    int count;
} named;

/* A script: the first connection takes a request and is closed; later ones answer. */
static bool peer_forgets(peer *p, int fd, int number)
{
    named *names = (named *)p->user;
    wire_message m;
    while (peer_receive(p, fd, &m) == 1) {
        crpc_view meta = crpc_view_of(m.all, (size_t)(m.body - m.all)), value;
        wire w = {NULL, 0, 0};
        if (names->count < 4 && crpci_meta_field(meta, "crpc-rid", &value))
            crpc_view_copy(value, names->id[names->count], sizeof names->id[0]);
        if (crpci_meta_field(meta, "crpc-key", &value))
            crpc_view_copy(value, names->key, sizeof names->key);
        names->count++;
        wire_reply(&w, m.id, m.n + 1);
        wire_done(&m);
        if (number == 0) {
            wire_free(&w);
            return true;
        }
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

/* A request with an id goes to its provider again when the connection was lost, with that id; one
 * without does not, unless its method is idempotent. */
static void a_named_request_is_sent_again_to_its_provider(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_call call = CRPC_INIT;
        fleet_result r;
        named names;
        fleet f;
        peer p;
        memset(&f, 0, sizeof f);
        memset(&names, 0, sizeof names);
        peer_open(&p, peer_forgets, &names);
        f.channel = net_channel(p.url, "?request_ids=1&timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL,
                                NULL);
        r = fleet_call(&f, form, false, 4, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 5);
        assert_int_equal(names.count, 2);
        assert_int_equal(strlen(names.id[0]), 16);
        assert_string_equal(names.id[0], names.id[1]);
        call.request_id = crpc_view_str("order 17");
        call.order_key = crpc_view_str("customer 4");
        assert_int_equal(fleet_call(&f, form, false, 4, &call).status, CRPC_OK);
        assert_string_equal(names.id[2], "order 17");
        assert_string_equal(names.key, "customer 4");
        assert_int_equal(fleet_call(&f, form, false, 4, NULL).status, CRPC_OK);
        assert_string_not_equal(names.id[3], names.id[1]);
        crpc_channel_close(f.channel);
        peer_close(&p);

        memset(&names, 0, sizeof names);
        peer_open(&p, peer_forgets, &names);
        f.channel = net_channel(p.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
        r = fleet_call(&f, form, false, 4, NULL);
        assert_int_equal(r.status, CRPC_ECONN);
        assert_int_equal(names.count, 1);
        assert_string_equal(names.id[0], "");
        crpc_channel_close(f.channel);
        peer_close(&p);
    }
}

/* --- the list --------------------------------------------------------------------------------- */

/* As a registry pushes it; weight 0 leaves a peer out. */
static void fleet_list(fleet *f, const int *weights)
{
    crpci_snapshot *list = crpci_directory_snapshot(f->channel->loop->heap, (size_t)f->count);
    size_t n = 0;
    int i;
    assert_non_null(list);
    for (i = 0; i < f->count; i++) {
        if (weights[i] < 0)
            continue;
        snprintf(list->providers[n].address, CRPC_ADDRESS_MAX, "%s", f->peers[i].address);
        list->providers[n++].weight = weights[i];
    }
    list->count = n;
    crpci_directory_sort(list);
    assert_int_equal(crpci_channel_on_list(f->channel, list), CRPC_OK);
    crpci_directory_snapshot_unref(list);
}

static void weights_share_out_the_calls(void **state)
{
    static const int weights[] = {50, 150, 0}, others[] = {100, -1, 100};
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 3, "?timeout_ms=20000", NULL);
    fleet_list(&f, weights);
    assert_int_equal(crpc_channel_providers(f.channel), 3);
    for (i = 0; i < 80; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_in_range(net_calls(&f.peers[0].service), 19, 21);
    assert_in_range(net_calls(&f.peers[1].service), 59, 61);
    assert_int_equal(net_calls(&f.peers[2].service), 0);
    fleet_list(&f, others);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    for (i = 0; i < 40; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_in_range(net_calls(&f.peers[2].service), 19, 21);
    fleet_close(&f);
}

/* A provider that is no longer listed keeps its connection until its last call has ended. */
static void a_removed_provider_finishes_its_calls(void **state)
{
    static const int without[] = {-1, 100};
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(8);
    crpc_context *x;
    crpc_loop_stats s;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?lb=rr&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(fleet_calls(&f) == 1, NET_PATIENCE));
    if (net_held(&f.peers[0].service) == 0) { /* the other one was asked first: once more */
        fleet_result second;
        memset(&second, 0, sizeof second);
        crpc_context_finish(net_take(&f.peers[1].service), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
        memset(&r, 0, sizeof r);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
        assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1, NET_PATIENCE));
    }
    fleet_list(&f, without);
    fleet_mood_set(&f.peers[1], FLEET_WELL);
    net_check_add(f.channel, 3);
    assert_int_equal(r.done, 0);
    x = net_take(&f.peers[0].service);
    assert_non_null(x);
    assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(r.status, CRPC_OK);
    assert_int_equal(r.out.n, 9);
    crpc_server_stats_get(f.peers[0].server, &s);
    assert_true(CT_WAIT((crpc_server_stats_get(f.peers[0].server, &s), s.connections == 0),
                        NET_PATIENCE));
    fleet_close(&f);
}

/* Equal keys go to one provider, whether given or taken from the request. */
static void equal_keys_go_to_one_provider(void **state)
{
    fleet f;
    int i, k, used[4] = {0, 0, 0, 0};
    (void)state;
    fleet_open(&f, 4, "?lb=hash&hash_field=1&timeout_ms=20000", NULL);
    for (k = 0; k < 40; k++) {
        char key[16];
        crpc_call call = CRPC_INIT;
        int64_t by_key = -1, by_field = -1;
        snprintf(key, sizeof key, "key %d", k);
        call.key = crpc_view_str(key);
        for (i = 0; i < 3; i++) {
            fleet_result r = fleet_call(&f, FORM_SYNC, false, i, &call);
            assert_int_equal(r.status, CRPC_OK);
            assert_true(by_key < 0 || by_key == r.out.ms);
            by_key = r.out.ms;
            r = fleet_call(&f, FORM_ASYNC, false, k + 1, NULL);
            assert_true(by_field < 0 || by_field == r.out.ms);
            by_field = r.out.ms;
        }
        used[by_key]++;
    }
    for (i = 0; i < 4; i++)
        assert_true(used[i] > 0);
    fleet_close(&f);
}

/* Of a long list a few are used, and no more connections made. */
static void max_endpoints_bounds_connections(void **state)
{
    static const int all[] = {100, 100, 100, 100, 100, 100};
    crpc_loop_stats s;
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 6, "?max_endpoints=2&lb=rr&timeout_ms=20000", NULL);
    fleet_list(&f, all);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    for (i = 0; i < 30; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    crpc_loop_stats_get(crpc_channel_loop(f.channel), &s);
    assert_int_equal(s.connections, 2);
    for (i = 0; i < 6; i++) { /* those that are used die: others take their places */
        if (net_calls(&f.peers[i].service))
            fleet_peer_close(&f.peers[i]);
    }
    for (i = 0; i < NET_PATIENCE; i += 5) {
        if (fleet_call(&f, FORM_SYNC, false, i, NULL).status == CRPC_OK)
            break;
        ct_sleep_ms(5);
    }
    for (i = 0; i < NET_PATIENCE && s.connections != 2; i += 5) {
        fleet_call(&f, FORM_SYNC, false, i, NULL);
        crpc_loop_stats_get(crpc_channel_loop(f.channel), &s);
        ct_sleep_ms(5);
    }
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    fleet_close(&f);
}

/* Of the providers in a URL too. */
static void max_endpoints_of_a_url_are_chosen_again(void **state)
{
    fleet f;
    int i, status = CRPC_ECONN;
    (void)state;
    fleet_open(&f, 4, "?max_endpoints=2&lb=rr&timeout_ms=20000", NULL);
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    for (i = 0; i < 4; i++) {
        if (net_calls(&f.peers[i].service))
            fleet_peer_close(&f.peers[i]);
    }
    for (i = 0; i < 5000 && status; i += 5) {
        status = fleet_call(&f, FORM_SYNC, false, i, NULL).status;
        ct_sleep_ms(5);
    }
    assert_int_equal(status, CRPC_OK);
    fleet_close(&f);
}

/* A provider that does not say when it started warms up once, however often the list changes. */
static void a_list_does_not_begin_a_warm_up_again(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpci_snapshot *list;
    crpc_channel *ch;
    int i;
    (void)state;
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    list = crpci_directory_snapshot(ch->loop->heap, 1);
    assert_non_null(list);
    strcpy(list->providers[0].address, "127.0.0.1:9");
    list->providers[0].weight = 100;
    list->providers[0].warmup_ms = 10000;
    for (i = 0; i < 10; i++) {
        assert_int_equal(crpci_channel_on_list(ch, list), CRPC_OK);
        fake_now += 1000000;
    }
    assert_in_range(crpci_channel_node(ch, 0)->balance.weight, 89, 91);
    crpci_directory_snapshot_unref(list);
    crpc_channel_close(ch);
}

/* Of a list that the registry does not confirm any more, who cannot be reached is dialled once a
 * minute after a time; a list that is fresh again ends that. */
static void an_aged_provider_is_dialled_rarely(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpci_snapshot *list;
    crpci_endpoint *e;
    fleet f;
    int64_t now;
    int i, dials = 0;
    (void)state;
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    memset(&f, 0, sizeof f);
    assert_int_equal(crpc_channel_open(&f.channel, "tcp://127.0.0.1:9?stale_ttl_ms=30000&retries=-1",
                                       &o, NULL),
                     CRPC_OK);
    e = first_endpoint(f.channel->loop);
    list = crpci_directory_snapshot(f.channel->loop->heap, 1);
    assert_non_null(list);
    strcpy(list->providers[0].address, "127.0.0.1:9");
    list->providers[0].weight = 100;
    list->stale = true;
    assert_int_equal(crpci_channel_on_list(f.channel, list), CRPC_OK);
    for (i = 0; i < 400; i++) { /* ten minutes, a call each 1.5 s */
        now = e->dialled_at;
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_ECONN);
        if (fake_now > 31000000)
            dials += e->dialled_at != now;
        fake_now += 1500000;
    }
    assert_in_range(dials, 8, 10);
    list->stale = false;
    assert_int_equal(crpci_channel_on_list(f.channel, list), CRPC_OK);
    for (i = 0, dials = 0; i < 20; i++) {
        now = e->dialled_at;
        e->usable_at = 0;
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_ECONN);
        dials += e->dialled_at != now;
        fake_now += 1500000;
    }
    assert_int_equal(dials, 20);
    crpci_directory_snapshot_unref(list);
    crpc_channel_close(f.channel);
}

/* A flood of providers and changes: the list stays right, and nothing piles up. */
static void a_flood_of_changes_is_followed(void **state)
{
    enum { MANY = 2000, CHANGES = 1000, CHURN = 20 };
    static const char *const balancers[] = {"wrr", "rr", "wrandom", "la", "p2c"};
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_stats before, after;
    crpci_call c;
    size_t b;
    (void)state;
    memset(&c, 0, sizeof c);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    for (b = 0; b < sizeof balancers / sizeof *balancers; b++) {
        crpc_channel *ch;
        uint32_t dice = 12345;
        char url[80];
        int i, k;
        snprintf(url, sizeof url, "tcp://127.0.0.1:9?lb=%s", balancers[b]);
        assert_int_equal(crpc_channel_open(&ch, url, &o, NULL), CRPC_OK);
        memset(&before, 0, sizeof before);
        for (i = 0; i < CHANGES / (int)(sizeof balancers / sizeof *balancers); i++) {
            crpci_snapshot *list = crpci_directory_snapshot(ch->loop->heap, MANY);
            const crpci_node *n;
            assert_non_null(list);
            for (k = 0; k < MANY; k++) {
                /* 20 of them change their address, their weight, or both */
                uint32_t generation = k < CHURN ? (dice = dice * 1664525 + 1013904223) >> 20 : 0;
                snprintf(list->providers[k].address, CRPC_ADDRESS_MAX, "10.%d.%u.%u:8000", k >> 8,
                         generation & 255, (unsigned)k & 255);
                list->providers[k].weight = 1 + (int)(generation >> 8);
            }
            crpci_directory_sort(list);
            assert_int_equal(list->count, MANY);
            assert_int_equal(crpci_channel_on_list(ch, list), CRPC_OK);
            assert_int_equal(crpc_channel_providers(ch), MANY);
            for (k = 0; k < MANY; k += 97)
                assert_string_equal(crpci_channel_node(ch, (size_t)k)->endpoint->address,
                                    list->providers[k].address);
            n = crpci_channel_pick(ch, &c);
            assert_non_null(n);
            assert_ptr_equal(crpci_channel_node(ch, n->balance.index), n);
            crpci_directory_snapshot_unref(list);
            crpc_loop_stats_get(ch->loop, i == 2 ? &before : &after);
        }
        assert_true(after.memory <= before.memory + before.memory / 50);
        crpc_channel_close(ch);
    }
}

static void wrong_policies_are_refused(void **state)
{
    static const char *const bad[] = {"lb=best", "lb=", "cluster=fail", "breaker=2", "forks=x",
                                      "fail_percent=101", "lb=3"};
    crpc_channel_options o = CRPC_INIT;
    crpc_channel *ch;
    crpc_error error;
    char url[80];
    size_t i;
    (void)state;
    o.cluster = (crpc_cluster)7;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "cluster 7"));
    o.cluster = CRPC_CLUSTER_DEFAULT;
    o.balancer = (crpc_balancer)8;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(url, sizeof url, "tcp://127.0.0.1:9?%s", bad[i]);
        assert_int_equal(crpc_channel_open(&ch, url, NULL, &error), CRPC_EINVAL);
        assert_non_null(strstr(error.text, "URL option"));
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_is_shared_by_channels_that_ask_for_the_same),
        CT_TEST(it_backs_off_with_full_jitter),
        CT_TEST(it_is_picked_in_turn),
        CT_TEST(forking_takes_the_first_success),
        CT_TEST(forking_fails_when_all_have_failed),
        CT_TEST(forks_are_cancelled_with_their_call),
        CT_TEST(forks_end_with_their_channel),
        CT_TEST(broadcast_reaches_everyone),
        CT_TEST(failfast_tries_once_and_failover_goes_on),
        CT_TEST(failsafe_swallows_failures),
        CT_TEST(failback_goes_on_in_the_background),
        CT_TEST(failback_is_bounded),
        CT_TEST(a_backup_request_is_sent_for_idempotent_calls),
        CT_TEST(a_backup_request_outlives_the_first_attempt),
        CT_TEST(a_dead_fleet_is_not_stormed),
        CT_TEST(the_breaker_takes_a_provider_out_and_lets_it_back),
        CT_TEST(the_breaker_does_not_eject_everyone),
        CT_TEST(a_failed_call_can_be_degraded),
        CT_TEST(a_named_request_is_sent_again_to_its_provider),
        CT_TEST(weights_share_out_the_calls),
        CT_TEST(a_removed_provider_finishes_its_calls),
        CT_TEST(equal_keys_go_to_one_provider),
        CT_TEST(max_endpoints_bounds_connections),
        CT_TEST(an_aged_provider_is_dialled_rarely),
        CT_TEST(a_flood_of_changes_is_followed),
        CT_TEST(wrong_policies_are_refused),
        CT_TEST(a_one_way_call_is_not_sent_again),
        CT_TEST(a_degraded_method_is_never_called),
        CT_TEST(failback_ends_with_an_applications_error),
        CT_TEST(failback_needs_nobody_to_drive),
        CT_TEST(a_named_request_goes_nowhere_else),
        CT_TEST(failed_forks_are_explained),
        CT_TEST(forks_can_fail_while_they_are_cancelled),
        CT_TEST(a_removed_provider_answers_early),
        CT_TEST(a_cancelled_call_is_not_a_slow_one),
        CT_TEST(a_backup_request_has_its_own_time),
        CT_TEST(max_endpoints_of_a_url_are_chosen_again),
        CT_TEST(a_list_does_not_begin_a_warm_up_again),
        CT_TEST(broadcast_without_memory_is_no_success),
    };
    return CT_RUN(tests);
}
