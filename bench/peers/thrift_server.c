/* thrift_server: Thrift's c_glib library, framed transport, binary protocol, and the only server it
 * has, which serves one connection at a time. */
#include <stdio.h>
#include <thrift/c_glib/protocol/thrift_binary_protocol_factory.h>
#include <thrift/c_glib/server/thrift_simple_server.h>
#include <thrift/c_glib/transport/thrift_framed_transport_factory.h>
#include <thrift/c_glib/transport/thrift_server_socket.h>

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bench_echo.h"

/* GObject's long way of overriding one method. */
typedef struct {
    benchEchoHandler parent;
} BenchHandler;
typedef struct {
    benchEchoHandlerClass parent;
} BenchHandlerClass;
G_DEFINE_TYPE(BenchHandler, bench_handler, BENCH_TYPE_ECHO_HANDLER)

static gboolean call(benchEchoIf *self, gchar **result, const gchar *text, GError **error)
{
    (void)self;
    (void)error;
    g_free(*result);
    *result = g_strdup(text);
    return TRUE;
}

static void bench_handler_init(BenchHandler *self)
{
    (void)self;
}

static void bench_handler_class_init(BenchHandlerClass *class_)
{
    class_->parent.call = call;
}

/* The library does not tell which port it was given. */
static int free_port(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    bind(fd, (struct sockaddr *)&address, size);
    getsockname(fd, (struct sockaddr *)&address, &size);
    close(fd);
    return ntohs(address.sin_port);
}

int main(void)
{
    int port = free_port();
    GError *error = NULL;
    void *handler = g_object_new(bench_handler_get_type(), NULL);
    void *processor = g_object_new(BENCH_TYPE_ECHO_PROCESSOR, "handler", handler, NULL);
    void *socket = g_object_new(THRIFT_TYPE_SERVER_SOCKET, "port", port, NULL);
    void *server = g_object_new(
        THRIFT_TYPE_SIMPLE_SERVER, "processor", processor, "server_transport", socket,
        "input_transport_factory", g_object_new(THRIFT_TYPE_FRAMED_TRANSPORT_FACTORY, NULL),
        "output_transport_factory", g_object_new(THRIFT_TYPE_FRAMED_TRANSPORT_FACTORY, NULL),
        "input_protocol_factory", g_object_new(THRIFT_TYPE_BINARY_PROTOCOL_FACTORY, NULL),
        "output_protocol_factory", g_object_new(THRIFT_TYPE_BINARY_PROTOCOL_FACTORY, NULL), NULL);
    /* The library listens only in serve: the clients may have to try twice. */
    printf("%d\n", port);
    fflush(stdout);
    thrift_server_serve(THRIFT_SERVER(server), &error);
    fprintf(stderr, "thrift_server: %s\n", error ? error->message : "ended");
    return 1;
}
