/* What footprint.py measures of crpc's memory: prints lines `NAME REQUESTED WITH_OVERHEAD`, bytes
 * of one such thing: as crpc counts them, and with what the allocator adds. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECTIONS 1000
#define CALLS       1000
#define PROVIDERS   64
#define TEXT        "thirty-two bytes of text to echo"

typedef struct memory {
    long asked;
    long taken;
} memory;

static void must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "footprint: %s failed\n", what);
        exit(1);
    }
}

/* malloc's own word stands before each block. */
static long block(void *ptr)
{
    return ptr ? (long)(malloc_usable_size(ptr) + sizeof(size_t)) : 0;
}

static void *resize(void *user, void *ptr, size_t old_size, size_t new_size)
{
    memory *m = (memory *)user;
    long before = block(ptr);
    void *out = NULL;

    if (new_size) {
        out = realloc(ptr, new_size);
        must(out != NULL, "malloc");
    } else {
        free(ptr);
    }
    m->asked += (long)new_size - (long)old_size;
    m->taken += block(out) - before;
    return out;
}

static void print(const char *name, memory before, memory after, long count)
{
    printf("%s %.1f %.1f\n", name, (double)(after.asked - before.asked) / (double)count,
           (double)(after.taken - before.taken) / (double)count);
}

static crpc_loop *open_loop(memory *m, int max_results)
{
    crpc_loop_options options = CRPC_INIT;
    crpc_loop *loop = NULL;

    options.hooks.user = m;
    options.hooks.resize = resize;
    options.forbid_threads = 1;
    options.max_results = max_results;
    must(crpc_loop_open(&loop, &options) == CRPC_OK, "opening a loop");
    return loop;
}

static void step(crpc_loop *loop)
{
    must(crpc_loop_step(loop, 0) == CRPC_OK, "a step");
}

/* --- the server's side ------------------------------------------------------------------------ */

static crpc_context *kept[CALLS];
static int keep; /* the handler keeps its context */
static int kept_count;

static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    response->message = request->message;
    if (!keep) {
        return CRPC_OK;
    }
    kept[kept_count++] = context;
    return CRPC_EPENDING;
}

static const example_EchoService_handlers handlers = {echo};

static crpc_server *open_server(const char *url, crpc_loop *loop)
{
    crpc_server_options options = CRPC_INIT;
    crpc_server *server = NULL;

    options.listen = url;
    options.loop = loop;
    options.max_connections = -1;
    must(crpc_server_open(&server, &options, NULL) == CRPC_OK, url);
    must(crpc_server_add(server, &example_EchoService, &handlers, NULL) == CRPC_OK, "add");
    must(crpc_server_start(server, NULL) == CRPC_OK, "start");
    return server;
}

static int plain_socket(const char *path, bool dial)
{
    struct sockaddr_un to = CRPC_INIT;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    to.sun_family = AF_UNIX;
    must(strlen(path) < sizeof to.sun_path, "a short path");
    strcpy(to.sun_path, path);
    if (dial) {
        must(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0, "connecting");
    } else {
        must(fd >= 0 && bind(fd, (struct sockaddr *)&to, sizeof to) == 0 && listen(fd, 16) == 0,
             "listening");
    }
    return fd;
}

/* A request as a client of another make would send it. */
static const char request_bytes[] = "PRPC\0\0\0\x43\0\0\0\x21"             /* body, meta */
                                    "\x0a\x1d\x0a\x13" "example.EchoService" /* request, service */
                                    "\x12\x04" "Echo" "\x18\x07"             /* method, log_id */
                                    "\x20\x01"                               /* correlation_id */
                                    "\x0a\x20" TEXT;

static void serve_one(crpc_loop *loop, int fd, bool answered)
{
    char reply[256];
    ssize_t n = -1;
    int i;

    must(write(fd, request_bytes, sizeof request_bytes - 1) == (ssize_t)sizeof request_bytes - 1,
         "sending");
    for (i = 0; i < 8 && n < 0; i++) {
        step(loop);
        n = recv(fd, reply, sizeof reply, MSG_DONTWAIT);
    }
    must(answered ? n > 16 && memmem(reply, (size_t)n, TEXT, sizeof TEXT - 1) : n < 0, "an answer");
}

