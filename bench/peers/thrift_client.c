/* thrift_client: Thrift's c_glib library, framed transport, binary protocol. Several calls can be
 * under way because the generated client lets one send and receive by itself; each is a write. */
#include "bench.h"

#include <thrift/c_glib/protocol/thrift_binary_protocol.h>
#include <thrift/c_glib/transport/thrift_framed_transport.h>
#include <thrift/c_glib/transport/thrift_socket.h>

#include "bench_echo.h"

typedef struct conn {
    void *socket, *transport, *protocol, *client;
} conn;

static void must(gboolean ok, GError *error)
{
    if (!ok || error) {
        bench_die("thrift: %s", error ? error->message : "failed");
    }
}

static void *open_conn(int port)
{
    conn *c = calloc(1, sizeof *c);
    GError *error = NULL;
    c->socket = g_object_new(THRIFT_TYPE_SOCKET, "hostname", "127.0.0.1", "port", port, NULL);
    c->transport = g_object_new(THRIFT_TYPE_FRAMED_TRANSPORT, "transport", c->socket, NULL);
    c->protocol = g_object_new(THRIFT_TYPE_BINARY_PROTOCOL, "transport", c->transport, NULL);
    c->client = g_object_new(BENCH_TYPE_ECHO_CLIENT, "input_protocol", c->protocol,
                             "output_protocol", c->protocol, NULL);
    for (int i = 0; !thrift_transport_open(THRIFT_TRANSPORT(c->transport), &error); i++) {
        if (i == 100) {
            must(FALSE, error);
        }
        g_clear_error(&error); /* the server may not listen yet */
        usleep(10000);
    }
    return c;
}

static void close_conn(void *conn_)
{
    conn *c = conn_;
    thrift_transport_close(THRIFT_TRANSPORT(c->transport), NULL);
    g_object_unref(c->client);
    g_object_unref(c->protocol);
    g_object_unref(c->transport);
    g_object_unref(c->socket);
    free(c);
}

static void call(void *conn_, int slot)
{
    gchar *text = NULL;
    GError *error = NULL;
    must(bench_echo_if_call(((conn *)conn_)->client, &text, bench_payload(slot), &error), error);
    bench_check(slot, text, strlen(text));
    g_free(text);
}

static void start(void *conn_, int slot)
{
    GError *error = NULL;
    must(bench_echo_client_send_call(((conn *)conn_)->client, bench_payload(slot), &error), error);
}

/* Replies come in the order of the requests, and there is always one to wait for. */
static void poll_conn(void *conn_, bool wait)
{
    gchar *text = NULL;
    GError *error = NULL;
    (void)wait;
    must(bench_echo_client_recv_call(((conn *)conn_)->client, &text, &error), error);
    bench_end(bench_slot(text), text, strlen(text));
    g_free(text);
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call, NULL, start,
                                    poll_conn, false,      NULL, NULL};
    if (argc > 3 && (!strcmp(argv[3], "conns") || !strcmp(argv[3], "idle") ||
                     !strcmp(argv[3], "open"))) {
        return 3; /* several connections; receiving without waiting */
    }
    return bench_main(&peer, argc, argv);
}
