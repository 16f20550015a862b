/* hand_table: a service without protoc, without a .proto, without generated code.
 *
 *   hand_table
 *
 *   $ hand_table
 *   serving on tcp://127.0.0.1:39211
 *   6 * 7 = 42
 *   1 / 0: EAPP, code 20001: ...
 *
 * Messages are C structs described with nanopb's own macros, and the service is a table of
 * crpc_method. The first part of this file is what protoc-gen-crpc would have written, so it also
 * shows what generated code consists of. The bytes on the wire are those of this .proto, so any
 * peer can call the service:
 *
 *   syntax = "proto3";
 *   package calc;
 *   message Operands { int32 left = 1; int32 right = 2; }
 *   message Result   { int32 value = 1; }
 *   service Calculator {
 *     rpc Multiply(Operands) returns (Result);
 *     rpc Divide(Operands) returns (Result);
 *   }
 *
 * The program starts a server, whose loop runs on a thread of its own, and calls it over TCP. It
 * exits with 0 if the results are right.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include <pb.h>
#include <stdio.h>

/* ---- the messages ---------------------------------------------------------------------------- */

typedef struct operands {
    int32_t left;
    int32_t right;
} operands;

typedef struct result {
    int32_t value;
} result;

/* One X for each field: allocation, rule, type, name of the member, tag. */
#define operands_FIELDLIST(X, a)                                                                   \
    X(a, STATIC, SINGULAR, INT32, left, 1)                                                         \
    X(a, STATIC, SINGULAR, INT32, right, 2)
#define operands_CALLBACK      NULL
#define operands_DEFAULT       NULL

#define result_FIELDLIST(X, a) X(a, STATIC, SINGULAR, INT32, value, 1)
#define result_CALLBACK        NULL
#define result_DEFAULT         NULL

PB_BIND(operands, operands, AUTO) /* defines operands_msg */
PB_BIND(result, result, AUTO)

/* ---- the handlers ---------------------------------------------------------------------------- */

#define DIVISION_BY_ZERO 20001 /* any number except 0-199 and 1000-3999 */

static int multiply(crpc_context *context, const void *request, void *response,
                    const void *handlers)
{
    const operands *in = (const operands *)request;
    result *out = (result *)response;

    (void)context;
    (void)handlers;
    out->value = (int32_t)((int64_t)in->left * in->right);
    return CRPC_OK;
}

static int divide(crpc_context *context, const void *request, void *response, const void *handlers)
{
    const operands *in = (const operands *)request;
    result *out = (result *)response;

    (void)handlers;
    if (in->right == 0) {
        return crpc_context_fail(context, DIVISION_BY_ZERO, "%d divided by zero", (int)in->left);
    }
    out->value = (int32_t)((int64_t)in->left / in->right);
    return CRPC_OK;
}

/* ---- the table ------------------------------------------------------------------------------- */

static const crpc_method methods[] = {
    {"calc.Calculator", "Multiply", &operands_msg, &result_msg, sizeof(operands), sizeof(result),
     multiply, CRPC_METHOD_IDEMPOTENT, 0},
    {"calc.Calculator", "Divide", &operands_msg, &result_msg, sizeof(operands), sizeof(result),
     divide, CRPC_METHOD_IDEMPOTENT, 0},
};

static const crpc_service calculator = {"calc.Calculator", methods, 2};

/* ---- a server and a client ------------------------------------------------------------------- */

static int complain(int status, const char *what, const char *detail)
{
    fprintf(stderr, "hand_table: %s: %s (%d): %s\n", what, crpc_status_name(status), status,
            detail[0] ? detail : crpc_status_text(status));
    return status;
}

/* Starts a server whose loop runs on a thread of its own; writes where it listens. */
static int start_server(crpc_server **server, char *url, size_t size)
{
    crpc_server_options options = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int status;

    options.listen = "tcp://127.0.0.1:0";
    if ((status = crpc_server_open(server, &options, &error)) != CRPC_OK) {
        return complain(status, "opening the server", error.text);
    }
    if ((status = crpc_server_add(*server, &calculator, NULL, NULL)) != CRPC_OK) {
        return complain(status, "adding the service", "");
    }
    if ((status = crpc_server_start(*server, &error)) != CRPC_OK) {
        return complain(status, "starting the server", error.text);
    }
    if ((status = crpc_server_address(*server, 0, url, size)) != CRPC_OK) {
        return complain(status, "asking for the address", "");
    }
    if ((status = crpc_loop_start(crpc_server_loop(*server))) != CRPC_OK) {
        return complain(status, "starting the loop's thread", "");
    }
    return CRPC_OK;
}

static int call_all(crpc_channel *channel)
{
    const operands six_seven = {6, 7}, one_zero = {1, 0};
    result out = {0};
    crpc_call call = CRPC_INIT;
    int status = crpc_channel_call(channel, &methods[0], &six_seven, &out, &call);

    if (status != CRPC_OK) {
        return complain(status, "Multiply", call.error.text);
    }
    printf("6 * 7 = %d\n", (int)out.value);

    status = crpc_channel_call(channel, &methods[1], &one_zero, &out, &call);
    if (status != CRPC_EAPP || call.error.app_code != DIVISION_BY_ZERO) {
        return complain(status, "Divide", call.error.text);
    }
    printf("1 / 0: %s, code %d: %s\n", crpc_status_name(status), call.error.app_code,
           call.error.text);
    crpc_call_reset(&call);
    return out.value == 42 ? CRPC_OK : CRPC_ERESPONSE;
}

static int call_server(const char *url)
{
    crpc_channel *channel = NULL;
    crpc_error error = CRPC_INIT;
    int status = crpc_channel_open(&channel, url, NULL, &error);

    if (status != CRPC_OK) {
        return complain(status, url, error.text);
    }
    status = call_all(channel);
    crpc_channel_close(channel);
    return status;
}

int main(void)
{
    crpc_server *server = NULL;
    char url[CRPC_ADDRESS_MAX + 8];
    int status = start_server(&server, url, sizeof url);

    if (status == CRPC_OK) {
        printf("serving on %s\n", url);
        status = call_server(url);
    }
    crpc_server_close(server); /* ends the loop's thread too; NULL is ignored */
    return status == CRPC_OK ? 0 : 1;
}
