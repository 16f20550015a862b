/* A handler's view of a request, and the ways in which it can answer. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

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
        {30000, "", CRPC_EINTERNAL, 0, "the handler returned 30000, which is no crpc_status"},
        {-1, "", CRPC_EINTERNAL, 0, "the handler returned -1, which is no crpc_status"},
        {42, "", CRPC_EINTERNAL, 0,
         "the handler returned 42, which is no crpc_status; an application's code is set with "
         "crpc_context_fail (remote)"},
    };
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i;
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
        crpc_call_reset(&call);
        net_close(&n);
    }
}

static void applications_may_not_use_reserved_codes(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int64_t code, step;
        dyn_Num in = dyn_Num_init_zero, out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        strcpy(in.tag, "own words");
        for (code = -3; code < 5000; code += step) {
            bool reserved = (code >= 0 && code <= 199) || (code >= 1000 && code <= 3999);
            step = code > 1010 ? 97 : code > 210 && code < 990 ? 77 : 1; /* 1 near the borders */
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

static size_t chunk_bytes(crpci_heap *h)
{
    size_t n;
    crpci_thread_lock(&h->lock);
    n = h->chunk_bytes;
    crpci_thread_unlock(&h->lock);
    return n;
}

/* Sends a request for a method that is not there, and receives the refusal. */
static void send_filler(int fd, size_t size)
{
    char *body = (char *)calloc(1, size);
    wire w = {NULL, 0, 0};
    wire_message m;
    wire_request_body(&w, "dyn.Echo", "None", 9, body, size, NULL);
    assert_true(wire_flush(fd, &w));
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.code, CRPC_ENOMETHOD);
    wire_done(&m);
    free(body);
}

/* Between two of the requests come 60 KiB of others: each stands in a receive buffer of its own. */
static void a_request_that_waits_keeps_only_its_own_bytes(void **state)
{
    enum { COUNT = 30 };
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message reply;
        crpci_heap *h;
        int fd, i;
        memset(&n, 0, sizeof n);
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = wire_connect(n.url);
        for (i = 1; i <= COUNT; i++) {
            wire_request(&w, "Defer", i, i, 0);
            assert_true(wire_flush(fd, &w));
            assert_true(CT_WAIT(net_held(&n.service) == i, NET_PATIENCE));
            send_filler(fd, 60 << 10);
        }
        h = n.service.held[0]->loop->heap;
        assert_true(chunk_bytes(h) < COUNT * 4096 + (256 << 10));
        for (i = 1; i <= COUNT; i++) {
            assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
            assert_int_equal(wire_receive(fd, &reply), 1);
            assert_int_equal(reply.id, i);
            assert_int_equal(reply.n, i + 1);
            wire_done(&reply);
        }
        close(fd);
        net_close(&n);
    }
}

static const dyn_Blob *held_blob;
static crpc_context *held_context;

static int defer_blob(crpc_context *x, const dyn_Blob *in, dyn_Blob *out)
{
    *out = *in;
    held_blob = in;
    __atomic_store_n(&held_context, x, __ATOMIC_RELEASE);
    return CRPC_EPENDING;
}

/* A request of Pass with all that a request can hold. */
static void send_blob(int fd, int64_t id, const char *data, size_t size)
{
    wire w = {NULL, 0, 0}, meta = {NULL, 0, 0}, request = {NULL, 0, 0}, entry = {NULL, 0, 0},
         body = {NULL, 0, 0};
    wire_str(&request, 1, "dyn.Echo");
    wire_str(&request, 2, "Pass");
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 4, id);
    wire_int(&meta, 5, 10);
    wire_str(&meta, 7, "secret");
    wire_str(&entry, 1, "key");
    wire_str(&entry, 2, "value");
    wire_bytes(&meta, 9, entry.p, entry.n);
    wire_bytes(&body, 2, data, size);
    wire_put(&body, "attachment", 10);
    wire_frame(&w, &meta, body.p, body.n);
    assert_true(wire_flush(fd, &w));
    wire_free(&meta);
    wire_free(&request);
    wire_free(&entry);
    wire_free(&body);
}

