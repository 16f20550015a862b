/* Attempts of a call: deadlines, retries on other providers; every call ends exactly once. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_net.h"

/* Calls a peer that does not answer, synchronously and by callback. Checks the status, how much was
 * sent, and that the call ended at its deadline and not before. */
static void check_deadline(const char *url, crpc_poller p, int ms, int code, int sent,
                           size_t attachment, const char *query)
{
    crpc_channel *ch = net_channel(url, query, p, NULL, NULL);
    char *bytes = net_bytes(attachment);
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    done_log d;
    int64_t start, took;
    call.attachment = crpc_view_of(bytes, attachment);
    for (;; ms *= 2) { /* until a slow machine sends the request in time */
        call.policy.timeout_ms = ms;
        start = ct_now_ms();
        assert_int_equal(dyn_Echo_Pass(ch, &in, &out, &call), code);
        took = ct_now_ms() - start;
        if (sent == CRPC_SENT_NO || call.error.sent != CRPC_SENT_NO || ms > NET_PATIENCE)
            break;
    }
    assert_int_equal(call.error.code, code);
    assert_int_equal(call.error.sent, sent);
    assert_false(call.error.remote);
    if (code == CRPC_ETIMEDOUT)
        assert_true(took >= ms - 1);
    assert_true(took < ms + 5000);
    memset(bytes, 'x', attachment); /* ASan reports a read after the free below */
    free(bytes);
    crpc_call_reset(&call);
    crpc_channel_close(ch);

    ch = net_channel(url, query, p, NULL, NULL);
    bytes = net_bytes(attachment);
    memset(&call, 0, sizeof call);
    call.policy.timeout_ms = ms;
    call.attachment = crpc_view_of(bytes, attachment);
    done_init(&d);
    start = ct_now_ms();
    assert_int_equal(dyn_Echo_Pass_async(ch, &in, done_blob, &d, &call), CRPC_OK);
    free(bytes);
    assert_true(CT_WAIT(done_count(&d), NET_PATIENCE));
    took = ct_now_ms() - start;
    assert_int_equal(d.status, code);
    if (code == CRPC_ETIMEDOUT)
        assert_true(took >= ms - 1);
    assert_true(took < ms + 5000);
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
}

/* A script: sends half a reply and closes. */
static bool peer_cuts_reply(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)number;
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, 5);
    wire_send(fd, w.p, w.n / 2);
    wire_free(&w);
    wire_done(&m);
    return true;
}

/* A script: sends half a reply and waits. */
static bool peer_stalls_reply(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, 5);
    wire_send(fd, w.p, w.n / 2);
    wire_free(&w);
    wire_done(&m);
    return peer_silent(p, fd, number);
}

static void a_refused_connection_does_not_wait_for_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        char url[64];
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ct_free_port());
        check_deadline(url, p, 300, CRPC_ECONN, CRPC_SENT_NO, 0, NULL);
    }
}

static void a_silent_peer_costs_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        peer_open(&silent, peer_silent, NULL);
        check_deadline(silent.url, p, 60, CRPC_ETIMEDOUT, CRPC_SENT_YES, 0, NULL);
        peer_close(&silent);
    }
}

static void half_a_reply_costs_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer stalls;
        peer_open(&stalls, peer_stalls_reply, NULL);
        check_deadline(stalls.url, p, 60, CRPC_ETIMEDOUT, CRPC_SENT_YES, 0, NULL);
        peer_close(&stalls);
    }
}

/* A peer that begins a reply and stalls poisons no later call: the connection is closed when no byte
 * has come for two seconds. The time moves only as the test says. */
static void half_a_reply_ends_the_connection(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_call call = CRPC_INIT;
    dyn_Num in = net_num(1);
    crpc_channel *ch;
    crpci_conn *conn;
    crpc_loop *l;
    peer stalls;
    done_log d;
    (void)state;
    net_time_begin(NET_TIME_STANDS);
    o.hooks.clock_us = net_clock_us;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    peer_open(&stalls, peer_stalls_reply, NULL);
    ch = net_channel(stalls.url, "?retries=-1", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    done_init(&d);
    call.policy.timeout_ms = 60000;
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, &call), CRPC_OK);
    conn = CRPCI_CONTAINER(l->conns.next, crpci_conn, link);
    while (!conn->rx)
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    net_time_add(1900);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(done_count(&d), 0);
    net_time_add(200);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(done_count(&d), 1);
    assert_int_equal(d.status, CRPC_ECONN);
    assert_int_equal(d.error.sent, CRPC_SENT_YES);
    assert_non_null(strstr(d.error.text, "stalled"));
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&stalls);
}

static void a_reply_that_is_cut_is_a_lost_connection(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer cuts;
        peer_open(&cuts, peer_cuts_reply, NULL);
        check_deadline(cuts.url, p, 3000, CRPC_ECONN, CRPC_SENT_YES, 0, NULL);
        peer_close(&cuts);
    }
}

/* The peer reads nothing, so part of the request stays unsent, the borrowed attachment included. */
static void a_peer_that_reads_nothing_costs_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer deaf;
        peer_open(&deaf, peer_deaf, NULL);
        check_deadline(deaf.url, p, 100, CRPC_ETIMEDOUT, CRPC_SENT_MAYBE, 12 << 20, NULL);
        peer_close(&deaf);
    }
}

