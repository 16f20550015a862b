/* impl-heap: chunks, accounting, limits, hooks. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_heap *heap_open(int64_t limit)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    assert_int_equal(crpci_heap_open(&h, &hooks, limit), CRPC_OK);
    return h;
}

static void new_bytes_are_zero_and_old_ones_stay(void **state)
{
    crpci_heap *h = heap_open(0);
    uint8_t *p = (uint8_t *)crpci_heap_alloc(h, 10), *q;
    size_t i;
    (void)state;
    assert_non_null(p);
    for (i = 0; i < 10; i++)
        assert_int_equal(p[i], 0);
    memset(p, 7, 10);
    p = (uint8_t *)crpci_heap_resize(h, p, 10, 30);
    assert_non_null(p);
    for (i = 0; i < 30; i++)
        assert_int_equal(p[i], i < 10 ? 7 : 0);
    p = (uint8_t *)crpci_heap_resize(h, p, 30, 5);
    assert_non_null(p);
    for (i = 0; i < 5; i++)
        assert_int_equal(p[i], 7);
    ct_alloc_of_test()->fail_at = ct_alloc_of_test()->calls + 1;
    q = (uint8_t *)crpci_heap_resize(h, p, 5, 500);
    assert_null(q);
    assert_int_equal(p[4], 7); /* the old block is still there */
    assert_int_equal(crpci_heap_resize(h, p, 5, 0) == NULL, 1);
    assert_null(crpci_heap_resize(h, NULL, 0, 0));
    crpci_heap_free(h, NULL, 0);
    crpci_heap_unref(h);
}

static void strings_are_copied_and_terminated(void **state)
{
    crpci_heap *h = heap_open(0);
    char *a = crpci_heap_strndup(h, "abcdef", 3), *b = crpci_heap_strndup(h, "", 0);
    (void)state;
    assert_string_equal(a, "abc");
    assert_string_equal(b, "");
    crpci_heap_strfree(h, a);
    crpci_heap_strfree(h, b);
    crpci_heap_strfree(h, NULL);
    crpci_heap_unref(h);
}

static void bytes_and_peak_are_the_allocators(void **state)
{
    crpci_heap *h = heap_open(0);
    ct_alloc *a = ct_alloc_of_test();
    crpci_chunk *c;
    void *p;
    int64_t before, peak;
    (void)state;
    assert_int_equal(h->bytes, a->live_bytes);
    before = h->bytes;
    p = crpci_heap_alloc(h, 1000);
    assert_int_equal(h->bytes, before + 1000);
    p = crpci_heap_resize(h, p, 1000, 3000);
    c = crpci_heap_chunk(h, 3000000);
    assert_int_equal(h->bytes, a->live_bytes);
    peak = h->bytes;
    assert_int_equal(h->peak, peak);
    crpci_heap_chunk_unref(c);
    crpci_heap_free(h, p, 3000);
    assert_int_equal(h->bytes, before);
    assert_int_equal(h->bytes, a->live_bytes);
    assert_int_equal(h->peak, peak);
    a->fail_at = a->calls + 1;
    assert_null(crpci_heap_alloc(h, 50000)); /* a failed allocation is not counted */
    assert_int_equal(h->bytes, before);
    assert_int_equal(h->peak, peak);
    crpci_heap_unref(h);
}

static void chunks_have_room_and_are_writable_to_the_end(void **state)
{
    crpci_heap *h = heap_open(0);
    size_t head = CRPCI_CHUNK_HEADER, size;
    (void)state;
    for (size = 0; size < 300000; size = size * 5 / 4 + 1) {
        crpci_chunk *c = crpci_heap_chunk(h, size);
        size_t total = size + head;
        assert_non_null(c);
        assert_true(c->cap >= size);
        assert_int_equal(c->refs, 1);
        memset(crpci_heap_data(c), 0x11, c->cap);
        if (total <= CRPCI_CHUNK_BIG) { /* the smallest power of two that holds it */
            assert_int_equal((c->cap + head) & (c->cap + head - 1), 0);
            assert_true(c->cap + head >= CRPCI_CHUNK_MIN);
            assert_true(c->cap + head == CRPCI_CHUNK_MIN || (c->cap + head) / 2 < total);
        } else {
            assert_int_equal(c->cap, size);
        }
        crpci_heap_chunk_unref(c);
    }
    crpci_heap_unref(h);
}

