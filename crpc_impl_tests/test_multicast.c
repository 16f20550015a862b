/* The registry without a server, on the loopback interface and a clock of the test's own. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

static int64_t clock_of_test;

static int64_t test_clock(void *user)
{
    (void)user;
    return clock_of_test;
}

static void on_line(void *user, int level, const char *line)
{
    (void)user;
    (void)level;
    (void)line;
}

/* --- one side ----------------------------------------------------------------------------------- */

typedef struct side {
    crpc_loop *loop;
    crpci_backend *r;
    crpci_subscriber *sub;
    void *reg;
    char list[1024]; /* the last one: "a:1 b:2 ", "(stale)" behind it */
    int pushes;
    int status;
    bool withdraw_in_status;
    bool close_in_push;
    bool refuse; /* lists, for want of memory */
} side;

static char group[64]; /* of the test: nobody else hears it */

static int on_push(void *user, crpci_snapshot *list)
{
    side *s = (side *)user;
    size_t i, n = 0;
    if (s->refuse)
        return CRPC_ENOMEM;
    s->list[0] = '\0';
    for (i = 0; i < list->count && n < sizeof s->list - 16; i++)
        n += (size_t)snprintf(s->list + n, sizeof s->list - n, "%s ", list->providers[i].address);
    if (list->stale)
        strcat(s->list, "(stale)");
    s->pushes++;
    if (s->close_in_push) {
        crpci_directory_close(s->r);
        s->r = NULL;
    }
    return CRPC_OK;
}

static void on_status(void *user, int status, const char *text)
{
    side *s = (side *)user;
    (void)text;
    s->status = status;
    if (s->withdraw_in_status) {
        crpci_directory_withdraw(s->r, s->reg);
        s->reg = NULL;
    }
}

static int try_open(side *s, const crpc_hooks *hooks)
{
    crpc_loop_options o;
    crpci_directory_options ro;
    char text[96];
    int err;
    memset(s, 0, sizeof *s);
    memset(&o, 0, sizeof o);
    memset(&ro, 0, sizeof ro);
    s->status = -1;
    o.hooks = *hooks;
    o.hooks.clock_us = test_clock;
    o.hooks.log = on_line;
    err = crpc_loop_open(&s->loop, &o);
    if (err)
        return err;
    ro.interface = "127.0.0.1";
    snprintf(text, sizeof text, "multicast://%s", group);
    return crpci_open_registry(s->loop, text, &ro, &s->r, NULL);
}

static void open_side(side *s)
{
    crpc_hooks hooks = ct_hooks();
    int err = try_open(s, &hooks);
    if (err)
        fail_msg("no multicast: %s", crpc_status_name(err));
}

static void close_side(side *s)
{
    crpci_directory_close(s->r);
    crpc_loop_close(s->loop);
}

static int subscribe(side *s, const char *service, bool allow_empty)
{
    crpci_names_service q;
    memset(&q, 0, sizeof q);
    q.service = service;
    q.allow_empty = allow_empty;
    return crpci_directory_subscribe(s->r, &q, on_push, s, &s->sub);
}

static int enroll(side *s, const char *address)
{
    crpci_names_service what;
    memset(&what, 0, sizeof what);
    what.service = "demo.Echo";
    what.address = address;
    what.methods = "Echo";
    what.weight = 100;
    return crpci_directory_enroll(s->r, &what, on_status, s, &s->reg);
}

/* Lets time go by in steps of 50 ms, at each of which all sides are driven. A datagram on loopback
 * is there when it was sent. */
static void pass(int ms, side *a, side *b, side *c)
{
    side *sides[3];
    int i, k;
    sides[0] = a;
    sides[1] = b;
    sides[2] = c;
    for (i = 0; i < ms; i += 50) {
        clock_of_test += 50000;
        for (k = 0; k < 6; k++) {
            if (sides[k % 3])
                assert_int_equal(crpc_loop_step(sides[k % 3]->loop, 0), CRPC_OK);
        }
    }
}

static crpci_multicast *inside(side *s)
{
    return (crpci_multicast *)(void *)s->r;
}

/* Sends a datagram of its own. */
static void say(const void *text, size_t n)
{
    struct ip_mreqn which;
    crpci_addr to;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_true(crpci_sock_parse(&to, group));
    assert_true(crpci_multicast_interface("127.0.0.1", &which));
    assert_int_equal(setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &which, sizeof which), 0);
    assert_int_equal(sendto(fd, text, n, 0, &to.u.any, to.len), n);
    close(fd);
}

