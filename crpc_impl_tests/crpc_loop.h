/* What test_loop, test_watch, test_user and test_drive share. */
#ifndef CRPC_LOOP_TEST_H
#define CRPC_LOOP_TEST_H

CT_FN crpc_loop_stats stats_of(crpc_loop *l)
{
    crpc_loop_stats stats;
    crpc_loop_stats_get(l, &stats);
    return stats;
}

CT_FN int threads_of_process(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL)
        n += entry->d_name[0] != '.';
    closedir(dir);
    return n;
}

CT_UNUSED static int ticks;

CT_FN void tick(void *user)
{
    ++*(int *)user;
}

typedef struct poster {
    crpc_loop *loop;
    int *count;
} poster;

typedef struct timing {
    int64_t due_us;
    int early, count;
} timing;

CT_FN void on_timing(void *user)
{
    timing *t = (timing *)user;
    t->early += ct_now_us() < t->due_us;
    t->count++;
}

typedef struct watcher {
    crpc_loop *loop;
    crpc_id id, other;
    int fd, count;
    unsigned events;
    int how; /* 1: unwatches and closes, 2: reads all, 3: rewatches for nothing, 4: unwatches other
              */
} watcher;

CT_FN void on_watch(void *user, int fd, unsigned events)
{
    watcher *w = (watcher *)user;
    char buffer[100];
    assert_int_equal(fd, w->fd);
    w->count++;
    w->events = events;
    if (w->how == 1) {
        crpc_loop_unwatch(w->loop, w->id);
        close(fd);
    } else if (w->how == 2) {
        assert_true(read(fd, buffer, sizeof buffer) >= 0);
    } else if (w->how == 3) {
        assert_int_equal(crpc_loop_rewatch(w->loop, w->id, 0), CRPC_OK);
    } else if (w->how == 4) {
        crpc_loop_unwatch(w->loop, w->other);
    }
}

#endif