#define FULL_FILLERS 8

/* A listener whose queue is full, so that the kernel drops every further SYN. */
typedef struct full_listener {
    int fd, port, fillers[FULL_FILLERS];
} full_listener;

static void full_listener_open(full_listener *f)
{
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    int i;
    f->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(bind(f->fd, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(f->fd, 0), 0);
    assert_int_equal(getsockname(f->fd, (struct sockaddr *)&a, &size), 0);
    f->port = ntohs(a.sin_port);
    for (i = 0; i < FULL_FILLERS; i++) {
        f->fillers[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        connect(f->fillers[i], (struct sockaddr *)&a, sizeof a);
    }
    ct_sleep_ms(20);
}

static void full_listener_close(full_listener *f)
{
    int i;
    for (i = 0; i < FULL_FILLERS; i++)
        close(f->fillers[i]);
    close(f->fd);
}

static void connecting_costs_the_deadline_or_connect_timeout_ms(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        full_listener full;
        char url[64];
        full_listener_open(&full);
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", full.port);
        check_deadline(url, p, 80, CRPC_ETIMEDOUT, CRPC_SENT_NO, 0, NULL);
        check_deadline(url, p, 3000, CRPC_ECONN, CRPC_SENT_NO, 0, "?connect_timeout_ms=50");
        full_listener_close(&full);
    }
}

#define FULL_COUNT 4

/* FULL_COUNT full listeners, and a list:// URL of them. */
static void full_listeners_open(full_listener *f, char *list, size_t size)
{
    size_t used = (size_t)snprintf(list, size, "list://");
    int i;
    for (i = 0; i < FULL_COUNT; i++) {
        full_listener_open(&f[i]);
        used +=
            (size_t)snprintf(list + used, size - used, "%s127.0.0.1:%d", i ? "," : "", f[i].port);
    }
    assert_true(used < size);
}

static void full_listeners_close(full_listener *f)
{
    int i;
    for (i = 0; i < FULL_COUNT; i++)
        full_listener_close(&f[i]);
}

static void retries_do_not_outlast_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        full_listener full[FULL_COUNT];
        char list[200];
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int64_t start;
        full_listeners_open(full, list, sizeof list);
        ch = net_channel(list, "?connect_timeout_ms=60&retries=10", p, NULL, NULL);
        call.policy.timeout_ms = 150; /* passes during the third attempt */
        start = ct_now_ms();
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        assert_true(ct_now_ms() - start >= 149);
        assert_true(ct_now_ms() - start < 10000);
        assert_in_range(call.error.attempts, 1, 3);
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        full_listeners_close(full);
    }
}

static void each_provider_is_tried_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        full_listener full[FULL_COUNT];
        char list[200];
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        full_listeners_open(full, list, sizeof list);
        ch = net_channel(list, "?connect_timeout_ms=60&retries=10&timeout_ms=20000", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        assert_int_equal(call.error.attempts, FULL_COUNT);
        assert_non_null(strstr(call.error.text, "attempt 4"));
        assert_non_null(strstr(call.error.text, "(connect_timeout_ms); no other provider to try (local)"));
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        full_listeners_close(full);
    }
}

static void many_deadlines_at_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        crpc_channel *ch;
        done_log d;
        dyn_Num in = net_num(1);
        crpc_loop_stats stats;
        int i;
        peer_open(&silent, peer_silent, NULL);
        ch = net_channel(silent.url, NULL, p, NULL, NULL);
        done_init(&d);
        for (i = 0; i < 500; i++) {
            crpc_call call = CRPC_INIT;
            call.policy.timeout_ms = 1 + i % 50;
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, &call), CRPC_OK);
        }
        assert_true(CT_WAIT(done_count(&d) == 500, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_ETIMEDOUT);
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.pending, 0);
        assert_int_equal(stats.calls, 500);
        crpc_channel_close(ch);
        peer_close(&silent);
    }
}

/* A call whose deadline has passed before it begins is not sent. */
static void a_passed_deadline_sends_nothing(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        done_log d;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        net_check_add(n.channel, 1); /* connected */
        call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) - 1000;
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_ETIMEDOUT);
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        done_init(&d);
        assert_int_equal(dyn_Echo_Add_async(n.channel, &in, done_num, &d, &call), CRPC_OK);
        assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_ETIMEDOUT);
        assert_int_equal(d.error.sent, CRPC_SENT_NO);
        net_check_add(n.channel, 2);
        assert_int_equal(net_calls(&n.service), 2);
        crpc_call_reset(&call);
        net_close(&n);
    }
}

/* Makes `calls` calls, so that round robin begins with each provider; returns how many
 * succeeded. */
static int succeed(const char *list, crpc_poller p, bool idempotent, int calls, int *code,
                   crpc_error *error)
{
    crpc_channel *ch = net_channel(list, "?timeout_ms=20000", p, NULL, NULL);
    int i, good = 0;
    *code = CRPC_OK;
    for (i = 0; i < calls; i++) {
        dyn_Num in = net_num(i), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int status =
            idempotent ? dyn_Echo_Get(ch, &in, &out, &call) : dyn_Echo_Add(ch, &in, &out, &call);
        if (status) {
            *code = status;
            *error = call.error;
        } else {
            good += out.n == i + 1;
            if (call.error.attempts > 1)
                error->attempts = call.error.attempts;
        }
        crpc_call_reset(&call);
    }
    crpc_channel_close(ch);
    return good;
}

