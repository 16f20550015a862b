/* tirpc_client: ONC RPC calls wait, each; threads that share a handle take turns. */
#include "bench.h"

#include "tirpc.h"

static void *open_conn(int port)
{
    struct sockaddr_in address;
    int fd = RPC_ANYSOCK, one = 1;
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    CLIENT *client = clnttcp_create(&address, BENCH_PROGRAM, BENCH_VERSION, &fd, 0, 0);
    if (!client) {
        bench_die("%s", clnt_spcreateerror("tirpc"));
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return client;
}

static void close_conn(void *conn)
{
    clnt_destroy((CLIENT *)conn);
}

/* What rpcgen's stub does, without its static result, which threads cannot share. */
static void call(void *conn, int slot)
{
    static const struct timeval timeout = {10, 0};
    char *request = bench.payload[slot], *response = NULL;
    if (clnt_call((CLIENT *)conn, CALL, (xdrproc_t)xdr_text, (caddr_t)&request,
                  (xdrproc_t)xdr_text, (caddr_t)&response, timeout) != RPC_SUCCESS) {
        bench_die("%s", clnt_sperror((CLIENT *)conn, "tirpc"));
    }
    bench_check(slot, response, strlen(response));
    free(response);
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call, NULL, NULL, NULL,
                                    true,      NULL,       NULL};
    return bench_main(&peer, argc, argv);
}
