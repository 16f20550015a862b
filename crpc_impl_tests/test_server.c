#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"

/* Sends one request by hand and returns the reply's code; its words in text. */
static int64_t ask(int fd, const char *service, const char *method, int64_t id,
                   const wire_request_options *o, char *text)
{
    wire w = {NULL, 0, 0};
    wire_message m;
    int64_t code;
    wire_request_body(&w, service, method, id, "\x08\x05", 2, o);
    assert_true(wire_flush(fd, &w));
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.id, id);
    code = m.code;
    if (code)
        assert_int_equal(m.body_size, 0);
    if (text)
        strcpy(text, m.text);
    wire_done(&m);
    return code;
}

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
            assert_int_equal(ask(fd, cases[i].service, cases[i].method, (int64_t)i, NULL, text),
                             cases[i].code);
            assert_string_equal(text, cases[i].says);
        }
        assert_int_equal(net_calls(&n.service), 2);
        close(fd);
        net_close(&n);
    }
}

static void services_are_added_once_and_before_the_start(void **state)
{
    static const crpc_service same = {"dyn.Echo", NULL, 0}, short_same = {"else.Echo", NULL, 0},
                              other = {"else.Other", NULL, 0}, late = {"Late", NULL, 0},
                              nameless = {NULL, NULL, 0};
    net n;
    int fd;
    crpc_server *s;
    crpc_server_options o;
    (void)state;
    memset(&n, 0, sizeof n);
    memset(&o, 0, sizeof o);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &same, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_add(s, &short_same, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_add(s, &other, NULL, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &nameless, NULL, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_server_add(s, NULL, NULL, NULL), CRPC_EINVAL);
    {
        crpc_error error;
        assert_int_equal(crpc_server_start(s, &error), CRPC_EINVAL);
        assert_string_equal(error.text, "nothing to listen on: set options.listen");
    }
    crpc_server_close(s);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    assert_int_equal(crpc_server_add(n.server, &late, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_start(n.server, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_listen(n.server, "tcp://127.0.0.1:0", NULL), CRPC_EBUSY);
    fd = wire_connect(n.url);
    assert_int_equal(ask(fd, "Late", "X", 1, NULL, NULL), CRPC_ENOSERVICE);
    close(fd);
    net_close(&n);
}

/* A NULL in the struct of handlers is a method that is not there. */
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
    assert_int_equal(ask(fd, "Echo", "Add", 1, NULL, NULL), CRPC_OK);
    assert_int_equal(ask(fd, "Echo", "Get", 2, NULL, NULL), CRPC_ENOMETHOD);
    close(fd);
    crpc_server_close(s);
}

static void what_is_not_supported_is_refused_by_name(void **state)
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
        assert_int_equal(ask(fd, "Echo", "Add", 1, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "compress_type 1 is not supported; send uncompressed");
        memset(&o, 0, sizeof o);
        o.content = 1;
        assert_int_equal(ask(fd, "Echo", "Add", 2, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "content_type 1 is not supported; send protobuf");
        memset(&o, 0, sizeof o);
        o.checksum = 1;
        assert_int_equal(ask(fd, "Echo", "Add", 3, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "checksum_type 1 is not supported; send none");
        memset(&o, 0, sizeof o);
        o.stream = 1;
        assert_int_equal(ask(fd, "Echo", "Add", 4, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "streaming is not supported");
        memset(&o, 0, sizeof o);
        o.chunk = 1;
        assert_int_equal(ask(fd, "Echo", "Add", 5, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "chunked bodies are not supported; send one frame");
        memset(&o, 0, sizeof o);
        o.attachment = 3;
        assert_int_equal(ask(fd, "Echo", "Add", 6, &o, text), CRPC_EREQUEST);
        assert_string_equal(text, "attachment_size 3 is larger than the body's 2 bytes");
        o.attachment = -1;
        assert_int_equal(ask(fd, "Echo", "Add", 7, &o, text), CRPC_EREQUEST);
        o.attachment = 2; /* an empty request with an attachment */
        assert_int_equal(ask(fd, "Echo", "Add", 8, &o, text), CRPC_OK);
        o.attachment = 1; /* leaves one byte that is no message */
        assert_int_equal(ask(fd, "Echo", "Add", 9, &o, text), CRPC_EREQUEST);
        assert_non_null(strstr(text, "dyn.Echo.Add: request does not decode: "));
        assert_int_equal(net_calls(&n.service), 1);
        close(fd);
        net_close(&n);
    }
}

/* --- statuses ----------------------------------------------------------------------------------
 */

static void statuses_reach_the_caller(void **state)
{
    static const struct {
        int64_t returned;
        const char *words;
        int status, app_code;
        const char *says;
    } cases[] = {
        {CRPC_EAUTH, "token expired", CRPC_EAUTH, 0, "EAUTH 1004: token expired (remote)"},
        {CRPC_EAUTH, "", CRPC_EAUTH, 0, "EAUTH 1004: not authenticated (remote)"},
        {CRPC_ELIMIT, "", CRPC_ELIMIT, 0, "ELIMIT 2004: concurrency limit reached (remote)"},
        {30000, "own", CRPC_EAPP, 30000, "application error 30000: own (remote)"},
        {-5, "minus", CRPC_EAPP, -5, "application error -5: minus (remote)"},
        {7, "", CRPC_EINTERNAL, 0, "the handler returned 7, which is no crpc_status (remote)"},
    };
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i;
        int64_t code;
        dyn_Num in = dyn_Num_init_zero, out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (i = 0; i < sizeof cases / sizeof *cases; i++) {
            in.n = cases[i].returned;
            strcpy(in.tag, cases[i].words);
            assert_int_equal(dyn_Echo_Status(n.channel, &in, &out, &call), cases[i].status);
            assert_int_equal(call.error.app_code, cases[i].app_code);
            assert_true(call.error.remote);
            if (!strstr(call.error.text, cases[i].says))
                fail_msg("%s", call.error.text);
        }
        /* an application's own codes: what is reserved is refused */
        strcpy(in.tag, "own words");
        for (code = -3; code<5000; code += code> 210 && code < 990 ? 77 : code > 1010 ? 97 : 1) {
            bool reserved = (code >= 0 && code <= 199) || (code >= 1000 && code <= 3999);
            in.n = code;
            assert_int_equal(dyn_Echo_Fail(n.channel, &in, &out, &call),
                             reserved ? CRPC_EINTERNAL : CRPC_EAPP);
            assert_int_equal(call.error.app_code, reserved ? 0 : code);
            assert_non_null(strstr(call.error.text, reserved ? "is reserved" : ": own words"));
        }
        crpc_call_reset(&call);
        net_close(&n);
    }
}

/* --- deferred replies ---------------------------------------------------------------------------
 */

static void *finish_held(void *arg)
{
    net_service *s = (net_service *)arg;
    int i;
    for (i = 0; i < 10; i++) {
        crpc_context *x;
        if (!CT_WAIT(net_held(s) > 0, NET_PATIENCE))
            return NULL;
        x = net_take(s);
        ((dyn_Num *)crpc_context_response(x))->ms = 4711;
        if (crpc_context_finish(x, CRPC_OK) != CRPC_OK)
            return NULL;
    }
    return s;
}

static void replies_may_come_later_from_any_thread(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        pthread_t thread;
        void *all = NULL;
        int i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        assert_int_equal(pthread_create(&thread, NULL, finish_held, &n.service), 0);
        for (i = 0; i < 10; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            assert_int_equal(dyn_Echo_Defer(n.channel, &in, &out, NULL), CRPC_OK);
            assert_int_equal(out.n, i + 1);
            assert_int_equal(out.ms, 4711);
        }
        pthread_join(thread, &all);
        assert_non_null(all);
        net_close(&n);
    }
}

static int finish_at_once(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    out->n = in->n * 2;
    assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
    return CRPC_EPENDING; /* the context is gone already */
}

static void a_reply_may_be_finished_before_the_handler_returns(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_poller p;
    int workers;
    (void)state;
    handlers.Add = finish_at_once;
    NET_EACH_POLLER(p) for (workers = 0; workers < 2; workers++)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_channel *ch;
        char url[160];
        int i;
        memset(&o, 0, sizeof o);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.workers = workers;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        ch = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 50; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, NULL), CRPC_OK);
            assert_int_equal(out.n, 2 * i);
        }
        crpc_channel_close(ch);
        crpc_server_close(s);
    }
}

static uint32_t server_connections(crpc_server *s)
{
    crpc_loop_stats stats;
    crpc_server_stats_get(s, &stats);
    return stats.connections;
}

