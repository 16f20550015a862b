/* fleet_consumer: calls a fleet, and prints each second which providers answer.
 *
 *   fleet_consumer CHANNEL_URL [--option VALUE]... [--json]
 *
 *   $ fleet_consumer 'zookeeper://127.0.0.1:2181/dubbo/fleet.Work?timeout_ms=500' --rate 1000
 *     1 s  ok 1000  failed 0  p99 0.4 ms  listed 3  by a:334 b:333 c:333
 *
 *   --method Do|Get      Get is idempotent, Do is not; default Do
 *   --rate N             calls a second, however slow the replies are; default 100. 0: each call
 *                        that ends begins the next
 *   --seconds N          how long to call; default 10. SIGINT and SIGTERM end it earlier
 *   --concurrency N      calls in flight at most; default 256. Beyond it calls wait, although due
 *   --work-us N          CPU time that each call costs the provider; default 0
 *   --json               prints no line each second
 *
 * CHANNEL_URL is what crpc_channel_open takes; it sets balancer, retries and deadline.
 *
 * The last line is JSON: sent (calls begun), ok, failed, unsent (calls that were due but found no
 * free place before the end), by_code, by_provider, attempts (retries make them more than sent),
 * duplicates (replies to a repeated execution), p50_us and p99_us (latencies of successful calls,
 * at most 1/16 too high), max_gap_ms (the longest time without a successful reply). The latency of
 * a call counts from when it was due, so a fleet that stands still is charged with all calls that
 * it delayed. The first failures are explained on stderr. Exits with 0 if at least one call
 * succeeded.
 *
 * Shows: asynchronous calls at a rate from one thread without a mutex: everything, the pacing
 * included, happens in callbacks of one loop.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "fleet.crpc.h"

#include "fleet_count.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONCURRENCY 65536
#define EXPLAINED       5 /* failures that are explained on stderr */

typedef struct consumer consumer;

typedef struct pending { /* a call in flight, or a free place for one */
    consumer *owner;
    struct pending *next;
    int64_t due_us;
} pending;

struct consumer {
    crpc_loop *loop;
    crpc_channel *channel;
    bool idempotent, json;
    int rate, seconds, concurrency, work_us;
    pending *places, *free;
    int64_t start_us, last_ok_us, max_gap_us;
    uint64_t seq, due, sent, ok, failed, attempts, duplicates;
    uint64_t ok_before, failed_before; /* when the last line was printed */
    int lines;
    row providers[ROWS], codes[ROWS];
    hist all, second;
};

static int64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

/* ---- counting -------------------------------------------------------------------------------- */

static void count_gap(consumer *c, int64_t at_us)
{
    if (at_us - c->last_ok_us > c->max_gap_us) {
        c->max_gap_us = at_us - c->last_ok_us;
    }
    c->last_ok_us = at_us;
}

static void count_failure(consumer *c, int status, const char *text)
{
    const char *name = crpc_status_name(status);

    if (c->failed++ < EXPLAINED) {
        fprintf(stderr, "fleet_consumer: %s (%d): %s\n", name, status, text);
    }
    count_row(c->codes, name, strlen(name));
}

/* ---- calling: in callbacks of the loop, which the main thread runs --------------------------- */

static void begin_call(consumer *c, int64_t due_us);

static void on_reply(void *user, int status, const fleet_Reply *reply, crpc_call *call)
{
    pending *p = (pending *)user;
    consumer *c = p->owner;
    int64_t now = now_us(), due_us = p->due_us;

    p->next = c->free;
    c->free = p;
    c->attempts += (uint64_t)call->error.attempts;
    if (status != CRPC_OK) {
        count_failure(c, status, call->error.text);
        return;
    }
    c->ok++;
    c->duplicates += reply->executions > 1;
    count_row(c->providers, crpc_view_data(reply->provider), crpc_view_size(reply->provider));
    count_gap(c, now);
    hist_add(&c->all, now - due_us);
    hist_add(&c->second, now - due_us);
    if (c->rate == 0 && now - c->start_us < c->seconds * INT64_C(1000000)) {
        begin_call(c, now); /* after a failure on_tick begins the next call, a little later */
    }
}

