/* What zookeeper:// decides without a server: twins, arguments, memory. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_zk_rig.h"

static void it_knows_a_twin(void **state)
{
    crpci_zk_registration reg;
    char path[256], name[256];
    static const struct {
        const char *url;
        bool twin;
    } names[] = {
        {"crpc://10.0.0.1:80/S?pid=1&timestamp=5", false}, /* itself */
        {"crpc://10.0.0.1:80/S?pid=2&timestamp=6", true},
        {"crpc://10.0.0.1:80/S", true},
        {"crpc://10.0.0.1:8/S?pid=1", false},
        {"crpc://10.0.0.1:800/S?pid=1", false},
        {"crpc://10.0.0.1:80", false},
        {"dubbo://10.0.0.1:80/S", false},
        {"", false},
    };
    size_t i, n;
    (void)state;
    memset(&reg, 0, sizeof reg);
    strcpy(reg.offer.address, "10.0.0.1:80");
    n = (size_t)snprintf(path, sizeof path, "/dubbo/S/providers/");
    crpci_url_encode(path + n, sizeof path - n, names[0].url);
    reg.own.path = path;
    for (i = 0; i < sizeof names / sizeof *names; i++) {
        crpci_url_encode(name, sizeof name, names[i].url);
        if (crpci_zk_directory_is_twin(&reg, name) != names[i].twin)
            fail_msg("%s", names[i].url);
    }
}

static int on_push(void *user, crpci_snapshot *list)
{
    (void)user;
    (void)list;
    return CRPC_OK;
}

static void on_status(void *user, int status, const char *text)
{
    (void)user;
    (void)status;
    (void)text;
}

static int use(const crpc_hooks *hooks, void *user)
{
    crpc_loop *loop = loop_with(hooks);
    crpci_backend *r = NULL, *again = NULL;
    crpci_directory_options o;
    crpci_names_service q;
    crpci_names_service what;
    char text[64];
    crpci_subscriber *sub;
    void *reg;
    int err;
    if (!loop)
        return CRPC_ENOMEM;
    snprintf(text, sizeof text, "zookeeper://127.0.0.1:%d", *(int *)user);
    memset(&o, 0, sizeof o);
    memset(&q, 0, sizeof q);
    o.register_consumer = true;
    q.service = "S";
    err = crpci_open_registry(loop, text, &o, &r, NULL);
    err = err ? err : crpci_open_registry(loop, text, NULL, &again, NULL);
    if (!err)
        err = crpci_directory_subscribe(again, &q, on_push, NULL, &sub);
    q.group = "g";
    q.version = "1";
    if (!err)
        err = crpci_directory_subscribe(r, &q, on_push, NULL, &sub);
    memset(&what, 0, sizeof what);
    what.service = "S";
    what.address = ":80";
    if (!err)
        err = crpci_directory_enroll(r, &what, on_status, NULL, &reg);
    if (!err)
        crpci_directory_withdraw(r, reg);
    if (!err)
        err = crpci_directory_enroll(again, &what, NULL, NULL, &reg);
    crpci_directory_close(r);
    crpci_directory_close(again);
    crpc_loop_close(loop);
    return err;
}

static void it_leaves_nothing_behind(void **state)
{
    int port = ct_free_port();
    (void)state;
    assert_true(ct_sweep(use, &port) > 20);
}

/* A consumer announces itself below a service that exists. It would make the service's directory too, which
 * stays for ever, and the name may be mistyped. */
static void a_consumer_makes_no_service(void **state)
{
    crpc_loop *loop = loop_with(NULL);
    crpci_directory_options o;
    crpci_names_service q;
    crpci_zk_service *v;
    crpci_backend *r;
    crpci_subscriber *sub[2];
    crpci_zk_answer a;
    int i;
    (void)state;
    memset(&o, 0, sizeof o);
    memset(&q, 0, sizeof q);
    memset(&a, 0, sizeof a);
    o.register_consumer = true;
    q.service = "S";
    assert_int_equal(crpci_open_registry(loop, "zookeeper://127.0.0.1:1", &o, &r, NULL), CRPC_OK);
    for (i = 0; i < 2; i++) {
        const crpci_zk_own *own;
        assert_int_equal(crpci_directory_subscribe(r, &q, on_push, NULL, &sub[i]), CRPC_OK);
        own = &((crpci_zk_subscriber *)(void *)sub[i])->consumer->own;
        v = CRPCI_CONTAINER(sub[i]->directory, crpci_zk_service, directory);
        crpci_loop_lock(loop);
        if (!i) {
            assert_int_equal(own->wish, CRPCI_ZK_WISH_UNWANTED);
            a.rc = ZNONODE;
            assert_true(crpci_zk_directory_on_providers(&v->providers, &a));
            assert_int_equal(own->wish, CRPCI_ZK_WISH_UNWANTED);
            a.rc = ZOK;
            assert_true(crpci_zk_directory_on_providers(&v->providers, &a));
        }
        assert_int_equal(own->wish, CRPCI_ZK_WISH_WANTED);
        crpci_loop_unlock(loop);
    }
    crpci_directory_close(r);
    crpc_loop_close(loop);
}

static void it_refuses_what_cannot_be_a_node(void **state)
{
    static const char *const bad[] = {"", ".", "..", "a/b", "a\nb", NULL};
    crpc_loop *loop = loop_with(NULL);
    crpci_names_service what;
    crpci_names_service q;
    crpci_backend *r;
    crpci_subscriber *sub;
    void *handle = loop;
    size_t i;
    (void)state;
    assert_int_equal(crpci_open_registry(loop, "zookeeper://127.0.0.1:1/root", NULL, &r, NULL),
                     CRPC_OK);
    memset(&what, 0, sizeof what);
    memset(&q, 0, sizeof q);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        what.service = bad[i];
        what.address = ":80";
        assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
        assert_null(handle);
        q.service = bad[i];
        assert_int_equal(crpci_directory_subscribe(r, &q, on_push, NULL, &sub), CRPC_EINVAL);
        assert_null(sub);
    }
    what.service = "S";
    what.address = NULL;
    assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    what.address = "host.name:80";
    assert_int_equal(crpci_directory_enroll(r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    crpci_directory_unsubscribe(r, NULL);
    crpci_directory_withdraw(r, NULL);
    crpci_directory_close(r);
    crpc_loop_close(loop);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_knows_a_twin),
        CT_TEST(it_leaves_nothing_behind),
        CT_TEST(a_consumer_makes_no_service),
        CT_TEST(it_refuses_what_cannot_be_a_node),
    };
    return CT_RUN(tests);
}
