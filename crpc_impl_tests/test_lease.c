/* Leases of locks: the records, and the transactions that write them, with the test as the server. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_zk_rig.h"

static void a_record_says_how_long_to_wait(void **state)
{
    static const struct {
        const char *text;
        int64_t us;
    } records[] = {
        {"_c_y-lock-0000000004, 1500", 1546875},
        {"_c_y-lock--2147483648, 1", 1031},
        {"-lock-0000000004, 1350000", 1392187500},
        {"_c_x-lock-0000000005, 1500", 0}, /* the own node's */
        {"free", 0},
        {"", 0},
        {"127.0.0.1", 0}, /* Curator's */
        {"_c_y-lock-0000000004, ", 0},
        {"_c_y-lock-0000000004,1500", 0},
        {"_c_y-lock-0000000004, 15s", 0},
        {"_c_y-lock-0000000004, -150", 0},
        {"_c_y-lock-0000000004, 15000000", 0},
        {"_c_y-lock-000000004, 1500", 0},
        {"nobody, 1500", 0},
        {", 1500", 0},
    };
    char longest[600];
    size_t i;
    (void)state;
    for (i = 0; i < sizeof records / sizeof *records; i++) {
        size_t n = strlen(records[i].text);
        char *copy = (char *)malloc(n ? n : 1); /* nothing is read behind it */
        int64_t us;
        memcpy(copy, records[i].text, n);
        us = crpci_lease_wait(copy, n, "/l/_c_x-lock-0000000005");
        free(copy);
        if (us != records[i].us)
            fail_msg("\"%s\" waits %lld us", records[i].text, (long long)us);
    }
    memset(longest, 'x', sizeof longest);
    memcpy(longest + 500, "-lock-0000000004, 1500", 22);
    assert_true(crpci_lease_wait(longest, 522, "/l/_c_x-lock-0000000005") == 0);
    assert_true(crpci_lease_wait(NULL, 0, "/l/_c_x-lock-0000000005") == 0);
}

/* --- a keeper whose transactions the test answers ----------------------------------------------- */

#define N 3

typedef struct owner {
    crpci_lease lease;
    int answers, rc;
    bool ends; /* it ends its lease when it is refused */
    int64_t until_us;
    char own[48], path[16];
} owner;

typedef struct fixture {
    crpc_loop *loop;
    crpci_zk_session *s;
    crpci_zk_handle handle;
    crpci_lease_keeper *k;
    owner one[N];
} fixture;

static void on_answer(crpci_lease *lease, int rc, int64_t until_us)
{
    owner *o = CRPCI_CONTAINER(lease, owner, lease);
    o->answers++;
    o->rc = rc;
    o->until_us = until_us;
    if (rc == ZOK)
        lease->until_us = until_us;
    else if (o->ends)
        crpci_lease_end(lease);
}

static void begin(fixture *f)
{
    int i;
    memset(f, 0, sizeof *f);
    f->loop = loop_with(NULL);
    assert_int_equal(session(f->loop, "127.0.0.1:1", &f->s), CRPC_OK);
    f->s->negotiated_ms = 4000;
    f->s->handle = &f->handle;
    f->handle.session = f->s;
    crpci_list_init(&f->handle.requests);
    assert_true(crpci_lease_prepare(f->s));
    assert_true(crpci_lease_prepare(f->s)); /* there is one */
    f->k = crpci_lease_find(f->s);
    for (i = 0; i < N; i++) {
        owner *o = &f->one[i];
        snprintf(o->path, sizeof o->path, "/l%d", i);
        snprintf(o->own, sizeof o->own, "/l%d/-lock-000000000%d", i, i);
        crpci_list_init(&o->lease.node);
        o->lease.path = o->path;
        o->lease.answer = on_answer;
        crpci_lease_ask(f->s, &o->lease, o->own, 10 * i, 0);
    }
}

static void end(fixture *f)
{
    int i;
    for (i = 0; i < N; i++)
        crpci_lease_end(&f->one[i].lease);
    f->s->handle = NULL;
    crpci_zk_job_drop(&f->k->job);
    crpci_loop_lock(f->loop);
    crpci_zk_session_unlock(f->s);
    crpc_loop_close(f->loop);
}

