/* Who a server serves: credentials, identities, and what a refused peer can still do. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

/* --- an authenticator that accepts "secret-NAME" as NAME -------------------------------------- */

#define DOOR_SEEN 512

typedef struct door door;
struct door {
    pthread_mutex_t lock;
    net *n;
    void (*inside)(door *d); /* what the authenticator does besides; NULL: nothing */
    void *user;
    bool shared; /* the channel and the authenticator are on one loop */
    uint32_t entered, leave; /* atomic: authenticators that began; one that waits may go on */
    int asked, served, refused;
    int refusals;
    bool by_request; /* "secret-old" is refused by the interceptor */
    int valid_ms; /* of each success */
    const char *revoked; /* a credential that is no longer accepted */
    char peer[64];
    char seen[DOOR_SEEN][CRPC_IDENTITY_MAX]; /* identities of the requests, in order */
    crpc_server_interceptor interceptor;
};

#define DOOR_INIT {.asked = 0}

static int door_judge(void *user, const char *from, crpc_view credential, crpc_identity *identity)
{
    door *d = (door *)user;
    char text[CRPC_IDENTITY_MAX];
    bool revoked;
    __atomic_add_fetch(&d->entered, 1, __ATOMIC_ACQ_REL);
    if (d->inside)
        d->inside(d);
    pthread_mutex_lock(&d->lock);
    d->asked++;
    revoked = d->revoked && crpc_view_equal(credential, d->revoked);
    snprintf(d->peer, sizeof d->peer, "%s", from);
    identity->valid_ms = d->valid_ms;
    pthread_mutex_unlock(&d->lock);
    crpc_view_copy(credential, text, sizeof text);
    if (revoked || strncmp(text, "secret-", 7) != 0)
        return CRPC_EAUTH;
    strcpy(identity->name, text + 7);
    return CRPC_OK;
}

/* Without the authenticator it judges each request, and the connection stays. */
static int door_before(void *user, crpc_context *x)
{
    door *d = (door *)user;
    pthread_mutex_lock(&d->lock);
    if (d->by_request && crpc_view_equal(crpc_context_credential(x), "secret-old")) {
        d->refused++;
        while (d->refused < d->refusals) { /* all are on their way before the first is refused */
            pthread_mutex_unlock(&d->lock);
            ct_sleep_ms(1);
            pthread_mutex_lock(&d->lock);
        }
        pthread_mutex_unlock(&d->lock);
        return CRPC_EAUTH;
    }
    assert_true(d->served < DOOR_SEEN);
    strcpy(d->seen[d->served++], crpc_context_identity(x));
    pthread_mutex_unlock(&d->lock);
    return CRPC_OK;
}

static int door_asked(door *d)
{
    int n;
    pthread_mutex_lock(&d->lock);
    n = d->asked;
    pthread_mutex_unlock(&d->lock);
    return n;
}

static void guarded_open(net *n, door *d, crpc_poller p, net_mode m)
{
    bool by_request = d->by_request;
    memset(d, 0, sizeof *d);
    pthread_mutex_init(&d->lock, NULL);
    d->by_request = by_request;
    d->n = n;
    d->interceptor.before = door_before;
    d->interceptor.user = d;
    n->server_options.access.authenticate = by_request ? NULL : door_judge;
    n->server_options.access.authenticate_user = d;
    n->server_options.interceptors = &d->interceptor;
    n->server_options.interceptor_count = 1;
    net_open(n, p, m);
}

static void guarded_close(net *n, door *d)
{
    net_close(n);
    pthread_mutex_destroy(&d->lock);
}

/* --- requests with credentials, by hand ------------------------------------------------------- */

/* The head of a request whose frame has a body of `body` bytes. `credential` NULL: none. `rid`: its
 * id, or, if it begins with "=", its ordering key. */
static void put_head(wire *w, const char *method, int64_t id, const void *credential, size_t size,
                     const char *rid, size_t body)
{
    const char *fields[] = {rid && rid[0] == '=' ? "crpc-key" : "crpc-rid", rid, NULL};
    wire_request_head(w, method, id, credential, size, 0, rid ? fields : NULL, body);
}

static void put_request(wire *w, const char *method, int64_t id, const char *credential,
                        const char *rid)
{
    put_head(w, method, id, credential, credential ? strlen(credential) : 0, rid, 2);
    wire_put(w, "\x08\x05", 2);
}

static void send_request(int fd, const char *method, int64_t id, const char *credential,
                         const char *rid)
{
    wire w = {NULL, 0, 0};
    put_request(&w, method, id, credential, rid);
    assert_true(wire_flush(fd, &w));
}

static int64_t ask(int fd, int64_t id, const char *credential)
{
    send_request(fd, "Add", id, credential, NULL);
    return net_reply_code(fd, id, NULL);
}

/* The server has closed the connection, in order or, with input unread, by a reset. */
static void is_closed(int fd)
{
    wire_message m;
    assert_true(wire_receive(fd, &m) <= 0);
    close(fd);
}

/* --- tests ------------------------------------------------------------------------------------ */

static void a_credential_in_the_first_frame_serves_for_the_connection(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        door d = DOOR_INIT;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        n.channel_options.security.credential = "secret-channel";
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 5; i++)
            assert_int_equal(ask(fd, i, i ? NULL : "secret-board"), CRPC_OK);
        assert_int_equal(door_asked(&d), 1);
        assert_int_equal(strncmp(d.peer, "127.0.0.1:", 10), 0);
        for (i = 0; i < 5; i++)
            assert_string_equal(d.seen[i], "board");
        for (i = 0; i < 3; i++) /* crpc's own channels send it always, as jprotobuf does */
            net_check_add(n.channel, i);
        assert_int_equal(door_asked(&d), 2);
        assert_string_equal(d.seen[7], "channel");
        close(fd);
        guarded_close(&n, &d);
    }
}

/* A request with the fields that brpc writes, in its order. */
static void put_brpc(wire *w, int64_t id, const char *credential)
{
    wire meta = {NULL, 0, 0}, request = {NULL, 0, 0};
    wire_str(&request, 1, "dyn.Echo");
    wire_str(&request, 2, "Add");
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 3, 0);
    wire_int(&meta, 4, id);
    if (credential)
        wire_str(&meta, 7, credential);
    wire_int(&meta, 10, 0);
    wire_int(&meta, 11, 0);
    wire_str(&meta, 12, "");
    wire_frame(w, &meta, "\x08\x05", 2);
    wire_free(&meta);
    wire_free(&request);
}

/* And with those of jprotobuf, whose extension has the number of brpc's request_id. */
static void put_jprotobuf(wire *w, int64_t id, const char *credential)
{
    wire meta = {NULL, 0, 0}, request = {NULL, 0, 0}, entry = {NULL, 0, 0};
    wire_str(&request, 1, "dyn.Echo");
    wire_str(&request, 2, "Add");
    wire_int(&request, 3, 4711);
    wire_str(&entry, 1, "key");
    wire_str(&entry, 2, "value");
    wire_bytes(&request, 7, entry.p, entry.n);
    wire_bytes(&request, 110, "\1\2", 2);
    wire_str(&request, 111, "trace");
    wire_bytes(&meta, 1, request.p, request.n);
    wire_int(&meta, 3, 0);
    wire_int(&meta, 4, id);
    wire_int(&meta, 5, 0);
    wire_str(&meta, 7, credential);
    wire_frame(w, &meta, "\x08\x05", 2);
    wire_free(&meta);
    wire_free(&request);
    wire_free(&entry);
}

/* Several calls of a brpc client with an Authenticator: on one connection, where those behind the
 * first wait only until that is written; and on pooled ones, of which each brings it once. */
