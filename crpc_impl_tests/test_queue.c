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
        CT_TEST(it_takes_a_new_place_in_a_new_session),
        CT_TEST(an_attempt_without_waiting_fails_on_a_held_lock),
    };
    return CT_RUN(tests);
}
