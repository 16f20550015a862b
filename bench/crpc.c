/* The library, for crpc_server and crpc_client. */
#define CRPC_IMPLEMENTATION
#include "crpc.h"
