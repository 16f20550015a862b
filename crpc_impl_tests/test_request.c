/* What a request carries, and how it is encoded and framed. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static const crpc_method method = {
    "dyn.Echo", "Add", dyn_Num_fields, dyn_Num_fields, sizeof(dyn_Num), sizeof(dyn_Num), NULL,
    0,          0};

typedef struct fixture {
    crpc_loop *loop;
    crpc_channel channel; /* only what encoding looks at */
} fixture;

static void fixture_open(fixture *f)
{
    crpc_loop_options o = CRPC_INIT;
    memset(f, 0, sizeof *f);
    o.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&f->loop, &o), CRPC_OK);
    f->channel.loop = f->channel.requests.loop = f->loop;
    f->channel.requests.protocol = &crpci_baidu;
}

static void fixture_close(fixture *f)
{
    while (f->channel.requests.methods) {
        crpci_method *m = f->channel.requests.methods;
        f->channel.requests.methods = m->next;
        crpci_heap_free(f->loop->heap, m, m->size);
    }
    crpc_loop_close(f->loop);
}

/* Encodes with `front` bytes left free for the caller behind the request's struct, of which `r`
 * receives a copy. */
static int encode(fixture *f, const dyn_Num *n, crpc_call *call, bool borrow, size_t front,
                  crpci_request *r)
{
    crpci_request *encoded;
    int err = crpci_request_encode(&f->channel.requests,
                                   crpci_request_find_method(&f->channel.requests, &method), n,
                                   call, borrow, front + ((sizeof *r + 15) & ~(size_t)15),
                                   &encoded, &call->error);
    if (!err)
        *r = *encoded;
    return err;
}

static int frame(crpci_request *r, int64_t id, const uint8_t **at, size_t *size, crpci_meta *m)
{
    const crpci_out *o = crpci_request_prepare(r, &crpci_baidu, id, 0);
    uint32_t body, meta;
    *at = o->head;
    *size = o->head_len;
    assert_ptr_equal(*at + *size, (const uint8_t *)(o + 1) + r->payload + r->payload_size +
                                      r->inline_size);
    assert_int_equal(crpci_frame_header(*at, *size, &body, &meta), CRPCI_FRAME_OK);
    assert_int_equal(body + CRPCI_FRAME_HEADER, *size + crpc_view_size(r->attachment));
    return crpci_meta_read(*at + CRPCI_FRAME_HEADER, meta, m);
}

static void it_frames_a_request_again_and_again(void **state)
{
    const crpc_field fields[] = {{"a", "1"}, {"bee", ""}};
    fixture f;
    dyn_Num n = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpci_request r;
    crpci_meta m;
    crpc_view value;
    const uint8_t *first, *second;
    size_t size;
    (void)state;
    fixture_open(&f);
    n.n = 7;
    call.log_id = -5;
    call.fields = fields;
    call.field_count = 2;
    call.credential = crpc_view_str("who");
    call.attachment = crpc_view_str("tail");
    assert_int_equal(encode(&f, &n, &call, true, 0, &r), CRPC_OK);
    assert_true(frame(&r, 1, &first, &size, &m));
    assert_memory_equal(first + size - 4, "tail", 4);
    assert_int_equal(m.attachment_size, 4);
    assert_int_equal(m.log_id, -5);
    assert_int_equal(m.correlation_id, 1);
    assert_true(crpc_view_equal(m.service, "dyn.Echo"));
    assert_true(crpc_view_equal(m.method, "Add"));
    assert_true(crpc_view_equal(m.credential, "who"));
    assert_true(crpci_meta_field(m.raw, "a", &value) && crpc_view_equal(value, "1"));
    assert_true(crpci_meta_field(m.raw, "bee", &value) && crpc_view_size(value) == 0);
    /* The longest id needs nine bytes more, in front: the payload stays where it is. */
    assert_true(frame(&r, -1, &second, &size, &m));
    assert_ptr_equal(second, first - 9);
    assert_int_equal(m.correlation_id, -1);
    assert_true(crpc_view_equal(m.credential, "who"));
    crpci_heap_chunk_unref(r.chunk);
    fixture_close(&f);
}

