/* The connection to one provider: sharing, dialling, backoff, the queue, slots, whose reply it
 * is. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

/* A script: reads nothing until user is set, then answers as a good peer does. The attachment of
 * the first request must arrive whole. */
static bool peer_late_reader(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    if (!CT_WAIT(__atomic_load_n((int *)p->user, __ATOMIC_SEQ_CST), NET_PATIENCE))
        return true;
    if (peer_receive(p, fd, &m) == 1) {
        size_t size = (size_t)m.attachment_size, i, wrong = 0;
        char *bytes = net_bytes(size);
        for (i = 0; i < size; i++)
            wrong += m.body[m.body_size - size + i] != (unsigned char)bytes[i];
        __atomic_store_n((int *)p->user, wrong ? -1 : 2, __ATOMIC_SEQ_CST);
        free(bytes);
        wire_done(&m);
    }
    return peer_adds(p, fd, number);
}

/* When a deadline passes in the middle of a request, crpc sends the rest of it, because other
 * requests follow on the connection; but it sends a copy, not the caller's memory. */
static void a_request_cut_by_its_deadline_goes_out_whole(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        const size_t size = 12 << 20;
        int go = 0;
        peer late;
        crpc_channel *ch;
        char *bytes = net_bytes(size);
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        peer_open(&late, peer_late_reader, &go);
        ch = net_channel(late.url, "?timeout_ms=20000", p, NULL, NULL);
        call.attachment = crpc_view_of(bytes, size);
        for (call.policy.timeout_ms = 60;; call.policy.timeout_ms *= 2) {
            assert_int_equal(dyn_Echo_Pass(ch, &in, &out, &call), CRPC_ETIMEDOUT);
            if (call.error.sent == CRPC_SENT_MAYBE)
                break;
            assert_true(call.policy.timeout_ms < NET_PATIENCE); /* a slow machine did not even begin */
        }
        memset(bytes, 0, size);
        free(bytes);
        __atomic_store_n(&go, 1, __ATOMIC_SEQ_CST);
        net_check_add(ch, 1);
        assert_int_equal(__atomic_load_n(&go, __ATOMIC_SEQ_CST), 2);
        assert_int_equal(peer_accepted(&late), 1);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&late);
    }
}

/* n of the request says what comes: 1 nothing, but the request is kept; 2 the reply to the kept
 * one, and then this one's; 3 the reply twice; 4 replies with forged ids before the right one. */
static bool peer_forges(peer *p, int fd, int number)
{
    wire_message m;
    int64_t kept = 0;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        int64_t i, other;
        if (m.n == 1)
            kept = m.id;
        if (m.n == 2)
            wire_reply(&w, kept, 666);
        if (m.n == 4) {
            for (i = -3; i < 4; i++) {
                if (i)
                    wire_reply(&w, m.id + i, 666);
                other = m.id ^ (INT64_C(1) << (32 + i + 4));
                wire_reply(&w, other ? other : -1, 666); /* 0 is a one-way call's */
            }
            wire_reply(&w, INT64_MIN, 666);
        }
        if (m.n != 1)
            wire_reply(&w, m.id, m.n);
        if (m.n == 3)
            wire_reply(&w, m.id, 666);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

#define FORGED 14 /* replies with a wrong id for an n of 4 */

/* Calls with this n; the reply must be its own. */
static void check_unfooled(crpc_channel *ch, int64_t n)
{
    dyn_Num in = net_num(n), out = dyn_Num_init_zero;
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, NULL), CRPC_OK);
    assert_int_equal(out.n, n);
}

static void a_late_reply_completes_nothing(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer f;
        crpc_channel *ch;
        crpc_call call = CRPC_INIT;
        peer_open(&f, peer_forges, NULL);
        ch = net_channel(f.url, "?timeout_ms=20000", p, NULL, NULL);
        net_time_out(ch, 1, &call);
        crpc_call_reset(&call);
        check_unfooled(ch, 2);
        assert_int_equal(net_late_replies(ch), 1);
        assert_int_equal(peer_accepted(&f), 1);
        crpc_channel_close(ch);
        peer_close(&f);
    }
}

static void a_doubled_reply_completes_one_call(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer f;
        crpc_channel *ch;
        int i;
        peer_open(&f, peer_forges, NULL);
        ch = net_channel(f.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 20; i++)
            check_unfooled(ch, 3);
        check_unfooled(ch, 5); /* behind the last doubled one */
        assert_int_equal(net_late_replies(ch), 20);
        assert_int_equal(peer_accepted(&f), 1);
        crpc_channel_close(ch);
        peer_close(&f);
    }
}

static void forged_ids_complete_nothing(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer f;
        crpc_channel *ch;
        int i;
        peer_open(&f, peer_forges, NULL);
        ch = net_channel(f.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 20; i++)
            check_unfooled(ch, 4);
        assert_int_equal(net_late_replies(ch), 20 * FORGED);
        assert_int_equal(peer_accepted(&f), 1);
        crpc_channel_close(ch);
        peer_close(&f);
    }
}

