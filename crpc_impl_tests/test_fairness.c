/* How a server divides its time and its memory for replies between hosts. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_pump.h"

/* How many handlers began before that of request `n`. */
static int place_of(net_service *s, int64_t n)
{
    int place = 0;
    pthread_mutex_lock(&s->lock);
    while (place < s->calls && s->order[place] != n)
        place++;
    pthread_mutex_unlock(&s->lock);
    return place;
}

static void ask(int fd, int64_t first, int count, int64_t ms)
{
    wire w = {NULL, 0, 0};
    int i;
    for (i = 0; i < count; i++)
        wire_request(&w, "Add", first + i, first + i, ms);
    assert_true(wire_flush(fd, &w));
}

/* Without accounts the requests of all hosts wait in one queue. */
#if CRPC_ENABLE_POLICY

static void a_host_with_many_requests_does_not_delay_others(void **state)
{
    enum { MANY = 100, OTHER = 1000 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpci_conn *c;
        pump u;
        int greedy, honest;
        pump_open(&u, p, WAY_TCP, NULL);
        greedy = pump_connect_from(&u, "127.0.0.2", &c);
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        ask(greedy, 0, MANY, 0);
        ask(honest, OTHER, 1, 0);
        PUMP_UNTIL(&u, net_calls(&u.service) == MANY + 1);
        assert_in_range(place_of(&u.service, OTHER), 0, 2); /* not the last */
        close(greedy);
        close(honest);
        pump_close(&u);
    }
}

/* Requests that are in service, but wait for nothing of the server, do not keep others from being
 * read. */
static void deferred_requests_do_not_stop_the_reading(void **state)
{
    enum { MANY = 4000 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire w = {NULL, 0, 0};
        crpci_conn *c;
        pump u;
        int fd, i;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect_from(&u, "127.0.0.2", &c);
        for (i = 0; i < MANY; i++)
            wire_request(&w, "Defer", i, i, 0);
        pump_push(&u, fd, w.p, w.n);
        wire_free(&w);
        PUMP_UNTIL(&u, net_held(&u.service) == MANY);
        for (i = 0; i < MANY; i++)
            assert_int_equal(crpc_context_finish(net_take(&u.service), CRPC_OK), CRPC_OK);
        close(fd);
        pump_close(&u);
    }
}

/* The handlers take longer than the loop runs handlers without a look at its descriptors. */
static void requests_that_arrive_while_handlers_run_are_not_last(void **state)
{
    enum { MANY = 30, OTHER = 1000 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpci_conn *c;
        pump u;
        int greedy, honest, before;
        pump_open(&u, p, WAY_TCP, NULL);
        greedy = pump_connect_from(&u, "127.0.0.2", &c);
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        ask(greedy, 0, MANY, 2);
        PUMP_UNTIL(&u, net_calls(&u.service) > 0);
        before = net_calls(&u.service);
        assert_in_range(before, 1, 4);
        ask(honest, OTHER, 1, 0);
        PUMP_UNTIL(&u, place_of(&u.service, OTHER) < net_calls(&u.service));
        assert_in_range(place_of(&u.service, OTHER), before, before + 4);
        PUMP_UNTIL(&u, net_calls(&u.service) == MANY + 1);
        close(greedy);
        close(honest);
        pump_close(&u);
    }
}

enum { DEAF = 4, ASKED = 15, REPLY = 32000, MOST = 8 << 20, HOST = MOST / 16 };

/* DEAF connections of one host ask for 2 MiB of replies and read none of them. */
static void be_deaf(pump *u, int *fds)
{
    char *bytes = net_bytes(REPLY);
    wire_request_options ro;
    wire w = {NULL, 0, 0};
    int i, small = 32768, sndbuf = 65536;
    memset(&ro, 0, sizeof ro);
    ro.attachment = REPLY;
    for (i = 0; i < ASKED; i++)
        wire_request_body(&w, "dyn.Echo", "Pass", i, bytes, REPLY, &ro);
    for (i = 0; i < DEAF; i++) {
        crpci_conn *c;
        fds[i] = pump_connect_from(u, "127.0.0.2", &c);
        setsockopt(fds[i], SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &sndbuf, sizeof sndbuf);
        pump_push(u, fds[i], w.p, w.n);
    }
    wire_free(&w);
    free(bytes);
    PUMP_UNTIL(u, u->loop->held_hosts);
}

static void read_all(const int *fds)
{
    static char bytes[1 << 16];
    int i;
    for (i = 0; i < DEAF; i++)
        while (recv(fds[i], bytes, sizeof bytes, MSG_DONTWAIT) > 0)
            continue;
}

static void deaf_options(crpc_server_options *o, int workers)
{
    memset(o, 0, sizeof *o);
    o->workers = workers;
    o->loops.max_bytes = MOST;
}

