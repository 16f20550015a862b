/* Following a configuration without a server: arguments, what is news. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_nowhere.h"

static char told[64];

static void on_config(void *user, crpc_view value, int32_t version, bool exists)
{
    size_t n = strlen(told);
    (void)user;
    if (exists)
        snprintf(told + n, sizeof told - n, "%d:%.*s ", (int)version, (int)crpc_view_size(value),
                 crpc_view_data(value));
    else
        snprintf(told + n, sizeof told - n, "- ");
}

static void expect(crpc_loop *loop, crpci_config_watch *c, const crpci_zk_answer *a,
                   const char *want)
{
    told[0] = '\0';
    crpci_loop_lock(loop);
    assert_true(crpci_config_on_value(&c->watch, a));
    crpci_loop_unlock(loop);
    assert_int_equal(crpc_loop_step(loop, 0), CRPC_OK);
    assert_string_equal(told, want);
}

static void it_refuses_bad_paths(void **state)
{
    static const char *const bad[] = {NULL, "a//b", "..", "a/"};
    crpc_loop *loop = nowhere_loop(NULL);
    crpc_registry *r;
    crpc_id id;
    size_t i;
    (void)state;
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), "/x"), CRPC_OK);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(crpc_config_watch(r, bad[i], on_config, NULL, &id), CRPC_EINVAL);
        assert_true(id.value == 0);
    }
    assert_int_equal(crpc_config_watch(r, "a", NULL, NULL, &id), CRPC_EINVAL);
    crpc_config_unwatch(r, id);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

/* Plays the server to a watch: what is news is told, once. */
static void it_tells_each_value_once(void **state)
{
    crpc_loop *loop = nowhere_loop(NULL);
    crpci_config_watch *c;
    crpc_registry *r;
    crpci_zk_answer a;
    struct Stat stat;
    crpc_id id;
    (void)state;
    told[0] = '\0';
    assert_int_equal(nowhere_open(&r, loop, ct_free_port(), ""), CRPC_OK);
    assert_int_equal(crpc_config_watch(r, "a", on_config, NULL, &id), CRPC_OK);
    c = (crpci_config_watch *)crpci_id_get(&r->configs, id.value);
    memset(&a, 0, sizeof a);
    memset(&stat, 0, sizeof stat);
    a.rc = ZNOAUTH; /* that is no value */
    expect(loop, c, &a, "");
    a.rc = ZNONODE;
    expect(loop, c, &a, "- ");
    expect(loop, c, &a, "");
    a.rc = ZOK;
    a.stat = &stat;
    expect(loop, c, &a, "0: ");
    expect(loop, c, &a, "");
    stat.version = 1;
    stat.mzxid = 2;
    a.text = "x";
    a.size = 1;
    expect(loop, c, &a, "1:x ");
    expect(loop, c, &a, "");
    stat.mzxid = 3; /* written again, with the same bytes */
    stat.version = 2;
    expect(loop, c, &a, "2:x ");
    a.rc = ZNONODE;
    expect(loop, c, &a, "- ");
    crpc_config_unwatch(r, id);
    crpc_registry_close(r);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_refuses_bad_paths),
        CT_TEST(it_tells_each_value_once),
    };
    return CT_RUN(tests);
}
