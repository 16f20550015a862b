/* impl-options: tables of options, and what the header and the manual say about them. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

typedef struct sample {
    int count;
    int64_t bytes;
    crpc_cluster kind;
    const char *name;
    const char *secret;
    int stack;
} sample;

static const crpci_option sample_rows[] = {
    CRPCI_OPTION_ROW(sample, count, "count", 0, 7, 3, 20),
    CRPCI_OPTION_ROW(sample, bytes, "bytes", 0, 64 << 20, 0, CRPCI_OPTION_ANY),
    CRPCI_OPTION_ROW(sample, kind, "kind\0,one,two,three", CRPCI_OPTION_WORDS, 2, 2, 3),
    CRPCI_OPTION_ROW(sample, name, "name", CRPCI_OPTION_TEXT, 0, 0, 0),
    CRPCI_OPTION_ROW(sample, secret, "secret", CRPCI_OPTION_TEXT | CRPCI_OPTION_SECRET, 0, 0, 0),
    CRPCI_OPTION_ROW(sample, stack, "stack", CRPCI_OPTION_STACK, 0, 0, CRPCI_OPTION_ANY),
};
static const crpci_options sample_options = {CRPCI_OPTIONS_OF(sample_rows)};

static void zero_and_minus_one_get_their_values(void **state)
{
    sample s = {0, 0, CRPC_CLUSTER_DEFAULT, NULL, NULL, 0};
    (void)state;
    crpci_options_fill(&sample_options, &s);
    assert_int_equal(s.count, 7);
    assert_int_equal(s.bytes, 64 << 20);
    assert_int_equal(s.kind, 2);
    assert_null(s.name);
    s.count = -1;
    s.bytes = -9; /* below -1 counts as -1 */
    crpci_options_fill(&sample_options, &s);
    assert_int_equal(s.count, 3);
    assert_int_equal(s.bytes, 0);
    s.bytes = INT64_C(1) << 40;
    crpci_options_fill(&sample_options, &s);
    assert_true(s.bytes == INT64_C(1) << 40);
}

