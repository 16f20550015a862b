/* impl-sock: addresses as text, options of sockets, unix socket files. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"

#include <netinet/tcp.h>

static void numeric_addresses_come_back(void **state)
{
    static const char *const good[][2] = {
        {"1.2.3.4:80", "1.2.3.4:80"},
        {"127.0.0.1:0", "127.0.0.1:0"},
        {"0.0.0.0:65535", "0.0.0.0:65535"},
        {"255.255.255.255:1", "255.255.255.255:1"},
        {"[::1]:80", "[::1]:80"},
        {"[::]:8002", "[::]:8002"},
        {"[2001:0DB8:0:0:0:0:0:1]:8", "[2001:db8::1]:8"},
        {"[::ffff:1.2.3.4]:9", "[::ffff:1.2.3.4]:9"},
        {"unix:/run/crpc.sock", "unix:/run/crpc.sock"},
        {"unix:here", "unix:here"},
        {"unix:/a:b?c", "unix:/a:b?c"},
        {"unix:@name", "unix:@name"},
        {"unix:@a", "unix:@a"},
    };
    size_t i;
    (void)state;
    for (i = 0; i < sizeof good / sizeof good[0]; i++) {
        crpci_addr a;
        char text[CRPC_ADDRESS_MAX];
        memset(&a, 0x55, sizeof a);
        if (!crpci_sock_parse(&a, good[i][0]))
            fail_msg("\"%s\" was refused", good[i][0]);
        crpci_sock_format(&a, text, sizeof text);
        assert_string_equal(text, good[i][1]);
    }
}

static void families_and_ports(void **state)
{
    crpci_addr a;
    (void)state;
    assert_true(crpci_sock_parse(&a, "1.2.3.4:258"));
    assert_int_equal(a.u.in4.sin_family, AF_INET);
    assert_int_equal(a.len, sizeof a.u.in4);
    assert_int_equal(a.u.in4.sin_port, htons(258));
    assert_int_equal(a.u.in4.sin_addr.s_addr, htonl(0x01020304));
    assert_true(crpci_sock_parse(&a, "[::1]:258"));
    assert_int_equal(a.u.in6.sin6_family, AF_INET6);
    assert_int_equal(a.len, sizeof a.u.in6);
    assert_int_equal(a.u.in6.sin6_port, htons(258));
    assert_true(crpci_sock_parse(&a, "unix:/x"));
    assert_int_equal(a.u.un.sun_family, AF_UNIX);
    assert_int_equal(a.len, offsetof(struct sockaddr_un, sun_path) + 3);
    assert_int_equal(crpci_sock_port(&a), 0);
    assert_true(crpci_sock_parse(&a, "unix:@x")); /* a name in the abstract namespace */
    assert_int_equal(a.u.un.sun_path[0], '\0');
    assert_int_equal(a.u.un.sun_path[1], 'x');
    assert_int_equal(a.len, offsetof(struct sockaddr_un, sun_path) + 2);
    assert_true(crpci_sock_parse(&a, "1.2.3.4:258"));
    assert_int_equal(crpci_sock_port(&a), 258);
    assert_true(crpci_sock_parse(&a, "[::1]:258"));
    assert_int_equal(crpci_sock_port(&a), 258);
}

static void malformed_addresses_are_refused(void **state)
{
    static const char *const bad[] = {
        "",
        "1.2.3.4",
        ":80",
        "1.2.3.4:",
        "1.2.3.4:65536",
        "1.2.3.4:-1",
        "1.2.3:80",
        "1.2.3.4.5:8",
        "256.1.1.1:8",
        "localhost:80",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[::1:80",
        "::1]:80",
        "[]:80",
        "[:80",
        "[",
        "]:80",
        "[::1]x:80",
        "1.2.3.4:8x",
        "1.2.3.4: 8",
        "1.2.3.4:+8",
        "unix:",
        "unix:@",
        "[::g]:80",
        "1.2.3.4 :80",
        "[::1%lo]:80",
        ":",
        "[1:2:3:4:5:6:7:8:9]:1",
    };
    crpci_addr a;
    size_t i;
    (void)state;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ct_guard g = ct_guard_make(bad[i], strlen(bad[i]) + 1);
        if (crpci_sock_parse(&a, (const char *)g.data))
            fail_msg("\"%s\" was taken for an address", bad[i]);
        ct_guard_free(g);
    }
}

