/* fleet_provider: a provider that can be slowed, overloaded, restarted and killed.
 *
 *   fleet_provider REGISTRY_URL [--option VALUE]...        REGISTRY_URL none: does not register
 *
 *   $ fleet_provider zookeeper://127.0.0.1:2181/dubbo --id a
 *   ready tcp://127.0.0.1:40123 a
 *
 *   --listen URL         tcp://host:port or unix:///path; default tcp://127.0.0.1:0 (a free port)
 *   --id NAME            name of this provider, which its replies contain; default "pid-N"
 *   --weight N           share of the calls beside other providers' weights; default 100
 *   --group G            group to register for; default none
 *   --version V          version to register for; default none
 *   --workers N          threads that run handlers; default 0: handlers run on the loop
 *   --delay-ms N         delays each reply. Without workers a timer finishes it, so that the loop
 *                        is not blocked; a worker sleeps. SIGUSR1 switches the delay off and on
 *   --max-concurrency N  requests in service at a time; beyond it callers get ELIMIT; default 8192
 *   --fail-percent N     share of the calls that fail with the application's error 10001
 *   --lame-ms N          how long a stopping provider goes on serving after it has unregistered,
 *                        because consumers learn of it a little later; default 1000, without a
 *                        registry 0
 *   --drain-ms N         how long a stopping provider waits for requests in service; default 5000
 *   --session-ms N       ZooKeeper session timeout: how long a crashed provider stays registered;
 *                        default 15000
 *
 * On SIGTERM or SIGINT it unregisters, goes on serving for --lame-ms, finishes the requests in
 * service, and prints how many requests it executed, and how many of these executions were
 * repeated:
 *
 *   end a requests 12345 repeated 0
 *
 * Shows: a restart without a failed call; replies finished later; counting in bounded memory.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "fleet.crpc.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FAILED_ON_PURPOSE 10001

/* Each slot counts the executions of the last seq that fell into it, and forgets earlier ones.
 * Consumers count seq up by one, so a repeated execution is seen unless another seq of the same
 * slot came in between: 65536 calls of the same consumer later, or by chance another consumer's. No
 * first execution is ever counted as repeated. */
#define SLOTS 65536

typedef struct slot {
    uint64_t seq, executions;
} slot;

typedef struct provider {
    const char *id;
    int delay_ms, fail_percent;
    crpc_loop *loop;
    crpc_server_options options;
    pthread_mutex_t lock; /* guards the members below: workers run handlers at the same time */
    slot slots[SLOTS];
    uint64_t requests, repeated;
} provider;

static crpc_loop *loop_to_stop;
static volatile sig_atomic_t is_fast; /* the delay is switched off */

/* ---- the service ----------------------------------------------------------------------------- */

/* Returns how often this seq was executed, and sets *number to how many requests came before. */
static uint64_t count_execution(provider *p, uint64_t seq, uint64_t *number)
{
    slot *s = &p->slots[seq % SLOTS];
    uint64_t executions;

    pthread_mutex_lock(&p->lock);
    if (s->seq != seq) {
        s->seq = seq;
        s->executions = 0;
    }
    executions = ++s->executions;
    p->repeated += executions > 1;
    *number = p->requests++;
    pthread_mutex_unlock(&p->lock);
    return executions;
}

static void burn_cpu(uint32_t us)
{
    struct timespec begin, now;

    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - begin.tv_sec) * 1000000 + (now.tv_nsec - begin.tv_nsec) / 1000 < us);
}

static void reply_now(void *user)
{
    /* CRPC_EGONE only means that the caller has disconnected meanwhile. */
    (void)crpc_context_finish((crpc_context *)user, CRPC_OK);
}

static int reply_later(crpc_context *context, provider *p)
{
    struct timespec delay;
    int status;

    if (p->options.workers > 0) { /* a worker may block; the loop may not */
        delay.tv_sec = p->delay_ms / 1000;
        delay.tv_nsec = (long)(p->delay_ms % 1000) * 1000000;
        nanosleep(&delay, NULL);
        return CRPC_OK;
    }
    status = crpc_timer_start(p->loop, p->delay_ms, 0, reply_now, context, NULL);
    return status == CRPC_OK ? CRPC_EPENDING : status;
}

static int work(crpc_context *context, const fleet_Request *request, fleet_Reply *response)
{
    provider *p = (provider *)crpc_context_user(context);
    uint64_t number;

    response->executions = count_execution(p, request->seq, &number);
    if (request->work_us > 0) {
        burn_cpu(request->work_us);
    }
    if (number * 37 % 100 < (uint64_t)p->fail_percent) { /* 37 spreads them */
        return crpc_context_fail(context, FAILED_ON_PURPOSE, "%s fails on purpose", p->id);
    }
    response->provider = crpc_view_str(p->id); /* p->id outlives the reply */
    response->seq = request->seq;
    return p->delay_ms > 0 && !is_fast ? reply_later(context, p) : CRPC_OK;
}

/* In the order of the .proto. */
static const fleet_Work_handlers handlers = {work, work};

/* ---- the program ----------------------------------------------------------------------------- */

