/* impl-protocols, and the seam between protocols and all else: a second protocol, `line`, that does
 * most things differently from baidu_std, goes through server and client as they are. Its replies
 * have no ids but keep the order of the requests, it says names and fields in text, and a body
 * comes in parts, so that it is found too large only late. */
#define CRPC_IMPLEMENTATION
struct crpci_protocol;
extern const struct crpci_protocol line_protocol;
#define CRPCI_TEST_PROTOCOLS &line_protocol
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"

/* --- the protocol -----------------------------------------------------------------------------
 * "PRL:", size of the head (big-endian 32 bits), head, parts. A part is its size, with the highest
 * bit set if more follow, and its bytes. The head is lines: service/method or =status, then
 * t:text  f:key=value  l:log_id  d:timeout_ms  c:credential  a:size of the attachment  u:wish */

#define LINE_MORE     0x80000000u
#define LINE_HEAD_MAX 65536u

typedef struct line_state {
    bool dropping; /* parts of a body that was too large */
} line_state;

static crpci_detected line_detect(const uint8_t *p, size_t n)
{
    if (memcmp(p, "PRL:", n < 4 ? n : 4) != 0)
        return CRPCI_DETECTED_NO;
    return n < 4 ? CRPCI_DETECTED_MORE : CRPCI_DETECTED_YES;
}

/* The line that begins with `tag`; false: there is none. */
static bool line_find(crpc_view head, const char *tag, crpc_view *value)
{
    const char *p = crpc_view_data(head), *end = (const char *)head.end;
    size_t n = strlen(tag);
    while (p && p < end) {
        const char *stop = (const char *)memchr(p, '\n', (size_t)(end - p));
        if ((size_t)(stop - p) >= n && memcmp(p, tag, n) == 0) {
            *value = crpc_view_of(p + n, (size_t)(stop - p) - n);
            return true;
        }
        p = stop + 1;
    }
    return false;
}

static int64_t line_number(crpc_view head, const char *tag)
{
    crpc_view v;
    char text[24];
    if (!line_find(head, tag, &v))
        return 0;
    crpc_view_copy(v, text, sizeof text);
    return atoll(text);
}

static void line_read(const crpci_conn *c, crpc_view head, crpci_message *m)
{
    const char *p = crpc_view_data(head), *stop, *slash;
    memset(m, 0, sizeof *m);
    m->kind = crpci_receive_kind(c);
    m->fields = head;
    m->has_fields = true;
    m->timeout_ms = (int32_t)line_number(head, "d:");
    m->attachment_size = (size_t)line_number(head, "a:");
    m->log_id = line_number(head, "l:");
    m->status = (int32_t)line_number(head, "=");
    line_find(head, "t:", &m->text);
    line_find(head, "c:", &m->credential);
    if (line_number(head, "u:"))
        m->unsupported = "wishes are not supported";
    stop = (const char *)memchr(p, '\n', crpc_view_size(head));
    slash = (const char *)memchr(p, '/', (size_t)(stop - p));
    if (slash) {
        m->service = crpc_view_of(p, (size_t)(slash - p));
        m->method = crpc_view_of(slash + 1, (size_t)(stop - slash) - 1);
    }
}

/* The head and the parts behind it are there from `at` to `end`: one body is made of them. */
static bool line_deliver(crpci_conn *c, crpci_chunk *chunk, crpc_view head, const uint8_t *at,
                         const uint8_t *end, bool *waits)
{
    crpci_message m;
    size_t size = (size_t)(end - at);
    crpci_chunk *own = NULL;
    line_read(c, head, &m);
    m.chunk = chunk;
    m.payload = at + 4;
    m.payload_size = size - 4;
    if (crpci_base_get32(at) & LINE_MORE) { /* with the head in front, as a reply wants it */
        size_t n = crpc_view_size(head), part;
        uint8_t *to;
        own = crpci_heap_chunk(c->loop->heap, n + size);
        if (!own)
            return false;
        to = crpci_heap_data(own);
        memcpy(to, crpc_view_data(head), n);
        line_read(c, crpc_view_of(to, n), &m);
        m.chunk = own;
        m.payload = to += n;
        for (m.payload_size = 0; at < end; at += 4 + part) {
            part = crpci_base_get32(at) & ~LINE_MORE;
            memcpy(to + m.payload_size, at + 4, part);
            m.payload_size += part;
        }
    }
    m.payload_size -= m.attachment_size;
    if (!crpci_receive_deliver(c, &m))
        *waits = true;
    crpci_heap_chunk_unref(own);
    return true;
}

