/* The servers of a ZooKeeper URL: names, numbers, order, the way there. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_zk_rig.h"

/* The servers of an authority, as far as they can be resolved. */
static int resolve(crpc_loop *loop, const char *authority, crpci_zk_servers *z, crpc_error *error)
{
    int err;
    memset(z, 0, sizeof *z);
    z->heap = loop->heap;
    z->authority = authority;
    err = crpci_zk_servers_resolve(z, error);
    err = err ? err : crpci_zk_servers_list(z, loop);
    if (err)
        crpci_zk_servers_free(z);
    return err;
}

static void expect_hosts(const char *authority, size_t count, const char *const *parts)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_zk_servers z, *s = &z;
    crpc_error error;
    size_t i, n = 1, cut = 0;
    char *mapped;
    const char *p;
    if (resolve(loop, authority, s, &error))
        fail_msg("%s: %s", authority, error.text);
    while ((mapped = strstr(s->hosts, "::ffff:")) != NULL) { /* see crpci_zk_servers_maps_v4 */
        assert_true(crpci_zk_servers_maps_v4());
        memmove(mapped, mapped + 7, strlen(mapped + 7) + 1);
        cut += 7;
    }
    for (p = s->hosts; *p; p++)
        n += *p == ',';
    if (n != count || s->count != count)
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
    crpci_zk_servers_free(s);
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
        crpci_zk_servers s;
        crpc_error error;
        int err = resolve(loop, bad[i].authority, &s, &error);
        if (err != bad[i].status || !*error.text)
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
        crpci_zk_servers s;
        assert_int_equal(resolve(loop, "10.0.0.0,10.0.0.1,10.0.0.2,10.0.0.3", &s, NULL), CRPC_OK);
        first[strchr(s.hosts, '.')[5] - '0']++; /* 10.0.0.N */
        crpci_zk_servers_free(&s);
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
    crpci_zk_servers s;
    char host[INET6_ADDRSTRLEN];
    (void)state;
    assert_int_equal(resolve(loop, "127.0.0.1", &s, NULL), CRPC_OK);
    assert_true(crpci_zk_servers_local(&s, false, host, sizeof host));
    assert_string_equal(host, "127.0.0.1");
    assert_true(crpci_zk_servers_local(&s, true, host, sizeof host));
    crpci_zk_servers_free(&s);
    assert_int_equal(resolve(loop, "[::1]", &s, NULL), CRPC_OK);
    assert_false(crpci_zk_servers_local(&s, true, host, sizeof host)); /* no IPv4 way there */
    crpci_zk_servers_free(&s);
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
    assert_true(crpci_zk_servers_reachable(&a));
    close(fd);
    snprintf(text, sizeof text, "127.0.0.1:%d", ct_free_port());
    assert_true(crpci_sock_parse(&a, text));
    assert_false(crpci_zk_servers_reachable(&a));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_lists_numeric_servers),
        CT_TEST(it_refuses_bad_servers),
        CT_TEST(it_shuffles_servers),
        CT_TEST(it_finds_its_own_address),
        CT_TEST(it_sees_who_accepts),
    };
    return CT_RUN(tests);
}
