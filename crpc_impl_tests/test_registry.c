/* Provider lists, and the node names that providers are known by. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* What java.net.URLEncoder makes of a provider's URL. */
#define GOLDEN                                                                                     \
    "crpc%3A%2F%2F10.0.0.1%3A8000%2Fdemo.Echo%3Fapplication%3Dmy%2520app%26category%3Dproviders"   \
    "%26dynamic%3Dtrue%26enabled%3Dtrue%26group%3Dg1%26interface%3Ddemo.Echo%26methods%3DLogin"    \
    "%2CRegister%26pid%3D42%26side%3Dprovider%26timestamp%3D1700000000000%26version%3D1.0.0"       \
    "%26weight%3D100"

#define GOLDEN_DUBBO                                                                               \
    "dubbo%3A%2F%2F10.0.0.1%3A20880%2Fdemo.Greeter%3Fapplication%3Dapp%26dubbo%3D2.0.2%26dynamic"  \
    "%3Dtrue%26enabled%3Dtrue%26generic%3Dfalse%26group%3Dg1%26interface%3Ddemo.Greeter%26methods" \
    "%3DSayHello%2CSayBye%26pid%3D1%26release%3Dx%26side%3Dprovider%26timestamp%3D1700000000000"   \
    "%26version%3D1.0.0%26weight%3D100"

static crpci_heap *heap(const crpc_hooks *hooks)
{
    crpci_heap *h;
    crpc_hooks of_test = ct_hooks();
    assert_int_equal(crpci_heap_open(&h, hooks ? hooks : &of_test, 0), CRPC_OK);
    return h;
}

static crpci_registration golden_registration(void)
{
    crpci_registration r;
    memset(&r, 0, sizeof r);
    r.service = "demo.Echo";
    r.group = "g1";
    r.version = "1.0.0";
    r.application = "my app";
    r.methods = "Login,Register";
    r.weight = 100;
    return r;
}

/* Parses a copy that ends where memory does. */
static bool parse(crpci_registry_node *n, const char *name, ct_guard *g)
{
    *g = ct_guard_make(name, strlen(name) + 1);
    return crpci_registry_parse(n, (char *)g->data);
}

static bool parses(const char *name)
{
    crpci_registry_node n;
    ct_guard g;
    bool ok = parse(&n, name, &g);
    ct_guard_free(g);
    return ok;
}

/* --- node names --------------------------------------------------------------------------------- */

static void it_names_a_node_as_dubbo_would(void **state)
{
    crpci_registration r = golden_registration();
    char url[512], name[1024];
    size_t n = crpci_registry_url(url, sizeof url, &r, "10.0.0.1:8000", 1700000000000, 42);
    (void)state;
    assert_int_equal(n, strlen(url));
    assert_int_equal(crpci_url_encode(name, sizeof name, url), strlen(GOLDEN));
    assert_string_equal(name, GOLDEN);
}

static void it_leaves_out_what_is_empty(void **state)
{
    crpci_registration r;
    char url[512];
    (void)state;
    memset(&r, 0, sizeof r);
    r.service = "S";
    r.group = "";
    r.weight = -1;
    crpci_registry_url(url, sizeof url, &r, "[::1]:1", 5, 7);
    assert_string_equal(url, "crpc://[::1]:1/S?application=crpc&category=providers&dynamic=true"
                             "&enabled=true&interface=S&pid=7&side=provider&timestamp=5&weight=0");
    r.version = "1";
    r.warmup_ms = 60000;
    crpci_registry_url(url, sizeof url, &r, "[::1]:1", 5, 7);
    assert_string_equal(url, "crpc://[::1]:1/S?application=crpc&category=providers&dynamic=true"
                             "&enabled=true&interface=S&pid=7&side=provider&timestamp=5&version=1"
                             "&warmup=60000&weight=0");
}

static void it_measures_what_does_not_fit(void **state)
{
    crpci_registration r = golden_registration();
    char full[512];
    size_t need = crpci_registry_url(full, sizeof full, &r, "10.0.0.1:8000", 1, 2), size;
    (void)state;
    for (size = 0; size <= need + 1; size++) {
        ct_guard g = ct_guard_make(NULL, size ? size : 1);
        char *out = size ? (char *)g.data : NULL;
        assert_int_equal(crpci_registry_url(out, size, &r, "10.0.0.1:8000", 1, 2), need);
        if (size) {
            assert_int_equal(strlen(out), size - 1 < need ? size - 1 : need);
            assert_memory_equal(out, full, strlen(out));
        }
        ct_guard_free(g);
    }
}

