/* What the ZooKeeper registry decides without a server: addresses, paths, answers, waits. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static char lines[2048]; /* what was logged */

static void on_log(void *user, int level, const char *line)
{
    size_t n = strlen(lines);
    (void)user;
    (void)level;
    snprintf(lines + n, sizeof lines - n, "%s\n", line);
}

/* "many": four addresses, one twice; "none": fails; "bad": says nonsense */
static int on_resolve(void *user, const char *host, char *addresses, size_t size)
{
    (void)user;
    if (strcmp(host, "many") == 0)
        snprintf(addresses, size, "10.0.0.1,::1,10.0.0.2,10.0.0.1");
    else if (strcmp(host, "bad") == 0)
        snprintf(addresses, size, "%s", "not.a.number,,");
    else
        return CRPC_ERESOLVE;
    return CRPC_OK;
}

static crpc_loop *loop_with(const crpc_hooks *hooks)
{
    crpc_loop_options o;
    crpc_loop *loop;
    memset(&o, 0, sizeof o);
    o.hooks = hooks ? *hooks : ct_hooks();
    o.hooks.resolve = on_resolve;
    o.hooks.log = on_log;
    lines[0] = '\0';
    return crpc_loop_open(&loop, &o) ? NULL : loop;
}

/* A session that was not begun. */
static int session(crpc_loop *loop, const char *authority, crpci_zookeeper **s, crpc_error *error)
{
    crpci_directory_options o;
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = 4000;
    return crpci_zookeeper_new(loop, authority, &o, s, error);
}

/* --- servers ------------------------------------------------------------------------------------ */

static void expect_hosts(const char *authority, size_t count, const char *const *parts)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_zookeeper *s;
    crpc_error error;
    size_t i, n = 1, cut = 0;
    char *mapped;
    const char *p;
    if (session(loop, authority, &s, &error))
        fail_msg("%s: %s", authority, error.text);
    while ((mapped = strstr(s->hosts, "::ffff:")) != NULL) { /* see crpci_zookeeper_maps_v4 */
        assert_true(crpci_zookeeper_maps_v4());
        memmove(mapped, mapped + 7, strlen(mapped + 7) + 1);
        cut += 7;
    }
    for (p = s->hosts; *p; p++)
        n += *p == ',';
    if (n != count || s->server_count != count)
        fail_msg("%s gives %s", authority, s->hosts);
    for (i = 0; i < count; i++) {
        size_t len = strlen(parts[i]);
        p = strstr(s->hosts, parts[i]);
        while (p && !((p == s->hosts || p[-1] == ',') && (p[len] == ',' || p[len] == '\0')))
            p = strstr(p + 1, parts[i]);
        if (!p)
            fail_msg("%s gives %s without %s", authority, s->hosts, parts[i]);
    }
    memset(s->hosts + strlen(s->hosts), 'x', cut); /* the block is freed by its length */
    crpci_zookeeper_free(s);
    crpc_loop_close(loop);
}

static void it_lists_numeric_servers(void **state)
{
    static const char *const one[] = {"10.0.0.1:2181"};
    static const char *const v6[] = {"::1:2182", "fe80::1:2181", "10.0.0.1:2183"};
    static const char *const many[] = {"10.0.0.1:7", "::1:7", "10.0.0.2:7"};
    static const char *const mixed[] = {"10.0.0.9:2181"};
    (void)state;
    expect_hosts("10.0.0.1", 1, one);
    expect_hosts("10.0.0.1:2181", 1, one);
    expect_hosts("10.0.0.1,10.0.0.1:2181,", 1, one);
    expect_hosts("[::1]:2182,[fe80::1],10.0.0.1:2183", 3, v6);
    expect_hosts("many:7", 3, many);
    expect_hosts("none:1,10.0.0.9,bad:2", 1, mixed); /* one bad name among good ones */
}

