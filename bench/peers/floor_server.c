/* floor_server: the least that a server of requests and replies can do. A message is its size, four
 * bytes in the machine's order, and that many bytes; it is sent back as it came. One epoll_wait, one
 * recv and one send serve all the requests that have arrived on a connection.
 *
 *   floor_server [unbatched]      with "unbatched" a send for each reply */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

typedef struct conn {
    int fd;
    char *buffer;
    size_t size, filled;
} conn;

static bool unbatched;
static conn spare; /* its buffer serves whichever connection has something to read */

static bool send_all(int fd, const char *bytes, size_t size)
{
    while (size > 0) { /* the peer always reads, so this may block */
        ssize_t n = send(fd, bytes, size, MSG_NOSIGNAL);
        if (n < 0) {
            return false;
        }
        bytes += n;
        size -= (size_t)n;
    }
    return true;
}

static size_t message_size(const conn *c, size_t at)
{
    uint32_t size;
    if (c->filled - at < 4) {
        return 0;
    }
    memcpy(&size, c->buffer + at, 4);
    return 4 + (size_t)size;
}

static void reserve(conn *c, size_t size)
{
    if (size > c->size) {
        c->size = size;
        c->buffer = realloc(c->buffer, size);
    }
}

/* Sends back what is complete and moves what is not to the front. */
static bool send_replies(conn *c)
{
    size_t at = 0, next;
    for (; (next = message_size(c, at)) > 0 && next <= c->filled - at; at += next) {
        if (unbatched && !send_all(c->fd, c->buffer + at, next)) {
            return false;
        }
    }
    if (at > 0 && !unbatched && !send_all(c->fd, c->buffer, at)) {
        return false;
    }
    if (at > 0) {
        memmove(c->buffer, c->buffer + at, c->filled - at);
        c->filled -= at;
    }
    reserve(c, next);
    return true;
}

static void swap_buffer(conn *c)
{
    conn old = spare;
    spare.buffer = c->buffer;
    spare.size = c->size;
    c->buffer = old.buffer;
    c->size = old.size;
}

static bool serve(conn *c)
{
    if (c->filled == 0) {
        swap_buffer(c);
    }
    reserve(c, 65536);
    ssize_t n = recv(c->fd, c->buffer + c->filled, c->size - c->filled, 0);
    c->filled += n > 0 ? (size_t)n : 0;
    bool alive = n > 0 && send_replies(c);
    if (c->filled == 0) {
        swap_buffer(c);
    }
    return alive;
}

static int listen_anywhere(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(fd, (struct sockaddr *)&address, size) != 0 || listen(fd, 4096) != 0) {
        perror("floor_server");
        exit(1);
    }
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static conn *accept_one(int listener)
{
    conn *c = calloc(1, sizeof *c);
    int one = 1;
    c->fd = accept(listener, NULL, NULL);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return c;
}

int main(int argc, char **argv)
{
    struct epoll_event events[64], want = {.events = EPOLLIN};
    int listener = listen_anywhere(), poller = epoll_create1(0);
    unbatched = argc > 1 && strcmp(argv[1], "unbatched") == 0;
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &want); /* data.ptr is NULL */
    for (;;) {
        int n = epoll_wait(poller, events, 64, -1);
        for (int i = 0; i < n; i++) {
            conn *c = events[i].data.ptr;
            if (!c) {
                c = accept_one(listener);
                want.data.ptr = c;
                epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &want);
            } else if (!serve(c)) {
                close(c->fd);
                free(c->buffer);
                free(c);
            }
        }
    }
}
