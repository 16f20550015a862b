/* The registry against a real ZooKeeper: what stays, comes back and is noticed when providers,
 * servers, sessions and connections go.
 * crpc-test-timeout: 600 */
#define CRPC_IMPLEMENTATION
#include "../../crpc.h"
#define CT_TEST_SECONDS 180 /* a busy machine starts a server slowly */
#include "../crpc_test.h"
#include "../crpc_zk.h"

#include <sys/resource.h>

#define TIMEOUT_MS 1000 /* of sessions */
#define SOON_MS 1000    /* in which a change is seen when the machine is not busy... */
#define WHOLE_MS 5000   /* in which all is as before when a server or an operator lost the data */
#define LATE_MS 20000   /* ... and when it is: nothing but a fault takes longer */
#define SERVICE "/test/demo.Echo"
#define PROVIDERS SERVICE "/providers"
#define OVERRIDES SERVICE "/configurators"
#define CONSUMERS SERVICE "/consumers"

/* Of the server: a consumer watches two directories, a provider its own node. */
#define WATCHES(consumers, providers) (2 * (consumers) + (providers))

static zk_server server; /* shared by the tests that leave it in order */
static int session_ms = TIMEOUT_MS;
static const char *cache; /* for the registries opened next */

/* --- one side: a loop, a registry, what came out of it ------------------------------------------ */

typedef struct side {
    crpc_loop *loop;
    crpci_backend *registry;
    crpci_subscriber *sub;
    void *reg;
    pthread_mutex_t lock;
    char list[1024]; /* the last one: "a:1 b:2 " */
    char weights[256]; /* of the last one: "100 50 " */
    int stale;         /* atomic: the last one is */
    int pushes;      /* atomic */
    int status;      /* atomic: the last one told; -1 none */
    int told_ok;     /* atomic */
    int lines;       /* atomic: logged */
    int close_in_push;
    int unsubscribe_in_push;
    int withdraw_in_status;
    int slow_push_ms;
    int refuse_pushes;
    int in_push; /* atomic */
} side;

static void side_log(void *user, int level, const char *line)
{
    (void)level;
    (void)user;
    if (getenv("CRPC_TEST_VERBOSE")) /* loops log at the same time: nothing is kept here */
        printf("%lld %s\n", (long long)ct_now_ms() % 1000000, line);
}

/* The hooks have one user pointer, the allocator's: lines are counted for all sides together. */
static int logged;

static void side_count(void *user, int level, const char *line)
{
    __atomic_add_fetch(&logged, 1, __ATOMIC_RELAXED);
    side_log(user, level, line);
}