/* Also when the bytes that it came in have been overwritten: copied with it, or kept. */
static void a_request_stays_valid_until_its_reply(void **state)
{
    static const size_t sizes[] = {0, 5, 900, 1000, 1024, 5000, 100000};
    static char data[100000];
    static dyn_Echo_handlers handlers;
    crpc_server_options o;
    crpc_server *s;
    char url[160];
    size_t i;
    int fd, other;
    (void)state;
    memset(data, 'd', sizeof data);
    handlers.Pass = defer_blob;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    fd = wire_connect(url);
    other = wire_connect(url);
    for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        crpc_context *x;
        crpc_view value;
        wire_message m;
        send_blob(fd, (int64_t)i, data, sizes[i]);
        assert_true(CT_WAIT(__atomic_load_n(&held_context, __ATOMIC_ACQUIRE) != NULL, NET_PATIENCE));
        x = held_context;
        held_context = NULL;
        send_filler(other, 50000);
        assert_int_equal(crpc_view_size(held_blob->data), sizes[i]);
        assert_memory_equal(crpc_view_data(held_blob->data), data, sizes[i]);
        assert_true(crpc_view_equal(crpc_context_credential(x), "secret"));
        assert_true(crpc_context_field(x, "key", &value) && crpc_view_equal(value, "value"));
        assert_true(crpc_view_equal(crpc_context_attachment(x), "attachment"));
        assert_int_equal(crpc_context_set_attachment(x, crpc_context_attachment(x)), CRPC_OK);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.id, i);
        assert_int_equal(m.attachment_size, 10);
        assert_true(m.body_size >= sizes[i] + 10);
        assert_memory_equal(m.body + m.body_size - 10, "attachment", 10);
        assert_memory_equal(m.body + m.body_size - 10 - sizes[i], data, sizes[i]);
        wire_done(&m);
    }
    close(fd);
    close(other);
    crpc_server_close(s);
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

/* Sends `count` requests of Defer and resets the connection while they are held. */
static void hold_of_a_peer_that_left(net *n, int count)
{
    wire w = {NULL, 0, 0};
    int fd = wire_connect(n->url), i;
    for (i = 1; i <= count; i++)
        wire_request(&w, "Defer", i, i, 0);
    assert_true(wire_flush(fd, &w));
    assert_true(CT_WAIT(net_held(&n->service) == count, NET_PATIENCE));
    wire_reset(fd);
    assert_true(CT_WAIT(net_connections(n->server) == 0, NET_PATIENCE));
}

static void a_context_outlives_its_connection(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        crpc_context *x;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        hold_of_a_peer_that_left(&n, 1);
        x = net_take(&n.service);
        assert_int_equal(((dyn_Num *)crpc_context_response(x))->n, 2);
        assert_non_null(crpc_context_alloc(x, 100));
        assert_string_equal(crpc_context_method(x)->name, "Defer");
        assert_memory_equal(crpc_context_peer(x), "127.0.0.1:", 10);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        net_close(&n);
    }
}

static void a_context_outlives_its_server(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        crpc_context *x, *y;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 30;
        net_open(&n, p, m);
        hold_of_a_peer_that_left(&n, 2);
        x = net_take(&n.service); /* finished before the server closes; the other one after it */
        y = net_take(&n.service);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        net_close(&n);
        assert_int_equal(crpc_context_finish(y, CRPC_EINTERNAL), CRPC_EGONE);
    }
}

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

/* Adds fields until one is refused, and says how many there are. */
static int add_fields(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    static char value[1001];
    (void)in;
    memset(value, 'v', sizeof value - 1);
    while (crpc_context_add_field(x, "k", value) == CRPC_OK && out->n < 100)
        out->n++;
    assert_int_equal(crpc_context_add_field(x, "k", NULL), CRPC_EINVAL);
    assert_int_equal(crpc_context_add_field(x, NULL, value), CRPC_EINVAL);
    return crpc_context_add_field(x, "k", value) == CRPC_EINVAL ? CRPC_OK : CRPC_EINTERNAL;
}

static void a_reply_never_has_more_fields_than_a_peer_reads(void **state)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o;
    crpc_server *s;
    crpc_channel *ch;
    char url[160];
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_view value;
    (void)state;
    handlers.Add = add_fields;
    memset(&o, 0, sizeof o);
    o.listen = "tcp://127.0.0.1:0";
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    ch = net_channel(url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
    assert_in_range(out.n, 60, 64);
    assert_true(crpc_call_field(&call, "k", &value));
    assert_int_equal(crpc_view_size(value), 1000);
    crpc_call_reset(&call);
    crpc_channel_close(ch);
    crpc_server_close(s);
}

static crpc_channel *nested_channel;

static void on_inner(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    crpc_context *x = (crpc_context *)user;
    (void)call;
    if (!status)
        ((dyn_Num *)crpc_context_response(x))->n = response->n * 10;
    (void)crpc_context_finish(x, status);
}

/* A handler that makes a call. The request's n says how: 1: synchronously, on another loop; 2: by
 * callback, on the server's own loop; 3: synchronously, on the server's own loop. */