static void replies_to_peers_that_left(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        crpc_context *x;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 30;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        wire_request(&w, "Defer", 2, 2, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
        wire_reset(fd);
        assert_true(CT_WAIT(server_connections(n.server) == 0, NET_PATIENCE));
        x = net_take(&n.service); /* workers may have begun with either */
        assert_in_range(((dyn_Num *)crpc_context_response(x))->n, 2, 3);
        assert_non_null(crpc_context_alloc(x, 100));
        assert_string_equal(crpc_context_method(x)->name, "Defer");
        assert_string_equal(crpc_context_peer(x), "");
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        /* the other one outlives the server */
        x = net_take(&n.service);
        net_close(&n);
        assert_int_equal(crpc_context_finish(x, CRPC_EINTERNAL), CRPC_EGONE);
    }
}

/* --- the context --------------------------------------------------------------------------------
 */

static char *alloc_kept[8];

static int alloc_much(crpc_context *x, const dyn_Blob *in, dyn_Blob *out)
{
    static crpc_view items[4];
    size_t i, k;
    (void)in;
    for (i = 0; i < 4; i++) {
        size_t size = (size_t)1 << (4 + 4 * i);
        char *p = (char *)crpc_context_alloc(x, size);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % 8, 0);
        for (k = 0; k < size; k++)
            assert_int_equal(p[k], 0);
        memset(p, 'a' + (int)i, size);
        items[i] = crpc_view_of(p, size);
        alloc_kept[i] = p;
    }
    out->data = items[3];
    out->items = crpc_views_of(items, 4);
    return CRPC_OK;
}

static void context_memory_lives_until_the_reply(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o;
    crpc_server *s;
    crpc_channel *ch;
    char url[160];
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    const void *cursor = NULL;
    crpc_view item;
    size_t i, size = 16;
    (void)state;
    handlers.Pass = alloc_much;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    ch = net_channel(url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Pass(ch, &in, &out, &call), CRPC_OK);
    for (i = 0; crpc_views_next(&out.items, &cursor, &item); i++, size *= 16) {
        assert_int_equal(crpc_view_size(item), size);
        assert_int_equal(crpc_view_data(item)[size - 1], 'a' + (int)i);
    }
    assert_int_equal(i, 4);
    crpc_call_reset(&call);
    crpc_channel_close(ch);
    crpc_server_close(s);
}

static int tell_peer(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    (void)in;
    snprintf(out->tag, sizeof out->tag, "%s", crpc_context_peer(x));
    out->n = crpc_context_remaining_us(x) == INT64_MAX;
    out->ms = crpc_view_data(crpc_context_attachment(x)) == NULL &&
              crpc_view_data(crpc_context_credential(x)) == NULL &&
              crpc_context_user(x) == (void *)alloc_kept;
    return CRPC_OK;
}

static void the_context_tells_about_the_request(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o;
    crpc_server *s;
    wire w = {NULL, 0, 0};
    wire_message m;
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    char url[160], expected[64];
    int fd;
    (void)state;
    handlers.Add = tell_peer;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, alloc_kept), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    fd = wire_connect(url);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    snprintf(expected, sizeof expected, "127.0.0.1:%d", ntohs(a.sin_port));
    wire_request(&w, "Add", 1, 1, 0);
    assert_true(wire_flush(fd, &w));
    assert_int_equal(wire_receive(fd, &m), 1);
    /* n 1, ms 1, tag: the address */
    assert_int_equal(m.body_size, 4 + 2 + strlen(expected));
    assert_memory_equal(m.body, "\x08\x01\x10\x01\x1a", 5);
    assert_memory_equal(m.body + 6, expected, strlen(expected));
    wire_done(&m);
    close(fd);
    crpc_server_close(s);
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

/* --- workers ------------------------------------------------------------------------------------
 */

static void workers_run_handlers_beside_each_other(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        crpc_id ids[4];
        int i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_WORKERS);
        for (i = 0; i < 4; i++) {
            dyn_Num in = net_num(i);
            in.ms = 60;
            assert_int_equal(dyn_Echo_Add_begin(n.channel, &in, &ids[i], NULL), CRPC_OK);
        }
        for (i = 0; i < 4; i++) {
            dyn_Num out = dyn_Num_init_zero;
            assert_int_equal(crpc_channel_wait(n.channel, ids[i], -1), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_fetch(n.channel, ids[i], &out, NULL), CRPC_OK);
            assert_int_equal(out.n, i + 1);
        }
        assert_int_equal(n.service.peak, 2);
        net_close(&n);
    }
}

static void a_full_worker_queue_is_said(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message m;
        int fd, i, good = 0, limited = 0;
        memset(&n, 0, sizeof n);
        n.server_options.workers = 1;
        n.server_options.worker_queue = 3;
        net_open(&n, p, NET_WORKERS);
        fd = wire_connect(n.url);
        wire_request(&w, "Add", 0, 0, 300);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_calls(&n.service) == 1, NET_PATIENCE));
        for (i = 1; i <= 10; i++)
            wire_request(&w, "Add", i, i, 0);
        assert_true(wire_flush(fd, &w));
        for (i = 0; i <= 10; i++) {
            assert_int_equal(wire_receive(fd, &m), 1);
            good += m.code == 0;
            limited += m.code == CRPC_ELIMIT;
            if (m.code)
                assert_string_equal(m.text, "too many requests wait for a worker (worker_queue)");
            wire_done(&m);
        }
        assert_int_equal(good, 4);
        assert_int_equal(limited, 7);
        assert_int_equal(net_calls(&n.service), 4);
        net_check_add(n.channel, 1); /* there is room again */
        close(fd);
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
        assert_string_equal(m.text, "deadline passed before it was executed");
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

/* --- stopping -----------------------------------------------------------------------------------
 */

static void stopping_finishes_what_runs_and_refuses_the_rest(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        struct sockaddr_in a;
        int fd, fresh, tries;
        bool refused;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        crpc_server_stop(n.server);
        crpc_server_stop(n.server);
        /* nobody new is let in; a poll that still sleeps on the listener delays that a little */
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons((uint16_t)atoi(strrchr(n.url, ':') + 1));
        for (tries = 0, refused = false; tries < 1000 && !refused; tries++) {
            fresh = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            refused = connect(fresh, (struct sockaddr *)&a, sizeof a) != 0 && errno == ECONNREFUSED;
            close(fresh);
            ct_sleep_ms(refused ? 0 : 5);
        }
        assert_true(refused);
        wire_request(&w, "Add", 2, 2, 0);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, 2);
        assert_int_equal(got.code, CRPC_ELOGOFF);
        wire_done(&got);
        assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, 1);
        assert_int_equal(got.code, 0);
        wire_done(&got);
        assert_int_equal(wire_receive(fd, &got), 0); /* and then the end */
        assert_int_equal(net_calls(&n.service), 1);
        close(fd);
        net_close(&n);
    }
}

static uint32_t clock_ahead_s; /* atomic */

static int64_t clock_ahead(void *user)
{
    (void)user;
    return ct_now_us() + (int64_t)__atomic_load_n(&clock_ahead_s, __ATOMIC_SEQ_CST) * 1000000;
}

static void nothing(void *user)
{
    (void)user;
}

/* Puts the server's clock forward and has its loop look at it. */
static void time_passes(crpc_loop *l, uint32_t seconds)
{
    __atomic_add_fetch(&clock_ahead_s, seconds, __ATOMIC_SEQ_CST);
    assert_int_equal(crpc_loop_post(l, nothing, NULL), CRPC_OK);
}

static bool can_connect(const char *url)
{
    struct sockaddr_in a;
    bool can;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1));
    can = connect(fd, (struct sockaddr *)&a, sizeof a) == 0;
    close(fd);
    return can;
}

static void *close_net(void *arg)
{
    net_close((net *)arg);
    return NULL;
}

/* Serving goes on for the first 1000 s, then new requests are refused for another 1000 s though
 * somebody goes on sending them, then it is over though one was not finished. */