static void class_borders(void **state)
{
    unsigned k;
    (void)state;
    assert_int_equal(crpci_heap_class_of(0), 0);
    for (k = 0; k < CRPCI_CHUNK_CLASSES; k++) {
        assert_int_equal(crpci_heap_class_of((size_t)CRPCI_CHUNK_MIN << k), k);
        assert_int_equal(crpci_heap_class_of(((size_t)CRPCI_CHUNK_MIN << k) + 1), k + 1);
    }
    assert_int_equal(crpci_heap_class_of(SIZE_MAX), CRPCI_CHUNK_CLASSES);
    assert_int_equal(CRPCI_CHUNK_BIG, 2097152);
}

static void the_last_reference_frees(void **state)
{
    crpci_heap *h = heap_open(0);
    ct_alloc *a = ct_alloc_of_test();
    crpci_chunk *c = crpci_heap_chunk(h, 3000000), *d;
    (void)state;
    assert_int_equal(a->live_blocks, 2);
    crpci_heap_chunk_ref(c);
    crpci_heap_chunk_ref(c);
    crpci_heap_chunk_unref(c);
    crpci_heap_chunk_unref(c);
    assert_int_equal(a->live_blocks, 2);
    assert_int_equal(h->chunk_bytes, 3000000 + CRPCI_CHUNK_HEADER);
    crpci_heap_chunk_unref(c); /* too big to be kept */
    assert_int_equal(a->live_blocks, 1);
    assert_int_equal(h->chunk_bytes, 0);
    crpci_heap_chunk_unref(NULL);

    c = crpci_heap_chunk(h, 1000);
    crpci_heap_chunk_ref(c);
    crpci_heap_chunk_unref(c);
    d = crpci_heap_chunk(h, 1000);
    assert_ptr_not_equal(c, d); /* a chunk in use is not handed out again */
    crpci_heap_chunk_unref(c);
    crpci_heap_chunk_unref(d);
    crpci_heap_unref(h);
}

/* In a steady state chunks are taken and given back without an allocation. */
static void warm_chunks_come_without_the_allocator(void **state)
{
    crpci_heap *h = heap_open(0);
    crpci_chunk *c[20];
    long calls = 0;
    int round, i;
    (void)state;
    for (round = 0; round < 50; round++) {
        for (i = 0; i < 20; i++) {
            /* chunks of every class that is kept, two and more at a time */
            c[i] = crpci_heap_chunk(h, ((size_t)200 << (i % 9)) - (size_t)(round % 7));
            assert_non_null(c[i]);
            assert_int_equal(c[i]->refs, 1);
            assert_ptr_equal(c[i]->heap, h);
        }
        for (i = 0; i < 20; i++)
            crpci_heap_chunk_unref(c[(i * 7 + round) % 20]);
        if (round == 0)
            calls = ct_alloc_of_test()->calls;
        assert_int_equal(ct_alloc_of_test()->calls, calls);
        assert_int_equal(h->chunk_bytes, 0);
    }
    crpci_heap_unref(h);
}

/* Takes `count` chunks of 64 KiB, and gives them back. */
static void use_at_a_time(crpci_heap *h, int count)
{
    crpci_chunk *c[100];
    int i;
    for (i = 0; i < count; i++) {
        c[i] = crpci_heap_chunk(h, 60000);
        assert_non_null(c[i]);
    }
    assert_int_equal(h->chunk_bytes, count * 65536);
    while (i--)
        crpci_heap_chunk_unref(c[i]);
}

