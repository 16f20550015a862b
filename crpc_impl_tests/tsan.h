/* What the tsan_*.c programs share: a message and a method, threads that count how their calls end,
 * a watchdog, hooks around send and recv, and a peer that echoes.
 *
 * Environment: CRPC_TSAN_CALLS is how many calls each scenario makes with both pollers together
 * (1000000; fewer when CRPC_TEST_MUTANT is set, because a mutant either fails soon or not at all).
 *
 * Counters are relaxed atomics, and the peer keeps away from what TSan sees, so that neither puts
 * events into an order that crpc itself would have to see to. */
#ifndef CRPC_TSAN_H_INCLUDED
#define CRPC_TSAN_H_INCLUDED

#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 280 /* of one scenario on one poller; the watchdog speaks up much earlier  \
                             */
#include "crpc_test.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/un.h>

#define TS_THREADS 32
#define TS_LONG_MS 30000 /* a deadline that is never meant to pass */
#define TS_UNSEEN  __attribute__((no_sanitize("thread"), unused)) static

/* --- relaxed counters ---------------------------------------------------------------------- */

#define TS_GET(p)    __atomic_load_n((p), __ATOMIC_RELAXED)
#define TS_SET(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define TS_ADD(p, n) __atomic_fetch_add((p), (n), __ATOMIC_RELAXED)
/* These hand something over to another thread. */
#define TS_TAKE(p)    __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define TS_GIVE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* --- the message --------------------------------------------------------------------------- */

enum {
    TS_ECHO,   /* is answered at once */
    TS_SILENT, /* is never answered */
    TS_TWICE,  /* is answered two times */
    TS_DEFER,  /* is answered later, by another thread; servers only */
    TS_FAIL    /* is answered with an error; servers only */
};

typedef struct ts_number {
    uint64_t seq; /* never 0; the thread's index stands above bit 40 */
    uint32_t how;
} ts_number;
#define ts_number_FIELDLIST(X, a)                                                                  \
    X(a, STATIC, SINGULAR, FIXED64, seq, 1)                                                        \
    X(a, STATIC, SINGULAR, UINT32, how, 2)
#define ts_number_CALLBACK NULL
#define ts_number_DEFAULT  NULL
PB_BIND(ts_number, ts_number, AUTO)

static int (*ts_handler)(crpc_context *context, const ts_number *in, ts_number *out);

static int ts_serve(crpc_context *context, const void *request, void *response,
                    const void *handlers)
{
    (void)handlers;
    return ts_handler(context, (const ts_number *)request, (ts_number *)response);
}

/* The second may be tried again after it was sent. */
static const crpc_method ts_methods[] = {{"tsan.Echo", "Echo", &ts_number_msg, &ts_number_msg,
                                          sizeof(ts_number), sizeof(ts_number), ts_serve, 0, 0},
                                         {"tsan.Echo", "Again", &ts_number_msg, &ts_number_msg,
                                          sizeof(ts_number), sizeof(ts_number), ts_serve,
                                          CRPC_METHOD_IDEMPOTENT, 0}};
__attribute__((unused)) static const crpc_service ts_service = {"tsan.Echo", ts_methods, 2};

/* --- threads that count -------------------------------------------------------------------- */

typedef struct ts_thread {
    pthread_t thread;
    int index;
    uint64_t random;
    uint64_t seq;
    const char *doing;
    void *scenario;
    uint64_t calls, ok, timeouts, conn, canceled, app; /* how calls ended; they add up to `calls` */
    char apart[64];                                    /* from the next thread's cache line */
} ts_thread;

static ts_thread ts_threads[TS_THREADS];
static int ts_count;
static int64_t ts_budget;      /* calls left to make */
static uint64_t ts_steps;      /* what else counts as progress */
static uint32_t ts_over;       /* the threads without calls of their own shall end */
static crpc_loop *ts_loops[8]; /* shown when something hangs */

CT_FN int64_t ts_calls(void)
{
    const char *text = getenv("CRPC_TSAN_CALLS");
    int64_t n = text && *text ? atoll(text) : getenv("CRPC_TEST_MUTANT") ? 100000 : 1000000;
    return n > 200 ? n : 200;
}

