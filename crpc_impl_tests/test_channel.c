#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_net.h"

/* --- results, in every form ------------------------------------------------------------------- */

typedef struct done_log {
    pthread_mutex_t lock;
    int count;
    int status;
    int64_t n;
    int app_code;
    crpc_error error;
    char *bytes;
    size_t size;
    pthread_t thread;
} done_log;

static void done_init(done_log *d)
{
    memset(d, 0, sizeof *d);
    pthread_mutex_init(&d->lock, NULL);
}

static int done_count(done_log *d)
{
    int n;
    pthread_mutex_lock(&d->lock);
    n = d->count;
    pthread_mutex_unlock(&d->lock);
    return n;
}

static void on_num(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    done_log *d = (done_log *)user;
    pthread_mutex_lock(&d->lock);
    d->count++;
    d->status = status;
    d->n = response ? response->n : -1;
    d->error = call->error;
    d->thread = pthread_self();
    pthread_mutex_unlock(&d->lock);
}

static void on_blob(void *user, int status, const dyn_Blob *response, crpc_call *call)
{
    done_log *d = (done_log *)user;
    pthread_mutex_lock(&d->lock);
    d->count++;
    d->status = status;
    d->error = call->error;
    if (!status) {
        d->size = crpc_view_size(response->data) + crpc_view_size(call->reply_attachment);
        d->bytes = (char *)malloc(d->size + 1);
        crpc_view_copy(response->data, d->bytes, d->size + 1);
        memcpy(d->bytes + crpc_view_size(response->data), crpc_view_data(call->reply_attachment),
               crpc_view_size(call->reply_attachment));
    }
    pthread_mutex_unlock(&d->lock);
}

static void it_calls_in_all_forms(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        done_log d;
        crpc_id id;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        strcpy(in.tag, "hello");
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 42);
        assert_string_equal(out.tag, "hello");
        assert_int_equal(call.error.code, CRPC_OK);
        assert_int_equal(call.error.attempts, 1);
        assert_int_equal(call.error.sent, CRPC_SENT_YES);
        assert_string_equal(call.error.text, "");
        assert_string_equal(call.error.endpoint, n.url + 6);
        assert_true(call.latency_us > 0);
        crpc_call_reset(&call);
        out.n = 0;
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 42);

        done_init(&d);
        assert_int_equal(dyn_Echo_Add_async(n.channel, &in, on_num, &d, NULL), CRPC_OK);
        assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_OK);
        assert_int_equal(d.n, 42);
        assert_string_equal(d.error.endpoint, n.url + 6);
        assert_false(pthread_equal(d.thread, pthread_self()));

        out.n = 0;
        assert_int_equal(dyn_Echo_Add_begin(n.channel, &in, &id, NULL), CRPC_OK);
        assert_true(id.value != 0);
        assert_int_equal(crpc_channel_wait(n.channel, id, -1), CRPC_OK);
        assert_int_equal(crpc_channel_poll(n.channel, id), CRPC_OK);
        assert_int_equal(crpc_channel_fetch(n.channel, &dyn_Echo.methods[1], id, &out, NULL),
                         CRPC_EINVAL); /* of another method: the struct may not fit */
        assert_int_equal(dyn_Echo_Add_fetch(n.channel, id, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 42);
        assert_int_equal(crpc_channel_poll(n.channel, id), CRPC_ENOTFOUND);
        assert_int_equal(dyn_Echo_Add_fetch(n.channel, id, &out, NULL), CRPC_ENOTFOUND);
        assert_int_equal(crpc_channel_cancel(n.channel, id), CRPC_ENOTFOUND);

        assert_int_equal(net_calls(&n.service), 4);
        assert_int_equal(dyn_Echo_Add_notify(n.channel, &in, NULL), CRPC_OK);
        assert_true(CT_WAIT(net_calls(&n.service) == 5, NET_PATIENCE));
        assert_int_equal(done_count(&d), 1);
        net_close(&n);
    }
}

/* The callback may come before the call has returned, but never on the caller's stack. */
static int reentered, inside_async;

static void on_never_nested(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    (void)status, (void)response, (void)call;
    if (inside_async && pthread_equal(*(pthread_t *)user, pthread_self()))
        reentered++;
}

static void completions_never_run_on_the_callers_stack(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        crpc_channel *ch = net_channel("unix:///nonexistent/socket", NULL, p, l, NULL);
        pthread_t self = pthread_self();
        dyn_Num in = net_num(1);
        int i;
        reentered = 0;
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        for (i = 0; i < 10; i++) {
            inside_async = 1;
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_never_nested, &self, NULL), CRPC_OK);
            inside_async = 0;
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        }
        assert_int_equal(reentered, 0);
        crpc_channel_close(ch);
        crpc_loop_close(l);
    }
}

static crpc_view view_at(const char *bytes, size_t size)
{
    return crpc_view_of(bytes, size);
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
                items[1] = view_at(a, sizes[i] % 3000);
                items[2] = crpc_view_str("last");
                in.name = crpc_view_str("name");
                in.data = view_at(a, sizes[i]);
                in.items = crpc_views_of(items, 3);
                call.attachment = view_at(b, sizes[k]);
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

static void views_and_attachments_in_asynchronous_forms(void **state)
{
    static const size_t sizes[] = {10, 5000, 1 << 20};
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        size_t i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            size_t size = sizes[i];
            char *a = net_bytes(size), *b = net_bytes(size + 7);
            dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            done_log d;
            crpc_id id;
            done_init(&d);
            in.data = view_at(a, size);
            call.attachment = view_at(b, size + 7);
            assert_int_equal(dyn_Echo_Pass_begin(n.channel, &in, &id, &call), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_async(n.channel, &in, on_blob, &d, &call), CRPC_OK);
            memset(a, 0, size); /* what was put in is the caller's again */
            memset(b, 0, size + 7);
            free(a);
            free(b);
            a = net_bytes(size);
            b = net_bytes(size + 7);
            assert_int_equal(crpc_channel_wait(n.channel, id, NET_PATIENCE), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, id, &out, NULL), CRPC_EINVAL);
            assert_int_equal(crpc_channel_poll(n.channel, id), CRPC_OK);
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, id, &out, &call), CRPC_OK);
            assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
            assert_int_equal(d.status, CRPC_OK);
            assert_int_equal(d.size, 2 * size + 7);
            assert_memory_equal(d.bytes, a, size);
            assert_memory_equal(d.bytes + size, b, size + 7);
            assert_int_equal(crpc_view_size(out.data), size);
            assert_memory_equal(crpc_view_data(out.data), a, size);
            assert_int_equal(crpc_view_size(call.reply_attachment), size + 7);
            assert_memory_equal(crpc_view_data(call.reply_attachment), b, size + 7);
            crpc_call_reset(&call);
            free(d.bytes);
            free(a);
            free(b);
        }
        net_close(&n);
    }
}

static void a_response_with_views_needs_a_call(void **state)
{
    net n;
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, NULL), CRPC_EINVAL);
    assert_int_equal(net_calls(&n.service), 0);
    net_close(&n);
}

/* The reply's bytes outlive the channel and its loop. */
static void a_call_keeps_its_reply_after_the_channel(void **state)
{
    net n;
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(&n, 0, sizeof n);
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    in.data = crpc_view_str("kept");
    call.attachment = crpc_view_str("behind");
    assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_OK);
    net_close(&n);
    assert_true(crpc_view_equal(out.data, "kept"));
    assert_true(crpc_view_equal(call.reply_attachment, "behind"));
    crpc_call_reset(&call);
}

/* --- deadlines -------------------------------------------------------------------------------- */

/* Calls, synchronously and by callback, against something that does not answer: the code, that the
 * deadline was neither early nor forgotten, and what was sent. */
static void check_deadline(const char *url, crpc_poller p, int ms, int code, int sent,
                           size_t attachment, const char *query)
{
    crpc_channel *ch = net_channel(url, query, p, NULL, NULL);
    char *bytes = net_bytes(attachment);
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    done_log d;
    int64_t start = ct_now_ms(), took;
    call.timeout_ms = ms;
    call.attachment = view_at(bytes, attachment);
    assert_int_equal(dyn_Echo_Pass(ch, &in, &out, &call), code);
    took = ct_now_ms() - start;
    assert_int_equal(call.error.code, code);
    assert_int_equal(call.error.sent, sent);
    assert_false(call.error.remote);
    if (code == CRPC_ETIMEDOUT)
        assert_true(took >= ms - 1);
    assert_true(took < ms + 5000);
    memset(bytes, 'x', attachment); /* nobody may still read it: ASan would see the free below */
    free(bytes);
    crpc_call_reset(&call);
    crpc_channel_close(ch);

    ch = net_channel(url, query, p, NULL, NULL);
    bytes = net_bytes(attachment);
    memset(&call, 0, sizeof call);
    call.timeout_ms = ms;
    call.attachment = view_at(bytes, attachment);
    done_init(&d);
    start = ct_now_ms();
    assert_int_equal(dyn_Echo_Pass_async(ch, &in, on_blob, &d, &call), CRPC_OK);
    free(bytes);
    assert_true(CT_WAIT(done_count(&d), NET_PATIENCE));
    took = ct_now_ms() - start;
    assert_int_equal(d.status, code);
    if (code == CRPC_ETIMEDOUT)
        assert_true(took >= ms - 1);
    assert_true(took < ms + 5000);
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
}

/* Sends half a reply and closes. */
static bool peer_cuts_reply(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)number;
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, 5);
    wire_send(fd, w.p, w.n / 2);
    wire_free(&w);
    wire_done(&m);
    return true;
}

/* Sends half a reply and waits. */
static bool peer_stalls_reply(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, 5);
    wire_send(fd, w.p, w.n / 2);
    wire_free(&w);
    wire_done(&m);
    return peer_silent(p, fd, number);
}

static void the_deadline_is_total_and_kept(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent, deaf, cuts, stalls;
        char url[64];
        struct sockaddr_in a;
        int listen_fd, fillers[8], i;
        socklen_t size = sizeof a;
        peer_open(&silent, peer_silent, NULL);
        peer_open(&deaf, peer_deaf, NULL);
        peer_open(&cuts, peer_cuts_reply, NULL);
        peer_open(&stalls, peer_stalls_reply, NULL);
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ct_free_port());
        check_deadline(url, p, 300, CRPC_ECONN, CRPC_SENT_NO, 0, NULL); /* nothing listens */
        check_deadline(silent.url, p, 60, CRPC_ETIMEDOUT, CRPC_SENT_YES, 0, NULL);
        check_deadline(stalls.url, p, 60, CRPC_ETIMEDOUT, CRPC_SENT_YES, 0, NULL);
        check_deadline(cuts.url, p, 3000, CRPC_ECONN, CRPC_SENT_YES, 0, NULL);
        /* partly sent, with the caller's own bytes behind it */
        check_deadline(deaf.url, p, 100, CRPC_ETIMEDOUT, CRPC_SENT_MAYBE, 12 << 20, NULL);

        /* a listener whose queue is full drops the SYN */
        listen_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        assert_int_equal(bind(listen_fd, (struct sockaddr *)&a, sizeof a), 0);
        assert_int_equal(listen(listen_fd, 0), 0);
        assert_int_equal(getsockname(listen_fd, (struct sockaddr *)&a, &size), 0);
        for (i = 0; i < 8; i++) {
            fillers[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            connect(fillers[i], (struct sockaddr *)&a, sizeof a);
        }
        ct_sleep_ms(20);
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ntohs(a.sin_port));
        check_deadline(url, p, 80, CRPC_ETIMEDOUT, CRPC_SENT_NO, 0, NULL);
        check_deadline(url, p, 3000, CRPC_ECONN, CRPC_SENT_NO, 0, "?connect_timeout_ms=50");
        for (i = 0; i < 8; i++)
            close(fillers[i]);
        close(listen_fd);
        peer_close(&silent);
        peer_close(&deaf);
        peer_close(&cuts);
        peer_close(&stalls);
    }
}

