/* Views through nanopb: "roundtrip encode" writes a filled demo.Sample to standard output,
 * "roundtrip decode" reads one from standard input and compares every field, "roundtrip
 * decode-split" does so for a hostile one. protoc itself, the third party, translates between these
 * bytes and text. */
#include "views.crpc.h"

#include <pb_encode.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONG_SIZE 100000 /* bytes of the long field: beyond any 16-bit size */
#define BUFFER_SIZE 400000

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "roundtrip.c:%d: %s\n", __LINE__, #condition);                         \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static uint8_t buffer[BUFFER_SIZE];
static char long_text[LONG_SIZE];

static const char *const tag_texts[] = {"red", "", "a longer tag with spaces"};
static const char *const part_texts[] = {"p0", "p1"};

/* --- encode ----------------------------------------------------------------------------------- */

static void fill_inner(demo_Inner *inner, const char *key, const crpc_view *parts, size_t count)
{
    inner->key = crpc_view_str(key);
    inner->parts = crpc_views_of(parts, count);
    inner->number = 7;
}

static int encode(void)
{
    static demo_Sample m; /* static, so that it is all zero: every view is unset */
    static crpc_view tags[3], parts[2];
    pb_ostream_t out = pb_ostream_from_buffer(buffer, sizeof(buffer));
    for (size_t i = 0; i < 3; i++) {
        tags[i] = crpc_view_str(tag_texts[i]);
    }
    for (size_t i = 0; i < 2; i++) {
        parts[i] = crpc_view_str(part_texts[i]);
    }
    memset(long_text, 'x', sizeof(long_text));
    strcpy(m.name, "short");
    m.token = crpc_view_of("a\0b\xff", 4);
    m.tags = crpc_views_of(tags, 3);
    m.inners_count = 3;
    fill_inner(&m.inners[0], "first", parts, 2);
    fill_inner(&m.inners[1], "second", parts, 1);
    fill_inner(&m.inners[2], "third", NULL, 0);
    m.which_body = demo_Sample_one_tag;
    fill_inner(&m.body.one, "in a oneof", parts, 2);
    m.labels_count = 2;
    m.labels[0].key = crpc_view_str("left");
    m.labels[0].value = 1;
    m.labels[1].key = crpc_view_str("right");
    m.labels[1].value = -1;
    m.present = crpc_view_of("", 0);
    m.large = crpc_view_of(long_text, sizeof(long_text));
    m.last = 42;
    EXPECT(pb_encode(&out, demo_Sample_fields, &m));
    EXPECT(fwrite(buffer, 1, out.bytes_written, stdout) == out.bytes_written);
    return 0;
}

/* --- decode ----------------------------------------------------------------------------------- */

/* Whether a view lies in the input: decoding copies nothing. */
static int inside(crpc_view v, const uint8_t *input, size_t size)
{
    const uint8_t *data = (const uint8_t *)crpc_view_data(v);
    return data >= input && data + crpc_view_size(v) <= input + size;
}

static int check_views(const crpc_views *views, const char *const *texts, size_t count,
                       const uint8_t *input, size_t size)
{
    const void *cursor = NULL;
    crpc_view item;
    for (size_t i = 0; i < count; i++) {
        EXPECT(crpc_views_next(views, &cursor, &item));
        EXPECT(crpc_view_equal(item, texts[i]));
        EXPECT(inside(item, input, size));
    }
    EXPECT(!crpc_views_next(views, &cursor, &item));
    return 0;
}

static int check_inner(const demo_Inner *inner, const char *key, size_t count,
                       const uint8_t *input, size_t size)
{
    EXPECT(crpc_view_equal(inner->key, key));
    EXPECT(inner->number == 7);
    return check_views(&inner->parts, part_texts, count, input, size);
}

