/* A contender for a lock, for lease.py: acquires it over and over and prints when it holds it.
 *
 *     contender URL PATH SESSION_MS
 *
 * A thread of its own asks every millisecond for the lease, as a program would before each thing
 * that it does. It prints "begin US" and "end US", by CLOCK_BOOTTIME, which all processes of a
 * host share; the callback prints "held TOKEN" and "lost". SIGUSR1 sets crpc's clock, which is a
 * hook's, ahead by a second. SIGTERM ends it, with the lock released. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include <pthread.h>

static volatile sig_atomic_t ahead_s, ended;
static crpc_lock *lock;

static int64_t now_us(void *user)
{
    struct timespec ts;
    (void)user;
    clock_gettime(CLOCK_BOOTTIME, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static int64_t stepped_us(void *user)
{
    return now_us(user) + (int64_t)ahead_s * 1000000;
}

static void on_log(void *user, int level, const char *line)
{
    (void)level;
    fprintf(stderr, "%lld %s\n", (long long)now_us(user), line);
}

static void on_signal(int signo)
{
    if (signo == SIGUSR1)
        ahead_s = ahead_s + 1;
    else
        ended = 1;
}

static void say(const char *what, int64_t number)
{
    char line[64];
    int n = snprintf(line, sizeof line, "%s %lld\n", what, (long long)number);
    if (write(1, line, (size_t)n) != n)
        _exit(2);
}

static void *ask(void *unused)
{
    int held = 0;
    (void)unused;
    while (!ended) {
        int64_t before = now_us(NULL);
        int holds = crpc_lock_lease_us(lock) > 0;
        if (holds != held) /* what is not known is counted for it: `before` is the earlier time */
            say(holds ? "begin" : "end", holds ? now_us(NULL) : before);
        held = holds;
        usleep(1000);
    }
    if (held)
        say("end", now_us(NULL));
    return NULL;
}

static void on_lock(void *user, int status, int64_t token)
{
    (void)user;
    say(status == CRPC_OK ? "held" : "lost", token);
    if (status != CRPC_OK && crpc_lock_acquire(lock, -1) != CRPC_OK)
        _exit(3);
}

int main(int argc, char **argv)
{
    crpc_registry_options o;
    crpc_loop_options lo;
    crpc_registry *r;
    crpc_loop *loop;
    crpc_error error;
    pthread_t thread;
    if (argc != 4)
        return 2;
    memset(&o, 0, sizeof o);
    memset(&lo, 0, sizeof lo);
    lo.hooks.clock_us = stepped_us;
    lo.hooks.log = on_log;
    lo.hooks.log_level = CRPC_LOG_INFO;
    o.session_timeout_ms = atoi(argv[3]);
    o.must_connect = 1;
    o.registry_timeout_ms = 20000;
    signal(SIGUSR1, on_signal);
    signal(SIGTERM, on_signal);
    if (crpc_loop_open(&loop, &lo) || crpc_loop_start(loop) ||
        crpc_registry_open(&r, loop, argv[1], &o, &error))
        return 4;
    if (crpc_lock_open(&lock, r, argv[2], "a contender", on_lock, NULL) ||
        crpc_lock_acquire(lock, -1) || pthread_create(&thread, NULL, ask, NULL))
        return 5;
    pthread_join(thread, NULL);
    crpc_lock_release(lock);
    crpc_lock_close(lock);
    crpc_registry_close(r);
    crpc_loop_close(loop);
    return 0;
}
