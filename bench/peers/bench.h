/* What the clients of all peers share: kinds of load, payloads, histograms, the result line.
 *
 *   PEER_client PORT PID KIND SIZE SECONDS [NUMBER]
 *
 * calls the server of process PID at PORT with messages of SIZE bytes for SECONDS and prints one
 * line of JSON. Before that it calls for a quarter of the time and compares every reply, byte for
 * byte: a wrong one ends the program. While it measures it still compares the sizes.
 *
 *   sync        one call at a time
 *   attach      the same with SIZE bytes as attachment
 *   pipe        NUMBER calls outstanding on one connection; each reply starts the next call
 *   lockstep    NUMBER calls at once, and the next ones when all have been answered
 *   open        NUMBER calls per second, whether or not the server keeps up; a latency counts from
 *               the moment the call was due. The client spins: no timer is exact enough
 *   threads     NUMBER threads share one connection
 *   conns       NUMBER threads with a connection each
 *   idle        NUMBER connections made and used once; then one call at a time on another one
 *   storm       NUMBER times: connect, call once, disconnect
 *   providers   NUMBER providers in the list of one channel, 64 calls outstanding
 *
 * Exits with 3 if the peer cannot do what is asked. */
#ifndef BENCH_H
#define BENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <stdarg.h>
#include <time.h>
#include <unistd.h>

/* What a client brings along; NULL for what it cannot do. A conn is one connection. A slot is the
 * number of an outstanding call, or of the thread that calls; bench_payload(slot) is its message. */
typedef struct bench_peer {
    void *(*open)(int port);
    void (*close)(void *conn);
    void (*call)(void *conn, int slot);   /* calls, waits, hands the reply to bench_check */
    void (*attach)(void *conn, int slot); /* likewise, with bench_payload as attachment */
    void (*start)(void *conn, int slot);  /* begins a call */
    void (*poll)(void *conn, bool wait);  /* calls bench_end for each call that has ended */
    bool shared;                          /* several threads may call on one conn */
    void *(*open_idle)(int port, int number); /* open; where many of those would be too heavy */
    void *(*open_list)(int port, int count);  /* a channel to the ports from `port` on */
} bench_peer;

#define BENCH_SLOTS 512
#define BENCH_HEADROOM 64 /* bytes before a payload that a client may overwrite */

typedef struct bench_histogram {
    uint64_t count;
    uint32_t bucket[40 * 256]; /* 256 to each power of two: 0.4 % wide */
} bench_histogram;

static struct {
    const bench_peer *peer;
    int port, pid, number;
    const char *kind;
    size_t size;
    double seconds;
    char *payload[BENCH_SLOTS];
    bool verify; /* compare the bytes of every reply */
    bench_histogram all;
    /* calls outstanding on one connection */
    void *conn;
    bool restart;
    int64_t now;
    int until_clock, free_count, free_slot[BENCH_SLOTS];
    int64_t started[BENCH_SLOTS];
    /* threads */
    pthread_barrier_t barrier;
    pthread_mutex_t lock;
    volatile int64_t end;
} bench;

__attribute__((format(printf, 1, 2), noreturn)) static void bench_die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

static int64_t bench_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static bool bench_is(const char *kind)
{
    return strcmp(bench.kind, kind) == 0;
}

/* --- payloads: text, different for each slot, which the first two characters tell ------------- */

static inline const char *bench_payload(int slot)
{
    return bench.payload[slot];
}

/* The slot of a reply, for peers that have no other means to tell. */
static inline int bench_slot(const char *reply)
{
    return (reply[0] - '0') + 64 * (reply[1] - '0');
}

static inline void bench_check(int slot, const char *reply, size_t size)
{
    if (size != bench.size || (bench.verify && memcmp(reply, bench.payload[slot], size) != 0)) {
        bench_die("slot %d: a wrong reply of %zu bytes", slot, size);
    }
}

static void bench_make_payloads(int count)
{
    for (int slot = 0; slot < count; slot++) {
        char *p = (char *)malloc(BENCH_HEADROOM + bench.size + 1) + BENCH_HEADROOM;
        for (size_t i = 2; i < bench.size; i++) {
            p[i] = (char)('a' + (i * 7 + (size_t)slot) % 26);
        }
        p[0] = (char)('0' + slot % 64);
        p[1] = (char)('0' + slot / 64);
        p[bench.size] = 0;
        bench.payload[slot] = p;
    }
}

