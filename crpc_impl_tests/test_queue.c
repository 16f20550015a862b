/* Places in the queue for a lock or the lead, moved on without a server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_nowhere.h"

static void on_lock(void *user, int status, int64_t token)
{
    int *counts = (int *)user;
    (void)token;
    counts[0]++;
    counts[1] = status;
}

static void on_election(void *user, bool leader, int64_t token)
{
    (void)user, (void)leader, (void)token;
}

static void it_refuses_bad_arguments(void **state)
{
    static const char *const bad[] = {NULL, "a//b", "..", "a/", "", "/"};
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_election *e;
    crpc_lock *lock;
    size_t i;
    (void)state;
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(crpc_lock_open(&lock, r, bad[i], NULL, on_lock, NULL), CRPC_EINVAL);
        assert_null(lock);
        assert_int_equal(
            crpc_election_open(&e, r, bad[i], crpc_view_str("me"), on_election, NULL), CRPC_EINVAL);
        assert_null(e);
    }
    assert_int_equal(crpc_lock_open(&lock, r, "a", NULL, NULL, NULL), CRPC_EINVAL);
    crpc_lock_close(NULL);
    crpc_election_close(NULL);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

static void it_ends_with_its_registry(void **state)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_lock *lock;
    crpc_election *e;
    int locks[2] = {0, 0};
    (void)state;
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), ""), CRPC_OK);
    assert_int_equal(crpc_lock_open(&lock, r, "l", "me", on_lock, locks), CRPC_OK);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_EBUSY);
    assert_true(crpc_lock_lease_us(lock) == 0);
    assert_int_equal(crpc_election_open(&e, r, "e", crpc_view_str("me"), on_election, NULL),
                     CRPC_OK);
    crpc_registry_close(r);
    assert_int_equal(locks[0], 0); /* not on the caller's stack */
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(locks[0], 1);
    assert_int_equal(locks[1], CRPC_ECANCELED);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_ECANCELED); /* handles outlive it */
    crpc_lock_release(lock);
    crpc_lock_close(lock);
    crpc_election_resign(e);
    crpc_election_close(e);
    crpc_loop_close(loop);
    assert_int_equal(locks[0], 1);
}

/* A place that a test moves on as the server would. */
typedef struct fixture {
    crpc_loop *loop;
    crpc_registry *r;
    crpc_lock *lock;
    crpci_queue_place *q;
    int told[2];
} fixture;

static char line[512]; /* the last of the log */

static void on_line(void *user, int level, const char *text)
{
    (void)user, (void)level;
    snprintf(line, sizeof line, "%s", text);
}

static void begin(fixture *f)
{
    crpc_loop_options o;
    memset(f, 0, sizeof *f);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.log = on_line;
    o.forbid_threads = 1;
    line[0] = '\0';
    assert_int_equal(crpc_loop_open(&f->loop, &o), CRPC_OK);
    assert_int_equal(nowhere_open(&f->r, f->loop, ct_free_port(), ""), CRPC_OK);
    assert_int_equal(crpc_lock_open(&f->lock, f->r, "l", "me", on_lock, f->told), CRPC_OK);
    f->q = &f->lock->place;
    f->q->item.session->negotiated_ms = 4000;
}

static void end(fixture *f)
{
    crpc_lock_close(f->lock);
    crpc_registry_close(f->r);
    crpc_loop_close(f->loop);
}

/* The own node was made: it has number 5. */
static void enter(fixture *f)
{
    crpci_zk_own *own = &f->q->own;
    crpci_loop_lock(f->loop);
    own->path = crpci_heap_strndup(f->loop->heap, "/l/_c_x-lock-0000000005", 23);
    crpci_zk_node_own_mine(own, 0, NULL);
    crpci_loop_unlock(f->loop);
}

/* The directory was read. It holds the own node, and one with another number if that is not 5. */
static void list(fixture *f, int number)
{
    struct String_vector names;
    crpci_zk_answer a;
    char text[2][64], *data[2];
    memset(&a, 0, sizeof a);
    snprintf(text[0], sizeof text[0], "_c_x-lock-0000000005");
    snprintf(text[1], sizeof text[1], "_c_y-lock-%010d", number);
    data[0] = text[0];
    data[1] = text[1];
    names.count = number == 5 ? 1 : 2;
    names.data = data;
    a.names = &names;
    crpci_loop_lock(f->loop);
    assert_int_equal(f->q->reader.kind, CRPCI_ZK_WATCH_CHILDREN_ONCE);
    assert_true(crpci_queue_on_read(&f->q->reader, &a));
    crpci_loop_unlock(f->loop);
}

