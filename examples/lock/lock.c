/* lock: does work that only one process in the fleet may do at a time.
 *
 *   lock REGISTRY_URL PATH [--name NAME] [--wait-ms N] [--work-ms N] [--times N] [--session-ms N]
 *
 *   $ lock zookeeper://127.0.0.1:2181/app locks/firmware --name berlin --times 2
 *   berlin: begin, token 4294967305
 *   berlin: done, token 4294967305
 *   berlin: begin, token 4294967309
 *   berlin: done, token 4294967309
 *
 *   --name NAME       shown to people who inspect the lock; default "pid-N"
 *   --wait-ms N       how long to wait for the lock. 0: not at all; default: no limit
 *   --work-ms N       how long the work takes; default 1000
 *   --times N         how often it is done. 0: until SIGTERM; default 1
 *   --session-ms N    ZooKeeper session timeout: how long a crashed holder keeps others waiting;
 *                     default 15000
 *
 * Several processes take turns in the order in which they came. Exit status: 0 when the work is
 * done; 3 when the lock could not be acquired in time; 4 when it was lost during the work, because
 * ZooKeeper could not be reached for so long that another process may hold it now. SIGTERM or
 * SIGINT releases the lock; the exit status is 0.
 *
 * Shows: waiting for a lock, releasing it, losing it, and the fencing token, by which the protected
 * resource recognises a holder that was stopped for a while.
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
typedef struct worker {
    const char *path;
    char name[32];
    int wait_ms;
    int work_ms;
    int times;
    int session_ms;
    crpc_loop *loop;
    crpc_lock *lock;
    crpc_id timer; /* runs while the work is being done */
    int64_t token;
    int done;
    int result; /* exit status of the program */
} worker;

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
    fprintf(stderr, "lock: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

static void finish(worker *w, int result)
{
    w->result = result;
    crpc_loop_stop(w->loop);
}

static void acquire(worker *w)
{
    int status = crpc_lock_acquire(w->lock, w->wait_ms);

    if (status != CRPC_OK) {
        complain(status, w->path, "");
        finish(w, 1);
    }
}

/* The work is done: releases the lock for the next process. */
static void on_work_done(void *user)
{
    worker *w = (worker *)user;

    printf("%s: done, token %lld\n", w->name, (long long)w->token);
    fflush(stdout);
    crpc_lock_release(w->lock);
    w->done++;
    if (w->done == w->times) {
        finish(w, 0);
    } else {
        acquire(w); /* behind the processes that wait already */
    }
}

static void on_lock(void *user, int status, int64_t token)
{
    worker *w = (worker *)user;

    if (status == CRPC_OK) {
        /* Each request to the protected database or device should carry the token, so that the
         * receiver can refuse a token smaller than the largest it has seen. */
        w->token = token;
        printf("%s: begin, token %lld\n", w->name, (long long)token);
        fflush(stdout);
        if (crpc_timer_start(w->loop, w->work_ms, 0, on_work_done, w, &w->timer) != CRPC_OK) {
            finish(w, 1);
        }
    } else if (status == CRPC_EGONE) { /* the lock is lost: the work must end at once */
        crpc_timer_stop(w->loop, w->timer);
        printf("%s: lost, token %lld\n", w->name, (long long)token);
        fflush(stdout);
        finish(w, 4);
    } else {
        complain(status, w->path, "");
        finish(w, 3);
    }
}

static int work(worker *w, crpc_registry *registry)
{
    int status = crpc_lock_open(&w->lock, registry, w->path, w->name, on_lock, w);

    if (status != CRPC_OK) {
        return complain(status, w->path, "");
    }
    status = catch_signals(w->loop);
    if (status != CRPC_OK) {
        return complain(status, "sigaction", strerror(errno));
    }
    acquire(w);
    status = crpc_loop_run(w->loop);
    return status == CRPC_OK ? status : complain(status, "running", "");
}

static int open_and_work(worker *w, const char *url)
{
    crpc_registry_options options = CRPC_INIT;
    crpc_registry *registry = NULL;
    crpc_error error = CRPC_INIT;
    int status = crpc_loop_open(&w->loop, NULL);

    if (status != CRPC_OK) {
        return complain(status, "opening a loop", "");
    }
    options.session_timeout_ms = w->session_ms;
    status = crpc_registry_open(&registry, w->loop, url, &options, &error);
    if (status != CRPC_OK) {
        complain(status, "opening", error.text);
    } else {
        status = work(w, registry);
    }
    signal(SIGTERM, SIG_IGN); /* the loop that on_signal stops is freed below */
    signal(SIGINT, SIG_IGN);
    crpc_lock_close(w->lock);      /* releases it */
    crpc_registry_close(registry); /* ends the session, so its node is gone at once */
    crpc_loop_close(w->loop);
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

static bool parse_options(int argc, char **argv, worker *w)
{
    int i;

    for (i = 0; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        bool good = true;

        if (strcmp(argv[i], "--name") == 0) {
            good = strlen(value) < sizeof w->name;
            snprintf(w->name, sizeof w->name, "%s", value);
        } else if (strcmp(argv[i], "--wait-ms") == 0) {
            good = parse_number(value, &w->wait_ms);
        } else if (strcmp(argv[i], "--work-ms") == 0) {
            good = parse_number(value, &w->work_ms);
        } else if (strcmp(argv[i], "--times") == 0) {
            good = parse_number(value, &w->times);
        } else if (strcmp(argv[i], "--session-ms") == 0) {
            good = parse_number(value, &w->session_ms);
        } else {
            good = false;
        }
        if (!good) {
            return false;
        }
    }
    return i == argc;
}

int main(int argc, char **argv)
{
    static worker w; /* all zeros */

    snprintf(w.name, sizeof w.name, "pid-%ld", (long)getpid());
    w.wait_ms = -1;
    w.work_ms = 1000;
    w.times = 1;
    if (argc < 3 || argv[1][0] == '-' || !parse_options(argc - 3, argv + 3, &w)) {
        fprintf(stderr, "usage: lock REGISTRY_URL PATH [--name NAME] [--wait-ms N] [--work-ms N]\n"
                        "            [--times N] [--session-ms N]\n"
                        "       REGISTRY_URL: zookeeper://host:port,.../root\n");
        return 2;
    }
    w.path = argv[2];
    return open_and_work(&w, argv[1]) == CRPC_OK ? w.result : 1;
}