static void say_text(const char *text)
{
    say(text, strlen(text));
}

/* --- tests -------------------------------------------------------------------------------------- */

static void announced_providers_are_found(void **state)
{
    side a, b, c;
    (void)state;
    open_side(&a);
    open_side(&b);
    open_side(&c);
    assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
    assert_int_equal(b.pushes, 0);
    pass(1500, &a, &b, &c);
    assert_int_equal(b.pushes, 1); /* nobody is there: that is an answer too */
    assert_string_equal(b.list, "");
    assert_int_equal(enroll(&a, ":8000"), CRPC_OK); /* by the address of the interface */
    pass(200, &a, &b, &c);
    assert_int_equal(a.status, CRPC_OK);
    assert_string_equal(b.list, "127.0.0.1:8000 ");
    assert_int_equal(enroll(&c, "10.0.0.1:8000"), CRPC_OK);
    pass(200, &a, &b, &c);
    assert_string_equal(b.list, "10.0.0.1:8000 127.0.0.1:8000 ");
    crpci_directory_withdraw(c.r, c.reg);
    pass(200, &a, &b, &c);
    assert_string_equal(b.list, "127.0.0.1:8000 ");
    pass(60000, &a, &b, &c); /* announced again and again: nothing changes */
    assert_int_equal(b.pushes, 4);
    close_side(&a); /* says goodbye; the last one is kept, and called stale */
    pass(200, NULL, &b, &c);
    assert_string_equal(b.list, "127.0.0.1:8000 (stale)");
    close_side(&b);
    close_side(&c);
}

/* A consumer that comes later asks, and gets an answer long before the next announcement. */
static void providers_answer_a_subscribe(void **state)
{
    side a, b;
    int i;
    (void)state;
    open_side(&a);
    open_side(&b);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    pass(1000, &a, NULL, NULL);
    for (i = 0; i < 5; i++) {
        b.pushes = 0;
        assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
        pass(700, &a, &b, NULL);
        assert_int_equal(b.pushes, 1);
        assert_string_equal(b.list, "10.0.0.1:8000 ");
        crpci_directory_unsubscribe(b.r, b.sub);
    }
    close_side(&a);
    close_side(&b);
}

static void silent_providers_expire(void **state)
{
    side a, b, c;
    (void)state;
    open_side(&a);
    open_side(&b);
    open_side(&c);
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    assert_int_equal(enroll(&c, "10.0.0.2:8000"), CRPC_OK);
    pass(500, &a, &b, &c);
    assert_string_equal(b.list, "10.0.0.1:8000 10.0.0.2:8000 ");
    pass(14000, &a, &b, NULL); /* c hangs: its loop stands still */
    assert_string_equal(b.list, "10.0.0.1:8000 10.0.0.2:8000 ");
    pass(8000, &a, &b, NULL);
    assert_string_equal(b.list, "10.0.0.1:8000 ");
    pass(1000, &a, &b, &c); /* and goes on */
    assert_string_equal(b.list, "10.0.0.1:8000 10.0.0.2:8000 ");
    pass(30000, NULL, &b, NULL);
    assert_string_equal(b.list, ""); /* as it was allowed */
    close_side(&a);
    close_side(&b);
    close_side(&c);
}

/* Nobody drives the consumer's loop for an hour: then nobody has gone by that. */
static void a_loop_that_did_not_run_expires_nobody(void **state)
{
    side a, b;
    int pushes;
    (void)state;
    open_side(&a);
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    pass(500, &a, &b, NULL);
    pushes = b.pushes;
    pass(600000, &a, NULL, NULL);
    pass(1000, &b, NULL, NULL); /* reads what has come meanwhile */
    clock_of_test += INT64_C(3000000000); /* both rest, and b is the first to go on */
    pass(1000, &b, NULL, NULL);
    pass(30000, &a, &b, NULL);
    assert_string_equal(b.list, "10.0.0.1:8000 ");
    assert_int_equal(b.pushes, pushes);
    close_side(&a);
    close_side(&b);
}

