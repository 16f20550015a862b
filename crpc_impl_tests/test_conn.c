/* Sending, ends, time limits, and transports that are more than a socket. */
#define CRPC_IMPLEMENTATION
#define CRPCI_CONN_TRANSPORTS 1
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_pump.h"

/* With buffers of a few kilobytes nothing goes out at once. */
static void small_socket_buffers(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_loop *l;
        crpc_server *s;
        crpc_server_options o;
        crpc_channel *ch;
        crpc_error error;
        net_service service;
        struct sockaddr_in a;
        int listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), small = 4096;
        char url[160], *bytes = net_bytes(1 << 20);
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        int i;
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        setsockopt(listen_fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
        setsockopt(listen_fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        assert_int_equal(bind(listen_fd, (struct sockaddr *)&a, sizeof a), 0);
        assert_int_equal(listen(listen_fd, 10), 0);
        memset(&o, 0, sizeof o);
        l = net_loop(p);
        o.loop = l;
        o.loops = net_loop_options(p);
        o.io_threads = m == NET_IO ? 2 : 0;
        o.workers = m == NET_WORKERS ? 2 : 0;
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        assert_int_equal(crpc_server_listen_fd(s, listen_fd), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_start(s, &error), CRPC_OK);
        assert_int_equal(crpc_loop_start(l), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        ch = net_channel(url, "?timeout_ms=60000", p, m == NET_SHARED ? l : NULL, NULL);
        for (i = 0; i < 2; i++) {
            in.data = crpc_view_of(bytes, 300000);
            call.attachment = crpc_view_of(bytes + 300000, (1 << 20) - 300000);
            if (dyn_Echo_Pass(ch, &in, &out, &call))
                fail_msg("%s", call.error.text);
            assert_int_equal(crpc_view_size(out.data), 300000);
            assert_memory_equal(crpc_view_data(out.data), bytes, 300000);
            assert_int_equal(crpc_view_size(call.reply_attachment), (1 << 20) - 300000);
            assert_memory_equal(crpc_view_data(call.reply_attachment), bytes + 300000,
                                (1 << 20) - 300000);
        }
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        crpc_server_close(s);
        crpc_loop_close(l);
        free(bytes);
    }
}

/* A peer that asks and does not read: reading from it pauses, memory stays flat, and when it reads,
 * everything goes on, in order. `method` may be one that there is not: refusals pile up as well. */
static void check_slow_reader(crpc_poller p, const char *method, size_t size)
{
    crpc_server_options o;
    pump u;
    wire_request_options ro;
    static char chunk[200000];
    wire w = {NULL, 0, 0}, in = {NULL, 0, 0};
    char *bytes = net_bytes(size);
    int fd, flags, i, idle = 0, asked = 0, answered = 0, other, small = 65536;
    size_t sent = 0;
    uint64_t memory;
    memset(&o, 0, sizeof o);
    o.limits.max_queued = 1 << 20;
    pump_open(&u, p, WAY_TCP, &o);
    fd = pump_connect(&u, WAY_TCP);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    memset(&ro, 0, sizeof ro);
    ro.attachment = (int64_t)size;
    /* one frame after another until the server takes no more: idle steps in a row tell */
    while (idle < 200 && asked < 3000000) {
        ssize_t n;
        if (sent == w.n) {
            w.n = sent = 0;
            wire_request_body(&w, "dyn.Echo", method, ++asked, bytes, size, &ro);
            for (i = 0; size < 1000 && i < 500; i++)
                wire_request_body(&w, "dyn.Echo", method, ++asked, bytes, size, &ro);
        }
        n = send(fd, w.p + sent, w.n - sent, MSG_NOSIGNAL);
        assert_true(n > 0 || errno == EAGAIN);
        idle = n > 0 ? 0 : idle + 1;
        sent += n > 0 ? (size_t)n : 0;
        assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
    }
    assert_int_equal(idle, 200);
    memory = pump_stats(&u).memory_peak;
    assert_true(memory < 12u << 20); /* the megabyte, the frames in work, buffers kept */

    /* others are served meanwhile */
    other = pump_connect(&u, WAY_PAIR);
    {
        wire r = {NULL, 0, 0};
        wire_request(&r, "Add", 5, 5, 0);
        assert_true(wire_flush(other, &r));
    }
    PUMP_UNTIL(&u, recv(other, &i, 1, MSG_PEEK | MSG_DONTWAIT) == 1);
    expect_reply(other, 5, 6);
    close(other);

    /* it begins to read: every reply comes, in order */
    while (answered < asked) {
        ssize_t n;
        size_t at = 0;
        if (sent < w.n) {
            n = send(fd, w.p + sent, w.n - sent, MSG_NOSIGNAL);
            sent += n > 0 ? (size_t)n : 0;
        }
        assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
        n = recv(fd, chunk, sizeof chunk, 0);
        assert_true(n > 0 || (n < 0 && errno == EAGAIN));
        wire_put(&in, chunk, n > 0 ? (size_t)n : 0);
        while (in.n - at >= 12) {
            const unsigned char *p0 = in.p + at;
            size_t body = crpci_base_get32(p0 + 4), meta = crpci_base_get32(p0 + 8);
            wire_message m;
            if (in.n - at < body + 12)
                break;
            memset(&m, 0, sizeof m);
            wire_walk(&m, p0 + 12, p0 + 12 + meta, 0);
            assert_int_equal(m.id, ++answered);
            at += body + 12;
        }
        memmove(in.p, in.p + at, in.n - at);
        in.n -= at;
    }
    wire_free(&in);
    assert_true(pump_stats(&u).memory_peak < 12u << 20);
    free(bytes);
    wire_free(&w);
    close(fd);
    pump_close(&u);
}

static void slow_readers_are_paused_and_memory_is_bounded(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        check_slow_reader(p, "Pass", 200000);
        check_slow_reader(p, "Pass", 500);
        check_slow_reader(p, "NoSuchMethod", 10);
    }
}

