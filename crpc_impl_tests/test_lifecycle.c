/* Starting, stopping, draining and closing a server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"

static void services_are_added_once(void **state)
{
    static const crpc_service same = {"dyn.Echo", NULL, 0}, short_same = {"else.Echo", NULL, 0},
                              other = {"else.Other", NULL, 0}, nameless = {NULL, NULL, 0};
    crpc_server *s;
    crpc_server_options o = CRPC_INIT;
    (void)state;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &same, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_add(s, &short_same, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_add(s, &other, NULL, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &nameless, NULL, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_server_add(s, NULL, NULL, NULL), CRPC_EINVAL);
    crpc_server_close(s);
}

static void a_server_without_a_listener_does_not_start(void **state)
{
    crpc_server *s;
    crpc_server_options o = CRPC_INIT;
    crpc_error error;
    (void)state;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "the server has no listener: set listen");
    crpc_server_close(s);
}

/* Texts of options may go when the server is open; its threads start later. */
static void options_are_copied_when_a_server_opens(void **state)
{
    char *name = strdup("of-the-test");
    crpc_server *s;
    crpc_server_options o = CRPC_INIT;
    (void)state;
    assert_non_null(name);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.loops.thread_name = name;
    o.listen = "tcp://127.0.0.1:0";
    o.io_threads = 1;
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    free(name);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_string_equal(s->io.loops[0]->thread_name, "of-the-test");
    crpc_server_close(s);
}

static void nothing_is_added_after_the_start(void **state)
{
    static const crpc_service late = {"Late", NULL, 0};
    net n;
    int fd;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    assert_int_equal(crpc_server_add(n.server, &late, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_start(n.server, NULL), CRPC_EBUSY);
    assert_int_equal(crpc_server_listen(n.server, "tcp://127.0.0.1:0", NULL), CRPC_EBUSY);
    fd = wire_connect(n.url);
    assert_int_equal(net_ask(fd, "Late", "X", 1, NULL, NULL), CRPC_ENOSERVICE);
    close(fd);
    net_close(&n);
}

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
        /* new peers are refused; a poll that still sleeps on the listener may delay that a
         * little */
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
        assert_int_equal(wire_receive(fd, &got), 0); /* end of stream */
        assert_int_equal(net_calls(&n.service), 1);
        close(fd);
        net_close(&n);
    }
}

static void nothing(void *user)
{
    (void)user;
}

/* Puts the tests' clock forward and wakes the loop. */
static void time_passes(crpc_loop *l, uint32_t seconds)
{
    net_time_add(seconds * 1000);
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

/* The server serves for lame_ms, then refuses new requests. It closes a connection that is quiet,
 * but for drain_ms not one with a request in service, where a peer goes on sending others. */
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
        uint32_t end;
        int fd, fresh, tries;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_RUNS;
        n.server_options.lame_ms = 1000000;
        n.server_options.drain_ms = 86400000;
        n.server_options.quiet_ms = 500000;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        x = net_take(&n.service);
        end = net_time_added_ms + 1000000 + 86400000;
        crpc_server_stop(n.server);
        time_passes(n.loop, 900);
        crpc_server_stop(n.server); /* does not start lame_ms again */
        assert_int_equal(net_ask(fd, "Echo", "Add", 2, NULL, NULL), CRPC_OK);
        fresh = wire_connect(n.url);
        assert_int_equal(net_ask(fresh, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        time_passes(n.loop, 100);
        assert_true(CT_WAIT(!can_connect(n.url), NET_PATIENCE));
        assert_int_equal(net_ask(fresh, "Echo", "Add", 4, NULL, NULL), CRPC_ELOGOFF);
        for (tries = 0; tries < 100 && recv(fresh, &got, 1, MSG_DONTWAIT) < 0; tries++) {
            time_passes(n.loop, 600); /* it counts from when the reply was acknowledged */
            ct_sleep_ms(20);
        }
        assert_int_equal(wire_receive(fresh, &got), 0);
        assert_int_equal(net_ask(fd, "Echo", "Add", 5, NULL, NULL), CRPC_ELOGOFF);
        assert_int_equal(pthread_create(&closer, NULL, close_net, &n), 0);
        assert_int_equal(net_ask(fd, "Echo", "Add", 6, NULL, NULL), CRPC_ELOGOFF); /* it waits */
        net_time_add(end - net_time_added_ms);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, 1);
        assert_int_equal(got.code, CRPC_ECANCELED);
        wire_done(&got);
        net_time_add(1000);
        assert_int_equal(wire_receive(fd, &got), 0);
        pthread_join(closer, NULL);
        assert_int_equal(n.service.calls, 3);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        close(fd);
        close(fresh);
    }
}