static void it_ignores_nonsense(void **state)
{
    static const char *const nonsense[] = {
        "",
        "hello",
        "register",
        "register ",
        "register x",
        "register crpc://",
        "register crpc://host.name:80/demo.Echo",
        "register crpc://10.0.0.1/demo.Echo",
        "register crpc://10.0.0.1:0/demo.Echo",
        "register crpc://10.0.0.1:80/",
        "register crpc://10.0.0.1:80/demo.Echo?group=%2",
        "register crpc://0.0.0.0:80/demo.Echo",
        "register crpc://224.0.0.1:80/demo.Echo",
        "register crpc://255.255.255.255:80/demo.Echo",
        "register crpc://[ff02::1]:80/demo.Echo",
        "register crpc://[::]:80/demo.Echo",
        "unregister y",
        "subscribe",
        "subscribe z",
        "subscribe consumer://10.0.0.1",
        "GET / HTTP/1.1\r\n\r\n",
    };
    char big[CRPCI_MULTICAST_SIZE + 100];
    side b;
    size_t i;
    (void)state;
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
    pass(1500, &b, NULL, NULL);
    for (i = 0; i < sizeof nonsense / sizeof *nonsense; i++) {
        say_text(nonsense[i]);
        pass(100, &b, NULL, NULL);
        if (inside(&b)->ignored != i + 1)
            fail_msg("\"%s\" was taken", nonsense[i]);
    }
    memset(big, 'a', sizeof big);
    memcpy(big, "register crpc://10.0.0.1:80/demo.Echo?x=", 40);
    say(big, sizeof big); /* too long */
    big[30] = '\0';
    say(big, 100); /* a zero byte */
    pass(100, &b, NULL, NULL);
    assert_int_equal(inside(&b)->ignored, i + 2);
    assert_int_equal(b.pushes, 1);
    /* of others, or of another service: no nonsense, but not kept */
    say_text("register dubbo://10.0.0.1:80/demo.Echo");
    say_text("register crpc://10.0.0.1:80/demo.Other");
    say_text("register crpc://10.0.0.1:80/demo.Echo?group=g");
    say_text("unregister crpc://10.0.0.9:80/demo.Echo");
    pass(100, &b, NULL, NULL);
    assert_int_equal(inside(&b)->peer_count, 0);
    assert_int_equal(inside(&b)->ignored, i + 2);
    say_text("register crpc://10.0.0.1:80/demo.Echo\r\n"); /* the least that is enough */
    pass(100, &b, NULL, NULL);
    assert_string_equal(b.list, "10.0.0.1:80 ");
    close_side(&b);
}

static void it_reads_anything_safely(void **state)
{
    static const char parts[] = "register subscribe crpc://10.0.0.1:80/demo.Echo?&ttl=%2[]@\x01\xff";
    crpci_multicast *r;
    side b;
    int k;
    (void)state;
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
    r = inside(&b);
    crpci_loop_lock(b.loop);
    for (k = 0; k < 30000; k++) {
        char text[CRPCI_MULTICAST_SIZE + 1];
        size_t n = 9 + ct_random() % 80, i;
        memcpy(text, "register ", 9);
        memcpy(text + 9, "crpc://10.0.0.1:80/demo.Echo?&ttl=9&group=a&weight=5&x=", 55);
        for (i = 64; i < n; i++)
            text[i] = parts[ct_random() % (sizeof parts - 1)];
        for (i = ct_random() % 5; i; i--)
            text[ct_random() % n] = parts[ct_random() % (sizeof parts - 1)];
        crpci_multicast_take(r, text, n);
    }
    crpci_loop_unlock(b.loop);
    close_side(&b);
}

/* A flood of invented providers is bounded, and does not push out known ones. */
static void the_number_of_providers_is_bounded(void **state)
{
    crpci_multicast *r;
    char text[CRPCI_MULTICAST_SIZE + 1];
    side a, b;
    unsigned i;
    (void)state;
    open_side(&a);
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    pass(500, &a, &b, NULL);
    r = inside(&b);
    crpci_loop_lock(b.loop);
    for (i = 0; i < 2 * CRPCI_MULTICAST_MAX; i++) {
        size_t n = (size_t)snprintf(text, sizeof text, "register crpc://11.0.%u.%u:80/demo.Echo",
                                    i >> 8, i & 255);
        crpci_multicast_take(r, text, n);
    }
    crpci_loop_unlock(b.loop);
    assert_int_equal(r->peer_count, CRPCI_MULTICAST_MAX);
    pass(14000, &a, &b, NULL);
    pass(6000, &a, &b, NULL);
    assert_string_equal(b.list, "10.0.0.1:8000 "); /* they were not heard of again */
    close_side(&a);
    close_side(&b);
}

