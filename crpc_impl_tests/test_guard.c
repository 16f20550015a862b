/* Requests that are not simply executed: concurrency limits, rates, repeated ids, ordering keys. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"
#include <sys/mman.h>

#define GARBAGE "\xff\xff\xff", 3 /* the decoder answers EREQUEST: the limits let it in */

static int64_t ask_garbage(int fd, const char *method, char *text)
{
    net_send(fd, method, 99, GARBAGE, NULL);
    return net_reply_code(fd, 99, text);
}

static void hold(net *n, int fd, int count, const char *const *fields)
{
    int held = net_held(&n->service), i;
    for (i = 0; i < count; i++)
        net_send(fd, "Defer", 1, "\x08\x01", 2, fields);
    assert_true(CT_WAIT(net_held(&n->service) == held + count, NET_PATIENCE));
}

static void let_go(net *n, int fd, int count, int status)
{
    for (; count > 0; count--) {
        assert_int_equal(crpc_context_finish(net_take(&n->service), status), CRPC_OK);
        assert_int_equal(net_reply_code(fd, 1, NULL), status);
    }
}

static void requests_in_service_are_limited(void **state)
{
    static const crpc_method_limit limits[] = {{&dyn_Echo, dyn_Echo_Defer_method, 2, 0, 0, 0},
                                               {NULL, dyn_Echo_Defer_method, 1, 0, 0, 0},
                                               {&dyn_Echo, NULL, -1, 0, -1, 0}};
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
            n.server_options.method_limits = limits;
            n.server_options.method_limit_count = 3;
        } else {
            n.server_options.max_concurrency = 3;
        }
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        other = wire_connect(n.url);
        hold(&n, fd, max, NULL);
        assert_int_equal(ask_garbage(other, "Defer", text), CRPC_ELIMIT);
        assert_string_equal(text, says);
        assert_int_equal(net_ask(other, "Echo", "Add", 1, NULL, NULL), how ? CRPC_OK : CRPC_ELIMIT);
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

static void a_limit_that_applies_to_no_method_is_refused(void **state)
{
    const crpc_method other = {"dyn.Other", "Add", NULL, NULL, 0, 0, NULL, 0, 0};
    crpc_method_limit limit = CRPC_INIT;
    crpc_server_options o;
    crpc_server *s;
    crpc_error error;
    (void)state;
    memset(&o, 0, sizeof o);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = "tcp://127.0.0.1:0";
    o.method_limits = &limit;
    o.method_limit_count = 1;
    limit.method = &other;
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "method_limits[0] names dyn.Other.Add, which this server does "
                                    "not have");
    limit.method = dyn_Echo_Add_method;
    assert_int_equal(crpc_server_start(s, &error), CRPC_OK);
    crpc_server_close(s);
}

/* Sends `count` garbage requests; returns how many the limits let through to the decoder. */
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
    static const crpc_method_limit limits[] = {{NULL, dyn_Echo_Add_method, 0, 0, 2, 3},
                                               {NULL, NULL, 0, 0, 1, 0}};
    const char *says = "too many requests of the method in a second (rate)";
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int fd;
        net n;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS;
        n.server_options.method_limits = limits;
        n.server_options.method_limit_count = 2;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        assert_int_equal(let_in(fd, "Add", 5, says), 3);
        assert_int_equal(let_in(fd, "Fail", 3, says), 1);
        assert_int_equal(let_in(fd, "Pass", 3, says), 1); /* each method has its own rate */
        net_time_add(500);
        assert_int_equal(let_in(fd, "Add", 3, says), 1);
        assert_int_equal(let_in(fd, "Fail", 3, says), 0);
        net_time_add(100000);
        assert_int_equal(let_in(fd, "Add", 5, says), 3);
        close(fd);
        net_close(&n);
    }
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
        n.time = NET_TIME_STANDS;
        n.server_options.rate_per_client = 1;
        n.server_options.burst_per_client = 4;
        net_open(&n, p, m);
        a = wire_connect_from(n.url, "127.0.0.1");
        b = wire_connect_from(n.url, "127.0.0.1");
        c = wire_connect_from(n.url, "127.0.0.2");
        assert_int_equal(let_in(a, "Add", 3, says), 3);
        assert_int_equal(let_in(b, "Get", 3, says), 1); /* one client, several connections */
        assert_int_equal(let_in(c, "Add", 6, says), 4);
        close(a);
        close(b);
        assert_true(CT_WAIT(net_connections(n.server) == 1, NET_PATIENCE));
        a = wire_connect_from(n.url, "127.0.0.1"); /* the server remembers its rate */
        assert_int_equal(let_in(a, "Add", 2, says), 0);
        net_time_add(2000);
        assert_int_equal(let_in(a, "Add", 4, says), 2);
        close(a);
        close(c);
        net_close(&n);
    }
}

