/* The providers of a channel: lists, weights, balancing, subsets, warm-up, breakers. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static void peers_open(peer *p, char *list, size_t size)
{
    int i;
    for (i = 0; i < 3; i++)
        peer_open(&p[i], peer_adds, NULL);
    snprintf(list, size, "list://127.0.0.1:%d,127.0.0.1:%d,127.0.0.1:%d", p[0].port, p[1].port,
             p[2].port);
}

static void equal_providers_get_equal_shares(void **state)
{
    peer p[3];
    char list[200];
    crpc_channel *ch;
    int i;
    (void)state;
    peers_open(p, list, sizeof list);
    ch = net_channel(list, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    assert_int_equal(crpc_channel_providers(ch), 3);
    for (i = 0; i < 30; i++)
        net_check_add(ch, i);
    for (i = 0; i < 3; i++)
        assert_int_equal(peer_requests(&p[i]), 10);
    crpc_channel_close(ch);
    for (i = 0; i < 3; i++)
        peer_close(&p[i]);
}

static void no_call_fails_when_a_provider_ends(void **state)
{
    peer p[3];
    char list[200];
    crpc_channel *ch;
    int i;
    (void)state;
    peers_open(p, list, sizeof list);
    ch = net_channel(list, "?timeout_ms=20000", CRPC_POLLER_DEFAULT, NULL, NULL);
    for (i = 0; i < 3; i++)
        net_check_add(ch, i);
    peer_close(&p[1]);
    for (i = 0; i < 30; i++) {
        ct_sleep_ms(i == 0 ? 30 : 0); /* the channel can see the end of its connection */
        net_check_add(ch, i);
    }
    crpc_channel_close(ch);
    peer_close(&p[0]);
    peer_close(&p[2]);
}

static crpci_endpoint *pick(crpc_channel *ch, crpci_pending_call *c)
{
    crpci_member *n;
    c->channel = ch;
    crpci_loop_lock(ch->loop);
    n = crpci_attempt_pick(c);
    crpci_loop_unlock(ch->loop);
    assert_non_null(n);
    return n->endpoint;
}

/* Three providers behind round robin, and the order in which they are picked. */
typedef struct turns {
    crpc_loop *loop;
    crpc_channel *channel;
    crpci_pending_call call;
    crpci_endpoint *order[3];
} turns;

static void turns_open(turns *t)
{
    crpc_channel_options o = CRPC_INIT;
    size_t i;
    memset(t, 0, sizeof *t);
    t->loop = net_loop(CRPC_POLLER_DEFAULT);
    o.loop = t->loop;
    assert_int_equal(crpc_channel_open(&t->channel,
                                       "list://127.0.0.1:9,127.0.0.1:10,127.0.0.1:11?lb=rr", &o,
                                       NULL),
                     CRPC_OK);
    for (i = 0; i < 3; i++)
        t->order[i] = pick(t->channel, &t->call);
}

static void turns_close(turns *t)
{
    crpc_channel_close(t->channel);
    crpc_loop_close(t->loop);
}

static void providers_are_picked_in_turn(void **state)
{
    turns t;
    size_t i;
    (void)state;
    turns_open(&t);
    assert_ptr_not_equal(t.order[0], t.order[1]);
    assert_ptr_not_equal(t.order[1], t.order[2]);
    assert_ptr_not_equal(t.order[0], t.order[2]);
    for (i = 0; i < 30; i++)
        assert_ptr_equal(pick(t.channel, &t.call), t.order[i % 3]);
    turns_close(&t);
}

/* A provider that backs off is passed over while another one is usable. If all back off, the one
 * that becomes usable first is taken. */
static void a_provider_that_backs_off_is_passed_over(void **state)
{
    turns t;
    size_t i;
    (void)state;
    turns_open(&t);
    t.order[1]->usable_at = INT64_MAX;
    for (i = 0; i < 30; i++)
        assert_ptr_not_equal(pick(t.channel, &t.call), t.order[1]);
    t.order[0]->usable_at = INT64_MAX - 1;
    t.order[2]->usable_at = INT64_MAX - 2;
    assert_ptr_equal(pick(t.channel, &t.call), t.order[2]);
    turns_close(&t);
}

