/* RpcMeta. crpc reads it by hand: both readers have to accept what nanopb accepts, with the same
 * values, and nothing else. */
#include "fuzz.h"

/* nanopb's description of the same message: the reference that the readers are compared with. */
typedef struct fuzz_meta_pb_request {
    crpc_view service_name;
    crpc_view method_name;
    bool has_log_id;
    int64_t log_id;
    bool has_trace_id;
    int64_t trace_id;
    bool has_span_id;
    int64_t span_id;
    bool has_parent_span_id;
    int64_t parent_span_id;
    bool has_timeout_ms;
    int32_t timeout_ms;
} fuzz_meta_pb_request;

typedef struct fuzz_meta_pb_response {
    bool has_error_code;
    int32_t error_code;
    crpc_view error_text;
} fuzz_meta_pb_response;

typedef struct fuzz_meta_pb {
    bool has_request;
    fuzz_meta_pb_request request;
    bool has_response;
    fuzz_meta_pb_response response;
    bool has_compress_type;
    int32_t compress_type;
    bool has_correlation_id;
    int64_t correlation_id;
    bool has_attachment_size;
    int32_t attachment_size;
    crpc_view chunk_info;
    crpc_view authentication_data;
    crpc_view stream_settings;
    bool has_content_type;
    int32_t content_type;
    bool has_checksum_type;
    int32_t checksum_type;
} fuzz_meta_pb;

/* clang-format off */
#define FUZZ_META_PB_REQUEST_FIELDLIST(X, a)                                                      \
    X(a, CALLBACK, REQUIRED, STRING, service_name, 1)                                              \
    X(a, CALLBACK, REQUIRED, STRING, method_name, 2)                                               \
    X(a, STATIC, OPTIONAL, INT64, log_id, 3)                                                       \
    X(a, STATIC, OPTIONAL, INT64, trace_id, 4)                                                     \
    X(a, STATIC, OPTIONAL, INT64, span_id, 5)                                                      \
    X(a, STATIC, OPTIONAL, INT64, parent_span_id, 6)                                               \
    X(a, STATIC, OPTIONAL, INT32, timeout_ms, 8)

#define FUZZ_META_PB_RESPONSE_FIELDLIST(X, a)                                                     \
    X(a, STATIC, OPTIONAL, INT32, error_code, 1)                                                   \
    X(a, CALLBACK, OPTIONAL, STRING, error_text, 2)

#define FUZZ_META_PB_FIELDLIST(X, a)                                                              \
    X(a, STATIC, OPTIONAL, MESSAGE, request, 1)                                                    \
    X(a, STATIC, OPTIONAL, MESSAGE, response, 2)                                                   \
    X(a, STATIC, OPTIONAL, INT32, compress_type, 3)                                                \
    X(a, STATIC, OPTIONAL, INT64, correlation_id, 4)                                               \
    X(a, STATIC, OPTIONAL, INT32, attachment_size, 5)                                              \
    X(a, CALLBACK, OPTIONAL, BYTES, chunk_info, 6)                                                 \
    X(a, CALLBACK, OPTIONAL, BYTES, authentication_data, 7)                                        \
    X(a, CALLBACK, OPTIONAL, BYTES, stream_settings, 8)                                            \
    X(a, STATIC, OPTIONAL, INT32, content_type, 10)                                                \
    X(a, STATIC, OPTIONAL, INT32, checksum_type, 11)
#define fuzz_meta_pb_request_MSGTYPE fuzz_meta_pb_request
#define fuzz_meta_pb_response_MSGTYPE fuzz_meta_pb_response
/* clang-format on */

/* PB_BIND would define objects that other files can link to. */
#define FUZZ_META_BIND(LIST, name)                                                                \
    static const uint32_t name##_field_info[] = {LIST##_FIELDLIST(PB_GEN_FIELD_INFO_2, name) 0};   \
    static const pb_msgdesc_t *const name##_submsg_info[] = {                                      \
        LIST##_FIELDLIST(PB_GEN_SUBMSG_INFO, name) NULL};                                          \
    static const pb_msgdesc_t name##_msg = {                                                       \
        name##_field_info,                                                                         \
        name##_submsg_info,                                                                        \
        NULL,                                                                                      \
        crpc_view_field,                                                                           \
        0 LIST##_FIELDLIST(PB_GEN_FIELD_COUNT, name),                                              \
        0 LIST##_FIELDLIST(PB_GEN_REQ_FIELD_COUNT, name),                                          \
        0 LIST##_FIELDLIST(PB_GEN_LARGEST_TAG, name)};                                             \
    LIST##_FIELDLIST(PB_GEN_FIELD_INFO_ASSERT_2, name)