/* Reads nothing until user is set, then goes on as a good peer would; the first request's
 * attachment must have come whole. */
static bool peer_late_reader(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    if (!CT_WAIT(__atomic_load_n((int *)p->user, __ATOMIC_SEQ_CST), NET_PATIENCE))
        return true;
    if (peer_receive(p, fd, &m) == 1) {
        size_t size = (size_t)m.attachment_size, i, wrong = 0;
        char *bytes = net_bytes(size);
        for (i = 0; i < size; i++)
            wrong += m.body[m.body_size - size + i] != (unsigned char)bytes[i];
        __atomic_store_n((int *)p->user, wrong ? -1 : 2, __ATOMIC_SEQ_CST);
        free(bytes);
        wire_done(&m);
    }
    return peer_adds(p, fd, number);
}

/* What was partly sent when the deadline passed is sent to its end, for the sake of what follows on
 * the connection; but not out of the caller's memory. */
static void a_request_cut_by_its_deadline_goes_out_whole(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        const size_t size = 12 << 20;
        int go = 0;
        peer late;
        crpc_channel *ch;
        char *bytes = net_bytes(size);
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        peer_open(&late, peer_late_reader, &go);
        ch = net_channel(late.url, "?timeout_ms=20000", p, NULL, NULL);
        call.timeout_ms = 60;
        call.attachment = view_at(bytes, size);
        assert_int_equal(dyn_Echo_Pass(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        assert_int_equal(call.error.sent, CRPC_SENT_MAYBE);
        memset(bytes, 0, size);
        free(bytes);
        __atomic_store_n(&go, 1, __ATOMIC_SEQ_CST);
        net_check_add(ch, 1);
        assert_int_equal(__atomic_load_n(&go, __ATOMIC_SEQ_CST), 2);
        assert_int_equal(peer_accepted(&late), 1);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&late);
    }
}

/* Attempts and waiting for connections are part of the time. */
static void retries_do_not_outlast_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        char list[2000] = "list://", one[64];
        int fds[4], fillers[4][4], i, k;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int64_t start;
        for (i = 0; i < 4; i++) { /* four listeners that drop the SYN */
            struct sockaddr_in a;
            socklen_t size = sizeof a;
            fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            memset(&a, 0, sizeof a);
            a.sin_family = AF_INET;
            a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
            assert_int_equal(bind(fds[i], (struct sockaddr *)&a, sizeof a), 0);
            assert_int_equal(listen(fds[i], 0), 0);
            assert_int_equal(getsockname(fds[i], (struct sockaddr *)&a, &size), 0);
            for (k = 0; k < 4; k++) {
                fillers[i][k] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
                connect(fillers[i][k], (struct sockaddr *)&a, sizeof a);
            }
            snprintf(one, sizeof one, "%s127.0.0.1:%d", i ? "," : "", ntohs(a.sin_port));
            strcat(list, one);
        }
        ct_sleep_ms(20);
        ch = net_channel(list, "?connect_timeout_ms=60&retries=10", p, NULL, NULL);
        call.timeout_ms = 150; /* the third attempt is not over */
        start = ct_now_ms();
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        assert_true(ct_now_ms() - start >= 149);
        assert_true(ct_now_ms() - start < 10000);
        assert_in_range(call.error.attempts, 1, 3);
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        crpc_channel_close(ch);
        ch = net_channel(list, "?connect_timeout_ms=60&retries=10&timeout_ms=20000", p, NULL, NULL);
        call.timeout_ms = 0; /* each is tried once, and that is all */
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        assert_int_equal(call.error.attempts, 4);
        assert_non_null(strstr(call.error.text, "attempt 4/11"));
        assert_non_null(strstr(call.error.text, "(connect_timeout_ms) (local)"));
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        for (i = 0; i < 4; i++) {
            for (k = 0; k < 4; k++)
                close(fillers[i][k]);
            close(fds[i]);
        }
    }
}

static void many_deadlines_at_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        crpc_channel *ch;
        done_log d;
        dyn_Num in = net_num(1);
        crpc_loop_stats stats;
        int i;
        peer_open(&silent, peer_silent, NULL);
        ch = net_channel(silent.url, NULL, p, NULL, NULL);
        done_init(&d);
        for (i = 0; i < 500; i++) {
            crpc_call call = CRPC_INIT;
            call.timeout_ms = 1 + i % 50;
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, &call), CRPC_OK);
        }
        assert_true(CT_WAIT(done_count(&d) == 500, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_ETIMEDOUT);
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.pending, 0);
        assert_int_equal(stats.calls, 500);
        crpc_channel_close(ch);
        peer_close(&silent);
    }
}

static void which_deadline_applies(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_channel *ch;
    (void)state;
    memset(&n, 0, sizeof n);
    n.channel_options.timeout_ms = 30000;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    /* as the server sees it, rounded down a little */
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, NULL), CRPC_OK);
    assert_in_range(out.ms, 20000, 30000);
    call.timeout_ms = 12000;
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_in_range(out.ms, 5000, 12000);
    call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) + 50000000;
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_in_range(out.ms, 40000, 50000);
    call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) + INT64_C(900000000000);
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_in_range(out.ms, 86000000, 86400000); /* never more than a day */
    crpc_call_reset(&call);
    /* the method's own: 60 ms */
    in.ms = 1000;
    assert_int_equal(dyn_Echo_Quick(n.channel, &in, &out, NULL), CRPC_ETIMEDOUT);
    ch = net_channel(n.url, "?timeout_ms=7000", CRPC_POLLER_DEFAULT, NULL, NULL);
    in.ms = 0;
    assert_int_equal(dyn_Echo_Meta(ch, &in, &out, NULL), CRPC_OK);
    assert_in_range(out.ms, 1000, 7000);
    crpc_channel_close(ch);
    ch = net_channel(n.url, NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Meta(ch, &in, &out, NULL), CRPC_OK);
    assert_in_range(out.ms, 1, 1000);
    crpc_channel_close(ch);
    net_close(&n);
}

/* A call whose time is up before it begins is not sent at all. */
static void a_passed_deadline_sends_nothing(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        done_log d;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        net_check_add(n.channel, 1); /* connected */
        call.deadline_us = crpc_loop_now_us(crpc_channel_loop(n.channel)) - 1000;
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, &call), CRPC_ETIMEDOUT);
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        done_init(&d);
        assert_int_equal(dyn_Echo_Add_async(n.channel, &in, on_num, &d, &call), CRPC_OK);
        assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_ETIMEDOUT);
        assert_int_equal(d.error.sent, CRPC_SENT_NO);
        net_check_add(n.channel, 2);
        assert_int_equal(net_calls(&n.service), 2);
        crpc_call_reset(&call);
        net_close(&n);
    }
}

/* --- replies that are late, doubled, forged or odd -------------------------------------------- */

/* n of the request says what comes: 1 nothing but kept, 2 answers the kept one late and then this,
 * 3 twice, 4 forged ids before the right one. */
static bool peer_forges(peer *p, int fd, int number)
{
    wire_message m;
    int64_t kept = 0;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        int64_t i;
        if (m.n == 1)
            kept = m.id;
        if (m.n == 2)
            wire_reply(&w, kept, 666);
        if (m.n == 4) {
            for (i = -3; i < 4; i++) {
                if (i)
                    wire_reply(&w, m.id + i, 666);
                wire_reply(&w, m.id ^ (INT64_C(1) << (32 + i + 4)), 666);
            }
            wire_reply(&w, INT64_MIN, 666);
        }
        if (m.n != 1)
            wire_reply(&w, m.id, m.n);
        if (m.n == 3)
            wire_reply(&w, m.id, 666);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static uint64_t late_replies(crpc_channel *ch)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
    return stats.late_replies;
}

static void late_and_forged_replies_complete_nothing(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer f;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int i;
        peer_open(&f, peer_forges, NULL);
        ch = net_channel(f.url, "?timeout_ms=20000", p, NULL, NULL);
        call.timeout_ms = 30;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        call.timeout_ms = 0;
        in.n = 2;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
        assert_int_equal(out.n, 2);
        assert_int_equal(late_replies(ch), 1);
        for (i = 0; i < 20; i++) {
            in.n = 3;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
            assert_int_equal(out.n, 3);
            in.n = 4;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
            assert_int_equal(out.n, 4);
        }
        assert_int_equal(late_replies(ch), 1 + 20 * (1 + 14));
        assert_int_equal(peer_accepted(&f), 1);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&f);
    }
}

