/* Nodes, configuration, locks and elections against a real ZooKeeper: what each promises when
 * connections, sessions, servers and processes go.
 * crpc-test-timeout: 600 */
#define CRPC_IMPLEMENTATION
#include "../../crpc.h"
#define CT_TEST_SECONDS 180 /* a busy machine starts a server slowly */
#include "../crpc_test.h"
#include "../crpc_zk.h"

#include <sys/file.h>

#define TIMEOUT_MS 1000 /* of sessions */
#define LATE_MS 20000   /* nothing but a fault takes longer */

static zk_server server; /* shared by the tests that leave it in order */

/* --- one side: a loop with a thread of its own, and a registry on it ---------------------------- */

typedef struct side {
    crpc_loop *loop;
    crpc_registry *registry;
    pthread_mutex_t lock;
    /* all of these atomic, or under the lock */
    int states[4];    /* how often each was told */
    int64_t sessions[16];
    int session_count;
    int done;         /* operations that called back */
    int status;       /* of the last */
    int sent;         /* of the last */
    uint64_t thread;  /* on which */
    char value[256];  /* of the configuration: "-" if it does not exist */
    int version;
    int changes;
    int backwards;    /* times the version went back while the node stayed */
    int close_in_callback;
    crpc_lock *mutex;
    crpc_election *election;
} side;

