/* impl-message: views, walking, encoding into chunks. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "fuzz/fuzz_message.c"

/* --- more messages --------------------------------------------------------------------------- */

static int called;

/* A callback of the user's own, which counts. */
static bool count_calls(pb_istream_t *in, pb_ostream_t *out, const pb_field_iter_t *field)
{
    (void)in;
    called++;
    return !out || (pb_encode_tag_for_field(out, field) &&
                    pb_encode_string(out, (const pb_byte_t *)"called", 6));
}

typedef struct m_counted {
    crpc_view text;
    int32_t number;
} m_counted;
#define M_COUNTED_FIELDLIST(X, a)                                                                  \
    X(a, CALLBACK, SINGULAR, STRING, text, 1)                                                      \
    X(a, STATIC, SINGULAR, INT32, number, 2)
#define M_COUNTED_CALLBACK count_calls
#define M_COUNTED_DEFAULT  NULL

typedef struct m_plain {
    int32_t number;
    char text[8];
} m_plain;
#define M_PLAIN_FIELDLIST(X, a)                                                                    \
    X(a, STATIC, SINGULAR, INT32, number, 1)                                                       \
    X(a, STATIC, SINGULAR, STRING, text, 2)
#define M_PLAIN_CALLBACK NULL
#define M_PLAIN_DEFAULT  NULL

typedef struct m_required {
    crpc_view text;
} m_required;
#define M_REQUIRED_FIELDLIST(X, a) X(a, CALLBACK, REQUIRED, STRING, text, 1)
#define M_REQUIRED_CALLBACK        crpc_view_field
#define M_REQUIRED_DEFAULT         NULL

/* What the plugin refuses, written by hand all the same: a number, and a struct of another size. */
typedef struct m_number {
    crpc_view number;
} m_number;
#define M_NUMBER_FIELDLIST(X, a) X(a, CALLBACK, OPTIONAL, INT64, number, 1)
#define M_NUMBER_CALLBACK        crpc_view_field
#define M_NUMBER_DEFAULT         NULL

typedef struct m_small {
    crpc_view text; /* declared repeated: should be crpc_views */
} m_small;
#define M_SMALL_FIELDLIST(X, a) X(a, CALLBACK, REPEATED, STRING, text, 1)
#define M_SMALL_CALLBACK        crpc_view_field
#define M_SMALL_DEFAULT         NULL

/* Views two messages down. */
typedef struct m_deep {
    bool has_outer;
    fuzz_outer outer;
} m_deep;
#define M_DEEP_FIELDLIST(X, a) X(a, STATIC, OPTIONAL, MESSAGE, outer, 1)
#define M_DEEP_CALLBACK        NULL
#define M_DEEP_DEFAULT         NULL
#define m_deep_outer_MSGTYPE   fuzz_outer

/* An array of messages with views. */
typedef struct m_array {
    pb_size_t inners_count;
    fuzz_inner inners[3];
} m_array;
#define M_ARRAY_FIELDLIST(X, a) X(a, STATIC, REPEATED, MESSAGE, inners, 1)
#define M_ARRAY_CALLBACK        NULL
#define M_ARRAY_DEFAULT         NULL
#define m_array_inners_MSGTYPE  fuzz_inner

extern const pb_msgdesc_t m_counted_msg, m_plain_msg, m_required_msg, m_number_msg, m_small_msg,
    m_deep_msg, m_array_msg;
PB_BIND(M_COUNTED, m_counted, 2)
PB_BIND(M_PLAIN, m_plain, 2)
PB_BIND(M_REQUIRED, m_required, 2)
PB_BIND(M_NUMBER, m_number, 2)
PB_BIND(M_SMALL, m_small, 2)
PB_BIND(M_DEEP, m_deep, 2)
PB_BIND(M_ARRAY, m_array, 2)

