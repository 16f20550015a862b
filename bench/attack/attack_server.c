/* attack_server OPTIONS URL...: the server that attack.py besets.
 *
 * OPTIONS are configuration lines for crpc_server_options_parse, such as "io_threads=2\nworkers=4".
 * The server prints its addresses, as echo_server does. It ends on SIGTERM, after its requests in
 * service, with status 0.
 *
 * example.EchoService.Echo answers with the message, except for two kinds of messages:
 *
 *   "reply N"   an attachment of N bytes comes with the reply
 *   "park"      the reply comes PARK_S seconds later, as that of a long poll without news
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PARK_S    30
#define MAX_REPLY (16 << 20)

/* A parked request, in the memory of its context. */
typedef struct parked {
    struct parked *next;
    crpc_context *context;
    time_t due;
} parked;

static struct {
    pthread_mutex_t mutex;
    parked *first; /* the next one due: all wait equally long */
    parked **last;
} park = {PTHREAD_MUTEX_INITIALIZER, NULL, &park.first};

static crpc_loop *loop_to_stop;

static time_t now_s(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec;
}

/* Handlers run on several threads: I/O threads or workers. */
static int park_request(crpc_context *context)
{
    parked *p = (parked *)crpc_context_alloc(context, sizeof *p);

    if (!p) {
        return CRPC_ENOMEM;
    }
    p->context = context;
    pthread_mutex_lock(&park.mutex);
    p->due = now_s() + PARK_S;
    *park.last = p;
    park.last = &p->next;
    pthread_mutex_unlock(&park.mutex);
    return CRPC_EPENDING;
}

/* Takes the first request that is due at `now`; NULL if none is. */
static crpc_context *unpark(time_t now)
{
    parked *p;

    pthread_mutex_lock(&park.mutex);
    p = park.first && park.first->due <= now ? park.first : NULL;
    if (p) {
        park.first = p->next;
        park.last = park.first ? park.last : &park.first;
    }
    pthread_mutex_unlock(&park.mutex);
    return p ? p->context : NULL;
}

static void finish_parked(time_t now)
{
    crpc_context *context;

    while ((context = unpark(now)) != NULL) {
        crpc_context_finish(context, CRPC_OK); /* CRPC_EGONE: its peer has gone */
    }
}

static void on_second(void *user)
{
    (void)user;
    finish_parked(now_s());
}

static int echo(crpc_context *context, const example_EchoRequest *request,
                example_EchoResponse *response)
{
    static const char zeros[MAX_REPLY];
    char text[16] = "";
    size_t size = crpc_view_size(request->message);
    int n = 0;

    response->message = request->message;
    if (size < sizeof text) {
        memcpy(text, crpc_view_data(request->message), size);
    }
    if (!strcmp(text, "park")) {
        return park_request(context);
    }
    if (sscanf(text, "reply %d", &n) == 1 && n >= 0 && n <= MAX_REPLY) {
        return crpc_context_set_attachment(context, crpc_view_of(zeros, (size_t)n));
    }
    return CRPC_OK;
}

static const example_EchoService_handlers handlers = {echo};

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop_to_stop);
}

static void stop_on_sigterm(crpc_loop *loop)
{
    struct sigaction action = CRPC_INIT;

    loop_to_stop = loop;
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
}

static int complain(int status, const char *what, const crpc_error *error)
{
    fprintf(stderr, "attack_server: %s: %s: %s\n", what, crpc_status_name(status), error->text);
    return status;
}

static int serve(crpc_server *server, char **urls, int count)
{
    char url[CRPC_ADDRESS_MAX + 8];
    crpc_error error = CRPC_INIT;
    int status = crpc_server_add(server, &example_EchoService, &handlers, NULL), i;

    for (i = 0; status == CRPC_OK && i < count; i++) {
        status = crpc_server_listen(server, urls[i], &error);
    }
    stop_on_sigterm(crpc_server_loop(server));
    if (status == CRPC_OK) {
        status = crpc_timer_start(crpc_server_loop(server), 1000, 1000, on_second, NULL, NULL);
    }
    if (status == CRPC_OK) {
        status = crpc_server_start(server, &error);
    }
    if (status != CRPC_OK) {
        return complain(status, "starting", &error);
    }
    for (i = 0; crpc_server_address(server, (size_t)i, url, sizeof url) == CRPC_OK; i++) {
        printf("listening on %s\n", url);
    }
    fflush(stdout);
    return crpc_server_run(server);
}

int main(int argc, char **argv)
{
    crpc_server_options options = CRPC_INIT;
    crpc_server *server = NULL;
    crpc_error error = CRPC_INIT;
    int status;

    if (argc < 3) {
        fprintf(stderr, "usage: attack_server OPTIONS URL...\n");
        return 2;
    }
    status = crpc_server_options_parse(argv[1], &options, &error);
    if (status == CRPC_OK) {
        status = crpc_server_open(&server, &options, &error);
    }
    if (status != CRPC_OK) {
        complain(status, "opening", &error);
        return 1;
    }
    status = serve(server, argv + 2, argc - 2);
    signal(SIGTERM, SIG_IGN); /* crpc_server_close frees the loop that on_signal stops */
    crpc_server_close(server);
    finish_parked(now_s() + PARK_S); /* all of them: their contexts outlive the server */
    return status == CRPC_OK ? 0 : 1;
}