static int value(int *p)
{
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

static void add(int *p)
{
    __atomic_add_fetch(p, 1, __ATOMIC_SEQ_CST);
}

static void side_log(void *user, int level, const char *line)
{
    (void)user, (void)level;
    if (getenv("CRPC_TEST_VERBOSE"))
        printf("%lld %s\n", (long long)ct_now_ms() % 1000000, line);
}

static void on_state(void *user, crpc_registry_state state, int64_t session)
{
    side *s = (side *)user;
    pthread_mutex_lock(&s->lock);
    if (state == CRPC_REGISTRY_CONNECTED && s->session_count < 16)
        s->sessions[s->session_count++] = session;
    pthread_mutex_unlock(&s->lock);
    add(&s->states[state]);
}

static void side_loop(side *s, int drive)
{
    crpc_loop_options o;
    memset(s, 0, sizeof *s);
    memset(&o, 0, sizeof o);
    pthread_mutex_init(&s->lock, NULL);
    o.poller = ct_poller();
    o.hooks = ct_hooks();
    o.hooks.log = side_log;
    o.hooks.log_level = CRPC_LOG_DEBUG;
    assert_int_equal(crpc_loop_open(&s->loop, &o), CRPC_OK);
    if (drive)
        assert_int_equal(crpc_loop_start(s->loop), CRPC_OK);
}

static crpc_registry *open_registry(side *s, int port, int timeout_ms)
{
    crpc_registry_options o;
    crpc_registry *r;
    crpc_error error;
    char url[64];
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = timeout_ms;
    o.on_state = on_state;
    o.user = s;
    o.must_connect = 1;
    o.registry_timeout_ms = LATE_MS;
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d/test", port);
    if (crpc_registry_open(&r, s->loop, url, &o, &error))
        fail_msg("open: %s", error.text);
    return r;
}

static void side_open_with(side *s, int port, int timeout_ms)
{
    side_loop(s, 1);
    s->registry = open_registry(s, port, timeout_ms);
}

static void side_open(side *s, int port)
{
    side_open_with(s, port, TIMEOUT_MS);
}

static void side_close(side *s)
{
    crpc_lock_close(s->mutex);
    crpc_election_close(s->election);
    crpc_registry_close(s->registry);
    crpc_loop_close(s->loop);
    pthread_mutex_destroy(&s->lock);
}

static int call(side *s, crpc_node_op op, crpc_node *out)
{
    return crpc_registry_call(s->registry, &op, 1, LATE_MS, out);
}

/* Whether a request of the session is with the client: the single-threaded one is given it by the
 * thread that drives the loop, a moment later. */
static bool under_way(side *s)
{
    crpci_zk_session *z = s->registry->session;
    crpci_list *i;
    bool found = false;
    crpci_loop_lock(s->loop);
    for (i = z->jobs.next; i != &z->jobs; i = i->next)
        found = found || CRPCI_CONTAINER(i, crpci_zk_job, node)->sent;
    crpci_loop_unlock(s->loop);
    return found;
}

static crpc_view text(const char *t)
{
    return crpc_view_str(t);
}

/* --- the server, looked at by other eyes -------------------------------------------------------- */

static void remove_all(zk_client *c, const char *path)
{
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    char below[2048];
    int i;
    zk_children(c, path, names);
    for (i = 0; i < names->count; i++) {
        snprintf(below, sizeof below, "%s/%s", path, names->name[i]);
        remove_all(c, below);
    }
    zk_delete(c, path);
    free(names);
}

static void clean(const zk_server *s)
{
    zk_client *c = zk_open(s);
    remove_all(c, "/test");
    zk_close(c);
}

static int count_children(const zk_server *s, const char *path)
{
    zk_client *c = zk_open(s);
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    int n;
    zk_children(c, path, names);
    n = names->count;
    zk_close(c);
    free(names);
    return n;
}

static int set_data(zk_client *c, const char *path, const char *data)
{
    zk_request(c, 5);
    zk_put_text(c, path);
    zk_put_text(c, data);
    zk_put_int(c, -1);
    return zk_answer(c);
}

/* --- tests: operations -------------------------------------------------------------------------- */

static void it_makes_nodes_of_all_four_kinds(void **state)
{
    side a;
    crpc_node n;
    zk_client *c;
    int64_t owner = -1;
    char name[64];
    unsigned kind;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    side_open(&a, server.port);
    /* the root itself is missing */
    assert_int_equal(call(&a, crpc_node_create("k/x", text("1"), 0), &n), CRPC_ENOTFOUND);
    assert_true(n.error.remote);
    assert_int_equal(n.error.sent, CRPC_SENT_YES);
    assert_int_equal(n.error.app_code, ZNONODE);
    c = zk_open(&server);
    for (kind = 0; kind < 4; kind++) {
        snprintf(name, sizeof name, "k/n%u", kind);
        assert_int_equal(call(&a, crpc_node_create(name, text("data"), kind | CRPC_NODE_PARENTS),
                              &n),
                         CRPC_OK);
        assert_true(strncmp(n.path, name, strlen(name)) == 0);
        assert_int_equal(strlen(n.path) - strlen(name), kind & CRPC_NODE_SEQUENTIAL ? 10 : 0);
        snprintf(name, sizeof name, "/test/%s", n.path);
        assert_int_equal(zk_exists(c, name, &owner), ZK_OK);
        assert_true(owner == (kind & CRPC_NODE_EPHEMERAL ? crpc_registry_session(a.registry) : 0));
        snprintf(name, sizeof name, "/%s", n.path); /* as it came out it can go in */
        assert_int_equal(call(&a, crpc_node_exists(name), &n), CRPC_OK);
        assert_int_equal(n.stat.ephemeral, (kind & CRPC_NODE_EPHEMERAL) != 0);
        assert_int_equal(n.stat.mine, (kind & CRPC_NODE_EPHEMERAL) != 0);
        assert_int_equal(n.stat.size, 4);
        assert_true(n.stat.created == n.stat.modified);
    }
    assert_int_equal(call(&a, crpc_node_create("k/s/", text(""),
                                               CRPC_NODE_SEQUENTIAL | CRPC_NODE_PARENTS),
                          &n),
                     CRPC_OK); /* nothing but a number */
    assert_string_equal(n.path, "k/s/0000000000");
    assert_int_equal(call(&a, crpc_node_create("k/n0", text("1"), 0), &n), CRPC_EEXISTS);
    assert_int_equal(call(&a, crpc_node_create("k/n1/x", text("1"), 0), &n), CRPC_EINVAL);
    assert_int_equal(call(&a, crpc_node_children("k"), &n), CRPC_OK);
    assert_int_equal(n.child_count, 5);
    assert_int_equal(call(&a, crpc_node_children(""), &n), CRPC_OK);
    assert_int_equal(n.child_count, 1);
    assert_string_equal(n.children[0], "k");
    assert_int_equal(call(&a, crpc_node_children("nothing"), &n), CRPC_ENOTFOUND);
    crpc_node_reset(&n);
    ct_matrix(a.loop, "four-kinds");
    side_close(&a);
    zk_exists(c, "/test/k/n0", &owner);
    assert_true(owner == 0);
    assert_int_equal(zk_exists(c, "/test/k/n1", &owner), ZK_NONODE); /* went with the session */
    zk_close(c);
}

static void it_reads_and_writes_versions(void **state)
{
    static char big[CRPC_NODE_BYTES_MAX];
    side a;
    crpc_node n;
    size_t i;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    for (i = 0; i < sizeof big; i++)
        big[i] = (char)(i * 7 + i / 251);
    side_open(&a, server.port);
    assert_int_equal(call(&a, crpc_node_create("v", text(NULL), CRPC_NODE_PARENTS), &n), CRPC_OK);
    assert_int_equal(call(&a, crpc_node_get("v"), &n), CRPC_OK);
    assert_int_equal(crpc_view_size(n.data), 0);
    assert_int_equal(n.stat.version, 0);
    assert_int_equal(call(&a, crpc_node_set("v", crpc_view_of(big, sizeof big), 0), &n), CRPC_OK);
    assert_int_equal(n.stat.version, 1);
    assert_int_equal(n.stat.size, (int)sizeof big);
    assert_int_equal(call(&a, crpc_node_get("v"), &n), CRPC_OK); /* nothing is cut */
    assert_int_equal(crpc_view_size(n.data), sizeof big);
    assert_memory_equal(crpc_view_data(n.data), big, sizeof big);
    assert_int_equal(call(&a, crpc_node_set("v", text("x"), 0), &n), CRPC_EVERSION);
    assert_non_null(strstr(n.error.text, "set \"v\""));
    assert_int_equal(call(&a, crpc_node_set("v", text("x"), CRPC_NODE_ANY), &n), CRPC_OK);
    assert_int_equal(call(&a, crpc_node_delete("v", 1), &n), CRPC_EVERSION);
    assert_int_equal(call(&a, crpc_node_create("v/w", text("x"), 0), NULL), CRPC_OK);
    assert_int_equal(call(&a, crpc_node_delete("v", 2), &n), CRPC_ENOTEMPTY);
    assert_int_equal(call(&a, crpc_node_delete("v/w", CRPC_NODE_ANY), &n), CRPC_OK);
    assert_int_equal(call(&a, crpc_node_delete("v", 2), &n), CRPC_OK);
    assert_int_equal(call(&a, crpc_node_delete("v", 2), &n), CRPC_ENOTFOUND);
    assert_int_equal(call(&a, crpc_node_get("v"), &n), CRPC_ENOTFOUND);
    assert_int_equal(call(&a, crpc_node_set("v", text("x"), -1), &n), CRPC_ENOTFOUND);
    crpc_node_reset(&n);
    ct_matrix(a.loop, "versions");
    side_close(&a);
}

static void it_does_all_or_nothing(void **state)
{
    side a;
    crpc_node n;
    crpc_node_op ops[5];
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    side_open(&a, server.port);
    assert_int_equal(call(&a, crpc_node_create("m", text("0"), CRPC_NODE_PARENTS), NULL), CRPC_OK);
    ops[0] = crpc_node_check("m", 0);
    ops[1] = crpc_node_create("m/a-", text("1"), CRPC_NODE_SEQUENTIAL);
    ops[2] = crpc_node_create("m/b", text("2"), CRPC_NODE_EPHEMERAL);
    ops[3] = crpc_node_set("m", text("3"), 0);
    ops[4] = crpc_node_delete("m/b", CRPC_NODE_ANY);
    assert_int_equal(crpc_registry_call(a.registry, ops, 5, LATE_MS, &n), CRPC_OK);
    assert_int_equal(n.part_count, 5);
    assert_string_equal(n.parts[1].path, "m/a-0000000000");
    assert_string_equal(n.parts[2].path, "m/b");
    assert_int_equal(n.parts[3].stat.version, 1);
    assert_int_equal(n.parts[4].status, CRPC_OK);
    assert_int_equal(count_children(&server, "/test/m"), 1);
    /* the version has changed: none of it is done again */
    assert_int_equal(crpc_registry_call(a.registry, ops, 5, LATE_MS, &n), CRPC_EVERSION);
    assert_int_equal(n.failed, 0);
    ops[0] = crpc_node_create("m/c", text("1"), 0);
    ops[1] = crpc_node_set("m", text("9"), CRPC_NODE_ANY);
    ops[2] = crpc_node_delete("m/nothing", CRPC_NODE_ANY);
    ops[3] = crpc_node_create("m/d", text("1"), 0);
    assert_int_equal(crpc_registry_call(a.registry, ops, 4, LATE_MS, &n), CRPC_ENOTFOUND);
    assert_int_equal(n.failed, 2);
    assert_int_equal(n.parts[0].status, CRPC_ECANCELED);
    assert_int_equal(n.parts[2].status, CRPC_ENOTFOUND);
    assert_int_equal(n.parts[3].status, CRPC_ECANCELED);
    assert_non_null(strstr(n.error.text, "delete \"m/nothing\""));
    assert_int_equal(count_children(&server, "/test/m"), 1);
    assert_int_equal(call(&a, crpc_node_get("m"), &n), CRPC_OK);
    assert_true(crpc_view_equal(n.data, "3"));
    crpc_node_reset(&n);
    ct_matrix(a.loop, "all-or-nothing");
    side_close(&a);
}

static void on_done(void *user, const crpc_node *node)
{
    side *s = (side *)user;
    crpc_node n;
    s->status = node->error.code;
    s->sent = (int)node->error.sent;
    s->thread = (uint64_t)(uintptr_t)pthread_self();
    memset(&n, 0, sizeof n);
    if (call(s, crpc_node_get("x"), &n) != CRPC_EDEADLK)
        s->status = -1;
    crpc_node_reset(&n);
    if (s->close_in_callback) {
        crpc_registry_close(s->registry);
        s->registry = NULL;
    }
    add(&s->done);
}

static void note_thread(void *user)
{
    __atomic_store_n((uint64_t *)user, (uint64_t)(uintptr_t)pthread_self(), __ATOMIC_SEQ_CST);
}

static void it_calls_back_on_the_loop(void **state)
{
    side a;
    crpc_node_op op;
    crpc_node n;
    uint64_t thread = 0;
    char name[16];
    int i;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    side_open(&a, server.port);
    assert_int_equal(call(&a, crpc_node_create("o", text(""), CRPC_NODE_PARENTS), NULL), CRPC_OK);
    assert_int_equal(crpc_loop_post(a.loop, note_thread, &thread), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&thread, __ATOMIC_SEQ_CST) != 0, LATE_MS));
    for (i = 0; i < 200; i++) { /* each needs the one before it */
        snprintf(name, sizeof name, "o/%d", i / 2);
        op = i % 2 ? crpc_node_delete(name, 0) : crpc_node_create(name, text("x"), 0);
        assert_int_equal(crpc_registry_call_async(a.registry, &op, 1, LATE_MS, on_done, &a),
                         CRPC_OK);
    }
    assert_true(CT_WAIT(value(&a.done) == 200, LATE_MS));
    assert_int_equal(a.status, CRPC_OK);
    assert_true(a.thread == thread);
    assert_int_equal(count_children(&server, "/test/o"), 0);
    /* closed in its own callback, with others pending */
    a.close_in_callback = 1;
    op = crpc_node_get("o");
    assert_int_equal(crpc_registry_call_async(a.registry, &op, 1, LATE_MS, on_done, &a), CRPC_OK);
    assert_true(CT_WAIT(value(&a.done) == 201, LATE_MS));
    assert_int_equal(a.status, CRPC_OK);
    ct_matrix(a.loop, "async-operations");
    side_close(&a);
    assert_true(CT_WAIT(ct_alloc_of_test()->live_blocks == 0, LATE_MS));
}

