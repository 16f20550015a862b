/* zmq_client: a DEALER socket for each connection. Replies come in the order of the requests. */
#include "bench.h"

#include <zmq.h>

static void *context;

static void *open_conn(int port)
{
    char endpoint[64];
    int none = 0;
    void *socket = zmq_socket(context, ZMQ_DEALER);
    if (!socket) {
        bench_die("zmq_socket: %s", zmq_strerror(zmq_errno()));
    }
    snprintf(endpoint, sizeof endpoint, "tcp://127.0.0.1:%d", port);
    zmq_setsockopt(socket, ZMQ_LINGER, &none, sizeof none);
    if (zmq_connect(socket, endpoint) != 0) {
        bench_die("zmq_connect: %s", zmq_strerror(zmq_errno()));
    }
    return socket;
}

static void close_conn(void *conn)
{
    zmq_close(conn);
}

static void start(void *conn, int slot)
{
    if (zmq_send(conn, bench_payload(slot), bench.size, 0) < 0) {
        bench_die("zmq_send: %s", zmq_strerror(zmq_errno()));
    }
}

static bool receive(void *conn, bool wait, void (*take)(int slot, const char *, size_t))
{
    zmq_msg_t message;
    zmq_msg_init(&message);
    if (zmq_msg_recv(&message, conn, wait ? 0 : ZMQ_DONTWAIT) < 0) {
        return false;
    }
    take(bench_slot((const char *)zmq_msg_data(&message)),
         (const char *)zmq_msg_data(&message), zmq_msg_size(&message));
    zmq_msg_close(&message);
    return true;
}

static void call(void *conn, int slot)
{
    start(conn, slot);
    receive(conn, true, bench_check);
}

static void poll_conn(void *conn, bool wait)
{
    for (int i = 0; i < 64 && receive(conn, wait && i == 0, bench_end); i++) {
    }
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call,  NULL, start,
                                    poll_conn, false,      NULL, NULL};
    context = zmq_ctx_new();
    zmq_ctx_set(context, ZMQ_MAX_SOCKETS, 15000);
    return bench_main(&peer, argc, argv);
}
