/* Operations on nodes without a server: arguments, outcomes. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_nowhere.h"

static void on_node(void *user, const crpc_node *result)
{
    int *counts = (int *)user;
    counts[0]++;
    counts[1] = result->error.code;
    counts[2] = (int)result->error.sent;
}

static void it_refuses_bad_operations(void **state)
{
    static char big[CRPC_NODE_BYTES_MAX + 1];
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_node_op ops[CRPC_NODE_OPS_MAX + 1], bad[10];
    crpc_registry *r;
    crpc_node node_out;
    size_t i;
    int counts[3] = {0, 0, 0};
    (void)state;
    memset(&node_out, 0, sizeof node_out);
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    bad[0] = crpc_node_get("a//b");
    bad[1] = crpc_node_get(NULL);
    bad[2] = crpc_node_check("a", 1); /* alone */
    bad[3] = crpc_node_create("a", crpc_view_str(""), 64);
    bad[4] = crpc_node_set("a", crpc_view_of(big, sizeof big), -1);
    bad[5] = crpc_node_set("a", crpc_view_str(""), -2);
    bad[6] = crpc_node_get("a");
    bad[6].verb = (crpc_node_verb)0;
    bad[7] = crpc_node_get("a");
    bad[7].verb = (crpc_node_verb)9;
    bad[8] = crpc_node_get("a");
    bad[8].flags = CRPC_NODE_EPHEMERAL;
    bad[9] = crpc_node_create("a/", crpc_view_str(""), 0);
    for (i = 0; i < 10; i++) {
        if (crpc_registry_call(r, &bad[i], 1, 10, &node_out) != CRPC_EINVAL ||
            !*node_out.error.text)
            fail_msg("operation %zu: \"%s\"", i, node_out.error.text);
        assert_int_equal(crpc_registry_call_async(r, &bad[i], 1, 10, on_node, counts), CRPC_EINVAL);
    }
    for (i = 0; i < CRPC_NODE_OPS_MAX + 1; i++)
        ops[i] = crpc_node_check("a", -1);
    assert_int_equal(crpc_registry_call(r, ops, CRPC_NODE_OPS_MAX + 1, 10, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_registry_call(r, ops, 0, 10, NULL), CRPC_EINVAL);
    assert_int_equal(crpc_registry_call(r, NULL, 1, 10, NULL), CRPC_EINVAL);
    ops[1] = crpc_node_get("a"); /* reads nothing among others */
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL);
    ops[1] = crpc_node_create("a", crpc_view_str(""), CRPC_NODE_PARENTS);
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL);
    ops[0] = ops[1] = crpc_node_set("a", crpc_view_of(big, sizeof big / 2 + 1), -1);
    assert_int_equal(crpc_registry_call(r, ops, 2, 10, NULL), CRPC_EINVAL); /* together too many */
    ops[0] = crpc_node_get("a");
    assert_int_equal(crpc_registry_call_async(r, ops, 1, 10, NULL, NULL), CRPC_EINVAL);
    assert_int_equal(counts[0], 0);
    crpc_node_reset(&node_out);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static void it_says_that_nothing_was_sent(void **state)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_node out;
    crpc_node_op op = crpc_node_set("a", crpc_view_str("1"), 3);
    int counts[3] = {0, 0, 0};
    (void)state;
    memset(&out, 0, sizeof out);
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    assert_int_equal(crpc_registry_call(r, &op, 1, 20, &out), CRPC_ECONN);
    assert_int_equal(out.error.sent, CRPC_SENT_NO);
    assert_false(out.error.remote);
    assert_string_equal(out.path, "a");
    assert_non_null(strstr(out.error.text, "set \"a\""));
    assert_int_equal(crpc_registry_call_async(r, &op, 1, 20, on_node, counts), CRPC_OK);
    while (!counts[0])
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(counts[1], CRPC_ECONN);
    assert_int_equal(counts[2], CRPC_SENT_NO);
    crpc_node_reset(&out);
    crpc_node_reset(&out);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static void each_pending_operation_ends_once(void **state)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_node_op op = crpc_node_get("a");
    int counts[3] = {0, 0, 0}, i;
    (void)state;
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), ""), CRPC_OK);
    for (i = 0; i < (int)CRPCI_OPERATIONS_PENDING; i++)
        assert_int_equal(crpc_registry_call_async(r, &op, 1, 0, on_node, counts), CRPC_OK);
    assert_int_equal(crpc_registry_call_async(r, &op, 1, 0, on_node, counts), CRPC_ELIMIT);
    crpc_registry_close(r);
    assert_int_equal(counts[0], 0); /* not on the caller's stack */
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(counts[0], CRPCI_OPERATIONS_PENDING);
    assert_int_equal(counts[1], CRPC_ECANCELED);
    crpc_loop_close(loop);
    assert_int_equal(counts[0], CRPCI_OPERATIONS_PENDING);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_refuses_bad_operations),
        CT_TEST(it_says_that_nothing_was_sent),
        CT_TEST(each_pending_operation_ends_once),
    };
    return CT_RUN(tests);
}
