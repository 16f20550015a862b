/* The forms of a call: synchronous, by callback, by id, one-way; interceptors; who drives. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static void a_synchronous_call_tells_how_it_went(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
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
        net_close(&n);
    }
}

static void a_call_needs_no_call_struct(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41), out = dyn_Num_init_zero;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        assert_int_equal(dyn_Echo_Add(n.channel, &in, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 42);
        assert_int_equal(net_calls(&n.service), 1);
        net_close(&n);
    }
}

static void a_callback_runs_once_on_another_thread(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41);
        done_log d;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        done_init(&d);
        assert_int_equal(dyn_Echo_Add_async(n.channel, &in, done_num, &d, NULL), CRPC_OK);
        assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
        assert_int_equal(d.status, CRPC_OK);
        assert_int_equal(d.n, 42);
        assert_string_equal(d.error.endpoint, n.url + 6);
        assert_false(pthread_equal(d.thread, pthread_self()));
        net_close(&n);
        assert_int_equal(done_count(&d), 1);
    }
}

static void a_reply_is_fetched_once_by_its_id(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41), out = dyn_Num_init_zero;
        crpc_id id;
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
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
        net_close(&n);
    }
}

static void a_one_way_call_reaches_the_handler(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        dyn_Num in = net_num(41);
        memset(&n, 0, sizeof n);
        net_open(&n, p, m);
        assert_int_equal(dyn_Echo_Add_notify(n.channel, &in, NULL), CRPC_OK);
        assert_true(CT_WAIT(net_calls(&n.service) == 1, NET_PATIENCE));
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

/* crpc_loop_stop before anything ran the loop does not keep the loop's thread from completing
 * calls. */
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
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
    assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
    assert_int_equal(d.status, CRPC_OK);
    crpc_channel_close(ch);
    crpc_loop_close(l);
    peer_close(&adds);
}

/* A channel to a provider that takes requests and never answers. */
typedef struct unanswered {
    peer silent;
    crpc_channel *channel;
} unanswered;

static void unanswered_open(unanswered *u, crpc_poller p, const char *query)
{
    peer_open(&u->silent, peer_silent, NULL);
    u->channel = net_channel(u->silent.url, query, p, NULL, NULL);
}

static void unanswered_close(unanswered *u)
{
    crpc_channel_close(u->channel);
    peer_close(&u->silent);
}

static void a_pending_id_can_be_polled_and_waited_for(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        unanswered u;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_id id;
        int64_t start;
        unanswered_open(&u, p, "?timeout_ms=60000");
        assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_poll(u.channel, id), CRPC_EPENDING);
        assert_int_equal(crpc_channel_wait(u.channel, id, 0), CRPC_EPENDING);
        start = ct_now_ms();
        assert_int_equal(crpc_channel_wait(u.channel, id, 30), CRPC_EPENDING);
        assert_true(ct_now_ms() - start >= 29);
        assert_int_equal(dyn_Echo_Add_fetch(u.channel, id, &out, &call), CRPC_EPENDING);
        crpc_call_reset(&call);
        unanswered_close(&u);
    }
}

static void an_id_is_known_to_its_channel_only(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        unanswered u;
        crpc_channel *other;
        dyn_Num in = net_num(1);
        crpc_id id, none = {0}, wrong;
        unanswered_open(&u, p, "?timeout_ms=60000");
        assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &id, NULL), CRPC_OK);
        wrong.value = id.value + 1;
        assert_int_equal(crpc_channel_poll(u.channel, wrong), CRPC_ENOTFOUND);
        assert_int_equal(crpc_channel_poll(u.channel, none), CRPC_ENOTFOUND);
        wrong.value = id.value + (UINT64_C(1) << 32);
        assert_int_equal(crpc_channel_poll(u.channel, wrong), CRPC_ENOTFOUND);
        other = net_channel(u.silent.url, NULL, p, crpc_channel_loop(u.channel), NULL);
        assert_int_equal(crpc_channel_poll(other, id), CRPC_ENOTFOUND);
        crpc_channel_close(other);
        assert_int_equal(crpc_channel_poll(u.channel, id), CRPC_EPENDING);
        unanswered_close(&u);
    }
}