static void a_range_error_names_option_and_limit(void **state)
{
    sample s = {20, 1, CRPC_CLUSTER_DEFAULT, NULL, NULL, 0};
    crpc_error error;
    (void)state;
    assert_int_equal(crpci_options_check(&sample_options, &s, &error), CRPC_OK);
    s.count = 21;
    assert_int_equal(crpci_options_check(&sample_options, &s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "count=21: at most 20");
    s.count = 1;
    s.stack = 16383;
    assert_int_equal(crpci_options_check(&sample_options, &s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "stack=16383: at least 16384");
    s.stack = -1;
    assert_int_equal(crpci_options_check(&sample_options, &s, &error), CRPC_OK);
    s.stack = 16384;
    s.count = -1;
    assert_int_equal(crpci_options_check(&sample_options, &s, &error), CRPC_OK);
    s.kind = (crpc_cluster)4;
    assert_int_equal(crpci_options_check(&sample_options, &s, NULL), CRPC_EINVAL);
}

static void text_is_read_or_explained(void **state)
{
    static const struct {
        const char *key, *value, *says;
    } bad[] = {
        {"count", "21", "count=21: at most 20"},
        {"stack", "1", "stack=1: at least 16384"},
        {"count", "-2", "count=-2: not a whole number from -1 on"},
        {"count", "99999999999999999999", "count=9223372036854775807: at most 20"},
        {"count", "4x", "count=4x: not a whole number from -1 on"},
        {"count", "", "count=: not a whole number from -1 on"},
        {"count", "-", "count=-: not a whole number from -1 on"},
        {"count", " 4", "count= 4: not a whole number from -1 on"},
        {"kind", "2", "kind=2: not one of one,two,three"},
        {"kind", "tw", "kind=tw: not one of one,two,three"},
        {"kind", "", "kind=: not one of one,two,three"},
    };
    sample s = {0, 0, CRPC_CLUSTER_DEFAULT, NULL, NULL, 0};
    crpc_error error;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        const crpci_option *o = crpci_options_find(&sample_options, bad[i].key);
        assert_int_equal(crpci_options_read(o, &s, bad[i].value, &error), CRPC_EINVAL);
        assert_string_equal(error.text, bad[i].says);
    }
    assert_int_equal(crpci_options_read(&sample_rows[0], &s, "-1", &error), CRPC_OK);
    assert_int_equal(s.count, -1);
    assert_int_equal(crpci_options_read(&sample_rows[1], &s, "1099511627776", &error), CRPC_OK);
    assert_true(s.bytes == INT64_C(1) << 40);
    assert_int_equal(crpci_options_read(&sample_rows[2], &s, "three", &error), CRPC_OK);
    assert_int_equal(s.kind, 3);
    assert_null(crpci_options_find(&sample_options, "coun"));
}

static int lines(sample *s, const char *text, crpc_error *error)
{
    static char copy[512];
    crpci_options_target to;
    to.set = &sample_options;
    to.options = s;
    to.seen = 0;
    snprintf(copy, sizeof copy, "%s", text);
    return crpci_options_lines(&to, 1, copy, error);
}

static void lines_are_read(void **state)
{
    sample s = {0, 5, CRPC_CLUSTER_DEFAULT, NULL, NULL, 0};
    crpc_error error;
    (void)state;
    assert_int_equal(lines(&s, "", &error), CRPC_OK);
    assert_int_equal(lines(&s,
                           "# a comment = no option\n"
                           "\n"
                           "  count = 4 \r\n"
                           "\t# another\n"
                           "kind=three\n"
                           "name= a b # c \n"
                           "secret=#=x",
                           &error),
                     CRPC_OK);
    assert_int_equal(s.count, 4);
    assert_int_equal(s.bytes, 5); /* as it was */
    assert_int_equal(s.kind, 3);
    assert_string_equal(s.name, "a b # c");
    assert_string_equal(s.secret, "#=x");
}

static void a_bad_line_is_named(void **state)
{
    static const char *const bad[][2] = {
        {"\n\ncount=21\n", "line 3: count=21: at most 20"},
        {"count=4\nkindly\n", "line 2: \"kindly\" is not key=value"},
        {"secret: hush", "line 1: \"secret\" is not key=value"},
        {"secret hush", "line 1: \"secret\" is not key=value"},
        {"#\ncuont=4", "line 2: cuont: no such option"},
        {"=4", "line 1: : no such option"},
        {"count=4\nname=x\ncount=5\n", "line 3: count: given twice"},
        {"secret=hush\nsecret=hush", "line 2: secret: given twice"},
    };
    sample s = {0, 0, CRPC_CLUSTER_DEFAULT, NULL, NULL, 0};
    crpc_error error;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(lines(&s, bad[i][0], &error), CRPC_EINVAL);
        assert_string_equal(error.text, bad[i][1]);
        assert_int_equal(lines(&s, bad[i][0], NULL), CRPC_EINVAL);
    }
}

