/* Messages out of a connection: cut anywhere, too many, too large, malformed. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_pump.h"

static void three_requests_split_anywhere(void **state)
{
    crpc_poller p;
    way w;
    (void)state;
    NET_EACH_POLLER(p) for (w = WAY_TCP; w < WAYS; w = (way)(w + 1))
    {
        wire stream = three_requests();
        pump u;
        size_t at;
        int fd;
        pump_open(&u, p, w, NULL);
        fd = pump_connect(&u, w);
        for (at = 0; at <= stream.n; at++) { /* at either end: in one write */
            u.service.calls = 0;
            pump_send(&u, fd, stream.p, at);
            pump_send(&u, fd, stream.p + at, stream.n - at);
            PUMP_UNTIL(&u, u.service.calls == 3);
            assert_int_equal(u.service.order[0], 1);
            assert_int_equal(u.service.order[1], 300);
            assert_int_equal(u.service.order[2], 70000);
            expect_reply(fd, 101, 2);
            expect_reply(fd, 0, 301);
            expect_reply(fd, -7, 70001);
        }
        assert_int_equal(pump_stats(&u).requests, 3 * (stream.n + 1));
        close(fd);
        wire_free(&stream);
        pump_close(&u);
    }
}

static void byte_after_byte(void **state)
{
    crpc_poller p;
    way w;
    (void)state;
    NET_EACH_POLLER(p) for (w = WAY_TCP; w < WAYS; w = (way)(w + 1))
    {
        wire stream = three_requests();
        pump u;
        size_t at;
        int fd;
        pump_open(&u, p, w, NULL);
        fd = pump_connect(&u, w);
        for (at = 0; at < stream.n; at++) {
            assert_true(u.service.calls < 3);
            pump_send(&u, fd, stream.p + at, 1);
        }
        PUMP_UNTIL(&u, u.service.calls == 3);
        expect_reply(fd, 101, 2);
        expect_reply(fd, 0, 301);
        expect_reply(fd, -7, 70001);
        close(fd);
        wire_free(&stream);
        pump_close(&u);
    }
}

/* A request with a large attachment, cut into three at random places. */
static void large_frames_in_pieces(void **state)
{
    static const size_t sizes[] = {65400, 65536, 70000, 1 << 20, 5 << 20};
    crpc_poller p;
    size_t i;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pump u;
        int fd, flags;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, WAY_TCP);
        flags = fcntl(fd, F_GETFL);
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            char *bytes = net_bytes(sizes[i]);
            wire_request_options o;
            wire w = {NULL, 0, 0};
            size_t sent = 0, got = 0, size = sizes[i] + 4096;
            unsigned char *back = (unsigned char *)malloc(size);
            uint32_t body = 0;
            memset(&o, 0, sizeof o);
            o.attachment = (int64_t)sizes[i];
            wire_request_body(&w, "dyn.Echo", "Pass", 9, bytes, sizes[i], &o);
            while (!body || got < body + 12u) {
                ssize_t n;
                if (sent < w.n) {
                    size_t piece = 1 + (size_t)(ct_random() % 200000);
                    n = send(fd, w.p + sent, piece < w.n - sent ? piece : w.n - sent, MSG_NOSIGNAL);
                    assert_true(n >= 0 || errno == EAGAIN);
                    sent += n > 0 ? (size_t)n : 0;
                }
                assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
                n = recv(fd, back + got, size - got, 0);
                assert_true(n > 0 || (n < 0 && errno == EAGAIN));
                got += n > 0 ? (size_t)n : 0;
                if (got >= 12)
                    body = (uint32_t)back[4] << 24 | (uint32_t)back[5] << 16 |
                           (uint32_t)back[6] << 8 | back[7];
            }
            assert_int_equal(got, body + 12u);
            assert_memory_equal(back + got - sizes[i], bytes, sizes[i]);
            free(back);
            free(bytes);
            wire_free(&w);
        }
        close(fd);
        pump_close(&u);
    }
}

/* More frames than a step handles, all of them in the buffer before the first is served: they are
 * served although the socket never becomes readable again. */
