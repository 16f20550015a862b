/* Cluster policies, backup requests and stand-in responses, over several providers. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static void forking_takes_the_first_success(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        int i;
        fleet_open(&f, 4, "?cluster=forking&forks=-1&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_BROKEN);
        fleet_mood_set(&f.peers[2], FLEET_REFUSES);
        for (i = 0; i < 4; i++) {
            r = fleet_call(&f, form, false, i, NULL);
            assert_int_equal(r.status, CRPC_OK);
            assert_int_equal(r.out.n, i + 1);
            assert_int_equal(r.out.ms, 3);
            assert_string_equal(r.error.endpoint, f.peers[3].address);
            assert_int_equal(fleet_pending(&f), 0);
        }
        assert_int_equal(net_calls(&f.peers[3].service), 4);
        fleet_close(&f);
    }
}

static void forking_asks_two_unless_told_otherwise(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        int i;
        fleet_open(&f, 4, "?cluster=forking&timeout_ms=20000", NULL);
        /* An attempt that was not sent when the other succeeded is withdrawn: on a busy machine
         * that may happen many times in a row. */
        for (i = 0; i < 10 || (i < 1000 && fleet_calls(&f) <= i); i++)
            assert_int_equal(fleet_call(&f, form, false, i, NULL).status, CRPC_OK);
        assert_true(fleet_calls(&f) > i);
        assert_true(fleet_calls(&f) <= 2 * i);
        fleet_close(&f);
    }
}

