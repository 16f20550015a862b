/* Registering a server's services: the address that is registered, and the errors. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

static crpc_server_options options(const char *listen, const char *advertise, const char *registry)
{
    crpc_server_options o = CRPC_INIT;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = listen;
    o.advertise = advertise;
    o.registry = registry;
    return o;
}

/* The address that a server with these options registers. */
static int address_of(const char *listen, const char *advertise, char *address, crpc_error *error)
{
    crpc_server_options o = options(listen, advertise, NULL);
    crpc_server *s;
    int status;
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    status = crpci_enrolment_address(s, address, CRPC_ADDRESS_MAX, error);
    crpc_server_close(s);
    return status;
}

/* The port of HOST:PORT, which must begin with `host`. */
static int port_behind(const char *address, const char *host)
{
    size_t n = strlen(host);
    if (strncmp(address, host, n) != 0 || address[n] != ':')
        fail_msg("%s is not a port of %s", address, host);
    return atoi(address + n + 1);
}

static void it_registers_the_address_it_listens_on(void **state)
{
    char address[CRPC_ADDRESS_MAX];
    (void)state;
    assert_int_equal(address_of("tcp://127.0.0.1:0", NULL, address, NULL), CRPC_OK);
    assert_true(port_behind(address, "127.0.0.1") > 0);
    assert_int_equal(address_of("tcp://[::1]:0", NULL, address, NULL), CRPC_OK);
    assert_true(port_behind(address, "[::1]") > 0);
}

/* An empty host is left to the registry, which puts in the local address that reaches it. */
static void it_leaves_an_open_host_to_the_registry(void **state)
{
    char address[CRPC_ADDRESS_MAX];
    (void)state;
    assert_int_equal(address_of("tcp://0.0.0.0:0", NULL, address, NULL), CRPC_OK);
    assert_true(port_behind(address, "0.0.0.0") > 0);
    assert_int_equal(address_of("tcp://[::]:0", NULL, address, NULL), CRPC_OK);
    assert_true(port_behind(address, "") > 0);
}

static void it_registers_what_is_advertised(void **state)
{
    char address[CRPC_ADDRESS_MAX];
    (void)state;
    assert_int_equal(address_of("tcp://127.0.0.1:0", "192.0.2.7:81", address, NULL), CRPC_OK);
    assert_string_equal(address, "192.0.2.7:81");
    assert_int_equal(
        address_of("unix:///tmp/crpc-test-enrolment", "[2001:db8::7]:81", address, NULL), CRPC_OK);
    assert_string_equal(address, "[2001:db8::7]:81");
    /* without a port: the listener's */
    assert_int_equal(address_of("tcp://127.0.0.1:0", "192.0.2.7", address, NULL), CRPC_OK);
    assert_true(port_behind(address, "192.0.2.7") > 0);
}

static void it_explains_an_address_that_cannot_be_registered(void **state)
{
    char address[CRPC_ADDRESS_MAX];
    crpc_error error;
    (void)state;
    assert_int_equal(address_of("unix:///tmp/crpc-test-enrolment", NULL, address, &error),
                     CRPC_EINVAL);
    assert_string_equal(error.text, "registry: there is no tcp:// listener to register; set listen "
                                    "or advertise");
    assert_int_equal(address_of("unix:///tmp/crpc-test-enrolment", "192.0.2.7", address, &error),
                     CRPC_EINVAL);
    assert_string_equal(error.text, "advertise \"192.0.2.7\": no port, and no tcp:// listener to "
                                    "take it from");
    assert_int_not_equal(address_of("tcp://127.0.0.1:0", "192.0.2.7:x", address, &error), CRPC_OK);
    assert_non_null(strstr(error.text, "advertise \"192.0.2.7:x\" is not host[:port]"));
}

static void it_lists_the_names_of_methods(void **state)
{
    static const crpc_service none = {"demo.None", NULL, 0};
    char names[64], cut[10];
    (void)state;
    crpci_enrolment_method_names(&dyn_Echo, names, sizeof names);
    assert_string_equal(names, "Add,Get,Pass,Defer,Fail,Status,Meta,Quick");
    crpci_enrolment_method_names(&none, names, sizeof names);
    assert_string_equal(names, "");
    crpci_enrolment_method_names(&dyn_Echo, cut, sizeof cut);
    assert_string_equal(cut, "Add,Get,P");
}

/* Opens and starts a server with this registry. One of the two must fail, the start if `opens`;
 * checks the code and part of the text. */
static void check_refused(const char *registry, bool opens, int status, const char *says)
{
    crpc_server_options o = options("tcp://127.0.0.1:0", NULL, registry);
    crpc_server *s;
    crpc_error error;
    assert_int_equal(crpc_server_open(&s, &o, &error), opens ? CRPC_OK : status);
    if (opens) {
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, &error), status);
    }
    if (!strstr(error.text, says))
        fail_msg("%s: %s", registry, error.text);
    crpc_server_close(s);
}

static void a_registry_that_takes_no_servers_keeps_the_server_from_starting(void **state)
{
    (void)state;
    check_refused("file:///nonexistent/providers", true, CRPC_EUNSUPPORTED, "cannot register");
    check_refused("file:///nonexistent/providers?x=y", false, CRPC_EINVAL,
                  "URL option x=y: a server's file:// takes none");
    check_refused("nowhere", false, CRPC_EINVAL, "not a URL");
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(it_registers_the_address_it_listens_on),
        CT_TEST(it_leaves_an_open_host_to_the_registry),
        CT_TEST(it_registers_what_is_advertised),
        CT_TEST(it_explains_an_address_that_cannot_be_registered),
        CT_TEST(it_lists_the_names_of_methods),
        CT_TEST(a_registry_that_takes_no_servers_keeps_the_server_from_starting),
    };
    return CT_RUN(tests);
}