static void it_takes_the_newest_of_an_address(void **state)
{
    side b;
    (void)state;
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    say_text("register crpc://10.0.0.1:80/demo.Echo?a=b&timestamp=20&weight=2");
    pass(100, &b, NULL, NULL);
    say_text("register crpc://10.0.0.1:80/demo.Echo?a=b&timestamp=10&weight=1");
    pass(100, &b, NULL, NULL);
    say_text("unregister crpc://10.0.0.1:80/demo.Echo?a=b&timestamp=10&weight=1"); /* late */
    pass(100, &b, NULL, NULL);
    assert_int_equal(b.pushes, 1);
    assert_int_equal(inside(&b)->peer_count, 1);
    say_text("register crpc://10.0.0.1:80/demo.Echo?a=b&timestamp=30&weight=3");
    pass(100, &b, NULL, NULL);
    assert_int_equal(b.pushes, 2);
    assert_int_equal(inside(&b)->peer_count, 1);
    say_text("unregister crpc://10.0.0.1:80/demo.Echo?a=b&timestamp=30&weight=3");
    pass(100, &b, NULL, NULL);
    assert_string_equal(b.list, "");
    close_side(&b);
}

/* A board starts again without a battery behind its clock. What it announced before is older by the
 * clock of this host only; it is never missing from the list meanwhile. */
static void a_provider_whose_clock_went_back_is_followed(void **state)
{
    static const char before[] = "register crpc://10.0.0.1:80/demo.Echo?pid=9&timestamp=1700000000000";
    static const char after[] = "register crpc://10.0.0.1:80/demo.Echo?pid=8&timestamp=5000&weight=7";
    crpci_multicast_peer *p;
    side b;
    int i, k;
    (void)state;
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    for (i = 0; i < 3; i++) { /* both run: the newer one is believed */
        say_text(before);
        pass(2500, &b, NULL, NULL);
        say_text(after);
        pass(2500, &b, NULL, NULL);
    }
    assert_int_equal(b.pushes, 1);
    pass(1000, &b, NULL, NULL);
    for (i = 0; i < 6; i++) { /* the older one alone */
        say_text(after);
        for (k = 0; k < 10; k++) {
            pass(500, &b, NULL, NULL);
            assert_string_equal(b.list, "10.0.0.1:80 ");
        }
    }
    assert_int_equal(inside(&b)->peer_count, 1);
    p = CRPCI_CONTAINER(inside(&b)->peers.next, crpci_multicast_peer, link);
    assert_int_equal(p->is.weight, 7);
    assert_int_equal(b.pushes, 2);
    close_side(&b);
}

/* The kernel forgets a membership with the interface that it was made on. When there is one of that name
 * again, another socket joins the group. */
static void a_lost_membership_is_made_again(void **state)
{
    side a, b;
    side *sides[2];
    int i;
    (void)state;
    sides[0] = &a;
    sides[1] = &b;
    open_side(&a);
    open_side(&b);
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    assert_int_equal(enroll(&a, ":8000"), CRPC_OK);
    pass(500, &a, &b, NULL);
    assert_string_equal(b.list, "127.0.0.1:8000 ");
    for (i = 0; i < 2; i++) {
        crpci_multicast *r = inside(sides[i]);
        assert_int_equal(setsockopt(r->fd, IPPROTO_IP, IP_DROP_MEMBERSHIP, &r->which,
                                    sizeof r->which), 0);
    }
    pass(60000, &a, &b, NULL);
    assert_string_equal(b.list, "127.0.0.1:8000 ");
    assert_int_equal(b.pushes, 1);
    for (i = 0; i < 2; i++) {
        crpci_multicast *r = inside(sides[i]);
        assert_int_equal(setsockopt(r->fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &r->which,
                                    sizeof r->which), -1);
        assert_int_equal(errno, EADDRINUSE);
    }
    close_side(&a);
    close_side(&b);
}

/* The subscriber has no memory for a while: the same list is offered each second, until it is taken. */
static void a_refused_list_is_offered_again(void **state)
{
    side a, b;
    (void)state;
    open_side(&a);
    open_side(&b);
    b.refuse = true;
    assert_int_equal(subscribe(&b, "demo.Echo", true), CRPC_OK);
    assert_int_equal(enroll(&a, ":8000"), CRPC_OK);
    pass(20000, &a, &b, NULL);
    b.refuse = false;
    pass(1500, &a, &b, NULL);
    assert_string_equal(b.list, "127.0.0.1:8000 ");
    crpci_directory_withdraw(a.r, a.reg);
    b.refuse = true;
    pass(20000, &a, &b, NULL);
    b.refuse = false;
    pass(1500, &a, &b, NULL);
    assert_string_equal(b.list, "");
    close_side(&a);
    close_side(&b);
}