TS_UNSEEN void ts_report(void)
{
    int i;
    for (i = 0; i < ts_count; i++) {
        const ts_thread *t = &ts_threads[i];
        fprintf(stderr,
                "  thread %2d: %-16s calls %llu ok %llu timeouts %llu conn %llu canceled %llu\n", i,
                t->doing ? t->doing : "-", (unsigned long long)t->calls, (unsigned long long)t->ok,
                (unsigned long long)t->timeouts, (unsigned long long)t->conn,
                (unsigned long long)t->canceled);
    }
    for (i = 0; i < 8; i++) {
        const crpc_loop *l = ts_loops[i];
        if (l)
            fprintf(
                stderr,
                "  loop %d: driver %d mode %d foreign %d end %d kicked %d "
                "thread %d stop %u ready %d dirty %d resume %d followers %d calls %u\n",
                i, l->driver, l->mode, l->foreign, l->end, l->kicked, l->thread_state, l->stop,
                l->ready.next != &l->ready, l->dirty.next != &l->dirty,
                l->resume.next != &l->resume, l->followers.next != &l->followers, l->calls.used);
    }
}

/* What went wrong, and the end: a thread cannot fail a cmocka test. */
__attribute__((noreturn, unused, format(printf, 1, 2))) static void ts_bad(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    fflush(stdout);
    fprintf(stderr, "FAILED: ");
    vfprintf(stderr, format, ap);
    fprintf(stderr, "\n");
    va_end(ap);
    ts_report();
    abort();
}