static void kept_chunks_are_bounded(void **state)
{
    enum { MANY = 100, FEW = 10 };
    crpci_heap *h = heap_open(0);
    int i;
    (void)state;
    use_at_a_time(h, MANY);
    /* as many as were in use at one time are kept */
    assert_int_equal(h->kept_bytes, MANY * 65536);
    assert_true(crpci_heap_is_old(h));
    crpci_heap_age(h); /* all of them were needed since the heap began */
    for (i = 0; i < 3; i++) {
        assert_int_equal(h->bytes, MANY * 65536 + (int64_t)sizeof *h);
        use_at_a_time(h, MANY);
        assert_int_equal(h->kept_bytes, MANY * 65536);
        crpci_heap_age(h);
    }
    /* and freed when fewer are needed, but for those that a next peak may need */
    for (i = 0; i < 50; i++) {
        use_at_a_time(h, FEW);
        crpci_heap_age(h);
        assert_int_equal(h->bytes, h->kept_bytes + (int64_t)sizeof *h);
    }
    assert_in_range(h->kept_bytes, FEW * 65536, (FEW + 15) * 65536);
    assert_true(crpci_heap_is_old(h));
    crpci_heap_age(h); /* or none */
    assert_int_equal(h->kept_bytes, CRPCI_HEAP_KEEP);
    assert_false(crpci_heap_is_old(h));
    crpci_thread_lock(&h->lock);
    crpci_heap_trim(h, 0, false);
    crpci_thread_unlock(&h->lock);
    assert_int_equal(h->kept_bytes, 0);
    assert_int_equal(h->bytes, sizeof *h);
    assert_int_equal(ct_alloc_of_test()->live_blocks, 1);
    use_at_a_time(h, 1); /* a trimmed heap still works */
    crpci_heap_unref(h);
}

static void the_limit_counts_kept_chunks_too(void **state)
{
    enum { LIMIT = 1 << 20, ROUNDS = 2000 };
    crpci_heap *h = heap_open(LIMIT);
    crpci_chunk *held[8] = {NULL}, *small;
    size_t size;
    int i;
    (void)state;
    for (size = 200; size < LIMIT; size *= 2) { /* each size in its turn all that there is */
        crpci_chunk *list = NULL, *c;
        while ((c = crpci_heap_chunk(h, size)) != NULL) {
            assert_true(h->chunk_bytes + h->kept_bytes <= LIMIT);
            c->next = list;
            list = c;
        }
        assert_true(h->chunk_bytes + size + CRPCI_CHUNK_HEADER > LIMIT);
        while ((c = list) != NULL) {
            list = c->next;
            crpci_heap_chunk_unref(c);
        }
        assert_true(h->bytes <= LIMIT + sizeof *h);
    }
    for (i = 0; i < ROUNDS; i++) {
        crpci_chunk **at = &held[ct_random() % 8];
        crpci_heap_chunk_unref(*at);
        *at = crpci_heap_chunk(h, (size_t)ct_random() % 400000); /* NULL now and then */
        assert_true(h->chunk_bytes + h->kept_bytes <= LIMIT);
        assert_int_equal(h->bytes, h->chunk_bytes + h->kept_bytes + sizeof *h);
    }
    for (i = 0; i < 8; i++)
        crpci_heap_chunk_unref(held[i]);
    /* the largest kept chunks make room first, and none when it would be in vain */
    crpci_thread_lock(&h->lock);
    crpci_heap_trim(h, 0, false);
    crpci_thread_unlock(&h->lock);
    small = crpci_heap_chunk(h, 200);
    held[0] = crpci_heap_chunk(h, 500000);
    held[1] = crpci_heap_chunk(h, 200000);
    crpci_heap_chunk_unref(small);
    crpci_heap_chunk_unref(held[0]);
    crpci_heap_chunk_unref(held[1]);
    assert_int_equal(h->kept_bytes, 256 + (512 << 10) + (256 << 10));
    assert_null(crpci_heap_chunk(h, LIMIT));
    assert_int_equal(h->kept_bytes, 256 + (512 << 10) + (256 << 10));
    held[0] = crpci_heap_chunk(h, 3 * (LIMIT / 8) - CRPCI_CHUNK_HEADER); /* 512 KiB, kept */
    assert_int_equal(h->kept_bytes, 256 + (256 << 10));
    held[1] = crpci_heap_chunk(h, 100000);
    assert_int_equal(h->kept_bytes, 256 + (256 << 10));
    held[2] = crpci_heap_chunk(h, 100000);
    assert_int_equal(h->kept_bytes, 256);
    for (i = 0; i < 3; i++)
        crpci_heap_chunk_unref(held[i]);
    crpci_heap_unref(h);
}

static void give_back(crpci_heap *h, crpci_heap_place *p)
{
    crpci_thread_lock(&h->lock);
    crpci_heap_leave(h, p);
    crpci_thread_unlock(&h->lock);
}