static void a_cancelled_id_is_gone(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        unanswered u;
        dyn_Num in = net_num(1);
        crpc_id id;
        crpc_loop_stats stats;
        unanswered_open(&u, p, "?timeout_ms=60000");
        assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(u.channel, id), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(u.channel, id), CRPC_ENOTFOUND);
        assert_int_equal(crpc_channel_poll(u.channel, id), CRPC_ENOTFOUND);
        crpc_loop_stats_get(crpc_channel_loop(u.channel), &stats);
        assert_int_equal(stats.pending, 0);
        unanswered_close(&u);
    }
}

static void waiting_without_a_limit_ends_with_the_deadline(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        unanswered u;
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_call call = CRPC_INIT;
        crpc_id id;
        unanswered_open(&u, p, "?timeout_ms=60000");
        for (call.policy.timeout_ms = 40;; call.policy.timeout_ms *= 2) {
            assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &id, &call), CRPC_OK);
            assert_int_equal(crpc_channel_wait(u.channel, id, -1), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_fetch(u.channel, id, &out, &call), CRPC_ETIMEDOUT);
            assert_int_equal(call.error.code, CRPC_ETIMEDOUT);
            if (call.error.sent == CRPC_SENT_YES)
                break;
            assert_true(call.policy.timeout_ms < NET_PATIENCE); /* a slow machine did not send it */
        }
        assert_non_null(strstr(call.error.text, "deadline exceeded"));
        assert_true(call.latency_us >= 39000);
        crpc_call_reset(&call);
        unanswered_close(&u);
    }
}

static void a_request_cancelled_before_it_was_sent_is_never_sent(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        unanswered u;
        dyn_Num in = net_num(1);
        crpc_id first, id;
        unanswered_open(&u, p, "?timeout_ms=60000&inflight=1");
        assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &first, NULL), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_begin(u.channel, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_cancel(u.channel, id), CRPC_OK);
        assert_int_equal(crpc_channel_wait(u.channel, first, 60), CRPC_EPENDING);
        assert_true(CT_WAIT(peer_requests(&u.silent) == 1, NET_PATIENCE));
        assert_int_equal(crpc_channel_wait(u.channel, first, 30), CRPC_EPENDING);
        assert_int_equal(peer_requests(&u.silent), 1);
        unanswered_close(&u);
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
    o.policy.timeout_ms = NET_PATIENCE;
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

/* Replies to calls by id arrive while a synchronous call drives the loop. */
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
        assert_int_equal(crpc_channel_poll(ch, ids[i]),
                         CRPC_OK); /* answered before the synchronous call */
        assert_int_equal(dyn_Echo_Add_fetch(ch, ids[i], &out, &call), CRPC_OK);
        assert_int_equal(out.n, 1001 + i);
        crpc_call_reset(&call);
    }
    crpc_channel_close(ch);
    peer_close(&adds);
}

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

static char interceptor_a[] = "a", interceptor_b[] = "b", interceptor_c[] = "c",
            interceptor_stop[] = "stop";
static const crpc_client_interceptor chain[] = {{client_before, client_after, interceptor_a},
                                                {client_before, client_after, interceptor_b},
                                                {client_before, NULL, interceptor_c},
                                                {NULL, client_after, interceptor_c},
                                                {client_before, client_after, interceptor_stop},
                                                {client_before, client_after, interceptor_c}};

/* Opens a channel with the first `count` interceptors of the chain; the fifth ends every call. */
static void open_intercepted(net *n, size_t count)
{
    memset(n, 0, sizeof *n);
    n->channel_options.interceptors = chain;
    n->channel_options.interceptor_count = count;
    net_open(n, CRPC_POLLER_DEFAULT, NET_THREAD);
    trail[0] = '\0';
}

