/* From a request on a connection to its handler: names, refusals, interceptors, workers. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_pump.h"

static void names_and_codes_are_brpcs(void **state)
{
    static const struct {
        const char *service, *method;
        int code;
        const char *says;
    } cases[] = {
        {"dyn.Echo", "Add", 0, ""},
        {"Echo", "Add", 0, ""},
        {"dyn.Echo", "add", CRPC_ENOMETHOD, "no such method: dyn.Echo.add"},
        {"Echo", "Nothing", CRPC_ENOMETHOD, "no such method: Echo.Nothing"},
        {"dyn.Echo", "", CRPC_ENOMETHOD, "no such method: dyn.Echo."},
        {"other.Echo", "Add", CRPC_ENOMETHOD, "no such method: other.Echo.Add"},
        {"dyn", "Add", CRPC_ENOSERVICE, "no such service: dyn.Add"},
        {"Ech", "Add", CRPC_ENOSERVICE, "no such service: Ech.Add"},
        {"Echoo", "Add", CRPC_ENOSERVICE, "no such service: Echoo.Add"},
        {"", "Add", CRPC_ENOSERVICE, "no such service: .Add"},
        {".Echo", "Add", CRPC_ENOMETHOD, "no such method: .Echo.Add"},
    };
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i;
        char text[512];
        int fd;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < sizeof cases / sizeof *cases; i++) {
            assert_int_equal(net_ask(fd, cases[i].service, cases[i].method, (int64_t)i, NULL, text),
                             cases[i].code);
            assert_string_equal(text, cases[i].says);
        }
        assert_int_equal(net_calls(&n.service), 2);
        close(fd);
        net_close(&n);
    }
}

/* A NULL in the struct of handlers is answered as a missing method. */
static void missing_handlers_are_missing_methods(void **state)
{
    static const dyn_Echo_handlers only_add = {net_add, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    crpc_server_options o;
    crpc_server *s;
    net_service service;
    char url[160];
    int fd;
    (void)state;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    net_service_init(&service);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &only_add, &service), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    fd = wire_connect(url);
    assert_int_equal(net_ask(fd, "Echo", "Add", 1, NULL, NULL), CRPC_OK);
    assert_int_equal(net_ask(fd, "Echo", "Get", 2, NULL, NULL), CRPC_ENOMETHOD);
    close(fd);
    crpc_server_close(s);
}

/* Workers leave so many turns to other hosts. */
static void a_large_reply_counts_as_several_requests(void **state)
{
    enum { SIZE = 200000 };
    char *bytes = net_bytes(SIZE);
    wire w = {NULL, 0, 0};
    wire_request_options ro;
    crpc_server_options o;
    wire_message m;
    crpci_conn *c;
    pump u;
    int fd;
    (void)state;
    memset(&o, 0, sizeof o);
    memset(&ro, 0, sizeof ro);
    o.workers = 1;
    ro.attachment = SIZE;
    wire_request_body(&w, "dyn.Echo", "Pass", 1, bytes, SIZE, &ro);
    pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
    fd = pump_connect_from(&u, "127.0.0.1", &c);
    assert_int_equal(pump_push(&u, fd, w.p, w.n), w.n);
    pump_receive(&u, fd, &m);
    assert_int_equal(m.code, 0);
    if (CRPC_ENABLE_POLICY)
        assert_int_equal(((crpci_peer_account *)c->account)->flow.debt, SIZE / 65536);
    wire_done(&m);
    close(fd);
    wire_free(&w);
    free(bytes);
    pump_close(&u);
}

static void unsupported_requests_are_refused_with_the_reason(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        wire_request_options o;
        char text[512];
        int fd;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        fd = wire_connect(n.url);
        memset(&o, 0, sizeof o);
        o.compress = 1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 1, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "compress_type 1 is not supported; send uncompressed");
        memset(&o, 0, sizeof o);
        o.content = 1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 2, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "content_type 1 is not supported; send protobuf");
        memset(&o, 0, sizeof o);
        o.checksum = 1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 3, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "checksum_type 1 is not supported; send none");
        memset(&o, 0, sizeof o);
        o.stream = 1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 4, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "streaming is not supported");
        memset(&o, 0, sizeof o);
        o.chunk = 1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 5, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "chunked bodies are not supported; send one frame");
        assert_int_equal(net_calls(&n.service), 0);
        close(fd);
        net_close(&n);
    }
}

