/* depth1: both ends of calls that follow one another, for syscalls.py.
 *
 *   depth1 server POLLER URL                       until SIGTERM; prints its address
 *   depth1 client POLLER URL COUNT [TIMEOUT_MS]    synchronous calls, one after another
 *   depth1 callbacks POLLER URL COUNT              each call is made in the callback of the last
 *
 * POLLER is epoll or poll. The clients check every reply and print
 * `N ok, N failed, N late replies, poller NAME`.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static crpc_loop *loop;

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop);
}

static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    (void)context;
    response->message = request->message;
    return CRPC_OK;
}

static const example_EchoService_handlers handlers = {echo};

static int fail(const char *what, int status, const char *text)
{
    fprintf(stderr, "depth1: %s: %s: %s\n", what, crpc_status_name(status), text);
    return 1;
}

static int run_server(const char *url)
{
    crpc_server_options options = CRPC_INIT;
    struct sigaction action = CRPC_INIT;
    char address[CRPC_ADDRESS_MAX];
    crpc_error error = CRPC_INIT;
    crpc_server *server;
    int err;

    options.loop = loop;
    options.listen = url;
    err = crpc_server_open(&server, &options, &error);
    if (err)
        return fail(url, err, error.text);
    err = crpc_server_add(server, &example_EchoService, &handlers, NULL);
    err = err ? err : crpc_server_start(server, &error);
    err = err ? err : crpc_server_address(server, 0, address, sizeof address);
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
    if (!err) {
        printf("listening on %s\n", address);
        fflush(stdout);
        err = crpc_server_run(server);
    }
    crpc_server_close(server);
    return err ? fail("server", err, error.text) : 0;
}

/* --- clients ----------------------------------------------------------------------------------- */

typedef struct progress {
    crpc_channel *channel;
    int count;
    int ok;
    int failed;
    char text[32];
    sem_t done;
} progress;

static void account(progress *p, int status, const example_EchoResponse *response,
                    const crpc_error *error)
{
    if (!status && crpc_view_equal(response->message, p->text)) {
        p->ok++;
        return;
    }
    p->failed++;
    fprintf(stderr, "%s: %s\n", p->text, status ? error->text : "the reply to another call");
}

static example_EchoRequest next_request(progress *p)
{
    example_EchoRequest request = example_EchoRequest_init_zero;

    snprintf(p->text, sizeof p->text, "call %d", p->ok + p->failed);
    request.message = crpc_view_str(p->text);
    return request;
}

static void run_calls(progress *p, int timeout_ms)
{
    crpc_call call = CRPC_INIT;

    call.policy.timeout_ms = timeout_ms;
    while (p->ok + p->failed < p->count) {
        example_EchoRequest request = next_request(p);
        example_EchoResponse response = example_EchoResponse_init_zero;
        int status = example_EchoService_Echo(p->channel, &request, &response, &call);

        account(p, status, &response, &call.error);
    }
    crpc_call_reset(&call);
}

static void begin_next(progress *p);

static void on_done(void *user, int status, const example_EchoResponse *response, crpc_call *call)
{
    progress *p = (progress *)user;

    account(p, status, response, &call->error);
    if (p->ok + p->failed < p->count)
        begin_next(p);
    else
        sem_post(&p->done);
}

static void begin_next(progress *p)
{
    example_EchoRequest request = next_request(p);
    int status = example_EchoService_Echo_async(p->channel, &request, on_done, p, NULL);

    if (status) {
        fail("async call", status, crpc_status_text(status));
        sem_post(&p->done);
    }
}

static int run_client(const char *url, int count, int timeout_ms, bool callbacks)
{
    crpc_channel_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    crpc_loop_stats stats;
    static progress p;
    int err;

    options.loop = loop;
    err = crpc_channel_open(&p.channel, url, &options, &error);
    if (err)
        return fail(url, err, error.text);
    p.count = count;
    if (!callbacks) {
        run_calls(&p, timeout_ms);
    } else if (!sem_init(&p.done, 0, 0)) {
        begin_next(&p); /* starts the loop's own thread */
        sem_wait(&p.done);
    }
    crpc_loop_stats_get(loop, &stats);
    printf("%d ok, %d failed, %llu late replies, poller %s\n", p.ok, p.failed,
           (unsigned long long)stats.late_replies, stats.poller);
    crpc_channel_close(p.channel);
    return p.ok == count ? 0 : 1;
}

int main(int argc, char **argv)
{
    crpc_loop_options options = CRPC_INIT;
    int err, count = argc > 4 ? atoi(argv[4]) : 0;

    if (argc < 4) {
        fprintf(stderr, "usage: depth1 server|client|callbacks epoll|poll URL [COUNT [MS]]\n");
        return 2;
    }
    options.poller = strcmp(argv[2], "poll") ? CRPC_POLLER_EPOLL : CRPC_POLLER_POLL;
    err = crpc_loop_open(&loop, &options);
    if (err)
        return fail("loop", err, crpc_status_text(err));
    if (strcmp(argv[1], "server") == 0)
        err = run_server(argv[3]);
    else
        err = run_client(argv[3], count, argc > 5 ? atoi(argv[5]) : 0,
                         strcmp(argv[1], "callbacks") == 0);
    crpc_loop_close(loop);
    return err;
}
