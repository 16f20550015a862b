/* Declarations only, included twice. */
#include "crpc.h"
#include "crpc.h"

size_t compile_decl(void);
size_t compile_decl(void)
{
    crpc_call call = CRPC_INIT;
    crpc_loop_options loop = CRPC_INIT;
    crpc_channel_options channel = CRPC_INIT;
    crpc_server_options server = CRPC_INIT;
    crpc_hooks hooks = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    crpc_view view = crpc_view_of("view", 4);

    loop.hooks = hooks;
    channel.private_loop = loop;
    server.loops = loop;
    return crpc_view_size(view) + (size_t)call.policy.timeout_ms + (size_t)error.code +
           (size_t)channel.private_loop.max_results + (size_t)server.loops.max_results +
           (size_t)(crpc_view_data(view) != NULL);
}
