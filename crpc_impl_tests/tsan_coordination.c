/* Coordination's scenarios under TSan, which finds what threads do to each other there.
 * crpc-test-timeout: 600 */
#define CRPC_IMPLEMENTATION
#include "../crpc.h"
#define CT_TEST_SECONDS 180 /* as in the file below */
#include "crpc_test.h"

#define ct_matrix(loop, scenario) ((void)(loop)) /* the system tests have reported it */
#include "system/sys_coordination.c"