static void it_copies_small_attachments_and_borrows_large_ones(void **state)
{
    static char bytes[CRPCI_REQUEST_INLINE + 1];
    fixture f;
    dyn_Num n = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpci_request r;
    (void)state;
    fixture_open(&f);
    call.attachment = crpc_view_of(bytes, sizeof bytes - 1);
    assert_int_equal(encode(&f, &n, &call, true, 0, &r), CRPC_OK);
    assert_int_equal(r.inline_size, sizeof bytes - 1);
    crpci_heap_chunk_unref(r.chunk);
    call.attachment = crpc_view_of(bytes, sizeof bytes);
    assert_int_equal(encode(&f, &n, &call, true, 0, &r), CRPC_OK);
    assert_int_equal(r.inline_size, 0);
    assert_ptr_equal(crpc_view_data(r.attachment), bytes);
    crpci_heap_chunk_unref(r.chunk);
    /* An asynchronous call must copy: its caller may be gone when it is sent. */
    assert_int_equal(encode(&f, &n, &call, false, 0, &r), CRPC_OK);
    assert_int_equal(r.inline_size, sizeof bytes);
    assert_null(crpc_view_data(r.attachment));
    crpci_heap_chunk_unref(r.chunk);
    fixture_close(&f);
}

/* `block`: the chunk holds the pending call itself, too. */
static void copy_while_sent(size_t front, bool block)
{
    fixture f;
    dyn_Num n = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpci_pending_call c;
    crpci_chunk *old;
    crpci_meta m;
    const uint8_t *at;
    size_t size;
    fixture_open(&f);
    n.n = 99;
    memset(&c, 0, sizeof c);
    call.credential = crpc_view_str("who");
    assert_int_equal(encode(&f, &n, &call, true, front, &c.attempt.request), CRPC_OK);
    old = c.attempt.request.chunk;
    c.block = block ? old : NULL;
    assert_true(crpci_request_renew(&c.attempt.request, c.block));
    assert_ptr_equal(c.attempt.request.chunk, old); /* nobody sends it: it can be framed where it is */
    crpci_heap_chunk_ref(old);              /* a frame that is partly sent keeps a reference */
    crpci_request_frame(&c.attempt.request)->queued = true;
    assert_true(crpci_request_renew(&c.attempt.request, c.block));
    assert_ptr_not_equal(c.attempt.request.chunk, old);
    assert_int_equal(old->refs, block ? 2 : 1);
    memset(crpci_heap_data(old), 0xa5, old->cap);
    assert_true(frame(&c.attempt.request, 3, &at, &size, &m));
    assert_true(crpc_view_equal(m.credential, "who"));
    assert_int_equal(at[size - 1], 99);
    crpci_heap_chunk_unref(old);
    crpci_request_drop(&c.attempt.request, c.block);
    assert_null(c.attempt.request.chunk);
    crpci_heap_chunk_unref(c.block);
    fixture_close(&f);
}

static void it_copies_a_request_whose_frame_is_still_being_sent(void **state)
{
    (void)state;
    copy_while_sent(0, false);
    copy_while_sent(208, true);
}

static void more_than_64_kib_before_the_message_are_refused(void **state)
{
    static char secret[64 << 10];
    const crpc_field field = {"k", secret};
    fixture f;
    dyn_Num n = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpci_request r;
    crpci_meta m;
    const uint8_t *at;
    size_t size;
    (void)state;
    memset(secret, 's', sizeof secret - 1);
    fixture_open(&f);
    call.credential = crpc_view_of(secret, sizeof secret - 300);
    assert_int_equal(encode(&f, &n, &call, false, 0, &r), CRPC_OK);
    assert_true(frame(&r, 1, &at, &size, &m));
    crpci_heap_chunk_unref(r.chunk);
    call.credential = crpc_view_of(secret, sizeof secret);
    assert_int_equal(encode(&f, &n, &call, false, 0, &r), CRPC_EINVAL);
    assert_non_null(strstr(call.error.text, "over 64 KiB"));
    call.credential = crpc_view_of(NULL, 0);
    call.fields = &field;
    call.field_count = 1;
    assert_int_equal(encode(&f, &n, &call, false, 0, &r), CRPC_EINVAL);
    crpc_call_reset(&call);
    fixture_close(&f);
}

static void it_takes_fields_only_from_interceptors(void **state)
{
    crpc_call call = CRPC_INIT;
    (void)state;
    assert_int_equal(crpc_call_add_field(&call, "k", "v"), CRPC_EINVAL);
    crpc_call_reset(&call);
}

/* The deadline of a call that begins at 100 us. */
static int64_t deadline(const crpc_channel *ch, const crpc_method *m, const crpc_call *call)
{
    crpci_method k;
    memset(&k, 0, sizeof k);
    k.method = m;
    crpci_request_method_settings(&ch->requests, &k);
    crpci_request_apply_policy(&k.policy, &call->policy);
    return crpci_channel_deadline(&k.policy, call, 100);
}