static int check_sample(const demo_Sample *m, const uint8_t *input, size_t size)
{
    char copy[8];
    EXPECT(strcmp(m->name, "short") == 0);
    EXPECT(crpc_view_size(m->token) == 4 && inside(m->token, input, size));
    EXPECT(memcmp(crpc_view_data(m->token), "a\0b\xff", 4) == 0);
    EXPECT(check_views(&m->tags, tag_texts, 3, input, size) == 0);
    EXPECT(m->inners_count == 3);
    EXPECT(check_inner(&m->inners[0], "first", 2, input, size) == 0);
    EXPECT(check_inner(&m->inners[1], "second", 1, input, size) == 0);
    EXPECT(check_inner(&m->inners[2], "third", 0, input, size) == 0);
    EXPECT(m->which_body == demo_Sample_one_tag);
    EXPECT(check_inner(&m->body.one, "in a oneof", 2, input, size) == 0);
    EXPECT(m->labels_count == 2);
    EXPECT(crpc_view_equal(m->labels[0].key, "left") && m->labels[0].value == 1);
    EXPECT(crpc_view_equal(m->labels[1].key, "right") && m->labels[1].value == -1);
    EXPECT(crpc_view_data(m->present) != NULL && crpc_view_size(m->present) == 0);
    EXPECT(crpc_view_data(m->absent) == NULL);
    EXPECT(crpc_view_size(m->large) == LONG_SIZE && inside(m->large, input, size));
    EXPECT(crpc_view_copy(m->large, copy, sizeof(copy)) == LONG_SIZE);
    EXPECT(strcmp(copy, "xxxxxxx") == 0);
    EXPECT(m->last == 42);
    return 0;
}

static int complete; /* cuts that fell between two fields */

/* Every view of a message decoded from cut input must still lie inside it. The input is a heap
 * block of that size, for the address sanitizer's sake. */
static int check_cut(const uint8_t *input, size_t size)
{
    demo_Sample m;
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    const void *cursor = NULL;
    crpc_view item;
    EXPECT(copy != NULL);
    memcpy(copy, input, size);
    memset(&m, 0xa5, sizeof(m)); /* decoding clears it */
    if (crpc_message_decode(copy, size, demo_Sample_fields, &m, sizeof(m)) == CRPC_OK)
        complete++;
    EXPECT(crpc_view_data(m.token) == NULL || inside(m.token, copy, size));
    EXPECT(crpc_view_data(m.large) == NULL || inside(m.large, copy, size));
    while (crpc_views_next(&m.tags, &cursor, &item)) {
        EXPECT(inside(item, copy, size));
    }
    free(copy);
    return 0;
}

static int decode(void)
{
    demo_Sample m = demo_Sample_init_zero;
    size_t size = fread(buffer, 1, sizeof(buffer), stdin);
    EXPECT(size > 0 && size < sizeof(buffer));
    EXPECT(crpc_message_decode(buffer, size, demo_Sample_fields, &m, sizeof(m)) == CRPC_OK);
    EXPECT(check_sample(&m, buffer, size) == 0);
    for (size_t cut = 0; cut < size; cut += cut < 400 || cut > size - 20 ? 1 : 997) {
        EXPECT(check_cut(buffer, cut) == 0);
    }
    EXPECT(complete > 5);
    return 0;
}

/* A submessage may arrive in pieces, which protobuf merges, with fields of its parent in between:
 * those must not show up among the views. Refusing such input is fine. */
static int decode_split(void)
{
    static const char *const expected = "p0 p1 ";
    demo_Sample m = demo_Sample_init_zero;
    char seen[64] = "";
    size_t size = fread(buffer, 1, sizeof(buffer), stdin);
    const void *cursor = NULL;
    crpc_view item;
    if (crpc_message_decode(buffer, size, demo_Sample_fields, &m, sizeof(m)) != CRPC_OK) {
        return 0;
    }
    while (crpc_views_next(&m.body.one.parts, &cursor, &item)) {
        EXPECT(inside(item, buffer, size) && crpc_view_size(item) < 10);
        EXPECT(strlen(seen) + 12 < sizeof(seen));
        crpc_view_copy(item, seen + strlen(seen), 11);
        strcat(seen, " ");
    }
    if (strcmp(seen, expected) != 0)
        fprintf(stderr, "the views are %s\n", seen);
    EXPECT(strcmp(seen, expected) == 0);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "encode") == 0) {
        return encode();
    }
    if (argc == 2 && strcmp(argv[1], "decode") == 0) {
        return decode();
    }
    if (argc == 2 && strcmp(argv[1], "decode-split") == 0) {
        return decode_split();
    }
    return 2;
}