static char line_of_eviction[600];

static void keep_line(void *user, int level, const char *line)
{
    (void)user, (void)level;
    snprintf(line_of_eviction, sizeof line_of_eviction, "%s", line);
}

/* Each takes no more than max_queued, but together they would take all of max_bytes. */
static void peers_that_do_not_read_leave_memory_for_others(void **state)
{
    enum { DEAF = 24, ASKED = 60, SIZE = 60000 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        char *bytes = net_bytes(SIZE);
        wire_request_options ro;
        wire w = {NULL, 0, 0}, one = {NULL, 0, 0};
        crpc_server_options o;
        int deaf[DEAF], honest, i, small = 4096;
        crpci_conn *c;
        pump u;
        memset(&o, 0, sizeof o);
        memset(&ro, 0, sizeof ro);
        o.loops.max_bytes = 8 << 20;
        o.limits.max_queued = 1 << 20;
        o.loops.hooks.log = keep_line;
        ro.attachment = SIZE;
        for (i = 0; i < ASKED; i++)
            wire_request_body(&w, "dyn.Echo", "Pass", i, bytes, SIZE, &ro);
        wire_request_body(&one, "dyn.Echo", "Pass", 7, bytes, SIZE, &ro);
        pump_open(&u, p, WAY_TCP, &o);
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        for (i = 0; i < DEAF; i++) {
            int sndbuf = 65536;
            wire_message m;
            char from[32];
            snprintf(from, sizeof from, "127.0.0.%d", 2 + i); /* a single host is held before */
            deaf[i] = pump_connect_from(&u, from, &c);
            setsockopt(deaf[i], SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
            setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof sndbuf);
            pump_push(&u, deaf[i], w.p, w.n);
            assert_true(u.loop->unsent <= (2 << 20) + 2 * SIZE);
            assert_int_equal(pump_push(&u, honest, one.p, one.n), one.n);
            pump_receive(&u, honest, &m);
            assert_int_equal(m.id, 7);
            assert_int_equal(m.code, 0);
            wire_done(&m);
        }
        assert_true(pump_stats(&u).evicted > 0);
        assert_non_null(strstr(line_of_eviction, "connection from 127.0.0."));
        assert_non_null(strstr(line_of_eviction, " closed: its peer does not take its replies, "));
        for (i = 0; i < DEAF; i++)
            close(deaf[i]);
        close(honest);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        assert_int_equal(u.loop->unsent, 0);
        wire_free(&w);
        wire_free(&one);
        free(bytes);
        pump_close(&u);
    }
}

/* --- ends --------------------------------------------------------------------------------------
 */

static void half_closed_connections_get_their_replies(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int round;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (round = 0; round < 10; round++) {
            wire w = {NULL, 0, 0};
            wire_message got;
            int fd = wire_connect(n.url), i;
            unsigned seen = 0;
            for (i = 0; i < 3; i++)
                wire_request(&w, round % 2 ? "Add" : i == 1 ? "Nothing" : "Add", i, i, i % 2 * 5);
            assert_true(wire_flush(fd, &w));
            shutdown(fd, SHUT_WR);
            for (i = 0; i < 3; i++) {
                assert_int_equal(wire_receive(fd, &got), 1);
                assert_in_range(got.id, 0, 2);
                seen |= 1u << got.id;
                wire_done(&got);
            }
            assert_int_equal(seen, 7);
            assert_int_equal(wire_receive(fd, &got), 0);
            close(fd);
        }
        net_close(&n);
    }
}