static size_t line_feed(crpci_conn *c, crpci_chunk *chunk, const uint8_t *p, size_t n)
{
    line_state *s = (line_state *)c->protocol_state;
    crpc_view head;
    size_t at, total = 0;
    bool waits = false;
    uint32_t part;
    c->rx_total = s->dropping ? 4 : 8;
    if (n < c->rx_total)
        return 0;
    if (s->dropping) {
        part = crpci_base_get32(p);
        s->dropping = (part & LINE_MORE) != 0;
        c->skip = part & ~LINE_MORE;
        return 4;
    }
    at = 8 + (size_t)crpci_base_get32(p + 4);
    if (memcmp(p, "PRL:", 4) != 0 || at == 8 || at > LINE_HEAD_MAX) {
        crpci_receive_bad(c, "the peer does not speak line");
        return 0;
    }
    do {
        c->rx_total = at + 4;
        if (n < c->rx_total)
            return 0;
        head = crpc_view_of(p + 8, crpci_base_get32(p + 4));
        part = crpci_base_get32(p + at);
        total += part & ~LINE_MORE;
        if (total > c->max_body) {
            crpci_message m;
            line_read(c, head, &m);
            if (!crpci_receive_oversize(c, &m, total, part & ~LINE_MORE))
                return 0;
            s->dropping = (part & LINE_MORE) != 0;
            return at + 4;
        }
        at += 4 + (part & ~LINE_MORE);
    } while (part & LINE_MORE);
    c->rx_total = at;
    if (n < at)
        return 0;
    if (!line_deliver(c, chunk, head, p + 8 + crpc_view_size(head), p + at, &waits))
        crpci_conn_close(c, CRPC_ENOMEM, 0);
    return waits ? 0 : at;
}

static crpc_view line_names(uint8_t *out, size_t room, crpc_view service, crpc_view method)
{
    int n = snprintf((char *)out, room, "%.*s/%.*s\n", (int)crpc_view_size(service),
                     crpc_view_data(service), (int)crpc_view_size(method), crpc_view_data(method));
    return crpc_view_of(out, (size_t)n);
}

static size_t line_put_field(uint8_t *out, crpc_view key, crpc_view value)
{
    size_t k = crpc_view_size(key), v = crpc_view_size(value);
    memcpy(out, "f:", 2);
    memcpy(out + 2, crpc_view_data(key), k);
    out[2 + k] = '=';
    if (v)
        memcpy(out + 3 + k, crpc_view_data(value), v);
    out[3 + k + v] = '\n';
    return 4 + k + v;
}

static bool line_field(crpc_view fields, const char *key, crpc_view *value)
{
    char tag[128];
    snprintf(tag, sizeof tag, "f:%s=", key);
    return line_find(fields, tag, value);
}

/* Writes in front of p. */
static uint8_t *line_back(uint8_t *p, const void *bytes, size_t n)
{
    if (n)
        memcpy(p - n, bytes, n);
    return p - n;
}

static uint8_t *line_back_text(uint8_t *p, const char *tag, crpc_view v)
{
    p = line_back(line_back(p, "\n", 1), crpc_view_data(v), crpc_view_size(v));
    return line_back(p, tag, strlen(tag));
}

static uint8_t *line_back_number(uint8_t *p, const char *tag, int64_t n)
{
    char text[24];
    snprintf(text, sizeof text, "%lld", (long long)n);
    return n ? line_back_text(p, tag, crpc_view_str(text)) : p;
}

/* What both kinds have in common; `first` is the first line. */
static uint8_t *line_back_rest(uint8_t *low, uint8_t *end, uint8_t *p, crpc_view first)
{
    p = line_back(p, crpc_view_data(first), crpc_view_size(first));
    crpci_base_put32(p - 4, (uint32_t)(end - p));
    p = line_back(p - 4, "PRL:", 4);
    assert_true(p >= low);
    return p;
}

static uint8_t *line_begin(uint8_t *payload, const crpci_message *m)
{
    uint8_t *p = payload - 4;
    crpci_base_put32(p, (uint32_t)(m->payload_size + m->attachment_size));
    p = line_back(p, crpc_view_data(m->fields), crpc_view_size(m->fields));
    return line_back_number(p, "a:", (int64_t)m->attachment_size);
}

static uint8_t *line_request(uint8_t *low, uint8_t *payload, const crpci_message *m)
{
    uint8_t *p = line_begin(payload, m);
    if (crpc_view_size(m->credential))
        p = line_back_text(p, "c:", m->credential);
    p = line_back_number(line_back_number(p, "d:", m->timeout_ms), "l:", m->log_id);
    return line_back_rest(low, payload - 4, p, m->names);
}

static uint8_t *line_reply(uint8_t *low, uint8_t *payload, const crpci_message *m)
{
    uint8_t *p = line_begin(payload, m);
    char status[24];
    if (crpc_view_size(m->text))
        p = line_back_text(p, "t:", m->text);
    snprintf(status, sizeof status, "=%d\n", m->status);
    return line_back_rest(low, payload - 4, p, crpc_view_str(status));
}

const crpci_protocol line_protocol = {"line",     CRPCI_PROTOCOL_ORDERED,
                                      sizeof(line_state), 160, 4, line_detect, line_feed,
                                      line_names, line_put_field, line_field, line_request,
                                      line_reply, NULL};

/* --- by hand ---------------------------------------------------------------------------------- */

/* A message with `parts` parts of the same body. */
static void line_put(wire *w, const char *head, const void *body, size_t n, int parts)
{
    wire_put(w, "PRL:", 4);
    wire_be32(w, (uint32_t)strlen(head));
    wire_put(w, head, strlen(head));
    while (parts--) {
        wire_be32(w, (uint32_t)n | (parts ? LINE_MORE : 0));
        wire_put(w, body, n);
    }
}