/* A reply on one connection does not complete a call that waits on another. */
static bool peer_steals(peer *p, int fd, int number)
{
    peer *other = (peer *)p->user;
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        int other_fd = -1;
        pthread_mutex_lock(&other->lock);
        other_fd = other->fds[0];
        wire_reply(&w, m.id, 666);
        if (other_fd >= 0)
            wire_send(other_fd, w.p, w.n);
        pthread_mutex_unlock(&other->lock);
        wire_free(&w);
        ct_sleep_ms(20);
        wire_reply(&w, m.id, 7);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void a_reply_counts_only_on_its_own_connection(void **state)
{
    peer adds, steals;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *a, *b;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    peer_open(&steals, peer_steals, &adds);
    a = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    b = net_channel(steals.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(dyn_Echo_Add(a, &in, &out, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(b, &in, &out, NULL), CRPC_OK);
    assert_int_equal(out.n, 7);
    assert_int_equal(late_replies(a), 1);
    crpc_channel_close(a);
    crpc_channel_close(b);
    crpc_loop_close(l);
    peer_close(&adds);
    peer_close(&steals);
}

/* Replies as other implementations send them; n of the request chooses. */
static bool peer_odd(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0}, meta = {NULL, 0, 0}, body = {NULL, 0, 0}, sub = {NULL, 0, 0};
        wire_int(&body, 1, 77);
        switch (m.n) {
        case 1: /* no response at all */
            wire_int(&meta, 4, m.id);
            break;
        case 2: /* an empty one, and the request echoed */
            wire_str(&sub, 1, "dyn.Echo");
            wire_str(&sub, 2, "Add");
            wire_bytes(&meta, 1, sub.p, sub.n);
            wire_bytes(&meta, 2, "", 0);
            wire_int(&meta, 4, m.id);
            break;
        case 3: /* fields nobody knows, of every wire type, and zeros */
            wire_int(&sub, 1, 0);
            wire_str(&sub, 2, "");
            wire_str(&sub, 1000, "later");
            wire_str(&meta, 100, "sofa");
            wire_varint(&meta, 101 << 3 | 1);
            wire_put(&meta, "12345678", 8);
            wire_varint(&meta, 102 << 3 | 5);
            wire_put(&meta, "1234", 4);
            wire_bytes(&meta, 2, sub.p, sub.n);
            wire_int(&meta, 3, 0);
            wire_int(&meta, 5, 0);
            wire_int(&meta, 4, m.id);
            break;
        case 4: /* an attachment larger than the body */
            wire_int(&meta, 4, m.id);
            wire_int(&meta, 5, 1000);
            break;
        case 5:
            wire_int(&meta, 4, m.id);
            wire_int(&meta, 5, -1);
            break;
        case 6: /* compressed */
            wire_int(&meta, 3, 2);
            wire_int(&meta, 4, m.id);
            break;
        case 7: /* the body does not decode */
            wire_int(&meta, 4, m.id);
            body.n = 0;
            wire_put(&body, "\x0a\xff", 2);
            break;
        case 8: /* without its id: nobody's */
            break;
        case 9:
            wire_int(&meta, 4, -1);
            break;
        default: /* all of the body is attachment */
            wire_int(&meta, 4, m.id);
            wire_int(&meta, 5, (int64_t)body.n);
            break;
        }
        wire_frame(&w, &meta, body.p, body.n);
        wire_free(&meta);
        wire_free(&body);
        wire_free(&sub);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void odd_replies(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer odd;
        crpc_channel *ch;
        int i;
        peer_open(&odd, peer_odd, NULL);
        ch = net_channel(odd.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 1; i <= 10; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            int status;
            if (i == 8 || i == 9)
                call.timeout_ms = 40;
            status = dyn_Echo_Add(ch, &in, &out, &call);
            if (i <= 3) {
                assert_int_equal(status, CRPC_OK);
                assert_int_equal(out.n, 77);
            } else if (i <= 7) {
                assert_int_equal(status, CRPC_ERESPONSE);
                assert_non_null(strstr(call.error.text, i <= 5   ? "attachment_size"
                                                        : i == 6 ? "compressed"
                                                                 : "reply: "));
                assert_int_equal(call.error.sent, CRPC_SENT_YES);
                assert_false(call.error.remote);
            } else if (i <= 9) {
                assert_int_equal(status, CRPC_ETIMEDOUT);
            } else {
                assert_int_equal(status, CRPC_OK);
                assert_int_equal(out.n, 0);
                assert_int_equal(crpc_view_size(call.reply_attachment), 2);
                assert_memory_equal(crpc_view_data(call.reply_attachment), "\x08\x4d", 2);
            }
            crpc_call_reset(&call);
        }
        assert_int_equal(late_replies(ch), 1); /* that of -1; 0 may be a one-way call's */
        assert_int_equal(peer_accepted(&odd), 1);
        crpc_channel_close(ch);
        peer_close(&odd);
    }
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
    ch = net_channel(keeps.url, "?timeout_ms=20000&short_names=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_OK);
    assert_string_equal(m.service, "Echo");
    crpc_channel_close(ch);
    crpc_call_reset(&call);
    peer_close(&keeps);
}

/* --- errors ----------------------------------------------------------------------------------- */

typedef struct error_case {
    int64_t code;
    int mark;
    const char *text;
    int status, app_code;
    const char *says;
} error_case;

static const error_case error_cases[] = {
    {1002, 0, "no method", CRPC_ENOMETHOD, 0, "ENOMETHOD 1002: no method (remote)"},
    {1002, 1, "own", CRPC_EAPP, 1002, "application error 1002: own (remote)"},
    {2004, 0, NULL, CRPC_ELIMIT, 0, "ELIMIT 2004: concurrency limit reached (remote)"},
    {1004, 0, "who?", CRPC_EAUTH, 0, "EAUTH 1004: who? (remote)"},
    {20001, 0, "range", CRPC_EAPP, 20001, "application error 20001: range (remote)"},
    {20001, 1, "mark", CRPC_EAPP, 20001, "application error 20001: mark (remote)"},
    {500, 0, NULL, CRPC_EAPP, 500,
     "application error 500: the service answered with an error of its own: see app_code (remote)"},
    {-1, 0, "minus", CRPC_EAPP, -1, "application error -1: minus (remote)"},
    {110, 0, "errno", 110, 0, "E? 110: errno (remote)"},
    {1999, 0, "unknown", 1999, 0, "E? 1999: unknown (remote)"},
    {2003, 0, "bye", CRPC_ELOGOFF, 0, "ELOGOFF 2003: bye (remote)"},
};

static bool peer_errs(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        const error_case *c = &error_cases[m.n];
        wire w = {NULL, 0, 0};
        wire_error(&w, m.id, c->code, c->text, c->mark);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

static void remote_errors_are_mapped_and_explained(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer errs;
        crpc_channel *ch;
        size_t i;
        peer_open(&errs, peer_errs, NULL);
        ch = net_channel(errs.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < sizeof error_cases / sizeof *error_cases; i++) {
            const error_case *c = &error_cases[i];
            dyn_Num in = net_num((int64_t)i), out = net_num(99);
            crpc_call call = CRPC_INIT;
            char golden[1400];
            done_log d;
            crpc_id id;
            snprintf(golden, sizeof golden, "dyn.Echo.Add attempt 1/3 %s: %s", errs.url + 6,
                     c->says);
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), c->status);
            assert_string_equal(call.error.text, golden);
            assert_int_equal(call.error.code, c->status);
            assert_int_equal(call.error.app_code, c->app_code);
            assert_true(call.error.remote);
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_int_equal(call.error.attempts, 1);
            assert_int_equal(out.n, 99); /* its body is not looked at */
            crpc_call_reset(&call);

            done_init(&d);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
            assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
            assert_int_equal(d.status, c->status);
            assert_string_equal(d.error.text, golden);
            assert_int_equal(d.error.app_code, c->app_code);

            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
            assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), c->status);
            assert_string_equal(call.error.text, golden);
            crpc_call_reset(&call);
        }
        crpc_channel_close(ch);
        peer_close(&errs);
    }
}

static void local_errors_are_explained(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent, hangs;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        dyn_Blob bin = dyn_Blob_init_zero, bout = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        char url[64], golden[1400];
        char *bytes = net_bytes(5000);
        peer_open(&silent, peer_silent, NULL);
        peer_open(&hangs, peer_hangs_up, NULL);

        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", ct_free_port());
        ch = net_channel(url, NULL, p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        snprintf(golden, sizeof golden,
                 "dyn.Echo.Add attempt 1/3 %s: connecting: connection refused (local)", url + 6);
        assert_string_equal(call.error.text, golden);
        assert_string_equal(call.error.endpoint, url + 6);
        crpc_channel_close(ch);

        ch = net_channel("unix:///nonexistent/x", NULL, p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        assert_string_equal(call.error.text, "dyn.Echo.Add attempt 1/3 unix:/nonexistent/x: "
                                             "connecting: no such socket file (local)");
        crpc_channel_close(ch);

        ch = net_channel(silent.url, "?timeout_ms=30&retries=5", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        snprintf(golden, sizeof golden, "dyn.Echo.Add attempt 1/6 %s: deadline exceeded (local)",
                 silent.url + 6);
        assert_string_equal(call.error.text, golden);
        crpc_channel_close(ch);

        ch = net_channel(hangs.url, "?timeout_ms=20000&retries=0", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
        snprintf(golden, sizeof golden,
                 "dyn.Echo.Add attempt 1/3 %s: connection lost: closed by the peer (local)",
                 hangs.url + 6);
        assert_string_equal(call.error.text, golden);
        crpc_channel_close(ch);

        ch = net_channel(silent.url, "?max_queued=4500", p, NULL, NULL);
        call.attachment = view_at(bytes, 5000);
        assert_int_equal(dyn_Echo_Pass(ch, &bin, &bout, &call), CRPC_EOVERCROWDED);
        assert_non_null(strstr(call.error.text, "the request is too large: 0 bytes are queued, max_queued is 4500"));
        assert_int_equal(call.error.sent, CRPC_SENT_NO);
        crpc_channel_close(ch);
        free(bytes);
        crpc_call_reset(&call);
        peer_close(&silent);
        peer_close(&hangs);
    }
}

/* However long the names are, the text is cut and terminated. */
static void long_error_texts_are_cut(void **state)
{
    static char service[400], text[2000];
    crpc_method m = dyn_Echo.methods[0];
    crpc_channel *ch = net_channel("unix:///nonexistent/x", NULL, CRPC_POLLER_DEFAULT, NULL, NULL);
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    memset(service, 's', sizeof service - 1);
    memset(text, 't', sizeof text - 1);
    m.service = service;
    assert_int_equal(crpc_channel_call(ch, &m, &in, &out, &call), CRPC_ECONN);
    assert_int_equal(strlen(call.error.text), CRPC_ERROR_TEXT_MAX - 1);
    crpc_call_reset(&call);
    crpc_channel_close(ch);
}

/* --- retries ---------------------------------------------------------------------------------- */

static bool peer_says_logoff(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        wire_error(&w, m.id, CRPC_ELOGOFF, "bye", 0);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

/* Calls until the round robin has begun at each provider; how often it succeeded, of `calls`. */
static int succeed(const char *list, crpc_poller p, bool idempotent, int calls, int *code,
                   crpc_error *error)
{
    crpc_channel *ch = net_channel(list, "?timeout_ms=20000", p, NULL, NULL);
    int i, good = 0;
    *code = CRPC_OK;
    for (i = 0; i < calls; i++) {
        dyn_Num in = net_num(i), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int status =
            idempotent ? dyn_Echo_Get(ch, &in, &out, &call) : dyn_Echo_Add(ch, &in, &out, &call);
        if (status) {
            *code = status;
            *error = call.error;
        } else {
            good += out.n == i + 1;
            if (call.error.attempts > 1)
                error->attempts = call.error.attempts;
        }
        crpc_call_reset(&call);
    }
    crpc_channel_close(ch);
    return good;
}

static void another_provider_is_tried_only_when_that_is_safe(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer good, logoff, hangs, silent;
        char list[128];
        int code, got;
        crpc_error error;
        peer_open(&good, peer_adds, NULL);
        peer_open(&logoff, peer_says_logoff, NULL);
        peer_open(&hangs, peer_hangs_up, NULL);
        peer_open(&silent, peer_silent, NULL);

        memset(&error, 0, sizeof error); /* not sent */
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", ct_free_port(), good.port);
        assert_int_equal(succeed(list, p, false, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);

        memset(&error, 0, sizeof error); /* sent, and said to be not executed */
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", logoff.port, good.port);
        assert_int_equal(succeed(list, p, false, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);
        assert_true(peer_requests(&logoff) >= 1);

        memset(&error, 0, sizeof error); /* everyone says so: it is the peer's word */
        snprintf(list, sizeof list, "list://127.0.0.1:%d,localhost:%d", logoff.port, logoff.port);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.2:%d", logoff.port, logoff.port);
        assert_int_equal(succeed(list, p, false, 1, &code, &error), 0);

        memset(&error, 0, sizeof error); /* lost after it was sent: only if it may run twice */
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", hangs.port, good.port);
        got = succeed(list, p, false, 4, &code, &error);
        assert_in_range(got, 1, 3);
        assert_int_equal(code, CRPC_ECONN);
        assert_int_equal(error.sent, CRPC_SENT_YES);
        assert_int_equal(error.attempts, 1);
        memset(&error, 0, sizeof error);
        assert_int_equal(succeed(list, p, true, 4, &code, &error), 4);
        assert_int_equal(error.attempts, 2);

        /* nor is one tried again that did not answer */
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", silent.port, good.port);
        {
            crpc_channel *ch = net_channel(list, "?timeout_ms=60", p, NULL, NULL);
            int i, late = 0, before = peer_requests(&good);
            for (i = 0; i < 4; i++) {
                dyn_Num in = net_num(i), out = dyn_Num_init_zero;
                late += dyn_Echo_Add(ch, &in, &out, NULL) == CRPC_ETIMEDOUT;
            }
            assert_int_equal(late, 2);
            assert_int_equal(peer_requests(&silent), 2);
            assert_int_equal(peer_requests(&good) - before, 2);
            crpc_channel_close(ch);
        }
        peer_close(&good);
        peer_close(&logoff);
        peer_close(&hangs);
        peer_close(&silent);
    }
}

static void when_all_say_logoff_the_error_is_theirs(void **state)
{
    peer one, two;
    crpc_channel *ch;
    char list[128];
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    peer_open(&one, peer_says_logoff, NULL);
    peer_open(&two, peer_says_logoff, NULL);
    snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", one.port, two.port);
    ch = net_channel(list, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ELOGOFF);
    assert_int_equal(call.error.attempts, 2);
    assert_int_equal(call.error.sent, CRPC_SENT_YES);
    assert_true(call.error.remote);
    assert_non_null(strstr(call.error.text, "(remote)"));
    crpc_call_reset(&call);
    crpc_channel_close(ch);
    peer_close(&one);
    peer_close(&two);
}

/* A peer that keeps its connection while it stops: who waits for a slot there moves on too. */
static void logoff_frees_the_slot(void **state)
{
    peer going, good;
    crpc_channel *ch;
    char list[128];
    crpc_id ids[8];
    int i;
    (void)state;
    peer_open(&going, peer_says_logoff, NULL);
    peer_open(&good, peer_adds, NULL);
    snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", going.port, good.port);
    ch = net_channel(list, "?timeout_ms=600000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 8; i++) {
        dyn_Num in = net_num(i);
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    }
    for (i = 0; i < 8; i++) { /* long before the deadline */
        dyn_Num out = dyn_Num_init_zero;
        assert_int_equal(crpc_channel_wait(ch, ids[i], NET_PATIENCE), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, ids[i], &out, NULL), CRPC_OK);
        assert_int_equal(out.n, i + 1);
    }
    crpc_channel_close(ch);
    peer_close(&going);
    peer_close(&good);
}

/* The peer is still at work on a call that was cancelled: with one slot nothing is put on top. */
static void cancelling_does_not_free_the_peer(void **state)
{
    peer silent;
    crpc_channel *ch;
    crpc_id first, second;
    dyn_Num in = net_num(1);
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=600000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &first, NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 1, NET_PATIENCE));
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &second, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(ch, first), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 2, NET_PATIENCE));
    assert_int_equal(peer_accepted(&silent), 2); /* on a connection of its own */
    crpc_channel_close(ch);
    peer_close(&silent);
}