static void brpc_clients_are_authenticated_by_their_first_frame(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        bool seen[50];
        wire w = {NULL, 0, 0};
        wire_message r;
        door d = DOOR_INIT;
        net n;
        int pool[3], fd, i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 50; i++)
            put_brpc(&w, i, i ? NULL : "secret-single");
        assert_true(wire_flush(fd, &w));
        memset(seen, 0, sizeof seen);
        for (i = 0; i < 50; i++) { /* workers answer in any order */
            assert_int_equal(wire_receive(fd, &r), 1);
            assert_int_equal(r.code, CRPC_OK);
            assert_int_equal(r.n, 6);
            assert_in_range(r.id, 0, 49);
            assert_false(seen[r.id]);
            seen[r.id] = true;
            wire_done(&r);
        }
        assert_int_equal(door_asked(&d), 1);
        for (i = 0; i < 50; i++)
            assert_string_equal(d.seen[i], "single");
        for (i = 0; i < 12; i++) {
            if (i < 3)
                pool[i] = wire_connect(n.url);
            put_brpc(&w, i, i < 3 ? "secret-pooled" : NULL);
            assert_true(wire_flush(pool[i % 3], &w));
            assert_int_equal(net_reply_code(pool[i % 3], i, NULL), CRPC_OK);
            assert_string_equal(d.seen[50 + i], "pooled");
        }
        assert_int_equal(door_asked(&d), 1 + 3);
        for (i = 0; i < 3; i++)
            close(pool[i]);
        close(fd);
        guarded_close(&n, &d);
    }
}

static void jprotobuf_clients_are_authenticated_by_every_frame(void **state)
{
    crpc_poller p;
    net_mode m;
    int every;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (every = 0; every < 2; every++)
    {
        wire w = {NULL, 0, 0};
        door d = DOOR_INIT;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        n.server_options.access.every_message = every;
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        for (i = 1; i < 20; i++) {
            put_jprotobuf(&w, i, "secret-java");
            assert_true(wire_flush(fd, &w));
            assert_int_equal(net_reply_code(fd, i, NULL), CRPC_OK);
            assert_string_equal(d.seen[i - 1], "java");
        }
        assert_int_equal(door_asked(&d), 1);
        put_jprotobuf(&w, 20, "guess");
        assert_true(wire_flush(fd, &w));
        assert_int_equal(net_reply_code(fd, 20, NULL), CRPC_EAUTH);
        is_closed(fd);
        guarded_close(&n, &d);
    }
}

static void a_peer_without_a_credential_is_not_served(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        door d = DOOR_INIT;
        net n;
        char text[512];
        int fd;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        send_request(fd, "Nothing", 3, NULL, NULL); /* it does not learn which methods there are */
        assert_int_equal(net_reply_code(fd, 3, text), CRPC_EAUTH);
        assert_string_equal(text, "the server asks for a credential; the request has none");
        is_closed(fd);
        fd = wire_connect(n.url);
        send_request(fd, "Add", 4, "guess", NULL);
        assert_int_equal(net_reply_code(fd, 4, text), CRPC_EAUTH);
        assert_string_equal(text, "the server does not accept the request's credential");
        is_closed(fd);
        assert_int_equal(net_calls(&n.service), 0);
        guarded_close(&n, &d);
    }
}

static void frames_behind_a_refused_one_are_not_served(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        door d = DOOR_INIT;
        net n;
        wire w = {NULL, 0, 0};
        int fd, i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        fd = wire_connect(n.url);
        put_request(&w, "Add", 1, "guess", NULL);
        for (i = 2; i < 300; i++)
            put_request(&w, "Add", i, i % 2 ? NULL : "secret-late", NULL);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(net_reply_code(fd, 1, NULL), CRPC_EAUTH);
        is_closed(fd);
        assert_int_equal(door_asked(&d), 1);
        assert_int_equal(net_calls(&n.service), 0);
        guarded_close(&n, &d);
    }
}

/* The requests in service keep the identity with which they came, and are answered before the
 * connection closes. */
static void each_request_keeps_the_identity_with_which_it_came(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        static const char *const credentials[] = {"secret-A", "secret-B", NULL, "secret-A", "no"};
        static const char *const names[] = {"A", "B", "B", "A"};
        crpc_context *held;
        door d = DOOR_INIT;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        for (i = 0; i < 5; i++)
            send_request(fd, "Defer", i, credentials[i], NULL);
        assert_int_equal(net_reply_code(fd, 4, NULL), CRPC_EAUTH);
        assert_true(CT_WAIT(net_held(&n.service) == 4, NET_PATIENCE));
        while ((held = net_take(&n.service)) != NULL) {
            const char *name = crpc_context_identity(held);
            int64_t id;
            wire_message r;
            if (m != NET_WORKERS)
                assert_string_equal(name, names[4 - net_held(&n.service) - 1]);
            assert_true(strcmp(name, "A") == 0 || strcmp(name, "B") == 0);
            assert_int_equal(crpc_context_finish(held, CRPC_OK), CRPC_OK);
            assert_int_equal(wire_receive(fd, &r), 1);
            id = r.id;
            wire_done(&r);
            assert_in_range(id, 0, 3);
        }
        is_closed(fd);
        assert_int_equal(door_asked(&d), 4);
        guarded_close(&n, &d);
    }
}

static void a_body_is_not_read_before_the_verdict(void **state)
{
    static const size_t sizes[] = {1 << 20, 60 << 20, 100 << 20}; /* the last: over max_body */
    size_t i;
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p) for (i = 0; i < sizeof sizes / sizeof *sizes; i++)
    {
        crpc_loop_stats before, after;
        door d = DOOR_INIT;
        net n;
        wire w = {NULL, 0, 0};
        char *body = net_bytes(1 << 20);
        int fd, friend;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        crpc_server_stats_get(n.server, &before);
        fd = wire_connect(n.url);
        put_head(&w, "Pass", 1, "guess", 5, NULL, sizes[i]);
        assert_true(wire_flush(fd, &w)); /* the verdict comes without a byte of the body */
        assert_int_equal(net_reply_code(fd, 1, NULL), CRPC_EAUTH);
        is_closed(fd);
        fd = wire_connect(n.url);
        put_head(&w, "Pass", 2, NULL, 0, NULL, sizes[i]);
        assert_true(wire_flush(fd, &w));
        wire_send(fd, body, 1 << 20); /* or with part of it */
        assert_int_equal(net_reply_code(fd, 2, NULL), CRPC_EAUTH);
        is_closed(fd);
        crpc_server_stats_get(n.server, &after);
        assert_true(after.memory_peak - before.memory_peak < 400 << 10);
        friend = wire_connect(n.url);
        fd = wire_connect(n.url);
        put_head(&w, "Pass", 2, "guess", 5, NULL, sizes[i]);
        assert_true(wire_send(fd, w.p, 20)); /* nor if the head comes in two pieces */
        assert_int_equal(ask(friend, 1, "secret-x"), CRPC_OK); /* by now the first was read */
        assert_true(wire_send(fd, w.p + 20, w.n - 20));
        wire_free(&w);
        assert_int_equal(net_reply_code(fd, 2, NULL), CRPC_EAUTH);
        is_closed(fd);
        close(friend);
        fd = wire_connect(n.url);
        put_head(&w, "Add", 3, "secret-x", 8, NULL, 5 + (64 << 10)); /* and from a friend it is */
        wire_put(&w, "\x08\x05\x9a\x06", 4); /* an unknown field */
        wire_varint(&w, (64 << 10) - 2);
        wire_put(&w, body, (64 << 10) - 2);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(net_reply_code(fd, 3, NULL), CRPC_OK);
        close(fd);
        free(body);
        guarded_close(&n, &d);
    }
}

