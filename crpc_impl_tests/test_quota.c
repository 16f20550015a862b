#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define SECOND 1000000

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

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(zero_options_limit_nothing), CT_TEST(a_request_that_leaves_makes_room),
        CT_TEST(refusals_take_nothing),      CT_TEST(an_overload_is_refused),
    };
    return CT_RUN(tests);
}