static void *close_server(void *arg)
{
    crpc_server_close((crpc_server *)arg);
    return NULL;
}

/* The kernel has queued connections, with requests in them, when the server stops: each request is
 * answered, and each connection ends without a reset. */
static void who_has_connected_before_a_stop_is_answered(void **state)
{
    crpc_poller p;
    int io_threads;
    (void)state;
    NET_EACH_POLLER(p) for (io_threads = 0; io_threads < 3; io_threads += 2)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_loop *l = net_loop(p);
        net_service service;
        pthread_t closer;
        char url[160];
        int fds[40];
        size_t i;
        memset(&o, 0, sizeof o);
        o.loop = l;
        o.loops = net_loop_options(p);
        o.listen = "tcp://127.0.0.1:0";
        o.io_threads = io_threads;
        o.drain_ms = NET_PATIENCE;
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        for (i = 0; i < sizeof fds / sizeof *fds; i++) {
            wire w = {NULL, 0, 0};
            fds[i] = wire_connect(url);
            wire_request(&w, "Add", 1, 1, 0);
            assert_true(wire_flush(fds[i], &w));
        }
        crpc_server_stop(s); /* nobody has driven the loop yet */
        assert_int_equal(pthread_create(&closer, NULL, close_server, s), 0);
        for (i = 0; i < sizeof fds / sizeof *fds; i++) {
            wire_message got;
            assert_int_equal(wire_receive(fds[i], &got), 1);
            assert_true(got.code == CRPC_OK || got.code == CRPC_ELOGOFF);
            wire_done(&got);
        }
        for (i = 0; i < sizeof fds / sizeof *fds; i++) {
            wire_message got;
            assert_int_equal(wire_receive(fds[i], &got), 0);
            close(fds[i]);
        }
        pthread_join(closer, NULL);
        crpc_loop_close(l);
    }
}

/* A peer has sent 5 bytes of a request and sends no more, another one half of one whose body the
 * server skips. */
static void partial_requests_do_not_hold_up_a_stop(void **state)
{
    static const char body[100000];
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        crpc_loop_stats stats;
        int fd, large;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_RUNS;
        n.server_options.drain_ms = 10000000;
        n.server_options.limits.max_body = 1024;
        net_open(&n, p, NET_THREAD);
        fd = wire_connect(n.url);
        large = wire_connect(n.url);
        assert_true(wire_send(fd, "PRPC", 4) && wire_send(fd, "", 1));
        wire_request_body(&w, "dyn.Echo", "Add", 7, body, sizeof body, NULL);
        assert_true(wire_send(large, w.p, w.n / 2));
        wire_free(&w);
        assert_int_equal(wire_receive(large, &got), 1);
        assert_int_equal(got.code, CRPC_EREQUEST);
        wire_done(&got);
        assert_true(CT_WAIT((crpc_server_stats_get(n.server, &stats), stats.receives > 1),
                            NET_PATIENCE));
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(fd, &got), 0);
        assert_int_equal(wire_receive(large, &got), 0);
        close(fd);
        close(large);
        net_close(&n);
    }
}

/* A peer that says in its first request that it is crpc gets the farewell when the server stops,
 * and is served until it ends its output, also what it sends after that. */