static void frames_over_the_budget_are_served(void **state)
{
    crpc_poller p;
    way w;
    (void)state;
    NET_EACH_POLLER(p) for (w = WAY_TCP; w < WAYS; w = (way)(w + 1))
    {
        pump u;
        wire all = {NULL, 0, 0};
        int fd, i;
        pump_open(&u, p, w, NULL);
        fd = pump_connect(&u, w);
        for (i = 0; i < 1000; i++)
            wire_request(&all, "Add", i, i, 0);
        assert_true(all.n < 60000); /* one receive */
        assert_true(wire_send(fd, all.p, all.n));
        PUMP_UNTIL(&u, u.service.calls == 1000);
        for (i = 0; i < 1000; i++) {
            assert_int_equal(u.service.order[i], i);
            expect_reply(fd, i, i + 1);
        }
        close(fd);
        wire_free(&all);
        pump_close(&u);
    }
}

/* One connection that floods does not keep a step from serving the others. */
static void a_flooder_starves_nobody(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pump u;
        wire flood = {NULL, 0, 0}, one = {NULL, 0, 0};
        int fd, quiet, i, steps, before;
        size_t sent = 0;
        pump_open(&u, p, WAY_PAIR, NULL);
        fd = pump_connect(&u, WAY_PAIR);
        quiet = pump_connect(&u, WAY_PAIR);
        for (i = 0; i < 3000; i++)
            wire_request(&flood, "Add", i, 1, 0);
        while (sent < flood.n) { /* as much as the kernel holds */
            ssize_t n = send(fd, flood.p + sent, flood.n - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (n < 0)
                break;
            sent += (size_t)n;
        }
        wire_request(&one, "Add", 1, 1000000, 0);
        assert_true(wire_flush(quiet, &one));
        for (steps = 0; steps < 1000; steps++) { /* handlers run for a millisecond in each */
            char c;
            if (recv(quiet, &c, 1, MSG_PEEK | MSG_DONTWAIT) == 1)
                break;
            assert_int_equal(crpc_loop_step(u.loop, 0), CRPC_OK);
        }
        before = u.service.calls;
        assert_true(steps < 1000);
        assert_true(before <= 3 * CRPCI_CONN_FRAMES);
        close(fd);
        close(quiet);
        wire_free(&flood);
        pump_close(&u);
    }
}

/* --- what is refused ---------------------------------------------------------------------------
 */

static void oversize_requests_get_an_answer(void **state)
{
    crpc_poller p;
    way w;
    (void)state;
    NET_EACH_POLLER(p) for (w = WAY_TCP; w < WAYS; w = (way)(w + 1))
    {
        crpc_server_options o;
        pump u;
        wire fits = {NULL, 0, 0}, over = {NULL, 0, 0}, next = {NULL, 0, 0};
        wire_request_options ro;
        wire_message m;
        char *bytes = net_bytes(20000), says[100];
        size_t meta, at;
        int fd;
        memset(&o, 0, sizeof o);
        memset(&ro, 0, sizeof ro);
        o.limits.max_body = 10000;
        pump_open(&u, p, w, &o);
        fd = pump_connect(&u, w);
        /* exactly the limit, and one byte more */
        ro.attachment = 1000;
        wire_request_body(&fits, "dyn.Echo", "Pass", 1, bytes, 1000, &ro);
        meta = fits.n - 12 - 1000;
        fits.n = 0;
        ro.attachment = (int64_t)(10000 - meta);
        wire_request_body(&fits, "dyn.Echo", "Pass", 1, bytes, 10000 - meta, &ro);
        assert_int_equal(fits.n, 10012);
        ro.attachment = (int64_t)(10001 - meta);
        wire_request_body(&over, "dyn.Echo", "Pass", 2, bytes, 10001 - meta, &ro);
        assert_int_equal(over.n, 10013);
        wire_request(&next, "Add", 3, 3, 0);
        pump_send(&u, fd, fits.p, fits.n);
        PUMP_UNTIL(&u, recv(fd, &m, 1, MSG_PEEK | MSG_DONTWAIT) == 1);
        assert_int_equal(wire_receive(fd, &m), 1);
        assert_int_equal(m.code, 0);
        assert_int_equal(m.attachment_size, 10000 - meta);
        wire_done(&m);
        for (at = 1; at < over.n; at += at < 150 ? 1 : 997) {
            pump_send(&u, fd, over.p, at);
            pump_send(&u, fd, over.p + at, over.n - at);
            pump_send(&u, fd, next.p, next.n);
            PUMP_UNTIL(&u, recv(fd, &m, 1, MSG_PEEK | MSG_DONTWAIT) == 1);
            assert_int_equal(wire_receive(fd, &m), 1);
            assert_int_equal(m.id, 2);
            assert_int_equal(m.code, CRPC_EREQUEST);
            snprintf(says, sizeof says, "request of 10001 bytes is over max_body, 10000");
            assert_string_equal(m.text, says);
            wire_done(&m);
            PUMP_UNTIL(&u, recv(fd, &m, 1, MSG_PEEK | MSG_DONTWAIT) == 1);
            expect_reply(fd, 3, 4);
        }
        assert_int_equal(pump_stats(&u).bad_frames, 0);
        free(bytes);
        wire_free(&fits);
        wire_free(&over);
        wire_free(&next);
        close(fd);
        pump_close(&u);
    }
}

