#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_order_item item(uint64_t key, const void *of)
{
    crpci_order_item i;
    memset(&i, 0, sizeof i);
    i.key = key;
    i.of = of;
    return i;
}

static void one_request_of_a_key_runs_at_a_time(void **state)
{
    crpci_order o;
    crpci_order_item a[3], b, c;
    int i, conn;
    (void)state;
    for (i = 0; i < 3; i++)
        a[i] = item(7, NULL);
    b = item(7 + CRPCI_ORDER_BUCKETS, NULL); /* the same bucket */
    c = item(7, &conn);                      /* the same key, ordered within a connection */
    crpci_order_init(&o, 0);
    assert_int_equal(crpci_order_enter(&o, &a[0]), CRPC_OK);
    assert_int_equal(crpci_order_enter(&o, &a[1]), CRPC_EPENDING);
    assert_int_equal(crpci_order_enter(&o, &b), CRPC_OK);
    assert_int_equal(crpci_order_enter(&o, &c), CRPC_OK);
    assert_int_equal(crpci_order_enter(&o, &a[2]), CRPC_EPENDING);
    assert_int_equal(o.waiting, 2);
    assert_ptr_equal(crpci_order_leave(&o, &b), NULL);
    assert_ptr_equal(crpci_order_leave(&o, &a[0]), &a[1]);
    assert_int_equal(crpci_order_enter(&o, &a[0]), CRPC_EPENDING); /* behind the others */
    assert_ptr_equal(crpci_order_leave(&o, &a[1]), &a[2]);
    assert_ptr_equal(crpci_order_leave(&o, &a[2]), &a[0]);
    assert_ptr_equal(crpci_order_leave(&o, &a[0]), NULL);
    assert_ptr_equal(crpci_order_leave(&o, &c), NULL);
    assert_int_equal(o.waiting, 0);
    assert_int_equal(crpci_order_enter(&o, &a[1]), CRPC_OK);
    assert_ptr_equal(crpci_order_leave(&o, &a[1]), NULL);
}

/* Half of the places is the most that one key gets. */
static void waiting_requests_are_bounded(void **state)
{
    crpci_order o;
    crpci_order_item a[4], b, c[3];
    int i;
    (void)state;
    for (i = 0; i < 4; i++)
        a[i] = item(1, NULL);
    b = item(2, NULL);
    for (i = 0; i < 3; i++)
        c[i] = item(2, NULL);
    crpci_order_init(&o, 4);
    assert_int_equal(crpci_order_enter(&o, &a[0]), CRPC_OK);
    assert_int_equal(crpci_order_enter(&o, &a[1]), CRPC_EPENDING);
    assert_int_equal(crpci_order_enter(&o, &a[2]), CRPC_EPENDING);
    assert_int_equal(crpci_order_enter(&o, &a[3]), CRPC_ELIMIT);
    assert_int_equal(crpci_order_enter(&o, &b), CRPC_OK); /* another key: it need not wait */
    assert_int_equal(crpci_order_enter(&o, &c[0]), CRPC_EPENDING);
    assert_int_equal(crpci_order_enter(&o, &c[1]), CRPC_EPENDING);
    assert_int_equal(crpci_order_enter(&o, &c[2]), CRPC_ELIMIT);
    assert_ptr_equal(crpci_order_leave(&o, &a[0]), &a[1]);
    assert_int_equal(crpci_order_enter(&o, &a[3]), CRPC_EPENDING);
    assert_ptr_equal(crpci_order_leave(&o, &a[1]), &a[2]);
    assert_ptr_equal(crpci_order_leave(&o, &a[2]), &a[3]);
    assert_ptr_equal(crpci_order_leave(&o, &a[3]), NULL);
    assert_ptr_equal(crpci_order_leave(&o, &b), &c[0]);
    assert_ptr_equal(crpci_order_leave(&o, &c[0]), &c[1]);
    assert_ptr_equal(crpci_order_leave(&o, &c[1]), NULL);
    assert_int_equal(o.waiting, 0);
}

/* Against a model that keeps for each key the requests in the order in which they came. */
static void many_keys_keep_their_orders(void **state)
{
    enum { KEYS = 9, ITEMS = 400 };
    static crpci_order_item items[ITEMS];
    crpci_order_item *runs[KEYS];
    int queue[KEYS][ITEMS], head[KEYS], tail[KEYS], came = 0, left = 0, k;
    crpci_order o;
    (void)state;
    memset(runs, 0, sizeof runs);
    memset(head, 0, sizeof head);
    memset(tail, 0, sizeof tail);
    crpci_order_init(&o, 0);
    while (left < ITEMS) {
        k = (int)(ct_random() % KEYS);
        if (came < ITEMS && ct_random() % 2) {
            items[came] = item((uint64_t)k * CRPCI_ORDER_BUCKETS, NULL); /* all in one bucket */
            assert_int_equal(crpci_order_enter(&o, &items[came]),
                             runs[k] ? CRPC_EPENDING : CRPC_OK);
            runs[k] = runs[k] ? runs[k] : &items[came];
            queue[k][tail[k]++] = came++;
        } else if (runs[k]) {
            assert_ptr_equal(runs[k], &items[queue[k][head[k]++]]);
            runs[k] = crpci_order_leave(&o, runs[k]);
            assert_int_equal(runs[k] != NULL, head[k] < tail[k]);
            left++;
        }
    }
    assert_int_equal(o.waiting, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(one_request_of_a_key_runs_at_a_time),     CT_TEST(waiting_requests_are_bounded),
        CT_TEST(many_keys_keep_their_orders),
    };
    return CT_RUN(tests);
}
