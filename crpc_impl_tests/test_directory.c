/* impl-directory: lists of providers, and who is told of them. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_heap *heap(const crpc_hooks *hooks)
{
    crpci_heap *h;
    crpc_hooks of_test = ct_hooks();
    assert_int_equal(crpci_heap_open(&h, hooks ? hooks : &of_test, 0), CRPC_OK);
    return h;
}

static crpci_snapshot *collect(crpci_heap *h, const char *const *urls, size_t count,
                               const char *group, size_t *bad)
{
    crpci_names_service q;
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
    s = crpci_directory_collect(h, names, count, &q, NULL, bad);
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
    crpci_directory_snapshot_unref(s);
    s = collect(h, urls, sizeof urls / sizeof *urls, "g", &bad);
    assert_int_equal(s->count, 1);
    assert_string_equal(s->providers[0].address, "10.0.0.6:1");
    crpci_directory_snapshot_unref(s);
    s = collect(h, urls, 0, NULL, &bad);
    assert_int_equal(s->count, 0);
    crpci_directory_snapshot_unref(s);
    crpci_heap_unref(h);
}

/* A registry is shared with other software, whose providers may have host names; and a provider that
 * was told to register "any address" must not be dialled there. */
static void it_judges_only_nodes_of_its_own_schemes(void **state)
{
    static const char *const urls[] = {
        "dubbo://host.name:20880/S?interface=S", "tri://[::1]/S",           "rest:///",
        "crpc://10.0.0.1:1/S",                    "crpc://0.0.0.0:1/S",      "crpc://[::]:1/S",
        "crpc://224.0.0.1:1/S",                   "crpc://[ff02::1]:1/S",    "brpc://host.name:1/S",
    };
    crpci_heap *h = heap(NULL);
    size_t bad;
    crpci_snapshot *s = collect(h, urls, sizeof urls / sizeof *urls, NULL, &bad);
    (void)state;
    assert_non_null(s);
    assert_int_equal(s->count, 1);
    assert_string_equal(s->providers[0].address, "10.0.0.1:1");
    assert_int_equal(bad, 5);
    crpci_directory_snapshot_unref(s);
    crpci_heap_unref(h);
}

/* --- what is registered ------------------------------------------------------------------------- */

static void it_takes_addresses(void **state)
{
    static const struct {
        const char *text, *address; /* "": found later; NULL: refused */
        bool v4;
    } addresses[] = {
        {"10.0.0.1:80", "10.0.0.1:80", false}, {"[::1]:080", "[::1]:80", false},
        {":80", "", false},       {"0.0.0.0:80", "", true},     {"[::]:80", "", false},
        {"10.0.0.1", NULL, false}, {"10.0.0.1:0", NULL, false}, {"host:80", NULL, false},
        {"", NULL, false},        {"unix:/x", NULL, false},     {"::1:80", NULL, false},
        {"10.0.0.1:99999", NULL, false},
    };
    crpci_heap *h = heap(NULL);
    crpci_directory_offer offer;
    crpci_names_service what;
    size_t i;
    (void)state;
    memset(&what, 0, sizeof what);
    what.service = "S";
    for (i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        int err;
        what.address = addresses[i].text;
        err = crpci_directory_offer_init(&offer, h, &what, NULL, NULL);
        if (err != (addresses[i].address ? CRPC_OK : CRPC_EINVAL) ||
            (!err && (strcmp(offer.address, addresses[i].address) != 0 ||
                      offer.auto_host != !*addresses[i].address || offer.port != 80 ||
                      offer.v4 != addresses[i].v4)))
            fail_msg("\"%s\": %d, \"%s\"", addresses[i].text, err, offer.address);
        crpci_names_release(h, &offer.what);
    }
    crpci_heap_unref(h);
}