static void an_unsent_request_is_tried_elsewhere(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer good;
        char list[128];
        int code;
        crpc_error error = CRPC_INIT;
        peer_open(&good, peer_adds, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", ct_free_port(), good.port);
        assert_int_equal(succeed(list, p, false, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);
        peer_close(&good);
    }
}

/* A server that answers ELOGOFF or ELIMIT has not executed the request. */
static void a_refused_request_is_tried_elsewhere(void **state)
{
    static const peer_fn how[] = {peer_says_logoff, peer_says_limit};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 2; i++)
    {
        peer good, refuses;
        char list[128];
        int code;
        crpc_error error = CRPC_INIT;
        peer_open(&good, peer_adds, NULL);
        peer_open(&refuses, how[i], NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", refuses.port, good.port);
        assert_int_equal(succeed(list, p, false, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);
        assert_true(peer_requests(&refuses) >= 1);
        peer_close(&good);
        peer_close(&refuses);
    }
}

/* A script: answers that the server stopped before the handler had ended. */
static bool peer_says_canceled(peer *p, int fd, int number)
{
    (void)number;
    return peer_refuses(p, fd, CRPC_ECANCELED);
}

static void a_lost_request_is_tried_elsewhere_only_if_it_may_run_twice(void **state)
{
    static const struct {
        peer_fn fn;
        int code;
    } how[] = {{peer_hangs_up, CRPC_ECONN}, {peer_says_canceled, CRPC_ECANCELED}};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 2; i++)
    {
        peer good, loses;
        char list[128];
        int code;
        crpc_error error = CRPC_INIT;
        peer_open(&good, peer_adds, NULL);
        peer_open(&loses, how[i].fn, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", loses.port, good.port);
        assert_in_range(succeed(list, p, false, 4, &code, &error), 1, 3);
        assert_int_equal(code, how[i].code);
        assert_int_equal(error.sent, CRPC_SENT_YES);
        assert_int_equal(error.attempts, 1);
        memset(&error, 0, sizeof error);
        assert_int_equal(succeed(list, p, true, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);
        peer_close(&good);
        peer_close(&loses);
    }
}

/* As brpc does by default: whoever sets it says that methods may run twice. A request with an id
 * still goes to its own provider only. */
static void with_retry_lost_every_lost_request_is_tried_elsewhere(void **state)
{
    static const char *const queries[] = {"?retry_lost=1&timeout_ms=20000",
                                          "?retry_lost=1&request_ids=1&timeout_ms=20000",
                                          "?timeout_ms=20000"};
    int q, i;
    (void)state;
    for (q = 0; q < 3; q++) {
        peer good, lost;
        char list[128];
        crpc_channel *ch;
        int failed = 0;
        peer_open(&good, peer_adds, NULL);
        peer_open(&lost, peer_hangs_up, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", lost.port, good.port);
        ch = net_channel(list, queries[q], CRPC_POLLER_DEFAULT, NULL, NULL);
        for (i = 0; i < 4; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            failed += dyn_Echo_Add(ch, &in, &out, NULL) != CRPC_OK;
        }
        assert_true(peer_requests(&lost) >= 1);
        assert_int_equal(failed != 0, q != 0);
        crpc_channel_close(ch);
        peer_close(&good);
        peer_close(&lost);
    }
}

static void an_unanswered_request_is_not_tried_elsewhere(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer good, silent;
        char list[128];
        crpc_channel *ch;
        int i, late = 0;
        peer_open(&good, peer_adds, NULL);
        peer_open(&silent, peer_silent, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", silent.port, good.port);
        ch = net_channel(list, "?timeout_ms=100", p, NULL, NULL);
        for (i = 0; i < 4; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            late += dyn_Echo_Add(ch, &in, &out, &call) == CRPC_ETIMEDOUT;
            assert_int_equal(call.error.attempts, 1);
            crpc_call_reset(&call);
        }
        assert_in_range(late, 2, 4); /* on a busy machine a good one may be late, too */
        assert_true(peer_requests(&silent) <= 2);
        assert_true(peer_requests(&silent) + peer_requests(&good) <= 4);
        crpc_channel_close(ch);
        peer_close(&good);
        peer_close(&silent);
    }
}

static void when_all_servers_are_stopping_the_error_is_elogoff(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer one, two;
        crpc_channel *ch;
        char list[128];
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        peer_open(&one, peer_says_logoff, NULL);
        peer_open(&two, peer_says_logoff, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", one.port, two.port);
        ch = net_channel(list, "?timeout_ms=20000", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ELOGOFF);
        assert_int_equal(call.error.attempts, 2);
        assert_int_equal(call.error.sent, CRPC_SENT_YES);
        assert_true(call.error.remote);
        assert_non_null(strstr(call.error.text, "(remote)"));
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&one);
        peer_close(&two);
    }
}

/* Both providers take the request and lose the connection. */
static void a_lost_reply_is_executed_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer a, b;
        char list[128];
        crpc_channel *ch;
        int i;
        peer_open(&a, peer_hangs_up, NULL);
        peer_open(&b, peer_hangs_up, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", a.port, b.port);
        ch = net_channel(list, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 10; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_int_equal(peer_requests(&a) + peer_requests(&b), i + 1);
            crpc_call_reset(&call);
        }
        crpc_channel_close(ch);
        peer_close(&a);
        peer_close(&b);
    }
}

typedef struct fault_plan {
    uint64_t random;
    int requests;
} fault_plan;

static uint64_t fault_dice(fault_plan *f, uint64_t n)
{
    return ct_random_from(&f->random) / 7 % n;
}

/* A script: drops, doubles, delays, splits and forges replies, answers out of order, and now and
 * then resets or closes. */
static bool peer_faulty(peer *p, int fd, int number)
{
    fault_plan *f = (fault_plan *)p->user;
    wire_message m;
    wire w = {NULL, 0, 0}, later = {NULL, 0, 0};
    int end = 0;
    (void)number;
    while (!end && peer_receive(p, fd, &m) == 1) {
        struct pollfd more = {0, POLLIN, 0};
        size_t sent = 0;
        switch (fault_dice(f, 16)) {
        case 0: /* dropped */
            break;
        case 1: /* twice */
            wire_reply(&w, m.id, m.n + 1);
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 2: /* late */
            wire_reply(&later, m.id, m.n + 1);
            break;
        case 3: /* forged: the wrong answer for every call */
            wire_reply(&w, m.id - (INT64_C(1) << 32), -666);
            wire_reply(&w, m.id ^ (INT64_C(1) << 62), -666);
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 4:
            wire_error(&w, m.id, 20007, "no", 1);
            break;
        case 5:
            wire_put(&w, later.p, later.n);
            later.n = 0;
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 6:
            if (fault_dice(f, 400) == 0)
                end = 1 + (int)fault_dice(f, 3);
            wire_reply(&w, m.id, m.n + 1);
            break;
        default:
            wire_reply(&w, m.id, m.n + 1);
        }
        wire_done(&m);
        more.fd = fd;
        if (end == 3)
            wire_put(&w, "PRPC garbage garbage", 20);
        if (!end && w.n < 4000 && poll(&more, 1, 0) == 1)
            continue; /* more requests: their replies go together */
        while (sent < w.n) {
            size_t step = fault_dice(f, 4) ? w.n - sent : 1 + fault_dice(f, w.n - sent);
            if (end == 2 && sent)
                break;
            if (!wire_send(fd, w.p + sent, step))
                end = 1;
            sent += step;
        }
        w.n = 0;
    }
    wire_free(&w);
    wire_free(&later);
    if (end == 2) {
        pthread_mutex_lock(&p->lock);
        wire_reset(fd);
        pthread_mutex_unlock(&p->lock);
        return false;
    }
    return true;
}

typedef struct fault_log {
    uint8_t *done;
    int completed, twice, wrong;
    int by_status[8];
} fault_log;

typedef struct fault_call {
    fault_log *log;
    int number;
} fault_call;

static void on_fault_done(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    fault_call *c = (fault_call *)user;
    fault_log *f = c->log;
    (void)call;
    f->twice += f->done[c->number]++ != 0;
    f->completed++;
    if (!status && response->n != c->number + 1)
        f->wrong++;
    switch (status) {
    case CRPC_OK:
        f->by_status[0]++;
        break;
    case CRPC_ETIMEDOUT:
        f->by_status[1]++;
        break;
    case CRPC_ECONN:
        f->by_status[2]++;
        break;
    case CRPC_EAPP:
        f->by_status[3]++;
        break;
    case CRPC_EOVERCROWDED:
        f->by_status[4]++;
        break;
    default:
        f->by_status[5]++;
    }
}

#define FAULT_CALLS 60000 /* on each poller */

static void every_call_ends_once_whatever_the_peer_does(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        crpc_channel *ch;
        peer a, b;
        fault_plan plans[2];
        fault_log log;
        fault_call *calls = (fault_call *)malloc(FAULT_CALLS * sizeof *calls);
        uint64_t random = ct_seed() * 3 + (uint64_t)p;
        crpc_loop_stats stats;
        char list[128];
        int64_t stuck;
        int i = 0, begun = 0;
        memset(&log, 0, sizeof log);
        log.done = (uint8_t *)calloc(FAULT_CALLS, 1);
        memset(plans, 0, sizeof plans);
        plans[0].random = ct_seed() + 11;
        plans[1].random = ct_seed() + 23;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        a.sequential = b.sequential = true;
        peer_open_on(&a, 0, peer_faulty, &plans[0]);
        peer_open_on(&b, 0, peer_faulty, &plans[1]);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", a.port, b.port);
        ch = net_channel(list, "?retries=1", p, l, NULL);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        stuck = ct_now_ms() + 150000;
        while (log.completed < FAULT_CALLS && ct_now_ms() < stuck) {
            while (i < FAULT_CALLS && begun - log.completed < 256) {
                crpc_call call = CRPC_INIT;
                dyn_Num in = net_num(i);
                int status;
                calls[i].log = &log;
                calls[i].number = i;
                call.policy.timeout_ms = 20 + (int)(ct_random_from(&random) % 200);
                status = ct_random_from(&random) & 64
                             ? dyn_Echo_Add_async(ch, &in, on_fault_done, &calls[i], &call)
                             : dyn_Echo_Get_async(ch, &in, on_fault_done, &calls[i], &call);
                assert_int_equal(status, CRPC_OK);
                i++;
                begun++;
            }
            assert_int_equal(crpc_loop_step(l, 50), CRPC_OK);
        }
        assert_int_equal(log.completed, FAULT_CALLS);
        assert_int_equal(log.twice, 0);
        assert_int_equal(log.wrong, 0);
        assert_int_equal(log.by_status[5], 0);
        assert_true(log.by_status[0] > FAULT_CALLS / 3);
        assert_true(log.by_status[1] > 0 && log.by_status[3] > 0);
        crpc_loop_stats_get(l, &stats);
        assert_int_equal(stats.pending, 0);
        assert_true(stats.late_replies > 100);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&a);
        peer_close(&b);
        free(calls);
        free(log.done);
    }
}

