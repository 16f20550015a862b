/* embedded_loop: runs crpc inside the program's own poll(2) loop.
 *
 *   embedded_loop [epoll|poll] [CALLS]        default: epoll 100000
 *
 *   $ embedded_loop poll 100000
 *   poll: 100000 calls, 0 failed, in 172 ms; my timer fired 17 times meanwhile; 1 thread
 *
 * In one poll set, the program waits for its own timer (a timerfd, which stands for the board's
 * other work) and for crpc. A server and a client use the same crpc loop, so the program calls
 * itself, with WINDOW calls in flight. No thread is started: forbid_threads tells crpc not to. The
 * program ends by itself and exits with 0 if every call succeeded.
 *
 * Shows: the lines that embed crpc (in wait_and_step), both pollers, asynchronous calls whose
 * callback begins the next call.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "sensor.crpc.h"

#include <dirent.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define WINDOW  8  /* calls in flight */
#define MAX_FDS 64 /* of the poll set */
#define TICK_MS 10 /* of the program's own timer */

typedef struct program {
    crpc_loop *loop;
    crpc_server *server;
    crpc_channel *channel;
    int timer_fd;
    int calls, begun, ended, failed;
    long ticks;
} program;

/* ---- the service and its caller -------------------------------------------------------------- */

static int read_sensor(crpc_context *context, const board_ReadRequest *request,
                       board_ReadResponse *response)
{
    (void)context;
    response->millidegrees = 20000 + (int32_t)(request->channel % 1000);
    return CRPC_OK;
}

static const board_SensorService_handlers handlers = {read_sensor};

static void begin_call(program *p);

static void on_read(void *user, int status, const board_ReadResponse *response, crpc_call *call)
{
    program *p = (program *)user;

    p->ended++;
    if (status != CRPC_OK) {
        fprintf(stderr, "embedded_loop: %s\n", call->error.text);
        p->failed++;
    } else if (response->millidegrees < 20000) {
        p->failed++;
    }
    begin_call(p);
}

/* Begins the next call, if any is left. Its callback never runs before this has returned. */
static void begin_call(program *p)
{
    board_ReadRequest request = board_ReadRequest_init_zero;
    int status;

    if (p->begun == p->calls) {
        return;
    }
    request.channel = (uint32_t)p->begun++;
    status = board_SensorService_Read_async(p->channel, &request, on_read, p, NULL);
    if (status != CRPC_OK) {
        fprintf(stderr, "embedded_loop: %s\n", crpc_status_text(status));
        p->calls = p->begun; /* no callback will run, and no further call begins */
        p->ended++;
        p->failed++;
    }
}

/* ---- the program's own loop ------------------------------------------------------------------ */

static void on_my_timer(program *p)
{
    uint64_t expired = 0;

    if (read(p->timer_fd, &expired, sizeof expired) == (ssize_t)sizeof expired) {
        p->ticks += (long)expired;
    }
}

/* Adds what crpc waits for: with epoll one descriptor that stands for all, with poll each of them,
 * which must be asked for before every wait. (crpc_loop_pollfds alone works for both.) */
static size_t add_crpc(program *p, struct pollfd *fds, size_t max)
{
    int fd = crpc_loop_fd(p->loop);

    if (fd < 0) {
        return crpc_loop_pollfds(p->loop, fds, max);
    }
    fds[0].fd = fd;
    fds[0].events = POLLIN;
    return 1;
}

static int wait_and_step(program *p)
{
    struct pollfd fds[1 + MAX_FDS];
    size_t count;

    memset(fds, 0, sizeof fds);
    fds[0].fd = p->timer_fd;
    fds[0].events = POLLIN;
    count = add_crpc(p, fds + 1, MAX_FDS);
    if (count > MAX_FDS) {
        return CRPC_ENOMEM; /* more connections than this array has entries */
    }
    poll(fds, (nfds_t)(1 + count), crpc_loop_timeout(p->loop)); /* after EINTR nothing is ready */
    if (fds[0].revents & POLLIN) {
        on_my_timer(p);
    }
    return crpc_loop_step(p->loop, 0); /* runs what is due, and does not wait */
}

