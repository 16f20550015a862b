/* CRPC_ENABLE_POLICY=0: what it leaves out is refused by name, and the rest works. */
#define CRPC_IMPLEMENTATION
#define CRPC_ENABLE_POLICY 0
#define CRPC_ENABLE_ZOOKEEPER 0
#include "../../crpc.h"
#include "../crpc_test.h"
#include "../crpc_net.h"

static void expect_refused(const char *url, const crpc_channel_options *o, const char *says)
{
    crpc_channel *ch;
    crpc_error error;
    int status = crpc_channel_open(&ch, url, o, &error);
    if (status != CRPC_EUNSUPPORTED || strcmp(error.text, says) != 0)
        fail_msg("%s: %s, \"%s\"", url, crpc_status_name(status), error.text);
}

static int never(void *user, const crpc_method *method, const crpc_error *error, void *response)
{
    (void)user, (void)method, (void)error, (void)response;
    return CRPC_OK;
}

static void what_is_left_out_is_refused(void **state)
{
    static const char *const urls[][2] = {
        {"tcp://127.0.0.1:1?lb=p2c", "lb: this balancer is not compiled in: CRPC_ENABLE_POLICY is 0"},
        {"tcp://127.0.0.1:1?cluster=forking",
         "cluster: not compiled in: CRPC_ENABLE_POLICY is 0"},
        {"tcp://127.0.0.1:1?breaker=1", "breaker=1: not compiled in: CRPC_ENABLE_POLICY is 0"},
        {"tcp://127.0.0.1:1?backup_ms=5", "backup_ms=5: not compiled in: CRPC_ENABLE_POLICY is 0"},
        {"tcp://127.0.0.1:1?max_endpoints=3",
         "max_endpoints=3: not compiled in: CRPC_ENABLE_POLICY is 0"},
        {"tcp://127.0.0.1:1?retry_budget=3",
         "retry_budget=3: not compiled in: CRPC_ENABLE_POLICY is 0"},
    };
    crpc_method_options m = CRPC_INIT;
    crpc_channel_options o = CRPC_INIT;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof urls / sizeof *urls; i++)
        expect_refused(urls[i][0], NULL, urls[i][1]);
    m.method = dyn_Echo_Add_method;
    o.methods = &m;
    o.method_count = 1;
    m.degraded = 1;
    expect_refused("tcp://127.0.0.1:1", &o,
                   "Add: degraded: not compiled in: CRPC_ENABLE_POLICY is 0");
    m.degraded = 0;
    m.fallback = never;
    expect_refused("tcp://127.0.0.1:1", &o,
                   "Add: fallback, canned: not compiled in: CRPC_ENABLE_POLICY is 0");
    m.fallback = NULL;
    m.canned = crpc_view_str("");
    expect_refused("tcp://127.0.0.1:1", &o,
                   "Add: fallback, canned: not compiled in: CRPC_ENABLE_POLICY is 0");
    m.canned = crpc_view_of(NULL, 0);
    m.policy.cluster = CRPC_CLUSTER_BROADCAST;
    expect_refused("tcp://127.0.0.1:1", &o,
                   "Add: cluster: not compiled in: CRPC_ENABLE_POLICY is 0");
    m.policy.cluster = CRPC_CLUSTER_DEFAULT;
    m.policy.backup_ms = 7;
    expect_refused("tcp://127.0.0.1:1", &o,
                   "backup_ms=7: not compiled in: CRPC_ENABLE_POLICY is 0");
}

static void the_rest_works(void **state)
{
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 3, "?lb=wrr&cluster=failover&retries=2&request_ids=1&wait=1&backup_ms=-1&"
                      "timeout_ms=20000",
               NULL);
    fleet_peer_close(&f.peers[1]);
    for (i = 0; i < 12; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_in_range(net_calls(&f.peers[0].service), 3, 9);
    fleet_close(&f);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(what_is_left_out_is_refused),
        CT_TEST(the_rest_works),
    };
    return CT_RUN(tests);
}