/* --- latencies -------------------------------------------------------------------------------- */

static inline void bench_record(bench_histogram *h, int64_t ns)
{
    uint64_t v = ns > 0 ? (uint64_t)ns : 0;
    int shift = v < 512 ? 0 : 63 - __builtin_clzll(v) - 8;
    size_t i = (size_t)shift * 256 + (size_t)(v >> shift);
    h->bucket[i < 40 * 256 ? i : 40 * 256 - 1]++;
    h->count++;
}

static double bench_percentile_us(const bench_histogram *h, double share)
{
    uint64_t rank = (uint64_t)((double)h->count * share), seen = 0;
    for (size_t i = 0; i < 40 * 256; i++) {
        seen += h->bucket[i];
        if (seen > rank) {
            int shift = i < 512 ? 0 : (int)(i / 256) - 1;
            double low = (double)((uint64_t)(i - (size_t)shift * 256) << shift);
            return (low + (double)(1ull << shift) / 2) / 1000;
        }
    }
    return 0;
}

/* --- what the server takes -------------------------------------------------------------------- */

typedef struct bench_usage {
    int64_t time_ns, cpu_ns; /* of all its threads, those that have ended included */
    long rss_kb, anon_kb, threads;
} bench_usage;

static long bench_proc(const char *file, const char *key)
{
    char path[64], line[256];
    long value = 0;
    snprintf(path, sizeof path, "/proc/%d/%s", bench.pid, file);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, key, strlen(key)) == 0) {
            value = strtol(line + strlen(key), NULL, 10);
        }
    }
    if (f) {
        fclose(f);
    }
    return value;
}

static bench_usage bench_usage_now(bool memory)
{
    bench_usage u;
    struct timespec cpu;
    clockid_t clock;
    memset(&u, 0, sizeof u);
    if (clock_getcpuclockid(bench.pid, &clock) != 0 || clock_gettime(clock, &cpu) != 0) {
        bench_die("the server is gone");
    }
    u.cpu_ns = (int64_t)cpu.tv_sec * 1000000000 + cpu.tv_nsec;
    if (memory) {
        u.rss_kb = bench_proc("smaps_rollup", "Rss:");
        u.anon_kb = bench_proc("smaps_rollup", "Anonymous:");
        u.threads = bench_proc("status", "Threads:");
    }
    u.time_ns = bench_now();
    return u;
}

static void bench_report(const bench_histogram *h, bench_usage before, const char *more)
{
    bench_usage after = bench_usage_now(true);
    double seconds = (double)(after.time_ns - before.time_ns) / 1e9;
    double rate = (double)h->count / seconds;
    if (h->count == 0) {
        bench_die("not one call ended in time");
    }
    printf("{\"p50_us\": %.3f, \"p99_us\": %.3f, \"p999_us\": %.3f, \"calls\": %llu, "
           "\"calls_per_s\": %.1f, \"mb_per_s\": %.3f, \"server_cpu_us\": %.4f, "
           "\"rss_kb\": %ld, \"anon_kb\": %ld, \"threads\": %ld%s}\n",
           bench_percentile_us(h, 0.5), bench_percentile_us(h, 0.99),
           bench_percentile_us(h, 0.999), (unsigned long long)h->count, rate,
           rate * (double)bench.size / 1e6,
           (double)(after.cpu_ns - before.cpu_ns) / 1000 / (double)h->count, after.rss_kb,
           after.anon_kb, after.threads, more);
    fflush(stdout);
}

/* --- one call at a time ----------------------------------------------------------------------- */

/* Calls until bench.end. */
static void bench_call_on(void *conn, int slot, bench_histogram *h)
{
    void (*call)(void *, int) = strcmp(bench.kind, "attach") ? bench.peer->call : bench.peer->attach;
    for (int64_t began = bench_now(); began < bench.end;) {
        call(conn, slot);
        int64_t ended = bench_now();
        bench_record(h, ended - began);
        began = ended;
    }
}

static void bench_phase(bool verify)
{
    bench.verify = verify;
    memset(&bench.all, 0, sizeof bench.all);
    bench.end = bench_now() + (int64_t)(bench.seconds * (verify ? 0.25e9 : 1e9));
}