/* The own node was checked with success. */
static void check(fixture *f, int64_t token)
{
    struct Stat stat;
    memset(&stat, 0, sizeof stat);
    stat.czxid = token;
    crpci_loop_lock(f->loop);
    crpci_zk_node_own_mine(&f->q->own, crpci_loop_now(f->loop), &stat);
    crpci_loop_unlock(f->loop);
}

/* The lock's record was read. */
static void record(fixture *f, const char *text, int version)
{
    struct Stat stat;
    crpci_zk_answer a;
    memset(&stat, 0, sizeof stat);
    memset(&a, 0, sizeof a);
    stat.version = version;
    a.stat = &stat;
    a.text = text;
    a.size = (int)strlen(text);
    crpci_loop_lock(f->loop);
    assert_int_equal(f->q->reader.kind, CRPCI_ZK_WATCH_DATA_ONCE);
    assert_true(crpci_queue_on_read(&f->q->reader, &a));
    crpci_loop_unlock(f->loop);
}

/* The own record was written, or not; that was sent a while ago. */
static void write_record(fixture *f, int rc, int64_t ago_us)
{
    crpci_lease *lease = &f->q->lease;
    crpci_loop_lock(f->loop);
    assert_false(crpci_list_empty(&lease->node));
    lease->written = true;
    lease->answer(lease, rc, crpci_lease_now(f->q->item.session) - ago_us + 1476000);
    crpci_loop_unlock(f->loop);
}

static void acquire(fixture *f, int64_t token)
{
    assert_int_equal(crpc_lock_acquire(f->lock, -1), CRPC_OK);
    enter(f);
    list(f, 5);
    check(f, token);
    record(f, "free", 1);
    write_record(f, ZOK, 0);
    assert_int_equal(f->q->state, CRPCI_QUEUE_HELD);
}

static void it_holds_only_with_a_lease(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    assert_int_equal(crpc_lock_acquire(f.lock, -1), CRPC_OK);
    assert_int_equal(f.q->state, CRPCI_QUEUE_ENTER);
    enter(&f);
    assert_int_equal(f.q->state, CRPCI_QUEUE_LOOK);
    list(&f, 4);
    assert_int_equal(f.q->state, CRPCI_QUEUE_WAIT);
    assert_string_equal(f.q->before.path, "/l/_c_y-lock-0000000004");
    check(&f, 77); /* the own node is there, but not the first */
    assert_int_equal(f.q->state, CRPCI_QUEUE_WAIT);
    crpci_loop_lock(f.loop);
    {
        crpci_zk_answer gone;
        memset(&gone, 0, sizeof gone);
        gone.rc = ZNONODE;
        assert_true(crpci_queue_on_before(&f.q->before, &gone));
    }
    crpci_loop_unlock(f.loop);
    assert_int_equal(f.q->state, CRPCI_QUEUE_LOOK);
    list(&f, 6);
    assert_int_equal(f.q->state, CRPCI_QUEUE_FIRST);
    check(&f, 77);
    assert_int_equal(f.q->state, CRPCI_QUEUE_READ);
    record(&f, "", 0);
    assert_int_equal(f.q->state, CRPCI_QUEUE_CLAIM);
    assert_true(crpc_lock_lease_us(f.lock) == 0);
    write_record(&f, ZOK, 1476000); /* the answer took too long: nothing is left */
    assert_int_equal(f.q->state, CRPCI_QUEUE_CLAIM);
    write_record(&f, ZOK, 476000);
    assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
    assert_in_range(crpc_lock_lease_us(f.lock), 1, 1000000);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 1);
    assert_int_equal(f.told[1], CRPC_OK);
    crpci_loop_lock(f.loop); /* a timer that is too early ends nothing */
    crpci_queue_timer(f.loop, &f.q->item.timer);
    assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
    f.q->lease.until_us = 1; /* the lease runs out */
    crpci_queue_timer(f.loop, &f.q->item.timer);
    crpci_loop_unlock(f.loop);
    assert_true(crpc_lock_lease_us(f.lock) == 0);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    assert_int_equal(f.q->own.state, CRPCI_ZK_OWN_REMOVE); /* it stands in nobody's way */
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 2);
    assert_int_equal(f.told[1], CRPC_EGONE);
    end(&f);
}