static int on_push(void *user, crpci_snapshot *list)
{
    side *s = (side *)user;
    size_t i, n = 0;
    if (s->refuse_pushes) {
        s->refuse_pushes--;
        return CRPC_ENOMEM;
    }
    __atomic_store_n(&s->in_push, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_lock(&s->lock);
    s->list[0] = '\0';
    s->weights[0] = '\0';
    for (i = 0; i < list->count && n < sizeof s->list; i++) {
        size_t w = strlen(s->weights);
        n += (size_t)snprintf(s->list + n, sizeof s->list - n, "%s ", list->providers[i].address);
        snprintf(s->weights + w, sizeof s->weights - w, "%d ", list->providers[i].weight);
    }
    __atomic_store_n(&s->stale, list->stale, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&s->lock);
    if (s->slow_push_ms)
        ct_sleep_ms(s->slow_push_ms);
    if (s->unsubscribe_in_push) {
        crpci_directory_unsubscribe(s->registry, s->sub);
        s->sub = NULL;
    }
    if (s->close_in_push) {
        crpci_directory_close(s->registry);
        s->registry = NULL;
    }
    __atomic_add_fetch(&s->pushes, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&s->in_push, 0, __ATOMIC_SEQ_CST);
    return CRPC_OK;
}

static void on_status(void *user, int status, const char *text)
{
    side *s = (side *)user;
    (void)text;
    if (s->withdraw_in_status) {
        crpci_directory_withdraw(s->registry, s->reg);
        s->reg = NULL;
    }
    __atomic_store_n(&s->status, status, __ATOMIC_SEQ_CST);
    if (status == CRPC_OK)
        __atomic_add_fetch(&s->told_ok, 1, __ATOMIC_SEQ_CST);
}

static void side_loop(side *s, int drive)
{
    crpc_loop_options o;
    memset(s, 0, sizeof *s);
    memset(&o, 0, sizeof o);
    s->status = -1;
    pthread_mutex_init(&s->lock, NULL);
    o.poller = ct_poller();
    o.hooks = ct_hooks();
    o.hooks.log = side_count;
    o.hooks.log_level = CRPC_LOG_DEBUG;
    assert_int_equal(crpc_loop_open(&s->loop, &o), CRPC_OK);
    if (drive)
        assert_int_equal(crpc_loop_start(s->loop), CRPC_OK);
}

static crpci_backend *open_registry(crpc_loop *loop, int port, const char *credential)
{
    crpci_directory_options o;
    crpci_backend *r;
    crpc_error error;
    char text[64];
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = session_ms;
    o.credential = credential;
    o.application = "tests";
    o.register_consumer = true;
    o.cache = cache;
    o.cache_interval_ms = -1;
    snprintf(text, sizeof text, "zookeeper://127.0.0.1:%d/test", port);
    if (crpci_open_registry(loop, text, &o, &r, &error))
        fail_msg("open: %s", error.text);
    return r;
}

static void side_open(side *s, int port)
{
    side_loop(s, 1);
    s->registry = open_registry(s->loop, port, NULL);
}

static void side_subscribe_with(side *s, const char *group, const char *version, bool allow_empty)
{
    crpci_names_service q;
    memset(&q, 0, sizeof q);
    q.service = "demo.Echo";
    q.group = group;
    q.version = version;
    q.allow_empty = allow_empty;
    assert_int_equal(crpci_directory_subscribe(s->registry, &q, on_push, s, &s->sub), CRPC_OK);
}

static void side_subscribe_as(side *s, const char *group, const char *version)
{
    side_subscribe_with(s, group, version, false);
}

static void side_subscribe(side *s)
{
    side_subscribe_as(s, NULL, NULL);
}

static void side_enroll_as(side *s, const char *address, const char *group, const char *version)
{
    crpci_names_service what;
    memset(&what, 0, sizeof what);
    what.service = "demo.Echo";
    what.address = address;
    what.group = group;
    what.version = version;
    what.methods = "Echo";
    what.weight = 100;
    assert_int_equal(crpci_directory_enroll(s->registry, &what, on_status, s, &s->reg), CRPC_OK);
}

static void side_enroll(side *s, const char *address)
{
    side_enroll_as(s, address, NULL, NULL);
}

static void side_close(side *s)
{
    crpci_directory_close(s->registry);
    crpc_loop_close(s->loop);
    pthread_mutex_destroy(&s->lock);
}

static bool side_has(side *s, const char *list)
{
    bool same;
    pthread_mutex_lock(&s->lock);
    same = strcmp(s->list, list) == 0;
    pthread_mutex_unlock(&s->lock);
    return same;
}

static int value(int *p)
{
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static void expect_list(side *s, const char *list, int ms)
{
    if (!CT_WAIT(value(&s->pushes) > 0 && side_has(s, list), ms))
        fail_msg("after %d ms the list is \"%s\" instead of \"%s\" (%d pushes)", ms, s->list, list,
                 value(&s->pushes));
}

static bool side_weighs(side *s, const char *weights)
{
    bool same;
    pthread_mutex_lock(&s->lock);
    same = strcmp(s->weights, weights) == 0;
    pthread_mutex_unlock(&s->lock);
    return same;
}

static void expect_weights(side *s, const char *weights)
{
    if (!CT_WAIT(side_weighs(s, weights), LATE_MS))
        fail_msg("the weights of \"%s\" are \"%s\" instead of \"%s\"", s->list, s->weights,
                 weights);
}

static void expect_stale(side *s, int stale)
{
    if (!CT_WAIT(value(&s->stale) == stale, LATE_MS))
        fail_msg("the list is %s", stale ? "not called stale" : "still called stale");
}

static void expect_ok(side *s, int ms)
{
    if (!CT_WAIT(value(&s->status) == CRPC_OK, ms))
        fail_msg("after %d ms not registered (status %d)", ms, value(&s->status));
}

/* The session of a side, seen from inside. */
static int64_t side_session(side *s)
{
    crpci_zk_session *z = ((crpci_zk_directory *)(void *)s->registry)->session;
    int64_t id;
    crpci_loop_lock(s->loop);
    id = z->phase == CRPCI_ZK_CONNECTED ? z->id : 0;
    crpci_loop_unlock(s->loop);
    return id;
}

/* --- what is on the server ---------------------------------------------------------------------- */

static int count_in(const zk_server *s, const char *directory)
{
    zk_client *c = zk_open(s);
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    int n;
    zk_children(c, directory, names);
    n = names->count;
    zk_close(c);
    free(names);
    return n;
}

static int count_nodes(const zk_server *s)
{
    return count_in(s, PROVIDERS);
}

/* Whose the only node is; 0 if there are more or none. */
static int64_t only_owner(const zk_server *s, const char *address)
{
    zk_client *c = zk_open(s);
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    int64_t owner = 0;
    char path[1200], want[128];
    zk_children(c, PROVIDERS, names);
    if (names->count == 1) {
        crpci_url_encode(want, sizeof want, address);
        snprintf(path, sizeof path, "%s/%s", PROVIDERS, names->name[0]);
        if (!strstr(path, want) || zk_exists(c, path, &owner))
            owner = 0;
    }
    zk_close(c);
    free(names);
    return owner;
}

/* The only node of the service is that of a side, owned by the side's present session. */
static void expect_own_node(side *who, const zk_server *s, const char *address)
{
    crpci_zk_session *z = ((crpci_zk_directory *)(void *)who->registry)->session;
    zk_names *names;
    zk_client *c;
    int i;
    if (CT_WAIT(side_session(who) && only_owner(s, address) == side_session(who), LATE_MS))
        return;
    crpci_loop_lock(who->loop);
    fprintf(stderr, "session %llx, phase %d, due in %lld us, status of the registration %d\n",
            (unsigned long long)z->id, (int)z->phase,
            (long long)(z->due_us - crpci_loop_now(who->loop)), value(&who->status));
    crpci_loop_unlock(who->loop);
    c = zk_open(s);
    names = (zk_names *)calloc(1, sizeof *names);
    zk_children(c, PROVIDERS, names);
    for (i = 0; i < names->count; i++) {
        int64_t owner = 0;
        char path[1200];
        snprintf(path, sizeof path, "%s/%s", PROVIDERS, names->name[i]);
        zk_exists(c, path, &owner);
        fprintf(stderr, "node %s of session %llx\n", names->name[i], (unsigned long long)owner);
    }
    zk_close(c);
    free(names);
    fail_msg("%s is not registered by its session alone", address);
}

static void clear_directory(zk_client *c, const char *directory)
{
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    char path[1200];
    int i;
    zk_children(c, directory, names);
    for (i = 0; i < names->count; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names->name[i]);
        zk_delete(c, path);
    }
    zk_delete(c, directory);
    free(names);
}

static void clear_service(zk_client *c)
{
    clear_directory(c, PROVIDERS);
    clear_directory(c, OVERRIDES);
    clear_directory(c, CONSUMERS);
    zk_delete(c, SERVICE);
}

static void clean(const zk_server *s)
{
    zk_client *c = zk_open(s);
    clear_service(c);
    zk_delete(c, "/test");
    zk_close(c);
}

static void add_to(const zk_server *s, const char *directory, const char *name)
{
    char path[1200];
    zk_client *c = zk_open(s);
    size_t n = (size_t)snprintf(path, sizeof path, "%s/", directory);
    crpci_url_encode(path + n, sizeof path - n, name);
    zk_create(c, "/test", "", 0);
    zk_create(c, SERVICE, "", 0);
    zk_create(c, directory, "", 0);
    assert_int_equal(zk_create(c, path, "", 0), ZK_OK);
    zk_close(c);
}

static void remove_from(const zk_server *s, const char *directory, const char *name)
{
    char path[1200];
    zk_client *c = zk_open(s);
    size_t n = (size_t)snprintf(path, sizeof path, "%s/", directory);
    crpci_url_encode(path + n, sizeof path - n, name);
    assert_int_equal(zk_delete(c, path), ZK_OK);
    zk_close(c);
}

static void add_node(const zk_server *s, const char *name)
{
    add_to(s, PROVIDERS, name);
}

/* --- a provider in a process of its own, to be killed ------------------------------------------- */

static int provider_main(int port, const char *address)
{
    side s;
    char c;
    side_open(&s, port);
    side_enroll(&s, address);
    while (read(0, &c, 1) > 0) {
    }
    return 0;
}

static pid_t provider_start(int port, const char *address, int *input)
{
    static char self[] = "/proc/self/exe";
    char word[] = "provider", number[16], copy[64];
    char *argv[5];
    snprintf(number, sizeof number, "%d", port);
    snprintf(copy, sizeof copy, "%s", address);
    argv[0] = self;
    argv[1] = word;
    argv[2] = number;
    argv[3] = copy;
    argv[4] = NULL;
    return zk_spawn(argv, NULL, input);
}

/* --- tests: providers come and go --------------------------------------------------------------- */

static void it_registers_and_discovers(void **state)
{
    side a, b;
    int64_t owner = 0;
    zk_client *c;
    (void)state;
    clean(&server);
    side_open(&b, server.port);
    side_subscribe(&b); /* the directory does not exist yet */
    expect_list(&b, "", LATE_MS);
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    assert_true(only_owner(&server, "10.0.0.1:8000") == side_session(&a));
    c = zk_open(&server);
    assert_int_equal(zk_exists(c, PROVIDERS, &owner), ZK_OK);
    assert_true(owner == 0);
    zk_close(c);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 1), LATE_MS));
    ct_matrix(a.loop, "register-discover");
    side_close(&a);
    side_close(&b);
}

static void it_sees_a_new_provider_soon(void **state)
{
    side a, b, d;
    int64_t begin, best = INT64_MAX;
    int i;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.2:8000");
    expect_ok(&a, LATE_MS);
    side_open(&b, server.port);
    side_subscribe(&b);
    expect_list(&b, "10.0.0.2:8000 ", LATE_MS);
    side_open(&d, server.port);
    for (i = 0; i < 4; i++) {
        assert_int_equal(value(&b.pushes), 1 + 2 * i);
        begin = ct_now_ms();
        side_enroll(&d, "10.0.0.1:8000");
        expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
        best = ct_now_ms() - begin < best ? ct_now_ms() - begin : best;
        /* one that withdraws is gone as soon, and the other stays */
        begin = ct_now_ms();
        crpci_directory_withdraw(d.registry, d.reg);
        expect_list(&b, "10.0.0.2:8000 ", LATE_MS);
        best = ct_now_ms() - begin < best ? ct_now_ms() - begin : best;
    }
    print_message("seen after %d ms\n", (int)best);
    assert_true(best < SOON_MS);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 1), LATE_MS));
    ct_matrix(a.loop, "provider-added-withdrawn");
    side_close(&a);
    side_close(&d);
    side_close(&b);
}

