/* user_consumer: finds the services of user_provider by name and calls them in all three forms.
 *
 *   user_consumer REGISTRY_URL [--providers N] [--seconds N] [--rate N]
 *                              [--only-load] [--json]
 *
 *   $ user_consumer zookeeper://127.0.0.1:2181/dubbo --seconds 10 --rate 200
 *
 *   --providers N     waits up to 10 s until N providers are known; default 1
 *   --seconds N       after the single calls, logs in repeatedly for N seconds; default 0
 *   --rate N          logins a second; default 100
 *   --only-load       leaves out the single calls
 *   --json            prints the counts as one line of JSON on stdout, and all else on stderr
 *
 * Exits with 0 if the single calls ended as expected and, under load, at least one login succeeded.
 *
 * Shows: channels by service name; the synchronous, callback and id forms of a call; error codes of
 * the application. The load is in user_load.h.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "user.crpc.h"

#include "user_load.h"

#include <errno.h>
#include <semaphore.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct consumer {
    const char *registry;
    int min_providers, seconds, rate;
    bool only_load, json;
    FILE *out;
    crpc_channel *users, *friends;
    sem_t called_back;
    int unexpected; /* how many results were not as expected */
} consumer;

/* ---- the requests ---------------------------------------------------------------------------- */

static demo_RegisterRequest new_account(const char *prefix)
{
    demo_RegisterRequest request = demo_RegisterRequest_init_zero;

    snprintf(request.name, sizeof request.name, "%s-%ld-%lld", prefix, (long)getpid(),
             (long long)now_us()); /* a name that is not taken yet */
    snprintf(request.password, sizeof request.password, "secret");
    return request;
}

static demo_LoginRequest login_of(const char *name, const char *password)
{
    demo_LoginRequest request = demo_LoginRequest_init_zero;

    snprintf(request.name, sizeof request.name, "%s", name);
    snprintf(request.password, sizeof request.password, "%s", password);
    return request;
}

static const demo_GetFriendListRequest friends_of_alice = {1};

/* ---- the results, printed alike for all three forms ------------------------------------------ */

static void show_failure(consumer *c, const char *what, int status, const crpc_call *call)
{
    fprintf(c->out, "    %-14s %s (%d): %s\n", what, crpc_status_name(status), status,
            call->error.text[0] ? call->error.text : crpc_status_text(status));
    c->unexpected++;
}

static void show_register(consumer *c, int status, const demo_RegisterResponse *response,
                          const crpc_call *call)
{
    if (status != CRPC_OK) {
        show_failure(c, "Register", status, call);
        return;
    }
    fprintf(c->out, "    %-14s user %llu, by provider %s\n", "Register",
            (unsigned long long)response->user_id, response->provider);
}

static void show_login(consumer *c, int status, const demo_LoginResponse *response,
                       const crpc_call *call)
{
    if (status != CRPC_OK) {
        show_failure(c, "Login", status, call);
        return;
    }
    fprintf(c->out, "    %-14s session %s, by provider %s\n", "Login", response->session,
            response->provider);
}

/* A login with a wrong password must fail with CRPC_EAPP and the service's own code. */
static void show_refusal(consumer *c, int status, const crpc_call *call)
{
    if (status != CRPC_EAPP || call->error.app_code != demo_UserError_WRONG_PASSWORD) {
        show_failure(c, "Wrong password", status, call);
        return;
    }
    fprintf(c->out, "    %-14s code %d: %s\n", "Wrong password", call->error.app_code,
            call->error.text);
}

static void show_friends(consumer *c, int status, const demo_GetFriendListResponse *response,
                         const crpc_call *call)
{
    const void *cursor = NULL;
    crpc_view name;

    if (status != CRPC_OK) {
        show_failure(c, "GetFriendList", status, call);
        return;
    }
    fprintf(c->out, "    %-14s", "GetFriendList");
    while (crpc_views_next(&response->names, &cursor, &name)) {
        fprintf(c->out, " %.*s", (int)crpc_view_size(name), crpc_view_data(name));
    }
    fputc('\n', c->out);
}

/* ---- form 1: call and wait ------------------------------------------------------------------- */