/* Deferred replies and large ones are waited for, too. */
static void half_closed_with_replies_that_come_late(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pump u;
        wire w = {NULL, 0, 0};
        wire_message m;
        wire_request_options o;
        char *bytes = net_bytes(3 << 20);
        int fd;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, WAY_TCP);
        wire_request(&w, "Defer", 1, 1, 0);
        pump_send(&u, fd, w.p, w.n);
        wire_free(&w);
        shutdown(fd, SHUT_WR);
        PUMP_UNTIL(&u, u.service.held_count == 1);
        pump_step(&u);
        pump_step(&u);
        assert_int_equal(pump_stats(&u).connections, 1);
        assert_int_equal(crpc_context_finish(net_take(&u.service), CRPC_OK), CRPC_OK);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        expect_reply(fd, 1, 2);
        assert_int_equal(wire_receive(fd, &m), 0);
        close(fd);

        memset(&o, 0, sizeof o);
        o.attachment = 3 << 20;
        fd = pump_connect(&u, WAY_TCP);
        wire_request_body(&w, "dyn.Echo", "Pass", 1, bytes, 3 << 20, &o);
        {
            size_t sent = 0;
            fcntl(fd, F_SETFL, O_NONBLOCK);
            while (sent < w.n) {
                ssize_t n = send(fd, w.p + sent, w.n - sent, MSG_NOSIGNAL);
                sent += n > 0 ? (size_t)n : 0;
                pump_step(&u);
            }
        }
        shutdown(fd, SHUT_WR);
        wire_free(&w);
        {
            size_t got = 0;
            int64_t end = ct_now_ms() + NET_PATIENCE;
            for (;;) {
                static char buffer[65536];
                ssize_t n = recv(fd, buffer, sizeof buffer, 0);
                if (n == 0)
                    break;
                assert_true(n > 0 || errno == EAGAIN);
                got += n > 0 ? (size_t)n : 0;
                pump_step(&u);
                assert_true(ct_now_ms() < end);
            }
            assert_true(got > 3u << 20);
        }
        close(fd);
        free(bytes);
        pump_close(&u);
    }
}

static void resets_in_the_middle_of_replies(void **state)
{
    crpc_poller p;
    net_mode m;
    struct sigaction before, after;
    (void)state;
    signal(SIGPIPE, SIG_DFL);
    sigaction(SIGPIPE, NULL, &before);
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int i;
        wire w = {NULL, 0, 0};
        wire_request_options o;
        char *bytes = net_bytes(60000);
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        o.attachment = 60000;
        wire_request_body(&w, "dyn.Echo", "Pass", 1, bytes, 60000, &o);
        wire_request_body(&w, "dyn.Echo", "Pass", 2, bytes, 60000, &o);
        wire_request(&w, "Add", 3, 1, 0);
        net_open(&n, p, m);
        for (i = 0; i < 1000 / NET_MODES; i++) {
            int fd = wire_connect(n.url);
            char some[100];
            wire_send(fd, w.p, i % 3 ? w.n : w.n - (size_t)i);
            if (i % 2)
                assert_true(recv(fd, some, sizeof some, 0) > 0 || errno == ECONNRESET);
            wire_reset(fd);
        }
        net_check_add(n.channel, 1);
        net_close(&n);
        wire_free(&w);
        free(bytes);
    }
    sigaction(SIGPIPE, NULL, &after);
    assert_true(after.sa_handler == SIG_DFL && before.sa_handler == SIG_DFL);
}

/* --- time --------------------------------------------------------------------------------------
 */

static void slow_frames_and_idle_connections_are_closed(void **state)
{
    static const struct {
        int frame_ms, idle_ms;
        const char *bytes;
        size_t size;
        bool ends;
    } cases[] = {
        {30, 0, "PRPC", 4, true},
        {30, 0, "PRPC\0\0\0\x20\0\0\0\x10...", 15, true},
        {30, 60000, "PRPC\0\0", 6, true}, /* the long idle limit must not hide the short one */
        {-1, 0, "PRPC\0\0", 6, false},
        {30, 0, "", 0, false}, /* nothing has begun */
        {0, 30, "", 0, true},
        {-1, -1, "", 0, false},
    };
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < sizeof cases / sizeof *cases; i++)
    {
        crpc_server_options o;
        pump u;
        int fd;
        int64_t start = ct_now_ms(), end;
        memset(&o, 0, sizeof o);
        o.frame_timeout_ms = cases[i].frame_ms;
        o.idle_timeout_ms = cases[i].idle_ms;
        pump_open(&u, p, WAY_TCP, &o);
        fd = pump_connect(&u, WAY_TCP);
        pump_send(&u, fd, cases[i].bytes, cases[i].size);
        if (cases[i].ends) {
            expect_end(&u, fd);
            assert_true(ct_now_ms() - start >= 29);
            assert_true(ct_now_ms() - start < 15000);
            assert_int_equal(pump_stats(&u).bad_frames, 0);
            assert_int_equal(pump_stats(&u).closed_partial, cases[i].size > 0);
            assert_int_equal(pump_stats(&u).closed_idle, cases[i].size == 0);
        } else {
            for (end = ct_now_ms() + 100; ct_now_ms() < end;)
                pump_step(&u);
            assert_int_equal(pump_stats(&u).connections, 1);
        }
        close(fd);
        pump_close(&u);
    }
}

/* Asks for more than the peer reads, until the server neither reads nor can write. *sent: bytes of a
 * request that is sent in part. */
