#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define SECOND 1000000

static const uint64_t secret[2] = {1, 2};

static crpci_heap *heap(void)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    return h;
}

static crpci_sock_name ip(const char *text)
{
    crpci_sock_name p;
    memset(&p, 0, sizeof p);
    p.port = 4711;
    if (inet_pton(AF_INET, text, p.address + 12) == 1)
        memcpy(p.address, crpci_sock_mapped, 12);
    else
        assert_int_equal(inet_pton(AF_INET6, text, p.address), 1);
    return p;
}

static crpci_sock_name local(uint32_t uid)
{
    crpci_sock_name p;
    memset(&p, 0, sizeof p);
    p.kind = CRPCI_SOCK_UNIX;
    p.scope = uid;
    return p;
}

static bool one_account(crpci_sock_name a, crpci_sock_name b)
{
    crpci_sock_name x = crpci_peer_key(&a), y = crpci_peer_key(&b);
    return x.kind == y.kind && x.scope == y.scope && memcmp(x.address, y.address, 16) == 0;
}

/* --- networks --------------------------------------------------------------------------------- */

static crpci_peer_networks networks(crpci_heap *h, const char *text, bool weighted)
{
    crpci_peer_networks list;
    crpc_error error;
    assert_int_equal(crpci_peer_read_networks(&list, h, text, "allow", weighted, &error), CRPC_OK);
    return list;
}

static bool allows(const char *text, crpci_sock_name p)
{
    crpci_heap *h = heap();
    crpci_peer_networks list = networks(h, text, false);
    bool found = crpci_peer_find_network(&list, &p) != NULL;
    crpci_peer_free_networks(&list, h);
    crpci_heap_unref(h);
    return found;
}

static void a_network_holds_the_addresses_that_share_its_bits(void **state)
{
    (void)state;
    assert_true(allows("10.0.0.0/8", ip("10.255.0.1")));
    assert_false(allows("10.0.0.0/8", ip("11.0.0.1")));
    assert_true(allows("10.0.0.128/25", ip("10.0.0.200")));
    assert_false(allows("10.0.0.128/25", ip("10.0.0.127")));
    assert_true(allows("10.0.0.7", ip("10.0.0.7")));
    assert_false(allows("10.0.0.7", ip("10.0.0.6")));
    assert_true(allows("fd00::/8", ip("fd12::1")));
    assert_false(allows("fd00::/8", ip("fe80::1")));
    assert_true(allows("0.0.0.0/0", ip("192.0.2.1")));
    assert_false(allows("0.0.0.0/0", ip("2001:db8::1")));
    assert_true(allows("::/0", ip("2001:db8::1")));
}

static void a_list_holds_what_any_of_its_networks_holds(void **state)
{
    const char *list = "10.0.0.0/8,unix,fd00::/8";
    (void)state;
    assert_true(allows(list, ip("10.1.1.1")));
    assert_true(allows(list, ip("fd00::1")));
    assert_true(allows(list, local(1000)));
    assert_false(allows(list, ip("192.0.2.1")));
    assert_false(allows("10.0.0.0/8", local(0)));
}

static void an_ipv4_peer_of_an_ipv6_socket_is_in_the_ipv4_network(void **state)
{
    (void)state;
    assert_true(allows("10.0.0.0/8", ip("::ffff:10.1.2.3")));
}

static void a_network_that_is_none_is_refused_with_its_text(void **state)
{
    static const char *const bad[] = {"10.0.0.0/33",  "10.0.0.0/",  "10.0.0/8", "10.0.0.7/8",
                                      "fd00::/129",   "localhost",  ",",        "10.0.0.0/8,,unix",
                                      "10.0.0.0/8:4", "10.0.0.0/x", " unix",    "fd00::1/8"};
    crpci_heap *h = heap();
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        crpci_peer_networks list;
        crpc_error error;
        int err = crpci_peer_read_networks(&list, h, bad[i], "allow", false, &error);
        if (err != CRPC_EINVAL)
            fail_msg("%s was taken", bad[i]);
        assert_non_null(strstr(error.text, "allow: \""));
        crpci_peer_free_networks(&list, h);
    }
    crpci_heap_unref(h);
}

static void a_weight_belongs_to_the_most_specific_network(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_networks list = networks(h, "10.0.0.0/8:4,10.0.0.7:16,::1/128:2,unix:3", true);
    crpci_sock_name p = ip("10.0.0.7");
    (void)state;
    assert_int_equal(crpci_peer_find_network(&list, &p)->weight, 16);
    p = ip("10.9.9.9");
    assert_int_equal(crpci_peer_find_network(&list, &p)->weight, 4);
    p = ip("::1");
    assert_int_equal(crpci_peer_find_network(&list, &p)->weight, 2);
    p = local(7);
    assert_int_equal(crpci_peer_find_network(&list, &p)->weight, 3);
    crpci_peer_free_networks(&list, h);
    crpci_heap_unref(h);
}

