/* A real ZooKeeper server for tests, a proxy in front of it that can fail in several ways, and a
 * small client of its own, so that what crpc wrote is looked at by other eyes than crpc's. Include
 * after crpc_test.h. Everything ends with the test program, however that ends.
 *
 * Needs Debian's zookeeper package (java and the jars in /usr/share/java). */
#ifndef CRPC_ZK_H_INCLUDED
#define CRPC_ZK_H_INCLUDED

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* --- processes ---------------------------------------------------------------------------------- */

/* Starts a program that dies with this one. Its output goes to `log` (NULL: stays), its input comes
 * from the returned *input if that is not NULL. */
CT_FN pid_t zk_spawn(char *const argv[], const char *log, int *input)
{
    pid_t parent = getpid(), pid;
    int in[2] = {-1, -1};
    if (input && pipe2(in, O_CLOEXEC))
        fail_msg("pipe failed");
    fflush(stdout);
    fflush(stderr);
    pid = fork();
    if (pid == 0) {
        int fd;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(126);
        if (input)
            dup2(in[0], 0);
        if (log) {
            fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
            dup2(fd, 1);
            dup2(fd, 2);
        }
        for (fd = 3; fd < 1024; fd++) /* the ZooKeeper client's sockets among them */
            close(fd);
        execv(argv[0], argv);
        _exit(127);
    }
    if (pid < 0)
        fail_msg("fork failed");
    if (input) {
        close(in[0]);
        *input = in[1];
    }
    return pid;
}

CT_FN void zk_kill(pid_t pid, int signo)
{
    int status;
    if (pid <= 0)
        return;
    kill(pid, signo);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
}

/* --- the server --------------------------------------------------------------------------------- */

typedef struct zk_server {
    ct_dir dir;
    int port;
    pid_t pid;
} zk_server;

CT_FN int zk_dial(int port)
{
    struct sockaddr_in a;
    struct timeval tv;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)port);
    tv.tv_sec = 5;
    tv.tv_usec = 0;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0)
        return fd;
    close(fd);
    return -1;
}

/* Asks a four-letter word; the length of the answer. */
CT_FN size_t zk_ask(const zk_server *s, const char *word, char *out, size_t size)
{
    int fd = zk_dial(s->port);
    size_t n = 0;
    ssize_t got;
    out[0] = '\0';
    if (fd < 0)
        return 0;
    if (send(fd, word, strlen(word), MSG_NOSIGNAL) > 0) {
        while (n + 1 < size && (got = recv(fd, out + n, size - 1 - n, 0)) > 0)
            n += (size_t)got;
    }
    out[n] = '\0';
    close(fd);
    return n;
}

CT_FN bool zk_is_ready(const zk_server *s)
{
    char text[2048];
    zk_ask(s, "srvr", text, sizeof text);
    return strstr(text, "Mode:") != NULL;
}

/* Starts it again on its port, with what is in its directory, and waits until it serves. */
CT_FN void zk_launch(zk_server *s)
{
    char cfg[128], log[128];
    char *argv[] = {(char *)"/usr/bin/java",
                    (char *)"-Xmx64m",
                    (char *)"-XX:+UseSerialGC",
                    (char *)"-XX:TieredStopAtLevel=1",
                    (char *)"-cp",
                    (char *)"/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar",
                    (char *)"org.apache.zookeeper.server.quorum.QuorumPeerMain",
                    cfg,
                    NULL};
    snprintf(cfg, sizeof cfg, "%s/zoo.cfg", s->dir.path);
    snprintf(log, sizeof log, "%s/log", s->dir.path);
    s->pid = zk_spawn(argv, log, NULL);
    if (!CT_WAIT(zk_is_ready(s), 20000))
        fail_msg("ZooKeeper does not start: see %s", log);
}

CT_FN void zk_start(zk_server *s)
{
    char path[128];
    FILE *f;
    memset(s, 0, sizeof *s);
    s->dir = ct_dir_make();
    s->port = ct_free_port();
    snprintf(path, sizeof path, "%s/zoo.cfg", s->dir.path);
    f = fopen(path, "w");
    assert_non_null(f);
    fprintf(f,
            "tickTime=200\ndataDir=%s/data\nclientPort=%d\nclientPortAddress=127.0.0.1\n"
            "admin.enableServer=false\n4lw.commands.whitelist=*\nminSessionTimeout=400\n"
            "maxSessionTimeout=60000\nmaxClientCnxns=0\n",
            s->dir.path, s->port);
    fclose(f);
    zk_launch(s);
}

/* As with a power cut; its data stay. */
CT_FN void zk_crash(zk_server *s)
{
    zk_kill(s->pid, SIGKILL);
    s->pid = 0;
}

