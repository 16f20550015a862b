/* Addresses that a server listens on, and the connections that it accepts. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#include "crpc_test.h"
#include "crpc_net.h"

/* Opens a socket on a free port of 127.0.0.1. `backlog` < 0: it is bound but does not listen. */
static int bound_socket(int backlog)
{
    struct sockaddr_in a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    if (backlog >= 0)
        assert_int_equal(listen(fd, backlog), 0);
    return fd;
}

static void several_listeners_of_a_server(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_server_options o;
        crpc_server *s;
        crpc_error error;
        net_service service;
        ct_dir dir = ct_dir_make();
        char urls[5][160], unix_url[120], abstract_url[60];
        int i;
        memset(&o, 0, sizeof o);
        snprintf(unix_url, sizeof unix_url, "unix://%s/socket", dir.path);
        snprintf(abstract_url, sizeof abstract_url, "unix://@crpc-test-%ld", (long)getpid());
        o.listen = "tcp://localhost:0";
        o.loops = net_loop_options(p);
        net_service_init(&service);
        assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, "tcp://[::1]:0", &error), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, unix_url, &error), CRPC_OK);
        assert_int_equal(crpc_server_listen_fd(s, bound_socket(5)), CRPC_OK);
        assert_int_equal(crpc_server_listen(s, abstract_url, &error), CRPC_OK);
        assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
        assert_int_equal(crpc_server_start(s, &error), CRPC_OK);
        assert_int_equal(crpc_loop_start(crpc_server_loop(s)), CRPC_OK);
        for (i = 0; i < 5; i++) {
            crpc_channel *ch;
            assert_int_equal(crpc_server_address(s, (size_t)i, urls[i], sizeof urls[i]), CRPC_OK);
            ch = net_channel(urls[i], "?timeout_ms=20000", p, NULL, NULL);
            net_check_add(ch, i);
            crpc_channel_close(ch);
        }
        assert_int_equal(crpc_server_address(s, 5, urls[0], sizeof urls[0]), CRPC_ENOTFOUND);
        assert_memory_equal(urls[0], "tcp://127.0.0.1:", 16);
        assert_memory_equal(urls[1], "tcp://[::1]:", 12);
        assert_string_equal(urls[2], unix_url);
        assert_string_equal(urls[4], abstract_url);
        crpc_server_close(s);
        ct_dir_remove(dir);
    }
}

static void an_inherited_descriptor_must_listen(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    int fd = bound_socket(-1);
    (void)state;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_listen_fd(s, fd), CRPC_EINVAL);
    assert_int_equal(crpc_server_listen_fd(s, -1), CRPC_EINVAL);
    assert_int_equal(listen(fd, 5), 0);
    assert_int_equal(crpc_server_listen_fd(s, fd), CRPC_OK); /* it is the server's now */
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    crpc_server_close(s);
}

static void a_socket_file_goes_with_its_server(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    ct_dir dir = ct_dir_make();
    struct stat st;
    char unix_url[120];
    (void)state;
    snprintf(unix_url, sizeof unix_url, "unix://%s/socket", dir.path);
    o.listen = unix_url;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(stat(unix_url + 7, &st), 0);
    crpc_server_close(s);
    assert_int_equal(stat(unix_url + 7, &st), -1);
    ct_dir_remove(dir);
}

/* Opens a server on `url`, which must fail, and returns the error. */
static int not_opened(const char *url, crpc_error *error)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s = (crpc_server *)&o;
    int status;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = url;
    status = crpc_server_open(&s, &o, error);
    assert_null(s);
    assert_int_equal(crpc_server_open(&s, &o, NULL), status);
    return status;
}