/* Half of the limit is for large messages, and half of that for each owner. */
static void large_messages_have_places_by_their_announced_size(void **state)
{
    enum { LIMIT = 8 << 20, MOST = LIMIT / 4 };
    crpci_heap *h = heap_open(LIMIT), *unlimited = heap_open(0);
    int a, b, c;
    crpci_heap_place *of_a, *of_b, *of_c;
    crpci_chunk *chunk;
    int64_t calls;
    (void)state;
    of_a = crpci_heap_admit(h, MOST + 12, &a); /* max_body, with a head */
    assert_non_null(of_a);
    assert_int_equal(h->large_bytes, MOST + 12);
    assert_int_equal(h->chunk_bytes, 0);
    assert_null(crpci_heap_admit(h, 100000, &a));
    of_b = crpci_heap_admit(h, MOST + 12, &b);
    assert_non_null(of_b);
    assert_null(crpci_heap_admit(h, 100000, &c));
    give_back(h, of_a);
    assert_null(crpci_heap_admit(h, 100000, &b));
    assert_null(crpci_heap_admit(h, MOST + 100000, &c));
    of_c = crpci_heap_admit(h, MOST - 100000, &c);
    of_a = crpci_heap_admit(h, 100000, &a);
    assert_non_null(of_c);
    assert_non_null(of_a);
    give_back(h, of_b);

    chunk = crpci_heap_chunk(h, 100000);
    crpci_heap_attach(chunk, of_a);
    crpci_heap_chunk_ref(chunk);
    crpci_heap_chunk_unref(chunk);
    assert_int_equal(h->large_bytes, MOST);
    crpci_heap_chunk_unref(chunk); /* with its last reference */
    assert_int_equal(h->large_bytes, MOST - 100000);
    assert_ptr_equal(crpci_heap_chunk(h, 100000), chunk); /* kept like any other */
    crpci_heap_chunk_unref(chunk);
    give_back(h, of_c);
    assert_null(h->places);
    assert_int_equal(h->large_bytes, 0);

    chunk = crpci_heap_chunk(h, 3 << 20); /* one that is never kept */
    crpci_heap_attach(chunk, crpci_heap_admit(h, MOST, &a));
    crpci_heap_chunk_unref(chunk);
    assert_int_equal(h->large_bytes, 0);
    crpci_heap_unref(h);

    ct_alloc_of_test()->fail_at = ct_alloc_of_test()->calls + 1;
    assert_null(crpci_heap_admit(unlimited, 100000, &a));
    assert_int_equal(unlimited->large_bytes, 0);
    of_a = crpci_heap_admit(unlimited, (size_t)INT32_MAX, &a);
    of_b = crpci_heap_admit(unlimited, (size_t)INT32_MAX, &a);
    assert_true(of_a && of_b);
    give_back(unlimited, of_a);
    give_back(unlimited, of_b);
    calls = ct_alloc_of_test()->calls; /* what was given back is used again */
    of_a = crpci_heap_admit(unlimited, 100000, &a);
    of_b = crpci_heap_admit(unlimited, 100000, &b);
    assert_int_equal(ct_alloc_of_test()->calls, calls);
    give_back(unlimited, of_a);
    give_back(unlimited, of_b);
    crpci_heap_unref(unlimited);
}

static void limit_holds_and_is_given_back(void **state)
{
    crpci_heap *h = heap_open(1024);
    crpci_chunk *c[5];
    int i;
    (void)state;
    for (i = 0; i < 4; i++) {
        c[i] = crpci_heap_chunk(h, 100);
        assert_non_null(c[i]);
    }
    assert_null(crpci_heap_chunk(h, 0));
    assert_null(crpci_heap_chunk(h, 100000));
    crpci_heap_chunk_unref(c[3]);
    c[3] = crpci_heap_chunk(h, 100);
    assert_non_null(c[3]);
    assert_null(crpci_heap_chunk(h, 100));
    for (i = 0; i < 4; i++)
        crpci_heap_chunk_unref(c[i]);
    /* Kept chunks make room for one of another size. */
    c[0] = crpci_heap_chunk(h, 900);
    assert_non_null(c[0]);
    assert_int_equal(h->chunk_bytes, 1024);
    assert_null(crpci_heap_chunk(h, 100));
    assert_int_equal(h->chunk_bytes, 1024);
    crpci_heap_chunk_unref(c[0]);
    /* Other blocks are not limited. */
    {
        void *p = crpci_heap_alloc(h, 5000);
        assert_non_null(p);
        crpci_heap_free(h, p, 5000);
    }
    crpci_heap_unref(h);
}