static void it_reads_what_it_writes(void **state)
{
    crpci_registry_node n;
    ct_guard g;
    (void)state;
    assert_true(parse(&n, GOLDEN, &g));
    assert_string_equal(n.scheme, "crpc");
    assert_string_equal(n.address, "10.0.0.1:8000");
    assert_string_equal(n.service, "demo.Echo");
    assert_string_equal(n.group, "g1");
    assert_string_equal(n.version, "1.0.0");
    assert_true(n.enabled);
    assert_int_equal(n.weight, 100);
    assert_true(n.timestamp_ms == 1700000000000);
    ct_guard_free(g);
}

static void it_carries_any_character(void **state)
{
    static const char odd[] = "a&b=c%d+e f#g?h\x01\x7f\xc3\xa4/";
    crpci_registration r = golden_registration();
    crpci_registry_node n;
    char url[512], name[1024];
    ct_guard g;
    (void)state;
    r.group = odd;
    r.version = "&enabled=false";
    crpci_registry_url(url, sizeof url, &r, "10.0.0.1:8000", 1, 2);
    crpci_url_encode(name, sizeof name, url);
    assert_true(parse(&n, name, &g));
    assert_string_equal(n.group, odd);
    assert_string_equal(n.version, "&enabled=false");
    assert_true(n.enabled);
    ct_guard_free(g);
}

static void it_reads_dubbos_own(void **state)
{
    crpci_registry_node n;
    ct_guard g;
    char name[512], url[512];
    (void)state;
    assert_true(parse(&n, GOLDEN_DUBBO, &g));
    assert_string_equal(n.scheme, "dubbo");
    assert_string_equal(n.address, "10.0.0.1:20880");
    assert_string_equal(n.service, "demo.Greeter");
    ct_guard_free(g);
    strcpy(url, GOLDEN_DUBBO);
    assert_true(crpci_url_decode(url));
    crpci_url_encode(name, sizeof name, url);
    assert_string_equal(name, GOLDEN_DUBBO);
}

static void it_has_defaults(void **state)
{
    crpci_registry_node n;
    ct_guard g;
    (void)state;
    assert_true(parse(&n, "brpc%3A%2F%2Fuser%3Asecret%4010.0.0.1%3A08000", &g));
    assert_string_equal(n.scheme, "brpc");
    assert_string_equal(n.address, "10.0.0.1:8000");
    assert_string_equal(n.service, "");
    assert_string_equal(n.group, "");
    assert_string_equal(n.version, "");
    assert_true(n.enabled);
    assert_int_equal(n.weight, 100);
    assert_true(n.timestamp_ms == 0);
    ct_guard_free(g);
    assert_true(parse(&n, "crpc://[0:0::1]:1/S?weight=x&timestamp=-5&enabled=true&a&=&disabled=true", &g));
    assert_string_equal(n.address, "[::1]:1");
    assert_int_equal(n.weight, 100);
    assert_true(n.timestamp_ms == 0);
    assert_false(n.enabled);
    ct_guard_free(g);
}

static void it_refuses_what_is_no_provider(void **state)
{
    static const char *const bad[] = {
        "",
        "://",
        "crpc",
        "://10.0.0.1:1",
        "crpc://",
        "crpc://10.0.0.1",
        "crpc://10.0.0.1:0",
        "crpc://10.0.0.1:65536",
        "crpc://10.0.0.1:-1",
        "crpc://10.0.0.1:",
        "crpc://host.name:1",
        "crpc://::1:1",
        "crpc://unix:/x",
        "crpc://unix:1",
        "crpc://10.0.0.1:1%",
        "crpc://10.0.0.1:1%4",
        "crpc://10.0.0.1:1%00",
        "crpc://10.0.0.1:1?group=%252",
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (parses(bad[i]))
            fail_msg("\"%s\" was taken", bad[i]);
    }
}

