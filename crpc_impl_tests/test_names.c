/* impl-names: the URLs by which providers are known, and what operators override. */
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

static crpci_names_service golden_registration(void)
{
    crpci_names_service r;
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
static bool parse(crpci_names_node *n, const char *name, ct_guard *g)
{
    *g = ct_guard_make(name, strlen(name) + 1);
    return crpci_names_parse(n, (char *)g->data);
}

static bool parses(const char *name)
{
    crpci_names_node n;
    ct_guard g;
    bool ok = parse(&n, name, &g);
    ct_guard_free(g);
    return ok;
}

/* --- node names --------------------------------------------------------------------------------- */

static void it_names_a_node_as_dubbo_would(void **state)
{
    crpci_names_service r = golden_registration();
    char url[512], name[1024];
    size_t n = crpci_names_url(url, sizeof url, &r, false, "10.0.0.1:8000", 1700000000000, 42);
    (void)state;
    assert_int_equal(n, strlen(url));
    assert_int_equal(crpci_url_encode(name, sizeof name, url), strlen(GOLDEN));
    assert_string_equal(name, GOLDEN);
}

static void it_names_a_consumer_as_dubbo_would(void **state)
{
    crpci_names_service r = golden_registration();
    char url[512];
    size_t n = crpci_names_url(url, sizeof url, &r, true, "[::1]", 1700000000000, 42);
    (void)state;
    assert_int_equal(n, strlen(url));
    assert_string_equal(url, "consumer://[::1]/demo.Echo?application=my%20app&category=consumers"
                             "&check=false&group=g1&interface=demo.Echo&pid=42&side=consumer"
                             "&timestamp=1700000000000&version=1.0.0");
    r.application = r.group = r.version = NULL;
    crpci_names_url(url, sizeof url, &r, true, "10.0.0.1", 5, 7);
    assert_string_equal(url, "consumer://10.0.0.1/demo.Echo?application=crpc&category=consumers"
                             "&check=false&interface=demo.Echo&pid=7&side=consumer&timestamp=5");
}

static void it_leaves_out_what_is_empty(void **state)
{
    crpci_names_service r;
    char url[512];
    (void)state;
    memset(&r, 0, sizeof r);
    r.service = "S";
    r.group = "";
    r.weight = -1;
    crpci_names_url(url, sizeof url, &r, false, "[::1]:1", 5, 7);
    assert_string_equal(url, "crpc://[::1]:1/S?application=crpc&category=providers&dynamic=true"
                             "&enabled=true&interface=S&pid=7&side=provider&timestamp=5&weight=0");
    r.version = "1";
    r.warmup_ms = 60000;
    crpci_names_url(url, sizeof url, &r, false, "[::1]:1", 5, 7);
    assert_string_equal(url, "crpc://[::1]:1/S?application=crpc&category=providers&dynamic=true"
                             "&enabled=true&interface=S&pid=7&side=provider&timestamp=5&version=1"
                             "&warmup=60000&weight=0");
}

static void the_length_of_a_url_that_does_not_fit_is_known(void **state)
{
    crpci_names_service r = golden_registration();
    char full[512];
    size_t need = crpci_names_url(full, sizeof full, &r, false, "10.0.0.1:8000", 1, 2), size;
    (void)state;
    for (size = 0; size <= need + 1; size++) {
        ct_guard g = ct_guard_make(NULL, size ? size : 1);
        char *out = size ? (char *)g.data : NULL;
        assert_int_equal(crpci_names_url(out, size, &r, false, "10.0.0.1:8000", 1, 2), need);
        if (size) {
            assert_int_equal(strlen(out), size - 1 < need ? size - 1 : need);
            assert_memory_equal(out, full, strlen(out));
        }
        ct_guard_free(g);
    }
}

static void it_reads_what_it_writes(void **state)
{
    crpci_names_node n;
    ct_guard g;
    (void)state;
    assert_true(parse(&n, GOLDEN, &g));
    assert_string_equal(n.scheme, "crpc");
    assert_string_equal(n.provider.address, "10.0.0.1:8000");
    assert_string_equal(n.of.service, "demo.Echo");
    assert_string_equal(n.of.group, "g1");
    assert_string_equal(n.of.version, "1.0.0");
    assert_true(n.enabled);
    assert_int_equal(n.of.weight, 100);
    assert_true(n.provider.timestamp_ms == 1700000000000);
    ct_guard_free(g);
}

static void it_carries_any_character(void **state)
{
    static const char odd[] = "a&b=c%d+e f#g?h\x01\x7f\xc3\xa4/";
    crpci_names_service r = golden_registration();
    crpci_names_node n;
    char url[512], name[1024];
    ct_guard g;
    (void)state;
    r.group = odd;
    r.version = "&enabled=false";
    crpci_names_url(url, sizeof url, &r, false, "10.0.0.1:8000", 1, 2);
    crpci_url_encode(name, sizeof name, url);
    assert_true(parse(&n, name, &g));
    assert_string_equal(n.of.group, odd);
    assert_string_equal(n.of.version, "&enabled=false");
    assert_true(n.enabled);
    ct_guard_free(g);
}

static void it_reads_dubbos_own(void **state)
{
    crpci_names_node n;
    ct_guard g;
    char name[512], url[512];
    (void)state;
    assert_true(parse(&n, GOLDEN_DUBBO, &g));
    assert_string_equal(n.scheme, "dubbo");
    assert_string_equal(n.provider.address, "10.0.0.1:20880");
    assert_string_equal(n.of.service, "demo.Greeter");
    ct_guard_free(g);
    strcpy(url, GOLDEN_DUBBO);
    assert_true(crpci_url_decode(url));
    crpci_url_encode(name, sizeof name, url);
    assert_string_equal(name, GOLDEN_DUBBO);
}

static void it_has_defaults(void **state)
{
    crpci_names_node n;
    ct_guard g;
    (void)state;
    assert_true(parse(&n, "brpc%3A%2F%2Fuser%3Asecret%4010.0.0.1%3A08000", &g));
    assert_string_equal(n.scheme, "brpc");
    assert_string_equal(n.provider.address, "10.0.0.1:8000");
    assert_string_equal(n.of.service, "");
    assert_string_equal(n.of.group, "");
    assert_string_equal(n.of.version, "");
    assert_true(n.enabled);
    assert_int_equal(n.of.weight, 100);
    assert_true(n.provider.timestamp_ms == 0);
    ct_guard_free(g);
    assert_true(parse(&n, "crpc://[0:0::1]:1/S?weight=x&timestamp=-5&enabled=true&a&=&disabled=true", &g));
    assert_string_equal(n.provider.address, "[::1]:1");
    assert_int_equal(n.of.weight, 100);
    assert_true(n.provider.timestamp_ms == 0);
    assert_true(n.enabled);
    assert_true(n.provider.disabled);
    assert_int_equal(n.of.warmup_ms, 0);
    ct_guard_free(g);
    assert_true(parse(&n, "crpc://10.0.0.1:1/S?enabled=false&enabled=true&warmup=600000&application=a", &g));
    assert_false(n.enabled);
    assert_false(n.provider.disabled);
    assert_int_equal(n.of.warmup_ms, 600000);
    assert_string_equal(n.of.application, "a");
    ct_guard_free(g);
}

static void names_that_are_not_providers_are_refused(void **state)
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
        if (crpci_names_match(rules[i].want, rules[i].have) != rules[i].match)
            fail_msg("\"%s\" of \"%s\"", rules[i].want ? rules[i].want : "NULL", rules[i].have);
    }
}