/* A reply on one connection does not complete a call that waits on another. */
static bool peer_steals(peer *p, int fd, int number)
{
    peer *other = (peer *)p->user;
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        int other_fd = -1;
        pthread_mutex_lock(&other->lock);
        other_fd = other->fds[0];
        wire_reply(&w, m.id, 666);
        if (other_fd >= 0)
            wire_send(other_fd, w.p, w.n);
        pthread_mutex_unlock(&other->lock);
        wire_free(&w);
        ct_sleep_ms(20);
        wire_reply(&w, m.id, 7);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void a_reply_counts_only_on_its_own_connection(void **state)
{
    peer adds, steals;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *a, *b;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    peer_open(&steals, peer_steals, &adds);
    a = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    b = net_channel(steals.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(dyn_Echo_Add(a, &in, &out, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(b, &in, &out, NULL), CRPC_OK);
    assert_int_equal(out.n, 7);
    assert_int_equal(net_late_replies(a), 1);
    crpc_channel_close(a);
    crpc_channel_close(b);
    crpc_loop_close(l);
    peer_close(&adds);
    peer_close(&steals);
}

/* A peer answers ELOGOFF and keeps its connection open: calls that wait for a slot on that
 * connection move to another provider, too. */
static void logoff_frees_the_slot(void **state)
{
    peer going, good;
    crpc_channel *ch;
    char list[128];
    crpc_id ids[8];
    int i;
    (void)state;
    peer_open(&going, peer_says_logoff, NULL);
    peer_open(&good, peer_adds, NULL);
    snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", going.port, good.port);
    ch = net_channel(list, "?timeout_ms=600000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 8; i++) {
        dyn_Num in = net_num(i);
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    }
    for (i = 0; i < 8; i++) { /* long before the deadline */
        dyn_Num out = dyn_Num_init_zero;
        assert_int_equal(crpc_channel_wait(ch, ids[i], NET_PATIENCE), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, ids[i], &out, NULL), CRPC_OK);
        assert_int_equal(out.n, i + 1);
    }
    crpc_channel_close(ch);
    peer_close(&going);
    peer_close(&good);
}

/* A script: counts in *user the requests that say that their peer is crpc. Hangs up after three. */
static bool peer_counts_marks(peer *p, int fd, int number)
{
    wire_message m;
    int i;
    (void)number;
    for (i = 0; i < 3 && peer_receive(p, fd, &m) == 1; i++) {
        wire w = {NULL, 0, 0};
        if (wire_has_mark(&m, "crpc-peer"))
            __atomic_fetch_add((int *)p->user, i ? 100 : 1, __ATOMIC_SEQ_CST);
        wire_reply(&w, m.id, m.n + 1);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static int peer_open_conns(peer *p)
{
    int i, count = 0;
    pthread_mutex_lock(&p->lock);
    for (i = 0; i < PEER_CONNS; i++)
        count += p->fds[i] >= 0;
    pthread_mutex_unlock(&p->lock);
    return count;
}

/* The first request of each connection says that it comes from crpc, and no other one. The peer
 * closes the idle connection, while nobody drives the loop: the next call, whose method is not
 * idempotent, does not get lost there. */
static void an_idle_connection_is_read_before_it_is_used(void **state)
{
    peer counts;
    crpc_channel *ch;
    int marks = 0, i;
    (void)state;
    peer_open(&counts, peer_counts_marks, &marks);
    ch = net_channel(counts.url, "?timeout_ms=20000&retries=0", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 12; i++) {
        net_check_add(ch, i);
        if (i % 3 == 2) {
            assert_true(CT_WAIT(peer_open_conns(&counts) == 0, NET_PATIENCE));
            ct_sleep_ms(30); /* more than CRPCI_ENDPOINT_IDLE, by any clock */
        }
    }
    assert_int_equal(peer_accepted(&counts), 4);
    assert_int_equal(marks, 4);
    crpc_channel_close(ch);
    peer_close(&counts);
}

static int peer_stops(peer *p)
{
    int stops;
    pthread_mutex_lock(&p->lock);
    stops = p->stopping;
    pthread_mutex_unlock(&p->lock);
    return stops;
}

/* A script: its first connection says farewell on the first request, answers it when another
 * connection has answered one, and expects the end of the client's output. */
static bool peer_says_farewell(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    wire_message m;
    int *orderly = (int *)p->user;
    if (number)
        return peer_adds(p, fd, number);
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_farewell(&w);
    wire_flush(fd, &w);
    if (CT_WAIT(peer_requests(p) == 2 || peer_stops(p), NET_PATIENCE)) {
        wire_reply(&w, m.id, m.n + 1);
        wire_flush(fd, &w);
    }
    wire_done(&m);
    __atomic_store_n(orderly, wire_receive(fd, &m) == 0, __ATOMIC_SEQ_CST);
    return true;
}

static uint32_t leaving(crpc_channel *ch)
{
    crpc_loop *l = crpc_channel_loop(ch);
    uint32_t count;
    crpci_loop_lock(l);
    count = net_endpoint(l, NULL)->leaving;
    crpci_loop_unlock(l);
    return count;
}

/* A server says farewell while a request is in service: the next call goes over a connection of its
 * own, the first one gets its reply, and then the old connection ends in order. */
static void a_farewell_loses_no_call(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer leaves;
        crpc_channel *ch;
        crpc_loop *l = net_loop(p);
        int orderly = 0;
        crpc_id id;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        peer_open(&leaves, peer_says_farewell, &orderly);
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        ch = net_channel(leaves.url, "?timeout_ms=20000&retries=0", p, l, NULL);
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
        assert_true(CT_WAIT(leaving(ch) == 1, NET_PATIENCE));
        net_check_add(ch, 5);
        assert_int_equal(crpc_channel_wait(ch, id, NET_PATIENCE), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 2);
        assert_true(CT_WAIT(__atomic_load_n(&orderly, __ATOMIC_SEQ_CST), NET_PATIENCE));
        assert_true(CT_WAIT(leaving(ch) == 0, NET_PATIENCE));
        assert_int_equal(peer_accepted(&leaves), 2);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&leaves);
    }
}

/* A script: its first connection says farewell at once, with the value at *user, and counts an
 * orderly end in user[1]; the others answer. */
static bool peer_greets_with_farewell(peer *p, int fd, int number)
{
    char *user = (char *)p->user;
    wire w = {NULL, 0, 0};
    wire_message m;
    if (number)
        return peer_adds(p, fd, number);
    wire_farewell(&w);
    w.p[w.n - 1] = (unsigned char)user[0];
    wire_flush(fd, &w);
    if (wire_receive(fd, &m) == 0)
        __atomic_store_n(&user[1], 1, __ATOMIC_SEQ_CST);
    return true;
}

/* A connection over which nothing was sent gets a farewell: the endpoint ends it in order, without
 * an error. If the server stops (1), the endpoint is left alone for a second; if only the
 * connection ends (2), the next call dials at once. */
static void a_fresh_connection_leaves_on_a_farewell(void **state)
{
    static const char values[] = "12";
    crpc_poller p;
    int i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 2; i++)
    {
        peer leaves;
        crpc_channel *ch;
        crpc_loop *l = net_loop(p);
        crpci_endpoint *e;
        char user[2] = {values[i], 0};
        peer_open(&leaves, peer_greets_with_farewell, user);
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        ch = net_channel(leaves.url, "?timeout_ms=20000&retries=0", p, l, NULL);
        crpci_loop_lock(l);
        e = net_endpoint(l, NULL);
        crpci_endpoint_dial(e);
        crpci_loop_unlock(l);
        assert_true(CT_WAIT(__atomic_load_n(&user[1], __ATOMIC_SEQ_CST), NET_PATIENCE));
        assert_true(CT_WAIT(leaving(ch) == 0, NET_PATIENCE));
        crpci_loop_lock(l);
        assert_null(e->conn);
        assert_int_equal(e->usable_at != 0, i == 0);
        e->usable_at = 0;
        crpci_loop_unlock(l);
        net_check_add(ch, 5);
        assert_int_equal(peer_accepted(&leaves), 2);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&leaves);
    }
}

