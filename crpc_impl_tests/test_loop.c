/* impl-loop: clock, random numbers, hooks, memory, and what a system lacks. The loop's other parts
 * have tests of their own: test_watch, test_user, test_drive. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 120
#include "crpc_test.h"
#include "crpc_net.h"
#include "crpc_loop.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static void it_says_what_runs(void **state)
{
    crpc_loop *l;
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    (void)state;
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    assert_string_equal(stats_of(l).poller, "epoll");
    assert_true(crpc_loop_fd(l) >= 0);
    crpc_loop_close(l);
    l = net_loop(CRPC_POLLER_POLL);
    assert_string_equal(stats_of(l).poller, "poll");
    assert_int_equal(crpc_loop_fd(l), -1);
    assert_int_equal(stats_of(l).watches, 1);
    assert_int_equal(stats_of(l).connections, 0);
    assert_true(stats_of(l).memory > 0);
    crpc_loop_close(l);
    assert_int_equal(crpc_loop_open(&l, NULL), CRPC_OK);
    crpc_loop_close(l);
    crpc_loop_close(NULL);
}

/* --- a clock of one's own --------------------------------------------------------------------- */

static int64_t fake_now; /* of loops that only this thread steps */

static int64_t fake_clock(void *user)
{
    (void)user;
    return fake_now;
}

static void step_fake(crpc_loop *l, int64_t us)
{
    fake_now = us;
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
}

/* Every delay fires at its millisecond and none before; also where a 32-bit count of milliseconds
 * would wrap. */
static void timers_follow_the_given_clock(void **state)
{
    static const int64_t starts[] = {0, 123, INT64_C(2147483000) * 1000 + 999,
                                     INT64_C(4294967000) * 1000 + 1, INT64_C(281474976000000)};
    static const int64_t delays[] = {0,
                                     1,
                                     63,
                                     64,
                                     65,
                                     4095,
                                     4096,
                                     5000,
                                     9999,
                                     262143,
                                     262144,
                                     1000000,
                                     16777216,
                                     86400000,
                                     INT64_C(1073741823),
                                     INT64_C(1073741825),
                                     INT64_C(40000000000)};
    crpc_poller p;
    size_t i, k;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < sizeof starts / sizeof *starts; i++)
    {
        crpc_loop_options o = net_loop_options(p);
        crpc_loop *l;
        int counts[sizeof delays / sizeof *delays];
        crpc_id ids[sizeof delays / sizeof *delays], cancelled;
        int never = 0;
        o.hooks.clock_us = fake_clock;
        fake_now = starts[i];
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        assert_int_equal(crpc_loop_now_us(l), starts[i]);
        memset(counts, 0, sizeof counts);
        for (k = 0; k < sizeof delays / sizeof *delays; k++) {
            assert_int_equal(crpc_timer_start(l, delays[k], 0, tick, &counts[k], &ids[k]), CRPC_OK);
            assert_int_equal(crpc_timer_start(l, delays[k], 0, tick, &never, &cancelled), CRPC_OK);
            crpc_timer_stop(l, cancelled);
        }
        for (k = 0; k < sizeof delays / sizeof *delays; k++) {
            int64_t due = starts[i] + delays[k] * 1000;
            if (delays[k]) {
                step_fake(l, due - 1);
                assert_int_equal(counts[k], 0);
                /* the program may not sleep past it */
                assert_in_range(crpc_loop_timeout(l), 0, 1);
            }
            step_fake(l, (due + 999) / 1000 * 1000);
            assert_int_equal(counts[k], 1);
        }
        assert_int_equal(never, 0);
        crpc_loop_close(l);
    }
}

/* What the wall clock says is nobody's business: a run under a clock that jumps changes nothing,
 * because nothing but the given one, or CLOCK_MONOTONIC, is ever asked. */