static void line_num(wire *w, const char *method, int64_t n, int64_t ms)
{
    wire body = {NULL, 0, 0};
    char head[100];
    wire_int(&body, 1, n);
    wire_int(&body, 2, ms);
    snprintf(head, sizeof head, "dyn.Echo/%s\nd:20000\n", method);
    line_put(w, head, body.p, body.n, 1);
    wire_free(&body);
}

typedef struct line_message {
    char head[1000];
    int64_t status, n;
} line_message;

/* Reads one message: 1, 0 at the end, -1. */
static int line_receive(int fd, line_message *m)
{
    unsigned char b[8], body[5000];
    uint32_t size;
    ssize_t got = wire_read(fd, b, 8);
    memset(m, 0, sizeof *m);
    if (got != 8)
        return got == 0 ? 0 : -1;
    assert_memory_equal(b, "PRL:", 4);
    size = crpci_base_get32(b + 4);
    assert_true(size < sizeof m->head);
    assert_int_equal(wire_read(fd, m->head, size), size);
    assert_int_equal(wire_read(fd, b, 4), 4);
    size = crpci_base_get32(b);
    assert_true(size < sizeof body);
    assert_int_equal(wire_read(fd, body, size), size);
    m->status = atoll(m->head + 1);
    if (size && body[0] == 1 << 3) {
        uint64_t v;
        wire_get(body + 1, &v);
        m->n = (int64_t)v;
    }
    return 1;
}

static void expect_num(int fd, int64_t n)
{
    line_message m;
    assert_int_equal(line_receive(fd, &m), 1);
    assert_int_equal(m.status, 0);
    assert_int_equal(m.n, n);
}

static void expect_error(int fd, int64_t status, const char *text)
{
    line_message m;
    assert_int_equal(line_receive(fd, &m), 1);
    assert_int_equal(m.status, status);
    if (!strstr(m.head, text))
        fail_msg("%s: not in: %s", text, m.head);
}

/* Nothing comes, although the server has had time: it served a request of another connection. */
static void expect_nothing(net *n, int fd)
{
    struct pollfd p = {fd, POLLIN, 0};
    int other = wire_connect(n->url);
    wire w = {NULL, 0, 0};
    wire_message m;
    wire_request(&w, "Add", 1, 1, 0);
    assert_true(wire_flush(other, &w));
    assert_int_equal(wire_receive(other, &m), 1);
    wire_done(&m);
    close(other);
    assert_int_equal(poll(&p, 1, 0), 0);
}

static crpc_context *take(net *n)
{
    assert_true(CT_WAIT(net_held(&n->service) > 0, NET_PATIENCE));
    return net_take(&n->service);
}

/* --- tests ------------------------------------------------------------------------------------ */

static void protocols_are_found_by_name(void **state)
{
    crpc_channel *ch;
    crpc_error error;
    (void)state;
    assert_ptr_equal(crpci_protocols_find("baidu_std"), &crpci_baidu);
    assert_ptr_equal(crpci_protocols_find("line"), &line_protocol);
    assert_null(crpci_protocols_find("lin"));
    assert_null(crpci_protocols_find(""));
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:1?protocol=http", NULL, &error),
                     CRPC_EINVAL);
    assert_non_null(strstr(error.text, "protocol=http"));
}

