/* election: one leader among several processes, and another when it leaves or dies.
 *
 *   election REGISTRY_URL PATH [--name NAME] [--session-ms N] [--lead-ms N]
 *   election REGISTRY_URL PATH --ask
 *
 *   $ election zookeeper://127.0.0.1:2181/app leader --name berlin --session-ms 2000
 *   berlin: a candidate; the leader is hamburg
 *   berlin: leads, token 4294967321
 *
 *   --name NAME       name under which others see this process as leader; default "pid-N"
 *   --session-ms N    ZooKeeper session timeout: how long a crashed leader keeps its place; default
 *                     15000
 *   --lead-ms N       resigns after N ms, so that the next candidate leads; default: never
 *   --ask             prints who leads and exits, with status 1 if nobody does
 *
 * On SIGTERM or SIGINT it leaves the election, so that the next candidate leads at once, and exits
 * with 0.
 *
 * Shows: a candidate, its callback when it begins and ceases to lead, and asking for the leader
 * without being a candidate.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* All callbacks run on the thread that runs the loop, so nothing here needs a mutex. */
typedef struct candidate {
    const char *path;
    char name[32];
    int session_ms;
    int lead_ms;
    bool ask;
    bool leads;
    crpc_loop *loop;
    crpc_registry *registry;
    crpc_election *election;
    crpc_id timer;
} candidate;

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
    fprintf(stderr, "election: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

static void step_back(void *user)
{
    crpc_election_resign(((candidate *)user)->election);
}

/* Told when this process begins or ceases to lead. It ceases before another can begin. Still each
 * command of a leader should carry the token, so that its receiver can refuse a token smaller than
 * the largest it has seen: the command may come from a leader that was stopped for a while. */
static void on_election(void *user, bool leader, int64_t token)
{
    candidate *c = (candidate *)user;

    c->leads = leader;
    printf("%s: %s, token %lld\n", c->name, leader ? "leads" : "leads no more", (long long)token);
    fflush(stdout);
    crpc_timer_stop(c->loop, c->timer);
    if (leader && c->lead_ms &&
        crpc_timer_start(c->loop, c->lead_ms, 0, step_back, c, &c->timer) != CRPC_OK) {
        step_back(c);
    }
}

/* Gets the answer to "who leads?", asked without waiting. */
static void on_leader(void *user, const crpc_node *node)
{
    candidate *c = (candidate *)user;

    if (node->error.code == CRPC_OK && !c->leads) {
        printf("%s: a candidate; the leader is %.*s\n", c->name, (int)crpc_view_size(node->data),
               crpc_view_size(node->data) ? crpc_view_data(node->data) : "");
        fflush(stdout);
    }
}

static int stand(candidate *c)
{
    crpc_node_op who_leads = crpc_node_first(c->path);
    int status = crpc_election_open(&c->election, c->registry, c->path, crpc_view_str(c->name),
                                    on_election, c);

    if (status == CRPC_OK) {
        status = crpc_registry_call_async(c->registry, &who_leads, 1, 0, on_leader, c);
    }
    if (status != CRPC_OK) {
        return complain(status, c->path, "");
    }
    status = catch_signals(c->loop);
    if (status != CRPC_OK) {
        return complain(status, "sigaction", strerror(errno));
    }
    status = crpc_loop_run(c->loop); /* returns after a signal */
    return status == CRPC_OK ? status : complain(status, "running", "");
}

/* Asks who leads, and waits for the answer. */
static int ask(candidate *c)
{
    crpc_node node = CRPC_INIT;
    crpc_node_op who_leads = crpc_node_first(c->path);
    int status = crpc_registry_call(c->registry, &who_leads, 1, 0, &node);

    if (status == CRPC_OK) {
        printf("%.*s leads, token %lld\n", (int)crpc_view_size(node.data),
               crpc_view_size(node.data) ? crpc_view_data(node.data) : "",
               (long long)node.stat.created);
    } else {
        complain(status, "asking", node.error.text);
    }
    crpc_node_reset(&node);
    return status;
}

static int open_and_run(candidate *c, const char *url)
{
    crpc_registry_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int status = crpc_loop_open(&c->loop, NULL);

    if (status != CRPC_OK) {
        return complain(status, "opening a loop", "");
    }
    options.session_timeout_ms = c->session_ms;
    status = crpc_registry_open(&c->registry, c->loop, url, &options, &error);
    if (status != CRPC_OK) {
        complain(status, "opening", error.text);
    } else {
        status = c->ask ? ask(c) : stand(c);
    }
    signal(SIGTERM, SIG_IGN); /* the loop that on_signal stops is freed below */
    signal(SIGINT, SIG_IGN);
    crpc_election_close(c->election);
    crpc_registry_close(c->registry);
    crpc_loop_close(c->loop);
    return status;
}

static bool parse_number(const char *text, int *number)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    *number = (int)value;
    return errno == 0 && end != text && *end == '\0' && value >= 0 && value <= INT_MAX;
}

static bool parse_options(int argc, char **argv, candidate *c)
{
    int i;

    for (i = 0; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        bool good = true;

        if (strcmp(argv[i], "--ask") == 0) {
            c->ask = true;
            continue;
        }
        if (strcmp(argv[i], "--name") == 0) {
            good = value[0] != '\0' && strlen(value) < sizeof c->name;
            snprintf(c->name, sizeof c->name, "%s", value);
        } else if (strcmp(argv[i], "--session-ms") == 0) {
            good = parse_number(value, &c->session_ms);
        } else if (strcmp(argv[i], "--lead-ms") == 0) {
            good = parse_number(value, &c->lead_ms);
        } else {
            good = false;
        }
        if (!good) {
            return false;
        }
        i++; /* its value */
    }
    return true;
}

int main(int argc, char **argv)
{
    static candidate c; /* all zeros */

    snprintf(c.name, sizeof c.name, "pid-%ld", (long)getpid());
    if (argc < 3 || argv[1][0] == '-' || !parse_options(argc - 3, argv + 3, &c)) {
        fprintf(stderr, "usage: election REGISTRY_URL PATH [--name NAME] [--session-ms N]\n"
                        "                [--lead-ms N]\n"
                        "       election REGISTRY_URL PATH --ask\n"
                        "       REGISTRY_URL: zookeeper://host:port,.../root\n");
        return 2;
    }
    c.path = argv[2];
    return open_and_run(&c, argv[1]) == CRPC_OK ? 0 : 1;
}
