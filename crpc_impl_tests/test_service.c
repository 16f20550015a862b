#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static int never(crpc_context *context, const void *request, void *response, const void *handlers)
{
    (void)context, (void)request, (void)response, (void)handlers;
    return CRPC_EINTERNAL;
}

static const crpc_method a_methods[] = {
    {"pkg.sub.A", "One", NULL, NULL, 0, 0, never, 0, 0},
    {"pkg.sub.A", "Two", NULL, NULL, 0, 0, never, 0, 0},
    {"pkg.sub.A", "OneMore", NULL, NULL, 0, 0, never, 0, 0},
};
static const crpc_method b_methods[] = {{"B", "One", NULL, NULL, 0, 0, never, 0, 0}};
static const crpc_service service_a = {"pkg.sub.A", a_methods, 3};
static const crpc_service service_b = {"B", b_methods, 1};
static const crpc_service service_none = {"x.Empty", NULL, 0};
static const crpc_service same_short = {"other.A", a_methods, 3};
static const crpc_service short_of_b = {"deep.down.B", b_methods, 1};
static const crpc_service plain_a = {"A", a_methods, 3};

typedef struct fixture {
    crpci_heap *heap;
    crpci_service_map map;
} fixture;

static void fixture_open(fixture *f)
{
    static char user[] = "user";
    crpc_hooks hooks = ct_hooks();
    memset(f, 0, sizeof *f);
    assert_int_equal(crpci_heap_open(&f->heap, &hooks, 0), CRPC_OK);
    assert_int_equal(crpci_service_add(&f->map, f->heap, &service_a, "handlers", user), CRPC_OK);
    assert_int_equal(crpci_service_add(&f->map, f->heap, &service_b, NULL, NULL), CRPC_OK);
    assert_int_equal(crpci_service_add(&f->map, f->heap, &service_none, NULL, NULL), CRPC_OK);
}

static void fixture_close(fixture *f)
{
    crpci_service_free(&f->map, f->heap);
    crpci_heap_unref(f->heap);
}

static int look_up(fixture *f, const char *service, const char *method,
                   const crpci_service_method **m)
{
    crpci_message named;
    memset(&named, 0, sizeof named);
    named.service = crpc_view_str(service);
    named.method = crpc_view_str(method);
    return crpci_service_lookup(&f->map, &named, m);
}

static void names_are_found_full_first_then_short(void **state)
{
    fixture f;
    const crpci_service_method *m;
    (void)state;
    fixture_open(&f);
    assert_int_equal(look_up(&f, "pkg.sub.A", "Two", &m), CRPC_OK);
    assert_ptr_equal(m->method, &a_methods[1]);
    assert_string_equal(m->user, "user");
    assert_string_equal(m->handlers, "handlers");
    assert_int_equal(crpc_view_size(m->names[0]), 2 + 9 + 2 + 3);
    assert_memory_equal(crpc_view_data(m->names[0]), "\x0a\x09pkg.sub.A\x12\x03Two", 16);
    assert_int_equal(look_up(&f, "A", "OneMore", &m), CRPC_OK);
    assert_ptr_equal(m->method, &a_methods[2]);
    assert_int_equal(look_up(&f, "B", "One", &m), CRPC_OK);
    assert_ptr_equal(m->method, &b_methods[0]);
    fixture_close(&f);
}

