/* echo_server: a small but complete server.
 *
 *   echo_server URL...        URL: tcp://host:port (port 0: any free one) or unix:///path
 *
 *   $ echo_server tcp://127.0.0.1:8000 unix:///tmp/echo.sock
 *   listening on tcp://127.0.0.1:8000
 *   listening on unix:///tmp/echo.sock
 *
 * Answers example.EchoService.Echo with the message and the attachment of the request. On SIGTERM
 * or SIGINT it finishes the requests in service and exits with 0. brpc's echo_client can call it
 * too.
 *
 * Shows: several listeners, views (texts of any length, not copied), attachments, a clean end.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <signal.h>
#include <stdio.h>

static crpc_loop *loop_to_stop;

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop_to_stop); /* the only crpc function that a signal handler may call */
}

static int catch_signals(crpc_loop *loop)
{
    struct sigaction action = CRPC_INIT;

    loop_to_stop = loop;
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGTERM, &action, NULL) != 0 || sigaction(SIGINT, &action, NULL) != 0) {
        perror("echo_server: sigaction");
        return CRPC_ESYSTEM;
    }
    return CRPC_OK;
}

/* The handler. The request's bytes stay valid until the reply is finished, so views of the response
 * may point into the request. */
static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    response->message = request->message;
    return crpc_context_set_attachment(context, crpc_context_attachment(context));
}

static const example_EchoService_handlers handlers = {echo};

static int complain(int status, const char *what, const char *detail)
{
    fprintf(stderr, "echo_server: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

static int listen_on_all(crpc_server *server, char **urls, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        crpc_error error = CRPC_INIT;
        int status = crpc_server_listen(server, urls[i], &error);
        if (status != CRPC_OK) {
            return complain(status, urls[i], error.text);
        }
    }
    return CRPC_OK;
}

/* Prints the real addresses: with port 0 the system has chosen a port. */
static void print_listeners(crpc_server *server)
{
    char url[CRPC_ADDRESS_MAX + 8];
    size_t i;

    for (i = 0; crpc_server_address(server, i, url, sizeof url) == CRPC_OK; i++) {
        printf("listening on %s\n", url);
    }
    fflush(stdout);
}

static int serve(crpc_server *server, char **urls, int count)
{
    crpc_error error = CRPC_INIT;
    int status = crpc_server_add(server, &example_EchoService, &handlers, NULL);

    if (status != CRPC_OK) {
        return complain(status, "adding the service", "");
    }
    status = listen_on_all(server, urls, count);
    if (status != CRPC_OK) {
        return status;
    }
    status = catch_signals(crpc_server_loop(server));
    if (status != CRPC_OK) {
        return status;
    }
    status = crpc_server_start(server, &error);
    if (status != CRPC_OK) {
        return complain(status, "starting", error.text);
    }
    print_listeners(server);
    status = crpc_server_run(server); /* until a signal stops its loop */
    return status == CRPC_OK ? status : complain(status, "running", "");
}

int main(int argc, char **argv)
{
    crpc_server *server = NULL;
    crpc_error error = CRPC_INIT;
    int status;

    if (argc < 2 || argv[1][0] == '-') {
        fprintf(stderr, "usage: echo_server URL...    (tcp://host:port or unix:///path)\n");
        return 2;
    }
    status = crpc_server_open(&server, NULL, &error);
    if (status != CRPC_OK) {
        complain(status, "opening", error.text);
        return 1;
    }
    status = serve(server, argv + 1, argc - 1);
    signal(SIGTERM, SIG_IGN); /* crpc_server_close frees the loop that on_signal stops */
    signal(SIGINT, SIG_IGN);
    crpc_server_close(server);
    return status == CRPC_OK ? 0 : 1;
}