static void requests_that_reach_no_method_count_for_the_rate(void **state)
{
    const char *says = "too many requests of this client in a second (rate_per_client)";
    net_mode mode;
    (void)state;
    NET_EACH_MODE(mode)
    {
        wire_request_options compressed;
        char text[512];
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        memset(&compressed, 0, sizeof compressed);
        compressed.compress = 2;
        n.time = NET_TIME_STANDS;
        n.server_options.rate_per_client = 1;
        n.server_options.burst_per_client = 4;
        n.server_options.limits.max_body = 60;
        net_open(&n, CRPC_POLLER_DEFAULT, mode);
        fd = wire_connect(n.url);
        assert_int_equal(net_ask(fd, "Nobody", "Add", 1, NULL, NULL), CRPC_ENOSERVICE);
        assert_int_equal(net_ask(fd, "Echo", "Nothing", 2, NULL, NULL), CRPC_ENOMETHOD);
        assert_int_equal(net_ask(fd, "Echo", "Add", 3, &compressed, NULL), CRPC_EREQUEST);
        assert_int_equal(net_ask(fd, "Service.with.a.name.over.max.body.of.this.test.and.more",
                                 "Add", 4, NULL, NULL),
                         CRPC_EREQUEST);
        assert_int_equal(net_ask(fd, "Nobody", "Add", 5, NULL, text), CRPC_ELIMIT);
        assert_string_equal(text, says);
        assert_int_equal(let_in(fd, "Add", 1, says), 0);
        close(fd);
        net_close(&n);
    }
}

/* The adaptive limit begins at 40, and halves after 200 failed samples. */
static void adaptive_limits_adapt(void **state)
{
    static const crpc_method_limit limits[] = {{NULL, dyn_Echo_Defer_method, 0, 1, 0, 0}};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        char text[512];
        int fd, i;
        net n;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS;
        n.server_options.method_limits = limits;
        n.server_options.method_limit_count = 1;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        hold(&n, fd, 40, NULL);
        assert_int_equal(ask_garbage(fd, "Defer", text), CRPC_ELIMIT);
        assert_string_equal(text, "too many requests of the method are being served (adaptive)");
        let_go(&n, fd, 40, CRPC_EINTERNAL); /* together: they count as one sample */
        for (i = 0; i < 199; i++) {
            hold(&n, fd, 1, NULL);
            net_time_add(2);
            let_go(&n, fd, 1, CRPC_EINTERNAL);
        }
        hold(&n, fd, 20, NULL);
        assert_int_equal(ask_garbage(fd, "Defer", NULL), CRPC_ELIMIT);
        let_go(&n, fd, 20, CRPC_OK);
        close(fd);
        net_close(&n);
    }
}

static void send_again(int fd, const char *method, int64_t id, const char *rid)
{
    const char *fields[] = {"other", "field", "crpc-rid", NULL, NULL};
    fields[3] = rid;
    net_send(fd, method, id, "\x08\x05", 2, fields);
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

/* Waits until the server has counted `count` repeated requests. */
static void wait_replayed(net *n, uint64_t count)
{
    crpc_loop_stats stats;
    int64_t until = ct_now_ms() + NET_PATIENCE;
    do {
        ct_sleep_ms(1);
        crpc_server_stats_get(n->server, &stats);
    } while (stats.replayed < count && ct_now_ms() < until);
    assert_int_equal(stats.replayed, count);
}

static void a_repeated_request_is_executed_once(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_loop_stats stats;
        int fd[3], i;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        for (i = 0; i < 3; i++) { /* on any connection */
            int64_t sum;
            fd[i] = wire_connect(n.url);
            assert_int_equal(ask_again(fd[i], "Add", "one", &sum), CRPC_OK);
            assert_int_equal(sum, 6);
        }
        assert_int_equal(net_calls(&n.service), 1);
        crpc_server_stats_get(n.server, &stats);
        assert_int_equal(stats.replayed, 2);
        for (i = 0; i < 3; i++)
            close(fd[i]);
        net_close(&n);
    }
}