static void absurd_sizes_close_and_allocate_nothing(void **state)
{
    static const unsigned char absurd[][12] = {
        {'P', 'R', 'P', 'C', 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 10},
        {'P', 'R', 'P', 'C', 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
        {'P', 'R', 'P', 'C', 0x20, 0, 0, 0, 0, 0, 0, 10},   /* 512 MiB: over max_skip */
        {'P', 'R', 'P', 'C', 0x08, 0, 0, 0, 0x01, 0, 0, 0}, /* 128 MiB with a meta of 16 MiB */
    };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pump u;
        size_t i;
        pump_open(&u, p, WAY_TCP, NULL);
        for (i = 0; i < sizeof absurd / sizeof *absurd; i++) {
            int fd = pump_connect(&u, WAY_TCP);
            uint64_t peak;
            pump_send(&u, fd, absurd[i], 11); /* the buffers that any frame needs */
            peak = pump_stats(&u).memory_peak;
            assert_int_equal(pump_stats(&u).connections, 1);
            pump_send(&u, fd, absurd[i] + 11, 1);
            expect_end(&u, fd);
            assert_int_equal(pump_stats(&u).bad_frames, i + 1);
            assert_true(pump_stats(&u).memory_peak <= peak);
            close(fd);
        }
        pump_close(&u);
    }
}

/* A size that is allowed takes no memory for what has not come. */
static void announced_bytes_take_no_memory(void **state)
{
    enum { PIECE = 20000 };
    static const unsigned char large[] = {'P', 'R', 'P', 'C', 0x03, 0, 0, 0, 0, 0, 0, 10};
    static const char piece[PIECE];
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        size_t sent = sizeof large;
        crpci_conn *c;
        pump u;
        int fd;
        pump_open(&u, p, WAY_TCP, NULL);
        fd = pump_connect(&u, WAY_TCP);
        c = CRPCI_CONTAINER(u.loop->conns.next, crpci_conn, link);
        pump_send(&u, fd, large, sizeof large);
        for (;;) {
            PUMP_UNTIL(&u, c->rx_len == sent);
            /* twice what has come, and the buffer that any receive needs */
            assert_true(u.loop->heap->chunk_bytes <= 2 * (sent + 2048) + 65536);
            if (sent > 3 << 20)
                break;
            assert_true(wire_send(fd, piece, PIECE));
            sent += PIECE;
        }
        close(fd);
        PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
        pump_close(&u);
    }
}

/* --- large messages share a pot --------------------------------------------------------------- */

#define POT_BYTES (8 << 20) /* max_bytes: half of it is the pot, a quarter the most of one host */
#define MOST      (POT_BYTES / 4 - 1000)

