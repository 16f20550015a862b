/* Messages with views: what is decoded points into the input, and encoding it gives a message that
 * decodes to the same. */
#include "fuzz.h"

#include "fuzz_message.h"

FUZZ_FN unsigned long *fuzz_message_count(void)
{
    static unsigned long count;
    return &count;
}

FUZZ_FN void fuzz_message_view(crpc_view v, const uint8_t *data, size_t size)
{
    const uint8_t *p = (const uint8_t *)crpc_view_data(v);
    FUZZ_REQUIRE(!p ||
                 (p >= data && p <= data + size && crpc_view_size(v) <= (size_t)(data + size - p)));
}

FUZZ_FN bool fuzz_message_same(crpc_view a, crpc_view b)
{
    return !crpc_view_data(a) == !crpc_view_data(b) && crpc_view_size(a) == crpc_view_size(b) &&
           (crpc_view_size(a) == 0 ||
            memcmp(crpc_view_data(a), crpc_view_data(b), crpc_view_size(a)) == 0);
}

FUZZ_FN size_t fuzz_message_walk(const crpc_views *views, const uint8_t *data, size_t size)
{
    const void *cursor = NULL;
    crpc_view item;
    size_t count = 0;
    while (crpc_views_next(views, &cursor, &item)) {
        fuzz_message_view(item, data, size);
        FUZZ_REQUIRE(crpc_view_data(item) && ++count <= size);
    }
    return count;
}

FUZZ_FN void fuzz_message_same_views(const crpc_views *a, const crpc_views *b)
{
    const void *at_a = NULL, *at_b = NULL;
    crpc_view x, y;
    while (crpc_views_next(a, &at_a, &x))
        FUZZ_REQUIRE(crpc_views_next(b, &at_b, &y) && fuzz_message_same(x, y));
    FUZZ_REQUIRE(!crpc_views_next(b, &at_b, &y));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_outer m, again;
    uint8_t out[4096];
    pb_ostream_t stream = pb_ostream_from_buffer(out, sizeof out);
    memset(&m, 0x55, sizeof m);
    if (crpc_message_decode(data, size, &fuzz_outer_msg, &m, sizeof m) != CRPC_OK)
        return 0;
    ++*fuzz_message_count();
    fuzz_message_view(m.text, data, size);
    fuzz_message_view(m.blob, data, size);
    fuzz_message_view(m.inner.name, data, size);
    fuzz_message_walk(&m.many, data, size);
    fuzz_message_walk(&m.inner.tags, data, size);
    if (size > sizeof out / 4)
        return 0; /* might not fit */
    FUZZ_REQUIRE(pb_encode(&stream, &fuzz_outer_msg, &m));
    FUZZ_REQUIRE(crpc_message_decode(out, stream.bytes_written, &fuzz_outer_msg, &again,
                                     sizeof again) == CRPC_OK);
    FUZZ_REQUIRE(fuzz_message_same(m.text, again.text) && fuzz_message_same(m.blob, again.blob));
    FUZZ_REQUIRE(fuzz_message_same(m.inner.name, again.inner.name));
    FUZZ_REQUIRE(m.number == again.number && m.has_inner == again.has_inner);
    fuzz_message_same_views(&m.many, &again.many);
    fuzz_message_same_views(&m.inner.tags, &again.inner.tags);
    return 0;
}

FUZZ_FN fuzz_seed fuzz_message_seeds[] = {
    FUZZ_SEED("\x0a\x03"
              "abc\x12\x02\x01\x02\x1a\x01"
              "x\x1a\0\x1a\x03xyz\x20\x96\x01"),
    FUZZ_SEED("\x1a\x01"
              "a\x20\x01\x1a\x01"
              "b\x0a\0\x1a\x01"
              "c\x2a\x0b\x0a\x01n\x12\x01t\x12\0\x12\x01u"),
    FUZZ_SEED("\x9a\0\x81\0q\x1a\x81\x80\0r\x35"
              "1234\x39"
              "12345678\x1a\0"),
    FUZZ_SEED("\x2a\x03\x12\x01"
              "a\x2a\x03\x12\x01"
              "b\x1a\x01z"),
};

#ifdef CRPC_FUZZ_MAIN
int main(int argc, char **argv)
{
    return fuzz_main(fuzz_message_seeds, sizeof fuzz_message_seeds / sizeof fuzz_message_seeds[0],
                     argc, argv);
}
#endif