#define TS_CHECK(condition)                                                                        \
    ((condition) ? (void)0 : ts_bad("%s:%d: %s", __FILE__, __LINE__, #condition))

TS_UNSEEN uint64_t ts_progress(void)
{
    uint64_t n = TS_GET(&ts_steps);
    int i;
    for (i = 0; i < ts_count; i++)
        n += ts_threads[i].calls;
    return n;
}

static const char *ts_scenario;
static int64_t ts_began;
static uint32_t ts_watching;
static pthread_t ts_watchdog_thread;

/* Nothing moved for a while: says who hangs where, and ends the program. */
TS_UNSEEN void *ts_watchdog(void *arg)
{
    int patience = getenv("CRPC_TEST_MUTANT") ? 40 : 250, quiet = 0;
    uint64_t last = 0;
    (void)arg;
    while (TS_GET(&ts_watching)) {
        uint64_t now = ts_progress();
        quiet = now == last ? quiet + 1 : 0;
        last = now;
        if (quiet > patience) {
            fprintf(stderr, "FAILED: %s hangs\n", ts_scenario);
            ts_report();
            abort();
        }
        usleep(100000);
    }
    return NULL;
}

typedef void (*ts_fn)(ts_thread *t);
static ts_fn ts_fns[TS_THREADS];

CT_FN void *ts_main(void *arg)
{
    ts_thread *t = (ts_thread *)arg;
    ts_fns[t->index](t);
    TS_SET(&t->doing, "done");
    return NULL;
}

CT_FN void ts_begin(const char *scenario, int64_t calls)
{
    memset(ts_threads, 0, sizeof ts_threads);
    memset(ts_loops, 0, sizeof ts_loops);
    ts_count = 0;
    ts_scenario = scenario;
    ts_began = ct_now_ms();
    ts_budget = calls;
    ts_over = 0;
    ts_watching = 1;
    TS_CHECK(pthread_create(&ts_watchdog_thread, NULL, ts_watchdog, NULL) == 0);
}

CT_FN void ts_start(int n, ts_fn fn, void *scenario)
{
    while (n--) {
        ts_thread *t = &ts_threads[ts_count];
        t->index = ts_count;
        t->random =
            ct_seed() * 0x9e3779b97f4a7c15u + (uint64_t)(ts_count + 1) * 0xbf58476d1ce4e5b9u;
        t->random |= 1;
        t->scenario = scenario;
        ts_fns[ts_count++] = fn;
        TS_CHECK(pthread_create(&t->thread, NULL, ts_main, t) == 0);
    }
}

CT_FN void ts_join(int from, int n)
{
    while (n--)
        pthread_join(ts_threads[from++].thread, NULL);
}

/* Adds up, and returns the sums in ts_threads[0]'s form. */
CT_FN ts_thread ts_end(int64_t calls)
{
    ts_thread sum;
    int i;
    memset(&sum, 0, sizeof sum);
    for (i = 0; i < ts_count; i++) {
        const ts_thread *t = &ts_threads[i];
        sum.calls += t->calls;
        sum.ok += t->ok;
        sum.timeouts += t->timeouts;
        sum.conn += t->conn;
        sum.canceled += t->canceled;
        sum.app += t->app;
    }
    TS_SET(&ts_watching, 0);
    pthread_join(ts_watchdog_thread, NULL);
    printf("%s: %.1f s, %llu calls: %llu ok, %llu timeouts, %llu lost connections, %llu canceled, "
           "%llu application errors\n",
           ts_scenario, (double)(ct_now_ms() - ts_began) / 1000, (unsigned long long)sum.calls,
           (unsigned long long)sum.ok, (unsigned long long)sum.timeouts,
           (unsigned long long)sum.conn, (unsigned long long)sum.canceled,
           (unsigned long long)sum.app);
    fflush(stdout);
    TS_CHECK(sum.calls >= (uint64_t)calls);
    TS_CHECK(sum.calls == sum.ok + sum.timeouts + sum.conn + sum.canceled + sum.app);
    return sum;
}

CT_FN bool ts_take(void)
{
    return TS_ADD(&ts_budget, -1) > 0;
}

CT_FN uint32_t ts_below(ts_thread *t, uint32_t n)
{
    return (uint32_t)((ct_random_from(&t->random) >> 33) % n);
}

CT_FN uint64_t ts_seq(ts_thread *t)
{
    return (uint64_t)(t->index + 1) << 40 | ++t->seq;
}

enum { TS_MAY_TIME_OUT = 1, TS_MAY_LOSE = 2, TS_MAY_CANCEL = 4, TS_MAY_FAIL = 8 };

/* Counts the end of a call; what may not have happened is fatal. */
CT_FN void ts_account(ts_thread *t, int err, const crpc_error *e, unsigned may)
{
    TS_SET(&t->calls, t->calls + 1);
    if (!err)
        t->ok++;
    else if (err == CRPC_ETIMEDOUT && may & TS_MAY_TIME_OUT)
        t->timeouts++;
    else if (err == CRPC_ECONN && may & TS_MAY_LOSE)
        t->conn++;
    else if (err == CRPC_ECANCELED && may & TS_MAY_CANCEL)
        t->canceled++;
    else if (err == CRPC_EAPP && may & TS_MAY_FAIL)
        t->app++;
    else
        ts_bad("thread %d: a call ended with %s: %s", t->index, crpc_status_name(err),
               e ? e->text : "");
}

/* One synchronous call whose reply must be its own. */
CT_FN int ts_call(ts_thread *t, crpc_channel *ch, uint32_t how, crpc_call *call, unsigned may)
{
    ts_number in, out;
    int err;
    in.seq = ts_seq(t);
    in.how = how;
    memset(&out, 0, sizeof out);
    TS_SET(&t->doing, "crpc_channel_call");
    err = crpc_channel_call(ch, &ts_methods[t->seq % 4 == 0], &in, &out, call);
    TS_SET(&t->doing, "-");
    if (!err && out.seq != in.seq)
        ts_bad("thread %d: reply %llx to request %llx", t->index, (unsigned long long)out.seq,
               (unsigned long long)in.seq);
    ts_account(t, err, &call->error, may);
    return err;
}

CT_FN crpc_loop *ts_loop_of(int slot, crpc_poller poller, ct_alloc *alloc)
{
    crpc_loop_options o;
    memset(&o, 0, sizeof o);
    o.poller = poller;
    o.hooks = ct_hooks_of(alloc);
    o.hooks.log_level = -1;
    TS_CHECK(crpc_loop_open(&ts_loops[slot], &o) == CRPC_OK);
    return ts_loops[slot];
}

CT_FN crpc_loop *ts_loop(int slot, crpc_poller poller)
{
    return ts_loop_of(slot, poller, ct_alloc_of_test());
}

CT_FN void ts_loop_close(int slot)
{
    crpc_loop *l = ts_loops[slot];
    ts_loops[slot] = NULL;
    crpc_loop_close(l);
}

/* `apart`: channels with different ones do not share a connection. */
CT_FN crpc_channel *ts_channel(crpc_loop *loop, const char *url, int apart)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    memset(&o, 0, sizeof o);
    o.loop = loop;
    o.policy.timeout_ms = TS_LONG_MS;
    o.connect_timeout_ms = TS_LONG_MS + apart;
    if (crpc_channel_open(&ch, url, &o, &error) != CRPC_OK)
        ts_bad("crpc_channel_open %s: %s", url, error.text);
    return ch;
}

/* --- hooks around the system calls that crpc makes without its lock -------------------------- */

static void (*ts_before_send)(int fd);
static void (*ts_after_send)(int fd);
static void (*ts_before_recv)(int fd);

ssize_t __real_send(int fd, const void *p, size_t n, int flags);
ssize_t __real_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __real_recv(int fd, void *p, size_t n, int flags);
ssize_t __wrap_send(int fd, const void *p, size_t n, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags);
ssize_t __wrap_recv(int fd, void *p, size_t n, int flags);

static ssize_t ts_sent(int fd, ssize_t n)
{
    int saved = errno;
    if (ts_after_send)
        ts_after_send(fd);
    errno = saved;
    return n;
}

ssize_t __wrap_send(int fd, const void *p, size_t n, int flags)
{
    if (ts_before_send)
        ts_before_send(fd);
    return ts_sent(fd, __real_send(fd, p, n, flags));
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *m, int flags)
{
    if (ts_before_send)
        ts_before_send(fd);
    return ts_sent(fd, __real_sendmsg(fd, m, flags));
}

ssize_t __wrap_recv(int fd, void *p, size_t n, int flags)
{
    if (ts_before_recv)
        ts_before_recv(fd);
    return __real_recv(fd, p, n, flags);
}

__attribute__((unused)) static uint32_t ts_dice(uint32_t n);

int __real_pthread_mutex_unlock(pthread_mutex_t *m);
int __wrap_pthread_mutex_unlock(pthread_mutex_t *m);

/* In every scenario a thread loses the processor now and then just when it has let go of a lock. */
int __wrap_pthread_mutex_unlock(pthread_mutex_t *m)
{
    int failed = __real_pthread_mutex_unlock(m);
    uint32_t d = ts_dice(1024);
    if (d == 0)
        usleep(ts_dice(200));
    else if (d < 8)
        sched_yield();
    return failed;
}

/* A number below n, of no thread in particular. */
TS_UNSEEN uint32_t ts_dice(uint32_t n)
{
    static __thread uint64_t state;
    if (!state)
        state = (uint64_t)(uintptr_t)&state ^ (uint64_t)ct_now_us() * 0x9e3779b97f4a7c15u;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * UINT64_C(2685821657736338717)) >> 33) % n;
}