static void addresses_that_are_not_available_are_explained(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    crpc_error error;
    char url[160], says[300];
    (void)state;
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = "tcp://127.0.0.1:0";
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    assert_int_equal(not_opened(url, &error), CRPC_EADDRESS);
    snprintf(says, sizeof says, "%.100s: cannot listen: address already in use (errno %d)", url,
             EADDRINUSE);
    assert_string_equal(error.text, says);
    crpc_server_close(s);
    assert_int_equal(not_opened("tcp://192.0.2.1:80", &error), CRPC_EADDRESS); /* RFC 5737 */
    assert_non_null(strstr(error.text, "no local port or address available"));
    assert_int_equal(not_opened("unix:///nonexistent/dir/socket", &error), CRPC_EADDRESS);
}

static void a_url_that_no_listener_can_have_is_explained(void **state)
{
    crpc_error error;
    (void)state;
    assert_int_equal(not_opened("list://127.0.0.1:1", &error), CRPC_EINVAL);
    assert_string_equal(error.text, "list://127.0.0.1:1: expected tcp://host:port, unix:///path or "
                                    "unix://@name");
    assert_int_equal(not_opened("unix:///", &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "unix:///: no path"));
    assert_int_equal(not_opened("tcp://[fe80::1%lo]:0", &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "an IPv6 address with a scope (%lo) is not supported"));
    assert_int_equal(not_opened("tcp://127.0.0.1:0?x=y", &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "a listener takes no URL options"));
    assert_int_equal(not_opened("tcp://127.0.0.1", &error), CRPC_EINVAL);
}

static void a_socket_file_in_use_is_left_alone(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    crpc_error error;
    ct_dir dir = ct_dir_make();
    char unix_url[120];
    (void)state;
    snprintf(unix_url, sizeof unix_url, "unix://%s/socket", dir.path);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = unix_url;
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_OK);
    assert_int_equal(not_opened(unix_url, &error), CRPC_EADDRESS);
    close(wire_connect(unix_url)); /* still there */
    crpc_server_close(s);
    ct_dir_remove(dir);
}

/* A crashed program has left its socket file behind: no process listens on it. */
static void a_stale_socket_file_is_replaced(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    ct_dir dir = ct_dir_make();
    struct sockaddr_un a;
    char unix_url[120];
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)state;
    memset(&a, 0, sizeof a);
    a.sun_family = AF_UNIX;
    snprintf(a.sun_path, sizeof a.sun_path, "%s/socket", dir.path);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    close(fd); /* the file stays */
    snprintf(unix_url, sizeof unix_url, "unix://%s", a.sun_path);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = unix_url;
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    close(wire_connect(unix_url));
    crpc_server_close(s);
    ct_dir_remove(dir);
}

/* --- who may connect, and who yields ---------------------------------------------------------- */

static crpc_loop_stats stats(const net *n)
{
    crpc_loop_stats out;
    crpc_server_stats_get(n->server, &out);
    return out;
}

static void requests_over_the_limit_of_connections_are_refused(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int fds[4], i;
        char c, text[CRPC_ERROR_TEXT_MAX];
        memset(&n, 0, sizeof n);
        n.server_options.max_connections = 3;
        net_open(&n, p, m);
        for (i = 0; i < 3; i++) {
            fds[i] = wire_connect(n.url);
            assert_int_equal(net_ask(fds[i], "Echo", "Add", 1, NULL, NULL), 0);
        }
        fds[3] = wire_connect(n.url);
        assert_int_equal(net_ask(fds[3], "Echo", "Add", 1, NULL, text), CRPC_ELIMIT);
        assert_non_null(strstr(text, "max_connections"));
        assert_true(recv(fds[3], &c, 1, 0) <= 0); /* after a second */
        close(fds[3]);
        assert_int_equal(net_calls(&n.service), 3);
        assert_true(CT_WAIT(net_connections(n.server) == 3, NET_PATIENCE));
        assert_int_equal(stats(&n).refused, 1);
        close(fds[0]);
        assert_true(CT_WAIT(net_connections(n.server) == 2, NET_PATIENCE));
        fds[0] = wire_connect(n.url);
        assert_int_equal(net_ask(fds[0], "Echo", "Add", 1, NULL, NULL), 0);
        for (i = 0; i < 3; i++)
            close(fds[i]);
        assert_true(CT_WAIT(net_connections(n.server) == 0, NET_PATIENCE));
        net_close(&n);
    }
}