/* A provider that did not connect gets no call while another one can have it; when its backoff is
 * over, a call that passes over it has the loop dial in the background. */
static void a_provider_that_did_not_connect_is_dialled_in_the_background(void **state)
{
    turns t;
    size_t i;
    (void)state;
    turns_open(&t);
    t.order[1]->refused = true;
    for (i = 0; i < 30; i++)
        assert_ptr_not_equal(pick(t.channel, &t.call), t.order[1]);
    assert_int_equal(t.order[1]->dialled_at, 0);
    while (!t.order[1]->failures) /* nobody listens at its port */
        assert_int_equal(crpc_loop_step(t.loop, 1), CRPC_OK);
    assert_true(t.order[1]->dialled_at > 0);
    assert_true(t.order[1]->refused);
    t.order[0]->refused = t.order[2]->refused = true;
    t.order[2]->usable_at = 0;
    t.order[0]->usable_at = t.order[1]->usable_at = INT64_MAX;
    assert_ptr_equal(pick(t.channel, &t.call), t.order[2]); /* no other one is left */
    turns_close(&t);
}

static void a_provider_that_was_tried_is_not_picked_again(void **state)
{
    turns t;
    (void)state;
    turns_open(&t);
    t.order[0]->usable_at = INT64_MAX - 1;
    t.order[1]->usable_at = INT64_MAX;
    t.call.tried.last[0] = t.order[2];
    t.call.tried.attempts = 1;
    assert_ptr_equal(pick(t.channel, &t.call), t.order[0]);
    t.call.tried.last[1] = t.order[0];
    t.call.tried.last[2] = t.order[1];
    t.call.tried.attempts = 3;
    crpci_loop_lock(t.channel->loop);
    assert_null(crpci_attempt_pick(&t.call));
    crpci_loop_unlock(t.channel->loop);
    turns_close(&t);
}

/* The breaker opens after the documented number of failures; later one call probes the provider,
 * and when that succeeds the breaker closes. */
static void the_breaker_takes_a_provider_out_and_lets_it_back(void **state)
{
    fleet f;
    int i, before;
    (void)state;
    fleet_open(&f, 2,
               "?lb=rr&breaker=1&breaker_requests=10&breaker_open_ms=2000&breaker_ramp_ms=-1"
               "&retries=-1&timeout_ms=20000",
               NULL);
    fleet_mood_set(&f.peers[0], FLEET_BROKEN);
    for (i = 0; i < 20; i++)
        fleet_call(&f, FORM_SYNC, false, i, NULL);
    before = net_calls(&f.peers[0].service);
    assert_int_equal(before, 10);
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    fleet_mood_set(&f.peers[0], FLEET_WELL);
    for (i = 0; i < NET_PATIENCE && net_calls(&f.peers[0].service) < before + 5; i++) {
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
        ct_sleep_ms(1);
    }
    assert_true(net_calls(&f.peers[0].service) >= before + 5);
    fleet_close(&f);
}

/* The breaker never ejects more than half of the providers, so calls go on even if all fail. */
static void the_breaker_does_not_eject_everyone(void **state)
{
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 4,
               "?lb=rr&breaker=1&breaker_requests=5&breaker_open_ms=60000&retries=-1"
               "&timeout_ms=20000",
               NULL);
    for (i = 0; i < 4; i++)
        fleet_mood_set(&f.peers[i], FLEET_BROKEN);
    for (i = 0; i < 100; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_EINTERNAL);
    assert_int_equal(fleet_calls(&f), 100); /* each was tried on the wire */
    for (i = 0; i < 4; i++)
        fleet_mood_set(&f.peers[i], FLEET_WELL);
    for (i = 0; i < 20; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    fleet_close(&f);
}

