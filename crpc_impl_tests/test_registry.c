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

static void it_names_a_consumer_as_dubbo_would(void **state)
{
    crpci_registration r = golden_registration();
    char url[512];
    size_t n = crpci_registry_consumer_url(url, sizeof url, &r, "[::1]", 1700000000000, 42);
    (void)state;
    assert_int_equal(n, strlen(url));
    assert_string_equal(url, "consumer://[::1]/demo.Echo?application=my%20app&category=consumers"
                             "&check=false&group=g1&interface=demo.Echo&pid=42&side=consumer"
                             "&timestamp=1700000000000&version=1.0.0");
    r.application = r.group = r.version = NULL;
    crpci_registry_consumer_url(url, sizeof url, &r, "10.0.0.1", 5, 7);
    assert_string_equal(url, "consumer://10.0.0.1/demo.Echo?application=crpc&category=consumers"
                             "&check=false&interface=demo.Echo&pid=7&side=consumer&timestamp=5");
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
    assert_true(n.enabled);
    assert_true(n.disabled);
    assert_int_equal(n.warmup_ms, 0);
    ct_guard_free(g);
    assert_true(parse(&n, "crpc://10.0.0.1:1/S?enabled=false&enabled=true&warmup=600000&application=a", &g));
    assert_false(n.enabled);
    assert_false(n.disabled);
    assert_int_equal(n.warmup_ms, 600000);
    assert_string_equal(n.application, "a");
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
    memset(&q, 0, sizeof q);
    q.service = "S";
    q.group = group;
    for (i = 0; i < count; i++) {
        size_t n = urls[i] ? crpci_url_encode(NULL, 0, urls[i]) + 1 : 0;
        names[i] = n ? (char *)malloc(n) : NULL;
        if (n)
            crpci_url_encode(names[i], n, urls[i]);
    }
    s = crpci_registry_collect(h, names, count, &q, NULL, bad);
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
        "crpc://10.0.0.7:1/S?interface=S&disabled=true",
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

/* --- overrides ---------------------------------------------------------------------------------- */

/* Reads rules, applies them to the provider crpc://10.0.0.1:80/S (group g, version 1, application a)
 * and says what became of it: "weight warmup" or "off". */
static const char *overridden(crpci_heap *h, const char *const *urls, size_t count, size_t *bad)
{
    static char out[64];
    char provider[] = "crpc://10.0.0.1:80/S?interface=S&group=g&version=1&application=a&weight=7";
    crpci_registry_rules *rules;
    crpci_registry_query q;
    crpci_registry_node n;
    char *names[8];
    size_t i;
    memset(&q, 0, sizeof q);
    q.service = "S";
    q.application = "consumer";
    for (i = 0; i < count; i++) {
        size_t size = crpci_url_encode(NULL, 0, urls[i]) + 1;
        names[i] = (char *)malloc(size);
        crpci_url_encode(names[i], size, urls[i]);
    }
    rules = crpci_registry_rules_read(h, names, count, "10.0.0.9", bad);
    for (i = 0; i < count; i++)
        free(names[i]);
    if (!rules)
        return NULL;
    assert_true(crpci_registry_read(&n, provider));
    crpci_registry_rules_apply(rules, &q, &n);
    crpci_registry_rules_unref(rules);
    snprintf(out, sizeof out, n.disabled ? "off" : "%d %d", n.weight, n.warmup_ms);
    return out;
}

static void it_overrides_what_it_fits(void **state)
{
    static const struct {
        const char *url, *outcome;
    } rules[] = {
        {"override://0.0.0.0/S?category=configurators&dynamic=false&enabled=true&weight=200",
         "200 0"},
        {"override://[::]/S?weight=200", "200 0"},
        {"override://0.0.0.0/S?weight=-1", "0 0"},
        {"override://0.0.0.0/S?warmup=5000", "7 5000"},
        {"override://0.0.0.0/S?disabled=true", "off"},
        {"override://0.0.0.0/*?disabled=true", "off"},
        {"override://0.0.0.0?disabled=true", "off"},
        {"override://u:p@10.0.0.1:80/S?disabled=true", "off"},
        {"override://0.0.0.0:80/S?disabled=true", "off"},
        {"override://0.0.0.0/S?disabled=true&enabled=false", "7 0"},
        {"override://0.0.0.0/S?disabled=true&interface=S&group=g&version=1&application=a", "off"},
        {"override://0.0.0.0/S?disabled=true&application=consumer", "off"},
        {"override://0.0.0.0/S?disabled=true&group=*&version=*&application=*", "off"},
        {"override://10.0.0.9/S?disabled=true", "off"}, /* at this consumer */
        {"override://0.0.0.0:81/S?disabled=true", "7 0"},
        {"override://10.0.0.1:8/S?disabled=true", "7 0"},
        {"override://10.0.0.1/S?disabled=true", "7 0"}, /* at another consumer */
        {"override://10.0.0.11:80/S?disabled=true", "7 0"},
        {"override://[::1]:80/S?disabled=true", "7 0"},
        {"override://0.0.0.0/T?disabled=true", "7 0"},
        {"override://0.0.0.0/S?disabled=true&interface=T", "7 0"},
        {"override://0.0.0.0/S?disabled=true&group=h", "7 0"},
        {"override://0.0.0.0/S?disabled=true&version=2", "7 0"},
        {"override://0.0.0.0/S?disabled=true&application=b", "7 0"},
        {"override://0.0.0.0/S?timeout=5&loadbalance=random", "7 0"},
    };
    crpci_heap *h = heap(NULL);
    size_t i, bad;
    (void)state;
    for (i = 0; i < sizeof rules / sizeof *rules; i++) {
        const char *out = overridden(h, &rules[i].url, 1, &bad);
        if (!out || bad || strcmp(out, rules[i].outcome) != 0)
            fail_msg("%s: %s, not %s (bad: %zu)", rules[i].url, out, rules[i].outcome, bad);
    }
    crpci_heap_unref(h);
}

static void it_applies_overrides_in_dubbos_order(void **state)
{
    static const struct {
        const char *urls[3], *outcome;
    } rules[] = {
        {{"override://10.0.0.1:80/S?weight=1", "override://0.0.0.0/S?weight=2",
          "override://0.0.0.0/S?warmup=3"},
         "1 3"},
        {{"override://0.0.0.0/S?weight=1&priority=2", "override://0.0.0.0/S?weight=2&priority=1",
          "override://0.0.0.0/S?weight=3"},
         "1 0"},
        {{"override://10.0.0.1:80/S?weight=1", "override://0.0.0.0/S?weight=2&priority=9",
          "override://0.0.0.0/S?disabled=true"},
         "off"},
        {{"override://10.0.0.1:80/S?disabled=false", "override://0.0.0.0/S?weight=2",
          "override://0.0.0.0/S?disabled=true"},
         "2 0"},
    };
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                     {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    crpci_heap *h = heap(NULL);
    size_t i, k, bad;
    (void)state;
    for (i = 0; i < sizeof rules / sizeof *rules; i++) {
        for (k = 0; k < 6; k++) {
            const char *urls[3], *out;
            int n;
            for (n = 0; n < 3; n++)
                urls[n] = rules[i].urls[orders[k][n]];
            out = overridden(h, urls, 3, &bad);
            if (strcmp(out, rules[i].outcome) != 0)
                fail_msg("rules %zu, order %zu: %s, not %s", i, k, out, rules[i].outcome);
        }
    }
    crpci_heap_unref(h);
}

static void it_skips_what_is_no_override(void **state)
{
    static const char *const bad_ones[] = {
        "",
        "override",
        "override://",
        "override:///S?weight=1",
        "override://host.name/S?weight=1",
        "override://10.0.0.1:x/S?weight=1",
        "override://10.0.0.1:70000/S?weight=1",
        "override://::1/S?weight=1",
        "override://unix:/x?weight=1",
        "override://0.0.0.0/S?weight=heavy",
        "override://0.0.0.0/S?weight=1&warmup=-7",
        "override://0.0.0.0/S?weight=1&priority=high",
        "override://0.0.0.0/S?weight=1&providerAddresses=10.0.0.1:80",
        "override://0.0.0.0/S?weight=1&~zone=b",
        "override://0.0.0.0/S?weight=1&group=%2",
        "absent://0.0.0.0/S?weight=1",
        "crpc://10.0.0.1:80/S?weight=1",
    };
    crpci_heap *h = heap(NULL);
    size_t i, bad;
    (void)state;
    for (i = 0; i < sizeof bad_ones / sizeof *bad_ones; i++) {
        const char *urls[2], *out;
        urls[0] = bad_ones[i];
        urls[1] = "override://0.0.0.0/S?weight=9";
        out = overridden(h, urls, 2, &bad);
        if (strcmp(out, "9 0") != 0 || bad != 1)
            fail_msg("\"%s\": %s, %zu bad", bad_ones[i], out, bad);
    }
    crpci_heap_unref(h);
}

/* --- subscribers -------------------------------------------------------------------------------- */

static char lines[2048]; /* what was logged */

static void on_line(void *user, int level, const char *line)
{
    size_t n = strlen(lines);
    (void)user;
    (void)level;
    snprintf(lines + n, sizeof lines - n, "%s\n", line);
}

/* What was pushed, one word for each list: its count, and "s" if it is stale. */
static char pushed[64];
static bool refuse;

static int on_push(void *user, crpci_snapshot *list)
{
    size_t n = strlen(pushed);
    (void)user;
    if (refuse)
        return CRPC_ENOMEM;
    snprintf(pushed + n, sizeof pushed - n, "%zu%s ", list->count, list->stale ? "s" : "");
    return CRPC_OK;
}

static void expect_pushed(const char *what)
{
    assert_string_equal(pushed, what);
    pushed[0] = '\0';
}

static void it_keeps_the_last_good_list(void **state)
{
    crpci_snapshot *none, *one, *same, *two;
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_registry_query q;
    crpci_registry_sub sub;
    crpci_cond cond;
    int round;
    (void)state;
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.log = on_line;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    none = crpci_registry_snapshot(loop->heap, 0);
    one = crpci_registry_snapshot(loop->heap, 1);
    same = crpci_registry_snapshot(loop->heap, 1);
    two = crpci_registry_snapshot(loop->heap, 2);
    memset(&q, 0, sizeof q);
    q.service = "S";
    for (round = 0; round < 2; round++) {
        q.allow_empty = round == 1;
        pushed[0] = lines[0] = '\0';
        memset(&sub, 0, sizeof sub);
        assert_true(crpci_registry_sub_init(&sub, loop, &cond, &q, on_push, NULL));
        crpci_loop_lock(loop);
        assert_true(crpci_registry_age(&sub)); /* nothing to be called stale yet */
        assert_true(crpci_registry_offer(&sub, none, false));
        expect_pushed("0 "); /* the first is news, empty or not */
        assert_true(crpci_registry_offer(&sub, none, true));
        expect_pushed("");
        refuse = true;
        assert_false(crpci_registry_offer(&sub, one, true));
        refuse = false;
        assert_true(crpci_registry_offer(&sub, one, true));
        expect_pushed("1 ");
        assert_true(crpci_registry_offer(&sub, same, true));
        expect_pushed("");
        assert_true(crpci_registry_offer(&sub, two, true));
        expect_pushed("2 ");
        assert_string_equal(lines, "");
        assert_true(crpci_registry_offer(&sub, none, false)); /* something was unreadable */
        expect_pushed("2s ");
        assert_non_null(strstr(lines, "no provider of S is left"));
        lines[0] = '\0';
        assert_true(crpci_registry_offer(&sub, none, false)); /* said once, pushed once */
        assert_true(crpci_registry_age(&sub));
        expect_pushed("");
        assert_string_equal(lines, "");
        assert_true(crpci_registry_offer(&sub, none, true));
        expect_pushed(q.allow_empty ? "0 " : "");
        assert_true(crpci_registry_offer(&sub, two, true)); /* good again */
        expect_pushed("2 ");
        refuse = true;
        assert_false(crpci_registry_age(&sub));
        refuse = false;
        assert_true(crpci_registry_age(&sub));
        expect_pushed("2s ");
        assert_true(crpci_registry_offer(&sub, two, true));
        expect_pushed("2 ");
        assert_true(crpci_registry_offer(&sub, none, false)); /* and again after it was good */
        assert_non_null(strstr(lines, "no provider of S is left"));
        expect_pushed("2s ");
        crpci_registry_sub_end(&sub);
        assert_true(crpci_registry_offer(&sub, one, true));
        expect_pushed("");
        crpci_loop_unlock(loop);
        crpci_registry_sub_clear(&sub);
    }
    crpci_registry_snapshot_unref(none);
    crpci_registry_snapshot_unref(one);
    crpci_registry_snapshot_unref(same);
    crpci_registry_snapshot_unref(two);
    crpci_thread_cond_free(&cond);
    crpc_loop_close(loop);
}

/* --- the cache file ----------------------------------------------------------------------------- */

static char *one_name[] = {(char *)"crpc%3A%2F%2F10.0.0.1%3A1%2FS"};
static char *two_names[] = {(char *)"crpc%3A%2F%2F10.0.0.1%3A1%2FS", (char *)"b"};

/* Writes a file and loads it; how many directories it gave. */
static size_t cached(crpci_heap *h, const char *path, const char *text, size_t len)
{
    crpci_registry_cache c;
    crpci_list *i;
    size_t n = 0;
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, len, f), len);
    fclose(f);
    assert_true(crpci_registry_cache_init(&c, h, path, 0));
    crpci_registry_cache_load(&c);
    for (i = c.entries.next; i != &c.entries; i = i->next)
        n++;
    crpci_registry_cache_clear(&c);
    return n;
}