static int run(program *p)
{
    int i, status = crpc_loop_step(p->loop, 0); /* from now on this thread drives it */

    for (i = 0; i < WINDOW; i++) {
        begin_call(p);
    }
    while (status == CRPC_OK && p->ended < p->calls) {
        status = wait_and_step(p);
    }
    return status;
}

/* ---- setting up ------------------------------------------------------------------------------ */

static int open_loop(program *p, bool with_poll)
{
    crpc_loop_options options = CRPC_INIT;

    options.poller = with_poll ? CRPC_POLLER_POLL : CRPC_POLLER_EPOLL;
    options.forbid_threads = 1;
    return crpc_loop_open(&p->loop, &options);
}

static int open_server(program *p, crpc_error *error)
{
    crpc_server_options options = CRPC_INIT;
    int status;

    options.listen = "tcp://127.0.0.1:0";
    options.loop = p->loop;
    status = crpc_server_open(&p->server, &options, error);
    if (status == CRPC_OK) {
        status = crpc_server_add(p->server, &board_SensorService, &handlers, p);
    }
    return status == CRPC_OK ? crpc_server_start(p->server, error) : status;
}

static int open_channel(program *p, crpc_error *error)
{
    crpc_channel_options options = CRPC_INIT;
    char url[CRPC_ADDRESS_MAX + 8];
    int status = crpc_server_address(p->server, 0, url, sizeof url);

    options.loop = p->loop;
    return status == CRPC_OK ? crpc_channel_open(&p->channel, url, &options, error) : status;
}

static int open_timer(program *p)
{
    struct itimerspec every = CRPC_INIT;

    every.it_value.tv_nsec = TICK_MS * 1000000L;
    every.it_interval = every.it_value;
    p->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    return p->timer_fd >= 0 && timerfd_settime(p->timer_fd, 0, &every, NULL) == 0 ? CRPC_OK
                                                                                  : CRPC_ESYSTEM;
}

static int open_all(program *p, bool with_poll)
{
    crpc_error error = CRPC_INIT;
    int status = open_timer(p);

    if (status == CRPC_OK) {
        status = open_loop(p, with_poll);
    }
    if (status == CRPC_OK) {
        status = open_server(p, &error);
    }
    if (status == CRPC_OK) {
        status = open_channel(p, &error);
    }
    if (status != CRPC_OK) {
        fprintf(stderr, "embedded_loop: %s (%d): %s\n", crpc_status_name(status), status,
                error.text[0] ? error.text : crpc_status_text(status));
    }
    return status;
}

/* Closes in the opposite order; every close ignores NULL. */
static void close_all(program *p)
{
    crpc_channel_close(p->channel);
    crpc_server_close(p->server);
    crpc_loop_close(p->loop);
    if (p->timer_fd >= 0) {
        close(p->timer_fd);
    }
}

static int count_threads(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;

    if (tasks == NULL) {
        return -1;
    }
    while (readdir(tasks) != NULL) {
        count++;
    }
    closedir(tasks);
    return count - 2; /* . and .. */
}

int main(int argc, char **argv)
{
    static program p; /* all zeros */
    const char *poller = argc > 1 ? argv[1] : "epoll";
    bool with_poll = strcmp(poller, "poll") == 0;
    int64_t start_us;
    int status, threads;

    p.timer_fd = -1;
    p.calls = argc > 2 ? atoi(argv[2]) : 100000;
    if (argc > 3 || p.calls <= 0 || (!with_poll && strcmp(poller, "epoll") != 0)) {
        fprintf(stderr, "usage: embedded_loop [epoll|poll] [CALLS]\n");
        return 2;
    }
    status = open_all(&p, with_poll);
    if (status == CRPC_OK) {
        start_us = crpc_loop_now_us(p.loop);
        status = run(&p);
        threads = count_threads();
        printf("%s: %d calls, %d failed, in %lld ms; my timer fired %ld times meanwhile; "
               "%d thread%s\n",
               poller, p.ended, p.failed, (long long)(crpc_loop_now_us(p.loop) - start_us) / 1000,
               p.ticks, threads, threads == 1 ? "" : "s");
    }
    close_all(&p);
    return status == CRPC_OK && p.failed == 0 && p.ended > 0 ? 0 : 1;
}
