/* What the tests of the loop, connections, channels and servers share: a service with known
 * behaviour, a server and a channel in every arrangement of threads, and peers that speak the wire
 * protocol by hand, so that crpc is not checked against itself. Include it after crpc_test.h. */
#ifndef CRPC_NET_H_INCLUDED
#define CRPC_NET_H_INCLUDED

#include "dyn.crpc.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>

#define NET_PATIENCE 20000 /* milliseconds: what takes longer is taken to be stuck */

/* --- the service ------------------------------------------------------------------------------ */

#define NET_HELD 4096

typedef struct net_service {
    pthread_mutex_t lock;
    int calls;               /* handlers begun */
    int64_t order[NET_HELD]; /* their n, in order */
    crpc_context *held[NET_HELD];
    int held_count;
} net_service;

CT_FN void net_begin(crpc_context *x, int64_t n)
{
    net_service *s = (net_service *)crpc_context_user(x);
    pthread_mutex_lock(&s->lock);
    if (s->calls < NET_HELD)
        s->order[s->calls] = n;
    s->calls++;
    pthread_mutex_unlock(&s->lock);
}

CT_FN int net_calls(net_service *s)
{
    int n;
    pthread_mutex_lock(&s->lock);
    n = s->calls;
    pthread_mutex_unlock(&s->lock);
    return n;
}

CT_FN int net_held(net_service *s)
{
    int n;
    pthread_mutex_lock(&s->lock);
    n = s->held_count;
    pthread_mutex_unlock(&s->lock);
    return n;
}

CT_FN int net_add(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_begin(x, in->n);
    ct_sleep_ms((int)in->ms);
    out->n = in->n + 1;
    strcpy(out->tag, in->tag);
    return CRPC_OK;
}

/* Sends back what came: views, and the attachment without a copy; n is the attachment's size. */
CT_FN int net_pass(crpc_context *x, const dyn_Blob *in, dyn_Blob *out)
{
    net_begin(x, in->n);
    *out = *in;
    out->n = (int64_t)crpc_view_size(crpc_context_attachment(x));
    return crpc_context_set_attachment(x, crpc_context_attachment(x));
}

/* Keeps the request: net_take and crpc_context_finish end it. */
CT_FN int net_defer(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_service *s = (net_service *)crpc_context_user(x);
    net_begin(x, in->n);
    out->n = in->n + 1;
    pthread_mutex_lock(&s->lock);
    assert_true(s->held_count < NET_HELD);
    s->held[s->held_count++] = x;
    pthread_mutex_unlock(&s->lock);
    return CRPC_EPENDING;
}

/* A kept request, the oldest; NULL if there is none. */
CT_FN crpc_context *net_take(net_service *s)
{
    crpc_context *x = NULL;
    pthread_mutex_lock(&s->lock);
    if (s->held_count) {
        x = s->held[0];
        memmove(s->held, s->held + 1, (size_t)--s->held_count * sizeof *s->held);
    }
    pthread_mutex_unlock(&s->lock);
    return x;
}

/* Fails with n as the service's own code, tag as its words. */
CT_FN int net_fail(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_begin(x, in->n);
    out->n = 1;
    return crpc_context_fail(x, (int)in->n, "%s", in->tag);
}

/* Returns n as its status; with tag as words if there are any. */
CT_FN int net_status(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_begin(x, in->n);
    out->n = 1;
    return in->tag[0] ? crpc_context_error(x, (int)in->n, "%s", in->tag) : (int)in->n;
}

/* Tells what came in the meta: log_id in n, credential in tag, remaining time in ms; user_fields
 * "a" goes back as "b". */
CT_FN int net_meta(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    crpc_view value;
    char text[64];
    int64_t left = crpc_context_remaining_us(x);
    net_begin(x, in->n);
    out->n = crpc_context_log_id(x);
    out->ms = left == INT64_MAX ? -1 : left / 1000;
    crpc_view_copy(crpc_context_credential(x), out->tag, sizeof out->tag);
    if (!crpc_context_field(x, "a", &value))
        return CRPC_OK;
    crpc_view_copy(value, text, sizeof text);
    return crpc_context_add_field(x, "b", text);
}

static const dyn_Echo_handlers net_handlers = {net_add,  net_add,    net_pass, net_defer,
                                               net_fail, net_status, net_meta, net_add};

