/* impl-baidu: bytes to messages and back. What RpcMeta can hold is test_meta's subject. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

/* A connection that goes nowhere, and what it handed on last. */
typedef struct fixture {
    crpc_loop *loop;
    crpci_conn *c;
    crpci_conn_events up;
    int messages, oversizes, closes;
    crpci_message m;
    char unsupported[200];
    uint64_t size;
} fixture;

static void on_message(crpci_conn *c, const crpci_message *m)
{
    fixture *f = (fixture *)c->owner;
    f->messages++;
    f->m = *m;
    if (m->usual) /* what is not set then */
        memset((char *)&f->m + offsetof(crpci_message, has_fields), 0,
               sizeof f->m - offsetof(crpci_message, has_fields));
    snprintf(f->unsupported, sizeof f->unsupported, "%s",
             f->m.unsupported ? f->m.unsupported : "");
}

static void on_oversize(crpci_conn *c, const crpci_message *m, uint64_t size)
{
    fixture *f = (fixture *)c->owner;
    f->oversizes++;
    f->m = *m;
    f->size = size;
}

static void on_closed(crpci_conn *c)
{
    ((fixture *)c->owner)->closes++;
}

static void fixture_open(fixture *f, bool accepted)
{
    int fds[2];
    memset(f, 0, sizeof *f);
    f->up.message = on_message;
    f->up.oversize = on_oversize;
    f->up.closed = on_closed;
    f->loop = net_loop(CRPC_POLLER_DEFAULT);
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    close(fds[1]);
    crpci_loop_lock(f->loop);
    f->c = crpci_connect_new(f->loop, fds[0], false, &f->up, f);
    assert_non_null(f->c);
    crpci_conn_hold(f->c);
    if (accepted)
        f->c->protocols = crpci_protocols;
    f->c->max_skip = 10000;
    assert_true(crpci_receive_speak(f->c, &crpci_baidu));
}

static void fixture_close(fixture *f)
{
    crpci_conn_close(f->c, CRPC_ECLOSE, 0);
    crpci_conn_drop(f->c);
    crpci_loop_unlock(f->loop);
    crpc_loop_close(f->loop);
}

static void feed(fixture *f, const wire *w)
{
    crpci_chunk *chunk = crpci_heap_chunk(f->loop->heap, w->n);
    memcpy(crpci_heap_data(chunk), w->p, w->n);
    crpci_receive_feed(f->c, chunk, crpci_heap_data(chunk), w->n);
    crpci_heap_chunk_unref(chunk);
}

static void the_first_four_bytes_identify_it(void **state)
{
    static const uint8_t magic[] = "PRPCx";
    size_t n;
    (void)state;
    for (n = 1; n <= 5; n++)
        assert_int_equal(crpci_baidu.detect(magic, n),
                         n < 4 ? CRPCI_DETECTED_MORE : CRPCI_DETECTED_YES);
    assert_int_equal(crpci_baidu.detect((const uint8_t *)"PRI ", 4), CRPCI_DETECTED_NO);
    assert_int_equal(crpci_baidu.detect((const uint8_t *)"PRI ", 2), CRPCI_DETECTED_MORE);
    assert_int_equal(crpci_baidu.detect((const uint8_t *)"GET", 3), CRPCI_DETECTED_NO);
}

/* For each prefix of a frame, feed names the bytes that it needs; the whole frame is used up. */
static void a_partial_frame_asks_for_the_missing_bytes(void **state)
{
    wire w = {NULL, 0, 0};
    fixture f;
    size_t n;
    (void)state;
    fixture_open(&f, true);
    wire_request(&w, "Add", 17, 4, 2);
    for (n = 1; n < w.n; n++) {
        ct_guard g = ct_guard_make(w.p, n);
        assert_int_equal(crpci_baidu.feed(f.c, NULL, (const uint8_t *)g.data, n), 0);
        assert_int_equal(f.c->rx_total, n < CRPCI_FRAME_HEADER ? CRPCI_FRAME_HEADER : w.n);
        ct_guard_free(g);
    }
    assert_int_equal(f.messages, 0);
    feed(&f, &w);
    assert_int_equal(f.messages, 1);
    assert_int_equal(f.m.kind, CRPCI_MESSAGE_REQUEST);
    assert_int_equal(f.m.id, 17);
    assert_true(crpc_view_equal(f.m.service, "dyn.Echo") && crpc_view_equal(f.m.method, "Add"));
    assert_int_equal(f.m.payload_size, 4);
    assert_int_equal(f.m.attachment_size, 0);
    assert_null(f.m.unsupported);
    wire_free(&w);
    fixture_close(&f);
}