static void an_attachment_lies_within_the_body(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        wire_request_options o;
        char text[512];
        int fd;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        fd = wire_connect(n.url);
        memset(&o, 0, sizeof o);
        o.attachment = 3;
        assert_int_equal(net_ask(fd, "Echo", "Add", 6, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "attachment_size 3 is larger than the body's 2 bytes");
        o.attachment = -1;
        assert_int_equal(net_ask(fd, "Echo", "Add", 7, &o, text), CRPC_EREQUEST);
        o.attachment = 2; /* an empty request with an attachment */
        assert_int_equal(net_ask(fd, "Echo", "Add", 8, &o, text), CRPC_OK);
        o.attachment = 1; /* leaves one byte that is no message */
        assert_int_equal(net_ask(fd, "Echo", "Add", 9, &o, text), CRPC_EREQUEST);
        assert_non_null(strstr(text, "dyn.Echo.Add: request does not decode: "));
        assert_int_equal(net_calls(&n.service), 1);
        close(fd);
        net_close(&n);
    }
}

static char trail[400];

static int server_before(void *user, crpc_context *x)
{
    const char *name = (const char *)user;
    crpc_view value;
    strcat(trail, name);
    strcat(trail, "<");
    if (strcmp(name, "b") == 0)
        assert_int_equal(crpc_context_add_field(x, "from", "b"), CRPC_OK);
    if (strcmp(name, "guard") == 0 && !crpc_context_field(x, "pass", &value))
        return crpc_context_error(x, CRPC_EAUTH, "no pass");
    return CRPC_OK;
}

static void server_after(void *user, crpc_context *x, int status)
{
    char text[40];
    (void)x;
    snprintf(text, sizeof text, "%s%d>", (const char *)user, status);
    strcat(trail, text);
}

static void server_interceptors_run_in_order(void **state)
{
    static char a[] = "a", b[] = "b", guard[] = "guard", c[] = "c";
    static const crpc_server_interceptor chain[] = {{server_before, server_after, a},
                                                    {server_before, NULL, b},
                                                    {server_before, server_after, guard},
                                                    {NULL, server_after, c}};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(CRPC_ELIMIT), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_field pass = {"pass", "yes"};
        crpc_view value;
        memset(&n, 0, sizeof n);
        n.server_options.interceptors = chain;
        n.server_options.interceptor_count = 4;
        net_open(&n, p, m);
        trail[0] = '\0';
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EAUTH);
        assert_non_null(strstr(call.error.text, "EAUTH 1004: no pass (remote)"));
        assert_string_equal(trail, "a<b<guard<a1004>");
        assert_int_equal(net_calls(&n.service), 0);
        call.fields = &pass;
        call.field_count = 1;
        trail[0] = '\0';
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
        assert_string_equal(trail, "a<b<guard<c0>guard0>a0>");
        assert_true(crpc_call_field(&call, "from", &value));
        assert_true(crpc_view_equal(value, "b"));
        trail[0] = '\0';
        assert_int_equal(dyn_Echo_Status(n.channel, &in, &out, &call), CRPC_ELIMIT);
        assert_string_equal(trail, "a<b<guard<c2004>guard2004>a2004>");
        crpc_call_reset(&call);
        net_close(&n);
    }
}

/* A server with workers whose handlers wait for each other, and a channel to it. */
typedef struct gathering {
    crpc_server *server;
    crpc_channel *channel;
    char url[160];
    int wanted; /* handlers return when so many have begun; atomic, as the rest is */
    int begun, running, peak;
} gathering;