CT_FN void net_service_init(net_service *s)
{
    memset(s, 0, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
}

/* --- the time --------------------------------------------------------------------------------- */

/* What the loops of a server take for the time; one server at a time. */
typedef enum net_time {
    NET_TIME_SYSTEM,
    NET_TIME_RUNS,  /* as the system's, plus what net_time_add adds */
    NET_TIME_STANDS /* only net_time_add moves it, until net_close makes it run: a server that
                     * drains waits for a timer to see whether the last request has ended */
} net_time;

/* Atomic, and of 32 bits for the sake of small targets. */
static CT_UNUSED uint32_t net_time_added_ms;
static CT_UNUSED uint32_t net_time_since_ms; /* the system's time when it began to run. 0: stands */

CT_FN int64_t net_clock_us(void *user)
{
    uint32_t since = __atomic_load_n(&net_time_since_ms, __ATOMIC_SEQ_CST);
    uint32_t ran = since ? (uint32_t)ct_now_ms() - since : 0;
    (void)user;
    return INT64_C(1000000000) +
           ((int64_t)__atomic_load_n(&net_time_added_ms, __ATOMIC_SEQ_CST) + ran) * 1000;
}

CT_FN void net_time_add(uint32_t ms)
{
    __atomic_add_fetch(&net_time_added_ms, ms, __ATOMIC_SEQ_CST);
}

/* The time runs from here on, if it does not yet. */
CT_FN void net_time_run(void)
{
    uint32_t stands = 0, now = (uint32_t)ct_now_ms();
    __atomic_compare_exchange_n(&net_time_since_ms, &stands, now ? now : UINT32_MAX, 0,
                                __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Begins anew; before a loop has net_clock_us as its clock. */
CT_FN void net_time_begin(net_time time)
{
    __atomic_store_n(&net_time_added_ms, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&net_time_since_ms, 0, __ATOMIC_SEQ_CST);
    if (time == NET_TIME_RUNS)
        net_time_run();
}

/* --- a server and a channel ------------------------------------------------------------------- */

typedef enum net_mode {
    NET_SHARED,  /* server and channel on one loop, which has a thread */
    NET_THREAD,  /* a loop with a thread for the server, a private one for the channel */
    NET_IO,      /* and two I/O threads */
    NET_WORKERS, /* and two workers instead */
    NET_MODES
} net_mode;

static const char *const net_mode_names[] = {"shared", "thread", "io_threads", "workers"};

typedef struct net {
    crpc_server_options server_options; /* set before net_open, if need be */
    crpc_channel_options channel_options;
    const char *listen; /* NULL: tcp://127.0.0.1:0 */
    const char *query;  /* ?key=value of the channel's URL */
    const dyn_Echo_handlers *handlers; /* NULL: net_handlers */
    net_time time;
    net_service service;
    crpc_loop *loop; /* the server's */
    crpc_server *server;
    crpc_channel *channel;
    char url[160];
} net;

CT_FN crpc_loop_options net_loop_options(crpc_poller poller)
{
    crpc_loop_options o;
    memset(&o, 0, sizeof o);
    o.poller = poller;
    o.hooks = ct_hooks();
    o.hooks.log_level = -1;
    return o;
}

CT_FN crpc_loop *net_loop(crpc_poller poller)
{
    crpc_loop_options o = net_loop_options(poller);
    crpc_loop *l;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    return l;
}

CT_FN void net_open_server(net *n, crpc_poller poller, net_mode mode)
{
    crpc_loop_options o = net_loop_options(poller);
    crpc_error error;
    if (n->time) {
        net_time_begin(n->time);
        o.hooks.clock_us = net_clock_us;
    }
    net_service_init(&n->service);
    assert_int_equal(crpc_loop_open(&n->loop, &o), CRPC_OK);
    n->server_options.loop = n->loop;
    n->server_options.loops = net_loop_options(poller);
    n->server_options.listen = n->listen ? n->listen : "tcp://127.0.0.1:0";
    if (mode == NET_IO)
        n->server_options.io_threads = 2;
    if (mode == NET_WORKERS && !n->server_options.workers)
        n->server_options.workers = 2;
    if (crpc_server_open(&n->server, &n->server_options, &error))
        fail_msg("%s", error.text);
    assert_int_equal(crpc_server_add(n->server, &dyn_Echo,
                                     n->handlers ? n->handlers : &net_handlers, &n->service),
                     CRPC_OK);
    if (crpc_server_start(n->server, &error))
        fail_msg("%s", error.text);
    assert_int_equal(crpc_server_address(n->server, 0, n->url, sizeof n->url), CRPC_OK);
    assert_int_equal(crpc_loop_start(n->loop), CRPC_OK);
}

#if CRPC_ENABLE_CLIENT
/* The loop's endpoint for an address; NULL: the only one that there is. Locked, or nobody drives. */
CT_FN crpci_endpoint *net_endpoint(const crpc_loop *l, const char *address)
{
    crpci_endpoint *e;
    size_t i;
    for (i = 0; i < l->endpoint_room; i++) {
        for (e = l->endpoints[i]; e; e = e->next) {
            if (!address || strcmp(e->address, address) == 0)
                return e;
        }
    }
    fail_msg("no endpoint");
    return NULL;
}
#endif

CT_FN crpc_channel *net_channel(const char *url, const char *query, crpc_poller poller,
                                crpc_loop *loop, const crpc_channel_options *options)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    char text[512];
    memset(&o, 0, sizeof o);
    if (options)
        o = *options;
    o.loop = loop;
    o.private_loop = net_loop_options(poller);
    snprintf(text, sizeof text, "%s%s", url, query ? query : "");
    if (crpc_channel_open(&ch, text, &o, &error))
        fail_msg("%s: %s", text, error.text);
    return ch;
}

/* Zero-initialise *n, or set its options, before. */
CT_FN void net_open(net *n, crpc_poller poller, net_mode mode)
{
    net_open_server(n, poller, mode);
    if (!n->channel_options.policy.timeout_ms)
        n->channel_options.policy.timeout_ms = NET_PATIENCE;
    n->channel = net_channel(n->url, n->query, poller, mode == NET_SHARED ? n->loop : NULL,
                             &n->channel_options);
}

CT_FN void net_close(net *n)
{
    if (n->time)
        net_time_run();
    crpc_channel_close(n->channel);
    crpc_server_close(n->server);
    crpc_loop_close(n->loop);
    pthread_mutex_destroy(&n->service.lock);
}

/* The statement that follows runs for each poller, and for each arrangement of threads. */
#define NET_EACH_POLLER(p)                                                                         \
    for (p = CRPC_POLLER_EPOLL; p <= CRPC_POLLER_POLL; p = (crpc_poller)(p + 1))
#define NET_EACH_MODE(m) for (m = NET_SHARED; m < NET_MODES; m = (net_mode)(m + 1))

CT_FN dyn_Num net_num(int64_t n)
{
    dyn_Num num = dyn_Num_init_zero;
    num.n = n;
    return num;
}

/* Calls Add and checks the sum. */
CT_FN void net_check_add(crpc_channel *ch, int64_t n)
{
    dyn_Num in = net_num(n), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    if (dyn_Echo_Add(ch, &in, &out, &call))
        fail_msg("%s", call.error.text);
    assert_int_equal(out.n, n + 1);
    crpc_call_reset(&call);
}

/* Threads that call on a channel until they are told to end. */
typedef struct net_callers {
    crpc_channel *channel;
    uint32_t ended;    /* atomic: no more calls */
    uint32_t answered; /* atomic */
    uint32_t failed;   /* atomic: all others */
    uint32_t lost;     /* atomic: of these, requests that were sent, or perhaps, and have no reply */
} net_callers;

CT_FN void *net_call_on(void *arg)
{
    net_callers *c = (net_callers *)arg;
    while (!__atomic_load_n(&c->ended, __ATOMIC_ACQUIRE)) {
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int err = dyn_Echo_Add(c->channel, &in, &out, &call);
        if (!err) {
            __atomic_fetch_add(&c->answered, 1, __ATOMIC_RELAXED);
        } else {
            __atomic_fetch_add(&c->failed, 1, __ATOMIC_RELAXED);
            if (call.error.sent != CRPC_SENT_NO && !call.error.remote) {
                __atomic_fetch_add(&c->lost, 1, __ATOMIC_RELAXED);
                print_message("%s\n", call.error.text);
            }
        }
        crpc_call_reset(&call);
    }
    return NULL;
}

CT_FN uint64_t net_late_replies(crpc_channel *ch)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
    return stats.late_replies;
}

CT_FN uint32_t net_connections(crpc_server *s)
{
    crpc_loop_stats stats;
    crpc_server_stats_get(s, &stats);
    return stats.connections;
}

/* Connections of a loop's channels that have ended, and dials that have failed. */
CT_FN uint32_t net_lost(crpc_loop *l)
{
    uint32_t lost;
    crpci_loop_lock(l);
    lost = l->lost;
    crpci_loop_unlock(l);
    return lost;
}

CT_FN uint64_t net_received(crpc_server *s)
{
    crpc_loop_stats stats;
    crpc_server_stats_get(s, &stats);
    return stats.receives;
}

/* Calls Add with a deadline that passes; doubles it until the request was sent before, however slow
 * the machine is. */
CT_FN void net_time_out(crpc_channel *ch, int64_t n, crpc_call *call)
{
    dyn_Num in = net_num(n), out = dyn_Num_init_zero;
    for (call->policy.timeout_ms = 60;; call->policy.timeout_ms *= 2) {
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, call), CRPC_ETIMEDOUT);
        if (call->error.sent == CRPC_SENT_YES)
            break;
        assert_true(call->policy.timeout_ms < NET_PATIENCE);
    }
}