/* A program without threads of its own: it waits, and drives the loop while it does. */
static void it_works_without_a_thread(void **state)
{
    crpc_registry_options o;
    crpc_registry *r;
    crpc_error error;
    crpc_node n;
    crpc_node_op op = crpc_node_create("p", text("1"), CRPC_NODE_EPHEMERAL | CRPC_NODE_PARENTS);
    side shown;
    char url[96];
    (void)state;
    clean(&server);
    memset(&o, 0, sizeof o);
    memset(&n, 0, sizeof n);
    o.private_loop.poller = ct_poller();
    o.private_loop.hooks = ct_hooks();
    snprintf(url, sizeof url,
             "zookeeper://127.0.0.1:%d/test?session_timeout_ms=%d&registry_timeout_ms=%d",
             server.port, TIMEOUT_MS, LATE_MS);
    if (crpc_registry_open(&r, NULL, url, &o, &error))
        fail_msg("%s", error.text);
    assert_int_equal(crpc_registry_call(r, &op, 1, LATE_MS, &n), CRPC_OK);
    ct_sleep_ms(TIMEOUT_MS * 3 / 2); /* the session does not need the program */
    op = crpc_node_exists("p");
    assert_int_equal(crpc_registry_call(r, &op, 1, LATE_MS, &n), CRPC_OK);
    assert_true(n.stat.mine);
    crpc_node_reset(&n);
    crpc_registry_close(r);
    side_loop(&shown, 0);
    ct_matrix(shown.loop, "synchronous-operations");
    side_close(&shown);
}

static void it_says_what_became_of_an_operation(void **state)
{
    zk_proxy p;
    side a;
    crpc_node n;
    crpc_node_op op = crpc_node_set("w", text("2"), CRPC_NODE_ANY), read = crpc_node_get("w");
    int err;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    zk_proxy_start(&p, server.port);
    side_open_with(&a, p.port, 3000);
    assert_int_equal(call(&a, crpc_node_create("w", text("1"), CRPC_NODE_PARENTS), NULL), CRPC_OK);
    /* nobody is there: it waits, and is not sent */
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_SUSPENDED]) == 1, LATE_MS));
    assert_int_equal(crpc_registry_call(a.registry, &op, 1, 50, &n), CRPC_ECONN);
    assert_int_equal(n.error.sent, CRPC_SENT_NO);
    assert_false(n.error.remote);
    /* somebody comes back in time */
    assert_int_equal(crpc_registry_call_async(a.registry, &op, 1, LATE_MS, on_done, &a), CRPC_OK);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(value(&a.done) == 1, LATE_MS));
    assert_int_equal(a.status, CRPC_OK);
    /* sent, and no answer in time */
    zk_proxy_set(&p, ZK_PROXY_STALL);
    assert_int_equal(crpc_registry_call(a.registry, &op, 1, 50, &n), CRPC_ETIMEDOUT);
    assert_int_equal(n.error.sent, CRPC_SENT_MAYBE);
    /* sent, and the connection is cut; what only reads is asked again */
    assert_int_equal(crpc_registry_call_async(a.registry, &op, 1, LATE_MS, on_done, &a), CRPC_OK);
    assert_true(CT_WAIT(under_way(&a), LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&a.done) == 2, LATE_MS));
    assert_int_equal(a.status, CRPC_ECONN);
    assert_int_equal(a.sent, CRPC_SENT_MAYBE);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    err = call(&a, crpc_node_get("w"), &n);
    assert_int_equal(err, CRPC_OK);
    zk_proxy_set(&p, ZK_PROXY_STALL);
    assert_int_equal(crpc_registry_call_async(a.registry, &read, 1, LATE_MS, on_done, &a), CRPC_OK);
    assert_true(CT_WAIT(under_way(&a), LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    ct_sleep_ms(100);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(value(&a.done) == 3, LATE_MS));
    assert_int_equal(a.status, CRPC_OK);
    crpc_node_reset(&n);
    ct_matrix(a.loop, "outcomes");
    side_close(&a);
    zk_proxy_end(&p);
}

static void it_tells_of_its_session(void **state)
{
    zk_proxy p;
    side a;
    crpc_node n;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_CONNECTED]) == 1, LATE_MS));
    assert_true(a.sessions[0] == crpc_registry_session(a.registry));
    assert_int_equal(call(&a, crpc_node_create("e", text(""), CRPC_NODE_EPHEMERAL |
                                                                  CRPC_NODE_PARENTS),
                          &n),
                     CRPC_OK);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_SUSPENDED]) == 1, LATE_MS));
    assert_true(crpc_registry_session(a.registry) == 0);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_CONNECTED]) == 2, LATE_MS));
    assert_true(a.sessions[1] == a.sessions[0]);
    assert_int_equal(call(&a, crpc_node_exists("e"), &n), CRPC_OK);
    assert_true(n.stat.mine);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(count_children(&server, "/test") == 0, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_CONNECTED]) == 3, LATE_MS));
    assert_true(a.sessions[2] != a.sessions[0]);
    assert_int_equal(call(&a, crpc_node_exists("e"), &n), CRPC_ENOTFOUND);
    crpc_node_reset(&n);
    ct_matrix(a.loop, "session-states");
    side_close(&a);
    zk_proxy_end(&p);
}

static void it_shares_the_session(void **state)
{
    side a;
    crpc_registry *more;
    crpci_backend *r;
    crpci_directory_options o;
    char where[64];
    (void)state;
    clean(&server);
    assert_true(CT_WAIT(zk_connections(&server) == 0, LATE_MS));
    side_open(&a, server.port);
    more = open_registry(&a, server.port, TIMEOUT_MS);
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = TIMEOUT_MS; /* as a channel or a server would */
    snprintf(where, sizeof where, "zookeeper://127.0.0.1:%d/dubbo", server.port);
    assert_int_equal(crpci_open_registry(a.loop, where, &o, &r, NULL), CRPC_OK);
    assert_int_equal(zk_connections(&server), 1);
    assert_true(crpc_registry_session(more) == crpc_registry_session(a.registry));
    crpc_registry_close(more);
    crpci_directory_close(r);
    assert_int_equal(call(&a, crpc_node_create("s", text(""), CRPC_NODE_PARENTS), NULL), CRPC_OK);
    ct_matrix(a.loop, "coordination-shares-session");
    side_close(&a);
}

