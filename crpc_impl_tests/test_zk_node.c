/* The two primitives on ZooKeeper's nodes, with the test as the server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* --- paths and numbers -------------------------------------------------------------------------- */

static void roots_must_be_valid_paths(void **state)
{
    static const struct {
        const char *path, *root;
    } roots[] = {
        {"", "/dubbo"}, {"/", "/dubbo"},  {"a", "/a"},   {"a/", "/a"},      {"a/b.c/d", "/a/b.c/d"},
        {"a//b", NULL}, {"a/../b", NULL}, {".", NULL},   {"a\x01", NULL},   {"..", NULL},
        {"/a", NULL},   {"...", "/..."},  {".a", "/.a"}, {"a b", "/a b"},
    };
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    size_t i;
    (void)state;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    for (i = 0; i < sizeof roots / sizeof *roots; i++) {
        char *root = NULL;
        int err = crpci_zk_node_root(h, roots[i].path, "/dubbo", &root, NULL);
        if (err != (roots[i].root ? CRPC_OK : CRPC_EINVAL) ||
            (root && strcmp(root, roots[i].root) != 0))
            fail_msg("\"%s\" gives %s", roots[i].path, root ? root : "an error");
        crpci_heap_strfree(h, root);
    }
    crpci_heap_unref(h);
}

static void sequence_numbers_may_wrap(void **state)
{
    static const int32_t in_order[] = {INT32_MAX - 1, INT32_MAX, INT32_MIN, INT32_MIN + 1};
    size_t i, k;
    (void)state;
    for (i = 0; i < 4; i++) {
        for (k = 0; k < 4; k++)
            assert_int_equal(crpci_zk_node_earlier(in_order[i], in_order[k]), i < k);
    }
    assert_true(crpci_zk_node_earlier(-1, 0));
    assert_true(crpci_zk_node_earlier(9, 10)); /* as text it is not */
    assert_false(crpci_zk_node_earlier(5, 5));
}

/* --- a session that nobody began ---------------------------------------------------------------- */

#define SESSION 7 /* its id */

typedef struct fixture {
    crpc_loop *loop;
    crpci_zk_session s;
    crpci_zk_handle handle;
    crpci_zk_own own;
    crpci_zk_watch watch;
    const char *name; /* what the owner asks for; NULL: nothing now */
    int owned, news, lost, lost_rc, told, told_rc, released;
    size_t told_count;
    bool refuse; /* the value, for want of memory */
    bool leaves; /* the owner orders a transaction for the removal */
} fixture;

static char *on_name(crpci_zk_own *own)
{
    fixture *f = CRPCI_CONTAINER(own, fixture, own);
    return f->name ? crpci_zk_node_join(f->s.heap, "/d", f->name) : NULL;
}

static void on_owned(crpci_zk_own *own, int64_t sent_us, const struct Stat *stat, bool news)
{
    fixture *f = CRPCI_CONTAINER(own, fixture, own);
    (void)sent_us;
    (void)stat;
    f->owned++;
    f->news += news;
}

static void on_lost(crpci_zk_own *own, int rc)
{
    fixture *f = CRPCI_CONTAINER(own, fixture, own);
    f->lost++;
    f->lost_rc = rc;
}

static bool on_value(crpci_zk_watch *w, const crpci_zk_answer *a)
{
    fixture *f = CRPCI_CONTAINER(w, fixture, watch);
    f->told++;
    f->told_rc = a->rc;
    crpci_zk_node_names(a, &f->told_count);
    return !f->refuse;
}

static void on_release(void *holder)
{
    ((fixture *)holder)->released++;
}

static crpci_zk_multi *on_leave(crpci_zk_own *own)
{
    fixture *f = CRPCI_CONTAINER(own, fixture, own);
    char *at;
    return f->leaves ? crpci_zk_job_multi(f->s.heap, 2, 10, &at) : NULL;
}

static const crpci_zk_owner owner = {on_name, on_owned, on_lost, on_leave};

static void begin(fixture *f, bool sequential)
{
    crpc_loop_options o;
    memset(f, 0, sizeof *f);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.log_level = -1;
    assert_int_equal(crpc_loop_open(&f->loop, &o), CRPC_OK);
    f->s.loop = f->loop;
    f->s.heap = f->loop->heap;
    f->s.authority = (char *)"x";
    f->s.id = SESSION;
    f->s.timeout_ms = 4000;
    f->s.spread_us = 2000000;
    crpci_list_init(&f->s.jobs);
    crpci_list_init(&f->handle.requests);
    f->s.handle = &f->handle;
    f->handle.session = &f->s;
    crpci_zk_node_own_init(&f->own, &f->s, &owner, "/d", f, on_release);
    f->own.sequential = sequential;
    crpci_zk_node_watch_init(&f->watch, &f->s, CRPCI_ZK_WATCH_CHILDREN, NULL, on_value, f,
                             on_release);
    f->name = sequential ? "id-lock-" : "one";
}