/* Appends what looks like a farewell: a reply with the id -1, of another code or without the mark. */
static void put_false_farewell(wire *w, int i)
{
    if (i % 2)
        wire_error(w, -1, CRPC_ELOGOFF, "bye", 0);
    else
        wire_reply(w, -1, 4711);
}

/* A script: its first connection answers the first request behind false farewells, the second one
 * behind a flood of true and false ones, all in pieces of a few bytes; then it expects the end of
 * the client's output. The other connections answer. */
static bool peer_floods_with_farewells(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    size_t at, piece;
    int round, i;
    if (number)
        return peer_adds(p, fd, number);
    for (round = 0; round < 2; round++) {
        if (peer_receive(p, fd, &m) != 1)
            return true;
        for (i = 0; i < 100; i++) {
            put_false_farewell(&w, i);
            if (round)
                wire_farewell(&w);
            if (round && i % 3)
                w.p[w.n - 1] = (unsigned char)('0' + i % 10);
        }
        wire_reply(&w, m.id, m.n + 1);
        wire_done(&m);
        for (at = 0; at < w.n; at += piece) {
            piece = w.n - at < 7 ? w.n - at : 7;
            if (!wire_send(fd, w.p + at, piece))
                break;
        }
        wire_free(&w);
    }
    __atomic_store_n((int *)p->user, wire_receive(fd, &m) == 0, __ATOMIC_SEQ_CST);
    return true;
}

static void only_a_farewell_ends_a_connection_and_only_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer floods;
        crpc_channel *ch;
        crpc_loop *l = net_loop(p);
        int orderly = 0;
        peer_open(&floods, peer_floods_with_farewells, &orderly);
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        ch = net_channel(floods.url, "?timeout_ms=20000&retries=0", p, l, NULL);
        net_check_add(ch, 1);
        net_check_add(ch, 2);
        assert_true(CT_WAIT(__atomic_load_n(&orderly, __ATOMIC_SEQ_CST), NET_PATIENCE));
        assert_true(CT_WAIT(leaving(ch) == 0, NET_PATIENCE));
        assert_int_equal(peer_accepted(&floods), 1);
        net_check_add(ch, 3);
        assert_int_equal(peer_accepted(&floods), 2);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&floods);
    }
}

/* A script: each connection says at once that it ends, takes one request and hangs up. */
static bool peer_always_leaves(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    (void)number;
    wire_farewell(&w);
    w.p[w.n - 1] = '2';
    wire_flush(fd, &w);
    return peer_hangs_up(p, fd, number);
}

/* A server that takes leave of each connection is dialled no more often than calls try it. */
static void a_server_that_always_leaves_is_not_dialled_on_and_on(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer leaves;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_id ids[20];
        int i;
        memset(&leaves, 0, sizeof leaves);
        leaves.sequential = true;
        peer_open_on(&leaves, 0, peer_always_leaves, NULL);
        ch = net_channel(leaves.url, "?timeout_ms=2000&retries=0&inflight=1", p, NULL, NULL);
        for (i = 0; i < 20; i++)
            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
        for (i = 0; i < 20; i++) {
            assert_int_equal(crpc_channel_wait(ch, ids[i], NET_PATIENCE), CRPC_OK);
            assert_int_not_equal(dyn_Echo_Add_fetch(ch, ids[i], &out, NULL), CRPC_OK);
        }
        assert_in_range(peer_accepted(&leaves), 1, 21);
        crpc_channel_close(ch);
        peer_close(&leaves);
    }
}

