/* What a reply gives the caller: the response, its bytes, and an error that explains itself. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static void views_and_attachments_in_asynchronous_forms(void **state)
{
    static const size_t sizes[] = {10, 5000, 1 << 20};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            size_t size = sizes[i];
            char *a = net_bytes(size), *b = net_bytes(size + 7);
            dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            done_log d;
            crpc_id id;
            done_init(&d);
            in.data = crpc_view_of(a, size);
            call.attachment = crpc_view_of(b, size + 7);
            assert_int_equal(dyn_Echo_Pass_begin(n.channel, &in, &id, &call), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_async(n.channel, &in, done_blob, &d, &call), CRPC_OK);
            memset(a, 0, size); /* the caller may reuse its buffers now */
            memset(b, 0, size + 7);
            free(a);
            free(b);
            a = net_bytes(size);
            b = net_bytes(size + 7);
            assert_int_equal(crpc_channel_wait(n.channel, id, NET_PATIENCE), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, id, &out, NULL), CRPC_EINVAL);
            assert_int_equal(crpc_channel_poll(n.channel, id), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, id, &out, &call), CRPC_OK);
            assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
            assert_int_equal(d.status, CRPC_OK);
            assert_int_equal(d.size, 2 * size + 7);
            assert_memory_equal(d.bytes, a, size);
            assert_memory_equal(d.bytes + size, b, size + 7);
            assert_int_equal(crpc_view_size(out.data), size);
            assert_memory_equal(crpc_view_data(out.data), a, size);
            assert_int_equal(crpc_view_size(call.reply_attachment), size + 7);
            assert_memory_equal(crpc_view_data(call.reply_attachment), b, size + 7);
            crpc_call_reset(&call);
            free(d.bytes);
            free(a);
            free(b);
        }
        net_close(&n);
    }
}

static void a_response_with_views_needs_a_call(void **state)
{
    net n;
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, NULL), CRPC_EINVAL);
    assert_int_equal(net_calls(&n.service), 0);
    net_close(&n);
}

/* The reply's bytes outlive the channel and its loop. */
static void a_call_keeps_its_reply_after_the_channel(void **state)
{
    net n;
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    in.data = crpc_view_str("kept");
    call.attachment = crpc_view_str("behind");
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_OK);
    net_close(&n);
    assert_true(crpc_view_equal(out.data, "kept"));
    assert_true(crpc_view_equal(call.reply_attachment, "behind"));
    crpc_call_reset(&call);
}

/* What a peer may answer; the n of the request chooses. */
typedef enum odd_kind {
    ODD_NO_RESPONSE = 1,      /* an RpcMeta without RpcResponseMeta */
    ODD_ECHOES_REQUEST,       /* an empty RpcResponseMeta beside the request's own */
    ODD_UNKNOWN_FIELDS,       /* of every wire type, and zeros */
    ODD_ATTACHMENT_TOO_LARGE, /* larger than the body */
    ODD_ATTACHMENT_NEGATIVE,
    ODD_COMPRESSED,
    ODD_UNDECODABLE,
    ODD_WITHOUT_ID,
    ODD_ID_OF_NOBODY,
    ODD_ALL_ATTACHMENT /* nothing is left for the message */
} odd_kind;

static bool peer_odd(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0}, meta = {NULL, 0, 0}, body = {NULL, 0, 0}, sub = {NULL, 0, 0};
        wire_int(&body, 1, 77);
        if (m.n != ODD_WITHOUT_ID)
            wire_int(&meta, 4, m.n == ODD_ID_OF_NOBODY ? -1 : m.id);
        switch (m.n) {
        case ODD_ECHOES_REQUEST:
            wire_str(&sub, 1, "dyn.Echo");
            wire_str(&sub, 2, "Add");
            wire_bytes(&meta, 1, sub.p, sub.n);
            wire_bytes(&meta, 2, "", 0);
            break;
        case ODD_UNKNOWN_FIELDS:
            wire_int(&sub, 1, 0);
            wire_str(&sub, 2, "");
            wire_str(&sub, 1000, "later");
            wire_str(&meta, 100, "sofa");
            wire_varint(&meta, 101 << 3 | 1);
            wire_put(&meta, "12345678", 8);
            wire_varint(&meta, 102 << 3 | 5);
            wire_put(&meta, "1234", 4);
            wire_bytes(&meta, 2, sub.p, sub.n);
            wire_int(&meta, 3, 0);
            wire_int(&meta, 5, 0);
            break;
        case ODD_ATTACHMENT_TOO_LARGE:
            wire_int(&meta, 5, 1000);
            break;
        case ODD_ATTACHMENT_NEGATIVE:
            wire_int(&meta, 5, -1);
            break;
        case ODD_COMPRESSED:
            wire_int(&meta, 3, 2);
            break;
        case ODD_UNDECODABLE:
            body.n = 0;
            wire_put(&body, "\x0a\xff", 2);
            break;
        case ODD_ALL_ATTACHMENT:
            wire_int(&meta, 5, (int64_t)body.n);
            break;
        default:
            break;
        }
        wire_frame(&w, &meta, body.p, body.n);
        wire_free(&meta);
        wire_free(&body);
        wire_free(&sub);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