/* `size` bytes that tell their place. */
CT_FN char *net_bytes(size_t size)
{
    char *p = (char *)malloc(size + 1);
    size_t i;
    for (i = 0; i < size; i++)
        p[i] = (char)(i * 31 + i / 251);
    p[size] = '\0';
    return p;
}

/* --- the wire, written and read by hand ------------------------------------------------------- */

typedef struct wire {
    unsigned char *p;
    size_t n, cap;
} wire;

CT_FN void wire_put(wire *w, const void *bytes, size_t n)
{
    if (w->n + n > w->cap) {
        w->cap = (w->n + n) * 2;
        w->p = (unsigned char *)realloc(w->p, w->cap);
        assert_non_null(w->p);
    }
    if (n)
        memcpy(w->p + w->n, bytes, n);
    w->n += n;
}

CT_FN void wire_varint(wire *w, uint64_t v)
{
    do {
        unsigned char c = (unsigned char)((v & 0x7f) | (v > 0x7f ? 0x80 : 0));
        wire_put(w, &c, 1);
        v >>= 7;
    } while (v);
}

CT_FN void wire_int(wire *w, unsigned field, int64_t v)
{
    wire_varint(w, field << 3);
    wire_varint(w, (uint64_t)v);
}

CT_FN void wire_bytes(wire *w, unsigned field, const void *bytes, size_t n)
{
    wire_varint(w, field << 3 | 2);
    wire_varint(w, n);
    wire_put(w, bytes, n);
}

CT_FN void wire_str(wire *w, unsigned field, const char *text)
{
    wire_bytes(w, field, text, strlen(text));
}

