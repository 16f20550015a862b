/* user_provider: offers two services and registers them in ZooKeeper.
 *
 *   user_provider REGISTRY_URL [--listen URL] [--id NAME] [--login-ms N] [--session-ms N]
 *
 *   $ user_provider zookeeper://127.0.0.1:2181/dubbo --id berlin
 *   provider berlin serving on tcp://127.0.0.1:40123
 *
 *   --listen URL      tcp://host:port or unix:///path; default tcp://127.0.0.1:0 (any free port).
 *                     For consumers on other machines: tcp://0.0.0.0:port or the board's address
 *   --id NAME         name of this provider, which its replies contain; default "pid-N"
 *   --login-ms N      time that a login takes, as if it asked a database; default 0
 *   --session-ms N    ZooKeeper session timeout: how long a crashed provider stays registered;
 *                     default 15000
 *
 * Consumers find the provider when its line is printed. If ZooKeeper is down, crpc goes on trying,
 * and they find it later. On SIGTERM or SIGINT it unregisters, finishes the requests in service and
 * exits with 0.
 *
 * Shows: a registered server, two services in one process, error codes of the application, a reply
 * that is finished later, a list of views in a response.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "user.crpc.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_USERS   256
#define MAX_FRIENDS 3

typedef struct account {
    uint64_t id;
    char name[32];
    char password[64]; /* only in an example: never store passwords as plain text */
    crpc_view friends[MAX_FRIENDS];
    size_t friend_count;
} account;

/* workers and io_threads are 0, so handlers run one at a time on the server's loop, and nothing
 * here needs a lock. */
typedef struct provider {
    const char *registry;
    const char *listen;
    char id[32];
    int login_ms;
    int session_ms;
    crpc_loop *loop;
    unsigned sessions;
    account accounts[MAX_USERS]; /* in memory: a provider knows only its own users */
    size_t account_count;
} provider;

/* ---- accounts -------------------------------------------------------------------------------- */

static account *find_name(provider *p, const char *name)
{
    size_t i;

    for (i = 0; i < p->account_count; i++) {
        if (strcmp(p->accounts[i].name, name) == 0) {
            return &p->accounts[i];
        }
    }
    return NULL;
}

static account *find_id(provider *p, uint64_t id)
{
    size_t i;

    for (i = 0; i < p->account_count; i++) {
        if (p->accounts[i].id == id) {
            return &p->accounts[i];
        }
    }
    return NULL;
}

static account *add_account(provider *p, const char *name, const char *password)
{
    account *a;

    if (p->account_count == MAX_USERS) {
        return NULL;
    }
    a = &p->accounts[p->account_count++];
    a->id = p->account_count;
    snprintf(a->name, sizeof a->name, "%s", name);
    snprintf(a->password, sizeof a->password, "%s", password);
    return a;
}

/* Every provider begins with three accounts, which are friends of each other. */
static void add_first_accounts(provider *p)
{
    static const char *const names[] = {"alice", "bob", "carol"};
    size_t i, k;

    for (i = 0; i < 3; i++) {
        add_account(p, names[i], "secret");
    }
    for (i = 0; i < 3; i++) {
        account *a = &p->accounts[i];
        for (k = 0; k < 3; k++) {
            if (k != i) {
                a->friends[a->friend_count++] = crpc_view_str(p->accounts[k].name);
            }
        }
    }
}

/* ---- handlers -------------------------------------------------------------------------------- */

static int register_user(crpc_context *context, const demo_RegisterRequest *request,
                         demo_RegisterResponse *response)
{
    provider *p = (provider *)crpc_context_user(context);
    account *a;

    if (request->name[0] == '\0') {
        return crpc_context_error(context, CRPC_EREQUEST, "the name is empty");
    }
    if (find_name(p, request->name) != NULL) {
        return crpc_context_fail(context, demo_UserError_NAME_TAKEN, "the name %s is taken",
                                 request->name);
    }
    a = add_account(p, request->name, request->password);
    if (a == NULL) {
        return crpc_context_fail(context, demo_UserError_TOO_MANY_USERS, "%d users are the limit",
                                 MAX_USERS);
    }
    response->user_id = a->id;
    snprintf(response->provider, sizeof response->provider, "%s", p->id);
    return CRPC_OK;
}

static void reply_now(void *user)
{
    /* CRPC_EGONE only means that the caller has disconnected meanwhile. */
    (void)crpc_context_finish((crpc_context *)user, CRPC_OK);
}

/* A login that takes time does not block the loop: the handler returns CRPC_EPENDING, and a timer
 * finishes the request. A database's callback could do so as well, on any thread. */
static int login(crpc_context *context, const demo_LoginRequest *request,
                 demo_LoginResponse *response)
{
    provider *p = (provider *)crpc_context_user(context);
    const account *a = find_name(p, request->name);
    crpc_id timer;
    int status;

    if (a == NULL || strcmp(a->password, request->password) != 0) {
        return crpc_context_fail(context, demo_UserError_WRONG_PASSWORD,
                                 "wrong name or password for %s", request->name);
    }
    response->ok = true;
    response->user_id = a->id;
    snprintf(response->session, sizeof response->session, "%s-%u", p->id, ++p->sessions);
    snprintf(response->provider, sizeof response->provider, "%s", p->id);
    if (p->login_ms == 0) {
        return CRPC_OK;
    }
    status = crpc_timer_start(p->loop, p->login_ms, 0, reply_now, context, &timer);
    return status == CRPC_OK ? CRPC_EPENDING : status;
}

