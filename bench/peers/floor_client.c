/* floor_client: the least that a client of floor_server can do. One send, one poll and one recv for
 * a call, or for as many as are outstanding. With BENCH_UNBATCHED a send for each call. */
#include "bench.h"

#include <poll.h>
#include <sys/socket.h>

typedef struct conn {
    int fd;
    char *out, *in;
    size_t out_size, in_size, queued, filled;
} conn;

static bool unbatched;

static void *open_conn(int port)
{
    struct sockaddr_in address;
    conn *c = (conn *)calloc(1, sizeof *c);
    int one = 1;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) != 0) {
        bench_die("connect: %s", strerror(errno));
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    c->out_size = c->in_size = bench.size + 4 > 65536 ? bench.size + 4 : 65536;
    c->out = malloc(c->out_size);
    c->in = malloc(c->in_size);
    return c;
}

static void close_conn(void *conn_)
{
    conn *c = conn_;
    close(c->fd);
    free(c->out);
    free(c->in);
    free(c);
}

static void send_all(conn *c, const char *bytes, size_t size)
{
    while (size > 0) { /* floor_server reads on while this blocks */
        ssize_t n = send(c->fd, bytes, size, 0);
        if (n <= 0) {
            bench_die("send: %s", strerror(errno));
        }
        bytes += n;
        size -= (size_t)n;
    }
}

static void receive(conn *c, bool wait)
{
    struct pollfd p = {c->fd, POLLIN, 0};
    if (wait) {
        poll(&p, 1, -1);
    }
    ssize_t n = recv(c->fd, c->in + c->filled, c->in_size - c->filled, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        bench_die("the connection is gone");
    }
    c->filled += n > 0 ? (size_t)n : 0;
}

/* A message with its size in front of it, in one piece. */
static const char *framed(int slot)
{
    char *frame = bench.payload[slot] - 4;
    uint32_t size = (uint32_t)bench.size;
    memcpy(frame, &size, 4);
    return frame;
}

static void call(void *conn_, int slot)
{
    conn *c = conn_;
    uint32_t size;
    send_all(c, framed(slot), bench.size + 4);
    c->filled = 0;
    do {
        receive(c, true);
        memcpy(&size, c->in, 4);
    } while (c->filled < 4 || c->filled < 4 + (size_t)size);
    bench_check(slot, c->in + 4, size);
}

static void start(void *conn_, int slot)
{
    conn *c = conn_;
    size_t size = bench.size + 4;
    if (unbatched) {
        send_all(c, framed(slot), size);
        return;
    }
    if (c->queued + size > c->out_size) {
        c->out_size = (c->out_size + size) * 2;
        c->out = realloc(c->out, c->out_size);
    }
    memcpy(c->out + c->queued, framed(slot), size);
    c->queued += size;
}

static void poll_conn(void *conn_, bool wait)
{
    conn *c = conn_;
    size_t at = 0;
    uint32_t size = 0;
    if (c->queued > 0) {
        size_t queued = c->queued;
        c->queued = 0;
        send_all(c, c->out, queued);
    }
    receive(c, wait);
    for (; c->filled - at >= 4; at += 4 + size) {
        memcpy(&size, c->in + at, 4);
        if (c->filled - at - 4 < size) {
            break;
        }
        bench_end(bench_slot(c->in + at + 4), c->in + at + 4, size);
    }
    c->filled -= at;
    memmove(c->in, c->in + at, c->filled);
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {
        open_conn, close_conn, call, call, start, poll_conn, false, NULL, NULL};
    unbatched = getenv("BENCH_UNBATCHED") != NULL;
    return bench_main(&peer, argc, argv);
}
