/* echo_client: makes one call, and prints all that is known if it fails.
 *
 *   echo_client URL TEXT [--timeout-ms N] [--attachment TEXT] [--log-id N]
 *
 *   $ echo_client tcp://127.0.0.1:8000 hello
 *   hello
 *
 * Prints the reply's text and, on a second line, its attachment if there is one. URL is any that
 * crpc_channel_open takes. The server may also be brpc's echo_server. Exit status: 0; 1 if the call
 * failed (code, address and cause are on stderr); 2 for wrong usage.
 *
 * Shows: a synchronous call, options of one call, views in a response, errors that explain.
 */
#define CRPC_IMPLEMENTATION
#include "crpc.h"

#include "echo.crpc.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int usage(void)
{
    fprintf(stderr, "usage: echo_client URL TEXT [--timeout-ms N] [--attachment TEXT] "
                    "[--log-id N]\n");
    return 2;
}

static bool parse_number(const char *text, long long min, long long max, long long *number)
{
    char *end = NULL;

    errno = 0;
    *number = strtoll(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && *number >= min && *number <= max;
}

static bool parse_options(int argc, char **argv, crpc_call *call)
{
    int i;

    for (i = 0; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        long long number = 0;

        if (strcmp(argv[i], "--attachment") == 0) {
            call->attachment = crpc_view_str(value);
        } else if (strcmp(argv[i], "--timeout-ms") == 0 &&
                   parse_number(value, 1, INT_MAX, &number)) {
            call->policy.timeout_ms = (int)number;
        } else if (strcmp(argv[i], "--log-id") == 0 &&
                   parse_number(value, LLONG_MIN, LLONG_MAX, &number)) {
            call->log_id = number;
        } else {
            return false;
        }
    }
    return i == argc; /* else the last option has no value */
}

/* A view is not terminated by a zero, and may hold any bytes: no printf of %s. */
static void print_view(const char *label, crpc_view view)
{
    printf("%s", label);
    if (crpc_view_size(view) > 0) {
        fwrite(crpc_view_data(view), 1, crpc_view_size(view), stdout);
    }
    putchar('\n');
}

static void print_error(int status, const crpc_error *error, const char *url)
{
    fprintf(stderr, "echo_client: %s (%d)", crpc_status_name(status), status);
    if (status == CRPC_EAPP) {
        fprintf(stderr, ", the service's own code %d", error->app_code);
    }
    fprintf(stderr, " at %s: %s\n", error->endpoint[0] ? error->endpoint : url,
            error->text[0] ? error->text : crpc_status_text(status));
}

static int echo_once(crpc_channel *channel, const char *url, const char *text, crpc_call *call)
{
    example_EchoRequest request = example_EchoRequest_init_zero;
    example_EchoResponse response = example_EchoResponse_init_zero;
    int status;

    request.message = crpc_view_str(text);
    status = example_EchoService_Echo(channel, &request, &response, call);
    if (status != CRPC_OK) {
        print_error(status, &call->error, url);
        return status;
    }
    print_view("", response.message); /* points into bytes that `call` keeps */
    if (crpc_view_size(call->reply_attachment) > 0) {
        print_view("attachment: ", call->reply_attachment);
    }
    return CRPC_OK;
}

int main(int argc, char **argv)
{
    crpc_channel *channel = NULL;
    crpc_call call = CRPC_INIT;
    crpc_error error = CRPC_INIT;
    int status;

    if (argc < 3 || !parse_options(argc - 3, argv + 3, &call)) {
        return usage();
    }
    status = crpc_channel_open(&channel, argv[1], NULL, &error);
    if (status != CRPC_OK) {
        print_error(status, &error, argv[1]);
        return 1;
    }
    status = echo_once(channel, argv[1], argv[2], &call);
    crpc_call_reset(&call); /* the response's views are invalid from here on */
    crpc_channel_close(channel);
    return status == CRPC_OK && fflush(stdout) == 0 ? 0 : 1;
}
