/* What coordination decides without a server: paths, numbers, places in a queue, arguments. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpc_loop *loop_with(const crpc_hooks *hooks)
{
    crpc_loop_options o;
    crpc_loop *loop;
    memset(&o, 0, sizeof o);
    o.hooks = hooks ? *hooks : ct_hooks();
    o.hooks.log_level = -1;
    o.forbid_threads = 1;
    return crpc_loop_open(&loop, &o) ? NULL : loop;
}

/* A registry at a port where nobody is; it does not wait. */
static int open_nowhere(crpc_registry **r, crpc_loop *loop, int port, const char *root)
{
    crpc_registry_options o;
    char url[128];
    memset(&o, 0, sizeof o);
    o.registry_timeout_ms = -1;
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d%s", port, root);
    return crpc_registry_open(r, loop, url, &o, NULL);
}

/* --- paths -------------------------------------------------------------------------------------- */

static void it_puts_paths_below_the_root(void **state)
{
    static const struct {
        const char *root, *path, *full, *back;
    } paths[] = {
        {"", "", "/", ""},           {"", "/", "/", ""},         {"", "a", "/a", "a"},
        {"", "/a/b", "/a/b", "a/b"}, {"/r", "", "/r", ""},       {"/r", "/", "/r", ""},
        {"/r", "a", "/r/a", "a"},    {"/r", "/a", "/r/a", "a"},  {"/r/s", "a/b", "/r/s/a/b", "a/b"},
        {"/r", "a/", "/r/a/", "a/"},
    };
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    size_t i;
    (void)state;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    for (i = 0; i < sizeof paths / sizeof *paths; i++) {
        char *full = crpci_coordination_path(h, paths[i].root, paths[i].path);
        if (strcmp(full, paths[i].full) != 0 ||
            crpci_coordination_full(NULL, paths[i].root, paths[i].path) != strlen(full) ||
            strcmp(crpci_coordination_relative(full, strlen(paths[i].root)), paths[i].back) != 0)
            fail_msg("\"%s\" \"%s\" gives \"%s\"", paths[i].root, paths[i].path, full);
        crpci_heap_strfree(h, full);
    }
    crpci_heap_unref(h);
}

static void it_takes_paths_that_zookeeper_takes(void **state)
{
    static const char *const good[] = {"", "/", "a", "/a", "a/b", "...", "a b", "\xc3\xa4", ".a"};
    static const char *const bad[] = {NULL, "//", "a//b", ".", "..", "a/./b", "/a/..", "a\n", "a/"};
    char longest[CRPCI_COORDINATION_PATH + 2];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(crpci_coordination_path_ok(good[i], false));
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(crpci_coordination_path_ok(bad[i], false));
    assert_true(crpci_coordination_path_ok("a/", true)); /* the number is the whole name */
    assert_false(crpci_coordination_path_ok("a//", true));
    memset(longest, 'a', sizeof longest);
    longest[CRPCI_COORDINATION_PATH] = '\0';
    assert_true(crpci_coordination_path_ok(longest, false));
    longest[CRPCI_COORDINATION_PATH] = 'a';
    longest[CRPCI_COORDINATION_PATH + 1] = '\0';
    assert_false(crpci_coordination_path_ok(longest, false));
}

/* --- numbers ------------------------------------------------------------------------------------ */

/* As ZooKeeper names a sequential node. */
static const char *node(char *out, const char *id, int32_t number)
{
    sprintf(out, "%s-lock-%010d", id, (int)number);
    return out;
}

static void it_reads_numbers_of_ten_digits(void **state)
{
    static const int32_t numbers[] = {0,          1,         9,           10,        1999999999,
                                      INT32_MAX,  INT32_MIN, INT32_MIN + 1, -1,      -2000000000};
    static const char *const bad[] = {"",
                                      "x",
                                      "lock-0000000001",
                                      "a-lock-",
                                      "a-lock-000000001",    /* nine digits */
                                      "a-lock-00000000010",  /* eleven */
                                      "a-lock-2147483648",   /* over 32 bits */
                                      "a-lock--2147483649",
                                      "a-lock--00000001",
                                      "a-lock-000000000x",
                                      "a-lock-0000000001-lock-",
                                      "a-lock-0000000001 ",
                                      "a__READ__0000000001"};
    char name[128];
    int32_t number;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        assert_true(crpci_coordination_number(node(name, "_c_1", numbers[i]), &number));
        assert_int_equal(number, numbers[i]);
    }
    assert_true(crpci_coordination_number("a-lock-0000000001-lock-0000000002", &number));
    assert_int_equal(number, 2);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (crpci_coordination_number(bad[i], &number))
            fail_msg("\"%s\" has number %d", bad[i], (int)number);
    }
}