static int waits_for_others(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    gathering *g = (gathering *)crpc_context_user(x);
    int running = __atomic_add_fetch(&g->running, 1, __ATOMIC_SEQ_CST);
    int peak = __atomic_load_n(&g->peak, __ATOMIC_SEQ_CST);
    while (running > peak && !__atomic_compare_exchange_n(&g->peak, &peak, running, 0,
                                                          __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    __atomic_add_fetch(&g->begun, 1, __ATOMIC_SEQ_CST);
    (void)CT_WAIT(__atomic_load_n(&g->begun, __ATOMIC_SEQ_CST) >=
                      __atomic_load_n(&g->wanted, __ATOMIC_SEQ_CST),
                  NET_PATIENCE);
    __atomic_add_fetch(&g->running, -1, __ATOMIC_SEQ_CST);
    out->n = in->n + 1;
    return CRPC_OK;
}

static void gathering_open(gathering *g, crpc_poller p, int workers, int queue, int wanted)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o = CRPC_INIT;
    memset(g, 0, sizeof *g);
    g->wanted = wanted;
    handlers.Add = waits_for_others;
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(p);
    o.workers = workers;
    o.worker_queue = queue;
    assert_int_equal(crpc_server_open(&g->server, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(g->server, &dyn_Echo, &handlers, g), CRPC_OK);
    assert_int_equal(crpc_server_start(g->server, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(g->server)), CRPC_OK);
    assert_int_equal(crpc_server_address(g->server, 0, g->url, sizeof g->url), CRPC_OK);
    g->channel = net_channel(g->url, "?timeout_ms=60000", p, NULL, NULL);
}

static void gathering_close(gathering *g)
{
    crpc_channel_close(g->channel);
    crpc_server_close(g->server);
}

/* Makes `count` calls at a time, none of which may fail. */
static void gathering_call(gathering *g, int count)
{
    crpc_id ids[8];
    int i;
    for (i = 0; i < count; i++) {
        dyn_Num in = net_num(i);
        assert_int_equal(dyn_Echo_Add_begin(g->channel, &in, &ids[i], NULL), CRPC_OK);
    }
    for (i = 0; i < count; i++) {
        dyn_Num out = dyn_Num_init_zero;
        assert_int_equal(crpc_channel_wait(g->channel, ids[i], -1), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(g->channel, ids[i], &out, NULL), CRPC_OK);
        assert_int_equal(out.n, i + 1);
    }
}

static void workers_run_handlers_beside_each_other(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        gathering g;
        gathering_open(&g, p, 2, 0, 2);
        gathering_call(&g, 4);
        assert_int_equal(g.peak, 2);
        gathering_close(&g);
    }
}

static void a_full_worker_queue_refuses_requests(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        gathering g;
        wire w = {NULL, 0, 0};
        wire_message m;
        int fd, i;
        gathering_open(&g, p, 1, 3, 1000); /* until it is told otherwise */
        fd = wire_connect(g.url);
        wire_request(&w, "Add", 0, 0, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(__atomic_load_n(&g.begun, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
        for (i = 1; i <= 10; i++) /* one runs, three wait, seven are refused */
            wire_request(&w, "Add", i, i, 0);
        assert_true(wire_flush(fd, &w));
        for (i = 0; i < 7; i++) {
            assert_int_equal(wire_receive(fd, &m), 1);
            assert_int_equal(m.code, CRPC_ELIMIT);
            assert_string_equal(m.text, "too many requests wait for a worker (worker_queue)");
            wire_done(&m);
        }
        __atomic_store_n(&g.wanted, 0, __ATOMIC_SEQ_CST);
        for (i = 0; i < 4; i++) {
            assert_int_equal(wire_receive(fd, &m), 1);
            assert_int_equal(m.code, 0);
            wire_done(&m);
        }
        assert_int_equal(g.begun, 4);
        gathering_call(&g, 1); /* the queue has room again */
        close(fd);
        gathering_close(&g);
    }
}

/* A host whose deferred requests stay for ever leaves a quarter of max_concurrency to others. */
static void a_host_cannot_take_all_of_max_concurrency(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message reply;
        int greedy, honest, i, refused = 0;
        memset(&n, 0, sizeof n);
        n.server_options.max_concurrency = 8;
        net_open(&n, p, m);
        greedy = wire_connect_from(n.url, "127.0.0.2");
        honest = wire_connect(n.url);
        for (i = 0; i < 20; i++)
            wire_request(&w, "Defer", i, i, 0);
        assert_true(wire_flush(greedy, &w));
        for (i = 0; i < 14; i++) {
            assert_int_equal(wire_receive(greedy, &reply), 1);
            refused += reply.code == CRPC_ELIMIT;
            wire_done(&reply);
        }
        assert_int_equal(refused, 14);
        assert_true(CT_WAIT(net_held(&n.service) == 6, NET_PATIENCE));
        for (i = 0; i < 5; i++)
            assert_int_equal(net_ask(honest, "Echo", "Add", i, NULL, NULL), 0);
        for (i = 0; i < 6; i++)
            assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
        close(greedy);
        close(honest);
        net_close(&n);
    }
}

static void late_requests_are_answered_but_not_run(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message m;
        wire_request_options o;
        int fd;
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        n.server_options.workers = 1;
        net_open(&n, p, NET_WORKERS);
        fd = wire_connect(n.url);
        wire_request(&w, "Add", 1, 1, 100);
        o.timeout_ms = 20;
        wire_request_body(&w, "dyn.Echo", "Add", 2, "", 0, &o);
        o.timeout_ms = 60000;
        wire_request_body(&w, "dyn.Echo", "Add", 3, "", 0, &o);
        o.timeout_ms = -4;
        wire_request_body(&w, "dyn.Echo", "Add", 4, "", 0, &o);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.id, 1);
        assert_int_equal(m.code, 0);
        wire_done(&m);
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.id, 2);
        assert_int_equal(m.code, CRPC_ETIMEDOUT);
        assert_string_equal(m.text, "deadline passed before the handler ran");
        wire_done(&m);
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.code, 0);
        wire_done(&m);
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.code, 0);
        wire_done(&m);
        assert_int_equal(net_calls(&n.service), 3);
        close(fd);
        net_close(&n);
    }
}

