/* impl-open: which backend a URL names, and what it takes. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpc_loop *loop_of_test(void)
{
    crpc_loop_options o;
    crpc_loop *loop;
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    return loop;
}

static void unknown_schemes_are_refused(void **state)
{
    static const char *const others[] = {"etcd://10.0.0.1:1/x", "tcp://10.0.0.1:1", "Zookeeper://h"};
    crpc_loop *loop = loop_of_test();
    crpci_backend *r;
    crpc_error error;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof others / sizeof *others; i++) {
        r = (crpci_backend *)(void *)&error;
        assert_int_equal(crpci_open_registry(loop, others[i], NULL, &r, &error), CRPC_EUNSUPPORTED);
        assert_null(r);
        assert_int_equal(strncmp(error.text, others[i], 4), 0);
        assert_non_null(strstr(error.text, "zookeeper://"));
        assert_non_null(strstr(error.text, "multicast://"));
        assert_non_null(strstr(error.text, "file://"));
    }
    crpci_directory_close(NULL);
    crpc_loop_close(loop);
}

/* Every backend has a row that is complete, and no scheme stands there twice. */
static void its_table_is_complete(void **state)
{
    const size_t count = sizeof crpci_open_backends / sizeof *crpci_open_backends;
    size_t i, k;
    (void)state;
    assert_int_equal(count, 3);
    for (i = 0; i < count; i++) {
        const crpci_open_backend *b = &crpci_open_backends[i];
        char keys[64], *key, *save = NULL;
        assert_non_null(b->open);
        for (k = 0; k < i; k++)
            assert_string_not_equal(b->scheme, crpci_open_backends[k].scheme);
        snprintf(keys, sizeof keys, "%s,%s", b->keys, b->server_keys);
        for (key = strtok_r(keys, ",", &save); key; key = strtok_r(NULL, ",", &save)) {
            for (k = 0; k < sizeof crpci_open_keys / sizeof *crpci_open_keys; k++) {
                if (strcmp(crpci_open_keys[k].name, key) == 0)
                    break;
            }
            if (k == sizeof crpci_open_keys / sizeof *crpci_open_keys)
                fail_msg("%s:// takes %s, which has no place", b->scheme, key);
        }
    }
}

/* What becomes of a channel's URL: "service group version cache interface path", or NULL. */
static const char *request(const char *text, int *err)
{
    static char out[400];
    crpc_hooks hooks = ct_hooks();
    crpci_open_request r;
    char *key, *value;
    crpci_heap *h;
    crpci_url u;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    assert_int_equal(crpci_url_parse(&u, h, text, NULL), CRPC_OK);
    *err = crpci_open_find(&r, &u, NULL);
    while (!*err) {
        *err = crpci_url_next(&u, &key, &value, NULL);
        if (!*err && !crpci_open_option(&r, false, key, value))
            *err = CRPC_ENOTFOUND;
    }
    if (*err == CRPC_EPENDING)
        *err = crpci_open_service(&r, &u, NULL);
#define OR(text) ((text) ? (text) : "-")
    snprintf(out, sizeof out, "%s %s %s %s %s %s", OR(r.want.service), OR(r.want.group),
             OR(r.want.version), OR(r.options.cache), OR(r.options.interface), u.path);
    crpci_url_free(&u);
    crpci_heap_unref(h);
    return out;
}

static void it_reads_what_a_channel_wants(void **state)
{
    static const struct {
        const char *url, *request;
        int status;
    } urls[] = {
        {"zookeeper://h/dubbo/a.B", "a.B - - - - dubbo", CRPC_OK},
        {"zookeeper://h/x/y/a.B?group=g&version=1&cache=/tmp/%63", "a.B g 1 /tmp/c - x/y", CRPC_OK},
        {"zookeeper://h/a.B", NULL, CRPC_EINVAL},
        {"zookeeper://h//a.B", NULL, CRPC_EINVAL},
        {"zookeeper://h/dubbo/", NULL, CRPC_EINVAL},
        {"zookeeper://h", NULL, CRPC_EINVAL},
        {"zookeeper://h/dubbo/a.B?interface=lo", NULL, CRPC_ENOTFOUND},
        {"zookeeper://h/dubbo/a.B?service=a.B", NULL, CRPC_ENOTFOUND},
        {"multicast://g:1/a.B", "a.B - - - - ", CRPC_OK},
        {"multicast://g:1/x/a.B?interface=lo&group=*", "a.B * - - lo x", CRPC_OK},
        {"multicast://g:1//a.B", NULL, CRPC_EINVAL},
        {"multicast://g:1", NULL, CRPC_EINVAL},
        {"multicast://g:1/a.B?cache=/c", NULL, CRPC_ENOTFOUND},
        {"file:///etc/list", "- - - - - etc/list", CRPC_OK},
        {"file:///etc/list?service=a.B&version=", "a.B -  - - etc/list", CRPC_OK},
        {"file:///etc/list?retries=1", NULL, CRPC_ENOTFOUND},
        {"etcd://h/dubbo/a.B", NULL, CRPC_EUNSUPPORTED},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof urls / sizeof *urls; i++) {
        int err;
        const char *got = request(urls[i].url, &err);
        if (err != urls[i].status || (urls[i].request && strcmp(got, urls[i].request) != 0))
            fail_msg("%s: %d, \"%s\"", urls[i].url, err, got);
    }
}