static void bench_sync(void *conn, const char *more)
{
    bench_phase(true);
    bench_call_on(conn, 0, &bench.all);
    bench_phase(false);
    bench_usage before = bench_usage_now(false);
    bench_call_on(conn, 0, &bench.all);
    bench_report(&bench.all, before, more);
}

/* --- several calls outstanding on one connection ---------------------------------------------- */

/* A call has ended. Looks at the clock for every eighth reply of one poll only. */
static void bench_end(int slot, const char *reply, size_t size)
{
    bench_check(slot, reply, size);
    if (bench.until_clock-- == 0) {
        bench.now = bench_now();
        bench.until_clock = 7;
    }
    bench_record(&bench.all, bench.now - bench.started[slot]);
    if (bench.restart && bench.now < bench.end) {
        bench.started[slot] = bench.now;
        bench.peer->start(bench.conn, slot);
    } else {
        bench.free_slot[bench.free_count++] = slot;
    }
}

static void bench_poll(bool wait)
{
    bench.until_clock = 0;
    bench.peer->poll(bench.conn, wait);
}

static void bench_start(int64_t at)
{
    int slot = bench.free_slot[--bench.free_count];
    bench.started[slot] = at;
    bench.peer->start(bench.conn, slot);
}

/* Keeps `slots` calls going until bench.end, and waits for the last of them. */
static void bench_outstanding(int slots, bool lockstep)
{
    bench.restart = !lockstep;
    bench.now = bench_now();
    do {
        for (int64_t now = bench_now(); bench.free_count > 0;) {
            bench_start(now);
        }
        do {
            bench_poll(true);
        } while (bench.free_count < slots && (lockstep || bench.now < bench.end));
    } while (bench.now < bench.end);
    while (bench.free_count < slots) {
        bench_poll(true);
    }
}

/* Starts `rate` calls a second until bench.end. */
static void bench_open_loop(int slots, double rate)
{
    int64_t begin = bench_now(), now = begin;
    double started = 0;
    bench.restart = false;
    for (; now < bench.end; now = bench_now()) {
        while (bench.free_count > 0 && started <= (double)(now - begin) * rate / 1e9) {
            bench_start(begin + (int64_t)(started++ / rate * 1e9));
        }
        bench_poll(false);
    }
    while (bench.free_count < slots) {
        bench_poll(true);
    }
}

static void bench_pipe(void *conn, int slots, double rate, bool lockstep)
{
    bench.conn = conn;
    bench_make_payloads(slots);
    while (bench.free_count < slots) {
        bench.free_slot[bench.free_count] = slots - 1 - bench.free_count;
        bench.free_count++;
    }
    bench_phase(true);
    bench_outstanding(slots, lockstep);
    bench_phase(false);
    bench_usage before = bench_usage_now(false);
    rate > 0 ? bench_open_loop(slots, rate) : bench_outstanding(slots, lockstep);
    bench_report(&bench.all, before, "");
}

/* --- threads ---------------------------------------------------------------------------------- */

static void *bench_thread(void *shared_conn)
{
    static int last_slot = -1;
    bench_histogram *h = (bench_histogram *)calloc(1, sizeof *h);
    void *conn = shared_conn ? shared_conn : bench.peer->open(bench.port);
    pthread_mutex_lock(&bench.lock);
    int slot = ++last_slot;
    pthread_mutex_unlock(&bench.lock);
    for (int phase = 0; phase < 2; phase++) {
        pthread_barrier_wait(&bench.barrier); /* all have connected, or warmed up */
        pthread_barrier_wait(&bench.barrier); /* bench.end is set */
        memset(h, 0, sizeof *h);
        bench_call_on(conn, slot, h);
    }
    pthread_mutex_lock(&bench.lock);
    bench.all.count += h->count;
    for (size_t i = 0; i < 40 * 256; i++) {
        bench.all.bucket[i] += h->bucket[i];
    }
    pthread_mutex_unlock(&bench.lock);
    pthread_barrier_wait(&bench.barrier);
    free(h);
    return NULL; /* connections end with the process */
}