/* How often the server has read from its connections. */
static uint64_t receives_of(crpc_server *s)
{
    crpc_loop_stats stats;
    crpc_server_stats_get(s, &stats);
    return stats.receives;
}

/* The server has received half of a request when it begins to stop: the sender gets ELOGOFF. */
static void a_request_received_in_part_gets_elogoff(void **state)
{
    net n;
    wire w = {NULL, 0, 0};
    wire_message m;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.drain_ms = NET_PATIENCE;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    wire_request(&w, "Add", 1, 1, 0);
    assert_true(wire_send(fd, w.p, w.n / 2));
    assert_true(CT_WAIT(receives_of(n.server) > 0, NET_PATIENCE));
    crpc_server_stop(n.server);
    ct_sleep_ms(100); /* the server looks several times whether it is drained */
    assert_true(wire_send(fd, w.p + w.n / 2, w.n - w.n / 2));
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.code, CRPC_ELOGOFF);
    wire_done(&m);
    wire_free(&w);
    close(fd);
    net_close(&n);
}

static int64_t idle_workers(crpc_server *s)
{
    int64_t idle;
    crpci_thread_lock(&s->workers.lock);
    idle = s->workers.idle;
    crpci_thread_unlock(&s->workers.lock);
    return idle;
}

/* With all eight workers idle, a queue of one takes eight requests. */
static void idle_workers_do_not_fill_the_queue(void **state)
{
    gathering g;
    (void)state;
    gathering_open(&g, CRPC_POLLER_DEFAULT, 8, 1, 8);
    assert_true(CT_WAIT(idle_workers(g.server) == 8, NET_PATIENCE));
    gathering_call(&g, 8);
    gathering_close(&g);
}