static void call_and_wait(consumer *c)
{
    demo_RegisterRequest account = new_account("sync");
    demo_LoginRequest right = login_of("alice", "secret"), wrong = login_of("alice", "guess");
    demo_RegisterResponse registered = demo_RegisterResponse_init_zero;
    demo_LoginResponse session = demo_LoginResponse_init_zero;
    demo_GetFriendListResponse friends = demo_GetFriendListResponse_init_zero;
    crpc_call call = CRPC_INIT;
    int status;

    fprintf(c->out, "\n  Synchronous: the call returns when the reply has come\n");
    status = demo_UserService_Register(c->users, &account, &registered, &call);
    show_register(c, status, &registered, &call);
    status = demo_UserService_Login(c->users, &right, &session, &call);
    show_login(c, status, &session, &call);
    status = demo_UserService_Login(c->users, &wrong, &session, &call);
    show_refusal(c, status, &call);
    status = demo_FriendService_GetFriendList(c->friends, &friends_of_alice, &friends, &call);
    show_friends(c, status, &friends, &call); /* the names point into bytes that `call` holds */
    crpc_call_reset(&call);
}

/* ---- form 2: with a callback, which runs on the channel's own thread ------------------------- */

static void on_registered(void *user, int status, const demo_RegisterResponse *response,
                          crpc_call *call)
{
    show_register((consumer *)user, status, response, call);
    sem_post(&((consumer *)user)->called_back);
}

static void on_login(void *user, int status, const demo_LoginResponse *response, crpc_call *call)
{
    show_login((consumer *)user, status, response, call);
    sem_post(&((consumer *)user)->called_back);
}

static void on_refusal(void *user, int status, const demo_LoginResponse *response, crpc_call *call)
{
    (void)response;
    show_refusal((consumer *)user, status, call);
    sem_post(&((consumer *)user)->called_back);
}

static void on_friends(void *user, int status, const demo_GetFriendListResponse *response,
                       crpc_call *call)
{
    show_friends((consumer *)user, status, response, call);
    sem_post(&((consumer *)user)->called_back);
}

/* If the call function fails, no callback runs; otherwise exactly one does. It needs no timeout
 * here: a call ends at its deadline at the latest. */
static void await_callback(consumer *c, int status)
{
    if (status != CRPC_OK) {
        fprintf(c->out, "    the call could not begin: %s\n", crpc_status_text(status));
        c->unexpected++;
        return;
    }
    while (sem_wait(&c->called_back) != 0) { /* interrupted by a signal */
    }
}

static void call_with_callbacks(consumer *c)
{
    demo_RegisterRequest account = new_account("callback");
    demo_LoginRequest right = login_of("bob", "secret"), wrong = login_of("bob", "guess");

    fprintf(c->out, "\n  Callback: the call returns at once, a function gets the result later\n");
    await_callback(c, demo_UserService_Register_async(c->users, &account, on_registered, c, NULL));
    await_callback(c, demo_UserService_Login_async(c->users, &right, on_login, c, NULL));
    await_callback(c, demo_UserService_Login_async(c->users, &wrong, on_refusal, c, NULL));
    await_callback(c, demo_FriendService_GetFriendList_async(c->friends, &friends_of_alice,
                                                             on_friends, c, NULL));
}

/* ---- form 3: by id: four calls at once, whose results are fetched later ---------------------- */

static bool begin_all(consumer *c, crpc_id ids[4])
{
    demo_RegisterRequest account = new_account("id");
    demo_LoginRequest right = login_of("carol", "secret"), wrong = login_of("carol", "guess");

    return demo_UserService_Register_begin(c->users, &account, &ids[0], NULL) == CRPC_OK &&
           demo_UserService_Login_begin(c->users, &right, &ids[1], NULL) == CRPC_OK &&
           demo_UserService_Login_begin(c->users, &wrong, &ids[2], NULL) == CRPC_OK &&
           demo_FriendService_GetFriendList_begin(c->friends, &friends_of_alice, &ids[3], NULL) ==
               CRPC_OK;
}

static void fetch_all(consumer *c, const crpc_id ids[4], crpc_call *call)
{
    demo_RegisterResponse registered = demo_RegisterResponse_init_zero;
    demo_LoginResponse session = demo_LoginResponse_init_zero;
    demo_GetFriendListResponse friends = demo_GetFriendListResponse_init_zero;
    int status;

    if ((status = crpc_channel_wait(c->users, ids[0], -1)) == CRPC_OK) {
        status = demo_UserService_Register_fetch(c->users, ids[0], &registered, call);
    }
    show_register(c, status, &registered, call);
    if ((status = crpc_channel_wait(c->users, ids[1], -1)) == CRPC_OK) {
        status = demo_UserService_Login_fetch(c->users, ids[1], &session, call);
    }
    show_login(c, status, &session, call);
    if ((status = crpc_channel_wait(c->users, ids[2], -1)) == CRPC_OK) {
        status = demo_UserService_Login_fetch(c->users, ids[2], &session, call);
    }
    show_refusal(c, status, call);
    if ((status = crpc_channel_wait(c->friends, ids[3], -1)) == CRPC_OK) {
        status = demo_FriendService_GetFriendList_fetch(c->friends, ids[3], &friends, call);
    }
    show_friends(c, status, &friends, call);
}