static void it_orders_numbers_round_the_end(void **state)
{
    static const int32_t in_order[] = {INT32_MAX - 1, INT32_MAX, INT32_MIN, INT32_MIN + 1};
    size_t i, k;
    (void)state;
    for (i = 0; i < 4; i++) {
        for (k = 0; k < 4; k++)
            assert_int_equal(crpci_coordination_earlier(in_order[i], in_order[k]), i < k);
    }
    assert_true(crpci_coordination_earlier(-1, 0));
    assert_true(crpci_coordination_earlier(9, 10)); /* as text it is not */
    assert_false(crpci_coordination_earlier(5, 5));
}

/* --- places ------------------------------------------------------------------------------------- */

static void expect(const char *what, const char *got, const char *want)
{
    if ((got == NULL) != (want == NULL) || (got && strcmp(got, want) != 0))
        fail_msg("%s is %s, not %s", what, got ? got : "none", want ? want : "none");
}

static void it_finds_its_place(void **state)
{
    char name[8][64];
    char *names[10];
    crpci_coordination_place p;
    (void)state;
    names[0] = (char *)node(name[0], "_c_d", INT32_MIN); /* the one after the largest number */
    names[1] = (char *)node(name[1], "_c_a", INT32_MAX - 1);
    names[2] = NULL;
    names[3] = (char *)node(name[3], "_c_c", INT32_MIN + 1);
    names[4] = (char *)"something else";
    names[5] = (char *)node(name[5], "_c_b", INT32_MAX);
    crpci_coordination_look(&p, names, 6, "_c_a");
    expect("first", p.first, name[1]);
    expect("own", p.own, name[1]);
    expect("before", p.before, NULL);
    expect("again", p.again, NULL);
    crpci_coordination_look(&p, names, 6, "_c_b");
    expect("before", p.before, name[1]);
    crpci_coordination_look(&p, names, 6, "_c_d");
    expect("before", p.before, name[5]);
    crpci_coordination_look(&p, names, 6, "_c_c");
    expect("before", p.before, name[0]);
    expect("first", p.first, name[1]);
    crpci_coordination_look(&p, names, 6, "_c_x"); /* not there */
    expect("own", p.own, NULL);
    expect("before", p.before, NULL);
    crpci_coordination_look(&p, names, 6, ""); /* one who only asks */
    expect("first", p.first, name[1]);
    expect("own", p.own, NULL);
    crpci_coordination_look(&p, NULL, 0, "_c_a");
    expect("first", p.first, NULL);
}

/* A creation without an answer was carried out all the same, perhaps twice. */
static void it_finds_its_node_again(void **state)
{
    char name[4][64];
    char *names[4];
    crpci_coordination_place p;
    (void)state;
    names[0] = (char *)node(name[0], "_c_b", 12);
    names[1] = (char *)node(name[1], "_c_a", 10);
    names[2] = (char *)node(name[2], "_c_b", 11);
    names[3] = (char *)node(name[3], "_c_bb", 9); /* another id: ids have one length */
    crpci_coordination_look(&p, names, 3, "_c_b");
    expect("own", p.own, name[2]);
    expect("again", p.again, name[0]);
    expect("before", p.before, name[1]);
}

/* --- arguments ---------------------------------------------------------------------------------- */

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

