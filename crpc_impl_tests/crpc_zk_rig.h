/* A loop whose log and resolver the test controls, and a session on it that has no handle, for what
 * the ZooKeeper sections decide without a server. */
#ifndef CRPC_ZK_RIG_H
#define CRPC_ZK_RIG_H

static char lines[2048]; /* the log lines since loop_with */

CT_FN void on_log(void *user, int level, const char *line)
{
    size_t n = strlen(lines);
    (void)user;
    (void)level;
    snprintf(lines + n, sizeof lines - n, "%s\n", line);
}

/* "many": four addresses, one twice; "none": fails; "bad": says nonsense */
CT_FN int on_resolve(void *user, const char *host, char *addresses, size_t size)
{
    (void)user;
    if (strcmp(host, "many") == 0)
        snprintf(addresses, size, "10.0.0.1,::1,10.0.0.2,10.0.0.1");
    else if (strcmp(host, "bad") == 0)
        snprintf(addresses, size, "%s", "not.a.number,,");
    else
        return CRPC_ERESOLVE;
    return CRPC_OK;
}

CT_FN crpc_loop *loop_with(const crpc_hooks *hooks)
{
    crpc_loop_options o;
    crpc_loop *loop;
    memset(&o, 0, sizeof o);
    o.hooks = hooks ? *hooks : ct_hooks();
    o.hooks.resolve = on_resolve;
    o.hooks.log = on_log;
    lines[0] = '\0';
    return crpc_loop_open(&loop, &o) ? NULL : loop;
}

/* A session without a handle. */
CT_FN int session(crpc_loop *loop, const char *authority, crpci_zk_session **s)
{
    crpci_directory_options o;
    memset(&o, 0, sizeof o);
    o.session_timeout_ms = 4000;
    return crpci_zk_pool_new(loop, authority, &o, s, NULL);
}

#endif