static char line_of_pots[600];

static void keep_line_of_pots(void *user, int level, const char *line)
{
    (void)user, (void)level;
    snprintf(line_of_pots, sizeof line_of_pots, "%s", line);
}

static void pot_open(pump *u, crpc_poller p)
{
    crpc_server_options o;
    memset(&o, 0, sizeof o);
    o.loops.max_bytes = POT_BYTES;
    o.loops.hooks.clock_us = net_clock_us;
    o.loops.hooks.log = keep_line_of_pots;
    o.frame_timeout_ms = -1;
    net_time_begin(NET_TIME_STANDS);
    line_of_pots[0] = '\0';
    pump_open(u, p, WAY_TCP, &o);
}

static void pot_close(pump *u)
{
    net_time_run();
    PUMP_UNTIL(u, pump_stats(u).connections == 0);
    assert_int_equal(u->loop->heap->large_bytes, 0);
    assert_null(u->loop->heap->places);
    assert_int_equal(u->loop->unsent, 0);
    pump_close(u);
}

/* A request for the attachment that it brings. */
static wire pass_of(int64_t id, size_t size)
{
    char *bytes = net_bytes(size);
    wire_request_options o;
    wire w = {NULL, 0, 0};
    memset(&o, 0, sizeof o);
    o.attachment = (int64_t)size;
    wire_request_body(&w, "dyn.Echo", "Pass", id, bytes, size, &o);
    free(bytes);
    return w;
}

static void expect_pass(pump *u, int fd, int64_t id)
{
    wire_message m;
    pump_receive(u, fd, &m);
    assert_int_equal(m.id, id);
    assert_int_equal(m.code, 0);
    wire_done(&m);
}

/* All but the last byte of bodies that together would fill max_bytes. */
static void a_host_cannot_take_the_memory_for_requests_of_others(void **state)
{
    enum { GREEDY = 6 };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire body = pass_of(1, 1536 << 10), large = pass_of(2, MOST), small = pass_of(3, 9);
        int greedy[GREEDY], honest, i;
        crpci_conn *c;
        pump u;
        pot_open(&u, p);
        for (i = 0; i < GREEDY; i++) {
            greedy[i] = pump_connect_from(&u, "127.0.0.2", &c);
            pump_push(&u, greedy[i], body.p, body.n - 1);
        }
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        assert_int_equal(pump_push(&u, honest, large.p, large.n), large.n);
        expect_pass(&u, honest, 2);
        assert_int_equal(pump_push(&u, honest, small.p, small.n), small.n);
        expect_pass(&u, honest, 3);
        assert_int_equal(pump_stats(&u).evicted, 0);
        for (i = 0; i < GREEDY; i++)
            close(greedy[i]);
        close(honest);
        wire_free(&body);
        wire_free(&large);
        wire_free(&small);
        pot_close(&u);
    }
}

/* The request is skipped, and the connection is served on. */
static void a_large_request_without_a_place_is_refused_after_a_second(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire body = pass_of(1, 1536 << 10), small = pass_of(3, 9);
        int first, second;
        crpci_conn *c, *waiting;
        wire_message m;
        size_t sent;
        pump u;
        pot_open(&u, p);
        first = pump_connect_from(&u, "127.0.0.2", &c);
        assert_int_equal(pump_push(&u, first, body.p, body.n - 1), body.n - 1);
        PUMP_UNTIL(&u, c->rx_len == body.n - 1);
        second = pump_connect_from(&u, "127.0.0.2", &waiting);
        sent = pump_push(&u, second, body.p, body.n);
        assert_false(crpci_list_empty(&waiting->admission));
        assert_true(waiting->paused && waiting->rx_len < 70000);
        net_time_add(999);
        pump_step(&u);
        pump_step(&u);
        assert_false(crpci_list_empty(&waiting->admission));
        net_time_add(CRPCI_RECEIVE_RETRY / 1000 + 2);
        pump_receive(&u, second, &m);
        assert_int_equal(m.id, 1);
        assert_int_equal(m.code, CRPC_ELIMIT);
        assert_string_equal(m.text,
                            "no memory for a large request became free in time (max_bytes)");
        wire_done(&m);
        assert_int_equal(sent + pump_push(&u, second, body.p + sent, body.n - sent), body.n);
        assert_int_equal(pump_push(&u, second, small.p, small.n), small.n);
        expect_pass(&u, second, 3);
        assert_int_equal(pump_push(&u, first, body.p + body.n - 1, 1), 1);
        expect_pass(&u, first, 1); /* what was admitted was not touched */
        close(first);
        close(second);
        wire_free(&body);
        wire_free(&small);
        pot_close(&u);
    }
}