static void crpc_peers_are_served_to_the_end_of_their_output(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", NULL};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        char text[64];
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.quiet_ms = NET_PATIENCE;
        n.server_options.drain_ms = NET_PATIENCE;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request_fields(&w, "Add", 1, "\x08\x01", 2, 0, fields);
        wire_request(&w, "Add", 2, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_true(wire_field(&got, "crpc-server", text, sizeof text));
        assert_string_equal(text, n.server->incarnation);
        wire_done(&got);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_false(wire_field(&got, "crpc-server", text, sizeof text));
        wire_done(&got);
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, -1);
        assert_int_equal(got.code, CRPC_ELOGOFF);
        assert_true(wire_has_mark(&got, "crpc-farewell"));
        wire_done(&got);
        assert_int_equal(net_ask(fd, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        wire_request(&w, "Add", 4, 1, 0);
        assert_true(wire_flush(fd, &w));
        shutdown(fd, SHUT_WR);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.code, CRPC_OK);
        wire_done(&got);
        assert_int_equal(wire_receive(fd, &got), 0);
        close(fd);
        net_close(&n);
    }
}

/* A connection that has not sent a byte may be a crpc peer's, and one that has begun to send is of
 * an unknown peer: the first gets the farewell, the second only its end. What the first asks for
 * after that is served if it is crpc. */
static void silent_connections_get_the_farewell(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", NULL};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        int silent, begun;
        memset(&n, 0, sizeof n);
        n.server_options.quiet_ms = 300;
        n.server_options.drain_ms = NET_PATIENCE;
        net_open(&n, p, m);
        silent = wire_connect(n.url);
        begun = wire_connect(n.url);
        assert_true(wire_send(begun, "P", 1));
        assert_true(CT_WAIT(crpci_thread_load(&n.server->connections) == 2, NET_PATIENCE));
        assert_true(CT_WAIT(net_received(n.server) >= 1, NET_PATIENCE));
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(silent, &got), 1);
        assert_int_equal(got.id, -1);
        assert_int_equal(got.code, CRPC_ELOGOFF);
        assert_true(wire_has_mark(&got, "crpc-farewell"));
        wire_done(&got);
        wire_request_fields(&w, "Add", 1, "\x08\x01", 2, 0, fields);
        assert_true(wire_flush(silent, &w));
        do {
            assert_int_equal(wire_receive(silent, &got), 1);
            assert_int_equal(got.code, got.id == 1 ? CRPC_OK : CRPC_ELOGOFF);
            wire_done(&got);
        } while (got.id != 1);
        shutdown(silent, SHUT_WR);
        assert_int_equal(wire_receive(silent, &got), 0);
        assert_int_equal(wire_receive(begun, &got), 0);
        close(silent);
        close(begun);
        net_close(&n);
    }
}

/* A crpc peer has sent half of a request when the farewell comes, and sends the rest behind it. */
static void half_a_request_is_served_after_the_farewell(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", NULL};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        uint64_t received;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = NET_PATIENCE;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request_fields(&w, "Add", 1, "\x08\x01", 2, 0, fields);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(wire_receive(fd, &got), 1);
        wire_done(&got);
        received = net_received(n.server);
        wire_request(&w, "Add", 2, 2, 0);
        assert_true(wire_send(fd, w.p, w.n / 2));
        assert_true(CT_WAIT(net_received(n.server) > received, NET_PATIENCE));
        crpc_server_stop(n.server);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, -1);
        wire_done(&got);
        assert_true(wire_send(fd, w.p + w.n / 2, w.n - w.n / 2));
        wire_free(&w);
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.id, 2);
        assert_int_equal(got.code, CRPC_OK);
        wire_done(&got);
        shutdown(fd, SHUT_WR);
        assert_int_equal(wire_receive(fd, &got), 0);
        close(fd);
        net_close(&n);
    }
}

/* A peer sends a server farewells, and requests that have their id and their field: it gets a reply
 * to each, and neither its own connection nor another one ends. */