static void it_follows_the_address_of_its_host(void **state)
{
    crpci_heap *h = heap(NULL);
    crpci_directory_offer offer;
    crpci_names_service what;
    (void)state;
    memset(&what, 0, sizeof what);
    what.service = "S";
    what.address = ":80";
    assert_int_equal(crpci_directory_offer_init(&offer, h, &what, NULL, NULL), CRPC_OK);
    assert_true(crpci_directory_offer_move(&offer, "10.0.0.1"));
    assert_string_equal(offer.address, "10.0.0.1:80");
    assert_false(crpci_directory_offer_move(&offer, "10.0.0.1"));
    assert_true(crpci_directory_offer_move(&offer, "::1"));
    assert_string_equal(offer.address, "[::1]:80");
    crpci_names_release(h, &offer.what);
    what.address = NULL; /* a consumer */
    assert_int_equal(crpci_directory_offer_init(&offer, h, &what, NULL, NULL), CRPC_OK);
    assert_true(crpci_directory_offer_move(&offer, "10.0.0.1"));
    assert_string_equal(offer.address, "10.0.0.1");
    assert_true(crpci_directory_offer_move(&offer, "::1"));
    assert_string_equal(offer.address, "[::1]");
    crpci_names_release(h, &offer.what);
    crpci_heap_unref(h);
}

/* --- subscribers -------------------------------------------------------------------------------- */

#define HOLD_US 3000000

static char lines[2048]; /* what was logged */

static void on_line(void *user, int level, const char *line)
{
    size_t n = strlen(lines);
    (void)user;
    (void)level;
    snprintf(lines + n, sizeof lines - n, "%s\n", line);
}

static int64_t clock_of_test;

static int64_t test_clock(void *user)
{
    (void)user;
    return clock_of_test;
}

/* A directory without a backend. */
typedef struct fixture {
    crpci_directory directory;
    crpci_cache cache;
    crpc_loop *loop;
    const char *group; /* of the providers that are read */
    bool freed;
} fixture;

/* One subscriber: what was pushed, as "1 2* 3 (stale)", the last byte of each address and a star
 * behind a weight other than 100. */
typedef struct reader {
    crpci_subscriber *sub;
    char pushed[256];
    bool refuse;
    bool leave;
    bool lose; /* the registry goes away while the callback runs */
} reader;

static void on_free(crpci_directory *d)
{
    CRPCI_CONTAINER(d, fixture, directory)->freed = true;
}

static int begin(fixture *f, const crpc_hooks *hooks)
{
    crpc_loop_options o;
    int err;
    memset(f, 0, sizeof *f);
    f->group = "";
    memset(&o, 0, sizeof o);
    lines[0] = '\0';
    o.hooks = *hooks;
    o.hooks.log = on_line;
    o.hooks.clock_us = test_clock;
    err = crpc_loop_open(&f->loop, &o);
    if (err)
        return err;
    return crpci_directory_init(&f->directory, f->loop,
                                crpci_heap_format(f->loop->heap, "test://%s", "x"), on_free)
               ? CRPC_OK
               : CRPC_ENOMEM;
}

static void start(fixture *f)
{
    crpc_hooks hooks = ct_hooks();
    assert_int_equal(begin(f, &hooks), CRPC_OK);
}

static void end(fixture *f)
{
    if (f->directory.refs) {
        crpci_loop_lock(f->loop);
        crpci_directory_end(&f->directory);
        crpci_loop_unlock(f->loop);
        assert_true(f->freed);
    }
    crpc_loop_close(f->loop);
}

static int on_push(void *user, crpci_snapshot *list)
{
    reader *r = (reader *)user;
    size_t i, n = strlen(r->pushed);
    if (r->refuse)
        return CRPC_ENOMEM;
    for (i = 0; i < list->count; i++)
        n += (size_t)snprintf(r->pushed + n, sizeof r->pushed - n, "%c%s ",
                              list->providers[i].address[7],
                              list->providers[i].weight == 100 ? "" : "*");
    snprintf(r->pushed + n, sizeof r->pushed - n, "%s%s", list->count ? "" : "none ",
             list->stale ? "(stale) " : "");
    if (r->leave) {
        crpc_loop *l = r->sub->directory->loop;
        crpci_loop_lock(l);
        crpci_directory_remove(r->sub);
        crpci_loop_unlock(l);
    }
    if (r->lose) {
        crpc_loop *l = r->sub->directory->loop;
        crpci_loop_lock(l);
        assert_false(crpci_directory_age(r->sub->directory)); /* a pass is under way */
        crpci_loop_unlock(l);
    }
    return CRPC_OK;
}