static void only_the_given_clock_counts(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_channel_options co;
    crpc_channel *ch;
    crpc_loop *l;
    peer silent;
    dyn_Num in = net_num(1);
    crpc_id id;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    o.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    o.forbid_threads = 1; /* this thread steps it */
    assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
    memset(&co, 0, sizeof co);
    co.loop = l;
    co.policy.timeout_ms = 3600000;
    assert_int_equal(crpc_channel_open(&ch, silent.url, &co, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
    for (i = 0; i < 10000 && peer_requests(&silent) == 0; i++)
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    step_fake(l, fake_now + INT64_C(3599000000));
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
    step_fake(l, fake_now + 999000);
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
    step_fake(l, fake_now + 2000);
    assert_int_equal(crpc_channel_poll(ch, id), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(ch, id), CRPC_OK);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&silent);
}

/* --- ids and random numbers ------------------------------------------------------------------- */

/* An id that the program took to the wrong loop names nothing there, although both loops have a
 * timer in their first slot. */
static void ids_of_another_loop_name_nothing(void **state)
{
    crpc_loop *a = net_loop(CRPC_POLLER_DEFAULT), *b = net_loop(CRPC_POLLER_DEFAULT);
    crpc_id id_a, id_b;
    (void)state;
    ticks = 0;
    assert_int_equal(crpc_timer_start(a, 0, 0, tick, &ticks, &id_a), CRPC_OK);
    assert_int_equal(crpc_timer_start(b, 0, 0, tick, &ticks, &id_b), CRPC_OK);
    assert_true(id_a.value != id_b.value);
    assert_true(a->calls.salt != b->calls.salt);
    crpc_timer_stop(a, id_b);
    crpc_timer_stop(b, id_a);
    while (ticks < 2) { /* neither timer was stopped */
        assert_int_equal(crpc_loop_step(a, 10), CRPC_OK);
        assert_int_equal(crpc_loop_step(b, 10), CRPC_OK);
    }
    crpc_loop_close(a);
    crpc_loop_close(b);
}

/* With the clock standing still, so that a seed made of the clock alone would be the same. */
static void loops_opened_at_one_moment_draw_different_numbers(void **state)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_loop *a, *b;
    (void)state;
    fake_now = 1000000;
    o.hooks.clock_us = fake_clock;
    assert_int_equal(crpc_loop_open(&a, &o), CRPC_OK);
    assert_int_equal(crpc_loop_open(&b, &o), CRPC_OK);
    assert_true(crpci_loop_random(a) != crpci_loop_random(b));
    crpc_loop_close(a);
    crpc_loop_close(b);
}

/* --- system calls that a sandbox refuses ------------------------------------------------------ */

/* From here on the system call `number` fails with `error` in this process. False: the kernel
 * takes no filter. */
static bool refuse(long number, int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program;
    code[1].k = (uint32_t)number;
    code[2].k = SECCOMP_RET_ERRNO | (uint32_t)error;
    program.len = sizeof code / sizeof *code;
    program.filter = code;
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

enum { WITHOUT_EPOLL, WITHOUT_EVENTFD, WITHOUT_ACCEPT4, WITHOUT_GETRANDOM, REFUSALS };
static const struct {
    const char *log; /* what crpc_loop_open says, after the errno; NULL: nothing */
    long number;
} refusals[REFUSALS] = {
    {"loop: epoll_create1: %s; poll is used instead", SYS_epoll_create1},
    {"loop: eventfd: %s; a pipe is used instead", SYS_eventfd2},
    {NULL, SYS_accept4},
    {NULL, SYS_getrandom},
};

typedef struct refusal_log {
    int lines;
    char line[200];
} refusal_log;

static void log_refusal(void *user, int level, const char *line)
{
    refusal_log *g = (refusal_log *)user;
    if (level == CRPC_LOG_INFO && strncmp(line, "loop: ", 6) == 0) {
        g->lines++;
        snprintf(g->line, sizeof g->line, "%s", line);
    }
}

static bool log_is_right(const refusal_log *g, int which, int error)
{
    char wanted[200] = "";
    if (refusals[which].log)
        snprintf(wanted, sizeof wanted, refusals[which].log, error == EPERM ? "EPERM" : "ENOSYS");
    return g->lines == (refusals[which].log != NULL) && strcmp(g->line, wanted) == 0;
}

/* A call through a server with a loop of its own: every one of the system calls is made. */
static bool a_call_gets_through(void)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    bool right;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    right = dyn_Echo_Add(n.channel, &in, &out, NULL) == CRPC_OK;
    net_close(&n);
    return right;
}

/* Whether a connection is accepted, with a descriptor that does not block and is closed on exec. */
static bool an_accepted_socket_is_right(void)
{
    struct pollfd p;
    crpci_addr a, from;
    int listener, client, fd;
    bool right;
    if (!crpci_sock_parse(&a, "127.0.0.1:0"))
        return false;
    listener = crpci_sock_listen(&a);
    crpci_sock_local(listener, &a);
    client = crpci_sock_open(&a);
    if (connect(client, &a.u.any, a.len) && errno != EINPROGRESS)
        return false;
    p.fd = listener;
    p.events = POLLIN;
    poll(&p, 1, NET_PATIENCE);
    fd = crpci_sock_accept(listener, &from);
    right = fd >= 0 && fcntl(fd, F_GETFL) & O_NONBLOCK && fcntl(fd, F_GETFD) & FD_CLOEXEC;
    right = right && crpci_sock_accept(listener, &from) == -1 &&
            (errno == EAGAIN || errno == EWOULDBLOCK);
    close(fd);
    close(client);
    close(listener);
    return right;
}