typedef struct server_plan {
    crpc_poller poller;
    int workers;
    bool guarded; /* the requests are judged, limited, in order, and may come again */
} server_plan;

static int accept_all(void *user, const char *from, crpc_view credential, crpc_identity *identity)
{
    (void)user, (void)from, (void)credential;
    strcpy(identity->name, "all");
    return CRPC_OK;
}

static int server_scenario(const crpc_hooks *hooks, void *user)
{
    static const crpc_method_limit limit = {NULL, NULL, 100, 1, 100000, 0};
    static const char *const fields[] = {"crpc-key", "k", "crpc-rid", "i", NULL};
    const server_plan *plan = (const server_plan *)user;
    static net_service service;
    crpc_server_options o;
    crpc_server *s;
    crpc_error error;
    wire w = {NULL, 0, 0};
    wire_message m;
    wire_request_options ro;
    char url[160], *bytes = net_bytes(9000);
    int fd, status, i, got = 0, flags;
    int64_t until;
    memset(&o, 0, sizeof o);
    memset(&ro, 0, sizeof ro);
    o.loops.hooks = *hooks;
    o.loops.hooks.log_level = -1;
    o.loops.poller = plan->poller;
    o.workers = plan->workers;
    o.listen = "tcp://127.0.0.1:0";
    o.drain_ms = 1000;
    if (plan->guarded) {
        o.method_limits = &limit;
        o.method_limit_count = 1;
        o.rate_per_client = 100000;
        o.replay_entries = 10;
        o.ordered = 1;
        o.access.authenticate = accept_all;
    }
    net_service_init(&service);
    status = crpc_server_open(&s, &o, &error);
    if (status) {
        free(bytes);
        return status;
    }
    status = crpc_server_add(s, &dyn_Echo, &net_handlers, &service);
    status = status ? status : crpc_server_start(s, &error);
    if (status) {
        crpc_server_close(s);
        free(bytes);
        return status;
    }
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    fd = wire_connect(url);
    flags = fcntl(fd, F_GETFL);
    wire_request(&w, "Add", 1, 1, 0);
    wire_request(&w, "Nothing", 2, 1, 0);
    wire_request(&w, "Meta", 3, 1, 0);
    if (plan->guarded) {
        wire_request_fields(&w, "Add", 5, "\x08\x01", 2, 0, fields);
        wire_request_fields(&w, "Add", 6, "\x08\x01", 2, 0, fields);
    }
    ro.attachment = 9000;
    wire_request_body(&w, "dyn.Echo", "Pass", 4, bytes, 9000, &ro);
    wire_send(fd, w.p, 30);
    for (i = 0; i < 3; i++)
        assert_int_equal(crpc_loop_step(crpc_server_loop(s), 0), CRPC_OK);
    wire_send(fd, w.p + 30, w.n - 30);
    wire_free(&w);
    /* every request gets a reply, or the connection ends */
    for (until = ct_now_ms() + NET_PATIENCE; got < (plan->guarded ? 6 : 4);) {
        char c;
        ssize_t n;
        assert_int_equal(crpc_loop_step(crpc_server_loop(s), 1), CRPC_OK);
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
        n = recv(fd, &c, 1, MSG_PEEK);
        fcntl(fd, F_SETFL, flags);
        if (n < 0 && errno == EAGAIN) {
            if (ct_now_ms() > until)
                fail_msg("poller %d, %d workers: no reply and no end", (int)plan->poller,
                         plan->workers);
            continue;
        }
        if (n <= 0 || wire_receive(fd, &m) != 1) {
            status = CRPC_ENOMEM;
            break;
        }
        if (m.code == CRPC_ELIMIT || m.code == CRPC_EINTERNAL || m.code == CRPC_ENOMEM ||
            m.code == CRPC_EAUTH) /* no memory to ask */
            status = CRPC_ENOMEM;
        else
            assert_true(m.code == 0 || m.code == CRPC_ENOMETHOD);
        wire_done(&m);
        got++;
    }
    close(fd);
    crpc_server_close(s);
    free(bytes);
    return status;
}

