/* impl-poller: every test runs with epoll and with poll. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static const crpc_poller kinds[] = {CRPC_POLLER_EPOLL, CRPC_POLLER_POLL};
static crpci_heap *heap;
static crpci_poller poller;
static crpci_poller_event events[CRPCI_POLLER_BATCH];

/* Copies what a wait finds to `events`. */
static int wait_for_events(int64_t us)
{
    int n = crpci_poller_wait(&poller, us), i;
    for (i = 0; i < n; i++)
        events[i] = crpci_poller_found(&poller, i);
    return n;
}

static void begin(crpc_poller kind)
{
    crpc_hooks hooks = ct_hooks();
    assert_int_equal(crpci_heap_open(&heap, &hooks, 0), CRPC_OK);
    assert_int_equal(crpci_poller_open(&poller, heap, kind), CRPC_OK);
}

static void end(void)
{
    crpci_poller_close(&poller, heap);
    assert_int_equal(heap->bytes, sizeof *heap);
    crpci_heap_unref(heap);
}

static int wait_us(int64_t us)
{
    assert_int_equal(crpci_poller_prepare(&poller, heap), CRPC_OK);
    return wait_for_events(us);
}

static void set(crpci_poller_item *item, unsigned what)
{
    assert_int_equal(crpci_poller_set(&poller, heap, item, what), CRPC_OK);
    assert_int_equal(item->events, what);
}

static crpci_poller_item item_of(int fd, uint64_t id)
{
    crpci_poller_item item;
    memset(&item, 0, sizeof item);
    item.fd = fd;
    item.id = id;
    return item;
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

static void names_and_kinds(void **state)
{
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        begin(kinds[k]);
        assert_string_equal(crpci_poller_name(&poller), k ? "poll" : "epoll");
        if (poller.epoll_fd >= 0)
            assert_true(fcntl(poller.epoll_fd, F_GETFD) & FD_CLOEXEC);
        assert_int_equal(poller.epoll_fd >= 0, k == 0);
        end();
    }
    begin(CRPC_POLLER_DEFAULT);
    assert_string_equal(crpci_poller_name(&poller), CRPC_ENABLE_EPOLL ? "epoll" : "poll");
    end();
}

static void reports_registered_events_that_are_ready(void **state)
{
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        crpci_poller_item item;
        char c;
        int fds[2];
        begin(kinds[k]);
        pair(fds);
        item = item_of(fds[0], UINT64_C(0xfedcba9876543210));
        set(&item, CRPC_READABLE);
        assert_int_equal(wait_us(0), 0);
        assert_int_equal(write(fds[1], "x", 1), 1);
        assert_int_equal(wait_us(-1), 1);
        assert_true(events[0].id == UINT64_C(0xfedcba9876543210));
        assert_int_equal(events[0].events, CRPC_READABLE);
        assert_int_equal(wait_us(0), 1); /* level-triggered: reported again */
        set(&item, CRPC_READABLE | CRPC_WRITABLE);
        assert_int_equal(wait_us(0), 1);
        assert_int_equal(events[0].events, CRPC_READABLE | CRPC_WRITABLE);
        set(&item, CRPC_WRITABLE);
        assert_int_equal(wait_us(0), 1);
        assert_int_equal(events[0].events, CRPC_WRITABLE);
        set(&item, 0);
        assert_int_equal(wait_us(0), 0);
        set(&item, 0);
        set(&item, CRPC_READABLE);
        assert_int_equal(wait_us(0), 1);
        assert_int_equal(read(fds[0], &c, 1), 1);
        assert_int_equal(wait_us(0), 0);
        set(&item, 0);
        close_pair(fds);
        end();
    }
}

/* An end of file or an error is reported whatever the item waits for. */
static void a_hangup_is_readable_and_writable(void **state)
{
    size_t k;
    unsigned want;
    (void)state;
    for (k = 0; k < 2; k++) {
        for (want = 1; want <= 3; want++) {
            crpci_poller_item item;
            int fds[2];
            begin(kinds[k]);
            pair(fds);
            item = item_of(fds[0], 5);
            set(&item, want);
            close(fds[1]);
            assert_int_equal(wait_us(-1), 1);
            assert_int_equal(events[0].events, CRPC_READABLE | CRPC_WRITABLE);
            set(&item, 0);
            close(fds[0]);
            end();
        }
    }
}

