/* RpcMeta. The hand cursor may refuse anything, because nanopb is asked then; but what it accepts,
 * nanopb has to accept too, with the same values. */
#include "fuzz.h"

FUZZ_FN bool fuzz_meta_same(crpc_view a, crpc_view b)
{
    return crpc_view_data(a) == crpc_view_data(b) && crpc_view_size(a) == crpc_view_size(b);
}

/* Unset, or inside the input. */
FUZZ_FN bool fuzz_meta_inside(crpc_view v, const uint8_t *data, size_t size)
{
    const uint8_t *p = (const uint8_t *)crpc_view_data(v);
    return !p || (p >= data && p <= data + size && crpc_view_size(v) <= (size_t)(data + size - p));
}

FUZZ_FN void fuzz_meta_views(const crpci_meta *m, const uint8_t *data, size_t size)
{
    FUZZ_REQUIRE(fuzz_meta_inside(m->service, data, size));
    FUZZ_REQUIRE(fuzz_meta_inside(m->method, data, size));
    FUZZ_REQUIRE(fuzz_meta_inside(m->error_text, data, size));
    FUZZ_REQUIRE(fuzz_meta_inside(m->chunk_info, data, size));
    FUZZ_REQUIRE(fuzz_meta_inside(m->credential, data, size));
    FUZZ_REQUIRE(fuzz_meta_inside(m->stream_settings, data, size));
}

/* How often the cursor, nanopb and the shortcut accepted: a test sees from it that the mutations are
 * not all rubbish. */
FUZZ_FN unsigned long *fuzz_meta_counts(void)
{
    static unsigned long counts[3];
    return counts;
}

