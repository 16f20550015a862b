/* What cmocka lacks for testing crpc: leak and descriptor accounting, failing allocators, guard
 * pages, time limits, seeds. Uses only crpc's public interface, so programs outside the
 * implementation can include it too. A unit test looks like this:
 *
 *     #define CRPC_IMPLEMENTATION
 *     #include "../crpc.h"
 *     #include "crpc_test.h"
 *
 *     static void it_adds(void **state) { ... assert_int_equal(...); }
 *
 *     int main(void)
 *     {
 *         static const struct CMUnitTest tests[] = {CT_TEST(it_adds)};
 *         return CT_RUN(tests);
 *     }
 *
 * CT_TEST gives each test a time limit, an allocator (ct_hooks) and a check that it left no block
 * and no file descriptor behind; cmocka_unit_test works too, without those. CT_RUN shuffles the
 * tests by CRPC_TEST_SEED and runs only those that match CRPC_TEST_FILTER (a pattern with * and ?).
 * With CRPC_TEST_AFTER=NAME it begins behind the test NAME: when a test hangs or crashes, the whole
 * program ends, and run_tests.py starts it again for the tests that are left.
 */
#ifndef CRPC_TEST_H_INCLUDED
#define CRPC_TEST_H_INCLUDED

#ifndef _GNU_SOURCE
#error "compile tests with -D_GNU_SOURCE"
#endif

#include "../crpc.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>

#include <cmocka.h> /* needs the four above */

#include <arpa/inet.h>
#include <dirent.h>
#include <ftw.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CT_UNUSED __attribute__((unused))
#define CT_FN static CT_UNUSED

#ifndef CT_TEST_SECONDS
#define CT_TEST_SECONDS 60 /* time limit of one test; define it before the include to change it */
#endif

/* Times CRPC_TEST_SLOWER, for an emulator or a machine that is slower by that factor. */
CT_FN unsigned ct_test_seconds(void)
{
    const char *slower = getenv("CRPC_TEST_SLOWER");
    unsigned factor = slower ? (unsigned)strtoul(slower, NULL, 10) : 1;
    return CT_TEST_SECONDS * (factor ? factor : 1);
}

/* --- time -------------------------------------------------------------------------------- */

CT_FN int64_t ct_now_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

CT_FN int64_t ct_now_ms(void)
{
    return ct_now_us() / 1000;
}

CT_FN void ct_sleep_ms(int ms)
{
    struct timespec ts;
    ts.tv_sec = ms / 1000;
    ts.tv_nsec = (long)(ms % 1000) * 1000000;
    while (nanosleep(&ts, &ts) != 0) {
    }
}

/* Waits until `condition` holds, at most `ms` milliseconds. Its value: whether it did, which is not
 * asked again: what held for a moment has held. */
#define CT_WAIT(condition, ms)                                                                     \
    __extension__({                                                                                \
        int64_t ct_until_ = ct_now_ms() + (ms);                                                    \
        bool ct_late_, ct_met_;                                                                    \
        while (ct_late_ = ct_now_ms() >= ct_until_, !(ct_met_ = (condition)) && !ct_late_)         \
            ct_sleep_ms(1);                                                                        \
        ct_met_;                                                                                   \
    })

/* --- aborting --------------------------------------------------------------------------- */

