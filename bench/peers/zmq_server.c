/* zmq_server: sends each message back to where it came from. There is no dispatch. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

int main(void)
{
    char endpoint[128];
    size_t size = sizeof endpoint;
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_ROUTER);
    int backlog = 4096;
    zmq_setsockopt(socket, ZMQ_BACKLOG, &backlog, sizeof backlog);
    if (zmq_bind(socket, "tcp://127.0.0.1:*") != 0 ||
        zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, endpoint, &size) != 0) {
        return 1;
    }
    printf("%s\n", strrchr(endpoint, ':') + 1);
    fflush(stdout);
    for (;;) {
        zmq_msg_t part; /* first the peer's name, then the message */
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, socket, 0) < 0) {
            return 1;
        }
        zmq_msg_send(&part, socket, zmq_msg_more(&part) ? ZMQ_SNDMORE : 0);
    }
}
