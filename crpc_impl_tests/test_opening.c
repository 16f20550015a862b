/* Opening a channel from its URL and options, and closing it with calls pending. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

/* The channel is closed when part of a request has been sent: the error says that it may have been
 * executed. */
static void closing_reports_what_was_sent(void **state)
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
    in.data = crpc_view_of(bytes, 12 << 20);
    assert_int_equal(dyn_Echo_Pass_async(ch, &in, done_blob, &d, NULL), CRPC_OK);
    do {
        ct_sleep_ms(1);
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
    } while (stats.sends < 2); /* the second send shows that the first has ended */
    crpc_channel_close(ch);
    assert_int_equal(done_count(&d), 1);
    assert_int_equal(d.status, CRPC_ECANCELED);
    assert_int_equal(d.error.sent, CRPC_SENT_MAYBE);
    free(bytes);
    peer_close(&deaf);
}

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
            o.policy.timeout_ms = 60000;
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
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
            assert_int_equal(dyn_Echo_Add_async(ch, &in, done_num, &d, NULL), CRPC_OK);
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
            assert_int_equal(done_count(&d),
                             2); /* with a private loop they come before close returns */
            assert_int_equal(d.status, CRPC_ECANCELED);
            crpc_loop_close(l);
            assert_int_equal(done_count(&d), 2);
            assert_int_equal(seen_after, 3);
            peer_close(&silent);
        }
    }
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

/* A callback closes its own channel while more calls are pending; with a private loop, which ends
 * itself, and with a given one. */
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

/* A timer's callback closes the channel, so that all calls are pending for certain. */
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