static void a_host_that_takes_no_replies_is_not_served_meanwhile(void **state)
{
    int workers;
    (void)state;
    for (workers = 0; workers < 2; workers++) {
        crpc_server_options o;
        int fds[DEAF], honest, i, calls;
        wire_message m;
        crpci_conn *c;
        pump u;
        deaf_options(&o, workers);
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS); /* or the connections would be closed after a second */
        pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
        be_deaf(&u, fds);
        for (i = 0; i < 100; i++) /* a worker may be about to begin one more */
            assert_int_equal(crpc_loop_step(u.loop, workers), CRPC_OK);
        assert_in_range(u.loop->unsent, HOST / 2, HOST + 3 * REPLY);
        calls = net_calls(&u.service);
        assert_in_range(calls, 1, DEAF * ASKED - 1);
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        ask(honest, 1000, 1, 0);
        pump_receive(&u, honest, &m);
        assert_int_equal(m.code, 0);
        wire_done(&m);
        assert_int_equal(net_calls(&u.service), calls + 1);
        PUMP_UNTIL(&u, (read_all(fds), net_calls(&u.service) == DEAF * ASKED + 1));
        PUMP_UNTIL(&u, (read_all(fds), u.loop->unsent == 0));
        assert_int_equal(u.loop->held_hosts, 0);
        for (i = 0; i < DEAF; i++)
            close(fds[i]);
        close(honest);
        net_time_run();
        pump_close(&u);
    }
}

/* One that takes its replies shares the host's address with others that do not. */
static void connections_that_hold_their_host_end_after_a_second(void **state)
{
    int workers;
    (void)state;
    for (workers = 0; workers < 2; workers++) {
        crpc_server_options o;
        int fds[DEAF], honest, i;
        wire_message m;
        crpci_conn *c;
        pump u;
        deaf_options(&o, workers);
        o.loops.hooks.clock_us = net_clock_us;
        net_time_begin(NET_TIME_STANDS);
        pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
        be_deaf(&u, fds);
        honest = pump_connect_from(&u, "127.0.0.2", &c);
        ask(honest, 1000, 1, 0);
        net_time_add(900);
        for (i = 0; i < 20; i++)
            assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
        assert_int_equal(pump_stats(&u).evicted, 0);
        assert_int_equal(u.loop->held_hosts, 1);
        net_time_add(600);
        PUMP_UNTIL(&u, pump_stats(&u).evicted > 0);
        net_time_run();
        pump_receive(&u, honest, &m);
        assert_int_equal(m.code, 0);
        wire_done(&m);
        for (i = 0; i < DEAF; i++)
            close(fds[i]);
        close(honest);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        assert_int_equal(u.loop->held_hosts, 0);
        pump_close(&u);
    }
}

/* Without write_timeout_ms, too, the kernel's buffer tells which peer takes something. */
static void a_peer_of_a_held_host_that_takes_something_stays(void **state)
{
    crpc_server_options o;
    crpci_list *l;
    int fds[DEAF], i;
    pump u;
    (void)state;
    deaf_options(&o, 0);
    o.write_timeout_ms = -1;
    o.loops.hooks.clock_us = net_clock_us;
    net_time_begin(NET_TIME_STANDS);
    pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
    be_deaf(&u, fds);
    for (l = u.loop->conns.next; l != &u.loop->conns; l = l->next) /* more was in the buffer */
        CRPCI_CONTAINER(l, crpci_conn, link)->stalled_bytes = INT_MAX;
    net_time_add(1500);
    for (i = 0; i < 20; i++)
        assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
    assert_int_equal(pump_stats(&u).evicted, 0);
    net_time_add(1500);
    PUMP_UNTIL(&u, pump_stats(&u).evicted > 0);
    net_time_run();
    for (i = 0; i < DEAF; i++)
        close(fds[i]);
    pump_close(&u);
}

static void a_server_ends_while_hosts_are_held(void **state)
{
    int workers;
    (void)state;
    for (workers = 0; workers < 2; workers++) {
        crpc_server_options o;
        int fds[DEAF], i;
        pump u;
        deaf_options(&o, workers);
        pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, &o);
        be_deaf(&u, fds);
        pump_close(&u); /* leaks nothing */
        for (i = 0; i < DEAF; i++)
            close(fds[i]);
    }
}
#endif

/* The kernel takes little more than the peer's window, so that what a peer does not read costs
 * the server neither the copying nor memory of the kernel. */
static void the_kernel_keeps_little_for_a_peer_that_does_not_read(void **state)
{
    enum { SIZE = 1 << 20 };
    char *bytes = net_bytes(SIZE);
    wire_request_options ro;
    wire w = {NULL, 0, 0};
    int fd, i, small = 4096;
    crpci_conn *c;
    pump u;
    (void)state;
    memset(&ro, 0, sizeof ro);
    ro.attachment = SIZE;
    for (i = 0; i < 3; i++)
        wire_request_body(&w, "dyn.Echo", "Pass", i, bytes, SIZE, &ro);
    pump_open(&u, CRPC_POLLER_DEFAULT, WAY_TCP, NULL);
    fd = pump_connect_from(&u, "127.0.0.1", &c);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    pump_push(&u, fd, w.p, w.n);
    PUMP_UNTIL(&u, c->blocked);
    assert_in_range(crpci_sock_unsent(c->fd), 1, 3 * CRPCI_SOCK_UNSENT);
    close(fd);
    wire_free(&w);
    free(bytes);
    pump_close(&u);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
#if CRPC_ENABLE_POLICY
        CT_TEST(a_host_with_many_requests_does_not_delay_others),
        CT_TEST(deferred_requests_do_not_stop_the_reading),
        CT_TEST(requests_that_arrive_while_handlers_run_are_not_last),
        CT_TEST(a_host_that_takes_no_replies_is_not_served_meanwhile),
        CT_TEST(connections_that_hold_their_host_end_after_a_second),
        CT_TEST(a_peer_of_a_held_host_that_takes_something_stays),
        CT_TEST(a_server_ends_while_hosts_are_held),
#endif
        CT_TEST(the_kernel_keeps_little_for_a_peer_that_does_not_read),
    };
    return CT_RUN(tests);
}