static void forking_fails_when_all_have_failed(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 3, "?cluster=forking&forks=-1&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        fleet_mood_set(&f.peers[1], FLEET_BROKEN);
        fleet_peer_close(&f.peers[2]);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_true(r.status == CRPC_EINTERNAL || r.status == CRPC_ECONN);
        assert_non_null(strstr(r.error.text, "dyn.Echo.Add"));
        assert_int_equal(net_calls(&f.peers[0].service), 1);
        assert_int_equal(net_calls(&f.peers[1].service), 1);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

static void forks_are_cancelled_with_their_call(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 3, "?cluster=forking&forks=2&timeout_ms=50", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        fleet_mood_set(&f.peers[2], FLEET_SILENT);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

/* The channel is closed while forks are under way: their call completes with ECANCELED. */
static void forks_end_with_their_channel(void **state)
{
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(1);
    crpc_id id;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?cluster=forking&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(f.channel, &request, &id, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 2 && net_held(&f.peers[1].service) == 2,
                        NET_PATIENCE));
    assert_int_equal(crpc_channel_cancel(f.channel, id), CRPC_OK);
    crpc_channel_close(f.channel);
    f.channel = NULL;
    assert_int_equal(r.done, 1);
    assert_int_equal(r.status, CRPC_ECANCELED);
    fleet_close(&f);
}

static void broadcast_reaches_everyone(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        int i;
        fleet_open(&f, 5, "?cluster=broadcast&timeout_ms=20000", NULL);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 2);
        for (i = 0; i < 5; i++)
            assert_int_equal(net_calls(&f.peers[i].service), 1);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

/* Unless fail_percent says otherwise, no failure is allowed. All providers are asked either way. */
static void broadcast_fails_when_too_many_have_failed(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        crpc_call call = CRPC_INIT;
        int i;
        call.policy.fail_percent = 20; /* one of five */
        fleet_open(&f, 5, "?cluster=broadcast&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[2], FLEET_REFUSES);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_EAPP);
        assert_int_equal(r.error.app_code, 5007);
        r = fleet_call(&f, form, false, 1, &call);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 2);
        fleet_mood_set(&f.peers[4], FLEET_BROKEN);
        r = fleet_call(&f, form, false, 1, &call);
        assert_int_not_equal(r.status, CRPC_OK);
        for (i = 0; i < 5; i++)
            assert_int_equal(net_calls(&f.peers[i].service), 3);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

/* Whether the channel's only call has taken a reply of one of its parts. */
static bool has_reply(crpc_channel *ch)
{
    bool has;
    crpci_loop_lock(ch->loop);
    has = CRPCI_CONTAINER(ch->calls.next, crpci_pending_call, of_channel)->attempt.reply.chunk;
    crpci_loop_unlock(ch->loop);
    return has;
}

/* One provider has answered and one has not when the call ends at its deadline or with its channel:
 * that is no success. */
static void an_unfinished_broadcast_is_no_success(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        crpc_call call = CRPC_INIT;
        fleet_result r;
        dyn_Num request = net_num(1);
        fleet f;
        fleet_open(&f, 2, "?cluster=broadcast&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        call.policy.timeout_ms = 300;
        r = fleet_call(&f, form, false, 1, &call);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(r.error.attempts, 2);
        assert_false(r.error.remote);
        memset(&r, 0, sizeof r);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
        assert_true(CT_WAIT(has_reply(f.channel), NET_PATIENCE));
        crpc_channel_close(f.channel);
        f.channel = NULL;
        assert_int_equal(r.status, CRPC_ECANCELED);
        fleet_close(&f);
    }
}

static void failsafe_swallows_failures(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 1, "?cluster=failsafe&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        r = fleet_call(&f, form, false, 5, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 0);
        assert_non_null(strstr(r.error.text, "EINTERNAL"));
        fleet_mood_set(&f.peers[0], FLEET_REFUSES); /* that is an answer */
        assert_int_equal(fleet_call(&f, form, false, 5, NULL).status, CRPC_EAPP);
        fleet_mood_set(&f.peers[0], FLEET_WELL);
        assert_int_equal(fleet_call(&f, form, false, 5, NULL).out.n, 6);
        fleet_close(&f);
    }
}

typedef struct given_up {
    int count;
    int code;
} given_up;

static void on_given_up(void *user, const crpc_method *method, const crpc_error *error)
{
    given_up *g = (given_up *)user;
    assert_string_equal(method->name, "Add");
    g->code = error->code;
    __atomic_add_fetch(&g->count, 1, __ATOMIC_SEQ_CST);
}

static void failback_fleet_open(fleet *f, given_up *dropped)
{
    crpc_channel_options o = CRPC_INIT;
    dropped->count = dropped->code = 0;
    o.failback_dropped = on_given_up;
    o.failback_user = dropped;
    fleet_open(f, 1, "?cluster=failback&failback_ms=20&retries=3&failback_max=4&timeout_ms=20000",
               &o);
    assert_int_equal(crpc_loop_start(crpc_channel_loop(f->channel)), CRPC_OK);
    fleet_mood_set(&f->peers[0], FLEET_BROKEN);
}

static void failback_goes_on_in_the_background(void **state)
{
    given_up dropped;
    fleet f;
    (void)state;
    failback_fleet_open(&f, &dropped);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 40, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(net_calls(&f.peers[0].service) >= 2, NET_PATIENCE)); /* a retry */
    fleet_mood_set(&f.peers[0], FLEET_WELL);
    assert_true(CT_WAIT(fleet_pending(&f) == 0, NET_PATIENCE));
    assert_int_equal(f.peers[0].service.order[net_calls(&f.peers[0].service) - 1], 40);
    fleet_close(&f);
}

static void failback_gives_up_after_its_retries(void **state)
{
    given_up dropped;
    fleet f;
    (void)state;
    failback_fleet_open(&f, &dropped);
    assert_int_equal(fleet_call(&f, FORM_ASYNC, false, 41, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&dropped.count, __ATOMIC_SEQ_CST) == 1, NET_PATIENCE));
    assert_int_equal(net_calls(&f.peers[0].service), 4); /* the call, and three retries */
    assert_int_equal(dropped.code, CRPC_EINTERNAL);
    fleet_close(&f);
}

/* A script: takes three requests, one a connection, and hangs up; counts those that say that they are
 * repeated, for one server only. Answers the fourth. */
static bool peer_counts_repeats(peer *p, int fd, int number)
{
    wire w = {NULL, 0, 0};
    wire_message m;
    char text[64];
    if (peer_receive(p, fd, &m) != 1)
        return true;
    if (wire_field(&m, "crpc-repeat", text, sizeof text))
        __atomic_fetch_add((int *)p->user, 1, __ATOMIC_SEQ_CST);
    wire_reply(&w, m.id, m.n + 1);
    wire_done(&m);
    if (number < 3)
        wire_free(&w);
    else
        wire_flush(fd, &w);
    return true;
}