static crpci_conn *stall(pump *u, int fd, size_t *sent)
{
    enum { SIZE = 100000 };
    crpci_conn *c = CRPCI_CONTAINER(u->loop->conns.next, crpci_conn, link);
    char *bytes = net_bytes(SIZE);
    wire_request_options ro;
    wire w = {NULL, 0, 0};
    int idle = 0;
    memset(&ro, 0, sizeof ro);
    ro.attachment = SIZE;
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    wire_request_body(&w, "dyn.Echo", "Pass", 1, bytes, SIZE, &ro);
    while (idle < 100 || !c->paused || !c->blocked) {
        ssize_t n = send(fd, w.p + *sent, w.n - *sent, MSG_NOSIGNAL);
        idle = n > 0 ? 0 : idle + 1;
        *sent = n > 0 ? (*sent + (size_t)n) % w.n : *sent;
        assert_int_equal(crpc_loop_step(u->loop, 0), CRPC_OK);
    }
    wire_free(&w);
    free(bytes);
    return c;
}

static void a_peer_that_takes_no_byte_is_closed(void **state)
{
    static const way ways[] = {WAY_TCP, WAY_PAIR};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 4; i++)
    {
        crpc_server_options o;
        static char chunk[1 << 20];
        size_t sent = 0;
        crpci_conn *c;
        pump u;
        int fd, k;
        memset(&o, 0, sizeof o);
        o.limits.max_queued = 1 << 20;
        o.frame_timeout_ms = -1;
        o.write_timeout_ms = i < 2 ? 0 : -1;
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS);
        pump_open(&u, p, WAY_TCP, &o);
        fd = pump_connect(&u, ways[i % 2]);
        for (k = 0; k < 4; k++) { /* it reads something now and then */
            int unsent;
            c = stall(&u, fd, &sent);
            unsent = crpci_sock_unsent(c->fd);
            net_time_add(29000);
            while (crpci_sock_unsent(c->fd) >= unsent)
                (void)!recv(fd, chunk, sizeof chunk, 0);
            assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
            assert_int_equal(pump_stats(&u).connections, 1);
        }
        stall(&u, fd, &sent);
        for (k = 0; k < 4; k++) { /* and then nothing, but the kernel may still take some */
            net_time_add(30000);
            assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
        }
        assert_int_equal(pump_stats(&u).connections, i < 2 ? 0 : 1);
        assert_int_equal(pump_stats(&u).closed_stalled, i < 2 ? 1 : 0);
        net_time_run();
        close(fd);
        pump_close(&u);
    }
}

/* A connection that is not read because of what it has in service. */
static void the_end_of_a_paused_peer_is_noticed_once(void **state)
{
    static const way ways[] = {WAY_TCP, WAY_PAIR};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < 2; i++)
    {
        crpci_conn *c;
        crpc_context *x;
        wire w = {NULL, 0, 0};
        uint64_t waits;
        pump u;
        int fd, k;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, ways[i]);
        c = CRPCI_CONTAINER(u.loop->conns.next, crpci_conn, link);
        for (k = 0; k < CRPCI_FAIRNESS_CONN_MAX; k++) {
            wire_request(&w, "Defer", k, k, 0);
            if (k % 64 == 63) {
                pump_send(&u, fd, w.p, w.n);
                wire_free(&w);
            }
        }
        PUMP_UNTIL(&u, net_held(&u.service) == CRPCI_FAIRNESS_CONN_MAX);
        assert_true(c->paused);
        for (k = 0; k < 3; k++)
            assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
        assert_int_not_equal(c->watch.item.events, 0);
        close(fd);
        PUMP_UNTIL(&u, c->watch.item.events == 0);
        assert_true(crpc_context_cancelled(u.service.held[0]));
        waits = pump_stats(&u).waits; /* it wakes the loop no more */
        assert_int_equal(crpc_loop_step(u.loop, 20), CRPC_OK);
        assert_int_equal(pump_stats(&u).waits, waits + 1);
        while ((x = net_take(&u.service)) != NULL)
            (void)crpc_context_finish(x, CRPC_OK);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        pump_close(&u);
    }
}