static void both_are_told_apart_on_one_port_byte_by_byte(void **state)
{
    static const char *const rubbish[] = {"X", "PX", "PRX", "PRPX", "PRL;"};
    size_t i, k;
    (void)state;
    for (k = 1; k < 30; k += 4) { /* bytes at a time */
        net n;
        int a, b, both;
        wire w = {NULL, 0, 0}, v = {NULL, 0, 0};
        wire_message m;
        memset(&n, 0, sizeof n);
        net_open_server(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
        a = wire_connect(n.url);
        b = wire_connect(n.url);
        line_num(&w, "Add", 41, 0);
        wire_request(&v, "Add", 7, 99, 0);
        for (i = 0; i < w.n || i < v.n; i += k) {
            if (i < w.n)
                assert_true(wire_send(a, w.p + i, w.n - i < k ? w.n - i : k));
            if (i < v.n)
                assert_true(wire_send(b, v.p + i, v.n - i < k ? v.n - i : k));
        }
        expect_num(a, 42);
        assert_int_equal(wire_receive(b, &m), 1);
        assert_int_equal(m.id, 7);
        assert_int_equal(m.n, 100);
        wire_done(&m);
        for (both = 0; both < 2; both++) { /* a connection stays with its protocol */
            char end;
            assert_true(wire_send(both ? a : b, both ? v.p : w.p, both ? v.n : w.n));
            assert_true(wire_read(both ? a : b, &end, 1) <= 0);
        }
        close(a);
        close(b);
        wire_free(&w);
        wire_free(&v);
        for (i = 0; k == 1 && i < sizeof rubbish / sizeof *rubbish; i++) {
            char end;
            a = wire_connect(n.url);
            assert_true(wire_send(a, rubbish[i], strlen(rubbish[i])));
            assert_true(wire_read(a, &end, 1) <= 0);
            close(a);
        }
        net_close(&n);
    }
}

static void it_calls_in_every_arrangement(void **state)
{
    crpc_poller p;
    net_mode mode;
    (void)state;
    NET_EACH_POLLER(p)
    {
        NET_EACH_MODE(mode)
        {
            crpc_call call = CRPC_INIT;
            crpc_field field = {"a", "apple"};
            dyn_Num in = net_num(0), out = dyn_Num_init_zero;
            dyn_Blob blob = dyn_Blob_init_zero, back = dyn_Blob_init_zero;
            char *bytes = net_bytes(300000);
            crpc_view v;
            net n;
            int i;
            memset(&n, 0, sizeof n);
            n.query = "?protocol=line";
            net_open(&n, p, mode);
            for (i = 0; i < 50; i++)
                net_check_add(n.channel, i);
            call.fields = &field;
            call.field_count = 1;
            call.log_id = 4711;
            call.credential = crpc_view_str("secret");
            assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
            assert_int_equal(out.n, 4711);
            assert_string_equal(out.tag, "secret");
            assert_true(out.ms > 0);
            assert_true(crpc_call_field(&call, "b", &v) && crpc_view_equal(v, "apple"));
            assert_false(crpc_call_field(&call, "c", &v));
            crpc_call_reset(&call);
            memset(&call, 0, sizeof call);
            blob.data = crpc_view_of(bytes, 100000);
            call.attachment = crpc_view_of(bytes + 100000, 200000);
            assert_int_equal(dyn_Echo_Pass(n.channel, &blob, &back, &call), CRPC_OK);
            assert_int_equal(back.n, 200000);
            assert_int_equal(crpc_view_size(back.data), 100000);
            assert_memory_equal(crpc_view_data(back.data), bytes, 100000);
            assert_int_equal(crpc_view_size(call.reply_attachment), 200000);
            assert_memory_equal(crpc_view_data(call.reply_attachment), bytes + 100000, 200000);
            crpc_call_reset(&call);
            free(bytes);
            net_close(&n);
        }
    }
}

static int accept_all(void *user, const char *from, crpc_view credential, crpc_identity *identity)
{
    (void)from, (void)credential, (void)identity;
    __atomic_add_fetch((uint32_t *)user, 1, __ATOMIC_ACQ_REL);
    return CRPC_OK;
}

/* A message is read again after the verdict on it, and has its turn only once. */
static void replies_keep_their_order_while_peers_are_judged(void **state)
{
    static const char *const heads[] = {"dyn.Echo/Add\nc:one\n", "dyn.Echo/Add\n",
                                        "dyn.Echo/Add\nc:other\n"};
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        char *bytes = net_bytes(3000);
        wire w = {NULL, 0, 0};
        uint32_t asked = 0;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        n.server_options.limits.max_body = 2000;
        n.server_options.access.authenticate = accept_all;
        n.server_options.access.authenticate_user = &asked;
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 300; i++) {
            unsigned char body[2] = {1 << 3, (unsigned char)(i % 100)};
            if (i % 10)
                line_put(&w, heads[i % 3], body, 2, 1);
            else
                line_put(&w, heads[i % 3], bytes, 1000, 3); /* too large, when its third comes */
        }
        assert_true(wire_flush(fd, &w));
        for (i = 0; i < 300; i++) {
            if (i % 10)
                expect_num(fd, i % 100 + 1);
            else
                expect_error(fd, CRPC_EREQUEST, "over max_body");
        }
        assert_int_equal(__atomic_load_n(&asked, __ATOMIC_ACQUIRE), 200);
        close(fd);
        free(bytes);
        net_close(&n);
    }
}

static void errors_come_with_code_and_text(void **state)
{
    dyn_Num in = net_num(77), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    wire w = {NULL, 0, 0};
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    n.query = "?protocol=line";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_WORKERS);
    strcpy(in.tag, "no more");
    assert_int_equal(dyn_Echo_Fail(n.channel, &in, &out, &call), CRPC_EINTERNAL);
    in.n = 4077; /* 0 to 199 is reserved */
    assert_int_equal(dyn_Echo_Fail(n.channel, &in, &out, &call), CRPC_EAPP);
    assert_int_equal(call.error.app_code, 4077);
    assert_non_null(strstr(call.error.text, "no more (remote)"));
    fd = wire_connect(n.url);
    line_put(&w, "dyn.Echo/Nothing\n", "", 0, 1);
    line_put(&w, "Ekko/Add\n", "", 0, 1);
    line_put(&w, "dyn.Echo/Add\nu:1\n", "", 0, 1);
    line_put(&w, "dyn.Echo/Add\n", "\xff", 1, 1);
    line_num(&w, "Add", 5, 0);
    assert_true(wire_flush(fd, &w));
    expect_error(fd, CRPC_ENOMETHOD, "t:no such method: dyn.Echo.Nothing\n");
    expect_error(fd, CRPC_ENOSERVICE, "t:no such service: Ekko.Add\n");
    expect_error(fd, CRPC_EREQUEST, "t:wishes are not supported\n");
    expect_error(fd, CRPC_EREQUEST, "t:dyn.Echo.Add: request does not decode");
    expect_num(fd, 6);
    close(fd);
    crpc_call_reset(&call);
    net_close(&n);
}