static void it_refuses_bad_servers(void **state)
{
    static const struct {
        const char *authority;
        int status;
    } bad[] = {
        {"", CRPC_EINVAL},
        {",", CRPC_EINVAL},
        {":2181", CRPC_EINVAL},
        {"10.0.0.1:x", CRPC_EINVAL},
        {"10.0.0.1:70000", CRPC_EINVAL},
        {"::1:2181", CRPC_EINVAL},
        {"[::1", CRPC_EINVAL},
        {"10.0.0.1,,10.0.0.2", CRPC_EINVAL},
        {"10.0.0.1:0", CRPC_ERESOLVE},
        {"none", CRPC_ERESOLVE},
        {"bad:1,none:2", CRPC_ERESOLVE},
    };
    crpc_loop *loop = loop_with(NULL);
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        crpci_zookeeper *s;
        crpc_error error;
        int err = session(loop, bad[i].authority, &s, &error);
        if (err != bad[i].status || s || !*error.text)
            fail_msg("\"%s\": %s (%s)", bad[i].authority, crpc_status_name(err), error.text);
    }
    crpc_loop_close(loop);
}

static void it_shuffles_servers(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    int first[4] = {0, 0, 0, 0}, i;
    (void)state;
    for (i = 0; i < 400; i++) {
        crpci_zookeeper *s;
        assert_int_equal(session(loop, "10.0.0.0,10.0.0.1,10.0.0.2,10.0.0.3", &s, NULL), CRPC_OK);
        first[strchr(s->hosts, '.')[5] - '0']++; /* 10.0.0.N */
        crpci_zookeeper_free(s);
    }
    for (i = 0; i < 4; i++) {
        if (first[i] < 50)
            fail_msg("server %d is the first in %d of 400", i, first[i]);
    }
    crpc_loop_close(loop);
}

static void it_finds_its_own_address(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_zookeeper *s;
    char host[INET6_ADDRSTRLEN];
    (void)state;
    assert_int_equal(session(loop, "127.0.0.1", &s, NULL), CRPC_OK);
    assert_true(crpci_zookeeper_local_host(s, false, host, sizeof host));
    assert_string_equal(host, "127.0.0.1");
    crpci_zookeeper_free(s);
    crpc_loop_close(loop);
}

static void it_sees_who_accepts(void **state)
{
    crpci_addr a;
    char text[32];
    int fd;
    (void)state;
    assert_true(crpci_sock_parse(&a, "127.0.0.1:0"));
    fd = crpci_sock_listen(&a);
    assert_true(fd >= 0);
    crpci_sock_local(fd, &a);
    assert_true(crpci_zookeeper_reachable(&a));
    close(fd);
    snprintf(text, sizeof text, "127.0.0.1:%d", ct_free_port());
    assert_true(crpci_sock_parse(&a, text));
    assert_false(crpci_zookeeper_reachable(&a));
}

/* --- paths -------------------------------------------------------------------------------------- */

static void it_takes_roots_that_zookeeper_takes(void **state)
{
    static const struct {
        const char *path, *root;
    } roots[] = {
        {"", "/dubbo"}, {"/", "/dubbo"},  {"a", "/a"},   {"a/", "/a"},      {"a/b.c/d", "/a/b.c/d"},
        {"a//b", NULL}, {"a/../b", NULL}, {".", NULL},   {"a\x01", NULL},   {"..", NULL},
        {"/a", NULL},   {"...", "/..."},  {".a", "/.a"}, {"a b", "/a b"},
    };
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    size_t i;
    (void)state;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    for (i = 0; i < sizeof roots / sizeof *roots; i++) {
        char *root = NULL;
        int err = crpci_zookeeper_root(h, roots[i].path, &root, NULL);
        if (err != (roots[i].root ? CRPC_OK : CRPC_EINVAL) ||
            (root && strcmp(root, roots[i].root) != 0))
            fail_msg("\"%s\" gives %s", roots[i].path, root ? root : "an error");
        crpci_heap_strfree(h, root);
    }
    crpci_heap_unref(h);
}

