/* crpc_client: synchronous calls drive the channel's loop themselves; asynchronous ones have a
 * callback each, run by crpc_loop_step on the main thread. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include "bench.h"

typedef struct conn {
    crpc_loop *loop;
    crpc_channel *channel;
    crpc_call *calls; /* one for each slot; made for the life of the conn, as a program would */
    int due[BENCH_SLOTS];
    int due_count;
} conn;

static void must(int status, const crpc_error *error)
{
    if (status != CRPC_OK) {
        bench_die("crpc: %s: %s", crpc_status_name(status), error ? error->text : "");
    }
}

static conn *open_url(crpc_loop *loop, const char *url)
{
    conn *c = (conn *)calloc(1, sizeof *c);
    crpc_channel_options options = CRPC_INIT;
    crpc_loop_options loop_options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    loop_options.forbid_threads = 1;
    if (!loop) {
        must(crpc_loop_open(&loop, &loop_options), NULL);
    }
    options.loop = c->loop = loop;
    options.policy.timeout_ms = 10000;
    must(crpc_channel_open(&c->channel, url, &options, &error), &error);
    if (bench_asynchronous()) { /* its first step says that the program drives the loop */
        must(crpc_loop_step(c->loop, 0), NULL);
    }
    c->calls = (crpc_call *)calloc(bench_is("threads") ? BENCH_SLOTS : 1, sizeof *c->calls);
    return c;
}

static void *open_conn(int port)
{
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", port);
    return open_url(NULL, url);
}

static void close_conn(void *conn_)
{
    conn *c = (conn *)conn_;
    crpc_channel_close(c->channel);
    crpc_loop_close(c->loop);
    free(c->calls);
    free(c);
}

/* All on one loop. Channels on one loop share a connection if they agree about its options. */
static void *open_idle(int port, int number)
{
    static crpc_loop *loop;
    crpc_loop_options options = CRPC_INIT;
    char url[80];
    if (!loop) {
        must(crpc_loop_open(&loop, &options), NULL);
    }
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d?connect_timeout_ms=%d", port, 5000 + number);
    return open_url(loop, url);
}

/* A URL cannot name a thousand providers: the list comes as one from a registry does. */
static void *open_list(int port, int count)
{
    conn *c = (conn *)open_conn(port);
    crpci_snapshot *list = crpci_directory_snapshot(c->loop->heap, (size_t)count);
    for (int i = 0; i < count; i++) {
        snprintf(list->providers[i].address, CRPC_ADDRESS_MAX, "127.0.0.1:%d", port + i);
        list->providers[i].weight = 100;
    }
    crpci_opening_on_list(c->channel, list);
    crpci_directory_snapshot_unref(list);
    if (crpc_channel_providers(c->channel) != (size_t)count) {
        bench_die("the channel did not take the list");
    }
    return c;
}

static crpc_call *call_of(conn *c, int slot)
{
    return &c->calls[bench_is("threads") ? slot : 0];
}

static void call(void *conn_, int slot)
{
    conn *c = (conn *)conn_;
    crpc_call *options = call_of(c, slot);
    wire_Echo request = wire_Echo_init_zero, response = wire_Echo_init_zero;
    request.text = crpc_view_of(bench_payload(slot), bench.size);
    must(wire_EchoService_Call(c->channel, &request, &response, options), &options->error);
    bench_check(slot, crpc_view_data(response.text), crpc_view_size(response.text));
}

static void attach(void *conn_, int slot)
{
    conn *c = (conn *)conn_;
    crpc_call *options = call_of(c, slot);
    wire_Echo request = wire_Echo_init_zero, response = wire_Echo_init_zero;
    request.text = crpc_view_str("attached");
    options->attachment = crpc_view_of(bench_payload(slot), bench.size);
    must(wire_EchoService_Call(c->channel, &request, &response, options), &options->error);
    bench_check(slot, crpc_view_data(options->reply_attachment),
                crpc_view_size(options->reply_attachment));
}

static void done(void *user, int status, const wire_Echo *response, crpc_call *options)
{
    must(status, &options->error);
    bench_end((int)(intptr_t)user, crpc_view_data(response->text),
              crpc_view_size(response->text));
}

static void begin(conn *c, int slot)
{
    wire_Echo request = wire_Echo_init_zero;
    request.text = crpc_view_of(bench_payload(slot), bench.size);
    must(wire_EchoService_Call_async(c->channel, &request, done, (void *)(intptr_t)slot, NULL),
         NULL);
}

/* Calls that are due are begun in a callback of the loop: then they go out together. */
static void begin_due(void *user)
{
    conn *c = (conn *)user;
    for (int i = 0; i < c->due_count; i++) {
        begin(c, c->due[i]);
    }
    c->due_count = 0;
}

static void start(void *conn_, int slot)
{
    conn *c = (conn *)conn_;
    if (!bench_is("open")) { /* the first ones; the others are begun by the replies before them */
        begin(c, slot);
        return;
    }
    if (c->due_count == 0) {
        must(crpc_loop_post(c->loop, begin_due, c), NULL);
    }
    c->due[c->due_count++] = slot;
}

static void poll_conn(void *conn_, bool wait)
{
    conn *c = (conn *)conn_;
    must(crpc_loop_step(c->loop, wait ? -1 : 0), NULL);
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call, attach,    start,
                                    poll_conn, true,       open_idle, open_list};
    return bench_main(&peer, argc, argv);
}