/* The same from threads that call synchronously and share the loop. */
typedef struct fault_thread {
    crpc_channel *ch;
    int calls, wrong, odd;
    uint64_t random;
} fault_thread;

static void *call_through_faults(void *arg)
{
    fault_thread *t = (fault_thread *)arg;
    int i;
    for (i = 0; i < t->calls; i++) {
        dyn_Num in = net_num(i), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int status;
        call.policy.timeout_ms = 5 + (int)(ct_random_from(&t->random) % 40);
        status = dyn_Echo_Get(t->ch, &in, &out, &call);
        if (!status && out.n != i + 1)
            t->wrong++;
        if (status && status != CRPC_ETIMEDOUT && status != CRPC_ECONN && status != CRPC_EAPP)
            t->odd++;
        crpc_call_reset(&call);
    }
    return NULL;
}

static void threads_share_a_loop_through_faults(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        fault_thread t[4];
        pthread_t threads[4];
        fault_plan plan;
        crpc_loop_stats stats;
        crpc_channel *ch;
        peer a;
        int i;
        memset(&plan, 0, sizeof plan);
        plan.random = ct_seed() + 5;
        memset(&a, 0, sizeof a);
        a.sequential = true;
        peer_open_on(&a, 0, peer_faulty, &plan);
        ch = net_channel(a.url, NULL, p, NULL, NULL);
        for (i = 0; i < 4; i++) {
            memset(&t[i], 0, sizeof t[i]);
            t[i].ch = ch;
            t[i].calls = 800;
            t[i].random = ct_seed() + (uint64_t)i;
            assert_int_equal(pthread_create(&threads[i], NULL, call_through_faults, &t[i]), 0);
        }
        for (i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(t[i].wrong, 0);
            assert_int_equal(t[i].odd, 0);
        }
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.pending, 0);
        crpc_channel_close(ch);
        peer_close(&a);
    }
}

