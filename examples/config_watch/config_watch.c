/* config_watch: follows the value of a node in ZooKeeper.
 *
 *   config_watch REGISTRY_URL PATH [VALUE]
 *
 *   $ config_watch zookeeper://127.0.0.1:2181/app limits/rate 100     # writes the value, ends
 *   $ config_watch zookeeper://127.0.0.1:2181/app limits/rate
 *   version 0: 100
 *   version 1: 250
 *   limits/rate does not exist
 *
 * Without a VALUE it prints the node's value, and each new value, until SIGTERM or SIGINT. The node
 * need not exist yet. While ZooKeeper is away the last value stands, and no change that lasts is
 * missed.
 *
 * Shows: a watched configuration value, operations that wait for their result, a loop that the
 * program runs itself.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include <signal.h>
#include <stdio.h>

static crpc_loop *loop_to_stop;

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop_to_stop);
}

static int catch_signals(crpc_loop *loop)
{
    struct sigaction action = CRPC_INIT;

    loop_to_stop = loop;
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGTERM, &action, NULL) == 0 && sigaction(SIGINT, &action, NULL) == 0
               ? CRPC_OK
               : CRPC_ESYSTEM;
}

static int complain(int status, const char *what, const char *detail)
{
    fprintf(stderr, "config_watch: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

/* Gets the value at first and after each change. The bytes are valid until this returns. */
static void on_value(void *user, crpc_view value, int32_t version, bool exists)
{
    if (exists) {
        printf("version %d: %.*s\n", (int)version, (int)crpc_view_size(value),
               crpc_view_size(value) ? crpc_view_data(value) : "");
    } else {
        printf("%s does not exist\n", (const char *)user);
    }
    fflush(stdout);
}

static void on_state(void *user, crpc_registry_state state, int64_t session)
{
    static const char *const names[] = {"connecting", "connected", "connection lost",
                                        "session lost"};

    (void)user;
    fprintf(stderr, "config_watch: %s (session 0x%llx)\n", names[state],
            (unsigned long long)session);
}

/* Creates the node with the value, or writes the value if the node exists. */
static int write_value(crpc_registry *registry, const char *path, const char *value)
{
    crpc_node node = CRPC_INIT;
    crpc_node_op op = crpc_node_create(path, crpc_view_str(value), CRPC_NODE_PARENTS);
    int status = crpc_registry_call(registry, &op, 1, 0, &node);

    if (status == CRPC_EEXISTS) {
        op = crpc_node_set(path, crpc_view_str(value), CRPC_NODE_ANY);
        status = crpc_registry_call(registry, &op, 1, 0, &node);
    }
    if (status != CRPC_OK) {
        complain(status, "writing", node.error.text);
    }
    crpc_node_reset(&node);
    return status;
}

static int watch(crpc_loop *loop, crpc_registry *registry, char *path)
{
    crpc_id id;
    int status = crpc_config_watch(registry, path, on_value, path, &id);

    if (status != CRPC_OK) {
        return complain(status, path, "");
    }
    status = catch_signals(loop);
    if (status != CRPC_OK) {
        return complain(status, "sigaction", "");
    }
    status = crpc_loop_run(loop); /* returns after a signal */
    return status == CRPC_OK ? status : complain(status, "running", "");
}

int main(int argc, char **argv)
{
    crpc_registry_options options = CRPC_INIT;
    crpc_registry *registry = NULL;
    crpc_loop *loop = NULL;
    crpc_error error = CRPC_INIT;
    int status;

    if (argc < 3 || argc > 4 || argv[1][0] == '-') {
        fprintf(stderr, "usage: config_watch REGISTRY_URL PATH [VALUE]\n"
                        "       REGISTRY_URL: zookeeper://host:port,.../root\n");
        return 2;
    }
    status = crpc_loop_open(&loop, NULL);
    if (status != CRPC_OK) {
        complain(status, "opening a loop", "");
        return 1;
    }
    options.on_state = on_state;
    status = crpc_registry_open(&registry, loop, argv[1], &options, &error);
    if (status != CRPC_OK) {
        complain(status, "opening", error.text);
    } else {
        status = argc == 4 ? write_value(registry, argv[2], argv[3])
                           : watch(loop, registry, argv[2]);
    }
    signal(SIGTERM, SIG_IGN); /* the loop that on_signal stops is freed below */
    signal(SIGINT, SIG_IGN);
    crpc_registry_close(registry);
    crpc_loop_close(loop);
    return status == CRPC_OK ? 0 : 1;
}