CT_FN void wire_free(wire *w)
{
    free(w->p);
    memset(w, 0, sizeof *w);
}

CT_FN void wire_be32(wire *w, uint32_t v)
{
    unsigned char b[4];
    b[0] = (unsigned char)(v >> 24);
    b[1] = (unsigned char)(v >> 16);
    b[2] = (unsigned char)(v >> 8);
    b[3] = (unsigned char)v;
    wire_put(w, b, 4);
}

/* Header, meta, body. */
CT_FN void wire_frame(wire *w, const wire *meta, const void *body, size_t n)
{
    wire_put(w, "PRPC", 4);
    wire_be32(w, (uint32_t)(meta->n + n));
    wire_be32(w, (uint32_t)meta->n);
    wire_put(w, meta->p, meta->n);
    wire_put(w, body, n);
}

typedef struct wire_request_options {
    int64_t compress, content, checksum, attachment, timeout_ms;
    int stream, chunk;
} wire_request_options;

CT_FN void wire_request_body(wire *w, const char *service, const char *method, int64_t id,
                             const void *body, size_t n, const wire_request_options *o)
{
    wire meta = {NULL, 0, 0}, request = {NULL, 0, 0};
    wire_str(&request, 1, service);
    wire_str(&request, 2, method);
    if (o && o->timeout_ms)
        wire_int(&request, 8, o->timeout_ms);
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 3, o ? o->compress : 0);
    wire_int(&meta, 4, id);
    if (o && o->attachment)
        wire_int(&meta, 5, o->attachment);
    if (o && o->chunk)
        wire_str(&meta, 6, "\x08\x01");
    if (o && o->stream)
        wire_str(&meta, 8, "\x08\x01");
    if (o && o->content)
        wire_int(&meta, 10, o->content);
    if (o && o->checksum)
        wire_int(&meta, 11, o->checksum);
    wire_frame(w, &meta, body, n);
    wire_free(&meta);
    wire_free(&request);
}

/* A request of dyn.Echo with a Num. */
CT_FN void wire_request(wire *w, const char *method, int64_t id, int64_t n, int64_t ms)
{
    wire body = {NULL, 0, 0};
    wire_int(&body, 1, n);
    wire_int(&body, 2, ms);
    wire_request_body(w, "dyn.Echo", method, id, body.p, body.n, NULL);
    wire_free(&body);
}

/* Header and meta of a request of dyn.Echo whose payload and attachment, `body` bytes, follow.
 * `credential` NULL: none. `fields` is key, value, ..., NULL, or NULL. */
CT_FN void wire_request_head(wire *w, const char *method, int64_t id, const void *credential,
                             size_t size, int64_t attachment, const char *const *fields,
                             size_t body)
{
    wire meta = {NULL, 0, 0}, request = {NULL, 0, 0};
    wire_str(&request, 1, "dyn.Echo");
    wire_str(&request, 2, method);
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 4, id);
    if (attachment)
        wire_int(&meta, 5, attachment);
    if (credential)
        wire_bytes(&meta, 7, credential, size);
    for (; fields && *fields; fields += 2) {
        wire entry = {NULL, 0, 0};
        wire_str(&entry, 1, fields[0]);
        wire_str(&entry, 2, fields[1]);
        wire_bytes(&meta, 9, entry.p, entry.n);
        wire_free(&entry);
    }
    wire_put(w, "PRPC", 4);
    wire_be32(w, (uint32_t)(meta.n + body));
    wire_be32(w, (uint32_t)meta.n);
    wire_put(w, meta.p, meta.n);
    wire_free(&meta);
    wire_free(&request);
}

/* A request with user_fields, whole. */
CT_FN void wire_request_fields(wire *w, const char *method, int64_t id, const char *body, size_t n,
                               int64_t attachment, const char *const *fields)
{
    wire_request_head(w, method, id, NULL, 0, attachment, fields, n);
    wire_put(w, body, n);
}

/* A good reply with a Num. */
CT_FN void wire_reply(wire *w, int64_t id, int64_t n)
{
    wire meta = {NULL, 0, 0}, response = {NULL, 0, 0}, body = {NULL, 0, 0};
    wire_int(&response, 1, 0);
    wire_bytes(&meta, 2, response.p, response.n);
    wire_int(&meta, 3, 0);
    wire_int(&meta, 4, id);
    wire_int(&body, 1, n);
    wire_frame(w, &meta, body.p, body.n);
    wire_free(&meta);
    wire_free(&response);
    wire_free(&body);
}

/* An error reply; `mark`: as an application's error. It has a body too, as some peers send. */
CT_FN void wire_error(wire *w, int64_t id, int64_t code, const char *text, int mark)
{
    wire meta = {NULL, 0, 0}, response = {NULL, 0, 0}, body = {NULL, 0, 0}, entry = {NULL, 0, 0};
    wire_int(&response, 1, code);
    if (text)
        wire_str(&response, 2, text);
    wire_bytes(&meta, 2, response.p, response.n);
    wire_int(&meta, 4, id);
    if (mark) {
        wire_str(&entry, 1, "crpc-app");
        wire_str(&entry, 2, "1");
        wire_bytes(&meta, 9, entry.p, entry.n);
    }
    wire_int(&body, 1, 4711);
    wire_frame(w, &meta, body.p, body.n);
    wire_free(&meta);
    wire_free(&response);
    wire_free(&body);
    wire_free(&entry);
}