static void programs_read_their_configuration(void **state)
{
    char channel[] = "timeout_ms=200\nlb=p2c\nbreaker=1\nbreaker_percent=30\nmax_queued=-1\n"
                     "credential=x y\nregistry_credential=a:b\nmax_results=7\nwait=1\n";
    char server[] = "listen = tcp://127.0.0.1:0\nworkers=4\nmax_body=1000\ngroup=g\nlog_level=4\n"
                    "poller=poll\nregistry_timeout_ms=-1";
    char wrong[] = "workers=4\nworker=4";
    crpc_channel_options c = CRPC_INIT;
    crpc_server_options s = CRPC_INIT;
    crpc_error error;
    (void)state;
    assert_int_equal(crpc_channel_options_parse(channel, &c, &error), CRPC_OK);
    assert_int_equal(c.policy.timeout_ms, 200);
    assert_int_equal(c.balancer, CRPC_BALANCER_P2C);
    assert_int_equal(c.breaker.enabled, 1);
    assert_int_equal(c.breaker.percent, 30);
    assert_int_equal(c.limits.max_queued, -1);
    assert_string_equal(c.security.credential, "x y");
    assert_string_equal(c.directory.credential, "a:b");
    assert_int_equal(c.private_loop.max_results, 7);
    assert_int_equal(c.wait, 1);
    assert_int_equal(crpc_server_options_parse(server, &s, &error), CRPC_OK);
    assert_string_equal(s.listen, "tcp://127.0.0.1:0");
    assert_int_equal(s.workers, 4);
    assert_int_equal(s.limits.max_body, 1000);
    assert_string_equal(s.directory.group, "g");
    assert_int_equal(s.loops.hooks.log_level, 4);
    assert_int_equal(s.loops.poller, CRPC_POLLER_POLL);
    assert_int_equal(s.directory.timeout_ms, -1);
    assert_int_equal(crpc_server_options_parse(wrong, &s, &error), CRPC_EINVAL);
    assert_string_equal(error.text, "line 2: worker: no such option");
}

/* --- what is written about options -------------------------------------------------------------
 */

static char *header;

static char *read_header(void)
{
    FILE *f = fopen("crpc.h", "r");
    char *text = NULL;
    long size;
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    size = ftell(f);
    rewind(f);
    text = (char *)malloc((size_t)size + 1);
    assert_non_null(text);
    assert_int_equal(fread(text, 1, (size_t)size, f), size);
    text[size] = '\0';
    fclose(f);
    return text;
}

/* A number as the manual writes it. */
static const char *number(int64_t n, char *out, size_t size)
{
    if (n && n % (1 << 20) == 0)
        snprintf(out, size, "%lld MiB", (long long)(n >> 20));
    else if (n && n % (1 << 10) == 0 && n > 8192 && n < (1 << 20))
        snprintf(out, size, "%lld KiB", (long long)(n >> 10));
    else if (n == INT32_MAX)
        snprintf(out, size, "2 GiB - 1");
    else
        snprintf(out, size, "%lld", (long long)n);
    return out;
}

/* The option's line of the manual's chapter OPTIONS. */
static void line_of(const crpci_option *o, char *out, size_t size)
{
    char zero[24], none[24], least[24], most[24], range[64];
    if (o->flags & CRPCI_OPTION_TEXT) {
        snprintf(out, size, "\n *     %-23s text%s\n", o->name,
                 o->flags & CRPCI_OPTION_SECRET      ? ", secret: not in URLs"
                 : o->flags & (CRPCI_OPTION_DIRECTORY | CRPCI_OPTION_BACKEND) ? ", with a registry"
                                                     : "");
        return;
    }
    if (o->flags & CRPCI_OPTION_WORDS) {
        snprintf(out, size, "\n *     %-23s %s\n", o->name, crpci_options_words(o) + 1);
        return;
    }
    number(o->flags & CRPCI_OPTION_STACK ? CRPCI_OPTION_STACK_MIN : 1, least, sizeof least);
    snprintf(range, sizeof range, "%s", least);
    if (o->most == CRPCI_OPTION_ANY)
        snprintf(range, sizeof range, "%s and more", least);
    else if (o->most != 1)
        snprintf(range, sizeof range, "%s to %s", least, number(o->most, most, sizeof most));
    snprintf(out, size, "\n *     %-23s %-11s %-11s %s\n", o->name,
             number(o->zero, zero, sizeof zero), number(o->none, none, sizeof none), range);
}

