"""Where things are, and programs that scripts compile for themselves."""
import glob
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BUILD = os.path.abspath(os.environ.get("BUILD", os.path.join(ROOT, "build")))


def programs(directory, flags, *sources, proto="echo", zookeeper=False):
    """Compiles each source with what the example's .proto gives, if it is newer than its program
    there. Ends the script if one does not compile."""
    where = os.path.join(BUILD, "gen", "examples", proto)
    generated = [os.path.join(where, proto + end) for end in (".pb.c", ".crpc.c")]
    if not os.path.exists(generated[0]):
        sys.exit("%s: nothing is in %s: run `make examples` first" % (sys.argv[0], where))
    flags = [*flags, "-DTHREADED" if zookeeper else "-DCRPC_ENABLE_ZOOKEEPER=0"]
    libraries = ["-lprotobuf-nanopb", *(["-lzookeeper_mt"] if zookeeper else []), "-lpthread"]
    os.makedirs(directory, exist_ok=True)
    children = []
    for source in sources:
        name = os.path.splitext(os.path.basename(source))[0]
        program = os.path.join(directory, name)
        inputs = [os.path.join(ROOT, source), *generated]
        headers = glob.glob(os.path.join(os.path.dirname(inputs[0]), "*.h"))
        newest = max(map(os.path.getmtime, [*inputs, *headers, os.path.join(ROOT, "crpc.h")]))
        if os.path.exists(program):
            if os.path.getmtime(program) > newest:
                continue
            os.remove(program)      # so that an old one is not taken for one that compiles
        children.append(subprocess.Popen(
            [os.environ.get("CC", "gcc"), "-g", *flags, "-Wall", "-Wextra", "-Werror",
             "-I" + ROOT, "-I" + where, *inputs, "-o", program, *libraries]))
    if any([child.wait() for child in children]):
        sys.exit("%s: not everything compiles" % sys.argv[0])