static void end(fixture *f)
{
    crpci_zk_job_drop(&f->own.job);
    crpci_zk_job_drop(&f->watch.job);
    assert_int_equal(f->released, 2);
    crpc_loop_close(f->loop);
}

/* The request that a job sends now, for the test to answer. */
static crpci_zk_request *sent(fixture *f, crpci_zk_job *job, crpci_zk_verb verb, const char *path)
{
    crpci_zk_order o;
    crpci_zk_request *q;
    memset(&o, 0, sizeof o);
    assert_true(job->due_us != INT64_MAX && !job->sent);
    assert_true(job->work->order(job, &o));
    if (o.verb != verb || strcmp(o.path, path) != 0)
        fail_msg("verb %d of %s, not %d of %s", (int)o.verb, o.path, (int)verb, path);
    q = crpci_zk_job_request(&f->s, job, &o);
    job->sent = q;
    return q;
}

static void answer(crpci_zk_request *q, int rc, const char *text, const struct Stat *stat,
                   const struct String_vector *names)
{
    crpci_zk_answer a;
    memset(&a, 0, sizeof a);
    a.rc = rc;
    a.text = text;
    a.stat = stat;
    a.names = names;
    crpci_zk_job_take(q, &a);
    crpci_zk_job_request_free(q);
}

/* A request of the own node and its answer. `session`: whose node a STAT finds. `a`, `b`: what a
 * LIST finds. */
static void own(fixture *f, crpci_zk_verb verb, const char *path, int rc, int64_t session)
{
    struct Stat stat;
    memset(&stat, 0, sizeof stat);
    stat.ephemeralOwner = session;
    answer(sent(f, &f->own.job, verb, path), rc, path, &stat, NULL);
}

static void made(fixture *f, const char *path)
{
    answer(sent(f, &f->own.job, CRPCI_ZK_CREATE, "/d/id-lock-"), ZOK, path, NULL, NULL);
}

static void find(fixture *f, const char *a, const char *b)
{
    struct String_vector names;
    char *data[3];
    data[0] = (char *)"other-lock-0000000001";
    data[1] = (char *)(uintptr_t)a;
    data[2] = (char *)(uintptr_t)b;
    names.count = 1 + (a != NULL) + (b != NULL);
    names.data = data;
    answer(sent(f, &f->own.job, CRPCI_ZK_LIST, "/d"), ZOK, NULL, NULL, &names);
}

static void want(fixture *f, crpci_zk_wish wish)
{
    crpci_zk_node_own_want(&f->own, wish);
}

static void happens(fixture *f, crpci_zk_job *job, crpci_zk_event event)
{
    (void)f;
    job->work->event(job, event, NULL, NULL);
}

/* --- own ---------------------------------------------------------------------------------------- */

static void it_makes_and_keeps_a_node(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    assert_true(f.own.job.due_us == INT64_MAX);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZOK, 0);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
    assert_int_equal(f.news, 1);
    assert_true(f.own.job.due_us == 0); /* a check at once, which sets the watch */
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION);
    assert_int_equal(f.owned, 2);
    assert_int_equal(f.news, 1);
    assert_true(f.own.job.due_us > crpci_zk_job_now(&f.s) + 40000000); /* the next is far */
    happens(&f, &f.own.job, CRPCI_ZK_REMOVED); /* by somebody: checked within a second */
    assert_true(f.own.job.due_us <= crpci_zk_job_now(&f.s) + 1000000);
    own(&f, CRPCI_ZK_STAT, "/d/one", ZNONODE, 0);
    assert_int_equal(f.lost, 1);
    assert_int_equal(f.lost_rc, ZNONODE);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZOK, 0);
    assert_int_equal(f.news, 2);
    want(&f, CRPCI_ZK_WISH_ENDED);
    own(&f, CRPCI_ZK_DELETE, "/d/one", ZOK, 0);
    assert_int_equal(f.released, 1); /* off the session */
    end(&f);
}

/* A process that died has left its node, which will vanish with that session. Deleting and making are
 * one transaction, so that consumers never see a list without it. */