static void it_notices_a_killed_provider(void **state)
{
    side a, b;
    int input;
    pid_t pid;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    side_open(&b, server.port);
    side_subscribe(&b);
    pid = provider_start(server.port, "10.0.0.2:8000", &input);
    expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    zk_kill(pid, SIGKILL);
    close(input);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    /* when the last one goes, it is kept: see the last good list */
    crpci_directory_close(a.registry);
    a.registry = NULL;
    assert_true(CT_WAIT(count_nodes(&server) == 0, LATE_MS));
    ct_sleep_ms(200);
    assert_true(side_has(&b, "10.0.0.1:8000 "));
    ct_matrix(b.loop, "provider-killed");
    side_close(&a);
    side_close(&b);
}

static void it_takes_over_its_own_stale_node(void **state)
{
    side b;
    int input;
    pid_t pid;
    int64_t first, second;
    (void)state;
    clean(&server);
    side_open(&b, server.port);
    side_subscribe(&b);
    pid = provider_start(server.port, "10.0.0.1:8000", &input);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    first = only_owner(&server, "10.0.0.1:8000");
    assert_true(first != 0);
    zk_kill(pid, SIGKILL);
    close(input);
    pid = provider_start(server.port, "10.0.0.1:8000", &input);
    /* exactly one node, of the new process, and it stays when the old session ends */
    assert_true(CT_WAIT((second = only_owner(&server, "10.0.0.1:8000")) != 0 && second != first, LATE_MS));
    ct_sleep_ms(TIMEOUT_MS * 3 / 2);
    assert_true(only_owner(&server, "10.0.0.1:8000") == second);
    assert_true(side_has(&b, "10.0.0.1:8000 "));
    ct_matrix(b.loop, "fast-restart");
    zk_kill(pid, SIGKILL);
    close(input);
    side_close(&b);
}

static void it_is_gone_at_once_when_closed(void **state)
{
    side a;
    int64_t begin, best = INT64_MAX;
    int i;
    (void)state;
    clean(&server);
    side_loop(&a, 1);
    for (i = 0; i < 3; i++) {
        a.status = -1;
        a.registry = open_registry(a.loop, server.port, NULL);
        side_enroll(&a, "10.0.0.1:8000");
        expect_ok(&a, LATE_MS);
        assert_int_equal(count_nodes(&server), 1);
        begin = ct_now_ms();
        crpci_directory_close(a.registry);
        best = ct_now_ms() - begin < best ? ct_now_ms() - begin : best;
        assert_int_equal(count_nodes(&server), 0);
    }
    print_message("closed after %d ms\n", (int)best);
    assert_true(best < 500);
    a.registry = NULL;
    ct_matrix(a.loop, "close-unregisters");
    side_close(&a);
}

/* Two live processes with one address: neither may drive the server mad. */
static void it_gives_up_against_a_live_twin(void **state)
{
    side a, b;
    crpci_zk_registration *reg;
    int rounds;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    side_open(&b, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    ct_sleep_ms(5); /* another timestamp */
    side_enroll(&b, "10.0.0.1:8000");
    expect_ok(&b, LATE_MS);
    /* b removes a's node, a is told, comes back and removes b's, which comes back: then both rest */
    assert_true(CT_WAIT(value(&a.told_ok) == 2 && value(&b.told_ok) == 2, LATE_MS));
    assert_true(CT_WAIT(count_nodes(&server) == 2, LATE_MS));
    reg = (crpci_zk_registration *)a.reg;
    crpci_loop_lock(a.loop);
    rounds = (int)reg->rounds;
    crpci_loop_unlock(a.loop);
    assert_true(rounds >= 1 && rounds <= (int)CRPCI_ZK_DIRECTORY_TWIN_ROUNDS);
    ct_matrix(a.loop, "live-twins");
    side_close(&a);
    side_close(&b);
}

/* The host was left open, and the way to the server changes. */
static void it_moves_with_its_address(void **state)
{
    side a, b;
    crpci_zk_session *z;
    crpci_zk_registration *reg;
    int i;
    (void)state;
    clean(&server);
    side_open(&b, server.port);
    side_subscribe(&b);
    side_open(&a, server.port);
    side_enroll(&a, ":8000");
    expect_list(&b, "127.0.0.1:8000 ", LATE_MS);
    reg = (crpci_zk_registration *)a.reg;
    z = reg->session;
    crpci_loop_lock(a.loop);
    assert_true(crpci_sock_parse(&z->servers.addr[0], "[::1]:1")); /* asked for the route only */
    crpci_loop_unlock(a.loop);
    for (i = 0; i < LATE_MS / 50 && !side_has(&b, "[::1]:8000 "); i++) {
        crpci_loop_lock(a.loop); /* the check that finds it, early */
        crpci_zk_node_own_check(&reg->own);
        crpci_zk_session_kick(z);
        crpci_loop_unlock(a.loop);
        ct_sleep_ms(50);
    }
    expect_list(&b, "[::1]:8000 ", LATE_MS);
    assert_int_equal(count_nodes(&server), 1);
    ct_matrix(a.loop, "address-moves");
    side_close(&a);
    side_close(&b);
}

static void it_takes_what_matches(void **state)
{
    side a, b, d;
    (void)state;
    clean(&server);
    add_node(&server, "dubbo://10.0.0.9:1/demo.Echo?interface=demo.Echo");
    add_node(&server, "crpc://10.0.0.8:1/demo.Echo?interface=demo.Echo&enabled=false");
    add_node(&server, "crpc://10.0.0.7:1/demo.Echo?interface=demo.Echo&group=g1&version=2.0");
    add_node(&server, "crpc://[::1]:1/demo.Echo?interface=demo.Echo&weight=7");
    add_node(&server, "no url at all");
    side_open(&a, server.port);
    side_subscribe(&a);
    expect_list(&a, "[::1]:1 ", LATE_MS);
    side_open(&b, server.port);
    side_subscribe_as(&b, "g1", "2.0");
    expect_list(&b, "10.0.0.7:1 ", LATE_MS);
    side_open(&d, server.port);
    side_subscribe_as(&d, "*", "*");
    expect_list(&d, "10.0.0.7:1 [::1]:1 ", LATE_MS);
    clean(&server);
    ct_matrix(a.loop, "group-version-scheme");
    side_close(&a);
    side_close(&b);
    side_close(&d);
}

/* --- tests: what an operator and people see ----------------------------------------------------- */

/* Weights are changed and providers switched off while a consumer watches, and back. */
static void it_obeys_overrides(void **state)
{
    static const char *const heavy =
        "override://0.0.0.0/demo.Echo?category=configurators&dynamic=false&enabled=true&weight=200";
    static const char *const off = "override://10.0.0.1:8000/demo.Echo?category=configurators"
                                   "&dynamic=false&enabled=true&disabled=true";
    static const char *const light = "override://10.0.0.2:8000/demo.Echo?weight=5";
    side a, b;
    int lines;
    (void)state;
    clean(&server);
    add_node(&server, "crpc://10.0.0.1:8000/demo.Echo?interface=demo.Echo&weight=10");
    add_node(&server, "crpc://10.0.0.2:8000/demo.Echo?interface=demo.Echo");
    side_open(&a, server.port);
    side_subscribe(&a);
    expect_list(&a, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    expect_weights(&a, "10 100 ");
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 0), LATE_MS)); /* though it is missing */
    add_to(&server, OVERRIDES, heavy);
    expect_weights(&a, "200 200 ");
    add_to(&server, OVERRIDES, light);
    expect_weights(&a, "200 5 ");
    lines = value(&logged);
    add_to(&server, OVERRIDES, "override://all/demo.Echo?weight=7");
    add_to(&server, OVERRIDES, "nonsense");
    add_to(&server, OVERRIDES, off);
    expect_list(&a, "10.0.0.2:8000 ", LATE_MS);
    expect_weights(&a, "5 ");
    assert_int_equal(value(&logged) - lines, 1);
    /* one that comes now does not see for a moment what is switched off */
    side_open(&b, server.port);
    side_subscribe(&b);
    expect_list(&b, "10.0.0.2:8000 ", LATE_MS);
    assert_int_equal(value(&b.pushes), 1);
    remove_from(&server, OVERRIDES, off);
    expect_list(&a, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    remove_from(&server, OVERRIDES, heavy);
    expect_weights(&a, "10 5 ");
    remove_from(&server, OVERRIDES, light);
    expect_weights(&a, "10 100 ");
    expect_weights(&b, "10 100 ");
    assert_false(value(&a.stale));
    ct_matrix(a.loop, "overrides");
    side_close(&a);
    side_close(&b);
    clean(&server);
}