/* Gives the channel a list as a registry does; a negative weight leaves a peer out. */
static void fleet_list(fleet *f, const int *weights)
{
    crpci_snapshot *list = crpci_directory_snapshot(f->channel->loop->heap, (size_t)f->count);
    size_t n = 0;
    int i;
    assert_non_null(list);
    for (i = 0; i < f->count; i++) {
        if (weights[i] < 0)
            continue;
        snprintf(list->providers[n].address, CRPC_ADDRESS_MAX, "%s", f->peers[i].address);
        list->providers[n++].weight = weights[i];
    }
    list->count = n;
    crpci_directory_sort(list);
    assert_int_equal(crpci_opening_on_list(f->channel, list), CRPC_OK);
    crpci_directory_snapshot_unref(list);
}

static void weights_share_out_the_calls(void **state)
{
    static const int weights[] = {50, 150, 0}, others[] = {100, -1, 100};
    fleet f;
    int i;
    (void)state;
    fleet_open(&f, 3, "?timeout_ms=20000", NULL);
    fleet_list(&f, weights);
    assert_int_equal(crpc_channel_providers(f.channel), 3);
    for (i = 0; i < 80; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_in_range(net_calls(&f.peers[0].service), 19, 21);
    assert_in_range(net_calls(&f.peers[1].service), 59, 61);
    assert_int_equal(net_calls(&f.peers[2].service), 0);
    fleet_list(&f, others);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    for (i = 0; i < 40; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_in_range(net_calls(&f.peers[2].service), 19, 21);
    fleet_close(&f);
}

/* A provider that is no longer listed keeps its connection until its last call has ended. */
static void a_removed_provider_finishes_its_calls(void **state)
{
    static const int without[] = {-1, 100};
    fleet f;
    fleet_result r;
    dyn_Num request = net_num(8);
    crpc_context *x;
    crpc_loop_stats s;
    (void)state;
    memset(&r, 0, sizeof r);
    fleet_open(&f, 2, "?lb=rr&timeout_ms=20000", NULL);
    fleet_mood_set(&f.peers[0], FLEET_SILENT);
    fleet_mood_set(&f.peers[1], FLEET_SILENT);
    assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
    assert_true(CT_WAIT(fleet_calls(&f) == 1, NET_PATIENCE));
    if (net_held(&f.peers[0].service) == 0) { /* the call went to the other one: make another */
        fleet_result second;
        memset(&second, 0, sizeof second);
        crpc_context_finish(net_take(&f.peers[1].service), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
        memset(&r, 0, sizeof r);
        assert_int_equal(dyn_Echo_Add_async(f.channel, &request, fleet_done, &r, NULL), CRPC_OK);
        assert_true(CT_WAIT(net_held(&f.peers[0].service) == 1, NET_PATIENCE));
    }
    fleet_list(&f, without);
    fleet_mood_set(&f.peers[1], FLEET_WELL);
    net_check_add(f.channel, 3);
    assert_int_equal(r.done, 0);
    x = net_take(&f.peers[0].service);
    assert_non_null(x);
    assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&r.done, __ATOMIC_SEQ_CST), NET_PATIENCE));
    assert_int_equal(r.status, CRPC_OK);
    assert_int_equal(r.out.n, 9);
    crpc_server_stats_get(f.peers[0].server, &s);
    assert_true(
        CT_WAIT((crpc_server_stats_get(f.peers[0].server, &s), s.connections == 0), NET_PATIENCE));
    fleet_close(&f);
}