static void a_body_that_grows_too_large_is_refused_in_its_turn(void **state)
{
    size_t step;
    (void)state;
    for (step = 0; step < 60; step += 7) {
        char part[300];
        wire w = {NULL, 0, 0};
        net n;
        int fd;
        size_t i;
        memset(&n, 0, sizeof n);
        memset(part, 0, sizeof part);
        n.server_options.limits.max_body = 1000;
        net_open_server(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
        fd = wire_connect(n.url);
        line_num(&w, "Defer", 1, 0);
        line_put(&w, "dyn.Echo/Pass\na:900\n", part, 300, 3); /* three parts that fit */
        line_put(&w, "dyn.Echo/Pass\n", part, 300, 9);        /* the fourth does not */
        line_put(&w, "dyn.Echo/Pass\n", part, 300, 4);        /* it is the last one */
        line_num(&w, "Add", 20, 0);
        if (step == 0)
            assert_true(wire_send(fd, w.p, w.n));
        for (i = 0; step && i < w.n; i += step)
            assert_true(wire_send(fd, w.p + i, w.n - i < step ? w.n - i : step));
        wire_free(&w);
        assert_true(CT_WAIT(net_calls(&n.service) == 3, NET_PATIENCE));
        expect_nothing(&n, fd); /* the first one's reply is still due */
        crpc_context_finish(take(&n), CRPC_OK);
        expect_num(fd, 2);
        expect_error(fd, CRPC_OK, "a:900\n");
        expect_error(fd, CRPC_EREQUEST, "t:request of 1200 bytes is over max_body, 1000\n");
        expect_error(fd, CRPC_EREQUEST, "t:request of 1200 bytes is over max_body, 1000\n");
        expect_num(fd, 21);
        close(fd);
        net_close(&n);
    }
}

static void a_reply_that_is_too_large_ends_its_call_alone(void **state)
{
    dyn_Blob blob = dyn_Blob_init_zero, back = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    char *bytes = net_bytes(5000);
    net n;
    (void)state;
    memset(&n, 0, sizeof n);
    n.query = "?protocol=line&max_body=4000";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    blob.data = crpc_view_of(bytes, 5000);
    assert_int_equal(dyn_Echo_Pass(n.channel, &blob, &back, &call), CRPC_ERESPONSE);
    assert_non_null(strstr(call.error.text, "is over max_body, 4000"));
    net_check_add(n.channel, 1);
    crpc_call_reset(&call);
    free(bytes);
    net_close(&n);
}

static void refusals_wait_for_their_turn(void **state)
{
    crpc_method_limit limit = CRPC_INIT;
    wire w = {NULL, 0, 0};
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    limit.method = dyn_Echo_Defer_method;
    limit.max_concurrency = 1;
    n.server_options.method_limits = &limit;
    n.server_options.method_limit_count = 1;
    net_open_server(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    line_num(&w, "Defer", 1, 0);
    line_num(&w, "Defer", 2, 0);
    line_num(&w, "Add", 3, 0);
    assert_true(wire_flush(fd, &w));
    assert_true(CT_WAIT(net_calls(&n.service) == 2, NET_PATIENCE));
    expect_nothing(&n, fd);
    crpc_context_finish(take(&n), CRPC_OK);
    expect_num(fd, 2);
    expect_error(fd, CRPC_ELIMIT, "max_concurrency");
    expect_num(fd, 4);
    close(fd);
    net_close(&n);
}

/* Those that were taken in and then let go: no worker has room for them. */
static void rejected_requests_fill_their_turn(void **state)
{
    wire w = {NULL, 0, 0};
    line_message m;
    net n;
    int fd, i, refused = 0, served = 0;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.workers = 1;
    n.server_options.worker_queue = 2;
    net_open_server(&n, CRPC_POLLER_DEFAULT, NET_WORKERS);
    fd = wire_connect(n.url);
    for (i = 0; i < 40; i++)
        line_num(&w, "Add", i, 5);
    assert_true(wire_flush(fd, &w));
    for (i = 0; i < 40; i++) {
        assert_int_equal(line_receive(fd, &m), 1);
        if (m.status) {
            assert_int_equal(m.status, CRPC_ELIMIT);
            assert_non_null(strstr(m.head, "worker_queue"));
            refused++;
        } else {
            assert_int_equal(m.n, i + 1);
            served++;
        }
    }
    assert_true(refused > 0 && served >= 2);
    close(fd);
    net_close(&n);
}

static void deferred_replies_keep_the_order(void **state)
{
    net_mode mode;
    (void)state;
    NET_EACH_MODE(mode)
    {
        crpc_context *x[8];
        wire w = {NULL, 0, 0};
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        net_open_server(&n, CRPC_POLLER_DEFAULT, mode);
        fd = wire_connect(n.url);
        for (i = 0; i < 8; i++) {
            line_num(&w, "Defer", i, 0);
            assert_true(wire_flush(fd, &w));
            x[i] = take(&n);
        }
        for (i = 7; i > 0; i--)
            crpc_context_finish(x[i], i == 3 ? CRPC_ELIMIT : CRPC_OK);
        expect_nothing(&n, fd);
        crpc_context_finish(x[0], CRPC_OK);
        for (i = 0; i < 8; i++) {
            if (i == 3)
                expect_error(fd, CRPC_ELIMIT, "=2004\n");
            else
                expect_num(fd, i + 1);
        }
        close(fd);
        net_close(&n);
    }
}

/* Connections that go while replies wait for their turn. */
static void waiting_replies_go_with_their_connection(void **state)
{
    crpc_context *first;
    wire w = {NULL, 0, 0};
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open_server(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    line_num(&w, "Defer", 1, 0);
    line_num(&w, "Add", 2, 0);
    line_num(&w, "Add", 3, 0);
    assert_true(wire_flush(fd, &w));
    assert_true(CT_WAIT(net_calls(&n.service) == 3, NET_PATIENCE));
    expect_nothing(&n, fd);
    first = take(&n);
    wire_reset(fd);
    assert_true(CT_WAIT(crpci_thread_load(&n.server->connections) == 0, NET_PATIENCE));
    assert_int_equal(crpc_context_finish(first, CRPC_OK), CRPC_EGONE);
    net_close(&n);
}

static void draining_answers_in_order_and_closes(void **state)
{
    net_mode mode;
    (void)state;
    NET_EACH_MODE(mode)
    {
        crpc_context *x[2];
        wire w = {NULL, 0, 0};
        line_message m;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = NET_PATIENCE;
        net_open_server(&n, CRPC_POLLER_DEFAULT, mode);
        fd = wire_connect(n.url);
        line_num(&w, "Defer", 1, 0);
        line_num(&w, "Defer", 2, 0);
        assert_true(wire_flush(fd, &w));
        x[0] = take(&n);
        x[1] = take(&n);
        crpc_server_stop(n.server);
        line_num(&w, "Add", 3, 0);
        assert_true(wire_flush(fd, &w));
        crpc_context_finish(x[1], CRPC_OK);
        crpc_context_finish(x[0], CRPC_OK);
        expect_num(fd, 2);
        expect_num(fd, 3);
        expect_error(fd, CRPC_ELOGOFF, "t:the server is stopping\n");
        assert_int_equal(line_receive(fd, &m), 0);
        close(fd);
        net_close(&n);
    }
}

static void requests_left_at_drain_ms_are_answered_in_order(void **state)
{
    net_mode mode;
    (void)state;
    NET_EACH_MODE(mode)
    {
        crpc_context *x[2];
        wire w = {NULL, 0, 0};
        line_message m;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 50;
        net_open_server(&n, CRPC_POLLER_DEFAULT, mode);
        fd = wire_connect(n.url);
        line_num(&w, "Defer", 1, 0);
        line_num(&w, "Add", 2, 0);
        line_num(&w, "Defer", 3, 0);
        assert_true(wire_flush(fd, &w));
        x[0] = take(&n);
        x[1] = take(&n);
        assert_true(CT_WAIT(crpci_thread_load(&n.server->serving) == 2, NET_PATIENCE));
        crpc_server_stop(n.server);
        expect_error(fd, CRPC_ECANCELED, "t:the server is stopping\n");
        expect_num(fd, 3);
        expect_error(fd, CRPC_ECANCELED, "t:the server is stopping\n");
        assert_int_equal(line_receive(fd, &m), 0);
        assert_int_equal(crpc_context_finish(x[1], CRPC_OK), CRPC_EGONE);
        assert_int_equal(crpc_context_finish(x[0], CRPC_OK), CRPC_EGONE);
        close(fd);
        net_close(&n);
    }
}

/* What has not sent a byte gets the farewell in baidu_std; it may speak another protocol yet. */
static void a_farewell_fixes_no_protocol(void **state)
{
    net_mode mode;
    (void)state;
    NET_EACH_MODE(mode)
    {
        wire w = {NULL, 0, 0};
        wire_message farewell;
        line_message m;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.quiet_ms = 300;
        n.server_options.drain_ms = NET_PATIENCE;
        net_open_server(&n, CRPC_POLLER_DEFAULT, mode);
        fd = wire_connect(n.url);
        assert_true(CT_WAIT(crpci_thread_load(&n.server->connections) == 1, NET_PATIENCE));
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(fd, &farewell), 1);
        assert_true(wire_has_mark(&farewell, "crpc-farewell"));
        wire_done(&farewell);
        line_num(&w, "Add", 3, 0);
        assert_true(wire_flush(fd, &w));
        expect_error(fd, CRPC_ELOGOFF, "t:the server is stopping\n");
        assert_int_equal(line_receive(fd, &m), 0);
        close(fd);
        net_close(&n);
    }
}

/* --- the client ------------------------------------------------------------------------------- */

typedef struct async {
    crpc_channel *ch;
    int done;
    int64_t n[200];
    int status[200];
} async;

static void on_done(void *user, int status, const dyn_Num *r, crpc_call *call)
{
    async *a = (async *)user;
    (void)call;
    a->status[a->done] = status;
    a->n[a->done] = status ? 0 : r->n;
    __atomic_add_fetch(&a->done, 1, __ATOMIC_SEQ_CST);
}

static int dones(async *a)
{
    return __atomic_load_n(&a->done, __ATOMIC_SEQ_CST);
}

static void begin_many(void *user)
{
    async *a = (async *)user;
    int i;
    for (i = 0; i < 200; i++) {
        dyn_Num in = net_num(i);
        assert_int_equal(dyn_Echo_Add_async(a->ch, &in, on_done, a, NULL), CRPC_OK);
    }
}

static void many_calls_share_a_connection(void **state)
{
    async a;
    net n;
    int i;
    (void)state;
    memset(&n, 0, sizeof n);
    memset(&a, 0, sizeof a);
    n.query = "?protocol=line";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_SHARED);
    a.ch = n.channel;
    assert_int_equal(crpc_loop_post(n.loop, begin_many, &a), CRPC_OK);
    assert_true(CT_WAIT(dones(&a) == 200, NET_PATIENCE));
    for (i = 0; i < 200; i++) {
        assert_int_equal(a.status[i], CRPC_OK);
        assert_int_equal(a.n[i], i + 1);
    }
    assert_int_equal(crpci_thread_load(&n.server->connections), 1);
    net_close(&n);
}

/* A reply is known by its place alone: that of a call which has ended must use its place up. */
static void late_replies_and_one_way_calls_keep_their_place(void **state)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    async a;
    net n;
    (void)state;
    memset(&n, 0, sizeof n);
    memset(&a, 0, sizeof a);
    n.query = "?protocol=line";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_SHARED);
    call.policy.timeout_ms = 20;
    assert_int_equal(dyn_Echo_Defer(n.channel, &in, &out, &call), CRPC_ETIMEDOUT);
    crpc_call_reset(&call);
    in.n = 10;
    assert_int_equal(dyn_Echo_Add_notify(n.channel, &in, NULL), CRPC_OK);
    in.n = 20;
    assert_int_equal(dyn_Echo_Add_async(n.channel, &in, on_done, &a, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_calls(&n.service) == 3, NET_PATIENCE));
    assert_int_equal(dones(&a), 0);
    crpc_context_finish(take(&n), CRPC_OK);
    assert_true(CT_WAIT(dones(&a) == 1, NET_PATIENCE));
    assert_int_equal(a.status[0], CRPC_OK);
    assert_int_equal(a.n[0], 21);
    net_close(&n);
}

