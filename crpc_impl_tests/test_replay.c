#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#define SECOND 1000000
static const int method_a, method_b; /* only their addresses matter */
static const uint64_t secret[2] = {1, 2};

static crpci_heap *heap(void)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    return h;
}

static crpci_chunk *reply_of(crpci_heap *h, int code, size_t payload)
{
    uint8_t *bytes = (uint8_t *)calloc(1, payload + 1);
    crpci_message m;
    crpci_chunk *c;
    memset(&m, 0, sizeof m);
    m.status = code;
    m.payload = bytes;
    m.payload_size = payload;
    c = crpci_replay_copy(h, NULL, &m, NULL);
    free(bytes);
    return c;
}

static int code_of(const crpci_replay_entry *e)
{
    return ((crpci_replay_reply *)(void *)crpci_heap_data(e->reply))->m.status;
}

/* Adds a new request and finishes it. */
static void execute(crpci_replay *r, const void *method, const char *id, int code, size_t payload,
                    int64_t now)
{
    crpci_replay_entry *e;
    crpci_chunk *c = reply_of(r->heap, code, payload);
    crpci_list waiting;
    assert_null(crpci_replay_find(r, method, 0, crpc_view_str(id), now));
    e = crpci_replay_add(r, method, 0, crpc_view_str(id), 0, NULL);
    assert_non_null(e);
    assert_non_null(c);
    crpci_replay_finish(r, e, c, now, &waiting);
    assert_true(crpci_list_empty(&waiting));
    crpci_heap_chunk_unref(c);
}

static crpci_replay_entry *find(crpci_replay *r, const void *method, const char *id, int64_t now)
{
    return crpci_replay_find(r, method, 0, crpc_view_str(id), now);
}

static void a_repeated_request_is_found(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    (void)state;
    assert_int_equal(crpci_replay_open(&r, h, 10, 1 << 20, SECOND, secret), CRPC_OK);
    execute(&r, &method_a, "id", 11, 10, 0);
    execute(&r, &method_b, "id", 22, 10, 0); /* the same id of another method */
    execute(&r, &method_a, "id2", 33, 10, 0);
    execute(&r, &method_a, "i", 44, 10, 0);
    assert_int_equal(code_of(find(&r, &method_a, "id", 1)), 11);
    assert_int_equal(code_of(find(&r, &method_b, "id", 1)), 22);
    assert_int_equal(code_of(find(&r, &method_a, "id2", 1)), 33);
    assert_int_equal(code_of(find(&r, &method_a, "i", 1)), 44);
    assert_null(find(&r, &method_b, "id2", 1));
    assert_int_equal(r.count, 4);
    crpci_replay_close(&r);
    crpci_heap_unref(h);
}

static void the_parts_of_a_reply_are_copied(void **state)
{
    crpci_heap *h = heap();
    char words[] = "words", fields[] = "fields", payload[] = "payload", attachment[] = "attached";
    crpci_replay_reply *r;
    crpci_message m;
    crpci_chunk *c;
    (void)state;
    memset(&m, 0, sizeof m);
    m.status = 5;
    m.text = crpc_view_str(words);
    m.fields = crpc_view_str(fields);
    m.payload = (uint8_t *)payload;
    m.payload_size = 7;
    m.attachment_size = 8;
    c = crpci_replay_copy(h, &c, &m, attachment);
    words[0] = fields[0] = payload[0] = attachment[0] = '?';
    r = (crpci_replay_reply *)(void *)crpci_heap_data(c);
    assert_ptr_equal(r->protocol, &c);
    assert_int_equal(r->m.status, 5);
    assert_int_equal(crpc_view_size(r->m.text), 5);
    assert_memory_equal(crpc_view_data(r->m.text), "words", 5);
    assert_int_equal(crpc_view_size(r->m.fields), 6);
    assert_memory_equal(crpc_view_data(r->m.fields), "fields", 6);
    assert_int_equal(r->m.payload_size, 7);
    assert_int_equal(r->m.attachment_size, 8);
    assert_memory_equal(r->m.payload, "payloadattached", 15);
    crpci_heap_chunk_unref(c);
    crpci_heap_unref(h);
}

static void waiting_requests_are_given_back_in_order(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    crpci_replay_entry *e;
    crpci_list waiting, link[3];
    int i;
    (void)state;
    assert_int_equal(crpci_replay_open(&r, h, 10, 1 << 20, SECOND, secret), CRPC_OK);
    e = crpci_replay_add(&r, &method_a, 0, crpc_view_str("id"), 0, NULL);
    for (i = 0; i < 3; i++) {
        /* an executing request does not expire */
        assert_ptr_equal(find(&r, &method_a, "id", INT64_C(1) << 50), e);
        assert_false(e->finished);
        crpci_list_append(&e->waiting, &link[i]);
    }
    crpci_replay_finish(&r, e, NULL, 0, &waiting);
    assert_ptr_equal(waiting.next, &link[0]);
    assert_ptr_equal(link[0].next, &link[1]);
    assert_ptr_equal(link[1].next, &link[2]);
    assert_ptr_equal(link[2].next, &waiting);
    assert_true(find(&r, &method_a, "id", 1)->finished);
    assert_null(find(&r, &method_a, "id", 1)->reply);
    crpci_replay_close(&r);
    crpci_heap_unref(h);
}