static void stopping_serves_then_refuses_then_closes(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        pthread_t closer;
        crpc_context *x;
        int fd, fresh;
        memset(&n, 0, sizeof n);
        n.clock_us = clock_ahead;
        n.server_options.lame_ms = n.server_options.drain_ms = 1000000;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        x = net_take(&n.service);
        crpc_server_stop(n.server);
        time_passes(n.loop, 900);
        crpc_server_stop(n.server); /* begins nothing anew */
        assert_int_equal(ask(fd, "Echo", "Add", 2, NULL, NULL), CRPC_OK);
        fresh = wire_connect(n.url);
        assert_int_equal(ask(fresh, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        time_passes(n.loop, 100);
        assert_true(CT_WAIT(!can_connect(n.url), NET_PATIENCE));
        assert_int_equal(ask(fresh, "Echo", "Add", 4, NULL, NULL), CRPC_ELOGOFF);
        time_passes(n.loop, 900);
        assert_int_equal(ask(fresh, "Echo", "Add", 5, NULL, NULL), CRPC_ELOGOFF);
        assert_int_equal(pthread_create(&closer, NULL, close_net, &n), 0);
        assert_int_equal(ask(fresh, "Echo", "Add", 6, NULL, NULL), CRPC_ELOGOFF); /* it waits */
        __atomic_add_fetch(&clock_ahead_s, 100, __ATOMIC_SEQ_CST);
        assert_int_equal(wire_receive(fd, &got), 0);
        assert_int_equal(wire_receive(fresh, &got), 0);
        pthread_join(closer, NULL);
        assert_int_equal(n.service.calls, 3);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        close(fd);
        close(fresh);
    }
}

static void *run_server(void *arg)
{
    assert_int_equal(crpc_server_run((crpc_server *)arg), CRPC_OK);
    return NULL;
}

/* As on SIGTERM: the loop is told to stop, and crpc_server_run sees to the rest. */
static void run_serves_on_when_its_loop_was_stopped(void **state)
{
    crpc_poller p;
    int io_threads;
    (void)state;
    NET_EACH_POLLER(p) for (io_threads = 0; io_threads < 3; io_threads += 2)
    {
        crpc_server_options o;
        crpc_server *s;
        net_service service;
        pthread_t runner;
        char url[160];
        int fd;
        memset(&o, 0, sizeof o);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.loops.hooks.clock_us = clock_ahead;
        o.io_threads = io_threads;
        o.lame_ms = 1000000;
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        assert_int_equal(pthread_create(&runner, NULL, run_server, s), 0);
        fd = wire_connect(url);
        assert_int_equal(ask(fd, "Echo", "Add", 1, NULL, NULL), CRPC_OK);
        crpc_loop_stop(crpc_server_loop(s));
        assert_true(CT_WAIT(crpci_thread_load(&s->state) == CRPCI_SERVER_LAME, NET_PATIENCE));
        assert_int_equal(ask(fd, "Echo", "Add", 2, NULL, NULL), CRPC_OK);
        close(fd);
        fd = wire_connect(url);
        assert_int_equal(ask(fd, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        time_passes(crpc_server_loop(s), 1000);
        pthread_join(runner, NULL);
        close(fd);
        crpc_server_close(s);
    }
}

/* Who closes a server waits for it, driving the loop if nobody does; but with nothing to drain not
 * for drain_ms. */
static void closing_waits_for_the_end_of_serving(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 3; how++)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_loop *l = net_loop(p);
        int64_t start;
        memset(&o, 0, sizeof o);
        o.loop = l;
        o.loops = net_loop_options(p);
        o.listen = "tcp://127.0.0.1:0";
        o.lame_ms = how == 2 ? -1 : 60;
        o.io_threads = how == 1 ? 2 : 0;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        start = ct_now_ms();
        crpc_server_close(s);
        assert_true(how == 2 || ct_now_ms() - start >= 59);
        assert_true(ct_now_ms() - start < 4000); /* of the 5000 of drain_ms */
        crpc_loop_close(l);
    }
}

static void draining_is_bounded(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        crpc_context *x;
        int64_t start;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 80;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        x = net_take(&n.service);
        start = ct_now_ms();
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(fd, &got), 0);
        assert_true(ct_now_ms() - start >= 79);
        close(fd);
        net_close(&n);
        assert_true(ct_now_ms() - start < 15000);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
    }
}

/* A blocked handler on a worker or on the loop's own thread: closing waits for the thread, not for
 * ever, and frees nothing that it still uses. */
static void closing_with_handlers_that_block(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        int fd, i;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 10;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 4; i++)
            wire_request(&w, "Add", i, i, 60);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_calls(&n.service) >= 1, NET_PATIENCE));
        net_close(&n);
        assert_in_range(n.service.calls, 1, 4);
        close(fd);
    }
}

static void *stop_soon(void *arg)
{
    ct_sleep_ms(30);
    crpc_server_stop((crpc_server *)arg);
    return NULL;
}

static crpc_loop *loop_of_signal;

static void on_signal(int number)
{
    (void)number;
    crpc_loop_stop(loop_of_signal);
}

static void *signal_soon(void *arg)
{
    ct_sleep_ms(30);
    pthread_kill(*(pthread_t *)arg, SIGUSR1);
    return NULL;
}

static void run_returns_when_stopped(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 4; how++)
    {
        crpc_server_options o;
        crpc_server *s;
        net_service service;
        pthread_t thread, self = pthread_self();
        char url[160];
        memset(&o, 0, sizeof o);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.io_threads = how == 3 ? 2 : 0;
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 1, url, sizeof url), CRPC_ENOTFOUND);
        loop_of_signal = crpc_server_loop(s);
        if (how == 0 || how == 3) {
            assert_int_equal(pthread_create(&thread, NULL, stop_soon, s), 0);
        } else if (how == 1) {
            signal(SIGUSR1, on_signal);
            assert_int_equal(pthread_create(&thread, NULL, signal_soon, &self), 0);
        } else {
            crpc_server_stop(s); /* before it has begun */
        }
        assert_int_equal(crpc_server_run(s), CRPC_OK);
        if (how != 2)
            pthread_join(thread, NULL);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_EBUSY);
        crpc_server_close(s);
        signal(SIGUSR1, SIG_DFL);
    }
}

static void closing_in_every_state(void **state)
{
    crpc_poller p;
    (void)state;
    crpc_server_close(NULL);
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_loop *l = net_loop(p);
        int64_t start = ct_now_ms();
        memset(&o, 0, sizeof o);
        o.loop = l;
        o.listen = "tcp://127.0.0.1:0";
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        crpc_server_close(s); /* never started */
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        crpc_server_close(s); /* never driven */
        o.io_threads = 2;
        o.workers = 2;
        o.loops = net_loop_options(p);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        crpc_server_stop(s);
        crpc_server_close(s);
        assert_true(ct_now_ms() - start < 4000); /* nothing to wait for, so no drain_ms */
        crpc_loop_close(l);
    }
}

/* Half a request is there when the server begins to stop: its sender is told. */
static void a_request_that_was_coming_is_told(void **state)
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
    ct_sleep_ms(50);
    crpc_server_stop(n.server);
    ct_sleep_ms(100); /* some looks at whether draining is done */
    assert_true(wire_send(fd, w.p + w.n / 2, w.n - w.n / 2));
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.code, CRPC_ELOGOFF);
    wire_done(&m);
    wire_free(&w);
    close(fd);
    net_close(&n);
}

static int too_late;

static void never_after(void *user, crpc_context *x, int status)
{
    (void)user;
    (void)x;
    (void)status;
    too_late++;
}

/* What was lent to a server is not used any more by a request that is finished behind its end. */
static void nothing_lent_is_used_after_the_close(void **state)
{
    crpc_server_interceptor *lent = (crpc_server_interceptor *)calloc(1, sizeof *lent);
    wire w = {NULL, 0, 0};
    crpc_context *x;
    net n;
    int fd;
    (void)state;
    assert_non_null(lent);
    lent->after = never_after;
    memset(&n, 0, sizeof n);
    n.server_options.drain_ms = -1;
    n.server_options.interceptors = lent;
    n.server_options.interceptor_count = 1;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    wire_request(&w, "Defer", 1, 1, 0);
    assert_true(wire_flush(fd, &w));
    assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
    x = net_take(&n.service);
    net_close(&n);
    free(lent);
    too_late = 0;
    assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
    assert_int_equal(too_late, 0);
    close(fd);
}

static crpc_server *server_of_handler;
static crpc_channel *nested_channel;

static int closes_its_server(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    (void)x;
    crpc_server_close(server_of_handler); /* takes effect when this has been answered */
    out->n = in->n + 1;
    return CRPC_OK;
}

static void a_handler_may_close_its_server(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_poller p;
    int how;
    (void)state;
    handlers.Add = closes_its_server;
    NET_EACH_POLLER(p) for (how = 0; how < 3; how++)
    {
        crpc_server_options o;
        crpc_channel *ch;
        char url[160];
        memset(&o, 0, sizeof o);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.io_threads = how == 1;
        o.workers = how == 2;
        assert_int_equal(crpc_server_open(&server_of_handler, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(server_of_handler, &dyn_Echo, &handlers, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(server_of_handler, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(server_of_handler)), CRPC_OK);
        assert_int_equal(crpc_server_address(server_of_handler, 0, url, sizeof url), CRPC_OK);
        ch = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
        net_check_add(ch, 1);
        crpc_channel_close(ch);
        assert_true(CT_WAIT(ct_alloc_of_test()->live_blocks == 0, 20000));
    }
}

static void stop_loop(void *user)
{
    crpc_loop_stop((crpc_loop *)user);
}

static void close_from_timer(void *user)
{
    crpc_server_close((crpc_server *)user);
}

/* The program's one loop is the server's; with a loop of its own the server outlives nothing. */
static void a_callback_may_close_the_server(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 4; how++)
    {
        bool own = how & 1, stopped = how & 2;
        crpc_loop_options lo = net_loop_options(p);
        crpc_server_options o;
        crpc_server *s;
        crpc_loop *l = NULL;
        memset(&o, 0, sizeof o);
        if (!own)
            assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = lo;
        o.loop = l;
        o.io_threads = how == 3;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_timer_start(crpc_server_loop(s), 20, 0, close_from_timer, s, NULL),
                         CRPC_OK);
        if (stopped && !own) {
            crpc_server_stop(s); /* is over when the timer comes */
            assert_int_equal(crpc_timer_start(l, 100, 0, stop_loop, l, NULL),
                             CRPC_OK);
            assert_int_equal(crpc_loop_run(l), CRPC_OK);
        } else {
            assert_int_equal(crpc_server_run(s), CRPC_OK);
        }
        crpc_loop_close(l);
        assert_int_equal(ct_alloc_of_test()->live_blocks, 0);
    }
}