/* The background tries of a request with an id are for any server, although it was sent before. */
static void failback_binds_a_request_to_no_server(void **state)
{
    peer counts;
    crpc_channel *ch;
    int repeats = 0;
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    (void)state;
    peer_open(&counts, peer_counts_repeats, &repeats);
    ch = net_channel(counts.url, "?cluster=failback&failback_ms=1&retries=3&request_ids=1",
                     CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(crpc_loop_start(crpc_channel_loop(ch)), CRPC_OK);
    assert_int_equal(dyn_Echo_Add(ch, &in, &out, NULL), CRPC_OK); /* an empty response */
    assert_true(CT_WAIT(peer_requests(&counts) == 4, NET_PATIENCE));
    assert_int_equal(repeats, 0);
    crpc_channel_close(ch);
    peer_close(&counts);
}

/* At most failback_max requests wait; when the channel closes, those are dropped and reported. */
static void failback_is_bounded(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    given_up dropped = {0, 0};
    fleet f;
    int i;
    (void)state;
    o.failback_dropped = on_given_up;
    o.failback_user = &dropped;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=600000&failback_max=3&timeout_ms=20000", &o);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    for (i = 0; i < 5; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_int_equal(fleet_pending(&f), 3);
    crpc_channel_close(f.channel);
    f.channel = NULL;
    assert_int_equal(dropped.count, 3);
    assert_int_equal(dropped.code, CRPC_ECANCELED);
    assert_int_equal(net_calls(&f.peers[0].service), 5);
    fleet_close(&f);
}

/* A silent provider costs backup_ms; the other one's reply counts. */
static void a_backup_request_is_sent_for_idempotent_calls(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        int i;
        fleet_open(&f, 2, "?backup_ms=30&lb=rr&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        for (i = 0; i < 4; i++) {
            r = fleet_call(&f, form, true, i, NULL);
            assert_int_equal(r.status, CRPC_OK);
            assert_int_equal(r.out.n, i + 1);
            assert_int_equal(r.out.ms, 1);
            assert_string_equal(r.error.endpoint, f.peers[1].address);
        }
        assert_true(CT_WAIT(net_calls(&f.peers[0].service) > 0, NET_PATIENCE));
        assert_int_equal(net_calls(&f.peers[1].service), 4);
        assert_int_equal(fleet_pending(&f), 0);
        fleet_close(&f);
    }
}

/* Providers that are slow because they have too much to do do not get twice as much. */
static void backup_requests_have_the_budget_of_retries(void **state)
{
    enum { CALLS = 30 };
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 2, "?backup_ms=1&retry_budget=5&timeout_ms=20", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    for (i = 0; i < CALLS; i++)
        fleet_call(&f, FORM_SYNC, true, i, NULL);
    assert_true(fleet_calls(&f) <= CALLS + 5);
    fleet_close(&f);
}

static void no_backup_request_is_sent_for_calls_that_are_not_idempotent(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 2, "?backup_ms=10&timeout_ms=300", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        do { /* until a slow machine sends it in time */
            r = fleet_call(&f, form, false, 1, NULL);
            assert_int_equal(r.status, CRPC_ETIMEDOUT);
        } while (r.error.sent == CRPC_SENT_NO);
        assert_true(CT_WAIT(fleet_calls(&f) == 1, NET_PATIENCE));
        fleet_close(&f);
    }
}

/* When the first attempt fails while the backup request is under way, the call waits for the backup
 * request's reply. */
static void a_backup_request_outlives_the_first_attempt(void **state)
{
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(6);
    crpc_context *x;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?backup_ms=20&retries=-1&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1 && net_held(&f.peers[1].service) == 1,
                        NET_PATIENCE));
    x = net_take(&f.peers[0].service);
    crpc_context_finish(x, CRPC_EINTERNAL);
    ct_sleep_ms(30);
    if (!__atomic_load_n(&r.done,
                         __ATOMIC_SEQ_CST)) { /* the request that failed was the backup request */
        x = net_take(&f.peers[1].service);
        crpc_context_finish(x, CRPC_OK);
    }
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    fleet_close(&f);
}