CT_FN void zk_wipe(zk_server *s)
{
    ct_dir data;
    snprintf(data.path, sizeof data.path, "%.50s/data", s->dir.path);
    ct_dir_remove(data);
}

CT_FN void zk_freeze(const zk_server *s)
{
    kill(s->pid, SIGSTOP);
}

CT_FN void zk_thaw(const zk_server *s)
{
    kill(s->pid, SIGCONT);
}

CT_FN void zk_end(zk_server *s)
{
    zk_crash(s);
    ct_dir_remove(s->dir);
}

/* How many clients are connected, the asking one left out. */
CT_FN int zk_connections(const zk_server *s)
{
    char text[65536], *line;
    int n = 0;
    zk_ask(s, "cons", text, sizeof text);
    for (line = text; (line = strstr(line, "sid=0x")) != NULL; line++)
        n++;
    return n;
}

/* How many watches the server keeps. (wchs leaves out those on children.) */
CT_FN int zk_watches(const zk_server *s)
{
    char text[8192], *at;
    zk_ask(s, "mntr", text, sizeof text);
    at = strstr(text, "zk_watch_count");
    return at ? atoi(at + strlen("zk_watch_count")) : -1;
}

/* --- another client: the wire protocol, one request at a time ----------------------------------- */

typedef struct zk_client {
    int fd;
    int xid;
    int64_t session;
    unsigned char in[1 << 20];
    size_t len, at;
    unsigned char out[8192];
    size_t put;
} zk_client;

#define ZK_OK 0
#define ZK_NONODE (-101)
#define ZK_EXISTS (-110)

CT_FN void zk_put_int(zk_client *c, int32_t v)
{
    int i;
    for (i = 3; i >= 0; i--)
        c->out[c->put++] = (unsigned char)((uint32_t)v >> (8 * i));
}

CT_FN void zk_put_long(zk_client *c, int64_t v)
{
    zk_put_int(c, (int32_t)((uint64_t)v >> 32));
    zk_put_int(c, (int32_t)(uint32_t)(uint64_t)v);
}

CT_FN void zk_put_text(zk_client *c, const char *text)
{
    size_t n = strlen(text);
    if (c->put + n + 64 > sizeof c->out)
        fail_msg("zk_client: too long");
    zk_put_int(c, (int32_t)n);
    memcpy(c->out + c->put, text, n);
    c->put += n;
}

CT_FN int32_t zk_get_int(zk_client *c)
{
    const unsigned char *p = c->in + c->at;
    if (c->at + 4 > c->len)
        fail_msg("zk_client: short answer");
    c->at += 4;
    return (int32_t)((uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3]);
}

CT_FN int64_t zk_get_long(zk_client *c)
{
    uint64_t high = (uint32_t)zk_get_int(c);
    return (int64_t)(high << 32 | (uint32_t)zk_get_int(c));
}

CT_FN void zk_get_text(zk_client *c, char *out, size_t size)
{
    int32_t n = zk_get_int(c);
    size_t len = n > 0 ? (size_t)n : 0;
    if (c->at + len > c->len)
        fail_msg("zk_client: short answer");
    snprintf(out, size, "%.*s", (int)len, (const char *)c->in + c->at);
    c->at += len;
}

CT_FN void zk_read(zk_client *c, unsigned char *out, size_t n)
{
    while (n) {
        ssize_t got = recv(c->fd, out, n, 0);
        if (got <= 0)
            fail_msg("zk_client: no answer");
        out += got;
        n -= (size_t)got;
    }
}

CT_FN void zk_turn(zk_client *c)
{
    unsigned char head[4];
    uint32_t n = (uint32_t)c->put - 4;
    head[0] = (unsigned char)(n >> 24);
    head[1] = (unsigned char)(n >> 16);
    head[2] = (unsigned char)(n >> 8);
    head[3] = (unsigned char)n;
    memcpy(c->out, head, 4);
    if (send(c->fd, c->out, c->put, MSG_NOSIGNAL) != (ssize_t)c->put)
        fail_msg("zk_client: cannot send");
    zk_read(c, head, 4);
    c->len = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
    if (c->len > sizeof c->in)
        fail_msg("zk_client: answer of %zu bytes", c->len);
    zk_read(c, c->in, c->len);
    c->at = 0;
}

