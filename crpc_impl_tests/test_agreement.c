/* What all that agrees on something shares: paths, numbers, places in a queue. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

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
        char *full = crpci_agreement_path(h, paths[i].root, paths[i].path);
        if (strcmp(full, paths[i].full) != 0 ||
            crpci_agreement_full(NULL, 0, paths[i].root, paths[i].path) != strlen(full) ||
            strcmp(crpci_agreement_relative(full, strlen(paths[i].root)), paths[i].back) != 0)
            fail_msg("\"%s\" \"%s\" gives \"%s\"", paths[i].root, paths[i].path, full);
        crpci_heap_strfree(h, full);
    }
    crpci_heap_unref(h);
}

static void it_takes_paths_that_zookeeper_takes(void **state)
{
    static const char *const good[] = {"", "/", "a", "/a", "a/b", "...", "a b", "\xc3\xa4", ".a"};
    static const char *const bad[] = {NULL, "//", "a//b", ".", "..", "a/./b", "/a/..", "a\n", "a/"};
    char longest[CRPCI_AGREEMENT_PATH + 2];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(crpci_agreement_path_ok(good[i], false));
    for (i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(crpci_agreement_path_ok(bad[i], false));
    assert_true(crpci_agreement_path_ok("a/", true)); /* the number is the whole name */
    assert_false(crpci_agreement_path_ok("a//", true));
    memset(longest, 'a', sizeof longest);
    longest[CRPCI_AGREEMENT_PATH] = '\0';
    assert_true(crpci_agreement_path_ok(longest, false));
    longest[CRPCI_AGREEMENT_PATH] = 'a';
    longest[CRPCI_AGREEMENT_PATH + 1] = '\0';
    assert_false(crpci_agreement_path_ok(longest, false));
}

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
        assert_true(crpci_agreement_number(node(name, "_c_1", numbers[i]), &number));
        assert_int_equal(number, numbers[i]);
    }
    assert_true(crpci_agreement_number("a-lock-0000000001-lock-0000000002", &number));
    assert_int_equal(number, 2);
    assert_true(crpci_agreement_number("5d3f__lock__0000000003", &number)); /* kazoo's */
    assert_int_equal(number, 3);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        if (crpci_agreement_number(bad[i], &number))
            fail_msg("\"%s\" has number %d", bad[i], (int)number);
    }
}

static void expect(const char *what, const char *got, const char *want)
{
    if ((got == NULL) != (want == NULL) || (got && strcmp(got, want) != 0))
        fail_msg("%s is %s, not %s", what, got ? got : "none", want ? want : "none");
}

static void the_node_before_is_found(void **state)
{
    char name[8][64];
    char *names[10];
    (void)state;
    names[0] = (char *)node(name[0], "_c_d", INT32_MIN); /* the one after the largest number */
    names[1] = (char *)node(name[1], "_c_a", INT32_MAX - 1);
    names[2] = NULL;
    names[3] = (char *)node(name[3], "_c_c", INT32_MIN + 1);
    names[4] = (char *)"something else";
    names[5] = (char *)node(name[5], "_c_b", INT32_MAX);
    expect("first", crpci_agreement_pick(names, 6, NULL), name[1]);
    expect("before a", crpci_agreement_pick(names, 6, name[1]), NULL);
    expect("before b", crpci_agreement_pick(names, 6, name[5]), name[1]);
    expect("before d", crpci_agreement_pick(names, 6, name[0]), name[5]);
    expect("before c", crpci_agreement_pick(names, 6, name[3]), name[0]);
    expect("first of none", crpci_agreement_pick(NULL, 0, NULL), NULL);
    expect("before, of none", crpci_agreement_pick(NULL, 0, name[1]), NULL);
}

static void client_codes_are_translated(void **state)
{
    (void)state;
    assert_int_equal(crpci_agreement_status(ZOK), CRPC_OK);
    assert_int_equal(crpci_agreement_status(ZNONODE), CRPC_ENOTFOUND);
    assert_int_equal(crpci_agreement_status(ZINVALIDACL), CRPC_EAUTH);
    assert_int_equal(crpci_agreement_status(ZCONNECTIONLOSS), CRPC_ECONN);
    assert_int_equal(crpci_agreement_status(ZNOTREADONLY), CRPC_EINTERNAL);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_puts_paths_below_the_root),
        CT_TEST(it_takes_paths_that_zookeeper_takes),
        CT_TEST(it_reads_numbers_of_ten_digits),
        CT_TEST(the_node_before_is_found),
        CT_TEST(client_codes_are_translated),
    };
    return CT_RUN(tests);
}