/* A script: its first connection says farewell when the first bytes of a large request have come,
 * then takes the rest and answers. */
static bool peer_leaves_in_the_middle(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    wire_message m;
    struct pollfd wait = {0, POLLIN, 0};
    if (number)
        return peer_adds(p, fd, number);
    wait.fd = fd;
    poll(&wait, 1, NET_PATIENCE);
    wire_farewell(&w);
    wire_flush(fd, &w);
    CT_WAIT(peer_requests(p) == 1 || peer_stops(p), NET_PATIENCE); /* on another connection */
    if (peer_receive(p, fd, &m) != 1)
        return true;
    *(size_t *)p->user = m.body_size;
    wire_error(&w, m.id, 5007, "read it", 1);
    wire_done(&m);
    wire_flush(fd, &w);
    wire_receive(fd, &m);
    return true;
}

/* What was sent in part goes on over the connection that leaves; what was not goes over another. */
static void a_request_sent_in_part_is_finished_after_a_farewell(void **state)
{
    enum { SIZE = 8 << 20 };
    peer leaves;
    crpc_channel *ch;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    char *bytes = net_bytes(SIZE);
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    dyn_Num small = net_num(5), sum = dyn_Num_init_zero;
    size_t received = 0;
    crpc_call call = CRPC_INIT;
    crpc_id large, other;
    (void)state;
    peer_open(&leaves, peer_leaves_in_the_middle, &received);
    assert_int_equal(crpc_loop_start(l), CRPC_OK);
    ch = net_channel(leaves.url, "?timeout_ms=20000&retries=0", CRPC_POLLER_DEFAULT, l, NULL);
    in.data = crpc_view_of(bytes, SIZE);
    assert_int_equal(dyn_Echo_Pass_begin(ch, &in, &large, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &small, &other, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_wait(ch, other, NET_PATIENCE), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_fetch(ch, other, &sum, NULL), CRPC_OK);
    assert_int_equal(sum.n, 6);
    assert_int_equal(crpc_channel_wait(ch, large, NET_PATIENCE), CRPC_OK);
    assert_int_equal(dyn_Echo_Pass_fetch(ch, large, &out, &call), CRPC_EAPP);
    assert_int_equal(call.error.app_code, 5007);
    crpc_call_reset(&call);
    assert_in_range(received, SIZE, SIZE + 100);
    assert_true(CT_WAIT(leaving(ch) == 0, NET_PATIENCE));
    assert_int_equal(peer_accepted(&leaves), 2);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&leaves);
    free(bytes);
}

/* The channel is closed while a connection whose server said farewell awaits its last reply. */
static void closing_a_channel_closes_connections_that_leave(void **state)
{
    peer leaves;
    crpc_channel *ch;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    int orderly = 0;
    crpc_id id;
    dyn_Num in = net_num(1);
    crpc_loop_stats stats;
    (void)state;
    peer_open(&leaves, peer_says_farewell, &orderly);
    assert_int_equal(crpc_loop_start(l), CRPC_OK);
    ch = net_channel(leaves.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
    assert_true(CT_WAIT(leaving(ch) == 1, NET_PATIENCE));
    crpc_channel_close(ch);
    crpc_loop_stats_get(l, &stats);
    assert_int_equal(stats.connections, 0);
    crpc_loop_close(l);
    peer_close(&leaves);
}

/* The peer still works on a cancelled call: with inflight=1 its slot stays taken. */
static void cancelling_does_not_free_the_peer(void **state)
{
    peer silent;
    crpc_channel *ch;
    crpc_id first, second;
    dyn_Num in = net_num(1);
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=600000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &first, NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 1, NET_PATIENCE));
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &second, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(ch, first), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 2, NET_PATIENCE));
    assert_int_equal(peer_accepted(&silent), 2); /* on a connection of its own */
    crpc_channel_close(ch);
    peer_close(&silent);
}

/* One thread's loop, so that nothing is sent between the calls. */
static void the_send_queue_has_a_limit(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer deaf;
        crpc_channel *ch;
        crpc_loop *l = net_loop(p);
        char *bytes = net_bytes(100000);
        dyn_Blob in = dyn_Blob_init_zero;
        crpc_loop_stats stats;
        done_log d;
        uint64_t memory = 0;
        int i, code, accepted = 0;
        peer_open(&deaf, peer_deaf, NULL);
        ch = net_channel(deaf.url, "?timeout_ms=60000&max_queued=1000000&retries=0", p, l, NULL);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        done_init(&d);
        in.data = crpc_view_of(bytes, 100000);
        for (i = 0; i < 2000; i++) { /* 200 MB offered */
            code = dyn_Echo_Pass_async(ch, &in, done_blob, &d, NULL);
            assert_int_equal(code, CRPC_OK);
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            if (i == 200) {
                crpc_loop_stats_get(l, &stats);
                memory = stats.memory;
            }
        }
        accepted = 2000 - done_count(&d);
        assert_int_equal(d.status, CRPC_EOVERCROWDED);
        assert_true(accepted >= 9 && accepted < 300); /* ten, and what the kernel took */
        crpc_loop_stats_get(l, &stats);
        assert_true(stats.memory <= memory + 200000);
        assert_true(stats.memory_peak < 64u << 20);
        crpc_channel_close(ch);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(done_count(&d), 2000);
        crpc_loop_close(l);
        peer_close(&deaf);
        free(bytes);
    }
}