/* The most specific setting wins: the call's, then the method's options, then the method's table,
 * then the channel's. */
static void it_takes_the_nearest_policy(void **state)
{
    crpc_method_options options[2];
    crpc_method m = method;
    crpc_call call = CRPC_INIT;
    crpci_method k;
    fixture f;
    (void)state;
    fixture_open(&f);
    memset(options, 0, sizeof options);
    memset(&k, 0, sizeof k);
    f.channel.requests.policy.cluster = CRPC_CLUSTER_FAILOVER;
    f.channel.requests.policy.retries = 2;
    f.channel.requests.policy.timeout_ms = 1000;
    f.channel.requests.options = options;
    f.channel.requests.option_count = 2;
    options[0].method = &method;
    options[0].policy.retries = 9;
    options[1].method = &m;
    options[1].policy.cluster = CRPC_CLUSTER_FORKING;
    options[1].policy.forks = 3;
    options[1].policy.retries = -1;
    k.method = &m;
    crpci_request_method_settings(&f.channel.requests, &k);
    assert_ptr_equal(k.options, &options[1]);
    assert_false(k.plain);
    assert_int_equal(k.policy.cluster, CRPC_CLUSTER_FORKING);
    assert_int_equal(k.policy.forks, 3);
    assert_int_equal(k.policy.retries, 0);
    assert_int_equal(k.policy.timeout_ms, 1000);
    call.policy.retries = 5;
    call.policy.cluster = CRPC_CLUSTER_FAILFAST;
    call.policy.forks = -1;
    call.policy.fail_percent = 1000;
    crpci_request_apply_policy(&k.policy, &call.policy);
    assert_int_equal(k.policy.cluster, CRPC_CLUSTER_FAILFAST);
    assert_int_equal(k.policy.retries, 5);
    assert_int_equal(k.policy.forks, 0); /* all */
    assert_int_equal(k.policy.fail_percent, 100);
    call.policy.retries = 99;
    crpci_request_apply_policy(&k.policy, &call.policy);
    assert_int_equal(k.policy.retries, CRPCI_REQUEST_RETRIES);
    fixture_close(&f);
}

static void it_keeps_the_earliest_deadline(void **state)
{
    fixture f;
    crpc_call call = CRPC_INIT;
    crpc_method m = method;
    crpci_origin parent = {5000, 11, 12, 13};
    crpci_request inherited;
    (void)state;
    fixture_open(&f);
    f.channel.requests.policy.timeout_ms = 1000;
    assert_int_equal(deadline(&f.channel, &m, &call), 1000100);
    m.timeout_ms = 7;
    assert_int_equal(deadline(&f.channel, &m, &call), 1000100); /* URL and options go first */
    f.channel.requests.timeout_open = true;
    assert_int_equal(deadline(&f.channel, &m, &call), 7100);
    call.policy.timeout_ms = 9;
    assert_int_equal(deadline(&f.channel, &m, &call), 9100);
    call.deadline_us = 300;
    assert_int_equal(deadline(&f.channel, &m, &call), 300);
    call.deadline_us = INT64_MAX;
    assert_int_equal(deadline(&f.channel, &m, &call), INT64_C(86400000100));
    call.parent = (const crpc_context *)(const void *)&parent;
    assert_int_equal(deadline(&f.channel, &m, &call), 5000);
    crpci_request_inherit(&call, &inherited);
    assert_int_equal(inherited.log_id, 11);
    assert_int_equal(inherited.trace_id, 12);
    assert_int_equal(inherited.parent_span_id, 13);
    fixture_close(&f);
}