static void waits_are_never_early(void **state)
{
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        int64_t us[] = {1, 999, 1001, 5000, 20001};
        size_t i;
        begin(kinds[k]);
        for (i = 0; i < sizeof us / sizeof us[0]; i++) {
            int64_t start = ct_now_us();
            assert_int_equal(wait_us(us[i]), 0);
            assert_true(ct_now_us() - start >= us[i]);
        }
        end();
    }
    assert_int_equal(crpci_poller_ms(-1), -1);
    assert_int_equal(crpci_poller_ms(INT64_MIN), -1);
    assert_int_equal(crpci_poller_ms(0), 0);
    assert_int_equal(crpci_poller_ms(1), 1);
    assert_int_equal(crpci_poller_ms(1000), 1);
    assert_int_equal(crpci_poller_ms(1001), 2);
    assert_int_equal(crpci_poller_ms(INT64_C(86400000000)), 86400000);
    assert_int_equal(crpci_poller_ms(INT64_MAX), 86400000);
    assert_int_equal(crpci_poller_ms(INT64_MAX - 500), 86400000);
}

/* More descriptors are ready than one wait reports: each is reported within a few waits. */
static void events_beyond_the_batch(void **state)
{
    enum { MANY = 3 * CRPCI_POLLER_BATCH + 7 };
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        static crpci_poller_item items[MANY];
        static int fds[MANY], seen[MANY];
        int i, n, round;
        begin(kinds[k]);
        memset(seen, 0, sizeof seen);
        for (i = 0; i < MANY; i++) {
            fds[i] = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
            assert_true(fds[i] >= 0);
            items[i] = item_of(fds[i], (uint64_t)i);
            set(&items[i], CRPC_READABLE);
        }
        for (round = 0; round < 8; round++) {
            n = wait_us(0);
            assert_int_equal(n, CRPCI_POLLER_BATCH);
            for (i = 0; i < n; i++)
                seen[events[i].id]++;
        }
        for (i = 0; i < MANY; i++)
            assert_in_range(seen[i], 1, 4); /* 8 batches for 3.1 of them: nobody starves */
        /* from both ends in turn: gaps are filled with the last entry */
        for (i = 0; i < MANY; i++) {
            int j = i % 2 ? i / 2 : MANY - 1 - i / 2;
            set(&items[j], 0);
            close(fds[j]);
        }
        assert_int_equal(wait_us(0), 0);
        end();
    }
}

static void the_right_one_is_removed(void **state)
{
    enum { SOME = 40 };
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        static crpci_poller_item items[SOME];
        static bool there[SOME];
        int fds[SOME], i, step;
        begin(kinds[k]);
        memset(there, 0, sizeof there);
        for (i = 0; i < SOME; i++) {
            fds[i] = eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
            assert_true(fds[i] >= 0);
            items[i] = item_of(fds[i], 1000 + (uint64_t)i);
        }
        for (step = 0; step < 400; step++) {
            int n, count = 0;
            i = (int)(ct_random() % SOME);
            there[i] = ct_random() % 5 < 3;
            set(&items[i], there[i] ? CRPC_READABLE : 0);
            for (i = 0; i < SOME; i++)
                count += there[i];
            n = wait_us(0);
            assert_int_equal(n, count);
            while (n--) {
                assert_in_range(events[n].id, 1000, 1000 + SOME - 1);
                assert_true(there[events[n].id - 1000]);
                there[events[n].id - 1000] = false; /* once each */
            }
            for (i = 0; i < SOME; i++)
                there[i] = items[i].events != 0;
        }
        for (i = 0; i < SOME; i++) {
            set(&items[i], 0);
            close(fds[i]);
        }
        end();
    }
}

/* A library that owns a watched descriptor closes it, and the next one opened has its number. */
static void a_number_that_is_used_again(void **state)
{
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        crpci_poller_item old, item;
        int fds[2], other[2];
        begin(kinds[k]);
        pair(fds);
        old = item_of(fds[0], 1);
        set(&old, CRPC_READABLE);
        close(fds[0]); /* without removing it from the poller */
        pair(other);
        assert_true(other[0] == fds[0] || other[1] == fds[0]);
        if (other[1] == fds[0]) {
            int swap = other[1];
            other[1] = other[0];
            other[0] = swap;
        }
        /* epoll_ctl says ENOENT: the item is added again */
        set(&old, CRPC_READABLE | CRPC_WRITABLE);
        assert_int_equal(wait_us(0), 1);
        assert_int_equal(events[0].id, 1);
        assert_int_equal(events[0].events, CRPC_WRITABLE);
        set(&old, 0);

        item = item_of(other[0], 2);
        set(&item, CRPC_READABLE);
        item.events = 0; /* as if it were not registered: epoll_ctl says EEXIST */
        if (kinds[k] == CRPC_POLLER_POLL)
            item.events = CRPC_READABLE;
        set(&item, CRPC_WRITABLE);
        assert_int_equal(wait_us(0), 1);
        assert_int_equal(events[0].id, 2);
        assert_int_equal(events[0].events, CRPC_WRITABLE);
        set(&item, 0);
        close(fds[1]);
        close_pair(other);
        end();
    }
}