/* Part of a request is on its way when the channel is closed: it may have been executed. */
static void closing_tells_what_was_sent(void **state)
{
    peer deaf;
    done_log d;
    crpc_channel *ch;
    crpc_loop_stats stats;
    char *bytes = net_bytes(12 << 20);
    dyn_Blob in = dyn_Blob_init_zero;
    (void)state;
    done_init(&d);
    peer_open(&deaf, peer_deaf, NULL);
    ch = net_channel(deaf.url, "?timeout_ms=600000", CRPC_POLLER_DEFAULT, NULL, NULL);
    in.data = view_at(bytes, 12 << 20);
    assert_int_equal(dyn_Echo_Pass_async(ch, &in, on_blob, &d, NULL), CRPC_OK);
    do {
        ct_sleep_ms(1);
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
    } while (stats.sends < 2); /* the first has ended */
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
    assert_int_equal(d.status, CRPC_ECANCELED);
    assert_int_equal(d.error.sent, CRPC_SENT_MAYBE);
    free(bytes);
    peer_close(&deaf);
}

/* A stop from before anybody ran the loop does not keep its thread from completing calls. */
static void an_early_stop_loses_no_call(void **state)
{
    peer adds;
    done_log d;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *ch;
    dyn_Num in = net_num(1);
    (void)state;
    done_init(&d);
    peer_open(&adds, peer_adds, NULL);
    ch = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    crpc_loop_stop(l);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
    assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
    assert_int_equal(d.status, CRPC_OK);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&adds);
}

/* Takes each request, counts it, and loses the connection. */
static void a_lost_reply_is_executed_once(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer a, b;
        char list[128];
        crpc_channel *ch;
        int i;
        peer_open(&a, peer_hangs_up, NULL);
        peer_open(&b, peer_hangs_up, NULL);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", a.port, b.port);
        ch = net_channel(list, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 10; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_int_equal(peer_requests(&a) + peer_requests(&b), i + 1);
            crpc_call_reset(&call);
        }
        crpc_channel_close(ch);
        peer_close(&a);
        peer_close(&b);
    }
}

static void providers_take_turns(void **state)
{
    peer p[3];
    char list[200];
    crpc_channel *ch;
    int i;
    (void)state;
    for (i = 0; i < 3; i++)
        peer_open(&p[i], peer_adds, NULL);
    snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d", p[0].port,
             p[1].port, p[2].port);
    ch = net_channel(list, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(crpc_channel_providers(ch), 3);
    for (i = 0; i < 30; i++)
        net_check_add(ch, i);
    for (i = 0; i < 3; i++)
        assert_int_equal(peer_requests(&p[i]), 10);
    peer_close(&p[1]); /* failover: no call fails */
    for (i = 0; i < 30; i++) {
        ct_sleep_ms(i == 0 ? 30 : 0); /* its end has come through */
        net_check_add(ch, i);
    }
    crpc_channel_close(ch);
    peer_close(&p[0]);
    peer_close(&p[2]);
}

/* --- queues ----------------------------------------------------------------------------------- */

/* One thread's loop, so that nothing is sent between the calls. */
static void the_send_queue_has_a_limit(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer deaf;
        crpc_channel *ch;
        crpc_loop *l = net_loop(p);
        char *bytes = net_bytes(100000);
        dyn_Blob in = dyn_Blob_init_zero;
        crpc_loop_stats stats;
        done_log d;
        uint64_t memory = 0;
        int i, code, accepted = 0;
        peer_open(&deaf, peer_deaf, NULL);
        ch = net_channel(deaf.url, "?timeout_ms=60000&max_queued=1000000&retries=0", p, l, NULL);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        done_init(&d);
        in.data = view_at(bytes, 100000);
        for (i = 0; i < 2000; i++) { /* 200 MB offered */
            code = dyn_Echo_Pass_async(ch, &in, on_blob, &d, NULL);
            assert_int_equal(code, CRPC_OK);
            assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
            if (i == 200) {
                crpc_loop_stats_get(l, &stats);
                memory = stats.memory;
            }
        }
        accepted = 2000 - done_count(&d);
        assert_int_equal(d.status, CRPC_EOVERCROWDED);
        assert_true(accepted >= 9 && accepted < 300); /* ten, and what the kernel took */
        crpc_loop_stats_get(l, &stats);
        assert_true(stats.memory <= memory + 200000);
        assert_true(stats.memory_peak < 64u << 20);
        crpc_channel_close(ch);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        assert_int_equal(done_count(&d), 2000);
        crpc_loop_close(l);
        peer_close(&deaf);
        free(bytes);
    }
}

/* The cap is exact: what fits is queued, one byte more is not. */
static void the_limit_of_the_queue_is_exact(void **state)
{
    net n;
    char *bytes = net_bytes(20000);
    int size, refused = 0;
    (void)state;
    memset(&n, 0, sizeof n);
    n.query = "?max_queued=20000&retries=0";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    /* the first size that is refused is the cap less what header and meta take: below 200 bytes */
    for (size = 20000 - 200; size <= 20000 && !refused; size++) {
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        int status;
        in.data = view_at(bytes, (size_t)size);
        status = dyn_Echo_Pass(n.channel, &in, &out, &call);
        assert_true(status == CRPC_OK || status == CRPC_EOVERCROWDED);
        refused = status == CRPC_EOVERCROWDED;
        crpc_call_reset(&call);
    }
    assert_true(refused);
    assert_true(size > 20000 - 150 && size < 20000 - 30);
    net_close(&n);
    free(bytes);
}

/* Like a peer that cannot pipeline: a second request before the reply is an offence. */
static bool peer_one_at_a_time(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        struct pollfd more = {0, POLLIN, 0};
        more.fd = fd;
        if (poll(&more, 1, 2) != 0 && recv(fd, &w, 1, MSG_PEEK) > 0) {
            pthread_mutex_lock(&p->lock);
            p->requests += 100000;
            pthread_mutex_unlock(&p->lock);
            wire_done(&m);
            return true;
        }
        if (m.n != 13) { /* never answered */
            wire_reply(&w, m.id, m.n + 1);
            wire_send(fd, w.p, w.n);
        }
        wire_free(&w);
        wire_done(&m);
    }
    return true;
}

static void one_at_a_time_for_peers_that_cannot_pipeline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer one;
        crpc_channel *ch;
        done_log d;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int i;
        peer_open(&one, peer_one_at_a_time, NULL);
        ch = net_channel(one.url, "?timeout_ms=20000&inflight=1", p, NULL, NULL);
        done_init(&d);
        for (i = 0; i < 40; i++)
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
        net_check_add(ch, 5);
        assert_true(CT_WAIT(done_count(&d) == 40, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_OK);
        assert_int_equal(peer_requests(&one), 41);
        assert_int_equal(peer_accepted(&one), 1);
        /* a timeout closes the connection: the late reply must not be the next call's */
        in.n = 13;
        call.timeout_ms = 50;
        assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
        net_check_add(ch, 6);
        assert_int_equal(peer_accepted(&one), 2);
        done_init(&d);
        assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, &call), CRPC_OK);
        assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_ETIMEDOUT);
        net_check_add(ch, 6);
        assert_int_equal(peer_accepted(&one), 3);
        crpc_call_reset(&call);
        crpc_channel_close(ch);
        peer_close(&one);
    }
}