/* The holder's node is gone, and its lease may not be over. */
static void the_lease_of_the_one_before_is_waited_out(void **state)
{
    fixture f;
    int64_t wait;
    (void)state;
    begin(&f);
    assert_int_equal(crpc_lock_acquire(f.lock, -1), CRPC_OK);
    enter(&f);
    list(&f, 5);
    check(&f, 77);
    record(&f, "_c_y-lock-0000000004, 1500", 8);
    assert_int_equal(f.q->state, CRPCI_QUEUE_CLAIM);
    assert_int_equal(f.q->lease.version, 8);
    wait = f.q->lease.due_us - crpci_zk_job_now(f.q->item.session);
    assert_in_range(wait, 1000000, 1546875);
    write_record(&f, ZBADVERSION, 0); /* it has written once more, or somebody else has */
    assert_int_equal(f.q->state, CRPCI_QUEUE_READ);
    assert_true(crpci_list_empty(&f.q->lease.node));
    record(&f, "_c_x-lock-0000000005, 1500", 9); /* this one has, without an answer */
    assert_int_equal(f.q->state, CRPCI_QUEUE_CLAIM);
    assert_true(f.q->lease.due_us <= crpci_zk_job_now(f.q->item.session));
    assert_int_equal(f.q->lease.version, 9);
    crpc_lock_release(f.lock);
    end(&f);
    begin(&f); /* without waiting it is as good as held */
    assert_int_equal(crpc_lock_acquire(f.lock, 0), CRPC_OK);
    enter(&f);
    list(&f, 5);
    check(&f, 77);
    record(&f, "_c_y-lock-0000000004, 1500", 8);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[1], CRPC_ETIMEDOUT);
    end(&f);
}

/* An error that says nothing about the node: what is held is held until the lease is over. */
static void an_error_on_renewal_gives_nothing_away(void **state)
{
    static const int codes[] = {-127, -125, ZNOAUTH, ZINVALIDACL};
    crpci_zk_answer a;
    crpci_zk_request q;
    fixture f;
    size_t i;
    (void)state;
    begin(&f);
    acquire(&f, 77);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    for (i = 0; i < sizeof codes / sizeof *codes; i++) {
        write_record(&f, codes[i], 0);
        memset(&a, 0, sizeof a);
        memset(&q, 0, sizeof q);
        a.rc = codes[i];
        q.order.verb = CRPCI_ZK_STAT;
        crpci_loop_lock(f.loop); /* the same for the check of the own node */
        f.q->own.job.work->event(&f.q->own.job, CRPCI_ZK_ANSWERED, &q, &a);
        crpci_loop_unlock(f.loop);
        assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
        assert_true(crpc_lock_lease_us(f.lock) > 0);
    }
    f.q->lease.until_us = 1;
    assert_true(crpc_lock_lease_us(f.lock) == 0);
    crpci_loop_lock(f.loop);
    crpci_queue_timer(f.loop, &f.q->item.timer);
    crpci_loop_unlock(f.loop);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 2);
    assert_int_equal(f.told[1], CRPC_EGONE);
    end(&f);
}

/* The program's thread comes late: it must not begin what another may have begun. */
static void a_lock_whose_lease_is_over_is_not_told_as_held(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    acquire(&f, 77);
    f.q->lease.until_us = 1;
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 1);
    assert_int_equal(f.told[1], CRPC_EGONE);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    end(&f);
}

/* Nor does an answer that comes too late revive it. */
static void a_lease_that_was_over_is_not_renewed(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    acquire(&f, 77);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    f.q->lease.until_us = 1;
    write_record(&f, ZOK, 0);
    assert_true(crpc_lock_lease_us(f.lock) == 0);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[1], CRPC_EGONE);
    end(&f);
}

/* Somebody has written into the lock's node: the own record is written over it, unless it is another
 * holder's. */