/* Runs fn in a child process, which must abort; keeps what it has printed. For checks of CRPC_DEBUG. */
CT_FN void ct_expect_abort(void (*fn)(void), char *text, size_t size)
{
    int fds[2], status;
    size_t n = 0;
    ssize_t got;
    pid_t child;
    assert_int_equal(pipe(fds), 0);
    child = fork();
    assert_true(child >= 0);
    if (!child) {
        dup2(fds[1], 2);
        signal(SIGABRT, SIG_DFL);
        fn();
        _exit(0);
    }
    close(fds[1]);
    while ((got = read(fds[0], text + n, size - 1 - n)) > 0)
        n += (size_t)got;
    text[n] = '\0';
    close(fds[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

/* --- random numbers, repeatable with CRPC_TEST_SEED -------------------------------------- */

/* The seed of this run: CRPC_TEST_SEED, else one from the clock. Printed when it is first asked. */
CT_FN uint64_t ct_seed(void)
{
    static uint64_t seed;
    if (!seed) {
        const char *text = getenv("CRPC_TEST_SEED");
        seed = text && *text ? strtoull(text, NULL, 0) : (uint64_t)ct_now_us();
        seed = seed ? seed : 1;
        printf("CRPC_TEST_SEED=%llu\n", (unsigned long long)seed);
        fflush(stdout);
    }
    return seed;
}

/* xorshift64*: *state starts as any number but 0. For threads that want a sequence of their own. */
CT_FN uint64_t ct_random_from(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * UINT64_C(2685821657736338717);
}

/* The main thread's sequence. */
CT_FN uint64_t ct_random(void)
{
    static uint64_t state;
    if (!state)
        state = ct_seed();
    return ct_random_from(&state);
}

/* --- descriptors, ports, directories ----------------------------------------------------- */

/* How many file descriptors this process has open. */
CT_FN int ct_open_fds(void)
{
    int count = 0;
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;
    if (!dir)
        return -1;
    while ((entry = readdir(dir)) != NULL)
        count += entry->d_name[0] != '.';
    closedir(dir);
    return count - 1; /* less the one that counted */
}

/* A TCP port of 127.0.0.1 that was free a moment ago. Prefer port 0 where the tested thing takes
 * it. */
CT_FN int ct_free_port(void)
{
    struct sockaddr_in address;
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&address, 0, sizeof address);
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &size) != 0)
        fail_msg("no free port");
    close(fd);
    return ntohs(address.sin_port);
}

typedef struct ct_dir {
    char path[64];
} ct_dir;

/* A new, empty directory. */
CT_FN ct_dir ct_dir_make(void)
{
    ct_dir dir;
    strcpy(dir.path, "/tmp/crpc-test-XXXXXX");
    if (!mkdtemp(dir.path))
        fail_msg("mkdtemp failed");
    return dir;
}

CT_FN int ct_dir_remove_one_(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st, (void)type, (void)ftw;
    return remove(path);
}

/* Removes it with all that is in it. */
CT_FN void ct_dir_remove(ct_dir dir)
{
    nftw(dir.path, ct_dir_remove_one_, 8, FTW_DEPTH | FTW_PHYS);
}

/* --- an allocator that counts and fails -------------------------------------------------- */

/* Zero-initialised, it counts and never fails. Any thread may use it; set fail_at before. */
typedef struct ct_alloc {
    long calls;       /* allocations and growths so far */
    long fail_at;     /* the call with this number fails. 0: none does */
    int fail_forever; /* 1: and so does every later one */
    long failed;      /* calls that were made to fail */
    long live_blocks; /* not freed yet */
    long live_bytes;
    long wrong_sizes; /* times old_size was not the block's size: a fault of the caller */
} ct_alloc;

/* In front of every block, as wide as the strictest alignment. */
typedef union ct_alloc_head_ {
    struct {
        size_t size;
        size_t check;
    } of;
    long double align[2];
} ct_alloc_head_;

#define CT_ALLOC_CHECK_ ((size_t)0x637270635f6f6bu) /* xor-ed with the size: is it our block? */

