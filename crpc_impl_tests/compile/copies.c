/* Three copies of crpc in one program. */
#include "copies.h"

int main(void)
{
    return copy_static_a() + copy_static_b() + copy_normal();
}
