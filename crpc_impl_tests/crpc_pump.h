/* A server that the test's own thread steps, so that the test decides which bytes arrive when. */
#ifndef CRPC_PUMP_H_INCLUDED
#define CRPC_PUMP_H_INCLUDED

#include "crpc_net.h"

typedef struct pump {
    crpc_loop *loop;
    crpc_server *server;
    net_service service;
    char url[160];
    ct_dir dir;
    bool in_dir;
} pump;

typedef enum way { WAY_TCP, WAY_UNIX, WAY_PAIR, WAYS } way;

static CT_UNUSED void pump_open(pump *u, crpc_poller p, way w, const crpc_server_options *options)
{
    crpc_server_options o;
    crpc_loop_options lo = net_loop_options(p);
    crpc_error error;
    char listen_url[128] = "tcp://127.0.0.1:0";
    memset(&o, 0, sizeof o);
    if (options)
        o = *options;
    memset(u, 0, sizeof *u);
    net_service_init(&u->service);
    u->in_dir = w == WAY_UNIX;
    if (u->in_dir) {
        u->dir = ct_dir_make();
        snprintf(listen_url, sizeof listen_url, "unix://%s/socket", u->dir.path);
    }
    if (o.loops.hooks.clock_us)
        lo.hooks.clock_us = o.loops.hooks.clock_us;
    lo.max_bytes = o.loops.max_bytes;
    if (o.loops.hooks.log) {
        lo.hooks.log = o.loops.hooks.log;
        lo.hooks.log_level = CRPC_LOG_WARN;
    }
    assert_int_equal(crpc_loop_open(&u->loop, &lo), CRPC_OK);
    o.loop = u->loop;
    o.listen = listen_url;
    if (crpc_server_open(&u->server, &o, &error))
        fail_msg("%s", error.text);
    assert_int_equal(crpc_server_add(u->server, &dyn_Echo, &net_handlers, &u->service), CRPC_OK);
    assert_int_equal(crpc_server_start(u->server, &error), CRPC_OK);
    assert_int_equal(crpc_server_address(u->server, 0, u->url, sizeof u->url), CRPC_OK);
}

static CT_UNUSED void pump_close(pump *u)
{
    crpc_server_close(u->server);
    crpc_loop_close(u->loop);
    pthread_mutex_destroy(&u->service.lock);
    if (u->in_dir)
        ct_dir_remove(u->dir);
}

static CT_UNUSED crpc_loop_stats pump_stats(pump *u)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(u->loop, &stats);
    return stats;
}

static CT_UNUSED void pump_step(pump *u)
{
    assert_int_equal(crpc_loop_step(u->loop, 1), CRPC_OK);
}

/* Steps until the condition holds; fails if it never does. */
#define PUMP_UNTIL(u, condition)                                                                   \
    do {                                                                                           \
        int64_t pump_end_ = ct_now_ms() + NET_PATIENCE;                                            \
        while (!(condition)) {                                                                     \
            pump_step(u);                                                                          \
            if (ct_now_ms() > pump_end_)                                                           \
                fail_msg("never: %s", #condition);                                                 \
        }                                                                                          \
    } while (0)

static CT_UNUSED int pump_connect(pump *u, way w)
{
    int fds[2], fd;
    uint32_t before = pump_stats(u).connections;
    struct timeval patience = {NET_PATIENCE / 1000, 0};
    crpci_sock_name name;
    if (w == WAY_PAIR) {
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        fcntl(fds[1], F_SETFL, O_NONBLOCK);
        memset(&name, 0, sizeof name);
        name.kind = CRPCI_SOCK_UNIX;
        crpci_listener_share(u->server, fds[1], &name);
        setsockopt(fds[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        fd = fds[0];
    } else {
        fd = wire_connect(u->url);
    }
    PUMP_UNTIL(u, pump_stats(u).connections == before + 1);
    return fd;
}

/* Sends and makes sure that the server has received it on its own. */
static CT_UNUSED void pump_send(pump *u, int fd, const void *bytes, size_t n)
{
    uint64_t before = pump_stats(u).receives;
    if (!n)
        return;
    assert_true(wire_send(fd, bytes, n));
    PUMP_UNTIL(u, pump_stats(u).receives > before);
}

static CT_UNUSED void expect_reply(int fd, int64_t id, int64_t n)
{
    wire_message m;
    assert_int_equal(wire_receive(fd, &m), 1);
    assert_int_equal(m.id, id);
    assert_int_equal(m.code, 0);
    assert_true(m.has_response && m.has_code && m.has_compress && m.has_id);
    assert_int_equal(m.n, n);
    wire_done(&m);
}

/* The peer's connection is at its end, however it was ended. */
static CT_UNUSED void expect_end(pump *u, int fd)
{
    char c;
    ssize_t n;
    PUMP_UNTIL(u, pump_stats(u).connections == 0);
    do {
        n = recv(fd, &c, 1, 0);
    } while (n > 0);
    assert_true(n == 0 || errno == ECONNRESET);
}

/* A connection from an address of its own, and the server's side of it. */
static CT_UNUSED int pump_connect_from(pump *u, const char *from, crpci_conn **c)
{
    uint32_t before = pump_stats(u).connections;
    int fd = wire_connect_from(u->url, from);
    PUMP_UNTIL(u, pump_stats(u).connections == before + 1);
    *c = CRPCI_CONTAINER(u->loop->conns.prev, crpci_conn, link);
    return fd;
}

/* Sends what the server takes: until all is sent, or nothing more goes out for some steps. */
static CT_UNUSED size_t pump_push(pump *u, int fd, const void *bytes, size_t n)
{
    size_t sent = 0;
    int idle;
    for (idle = 0; idle < 50 && sent < n; idle++) {
        ssize_t more = send(fd, (const char *)bytes + sent, n - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (more > 0) {
            sent += (size_t)more;
            idle = 0;
        }
        assert_int_equal(crpc_loop_step(u->loop, 0), CRPC_OK);
    }
    return sent;
}

/* Reads the frame of a reply, however large, while the server runs. */
static CT_UNUSED void pump_receive(pump *u, int fd, wire_message *m)
{
    size_t size = 12, got = 0;
    unsigned char *frame = (unsigned char *)malloc(size);
    int64_t end = ct_now_ms() + NET_PATIENCE;
    while (got < size) {
        ssize_t n = recv(fd, frame + got, size - got, MSG_DONTWAIT);
        assert_true(n > 0 || (n < 0 && errno == EAGAIN));
        got += n > 0 ? (size_t)n : 0;
        if (size == 12 && got == 12) {
            size += crpci_base_get32(frame + 4);
            frame = (unsigned char *)realloc(frame, size);
        }
        assert_int_equal(crpc_loop_step(u->loop, 0), CRPC_OK);
        assert_true(ct_now_ms() < end);
    }
    memset(m, 0, sizeof *m);
    m->all = frame;
    wire_walk(m, frame + 12, frame + 12 + crpci_base_get32(frame + 8), 0);
}

static CT_UNUSED wire three_requests(void)
{
    wire w = {NULL, 0, 0};
    wire_request(&w, "Add", 101, 1, 0);
    wire_request(&w, "Get", 0, 300, 0);
    wire_request(&w, "Add", -7, 70000, 0);
    return w;
}

#endif /* CRPC_PUMP_H_INCLUDED */