static void interceptors_run_in_order_and_back(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    (void)state;
    open_intercepted(&n, 4);
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");
    crpc_call_reset(&call);
    net_close(&n);
}

static void interceptors_change_the_request(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    crpc_view value;
    (void)state;
    open_intercepted(&n, 4);
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_OK);
    assert_int_equal(out.n, 99); /* the log_id of c */
    assert_true(crpc_call_field(&call, "b", &value));
    assert_true(crpc_view_equal(value, "from b"));
    crpc_call_reset(&call);
    assert_false(crpc_call_field(&call, "b", &value));
    assert_int_equal(crpc_call_add_field(&call, "x", "y"), CRPC_EINVAL); /* not in an interceptor */
    net_close(&n);
}

static void interceptors_see_a_result_by_id_when_it_is_fetched(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_id id;
    (void)state;
    open_intercepted(&n, 4);
    assert_int_equal(dyn_Echo_Meta_begin(n.channel, &in, &id, NULL), CRPC_OK);
    assert_string_equal(trail, "a<b<c<");
    assert_int_equal(crpc_channel_wait(n.channel, id, -1), CRPC_OK);
    assert_string_equal(trail, "a<b<c<");
    assert_int_equal(dyn_Echo_Meta_fetch(n.channel, id, &out, NULL), CRPC_OK);
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");
    net_close(&n);
}

static void interceptors_run_before_the_callback(void **state)
{
    net n;
    dyn_Num in = net_num(1);
    done_log d;
    (void)state;
    open_intercepted(&n, 4);
    done_init(&d);
    assert_int_equal(dyn_Echo_Meta_async(n.channel, &in, done_num, &d, NULL), CRPC_OK);
    assert_true(CT_WAIT(done_count(&d) == 1, NET_PATIENCE));
    assert_string_equal(trail, "a<b<c<c0>b0>a0>");
    assert_int_equal(d.n, 99);
    net_close(&n);
}

static void an_interceptor_can_end_a_call(void **state)
{
    net n;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    done_log d;
    (void)state;
    open_intercepted(&n, 6);
    done_init(&d);
    assert_int_equal(dyn_Echo_Meta(n.channel, &in, &out, &call), CRPC_EREJECT);
    assert_string_equal(trail, "a<b<c<stop<c1018>b1018>a1018>");
    assert_string_equal(call.error.text, "dyn.Echo.Meta: ended by an interceptor: rejected by the "
                                         "client's own policy (local)");
    assert_int_equal(call.error.sent, CRPC_SENT_NO);
    trail[0] = '\0';
    assert_int_equal(dyn_Echo_Meta_async(n.channel, &in, done_num, &d, NULL), CRPC_EREJECT);
    assert_string_equal(trail, "a<b<c<stop<c1018>b1018>a1018>");
    assert_int_equal(net_calls(&n.service), 0);
    crpc_call_reset(&call);
    net_close(&n);
    assert_int_equal(done_count(&d), 0);
}

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
    o.policy.timeout_ms = NET_PATIENCE;
    assert_int_equal(crpc_channel_open(&ch, adds.url, &o, &error), CRPC_OK);
    done_init(&d);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_EINVAL);
    net_check_add(ch, 1);
    assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 0), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
    while (!done_count(&d))
        assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 1000), CRPC_OK);
    assert_int_equal(d.status, CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
    peer_close(&adds);
}

/* Nobody drives, and no thread may be started: a call by id ends at its deadline all the same, when
 * the program asks for it. */
static void a_call_by_id_ends_at_its_deadline_without_a_driver(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_channel *ch;
    crpc_error error;
    crpc_id id;
    peer silent;
    int by_wait;
    (void)state;
    net_time_begin(NET_TIME_STANDS);
    peer_open(&silent, peer_silent, NULL);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.forbid_threads = 1;
    o.private_loop.hooks.clock_us = net_clock_us;
    o.policy.timeout_ms = 100;
    assert_int_equal(crpc_channel_open(&ch, silent.url, &o, &error), CRPC_OK);
    for (by_wait = 0; by_wait < 2; by_wait++) {
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_poll(ch, id), CRPC_EPENDING);
        assert_int_equal(crpc_channel_wait(ch, id, 0), CRPC_EPENDING);
        net_time_add(101);
        assert_int_equal(by_wait ? crpc_channel_wait(ch, id, 0) : crpc_channel_poll(ch, id),
                         CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(ch, id, &out, NULL), CRPC_ETIMEDOUT);
    }
    crpc_channel_close(ch);
    peer_close(&silent);
}