/* A request waits in the buffer of a connection that is not read, until its deadline has passed. */
static void time_in_a_paused_connection_counts(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        wire_request_options ro;
        crpci_conn *c;
        crpc_context *x;
        wire w = {NULL, 0, 0};
        wire_message m;
        pump u;
        int fd, k, n;
        memset(&o, 0, sizeof o);
        memset(&ro, 0, sizeof ro);
        ro.timeout_ms = 100;
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS);
        pump_open(&u, p, WAY_TCP, &o);
        fd = pump_connect(&u, WAY_PAIR);
        c = CRPCI_CONTAINER(u.loop->conns.next, crpci_conn, link);
        for (k = 1; k <= CRPCI_FAIRNESS_CONN_MAX; k++) {
            wire_request(&w, "Defer", k, k, 0);
            if (k == CRPCI_FAIRNESS_CONN_MAX)
                wire_request_body(&w, "dyn.Echo", "Add", 0, "\x08\x05", 2, &ro);
            if (k % 64 == 0) {
                pump_send(&u, fd, w.p, w.n);
                wire_free(&w);
            }
        }
        PUMP_UNTIL(&u, net_held(&u.service) == CRPCI_FAIRNESS_CONN_MAX);
        assert_non_null(c->left);
        net_time_add(101);
        for (k = 0; k < CRPCI_FAIRNESS_CONN_MAX; k++) {
            x = net_take(&u.service);
            assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
        }
        for (n = 0, m.id = 1; m.id; n++) {
            PUMP_UNTIL(&u, recv(fd, &k, 1, MSG_PEEK | MSG_DONTWAIT) == 1);
            assert_int_equal(wire_receive(fd, &m), 1);
            if (!m.id)
                assert_int_equal(m.code, CRPC_ETIMEDOUT);
            wire_done(&m);
        }
        assert_int_equal(u.service.calls, CRPCI_FAIRNESS_CONN_MAX);
        net_time_run();
        close(fd);
        pump_close(&u);
    }
}

/* Neither limit closes a connection that is in use; nor one whose request takes long. */
static void connections_in_use_are_not_idle(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        pump u;
        int fd, i;
        wire w = {NULL, 0, 0};
        int64_t end;
        memset(&o, 0, sizeof o);
        o.idle_timeout_ms = 400;
        o.frame_timeout_ms = 400;
        pump_open(&u, p, WAY_TCP, &o);
        fd = pump_connect(&u, WAY_TCP);
        for (i = 0; i < 12; i++) { /* together far longer than the limits */
            wire_request(&w, "Add", i, i, 0);
            pump_send(&u, fd, w.p, 10);
            pump_send(&u, fd, w.p + 10, w.n - 10);
            PUMP_UNTIL(&u, u.service.calls == i + 1);
            wire_free(&w);
            expect_reply(fd, i, i + 1);
            for (end = ct_now_ms() + 60; ct_now_ms() < end;)
                pump_step(&u);
        }
        wire_request(&w, "Defer", 1, 1, 0);
        pump_send(&u, fd, w.p, w.n);
        wire_free(&w);
        PUMP_UNTIL(&u, u.service.held_count == 1);
        for (end = ct_now_ms() + 900; ct_now_ms() < end;)
            pump_step(&u);
        assert_int_equal(crpc_context_finish(net_take(&u.service), CRPC_OK), CRPC_OK);
        expect_reply(fd, 1, 2);
        expect_end(&u, fd); /* and now it is */
        close(fd);
        pump_close(&u);
    }
}

/* --- one connection without a server: what a send consists of -------------------------------- */

static int send_pieces; /* of the last writev */

static ssize_t counting_writev(int fd, void *state, struct iovec *iov, int count)
{
    send_pieces = count;
    return crpci_transport_plain_writev(fd, state, iov, count);
}

static void ignore_sent(crpci_conn *c, crpci_out *out)
{
    (void)c;
    (void)out;
}

static void ignore_closed(crpci_conn *c)
{
    (void)c;
}

static void queue_bytes(crpci_conn *c, const char *text)
{
    crpci_chunk *chunk = crpci_heap_chunk(c->loop->heap, sizeof(crpci_out) + 100);
    crpci_out *o = (crpci_out *)crpci_heap_data(chunk);
    memset(o, 0, sizeof *o);
    memcpy(o + 1, text, strlen(text));
    o->chunk = chunk;
    o->head = (const uint8_t *)(o + 1);
    o->head_len = strlen(text);
    crpci_conn_queue(c, o);
}

/* Short frames are copied into one piece; without memory for that they are sent one by one. */
static void short_frames_need_no_memory_to_be_sent(void **state)
{
    crpci_transport counting = crpci_transport_plain;
    crpci_conn_events up;
    int without;
    (void)state;
    counting.writev = counting_writev;
    memset(&up, 0, sizeof up);
    up.sent = ignore_sent;
    up.closed = ignore_closed;
    for (without = 0; without < 2; without++) {
        ct_alloc *a = ct_alloc_of_test();
        crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
        crpci_conn *c;
        char got[16] = "";
        int fds[2];
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        crpci_loop_lock(l);
        c = crpci_connect_new(l, fds[1], false, &up, NULL);
        assert_non_null(c);
        c->io = &counting;
        queue_bytes(c, "one");
        queue_bytes(c, "two");
        queue_bytes(c, "three");
        a->fail_at = without ? a->calls + 1 : 0;
        a->fail_forever = without;
        crpci_conn_flush(c);
        a->fail_at = a->fail_forever = 0;
        assert_null(c->tx_head);
        assert_int_equal(c->tx_memory, 0);
        assert_int_equal(send_pieces, without ? 3 : 1);
        assert_int_equal(recv(fds[0], got, sizeof got, 0), 11);
        assert_string_equal(got, "onetwothree");
        crpci_conn_close(c, CRPC_ECLOSE, 0);
        crpci_loop_unlock(l);
        close(fds[0]);
        crpc_loop_close(l);
    }
}