static crpci_heap *silent_heap(void)
{
    crpc_hooks hooks = ct_hooks();
    hooks.log_level = -1;
    return heap(&hooks);
}

static void it_takes_a_cache_file_whole_or_not_at_all(void **state)
{
    static const char wrong_format[] = "crpc-cache 1\nX y\nC ";
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], text[128];
    crpci_registry_cache c;
    size_t size, len, i;
    char *good;
    int bit;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(crpci_registry_cache_init(&c, h, path, 0));
    assert_true(crpci_registry_cache_put(&c, "zookeeper://a:1/dubbo/S/providers", two_names, 2));
    assert_true(crpci_registry_cache_put(&c, "zookeeper://a:1/dubbo/T/providers", one_name, 1));
    good = crpci_registry_cache_format(&c, false, &size);
    assert_non_null(good);
    len = strlen(good);
    assert_int_equal(cached(h, path, good, len), 2);
    for (i = 0; i < len; i++) {
        if (cached(h, path, good, i) != 0)
            fail_msg("cut to %zu of %zu bytes it was taken", i, len);
    }
    for (i = 0; i < len; i++) {
        for (bit = 0; bit < 9; bit++) {
            char was = good[i];
            good[i] = (char)(was ^ (bit < 8 ? 1 << bit : 0xff));
            if (cached(h, path, good, len) != 0)
                fail_msg("with byte %zu of %zu changed it was taken", i, len);
            good[i] = was;
        }
    }
    crpci_heap_free(h, good, size);
    crpci_registry_cache_clear(&c);
    /* whose sum is right, but not the rest */
    len = (size_t)snprintf(text, sizeof text, "%s%08x\n", wrong_format,
                           (unsigned)crpci_registry_crc(wrong_format, strlen(wrong_format) - 2));
    assert_int_equal(cached(h, path, text, len), 0);
    assert_int_equal(crpci_registry_crc("123456789", 9), 0xcbf43926u);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

