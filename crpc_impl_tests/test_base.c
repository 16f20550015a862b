/* impl-base: the arithmetic that everything else stands on. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static void minimum_of_two(void **state)
{
    (void)state;
    assert_int_equal(crpci_base_min(1, 2), 1);
    assert_int_equal(crpci_base_min(2, 1), 1);
    assert_int_equal(crpci_base_min(SIZE_MAX, 0), 0);
    assert_true(crpci_base_min64(-1, 1) == -1);
    assert_true(crpci_base_min64(INT64_C(1) << 40, INT64_MAX) == INT64_C(1) << 40);
    assert_true(crpci_base_min64(INT64_MAX, INT64_MIN) == INT64_MIN);
}

static void options_zero_is_the_default_and_negative_is_none(void **state)
{
    (void)state;
    assert_true(crpci_base_option(0, 7, 9) == 7);
    assert_true(crpci_base_option(-1, 7, 9) == 9);
    assert_true(crpci_base_option(-2, 7, 9) == 9);
    assert_true(crpci_base_option(1, 7, 9) == 1);
    assert_true(crpci_base_option(INT64_MAX, 7, 9) == INT64_MAX);
}

static void integers_are_big_endian_at_any_address(void **state)
{
    static const uint8_t bytes[] = {0xff, 0x80, 0x01, 0xfe, 0x7f, 0xff};
    uint8_t out[6];
    (void)state;
    assert_true(crpci_base_get32(bytes) == 0xff8001feu);
    assert_true(crpci_base_get32(bytes + 1) == 0x8001fe7fu);
    memset(out, 0x55, sizeof out);
    crpci_base_put32(out + 1, 0x8001fe7fu);
    assert_int_equal(out[0], 0x55);
    assert_memory_equal(out + 1, bytes + 1, 4);
    assert_int_equal(out[5], 0x55);
}

static void container_of_a_member(void **state)
{
    struct box {
        int first;
        char second;
        long third;
    } box;
    (void)state;
    assert_ptr_equal(CRPCI_CONTAINER(&box.third, struct box, third), &box);
    assert_ptr_equal(CRPCI_CONTAINER(&box.second, struct box, second), &box);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(minimum_of_two),
        CT_TEST(options_zero_is_the_default_and_negative_is_none),
        CT_TEST(integers_are_big_endian_at_any_address),
        CT_TEST(container_of_a_member),
    };
    return CT_RUN(tests);
}