/* An override that disables all providers counts, listed or kept; a list that is empty for another
 * reason does not. */
static void it_lets_an_operator_switch_the_last_provider_off(void **state)
{
    static const char *const off = "override://0.0.0.0/demo.Echo?disabled=true";
    side a, b;
    (void)state;
    clean(&server);
    add_node(&server, "crpc://10.0.0.1:8000/demo.Echo?interface=demo.Echo");
    side_open(&a, server.port);
    side_subscribe(&a);
    side_open(&b, server.port);
    side_subscribe_with(&b, NULL, NULL, true);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(2, 0), LATE_MS));
    add_to(&server, OVERRIDES, off);
    expect_list(&a, "", LATE_MS); /* protection does not overrule an operator */
    expect_list(&b, "", LATE_MS);
    assert_false(value(&a.stale));
    assert_false(value(&b.stale));
    remove_from(&server, OVERRIDES, off);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    /* what cannot be read may be a provider: not empty, for nobody */
    add_node(&server, "no url at all");
    remove_from(&server, PROVIDERS, "crpc://10.0.0.1:8000/demo.Echo?interface=demo.Echo");
    expect_stale(&a, 1);
    expect_stale(&b, 1);
    assert_true(side_has(&b, "10.0.0.1:8000 "));
    ct_matrix(a.loop, "allow-empty");
    side_close(&a);
    side_close(&b);
    clean(&server);
}

/* The name of the only consumer, decoded; "" if there is not one. */
static void only_consumer(char *out, size_t size)
{
    zk_client *c = zk_open(&server);
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    zk_children(c, CONSUMERS, names);
    snprintf(out, size, "%s", names->count == 1 ? names->name[0] : "");
    assert_true(crpci_url_decode(out));
    zk_close(c);
    free(names);
}

static bool consumer_is(const char *begin, int64_t *stamp)
{
    char name[1024], *at;
    only_consumer(name, sizeof name);
    at = strstr(name, "&timestamp=");
    *stamp = at ? strtoll(at + 11, NULL, 10) : 0;
    return strncmp(name, begin, strlen(begin)) == 0;
}

static void it_is_seen_among_the_consumers(void **state)
{
    char want[512];
    zk_proxy p;
    side a;
    int64_t stamp;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_subscribe_as(&a, "g1", "2.0");
    snprintf(want, sizeof want,
             "consumer://127.0.0.1/demo.Echo?application=tests&category=consumers&check=false"
             "&group=g1&interface=demo.Echo&pid=%ld&side=consumer&timestamp=",
             (long)getpid());
    add_node(&server, "crpc://10.0.0.1:8000/demo.Echo?interface=demo.Echo"); /* the service exists */
    assert_true(CT_WAIT(consumer_is(want, &stamp), LATE_MS));
    assert_true(stamp > 0);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(count_in(&server, CONSUMERS) == 0, LATE_MS)); /* expired */
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(consumer_is(want, &stamp), LATE_MS));
    crpci_directory_unsubscribe(a.registry, a.sub);
    assert_true(CT_WAIT(count_in(&server, CONSUMERS) == 0, LATE_MS));
    side_subscribe_as(&a, "g1", "2.0");
    assert_true(CT_WAIT(consumer_is(want, &stamp), LATE_MS));
    ct_matrix(a.loop, "consumers");
    side_close(&a);
    assert_true(CT_WAIT(count_in(&server, CONSUMERS) == 0, LATE_MS));
    zk_proxy_end(&p);
}

/* --- tests: servers and sessions go ------------------------------------------------------------- */