static void check_unsupported(fixture *f, const wire_request_options *o, const char *text)
{
    wire w = {NULL, 0, 0};
    wire_request_body(&w, "dyn.Echo", "Add", 1, "\x08\x01", 2, o);
    feed(f, &w);
    assert_string_equal(f->unsupported, text);
    assert_int_equal(f->m.id, 1);
    wire_free(&w);
}

static void unsupported_metas_are_explained(void **state)
{
    fixture f;
    (void)state;
    fixture_open(&f, true);
#define UNSUPPORTED(member, value, text)                                                           \
    do {                                                                                           \
        wire_request_options o;                                                                    \
        memset(&o, 0, sizeof o);                                                                   \
        o.member = value;                                                                          \
        check_unsupported(&f, &o, text);                                                           \
    } while (0)
    UNSUPPORTED(compress, 2, "compress_type 2 is not supported; send uncompressed");
    UNSUPPORTED(content, 1, "content_type 1 is not supported; send protobuf");
    UNSUPPORTED(checksum, 1, "checksum_type 1 is not supported; send none");
    UNSUPPORTED(stream, 1, "streaming is not supported");
    UNSUPPORTED(chunk, 1, "chunked bodies are not supported; send one frame");
    UNSUPPORTED(attachment, 3, "attachment_size 3 is larger than the body's 2 bytes");
    UNSUPPORTED(attachment, 2, "");
    assert_int_equal(f.m.attachment_size, 2);
    assert_int_equal(f.m.payload_size, 0);
#undef UNSUPPORTED
    fixture_close(&f);
}

static void a_body_over_the_limit_is_reported_and_skipped(void **state)
{
    wire w = {NULL, 0, 0};
    char body[5000];
    fixture f;
    (void)state;
    memset(body, 0, sizeof body);
    fixture_open(&f, true);
    f.c->max_body = 1000;
    wire_request_body(&w, "dyn.Echo", "Pass", 9, body, sizeof body, NULL);
    wire_request(&w, "Add", 10, 1, 0);
    feed(&f, &w);
    assert_int_equal(f.oversizes, 1);
    assert_true(f.size > 5000 && f.size < 5100);
    assert_int_equal(f.messages, 1);
    assert_int_equal(f.m.id, 10);
    wire_free(&w);
    f.c->max_skip = 2000; /* more than that it does not wait for */
    wire_request_body(&w, "dyn.Echo", "Pass", 9, body, sizeof body, NULL);
    feed(&f, &w);
    assert_int_equal(f.closes, 1);
    assert_int_equal(f.oversizes, 1);
    wire_free(&w);
    fixture_close(&f);
}

static char logged[200];

static void on_log(void *user, int level, const char *line)
{
    (void)user;
    assert_int_equal(level, CRPC_LOG_WARN);
    snprintf(logged, sizeof logged, "%s", line);
}

/* Feeds the header of a frame, and as much of the frame as is there already. */
static void feed_header(fixture *f, uint32_t body, uint32_t meta, size_t there)
{
    wire w = {NULL, 0, 0};
    char nothing[100] = {0};
    wire_put(&w, "PRPC", 4);
    wire_be32(&w, body);
    wire_be32(&w, meta);
    wire_put(&w, nothing, there);
    feed(f, &w);
    wire_free(&w);
}

/* Whether the body is within max_body, or to be skipped, and before anything of it is kept. */
static void a_meta_over_64_kib_closes_at_its_header(void **state)
{
    static const uint32_t bodies[] = {65537, 100000, 60 << 20, UINT32_MAX};
    size_t i;
    (void)state;
    for (i = 0; i < 2 * sizeof bodies / sizeof *bodies; i++) {
        fixture f;
        fixture_open(&f, i % 2);
        f.loop->heap->hooks.log = on_log;
        f.loop->heap->hooks.log_level = CRPC_LOG_WARN;
        f.c->max_body = 64 << 20;
        f.c->max_skip = UINT32_MAX;
        logged[0] = '\0';
        feed_header(&f, bodies[i / 2], 65536, 100); /* this one waits for more */
        assert_int_equal(f.closes, 0);
        assert_string_equal(logged, "");
        crpci_heap_chunk_unref(f.c->rx);
        f.c->rx = NULL;
        feed_header(&f, bodies[i / 2], 65537, i & 4 ? 100 : 0);
        assert_int_equal(f.closes, 1);
        assert_null(f.c->rx);
        crpci_loop_unlock(f.loop); /* the driver writes log lines without the lock */
        assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
        crpci_loop_lock(f.loop);
        assert_non_null(strstr(logged, "RpcMeta over 64 KiB"));
        assert_int_equal(f.messages + f.oversizes, 0);
        fixture_close(&f);
    }
}