static void a_peer_cannot_take_leave_of_a_server(void **state)
{
    static const char *const fields[] = {"crpc-farewell", "1", "crpc-server", "x",
                                         "crpc-repeat",   "?", "crpc-peer",   "1", NULL};
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        net n;
        wire w = {NULL, 0, 0};
        wire_message got;
        int fd, i;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 10;
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 100; i++) {
            wire_farewell(&w);
            wire_request_fields(&w, "Add", -1, "\x08\x01", 2, 0, fields);
        }
        assert_true(wire_flush(fd, &w));
        for (i = 0; i < 200; i++) {
            assert_int_equal(wire_receive(fd, &got), 1);
            assert_int_equal(got.id, -1);
            assert_false(wire_has_mark(&got, "crpc-farewell"));
            assert_true(got.code == CRPC_OK || got.code == CRPC_ENOSERVICE);
            wire_done(&got);
        }
        assert_int_equal(net_calls(&n.service), 100);
        net_check_add(n.channel, 1);
        assert_int_equal(net_ask(fd, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        close(fd);
        net_close(&n);
    }
}

#define STOPS 4 /* system/sys_farewell.c has more */

/* Two providers stop in turn and come back, without a registry, while several threads call. The
 * methods are not idempotent, so a request that was sent must have its reply. */
static void graceful_stops_lose_no_call(void **state)
{
    crpc_poller p;
    int each;
    (void)state;
    NET_EACH_POLLER(p) for (each = 0; each < 2; each++)
    {
        int ports[2];
        char listen[2][64], list[128];
        net n[2];
        net_callers c;
        pthread_t threads[4];
        crpc_channel_options o;
        size_t i, k;
        memset(n, 0, sizeof n);
        memset(&c, 0, sizeof c);
        memset(&o, 0, sizeof o);
        for (i = 0; i < 2; i++) {
            ports[i] = ct_free_port();
            snprintf(listen[i], sizeof listen[i], "tcp://127.0.0.1:%d", ports[i]);
            n[i].listen = listen[i];
            net_open_server(&n[i], p, each ? NET_IO : NET_WORKERS);
        }
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", ports[0], ports[1]);
        o.policy.timeout_ms = NET_PATIENCE;
        c.channel = net_channel(list, "", p, NULL, &o);
        for (i = 0; i < 4; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, net_call_on, &c), 0);
        for (k = 0; k < STOPS; k++) {
            assert_true(CT_WAIT(net_calls(&n[k % 2].service) > 100, NET_PATIENCE));
            crpc_server_close(n[k % 2].server);
            crpc_loop_close(n[k % 2].loop);
            pthread_mutex_destroy(&n[k % 2].service.lock);
            net_open_server(&n[k % 2], p, each ? NET_IO : NET_WORKERS);
        }
        __atomic_store_n(&c.ended, 1, __ATOMIC_RELEASE);
        for (i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        crpc_channel_close(c.channel);
        for (i = 0; i < 2; i++) {
            crpc_server_close(n[i].server);
            crpc_loop_close(n[i].loop);
            pthread_mutex_destroy(&n[i].service.lock);
        }
        assert_true(c.answered > STOPS * 100);
        assert_int_equal(c.lost, 0);
    }
}

/* The connections of a server that runs on end all the time, by their age: no call fails, although
 * no other provider is there. */
static void ageing_connections_lose_no_call(void **state)
{
    net_mode m;
    (void)state;
    NET_EACH_MODE(m)
    {
        net n;
        net_callers c;
        pthread_t threads[4];
        crpc_loop *l;
        size_t i;
        memset(&n, 0, sizeof n);
        memset(&c, 0, sizeof c);
        n.server_options.max_connection_age_ms = 10;
        n.channel_options.policy.retries = -1;
        net_open(&n, CRPC_POLLER_DEFAULT, m);
        c.channel = n.channel;
        l = crpc_channel_loop(c.channel);
        for (i = 0; i < 4; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, net_call_on, &c), 0);
        for (i = 0; i < 10; i++) {
            uint32_t lost = net_lost(l);
            assert_true(CT_WAIT(net_lost(l) != lost, NET_PATIENCE));
        }
        __atomic_store_n(&c.ended, 1, __ATOMIC_RELEASE);
        for (i = 0; i < 4; i++)
            pthread_join(threads[i], NULL);
        assert_int_equal(c.failed, 0);
        net_close(&n);
    }
}