/* With every worker idle a queue of one takes as many requests as there are workers. */
static int waits_for_all(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    int *inside = (int *)crpc_context_user(x);
    __atomic_add_fetch(inside, 1, __ATOMIC_SEQ_CST);
    (void)CT_WAIT(__atomic_load_n(inside, __ATOMIC_SEQ_CST) >= 8, 20000);
    out->n = in->n + 1;
    return CRPC_OK;
}

static void idle_workers_do_not_fill_the_queue(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o;
    crpc_channel *ch;
    crpc_server *s;
    crpc_id id[8];
    char url[160];
    int inside = 0, i;
    (void)state;
    handlers.Add = waits_for_all;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.workers = 8;
    o.worker_queue = 1;
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, &inside), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    ct_sleep_ms(50); /* until the threads wait for work */
    ch = net_channel(url, "?timeout_ms=30000", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 8; i++) {
        dyn_Num in = dyn_Num_init_zero;
        in.n = i;
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id[i], NULL), CRPC_OK);
    }
    for (i = 0; i < 8; i++) {
        dyn_Num out = dyn_Num_init_zero;
        assert_int_equal(crpc_channel_wait(ch, id[i], -1), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, id[i], &out, NULL), CRPC_OK);
        assert_int_equal(out.n, i + 1);
    }
    crpc_channel_close(ch);
    crpc_server_close(s);
}

/* Connections come in while the server closes. */
static void *connect_in_a_storm(void *arg)
{
    const char *url = (const char *)arg;
    int i;
    for (i = 0; i < 400; i++) {
        struct sockaddr_in a;
        wire w = {NULL, 0, 0};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1));
        if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0) {
            wire_request(&w, "Add", i, i, 0);
            wire_flush(fd, &w);
            if (i % 2)
                wire_reset(fd);
            else
                close(fd);
        } else {
            close(fd);
            break;
        }
    }
    return NULL;
}

static void closing_in_a_storm_of_connections(void **state)
{
    crpc_poller p;
    net_mode m;
    int round;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (round = 0; round < 8; round++)
    {
        net n;
        pthread_t threads[2];
        char url[160];
        int i;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = round % 2 ? -1 : 20;
        net_open(&n, p, m);
        strcpy(url, n.url);
        for (i = 0; i < 2; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, connect_in_a_storm, url), 0);
        ct_sleep_ms(round);
        net_close(&n);
        for (i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
    }
}

/* --- listening ----------------------------------------------------------------------------------
 */

static void several_listeners(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_error error;
        net_service service;
        ct_dir dir = ct_dir_make();
        struct stat st;
        struct sockaddr_in a;
        char urls[5][160], path[100], unix_url[120], abstract_url[60];
        int i, fd = socket(AF_INET, SOCK_STREAM, 0);
        memset(&o, 0, sizeof o);
        snprintf(path, sizeof path, "%s/socket", dir.path);
        snprintf(unix_url, sizeof unix_url, "unix://%s", path);
        snprintf(abstract_url, sizeof abstract_url, "unix://@crpc-test-%ld", (long)getpid());
        o.listen = "tcp://localhost:0";
        o.loops = net_loop_options(p);
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, "tcp://[::1]:0", &error), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, unix_url, &error), CRPC_OK);
        assert_int_equal(crpc_server_listen_fd(s, fd), CRPC_EINVAL); /* does not listen */
        assert_int_equal(crpc_server_listen_fd(s, -1), CRPC_EINVAL);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
        assert_int_equal(listen(fd, 5), 0);
        assert_int_equal(crpc_server_listen_fd(s, fd), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, abstract_url, &error), CRPC_OK);
        assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_start(s, &error), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
        for (i = 0; i < 5; i++) {
            crpc_channel *ch;
            assert_int_equal(crpc_server_address(s, (size_t)i, urls[i], sizeof urls[i]), CRPC_OK);
            ch = net_channel(urls[i], "?timeout_ms=20000", p, NULL, NULL);
            net_check_add(ch, i);
            crpc_channel_close(ch);
        }
        assert_int_equal(crpc_server_address(s, 5, urls[0], sizeof urls[0]), CRPC_ENOTFOUND);
        assert_memory_equal(urls[0], "tcp://127.0.0.1:", 16);
        assert_memory_equal(urls[1], "tcp://[::1]:", 12);
        assert_string_equal(urls[2], unix_url);
        assert_string_equal(urls[4], abstract_url);
        assert_int_equal(stat(path, &st), 0);
        crpc_server_close(s);
        assert_int_equal(stat(path, &st), -1); /* the socket's file is gone */
        ct_dir_remove(dir);
    }
}

static void addresses_that_cannot_be_had_are_explained(void **state)
{
    crpc_server_options o;
    crpc_server *s, *t;
    crpc_error error;
    char url[160], says[300];
    ct_dir dir = ct_dir_make();
    char unix_url[120], stale[100];
    int fd;
    (void)state;
    memset(&o, 0, sizeof o);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = "tcp://127.0.0.1:0";
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    o.listen = url;
    t = s;
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EADDRESS);
    assert_null(t);
    snprintf(says, sizeof says, "%.100s: cannot listen: address already in use (errno %d)", url,
             EADDRINUSE);
    assert_string_equal(error.text, says);
    assert_int_equal(crpc_server_open(&t, &o, NULL), CRPC_EADDRESS);
    o.listen = "tcp://192.0.2.1:80"; /* nobody's, RFC 5737 */
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EADDRESS);
    assert_non_null(strstr(error.text, "no local port or address available"));
    o.listen = "unix:///nonexistent/dir/socket";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EADDRESS);
    o.listen = "list://127.0.0.1:1";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "list://127.0.0.1:1: expected tcp://host:port, unix:///path or "
                                    "unix://@name");
    o.listen = "unix:///";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "unix:///: no path"));
    o.listen = "tcp://[fe80::1%lo]:0";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "an IPv6 address with a scope (%lo) is not supported"));
    o.listen = "tcp://127.0.0.1:0?x=y";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "a listener takes no URL options"));
    o.listen = "tcp://127.0.0.1";
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EINVAL);
    crpc_server_close(s);

    /* a socket file that is in use is left alone; a stale one is replaced */
    snprintf(unix_url, sizeof unix_url, "unix://%s/socket", dir.path);
    o.listen = unix_url;
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
    assert_int_equal(crpc_server_open(&t, &o, &error), CRPC_EADDRESS);
    fd = wire_connect(unix_url); /* still there */
    close(fd);
    crpc_server_close(s);
    {
        struct sockaddr_un a;
        memset(&a, 0, sizeof a);
        a.sun_family = AF_UNIX;
        snprintf(stale, sizeof stale, "%s/socket", dir.path);
        strcpy(a.sun_path, stale);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
        close(fd); /* the file stays */
    }
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
    crpc_server_close(s);
    ct_dir_remove(dir);
}

/* --- limits -------------------------------------------------------------------------------------
 */

static void connections_over_the_limit_are_closed(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int fds[5], i;
        char c;
        memset(&n, 0, sizeof n);
        n.server_options.max_connections = 3;
        net_open(&n, p, m);
        for (i = 0; i < 3; i++) {
            fds[i] = wire_connect(n.url);
            assert_int_equal(ask(fds[i], "Echo", "Add", 1, NULL, NULL), 0);
        }
        for (i = 3; i < 5; i++) {
            fds[i] = wire_connect(n.url);
            assert_true(recv(fds[i], &c, 1, 0) <= 0);
            close(fds[i]);
        }
        assert_int_equal(server_connections(n.server), 3);
        close(fds[0]);
        assert_true(CT_WAIT(server_connections(n.server) == 2, NET_PATIENCE));
        fds[0] = wire_connect(n.url);
        assert_int_equal(ask(fds[0], "Echo", "Add", 1, NULL, NULL), 0);
        for (i = 0; i < 3; i++)
            close(fds[i]);
        assert_true(CT_WAIT(server_connections(n.server) == 0, NET_PATIENCE));
        net_close(&n);
    }
}

static int log_lines;

static void count_lines(void *user, int level, const char *line)
{
    (void)user, (void)level;
    if (strstr(line, "no file descriptors left"))
        log_lines++;
}

