#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define SECOND 1000000

static crpci_heap *heap(void)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    return h;
}

static crpci_quota quota(int max, int adaptive, int rate, int burst, uint32_t least)
{
    crpc_method_limit l;
    crpci_quota q;
    memset(&l, 0, sizeof l);
    l.max_concurrency = max;
    l.adaptive = adaptive;
    l.rate = rate;
    l.burst = burst;
    crpci_quota_init(&q, &l, least);
    return q;
}

static void zero_options_limit_nothing(void **state)
{
    crpci_quota q = quota(0, 0, 0, 0, 0), none = quota(-1, -1, -1, -1, 0);
    int i;
    (void)state;
    for (i = 0; i < 100000; i++) {
        assert_null(crpci_quota_enter(&q, 0));
        assert_null(crpci_quota_enter(&none, 0));
    }
}

static void a_request_that_leaves_makes_room(void **state)
{
    crpci_quota q = quota(2, 0, 0, 0, 0);
    (void)state;
    assert_null(crpci_quota_enter(&q, 0));
    assert_null(crpci_quota_enter(&q, 0));
    assert_non_null(strstr(crpci_quota_enter(&q, 0), "max_concurrency"));
    crpci_quota_leave(&q, true, 5, 5);
    assert_null(crpci_quota_enter(&q, 5));
    assert_non_null(crpci_quota_enter(&q, 5));
}

/* A request that one limit refuses takes nothing of the others. */
static void refusals_take_nothing(void **state)
{
    crpci_quota q = quota(3, 1, 1, 2, 0);
    int i;
    (void)state;
    assert_null(crpci_quota_enter(&q, 0));
    assert_null(crpci_quota_enter(&q, 0));
    for (i = 0; i < 100; i++)
        assert_non_null(strstr(crpci_quota_enter(&q, 0), "(rate)"));
    assert_int_equal(q.active, 2);
    assert_int_equal(q.limiter.active, 2);
    assert_null(crpci_quota_enter(&q, SECOND));
    for (i = 0; i < 100; i++)
        assert_non_null(strstr(crpci_quota_enter(&q, 5 * SECOND), "(max_concurrency)"));
    crpci_quota_leave(&q, true, -1, 5 * SECOND);
    assert_null(crpci_quota_enter(&q, 5 * SECOND));
    crpci_quota_leave(&q, true, -1, 5 * SECOND);
    assert_null(crpci_quota_enter(&q, 5 * SECOND)); /* the refused request took no token */
}

/* A server with some workers, each of which serves a request in 10 ms, gets three times as many
 * requests as it can serve: those let in do not queue for long, and the workers are never idle. */
static void an_overload_is_refused(void **state)
{
    enum { WORKERS = 4, SERVICE_US = 10000, QUEUE = 4096 };
    static int64_t came[QUEUE];
    crpci_quota q = quota(0, 1, 0, 0, WORKERS);
    int64_t now, free_at[WORKERS] = {0, 0, 0, 0}, began[WORKERS], slowest = 0;
    int head = 0, tail = 0, served = 0, w;
    (void)state;
    memset(began, 0xff, sizeof began);
    for (now = SECOND; now < 61 * SECOND; now += 100) {
        for (w = 0; w < WORKERS; w++) {
            if (began[w] >= 0 && free_at[w] <= now) {
                crpci_quota_leave(&q, true, now - began[w], now);
                if (now > 31 * SECOND) {
                    served++;
                    slowest = now - began[w] > slowest ? now - began[w] : slowest;
                }
                began[w] = -1;
            }
            if (began[w] < 0 && head < tail) {
                began[w] = came[head++ % QUEUE];
                free_at[w] = now + SERVICE_US;
            }
        }
        if (now % 800 < 100 && !crpci_quota_enter(&q, now)) /* 1250 a second; it can do 400 */
            came[tail++ % QUEUE] = now;
    }
    assert_in_range(served, 30 * 400 * 8 / 10, 30 * 400);
    assert_true(slowest < 6 * SERVICE_US); /* without a limit it would be seconds */
}

/* --- clients ---------------------------------------------------------------------------------- */

static crpci_addr addr(const char *text)
{
    crpci_addr a;
    assert_true(crpci_sock_parse(&a, text));
    return a;
}

static crpci_quota_client *join(crpci_quota_clients *c, const char *text)
{
    crpci_addr a = addr(text);
    return crpci_quota_connect(c, &a);
}

