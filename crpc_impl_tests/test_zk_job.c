/* Requests to ZooKeeper: answers, and requests that get none. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* A session without a server, and a job on it that records its events. */
typedef struct fixture {
    crpc_loop *loop;
    crpci_zk_session s;
    crpci_zk_handle handle;
    crpci_zk_job job;
    char told[64]; /* a letter for each event: A answered, D doubted, R resumed, N renewed, ... */
    int rc;        /* of the last answer */
    int released;
} fixture;

static void on_event(crpci_zk_job *job, crpci_zk_event event, const crpci_zk_request *q,
                     const crpci_zk_answer *a)
{
    fixture *f = CRPCI_CONTAINER(job, fixture, job);
    size_t n = strlen(f->told);
    (void)q;
    f->told[n] = "ADRNSECX"[event];
    f->rc = a ? a->rc : 1;
}

static void on_release(void *holder)
{
    ((fixture *)holder)->released++;
}

static const crpci_zk_work work = {NULL, on_event, NULL};

static void begin(fixture *f)
{
    crpc_loop_options o;
    memset(f, 0, sizeof *f);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&f->loop, &o), CRPC_OK);
    f->s.loop = f->loop;
    f->s.heap = f->loop->heap;
    crpci_list_init(&f->s.jobs);
    crpci_list_init(&f->handle.requests);
    f->s.handle = &f->handle;
    f->handle.session = &f->s;
    crpci_zk_job_add(&f->job, &work, &f->s, 0, f, on_release);
}

static void end(fixture *f)
{
    crpci_zk_job_drop(&f->job);
    crpci_zk_job_drop(&f->job); /* off already */
    assert_int_equal(f->released, 1);
    crpc_loop_close(f->loop);
}

/* Sends a request and answers it. While a directory is missing the job still wants "/a/b". */
static void answer(fixture *f, crpci_zk_verb verb, const char *path, int rc)
{
    crpci_zk_request *q;
    crpci_zk_answer a;
    crpci_zk_order o;
    memset(&o, 0, sizeof o);
    memset(&a, 0, sizeof a);
    o.verb = verb;
    o.path = f->job.made ? "/a/b" : path;
    o.flags = CRPC_NODE_PARENTS;
    a.rc = rc;
    f->told[0] = f->told[1] = '\0';
    q = crpci_zk_job_request(&f->s, &f->job, &o);
    assert_non_null(q);
    assert_string_equal(q->path, path);
    f->job.sent = q;
    assert_int_equal(crpci_zk_job_writing(&f->job), verb >= CRPCI_ZK_CREATE && !q->parent);
    crpci_zk_job_take(q, &a);
    assert_null(f->job.sent);
    crpci_zk_job_request_free(q);
}

/* What only reads is asked again when no answer came; of a write the job has to find out. */
static void reads_without_an_answer_are_repeated(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    answer(&f, CRPCI_ZK_GET, "/a", ZCONNECTIONLOSS);
    assert_string_equal(f.told, "");
    assert_true(f.job.due_us > crpci_zk_job_now(&f.s) && f.job.due_us != INT64_MAX);
    answer(&f, CRPCI_ZK_SET, "/a", ZCONNECTIONLOSS);
    assert_string_equal(f.told, "D");
    answer(&f, CRPCI_ZK_GET, "/a", ZNONODE);
    assert_string_equal(f.told, "A");
    assert_int_equal(f.rc, ZNONODE);
    assert_true(f.job.due_us == INT64_MAX);
    end(&f);
}

/* A server with too much to do refuses a request without executing it: it is sent again. */
static void throttled_requests_are_repeated(void **state)
{
    static const crpci_zk_verb verbs[] = {CRPCI_ZK_GET, CRPCI_ZK_CREATE, CRPCI_ZK_DELETE};
    fixture f;
    size_t i;
    (void)state;
    begin(&f);
    for (i = 0; i < sizeof verbs / sizeof *verbs; i++) {
        answer(&f, verbs[i], "/a/b", -127);
        assert_string_equal(f.told, "");
        assert_true(f.job.due_us > crpci_zk_job_now(&f.s) && f.job.due_us != INT64_MAX);
    }
    answer(&f, CRPCI_ZK_CREATE, "/a/b", ZNONODE);
    answer(&f, CRPCI_ZK_CREATE, "/a", -127);
    assert_string_equal(f.told, "");
    assert_int_equal(f.job.made, 2);
    answer(&f, CRPCI_ZK_CREATE, "/a", ZOK);
    end(&f);
}

/* A missing directory is made on the way, without the job's knowing. */
static void missing_parents_are_created(void **state)
{
    fixture f;
    (void)state;
    begin(&f);
    answer(&f, CRPCI_ZK_CREATE, "/a/b", ZNONODE);
    assert_string_equal(f.told, "");
    assert_int_equal(f.job.made, 2);
    assert_true(f.job.due_us == 0);
    answer(&f, CRPCI_ZK_CREATE, "/a", ZCONNECTIONLOSS); /* done twice it is the same */
    assert_string_equal(f.told, "");
    answer(&f, CRPCI_ZK_CREATE, "/a", ZOK);
    assert_int_equal(f.job.made, 0);
    assert_true(f.job.due_us == 0);
    answer(&f, CRPCI_ZK_CREATE, "/a/b", ZNONODE);
    answer(&f, CRPCI_ZK_CREATE, "/a", ZNOAUTH); /* the end of it */
    assert_string_equal(f.told, "A");
    assert_int_equal(f.rc, ZNOAUTH);
    assert_int_equal(f.job.made, 0);
    answer(&f, CRPCI_ZK_CREATE, "/a", ZNONODE); /* above it is the root */
    assert_string_equal(f.told, "A");
    end(&f);
}