/* --- a peer that echoes, unseen by TSan ------------------------------------------------------ */

#define TS_PEER_CONNS  128
#define TS_PEER_BUFFER (256 << 10)

typedef struct ts_peer {
    ct_dir dir;
    char url[128];
    int listen_fd;
    int epoll_fd;
    bool threaded;
    pthread_t thread;
    uint32_t stop;
    uint32_t busy; /* the lock of ts_peer_serve */
    struct {
        int fd;
        uint8_t *in;
        size_t have;
        uint32_t frames;
    } conns[TS_PEER_CONNS];
    uint8_t out[TS_PEER_BUFFER];
    /* manners; set them while nothing runs */
    uint32_t delay_us;   /* replies wait for up to this long */
    uint32_t drop_after; /* frames, about, after which a connection is closed. 0: never */
    uint32_t slow;       /* reads little at a time, so that senders block */
    /* what was seen */
    uint64_t silent[TS_THREADS]; /* the last TS_SILENT request of each thread */
    uint64_t frames;
    uint64_t drops;
} ts_peer;

TS_UNSEEN size_t ts_peer_varint(const uint8_t *p, size_t n, uint64_t *v)
{
    size_t i;
    *v = 0;
    for (i = 0; i < n && i < 10; i++) {
        *v |= (uint64_t)(p[i] & 0x7f) << (7 * i);
        if (!(p[i] & 0x80))
            return i + 1;
    }
    return n + 1;
}

/* Finds correlation_id and attachment_size in an RpcMeta. */
TS_UNSEEN void ts_peer_meta(const uint8_t *p, size_t n, uint64_t *id, uint64_t *attached)
{
    size_t at = 0;
    *id = *attached = 0;
    while (at < n) {
        uint64_t key, v = 0;
        at += ts_peer_varint(p + at, n - at, &key);
        if ((key & 7) == 0) {
            at += ts_peer_varint(p + at, n - at, &v);
            if (key >> 3 == 4)
                *id = v;
            else if (key >> 3 == 5)
                *attached = v;
        } else if ((key & 7) == 2) {
            at += ts_peer_varint(p + at, n - at, &v);
            at += (size_t)v;
        } else {
            return;
        }
    }
}

TS_UNSEEN void ts_peer_put32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