/* Connections of a host that asks for nothing, as many as max_connections has. */
static void a_silent_host_does_not_shut_others_out(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int silent[16], honest[6], i;
        memset(&n, 0, sizeof n);
        n.server_options.max_connections = 8;
        net_open(&n, p, m);
        for (i = 0; i < 16; i++)
            silent[i] = wire_connect_from(n.url, "127.0.0.2");
        assert_true(CT_WAIT(stats(&n).refused == 10, NET_PATIENCE)); /* a quarter stays free */
        for (i = 0; i < 4; i++) {
            honest[i] = wire_connect(n.url);
            assert_int_equal(net_ask(honest[i], "Echo", "Add", 1, NULL, NULL), 0);
        }
        assert_int_equal(net_calls(&n.service), 4);
        assert_true(stats(&n).evicted > 0);
        for (i = 0; i < 4; i++)
            close(honest[i]);
        for (i = 0; i < 16; i++)
            close(silent[i]);
        net_close(&n);
    }
}

/* A connection at work is not taken from anybody. */
static void a_connection_with_a_request_is_not_evicted(void **state)
{
    net n;
    int busy[4], other;
    char text[CRPC_ERROR_TEXT_MAX];
    int i;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.max_connections = 3; /* a quarter of it is nothing */
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    for (i = 0; i < 3; i++) {
        wire w = {NULL, 0, 0};
        busy[i] = wire_connect_from(n.url, "127.0.0.2");
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(busy[i], &w));
    }
    assert_true(CT_WAIT(net_held(&n.service) == 3, NET_PATIENCE));
    other = wire_connect(n.url);
    assert_int_equal(net_ask(other, "Echo", "Add", 1, NULL, text), CRPC_ELIMIT);
    assert_int_equal(stats(&n).evicted, 0);
    for (i = 0; i < 3; i++) {
        wire_message reply;
        assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
        assert_int_equal(wire_receive(busy[i], &reply), 1);
        wire_done(&reply);
        close(busy[i]);
    }
    close(other);
    net_close(&n);
}

/* A weight lets a gateway have more connections than a host. */
static void a_gateway_keeps_connections_by_its_weight(void **state)
{
    net n;
    int gateway[6], host[2], i;
    (void)state;
    memset(&n, 0, sizeof n);
    n.server_options.max_connections = 8;
    n.server_options.access.peers = "127.0.0.2:16";
    net_open(&n, CRPC_POLLER_DEFAULT, NET_THREAD);
    for (i = 0; i < 6; i++) {
        gateway[i] = wire_connect_from(n.url, "127.0.0.2");
        assert_int_equal(net_ask(gateway[i], "Echo", "Add", 1, NULL, NULL), 0);
    }
    host[0] = wire_connect(n.url);
    assert_int_equal(net_ask(host[0], "Echo", "Add", 1, NULL, NULL), 0);
    host[1] = wire_connect(n.url); /* over three quarters, and 2/1 is more than 6/16 */
    assert_int_equal(net_ask(host[1], "Echo", "Add", 1, NULL, NULL), CRPC_ELIMIT);
    for (i = 0; i < 6; i++) {
        assert_int_equal(net_ask(gateway[i], "Echo", "Add", 1, NULL, NULL), 0);
        close(gateway[i]);
    }
    close(host[0]);
    close(host[1]);
    net_close(&n);
}

static void collect_peer(void *user, const crpc_peer *who)
{
    char *text = (char *)user;
    snprintf(text + strlen(text), 100, "%s w%u c%u s%u r%u; ", who->name, who->weight,
             who->connections, who->serving, who->replays);
}