/* crpc_hooks.resize over a ct_alloc. */
CT_FN void *ct_resize(void *user, void *ptr, size_t old_size, size_t new_size)
{
    ct_alloc *a = (ct_alloc *)user;
    ct_alloc_head_ *head = ptr ? (ct_alloc_head_ *)ptr - 1 : NULL;
    size_t had = 0;
    if (head) {
        had = head->of.size;
        if (head->of.check != (had ^ CT_ALLOC_CHECK_)) {
            fprintf(stderr, "ct_resize: %p is not a live block\n", ptr);
            abort();
        }
    }
    if (had != old_size)
        __atomic_add_fetch(&a->wrong_sizes, 1, __ATOMIC_RELAXED);
    if (new_size > had) { /* shrinking and freeing never fail: crpc may rely on it */
        long number = __atomic_add_fetch(&a->calls, 1, __ATOMIC_RELAXED);
        if (a->fail_at && (number == a->fail_at || (a->fail_forever && number > a->fail_at))) {
            __atomic_add_fetch(&a->failed, 1, __ATOMIC_RELAXED);
            return NULL;
        }
    }
    if (new_size == 0) {
        if (head) {
            head->of.check = 0;
            free(head);
            __atomic_add_fetch(&a->live_blocks, -1, __ATOMIC_RELAXED);
            __atomic_add_fetch(&a->live_bytes, -(long)had, __ATOMIC_RELAXED);
        }
        return NULL;
    }
    /* Always moves the block, so that a pointer kept across a resize is caught by ASan. */
    {
        ct_alloc_head_ *moved = (ct_alloc_head_ *)malloc(sizeof *moved + new_size);
        if (!moved)
            return NULL;
        moved->of.size = new_size;
        moved->of.check = new_size ^ CT_ALLOC_CHECK_;
        memset(moved + 1, 0xa5, new_size); /* so is a read of what was never written */
        if (head) {
            memcpy(moved + 1, head + 1, had < new_size ? had : new_size);
            head->of.check = 0;
            free(head);
        } else {
            __atomic_add_fetch(&a->live_blocks, 1, __ATOMIC_RELAXED);
        }
        __atomic_add_fetch(&a->live_bytes, (long)new_size - (long)had, __ATOMIC_RELAXED);
        return moved + 1;
    }
}

CT_FN crpc_hooks ct_hooks_of(ct_alloc *a)
{
    crpc_hooks hooks;
    memset(&hooks, 0, sizeof hooks);
    hooks.user = a;
    hooks.resize = ct_resize;
    return hooks;
}

/* The allocator that CT_TEST resets before and checks after each test. */
CT_FN ct_alloc *ct_alloc_of_test(void)
{
    static ct_alloc a;
    return &a;
}

/* Hooks over it, for crpc_loop_options.hooks. */
CT_FN crpc_hooks ct_hooks(void)
{
    return ct_hooks_of(ct_alloc_of_test());
}

/* Fault sweep: runs scenario(hooks, user) with the first allocation failing, then the second, and
 * so on until one run meets no failure; first each fails alone, then with all that follow. The
 * scenario returns CRPC_OK or CRPC_ENOMEM and leaves nothing behind; a run that met a failure may
 * end well all the same (it did without). Returns how many allocations the scenario makes. */
CT_FN long ct_sweep(int (*scenario)(const crpc_hooks *hooks, void *user), void *user)
{
    int forever;
    long n = 0;
    for (forever = 0; forever < 2; forever++) {
        for (n = 1;; n++) {
            ct_alloc a;
            crpc_hooks hooks = ct_hooks_of(&a);
            int fds = ct_open_fds();
            int status;
            memset(&a, 0, sizeof a);
            a.fail_at = n;
            a.fail_forever = forever;
            status = scenario(&hooks, user);
            if (a.live_blocks || a.wrong_sizes || ct_open_fds() != fds ||
                (status != CRPC_OK && (status != CRPC_ENOMEM || !a.failed)))
                fail_msg("allocation %ld failing%s: status %d, %ld blocks left, %ld wrong sizes, "
                         "%d descriptors left",
                         n, forever ? " for good" : "", status, a.live_blocks, a.wrong_sizes,
                         ct_open_fds() - fds);
            if (!a.failed)
                break;
        }
    }
    return n - 1;
}

/* --- bytes flush against a page that cannot be touched ------------------------------------ */

typedef struct ct_guard {
    unsigned char *data; /* `size` bytes; data[size] faults */
    size_t size;
    void *map;
    size_t map_size;
} ct_guard;

