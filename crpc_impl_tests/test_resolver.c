/* impl-resolver: a hook stands in for the name service; getaddrinfo is asked for localhost only,
 * which needs no network. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static const char *answer;
static int answer_status;
static int asked;
static char asked_for[300];

static int resolve(void *user, const char *host, char *addresses, size_t size)
{
    assert_ptr_equal(user, ct_alloc_of_test());
    asked++;
    snprintf(asked_for, sizeof asked_for, "%s", host);
    if (answer_status)
        return answer_status;
    snprintf(addresses, size, "%s", answer);
    return CRPC_OK;
}

static crpci_heap *heap;
static crpc_error error;
static char out[CRPC_ADDRESS_MAX];

static void begin(void)
{
    crpc_hooks hooks = ct_hooks();
    hooks.resolve = resolve;
    answer_status = asked = 0;
    asked_for[0] = '\0';
    memset(&error, 0, sizeof error);
    assert_int_equal(crpci_heap_open(&heap, &hooks, 0), CRPC_OK);
}

static void end(void)
{
    crpci_heap_unref(heap);
}

static int ask(const char *text)
{
    strcpy(out, "untouched");
    return crpci_resolver_address(heap, text, out, sizeof out, &error);
}

static void numeric_addresses_are_not_resolved(void **state)
{
    (void)state;
    begin();
    assert_int_equal(ask("1.2.3.4:80"), CRPC_OK);
    assert_string_equal(out, "1.2.3.4:80");
    assert_int_equal(ask("[2001:DB8:0::1]:80"), CRPC_OK);
    assert_string_equal(out, "[2001:db8::1]:80"); /* the canonical form */
    assert_int_equal(ask("unix:/run/x"), CRPC_OK);
    assert_string_equal(out, "unix:/run/x");
    assert_int_equal(asked, 0);
    end();
}

static void names_ask_the_hook(void **state)
{
    (void)state;
    begin();
    answer = "10.0.0.7";
    assert_int_equal(ask("db.example:3306"), CRPC_OK);
    assert_string_equal(out, "10.0.0.7:3306");
    assert_string_equal(asked_for, "db.example");
    assert_int_equal(asked, 1);
    answer = "2001:db8::7";
    assert_int_equal(ask("db.example:3306"), CRPC_OK);
    assert_string_equal(out, "[2001:db8::7]:3306");
    end();
}

static void the_first_ipv4_address_else_the_first_is_taken(void **state)
{
    (void)state;
    begin();
    answer = "::1,::2,10.0.0.1,::3,10.0.0.2";
    assert_int_equal(ask("h:1"), CRPC_OK);
    assert_string_equal(out, "10.0.0.1:1");
    answer = "10.0.0.3,::1,10.0.0.4";
    assert_int_equal(ask("h:1"), CRPC_OK);
    assert_string_equal(out, "10.0.0.3:1");
    answer = "::5,::6";
    assert_int_equal(ask("h:1"), CRPC_OK);
    assert_string_equal(out, "[::5]:1");
    end();
}

static void failures_name_the_host(void **state)
{
    (void)state;
    begin();
    answer_status = CRPC_ETIMEDOUT;
    assert_int_equal(ask("gone.example:80"), CRPC_ERESOLVE);
    assert_int_equal(error.code, CRPC_ERESOLVE);
    assert_string_equal(error.text, "host \"gone.example\": the resolve hook returned 1008");
    answer_status = CRPC_OK;
    answer = "";
    assert_int_equal(ask("gone.example:80"), CRPC_ERESOLVE);
    assert_non_null(strstr(error.text, "no numeric address"));
    answer = "not.a.number";
    assert_int_equal(ask("gone.example:80"), CRPC_ERESOLVE);
    assert_string_equal(error.text, "\"gone.example:80\": the resolve hook gave no numeric "
                                    "address: \"not.a.number\"");
    assert_int_equal(crpci_resolver_address(heap, "gone.example:80", out, sizeof out, NULL),
                     CRPC_ERESOLVE);
    end();
}

static void malformed_addresses_are_refused(void **state)
{
    static const char *const bad[] = {"",      "host",       ":80",   "host:",   "host:x",
                                      "::1:8", "host:99999", "[::1]", "host:-1", "a:b:c"};
    char longest[300];
    size_t i;
    (void)state;
    begin();
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(ask(bad[i]), CRPC_EINVAL);
        assert_int_equal(error.code, CRPC_EINVAL);
        assert_non_null(strstr(error.text, bad[i]));
        assert_non_null(strstr(error.text, "brackets"));
    }
    memset(longest, 'h', sizeof longest);
    strcpy(longest + sizeof longest - 4, ":80");
    assert_int_equal(ask(longest), CRPC_EINVAL);
    assert_int_equal(asked, 0);
    end();
}

static void answers_that_do_not_fit(void **state)
{
    static char longest[2000];
    (void)state;
    begin();
    memset(longest, '1', sizeof longest - 1);
    answer = longest;
    assert_int_equal(ask("h:80"), CRPC_ERESOLVE);
    answer = "10.0.0.1";
    {
        ct_guard g = ct_guard_make(NULL, 8);
        assert_int_equal(crpci_resolver_address(heap, "h:80", (char *)g.data, 8, &error),
                         CRPC_ERESOLVE);
        ct_guard_free(g);
    }
    end();
}

static void the_system_knows_localhost(void **state)
{
    static const char *const wanted[] = {"",       "g",       "ge",       "get",       "geta",
                                         "getad",  "getadd",  "getaddr",  "getaddri",  "getaddrin"};
    char list[256];
    size_t size;
    (void)state;
    begin();
    assert_int_equal(crpci_resolver_system("127.0.0.1", list, sizeof list), CRPC_OK);
    assert_string_equal(list, "127.0.0.1");
    for (size = 1; size <= 12; size++) { /* an address that does not fit is left out, not cut */
        ct_guard g = ct_guard_make(NULL, size);
        int err = crpci_resolver_system("127.0.0.1", (char *)g.data, size);
        assert_int_equal(err, size > 10 ? CRPC_OK : CRPC_ERESOLVE);
        assert_string_equal((char *)g.data, err ? wanted[size - 1] : "127.0.0.1");
        ct_guard_free(g);
    }
    assert_int_equal(crpci_resolver_system("", list, sizeof list), CRPC_ERESOLVE);
    assert_int_equal(strncmp(list, "getaddrinfo: ", 13), 0); /* the cause, for the error */
    assert_true(strlen(list) > 13);
    if (crpci_resolver_system("localhost", list, sizeof list) != CRPC_OK) {
        end();
        skip(); /* a container without /etc/hosts */
    }
    assert_true(strstr(list, "127.0.0.1") || strstr(list, "::1"));
    heap->hooks.resolve = NULL;
    assert_int_equal(ask("localhost:81"), CRPC_OK);
    assert_true(strcmp(out, "127.0.0.1:81") == 0 || strcmp(out, "[::1]:81") == 0);
    end();
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(numeric_addresses_are_not_resolved),
        CT_TEST(names_ask_the_hook),
        CT_TEST(the_first_ipv4_address_else_the_first_is_taken),
        CT_TEST(failures_name_the_host),
        CT_TEST(malformed_addresses_are_refused),
        CT_TEST(answers_that_do_not_fit),
        CT_TEST(the_system_knows_localhost),
    };
    return CT_RUN(tests);
}
