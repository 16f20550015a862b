/* crpc_server [LISTENERS]: answers with the text and the attachment of the request. Serves on one
 * thread; with LISTENERS > 1 at that many consecutive ports. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int echo(crpc_context *context, const wire_Echo *request, wire_Echo *response)
{
    response->text = request->text;
    return crpc_context_set_attachment(context, crpc_context_attachment(context));
}

/* Finds `count` free ports in a row by trying. */
static int open_server(crpc_server **server, int count)
{
    crpc_server_options options = CRPC_INIT;
    char url[CRPC_ADDRESS_MAX];
    options.max_connections = -1;
    for (int first = 20000; first < 30000; first += count) {
        int status = crpc_server_open(server, &options, NULL), i;
        for (i = 0; status == CRPC_OK && i < count; i++) {
            snprintf(url, sizeof url, "tcp://127.0.0.1:%d", count == 1 ? 0 : first + i);
            status = crpc_server_listen(*server, url, NULL);
        }
        if (status != CRPC_EADDRESS) {
            return status;
        }
        crpc_server_close(*server);
    }
    return CRPC_EADDRESS;
}

int main(int argc, char **argv)
{
    static const wire_EchoService_handlers handlers = {echo};
    crpc_server *server;
    char url[CRPC_ADDRESS_MAX];
    int status = open_server(&server, argc > 1 ? atoi(argv[1]) : 1);
    if (status == CRPC_OK) {
        status = crpc_server_add(server, &wire_EchoService, &handlers, NULL);
    }
    if (status == CRPC_OK) {
        status = crpc_server_start(server, NULL);
    }
    if (status == CRPC_OK) {
        status = crpc_server_address(server, 0, url, sizeof url);
    }
    if (status == CRPC_OK) {
        printf("%d\n", atoi(strrchr(url, ':') + 1));
        fflush(stdout);
        status = crpc_server_run(server);
    }
    fprintf(stderr, "crpc_server: %s\n", crpc_status_name(status));
    return 1;
}