/* A session of 10 seconds; it may rest no longer. */
CT_FN zk_client *zk_open(const zk_server *s)
{
    zk_client *c = (zk_client *)calloc(1, sizeof *c);
    assert_non_null(c);
    c->fd = zk_dial(s->port);
    if (c->fd < 0)
        fail_msg("zk_client: no connection");
    c->put = 4;
    zk_put_int(c, 0);
    zk_put_long(c, 0);
    zk_put_int(c, 10000);
    zk_put_long(c, 0);
    zk_put_int(c, 16);
    memset(c->out + c->put, 0, 17);
    c->put += 17;
    zk_turn(c);
    zk_get_int(c);
    zk_get_int(c);
    c->session = zk_get_long(c);
    return c;
}

CT_FN void zk_request(zk_client *c, int op)
{
    c->put = 4;
    zk_put_int(c, ++c->xid);
    zk_put_int(c, op);
}

/* Sends what was put; the error of the answer. */
CT_FN int zk_answer(zk_client *c)
{
    zk_turn(c);
    zk_get_int(c);
    zk_get_long(c);
    return zk_get_int(c);
}

CT_FN void zk_close(zk_client *c)
{
    zk_request(c, -11);
    zk_answer(c);
    close(c->fd);
    free(c);
}

/* flags: 0 persistent, 1 ephemeral. With an id, only that digest identity may do anything. */
CT_FN int zk_create_as(zk_client *c, const char *path, const char *data, int flags, const char *id)
{
    zk_request(c, 1);
    zk_put_text(c, path);
    zk_put_text(c, data);
    zk_put_int(c, 1);
    zk_put_int(c, 31);
    zk_put_text(c, id ? "digest" : "world");
    zk_put_text(c, id ? id : "anyone");
    zk_put_int(c, flags);
    return zk_answer(c);
}

CT_FN int zk_create(zk_client *c, const char *path, const char *data, int flags)
{
    return zk_create_as(c, path, data, flags, NULL);
}

CT_FN int zk_delete(zk_client *c, const char *path)
{
    zk_request(c, 2);
    zk_put_text(c, path);
    zk_put_int(c, -1);
    return zk_answer(c);
}

/* *owner: the session of an ephemeral node, 0 of a persistent one. */
CT_FN int zk_exists(zk_client *c, const char *path, int64_t *owner)
{
    int err, i;
    zk_request(c, 3);
    zk_put_text(c, path);
    c->out[c->put++] = 0;
    err = zk_answer(c);
    if (err)
        return err;
    for (i = 0; i < 4; i++)
        zk_get_long(c); /* czxid, mzxid, ctime, mtime */
    for (i = 0; i < 3; i++)
        zk_get_int(c); /* version, cversion, aversion */
    *owner = zk_get_long(c);
    return 0;
}

typedef struct zk_names {
    int count; /* or the error, negative */
    char name[64][1024];
} zk_names;

CT_FN void zk_children(zk_client *c, const char *path, zk_names *names)
{
    int i;
    zk_request(c, 8);
    zk_put_text(c, path);
    c->out[c->put++] = 0;
    names->count = zk_answer(c);
    if (names->count)
        return;
    names->count = zk_get_int(c);
    if (names->count > 64)
        fail_msg("zk_children: %d", names->count);
    for (i = 0; i < names->count; i++)
        zk_get_text(c, names->name[i], sizeof names->name[i]);
}

/* --- a proxy ------------------------------------------------------------------------------------ */

typedef enum zk_proxy_mode {
    ZK_PROXY_OPEN,   /* lets everything through */
    ZK_PROXY_REFUSE, /* no connection can be made, those there are closed */
    ZK_PROXY_CLOSE,  /* accepts and closes */
    ZK_PROXY_STALL   /* accepts and is silent; those there are silent too */
} zk_proxy_mode;

#define ZK_PROXY_MAX 16

typedef struct zk_proxy {
    int port;
    int target;
    int mode; /* atomic */
    int seen; /* the mode the thread acts by, atomic */
    int stop;
    int accepted; /* atomic: connections ever */
    int listener;
    int pair[ZK_PROXY_MAX][2];
    pthread_t thread;
} zk_proxy;

CT_FN int zk_proxy_listen(int *port)
{
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)*port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 64) ||
        getsockname(fd, (struct sockaddr *)&a, &size)) {
        close(fd);
        return -1;
    }
    if (!*port)
        *port = ntohs(a.sin_port);
    return fd;
}

