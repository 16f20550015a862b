/* Phases of a session with ZooKeeper, without a server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_zk_rig.h"

static int64_t clock_of_client;

static int64_t client_clock(void *user)
{
    (void)user;
    return clock_of_client;
}

/* Lists become stale when the loss has lasted as long as a session; that is reported once. */
static void lists_become_stale_after_a_session_timeout(void **state)
{
    crpc_hooks hooks = ct_hooks();
    crpci_zk_session *s;
    crpc_loop *loop;
    (void)state;
    hooks.clock_us = client_clock;
    clock_of_client = 1000000;
    loop = loop_with(&hooks);
    assert_int_equal(session(loop, "10.0.0.1", &s), CRPC_OK);
    s->negotiated_ms = 4000;
    assert_false(crpci_zk_session_is_old(s));
    s->phase = CRPCI_ZK_LOST;
    s->lost_us = clock_of_client;
    clock_of_client += 3999999;
    assert_false(crpci_zk_session_is_old(s));
    clock_of_client++;
    assert_true(crpci_zk_session_is_old(s));
    crpci_zk_session_age(s); /* without a directory there is nothing to be done */
    assert_false(crpci_zk_session_is_old(s));
    crpci_zk_session_free(s);
    crpc_loop_close(loop);
}

/* A peer that is not ZooKeeper grants an absurd session timeout. */
static void a_peer_that_is_not_zookeeper_is_recognised(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_zk_session *s;
    (void)state;
    assert_int_equal(session(loop, "10.0.0.1", &s), CRPC_OK);
    crpci_zk_session_connected(s, 7, 540291120);
    assert_int_equal(s->phase, CRPCI_ZK_OVER);
    assert_non_null(strstr(lines, "registry zookeeper://10.0.0.1: "));
    crpci_zk_session_connected(s, 7, 4000);
    assert_int_equal(s->phase, CRPCI_ZK_CONNECTED);
    assert_true(s->id == 7);
    crpci_zk_session_disconnected(s);
    assert_int_equal(s->phase, CRPCI_ZK_LOST);
    crpci_zk_session_expired(s, false);
    assert_int_equal(s->phase, CRPCI_ZK_OVER);
    crpci_zk_session_free(s);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(lists_become_stale_after_a_session_timeout),
        CT_TEST(a_peer_that_is_not_zookeeper_is_recognised),
    };
    return CT_RUN(tests);
}