static void *run_server(void *arg)
{
    assert_int_equal(crpc_server_run((crpc_server *)arg), CRPC_OK);
    return NULL;
}

/* A program's SIGTERM handler stops the loop: crpc_server_run serves for lame_ms, then returns. */
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
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_RUNS);
        o.io_threads = io_threads;
        o.lame_ms = 1000000;
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        assert_int_equal(pthread_create(&runner, NULL, run_server, s), 0);
        fd = wire_connect(url);
        assert_int_equal(net_ask(fd, "Echo", "Add", 1, NULL, NULL), CRPC_OK);
        crpc_loop_stop(crpc_server_loop(s));
        assert_true(CT_WAIT(crpci_thread_load(&s->state) == CRPCI_SERVER_LAME, NET_PATIENCE));
        assert_int_equal(net_ask(fd, "Echo", "Add", 2, NULL, NULL), CRPC_OK);
        close(fd);
        fd = wire_connect(url);
        assert_int_equal(net_ask(fd, "Echo", "Add", 3, NULL, NULL), CRPC_OK);
        time_passes(crpc_server_loop(s), 1000);
        pthread_join(runner, NULL);
        close(fd);
        crpc_server_close(s);
    }
}

/* crpc_server_close waits for lame_ms, driving the loop if nothing else does; without requests to
 * drain it does not wait for drain_ms. */
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
        assert_true(ct_now_ms() - start < 4000); /* less than drain_ms, 5000 */
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
        assert_int_equal(wire_receive(fd, &got), 1);
        assert_int_equal(got.code, CRPC_ECANCELED);
        assert_true(ct_now_ms() - start >= 79);
        wire_done(&got);
        assert_int_equal(wire_receive(fd, &got), 0);
        close(fd);
        net_close(&n);
        assert_true(ct_now_ms() - start < 15000);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
    }
}

/* A handler that holds its thread until the gate is opened. */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    bool open;
} gate = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};

static void gate_set(bool open)
{
    pthread_mutex_lock(&gate.lock);
    gate.open = open;
    pthread_cond_broadcast(&gate.opened);
    pthread_mutex_unlock(&gate.lock);
}