static void call_by_id(consumer *c)
{
    crpc_id ids[4] = CRPC_INIT;
    crpc_call call = CRPC_INIT;

    fprintf(c->out, "\n  By id: four calls begin at once, and their results are fetched later\n");
    if (!begin_all(c, ids)) {
        fprintf(c->out, "    a call could not begin\n");
        c->unexpected++;
        return;
    }
    fetch_all(c, ids, &call);
    crpc_call_reset(&call);
}

/* ---- the program ----------------------------------------------------------------------------- */

static int open_channel(consumer *c, const char *service, crpc_channel **channel)
{
    char url[512];
    crpc_error error = CRPC_INIT;
    int status;

    snprintf(url, sizeof url, "%s/%s", c->registry, service);
    status = crpc_channel_open(channel, url, NULL, &error);
    if (status != CRPC_OK) {
        fprintf(stderr, "user_consumer: %s: %s (%d): %s\n", url, crpc_status_name(status), status,
                error.text);
    }
    return status;
}

static bool await_providers(consumer *c)
{
    int64_t end_us = now_us() + 10000000;
    size_t wanted = (size_t)c->min_providers, users, friends;

    do {
        users = crpc_channel_providers(c->users);
        friends = crpc_channel_providers(c->friends);
        if (users >= wanted && friends >= wanted) {
            fprintf(c->out,
                    "  Found %zu providers of demo.UserService, %zu of demo.FriendService\n", users,
                    friends);
            return true;
        }
        sleep_us(20000);
    } while (now_us() < end_us);
    fprintf(stderr, "user_consumer: found %zu and %zu providers in 10 s, expected %zu\n", users,
            friends, wanted);
    return false;
}

static bool run(consumer *c, load *l)
{
    const demo_LoginRequest alice = login_of("alice", "secret");
    load_counts n = CRPC_INIT;

    if (!c->only_load) {
        call_and_wait(c);
        call_with_callbacks(c);
        call_by_id(c);
    }
    if (c->seconds > 0) {
        fprintf(c->out, "\n  Under load: %d logins a second for %d s\n", c->rate, c->seconds);
        l->channel = c->users;
        l->out = c->out;
        n = load_run(l, &alice, c->seconds, c->rate);
        load_print(c->out, &n);
    }
    if (c->json) {
        load_print_json(&n, c->unexpected);
    }
    return c->unexpected == 0 && (c->seconds == 0 || n.ok > 0);
}

static bool parse_number(const char *text, int *number)
{
    char *end = NULL;
    long value;

    errno = 0;
    value = strtol(text, &end, 10);
    *number = (int)value;
    return errno == 0 && end != text && *end == '\0' && value >= 0 && value <= 100000;
}

static bool parse_options(int argc, char **argv, consumer *c)
{
    int i;

    for (i = 0; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";

        if (strcmp(argv[i], "--json") == 0) {
            c->json = true;
        } else if (strcmp(argv[i], "--only-load") == 0) {
            c->only_load = true;
        } else if ((strcmp(argv[i], "--providers") == 0 &&
                    parse_number(value, &c->min_providers)) ||
                   (strcmp(argv[i], "--seconds") == 0 && parse_number(value, &c->seconds)) ||
                   (strcmp(argv[i], "--rate") == 0 && parse_number(value, &c->rate))) {
            i++; /* the value */
        } else {
            return false;
        }
    }
    return c->rate > 0;
}

int main(int argc, char **argv)
{
    static consumer c; /* all zeros */
    static load l;
    bool good;

    c.min_providers = 1;
    c.rate = 100;
    if (argc < 2 || argv[1][0] == '-' || !parse_options(argc - 2, argv + 2, &c)) {
        fprintf(stderr,
                "usage: user_consumer REGISTRY_URL [--providers N] [--seconds N] [--rate N]\n"
                "                     [--only-load] [--json]\n");
        return 2;
    }
    c.registry = argv[1];
    c.out = c.json ? stderr : stdout;
    if (sem_init(&c.called_back, 0, 0) != 0 || pthread_mutex_init(&l.lock, NULL) != 0) {
        perror("user_consumer");
        return 1;
    }
    good = open_channel(&c, "demo.UserService", &c.users) == CRPC_OK &&
           open_channel(&c, "demo.FriendService", &c.friends) == CRPC_OK && await_providers(&c) &&
           run(&c, &l);
    crpc_channel_close(c.friends); /* callbacks of pending calls run now; NULL is ignored */
    crpc_channel_close(c.users);
    pthread_mutex_destroy(&l.lock);
    sem_destroy(&c.called_back);
    return good && fflush(stdout) == 0 ? 0 : 1;
}