/* The next transaction, for `count` leases of which `first` is the first. */
static crpci_zk_request *sent(fixture *f, int count, int first)
{
    crpci_zk_job *job = &f->k->job;
    crpci_zk_request *q;
    crpci_zk_order o;
    char text[64];
    memset(&o, 0, sizeof o);
    assert_true(job->due_us <= crpci_zk_job_now(f->s) && !job->sent);
    assert_true(job->work->order(job, &o));
    assert_int_equal(o.verb, CRPCI_ZK_MULTI);
    assert_int_equal(o.multi->count, 2 * count);
    assert_string_equal(o.multi->ops[0].check_op.path, f->one[first].own);
    assert_int_equal(o.multi->ops[0].check_op.version, -1);
    assert_string_equal(o.multi->ops[1].set_op.path, f->one[first].path);
    snprintf(text, sizeof text, "-lock-000000000%d, 1500", first);
    assert_int_equal(o.multi->ops[1].set_op.datalen, (int)strlen(text));
    assert_string_equal(o.multi->ops[1].set_op.data, text);
    assert_int_equal(o.multi->ops[1].set_op.version, f->one[first].lease.version);
    q = crpci_zk_job_request(f->s, job, &o);
    assert_non_null(q);
    q->sent_us = crpci_zk_job_now(f->s);
    job->sent = q;
    return q;
}

static void answer(crpci_zk_request *q, int rc)
{
    crpci_zk_answer a;
    memset(&a, 0, sizeof a);
    a.rc = rc;
    crpci_zk_job_take(q, &a);
    crpci_zk_job_request_free(q);
}

static void all_leases_go_together(void **state)
{
    fixture f;
    int64_t before, after;
    int i;
    (void)state;
    begin(&f);
    before = crpci_lease_now(f.s);
    answer(sent(&f, N, 0), ZOK);
    after = crpci_lease_now(f.s);
    for (i = 0; i < N; i++) {
        const owner *o = &f.one[i];
        int64_t due = o->lease.due_us - crpci_zk_job_now(f.s);
        assert_int_equal(o->answers, 1);
        assert_int_equal(o->rc, ZOK);
        assert_int_equal(o->lease.version, 10 * i + 1);
        /* three eighths of the timeout from the sending, less 1/64 */
        assert_true(o->until_us >= before + 1500000 - 23437 &&
                    o->until_us <= after + 1500000 - 23437);
        assert_in_range(due, 1, 500000); /* renewed every eighth */
    }
    assert_true(f.k->job.due_us > crpci_zk_job_now(f.s));
    for (i = 0; i < N; i++)
        f.one[i].lease.due_us = 0;
    crpci_lease_arm(f.k);
    answer(sent(&f, N, 0), ZOK);
    assert_int_equal(f.one[2].lease.version, 22);
    end(&f);
}

/* One record is spoilt, one node is gone: the third lease is renewed all the same. */
static void each_is_tried_alone_after_a_failure(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    f.one[1].ends = true;
    answer(sent(&f, N, 0), ZBADVERSION);
    assert_int_equal(f.one[0].answers, 0);
    answer(sent(&f, 1, 0), ZBADVERSION);
    assert_int_equal(f.one[0].answers, 1);
    assert_int_equal(f.one[0].rc, ZBADVERSION);
    assert_int_equal(f.one[0].lease.version, 0);
    answer(sent(&f, 1, 1), ZNONODE);
    assert_int_equal(f.one[1].rc, ZNONODE);
    answer(sent(&f, 1, 2), ZOK);
    assert_int_equal(f.one[2].rc, ZOK);
    crpci_lease_ask(f.s, &f.one[0].lease, f.one[0].own, 7, 0); /* the owner has read the record */
    answer(sent(&f, 1, 0), ZOK);
    assert_int_equal(f.one[0].rc, ZOK);
    f.one[0].lease.due_us = f.one[2].lease.due_us = 0;
    crpci_lease_arm(f.k);
    answer(sent(&f, 2, 0), ZOK); /* together again, without the one that ended */
    assert_int_equal(f.one[1].answers, 1);
    end(&f);
}

