/* What instructions.py counts: echo calls of 32 bytes, in a fixed number.
 *
 *   instructions serve PATH          an echo server on a unix socket, until SIGTERM
 *   instructions sync PATH N         N calls, one after another, to such a server
 *   instructions both PATH N DEPTH   N calls, DEPTH under way at a time, to a server in this very
 *                                    process
 *   instructions list LB COUNT N     N lists of COUNT providers, each to a channel that has none yet
 *   instructions change LB COUNT N   N lists, each with another one missing than in the one before
 *   instructions pick LB COUNT N     N choices among COUNT providers, each with its beginning and
 *                                    end of a call, without the call
 *
 * With `both` one thread steps the client's loop and the server's loop in turn, so nothing depends
 * on the scheduler: every step finds all that the other side has sent. The counter is told to look
 * only into client_turn, or only into server_turn. A synchronous call drives its loop by itself,
 * and needs a server elsewhere. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TEXT "thirty-two bytes of text to echo" /* a payload of 34 bytes */

static void must(int status, const char *what)
{
    if (status != CRPC_OK) {
        fprintf(stderr, "instructions: %s: %s\n", what, crpc_status_text(status));
        exit(1);
    }
}

/* Costs what the real clock costs, and goes on by a microsecond each time: what a timer wheel does
 * must not depend on how fast the machine is. Both loops read it. */
static int64_t clock_us(void *user)
{
    static int64_t now = 1000000;
    struct timespec ts;

    (void)user;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ++now;
}

static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    (void)context;
    response->message = request->message;
    return CRPC_OK;
}

static const example_EchoService_handlers handlers = {echo};

static crpc_server *open_server(const char *url, crpc_loop *loop)
{
    crpc_server_options options = CRPC_INIT;
    crpc_server *server = NULL;

    options.listen = url;
    options.loop = loop;
    must(crpc_server_open(&server, &options, NULL), url);
    must(crpc_server_add(server, &example_EchoService, &handlers, NULL), "adding the service");
    must(crpc_server_start(server, NULL), "starting");
    return server;
}

/* --- a server of its own ---------------------------------------------------------------------- */

static crpc_loop *loop_to_stop;

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop_to_stop);
}

static void serve(const char *url)
{
    crpc_server *server = open_server(url, NULL);

    loop_to_stop = crpc_server_loop(server);
    signal(SIGTERM, on_signal);
    puts("ready");
    fflush(stdout);
    must(crpc_server_run(server), "running");
    signal(SIGTERM, SIG_IGN);
    crpc_server_close(server);
}

static void call_sync(const char *url, long n)
{
    example_EchoRequest request = example_EchoRequest_init_zero;
    example_EchoResponse response = example_EchoResponse_init_zero;
    crpc_channel_options options = CRPC_INIT;
    crpc_call call = CRPC_INIT;
    crpc_channel *channel = NULL;

    options.private_loop.hooks.clock_us = clock_us;
    must(crpc_channel_open(&channel, url, &options, &call.error), url);
    request.message = crpc_view_of(TEXT, sizeof TEXT - 1);
    while (n-- > 0) {
        must(example_EchoService_Echo(channel, &request, &response, &call), call.error.text);
        if (crpc_view_size(response.message) != sizeof TEXT - 1) {
            must(CRPC_ERESPONSE, "a wrong reply");
        }
    }
    crpc_call_reset(&call);
    crpc_channel_close(channel);
}

/* --- both in one thread ----------------------------------------------------------------------- */

static crpc_channel *both_channel;
static long calls_left;
static long calls_under_way;

static void begin(void);

static void on_reply(void *user, int status, const example_EchoResponse *response, crpc_call *call)
{
    (void)user;
    must(status, call->error.text);
    if (crpc_view_size(response->message) != sizeof TEXT - 1) {
        must(CRPC_ERESPONSE, "a wrong reply");
    }
    calls_under_way--;
    if (calls_left > 0) {
        begin();
    }
}

static void begin(void)
{
    example_EchoRequest request = example_EchoRequest_init_zero;

    request.message = crpc_view_of(TEXT, sizeof TEXT - 1);
    calls_left--;
    calls_under_way++;
    must(example_EchoService_Echo_async(both_channel, &request, on_reply, NULL, NULL), "a call");
}

/* Not static, not inlined: instructions.py tells the counter these names. */
void client_turn(crpc_loop *loop);
void server_turn(crpc_loop *loop);

__attribute__((noinline)) void client_turn(crpc_loop *loop)
{
    must(crpc_loop_step(loop, 0), "the client's step");
}

__attribute__((noinline)) void server_turn(crpc_loop *loop)
{
    must(crpc_loop_step(loop, 0), "the server's step");
}

static void call_both(const char *url, long n, long depth)
{
    crpc_loop_options options = CRPC_INIT;
    crpc_channel_options channel_options = CRPC_INIT;
    crpc_loop *client = NULL, *servers = NULL;
    crpc_server *server;

    options.forbid_threads = 1;
    options.hooks.clock_us = clock_us;
    must(crpc_loop_open(&client, &options), "a loop");
    must(crpc_loop_open(&servers, &options), "a loop");
    server = open_server(url, servers);
    channel_options.loop = client;
    channel_options.policy.timeout_ms = 3600000;
    must(crpc_channel_open(&both_channel, url, &channel_options, NULL), url);
    must(crpc_loop_step(client, 0), "a step"); /* from now on the program drives it */
    calls_left = n;
    while (depth-- > 0) {
        begin();
    }
    while (calls_under_way > 0) {
        client_turn(client);
        server_turn(servers);
    }
    crpc_channel_close(both_channel);
    crpc_server_close(server);
    crpc_loop_close(client);
    crpc_loop_close(servers);
}