/* In a process of its own, whose limit is all used up. */
static int out_of_descriptors(crpc_poller p, const char *listen_url)
{
    crpc_server_options o;
    crpc_server *s;
    crpc_loop *l;
    crpc_loop_options lo;
    crpc_loop_stats before, after;
    net_service service;
    struct rlimit limit;
    char url[160];
    int good, fillers[64], count = 0, client, i;
    pid_t flood;
    int64_t until;
    memset(&o, 0, sizeof o);
    memset(&lo, 0, sizeof lo);
    lo.poller = p;
    lo.hooks.log = count_lines;
    net_service_init(&service);
    if (crpc_loop_open(&l, &lo))
        return 1;
    o.loop = l;
    o.listen = listen_url;
    if (crpc_server_open(&s, &o, NULL) || crpc_server_add(s, &dyn_Echo, &net_handlers, &service) ||
        crpc_server_start(s, NULL) || crpc_server_address(s, 0, url, sizeof url))
        return 2;
    good = wire_connect(url);
    for (i = 0; i < 20; i++) {
        if (crpc_loop_step(l, 1))
            return 3;
    }
    limit.rlim_cur = limit.rlim_max = 40;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        return 4;
    while (count < 64 && (fillers[count] = dup(0)) >= 0)
        count++;
    flood = fork();
    if (flood == 0) {
        int fd;
        for (i = 0; i < count; i++)
            close(fillers[i]);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) { /* as fast as it can */
            struct sockaddr_un a;
            memset(&a, 0, sizeof a);
            a.sun_family = AF_UNIX;
            strcpy(a.sun_path, url + 7);
            fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (connect(fd, (struct sockaddr *)&a, sizeof a))
                sched_yield();
            close(fd);
        }
    }
    ct_sleep_ms(100);
    crpc_loop_stats_get(l, &before);
    for (until = ct_now_ms() + 1000; ct_now_ms() < until;) {
        if (crpc_loop_step(l, 50))
            return 5;
    }
    crpc_loop_stats_get(l, &after);
    if (after.waits - before.waits > 300) /* a spin would be a hundred thousand */
        return 6;
    if (log_lines < 1 || log_lines > 3)
        return 7;
    { /* who is connected is still served */
        wire w = {NULL, 0, 0};
        wire_request(&w, "Add", 1, 1, 0);
        wire_flush(good, &w);
        for (until = ct_now_ms() + 5000; service.calls < 1 && ct_now_ms() < until;) {
            if (crpc_loop_step(l, 10))
                return 8;
        }
        if (service.calls != 1)
            return 9;
    }
    kill(flood, SIGKILL);
    waitpid(flood, NULL, 0);
    for (i = 0; i < count; i++)
        close(fillers[i]);
    for (until = ct_now_ms() + 1000;
         ct_now_ms() < until;) { /* those who gave up are cleared away */
        if (crpc_loop_step(l, 10))
            return 12;
    }
    client = wire_connect(url); /* and with descriptors free again, everybody is served */
    {
        wire w = {NULL, 0, 0};
        wire_request(&w, "Add", 1, 1, 0);
        wire_flush(client, &w);
        for (until = ct_now_ms() + 10000; service.calls < 2 && ct_now_ms() < until;) {
            if (crpc_loop_step(l, 10))
                return 10;
        }
        if (service.calls != 2)
            return 11;
    }
    return 0;
}

static void running_out_of_descriptors_does_not_spin(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        int status;
        ct_dir dir = ct_dir_make();
        char listen_url[100];
        pid_t child;
        snprintf(listen_url, sizeof listen_url, "unix://%s/socket", dir.path);
        child = fork();
        assert_true(child >= 0);
        if (child == 0)
            _exit(out_of_descriptors(p, listen_url));
        waitpid(child, &status, 0);
        ct_dir_remove(dir);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
}

/* --- limits of requests -------------------------------------------------------------------------
 */

/* A request with user_fields: `fields` is key, value, ..., NULL. */
static void put_request(wire *w, const char *method, int64_t id, const char *body, size_t n,
                        int64_t attachment, const char *const *fields)
{
    wire meta = {NULL, 0, 0}, request = {NULL, 0, 0};
    wire_str(&request, 1, "dyn.Echo");
    wire_str(&request, 2, method);
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 4, id);
    if (attachment)
        wire_int(&meta, 5, attachment);
    for (; fields && *fields; fields += 2) {
        wire entry = {NULL, 0, 0};
        wire_str(&entry, 1, fields[0]);
        wire_str(&entry, 2, fields[1]);
        wire_bytes(&meta, 9, entry.p, entry.n);
        wire_free(&entry);
    }
    wire_frame(w, &meta, body, n);
    wire_free(&meta);
    wire_free(&request);
}

static void send_request(int fd, const char *method, int64_t id, const char *body, size_t n,
                         const char *const *fields)
{
    wire w = {NULL, 0, 0};
    put_request(&w, method, id, body, n, 0, fields);
    assert_true(wire_flush(fd, &w));
}

/* Receives the reply to a request; its code. */
static int64_t reply_code(int fd, int64_t id, char *text)
{
    wire_message m;
    int64_t code;
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.id, id);
    code = m.code;
    if (text)
        strcpy(text, m.text);
    wire_done(&m);
    return code;
}

#define GARBAGE "\xff\xff\xff", 3 /* what decodes it says EREQUEST */

static int64_t ask_garbage(int fd, const char *method, char *text)
{
    send_request(fd, method, 99, GARBAGE, NULL);
    return reply_code(fd, 99, text);
}

static void hold(net *n, int fd, int count, const char *const *fields)
{
    int held = net_held(&n->service), i;
    for (i = 0; i < count; i++)
        send_request(fd, "Defer", 1, "\x08\x01", 2, fields);
    assert_true(CT_WAIT(net_held(&n->service) == held + count, NET_PATIENCE));
}

static void let_go(net *n, int fd, int count, int status)
{
    for (; count > 0; count--) {
        assert_int_equal(crpc_context_finish(net_take(&n->service), status), CRPC_OK);
        assert_int_equal(reply_code(fd, 1, NULL), status);
    }
}

static void requests_in_service_are_limited(void **state)
{
    static const crpc_method_limit limits[] = {{"dyn.Echo", "Defer", 2, 0, 0, 0},
                                               {NULL, "Defer", 1, 0, 0, 0},
                                               {"dyn.Echo", NULL, -1, 0, -1, 0}};
    crpc_poller p;
    net_mode m;
    int how;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (how = 0; how < 2; how++)
    {
        const char *says = how ? "too many requests of the method are being served "
                                 "(max_concurrency)"
                               : "too many requests are being served (max_concurrency)";
        int max = how ? 2 : 3, fd, other;
        crpc_loop_stats stats;
        char text[512];
        net n;
        memset(&n, 0, sizeof n);
        if (how) {
            n.server_options.limits = limits;
            n.server_options.limit_count = 3;
        } else {
            n.server_options.max_concurrency = 3;
        }
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        other = wire_connect(n.url);
        hold(&n, fd, max, NULL);
        assert_int_equal(ask_garbage(other, "Defer", text), CRPC_ELIMIT);
        assert_string_equal(text, says);
        assert_int_equal(ask(other, "Echo", "Add", 1, NULL, NULL), how ? CRPC_OK : CRPC_ELIMIT);
        let_go(&n, fd, 1, CRPC_OK);
        assert_true(CT_WAIT(ask_garbage(other, "Defer", NULL) == CRPC_EREQUEST, NET_PATIENCE));
        hold(&n, other, 1, NULL);
        assert_int_equal(ask_garbage(fd, "Defer", NULL), CRPC_ELIMIT);
        crpc_server_stats_get(n.server, &stats);
        assert_true(stats.limited >= 2);
        let_go(&n, fd, max - 1, CRPC_OK);
        let_go(&n, other, 1, CRPC_OK);
        close(fd);
        close(other);
        net_close(&n);
    }
}

static void a_limit_of_nothing_is_an_error(void **state)
{
    crpc_method_limit limit = CRPC_INIT;
    crpc_server_options o;
    crpc_server *s;
    crpc_error error;
    (void)state;
    memset(&o, 0, sizeof o);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = "tcp://127.0.0.1:0";
    o.limits = &limit;
    o.limit_count = 1;
    limit.method = "Ad";
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "a limit is for *.Ad, which is not offered");
    limit.method = "Add";
    assert_int_equal(crpc_server_start(s, &error), CRPC_OK);
    crpc_server_close(s);
}

static uint32_t clock_ms; /* atomic */

/* Stands still but for what a test adds. */
static int64_t clock_stands(void *user)
{
    (void)user;
    return INT64_C(1000000000) + (int64_t)__atomic_load_n(&clock_ms, __ATOMIC_SEQ_CST) * 1000;
}

/* How many of `count` garbage requests are let in. */
static int let_in(int fd, const char *method, int count, const char *says)
{
    int in = 0, i;
    for (i = 0; i < count; i++) {
        char text[512];
        int64_t code = ask_garbage(fd, method, text);
        assert_true(code == CRPC_EREQUEST || code == CRPC_ELIMIT);
        if (code == CRPC_ELIMIT)
            assert_string_equal(text, says);
        in += code == CRPC_EREQUEST;
    }
    return in;
}