/* --- a transport such as TLS will be ----------------------------------------------------------
 * It reads more than it is asked for and hands it out little by little, takes one piece at a time,
 * keeps what it was offered when it would block and wants it again, must not be read while it is
 * written, and now and then cannot go on reading before the socket is writable. */

typedef struct veil {
    uint8_t in[9000];
    size_t at, end; /* of what was read and not handed out */
    uint8_t out[500];
    size_t kept; /* bytes of `out` that have to be offered again */
    int reads, writes, blocks;
    bool wants_write; /* to go on reading */
    int busy;         /* atomic: threads in it */
    int wrong;
} veil;

static void veil_enter(veil *v)
{
    v->wrong += __atomic_add_fetch(&v->busy, 1, __ATOMIC_SEQ_CST) != 1;
}

static ssize_t veil_leave(veil *v, ssize_t n)
{
    __atomic_sub_fetch(&v->busy, 1, __ATOMIC_SEQ_CST);
    if (n < 0)
        errno = EAGAIN;
    return n;
}

static ssize_t veil_readv(int fd, void *state, struct iovec *iov, int count)
{
    veil *v = (veil *)state;
    ssize_t n;
    (void)count;
    veil_enter(v);
    v->wants_write = ++v->reads % 3 == 0;
    if (v->wants_write)
        return veil_leave(v, -1);
    if (v->at == v->end) {
        n = recv(fd, v->in, sizeof v->in, MSG_DONTWAIT);
        if (n <= 0)
            return n == 0 || errno == EAGAIN ? veil_leave(v, n) : n;
        v->at = 0;
        v->end = (size_t)n;
    }
    n = (ssize_t)crpci_base_min(crpci_base_min(v->end - v->at, iov->iov_len), 100);
    memcpy(iov->iov_base, v->in + v->at, (size_t)n);
    v->at += (size_t)n;
    return veil_leave(v, n);
}

static ssize_t veil_writev(int fd, void *state, struct iovec *iov, int count)
{
    veil *v = (veil *)state;
    ssize_t n;
    veil_enter(v);
    v->wrong += count != 1;
    if (!v->kept) {
        v->kept = crpci_base_min(iov->iov_len, sizeof v->out);
        memcpy(v->out, iov->iov_base, v->kept);
        if (++v->writes % 2) { /* it has them, and sends them the next time */
            v->blocks++;
            return veil_leave(v, -1);
        }
    }
    v->wrong += iov->iov_len < v->kept || memcmp(iov->iov_base, v->out, v->kept) != 0;
    n = send(fd, v->out, v->kept, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0)
        return veil_leave(v, -1);
    v->kept -= (size_t)n;
    memmove(v->out, v->out + n, v->kept);
    return veil_leave(v, n);
}

/* The connection must not query the transport while another thread is inside it. */
static void veil_look(veil *v)
{
    v->wrong += __atomic_load_n(&v->busy, __ATOMIC_SEQ_CST) != 0;
}

static bool veil_pending(void *state)
{
    veil *v = (veil *)state;
    veil_look(v);
    return v->at < v->end && !v->wants_write; /* then no reading brings it forth */
}

static unsigned veil_want(void *state, unsigned events)
{
    veil *v = (veil *)state;
    veil_look(v);
    return events & CRPC_READABLE && v->wants_write ? CRPC_WRITABLE : events;
}

static bool veil_idle(int fd, void *state)
{
    veil *v = (veil *)state;
    char byte;
    veil_look(v);
    return v->at == v->end && recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) <= 0;
}

static const crpci_transport veil_transport = {
    "veil", CRPCI_TRANSPORT_REPEAT, veil_readv, veil_writev, veil_pending, veil_want, veil_idle, NULL};

/* Gives the transport to the newest connection of a loop. */
static crpci_conn *veil_on(crpc_loop *l, veil *v)
{
    crpci_conn *c;
    memset(v, 0, sizeof *v);
    crpci_loop_lock(l);
    c = CRPCI_CONTAINER(l->conns.prev, crpci_conn, link);
    c->io = &veil_transport;
    c->io_state = v;
    crpci_loop_unlock(l);
    return c;
}

static void input_buffered_in_the_transport_is_read(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire w = {NULL, 0, 0};
        wire_message m;
        crpci_conn *c;
        pump u;
        veil v;
        int fd, i;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, WAY_TCP);
        c = veil_on(u.loop, &v);
        for (i = 0; i < 200; i++)
            wire_request(&w, "Add", i, i, 0);
        assert_true(w.n < sizeof v.in); /* it takes all at once, and then nothing is to be polled */
        assert_true(wire_flush(fd, &w));
        PUMP_UNTIL(&u, net_calls(&u.service) == 200 && !c->tx_head && !v.kept);
        for (i = 0; i < 200; i++) {
            assert_int_equal(wire_receive(fd, &m), 1);
            assert_int_equal(m.id, i);
            assert_int_equal(m.n, i + 1);
            wire_done(&m);
        }
        assert_int_equal(v.wrong, 0);
        assert_true(v.blocks > 0 && v.reads > 50);
        close(fd);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        pump_close(&u);
    }
}