/* A request that is withdrawn before it is sent takes no place in the order. */
static void begin_and_cancel(void *user)
{
    async *a = (async *)user;
    dyn_Num in = net_num(1);
    crpc_id id;
    assert_int_equal(dyn_Echo_Add_begin(a->ch, &in, &id, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(a->ch, id), CRPC_OK);
    in.n = 50;
    assert_int_equal(dyn_Echo_Add_async(a->ch, &in, on_done, a, NULL), CRPC_OK);
}

static void withdrawn_requests_take_no_place(void **state)
{
    async a;
    net n;
    (void)state;
    memset(&n, 0, sizeof n);
    memset(&a, 0, sizeof a);
    n.query = "?protocol=line";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_SHARED);
    net_check_add(n.channel, 1);
    a.ch = n.channel;
    assert_int_equal(crpc_loop_post(n.loop, begin_and_cancel, &a), CRPC_OK);
    assert_true(CT_WAIT(dones(&a) == 1, NET_PATIENCE));
    assert_int_equal(a.n[0], 51);
    assert_int_equal(net_calls(&n.service), 2);
    net_close(&n);
}

/* A script: answers once more than it was asked. */
static bool peer_says_too_much(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    char buffer[2000];
    (void)p;
    (void)number;
    if (recv(fd, buffer, sizeof buffer, 0) > 0) {
        line_put(&w, "=0\n", "\x08\x05", 2, 1);
        line_put(&w, "=0\n", "\x08\x06", 2, 1);
        wire_flush(fd, &w);
    }
    wire_read(fd, buffer, 1); /* until it is closed */
    return true;
}