static void a_request_repeated_while_it_runs_waits_for_its_reply(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        wire_message got;
        crpc_context *x;
        int fd[3], i;
        int64_t sum;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        for (i = 0; i < 3; i++) {
            fd[i] = wire_connect(n.url);
            send_again(fd[i], "Defer", 10 + i, "one");
        }
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        wait_replayed(&n, 2);
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
        assert_int_equal(ask_again(fd[1], "Defer", "one", &sum), CRPC_OK); /* and later */
        assert_int_equal(sum, 4711);
        assert_int_equal(net_calls(&n.service), 1);
        for (i = 0; i < 3; i++)
            close(fd[i]);
        net_close(&n);
    }
}

/* Finishes the oldest held request. */
static void let_go_of(net *n)
{
    assert_int_equal(crpc_context_finish(net_take(&n->service), CRPC_OK), CRPC_OK);
}

static void an_id_counts_within_its_method(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int fd;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        assert_int_equal(ask_again(fd, "Add", "one", NULL), CRPC_OK);
        send_again(fd, "Defer", 10, "one");
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        send_again(fd, "Defer", 20, "two"); /* another id runs beside it */
        assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
        let_go_of(&n);
        let_go_of(&n);
        close(fd);
        net_close(&n);
    }
}

static void a_kept_failure_is_repeated_too(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        int fd[2], i;
        net n;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, p, m);
        for (i = 0; i < 2; i++)
            fd[i] = wire_connect(n.url);
        send_again(fd[0], "Defer", 20, "two");
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_EAUTH), CRPC_OK);
        assert_int_equal(net_reply_code(fd[0], 20, NULL), CRPC_EAUTH);
        for (i = 0; i < 2; i++)
            assert_int_equal(ask_again(fd[1], "Defer", "two", NULL), CRPC_EAUTH);
        assert_int_equal(net_calls(&n.service), 1);
        for (i = 0; i < 2; i++)
            close(fd[i]);
        net_close(&n);
    }
}

/* A repeated reply has its text, application's mark, fields and attachment, as the first one
 * had. */
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
            call.log_id = round + 1; /* other fields of the repeated request do not matter */
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

/* The channel's calls carry `fields`, and credential "secret", which the server's guard wants. */
static void guarded_open(net *n, crpc_call *call, crpc_field *fields)
{
    static const crpc_server_interceptor guard = {wants_credential, NULL, NULL};
    memset(n, 0, sizeof *n);
    n->server_options.replay_entries = 10;
    n->server_options.interceptors = &guard;
    n->server_options.interceptor_count = 1;
    net_open(n, CRPC_POLLER_DEFAULT, NET_WORKERS);
    memset(call, 0, sizeof *call);
    call->fields = fields;
    call->field_count = 1;
    call->credential = crpc_view_str("secret");
}

static void guarded_close(net *n, crpc_call *call)
{
    crpc_call_reset(call);
    net_close(n);
}

/* A request that an interceptor refused was not executed: its id is free, and the refusal is not
 * repeated to the next request with that id. */
static void a_refused_request_is_not_remembered(void **state)
{
    crpc_field fields[1] = {{"crpc-rid", "x"}};
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call;
    net n;
    (void)state;
    guarded_open(&n, &call, fields);
    call.credential = crpc_view_of(NULL, 0);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EAUTH);
    call.credential = crpc_view_str("secret");
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    call.credential = crpc_view_of(NULL, 0);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EAUTH);
    call.credential = crpc_view_str("secret");
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    guarded_close(&n, &call);
}