static void methods_have_rates(void **state)
{
    static const crpc_method_limit limits[] = {{NULL, "Add", 0, 0, 2, 3}, {NULL, NULL, 0, 0, 1, 0}};
    const char *says = "too many requests of the method in a second (rate)";
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int fd;
        net n;
        memset(&n, 0, sizeof n);
        n.clock_us = clock_stands;
        n.server_options.limits = limits;
        n.server_options.limit_count = 2;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        assert_int_equal(let_in(fd, "Add", 5, says), 3);
        assert_int_equal(let_in(fd, "Fail", 3, says), 1);
        assert_int_equal(let_in(fd, "Pass", 3, says), 1); /* each method its own */
        __atomic_add_fetch(&clock_ms, 500, __ATOMIC_SEQ_CST);
        assert_int_equal(let_in(fd, "Add", 3, says), 1);
        assert_int_equal(let_in(fd, "Fail", 3, says), 0);
        __atomic_add_fetch(&clock_ms, 100000, __ATOMIC_SEQ_CST);
        assert_int_equal(let_in(fd, "Add", 5, says), 3);
        close(fd);
        net_close(&n);
    }
}

static int connect_from(const char *url, const char *host)
{
    struct timeval patience = {NET_PATIENCE / 1000, 0};
    struct sockaddr_in a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    assert_int_equal(inet_pton(AF_INET, host, &a.sin_addr), 1);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1));
    assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

static void clients_have_rates(void **state)
{
    const char *says = "too many requests of this client in a second (rate_per_client)";
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int a, b, c;
        net n;
        memset(&n, 0, sizeof n);
        n.clock_us = clock_stands;
        n.server_options.rate_per_client = 1;
        n.server_options.burst_per_client = 4;
        net_open(&n, p, m);
        a = connect_from(n.url, "127.0.0.1");
        b = connect_from(n.url, "127.0.0.1");
        c = connect_from(n.url, "127.0.0.2");
        assert_int_equal(let_in(a, "Add", 3, says), 3);
        assert_int_equal(let_in(b, "Get", 3, says), 1); /* one client, several connections */
        assert_int_equal(let_in(c, "Add", 6, says), 4);
        close(a);
        close(b);
        assert_true(CT_WAIT(server_connections(n.server) == 1, NET_PATIENCE));
        a = connect_from(n.url, "127.0.0.1"); /* known still */
        assert_int_equal(let_in(a, "Add", 2, says), 0);
        __atomic_add_fetch(&clock_ms, 2000, __ATOMIC_SEQ_CST);
        assert_int_equal(let_in(a, "Add", 4, says), 2);
        close(a);
        close(c);
        net_close(&n);
    }
}

/* The limit begins at 40; when nothing but failures came for 200 samples it is halved. */
static void adaptive_limits_adapt(void **state)
{
    static const crpc_method_limit limits[] = {{NULL, "Defer", 0, 1, 0, 0}};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        char text[512];
        int fd, i;
        net n;
        memset(&n, 0, sizeof n);
        n.clock_us = clock_stands;
        n.server_options.limits = limits;
        n.server_options.limit_count = 1;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        hold(&n, fd, 40, NULL);
        assert_int_equal(ask_garbage(fd, "Defer", text), CRPC_ELIMIT);
        assert_string_equal(text,
                            "too many requests of the method are being served (adaptive)");
        let_go(&n, fd, 40, CRPC_EINTERNAL); /* at one time: one sample */
        for (i = 0; i < 199; i++) {
            hold(&n, fd, 1, NULL);
            __atomic_add_fetch(&clock_ms, 2, __ATOMIC_SEQ_CST);
            let_go(&n, fd, 1, CRPC_EINTERNAL);
        }
        hold(&n, fd, 20, NULL);
        assert_int_equal(ask_garbage(fd, "Defer", NULL), CRPC_ELIMIT);
        let_go(&n, fd, 20, CRPC_OK);
        close(fd);
        net_close(&n);
    }
}

/* --- requests that come again -------------------------------------------------------------------
 */

static void send_again(int fd, const char *method, int64_t id, const char *rid)
{
    const char *fields[] = {"other", "field", "crpc-rid", NULL, NULL};
    fields[3] = rid;
    send_request(fd, method, id, "\x08\x05", 2, fields);
}

static int64_t ask_again(int fd, const char *method, const char *rid, int64_t *n)
{
    wire_message m;
    int64_t code;
    send_again(fd, method, 7, rid);
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.id, 7);
    code = m.code;
    if (n)
        *n = m.n;
    wire_done(&m);
    return code;
}

static void a_repeated_request_is_executed_once(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_loop_stats stats;
        wire_message got;
        crpc_context *x;
        int fd[3], i;
        int64_t sum;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        for (i = 0; i < 3; i++)
            fd[i] = wire_connect(n.url);
        /* one after another */
        for (i = 0; i < 3; i++) {
            assert_int_equal(ask_again(fd[i], "Add", "one", &sum), CRPC_OK);
            assert_int_equal(sum, 6);
        }
        assert_int_equal(net_calls(&n.service), 1);
        /* at the same time */
        for (i = 0; i < 3; i++)
            send_again(fd[i], "Defer", 10 + i, "one"); /* another method's: it is another one */
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        send_again(fd[0], "Defer", 20, "two"); /* another one runs beside it */
        assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
        do { /* until all have come that far */
            ct_sleep_ms(1);
            crpc_server_stats_get(n.server, &stats);
        } while (stats.replayed < 4);
        x = net_take(&n.service);
        ((dyn_Num *)crpc_context_response(x))->n = 4711;
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
        for (i = 0; i < 3; i++) {
            assert_int_equal(wire_receive(fd[i], &got), 1);
            assert_int_equal(got.id, 10 + i);
            assert_int_equal(got.code, 0);
            assert_int_equal(got.n, 4711);
            wire_done(&got);
        }
        assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_EAUTH), CRPC_OK);
        assert_int_equal(reply_code(fd[0], 20, NULL), CRPC_EAUTH);
        /* and later */
        assert_int_equal(ask_again(fd[1], "Defer", "one", &sum), CRPC_OK);
        assert_int_equal(sum, 4711);
        assert_int_equal(ask_again(fd[1], "Defer", "two", NULL), CRPC_EAUTH);
        assert_int_equal(ask_again(fd[1], "Defer", "two", NULL), CRPC_EAUTH);
        assert_int_equal(net_calls(&n.service), 3);
        crpc_server_stats_get(n.server, &stats);
        assert_int_equal(stats.replayed, 7);
        assert_int_equal(stats.unremembered, 0);
        for (i = 0; i < 3; i++)
            close(fd[i]);
        net_close(&n);
    }
}

/* Words, marks, fields and attachments are part of a reply; a client sees no difference. */
static void a_repeated_reply_is_complete(void **state)
{
    crpc_field fields[2] = {{"crpc-rid", "x"}, {"a", "value"}};
    char *bytes = net_bytes(100000);
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int round;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        for (round = 0; round < 3; round++) {
            dyn_Num in = net_num(1234), out = dyn_Num_init_zero;
            dyn_Blob blob = dyn_Blob_init_zero, back = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            crpc_view value;
            char text[20];
            call.fields = fields;
            call.field_count = 2;
            in.n = 700;
            strcpy(in.tag, "words");
            assert_int_equal(dyn_Echo_Fail(n.channel, &in, &out, &call), CRPC_EAPP);
            assert_int_equal(call.error.app_code, 700);
            assert_non_null(strstr(call.error.text, "words"));
            call.log_id = round + 1; /* what comes again is not looked at */
            assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
            assert_int_equal(out.n, 1);
            assert_true(crpc_call_field(&call, "b", &value));
            crpc_view_copy(value, text, sizeof text);
            assert_string_equal(text, "value");
            blob.data = crpc_view_of(bytes, 3000);
            call.attachment = crpc_view_of(bytes, 100000);
            assert_int_equal(dyn_Echo_Pass(n.channel, &blob, &back, &call), CRPC_OK);
            assert_int_equal(back.n, 100000);
            assert_int_equal(crpc_view_size(back.data), 3000);
            assert_memory_equal(crpc_view_data(back.data), bytes, 3000);
            assert_int_equal(crpc_view_size(call.reply_attachment), 100000);
            assert_memory_equal(crpc_view_data(call.reply_attachment), bytes, 100000);
            crpc_call_reset(&call);
        }
        assert_int_equal(net_calls(&n.service), 3);
        net_close(&n);
    }
    free(bytes);
}

static int wants_credential(void *user, crpc_context *x)
{
    (void)user;
    return crpc_view_equal(crpc_context_credential(x), "secret") ? CRPC_OK : CRPC_EAUTH;
}