/* "Try again", or no answer at all: soon, and long before the lease is over. */
static void without_an_answer_it_is_sent_again(void **state)
{
    static const int codes[] = {-127, ZCONNECTIONLOSS, ZOPERATIONTIMEOUT, ZSESSIONMOVED};
    fixture f;
    size_t i;
    (void)state;
    begin(&f);
    answer(sent(&f, N, 0), ZOK);
    for (i = 0; i < sizeof codes / sizeof *codes; i++) {
        f.one[0].lease.due_us = f.one[2].lease.due_us = 0;
        crpci_lease_arm(f.k);
        answer(sent(&f, 2, 0), codes[i]);
        assert_int_equal(f.one[0].answers, 1);
        assert_true(f.k->job.due_us - crpci_zk_job_now(f.s) < 200000);
    }
    f.k->job.work->event(&f.k->job, CRPCI_ZK_RESUMED, NULL, NULL);
    answer(sent(&f, N, 0), ZOK); /* connected again: what is held is renewed at once */
    assert_int_equal(f.one[1].answers, 2);
    end(&f);
}

/* A lease that ends while the transaction is under way hears nothing of it. */
static void an_ended_lease_is_not_told(void **state)
{
    crpci_zk_request *q;
    fixture f;
    (void)state;
    begin(&f);
    q = sent(&f, N, 0);
    crpci_lease_end(&f.one[0].lease);
    crpci_lease_end(&f.one[1].lease);
    crpci_lease_ask(f.s, &f.one[1].lease, f.one[1].own, 3, 0); /* a new one: not what was asked */
    answer(q, ZOK);
    assert_int_equal(f.one[0].answers, 0);
    assert_int_equal(f.one[1].answers, 0);
    assert_int_equal(f.one[2].answers, 1);
    answer(sent(&f, 1, 1), ZOK);
    assert_int_equal(f.one[1].answers, 1);
    end(&f);
}

static void a_long_list_goes_in_parts(void **state)
{
    enum { MANY = 200 };
    static char path[MANY][4000];
    static owner many[MANY];
    fixture f;
    int i, sendings = 0, answers = 0;
    (void)state;
    begin(&f);
    answer(sent(&f, N, 0), ZOK);
    memset(many, 0, sizeof many);
    for (i = 0; i < MANY; i++) {
        memset(path[i], 'x', sizeof path[i] - 1);
        path[i][0] = '/';
        snprintf(many[i].own, sizeof many[i].own, "/l/-lock-%010d", i);
        crpci_list_init(&many[i].lease.node);
        many[i].lease.path = path[i];
        many[i].lease.answer = on_answer;
        crpci_lease_ask(f.s, &many[i].lease, many[i].own, 0, 0);
    }
    while (f.k->job.due_us <= crpci_zk_job_now(f.s) && sendings < MANY) {
        crpci_zk_order o;
        crpci_zk_request *q;
        memset(&o, 0, sizeof o);
        if (!f.k->job.work->order(&f.k->job, &o))
            break;
        q = crpci_zk_job_request(f.s, &f.k->job, &o);
        assert_true(o.multi->size < 800000);
        f.k->job.sent = q;
        q->sent_us = crpci_zk_job_now(f.s);
        answer(q, ZOK);
        sendings++;
    }
    for (i = 0; i < MANY; i++) {
        answers += many[i].answers;
        crpci_lease_end(&many[i].lease);
    }
    assert_in_range(sendings, 2, 10);
    assert_in_range(answers, MANY, 10 * MANY);
    end(&f);
}

/* A contender that has written a record frees it; one that has not must not touch another's. */
static void leaving_frees_the_record(void **state)
{
    crpci_zk_multi *m;
    fixture f;
    (void)state;
    begin(&f);
    assert_null(crpci_lease_leave(f.loop->heap, &f.one[0].lease, f.one[0].own));
    answer(sent(&f, N, 0), ZCONNECTIONLOSS); /* perhaps */
    m = crpci_lease_leave(f.loop->heap, &f.one[0].lease, f.one[0].own);
    assert_non_null(m);
    assert_int_equal(m->count, 2);
    assert_string_equal(m->ops[0].delete_op.path, f.one[0].own);
    assert_string_equal(m->ops[1].set_op.path, "/l0");
    assert_string_equal(m->ops[1].set_op.data, "free");
    assert_int_equal(m->ops[1].set_op.version, -1);
    crpci_zk_job_multi_free(f.loop->heap, m);
    end(&f);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_record_says_how_long_to_wait),
        CT_TEST(all_leases_go_together),
        CT_TEST(each_is_tried_alone_after_a_failure),
        CT_TEST(without_an_answer_it_is_sent_again),
        CT_TEST(an_ended_lease_is_not_told),
        CT_TEST(a_long_list_goes_in_parts),
        CT_TEST(leaving_frees_the_record),
    };
    return CT_RUN(tests);
}
