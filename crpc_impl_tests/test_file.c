/* impl-file: lines, changes, what is wrong with a file. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static char lines[2048]; /* what was logged */

static void on_line(void *user, int level, const char *line)
{
    size_t n = strlen(lines);
    (void)user;
    (void)level;
    snprintf(lines + n, sizeof lines - n, "%s\n", line);
}

static int64_t clock_of_test;

static int64_t test_clock(void *user)
{
    (void)user;
    return clock_of_test;
}

/* --- lines -------------------------------------------------------------------------------------- */

/* The providers that a consumer of service S takes of a text: "address/weight/warm-up ". */
static const char *taken(const char *text, size_t *bad)
{
    static char out[512];
    crpc_hooks hooks = ct_hooks();
    crpci_file_text t;
    crpci_names_service q;
    crpci_snapshot *list;
    crpci_heap *h;
    ct_guard g = ct_guard_make(text, strlen(text) + 1);
    size_t i, n = 0, wrong;
    assert_int_equal(crpci_heap_open(&h, &hooks, 0), CRPC_OK);
    assert_true(crpci_file_parse(h, (char *)g.data, &t));
    *bad = t.bad;
    memset(&q, 0, sizeof q);
    q.service = "S";
    list = crpci_directory_collect(h, t.names.name, t.names.count, &q, NULL, &wrong);
    assert_int_equal(wrong, 0);
    out[0] = '\0';
    for (i = 0; i < list->count; i++)
        n += (size_t)snprintf(out + n, sizeof out - n, "%s/%d/%d ", list->providers[i].address,
                              list->providers[i].weight, list->providers[i].warmup_ms);
    crpci_directory_snapshot_unref(list);
    crpci_names_free(h, &t.names);
    crpci_heap_unref(h);
    ct_guard_free(g);
    return out;
}

static void it_reads_lines(void **state)
{
    static const struct {
        const char *text, *taken;
        size_t bad;
    } texts[] = {
        {"", "", 0},
        {"\n\n \t\r\n# nothing\n", "", 0},
        {"10.0.0.1:80", "10.0.0.1:80/100/0 ", 0},
        {"10.0.0.2:80\n10.0.0.1:80\n", "10.0.0.1:80/100/0 10.0.0.2:80/100/0 ", 0},
        {"  10.0.0.1:80\tweight=7 warmup_ms=9 # ours\r\n", "10.0.0.1:80/7/9 ", 0},
        {"[::1]:80 weight=0", "[::1]:80/0/0 ", 0},
        {"10.0.0.1:80 weight=-1", "10.0.0.1:80/0/0 ", 0},
        {"10.0.0.1:80 service=S\n10.0.0.2:80 service=T", "10.0.0.1:80/100/0 ", 0},
        {"10.0.0.1:80 group=g\n10.0.0.2:80 version=1", "", 0},
        {"10.0.0.1:80#x\n#10.0.0.2:80", "10.0.0.1:80/100/0 ", 0},
        {"10.0.0.1:80\n10.0.0.1:80", "10.0.0.1:80/100/0 ", 0},
        {"10.0.0.1:80 weight=%=&?x\n10.0.0.2:80", "10.0.0.2:80/100/0 ", 1},
        {"10.0.0.1\n10.0.0.1:0\n10.0.0.1:x\nhost:80\nunix:/x\n::1:80\n=\n10.0.0.2:80",
         "10.0.0.2:80/100/0 ", 7},
        {"10.0.0.1:80 weight=heavy\n10.0.0.1:80 zone=b\n10.0.0.1:80 weight", "", 3},
    };
    size_t i, bad;
    (void)state;
    for (i = 0; i < sizeof texts / sizeof *texts; i++) {
        const char *got = taken(texts[i].text, &bad);
        if (strcmp(got, texts[i].taken) != 0 || bad != texts[i].bad)
            fail_msg("\"%s\": \"%s\" and %zu bad", texts[i].text, got, bad);
    }
}