/* The cap is exact: what fits is queued, one byte more is not. */
static void the_limit_of_the_queue_is_exact(void **state)
{
    net n;
    char *bytes = net_bytes(20000);
    int size, refused = 0;
    (void)state;
    memset(&n, 0, sizeof n);
    n.query = "?max_queued=20000&retries=0";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    /* the first size that is refused is the cap less what header and meta take: below 200 bytes */
    for (size = 20000 - 200; size <= 20000 && !refused; size++) {
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        int status;
        in.data = crpc_view_of(bytes, (size_t)size);
        status = dyn_Echo_Pass(n.channel, &in, &out, &call);
        assert_true(status == CRPC_OK || status == CRPC_EOVERCROWDED);
        refused = status == CRPC_EOVERCROWDED;
        crpc_call_reset(&call);
    }
    assert_true(refused);
    assert_true(size > 20000 - 150 && size < 20000 - 30);
    net_close(&n);
    free(bytes);
}

/* A script: a peer that cannot pipeline. A second request before the reply counts as 100000. */
static bool peer_one_at_a_time(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        struct pollfd more = {0, POLLIN, 0};
        more.fd = fd;
        if (poll(&more, 1, 2) != 0 && recv(fd, &w, 1, MSG_PEEK) > 0) {
            pthread_mutex_lock(&p->lock);
            p->requests += 100000;
            pthread_mutex_unlock(&p->lock);
            wire_done(&m);
            return true;
        }
        if (m.n != 13) { /* never answered */
            wire_reply(&w, m.id, m.n + 1);
            wire_send(fd, w.p, w.n);
        }
        wire_free(&w);
        wire_done(&m);
    }
    return true;
}

static void one_at_a_time_for_peers_that_cannot_pipeline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer one;
        crpc_channel *ch;
        done_log d;
        dyn_Num in = net_num(1);
        int i;
        peer_open(&one, peer_one_at_a_time, NULL);
        ch = net_channel(one.url, "?timeout_ms=20000&inflight=1", p, NULL, NULL);
        done_init(&d);
        for (i = 0; i < 40; i++)
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
        net_check_add(ch, 5);
        assert_true(CT_WAIT(done_count(&d) == 40, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_OK);
        assert_int_equal(peer_requests(&one), 41);
        assert_int_equal(peer_accepted(&one), 1);
        crpc_channel_close(ch);
        peer_close(&one);
    }
}

/* The late reply of such a peer must not be taken for the next call's. */
static void a_timeout_closes_the_connection_of_such_a_peer(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer one;
        crpc_channel *ch;
        done_log d;
        dyn_Num in = net_num(13); /* is never answered */
        crpc_call call = CRPC_INIT;
        peer_open(&one, peer_one_at_a_time, NULL);
        ch = net_channel(one.url, "?timeout_ms=20000&inflight=1", p, NULL, NULL);
        net_check_add(ch, 5);
        net_time_out(ch, in.n, &call);
        net_check_add(ch, 6);
        assert_int_equal(peer_accepted(&one), 2);
        do {
            done_init(&d);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, &call), CRPC_OK);
            assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
            assert_int_equal(d.status, CRPC_ETIMEDOUT);
        } while (d.error.sent == CRPC_SENT_NO);
        net_check_add(ch, 6);
        assert_int_equal(peer_accepted(&one), 3);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&one);
    }
}

/* A script: keeps requests whose n is 13, and answers them before one whose n is 7. */
static bool peer_keeps(peer *p, int fd, int number)
{
    int64_t kept[8];
    int count = 0, i;
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        if (m.n == 13 && count < 8)
            kept[count++] = m.id;
        for (i = 0; m.n == 7 && i < count; i++)
            wire_reply(&w, kept[i], 14);
        if (m.n != 13)
            wire_reply(&w, m.id, m.n + 1);
        count = m.n == 7 ? 0 : count;
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

/* A call that ends early keeps its slot until the late reply comes, and its neighbours their
 * connection. When all slots are taken so, the connection is given up. */
static void a_cancelled_call_leaves_its_neighbours_alone(void **state)
{
    enum { SLOTS = 3 };
    peer keeps;
    crpc_channel *ch;
    crpc_id ids[SLOTS];
    dyn_Num in = net_num(13), out = dyn_Num_init_zero;
    int i;
    (void)state;
    peer_open(&keeps, peer_keeps, NULL);
    ch = net_channel(keeps.url, "?timeout_ms=20000&inflight=3", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 2; i++)
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&keeps) == 2, NET_PATIENCE));
    assert_int_equal(crpc_channel_cancel(ch, ids[0]), CRPC_OK);
    net_check_add(ch, 1); /* by the third slot */
    net_check_add(ch, 7);
    assert_int_equal(crpc_channel_wait(ch, ids[1], NET_PATIENCE), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_fetch(ch, ids[1], &out, NULL), CRPC_OK);
    assert_int_equal(out.n, 14);
    assert_int_equal(net_late_replies(ch), 1);
    for (i = 0; i < SLOTS; i++) /* all slots are free again */
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&keeps) == 4 + SLOTS, NET_PATIENCE));
    assert_int_equal(peer_accepted(&keeps), 1);
    for (i = 0; i < SLOTS; i++)
        assert_int_equal(crpc_channel_cancel(ch, ids[i]), CRPC_OK);
    net_check_add(ch, 7);
    assert_int_equal(peer_accepted(&keeps), 2);
    assert_int_equal(net_late_replies(ch), 1);
    crpc_channel_close(ch);
    peer_close(&keeps);
}