static bool join(fixture *f, reader *r, const char *service, bool allow_empty)
{
    crpci_names_service want;
    memset(r, 0, sizeof *r);
    memset(&want, 0, sizeof want);
    want.service = service;
    want.group = "*";
    want.allow_empty = allow_empty;
    crpci_loop_lock(f->loop);
    r->sub = crpci_directory_add(&f->directory, sizeof *r->sub, &want, on_push, r);
    crpci_loop_unlock(f->loop);
    return r->sub != NULL;
}

/* The backend has read providers of S: "12" are 10.0.0.1:1 and 10.0.0.2:1; 'x' is unreadable. */
static bool read_names(fixture *f, const char *hosts, bool whole)
{
    crpci_directory_report report;
    char text[8][96], *names[8];
    size_t i;
    bool complete;
    for (i = 0; hosts[i]; i++) {
        names[i] = text[i];
        snprintf(text[i], sizeof text[i],
                 "crpc%%3A%%2F%%2F10.0.0.%c%%3A1%%2FS%%3Fgroup%%3D%s%%26application%%3Dapp", hosts[i],
                 f->group);
    }
    crpci_loop_lock(f->loop);
    report.names = names;
    report.count = i;
    report.whole = whole;
    complete = crpci_directory_update(&f->directory, &report);
    crpci_loop_unlock(f->loop);
    return complete;
}

static bool age(fixture *f)
{
    bool complete;
    crpci_loop_lock(f->loop);
    complete = crpci_directory_age(&f->directory);
    crpci_loop_unlock(f->loop);
    return complete;
}

static int override(fixture *f, const char *url)
{
    char text[200], *name = text;
    int changed;
    if (url)
        crpci_url_encode(text, sizeof text, url);
    crpci_loop_lock(f->loop);
    changed = crpci_directory_override(&f->directory, &name, url != NULL, "10.0.0.9");
    crpci_loop_unlock(f->loop);
    return changed;
}

static void pass(fixture *f, int64_t us)
{
    clock_of_test += us;
    assert_int_equal(crpc_loop_step(f->loop, 0), CRPC_OK);
}

static void expect_pushed(reader *r, const char *what)
{
    assert_string_equal(r->pushed, what);
    r->pushed[0] = '\0';
}

static void it_keeps_the_last_good_list(void **state)
{
    fixture f;
    reader r;
    int round;
    (void)state;
    for (round = 0; round < 2; round++) {
        start(&f);
        assert_true(join(&f, &r, "S", round == 1));
        assert_true(age(&f)); /* nothing to be called stale yet */
        assert_true(read_names(&f, "", false));
        expect_pushed(&r, "none "); /* the first is news, empty or not */
        assert_true(read_names(&f, "", true));
        expect_pushed(&r, "");
        r.refuse = true;
        assert_false(read_names(&f, "1", true));
        r.refuse = false;
        assert_true(read_names(&f, "1", true));
        expect_pushed(&r, "1 ");
        assert_true(read_names(&f, "1", true));
        expect_pushed(&r, "");
        assert_true(read_names(&f, "12", true));
        expect_pushed(&r, "1 2 ");
        assert_string_equal(lines, "");
        assert_true(read_names(&f, "", false)); /* something was unreadable */
        expect_pushed(&r, "1 2 (stale) ");
        assert_non_null(strstr(lines, "registry test://x: no provider of S is listed"));
        lines[0] = '\0';
        assert_true(read_names(&f, "", false)); /* said once, pushed once */
        assert_true(age(&f));
        expect_pushed(&r, "");
        assert_string_equal(lines, "");
        assert_true(read_names(&f, "", true));
        expect_pushed(&r, round ? "none " : "");
        assert_true(read_names(&f, "12", true)); /* good again */
        expect_pushed(&r, "1 2 ");
        r.refuse = true;
        assert_false(age(&f));
        r.refuse = false;
        assert_true(age(&f));
        expect_pushed(&r, "1 2 (stale) ");
        assert_true(read_names(&f, "12", true));
        expect_pushed(&r, "1 2 ");
        assert_true(read_names(&f, "", false)); /* and again after it was good */
        assert_non_null(strstr(lines, "no provider of S is listed"));
        expect_pushed(&r, "1 2 (stale) ");
        crpci_loop_lock(f.loop);
        crpci_directory_remove(r.sub);
        crpci_loop_unlock(f.loop);
        assert_true(read_names(&f, "1", true));
        expect_pushed(&r, "");
        end(&f);
    }
}