/* --- tests: configuration ----------------------------------------------------------------------- */

static void on_config(void *user, crpc_view bytes, int32_t version, bool exists)
{
    side *s = (side *)user;
    pthread_mutex_lock(&s->lock);
    if (exists && strcmp(s->value, "-") != 0 && version < s->version)
        add(&s->backwards);
    if (exists)
        crpc_view_copy(bytes, s->value, sizeof s->value);
    else
        strcpy(s->value, "-");
    s->version = exists ? version : 0;
    pthread_mutex_unlock(&s->lock);
    add(&s->changes);
}

static bool has_value(side *s, const char *want)
{
    bool same;
    pthread_mutex_lock(&s->lock);
    same = strcmp(s->value, want) == 0;
    pthread_mutex_unlock(&s->lock);
    return same;
}

static void wait_value(side *s, const char *want)
{
    if (!CT_WAIT(value(&s->changes) && has_value(s, want), LATE_MS))
        fail_msg("the value is \"%s\", not \"%s\"", s->value, want);
}

static void it_follows_configuration(void **state)
{
    side a;
    crpc_id id, other;
    zk_client *c;
    char text_of[16];
    int i, before;
    (void)state;
    clean(&server);
    side_open(&a, server.port);
    assert_int_equal(crpc_config_watch(a.registry, "c/limit", on_config, &a, &id), CRPC_OK);
    wait_value(&a, "-"); /* not even its parent exists */
    c = zk_open(&server);
    zk_create(c, "/test", "", 0);
    zk_create(c, "/test/c", "", 0);
    assert_int_equal(zk_create(c, "/test/c/limit", "first", 0), ZK_OK);
    wait_value(&a, "first");
    assert_int_equal(zk_watches(&server), 1);
    for (i = 0; i < 100; i++) {
        snprintf(text_of, sizeof text_of, "%d", i);
        assert_int_equal(set_data(c, "/test/c/limit", text_of), ZK_OK);
    }
    wait_value(&a, "99");
    assert_int_equal(a.version, 100);
    assert_int_equal(value(&a.backwards), 0);
    assert_true(value(&a.changes) <= 102);
    assert_int_equal(zk_watches(&server), 1);
    assert_int_equal(set_data(c, "/test/c/limit", ""), ZK_OK); /* empty is not gone */
    wait_value(&a, "");
    assert_int_equal(zk_delete(c, "/test/c/limit"), ZK_OK);
    wait_value(&a, "-");
    assert_int_equal(zk_create(c, "/test/c/limit", "again", 0), ZK_OK);
    wait_value(&a, "again");
    /* a second one hears of it too, at the price of no further watch; the same value is no news */
    before = value(&a.changes);
    assert_int_equal(crpc_config_watch(a.registry, "/c/limit", on_config, &a, &other), CRPC_OK);
    assert_true(CT_WAIT(value(&a.changes) == before + 1, LATE_MS));
    assert_int_equal(zk_watches(&server), 1);
    crpc_config_unwatch(a.registry, id);
    crpc_config_unwatch(a.registry, id);
    assert_int_equal(set_data(c, "/test/c/limit", "last"), ZK_OK);
    wait_value(&a, "last");
    ct_sleep_ms(100);
    assert_int_equal(value(&a.changes), before + 2);
    zk_close(c);
    ct_matrix(a.loop, "configuration");
    side_close(&a);
}

/* While the connection, then the session, is away the node changes, goes and comes. */
static void it_loses_no_configuration(void **state)
{
    zk_proxy p;
    side a;
    crpc_id id, gone;
    zk_client *c;
    int i, before;
    (void)state;
    clean(&server);
    c = zk_open(&server);
    zk_create(c, "/test", "", 0);
    zk_create(c, "/test/c", "0", 0);
    zk_proxy_start(&p, server.port);
    side_open(&a, p.port);
    assert_int_equal(crpc_config_watch(a.registry, "c", on_config, &a, &id), CRPC_OK);
    wait_value(&a, "0");
    for (i = 0; i < 3; i++) { /* the same session */
        before = value(&a.states[CRPC_REGISTRY_SUSPENDED]);
        zk_proxy_set(&p, ZK_PROXY_REFUSE);
        assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_SUSPENDED]) > before, LATE_MS));
        set_data(c, "/test/c", i == 0 ? "one" : i == 1 ? "two" : "three");
        assert_true(has_value(&a, i == 0 ? "0" : i == 1 ? "one" : "two"));
        zk_proxy_set(&p, ZK_PROXY_OPEN);
        wait_value(&a, i == 0 ? "one" : i == 1 ? "two" : "three");
    }
    before = value(&a.states[CRPC_REGISTRY_SUSPENDED]);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_SUSPENDED]) > before, LATE_MS));
    zk_delete(c, "/test/c");
    zk_create(c, "/test/c", "other", 0); /* of the same version as the first */
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    wait_value(&a, "other");
    /* the session expires */
    i = value(&a.states[CRPC_REGISTRY_CONNECTED]);
    before = value(&a.changes);
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_LOST]) > 0, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_CONNECTED]) > i, LATE_MS));
    assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
    assert_int_equal(value(&a.changes), before); /* nothing has changed */
    set_data(c, "/test/c", "after");
    wait_value(&a, "after");
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    i = value(&a.states[CRPC_REGISTRY_CONNECTED]);
    assert_true(CT_WAIT(value(&a.states[CRPC_REGISTRY_LOST]) > 1, LATE_MS));
    zk_delete(c, "/test/c");
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    wait_value(&a, "-");
    assert_int_equal(crpc_config_watch(a.registry, "c", on_config, &a, &gone), CRPC_OK);
    zk_close(c);
    ct_matrix(a.loop, "configuration-kept");
    side_close(&a);
    zk_proxy_end(&p);
}

/* --- tests: locks ------------------------------------------------------------------------------- */

/* One contender, and what it was told. */
typedef struct contender {
    side side;
    int acquired; /* atomic: how often */
    int lost;
    int failed;
    int status;
    int64_t token;
    int64_t at_ms; /* of the last news */
    int64_t lease_us; /* when it was acquired */
} contender;

static void on_lock(void *user, int status, int64_t token)
{
    contender *c = (contender *)user;
    c->at_ms = ct_now_ms();
    c->status = status;
    if (status == CRPC_OK) {
        c->token = token;
        c->lease_us = crpc_lock_lease_us(c->side.mutex);
        add(&c->acquired);
    } else if (status == CRPC_EGONE) {
        add(&c->lost);
    } else {
        add(&c->failed);
    }
}

static void contender_open(contender *c, int port, int timeout_ms)
{
    memset(c, 0, sizeof *c);
    side_open_with(&c->side, port, timeout_ms);
    assert_int_equal(crpc_lock_open(&c->side.mutex, c->side.registry, "locks/one", "a test", on_lock,
                                    c),
                     CRPC_OK);
}