static void an_undecodable_request_is_not_remembered(void **state)
{
    const char *both[] = {"crpc-rid", "y", NULL};
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.replay_entries = 10;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    net_send(fd, "Add", 1, GARBAGE, both);
    assert_int_equal(net_reply_code(fd, 1, NULL), CRPC_EREQUEST);
    assert_int_equal(ask_again(fd, "Add", "y", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    close(fd);
    net_close(&n);
}

static void an_id_has_64_bytes_at_most(void **state)
{
    crpc_field fields[1] = {{"crpc-rid", NULL}};
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call;
    char id[70];
    net n;
    (void)state;
    guarded_open(&n, &call, fields);
    memset(id, 'i', sizeof id);
    id[65] = '\0';
    fields[0].value = id;
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_EREQUEST);
    assert_non_null(strstr(call.error.text, "the request id (crpc-rid) is over 64 bytes"));
    id[64] = '\0';
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    guarded_close(&n, &call);
}

static void an_empty_id_counts_as_no_id(void **state)
{
    crpc_field fields[1] = {{"crpc-rid", ""}};
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call;
    net n;
    (void)state;
    guarded_open(&n, &call, fields);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 2);
    guarded_close(&n, &call);
}

/* A server that remembers two replies for a second. */
static int forgetful_open(net *n)
{
    memset(n, 0, sizeof *n);
    n->time = NET_TIME_STANDS;
    n->server_options.replay_entries = 2;
    n->server_options.replay_ms = 1000;
    net_open(n, CRPC_POLLER_DEFAULT, NET_THREAD);
    return wire_connect(n->url);
}

static void a_full_table_refuses_until_entries_expire(void **state)
{
    net n;
    int fd = forgetful_open(&n);
    (void)state;
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    assert_int_equal(ask_again(fd, "Add", "2", NULL), CRPC_OK);
    assert_int_equal(ask_again(fd, "Add", "3", NULL), CRPC_ELIMIT);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK); /* the kept reply */
    assert_int_equal(net_calls(&n.service), 2);
    net_time_add(1000);
    assert_int_equal(ask_again(fd, "Add", "3", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 3);
    close(fd);
    net_close(&n);
}

static void a_reply_is_forgotten_after_replay_ms(void **state)
{
    net n;
    int fd = forgetful_open(&n);
    (void)state;
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    net_time_add(999);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 1);
    net_time_add(1);
    assert_int_equal(ask_again(fd, "Add", "1", NULL), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 2);
    close(fd);
    net_close(&n);
}

/* A request that could not be remembered could be executed twice. */
static void a_request_without_a_free_entry_is_not_executed(void **state)
{
    char text[CRPC_ERROR_TEXT_MAX];
    net n;
    int fd = forgetful_open(&n);
    (void)state;
    send_again(fd, "Defer", 1, "4");
    send_again(fd, "Defer", 1, "5");
    assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
    send_again(fd, "Add", 7, "6");
    assert_int_equal(net_reply_code(fd, 7, text), CRPC_ELIMIT);
    assert_non_null(strstr(text, "replay_entries"));
    assert_int_equal(net_calls(&n.service), 2);
    let_go_of(&n);
    let_go_of(&n);
    close(fd);
    net_close(&n);
}

/* Two clients with one id: neither gets the other's reply, and no request is swallowed. */
static void another_request_with_the_same_id_is_refused(void **state)
{
    static const char *const fields[] = {"crpc-rid", "one", NULL};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        char text[CRPC_ERROR_TEXT_MAX];
        net n;
        int fd, other;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 8;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        other = wire_connect(n.url);
        net_send(fd, "Defer", 1, "\x08\x01", 2, fields);
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        net_send(other, "Defer", 2, "\x08\x02", 2, fields); /* while the first executes */
        assert_int_equal(net_reply_code(other, 2, text), CRPC_EREQUEST);
        assert_non_null(strstr(text, "crpc-rid"));
        let_go(&n, fd, 1, CRPC_OK);
        net_send(other, "Defer", 3, "\x08\x02", 2, fields); /* and when it has ended */
        assert_int_equal(net_reply_code(other, 3, NULL), CRPC_EREQUEST);
        net_send(other, "Defer", 4, "\x08\x01", 2, fields); /* the request itself */
        assert_int_equal(net_reply_code(other, 4, NULL), CRPC_OK);
        assert_int_equal(net_calls(&n.service), 1);
        close(fd);
        close(other);
        net_close(&n);
    }
}