static void servers_survive_being_out_of_memory(void **state)
{
    server_plan plan;
    (void)state;
    NET_EACH_POLLER(plan.poller)
    for (plan.workers = 0; plan.workers < 2; plan.workers++) {
        plan.guarded = false;
        assert_true(ct_sweep(server_scenario, &plan) > 10);
        plan.guarded = true;
        assert_true(ct_sweep(server_scenario, &plan) > 20);
    }
}

/* Steps until nothing happens at the present time. */
static void settle(pump *u)
{
    int i;
    for (i = 0; i < 10; i++)
        assert_int_equal(crpc_loop_step(u->loop, 0), CRPC_OK);
}

static void an_old_connection_is_closed_when_it_is_idle(void **state)
{
    enum { IDLE = 20 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        wire w = {NULL, 0, 0};
        pump u;
        int busy, idle[IDLE], i;
        memset(&o, 0, sizeof o);
        o.max_connection_age_ms = 10000;
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS);
        pump_open(&u, p, WAY_TCP, &o);
        busy = pump_connect(&u, WAY_TCP);
        wire_request(&w, "Defer", 1, 1, 0);
        pump_send(&u, busy, w.p, w.n);
        wire_free(&w);
        PUMP_UNTIL(&u, net_held(&u.service) == 1);
        for (i = 0; i < IDLE; i++)
            idle[i] = pump_connect(&u, WAY_TCP);
        net_time_add(8990);
        settle(&u);
        assert_int_equal(pump_stats(&u).connections, IDLE + 1);
        net_time_add(1010); /* half of them are older than their age, some more or less */
        settle(&u);
        assert_in_range(pump_stats(&u).connections, 2, IDLE);
        net_time_add(1010);
        settle(&u);
        assert_int_equal(pump_stats(&u).connections, 1);
        net_time_add(60000);
        settle(&u);
        assert_int_equal(pump_stats(&u).connections, 1);
        assert_int_equal(crpc_context_finish(net_take(&u.service), CRPC_OK), CRPC_OK);
        settle(&u);
        expect_reply(busy, 1, 2);
        net_time_add(200);
        settle(&u);
        expect_end(&u, busy);
        assert_int_equal(pump_stats(&u).closed_old, IDLE + 1);
        net_time_run();
        close(busy);
        for (i = 0; i < IDLE; i++)
            close(idle[i]);
        pump_close(&u);
    }
}

/* An old connection of a crpc peer ends by a farewell that does not speak of a stop: what is in
 * service, and what comes before the peer has seen it, is answered. The server shuts it when it has
 * been quiet for long, if the peer does not. */
static void an_old_connection_of_a_crpc_peer_ends_by_farewell(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", NULL};
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        wire w = {NULL, 0, 0};
        wire_message got;
        pump u;
        char text[64];
        int fd, round;
        memset(&o, 0, sizeof o);
        o.max_connection_age_ms = 10000;
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS);
        pump_open(&u, p, WAY_TCP, &o);
        fd = pump_connect(&u, WAY_TCP);
        wire_request_fields(&w, "Defer", 1, "\x08\x01", 2, 0, fields);
        pump_send(&u, fd, w.p, w.n);
        wire_free(&w);
        PUMP_UNTIL(&u, net_held(&u.service) == 1);
        net_time_add(11000);
        settle(&u);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, -1);
        assert_int_equal(got.code, CRPC_ELOGOFF);
        assert_true(wire_field(&got, "crpc-farewell", text, sizeof text));
        assert_string_equal(text, "2");
        wire_done(&got);
        wire_request(&w, "Add", 2, 2, 0);
        pump_send(&u, fd, w.p, w.n);
        wire_free(&w);
        settle(&u);
        expect_reply(fd, 2, 3);
        net_time_add(60000);
        settle(&u);
        assert_int_equal(pump_stats(&u).connections, 1);
        assert_int_equal(crpc_context_finish(net_take(&u.service), CRPC_OK), CRPC_OK);
        settle(&u);
        expect_reply(fd, 1, 2);
        for (round = 0; round < 10; round++) { /* once more to see it at work, then quiet */
            net_time_add(1000);
            settle(&u);
        }
        expect_end(&u, fd);
        assert_int_equal(pump_stats(&u).connections, 0);
        assert_int_equal(pump_stats(&u).closed_old, 1);
        net_time_run();
        close(fd);
        pump_close(&u);
    }
}