/* The farewell of a stopping server. */
CT_FN void wire_farewell(wire *w)
{
    wire meta = {NULL, 0, 0}, response = {NULL, 0, 0}, entry = {NULL, 0, 0};
    wire_int(&response, 1, CRPC_ELOGOFF);
    wire_bytes(&meta, 2, response.p, response.n);
    wire_int(&meta, 3, 0);
    wire_int(&meta, 4, -1);
    wire_str(&entry, 1, "crpc-farewell");
    wire_str(&entry, 2, "1");
    wire_bytes(&meta, 9, entry.p, entry.n);
    wire_frame(w, &meta, NULL, 0);
    wire_free(&meta);
    wire_free(&response);
    wire_free(&entry);
}

/* A frame as it was read. */
typedef struct wire_message {
    int64_t id, code, compress, attachment_size, timeout_ms, log_id, n;
    bool has_id, has_compress, has_response, has_code, has_request;
    char text[512], service[128], method[128];
    unsigned char *body; /* after the meta */
    size_t body_size;
    unsigned char *all;
} wire_message;

CT_FN const unsigned char *wire_get(const unsigned char *p, uint64_t *v)
{
    unsigned shift = 0;
    *v = 0;
    for (;; p++, shift += 7) {
        *v |= (uint64_t)(*p & 0x7f) << shift;
        if (*p < 0x80)
            return p + 1;
    }
}

/* Goes through the fields of a message that is known to be well-formed. level 0: RpcMeta, 1: its
 * request, 2: its response. */
CT_FN void wire_walk(wire_message *m, const unsigned char *p, const unsigned char *end, int level)
{
    while (p < end) {
        uint64_t key, v;
        const unsigned char *bytes = NULL;
        p = wire_get(p, &key);
        p = wire_get(p, &v);
        if ((key & 7) == 2) {
            bytes = p;
            p += v;
        }
        key = (uint64_t)level * 1000 + (key >> 3);
        if (key == 1 || key == 2) {
            *(key == 1 ? &m->has_request : &m->has_response) = true;
            wire_walk(m, bytes, p, (int)key);
        } else if (key == 3) {
            m->compress = (int64_t)v, m->has_compress = true;
        } else if (key == 4) {
            m->id = (int64_t)v, m->has_id = true;
        } else if (key == 5) {
            m->attachment_size = (int64_t)v;
        } else if (key == 1001) {
            snprintf(m->service, sizeof m->service, "%.*s", (int)v, (const char *)bytes);
        } else if (key == 1002) {
            snprintf(m->method, sizeof m->method, "%.*s", (int)v, (const char *)bytes);
        } else if (key == 1003) {
            m->log_id = (int64_t)v;
        } else if (key == 1008) {
            m->timeout_ms = (int64_t)v;
        } else if (key == 2001) {
            m->code = (int64_t)v, m->has_code = true;
        } else if (key == 2002) {
            snprintf(m->text, sizeof m->text, "%.*s", (int)v, (const char *)bytes);
        }
    }
}