/* A one-way request that was sent has not failed, so failback does not keep it. */
static void a_one_way_call_is_not_sent_again(void **state)
{
    dyn_Num request = net_num(3);
    fleet f;
    (void)state;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=1&retries=1&timeout_ms=20000", NULL);
    assert_int_equal(dyn_Echo_Add_notify(f.channel, &request, NULL), CRPC_OK);
    assert_true(
        CT_WAIT(net_calls(&f.peers[0].service) >= 1 && fleet_pending(&f) == 0, NET_PATIENCE));
    assert_int_equal(net_calls(&f.peers[0].service), 1);
    fleet_close(&f);
}

/* Failback does not send requests of a degraded method in the background either. */
static void a_degraded_method_is_never_called(void **state)
{
    crpc_method_options method = CRPC_INIT;
    crpc_channel_options o = CRPC_INIT;
    fleet_form form;
    (void)state;
    method.method = dyn_Echo_Add_method;
    method.degraded = 1;
    o.methods = &method;
    o.method_count = 1;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_open(&f, 1, "?cluster=failback&failback_ms=1&timeout_ms=20000", &o);
        assert_int_equal(fleet_call(&f, form, false, 1, NULL).status, CRPC_OK);
        assert_int_equal(f.channel->failback.waiting, 0);
        fleet_close(&f);
    }
}

/* An application's error shows that the request was executed, so failback stops. */
static void failback_ends_with_an_applications_error(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    given_up dropped = {0, 0};
    fleet f;
    (void)state;
    o.failback_dropped = on_given_up;
    o.failback_user = &dropped;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=50&retries=5&timeout_ms=20000", &o);
    assert_int_equal(crpc_loop_start(crpc_channel_loop(f.channel)), CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_REFUSES);
    assert_true(CT_WAIT(fleet_pending(&f) == 0, NET_PATIENCE));
    assert_int_equal(dropped.count, 1);
    assert_int_equal(dropped.code, CRPC_EAPP);
    assert_true(net_calls(&f.peers[0].service) < 6);
    fleet_close(&f);
}

/* Failback retries even if the program makes synchronous calls only. */
static void failback_needs_nobody_to_drive(void **state)
{
    fleet f;
    (void)state;
    fleet_open(&f, 1, "?cluster=failback&failback_ms=1&retries=1&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    assert_true(CT_WAIT(net_calls(&f.peers[0].service) == 2, NET_PATIENCE));
    fleet_close(&f);
}

/* The error tells how many forks there were, and whether one of them may have been executed. */
static void forks_that_time_out_are_explained(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 2, "?cluster=forking&timeout_ms=300", NULL);
        fleet_mood_set(&f.peers[0], FLEET_SILENT);
        fleet_mood_set(&f.peers[1], FLEET_SILENT);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_ETIMEDOUT);
        assert_int_equal(r.error.attempts, 2);
        if (fleet_calls(&f))
            assert_int_equal(r.error.sent, CRPC_SENT_YES);
        fleet_close(&f);
    }
}

static void forks_that_fail_are_explained(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        fleet f;
        fleet_result r;
        fleet_open(&f, 2, "?cluster=forking&timeout_ms=20000", NULL);
        fleet_mood_set(&f.peers[0], FLEET_BROKEN);
        fleet_peer_close(&f.peers[1]);
        r = fleet_call(&f, form, false, 1, NULL);
        assert_true(r.status == CRPC_EINTERNAL || r.status == CRPC_ECONN);
        assert_int_equal(r.error.attempts, 2);
        assert_int_equal(r.error.sent, CRPC_SENT_YES);
        assert_string_not_equal(r.error.endpoint, "");
        fleet_close(&f);
    }
}

/* Cancelling a call's forks can let other calls proceed, and their failure can end another of these
 * forks. */
