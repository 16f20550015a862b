/* Serves hand.Service, whose table is written by hand, and calls it: include crpc.h and its
 * implementation first. */
#include "hand.h"

#include <stdio.h>

static int hand_add(crpc_context *context, const void *request, void *response,
                    const void *handlers)
{
    (void)context;
    ((hand_Number *)response)->value =
        ((const hand_Number *)request)->value + *(const int *)handlers;
    return CRPC_OK;
}

static const crpc_method hand_methods[] = {
    {"hand.Service", "Add", &hand_Number_msg, &hand_Number_msg, sizeof(hand_Number),
     sizeof(hand_Number), hand_add, 0, 0},
};

static const crpc_service hand_service = {"hand.Service", hand_methods, 1};

/* 0 if a call came back with the right number. */
static int serve_and_call(const char *who)
{
    static const int addend = 1000;
    crpc_server *server = NULL;
    crpc_channel *channel = NULL;
    crpc_server_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    crpc_call call = CRPC_INIT;
    hand_Number request = {234}, response = {0};
    char url[CRPC_ADDRESS_MAX] = "";
    int status;

    options.listen = "tcp://127.0.0.1:0";
    status = crpc_server_open(&server, &options, &error);
    if (status == CRPC_OK)
        status = crpc_server_add(server, &hand_service, &addend, NULL);
    if (status == CRPC_OK)
        status = crpc_server_start(server, &error);
    if (status == CRPC_OK)
        status = crpc_loop_start(crpc_server_loop(server));
    if (status == CRPC_OK)
        status = crpc_server_address(server, 0, url, sizeof url);
    if (status == CRPC_OK)
        status = crpc_channel_open(&channel, url, NULL, &error);
    if (status == CRPC_OK) {
        status = crpc_channel_call(channel, &hand_methods[0], &request, &response, &call);
        error = call.error;
    }
    printf("%s: %s %s, %d\n", who, crpc_status_name(status), error.text, (int)response.value);
    crpc_call_reset(&call);
    crpc_channel_close(channel);
    crpc_server_close(server);
    return status == CRPC_OK && response.value == 1234 ? 0 : 1;
}