static int calls_out(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    dyn_Num inner = net_num(5), got = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_channel *ch = (crpc_channel *)crpc_context_user(x);
    int status;
    call.parent = x;
    call.policy.timeout_ms = NET_PATIENCE;
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

/* A server whose handler of Add calls a second server, and a channel to the first. */
typedef struct nested {
    net back;
    crpc_loop *loop;
    crpc_server *server;
    crpc_channel *own; /* to the second server, on the first one's loop */
    crpc_channel *channel;
} nested;

static void nested_open(nested *n, crpc_poller p, int workers)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o = CRPC_INIT;
    char url[160];
    memset(n, 0, sizeof *n);
    handlers.Add = calls_out;
    net_open(&n->back, p, NET_THREAD);
    nested_channel = n->back.channel;
    n->loop = net_loop(p);
    n->own = net_channel(n->back.url, NULL, p, n->loop, NULL);
    o.loop = n->loop;
    o.listen = "tcp://127.0.0.1:0";
    o.workers = workers;
    assert_int_equal(crpc_server_open(&n->server, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(n->server, &dyn_Echo, &handlers, n->own), CRPC_OK);
    assert_int_equal(crpc_server_start(n->server, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(n->loop), CRPC_OK);
    assert_int_equal(crpc_server_address(n->server, 0, url, sizeof url), CRPC_OK);
    n->channel = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
}

static void nested_close(nested *n)
{
    crpc_channel_close(n->channel);
    crpc_channel_close(n->own);
    crpc_server_close(n->server);
    crpc_loop_close(n->loop);
    net_close(&n->back);
}

static void a_nested_call_inherits_deadline_and_log_id(void **state)
{
    crpc_poller p;
    int workers;
    (void)state;
    NET_EACH_POLLER(p) for (workers = 0; workers < 2; workers++)
    {
        nested n;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        nested_open(&n, p, workers);
        call.log_id = 12345;
        call.policy.timeout_ms = 15000; /* the handler's own limit is longer */
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 12345);
        assert_in_range(out.ms, 1, 15000);
        crpc_call_reset(&call);
        nested_close(&n);
    }
}

static void a_nested_call_may_finish_the_request_later(void **state)
{
    crpc_poller p;
    int workers;
    (void)state;
    NET_EACH_POLLER(p) for (workers = 0; workers < 2; workers++)
    {
        nested n;
        dyn_Num in = net_num(2), out = dyn_Num_init_zero;
        nested_open(&n, p, workers);
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 60);
        nested_close(&n);
    }
}

/* A handler on the loop's own thread would wait for a reply that only this thread can receive. */
static void a_nested_call_may_wait_on_a_worker_only(void **state)
{
    crpc_poller p;
    int workers;
    (void)state;
    NET_EACH_POLLER(p) for (workers = 0; workers < 2; workers++)
    {
        nested n;
        dyn_Num in = net_num(3), out = dyn_Num_init_zero;
        nested_open(&n, p, workers);
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, NULL),
                         workers ? CRPC_OK : CRPC_EDEADLK);
        nested_close(&n);
    }
}

typedef struct cancel {
    net_service *service;
    crpc_loop *loop;
    bool finishes;
    uint32_t begun, ended, on_loop; /* atomic */
} cancel;

static void on_cancel(crpc_context *x, void *user)
{
    cancel *k = (cancel *)user;
    crpci_thread_store(&k->on_loop, crpci_loop_in_callback(x->loop));
    crpci_thread_store(&k->begun, 1);
    if (k->finishes) {
        assert_ptr_equal(x, net_take(k->service));
        (void)crpc_context_finish(x, CRPC_ECANCELED);
    } else {
        ct_sleep_ms(30); /* time for another thread to finish the request, if it could */
    }
    crpci_thread_add(&k->ended, 1);
}

/* Has a connection of its own ask for a deferred request, and returns the connection. */
static int defer(net *n, int64_t timeout_ms)
{
    wire_request_options o;
    wire w = {NULL, 0, 0};
    int fd = wire_connect(n->url);
    memset(&o, 0, sizeof o);
    o.timeout_ms = timeout_ms;
    wire_request_body(&w, "Echo", "Defer", 1, "\x08\x05", 2, &o);
    assert_true(wire_flush(fd, &w));
    assert_true(CT_WAIT(net_held(&n->service) == 1, NET_PATIENCE));
    return fd;
}

static crpc_context *held(net *n)
{
    crpc_context *x;
    pthread_mutex_lock(&n->service.lock);
    x = n->service.held[0];
    pthread_mutex_unlock(&n->service.lock);
    return x;
}