static void forks_can_fail_while_they_are_cancelled(void **state)
{
    crpc_call in = CRPC_INIT;
    dyn_Num request = net_num(1);
    fleet_result mine, other;
    crpci_endpoint *e[3];
    fleet f;
    crpc_loop *l;
    int i;
    (void)state;
    memset(&mine, 0, sizeof mine);
    memset(&other, 0, sizeof other);
    fleet_open(&f, 3, "?lb=rr&inflight=2&timeout_ms=20000", NULL);
    l = crpc_channel_loop(f.channel);
    for (i = 0; i < 3; i++) {
        fleet_mood_set(&f.peers[i], FLEET_SILENT);
        e[i] = fleet_member(&f, i)->endpoint;
    }
    crpci_loop_lock(l);
    f.channel->providers.balance.next = fleet_member(&f, 0)->balance.index;
    assert_true(crpci_sock_parse(&e[1]->addr, "unix:/nonexistent/socket")); /* fails at once */
    e[1]->usable_at = crpci_loop_now(l) + INT64_C(10000000);
    crpci_loop_unlock(l);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &other, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1, NET_PATIENCE));
    in.policy.cluster = CRPC_CLUSTER_FORKING;
    in.policy.forks = -1;
    crpci_loop_lock(l);
    f.channel->providers.balance.next = fleet_member(&f, 0)->balance.index;
    crpci_loop_unlock(l);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &mine, &in), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 2 && net_held(&f.peers[2].service) == 1,
                        NET_PATIENCE));
    crpci_loop_lock(l);
    e[1]->usable_at = 0; /* and its timer has not run yet */
    e[2]->usable_at = INT64_MAX;
    crpci_loop_unlock(l);
    crpc_context_finish(net_take(&f.peers[2].service), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&mine.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(mine.status, CRPC_OK);
    assert_string_equal(mine.error.text, "");
    assert_int_equal(mine.error.attempts, 3);
    fleet_close(&f);
}

/* The latency of a backup request counts from its own sending, not from the first attempt's. */
static void a_backup_request_has_its_own_time(void **state)
{
    dyn_Num request = net_num(6);
    const crpci_pending_call *c, *part;
    fleet_result r;
    fleet f;
    crpc_loop *l;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?backup_ms=20&timeout_ms=20000", NULL);
    l = crpc_channel_loop(f.channel);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Get_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1 && net_held(&f.peers[1].service) == 1,
                        NET_PATIENCE));
    crpci_loop_lock(l);
    c = CRPCI_CONTAINER(f.channel->calls.next, const crpci_pending_call, of_channel);
    part = CRPCI_CONTAINER(c->group->parts.next, const crpci_pending_call, of_channel);
    assert_true(part->attempt_us >= c->start_us + 20000);
    crpci_loop_unlock(l);
    fleet_close(&f);
}

/* If memory for some of a broadcast's requests is missing, the call fails: not every provider was
 * reached. */
static void broadcast_without_memory_is_no_success(void **state)
{
    crpci_heap *h;
    int k, failed = 0;
    fleet f;
    (void)state;
    fleet_open(&f, 5, "?cluster=broadcast&timeout_ms=20000", NULL);
    h = f.channel->loop->heap;
    assert_int_equal(fleet_call(&f, FORM_SYNC, false, 1, NULL).status, CRPC_OK);
    for (k = 1; k <= 30; k++) {
        int before = fleet_calls(&f);
        fleet_result r;
        crpci_thread_lock(&h->lock);
        crpci_heap_trim(h, 0, false); /* kept chunks would count against the limit */
        crpci_thread_unlock(&h->lock);
        h->limit = h->chunk_bytes + k * 512;
        r = fleet_call(&f, FORM_SYNC, false, 1, NULL);
        h->limit = 0;
        failed += r.status != CRPC_OK;
        if (r.status == CRPC_OK)
            assert_int_equal(fleet_calls(&f), before + 5);
        else
            assert_string_not_equal(r.error.text, "");
    }
    assert_in_range(failed, 2, 29);
    fleet_close(&f);
}

static int stand_in(void *user, const crpc_method *method, const crpc_error *error, void *response)
{
    dyn_Num *out = (dyn_Num *)response;
    assert_string_equal(method->name, "Add");
    assert_int_equal(out->n, 0);
    out->n = error->code;
    ++*(int *)user;
    return CRPC_OK;
}

/* Add has a function that stands in for a failed call, Get a canned response. */
typedef struct degrading {
    crpc_method_options methods[2];
    int used;
    fleet fleet;
} degrading;

static void degrading_open(degrading *d, bool get_is_degraded)
{
    crpc_channel_options o = CRPC_INIT;
    memset(d, 0, sizeof *d);
    d->methods[0].method = dyn_Echo_Add_method;
    d->methods[0].fallback = stand_in;
    d->methods[0].user = &d->used;
    d->methods[1].method = dyn_Echo_Get_method;
    d->methods[1].canned = crpc_view_of("\x08\x2a", 2); /* n = 42 */
    d->methods[1].degraded = get_is_degraded;
    o.methods = d->methods;
    o.method_count = 2;
    fleet_open(&d->fleet, 1, "?timeout_ms=20000", &o);
}