static void it_reads_cut_and_changed_names_safely(void **state)
{
    char name[] = GOLDEN;
    size_t i;
    int k;
    (void)state;
    for (i = 0; i < sizeof name; i++) {
        char cut[sizeof name];
        memcpy(cut, name, i);
        cut[i] = '\0';
        parses(cut);
    }
    for (k = 0; k < 20000; k++) {
        char changed[sizeof name];
        memcpy(changed, name, sizeof name);
        for (i = ct_random() % 4 + 1; i; i--)
            changed[ct_random() % (sizeof name - 1)] = "%&=?/:@[]\x01zA0"[ct_random() % 13];
        parses(changed);
    }
}

/* --- what a consumer takes ---------------------------------------------------------------------- */

static void it_matches_groups_and_versions(void **state)
{
    static const struct {
        const char *want, *have;
        bool match;
    } rules[] = {
        {NULL, "", true},      {"", "", true},         {"", "g", false},      {NULL, "g", false},
        {"g", "", false},      {"g", "g", true},       {"g", "gg", false},    {"gg", "g", false},
        {"*", "", true},       {"*", "g", true},       {"a,b", "a", true},    {"a,b", "b", true},
        {"a,b", "c", false},   {"a,b", "", false},     {"ab,b", "b", true},   {"ab,c", "b", false},
        {"a,bc", "b", false},  {"a,b,c", "c", true},   {",", "", false},      {"a,", "a", true},
        {"g", "*", false},     {"a,b", "a,b", true},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof rules / sizeof *rules; i++) {
        if (crpci_registry_match(rules[i].want, rules[i].have) != rules[i].match)
            fail_msg("\"%s\" of \"%s\"", rules[i].want ? rules[i].want : "NULL", rules[i].have);
    }
}

static crpci_snapshot *collect(crpci_heap *h, const char *const *urls, size_t count,
                               const char *group, size_t *bad)
{
    crpci_registry_query q;
    crpci_snapshot *s;
    char *names[16];
    size_t i;
    q.service = "S";
    q.group = group;
    q.version = NULL;
    for (i = 0; i < count; i++) {
        size_t n = urls[i] ? crpci_url_encode(NULL, 0, urls[i]) + 1 : 0;
        names[i] = n ? (char *)malloc(n) : NULL;
        if (n)
            crpci_url_encode(names[i], n, urls[i]);
    }
    s = crpci_registry_collect(h, names, count, &q, bad);
    for (i = 0; i < count; i++)
        free(names[i]);
    return s;
}

static void it_lists_each_address_once(void **state)
{
    static const char *const urls[] = {
        "crpc://10.0.0.2:1/S?interface=S&timestamp=10&weight=1",
        "crpc://10.0.0.1:1/S?interface=S",
        "crpc://10.0.0.2:1/S?interface=S&timestamp=30&weight=3",
        "crpc://10.0.0.2:01/S?interface=S&timestamp=20&weight=2",
        "dubbo://10.0.0.3:1/S?interface=S",
        "crpc://10.0.0.4:1/S?interface=Other",
        "crpc://10.0.0.5:1/S?interface=S&enabled=false",
        "crpc://10.0.0.6:1/S?interface=S&group=g",
        "baidu_std://[::1]:1/S",
        "nonsense",
        NULL,
    };
    crpci_heap *h = heap(NULL);
    size_t bad;
    crpci_snapshot *s = collect(h, urls, sizeof urls / sizeof *urls, NULL, &bad);
    (void)state;
    assert_non_null(s);
    assert_int_equal(bad, 2);
    assert_int_equal(s->count, 3);
    assert_string_equal(s->providers[0].address, "10.0.0.1:1");
    assert_int_equal(s->providers[0].weight, 100);
    assert_string_equal(s->providers[1].address, "10.0.0.2:1");
    assert_int_equal(s->providers[1].weight, 3); /* the newest */
    assert_true(s->providers[1].timestamp_ms == 30);
    assert_string_equal(s->providers[2].address, "[::1]:1");
    crpci_registry_snapshot_unref(s);
    s = collect(h, urls, sizeof urls / sizeof *urls, "g", &bad);
    assert_int_equal(s->count, 1);
    assert_string_equal(s->providers[0].address, "10.0.0.6:1");
    crpci_registry_snapshot_unref(s);
    s = collect(h, urls, 0, NULL, &bad);
    assert_int_equal(s->count, 0);
    crpci_registry_snapshot_unref(s);
    crpci_heap_unref(h);
}