/* The id is known again although the receive buffer, in which it came, has been overwritten while
 * the request waited for its turn. */
static void a_request_that_waits_keeps_its_id(void **state)
{
    static const char *const first[] = {"crpc-key", "k", NULL};
    static const char *const second[] = {"crpc-key", "k", "crpc-rid", "one", NULL};
    static char other[400];
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 8;
        net_open(&n, p, NET_THREAD);
        fd = wire_connect(n.url);
        net_send(fd, "Defer", 1, "\x08\x01", 2, first);
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        net_send(fd, "Add", 2, "\x08\x05", 2, second);
        net_send(fd, "None", 3, other, sizeof other, NULL);
        assert_int_equal(net_reply_code(fd, 3, NULL), CRPC_ENOMETHOD);
        net_send(fd, "None", 4, other, sizeof other, NULL);
        assert_int_equal(net_reply_code(fd, 4, NULL), CRPC_ENOMETHOD);
        assert_int_equal(net_calls(&n.service), 1);
        let_go(&n, fd, 1, CRPC_OK);
        assert_int_equal(net_reply_code(fd, 2, NULL), CRPC_OK);
        net_send(fd, "Add", 5, "\x08\x05", 2, second);
        assert_int_equal(net_reply_code(fd, 5, NULL), CRPC_OK);
        assert_int_equal(net_calls(&n.service), 2);
        close(fd);
        net_close(&n);
    }
}

/* A host that fills three quarters of the entries leaves the rest to others. */
static void a_host_cannot_take_all_replay_entries(void **state)
{
    net n;
    int greedy, honest, i, taken = 0;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.replay_entries = 8;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    greedy = wire_connect_from(n.url, "127.0.0.2");
    honest = wire_connect(n.url);
    for (i = 0; i < 20; i++) {
        char id[16];
        snprintf(id, sizeof id, "%d", i);
        send_again(greedy, "Add", i, id);
        taken += net_reply_code(greedy, i, NULL) == CRPC_OK;
    }
    assert_int_equal(taken, 6);
    assert_int_equal(ask_again(honest, "Add", "h1", NULL), CRPC_OK);
    assert_int_equal(ask_again(honest, "Add", "h2", NULL), CRPC_OK);
    close(greedy);
    close(honest);
    net_close(&n);
}

/* The request is not executed again although its reply was too large to be kept. */
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
    assert_non_null(strstr(call.error.text,
                           "the request was executed before, but its reply was not kept"));
    assert_int_equal(net_calls(&n.service), 1);
    crpc_call_reset(&call);
    net_close(&n);
    free(bytes);
}

/* --- repetitions that another run of the server would execute again --------------------------- */

/* Shared by the processes of a test. */
typedef struct restarts {
    uint32_t executed; /* atomic: times that the handler of the fatal request was called */
} restarts;

#define FATAL 666

static int crashes_in_the_first_run(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    restarts *r = (restarts *)crpc_context_user(x);
    if (in->n == FATAL && __atomic_fetch_add(&r->executed, 1, __ATOMIC_ACQ_REL) == 0)
        _exit(0); /* executed, and no reply */
    out->n = in->n + 1;
    return CRPC_OK;
}

/* One run of the server, in a process of its own, on a listener that outlives it. The second run
 * begins when the first has crashed. */
static pid_t run_server(restarts *r, int listener, bool first)
{
    static dyn_Echo_handlers handlers;
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child)
        return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (!first && !__atomic_load_n(&r->executed, __ATOMIC_ACQUIRE))
        ct_sleep_ms(1);
    handlers.Add = crashes_in_the_first_run;
    o.replay_entries = 100;
    if (crpc_server_open(&s, &o, NULL) || crpc_server_add(s, &dyn_Echo, &handlers, r) ||
        crpc_server_listen_fd(s, listener) || crpc_server_run(s))
        _exit(1);
    _exit(0);
}

/* A server executes a request and crashes before it has replied; its successor gets the repetition.
 * It does not execute it, whether or not the channel had met the first run before. */