/* Nor does what was never executed count, or what somebody else may ask for. */
static void only_what_was_executed_is_remembered(void **state)
{
    crpc_field fields[1] = {{"crpc-rid", "x"}};
    crpc_server_interceptor guard = CRPC_INIT;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    char id[70];
    crpc_call call = CRPC_INIT;
    const char *both[] = {"crpc-rid", "y", NULL};
    net n;
    int fd;
    (void)state;
    guard.before = wants_credential;
    memset(&n, 0, sizeof n);
    n.server_options.replay_entries = 10;
    n.server_options.interceptors = &guard;
    n.server_options.interceptor_count = 1;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_WORKERS);
    call.fields = fields;
    call.field_count = 1;
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EAUTH);
    call.credential = crpc_view_str("secret");
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    call.credential = crpc_view_of(NULL, 0);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EAUTH);
    call.credential = crpc_view_str("secret");
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    memset(id, 'i', sizeof id);
    id[65] = '\0';
    fields[0].value = id;
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EREQUEST);
    assert_non_null(strstr(call.error.text, "crpc-rid is over 64 bytes"));
    id[64] = '\0';
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 2);
    fields[0].value = ""; /* is none */
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 4);
    crpc_call_reset(&call);
    net_close(&n);

    memset(&n, 0, sizeof n);
    n.server_options.replay_entries = 10;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    send_request(fd, "Add", 1, GARBAGE, both);
    assert_int_equal(reply_code(fd, 1, NULL), CRPC_EREQUEST);
    assert_int_equal(ask_again(fd, "Add", "y", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    close(fd);
    net_close(&n);
}

static void what_is_remembered_is_bounded(void **state)
{
    crpc_loop_stats stats;
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    n.clock_us = clock_stands;
    n.server_options.replay_entries = 2;
    n.server_options.replay_ms = 1000;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    assert_int_equal(ask_again(fd, "Add", "2", NULL), CRPC_OK);
    assert_int_equal(ask_again(fd, "Add", "3", NULL), CRPC_OK); /* the first goes */
    assert_int_equal(ask_again(fd, "Add", "3", NULL), CRPC_OK);
    assert_int_equal(ask_again(fd, "Add", "2", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 3);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 4);
    __atomic_add_fetch(&clock_ms, 1000, __ATOMIC_SEQ_CST);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK); /* it was too long ago */
    assert_int_equal(net_calls(&n.service), 5);
    send_again(fd, "Defer", 1, "4");
    send_again(fd, "Defer", 1, "5");
    assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
    assert_int_equal(ask_again(fd, "Add", "6", NULL), CRPC_OK); /* is run, but not remembered */
    assert_int_equal(ask_again(fd, "Add", "6", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 9);
    crpc_server_stats_get(n.server, &stats);
    assert_int_equal(stats.unremembered, 2);
    assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
    assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
    close(fd);
    net_close(&n);
}

/* It is not executed again, though nobody knows any more what it said. */
static void a_reply_too_large_to_keep(void **state)
{
    crpc_field field = {"crpc-rid", "x"};
    char *bytes = net_bytes(20000);
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    net n;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.replay_entries = 10;
    n.server_options.replay_bytes = 64 << 10;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    call.fields = &field;
    call.field_count = 1;
    in.data = crpc_view_of(bytes, 20000);
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_EINTERNAL);
    assert_non_null(strstr(call.error.text, "executed before, but its reply was not kept"));
    assert_int_equal(net_calls(&n.service), 1);
    crpc_call_reset(&call);
    net_close(&n);
    free(bytes);
}

/* --- order --------------------------------------------------------------------------------------
 */

static void send_keyed(int fd, int n, const char *key)
{
    const char *fields[] = {"crpc-key", NULL, NULL};
    char body[2];
    fields[1] = key;
    body[0] = 1 << 3;
    body[1] = (char)n;
    send_request(fd, "Defer", n, body, 2, key ? fields : NULL);
}

/* Finishes the held request that came with n; false: there is none. */
static bool finish_keyed(net *n, int number)
{
    net_service *s = &n->service;
    crpc_context *x = NULL;
    int i;
    pthread_mutex_lock(&s->lock);
    for (i = 0; i < s->held_count && !x; i++) {
        if (((dyn_Num *)crpc_context_response(s->held[i]))->n == number + 1) {
            x = s->held[i];
            s->held[i] = s->held[--s->held_count];
        }
    }
    pthread_mutex_unlock(&s->lock);
    if (x)
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
    return x != NULL;
}

/* Waits until exactly so many are held, and none more would be. */
static void held_are(net *n, int count)
{
    assert_true(CT_WAIT(net_held(&n->service) == count, NET_PATIENCE));
    net_check_add(n->channel, 1);
    ct_sleep_ms(5);
    assert_int_equal(net_held(&n->service), count);
}

static void requests_of_a_key_wait_for_each_other(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int fd, other, i;
        net n;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        other = wire_connect(n.url);
        send_keyed(fd, 1, "red");
        send_keyed(fd, 2, "red");
        send_keyed(fd, 3, "blue");
        send_keyed(fd, 4, NULL);
        held_are(&n, 3);
        send_keyed(other, 5, "red"); /* from wherever it comes */
        held_are(&n, 3);
        assert_true(finish_keyed(&n, 3));
        held_are(&n, 2);
        assert_false(finish_keyed(&n, 2));
        assert_true(finish_keyed(&n, 1));
        held_are(&n, 2);
        assert_false(finish_keyed(&n, 5));
        assert_true(finish_keyed(&n, 2));
        held_are(&n, 2);
        assert_true(finish_keyed(&n, 5));
        assert_true(finish_keyed(&n, 4));
        for (i = 0; i < 4; i++) {
            static const int order[] = {3, 1, 2, 4};
            assert_int_equal(reply_code(fd, order[i], NULL), CRPC_OK);
        }
        assert_int_equal(reply_code(other, 5, NULL), CRPC_OK);
        close(fd);
        close(other);
        net_close(&n);
    }
}

static void requests_of_a_connection_may_wait_too(void **state)
{
    crpc_poller p;
    net_mode m;
    int ordered;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (ordered = -1; ordered < 2; ordered++)
    {
        int fd, other, i;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.ordered = ordered;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        other = wire_connect(n.url);
        send_keyed(fd, 1, NULL);
        send_keyed(fd, 2, NULL);
        send_keyed(fd, 3, "red");
        send_keyed(fd, 4, "red");
        held_are(&n, 3 - ordered);
        send_keyed(other, 5, NULL);
        held_are(&n, 4 - ordered);
        for (i = 1; i <= 5; i++) {
            int64_t until = ct_now_ms() + NET_PATIENCE;
            while (!finish_keyed(&n, i) && ct_now_ms() < until)
                ct_sleep_ms(1);
            assert_int_equal(reply_code(i == 5 ? other : fd, i, NULL), CRPC_OK);
        }
        close(fd);
        close(other);
        net_close(&n);
    }
}

/* What waits when its server is closed goes with it, or with the request that it waits for. */
static void closing_with_requests_that_wait(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_context *x, *y;
        crpc_loop_stats stats;
        int fd, i;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = -1;
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 3; i++)
            send_again(fd, "Defer", i, "same");
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        do {
            ct_sleep_ms(1);
            crpc_server_stats_get(n.server, &stats);
        } while (stats.replayed < 2);
        x = net_take(&n.service);
        for (i = 1; i <= 3; i++)
            send_keyed(fd, i, "red");
        held_are(&n, 1);
        y = net_take(&n.service);
        net_close(&n);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        assert_int_equal(crpc_context_finish(y, CRPC_OK), CRPC_EGONE);
        assert_int_equal(n.service.calls, 3); /* with that of held_are */
        close(fd);
    }
}

#define KEYS 16
#define KEYED 10000

typedef struct keyed {
    pthread_mutex_t lock;
    int64_t last[KEYS];
    int inside[KEYS], beside, done;
    bool wrong;
    pthread_t threads[4];
    int thread_count;
} keyed;

static void keyed_begin(keyed *k, const dyn_Num *in)
{
    int key = (int)(in->n % KEYS), i;
    pthread_mutex_lock(&k->lock);
    k->wrong = k->wrong || k->inside[key]++ || in->n <= k->last[key];
    k->last[key] = in->n;
    for (i = 0; i < KEYS; i++)
        k->beside += i != key && k->inside[i];
    for (i = 0; i < k->thread_count && !pthread_equal(k->threads[i], pthread_self()); i++) {
    }
    if (i == k->thread_count && i < 4)
        k->threads[k->thread_count++] = pthread_self();
    pthread_mutex_unlock(&k->lock);
}

static int keyed_handler(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    keyed *k = (keyed *)crpc_context_user(x);
    keyed_begin(k, in);
    if (in->n % 7 == 0)
        sched_yield();
    out->n = in->n;
    pthread_mutex_lock(&k->lock);
    k->inside[in->n % KEYS]--;
    k->done++;
    pthread_mutex_unlock(&k->lock);
    return CRPC_OK;
}