static void it_reads_anything_safely(void **state)
{
    static const char parts[] = "10.0.0.1:80 =#\n\tweight=group=%&?[]\x01\xff";
    int k;
    (void)state;
    for (k = 0; k < 3000; k++) {
        char text[200];
        size_t i, n = ct_random() % (sizeof text - 1), bad;
        for (i = 0; i < n; i++)
            text[i] = parts[ct_random() % (sizeof parts - 1)];
        text[n] = '\0';
        taken(text, &bad);
    }
}

/* A line of nothing but what has to be encoded, twice, is the longest name there is. */
static void it_has_room_for_every_line(void **state)
{
    char text[400];
    size_t bad, n = (size_t)snprintf(text, sizeof text, "10.0.0.1:80 group=");
    (void)state;
    memset(text + n, '%', sizeof text - n);
    text[sizeof text - 1] = '\0';
    taken(text, &bad);
    text[250] = '\0';
    assert_string_equal(taken(text, &bad), "");
    assert_int_equal(bad, 0);
}

/* --- the file ----------------------------------------------------------------------------------- */

typedef struct fixture {
    ct_dir dir;
    char path[128];
    crpc_loop *loop;
    crpci_backend *r;
    crpci_subscriber *sub;
    char list[256]; /* the last one: "a:1 b:2 ", "(stale)" behind it */
    int pushes;
    bool close_in_push;
    bool refuse; /* lists, for want of memory */
} fixture;

static int on_push(void *user, crpci_snapshot *list)
{
    fixture *f = (fixture *)user;
    size_t i, n = 0;
    if (f->refuse)
        return CRPC_ENOMEM;
    f->list[0] = '\0';
    for (i = 0; i < list->count; i++)
        n += (size_t)snprintf(f->list + n, sizeof f->list - n, "%s ", list->providers[i].address);
    if (list->stale)
        strcat(f->list, "(stale)");
    f->pushes++;
    if (f->close_in_push && f->pushes > 1) {
        crpci_directory_close(f->r);
        f->r = NULL;
    }
    return CRPC_OK;
}

static void put(const fixture *f, const char *text)
{
    char temp[140];
    FILE *out;
    snprintf(temp, sizeof temp, "%s.new", f->path);
    out = fopen(temp, "w");
    assert_non_null(out);
    fputs(text, out);
    fclose(out);
    assert_int_equal(rename(temp, f->path), 0);
}

static int begin(fixture *f, const crpc_hooks *hooks, bool allow_empty, const char *text)
{
    crpc_loop_options o;
    crpci_names_service q;
    char name[160];
    int err;
    memset(f, 0, sizeof *f);
    memset(&o, 0, sizeof o);
    memset(&q, 0, sizeof q);
    lines[0] = '\0';
    f->dir = ct_dir_make();
    snprintf(f->path, sizeof f->path, "%s/providers", f->dir.path);
    if (text)
        put(f, text);
    o.hooks = *hooks;
    o.hooks.log = on_line;
    o.hooks.clock_us = test_clock;
    err = crpc_loop_open(&f->loop, &o);
    if (err)
        return err;
    snprintf(name, sizeof name, "file://%s", f->path);
    err = crpci_open_registry(f->loop, name, NULL, &f->r, NULL);
    q.service = "";
    q.allow_empty = allow_empty;
    return err ? err : crpci_directory_subscribe(f->r, &q, on_push, f, &f->sub);
}

static void end(fixture *f)
{
    crpci_directory_close(f->r);
    crpc_loop_close(f->loop);
    ct_dir_remove(f->dir);
}

static void start(fixture *f, bool allow_empty, const char *text)
{
    crpc_hooks hooks = ct_hooks();
    assert_int_equal(begin(f, &hooks, allow_empty, text), CRPC_OK);
}