static void failfast_tries_once(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        crpc_call call = CRPC_INIT;
        int i, failed = 0;
        fleet_open(&f, 2, "?lb=rr&timeout_ms=20000", NULL);
        fleet_peer_close(&f.peers[0]);
        call.policy.cluster = CRPC_CLUSTER_FAILFAST;
        for (i = 0; i < 2; i++) { /* one at each provider */
            r = fleet_call(&f, form, false, i, &call);
            assert_int_equal(r.error.attempts, 1);
            failed += r.status == CRPC_ECONN;
        }
        assert_int_equal(failed, 1);
        fleet_close(&f);
    }
}

static void failover_finds_the_provider_that_is_left(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        int i;
        fleet_open(&f, 2, "?lb=rr&timeout_ms=20000", NULL);
        fleet_peer_close(&f.peers[0]);
        for (i = 0; i < 8; i++)
            assert_int_equal(fleet_call(&f, form, false, i, NULL).status, CRPC_OK);
        fleet_close(&f);
    }
}

/* A script: takes one request, then stops listening. */
static bool peer_dies(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    if (peer_receive(p, fd, &m) == 1)
        wire_done(&m);
    shutdown(p->listen_fd, SHUT_RDWR);
    return true;
}

/* The provider that may have executed a request with an id is gone: no other provider gets it. */
static void a_request_with_an_id_goes_to_no_other_provider(void **state)
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

/* A cancelled call shows only how long its provider took at least; it must not raise the latency
 * above that. */
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
            before[i] = crpci_providers_at(&f.channel->providers, (size_t)i)->balance.latency / 256;
        assert_int_equal(dyn_Echo_Get_begin(f.channel, &request, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(f.channel, id), CRPC_OK);
        most = crpc_loop_now_us(crpc_channel_loop(f.channel)) - start;
        for (i = 0; i < 2; i++) {
            now = crpci_providers_at(&f.channel->providers, (size_t)i)->balance.latency / 256;
            assert_true(now <= (before[i] > most ? before[i] : most));
        }
    }
    fleet_close(&f);
}

/* When all providers fail, the retry budget ends the retries. */
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
        call.policy.timeout_ms = 5000;
        r = fleet_call(&f, FORM_SYNC, true, i, &call);
        assert_int_equal(r.status, CRPC_ECONN);
        attempts += r.error.attempts;
        if (i > 20 && i % 20)
            crpci_providers_at(&f.channel->providers, 0)->endpoint->usable_at =
                0; /* do not wait for backoffs */
        if (attempts > 60 && i > 30)
            break;
    }
    assert_true(attempts <= i + 1 + 10);
    fleet_close(&f);
}

