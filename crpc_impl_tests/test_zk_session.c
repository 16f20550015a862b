/* Phases of a session with ZooKeeper, without a server. */
#include <pthread.h>
#include <unistd.h>

static pthread_t syncing_thread; /* which waited for the disk last */

static int test_fsync(int fd)
{
    syncing_thread = pthread_self();
    return fdatasync(fd);
}
#define fsync test_fsync

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

static int ages;

static bool count_age(crpci_zk_session *s)
{
    (void)s;
    ages++;
    return true;
}

/* Lists become stale when the loss has lasted as long as a session, once; after twice that the session is
 * given up. */
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
    assert_int_equal(crpci_zk_session_absence(s), 0);
    s->phase = CRPCI_ZK_LOST;
    s->lost_us = clock_of_client;
    clock_of_client += 3999999;
    assert_int_equal(crpci_zk_session_absence(s), 0);
    clock_of_client++;
    assert_int_equal(crpci_zk_session_absence(s), 1);
    s->age = count_age;
    ages = 0;
    crpci_zk_session_age(s);
    crpci_zk_session_age(s);
    assert_int_equal(ages, 1);
    s->age = NULL;
    s->aged = false;
    crpci_zk_session_age(s); /* without a directory there is nothing to be done */
    assert_true(s->aged);
    clock_of_client += 3999999;
    assert_false(crpci_zk_session_is_hopeless(s));
    clock_of_client++;
    assert_true(crpci_zk_session_is_hopeless(s));
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

#if !CRPC_ZOOKEEPER_ST
/* One server accepts each connection and closes it, as a load balancer does for a while. Before the
 * session's timeout has passed, that says nothing about the session; then three refusals end it. */
static void refusals_count_only_after_the_session_timeout(void **state)
{
    crpc_hooks hooks = ct_hooks();
    char authority[CRPC_ADDRESS_MAX];
    crpci_zk_handle handle;
    crpci_zk_session *s;
    crpc_loop *loop;
    crpci_addr a;
    int fd, i;
    (void)state;
    assert_true(crpci_sock_parse(&a, "127.0.0.1:0"));
    fd = crpci_sock_listen(&a);
    assert_true(fd >= 0);
    crpci_sock_local(fd, &a);
    crpci_sock_format(&a, authority, sizeof authority);
    hooks.clock_us = client_clock;
    clock_of_client = 1000000;
    loop = loop_with(&hooks);
    assert_int_equal(session(loop, authority, &s), CRPC_OK);
    memset(&handle, 0, sizeof handle);
    s->handle = &handle;
    crpci_loop_lock(loop);
    crpci_zk_session_connected(s, 7, 15000);
    crpci_zk_session_disconnected(s);
    for (i = 0; i < 14; i++) {
        clock_of_client += 1000000;
        crpci_zk_session_probed(s, &handle, ZCONNECTIONLOSS);
        assert_int_equal(s->phase, CRPCI_ZK_LOST);
    }
    clock_of_client += 1000000;
    for (i = 0; i < 3; i++) {
        assert_int_equal(s->phase, CRPCI_ZK_LOST);
        crpci_zk_session_probed(s, &handle, ZCONNECTIONLOSS);
    }
    assert_int_equal(s->phase, CRPCI_ZK_OVER);
    crpci_loop_unlock(loop);
    s->handle = NULL;
    close(fd);
    crpci_zk_session_free(s);
    crpc_loop_close(loop);
}

static void on_nothing(zhandle_t *zh, int type, int state, const char *path, void *context)
{
    (void)zh;
    (void)type;
    (void)state;
    (void)path;
    (void)context;
}

/* The loop's thread does not wait for the disk: it sends a request, whose completion saves the cache on
 * the client's thread; here without an answer. */
static void the_clients_thread_saves_the_cache(void **state)
{
    char path[128], *names[] = {(char *)"crpc%3A%2F%2F10.0.0.1%3A1%2FS"};
    ct_dir dir = ct_dir_make();
    crpci_zk_handle handle;
    crpci_zk_session *s;
    crpc_loop *loop = loop_with(NULL);
    (void)state;
    assert_int_equal(session(loop, "127.0.0.1", &s), CRPC_OK);
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(crpci_cache_init(&s->cache, s->heap, path, 0));
    memset(&handle, 0, sizeof handle);
    handle.authed = true;
    handle.session = s;
    handle.zh = zookeeper_init2("127.0.0.1:1", on_nothing, 4000, NULL, NULL, ZOO_NO_LOG_CLIENTENV,
                                crpci_zk_session_on_log);
    assert_non_null(handle.zh);
    s->handle = &handle;
    syncing_thread = 0;
    crpci_loop_lock(loop);
    crpci_zk_session_connected(s, 7, 15000);
    assert_true(crpci_cache_put(&s->cache, "S", names, 1));
    crpci_zk_session_on_timer(loop, &s->timer);
    crpci_loop_unlock(loop);
    assert_true(CT_WAIT(access(path, F_OK) == 0, 10000));
    zookeeper_close(handle.zh);
    assert_true(syncing_thread && !pthread_equal(syncing_thread, pthread_self()));
    assert_false(s->called);
    s->handle = NULL;
    s->phase = CRPCI_ZK_ABSENT;
    crpci_loop_lock(loop);
    crpci_loop_timer_cancel(loop, &s->timer);
    crpci_loop_unlock(loop);
    crpci_zk_session_free(s);
    crpc_loop_close(loop);
    ct_dir_remove(dir);
}
#endif

int main(void)
{
    static const struct CMUnitTest tests[] = {
#if !CRPC_ZOOKEEPER_ST
        CT_TEST(the_clients_thread_saves_the_cache),
        CT_TEST(refusals_count_only_after_the_session_timeout),
#endif
        CT_TEST(lists_become_stale_after_a_session_timeout),
        CT_TEST(a_peer_that_is_not_zookeeper_is_recognised),
    };
    return CT_RUN(tests);
}