static void a_ttl_is_clamped(void **state)
{
    (void)state;
    assert_true(crpci_multicast_ttl("crpc://x?a=b") == 15000000);
    assert_true(crpci_multicast_ttl("crpc://x?a=b&ttl=2000") == 2000000);
    assert_true(crpci_multicast_ttl("crpc://x?a=b&ttl=1") == 1000000);
    assert_true(crpci_multicast_ttl("crpc://x?a=b&ttl=-1") == 15000000);
    assert_true(crpci_multicast_ttl("crpc://x?a=b&ttl=99999999999999999999") == 600000000);
}

/* However often consumers ask, a provider announces itself at most twice a second. */
static void questions_are_not_amplified(void **state)
{
    side a, b;
    uint32_t heard = 0;
    int64_t last = 0;
    int i;
    (void)state;
    open_side(&a);
    open_side(&b);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    for (i = 0; i < 100; i++) { /* ten seconds */
        crpci_multicast_reg *reg = (crpci_multicast_reg *)a.reg;
        say_text("subscribe consumer://10.0.0.9/demo.Echo?side=consumer");
        say_text("subscribe consumer://10.0.0.9/*");
        pass(100, &a, NULL, NULL);
        heard += reg->sent_us != last;
        last = reg->sent_us;
    }
    assert_true(heard >= 10 && heard <= 21);
    close_side(&a);
    close_side(&b);
}

static void it_may_be_closed_in_its_callbacks(void **state)
{
    side a, b;
    (void)state;
    open_side(&a);
    open_side(&b);
    a.withdraw_in_status = true;
    b.close_in_push = true;
    assert_int_equal(subscribe(&b, "demo.Echo", false), CRPC_OK);
    assert_int_equal(enroll(&a, "10.0.0.1:8000"), CRPC_OK);
    pass(2000, &a, &b, NULL);
    assert_int_equal(a.status, CRPC_OK);
    assert_int_equal(b.pushes, 1);
    assert_null(a.reg);
    assert_null(b.r);
    close_side(&a);
    close_side(&b);
}

static void it_refuses_what_cannot_be(void **state)
{
    static const struct {
        const char *url, *interface;
        int status;
    } bad[] = {
        {"multicast://", NULL, CRPC_EINVAL},
        {"multicast://10.0.0.1:1", NULL, CRPC_EINVAL},
        {"multicast://224.5.6.7", NULL, CRPC_EINVAL},
        {"multicast://224.5.6.7:0", NULL, CRPC_EINVAL},
        {"multicast://[ff02::1]:1", NULL, CRPC_EINVAL},
        {"multicast://name:1", NULL, CRPC_EINVAL},
        {"multicast://224.5.6.7:1234?interface=lo&x=y", NULL, CRPC_EINVAL},
        {"multicast://224.5.6.7:1234?weight=5", NULL, CRPC_EINVAL},
        {"multicast://224.5.6.7:1234?interface=no%20such", NULL, CRPC_EADDRESS},
        {"multicast://224.5.6.7:1234", "no such one", CRPC_EADDRESS},
        {"multicast://224.5.6.7:1234", "192.0.2.1", CRPC_EADDRESS},
    };
    char long_name[1500];
    crpci_names_service what;
    crpci_directory_options ro;
    crpci_backend *r;
    crpc_error error;
    void *handle;
    side a;
    size_t i;
    (void)state;
    open_side(&a);
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        int err;
        memset(&ro, 0, sizeof ro);
        ro.interface = bad[i].interface;
        err = crpci_open_registry(a.loop, bad[i].url, &ro, &r, &error);
        if (err != bad[i].status || r)
            fail_msg("%s: %s", bad[i].url, crpc_status_name(err));
    }
    memset(&what, 0, sizeof what);
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    what.service = "S";
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    what.address = "host:1";
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    what.address = ":0";
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    memset(long_name, 'm', sizeof long_name);
    long_name[sizeof long_name - 1] = '\0';
    what.address = ":1";
    what.methods = long_name; /* left out */
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_OK);
    what.group = long_name;
    assert_int_equal(crpci_directory_enroll(a.r, &what, NULL, NULL, &handle), CRPC_EINVAL);
    assert_null(handle);
    assert_int_equal(subscribe(&a, "", false), CRPC_EINVAL);
    crpci_directory_withdraw(a.r, NULL);
    crpci_directory_unsubscribe(a.r, NULL);
    close_side(&a);
}