/* Plays the server to a MKDIR: the first `there` parts exist. Returns the requests made. */
static int make(const char *path, size_t there, bool allowed)
{
    crpci_zookeeper_task t;
    char dir[64];
    int requests = 0, made = 0;
    memset(&t, 0, sizeof t);
    strcpy(dir, path);
    t.dir = dir;
    t.made = strlen(dir);
    while (made == 0) {
        size_t depth = 0, i;
        for (i = 0; i < t.made; i++)
            depth += dir[i] == '/';
        assert_true(dir[t.made] == '/' || dir[t.made] == '\0');
        if (++requests > 20)
            fail_msg("no end");
        made = crpci_zookeeper_made(&t, depth <= there      ? ZNODEEXISTS
                                        : depth > there + 1 ? ZNONODE
                                        : allowed           ? ZOK
                                                            : ZNOAUTH);
        if (depth == there + 1 && allowed)
            there++;
    }
    assert_int_equal(made, allowed || there == 3 ? 1 : -1);
    return requests;
}

static void it_makes_directories_from_below(void **state)
{
    (void)state;
    assert_int_equal(make("/a/b/c", 3, true), 1);
    assert_int_equal(make("/a/b/c", 2, true), 1);
    assert_int_equal(make("/a/b/c", 1, true), 3);
    assert_int_equal(make("/a/b/c", 0, true), 5);
    make("/a/b/c", 0, false);
    make("/a/b/c", 1, false);
    make("/a/b/c", 3, false);
}

/* --- registrations ------------------------------------------------------------------------------ */

static void it_knows_a_twin(void **state)
{
    crpci_zookeeper_reg reg;
    char path[256], name[256];
    static const struct {
        const char *url;
        bool twin;
    } names[] = {
        {"crpc://10.0.0.1:80/S?pid=1&timestamp=5", false}, /* itself */
        {"crpc://10.0.0.1:80/S?pid=2&timestamp=6", true},
        {"crpc://10.0.0.1:80/S", true},
        {"crpc://10.0.0.1:8/S?pid=1", false},
        {"crpc://10.0.0.1:800/S?pid=1", false},
        {"crpc://10.0.0.1:80", false},
        {"dubbo://10.0.0.1:80/S", false},
        {"", false},
    };
    size_t i, n;
    (void)state;
    memset(&reg, 0, sizeof reg);
    strcpy(reg.offer.address, "10.0.0.1:80");
    n = (size_t)snprintf(path, sizeof path, "/dubbo/S/providers/");
    crpci_url_encode(path + n, sizeof path - n, names[0].url);
    reg.path = path;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        crpci_url_encode(name, sizeof name, names[i].url);
        if (crpci_zookeeper_is_twin(&reg, name) != names[i].twin)
            fail_msg("%s", names[i].url);
    }
}

/* --- answers ------------------------------------------------------------------------------------ */

static void it_tells_lost_from_refused(void **state)
{
    static const int lost[] = {ZCONNECTIONLOSS, ZOPERATIONTIMEOUT,     ZSESSIONEXPIRED,
                               ZINVALIDSTATE,   ZCLOSING,              ZSESSIONMOVED,
                               ZSYSTEMERROR,    ZRUNTIMEINCONSISTENCY, ZMARSHALLINGERROR};
    static const int answers[] = {ZOK,     ZNONODE,      ZNODEEXISTS, ZNOAUTH,
                                  ZBADARGUMENTS, ZUNIMPLEMENTED, ZBADVERSION, ZNOTREADONLY, ZINVALIDACL, ZNOCHILDRENFOREPHEMERALS};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof lost / sizeof *lost; i++)
        assert_true(crpci_zookeeper_lost(lost[i]));
    for (i = 0; i < sizeof answers / sizeof *answers; i++)
        assert_false(crpci_zookeeper_lost(answers[i]));
}

/* --- waits -------------------------------------------------------------------------------------- */