static void a_reply_without_a_request_closes(void **state)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_channel *ch;
    crpc_loop_stats stats;
    peer p;
    int i;
    (void)state;
    peer_open(&p, peer_says_too_much, NULL);
    ch = net_channel(p.url, "?protocol=line", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 2; i++) {
        crpc_call call = CRPC_INIT;
        call.policy.timeout_ms = NET_PATIENCE;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 5);
        crpc_call_reset(&call);
    }
    crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
    assert_true(stats.bad_frames >= 1);
    crpc_channel_close(ch);
    peer_close(&p);
}

/* A script: its first connection says farewell at once, in baidu_std; the next answers one request
 * with 5. */
static bool peer_leaves_in_baidu(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    char buffer[2000];
    (void)p;
    if (number == 0)
        wire_farewell(&w);
    else if (recv(fd, buffer, sizeof buffer, 0) > 0)
        line_put(&w, "=0\n", "\x08\x05", 2, 1);
    wire_flush(fd, &w);
    wire_read(fd, buffer, 1); /* until it is closed */
    return true;
}

/* A fresh connection of a channel with another protocol gets the farewell of a server that does not
 * know its protocol yet: the connection closes, and the next call goes over another one. */
static void a_farewell_in_another_protocol_costs_no_call(void **state)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpci_endpoint *e;
    crpc_channel *ch;
    peer p;
    (void)state;
    peer_open(&p, peer_leaves_in_baidu, NULL);
    assert_int_equal(crpc_loop_start(l), CRPC_OK);
    ch = net_channel(p.url, "?protocol=line&timeout_ms=20000&retries=0", CRPC_POLLER_DEFAULT, l,
                     NULL);
    crpci_loop_lock(l);
    e = net_endpoint(l, NULL);
    crpci_endpoint_dial(e);
    crpci_loop_unlock(l);
    assert_true(CT_WAIT(net_lost(l) == 1, NET_PATIENCE));
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, NULL), CRPC_OK);
    assert_int_equal(out.n, 5);
    assert_int_equal(peer_accepted(&p), 2);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&p);
}

