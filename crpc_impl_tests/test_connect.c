/* Sockets that become connections. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_net.h"

/* The kernel may connect a socket to itself when a closed port of the ephemeral range is dialled;
 * that must count as refused. */
static void a_connection_to_itself_counts_as_refused(void **state)
{
    int tries, fd, found = 0;
    (void)state;
    for (tries = 0; tries < 100 && !found; tries++) {
        struct sockaddr_in a;
        socklen_t size = sizeof a;
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
        assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
        if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0) { /* bound to where it goes */
            found = 1;
            assert_true(crpci_sock_is_self(fd));
        }
        close(fd);
    }
    assert_true(found);
}

/* Counts the replies that came. */
static void on_reply(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    (void)response, (void)call;
    *(int *)user += status == CRPC_OK;
}

/* A server answers many calls and ends while the client is busy elsewhere. The client's next request
 * cannot be sent; the replies that had arrived, more than one read takes, count all the same. */
static void a_failed_send_loses_no_reply_that_has_come(void **state)
{
    enum { CALLS = 100, SIZE = 1500 };
    ct_dir dir = ct_dir_make();
    struct sockaddr_un a;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *ch;
    wire w = {NULL, 0, 0}, meta = {NULL, 0, 0}, body = {NULL, 0, 0};
    dyn_Num in = net_num(1);
    char url[128], *bytes = net_bytes(SIZE);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd, i;
    int good = 0, lost = 0;
    (void)state;
    memset(&a, 0, sizeof a);
    a.sun_family = AF_UNIX;
    snprintf(a.sun_path, sizeof a.sun_path, "%s/s", dir.path);
    assert_int_equal(bind(listener, (struct sockaddr *)&a, sizeof a), 0);
    assert_int_equal(listen(listener, 1), 0);
    snprintf(url, sizeof url, "unix://%s", a.sun_path);
    ch = net_channel(url, "?timeout_ms=20000&retries=-1", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    for (i = 0; i < CALLS; i++)
        assert_int_equal(dyn_Echo_Add_async(ch, &in, on_reply, &good, NULL), CRPC_OK);
    for (i = 0; i < 20; i++)
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    fd = accept(listener, NULL, NULL);
    wire_bytes(&body, 15, bytes, SIZE); /* a field that the client does not know */
    for (i = 0; i < CALLS; i++) {
        wire_message m;
        assert_int_equal(wire_receive(fd, &m), 1);
        meta.n = 0;
        wire_int(&meta, 4, m.id);
        wire_frame(&w, &meta, body.p, body.n);
        wire_done(&m);
    }
    assert_true(w.n > 2 * CRPCI_CONN_READ);
    assert_true(wire_flush(fd, &w));
    close(fd);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_reply, &lost, NULL), CRPC_OK);
    for (i = 0; i < 200; i++)
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(good, CALLS);
    assert_int_equal(lost, 0);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    close(listener);
    wire_free(&meta);
    wire_free(&body);
    free(bytes);
    ct_dir_remove(dir);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_connection_to_itself_counts_as_refused),
        CT_TEST(a_failed_send_loses_no_reply_that_has_come),
    };
    return CT_RUN(tests);
}