/* Addresses are kept as text: each path that is accepted fits CRPC_ADDRESS_MAX bytes when it is
 * formatted. */
static void long_unix_paths(void **state)
{
    size_t n, longest = 0;
    (void)state;
    for (n = 1; n < 240; n++) { /* paths, then abstract names */
        char text[160] = "unix:", out[CRPC_ADDRESS_MAX];
        crpci_addr a;
        memset(text + 5, 'p', n % 120);
        if (n > 120)
            text[5] = '@';
        if (!crpci_sock_parse(&a, text))
            continue;
        longest = n % 120;
        crpci_sock_format(&a, out, sizeof out);
        assert_string_equal(out, text);
    }
    assert_in_range(longest, 100, sizeof((struct sockaddr_un *)0)->sun_path - 1);
}

/* The path of a foreign peer may fill sun_path to the last byte, without a terminating zero. */
static void a_path_without_a_terminating_zero(void **state)
{
    struct {
        crpci_addr a;
        char behind[64];
    } x;
    char out[300];
    (void)state;
    memset(&x, 'x', sizeof x);
    x.a.u.un.sun_family = AF_UNIX;
    x.a.len = sizeof x.a.u.un;
    crpci_sock_format(&x.a, out, sizeof out);
    assert_in_range(strlen(out), 100, 5 + sizeof x.a.u.un.sun_path);
    x.a.len = sizeof(sa_family_t); /* most peers have no path at all */
    crpci_sock_format(&x.a, out, sizeof out);
    assert_string_equal(out, "unix:");
}

static void splitting(void **state)
{
    char host[8];
    unsigned port = 0;
    (void)state;
    assert_true(crpci_sock_split("example:65535", host, sizeof host, &port));
    assert_string_equal(host, "example");
    assert_int_equal(port, 65535);
    /* the host does not fit */
    assert_false(crpci_sock_split("example1:1", host, sizeof host, &port));
    assert_true(crpci_sock_split("[a::b]:7", host, sizeof host, &port));
    assert_string_equal(host, "a::b");
    assert_int_equal(port, 7);
    assert_true(crpci_sock_split(":7", host, sizeof host, &port));
    assert_string_equal(host, "");
    assert_false(crpci_sock_split("a:b:7", host, sizeof host, &port));
}

/* --- sockets -----------------------------------------------------------------------------------
 */

static int option(int fd, int level, int name)
{
    int value = -1;
    socklen_t size = sizeof value;
    getsockopt(fd, level, name, &value, &size);
    return value;
}

static int listen_on(const char *text, crpci_addr *bound)
{
    crpci_addr a;
    int fd;
    assert_true(crpci_sock_parse(&a, text));
    fd = crpci_sock_listen(&a);
    if (fd >= 0 && bound)
        crpci_sock_local(fd, bound);
    return fd;
}

static void sockets_are_private_tuned_and_do_not_block(void **state)
{
    static const char *const texts[] = {"127.0.0.1:0", "[::1]:0", "unix:unused"};
    size_t i;
    (void)state;
    for (i = 0; i < 3; i++) {
        crpci_addr a;
        int fd;
        assert_true(crpci_sock_parse(&a, texts[i]));
        fd = crpci_sock_open(&a);
        if (fd < 0 && i == 1)
            continue; /* a machine without IPv6 */
        assert_true(fd >= 0);
        assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
        if (i < 2) {
            assert_int_equal(option(fd, IPPROTO_TCP, TCP_NODELAY), 1);
            assert_int_equal(option(fd, SOL_SOCKET, SO_KEEPALIVE), 1);
            assert_int_equal(option(fd, IPPROTO_TCP, TCP_KEEPIDLE), 60);
            assert_int_equal(option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT), 30000);
        }
        close(fd);
    }
}