CT_FN void zk_proxy_drop(int pair[2])
{
    struct linger hard;
    hard.l_onoff = 1;
    hard.l_linger = 0;
    setsockopt(pair[0], SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
    close(pair[0]);
    if (pair[1] >= 0)
        close(pair[1]);
    pair[0] = pair[1] = -1;
}

CT_FN void zk_proxy_accept(zk_proxy *p, int mode)
{
    int fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC), i;
    if (fd < 0)
        return;
    __atomic_add_fetch(&p->accepted, 1, __ATOMIC_RELAXED);
    for (i = 0; i < ZK_PROXY_MAX && p->pair[i][0] >= 0; i++) {
    }
    if (mode == ZK_PROXY_CLOSE || i == ZK_PROXY_MAX) {
        close(fd);
        return;
    }
    p->pair[i][0] = fd;
    p->pair[i][1] = mode == ZK_PROXY_STALL ? -1 : zk_dial(p->target);
    if (p->pair[i][1] < 0 && mode == ZK_PROXY_OPEN)
        zk_proxy_drop(p->pair[i]);
}

CT_FN void zk_proxy_move(int pair[2], int side)
{
    char buffer[16384];
    ssize_t n = recv(pair[side], buffer, sizeof buffer, MSG_DONTWAIT), sent = 0;
    if (n < 0 && errno == EAGAIN)
        return;
    while (n > 0 && sent < n) {
        ssize_t put = send(pair[1 - side], buffer + sent, (size_t)(n - sent), MSG_NOSIGNAL);
        if (put <= 0)
            n = 0;
        else
            sent += put;
    }
    if (n <= 0)
        zk_proxy_drop(pair);
}

CT_FN void *zk_proxy_run(void *arg)
{
    zk_proxy *p = (zk_proxy *)arg;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        struct pollfd fds[1 + 2 * ZK_PROXY_MAX];
        int mode = __atomic_load_n(&p->mode, __ATOMIC_ACQUIRE), i;
        if (mode == ZK_PROXY_REFUSE && p->listener >= 0) {
            close(p->listener);
            p->listener = -1;
        } else if (mode != ZK_PROXY_REFUSE && p->listener < 0) {
            p->listener = zk_proxy_listen(&p->port);
        }
        for (i = 0; i < ZK_PROXY_MAX; i++) {
            bool deaf = p->pair[i][0] >= 0 && p->pair[i][1] < 0 && mode == ZK_PROXY_OPEN;
            if (p->pair[i][0] >= 0 && (mode == ZK_PROXY_REFUSE || mode == ZK_PROXY_CLOSE || deaf))
                zk_proxy_drop(p->pair[i]);
        }
        __atomic_store_n(&p->seen, mode, __ATOMIC_RELEASE);
        fds[0].fd = p->listener;
        for (i = 0; i < 2 * ZK_PROXY_MAX; i++)
            fds[1 + i].fd = mode == ZK_PROXY_OPEN ? p->pair[i / 2][i % 2] : -1;
        for (i = 0; i < 1 + 2 * ZK_PROXY_MAX; i++) {
            fds[i].events = POLLIN;
            fds[i].revents = 0;
        }
        poll(fds, 1 + 2 * ZK_PROXY_MAX, 5);
        if (fds[0].revents)
            zk_proxy_accept(p, mode);
        for (i = 0; i < 2 * ZK_PROXY_MAX; i++) {
            if (fds[1 + i].revents && p->pair[i / 2][0] >= 0 && p->pair[i / 2][1] >= 0)
                zk_proxy_move(p->pair[i / 2], i % 2);
        }
    }
    return NULL;
}

CT_FN void zk_proxy_start(zk_proxy *p, int target)
{
    sigset_t all, old; /* so that nobody takes its thread for one of crpc's */
    int i;
    memset(p, 0, sizeof *p);
    p->target = target;
    p->listener = zk_proxy_listen(&p->port);
    for (i = 0; i < ZK_PROXY_MAX; i++)
        p->pair[i][0] = p->pair[i][1] = -1;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    if (p->listener < 0 || pthread_create(&p->thread, NULL, zk_proxy_run, p))
        fail_msg("no proxy");
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Returns when the new mode is in force. */
CT_FN void zk_proxy_set(zk_proxy *p, zk_proxy_mode mode)
{
    __atomic_store_n(&p->mode, (int)mode, __ATOMIC_RELEASE);
    if (!CT_WAIT(__atomic_load_n(&p->seen, __ATOMIC_ACQUIRE) == (int)mode, 5000))
        fail_msg("the proxy hangs");
}

CT_FN void zk_proxy_end(zk_proxy *p)
{
    int i;
    __atomic_store_n(&p->stop, 1, __ATOMIC_RELEASE);
    pthread_join(p->thread, NULL);
    for (i = 0; i < ZK_PROXY_MAX; i++) {
        if (p->pair[i][0] >= 0)
            zk_proxy_drop(p->pair[i]);
    }
    if (p->listener >= 0)
        close(p->listener);
}

#endif /* CRPC_ZK_H_INCLUDED */