/* Begins a call. The caller has made sure that there is a free place. */
static void begin_call(consumer *c, int64_t due_us)
{
    fleet_Request request = fleet_Request_init_zero;
    pending *p = c->free;
    char key[24];
    int status;

    snprintf(key, sizeof key, "key-%u", (unsigned)(c->sent % 1000));
    request.key = crpc_view_str(key); /* crpc copies it before the call function returns */
    request.seq = c->seq++;
    request.work_us = (uint32_t)c->work_us;
    c->free = p->next;
    p->due_us = due_us;
    c->sent++;
    status = c->idempotent ? fleet_Work_Get_async(c->channel, &request, on_reply, p, NULL)
                           : fleet_Work_Do_async(c->channel, &request, on_reply, p, NULL);
    if (status != CRPC_OK) { /* then on_reply does not run */
        count_failure(c, status, crpc_status_text(status));
        p->next = c->free;
        c->free = p;
    }
}

/* How many calls are due at a time; the first is due at the start. */
static uint64_t due_by(const consumer *c, int64_t at_us)
{
    uint64_t all = (uint64_t)c->seconds * (uint64_t)c->rate;
    uint64_t due = (uint64_t)(at_us - c->start_us) * (uint64_t)c->rate / 1000000 + 1;

    return due < all ? due : all;
}

static void print_line(consumer *c, int second)
{
    int i;

    printf("%3d s  ok %llu  failed %llu  p99 %.1f ms  listed %zu  by", second,
           (unsigned long long)(c->ok - c->ok_before),
           (unsigned long long)(c->failed - c->failed_before),
           (double)hist_percentile(&c->second, 99) / 1000, crpc_channel_providers(c->channel));
    for (i = 0; i < ROWS && c->providers[i].count > 0; i++) {
        row *r = &c->providers[i];
        if (r->count > r->before) {
            printf(" %s:%llu", r->key, (unsigned long long)(r->count - r->before));
        }
        r->before = r->count;
    }
    printf("\n");
    fflush(stdout);
    c->ok_before = c->ok;
    c->failed_before = c->failed;
    memset(&c->second, 0, sizeof c->second);
}

static void on_tick(void *user, int fd, unsigned events)
{
    consumer *c = (consumer *)user;
    int64_t now = now_us();
    uint64_t ticks;
    int n;

    (void)events;
    if (read(fd, &ticks, sizeof ticks) < 0) {
        return; /* not due yet */
    }
    c->due = due_by(c, now);
    while (c->rate > 0 && c->free && c->sent < c->due) {
        begin_call(c, c->start_us + (int64_t)(c->sent * 1000000 / (uint64_t)c->rate));
    }
    for (n = 0; c->rate == 0 && c->free && n < c->concurrency; n++) {
        begin_call(c, now); /* at most one for each place, however fast they fail */
    }
    if (!c->json && now - c->start_us >= (c->lines + 1) * INT64_C(1000000)) {
        print_line(c, ++c->lines);
    }
    if (now - c->start_us >= c->seconds * INT64_C(1000000)) {
        crpc_loop_stop(c->loop);
    }
}

/* ---- the result ------------------------------------------------------------------------------ */

static void print_result(const consumer *c)
{
    printf("{\"sent\":%llu,\"ok\":%llu,\"failed\":%llu,\"unsent\":%llu",
           (unsigned long long)c->sent, (unsigned long long)c->ok, (unsigned long long)c->failed,
           (unsigned long long)(c->due > c->sent ? c->due - c->sent : 0));
    print_rows("by_code", c->codes);
    print_rows("by_provider", c->providers);
    printf(",\"attempts\":%llu,\"duplicates\":%llu", (unsigned long long)c->attempts,
           (unsigned long long)c->duplicates);
    printf(",\"p50_us\":%llu,\"p99_us\":%llu,\"max_gap_ms\":%lld}\n",
           (unsigned long long)hist_percentile(&c->all, 50),
           (unsigned long long)hist_percentile(&c->all, 99), (long long)c->max_gap_us / 1000);
}

/* ---- the program ----------------------------------------------------------------------------- */

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

/* Consumers must not use each other's seq: each starts at a random number of 64 bits. */
static int random_seq(uint64_t *seq)
{
    FILE *f = fopen("/dev/urandom", "rb");
    bool good = f && fread(seq, sizeof *seq, 1, f) == 1;

    if (f) {
        fclose(f);
    }
    return good ? CRPC_OK : CRPC_ESYSTEM;
}

/* Returns a descriptor that becomes readable every 0.25 ms: crpc_timer_start takes whole
 * milliseconds. */