/* What the file gives for a directory: its names, with a space behind each. */
static const char *recalled(crpci_heap *h, const char *path, const char *key)
{
    static char out[128];
    crpci_registry_cache c;
    crpci_registry_names names;
    size_t i, n = 0;
    out[0] = '\0';
    assert_true(crpci_registry_cache_init(&c, h, path, 0));
    crpci_registry_cache_load(&c);
    crpci_registry_cache_get(&c, key, &names);
    for (i = 0; i < names.count; i++)
        n += (size_t)snprintf(out + n, sizeof out - n, "%s ", names.name[i]);
    crpci_registry_names_free(h, &names);
    crpci_registry_cache_clear(&c);
    return out;
}

static bool write_cache(crpci_registry_cache *c, crpci_heap *h)
{
    size_t size;
    char *mine = crpci_registry_cache_format(c, true, &size);
    bool ok = mine && crpci_registry_cache_write(h, c->path, mine);
    crpci_heap_free(h, mine, size);
    return ok;
}

static void it_shares_its_cache_file(void **state)
{
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], temp[140];
    crpci_registry_cache a, b;
    struct stat before, after;
    int fd;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    snprintf(temp, sizeof temp, "%s.tmp", path);
    assert_true(crpci_registry_cache_init(&a, h, path, 0));
    assert_true(crpci_registry_cache_init(&b, h, path, 0));
    assert_true(crpci_registry_cache_put(&a, "S", one_name, 1));
    assert_true(crpci_registry_cache_put(&a, "rules", one_name, 1));
    assert_true(crpci_registry_cache_put(&b, "T", two_names, 2));
    assert_true(write_cache(&a, h));
    assert_true(write_cache(&b, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    assert_string_equal(recalled(h, path, "T"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    /* what is loaded and not read since is not written over what others read */
    crpci_registry_cache_load(&b);
    assert_true(crpci_registry_cache_put(&a, "S", two_names, 2));
    assert_true(write_cache(&a, h));
    assert_true(crpci_registry_cache_put(&b, "T", one_name, 1));
    assert_true(write_cache(&b, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    assert_string_equal(recalled(h, path, "T"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    /* what is empty now is forgotten */
    assert_string_equal(recalled(h, path, "rules"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    assert_true(crpci_registry_cache_put(&a, "rules", NULL, 0));
    assert_true(write_cache(&a, h));
    assert_string_equal(recalled(h, path, "rules"), "");
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    /* what is in the file already is not written again */
    assert_int_equal(stat(path, &before), 0);
    assert_true(write_cache(&a, h));
    assert_int_equal(stat(path, &after), 0);
    assert_true(before.st_ino == after.st_ino && before.st_mtim.tv_nsec == after.st_mtim.tv_nsec);
    assert_int_equal(access(temp, F_OK), -1);
    /* who comes while another one writes comes again later; one that died holds nobody up */
    fd = crpci_registry_cache_lock(temp);
    assert_true(fd >= 0);
    assert_true(crpci_registry_cache_put(&a, "S", one_name, 1));
    assert_false(write_cache(&a, h));
    close(fd);
    assert_int_equal(access(temp, F_OK), 0);
    assert_true(write_cache(&a, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    crpci_registry_cache_clear(&a);
    crpci_registry_cache_clear(&b);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

static int64_t clock_of_test;

static int64_t test_clock(void *user)
{
    (void)user;
    return clock_of_test;
}

static void it_spares_the_flash(void **state)
{
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_registry_cache c;
    crpci_cond cond;
    ct_dir dir = ct_dir_make();
    char path[128];
    int writes = 0, second;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.clock_us = test_clock;
    clock_of_test = 5000000;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    assert_true(crpci_registry_cache_init(&c, loop->heap, path, 0));
    assert_true(crpci_registry_cache_due(&c) == INT64_MAX);
    for (second = 0; second < 3600; second++) { /* an hour of flapping */
        clock_of_test += 1000000;
        crpci_loop_lock(loop);
        assert_true(crpci_registry_cache_put(&c, "S", two_names, 1 + (size_t)second % 2));
        if (crpci_registry_cache_due(&c) <= clock_of_test) {
            crpci_registry_cache_save(&c, loop, &cond);
            writes++;
        }
        crpci_loop_unlock(loop);
    }
    assert_true(writes <= 60);
    assert_true(writes >= 59);
    crpci_registry_cache_clear(&c);
    crpci_thread_cond_free(&cond);
    crpc_loop_close(loop);
    ct_dir_remove(dir);
}

static int cache_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_registry_cache c;
    crpci_registry_names names;
    crpci_heap *h;
    bool ok;
    int err = crpci_heap_open(&h, hooks, 0);
    if (err)
        return err;
    h->hooks.log_level = -1;
    ok = crpci_registry_cache_init(&c, h, (const char *)user, 0);
    if (ok)
        crpci_registry_cache_load(&c);
    ok = ok && crpci_registry_cache_put(&c, "S", one_name, 1) &&
         crpci_registry_cache_put(&c, "S", two_names, 2) &&
         crpci_registry_cache_put(&c, "T", NULL, 0) && write_cache(&c, h);
    if (ok) {
        crpci_registry_cache_get(&c, "S", &names);
        ok = names.count == 2;
        crpci_registry_names_free(h, &names);
    }
    crpci_registry_cache_clear(&c);
    crpci_heap_unref(h);
    return ok ? CRPC_OK : CRPC_ENOMEM;
}

static void it_caches_in_want_of_memory(void **state)
{
    ct_dir dir = ct_dir_make();
    char path[128];
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(ct_sweep(cache_scenario, path) > 10);
    ct_dir_remove(dir);
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
    b->providers[0].warmup_ms = 1;
    assert_false(crpci_registry_snapshot_equal(a, b));
    b->providers[0].warmup_ms = 0;
    b->stale = true;
    assert_false(crpci_registry_snapshot_equal(a, b));
    b->stale = false;
    assert_true(crpci_registry_snapshot_equal(a, b));
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
        CT_TEST(it_names_a_consumer_as_dubbo_would),
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
        CT_TEST(it_overrides_what_it_fits),
        CT_TEST(it_applies_overrides_in_dubbos_order),
        CT_TEST(it_skips_what_is_no_override),
        CT_TEST(it_keeps_the_last_good_list),
        CT_TEST(it_takes_a_cache_file_whole_or_not_at_all),
        CT_TEST(it_shares_its_cache_file),
        CT_TEST(it_spares_the_flash),
        CT_TEST(it_caches_in_want_of_memory),
        CT_TEST(it_counts_references),
        CT_TEST(it_refuses_what_overflows),
        CT_TEST(it_tells_lists_apart),
        CT_TEST(it_survives_want_of_memory),
        CT_TEST(it_knows_no_other_scheme),
    };
    return CT_RUN(tests);
}