static void the_side_decides_what_is_a_reply(void **state)
{
    wire w = {NULL, 0, 0};
    fixture f;
    (void)state;
    fixture_open(&f, false);
    f.c->expect = crpc_view_of("", 0);
    wire_reply(&w, 5, 1);
    feed(&f, &w);
    assert_true(f.m.usual);
    assert_int_equal(f.m.kind, CRPCI_MESSAGE_REPLY);
    assert_int_equal(f.m.id, 5);
    wire_free(&w);
    wire_error(&w, 6, 1003, "what?", 1);
    feed(&f, &w);
    assert_false(f.m.usual);
    assert_int_equal(f.m.id, 6);
    assert_int_equal(f.m.status, 1003);
    assert_true(f.m.has_fields);
    wire_free(&w);
    wire_request(&w, "Add", 7, 1, 0); /* jprotobuf sends the request's meta back */
    feed(&f, &w);
    assert_int_equal(f.m.kind, CRPCI_MESSAGE_REPLY);
    assert_int_equal(f.m.status, 0);
    assert_int_equal(f.messages, 3);
    wire_free(&w);
    fixture_close(&f);
}

/* What it writes it reads. */
static void messages_come_back_as_written(void **state)
{
    uint8_t buffer[600], fields[100], *payload = buffer + 500, *begin;
    crpci_message m;
    crpc_view v;
    wire w = {NULL, 0, 0};
    fixture f;
    size_t n;
    int reply;
    (void)state;
    n = crpci_baidu.put_field(fields, crpc_view_str("key"), crpc_view_str("value"));
    assert_true(n <= 3 + 5 + crpci_baidu.field_cost);
    for (reply = 0; reply < 2; reply++) {
        uint8_t names[64];
        fixture_open(&f, !reply);
        memset(&m, 0, sizeof m);
        m.id = -7;
        m.timeout_ms = 1234;
        m.fields = crpc_view_of(fields, n);
        m.payload_size = 10;
        m.attachment_size = 20;
        m.status = reply ? 1008 : 0;
        m.text = crpc_view_str(reply ? "late" : "");
        m.names = crpci_baidu.names(names, 3 + 1 + CRPCI_PROTOCOL_NAMES, crpc_view_str("a.B"),
                                    crpc_view_str("C"));
        m.credential = crpc_view_str("secret");
        m.log_id = 1;
        m.trace_id = INT64_MIN;
        m.span_id = 3;
        m.parent_span_id = INT64_MAX;
        memset(payload, 'x', 30);
        begin = (reply ? crpci_baidu.reply : crpci_baidu.request)(buffer, payload, &m);
        assert_true((size_t)(payload - begin) <=
                    crpci_baidu.headroom + n + 6 + crpc_view_size(m.names));
        wire_put(&w, begin, (size_t)(payload - begin) + 30);
        feed(&f, &w);
        assert_int_equal(f.messages, 1);
        assert_int_equal(f.m.id, -7);
        assert_int_equal(f.m.payload_size, 10);
        assert_int_equal(f.m.attachment_size, 20);
        assert_int_equal(f.m.status, m.status);
        assert_true(f.m.has_fields);
        if (!reply) {
            assert_int_equal(f.m.timeout_ms, 1234);
            assert_int_equal(f.m.log_id, 1);
            assert_true(f.m.trace_id == INT64_MIN && f.m.parent_span_id == INT64_MAX);
            assert_int_equal(f.m.span_id, 3);
        }
        wire_free(&w);
        fixture_close(&f);
    }
    assert_true(crpci_baidu.field(crpc_view_of(fields, n), "key", &v));
    assert_true(crpc_view_equal(v, "value"));
    assert_false(crpci_baidu.field(crpc_view_of(fields, n), "ke", &v));
}

static void rubbish_closes(void **state)
{
    static const char *const rubbish[] = {
        "PRPD\0\0\0\2\0\0\0\0xx", "PRPC\0\0\0\2\0\0\0\3xx", "PRPC\0\0\0\2\0\0\0\2\xff\xff"};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof rubbish / sizeof *rubbish; i++) {
        wire w = {NULL, 0, 0};
        fixture f;
        fixture_open(&f, true);
        wire_put(&w, rubbish[i], 14);
        feed(&f, &w);
        assert_int_equal(f.closes, 1);
        assert_int_equal(f.messages, 0);
        wire_free(&w);
        fixture_close(&f);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(the_first_four_bytes_identify_it),
        CT_TEST(a_partial_frame_asks_for_the_missing_bytes),
        CT_TEST(unsupported_metas_are_explained),
        CT_TEST(a_body_over_the_limit_is_reported_and_skipped),
        CT_TEST(a_meta_over_64_kib_closes_at_its_header),
        CT_TEST(the_side_decides_what_is_a_reply),
        CT_TEST(messages_come_back_as_written),
        CT_TEST(rubbish_closes),
    };
    return CT_RUN(tests);
}