#define DECODE(bytes, type, message)                                                               \
    crpc_message_decode(bytes, sizeof(bytes) - 1, &type##_msg, message, sizeof *(message))

static void expect_view(crpc_view v, const char *text)
{
    if (!crpc_view_equal(v, text))
        fail_msg("\"%.*s\" is not \"%s\"", (int)crpc_view_size(v), crpc_view_data(v), text);
}

/* The elements, each followed by a semicolon. */
static const char *elements(const crpc_views *views)
{
    static char text[256];
    const void *cursor = NULL;
    crpc_view item;
    size_t n = 0;
    text[0] = '\0';
    while (crpc_views_next(views, &cursor, &item))
        n += (size_t)snprintf(text + n, sizeof text - n, "%.*s;", (int)crpc_view_size(item),
                              crpc_view_data(item));
    return text;
}

/* --- views by themselves --------------------------------------------------------------------- */

static void views_of_memory(void **state)
{
    crpc_view v = crpc_view_str("abc"), unset = {{NULL}, NULL};
    char out[4];
    (void)state;
    assert_int_equal(crpc_view_size(v), 3);
    assert_true(crpc_view_equal(v, "abc"));
    assert_false(crpc_view_equal(v, "ab"));
    assert_false(crpc_view_equal(v, "abcd"));
    assert_false(crpc_view_equal(v, "abd"));
    assert_true(crpc_view_equal(crpc_view_str(""), ""));
    assert_true(crpc_view_equal(unset, ""));
    assert_false(crpc_view_equal(unset, "x"));
    assert_int_equal(crpc_view_size(unset), 0);
    assert_null(crpc_view_data(unset));
    assert_null(crpc_view_data(crpc_view_str(NULL)));
    assert_non_null(crpc_view_data(crpc_view_str("")));
    assert_int_equal(crpc_view_size(crpc_view_of(NULL, 5)), 0);
    assert_int_equal(crpc_view_size(crpc_view_of("x\0y", 3)), 3);
    assert_false(crpc_view_equal(crpc_view_of("x\0y", 3), "x"));

    assert_int_equal(crpc_view_copy(v, out, sizeof out), 3);
    assert_string_equal(out, "abc");
    memset(out, 'x', sizeof out);
    assert_int_equal(crpc_view_copy(v, out, 3), 3);
    assert_string_equal(out, "ab");
    assert_int_equal(out[3], 'x');
    assert_int_equal(crpc_view_copy(v, out, 1), 3);
    assert_string_equal(out, "");
    assert_int_equal(crpc_view_copy(v, NULL, 0), 3);
    assert_int_equal(crpc_view_copy(unset, out, sizeof out), 0);
    assert_string_equal(out, "");
}

static void arrays_of_views(void **state)
{
    crpc_view items[3];
    crpc_views views;
    (void)state;
    items[0] = crpc_view_str("one");
    items[1] = crpc_view_str("");
    items[2] = crpc_view_str("three");
    views = crpc_views_of(items, 3);
    assert_string_equal(elements(&views), "one;;three;");
    views = crpc_views_of(items, 1);
    assert_string_equal(elements(&views), "one;");
    views = crpc_views_of(items, 0);
    assert_string_equal(elements(&views), "");
    views = crpc_views_of(NULL, 0);
    assert_string_equal(elements(&views), "");
    memset(&views, 0, sizeof views);
    assert_string_equal(elements(&views), "");
}

/* --- decoding -------------------------------------------------------------------------------- */

static void fields_point_into_the_input(void **state)
{
    static const char bytes[] = "\x0a\x03"
                                "abc\x12\x02\x01\x02\x20\x96\x01\x2a\x03\x0a\x01z";
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE(bytes, fuzz_outer, &m), CRPC_OK);
    assert_ptr_equal(crpc_view_data(m.text), bytes + 2);
    assert_int_equal(crpc_view_size(m.text), 3);
    assert_ptr_equal(crpc_view_data(m.blob), bytes + 7);
    assert_int_equal(crpc_view_size(m.blob), 2);
    assert_int_equal(m.number, 150);
    assert_true(m.has_inner);
    assert_ptr_equal(crpc_view_data(m.inner.name), bytes + sizeof bytes - 2);
    assert_string_equal(elements(&m.many), "");
}

static void absent_and_empty_differ(void **state)
{
    fuzz_outer m;
    (void)state;
    memset(&m, 0x55, sizeof m);
    assert_int_equal(DECODE("", fuzz_outer, &m), CRPC_OK);
    assert_null(crpc_view_data(m.text)); /* cleared although nothing came */
    assert_null(m.many.at[0]);
    assert_null(m.inner.tags.at[0]);
    assert_int_equal(m.number, 0);
    assert_int_equal(DECODE("\x0a\0", fuzz_outer, &m), CRPC_OK);
    assert_non_null(crpc_view_data(m.text));
    assert_int_equal(crpc_view_size(m.text), 0);
    assert_null(crpc_view_data(m.blob));
}

