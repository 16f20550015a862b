/* A server and its registry: a real ZooKeeper.
 * crpc-test-timeout: 300 */
#define CRPC_IMPLEMENTATION
#include "../../crpc.h"
#define CT_TEST_SECONDS 120
#include "../crpc_test.h"
#include "../crpc_net.h"
#include "../crpc_zk.h"

static zk_server zookeeper;
static int nodes(char *name, size_t size)
{
    zk_client *c = zk_open(&zookeeper);
    zk_names *names = (zk_names *)calloc(1, sizeof *names);
    int n;
    zk_children(c, "/test/dyn.Echo/providers", names);
    n = names->count;
    if (n && name)
        snprintf(name, size, "%s", names->name[0]);
    zk_close(c);
    free(names);
    return n;
}

static void open_registered(net *n, int lame_ms)
{
    static char url[64];
    memset(n, 0, sizeof *n);
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d/test", zookeeper.port);
    n->time = NET_TIME_RUNS;
    n->server_options.registry = url;
    n->server_options.directory.timeout_ms = NET_PATIENCE;
    n->server_options.directory.must_connect = 1;
    n->server_options.warmup_ms = 30000;
    n->server_options.lame_ms = lame_ms;
    n->server_options.drain_ms = 1000;
    net_open(n, ct_poller(), NET_THREAD);
}

/* Consumers that do not know yet are served. */
static void it_serves_on_when_it_has_unregistered(void **state)
{
    char name[1024];
    net n;
    (void)state;
    open_registered(&n, 1000000);
    assert_int_equal(nodes(name, sizeof name), 1);
    assert_non_null(strstr(name, "%26warmup%3D30000%26weight%3D100"));
    crpc_server_stop(n.server);
    assert_true(CT_WAIT(nodes(NULL, 0) == 0, NET_PATIENCE));
    net_check_add(n.channel, 1);
    crpc_channel_close(n.channel); /* a new connection, too */
    n.channel = net_channel(n.url, NULL, ct_poller(), NULL, &n.channel_options);
    net_check_add(n.channel, 2);
    net_time_add(1000000);
    ct_matrix(n.loop, "serves-unregistered");
    net_close(&n); /* which would wait for those 1000 s */
}

static void it_stops_without_its_registry_too(void **state)
{
    int64_t start;
    net n;
    (void)state;
    open_registered(&n, 100);
    zk_freeze(&zookeeper);
    start = ct_now_ms();
    crpc_server_stop(n.server);
    net_check_add(n.channel, 1);
    ct_matrix(n.loop, "stops-without-registry");
    net_close(&n);
    zk_thaw(&zookeeper);
    assert_true(ct_now_ms() - start >= 99);
    assert_true(ct_now_ms() - start < 30000);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_serves_on_when_it_has_unregistered),
        CT_TEST(it_stops_without_its_registry_too),
    };
    int failed;
    zk_start(&zookeeper);
    failed = CT_RUN(tests);
    zk_end(&zookeeper);
    return failed;
}
