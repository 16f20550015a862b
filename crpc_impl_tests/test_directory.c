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
    crpci_names_query q;
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
    crpci_names_query q;
    crpci_directory_sub sub;
    crpci_cond cond;
    int round;
    (void)state;
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.log = on_line;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    none = crpci_directory_snapshot(loop->heap, 0);
    one = crpci_directory_snapshot(loop->heap, 1);
    same = crpci_directory_snapshot(loop->heap, 1);
    two = crpci_directory_snapshot(loop->heap, 2);
    memset(&q, 0, sizeof q);
    q.service = "S";
    for (round = 0; round < 2; round++) {
        q.allow_empty = round == 1;
        pushed[0] = lines[0] = '\0';
        memset(&sub, 0, sizeof sub);
        assert_true(crpci_directory_sub_init(&sub, loop, &cond, &q, on_push, NULL));
        crpci_loop_lock(loop);
        assert_true(crpci_directory_age(&sub)); /* nothing to be called stale yet */
        assert_true(crpci_directory_offer(&sub, none, false));
        expect_pushed("0 "); /* the first is news, empty or not */
        assert_true(crpci_directory_offer(&sub, none, true));
        expect_pushed("");
        refuse = true;
        assert_false(crpci_directory_offer(&sub, one, true));
        refuse = false;
        assert_true(crpci_directory_offer(&sub, one, true));
        expect_pushed("1 ");
        assert_true(crpci_directory_offer(&sub, same, true));
        expect_pushed("");
        assert_true(crpci_directory_offer(&sub, two, true));
        expect_pushed("2 ");
        assert_string_equal(lines, "");
        assert_true(crpci_directory_offer(&sub, none, false)); /* something was unreadable */
        expect_pushed("2s ");
        assert_non_null(strstr(lines, "no provider of S is left"));
        lines[0] = '\0';
        assert_true(crpci_directory_offer(&sub, none, false)); /* said once, pushed once */
        assert_true(crpci_directory_age(&sub));
        expect_pushed("");
        assert_string_equal(lines, "");
        assert_true(crpci_directory_offer(&sub, none, true));
        expect_pushed(q.allow_empty ? "0 " : "");
        assert_true(crpci_directory_offer(&sub, two, true)); /* good again */
        expect_pushed("2 ");
        refuse = true;
        assert_false(crpci_directory_age(&sub));
        refuse = false;
        assert_true(crpci_directory_age(&sub));
        expect_pushed("2s ");
        assert_true(crpci_directory_offer(&sub, two, true));
        expect_pushed("2 ");
        assert_true(crpci_directory_offer(&sub, none, false)); /* and again after it was good */
        assert_non_null(strstr(lines, "no provider of S is left"));
        expect_pushed("2s ");
        crpci_directory_sub_end(&sub);
        assert_true(crpci_directory_offer(&sub, one, true));
        expect_pushed("");
        crpci_loop_unlock(loop);
        crpci_directory_sub_clear(&sub);
    }
    crpci_directory_snapshot_unref(none);
    crpci_directory_snapshot_unref(one);
    crpci_directory_snapshot_unref(same);
    crpci_directory_snapshot_unref(two);
    crpci_thread_cond_free(&cond);
    crpc_loop_close(loop);
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
    assert_int_equal(ct_sweep(scenario, NULL), 3);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_lists_each_address_once),
        CT_TEST(it_keeps_the_last_good_list),
        CT_TEST(it_counts_references),
        CT_TEST(it_refuses_what_overflows),
        CT_TEST(it_tells_lists_apart),
        CT_TEST(it_survives_want_of_memory),
    };
    return CT_RUN(tests);
}