static void a_program_can_see_what_each_host_holds(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        char text[400] = "";
        wire w = {NULL, 0, 0};
        net n;
        int one, two;
        memset(&n, 0, sizeof n);
        n.server_options.access.peers = "127.0.0.3:16";
        net_open(&n, p, m);
        assert_int_equal(crpc_server_peers_walk(n.server, collect_peer, text), CRPC_OK);
        assert_string_equal(text, "");
        one = wire_connect_from(n.url, "127.0.0.2");
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(one, &w));
        assert_true(CT_WAIT(net_held(&n.service) == 1, NET_PATIENCE));
        two = wire_connect_from(n.url, "127.0.0.3");
        assert_int_equal(net_ask(two, "Echo", "Add", 1, NULL, NULL), 0);
        assert_int_equal(crpc_server_peers_walk(n.server, collect_peer, text), CRPC_OK);
        assert_non_null(strstr(text, "127.0.0.2 w1 c1 s1 r0; "));
        assert_non_null(strstr(text, "127.0.0.3 w16 c1 s"));
        assert_int_equal(crpc_context_finish(net_take(&n.service), CRPC_OK), CRPC_OK);
        close(one);
        close(two);
        net_close(&n);
    }
}

static void only_allowed_networks_are_accepted(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int fd;
        char c;
        memset(&n, 0, sizeof n);
        n.server_options.access.allow = "127.0.0.2/31,unix";
        net_open(&n, p, m);
        fd = wire_connect_from(n.url, "127.0.0.1");
        assert_true(recv(fd, &c, 1, 0) <= 0);
        close(fd);
        assert_int_equal(stats(&n).refused, 1);
        fd = wire_connect_from(n.url, "127.0.0.3");
        assert_int_equal(net_ask(fd, "Echo", "Add", 1, NULL, NULL), 0);
        close(fd);
        net_close(&n);
    }
}

static void networks_that_are_none_are_refused(void **state)
{
    crpc_server_options o;
    crpc_server *s;
    crpc_error error;
    (void)state;
    memset(&o, 0, sizeof o);
    o.access.allow = "10.0.0.0/8,example.com";
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "allow: \"example.com\""));
    o.access.allow = "10.0.0.0/8";
    o.access.peers = "10.0.0.7:1,10.0.0.8";
    assert_int_equal(crpc_server_open(&s, &o, &error), CRPC_EINVAL);
    assert_non_null(strstr(error.text, "peers: \"10.0.0.8\""));
}

/* Peers send a request and reset the connection before the server accepts it. The handler still
 * sees where the request came from. */
static void a_reset_connection_keeps_its_address(void **state)
{
    crpc_server_options o = CRPC_INIT;
    crpc_server *s;
    net_service service;
    char url[160];
    int i, ran = 0;
    (void)state;
    net_service_init(&service);
    o.loops = net_loop_options(CRPC_POLLER_DEFAULT);
    o.listen = "tcp://127.0.0.1:0";
    assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
    assert_int_equal(crpc_server_add(s, &dyn_Echo, &net_handlers, &service), CRPC_OK);
    assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
    assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
    for (i = 0; i < 20; i++) {
        wire w = {NULL, 0, 0};
        int fd = wire_connect_from(url, "127.0.0.9");
        wire_request(&w, "Defer", 1, 1, 0);
        assert_true(wire_flush(fd, &w));
        wire_reset(fd);
    }
    for (i = 0; i < 200; i++)
        assert_int_equal(crpc_loop_step(crpc_server_loop(s), 0), CRPC_OK);
    for (; net_held(&service); ran++) {
        crpc_context *x = net_take(&service);
        assert_memory_equal(crpc_context_peer(x), "127.0.0.9:", 10);
        assert_int_equal(crpc_context_finish(x, CRPC_OK), CRPC_EGONE);
    }
    (void)ran; /* the kernel may drop what a reset connection had received */
    crpc_server_close(s);
    pthread_mutex_destroy(&service.lock);
}