static void weights_are_from_1_to_a_million(void **state)
{
    static const char *const bad[] = {"10.0.0.7", "10.0.0.7:0", "10.0.0.7:-1", "10.0.0.7:1000001",
                                      "10.0.0.7:x", "10.0.0.7:"};
    crpci_heap *h = heap();
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        crpci_peer_networks list;
        crpc_error error;
        assert_int_equal(crpci_peer_read_networks(&list, h, bad[i], "peers", true, &error),
                         CRPC_EINVAL);
        crpci_peer_free_networks(&list, h);
    }
    crpci_heap_unref(h);
}

/* --- accounts --------------------------------------------------------------------------------- */

static void a_host_is_one_account(void **state)
{
    (void)state;
    assert_true(one_account(ip("10.0.0.7"), ip("::ffff:10.0.0.7")));
    assert_false(one_account(ip("10.0.0.7"), ip("10.0.0.8")));
    assert_true(one_account(ip("2001:db8:0:1::1"), ip("2001:db8:0:1:ffff::2")));
    assert_false(one_account(ip("2001:db8:0:1::1"), ip("2001:db8:0:2::1")));
    assert_false(one_account(ip("fe80::1"), ip("fe80::2")));
    assert_false(one_account(ip("fd00::1"), ip("fd00::2")));
    assert_true(one_account(local(1000), local(1000)));
    assert_false(one_account(local(1000), local(0)));
    assert_false(one_account(local(0), ip("::")));
}

static void link_local_hosts_differ_by_interface(void **state)
{
    crpci_sock_name a = ip("fe80::1"), b = a;
    (void)state;
    a.scope = 1;
    b.scope = 2;
    assert_false(one_account(a, b));
}

static crpci_peer_table *table(crpci_heap *h, int rate, int burst)
{
    static crpci_peer_table t;
    memset(&t, 0, sizeof t);
    crpci_peer_open(&t, h, secret, 1);
    assert_int_equal(crpci_peer_limit(&t, CRPCI_PEER_REQUESTS, rate, burst), CRPC_OK);
    return &t;
}

static crpci_peer_account *join(crpci_peer_table *t, const char *host, int64_t now)
{
    crpci_sock_name p = ip(host);
    crpci_peer_account *a = crpci_peer_connect(t, &p, now);
    assert_non_null(a);
    return a;
}

static void leave(crpci_peer_table *t, crpci_peer_account *a, int64_t now)
{
    crpci_peer_release(t, a, CRPCI_PEER_CONNECTIONS, now);
}

static crpci_peer_account *largest(crpci_peer_table *t, const crpci_peer_account *but)
{
    static int64_t now;
    return crpci_peer_largest(t, but, CRPCI_PEER_CONNECTIONS, now += SECOND);
}

static void an_account_lives_as_long_as_its_connections(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 0, 0);
    crpci_peer_account *a = join(t, "10.0.0.7", 0);
    (void)state;
    assert_ptr_equal(join(t, "10.0.0.7", 0), a);
    assert_ptr_not_equal(join(t, "10.0.0.8", 0), a);
    assert_int_equal(a->held[CRPCI_PEER_CONNECTIONS], 2);
    leave(t, largest(t, a), 0);
    leave(t, a, 0);
    assert_ptr_equal(largest(t, NULL), a);
    leave(t, a, 0);
    assert_null(largest(t, NULL));
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

static void the_largest_account_is_so_by_its_weight(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 0, 0);
    crpci_peer_account *gateway, *host;
    int i;
    (void)state;
    t->weights = networks(h, "10.0.0.7:16", true);
    for (i = 0; i < 20; i++)
        gateway = join(t, "10.0.0.7", 0);
    host = join(t, "10.0.0.8", 0);
    join(t, "10.0.0.8", 0);
    assert_ptr_equal(largest(t, NULL), host); /* 2 against 20/16 */
    assert_ptr_equal(largest(t, host), gateway);
    assert_true(crpci_peer_is_larger(host, gateway, CRPCI_PEER_CONNECTIONS));
    for (i = 0; i < 20; i++)
        leave(t, gateway, 0);
    leave(t, host, 0);
    leave(t, host, 0);
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

/* An attacker with many addresses must not buy a comparison of all accounts with each request. */
static void accounts_are_compared_now_and_then(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 0, 0);
    crpci_peer_account *a = join(t, "10.0.0.7", 0), *b = join(t, "10.0.0.8", 0);
    const crpci_peer_resource what = CRPCI_PEER_CONNECTIONS;
    (void)state;
    join(t, "10.0.0.7", 0);
    assert_ptr_equal(crpci_peer_largest(t, NULL, what, SECOND), a);
    join(t, "10.0.0.8", 0);
    join(t, "10.0.0.8", 0);
    assert_ptr_equal(crpci_peer_largest(t, NULL, what, SECOND + 9999), a);
    assert_ptr_equal(crpci_peer_largest(t, NULL, what, SECOND + 10002), b);
    leave(t, b, 0);
    leave(t, b, 0);
    leave(t, b, 0); /* it ends, and is not told of any more */
    assert_ptr_equal(crpci_peer_largest(t, NULL, what, SECOND + 10003), a);
    assert_null(crpci_peer_largest(t, a, what, SECOND + 10003));
    leave(t, a, 0);
    leave(t, a, 0);
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

