/* impl-cache: the file of last good lists: damage, sharing, wear. */
#include <unistd.h>

static int syncs;

/* Counts how often the disk is waited for. */
static int test_fsync(int fd)
{
    syncs++;
    return fdatasync(fd);
}
#define fsync test_fsync

#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static crpci_heap *heap(const crpc_hooks *hooks)
{
    crpci_heap *h;
    crpc_hooks of_test = ct_hooks();
    assert_int_equal(crpci_heap_open(&h, hooks ? hooks : &of_test, 0), CRPC_OK);
    return h;
}

/* --- the cache file ----------------------------------------------------------------------------- */

static char *one_name[] = {(char *)"crpc%3A%2F%2F10.0.0.1%3A1%2FS"};
static char *two_names[] = {(char *)"crpc%3A%2F%2F10.0.0.1%3A1%2FS", (char *)"b"};

/* Writes a file and loads it; how many directories it gave. */
static size_t cached(crpci_heap *h, const char *path, const char *text, size_t len)
{
    crpci_cache c;
    const char *p;
    size_t n = 0;
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, len, f), len);
    fclose(f);
    assert_true(crpci_cache_init(&c, h, path, 0));
    for (p = c.found; p && *p; p += strcspn(p, "\n") + 1)
        n += *p == 'D';
    crpci_cache_clear(&c);
    return n;
}

static bool write_cache(crpci_cache *c, crpci_heap *h)
{
    int fd = -1;
    return c->own && crpci_cache_write(h, c->path, c->own, &fd) &&
           (fd < 0 || crpci_cache_settle(h, c->path, fd));
}

static crpci_heap *silent_heap(void)
{
    crpc_hooks hooks = ct_hooks();
    hooks.log_level = -1;
    return heap(&hooks);
}

static void it_takes_a_cache_file_whole_or_not_at_all(void **state)
{
    static const char wrong_format[] = "crpc-cache 1\nX y\nC ";
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], text[128];
    crpci_cache c;
    size_t size, len, i;
    char *good;
    int bit;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(crpci_cache_init(&c, h, path, 0));
    assert_true(crpci_cache_put(&c, "zookeeper://a:1/dubbo/S/providers", two_names, 2));
    assert_true(crpci_cache_put(&c, "zookeeper://a:1/dubbo/T/providers", one_name, 1));
    assert_true(write_cache(&c, h));
    good = crpci_cache_read_file(h, path, 10000, true, &size);
    assert_non_null(good);
    len = size - 1;
    assert_int_equal(cached(h, path, good, len), 2);
    for (i = 0; i < len; i++) {
        if (cached(h, path, good, i) != 0)
            fail_msg("cut to %zu of %zu bytes it was taken", i, len);
    }
    for (i = 0; i < len; i++) {
        for (bit = 0; bit < 9; bit++) {
            char was = good[i];
            good[i] = (char)(was ^ (bit < 8 ? 1 << bit : 0xff));
            if (cached(h, path, good, len) != 0)
                fail_msg("with byte %zu of %zu changed it was taken", i, len);
            good[i] = was;
        }
    }
    crpci_heap_free(h, good, size);
    crpci_cache_clear(&c);
    /* whose sum is right, but not the rest */
    len = (size_t)snprintf(text, sizeof text, "%s%08x\n", wrong_format,
                           (unsigned)crpci_cache_crc(wrong_format, strlen(wrong_format) - 2));
    assert_int_equal(cached(h, path, text, len), 0);
    assert_int_equal(crpci_cache_crc("123456789", 9), 0xcbf43926u);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

/* What the file gives for a directory: its names, with a space behind each. */
static const char *recalled(crpci_heap *h, const char *path, const char *key)
{
    static char out[128];
    crpci_cache c;
    crpci_names names;
    size_t i, n = 0;
    out[0] = '\0';
    assert_true(crpci_cache_init(&c, h, path, 0));
    crpci_cache_get(&c, key, &names);
    for (i = 0; i < names.count; i++)
        n += (size_t)snprintf(out + n, sizeof out - n, "%s ", names.name[i]);
    crpci_names_free(h, &names);
    crpci_cache_clear(&c);
    return out;
}