/* A call that waits for a slot is not sent, and its error says so. */
static void what_waits_for_a_slot_is_not_sent(void **state)
{
    peer silent;
    crpc_channel *ch;
    done_log first;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=20000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    done_init(&first);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &first, NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 1, NET_PATIENCE));
    call.policy.timeout_ms = 50;
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
    assert_int_equal(call.error.sent, CRPC_SENT_NO);
    assert_non_null(strstr(call.error.text, "waiting for a connection (local)"));
    crpc_channel_close(ch);
    assert_int_equal(done_count(&first), 1);
    assert_int_equal(first.status, CRPC_ECANCELED);
    assert_int_equal(peer_requests(&silent), 1);
    crpc_call_reset(&call);
    peer_close(&silent);
}

/* The end of one call lets the next one onto the connection. A channel that closes walks over its
 * calls and ends each; that walk must survive it. */
static void closing_with_calls_that_wait_for_a_slot(void **state)
{
    peer silent;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *ch;
    char *bytes = net_bytes(9000);
    dyn_Num in = net_num(1);
    dyn_Blob blob = dyn_Blob_init_zero;
    done_log d;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=60000&inflight=1&max_queued=5000&retries=0",
                     CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    done_init(&d);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
    for (i = 0; i < 1000 && !peer_requests(&silent); i++)
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
    blob.data = crpc_view_of(bytes, 9000);
    for (i = 0; i < 5; i++)
        assert_int_equal(dyn_Echo_Pass_notify(ch, &blob, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(done_count(&d), 2);
    crpc_loop_close(l);
    assert_int_equal(peer_requests(&silent), 1);
    peer_close(&silent);
    free(bytes);
}

/* The connection closes with the call that has its only slot; nobody is left for whom to dial. */
static void closing_with_waiting_calls_dials_for_nobody(void **state)
{
    peer keeps;
    crpc_channel *ch;
    crpc_id ids[4];
    dyn_Num in = net_num(13);
    int i, fd;
    (void)state;
    peer_open(&keeps, peer_keeps, NULL);
    ch = net_channel(keeps.url, "?timeout_ms=60000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    net_check_add(ch, 1); /* no backoff holds up a dial */
    for (i = 0; i < 4; i++)
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&keeps) == 2, NET_PATIENCE));
    crpc_channel_close(ch);
    fd = wire_connect(keeps.url); /* the peer accepts this one behind all others */
    net_send(fd, "Add", 1, "", 0, NULL);
    assert_true(CT_WAIT(peer_requests(&keeps) == 3, NET_PATIENCE));
    assert_int_equal(peer_accepted(&keeps), 2);
    close(fd);
    peer_close(&keeps);
}

/* A script: answers one request, then closes the idle connection, or resets it if user is set. */
static bool peer_answers_once(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)number;
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, m.n + 1);
    wire_done(&m);
    wire_flush(fd, &w);
    ct_sleep_ms(5);
    pthread_mutex_lock(&p->lock);
    if (p->user)
        wire_reset(fd);
    else
        close(fd);
    pthread_mutex_unlock(&p->lock);
    return false;
}

static bool peer_has_ended(peer *p, int number)
{
    bool ended;
    pthread_mutex_lock(&p->lock);
    ended = p->accepted > number && p->fds[number] < 0;
    pthread_mutex_unlock(&p->lock);
    return ended;
}

static uint32_t connections(crpc_loop *l)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(l, &stats);
    return stats.connections;
}

/* A peer that takes a one-way call and closes the connection when it is idle has not failed: the
 * next call dials again at once. The time stands, so that no backoff would end. */
static void one_way_calls_prove_a_connection(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    peer takes;
    crpc_loop *l;
    crpc_channel *ch;
    dyn_Num in = net_num(1);
    int64_t end = ct_now_ms() + NET_PATIENCE;
    int i;
    (void)state;
    net_time_begin(NET_TIME_STANDS);
    o.hooks.clock_us = net_clock_us;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    peer_open(&takes, peer_hangs_up, NULL);
    ch = net_channel(takes.url, NULL, CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    for (i = 1; i <= 20; i++) {
        assert_int_equal(dyn_Echo_Add_notify(ch, &in, NULL), CRPC_OK);
        while ((peer_requests(&takes) < i || connections(l)) && ct_now_ms() < end)
            assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
        assert_int_equal(peer_requests(&takes), i);
    }
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&takes);
}

static void an_idle_connection_that_ended_is_dialled_again(void **state)
{
    crpc_poller p;
    int threaded, reset, i;
    (void)state;
    NET_EACH_POLLER(p)
    for (threaded = 0; threaded < 2; threaded++)
        for (reset = 0; reset < 2; reset++) {
            peer once;
            crpc_channel *ch;
            peer_open(&once, peer_answers_once, reset ? &once : NULL);
            ch = net_channel(once.url, "?timeout_ms=20000", p, NULL, NULL);
            if (threaded)
                assert_int_equal(crpc_loop_start(crpc_channel_loop(ch)), CRPC_OK);
            for (i = 0; i < 15; i++) {
                net_check_add(ch, i);
                assert_true(CT_WAIT(peer_has_ended(&once, i), NET_PATIENCE));
                if (threaded)
                    assert_true(CT_WAIT(connections(crpc_channel_loop(ch)) == 0, NET_PATIENCE));
                else
                    ct_sleep_ms(12);
            }
            assert_int_equal(peer_accepted(&once), 15);
            crpc_channel_close(ch);
            peer_close(&once);
        }
}