static void views_and_attachments_go_both_ways(void **state)
{
    static const size_t sizes[] = {0, 1, 100, 2000, 4096, 4097, 65000, 66000, 1 << 20, 5 << 20};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i, k;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            for (k = 0; k < sizeof sizes / sizeof *sizes; k += (i + k) % 2 ? 1 : 2) {
                char *a = net_bytes(sizes[i]), *b = net_bytes(sizes[k]);
                crpc_view items[3];
                dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
                crpc_call call = CRPC_INIT;
                const void *cursor = NULL;
                crpc_view item;
                int count = 0;
                if (sizes[i] + sizes[k] > 6u << 20 || (sizes[i] + sizes[k] > 2u << 20 && m % 3))
                    goto next;
                items[0] = crpc_view_str("first");
                items[1] = crpc_view_of(a, sizes[i] % 3000);
                items[2] = crpc_view_str("last");
                in.name = crpc_view_str("name");
                in.data = crpc_view_of(a, sizes[i]);
                in.items = crpc_views_of(items, 3);
                call.attachment = crpc_view_of(b, sizes[k]);
                if (dyn_Echo_Pass(n.channel, &in, &out, &call))
                    fail_msg("%zu + %zu: %s", sizes[i], sizes[k], call.error.text);
                net_check_add(n.channel, 1); /* reuses every buffer that may be reused */
                assert_true(crpc_view_equal(out.name, "name"));
                assert_int_equal(crpc_view_size(out.data), sizes[i]);
                if (sizes[i])
                    assert_memory_equal(crpc_view_data(out.data), a, sizes[i]);
                assert_int_equal(out.n, sizes[k]);
                assert_int_equal(crpc_view_size(call.reply_attachment), sizes[k]);
                if (sizes[k])
                    assert_memory_equal(crpc_view_data(call.reply_attachment), b, sizes[k]);
                while (crpc_views_next(&out.items, &cursor, &item)) {
                    assert_int_equal(crpc_view_size(item), crpc_view_size(items[count]));
                    if (crpc_view_size(item))
                        assert_memory_equal(crpc_view_data(item), crpc_view_data(items[count]),
                                            crpc_view_size(item));
                    count++;
                }
                assert_int_equal(count, 3);
                crpc_call_reset(&call);
                assert_null(crpc_view_data(call.reply_attachment));
            next:
                free(a);
                free(b);
            }
        }
        net_close(&n);
    }
}

/* How many milliseconds a call of Meta leaves its handler, as the server counts them. */
static int64_t left_at_server(crpc_channel *ch, crpc_call *call)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    assert_int_equal(dyn_Echo_Meta(ch, &in, &out, call), CRPC_OK);
    return out.ms;
}

static void a_channel_has_a_deadline_for_all_its_calls(void **state)
{
    net n;
    crpc_channel *ch;
    (void)state;
    memset(&n, 0, sizeof n);
    n.channel_options.policy.timeout_ms = 30000;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    assert_in_range(left_at_server(n.channel, NULL), 20000, 30000);
    ch = net_channel(n.url, "?timeout_ms=17000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_in_range(left_at_server(ch, NULL), 7000, 17000);
    crpc_channel_close(ch);
    net_close(&n);
}

static void a_call_may_have_a_deadline_of_its_own(void **state)
{
    net n;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(&n, 0, sizeof n);
    n.channel_options.policy.timeout_ms = 30000;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    call.policy.timeout_ms = 15000;
    assert_in_range(left_at_server(n.channel, &call), 5000, 15000);
    call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) + 50000000;
    assert_in_range(left_at_server(n.channel, &call), 40000, 50000);
    crpc_call_reset(&call);
    net_close(&n);
}

static void no_deadline_is_longer_than_a_day(void **state)
{
    net n;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) + INT64_C(900000000000);
    assert_in_range(left_at_server(n.channel, &call), 86000000, 86400000);
    crpc_call_reset(&call);
    net_close(&n);
}

