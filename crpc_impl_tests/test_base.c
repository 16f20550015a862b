/* impl-base: small arithmetic and the hash. */
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

/* Another program computed these values: a machine of any byte order must give the same. 64-bit
 * FNV-1a of "foobar", by its authors' test vectors, is 0x85944171f73967e8. */
static void hash_golden_vectors(void **state)
{
    uint8_t all[256];
    int i;
    (void)state;
    for (i = 0; i < 256; i++)
        all[i] = (uint8_t)i;
    assert_true(crpci_base_hash("", 0) == UINT64_C(0xf52a15e9a9b5e89b));
    assert_true(crpci_base_hash("a", 1) == UINT64_C(0x02c0bdbf481420f8));
    assert_true(crpci_base_hash("foobar", 6) == UINT64_C(0x404da9e3b74078c2));
    assert_true(crpci_base_hash("foobar", 6) == crpci_base_mix(UINT64_C(0x85944171f73967e8)));
    assert_true(crpci_base_hash("10.0.0.1:8000", 13) == UINT64_C(0x9201c0cea293f846));
    assert_true(crpci_base_hash(all, 256) == UINT64_C(0xef2687f0d4371fe2));
    /* the first number of splitmix64 from 0 */
    assert_true(crpci_base_mix(UINT64_C(0x9e3779b97f4a7c15)) == UINT64_C(0xe220a8397b1dcdaf));
}

/* Flipping any bit of the input flips each bit of the output half of the time. */
static void hash_avalanche(void **state)
{
    enum { ROUNDS = 2000, BYTES = 13 };
    static long turned[BYTES * 8][64];
    uint64_t seed = 5;
    int round, in, out;
    (void)state;
    memset(turned, 0, sizeof turned);
    for (round = 0; round < ROUNDS; round++) {
        uint8_t bytes[BYTES];
        uint64_t h;
        for (in = 0; in < BYTES; in++)
            bytes[in] = (uint8_t)(ct_random_from(&seed) >> 40);
        h = crpci_base_hash(bytes, BYTES);
        for (in = 0; in < BYTES * 8; in++) {
            uint64_t other;
            bytes[in / 8] ^= (uint8_t)(1 << in % 8);
            other = crpci_base_hash(bytes, BYTES) ^ h;
            bytes[in / 8] ^= (uint8_t)(1 << in % 8);
            for (out = 0; out < 64; out++)
                turned[in][out] += (long)(other >> out & 1);
        }
    }
    for (in = 0; in < BYTES * 8; in++) { /* standard deviation: sqrt(2000) / 2 = 22.4 */
        for (out = 0; out < 64; out++)
            assert_in_range(turned[in][out], ROUNDS / 2 - 130, ROUNDS / 2 + 130);
    }
}

/* The vectors that the authors of SipHash published. */
static void siphash_golden_vectors(void **state)
{
    const uint64_t key[2] = {UINT64_C(0x0706050403020100), UINT64_C(0x0f0e0d0c0b0a0908)};
    unsigned char bytes[64];
    unsigned i;
    (void)state;
    for (i = 0; i < sizeof bytes; i++)
        bytes[i] = (unsigned char)i;
    assert_true(crpci_base_siphash(key, bytes, 0) == UINT64_C(0x726fdb47dd0e0e31));
    assert_true(crpci_base_siphash(key, bytes, 1) == UINT64_C(0x74f839c593dc67fd));
    assert_true(crpci_base_siphash(key, bytes, 7) == UINT64_C(0xab0200f58b01d137));
    assert_true(crpci_base_siphash(key, bytes, 8) == UINT64_C(0x93f5f5799a932462));
    assert_true(crpci_base_siphash(key, bytes, 15) == UINT64_C(0xa129ca6149be45e5));
    assert_true(crpci_base_siphash(key, bytes, 63) == UINT64_C(0x958a324ceb064572));
}

/* A session that ends between two looks must not turn a state that was seen into a failure. */
static void a_wait_is_met_by_what_held_for_a_moment(void **state)
{
    int asked = 0;
    (void)state;
    assert_true(CT_WAIT(++asked == 3, 60000));
    assert_int_equal(asked, 3);
    assert_false(CT_WAIT(++asked == 3, 0));
    assert_int_equal(asked, 4);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(minimum_of_two),
        CT_TEST(options_zero_is_the_default_and_negative_is_none),
        CT_TEST(integers_are_big_endian_at_any_address),
        CT_TEST(container_of_a_member),
        CT_TEST(hash_golden_vectors),
        CT_TEST(hash_avalanche),
        CT_TEST(siphash_golden_vectors),
        CT_TEST(a_wait_is_met_by_what_held_for_a_moment),
    };
    return CT_RUN(tests);
}