/* The ids and the key that the script below has read. */
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

static void named_open(fleet *f, peer *p, named *names, const char *query)
{
    memset(f, 0, sizeof *f);
    memset(names, 0, sizeof *names);
    peer_open(p, peer_forgets, names);
    f->channel = net_channel(p->url, query, CRPC_POLLER_DEFAULT, NULL, NULL);
}

static void named_close(fleet *f, peer *p)
{
    crpc_channel_close(f->channel);
    peer_close(p);
}

/* A request with an id goes to its provider again, with that id, when the connection was lost. */
static void a_request_with_an_id_is_sent_again_to_its_provider(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet_result r;
        named names;
        fleet f;
        peer p;
        named_open(&f, &p, &names, "?request_ids=1&timeout_ms=20000");
        r = fleet_call(&f, form, false, 4, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 5);
        assert_int_equal(names.count, 2);
        assert_int_equal(strlen(names.id[0]), 32);
        assert_string_equal(names.id[0], names.id[1]);
        named_close(&f, &p);
    }
}

static void a_calls_own_id_and_key_are_sent(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_call call = CRPC_INIT;
        named names;
        fleet f;
        peer p;
        named_open(&f, &p, &names, "?request_ids=1&timeout_ms=20000");
        call.request_id = crpc_view_str("order 17");
        call.order_key = crpc_view_str("customer 4");
        assert_int_equal(fleet_call(&f, form, false, 4, &call).status, CRPC_OK);
        assert_int_equal(names.count, 2);
        assert_string_equal(names.id[0], "order 17");
        assert_string_equal(names.id[1], "order 17");
        assert_string_equal(names.key, "customer 4");
        named_close(&f, &p);
    }
}

static void every_call_has_an_id_of_its_own(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        named names;
        fleet f;
        peer p;
        named_open(&f, &p, &names, "?request_ids=1&timeout_ms=20000");
        assert_int_equal(fleet_call(&f, form, false, 4, NULL).status, CRPC_OK);
        assert_int_equal(fleet_call(&f, form, false, 4, NULL).status, CRPC_OK);
        assert_int_equal(names.count, 3);
        assert_string_equal(names.id[0], names.id[1]);
        assert_string_not_equal(names.id[2], names.id[1]);
        named_close(&f, &p);
    }
}

/* Its method is not idempotent, so it could be executed twice. */
static void a_request_without_an_id_is_not_sent_again(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        named names;
        fleet f;
        peer p;
        named_open(&f, &p, &names, "?timeout_ms=20000");
        assert_int_equal(fleet_call(&f, form, false, 4, NULL).status, CRPC_ECONN);
        assert_int_equal(names.count, 1);
        assert_string_equal(names.id[0], "");
        named_close(&f, &p);
    }
}

/* --- wait=1 ----------------------------------------------------------------------------------- */

static bool is_waiting(crpc_channel *ch)
{
    bool waits;
    crpci_loop_lock(ch->loop);
    waits = !crpci_list_empty(&ch->waiting);
    crpci_loop_unlock(ch->loop);
    return waits;
}

/* Returns how often dialling the channel's only provider has failed. */
static int failures_of(crpc_channel *ch)
{
    int n;
    crpci_loop_lock(ch->loop);
    n = crpci_providers_at(&ch->providers, 0)->endpoint->failures;
    crpci_loop_unlock(ch->loop);
    return n;
}

/* Gives the channel a list, as a registry does. */
static void push_list(crpc_channel *ch, const char *address)
{
    crpci_snapshot *list = crpci_directory_snapshot(ch->loop->heap, address ? 1 : 0);
    assert_non_null(list);
    if (address) {
        snprintf(list->providers[0].address, CRPC_ADDRESS_MAX, "%s", address);
        list->providers[0].weight = 100;
    }
    assert_int_equal(crpci_opening_on_list(ch, list), CRPC_OK);
    crpci_directory_snapshot_unref(list);
}

static void a_call_waits_for_its_provider_to_start(void **state)
{
    static const char *const queries[] = {"?wait=1&timeout_ms=20000",
                                          "?wait=1&timeout_ms=20000&cluster=failfast",
                                          "?wait=1&timeout_ms=20000&cluster=forking",
                                          "?wait=1&timeout_ms=20000&retries=-1&lb=p2c"};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof queries / sizeof *queries; i++) {
        fleet f;
        fleet_result r;
        dyn_Num in = net_num(4);
        char listen[160];
        memset(&r, 0, sizeof r);
        fleet_open(&f, 1, queries[i], NULL);
        snprintf(listen, sizeof listen, "tcp://%s", f.peers[0].address);
        fleet_peer_close(&f.peers[0]);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &in, fleet_done, &r, NULL), CRPC_OK);
        assert_true(CT_WAIT(failures_of(f.channel) >= 2, NET_PATIENCE));
        assert_false(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST));
        fleet_peer_open(&f.peers[0], 0, listen);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 5);
        fleet_close(&f);
    }
}

/* Closes the connection of the first request; answers those of later connections. */
static bool peer_drops_first(peer *p, int fd, int number)
{
    wire_message m;
    if (number > 0)
        return peer_adds(p, fd, number);
    if (peer_receive(p, fd, &m) == 1)
        wire_done(&m);
    return true;
}

