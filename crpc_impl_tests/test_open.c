/* impl-open: which backend a URL names. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

/* --- opening ------------------------------------------------------------------------------------ */

static void it_knows_no_other_scheme(void **state)
{
    crpc_loop_options o;
    crpc_loop *loop;
    crpci_backend *r = (crpci_backend *)(void *)&o;
    crpc_error error;
    (void)state;
    memset(&o, 0, sizeof o);
    o.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&loop, &o), CRPC_OK);
    assert_int_equal(crpci_open_registry(loop, "etcd://10.0.0.1:1/x", NULL, &r, &error), CRPC_EUNSUPPORTED);
    assert_null(r);
    assert_non_null(strstr(error.text, "etcd"));
    crpci_directory_close(NULL);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_knows_no_other_scheme),
    };
    return CT_RUN(tests);
}
