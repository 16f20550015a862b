/* user_load.h: the load of user_consumer. One thread begins logins at a rate, and their callbacks
 * count the results. Include it after crpc.h and user.crpc.h.
 *
 * The callbacks run on the thread of the channel's loop, so a lock guards the counts.
 */
#ifndef USER_LOAD_H_INCLUDED
#define USER_LOAD_H_INCLUDED

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define LOAD_ROWS 16 /* providers, and kinds of failure, that are counted separately */

typedef struct load_row {
    char key[40];
    long count;
    int64_t first_ms, last_ms; /* since the load began */
} load_row;

typedef struct load_counts {
    long sent, ok, failed;
    long in_flight; /* failed calls of which at least a part had been sent */
    load_row providers[LOAD_ROWS], codes[LOAD_ROWS];
} load_counts;

typedef struct load {
    crpc_channel *channel;
    FILE *out;
    int64_t start_us;
    pthread_mutex_t lock; /* guards counts */
    load_counts counts;
} load;

static int64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void sleep_us(int64_t us)
{
    struct timespec t;

    if (us > 0) {
        t.tv_sec = (time_t)(us / 1000000);
        t.tv_nsec = (long)(us % 1000000) * 1000;
        nanosleep(&t, NULL);
    }
}

/* ---- counting -------------------------------------------------------------------------------- */

static void load_count(load_row *rows, const char *key, int64_t at_ms)
{
    int i;

    for (i = 0; i < LOAD_ROWS && rows[i].count > 0 && strcmp(rows[i].key, key) != 0; i++) {
    }
    if (i == LOAD_ROWS) {
        return;
    }
    if (rows[i].count++ == 0) {
        snprintf(rows[i].key, sizeof rows[i].key, "%s", key);
        rows[i].first_ms = at_ms;
    }
    rows[i].last_ms = at_ms;
}

static void load_count_failure(load *l, int status, int app_code, crpc_sent sent)
{
    char key[40];

    if (status == CRPC_EAPP) {
        snprintf(key, sizeof key, "EAPP %d", app_code);
    } else {
        snprintf(key, sizeof key, "%s", crpc_status_name(status));
    }
    l->counts.failed++;
    l->counts.in_flight += sent != CRPC_SENT_NO;
    load_count(l->counts.codes, key, (now_us() - l->start_us) / 1000);
}

static void load_on_login(void *user, int status, const demo_LoginResponse *response,
                          crpc_call *call)
{
    load *l = (load *)user;

    pthread_mutex_lock(&l->lock);
    if (status == CRPC_OK) {
        l->counts.ok++;
        load_count(l->counts.providers, response->provider, (now_us() - l->start_us) / 1000);
    } else {
        load_count_failure(l, status, call->error.app_code, call->error.sent);
    }
    pthread_mutex_unlock(&l->lock);
}

static load_counts load_read(load *l)
{
    load_counts copy;

    pthread_mutex_lock(&l->lock);
    copy = l->counts;
    pthread_mutex_unlock(&l->lock);
    return copy;
}

/* ---- the load -------------------------------------------------------------------------------- */

static void load_send(load *l, const demo_LoginRequest *request)
{
    int status = demo_UserService_Login_async(l->channel, request, load_on_login, l, NULL);

    pthread_mutex_lock(&l->lock);
    l->counts.sent++;
    if (status != CRPC_OK) { /* then no callback runs */
        load_count_failure(l, status, 0, CRPC_SENT_NO);
    }
    pthread_mutex_unlock(&l->lock);
}

/* Prints what has changed in the last second. */
static void load_print_second(load *l, int second, const load_counts *before,
                              const load_counts *now)
{
    int i;

    fprintf(l->out, "    %3d s   ok %4ld   failed %3ld   listed %zu   answered by", second,
            now->ok - before->ok, now->failed - before->failed, crpc_channel_providers(l->channel));
    for (i = 0; i < LOAD_ROWS && now->providers[i].count > 0; i++) {
        fprintf(l->out, "  %s: %ld", now->providers[i].key,
                now->providers[i].count - before->providers[i].count);
    }
    fputc('\n', l->out);
    fflush(l->out);
}

/* Waits for the calls in flight, each of which ends at its deadline at the latest. */
static load_counts load_finish(load *l)
{
    int64_t end_us = now_us() + 5000000;
    load_counts now = load_read(l);

    while (now.ok + now.failed < now.sent && now_us() < end_us) {
        sleep_us(10000);
        now = load_read(l);
    }
    return now;
}

static load_counts load_run(load *l, const demo_LoginRequest *request, int seconds, int rate)
{
    load_counts before = CRPC_INIT;
    int64_t k, total = (int64_t)seconds * rate;

    l->start_us = now_us();
    for (k = 1; k <= total; k++) {
        load_send(l, request);
        sleep_us(l->start_us + k * 1000000 / rate - now_us());
        if (k % rate == 0) {
            load_counts now = load_read(l);
            load_print_second(l, (int)(k / rate), &before, &now);
            before = now;
        }
    }
    return load_finish(l);
}

/* ---- the counts at the end ------------------------------------------------------------------- */

static void load_print_rows(FILE *out, const char *label, const load_row *rows)
{
    int i;

    for (i = 0; i < LOAD_ROWS && rows[i].count > 0; i++) {
        fprintf(out, "    %s %-14s %6ld   (first at %.1f s, last at %.1f s)\n", label, rows[i].key,
                rows[i].count, (double)rows[i].first_ms / 1000, (double)rows[i].last_ms / 1000);
    }
}

static void load_print(FILE *out, const load_counts *n)
{
    fprintf(out, "\n  Counts: sent %ld, ok %ld, failed %ld, without a result %ld\n", n->sent, n->ok,
            n->failed, n->sent - n->ok - n->failed);
    fprintf(out, "  Failed in flight (a part of the request had been sent): %ld\n", n->in_flight);
    load_print_rows(out, "answered by", n->providers);
    load_print_rows(out, "failed with", n->codes);
}

static void load_print_json_rows(const char *label, const load_row *rows)
{
    int i;

    printf(",\"%s\":{", label);
    for (i = 0; i < LOAD_ROWS && rows[i].count > 0; i++) { /* no key needs escapes */
        printf("%s\"%s\":{\"count\":%ld,\"first_ms\":%lld,\"last_ms\":%lld}", i > 0 ? "," : "",
               rows[i].key, rows[i].count, (long long)rows[i].first_ms, (long long)rows[i].last_ms);
    }
    printf("}");
}

static void load_print_json(const load_counts *n, int unexpected)
{
    printf("{\"unexpected\":%d,\"sent\":%ld,\"ok\":%ld,\"failed\":%ld,\"failed_in_flight\":%ld,"
           "\"unfinished\":%ld",
           unexpected, n->sent, n->ok, n->failed, n->in_flight, n->sent - n->ok - n->failed);
    load_print_json_rows("by_provider", n->providers);
    load_print_json_rows("by_code", n->codes);
    printf("}\n");
}

#endif /* USER_LOAD_H_INCLUDED */