/* Copies `size` bytes (or zeroes them, with NULL) so that reading one too many is a crash. */
CT_FN ct_guard ct_guard_make(const void *bytes, size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t pages = (size + page - 1) / page * page;
    ct_guard g;
    g.size = size;
    g.map_size = pages + page;
    g.map = mmap(NULL, g.map_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect((char *)g.map + pages, page, PROT_NONE) != 0)
        fail_msg("mmap failed");
    g.data = (unsigned char *)g.map + pages - size;
    if (bytes && size)
        memcpy(g.data, bytes, size);
    return g;
}

CT_FN void ct_guard_free(ct_guard g)
{
    munmap(g.map, g.map_size);
}

/* --- the surroundings of a test ----------------------------------------------------------- */

static int ct_fds_before_;

CT_FN int ct_setup(void **state)
{
    (void)state;
    memset(ct_alloc_of_test(), 0, sizeof(ct_alloc));
    ct_fds_before_ = ct_open_fds();
    alarm(ct_test_seconds()); /* SIGALRM ends the program: its last RUN line names the test */
    return 0;
}

CT_FN int ct_teardown(void **state)
{
    ct_alloc *a = ct_alloc_of_test();
    int fds = ct_open_fds() - ct_fds_before_;
    (void)state;
    alarm(0);
    if (a->live_blocks || a->wrong_sizes || fds) {
        print_error("left behind: %ld blocks (%ld bytes), %d descriptors; %ld wrong sizes\n",
                    a->live_blocks, a->live_bytes, fds, a->wrong_sizes);
        return -1;
    }
    return 0;
}

#define CT_TEST(fn) cmocka_unit_test_setup_teardown(fn, ct_setup, ct_teardown)

CT_FN int ct_run_(const char *name, const struct CMUnitTest *tests, size_t count)
{
    struct CMUnitTest *shuffled = (struct CMUnitTest *)malloc(count * sizeof *tests);
    const char *filter = getenv("CRPC_TEST_FILTER"), *after = getenv("CRPC_TEST_AFTER");
    int failed;
    size_t i, first = 0;
    assert_non_null(shuffled);
    memcpy(shuffled, tests, count * sizeof *tests);
    for (i = count; i > 1; i--) {
        size_t j = (size_t)(ct_random() % i);
        struct CMUnitTest swap = shuffled[i - 1];
        shuffled[i - 1] = shuffled[j];
        shuffled[j] = swap;
    }
    for (i = 0; i < count && after && !first; i++)
        first = strcmp(shuffled[i].name, after) == 0 ? i + 1 : 0;
    if (filter && *filter)
        cmocka_set_test_filter(filter);
    failed = _cmocka_run_group_tests(name, shuffled + first, count - first, NULL, NULL);
    free(shuffled);
    return failed ? 1 : 0;
}

/* Runs an array of tests in an order drawn from the seed; the value for main to return. */
#define CT_RUN(tests) ct_run_(#tests, tests, sizeof(tests) / sizeof((tests)[0]))

/* --- system tests: which poller, which driver --------------------------------------------- */

/* The poller this run is for: CRPC_TEST_POLLER=epoll or poll. Give it to every loop. */
CT_FN crpc_poller ct_poller(void)
{
    const char *name = getenv("CRPC_TEST_POLLER");
    if (!name || !*name)
        return CRPC_POLLER_DEFAULT;
    if (strcmp(name, "epoll") != 0 && strcmp(name, "poll") != 0)
        fail_msg("CRPC_TEST_POLLER=%s is neither epoll nor poll", name);
    return strcmp(name, "poll") == 0 ? CRPC_POLLER_POLL : CRPC_POLLER_EPOLL;
}

/* Reports that a scenario has passed on what the loop and the library say they are. The runner
 * wants every scenario from all four combinations. */
CT_FN void ct_matrix(crpc_loop *loop, const char *scenario)
{
    crpc_loop_stats stats;
    memset(&stats, 0, sizeof stats);
    crpc_loop_stats_get(loop, &stats);
    printf("MATRIX poller=%s driver=%s scenario=%s\n", stats.poller, crpc_zookeeper_driver(),
           scenario);
    fflush(stdout);
}

#endif /* CRPC_TEST_H_INCLUDED */
