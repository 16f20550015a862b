/* Calls, failover and refusals, all but one call in one thread, as every build with a client and a server must do
 * them, whatever else is left out of it. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "serve.h"

static char logged[160];

static void keep_line(void *user, int level, const char *line)
{
    (void)user;
    (void)level;
    snprintf(logged, sizeof logged, "%s", line);
}

static int hand_fail(crpc_context *context, const void *request, void *response,
                     const void *handlers)
{
    (void)request;
    (void)response;
    (void)handlers;
    return crpc_context_fail(context, 4711, "the peer's own words");
}

static int fail_silently(crpc_context *context, const void *request, void *response,
                         const void *handlers)
{
    (void)context;
    (void)request;
    (void)response;
    (void)handlers;
    return CRPC_EREJECT;
}

static const crpc_method toggle_methods[] = {
    {"hand.Toggles", "Add", &hand_Number_msg, &hand_Number_msg, sizeof(hand_Number),
     sizeof(hand_Number), hand_add, 0, 0},
    {"hand.Toggles", "Fail", &hand_Number_msg, &hand_Number_msg, sizeof(hand_Number),
     sizeof(hand_Number), hand_fail, 0, 0},
    {"hand.Toggles", "Silent", &hand_Number_msg, &hand_Number_msg, sizeof(hand_Number),
     sizeof(hand_Number), fail_silently, 0, 0},
};

static const crpc_service toggle_service = {"hand.Toggles", toggle_methods, 3};

static int failures;

static void expect(const char *what, int ok)
{
    if (!ok) {
        printf("FAIL %s\n", what);
        failures++;
    }
}

static crpc_server *serve(crpc_loop *loop, const int *addend, char *url, size_t size)
{
    crpc_server *server = NULL;
    crpc_server_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    options.loop = loop;
    options.listen = "tcp://127.0.0.1:0";
    expect("server", crpc_server_open(&server, &options, &error) == CRPC_OK &&
                         crpc_server_add(server, &toggle_service, addend, NULL) == CRPC_OK &&
                         crpc_server_start(server, &error) == CRPC_OK &&
                         crpc_server_address(server, 0, url, size) == CRPC_OK);
    return server;
}

/* One call to its end; this thread does the server's work as well. */
static int call_method(crpc_channel *channel, const crpc_method *m, int *value, crpc_call *call)
{
    hand_Number request = {234}, response = {0};
    crpc_loop *loop = crpc_channel_loop(channel);
    crpc_id id = CRPC_INIT;
    int status = crpc_channel_begin(channel, m, &request, &id, NULL);
    while (!status && crpc_channel_poll(channel, id) == CRPC_EPENDING && !status)
        status = crpc_loop_step(loop, 10);
    if (!status)
        status = crpc_channel_fetch(channel, m, id, &response, call);
    *value = (int)response.value;
    return status;
}

/* Every call gets through, also when one of two servers is gone. */
static void check_failover(crpc_loop *loop)
{
    static const int addends[2] = {1000, 2000};
    char url[2][CRPC_ADDRESS_MAX], list[2 * CRPC_ADDRESS_MAX + 32];
    crpc_server *servers[2];
    crpc_channel *channel = NULL;
    crpc_channel_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int i, value, first = 0, second = 0, good = 1;
    for (i = 0; i < 2; i++)
        servers[i] = serve(loop, &addends[i], url[i], sizeof url[i]);
    snprintf(list, sizeof list, "list://%s,%s?timeout_ms=20000", url[0] + 6, url[1] + 6);
    options.loop = loop;
    expect("channel", crpc_channel_open(&channel, list, &options, &error) == CRPC_OK);
    for (i = 0; i < 40; i++) {
        crpc_call call = CRPC_INIT;
        if (i == 20)
            crpc_server_close(servers[0]);
        good = good && call_method(channel, &toggle_methods[0], &value, &call) == CRPC_OK;
        good = good && (value == 1234 || value == 2234);
        first += i < 20 && value == 1234;
        second += value == 2234;
        crpc_call_reset(&call);
    }
    expect("calls reach both servers", first && second > 20);
    expect("no call fails when a server has gone", good && second == 40 - first);
    crpc_channel_close(channel);
    crpc_server_close(servers[1]);
}