static void it_survives_a_restarted_server(void **state)
{
    zk_server s;
    side a, b, d;
    int64_t session;
    int lines;
    (void)state;
    zk_start(&s);
    session_ms = 10000; /* longer than a server takes to start */
    side_open(&a, s.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    side_open(&b, s.port);
    session_ms = TIMEOUT_MS;
    side_subscribe(&b);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    session = side_session(&a);
    lines = value(&logged);
    zk_crash(&s);
    ct_sleep_ms(TIMEOUT_MS / 2);
    assert_true(side_has(&b, "10.0.0.1:8000 "));
    assert_false(value(&b.stale)); /* a session outlasts this, and so do what others registered */
    zk_launch(&s);
    assert_true(CT_WAIT(side_session(&a) && side_session(&b), LATE_MS));
    assert_true(side_session(&a) == session);
    assert_true(value(&logged) - lines < 10);
    side_open(&d, s.port);
    side_enroll(&d, "10.0.0.2:8000");
    expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    assert_true(CT_WAIT(zk_watches(&s) == WATCHES(1, 2), LATE_MS));
    ct_matrix(a.loop, "server-restart");
    side_close(&a);
    side_close(&b);
    side_close(&d);
    zk_end(&s);
}

/* A server without its data refuses the sessions for ever and never calls them expired. */
static void it_survives_a_wiped_server(void **state)
{
    zk_server s;
    side a, b, d;
    int64_t begin, best = INT64_MAX;
    int i;
    (void)state;
    zk_start(&s);
    side_open(&a, s.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    side_open(&b, s.port);
    side_subscribe(&b);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    for (i = 0; i < 2; i++) {
        zk_crash(&s);
        zk_wipe(&s);
        zk_launch(&s);
        begin = ct_now_ms();
        assert_true(CT_WAIT(only_owner(&s, "10.0.0.1:8000") != 0, LATE_MS));
        assert_true(CT_WAIT(only_owner(&s, "10.0.0.1:8000") == side_session(&a), LATE_MS));
        assert_true(CT_WAIT(side_session(&b) && !value(&b.stale), LATE_MS));
        best = ct_now_ms() - begin < best ? ct_now_ms() - begin : best;
        assert_true(side_has(&b, "10.0.0.1:8000 "));
    }
    print_message("whole after %d ms\n", (int)best);
    assert_true(best < WHOLE_MS);
    side_open(&d, s.port);
    side_enroll(&d, "10.0.0.2:8000");
    expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    ct_matrix(a.loop, "server-wiped");
    side_close(&a);
    side_close(&b);
    side_close(&d);
    zk_end(&s);
}

static void it_survives_expiry(void **state)
{
    zk_proxy p;
    side a, d;
    int64_t before, after;
    int pushes;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_enroll(&a, "10.0.0.1:8000");
    side_subscribe(&a);
    expect_ok(&a, LATE_MS);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    before = side_session(&a);
    assert_true(only_owner(&server, "10.0.0.1:8000") == before);
    pushes = value(&a.pushes);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(count_nodes(&server) == 0, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT((after = only_owner(&server, "10.0.0.1:8000")) != 0, LATE_MS));
    assert_true(after != before);
    assert_true(CT_WAIT(side_session(&a) == after, LATE_MS));
    assert_true(CT_WAIT(value(&a.told_ok) == 2, LATE_MS));
    assert_true(side_has(&a, "10.0.0.1:8000 "));
    expect_stale(&a, 0);
    assert_int_equal(value(&a.pushes), pushes + 2); /* stale, and the same list again */
    side_open(&d, server.port);
    side_enroll(&d, "10.0.0.2:8000");
    expect_list(&a, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    ct_matrix(a.loop, "expired");
    side_close(&a);
    side_close(&d);
    zk_proxy_end(&p);
}

/* Nobody steps the loop, as with a program that calls once an hour. The single-threaded client lives
 * in the loop and cannot do without. */
static void it_works_on_a_loop_that_rests(void **state)
{
    zk_proxy p;
    side a, d;
    int64_t after;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_loop(&a, CRPC_ZOOKEEPER_ST);
    a.registry = open_registry(a.loop, p.port, NULL);
    side_enroll(&a, "10.0.0.1:8000");
    side_subscribe(&a);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    side_open(&d, server.port);
    side_enroll(&d, "10.0.0.2:8000");
    expect_list(&a, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    crpci_directory_withdraw(d.registry, d.reg);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(count_nodes(&server) == 0, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT((after = only_owner(&server, "10.0.0.1:8000")) != 0, LATE_MS));
    side_enroll(&d, "10.0.0.3:8000");
    expect_list(&a, "10.0.0.1:8000 10.0.0.3:8000 ", LATE_MS);
    ct_matrix(a.loop, "resting-loop");
    side_close(&a);
    side_close(&d);
    zk_proxy_end(&p);
}

/* The connection is gone, and it is a request that finds out, not the wait for input. */
static void it_notices_a_loss_when_it_sends(void **state)
{
    int64_t until;
    zk_proxy p;
    side a;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_loop(&a, 0);
    a.registry = open_registry(a.loop, p.port, NULL);
    side_enroll(&a, "10.0.0.1:8000");
    until = ct_now_ms() + LATE_MS;
    while (value(&a.status) != CRPC_OK && ct_now_ms() < until)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    expect_ok(&a, 0);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    side_subscribe(&a);
    ct_sleep_ms(5); /* so that it is due, and sent, before the step looks at the descriptors */
    until = ct_now_ms() + LATE_MS;
    while (side_session(&a) && ct_now_ms() < until)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    assert_true(side_session(&a) == 0);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    until = ct_now_ms() + LATE_MS;
    while (!side_has(&a, "10.0.0.1:8000 ") && ct_now_ms() < until)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    expect_list(&a, "10.0.0.1:8000 ", 0);
    ct_matrix(a.loop, "loss-found-by-sending");
    side_close(&a);
    zk_proxy_end(&p);
}

/* Nobody drove the loop when the connection was reset, and a ping is the first to find out. */
static void it_notices_a_loss_when_it_pings(void **state)
{
    int64_t until;
    zk_proxy p;
    side a;
    int steps = 0;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_loop(&a, 0);
    session_ms = 6000;
    a.registry = open_registry(a.loop, p.port, NULL);
    session_ms = TIMEOUT_MS;
    side_enroll(&a, "10.0.0.1:8000");
    until = ct_now_ms() + LATE_MS;
    while (value(&a.status) != CRPC_OK && ct_now_ms() < until)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    expect_ok(&a, 0);
    until = ct_now_ms() + 300; /* what is under way has to be answered, else there is no ping */
    while (ct_now_ms() < until)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    ct_sleep_ms(2300); /* over a third of the timeout, under two */
    for (; side_session(&a) && steps < 50; steps++)
        assert_int_equal(crpc_loop_step(a.loop, 20), CRPC_OK);
    assert_true(side_session(&a) == 0);
    ct_matrix(a.loop, "loss-found-by-pinging");
    side_close(&a);
    zk_proxy_end(&p);
}

/* A consumer that had no memory for a list is offered it again. */
static void it_offers_a_list_again(void **state)
{
    side a;
    (void)state;
    clean(&server);
    add_node(&server, "crpc://10.0.0.8:1/demo.Echo?interface=demo.Echo");
    side_loop(&a, 1);
    a.refuse_pushes = 2;
    a.registry = open_registry(a.loop, server.port, NULL);
    side_subscribe(&a);
    expect_list(&a, "10.0.0.8:1 ", LATE_MS);
    ct_matrix(a.loop, "list-not-taken");
    side_close(&a);
    clean(&server);
}

/* Waits until a side has given its session up; after how many milliseconds, -1: it has not. */
static int64_t given_up_after(side *s, int ms)
{
    crpci_zk_session *z = ((crpci_zk_directory *)(void *)s->registry)->session;
    int64_t begin = ct_now_ms();
    while (ct_now_ms() - begin < ms) {
        bool given_up;
        crpci_loop_lock(s->loop);
        given_up = z->phase == CRPCI_ZK_ABSENT || z->phase == CRPCI_ZK_STARTING;
        crpci_loop_unlock(s->loop);
        if (given_up)
            return ct_now_ms() - begin;
        ct_sleep_ms(2);
    }
    return -1;
}

/* Connections are accepted, and closed before there is a session: three of them, and the session is
 * not known there any more. */
static void it_gives_up_a_session_that_is_refused(void **state)
{
    zk_proxy p;
    side a;
    int64_t before, took;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    session_ms = 4000;
    side_open(&a, p.port);
    session_ms = TIMEOUT_MS;
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    before = side_session(&a);
    zk_proxy_set(&p, ZK_PROXY_CLOSE);
    took = given_up_after(&a, LATE_MS);
    if (took < 4000 || took > 7000) /* the session lives for 4000; the watchdog takes 8000 */
        fail_msg("given up after %d ms", (int)took);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) != 0, LATE_MS));
    assert_true(side_session(&a) != before);
    assert_true(CT_WAIT(only_owner(&server, "10.0.0.1:8000") == side_session(&a), LATE_MS));
    ct_matrix(a.loop, "refused-session");
    side_close(&a);
    zk_proxy_end(&p);
}

/* A load balancer accepts and closes for almost as long as the session lives: then the session goes
 * on, and with it the node of a living provider. */
static void a_living_session_outlasts_refusals(void **state)
{
    zk_proxy p;
    side a;
    int64_t before;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    session_ms = 10000;
    side_open(&a, p.port);
    session_ms = TIMEOUT_MS;
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    before = side_session(&a);
    zk_proxy_set(&p, ZK_PROXY_CLOSE);
    assert_int_equal(given_up_after(&a, 8000), -1);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) != 0, LATE_MS));
    assert_true(side_session(&a) == before);
    assert_true(only_owner(&server, "10.0.0.1:8000") == before);
    ct_matrix(a.loop, "refused-for-a-while");
    side_close(&a);
    zk_proxy_end(&p);
}

/* No server says that the session has expired, because none is there. */
static void it_gives_up_a_session_that_is_lost_too_long(void **state)
{
    zk_proxy p;
    side a;
    int64_t took;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    took = given_up_after(&a, LATE_MS);
    if (took < TIMEOUT_MS * 2 - 100)
        fail_msg("given up after %d ms", (int)took);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) && only_owner(&server, "10.0.0.1:8000") == side_session(&a),
                        LATE_MS));
    ct_matrix(a.loop, "watchdog");
    side_close(&a);
    zk_proxy_end(&p);
}