static void it_shares_its_cache_file(void **state)
{
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], temp[140];
    crpci_cache a, b;
    struct stat before, after;
    int fd;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    snprintf(temp, sizeof temp, "%s.tmp", path);
    assert_true(crpci_cache_init(&a, h, path, 0));
    assert_true(crpci_cache_init(&b, h, path, 0));
    assert_true(crpci_cache_put(&a, "S", one_name, 1));
    assert_true(crpci_cache_put(&a, "rules", one_name, 1));
    assert_true(crpci_cache_put(&b, "T", two_names, 2));
    assert_true(write_cache(&a, h));
    assert_true(write_cache(&b, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    assert_string_equal(recalled(h, path, "T"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    /* what is loaded and not read since is not written over what others read */
    crpci_heap_strfree(h, b.found);
    b.found = crpci_cache_read(h, path);
    assert_true(crpci_cache_put(&a, "S", two_names, 2));
    assert_true(write_cache(&a, h));
    assert_true(crpci_cache_put(&b, "T", one_name, 1));
    assert_true(write_cache(&b, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    assert_string_equal(recalled(h, path, "T"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    /* what is empty now is forgotten */
    assert_string_equal(recalled(h, path, "rules"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    assert_true(crpci_cache_put(&a, "rules", NULL, 0));
    assert_true(write_cache(&a, h));
    assert_string_equal(recalled(h, path, "rules"), "");
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS b ");
    /* what is in the file already is not written again */
    assert_int_equal(stat(path, &before), 0);
    assert_true(write_cache(&a, h));
    assert_int_equal(stat(path, &after), 0);
    assert_true(before.st_ino == after.st_ino && before.st_mtim.tv_nsec == after.st_mtim.tv_nsec);
    assert_int_equal(access(temp, F_OK), -1);
    /* who comes while another one writes comes again later; one that died holds nobody up */
    fd = crpci_cache_lock(temp);
    assert_true(fd >= 0);
    assert_true(crpci_cache_put(&a, "S", one_name, 1));
    assert_false(write_cache(&a, h));
    close(fd);
    assert_int_equal(access(temp, F_OK), 0);
    assert_true(write_cache(&a, h));
    assert_string_equal(recalled(h, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    crpci_cache_clear(&a);
    crpci_cache_clear(&b);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

static int64_t clock_of_test;

static int64_t test_clock(void *user)
{
    (void)user;
    return clock_of_test;
}

static void it_spares_the_flash(void **state)
{
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_cache c;
    crpci_cond cond;
    ct_dir dir = ct_dir_make();
    char path[128];
    int writes = 0, second;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.clock_us = test_clock;
    clock_of_test = 5000000;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    assert_true(crpci_cache_init(&c, loop->heap, path, 0));
    assert_true(crpci_cache_due(&c) == INT64_MAX);
    for (second = 0; second < 3600; second++) { /* an hour of flapping */
        clock_of_test += 1000000;
        crpci_loop_lock(loop);
        assert_true(crpci_cache_put(&c, "S", two_names, 1 + (size_t)second % 2));
        if (crpci_cache_due(&c) <= clock_of_test) {
            crpci_cache_save(&c, loop, &cond, false);
            writes++;
        }
        crpci_loop_unlock(loop);
    }
    assert_true(writes <= 60);
    assert_true(writes >= 59);
    crpci_cache_clear(&c);
    crpci_thread_cond_free(&cond);
    crpc_loop_close(loop);
    ct_dir_remove(dir);
}

/* Writing a file is quick, waiting for the disk is not. A loop that has no other thread waits only when
 * the kernel has had time to write it by itself; until then the old file stands. */
static void a_loop_waits_for_the_disk_later(void **state)
{
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_cache c;
    crpci_cond cond;
    ct_dir dir = ct_dir_make();
    char path[128];
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    o.hooks.clock_us = test_clock;
    clock_of_test = 5000000;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_thread_cond_init(&cond), CRPC_OK);
    assert_true(crpci_cache_init(&c, loop->heap, path, 0));
    syncs = 0;
    crpci_loop_lock(loop);
    assert_true(crpci_cache_put(&c, "S", one_name, 1));
    assert_true(crpci_cache_due(&c) <= clock_of_test);
    crpci_cache_save(&c, loop, &cond, true);
    assert_int_equal(syncs, 0);
    assert_int_equal(access(path, F_OK), -1);
    assert_true(crpci_cache_due(&c) == clock_of_test + CRPCI_CACHE_SETTLE_US);
    assert_true(crpci_cache_put(&c, "S", two_names, 2)); /* meanwhile: the next file's */
    clock_of_test += CRPCI_CACHE_SETTLE_US;
    crpci_cache_save(&c, loop, &cond, true);
    assert_int_equal(syncs, 1);
    assert_string_equal(recalled(loop->heap, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    assert_true(crpci_cache_due(&c) == clock_of_test + 60000000);
    crpci_cache_save(&c, loop, &cond, true);
    crpci_cache_clear(&c); /* closed before it settles */
    crpci_loop_unlock(loop);
    assert_string_equal(recalled(loop->heap, path, "S"), "crpc%3A%2F%2F10.0.0.1%3A1%2FS ");
    crpci_thread_cond_free(&cond);
    crpc_loop_close(loop);
    ct_dir_remove(dir);
}

/* Whoever may write to the directory must not be able to have crpc overwrite a file elsewhere, take
 * one for its own, or wait for ever. */
static void it_touches_only_files_of_its_own(void **state)
{
    static const char parts[] = "D S\nN x\n";
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], temp[140], victim[128], text[64];
    crpci_cache c;
    struct stat st;
    FILE *f;
    int fd = -1;
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    snprintf(temp, sizeof temp, "%s.tmp", path);
    snprintf(victim, sizeof victim, "%s/victim", dir.path);
    f = fopen(victim, "w");
    assert_non_null(f);
    fputs("precious", f);
    fclose(f);
    assert_int_equal(symlink(victim, temp), 0); /* a link as temporary file */
    assert_false(crpci_cache_write(h, path, parts, &fd));
    assert_int_equal(stat(victim, &st), 0);
    assert_int_equal(st.st_size, 8);
    assert_int_equal(unlink(temp), 0);
    assert_int_equal(mkfifo(temp, 0600), 0); /* a pipe that nobody reads */
    assert_false(crpci_cache_write(h, path, parts, &fd));
    assert_int_equal(unlink(temp), 0);
    assert_int_equal(link(victim, temp), 0); /* another name of the file */
    assert_false(crpci_cache_write(h, path, parts, &fd));
    assert_int_equal(stat(victim, &st), 0);
    assert_int_equal(st.st_size, 8);
    assert_int_equal(unlink(temp), 0);
    snprintf(text, sizeof text, "%s%sC %08x\n", CRPCI_CACHE_HEAD, parts, 0u);
    snprintf(text + strlen(text) - 11, 12, "C %08x\n",
             (unsigned)crpci_cache_crc(text, strlen(text) - 11));
    assert_int_equal(cached(h, victim, text, strlen(text)), 1);
    assert_int_equal(symlink(victim, path), 0); /* a link as cache */
    assert_string_equal(recalled(h, path, "S"), "");
    assert_true(crpci_cache_init(&c, h, path, 0));
    assert_true(crpci_cache_put(&c, "S", one_name, 1));
    assert_true(write_cache(&c, h)); /* replaced by a file */
    crpci_cache_clear(&c);
    assert_int_equal(lstat(path, &st), 0);
    assert_true(S_ISREG(st.st_mode));
    assert_int_equal(stat(victim, &st), 0);
    assert_int_equal(st.st_size, strlen(text));
    assert_int_equal(unlink(path), 0);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_string_equal(recalled(h, path, "S"), "");
    assert_int_equal(unlink(path), 0);
    assert_int_equal(cached(h, path, text, strlen(text)), 1);
    if (chown(path, 12345, (gid_t)-1) == 0) { /* only root can try this */
        assert_string_equal(recalled(h, path, "S"), "");
        assert_int_equal(rename(path, temp), 0);
        assert_false(crpci_cache_write(h, path, parts, &fd));
    }
    assert_int_equal(fd, -1);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

static void it_holds_a_large_service(void **state)
{
    enum { COUNT = 10000 };
    crpci_heap *h = silent_heap();
    ct_dir dir = ct_dir_make();
    char path[128], **names = (char **)calloc(COUNT, sizeof *names);
    crpci_names found;
    crpci_cache c;
    int i;
    (void)state;
    assert_non_null(names);
    for (i = 0; i < COUNT; i++) {
        names[i] = (char *)malloc(400);
        assert_non_null(names[i]);
        snprintf(names[i], 400, "crpc%%3A%%2F%%2F10.0.%d.%d%%3A8000%%2F%0330d", i / 250, i % 250, i);
    }
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(crpci_cache_init(&c, h, path, 0));
    assert_true(crpci_cache_put(&c, "S", names, COUNT));
    assert_true(write_cache(&c, h));
    crpci_cache_clear(&c);
    assert_true(crpci_cache_init(&c, h, path, 0));
    crpci_cache_get(&c, "S", &found);
    assert_int_equal(found.count, COUNT);
    assert_string_equal(found.name[COUNT - 1], names[COUNT - 1]);
    crpci_names_free(h, &found);
    crpci_cache_clear(&c);
    for (i = 0; i < COUNT; i++)
        free(names[i]);
    free(names);
    ct_dir_remove(dir);
    crpci_heap_unref(h);
}

/* The client's list of names has NULL where the server's answer was malformed. */
static void it_leaves_out_what_is_no_name(void **state)
{
    char *odd_names[] = {NULL, (char *)"", (char *)"a\nb", two_names[0]};
    crpci_heap *h = silent_heap();
    crpci_names names;
    crpci_cache c;
    (void)state;
    assert_true(crpci_cache_init(&c, h, "unused", 0));
    assert_true(crpci_cache_put(&c, "S", odd_names, 4));
    crpci_cache_get(&c, "S", &names);
    assert_int_equal(names.count, 1);
    assert_string_equal(names.name[0], two_names[0]);
    crpci_names_free(h, &names);
    crpci_cache_clear(&c);
    crpci_heap_unref(h);
}

static int cache_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_cache c;
    crpci_names names;
    crpci_heap *h;
    bool ok;
    int err = crpci_heap_open(&h, hooks, 0);
    if (err)
        return err;
    h->hooks.log_level = -1;
    ok = crpci_cache_init(&c, h, (const char *)user, 0);
    ok = ok && crpci_cache_put(&c, "S", one_name, 1) &&
         crpci_cache_put(&c, "S", two_names, 2) &&
         crpci_cache_put(&c, "T", NULL, 0) && write_cache(&c, h);
    if (ok) {
        crpci_cache_get(&c, "S", &names);
        ok = names.count == 2;
        crpci_names_free(h, &names);
    }
    crpci_cache_clear(&c);
    crpci_heap_unref(h);
    return ok ? CRPC_OK : CRPC_ENOMEM;
}

static void it_caches_in_want_of_memory(void **state)
{
    ct_dir dir = ct_dir_make();
    char path[128];
    (void)state;
    snprintf(path, sizeof path, "%s/cache", dir.path);
    assert_true(ct_sweep(cache_scenario, path) > 10);
    ct_dir_remove(dir);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_takes_a_cache_file_whole_or_not_at_all),
        CT_TEST(it_shares_its_cache_file),
        CT_TEST(it_spares_the_flash),
        CT_TEST(a_loop_waits_for_the_disk_later),
        CT_TEST(it_touches_only_files_of_its_own),
        CT_TEST(it_holds_a_large_service),
        CT_TEST(it_leaves_out_what_is_no_name),
        CT_TEST(it_caches_in_want_of_memory),
    };
    return CT_RUN(tests);
}