typedef struct odd {
    peer peer;
    crpc_channel *channel;
} odd;

static void odd_open(odd *o, crpc_poller p)
{
    peer_open(&o->peer, peer_odd, NULL);
    o->channel = net_channel(o->peer.url, "?timeout_ms=20000", p, NULL, NULL);
}

/* None of these replies costs the connection. */
static void odd_close(odd *o)
{
    assert_int_equal(peer_accepted(&o->peer), 1);
    crpc_channel_close(o->channel);
    peer_close(&o->peer);
}

static void a_reply_needs_no_response_meta(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        odd o;
        int kind;
        odd_open(&o, p);
        for (kind = ODD_NO_RESPONSE; kind <= ODD_UNKNOWN_FIELDS; kind++) {
            dyn_Num in = net_num(kind), out = dyn_Num_init_zero;
            assert_int_equal(dyn_Echo_Add(o.channel, &in, &out, NULL), CRPC_OK);
            assert_int_equal(out.n, 77);
        }
        odd_close(&o);
    }
}

static void a_reply_that_cannot_be_used_is_explained(void **state)
{
    static const struct {
        odd_kind kind;
        const char *says;
    } cases[] = {{ODD_ATTACHMENT_TOO_LARGE, "attachment_size"},
                 {ODD_ATTACHMENT_NEGATIVE, "attachment_size"},
                 {ODD_COMPRESSED, "compressed"},
                 {ODD_UNDECODABLE, "reply: "}};
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        odd o;
        size_t i;
        odd_open(&o, p);
        for (i = 0; i < sizeof cases / sizeof *cases; i++) {
            dyn_Num in = net_num(cases[i].kind), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Add(o.channel, &in, &out, &call), CRPC_ERESPONSE);
            assert_non_null(strstr(call.error.text, cases[i].says));
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_false(call.error.remote);
            crpc_call_reset(&call);
        }
        odd_close(&o);
    }
}

static void a_reply_without_its_id_is_dropped(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        odd o;
        dyn_Num in = net_num(ODD_NO_RESPONSE), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        odd_open(&o, p);
        net_time_out(o.channel, ODD_WITHOUT_ID, &call);
        net_time_out(o.channel, ODD_ID_OF_NOBODY, &call);
        crpc_call_reset(&call);
        /* arrives behind the other replies */
        assert_int_equal(dyn_Echo_Add(o.channel, &in, &out, NULL), CRPC_OK);
        /* only the one with id -1 counts as late: id 0 may belong to a one-way call */
        assert_int_equal(net_late_replies(o.channel), 1);
        odd_close(&o);
    }
}

static void a_reply_may_be_all_attachment(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        odd o;
        dyn_Num in = net_num(ODD_ALL_ATTACHMENT), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        odd_open(&o, p);
        assert_int_equal(dyn_Echo_Add(o.channel, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 0);
        assert_int_equal(crpc_view_size(call.reply_attachment), 2);
        assert_memory_equal(crpc_view_data(call.reply_attachment), "\x08\x4d", 2);
        crpc_call_reset(&call);
        odd_close(&o);
    }
}

typedef struct error_case {
    int64_t code;
    int mark;
    const char *text;
    int status, app_code;
    const char *says;
} error_case;