/* What an error says, with texts and without; the peer's words are in it either way. */
static void check_texts(crpc_loop *loop)
{
    static const int addend = 1000;
    static const crpc_method unknown = {"hand.Toggles", "Nothing", &hand_Number_msg,
                                        &hand_Number_msg, sizeof(hand_Number),
                                        sizeof(hand_Number), NULL, 0, 0};
    char url[CRPC_ADDRESS_MAX];
    crpc_server *server = serve(loop, &addend, url, sizeof url);
    crpc_channel *channel = NULL, *none = NULL;
    crpc_channel_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    crpc_call call = CRPC_INIT;
    int value;
    options.loop = loop;
    expect("channel", crpc_channel_open(&channel, url, &options, &error) == CRPC_OK);
    expect("application error",
           call_method(channel, &toggle_methods[1], &value, &call) == CRPC_EAPP &&
               call.error.app_code == 4711 && call.error.remote);
    expect("its words", strstr(call.error.text, "the peer's own words") != NULL);
    crpc_call_reset(&call);
    expect("status", call_method(channel, &toggle_methods[2], &value, &call) == CRPC_EREJECT);
    expect("text of a status",
           CRPC_ENABLE_TEXTS ? strstr(call.error.text, "hand.Toggles.Silent") != NULL
                             : strcmp(call.error.text, crpc_status_name(CRPC_EREJECT)) == 0);
    crpc_call_reset(&call);
    expect("no method", call_method(channel, &unknown, &value, &call) == CRPC_ENOMETHOD);
    expect("text of no method",
           CRPC_ENABLE_TEXTS ? strstr(call.error.text, "no such method: hand.Toggles") != NULL
                             : strcmp(call.error.text, crpc_status_name(CRPC_ENOMETHOD)) == 0);
    crpc_call_reset(&call);
    expect("scheme", crpc_channel_open(&none, "nonsense://x", NULL, &error) != CRPC_OK && !none);
    expect("text of the opening",
           CRPC_ENABLE_TEXTS ? strstr(error.text, "nonsense") != NULL
                             : strcmp(error.text, crpc_status_name(error.code)) == 0);
    expect("status text", strcmp(crpc_status_text(CRPC_EINVAL),
                                 CRPC_ENABLE_TEXTS ? "invalid argument" : "EINVAL") == 0);
    crpci_heap_log(loop->heap, CRPC_LOG_ERROR, "a line for %s", "the log");
    expect("log line", CRPC_ENABLE_TEXTS ? strcmp(logged, "a line for the log") == 0
                                         : strncmp(logged, "crpc.h:", 7) == 0);
    crpc_channel_close(channel);
    crpc_server_close(server);
}

/* A server refuses what it was built without, and names it. */
static void check_refusals(crpc_loop *loop)
{
    static const crpc_method_limit limit = {NULL, NULL, 10, 0, 0, 0};
    static const char *const names[] = {"ordered", "replay_entries", "rate_per_client", "limits"};
    int i;
    for (i = 0; i < 4; i++) {
        crpc_server *server = NULL;
        crpc_server_options options = CRPC_INIT;
        crpc_error error = CRPC_INIT;
        int status;
        options.loop = loop;
        options.ordered = i == 0;
        options.replay_entries = i == 1;
        options.rate_per_client = i == 2;
        options.method_limits = i == 3 ? &limit : NULL;
        options.method_limit_count = i == 3;
        status = crpc_server_open(&server, &options, &error);
        if (CRPC_ENABLE_POLICY) {
            expect(names[i], status == CRPC_OK);
            crpc_server_close(server);
        } else {
            expect(names[i], status == CRPC_EUNSUPPORTED && !server);
            if (CRPC_ENABLE_TEXTS)
                expect("its name", strstr(error.text, names[i]) != NULL);
        }
    }
}

/* So does a call. A cluster policy of -1 is the default everywhere. */
static void check_call_policies(crpc_loop *loop)
{
    static const int addend = 1000;
    int want = CRPC_ENABLE_POLICY ? CRPC_OK : CRPC_EUNSUPPORTED, i;
    char url[CRPC_ADDRESS_MAX];
    crpc_server *server = serve(loop, &addend, url, sizeof url);
    crpc_channel *channel = NULL;
    crpc_channel_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    options.loop = loop;
    options.policy.cluster = (crpc_cluster)-1;
    expect("channel", crpc_channel_open(&channel, url, &options, &error) == CRPC_OK);
    for (i = 0; i < 3 && channel; i++) {
        crpc_call call = CRPC_INIT;
        hand_Number request = {234};
        crpc_id id = CRPC_INIT;
        int status;
        call.policy.backup_ms = i == 0 ? 1000 : 0;
        call.policy.cluster = i == 1 ? CRPC_CLUSTER_FORKING : (crpc_cluster)-1;
        status = crpc_channel_begin(channel, &toggle_methods[0], &request, &id, &call);
        expect("policy of a call", status == (i < 2 ? want : CRPC_OK));
        expect("cancelled",
               crpc_channel_cancel(channel, id) == (status ? CRPC_ENOTFOUND : CRPC_OK));
    }
    crpc_channel_close(channel);
    crpc_server_close(server);
}

int main(void)
{
    crpc_loop *loop = NULL;
    crpc_loop_options options = CRPC_INIT;
    options.hooks.log = keep_line;
    expect("loop", crpc_loop_open(&loop, &options) == CRPC_OK);
    expect("timeout", crpc_loop_timeout(loop) == -1); /* this thread drives: crpc starts none */
    if (CRPC_ENABLE_THREADS)
        expect("a synchronous call", serve_and_call("toggles") == 0);
    check_failover(loop);
    check_texts(loop);
    check_refusals(loop);
    check_call_policies(loop);
    crpc_loop_close(loop);
    printf("policy %d, texts %d: %d failed\n", CRPC_ENABLE_POLICY, CRPC_ENABLE_TEXTS, failures);
    return failures ? 1 : 0;
}