/* Takes all tokens of a host, one connection at a time. */
static void spend(crpci_peer_table *t, const char *host, int tokens, int64_t now)
{
    crpci_peer_account *a = join(t, host, now);
    while (tokens--)
        assert_true(crpci_limiter_bucket_take(&a->rates[CRPCI_PEER_REQUESTS], now));
    assert_false(crpci_limiter_bucket_take(&a->rates[CRPCI_PEER_REQUESTS], now));
    leave(t, a, now);
}

static void reconnecting_does_not_fill_the_bucket(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 10, 10);
    int64_t now = 5 * SECOND;
    (void)state;
    spend(t, "10.0.0.7", 10, now);
    spend(t, "10.0.0.7", 0, now);
    spend(t, "10.0.0.7", 4, now + SECOND / 2); /* five came back, less the rounding */
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

/* Other hosts, however many, do not push out what a host owes. */
static void other_hosts_do_not_reset_a_debt(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 10, 10);
    char host[32];
    int i;
    (void)state;
    spend(t, "192.0.2.1", 10, SECOND);
    for (i = 0; i < 50000; i++) {
        snprintf(host, sizeof host, "10.%d.%d.1", i / 250, i % 250);
        leave(t, join(t, host, SECOND), SECOND);
    }
    spend(t, "192.0.2.1", 0, SECOND);
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

/* A new host pays for debts of others only if they cover both of its cells. */
static void debts_of_others_seldom_hit_a_new_host(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 10, 10);
    char host[32];
    int i, hit = 0;
    (void)state;
    for (i = 0; i < 400; i++) {
        snprintf(host, sizeof host, "10.%d.%d.1", 1 + i / 250, i % 250);
        spend(t, host, 10, SECOND);
    }
    for (i = 0; i < 1000; i++) {
        crpci_peer_account *a;
        snprintf(host, sizeof host, "172.16.%d.%d", i / 250, i % 250);
        a = join(t, host, SECOND);
        hit += a->rates[CRPCI_PEER_REQUESTS].debt > 0;
        leave(t, a, SECOND);
    }
    assert_in_range(hit, 0, 30); /* expected: (400/4096)^2 of 1,000, about 9 */
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

static void a_debt_is_forgotten_when_it_is_paid(void **state)
{
    crpci_heap *h = heap();
    crpci_peer_table *t = table(h, 10, 10);
    (void)state;
    spend(t, "10.0.0.7", 10, SECOND);
    spend(t, "10.0.0.7", 10, 3 * SECOND);
    spend(t, "10.0.0.7", 10, INT64_C(400) * 86400 * SECOND);  /* times in cells are far behind */
    spend(t, "10.0.0.7", 10, INT64_C(1100) * 86400 * SECOND); /* and have wrapped */
    crpci_peer_close(t, h);
    crpci_heap_unref(h);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    crpci_peer_table t;
    crpci_sock_name p = ip("10.0.0.7");
    crpci_heap *h;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    memset(&t, 0, sizeof t);
    if (err)
        return err;
    err = crpci_peer_read_networks(&t.weights, h, "10.0.0.7:16,unix:4", "peers", true, NULL);
    crpci_peer_open(&t, h, secret, 1);
    if (!err)
        err = crpci_peer_limit(&t, CRPCI_PEER_REQUESTS, 1, 1);
    if (!err)
        err = crpci_peer_limit(&t, CRPCI_PEER_FAILURES, 1, 1);
    if (!err) {
        crpci_peer_account *a = crpci_peer_connect(&t, &p, 0);
        if (a)
            crpci_peer_release(&t, a, CRPCI_PEER_CONNECTIONS, 0);
        err = a ? CRPC_OK : CRPC_ENOMEM;
    }
    crpci_peer_close(&t, h);
    crpci_heap_unref(h);
    return err;
}

static void running_out_of_memory_leaves_nothing_behind(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(scenario, NULL), 6);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_network_holds_the_addresses_that_share_its_bits),
        CT_TEST(a_list_holds_what_any_of_its_networks_holds),
        CT_TEST(an_ipv4_peer_of_an_ipv6_socket_is_in_the_ipv4_network),
        CT_TEST(a_network_that_is_none_is_refused_with_its_text),
        CT_TEST(a_weight_belongs_to_the_most_specific_network),
        CT_TEST(weights_are_from_1_to_a_million),
        CT_TEST(a_host_is_one_account),
        CT_TEST(link_local_hosts_differ_by_interface),
        CT_TEST(an_account_lives_as_long_as_its_connections),
        CT_TEST(the_largest_account_is_so_by_its_weight),
        CT_TEST(accounts_are_compared_now_and_then),
        CT_TEST(reconnecting_does_not_fill_the_bucket),
        CT_TEST(other_hosts_do_not_reset_a_debt),
        CT_TEST(debts_of_others_seldom_hit_a_new_host),
        CT_TEST(a_debt_is_forgotten_when_it_is_paid),
        CT_TEST(running_out_of_memory_leaves_nothing_behind),
    };
    return CT_RUN(tests);
}