static void bench_threads(void *shared_conn)
{
    bench_usage before;
    pthread_barrier_init(&bench.barrier, NULL, (unsigned)bench.number + 1);
    pthread_mutex_init(&bench.lock, NULL);
    bench_make_payloads(bench.number);
    for (int i = 0; i < bench.number; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, bench_thread, shared_conn) != 0) {
            bench_die("no thread");
        }
    }
    for (int phase = 0; phase < 2; phase++) {
        pthread_barrier_wait(&bench.barrier);
        bench_phase(phase == 0);
        before = bench_usage_now(false);
        pthread_barrier_wait(&bench.barrier);
    }
    pthread_barrier_wait(&bench.barrier);
    bench_report(&bench.all, before, "");
    fflush(stdout);
    _exit(0); /* the threads need not be told */
}

/* --- connections ------------------------------------------------------------------------------ */

static void bench_idle(void)
{
    char more[160];
    void *(*open_idle)(int, int) = bench.peer->open_idle;
    void *active = bench.peer->open(bench.port);
    bench.verify = true;
    bench.peer->call(active, 0);
    bench_usage empty = bench_usage_now(true);
    for (int i = 0; i < bench.number; i++) {
        void *conn = open_idle ? open_idle(bench.port, i) : bench.peer->open(bench.port);
        bench.peer->call(conn, 0);
    }
    usleep(100000);
    bench_usage full = bench_usage_now(true);
    usleep(500000);
    bench_usage later = bench_usage_now(false);
    snprintf(more, sizeof more, ", \"bytes_per_connection\": %ld, \"idle_cpu_percent\": %.3f",
             (full.anon_kb - empty.anon_kb) * 1024 / bench.number,
             (double)(later.cpu_ns - full.cpu_ns) * 100 / (double)(later.time_ns - full.time_ns));
    bench_sync(active, more);
    fflush(stdout);
    _exit(0); /* without taking the connections down one by one */
}

static void bench_storm(void)
{
    bench_usage before;
    for (int phase = 0; phase < 2; phase++) {
        bench_phase(phase == 0);
        before = bench_usage_now(false);
        for (int i = phase ? 0 : bench.number * 9 / 10; i < bench.number; i++) {
            int64_t began = bench_now();
            void *conn = bench.peer->open(bench.port);
            bench.peer->call(conn, 0);
            bench.peer->close(conn);
            bench_record(&bench.all, bench_now() - began);
            if (bench_now() > bench.end) {
                break;
            }
        }
    }
    bench_report(&bench.all, before, "");
}

/* --- the program ------------------------------------------------------------------------------ */

/* Whether calls are begun and ended by start and poll. */
static inline bool bench_asynchronous(void)
{
    return bench_is("pipe") || bench_is("lockstep") || bench_is("open") || bench_is("providers");
}

static bool bench_run(const bench_peer *p)
{
    if (bench_is("sync") && p->call) {
        bench_sync(p->open(bench.port), "");
    } else if (bench_is("attach") && p->attach) {
        bench_sync(p->open(bench.port), "");
    } else if ((bench_is("pipe") || bench_is("lockstep")) && p->start) {
        bench_pipe(p->open(bench.port), bench.number, 0, bench_is("lockstep"));
    } else if (bench_is("open") && p->start) {
        bench_pipe(p->open(bench.port), BENCH_SLOTS, bench.number, false);
    } else if (bench_is("threads") && p->call && p->shared) {
        bench_threads(p->open(bench.port));
    } else if (bench_is("conns") && p->call) {
        bench_threads(NULL);
    } else if (bench_is("idle") && p->call) {
        bench_idle();
    } else if (bench_is("storm") && p->close) {
        bench_storm();
    } else if (bench_is("providers") && p->open_list) {
        bench_pipe(p->open_list(bench.port, bench.number), 64, 0, false);
    } else {
        return false;
    }
    return true;
}

static int bench_main(const bench_peer *peer, int argc, char **argv)
{
    struct rlimit files;
    if (argc < 6) {
        bench_die("usage: %s PORT PID KIND SIZE SECONDS [NUMBER]", argv[0]);
    }
    bench.peer = peer;
    bench.port = atoi(argv[1]);
    bench.pid = atoi(argv[2]);
    bench.kind = argv[3];
    bench.size = (size_t)atol(argv[4]);
    bench.seconds = atof(argv[5]);
    bench.number = argc > 6 ? atoi(argv[6]) : 0;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    bench_make_payloads(1);
    return bench_run(peer) ? 0 : 3;
}

#endif