static void a_function_stands_in_for_a_failed_call(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        degrading d;
        fleet_result r;
        degrading_open(&d, false);
        fleet_mood_set(&d.fleet.peers[0], FLEET_BROKEN);
        r = fleet_call(&d.fleet, form, false, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, CRPC_EINTERNAL);
        assert_int_equal(d.used, 1);
        fleet_close(&d.fleet);
    }
}

static void a_canned_response_stands_in_for_a_failed_call(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        degrading d;
        fleet_result r;
        degrading_open(&d, false);
        fleet_mood_set(&d.fleet.peers[0], FLEET_BROKEN);
        r = fleet_call(&d.fleet, form, true, 1, NULL);
        assert_int_equal(r.status, CRPC_OK);
        assert_int_equal(r.out.n, 42);
        fleet_close(&d.fleet);
    }
}

/* A reply, or the service's own error, is what the caller gets. */
static void an_answer_is_not_replaced_by_a_fallback(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        degrading d;
        degrading_open(&d, false);
        fleet_mood_set(&d.fleet.peers[0], FLEET_REFUSES);
        assert_int_equal(fleet_call(&d.fleet, form, false, 1, NULL).status, CRPC_EAPP);
        fleet_mood_set(&d.fleet.peers[0], FLEET_WELL);
        assert_int_equal(fleet_call(&d.fleet, form, false, 1, NULL).out.n, 2);
        assert_int_equal(d.used, 0);
        fleet_close(&d.fleet);
    }
}

static void a_degraded_method_gives_its_canned_response_unsent(void **state)
{
    fleet_form form;
    (void)state;
    for (form = FORM_SYNC; form < FORMS; form = (fleet_form)(form + 1)) {
        degrading d;
        degrading_open(&d, true);
        assert_int_equal(fleet_call(&d.fleet, form, true, 1, NULL).out.n, 42);
        assert_int_equal(fleet_calls(&d.fleet), 0);
        fleet_close(&d.fleet);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(forking_takes_the_first_success),
        CT_TEST(forking_asks_two_unless_told_otherwise),
        CT_TEST(forking_fails_when_all_have_failed),
        CT_TEST(forks_are_cancelled_with_their_call),
        CT_TEST(forks_end_with_their_channel),
        CT_TEST(broadcast_reaches_everyone),
        CT_TEST(broadcast_fails_when_too_many_have_failed),
        CT_TEST(an_unfinished_broadcast_is_no_success),
        CT_TEST(failsafe_swallows_failures),
        CT_TEST(failback_goes_on_in_the_background),
        CT_TEST(failback_gives_up_after_its_retries),
        CT_TEST(failback_binds_a_request_to_no_server),
        CT_TEST(failback_is_bounded),
        CT_TEST(a_backup_request_is_sent_for_idempotent_calls),
        CT_TEST(backup_requests_have_the_budget_of_retries),
        CT_TEST(no_backup_request_is_sent_for_calls_that_are_not_idempotent),
        CT_TEST(a_backup_request_outlives_the_first_attempt),
        CT_TEST(a_one_way_call_is_not_sent_again),
        CT_TEST(a_degraded_method_is_never_called),
        CT_TEST(failback_ends_with_an_applications_error),
        CT_TEST(failback_needs_nobody_to_drive),
        CT_TEST(forks_that_time_out_are_explained),
        CT_TEST(forks_that_fail_are_explained),
        CT_TEST(forks_can_fail_while_they_are_cancelled),
        CT_TEST(a_backup_request_has_its_own_time),
        CT_TEST(broadcast_without_memory_is_no_success),
        CT_TEST(a_function_stands_in_for_a_failed_call),
        CT_TEST(a_canned_response_stands_in_for_a_failed_call),
        CT_TEST(an_answer_is_not_replaced_by_a_fallback),
        CT_TEST(a_degraded_method_gives_its_canned_response_unsent),
    };
    return CT_RUN(tests);
}