/* Also when another one that waited has gone. */
static void a_large_request_that_waits_gets_the_place_that_becomes_free(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire body = pass_of(1, 1536 << 10);
        int first, second, third, i;
        crpci_conn *c;
        size_t sent;
        pump u;
        pot_open(&u, p);
        first = pump_connect_from(&u, "127.0.0.2", &c);
        pump_push(&u, first, body.p, body.n - 1);
        second = pump_connect_from(&u, "127.0.0.2", &c);
        pump_push(&u, second, body.p, body.n);
        third = pump_connect_from(&u, "127.0.0.2", &c);
        sent = pump_push(&u, third, body.p, body.n);
        assert_false(crpci_list_empty(&c->admission));
        wire_reset(second); /* which waits, too */
        wire_reset(first);
        for (i = 0; i < 40 && !crpci_list_empty(&c->admission); i++) {
            net_time_add(20);
            pump_step(&u);
        }
        assert_int_equal(sent + pump_push(&u, third, body.p + sent, body.n - sent), body.n);
        expect_pass(&u, third, 1);
        close(third);
        wire_free(&body);
        pot_close(&u);
    }
}

/* Two hosts have announced as much as the pot holds, and send no more. */
static void a_large_request_that_stalls_goes_when_another_waits(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        wire body = pass_of(1, MOST);
        int stalled[2], honest, i;
        crpci_conn *c;
        size_t sent;
        pump u;
        pot_open(&u, p);
        for (i = 0; i < 2; i++) {
            stalled[i] = pump_connect_from(&u, i ? "127.0.0.3" : "127.0.0.2", &c);
            assert_int_equal(pump_push(&u, stalled[i], body.p, 66000), 66000);
            PUMP_UNTIL(&u, c->rx_len == 66000);
        }
        net_time_add(20000); /* nobody waits: no harm */
        pump_step(&u);
        assert_int_equal(pump_stats(&u).connections, 2);
        honest = pump_connect_from(&u, "127.0.0.1", &c);
        sent = pump_push(&u, honest, body.p, body.n);
        assert_false(crpci_list_empty(&c->admission));
        net_time_add(CRPCI_RECEIVE_RETRY / 1000 + 2);
        PUMP_UNTIL(&u, crpci_list_empty(&c->admission));
        assert_int_equal(sent + pump_push(&u, honest, body.p + sent, body.n - sent), body.n);
        expect_pass(&u, honest, 1);
        assert_int_equal(pump_stats(&u).evicted, 2);
        assert_non_null(strstr(line_of_pots, "connection from 127.0.0."));
        assert_non_null(strstr(line_of_pots, " closed: its large request comes too slowly while "
                                             "others wait for memory"));
        for (i = 0; i < 2; i++)
            close(stalled[i]);
        close(honest);
        wire_free(&body);
        pot_close(&u);
    }
}

