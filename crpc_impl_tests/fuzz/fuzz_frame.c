/* The 12 bytes before a message: what a connection decides from them, at every length. */
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t n, longest = size < CRPCI_FRAME_HEADER ? size : CRPCI_FRAME_HEADER;
    bool bad = false;
    for (n = 1; n <= longest; n++) {
        uint32_t body = 0xdeadbeef, meta = 0xdeadbeef;
        crpci_frame_result r = crpci_frame_header(data, n, &body, &meta);
        bool magic = memcmp(data, "PRPC", n < 4 ? n : 4) == 0;
        FUZZ_REQUIRE(!bad || r == CRPCI_FRAME_BAD); /* bad stays bad */
        if (!magic)
            FUZZ_REQUIRE(r == CRPCI_FRAME_BAD);
        else if (n < CRPCI_FRAME_HEADER)
            FUZZ_REQUIRE(r == CRPCI_FRAME_NEED);
        else
            FUZZ_REQUIRE(r == (meta <= body ? CRPCI_FRAME_OK : CRPCI_FRAME_BAD) &&
                         body == crpci_base_get32(data + 4) && meta == crpci_base_get32(data + 8));
        bad = r == CRPCI_FRAME_BAD;
    }
    return 0;
}

FUZZ_FN fuzz_seed fuzz_frame_seeds[] = {
    FUZZ_SEED("PRPC\0\0\0\x28\0\0\0\x21"), FUZZ_SEED("PRPC\xff\xff\xff\xff\0\0\0\x01"),
    FUZZ_SEED("PRPC\0\0\0\0\0\0\0\0"),     FUZZ_SEED("GET / HTTP/1.1\r\n"),
    FUZZ_SEED("PRI * HTTP/2.0\r\n"),
};

#ifdef CRPC_FUZZ_MAIN
int main(int argc, char **argv)
{
    return fuzz_main(fuzz_frame_seeds, sizeof fuzz_frame_seeds / sizeof fuzz_frame_seeds[0], argc,
                     argv);
}
#endif