/* An entry that went early would let a repeated request execute twice. */
static void entries_make_no_room_for_others(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    crpci_replay_entry *running;
    crpci_list waiting;
    char id[16];
    int i;
    (void)state;
    assert_int_equal(crpci_replay_open(&r, h, 4, 1 << 20, SECOND, secret), CRPC_OK);
    running = crpci_replay_add(&r, &method_a, 0, crpc_view_str("first"), 0, NULL);
    for (i = 0; i < 3; i++) {
        snprintf(id, sizeof id, "%d", i);
        execute(&r, &method_a, id, i + 1, 10, i);
    }
    assert_null(crpci_replay_add(&r, &method_a, 0, crpc_view_str("new"), 0, NULL));
    assert_int_equal(r.count, 4);
    assert_ptr_equal(find(&r, &method_a, "first", SECOND - 1), running);
    assert_int_equal(code_of(find(&r, &method_a, "0", SECOND - 1)), 1);
    assert_null(find(&r, &method_a, "0", SECOND)); /* it expires, and makes room then */
    assert_non_null(crpci_replay_add(&r, &method_a, 0, crpc_view_str("new"), 0, NULL));
    crpci_replay_finish(&r, running, NULL, SECOND, &waiting);
    crpci_replay_finish(&r, find(&r, &method_a, "new", SECOND), NULL, SECOND, &waiting);
    crpci_replay_close(&r);
    crpci_heap_unref(h);
}

static int released;

static void count_release(crpci_replay *r, void *owner)
{
    (void)r;
    assert_ptr_equal(owner, &released);
    released++;
}

static void the_owner_learns_of_each_entry_that_is_gone(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    crpci_list waiting;
    (void)state;
    released = 0;
    assert_int_equal(crpci_replay_open(&r, h, 4, 1 << 20, SECOND, secret), CRPC_OK);
    r.release = count_release;
    crpci_replay_finish(&r, crpci_replay_add(&r, &method_a, 0, crpc_view_str("a"), 7, &released), NULL,
                        0, &waiting);
    crpci_replay_finish(&r, crpci_replay_add(&r, &method_a, 0, crpc_view_str("b"), 8, &released), NULL,
                        5, &waiting);
    assert_true(find(&r, &method_a, "b", 10)->digest == 8);
    assert_int_equal(released, 0);
    assert_null(find(&r, &method_a, "a", SECOND + 1));
    assert_int_equal(released, 1);
    crpci_replay_close(&r);
    assert_int_equal(released, 2);
    crpci_heap_unref(h);
}

static void entries_expire(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    (void)state;
    assert_int_equal(crpci_replay_open(&r, h, 10, 1 << 20, SECOND, secret), CRPC_OK);
    execute(&r, &method_a, "1", 1, 10, 5);
    execute(&r, &method_a, "2", 2, 10, 500000);
    assert_non_null(find(&r, &method_a, "1", SECOND + 4));
    assert_null(find(&r, &method_a, "1", SECOND + 5));
    assert_int_equal(r.count, 1);
    assert_non_null(find(&r, &method_a, "2", SECOND + 5));
    assert_null(find(&r, &method_a, "2", 2 * SECOND));
    assert_int_equal(r.count, 0);
    assert_int_equal(r.bytes, 0);
    crpci_replay_close(&r);
    crpci_heap_unref(h);
}

static void memory_is_bounded(void **state)
{
    crpci_heap *h = heap();
    crpci_replay r;
    char id[16];
    int i, found = 0;
    (void)state;
    assert_int_equal(crpci_replay_open(&r, h, 1000, 64 << 10, SECOND, secret), CRPC_OK);
    for (i = 0; i < 20; i++) {
        snprintf(id, sizeof id, "%d", i);
        execute(&r, &method_a, id, 1, 6000, 0);
        assert_true(r.bytes <= 64 << 10);
        found += find(&r, &method_a, id, 0)->reply != NULL;
    }
    assert_in_range(found, 5, 10); /* then no reply had room any more */
    /* over a quarter of max_bytes: the entry stays without its reply */
    execute(&r, &method_a, "large", 1, 20000, 0);
    assert_true(find(&r, &method_a, "large", 0)->finished);
    assert_null(find(&r, &method_a, "large", 0)->reply);
    for (i = 0; crpci_replay_add(&r, &method_b, 0, crpc_view_str(id), 0, NULL); i++)
        snprintf(id, sizeof id, "x%d", i);
    assert_in_range(i, 5, 999); /* entries count too */
    assert_true(r.bytes <= 64 << 10);
    for (found = 0; found < (int)r.bucket_count; found++) {
        while (!crpci_list_empty(&r.buckets[found]))
            crpci_replay_remove(
                &r, CRPCI_CONTAINER(r.buckets[found].next, crpci_replay_entry, link));
    }
    assert_int_equal(r.bytes, 0);
    crpci_replay_close(&r);
    crpci_heap_unref(h);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    crpci_replay r;
    crpci_replay_entry *e;
    crpci_list waiting;
    crpci_chunk *c;
    crpci_heap *h;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    err = crpci_replay_open(&r, h, 10, 1 << 20, SECOND, secret);
    if (!err) {
        e = crpci_replay_add(&r, &method_a, 0, crpc_view_str("id"), 0, NULL);
        c = reply_of(h, 1, 10);
        err = e && c ? CRPC_OK : CRPC_ENOMEM;
        if (e)
            crpci_replay_finish(&r, e, c, 0, &waiting);
        crpci_heap_chunk_unref(c);
    }
    crpci_replay_close(&r);
    crpci_heap_unref(h);
    return err;
}

static void it_survives_being_out_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(scenario, NULL), 4);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_repeated_request_is_found),           CT_TEST(the_parts_of_a_reply_are_copied),
        CT_TEST(waiting_requests_are_given_back_in_order), CT_TEST(entries_make_no_room_for_others),
        CT_TEST(the_owner_learns_of_each_entry_that_is_gone),
        CT_TEST(entries_expire),       CT_TEST(memory_is_bounded),
        CT_TEST(it_survives_being_out_of_memory),
    };
    return CT_RUN(tests);
}