static int waits_at_the_gate(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    (void)out;
    net_begin(x, in->n);
    pthread_mutex_lock(&gate.lock);
    while (!gate.open)
        pthread_cond_wait(&gate.opened, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
    return CRPC_OK;
}

/* Opens a server in which Get waits at the gate. `n` has its options. */
static void open_gated(net *n, crpc_poller p, net_mode m)
{
    static dyn_Echo_handlers handlers;
    handlers = net_handlers;
    handlers.Get = waits_at_the_gate;
    gate_set(false);
    n->handlers = &handlers;
    net_open(n, p, m);
}

/* Reads replies until the end of the stream: codes[id] is what came, 0 if nothing; no id comes
 * twice. Farewells are left out. */
static void read_to_the_end(int fd, int64_t *codes, size_t count)
{
    wire_message got;
    int result;
    memset(codes, 0, count * sizeof *codes);
    while ((result = wire_receive(fd, &got)) == 1) {
        if (got.id != -1) {
            assert_in_range(got.id, 0, count - 1);
            assert_int_equal(codes[got.id], 0);
            codes[got.id] = got.code;
        }
        wire_done(&got);
    }
    assert_int_equal(result, 0);
}

/* At drain_ms each request gets a reply before the connections close: CRPC_ELOGOFF, if its handler
 * was not called and will not be; else CRPC_ECANCELED. 1 is deferred with a key, 2 waits behind it
 * for its turn, 3 and 4 hold the threads, 5 waits for one of them. */
static void requests_are_answered_when_draining_ends(void **state)
{
    static const char *const fields[] = {"crpc-peer", "1", "crpc-key", "a", NULL};
    crpc_poller p;
    net_mode m;
    int foreign;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (foreign = 0; foreign < 2 && m >= NET_IO; foreign++)
    {
        net n;
        wire w = {NULL, 0, 0};
        crpc_context *x;
        int64_t codes[6];
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 100;
        open_gated(&n, p, m);
        fd = wire_connect(n.url);
        wire_request_fields(&w, "Defer", 1, "\x08\x01", 2, 0, fields + 2 * foreign);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        x = net_take(&n.service);
        wire_request_fields(&w, "Add", 2, "\x08\x02", 2, 0, fields + 2);
        wire_request(&w, "Get", 3, 3, 0);
        wire_request(&w, "Get", 4, 4, 0);
        wire_request(&w, "Add", 5, 5, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_calls(&n.service) == (m == NET_WORKERS ? 3 : 2), NET_PATIENCE));
        assert_true(CT_WAIT(crpci_thread_load(&n.server->serving) == 5, NET_PATIENCE));
        crpc_server_stop(n.server);
        read_to_the_end(fd, codes, 6);
        assert_int_equal(codes[1], CRPC_ECANCELED);
        assert_int_equal(codes[2], CRPC_ELOGOFF);
        assert_int_equal(codes[3], CRPC_ECANCELED);
        assert_int_equal(codes[4], m == NET_WORKERS ? CRPC_ECANCELED : CRPC_ELOGOFF);
        assert_int_equal(codes[5], CRPC_ELOGOFF);
        assert_true(crpc_context_cancelled(x));
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        gate_set(true);
        close(fd);
        net_close(&n);
        assert_int_equal(n.service.calls, m == NET_WORKERS ? 3 : 2);
    }
}

/* The tests' own clock stands still when its server is closed with a request that is being served:
 * the server must see the end of it all the same. */
static void closing_ends_while_the_clock_stands_still(void **state)
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
        n.time = NET_TIME_STANDS;
        n.server_options.drain_ms = 30;
        net_open(&n, p, m);
        fd = wire_connect(n.url);
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        x = net_take(&n.service);
        net_close(&n);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
        close(fd);
    }
}

/* A handler blocks a worker or the loop's own thread: crpc_server_close waits for it, and frees
 * nothing that it uses. */
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

static int too_late;

static void never_after(void *user, crpc_context *x, int status)
{
    (void)user;
    (void)x;
    (void)status;
    too_late++;
}

/* A request that is finished after its server was closed uses no memory that the server
 * borrowed. */
static void borrowed_memory_is_not_used_after_the_close(void **state)
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

static int closes_its_server(crpc_context *x, const dyn_Num *in, dyn_Num *out)
{
    (void)x;
    crpc_server_close(server_of_handler); /* takes effect when this request has been answered */
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

/* A timer's callback closes the server; on a given loop and on the server's own. */
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
            crpc_server_stop(s); /* has ended when the timer fires */
            assert_int_equal(crpc_timer_start(l, 100, 0, stop_loop, l, NULL), CRPC_OK);
            assert_int_equal(crpc_loop_run(l), CRPC_OK);
        } else {
            assert_int_equal(crpc_server_run(s), CRPC_OK);
        }
        crpc_loop_close(l);
        assert_int_equal(ct_alloc_of_test()->live_blocks, 0);
    }
}

/* Connections come in while the server closes. */
static void *connect_in_a_storm(void *arg)
{
    const char *url = (const char *)arg;
    int i;
    for (i = 0; i < 400; i++) {
        /* a stopping server may not answer the SYN, which the kernel repeats after a second */
        struct timeval most = {0, 50000};
        struct sockaddr_in a;
        wire w = {NULL, 0, 0};
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most);
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
        assert_int_equal(stats.connections,
                         3); /* three channels share one on their loop, two have private ones */
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

static void close_server_twice(void)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    if (crpc_loop_open(&o.loop, NULL) || crpc_server_open(&s, &o, NULL))
        _exit(2);
    crpc_server_close(s);
    crpc_server_close(s);
}