static void *send_all_keyed(void *arg)
{
    wire w = {NULL, 0, 0};
    int i;
    for (i = 0; i < KEYED; i++) {
        const char *fields[] = {"crpc-key", NULL, NULL};
        wire body = {NULL, 0, 0};
        char key[16];
        snprintf(key, sizeof key, "key %d", i % KEYS);
        fields[1] = key;
        wire_int(&body, 1, i + KEYS); /* above what `last` begins with */
        put_request(&w, "Add", i, (const char *)body.p, body.n, 0, fields);
        wire_free(&body);
    }
    wire_flush(*(int *)arg, &w);
    return NULL;
}

static void workers_keep_the_order_of_keys(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_poller p;
    (void)state;
    handlers.Add = keyed_handler;
    NET_EACH_POLLER(p)
    {
        static keyed k;
        crpc_server_options o;
        crpc_server *s;
        pthread_t thread;
        char url[160];
        int i, fd;
        memset(&k, 0, sizeof k);
        pthread_mutex_init(&k.lock, NULL);
        memset(&o, 0, sizeof o);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.workers = 4;
        o.worker_queue = -1;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, &k), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        fd = wire_connect(url);
        assert_int_equal(pthread_create(&thread, NULL, send_all_keyed, &fd), 0);
        for (i = 0; i < KEYED; i++) {
            wire_message m;
            assert_int_equal(wire_receive(fd, &m), 1);
            assert_int_equal(m.code, 0);
            wire_done(&m);
        }
        pthread_join(thread, NULL);
        assert_int_equal(k.done, KEYED);
        assert_false(k.wrong);
        assert_true(k.thread_count > 1);
        assert_true(k.beside > 0); /* of different keys, at the same time */
        close(fd);
        crpc_server_close(s);
        pthread_mutex_destroy(&k.lock);
    }
}

/* --- together -----------------------------------------------------------------------------------
 */

static void many_servers_and_channels_in_one_process(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net a, b;
        crpc_loop *l = net_loop(p);
        crpc_channel *ch[10];
        crpc_loop_stats stats;
        int i, k;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        net_open(&a, p, NET_THREAD);
        net_open(&b, p, NET_IO);
        for (i = 0; i < 10; i++)
            ch[i] =
                net_channel(i % 2 ? a.url : b.url, "?timeout_ms=20000", p, i < 5 ? l : NULL, NULL);
        for (k = 0; k < 20; k++) {
            for (i = 0; i < 10; i++)
                net_check_add(ch[i], i);
        }
        assert_int_equal(net_calls(&a.service), 100);
        assert_int_equal(net_calls(&b.service), 100);
        crpc_server_stats_get(b.server, &stats);
        assert_int_equal(stats.requests, 100);
        assert_int_equal(stats.connections, 3); /* three on the shared loop are one, two private */
        assert_string_equal(stats.poller, p == CRPC_POLLER_EPOLL ? "epoll" : "poll");
        assert_true(stats.receives >= 100 && stats.sends >= 100 && stats.memory > 0);
        assert_true(stats.memory_peak >= stats.memory && stats.watches >= 4 + 3);
        for (i = 0; i < 10; i++)
            crpc_channel_close(ch[i]);
        crpc_loop_close(l);
        net_close(&a);
        net_close(&b);
    }
}

static void on_inner(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    crpc_context *x = (crpc_context *)user;
    (void)call;
    if (!status)
        ((dyn_Num *)crpc_context_response(x))->n = response->n * 10;
    (void)crpc_context_finish(x, status);
}

/* n says how: 1 another channel, waiting; 2 its own loop's, without waiting; 3 its own, waiting. */
static int calls_out(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    dyn_Num inner = net_num(5), got = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_channel *ch = (crpc_channel *)crpc_context_user(x);
    int status;
    call.parent = x;
    call.timeout_ms = NET_PATIENCE;
    switch (in->n) {
    case 1:
        status = dyn_Echo_Meta(nested_channel, &inner, &got, &call);
        out->n = got.n;
        out->ms = got.ms;
        break;
    case 2:
        status = dyn_Echo_Add_async(ch, &inner, on_inner, x, &call);
        return status ? status : CRPC_EPENDING;
    default:
        status = dyn_Echo_Add(ch, &inner, &got, &call);
        break;
    }
    crpc_call_reset(&call);
    return status;
}

static void handlers_call_other_services(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_poller p;
    int workers;
    (void)state;
    handlers.Add = calls_out;
    NET_EACH_POLLER(p) for (workers = 0; workers < 2; workers++)
    {
        net back;
        crpc_loop *l = net_loop(p);
        crpc_server_options o;
        crpc_server *s;
        crpc_channel *own, *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        char url[160];
        memset(&back, 0, sizeof back);
        net_open(&back, p, NET_THREAD);
        nested_channel = back.channel;
        own = net_channel(back.url, NULL, p, l, NULL);
        memset(&o, 0, sizeof o);
        o.loop = l;
        o.listen = "tcp://127.0.0.1:0";
        o.workers = workers;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, own), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        ch = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
        /* the deadline and the log_id go along */
        call.log_id = 12345;
        call.timeout_ms = 3000;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 12345);
        assert_in_range(out.ms, 1, 3000);
        in.n = 2;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 60);
        in.n = 3;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), workers ? CRPC_OK : CRPC_EDEADLK);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        crpc_channel_close(own);
        crpc_server_close(s);
        crpc_loop_close(l);
        net_close(&back);
    }
}

/* --- out of memory ------------------------------------------------------------------------------
 */

typedef struct server_plan {
    crpc_poller poller;
    int workers;
    bool guarded; /* the requests are limited, in order, and may come again */
} server_plan;

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
        o.limits = &limit;
        o.limit_count = 1;
        o.rate_per_client = 100000;
        o.replay_entries = 10;
        o.ordered = 1;
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
        put_request(&w, "Add", 5, "\x08\x01", 2, 0, fields);
        put_request(&w, "Add", 6, "\x08\x01", 2, 0, fields);
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
        if (m.code == CRPC_ELIMIT || m.code == CRPC_EINTERNAL || m.code == CRPC_ENOMEM)
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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(names_and_codes_are_brpcs),
        CT_TEST(services_are_added_once_and_before_the_start),
        CT_TEST(missing_handlers_are_missing_methods),
        CT_TEST(what_is_not_supported_is_refused_by_name),
        CT_TEST(statuses_reach_the_caller),
        CT_TEST(replies_may_come_later_from_any_thread),
        CT_TEST(a_reply_may_be_finished_before_the_handler_returns),
        CT_TEST(replies_to_peers_that_left),
        CT_TEST(context_memory_lives_until_the_reply),
        CT_TEST(the_context_tells_about_the_request),
        CT_TEST(server_interceptors_run_in_order),
        CT_TEST(workers_run_handlers_beside_each_other),
        CT_TEST(a_full_worker_queue_is_said),
        CT_TEST(late_requests_are_answered_but_not_run),
        CT_TEST(stopping_finishes_what_runs_and_refuses_the_rest),
        CT_TEST(stopping_serves_then_refuses_then_closes),
        CT_TEST(run_serves_on_when_its_loop_was_stopped),
        CT_TEST(closing_waits_for_the_end_of_serving),
        CT_TEST(draining_is_bounded),
        CT_TEST(closing_with_handlers_that_block),
        CT_TEST(run_returns_when_stopped),
        CT_TEST(closing_in_every_state),
        CT_TEST(a_request_that_was_coming_is_told),
        CT_TEST(nothing_lent_is_used_after_the_close),
        CT_TEST(a_handler_may_close_its_server),
        CT_TEST(a_callback_may_close_the_server),
        CT_TEST(idle_workers_do_not_fill_the_queue),
        CT_TEST(closing_in_a_storm_of_connections),
        CT_TEST(several_listeners),
        CT_TEST(addresses_that_cannot_be_had_are_explained),
        CT_TEST(connections_over_the_limit_are_closed),
        CT_TEST(running_out_of_descriptors_does_not_spin),
        CT_TEST(requests_in_service_are_limited),
        CT_TEST(a_limit_of_nothing_is_an_error),
        CT_TEST(methods_have_rates),
        CT_TEST(clients_have_rates),
        CT_TEST(adaptive_limits_adapt),
        CT_TEST(a_repeated_request_is_executed_once),
        CT_TEST(a_repeated_reply_is_complete),
        CT_TEST(only_what_was_executed_is_remembered),
        CT_TEST(what_is_remembered_is_bounded),
        CT_TEST(a_reply_too_large_to_keep),
        CT_TEST(requests_of_a_key_wait_for_each_other),
        CT_TEST(requests_of_a_connection_may_wait_too),
        CT_TEST(closing_with_requests_that_wait),
        CT_TEST(workers_keep_the_order_of_keys),
        CT_TEST(many_servers_and_channels_in_one_process),
        CT_TEST(handlers_call_other_services),
        CT_TEST(servers_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