/* Calls that wait for a slot are not sent, and say so. */
static void what_waits_for_a_slot_is_not_sent(void **state)
{
    peer silent;
    crpc_channel *ch;
    done_log first;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=20000&inflight=1", CRPC_POLLER_DEFAULT, NULL, NULL);
    done_init(&first);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &first, NULL), CRPC_OK);
    assert_true(CT_WAIT(peer_requests(&silent) == 1, NET_PATIENCE));
    call.timeout_ms = 50;
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ETIMEDOUT);
    assert_int_equal(call.error.sent, CRPC_SENT_NO);
    assert_non_null(strstr(call.error.text, "waiting for a connection (local)"));
    crpc_channel_close(ch);
    assert_int_equal(done_count(&first), 1);
    assert_int_equal(first.status, CRPC_ECANCELED);
    assert_int_equal(peer_requests(&silent), 1);
    crpc_call_reset(&call);
    peer_close(&silent);
}

/* --- by id ------------------------------------------------------------------------------------ */

static void ids_are_polled_waited_for_fetched_and_cancelled(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        net n;
        crpc_channel *ch, *other;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_id id, none = {0}, wrong;
        crpc_loop_stats stats;
        int64_t start;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        peer_open(&silent, peer_silent, NULL);
        ch = net_channel(silent.url, "?timeout_ms=60000", p, NULL, NULL);
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
        assert_int_equal(crpc_channel_wait(ch, id, 0), CRPC_EPENDING);
        start = ct_now_ms();
        assert_int_equal(crpc_channel_wait(ch, id, 30), CRPC_EPENDING);
        assert_true(ct_now_ms() - start >= 29);
        assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), CRPC_EPENDING);
        wrong.value = id.value + 1;
        assert_int_equal(crpc_channel_poll(ch, wrong), CRPC_ENOTFOUND);
        assert_int_equal(crpc_channel_poll(ch, none), CRPC_ENOTFOUND);
        wrong.value = id.value + (UINT64_C(1) << 32);
        assert_int_equal(crpc_channel_poll(ch, wrong), CRPC_ENOTFOUND);
        other = net_channel(silent.url, NULL, p, crpc_channel_loop(ch), NULL);
        assert_int_equal(crpc_channel_poll(other, id), CRPC_ENOTFOUND); /* another channel's */
        crpc_channel_close(other);
        assert_int_equal(crpc_channel_cancel(ch, id), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(ch, id), CRPC_ENOTFOUND);
        assert_int_equal(crpc_channel_poll(ch, id), CRPC_ENOTFOUND);
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.pending, 0);

        call.timeout_ms = 40; /* waiting for ever ends with the call's deadline */
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, &call), CRPC_OK);
        assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, &call), CRPC_ETIMEDOUT);
        assert_int_equal(call.error.code, CRPC_ETIMEDOUT);
        assert_int_equal(call.error.sent, CRPC_SENT_YES);
        assert_non_null(strstr(call.error.text, "deadline exceeded"));
        assert_true(call.latency_us >= 39000);

        /* cancelled before it was sent: never sent */
        {
            crpc_channel *slot =
                net_channel(silent.url, "?timeout_ms=60000&inflight=1", p, NULL, NULL);
            crpc_id first;
            int before = peer_requests(&silent);
            assert_int_equal(dyn_Echo_Add_begin(slot, &in, &first, NULL), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_begin(slot, &in, &id, NULL), CRPC_OK);
            assert_int_equal(crpc_channel_cancel(slot, id), CRPC_OK);
            assert_int_equal(crpc_channel_wait(slot, first, 60), CRPC_EPENDING);
            assert_true(CT_WAIT(peer_requests(&silent) == before + 1, NET_PATIENCE));
            assert_int_equal(crpc_channel_wait(slot, first, 30), CRPC_EPENDING);
            assert_int_equal(peer_requests(&silent), before + 1);
            crpc_channel_close(slot);
        }
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        peer_close(&silent);
        net_close(&n);
    }
}

static void finished_results_are_bounded(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    peer adds;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_id ids[4], more;
    int i;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    memset(&o, 0, sizeof o);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.max_results = 4;
    o.timeout_ms = NET_PATIENCE;
    assert_int_equal(crpc_channel_open(&ch, adds.url, &o, &error), CRPC_OK);
    for (i = 0; i < 4; i++)
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    more.value = 1;
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &more, NULL), CRPC_ELIMIT);
    assert_true(more.value == 0);
    for (i = 0; i < 4; i++)
        assert_int_equal(crpc_channel_wait(ch, ids[i], -1), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &more, NULL), CRPC_ELIMIT);
    assert_int_equal(dyn_Echo_Add_fetch(ch, ids[2], &out, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &more, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_cancel(ch, ids[0]), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[0], NULL), CRPC_OK);
    crpc_channel_close(ch); /* with results that nobody fetched */
    peer_close(&adds);
}

/* Replies by id arrive while another call drives, and its thread does not fetch them. */
static void ids_finish_while_others_drive(void **state)
{
    peer adds;
    crpc_channel *ch;
    crpc_id ids[200];
    int i;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    ch = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 200; i++) {
        dyn_Num in = net_num(1000 + i);
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
    }
    net_check_add(ch, 1);
    for (i = 199; i >= 0; i--) {
        dyn_Num out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        assert_int_equal(crpc_channel_poll(ch, ids[i]), CRPC_OK); /* answered before the last one */
        assert_int_equal(dyn_Echo_Add_fetch(ch, ids[i], &out, &call), CRPC_OK);
        assert_int_equal(out.n, 1001 + i);
        crpc_call_reset(&call);
    }
    crpc_channel_close(ch);
    peer_close(&adds);
}

/* Small results are kept apart from the buffer they came in, which others go on using. */
static void results_keep_their_bytes(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        crpc_id ids[20];
        char text[20][40];
        int i;
        memset(&n, 0, sizeof n);
        net_open(&n, p, NET_THREAD);
        for (i = 0; i < 20; i++) {
            dyn_Blob in = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            snprintf(text[i], sizeof text[i], "the bytes of number %d", i);
            in.data = crpc_view_str(text[i]);
            call.attachment = crpc_view_str(text[i]);
            assert_int_equal(dyn_Echo_Pass_begin(n.channel, &in, &ids[i], &call), CRPC_OK);
            assert_int_equal(crpc_channel_wait(n.channel, ids[i], -1), CRPC_OK);
        }
        for (i = 0; i < 3000; i++)
            net_check_add(n.channel, i);
        for (i = 0; i < 20; i++) {
            dyn_Blob out = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Pass_fetch(n.channel, ids[i], &out, &call), CRPC_OK);
            assert_true(crpc_view_equal(out.data, text[i]));
            assert_true(crpc_view_equal(call.reply_attachment, text[i]));
            crpc_call_reset(&call);
        }
        net_close(&n);
    }
}

/* --- closing ---------------------------------------------------------------------------------- */

typedef struct blocked_call {
    crpc_channel *ch;
    int status;
    crpc_error error;
    crpc_id id;
} blocked_call;

static void *call_and_block(void *arg)
{
    blocked_call *b = (blocked_call *)arg;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    b->status = dyn_Echo_Add(b->ch, &in, &out, &call);
    b->error = call.error;
    crpc_call_reset(&call);
    return NULL;
}

static void *wait_and_block(void *arg)
{
    blocked_call *b = (blocked_call *)arg;
    b->status = crpc_channel_wait(b->ch, b->id, -1);
    return NULL;
}

static int seen_after;

static void count_after(void *user, const crpc_method *method, crpc_call *call, int status)
{
    (void)user, (void)method, (void)call;
    if (status == CRPC_ECANCELED)
        __atomic_add_fetch(&seen_after, 1, __ATOMIC_RELAXED);
}

static void closing_cancels_every_form_once(void **state)
{
    static const crpc_client_interceptor after[] = {{NULL, count_after, NULL}};
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        int shared;
        for (shared = 0; shared < 2; shared++) {
            crpc_loop *l = shared ? net_loop(p) : NULL;
            crpc_channel_options o;
            peer silent;
            crpc_channel *ch;
            blocked_call sync, waiter;
            pthread_t threads[2];
            done_log d;
            dyn_Num in = net_num(1);
            crpc_id id;
            memset(&o, 0, sizeof o);
            o.timeout_ms = 60000;
            o.interceptors = after;
            o.interceptor_count = 1;
            seen_after = 0;
            peer_open(&silent, peer_silent, NULL);
            ch = net_channel(silent.url, NULL, p, l, &o);
            done_init(&d);
            sync.ch = waiter.ch = ch;
            assert_int_equal(pthread_create(&threads[0], NULL, call_and_block, &sync), 0);
            assert_true(CT_WAIT(peer_requests(&silent) == 1, NET_PATIENCE));
            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &waiter.id, NULL), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
            assert_int_equal(pthread_create(&threads[1], NULL, wait_and_block, &waiter), 0);
            ct_sleep_ms(20);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_notify(ch, &in, NULL), CRPC_OK);
            assert_true(CT_WAIT(peer_requests(&silent) == 6, NET_PATIENCE));
            crpc_channel_close(ch);
            pthread_join(threads[0], NULL);
            pthread_join(threads[1], NULL);
            assert_int_equal(sync.status, CRPC_ECANCELED);
            assert_int_equal(sync.error.code, CRPC_ECANCELED);
            assert_non_null(strstr(sync.error.text, "the channel was closed (local)"));
            assert_int_equal(waiter.status, CRPC_ECANCELED);
            if (shared)
                assert_true(CT_WAIT(done_count(&d) == 2, NET_PATIENCE));
            assert_int_equal(done_count(&d), 2); /* a private loop's are due before close returns */
            assert_int_equal(d.status, CRPC_ECANCELED);
            crpc_loop_close(l);
            assert_int_equal(done_count(&d), 2);
            assert_int_equal(seen_after, 3);
            peer_close(&silent);
        }
    }
}

/* Ending one call lets the next one onto the connection; when the channel is closing that must not
 * disturb the walk over its calls. */
