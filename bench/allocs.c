/* Counts what calls allocate when both sides are warm: nothing. `make allocs` runs it.
 *
 * Client and server live in this process, a loop and a thread each; malloc, calloc and realloc are
 * wrapped by the linker. Each case makes its calls over and over until one round of them allocates
 * nothing: with many under way, of random sizes, a buffer more than ever before is needed now and then
 * for some time. Prints a line per case, with the round, and `N passed, N failed`. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long allocations;  /* atomic */
static long by_size[64]; /* atomic; of 2^n bytes and more */

static void count(size_t size)
{
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&by_size[63 - __builtin_clzll(size | 1)], 1, __ATOMIC_RELAXED);
}

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *ptr, size_t size);

void *__wrap_malloc(size_t size)
{
    count(size);
    return __real_malloc(size);
}

void *__wrap_calloc(size_t n, size_t size)
{
    count(n * size);
    return __real_calloc(n, size);
}

void *__wrap_realloc(void *ptr, size_t size)
{
    if (size)
        count(size);
    return __real_realloc(ptr, size);
}

static void must(int status, const char *what)
{
    if (status != CRPC_OK) {
        fprintf(stderr, "allocs: %s: %s\n", what, crpc_status_text(status));
        exit(1);
    }
}

/* --- the server: "~..." is answered by the next tick, which is too late for its caller ------------- */

#define HELD 4096

typedef struct service {
    pthread_mutex_t lock;
    crpc_context *held[HELD];
    int count;
} service;

static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    service *s = (service *)crpc_context_user(context);
    response->message = request->message;
    if (crpc_view_data(request->message)[0] != '~')
        return CRPC_OK;
    pthread_mutex_lock(&s->lock);
    if (s->count < HELD) {
        s->held[s->count++] = context;
        pthread_mutex_unlock(&s->lock);
        return CRPC_EPENDING;
    }
    pthread_mutex_unlock(&s->lock);
    return CRPC_ELIMIT;
}

static void tick(void *user)
{
    service *s = (service *)user;
    crpc_context *context;
    do {
        pthread_mutex_lock(&s->lock);
        context = s->count ? s->held[--s->count] : NULL;
        pthread_mutex_unlock(&s->lock);
        if (context)
            (void)crpc_context_finish(context, CRPC_OK);
    } while (context);
}

/* --- the load ------------------------------------------------------------------------------------- */

#define LARGEST (64 << 10)
#define ROUNDS  20

typedef enum form { SYNC, CALLBACK, BY_ID, ONE_WAY } form;

typedef struct load {
    const char *name;
    form form;
    int depth;
    bool mixed;     /* 32 B to 64 KiB, else 32 B */
    bool timeouts;  /* every eighth call is not answered in time */
    bool cancels;   /* every eighth call by id is cancelled */
    bool dead_peer; /* one of two providers refuses connections, which are then tried again */
    int calls;
} load;

typedef struct run {
    const load *load;
    crpc_channel *channel;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    long begun, ended;
    long target;
    uint32_t random;
} run;

static char bytes[LARGEST];

static uint32_t next_random(run *r)
{
    r->random = r->random * 1664525u + 1013904223u;
    return r->random >> 8;
}

/* The request of call number n. */
static example_EchoRequest request_of(run *r, long n, crpc_call *call)
{
    example_EchoRequest request = example_EchoRequest_init_zero;
    size_t size = r->load->mixed ? 32u << (next_random(r) % 12) : 32;
    bool slow = r->load->timeouts && n % 8 == 7;
    call->policy.timeout_ms = slow ? 1 : 60000;
    request.message = crpc_view_of(slow ? "~" : bytes, slow ? 1 : size);
    return request;
}

static void begin_next(run *r);

static void on_reply(void *user, int status, const example_EchoResponse *response, crpc_call *call)
{
    run *r = (run *)user;
    (void)status;
    (void)response;
    (void)call;
    pthread_mutex_lock(&r->lock);
    r->ended++;
    if (r->ended == r->target)
        pthread_cond_signal(&r->cond);
    pthread_mutex_unlock(&r->lock);
    begin_next(r);
}

static void begin_next(run *r)
{
    crpc_call call = CRPC_INIT;
    example_EchoRequest request;
    long n;
    pthread_mutex_lock(&r->lock);
    n = r->begun < r->target ? r->begun++ : -1;
    if (n >= 0)
        request = request_of(r, n, &call);
    pthread_mutex_unlock(&r->lock);
    if (n >= 0)
        must(example_EchoService_Echo_async(r->channel, &request, on_reply, r, &call), "async");
}

static void callbacks(run *r)
{
    int i;
    for (i = 0; i < r->load->depth; i++)
        begin_next(r);
    pthread_mutex_lock(&r->lock);
    while (r->ended < r->target)
        pthread_cond_wait(&r->cond, &r->lock);
    pthread_mutex_unlock(&r->lock);
}

static void by_id(run *r)
{
    crpc_id ids[512];
    crpc_call call = CRPC_INIT;
    int i;
    while (r->ended < r->target) {
        for (i = 0; i < r->load->depth; i++) {
            crpc_call in = CRPC_INIT;
            example_EchoRequest request = request_of(r, r->begun++, &in);
            must(example_EchoService_Echo_begin(r->channel, &request, &ids[i], &in), "begin");
        }
        for (i = 0; i < r->load->depth; i++, r->ended++) {
            example_EchoResponse response = example_EchoResponse_init_zero;
            if (r->load->cancels && i % 8 == 3) {
                must(crpc_channel_cancel(r->channel, ids[i]), "cancel");
                continue;
            }
            must(crpc_channel_wait(r->channel, ids[i], -1), "wait");
            (void)!example_EchoService_Echo_fetch(r->channel, ids[i], &response, &call);
        }
    }
    crpc_call_reset(&call);
}

