/* impl-watch: descriptors in the loop's poller, and what happens to events of a watch that is
 * gone. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"
#include "crpc_loop.h"

typedef struct seen {
    crpci_watch watch;
    struct seen *other; /* is stopped by the event */
    int count;
    unsigned events;
} seen;

static void on_seen(crpc_loop *l, crpci_watch *w, unsigned events)
{
    seen *s = CRPCI_CONTAINER(w, seen, watch);
    s->count++;
    s->events = events;
    if (s->other)
        assert_int_equal(crpci_watch_set(l, &s->other->watch, s->other->watch.item.fd, 0), CRPC_OK);
}

static void seen_init(seen *s)
{
    memset(s, 0, sizeof *s);
    crpci_watch_init(&s->watch, on_seen);
}

static int set(crpc_loop *l, seen *s, int fd, unsigned events)
{
    int err;
    crpci_loop_lock(l);
    err = crpci_watch_set(l, &s->watch, fd, events);
    crpci_loop_unlock(l);
    return err;
}

static void pair(int fds[2])
{
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), 0);
}

static void close_pair(int fds[2])
{
    close(fds[0]);
    close(fds[1]);
}

static void one_watch_counts_once_whatever_it_waits_for(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        seen s;
        int fds[2];
        pair(fds);
        seen_init(&s);
        assert_int_equal(set(l, &s, fds[0], 0), CRPC_OK); /* nothing to stop */
        assert_int_equal(stats_of(l).watches, 1);         /* the loop's wake descriptor */
        assert_int_equal(set(l, &s, fds[0], CRPC_READABLE), CRPC_OK);
        assert_int_equal(set(l, &s, fds[0], CRPC_READABLE), CRPC_OK);
        assert_int_equal(set(l, &s, fds[0], CRPC_READABLE | CRPC_WRITABLE), CRPC_OK);
        assert_int_equal(stats_of(l).watches, 2);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(s.count, 1);
        assert_int_equal(s.events, CRPC_WRITABLE);
        assert_int_equal(set(l, &s, fds[0], 0), CRPC_OK);
        assert_int_equal(stats_of(l).watches, 1);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(s.count, 1);
        crpc_loop_close(l);
        close_pair(fds);
    }
}

static void another_descriptor_takes_the_place_of_the_first(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        seen s;
        int old[2], fds[2];
        pair(old);
        pair(fds);
        seen_init(&s);
        assert_int_equal(set(l, &s, old[0], CRPC_READABLE), CRPC_OK);
        assert_int_equal(set(l, &s, fds[0], CRPC_READABLE), CRPC_OK);
        assert_int_equal(stats_of(l).watches, 2);
        assert_int_equal(write(old[1], "x", 1), 1);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(s.count, 0);
        assert_int_equal(write(fds[1], "x", 1), 1);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(s.count, 1);
        assert_int_equal(set(l, &s, fds[0], 0), CRPC_OK);
        crpc_loop_close(l);
        close_pair(old);
        close_pair(fds);
    }
}

/* Both are ready in one wait; whichever event comes first stops the other watch, whose event then
 * finds nothing. */
static void an_event_of_a_stopped_watch_is_dropped(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        seen a, b;
        int fds[2];
        pair(fds);
        seen_init(&a);
        seen_init(&b);
        a.other = &b;
        b.other = &a;
        assert_int_equal(set(l, &a, fds[0], CRPC_WRITABLE), CRPC_OK);
        assert_int_equal(set(l, &b, fds[1], CRPC_WRITABLE), CRPC_OK);
        assert_int_equal(crpc_loop_step(l, 1000), CRPC_OK);
        assert_int_equal(a.count + b.count, 1);
        assert_int_equal(set(l, &a, fds[0], 0), CRPC_OK);
        assert_int_equal(set(l, &b, fds[1], 0), CRPC_OK);
        assert_int_equal(stats_of(l).watches, 1);
        crpc_loop_close(l);
        close_pair(fds);
    }
}

/* /proc/self/exe cannot be watched by epoll. */
static void a_refused_descriptor_leaves_no_watch(void **state)
{
    crpc_loop *l = net_loop(CRPC_POLLER_EPOLL);
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    seen s;
    (void)state;
    assert_true(fd >= 0);
    seen_init(&s);
    assert_int_equal(set(l, &s, fd, CRPC_READABLE), CRPC_ESYSTEM);
    assert_int_equal(s.watch.item.events, 0);
    assert_int_equal(stats_of(l).watches, 1);
    assert_int_equal(l->watches.used, 1);
    crpc_loop_close(l);
    close(fd);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(one_watch_counts_once_whatever_it_waits_for),
        CT_TEST(another_descriptor_takes_the_place_of_the_first),
        CT_TEST(an_event_of_a_stopped_watch_is_dropped),
        CT_TEST(a_refused_descriptor_leaves_no_watch),
    };
    return CT_RUN(tests);
}