static void it_refuses_bad_operations(void **state)
{
    static char big[CRPC_NODE_BYTES_MAX + 1];
    crpc_loop *loop = loop_with(NULL);
    crpc_node_op ops[CRPC_NODE_OPS_MAX + 1], bad[10];
    crpc_registry *r;
    crpc_node node_out;
    size_t i;
    int counts[3] = {0, 0, 0};
    (void)state;
    memset(&node_out, 0, sizeof node_out);
    assert_int_equal(open_nowhere(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    bad[0] = crpc_node_get("a//b");
    bad[1] = crpc_node_get(NULL);
    bad[2] = crpc_node_check("a", 1); /* alone */
    bad[3] = crpc_node_create("a", crpc_view_str(""), 64);
    bad[4] = crpc_node_set("a", crpc_view_of(big, sizeof big), -1);
    bad[5] = crpc_node_set("a", crpc_view_str(""), -2);
    bad[6] = crpc_node_get("a");
    bad[6].verb = (crpc_node_verb)0;
    bad[7] = crpc_node_get("a");
    bad[7].verb = (crpc_node_verb)9;
    bad[8] = crpc_node_get("a");
    bad[8].flags = CRPC_NODE_EPHEMERAL;
    bad[9] = crpc_node_create("a/", crpc_view_str(""), 0);
    for (i = 0; i < 10; i++) {
        if (crpc_registry_call(r, &bad[i], 1, 10, &node_out) != CRPC_EINVAL ||
            !*node_out.error.text)
            fail_msg("operation %zu: \"%s\"", i, node_out.error.text);
        assert_int_equal(crpc_registry_call_async(r, &bad[i], 1, 10, on_node, counts), CRPC_EINVAL);
    }
    for (i = 0; i < CRPC_NODE_OPS_MAX + 1; i++)
        ops[i] = crpc_node_check("a", -1);
    assert_int_equal(crpc_registry_call(r, ops, CRPC_NODE_OPS_MAX + 1, 10, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_registry_call(r, ops, 0, 10, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_registry_call(r, NULL, 1, 10, NULL), CRPC_EINVAL);
    ops[1] = crpc_node_get("a"); /* reads nothing among others */
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL);
    ops[1] = crpc_node_create("a", crpc_view_str(""), CRPC_NODE_PARENTS);
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL);
    ops[0] = ops[1] = crpc_node_set("a", crpc_view_of(big, sizeof big / 2 + 1), -1);
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL); /* together too many */
    ops[0] = crpc_node_get("a");
    assert_int_equal(crpc_registry_call_async(r, ops, 1, 10, NULL, NULL), CRPC_EINVAL);
    assert_int_equal(counts[0], 0);
    crpc_node_reset(&node_out);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static void it_refuses_bad_watches_and_queues(void **state)
{
    static const char *const bad[] = {NULL, "a//b", "..", "a/"};
    crpc_loop *loop = loop_with(NULL);
    crpc_registry *r;
    crpc_election *e;
    crpc_lock *lock;
    crpc_id id;
    size_t i;
    (void)state;
    assert_int_equal(open_nowhere(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(crpc_config_watch(r, bad[i], on_config, NULL, &id), CRPC_EINVAL);
        assert_true(id.value == 0);
        assert_int_equal(crpc_lock_open(&lock, r, bad[i], NULL, on_lock, NULL), CRPC_EINVAL);
        assert_null(lock);
        assert_int_equal(
            crpc_election_open(&e, r, bad[i], crpc_view_str("me"), on_election, NULL), CRPC_EINVAL);
        assert_null(e);
    }
    assert_int_equal(crpc_lock_open(&lock, r, "", NULL, on_lock, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_lock_open(&lock, r, "/", NULL, on_lock, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_lock_open(&lock, r, "a", NULL, NULL, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_config_watch(r, "a", NULL, NULL, &id), CRPC_EINVAL);
    crpc_config_unwatch(r, id);
    crpc_lock_close(NULL);
    crpc_election_close(NULL);
    crpc_registry_close(NULL);
    crpc_registry_close(r);
    crpc_loop_close(loop);
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
    crpc_loop *loop = loop_with(NULL);
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

/* --- without a server --------------------------------------------------------------------------- */

static void it_says_that_nothing_was_sent(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpc_registry *r;
    crpc_node out;
    crpc_node_op op = crpc_node_set("a", crpc_view_str("1"), 3);
    int counts[3] = {0, 0, 0};
    (void)state;
    memset(&out, 0, sizeof out);
    assert_int_equal(open_nowhere(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    assert_int_equal(crpc_registry_call(r, &op, 1, 20, &out), CRPC_ECONN);
    assert_int_equal(out.error.sent, CRPC_SENT_NO);
    assert_false(out.error.remote);
    assert_string_equal(out.path, "a");
    assert_non_null(strstr(out.error.text, "set \"a\""));
    assert_int_equal(crpc_registry_call_async(r, &op, 1, 20, on_node, counts), CRPC_OK);
    while (!counts[0])
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(counts[1], CRPC_ECONN);
    assert_int_equal(counts[2], CRPC_SENT_NO);
    crpc_node_reset(&out);
    crpc_node_reset(&out);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static void it_ends_what_is_pending_once(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpc_registry *r;
    crpc_lock *lock;
    crpc_election *e;
    crpc_id id;
    crpc_node_op op = crpc_node_get("a");
    int counts[3] = {0, 0, 0}, locks[2] = {0, 0}, i;
    (void)state;
    assert_int_equal(open_nowhere(&r, loop, ct_free_port(), ""), CRPC_OK);
    for (i = 0; i < (int)CRPCI_COORDINATION_PENDING; i++)
        assert_int_equal(crpc_registry_call_async(r, &op, 1, 0, on_node, counts), CRPC_OK);
    assert_int_equal(crpc_registry_call_async(r, &op, 1, 0, on_node, counts), CRPC_ELIMIT);
    assert_int_equal(crpc_config_watch(r, "a", on_config, NULL, &id), CRPC_OK);
    assert_int_equal(crpc_lock_open(&lock, r, "l", "me", on_lock, locks), CRPC_OK);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_EBUSY);
    assert_true(crpc_lock_lease_us(lock) == 0);
    assert_int_equal(crpc_election_open(&e, r, "e", crpc_view_str("me"), on_election, NULL),
                     CRPC_OK);
    crpc_registry_close(r);
    assert_int_equal(counts[0], 0); /* not on the caller's stack */
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(counts[0], CRPCI_COORDINATION_PENDING);
    assert_int_equal(counts[1], CRPC_ECANCELED);
    assert_int_equal(locks[0], 1);
    assert_int_equal(locks[1], CRPC_ECANCELED);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_ECANCELED); /* handles outlive it */
    crpc_lock_release(lock);
    crpc_lock_close(lock);
    crpc_election_resign(e);
    crpc_election_close(e);
    crpc_loop_close(loop);
    assert_int_equal(counts[0], CRPCI_COORDINATION_PENDING);
}

/* An attempt ends in time, can be taken back, and begun again. */
static void it_tells_each_attempt_once(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpc_registry *r;
    crpc_lock *lock;
    int locks[2] = {0, 0};
    (void)state;
    assert_int_equal(open_nowhere(&r, loop, ct_free_port(), ""), CRPC_OK);
    assert_int_equal(crpc_lock_open(&lock, r, "l", NULL, on_lock, locks), CRPC_OK);
    crpc_lock_release(lock); /* nothing to release */
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(locks[0], 0);
    assert_int_equal(crpc_lock_acquire(lock, 10), CRPC_OK);
    while (locks[0] < 1)
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(locks[1], CRPC_ECONN);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    crpc_lock_release(lock);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_EBUSY); /* the end was not told yet */
    while (locks[0] < 2)
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(locks[1], CRPC_ECANCELED);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    crpc_lock_close(lock);
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(locks[0], 2); /* closed: nothing is told any more */
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static int use(const crpc_hooks *hooks, void *user)
{
    crpc_loop *loop = loop_with(hooks);
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
    err = open_nowhere(&r, loop, *(int *)user, "/root");
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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_puts_paths_below_the_root),
        CT_TEST(it_takes_paths_that_zookeeper_takes),
        CT_TEST(it_reads_numbers_of_ten_digits),
        CT_TEST(it_orders_numbers_round_the_end),
        CT_TEST(it_finds_its_place),
        CT_TEST(it_finds_its_node_again),
        CT_TEST(it_refuses_bad_operations),
        CT_TEST(it_refuses_bad_watches_and_queues),
        CT_TEST(it_refuses_bad_urls),
        CT_TEST(it_says_that_nothing_was_sent),
        CT_TEST(it_ends_what_is_pending_once),
        CT_TEST(it_tells_each_attempt_once),
        CT_TEST(it_leaves_nothing_behind),
    };
    return CT_RUN(tests);
}