/* The frame that leaves first has the mark: not the one that was queued first and withdrawn. */
static void the_first_frame_that_leaves_has_the_mark(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpci_conn_events up;
    crpci_conn *c;
    wire_message m;
    int fds[2], i;
    (void)state;
    memset(&up, 0, sizeof up);
    up.sent = ignore_sent;
    up.closed = ignore_closed;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    crpci_loop_lock(l);
    c = crpci_connect_new(l, fds[1], false, &up, NULL);
    assert_non_null(c);
    c->protocol = &crpci_baidu;
    c->mark = "crpc-peer";
    c->mark_value = "1";
    for (i = 0; i < 3; i++) {
        crpci_chunk *chunk = crpci_heap_chunk(l->heap, 512);
        crpci_out *o = (crpci_out *)(void *)crpci_heap_data(chunk);
        uint8_t *payload = crpci_heap_data(chunk) + 500;
        crpci_message out;
        memset(o, 0, sizeof *o);
        memset(&out, 0, sizeof out);
        out.id = i;
        o->chunk = chunk;
        o->head = crpci_baidu.reply(payload - crpci_baidu.headroom, payload, &out);
        o->head_len = (size_t)(payload - o->head);
        crpci_conn_queue(c, o);
    }
    crpci_conn_put_mark(c); /* a send that took nothing */
    assert_true(c->tx_head->marked);
    assert_true(crpci_conn_withdraw(c, c->tx_head));
    crpci_conn_flush(c);
    assert_int_equal(c->tx_bytes, 0);
    assert_null(c->mark);
    for (i = 1; i < 3; i++) {
        assert_int_equal(wire_receive(fds[0], &m), 1);
        assert_int_equal(m.id, i);
        assert_int_equal(wire_has_mark(&m, "crpc-peer"), i == 1);
        wire_done(&m);
    }
    crpci_conn_close(c, CRPC_ECLOSE, 0);
    crpci_loop_unlock(l);
    close(fds[0]);
    crpc_loop_close(l);
}

/* What the transport has of a frame it sends: taking the frame back would cut the stream. */
static void frames_offered_to_the_transport_cannot_be_withdrawn(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpci_conn_events up;
    crpci_conn *c;
    crpci_out *last;
    char got[40] = "";
    int fds[2];
    veil v;
    (void)state;
    memset(&up, 0, sizeof up);
    up.sent = ignore_sent;
    up.closed = ignore_closed;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    crpci_loop_lock(l);
    c = crpci_connect_new(l, fds[1], false, &up, NULL);
    assert_non_null(c);
    crpci_loop_unlock(l);
    veil_on(l, &v);
    crpci_loop_lock(l);
    assert_true(crpci_conn_idle(c));
    queue_bytes(c, "one");
    queue_bytes(c, "two");
    crpci_conn_flush(c);
    assert_true(c->blocked && v.kept == 6);
    assert_false(crpci_conn_idle(c));
    queue_bytes(c, "three");
    last = CRPCI_CONTAINER(c->tx_end, crpci_out, next);
    assert_true(crpci_conn_out_begun(c->tx_head) && crpci_conn_out_begun(c->tx_head->next));
    assert_false(crpci_conn_out_begun(last));
    assert_false(crpci_conn_withdraw(c, c->tx_head));
    assert_false(crpci_conn_withdraw(c, c->tx_head->next));
    assert_true(crpci_conn_withdraw(c, last));
    queue_bytes(c, "four");
    crpci_loop_unlock(l);
    while (c->tx_head)
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
    assert_int_equal(recv(fds[0], got, sizeof got, 0), 10);
    assert_string_equal(got, "onetwofour");
    assert_int_equal(v.wrong, 0);
    crpci_loop_lock(l);
    crpci_conn_close(c, CRPC_ECLOSE, 0);
    crpci_loop_unlock(l);
    close(fds[0]);
    crpc_loop_close(l);
}