/* Quick has 60 ms in its .proto. What the URL or the options of the channel say goes before it. */
static void a_method_may_have_a_deadline_of_its_own(void **state)
{
    net n;
    crpc_channel *ch;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    in.ms = 200;
    assert_int_equal(dyn_Echo_Quick(n.channel, &in, &out, NULL), CRPC_OK); /* by its options */
    ch = net_channel(n.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Quick(ch, &in, &out, NULL), CRPC_OK);
    crpc_channel_close(ch);
    ch = net_channel(n.url, NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    in.ms = 2000;
    assert_int_equal(dyn_Echo_Quick(ch, &in, &out, NULL), CRPC_ETIMEDOUT);
    crpc_channel_close(ch);
    net_close(&n);
}

/* The answer must come within it, so a busy machine may need more than one try. */
static void the_default_deadline_is_a_second(void **state)
{
    net n;
    crpc_channel *ch;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    int tries, status = CRPC_ETIMEDOUT;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    ch = net_channel(n.url, NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    for (tries = 0; tries < 20 && status; tries++)
        status = dyn_Echo_Meta(ch, &in, &out, NULL);
    assert_int_equal(status, CRPC_OK);
    assert_in_range(out.ms, 1, 1000);
    in.ms = 2000;
    assert_int_equal(dyn_Echo_Quick(ch, &in, &out, NULL), CRPC_ETIMEDOUT);
    crpc_channel_close(ch);
    net_close(&n);
}

/* Every field of the request's meta, as a foreign peer reads it. */
static bool peer_keeps(peer *p, int fd, int number)
{
    wire_message *kept = (wire_message *)p->user;
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        wire_reply(&w, m.id, 1);
        pthread_mutex_lock(&p->lock);
        *kept = m;
        kept->all = kept->body = NULL;
        pthread_mutex_unlock(&p->lock);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void requests_carry_what_peers_insist_on(void **state)
{
    peer keeps;
    crpc_channel *ch;
    wire_message m;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    peer_open(&keeps, peer_keeps, &m);
    ch = net_channel(keeps.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    call.log_id = -5;
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
    assert_true(m.has_request && m.has_id && m.has_compress);
    assert_int_equal(m.compress, 0);
    assert_true(m.id != 0);
    assert_int_equal(m.log_id, -5);
    assert_string_equal(m.service, "dyn.Echo");
    assert_string_equal(m.method, "Add");
    assert_in_range(m.timeout_ms, 1, 20000);
    crpc_channel_close(ch);
    crpc_call_reset(&call);
    peer_close(&keeps);
}

static void short_names_leave_out_the_package(void **state)
{
    peer keeps;
    crpc_channel *ch;
    wire_message m;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    (void)state;
    peer_open(&keeps, peer_keeps, &m);
    ch = net_channel(keeps.url, "?timeout_ms=20000&short_names=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, NULL), CRPC_OK);
    assert_string_equal(m.service, "Echo");
    assert_string_equal(m.method, "Add");
    crpc_channel_close(ch);
    peer_close(&keeps);
}

static void fields_ids_and_credentials_travel(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_field fields[3] = {{"a", "one"}, {"other", ""}, {"a", "the last wins"}};
        crpc_view value;
        memset(&n, 0, sizeof n);
        n.channel_options.security.credential = "channel's";
        net_open(&n, p, m);
        assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 0);
        assert_string_equal(out.tag, "channel's");
        assert_false(crpc_call_field(&call, "b", &value));
        call.log_id = -1;
        call.credential = crpc_view_str("call's");
        call.fields = fields;
        call.field_count = 3;
        assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, -1);
        assert_string_equal(out.tag, "call's");
        assert_true(crpc_call_field(&call, "b", &value));
        assert_true(crpc_view_equal(value, "the last wins"));
        assert_false(crpc_call_field(&call, "a", &value));
        crpc_call_reset(&call);
        net_close(&n);
    }
}

/* A request that cannot be encoded fails before anything is sent. */
static void requests_that_do_not_encode(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    done_log d;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    memset(in.tag, 'x', sizeof in.tag); /* not terminated */
    assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_ECODEC);
    assert_int_equal(call.error.sent, CRPC_SENT_NO);
    assert_non_null(strstr(call.error.text, "dyn.Echo.Add: request not encoded: "));
    done_init(&d);
    assert_int_equal(dyn_Echo_Add_async(n.channel, &in, done_num, &d, NULL), CRPC_ECODEC);
    assert_int_equal(net_calls(&n.service), 0);
    crpc_call_reset(&call);
    net_close(&n);
    assert_int_equal(d.count, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_frames_a_request_again_and_again),
        CT_TEST(it_copies_small_attachments_and_borrows_large_ones),
        CT_TEST(it_copies_a_request_whose_frame_is_still_being_sent),
        CT_TEST(more_than_64_kib_before_the_message_are_refused),
        CT_TEST(it_takes_fields_only_from_interceptors),
        CT_TEST(it_takes_the_nearest_policy),
        CT_TEST(it_keeps_the_earliest_deadline),
        CT_TEST(views_and_attachments_go_both_ways),
        CT_TEST(a_channel_has_a_deadline_for_all_its_calls),
        CT_TEST(a_call_may_have_a_deadline_of_its_own),
        CT_TEST(no_deadline_is_longer_than_a_day),
        CT_TEST(a_method_may_have_a_deadline_of_its_own),
        CT_TEST(the_default_deadline_is_a_second),
        CT_TEST(requests_carry_what_peers_insist_on),
        CT_TEST(short_names_leave_out_the_package),
        CT_TEST(fields_ids_and_credentials_travel),
        CT_TEST(requests_that_do_not_encode),
    };
    return CT_RUN(tests);
}