/* Equal keys go to one provider, whether given or taken from the request. */
static void equal_keys_go_to_one_provider(void **state)
{
    fleet f;
    int i, k, used[4] = {0, 0, 0, 0};
    (void)state;
    fleet_open(&f, 4, "?lb=hash&hash_field=1&timeout_ms=20000", NULL);
    for (k = 0; k < 40; k++) {
        char key[16];
        crpc_call call = CRPC_INIT;
        int64_t by_key = -1, by_field = -1;
        snprintf(key, sizeof key, "key %d", k);
        call.key = crpc_view_str(key);
        for (i = 0; i < 3; i++) {
            fleet_result r = fleet_call(&f, FORM_SYNC, false, i, &call);
            assert_int_equal(r.status, CRPC_OK);
            assert_true(by_key < 0 || by_key == r.out.ms);
            by_key = r.out.ms;
            r = fleet_call(&f, FORM_ASYNC, false, k + 1, NULL);
            assert_true(by_field < 0 || by_field == r.out.ms);
            by_field = r.out.ms;
        }
        used[by_key]++;
    }
    for (i = 0; i < 4; i++)
        assert_true(used[i] > 0);
    fleet_close(&f);
}

/* A channel to six providers of which it uses two. */
static void subset_open(fleet *f)
{
    static const int all[] = {100, 100, 100, 100, 100, 100};
    fleet_open(f, 6, "?max_endpoints=2&lb=rr&timeout_ms=20000", NULL);
    fleet_list(f, all);
}