static void bad_urls_are_explained(void **state)
{
    static const struct {
        const char *url, *says;
    } bad[] = {
        {"", "not a URL (scheme://...): \"\""},
        {"127.0.0.1:80", "not a URL (scheme://...): \"127.0.0.1:80\""},
        {"://x", "not a URL"},
        {"tcp://", "is not host:port"},
        {"tcp://localhost", "\"localhost\" is not host:port with a port of 0 to 65535; an IPv6 "
                            "address needs brackets"},
        {"tcp://1.2.3.4:99999", "\"1.2.3.4:99999\" is not host:port"},
        {"tcp://1.2.3.4:x", "is not host:port"},
        {"tcp://1.2.3.4:-1", "is not host:port"},
        {"tcp://::1:80", "with a port of 0 to 65535; an IPv6 address needs brackets: [::1]:80"},
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
        {"tcp://1.2.3.4:80?timeout_ms=", "timeout_ms=: not a whole number"},
        {"tcp://1.2.3.4:80?timeout_ms=1x", "timeout_ms=1x: not a whole number"},
        {"tcp://1.2.3.4:80?timeout_ms=86400001", "timeout_ms=86400001: at most 86400000"},
        {"tcp://1.2.3.4:80?timeout_ms=99999999999999999999", "timeout_ms=9223372036854775807: at most"},
        {"tcp://1.2.3.4:80?short_names=2", "short_names=2: at most 1"},
        {"tcp://1.2.3.4:80?group=x", "URL option group=x: not known for tcp://"},
        {"tcp://1.2.3.4:80?timeout_ms", "URL option \"timeout_ms\" is not key=value"},
        {"tcp://1.2.3.4:80?a=%zz", "URL option \"a\" is not key=value, or a %XX in it is not two"},
        {"tcp://no.such.host.invalid:80", "host \"no.such.host.invalid\": getaddrinfo: "},
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

static void hook_options(crpc_channel_options *o, int *calls)
{
    *calls = 0;
    memset(o, 0, sizeof *o);
    o->private_loop.hooks.user = calls;
    o->private_loop.hooks.resolve = hook_resolves;
    o->policy.timeout_ms = NET_PATIENCE;
}

static void names_are_resolved_by_the_hook(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    peer adds;
    char url[64];
    int calls;
    (void)state;
    hook_options(&o, &calls);
    peer_open(&adds, peer_adds, NULL);
    snprintf(url, sizeof url, "tcp://both:%d", adds.port);
    assert_int_equal(crpc_channel_open(&ch, url, &o, &error), CRPC_OK);
    assert_int_equal(calls, 1);
    net_check_add(ch, 1);
    assert_int_equal(calls, 1);
    crpc_channel_close(ch);
    peer_close(&adds);
}

static void names_that_the_hook_cannot_resolve_are_an_error(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    int calls;
    (void)state;
    hook_options(&o, &calls);
    assert_int_equal(crpc_channel_open(&ch, "tcp://rubbish:1", &o, &error), CRPC_ERESOLVE);
    assert_int_equal(crpc_channel_open(&ch, "tcp://none:1", &o, &error), CRPC_ERESOLVE);
    assert_int_equal(calls, 2);
}

static void the_hook_is_not_asked_for_an_address(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    crpc_error error;
    int calls;
    (void)state;
    hook_options(&o, &calls);
    assert_int_equal(crpc_channel_open(&ch, "tcp://[::1]:1", &o, &error), CRPC_OK);
    crpc_channel_close(ch);
    assert_int_equal(calls, 0);
}

static int hook_knows_three(void *user, const char *host, char *addresses, size_t size)
{
    (void)user;
    snprintf(addresses, size, strcmp(host, "many") == 0 ? "10.0.0.1,::1,10.0.0.2" : "10.0.0.1");
    return CRPC_OK;
}

static void a_name_stands_for_all_its_addresses(void **state)
{
    static const struct {
        const char *url;
        const char *providers; /* sorted; each address counts once */
    } cases[] = {
        {"tcp://many:80", "10.0.0.1:80 10.0.0.2:80 [::1]:80 "},
        {"list://many:80,10.0.0.9:81", "10.0.0.1:80 10.0.0.2:80 10.0.0.9:81 [::1]:80 "},
        {"list://10.0.0.9:81,one:80,many:80", "10.0.0.1:80 10.0.0.2:80 10.0.0.9:81 [::1]:80 "},
        {"list://10.0.0.9:81,one:80,10.0.0.9:81", "10.0.0.1:80 10.0.0.9:81 "},
    };
    crpc_channel_options o = CRPC_INIT;
    size_t i, k;
    (void)state;
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.resolve = hook_knows_three;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        char providers[200] = "";
        crpc_channel *ch;
        crpc_error error;
        if (crpc_channel_open(&ch, cases[i].url, &o, &error))
            fail_msg("%s", error.text);
        for (k = 0; k < crpc_channel_providers(ch); k++) {
            strcat(providers, crpci_providers_at(&ch->providers, k)->endpoint->address);
            strcat(providers, " ");
        }
        assert_string_equal(providers, cases[i].providers);
        crpc_channel_close(ch);
    }
}

static void wrong_policies_are_refused(void **state)
{
    static const char *const bad[][2] = {
        {"lb=best", "lb=best: not one of random,wrandom,rr,wrr,la,hash,p2c"},
        {"lb=", "lb=: not one of random,wrandom,rr,wrr,la,hash,p2c"},
        {"lb=3", "lb=3: not one of random,wrandom,rr,wrr,la,hash,p2c"},
        {"cluster=fail",
         "cluster=fail: not one of failover,failfast,failsafe,failback,forking,broadcast"},
        {"breaker=2", "breaker=2: at most 1"},
        {"forks=x", "forks=x: not a whole number from -1 on"},
        {"fail_percent=101", "fail_percent=101: at most 100"},
        {"timeout_ms=99999999999", "timeout_ms=99999999999: at most 86400000"},
        {"credential=hush", "credential: a secret must not stand in a URL: set it in the options "
                            "or a configuration line"},
        {"group=g", "URL option group=g: not known for tcp://"},
        {"listen=x", "URL option listen=x: not known for tcp://"},
    };
    crpc_method_options method = CRPC_INIT;
    crpc_channel_options o = CRPC_INIT;
    crpc_channel *ch;
    crpc_error error;
    char url[80];
    size_t i;
    (void)state;
    o.policy.cluster = (crpc_cluster)7;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "cluster=7: at most 6");
    o.policy.cluster = CRPC_CLUSTER_DEFAULT;
    o.balancer = (crpc_balancer)8;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "lb=8: at most 7");
    o.balancer = CRPC_BALANCER_DEFAULT;
    o.private_loop.stack_size = 1;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "stack_size=1: at least 16384");
    o.private_loop.stack_size = 0;
    o.methods = &method;
    o.method_count = 1;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "methods[0].method is NULL");
    method.method = dyn_Echo_Add_method;
    method.policy.retries = 17;
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "retries=17: at most 16");
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        snprintf(url, sizeof url, "tcp://127.0.0.1:9?%s", bad[i][0]);
        assert_int_equal(crpc_channel_open(&ch, url, NULL, &error), CRPC_EINVAL);
        assert_string_equal(error.text, bad[i][1]);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(closing_reports_what_was_sent),
        CT_TEST(closing_cancels_every_form_once),
        CT_TEST(closing_inside_a_callback),
        CT_TEST(closing_inside_a_callback_cancels_the_rest),
        CT_TEST(bad_urls_are_explained),
        CT_TEST(names_are_resolved_by_the_hook),
        CT_TEST(a_name_stands_for_all_its_addresses),
        CT_TEST(names_that_the_hook_cannot_resolve_are_an_error),
        CT_TEST(the_hook_is_not_asked_for_an_address),
        CT_TEST(wrong_policies_are_refused),
    };
    return CT_RUN(tests);
}