TS_UNSEEN uint32_t ts_peer_get32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* The reply to one frame, at `to`; returns its size. */
TS_UNSEEN size_t ts_peer_reply(uint8_t *to, uint64_t id, const uint8_t *payload, size_t size)
{
    size_t meta = 0;
    uint8_t *m = to + 12;
    m[meta++] = 0x12; /* response: error_code 0 */
    m[meta++] = 2;
    m[meta++] = 8;
    m[meta++] = 0;
    m[meta++] = 0x20; /* correlation_id */
    do {
        m[meta++] = (uint8_t)((id & 0x7f) | (id > 0x7f ? 0x80 : 0));
        id >>= 7;
    } while (id);
    to[0] = 'P', to[1] = 'R', to[2] = 'P', to[3] = 'C';
    ts_peer_put32(to + 4, (uint32_t)(meta + size));
    ts_peer_put32(to + 8, (uint32_t)meta);
    while (size--)
        m[meta + size] = payload[size]; /* not memcpy, which TSan would see */
    return 12 + ts_peer_get32(to + 4);
}

TS_UNSEEN void ts_peer_send(int fd, const uint8_t *p, size_t n)
{
    int tries = 0;
    while (n) {
        long sent = syscall(SYS_sendto, fd, p, n, MSG_NOSIGNAL | MSG_DONTWAIT, NULL, 0);
        if (sent > 0) {
            p += sent;
            n -= (size_t)sent;
            tries = 0;
        } else if (errno != EAGAIN || ++tries > 20000) {
            return; /* the other side is gone, or does not read */
        } else {
            syscall(SYS_sched_yield);
            if (tries > 100)
                usleep(100);
        }
    }
}

TS_UNSEEN void ts_peer_drop(ts_peer *p, int i)
{
    syscall(SYS_close, p->conns[i].fd);
    p->conns[i].fd = -1;
    p->conns[i].have = 0;
    p->conns[i].frames = 0;
}

/* Answers what is complete in a connection's buffer. */
TS_UNSEEN void ts_peer_answer(ts_peer *p, int i)
{
    uint8_t *in = p->conns[i].in;
    size_t at = 0, have = p->conns[i].have, out = 0, k;
    while (have - at >= 12) {
        uint32_t body = ts_peer_get32(in + at + 4), meta = ts_peer_get32(in + at + 8);
        uint64_t id, attached, seq = 0;
        const uint8_t *payload = in + at + 12 + meta;
        size_t size;
        uint32_t how = TS_ECHO;
        if (have - at < 12 + (size_t)body)
            break;
        ts_peer_meta(in + at + 12, meta, &id, &attached);
        size = body - meta - (size_t)attached;
        if (size > 10)
            how = payload[10];
        for (k = 8; size >= 9 && k > 0; k--)
            seq = seq << 8 | payload[k];
        p->frames++;
        p->conns[i].frames++;
        if (how == TS_SILENT && seq >> 40 && seq >> 40 <= TS_THREADS)
            __atomic_store_n(&p->silent[(seq >> 40) - 1], seq, __ATOMIC_RELEASE);
        if (how != TS_SILENT && id) { /* 0: a one-way call */
            out += ts_peer_reply(p->out + out, id, payload, size);
            if (how == TS_TWICE)
                out += ts_peer_reply(p->out + out, id, payload, size);
        }
        if (out > sizeof p->out / 2) {
            ts_peer_send(p->conns[i].fd, p->out, out);
            out = 0;
        }
        at += 12 + (size_t)body;
    }
    if (out && p->delay_us) {
        uint32_t us = ts_dice(p->delay_us);
        if (us > 60)
            usleep(us - 60); /* about what a sleep takes longer */
    }
    ts_peer_send(p->conns[i].fd, p->out, out);
    for (k = 0; k < have - at; k++)
        in[k] = in[at + k];
    p->conns[i].have = have - at;
    if (p->drop_after && p->conns[i].frames > p->drop_after / 2 + ts_dice(p->drop_after)) {
        p->drops++;
        if (ts_dice(2))
            syscall(SYS_shutdown, p->conns[i].fd, SHUT_WR);
        ts_peer_drop(p, i);
    }
}

TS_UNSEEN void ts_peer_read(ts_peer *p, int i)
{
    int rounds = p->slow ? 1 : 8;
    while (rounds-- && p->conns[i].fd >= 0) {
        size_t room = TS_PEER_BUFFER - p->conns[i].have;
        long n;
        if (p->slow && room > 16384)
            room = 16384;
        n = syscall(SYS_recvfrom, p->conns[i].fd, p->conns[i].in + p->conns[i].have, room,
                    MSG_DONTWAIT, NULL, NULL);
        if (n < 0)
            return;
        if (n == 0) {
            ts_peer_drop(p, i);
            return;
        }
        p->conns[i].have += (size_t)n;
        ts_peer_answer(p, i);
        if ((size_t)n < room)
            return;
    }
}