/* An unreadable name may have been a provider: the empty list is not believed. */
static void it_does_not_believe_an_unreadable_list(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    assert_true(join(&f, &r, "S", true));
    assert_true(read_names(&f, "1x", true));
    expect_pushed(&r, "1 ");
    assert_non_null(strstr(lines, "registry test://x: 1 names are not a provider's URL"));
    lines[0] = '\0';
    assert_true(read_names(&f, "x", true));
    expect_pushed(&r, "1 (stale) ");
    assert_null(strstr(lines, "provider's URL")); /* said once */
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "none ");
    end(&f);
}

/* The registry was away; the providers come back one after the other. */
static void it_protects_providers_that_come_back(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "1234", true));
    expect_pushed(&r, "1 2 3 4 ");
    assert_true(age(&f));
    expect_pushed(&r, "1 2 3 4 (stale) ");
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 2 3 4 "); /* not all the load at once for the first of them */
    pass(&f, HOLD_US / 2);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "");
    assert_true(read_names(&f, "15", true)); /* 2 had been back, and has gone for good */
    expect_pushed(&r, "1 3 4 5 ");
    pass(&f, HOLD_US / 2 - 10000);
    expect_pushed(&r, "");
    pass(&f, 20000); /* 3 and 4 did not come back */
    expect_pushed(&r, "1 5 ");
    assert_true(read_names(&f, "1", true)); /* in good times a provider that goes is gone */
    expect_pushed(&r, "1 ");
    end(&f);
}

static void it_protects_after_a_wipe(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12", true));
    assert_true(read_names(&f, "", true)); /* everything was deleted */
    expect_pushed(&r, "1 2 1 2 (stale) ");
    assert_true(read_names(&f, "2", true));
    expect_pushed(&r, "1 2 ");
    pass(&f, HOLD_US / 2);
    assert_true(age(&f)); /* away again, beyond the end of the hold */
    expect_pushed(&r, "1 2 (stale) ");
    pass(&f, HOLD_US);
    expect_pushed(&r, "");
    assert_true(read_names(&f, "2", true)); /* a new hold */
    expect_pushed(&r, "1 2 ");
    r.refuse = true;
    pass(&f, HOLD_US + 10000);
    r.refuse = false;
    pass(&f, 1100000); /* it is offered again */
    expect_pushed(&r, "2 ");
    end(&f);
}

/* Its providers have begun to return before the emptied directory was read. Those that lack are kept
 * as if it had been seen empty; and once the hold has ended, nothing brings them back. */
static void a_wipe_that_is_seen_late_is_protected_against(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12345678", true));
    expect_pushed(&r, "1 2 3 4 5 6 7 8 ");
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "");
    pass(&f, HOLD_US / 2);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "");
    pass(&f, HOLD_US / 2 + 20000);
    expect_pushed(&r, "1 2 ");
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 ");
    end(&f);
}

/* The consumer reads while the nodes are being deleted: what it saw go first is in use again. */
static void a_wipe_that_is_seen_in_parts_is_protected_against(void **state)
{
    fixture f;
    reader r;
    int round;
    (void)state;
    for (round = 0; round < 2; round++) {
        start(&f);
        f.directory.hold_us = HOLD_US;
        assert_true(join(&f, &r, "S", false));
        assert_true(read_names(&f, "12345678", true));
        assert_true(read_names(&f, "1234", true));
        expect_pushed(&r, "1 2 3 4 5 6 7 8 1 2 3 4 ");
        r.refuse = true;
        assert_false(read_names(&f, round ? "" : "5", true));
        r.refuse = false;
        assert_true(read_names(&f, round ? "" : "5", true));
        expect_pushed(&r, round ? "1 2 3 4 5 6 7 8 (stale) " : "1 2 3 4 5 6 7 8 ");
        end(&f);
    }
}

/* Half of the providers are stopped, and what is left of them much later: neither is a wipe. */
static void a_smaller_fleet_is_followed_at_once(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12345678", true));
    assert_true(read_names(&f, "1234", true));
    expect_pushed(&r, "1 2 3 4 5 6 7 8 1 2 3 4 ");
    pass(&f, HOLD_US);
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 ");
    assert_true(read_names(&f, "2", true));
    expect_pushed(&r, "2 ");
    end(&f);
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "123", true));
    assert_true(read_names(&f, "1", true));
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "1 2 3 1 1 (stale) "); /* those that went before stay away */
    end(&f);
}

