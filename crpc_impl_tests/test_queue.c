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

static void begin(fixture *f)
{
    memset(f, 0, sizeof *f);
    f->loop = nowhere_loop(NULL);
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

/* The directory holds the own node, and one with another number if that is not 5. */
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
    assert_true(crpci_queue_on_list(&f->q->list, &a));
    crpci_loop_unlock(f->loop);
}

/* The own node was checked with success, a while ago. */
static void check(fixture *f, int64_t ago_us, int64_t token)
{
    struct Stat stat;
    memset(&stat, 0, sizeof stat);
    stat.czxid = token;
    crpci_loop_lock(f->loop);
    crpci_zk_node_own_mine(&f->q->own, crpci_loop_now(f->loop) - ago_us, &stat);
    crpci_loop_unlock(f->loop);
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
    check(&f, 0, 77); /* the own node is there, but not the first */
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
    check(&f, 3600000, 77); /* nine tenths of the timeout ago: too old a proof */
    assert_int_equal(f.q->state, CRPCI_QUEUE_FIRST);
    assert_true(crpc_lock_lease_us(f.lock) == 0);
    check(&f, 1000000, 77);
    assert_int_equal(f.q->state, CRPCI_QUEUE_HELD);
    assert_in_range(crpc_lock_lease_us(f.lock), 1000000, 2600000);
    assert_int_equal(crpc_loop_step(f.loop, 0), CRPC_OK);
    assert_int_equal(f.told[0], 1);
    assert_int_equal(f.told[1], CRPC_OK);
    crpci_loop_lock(f.loop); /* the lease runs out */
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
    assert_int_equal(f.q->own.state, CRPCI_ZK_OWN_CREATE);
    assert_null(f.q->own.path);
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
        CT_TEST(it_takes_a_new_place_in_a_new_session),
        CT_TEST(an_attempt_without_waiting_fails_on_a_held_lock),
    };
    return CT_RUN(tests);
}
