#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#include <pthread.h>

typedef struct job {
    crpci_task task;
    int number;
} job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static crpci_worker_flow flow; /* of one host */
static int order[4096], ran, running, most, gate_open;

static void reset(bool open)
{
    ran = running = most = 0;
    gate_open = open;
    crpci_worker_flow_init(&flow);
}

/* A task that waits until the gate is open. */
static void run(crpc_loop *loop, crpci_task *task)
{
    job *j = CRPCI_CONTAINER(task, job, task);
    assert_null(loop);
    pthread_mutex_lock(&lock);
    if (++running > most)
        most = running;
    pthread_cond_broadcast(&changed);
    while (!gate_open)
        pthread_cond_wait(&changed, &lock);
    order[ran++] = j->number;
    running--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static int get(const int *what)
{
    int value;
    pthread_mutex_lock(&lock);
    value = *what;
    pthread_mutex_unlock(&lock);
    return value;
}

static void open_gate(void)
{
    pthread_mutex_lock(&lock);
    gate_open = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static crpci_heap *heap(void)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    return h;
}

static job jobs[4096];

static crpci_task *job_of(int number)
{
    crpci_loop_task_init(&jobs[number].task, run);
    jobs[number].number = number;
    return &jobs[number].task;
}

static void one_worker_keeps_the_order(void **state)
{
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    int i;
    (void)state;
    reset(true);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 0, 65536), CRPC_OK);
    for (i = 0; i < 1000; i++)
        assert_true(crpci_worker_put(&pool, &flow, job_of(i), false));
    crpci_worker_stop(&pool, h, 1); /* queued tasks still run */
    assert_false(crpci_worker_put(&pool, &flow, job_of(0), true));
    crpci_worker_free(&pool);
    assert_int_equal(ran, 1000);
    for (i = 0; i < 1000; i++)
        assert_int_equal(order[i], i);
    crpci_heap_unref(h);
}

static void all_workers_work(void **state)
{
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    int i;
    (void)state;
    reset(false);
    assert_int_equal(crpci_worker_start(&pool, h, 4, 0, 65536), CRPC_OK);
    for (i = 0; i < 10; i++)
        assert_true(crpci_worker_put(&pool, &flow, job_of(i), false));
    assert_true(CT_WAIT(get(&running) == 4, 20000));
    ct_sleep_ms(20);
    assert_int_equal(get(&running), 4);
    open_gate();
    assert_true(CT_WAIT(get(&ran) == 10, 20000));
    assert_int_equal(most, 4);
    crpci_worker_stop(&pool, h, 4);
    crpci_worker_free(&pool);
    crpci_heap_unref(h);
}

static void hosts_take_turns(void **state)
{
    static const int expected[] = {0, 1, 101, 2, 102, 3, 4, 5};
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    crpci_worker_flow other;
    int i;
    (void)state;
    reset(false);
    crpci_worker_flow_init(&other);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 0, 65536), CRPC_OK);
    assert_true(crpci_worker_put(&pool, &flow, job_of(0), false));
    assert_true(CT_WAIT(get(&running) == 1, 20000));
    for (i = 1; i <= 5; i++)
        assert_true(crpci_worker_put(&pool, &flow, job_of(i), false));
    assert_true(crpci_worker_put(&pool, &other, job_of(101), false));
    assert_true(crpci_worker_put(&pool, &other, job_of(102), false));
    open_gate();
    crpci_worker_stop(&pool, h, 1);
    crpci_worker_free(&pool);
    assert_memory_equal(order, expected, sizeof expected);
    crpci_heap_unref(h);
}

static void charge(crpci_worker_pool *p, size_t turns)
{
    crpci_thread_lock(&p->lock);
    crpci_worker_charge(&flow, turns);
    crpci_thread_unlock(&p->lock);
}

/* A host whose requests are large gives way to others, but not to nobody. */
static void large_tasks_count_as_several(void **state)
{
    static const int expected[] = {0, 101, 102, 1, 103, 2, 3, 4};
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    crpci_worker_flow other;
    int i;
    (void)state;
    reset(false);
    crpci_worker_flow_init(&other);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 0, 65536), CRPC_OK);
    assert_true(crpci_worker_put(&pool, &flow, job_of(0), false));
    assert_true(CT_WAIT(get(&running) == 1, 20000));
    for (i = 1; i <= 4; i++)
        assert_true(crpci_worker_put(&pool, &flow, job_of(i), false));
    for (i = 101; i <= 103; i++)
        assert_true(crpci_worker_put(&pool, &other, job_of(i), false));
    charge(&pool, 2);
    open_gate();
    assert_true(CT_WAIT(get(&ran) == 8, 20000));
    assert_memory_equal(order, expected, sizeof expected);
    charge(&pool, SIZE_MAX / 2);
    charge(&pool, 1000);
    assert_int_equal(flow.debt, CRPCI_WORKER_DEBT);
    assert_true(crpci_worker_put(&pool, &flow, job_of(5), false)); /* no other has a task */
    assert_true(CT_WAIT(get(&ran) == 9, 20000));
    crpci_worker_stop(&pool, h, 1);
    crpci_worker_free(&pool);
    crpci_heap_unref(h);
}