static void the_last_of_several_wins(void **state)
{
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE("\x0a\x01"
                            "a\x20\x01\x0a\x02"
                            "bc\x20\x02",
                            fuzz_outer, &m),
                     CRPC_OK);
    expect_view(m.text, "bc");
    assert_int_equal(m.number, 2);
}

static void repeated_among_other_fields(void **state)
{
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE("\x1a\x01"
                            "a",
                            fuzz_outer, &m),
                     CRPC_OK);
    assert_string_equal(elements(&m.many), "a;");
    assert_int_equal(DECODE("\x1a\0", fuzz_outer, &m), CRPC_OK);
    assert_string_equal(elements(&m.many), ";");
    assert_int_equal(DECODE("\x1a\0\x1a\0\x1a\0", fuzz_outer, &m), CRPC_OK);
    assert_string_equal(elements(&m.many), ";;;");
    /* between them every wire type, known and unknown fields, one that looks like an element */
    assert_int_equal(DECODE("\x20\x05\x1a\x01"
                            "a\x20\x96\x01\x1a\0\x35"
                            "1234\x39"
                            "12345678"
                            "\x0a\x03\x1a\x01q\x1a\x02"
                            "bc\x7a\x03\x1a\x01q\x2a\x03\x0a\x01z"
                            "\x1a\x01"
                            "d\x20\x07",
                            fuzz_outer, &m),
                     CRPC_OK);
    assert_string_equal(elements(&m.many), "a;;bc;d;");
    assert_int_equal(m.number, 7);
    expect_view(m.inner.name, "z");
    /* keys and lengths longer than needed */
    assert_int_equal(
        DECODE("\x9a\0\x81\0q\x1a\x81\x80\0r\x9a\x80\x80\0\x80\0\x1a\x01s", fuzz_outer, &m),
        CRPC_OK);
    assert_string_equal(elements(&m.many), "q;r;;s;");
}

static void repeated_in_a_submessage(void **state)
{
    fuzz_outer m;
    m_array array;
    (void)state;
    assert_int_equal(DECODE("\x2a\x09\x12\x01"
                            "a\x0a\x01n\x12\x01"
                            "b\x1a\x01z",
                            fuzz_outer, &m),
                     CRPC_OK);
    assert_string_equal(elements(&m.inner.tags), "a;b;");
    assert_string_equal(elements(&m.many), "z;");
    expect_view(m.inner.name, "n");
    memset(&array, 0x55, sizeof array);
    assert_int_equal(DECODE("\x0a\x06\x12\x01"
                            "a\x12\x01"
                            "b\x0a\0\x0a\x06\x12\x01"
                            "c\x0a\x01n",
                            m_array, &array),
                     CRPC_OK);
    assert_int_equal(array.inners_count, 3);
    assert_string_equal(elements(&array.inners[0].tags), "a;b;");
    assert_string_equal(elements(&array.inners[1].tags), "");
    assert_string_equal(elements(&array.inners[2].tags), "c;");
    expect_view(array.inners[2].name, "n");
    assert_null(crpc_view_data(array.inners[0].name));
}

/* protobuf merges the parts of a message that came in two. Single fields do; elements scattered
 * over two messages cannot be walked, and dropping some in silence would be the wrong answer. */