static int get_friend_list(crpc_context *context, const demo_GetFriendListRequest *request,
                           demo_GetFriendListResponse *response)
{
    provider *p = (provider *)crpc_context_user(context);
    const account *a = find_id(p, request->user_id);

    if (a == NULL) {
        return crpc_context_fail(context, demo_UserError_NO_SUCH_USER, "no user has the id %llu",
                                 (unsigned long long)request->user_id);
    }
    /* crpc encodes the response after this function has returned, so its views must not point to
     * local variables. */
    response->names = crpc_views_of(a->friends, a->friend_count);
    return CRPC_OK;
}

/* In the order of the .proto. */
static const demo_UserService_handlers user_handlers = {register_user, login};
static const demo_FriendService_handlers friend_handlers = {get_friend_list};

/* ---- the program ----------------------------------------------------------------------------- */

static crpc_loop *loop_to_stop;

static void on_signal(int signo)
{
    (void)signo;
    crpc_loop_stop(loop_to_stop);
}

static int catch_signals(crpc_loop *loop)
{
    struct sigaction action = CRPC_INIT;

    loop_to_stop = loop;
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGTERM, &action, NULL) == 0 && sigaction(SIGINT, &action, NULL) == 0
               ? CRPC_OK
               : CRPC_ESYSTEM;
}

static int complain(int status, const char *what, const char *detail)
{
    fprintf(stderr, "user_provider: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

static int add_services(crpc_server *server, provider *p)
{
    int status = crpc_server_add(server, &demo_UserService, &user_handlers, p);

    return status != CRPC_OK ? status
                             : crpc_server_add(server, &demo_FriendService, &friend_handlers, p);
}

static int serve(crpc_server *server, provider *p)
{
    crpc_error error = CRPC_INIT;
    char url[CRPC_ADDRESS_MAX + 8];
    int status;

    p->loop = crpc_server_loop(server);
    if ((status = add_services(server, p)) != CRPC_OK) {
        return complain(status, "adding the services", "");
    }
    if ((status = catch_signals(p->loop)) != CRPC_OK) {
        return complain(status, "sigaction", strerror(errno));
    }
    if ((status = crpc_server_start(server, &error)) != CRPC_OK) {
        return complain(status, "starting", error.text);
    }
    if ((status = crpc_server_address(server, 0, url, sizeof url)) != CRPC_OK) {
        return complain(status, "asking for the address", "");
    }
    printf("provider %s serving on %s\n", p->id, url);
    fflush(stdout);
    if ((status = crpc_server_run(server)) != CRPC_OK) { /* returns after a signal */
        return complain(status, "running", "");
    }
    printf("provider %s stopped\n", p->id);
    return CRPC_OK;
}

static int open_and_serve(provider *p)
{
    crpc_server_options options = CRPC_INIT;
    crpc_server *server = NULL;
    crpc_error error = CRPC_INIT;
    int status;

    options.listen = p->listen;
    options.registry = p->registry;
    options.directory.application = "user_provider";
    options.directory.session_timeout_ms = p->session_ms;
    status = crpc_server_open(&server, &options, &error);
    if (status != CRPC_OK) {
        return complain(status, "opening", error.text);
    }
    status = serve(server, p);
    signal(SIGTERM, SIG_IGN); /* crpc_server_close frees the loop that on_signal stops */
    signal(SIGINT, SIG_IGN);
    crpc_server_close(server);
    return status;
}

static bool parse_number(const char *text, int *number)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    *number = (int)value;
    return errno == 0 && end != text && *end == '\0' && value >= 0 && value <= INT_MAX;
}

static bool parse_options(int argc, char **argv, provider *p)
{
    int i;

    for (i = 0; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        bool good = true;

        if (strcmp(argv[i], "--listen") == 0) {
            p->listen = value;
        } else if (strcmp(argv[i], "--id") == 0) {
            good = strlen(value) < sizeof p->id;
            snprintf(p->id, sizeof p->id, "%s", value);
        } else if (strcmp(argv[i], "--login-ms") == 0) {
            good = parse_number(value, &p->login_ms);
        } else if (strcmp(argv[i], "--session-ms") == 0) {
            good = parse_number(value, &p->session_ms);
        } else {
            good = false;
        }
        if (!good) {
            return false;
        }
    }
    return i == argc;
}

int main(int argc, char **argv)
{
    static provider p; /* all zeros */

    p.listen = "tcp://127.0.0.1:0";
    snprintf(p.id, sizeof p.id, "pid-%ld", (long)getpid());
    if (argc < 2 || argv[1][0] == '-' || !parse_options(argc - 2, argv + 2, &p)) {
        fprintf(stderr, "usage: user_provider REGISTRY_URL [--listen URL] [--id NAME]\n"
                        "                     [--login-ms N] [--session-ms N]\n");
        return 2;
    }
    p.registry = argv[1];
    add_first_accounts(&p);
    return open_and_serve(&p) == CRPC_OK ? 0 : 1;
}