static void one_after_another(run *r)
{
    crpc_call call = CRPC_INIT;
    for (; r->ended < r->target; r->ended++) {
        example_EchoRequest request = request_of(r, r->begun++, &call);
        example_EchoResponse response = example_EchoResponse_init_zero;
        if (r->load->form == SYNC) {
            (void)!example_EchoService_Echo(r->channel, &request, &response, &call);
        } else {
            must(crpc_channel_notify(r->channel, &example_EchoService.methods[0], &request, &call),
                 "one-way");
            if (r->ended % 256 == 255) /* so that it does not run away from the server */
                must(example_EchoService_Echo(r->channel, &request, &response, &call), "sync");
        }
    }
    crpc_call_reset(&call);
}

static void make(run *r, int calls)
{
    r->begun = r->ended = 0;
    r->target = calls;
    if (r->load->form == CALLBACK)
        callbacks(r);
    else if (r->load->form == BY_ID)
        by_id(r);
    else
        one_after_another(r);
}

static bool measure(const load *l, const char *server_url)
{
    crpc_channel_options options = CRPC_INIT;
    char url[256];
    long before, during, sizes[64];
    int round, k;
    run r;
    memset(&r, 0, sizeof r);
    r.load = l;
    r.random = 1;
    pthread_mutex_init(&r.lock, NULL);
    pthread_cond_init(&r.cond, NULL);
    options.limits.max_queued = -1;
    if (l->dead_peer) /* nothing listens on port 1 */
        snprintf(url, sizeof url, "list://127.0.0.1:1,%s", server_url + strlen("tcp://"));
    else
        snprintf(url, sizeof url, "%s", server_url);
    must(crpc_channel_open(&r.channel, url, &options, NULL), url);
    make(&r, l->calls);
    for (round = 1, during = 1; during > 0 && round < ROUNDS; round++) {
        memcpy(sizes, by_size, sizeof sizes);
        before = __atomic_load_n(&allocations, __ATOMIC_RELAXED);
        make(&r, l->calls);
        during = __atomic_load_n(&allocations, __ATOMIC_RELAXED) - before;
        /* A new connection is an allocation, and trying a dead peer makes one now and then. */
        during -= l->dead_peer ? l->calls / 100 : 0;
    }
    crpc_channel_close(r.channel);
    pthread_mutex_destroy(&r.lock);
    pthread_cond_destroy(&r.cond);
    printf("%-4s %-54s %6d calls, %ld allocations, round %d\n", during <= 0 ? "ok" : "FAIL",
           l->name, l->calls, during < 0 ? 0 : during, round);
    for (k = 0; during > 0 && k < 64; k++) {
        if (by_size[k] > sizes[k])
            printf("     %ld of %ld bytes and more\n", by_size[k] - sizes[k], 1L << k);
    }
    fflush(stdout);
    return during <= 0;
}

int main(void)
{
    static const load loads[] = {
        {"synchronous", SYNC, 1, false, false, false, false, 20000},
        {"synchronous, 32 B to 64 KiB", SYNC, 1, true, false, false, false, 20000},
        {"synchronous, with timeouts", SYNC, 1, false, true, false, false, 4000},
        {"callbacks, 1 under way", CALLBACK, 1, false, false, false, false, 20000},
        {"callbacks, 64 under way", CALLBACK, 64, false, false, false, false, 100000},
        {"callbacks, 64 under way, 32 B to 64 KiB", CALLBACK, 64, true, false, false, false, 40000},
        {"callbacks, 512 under way", CALLBACK, 512, false, false, false, false, 100000},
        {"callbacks, 512 under way, 32 B to 64 KiB", CALLBACK, 512, true, false, false, false,
         60000},
        {"callbacks, 64 under way, with timeouts", CALLBACK, 64, true, true, false, false, 20000},
        {"by id, 64 under way", BY_ID, 64, false, false, false, false, 64 * 500},
        {"by id, 512 under way, 32 B to 64 KiB, with cancels", BY_ID, 512, true, false, true, false,
         512 * 60},
        {"by id, 64 under way, with timeouts and cancels", BY_ID, 64, false, true, true, false,
         64 * 100},
        {"one-way", ONE_WAY, 1, false, false, false, false, 50000},
        {"callbacks, 64 under way, one of two peers dead", CALLBACK, 64, true, false, false, true,
         40000},
    };
    static const example_EchoService_handlers handlers = {echo};
    crpc_server_options options = CRPC_INIT;
    crpc_server *server;
    char url[CRPC_ADDRESS_MAX + 8];
    service s;
    size_t i, failed = 0;
    memset(&s, 0, sizeof s);
    memset(bytes, 'x', sizeof bytes);
    pthread_mutex_init(&s.lock, NULL);
    options.listen = "tcp://127.0.0.1:0";
    must(crpc_server_open(&server, &options, NULL), "server");
    must(crpc_server_add(server, &example_EchoService, &handlers, &s), "service");
    must(crpc_server_start(server, NULL), "start");
    must(crpc_server_address(server, 0, url, sizeof url), "address");
    must(crpc_timer_start(crpc_server_loop(server), 5, 5, tick, &s, NULL), "timer");
    must(crpc_loop_start(crpc_server_loop(server)), "thread");
    for (i = 0; i < sizeof loads / sizeof *loads; i++)
        failed += !measure(&loads[i], url);
    crpc_server_close(server);
    printf("%zu passed, %zu failed\n", i - failed, failed);
    return failed != 0;
}