/* In a child process of its own. Returns its exit code: 0, or the number of the check that failed;
 * 77: this kernel takes no filter. */
static int run_refused(int which, int error)
{
    crpc_loop_options o = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_loop *a, *b;
    refusal_log g;
    memset(&g, 0, sizeof g);
    o.hooks.user = &g;
    o.hooks.resize = NULL;
    o.hooks.log = log_refusal;
    o.hooks.log_level = CRPC_LOG_INFO;
    if (!refuse(refusals[which].number, error))
        return 77;
    errno = 0;
    if (syscall(refusals[which].number, -1, 0, 0, 0) != -1 || errno != error)
        return 1; /* the filter itself */
    if (crpc_loop_open(&a, &o) || !log_is_right(&g, which, error) || crpc_loop_open(&b, &o))
        return 2;
    if ((a->poller.kind == CRPC_POLLER_POLL) != (which == WITHOUT_EPOLL))
        return 3;
    if ((a->wake.read_fd != a->wake.write_fd) != (which == WITHOUT_EVENTFD))
        return 4;
    if (a->random == b->random || a->users.salt == b->users.salt)
        return 5;
    crpc_loop_close(a);
    crpc_loop_close(b);
    o.poller = CRPC_POLLER_EPOLL; /* asked for by name, it is not replaced */
    if (crpc_loop_open(&a, &o) != (which == WITHOUT_EPOLL ? CRPC_ESYSTEM : CRPC_OK))
        return 6;
    crpc_loop_close(a);
    if (!an_accepted_socket_is_right())
        return 7;
    return a_call_gets_through() ? 0 : 8;
}

static void refused_system_calls_are_replaced(void **state)
{
    static const int errors[] = {ENOSYS, EPERM};
    int which;
    size_t e;
    (void)state;
    for (which = 0; which < REFUSALS; which++) {
        for (e = 0; e < 2; e++) {
            int status = 0;
            pid_t child;
            fflush(NULL);
            child = fork();
            assert_true(child >= 0);
            if (child == 0)
                _exit(run_refused(which, errors[e]));
            assert_int_equal(waitpid(child, &status, 0), child);
            if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
                print_message("[  SKIPPED ] this kernel takes no seccomp filter\n");
                skip();
            }
            if (!WIFEXITED(status) || WEXITSTATUS(status))
                fail_msg("system call %ld, errno %d: status %#x", refusals[which].number, errors[e],
                         (unsigned)status);
        }
    }
}

/* --- what debug builds check ------------------------------------------------------------------ */

static void touch_unlocked(crpc_loop *l)
{
    crpci_loop_time(l);
}

static void touch_after_unlock(crpc_loop *l)
{
    crpci_loop_lock(l);
    crpci_loop_unlock(l);
    crpci_loop_kick(l);
}

static void *hold_lock(void *arg)
{
    crpc_loop *l = (crpc_loop *)arg;
    crpci_loop_lock(l);
    pause();
    return NULL;
}

static void touch_locked_by_another(crpc_loop *l)
{
    pthread_t t;
    pthread_create(&t, NULL, hold_lock, l);
    while (!__atomic_load_n(&l->lock.holder, __ATOMIC_RELAXED))
        sched_yield();
    crpci_loop_may_send(l);
}

static void user_code_without_a_driver(crpc_loop *l)
{
    crpci_loop_lock(l);
    crpci_loop_user_begin(l);
}

/* Each mistake ends the process by SIGABRT, with a sentence that names the function. */
static void mistakes_with_the_lock_abort(void **state)
{
    static const struct {
        void (*mistake)(crpc_loop *l);
        const char *text;
    } cases[] = {
        {touch_unlocked, "crpc: crpci_loop_assert_locked: the loop is not locked by this thread\n"},
        {touch_after_unlock, "crpc: crpci_loop_assert_locked: the loop is not locked"},
        {touch_locked_by_another, "crpc: crpci_loop_assert_locked: the loop is not locked"},
        {user_code_without_a_driver, "crpc: crpci_loop_user_begin: only the driver runs user code"},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
        char text[300] = "";
        int fds[2], status = 0;
        pid_t child;
        assert_int_equal(pipe(fds), 0);
        fflush(NULL);
        child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            signal(SIGABRT, SIG_DFL);
            dup2(fds[1], 2);
            cases[i].mistake(l);
            _exit(0);
        }
        close(fds[1]);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
        assert_true(read(fds[0], text, sizeof text - 1) > 0);
        assert_non_null(strstr(text, cases[i].text));
        close(fds[0]);
        crpc_loop_close(l);
    }
}