static void a_node_of_another_session_is_replaced_at_once(void **state)
{
    fixture f;
    int i;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNODEEXISTS, 0);
    for (i = 0; i < 5; i++) {
        own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION + 1);
        assert_int_equal(f.own.state, CRPCI_ZK_OWN_EVICT);
        assert_int_equal(f.own.job.due_us != 0, i >= 3); /* in a fight it waits, ever longer */
        own(&f, CRPCI_ZK_MULTI, "/d/one", ZCONNECTIONLOSS, 0); /* done or not: whose is it? */
    }
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION + 1);
    own(&f, CRPCI_ZK_MULTI, "/d/one", ZNOAUTH, 0);
    assert_int_equal(f.lost_rc, ZNOAUTH);
    own(&f, CRPCI_ZK_MULTI, "/d/one", ZNONODE, 0); /* its session has just ended */
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNODEEXISTS, 0);
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION); /* an earlier create of this one was done */
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
    assert_int_equal(f.news, 1);
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION + 1); /* taken by another */
    assert_int_equal(f.lost, 2);
    own(&f, CRPCI_ZK_MULTI, "/d/one", ZOK, 0);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
    assert_int_equal(f.news, 2);
    assert_true(f.own.job.due_us == 0); /* checked, which sets the watch */
    end(&f);
}

/* The create is sent again; if the first one was executed, the answer is "exists". */
static void a_create_without_an_answer_is_repeated(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZCONNECTIONLOSS, 0);
    assert_true(f.own.job.due_us > crpci_zk_job_now(&f.s));
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNODEEXISTS, 0);
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
    end(&f);
}

/* Withdrawn before the create was answered: a node that it made is removed all the same. */
static void an_unwanted_node_of_a_lost_create_is_removed(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZCONNECTIONLOSS, 0);
    want(&f, CRPCI_ZK_WISH_UNWANTED);
    own(&f, CRPCI_ZK_DELETE, "/d/one", ZNONODE, 0);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_ABSENT);
    assert_true(f.own.job.due_us == INT64_MAX);
    end(&f);
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/id-lock-", ZCONNECTIONLOSS, 0);
    want(&f, CRPCI_ZK_WISH_AFRESH);
    find(&f, "id-lock-0000000005", NULL);
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000005", ZOK, 0);
    find(&f, NULL, NULL); /* until there is none */
    assert_int_equal(f.own.wish, CRPCI_ZK_WISH_WANTED);
    f.name = "new-lock-";
    own(&f, CRPCI_ZK_CREATE, "/d/new-lock-", ZOK, 0);
    end(&f);
}

/* Withdrawn while its directory is being made: it must not appear any more. */
static void an_unwanted_node_is_not_made_after_its_parent(void **state)
{
    crpci_zk_request *q;
    fixture f;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNONODE, 0);
    q = sent(&f, &f.own.job, CRPCI_ZK_CREATE, "/d/one");
    assert_true(q->parent);
    assert_string_equal(q->path, "/d");
    want(&f, CRPCI_ZK_WISH_ENDED);
    answer(q, ZOK, "/d", NULL, NULL);
    own(&f, CRPCI_ZK_DELETE, "/d/one", ZNONODE, 0);
    assert_int_equal(f.released, 1);
    end(&f);
}

/* A sequential node whose creation got no answer is found by its id, and only one remains. */
static void it_finds_its_node_by_the_id(void **state)
{
    fixture f;
    (void)state;
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    made(&f, "/d/id-lock-0000000003");
    assert_string_equal(f.own.path, "/d/id-lock-0000000003");
    assert_null(f.own.prefix);
    end(&f);
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/id-lock-", ZCONNECTIONLOSS, 0);
    find(&f, NULL, NULL);
    f.name = "another-lock-"; /* the id stays while the first create may still be carried out */
    own(&f, CRPCI_ZK_CREATE, "/d/id-lock-", ZCONNECTIONLOSS, 0);
    find(&f, NULL, NULL);
    made(&f, "/d/id-lock-0000000012");
    find(&f, "id-lock-0000000012", "id-lock-0000000011"); /* both were */
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000012", ZOK, 0);
    assert_int_equal(f.owned, 0);
    find(&f, "id-lock-0000000011", NULL);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
    assert_string_equal(f.own.path, "/d/id-lock-0000000011");
    assert_int_equal(f.news, 1);
    end(&f);
    begin(&f, true); /* numbers go on from the largest to the smallest: the earlier one stays */
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/id-lock-", ZOPERATIONTIMEOUT, 0);
    find(&f, "id-lock--2147483648", "id-lock-2147483647");
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock--2147483648", ZNONODE, 0);
    end(&f);
}

