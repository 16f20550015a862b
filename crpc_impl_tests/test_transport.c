/* impl-transport: the plain one. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#include <signal.h>

static const crpci_transport *const plain = &crpci_transport_plain;

static void pair(int fds[2])
{
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
}

static struct iovec iov_of(void *data, size_t size)
{
    struct iovec v;
    v.iov_base = data;
    v.iov_len = size;
    return v;
}

static void gathers_and_scatters(void **state)
{
    int fds[2], count;
    (void)state;
    for (count = 1; count <= 4; count++) {
        char text[] = "abcdefgh", a[3], b[30];
        struct iovec out[4], in[2];
        int i;
        pair(fds);
        for (i = 0; i < count; i++)
            out[i] = iov_of(text + 2 * i, 2);
        assert_int_equal(plain->writev(fds[0], NULL, out, count), 2 * count);
        memset(b, 0, sizeof b);
        in[0] = iov_of(a, sizeof a);
        in[1] = iov_of(b, sizeof b);
        if (count == 1) {
            assert_int_equal(plain->readv(fds[1], NULL, in, 1), 2);
            assert_memory_equal(a, "ab", 2);
        } else {
            assert_int_equal(plain->readv(fds[1], NULL, in, 2), 2 * count);
            assert_memory_equal(a, "abc", 3);
            assert_memory_equal(b, text + 3, (size_t)(2 * count - 3));
            assert_int_equal(b[2 * count - 3], 0);
        }
        close(fds[0]);
        close(fds[1]);
    }
}

static void would_block(void **state)
{
    static char block[100000];
    struct iovec v[2];
    int fds[2], count;
    (void)state;
    for (count = 1; count <= 2; count++) {
        ssize_t n;
        pair(fds);
        v[0] = v[1] = iov_of(block, sizeof block);
        errno = 0;
        assert_int_equal(plain->readv(fds[0], NULL, v, count), -1);
        assert_int_equal(errno, EAGAIN);
        while ((n = plain->writev(fds[0], NULL, v, count)) > 0) {
        }
        assert_int_equal(n, -1);
        assert_int_equal(errno, EAGAIN);
        close(fds[1]);
        close(fds[0]);
    }
}

static void end_of_file_is_zero(void **state)
{
    char a[4], b[4];
    struct iovec v[2];
    int fds[2], count;
    (void)state;
    for (count = 1; count <= 2; count++) {
        pair(fds);
        close(fds[1]);
        v[0] = iov_of(a, sizeof a);
        v[1] = iov_of(b, sizeof b);
        assert_int_equal(plain->readv(fds[0], NULL, v, count), 0);
        close(fds[0]);
    }
}

static volatile sig_atomic_t pipes;

static void on_pipe(int number)
{
    (void)number;
    pipes++;
}

/* Writing to a peer that has closed gives an error code: a library must not raise SIGPIPE. */
static void writing_to_a_closed_peer_raises_no_signal(void **state)
{
    struct sigaction action, before;
    char text[] = "text";
    struct iovec v[2];
    int fds[2], count;
    (void)state;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_pipe;
    assert_int_equal(sigaction(SIGPIPE, &action, &before), 0);
    for (count = 1; count <= 2; count++) {
        pair(fds);
        close(fds[1]);
        v[0] = v[1] = iov_of(text, 4);
        assert_int_equal(plain->writev(fds[0], NULL, v, count), -1);
        assert_int_equal(errno, EPIPE);
        close(fds[0]);
    }
    assert_int_equal(pipes, 0);
    sigaction(SIGPIPE, &before, NULL);
}

static void a_socket_buffers_no_input(void **state)
{
    int fds[2];
    (void)state;
    assert_null(plain->want);
    assert_null(plain->pending);
    assert_int_equal(plain->flags, CRPCI_TRANSPORT_GATHER | CRPCI_TRANSPORT_DUPLEX);
    pair(fds);
    assert_true(plain->idle(fds[0], NULL));
    assert_int_equal(write(fds[1], "x", 1), 1);
    assert_false(plain->idle(fds[0], NULL));
    close(fds[1]);
    close(fds[0]);
    pair(fds);
    close(fds[1]);
    assert_true(plain->idle(fds[0], NULL)); /* the end of input is nothing to be read */
    close(fds[0]);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(gathers_and_scatters),
        CT_TEST(would_block),
        CT_TEST(end_of_file_is_zero),
        CT_TEST(writing_to_a_closed_peer_raises_no_signal),
        CT_TEST(a_socket_buffers_no_input),
    };
    return CT_RUN(tests);
}
