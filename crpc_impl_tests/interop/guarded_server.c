/* guarded_server: the echo service for peers that know the credential "open sesame". Prints where it
 * listens, and serves until its standard input ends. run.py calls it. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <stdio.h>
#include <string.h>

static int authenticate(void *user, const char *peer, crpc_view credential, crpc_identity *identity)
{
    (void)user, (void)peer;
    if (!crpc_secret_equal(credential, crpc_view_str("open sesame")))
        return CRPC_EAUTH;
    strcpy(identity->name, "ali");
    return CRPC_OK;
}

/* Only a request whose sender was authenticated is answered with its own text. */
static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    const char *who = crpc_context_identity(context);
    response->message = who && strcmp(who, "ali") == 0 ? request->message : crpc_view_str("whose?");
    return CRPC_OK;
}

static const example_EchoService_handlers handlers = {echo};

static void on_input(void *user, int fd, unsigned events)
{
    (void)fd, (void)events;
    crpc_loop_stop((crpc_loop *)user);
}

int main(void)
{
    crpc_server_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    crpc_server *server = NULL;
    char address[CRPC_ADDRESS_MAX + 8];
    crpc_id watch;
    int status;
    options.access.authenticate = authenticate;
    status = crpc_server_open(&server, &options, &error);
    if (!status)
        status = crpc_server_listen(server, "tcp://127.0.0.1:0", &error);
    if (!status)
        status = crpc_server_add(server, &example_EchoService, &handlers, NULL);
    if (!status)
        status = crpc_server_start(server, &error);
    if (!status)
        status = crpc_server_address(server, 0, address, sizeof address);
    if (!status)
        status = crpc_loop_watch(crpc_server_loop(server), 0, CRPC_READABLE, on_input,
                                 crpc_server_loop(server), &watch);
    if (!status) {
        printf("listening on %s\n", address);
        fflush(stdout);
        status = crpc_server_run(server);
    }
    if (status)
        fprintf(stderr, "guarded_server: %s: %s\n", crpc_status_name(status), error.text);
    crpc_server_close(server);
    return status != CRPC_OK;
}