static void a_spoilt_record_is_written_again(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    acquire(&f, 77);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    write_record(&f, ZBADVERSION, 0);
    assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
    record(&f, "127.0.0.1", 40);
    assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
    assert_int_equal(f.q->lease.version, 40);
    assert_true(f.q->lease.due_us <= crpci_zk_job_now(f.q->item.session));
    write_record(&f, ZBADVERSION, 0);
    record(&f, "_c_y-lock-0000000009, 1500", 41);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[1], CRPC_EGONE);
    end(&f);
}

static void a_record_that_may_not_be_written_ends_the_attempt(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    assert_int_equal(crpc_lock_acquire(f.lock, -1), CRPC_OK);
    enter(&f);
    list(&f, 5);
    check(&f, 77);
    record(&f, "free", 0);
    write_record(&f, ZNOAUTH, 0);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 1);
    assert_int_equal(f.told[1], CRPC_EAUTH);
    end(&f);
}

/* The program may have read the lease a moment before it is lost: the next one has to wait for it,
 * unless it was given up on purpose or is over. */
static void only_a_lease_that_is_over_is_freed(void **state)
{
    static const bool freed[] = {true, true, false};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof freed / sizeof *freed; i++) {
        crpci_zk_multi *m;
        fixture f;
        begin(&f);
        acquire(&f, 77);
        if (i == 0)
            crpc_lock_release(f.lock);
        crpci_loop_lock(f.loop);
        if (i == 1) {
            f.q->lease.until_us = 1;
            crpci_queue_timer(f.loop, &f.q->item.timer);
        } else if (i == 2) {
            crpci_zk_job_over(f.q->item.session);
        }
        assert_int_equal(f.q->own.state, CRPCI_ZK_OWN_REMOVE);
        m = crpci_queue_leave(&f.q->own);
        assert_int_equal(m != NULL, freed[i]);
        crpci_zk_job_multi_free(f.loop->heap, m);
        crpci_loop_unlock(f.loop);
        end(&f);
    }
}

/* ZooKeeper's data were restored: its zxids, and with them the tokens, begin again. */
static void a_token_that_went_back_is_logged(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    acquire(&f, 77);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_null(strstr(line, "token"));
    crpci_loop_lock(f.loop);
    crpci_zk_job_over(f.q->item.session);
    crpci_zk_node_own_set(&f.q->own, &f.q->own.path, NULL);
    crpci_loop_unlock(f.loop);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[1], CRPC_EGONE);
    acquire(&f, 12);
#if CRPC_ENABLE_TEXTS
    assert_non_null(strstr(line, "token 12 comes after the larger 77"));
#endif
    end(&f);
}

static void it_takes_a_new_place_in_a_new_session(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    assert_int_equal(crpc_lock_acquire(f.lock, -1), CRPC_OK);
    enter(&f);
    list(&f, 4);
    crpci_loop_lock(f.loop);
    crpci_zk_job_over(f.q->item.session);
    crpci_loop_unlock(f.loop);
    assert_int_equal(f.q->state, CRPCI_QUEUE_ENTER);
    assert_int_equal(f.q->own.state, CRPCI_ZK_OWN_REMOVE); /* the old node, if it is still there */
    assert_int_equal(f.q->own.wish, CRPCI_ZK_WISH_AFRESH);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 0);
    end(&f);
}

/* Whoever only tries does not wait. */
static void an_attempt_without_waiting_fails_on_a_held_lock(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    assert_int_equal(crpc_lock_acquire(f.lock, 0), CRPC_OK);
    enter(&f);
    list(&f, 4);
    assert_int_equal(f.q->state, CRPCI_QUEUE_OUT);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 1);
    assert_int_equal(f.told[1], CRPC_ETIMEDOUT);
    end(&f);
}

/* --- a model of ZooKeeper, and contenders that meet every misfortune ---------------------------- */

#define CONTENDERS 3
#define NODES      64
#define SESSIONS   1024

/* The lock's node and those below it, as one server knows them. */
typedef struct model_state {
    int64_t zxid;
    int32_t next, version;
    char record[128];
    int count;
    struct {
        char path[96];
        int64_t owner, created;
    } node[NODES];
} model_state;

/* A request under way. Once it was executed, `seen` is what the server knew then. */
typedef struct model_request {
    crpci_zk_request *q;
    bool executed;
    int rc;
    char made[96];
    model_state seen;
} model_request;