static void a_server_that_comes_back_is_found_again(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n, again;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        char url[160];
        int i;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = -1;
        net_open(&n, p, NET_THREAD);
        strcpy(url, n.url);
        ch = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
        net_check_add(ch, 1);
        net_close(&n);
        ct_sleep_ms(20);
        call.policy.timeout_ms = 2000;
        for (i = 0; i < 3; i++) {
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
            assert_int_equal(call.error.sent, CRPC_SENT_NO);
        }
        memset(&again, 0, sizeof again);
        again.listen = url; /* the same port, at once */
        net_open(&again, p, NET_THREAD);
        net_check_add(ch, 2);
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        net_close(&again);
    }
}

/* Two channels to one address on one loop share a connection, unless options of the connection
 * differ. */
static void channels_of_a_loop_share_connections(void **state)
{
    peer adds;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *a, *b, *c;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    a = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    b = net_channel(adds.url, "?timeout_ms=10000", CRPC_POLLER_DEFAULT, l, NULL);
    c = net_channel(adds.url, "?timeout_ms=20000&inflight=1", CRPC_POLLER_DEFAULT, l, NULL);
    net_check_add(a, 1);
    net_check_add(b, 1);
    assert_int_equal(peer_accepted(&adds), 1);
    net_check_add(c, 1);
    assert_int_equal(peer_accepted(&adds), 2);
    crpc_channel_close(a);
    net_check_add(b, 1);
    crpc_channel_close(b);
    net_check_add(c, 1);
    crpc_channel_close(c);
    assert_int_equal(peer_accepted(&adds), 2);
    crpc_loop_close(l);
    peer_close(&adds);
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
    assert_int_equal(l->endpoint_count, 2);
    assert_int_equal(net_endpoint(l, "127.0.0.1:9")->users, 2);
    assert_int_equal(crpc_channel_open(&c, "tcp://127.0.0.1:9?inflight=1", &o, NULL), CRPC_OK);
    assert_int_equal(l->endpoint_count, 3);
    crpc_channel_close(a);
    assert_int_equal(l->endpoint_count, 3);
    crpc_channel_close(b);
    assert_int_equal(l->endpoint_count, 1);
    crpc_channel_close(c);
    assert_int_equal(l->endpoint_count, 0);
    crpc_loop_close(l);
}

/* Chains of endpoints grow with their number, keep finding the same, and go with the last one. */
static void thousands_are_found_again(void **state)
{
    enum { COUNT = 5000 };
    static const crpci_endpoint_events events = {0};
    crpci_endpoint **all = (crpci_endpoint **)calloc(COUNT, sizeof *all), *same;
    crpci_endpoint_options eo;
    crpc_loop_options lo = CRPC_INIT;
    char address[32];
    size_t i, longest = 0;
    crpc_loop *l;
    (void)state;
    assert_non_null(all);
    memset(&eo, 0, sizeof eo);
    lo.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    crpci_loop_lock(l);
    for (i = 0; i < COUNT; i++) {
        snprintf(address, sizeof address, "10.0.%d.%d:80", (int)i / 250, (int)i % 250);
        assert_int_equal(crpci_endpoint_get(l, address, &eo, &events, &all[i]), CRPC_OK);
    }
    for (i = 0; i < l->endpoint_room; i++) {
        size_t n = 0;
        for (same = l->endpoints[i]; same; same = same->next)
            n++;
        longest = n > longest ? n : longest;
    }
    assert_true(longest < 20); /* 5000 before there were chains */
    for (i = 0; i < COUNT; i++) {
        snprintf(address, sizeof address, "10.0.%d.%d:80", (int)i / 250, (int)i % 250);
        assert_int_equal(crpci_endpoint_get(l, address, &eo, &events, &same), CRPC_OK);
        assert_ptr_equal(same, all[i]);
        crpci_endpoint_leave(same);
    }
    for (i = 0; i < COUNT; i++)
        crpci_endpoint_leave(all[i * 7 % COUNT]);
    assert_null(l->endpoints);
    assert_int_equal(l->endpoint_count, 0);
    crpci_loop_unlock(l);
    crpc_loop_close(l);
    free(all);
}

/* The window of the backoff doubles up to its limit, and the wait is anywhere in it. */
static void it_backs_off_with_full_jitter(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_endpoint *e;
    int64_t window = CRPCI_ENDPOINT_BACKOFF_MIN;
    int failures, i;
    (void)state;
    lo.hooks = ct_hooks();
    lo.hooks.clock_us = net_clock_us;
    net_time_begin(NET_TIME_STANDS);
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    e = net_endpoint(l, NULL);
    for (failures = 0; failures < 12; failures++) {
        int64_t longest = 0, shortest = INT64_MAX;
        for (i = 0; i < 1000; i++) {
            int64_t wait;
            e->failures = failures;
            crpci_endpoint_back_off(e);
            assert_int_equal(e->failures, failures + 1);
            wait = e->usable_at - net_clock_us(NULL);
            assert_in_range(wait, 0, window - 1);
            longest = wait > longest ? wait : longest;
            shortest = wait < shortest ? wait : shortest;
        }
        assert_true(longest > window * 9 / 10);
        assert_true(shortest < window / 10);
        window = crpci_base_min64(window * 2, CRPCI_ENDPOINT_BACKOFF_MAX);
    }
    crpc_channel_close(ch);
    crpc_loop_close(l);
}