/* Closing meets the client at every point of replacing a session; nothing runs on after it. */
static void it_may_be_closed_while_it_replaces_its_session(void **state)
{
    zk_proxy p;
    side last;
    int i;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    for (i = 0; i < 8; i++) {
        side a;
        session_ms = 400;
        side_open(&a, p.port);
        session_ms = TIMEOUT_MS;
        side_enroll(&a, "10.0.0.1:8000");
        side_subscribe(&a);
        expect_ok(&a, LATE_MS);
        zk_proxy_set(&p, ZK_PROXY_REFUSE);
        assert_true(given_up_after(&a, LATE_MS) > 0);
        if (i % 2)
            zk_proxy_set(&p, ZK_PROXY_OPEN);
        ct_sleep_ms((int)(ct_random() % 40) * (i % 3));
        side_close(&a);
        assert_int_equal(ct_alloc_of_test()->live_blocks, 0);
        zk_proxy_set(&p, ZK_PROXY_OPEN);
    }
    side_loop(&last, 0);
    ct_matrix(last.loop, "close-while-replacing");
    side_close(&last);
    zk_proxy_end(&p);
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

/* The host loses its IPv4 address and keeps an IPv6 one, as when a lease ends; only loopback is left
 * to reach the server by. Run by netns.sh, in a network of its own. */
static void it_outlives_its_ipv4_address(void **state)
{
    zk_proxy p;
    side a;
    double cpu;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    assert_int_equal(system("ip addr del 10.77.0.1/24 dev crpc0"), 0);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    cpu = cpu_seconds();
    assert_true(given_up_after(&a, LATE_MS) > 0); /* the watchdog is at work */
    ct_sleep_ms(1000);
    cpu = cpu_seconds() - cpu;
    if (cpu > 1)
        fail_msg("%.2f s of processor time", cpu);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) != 0, LATE_MS));
    assert_true(CT_WAIT(only_owner(&server, "10.0.0.1:8000") == side_session(&a), LATE_MS));
    side_close(&a);
    zk_proxy_end(&p);
}

/* Behind a wall that swallows everything, for longer than the watchdog waits: a new session when it
 * opens; meanwhile no noise and no load. */
static void it_survives_a_long_outage(void **state)
{
    zk_proxy p;
    side a;
    int64_t before;
    double cpu;
    int lines;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_enroll(&a, "10.0.0.1:8000");
    side_subscribe(&a);
    expect_ok(&a, LATE_MS);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    before = side_session(&a);
    lines = value(&logged);
    cpu = cpu_seconds();
    zk_proxy_set(&p, ZK_PROXY_STALL);
    ct_sleep_ms(TIMEOUT_MS * 4);
    cpu = cpu_seconds() - cpu;
    if (cpu > 0.1 * TIMEOUT_MS * 4 / 1000)
        fail_msg("%.2f s of processor time in an outage of %d ms", cpu, TIMEOUT_MS * 4);
    if (value(&logged) - lines > 8)
        fail_msg("%d lines in an outage", value(&logged) - lines);
    assert_true(side_has(&a, "10.0.0.1:8000 "));
    assert_true(value(&a.stale));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) != 0, LATE_MS));
    assert_true(side_session(&a) != before);
    assert_true(CT_WAIT(only_owner(&server, "10.0.0.1:8000") == side_session(&a), LATE_MS));
    expect_stale(&a, 0);
    ct_matrix(a.loop, "long-outage");
    side_close(&a);
    zk_proxy_end(&p);
}

static void it_survives_a_frozen_server(void **state)
{
    zk_server s;
    side a, b, d;
    int64_t begin, took;
    (void)state;
    zk_start(&s);
    side_open(&a, s.port);
    side_enroll(&a, "10.0.0.1:8000");
    side_open(&b, s.port);
    side_subscribe(&b);
    expect_ok(&a, LATE_MS);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    zk_freeze(&s);
    ct_sleep_ms(TIMEOUT_MS * 2);
    assert_true(side_has(&b, "10.0.0.1:8000 "));
    zk_thaw(&s);
    expect_own_node(&a, &s, "10.0.0.1:8000");
    side_open(&d, s.port);
    side_enroll(&d, "10.0.0.2:8000");
    expect_list(&b, "10.0.0.1:8000 10.0.0.2:8000 ", LATE_MS);
    /* closing against a frozen server is bounded */
    zk_freeze(&s);
    begin = ct_now_ms();
    side_close(&d);
    took = ct_now_ms() - begin;
    if (took > 5000)
        fail_msg("closing took %lld ms", (long long)took);
    zk_thaw(&s);
    ct_matrix(a.loop, "server-frozen");
    side_close(&a);
    side_close(&b);
    zk_end(&s);
}

static void it_waits_for_a_server_that_starts_late(void **state)
{
    zk_server s;
    side a, b;
    (void)state;
    zk_start(&s);
    zk_crash(&s);
    side_open(&a, s.port);
    side_enroll(&a, "10.0.0.1:8000");
    side_open(&b, s.port);
    side_subscribe(&b);
    ct_sleep_ms(2500);
    assert_int_equal(value(&b.pushes), 0);
    assert_int_equal(value(&a.status), -1);
    zk_launch(&s);
    expect_ok(&a, LATE_MS);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    ct_matrix(a.loop, "late-server");
    side_close(&a);
    side_close(&b);
    zk_end(&s);
}

/* A program begins while no server is there, with what an earlier one knew. */
static void it_starts_from_its_cache(void **state)
{
    static const char *const off = "override://10.0.0.3:8000/demo.Echo?disabled=true";
    ct_dir dir = ct_dir_make();
    char path[128];
    zk_proxy p;
    side a, b;
    (void)state;
    clean(&server);
    snprintf(path, sizeof path, "%s/cache", dir.path);
    zk_proxy_start(&p, server.port);
    add_node(&server, "crpc://10.0.0.1:8000/demo.Echo?interface=demo.Echo");
    add_node(&server, "crpc://10.0.0.2:8000/demo.Echo?interface=demo.Echo&group=g");
    add_node(&server, "crpc://10.0.0.3:8000/demo.Echo?interface=demo.Echo");
    add_to(&server, OVERRIDES, off);
    cache = path;
    side_open(&a, p.port);
    side_subscribe(&a);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    if (!CRPC_ZOOKEEPER_ST) /* there closing syncs it, or the loop half a minute later */
        assert_true(CT_WAIT(access(path, F_OK) == 0, LATE_MS));
    side_close(&a);
    assert_int_equal(access(path, F_OK), 0);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    side_open(&a, p.port);
    side_subscribe(&a);
    assert_int_equal(value(&a.pushes), 1); /* at once */
    assert_true(side_has(&a, "10.0.0.1:8000 "));
    assert_true(value(&a.stale));
    side_open(&b, p.port);
    side_subscribe_as(&b, "g", NULL);
    assert_true(side_has(&b, "10.0.0.2:8000 "));
    add_node(&server, "crpc://10.0.0.4:8000/demo.Echo?interface=demo.Echo");
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    expect_list(&a, "10.0.0.1:8000 10.0.0.4:8000 ", LATE_MS);
    expect_stale(&a, 0);
    expect_stale(&b, 0);
    ct_matrix(a.loop, "cache");
    side_close(&a);
    side_close(&b);
    cache = NULL;
    zk_proxy_end(&p);
    ct_dir_remove(dir);
    clean(&server);
}

/* --- tests: sharing, closing, rights ------------------------------------------------------------ */

