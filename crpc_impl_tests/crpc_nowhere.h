/* A registry at a port where nobody listens, for what is decided without a server. */
#ifndef CRPC_NOWHERE_H
#define CRPC_NOWHERE_H

CT_FN crpc_loop *nowhere_loop(const crpc_hooks *hooks)
{
    crpc_loop_options o;
    crpc_loop *loop;
    memset(&o, 0, sizeof o);
    o.hooks = hooks ? *hooks : ct_hooks();
    o.hooks.log_level = -1;
    o.forbid_threads = 1;
    return crpc_loop_open(&loop, &o) ? NULL : loop;
}

/* It does not wait. */
CT_FN int nowhere_open(crpc_registry **r, crpc_loop *loop, int port, const char *root)
{
    crpc_registry_options o;
    char url[128];
    memset(&o, 0, sizeof o);
    o.registry_timeout_ms = -1;
    snprintf(url, sizeof url, "zookeeper://127.0.0.1:%d%s", port, root);
    return crpc_registry_open(r, loop, url, &o, NULL);
}

#endif