static void debug_builds_report_a_second_close(void **state)
{
    char text[300];
    (void)state;
    ct_expect_abort(close_server_twice, text, sizeof text);
    assert_string_equal(text, "crpc: crpc_server_close: the object is closed already\n");
}

static void wrong_options_are_refused(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    crpc_error error;
    (void)state;
    o.weight = 1000001;
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "weight=1000001: at most 1000000");
    assert_null(s);
    o.weight = 0;
    o.loops.max_results = -7; /* as -1 */
    o.loops.hooks.log_level = 5;
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "log_level=5: at most 4");
}

/* Half of max_bytes is for large requests, and a request may take half of that. */
static void max_body_is_at_most_a_quarter_of_max_bytes(void **state)
{
    crpc_server_options o;
    crpc_server *s;
    crpc_error error;
    int io;
    (void)state;
    for (io = 0; io < 2; io++) { /* the limit of the loops that serve */
        memset(&o, 0, sizeof o);
        o.io_threads = io;
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        assert_int_equal(s->options.limits.max_body, 64 << 20);
        crpc_server_close(s);
        o.limits.max_body = (64 << 20) + 1;
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_EINVAL);
        assert_string_equal(error.text,
                            "max_body: 67108865 is over a quarter of max_bytes, 268435456; raise "
                            "max_bytes of the loop that serves, or lower max_body");
        o.loops.max_bytes = -1;
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        crpc_server_close(s);
        o.loops.max_bytes = 1 << 20;
        o.limits.max_body = 1 << 18;
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        crpc_server_close(s);
        for (o.limits.max_body = -1; o.limits.max_body <= 0; o.limits.max_body++) {
            assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
            assert_int_equal(s->options.limits.max_body, 1 << 18);
            crpc_server_close(s);
        }
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(debug_builds_report_a_second_close),
        CT_TEST(wrong_options_are_refused),
        CT_TEST(max_body_is_at_most_a_quarter_of_max_bytes),
        CT_TEST(services_are_added_once),
        CT_TEST(a_server_without_a_listener_does_not_start),
        CT_TEST(options_are_copied_when_a_server_opens),
        CT_TEST(nothing_is_added_after_the_start),
        CT_TEST(stopping_finishes_what_runs_and_refuses_the_rest),
        CT_TEST(stopping_serves_then_refuses_then_closes),
        CT_TEST(who_has_connected_before_a_stop_is_answered),
        CT_TEST(partial_requests_do_not_hold_up_a_stop),
        CT_TEST(crpc_peers_are_served_to_the_end_of_their_output),
        CT_TEST(silent_connections_get_the_farewell),
        CT_TEST(half_a_request_is_served_after_the_farewell),
        CT_TEST(a_peer_cannot_take_leave_of_a_server),
        CT_TEST(graceful_stops_lose_no_call),
        CT_TEST(ageing_connections_lose_no_call),
        CT_TEST(run_serves_on_when_its_loop_was_stopped),
        CT_TEST(closing_waits_for_the_end_of_serving),
        CT_TEST(draining_is_bounded),
        CT_TEST(requests_are_answered_when_draining_ends),
        CT_TEST(closing_ends_while_the_clock_stands_still),
        CT_TEST(closing_with_handlers_that_block),
        CT_TEST(run_returns_when_stopped),
        CT_TEST(closing_in_every_state),
        CT_TEST(borrowed_memory_is_not_used_after_the_close),
        CT_TEST(a_handler_may_close_its_server),
        CT_TEST(a_callback_may_close_the_server),
        CT_TEST(closing_in_a_storm_of_connections),
        CT_TEST(many_servers_and_channels_in_one_process),
    };
    return CT_RUN(tests);
}