/* clang-format off */
FUZZ_META_BIND(FUZZ_META_PB_REQUEST, fuzz_meta_pb_request)
FUZZ_META_BIND(FUZZ_META_PB_RESPONSE, fuzz_meta_pb_response)
FUZZ_META_BIND(FUZZ_META_PB, fuzz_meta_pb)
/* clang-format on */
#undef fuzz_meta_pb_request_MSGTYPE
#undef fuzz_meta_pb_response_MSGTYPE

/* Reads a meta with nanopb, but for its user_fields. */
FUZZ_FN bool fuzz_meta_nanopb(const uint8_t *p, size_t n, crpci_meta *m)
{
    fuzz_meta_pb pb;
    crpci_message_type type;
    const char *why;
    type.desc = &fuzz_meta_pb_msg;
    type.clear = true;
    memset(&pb, 0, sizeof pb);
    memset(m, 0, sizeof *m);
    if (!crpci_message_decode(p, n, &type, &pb, &why))
        return false;
    m->service = pb.request.service_name;
    m->method = pb.request.method_name;
    m->log_id = pb.request.log_id;
    m->trace_id = pb.request.trace_id;
    m->span_id = pb.request.span_id;
    m->parent_span_id = pb.request.parent_span_id;
    m->timeout_ms = pb.request.timeout_ms;
    m->error_code = pb.response.error_code;
    m->error_text = pb.response.error_text;
    m->correlation_id = pb.correlation_id;
    m->compress_type = pb.compress_type;
    m->attachment_size = pb.attachment_size;
    m->content_type = pb.content_type;
    m->checksum_type = pb.checksum_type;
    m->chunk_info = pb.chunk_info;
    m->credential = pb.authentication_data;
    m->stream_settings = pb.stream_settings;
    return true;
}

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

/* How often a meta was accepted, and how often the shortcut took it: a test sees from it that
 * the mutations are not all rubbish. */
FUZZ_FN unsigned long *fuzz_meta_counts(void)
{
    static unsigned long counts[2];
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
    fuzz_meta_counts()[1]++;
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

/* nanopb also takes keys of more than 32 bits whose upper ones repeat bit 31; protobuf refuses them,
 * and so does crpc. */
FUZZ_FN bool fuzz_meta_wide_key(const uint8_t *data, size_t size)
{
    size_t i;
    for (i = 0; i + 5 < size; i++) {
        if (data[i] >= 0x80 && data[i + 1] >= 0x80 && data[i + 2] >= 0x80 && data[i + 3] >= 0x80 &&
            data[i + 4] >= 0xf0)
            return true;
    }
    return false;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    crpci_meta m, nanopb;
    crpc_view value = {{NULL}, NULL};
    bool read, full;
    memset(&m, 0x55, sizeof m);
    read = crpci_meta_read(data, size, &m);
    full = fuzz_meta_nanopb(data, size, &nanopb);
    fuzz_meta_counts()[0] += read;
    fuzz_meta_usual(data, size, full, &nanopb);
    FUZZ_REQUIRE(read == full || (full && fuzz_meta_wide_key(data, size)));
    if (read) {
        fuzz_meta_views(&m, data, size);
        FUZZ_REQUIRE(m.raw.at[0] == data && crpc_view_size(m.raw) == size);
        FUZZ_REQUIRE(fuzz_meta_same(m.service, nanopb.service));
        FUZZ_REQUIRE(fuzz_meta_same(m.method, nanopb.method));
        FUZZ_REQUIRE(m.log_id == nanopb.log_id);
        FUZZ_REQUIRE(m.trace_id == nanopb.trace_id);
        FUZZ_REQUIRE(m.span_id == nanopb.span_id);
        FUZZ_REQUIRE(m.parent_span_id == nanopb.parent_span_id);
        FUZZ_REQUIRE(m.timeout_ms == nanopb.timeout_ms);
        FUZZ_REQUIRE(m.error_code == nanopb.error_code);
        FUZZ_REQUIRE(fuzz_meta_same(m.error_text, nanopb.error_text));
        FUZZ_REQUIRE(m.correlation_id == nanopb.correlation_id);
        FUZZ_REQUIRE(m.compress_type == nanopb.compress_type);
        FUZZ_REQUIRE(m.attachment_size == nanopb.attachment_size);
        FUZZ_REQUIRE(m.content_type == nanopb.content_type);
        FUZZ_REQUIRE(m.checksum_type == nanopb.checksum_type);
        FUZZ_REQUIRE(fuzz_meta_same(m.chunk_info, nanopb.chunk_info));
        FUZZ_REQUIRE(fuzz_meta_same(m.credential, nanopb.credential));
        FUZZ_REQUIRE(fuzz_meta_same(m.stream_settings, nanopb.stream_settings));
    }
    value = crpc_view_of(NULL, 0);
    if (crpci_meta_field(crpc_view_of(data, size), "k", &value)) {
        FUZZ_REQUIRE(crpc_view_size(value) == 0 || fuzz_meta_inside(value, data, size));
        FUZZ_REQUIRE(!read || m.fields);
    }
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
