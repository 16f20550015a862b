/* impl-id: an id finds its object until the object is removed, and nothing after that. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_heap *heap_open(void)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    return h;
}

static void names_until_removed(void **state)
{
    crpci_heap *h = heap_open();
    crpci_id_table t;
    uint64_t id[3];
    int a[3];
    int i;
    (void)state;
    memset(&t, 0, sizeof t);
    assert_null(crpci_id_get(&t, 0));
    for (i = 0; i < 3; i++) {
        assert_int_equal(crpci_id_add(&t, h, &a[i], &id[i]), CRPC_OK);
        assert_true(id[i] != 0);
    }
    assert_int_equal(t.used, 3);
    for (i = 0; i < 3; i++)
        assert_ptr_equal(crpci_id_get(&t, id[i]), &a[i]);
    crpci_id_remove(&t, id[1]);
    assert_null(crpci_id_get(&t, id[1]));
    assert_ptr_equal(crpci_id_get(&t, id[0]), &a[0]);
    assert_ptr_equal(crpci_id_get(&t, id[2]), &a[2]);
    assert_int_equal(t.used, 2);
    crpci_id_remove(&t, id[1]); /* a second time: no effect */
    crpci_id_remove(&t, 0);
    crpci_id_remove(&t, UINT64_MAX);
    assert_int_equal(t.used, 2);
    crpci_id_free(&t, h);
    assert_int_equal(t.cap, 0);
    assert_null(crpci_id_get(&t, id[0]));
    crpci_heap_unref(h);
}

static void zero_and_forged_ids_name_nothing(void **state)
{
    crpci_heap *h = heap_open();
    crpci_id_table t;
    uint64_t id;
    int a;
    (void)state;
    memset(&t, 0, sizeof t);
    assert_int_equal(crpci_id_add(&t, h, &a, &id), CRPC_OK);
    assert_null(crpci_id_get(&t, 0));
    assert_null(crpci_id_get(&t, id + 1));                               /* next index, free */
    assert_null(crpci_id_get(&t, (uint32_t)id));                         /* generation 0 */
    assert_null(crpci_id_get(&t, id + (UINT64_C(1) << 32)));             /* a later generation */
    assert_null(crpci_id_get(&t, (id & ~UINT64_C(0xffffffff)) | t.cap)); /* just past the table */
    assert_null(crpci_id_get(&t, UINT64_MAX));
    crpci_id_remove(&t, id + (UINT64_C(1) << 32));
    assert_ptr_equal(crpci_id_get(&t, id), &a);
    crpci_id_free(&t, h);
    crpci_heap_unref(h);
}

/* Slots are reused first in, first out: an index comes back as late as possible. */
static void a_number_returns_as_late_as_possible(void **state)
{
    crpci_heap *h = heap_open();
    crpci_id_table t;
    uint64_t id[16], again;
    int a, i;
    (void)state;
    memset(&t, 0, sizeof t);
    for (i = 0; i < 16; i++) {
        assert_int_equal(crpci_id_add(&t, h, &a, &id[i]), CRPC_OK);
        assert_int_equal((uint32_t)id[i], i);
    }
    assert_int_equal(t.cap, 16);
    crpci_id_remove(&t, id[5]);
    crpci_id_remove(&t, id[2]);
    crpci_id_remove(&t, id[9]);
    assert_int_equal(crpci_id_add(&t, h, &a, &again), CRPC_OK);
    assert_int_equal((uint32_t)again, 5);
    assert_int_equal(again >> 32, (id[5] >> 32) + 1);
    crpci_id_remove(&t, again);
    assert_int_equal(crpci_id_add(&t, h, &a, &again), CRPC_OK);
    assert_int_equal((uint32_t)again, 2);
    assert_int_equal(crpci_id_add(&t, h, &a, &again), CRPC_OK);
    assert_int_equal((uint32_t)again, 9);
    assert_int_equal(crpci_id_add(&t, h, &a, &again), CRPC_OK);
    assert_int_equal((uint32_t)again, 5);
    assert_int_equal(t.cap, 16);
    assert_int_equal(crpci_id_add(&t, h, &a, &again), CRPC_OK); /* full: grows */
    assert_int_equal(t.cap, 32);
    assert_ptr_equal(crpci_id_get(&t, id[0]), &a);
    crpci_id_free(&t, h);
    crpci_heap_unref(h);
}

