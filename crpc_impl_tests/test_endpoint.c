#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static crpci_endpoint *first_endpoint(crpc_loop *l)
{
    assert_false(crpci_list_empty(&l->endpoints));
    return CRPCI_CONTAINER(l->endpoints.next, crpci_endpoint, link);
}

static size_t count(const crpci_list *list)
{
    const crpci_list *i;
    size_t n = 0;
    for (i = list->next; i != list; i = i->next)
        n++;
    return n;
}

static void it_is_shared_by_channels_that_ask_for_the_same(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *a, *b, *c;
    crpc_loop *l;
    (void)state;
    lo.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&a, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_open(&b, "list://127.0.0.1:9,127.0.0.1:10", &o, NULL), CRPC_OK);
    assert_int_equal(count(&l->endpoints), 2);
    assert_int_equal(first_endpoint(l)->refs, 2);
    assert_int_equal(crpc_channel_open(&c, "tcp://127.0.0.1:9?inflight=1", &o, NULL), CRPC_OK);
    assert_int_equal(count(&l->endpoints), 3);
    crpc_channel_close(a);
    assert_int_equal(count(&l->endpoints), 3);
    crpc_channel_close(b);
    assert_int_equal(count(&l->endpoints), 1);
    crpc_channel_close(c);
    assert_int_equal(count(&l->endpoints), 0);
    crpc_loop_close(l);
}

static int64_t fake_now;

static int64_t fake_clock(void *user)
{
    (void)user;
    return fake_now;
}

/* The window of the backoff doubles up to its limit, and the wait is anywhere in it. */
static void it_backs_off_with_full_jitter(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_endpoint *e;
    int64_t window = CRPCI_CHANNEL_BACKOFF_MIN;
    int failures, i;
    (void)state;
    lo.hooks = ct_hooks();
    lo.hooks.clock_us = fake_clock;
    fake_now = 1000000;
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    e = first_endpoint(l);
    for (failures = 0; failures < 12; failures++) {
        int64_t longest = 0, shortest = INT64_MAX;
        for (i = 0; i < 1000; i++) {
            int64_t wait;
            e->failures = failures;
            crpci_endpoint_back_off(e);
            assert_int_equal(e->failures, failures + 1);
            wait = e->usable_at - fake_now;
            assert_in_range(wait, 0, window - 1);
            longest = wait > longest ? wait : longest;
            shortest = wait < shortest ? wait : shortest;
        }
        assert_true(longest > window * 9 / 10);
        assert_true(shortest < window / 10);
        window = crpci_base_min64(window * 2, CRPCI_CHANNEL_BACKOFF_MAX);
    }
    crpc_channel_close(ch);
    crpc_loop_close(l);
}

/* Round robin, each in turn; one that backs off is passed over while another is usable, and all
 * backing off, the one that is soonest usable is taken. */
static void it_is_picked_in_turn(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_options lo = CRPC_INIT;
    crpc_channel *ch;
    crpc_loop *l;
    crpci_call c;
    crpci_endpoint *e[3];
    size_t i;
    (void)state;
    memset(&c, 0, sizeof c);
    lo.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&l, &lo), CRPC_OK);
    o.loop = l;
    assert_int_equal(crpc_channel_open(&ch, "list://127.0.0.1:9,127.0.0.1:10,127.0.0.1:11", &o,
                                       NULL),
                     CRPC_OK);
    for (i = 0; i < 3; i++)
        e[i] = crpci_channel_pick(ch, &c);
    assert_ptr_not_equal(e[0], e[1]);
    assert_ptr_not_equal(e[1], e[2]);
    assert_ptr_not_equal(e[0], e[2]);
    for (i = 0; i < 30; i++)
        assert_ptr_equal(crpci_channel_pick(ch, &c), e[i % 3]);
    e[1]->usable_at = INT64_MAX;
    for (i = 0; i < 30; i++)
        assert_ptr_not_equal(crpci_channel_pick(ch, &c), e[1]);
    e[0]->usable_at = INT64_MAX - 1;
    e[2]->usable_at = INT64_MAX - 2;
    assert_ptr_equal(crpci_channel_pick(ch, &c), e[2]);
    c.tried[0] = e[2];
    c.attempts = 1;
    assert_ptr_equal(crpci_channel_pick(ch, &c), e[0]);
    c.tried[1] = e[0];
    c.tried[2] = e[1];
    c.attempts = 3;
    assert_null(crpci_channel_pick(ch, &c));
    crpc_channel_close(ch);
    crpc_loop_close(l);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_is_shared_by_channels_that_ask_for_the_same),
        CT_TEST(it_backs_off_with_full_jitter),
        CT_TEST(it_is_picked_in_turn),
    };
    return CT_RUN(tests);
}