static void a_credential_of_a_megabyte_is_not_read(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop_stats before, after;
        door d = DOOR_INIT;
        net n;
        wire w = {NULL, 0, 0};
        char *credential = net_bytes(1 << 20);
        int fd;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        crpc_server_stats_get(n.server, &before);
        fd = wire_connect(n.url);
        put_head(&w, "Add", 1, credential, 1 << 20, NULL, 2);
        wire_flush(fd, &w);
        is_closed(fd);
        crpc_server_stats_get(n.server, &after);
        assert_true(after.memory_peak - before.memory_peak < 400 << 10);
        assert_int_equal(after.bad_frames, 1);
        fd = wire_connect(n.url);
        put_head(&w, "Add", 1, credential, 60 << 10, NULL, 2);
        wire_put(&w, "\x08\x05", 2);
        assert_true(wire_flush(fd, &w));
        assert_int_equal(net_reply_code(fd, 1, NULL), CRPC_EAUTH);
        is_closed(fd);
        assert_int_equal(door_asked(&d), 1);
        free(credential);
        guarded_close(&n, &d);
    }
}

static void an_identity_expires(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        door d = DOOR_INIT;
        net n;
        int fd;
        if (m == NET_SHARED) /* the channel would stand still with the server's clock */
            continue;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS;
        guarded_open(&n, &d, p, m);
        d.valid_ms = 1000;
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 1, "secret-A"), CRPC_OK);
        net_time_add(999);
        assert_int_equal(ask(fd, 2, NULL), CRPC_OK);
        assert_int_equal(ask(fd, 3, "secret-A"), CRPC_OK);
        assert_int_equal(door_asked(&d), 1);
        net_time_add(1);
        assert_int_equal(ask(fd, 4, "secret-A"), CRPC_OK); /* asked again */
        assert_int_equal(door_asked(&d), 2);
        net_time_add(1000);
        assert_int_equal(ask(fd, 5, "secret-B"), CRPC_OK);
        net_time_add(1000);
        assert_int_equal(ask(fd, 6, NULL), CRPC_EAUTH);
        is_closed(fd);
        assert_int_equal(net_calls(&n.service), 5);
        guarded_close(&n, &d);
    }
}

static void each_message_may_have_to_bring_its_credential(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        door d = DOOR_INIT;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.access.every_message = 1;
        n.channel_options.security.credential = "secret-channel";
        guarded_open(&n, &d, p, NET_THREAD);
        net_check_add(n.channel, 1);
        net_check_add(n.channel, 2);
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 1, "secret-A"), CRPC_OK);
        assert_int_equal(ask(fd, 2, "secret-A"), CRPC_OK);
        assert_int_equal(door_asked(&d), 2);
        assert_int_equal(ask(fd, 3, NULL), CRPC_EAUTH);
        is_closed(fd);
        guarded_close(&n, &d);
    }
}

/* A request that could not authenticate does not keep a connection open: nor does one that never
 * ends. */
static void a_peer_must_authenticate_in_time(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        door d = DOOR_INIT;
        net n;
        wire w = {NULL, 0, 0};
        int fd, silent;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS;
        n.server_options.first_request_ms = 1000;
        guarded_open(&n, &d, p, NET_THREAD);
        silent = wire_connect(n.url);
        put_head(&w, "Add", 1, "secret-A", 8, NULL, 2);
        assert_true(wire_send(silent, w.p, w.n - 1));
        wire_free(&w);
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 1, "secret-A"), CRPC_OK);
        net_time_add(2000);
        is_closed(silent);
        assert_int_equal(ask(fd, 2, NULL), CRPC_OK);
        close(fd);
        guarded_close(&n, &d);
    }
}

static void identities_do_not_share_request_ids(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        static const char *const credentials[] = {"secret-A", "secret-B", "secret-"};
        door d = DOOR_INIT;
        net n;
        int fds[3], i;
        memset(&n, 0, sizeof n);
        n.server_options.replay_entries = 16;
        guarded_open(&n, &d, p, NET_THREAD);
        for (i = 0; i < 6; i++) {
            if (i < 3)
                fds[i] = wire_connect(n.url);
            send_request(fds[i % 3], "Add", i, credentials[i % 3], "one id");
            assert_int_equal(net_reply_code(fds[i % 3], i, NULL), CRPC_OK);
            assert_int_equal(net_calls(&n.service), i < 3 ? i + 1 : 3);
        }
        for (i = 0; i < 3; i++)
            close(fds[i]);
        guarded_close(&n, &d);
    }
}

static void identities_do_not_wait_for_each_others_keys(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        door d = DOOR_INIT;
        net n;
        crpc_context *x;
        int fd;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        fd = wire_connect(n.url);
        send_request(fd, "Defer", 1, "secret-A", "=key");
        send_request(fd, "Defer", 2, "secret-B", "=key");
        assert_true(CT_WAIT(net_held(&n.service) == 2, NET_PATIENCE));
        send_request(fd, "Defer", 3, "secret-A", "=key");
        assert_int_equal(ask(fd, 4, NULL), CRPC_OK);
        assert_int_equal(net_held(&n.service), 2);
        while ((x = net_take(&n.service)) != NULL) {
            assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_OK);
            if (!net_held(&n.service))
                CT_WAIT(net_calls(&n.service) == 4, NET_PATIENCE);
        }
        close(fd);
        guarded_close(&n, &d);
    }
}

/* --- what an authenticator may do, and what may happen while it runs -------------------------- */

static void count_peer(void *user, const crpc_peer *one)
{
    *(uint32_t *)user += one->connections;
}

typedef struct deeds {
    uint32_t ran; /* atomic: timers and posts */
    crpc_id call;
} deeds;

static void count_deed(void *user)
{
    __atomic_add_fetch(&((deeds *)user)->ran, 1, __ATOMIC_ACQ_REL);
}

/* Every kind of call on the loop that runs the authenticator, and on the server. */
static void call_crpc(door *d)
{
    crpc_loop *l = crpc_server_loop(d->n->server);
    deeds *t = (deeds *)d->user;
    dyn_Num in = net_num(7), out;
    uint32_t connections = 0;
    crpc_loop_stats stats;
    crpc_id id;
    if (__atomic_load_n(&d->entered, __ATOMIC_ACQUIRE) > 1)
        return; /* asked about its own call */
    crpc_server_stats_get(d->n->server, &stats);
    assert_true(stats.connections >= 1);
    assert_int_equal(crpc_server_peers_walk(d->n->server, count_peer, &connections), CRPC_OK);
    assert_true(connections >= 1);
    assert_int_equal(crpc_timer_start(l, 1, 0, count_deed, t, &id), CRPC_OK);
    assert_int_equal(crpc_loop_post(l, count_deed, t), CRPC_OK);
    assert_int_equal(dyn_Echo_Add_begin(d->n->channel, &in, &t->call, NULL), CRPC_OK);
    if (d->shared)
        assert_int_equal(dyn_Echo_Add(d->n->channel, &in, &out, NULL), CRPC_EDEADLK);
}

static void an_authenticator_may_call_crpc(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        deeds did = {.ran = 0};
        dyn_Num out = dyn_Num_init_zero;
        door d = DOOR_INIT;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.channel_options.security.credential = "secret-inner";
        guarded_open(&n, &d, p, m);
        d.inside = call_crpc;
        d.user = &did;
        d.shared = m == NET_SHARED;
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 1, "secret-A"), CRPC_OK);
        assert_true(CT_WAIT(__atomic_load_n(&did.ran, __ATOMIC_ACQUIRE) == 2, NET_PATIENCE));
        assert_int_equal(crpc_channel_wait(n.channel, did.call, NET_PATIENCE), CRPC_OK);
        assert_int_equal(dyn_Echo_Add_fetch(n.channel, did.call, &out, NULL), CRPC_OK);
        assert_int_equal(out.n, 8);
        assert_int_equal(door_asked(&d), 2);
        close(fd);
        guarded_close(&n, &d);
    }
}