static void a_handler_learns_that_its_peer_has_gone(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        cancel k;
        crpc_context *x;
        int fd, finishes;
        net n;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (finishes = 0; finishes < 2; finishes++) {
            memset(&k, 0, sizeof k);
            k.service = &n.service;
            k.finishes = finishes;
            fd = defer(&n, 0);
            x = held(&n);
            assert_int_equal(crpc_context_on_cancel(x, on_cancel, &k), CRPC_OK);
            assert_int_equal(crpc_context_on_cancel(x, on_cancel, &k), CRPC_EBUSY);
            assert_false(crpc_context_cancelled(x));
            close(fd);
            assert_true(CT_WAIT(crpci_thread_load(&k.begun), NET_PATIENCE));
            if (!finishes) {
                assert_true(crpc_context_cancelled(x));
                assert_ptr_equal(net_take(&n.service), x);
                (void)crpc_context_finish(x, CRPC_OK);
                assert_int_equal(crpci_thread_load(&k.ended), 1); /* it has waited */
            }
            assert_true(CT_WAIT(crpci_thread_load(&k.ended) == 1, NET_PATIENCE));
            assert_true(crpci_thread_load(&k.on_loop));
            assert_true(CT_WAIT(net_connections(n.server) == 0, NET_PATIENCE));
        }
        net_close(&n);
        assert_int_equal(k.ended, 1);
    }
}

static void a_handler_learns_that_the_deadline_has_passed(void **state)
{
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        cancel k;
        int fd;
        net n;
        memset(&n, 0, sizeof n);
        memset(&k, 0, sizeof k);
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = defer(&n, 300);
        k.service = &n.service;
        k.finishes = true;
        assert_int_equal(crpc_context_on_cancel(held(&n), on_cancel, &k), CRPC_OK);
        assert_true(CT_WAIT(crpci_thread_load(&k.ended) == 1, NET_PATIENCE));
        assert_true(crpci_thread_load(&k.on_loop));
        close(fd);
        net_close(&n);
    }
}

static void a_finished_request_is_not_cancelled(void **state)
{
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        cancel k;
        wire_message reply;
        crpc_context *x;
        int fd;
        net n;
        memset(&n, 0, sizeof n);
        memset(&k, 0, sizeof k);
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = defer(&n, 0);
        x = net_take(&n.service);
        assert_int_equal(crpc_context_on_cancel(x, on_cancel, &k), CRPC_OK);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
        assert_int_equal(wire_receive(fd, &reply), 1);
        assert_int_equal(reply.n, 6);
        wire_done(&reply);
        close(fd);
        net_close(&n);
        assert_int_equal(k.begun, 0);
    }
}

/* The server stops with a request that nobody finishes in time. */
static void a_handler_learns_that_the_server_has_stopped(void **state)
{
    net_mode m;
    (void)state;
    for (m = NET_THREAD; m < NET_MODES; m = (net_mode)(m + 1)) {
        crpc_context *x;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 1;
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = defer(&n, 0);
        x = net_take(&n.service);
        assert_false(crpc_context_cancelled(x));
        crpc_server_stop(n.server);
        assert_true(CT_WAIT(crpc_context_cancelled(x), NET_PATIENCE));
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        close(fd);
        net_close(&n);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_handler_learns_that_its_peer_has_gone),
        CT_TEST(a_handler_learns_that_the_deadline_has_passed),
        CT_TEST(a_finished_request_is_not_cancelled),
        CT_TEST(a_handler_learns_that_the_server_has_stopped),
        CT_TEST(statuses_reach_the_caller),
        CT_TEST(applications_may_not_use_reserved_codes),
        CT_TEST(replies_may_come_later_from_any_thread),
        CT_TEST(a_request_that_waits_keeps_only_its_own_bytes),
        CT_TEST(a_request_stays_valid_until_its_reply),
        CT_TEST(a_reply_may_be_finished_before_the_handler_returns),
        CT_TEST(a_context_outlives_its_connection),
        CT_TEST(a_context_outlives_its_server),
        CT_TEST(context_memory_lives_until_the_reply),
        CT_TEST(the_context_tells_about_the_request),
        CT_TEST(a_reply_never_has_more_fields_than_a_peer_reads),
        CT_TEST(a_nested_call_inherits_deadline_and_log_id),
        CT_TEST(a_nested_call_may_finish_the_request_later),
        CT_TEST(a_nested_call_may_wait_on_a_worker_only),
    };
    return CT_RUN(tests);
}