typedef struct model_contender {
    crpci_zk_session *s;
    crpci_zk_handle handle;
    crpc_registry registry;
    crpc_lock *lock;
    model_state view; /* of its server, which lags behind */
    model_request sent[8];
    int count;
    int status; /* told last; 0: held */
    bool told;  /* since the program last did something */
    int64_t stalled_us; /* until then it hears nothing, though its server may work for it */
    int64_t acts_us;    /* until then the program counts on the lease that it asked for */
} model_contender;

typedef struct model {
    crpc_loop *loop;
    uint64_t seed;
    int64_t now_us, token;
    model_state leader;
    bool alive[SESSIONS]; /* for the leader */
    int64_t last;         /* session that was opened */
    model_contender one[CONTENDERS];
    int grants, waits;
} model;

static model m;

static unsigned draw(unsigned below)
{
    return ct_random_from(&m.seed) % below;
}

static int64_t model_clock(void *user)
{
    (void)user;
    return m.now_us;
}

static void model_on_lock(void *user, int status, int64_t token)
{
    model_contender *c = (model_contender *)user;
    c->status = status;
    c->told = true;
    if (status != CRPC_OK)
        return;
    if (token <= m.token)
        fail_msg("token %lld after %lld", (long long)token, (long long)m.token);
    m.token = token;
    m.grants++;
}

static int model_find(const model_state *st, const char *path)
{
    int i;
    for (i = 0; i < st->count && strcmp(st->node[i].path, path) != 0; i++) {
    }
    return i < st->count ? i : -1;
}

static void model_remove(model_state *st, int i)
{
    st->node[i] = st->node[--st->count];
}

/* The leader ends a session, whatever its client believes. */
static void model_expire(int64_t id)
{
    int i;
    m.alive[id] = false;
    m.leader.zxid++;
    for (i = m.leader.count; i-- > 0;) {
        if (m.leader.node[i].owner == id)
            model_remove(&m.leader, i);
    }
}

static int model_multi(const crpci_zk_multi *multi)
{
    int i, found;
    for (i = 0; i < multi->count; i += 2) {
        const zoo_op_t *op = &multi->ops[i];
        if (model_find(&m.leader, op->type == ZOO_DELETE_OP ? op->delete_op.path
                                                             : op->check_op.path) < 0)
            return ZNONODE;
        if (op[1].set_op.version != -1 && op[1].set_op.version != m.leader.version)
            return ZBADVERSION;
    }
    for (i = 0; i < multi->count; i += 2) {
        const zoo_op_t *op = &multi->ops[i];
        found = op->type == ZOO_DELETE_OP ? model_find(&m.leader, op->delete_op.path) : -1;
        if (found >= 0)
            model_remove(&m.leader, found);
        snprintf(m.leader.record, sizeof m.leader.record, "%.*s", op[1].set_op.datalen,
                 op[1].set_op.data);
        m.leader.version++;
    }
    return ZOK;
}

/* The leader executes a write. */
static int model_write(model_contender *c, model_request *r)
{
    const crpci_zk_order *o = &r->q->order;
    int i;
    if (!m.alive[c->s->id])
        return ZSESSIONEXPIRED;
    m.leader.zxid++;
    if (o->verb == CRPCI_ZK_MULTI)
        return model_multi(o->multi);
    if (o->verb == CRPCI_ZK_DELETE) {
        i = model_find(&m.leader, o->path);
        if (i < 0)
            return ZNONODE;
        model_remove(&m.leader, i);
        return ZOK;
    }
    assert_int_equal(o->verb, CRPCI_ZK_CREATE);
    assert_true(m.leader.count < NODES);
    i = m.leader.count++;
    snprintf(r->made, sizeof r->made, "%.80s%010d", o->path, (int)m.leader.next++);
    memcpy(m.leader.node[i].path, r->made, sizeof r->made);
    m.leader.node[i].owner = c->s->id;
    m.leader.node[i].created = m.leader.zxid;
    return ZOK;
}