static void generation_wraps_round_without_zero(void **state)
{
    crpci_heap *h = heap_open();
    crpci_id_table t;
    uint64_t id;
    int a;
    uint32_t i;
    (void)state;
    memset(&t, 0, sizeof t);
    assert_int_equal(crpci_id_add(&t, h, &a, &id), CRPC_OK);
    crpci_id_remove(&t, id);
    for (i = 0; i < t.cap; i++)
        t.slots[i].generation = UINT32_MAX;
    assert_int_equal(crpci_id_add(&t, h, &a, &id), CRPC_OK);
    assert_int_equal(id >> 32, 1);
    assert_ptr_equal(crpci_id_get(&t, id), &a);
    crpci_id_free(&t, h);
    crpci_heap_unref(h);
}

/* Two tables with their own salts: an id of one is none of the other, at whatever generation. */
static void ids_of_another_table_name_nothing(void **state)
{
    crpci_heap *h = heap_open();
    crpci_id_table a, b;
    uint64_t id;
    int x, i, round;
    (void)state;
    memset(&a, 0, sizeof a);
    memset(&b, 0, sizeof b);
    a.salt = 0x12345678;
    b.salt = 0x9abcdef0;
    for (round = 0; round < 3; round++) {
        uint64_t ids[40];
        for (i = 0; i < 40; i++) {
            assert_int_equal(crpci_id_add(&a, h, &x, &ids[i]), CRPC_OK);
            assert_int_equal(crpci_id_add(&b, h, &x, &id), CRPC_OK);
            assert_null(crpci_id_get(&a, id));
            assert_null(crpci_id_get(&b, ids[i]));
            crpci_id_remove(&b, ids[i]);
            assert_ptr_equal(crpci_id_get(&b, id), &x);
            crpci_id_remove(&b, id);
        }
        for (i = 0; i < 40; i++)
            crpci_id_remove(&a, ids[i]);
        assert_int_equal(a.used, 0);
    }
    crpci_id_free(&a, h);
    crpci_id_free(&b, h);
    crpci_heap_unref(h);
}

/* Against a model: every live id finds its object, every dead one nothing, no id comes twice. */
static void random_adds_and_removes(void **state)
{
    enum { MOST = 4000 };
    static uint64_t live[300], dead[MOST];
    crpci_heap *h = heap_open();
    crpci_id_table t;
    size_t lives = 0, deads = 0, i, step;
    (void)state;
    memset(&t, 0, sizeof t);
    for (step = 0; step < MOST; step++) {
        if (lives < 300 && (lives == 0 || ct_random() % 100 < 55)) {
            uint64_t id;
            /* the object of an id is derived from its place in `live`'s order of birth */
            assert_int_equal(crpci_id_add(&t, h, &live[0], &id), CRPC_OK);
            for (i = 0; i < lives; i++)
                assert_true(live[i] != id);
            for (i = 0; i < deads; i++)
                assert_true(dead[i] != id);
            live[lives++] = id;
        } else {
            i = (size_t)(ct_random() % lives);
            crpci_id_remove(&t, live[i]);
            dead[deads++] = live[i];
            live[i] = live[--lives];
        }
        assert_int_equal(t.used, lives);
        if (step % 64 == 0) {
            for (i = 0; i < lives; i++)
                assert_ptr_equal(crpci_id_get(&t, live[i]), &live[0]);
            for (i = 0; i < deads; i++)
                assert_null(crpci_id_get(&t, dead[i]));
        }
    }
    crpci_id_free(&t, h);
    crpci_heap_unref(h);
}

static int grow_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_heap *h;
    crpci_id_table t;
    uint64_t id[40];
    int i, n = 0, err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    memset(&t, 0, sizeof t);
    for (i = 0; !err && i < 40; i++) {
        err = crpci_id_add(&t, h, &id[i], &id[i]);
        n += !err;
    }
    for (i = 0; i < n; i++)
        assert_ptr_equal(crpci_id_get(&t, id[i]), &id[i]); /* a failed growth loses none */
    assert_int_equal(t.used, n);
    crpci_id_free(&t, h);
    crpci_heap_unref(h);
    return err;
}

static void out_of_memory_keeps_what_is_there(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(grow_scenario, NULL), 4); /* heap, 16, 32, 64 slots */
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(names_until_removed),
        CT_TEST(zero_and_forged_ids_name_nothing),
        CT_TEST(a_number_returns_as_late_as_possible),
        CT_TEST(generation_wraps_round_without_zero),
        CT_TEST(ids_of_another_table_name_nothing),
        CT_TEST(random_adds_and_removes),
        CT_TEST(out_of_memory_keeps_what_is_there),
    };
    return CT_RUN(tests);
}