static int open_clock(void)
{
    struct itimerspec every = CRPC_INIT;
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);

    every.it_interval.tv_nsec = every.it_value.tv_nsec = 250000;
    if (fd >= 0 && timerfd_settime(fd, 0, &every, NULL) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int call_for_a_while(consumer *c, int clock)
{
    crpc_id watch = CRPC_INIT;
    int status = crpc_loop_watch(c->loop, clock, CRPC_READABLE, on_tick, c, &watch);

    c->start_us = c->last_ok_us = now_us();
    if (status == CRPC_OK) {
        status = crpc_loop_run(c->loop); /* until the time is over or a signal comes */
    }
    crpc_loop_unwatch(c->loop, watch);
    count_gap(c, now_us());
    c->seconds = 0; /* no call begins from here on; those in flight end by their deadlines */
    while (status == CRPC_OK && c->ok + c->failed < c->sent) {
        status = crpc_loop_step(c->loop, 10);
    }
    if (status == CRPC_OK) {
        print_result(c);
    }
    return status;
}

static int open_and_call(consumer *c, const char *url)
{
    crpc_channel_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int clock = open_clock(), status = crpc_loop_open(&c->loop, NULL), i;

    options.loop = c->loop;
    if (status == CRPC_OK) {
        status = crpc_channel_open(&c->channel, url, &options, &error);
    }
    if (status == CRPC_OK) {
        status = random_seq(&c->seq);
    }
    if (status == CRPC_OK) {
        status = catch_signals(c->loop);
    }
    c->places = (pending *)calloc((size_t)c->concurrency, sizeof *c->places);
    for (i = 0; c->places && i < c->concurrency; i++) {
        c->places[i].owner = c;
        c->places[i].next = c->free;
        c->free = &c->places[i];
    }
    if (status == CRPC_OK) {
        status = !c->places ? CRPC_ENOMEM : clock < 0 ? CRPC_ESYSTEM : call_for_a_while(c, clock);
    }
    if (status != CRPC_OK) {
        fprintf(stderr, "fleet_consumer: %s: %s (%d): %s\n", url, crpc_status_name(status), status,
                error.text[0] ? error.text : crpc_status_text(status));
    }
    signal(SIGTERM, SIG_IGN); /* the loop that on_signal stops is freed below */
    signal(SIGINT, SIG_IGN);
    crpc_channel_close(c->channel); /* NULL is ignored */
    crpc_loop_close(c->loop);
    if (clock >= 0) {
        close(clock);
    }
    free(c->places);
    return status;
}

static bool parse_number(const char *text, int min, int max, int *number)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    *number = (int)value;
    return errno == 0 && end != text && *end == '\0' && value >= min && value <= max;
}

static bool parse_option(consumer *c, const char *name, const char *value)
{
    if (strcmp(name, "--method") == 0) {
        c->idempotent = strcmp(value, "Get") == 0;
        return c->idempotent || strcmp(value, "Do") == 0;
    }
    return (strcmp(name, "--rate") == 0 && parse_number(value, 0, 1000000, &c->rate)) ||
           (strcmp(name, "--seconds") == 0 && parse_number(value, 1, 1000000, &c->seconds)) ||
           (strcmp(name, "--concurrency") == 0 &&
            parse_number(value, 1, MAX_CONCURRENCY, &c->concurrency)) ||
           (strcmp(name, "--work-us") == 0 && parse_number(value, 0, 10000000, &c->work_us));
}

int main(int argc, char **argv)
{
    static consumer c; /* all zeros */
    int i = 2, status;

    c.rate = 100;
    c.seconds = 10;
    c.concurrency = 256;
    while (i < argc) {
        if (strcmp(argv[i], "--json") == 0) {
            c.json = true;
            i++;
        } else if (i + 1 < argc && parse_option(&c, argv[i], argv[i + 1])) {
            i += 2;
        } else {
            break;
        }
    }
    if (argc < 2 || argv[1][0] == '-' || i != argc) {
        fprintf(stderr, "usage: fleet_consumer CHANNEL_URL [--method Do|Get] [--rate N] "
                        "[--seconds N]\n                      [--concurrency N] [--work-us N] "
                        "[--json]\n");
        return 2;
    }
    status = open_and_call(&c, argv[1]);
    return status == CRPC_OK && c.ok > 0 && fflush(stdout) == 0 ? 0 : 1;
}