static void measure_server(const char *url)
{
    static int fds[CONNECTIONS];
    memory m = {0, 0}, before, opened;
    crpc_loop *loop;
    crpc_server *server;
    crpc_loop_stats stats;
    int i;

    loop = open_loop(&m, 0);
    print("a loop", (memory){0, 0}, m, 1);
    before = m;
    server = open_server(url, loop);
    print("a server", before, m, 1);
    fds[0] = plain_socket(url + 7, true); /* what is taken once for all connections */
    serve_one(loop, fds[0], true);
    close(fds[0]);
    for (i = 0; i < 8; i++) {
        step(loop);
    }
    crpc_loop_stats_get(loop, &stats);
    must(stats.connections == 0, "the end of a connection");
    before = m;
    print("a server that has served", (memory){0, 0}, m, 1);
    for (i = 0; i < CONNECTIONS; i++) {
        fds[i] = plain_socket(url + 7, true);
        step(loop);
        step(loop);
    }
    crpc_loop_stats_get(loop, &stats);
    must(stats.connections == CONNECTIONS, "accepting");
    opened = m;
    print("a connection", before, m, CONNECTIONS);
    for (i = 0; i < CONNECTIONS; i++) {
        serve_one(loop, fds[i], true);
    }
    print("a connection that was used", before, m, CONNECTIONS);
    opened = m;
    keep = 1;
    for (i = 0; i < CALLS; i++) {
        serve_one(loop, fds[i % CONNECTIONS], false);
    }
    print("a request in service", opened, m, CALLS);
    for (i = 0; i < kept_count; i++) {
        crpc_context_finish(kept[i], CRPC_OK);
    }
    for (i = 0; i < CONNECTIONS; i++) {
        close(fds[i]);
    }
    crpc_server_close(server);
    crpc_loop_close(loop);
    must(m.asked == 0, "giving everything back");
}

/* --- the client's side ------------------------------------------------------------------------ */

static void on_reply(void *user, int status, const example_EchoResponse *response, crpc_call *call)
{
    (void)user;
    (void)status;
    (void)response;
    (void)call;
}

static crpc_channel *open_channel(const char *url, crpc_loop *loop)
{
    crpc_channel_options options = CRPC_INIT;
    crpc_channel *channel = NULL;

    options.loop = loop;
    options.policy.timeout_ms = 3600000;
    must(crpc_channel_open(&channel, url, &options, NULL) == CRPC_OK, url);
    return channel;
}

/* Calls to somebody who never answers, sent and still under way. */
static void measure_calls(const char *url)
{
    example_EchoRequest request = example_EchoRequest_init_zero;
    memory m = {0, 0}, before;
    crpc_loop *loop = open_loop(&m, -1);
    crpc_channel *channel;
    crpc_id id;
    int silent = plain_socket(url + 7, false), i;

    before = m;
    channel = open_channel(url, loop);
    print("a channel", before, m, 1);
    request.message = crpc_view_str(TEXT);
    step(loop);
    must(example_EchoService_Echo_async(channel, &request, on_reply, NULL, NULL) == CRPC_OK, "call");
    step(loop);
    step(loop);
    before = m;
    for (i = 0; i < CALLS; i++) {
        must(example_EchoService_Echo_async(channel, &request, on_reply, NULL, NULL) == CRPC_OK,
             "a call");
    }
    step(loop);
    print("a call under way", before, m, CALLS);
    before = m;
    for (i = 0; i < CALLS; i++) {
        must(example_EchoService_Echo_begin(channel, &request, &id, NULL) == CRPC_OK, "a call");
    }
    step(loop);
    print("a call by id under way", before, m, CALLS);
    crpc_channel_close(channel);
    crpc_loop_close(loop);
    close(silent);
    must(m.asked == 0, "giving everything back");
}

static void measure_providers(void)
{
    memory m = {0, 0}, one, many;
    crpc_loop *loop = open_loop(&m, 0);
    char url[2048] = "list://127.0.0.1:10000";
    crpc_channel *channel;
    int i;

    one = m;
    channel = open_channel(url, loop);
    one.asked = m.asked - one.asked;
    one.taken = m.taken - one.taken;
    crpc_channel_close(channel);
    for (i = 1; i <= PROVIDERS; i++) {
        snprintf(url + strlen(url), sizeof url - strlen(url), ",127.0.0.1:%d", 10000 + i);
    }
    many = m;
    channel = open_channel(url, loop);
    many.asked = m.asked - many.asked;
    many.taken = m.taken - many.taken;
    print("a provider", one, many, PROVIDERS);
    crpc_channel_close(channel);
    crpc_loop_close(loop);
    must(m.asked == 0, "giving everything back");
}

int main(int argc, char **argv)
{
    struct rlimit files;
    char url[128];

    if (argc != 2) {
        fprintf(stderr, "usage: footprint DIRECTORY\n");
        return 2;
    }
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    snprintf(url, sizeof url, "unix://%s/server", argv[1]);
    measure_server(url);
    snprintf(url, sizeof url, "unix://%s/silent", argv[1]);
    measure_calls(url);
    measure_providers();
    return 0;
}