static const error_case error_cases[] = {
    {1002, 0, "no method", CRPC_ENOMETHOD, 0, "ENOMETHOD 1002: no method (remote)"},
    {1002, 1, "own", CRPC_EAPP, 1002, "application error 1002: own (remote)"},
    {2004, 0, NULL, CRPC_ELIMIT, 0, "ELIMIT 2004: concurrency limit reached (remote)"},
    {1004, 0, "who?", CRPC_EAUTH, 0, "EAUTH 1004: who? (remote)"},
    {20001, 0, "range", CRPC_EAPP, 20001, "application error 20001: range (remote)"},
    {20001, 1, "mark", CRPC_EAPP, 20001, "application error 20001: mark (remote)"},
    {500, 0, NULL, CRPC_EAPP, 500,
     "application error 500: the service answered with an error of its own: see app_code (remote)"},
    {-1, 0, "minus", CRPC_EAPP, -1, "application error -1: minus (remote)"},
    {110, 0, "errno", 110, 0, "E? 110: errno (remote)"},
    {1999, 0, "unknown", 1999, 0, "E? 1999: unknown (remote)"},
    {2003, 0, "bye", CRPC_ELOGOFF, 0, "ELOGOFF 2003: bye (remote)"},
};

static bool peer_errs(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        const error_case *c = &error_cases[m.n];
        wire w = {NULL, 0, 0};
        wire_error(&w, m.id, c->code, c->text, c->mark);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void remote_errors_are_mapped_and_explained(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer errs;
        crpc_channel *ch;
        size_t i;
        peer_open(&errs, peer_errs, NULL);
        ch = net_channel(errs.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < sizeof error_cases / sizeof *error_cases; i++) {
            const error_case *c = &error_cases[i];
            dyn_Num in = net_num((int64_t)i), out = net_num(99);
            crpc_call call = CRPC_INIT;
            char golden[1400];
            done_log d;
            crpc_id id;
            snprintf(golden, sizeof golden, "dyn.Echo.Add attempt 1 %s: %s", errs.url + 6,
                     c->says);
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), c->status);
            assert_string_equal(call.error.text, golden);
            assert_int_equal(call.error.code, c->status);
            assert_int_equal(call.error.app_code, c->app_code);
            assert_true(call.error.remote);
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_int_equal(call.error.attempts, 1);
            assert_int_equal(out.n, 99); /* the body of an error reply is ignored */
            crpc_call_reset(&call);

            done_init(&d);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
            assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
            assert_int_equal(d.status, c->status);
            assert_string_equal(d.error.text, golden);
            assert_int_equal(d.error.app_code, c->app_code);

            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
            assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), c->status);
            assert_string_equal(call.error.text, golden);
            crpc_call_reset(&call);
        }
        crpc_channel_close(ch);
        peer_close(&errs);
    }
}