static void listeners(void **state)
{
    crpci_addr a, b, peer;
    char text[CRPC_ADDRESS_MAX];
    int listener = listen_on("127.0.0.1:0", &a), second, fd, accepted = -1;
    (void)state;
    assert_true(listener >= 0);
    assert_true(fcntl(listener, F_GETFD) & FD_CLOEXEC);
    assert_true(fcntl(listener, F_GETFL) & O_NONBLOCK);
    assert_true(ntohs(a.u.in4.sin_port) != 0); /* port 0 was replaced by a free one */
    crpci_sock_format(&a, text, sizeof text);
    second = listen_on(text, NULL);
    assert_int_equal(second, -1);
    assert_int_equal(errno, EADDRINUSE);
    assert_int_equal(listen_on("192.0.2.1:80", NULL), -1); /* an address of another machine */
    assert_int_equal(errno, EADDRNOTAVAIL);

    fd = crpci_sock_open(&a);
    assert_true(connect(fd, &a.u.any, a.len) == 0 || errno == EINPROGRESS);
    assert_true(CT_WAIT(
        accepted >= 0 || (accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0, 5000));
    crpci_sock_peer(fd, &peer);
    crpci_sock_local(accepted, &b);
    assert_int_equal(peer.len, a.len);
    assert_memory_equal(&peer.u, &a.u, a.len);
    assert_memory_equal(&b.u, &a.u, a.len);
    crpci_sock_local(fd, &a);
    crpci_sock_peer(accepted, &b);
    assert_memory_equal(&b.u, &a.u, a.len);
    assert_false(crpci_sock_is_self(fd));
    close(accepted);
    close(fd);
    close(listener);
    /* A restarted server can listen although connections of the old one are in TIME_WAIT. */
    crpci_sock_format(&peer, text, sizeof text);
    listener = listen_on(text, NULL);
    assert_true(listener >= 0);
    close(listener);
    crpci_sock_local(-1, &a);
    assert_int_equal(a.len, 0);
    crpci_sock_peer(-1, &a);
    assert_int_equal(a.len, 0);
}

/* TCP lets a socket connect to itself when it dials a port of the ephemeral range on which nobody
 * listens. */
static void a_connection_to_itself(void **state)
{
    crpci_addr a;
    int fd, on = 1;
    (void)state;
    assert_true(crpci_sock_parse(&a, "127.0.0.1:0"));
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    assert_int_equal(bind(fd, &a.u.any, a.len), 0);
    crpci_sock_local(fd, &a);
    assert_false(crpci_sock_is_self(fd)); /* not connected */
    assert_int_equal(connect(fd, &a.u.any, a.len), 0);
    assert_true(crpci_sock_is_self(fd));
    close(fd);
    assert_false(crpci_sock_is_self(-1));
    {
        int pair[2];
        assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
        /* both ends have no address: they are not equal */
        assert_false(crpci_sock_is_self(pair[0]));
        close(pair[0]);
        close(pair[1]);
    }
}

/* The name goes with its socket: nothing is left behind in the file system. */
static void abstract_sockets(void **state)
{
    char text[64], own[CRPC_ADDRESS_MAX];
    crpci_addr a, bound, peer;
    int listener, second, fd, accepted;
    (void)state;
    snprintf(text, sizeof text, "unix:@crpc-test-%ld", (long)getpid());
    assert_true(crpci_sock_parse(&a, text));
    listener = listen_on(text, &bound);
    assert_true(listener >= 0);
    crpci_sock_format(&bound, own, sizeof own);
    assert_string_equal(own, text);
    second = listen_on(text, NULL);
    assert_int_equal(second, -1);
    assert_int_equal(errno, EADDRINUSE);
    fd = crpci_sock_open(&a);
    assert_int_equal(connect(fd, &a.u.any, a.len), 0);
    accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    assert_true(accepted >= 0);
    crpci_sock_peer(fd, &peer);
    crpci_sock_format(&peer, own, sizeof own);
    assert_string_equal(own, text);
    close(accepted);
    close(fd);
    close(listener);
    listener = listen_on(text, NULL);
    assert_true(listener >= 0);
    close(listener);
}

/* The routing table gives the local address from which a destination is reached. */
static void routes(void **state)
{
    crpci_addr to;
    char host[INET6_ADDRSTRLEN];
    struct ip_mreqn via;
    (void)state;
    assert_true(crpci_sock_parse(&to, "127.0.0.1:80"));
    assert_true(crpci_sock_route(&to, NULL, host, sizeof host));
    assert_string_equal(host, "127.0.0.1");
    assert_true(crpci_sock_parse(&to, "239.255.1.2:80"));
    memset(&via, 0, sizeof via);
    via.imr_address.s_addr = htonl(INADDR_LOOPBACK);
    assert_true(crpci_sock_route(&to, &via, host, sizeof host));
    assert_string_equal(host, "127.0.0.1");
    via.imr_address.s_addr = htonl(0xc0000201); /* 192.0.2.1 is nobody's */
    assert_false(crpci_sock_route(&to, &via, host, sizeof host));
    assert_string_equal(host, "");
}

static void stale_socket_files(void **state)
{
    ct_dir dir = ct_dir_make();
    char text[128], path[128];
    struct stat st;
    int fd, second;
    FILE *file;
    (void)state;
    snprintf(text, sizeof text, "unix:%s/sock", dir.path);
    snprintf(path, sizeof path, "%s/sock", dir.path);
    fd = listen_on(text, NULL);
    assert_true(fd >= 0);
    second = listen_on(text, NULL); /* the file is in use: it stays */
    assert_int_equal(second, -1);
    assert_int_equal(errno, EADDRINUSE);
    assert_int_equal(stat(path, &st), 0);
    close(fd); /* as when a server is killed: its file stays */
    assert_int_equal(stat(path, &st), 0);
    fd = listen_on(text, NULL);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(unlink(path), 0);
    file = fopen(path, "w"); /* an ordinary file is never removed */
    assert_non_null(file);
    fclose(file);
    assert_int_equal(listen_on(text, NULL), -1);
    assert_int_equal(errno, EADDRINUSE);
    assert_int_equal(stat(path, &st), 0);
    assert_true(S_ISREG(st.st_mode));
    assert_int_equal(unlink(path), 0);
    snprintf(text, sizeof text, "unix:%s/missing/sock", dir.path);
    assert_int_equal(listen_on(text, NULL), -1);
    assert_int_equal(errno, ENOENT);
    ct_dir_remove(dir);
}

/* A socket file is removed only if connect says that nobody listens: not that of a server too busy
 * to accept, nor that of a datagram socket. */
static void socket_files_in_use(void **state)
{
    ct_dir dir = ct_dir_make();
    char text[128];
    struct stat st;
    crpci_addr a;
    int fd, fds[16], n = 0, err;
    (void)state;
    snprintf(text, sizeof text, "unix:%s/busy", dir.path);
    assert_true(crpci_sock_parse(&a, text));
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, &a.u.any, a.len), 0);
    assert_int_equal(listen(fd, 0), 0);
    do {
        fds[n] = crpci_sock_open(&a);
        err = connect(fds[n++], &a.u.any, a.len) ? errno : 0;
    } while (!err && n < 16);
    assert_int_equal(err, EAGAIN); /* its queue is full */
    assert_int_equal(listen_on(text, NULL), -1);
    assert_int_equal(errno, EADDRINUSE);
    assert_int_equal(stat(a.u.un.sun_path, &st), 0);
    while (n--)
        close(fds[n]);
    close(fd);

    snprintf(text, sizeof text, "unix:%s/datagram", dir.path);
    assert_true(crpci_sock_parse(&a, text));
    fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(fd, &a.u.any, a.len), 0);
    assert_int_equal(listen_on(text, NULL), -1);
    assert_int_equal(errno, EADDRINUSE);
    assert_int_equal(stat(a.u.un.sun_path, &st), 0);
    close(fd);
    ct_dir_remove(dir);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(numeric_addresses_come_back),
        CT_TEST(families_and_ports),
        CT_TEST(malformed_addresses_are_refused),
        CT_TEST(long_unix_paths),
        CT_TEST(a_path_without_a_terminating_zero),
        CT_TEST(splitting),
        CT_TEST(sockets_are_private_tuned_and_do_not_block),
        CT_TEST(listeners),
        CT_TEST(a_connection_to_itself),
        CT_TEST(abstract_sockets),
        CT_TEST(routes),
        CT_TEST(stale_socket_files),
        CT_TEST(socket_files_in_use),
    };
    return CT_RUN(tests);
}
