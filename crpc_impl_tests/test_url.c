/* impl-url: what a user writes into a configuration file. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_url url; /* of the heap below; expect_parts frees the one before */
static crpci_heap *heap;
static crpc_error error;

static int parse(const char *text)
{
    if (!heap) {
        crpc_hooks hooks = ct_hooks();
        assert_int_equal(crpci_heap_open(&heap, &hooks, 0), CRPC_OK);
    }
    crpci_url_free(&url);
    return crpci_url_parse(&url, heap, text, &error);
}

/* At the end of a test: everything is given back. */
static void finish(void)
{
    crpci_url_free(&url);
    crpci_heap_unref(heap);
    heap = NULL;
    memset(&url, 0, sizeof url);
}

static void expect_parts(const char *text, const char *scheme, const char *authority,
                         const char *path, const char *query)
{
    assert_int_equal(parse(text), CRPC_OK);
    assert_string_equal(url.scheme, scheme);
    assert_string_equal(url.authority, authority);
    assert_string_equal(url.path, path);
    assert_string_equal(url.query, query);
}

static void parts(void **state)
{
    (void)state;
    expect_parts("tcp://host:80", "tcp", "host:80", "", "");
    expect_parts("tcp://host:80/", "tcp", "host:80", "", "");
    expect_parts("tcp://[::1]:80?a=1&b=2", "tcp", "[::1]:80", "", "a=1&b=2");
    expect_parts("tcp://host?", "tcp", "host", "", "");
    expect_parts("list://a:1,b:2", "list", "a:1,b:2", "", "");
    expect_parts("zookeeper://h1:2181,h2:2181/dubbo/demo.User?lb=wrr", "zookeeper",
                 "h1:2181,h2:2181", "dubbo/demo.User", "lb=wrr");
    expect_parts("zookeeper://h/r?path=/x?y", "zookeeper", "h", "r", "path=/x?y");
    expect_parts("unix:///run/crpc.sock", "unix", "", "/run/crpc.sock", "");
    expect_parts("unix:///run/crpc.sock?retries=1", "unix", "", "/run/crpc.sock", "retries=1");
    expect_parts("unix://here", "unix", "", "here", "");
    expect_parts("file:///etc/list", "file", "", "etc/list", "");
    expect_parts("tcp://", "tcp", "", "", "");
    finish();
}

static void what_is_no_url(void **state)
{
    static const char *const bad[] = {"", "host:80", "tcp:/host", "://host", "tcp:host", "//"};
    static char text[CRPCI_URL_MAX + 1];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        memset(&error, 0, sizeof error);
        assert_int_equal(parse(bad[i]), CRPC_EINVAL);
        assert_int_equal(error.code, CRPC_EINVAL);
        assert_true(strstr(error.text, bad[i]) != NULL);
    }
    assert_int_equal(parse(NULL), CRPC_EINVAL);
    assert_int_equal(parse("no"), CRPC_EINVAL);
    memset(text, 'x', sizeof text);
    memcpy(text, "tcp://", 6);
    text[CRPCI_URL_MAX - 1] = '\0';
    assert_int_equal(parse(text), CRPC_OK);
    assert_int_equal(strlen(url.authority), CRPCI_URL_MAX - 1 - 6);
    text[CRPCI_URL_MAX - 1] = 'x';
    text[CRPCI_URL_MAX] = '\0';
    assert_int_equal(parse(text), CRPC_EINVAL);
    assert_true(strstr(error.text, "2047") != NULL); /* the limit is named */
    finish();
}

/* Not a byte behind the text is looked at. */
static void every_prefix_ends_at_its_end(void **state)
{
    static const char whole[] = "zookeeper://h1:2181/root/a.B?lb=wrr&group=%20x%";
    size_t n;
    (void)state;
    for (n = 0; n < sizeof whole; n++) {
        ct_guard g = ct_guard_make(whole, n + 1);
        char *key, *value;
        g.data[n] = '\0';
        if (parse((const char *)g.data) == CRPC_OK) {
            while (crpci_url_next(&url, &key, &value, &error) == CRPC_OK)
                assert_true(strlen(key) + strlen(value) < n);
        }
        crpci_url_decode((char *)g.data);
        ct_guard_free(g);
    }
    finish();
}

static void expect_option(int status, const char *key, const char *value)
{
    char *k = NULL, *v = NULL;
    assert_int_equal(crpci_url_next(&url, &k, &v, &error), status);
    if (status == CRPC_OK) {
        assert_string_equal(k, key);
        assert_string_equal(v, value);
    }
}

static void options_one_by_one(void **state)
{
    (void)state;
    expect_parts("tcp://h?a=1&&b=two+words&%63=%41%26%3d&d==x&e=&", "tcp", "h", "",
                 "a=1&&b=two+words&%63=%41%26%3d&d==x&e=&");
    expect_option(CRPC_OK, "a", "1");
    expect_option(CRPC_OK, "b", "two words");
    expect_option(CRPC_OK, "c", "A&=");
    expect_option(CRPC_OK, "d", "=x");
    expect_option(CRPC_OK, "e", "");
    expect_option(CRPC_EPENDING, NULL, NULL);
    expect_option(CRPC_EPENDING, NULL, NULL);
    expect_parts("tcp://h?plain", "tcp", "h", "", "plain");
    expect_option(CRPC_EINVAL, NULL, NULL);
    expect_parts("tcp://h?a=%4", "tcp", "h", "", "a=%4");
    expect_option(CRPC_EINVAL, NULL, NULL);
    expect_parts("tcp://h?%zz=1", "tcp", "h", "", "%zz=1");
    expect_option(CRPC_EINVAL, NULL, NULL);
    expect_parts("tcp://h?a=x%00y", "tcp", "h", "", "a=x%00y"); /* would hide the rest */
    expect_option(CRPC_EINVAL, NULL, NULL);
    expect_parts("tcp://h", "tcp", "h", "", "");
    expect_option(CRPC_EPENDING, NULL, NULL);
    finish();
}