static void it_waits_with_jitter_and_bounds(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_zookeeper *s;
    unsigned n;
    int i;
    int64_t low = INT64_MAX, high = 0;
    (void)state;
    assert_int_equal(session(loop, "10.0.0.1", &s, NULL), CRPC_OK);
    for (n = 0; n < 200; n++) {
        int64_t us = crpci_zookeeper_backoff(s, n);
        assert_true(us >= 300000 && us <= CRPCI_ZOOKEEPER_BACKOFF_US * 3 / 2);
    }
    for (i = 0; i < 1000; i++) {
        int64_t us = crpci_zookeeper_spread(s, 1000000, 20);
        low = us < low ? us : low;
        high = us > high ? us : high;
    }
    assert_true(low >= 800000 && low < 850000 && high <= 1200000 && high > 1150000);
    low = INT64_MAX;
    high = 0;
    for (i = 0; i < 1000; i++) { /* the first session after a lost one: 0 to 2 s */
        int64_t us = crpci_zookeeper_delay(s);
        low = us < low ? us : low;
        high = us > high ? us : high;
    }
    assert_true(low >= 0 && low < 100000 && high <= 2000000 && high > 1900000);
    s->timeout_ms = 400; /* and half of a short session */
    for (i = 0; i < 1000; i++)
        assert_true(crpci_zookeeper_delay(s) <= 200000);
    s->spread_us = 0;
    assert_true(crpci_zookeeper_delay(s) == 0);
    s->negotiated_ms = 1000;
    assert_true(crpci_zookeeper_pace(s) == 1000000);
    s->negotiated_ms = 15000;
    assert_true(crpci_zookeeper_pace(s) == 3750000);
    assert_true(crpci_zookeeper_patience(s) == 30000000);
    crpci_zookeeper_free(s);
    crpc_loop_close(loop);
}

static int64_t clock_of_client;

static int64_t client_clock(void *user)
{
    (void)user;
    return clock_of_client;
}

/* 500 devices with one image lose their sessions when a registry is started anew. All they differ in
 * is some microseconds of the time since they were switched on. */
static void it_spreads_a_fleet(void **state)
{
    crpc_hooks hooks = ct_hooks();
    int bucket[20], i, most = 0;
    (void)state;
    memset(bucket, 0, sizeof bucket);
    hooks.clock_us = client_clock;
    for (i = 0; i < 500; i++) {
        crpci_directory_options o;
        crpci_zookeeper *s;
        crpc_loop *loop;
        int at;
        clock_of_client = 30000000 + 3 * i;
        loop = loop_with(&hooks);
        assert_non_null(loop);
        memset(&o, 0, sizeof o);
        o.session_timeout_ms = CRPCI_ZOOKEEPER_TIMEOUT_MS;
        assert_int_equal(crpci_zookeeper_new(loop, "10.0.0.1", &o, &s, NULL), CRPC_OK);
        at = (int)(crpci_zookeeper_delay(s) / 100000);
        assert_in_range(at, 0, 19);
        bucket[at]++;
        crpci_zookeeper_free(s);
        crpc_loop_close(loop);
    }
    for (i = 0; i < 20; i++)
        most = bucket[i] > most ? bucket[i] : most;
    if (most > 50) /* twice what an even spread of 2 s gives each 100 ms */
        fail_msg("%d of 500 come within 100 ms", most);
}

/* --- the interface without a server ------------------------------------------------------------- */

static int on_push(void *user, crpci_snapshot *list)
{
    (void)user;
    (void)list;
    return CRPC_OK;
}

static void on_status(void *user, int status, const char *text)
{
    (void)user;
    (void)status;
    (void)text;
}

static int use(const crpc_hooks *hooks, void *user)
{
    crpc_loop *loop = loop_with(hooks);
    crpci_backend *r = NULL, *again = NULL;
    crpci_directory_options o;
    crpci_names_service q;
    crpci_names_service what;
    char text[64];
    crpci_subscriber *sub;
    void *reg;
    int err;
    if (!loop)
        return CRPC_ENOMEM;
    snprintf(text, sizeof text, "zookeeper://127.0.0.1:%d", *(int *)user);
    memset(&o, 0, sizeof o);
    memset(&q, 0, sizeof q);
    o.register_consumer = true;
    q.service = "S";
    err = crpci_open_registry(loop, text, &o, &r, NULL);
    err = err ? err : crpci_open_registry(loop, text, NULL, &again, NULL);
    if (!err)
        err = crpci_directory_subscribe(again, &q, on_push, NULL, &sub);
    q.group = "g";
    q.version = "1";
    if (!err)
        err = crpci_directory_subscribe(r, &q, on_push, NULL, &sub);
    memset(&what, 0, sizeof what);
    what.service = "S";
    what.address = ":80";
    if (!err)
        err = crpci_directory_enroll(r, &what, on_status, NULL, &reg);
    if (!err)
        crpci_directory_withdraw(r, reg);
    if (!err)
        err = crpci_directory_enroll(again, &what, NULL, NULL, &reg);
    crpci_directory_close(r);
    crpci_directory_close(again);
    crpc_loop_close(loop);
    return err;
}