static void close_server(door *d)
{
    crpc_server_close(d->n->server);
}

static void stop_server(door *d)
{
    crpc_server_stop(d->n->server);
}

/* A peer that is not crpc is told so, if its credential is good. */
static void an_authenticator_may_stop_its_server(void **state)
{
    crpc_poller p;
    net_mode m;
    int good;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (good = 0; good < 2; good++)
    {
        door d = DOOR_INIT;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        d.inside = stop_server;
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 1, good ? "secret-A" : "guess"),
                         good ? CRPC_ELOGOFF : CRPC_EAUTH);
        is_closed(fd);
        guarded_close(&n, &d);
    }
}

static void an_authenticator_may_close_its_server(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 6; how++)
    {
        crpc_server_options o;
        door d = DOOR_INIT;
        char url[160];
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        d.n = &n;
        d.inside = close_server;
        pthread_mutex_init(&d.lock, NULL);
        o.listen = "tcp://127.0.0.1:0";
        o.loops = net_loop_options(p);
        o.io_threads = how / 2 == 1;
        o.workers = how / 2 == 2;
        o.access.authenticate = door_judge;
        o.access.authenticate_user = &d;
        assert_int_equal(crpc_server_open(&n.server, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(n.server, NULL), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(n.server)), CRPC_OK);
        assert_int_equal(crpc_server_address(n.server, 0, url, sizeof url), CRPC_OK);
        fd = wire_connect(url);
        assert_int_equal(ask(fd, 1, how % 2 ? "guess" : "secret-A"),
                         how % 2 ? CRPC_EAUTH : CRPC_ELOGOFF);
        is_closed(fd);
        assert_true(CT_WAIT(
            __atomic_load_n(&ct_alloc_of_test()->live_blocks, __ATOMIC_ACQUIRE) == 0,
            NET_PATIENCE));
        pthread_mutex_destroy(&d.lock);
    }
}

/* The first authenticator waits. */
static void wait_inside(door *d)
{
    if (__atomic_load_n(&d->entered, __ATOMIC_ACQUIRE) == 1)
        (void)CT_WAIT(__atomic_load_n(&d->leave, __ATOMIC_ACQUIRE), NET_PATIENCE);
}

static bool door_entered(door *d)
{
    return CT_WAIT(__atomic_load_n(&d->entered, __ATOMIC_ACQUIRE), NET_PATIENCE);
}

static void door_let_go(door *d)
{
    __atomic_store_n(&d->leave, 1, __ATOMIC_RELEASE);
}

static bool none_connected(net *n)
{
    crpc_loop_stats stats;
    crpc_server_stats_get(n->server, &stats);
    return stats.connections == 0;
}

static void a_peer_may_go_while_it_is_judged(void **state)
{
    crpc_poller p;
    net_mode m;
    int how;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m) for (how = 0; how < 4; how++)
    {
        const char *credential = how % 2 ? "guess" : "secret-A";
        door d = DOOR_INIT;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        d.inside = wait_inside;
        fd = wire_connect(n.url);
        for (i = 0; i < 3; i++)
            send_request(fd, "Add", i, credential, NULL);
        assert_true(door_entered(&d));
        if (how < 2)
            wire_reset(fd);
        else
            shutdown(fd, SHUT_WR);
        door_let_go(&d);
        if (how >= 2) { /* it may still read */
            wire_message r;
            for (i = 0; wire_receive(fd, &r) == 1; i++) {
                assert_int_equal(r.code, how % 2 ? CRPC_EAUTH : CRPC_OK);
                wire_done(&r);
            }
            assert_int_equal(i, how % 2 ? 1 : 3);
            close(fd);
        }
        assert_true(CT_WAIT(none_connected(&n), NET_PATIENCE));
        fd = wire_connect(n.url);
        assert_int_equal(ask(fd, 9, "secret-B"), CRPC_OK);
        assert_int_equal(door_asked(&d), 2);
        close(fd);
        guarded_close(&n, &d);
    }
}

/* The connection is closed by the thread that accepts, while an I/O thread asks about its peer. */
static void a_server_may_end_while_it_judges(void **state)
{
    crpc_poller p;
    int close_too;
    (void)state;
    NET_EACH_POLLER(p) for (close_too = 0; close_too < 2; close_too++)
    {
        door d = DOOR_INIT;
        net n;
        int fd;
        memset(&n, 0, sizeof n);
        n.server_options.drain_ms = 1;
        guarded_open(&n, &d, p, NET_IO);
        d.inside = wait_inside;
        fd = wire_connect(n.url);
        send_request(fd, "Add", 1, "secret-A", NULL);
        send_request(fd, "Add", 2, "secret-B", NULL);
        assert_true(door_entered(&d));
        crpc_server_stop(n.server);
        is_closed(fd);
        assert_int_equal(door_asked(&d), 0);
        door_let_go(&d);
        if (!close_too)
            assert_true(CT_WAIT(door_asked(&d) == 1, NET_PATIENCE));
        assert_int_equal(net_calls(&n.service), 0);
        guarded_close(&n, &d);
        assert_int_equal(d.asked, 1);
    }
}

/* Frames behind the one that is judged wait, also those that other events would have read. */
static void no_frame_is_served_while_its_peer_is_judged(void **state)
{
    enum { FRAMES = 300 }; /* more than one step takes */
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_context *held;
        int seen[FRAMES];
        wire_message r;
        door d = DOOR_INIT;
        net n;
        int fd, i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, m);
        fd = wire_connect(n.url);
        send_request(fd, "Defer", 0, "secret-A", NULL);
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        __atomic_store_n(&d.entered, 0, __ATOMIC_RELEASE);
        d.inside = wait_inside;
        send_request(fd, "Add", 1, "secret-B", NULL);
        assert_true(door_entered(&d));
        for (i = 2; i < FRAMES; i++)
            send_request(fd, "Add", i, i == FRAMES - 1 ? "guess" : NULL, NULL);
        held = net_take(&n.service); /* its reply must not set the connection going */
        assert_string_equal(crpc_context_identity(held), "A");
        assert_int_equal(crpc_context_finish(held, CRPC_OK), CRPC_OK);
        assert_int_equal(net_reply_code(fd, 0, NULL), CRPC_OK);
        assert_int_equal(net_calls(&n.service), 1);
        door_let_go(&d);
        memset(seen, 0, sizeof seen);
        while (wire_receive(fd, &r) == 1) {
            assert_in_range(r.id, 1, FRAMES - 1);
            assert_int_equal(seen[r.id]++, 0);
            assert_int_equal(r.code, r.id == FRAMES - 1 ? CRPC_EAUTH : CRPC_OK);
            wire_done(&r);
        }
        for (i = 1; i < FRAMES; i++)
            assert_int_equal(seen[i], 1);
        close(fd);
        assert_int_equal(d.served, FRAMES - 1);
        assert_string_equal(d.seen[0], "A");
        for (i = 1; i < FRAMES - 1; i++)
            assert_string_equal(d.seen[i], "B");
        assert_int_equal(door_asked(&d), 3);
        guarded_close(&n, &d);
    }
}