/* What an operator disables is not kept: neither while it is listed, nor when it has gone. */
static void protection_does_not_keep_what_is_disabled(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "1234", true));
    assert_true(age(&f));
    expect_pushed(&r, "1 2 3 4 1 2 3 4 (stale) ");
    assert_int_equal(override(&f, "override://10.0.0.2:1/S?disabled=true"), 1); /* while away */
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 3 4 ");
    assert_int_equal(override(&f, "override://10.0.0.3:1/S?disabled=true"), 1); /* in the hold */
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 4 ");
    end(&f);
}

/* Conditions of a rule are those of the provider that is kept, also where the subscriber takes any
 * group; and a rule changes the weight of one as well. */
static void rules_reach_what_protection_keeps(void **state)
{
    static const struct {
        const char *url, *outcome;
    } rules[] = {
        {"override://10.0.0.2:1/S?disabled=true&group=g", "1 3 "},
        {"override://10.0.0.2:1/S?disabled=true&group=h", ""},
        {"override://10.0.0.2:1/S?disabled=true&application=app", "1 3 "},
        {"override://10.0.0.2:1/S?disabled=true&application=other", ""},
        {"override://10.0.0.2:1/S?weight=5", "1 2* 3 "},
    };
    fixture f;
    reader r;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof rules / sizeof *rules; i++) {
        start(&f);
        f.group = "g";
        f.directory.hold_us = HOLD_US;
        assert_true(join(&f, &r, "S", false));
        assert_true(read_names(&f, "123", true));
        assert_true(age(&f));
        assert_true(read_names(&f, "1", true));
        expect_pushed(&r, "1 2 3 1 2 3 (stale) 1 2 3 ");
        assert_int_equal(override(&f, rules[i].url), 1);
        assert_true(read_names(&f, "1", true));
        expect_pushed(&r, rules[i].outcome);
        end(&f);
    }
}

/* An operator may disable the last provider, too: whether it is listed still, or has gone. */
static void an_operator_can_disable_every_provider(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 2 ");
    assert_int_equal(override(&f, "override://0.0.0.0/S?disabled=true"), 1);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "none ");
    assert_string_equal(lines, ""); /* nothing stays in use */
    assert_int_equal(override(&f, NULL), 1);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 2 ");
    assert_int_equal(override(&f, "override://10.0.0.1:1/S?disabled=true"), 1);
    assert_true(read_names(&f, "", true)); /* 2 is protected, 1 is not */
    expect_pushed(&r, "2 (stale) ");
    assert_non_null(strstr(lines, "the last 1 known"));
    assert_int_equal(override(&f, "override://0.0.0.0/S?disabled=true"), 1);
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "none ");
    end(&f);
}

/* A registry that goes away while a list is handed out is doubted like any other: what its next list
 * lacks is kept. */
static void a_registry_lost_in_a_callback_is_doubted(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12", true));
    r.lose = true;
    assert_true(read_names(&f, "123", true));
    r.lose = false;
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 2 1 2 3 "); /* 2 and 3 are kept, so nothing has changed */
    end(&f);
}

/* If all that had come back goes too, what is left is the last good list. */
static void the_end_of_protection_never_empties_a_list(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", true));
    assert_true(read_names(&f, "12", true));
    assert_true(age(&f));
    expect_pushed(&r, "1 2 1 2 (stale) ");
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 2 ");
    assert_true(read_names(&f, "", true)); /* believed where that is allowed */
    expect_pushed(&r, "none ");
    pass(&f, HOLD_US + 10000);
    expect_pushed(&r, "");
    end(&f);
    start(&f);
    f.directory.hold_us = HOLD_US;
    assert_true(join(&f, &r, "S", false));
    assert_true(read_names(&f, "12", true));
    assert_true(age(&f));
    assert_true(read_names(&f, "3", true));
    expect_pushed(&r, "1 2 1 2 (stale) 1 2 3 ");
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "1 2 3 (stale) ");
    pass(&f, HOLD_US + 10000);
    expect_pushed(&r, "");
    end(&f);
}