/* The end of the session leaves a write in doubt, and a read to be asked again. */
static void jobs_hear_of_the_end_of_a_session(void **state)
{
    crpci_zk_request *q;
    crpci_zk_order o;
    fixture f;
    int i;
    (void)state;
    begin(&f);
    memset(&o, 0, sizeof o);
    o.path = "/a";
    for (i = 0; i < 2; i++) {
        o.verb = i ? CRPCI_ZK_DELETE : CRPCI_ZK_LIST;
        q = crpci_zk_job_request(&f.s, &f.job, &o);
        f.job.sent = q;
        memset(f.told, 0, sizeof f.told);
        crpci_zk_job_over(&f.s);
        assert_string_equal(f.told, i ? "DE" : "E");
        assert_null(f.job.sent);
        crpci_zk_job_request_free(q);
    }
    end(&f);
}

static void waits_are_random_and_bounded(void **state)
{
    int64_t low = INT64_MAX, high = 0;
    fixture f;
    unsigned n;
    int i;
    (void)state;
    begin(&f);
    for (n = 0; n < 200; n++) {
        int64_t us = crpci_zk_job_backoff(&f.s, n);
        assert_true(us >= 300000 && us <= CRPCI_ZK_JOB_BACKOFF_US * 3 / 2);
    }
    for (i = 0; i < 1000; i++) {
        int64_t us = crpci_zk_job_spread(&f.s, 1000000, 20);
        low = us < low ? us : low;
        high = us > high ? us : high;
    }
    assert_true(low >= 800000 && low < 850000 && high <= 1200000 && high > 1150000);
    end(&f);
}

/* Plays the server to a job whose directory is missing: the first `there` parts of it exist.
 * Returns the number of directories that the job asks for. */
static int make(const char *directory, size_t there, bool allowed)
{
    crpci_zk_request *q;
    crpci_zk_answer a;
    crpci_zk_order o;
    char path[64];
    fixture f;
    int requests = 0;
    begin(&f);
    memset(&o, 0, sizeof o);
    memset(&a, 0, sizeof a);
    snprintf(path, sizeof path, "%s/node", directory);
    o.verb = CRPCI_ZK_CREATE;
    o.path = path;
    o.flags = CRPC_NODE_PARENTS;
    f.job.made = strlen(directory);
    while (f.job.made) {
        size_t depth = 0, i;
        q = crpci_zk_job_request(&f.s, &f.job, &o);
        assert_true(q && q->parent);
        f.job.sent = q;
        for (i = 0; q->path[i]; i++)
            depth += q->path[i] == '/';
        assert_true(strncmp(q->path, path, i) == 0 && path[i] == '/');
        if (++requests > 20)
            fail_msg("no end");
        a.rc = depth <= there       ? ZNODEEXISTS
               : depth > there + 1 ? ZNONODE
               : allowed           ? ZOK
                                   : ZNOAUTH;
        if (depth == there + 1 && allowed)
            there++;
        crpci_zk_job_take(q, &a);
        crpci_zk_job_request_free(q);
    }
    assert_string_equal(f.told, allowed || there == 3 ? "" : "A");
    end(&f);
    return requests;
}

static void it_makes_directories_from_below(void **state)
{
    (void)state;
    assert_int_equal(make("/a/b/c", 3, true), 1);
    assert_int_equal(make("/a/b/c", 2, true), 1);
    assert_int_equal(make("/a/b/c", 1, true), 3);
    assert_int_equal(make("/a/b/c", 0, true), 5);
    make("/a/b/c", 0, false);
    make("/a/b/c", 1, false);
    make("/a/b/c", 3, false);
}

static void codes_that_leave_the_outcome_open(void **state)
{
    static const int lost[] = {ZCONNECTIONLOSS, ZOPERATIONTIMEOUT,     ZSESSIONEXPIRED,
                               ZINVALIDSTATE,   ZCLOSING,              ZSESSIONMOVED,
                               ZSYSTEMERROR,    ZRUNTIMEINCONSISTENCY, ZMARSHALLINGERROR};
    static const int answers[] = {ZOK,         ZNONODE,
                                  ZNODEEXISTS, ZNOAUTH,
                                  ZBADARGUMENTS, ZUNIMPLEMENTED,
                                  ZBADVERSION, ZNOTREADONLY,
                                  ZINVALIDACL, ZNOCHILDRENFOREPHEMERALS};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof lost / sizeof *lost; i++)
        assert_true(crpci_zk_job_unanswered(lost[i]));
    for (i = 0; i < sizeof answers / sizeof *answers; i++)
        assert_false(crpci_zk_job_unanswered(answers[i]));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(reads_without_an_answer_are_repeated),
        CT_TEST(throttled_requests_are_repeated),
        CT_TEST(missing_parents_are_created),
        CT_TEST(jobs_hear_of_the_end_of_a_session),
        CT_TEST(waits_are_random_and_bounded),
        CT_TEST(it_makes_directories_from_below),
        CT_TEST(codes_that_leave_the_outcome_open),
    };
    return CT_RUN(tests);
}