/* A held flow stands in nobody's way, keeps its places, and goes on when all have let it go. */
static void a_held_flow_waits(void **state)
{
    static const int expected[] = {101, 102, 1, 2};
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    crpci_worker_flow other;
    (void)state;
    reset(true);
    crpci_worker_flow_init(&other);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 0, 65536), CRPC_OK);
    crpci_worker_hold(&pool, &flow, true);
    crpci_worker_hold(&pool, &flow, true);
    assert_true(crpci_worker_put(&pool, &flow, job_of(1), false));
    assert_true(crpci_worker_put(&pool, &flow, job_of(2), false));
    assert_true(crpci_worker_put(&pool, &other, job_of(101), false));
    assert_true(CT_WAIT(get(&ran) == 1, 20000));
    crpci_worker_hold(&pool, &flow, false);
    assert_true(crpci_worker_put(&pool, &other, job_of(102), false));
    assert_true(CT_WAIT(get(&ran) == 2, 20000));
    crpci_worker_hold(&pool, &flow, false);
    assert_true(CT_WAIT(get(&ran) == 4, 20000));
    assert_memory_equal(order, expected, sizeof expected);
    crpci_worker_hold(&pool, &flow, true);
    assert_true(crpci_worker_put(&pool, &flow, job_of(3), false));
    crpci_worker_stop(&pool, h, 1); /* runs it */
    crpci_worker_free(&pool);
    assert_int_equal(ran, 5);
    crpci_heap_unref(h);
}

static void the_queue_is_bounded(void **state)
{
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    crpci_worker_flow other;
    int i, pushed = 0;
    (void)state;
    reset(false);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 5, 65536), CRPC_OK);
    assert_true(crpci_worker_put(&pool, &flow, job_of(0), false));
    /* a task that runs is no longer in the queue */
    assert_true(CT_WAIT(get(&running) == 1, 20000));
    for (i = 1; i <= 10; i++)
        pushed += crpci_worker_put(&pool, &flow, job_of(i), false);
    assert_int_equal(pushed, 4); /* the last place is not for the flow that has most */
    crpci_worker_flow_init(&other);
    assert_true(crpci_worker_put(&pool, &other, job_of(11), false));
    assert_false(crpci_worker_put(&pool, &other, job_of(12), false));
    open_gate();
    assert_true(CT_WAIT(get(&ran) == 6, 20000));
    assert_true(crpci_worker_put(&pool, &flow, job_of(11), false));
    crpci_worker_stop(&pool, h, 1);
    crpci_worker_free(&pool);
    assert_int_equal(ran, 7);
    assert_int_equal(order[6], 11);
    crpci_heap_unref(h);
}

static void no_task_is_taken_after_the_stop(void **state)
{
    crpci_worker_pool pool;
    crpci_heap *h = heap();
    (void)state;
    reset(true);
    assert_int_equal(crpci_worker_start(&pool, h, 2, 0, 65536), CRPC_OK);
    pool.stopping = true;
    assert_false(crpci_worker_put(&pool, &flow, job_of(1), false));
    crpci_worker_stop(&pool, h, 2);
    crpci_worker_free(&pool);
    assert_int_equal(ran, 0);
    crpci_heap_unref(h);
}

typedef struct pusher {
    crpci_worker_pool *pool;
    int from;
} pusher;

static void *push_many(void *arg)
{
    pusher *p = (pusher *)arg;
    int i;
    for (i = 0; i < 1000; i++)
        crpci_worker_put(p->pool, &flow, job_of(p->from + i), false);
    return NULL;
}

static void many_threads_may_push(void **state)
{
    crpci_heap *h = heap();
    crpci_worker_pool pool;
    pusher p[4];
    pthread_t threads[4];
    static unsigned char seen[4096];
    int i, last[4] = {-1, -1, -1, -1};
    (void)state;
    reset(true);
    memset(seen, 0, sizeof seen);
    assert_int_equal(crpci_worker_start(&pool, h, 1, 0, 0), CRPC_OK);
    for (i = 0; i < 4; i++) {
        p[i].pool = &pool;
        p[i].from = i * 1000;
        assert_int_equal(pthread_create(&threads[i], NULL, push_many, &p[i]), 0);
    }
    for (i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    crpci_worker_stop(&pool, h, 1);
    crpci_worker_free(&pool);
    assert_int_equal(ran, 4000);
    for (i = 0; i < 4000; i++) {
        assert_int_equal(seen[order[i]]++, 0);
        assert_true(order[i] > last[order[i] / 1000]); /* tasks of one thread run in its order */
        last[order[i] / 1000] = order[i];
    }
    crpci_heap_unref(h);
}

static int start_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_worker_pool pool;
    crpci_heap *h;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    err = crpci_worker_start(&pool, h, 2, 0, 65536);
    if (!err) {
        crpci_worker_stop(&pool, h, 2);
        crpci_worker_free(&pool);
    }
    crpci_heap_unref(h);
    return err;
}

static void starting_survives_being_out_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(start_scenario, NULL), 2);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(one_worker_keeps_the_order), CT_TEST(all_workers_work),
        CT_TEST(hosts_take_turns), CT_TEST(large_tasks_count_as_several),
        CT_TEST(a_held_flow_waits), CT_TEST(the_queue_is_bounded), CT_TEST(no_task_is_taken_after_the_stop),
        CT_TEST(many_threads_may_push),      CT_TEST(starting_survives_being_out_of_memory),
    };
    return CT_RUN(tests);
}