static void unknown_names_get_brpcs_codes(void **state)
{
    static const struct {
        const char *service, *method;
        int code;
    } cases[] = {
        {"pkg.sub.A", "Three", CRPC_ENOMETHOD}, {"pkg.sub.A", "", CRPC_ENOMETHOD},
        {"A", "one", CRPC_ENOMETHOD},           {"A", "On", CRPC_ENOMETHOD},
        {"B", "Two", CRPC_ENOMETHOD},           {"x.Empty", "One", CRPC_ENOMETHOD},
        {"sub.A", "One", CRPC_ENOMETHOD},       {"pkg.sub.B", "One", CRPC_ENOMETHOD},
        {"pkg.sub.A.", "One", CRPC_ENOMETHOD},  {".B", "One", CRPC_ENOMETHOD},
        {"a", "One", CRPC_ENOSERVICE},          {"C", "One", CRPC_ENOSERVICE},
        {"", "One", CRPC_ENOSERVICE},           {"AA", "One", CRPC_ENOSERVICE},
    };
    fixture f;
    size_t i;
    (void)state;
    fixture_open(&f);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        const crpci_service_method *m = f.map.items[0].methods;
        int code = look_up(&f, cases[i].service, cases[i].method, &m);
        if (code != cases[i].code || m)
            fail_msg("%s.%s: %s", cases[i].service, cases[i].method, crpc_status_name(code));
    }
    fixture_close(&f);
}

/* A name from the wire has no terminating zero, and may have zeros inside. */
static void names_are_bytes(void **state)
{
    fixture f;
    ct_guard service = ct_guard_make("pkg.sub.A", 9), method = ct_guard_make("One", 3);
    const crpci_service_method *m;
    crpci_message named;
    (void)state;
    fixture_open(&f);
    memset(&named, 0, sizeof named);
    named.service = crpc_view_of(service.data, 9);
    named.method = crpc_view_of(method.data, 3);
    assert_int_equal(crpci_service_lookup(&f.map, &named, &m), CRPC_OK);
    assert_ptr_equal(m->method, &a_methods[0]);
    named.method = crpc_view_of("One\0", 4);
    assert_int_equal(crpci_service_lookup(&f.map, &named, &m), CRPC_ENOMETHOD);
    named.method = crpc_view_of("One", 3);
    named.service = crpc_view_of("A\0", 2);
    assert_int_equal(crpci_service_lookup(&f.map, &named, &m), CRPC_ENOSERVICE);
    named.service = crpc_view_of("A\0.", 3);
    assert_int_equal(crpci_service_lookup(&f.map, &named, &m), CRPC_ENOMETHOD);
    named.service = crpc_view_of(NULL, 0);
    assert_int_equal(crpci_service_lookup(&f.map, &named, &m), CRPC_ENOSERVICE);
    fixture_close(&f);
    ct_guard_free(service);
    ct_guard_free(method);
}

static void short_names_are_unique(void **state)
{
    fixture f;
    (void)state;
    fixture_open(&f);
    assert_int_equal(crpci_service_add(&f.map, f.heap, &service_a, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpci_service_add(&f.map, f.heap, &same_short, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpci_service_add(&f.map, f.heap, &short_of_b, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(crpci_service_add(&f.map, f.heap, &plain_a, NULL, NULL), CRPC_EBUSY);
    assert_int_equal(f.map.count, 3);
    fixture_close(&f);
}

static int add_scenario(const crpc_hooks *hooks, void *user)
{
    crpci_service_map map;
    crpci_heap *h;
    int err = crpci_heap_open(&h, hooks, 0);
    (void)user;
    if (err)
        return err;
    memset(&map, 0, sizeof map);
    err = crpci_service_add(&map, h, &service_a, NULL, NULL);
    assert_int_equal(map.count, err ? 0 : 1);
    if (!err) {
        err = crpci_service_add(&map, h, &service_b, NULL, NULL);
        assert_int_equal(map.count, err ? 1 : 2);
        assert_ptr_equal(map.items[0].table, &service_a);
    }
    crpci_service_free(&map, h);
    crpci_heap_unref(h);
    return err;
}

static void adding_survives_being_out_of_memory(void **state)
{
    (void)state;
    assert_int_equal(ct_sweep(add_scenario, NULL), 5);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(names_are_found_full_first_then_short),
        CT_TEST(unknown_names_get_brpcs_codes),
        CT_TEST(names_are_bytes),
        CT_TEST(short_names_are_unique),
        CT_TEST(adding_survives_being_out_of_memory),
    };
    return CT_RUN(tests);
}