static void local_errors_are_explained(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent, hangs;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        dyn_Blob bin = dyn_Blob_init_zero, bout = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        char url[64], golden[1400];
        char *bytes = net_bytes(5000);
        peer_open(&silent, peer_silent, NULL);
        peer_open(&hangs, peer_hangs_up, NULL);

        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ct_free_port());
        ch = net_channel(url, NULL, p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        snprintf(golden, sizeof golden,
                 "dyn.Echo.Add attempt 1 %s: connecting: connection refused; no other provider to "
                 "try (local)",
                 url + 6);
        assert_string_equal(call.error.text, golden);
        assert_string_equal(call.error.endpoint, url + 6);
        crpc_channel_close(ch);

        ch = net_channel("unix:///nonexistent/x", NULL, p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        assert_string_equal(call.error.text, "dyn.Echo.Add attempt 1 unix:/nonexistent/x: "
                                             "connecting: no such socket file; no other "
                                             "provider to try (local)");
        crpc_channel_close(ch);

        ch = net_channel(silent.url, "?retries=5", p, NULL, NULL);
        net_time_out(ch, 1, &call);
        snprintf(golden, sizeof golden, "dyn.Echo.Add attempt 1 %s: deadline exceeded (local)",
                 silent.url + 6);
        assert_string_equal(call.error.text, golden);
        call.policy.timeout_ms = 0;
        crpc_channel_close(ch);

        ch = net_channel(hangs.url, "?timeout_ms=20000&retries=0", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        snprintf(golden, sizeof golden,
                 "dyn.Echo.Add attempt 1 %s: connection lost: closed by the peer (local)",
                 hangs.url + 6);
        assert_string_equal(call.error.text, golden);
        crpc_channel_close(ch);

        ch = net_channel(silent.url, "?max_queued=4500", p, NULL, NULL);
        call.attachment = crpc_view_of(bytes, 5000);
        assert_int_equal(dyn_Echo_Pass(ch, &bin, &bout, &call), CRPC_EOVERCROWDED);
        assert_non_null(strstr(call.error.text,
                               "the request is too large: 0 bytes are queued, max_queued is 4500"));
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        crpc_channel_close(ch);
        free(bytes);
        crpc_call_reset(&call);
        peer_close(&silent);
        peer_close(&hangs);
    }
}

/* However long the names are, the text is cut and terminated. */
static void long_error_texts_are_cut(void **state)
{
    static char service[400], text[2000];
    crpc_method m = dyn_Echo.methods[0];
    crpc_channel *ch = net_channel("unix:///nonexistent/x", NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(service, 's', sizeof service - 1);
    memset(text, 't', sizeof text - 1);
    m.service = service;
    assert_int_equal(crpc_channel_call(ch, &m, &in, &out, &call), CRPC_ECONN);
    assert_int_equal(strlen(call.error.text), CRPC_ERROR_TEXT_MAX - 1);
    crpc_call_reset(&call);
    crpc_channel_close(ch);
}

/* Small results are copied out of the receive buffer, which other calls go on using. */
static void results_keep_their_bytes(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        crpc_id ids[20];
        char text[20][40];
        int i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        for (i = 0; i < 20; i++) {
            dyn_Blob in = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            snprintf(text[i], sizeof text[i], "the bytes of number %d", i);
            in.data = crpc_view_str(text[i]);
            call.attachment = crpc_view_str(text[i]);
            assert_int_equal(dyn_Echo_Pass_begin(n.channel, &in, &ids[i], &call), CRPC_OK);
            assert_int_equal(crpc_channel_wait(n.channel, ids[i], -1), CRPC_OK);
        }
        for (i = 0; i < 3000; i++)
            net_check_add(n.channel, i);
        for (i = 0; i < 20; i++) {
            dyn_Blob out = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, ids[i], &out, &call), CRPC_OK);
            assert_true(crpc_view_equal(out.data, text[i]));
            assert_true(crpc_view_equal(call.reply_attachment, text[i]));
            crpc_call_reset(&call);
        }
        net_close(&n);
    }
}

/* A reply over max_body is refused with an error that names the limit; the connection stays
 * open. */
static void oversize_replies_are_refused_by_name(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        char *bytes = net_bytes(200000);
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_loop_stats stats;
        memset(&n, 0, sizeof n);
        n.query = "?max_body=100000";
        net_open(&n, p, NET_THREAD);
        in.data = crpc_view_of(bytes, 200000);
        assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_ERESPONSE);
        assert_non_null(strstr(call.error.text, "is over max_body, 100000 (local)"));
        assert_non_null(strstr(call.error.text, "reply of 2000"));
        net_check_add(n.channel, 1);
        crpc_server_stats_get(n.server, &stats);
        assert_int_equal(stats.connections, 1);
        crpc_call_reset(&call);
        net_close(&n);
        free(bytes);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(views_and_attachments_in_asynchronous_forms),
        CT_TEST(a_response_with_views_needs_a_call),
        CT_TEST(a_call_keeps_its_reply_after_the_channel),
        CT_TEST(a_reply_needs_no_response_meta),
        CT_TEST(a_reply_that_cannot_be_used_is_explained),
        CT_TEST(a_reply_without_its_id_is_dropped),
        CT_TEST(a_reply_may_be_all_attachment),
        CT_TEST(remote_errors_are_mapped_and_explained),
        CT_TEST(local_errors_are_explained),
        CT_TEST(long_error_texts_are_cut),
        CT_TEST(results_keep_their_bytes),
        CT_TEST(oversize_replies_are_refused_by_name),
    };
    return CT_RUN(tests);
}