static void it_shares_one_session(void **state)
{
    side a;
    crpci_backend *more[9];
    crpci_names_service q;
    crpci_subscriber *handles[9];
    side others[9];
    int i;
    (void)state;
    clean(&server);
    assert_true(CT_WAIT(zk_connections(&server) == 0, LATE_MS));
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    for (i = 0; i < 9; i++) {
        more[i] = open_registry(a.loop, server.port, NULL);
        memset(&others[i], 0, sizeof others[i]);
        pthread_mutex_init(&others[i].lock, NULL);
        memset(&q, 0, sizeof q);
        q.service = "demo.Echo";
        q.group = i % 2 ? "*" : NULL;
        assert_int_equal(crpci_directory_subscribe(more[i], &q, on_push, &others[i], &handles[i]),
                         CRPC_OK);
    }
    for (i = 0; i < 9; i++)
        expect_list(&others[i], "10.0.0.1:8000 ", LATE_MS);
    assert_int_equal(zk_connections(&server), 1);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 1), LATE_MS));
    assert_true(CT_WAIT(count_in(&server, CONSUMERS) == 9, LATE_MS));
    assert_true(a.loop->registries.next->next == &a.loop->registries);
    for (i = 0; i < 9; i++) {
        if (i % 3)
            crpci_directory_unsubscribe(more[i], handles[i]);
        crpci_directory_close(more[i]); /* ends the rest */
        pthread_mutex_destroy(&others[i].lock);
    }
    assert_true(CT_WAIT(count_in(&server, CONSUMERS) == 0, LATE_MS));
    assert_true(only_owner(&server, "10.0.0.1:8000") == side_session(&a));
    ct_matrix(a.loop, "shared-session");
    side_close(&a);
}

static void it_may_be_closed_in_its_callbacks(void **state)
{
    side a, b, d;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    side_open(&b, server.port);
    b.unsubscribe_in_push = 1;
    side_subscribe(&b);
    assert_true(CT_WAIT(value(&b.pushes) == 1, LATE_MS));
    side_open(&d, server.port);
    d.close_in_push = 1;
    side_subscribe(&d);
    assert_true(CT_WAIT(value(&d.pushes) == 1, LATE_MS));
    assert_true(CT_WAIT(zk_connections(&server) <= 2, LATE_MS));
    side_close(&d);
    side_loop(&d, 1);
    d.registry = open_registry(d.loop, server.port, NULL);
    d.withdraw_in_status = 1;
    side_enroll(&d, "10.0.0.2:8000");
    assert_true(CT_WAIT(value(&d.status) == CRPC_OK, LATE_MS));
    assert_true(CT_WAIT(count_nodes(&server) == 1, LATE_MS));
    ct_matrix(a.loop, "close-in-callback");
    side_close(&a);
    side_close(&b);
    side_close(&d);
    /* a handle closed in its callback frees itself when its thread ends */
    assert_true(CT_WAIT(ct_alloc_of_test()->live_blocks == 0, LATE_MS));
}

/* unsubscribe waits for a callback that runs on another thread. */
static void it_waits_for_a_running_callback(void **state)
{
    side a;
    int i;
    (void)state;
    clean(&server);
    for (i = 0; i < 5; i++) {
        side_open(&a, server.port);
        a.slow_push_ms = 150;
        side_subscribe(&a);
        assert_true(CT_WAIT(value(&a.in_push), LATE_MS));
        if (i % 2)
            crpci_directory_unsubscribe(a.registry, a.sub);
        else
            crpci_directory_close(a.registry);
        assert_int_equal(value(&a.in_push), 0);
        assert_int_equal(value(&a.pushes), 1);
        if (i % 2 == 0)
            a.registry = NULL;
        ct_matrix(a.loop, "close-beside-callback");
        side_close(&a);
    }
}

static void it_uses_its_credential(void **state)
{
    /* base64(sha1("crpc:secret")) */
    static const char id[] = "crpc:FJyY554p+37oqvtpy+Mxgpdxwpw=";
    side a, b;
    zk_client *c;
    (void)state;
    clean(&server);
    c = zk_open(&server);
    assert_int_equal(zk_create(c, "/test", "", 0), ZK_OK);
    assert_int_equal(zk_create(c, "/test/demo.Echo", "", 0), ZK_OK);
    assert_int_equal(zk_create_as(c, PROVIDERS, "", 0, id), ZK_OK);
    side_open(&b, server.port);
    side_enroll(&b, "10.0.0.2:8000");
    assert_true(CT_WAIT(value(&b.status) == CRPC_EAUTH, LATE_MS));
    side_loop(&a, 1);
    a.registry = open_registry(a.loop, server.port, "crpc:secret");
    side_subscribe(&a);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    expect_list(&a, "10.0.0.1:8000 ", LATE_MS);
    ct_matrix(a.loop, "credential");
    side_close(&b);
    side_close(&a);
    zk_delete(c, PROVIDERS); /* its parent allows it */
    zk_close(c);
    clean(&server);
}

/* The directory is deleted under a consumer, and made again. */
static void it_survives_a_deleted_directory(void **state)
{
    side a, b;
    int64_t owner;
    zk_client *c;
    (void)state;
    clean(&server);
    side_open(&b, server.port);
    side_subscribe(&b);
    expect_list(&b, "", LATE_MS);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 0), LATE_MS)); /* for what may come */
    c = zk_open(&server);
    assert_int_equal(zk_exists(c, PROVIDERS, &owner), ZK_NONODE); /* a consumer makes none */
    zk_create(c, "/test", "", 0);
    zk_create(c, SERVICE, "", 0);
    assert_int_equal(zk_create(c, PROVIDERS, "", 0), ZK_OK);
    assert_int_equal(zk_create(c, OVERRIDES, "", 0), ZK_OK);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 0), LATE_MS));
    clear_service(c);
    assert_int_equal(zk_exists(c, PROVIDERS, &owner), ZK_NONODE);
    assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 0), LATE_MS));
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    zk_close(c);
    ct_matrix(b.loop, "directory-deleted");
    side_close(&a);
    side_close(&b);
}

/* An operator deletes the whole tree under a provider and a consumer that live on. */
static void it_comes_back_when_its_tree_is_deleted(void **state)
{
    int64_t begin, best = INT64_MAX;
    zk_client *c;
    side a, b;
    int i;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    side_open(&b, server.port);
    side_subscribe(&b);
    expect_list(&b, "10.0.0.1:8000 ", LATE_MS);
    for (i = 0; i < 3; i++) {
        assert_true(CT_WAIT(zk_watches(&server) == WATCHES(1, 1), LATE_MS));
        c = zk_open(&server);
        begin = ct_now_ms();
        clear_service(c);
        zk_delete(c, "/test");
        zk_close(c);
        expect_stale(&b, 1);
        assert_true(CT_WAIT(only_owner(&server, "10.0.0.1:8000") == side_session(&a), LATE_MS));
        expect_stale(&b, 0);
        assert_true(side_has(&b, "10.0.0.1:8000 "));
        best = ct_now_ms() - begin < best ? ct_now_ms() - begin : best;
    }
    print_message("whole after %d ms\n", (int)best);
    assert_true(best < WHOLE_MS);
    ct_matrix(b.loop, "tree-deleted");
    side_close(&a);
    side_close(&b);
}

/* Many changes at once end in the right list, and do not cost a read each. */
static void it_follows_a_burst(void **state)
{
    side b, a[12];
    char want[512] = "", address[32];
    int i;
    (void)state;
    clean(&server);
    side_open(&b, server.port);
    side_subscribe(&b);
    expect_list(&b, "", LATE_MS);
    for (i = 0; i < 12; i++) {
        snprintf(address, sizeof address, "10.0.0.%d:8000", 10 + i);
        snprintf(want + strlen(want), sizeof want - strlen(want), "%s ", address);
        side_loop(&a[i], 1);
        a[i].registry = open_registry(a[i].loop, server.port, NULL);
        side_enroll(&a[i], address);
    }
    expect_list(&b, want, LATE_MS);
    assert_true(value(&b.pushes) <= 14);
    for (i = 0; i < 12; i++)
        side_close(&a[i]);
    ct_sleep_ms(100);
    assert_false(side_has(&b, "")); /* the last good one stays */
    ct_matrix(b.loop, "burst");
    side_close(&b);
}