static void a_key_twice(void **state)
{
    static const struct {
        const char *url;
        int good; /* options before the error; -1: no error */
    } texts[] = {
        {"tcp://h?a=1&b=2&a=3", 0},       {"tcp://h?x=1&ab=2&ab=2", 1}, {"tcp://h?a=1&&a=", 0},
        {"tcp://h?a=1&ab=2&aa=3&=4", -1}, {"tcp://h?%61=1&a=2", 0},     {"tcp://h?a=b&b=a=1", -1},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        char *key, *value;
        int n = 0, err;
        assert_int_equal(parse(texts[i].url), CRPC_OK);
        while ((err = crpci_url_next(&url, &key, &value, &error)) == CRPC_OK)
            n++;
        if (texts[i].good < 0 ? err != CRPC_EPENDING : err != CRPC_EINVAL || n != texts[i].good)
            fail_msg("%s: %d after %d options", texts[i].url, err, n);
        if (err == CRPC_EINVAL)
            assert_non_null(strstr(error.text, "given twice"));
    }
    finish();
}

static void a_socket_without_a_name(void **state)
{
    static const char *const bad[] = {"unix://", "unix:///", "unix://?a=1", "unix:///?a=1"};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(parse(bad[i]), CRPC_EINVAL);
        assert_non_null(strstr(error.text, "unix:///path"));
    }
    expect_parts("unix://@name", "unix", "", "@name", "");
    finish();
}

static void decoding(void **state)
{
    static const char *const bad[] = {"%", "%1", "x%", "%g0", "%0g", "%00", "%-1", "% 1", "%%41"};
    size_t i;
    char text[64];
    (void)state;
    strcpy(text, "a%2Fb%2fc+%c3%A9%01");
    assert_true(crpci_url_decode(text));
    assert_string_equal(text, "a/b/c \xc3\xa9\x01");
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        strcpy(text, bad[i]);
        assert_false(crpci_url_decode(text));
    }
}

/* Dubbo's tools decode what we name our nodes, and compare it with what Java's encoder gives. */
static void encoding_is_javas(void **state)
{
    char out[200];
    (void)state;
    crpci_url_encode(out, sizeof out,
                     "dubbo://10.0.0.1:20880/demo.User?a=b&c=d e*f-g_h~i+j%\xc3\xa9");
    assert_string_equal(out, "dubbo%3A%2F%2F10.0.0.1%3A20880%2Fdemo.User%3Fa%3Db%26c%3Dd+e*f-g_h%7E"
                             "i%2Bj%25%C3%A9");
    assert_int_equal(crpci_url_encode(out, sizeof out, ""), 0);
    assert_string_equal(out, "");
}

static void encoding_and_back(void **state)
{
    int round;
    (void)state;
    for (round = 0; round < 2000; round++) {
        char in[40], out[121];
        size_t n = (size_t)(ct_random() % sizeof in), i, needed;
        for (i = 0; i < n; i++)
            in[i] = (char)(1 + ct_random() % 255);
        in[n < sizeof in ? n : sizeof in - 1] = '\0';
        needed = crpci_url_encode(out, sizeof out, in);
        assert_int_equal(needed, strlen(out));
        assert_true(crpci_url_decode(out));
        assert_string_equal(out, in);
    }
}

static void encoding_into_too_little_room(void **state)
{
    size_t size;
    (void)state;
    for (size = 0; size < 10; size++) {
        ct_guard g = ct_guard_make(NULL, size);
        assert_int_equal(crpci_url_encode((char *)g.data, size, "a/b c"), 7);
        if (size)
            assert_int_equal(strlen((char *)g.data), size - 1 < 7 ? size - 1 : 7);
        if (size)
            assert_int_equal(strncmp((char *)g.data, "a%2Fb+c", size - 1), 0);
        ct_guard_free(g);
    }
}

static void numbers(void **state)
{
    static const char *const bad[] = {"",
                                      "x",
                                      "1x",
                                      "-2",
                                      "--1",
                                      "0x10",
                                      "1 ",
                                      " 1",
                                      "+1",
                                      "1.5",
                                      "-",
                                      "101",
                                      "99999999999999999999",
                                      "\t1",
                                      "-99999999999999999999"};
    int64_t n;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        n = 77;
        if (crpci_url_number(bad[i], 100, &n))
            fail_msg("\"%s\" was taken for a number", bad[i]);
        assert_int_equal(n, 77);
    }
    assert_true(crpci_url_number("0", 100, &n) && n == 0);
    assert_true(crpci_url_number("-1", 100, &n) && n == -1);
    assert_true(crpci_url_number("100", 100, &n) && n == 100);
    assert_true(crpci_url_number("010", 100, &n) && n == 10); /* decimal, not octal */
    assert_true(crpci_url_number("9223372036854775807", INT64_MAX, &n) && n == INT64_MAX);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(parts),
        CT_TEST(what_is_no_url),
        CT_TEST(every_prefix_ends_at_its_end),
        CT_TEST(options_one_by_one),
        CT_TEST(a_key_twice),
        CT_TEST(a_socket_without_a_name),
        CT_TEST(decoding),
        CT_TEST(encoding_is_javas),
        CT_TEST(encoding_and_back),
        CT_TEST(encoding_into_too_little_room),
        CT_TEST(numbers),
    };
    return CT_RUN(tests);
}