static void it_gives_each_what_it_wants(void **state)
{
    fixture f;
    reader a, b, c;
    (void)state;
    start(&f);
    assert_true(join(&f, &a, "S", false));
    assert_true(join(&f, &b, "T", false));
    assert_true(join(&f, &c, "S", false));
    a.leave = true; /* in its callback, while the others wait */
    assert_true(read_names(&f, "12", true));
    expect_pushed(&a, "1 2 ");
    expect_pushed(&b, "none ");
    expect_pushed(&c, "1 2 ");
    assert_true(read_names(&f, "1", true));
    expect_pushed(&a, "");
    expect_pushed(&c, "1 ");
    end(&f);
}

static void it_waits_for_a_first_list(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    assert_true(join(&f, &r, "S", false));
    r.sub->first_us = clock_of_test + 1000000;
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "");
    pass(&f, 1000000);
    assert_true(read_names(&f, "", true));
    expect_pushed(&r, "none ");
    end(&f);
}

static void it_applies_overrides(void **state)
{
    fixture f;
    reader r;
    (void)state;
    start(&f);
    assert_true(join(&f, &r, "S", false));
    assert_int_equal(override(&f, NULL), 0);
    assert_int_equal(override(&f, "override://10.0.0.2:1/S?weight=5"), 1);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 2* ");
    assert_int_equal(override(&f, "override://0.0.0.0/S?weight=heavy"), 1); /* the old one went */
    assert_non_null(strstr(lines, "registry test://x: 1 overrides are malformed or unsupported"));
    assert_int_equal(override(&f, NULL), 0);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 2 ");
    end(&f);
}

/* --- the cache ---------------------------------------------------------------------------------- */

static void it_remembers_and_recalls(void **state)
{
    fixture f;
    reader r, late;
    (void)state;
    start(&f);
    assert_true(crpci_cache_init(&f.cache, f.loop->heap, "nowhere", 0));
    f.directory.cache = &f.cache;
    f.directory.override_name = crpci_heap_format(f.loop->heap, "rules");
    assert_true(join(&f, &r, "S", false));
    crpci_loop_lock(f.loop);
    crpci_directory_recall(r.sub); /* nothing is known */
    crpci_loop_unlock(f.loop);
    expect_pushed(&r, "");
    assert_int_equal(override(&f, "override://10.0.0.2:1/S?weight=5"), 1);
    assert_true(read_names(&f, "12", true));
    expect_pushed(&r, "1 2* ");
    assert_true(read_names(&f, "", true)); /* of no use to whoever starts later */
    assert_true(read_names(&f, "x", true));
    expect_pushed(&r, "1 2* (stale) ");
    crpci_loop_lock(f.loop);
    crpci_directory_recall(r.sub); /* it has a list */
    crpci_loop_unlock(f.loop);
    expect_pushed(&r, "");
    assert_true(join(&f, &late, "S", false));
    crpci_loop_lock(f.loop);
    crpci_directory_recall(late.sub);
    crpci_loop_unlock(f.loop);
    expect_pushed(&late, "1 2* (stale) ");
    f.directory.hold_us = HOLD_US;
    assert_true(read_names(&f, "1", true));
    expect_pushed(&r, "1 2* ");  /* it saw the registry lose 2 */
    expect_pushed(&late, "1 2* "); /* so did the program that wrote the file, perhaps */
    pass(&f, HOLD_US + 10000);
    expect_pushed(&late, "1 ");
    f.directory.cache = NULL;
    crpci_cache_clear(&f.cache);
    end(&f);
}

static int subscriber_scenario(const crpc_hooks *hooks, void *user)
{
    fixture f;
    reader r;
    int err = begin(&f, hooks);
    (void)user;
    if (!err)
        f.directory.hold_us = HOLD_US;
    if (!err && (!join(&f, &r, "S", false) || !read_names(&f, "12", true) ||
                 override(&f, "override://10.0.0.2:1/S?weight=5") < 0 || !age(&f) ||
                 !read_names(&f, "1", true)))
        err = CRPC_ENOMEM;
    if (!err) {
        r.pushed[0] = '\0';
        pass(&f, HOLD_US + 10000);
        if (strcmp(r.pushed, "1 ") != 0) {
            err = CRPC_ENOMEM;
            pass(&f, 1100000);
            if (!((ct_alloc *)hooks->user)->fail_forever) /* a later try heals it */
                assert_string_equal(r.pushed, "1 ");
        }
    }
    if (f.loop)
        end(&f);
    return err;
}

