"""Where things are, and programs that scripts compile for themselves."""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.abspath(os.environ.get("BUILD", os.path.join(ROOT, "build")))
GENERATED = os.path.join(BUILD, "gen", "examples", "echo")


def programs(directory, flags, *sources):
    """Compiles each source with what echo.proto gives, if it is newer than its program there. Ends
    the script if one does not compile."""
    generated = [os.path.join(GENERATED, "echo" + end) for end in (".pb.c", ".crpc.c")]
    if not os.path.exists(generated[0]):
        sys.exit("%s: nothing is in %s: run `make examples` first" % (sys.argv[0], GENERATED))
    os.makedirs(directory, exist_ok=True)
    children = []
    for source in sources:
        name = os.path.splitext(os.path.basename(source))[0]
        program = os.path.join(directory, name)
        inputs = [os.path.join(ROOT, source), *generated]
        newest = max(map(os.path.getmtime, [*inputs, os.path.join(ROOT, "crpc.h")]))
        if os.path.exists(program):
            if os.path.getmtime(program) > newest:
                continue
            os.remove(program)      # so that an old one is not taken for one that compiles
        children.append(subprocess.Popen(
            [os.environ.get("CC", "gcc"), "-g", *flags, "-Wall", "-Wextra", "-Werror",
             "-DCRPC_ENABLE_ZOOKEEPER=0", "-I" + ROOT, "-I" + GENERATED, *inputs, "-o", program,
             "-lprotobuf-nanopb", "-lpthread"]))
    if any([child.wait() for child in children]):
        sys.exit("%s: not everything compiles" % sys.argv[0])
