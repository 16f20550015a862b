/* nng_client: a REQ socket for each connection, a context in it for each outstanding call. */
#include "bench.h"

#include <nng/nng.h>
#include <nng/protocol/reqrep0/req.h>

typedef struct conn conn;
typedef struct request {
    conn *owner;
    nng_ctx context;
    nng_aio *aio;
    bool sent;
    int slot;
} request;

struct conn {
    nng_socket socket;
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    int ended[BENCH_SLOTS], ended_count;
    request requests[BENCH_SLOTS];
};

static void must(int error)
{
    if (error) {
        bench_die("nng: %s", nng_strerror(error));
    }
}

static void *open_conn(int port)
{
    char url[64];
    nng_dialer dialer;
    conn *c = calloc(1, sizeof *c);
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", port);
    must(nng_req0_open(&c->socket));
    must(nng_dialer_create(&dialer, c->socket, url));
    must(nng_dialer_set_size(dialer, NNG_OPT_RECVMAXSZ, 0));
    must(nng_dialer_start(dialer, 0));
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->arrived, NULL);
    return c;
}

static void close_conn(void *conn_)
{
    nng_close(((conn *)conn_)->socket);
    free(conn_);
}

/* On a thread of nng's: the request has been sent, or its reply has come. */
static void go_on(void *request_)
{
    request *r = request_;
    conn *c = r->owner;
    must(nng_aio_result(r->aio));
    if (!r->sent) {
        r->sent = true;
        nng_ctx_recv(r->context, r->aio);
        return;
    }
    pthread_mutex_lock(&c->lock);
    c->ended[c->ended_count++] = r->slot;
    pthread_cond_signal(&c->arrived);
    pthread_mutex_unlock(&c->lock);
}

static request *request_of(conn *c, int slot, void (*callback)(void *))
{
    request *r = &c->requests[slot];
    if (!r->aio) {
        r->owner = c;
        r->slot = slot;
        must(nng_ctx_open(&r->context, c->socket));
        must(nng_aio_alloc(&r->aio, callback, r));
    }
    return r;
}

static void send_request(request *r)
{
    nng_msg *m;
    must(nng_msg_alloc(&m, 0));
    must(nng_msg_append(m, bench_payload(r->slot), bench.size));
    nng_aio_set_msg(r->aio, m);
    r->sent = false;
    nng_ctx_send(r->context, r->aio);
}

static void start(void *conn_, int slot)
{
    send_request(request_of((conn *)conn_, slot, go_on));
}

static void poll_conn(void *conn_, bool wait)
{
    conn *c = conn_;
    int ended[BENCH_SLOTS], count;
    pthread_mutex_lock(&c->lock);
    while (wait && c->ended_count == 0) {
        pthread_cond_wait(&c->arrived, &c->lock);
    }
    count = c->ended_count;
    memcpy(ended, c->ended, sizeof *ended * (size_t)count);
    c->ended_count = 0;
    pthread_mutex_unlock(&c->lock);
    for (int i = 0; i < count; i++) {
        nng_msg *m = nng_aio_get_msg(c->requests[ended[i]].aio);
        nng_aio_set_msg(c->requests[ended[i]].aio, NULL);
        bench_end(ended[i], nng_msg_body(m), nng_msg_len(m));
        nng_msg_free(m);
    }
}

static void call(void *conn_, int slot)
{
    request *r = request_of((conn *)conn_, slot, NULL);
    send_request(r);
    nng_aio_wait(r->aio);
    must(nng_aio_result(r->aio));
    nng_ctx_recv(r->context, r->aio);
    nng_aio_wait(r->aio);
    must(nng_aio_result(r->aio));
    nng_msg *m = nng_aio_get_msg(r->aio);
    bench_check(slot, nng_msg_body(m), nng_msg_len(m));
    nng_msg_free(m);
}

int main(int argc, char **argv)
{
    static const bench_peer peer = {open_conn, close_conn, call, NULL, start,
                                    poll_conn, true,       NULL, NULL};
    return bench_main(&peer, argc, argv);
}