static void a_restart_executes_no_request_twice(void **state)
{
    int met;
    (void)state;
    for (met = 0; met < 2; met++) {
        restarts *r = (restarts *)mmap(NULL, sizeof *r, PROT_READ | PROT_WRITE,
                                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        dyn_Num in = net_num(FATAL), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_channel *ch;
        crpci_addr a;
        char url[64];
        pid_t runs[2];
        int listener;
        assert_true(crpci_sock_parse(&a, "127.0.0.1:0"));
        listener = crpci_sock_listen(&a);
        assert_true(listener >= 0);
        crpci_sock_local(listener, &a);
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ntohs(a.u.in4.sin_port));
        runs[0] = run_server(r, listener, true);
        runs[1] = run_server(r, listener, false);
        ch = net_channel(url, "?request_ids=1&timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
        if (met)
            net_check_add(ch, 1);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_EREPEAT);
        assert_int_equal(call.error.sent, CRPC_SENT_YES);
        assert_true(call.error.remote);
        assert_int_equal(__atomic_load_n(&r->executed, __ATOMIC_ACQUIRE), 1);
        crpc_call_reset(&call);
        net_check_add(ch, 2); /* the second run serves what it knows to be new */
        crpc_channel_close(ch);
        peer_kill(runs[0]);
        peer_kill(runs[1]);
        close(listener);
        munmap(r, sizeof *r);
    }
}

/* Executes the request of `FATAL` and loses the connection before the reply. */
static int loses_its_connection(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    net_begin(x, in->n);
    out->n = in->n + 1;
    if (in->n == FATAL) {
        crpci_loop_lock(x->loop);
        crpci_conn_close(x->conn, CRPC_ECONN, 0);
        crpci_loop_unlock(x->loop);
    }
    return CRPC_OK;
}

/* The server is the same, so the repetition gets the reply that was lost, whether or not the
 * channel knew the incarnation when it sent the request. */
static void a_repetition_gets_the_reply_that_was_lost(void **state)
{
    static dyn_Echo_handlers handlers;
    net_mode m;
    int met;
    (void)state;
    handlers.Add = loses_its_connection;
    NET_EACH_MODE(m) for (met = 0; met < 2; met++)
    {
        net n;
        memset(&n, 0, sizeof n);
        n.handlers = &handlers;
        n.server_options.replay_entries = 10;
        n.query = "?request_ids=1";
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        if (met)
            net_check_add(n.channel, 1);
        net_check_add(n.channel, FATAL);
        assert_int_equal(net_calls(&n.service), 1 + met);
        net_close(&n);
    }
}

static int64_t repeat(int fd, const char *rid, const char *incarnation, const char *age)
{
    const char *fields[] = {"crpc-rid", NULL, "crpc-repeat", NULL, NULL};
    char value[200];
    snprintf(value, sizeof value, "%s%s", incarnation, age);
    fields[1] = rid;
    fields[3] = value;
    net_send(fd, "Add", 7, "\x08\x01", 2, fields);
    return net_reply_code(fd, 7, NULL);
}

/* A repetition that has no entry is executed only by a server that would have one. */
static void repetitions_are_for_servers_that_remember(void **state)
{
    static const char *const bad[] = {"", " ", "x", " -5", "  ", " 99999999999999999999999",
                                      "0123456789abcdef 5", "0123456789abcdef0123456789abcdef 5"};
    net n;
    size_t i;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    n.time = NET_TIME_STANDS;
    n.server_options.replay_entries = 100;
    n.server_options.replay_ms = 5000;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    net_time_add(2000);
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(repeat(fd, "a", "", bad[i]), CRPC_EREPEAT);
    assert_int_equal(repeat(fd, "a", "", " 1001"), CRPC_EREPEAT); /* too young */
    assert_int_equal(repeat(fd, "a", n.server->incarnation, " 5000"), CRPC_EREPEAT);
    assert_int_equal(net_calls(&n.service), 0);
    assert_int_equal(repeat(fd, "a", n.server->incarnation, " 4999"), CRPC_OK);
    assert_int_equal(repeat(fd, "b", "", " 1000"), CRPC_OK);
    assert_int_equal(net_calls(&n.service), 2);
    assert_int_equal(repeat(fd, "b", "x", " 86400000"), CRPC_OK); /* it has an entry */
    assert_int_equal(net_calls(&n.service), 2);
    close(fd);
    net_close(&n);
}