/* A script: reads a little, waits until user holds an id, answers with that id, and reads no
 * more. */
static bool peer_answers_early(peer *p, int fd, int number)
{
    crpc_id *id = (crpc_id *)p->user;
    wire w = {NULL, 0, 0};
    char some[100];
    uint64_t told = 0;
    (void)number;
    if (recv(fd, some, sizeof some, 0) <= 0)
        return true;
    pthread_mutex_lock(&p->lock);
    p->requests++;
    pthread_mutex_unlock(&p->lock);
    while (!told) {
        ct_sleep_ms(1);
        pthread_mutex_lock(&p->lock);
        told = id->value;
        pthread_mutex_unlock(&p->lock);
    }
    wire_reply(&w, (int64_t)told, 7);
    wire_flush(fd, &w);
    return peer_deaf(p, fd, number);
}

/* A provider that is no longer listed answers its last request before that is sent completely. */
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
    assert_int_equal(crpci_opening_on_list(ch, list), CRPC_OK);
    crpci_directory_snapshot_unref(list);
    pthread_mutex_lock(&p.lock);
    told = id;
    pthread_mutex_unlock(&p.lock);
    assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), CRPC_OK);
    assert_int_equal(out.n, 7);
    crpc_call_reset(&call);
    crpc_channel_close(ch); /* nothing is left: CT_TEST */
    peer_close(&p);
}

/* While the registry is away, its last list is stale: after stale_ttl_ms a provider on it that
 * cannot be reached is dialled once a minute only, until a fresh list comes. */
static void an_aged_provider_is_dialled_rarely(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpci_snapshot *list;
    crpci_endpoint *e;
    fleet f;
    int64_t now, start;
    int i, dials = 0;
    (void)state;
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.clock_us = net_clock_us;
    net_time_begin(NET_TIME_STANDS);
    start = net_clock_us(NULL);
    memset(&f, 0, sizeof f);
    assert_int_equal(
        crpc_channel_open(&f.channel, "tcp://127.0.0.1:9?stale_ttl_ms=30000&retries=-1", &o, NULL),
        CRPC_OK);
    e = net_endpoint(f.channel->loop, NULL);
    list = crpci_directory_snapshot(f.channel->loop->heap, 1);
    assert_non_null(list);
    strcpy(list->providers[0].address, "127.0.0.1:9");
    list->providers[0].weight = 100;
    list->stale = true;
    assert_int_equal(crpci_opening_on_list(f.channel, list), CRPC_OK);
    for (i = 0; i < 400; i++) { /* ten minutes, a call each 1.5 s */
        now = e->dialled_at;
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_ECONN);
        if (net_clock_us(NULL) > start + 30000000)
            dials += e->dialled_at != now;
        net_time_add(1500);
    }
    assert_in_range(dials, 8, 10);
    list->stale = false;
    assert_int_equal(crpci_opening_on_list(f.channel, list), CRPC_OK);
    for (i = 0, dials = 0; i < 20; i++) {
        now = e->dialled_at;
        e->usable_at = 0;
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_ECONN);
        dials += e->dialled_at != now;
        net_time_add(1500);
    }
    assert_int_equal(dials, 20);
    crpci_directory_snapshot_unref(list);
    crpc_channel_close(f.channel);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_request_cut_by_its_deadline_goes_out_whole),
        CT_TEST(a_late_reply_completes_nothing),
        CT_TEST(a_doubled_reply_completes_one_call),
        CT_TEST(forged_ids_complete_nothing),
        CT_TEST(a_reply_counts_only_on_its_own_connection),
        CT_TEST(logoff_frees_the_slot),
        CT_TEST(cancelling_does_not_free_the_peer),
        CT_TEST(the_send_queue_has_a_limit),
        CT_TEST(the_limit_of_the_queue_is_exact),
        CT_TEST(one_at_a_time_for_peers_that_cannot_pipeline),
        CT_TEST(a_timeout_closes_the_connection_of_such_a_peer),
        CT_TEST(a_cancelled_call_leaves_its_neighbours_alone),
        CT_TEST(what_waits_for_a_slot_is_not_sent),
        CT_TEST(closing_with_calls_that_wait_for_a_slot),
        CT_TEST(closing_with_waiting_calls_dials_for_nobody),
        CT_TEST(one_way_calls_prove_a_connection),
        CT_TEST(an_idle_connection_that_ended_is_dialled_again),
        CT_TEST(a_server_that_comes_back_is_found_again),
        CT_TEST(channels_of_a_loop_share_connections),
        CT_TEST(thousands_are_found_again),
        CT_TEST(it_is_shared_by_channels_that_ask_for_the_same),
        CT_TEST(an_idle_connection_is_read_before_it_is_used),
        CT_TEST(a_farewell_loses_no_call),
        CT_TEST(a_fresh_connection_leaves_on_a_farewell),
        CT_TEST(only_a_farewell_ends_a_connection_and_only_once),
        CT_TEST(a_server_that_always_leaves_is_not_dialled_on_and_on),
        CT_TEST(a_request_sent_in_part_is_finished_after_a_farewell),
        CT_TEST(closing_a_channel_closes_connections_that_leave),
        CT_TEST(it_backs_off_with_full_jitter),
        CT_TEST(a_removed_provider_answers_early),
        CT_TEST(an_aged_provider_is_dialled_rarely),
    };
    return CT_RUN(tests);
}
