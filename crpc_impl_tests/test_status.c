/* impl-status: codes travel on the wire and stand in logs, so their numbers must never change. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* A second copy of all numbers, on purpose: the test fails when one is changed in crpc.h. */
static const struct known {
    int value;
    int number;
    const char *name;
} known[] = {
    {CRPC_OK, 0, "OK"},
    /* brpc's numbers */
    {CRPC_ENOSERVICE, 1001, "ENOSERVICE"},
    {CRPC_ENOMETHOD, 1002, "ENOMETHOD"},
    {CRPC_EREQUEST, 1003, "EREQUEST"},
    {CRPC_EAUTH, 1004, "EAUTH"},
    {CRPC_ETOOMANYFAILS, 1005, "ETOOMANYFAILS"},
    {CRPC_EBACKUPREQUEST, 1007, "EBACKUPREQUEST"},
    {CRPC_ETIMEDOUT, 1008, "ETIMEDOUT"},
    {CRPC_ECONN, 1009, "ECONN"},
    {CRPC_EHTTP, 1010, "EHTTP"},
    {CRPC_EOVERCROWDED, 1011, "EOVERCROWDED"},
    {CRPC_EEOF, 1014, "EEOF"},
    {CRPC_EREJECT, 1018, "EREJECT"},
    {CRPC_EINTERNAL, 2001, "EINTERNAL"},
    {CRPC_ERESPONSE, 2002, "ERESPONSE"},
    {CRPC_ELOGOFF, 2003, "ELOGOFF"},
    {CRPC_ELIMIT, 2004, "ELIMIT"},
    {CRPC_ECLOSE, 2005, "ECLOSE"},
    /* crpc's own: appended to, never renumbered */
    {CRPC_EINVAL, 3101, "EINVAL"},
    {CRPC_ENOMEM, 3102, "ENOMEM"},
    {CRPC_EDEADLK, 3103, "EDEADLK"},
    {CRPC_EBUSY, 3104, "EBUSY"},
    {CRPC_ECANCELED, 3105, "ECANCELED"},
    {CRPC_EPENDING, 3106, "EPENDING"},
    {CRPC_ENOTFOUND, 3107, "ENOTFOUND"},
    {CRPC_EGONE, 3108, "EGONE"},
    {CRPC_ESYSTEM, 3109, "ESYSTEM"},
    {CRPC_EADDRESS, 3110, "EADDRESS"},
    {CRPC_ERESOLVE, 3111, "ERESOLVE"},
    {CRPC_ENOPROVIDER, 3112, "ENOPROVIDER"},
    {CRPC_EREGISTRY, 3113, "EREGISTRY"},
    {CRPC_EUNSUPPORTED, 3114, "EUNSUPPORTED"},
    {CRPC_ECODEC, 3115, "ECODEC"},
    {CRPC_EAPP, 3116, "EAPP"},
    {CRPC_EABI, 3117, "EABI"},
    {CRPC_EREPEAT, 3118, "EREPEAT"},
    {CRPC_EEXISTS, 3130, "EEXISTS"},
    {CRPC_EVERSION, 3131, "EVERSION"},
    {CRPC_ENOTEMPTY, 3132, "ENOTEMPTY"},
};
#define KNOWN (sizeof known / sizeof known[0])

static void numbers_never_change(void **state)
{
    size_t i;
    (void)state;
    for (i = 0; i < KNOWN; i++) {
        if (known[i].value != known[i].number)
            fail_msg("CRPC_%s is %d, was %d", known[i].name, known[i].value, known[i].number);
        assert_string_equal(crpc_status_name(known[i].number), known[i].name);
    }
}