/* Reads exactly n bytes; how many came before the end. -1: an error, ECONNRESET for one. */
CT_FN ssize_t wire_read(int fd, void *to, size_t n)
{
    size_t have = 0;
    while (have < n) {
        ssize_t got = recv(fd, (char *)to + have, n - have, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        have += (size_t)got;
    }
    return (ssize_t)have;
}

/* Reads one frame: 1, 0 at the end of the stream, -1 for an error or a cut frame. Free it. */
CT_FN int wire_receive(int fd, wire_message *m)
{
    unsigned char head[12];
    uint32_t body, meta;
    ssize_t n = wire_read(fd, head, 12);
    memset(m, 0, sizeof *m);
    if (n != 12)
        return n == 0 ? 0 : -1;
    assert_memory_equal(head, "PRPC", 4);
    body = (uint32_t)head[4] << 24 | (uint32_t)head[5] << 16 | (uint32_t)head[6] << 8 | head[7];
    meta = (uint32_t)head[8] << 24 | (uint32_t)head[9] << 16 | (uint32_t)head[10] << 8 | head[11];
    assert_true(meta <= body);
    m->all = (unsigned char *)malloc(body + 1);
    if (wire_read(fd, m->all, body) != (ssize_t)body) {
        free(m->all);
        m->all = NULL;
        return -1;
    }
    wire_walk(m, m->all, m->all + meta, 0);
    m->body = m->all + meta;
    m->body_size = body - meta;
    if (m->body_size && m->body[0] == 1 << 3) { /* the n of a Num */
        uint64_t v;
        wire_get(m->body + 1, &v);
        m->n = (int64_t)v;
    }
    return 1;
}

/* Copies the value of a user field in a frame's meta; false: there is none of that name. */
CT_FN bool wire_field(const wire_message *m, const char *key, char *value, size_t size)
{
    char entry[64];
    int n = snprintf(entry, sizeof entry, "\n%c%s\x12", (int)strlen(key), key);
    const char *at = (const char *)memmem(m->all, (size_t)(m->body - m->all), entry, (size_t)n);
    if (at)
        snprintf(value, size, "%.*s", at[n], at + n + 1);
    return at != NULL;
}

/* Whether it has a user field of that name, with the value 1. */
CT_FN bool wire_has_mark(const wire_message *m, const char *key)
{
    char value[64];
    return wire_field(m, key, value, sizeof value) && strcmp(value, "1") == 0;
}

CT_FN void wire_done(wire_message *m)
{
    free(m->all);
    m->all = NULL;
}

CT_FN bool wire_send(int fd, const void *p, size_t n)
{
    while (n) {
        ssize_t sent = send(fd, p, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        p = (const char *)p + sent;
        n -= (size_t)sent;
    }
    return true;
}

CT_FN bool wire_flush(int fd, wire *w)
{
    bool ok = wire_send(fd, w->p, w->n);
    wire_free(w);
    return ok;
}

CT_FN void net_send(int fd, const char *method, int64_t id, const char *body, size_t n,
                    const char *const *fields)
{
    wire w = {NULL, 0, 0};
    wire_request_fields(&w, method, id, body, n, 0, fields);
    assert_true(wire_flush(fd, &w));
}

/* Receives the reply to a request and returns its code; its words in text. */
CT_FN int64_t net_reply_code(int fd, int64_t id, char *text)
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

/* Sends one request by hand and returns the reply's code; its words in text. */
CT_FN int64_t net_ask(int fd, const char *service, const char *method, int64_t id,
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

/* A blocking socket, connected to tcp://127.0.0.1:port or unix:///path; gives up after a while.
 * `from`: the host's own address, such as 127.0.0.2; NULL: the kernel's choice. */
CT_FN int wire_connect_from(const char *url, const char *from)
{
    struct timeval patience = {NET_PATIENCE / 1000, 0};
    int fd, one = 1;
    if (strncmp(url, "unix://", 7) == 0) {
        struct sockaddr_un a;
        memset(&a, 0, sizeof a);
        a.sun_family = AF_UNIX;
        strcpy(a.sun_path, url + 7);
        fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (connect(fd, (struct sockaddr *)&a, sizeof a))
            fail_msg("%s: %s", url, strerror(errno));
    } else {
        struct sockaddr_in a;
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        a.sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1));
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (from) {
            struct sockaddr_in own = a;
            own.sin_port = 0;
            assert_int_equal(inet_pton(AF_INET, from, &own.sin_addr), 1);
            assert_int_equal(bind(fd, (struct sockaddr *)&own, sizeof own), 0);
        }
        if (connect(fd, (struct sockaddr *)&a, sizeof a))
            fail_msg("%s: %s", url, strerror(errno));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return fd;
}

CT_FN int wire_connect(const char *url)
{
    return wire_connect_from(url, NULL);
}

/* Closes with a reset instead of an orderly end. */
CT_FN void wire_reset(int fd)
{
    struct linger hard = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
    close(fd);
}

/* --- a server that does what a script says ---------------------------------------------------- */

#define PEER_CONNS 64

typedef struct peer peer;
/* Handles one connection; `fd` is closed behind it unless it returns false. */
typedef bool (*peer_fn)(peer *p, int fd, int number);

struct peer {
    peer_fn fn;
    void *user;
    int listen_fd, port;
    char url[64];
    pthread_t acceptor;
    pthread_mutex_t lock;
    int accepted; /* connections so far */
    int requests; /* for scripts to count in */
    int stopping;
    int fds[PEER_CONNS]; /* -1: closed */
    pthread_t threads[PEER_CONNS];
    bool sequential; /* one connection after another, any number of them */
};

typedef struct peer_conn {
    peer *p;
    int fd, number;
} peer_conn;

CT_FN void *peer_conn_thread(void *arg)
{
    peer_conn c = *(peer_conn *)arg;
    bool ours;
    free(arg);
    ours = c.p->fn(c.p, c.fd, c.number);
    pthread_mutex_lock(&c.p->lock);
    c.p->fds[c.number % PEER_CONNS] = -1;
    if (ours)
        close(c.fd);
    pthread_mutex_unlock(&c.p->lock);
    return NULL;
}

CT_FN void *peer_thread(void *arg)
{
    peer *p = (peer *)arg;
    for (;;) {
        int fd = accept4(p->listen_fd, NULL, NULL, SOCK_CLOEXEC), one = 1;
        struct timeval patience = {NET_PATIENCE / 1000, 0};
        peer_conn *c;
        if (fd < 0)
            break;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
        pthread_mutex_lock(&p->lock);
        if (p->stopping) {
            pthread_mutex_unlock(&p->lock);
            close(fd);
            break;
        }
        c = (peer_conn *)malloc(sizeof *c);
        c->p = p;
        c->fd = fd;
        c->number = p->accepted++;
        p->fds[c->number % PEER_CONNS] = fd;
        if (!p->sequential) {
            assert_true(c->number < PEER_CONNS);
            assert_int_equal(pthread_create(&p->threads[c->number], NULL, peer_conn_thread, c), 0);
        }
        pthread_mutex_unlock(&p->lock);
        if (p->sequential)
            peer_conn_thread(c);
    }
    return NULL;
}

CT_FN void peer_open_on(peer *p, int port, peer_fn fn, void *user)
{
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    int one = 1, i;
    bool sequential = p->sequential;
    memset(p, 0, sizeof *p);
    p->sequential = sequential;
    p->fn = fn;
    p->user = user;
    for (i = 0; i < PEER_CONNS; i++)
        p->fds[i] = -1;
    pthread_mutex_init(&p->lock, NULL);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)port);
    p->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(p->listen_fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    assert_int_equal(bind(p->listen_fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(p->listen_fd, 128), 0);
    assert_int_equal(getsockname(p->listen_fd, (struct sockaddr *)&a, &size), 0);
    p->port = ntohs(a.sin_port);
    snprintf(p->url, sizeof p->url, "tcp://127.0.0.1:%d", p->port);
    assert_int_equal(pthread_create(&p->acceptor, NULL, peer_thread, p), 0);
}

CT_FN void peer_open(peer *p, peer_fn fn, void *user)
{
    memset(p, 0, sizeof *p);
    peer_open_on(p, 0, fn, user);
}

/* Ends it: its connections see the end of the stream. */
CT_FN void peer_close(peer *p)
{
    int i;
    pthread_mutex_lock(&p->lock);
    p->stopping = 1;
    shutdown(p->listen_fd, SHUT_RDWR);
    for (i = 0; i < PEER_CONNS; i++) {
        if (p->fds[i] >= 0)
            shutdown(p->fds[i], SHUT_RDWR);
    }
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->acceptor, NULL);
    for (i = 0; !p->sequential && i < p->accepted; i++)
        pthread_join(p->threads[i], NULL);
    close(p->listen_fd);
    pthread_mutex_destroy(&p->lock);
}

/* The same as a process of its own; fill in what peer_open_on would keep. */
CT_FN pid_t peer_fork(peer *p, peer_fn fn)
{
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    pid_t child;
    memset(p, 0, sizeof *p);
    p->sequential = true;
    p->fn = fn;
    pthread_mutex_init(&p->lock, NULL);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    p->listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(p->listen_fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(p->listen_fd, 128), 0);
    assert_int_equal(getsockname(p->listen_fd, (struct sockaddr *)&a, &size), 0);
    snprintf(p->url, sizeof p->url, "tcp://127.0.0.1:%d", ntohs(a.sin_port));
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        peer_thread(p);
        _exit(0);
    }
    close(p->listen_fd);
    return child;
}