static void it_subscribes_in_want_of_memory(void **state)
{
    (void)state;
    assert_true(ct_sweep(subscriber_scenario, NULL) > 10);
}

/* --- lists -------------------------------------------------------------------------------------- */

static void it_counts_references(void **state)
{
    crpci_heap *h = heap(NULL);
    crpci_snapshot *s = crpci_directory_snapshot(h, 3);
    (void)state;
    assert_int_equal(s->count, 3);
    assert_int_equal((uintptr_t)s->providers % 8, 0);
    strcpy(s->providers[2].address, "x");
    crpci_directory_snapshot_ref(s);
    crpci_directory_snapshot_unref(s);
    crpci_heap_unref(h); /* the list holds it */
    assert_string_equal(s->providers[2].address, "x");
    crpci_directory_snapshot_unref(s);
    crpci_directory_snapshot_unref(NULL);
}

static void it_refuses_what_overflows(void **state)
{
    crpci_heap *h = heap(NULL);
    (void)state;
    assert_null(crpci_directory_snapshot(h, SIZE_MAX));
    assert_null(crpci_directory_snapshot(h, SIZE_MAX / sizeof(crpci_provider)));
    crpci_heap_unref(h);
}

static void it_tells_lists_apart(void **state)
{
    crpci_heap *h = heap(NULL);
    crpci_snapshot *a = crpci_directory_snapshot(h, 2), *b = crpci_directory_snapshot(h, 2);
    crpci_snapshot *c = crpci_directory_snapshot(h, 1);
    (void)state;
    assert_true(crpci_directory_snapshot_equal(a, b));
    assert_false(crpci_directory_snapshot_equal(a, c));
    b->providers[1].weight = 1;
    assert_false(crpci_directory_snapshot_equal(a, b));
    b->providers[1].weight = 0;
    b->providers[0].timestamp_ms = 1;
    assert_false(crpci_directory_snapshot_equal(a, b));
    b->providers[0].timestamp_ms = 0;
    b->providers[0].warmup_ms = 1;
    assert_false(crpci_directory_snapshot_equal(a, b));
    b->providers[0].warmup_ms = 0;
    b->stale = true;
    assert_false(crpci_directory_snapshot_equal(a, b));
    b->stale = false;
    assert_true(crpci_directory_snapshot_equal(a, b));
    b->providers[0].address[0] = 'x';
    assert_false(crpci_directory_snapshot_equal(a, b));
    crpci_directory_snapshot_unref(a);
    crpci_directory_snapshot_unref(b);
    crpci_directory_snapshot_unref(c);
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
    crpci_directory_snapshot_unref(s);
    crpci_heap_unref(h);
    return s ? CRPC_OK : CRPC_ENOMEM;
}

static void it_survives_want_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(scenario, NULL), 4);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_lists_each_address_once),
        CT_TEST(it_judges_only_nodes_of_its_own_schemes),
        CT_TEST(it_takes_addresses),
        CT_TEST(it_follows_the_address_of_its_host),
        CT_TEST(it_keeps_the_last_good_list),
        CT_TEST(it_does_not_believe_an_unreadable_list),
        CT_TEST(it_protects_providers_that_come_back),
        CT_TEST(it_protects_after_a_wipe),
        CT_TEST(a_wipe_that_is_seen_late_is_protected_against),
        CT_TEST(a_wipe_that_is_seen_in_parts_is_protected_against),
        CT_TEST(a_smaller_fleet_is_followed_at_once),
        CT_TEST(protection_does_not_keep_what_is_disabled),
        CT_TEST(rules_reach_what_protection_keeps),
        CT_TEST(an_operator_can_disable_every_provider),
        CT_TEST(a_registry_lost_in_a_callback_is_doubted),
        CT_TEST(the_end_of_protection_never_empties_a_list),
        CT_TEST(it_gives_each_what_it_wants),
        CT_TEST(it_waits_for_a_first_list),
        CT_TEST(it_applies_overrides),
        CT_TEST(it_remembers_and_recalls),
        CT_TEST(it_subscribes_in_want_of_memory),
        CT_TEST(it_counts_references),
        CT_TEST(it_refuses_what_overflows),
        CT_TEST(it_tells_lists_apart),
        CT_TEST(it_survives_want_of_memory),
    };
    clock_of_test = 5000000;
    return CT_RUN(tests);
}