/* Whether a loop without a thread gets a reply to the peer when the program steps it. */
static bool step_until_reply(crpc_loop *l, int fd)
{
    struct pollfd reply = {fd, POLLIN, 0};
    assert_int_equal(crpc_loop_step(l, 1), CRPC_OK);
    return poll(&reply, 1, 0) == 1;
}

/* A caller that drives the loop for its own reply runs no callbacks: the peer waits meanwhile, also
 * if a reply to it sets its connection going. */
static void a_synchronous_caller_runs_no_authenticator(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        crpc_channel *ch;
        crpc_server *s;
        door d = DOOR_INIT;
        net n; /* whom the program calls */
        net_service service;
        crpc_loop *l;
        char url[160];
        int fd;
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        net_open(&n, p, NET_THREAD);
        l = net_loop(p);
        ch = net_channel(n.url, "?timeout_ms=20000", p, l, NULL);
        net_service_init(&service);
        pthread_mutex_init(&d.lock, NULL);
        o.loop = l;
        o.loops = net_loop_options(p);
        o.listen = "tcp://127.0.0.1:0";
        o.access.authenticate = door_judge;
        o.access.authenticate_user = &d;
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        fd = wire_connect(url);
        send_request(fd, "Defer", 1, "secret-A", NULL);
        assert_true(CT_WAIT(crpc_loop_step(l, 1) || net_held(&service) == 1, NET_PATIENCE));
        send_request(fd, "Add", 2, "secret-B", NULL);
        net_check_add(ch, 1); /* the request was there before: its message is read */
        assert_int_equal(crpc_context_finish(net_take(&service), CRPC_OK), CRPC_OK);
        net_check_add(ch, 2);
        net_check_add(ch, 3);
        assert_int_equal(net_reply_code(fd, 1, NULL), CRPC_OK);
        assert_int_equal(door_asked(&d), 1);
        assert_true(CT_WAIT(step_until_reply(l, fd), NET_PATIENCE));
        assert_int_equal(net_reply_code(fd, 2, NULL), CRPC_OK);
        assert_int_equal(door_asked(&d), 2);
        close(fd);
        crpc_channel_close(ch);
        crpc_server_close(s);
        crpc_loop_close(l);
        net_close(&n);
        pthread_mutex_destroy(&service.lock);
        pthread_mutex_destroy(&d.lock);
    }
}

/* A message is judged once, and each byte of it is used once, in whatever pieces it comes. */
static void a_message_that_comes_in_pieces_is_judged_once(void **state)
{
    static const size_t bodies[] = {0, 100, 3000, 80000, 200000}; /* the last: over max_body */
    char *bytes = net_bytes(200000);
    crpc_poller p;
    size_t b, first;
    (void)state;
    NET_EACH_POLLER(p) for (b = 0; b < sizeof bodies / sizeof *bodies; b++)
    {
        door d = DOOR_INIT;
        net n;
        int other;
        memset(&n, 0, sizeof n);
        n.server_options.limits.max_body = 100000;
        guarded_open(&n, &d, p, NET_THREAD);
        other = wire_connect(n.url);
        for (first = 1; first < 90; first += first < 50 ? 1 : 7) {
            wire w = {NULL, 0, 0}, body = {NULL, 0, 0};
            int fd = wire_connect(n.url), asked;
            wire_put(&body, "\x08\x05", 2);
            wire_bytes(&body, 99, bytes, bodies[b]); /* an unknown field */
            put_head(&w, "Add", 1, "secret-A", 8, NULL, body.n);
            wire_put(&w, body.p, body.n);
            put_request(&w, "Add", 2, "secret-A", NULL);
            put_request(&w, "Add", 3, NULL, NULL);
            d.served = 0;
            assert_int_equal(ask(other, 1, "secret-other"), CRPC_OK);
            asked = door_asked(&d);
            assert_true(wire_send(fd, w.p, first));
            assert_int_equal(ask(other, 2, NULL), CRPC_OK); /* by now the server has read it */
            assert_true(wire_send(fd, w.p + first, w.n - first));
            assert_int_equal(net_reply_code(fd, 1, NULL),
                             bodies[b] > 100000 ? CRPC_EREQUEST : CRPC_OK);
            assert_int_equal(net_reply_code(fd, 2, NULL), CRPC_OK);
            assert_int_equal(net_reply_code(fd, 3, NULL), CRPC_OK);
            assert_int_equal(door_asked(&d), asked + 1);
            wire_free(&body);
            wire_free(&w);
            close(fd);
        }
        close(other);
        guarded_close(&n, &d);
    }
    free(bytes);
}

/* --- a host that fails too often -------------------------------------------------------------- */

static int64_t try_from(net *n, const char *host, const char *credential, char *text)
{
    int fd = wire_connect_from(n->url, host);
    int64_t code;
    send_request(fd, "Add", 1, credential, NULL);
    code = net_reply_code(fd, 1, text);
    if (code)
        is_closed(fd);
    else
        close(fd);
    return code;
}

static void failures_of_a_host_are_limited(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        crpc_loop_stats stats;
        char text[512];
        door d = DOOR_INIT;
        net n;
        int fd, i;
        if (m == NET_SHARED) /* the channel would stand still with the server's clock */
            continue;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS;
        n.server_options.access.max_failures = 3;
        n.server_options.access.peers = "127.0.0.4:2";
        guarded_open(&n, &d, p, m);
        fd = wire_connect_from(n.url, "127.0.0.2");
        assert_int_equal(ask(fd, 1, "secret-A"), CRPC_OK);
        for (i = 0; i < 3; i++) { /* a connection each: the account ends with it */
            assert_int_equal(try_from(&n, "127.0.0.3", i ? "guess" : NULL, text), CRPC_EAUTH);
            net_time_add(32); /* its debt was rounded up by no more than that */
        }
        assert_string_equal(text, "the server does not accept the request's credential");
        assert_int_equal(door_asked(&d), 4);
        for (i = 0; i < 3; i++)
            assert_int_equal(try_from(&n, "127.0.0.2", "guess", NULL), CRPC_EAUTH);
        assert_int_equal(door_asked(&d), 7);
        for (i = 0; i < 10; i++) {
            const char *credential = i % 3 == 2 ? NULL : i % 3 ? "secret-A" : "guess";
            const char *host = i % 2 ? "127.0.0.2" : "127.0.0.3";
            assert_int_equal(try_from(&n, host, credential, text), CRPC_EAUTH);
            assert_string_equal(text,
                                "too many credentials of this host were refused (max_failures)");
        }
        assert_int_equal(ask(fd, 2, NULL), CRPC_OK); /* an accepted peer stays so */
        assert_int_equal(ask(fd, 3, "secret-A"), CRPC_OK);
        assert_int_equal(door_asked(&d), 7);
        assert_int_equal(try_from(&n, "127.0.0.1", "secret-B", NULL), CRPC_OK);
        for (i = 0; i < 7; i++) { /* the weight counts */
            assert_int_equal(try_from(&n, "127.0.0.4", "guess", NULL), CRPC_EAUTH);
            net_time_add(32);
        }
        assert_int_equal(door_asked(&d), 8 + 6);
        crpc_server_stats_get(n.server, &stats);
        assert_int_equal(stats.auth_failed, 6 + 6);
        assert_int_equal(stats.auth_barred, 10 + 1);
        net_time_add(1000);
        for (i = 0; i < 5; i++) /* a success costs nothing */
            assert_int_equal(try_from(&n, "127.0.0.3", "secret-A", NULL), CRPC_OK);
        assert_int_equal(try_from(&n, "127.0.0.3", "guess", NULL), CRPC_EAUTH);
        assert_int_equal(door_asked(&d), 14 + 6);
        assert_int_equal(try_from(&n, "127.0.0.3", "secret-A", NULL), CRPC_EAUTH);
        assert_int_equal(door_asked(&d), 20);
        close(fd);
        guarded_close(&n, &d);
    }
}

