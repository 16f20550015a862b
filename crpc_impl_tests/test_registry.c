/* Opening and closing a registry without a server: URLs, memory. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_nowhere.h"

static void on_node(void *user, const crpc_node *result)
{
    int *counts = (int *)user;
    counts[0]++;
    counts[1] = result->error.code;
    counts[2] = (int)result->error.sent;
}

static void on_config(void *user, crpc_view value, int32_t version, bool exists)
{
    (void)user, (void)value, (void)version, (void)exists;
}

static void on_lock(void *user, int status, int64_t token)
{
    int *counts = (int *)user;
    (void)token;
    counts[0]++;
    counts[1] = status;
}

static void on_election(void *user, bool leader, int64_t token)
{
    (void)user, (void)leader, (void)token;
}

static void it_refuses_bad_urls(void **state)
{
    static const struct {
        const char *url;
        int status;
    } bad[] = {
        {"tcp://127.0.0.1:1", CRPC_EUNSUPPORTED},
        {"nothing", CRPC_EINVAL},
        {"zookeeper://127.0.0.1:1/a//b", CRPC_EINVAL},
        {"zookeeper://", CRPC_EINVAL},
        {"zookeeper://127.0.0.1:1/a?lb=x", CRPC_EINVAL},
        {"zookeeper://127.0.0.1:1/a?session_timeout_ms=x", CRPC_EINVAL},
        {"zookeeper://127.0.0.1:1/a?registry_timeout_ms=10&must_connect=1", CRPC_EREGISTRY},
    };
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_error error;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        int err = crpc_registry_open(&r, loop, bad[i].url, NULL, &error);
        if (err != bad[i].status || r || !*error.text)
            fail_msg("%s: %s (%s)", bad[i].url, crpc_status_name(err), error.text);
    }
    crpc_loop_close(loop);
}

static int use(const crpc_hooks *hooks, void *user)
{
    crpc_loop *loop = nowhere_loop(hooks);
    crpc_registry *r = NULL;
    crpc_lock *lock = NULL;
    crpc_election *e = NULL;
    crpc_node_op ops[2];
    crpc_node out;
    crpc_id id;
    int counts[3] = {0, 0, 0}, locks[2] = {0, 0}, err;
    if (!loop)
        return CRPC_ENOMEM;
    memset(&out, 0, sizeof out);
    ops[0] = crpc_node_create("a/b", crpc_view_str("x"), CRPC_NODE_PARENTS);
    ops[1] = crpc_node_delete("a/c", 0);
    err = nowhere_open(&r, loop, *(int *)user, "/root");
    if (!err)
        err = crpc_config_watch(r, "c", on_config, NULL, &id);
    if (!err)
        err = crpc_lock_open(&lock, r, "l", "me", on_lock, locks);
    if (!err)
        err = crpc_lock_acquire(lock, -1);
    if (!err)
        err = crpc_election_open(&e, r, "e", crpc_view_str("me"), on_election, NULL);
    if (!err)
        err = crpc_registry_call_async(r, ops, 1, 0, on_node, counts);
    ops[0].flags = 0;
    if (!err)
        err = crpc_registry_call_async(r, ops, 2, 0, on_node, counts);
    if (!err) {
        err = crpc_registry_call(r, ops, 1, 5, &out);
        err = err == CRPC_ECONN ? CRPC_OK : err;
    }
    crpc_node_reset(&out);
    crpc_lock_close(lock);
    crpc_registry_close(r);
    crpc_election_close(e);
    crpc_loop_close(loop);
    return err;
}

static void it_leaves_nothing_behind(void **state)
{
    int port = ct_free_port();
    (void)state;
    assert_true(ct_sweep(use, &port) > 30);
}

/* --- CRPC_DEBUG ------------------------------------------------------------------------------- */

static crpc_registry *abort_registry(void)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    if (nowhere_open(&r, loop, ct_free_port(), ""))
        _exit(2);
    return r;
}

static void ignore_lock(void *user, int status, int64_t token)
{
    (void)user, (void)status, (void)token;
}

static void ignore_election(void *user, bool leader, int64_t token)
{
    (void)user, (void)leader, (void)token;
}

static void close_registry_twice(void)
{
    crpc_registry *r = abort_registry();
    crpc_registry_close(r);
    crpc_registry_close(r);
}

static void close_lock_twice(void)
{
    crpc_lock *lock;
    if (crpc_lock_open(&lock, abort_registry(), "l", NULL, ignore_lock, NULL))
        _exit(3);
    crpc_lock_close(lock);
    crpc_lock_close(lock);
}

static void acquire_after_close(void)
{
    crpc_lock *lock;
    if (crpc_lock_open(&lock, abort_registry(), "l", NULL, ignore_lock, NULL))
        _exit(3);
    crpc_lock_close(lock);
    _exit(crpc_lock_acquire(lock, -1));
}

static void close_election_twice(void)
{
    crpc_election *e;
    if (crpc_election_open(&e, abort_registry(), "e", crpc_view_str("me"), ignore_election, NULL))
        _exit(3);
    crpc_election_close(e);
    crpc_election_close(e);
}

static void debug_builds_report_closed_handles(void **state)
{
    static const struct {
        void (*fn)(void);
        const char *says;
    } cases[] = {
        {close_registry_twice, "crpc: crpc_registry_close: the object is closed already\n"},
        {close_lock_twice, "crpc: crpc_lock_close: the object is closed already\n"},
        {acquire_after_close, "crpc: crpc_lock_acquire: the object is closed already\n"},
        {close_election_twice, "crpc: crpc_election_close: the object is closed already\n"},
    };
    char text[300];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        ct_expect_abort(cases[i].fn, text, sizeof text);
        assert_string_equal(text, cases[i].says);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(debug_builds_report_closed_handles),
        CT_TEST(it_refuses_bad_urls),
        CT_TEST(it_leaves_nothing_behind),
    };
    return CT_RUN(tests);
}