/* What the shortcut takes has to mean the same to nanopb, and nothing else besides. */
FUZZ_FN void fuzz_meta_usual(const uint8_t *data, size_t size, bool full, const crpci_meta *nanopb)
{
    static const char service[] = "example.EchoService", method[] = "Echo";
    uint8_t room[sizeof service + sizeof method + 12];
    crpc_view names = crpci_meta_put_names(room, sizeof room, crpc_view_str(service),
                                           crpc_view_str(method));
    crpci_meta m, rest = *nanopb, zero;
    bool request = crpci_meta_read_usual(data, size, names, &m);
    if (!request && !crpci_meta_read_usual(data, size, crpc_view_of("", 0), &m))
        return;
    fuzz_meta_counts()[2]++;
    FUZZ_REQUIRE(full);
    FUZZ_REQUIRE(m.usual && m.attachment_size == 0);
    FUZZ_REQUIRE(m.raw.at[0] == data && crpc_view_size(m.raw) == size);
    FUZZ_REQUIRE(m.correlation_id == nanopb->correlation_id);
    FUZZ_REQUIRE(m.timeout_ms == nanopb->timeout_ms);
    FUZZ_REQUIRE(request == crpc_view_equal(nanopb->service, service));
    FUZZ_REQUIRE(request == crpc_view_equal(nanopb->method, method));
    rest.service = rest.method = crpc_view_of(NULL, 0);
    rest.correlation_id = 0;
    rest.timeout_ms = 0;
    memset(&zero, 0, sizeof zero);
    FUZZ_REQUIRE(memcmp(&rest, &zero, sizeof zero) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    crpci_meta cursor, nanopb, either;
    crpc_view value = {{NULL}, NULL};
    bool plain, full;
    memset(&cursor, 0, sizeof cursor);
    plain = crpci_meta_read_plain(data, data + size, &cursor);
    full = crpci_meta_read_nanopb(data, size, &nanopb);
    fuzz_meta_counts()[0] += plain;
    fuzz_meta_counts()[1] += full;
    fuzz_meta_usual(data, size, full, &nanopb);
    if (plain) {
        FUZZ_REQUIRE(full);
        FUZZ_REQUIRE(fuzz_meta_same(cursor.service, nanopb.service));
        FUZZ_REQUIRE(fuzz_meta_same(cursor.method, nanopb.method));
        FUZZ_REQUIRE(cursor.log_id == nanopb.log_id);
        FUZZ_REQUIRE(cursor.trace_id == nanopb.trace_id);
        FUZZ_REQUIRE(cursor.span_id == nanopb.span_id);
        FUZZ_REQUIRE(cursor.parent_span_id == nanopb.parent_span_id);
        FUZZ_REQUIRE(cursor.timeout_ms == nanopb.timeout_ms);
        FUZZ_REQUIRE(cursor.error_code == nanopb.error_code);
        FUZZ_REQUIRE(fuzz_meta_same(cursor.error_text, nanopb.error_text));
        FUZZ_REQUIRE(cursor.correlation_id == nanopb.correlation_id);
        FUZZ_REQUIRE(cursor.compress_type == nanopb.compress_type);
        FUZZ_REQUIRE(cursor.attachment_size == nanopb.attachment_size);
        FUZZ_REQUIRE(cursor.content_type == nanopb.content_type);
        FUZZ_REQUIRE(cursor.checksum_type == nanopb.checksum_type);
        FUZZ_REQUIRE(fuzz_meta_same(cursor.chunk_info, nanopb.chunk_info));
        FUZZ_REQUIRE(fuzz_meta_same(cursor.credential, nanopb.credential));
        FUZZ_REQUIRE(fuzz_meta_same(cursor.stream_settings, nanopb.stream_settings));
    }
    memset(&either, 0x55, sizeof either);
    FUZZ_REQUIRE(crpci_meta_read(data, size, &either) == full);
    if (full) {
        fuzz_meta_views(&nanopb, data, size);
        fuzz_meta_views(&either, data, size);
        FUZZ_REQUIRE(either.correlation_id == nanopb.correlation_id);
        FUZZ_REQUIRE(either.raw.at[0] == data && crpc_view_size(either.raw) == size);
    }
    if (crpci_meta_field(crpc_view_of(data, size), "k", &value))
        FUZZ_REQUIRE(crpc_view_size(value) == 0 || fuzz_meta_inside(value, data, size));
    return 0;
}

FUZZ_FN fuzz_seed fuzz_meta_seeds[] = {
    FUZZ_SEED("\x0a\x1b\x0a\x13"
              "example.EchoService\x12\x04"
              "Echo\x18\0\x20\x01"),
    FUZZ_SEED("\x12\x02\x08\0\x18\0\x20\x01"),
    FUZZ_SEED("\x12\x0e\x08\xea\x07\x12\x09no method\x18\0\x20\x01"),
    /* everything, numbers of every length */
    FUZZ_SEED("\x0a\x2c\x0a\x03"
              "a.B\x12\x01"
              "C\x18\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x20\x80\x80\x01"
              "\x28\x07\x30\x81\x80\x80\x80\x10\x3a\x03"
              "rid\x40\xe8\x07\x4d"
              "1234\x18\x02\x20"
              "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01\x28\x05\x3a\x03"
              "key\x4a\x06\x0a\x01"
              "k\x12\x01"
              "v"
              "\x50\x01\x58\0\x62\0\x68\0"),
    /* a request and a reply in one, as jprotobuf answers; a stream; a chunk */
    FUZZ_SEED("\x0a\x07\x0a\x01"
              "S\x12\x02mm\x12\x04\x08\x05\x12\0\x18\x01\x32\x04\x08\x01\x10\x02\x42\x02\x08\x09"
              "\xa2\x06\x01z"),
    FUZZ_SEED("\x4a\x06\x12\x01"
              "v\x0a\x01"
              "k\x4a\x03\x0a\x01"
              "k\x4a\0\x79"
              "12345678"),
};

#ifdef CRPC_FUZZ_MAIN
int main(int argc, char **argv)
{
    return fuzz_main(fuzz_meta_seeds, sizeof fuzz_meta_seeds / sizeof fuzz_meta_seeds[0], argc,
                     argv);
}
#endif
