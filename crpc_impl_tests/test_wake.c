/* impl-wake: with an eventfd, and with the pipe that replaces it where eventfd is refused. */
static int no_eventfd; /* errno with which eventfd fails; 0: it works */
#include <errno.h>
#include <sys/eventfd.h>
static int watch_eventfd(unsigned value, int flags)
{
    if (no_eventfd) {
        errno = no_eventfd;
        return -1;
    }
    return eventfd(value, flags);
}

#define CRPC_IMPLEMENTATION
#define eventfd watch_eventfd
#include "../crpc.h"
#undef eventfd
#include "crpc_test.h"

#include <signal.h>

static bool readable(const crpci_wake *w)
{
    struct pollfd p;
    p.fd = w->read_fd;
    p.events = POLLIN;
    return poll(&p, 1, 0) == 1;
}

static int open_wake(crpci_wake *w)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    int err;
    hooks.log_level = -1;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    err = crpci_wake_open(w, h);
    crpci_heap_unref(h);
    return err;
}

static crpci_wake open_kind(int pipe_instead)
{
    static const int refusals[] = {ENOSYS, EPERM};
    static unsigned opened;
    crpci_wake w;
    no_eventfd = pipe_instead ? refusals[opened++ % 2] : 0;
    assert_int_equal(open_wake(&w), CRPC_OK);
    no_eventfd = 0;
    assert_int_equal(w.read_fd != w.write_fd, pipe_instead);
    return w;
}

static void a_kick_is_readable_until_drained(void **state)
{
    int kind, i;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        crpci_wake w = open_kind(kind);
        assert_false(readable(&w));
        crpci_wake_drain(&w); /* does not block */
        for (i = 1; i < 200; i += i) {
            int n;
            for (n = 0; n < i; n++)
                crpci_wake_kick(&w);
            assert_true(readable(&w));
            crpci_wake_drain(&w); /* one drain for all kicks */
            assert_false(readable(&w));
        }
        crpci_wake_close(&w);
        assert_int_equal(w.read_fd, -1);
        crpci_wake_close(&w);
    }
}

/* A kick never blocks, however many came before, and one drain is enough. */
static void a_full_descriptor_still_wakes(void **state)
{
    int kind;
    long i;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        crpci_wake w = open_kind(kind);
        if (kind == 0) { /* the counter at its maximum */
            uint64_t full = UINT64_MAX - 1;
            assert_int_equal(write(w.write_fd, &full, sizeof full), sizeof full);
        }
        for (i = 0; i < (kind ? 20000 : 100); i++)
            crpci_wake_kick(&w);
        assert_true(readable(&w));
        crpci_wake_drain(&w);
        assert_false(readable(&w));
        crpci_wake_kick(&w);
        assert_true(readable(&w));
        crpci_wake_close(&w);
    }
}

static void descriptors_are_private_and_do_not_block(void **state)
{
    int kind, i;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        crpci_wake w = open_kind(kind);
        int fds[2];
        fds[0] = w.read_fd;
        fds[1] = w.write_fd;
        for (i = 0; i < 2; i++) {
            assert_true(fcntl(fds[i], F_GETFD) & FD_CLOEXEC);
            assert_true(fcntl(fds[i], F_GETFL) & O_NONBLOCK);
        }
        crpci_wake_close(&w);
    }
}

static void no_descriptors_left(void **state)
{
    crpci_wake w;
    (void)state;
    no_eventfd = EMFILE;
    assert_int_equal(open_wake(&w), CRPC_ESYSTEM);
    no_eventfd = 0;
    crpci_wake_close(&w); /* no effect */
}

static crpci_wake of_signal;

static void on_signal(int number)
{
    (void)number;
    crpci_wake_kick(&of_signal);
}

/* A kick is async-signal-safe and keeps errno. */
static void kicks_from_a_signal_handler(void **state)
{
    struct sigaction action, before;
    int kind;
    (void)state;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    assert_int_equal(sigaction(SIGUSR1, &action, &before), 0);
    for (kind = 0; kind < 2; kind++) {
        long i;
        of_signal = open_kind(kind);
        errno = 4711;
        raise(SIGUSR1);
        assert_int_equal(errno, 4711);
        assert_true(readable(&of_signal));
        for (i = 0; i < 20000; i++)
            crpci_wake_kick(&of_signal);
        if (kind == 0) {
            uint64_t full = UINT64_MAX - 1 - 20001;
            (void)!write(of_signal.write_fd, &full, sizeof full);
        }
        errno = 4711;
        raise(SIGUSR1); /* now its write fails */
        assert_int_equal(errno, 4711);
        crpci_wake_close(&of_signal);
    }
    sigaction(SIGUSR1, &before, NULL);
}

static void *kick_later(void *arg)
{
    ct_sleep_ms(30);
    crpci_wake_kick((const crpci_wake *)arg);
    return NULL;
}

static void another_thread_ends_a_wait(void **state)
{
    int kind;
    (void)state;
    for (kind = 0; kind < 2; kind++) {
        crpci_wake w = open_kind(kind);
        struct pollfd p;
        pthread_t t;
        p.fd = w.read_fd;
        p.events = POLLIN;
        assert_int_equal(pthread_create(&t, NULL, kick_later, &w), 0);
        assert_int_equal(poll(&p, 1, 20000), 1);
        pthread_join(t, NULL);
        crpci_wake_close(&w);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_kick_is_readable_until_drained),
        CT_TEST(a_full_descriptor_still_wakes),
        CT_TEST(descriptors_are_private_and_do_not_block),
        CT_TEST(no_descriptors_left),
        CT_TEST(kicks_from_a_signal_handler),
        CT_TEST(another_thread_ends_a_wait),
    };
    return CT_RUN(tests);
}