static void a_message_in_two_parts(void **state)
{
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE("\x2a\x03\x0a\x01"
                            "a\x2a\x03\x12\x01"
                            "b",
                            fuzz_outer, &m),
                     CRPC_OK);
    expect_view(m.inner.name, "a");
    assert_string_equal(elements(&m.inner.tags), "b;");
    assert_int_equal(DECODE("\x2a\x03\x12\x01"
                            "a\x2a\x03\x0a\x01"
                            "b",
                            fuzz_outer, &m),
                     CRPC_OK);
    assert_string_equal(elements(&m.inner.tags), "a;");
    assert_int_equal(DECODE("\x2a\x03\x12\x01"
                            "a\x2a\x03\x12\x01"
                            "b",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x2a\x03\x12\x01"
                            "a\x1a\x01x\x2a\x06\x0a\x01z\x12\x01"
                            "b",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x2a\x03\x12\x01"
                            "a\x12\x01x\x2a\x03\x12\x01"
                            "b",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
}

/* nanopb hands a view's callback a stream over its own stack for these: no view may come of it. */
static void a_number_in_place_of_a_string(void **state)
{
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE("\x08\x05", fuzz_outer, &m), CRPC_ECODEC); /* varint */
    assert_int_equal(DECODE("\x09"
                            "12345678",
                            fuzz_outer, &m),
                     CRPC_ECODEC); /* 64 bits */
    assert_int_equal(DECODE("\x0d"
                            "1234",
                            fuzz_outer, &m),
                     CRPC_ECODEC);                                     /* 32 bits */
    assert_int_equal(DECODE("\x18\x05", fuzz_outer, &m), CRPC_ECODEC); /* repeated */
    assert_int_equal(DECODE("\x1a\x01"
                            "a\x18\x05",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x2a\x02\x08\x05", fuzz_outer, &m), CRPC_ECODEC); /* one down */
    assert_int_equal(DECODE("\x0b\x0c", fuzz_outer, &m), CRPC_ECODEC);         /* group */
    assert_int_equal(DECODE("\x22\x01\x05", fuzz_outer, &m), CRPC_ECODEC);     /* bytes for int */
}

static void malformed(void **state)
{
    fuzz_outer m;
    (void)state;
    assert_int_equal(DECODE("\x0a\x04"
                            "abc",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x0a\xff\xff\xff\xff\x0f", fuzz_outer, &m), CRPC_ECODEC);
    assert_int_equal(DECODE("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x0a", fuzz_outer, &m), CRPC_ECODEC);
    assert_int_equal(DECODE("\x02\x01"
                            "a",
                            fuzz_outer, &m),
                     CRPC_ECODEC); /* field 0 */
    assert_int_equal(DECODE("\x0a\x01"
                            "a\x00",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x20\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", fuzz_outer, &m),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x2a\x04\x0a\x05"
                            "ab"
                            "cde",
                            fuzz_outer, &m),
                     CRPC_ECODEC);
}

/* Every prefix, at the edge of a page: no byte past the end is read, and views stay inside. */
static void every_prefix(void **state)
{
    size_t i, n;
    unsigned long accepted = *fuzz_message_count();
    (void)state;
    for (i = 0; i < sizeof fuzz_message_seeds / sizeof fuzz_message_seeds[0]; i++) {
        for (n = 0; n <= fuzz_message_seeds[i].size; n++) {
            ct_guard g = ct_guard_make(fuzz_message_seeds[i].data, n);
            LLVMFuzzerTestOneInput(g.data, n);
            ct_guard_free(g);
        }
    }
    assert_true(*fuzz_message_count() - accepted > 12);
}

static void random_messages(void **state)
{
    unsigned long accepted = *fuzz_message_count();
    (void)state;
    fuzz_run(LLVMFuzzerTestOneInput, fuzz_message_seeds,
             sizeof fuzz_message_seeds / sizeof fuzz_message_seeds[0], 100000, ct_random());
    assert_true(*fuzz_message_count() - accepted > 10000);
}

static void nanopbs_own_decode_refuses(void **state)
{
    static const pb_byte_t bytes[] = {0x0a, 3, 'a', 'b', 'c'};
    pb_istream_t in = pb_istream_from_buffer(bytes, sizeof bytes);
    fuzz_outer m;
    (void)state;
    memset(&m, 0, sizeof m);
    assert_false(pb_decode(&in, &fuzz_outer_msg, &m));
    assert_non_null(strstr(PB_GET_ERROR(&in), "crpc_message_decode"));
    assert_null(crpc_view_data(m.text));
}

static void fields_that_cannot_be_views(void **state)
{
    m_number number;
    m_small small;
    pb_byte_t out[50];
    pb_ostream_t stream = pb_ostream_from_buffer(out, sizeof out);
    (void)state;
    assert_int_equal(DECODE("\x0a\x01"
                            "a",
                            m_number, &number),
                     CRPC_ECODEC);
    assert_int_equal(DECODE("\x08\x01", m_number, &number), CRPC_ECODEC);
    assert_int_equal(DECODE("\x0a\x01"
                            "a",
                            m_small, &small),
                     CRPC_ECODEC);
    memset(&number, 0, sizeof number);
    number.number = crpc_view_str("a");
    assert_false(pb_encode(&stream, &m_number_msg, &number));
    assert_non_null(strstr(PB_GET_ERROR(&stream), "oneof"));
    assert_int_equal(stream.bytes_written, 0);
}

static void has_views_at_any_depth(void **state)
{
    (void)state;
    assert_true(crpci_message_has_views(&fuzz_outer_msg, 0));
    assert_true(crpci_message_has_views(&fuzz_inner_msg, 16));
    assert_false(crpci_message_has_views(&m_plain_msg, 16));
    assert_false(crpci_message_has_views(&m_counted_msg, 16));
    assert_true(crpci_message_has_views(&m_deep_msg, 16));
    assert_false(crpci_message_has_views(&m_deep_msg, 0));
    assert_true(crpci_message_has_views(&m_array_msg, 1));
}

static void structs_with_views_are_cleared_and_others_only_set(void **state)
{
    m_deep deep;
    m_plain plain;
    (void)state;
    memset(&deep, 0x55, sizeof deep);
    assert_int_equal(DECODE("\x0a\x02\x20\x01", m_deep, &deep), CRPC_OK);
    assert_true(deep.has_outer);
    assert_null(deep.outer.many.at[0]);
    assert_null(crpc_view_data(deep.outer.inner.name));
    memset(&plain, 0x55, sizeof plain);
    assert_int_equal(DECODE("\x08\x05", m_plain, &plain), CRPC_OK);
    assert_int_equal(plain.number, 5);
    assert_string_equal(plain.text, "");
    assert_int_equal(DECODE("\x12\x08"
                            "12345678",
                            m_plain, &plain),
                     CRPC_ECODEC); /* no room */
}

static void required_views(void **state)
{
    m_required m;
    pb_byte_t out[10];
    pb_ostream_t stream = pb_ostream_from_buffer(out, sizeof out);
    (void)state;
    assert_int_equal(DECODE("", m_required, &m), CRPC_ECODEC);
    assert_int_equal(DECODE("\x0a\0", m_required, &m), CRPC_OK);
    memset(&m, 0, sizeof m);
    assert_true(pb_encode(&stream, &m_required_msg, &m));
    assert_int_equal(stream.bytes_written, 2); /* unset is sent empty: the reader wants it */
    assert_memory_equal(out, "\x0a\0", 2);
}

/* --- encoding -------------------------------------------------------------------------------- */

static int encode(crpci_heap *h, size_t room, const pb_msgdesc_t *desc, const void *message,
                  crpci_message_out *o, const char **why)
{
    memset(o, 0, sizeof *o);
    o->heap = h;
    o->chunk = crpci_heap_chunk(h, room);
    if (!o->chunk)
        return CRPC_ENOMEM;
    return crpci_message_encode(o, desc, message, why);
}

static crpci_heap *heap_open(int64_t limit)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, limit), CRPC_OK);
    return h;
}

static void encodes_views(void **state)
{
    static const char expected[] = "\x0a\x03"
                                   "abc\x1a\x01x\x1a\0\x1a\x02yz\x20\x96\x01\x2a\x05"
                                   "\x0a\0\x12\x01"
                                   "b";
    crpci_heap *h = heap_open(0);
    crpci_message_out o;
    crpc_view items[3], one = crpc_view_str("b");
    fuzz_outer m;
    const char *why;
    (void)state;
    memset(&m, 0, sizeof m);
    items[0] = crpc_view_str("x");
    items[1] = crpc_view_str(NULL); /* unset is an empty element: it has its place */
    items[2] = crpc_view_str("yz");
    m.text = crpc_view_str("abc");
    m.many = crpc_views_of(items, 3);
    m.number = 150;
    m.has_inner = true;
    m.inner.name = crpc_view_str(""); /* set, and empty */
    m.inner.tags = crpc_views_of(&one, 1);
    assert_int_equal(encode(h, 0, &fuzz_outer_msg, &m, &o, &why), CRPC_OK);
    assert_int_equal(o.len, sizeof expected - 1);
    assert_memory_equal(crpci_heap_data(o.chunk), expected, sizeof expected - 1);
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
}

/* What was received can be sent on as it is, scattered elements too. */
static void received_views_are_sent_on(void **state)
{
    static const char bytes[] = "\x1a\x01"
                                "a\x20\x05\x1a\0\x1a\x02"
                                "bc";
    static const char expected[] = "\x1a\x01"
                                   "a\x1a\0\x1a\x02"
                                   "bc\x20\x05";
    crpci_heap *h = heap_open(0);
    crpci_message_out o;
    fuzz_outer m;
    const char *why;
    (void)state;
    assert_int_equal(DECODE(bytes, fuzz_outer, &m), CRPC_OK);
    assert_int_equal(encode(h, 0, &fuzz_outer_msg, &m, &o, &why), CRPC_OK);
    assert_int_equal(o.len, sizeof expected - 1);
    assert_memory_equal(crpci_heap_data(o.chunk), expected, sizeof expected - 1);
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
}

/* nanopb's usual way is to encode twice, once for the size, which a callback with an effect does
 * not survive. */
static void a_callback_runs_once(void **state)
{
    crpci_heap *h = heap_open(0);
    crpci_message_out o;
    m_counted m;
    const char *why;
    (void)state;
    memset(&m, 0, sizeof m);
    m.number = 3;
    called = 0;
    assert_int_equal(encode(h, 0, &m_counted_msg, &m, &o, &why), CRPC_OK);
    assert_int_equal(called, 1);
    assert_int_equal(o.len, 10);
    assert_memory_equal(crpci_heap_data(o.chunk),
                        "\x0a\x06"
                        "called\x10\x03",
                        10);
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
}

/* What stands before the message, the room for header and meta, moves along when the chunk grows.
 */
static void growing_keeps_what_was_written(void **state)
{
    crpci_heap *h = heap_open(0);
    size_t size, i;
    (void)state;
    for (size = 0; size < 300000; size = size * 3 + 50) {
        crpci_message_out o;
        fuzz_outer m;
        const char *why;
        uint8_t *big = (uint8_t *)malloc(size + 1);
        assert_non_null(big);
        for (i = 0; i < size; i++)
            big[i] = (uint8_t)(i * 7);
        memset(&o, 0, sizeof o);
        o.heap = h;
        o.chunk = crpci_heap_chunk(h, 100);
        memset(crpci_heap_data(o.chunk), 0xee, 100);
        o.len = 100;
        memset(&m, 0, sizeof m);
        m.text = crpc_view_str("before");
        m.blob = crpc_view_of(big, size);
        m.number = 5;
        assert_int_equal(crpci_message_encode(&o, &fuzz_outer_msg, &m, &why), CRPC_OK);
        assert_true(o.chunk->cap >= o.len);
        for (i = 0; i < 100; i++)
            assert_int_equal(crpci_heap_data(o.chunk)[i], 0xee);
        assert_int_equal(crpc_message_decode(crpci_heap_data(o.chunk) + 100, o.len - 100,
                                             &fuzz_outer_msg, &m, sizeof m),
                         CRPC_OK);
        assert_int_equal(crpc_view_size(m.blob), size);
        assert_int_equal(memcmp(crpc_view_data(m.blob), big, size), 0);
        crpci_heap_chunk_unref(o.chunk);
        assert_int_equal(h->chunk_bytes, 0);
        free(big);
    }
    crpci_heap_unref(h);
}

static void over_the_limit_is_out_of_memory(void **state)
{
    static char big[5000];
    crpci_heap *h = heap_open(2000);
    crpci_message_out o;
    fuzz_outer m;
    const char *why = NULL;
    (void)state;
    memset(&m, 0, sizeof m);
    m.text = crpc_view_of(big, sizeof big);
    assert_int_equal(encode(h, 0, &fuzz_outer_msg, &m, &o, &why), CRPC_ENOMEM);
    assert_non_null(strstr(why, "max_bytes"));
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
}

static void encoding_errors_are_explained(void **state)
{
    crpci_heap *h = heap_open(0);
    crpci_message_out o;
    m_array m;
    m_plain plain;
    const char *why = NULL;
    (void)state;
    memset(&m, 0, sizeof m);
    m.inners_count = 4; /* more than there are */
    assert_int_equal(encode(h, 0, &m_array_msg, &m, &o, &why), CRPC_ECODEC);
    assert_non_null(why);
    crpci_heap_chunk_unref(o.chunk);
    memset(&plain, 'x', sizeof plain); /* not terminated */
    why = NULL;
    assert_int_equal(encode(h, 0, &m_plain_msg, &plain, &o, &why), CRPC_ECODEC);
    assert_string_equal(why, "unterminated string");
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
}

static int encode_scenario(const crpc_hooks *hooks, void *user)
{
    static char big[3000];
    crpci_heap *h;
    crpci_message_out o;
    fuzz_outer m;
    const char *why = NULL;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    memset(&m, 0, sizeof m);
    m.text = m.blob = crpc_view_of(big, sizeof big);
    err = encode(h, 10, &fuzz_outer_msg, &m, &o, &why);
    crpci_heap_chunk_unref(o.chunk);
    crpci_heap_unref(h);
    return err;
}

static void out_of_memory_while_encoding(void **state)
{
    (void)state;
    assert_true(ct_sweep(encode_scenario, NULL) >= 4);
}

static void varints_and_skipping(void **state)
{
    static const uint8_t ten[] = {0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01};
    static const uint8_t over[] = {0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02};
    static const uint8_t eleven[] = {0x80, 0x80, 0x80, 0x80, 0x80, 0x80,
                                     0x80, 0x80, 0x80, 0x80, 0x01};
    uint64_t v = 0;
    size_t n;
    (void)state;
    assert_ptr_equal(crpci_message_varint(ten, ten + 10, &v), ten + 10);
    assert_true(v == UINT64_C(1) << 63);
    assert_null(crpci_message_varint(over, over + 10, &v));
    assert_null(crpci_message_varint(eleven, eleven + 11, &v));
    for (n = 0; n < 10; n++) {
        ct_guard g = ct_guard_make(ten, n);
        assert_null(crpci_message_varint(g.data, g.data + n, &v));
        ct_guard_free(g);
    }
    assert_ptr_equal(crpci_message_skip(ten, ten + 10, 0), ten + 10);
    assert_ptr_equal(crpci_message_skip(ten, ten + 10, 1), ten + 8);
    assert_ptr_equal(crpci_message_skip(ten, ten + 10, 5), ten + 4);
    assert_null(crpci_message_skip(ten, ten + 7, 1));
    assert_null(crpci_message_skip(ten, ten + 3, 5));
    assert_null(crpci_message_skip(ten, ten + 10, 2)); /* a length of 2^63 */
    assert_null(crpci_message_skip(ten, ten + 10, 3));
    assert_null(crpci_message_skip(ten, ten + 10, 4));
    assert_null(crpci_message_skip(ten, ten + 10, 6));
    assert_null(crpci_message_skip(ten, ten + 10, 7));
}

static void nanopb_is_the_one_of_the_header(void **state)
{
    (void)state;
    assert_true(crpci_message_self_check());
}

static void secrets_are_equal_if_all_their_bytes_are(void **state)
{
    static const char *const texts[] = {"", "a", "b", "ab", "bb", "ba", "abc"};
    size_t i, k;
    (void)state;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        for (k = 0; k < sizeof texts / sizeof *texts; k++)
            assert_int_equal(crpc_secret_equal(crpc_view_str(texts[i]), crpc_view_str(texts[k])),
                             i == k);
    }
    assert_true(crpc_secret_equal(crpc_view_of(NULL, 0), crpc_view_str("")));
    assert_false(crpc_secret_equal(crpc_view_of("a\0b", 3), crpc_view_of("a\0c", 3)));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(secrets_are_equal_if_all_their_bytes_are),
        CT_TEST(views_of_memory),
        CT_TEST(nanopb_is_the_one_of_the_header),
        CT_TEST(arrays_of_views),
        CT_TEST(fields_point_into_the_input),
        CT_TEST(absent_and_empty_differ),
        CT_TEST(the_last_of_several_wins),
        CT_TEST(repeated_among_other_fields),
        CT_TEST(repeated_in_a_submessage),
        CT_TEST(a_message_in_two_parts),
        CT_TEST(a_number_in_place_of_a_string),
        CT_TEST(malformed),
        CT_TEST(every_prefix),
        CT_TEST(random_messages),
        CT_TEST(nanopbs_own_decode_refuses),
        CT_TEST(fields_that_cannot_be_views),
        CT_TEST(has_views_at_any_depth),
        CT_TEST(structs_with_views_are_cleared_and_others_only_set),
        CT_TEST(required_views),
        CT_TEST(encodes_views),
        CT_TEST(received_views_are_sent_on),
        CT_TEST(a_callback_runs_once),
        CT_TEST(growing_keeps_what_was_written),
        CT_TEST(over_the_limit_is_out_of_memory),
        CT_TEST(encoding_errors_are_explained),
        CT_TEST(out_of_memory_while_encoding),
        CT_TEST(varints_and_skipping),
    };
    return CT_RUN(tests);
}