/* Whether the end of the other's node is what it watches. (The server shows only watches on data.) */
static bool waits_for(contender *c, contender *other)
{
    char path[256];
    bool same;
    crpci_loop_lock(other->side.loop);
    snprintf(path, sizeof path, "%s", other->side.mutex->place.own.path);
    crpci_loop_unlock(other->side.loop);
    crpci_loop_lock(c->side.loop);
    same = strcmp(c->side.mutex->place.before.path, path) == 0;
    crpci_loop_unlock(c->side.loop);
    return same;
}

static void it_serves_in_order_and_wakes_one(void **state)
{
    enum { N = 6 };
    contender c[N];
    int64_t last = 0;
    int i;
    (void)state;
    clean(&server);
    for (i = 0; i < N; i++) {
        contender_open(&c[i], server.port, 10000);
        assert_int_equal(crpc_lock_acquire(c[i].side.mutex, -1), CRPC_OK);
        assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == i + 1, LATE_MS));
    }
    assert_true(CT_WAIT(value(&c[0].acquired) == 1, LATE_MS));
    /* each watches the one before it, and nothing else is watched */
    assert_true(CT_WAIT(zk_watches(&server) == N - 1, LATE_MS));
    ct_sleep_ms(100);
    assert_int_equal(zk_watches(&server), N - 1);
    for (i = 1; i < N; i++)
        assert_true(waits_for(&c[i], &c[i - 1]));
    for (i = 0; i < N; i++) {
        int k;
        assert_true(CT_WAIT(value(&c[i].acquired) == 1, LATE_MS));
        for (k = i + 1; k < N; k++)
            assert_int_equal(value(&c[k].acquired), 0);
        assert_true(c[i].token > last);
        assert_true(c[i].lease_us > 0 && c[i].lease_us <= 3750000);
        assert_true(crpc_lock_lease_us(c[i].side.mutex) > 0);
        assert_int_equal(zk_watches(&server), N - 1 - i);
        last = c[i].token;
        crpc_lock_release(c[i].side.mutex);
        assert_true(crpc_lock_lease_us(c[i].side.mutex) == 0);
    }
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 0, LATE_MS));
    /* who comes again stands at the end */
    assert_int_equal(crpc_lock_acquire(c[0].side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(value(&c[0].acquired) == 2, LATE_MS));
    assert_int_equal(crpc_lock_acquire(c[1].side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 2, LATE_MS));
    crpc_lock_release(c[0].side.mutex);
    assert_int_equal(crpc_lock_acquire(c[0].side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(value(&c[1].acquired) == 2, LATE_MS));
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 2, LATE_MS));
    assert_int_equal(value(&c[0].acquired), 2);
    ct_matrix(c[0].side.loop, "lock-order");
    for (i = 0; i < N; i++) {
        assert_int_equal(value(&c[i].lost), 0);
        assert_int_equal(value(&c[i].failed), 0);
        side_close(&c[i].side);
    }
    assert_int_equal(count_children(&server, "/test/locks/one"), 0);
}

static void it_tries_and_gives_up(void **state)
{
    contender a, b;
    (void)state;
    clean(&server);
    contender_open(&a, server.port, 10000);
    contender_open(&b, server.port, 10000);
    assert_int_equal(crpc_lock_acquire(a.side.mutex, 0), CRPC_OK); /* it is free */
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    assert_int_equal(crpc_lock_acquire(a.side.mutex, 0), CRPC_EBUSY);
    assert_int_equal(crpc_lock_acquire(b.side.mutex, 0), CRPC_OK);
    assert_true(CT_WAIT(value(&b.failed) == 1, LATE_MS));
    assert_int_equal(b.status, CRPC_ETIMEDOUT);
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 1, LATE_MS));
    assert_int_equal(crpc_lock_acquire(b.side.mutex, 100), CRPC_OK);
    assert_true(CT_WAIT(value(&b.failed) == 2, LATE_MS));
    assert_int_equal(b.status, CRPC_ETIMEDOUT);
    assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK);
    crpc_lock_release(b.side.mutex);
    assert_true(CT_WAIT(value(&b.failed) == 3, LATE_MS));
    assert_int_equal(b.status, CRPC_ECANCELED);
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 1, LATE_MS));
    /* one that waits, and is closed, is in nobody's way */
    assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 2, LATE_MS));
    crpc_lock_close(b.side.mutex);
    b.side.mutex = NULL;
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 1, LATE_MS));
    assert_int_equal(value(&b.failed), 3);
    ct_matrix(a.side.loop, "lock-try");
    side_close(&b.side);
    side_close(&a.side);
}

/* The network of the holder is cut: it is told before the server gives the lock to another. */
static void it_loses_a_lock_before_another_gets_it(void **state)
{
    static const zk_proxy_mode modes[] = {ZK_PROXY_REFUSE, ZK_PROXY_STALL};
    zk_proxy p;
    contender a, b;
    int i;
    (void)state;
    zk_proxy_start(&p, server.port);
    for (i = 0; i < 2; i++) {
        clean(&server);
        contender_open(&a, p.port, 4000);
        contender_open(&b, server.port, 10000);
        assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
        assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
        assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK);
        assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
        ct_sleep_ms(5000); /* the lease is renewed: it outlives the timeout */
        assert_int_equal(value(&a.lost), 0);
        assert_true(crpc_lock_lease_us(a.side.mutex) > 0);
        zk_proxy_set(&p, modes[i]);
        assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
        assert_int_equal(value(&a.lost), 1); /* already */
        if (a.at_ms > b.at_ms)
            fail_msg("lost %d ms after the other had it", (int)(a.at_ms - b.at_ms));
        assert_true(b.token > a.token);
        assert_true(crpc_lock_lease_us(a.side.mutex) == 0);
        /* with a new session it may queue again */
        zk_proxy_set(&p, ZK_PROXY_OPEN);
        assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
        ct_sleep_ms(200);
        assert_int_equal(value(&a.acquired), 1);
        crpc_lock_release(b.side.mutex);
        assert_true(CT_WAIT(value(&a.acquired) == 2, LATE_MS));
        assert_int_equal(value(&b.lost), 0);
        ct_matrix(a.side.loop, i ? "lock-lost-stalled" : "lock-lost-cut");
        side_close(&a.side);
        side_close(&b.side);
    }
    zk_proxy_end(&p);
}

/* A short loss of the connection costs neither the lock nor the place in the queue. */
static void it_keeps_a_lock_over_a_short_loss(void **state)
{
    zk_proxy p;
    contender a, b;
    int i, suspended;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    contender_open(&a, p.port, 10000);
    contender_open(&b, p.port, 10000);
    assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
    for (i = 0; i < 3; i++) {
        suspended = value(&a.side.states[CRPC_REGISTRY_SUSPENDED]);
        zk_proxy_set(&p, ZK_PROXY_REFUSE);
        assert_true(CT_WAIT(value(&a.side.states[CRPC_REGISTRY_SUSPENDED]) > suspended, LATE_MS));
        if (i == 2) /* released while nobody can be told: it is done later */
            crpc_lock_release(a.side.mutex);
        zk_proxy_set(&p, ZK_PROXY_OPEN);
        assert_true(CT_WAIT(crpc_registry_session(a.side.registry) &&
                                crpc_registry_session(b.side.registry),
                            LATE_MS));
    }
    assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
    assert_int_equal(value(&a.lost), 0);
    assert_true(CT_WAIT(count_children(&server, "/test/locks/one") == 1, LATE_MS));
    ct_matrix(a.side.loop, "lock-kept");
    side_close(&a.side);
    side_close(&b.side);
    zk_proxy_end(&p);
}