static void clients_are_hosts(void **state)
{
    crpci_heap *h = heap();
    crpci_quota_clients c;
    crpci_quota_client *k[6];
    (void)state;
    assert_int_equal(crpci_quota_open(&c, h, 1, 1), CRPC_OK);
    k[0] = join(&c, "10.0.0.1:80");
    k[1] = join(&c, "10.0.0.1:81");
    k[2] = join(&c, "10.0.0.2:80");
    k[3] = join(&c, "[::ffff:10.0.0.1]:5"); /* the same host, by a listener for both families */
    k[4] = join(&c, "[::1]:80");
    k[5] = join(&c, "unix:/x");
    assert_ptr_equal(k[0], k[1]);
    assert_ptr_equal(k[0], k[3]);
    assert_int_equal(k[0]->connections, 3);
    assert_ptr_not_equal(k[0], k[2]);
    assert_ptr_not_equal(k[4], k[5]);
    assert_true(crpci_limiter_bucket_take(&k[0]->bucket, 0));
    assert_false(crpci_limiter_bucket_take(&k[1]->bucket, 0));
    assert_true(crpci_limiter_bucket_take(&k[2]->bucket, 0));
    crpci_quota_disconnect(&c, k[0]);
    crpci_quota_disconnect(&c, k[1]);
    crpci_quota_disconnect(&c, k[3]);
    assert_int_equal(c.idle_count, 1);
    assert_ptr_equal(join(&c, "10.0.0.1:99"), k[0]); /* with the tokens that it had left */
    assert_int_equal(c.idle_count, 0);
    assert_false(crpci_limiter_bucket_take(&k[0]->bucket, 0));
    crpci_quota_disconnect(&c, k[0]);
    crpci_quota_disconnect(&c, k[2]);
    crpci_quota_disconnect(&c, k[4]);
    crpci_quota_disconnect(&c, k[5]);
    crpci_quota_close(&c);
    crpci_heap_unref(h);
}

static void clients_gone_for_longest_are_evicted(void **state)
{
    crpci_heap *h = heap();
    crpci_quota_clients c;
    crpci_quota_client *here, *k;
    unsigned i;
    (void)state;
    assert_int_equal(crpci_quota_open(&c, h, 1, 1), CRPC_OK);
    here = join(&c, "192.168.0.1:1"); /* connected: never evicted */
    assert_true(crpci_limiter_bucket_take(&here->bucket, 0));
    for (i = 0; i < CRPCI_QUOTA_IDLE_MAX + 10; i++) {
        char text[32];
        snprintf(text, sizeof text, "10.0.%u.%u:1", i / 256, i % 256);
        k = join(&c, text);
        assert_true(crpci_limiter_bucket_take(&k->bucket, 0));
        crpci_quota_disconnect(&c, k);
        assert_true(c.idle_count <= CRPCI_QUOTA_IDLE_MAX);
    }
    assert_ptr_equal(join(&c, "192.168.0.1:2"), here);
    k = join(&c, "10.0.0.10:1");
    assert_false(crpci_limiter_bucket_take(&k->bucket, 0)); /* the oldest that was kept */
    crpci_quota_disconnect(&c, k);
    k = join(&c, "10.0.0.9:1");
    assert_true(crpci_limiter_bucket_take(&k->bucket, 0));
    crpci_quota_disconnect(&c, k);
    crpci_quota_disconnect(&c, here);
    crpci_quota_disconnect(&c, here);
    crpci_quota_close(&c);
    assert_null(c.buckets);
    crpci_heap_unref(h);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    crpci_quota_clients c;
    crpci_addr a = addr("10.0.0.1:1");
    crpci_heap *h;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    err = crpci_quota_open(&c, h, 1, 1);
    if (!err) {
        crpci_quota_client *k = crpci_quota_connect(&c, &a);
        if (k)
            crpci_quota_disconnect(&c, k);
        err = k ? CRPC_OK : CRPC_ENOMEM;
    }
    crpci_quota_close(&c);
    crpci_heap_unref(h);
    return err;
}

static void it_survives_being_out_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(scenario, NULL), 3);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(zero_options_limit_nothing), CT_TEST(a_request_that_leaves_makes_room),
        CT_TEST(refusals_take_nothing),           CT_TEST(an_overload_is_refused),
        CT_TEST(clients_are_hosts),               CT_TEST(clients_gone_for_longest_are_evicted),
        CT_TEST(it_survives_being_out_of_memory),
    };
    return CT_RUN(tests);
}