/* --- choosing a provider ----------------------------------------------------------------------- */

void pick_turn(const crpci_pending_call *call);

__attribute__((noinline)) void pick_turn(const crpci_pending_call *call)
{
    crpci_balance *balance = &call->channel->providers.balance;
    crpci_member *member = crpci_attempt_pick(call);

    must(member ? CRPC_OK : CRPC_ENOPROVIDER, "a choice");
    crpci_balance_item_begin(balance, &member->balance);
    crpci_balance_item_end(balance, &member->balance, true, 100, 101);
}

static void pick(const char *lb, long count, long n)
{
    crpc_channel_options options = CRPC_INIT;
    crpc_channel *channel = NULL;
    crpci_snapshot *list;
    crpci_pending_call call;
    char url[80];
    long i;

    options.private_loop.hooks.clock_us = clock_us;
    snprintf(url, sizeof url, "tcp://127.0.0.1:9?lb=%s", lb);
    must(crpc_channel_open(&channel, url, &options, NULL), url);
    list = crpci_directory_snapshot(channel->loop->heap, (size_t)count);
    must(list ? CRPC_OK : CRPC_ENOMEM, "a list");
    for (i = 0; i < count; i++) {
        snprintf(list->providers[i].address, CRPC_ADDRESS_MAX, "10.1.%ld.%ld:8000", i / 256, i % 256);
        list->providers[i].weight = 50 + (int)(i * 7 % 101);
    }
    crpci_directory_sort(list);
    must(crpci_opening_on_list(channel, list), "the list");
    crpci_directory_snapshot_unref(list);
    memset(&call, 0, sizeof call);
    call.channel = channel;
    for (i = 0; i < n; i++) {
        call.key = (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
        pick_turn(&call);
    }
    crpc_channel_close(channel);
}

/* --- lists of providers ------------------------------------------------------------------------- */

void list_turn(crpci_directory *directory, char **names, size_t count);

__attribute__((noinline)) void list_turn(crpci_directory *directory, char **names, size_t count)
{
    crpci_directory_report report;

    report.names = names;
    report.count = count;
    report.whole = true;
    crpci_loop_lock(directory->loop);
    must(crpci_directory_update(directory, &report) ? CRPC_OK : CRPC_ENOMEM, "a list");
    crpci_loop_unlock(directory->loop);
}

static void free_nothing(crpci_directory *directory)
{
    (void)directory;
}

/* As a registry gives them: each change moves the last name to the place of another one. */
static void lists(const char *lb, long count, long n, bool first)
{
    crpc_channel_options options = CRPC_INIT;
    crpc_channel *channel = NULL;
    crpci_directory directory;
    crpci_names_service want;
    char url[80], text[128], **names = (char **)calloc((size_t)count, sizeof *names);
    long i;

    must(names ? CRPC_OK : CRPC_ENOMEM, "names");
    for (i = 0; i < count; i++) {
        snprintf(text, sizeof text, "crpc://10.1.%ld.%ld:8000/S?group=&version=&weight=%ld", i / 256,
                 i % 256, 50 + i * 7 % 101);
        names[i] = (char *)calloc(1, 3 * sizeof text);
        must(names[i] ? CRPC_OK : CRPC_ENOMEM, "a name");
        crpci_url_encode(names[i], 3 * sizeof text, text);
    }
    memset(&want, 0, sizeof want);
    want.service = "S";
    options.private_loop.hooks.clock_us = clock_us;
    snprintf(url, sizeof url, "tcp://127.0.0.1:9?lb=%s", lb);
    for (i = 0; i < n; i++) {
        if (i == 0 || first) {
            must(crpc_channel_open(&channel, url, &options, NULL), url);
            memset(&directory, 0, sizeof directory);
            must(crpci_directory_init(&directory, channel->loop,
                                      crpci_heap_format(channel->loop->heap, "bench"), free_nothing)
                     ? CRPC_OK
                     : CRPC_ENOMEM,
                 "a directory");
            crpci_loop_lock(channel->loop);
            must(crpci_directory_add(&directory, sizeof(crpci_subscriber), &want,
                                     crpci_opening_on_list, channel)
                     ? CRPC_OK
                     : CRPC_ENOMEM,
                 "a subscriber");
            crpci_loop_unlock(channel->loop);
        }
        if (!first) {
            char *other = names[i * 31 % (count - 1)];
            names[i * 31 % (count - 1)] = names[count - 1];
            names[count - 1] = other;
        }
        list_turn(&directory, names, (size_t)(first ? count : count - 1));
        if (i == n - 1 || first) {
            crpci_loop_lock(channel->loop);
            crpci_directory_end(&directory);
            crpci_loop_unlock(channel->loop);
            crpc_channel_close(channel);
        }
    }
    for (i = 0; i < count; i++)
        free(names[i]);
    free(names);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "serve")) {
        serve(argv[2]);
    } else if (argc == 4 && !strcmp(argv[1], "sync")) {
        call_sync(argv[2], atol(argv[3]));
    } else if (argc == 5 && !strcmp(argv[1], "pick")) {
        pick(argv[2], atol(argv[3]), atol(argv[4]));
    } else if (argc == 5 && (!strcmp(argv[1], "list") || !strcmp(argv[1], "change"))) {
        lists(argv[2], atol(argv[3]), atol(argv[4]), argv[1][0] == 'l');
    } else if (argc == 5 && !strcmp(argv[1], "both")) {
        call_both(argv[2], atol(argv[3]), atol(argv[4]));
    } else {
        fprintf(stderr, "usage: instructions serve URL | sync URL N | both URL N DEPTH | "
                        "list|change|pick LB COUNT N\n");
        return 2;
    }
    return 0;
}