/* A new code fails this test until it is added to the copy above. */
static void every_code_is_in_the_table(void **state)
{
    size_t count = 0, i;
    int code, last = 0;
    (void)state;
#define COUNT(name, number, text) count++;
    CRPC_STATUS_MAP(COUNT)
#undef COUNT
    assert_int_equal(count, KNOWN);
    for (code = -10; code < 5000; code++) {
        bool listed = false;
        for (i = 0; i < KNOWN; i++)
            listed = listed || known[i].number == code;
        assert_int_equal(listed, strcmp(crpc_status_name(code), "E?") != 0);
        last = listed ? code : last;
    }
    assert_int_equal(CRPC_STATUS_LAST_, last);
}

static void texts_differ(void **state)
{
    size_t i, j;
    (void)state;
    for (i = 0; i < KNOWN; i++) {
        assert_true(strlen(crpc_status_text(known[i].number)) > 3);
        for (j = 0; j < i; j++)
            assert_string_not_equal(crpc_status_text(known[i].number),
                                    crpc_status_text(known[j].number));
    }
    assert_string_equal(crpc_status_text(CRPC_ETIMEDOUT), "deadline exceeded");
    assert_string_equal(crpc_status_text(1), "unknown error");
    assert_string_equal(crpc_status_name(INT32_MIN), "E?");
}

static void applications_may_not_use_reserved_codes(void **state)
{
    static const int reserved[] = {0, 1, 110, 199, 1000, 1008, 2004, 3101, 3999};
    static const int free_ones[] = {INT32_MIN, -1, 200, 500, 999, 4000, 10000, INT32_MAX};
    size_t i;
    (void)state;
    for (i = 0; i < sizeof reserved / sizeof reserved[0]; i++)
        assert_true(crpci_status_reserved(reserved[i]));
    for (i = 0; i < sizeof free_ones / sizeof free_ones[0]; i++)
        assert_false(crpci_status_reserved(free_ones[i]));
    for (i = 0; i < KNOWN; i++)
        assert_true(crpci_status_reserved(known[i].number));
}

static void error_is_cleared_and_cut(void **state)
{
    crpc_error error;
    char wide[2 * CRPC_ERROR_TEXT_MAX];
    (void)state;
    memset(&error, 0x55, sizeof error);
    assert_int_equal(crpci_status_set(&error, CRPC_ECONN, "%s:%d", "host", 80), CRPC_ECONN);
    assert_int_equal(error.code, CRPC_ECONN);
    assert_string_equal(error.text, "host:80");
    assert_int_equal(error.app_code, 0);
    assert_int_equal(error.sent, CRPC_SENT_NO);
    assert_int_equal(error.attempts, 0);
    assert_false(error.remote);
    assert_string_equal(error.endpoint, "");

    memset(wide, 'x', sizeof wide);
    wide[sizeof wide - 1] = '\0';
    assert_int_equal(crpci_status_set(&error, CRPC_EINVAL, "%s", wide), CRPC_EINVAL);
    assert_int_equal(strlen(error.text), CRPC_ERROR_TEXT_MAX - 1);

    assert_int_equal(crpci_status_set(NULL, CRPC_EBUSY, "%s", "nobody asks"), CRPC_EBUSY);
}

static void version_is_the_headers(void **state)
{
    char text[32];
    (void)state;
    snprintf(text, sizeof text, "%d.%d.%d", CRPC_VERSION_MAJOR, CRPC_VERSION_MINOR,
             CRPC_VERSION_PATCH);
    assert_string_equal(crpc_version(), text);
    assert_string_equal(CRPC_VERSION, text);
#if !CRPC_ENABLE_ZOOKEEPER
    assert_string_equal(crpc_zookeeper_driver(), "none");
#elif CRPC_ZOOKEEPER_ST
    assert_string_equal(crpc_zookeeper_driver(), "st");
#else
    assert_string_equal(crpc_zookeeper_driver(), "mt");
#endif
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(numbers_never_change),
        CT_TEST(every_code_is_in_the_table),
        CT_TEST(texts_differ),
        CT_TEST(applications_may_not_use_reserved_codes),
        CT_TEST(error_is_cleared_and_cut),
        CT_TEST(version_is_the_headers),
    };
    return CT_RUN(tests);
}