static void rubbish_closes(void **state)
{
    static const struct {
        const char *bytes;
        size_t size;
    } rubbish[] = {
        {"GET / HTTP/1.1\r\n\r\n", 18},
        {"X", 1},
        {"PRPX", 4},
        {"PRX", 3},
        {"\0\0\0\0", 4},
        {"PPRPC", 5},
        {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 24},
        {"PRPC\0\0\0\4\0\0\0\5", 12},                 /* the meta larger than the body */
        {"PRPC\0\0\0\4\0\0\0\4\x0a\xff\xff\xff", 16}, /* a length that is cut off */
        {"PRPC\0\0\0\4\0\0\0\4\x0a\x7f\x0a\x01", 16}, /* longer than the meta */
        {"PRPC\0\0\0\2\0\0\0\2\x0a\0", 14},           /* a request without its names */
        {"PRPC\0\0\0\2\0\0\0\2\x0b\0", 14},           /* a group */
        {"PRPC\0\0\0\2\0\0\0\2\0\0", 14},             /* field number 0 */
    };
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        pump u;
        size_t i;
        int after;
        pump_open(&u, p, WAY_TCP, NULL);
        for (i = 0; i < sizeof rubbish / sizeof *rubbish; i++) {
            for (after = 0; after < 2; after++) { /* at once, and behind a good request */
                int fd = pump_connect(&u, WAY_TCP);
                if (after) {
                    wire w = {NULL, 0, 0};
                    wire_request(&w, "Add", 1, 1, 0);
                    wire_put(&w, rubbish[i].bytes, rubbish[i].size);
                    assert_true(wire_flush(fd, &w));
                } else {
                    assert_true(wire_send(fd, rubbish[i].bytes, rubbish[i].size));
                }
                expect_end(&u, fd);
                assert_int_equal(pump_stats(&u).bad_frames, 2 * i + (size_t)after + 1);
                close(fd);
            }
        }
        /* no byte of it may be an answer: nobody knows whom it would be for */
        {
            int fd = pump_connect(&u, WAY_TCP);
            char c;
            assert_true(wire_send(fd, rubbish[9].bytes, rubbish[9].size));
            PUMP_UNTIL(&u, pump_stats(&u).connections == 0);
            assert_true(recv(fd, &c, 1, 0) <= 0);
            close(fd);
        }
        pump_close(&u);
    }
}

/* The same from a server: the call fails, with its connection. */
static bool peer_talks_rubbish(peer *p, int fd, int number)
{
    static const char *const rubbish[] = {"HTTP/1.1 400 Bad Request\r\n\r\n", "PRPX",
                                          "\x15\x03\x01\x00\x02\x02\x16"};
    wire_message m;
    if (peer_receive(p, fd, &m) != 1)
        return true;
    wire_done(&m);
    wire_send(fd, rubbish[number % 3], strlen(rubbish[number % 3]));
    return peer_silent(p, fd, number);
}

static void rubbish_from_a_server_fails_the_call(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer rubbish;
        crpc_channel *ch;
        crpc_loop_stats stats;
        int i;
        peer_open(&rubbish, peer_talks_rubbish, NULL);
        ch = net_channel(rubbish.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 3; i++) {
            dyn_Num in = net_num(1), out = dyn_Num_init_zero;
            crpc_call call = CRPC_INIT;
            assert_int_equal(dyn_Echo_Add(ch, &in, &out, &call), CRPC_ECONN);
            assert_int_equal(call.error.sent, CRPC_SENT_YES);
            assert_non_null(strstr(call.error.text, "connection lost: bad response (local)"));
            crpc_call_reset(&call);
        }
        crpc_loop_stats_get(crpc_channel_loop(ch), &stats);
        assert_int_equal(stats.bad_frames, 3);
        crpc_channel_close(ch);
        peer_close(&rubbish);
    }
}

/* --- the client's side of the same --------------------------------------------------------------
 */

/* Replies cut at a place that moves on with each, two of them at a time. */
static bool peer_cuts(peer *p, int fd, int number)
{
    wire_message m;
    size_t cut = 0;
    (void)number;
    while (peer_receive(p, fd, &m) == 1) {
        wire w = {NULL, 0, 0};
        wire_reply(&w, -1, 666);
        wire_reply(&w, m.id, m.n + 1);
        wire_done(&m);
        cut = (cut + 1) % w.n;
        wire_send(fd, w.p, cut);
        sched_yield();
        wire_send(fd, w.p + cut, w.n - cut);
        wire_free(&w);
    }
    return true;
}