/* A server and a channel find each other, by the name of the interface. */
static void it_serves_channels(void **state)
{
    crpc_server_options so;
    crpc_loop_options lo;
    crpc_channel_options co;
    crpc_channel *ch;
    crpc_server *server;
    crpc_error error;
    char url[160];
    static const crpc_service service = {"demo.Echo", NULL, 0};
    int i;
    (void)state;
    memset(&so, 0, sizeof so);
    memset(&lo, 0, sizeof lo);
    memset(&co, 0, sizeof co);
    snprintf(url, sizeof url, "multicast://%s?interface=lo", group);
    so.listen = "tcp://127.0.0.1:0";
    so.registry = url;
    lo.hooks = co.private_loop.hooks = ct_hooks();
    assert_int_equal(crpc_loop_open(&so.loop, &lo), CRPC_OK);
    assert_int_equal(crpc_loop_start(so.loop), CRPC_OK);
    if (crpc_server_open(&server, &so, &error))
        fail_msg("%s", error.text);
    assert_int_equal(crpc_server_add(server, &service, NULL, NULL), CRPC_OK);
    if (crpc_server_start(server, &error))
        fail_msg("%s", error.text);
    snprintf(url, sizeof url, "multicast://%s/demo.Echo?interface=lo&registry_timeout_ms=20000",
             group);
    if (crpc_channel_open(&ch, url, &co, &error))
        fail_msg("%s", error.text);
    for (i = 0; i < 100 && crpc_channel_providers(ch) == 0; i++)
        assert_int_equal(crpc_loop_step(crpc_channel_loop(ch), 100), CRPC_OK);
    assert_int_equal(crpc_channel_providers(ch), 1);
    crpc_channel_close(ch);
    crpc_server_close(server);
    crpc_loop_close(so.loop);
}

static int scenario(const crpc_hooks *hooks, void *user)
{
    side a;
    int err = try_open(&a, hooks);
    (void)user;
    if (!err)
        err = subscribe(&a, "demo.Echo", false);
    if (!err)
        err = enroll(&a, "10.0.0.1:8000");
    if (!err)
        pass(8000, &a, NULL, NULL);
    if (!err)
        assert_string_equal(a.list, "10.0.0.1:8000 ");
    close_side(&a);
    return err;
}

static void it_survives_want_of_memory(void **state)
{
    ct_alloc a;
    crpc_hooks hooks = ct_hooks_of(&a);
    long n;
    (void)state;
    for (n = 1;; n++) { /* each allocation fails once: a later try heals it */
        memset(&a, 0, sizeof a);
        a.fail_at = n;
        scenario(&hooks, NULL);
        assert_int_equal(a.live_blocks, 0);
        assert_int_equal(a.wrong_sizes, 0);
        if (!a.failed)
            break;
    }
    assert_true(n > 10);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(announced_providers_are_found),
        CT_TEST(providers_answer_a_subscribe),
        CT_TEST(silent_providers_expire),
        CT_TEST(a_loop_that_did_not_run_expires_nobody),
        CT_TEST(it_ignores_nonsense),
        CT_TEST(it_reads_anything_safely),
        CT_TEST(the_number_of_providers_is_bounded),
        CT_TEST(it_takes_the_newest_of_an_address),
        CT_TEST(a_provider_whose_clock_went_back_is_followed),
        CT_TEST(a_lost_membership_is_made_again),
        CT_TEST(a_refused_list_is_offered_again),
        CT_TEST(a_ttl_is_clamped),
        CT_TEST(questions_are_not_amplified),
        CT_TEST(it_may_be_closed_in_its_callbacks),
        CT_TEST(it_refuses_what_cannot_be),
        CT_TEST(it_serves_channels),
        CT_TEST(it_survives_want_of_memory),
    };
    clock_of_test = 5000000;
    snprintf(group, sizeof group, "239.255.%u.%u:%d", (unsigned)(ct_random() % 256),
             (unsigned)(ct_random() % 256), ct_free_port());
    return CT_RUN(tests);
}