static void max_endpoints_bounds_connections(void **state)
{
    crpc_loop_stats s;
    fleet f;
    int i;
    (void)state;
    subset_open(&f);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    for (i = 0; i < 30; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    crpc_loop_stats_get(crpc_channel_loop(f.channel), &s);
    assert_int_equal(s.connections, 2);
    fleet_close(&f);
}

static void providers_that_end_are_replaced_by_others(void **state)
{
    crpc_loop_stats s;
    fleet f;
    int i;
    (void)state;
    subset_open(&f);
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    for (i = 0; i < 6; i++) {
        if (net_calls(&f.peers[i].service))
            fleet_peer_close(&f.peers[i]);
    }
    for (i = 0; i < NET_PATIENCE; i += 5) {
        if (fleet_call(&f, FORM_SYNC, false, i, NULL).status == CRPC_OK)
            break;
        ct_sleep_ms(5);
    }
    memset(&s, 0, sizeof s);
    for (i = 0; i < NET_PATIENCE && s.connections != 2; i += 5) {
        fleet_call(&f, FORM_SYNC, false, i, NULL);
        crpc_loop_stats_get(crpc_channel_loop(f.channel), &s);
        ct_sleep_ms(5);
    }
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    assert_int_equal(crpc_channel_providers(f.channel), 2);
    fleet_close(&f);
}

/* max_endpoints holds for the providers of a list:// URL as well. */
static void max_endpoints_of_a_url_are_chosen_again(void **state)
{
    fleet f;
    int i, status = CRPC_ECONN;
    (void)state;
    fleet_open(&f, 4, "?max_endpoints=2&lb=rr&timeout_ms=20000", NULL);
    for (i = 0; i < 10; i++)
        assert_int_equal(fleet_call(&f, FORM_SYNC, false, i, NULL).status, CRPC_OK);
    for (i = 0; i < 4; i++) {
        if (net_calls(&f.peers[i].service))
            fleet_peer_close(&f.peers[i]);
    }
    for (i = 0; i < 5000 && status; i += 5) {
        status = fleet_call(&f, FORM_SYNC, false, i, NULL).status;
        ct_sleep_ms(5);
    }
    assert_int_equal(status, CRPC_OK);
    fleet_close(&f);
}

/* A provider that does not say when it started warms up once, however often the list changes. */
static void a_list_does_not_begin_a_warm_up_again(void **state)
{
    crpc_channel_options o = CRPC_INIT;
    crpci_snapshot *list;
    crpc_channel *ch;
    int i;
    (void)state;
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.clock_us = net_clock_us;
    net_time_begin(NET_TIME_STANDS);
    assert_int_equal(crpc_channel_open(&ch, "tcp://127.0.0.1:9", &o, NULL), CRPC_OK);
    list = crpci_directory_snapshot(ch->loop->heap, 1);
    assert_non_null(list);
    strcpy(list->providers[0].address, "127.0.0.1:9");
    list->providers[0].weight = 100;
    list->providers[0].warmup_ms = 10000;
    for (i = 0; i < 10; i++) {
        assert_int_equal(crpci_opening_on_list(ch, list), CRPC_OK);
        net_time_add(1000);
    }
    assert_in_range(crpci_providers_at(&ch->providers, 0)->balance.weight, 89, 91);
    crpci_directory_snapshot_unref(list);
    crpc_channel_close(ch);
}

/* A flood of providers and changes: the list stays right, and nothing piles up. */
static void a_flood_of_changes_is_followed(void **state)
{
    enum { MANY = 2000, CHANGES = 1000, CHURN = 20 };
    static const char *const balancers[] = {"wrr", "rr", "wrandom", "la", "p2c"};
    crpc_channel_options o = CRPC_INIT;
    crpc_loop_stats before, after;
    crpci_pending_call c;
    size_t b;
    (void)state;
    memset(&c, 0, sizeof c);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    for (b = 0; b < sizeof balancers / sizeof *balancers; b++) {
        crpc_channel *ch;
        uint32_t dice = 12345;
        char url[80];
        int i, k;
        snprintf(url, sizeof url, "tcp://127.0.0.1:9?lb=%s", balancers[b]);
        assert_int_equal(crpc_channel_open(&ch, url, &o, NULL), CRPC_OK);
        memset(&before, 0, sizeof before);
        for (i = 0; i < CHANGES / (int)(sizeof balancers / sizeof *balancers); i++) {
            crpci_snapshot *list = crpci_directory_snapshot(ch->loop->heap, MANY);
            const crpci_member *n;
            assert_non_null(list);
            for (k = 0; k < MANY; k++) {
                /* 20 of them change their address, their weight, or both */
                uint32_t generation = k < CHURN ? (dice = dice * 1664525 + 1013904223) >> 20 : 0;
                snprintf(list->providers[k].address, CRPC_ADDRESS_MAX, "10.%d.%u.%u:8000", k >> 8,
                         generation & 255, (unsigned)k & 255);
                list->providers[k].weight = 1 + (int)(generation >> 8);
            }
            crpci_directory_sort(list);
            assert_int_equal(list->count, MANY);
            assert_int_equal(crpci_opening_on_list(ch, list), CRPC_OK);
            assert_int_equal(crpc_channel_providers(ch), MANY);
            for (k = 0; k < MANY; k += 97)
                assert_string_equal(crpci_providers_at(&ch->providers, (size_t)k)->endpoint->address,
                                    list->providers[k].address);
            c.channel = ch;
            crpci_loop_lock(ch->loop);
            n = crpci_attempt_pick(&c);
            crpci_loop_unlock(ch->loop);
            assert_non_null(n);
            assert_ptr_equal(crpci_providers_at(&ch->providers, n->balance.index), n);
            crpci_directory_snapshot_unref(list);
            crpc_loop_stats_get(ch->loop, i == 2 ? &before : &after);
        }
        assert_true(after.memory <= before.memory + before.memory / 50);
        crpc_channel_close(ch);
    }
}

/* The process has no descriptor left: calls go to the provider that is connected, whatever turn it
 * is, and neither providers nor the retry budget are charged. */
static void calls_go_to_connected_providers_when_descriptors_run_out(void **state)
{
    enum { PEERS = 4 };
    static const char *const balancers[] = {"rr", "wrr", "random", "la", "p2c"};
    size_t b;
    (void)state;
    for (b = 0; b < sizeof balancers / sizeof *balancers; b++) {
        peer p[PEERS];
        char list[200] = "list://", query[100];
        crpc_channel *ch;
        struct rlimit limit, none;
        int i, free_fd;
        for (i = 0; i < PEERS; i++) {
            peer_open(&p[i], peer_adds, NULL);
            snprintf(list + strlen(list), sizeof list - strlen(list), "%s127.0.0.1:%d",
                     i ? "," : "", p[i].port);
        }
        snprintf(query, sizeof query, "?lb=%s&retries=-1&breaker=1&timeout_ms=20000", balancers[b]);
        ch = net_channel(list, query, CRPC_POLLER_DEFAULT, NULL, NULL);
        net_check_add(ch, 0);
        assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
        none = limit;
        free_fd = dup(0);
        close(free_fd);
        none.rlim_cur = (rlim_t)free_fd;
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
        for (i = 0; i < 40; i++) {
            dyn_Num in = net_num(i), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            int err = dyn_Echo_Add(ch, &in, &out, &call);
            crpc_call_reset(&call);
            if (err) {
                setrlimit(RLIMIT_NOFILE, &limit);
                fail_msg("%s, call %d: %s", balancers[b], i, call.error.text);
            }
        }
        assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
        assert_int_equal(ch->budget.tokens.tenths, ch->budget.tokens.most);
        for (i = 0; i < PEERS; i++) {
            const crpci_member *m = crpci_providers_at(&ch->providers, (size_t)i);
            assert_int_equal(m->breaker.slices[m->breaker.slice & (CRPCI_BREAKER_SLICES - 1)].errors,
                             0);
            assert_false(crpci_endpoint_is_dead(m->endpoint));
        }
        crpc_channel_close(ch);
        for (i = 0; i < PEERS; i++)
            peer_close(&p[i]);
    }
}

/* --- a provider that answers with errors at once, in a time that only the test moves ------------ */

static int64_t crowd_now_us;

static int64_t crowd_clock(void *user)
{
    (void)user;
    return crowd_now_us;
}

enum { CROWD_CALLERS = 8, CROWD_PROVIDERS = 4 };

/* Callers that call on and on, one attempt a call, without a socket. */
typedef struct crowd {
    crpc_channel *channel;
    int code; /* what the first provider answers within 100 us. 0: it is well */
    crpci_member *at[CROWD_CALLERS];
    int64_t start_us[CROWD_CALLERS], end_us[CROWD_CALLERS];
    int calls, failed, first; /* since crowd_run began; those that went to the first provider */
} crowd;

static void crowd_begin(crowd *c, int i)
{
    crpci_providers *p = &c->channel->providers;
    crpci_tried tried;
    uint32_t ms;
    bool first;
    memset(&tried, 0, sizeof tried);
    c->at[i] = crpci_providers_pick(p, &tried, NULL, 1 + ct_random());
    assert_non_null(c->at[i]);
    first = c->at[i]->balance.index == 0;
    ms = 8 + (uint32_t)(ct_random() % 4);
    c->start_us[i] = crowd_now_us;
    c->end_us[i] = crowd_now_us + (first && c->code ? 100 : ms * 1000);
    crpci_providers_begin(p, c->at[i], crowd_now_us);
}

static void crowd_end(crowd *c, int i)
{
    bool first = c->at[i]->balance.index == 0;
    int code = first ? c->code : 0;
    c->calls++;
    c->failed += code != 0;
    c->first += first;
    crpci_providers_end(&c->channel->providers, c->at[i], crpci_attempt_outcome(code),
                        crowd_now_us - c->start_us[i], crowd_now_us);
    c->at[i] = NULL;
}

/* Lets the callers call for some seconds. */
static void crowd_run(crowd *c, int code, int seconds)
{
    crpc_loop *l = c->channel->loop;
    int64_t until = crowd_now_us + seconds * INT64_C(1000000);
    int i, next;
    c->code = code;
    c->calls = c->failed = c->first = 0;
    crpci_loop_lock(l);
    while (crowd_now_us < until) {
        l->fresh = false;
        for (i = 0; i < CROWD_CALLERS; i++) {
            if (!c->at[i])
                crowd_begin(c, i);
        }
        for (next = i = 0; i < CROWD_CALLERS; i++)
            next = c->end_us[i] < c->end_us[next] ? i : next;
        crowd_now_us = c->end_us[next];
        l->fresh = false;
        crowd_end(c, next);
    }
    crpci_loop_unlock(l);
}

static void crowd_open(crowd *c, const char *query)
{
    crpc_channel_options o = CRPC_INIT;
    char url[200];
    memset(c, 0, sizeof *c);
    crowd_now_us = INT64_C(1000000000);
    o.private_loop = net_loop_options(CRPC_POLLER_DEFAULT);
    o.private_loop.hooks.clock_us = crowd_clock;
    snprintf(url, sizeof url, "list://127.0.0.1:1,127.0.0.1:2,127.0.0.1:3,127.0.0.1:4%s", query);
    assert_int_equal(crpc_channel_open(&c->channel, url, &o, NULL), CRPC_OK);
}

static void crowd_close(crowd *c)
{
    int i;
    crpci_loop_lock(c->channel->loop);
    for (i = 0; i < CROWD_CALLERS; i++) {
        if (c->at[i])
            crowd_end(c, i);
    }
    crpci_loop_unlock(c->channel->loop);
    crpc_channel_close(c->channel);
}

/* At most 1 per cent of the calls go to a provider that refuses at once, whatever the balancer, with
 * and without a breaker. When it has room again it gets its share back. */
static void a_provider_that_refuses_does_not_attract_calls(void **state)
{
    static const char *const balancers[] = {"rr", "wrr", "random", "wrandom", "la", "hash", "p2c"};
    size_t i;
    (void)state;
    for (i = 0; i < 2 * sizeof balancers / sizeof *balancers; i++) {
        crowd c;
        char query[64];
        snprintf(query, sizeof query, "?lb=%s&breaker=%d", balancers[i / 2], (int)(i & 1));
        crowd_open(&c, query);
        crowd_run(&c, 0, 5);
        crowd_run(&c, CRPC_ELIMIT, 20);
        if (c.failed * 100 > c.calls)
            fail_msg("%s: %d of %d calls failed", query, c.failed, c.calls);
        crowd_run(&c, 0, 60);
        crowd_run(&c, 0, 10);
        if (c.first * 100 < c.calls * 15)
            fail_msg("%s: %d of %d calls, and it is well again", query, c.first, c.calls);
        crowd_close(&c);
    }
}

/* Under least active a provider that fails at once has no calls in flight. */
static void a_provider_that_fails_at_once_does_not_attract_calls(void **state)
{
    crowd c;
    (void)state;
    crowd_open(&c, "?lb=la");
    crowd_run(&c, CRPC_EINTERNAL, 20);
    if (c.failed * 100 > c.calls)
        fail_msg("%d of %d calls failed", c.failed, c.calls);
    crowd_run(&c, 0, 3);
    crowd_run(&c, 0, 10);
    assert_true(c.first * 100 >= c.calls * 15);
    crowd_close(&c);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(equal_providers_get_equal_shares),
        CT_TEST(no_call_fails_when_a_provider_ends),
        CT_TEST(providers_are_picked_in_turn),
        CT_TEST(a_provider_that_backs_off_is_passed_over),
        CT_TEST(a_provider_that_did_not_connect_is_dialled_in_the_background),
        CT_TEST(a_provider_that_was_tried_is_not_picked_again),
        CT_TEST(the_breaker_takes_a_provider_out_and_lets_it_back),
        CT_TEST(the_breaker_does_not_eject_everyone),
        CT_TEST(weights_share_out_the_calls),
        CT_TEST(a_removed_provider_finishes_its_calls),
        CT_TEST(equal_keys_go_to_one_provider),
        CT_TEST(max_endpoints_bounds_connections),
        CT_TEST(providers_that_end_are_replaced_by_others),
        CT_TEST(max_endpoints_of_a_url_are_chosen_again),
        CT_TEST(a_list_does_not_begin_a_warm_up_again),
        CT_TEST(a_flood_of_changes_is_followed),
        CT_TEST(calls_go_to_connected_providers_when_descriptors_run_out),
        CT_TEST(a_provider_that_refuses_does_not_attract_calls),
        CT_TEST(a_provider_that_fails_at_once_does_not_attract_calls),
    };
    return CT_RUN(tests);
}