/* Dials in vain do not use up the retries of a call that waits. */
static void a_call_that_has_waited_is_still_retried(void **state)
{
    fleet f;
    fleet_result r;
    peer p;
    dyn_Num in = net_num(4);
    int port;
    (void)state;
    memset(&f, 0, sizeof f);
    memset(&r, 0, sizeof r);
    peer_open(&p, peer_adds, NULL);
    port = p.port;
    f.channel = net_channel(p.url, "?wait=1&timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    peer_close(&p);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &in, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(failures_of(f.channel) >= 4, NET_PATIENCE));
    p.sequential = false;
    peer_open_on(&p, port, peer_drops_first, NULL);
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(r.status, CRPC_OK);
    assert_int_equal(r.out.n, 5);
    crpc_channel_close(f.channel);
    peer_close(&p);
}

/* The first attempt and the backup request cannot connect: the call waits all the same. */
static void a_waiting_call_outlasts_its_backup_request(void **state)
{
    int round;
    (void)state;
    for (round = 0; round < 6; round++) {
        fleet f;
        fleet_result r[8];
        dyn_Num in = net_num(4);
        char listen[160];
        size_t i;
        memset(r, 0, sizeof r);
        fleet_open(&f, 2, "?wait=1&timeout_ms=20000&backup_ms=40", NULL);
        snprintf(listen, sizeof listen, "tcp://%s", f.peers[0].address);
        fleet_peer_close(&f.peers[0]);
        fleet_peer_close(&f.peers[1]);
        for (i = 0; i < 8; i++)
            assert_int_equal(dyn_Echo_Get_async(f.channel, &in, fleet_done, &r[i], NULL), CRPC_OK);
        assert_true(CT_WAIT(failures_of(f.channel) >= 3, NET_PATIENCE));
        fleet_peer_open(&f.peers[0], 0, listen);
        for (i = 0; i < 8; i++) {
            assert_true(CT_WAIT(__atomic_load_n(&r[i].done, __ATOMIC_SEQ_CST), NET_PATIENCE));
            assert_int_equal(r[i].status, CRPC_OK);
        }
        fleet_close(&f);
    }
}

/* The provider of a backup request that could not connect is dialled again when the call waits. */
static void a_waiting_call_returns_to_where_its_backup_failed(void **state)
{
    full_listener full;
    fleet f;
    fleet_result r;
    dyn_Num in = net_num(4);
    peer p;
    char url[96];
    int port;
    (void)state;
    memset(&f, 0, sizeof f);
    memset(&r, 0, sizeof r);
    full_listener_open(&full);
    peer_open(&p, peer_adds, NULL);
    port = p.port;
    peer_close(&p);
    snprintf(url, sizeof url, "list://127.0.0.1:%d,127.0.0.1:%d", full.port, port);
    f.channel = net_channel(
        url, "?lb=rr&wait=1&timeout_ms=9000&connect_timeout_ms=500&backup_ms=20&retries=-1",
        CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &in, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(failures_of(f.channel) >= 1, NET_PATIENCE)); /* the first attempt's */
    p.sequential = false;
    peer_open_on(&p, port, peer_adds, NULL);
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(r.status, CRPC_OK);
    crpc_channel_close(f.channel);
    peer_close(&p);
    full_listener_close(&full);
}

static void a_call_waits_for_a_list(void **state)
{
    static const char *const queries[] = {"?wait=1&timeout_ms=20000",
                                          "?wait=1&timeout_ms=20000&cluster=broadcast",
                                          "?wait=1&timeout_ms=20000&cluster=forking"};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof queries / sizeof *queries; i++) {
        fleet f;
        fleet_result r, second;
        dyn_Num in = net_num(4);
        memset(&r, 0, sizeof r);
        memset(&second, 0, sizeof second);
        fleet_open(&f, 1, queries[i], NULL);
        push_list(f.channel, NULL);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &in, fleet_done, &r, NULL), CRPC_OK);
        assert_int_equal(dyn_Echo_Get_async(f.channel, &in, fleet_done, &second, NULL), CRPC_OK);
        assert_true(is_waiting(f.channel));
        push_list(f.channel, NULL); /* an empty list is no provider */
        assert_true(is_waiting(f.channel));
        push_list(f.channel, f.peers[0].address);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST) &&
                                __atomic_load_n(&second.done, __ATOMIC_SEQ_CST),
                            NET_PATIENCE));
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(second.status, CRPC_OK);
        fleet_close(&f);
    }
}

static void waiting_ends_with_the_deadline_or_the_channel(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_call call = CRPC_INIT;
        fleet_result r;
        dyn_Num in = net_num(4);
        fleet f;
        memset(&f, 0, sizeof f);
        f.channel = net_channel("tcp://127.0.0.1:1", "?wait=1&timeout_ms=20000",
                                CRPC_POLLER_DEFAULT, NULL, NULL);
        call.policy.timeout_ms = 30;
        r = fleet_call(&f, form, false, 4, &call);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(r.error.sent, CRPC_SENT_NO);
        push_list(f.channel, NULL);
        r = fleet_call(&f, form, false, 4, &call);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_non_null(strstr(r.error.text, "while waiting for a provider (local)"));
        assert_int_equal(r.error.sent, CRPC_SENT_NO);
        assert_false(is_waiting(f.channel));
        memset(&r, 0, sizeof r);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &in, fleet_done, &r, NULL), CRPC_OK);
        assert_true(is_waiting(f.channel));
        crpc_channel_close(f.channel);
        assert_int_equal(r.status, CRPC_ECANCELED);
        f.channel = net_channel("tcp://127.0.0.1:1", NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
        push_list(f.channel, NULL);
        r = fleet_call(&f, form, false, 4, NULL); /* without wait=1 */
        assert_int_equal(r.status, CRPC_ENOPROVIDER);
        crpc_channel_close(f.channel);
    }
}