/* --- overrides ---------------------------------------------------------------------------------- */

/* Reads rules, applies them to the provider crpc://10.0.0.1:80/S (group g, version 1, application a)
 * and says what became of it: "weight warmup" or "off". */
static const char *overridden(crpci_heap *h, const char *const *urls, size_t count, size_t *bad)
{
    static char out[64];
    char provider[] = "crpc://10.0.0.1:80/S?interface=S&group=g&version=1&application=a&weight=7";
    crpci_names_overrides *rules;
    crpci_names_service q;
    crpci_names_node n;
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
    rules = crpci_names_overrides_read(h, names, count, "10.0.0.9", bad);
    for (i = 0; i < count; i++)
        free(names[i]);
    if (!rules)
        return NULL;
    assert_true(crpci_names_read(&n, provider));
    crpci_names_overrides_apply(rules, &q, &n.provider);
    crpci_names_overrides_unref(rules);
    snprintf(out, sizeof out, n.provider.disabled ? "off" : "%d %d", n.provider.weight, n.provider.warmup_ms);
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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_names_a_node_as_dubbo_would),
        CT_TEST(it_names_a_consumer_as_dubbo_would),
        CT_TEST(it_leaves_out_what_is_empty),
        CT_TEST(the_length_of_a_url_that_does_not_fit_is_known),
        CT_TEST(it_reads_what_it_writes),
        CT_TEST(it_carries_any_character),
        CT_TEST(it_reads_dubbos_own),
        CT_TEST(it_has_defaults),
        CT_TEST(names_that_are_not_providers_are_refused),
        CT_TEST(it_reads_cut_and_changed_names_safely),
        CT_TEST(it_matches_groups_and_versions),
        CT_TEST(it_overrides_what_it_fits),
        CT_TEST(it_applies_overrides_in_dubbos_order),
        CT_TEST(it_skips_what_is_no_override),
    };
    return CT_RUN(tests);
}