/* Whether every thread but this one blocks what a program might handle. */
static bool others_block_signals(void)
{
    char path[64], line[256];
    bool all = true;
    struct dirent *e;
    DIR *tasks = opendir("/proc/self/task");
    while ((e = readdir(tasks)) != NULL) {
        unsigned long long blocked = 0;
        FILE *f;
        snprintf(path, sizeof path, "/proc/self/task/%.20s/status", e->d_name);
        f = e->d_name[0] == '.' || atoi(e->d_name) == (int)getpid() ? NULL : fopen(path, "r");
        while (f && fgets(line, sizeof line, f))
            sscanf(line, "SigBlk: %llx", &blocked);
        if (f)
            fclose(f);
        if (f && (!(blocked >> (SIGTERM - 1) & 1) || !(blocked >> (SIGUSR1 - 1) & 1) ||
                  !(blocked >> (SIGPIPE - 1) & 1) || !(blocked >> (SIGALRM - 1) & 1)))
            all = false;
    }
    closedir(tasks);
    return all;
}

static int fds_for_exec(void)
{
    int fd, n = 0;
    for (fd = 3; fd < 256; fd++) {
        int flags = fcntl(fd, F_GETFD);
        n += flags >= 0 && !(flags & FD_CLOEXEC);
    }
    return n;
}

/* No signal lands on the client's threads, nothing is printed, and of descriptors only those that
 * libzookeeper_mt hides would be inherited. */
static void it_leaves_the_process_alone(void **state)
{
    zk_proxy p;
    side a;
    ct_dir dir = ct_dir_make();
    char path[80];
    int before = fds_for_exec(), keep = dup(2), fd;
    struct stat st;
    (void)state;
    clean(&server);
    snprintf(path, sizeof path, "%s/stderr", dir.path);
    fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    fcntl(keep, F_SETFD, FD_CLOEXEC);
    dup2(fd, 2);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    side_enroll(&a, "10.0.0.1:8000");
    expect_ok(&a, LATE_MS);
    assert_true(others_block_signals());
    assert_true(fds_for_exec() - before <= (CRPC_ZOOKEEPER_ST ? 0 : 3));
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    ct_sleep_ms(300);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(side_session(&a) != 0, LATE_MS));
    assert_true(fds_for_exec() - before <= (CRPC_ZOOKEEPER_ST ? 0 : 3));
    ct_matrix(a.loop, "process-left-alone");
    side_close(&a);
    zk_proxy_end(&p);
    dup2(keep, 2);
    close(keep);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_size, 0);
    close(fd);
    ct_dir_remove(dir);
}

/* Every allocation fails once, and then all after it: an error or a later success, never a leak, a
 * crash or a hang. */
static int sweep(const crpc_hooks *hooks, void *user)
{
    crpc_loop_options o;
    crpci_directory_options ro;
    crpci_names_service what;
    crpci_names_service q;
    crpci_backend *r = NULL;
    crpc_loop *loop;
    char text[64];
    crpci_subscriber *sub = NULL;
    void *reg = NULL;
    int err;
    side *s = (side *)user;
    memset(&o, 0, sizeof o);
    memset(&ro, 0, sizeof ro);
    memset(&q, 0, sizeof q);
    memset(&what, 0, sizeof what);
    q.service = "demo.Echo";
    ro.register_consumer = true;
    o.poller = ct_poller();
    o.hooks = *hooks;
    o.hooks.log_level = -1;
    ro.session_timeout_ms = TIMEOUT_MS;
    s->pushes = 0;
    s->status = -1;
    err = crpc_loop_open(&loop, &o);
    if (err)
        return err;
    if (crpc_loop_start(loop))
        fail_msg("no thread");
    snprintf(text, sizeof text, "zookeeper://127.0.0.1:%d/test", server.port);
    err = crpci_open_registry(loop, text, &ro, &r, NULL);
    if (!err)
        err = crpci_directory_subscribe(r, &q, on_push, s, &sub);
    what.service = "demo.Echo";
    what.address = "10.0.0.1:8000";
    if (!err)
        err = crpci_directory_enroll(r, &what, on_status, s, &reg);
    if (!err)
        (void)CT_WAIT(value(&s->pushes) && value(&s->status) == CRPC_OK, 20);
    if (!err)
        crpci_directory_withdraw(r, reg);
    crpci_directory_close(r);
    crpc_loop_close(loop);
    return err;
}

static void it_survives_want_of_memory(void **state)
{
    side s;
    (void)state;
    clean(&server);
    memset(&s, 0, sizeof s);
    pthread_mutex_init(&s.lock, NULL);
    assert_true(ct_sweep(sweep, &s) > 20);
    side_loop(&s, 0);
    ct_matrix(s.loop, "out-of-memory");
    crpc_loop_close(s.loop);
    pthread_mutex_destroy(&s.lock);
}

int main(int argc, char **argv)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_registers_and_discovers),
        CT_TEST(it_sees_a_new_provider_soon),
        CT_TEST(it_notices_a_killed_provider),
        CT_TEST(it_takes_over_its_own_stale_node),
        CT_TEST(it_is_gone_at_once_when_closed),
        CT_TEST(it_gives_up_against_a_live_twin),
        CT_TEST(it_moves_with_its_address),
        CT_TEST(it_takes_what_matches),
        CT_TEST(it_obeys_overrides),
        CT_TEST(it_lets_an_operator_switch_the_last_provider_off),
        CT_TEST(it_is_seen_among_the_consumers),
        CT_TEST(it_survives_a_restarted_server),
        CT_TEST(it_survives_a_wiped_server),
        CT_TEST(it_survives_expiry),
        CT_TEST(it_works_on_a_loop_that_rests),
        CT_TEST(it_notices_a_loss_when_it_sends),
        CT_TEST(it_notices_a_loss_when_it_pings),
        CT_TEST(it_offers_a_list_again),
        CT_TEST(it_gives_up_a_session_that_is_refused),
        CT_TEST(a_living_session_outlasts_refusals),
        CT_TEST(it_gives_up_a_session_that_is_lost_too_long),
        CT_TEST(it_may_be_closed_while_it_replaces_its_session),
        CT_TEST(it_survives_a_long_outage),
        CT_TEST(it_survives_a_frozen_server),
        CT_TEST(it_waits_for_a_server_that_starts_late),
        CT_TEST(it_starts_from_its_cache),
        CT_TEST(it_shares_one_session),
        CT_TEST(it_may_be_closed_in_its_callbacks),
        CT_TEST(it_waits_for_a_running_callback),
        CT_TEST(it_uses_its_credential),
        CT_TEST(it_survives_a_deleted_directory),
        CT_TEST(it_comes_back_when_its_tree_is_deleted),
        CT_TEST(it_follows_a_burst),
        CT_TEST(it_leaves_the_process_alone),
        CT_TEST(it_survives_want_of_memory),
    };
    static const struct CMUnitTest apart[] = {CT_TEST(it_outlives_its_ipv4_address)};
    int failed;
    if (argc == 4 && strcmp(argv[1], "provider") == 0)
        return provider_main(atoi(argv[2]), argv[3]);
    zk_start(&server);
    failed = getenv("CRPC_TEST_NETNS") ? CT_RUN(apart) : CT_RUN(tests);
    zk_end(&server);
    return failed;
}