/* A server hands on what its registry needs, and nothing that a channel wants. */
static void it_checks_a_servers_url(void **state)
{
    static const struct {
        const char *url, *text; /* NULL: fine */
    } urls[] = {
        {"zookeeper://10.0.0.1:2181/dubbo", NULL},
        {"multicast://224.5.6.7:1234?interface=lo", NULL},
        {"multicast://224.5.6.7:1234", NULL},
        {"multicast://224.5.6.7:1234?interface=lo&interface=eth0", "interface is given twice"},
        {"multicast://224.5.6.7:1234?group=g", "group=g: a server's multicast:// takes interface"},
        {"zookeeper://10.0.0.1/dubbo?cache=/c", "cache=/c: a server's zookeeper:// takes none"},
        {"zookeeper://10.0.0.1/dubbo?x", "\"x\" is not key=value"},
        {"10.0.0.1:2181", "not a URL"},
        {"", "not a URL"},
    };
    crpc_loop *loop = loop_of_test();
    size_t i;
    (void)state;
    for (i = 0; i < sizeof urls / sizeof *urls; i++) {
        crpc_error error;
        int err;
        memset(&error, 0, sizeof error);
        err = crpci_open_registry(loop, urls[i].url, NULL, NULL, &error);
        if (urls[i].text ? err != CRPC_EINVAL || !strstr(error.text, urls[i].text) : err)
            fail_msg("%s: %d, \"%s\"", urls[i].url, err, error.text);
    }
    crpc_loop_close(loop);
}

/* crpc_server_open finds it, before the server is started. */
static void a_server_refuses_a_registry_that_is_none(void **state)
{
    static const char *const bad[] = {"zookeeper", "etcd://10.0.0.1:1", "tcp://10.0.0.1:1",
                                      "zookeeper://10.0.0.1/dubbo?timeout=5"};
    crpc_server_options o;
    crpc_server *server;
    size_t i;
    (void)state;
    memset(&o, 0, sizeof o);
    o.loop = loop_of_test();
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        crpc_error error;
        int err;
        o.registry = bad[i];
        err = crpc_server_open(&server, &o, &error);
        if ((err != CRPC_EINVAL && err != CRPC_EUNSUPPORTED) || server || !*error.text)
            fail_msg("%s: %s", bad[i], crpc_status_name(err));
    }
    o.registry = "zookeeper://10.0.0.1:1/dubbo"; /* nothing is connected to yet */
    assert_int_equal(crpc_server_open(&server, &o, NULL), CRPC_OK);
    crpc_server_close(server);
    crpc_loop_close(o.loop);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    crpc_loop_options o;
    crpci_backend *r = NULL;
    crpc_loop *loop;
    int err;
    memset(&o, 0, sizeof o);
    o.hooks = *hooks;
    err = crpc_loop_open(&loop, &o);
    if (err)
        return err;
    err = crpci_open_registry(loop, (const char *)user, NULL, &r, NULL);
    crpci_directory_close(r);
    crpc_loop_close(loop);
    return err;
}

static void it_opens_in_want_of_memory(void **state)
{
    char file[] = "file:///nowhere/list", group[] = "multicast://239.255.1.2:1?interface=lo";
    (void)state;
    assert_true(ct_sweep(scenario, file) > 3);
    assert_true(ct_sweep(scenario, group) > 3);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(unknown_schemes_are_refused),
        CT_TEST(its_table_is_complete),
        CT_TEST(it_reads_what_a_channel_wants),
        CT_TEST(it_checks_a_servers_url),
        CT_TEST(a_server_refuses_a_registry_that_is_none),
        CT_TEST(it_opens_in_want_of_memory),
    };
    return CT_RUN(tests);
}