/* The server works on the oldest request that waits there. */
static void model_execute(model_contender *c)
{
    model_request *r = NULL;
    int i;
    for (i = 0; i < c->count && !r; i++)
        r = c->sent[i].executed ? NULL : &c->sent[i];
    if (!r)
        return;
    r->executed = true;
    if (r->q->order.verb >= CRPCI_ZK_CREATE) {
        r->rc = model_write(c, r);
        r->seen = m.leader;
        if (r->rc != ZSESSIONEXPIRED)
            c->view = m.leader; /* the server answers only when it has applied it */
    } else {
        bool top = strcmp(r->q->order.path, "/l") == 0;
        r->seen = c->view;
        r->rc = top || model_find(&c->view, r->q->order.path) >= 0 ? ZOK : ZNONODE;
    }
}

/* The answer to the oldest request arrives, or `lost` in its place. */
static void model_answer(model_contender *c, int lost)
{
    static struct String_vector names;
    static char *data[NODES];
    model_request r = c->sent[0];
    struct Stat stat;
    crpci_zk_answer a;
    int i;
    if (!c->count || (!r.executed && !lost))
        return;
    memmove(c->sent, c->sent + 1, (size_t)--c->count * sizeof *c->sent);
    memset(&a, 0, sizeof a);
    memset(&stat, 0, sizeof stat);
    a.rc = lost ? lost : r.rc;
    stat.version = r.seen.version;
    i = model_find(&r.seen, r.q->order.path);
    if (i >= 0) {
        stat.czxid = r.seen.node[i].created;
        stat.ephemeralOwner = r.seen.node[i].owner;
    }
    names.count = r.seen.count;
    names.data = data;
    for (i = 0; i < r.seen.count; i++)
        data[i] = r.seen.node[i].path + 3;
    if (!a.rc) {
        a.stat = &stat;
        a.names = r.q->order.verb == CRPCI_ZK_LIST ? &names : NULL;
        a.text = r.q->order.verb == CRPCI_ZK_GET ? r.seen.record : r.made;
        a.size = (int)strlen(a.text);
    }
    if (r.q->job->sent == r.q)
        crpci_zk_job_take(r.q, &a);
    crpci_zk_job_request_free(r.q);
}

/* Some job of the session sends what is due. */
static void model_send(model_contender *c)
{
    crpci_list *i;
    for (i = c->s->jobs.next; i != &c->s->jobs; i = i->next) {
        crpci_zk_job *job = CRPCI_CONTAINER(i, crpci_zk_job, node);
        crpci_zk_order o;
        memset(&o, 0, sizeof o);
        o.version = -1;
        if (job->sent || job->due_us > m.now_us || c->count == 8 || draw(2))
            continue;
        if (!job->work->order(job, &o))
            continue;
        m.waits += o.verb == CRPCI_ZK_MULTI;
        memset(&c->sent[c->count], 0, sizeof *c->sent);
        job->sent = c->sent[c->count].q = crpci_zk_job_request(c->s, job, &o);
        job->sent->sent_us = m.now_us;
        c->count++;
        return;
    }
}

/* The server catches up with the leader; a watch on the node before the own one may fire. */
static void model_refresh(model_contender *c)
{
    crpci_zk_watch *w = &c->lock->place.before;
    c->view = m.leader;
    if (w->path && w->kind == CRPCI_ZK_WATCH_END && !w->job.sent &&
        c->lock->place.state == CRPCI_QUEUE_WAIT && model_find(&c->view, w->path) < 0)
        w->job.work->event(&w->job, CRPCI_ZK_REMOVED, NULL, NULL);
}

/* The connection is lost and made again. What was sent has been executed, or has not. */
static void model_reconnect(model_contender *c)
{
    while (c->count && draw(3))
        model_execute(c);
    while (c->count)
        model_answer(c, ZCONNECTIONLOSS);
    crpci_zk_job_tell(c->s, CRPCI_ZK_SUSPENDED);
    crpci_zk_job_tell(c->s, CRPCI_ZK_RESUMED);
    if (draw(2))
        model_refresh(c);
}

/* The session expires, or is given up while the leader still knows it. */
static void model_renew(model_contender *c)
{
    crpci_zk_job_over(c->s);
    while (c->count)
        model_answer(c, ZCLOSING);
    assert_true(m.last + 1 < SESSIONS);
    c->s->id = ++m.last;
    m.alive[m.last] = true;
    m.leader.zxid++;
    c->view = m.leader; /* no client goes back to a server that is behind what it has seen */
    crpci_zk_job_tell(c->s, CRPCI_ZK_RENEWED);
}