static void closing_with_calls_that_wait_for_a_slot(void **state)
{
    peer silent;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *ch;
    char *bytes = net_bytes(9000);
    dyn_Num in = net_num(1);
    dyn_Blob blob = dyn_Blob_init_zero;
    done_log d;
    int i;
    (void)state;
    peer_open(&silent, peer_silent, NULL);
    ch = net_channel(silent.url, "?timeout_ms=60000&inflight=1&max_queued=5000&retries=0",
                     CRPC_POLLER_DEFAULT, l, NULL);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    done_init(&d);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
    for (i = 0; i < 1000 && !peer_requests(&silent); i++)
        assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
    blob.data = view_at(bytes, 9000);
    for (i = 0; i < 5; i++)
        assert_int_equal(dyn_Echo_Pass_notify(ch, &blob, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
    assert_int_equal(done_count(&d), 2);
    crpc_loop_close(l);
    assert_int_equal(peer_requests(&silent), 1);
    peer_close(&silent);
    free(bytes);
}

typedef struct closer {
    crpc_channel *ch;
    crpc_channel *others[4];
    int count, canceled;
    int close_at;
} closer;

static void on_close_all(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    closer *c = (closer *)user;
    (void)response, (void)call;
    if (status == CRPC_ECANCELED)
        __atomic_add_fetch(&c->canceled, 1, __ATOMIC_SEQ_CST);
    if (__atomic_add_fetch(&c->count, 1, __ATOMIC_SEQ_CST) == c->close_at) {
        int i;
        crpc_channel_close(c->ch);
        for (i = 0; i < 4; i++)
            crpc_channel_close(c->others[i]);
    }
}

/* A channel closed by the callback of its own call, with more calls pending; private loops, which
 * end themselves, and a given one. */
static void closing_inside_a_callback(void **state)
{
    crpc_poller p;
    int given, round;
    (void)state;
    NET_EACH_POLLER(p) for (given = 0; given < 2; given++) for (round = 0; round < 20; round++)
    {
        net n;
        closer c;
        crpc_loop *l = given ? net_loop(p) : NULL;
        dyn_Num in = net_num(1);
        int i;
        memset(&n, 0, sizeof n);
        memset(&c, 0, sizeof c);
        net_open(&n, p, NET_THREAD);
        c.ch = net_channel(n.url, "?timeout_ms=20000", p, l, NULL);
        c.others[0] = given ? net_channel(n.url, NULL, p, l, NULL) : NULL;
        c.close_at = 1 + round % 7;
        for (i = 0; i < c.close_at;
             i++) /* the last one's callback may run before it has returned */
            assert_int_equal(dyn_Echo_Add_async(c.ch, &in, on_close_all, &c, NULL), CRPC_OK);
        assert_true(
            CT_WAIT(__atomic_load_n(&c.count, __ATOMIC_SEQ_CST) == c.close_at, NET_PATIENCE));
        crpc_loop_close(l);
        assert_int_equal(__atomic_load_n(&c.count, __ATOMIC_SEQ_CST), c.close_at);
        net_close(&n);
        /* a private loop's own thread frees it behind the last callback */
        assert_true(CT_WAIT(ct_alloc_of_test()->live_blocks == 0, NET_PATIENCE));
    }
}

/* The same with calls that are pending for certain: a timer's callback closes. */
static void close_from_timer(void *user)
{
    closer *c = (closer *)user;
    crpc_channel_close(c->ch);
}

static void closing_inside_a_callback_cancels_the_rest(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer silent;
        closer c;
        dyn_Num in = net_num(1);
        crpc_id timer;
        int i;
        memset(&c, 0, sizeof c);
        peer_open(&silent, peer_silent, NULL);
        c.ch = net_channel(silent.url, "?timeout_ms=60000", p, NULL, NULL);
        for (i = 0; i < 8; i++)
            assert_int_equal(dyn_Echo_Add_async(c.ch, &in, on_close_all, &c, NULL), CRPC_OK);
        assert_int_equal(
            crpc_timer_start(crpc_channel_loop(c.ch), 20, 0, close_from_timer, &c, &timer),
            CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&c.count, __ATOMIC_SEQ_CST) == 8, NET_PATIENCE));
        assert_int_equal(c.canceled, 8);
        peer_close(&silent);
        assert_true(CT_WAIT(ct_alloc_of_test()->live_blocks == 0, NET_PATIENCE));
    }
}

/* --- faults ----------------------------------------------------------------------------------- */

typedef struct fault_plan {
    uint64_t random;
    int requests;
} fault_plan;

static uint64_t fault_dice(fault_plan *f, uint64_t n)
{
    return ct_random_from(&f->random) / 7 % n;
}

/* Drops, doubles, delays, splits, forges and answers out of order; now and then resets or closes.
 */
static bool peer_faulty(peer *p, int fd, int number)
{
    fault_plan *f = (fault_plan *)p->user;
    wire_message m;
    wire w = {NULL, 0, 0}, later = {NULL, 0, 0};
    int end = 0;
    (void)number;
    while (!end && peer_receive(p, fd, &m) == 1) {
        struct pollfd more = {0, POLLIN, 0};
        size_t sent = 0;
        switch (fault_dice(f, 16)) {
        case 0: /* dropped */
            break;
        case 1: /* twice */
            wire_reply(&w, m.id, m.n + 1);
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 2: /* late */
            wire_reply(&later, m.id, m.n + 1);
            break;
        case 3: /* forged, wrong whoever takes it */
            wire_reply(&w, m.id - (INT64_C(1) << 32), -666);
            wire_reply(&w, m.id ^ (INT64_C(1) << 62), -666);
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 4:
            wire_error(&w, m.id, 20007, "no", 1);
            break;
        case 5:
            wire_put(&w, later.p, later.n);
            later.n = 0;
            wire_reply(&w, m.id, m.n + 1);
            break;
        case 6:
            if (fault_dice(f, 400) == 0)
                end = 1 + (int)fault_dice(f, 3);
            wire_reply(&w, m.id, m.n + 1);
            break;
        default:
            wire_reply(&w, m.id, m.n + 1);
        }
        wire_done(&m);
        more.fd = fd;
        if (end == 3)
            wire_put(&w, "PRPC garbage garbage", 20);
        if (!end && w.n < 4000 && poll(&more, 1, 0) == 1)
            continue; /* more requests: their replies go together */
        while (sent < w.n) {
            size_t step = fault_dice(f, 4) ? w.n - sent : 1 + fault_dice(f, w.n - sent);
            if (end == 2 && sent)
                break;
            if (!wire_send(fd, w.p + sent, step))
                end = 1;
            sent += step;
        }
        w.n = 0;
    }
    wire_free(&w);
    wire_free(&later);
    if (end == 2) {
        pthread_mutex_lock(&p->lock);
        wire_reset(fd);
        pthread_mutex_unlock(&p->lock);
        return false;
    }
    return true;
}

typedef struct fault_log {
    uint8_t *done;
    int completed, twice, wrong;
    int by_status[8];
} fault_log;

typedef struct fault_call {
    fault_log *log;
    int number;
} fault_call;

static void on_fault_done(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    fault_call *c = (fault_call *)user;
    fault_log *f = c->log;
    (void)call;
    f->twice += f->done[c->number]++ != 0;
    f->completed++;
    if (!status && response->n != c->number + 1)
        f->wrong++;
    switch (status) {
    case CRPC_OK:
        f->by_status[0]++;
        break;
    case CRPC_ETIMEDOUT:
        f->by_status[1]++;
        break;
    case CRPC_ECONN:
        f->by_status[2]++;
        break;
    case CRPC_EAPP:
        f->by_status[3]++;
        break;
    case CRPC_EOVERCROWDED:
        f->by_status[4]++;
        break;
    default:
        f->by_status[5]++;
    }
}

#define FAULT_CALLS 60000 /* on each poller */

static void every_call_ends_once_whatever_the_peer_does(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop *l = net_loop(p);
        crpc_channel *ch;
        peer a, b;
        fault_plan plans[2];
        fault_log log;
        fault_call *calls = (fault_call *)malloc(FAULT_CALLS * sizeof *calls);
        uint64_t random = ct_seed() * 3 + (uint64_t)p;
        crpc_loop_stats stats;
        char list[128];
        int64_t stuck;
        int i = 0, begun = 0;
        memset(&log, 0, sizeof log);
        log.done = (uint8_t *)calloc(FAULT_CALLS, 1);
        memset(plans, 0, sizeof plans);
        plans[0].random = ct_seed() + 11;
        plans[1].random = ct_seed() + 23;
        memset(&a, 0, sizeof a);
        memset(&b, 0, sizeof b);
        a.sequential = b.sequential = true;
        peer_open_on(&a, 0, peer_faulty, &plans[0]);
        peer_open_on(&b, 0, peer_faulty, &plans[1]);
        snprintf(list, sizeof list, "list://127.0.0.1:%d,127.0.0.1:%d", a.port, b.port);
        ch = net_channel(list, "?retries=1", p, l, NULL);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK);
        stuck = ct_now_ms() + 150000;
        while (log.completed < FAULT_CALLS && ct_now_ms() < stuck) {
            while (i < FAULT_CALLS && begun - log.completed < 256) {
                crpc_call call = CRPC_INIT;
                dyn_Num in = net_num(i);
                int status;
                calls[i].log = &log;
                calls[i].number = i;
                call.timeout_ms = 20 + (int)(ct_random_from(&random) % 200);
                status = ct_random_from(&random) & 64
                             ? dyn_Echo_Add_async(ch, &in, on_fault_done, &calls[i], &call)
                             : dyn_Echo_Get_async(ch, &in, on_fault_done, &calls[i], &call);
                assert_int_equal(status, CRPC_OK);
                i++;
                begun++;
            }
            assert_int_equal(crpc_loop_step(l, 50), CRPC_OK);
        }
        assert_int_equal(log.completed, FAULT_CALLS);
        assert_int_equal(log.twice, 0);
        assert_int_equal(log.wrong, 0);
        assert_int_equal(log.by_status[5], 0);
        assert_true(log.by_status[0] > FAULT_CALLS / 3);
        assert_true(log.by_status[1] > 0 && log.by_status[3] > 0);
        crpc_loop_stats_get(l, &stats);
        assert_int_equal(stats.pending, 0);
        assert_true(stats.late_replies > 100);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        peer_close(&a);
        peer_close(&b);
        free(calls);
        free(log.done);
    }
}

/* The same from threads that call synchronously and share the loop. */
typedef struct fault_thread {
    crpc_channel *ch;
    int calls, wrong, odd;
    uint64_t random;
} fault_thread;

static void *call_through_faults(void *arg)
{
    fault_thread *t = (fault_thread *)arg;
    int i;
    for (i = 0; i < t->calls; i++) {
        dyn_Num in = net_num(i), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        int status;
        call.timeout_ms = 5 + (int)(ct_random_from(&t->random) % 40);
        status = dyn_Echo_Get(t->ch, &in, &out, &call);
        if (!status && out.n != i + 1)
            t->wrong++;
        if (status && status != CRPC_ETIMEDOUT && status != CRPC_ECONN && status != CRPC_EAPP)
            t->odd++;
        crpc_call_reset(&call);
    }
    return NULL;
}

static void threads_share_a_loop_through_faults(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        fault_thread t[4];
        pthread_t threads[4];
        fault_plan plan;
        crpc_loop_stats stats;
        crpc_channel *ch;
        peer a;
        int i;
        memset(&plan, 0, sizeof plan);
        plan.random = ct_seed() + 5;
        memset(&a, 0, sizeof a);
        a.sequential = true;
        peer_open_on(&a, 0, peer_faulty, &plan);
        ch = net_channel(a.url, NULL, p, NULL, NULL);
        for (i = 0; i < 4; i++) {
            memset(&t[i], 0, sizeof t[i]);
            t[i].ch = ch;
            t[i].calls = 800;
            t[i].random = ct_seed() + (uint64_t)i;
            assert_int_equal(pthread_create(&threads[i], NULL, call_through_faults, &t[i]), 0);
        }
        for (i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            assert_int_equal(t[i].wrong, 0);
            assert_int_equal(t[i].odd, 0);
        }
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.pending, 0);
        crpc_channel_close(ch);
        peer_close(&a);
    }
}