static void on_signal(int signo)
{
    if (signo == SIGUSR1) {
        is_fast = !is_fast;
    } else {
        crpc_loop_stop(loop_to_stop); /* crpc_server_run then drains the server and returns */
    }
}

static int catch_signals(crpc_loop *loop)
{
    struct sigaction action = CRPC_INIT;

    loop_to_stop = loop;
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGTERM, &action, NULL) == 0 && sigaction(SIGINT, &action, NULL) == 0 &&
                   sigaction(SIGUSR1, &action, NULL) == 0
               ? CRPC_OK
               : CRPC_ESYSTEM;
}

static int complain(int status, const char *what, const char *detail)
{
    fprintf(stderr, "fleet_provider: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

static int serve(crpc_server *server, provider *p)
{
    crpc_error error = CRPC_INIT;
    char url[CRPC_ADDRESS_MAX + 8];
    int status;

    p->loop = crpc_server_loop(server);
    if ((status = crpc_server_add(server, &fleet_Work, &handlers, p)) != CRPC_OK) {
        return complain(status, "adding the service", "");
    }
    if ((status = catch_signals(p->loop)) != CRPC_OK) {
        return complain(status, "sigaction", strerror(errno));
    }
    if ((status = crpc_server_start(server, &error)) != CRPC_OK) {
        return complain(status, "starting", error.text);
    }
    if ((status = crpc_server_address(server, 0, url, sizeof url)) != CRPC_OK) {
        return complain(status, "asking for the address", "");
    }
    printf("ready %s %s\n", url, p->id);
    fflush(stdout);
    status = crpc_server_run(server); /* after a signal it drains the server and returns */
    return status == CRPC_OK ? status : complain(status, "running", "");
}

static int open_and_serve(provider *p)
{
    crpc_server *server = NULL;
    crpc_error error = CRPC_INIT;
    int status = crpc_server_open(&server, &p->options, &error);

    if (status != CRPC_OK) {
        return complain(status, "opening", error.text);
    }
    status = serve(server, p);
    signal(SIGTERM, SIG_IGN); /* crpc_server_close frees the loop that on_signal stops */
    signal(SIGINT, SIG_IGN);
    crpc_server_close(server); /* no handler runs after this */
    printf("end %s requests %llu repeated %llu\n", p->id, (unsigned long long)p->requests,
           (unsigned long long)p->repeated);
    return status;
}

static bool parse_number(const char *text, int max, int *number)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    *number = (int)value;
    return errno == 0 && end != text && *end == '\0' && value >= 0 && value <= max;
}

static bool parse_option(provider *p, const char *name, const char *value)
{
    crpc_server_options *o = &p->options;
    bool good = true;

    if (strcmp(name, "--listen") == 0) {
        o->listen = value;
    } else if (strcmp(name, "--id") == 0) {
        p->id = value;
    } else if (strcmp(name, "--group") == 0) {
        o->directory.group = value;
    } else if (strcmp(name, "--version") == 0) {
        o->directory.version = value;
    } else if (strcmp(name, "--weight") == 0) {
        good = parse_number(value, 1000000, &o->weight);
        o->weight = o->weight == 0 ? -1 : o->weight; /* in options 0 is the default */
    } else if (strcmp(name, "--workers") == 0) {
        good = parse_number(value, 1024, &o->workers);
    } else if (strcmp(name, "--max-concurrency") == 0) {
        good = parse_number(value, INT_MAX, &o->max_concurrency);
    } else if (strcmp(name, "--delay-ms") == 0) {
        good = parse_number(value, INT_MAX, &p->delay_ms);
    } else if (strcmp(name, "--fail-percent") == 0) {
        good = parse_number(value, 100, &p->fail_percent);
    } else if (strcmp(name, "--lame-ms") == 0) {
        good = parse_number(value, INT_MAX, &o->lame_ms);
        o->lame_ms = o->lame_ms == 0 ? -1 : o->lame_ms;
    } else if (strcmp(name, "--drain-ms") == 0) {
        good = parse_number(value, INT_MAX, &o->drain_ms);
        o->drain_ms = o->drain_ms == 0 ? -1 : o->drain_ms;
    } else if (strcmp(name, "--session-ms") == 0) {
        good = parse_number(value, INT_MAX, &o->directory.session_timeout_ms);
    } else {
        good = false;
    }
    return good;
}

int main(int argc, char **argv)
{
    static provider p; /* all zeros */
    char id[32];
    int i;

    snprintf(id, sizeof id, "pid-%ld", (long)getpid());
    p.id = id;
    p.options.directory.application = "fleet_provider";
    p.options.listen = "tcp://127.0.0.1:0";
    for (i = 2; i + 1 < argc && parse_option(&p, argv[i], argv[i + 1]); i += 2) {
    }
    if (argc < 2 || i != argc) {
        fprintf(stderr, "usage: fleet_provider REGISTRY_URL [--option VALUE]...\n"
                        "       the options are listed at the top of fleet_provider.c\n");
        return 2;
    }
    p.options.registry = strcmp(argv[1], "none") == 0 ? NULL : argv[1];
    if (pthread_mutex_init(&p.lock, NULL) != 0) {
        perror("fleet_provider");
        return 1;
    }
    return open_and_serve(&p) == CRPC_OK ? 0 : 1;
}