static void a_connection_without_a_request_is_closed(void **state)
{
    crpc_poller p;
    net_mode m;
    (void)state;
    NET_EACH_POLLER(p) NET_EACH_MODE(m)
    {
        net n;
        int silent, talker;
        char c;
        memset(&n, 0, sizeof n);
        n.server_options.first_request_ms = 100;
        net_open(&n, p, m);
        talker = wire_connect(n.url);
        assert_int_equal(net_ask(talker, "Echo", "Add", 1, NULL, NULL), 0);
        silent = wire_connect(n.url);
        assert_true(recv(silent, &c, 1, 0) <= 0);
        assert_int_equal(stats(&n).closed_silent, 1);
        assert_int_equal(net_ask(talker, "Echo", "Add", 1, NULL, NULL), 0);
        close(silent);
        close(talker);
        net_close(&n);
    }
}

static char accept_line[300];

static void keep_accept_line(void *user, int level, const char *line)
{
    (void)user, (void)level;
    snprintf(accept_line, sizeof accept_line, "%s", line);
}

/* A listener on which accept fails for good, as under a sandbox, stays readable for poll. */
static void a_lasting_error_of_accept_does_not_wake_the_loop(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop_options lo = net_loop_options(p);
        crpc_server_options o = CRPC_INIT;
        crpc_server *s;
        crpci_listener *n;
        int fd = bound_socket(5), i;
        net_time_begin(NET_TIME_STANDS);
        lo.hooks.clock_us = net_clock_us;
        lo.hooks.log = keep_accept_line;
        lo.hooks.log_level = CRPC_LOG_WARN;
        assert_int_equal(crpc_loop_open(&o.loop, &lo), CRPC_OK);
        assert_int_equal(crpc_server_open(&s, &o, NULL), CRPC_OK);
        assert_int_equal(crpc_server_listen_fd(s, fd), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        n = CRPCI_CONTAINER(s->listener.list.next, crpci_listener, link);
        assert_int_equal(shutdown(fd, SHUT_RDWR), 0);
        for (i = 0; i < 8; i++) { /* after pauses of 100, 200, ..., 3200, 5000 ms */
            assert_int_equal(crpc_loop_step(o.loop, 0), CRPC_OK); /* late timers run last */
            assert_int_equal(crpc_loop_step(o.loop, 0), CRPC_OK);
            assert_int_equal(n->watch.item.events, 0);
            net_time_add(i < 6 ? (100u << i) - 10 : 4990);
            assert_int_equal(crpc_loop_step(o.loop, 0), CRPC_OK);
            assert_int_equal(n->watch.item.events, 0);
            net_time_add(11);
        }
        assert_non_null(strstr(accept_line, "server tcp://127.0.0.1:"));
        assert_non_null(strstr(accept_line, ": accept: system error (errno 22); it accepts again"));
        net_time_run();
        crpc_server_close(s);
        crpc_loop_close(o.loop);
    }
}

static int log_lines;

static void count_lines(void *user, int level, const char *line)
{
    (void)user, (void)level;
    if (strstr(line, "too many open files"))
        log_lines++;
}

/* Runs in a process of its own, all of whose descriptors are used up. Returns 0, or the number of
 * the check that failed. */