static void absurd_sizes_are_refused_before_the_allocator(void **state)
{
    crpci_heap *h = heap_open(0);
    long calls = ct_alloc_of_test()->calls;
    size_t i;
    (void)state;
    for (i = 0; i < CRPCI_CHUNK_HEADER; i++)
        assert_null(crpci_heap_chunk(h, SIZE_MAX - i));
    assert_int_equal(ct_alloc_of_test()->calls, calls);
    assert_int_equal(h->chunk_bytes, 0);
    crpci_heap_unref(h);
}

static void chunks_outlive_the_heaps_owner(void **state)
{
    crpci_heap *h = heap_open(0);
    crpci_chunk *kept = crpci_heap_chunk(h, 500), *big = crpci_heap_chunk(h, 3000000);
    (void)state;
    crpci_heap_ref(h);
    crpci_heap_unref(h);
    crpci_heap_unref(h);
    memset(crpci_heap_data(kept), 1, 500);
    memset(crpci_heap_data(big), 1, 3000000);
    crpci_heap_chunk_unref(big);
    assert_int_equal(ct_alloc_of_test()->live_blocks, 2);
    crpci_heap_chunk_unref(kept); /* frees the heap; CT_TEST finds a leak */
    assert_int_equal(ct_alloc_of_test()->live_blocks, 0);
}

static int chunk_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_heap *h;
    crpci_chunk *a = NULL, *b = NULL;
    char *s = NULL;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err) {
        assert_null(h);
        return err;
    }
    a = crpci_heap_chunk(h, 300);
    b = a ? crpci_heap_chunk(h, 100000) : NULL;
    s = b ? crpci_heap_strndup(h, "text", 4) : NULL;
    assert_int_equal(h->chunk_bytes, (a ? (int64_t)(a->cap + CRPCI_CHUNK_HEADER) : 0) +
                                         (b ? (int64_t)(b->cap + CRPCI_CHUNK_HEADER) : 0));
    err = s ? CRPC_OK : CRPC_ENOMEM;
    crpci_heap_strfree(h, s);
    crpci_heap_chunk_unref(a);
    crpci_heap_chunk_unref(b);
    crpci_heap_unref(h);
    return err;
}

static void out_of_memory_is_an_error(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(chunk_scenario, NULL), 4);
}

/* --- hooks -------------------------------------------------------------------------------- */

static char logged[1024];
static int logged_level, logged_lines;

static void log_hook(void *user, int level, const char *line)
{
    assert_ptr_equal(user, ct_alloc_of_test());
    logged_lines++;
    logged_level = level;
    snprintf(logged, sizeof logged, "%s", line);
}

static int64_t clock_hook(void *user)
{
    (void)user;
    return 123456789;
}

static int lines_at(int option)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    int level;
    hooks.log = log_hook;
    hooks.log_level = option;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    logged_lines = 0;
    for (level = CRPC_LOG_ERROR; level <= CRPC_LOG_DEBUG; level++)
        crpci_heap_log(h, level, "level %d", level);
    crpci_heap_unref(h);
    return logged_lines;
}

static void log_levels(void **state)
{
    (void)state;
    assert_int_equal(lines_at(0), 2); /* the default level: errors and warnings */
    assert_int_equal(logged_level, CRPC_LOG_WARN);
    assert_string_equal(logged, "level 2");
    assert_int_equal(lines_at(-1), 0);
    assert_int_equal(lines_at(CRPC_LOG_ERROR), 1);
    assert_int_equal(lines_at(CRPC_LOG_DEBUG), 4);
}

/* Nobody reads the pipe that is stderr here. The default log must drop lines rather than wait. */
static void a_full_stderr_does_not_stop_the_program(void **state)
{
    crpci_heap *h;
    char text[1 << 16];
    int ends[2], own = dup(2);
    ssize_t n;
    (void)state;
    assert_int_equal(crpci_heap_open(&h, NULL, 0), CRPC_OK);
    assert_int_equal(pipe(ends), 0);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    memset(text, 'x', sizeof text);
    while (write(ends[1], text, sizeof text) > 0)
        ;
    fcntl(ends[1], F_SETFL, 0);
    dup2(ends[1], 2);
    crpci_heap_log(h, CRPC_LOG_ERROR, "lost");
    crpci_heap_log(h, CRPC_LOG_ERROR, "lost too");
    while (read(ends[0], text, sizeof text) > 0)
        ;
    crpci_heap_log(h, CRPC_LOG_WARN, "here");
    crpci_heap_log(h, CRPC_LOG_WARN, "again");
    n = read(ends[0], text, sizeof text - 1);
    dup2(own, 2);
    close(own);
    close(ends[0]);
    close(ends[1]);
    assert_true(n > 0);
    text[n] = '\0';
    assert_string_equal(text, "crpc W here; 2 lines before it were lost, because stderr was full\n"
                              "crpc W again\n");
    crpci_heap_unref(h);
}