static void closed_descriptors(void **state)
{
    size_t k;
    (void)state;
    for (k = 0; k < 2; k++) {
        crpci_poller_item item;
        int fds[2];
        begin(kinds[k]);
        pair(fds);
        item = item_of(fds[0], 1);
        set(&item, CRPC_READABLE);
        close_pair(fds);
        if (kinds[k] == CRPC_POLLER_EPOLL) { /* the kernel has removed it from the set */
            assert_int_equal(wait_us(0), 0);
            assert_int_equal(crpci_poller_set(&poller, heap, &item, CRPC_WRITABLE), CRPC_ESYSTEM);
            assert_int_equal(item.events, CRPC_READABLE);
        } else { /* reported, so that the owner finds out */
            assert_int_equal(wait_us(0), 1);
            assert_int_equal(events[0].events, CRPC_READABLE | CRPC_WRITABLE);
        }
        set(&item, 0);
        assert_int_equal(wait_us(0), 0);
        end();
    }
}

static void a_file_that_epoll_cannot_watch_is_an_error(void **state)
{
    crpci_poller_item item;
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    (void)state;
    begin(CRPC_POLLER_EPOLL);
    assert_true(fd >= 0);
    item = item_of(fd, 1);
    assert_int_equal(crpci_poller_set(&poller, heap, &item, CRPC_READABLE), CRPC_ESYSTEM);
    assert_int_equal(item.events, 0);
    close(fd);
    end();
}

/* poll works on a copy: changes after prepare take effect with the next prepare, an item that was
 * removed is still reported by its id, and the arrays may be reallocated meanwhile. */
static void poll_works_on_a_copy(void **state)
{
    crpci_poller_item items[40];
    int fds[2], i;
    (void)state;
    begin(CRPC_POLLER_POLL);
    pair(fds);
    for (i = 0; i < 40; i++)
        items[i] = item_of(fds[0], (uint64_t)i);
    assert_int_equal(write(fds[1], "x", 1), 1);
    set(&items[0], CRPC_READABLE);
    assert_int_equal(crpci_poller_prepare(&poller, heap), CRPC_OK);
    for (i = 1; i < 40; i++)
        set(&items[i], CRPC_READABLE);
    set(&items[0], 0);
    assert_int_equal(wait_for_events(0), 1);
    assert_int_equal(events[0].id, 0);
    assert_int_equal(wait_us(0), 39);
    for (i = 1; i < 40; i++)
        set(&items[i], 0);
    close_pair(fds);
    end();
}

static int poll_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_poller_item items[40];
    int fds[2], i, err = crpci_heap_open(&heap, hooks, 0);
    (void)user;
    if (err)
        return err;
    pair(fds);
    assert_int_equal(crpci_poller_open(&poller, heap, CRPC_POLLER_POLL), CRPC_OK);
    for (i = 0; i < 40; i++)
        items[i] = item_of(fds[0], (uint64_t)i);
    for (i = 0; !err && i < 40; i++) {
        err = crpci_poller_set(&poller, heap, &items[i], CRPC_WRITABLE);
        if (err)
            assert_int_equal(items[i].events, 0);
        if (!err && i % 10 == 0)
            err = crpci_poller_prepare(&poller, heap);
    }
    if (err) { /* with memory again the poller works */
        for (i = 0; i < 40; i++)
            (void)!crpci_poller_set(&poller, heap, &items[i], CRPC_WRITABLE);
    }
    if (crpci_poller_prepare(&poller, heap) == CRPC_OK) {
        uint32_t count = poller.count;
        assert_int_equal(wait_for_events(0), count);
    }
    crpci_poller_close(&poller, heap);
    assert_int_equal(heap->bytes, sizeof *heap);
    crpci_heap_unref(heap);
    close_pair(fds);
    return err;
}

static void out_of_memory(void **state)
{
    (void)state;
    assert_true(ct_sweep(poll_scenario, NULL) > 6); /* the list and its copy, three times each */
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(names_and_kinds),
        CT_TEST(reports_registered_events_that_are_ready),
        CT_TEST(a_hangup_is_readable_and_writable),
        CT_TEST(waits_are_never_early),
        CT_TEST(events_beyond_the_batch),
        CT_TEST(the_right_one_is_removed),
        CT_TEST(a_number_that_is_used_again),
        CT_TEST(closed_descriptors),
        CT_TEST(a_file_that_epoll_cannot_watch_is_an_error),
        CT_TEST(poll_works_on_a_copy),
        CT_TEST(out_of_memory),
    };
    return CT_RUN(tests);
}