/* --- interceptors, fields, what is inherited -------------------------------------------------- */

static char trail[400];

static int client_before(void *user, const crpc_method *method, crpc_call *call)
{
    const char *name = (const char *)user;
    strcat(trail, name);
    strcat(trail, "<");
    assert_string_equal(method->service, "dyn.Echo");
    if (strcmp(name, "b") == 0)
        assert_int_equal(crpc_call_add_field(call, "a", "from b"), CRPC_OK);
    if (strcmp(name, "c") == 0)
        call->log_id = 99;
    if (strcmp(name, "stop") == 0)
        return CRPC_EREJECT;
    return CRPC_OK;
}

static void client_after(void *user, const crpc_method *method, crpc_call *call, int status)
{
    char text[40];
    (void)method;
    snprintf(text, sizeof text, "%s%d>", (const char *)user, status);
    strcat(trail, text);
    assert_int_equal(call->error.code, status);
}

static void client_interceptors_run_in_order(void **state)
{
    static char a[] = "a", b[] = "b", c[] = "c", stop[] = "stop";
    static const crpc_client_interceptor chain[] = {{client_before, client_after, a},
                                                    {client_before, client_after, b},
                                                    {client_before, NULL, c},
                                                    {NULL, client_after, c},
                                                    {client_before, client_after, stop},
                                                    {client_before, client_after, c}};
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_view value;
    crpc_id id;
    done_log d;
    (void)state;
    memset(&n, 0, sizeof n);
    n.channel_options.interceptors = chain;
    n.channel_options.interceptor_count = 4;
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    trail[0] = '\0';
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");
    assert_int_equal(out.n, 99);
    assert_true(crpc_call_field(&call, "b", &value));
    assert_true(crpc_view_equal(value, "from b"));
    crpc_call_reset(&call);
    assert_false(crpc_call_field(&call, "b", &value));
    assert_int_equal(crpc_call_add_field(&call, "x", "y"), CRPC_EINVAL);

    trail[0] = '\0';
    assert_int_equal(dyn_Echo_Meta_begin(n.channel, &in, &id, NULL), CRPC_OK);
    assert_string_equal(trail, "a<b<c<");
    assert_int_equal(crpc_channel_wait(n.channel, id, -1), CRPC_OK);
    assert_string_equal(trail, "a<b<c<");
    assert_int_equal(dyn_Echo_Meta_fetch(n.channel, id, &out, NULL), CRPC_OK);
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");

    trail[0] = '\0';
    done_init(&d);
    assert_int_equal(dyn_Echo_Meta_async(n.channel, &in, on_num, &d, NULL), CRPC_OK);
    assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");
    assert_int_equal(d.n, 99);
    crpc_channel_close(n.channel);

    n.channel_options.interceptor_count = 6;
    n.channel = net_channel(n.url, NULL, CRPC_POLLER_DEFAULT, NULL, &n.channel_options);
    trail[0] = '\0';
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_EREJECT);
    assert_string_equal(trail, "a<b<c<stop<c1018>b1018>a1018>");
    assert_string_equal(call.error.text, "dyn.Echo.Meta: ended by an interceptor: rejected by the "
                                         "client's own policy (local)");
    assert_int_equal(call.error.sent, CRPC_SENT_NO);
    trail[0] = '\0';
    assert_int_equal(dyn_Echo_Meta_async(n.channel, &in, on_num, &d, NULL), CRPC_EREJECT);
    assert_string_equal(trail, "a<b<c<stop<c1018>b1018>a1018>");
    assert_int_equal(net_calls(&n.service), 3);
    assert_int_equal(done_count(&d), 1);
    crpc_call_reset(&call);
    net_close(&n);
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
        n.channel_options.credential = "channel's";
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

/* --- opening ---------------------------------------------------------------------------------- */

static void bad_urls_are_explained(void **state)
{
    static const struct {
        const char *url, *says;
    } bad[] = {
        {"", "not a URL (scheme://...): \"\""},
        {"127.0.0.1:80", "not a URL (scheme://...): \"127.0.0.1:80\""},
        {"://x", "not a URL"},
        {"tcp://", "is not host:port"},
        {"tcp://localhost", "\"localhost\" is not host:port, with a port up to 65535 (IPv6 stands in brackets)"},
        {"tcp://1.2.3.4:99999", "\"1.2.3.4:99999\" is not host:port"},
        {"tcp://1.2.3.4:x", "is not host:port"},
        {"tcp://1.2.3.4:-1", "is not host:port"},
        {"tcp://::1:80", "is not host:port, with a port up to 65535 (IPv6 stands in brackets)"},
        {"tcp://[::1:80", "is not host:port"},
        {"tcp://:80", "is not host:port"},
        {"tcp://1.2.3.4:80/path",
         "tcp://1.2.3.4:80: tcp:// and list:// URLs take no path: \"/path\""},
        {"tcp://1.2.3.4:0", "tcp://1.2.3.4:0: a client cannot connect to port 0"},
        {"list://1.2.3.4:1,[::1]:0", "list://[::1]:0: a client cannot connect to port 0"},
        {"tcp://[fe80::1%eth0]:80", "\"[fe80::1%eth0]:80\": an IPv6 address with a scope (%eth0)"},
        {"unix:///", "unix:///: no path; expected unix:///path, or unix://@name"},
        {"unix://?retries=1", "no path"},
        {"unix://@", "address"},
        {"tcp://1.2.3.4:80?retries=1&timeout_ms=5&retries=2", "URL option retries is given twice"},
        {"list://1.2.3.4:80,,1.2.3.4:81", "is not host:port"},
        {"list://1.2.3.4:80,", "is not host:port"},
        {"tcp://1.2.3.4:80?timeout=5", "URL option timeout=5: not known for tcp://"},
        {"tcp://1.2.3.4:80?timeout_ms=", "URL option timeout_ms=: "},
        {"tcp://1.2.3.4:80?timeout_ms=1x", "URL option timeout_ms=1x: "},
        {"tcp://1.2.3.4:80?timeout_ms=86400001", "out of range"},
        {"tcp://1.2.3.4:80?timeout_ms=99999999999999999999", "out of range"},
        {"tcp://1.2.3.4:80?short_names=2", "URL option short_names=2: "},
        {"tcp://1.2.3.4:80?group=x", "URL option group=x: not known for tcp://"},
        {"tcp://1.2.3.4:80?timeout_ms", "URL option \"timeout_ms\" is not key=value"},
        {"tcp://1.2.3.4:80?a=%zz", "URL option \"a\" is not key=value, or a %XX in it is not two"},
        {"unix://", "unix://: no path"},
        {"tcp://no.such.host.invalid:80", "host \"no.such.host.invalid\" could not be resolved"},
        {"gopher://1.2.3.4:80", "gopher"},
    };
    size_t i;
    crpc_channel_options o;
    (void)state;
    memset(&o, 0, sizeof o);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        crpc_channel *ch = (crpc_channel *)&o;
        crpc_error error;
        int status = crpc_channel_open(&ch, bad[i].url, &o, &error);
        if (status == CRPC_OK || !strstr(error.text, bad[i].says))
            fail_msg("%s: %s, \"%s\"", bad[i].url, crpc_status_name(status), error.text);
        assert_int_equal(error.code, status);
        assert_null(ch);
        assert_int_not_equal(crpc_channel_open(&ch, bad[i].url, &o, NULL), CRPC_OK);
    }
}

static int hook_resolves(void *user, const char *host, char *addresses, size_t size)
{
    int *calls = (int *)user;
    ++*calls;
    if (strcmp(host, "both") == 0)
        snprintf(addresses, size, "::1,127.0.0.1");
    else if (strcmp(host, "rubbish") == 0)
        snprintf(addresses, size, "rubbish");
    else
        return CRPC_ERESOLVE;
    return CRPC_OK;
}

static void names_are_resolved_by_the_hook(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    peer adds;
    char url[64];
    int calls = 0;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    memset(&o, 0, sizeof o);
    o.private_loop.hooks.user = &calls;
    o.private_loop.hooks.resolve = hook_resolves;
    o.timeout_ms = NET_PATIENCE;
    snprintf(url, sizeof url, "tcp://both:%d", adds.port);
    assert_int_equal(crpc_channel_open(&ch, url, &o, &error), CRPC_OK);
    assert_int_equal(calls, 1);
    net_check_add(ch, 1); /* the IPv4 one was taken */
    assert_int_equal(calls, 1);
    crpc_channel_close(ch);
    assert_int_equal(crpc_channel_open(&ch, "tcp://rubbish:1", &o, &error), CRPC_ERESOLVE);
    assert_int_equal(crpc_channel_open(&ch, "tcp://none:1", &o, &error), CRPC_ERESOLVE);
    assert_int_equal(crpc_channel_open(&ch, "tcp://[::1]:1", &o, &error), CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(calls, 3);
    peer_close(&adds);
}

/* --- reconnecting ----------------------------------------------------------------------------- */

/* Answers one request and ends the idle connection: closed, or reset if user is set. */
static bool peer_answers_once(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)number;
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_reply(&w, m.id, m.n + 1);
    wire_done(&m);
    wire_flush(fd, &w);
    ct_sleep_ms(5);
    pthread_mutex_lock(&p->lock);
    if (p->user)
        wire_reset(fd);
    else
        close(fd);
    pthread_mutex_unlock(&p->lock);
    return false;
}

static bool peer_has_ended(peer *p, int number)
{
    bool ended;
    pthread_mutex_lock(&p->lock);
    ended = p->accepted > number && p->fds[number] < 0;
    pthread_mutex_unlock(&p->lock);
    return ended;
}

static uint32_t connections(crpc_loop *l)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(l, &stats);
    return stats.connections;
}

static void an_idle_connection_that_ended_is_dialled_again(void **state)
{
    crpc_poller p;
    int threaded, reset, i;
    (void)state;
    NET_EACH_POLLER(p)
    for (threaded = 0; threaded < 2; threaded++) for (reset = 0; reset < 2; reset++)
    {
        peer once;
        crpc_channel *ch;
        peer_open(&once, peer_answers_once, reset ? &once : NULL);
        ch = net_channel(once.url, "?timeout_ms=20000", p, NULL, NULL);
        if (threaded)
            assert_int_equal(crpc_loop_start(crpc_channel_loop(ch)), CRPC_OK);
        for (i = 0; i < 15; i++) {
            net_check_add(ch, i);
            assert_true(CT_WAIT(peer_has_ended(&once, i), NET_PATIENCE));
            if (threaded)
                assert_true(CT_WAIT(connections(crpc_channel_loop(ch)) == 0, NET_PATIENCE));
            else
                ct_sleep_ms(12);
        }
        assert_int_equal(peer_accepted(&once), 15);
        crpc_channel_close(ch);
        peer_close(&once);
    }
}