TS_UNSEEN void ts_peer_accept(ts_peer *p)
{
    int fd, i;
    while ((fd = (int)syscall(SYS_accept4, p->listen_fd, NULL, NULL,
                              SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct epoll_event e;
        for (i = 0; i < TS_PEER_CONNS && p->conns[i].fd >= 0; i++) {
        }
        if (i == TS_PEER_CONNS) {
            fprintf(stderr, "FAILED: more than %d connections at a time\n", TS_PEER_CONNS);
            abort();
        }
        if (!p->conns[i].in)
            p->conns[i].in = (uint8_t *)mmap(NULL, TS_PEER_BUFFER, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        p->conns[i].fd = fd;
        e.events = EPOLLIN;
        e.data.u32 = (uint32_t)i;
        if (p->threaded)
            syscall(SYS_epoll_ctl, p->epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

/* Does the peer's work on the caller's thread. */
TS_UNSEEN void ts_peer_serve(ts_peer *p)
{
    int i;
    while (__atomic_exchange_n(&p->busy, 1, __ATOMIC_ACQUIRE))
        syscall(SYS_sched_yield);
    ts_peer_accept(p);
    for (i = 0; i < TS_PEER_CONNS; i++) {
        if (p->conns[i].fd >= 0)
            ts_peer_read(p, i);
    }
    __atomic_store_n(&p->busy, 0, __ATOMIC_RELEASE);
}

TS_UNSEEN void *ts_peer_main(void *arg)
{
    ts_peer *p = (ts_peer *)arg;
    struct epoll_event e[32];
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        long i, n = syscall(SYS_epoll_wait, p->epoll_fd, e, 32, 20);
        for (i = 0; i < n; i++) {
            if (e[i].data.u32 == UINT32_MAX)
                ts_peer_accept(p);
            else if (p->conns[e[i].data.u32].fd >= 0)
                ts_peer_read(p, (int)e[i].data.u32);
        }
    }
    return NULL;
}

/* `threaded`: with a thread of its own; else somebody calls ts_peer_serve. */
CT_FN ts_peer *ts_peer_open(bool threaded)
{
    ts_peer *p = (ts_peer *)calloc(1, sizeof *p);
    struct sockaddr_un a;
    struct epoll_event e;
    int i;
    TS_CHECK(p != NULL);
    p->dir = ct_dir_make();
    memset(&a, 0, sizeof a);
    a.sun_family = AF_UNIX;
    snprintf(a.sun_path, sizeof a.sun_path, "%s/peer", p->dir.path);
    snprintf(p->url, sizeof p->url, "unix://%s/peer", p->dir.path);
    for (i = 0; i < TS_PEER_CONNS; i++)
        p->conns[i].fd = -1;
    p->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    TS_CHECK(bind(p->listen_fd, (struct sockaddr *)&a, sizeof a) == 0);
    TS_CHECK(listen(p->listen_fd, 128) == 0);
    p->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    p->threaded = threaded;
    e.events = EPOLLIN;
    e.data.u64 = 0;
    e.data.u32 = UINT32_MAX;
    TS_CHECK(epoll_ctl(p->epoll_fd, EPOLL_CTL_ADD, p->listen_fd, &e) == 0);
    return p;
}

/* After the manners are set. */
CT_FN void ts_peer_start(ts_peer *p)
{
    TS_CHECK(pthread_create(&p->thread, NULL, ts_peer_main, p) == 0);
}

CT_FN void ts_peer_close(ts_peer *p)
{
    int i;
    if (p->threaded) {
        __atomic_store_n(&p->stop, 1, __ATOMIC_RELEASE);
        pthread_join(p->thread, NULL);
    }
    for (i = 0; i < TS_PEER_CONNS; i++) {
        if (p->conns[i].fd >= 0)
            ts_peer_drop(p, i);
        if (p->conns[i].in)
            munmap(p->conns[i].in, TS_PEER_BUFFER);
    }
    close(p->listen_fd);
    close(p->epoll_fd);
    ct_dir_remove(p->dir);
    free(p);
}

#endif /* CRPC_TSAN_H_INCLUDED */