static void an_error_tells_why_there_was_no_retry(void **state)
{
    fleet f;
    fleet_result r;
    (void)state;
    memset(&f, 0, sizeof f);
    f.channel = net_channel("tcp://127.0.0.1:1", "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL,
                            NULL);
    r = fleet_call(&f, FORM_SYNC, false, 4, NULL);
    assert_int_equal(r.status, CRPC_ECONN);
    assert_non_null(strstr(r.error.text, "; no other provider to try (local)"));
    crpc_channel_close(f.channel);
    f.channel = net_channel("tcp://127.0.0.1:1", "?timeout_ms=20000&retries=-1",
                            CRPC_POLLER_DEFAULT, NULL, NULL);
    r = fleet_call(&f, FORM_SYNC, false, 4, NULL); /* none was asked for */
    assert_null(strstr(r.error.text, "no other provider"));
    crpc_channel_close(f.channel);
}

/* lb=hash refuses a call without a key. A hash_field of value 0 is not encoded, but is a key. */
static void consistent_hash_needs_a_key(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_call call = CRPC_INIT;
        fleet_result r;
        int64_t first;
        int i;
        fleet f;
        fleet_open(&f, 4, "?lb=hash&timeout_ms=20000", NULL);
        r = fleet_call(&f, form, false, 4, NULL);
        assert_int_equal(r.status, CRPC_EINVAL);
        assert_non_null(strstr(r.error.text,
                               "lb=hash needs a key: set crpc_call.key or hash_field"));
        assert_int_equal(fleet_calls(&f), 0);
        call.key = crpc_view_str("");
        assert_int_equal(fleet_call(&f, form, false, 4, &call).status, CRPC_OK);
        fleet_close(&f);
        fleet_open(&f, 4, "?lb=hash&hash_field=1&timeout_ms=20000", NULL);
        r = fleet_call(&f, form, false, 0, NULL);
        assert_int_equal(r.status, CRPC_OK);
        first = r.out.ms;
        for (i = 0; i < 10; i++)
            assert_int_equal(fleet_call(&f, form, false, 0, NULL).out.ms, first);
        fleet_close(&f);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_call_waits_for_its_provider_to_start),
        CT_TEST(a_call_that_has_waited_is_still_retried),
        CT_TEST(a_waiting_call_outlasts_its_backup_request),
        CT_TEST(a_waiting_call_returns_to_where_its_backup_failed),
        CT_TEST(a_call_waits_for_a_list),
        CT_TEST(waiting_ends_with_the_deadline_or_the_channel),
        CT_TEST(an_error_tells_why_there_was_no_retry),
        CT_TEST(consistent_hash_needs_a_key),
        CT_TEST(a_refused_connection_does_not_wait_for_the_deadline),
        CT_TEST(a_silent_peer_costs_the_deadline),
        CT_TEST(half_a_reply_costs_the_deadline),
        CT_TEST(half_a_reply_ends_the_connection),
        CT_TEST(a_reply_that_is_cut_is_a_lost_connection),
        CT_TEST(a_peer_that_reads_nothing_costs_the_deadline),
        CT_TEST(connecting_costs_the_deadline_or_connect_timeout_ms),
        CT_TEST(retries_do_not_outlast_the_deadline),
        CT_TEST(each_provider_is_tried_once),
        CT_TEST(many_deadlines_at_once),
        CT_TEST(a_passed_deadline_sends_nothing),
        CT_TEST(an_unsent_request_is_tried_elsewhere),
        CT_TEST(a_refused_request_is_tried_elsewhere),
        CT_TEST(a_lost_request_is_tried_elsewhere_only_if_it_may_run_twice),
        CT_TEST(with_retry_lost_every_lost_request_is_tried_elsewhere),
        CT_TEST(an_unanswered_request_is_not_tried_elsewhere),
        CT_TEST(when_all_servers_are_stopping_the_error_is_elogoff),
        CT_TEST(a_lost_reply_is_executed_once),
        CT_TEST(every_call_ends_once_whatever_the_peer_does),
        CT_TEST(threads_share_a_loop_through_faults),
        CT_TEST(failfast_tries_once),
        CT_TEST(failover_finds_the_provider_that_is_left),
        CT_TEST(a_request_with_an_id_goes_to_no_other_provider),
        CT_TEST(a_cancelled_call_is_not_a_slow_one),
        CT_TEST(a_dead_fleet_is_not_stormed),
        CT_TEST(a_request_with_an_id_is_sent_again_to_its_provider),
        CT_TEST(a_calls_own_id_and_key_are_sent),
        CT_TEST(every_call_has_an_id_of_its_own),
        CT_TEST(a_request_without_an_id_is_not_sent_again),
    };
    return CT_RUN(tests);
}
