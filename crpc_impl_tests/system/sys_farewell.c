/* Graceful stops under load, on the loopback and over a path that takes time: no call is lost.
 * CRPC_TEST_STOPS=200 is the long form. */
#define CRPC_IMPLEMENTATION
#include "../../crpc.h"
#define CT_TEST_SECONDS (getenv("CRPC_TEST_STOPS") ? 3600 : 240)
#include "../crpc_test.h"
#include "../crpc_net.h"

#define DELAY_MS 20
#define STOPS 20
#define CALLERS 8

/* A relay to one server. It passes on bytes and the end of either side's output, both DELAY_MS
 * later or more. */
typedef struct relay {
    int port, to; /* where it listens, and where the server does */
    int listen_fd;
    uint32_t ending; /* atomic */
    uint32_t pipes;  /* atomic: threads at work */
    pthread_t acceptor;
} relay;

typedef struct relay_pipe {
    relay *r;
    int from, to;
    uint32_t *ends; /* atomic: directions that are open; the last one closes both descriptors */
} relay_pipe;

static void *relay_one_way(void *arg)
{
    relay_pipe *p = (relay_pipe *)arg;
    static const size_t size = 65536;
    char *bytes = (char *)malloc(size);
    for (;;) {
        ssize_t n = recv(p->from, bytes, size, 0);
        ct_sleep_ms(DELAY_MS);
        if (n <= 0 || !wire_send(p->to, bytes, (size_t)n))
            break;
    }
    shutdown(p->to, SHUT_WR);
    if (__atomic_sub_fetch(p->ends, 1, __ATOMIC_ACQ_REL) == 0) {
        close(p->from);
        close(p->to);
        free(p->ends);
    }
    __atomic_sub_fetch(&p->r->pipes, 1, __ATOMIC_ACQ_REL);
    free(bytes);
    free(p);
    return NULL;
}

static void relay_start(relay *r, int from, int to, uint32_t *ends)
{
    relay_pipe *p = (relay_pipe *)malloc(sizeof *p);
    pthread_t thread;
    p->r = r;
    p->from = from;
    p->to = to;
    p->ends = ends;
    __atomic_add_fetch(&r->pipes, 1, __ATOMIC_ACQ_REL);
    assert_int_equal(pthread_create(&thread, NULL, relay_one_way, p), 0);
    pthread_detach(thread);
}

/* Accepts until the relay ends and nobody waits to be accepted. */
static void *relay_accept(void *arg)
{
    relay *r = (relay *)arg;
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", r->to);
    for (;;) {
        bool ending = __atomic_load_n(&r->ending, __ATOMIC_ACQUIRE);
        struct pollfd wait = {0, POLLIN, 0};
        uint32_t *ends;
        int fd, to;
        wait.fd = r->listen_fd;
        if (poll(&wait, 1, 20) <= 0) {
            if (ending)
                break;
            continue;
        }
        fd = accept4(r->listen_fd, NULL, NULL, SOCK_CLOEXEC);
        to = wire_connect(url);
        ends = (uint32_t *)malloc(sizeof *ends);
        *ends = 2;
        relay_start(r, fd, to, ends);
        relay_start(r, to, fd, ends);
    }
    close(r->listen_fd);
    return NULL;
}

static void relay_open(relay *r)
{
    crpci_addr a;
    char text[64];
    snprintf(text, sizeof text, "127.0.0.1:%d", r->port);
    assert_true(crpci_sock_parse(&a, text));
    r->ending = 0;
    r->listen_fd = crpci_sock_listen(&a);
    assert_true(r->listen_fd >= 0);
    assert_int_equal(pthread_create(&r->acceptor, NULL, relay_accept, r), 0);
}

/* Takes no new connection, and loses none. Those that it has go on. */
static void relay_leave(relay *r)
{
    crpci_sock_bar(r->listen_fd);
    __atomic_store_n(&r->ending, 1, __ATOMIC_RELEASE);
    pthread_join(r->acceptor, NULL);
}

static int stops(void)
{
    const char *text = getenv("CRPC_TEST_STOPS");
    return text ? atoi(text) : STOPS;
}

/* A provider: a server, and the relay in front of it, if there is one. */
typedef struct provider {
    relay relay;
    bool relayed;
    net n;
    net_mode mode;
    char listen[64];
} provider;

static void provider_open(provider *p)
{
    net_open_server(&p->n, CRPC_POLLER_DEFAULT, p->mode);
    if (p->relayed)
        relay_open(&p->relay);
}

static void provider_close(provider *p)
{
    if (p->relayed)
        relay_leave(&p->relay);
    crpc_server_close(p->n.server);
    crpc_loop_close(p->n.loop);
    pthread_mutex_destroy(&p->n.service.lock);
}

/* Two providers stop in turn and come back, without a registry, while threads call. The method is
 * not idempotent, so each request that was sent must have its reply. */
static void stop_by_turns(bool relayed)
{
    provider p[2];
    char list[128];
    net_callers c;
    pthread_t threads[CALLERS];
    crpc_channel_options o;
    int i, k;
    memset(p, 0, sizeof p);
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    for (i = 0; i < 2; i++) {
        p[i].relayed = relayed;
        p[i].mode = i ? NET_IO : NET_WORKERS;
        p[i].relay.to = ct_free_port();
        p[i].relay.port = relayed ? ct_free_port() : p[i].relay.to;
        snprintf(p[i].listen, sizeof p[i].listen, "tcp://127.0.0.1:%d", p[i].relay.to);
        p[i].n.listen = p[i].listen;
        provider_open(&p[i]);
    }
    snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", p[0].relay.port,
             p[1].relay.port);
    o.policy.timeout_ms = NET_PATIENCE;
    c.channel = net_channel(list, "", CRPC_POLLER_DEFAULT, NULL, &o);
    for (i = 0; i < CALLERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, net_call_on, &c), 0);
    for (k = 0; k < stops(); k++) {
        assert_true(CT_WAIT(net_calls(&p[k % 2].n.service) > 20, NET_PATIENCE));
        provider_close(&p[k % 2]);
        provider_open(&p[k % 2]);
    }
    __atomic_store_n(&c.ended, 1, __ATOMIC_RELEASE);
    for (i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    crpc_channel_close(c.channel);
    for (i = 0; i < 2; i++) {
        provider_close(&p[i]);
        assert_true(CT_WAIT(!__atomic_load_n(&p[i].relay.pipes, __ATOMIC_ACQUIRE), NET_PATIENCE));
    }
    print_message("%d stops: %u calls answered, %u failed, %u lost\n", stops(), c.answered,
                  c.failed, c.lost);
    assert_true(c.answered > (uint32_t)stops() * 20);
    assert_int_equal(c.lost, 0);
}

static void stops_on_the_loopback_lose_no_call(void **state)
{
    (void)state;
    stop_by_turns(false);
}

static void stops_over_a_slow_path_lose_no_call(void **state)
{
    (void)state;
    stop_by_turns(true);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {CT_TEST(stops_on_the_loopback_lose_no_call),
                                              CT_TEST(stops_over_a_slow_path_lose_no_call)};
    return CT_RUN(tests);
}