/* Those that were on their way before the first verdict are limited too. */
static void failures_that_come_together_are_limited(void **state)
{
    enum { PEERS = 40 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        door d = DOOR_INIT;
        net n;
        int fds[PEERS], first, i;
        memset(&n, 0, sizeof n);
        n.time = NET_TIME_STANDS; /* 20: the default */
        guarded_open(&n, &d, p, NET_THREAD);
        d.inside = wait_inside;
        first = wire_connect_from(n.url, "127.0.0.2");
        send_request(first, "Add", 1, "secret-A", NULL);
        assert_true(door_entered(&d));
        for (i = 0; i < PEERS; i++) {
            fds[i] = wire_connect(n.url);
            send_request(fds[i], "Add", 1, "guess", NULL);
        }
        door_let_go(&d);
        for (i = 0; i < PEERS; i++) {
            assert_int_equal(net_reply_code(fds[i], 1, NULL), CRPC_EAUTH);
            is_closed(fds[i]);
        }
        assert_int_equal(door_asked(&d), 1 + 20);
        close(first);
        guarded_close(&n, &d);
    }
}

static void the_limit_of_failures_can_be_removed(void **state)
{
    door d = DOOR_INIT;
    net n;
    int i;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.access.max_failures = -1;
    guarded_open(&n, &d, CRPC_POLLER_DEFAULT, NET_THREAD);
    for (i = 0; i < 50; i++)
        assert_int_equal(try_from(&n, "127.0.0.2", "guess", NULL), CRPC_EAUTH);
    assert_int_equal(door_asked(&d), 50);
    guarded_close(&n, &d);
}

static int barred_lines; /* atomic: so many; the last one is complete */
static char barred_line[512];

static void keep_barred_line(void *user, int level, const char *text)
{
    (void)user, (void)level;
    if (!strstr(text, "max_failures"))
        return;
    snprintf(barred_line, sizeof barred_line, "%s", text);
    __atomic_add_fetch(&barred_lines, 1, __ATOMIC_ACQ_REL);
}

/* One line a second says so, and how many were left out. */
static void a_host_that_fails_too_often_is_named_in_one_line(void **state)
{
    crpc_loop_options lo = net_loop_options(CRPC_POLLER_DEFAULT);
    crpc_server_options o;
    door d = DOOR_INIT;
    char head[300];
    net n;
    int i;
    (void)state;
    memset(&n, 0, sizeof n);
    memset(&o, 0, sizeof o);
    net_time_begin(NET_TIME_STANDS);
    lo.hooks.clock_us = net_clock_us;
    lo.hooks.log = keep_barred_line;
    lo.hooks.log_level = CRPC_LOG_WARN;
    pthread_mutex_init(&d.lock, NULL);
    o.loops = lo;
    o.listen = "tcp://127.0.0.1:0";
    o.access.max_failures = 1;
    o.access.authenticate = door_judge;
    o.access.authenticate_user = &d;
    assert_int_equal(crpc_server_open(&n.server, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_start(n.server, NULL), CRPC_OK);
    assert_int_equal(crpc_loop_start(crpc_server_loop(n.server)), CRPC_OK);
    assert_int_equal(crpc_server_address(n.server, 0, n.url, sizeof n.url), CRPC_OK);
    for (i = 0; i < 6; i++) {
        if (i == 5) {
            net_time_add(1000);
            assert_int_equal(try_from(&n, "127.0.0.2", "guess", NULL), CRPC_EAUTH); /* allowed */
        }
        assert_int_equal(try_from(&n, "127.0.0.2", "guess", NULL), CRPC_EAUTH);
        assert_true(CT_WAIT(__atomic_load_n(&barred_lines, __ATOMIC_ACQUIRE) ==
                                (i == 0 ? 0 : i < 5 ? 1 : 2),
                            NET_PATIENCE));
    }
    snprintf(head, sizeof head, "server %s: a credential of 127.0.0.2:", n.url + 6);
    assert_int_equal(strncmp(barred_line, head, strlen(head)), 0);
    assert_non_null(strstr(barred_line, "; 3 lines like it were left out before"));
    net_time_run();
    crpc_server_close(n.server);
    pthread_mutex_destroy(&d.lock);
}

/* --- channels --------------------------------------------------------------------------------- */

static int add(crpc_channel *ch, crpc_error *error)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    crpc_call call = CRPC_INIT;
    int err = dyn_Echo_Add(ch, &in, &out, &call);
    if (error)
        *error = call.error;
    crpc_call_reset(&call);
    return err;
}

/* As brpc: the first frame of a connection decides, and a refusal closes it. */
static bool refusing_peer(peer *p, int fd, int number)
{
    wire_message m;
    wire w = {NULL, 0, 0};
    (void)p, (void)number;
    if (wire_receive(fd, &m) == 1) {
        wire_error(&w, m.id, CRPC_EAUTH, "Fail to authenticate", 0);
        wire_flush(fd, &w);
    }
    wire_done(&m);
    return true;
}

static void a_wrong_credential_says_so_each_time(void **state)
{
    crpc_poller p;
    int how;
    (void)state;
    NET_EACH_POLLER(p) for (how = 0; how < 2; how++)
    {
        crpc_loop *loop = how ? net_loop(p) : NULL; /* a loop of its own, or one with a thread */
        crpc_channel_options o;
        crpc_channel *ch;
        peer brpc;
        int i;
        memset(&o, 0, sizeof o);
        o.security.credential = "wrong";
        o.policy.timeout_ms = NET_PATIENCE;
        peer_open(&brpc, refusing_peer, NULL);
        if (loop)
            assert_int_equal(crpc_loop_start(loop), CRPC_OK);
        ch = net_channel(brpc.url, NULL, p, loop, &o);
        for (i = 0; i < 20; i++) {
            crpc_error error;
            assert_int_equal(add(ch, &error), CRPC_EAUTH);
            assert_true(error.remote);
        }
        crpc_channel_close(ch);
        crpc_loop_close(loop);
        peer_close(&brpc);
    }
}

/* The server closes with most of the body unread, which resets the connection while the channel is
 * still writing: the verdict is there to be read nevertheless. */
static void a_verdict_is_heard_while_the_body_is_being_sent(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        char *body = net_bytes(8 << 20);
        door d = DOOR_INIT;
        net n;
        int i;
        memset(&n, 0, sizeof n);
        n.channel_options.security.credential = "wrong";
        guarded_open(&n, &d, p, m);
        for (i = 0; i < 10; i++) {
            dyn_Blob in = dyn_Blob_init_zero, out = dyn_Blob_init_zero;
            crpc_call call = CRPC_INIT;
            call.attachment = crpc_view_of(body, 8 << 20);
            assert_int_equal(dyn_Echo_Pass(n.channel, &in, &out, &call), CRPC_EAUTH);
            assert_true(call.error.remote);
            crpc_call_reset(&call);
        }
        assert_int_equal(net_calls(&n.service), 0);
        guarded_close(&n, &d);
        free(body);
    }
}