static void a_server_that_comes_back_is_found_again(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n, again;
        crpc_channel *ch;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        char url[160];
        int i;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = -1;
        net_open(&n, p, NET_THREAD);
        strcpy(url, n.url);
        ch = net_channel(url, "?timeout_ms=20000", p, NULL, NULL);
        net_check_add(ch, 1);
        net_close(&n);
        ct_sleep_ms(20);
        call.timeout_ms = 2000;
        for (i = 0; i < 3; i++) {
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
            assert_int_equal(call.error.sent, CRPC_SENT_NO);
        }
        memset(&again, 0, sizeof again);
        again.listen = url; /* the same port, at once */
        net_open(&again, p, NET_THREAD);
        net_check_add(ch, 2);
        crpc_channel_close(ch);
        crpc_call_reset(&call);
        net_close(&again);
    }
}

/* Two channels to one address on one loop are one connection; other options, another. */
static void channels_of_a_loop_share_connections(void **state)
{
    peer adds;
    crpc_loop *l = net_loop(CRPC_POLLER_DEFAULT);
    crpc_channel *a, *b, *c;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    a = net_channel(adds.url, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, l, NULL);
    b = net_channel(adds.url, "?timeout_ms=10000", CRPC_POLLER_DEFAULT, l, NULL);
    c = net_channel(adds.url, "?timeout_ms=20000&inflight=1", CRPC_POLLER_DEFAULT, l, NULL);
    net_check_add(a, 1);
    net_check_add(b, 1);
    assert_int_equal(peer_accepted(&adds), 1);
    net_check_add(c, 1);
    assert_int_equal(peer_accepted(&adds), 2);
    crpc_channel_close(a);
    net_check_add(b, 1);
    crpc_channel_close(b);
    net_check_add(c, 1);
    crpc_channel_close(c);
    assert_int_equal(peer_accepted(&adds), 2);
    crpc_loop_close(l);
    peer_close(&adds);
}

/* --- threads, callbacks ----------------------------------------------------------------------- */

static crpc_channel *nested_channel;
static int nested_status[2], nested_calls;

static void on_nest(void *user, int status, const dyn_Num *response, crpc_call *call)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_id id;
    int64_t start = ct_now_us();
    (void)user, (void)response, (void)call;
    assert_int_equal(status, CRPC_OK);
    nested_status[0] = dyn_Echo_Add(nested_channel, &in, &out, NULL);
    assert_true(ct_now_us() - start < 5000000); /* at once, not after the deadline */
    assert_int_equal(dyn_Echo_Add_begin(nested_channel, &in, &id, NULL), CRPC_OK);
    nested_status[1] = crpc_channel_wait(nested_channel, id, 100000);
    assert_int_equal(crpc_channel_cancel(nested_channel, id), CRPC_OK);
    __atomic_add_fetch(&nested_calls, 1, __ATOMIC_SEQ_CST);
}

static void waiting_inside_a_callback_is_refused(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        dyn_Num in = net_num(1);
        memset(&n, 0, sizeof n);
        nested_calls = 0;
        net_open(&n, p, NET_THREAD);
        nested_channel = n.channel;
        assert_int_equal(dyn_Echo_Add_async(n.channel, &in, on_nest, NULL, NULL), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&nested_calls, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
        assert_int_equal(nested_status[0], CRPC_EDEADLK);
        assert_int_equal(nested_status[1], CRPC_EDEADLK);
        net_check_add(n.channel, 3);
        net_close(&n);
    }
}

static void without_threads_a_callback_needs_a_driver(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    peer adds;
    dyn_Num in = net_num(1);
    done_log d;
    (void)state;
    peer_open(&adds, peer_adds, NULL);
    memset(&o, 0, sizeof o);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.forbid_threads = 1;
    o.timeout_ms = NET_PATIENCE;
    assert_int_equal(crpc_channel_open(&ch, adds.url, &o, &error), CRPC_OK);
    done_init(&d);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_EINVAL);
    net_check_add(ch, 1);
    assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 0), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, on_num, &d, NULL), CRPC_OK);
    while (!done_count(&d))
        assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 1000), CRPC_OK);
    assert_int_equal(d.status, CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
    peer_close(&adds);
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
    assert_int_equal(dyn_Echo_Add_async(n.channel, &in, on_num, &d, NULL), CRPC_ECODEC);
    assert_int_equal(net_calls(&n.service), 0);
    crpc_call_reset(&call);
    net_close(&n);
    assert_int_equal(d.count, 0);
}

/* Reply larger than max_body: refused by name, the connection goes on. */
static void oversize_replies_are_refused_by_name(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        net n;
        char *bytes = net_bytes(200000);
        dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_loop_stats stats;
        memset(&n, 0, sizeof n);
        n.query = "?max_body=100000";
        net_open(&n, p, NET_THREAD);
        in.data = view_at(bytes, 200000);
        assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_ERESPONSE);
        assert_non_null(strstr(call.error.text, "is over max_body, 100000 (local)"));
        assert_non_null(strstr(call.error.text, "reply of 2000"));
        net_check_add(n.channel, 1);
        crpc_server_stats_get(n.server, &stats);
        assert_int_equal(stats.connections, 1);
        crpc_call_reset(&call);
        net_close(&n);
        free(bytes);
    }
}

/* --- out of memory ---------------------------------------------------------------------------- */

/* Answers everything with an empty message. */
static bool peer_answers(peer *p, int fd, int number)
{
    wire_message m;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0}, meta = {NULL, 0, 0};
        wire_int(&meta, 4, m.id);
        wire_frame(&w, &meta, NULL, 0);
        wire_free(&meta);
        wire_done(&m);
        if (!wire_flush(fd, &w))
            break;
    }
    return true;
}

typedef struct sweep_plan {
    const char *url;
    int form;
} sweep_plan;

static void on_swept(void *user, int status, const dyn_Blob *response, crpc_call *call)
{
    int *out = (int *)user;
    (void)response, (void)call;
    *out = status;
}

static int client_scenario(const crpc_hooks *hooks, void *user)
{
    sweep_plan *plan = (sweep_plan *)user;
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_field field = {"key", "value"};
    crpc_id id;
    int status, done = -1;
    memset(&o, 0, sizeof o);
    o.private_loop.hooks = *hooks;
    o.private_loop.hooks.log_level = -1;
    o.private_loop.poller = plan->form & 4 ? CRPC_POLLER_POLL : CRPC_POLLER_EPOLL;
    o.private_loop.forbid_threads = 1;
    o.timeout_ms = NET_PATIENCE;
    o.credential = "secret";
    status = crpc_channel_open(&ch, plan->url, &o, &error);
    if (status)
        return status;
    in.data = crpc_view_str("data");
    call.fields = &field;
    call.field_count = 1;
    call.attachment = crpc_view_str("attachment");
    switch (plan->form & 3) {
    case 0:
        status = dyn_Echo_Pass(ch, &in, &out, &call);
        break;
    case 1:
        status = dyn_Echo_Pass_begin(ch, &in, &id, &call);
        if (!status) {
            assert_int_equal(crpc_channel_wait(ch, id, -1), CRPC_OK);
            status = dyn_Echo_Pass_fetch(ch, id, &out, &call);
        }
        break;
    case 2:
        assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 0), CRPC_OK);
        status = dyn_Echo_Pass_async(ch, &in, on_swept, &done, &call);
        if (!status) {
            while (done < 0)
                assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 1000), CRPC_OK);
            status = done;
        }
        break;
    default:
        status = dyn_Echo_Pass_notify(ch, &in, &call);
        status = status == CRPC_EINVAL ? CRPC_OK : status;
    }
    crpc_call_reset(&call);
    crpc_channel_close(ch);
    /* memory that fails on a connection loses the connection */
    return status == CRPC_ECONN ? CRPC_ENOMEM : status;
}

/* The peer is a process of its own: its descriptors are not to be counted. */
static void clients_survive_being_out_of_memory(void **state)
{
    peer answers;
    sweep_plan plan;
    pid_t child;
    (void)state;
    memset(&answers, 0, sizeof answers);
    answers.sequential = true;
    child = peer_fork(&answers, peer_answers);
    plan.url = answers.url;
    for (plan.form = 0; plan.form < 8; plan.form++)
        assert_true(ct_sweep(client_scenario, &plan) > 5);
    peer_kill(child);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_calls_in_all_forms),
        CT_TEST(completions_never_run_on_the_callers_stack),
        CT_TEST(views_and_attachments_go_both_ways),
        CT_TEST(views_and_attachments_in_asynchronous_forms),
        CT_TEST(a_response_with_views_needs_a_call),
        CT_TEST(a_call_keeps_its_reply_after_the_channel),
        CT_TEST(the_deadline_is_total_and_kept),
        CT_TEST(a_request_cut_by_its_deadline_goes_out_whole),
        CT_TEST(retries_do_not_outlast_the_deadline),
        CT_TEST(many_deadlines_at_once),
        CT_TEST(which_deadline_applies),
        CT_TEST(a_passed_deadline_sends_nothing),
        CT_TEST(late_and_forged_replies_complete_nothing),
        CT_TEST(a_reply_counts_only_on_its_own_connection),
        CT_TEST(odd_replies),
        CT_TEST(requests_carry_what_peers_insist_on),
        CT_TEST(remote_errors_are_mapped_and_explained),
        CT_TEST(local_errors_are_explained),
        CT_TEST(long_error_texts_are_cut),
        CT_TEST(another_provider_is_tried_only_when_that_is_safe),
        CT_TEST(when_all_say_logoff_the_error_is_theirs),
        CT_TEST(logoff_frees_the_slot),
        CT_TEST(cancelling_does_not_free_the_peer),
        CT_TEST(closing_tells_what_was_sent),
        CT_TEST(an_early_stop_loses_no_call),
        CT_TEST(a_lost_reply_is_executed_once),
        CT_TEST(providers_take_turns),
        CT_TEST(the_send_queue_has_a_limit),
        CT_TEST(the_limit_of_the_queue_is_exact),
        CT_TEST(one_at_a_time_for_peers_that_cannot_pipeline),
        CT_TEST(what_waits_for_a_slot_is_not_sent),
        CT_TEST(ids_are_polled_waited_for_fetched_and_cancelled),
        CT_TEST(finished_results_are_bounded),
        CT_TEST(ids_finish_while_others_drive),
        CT_TEST(results_keep_their_bytes),
        CT_TEST(closing_cancels_every_form_once),
        CT_TEST(closing_with_calls_that_wait_for_a_slot),
        CT_TEST(closing_inside_a_callback),
        CT_TEST(closing_inside_a_callback_cancels_the_rest),
        CT_TEST(every_call_ends_once_whatever_the_peer_does),
        CT_TEST(threads_share_a_loop_through_faults),
        CT_TEST(client_interceptors_run_in_order),
        CT_TEST(fields_ids_and_credentials_travel),
        CT_TEST(bad_urls_are_explained),
        CT_TEST(names_are_resolved_by_the_hook),
        CT_TEST(an_idle_connection_that_ended_is_dialled_again),
        CT_TEST(a_server_that_comes_back_is_found_again),
        CT_TEST(channels_of_a_loop_share_connections),
        CT_TEST(waiting_inside_a_callback_is_refused),
        CT_TEST(without_threads_a_callback_needs_a_driver),
        CT_TEST(requests_that_do_not_encode),
        CT_TEST(oversize_replies_are_refused_by_name),
        CT_TEST(clients_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