/* No two hold by their leases, nor by what their programs were told of these. */
static void model_check(void)
{
    int i, holders = 0;
    for (i = 0; i < CONTENDERS; i++)
        holders += crpci_queue_left(&m.one[i].lock->place) > 0 || m.one[i].acts_us > m.now_us;
    if (holders > 1)
        fail_msg("%d hold", holders);
}

/* The program: takes the lock whenever it does not have it, and releases it at times. */
static void model_program(model_contender *c)
{
    crpci_loop_unlock(m.loop);
    if (c->told && c->status != CRPC_OK) {
        c->told = crpc_lock_acquire(c->lock, draw(4) ? -1 : 3000) != CRPC_OK;
    } else if (c->told && !draw(100)) {
        crpc_lock_release(c->lock);
        c->status = CRPC_ECANCELED;
        c->acts_us = 0;
    } else if (crpc_lock_lease_us(c->lock)) {
        c->acts_us = m.now_us + crpc_lock_lease_us(c->lock);
    }
    crpci_loop_lock(m.loop);
}

static void model_misfortune(model_contender *c)
{
    int64_t id = draw(2) ? c->s->id : 1 + (int64_t)draw((unsigned)m.last);
    unsigned what = draw(10);
    if (what < 4) {
        model_reconnect(c);
    } else if (what < 6) {
        c->stalled_us = m.now_us + draw(2000000);
    } else if (what < 8) { /* cut off with a renewal under way, which was executed just in time */
        if (c->lock->place.state == CRPCI_QUEUE_HELD)
            c->lock->place.lease.due_us = 0;
        crpci_lease_arm(crpci_lease_find(c->s));
        while (c->count < 8 && !crpci_lease_find(c->s)->job.sent && draw(10))
            model_send(c);
        while (c->count && !c->sent[c->count - 1].executed)
            model_execute(c);
        c->stalled_us = m.now_us + draw(1000000);
        if (m.alive[c->s->id])
            model_expire(c->s->id);
    } else if (what < 9 && m.alive[id]) {
        model_expire(id);
    } else {
        model_renew(c);
    }
}

static void model_step(bool trouble)
{
    model_contender *c = &m.one[draw(CONTENDERS)];
    unsigned what = draw(1000);
    bool hears = c->stalled_us <= m.now_us;
    if (what < 250 && hears) {
        model_send(c);
    } else if (what < 500) {
        model_execute(c);
    } else if (what < 700 && hears) {
        model_answer(c, 0);
    } else if (what < 800 && hears) {
        model_refresh(c);
    } else if (what < 900) {
        m.now_us += draw(what % 10 ? 5000 : 60000);
        crpci_loop_unlock(m.loop);
        if (draw(2)) /* the program's thread is not always there */
            assert_int_equal(crpc_loop_step(m.loop, 0), CRPC_OK);
        crpci_loop_lock(m.loop);
    } else if (what < 990) {
        model_program(c);
    } else if (trouble && !draw(10)) {
        model_misfortune(c);
    } else if (!trouble && !m.alive[c->s->id]) {
        model_renew(c);
    }
}

/* The leader ends the sessions that no client has any more. */
static void model_forget(void)
{
    int64_t id;
    int i;
    for (id = 1; id <= m.last; id++) {
        bool used = false;
        for (i = 0; i < CONTENDERS; i++)
            used = used || m.one[i].s->id == id;
        if (!used && m.alive[id])
            model_expire(id);
    }
}

static void model_begin(uint64_t seed)
{
    crpc_loop_options o;
    int i;
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    m.seed = seed;
    m.now_us = 1000000;
    o.hooks = ct_hooks();
    o.hooks.clock_us = model_clock;
    o.hooks.log_level = -1;
    o.forbid_threads = 1;
    assert_int_equal(crpc_loop_open(&m.loop, &o), CRPC_OK);
    for (i = 0; i < CONTENDERS; i++) {
        model_contender *c = &m.one[i];
        crpci_directory_options so;
        memset(&so, 0, sizeof so);
        so.session_timeout_ms = 2000 + 1000 * i;
        assert_int_equal(crpci_zk_pool_new(m.loop, "127.0.0.1:1", &so, &c->s, NULL), CRPC_OK);
        c->s->busy = true; /* the test sends in its place */
        c->s->handle = &c->handle;
        c->s->phase = CRPCI_ZK_CONNECTED;
        c->s->negotiated_ms = so.session_timeout_ms;
        c->s->id = ++m.last;
        m.alive[m.last] = true;
        c->handle.session = c->s;
        crpci_list_init(&c->handle.requests);
        c->registry.loop = m.loop;
        c->registry.session = c->s;
        c->registry.root = (char *)(uintptr_t)"";
        crpci_list_init(&c->registry.items);
        assert_int_equal(crpc_lock_open(&c->lock, &c->registry, "l", NULL, model_on_lock, c),
                         CRPC_OK);
        c->status = CRPC_ECANCELED;
        c->told = true;
    }
    crpci_loop_lock(m.loop);
}