/* --- lists -------------------------------------------------------------------------------------- */

static void it_counts_references(void **state)
{
    crpci_heap *h = heap(NULL);
    crpci_snapshot *s = crpci_registry_snapshot(h, 3);
    (void)state;
    assert_int_equal(s->count, 3);
    assert_int_equal((uintptr_t)s->providers % 8, 0);
    strcpy(s->providers[2].address, "x");
    crpci_registry_snapshot_ref(s);
    crpci_registry_snapshot_unref(s);
    crpci_heap_unref(h); /* the list holds it */
    assert_string_equal(s->providers[2].address, "x");
    crpci_registry_snapshot_unref(s);
    crpci_registry_snapshot_unref(NULL);
}

static void it_refuses_what_overflows(void **state)
{
    crpci_heap *h = heap(NULL);
    (void)state;
    assert_null(crpci_registry_snapshot(h, SIZE_MAX));
    assert_null(crpci_registry_snapshot(h, SIZE_MAX / sizeof(crpci_provider)));
    crpci_heap_unref(h);
}

static void it_tells_lists_apart(void **state)
{
    crpci_heap *h = heap(NULL);
    crpci_snapshot *a = crpci_registry_snapshot(h, 2), *b = crpci_registry_snapshot(h, 2);
    crpci_snapshot *c = crpci_registry_snapshot(h, 1);
    (void)state;
    assert_true(crpci_registry_snapshot_equal(a, b));
    assert_false(crpci_registry_snapshot_equal(a, c));
    b->providers[1].weight = 1;
    assert_false(crpci_registry_snapshot_equal(a, b));
    b->providers[1].weight = 0;
    b->providers[0].timestamp_ms = 1;
    assert_false(crpci_registry_snapshot_equal(a, b));
    b->providers[0].timestamp_ms = 0;
    b->providers[0].address[0] = 'x';
    assert_false(crpci_registry_snapshot_equal(a, b));
    crpci_registry_snapshot_unref(a);
    crpci_registry_snapshot_unref(b);
    crpci_registry_snapshot_unref(c);
    crpci_heap_unref(h);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    static const char *const urls[] = {"crpc://10.0.0.1:1/S", "crpc://10.0.0.2:1/S"};
    crpci_heap *h;
    crpci_snapshot *s;
    size_t bad;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    s = collect(h, urls, 2, NULL, &bad);
    if (s)
        assert_int_equal(s->count, 2);
    crpci_registry_snapshot_unref(s);
    crpci_heap_unref(h);
    return s ? CRPC_OK : CRPC_ENOMEM;
}

static void it_survives_want_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(scenario, NULL), 3);
}

/* --- opening ------------------------------------------------------------------------------------ */

static void it_knows_no_other_scheme(void **state)
{
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_registry *r = (crpci_registry *)(void *)&o;
    crpc_error error;
    crpci_url url;
    (void)state;
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_url_parse(&url, "etcd://10.0.0.1:1/x", &error), CRPC_OK);
    assert_int_equal(crpci_registry_open(loop, &url, NULL, &r, &error), CRPC_EUNSUPPORTED);
    assert_null(r);
    assert_non_null(strstr(error.text, "etcd"));
    crpci_registry_close(NULL);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_names_a_node_as_dubbo_would),
        CT_TEST(it_leaves_out_what_is_empty),
        CT_TEST(it_measures_what_does_not_fit),
        CT_TEST(it_reads_what_it_writes),
        CT_TEST(it_carries_any_character),
        CT_TEST(it_reads_dubbos_own),
        CT_TEST(it_has_defaults),
        CT_TEST(it_refuses_what_is_no_provider),
        CT_TEST(it_reads_cut_and_changed_names_safely),
        CT_TEST(it_matches_groups_and_versions),
        CT_TEST(it_lists_each_address_once),
        CT_TEST(it_counts_references),
        CT_TEST(it_refuses_what_overflows),
        CT_TEST(it_tells_lists_apart),
        CT_TEST(it_survives_want_of_memory),
        CT_TEST(it_knows_no_other_scheme),
    };
    return CT_RUN(tests);
}
