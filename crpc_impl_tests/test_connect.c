/* Sockets that become connections. */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180
#include "crpc_test.h"
#include "crpc_net.h"

/* The kernel may connect a socket to itself when a closed port of the ephemeral range is dialled;
 * that must count as refused. */
static void a_connection_to_itself_counts_as_refused(void **state)
{
    int tries, fd, found = 0;
    (void)state;
    for (tries = 0; tries < 100 && !found; tries++) {
        struct sockaddr_in a;
        socklen_t size = sizeof a;
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&a, 0, sizeof a);
        a.sin_family = AF_INET;
        a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
        assert_int_equal(getsockname(fd, (struct sockaddr *)&a, &size), 0);
        if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0) { /* bound to where it goes */
            found = 1;
            assert_true(crpci_sock_is_self(fd));
        }
        close(fd);
    }
    assert_true(found);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        CT_TEST(a_connection_to_itself_counts_as_refused),
    };
    return CT_RUN(tests);
}