CT_FN void peer_kill(pid_t child)
{
    int status;
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
}

CT_FN int peer_accepted(peer *p)
{
    int n;
    pthread_mutex_lock(&p->lock);
    n = p->accepted;
    pthread_mutex_unlock(&p->lock);
    return n;
}

CT_FN int peer_requests(peer *p)
{
    int n;
    pthread_mutex_lock(&p->lock);
    n = p->requests;
    pthread_mutex_unlock(&p->lock);
    return n;
}

/* Reads a request and counts it. */
CT_FN int peer_receive(peer *p, int fd, wire_message *m)
{
    int got = wire_receive(fd, m);
    if (got == 1) {
        pthread_mutex_lock(&p->lock);
        p->requests++;
        pthread_mutex_unlock(&p->lock);
    }
    return got;
}

/* A script: answers every request with n + 1. */
CT_FN bool peer_adds(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        wire_reply(&w, m.id, m.n + 1);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

/* A script: reads and never answers. */
CT_FN bool peer_silent(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1)
        wire_done(&m);
    return true;
}

/* A script: reads nothing until it is closed. */
CT_FN bool peer_deaf(peer *p, int fd, int number)
{
    struct pollfd wait = {0, 0, 0};
    (void)number;
    wait.fd = fd;
    while (poll(&wait, 1, 10) == 0) {
        pthread_mutex_lock(&p->lock);
        if (p->stopping) {
            pthread_mutex_unlock(&p->lock);
            break;
        }
        pthread_mutex_unlock(&p->lock);
    }
    return true;
}

/* A script: takes one request and closes without an answer. */
CT_FN bool peer_hangs_up(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    if (peer_receive(p, fd, &m) == 1)
        wire_done(&m);
    return true;
}