static void a_new_session_makes_a_new_node(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZOK, 0);
    crpci_zk_job_over(&f.s);
    assert_int_equal(f.lost, 1);
    assert_int_equal(f.lost_rc, ZSESSIONEXPIRED);
    happens(&f, &f.own.job, CRPCI_ZK_RENEWED);
    assert_int_equal(f.lost, 1); /* once */
    f.s.id = SESSION + 1;
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNODEEXISTS, 0); /* the old session's is still there */
    own(&f, CRPCI_ZK_STAT, "/d/one", ZOK, SESSION);
    own(&f, CRPCI_ZK_MULTI, "/d/one", ZOK, 0);
    want(&f, CRPCI_ZK_WISH_UNWANTED); /* withdrawn while the session is over: it goes later */
    crpci_zk_job_over(&f.s);
    own(&f, CRPCI_ZK_DELETE, "/d/one", ZOK, 0);
    end(&f);
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    made(&f, "/d/id-lock-0000000003");
    want(&f, CRPCI_ZK_WISH_ENDED);
    crpci_zk_job_over(&f.s); /* the session may have been given up, and live on */
    assert_int_equal(f.released, 0);
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZNONODE, 0);
    assert_int_equal(f.released, 1);
    assert_int_equal(f.lost, 0);
    end(&f);
}

/* A session that was given up lives on at the server, and so does its node: it must not stand in
 * front of the new one for a session timeout. */
static void a_node_of_a_given_up_session_is_removed_first(void **state)
{
    fixture f;
    (void)state;
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    made(&f, "/d/id-lock-0000000003");
    crpci_zk_job_over(&f.s);
    assert_int_equal(f.lost_rc, ZSESSIONEXPIRED);
    happens(&f, &f.own.job, CRPCI_ZK_RENEWED);
    f.s.id = SESSION + 1;
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZOK, 0);
    made(&f, "/d/id-lock-0000000004");
    assert_int_equal(f.news, 2);
    end(&f);
    begin(&f, true); /* nor one that a create without an answer may have made */
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/id-lock-", ZCONNECTIONLOSS, 0);
    crpci_zk_job_over(&f.s);
    happens(&f, &f.own.job, CRPCI_ZK_RENEWED);
    f.s.id = SESSION + 1;
    find(&f, "id-lock-0000000003", NULL);
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZNONODE, 0);
    find(&f, NULL, NULL);
    made(&f, "/d/id-lock-0000000004");
    assert_int_equal(f.news, 1);
    end(&f);
}

/* A node can be removed together with something else; if that fails, it is removed alone. */
static void a_node_leaves_by_its_owners_transaction(void **state)
{
    static const int codes[] = {ZOK, ZNONODE, ZCONNECTIONLOSS, ZNOAUTH};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof codes / sizeof *codes; i++) {
        fixture f;
        begin(&f, true);
        f.leaves = true;
        want(&f, CRPCI_ZK_WISH_WANTED);
        made(&f, "/d/id-lock-0000000003");
        want(&f, CRPCI_ZK_WISH_ENDED);
        own(&f, CRPCI_ZK_MULTI, "/d/id-lock-0000000003", codes[i], 0);
        if (codes[i] == ZCONNECTIONLOSS) /* it may have been executed, and is sent again */
            own(&f, CRPCI_ZK_MULTI, "/d/id-lock-0000000003", ZNONODE, 0);
        else if (codes[i] == ZNOAUTH)
            own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZOK, 0);
        assert_int_equal(f.released, 1);
        end(&f);
    }
}

/* The address has changed: the node of the old one goes before there is one of the new. */
static void a_changed_address_makes_a_new_node(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZOK, 0);
    f.name = "two";
    want(&f, CRPCI_ZK_WISH_AFRESH);
    own(&f, CRPCI_ZK_DELETE, "/d/one", ZOK, 0);
    own(&f, CRPCI_ZK_CREATE, "/d/two", ZCONNECTIONLOSS, 0);
    f.name = "three"; /* changed again while nothing was known */
    own(&f, CRPCI_ZK_DELETE, "/d/two", ZOK, 0);
    own(&f, CRPCI_ZK_CREATE, "/d/three", ZOK, 0);
    assert_int_equal(f.news, 2);
    end(&f);
}