/* A second goes by, twice: a file may have changed within the same tick of its clock. */
static void pass(fixture *f)
{
    int i;
    for (i = 0; i < 2; i++) {
        clock_of_test += 1100000;
        assert_int_equal(crpc_loop_step(f->loop, 0), CRPC_OK);
    }
}

static void it_follows_the_file(void **state)
{
    fixture f;
    (void)state;
    start(&f, false, "10.0.0.1:80\n");
    assert_string_equal(f.list, "10.0.0.1:80 "); /* when subscribing returns */
    pass(&f);
    assert_int_equal(f.pushes, 1);
    put(&f, "10.0.0.2:80 weight=5\n10.0.0.1:80\nhost:80\n");
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 10.0.0.2:80 ");
    assert_non_null(strstr(lines, "line 3"));
    lines[0] = '\0';
    pass(&f);
    assert_int_equal(f.pushes, 2);
    assert_string_equal(lines, ""); /* said once */
    crpci_directory_unsubscribe(f.r, f.sub);
    put(&f, "10.0.0.3:80");
    pass(&f);
    assert_int_equal(f.pushes, 2);
    end(&f);
}

static void it_keeps_the_last_list(void **state)
{
    fixture f;
    (void)state;
    start(&f, false, "10.0.0.1:80\n");
    put(&f, "");
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 (stale)");
    put(&f, "10.0.0.1:80\n");
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 ");
    unlink(f.path);
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 (stale)");
    put(&f, "10.0.0.2:80\n");
    pass(&f);
    assert_string_equal(f.list, "10.0.0.2:80 ");
    unlink(f.path);
    assert_int_equal(mkdir(f.path, 0700), 0); /* cannot be read */
    pass(&f);
    assert_string_equal(f.list, "10.0.0.2:80 (stale)");
    end(&f);
}

static void it_empties_the_list_where_that_is_allowed(void **state)
{
    fixture f;
    (void)state;
    start(&f, true, NULL);
    assert_int_equal(f.pushes, 1);
    assert_string_equal(f.list, "");
    put(&f, "10.0.0.1:80\n");
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 ");
    put(&f, "garbage\n"); /* that may have been a provider */
    pass(&f);
    assert_string_equal(f.list, "10.0.0.1:80 (stale)");
    put(&f, "# none\n");
    pass(&f);
    assert_string_equal(f.list, "");
    put(&f, "10.0.0.1:80\n");
    pass(&f);
    unlink(f.path);
    pass(&f);
    assert_string_equal(f.list, "");
    end(&f);
}

static void it_may_be_closed_in_its_callback(void **state)
{
    fixture f;
    (void)state;
    start(&f, false, "10.0.0.1:80\n");
    f.close_in_push = true;
    put(&f, "10.0.0.2:80\n");
    pass(&f);
    assert_int_equal(f.pushes, 2);
    assert_null(f.r);
    end(&f);
}

static void it_only_reads(void **state)
{
    crpci_names_service what;
    void *handle = &what;
    fixture f;
    (void)state;
    start(&f, false, "10.0.0.1:80\n");
    memset(&what, 0, sizeof what);
    assert_int_equal(crpci_directory_enroll(f.r, &what, NULL, NULL, &handle), CRPC_EUNSUPPORTED);
    assert_null(handle);
    crpci_directory_withdraw(f.r, NULL);
    crpci_directory_unsubscribe(f.r, NULL);
    end(&f);
}

static void it_wants_a_path(void **state)
{
    static const char *const bad[] = {"file://", "file:///", "file://relative", "file://a/b"};
    crpc_hooks hooks = ct_hooks();
    crpc_loop_options o;
    crpci_backend *r;
    crpc_loop *loop;
    size_t i;
    (void)state;
    memset(&o, 0, sizeof o);
    o.hooks = hooks;
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(crpci_open_registry(loop, bad[i], NULL, &r, NULL), CRPC_EINVAL);
        assert_null(r);
    }
    crpc_loop_close(loop);
}