/* --- hooks ------------------------------------------------------------------------------------ */

typedef struct hooked {
    int lines, level, allocations;
    char line[600];
    void *user;
} hooked;

static void *hooked_resize(void *user, void *ptr, size_t old_size, size_t new_size)
{
    hooked *h = (hooked *)user;
    (void)old_size;
    __atomic_add_fetch(&h->allocations, 1, __ATOMIC_SEQ_CST);
    if (new_size)
        return realloc(ptr, new_size);
    free(ptr);
    return NULL;
}

static void hooked_log(void *user, int level, const char *line)
{
    hooked *h = (hooked *)user;
    h->lines++;
    h->level = level;
    snprintf(h->line, sizeof h->line, "%s", line);
}

static void hooks_are_used(void **state)
{
    static const struct {
        int level, lines;
    } levels[] = {{0, 1}, {CRPC_LOG_ERROR, 0}, {CRPC_LOG_DEBUG, 1}, {-1, 0}};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof levels / sizeof *levels; i++) {
        hooked h;
        crpc_loop_options o;
        crpc_server_options so;
        crpc_server *s;
        crpc_loop *l;
        char url[160];
        int fd;
        memset(&h, 0, sizeof h);
        memset(&o, 0, sizeof o);
        memset(&so, 0, sizeof so);
        o.hooks.user = &h;
        o.hooks.resize = hooked_resize;
        o.hooks.log = hooked_log;
        o.hooks.log_level = levels[i].level;
        assert_int_equal(crpc_loop_open(&l, &o), CRPC_OK);
        assert_true(h.allocations > 0);
        so.loop = l;
        so.listen = "tcp://127.0.0.1:0";
        assert_int_equal(crpc_server_open(&s, &so, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        fd = wire_connect(url);
        assert_true(wire_send(fd, "rubbish", 7));
        while (stats_of(l).bad_frames == 0)
            assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
        close(fd);
        assert_int_equal(h.lines, levels[i].lines);
        if (h.lines) {
            assert_int_equal(h.level, CRPC_LOG_WARN);
            assert_non_null(strstr(h.line, "speaks none of the protocols of this server"));
            assert_null(strchr(h.line, '\n'));
        }
        crpc_server_close(s);
        crpc_loop_close(l);
    }
}

static int loop_scenario(const crpc_hooks *hooks, void *user)
{
    crpc_poller p = *(crpc_poller *)user;
    crpc_loop_options o;
    crpc_loop *l;
    crpc_id id;
    watcher w;
    int fds[40][2], i, count = 0, status;
    memset(&o, 0, sizeof o);
    memset(&w, 0, sizeof w);
    o.hooks = *hooks;
    o.poller = p;
    status = crpc_loop_open(&l, &o);
    if (status)
        return status;
    for (i = 0; i < 40; i++) {
        assert_int_equal(pipe(fds[i]), 0);
        if (!status)
            status = crpc_loop_watch(l, fds[i][0], CRPC_READABLE, on_watch, &w, &id);
    }
    status = status ? status : crpc_timer_start(l, 0, 0, tick, &count, &id);
    status = status ? status : crpc_loop_post(l, tick, &count);
    for (i = 0; i < 3; i++)
        assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    if (!status)
        assert_int_equal(count, 2);
    crpc_loop_close(l);
    for (i = 0; i < 40; i++) {
        close(fds[i][0]);
        close(fds[i][1]);
    }
    return status;
}

static void loops_survive_being_out_of_memory(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p) assert_true(ct_sweep(loop_scenario, &p) > 10);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_says_what_runs),
        CT_TEST(timers_follow_the_given_clock),
        CT_TEST(only_the_given_clock_counts),
        CT_TEST(ids_of_another_loop_name_nothing),
        CT_TEST(loops_opened_at_one_moment_draw_different_numbers),
        CT_TEST(refused_system_calls_are_replaced),
        CT_TEST(mistakes_with_the_lock_abort),
        CT_TEST(hooks_are_used),
        CT_TEST(loops_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