/* The node of the old address cannot be removed, because somebody has changed its directory's ACL: the
 * new address is registered all the same. A place in a queue is never left so. */
static void an_undeletable_node_does_not_hold_up_a_new_one(void **state)
{
    fixture f;
    int i;
    (void)state;
    for (i = 0; i < 2; i++) {
        begin(&f, false);
        want(&f, CRPCI_ZK_WISH_WANTED);
        own(&f, CRPCI_ZK_CREATE, "/d/one", i ? ZCONNECTIONLOSS : ZOK, 0);
        f.name = "two";
        if (!i)
            want(&f, CRPCI_ZK_WISH_AFRESH);
        own(&f, CRPCI_ZK_DELETE, "/d/one", ZCONNECTIONLOSS, 0); /* that is no refusal */
        own(&f, CRPCI_ZK_DELETE, "/d/one", ZNOAUTH, 0);
        own(&f, CRPCI_ZK_CREATE, "/d/two", ZOK, 0);
        assert_int_equal(f.own.state, CRPCI_ZK_OWN_OWNED);
        assert_int_equal(f.lost, 0);
        end(&f);
    }
    begin(&f, true);
    want(&f, CRPCI_ZK_WISH_WANTED);
    made(&f, "/d/id-lock-0000000003");
    want(&f, CRPCI_ZK_WISH_AFRESH);
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZNOAUTH, 0);
    own(&f, CRPCI_ZK_DELETE, "/d/id-lock-0000000003", ZNOAUTH, 0);
    end(&f);
}

/* What a new connection does not cure is tried again, ever more rarely; and not for ever, when all
 * that is left to do is to remove a node. */
static void a_refused_create_is_retried(void **state)
{
    crpci_zk_order o;
    fixture f;
    int i;
    (void)state;
    begin(&f, false);
    want(&f, CRPCI_ZK_WISH_WANTED);
    f.name = NULL; /* there is no name now */
    assert_false(f.own.job.work->order(&f.own.job, &o));
    assert_true(f.own.job.due_us > crpci_zk_job_now(&f.s));
    assert_int_equal(f.lost, 0);
    f.name = "one";
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZNOAUTH, 0);
    assert_int_equal(f.lost, 1);
    assert_int_equal(f.lost_rc, ZNOAUTH);
    own(&f, CRPCI_ZK_CREATE, "/d/one", ZOK, 0);
    assert_int_equal(f.own.failures, 0);
    want(&f, CRPCI_ZK_WISH_UNWANTED);
    for (i = 0; i <= (int)CRPCI_ZK_NODE_FORGET; i++)
        own(&f, CRPCI_ZK_DELETE, "/d/one", ZNOAUTH, 0);
    assert_int_equal(f.own.state, CRPCI_ZK_OWN_ABSENT);
    assert_int_equal(f.lost, 1);
    end(&f);
}

/* --- watch -------------------------------------------------------------------------------------- */

static void follow(fixture *f, crpci_zk_watch_kind kind)
{
    char *path = crpci_zk_node_join(f->s.heap, "", "p");
    assert_true(crpci_zk_node_watch_set(&f->watch, kind, path));
}

static void value(fixture *f, crpci_zk_verb verb, int rc)
{
    struct String_vector names;
    char *one[1];
    one[0] = (char *)"a";
    names.count = 1;
    names.data = one;
    answer(sent(f, &f->watch.job, verb, "/p"), rc, NULL, NULL, &names);
}

static void each_change_is_read(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    assert_true(f.watch.job.due_us == INT64_MAX);
    follow(&f, CRPCI_ZK_WATCH_CHILDREN);
    value(&f, CRPCI_ZK_LIST, ZCONNECTIONLOSS); /* not told: read again */
    assert_int_equal(f.told, 0);
    value(&f, CRPCI_ZK_LIST, ZOK);
    assert_int_equal(f.told, 1);
    assert_int_equal(f.told_count, 1);
    assert_true(f.watch.job.due_us > crpci_zk_job_now(&f.s) + 200000000);
    happens(&f, &f.watch.job, CRPCI_ZK_CHANGED);
    assert_true(f.watch.job.due_us == 0);
    f.refuse = true; /* no memory: the same again in a second */
    value(&f, CRPCI_ZK_LIST, ZOK);
    assert_true(f.watch.job.due_us <= crpci_zk_job_now(&f.s) + 1000000);
    f.refuse = false;
    value(&f, CRPCI_ZK_LIST, ZOK);
    happens(&f, &f.watch.job, CRPCI_ZK_RESUMED); /* the net below the watches, scattered */
    assert_true(f.watch.job.due_us > 0 &&
                f.watch.job.due_us <= crpci_zk_job_now(&f.s) + 2000000);
    happens(&f, &f.watch.job, CRPCI_ZK_RENEWED); /* another session has no watches */
    assert_true(f.watch.job.due_us == 0);
    crpci_zk_node_watch_stop(&f.watch);
    happens(&f, &f.watch.job, CRPCI_ZK_RENEWED);
    assert_true(f.watch.job.due_us == INT64_MAX);
    end(&f);
}