/* A channel takes its providers from a file, and all of it without a service. */
/* The subscriber has no memory for a while: the same list is offered each second, until it is taken. */
static void a_refused_list_is_offered_again(void **state)
{
    fixture f;
    int i;
    (void)state;
    start(&f, false, "10.0.0.1:80\n");
    put(&f, "10.0.0.2:80\n");
    f.refuse = true;
    for (i = 0; i < 10; i++)
        pass(&f);
    f.refuse = false;
    pass(&f);
    assert_string_equal(f.list, "10.0.0.2:80 ");
    end(&f);
}

/* What cannot be read is an error for a channel that must connect, and a line in the log; a FIFO does
 * not stop the loop. */
static void what_is_no_readable_file_is_reported(void **state)
{
    static const char *const why[] = {"Is a directory", "Invalid argument", "File too large"};
    crpc_channel_options o;
    crpc_channel *ch = NULL;
    char url[200], *large;
    fixture f;
    int i;
    (void)state;
    for (i = 0; i < 3; i++) {
        start(&f, false, NULL);
        if (i == 0)
            assert_int_equal(mkdir(f.path, 0700), 0);
        if (i == 1)
            assert_int_equal(mkfifo(f.path, 0700), 0);
        if (i == 2) {
            large = (char *)calloc(1, CRPCI_FILE_MAX + 2);
            assert_non_null(large);
            memset(large, '\n', CRPCI_FILE_MAX + 1);
            put(&f, large);
            free(large);
        }
        pass(&f);
        assert_non_null(strstr(lines, why[i]));
        lines[0] = '\0';
        pass(&f);
        assert_null(strstr(lines, why[i])); /* said once */
        memset(&o, 0, sizeof o);
        o.private_loop.hooks.log = on_line;
        snprintf(url, sizeof url, "file://%s?must_connect=1&registry_timeout_ms=20", f.path);
        assert_int_equal(crpc_channel_open(&ch, url, &o, NULL), CRPC_EREGISTRY);
        assert_null(ch);
        end(&f);
    }
}

static void it_serves_channels(void **state)
{
    crpc_channel_options o;
    crpc_channel *ch;
    char url[200];
    fixture f;
    (void)state;
    start(&f, false, "10.0.0.1:80 service=S\n10.0.0.2:80 service=T\n10.0.0.3:80 group=g\n");
    memset(&o, 0, sizeof o);
    o.loop = f.loop;
    snprintf(url, sizeof url, "file://%s?retries=1", f.path);
    assert_int_equal(crpc_channel_open(&ch, url, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_providers(ch), 2);
    crpc_channel_close(ch);
    snprintf(url, sizeof url, "file://%s?service=S&group=*", f.path);
    assert_int_equal(crpc_channel_open(&ch, url, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_channel_providers(ch), 2);
    crpc_channel_close(ch);
    end(&f);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    fixture f;
    int err;
    (void)user;
    err = begin(&f, hooks, false, "10.0.0.1:80\n");
    if (!err) {
        put(&f, "10.0.0.2:80\n");
        pass(&f);
        pass(&f);
    }
    end(&f);
    return err;
}

static void it_survives_want_of_memory(void **state)
{
    (void)state;
    assert_true(ct_sweep(scenario, NULL) > 10);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_reads_lines),
        CT_TEST(it_reads_anything_safely),
        CT_TEST(it_has_room_for_every_line),
        CT_TEST(it_follows_the_file),
        CT_TEST(it_keeps_the_last_list),
        CT_TEST(it_empties_the_list_where_that_is_allowed),
        CT_TEST(it_may_be_closed_in_its_callback),
        CT_TEST(it_only_reads),
        CT_TEST(it_wants_a_path),
        CT_TEST(a_refused_list_is_offered_again),
        CT_TEST(what_is_no_readable_file_is_reported),
        CT_TEST(it_serves_channels),
        CT_TEST(it_survives_want_of_memory),
    };
    clock_of_test = 5000000;
    return CT_RUN(tests);
}
