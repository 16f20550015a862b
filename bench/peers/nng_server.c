/* nng_server: a REP socket with contexts, each receiving and replying by itself, as in nng's own
 * example of an asynchronous server. There is no dispatch. */
#include <nng/nng.h>
#include <nng/protocol/reqrep0/rep.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CONTEXTS 64

typedef struct work {
    nng_ctx context;
    nng_aio *aio;
    int replying;
} work;

static void go_on(void *work_)
{
    work *w = work_;
    if (nng_aio_result(w->aio) != 0) {
        w->replying = 1; /* the peer is gone: receive again */
    }
    w->replying = !w->replying;
    if (w->replying) { /* the message that the aio holds becomes the reply */
        nng_ctx_send(w->context, w->aio);
    } else {
        nng_ctx_recv(w->context, w->aio);
    }
}

int main(void)
{
    static work works[CONTEXTS];
    nng_socket socket;
    nng_listener listener;
    int port = 0;
    if (nng_rep0_open(&socket) != 0 || nng_listener_create(&listener, socket, "tcp://127.0.0.1:0") ||
        nng_listener_set_size(listener, NNG_OPT_RECVMAXSZ, 0) != 0 ||
        nng_listener_start(listener, 0) != 0 ||
        nng_listener_get_int(listener, NNG_OPT_TCP_BOUND_PORT, &port) != 0) {
        return 1;
    }
    for (int i = 0; i < CONTEXTS; i++) {
        if (nng_ctx_open(&works[i].context, socket) != 0 ||
            nng_aio_alloc(&works[i].aio, go_on, &works[i]) != 0) {
            return 1;
        }
        nng_ctx_recv(works[i].context, works[i].aio);
    }
    printf("%d\n", port);
    fflush(stdout);
    for (;;) {
        pause();
    }
}
