/* Sessions that users share, and their waits before they come back. Without a server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_zk_rig.h"

static void the_wait_before_a_new_handle_is_random(void **state)
{
    int64_t low = INT64_MAX, high = 0;
    crpc_loop *loop = loop_with(NULL);
    crpci_zk_session *s;
    int i;
    (void)state;
    assert_int_equal(session(loop, "10.0.0.1", &s), CRPC_OK);
    for (i = 0; i < 1000; i++) { /* the first session after a lost one: 0 to 2 s */
        int64_t us = crpci_zk_job_delay(s);
        low = us < low ? us : low;
        high = us > high ? us : high;
    }
    assert_true(low >= 0 && low < 100000 && high <= 2000000 && high > 1900000);
    s->timeout_ms = 400; /* and half of a short session */
    for (i = 0; i < 1000; i++)
        assert_true(crpci_zk_job_delay(s) <= 200000);
    s->spread_us = 0;
    assert_true(crpci_zk_job_delay(s) == 0);
    s->negotiated_ms = 1000;
    assert_true(crpci_zk_job_pace(s) == 1000000);
    s->negotiated_ms = 15000;
    assert_true(crpci_zk_job_pace(s) == 3750000);
    crpci_zk_session_free(s);
    crpc_loop_close(loop);
}

static int64_t clock_of_client;

static int64_t client_clock(void *user)
{
    (void)user;
    return clock_of_client;
}

/* 500 devices with the same image lose their sessions when a registry restarts. Their clocks differ
 * by a few microseconds only. */
static void a_fleet_spreads_its_reconnects(void **state)
{
    crpc_hooks hooks = ct_hooks();
    int bucket[20], i, most = 0;
    (void)state;
    memset(bucket, 0, sizeof bucket);
    hooks.clock_us = client_clock;
    for (i = 0; i < 500; i++) {
        crpci_directory_options o;
        crpci_zk_session *s;
        crpc_loop *loop;
        int at;
        clock_of_client = 30000000 + 3 * i;
        loop = loop_with(&hooks);
        assert_non_null(loop);
        memset(&o, 0, sizeof o);
        o.session_timeout_ms = CRPCI_ZK_POOL_TIMEOUT_MS;
        assert_int_equal(crpci_zk_pool_new(loop, "10.0.0.1", &o, &s, NULL), CRPC_OK);
        at = (int)(crpci_zk_job_delay(s) / 100000);
        assert_in_range(at, 0, 19);
        bucket[at]++;
        crpci_zk_session_free(s);
        crpc_loop_close(loop);
    }
    for (i = 0; i < 20; i++)
        most = bucket[i] > most ? bucket[i] : most;
    if (most > 50) /* twice what an even spread of 2 s gives each 100 ms */
        fail_msg("%d of 500 come within 100 ms", most);
}

static void users_with_equal_options_share_a_session(void **state)
{
    static const struct {
        const char *url, *credential, *cache;
        int timeout_ms;
        bool same;
    } others[] = {
        {"zookeeper://127.0.0.1:1/a", NULL, NULL, 0, true},
        /* another root is another directory */
        {"zookeeper://127.0.0.1:1/b/c", NULL, NULL, 15000, true},
        {"zookeeper://127.0.0.1:1/a", "u:p", NULL, 0, false},
        {"zookeeper://127.0.0.1:1/a", NULL, NULL, 4000, false},
        {"zookeeper://127.0.0.1:1/a", NULL, "/nowhere/cache", 0, false},
        {"zookeeper://127.0.0.1:2/a", NULL, NULL, 0, false},
    };
    crpc_loop *loop = loop_with(NULL);
    crpci_backend *first, *r;
    size_t i;
    (void)state;
    assert_int_equal(crpci_open_registry(loop, others[0].url, NULL, &first, NULL), CRPC_OK);
    for (i = 0; i < sizeof others / sizeof *others; i++) {
        crpci_directory_options o;
        crpci_zk_session *a, *b;
        memset(&o, 0, sizeof o);
        o.session_timeout_ms = others[i].timeout_ms;
        o.credential = others[i].credential;
        o.cache = others[i].cache;
        assert_int_equal(crpci_open_registry(loop, others[i].url, &o, &r, NULL), CRPC_OK);
        a = ((crpci_zk_directory *)(void *)first)->session;
        b = ((crpci_zk_directory *)(void *)r)->session;
        assert_int_equal(a == b, others[i].same);
        crpci_directory_close(r);
    }
    crpci_directory_close(first);
    assert_true(crpci_list_empty(&loop->registries));
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(the_wait_before_a_new_handle_is_random),
        CT_TEST(a_fleet_spreads_its_reconnects),
        CT_TEST(users_with_equal_options_share_a_session),
    };
    return CT_RUN(tests);
}