static void model_end(void)
{
    int i;
    crpci_loop_unlock(m.loop);
    for (i = 0; i < CONTENDERS; i++) {
        model_contender *c = &m.one[i];
        crpc_lock_close(c->lock);
        crpci_loop_lock(m.loop);
        while (c->count)
            model_answer(c, ZCLOSING);
        while (!crpci_list_empty(&c->s->jobs))
            crpci_zk_job_drop(CRPCI_CONTAINER(c->s->jobs.next, crpci_zk_job, node));
        crpci_zk_session_unlock(c->s);
    }
    crpc_loop_close(m.loop);
}

/* Sessions end at any moment, answers are late or lost, servers lag, sessions that were given up
 * live on, threads come late. Then the troubles end, and the lock changes hands as before. */
static void no_two_hold_whatever_happens(void **state)
{
    int round, i, grants = 0;
    (void)state;
    for (round = 0; round < 100; round++) {
        model_begin(ct_random());
        for (i = 0; i < 40000; i++) {
            model_step(true);
            model_check();
        }
        grants += m.grants;
        m.grants = 0;
        for (i = 0; i < 200000 && m.grants < 3; i++) {
            model_step(false);
            model_check();
            if (i % 1000 == 999 && m.last > CONTENDERS) /* the leader forgets who does not come */
                model_forget();
        }
        if (m.grants < 3)
            fail_msg("round %d: nobody holds any more", round);
        model_end();
    }
    print_message("held %d times\n", grants);
    assert_true(grants > 500);
}

/* An attempt ends in time, can be taken back, and begun again. */
static void it_tells_each_attempt_once(void **state)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_lock *lock;
    int locks[2] = {0, 0};
    (void)state;
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), ""), CRPC_OK);
    assert_int_equal(crpc_lock_open(&lock, r, "l", NULL, on_lock, locks), CRPC_OK);
    crpc_lock_release(lock); /* nothing to release */
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(locks[0], 0);
    assert_int_equal(crpc_lock_acquire(lock, 10), CRPC_OK);
    while (locks[0] < 1)
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(locks[1], CRPC_ECONN);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    crpc_lock_release(lock);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_EBUSY); /* the end was not told yet */
    while (locks[0] < 2)
        assert_int_equal(crpc_loop_step(loop, -1), CRPC_OK);
    assert_int_equal(locks[1], CRPC_ECANCELED);
    assert_int_equal(crpc_lock_acquire(lock, -1), CRPC_OK);
    crpc_lock_close(lock);
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_int_equal(locks[0], 2); /* closed: nothing is told any more */
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_refuses_bad_arguments),
        CT_TEST(it_ends_with_its_registry),
        CT_TEST(it_tells_each_attempt_once),
        CT_TEST(it_holds_only_with_a_lease),
        CT_TEST(the_lease_of_the_one_before_is_waited_out),
        CT_TEST(an_error_on_renewal_gives_nothing_away),
        CT_TEST(a_lock_whose_lease_is_over_is_not_told_as_held),
        CT_TEST(a_lease_that_was_over_is_not_renewed),
        CT_TEST(a_spoilt_record_is_written_again),
        CT_TEST(a_record_that_may_not_be_written_ends_the_attempt),
        CT_TEST(a_token_that_went_back_is_logged),
        CT_TEST(only_a_lease_that_is_over_is_freed),
        CT_TEST(no_two_hold_whatever_happens),
        CT_TEST(it_takes_a_new_place_in_a_new_session),
        CT_TEST(an_attempt_without_waiting_fails_on_a_held_lock),
    };
    return CT_RUN(tests);
}