static void channels_with_different_credentials_share_no_connection(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        static const char *const credentials[] = {"secret-A", "secret-B", "secret-A", "wrong"};
        crpc_channel *ch[4];
        crpc_channel_options o;
        door d = DOOR_INIT;
        net n;
        int i;
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        o.policy.timeout_ms = NET_PATIENCE;
        guarded_open(&n, &d, p, NET_SHARED);
        for (i = 0; i < 4; i++) {
            o.security.credential = credentials[i];
            ch[i] = net_channel(n.url, NULL, p, n.loop, &o);
        }
        for (i = 0; i < 12; i++) {
            assert_int_equal(add(ch[i % 4], NULL), i % 4 == 3 ? CRPC_EAUTH : CRPC_OK);
            assert_int_equal(add(n.channel, NULL), CRPC_EAUTH);
        }
        for (i = 0; i < 9; i++)
            assert_string_equal(d.seen[i], credentials[i % 3] + 7);
        assert_int_equal(d.asked, 2 + 3 + 12); /* A's connection serves two channels */
        for (i = 0; i < 4; i++)
            crpc_channel_close(ch[i]);
        guarded_close(&n, &d);
    }
}

/* The call whose frame would have left first is cancelled before the connection is up: whichever
 * frame leaves in its place has the credential. */
static void a_withdrawn_first_frame_takes_no_credential_with_it(void **state)
{
    enum { CALLS = 8 };
    crpc_poller p;
    int gone;
    (void)state;
    NET_EACH_POLLER(p) for (gone = 1; gone < CALLS; gone++)
    {
        dyn_Num in = net_num(1), out = dyn_Num_init_zero;
        crpc_loop *l = net_loop(p);
        crpc_channel_options o;
        crpc_id ids[CALLS];
        crpc_channel *ch;
        door d = DOOR_INIT;
        net n;
        int i;
        memset(&n, 0, sizeof n);
        memset(&o, 0, sizeof o);
        o.policy.timeout_ms = NET_PATIENCE;
        o.security.credential = "secret-A";
        guarded_open(&n, &d, p, NET_THREAD);
        ch = net_channel(n.url, NULL, p, l, &o);
        assert_int_equal(crpc_loop_step(l, 0), CRPC_OK); /* no thread, from here on */
        for (i = 0; i < CALLS; i++)
            assert_int_equal(dyn_Echo_Add_begin(ch, &in, &ids[i], NULL), CRPC_OK);
        for (i = 0; i < gone; i++)
            assert_int_equal(crpc_channel_cancel(ch, ids[i]), CRPC_OK);
        for (i = gone; i < CALLS; i++) {
            while (dyn_Echo_Add_fetch(ch, ids[i], &out, NULL) == CRPC_EPENDING)
                assert_int_equal(crpc_loop_step(l, 10), CRPC_OK);
            assert_int_equal(out.n, 2);
            out.n = 0;
        }
        assert_int_equal(net_calls(&n.service), CALLS - gone);
        assert_int_equal(door_asked(&d), 1);
        crpc_channel_close(ch);
        crpc_loop_close(l);
        guarded_close(&n, &d);
    }
}

typedef struct purse {
    pthread_mutex_t lock;
    bool slow; /* each asking takes a second of the channel's clock */
    const char *credential;
    int asked;
} purse;

static int purse_give(void *user, char *out, size_t size)
{
    purse *u = (purse *)user;
    int n = -1;
    pthread_mutex_lock(&u->lock);
    u->asked++;
    net_time_add(u->slow ? 1000 : 0);
    if (u->credential) {
        n = (int)strlen(u->credential);
        assert_true((size_t)n <= size);
        memcpy(out, u->credential, (size_t)n);
    }
    pthread_mutex_unlock(&u->lock);
    return n;
}

static void purse_open(purse *u, crpc_channel_options *o, const char *credential)
{
    memset(u, 0, sizeof *u);
    pthread_mutex_init(&u->lock, NULL);
    u->credential = credential;
    o->security.credential_fn = purse_give;
    o->security.credential_user = u;
    o->policy.timeout_ms = NET_PATIENCE;
}

static int purse_asked(purse *u, const char *credential)
{
    int n;
    pthread_mutex_lock(&u->lock);
    n = u->asked;
    u->credential = credential ? credential : u->credential;
    pthread_mutex_unlock(&u->lock);
    return n;
}

static void settled(void *user, int status, const dyn_Num *out, crpc_call *call)
{
    (void)out, (void)call;
    __atomic_store_n((int *)user, status ? status : -1, __ATOMIC_RELEASE);
}

/* One call, in each of the forms that bring a result. */
static int add_by(crpc_channel *ch, int form)
{
    dyn_Num in = net_num(1), out = dyn_Num_init_zero;
    int result = 0;
    crpc_id id;
    if (form == 0)
        return add(ch, NULL);
    if (form == 1) {
        assert_int_equal(dyn_Echo_Add_begin(ch, &in, &id, NULL), CRPC_OK);
        assert_int_equal(crpc_channel_wait(ch, id, NET_PATIENCE), CRPC_OK);
        return dyn_Echo_Add_fetch(ch, id, &out, NULL);
    }
    assert_int_equal(dyn_Echo_Add_async(ch, &in, settled, &result, NULL), CRPC_OK);
    assert_true(CT_WAIT(__atomic_load_n(&result, __ATOMIC_ACQUIRE), NET_PATIENCE));
    return result < 0 ? CRPC_OK : result;
}

/* A channel whose clock only net_time_add moves. */
static crpc_channel *purse_channel(purse *u, net *n, crpc_poller p, const char *credential,
                                   crpc_loop **loop)
{
    crpc_loop_options lo = net_loop_options(p);
    crpc_channel_options o;
    net_time_begin(NET_TIME_STANDS);
    lo.hooks.clock_us = net_clock_us;
    assert_int_equal(crpc_loop_open(loop, &lo), CRPC_OK);
    memset(&o, 0, sizeof o);
    purse_open(u, &o, credential);
    return net_channel(n->url, NULL, p, *loop, &o);
}

static void a_refused_credential_is_asked_for_anew(void **state)
{
    static const char longer[] = "secret-a name of more bytes than the one before";
    crpc_poller p;
    int form;
    (void)state;
    NET_EACH_POLLER(p) for (form = 0; form < 3; form++)
    {
        crpc_channel *ch;
        crpc_loop *loop;
        door d = DOOR_INIT;
        purse u;
        net n;
        int i;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        d.revoked = "secret-old";
        ch = purse_channel(&u, &n, p, "secret-old", &loop);
        assert_int_equal(purse_asked(&u, longer), 1); /* at the opening */
        for (i = 0; i < 3; i++)
            assert_int_equal(add_by(ch, form), CRPC_EAUTH); /* not again within a second */
        assert_int_equal(purse_asked(&u, NULL), 1);
        net_time_add(1000);
        crpc_channel_close(ch); /* the next connection would ask, without a refusal */
        crpc_loop_close(loop);
        ch = purse_channel(&u, &n, p, "secret-old", &loop);
        net_time_add(1000);
        purse_asked(&u, longer);
        assert_int_equal(add_by(ch, form), CRPC_OK);
        assert_int_equal(purse_asked(&u, "secret-other"), 2);
        assert_int_equal(add_by(ch, form), CRPC_OK);
        assert_string_equal(d.seen[0], longer + 7);
        assert_string_equal(d.seen[1], longer + 7);
        assert_int_equal(purse_asked(&u, NULL), 2);
        crpc_channel_close(ch);
        crpc_loop_close(loop);
        guarded_close(&n, &d);
        pthread_mutex_destroy(&u.lock);
    }
}