/* A script: answers that the server is going away. */
CT_FN bool peer_refuses(peer *p, int fd, int code)
{
    wire_message m;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        wire_error(&w, m.id, code, "bye", 0);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

CT_FN bool peer_says_logoff(peer *p, int fd, int number)
{
    (void)number;
    return peer_refuses(p, fd, CRPC_ELOGOFF);
}

CT_FN bool peer_says_limit(peer *p, int fd, int number)
{
    (void)number;
    return peer_refuses(p, fd, CRPC_ELIMIT);
}

/* --- what a callback was told ----------------------------------------------------------------- */

typedef struct done_log {
    pthread_mutex_t lock;
    int count;
    int status;
    int64_t n;
    int app_code;
    crpc_error error;
    char *bytes;
    size_t size;
    pthread_t thread;
} done_log;

CT_FN void done_init(done_log *d)
{
    memset(d, 0, sizeof *d);
    pthread_mutex_init(&d->lock, NULL);
}

CT_FN int done_count(done_log *d)
{
    int n;
    pthread_mutex_lock(&d->lock);
    n = d->count;
    pthread_mutex_unlock(&d->lock);
    return n;
}

CT_FN void done_num(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    done_log *d = (done_log *)user;
    pthread_mutex_lock(&d->lock);
    d->count++;
    d->status = status;
    d->n = response ? response->n : -1;
    d->error = call->error;
    d->thread = pthread_self();
    pthread_mutex_unlock(&d->lock);
}

/* Keeps a copy of the data and the attachment behind it; free `bytes`. */
CT_FN void done_blob(void *user, int status, const dyn_Blob *response, crpc_call *call)
{
    done_log *d = (done_log *)user;
    pthread_mutex_lock(&d->lock);
    d->count++;
    d->status = status;
    d->error = call->error;
    if (!status) {
        d->size = crpc_view_size(response->data) + crpc_view_size(call->reply_attachment);
        d->bytes = (char *)malloc(d->size + 1);
        crpc_view_copy(response->data, d->bytes, d->size + 1);
        memcpy(d->bytes + crpc_view_size(response->data), crpc_view_data(call->reply_attachment),
               crpc_view_size(call->reply_attachment));
    }
    pthread_mutex_unlock(&d->lock);
}

/* --- several providers behind one channel ----------------------------------------------------- */

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

CT_FN void fleet_mood_set(fleet_peer *p, fleet_mood mood)
{
    __atomic_store_n(&p->mood, mood, __ATOMIC_SEQ_CST);
}

/* Answers with its own index in ms. */
CT_FN int fleet_answer(crpc_context *x, const dyn_Num *in, dyn_Num *out)
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

static CT_UNUSED const dyn_Echo_handlers fleet_handlers = {
    fleet_answer, fleet_answer, net_pass, fleet_answer, net_fail, net_status, net_meta, net_add};

CT_FN void fleet_peer_open(fleet_peer *p, int index, const char *listen)
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

CT_FN void fleet_release(fleet *f)
{
    crpc_context *x;
    int i;
    for (i = 0; i < f->count; i++) {
        while (f->peers[i].server && (x = net_take(&f->peers[i].service)) != NULL)
            crpc_context_finish(x, CRPC_OK);
    }
}

CT_FN void fleet_peer_close(fleet_peer *p)
{
    if (!p->server)
        return;
    crpc_server_close(p->server);
    crpc_loop_close(p->loop);
    pthread_mutex_destroy(&p->service.lock);
    p->server = NULL;
}

CT_FN void fleet_open(fleet *f, int count, const char *query, const crpc_channel_options *options)
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

/* What the channel knows of a peer: its list is sorted by address. */
CT_FN crpci_member *fleet_member(fleet *f, int which)
{
    size_t i = 0;
    while (strcmp(crpci_providers_at(&f->channel->providers, i)->endpoint->address,
                  f->peers[which].address) != 0)
        i++;
    return crpci_providers_at(&f->channel->providers, i);
}

/* Whether everything that was sent has been read, served and, where it was kept, let go. */
CT_FN bool fleet_is_quiet(fleet *f)
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

CT_FN void fleet_close(fleet *f)
{
    int i;
    for (i = 0; i < f->count; i++)
        fleet_mood_set(&f->peers[i], FLEET_WELL);
    crpc_channel_close(f->channel);
    assert_true(CT_WAIT(fleet_is_quiet(f), NET_PATIENCE));
    for (i = 0; i < f->count; i++)
        fleet_peer_close(&f->peers[i]);
}

CT_FN int fleet_calls(fleet *f)
{
    int i, n = 0;
    for (i = 0; i < f->count; i++)
        n += net_calls(&f->peers[i].service);
    return n;
}

typedef enum fleet_form { FORM_SYNC, FORM_ASYNC, FORM_ID, FORMS } fleet_form;

typedef struct fleet_result {
    int status;
    dyn_Num out;
    crpc_error error;
    int done; /* atomic */
} fleet_result;

CT_FN void fleet_done(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    fleet_result *r = (fleet_result *)user;
    r->status = status;
    if (response)
        r->out = *response;
    r->error = call->error;
    __atomic_store_n(&r->done, 1, __ATOMIC_SEQ_CST);
}

/* Get is idempotent, Add is not. */
CT_FN fleet_result fleet_call(fleet *f, fleet_form form, bool idempotent, int64_t n,
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
        assert_int_equal((idempotent ? dyn_Echo_Get_async : dyn_Echo_Add_async)(
                             f->channel, &request, fleet_done, &r, in),
                         CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    } else {
        assert_int_equal(
            (idempotent ? dyn_Echo_Get_begin : dyn_Echo_Add_begin)(f->channel, &request, &id, in),
            CRPC_OK);
        assert_int_equal(crpc_channel_wait(f->channel, id, -1), CRPC_OK);
        r.status =
            (idempotent ? dyn_Echo_Get_fetch : dyn_Echo_Add_fetch)(f->channel, id, &r.out, &call);
        r.error = call.error;
    }
    assert_int_equal(r.error.code, r.status);
    crpc_call_reset(&call);
    return r;
}

CT_FN uint32_t fleet_pending(fleet *f)
{
    crpc_loop_stats s;
    crpc_loop_stats_get(crpc_channel_loop(f->channel), &s);
    return s.pending;
}

#endif /* CRPC_NET_H_INCLUDED */