/* The node was made, and the answer never came: it is found again, and no second one stands before
 * everybody until the session ends. */
static void it_finds_a_node_whose_creation_got_no_answer(void **state)
{
    zk_server s;
    zk_proxy p;
    contender a, b;
    int suspended;
    (void)state;
    zk_start(&s);
    zk_proxy_start(&p, s.port);
    contender_open(&b, s.port, 30000);
    assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK); /* so that the path exists */
    assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
    contender_open(&a, p.port, 30000);
    suspended = value(&a.side.states[CRPC_REGISTRY_SUSPENDED]);
    zk_freeze(&s);
    assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
    ct_sleep_ms(200); /* the request is in the server's socket */
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    zk_thaw(&s);
    assert_true(CT_WAIT(value(&a.side.states[CRPC_REGISTRY_SUSPENDED]) > suspended, LATE_MS));
    assert_true(CT_WAIT(count_children(&s, "/test/locks/one") == 2, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(zk_watches(&s) == 1, LATE_MS));
    assert_int_equal(count_children(&s, "/test/locks/one"), 2);
    crpc_lock_release(b.side.mutex);
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    assert_int_equal(count_children(&s, "/test/locks/one"), 1);
    crpc_lock_release(a.side.mutex);
    assert_true(CT_WAIT(count_children(&s, "/test/locks/one") == 0, LATE_MS));
    ct_matrix(a.side.loop, "lock-creation-unanswered");
    side_close(&a.side);
    side_close(&b.side);
    zk_proxy_end(&p);
    zk_end(&s);
}

/* Somebody deletes the holder's node by hand. */
static void it_notices_that_its_node_was_removed(void **state)
{
    contender a;
    zk_client *c;
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    char path[1200];
    (void)state;
    clean(&server);
    contender_open(&a, server.port, 1000);
    assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    c = zk_open(&server);
    zk_children(c, "/test/locks/one", names);
    assert_int_equal(names->count, 1);
    snprintf(path, sizeof path, "/test/locks/one/%s", names->name[0]);
    assert_int_equal(zk_delete(c, path), ZK_OK);
    assert_true(CT_WAIT(value(&a.lost) == 1, LATE_MS));
    zk_close(c);
    free(names);
    ct_matrix(a.side.loop, "lock-node-removed");
    side_close(&a.side);
}

/* The lease runs out, though the session turns out to have lived on: the program was told that the
 * lock is lost, so its node must not stand in everybody's way. */
static void it_removes_its_node_when_the_lease_runs_out(void **state)
{
    contender a, b;
    crpci_queue_place *q;
    (void)state;
    clean(&server);
    contender_open(&a, server.port, 10000);
    contender_open(&b, server.port, 10000);
    assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    assert_int_equal(crpc_lock_acquire(b.side.mutex, -1), CRPC_OK);
    assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
    q = &a.side.mutex->place;
    crpci_loop_lock(a.side.loop);
    q->lease.until_us = 1;
    crpci_queue_timer(a.side.loop, &q->item.timer);
    crpci_loop_unlock(a.side.loop);
    assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
    assert_true(CT_WAIT(value(&a.lost) == 1, LATE_MS));
    assert_int_equal(count_children(&server, "/test/locks/one"), 1);
    ct_matrix(a.side.loop, "lock-lease-over");
    side_close(&a.side);
    side_close(&b.side);
}

/* --- tests: elections --------------------------------------------------------------------------- */

static void on_election(void *user, bool leader, int64_t token)
{
    contender *c = (contender *)user;
    c->at_ms = ct_now_ms();
    c->token = token;
    add(leader ? &c->acquired : &c->lost);
}

static void candidate_open(contender *c, int port, int timeout_ms, const char *who)
{
    memset(c, 0, sizeof *c);
    side_open_with(&c->side, port, timeout_ms);
    assert_int_equal(crpc_election_open(&c->side.election, c->side.registry, "leader", text(who),
                                        on_election, c),
                     CRPC_OK);
}

static void it_elects_one(void **state)
{
    contender a, b;
    crpc_node n;
    int64_t first;
    (void)state;
    clean(&server);
    memset(&n, 0, sizeof n);
    side_open(&a.side, server.port);
    assert_int_equal(call(&a.side, crpc_node_first("leader"), &n), CRPC_ENOTFOUND);
    side_close(&a.side);
    candidate_open(&a, server.port, 10000, "anna");
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    candidate_open(&b, server.port, 10000, "berta");
    assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
    assert_int_equal(value(&b.acquired), 0);
    assert_int_equal(call(&b.side, crpc_node_first("leader"), &n), CRPC_OK);
    assert_true(crpc_view_equal(n.data, "anna"));
    assert_true(n.stat.created == a.token);
    assert_true(crpc_election_lease_us(a.side.election) > 0);
    assert_true(crpc_election_lease_us(b.side.election) == 0);
    first = a.token;
    crpc_election_resign(a.side.election);
    assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
    assert_true(CT_WAIT(value(&a.lost) == 1, LATE_MS));
    assert_true(b.token > first);
    assert_int_equal(call(&a.side, crpc_node_first("leader"), &n), CRPC_OK);
    assert_true(crpc_view_equal(n.data, "berta"));
    assert_true(CT_WAIT(count_children(&server, "/test/leader") == 2, LATE_MS)); /* once more */
    crpc_election_close(b.side.election);
    b.side.election = NULL;
    assert_true(CT_WAIT(value(&a.acquired) == 2, LATE_MS));
    crpc_election_resign(a.side.election); /* alone: it is told of both */
    assert_true(CT_WAIT(value(&a.acquired) == 3, LATE_MS));
    assert_int_equal(value(&a.lost), 2);
    crpc_node_reset(&n);
    ct_matrix(a.side.loop, "election");
    side_close(&a.side);
    side_close(&b.side);
}

/* The session expires: the lead is lost, and the candidate comes back by itself. */
static void it_enters_again_with_a_new_session(void **state)
{
    zk_proxy p;
    contender a, b;
    (void)state;
    clean(&server);
    zk_proxy_start(&p, server.port);
    candidate_open(&a, p.port, 3000, "anna");
    assert_true(CT_WAIT(value(&a.acquired) == 1, LATE_MS));
    candidate_open(&b, server.port, 10000, "berta");
    assert_true(CT_WAIT(zk_watches(&server) == 1, LATE_MS));
    zk_proxy_set(&p, ZK_PROXY_REFUSE);
    assert_true(CT_WAIT(value(&b.acquired) == 1, LATE_MS));
    assert_int_equal(value(&a.lost), 1);
    assert_true(a.at_ms <= b.at_ms);
    zk_proxy_set(&p, ZK_PROXY_OPEN);
    assert_true(CT_WAIT(count_children(&server, "/test/leader") == 2, LATE_MS));
    assert_int_equal(value(&a.acquired), 1);
    side_close(&b.side);
    assert_true(CT_WAIT(value(&a.acquired) == 2, LATE_MS));
    ct_matrix(a.side.loop, "election-expired");
    side_close(&a.side);
    zk_proxy_end(&p);
}

/* --- tests: many processes, killed -------------------------------------------------------------- */

typedef struct crowd_one {
    crpc_lock *lock;
    crpc_loop *loop;
    const char *file; /* that the lock protects; another lock on it, the kernel's, must be free */
    const char *log;
    int fd;
    int hold_ms;
} crowd_one;