static void it_leaves_nothing_behind(void **state)
{
    int port = ct_free_port();
    (void)state;
    assert_true(ct_sweep(use, &port) > 20);
}

static void it_refuses_what_cannot_be_a_node(void **state)
{
    static const char *const bad[] = {"", ".", "..", "a/b", "a\nb", NULL};
    crpc_loop *loop = loop_with(NULL);
    crpci_names_service what;
    crpci_names_service q;
    crpci_backend *r;
    crpci_subscriber *sub;
    void *handle = loop;
    size_t i;
    (void)state;
    assert_int_equal(crpci_open_registry(loop, "zookeeper://127.0.0.1:1/root", NULL, &r, NULL), CRPC_OK);
    memset(&what, 0, sizeof what);
    memset(&q, 0, sizeof q);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        what.service = bad[i];
        what.address = ":80";
        assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
        assert_null(handle);
        q.service = bad[i];
        assert_int_equal(crpci_directory_subscribe(r, &q, on_push, NULL, &sub), CRPC_EINVAL);
        assert_null(sub);
    }
    what.service = "S";
    what.address = NULL;
    assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    what.address = "host.name:80";
    assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    crpci_directory_unsubscribe(r, NULL);
    crpci_directory_withdraw(r, NULL);
    crpci_directory_close(r);
    crpc_loop_close(loop);
}

static void it_shares_what_is_the_same(void **state)
{
    static const struct {
        const char *url, *credential, *cache;
        int timeout_ms;
        bool same;
    } others[] = {
        {"zookeeper://127.0.0.1:1/a", NULL, NULL, 0, true},
        /* another root is another directory */
        {"zookeeper://127.0.0.1:1/b/c", NULL, NULL, 15000, true},
        {"zookeeper://127.0.0.1:1/a", "u:p", NULL, 0, false},
        {"zookeeper://127.0.0.1:1/a", NULL, NULL, 4000, false},
        {"zookeeper://127.0.0.1:1/a", NULL, "/nowhere/cache", 0, false},
        {"zookeeper://127.0.0.1:2/a", NULL, NULL, 0, false},
    };
    crpc_loop *loop = loop_with(NULL);
    crpci_backend *first, *r;
    size_t i;
    (void)state;
    assert_int_equal(crpci_open_registry(loop, others[0].url, NULL, &first, NULL), CRPC_OK);
    for (i = 0; i < sizeof others / sizeof *others; i++) {
        crpci_directory_options o;
        crpci_zookeeper *a, *b;
        memset(&o, 0, sizeof o);
        o.session_timeout_ms = others[i].timeout_ms;
        o.credential = others[i].credential;
        o.cache = others[i].cache;
        assert_int_equal(crpci_open_registry(loop, others[i].url, &o, &r, NULL), CRPC_OK);
        a = ((crpci_zookeeper_registry *)(void *)first)->session;
        b = ((crpci_zookeeper_registry *)(void *)r)->session;
        assert_int_equal(a == b, others[i].same);
        crpci_directory_close(r);
    }
    crpci_directory_close(first);
    assert_true(crpci_list_empty(&loop->registries));
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_lists_numeric_servers),
        CT_TEST(it_refuses_bad_servers),
        CT_TEST(it_shuffles_servers),
        CT_TEST(it_finds_its_own_address),
        CT_TEST(it_sees_who_accepts),
        CT_TEST(it_takes_roots_that_zookeeper_takes),
        CT_TEST(it_makes_directories_from_below),
        CT_TEST(it_knows_a_twin),
        CT_TEST(it_tells_lost_from_refused),
        CT_TEST(it_waits_with_jitter_and_bounds),
        CT_TEST(it_spreads_a_fleet),
        CT_TEST(it_leaves_nothing_behind),
        CT_TEST(it_refuses_what_cannot_be_a_node),
        CT_TEST(it_shares_what_is_the_same),
    };
    return CT_RUN(tests);
}