/* A peer whose first request waits in the kernel may speak any protocol: srpc would take a farewell
 * for the reply. */
static void a_request_that_was_not_read_yet_gets_its_reply_first(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire w = {NULL, 0, 0};
        crpci_conn *c;
        pump u;
        int fd;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, WAY_TCP);
        c = CRPCI_CONTAINER(u.loop->conns.next, crpci_conn, link);
        wire_request(&w, "Add", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(crpci_conn_unread(c), NET_PATIENCE));
        crpci_loop_lock(u.loop);
        crpci_intake_part(u.server, c, crpci_loop_now(u.loop));
        crpci_loop_unlock(u.loop);
        settle(&u);
        expect_reply(fd, 1, 2);
        close(fd);
        pump_close(&u);
    }
}

/* Whether all that was sent over the first connection has been acknowledged. */
static bool first_is_idle(pump *u)
{
    bool idle;
    crpci_loop_lock(u->loop);
    idle = crpci_conn_idle(CRPCI_CONTAINER(u->loop->conns.next, crpci_conn, link));
    crpci_loop_unlock(u->loop);
    return idle;
}

/* A peer that says it is crpc, and goes on using an old connection after the farewell. */
static void an_old_connection_is_not_kept_by_using_it(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", NULL};
    crpc_server_options o;
    wire w = {NULL, 0, 0};
    pump u;
    int fd, i;
    (void)state;
    memset(&o, 0, sizeof o);
    o.max_connection_age_ms = 10000;
    o.quiet_ms = 5000;
    o.loops.hooks.clock_us = net_clock_us;
    net_time_begin(NET_TIME_STANDS);
    pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
    fd = pump_connect(&u, WAY_TCP);
    wire_request_fields(&w, "Add", 0, "\x08\x01", 2, 0, fields);
    pump_send(&u, fd, w.p, w.n);
    wire_free(&w);
    net_time_add(11000);
    settle(&u);
    for (i = 1; i < 20 && pump_stats(&u).connections; i++) {
        wire_request(&w, "Add", i, i, 0);
        pump_send(&u, fd, w.p, w.n);
        wire_free(&w);
        PUMP_UNTIL(&u, first_is_idle(&u));
        net_time_add(1000);
        settle(&u);
    }
    assert_in_range(i, 8, 12); /* ten seconds after the farewell, but for jitter */
    net_time_run();
    close(fd);
    pump_close(&u);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(an_old_connection_is_closed_when_it_is_idle),
        CT_TEST(a_large_reply_counts_as_several_requests),
        CT_TEST(an_old_connection_of_a_crpc_peer_ends_by_farewell),
        CT_TEST(an_old_connection_is_not_kept_by_using_it),
        CT_TEST(a_request_that_was_not_read_yet_gets_its_reply_first),
        CT_TEST(names_and_codes_are_brpcs),
        CT_TEST(missing_handlers_are_missing_methods),
        CT_TEST(unsupported_requests_are_refused_with_the_reason),
        CT_TEST(an_attachment_lies_within_the_body),
        CT_TEST(server_interceptors_run_in_order),
        CT_TEST(workers_run_handlers_beside_each_other),
        CT_TEST(a_full_worker_queue_refuses_requests),
        CT_TEST(a_host_cannot_take_all_of_max_concurrency),
        CT_TEST(late_requests_are_answered_but_not_run),
        CT_TEST(a_request_received_in_part_gets_elogoff),
        CT_TEST(idle_workers_do_not_fill_the_queue),
        CT_TEST(servers_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