static int out_of_descriptors(crpc_poller p, const char *listen_url)
{
    crpc_server_options o;
    crpc_server *s;
    crpc_loop *l;
    crpc_loop_options lo;
    crpc_loop_stats before, after;
    net_service service;
    struct rlimit limit;
    char url[160];
    int good, fillers[64], count = 0, client, i;
    pid_t flood;
    int64_t until;
    memset(&o, 0, sizeof o);
    memset(&lo, 0, sizeof lo);
    lo.poller = p;
    lo.hooks.log = count_lines;
    net_service_init(&service);
    if (crpc_loop_open(&l, &lo))
        return 1;
    o.loop = l;
    o.listen = listen_url;
    if (crpc_server_open(&s, &o, NULL) || crpc_server_add(s, &dyn_Echo, &net_handlers, &service) ||
        crpc_server_start(s, NULL) || crpc_server_address(s, 0, url, sizeof url))
        return 2;
    good = wire_connect(url);
    for (i = 0; i < 20; i++) {
        if (crpc_loop_step(l, 1))
            return 3;
    }
    limit.rlim_cur = limit.rlim_max = 40;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        return 4;
    while (count < 64 && (fillers[count] = dup(0)) >= 0)
        count++;
    flood = fork();
    if (flood == 0) {
        int fd;
        for (i = 0; i < count; i++)
            close(fillers[i]);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) { /* as fast as it can */
            struct sockaddr_un a;
            memset(&a, 0, sizeof a);
            a.sun_family = AF_UNIX;
            strcpy(a.sun_path, url + 7);
            fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (connect(fd, (struct sockaddr *)&a, sizeof a))
                sched_yield();
            close(fd);
        }
    }
    ct_sleep_ms(100);
    crpc_loop_stats_get(l, &before);
    for (until = ct_now_ms() + 1000; ct_now_ms() < until;) {
        if (crpc_loop_step(l, 50))
            return 5;
    }
    crpc_loop_stats_get(l, &after);
    if (after.waits - before.waits > 300) /* a spin would be a hundred thousand */
        return 6;
    if (log_lines < 1 || log_lines > 3)
        return 7;
    { /* connected peers are still served */
        wire w = {NULL, 0, 0};
        wire_request(&w, "Add", 1, 1, 0);
        wire_flush(good, &w);
        for (until = ct_now_ms() + 5000; service.calls < 1 && ct_now_ms() < until;) {
            if (crpc_loop_step(l, 10))
                return 8;
        }
        if (service.calls != 1)
            return 9;
    }
    kill(flood, SIGKILL);
    waitpid(flood, NULL, 0);
    for (i = 0; i < count; i++)
        close(fillers[i]);
    for (until = ct_now_ms() + 1000;
         ct_now_ms() < until;) { /* connections whose peers gave up are cleared away */
        if (crpc_loop_step(l, 10))
            return 12;
    }
    client = wire_connect(url); /* with free descriptors new peers are served */
    {
        wire w = {NULL, 0, 0};
        wire_request(&w, "Add", 1, 1, 0);
        wire_flush(client, &w);
        for (until = ct_now_ms() + 10000; service.calls < 2 && ct_now_ms() < until;) {
            if (crpc_loop_step(l, 10))
                return 10;
        }
        if (service.calls != 2)
            return 11;
    }
    return 0;
}

static void running_out_of_descriptors_does_not_spin(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        int status;
        ct_dir dir = ct_dir_make();
        char listen_url[100];
        pid_t child;
        snprintf(listen_url, sizeof listen_url, "unix://%s/socket", dir.path);
        child = fork();
        assert_true(child >= 0);
        if (child == 0)
            _exit(out_of_descriptors(p, listen_url));
        waitpid(child, &status, 0);
        ct_dir_remove(dir);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(several_listeners_of_a_server),
        CT_TEST(an_inherited_descriptor_must_listen),
        CT_TEST(a_socket_file_goes_with_its_server),
        CT_TEST(addresses_that_are_not_available_are_explained),
        CT_TEST(a_url_that_no_listener_can_have_is_explained),
        CT_TEST(a_socket_file_in_use_is_left_alone),
        CT_TEST(a_stale_socket_file_is_replaced),
        CT_TEST(requests_over_the_limit_of_connections_are_refused),
        CT_TEST(a_silent_host_does_not_shut_others_out),
        CT_TEST(a_connection_with_a_request_is_not_evicted),
        CT_TEST(a_gateway_keeps_connections_by_its_weight),
        CT_TEST(a_program_can_see_what_each_host_holds),
        CT_TEST(only_allowed_networks_are_accepted),
        CT_TEST(networks_that_are_none_are_refused),
        CT_TEST(a_reset_connection_keeps_its_address),
        CT_TEST(a_connection_without_a_request_is_closed),
        CT_TEST(a_lasting_error_of_accept_does_not_wake_the_loop),
        CT_TEST(running_out_of_descriptors_does_not_spin),
    };
    return CT_RUN(tests);
}