static void crowd_note(const crowd_one *one, const char *what, int64_t token)
{
    char line[80];
    int n = snprintf(line, sizeof line, "%s %lld\n", what, (long long)token);
    int fd = open(one->log, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (fd < 0 || write(fd, line, (size_t)n) != n)
        _exit(3);
    close(fd);
}

static void crowd_drop(crowd_one *one)
{
    if (one->fd >= 0)
        close(one->fd); /* and with it the kernel's lock */
    one->fd = -1;
}

static void crowd_release(void *user)
{
    crowd_one *one = (crowd_one *)user;
    if (one->fd < 0)
        return; /* lost meanwhile */
    crowd_drop(one);
    crpc_lock_release(one->lock);
    if (crpc_lock_acquire(one->lock, -1) != CRPC_OK)
        _exit(4);
}

static void crowd_on_lock(void *user, int status, int64_t token)
{
    crowd_one *one = (crowd_one *)user;
    if (status != CRPC_OK) {
        crowd_drop(one);
        if (crpc_lock_acquire(one->lock, -1) != CRPC_OK)
            _exit(5);
        return;
    }
    one->fd = open(one->file, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    crowd_note(one, one->fd >= 0 && flock(one->fd, LOCK_EX | LOCK_NB) == 0 ? "held" : "TWICE",
               token);
    if (crpc_timer_start(one->loop, one->hold_ms, 0, crowd_release, one, NULL) != CRPC_OK)
        _exit(6);
}

/* A process with several contenders, all on its one session. */
static int crowd_main(int port, int count, const char *dir)
{
    static crowd_one all[64];
    char file[128], log[128], url[64];
    crpc_registry_options o;
    crpc_registry *r;
    crpc_loop *loop;
    int i;
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = 2000;
    o.must_connect = 1;
    o.registry_timeout_ms = LATE_MS;
    snprintf(file, sizeof file, "%s/file", dir);
    snprintf(log, sizeof log, "%s/log", dir);
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d/test", port);
    if (crpc_loop_open(&loop, NULL) || crpc_registry_open(&r, loop, url, &o, NULL))
        return 7;
    for (i = 0; i < count; i++) {
        all[i].loop = loop;
        all[i].file = file;
        all[i].log = log;
        all[i].fd = -1;
        all[i].hold_ms = (int)((unsigned)getpid() + (unsigned)i * 7u) % 8;
        if (crpc_lock_open(&all[i].lock, r, "crowd", "crowd", crowd_on_lock, &all[i]) ||
            crpc_lock_acquire(all[i].lock, -1))
            return 8;
    }
    return crpc_loop_run(loop) != CRPC_OK;
}

/* A process that says when it leads. */
static void leader_note(void *user, bool leader, int64_t token)
{
    (void)user;
    printf("%d %s %lld\n", (int)getpid(), leader ? "leads" : "led", (long long)token);
    fflush(stdout);
}

static int leader_main(int port, int session_timeout_ms)
{
    crpc_registry_options o;
    crpc_election *e;
    crpc_registry *r;
    crpc_loop *loop;
    char url[64];
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = session_timeout_ms;
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d/test", port);
    if (crpc_loop_open(&loop, NULL) || crpc_registry_open(&r, loop, url, &o, NULL) ||
        crpc_election_open(&e, r, "leader", text("a process"), leader_note, NULL))
        return 7;
    return crpc_loop_run(loop) != CRPC_OK;
}

static pid_t start(const char *word, int port, int number, const char *dir, const char *log)
{
    static char self[] = "/proc/self/exe";
    char what[16], port_text[16], number_text[16], where[64];
    char *argv[6];
    snprintf(what, sizeof what, "%s", word);
    snprintf(port_text, sizeof port_text, "%d", port);
    snprintf(number_text, sizeof number_text, "%d", number);
    snprintf(where, sizeof where, "%s", dir);
    argv[0] = self;
    argv[1] = what;
    argv[2] = port_text;
    argv[3] = number_text;
    argv[4] = where;
    argv[5] = NULL;
    return zk_spawn(argv, log, NULL);
}

static char *read_file(const char *path)
{
    static char text_of[1 << 20];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text_of, sizeof text_of - 1);
    text_of[n > 0 ? n : 0] = '\0';
    if (fd >= 0)
        close(fd);
    return text_of;
}

/* 50 contenders in five processes, which are killed and come again: never two at a time, and the
 * tokens grow from holder to holder. */
static void it_never_lets_two_hold(void **state)
{
    enum { PROCESSES = 5, EACH = 10, KILLS = 5 };
    ct_dir dir = ct_dir_make();
    pid_t pid[PROCESSES];
    side shown;
    char log[96], out[96], *line;
    long long last = 0;
    int i, held = 0;
    (void)state;
    clean(&server);
    snprintf(log, sizeof log, "%s/log", dir.path);
    snprintf(out, sizeof out, "%s/out", dir.path);
    for (i = 0; i < PROCESSES; i++)
        pid[i] = start("crowd", server.port, EACH, dir.path, out);
    for (i = 0; i < KILLS; i++) {
        int who = (int)(ct_random() % PROCESSES), status;
        ct_sleep_ms(1200);
        for (who = 0; who < PROCESSES; who++) {
            if (waitpid(pid[who], &status, WNOHANG) == pid[who])
                fail_msg("a contender ended with %d: %s", status, read_file(out));
        }
        who = (int)(ct_random() % PROCESSES);
        zk_kill(pid[who], SIGKILL);
        pid[who] = start("crowd", server.port, EACH, dir.path, out);
    }
    ct_sleep_ms(3000);
    for (i = 0; i < PROCESSES; i++)
        zk_kill(pid[i], SIGKILL);
    for (line = strtok(read_file(log), "\n"); line; line = strtok(NULL, "\n"), held++) {
        long long token = 0;
        if (sscanf(line, "held %lld", &token) != 1 || token <= last)
            fail_msg("after token %lld: \"%s\"", last, line);
        last = token;
    }
    print_message("held %d times\n", held);
    assert_true(held > 30);
    side_loop(&shown, 0);
    ct_matrix(shown.loop, "lock-crowd");
    side_close(&shown);
    ct_dir_remove(dir);
}

/* The process of the last line that says "leads"; *token its token. 0: none, or it ceased to. */
static pid_t leads_now(const char *log, long long *token, int *leaders)
{
    char *line;
    pid_t who = 0;
    *leaders = 0;
    *token = 0;
    for (line = strtok(read_file(log), "\n"); line; line = strtok(NULL, "\n")) {
        int pid;
        long long number;
        char word[16];
        if (sscanf(line, "%d %15s %lld", &pid, word, &number) != 3)
            continue;
        if (strcmp(word, "leads") == 0) {
            if (number <= *token)
                fail_msg("token %lld after %lld", number, *token);
            who = (pid_t)pid;
            *token = number;
            ++*leaders;
        } else if (who == (pid_t)pid) {
            who = 0;
        }
    }
    return who;
}

static void it_has_a_new_leader_soon(void **state)
{
    enum { PROCESSES = 3, TIMEOUT = 2000 };
    ct_dir dir = ct_dir_make();
    pid_t pid[PROCESSES], first;
    side shown;
    char log[96];
    long long token = 0, before;
    int64_t begin, took;
    int i, leaders;
    (void)state;
    clean(&server);
    snprintf(log, sizeof log, "%s/log", dir.path);
    for (i = 0; i < PROCESSES; i++)
        pid[i] = start("leader", server.port, TIMEOUT, dir.path, log);
    assert_true(CT_WAIT(leads_now(log, &token, &leaders) != 0, LATE_MS));
    assert_true(CT_WAIT(count_children(&server, "/test/leader") == PROCESSES, LATE_MS));
    ct_sleep_ms(300);
    first = leads_now(log, &token, &leaders);
    assert_int_equal(leaders, 1);
    before = token;
    zk_kill(first, SIGKILL);
    begin = ct_now_ms();
    assert_true(CT_WAIT(leads_now(log, &token, &leaders) != first, LATE_MS));
    took = ct_now_ms() - begin;
    print_message("a new leader after %d ms\n", (int)took);
    if (took > TIMEOUT + TIMEOUT * 3 / 8 + 1500) /* the session, the lease, and what it takes */
        fail_msg("a new leader after %d ms", (int)took);
    assert_int_equal(leaders, 2);
    assert_true(token > before);
    for (i = 0; i < PROCESSES; i++) {
        if (pid[i] != first)
            zk_kill(pid[i], SIGKILL);
    }
    side_loop(&shown, 0);
    ct_matrix(shown.loop, "election-killed");
    side_close(&shown);
    ct_dir_remove(dir);
}

/* --- tests: closing, want of memory ------------------------------------------------------------- */

/* With a frozen server: everything is told its end, and it does not take long. */
static void it_closes_with_everything_pending(void **state)
{
    zk_server s;
    contender a;
    crpc_node_op op = crpc_node_get("x");
    crpc_id id;
    char path[16];
    int64_t begin;
    int i;
    (void)state;
    zk_start(&s);
    contender_open(&a, s.port, 4000);
    zk_freeze(&s);
    for (i = 0; i < 100; i++)
        assert_int_equal(crpc_registry_call_async(a.side.registry, &op, 1, LATE_MS, on_done,
                                                  &a.side),
                         CRPC_OK);
    for (i = 0; i < 10; i++) {
        snprintf(path, sizeof path, "c%d", i);
        assert_int_equal(crpc_config_watch(a.side.registry, path, on_config, &a.side, &id), CRPC_OK);
    }
    assert_int_equal(crpc_lock_acquire(a.side.mutex, -1), CRPC_OK);
    begin = ct_now_ms();
    crpc_registry_close(a.side.registry);
    a.side.registry = NULL;
    if (ct_now_ms() - begin > 5000)
        fail_msg("closing took %d ms", (int)(ct_now_ms() - begin));
    assert_true(CT_WAIT(value(&a.failed) == 1, LATE_MS));
    assert_int_equal(a.status, CRPC_ECANCELED);
    ct_matrix(a.side.loop, "coordination-closed");
    crpc_lock_close(a.side.mutex);
    crpc_loop_close(a.side.loop);
    assert_int_equal(value(&a.side.done), 100);
    assert_int_equal(value(&a.side.changes), 0);
    pthread_mutex_destroy(&a.side.lock);
    zk_end(&s);
}

static int sweep(const crpc_hooks *hooks, void *user)
{
    contender *a = (contender *)user;
    crpc_loop_options o;
    crpc_registry_options ro;
    crpc_node_op op = crpc_node_create("s/n", text("x"), CRPC_NODE_PARENTS), get;
    crpc_node n;
    crpc_id id;
    char url[64];
    int err;
    memset(a, 0, sizeof *a);
    memset(&o, 0, sizeof o);
    memset(&ro, 0, sizeof ro);
    memset(&n, 0, sizeof n);
    pthread_mutex_init(&a->side.lock, NULL);
    o.poller = ct_poller();
    o.hooks = *hooks;
    o.hooks.log_level = -1;
    ro.session_timeout_ms = TIMEOUT_MS;
    ro.registry_timeout_ms = 100;
    ro.on_state = on_state;
    ro.user = &a->side;
    err = crpc_loop_open(&a->side.loop, &o);
    if (err)
        return err;
    if (crpc_loop_start(a->side.loop))
        fail_msg("no thread");
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d/test", server.port);
    err = crpc_registry_open(&a->side.registry, a->side.loop, url, &ro, NULL);
    if (!err)
        err = crpc_config_watch(a->side.registry, "s/n", on_config, &a->side, &id);
    if (!err)
        err = crpc_lock_open(&a->side.mutex, a->side.registry, "s/l", "me", on_lock, a);
    if (!err)
        err = crpc_lock_acquire(a->side.mutex, 30);
    if (!err) {
        err = crpc_registry_call(a->side.registry, &op, 1, 30, &n);
        get = crpc_node_first("s/l");
        if (!err || err == CRPC_EEXISTS)
            err = crpc_registry_call(a->side.registry, &get, 1, 30, &n);
        if (err != CRPC_ENOMEM)
            err = CRPC_OK;
        crpc_node_reset(&n);
        (void)CT_WAIT(value(&a->acquired) + value(&a->failed) && value(&a->side.changes), 30);
    }
    crpc_lock_close(a->side.mutex);
    crpc_registry_close(a->side.registry);
    crpc_loop_close(a->side.loop);
    pthread_mutex_destroy(&a->side.lock);
    return err;
}

static void it_survives_want_of_memory(void **state)
{
    contender a;
    (void)state;
    clean(&server);
    assert_true(ct_sweep(sweep, &a) > 20); /* 37, or fewer when the server is slow to answer */
    side_loop(&a.side, 0);
    ct_matrix(a.side.loop, "coordination-out-of-memory");
    side_close(&a.side);
    clean(&server);
}

int main(int argc, char **argv)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_makes_nodes_of_all_four_kinds),
        CT_TEST(it_reads_and_writes_versions),
        CT_TEST(it_does_all_or_nothing),
        CT_TEST(it_calls_back_on_the_loop),
        CT_TEST(it_works_without_a_thread),
        CT_TEST(it_says_what_became_of_an_operation),
        CT_TEST(it_tells_of_its_session),
        CT_TEST(it_shares_the_session),
        CT_TEST(it_follows_configuration),
        CT_TEST(it_loses_no_configuration),
        CT_TEST(it_serves_in_order_and_wakes_one),
        CT_TEST(it_tries_and_gives_up),
        CT_TEST(it_loses_a_lock_before_another_gets_it),
        CT_TEST(it_keeps_a_lock_over_a_short_loss),
        CT_TEST(it_finds_a_node_whose_creation_got_no_answer),
        CT_TEST(it_notices_that_its_node_was_removed),
        CT_TEST(it_removes_its_node_when_the_lease_runs_out),
        CT_TEST(it_elects_one),
        CT_TEST(it_enters_again_with_a_new_session),
        CT_TEST(it_never_lets_two_hold),
        CT_TEST(it_has_a_new_leader_soon),
        CT_TEST(it_closes_with_everything_pending),
        CT_TEST(it_survives_want_of_memory),
    };
    int failed;
    if (argc == 5 && strcmp(argv[1], "crowd") == 0)
        return crowd_main(atoi(argv[2]), atoi(argv[3]), argv[4]);
    if (argc == 5 && strcmp(argv[1], "leader") == 0)
        return leader_main(atoi(argv[2]), atoi(argv[3]));
    zk_start(&server);
    failed = CT_RUN(tests);
    zk_end(&server);
    return failed;
}