static void channels_of_two_protocols_share_no_connection(void **state)
{
    crpc_channel *other;
    net n;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_SHARED);
    other = net_channel(n.url, "?protocol=line", CRPC_POLLER_DEFAULT, n.loop, NULL);
    net_check_add(n.channel, 1);
    net_check_add(other, 2);
    net_check_add(n.channel, 3);
    assert_int_equal(crpci_thread_load(&n.server->connections), 2);
    crpc_channel_close(other);
    net_close(&n);
}

/* The fields of a kept reply are encoded for the protocol in which the request came first. */
static void kept_replies_are_for_their_protocol(void **state)
{
    dyn_Num in = net_num(4077), out = dyn_Num_init_zero;
    crpc_channel *other;
    net n;
    int i;
    (void)state;
    memset(&n, 0, sizeof n);
    n.query = "?protocol=line";
    n.server_options.replay_entries = 10;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    other = net_channel(n.url, "", CRPC_POLLER_DEFAULT, NULL, NULL);
    strcpy(in.tag, "once");
    for (i = 0; i < 3; i++) {
        crpc_call call = CRPC_INIT;
        crpc_view v;
        call.policy.timeout_ms = NET_PATIENCE;
        call.request_id = crpc_view_str("the same");
        if (i < 2) {
            assert_int_equal(dyn_Echo_Fail(n.channel, &in, &out, &call), CRPC_EAPP);
            assert_non_null(strstr(call.error.text, "once"));
            assert_true(crpc_call_field(&call, "crpc-app", &v));
        } else {
            assert_int_equal(dyn_Echo_Fail(other, &in, &out, &call), CRPC_EINTERNAL);
            assert_non_null(strstr(call.error.text, "its reply was not kept"));
        }
        crpc_call_reset(&call);
    }
    assert_int_equal(net_calls(&n.service), 1);
    crpc_channel_close(other);
    net_close(&n);
}

static void half_closed_connections_get_all_in_order(void **state)
{
    crpc_context *x[2];
    wire w = {NULL, 0, 0};
    line_message m;
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open_server(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    line_num(&w, "Defer", 1, 0);
    line_num(&w, "Defer", 2, 0);
    assert_true(wire_flush(fd, &w));
    shutdown(fd, SHUT_WR);
    x[0] = take(&n);
    x[1] = take(&n);
    crpc_context_finish(x[1], CRPC_OK);
    crpc_context_finish(x[0], CRPC_OK);
    expect_num(fd, 2);
    expect_num(fd, 3);
    assert_int_equal(line_receive(fd, &m), 0);
    close(fd);
    net_close(&n);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(protocols_are_found_by_name),
        CT_TEST(both_are_told_apart_on_one_port_byte_by_byte),
        CT_TEST(it_calls_in_every_arrangement),
        CT_TEST(replies_keep_their_order_while_peers_are_judged),
        CT_TEST(errors_come_with_code_and_text),
        CT_TEST(a_body_that_grows_too_large_is_refused_in_its_turn),
        CT_TEST(a_reply_that_is_too_large_ends_its_call_alone),
        CT_TEST(refusals_wait_for_their_turn),
        CT_TEST(rejected_requests_fill_their_turn),
        CT_TEST(deferred_replies_keep_the_order),
        CT_TEST(waiting_replies_go_with_their_connection),
        CT_TEST(draining_answers_in_order_and_closes),
        CT_TEST(requests_left_at_drain_ms_are_answered_in_order),
        CT_TEST(a_farewell_fixes_no_protocol),
        CT_TEST(half_closed_connections_get_all_in_order),
        CT_TEST(many_calls_share_a_connection),
        CT_TEST(late_replies_and_one_way_calls_keep_their_place),
        CT_TEST(withdrawn_requests_take_no_place),
        CT_TEST(a_reply_without_a_request_closes),
        CT_TEST(a_farewell_in_another_protocol_costs_no_call),
        CT_TEST(channels_of_two_protocols_share_no_connection),
        CT_TEST(kept_replies_are_for_their_protocol),
    };
    return CT_RUN(tests);
}