static size_t expect_listed(const crpci_options *set, const char *title)
{
    const char *chapter = strstr(header, "\n * OPTIONS\n"), *at, *end;
    size_t i, missing = 0;
    assert_non_null(chapter);
    at = strstr(chapter, title);
    assert_non_null(at);
    at = strstr(at, "\n *\n") + 3;
    end = strstr(at, "\n *\n");
    assert_non_null(end);
    for (i = 0; i < set->count; i++) {
        char line[200];
        const char *found;
        line_of(&set->rows[i], line, sizeof line);
        found = strstr(at, line);
        if (!found || found > end) {
            fprintf(stderr, "%s", line + 1);
            missing++;
        }
    }
    return missing;
}

static void the_manual_lists_all_options(void **state)
{
    size_t missing;
    (void)state;
    header = read_header();
    missing = expect_listed(&crpci_opening_options, "Channels:");
    missing += expect_listed(&crpci_lifecycle_options, "Servers:");
    missing += expect_listed(&crpci_drive_options, "Loops");
    free(header);
    assert_int_equal(missing, 0); /* the lines above do not stand in the manual's OPTIONS */
}

/* The next place where a member of an option's name, or with its key, stands. */
static const char *find_member(const char *from, const char *to, const char *name)
{
    char member[64], key[64];
    const char *at, *by_key;
    snprintf(member, sizeof member, " %s;", name);
    snprintf(key, sizeof key, "key \"%s\"", name);
    at = strstr(from, member);
    by_key = strstr(from, key);
    if (by_key && (!at || by_key < at))
        at = by_key;
    return at && at < to ? at : NULL;
}

/* The comment of the member at a place: behind it, or before it. */
static void comment_of(const char *at, char *out, size_t size)
{
    const char *line = at, *end;
    while (line[-1] != '\n')
        line--;
    if (!strstr(line, "/*") || strstr(line, "/*") > strchr(line, '\n')) { /* it stands above */
        while (strncmp(line, "    /*", 6) != 0) {
            for (line--; line[-1] != '\n';)
                line--;
        }
    }
    end = strstr(line, "*/");
    snprintf(out, size, "%.*s", (int)(end - line), line);
}

static size_t expect_commented(const crpci_options *set, const char *from, const char *to)
{
    size_t i, wrong = 0;
    for (i = 0; i < set->count; i++) {
        const crpci_option *o = &set->rows[i];
        const char *name = o->name, *at = strstr(header, from), *end = strstr(header, to);
        char text[1000], value[24];
        bool told = false;
        if (o->flags & (CRPCI_OPTION_TEXT | CRPCI_OPTION_WORDS) || !o->zero)
            continue;
        if (strncmp(name, "breaker_", 8) == 0) {
            at = strstr(header, "typedef struct crpc_breaker_options");
            name += 8;
        }
        number(o->zero, value, sizeof value);
        while (!told && (at = find_member(at, end, name)) != NULL) {
            comment_of(at++, text, sizeof text);
            told = strstr(text, value) != NULL;
        }
        if (!told) {
            fprintf(stderr, "%s: no comment says \"0: %s\"\n", o->name, value);
            wrong++;
        }
    }
    return wrong;
}

static void the_header_tells_the_defaults(void **state)
{
    size_t wrong;
    (void)state;
    header = read_header();
    wrong = expect_commented(&crpci_opening_options, "/* >>api-options", "/* >>api-server");
    wrong += expect_commented(&crpci_drive_options, "/* >>api-hooks", "/* >>api-service");
    wrong += expect_commented(&crpci_lifecycle_options, "/* >>api-options",
                              "/* >>api-coordination");
    free(header);
    assert_int_equal(wrong, 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(zero_and_minus_one_get_their_values),
        CT_TEST(a_range_error_names_option_and_limit),
        CT_TEST(text_is_read_or_explained),
        CT_TEST(lines_are_read),
        CT_TEST(a_bad_line_is_named),
        CT_TEST(programs_read_their_configuration),
        CT_TEST(the_manual_lists_all_options),
        CT_TEST(the_header_tells_the_defaults),
    };
    return CT_RUN(tests);
}