/* Each part of a call is made once more, by its own provider. The function is asked once. */
static void parts_of_a_call_are_made_once_more(void **state)
{
    static const char *const clusters[] = {"broadcast", "forking&forks=-1"};
    crpc_poller p;
    int form, how;
    (void)state;
    NET_EACH_POLLER(p) for (form = 0; form < 3; form++) for (how = 0; how < 4; how++)
    {
        bool stays = how & 1;
        crpc_channel *ch;
        crpc_loop *loop;
        net n[2], list;
        door d[2];
        purse u;
        int i;
        for (i = 0; i < 2; i++) {
            memset(&n[i], 0, sizeof n[i]);
            memset(&d[i], 0, sizeof d[i]);
            guarded_open(&n[i], &d[i], p, NET_THREAD);
            d[i].revoked = "secret-old";
        }
        snprintf(list.url, sizeof list.url, "list://127.0.0.1:%d,127.0.0.1:%d?cluster=%s",
                 atoi(strrchr(n[0].url, ':') + 1), atoi(strrchr(n[1].url, ':') + 1),
                 clusters[how / 2]);
        ch = purse_channel(&u, &list, p, "secret-old", &loop);
        net_time_add(1000);
        purse_asked(&u, stays ? "secret-old" : "secret-new");
        assert_int_equal(add_by(ch, form), stays ? CRPC_EAUTH : CRPC_OK);
        assert_int_equal(purse_asked(&u, NULL), 2);
        if (how / 2 == 0) { /* with the first success the others are given up */
            for (i = 0; i < 2; i++) {
                /* a part that is refused when the same credential has come again ends */
                assert_in_range(door_asked(&d[i]), stays ? 1 : 2, 2);
                assert_int_equal(net_calls(&n[i].service), stays ? 0 : 1);
            }
        }
        for (i = 0; i < 2; i++) {
            pthread_mutex_lock(&d[i].lock);
            d[i].revoked = NULL;
            pthread_mutex_unlock(&d[i].lock);
        }
        assert_int_equal(add_by(ch, form), CRPC_OK);
        crpc_channel_close(ch);
        crpc_loop_close(loop);
        for (i = 0; i < 2; i++)
            guarded_close(&n[i], &d[i]);
        pthread_mutex_destroy(&u.lock);
    }
}

/* A call is made once more, not for ever; a function that has nothing new changes nothing. */
static void a_credential_that_stays_wrong_ends_in_eauth(void **state)
{
    crpc_poller p;
    int form;
    (void)state;
    NET_EACH_POLLER(p) for (form = 0; form < 3; form++)
    {
        crpc_channel *ch;
        crpc_loop *loop;
        door d = DOOR_INIT;
        purse u;
        net n;
        memset(&n, 0, sizeof n);
        guarded_open(&n, &d, p, NET_THREAD);
        ch = purse_channel(&u, &n, p, "wrong", &loop);
        net_time_add(1000);
        u.slow = true;
        assert_int_equal(add_by(ch, form), CRPC_EAUTH);
        u.slow = false;
        assert_int_equal(door_asked(&d), 2);
        assert_int_equal(purse_asked(&u, NULL), 2);
        pthread_mutex_lock(&u.lock);
        u.credential = NULL;
        pthread_mutex_unlock(&u.lock);
        assert_int_equal(add_by(ch, form), CRPC_EAUTH);
        assert_int_equal(purse_asked(&u, "secret-now"), 3); /* before its first attempt */
        net_time_add(1000);
        assert_int_equal(add_by(ch, form), CRPC_OK);
        assert_int_equal(net_calls(&n.service), 1);
        crpc_channel_close(ch);
        crpc_loop_close(loop);
        guarded_close(&n, &d);
        pthread_mutex_destroy(&u.lock);
    }
}

static void *add_thread(void *channel)
{
    assert_int_equal(add((crpc_channel *)channel, NULL), CRPC_OK);
    return NULL;
}

/* One asking serves all calls that were refused meanwhile, whoever waits for them. */
static void calls_refused_together_ask_once(void **state)
{
    enum { CALLS = 4 };
    crpc_poller p;
    int async;
    (void)state;
    NET_EACH_POLLER(p) for (async = 0; async < 2; async++)
    {
        pthread_t threads[CALLS];
        int results[CALLS], i;
        dyn_Num in = net_num(1);
        crpc_channel *ch;
        crpc_loop *loop;
        door d = DOOR_INIT;
        purse u;
        net n;
        memset(&n, 0, sizeof n);
        d.by_request = true;
        n.server_options.workers = 2 * CALLS;
        guarded_open(&n, &d, p, NET_WORKERS);
        ch = purse_channel(&u, &n, p, "secret-old", &loop);
        d.refusals = async ? 2 * CALLS : CALLS;
        purse_asked(&u, "secret-new");
        net_time_add(1000);
        memset(results, 0, sizeof results);
        for (i = 0; i < CALLS && async; i++)
            assert_int_equal(dyn_Echo_Add_async(ch, &in, settled, &results[i], NULL), CRPC_OK);
        for (i = 0; i < CALLS; i++)
            assert_int_equal(pthread_create(&threads[i], NULL, add_thread, ch), 0);
        for (i = 0; i < CALLS; i++)
            pthread_join(threads[i], NULL);
        for (i = 0; i < CALLS && async; i++) {
            assert_true(CT_WAIT(__atomic_load_n(&results[i], __ATOMIC_ACQUIRE), NET_PATIENCE));
            assert_int_equal(results[i], -1);
        }
        assert_int_equal(purse_asked(&u, NULL), 2);
        assert_int_equal(net_calls(&n.service), d.refusals);
        crpc_channel_close(ch);
        crpc_loop_close(loop);
        guarded_close(&n, &d);
        pthread_mutex_destroy(&u.lock);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_credential_in_the_first_frame_serves_for_the_connection),
        CT_TEST(brpc_clients_are_authenticated_by_their_first_frame),
        CT_TEST(jprotobuf_clients_are_authenticated_by_every_frame),
        CT_TEST(a_peer_without_a_credential_is_not_served),
        CT_TEST(frames_behind_a_refused_one_are_not_served),
        CT_TEST(each_request_keeps_the_identity_with_which_it_came),
        CT_TEST(a_body_is_not_read_before_the_verdict),
        CT_TEST(a_credential_of_a_megabyte_is_not_read),
        CT_TEST(an_identity_expires),
        CT_TEST(each_message_may_have_to_bring_its_credential),
        CT_TEST(a_peer_must_authenticate_in_time),
        CT_TEST(identities_do_not_share_request_ids),
        CT_TEST(identities_do_not_wait_for_each_others_keys),
        CT_TEST(an_authenticator_may_call_crpc),
        CT_TEST(an_authenticator_may_stop_its_server),
        CT_TEST(an_authenticator_may_close_its_server),
        CT_TEST(a_peer_may_go_while_it_is_judged),
        CT_TEST(a_server_may_end_while_it_judges),
        CT_TEST(no_frame_is_served_while_its_peer_is_judged),
        CT_TEST(a_synchronous_caller_runs_no_authenticator),
        CT_TEST(a_message_that_comes_in_pieces_is_judged_once),
        CT_TEST(failures_of_a_host_are_limited),
        CT_TEST(failures_that_come_together_are_limited),
        CT_TEST(the_limit_of_failures_can_be_removed),
        CT_TEST(a_host_that_fails_too_often_is_named_in_one_line),
        CT_TEST(a_wrong_credential_says_so_each_time),
        CT_TEST(a_verdict_is_heard_while_the_body_is_being_sent),
        CT_TEST(channels_with_different_credentials_share_no_connection),
        CT_TEST(a_withdrawn_first_frame_takes_no_credential_with_it),
        CT_TEST(a_refused_credential_is_asked_for_anew),
        CT_TEST(parts_of_a_call_are_made_once_more),
        CT_TEST(a_credential_that_stays_wrong_ends_in_eauth),
        CT_TEST(calls_refused_together_ask_once),
    };
    return CT_RUN(tests);
}