static void a_missing_node_is_watched_for_its_creation(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    follow(&f, CRPCI_ZK_WATCH_DATA);
    value(&f, CRPCI_ZK_GET, ZNONODE);
    assert_int_equal(f.told, 0);
    value(&f, CRPCI_ZK_STAT, ZOK); /* made in between: read */
    assert_int_equal(f.told, 0);
    value(&f, CRPCI_ZK_GET, ZNONODE); /* and gone again */
    value(&f, CRPCI_ZK_STAT, ZNONODE);
    assert_int_equal(f.told, 1);
    assert_int_equal(f.told_rc, ZNONODE);
    happens(&f, &f.watch.job, CRPCI_ZK_CHANGED);
    value(&f, CRPCI_ZK_GET, ZOK);
    assert_int_equal(f.told_rc, ZOK);
    happens(&f, &f.watch.job, CRPCI_ZK_REMOVED);
    value(&f, CRPCI_ZK_GET, ZNOAUTH); /* told, and tried again soon */
    assert_int_equal(f.told_rc, ZNOAUTH);
    assert_true(f.watch.job.due_us <= crpci_zk_job_now(&f.s) + 6000000);
    end(&f);
}

static void the_end_of_a_node_is_reported_once(void **state)
{
    fixture f;
    (void)state;
    begin(&f, false);
    follow(&f, CRPCI_ZK_WATCH_END);
    value(&f, CRPCI_ZK_LIST, ZOK);
    assert_int_equal(f.told, 0);
    happens(&f, &f.watch.job, CRPCI_ZK_CHANGED);
    value(&f, CRPCI_ZK_LIST, ZOK);
    assert_int_equal(f.told, 0);
    happens(&f, &f.watch.job, CRPCI_ZK_REMOVED);
    assert_int_equal(f.told, 1);
    assert_int_equal(f.told_rc, ZNONODE);
    assert_true(f.watch.job.due_us == INT64_MAX);
    follow(&f, CRPCI_ZK_WATCH_END); /* gone before it could be watched */
    value(&f, CRPCI_ZK_LIST, ZNONODE);
    assert_int_equal(f.told, 2);
    follow(&f, CRPCI_ZK_WATCH_CHILDREN_ONCE);
    value(&f, CRPCI_ZK_LIST, ZOK);
    assert_int_equal(f.told, 3);
    assert_true(f.watch.job.due_us == INT64_MAX);
    assert_null(f.watch.job.watched);
    f.watch.kind = CRPCI_ZK_WATCH_DATA_ONCE; /* the same node, for its content */
    crpci_zk_node_watch_again(&f.watch);
    value(&f, CRPCI_ZK_GET, ZOK);
    assert_int_equal(f.told, 4);
    assert_true(f.watch.job.due_us == INT64_MAX);
    end(&f);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(roots_must_be_valid_paths),
        CT_TEST(sequence_numbers_may_wrap),
        CT_TEST(it_makes_and_keeps_a_node),
        CT_TEST(a_node_of_another_session_is_replaced_at_once),
        CT_TEST(a_create_without_an_answer_is_repeated),
        CT_TEST(an_unwanted_node_of_a_lost_create_is_removed),
        CT_TEST(an_unwanted_node_is_not_made_after_its_parent),
        CT_TEST(it_finds_its_node_by_the_id),
        CT_TEST(a_new_session_makes_a_new_node),
        CT_TEST(a_node_of_a_given_up_session_is_removed_first),
        CT_TEST(a_node_leaves_by_its_owners_transaction),
        CT_TEST(a_changed_address_makes_a_new_node),
        CT_TEST(an_undeletable_node_does_not_hold_up_a_new_one),
        CT_TEST(a_refused_create_is_retried),
        CT_TEST(each_change_is_read),
        CT_TEST(a_missing_node_is_watched_for_its_creation),
        CT_TEST(the_end_of_a_node_is_reported_once),
    };
    return CT_RUN(tests);
}