static void long_lines_are_cut(void **state)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    char text[2000];
    (void)state;
    hooks.log = log_hook;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    crpci_heap_log(h, CRPC_LOG_ERROR, "%s", text);
    assert_int_equal(strlen(logged), 511);
    crpci_heap_unref(h);
}

static void default_hooks(void **state)
{
    crpci_heap *h;
    int64_t before, now;
    void *p;
    (void)state;
    assert_int_equal(crpci_heap_open(&h, NULL, 0), CRPC_OK);
    before = ct_now_us();
    now = crpci_heap_now(h);
    assert_true(now >= before && now <= ct_now_us());
    p = crpci_heap_alloc(h, 100);
    assert_non_null(p);
    p = crpci_heap_resize(h, p, 100, 200);
    assert_non_null(p);
    crpci_heap_free(h, p, 200);
    assert_int_equal(h->bytes, sizeof *h);
    crpci_heap_unref(h);
}

static void the_clock_hook_is_used(void **state)
{
    crpc_hooks hooks = ct_hooks();
    crpci_heap *h;
    (void)state;
    hooks.clock_us = clock_hook;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    assert_int_equal(crpci_heap_now(h), 123456789);
    crpci_heap_unref(h);
}

/* --- several threads ---------------------------------------------------------------------- */

static crpci_heap *shared;
static crpci_chunk *handed;

static void *churn(void *arg)
{
    uint64_t random = (uint64_t)(uintptr_t)arg + 1;
    int i;
    for (i = 0; i < 4000; i++) {
        uint64_t r = ct_random_from(&random);
        crpci_chunk *c = crpci_heap_chunk(shared, (size_t)(r % 3000));
        if (c) {
            memset(crpci_heap_data(c), (int)r, 16);
            crpci_heap_chunk_ref(handed);
            crpci_heap_chunk_unref(c);
            crpci_heap_chunk_unref(handed);
        }
    }
    return NULL;
}

static void threads_share_a_heap(void **state)
{
    pthread_t threads[4];
    uintptr_t i;
    (void)state;
    shared = heap_open(0);
    handed = crpci_heap_chunk(shared, 100);
    for (i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, churn, (void *)i), 0);
    for (i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(handed->refs, 1);
    assert_int_equal(shared->refs, 2);
    crpci_heap_chunk_unref(handed);
    assert_int_equal(shared->chunk_bytes, 0);
    assert_int_equal(shared->bytes, shared->kept_bytes + (int64_t)sizeof *shared);
    crpci_heap_unref(shared);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(new_bytes_are_zero_and_old_ones_stay),
        CT_TEST(strings_are_copied_and_terminated),
        CT_TEST(bytes_and_peak_are_the_allocators),
        CT_TEST(chunks_have_room_and_are_writable_to_the_end),
        CT_TEST(class_borders),
        CT_TEST(the_last_reference_frees),
        CT_TEST(warm_chunks_come_without_the_allocator),
        CT_TEST(kept_chunks_are_bounded),
        CT_TEST(the_limit_counts_kept_chunks_too),
        CT_TEST(large_messages_have_places_by_their_announced_size),
        CT_TEST(limit_holds_and_is_given_back),
        CT_TEST(absurd_sizes_are_refused_before_the_allocator),
        CT_TEST(chunks_outlive_the_heaps_owner),
        CT_TEST(out_of_memory_is_an_error),
        CT_TEST(log_levels),
        CT_TEST(a_full_stderr_does_not_stop_the_program),
        CT_TEST(long_lines_are_cut),
        CT_TEST(default_hooks),
        CT_TEST(the_clock_hook_is_used),
        CT_TEST(threads_share_a_heap),
    };
    return CT_RUN(tests);
}