static void replies_split_anywhere(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        peer cuts;
        crpc_channel *ch;
        int i;
        peer_open(&cuts, peer_cuts, NULL);
        ch = net_channel(cuts.url, "?timeout_ms=20000", p, NULL, NULL);
        for (i = 0; i < 300; i++)
            net_check_add(ch, i);
        assert_int_equal(peer_accepted(&cuts), 1);
        crpc_channel_close(ch);
        peer_close(&cuts);
    }
}

typedef struct lines {
    crpc_loop *loop;
    int count, locked;
    char last[600];
} lines;

static void keep_line(void *user, int level, const char *line)
{
    lines *k = (lines *)user;
    (void)level;
    k->count++;
    k->locked += crpci_thread_holds(&k->loop->lock);
    snprintf(k->last, sizeof k->last, "%s", line);
}

/* Anybody can send rubbish at any rate. */
static void lines_that_a_peer_causes_are_few_and_written_without_the_lock(void **state)
{
    crpc_poller p;
    (void)state;
    NET_EACH_POLLER(p)
    {
        crpc_loop_options o = net_loop_options(p);
        crpc_server_options so;
        crpc_server *s;
        lines k;
        char url[160], expected[600], client[CRPC_ADDRESS_MAX];
        crpci_addr own;
        int fd = -1, i;
        memset(&so, 0, sizeof so);
        memset(&k, 0, sizeof k);
        net_time_begin(NET_TIME_STANDS);
        o.hooks.clock_us = net_clock_us;
        o.hooks.resize = NULL;
        o.hooks.user = &k;
        o.hooks.log = keep_line;
        o.hooks.log_level = CRPC_LOG_WARN;
        assert_int_equal(crpc_loop_open(&k.loop, &o), CRPC_OK);
        so.loop = k.loop;
        so.listen = "tcp://127.0.0.1:0";
        assert_int_equal(crpc_server_open(&s, &so, NULL), CRPC_OK);
        assert_int_equal(crpc_server_start(s, NULL), CRPC_OK);
        assert_int_equal(crpc_server_address(s, 0, url, sizeof url), CRPC_OK);
        for (i = 1; i <= 22; i++) {
            if (i == 22)
                net_time_add(1000);
            fd = wire_connect(url);
            crpci_sock_local(fd, &own);
            assert_true(wire_send(fd, "rubbish", 7));
            while (k.loop->stats.bad_frames < (uint64_t)i)
                assert_int_equal(crpc_loop_step(k.loop, 10), CRPC_OK);
            assert_int_equal(k.count, i < 22 ? 1 : 2);
            close(fd);
        }
        crpci_sock_format(&own, client, sizeof client);
        snprintf(expected, sizeof expected,
                 "server %s: connection from %s closed: the peer speaks none of the protocols of "
                 "this server; 20 lines like it were left out before",
                 url + 6, client);
        assert_string_equal(k.last, expected);
        assert_int_equal(k.locked, 0);
        net_time_run();
        crpc_server_close(s);
        crpc_loop_close(k.loop);
    }
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(lines_that_a_peer_causes_are_few_and_written_without_the_lock),
        CT_TEST(three_requests_split_anywhere),
        CT_TEST(byte_after_byte),
        CT_TEST(large_frames_in_pieces),
        CT_TEST(frames_over_the_budget_are_served),
        CT_TEST(a_flooder_starves_nobody),
        CT_TEST(oversize_requests_get_an_answer),
        CT_TEST(absurd_sizes_close_and_allocate_nothing),
        CT_TEST(announced_bytes_take_no_memory),
        CT_TEST(a_host_cannot_take_the_memory_for_requests_of_others),
        CT_TEST(a_large_request_without_a_place_is_refused_after_a_second),
        CT_TEST(a_large_request_that_waits_gets_the_place_that_becomes_free),
        CT_TEST(a_large_request_that_stalls_goes_when_another_waits),
        CT_TEST(rubbish_closes),
        CT_TEST(rubbish_from_a_server_fails_the_call),
        CT_TEST(replies_split_anywhere),
    };
    return CT_RUN(tests);
}
