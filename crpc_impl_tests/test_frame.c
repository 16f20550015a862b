/* impl-frame: the header, at every length, from every address. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "fuzz/fuzz_frame.c"

static const uint8_t golden[] = {'P', 'R', 'P', 'C', 0, 0, 0, 0x28, 0, 0, 0, 0x21};

static crpci_frame_result header_of(const void *bytes, size_t n, uint32_t *body, uint32_t *meta)
{
    ct_guard g = ct_guard_make(bytes, n);
    crpci_frame_result r = crpci_frame_header(g.data, n, body, meta);
    ct_guard_free(g);
    return r;
}

static void golden_header(void **state)
{
    uint32_t body = 0, meta = 0;
    (void)state;
    assert_int_equal(header_of(golden, 12, &body, &meta), CRPCI_FRAME_OK);
    assert_int_equal(body, 0x28);
    assert_int_equal(meta, 0x21);
}

static void a_partial_header_needs_more_bytes(void **state)
{
    uint32_t body = 7, meta = 7;
    size_t n;
    (void)state;
    for (n = 0; n < 12; n++)
        assert_int_equal(header_of(golden, n, &body, &meta), CRPCI_FRAME_NEED);
    assert_int_equal(body, 7); /* nothing is said before all is there */
    assert_int_equal(meta, 7);
}

/* Another protocol is known by its first wrong byte: nobody waits for twelve. */
static void a_wrong_magic_is_seen_at_its_first_byte(void **state)
{
    uint32_t body, meta;
    size_t n;
    (void)state;
    assert_int_equal(header_of("GET / HTTP/1.1\r\n", 1, &body, &meta), CRPCI_FRAME_BAD);
    assert_int_equal(header_of("PRI * HTTP/2.0\r\n", 2, &body, &meta), CRPCI_FRAME_NEED);
    assert_int_equal(header_of("PRI * HTTP/2.0\r\n", 3, &body, &meta), CRPCI_FRAME_BAD);
    assert_int_equal(header_of("PROPFIND / HTTP", 3, &body, &meta), CRPCI_FRAME_BAD);
    assert_int_equal(header_of("prpc", 1, &body, &meta), CRPCI_FRAME_BAD);
    for (n = 0; n < 4; n++) {
        uint8_t wrong[12];
        memcpy(wrong, golden, 12);
        wrong[n] ^= 0x20;
        assert_int_equal(header_of(wrong, n + 1, &body, &meta), CRPCI_FRAME_BAD);
        assert_int_equal(header_of(wrong, 12, &body, &meta), CRPCI_FRAME_BAD);
        if (n)
            assert_int_equal(header_of(wrong, n, &body, &meta), CRPCI_FRAME_NEED);
    }
}

static void sizes(void **state)
{
    static const struct {
        uint8_t bytes[8];
        uint32_t body, meta;
        crpci_frame_result result;
    } c[] = {
        {{0, 0, 0, 0, 0, 0, 0, 0}, 0, 0, CRPCI_FRAME_OK},
        {{0, 0, 0, 5, 0, 0, 0, 5}, 5, 5, CRPCI_FRAME_OK},
        {{0, 0, 0, 5, 0, 0, 0, 6}, 5, 6, CRPCI_FRAME_BAD},
        {{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1}, 0xffffffff, 1, CRPCI_FRAME_OK},
        {{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 0xffffffff, 0xffffffff, CRPCI_FRAME_OK},
        {{0, 0, 0, 0x80, 0x80, 0, 0, 0}, 0x80, 0x80000000, CRPCI_FRAME_BAD},
        {{1, 2, 3, 4, 0, 2, 3, 4}, 0x01020304, 0x00020304, CRPCI_FRAME_OK},
        {{0x7f, 0xff, 0xff, 0xff, 0x80, 0, 0, 0}, 0x7fffffff, 0x80000000, CRPCI_FRAME_BAD},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof c / sizeof c[0]; i++) {
        uint8_t bytes[12] = "PRPC";
        uint32_t body = 0, meta = 0;
        memcpy(bytes + 4, c[i].bytes, 8);
        assert_int_equal(header_of(bytes, 12, &body, &meta), c[i].result);
        if (c[i].result == CRPCI_FRAME_OK) {
            assert_true(body == c[i].body);
            assert_true(meta == c[i].meta);
        }
    }
}

static void random_headers(void **state)
{
    (void)state;
    fuzz_run(LLVMFuzzerTestOneInput, fuzz_frame_seeds,
             sizeof fuzz_frame_seeds / sizeof fuzz_frame_seeds[0], 50000, ct_random());
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(golden_header),
        CT_TEST(a_partial_header_needs_more_bytes),
        CT_TEST(a_wrong_magic_is_seen_at_its_first_byte),
        CT_TEST(sizes),
        CT_TEST(random_headers),
    };
    return CT_RUN(tests);
}