/* A peer that answers every request with an empty message. */
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
    o.policy.timeout_ms = NET_PATIENCE;
    o.security.credential = "secret";
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

/* The peer is a separate process, so that its descriptors are not counted here. */
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

/* --- CRPC_DEBUG ------------------------------------------------------------------------------- */

static crpc_loop *abort_loop;

static crpc_channel *abort_channel(void)
{
    crpc_channel_options o = CRPC_INIT;
    crpc_channel *ch;
    if (crpc_loop_open(&abort_loop, NULL))
        _exit(2);
    o.loop = abort_loop;
    if (crpc_channel_open(&ch, "tcp://127.0.0.1:1", &o, NULL))
        _exit(3);
    return ch;
}

static void close_twice(void)
{
    crpc_channel *ch = abort_channel();
    crpc_channel_close(ch);
    crpc_channel_close(ch);
}

static void call_after_close(void)
{
    crpc_channel *ch = abort_channel();
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_channel_close(ch);
    _exit(dyn_Echo_Add(ch, &in, &out, NULL));
}

static void call_with_rubbish(void)
{
    crpc_channel *ch = abort_channel();
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call;
    memset(&call, 0x5a, sizeof call);
    _exit(dyn_Echo_Add(ch, &in, &out, &call));
}

static void debug_builds_report_misuse(void **state)
{
    static const struct {
        void (*fn)(void);
        const char *says;
    } cases[] = {
        {close_twice, "crpc: crpc_channel_close: the object is closed already\n"},
        {call_after_close, "crpc: crpc_channel_call: the object is closed already\n"},
        {call_with_rubbish, "crpc: crpc_call_reset: the crpc_call is not initialised: set it to "
                            "CRPC_INIT before its first use\n"},
    };
    char text[300];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        ct_expect_abort(cases[i].fn, text, sizeof text);
        assert_string_equal(text, cases[i].says);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(debug_builds_report_misuse),
        CT_TEST(a_synchronous_call_tells_how_it_went),
        CT_TEST(a_call_needs_no_call_struct),
        CT_TEST(a_callback_runs_once_on_another_thread),
        CT_TEST(a_reply_is_fetched_once_by_its_id),
        CT_TEST(a_one_way_call_reaches_the_handler),
        CT_TEST(completions_never_run_on_the_callers_stack),
        CT_TEST(an_early_stop_loses_no_call),
        CT_TEST(a_pending_id_can_be_polled_and_waited_for),
        CT_TEST(an_id_is_known_to_its_channel_only),
        CT_TEST(a_cancelled_id_is_gone),
        CT_TEST(waiting_without_a_limit_ends_with_the_deadline),
        CT_TEST(a_request_cancelled_before_it_was_sent_is_never_sent),
        CT_TEST(finished_results_are_bounded),
        CT_TEST(ids_finish_while_others_drive),
        CT_TEST(interceptors_run_in_order_and_back),
        CT_TEST(interceptors_change_the_request),
        CT_TEST(interceptors_see_a_result_by_id_when_it_is_fetched),
        CT_TEST(interceptors_run_before_the_callback),
        CT_TEST(an_interceptor_can_end_a_call),
        CT_TEST(waiting_inside_a_callback_is_refused),
        CT_TEST(without_threads_a_callback_needs_a_driver),
        CT_TEST(a_call_by_id_ends_at_its_deadline_without_a_driver),
        CT_TEST(clients_survive_being_out_of_memory),
    };
    return CT_RUN(tests);
}