/* The flags `reading` and `writing` stand in for a second thread. */
static void a_half_duplex_transport_has_one_thread_at_a_time(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpci_conn_events up;
    crpci_conn *c;
    char got[40] = "";
    int fds[2];
    veil v;
    (void)state;
    memset(&up, 0, sizeof up);
    up.sent = ignore_sent;
    up.closed = ignore_closed;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    crpci_loop_lock(l);
    c = crpci_connect_new(l, fds[1], false, &up, NULL);
    assert_non_null(c);
    c->protocols = crpci_protocols;
    crpci_loop_unlock(l);
    veil_on(l, &v);
    crpci_loop_lock(l);
    c->reading = true;
    queue_bytes(c, "one");
    crpci_conn_flush(c);
    assert_int_equal(v.writes, 0);
    assert_false(crpci_conn_idle(c));
    c->reading = false;
    crpci_receive_after_read(c); /* what the reader does */
    c->writing = true;
    assert_int_equal(send(fds[0], "PR", 2, 0), 2);
    crpci_connect_event(l, &c->watch, CRPC_READABLE);
    assert_int_equal(v.reads, 0);
    assert_true(c->unread);
    c->writing = false; /* the next flush goes on with both */
    crpci_loop_unlock(l);
    while (c->tx_head || !c->rx)
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
    assert_int_equal(c->rx_len, 2);
    assert_false(c->unread);
    assert_int_equal(recv(fds[0], got, sizeof got, 0), 3);
    assert_int_equal(v.wrong, 0);
    crpci_loop_lock(l);
    crpci_conn_close(c, CRPC_ECLOSE, 0);
    crpci_loop_unlock(l);
    close(fds[0]);
    crpc_loop_close(l);
}

static void nobody_reads_while_another_thread_writes(void **state)
{
    int side;
    (void)state;
    for (side = 0; side < 2; side++) { /* the server's connection, the client's */
        dyn_Blob blob = dyn_Blob_init_zero, back = dyn_Blob_init_zero;
        char *bytes = net_bytes(20000);
        net n;
        veil v;
        int i, k;
        memset(&n, 0, sizeof n);
        net_open(&n, CRPC_POLLER_DEFAULT, NET_WORKERS);
        net_check_add(n.channel, 1);
        veil_on(side ? crpc_channel_loop(n.channel) : n.loop, &v);
        blob.data = crpc_view_of(bytes, 20000);
        for (i = 0; i < 5; i++) {
            crpc_id id[20];
            crpc_call call = CRPC_INIT;
            call.policy.timeout_ms = NET_PATIENCE;
            for (k = 0; k < 20; k++) {
                dyn_Num in = net_num(k);
                assert_int_equal(dyn_Echo_Add_begin(n.channel, &in, &id[k], NULL), CRPC_OK);
            }
            if (dyn_Echo_Pass(n.channel, &blob, &back, &call))
                fail_msg("%s", call.error.text);
            assert_int_equal(crpc_view_size(back.data), 20000);
            assert_memory_equal(crpc_view_data(back.data), bytes, 20000);
            crpc_call_reset(&call);
            for (k = 0; k < 20; k++) {
                dyn_Num out = dyn_Num_init_zero;
                assert_int_equal(crpc_channel_wait(n.channel, id[k], NET_PATIENCE), CRPC_OK);
                assert_int_equal(dyn_Echo_Add_fetch(n.channel, id[k], &out, NULL), CRPC_OK);
                assert_int_equal(out.n, k + 1);
            }
        }
        free(bytes);
        net_close(&n);
        assert_int_equal(v.wrong, 0);
        assert_true(v.blocks > 0);
    }
}

static void ignore_close(crpci_conn *c)
{
    (void)c;
}

/* Another thread closes a connection while this one sends, and the send fails then. */
static void a_send_that_fails_after_the_close_leaves_no_task(void **state)
{
    static const crpci_conn_events up = {.closed = ignore_close};
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpci_conn *c;
    int fds[2];
    (void)state;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    crpci_loop_lock(l);
    c = crpci_connect_new(l, fds[0], false, &up, NULL);
    assert_non_null(c);
    crpci_conn_hold(c);
    crpci_conn_close(c, CRPC_ECLOSE, 0);
    crpci_conn_break(c, EPIPE);
    assert_true(crpci_list_empty(&l->resume));
    crpci_conn_drop(c);
    crpci_loop_unlock(l);
    close(fds[1]);
    crpc_loop_close(l);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_send_that_fails_after_the_close_leaves_no_task),
        CT_TEST(small_socket_buffers),
        CT_TEST(slow_readers_are_paused_and_memory_is_bounded),
        CT_TEST(peers_that_do_not_read_leave_memory_for_others),
        CT_TEST(half_closed_connections_get_their_replies),
        CT_TEST(half_closed_with_replies_that_come_late),
        CT_TEST(resets_in_the_middle_of_replies),
        CT_TEST(a_peer_that_takes_no_byte_is_closed),
        CT_TEST(the_end_of_a_paused_peer_is_noticed_once),
        CT_TEST(time_in_a_paused_connection_counts),
        CT_TEST(slow_frames_and_idle_connections_are_closed),
        CT_TEST(connections_in_use_are_not_idle),
        CT_TEST(short_frames_need_no_memory_to_be_sent),
        CT_TEST(input_buffered_in_the_transport_is_read),
        CT_TEST(the_first_frame_that_leaves_has_the_mark),
        CT_TEST(frames_offered_to_the_transport_cannot_be_withdrawn),
        CT_TEST(a_half_duplex_transport_has_one_thread_at_a_time),
        CT_TEST(nobody_reads_while_another_thread_writes),
    };
    return CT_RUN(tests);
}