static void a_server_that_keeps_no_replies_takes_no_repetitions(void **state)
{
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    fd = wire_connect(n.url);
    assert_int_equal(ask_again(fd, "Add", "a", NULL), CRPC_OK);
    assert_int_equal(repeat(fd, "b", n.server->incarnation, " 1"), CRPC_EREPEAT);
    assert_int_equal(net_calls(&n.service), 1);
    close(fd);
    net_close(&n);
}

static void send_keyed(int fd, int n, const char *key)
{
    const char *fields[] = {"crpc-key", NULL, NULL};
    char body[2];
    fields[1] = key;
    body[0] = 1 << 3;
    body[1] = (char)n;
    net_send(fd, "Defer", n, body, 2, key ? fields : NULL);
}

/* Finishes the held request that came with this number; false: it is not held. */
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

/* Waits until `count` requests are held, and checks that no more follow. */
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
        send_keyed(other, 5, "red"); /* on another connection */
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
            assert_int_equal(net_reply_code(fd, order[i], NULL), CRPC_OK);
        }
        assert_int_equal(net_reply_code(other, 5, NULL), CRPC_OK);
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
            assert_int_equal(net_reply_code(i == 5 ? other : fd, i, NULL), CRPC_OK);
        }
        close(fd);
        close(other);
        net_close(&n);
    }
}

/* Requests that wait for another one when their server closes are freed with the server or with
 * that request. */
static void closing_with_requests_that_wait(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_context *x, *y;
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
        wait_replayed(&n, 2);
        x = net_take(&n.service);
        for (i = 1; i <= 3; i++)
            send_keyed(fd, i, "red");
        held_are(&n, 1);
        y = net_take(&n.service);
        net_close(&n);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        assert_int_equal(crpc_context_finish(y, CRPC_OK), CRPC_EGONE);
        assert_int_equal(n.service.calls, 3); /* one of them by held_are */
        close(fd);
    }
}

#define KEYS  16
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
        wire_request_fields(&w, "Add", i, (const char *)body.p, body.n, 0, fields);
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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(requests_in_service_are_limited),
        CT_TEST(a_limit_that_applies_to_no_method_is_refused),
        CT_TEST(methods_have_rates),
        CT_TEST(requests_that_reach_no_method_count_for_the_rate),
        CT_TEST(clients_have_rates),
        CT_TEST(adaptive_limits_adapt),
        CT_TEST(a_repeated_request_is_executed_once),
        CT_TEST(a_request_repeated_while_it_runs_waits_for_its_reply),
        CT_TEST(an_id_counts_within_its_method),
        CT_TEST(a_kept_failure_is_repeated_too),
        CT_TEST(a_repeated_reply_is_complete),
        CT_TEST(a_refused_request_is_not_remembered),
        CT_TEST(an_undecodable_request_is_not_remembered),
        CT_TEST(an_id_has_64_bytes_at_most),
        CT_TEST(an_empty_id_counts_as_no_id),
        CT_TEST(a_full_table_refuses_until_entries_expire),
        CT_TEST(a_reply_is_forgotten_after_replay_ms),
        CT_TEST(a_request_without_a_free_entry_is_not_executed),
        CT_TEST(another_request_with_the_same_id_is_refused),
        CT_TEST(a_request_that_waits_keeps_its_id),
        CT_TEST(a_host_cannot_take_all_replay_entries),
        CT_TEST(a_reply_too_large_to_keep),
        CT_TEST(a_restart_executes_no_request_twice),
        CT_TEST(a_repetition_gets_the_reply_that_was_lost),
        CT_TEST(repetitions_are_for_servers_that_remember),
        CT_TEST(a_server_that_keeps_no_replies_takes_no_repetitions),
        CT_TEST(requests_of_a_key_wait_for_each_other),
        CT_TEST(requests_of_a_connection_may_wait_too),
        CT_TEST(closing_with_requests_that_wait),
        CT_TEST(workers_keep_the_order_of_keys),
    };
    return CT_RUN(tests);
}
